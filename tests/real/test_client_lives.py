"""Each real client from its first login to a revocation.

Idle stop, `kill -9` of the broker and expiry leave it connected.
"""

import json
import os
import signal
import sqlite3
import sys
import time

import pytest

from rigs import client_rig, real_clients

CALM_LIMIT = 30.0

pytestmark = pytest.mark.timeout(300, func_only=True)


def entries():
    """The clients of the table as parameters, with the parts they need."""
    for name, entry in real_clients.TABLE.items():
        marks = [pytest.mark.real(*entry.parts)]
        marks += [pytest.mark.second] if entry.second else []
        marks += [pytest.mark.assistant] if entry.assistant else []
        yield pytest.param(entry, id=name, marks=marks)


@pytest.fixture
def installation(make_installation):
    """A broker as a process that puts children to sleep after a second."""
    made = make_installation(
        session_idle_timeout="1s", client_documents=False
    )  # no document can be fetched here
    made.start()
    return made


def assert_works(client, logins):
    """The client calls a tool as alice, and has logged in so often and no oftener."""
    answer = client.call("get_my_user_info")
    assert "alice" in answer.get("text", ""), answer
    assert client.logins == logins


def await_calm(installation):
    """Wait until every child has been put to sleep."""
    deadline = time.monotonic() + CALM_LIMIT
    while installation.broker.children():
        assert time.monotonic() < deadline, "a child does not fall asleep"
        time.sleep(0.05)


def let_tokens_expire(installation):
    """Every access token has run out, by the broker's account: the client holds one that it believes in."""
    with sqlite3.connect(installation.folder / "broker.db", timeout=30) as store:
        aged = store.execute("UPDATE access_tokens SET expires_at = issued_at").rowcount
    store.close()
    assert aged > 0


def check_talk(client, entry):
    """Progress and a question, where the client has a place for them."""
    told = client.call("get_progress", {"n": 3})
    assert "3" in told.get("text", ""), told
    assert told.get("progress_count", 0) == (3 if entry.progress else 0), told
    if entry.question:
        asked = json.loads(client.call("ask_elicit")["text"])
        assert asked == {"action": "accept", "content": {"answer": "scripted"}}


def check_revocation(installation, client, entry):
    """No call goes through with what was revoked, and after a login it works again."""
    done = installation.command("revoke", "--user", "alice")
    assert done.returncode == 0, done.stderr
    if entry.revoked == "asks":
        return assert_works(client, 2)
    answer = client.call("get_my_user_info")
    asks = entry.revoked != "says so"
    assert client.logins == (2 if asks else 1), answer
    assert asks or "alice" not in answer.get("text", ""), answer


@pytest.mark.parametrize("entry", list(entries()))
def test_a_real_client_stays_connected_until_its_login_is_revoked(entry, installation, real_part, tmp_path):
    url = installation.url + "/mcp"

    def start():
        folder = tmp_path / f"home{len(list(tmp_path.glob('home*')))}"
        folder.mkdir()
        return entry.start(real_part, url, folder)

    with start() as client:
        assert_works(client, 1)
        check_talk(client, entry)
        await_calm(installation)
        assert_works(client, 1)
        installation.broker.kill()
        installation.start()
        if entry.gives_up:
            client.start_anew()
        assert_works(client, 1)
        let_tokens_expire(installation)
        client.expire()
        assert_works(client, 1)
        check_revocation(installation, client, entry)
    with start() as again:
        assert_works(again, 1)


def test_a_client_that_says_nothing_is_not_waited_for_beyond_its_limit():
    with client_rig.Program([sys.executable, "-c", "input()"]) as program:
        with pytest.raises(client_rig.ClientFailed, match="no line within"):
            program.line(limit=0.2)


def test_what_a_program_leaves_with_its_pipes_is_not_waited_for(tmp_path):
    """A browser that a client opened outlives it, with the client's output still open."""
    left = "import subprocess, sys; print(subprocess.Popen(['sleep', '600'], start_new_session=True).pid)"
    done = client_rig.run_program([sys.executable, "-c", left])
    os.kill(int(done.stdout), signal.SIGKILL)
    with pytest.raises(client_rig.ClientFailed, match="not done within"):
        client_rig.run_program([sys.executable, "-c", "import time; time.sleep(600)"], limit=0.1)
