"""The commands for operators, as processes: init, check, listings, revoke, backup, rotate-key."""

import base64
import json
import os
import select
import sqlite3
import stat
import subprocess
import sys
import time

import pytest

from rigs.broker_process import BROKER, run_program
from rigs.mcp_client import HttpError, McpClient, OAuthClient
from rigs.proxy import Proxy
from rigs.rig import CHILD, text_of


def session(installation, user="alice"):
    client = OAuthClient(installation.url, name="Command test")
    client.login(None, user, "secret", "full")
    mcp = McpClient(installation.url + "/mcp", client.tokens["access_token"])
    mcp.initialize()
    mcp.oauth = client
    return mcp


def again(mcp):
    """The same session over a new connection, with the client's newest token."""
    return McpClient(mcp.url, mcp.oauth.tokens["access_token"], session_id=mcp.session_id)


# -- init


ANSWERS = (
    "--public-url",
    "https://mcp.example.org",
    "--forgejo-url",
    "https://forge.example.org",
    "--forgejo-oauth-client-id",
    "id",
    "--forgejo-oauth-client-secret",
    "canary-secret",
)


def test_init_writes_a_commented_file_that_can_be_read_and_keeps_secrets_apart(tmp_path):
    done = run_program("init", "--config", str(tmp_path / "broker.toml"), *ANSWERS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "https://mcp.example.org/oauth/callback" in done.stdout
    text = (tmp_path / "broker.toml").read_text()
    assert "canary-secret" not in text and (tmp_path / "client-secret").read_text().strip() == "canary-secret"
    assert len(base64.b64decode((tmp_path / "sealing-key").read_text())) == 32
    assert '# session_idle_timeout = "15m"' in text and 'public_url = "https://mcp.example.org"' in text
    for name in ("broker.toml", "client-secret", "sealing-key"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700
    shown = run_program("check", "--config", str(tmp_path / "broker.toml"), cwd=tmp_path)
    assert shown.returncode == 1 and "forgejo_url: https://forge.example.org does not answer" in shown.stdout
    assert "is missing" not in shown.stdout


def test_every_line_that_init_comments_out_is_a_valid_default(tmp_path):
    run_program("init", "--config", str(tmp_path / "broker.toml"), *ANSWERS, cwd=tmp_path)
    text = (tmp_path / "broker.toml").read_text()
    lines = [
        line.removeprefix("# ") if " = " in line and line.startswith("# ") and '= ""' not in line else line
        for line in text.partition("# Clients that are known")[0].splitlines()
    ]
    (tmp_path / "broker.toml").write_text("\n".join(lines))
    shown = run_program("check", "--config", str(tmp_path / "broker.toml"), cwd=tmp_path)
    assert (
        "must be" not in shown.stdout
        and "is not TOML" not in shown.stdout
        and "unknown setting" not in shown.stdout
    )


def test_init_never_overwrites_and_asks_for_what_is_missing(tmp_path):
    done = run_program("init", "--config", str(tmp_path / "broker.toml"), cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("is missing") == 4 and "--forgejo-url" in done.stderr
    (tmp_path / "broker.toml").write_text("mine")
    done = run_program("init", "--config", str(tmp_path / "broker.toml"), *ANSWERS, cwd=tmp_path)
    assert done.returncode == 2 and "is there already" in done.stderr
    assert (tmp_path / "broker.toml").read_text() == "mine" and not (tmp_path / "sealing-key").exists()


def test_init_asks_on_a_terminal_until_the_answer_is_good(tmp_path):
    import pty

    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-I", str(BROKER), "init", "--config", str(tmp_path / "broker.toml")],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=tmp_path,
        start_new_session=True,
    )
    os.close(theirs)
    shown = b""
    answers = {
        b"public_url: ": [b"mcp.example.org\n", b"https://mcp.example.org\n"],
        b"forgejo_url: ": [b"https://forge.example.org\n"],
        b"client_id: ": [b"id\n"],
        b"client_secret: ": [b"s3cret\n"],
    }
    seen = 0
    while True:
        try:
            shown += os.read(ours, 4096)
        except OSError:
            break
        for question, waiting in answers.items():
            if waiting and shown[seen:].endswith(question):
                seen = len(shown)
                os.write(ours, waiting.pop(0))
    os.close(ours)
    assert process.wait(20) == 0, shown
    assert b"must be a URL" in shown
    assert (tmp_path / "client-secret").read_text() == "s3cret\n"


# -- check


def test_check_finds_nothing_wrong_with_a_running_installation(make_installation):
    installation = make_installation()
    installation.start()
    done = installation.command("check")
    assert done.returncode == 0, done.stdout
    for part in (
        "store_path",
        "forgejo_url",
        "application, its secret and its redirect URI",
        "starts and answers as",
        "is answered by version",
    ):
        assert part in done.stdout
    assert "fail" not in done.stdout


@pytest.mark.parametrize(
    "words, problem, fix",
    [
        (
            ("--forgejo-oauth-client-secret", "wrong"),
            "forgejo_oauth_client_secret: Forgejo refuses it",
            "copy it again",
        ),
        (
            ("--forgejo-oauth-client-id", "wrong"),
            "forgejo_oauth_client_id: Forgejo refuses it",
            "copy it again",
        ),
        (("--public-url", "http://127.0.0.1:9"), "another redirect URI", "http://127.0.0.1:9/oauth/callback"),
        (
            ("--forgejo-mcp-binary", "nowhere-mcp"),
            "nowhere-mcp is not an executable program",
            "install forgejo-mcp",
        ),
        (("--forgejo-mcp-binary", "/bin/true"), "does not answer", "by hand"),
        (("--forgejo-oauth-scopes", "read:repo"), "contains no scope of Forgejo: read:repo", ""),
        (("--forgejo-url", "http://127.0.0.1:1"), "does not answer", "firewall"),
        (("--store-path", "/nowhere/broker.db"), "is not a folder this user can write to", "install -d"),
    ],
)
def test_check_names_each_problem_with_its_fix(make_installation, words, problem, fix):
    installation = make_installation()
    installation.start()
    done = installation.command("check", *words)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stdout + done.stderr
    assert "fail" in done.stdout and problem in done.stdout and fix in done.stdout


def test_check_warns_of_what_works_but_should_not_be_so(make_installation):
    installation = make_installation()
    installation.start()
    installation.folder.chmod(0o755)
    (installation.folder / "key").chmod(0o644)
    done = installation.command("check")
    assert done.returncode == 0
    assert f"chmod 600 {installation.folder / 'key'}" in done.stdout
    assert (
        "is open to other users" in done.stdout
        and "lies beside the store" in done.stdout
        and "http on loopback" in done.stdout
    )
    done = installation.command(
        "check",
        "--public-url",
        "https://mcp.example.org:8443",
        "--forgejo-internal-url",
        "http://192.0.2.1:1",
    )
    assert "names a port" in done.stdout


def test_check_tries_a_child_that_speaks_only_the_modern_era(make_installation):
    installation = make_installation(child=("--era", "modern"))
    installation.start()
    done = installation.command("check")
    assert "starts and answers as Forgejo MCP Server" in done.stdout, done.stdout


def test_check_does_not_wait_for_a_child_that_answers_with_rubbish(make_installation, tmp_path):
    rubbish = tmp_path / "rubbish.py"
    rubbish.write_text("import sys\nfor line in sys.stdin:\n    print('{\"result\": null}', flush=True)\n")
    installation = make_installation()
    installation.start()
    done = installation.command(
        "check", "--forgejo-mcp-binary", f"{sys.executable},{rubbish}", "--start-timeout", "1h"
    )
    assert done.returncode == 1 and "does not answer" in done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make the service's files somebody else's")
def test_check_says_which_containment_holds(make_installation, tmp_path):
    installation = make_installation()
    installation.start()
    assert "PR_SET_DUMPABLE is 0 when serving" in installation.command("check").stdout
    program = tmp_path / "forgejo-mcp"
    program.write_bytes(b"\x7fELF not really")

    def shown(mode, owner, served_by):
        program.chmod(mode)
        os.chown(program, owner, owner)
        os.chown(installation.folder / "broker.db", served_by, served_by)
        return installation.command("check", "--forgejo-mcp-binary", str(program)).stdout

    assert f"ok    containment: children of {program} cannot read each other's tokens" in shown(
        0o711, 0, 65534
    )
    for mode, owner, served_by in (
        (0o755, 0, 65534),
        (0o500, 65534, 65534),
        (0o111, 65534, 65534),
        (0o711, 0, 0),
    ):
        text = shown(mode, owner, served_by)
        assert (
            f"warn  containment: {program} can be read" in text
            and f"chown root:root {program}; chmod 0711 {program}" in text
        )


def test_a_process_that_hides_from_its_children_is_not_dumpable():
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import fjmcp_broker as b; get = lambda: b.ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)\n"
        "print(get(), b.hide_from_children(), get())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(BROKER.parent)], capture_output=True, text=True, timeout=30
    )
    assert done.stdout.split() == ["1", "True", "0"], done.stderr


