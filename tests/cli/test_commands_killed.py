"""Operators' commands beside a running broker, killed between any two steps.

Nothing is lost, and run again they finish.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import fjmcp_broker
from fjmcp_broker import Keyring, Store, token_hash
from rigs.broker_process import BROKER
from rigs.mcp_client import McpClient, OAuthClient
from rigs.rig import text_of

NOW = fjmcp_broker.Clock().now()
DAY = 86400

# The program, which kills itself as `kill -9` would at step N:
# before or after a change of a file, or before a statement of SQL.
KILLED = """
import itertools, os, sys
sys.path.insert(0, sys.argv[1])
import fjmcp_broker
number, count = int(sys.argv[2]), itertools.count()
def step(*_):
    if next(count) == number:
        os.kill(os.getpid(), 9)
def hooked(name):
    real = getattr(os, name)
    def wrapper(*arguments, **named):
        step()
        result = real(*arguments, **named)
        step()
        return result
    setattr(os, name, wrapper)
for name in ("open", "unlink", "fsync", "replace", "chown"):
    hooked(name)
connect = fjmcp_broker.SqliteEngine._connect
def traced(path):
    connection = connect(path)
    connection.set_trace_callback(step)
    return connection
fjmcp_broker.SqliteEngine._connect = staticmethod(traced)
sys.exit(fjmcp_broker.main(sys.argv[3:]))
"""


def run_killed(config, number, *words):
    """Run a command that is killed at a step; its exit status (-9: killed, 0: it has fewer steps)."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(BROKER.parent), str(number), "--config", str(config), *words],
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode in (-signal.SIGKILL, 0), done.stderr
    return done.returncode


def kills(config, *words, before=lambda: None, steps=400):
    """Each way to kill a command: prepared by `before`, run up to its next step.

    Ends with the run that nothing stops.
    """
    for number in range(steps):
        before()
        if run_killed(config, number, *words) == 0:
            assert number > 5
            return
        yield number
    raise AssertionError("it has too many steps")


@pytest.fixture
def offline(tmp_path):
    """A configuration with a store of three users, each with two logins; prepare() brings it back to that."""
    template, folder = tmp_path / "template", tmp_path / "work"
    template.mkdir(mode=0o700)
    key = Keyring.parse(fjmcp_broker.new_key())
    (template / "key").write_text(fjmcp_broker.base64.b64encode(key.keys[0]).decode() + "\n")
    (template / "key").chmod(0o600)
    store = Store(str(template / "broker.db"), key)
    store.add_client("app", "dynamic", "An app", ["https://x.example/cb"], None, "none", {}, NOW)
    for sub in ("1", "2", "3"):
        store.update_user(sub, f"user{sub}", "", [], NOW)
        store.save_credential(
            sub,
            key.seal("upstream", f"user:{sub}", {"access": f"a{sub}", "refresh": f"r{sub}"}),
            1,
            1,
            NOW + 3600,
            NOW,
        )
        store.set_user_status(sub, "active")
        for number in (1, 2):
            code = f"{sub}.{number}"
            store.finish_login(
                sub,
                "app",
                "forgejo:read",
                "forgejo:read",
                "r",
                token_hash(code),
                "https://x.example/cb",
                "ch",
                NOW,
                NOW + DAY,
                NOW + 60,
            )
            store.redeem_code(
                token_hash(code),
                "app",
                "https://x.example/cb",
                "ch",
                NOW,
                (token_hash(code + "a"), NOW + DAY),
                (token_hash(code + "r"), NOW + DAY),
                3,
            )
        store.add_session(token_hash("session" + sub), sub, "app", "2025-11-25", {}, {}, NOW, 10)
    store.close()
    config = tmp_path / "broker.toml"
    config.write_text(
        "".join(
            f"{name} = {json.dumps(value)}\n"
            for name, value in {
                "public_url": "http://127.0.0.1:1",
                "forgejo_url": "http://127.0.0.1:2",
                "forgejo_oauth_client_id": "id",
                "forgejo_oauth_client_secret": "s",
                "store_path": str(folder / "broker.db"),
                "key_file": str(folder / "key"),
            }.items()
        )
    )

    def prepare():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(template, folder)

    prepare()
    return config, folder, prepare


