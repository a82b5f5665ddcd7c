"""The commands for operators, as processes: init, check, listings, revoke, backup, rotate-key."""

import base64
import json
import os
import re
import select
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import fjmcp_broker
from rigs.broker_process import BROKER, run_program, toml
from rigs.mcp_client import HttpError
from rigs.processes import again, session
from rigs.proxy import Proxy
from rigs.rig import CHILD, text_of

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
    assert "fail  " not in done.stdout and done.stdout.splitlines()[-1].endswith(", 0 failed")


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
            "nowhere-mcp is in no folder of PATH",
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


@pytest.fixture
def open_folder():
    """A folder that every user may enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="fjmcp-check-") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")


@as_root
def test_check_says_which_containment_holds(make_installation, open_folder):
    installation = make_installation()
    installation.start()
    assert "PR_SET_DUMPABLE is 0 when serving" in installation.command("check").stdout
    program = open_folder / "forgejo-mcp"
    program.write_bytes(b"\x7fELF not really")

    def shown(mode, owner, served_by):
        program.chmod(mode)
        os.chown(program, owner, owner)
        os.chown(installation.folder / "broker.db", served_by, served_by)
        return installation.command("check", "--forgejo-mcp-binary", str(program)).stdout

    assert f"ok    containment: children of {program} cannot read each other's tokens" in shown(
        0o711, 0, NOBODY
    )
    for mode, owner, served_by in (
        (0o755, 0, NOBODY),
        (0o500, NOBODY, NOBODY),
        (0o111, NOBODY, NOBODY),
        (0o711, 0, 0),
    ):
        text = shown(mode, owner, served_by)
        assert (
            f"warn  containment: {program} can be read" in text
            and f"chown root:root {program}; chmod 0711 {program}" in text
        )


@pytest.fixture
def service(make_installation, open_folder):
    """An installation whose store is nobody's, in a folder that everybody may enter.

    Its program is a copy there.
    """
    installation = make_installation()
    installation.start()
    session(installation)
    installation.broker.stop()
    installation.socket.close()
    store = open_folder / "store"
    store.mkdir(0o700)
    for path in installation.folder.glob("broker.db*"):
        shutil.copy(path, store)
    shutil.copy(installation.folder / "key", open_folder / "key")
    installation.program = open_folder / "fjmcp_broker.py"
    shutil.copy(BROKER, installation.program)
    child = open_folder / "forgejo-mcp"
    child.write_text(
        "#!/bin/sh\nread line\n"
        """echo '{"jsonrpc":"2.0","id":"initialize","result":"""
        """{"serverInfo":{"name":"small","version":"9"}}}'\n"""
        "id -u >&2\ncat >/dev/null\n"
    )
    installation.config = open_folder / "broker.toml"
    installation.write(
        **{
            **installation.settings,
            "store_path": str(store / "broker.db"),
            "key_file": str(open_folder / "key"),
            "forgejo_mcp_binary": [str(child)],
        }
    )
    child.chmod(0o755)
    for path in (store, *store.iterdir(), open_folder / "key", installation.config):
        os.chown(path, NOBODY, NOBODY)
    return installation


@as_root
def test_check_as_root_has_the_rights_of_who_owns_the_store(service):
    done = service.command("check")
    assert "user: all of this is tried with the rights of nobody" in done.stdout
    assert "fail  " not in done.stdout and "starts and answers as small 9" in done.stdout, done.stdout
    assert re.fullmatch(r"[0-9]+ ok, [0-9]+ warnings?, 0 failed", done.stdout.splitlines()[-1])
    assert done.returncode == 0
    assert "the rights of nobody" not in service.command("check", "--as", "root").stdout
    assert service.command("check", "--as", "no-such-user").returncode == 2


@as_root
def test_check_finds_what_only_the_serving_user_cannot_do(service):
    folder = service.config.parent
    os.chown(folder / "key", 0, 0)
    os.chown(folder / "store" / "broker.db", 0, 0)
    (folder / "forgejo-mcp").chmod(0o700)
    service.config.chmod(0o600)
    os.chown(service.config, 0, 0)
    done = service.command("check", "--as", "nobody")
    assert done.returncode == 1
    for expected in (
        f"the configuration: nobody cannot read {service.config}: it belongs to root and has mode 0600",
        f"key_file: nobody cannot read {folder / 'key'}: it belongs to root",
        "nobody cannot run it",
        f"chmod 755 {folder / 'forgejo-mcp'}",
    ):
        assert expected in done.stdout, done.stdout
    os.chown(folder / "key", NOBODY, NOBODY)
    done = service.command("check", "--as", "nobody")
    assert f"store_path: nobody cannot write {folder / 'store' / 'broker.db'}" in done.stdout