def test_check_sees_a_clock_that_differs(make_installation):
    installation = make_installation()
    installation.start()
    assert "clocks" not in installation.command("check").stdout
    installation.forgejo.clock = lambda: time.time() - 3600
    done = installation.command("check")
    assert done.returncode == 1 and "clocks of Forgejo and of this machine differ by 3" in done.stdout


def test_check_sees_a_proxy_that_holds_streams_back(make_installation, tmp_path):
    installation = make_installation()
    installation.start()
    with Proxy(installation.socket.getsockname()[1]) as proxy:
        installation.forgejo.add_app([proxy.url + "/oauth/callback"], client_id="proxied", client_secret="x")
        installation.close()
        installation = make_installation()
        app = installation.forgejo.add_app([proxy.url + "/oauth/callback"])
        proxy.target = installation.socket.getsockname()[1]
        installation.write(
            **{
                **installation.settings,
                "public_url": proxy.url,
                "forgejo_oauth_client_id": app.client_id,
                "forgejo_oauth_client_secret": app.client_secret,
            }
        )
        installation.start()
        done = installation.command("check")
    assert done.returncode == 1 and "holds streams back" in done.stdout, done.stdout


# -- beside a running broker


def test_listings_are_tables_or_json_without_a_secret(make_installation):
    installation = make_installation()
    installation.start()
    mcp = session(installation)
    for kind, column in (
        ("users", "login"),
        ("clients", "client_id"),
        ("grants", "grant_id"),
        ("sessions", "session"),
    ):
        table, listed = installation.command(kind), installation.command(kind, "--json")
        assert table.returncode == listed.returncode == 0, table.stderr
        rows = json.loads(listed.stdout)
        assert len(rows) == 1 and table.stdout.splitlines()[0].split()[0] == next(iter(rows[0]))
        assert column in rows[0]
        for secret in (mcp.session_id, *mcp.oauth.tokens.values()):
            assert (
                not (isinstance(secret, str) and len(secret) > 30)
                or secret not in table.stdout + listed.stdout
            )


