"""Real clients, each through its own OAuth code, from a bare URL: the official SDKs, FastMCP, mcp-remote and the Inspector."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rigs.browser import Browser, approve_login
from rigs.child_control import ChildControl

CLIENTS = Path(__file__).resolve().parent / "clients"

pytestmark = pytest.mark.timeout(90, func_only=True)


def command(python, line, rig, user, *arguments):
    return [python, CLIENTS / f"sdk{line}_client.py", rig.url + "/mcp", user, "secret", *arguments]


def run_client(python, line, rig, *arguments):
    done = subprocess.run(
        command(python, line, rig, "alice", *arguments), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


class LineClient:
    """An SDK client that stays connected and takes a command a line."""

    def __init__(self, *words):
        self.process = subprocess.Popen(
            [*words, "--interactive-lines"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.started = self._answer()
        if "authorize" in self.started:  # the person is here, and not in the client's program
            self.started = self.ask(approve_login(Browser(), self.started["authorize"], "alice", "secret"))

    def _answer(self):
        return json.loads(self.process.stdout.readline() or '{"error": "it ended"}')

    def ask(self, line):
        """Carry out a command; its result."""
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self._answer()

    def __enter__(self):
        return self

    def __exit__(self, *_exc):
        with self.process:
            self.process.stdin.close()  # ends it, unless it waits for what does not come
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()


@pytest.mark.parametrize("line", [pytest.param(n, marks=pytest.mark.real(f"mcp{n}")) for n in (1, 2)])
def test_an_sdk_client_logs_in_lists_calls_refreshes_and_answers_questions(real_part, rig, line):
    result = run_client(
        real_part(f"mcp{line}"),
        line,
        rig,
        "--calls",
        "get_my_user_info",
        "--expire-and-call",
        "--elicit",
        "--progress",
    )
    assert (
        result["protocol_version"] == {1: "2025-11-25", 2: "2026-07-28"}[line]
    )  # 2.x asks for the newer era first
    assert "alice" in result["calls"][0]["text"]
    assert json.loads(result["elicit"]["text"])["action"] == "accept"
    assert result["progress"]["progress_count"] > 0
    assert result["refreshed"]["before"]["refresh_sha256"] != result["refreshed"]["after"]["refresh_sha256"]
    assert result["authorize_rounds"] == 1


@pytest.mark.parametrize("line", [pytest.param(n, marks=pytest.mark.real(f"mcp{n}")) for n in (1, 2)])
def test_an_sdk_client_works_with_the_real_forgejo_mcp(real_part, make_rig, line):
    rig = make_rig(forgejo_mcp_binary=real_part("forgejo-mcp"))
    result = run_client(real_part(f"mcp{line}"), line, rig, "--calls", "get_my_user_info")
    assert result["protocol_version"] == {1: "2025-11-25", 2: "2026-07-28"}[line]
    assert result["tools"] > 100
    assert "alice" in result["calls"][0]["text"]


@pytest.mark.real("mcp1", "mcp2")
def test_two_people_and_a_second_login_through_sdks_at_once(real_part, rig):
    """Forgejo ends alice's first refresh token when she logs in again; her first client must not notice (K16)."""
    one, two = real_part("mcp1"), real_part("mcp2")
    with (
        LineClient(*command(one, 1, rig, "alice")) as first,
        LineClient(*command(two, 2, rig, "bob")) as bob,
        LineClient(*command(two, 2, rig, "alice")) as second,
    ):
        for client, own, other in ((first, "alice", "bob"), (bob, "bob", "alice"), (second, "alice", "bob")):
            for step in ("call get_my_user_info", "refresh", "call get_my_user_info"):
                answer = client.ask(step)
                assert "error" not in answer, answer
                if "call" in answer:
                    assert own in answer["call"]["text"] and other not in answer["call"]["text"]
            assert answer["authorize_rounds"] == 1
        rig.clock.advance(
            3000
        )  # Forgejo's token runs out: the next calls refresh it, once for both of alice's clients
        rig.tick()
        assert all(
            "alice" in client.ask("call get_my_user_info")["call"]["text"] for client in (first, second)
        )


# -- every SDK before children of both eras


SDKS = {
    "python 1": ("mcp1", 1, ""),
    "python 2": ("mcp2", 2, "auto"),
    "python 2 as legacy": ("mcp2", 2, "legacy"),
    "typescript 1": ("npm", "1", ""),
    "typescript 2": ("npm", "2", "auto"),
    "typescript 2 as legacy": ("npm", "2", "legacy"),
}


def sdk_command(real_part, rig, folder, name):
    """The command of an SDK's client that takes lines, and the version that it is to come to."""
    part, line, mode = SDKS[name]
    version = "2026-07-28" if mode == "auto" else "2025-11-25"
    if part != "npm":
        return command(real_part(part), line, rig, "alice", *(["--mode", mode] if mode else [])), version
    for script in ("ts_client.mjs", "ts_lines.mjs"):
        shutil.copy(CLIENTS / script, folder)
    (folder / "node_modules").symlink_to(
        Path(real_part(part)).parents[2]
    )  # where an import looks is decided by where the script lies
    return [real_part(part), folder / "ts_client.mjs", line, rig.url + "/mcp", mode], version