@as_root
def test_the_service_manager_reads_the_secrets_file_and_who_serves_need_not(service):
    secrets = service.config.parent / "secrets.toml"
    secrets.write_text(toml({"forgejo_oauth_client_secret": service.settings["forgejo_oauth_client_secret"]}))
    secrets.chmod(0o600)
    service.write(**{**service.settings, "forgejo_oauth_client_secret": None, "secrets_file": str(secrets)})
    service.config.chmod(0o644)
    done = service.command("check")
    assert done.returncode == 0 and str(secrets) not in done.stdout, done.stdout
    secrets.chmod(0o644)
    done = service.command("check")
    assert done.returncode == 0
    assert (
        f"warn  secrets_file: {secrets} is open to other users\n      -> chmod 600 {secrets}" in done.stdout
    )


def test_check_warns_of_every_file_with_a_secret_that_others_can_read(make_installation):
    installation = make_installation()
    installation.start()
    session(installation)
    secret = installation.folder / "client-secret"
    secret.write_text(installation.settings["forgejo_oauth_client_secret"])
    held = [installation.folder / name for name in ("key", "broker.db", "broker.db-wal")]
    for path in (*held, secret, installation.config):
        path.chmod(0o644)
    shown = installation.command("check").stdout
    for path in (*held, installation.config):
        assert f"{path} is open to other users" in shown, shown
    installation.write(
        **{
            **installation.settings,
            "forgejo_oauth_client_secret": None,
            "forgejo_oauth_client_secret_file": str(secret),
        }
    )
    installation.config.chmod(0o644)
    shown = installation.command("check").stdout
    assert f"forgejo_oauth_client_secret_file: {secret} is open to other users" in shown
    assert f"{installation.config} is open" not in shown  # no secret is in it any more


def settings_with(folder, **values):
    """Settings as flags would give them."""
    given = {
        "public_url": "https://mcp.example.org",
        "forgejo_url": "https://git.example.org",
        "forgejo_oauth_client_id": "id",
        "forgejo_oauth_client_secret": "secret",
        "store_path": str(folder / "broker.db"),
    }
    return fjmcp_broker.load_settings({**given, **values}, {}, None)


def program(folder, content, mode=0o755):
    path = folder / "tried-program"
    path.write_bytes(content)
    path.chmod(mode)
    return path


ELF_FOR_ARM64 = b"\x7fELF\2\1\1" + bytes(9) + b"\2\0\xb7\0" + bytes(100)


@pytest.mark.parametrize(
    "content, mode, expected",
    [
        (None, 0, "is not an executable program: it is not there"),
        (b"#!/bin/sh\n", 0o644, "it is no executable program for this user"),
        (b"#!/opt/nowhere/python3\n", 0o755, "is a script for '/opt/nowhere/python3', which is not here"),
        (b"#!/bin/sh\r\nexit\r\n", 0o755, "its lines end as on Windows"),
        (ELF_FOR_ARM64, 0o755, "is built for ARM64, and this machine is"),
        (b"MZ\x90\0" + bytes(100), 0o755, "is a program for Windows"),
        (b"\x1f\x8b\x08\0" + bytes(100), 0o755, "is an archive (gzip) and has to be unpacked"),
        (b"<!DOCTYPE html><p>Not found", 0o755, "is no program: it begins with"),
        (b"", 0o755, "is an empty file"),
        (b"#!/bin/sh\necho the reason is here >&2\nexit 3\n", 0o755, "| the reason is here"),
    ],
)
def test_check_tells_why_a_program_does_not_start(tmp_path, content, mode, expected):
    path = tmp_path / "nothing" if content is None else program(tmp_path, content, mode)
    (found,) = fjmcp_broker.check_child(settings_with(tmp_path, forgejo_mcp_binary=f"{path},"))
    assert found.level == "fail" and expected in found.text and found.fix
    assert not re.search(r"[A-Z][a-z]+Error|Child[A-Z]|Errno", found.text)


def test_a_program_that_needs_another_loader_is_told_so():
    loader = b"/lib/ld-musl-nowhere.so.1\0"
    with open("/proc/self/exe", "rb") as file:
        own = file.read(20)
    entry = (3).to_bytes(4, "little") + bytes(4) + (120).to_bytes(8, "little") + bytes(40)
    head = own[:20] + bytes(12) + (64).to_bytes(8, "little") + bytes(14) + b"\x38\0\1\0" + bytes(6)
    assert len(head) == 64 and len(entry) == 56
    reason = fjmcp_broker.foreign_program("forgejo-mcp", head + entry + loader)
    assert "needs the loader /lib/ld-musl-nowhere.so.1" in reason