@pytest.mark.parametrize("words", [("--user", "ALICE"), ("--all",), ("--client", None), ("--grant", "1")])
def test_revoke_is_in_force_in_a_running_broker(make_installation, words):
    installation = make_installation()
    broker = installation.start()
    alice, bob = session(installation), session(installation, "bob")
    stream = alice.open_stream()
    stream.wait_comment(10)
    done = installation.command(
        "revoke", *(alice.oauth.client_id if word is None else word for word in words)
    )
    assert done.returncode == 0, done.stderr
    with pytest.raises(HttpError) as error:
        again(alice).request("ping")
    assert error.value.response.status == 401
    assert stream.ended.wait(10)
    if words != ("--all",):
        assert again(bob).request("ping") == {}
        while len(broker.children()) != 1:
            select.select([], [], [], 0.01)
    alice.oauth.login(None, "alice", "secret", "full")
    with pytest.raises(
        Exception
    ) as gone:  # the session ended with its last grant: a new login does not revive it
        again(alice).request("ping")
    assert "not found" in str(gone.value).lower()


def test_revoke_wants_exactly_one_target_and_says_when_there_is_none(make_installation):
    installation = make_installation()
    installation.start()
    assert installation.command("revoke").returncode == 2
    assert installation.command("revoke", "--all", "--user", "x").returncode == 2
    assert installation.command("revoke", "--user", "nobody").returncode == 1


def test_a_backup_is_whole_private_and_opens_with_the_key(make_installation):
    installation = make_installation()
    installation.start()
    mcp = session(installation)
    copy = installation.folder / "copy.db"
    assert installation.command("backup", str(copy)).returncode == 0
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    with sqlite3.connect(copy) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()
    assert installation.command("backup", str(copy)).returncode == 2
    installation.broker.stop()
    installation.write(**{**installation.settings, "store_path": str(copy)})
    installation.start()
    assert "alice" in text_of(again(mcp).call_tool("get_my_user_info"))


def test_rotate_key_beside_a_running_broker_loses_nothing(make_installation):
    installation = make_installation()
    installation.start()
    alice, key = session(installation), installation.folder / "key"
    before = key.read_text()
    done = installation.command("rotate-key")
    assert done.returncode == 0 and "sealed 1 credential" in done.stdout, done.stderr
    assert key.read_text().endswith(before) and len(key.read_text().split()) == 2
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    bob = session(installation, "bob")  # under whichever key the broker knows
    installation.broker.kill()
    installation.start()
    for mcp, name in ((alice, "alice"), (bob, "bob")):
        assert name in text_of(again(mcp).call_tool("get_my_user_info"))
        mcp.oauth.refresh()
    if (
        "are still sealed with older keys" in installation.command("check").stdout
    ):  # bob's, if the broker had not read the file yet
        assert "sealed 1 credential" in installation.command("rotate-key").stdout
    assert "every credential is sealed with the newest of 2 keys" in installation.command("check").stdout
    installation.broker.stop()
    key.write_text("\n".join(key.read_text().split()[:-1]) + "\n")
    installation.start()
    assert "bob" in text_of(again(bob).call_tool("get_my_user_info"))


def test_commands_on_a_store_that_is_not_there_say_so(tmp_path, make_installation):
    installation = make_installation()
    done = installation.command("users")
    assert done.returncode == 2 and "there is no store at" in done.stderr
    assert not os.path.exists(installation.settings["store_path"])


def test_a_list_is_run_as_it_is_and_the_child_is_found(make_installation):
    installation = make_installation()
    installation.start()
    assert installation.settings["forgejo_mcp_binary"][0] == CHILD[0]
    assert "starts and answers as Forgejo MCP Server" in installation.command("check").stdout