@pytest.mark.parametrize("child", ["legacy", "modern"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.real(part)) for name, (part, *_) in SDKS.items()]
)
def test_an_sdk_has_progress_questions_subscriptions_and_cancelling_before_either_child(
    real_part, make_rig, tmp_path, name, child
):
    with ChildControl() as control:
        rig = make_rig(child=("--era", child, "--control", control.path))
        words, version = sdk_command(real_part, rig, tmp_path, name)
        with LineClient(*words) as client:
            assert client.started.get("protocol_version", client.started.get("version")) == version, (
                client.started
            )
            assert client.ask('call get_progress {"n": 3}')["call"]["progress_count"] == 3
            # Before anything is asked: afterwards a call that may be asked something has a child that nobody else hears of.
            assert client.ask("touch test://note")["touched"] == "test://note"
            assert json.loads(client.ask("call ask_elicit")["call"]["text"]) == {
                "action": "accept",
                "content": {"answer": "scripted"},
            }
            assert len(json.loads(client.ask("call ask_twice")["call"]["text"])) == 2
            assert client.ask('start get_slow {"key": "k"}')["started"] == "get_slow"
            called = control.wait_event(event="call", tool="get_slow")
            assert client.ask("cancel")["cancelled"] is True
            assert control.wait_event(event="cancelled", requestId=called["id"])
            assert "alice" in client.ask("call get_my_user_info")["call"]["text"]


# -- others


@pytest.fixture
def modules(real_part):
    """(Node, folder of node_modules) with the JavaScript clients."""
    node = real_part("npm")
    return node, Path(node).parents[2]


def browser_environment(folder, background=False):
    """An environment in which clients open a browser that is alice, and keep what they keep in `folder`."""
    person = f"{sys.executable} {CLIENTS / 'person.py'} alice secret %s"
    return {
        **os.environ,
        "BROWSER": person + (" &" if background else ""),
        "HOME": str(folder),
        "XDG_CONFIG_HOME": str(folder),
        "MCP_AUTO_OPEN_ENABLED": "true",
        "DISPLAY": ":0",
    }


@pytest.mark.real("npm")
@pytest.mark.parametrize("line", [1, 2])
def test_a_typescript_sdk_client_logs_in_lists_calls_refreshes_and_answers_questions(
    modules, rig, tmp_path, line
):
    node, folder = modules
    (tmp_path / "node_modules").symlink_to(folder)
    shutil.copy(CLIENTS / "ts_lines.mjs", tmp_path)
    script = shutil.copy(CLIENTS / "ts_client.mjs", tmp_path)
    with subprocess.Popen(
        [node, script, str(line), rig.url + "/mcp"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        asked = json.loads(process.stdout.readline())
        process.stdin.write(approve_login(Browser(), asked["authorize"], "alice", "secret") + "\n")
        process.stdin.flush()
        result = json.loads(process.stdout.readline())
    assert process.returncode == 0
    assert "alice" in result["first"] and "alice" in result["second"]
    assert result["refreshed"] and result["rounds"] == 1 and result["progress"] > 0
    assert (result["elicit"], result["questions"]) == ("accept", 1)


@pytest.mark.real("npm")
def test_mcp_remote_carries_a_stdio_client_through_the_login(modules, rig, tmp_path):
    node, folder = modules
    with subprocess.Popen(
        [node, folder / "mcp-remote/dist/proxy.js", rig.url + "/mcp"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=browser_environment(tmp_path),
    ) as process:

        def ask(number, method, params):
            process.stdin.write(
                json.dumps({"jsonrpc": "2.0", "id": number, "method": method, "params": params}) + "\n"
            )
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        opened = ask(
            1,
            "initialize",
            {
                "protocolVersion": "2025-11-25",
                "capabilities": {},
                "clientInfo": {"name": "x", "version": "1"},
            },
        )
        called = ask(2, "tools/call", {"name": "get_my_user_info", "arguments": {}})
        process.stdin.close()
    assert opened["result"]["serverInfo"]["name"] == "Forgejo MCP Server"
    assert "alice" in called["result"]["content"][0]["text"]


@pytest.mark.real("npm")
def test_the_inspectors_command_line_logs_in_and_calls(modules, rig, tmp_path):
    node, folder = modules
    inspector = folder / "@modelcontextprotocol/inspector/clients/launcher/build/index.js"
    done = subprocess.run(
        [
            node,
            inspector,
            "--cli",
            rig.url + "/mcp",
            "--transport",
            "http",
            "--callback-url",
            "http://127.0.0.1:0/oauth/callback",
            "--method",
            "tools/call",
            "--tool-name",
            "get_my_user_info",
        ],
        env=browser_environment(tmp_path),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "alice" in json.loads(done.stdout)["content"][0]["text"]


@pytest.mark.real("fastmcp")
def test_fastmcps_client_logs_in_and_calls(real_part, rig, tmp_path):
    done = subprocess.run(
        [real_part("fastmcp"), CLIENTS / "fastmcp_client.py", rig.url + "/mcp"],
        capture_output=True,
        text=True,
        timeout=60,
        env=browser_environment(tmp_path, background=True),
    )
    assert done.returncode == 0, done.stderr
    assert "alice" in json.loads(done.stdout)["first"]
