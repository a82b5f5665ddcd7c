"""How it is deployed.

The guide's commands, the units, the package, and the documents that are made from the program.
"""

import base64
import contextlib
import os
import re
import socket
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

import fjmcp_broker
from rigs import connect_table, settings_table
from rigs.broker_process import BROKER, BrokerProcess, run_program
from rigs.fake_forgejo import FakeForgejo
from rigs.mcp_client import McpClient, OAuthClient
from rigs.rig import CHILD, text_of

ROOT = BROKER.parent
NOT_HERE = ("apt-get", "adduser", "systemctl")  # what changes the machine
PLACES = ("/etc/", "/usr/local/", "/var/lib/")


def guide_commands():
    """The commands of docs/install.md, a line each."""
    text = (ROOT / "docs/install.md").read_text()
    return [
        line
        for block in re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
    ]


def unit(name):
    """A unit's settings: {key: [values]}."""
    found = {}
    for line in (ROOT / name).read_text().splitlines():
        if re.match(r"[A-Z]\w*=", line):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


@pytest.fixture
def installed():
    """A folder that stands for / before the guide's commands, with a Forgejo and a socket as systemd's.

    Gives a namespace.
    """
    with tempfile.TemporaryDirectory(prefix="fjmcp-installed-") as folder:
        os.chmod(folder, 0o755)  # unlike pytest's own, others may enter it
        yield from prepare(Path(folder))


def prepare(folder):
    root = folder / "root"
    for place in ("etc/systemd/system", "etc/caddy", "usr/local/bin", "var/lib/fjmcp-broker"):
        (root / place).mkdir(parents=True)
    (root / "var/lib/fjmcp-broker").chmod(0o700)
    (root / "usr/local/bin/forgejo-mcp").write_text(
        "#!/bin/sh\nexec %s\n" % " ".join(f"'{word}'" for word in CHILD)
    )
    (root / "usr/local/bin/forgejo-mcp").chmod(0o755)
    with contextlib.ExitStack() as cleanup:
        listener = cleanup.enter_context(socket.create_server(("127.0.0.1", 0), backlog=64))
        forgejo = FakeForgejo().start()
        cleanup.callback(forgejo.stop)
        url = "http://127.0.0.1:%d" % listener.getsockname()[1]
        app = forgejo.add_app([url + "/oauth/callback"])
        (folder / "secret").write_text(app.client_secret)

        def here(text):
            for place in PLACES:
                text = re.sub(rf"(?<![\w/]){place}", f"{root}{place}", text)
            return text.replace("https://mcp.example.org", url).replace(
                "https://git.example.org", forgejo.url
            )

        answers = (
            f" --forgejo-oauth-client-id {app.client_id} --forgejo-oauth-client-secret-file "
            f"{folder / 'secret'}"
        )
        yield SimpleNamespace(
            root=root,
            url=url,
            forgejo=forgejo,
            listener=listener,
            here=here,
            answers=answers,
            folder=folder,
            config=root / "etc/fjmcp-broker/broker.toml",
            secrets=root / "etc/fjmcp-broker/secrets.toml",
            app=app,
        )


