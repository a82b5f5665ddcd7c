"""The real program as a process: how it starts, stops, re-reads, dies, and what is there afterwards."""

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

import run
from rigs import broker_process
from rigs.broker_process import BROKER, command_of, run_program
from rigs.browser import Browser, approve_login
from rigs.mcp_client import McpClient, OAuthClient, RpcError
from rigs.processes import await_end, hanging_call, in_thread, login, session
from rigs.rig import CHILD, text_of, token_of


def found_pythons():
    return [python.path for version in run.WANTED_PYTHONS if (python := run.find_python(version))]


# -- the command line


def test_version_and_help_need_nothing(tmp_path):
    done = run_program("--version", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("fjmcp-broker ")
    shown = run_program("--help", cwd=tmp_path)
    assert (
        shown.returncode == 0
        and "--forgejo-oauth-client-secret" in shown.stdout
        and "rotate-key" in shown.stdout
    )
    assert not list(tmp_path.iterdir())


def test_what_compiling_the_file_took_is_not_kept_in_memory(make_installation):
    broker = make_installation().start()
    with open(f"/proc/{broker.pid}/status") as file:
        resident = next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))
    assert resident < 45 << 10  # KiB; 30 MiB more with all that Python makes of the text
    assert str(BROKER).encode() in command_of(broker.pid).split(b"\0")


