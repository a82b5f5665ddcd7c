"""The official Python SDKs, each through its own OAuth provider, from a bare URL."""

import json
import subprocess
from pathlib import Path

import pytest

CLIENTS = Path(__file__).resolve().parent / "clients"

pytestmark = pytest.mark.timeout(90, func_only=True)


def command(python, line, rig, user, *arguments):
    return [python, CLIENTS / f"sdk{line}_client.py", rig.url + "/mcp", user, "secret", *arguments]


def run_client(python, line, rig, *arguments):
    done = subprocess.run(command(python, line, rig, "alice", *arguments), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


class LineClient:
    """An SDK client that stays connected and takes a command a line."""

    def __init__(self, *words):
        self.process = subprocess.Popen([*words, "--interactive-lines"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.started = self._answer()

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
        with self.process:  # closes its standard input, which ends it
            self.process.stdin.close()


@pytest.mark.parametrize("line", [pytest.param(n, marks=pytest.mark.real(f"mcp{n}")) for n in (1, 2)])
def test_an_sdk_client_logs_in_lists_calls_refreshes_and_answers_questions(real_part, rig, line):
    result = run_client(real_part(f"mcp{line}"), line, rig, "--calls", "get_my_user_info", "--expire-and-call", "--elicit", "--progress")
    assert result["protocol_version"] == "2025-11-25"
    assert "alice" in result["calls"][0]["text"]
    assert json.loads(result["elicit"]["text"])["action"] == "accept"
    assert result["progress"]["progress_count"] > 0
    assert result["refreshed"]["before"]["refresh_sha256"] != result["refreshed"]["after"]["refresh_sha256"]
    assert result["authorize_rounds"] == 1


@pytest.mark.parametrize("line", [pytest.param(n, marks=pytest.mark.real(f"mcp{n}")) for n in (1, 2)])
def test_an_sdk_client_works_with_the_real_forgejo_mcp(real_part, make_rig, line):
    rig = make_rig(forgejo_mcp_binary=real_part("forgejo-mcp"))
    result = run_client(real_part(f"mcp{line}"), line, rig, "--calls", "get_my_user_info")
    assert result["tools"] > 100
    assert "alice" in result["calls"][0]["text"]


def test_two_people_and_a_second_login_through_sdks_at_once(real_part, rig):
    """Forgejo ends alice's first refresh token when she logs in again; her first client must not notice (K16)."""
    one, two = real_part("mcp1"), real_part("mcp2")
    with (LineClient(*command(one, 1, rig, "alice")) as first, LineClient(*command(two, 2, rig, "bob")) as bob,
          LineClient(*command(two, 2, rig, "alice")) as second):
        for client, own, other in ((first, "alice", "bob"), (bob, "bob", "alice"), (second, "alice", "bob")):
            for step in ("call get_my_user_info", "refresh", "call get_my_user_info"):
                answer = client.ask(step)
                assert "error" not in answer, answer
                if "call" in answer:
                    assert own in answer["call"]["text"] and other not in answer["call"]["text"]
            assert answer["authorize_rounds"] == 1
        rig.clock.advance(3000)  # Forgejo's token runs out: the next calls refresh it, once for both of alice's clients
        rig.tick()
        assert all("alice" in client.ask("call get_my_user_info")["call"]["text"] for client in (first, second))
