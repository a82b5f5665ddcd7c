"""A Child that runs a program of the test's own, without a broker around it."""

import gc
import io
import os
import queue
import sys
import threading
from typing import Any

from fjmcp_broker import Child, Guardian, Log

TOKEN = "eyJhbGciOiJSUzI1NiJ9.eyJnbnQiOjF9.c2lnbmF0dXJl"


class Values:
    """The settings that a Child reads."""

    max_line, stop_timeout, debug, log_format, log_addresses = 1 << 20, 0.3, True, "json", "full"


class Running:
    """A Child that runs a Python program, its lines and its end."""

    def __init__(self, guardian: Guardian, program: str, **values: Any) -> None:
        settings: Any = type("S", (Values,), values)()
        self.lines: queue.Queue[bytes] = queue.Queue()
        self.ended, self.log = threading.Event(), io.StringIO()
        self.child = Child(
            [sys.executable, "-I", "-u", "-c", program],
            {"PATH": os.environ["PATH"], "FORGEJO_ACCESS_TOKEN": TOKEN},
            "user",
            guardian,
            settings,
            Log(settings, self.log),
            self.lines.put,
            lambda child: self.ended.set(),
        )

    def line(self) -> bytes:
        return self.lines.get(timeout=20)

    def end(self) -> str | None:
        """Tick as the reaper does until it has ended; the reason."""
        while not self.ended.wait(0.05):
            self.child.tick()
        return self.child.reason


ECHO = "import sys\nfor line in sys.stdin: print(line, end='', flush=True)\n"


def counts() -> tuple[int, int, int]:
    """Open file descriptors, threads, child processes."""
    gc.collect()
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        children = len(file.read().split())
    return len(os.listdir("/proc/self/fd")), threading.active_count(), children
