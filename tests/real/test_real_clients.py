"""The official SDKs, each through its own OAuth code, from a bare URL.

Eras of children, two people at once, the real forgejo-mcp.
"""

import json

import pytest

from rigs.child_control import ChildControl
from rigs.client_rig import CLIENTS, LineClient, run_program
from rigs.real_clients import script_beside

pytestmark = pytest.mark.timeout(90, func_only=True)


def command(python, line, rig, user, *arguments):
    return [python, CLIENTS / f"sdk{line}_client.py", rig.url + "/mcp", user, "secret", *arguments]


def run_client(python, line, rig, *arguments):
    done = run_program(command(python, line, rig, "alice", *arguments))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


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
    """Forgejo ends alice's first refresh token when she logs in again.

    Her first client must not notice (K16).
    """
    one, two = real_part("mcp1"), real_part("mcp2")
    with (
        LineClient(command(one, 1, rig, "alice", "--interactive-lines")) as first,
        LineClient(command(two, 2, rig, "bob", "--interactive-lines")) as bob,
        LineClient(command(two, 2, rig, "alice", "--interactive-lines")) as second,
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
    script = script_beside(real_part(part), folder, "ts_client.mjs")
    return [real_part(part), script, line, rig.url + "/mcp", mode], version


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
        with LineClient([*words, "--interactive-lines"]) as client:
            assert client.started.get("protocol_version", client.started.get("version")) == version, (
                client.started
            )
            assert client.ask('call get_progress {"n": 3}')["call"]["progress_count"] == 3
            # Before anything is asked: afterwards a call that may be
            # asked something has a child that nobody else hears of.
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


# -- without a line of commands


@pytest.mark.real("npm")
@pytest.mark.parametrize("line", [1, 2])
def test_a_typescript_sdk_client_logs_in_lists_calls_refreshes_and_answers_questions(
    real_part, rig, tmp_path, line
):
    node = real_part("npm")
    script = script_beside(node, tmp_path, "ts_client.mjs")
    with LineClient([node, script, line, rig.url + "/mcp"]) as client:
        result = client.started
        assert client.logins == 1
    assert "alice" in result["first"] and "alice" in result["second"]
    assert result["refreshed"] and result["rounds"] == 1 and result["progress"] > 0
    assert (result["elicit"], result["questions"]) == ("accept", 1)
