"""Under a service manager: the sockets it holds, a start that fails, restarts under load.

What is wrong with files is said.
"""

import base64
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading

import pytest

import fjmcp_broker
from rigs.broker_process import BROKER, BrokerProcess, run_program
from rigs.mcp_client import McpClient, OAuthClient
from rigs.rig import json_of


def start(installation, more=(), names="", wait=True):
    """A broker with more sockets than one."""
    place = installation
    broker = BrokerProcess(place.config, place.socket, place.log_path, place.folder, more=more, names=names)
    installation.broker = broker
    return broker.await_ready() if wait else broker


def status(sock, path, host):
    """The status of GET over a connected socket."""
    with sock:
        sock.settimeout(20)
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        return int(sock.makefile("rb").readline().split()[1])


def unix_socket(path):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(16)
    return listener


def connected_unix(path):
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    return sock


def port_of(listener):
    return listener.getsockname()[1]


# -- sockets


def test_every_socket_that_is_handed_over_is_served_the_one_named_metrics_for_metrics(
    make_installation, tmp_path
):
    installation = make_installation()
    second, metrics = (socket.create_server(("127.0.0.1", 0)) for _ in "ab")
    place = tmp_path / "s"
    with unix_socket(place) as unix, second, metrics:
        start(installation, (unix, second, metrics), "http:fjmcp-broker.socket::metrics")
        public = installation.url.removeprefix("http://")
        for host in (public, "localhost"):
            assert status(connected_unix(place), "/.well-known/oauth-authorization-server", host) == 200
        assert status(connected_unix(place), "/", "evil.example") == 421
        for listener in (installation.socket, second):
            for host in (public, f"localhost:{port_of(listener)}"):
                sock = socket.create_connection(listener.getsockname())
                assert status(sock, "/.well-known/oauth-protected-resource", host) == 200
        assert status(socket.create_connection(metrics.getsockname()), "/metrics", "x") == 200
        assert status(socket.create_connection(metrics.getsockname()), "/", "x") == 404
        assert status(socket.create_connection(second.getsockname()), "/metrics", public) == 404
        assert installation.records("serving")[0]["sockets"] == [
            f"http: 127.0.0.1:{port_of(installation.socket)}",
            f"http: unix:{place}",
            f"http: 127.0.0.1:{port_of(second)}",
            f"metrics: 127.0.0.1:{port_of(metrics)}",
        ]
        assert installation.broker.stop() == 0


def test_a_whole_login_is_good_over_a_unix_socket(make_installation, tmp_path):
    installation = make_installation()
    with unix_socket(tmp_path / "s") as unix:
        start(installation, (unix,))
        client = OAuthClient(installation.url)
        client.login(None, "alice", "secret")
        body = b'{"jsonrpc":"2.0","id":1,"method":"ping"}'
        head = (
            f"POST /mcp HTTP/1.1\r\nHost: {installation.url[7:]}\r\nContent-Length: "
            f"{len(body)}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nAuthorization: Bearer {client.tokens['access_token']}\r\n\r\n"
        )
        with connected_unix(tmp_path / "s") as sock:
            sock.sendall(head.encode() + body)
            assert b" 200 " in sock.makefile("rb").readline()


def test_a_socket_without_a_name_at_the_address_of_metrics_listen_is_for_metrics(make_installation):
    with socket.create_server(("127.0.0.1", 0)) as metrics:
        installation = make_installation(metrics_listen=f"127.0.0.1:{port_of(metrics)}")
        start(installation, (metrics,))
        assert status(socket.create_connection(metrics.getsockname()), "/metrics", "x") == 200


def test_that_listen_is_not_used_is_said(make_installation):
    installation = make_installation(listen="127.0.0.1:1")
    installation.start()
    assert installation.records("listen_not_used")[0]["listen"] == "127.0.0.1:1"
    other = make_installation()
    other.start()
    assert not other.records("listen_not_used")


@pytest.mark.parametrize("kind", ["datagram", "not listening", "file"])
def test_what_is_no_listening_socket_is_refused_with_a_sentence(make_installation, kind, tmp_path):
    installation = make_installation()
    if kind == "file":
        wrong = open(tmp_path / "file", "wb")
    else:
        wrong = socket.socket(socket.AF_INET, socket.SOCK_DGRAM if kind == "datagram" else socket.SOCK_STREAM)
    with wrong:
        broker = start(installation, (wrong,), "http:odd", wait=False)
        assert "socket 1 'odd' is no listening stream socket" in broker.await_status()
        assert broker.process.wait(30) == 2 and "Traceback" not in broker.log