def test_a_forgejo_that_answers_only_who_is_signed_in_fails_nothing(make_installation, tmp_path):
    installation = make_installation(forgejo_args={"require_signin": True})
    installation.start()
    path = program(tmp_path, b"#!/bin/sh\necho connection test failed: 403 only signed in >&2\nexit 1\n")
    done = installation.command("check", "--forgejo-mcp-binary", f"{path},")
    assert done.returncode == 0 and "answers only who is signed in" in done.stdout, done.stdout
    assert "wants a user's login" in done.stdout and "| connection test failed" in done.stdout


def test_a_child_that_wants_a_token_only_is_tried_with_one(tmp_path):
    path = program(
        tmp_path,
        b'#!/bin/sh\n[ -n "$FORGEJO_ACCESS_TOKEN" ] || exit 1\nread line\n'
        b"""echo '{"jsonrpc":"2.0","id":"initialize","result":"""
        b"""{"serverInfo":{"name":"small","version":"9"}}}'\n""",
    )
    (found,) = fjmcp_broker.check_child(settings_with(tmp_path, forgejo_mcp_binary=f"{path},"))
    assert found.level == "ok" and "starts and answers as small 9" in found.text


def test_the_wrong_secret_of_a_public_application_is_found_where_forgejo_looks_at_it(make_installation):
    installation = make_installation()
    installation.start()
    public = installation.forgejo.add_app([installation.url + "/oauth/callback"], confidential=False)
    words = ("--forgejo-oauth-client-id", public.client_id, "--forgejo-oauth-client-secret", "wrong")
    done = installation.command("check", *words)
    assert done.returncode == 1 and "the application in Forgejo is public" in done.stdout, done.stdout


@pytest.mark.parametrize(
    "values, level, expected",
    [
        (
            {"allowed_groups": "acme", "forgejo_oauth_scopes": "openid write:organization"},
            "warn",
            "ENABLE_ADDITIONAL_GRANT_SCOPES",
        ),
        ({"access_token_lifetime": "5m"}, "warn", "access_token_lifetime: 300 s is short"),
        ({"forgejo_internal_url": "http://203.0.113.1:1"}, "warn", "which is not private"),
    ],
)
def test_check_sees_settings_that_cannot_be_meant_so(tmp_path, values, level, expected):
    (found,) = told_of(settings_with(tmp_path, **values))
    assert found.level == level and expected in found.text + found.fix


def told_of(settings):
    return [*fjmcp_broker.check_people(settings), *fjmcp_broker.check_urls(settings)]


@pytest.mark.parametrize(
    "values",
    [
        {"allowed_groups": "acme"},
        {"access_token_lifetime": "10m"},
        {"allowed_users": "alice,bob"},
        {"forgejo_internal_url": "http://10.1.2.3:3000"},
    ],
)
def test_check_says_nothing_of_settings_that_are_well(tmp_path, values):
    assert told_of(settings_with(tmp_path, **values)) == []


def test_what_is_not_fjmcp_broker_is_one_finding(make_installation):
    installation = make_installation()
    for command in (
        ("check", "--public-url", installation.forgejo.url),
        ("doctor", installation.forgejo.url),
    ):
        shown = installation.command(*command).stdout
        assert shown.count("is not fjmcp-broker") == 1, shown
        assert shown.count("fail  ") <= 3, shown


def test_what_fails_for_one_reason_is_one_finding():
    finding = fjmcp_broker.Finding
    found = [
        finding("fail", f"GET /{n}: status is 421, not 200. Needed by all", "pass Host on") for n in range(9)
    ]
    told = list(
        fjmcp_broker.collapsed([finding("ok", "fine"), *found, finding("fail", "another", "mend it")])
    )
    assert [each.level for each in told] == ["ok", "fail", "fail"]
    assert (
        told[1].text.startswith("9 requests get status 421, such as GET /0") and told[1].fix == "pass Host on"
    )


def test_after_the_start_what_check_finds_wrong_at_forgejo_and_in_the_child_is_a_warning(make_installation):
    installation = make_installation(check_at_start="true")
    installation.write(
        **{
            **installation.settings,
            "forgejo_oauth_client_secret": "wrong",
            "forgejo_mcp_binary": ["/bin/true"],
        }
    )
    installation.start()
    while len(found := installation.records("check_failed")) < 2:
        select.select([], [], [], 0.01)
    assert {record["level"] for record in found} == {"warning"}
    assert "Forgejo refuses it" in found[0]["problem"] and "copy it again" in found[0]["fix"]
    assert "/bin/true does not answer" in found[1]["problem"]


