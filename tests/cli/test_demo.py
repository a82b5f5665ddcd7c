"""tests/demo.py: what a newcomer runs first must work, and leave nothing behind."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import demo

DEMO = Path(__file__).resolve().parent.parent / "demo.py"
LIMIT = 60


def start(tmp_path, *arguments):
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, str(DEMO), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def output_of(process):
    """The whole output; the process is ended whatever happens."""
    try:
        return process.communicate(timeout=LIMIT)[0]
    finally:
        process.kill()
        process.wait()


def processes_naming(text):
    """Command lines of the processes alive that name `text`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in words:
            found.append(words)
    return found


def test_once_shows_alice_and_bob_each_as_themselves_and_leaves_nothing_behind(tmp_path):
    process = start(tmp_path, "--once")
    output = output_of(process)
    assert process.returncode == 0, output
    assert "Forgejo sees alice" in output
    assert "Forgejo sees bob" in output
    assert output.index("Forgejo sees alice") < output.index("Forgejo sees bob")
    assert demo.WHO_AM_I in output
    assert "\033" not in output
    assert list(tmp_path.iterdir()) == []
    assert processes_naming(str(tmp_path)) == []


@pytest.mark.parametrize("shells_setting", [signal.SIG_DFL, signal.SIG_IGN], ids=["foreground", "background"])
def test_without_once_it_prints_the_lines_that_connect_real_clients_and_ends_on_ctrl_c(
    tmp_path, shells_setting
):
    here = signal.signal(signal.SIGINT, shells_setting)  # an ignored signal stays ignored in what is started
    try:
        process = start(tmp_path)
    finally:
        signal.signal(signal.SIGINT, here)
    shown = []
    try:
        for line in process.stdout:
            shown.append(line)
            if "Ctrl-C" in line:
                process.send_signal(signal.SIGINT)
                break
    finally:
        shown.append(output_of(process))
    output = "".join(shown)
    assert process.returncode == 0, output
    url = next(line.split()[-1] for line in shown if "claude mcp add --transport http forgejo " in line)
    assert url.startswith("http://127.0.0.1:") and url.endswith("/mcp")
    assert any("npx @modelcontextprotocol/inspector" in line and url in line for line in shown)
    assert "alice / secret" in output and "bob / secret" in output
    assert list(tmp_path.iterdir()) == []


def test_a_port_that_is_taken_ends_the_demo_with_a_sentence(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = start(tmp_path, "--once", "--port", str(taken.getsockname()[1]))
        output = output_of(process)
    assert process.returncode == 1
    assert "is not free" in output and "Traceback" not in output


def test_a_broker_that_ends_at_start_is_reported_with_the_end_of_its_log(tmp_path, monkeypatch, capsys):
    broken = tmp_path / "broken.py"
    broken.write_text("import sys; sys.exit('no such setting')\n")
    monkeypatch.setattr(demo, "BROKER", broken)
    assert demo.run(demo.Screen(sys.stdout), demo.argparse.Namespace(port=0, once=True)) == 1
    shown = capsys.readouterr().out
    assert "ended with status 1 before it was ready" in shown
    assert "no such setting" in shown


@pytest.mark.parametrize(
    "value", ["plain", 'a "quoted" \\ path', "umlaut \u00e4 \U0001f600", "tab\tnew\nline"]
)
def test_the_configuration_it_writes_is_read_back_as_it_was(value):
    import tomllib

    assert tomllib.loads(demo.toml({"key": value, "list": [value]})) == {"key": value, "list": [value]}
