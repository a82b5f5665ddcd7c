"""The official Python SDKs, each through its own OAuth provider, from a bare URL."""

import json
import subprocess
from pathlib import Path

import pytest

CLIENTS = Path(__file__).resolve().parent / "clients"

pytestmark = pytest.mark.timeout(90, func_only=True)


def run_client(python, line, rig, *arguments):
    script = CLIENTS / f"sdk{line}_client.py"
    done = subprocess.run([python, script, rig.url + "/mcp", "alice", "secret", *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


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
