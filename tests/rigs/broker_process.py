"""The real program as a process, started as systemd would start it.

A listening socket handed over, READY=1 waited for. Standard library only: the demo uses it too.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rigs.fake_forgejo import FakeForgejo

BROKER = Path(__file__).resolve().parent.parent.parent / "fjmcp_broker.py"
READY_LIMIT = 30
STOP_LIMIT = 25

# Socket activation names its receiver by pid, which is known
# only inside the new process: this becomes the broker.
LAUNCHER = """
import fcntl, os, sys
passed = [int(number) for number in sys.argv[1].split(",")]
for number, high in enumerate([fcntl.fcntl(each, fcntl.F_DUPFD, 100) for each in passed], 3):
    os.dup2(high, number)
    os.close(high)
for each in passed:
    if each >= 3 + len(passed):
        os.close(each)
os.environ.update(LISTEN_FDS=str(len(passed)), LISTEN_PID=str(os.getpid()))
if sys.argv[2]:
    os.environ["LISTEN_FDNAMES"] = sys.argv[2]
os.execv(sys.executable, [sys.executable, *sys.argv[3:]])
"""


class NotReady(Exception):
    """The broker ended, or said nothing in time; a sentence for people."""


def toml(values: Mapping[str, Any]) -> str:
    """Texts, lists of texts, and lists of tables of them as TOML.

    JSON's strings are TOML's basic strings (but for DEL, which no value has).
    """
    tables = {
        key: value
        for key, value in values.items()
        if isinstance(value, list) and value and isinstance(value[0], dict)
    }
    plain = "".join(
        f"{key} = {json.dumps(value, ensure_ascii=False)}\n"
        for key, value in values.items()
        if key not in tables
    )
    return plain + "".join(
        f"[[{key}]]\n{toml(table)}" for key, entries in tables.items() for table in entries
    )


def broker_environment(ready_address: str) -> dict[str, str]:
    """This environment without what would speak to the broker, or for another service of this machine."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("FJMCP_BROKER_", "LISTEN_"))
    }
    return {**kept, "NOTIFY_SOCKET": ready_address, "PYTHONDONTWRITEBYTECODE": "1"}