def test_a_process_that_hides_from_its_children_is_not_dumpable():
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import fjmcp_broker as b; get = lambda: "
        "b.ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)\n"
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
    assert stream.ended.wait(30)
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


def test_revoke_is_in_the_log_of_the_running_broker(make_installation):
    installation = make_installation()
    installation.start()
    alice, bob = session(installation), session(installation, "bob")
    assert installation.command("revoke", "--user", "alice").returncode == 0
    client_id = bob.oauth.client_id
    done = installation.command("revoke", "--client", client_id, "--forget")
    assert done.returncode == 0 and "removed the registration" in done.stdout, done.stdout + done.stderr
    while not installation.records("client_removed") or len(installation.records("token_revoked")) < 2:
        select.select([], [], [], 0.01)
    revoked = installation.records("token_revoked")
    assert [record["client"] for record in revoked] == [alice.oauth.client_id, client_id]
    assert {record["reason"] for record in revoked} == {"revoked by operator"}
    assert installation.records("client_removed")[0]["client"] == client_id
    assert client_id not in installation.command("clients", "--json").stdout
    assert bob.oauth.refresh().status == 401


def test_forget_goes_with_client_alone_and_spares_what_the_configuration_names(make_installation):
    clients = [{"client_id": "mine", "redirect_uris": ["https://app.example/cb"]}]
    installation = make_installation(clients=clients)
    installation.start()
    assert installation.command("revoke", "--all", "--forget").returncode == 2
    done = installation.command("revoke", "--client", "mine", "--forget")
    assert done.returncode == 2 and "[[clients]]" in done.stderr


def test_revoke_says_who_is_not_known(make_installation):
    installation = make_installation()
    installation.start()
    session(installation)
    for words, expected in (
        (("--user", "nobody-here"), "no such user: nobody-here"),
        (("--client", "fjd_none"), "no such client: fjd_none"),
        (("--grant", "99"), "no such login in force: 99"),
    ):
        done = installation.command("revoke", *words)
        assert done.returncode == 1 and expected in done.stderr, done.stderr
    assert installation.command("revoke", "--user", "alice").returncode == 0
    assert "alice has no login in force" in installation.command("revoke", "--user", "Alice").stderr.lower()


def test_tables_fit_the_terminal_and_lose_nothing():
    names = ["grant_id", "login", "client_id", "client_name"]
    row = ["1", "alice", "fjd_0123456789abcdefghijklmnopqrstuv", "A client with a rather long name"]
    wide = fjmcp_broker.table(names, [row], None)
    assert len(wide) == 2 and all(cell in wide[1] for cell in row)
    narrow = fjmcp_broker.table(names, [row], 60)
    assert max(map(len, narrow)) <= 60
    columns = [[line[start:stop].strip() for line in narrow[1:]] for start, stop in ((17, 38), (38, 99))]
    assert "".join(columns[0]).replace(" ", "")[:10] == "fjd_012345"
    assert "".join("".join(narrow[1:]).split()) != "" and "rather" in " ".join(narrow)
    tiny = fjmcp_broker.table(names, [row, row], 30)
    assert [line.split()[0] for line in tiny if line] == names * 2
    assert all(cell in "\n".join(tiny) for cell in row)


def test_since_leaves_out_what_was_not_used_since(make_installation):
    installation = make_installation()
    installation.start()
    session(installation)
    for since, count in (("1h", 1), ("2020-01-01", 1), ("2999-01-01", 0)):
        assert len(json.loads(installation.command("clients", "--json", "--since", since).stdout)) == count
    done = installation.command("users", "--since", "yesterdayish")
    assert done.returncode == 2 and "--since" in done.stderr


@pytest.mark.parametrize("name", fjmcp_broker.COMMANDS)
def test_each_command_says_what_it_takes(name):
    done = run_program(name, "--help")
    assert done.returncode == 0 and done.stdout.startswith(f"usage: fjmcp-broker [--config FILE] {name}")
    assert all(f"--{flag}" in done.stdout for flag in fjmcp_broker.COMMANDS[name].own_flags())


def test_rotate_key_says_the_three_steps_where_the_key_is_in_the_configuration(make_installation):
    installation = make_installation()
    installation.start()
    session(installation)
    key = (installation.folder / "key").read_text().strip()
    installation.broker.stop()
    installation.write(**{**installation.settings, "key": key, "key_file": None})
    done = installation.command("rotate-key")
    assert done.returncode == 2 and "Three steps" in done.stderr and "  3. " in done.stderr
    new = base64.b64encode(bytes(32)).decode()
    installation.write(**{**installation.settings, "key": f"{new},{key}", "key_file": None})
    assert "sealed 1 credential" in installation.command("rotate-key").stdout


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
