"""Every common client's own requests.

From the bare URL to a tool call with tokens refreshed in mid-session.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tools.replay import Replay, transcripts

ALL = transcripts()


@pytest.mark.parametrize("name", ALL)
def test_the_client_comes_from_the_url_to_a_tool_call(rig, name):
    Replay(rig.url, ALL[name]).run()


def test_all_clients_at_once_and_for_two_people(rig):
    with ThreadPoolExecutor(len(ALL)) as pool:
        runs = [
            pool.submit(Replay(rig.url, transcript).run, ("alice", "bob")[index % 2])
            for index, transcript in enumerate(ALL.values())
        ]
    assert [run.result() for run in runs] == [None] * len(ALL)


def test_every_common_client_has_a_transcript_with_its_sources():
    assert set(ALL) >= {
        "claude_ai",
        "claude_code",
        "chatgpt",
        "codex",
        "vscode",
        "cursor",
        "gemini_cli",
        "zed",
        "goose",
        "mcp_remote",
        "librechat",
        "inspector",
        "typescript_sdk",
        "python_sdk",
    }
    assert all(transcript["sources"] for transcript in ALL.values())