class BrokerProcess:
    """The broker as a process. The socket and the log file belong to who makes it."""

    def __init__(
        self,
        config: Path,
        listener: socket.socket | None,
        log_path: Path,
        folder: Path,
        *,
        python: str = sys.executable,
        program: Path | None = None,
        stdin: int | IO[Any] = subprocess.DEVNULL,
        arguments: Sequence[str] = (),
        more: Sequence[socket.socket] = (),
        names: str = "",
    ) -> None:
        # Without a `listener` it listens where its settings say. `more`: sockets handed over besides it;
        # `names`: of all, as LISTEN_FDNAMES has them.
        self.log_path = Path(log_path)
        self._readiness = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        address = str(Path(folder) / f"ready-{os.urandom(3).hex()}")
        self._readiness.bind(address)
        descriptors = [each.fileno() for each in (listener, *more) if each]
        launcher = ["-c", LAUNCHER, ",".join(map(str, descriptors)), names] if descriptors else []
        with open(log_path, "ab") as log:
            self.process = subprocess.Popen(
                [
                    python,
                    *launcher,
                    "-I",
                    str(program or BROKER),
                    "--config",
                    str(config),
                    *arguments,
                ],
                stdin=stdin,
                stdout=log,
                stderr=log,
                pass_fds=descriptors,
                cwd=folder,
                env=broker_environment(address),
                process_group=0,
            )

    def await_ready(self) -> Self:
        """Return self once the broker says that it serves; NotReady if it ends first or says nothing."""
        ended = os.pidfd_open(self.process.pid)
        try:
            while True:
                watched: list[Any] = [self._readiness, ended]
                heard, _, _ = select.select(watched, [], [], READY_LIMIT)
                if self._readiness in heard:
                    if b"READY=1" in self._readiness.recv(4096).split(b"\n"):
                        return self
                elif heard:
                    raise NotReady(f"the broker ended with status {self.process.wait()} before it was ready")
                else:
                    raise NotReady(f"the broker was not ready within {READY_LIMIT} s")
        finally:
            os.close(ended)

    def await_status(self) -> str:
        """What the broker tells its service manager next, in words (STATUS=)."""
        assert select.select([self._readiness], [], [], READY_LIMIT)[0], "the broker says nothing"
        return self._readiness.recv(8192).decode().partition("STATUS=")[2]

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        """All that the broker has written."""
        return self.log_path.read_text(errors="replace")

    def children(self) -> list[int]:
        """The pids of its tool processes: its own children but the guardian, a shell."""
        with open(f"/proc/{self.pid}/task/{self.pid}/children", encoding="ascii") as file:
            found = [int(pid) for pid in file.read().split()]
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            if task.name != str(self.pid):
                try:
                    found += [int(pid) for pid in (task / "children").read_text().split()]
                except OSError:
                    continue
        return [pid for pid in found if b"/bin/sh" not in command_of(pid)]

    def kill(self) -> None:
        """End it as `kill -9` does."""
        self.process.kill()
        self.process.wait()
        self._readiness.close()

    def stop(self) -> int:
        """End it in order; gives its exit status."""
        self._readiness.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def command_of(pid: int) -> bytes:
    """A process's command line as bytes, empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


class Installation:
    """A folder with a configuration, a socket that keeps its port, and the broker that runs (or not) on both.

    `settings` go into broker.toml; None leaves a setting out.
    """

    def __init__(
        self,
        folder: Path,
        forgejo: FakeForgejo,
        child: Sequence[str],
        *,
        python: str = sys.executable,
        program: Path | None = None,
        **settings: Any,
    ) -> None:
        self.folder, self.forgejo, self.python, self.program = Path(folder), forgejo, python, program
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.url = "http://127.0.0.1:%d" % self.socket.getsockname()[1]
        self.app = forgejo.add_app([self.url + "/oauth/callback"])
        self.config, self.log_path = self.folder / "broker.toml", self.folder / "broker.log"
        self.write(
            public_url=self.url,
            forgejo_url=forgejo.url,
            forgejo_oauth_client_id=self.app.client_id,
            forgejo_oauth_client_secret=self.app.client_secret,
            forgejo_mcp_binary=list(child),
            store_path=str(self.folder / "broker.db"),
            key_file=str(self.folder / "key"),
            **settings,
        )
        self.broker: Any = None  # the newest BrokerProcess

    def write(self, **settings: Any) -> None:
        """Write broker.toml anew."""
        self.settings = {name: value for name, value in settings.items() if value is not None}
        self.config.write_text(toml(self.settings))
        self.config.chmod(0o600)

    def start(self, **arguments: Any) -> BrokerProcess:
        """Start the broker and wait until it serves; gives the BrokerProcess."""
        self.broker = BrokerProcess(
            self.config,
            self.socket,
            self.log_path,
            self.folder,
            python=self.python,
            program=self.program,
            **arguments,
        )
        broker: BrokerProcess = self.broker
        return broker.await_ready()

    def command(
        self, *words: str, stdin: str = "", environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on this configuration; the finished process with its output as text."""
        return run_program(
            "--config",
            str(self.config),
            *words,
            python=self.python,
            program=self.program,
            cwd=self.folder,
            stdin=stdin,
            environment=environment,
        )

    def records(self, event: str | None = None) -> list[dict[str, Any]]:
        """The log as objects, or those of one event."""
        found = [json.loads(line) for line in self.log_path.read_text().splitlines() if line.startswith("{")]
        return [record for record in found if event in (None, record["event"])]

    def close(self) -> None:
        """End the broker if it still runs."""
        if self.broker and self.broker.process.poll() is None:
            self.broker.stop()
        self.socket.close()


def run_program(
    *words: str,
    python: str = sys.executable,
    program: Path | None = None,
    cwd: Path | None = None,
    stdin: str = "",
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run the program to its end; the finished process with its output as text."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("FJMCP_BROKER_", "LISTEN_", "NOTIFY_"))
    }
    return subprocess.run(
        [python, "-I", str(program or BROKER), *words],
        capture_output=True,
        text=True,
        input=stdin,
        cwd=cwd,
        timeout=60,
        env={**clean, "PYTHONDONTWRITEBYTECODE": "1", **(environment or {})},
    )