def test_nothing_is_imported_from_the_folder_it_is_started_in(tmp_path):
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong module')\n")
    done = subprocess.run(
        [sys.executable, BROKER, "--version"], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("fjmcp-broker ")


@pytest.mark.parametrize("options", [["--"], ["-X", "dev"], ["-W", "error"], ["-I", "-OO", "-u", "--"]])
def test_options_of_python_stay_in_force_and_nothing_is_said_of_the_start(tmp_path, options):
    folder = tmp_path / "a folder"
    folder.mkdir()
    shutil.copy(BROKER, folder)
    done = subprocess.run(
        [sys.executable, *options, "fjmcp_broker.py", "--version"],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("fjmcp-broker ")


@pytest.mark.parametrize("name", ["another", "nowhere"])
def test_a_process_may_have_a_name_under_which_another_program_or_none_is_found(tmp_path, name):
    another = tmp_path / "another"
    another.write_text("#!/bin/sh\nexit 77\n")
    another.chmod(0o755)
    done = subprocess.run(
        [name, BROKER, "--version"],
        executable=os.path.realpath(sys.executable),
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("fjmcp-broker ")


def test_where_no_pipe_is_to_be_had_it_runs_as_it_is(tmp_path):
    shell = 'ulimit -n 4 && exec "$@"'  # a file that is imported can still be opened
    done = subprocess.run(
        ["/bin/sh", "-c", shell, "sh", sys.executable, "-I", "-S", BROKER, "--version"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("fjmcp-broker ")


@pytest.mark.parametrize(
    "words, expected",
    [
        (
            (),
            [
                "public_url is missing",
                "forgejo_url is missing",
                "forgejo_oauth_client_id",
                "forgejo_oauth_client_secret",
            ],
        ),
        (("--pubilc-url", "x"), ["unknown flag --pubilc-url", "'public_url'"]),
        (("serv",), ["unknown command 'serv'", "serve"]),
        (("--listen",), ["--listen needs a value"]),
        (("users", "--user", "x"), ["--user is not for users"]),
        (("backup",), ["one FILE"]),
        (("--config", "/nowhere/x.toml"), ["cannot read /nowhere/x.toml"]),
    ],
)
def test_wrong_usage_ends_with_2_and_says_everything_at_once(tmp_path, words, expected):
    done = run_program(*words, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert all(part in done.stderr for part in expected), done.stderr


def test_all_configuration_errors_are_told_with_where_they_came_from(make_installation):
    installation = make_installation(
        session_idle_timeout="soon", max_sesions=3, forgejo_oauth_scopes="read:repo"
    )
    done = installation.command("--listen", "nowhere", environment={"FJMCP_BROKER_MAX_BODY": "-1"})
    assert done.returncode == 2
    for part in (
        "session_idle_timeout",
        "'max_sesions'; did you mean 'max_sessions'",
        "read:repo",
        "flag: listen",
        "environment: max_body",
        f"file {installation.config}",
    ):
        assert part in done.stderr


@pytest.mark.parametrize("python", found_pythons())
def test_the_file_alone_in_an_empty_folder_serves_the_whole_path(make_installation, tmp_path, python):
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(BROKER, alone)
    installation = make_installation(python=python, program=alone / BROKER.name)
    installation.start()
    mcp = session(installation)
    assert len(mcp.list_tools()) > 3
    assert '"login": "alice"' in text_of(mcp.call_tool("get_my_user_info"))
    assert installation.broker.stop() == 0
    assert [path.name for path in alone.iterdir()] == [BROKER.name]


def test_the_environment_configures_it_as_the_file_does(make_installation, tmp_path):
    installation = make_installation()
    installation.start()
    values = {
        f"FJMCP_BROKER_{name.upper()}": ",".join(value) if isinstance(value, list) else value
        for name, value in installation.settings.items()
    }
    done = run_program("check", cwd=tmp_path, environment=values)
    assert done.returncode == 0, done.stdout + done.stderr


# -- the end


def test_SIGTERM_answers_what_was_read_ends_idle_streams_and_leaves_no_child(make_installation, control):
    installation = make_installation(child=("--control", control.path))
    broker = installation.start()
    mcp = session(installation)
    stream = mcp.open_stream()
    stream.wait_comment(10)
    join = hanging_call(mcp, control)
    pids = broker.children()
    assert pids
    broker.process.send_signal(signal.SIGTERM)
    assert stream.ended.wait(30)
    control.release("k")
    assert not isinstance(join(), Exception)
    assert broker.process.wait(25) == 0
    assert await_end(pids) == []


def test_SIGTERM_gives_an_error_to_a_call_that_takes_longer(make_installation, control):
    installation = make_installation(
        child=("--control", control.path, "--mode", "ignore_term"), stop_timeout="200ms"
    )
    broker = installation.start()
    mcp = session(installation)
    join = hanging_call(mcp, control)
    broker.process.send_signal(signal.SIGTERM)
    error = join()
    assert isinstance(error, RpcError) and error.code == -32000 and error.data["outcome_unknown"] is True
    assert broker.process.wait(25) == 0


def test_new_connections_go_to_the_next_process_during_a_restart(make_installation, control):
    installation = make_installation(child=("--control", control.path))
    first = installation.start()
    mcp = session(installation)
    join = hanging_call(mcp, control)
    first.process.send_signal(signal.SIGTERM)
    while not any(record["event"] == "stopping" for record in installation.records()):
        select.select([], [], [], 0.01)
    waiting = in_thread(login, installation, "bob")  # connects while nobody accepts: the socket keeps it
    control.release("k")
    assert not isinstance(join(), Exception)
    assert first.process.wait(25) == 0
    installation.start()
    assert waiting().tokens["access_token"]
    assert "alice" in text_of(
        McpClient(mcp.url, mcp.token, session_id=mcp.session_id).call_tool("get_my_user_info")
    )


def test_kill_9_leaves_no_child_not_even_one_that_hangs_or_ignores_SIGTERM(make_installation, control):
    installation = make_installation(child=("--control", control.path, "--mode", "ignore_term"))
    broker = installation.start()
    mcp, _ = session(installation), session(installation, "bob")
    join = hanging_call(mcp, control)
    pids = broker.children()
    assert len(pids) == 2
    broker.kill()
    assert await_end(pids) == []
    assert isinstance(join(), Exception)


def test_after_kill_9_tokens_and_sessions_go_on(make_installation):
    installation = make_installation()
    broker = installation.start()
    mcp = session(installation)
    pids = broker.children()
    broker.kill()
    installation.start()
    assert await_end(pids) == []
    assert "alice" in text_of(
        McpClient(mcp.url, mcp.token, session_id=mcp.session_id).call_tool("get_my_user_info")
    )
    mcp.oauth.refresh()
    assert mcp.oauth.tokens["access_token"] != mcp.token


def test_kill_9_between_the_login_and_the_token_loses_nothing(make_installation):
    installation = make_installation()
    installation.start()
    client = OAuthClient(installation.url, name="Process test")
    client.discover()
    client.register()
    callback = approve_login(Browser(), client.authorize_url(), "alice", "secret")
    installation.broker.kill()
    installation.start()
    client.finish(callback)
    mcp = McpClient(installation.url + "/mcp", client.tokens["access_token"])
    assert "alice" in text_of(mcp.call_tool("get_my_user_info"))


# -- while it runs


def test_SIGHUP_takes_over_what_may_change_and_names_what_may_not(make_installation):
    installation = make_installation(allowed_origins=["https://one.example"])
    broker = installation.start()
    origin = {"Origin": "https://two.example"}
    mcp = session(installation)
    ping = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
    assert mcp.post(ping, headers=origin).status == 403
    installation.write(
        **{**installation.settings, "allowed_origins": ["https://two.example"], "listen": "127.0.0.1:1"}
    )
    broker.process.send_signal(signal.SIGHUP)
    while not (seen := installation.records("settings_reloaded")):
        select.select([], [], [], 0.01)
    assert seen[0]["needs_restart"] == ["listen"]
    assert mcp.post(ping, headers=origin).status == 200
    installation.config.write_text("this is not TOML")
    broker.process.send_signal(signal.SIGHUP)
    while not (seen := installation.records("settings_not_reloaded")):
        select.select([], [], [], 0.01)
    assert "is not TOML" in seen[0]["problems"][0]
    assert mcp.post(ping, headers=origin).status == 200


def test_secrets_on_standard_input_are_read_once_and_are_nowhere_for_a_child_to_find(
    make_installation, tmp_path
):
    installation = make_installation()
    secret, name = installation.settings["forgejo_oauth_client_secret"], "forgejo_oauth_client_secret"
    (installation.folder / "secrets.toml").write_text(f"{name} = {json.dumps(secret)}\n")
    installation.write(**{**installation.settings, name: None, "secrets_file": "/dev/stdin"})
    with open(installation.folder / "secrets.toml", "rb") as secrets:
        broker = installation.start(stdin=secrets)
    (installation.folder / "secrets.toml").unlink()
    mcp = session(installation)
    assert os.readlink(f"/proc/{broker.pid}/fd/0") == "/dev/null"
    broker.process.send_signal(signal.SIGHUP)
    while not (seen := installation.records("settings_reloaded")):
        select.select([], [], [], 0.01)
    assert "needs_restart" not in seen[0]
    mcp.oauth.refresh()
    assert "alice" in text_of(session(installation).call_tool("get_my_user_info"))


def test_two_processes_never_share_a_store(make_installation):
    installation = make_installation()
    installation.start()
    done = installation.command("--listen", "127.0.0.1:0")
    assert done.returncode == 2 and "another broker is using" in done.stderr


def test_a_port_in_use_is_said_so(make_installation):
    installation = make_installation()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = installation.command("--listen", "127.0.0.1:%d" % taken.getsockname()[1])
    assert (
        done.returncode == 2
        and "cannot listen on 127.0.0.1" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_log_lines_are_objects_or_text_for_people(make_installation):
    installation = make_installation()
    installation.start()
    session(installation)
    installation.broker.stop()
    assert {
        "serving",
        "client_registered",
        "consent_given",
        "login",
        "token_issued",
        "session_opened",
        "child_started",
        "child_stopped",
    } <= {record["event"] for record in installation.records()}
    plain = make_installation(log_format="text")
    plain.start()
    plain.broker.stop()
    assert " serving " in plain.log_path.read_text() and not plain.records()


def test_metrics_are_served_on_their_own_address_only(make_installation):
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = "127.0.0.1:%d" % free.getsockname()[1]
    installation = make_installation(metrics_listen=address)
    installation.start()
    mcp = session(installation)
    import urllib.error
    import urllib.request

    with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    assert (
        'fjmcp_children{state="idle"} 1' in text
        and 'fjmcp_events_total{event="login"} 1' in text
        and "alice" not in text
    )
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(installation.url + "/metrics", timeout=30)
    assert error.value.code == 404
    mcp.close()


def test_no_secret_reaches_the_log(make_installation):
    installation = make_installation(debug=True)
    installation.start()
    mcp = session(installation)
    mcp.call_tool("get_echo", text="canary-argument")
    upstream = token_of(mcp)
    old = dict(mcp.oauth.tokens)
    mcp.oauth.refresh()
    with pytest.raises(RpcError):
        McpClient(mcp.url, mcp.oauth.tokens["access_token"], session_id=mcp.session_id).call_tool("crash")
    mcp.oauth.revoke(mcp.oauth.tokens["refresh_token"])
    installation.broker.stop()
    log = installation.log_path.read_text()
    secrets = [
        "canary-argument",
        *(tokens[name] for tokens in (old, mcp.oauth.tokens) for name in ("access_token", "refresh_token")),
        installation.app.client_secret,
        (installation.folder / "key").read_text().strip(),
        mcp.session_id,
        upstream,
    ]
    assert all(secrets) and not [secret for secret in secrets if secret in log]
    assert "fja_" not in log and "fjr_" not in log and "fjc_" not in log


def test_two_users_at_once_get_only_their_own_bytes(make_installation):
    installation = make_installation()
    installation.start()
    sessions = {user: [session(installation, user) for _ in range(2)] for user in ("alice", "bob")}

    def calls(user, mcp):
        return [text_of(mcp.call_tool("get_my_user_info")) for _ in range(25)]

    joins = [(user, in_thread(calls, user, mcp)) for user, both in sessions.items() for mcp in both]
    for user, join in joins:
        answers = join()
        other = "bob" if user == "alice" else "alice"
        assert len(answers) == 25 and all(
            f'"login": "{user}"' in answer and other not in answer for answer in answers
        )


def test_a_second_login_of_a_user_leaves_the_first_client_working_through_its_next_refresh(make_installation):
    installation = make_installation()
    installation.start()
    first = session(installation)
    second = session(installation)  # Forgejo has ended the first refresh token with this
    for mcp in (first, second):
        assert "alice" in text_of(mcp.call_tool("get_my_user_info"))
        mcp.oauth.refresh()
        again = McpClient(mcp.url, mcp.oauth.tokens["access_token"], session_id=mcp.session_id)
        assert "alice" in text_of(again.call_tool("get_my_user_info"))


def test_it_imports_the_standard_library_only():
    import ast

    names = set()
    for node in ast.walk(ast.parse(BROKER.read_text())):
        names |= {alias.name.split(".")[0] for alias in node.names} if isinstance(node, ast.Import) else set()
        names |= {node.module.split(".")[0]} if isinstance(node, ast.ImportFrom) else set()
    assert names and names <= set(sys.stdlib_module_names)


def test_the_guardian_is_a_shell_and_ends_with_the_broker(make_installation):
    installation = make_installation()
    broker = installation.start()
    session(installation)
    with open("/proc/%d/task/%d/children" % (broker.pid, broker.pid)) as file:
        direct = [int(pid) for pid in file.read().split()]
    everyone = direct + broker.children()
    assert broker.stop() == 0
    assert await_end(everyone) == [] and json.dumps([command_of(pid).decode() for pid in everyone])


SUBREAPER = "import ctypes; ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)\n"


def test_as_a_subreaper_it_reaps_what_is_handed_to_it(make_installation, monkeypatch):
    monkeypatch.setattr(broker_process, "LAUNCHER", SUBREAPER + broker_process.LAUNCHER)
    installation = make_installation(session_idle_timeout="1s")
    # A wrapper whose own process outlives it: in a session
    # of its own, so that it does not end with its group.
    wrapper = ["/bin/sh", "-c", 'setsid sleep 1 >/dev/null 2>&1 </dev/null & "$@"', "wrapper", *CHILD]
    installation.write(**{**installation.settings, "forgejo_mcp_binary": wrapper})
    broker = installation.start()
    mcp = session(installation)
    for _ in range(3):
        assert mcp.list_tools()
        await_end([pid for pid in broker.children() if b"stdio_child" in command_of(pid)])
    assert mcp.list_tools()  # its own are not taken from the threads that wait for them
    assert gone_zombies(broker.pid)
    assert all(record["reason"] == "idle" for record in installation.records("child_stopped"))


def gone_zombies(parent, limit=30):
    """Whether the process has no zombie among its children, soon."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        shown = subprocess.run(
            ["ps", "-o", "stat=", "--ppid", str(parent)], capture_output=True, text=True
        ).stdout
        if not any(state.startswith("Z") for state in shown.split()):
            return True
        time.sleep(0.1)
    return False
