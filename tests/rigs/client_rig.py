"""How tests drive programs of other makers.

Nothing they do is waited for without a limit, and no browser but the suite's person opens.

with Program([node, script, url], environment=person_environment(folder)) as program:
    program.tell("call get_my_user_info")
    program.line()
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rigs.browser import Browser, approve_login

CLIENTS = Path(__file__).resolve().parent.parent / "real" / "clients"
LINE_LIMIT = 60.0  # seconds for one line: a client's start on a busy machine is the longest
END_LIMIT = 10.0
CHUNK = 1 << 16
# What programs open links with. The rest of a desktop (DISPLAY's real server, the session's bus, the
# desktop's name) is kept from them.
OPENERS = ("xdg-open", "gio", "gnome-open", "kde-open", "x-www-browser", "sensible-browser", "www-browser")
KEPT = ("LANG", "LC_ALL", "TZ", "TMPDIR", "NODE_EXTRA_CA_CERTS", "SSL_CERT_FILE", "JAVA_HOME")


class ClientFailed(AssertionError):
    """A client said nothing in time, or ended; with the end of what it wrote to stderr."""


def end_group(process: subprocess.Popen[Any]) -> int | None:
    """The exit status of a process whose whole group has been killed.

    None if even then it does not go away.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(END_LIMIT)
    return None


class Program:
    """A program in a process group of its own, spoken to by the line.

    Leaving the block ends it and all that it started.
    """

    def __init__(
        self,
        words: Sequence[object],
        *,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        patience: float = END_LIMIT,
    ) -> None:
        self.words, self._patience = [str(word) for word in words], patience
        self._errors = tempfile.TemporaryFile()
        self._pending = b""
        self.process = subprocess.Popen(
            self.words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=None if environment is None else dict(environment),
            cwd=folder,
            start_new_session=True,
        )

    def line(self, limit: float = LINE_LIMIT) -> str:
        """The next line it prints; ClientFailed if none comes within `limit` seconds, or it ends."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + limit
        while b"\n" not in self._pending:
            rest = deadline - time.monotonic()
            if rest <= 0 or not select.select([self.process.stdout], [], [], rest)[0]:
                raise ClientFailed(f"no line within {limit:.0f} s from {self.words}: {self.errors()}")
            data = os.read(self.process.stdout.fileno(), CHUNK)
            if not data:
                raise ClientFailed(f"it ended: {self.words}: {self.errors()}")
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        return line.decode(errors="replace")

    def value(self, limit: float = LINE_LIMIT) -> Any:
        """The next line, read as JSON."""
        return json.loads(self.line(limit))

    def tell(self, line: str) -> None:
        """Write one line to it."""
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def errors(self) -> str:
        """The end of what it wrote to stderr."""
        size = os.fstat(self._errors.fileno()).st_size
        return os.pread(self._errors.fileno(), 4000, max(size - 4000, 0)).decode(errors="replace")

    def finish(self) -> int | None:
        """Close its input and wait for it as long as it may take to end by itself.

        Its exit status, None if it did not.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            return self.process.wait(self._patience)
        except subprocess.TimeoutExpired:
            return None

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.finish()
        end_group(self.process)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._errors.close()


def run_program(
    words: Sequence[object],
    *,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    limit: float = LINE_LIMIT,
) -> subprocess.CompletedProcess[str]:
    """The finished program with its output; ClientFailed if it takes longer than `limit` seconds.

    It is not waited for beyond that. subprocess.run would read on for as long as anything that the program
    started holds its pipes: here they are files.
    """
    argv = [str(word) for word in words]
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env=None if environment is None else dict(environment),
            cwd=folder,
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        if status is None:
            end_group(process)
        output.seek(0)
        errors.seek(0)
        said, complained = output.read(), errors.read()
    if status is None:
        raise ClientFailed(f"not done within {limit:.0f} s: {argv}: {said[-2000:]} {complained[-2000:]}")
    return subprocess.CompletedProcess(argv, status, said, complained)


# -- the person at the browser


def write_program(path: Path, text: str) -> Path:
    """An executable script with this text at `path`."""
    path.write_text("#!/bin/sh\n" + text + "\n")
    path.chmod(0o755)
    return path


def person_environment(
    folder: Path, *, login: str = "alice", tools: Sequence[Path] = (), background: bool = False
) -> dict[str, str]:
    """An environment in which whatever opens a link reaches the suite's person.

    Everything is kept in `folder`.

    It is made of an allow-list, so that no desktop is seen: where one is, the bundled xdg-open of some
    clients asks xdg-mime for the handler of links before it looks at BROWSER. Each of the person's visits
    appends a line to `folder`/visits. `tools` are programs to be found by their names; `background`: the
    client waits until its browser has ended before it listens for the callback.
    """
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    words = [sys.executable, CLIENTS / "person.py", "--visits", folder / "visits", login, "secret"]
    call = " ".join(shlex.quote(str(word)) for word in words)
    for name in OPENERS:
        write_program(programs / name, f'for url; do :; done\nexec {call} "$url"')
    write_program(programs / "xdg-mime", "exit 0")  # no handler is registered
    for tool in tools:
        if not (programs / tool.name).exists():
            (programs / tool.name).symlink_to(tool)
    person = str(programs / "xdg-open") + (" %s &" if background else "")
    return {
        **{name: os.environ[name] for name in KEPT if name in os.environ},
        "PATH": os.pathsep.join([str(programs), os.environ.get("PATH", ""), os.defpath]),
        "BROWSER": person,
        "HOME": str(folder),
        "XDG_CONFIG_HOME": str(folder),
        "XDG_DATA_HOME": str(folder),
        "XDG_DATA_DIRS": str(folder),
        "XDG_CURRENT_DESKTOP": "X-Generic",
        "MCP_AUTO_OPEN_ENABLED": "true",
        "DISPLAY": ":9999",  # some open no browser where there is none; nothing listens there
    }


def visits(folder: Path) -> int:
    """How often the person of person_environment(folder) has been sent somewhere."""
    try:
        return len((folder / "visits").read_text().splitlines())
    except FileNotFoundError:
        return 0


# -- clients by the line


class LineClient(Program):
    """A client that stays connected and takes a command a line.

    The person is here, where the client's program has none.
    """

    def __init__(
        self,
        words: Sequence[object],
        *,
        environment: Mapping[str, str] | None = None,
        login: str = "alice",
    ) -> None:
        super().__init__(words, environment=environment)
        self.logins, self._login = 0, login
        try:
            self.started = self._answer()
        except BaseException:
            self.__exit__()
            raise

    def _answer(self) -> Any:
        while True:
            said = self.value()
            if "authorize" not in said:
                return said
            self.logins += 1
            self.tell(approve_login(Browser(), said["authorize"], self._login, "secret"))

    def ask(self, line: str) -> Any:
        """Carry out a command; its result."""
        self.tell(line)
        return self._answer()

    def __enter__(self) -> LineClient:
        return self