def run_line(installed, line):
    line = installed.here(line).replace("python3", sys.executable, 1)
    line += installed.answers if " init " in line else ""
    environment = {
        **os.environ,
        "PATH": f"{installed.root}/usr/local/bin:{os.environ['PATH']}",
        "FJMCP_BROKER_CONFIG": str(installed.config),  # what is there on a machine that is not a test
    }
    done = subprocess.run(
        ["sh", "-ec", line], cwd=ROOT, capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return done.stdout


def follow_guide(installed):
    """Run the guide's commands but those that start it and look at it; the latter."""
    lines = [line for line in guide_commands() if not line.startswith(NOT_HERE)]
    checks = [line for line in lines if line.endswith(" check")]
    for line in lines:
        if line not in checks:
            run_line(installed, line)
    return checks


@contextlib.contextmanager
def service(installed):
    """The broker, started by the installed unit's words."""
    words = installed.here(unit("fjmcp-broker.service")["ExecStart"][0]).split()
    assert words[:4] == ["/usr/bin/python3", "-I", "-S", "-B"] and words[5:7] == [
        "--config",
        str(installed.config),
    ]
    secrets = installed.here(unit("fjmcp-broker.service")["StandardInput"][0]).removeprefix("file:")
    with open(secrets, "rb") as stdin:
        broker = BrokerProcess(
            installed.config,
            installed.listener,
            installed.folder / "log",
            installed.folder,
            program=Path(words[4]),
            stdin=stdin,
            arguments=words[7:],
        )
    try:
        yield broker.await_ready()
    finally:
        assert broker.stop() == 0


def login(installed):
    client = OAuthClient(installed.url)
    client.login(None, "alice", "secret")
    return client


def who(installed, client):
    mcp = McpClient(installed.url + "/mcp", client.tokens["access_token"])
    try:
        return text_of(mcp.call_tool("get_my_user_info"))
    finally:
        mcp.close()


def operator(installed, *words):
    """A command as the guide says: on the installed file, with its configuration."""
    program = installed.root / "usr/local/lib/fjmcp-broker/fjmcp_broker.py"
    done = run_program("--config", str(installed.config), *words, program=program)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# -- the guide


def test_the_guides_commands_make_an_installation_that_serves(installed):
    checks = follow_guide(installed)
    assert len(checks) == 1
    config = tomllib.loads(installed.config.read_text())
    assert installed.app.client_secret not in installed.config.read_text() and "key" not in config
    assert (
        tomllib.loads(installed.secrets.read_text())["forgejo_oauth_client_secret"]
        == installed.app.client_secret
    )
    assert (
        installed.secrets.stat().st_mode & 0o777 == 0o600 and installed.config.stat().st_mode & 0o777 == 0o644
    )
    with service(installed):
        shown = run_line(installed, checks[0])
        assert "fail  " not in shown and "is answered by version" in shown
        client = login(installed)
        assert '"login": "alice"' in who(installed, client)
        for listing, seen in (
            ("users", "alice"),
            ("clients", "scripted client"),
            ("grants", "alice"),
            ("sessions", "client_id"),
        ):
            assert seen in operator(installed, listing)


def guide_rows():
    text = (ROOT / "docs/install.md").read_text()
    return dict(re.findall(r"^\| ([^|]+) \| (.+) \|$", text, re.MULTILINE))


def test_backup_and_restore_go_as_the_guide_says(installed):
    assert "backup" in guide_rows()["backup"] and "no `-wal` or `-shm`" in guide_rows()["restore"]
    follow_guide(installed)
    store, copy = installed.root / "var/lib/fjmcp-broker/broker.db", installed.folder / "copy.db"
    with service(installed):
        client = login(installed)
        operator(installed, "backup", str(copy))
    for path in store.parent.glob("broker.db*"):
        path.unlink()
    copy.rename(store)
    with service(installed):
        assert "alice" in who(installed, client)
        assert client.refresh().status == 200


def test_another_key_is_put_in_as_the_guide_says(installed):
    assert "rotate-key" in guide_rows()["another sealing key"]
    follow_guide(installed)
    with service(installed):
        client = login(installed)
    old, new = tomllib.loads(installed.secrets.read_text())["key"], base64.b64encode(os.urandom(32)).decode()
    installed.secrets.write_text(installed.secrets.read_text().replace(old, f"{new},{old}"))
    with service(installed):
        operator(installed, "rotate-key")
        assert "alice" in who(installed, client)
    installed.secrets.write_text(installed.secrets.read_text().replace(f"{new},{old}", new))
    with service(installed):
        assert "alice" in who(installed, client)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as somebody else")
def test_commands_that_root_runs_leave_the_stores_files_to_its_owner(installed):
    follow_guide(installed)
    with service(installed):
        login(installed)
    folder = installed.root / "var/lib/fjmcp-broker"
    for path in (folder, *folder.iterdir()):
        os.chown(path, 65534, 65534)
    assert "alice" in operator(installed, "users")
    operator(installed, "revoke", "--user", "alice")
    operator(installed, "backup", str(installed.folder / "copy.db"))
    assert {path.stat().st_uid for path in folder.iterdir()} == {65534}
    assert (installed.folder / "copy.db").stat().st_uid == 0


# -- the units


@pytest.mark.real("systemd-analyze")
def test_the_unit_is_well_formed_and_hardened(real_part, tmp_path):
    analyze = real_part("systemd-analyze")
    for name in ("fjmcp-broker.service", "fjmcp-broker.socket", "fjmcp-broker-metrics.socket"):
        text = (ROOT / name).read_text()
        (tmp_path / name).write_text(
            re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", text, flags=re.MULTILINE)
        )
    done = subprocess.run(
        [analyze, "verify", "--man=no", *tmp_path.glob("fjmcp-broker*")], capture_output=True, text=True
    )
    assert "fjmcp-broker" not in done.stderr, done.stderr
    done = subprocess.run(
        [analyze, "security", "--offline=true", "--threshold=12", tmp_path / "fjmcp-broker.service"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_the_unit_hands_the_secrets_over_where_no_child_can_open_them():
    service = unit("fjmcp-broker.service")
    assert (
        service["StandardInput"] == ["file:/etc/fjmcp-broker/secrets.toml"]
        and "--secrets-file /dev/stdin" in service["ExecStart"][0]
    )
    assert service["Type"] == ["notify"] and "LoadCredential" not in service
    assert (
        int(service["TasksMax"][0]) >= 2000 + 50 * 20 + 200
        and int(service["LimitNOFILE"][0]) >= 2 * 2000 + 50 * 8
    )


def test_the_unit_lets_the_program_stop_in_its_own_time():
    service = unit("fjmcp-broker.service")
    assert int(service["TimeoutStopSec"][0]) > 10 + 5  # requests, then children (design 2)
    assert service["KillMode"] == ["mixed"]  # SIGTERM is the broker's alone: calls under way keep their child
    assert unit("fjmcp-broker.socket")["ListenStream"] == ["127.0.0.1:8080"]


def test_neither_service_nor_socket_is_ever_given_up():
    service = unit("fjmcp-broker.service")
    assert service["Restart"] == ["always"] and service["RestartSec"] == ["5"]
    assert service["StartLimitIntervalSec"] == ["0"] and "StartLimitBurst" not in service
    assert int(service["TasksMax"][0]) == 6144
    assert service["LogRateLimitIntervalSec"] == ["0"] and service["SyslogIdentifier"] == ["fjmcp-broker"]
    for name in ("fjmcp-broker.socket", "fjmcp-broker-metrics.socket"):
        assert unit(name)["TriggerLimitIntervalSec"] == ["0"]


def test_a_unit_holds_the_socket_of_metrics_because_the_service_may_open_none():
    assert unit("fjmcp-broker.service")["SocketBindDeny"] == ["any"]
    metrics = unit("fjmcp-broker-metrics.socket")
    assert metrics["ListenStream"] == ["127.0.0.1:9464"]
    assert metrics["FileDescriptorName"] == [fjmcp_broker.METRICS]
    assert metrics["Service"] == ["fjmcp-broker.service"]
    for document in ("install.md", "operate.md"):
        assert "fjmcp-broker-metrics.socket" in (ROOT / "docs" / document).read_text()


# -- the package and the documents


def test_the_table_of_settings_is_the_programs():
    assert (ROOT / "docs/settings.md").read_text() == settings_table.table()


def test_the_table_of_assistants_is_the_home_pages():
    assert connect_table.table() + "\n" in (ROOT / "docs/connect.md").read_text()


def test_every_link_in_the_documents_leads_somewhere():
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?://)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_pip_installs_the_command(tmp_path):
    pip = [sys.executable, "-m", "venv", "--system-site-packages", tmp_path / "venv"]
    subprocess.run(pip, check=True, capture_output=True)
    program = tmp_path / "venv/bin/python"
    source = tmp_path / "source"
    source.mkdir()
    for name in ("fjmcp_broker.py", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run(
        [program, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", source],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    shown = subprocess.run([tmp_path / "venv/bin/fjmcp-broker", "--version"], capture_output=True, text=True)
    assert shown.stdout.startswith("fjmcp-broker ")