def opened(folder):
    """The store's keys and {owner: value} of all its boxes; every one must open."""
    keys = Keyring.parse((folder / "key").read_text())
    store = Store(str(folder / "broker.db"), keys)
    values = {
        row.owner: (keys.unseal(row.purpose, row.owner, row.box), keys.is_newest(row.box))
        for row in store.boxes()
    }
    store.close()
    return keys, values


CREDENTIALS = {"store": "ok", **{f"user:{n}": {"access": f"a{n}", "refresh": f"r{n}"} for n in "123"}}


def test_G14_rotate_key_killed_between_any_two_steps_loses_nothing_and_goes_on(offline):
    config, folder, prepare = offline
    seen = set()
    for _ in kills(config, "rotate-key", before=prepare):
        keys, values = opened(folder)
        assert {owner: value for owner, (value, _) in values.items()} == CREDENTIALS
        assert len(keys.keys) in (1, 2) and stat.S_IMODE((folder / "key").stat().st_mode) == 0o600
        finished = len(keys.keys) == 2 and all(newest for _, newest in values.values())
        seen.add((len(keys.keys), sum(newest for _, newest in values.values())))
        assert fjmcp_broker.main(["--config", str(config), "rotate-key"]) == 0
        again, values = opened(folder)
        assert {owner: value for owner, (value, _) in values.items()} == CREDENTIALS and all(
            newest for _, newest in values.values()
        )
        assert len(again.keys) == (3 if finished else 2), (
            "a rotation that was under way goes on with its own key"
        )
    assert {(1, 4), (2, 0), (2, 2), (2, 4)} <= seen