# -- a start that fails


def test_under_a_service_manager_a_start_that_fails_says_why_and_waits_before_it_ends(make_installation):
    installation = make_installation()
    installation.write(**{**installation.settings, "forgejo_url": "", "max_sessions": "many"})
    broker = start(installation, wait=False)
    said = broker.await_status()
    assert "forgejo_url is missing" in said and "max_sessions" in said and "\n" not in said
    assert broker.process.poll() is None  # the service manager would start it again at once, and soon give up
    assert broker.process.wait(30) == 2 and "forgejo_url is missing" in broker.log


def test_without_a_service_manager_a_start_that_fails_ends_at_once(make_installation, monkeypatch):
    monkeypatch.setattr(fjmcp_broker.time, "sleep", lambda seconds: pytest.fail("it waits"))
    installation = make_installation()
    assert fjmcp_broker.main(["--config", str(installation.config), "--max-sessions", "many"]) == 2


# -- restarts


def busy_users(installation, count):
    """(login, session) of that many users, each initialized."""
    for number in range(1, count):
        installation.forgejo.add_user(f"user{number}", "secret")
    sessions = []
    for login in ("alice", *(f"user{number}" for number in range(1, count))):
        client = OAuthClient(installation.url)
        client.login(None, login, "secret")
        mcp = McpClient(installation.url + "/mcp", client.tokens["access_token"])
        mcp.initialize()
        sessions.append((login, mcp))
    return sessions


def test_four_restarts_under_eight_users_fail_no_call(make_installation):
    installation = make_installation()
    installation.start()
    sessions = busy_users(installation, 8)
    calls = {login: 0 for login, _ in sessions}
    over, failures, progress = threading.Event(), [], threading.Condition()

    def work(login, mcp):
        while not over.is_set():
            try:
                assert json_of(mcp.call_tool("get_my_user_info"))["Result"]["login"] == login
            except Exception as error:
                failures.append((login, repr(error)))
                over.set()
            with progress:
                calls[login] += 1
                progress.notify_all()

    threads = [threading.Thread(target=work, args=each) for each in sessions]
    for thread in threads:
        thread.start()
    for _ in range(4):
        with progress:  # everybody has called again since the restart
            before = dict(calls)
            assert progress.wait_for(
                lambda: over.is_set() or all(calls[login] > before[login] for login in calls), 60
            )
        os.kill(installation.broker.pid, signal.SIGTERM)  # as KillMode=mixed does: not its children
        assert installation.broker.process.wait(30) == 0
        installation.start()
    over.set()
    for thread in threads:
        thread.join(60)
    for _, mcp in sessions:
        mcp.close()
    assert not failures and min(calls.values()) >= 4


# -- files


