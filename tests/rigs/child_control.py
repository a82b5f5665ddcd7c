"""The test's side of `stdio_child.py --control PATH`: what the children report, and commands to them.

Lines of JSON over a Unix socket. A child sends events, each with "event" and "pid":
    start; message (method, id): anything it read, method None if it was no request or notification;
    call (tool, id, args); cancelled (requestId); listen (id,
    notifications); exit (code, reason), if it ends of its own will.
Added here: gone, when a child's connection has ended, however it died.
It obeys {"cmd": "release", "key"}, {"cmd": "emit", "message"},
{"cmd": "raw", "text" or "hex"}, {"cmd": "exit", "code"}, and ends
when the connection does: no child outlives the control it was started with.
"""

from __future__ import annotations

import json
import selectors
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

Event = dict[str, Any]

WAIT = 30.0


class ChildControl:
    """Listens at `path`, or (None) at a place of its own.

    A path of the test may be too long for a Unix socket.

    Use it as a context manager or call start() and stop(). `path` goes behind the children's `--control`.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self._folder = None if path else tempfile.mkdtemp(prefix="child-control-")
        self.path = str(path) if path else str(Path(self._folder or "") / "control")
        self._changed = threading.Condition()
        self._sending = threading.Lock()
        self._events: list[Event] = []
        self._children: dict[int, socket.socket] = {}
        self._wake_reader, self._wake = socket.socketpair()
        self._listener = socket.socket(socket.AF_UNIX)
        self._thread: threading.Thread | None = None

    def start(self) -> Self:
        """Listen; children may connect from now on. Returns self."""
        self._listener.bind(self.path)
        self._listener.listen(128)
        self._thread = threading.Thread(target=self._serve, name="child-control", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """End the connections, and with them the children that are still there."""
        if self._thread:
            self._wake.send(b"x")
            self._thread.join()
            self._thread = None
            Path(self.path).unlink(missing_ok=True)
        self._listener.close()
        self._wake.close()
        self._wake_reader.close()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    # What children say

    @property
    def children(self) -> list[int]:
        """The pids of the children now connected, oldest first.

        A child serves nothing before it is in here.
        """
        with self._changed:
            return list(self._children)

    @property
    def events(self) -> list[Event]:
        """Every event up to now, oldest first."""
        with self._changed:
            return list(self._events)

    def wait_event(
        self, predicate: Callable[[Event], object] | None = None, timeout: float = WAIT, **fields: object
    ) -> Event:
        """The first event, past ones included, that has these fields and satisfies the predicate.

        Else TimeoutError.
        """

        def found() -> Event | None:
            return next(
                (
                    event
                    for event in self._events
                    if all(event.get(name) == fields[name] for name in fields)
                    and (predicate is None or predicate(event))
                ),
                None,
            )

        with self._changed:
            event = self._changed.wait_for(found, timeout)
            if event is None:
                raise TimeoutError(
                    f"no event {fields or ''} within {timeout} s; the last ones: {self._events[-20:]}"
                )
            return event

    # What children are told

    def command(self, cmd: Mapping[str, object], pid: int | None = None) -> int:
        """Send a command (a dict) to one child, or to all; how many were told.

        LookupError for an unknown pid.
        """
        line = json.dumps(cmd).encode() + b"\n"
        with self._changed:
            if pid is not None and pid not in self._children:
                raise LookupError(f"no child {pid}, there are {list(self._children)}")
            told = [self._children[pid]] if pid is not None else list(self._children.values())
        # Not under the lock of the events: a child that is stuck may leave its commands unread.
        with self._sending:
            return sum(_delivered(connection, line) for connection in told)

    def release(self, key: str, pid: int | None = None) -> int:
        """Let the calls that wait for this key go on, also those that the same children get later."""
        return self.command({"cmd": "release", "key": key}, pid)

    def emit(self, message: object, pid: int | None = None) -> int:
        """Let a child write this JSON-RPC message."""
        return self.command({"cmd": "emit", "message": message}, pid)

    def raw(self, data: bytes, pid: int | None = None) -> int:
        """Let a child write these bytes."""
        return self.command({"cmd": "raw", "hex": data.hex()}, pid)

    # The thread

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._wake_reader, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._wake_reader:
                        return self._close_all(selector)
                    if key.fileobj is self._listener:
                        selector.register(self._listener.accept()[0], selectors.EVENT_READ, _Connection())
                    elif not self._read(connection_of(key), key.data):
                        selector.unregister(key.fileobj)
                        connection_of(key).close()

    @staticmethod
    def _close_all(selector: selectors.BaseSelector) -> None:
        for key in list(selector.get_map().values()):
            selector.unregister(key.fileobj)
            connection_of(key).close()

    def _read(self, connection: socket.socket, state: _Connection) -> bool:
        """Take what has arrived; False at the end of the connection."""
        try:
            data = connection.recv(1 << 20)
        except ConnectionError:
            data = b""
        with self._changed:
            for line in state.lines(data):
                self._take(connection, state, json.loads(line))
            if not data and state.pid is not None:
                del self._children[state.pid]
                self._events.append({"event": "gone", "pid": state.pid})
            self._changed.notify_all()
        return bool(data)

    def _take(self, connection: socket.socket, state: _Connection, event: Event) -> None:
        self._events.append(event)
        if event["event"] == "start":
            state.pid = event["pid"]
            self._children[state.pid] = connection
            _delivered(connection, b'{"cmd":"welcome"}\n')


class _Connection:
    """What is known of one connection: the child's pid, and the beginning of a line."""

    def __init__(self) -> None:
        self.pid: int | None = None
        self._pieces: list[bytes] = []

    def lines(self, data: bytes) -> list[bytes]:
        """The lines that `data` completes."""
        *ended, rest = data.split(b"\n")
        if ended:
            ended[0] = b"".join([*self._pieces, ended[0]])
            self._pieces = []
        self._pieces.append(rest)
        return ended


def connection_of(key: selectors.SelectorKey) -> socket.socket:
    assert isinstance(key.fileobj, socket.socket)
    return key.fileobj


def _delivered(connection: socket.socket, line: bytes) -> bool:
    try:
        connection.sendall(line)
    except OSError:
        return False
    return True