def test_rotations_at_once_lose_no_key(offline):
    config, folder, _ = offline
    words = [sys.executable, "-I", str(BROKER), "--config", str(config), "rotate-key"]
    running = [
        subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    assert [process.communicate(timeout=60)[1] for process in running] == [""] * 4
    assert [process.returncode for process in running] == [0] * 4
    assert {owner: value for owner, (value, _) in opened(folder)[1].items()} == CREDENTIALS


def test_revoke_killed_between_any_two_steps_ends_whole_logins_only(offline):
    config, folder, prepare = offline
    left_over = set()
    for _ in kills(config, "revoke", "--all", before=prepare):
        opened(folder)
        with contextlib.closing(sqlite3.connect(folder / "broker.db")) as db:
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            half = db.execute(
                "SELECT count(*) FROM grants JOIN access_tokens USING (grant_id) WHERE ended_at IS NOT NULL"
            ).fetchone()[0]
            left = db.execute("SELECT count(*) FROM grants WHERE ended_at IS NULL").fetchone()[0]
            sessions = db.execute("SELECT count(*) FROM sessions").fetchone()[0]
        assert half == 0 and sessions == -(-left // 2)
        left_over.add(left)
        assert fjmcp_broker.main(["--config", str(config), "revoke", "--all"]) == (0 if left else 1)
        with contextlib.closing(sqlite3.connect(folder / "broker.db")) as db:
            assert (
                db.execute("SELECT count(*) FROM access_tokens").fetchone()
                == db.execute("SELECT count(*) FROM sessions").fetchone()
                == (0,)
            )
    assert left_over == set(range(7))


def test_a_backup_killed_between_any_two_steps_is_whole_or_not_there(offline):
    config, folder, prepare = offline
    copy, found = folder / "copy.db", set()
    for _ in kills(config, "backup", str(copy), before=prepare):
        found.add(copy.exists())
        if copy.exists():
            with contextlib.closing(sqlite3.connect(copy)) as db:
                assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
                assert db.execute("SELECT count(*) FROM users").fetchone() == (3,)
            assert fjmcp_broker.main(["--config", str(config), "backup", str(copy)]) == 2
        else:
            assert fjmcp_broker.main(["--config", str(config), "backup", str(copy)]) == 0
        assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert found == {True, False}


@pytest.mark.parametrize(
    "words", [("users", "--json"), ("clients", "--json"), ("grants", "--json"), ("sessions", "--json")]
)
def test_a_listing_that_is_killed_changes_nothing(offline, words):
    config, folder, prepare = offline

    def dump():
        with contextlib.closing(sqlite3.connect(folder / "broker.db")) as db:
            return list(db.iterdump())

    before = dump()
    for number in (0, 7, 12, 15):
        run_killed(config, number, *words)
        assert dump() == before


LISTED = {
    "users": {"sub", "login", "name", "state", "upstream_scope", "checked_at", "grants", "sessions"},
    "clients": {"client_id", "kind", "name", "auth_method", "created_at", "used_at", "grants"},
    "grants": {
        "grant_id",
        "login",
        "client_id",
        "client_name",
        "scope",
        "created_at",
        "used_at",
        "expires_at",
    },
    "sessions": {"session", "login", "client_id", "client_name", "protocol_version", "created_at", "used_at"},
}


@pytest.mark.parametrize("kind", LISTED)
def test_the_JSON_of_listings_has_the_members_that_the_guide_names(offline, capsys, kind):
    config, _, _ = offline
    assert fjmcp_broker.main(["--config", str(config), kind, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows and all(set(row) == LISTED[kind] for row in rows)
    guide = (BROKER.parent / "docs/operate.md").read_text()
    table = re.search(rf"^\| `{kind}` \|(.*)\|$", guide, re.MULTILINE)[1]
    assert set(re.findall(r"`([a-z_]+)`", table)) == LISTED[kind]


# -- beside a running broker


def session(installation, user="alice"):
    client = OAuthClient(installation.url, name="Operate test")
    client.login(None, user, "secret", "full")
    mcp = McpClient(installation.url + "/mcp", client.tokens["access_token"])
    mcp.initialize()
    mcp.oauth = client
    return mcp


def works(mcp, user):
    """Whether the session goes on, over a new connection, and its login can be refreshed."""
    again = McpClient(mcp.url, mcp.oauth.tokens["access_token"], session_id=mcp.session_id)
    return user in text_of(again.call_tool("get_my_user_info")) and mcp.oauth.refresh().status == 200


def test_rotate_key_killed_again_and_again_beside_a_running_broker(make_installation):
    installation = make_installation()
    installation.start()
    alice, bob = session(installation), session(installation, "bob")
    for number in range(20, 60, 4):
        run_killed(installation.config, number, "rotate-key")
        assert works(alice, "alice") and works(bob, "bob")
    assert installation.command("rotate-key").returncode == 0
    keys = Keyring.parse((installation.folder / "key").read_text())
    installation.forgejo.add_user("carol")
    carol = session(
        installation, "carol"
    )  # sealed with the newest key at once, though the broker was never told
    with contextlib.closing(sqlite3.connect(installation.folder / "broker.db")) as db:
        assert all(keys.is_newest(box) for (box,) in db.execute("SELECT credential FROM users"))
    installation.broker.stop()
    (installation.folder / "key").write_text((installation.folder / "key").read_text().split()[0] + "\n")
    installation.start()
    assert works(alice, "alice") and works(bob, "bob") and works(carol, "carol")


def test_G10_what_a_restored_backup_brings_back_and_that_revoke_all_ends_it(make_installation):
    installation = make_installation()
    installation.start()
    mcp = session(installation)
    old = dict(mcp.oauth.tokens)
    copy = installation.folder / "copy.db"
    assert installation.command("backup", str(copy)).returncode == 0
    assert mcp.oauth.refresh().status == 200
    assert installation.command("revoke", "--all").returncode == 0
    installation.broker.stop()
    for path in installation.folder.glob("broker.db*"):
        path.unlink()
    copy.rename(installation.folder / "broker.db")
    installation.start()
    assert text_of(
        McpClient(mcp.url, old["access_token"], session_id=mcp.session_id).call_tool("get_my_user_info")
    )  # as of the backup
    assert installation.command("revoke", "--all").returncode == 0
    mcp.oauth.tokens = old
    assert mcp.oauth.refresh().status == 400


def test_the_guide_says_what_a_restored_backup_brings_back():
    guide = (BROKER.parent / "docs/operate.md").read_text()
    for part in ("revoke --all", "-wal", "rotate-key", "0600", "carries the logins that were ended since"):
        assert part in guide, part


def test_a_key_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "key"

    with pytest.raises(KeyboardInterrupt), fjmcp_broker.new_file(str(path)) as name:
        Path(name).write_text("half")
        raise KeyboardInterrupt
    assert not path.exists()
    fjmcp_broker.put_file(str(path), "one")
    with pytest.raises(FileExistsError):
        fjmcp_broker.put_file(str(path), "two")
    with pytest.raises(FileExistsError):
        fjmcp_broker.put_file(str(path), "two", expected=b"another")
    fjmcp_broker.put_file(str(path), "two", expected=b"one")
    assert (
        path.read_text() == "two"
        and stat.S_IMODE(path.stat().st_mode) == 0o600
        and os.listdir(tmp_path) == ["key"]
    )
