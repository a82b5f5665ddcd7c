"""Nobody reads what a command says, or it cannot be written.

No traceback, the work is done, and the exit status tells.
"""

import os
import signal
import socket
import subprocess
import sys

import pytest

import fjmcp_broker
from rigs.broker_process import BROKER, run_program
from rigs.mcp_client import OAuthClient

QUIET = ("serve", "init", "copy-store")  # what says nothing on success, asks, or needs a database
WORDS = {
    "check": ("check",),
    "doctor": ("doctor", "http://127.0.0.1:9"),
    "revoke": ("revoke", "--all"),
    "rebind": ("rebind",),
    "backup": ("backup", "copy.db"),
}


@pytest.fixture
def broker(make_installation):
    installation = make_installation()
    installation.start()
    OAuthClient(installation.url, name="Output test").login(None, "alice", "secret", "full")
    return installation


def closed_pipe():
    """The writing end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def run(folder, *words, **streams):
    """A command whose named streams (stdout, stderr) are such a pipe; the finished process."""
    pipe = closed_pipe()
    given = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE) | dict.fromkeys(streams, pipe)
    try:
        return subprocess.run(
            [sys.executable, "-I", BROKER, *words], cwd=folder, text=True, timeout=60, **given, check=False
        )
    finally:
        os.close(pipe)


@pytest.mark.parametrize("command", sorted(set(fjmcp_broker.COMMANDS) - set(QUIET)))
def test_a_command_whose_output_nobody_reads_ends_by_sigpipe(broker, command):
    if command == "rebind":
        broker.broker.stop()
    words = ("--config", str(broker.config), *WORDS.get(command, (command,)))
    if command == "backup":
        words = ("--config", str(broker.config), "backup", str(broker.folder / "copy.db"))
    done = run(broker.folder, *words, stdout=True)
    assert done.returncode == -signal.SIGPIPE, done
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_what_was_to_be_done_is_done_though_nobody_reads_of_it(broker):
    copy = broker.folder / "copy.db"
    done = run(broker.folder, "--config", str(broker.config), "backup", str(copy), stdout=True, stderr=True)
    assert done.returncode == -signal.SIGPIPE and copy.exists()
    done = run(broker.folder, "--config", str(broker.config), "revoke", "--all", stdout=True, stderr=True)
    assert done.returncode == -signal.SIGPIPE
    assert broker.command("grants", "--json").stdout.strip() == "[]"


@pytest.mark.parametrize("words", [("--help",), ("--version",), ("revoke", "--help")])
def test_help_whose_output_nobody_reads_ends_by_sigpipe(tmp_path, words):
    done = run(tmp_path, *words, stdout=True)
    assert done.returncode == -signal.SIGPIPE and done.stderr == ""


@pytest.mark.parametrize("words", [("nonsense",), ("users", "--config", "absent.toml"), ("revoke",)])
def test_errors_that_nobody_reads_end_by_sigpipe(tmp_path, words):
    done = run(tmp_path, *words, stderr=True)
    assert done.returncode == -signal.SIGPIPE and done.stdout == ""


def test_a_broker_whose_log_nobody_reads_serves_and_stops_with_0(make_installation):
    installation = make_installation()
    installation.log_path = installation.folder / "pipe"
    os.mkfifo(installation.log_path)
    reader = os.open(installation.log_path, os.O_RDONLY | os.O_NONBLOCK)
    process = installation.start()
    os.close(reader)
    assert OAuthClient(installation.url, name="Output test").login(None, "alice", "secret", "full")
    assert process.stop() == 0


@pytest.mark.parametrize("words, status", [(("--help",), 1), (("nonsense",), 2)])
def test_output_that_cannot_be_written_is_said_without_a_traceback(tmp_path, words, status):
    with open("/dev/full", "wb") as full:
        for name in ("stdout", "stderr"):
            given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, name: full}
            done = subprocess.run(
                [sys.executable, "-I", BROKER, *words],
                cwd=tmp_path,
                text=True,
                timeout=60,
                **given,
                check=False,
            )
            said = (done.stdout or "") + (done.stderr or "")
            assert "Traceback" not in said and "Exception" not in said
            if name == "stdout" and status == 1:
                assert done.returncode == 1 and "No space left" in done.stderr
            elif status == 2:
                assert done.returncode == 2


def test_closed_streams_are_not_given_to_the_store(broker):
    """A file that is opened while 1 and 2 are closed would get their numbers, and what is printed."""
    before = broker.command("users", "--json").stdout
    words = [sys.executable, "-I", str(BROKER), "--config", str(broker.config)]
    for command in ("users", "grants", "revoke"):
        shell = 'exec "$@" >&- 2>&- <&-'
        subprocess.run(["sh", "-c", shell, "sh", *words, command], timeout=60, check=False)
    assert broker.command("users", "--json").stdout == before
    assert broker.command("check").returncode == 0


def test_an_interrupted_command_ends_as_by_sigint_without_a_traceback():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = "http://127.0.0.1:%d" % silent.getsockname()[1]
        here = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has it ignored
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", BROKER, "doctor", url],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        finally:
            signal.signal(signal.SIGINT, here)
        with silent.accept()[0]:  # it waits for an answer
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT and said == ""


def test_doctor_leaves_no_client_behind_though_it_is_killed(broker):
    process = subprocess.Popen(
        [sys.executable, "-I", BROKER, "doctor", broker.url], stdout=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if "POST /oauth/register" in line:
            break
    process.kill()
    process.communicate(timeout=60)
    names = [each["name"] for each in broker.records("client_registered")]
    assert names == ["Output test", "fjmcp-broker doctor"]
    assert '"fjmcp-broker doctor"' not in broker.command("clients", "--json").stdout
    assert run_program("doctor", broker.url).returncode == 0
    assert '"fjmcp-broker doctor"' not in broker.command("clients", "--json").stdout