ENCODINGS = {"utf-8": b"\xef\xbb\xbf", "utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_byte_order_mark_does_no_harm_in_any_file(make_installation, encoding):
    def marked(path, text):
        path.write_bytes(ENCODINGS[encoding] + text.replace("\n", "\r\n").encode(encoding))
        return str(path)

    installation = make_installation()
    folder = installation.folder
    settings = dict(installation.settings)
    secret = settings.pop("forgejo_oauth_client_secret")
    key = marked(folder / "sealing", base64.b64encode(b"k" * 32).decode() + "\n")
    for given in (
        {"forgejo_oauth_client_secret_file": marked(folder / "secret", secret + "\n")},
        {"secrets_file": marked(folder / "secrets", f'forgejo_oauth_client_secret = "{secret}"\n')},
    ):
        installation.write(**{**settings, "key_file": key, **given})
        marked(installation.config, installation.config.read_text())
        installation.start()
        OAuthClient(installation.url).login(None, "alice", "secret")
        assert installation.broker.stop() == 0
    done = installation.command("rotate-key")
    assert done.returncode == 0, done.stderr
    assert installation.start()


def test_what_is_no_text_is_said_to_be_none(make_installation):
    installation = make_installation()
    installation.start()
    assert installation.broker.stop() == 0
    key = installation.folder / "key"
    for path in (installation.config, key):
        installation.write(**installation.settings)
        path.write_bytes(b"\x80\x81 = 1")
        done = installation.command("users")
        assert done.returncode == 2 and "UTF-8" in done.stderr and "codec" not in done.stderr, done.stderr
        assert str(path) in done.stderr


COMMANDS = [["users"], ["revoke", "--all"], ["backup", "copy"], ["rotate-key"], ["check"], []]


@pytest.mark.parametrize("words", COMMANDS)
def test_a_damaged_store_is_said_to_be_damaged_and_only_then_a_backup_is_asked_for(make_installation, words):
    installation = make_installation()
    installation.start()
    OAuthClient(installation.url).login(None, "alice", "secret")
    assert installation.broker.stop() == 0
    store = installation.folder / "broker.db"
    data = bytearray(store.read_bytes())
    data[4096:] = b"\xa5" * (len(data) - 4096)
    store.write_bytes(data)
    done = installation.command(*words)
    said = done.stdout + done.stderr
    assert done.returncode in (1, 2) and "Traceback" not in said, said
    assert "damaged" in said and "Restore a backup" in said and "disk is full" not in said


FULL = """
set -e
mount -t tmpfs -o size={size}k tmpfs "$1"
cp -p "$2"/broker.db "$2"/key "$1"/
dd if=/dev/zero of="$1"/fill bs=4096 status=none 2>/dev/null || true
shift 2
exec "$@"
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
@pytest.mark.parametrize("words", COMMANDS)
def test_a_full_disk_is_said_to_be_full_and_no_backup_is_asked_for(make_installation, words, tmp_path):
    installation = make_installation()
    installation.start()
    OAuthClient(installation.url).login(None, "alice", "secret")
    assert installation.broker.stop() == 0
    disk = tmp_path / "disk"
    disk.mkdir()
    size = (installation.folder / "broker.db").stat().st_size // 1024 + 64
    words = [str(disk / word) if word == "copy" else word for word in words]
    given = ["--store-path", str(disk / "broker.db"), "--key-file", str(disk / "key"), *words]
    program = [sys.executable, "-I", str(BROKER), "--config", str(installation.config), *given]
    # A mount namespace of its own, private: what is mounted is seen by this one process and goes with it.
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", FULL.format(size=size), "sh"]
    done = subprocess.run(
        [*command, str(disk), str(installation.folder), *program], capture_output=True, text=True, timeout=60
    )
    said = done.stdout + done.stderr
    if "unshare:" in said or "mount:" in said:
        pytest.skip("no mounts here")
    assert "Traceback" not in said, said
    assert done.returncode in (1, 2) and "disk is full" in said and "Restore a backup" not in said, said


def sqlite_error(code):
    error = sqlite3.OperationalError("said")
    error.sqlite_errorcode = code
    return error


@pytest.mark.parametrize(
    "error, sentence",
    [
        (OSError(28, "No space left on device"), "disk is full .*no backup is needed"),
        (OSError(122, "Disk quota exceeded"), "disk is full"),
        (sqlite_error(sqlite3.SQLITE_FULL), "disk is full"),
        (OSError(30, "Read-only file system"), "mounted read-only"),
        (sqlite_error(sqlite3.SQLITE_READONLY_DBMOVED), "cannot be written"),
        (OSError(13, "Permission denied"), "user [0-9]+ may not use it"),
        (sqlite_error(sqlite3.SQLITE_CANTOPEN), "user [0-9]+ may not use it"),
        (sqlite_error(sqlite3.SQLITE_CORRUPT), "damaged .*Restore a backup"),
        (sqlite_error(sqlite3.SQLITE_NOTADB), "damaged .*Restore a backup"),
        (sqlite_error(sqlite3.SQLITE_BUSY), "another process"),
        (sqlite_error(sqlite3.SQLITE_IOERR_FSYNC), "disk fails"),
    ],
)
def test_each_trouble_with_a_file_has_its_own_remedy(error, sentence, tmp_path):
    said = fjmcp_broker.file_trouble(str(tmp_path / "x"), error)
    assert re.search(sentence, said) and ("backup" in said) == ("damaged" in said or "no backup" in said)


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root and setpriv")
@pytest.mark.parametrize("name", ["broker.db", "key", "broker.toml"])
def test_a_file_that_may_not_be_read_is_named(make_installation, name):
    installation = make_installation()
    installation.start()
    assert installation.broker.stop() == 0
    (installation.folder / name).chmod(0)
    program = [sys.executable, "-I", str(BROKER), "--config", str(installation.config), "users"]
    other = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]  # root without its rights over files
    done = subprocess.run([*other, *program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert name in done.stderr and ("Permission denied" in done.stderr or "may not use it" in done.stderr)


def test_a_folder_that_is_not_there_is_named(make_installation):
    installation = make_installation()
    installation.start()
    done = run_program("--config", str(installation.config), "backup", "/nowhere/copy")
    assert done.returncode == 1 and "/nowhere" in done.stderr and "Traceback" not in done.stderr
