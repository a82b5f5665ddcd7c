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

import json
import selectors
import shutil
import socket
import tempfile
import threading
from pathlib import Path

WAIT = 10.0


class ChildControl:
    """Listens at `path`, or (None) at a place of its own.

    A path of the test may be too long for a Unix socket.

    Use it as a context manager or call start() and stop(). `path` goes behind the children's `--control`.
    """

    def __init__(self, path=None):
        self._folder = None if path else tempfile.mkdtemp(prefix="child-control-")
        self.path = str(path or Path(self._folder) / "control")
        self._changed = threading.Condition()
        self._sending = threading.Lock()
        self._events = []
        self._children = {}
        self._wake_reader, self._wake = socket.socketpair()
        self._listener = None
        self._thread = None

    def start(self):
        """Listen; children may connect from now on. Returns self."""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(128)
        self._thread = threading.Thread(target=self._serve, name="child-control", daemon=True)
        self._thread.start()
        return self

    def stop(self):
        """End the connections, and with them the children that are still there."""
        if self._thread:
            self._wake.send(b"x")
            self._thread.join()
            self._thread = None
            Path(self.path).unlink(missing_ok=True)
        self._wake.close()
        self._wake_reader.close()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self):
        return self.start()

    def __exit__(self, *_exc):
        self.stop()

    # What children say

    @property
    def children(self):
        """The pids of the children now connected, oldest first.

        A child serves nothing before it is in here.
        """
        with self._changed:
            return list(self._children)

    @property
    def events(self):
        """Every event up to now, oldest first."""
        with self._changed:
            return list(self._events)

    def wait_event(self, predicate=None, timeout=WAIT, **fields):
        """The first event, past ones included, that has these fields and satisfies the predicate.

        Else TimeoutError.
        """

        def found():
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

    def command(self, cmd, pid=None):
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

    def release(self, key, pid=None):
        """Let the calls that wait for this key go on, also those that the same children get later."""
        return self.command({"cmd": "release", "key": key}, pid)

    def emit(self, message, pid=None):
        """Let a child write this JSON-RPC message."""
        return self.command({"cmd": "emit", "message": message}, pid)

    def raw(self, data, pid=None):
        """Let a child write these bytes."""
        return self.command({"cmd": "raw", "hex": data.hex()}, pid)

    # The thread

    def _serve(self):
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._wake_reader, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._wake_reader:
                        return self._close_all(selector)
                    if key.fileobj is self._listener:
                        selector.register(self._listener.accept()[0], selectors.EVENT_READ, _Connection())
                    elif not self._read(key.fileobj, key.data):
                        selector.unregister(key.fileobj)
                        key.fileobj.close()

    @staticmethod
    def _close_all(selector):
        for key in list(selector.get_map().values()):
            selector.unregister(key.fileobj)
            key.fileobj.close()

    def _read(self, connection, state):
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

    def _take(self, connection, state, event):
        self._events.append(event)
        if event["event"] == "start":
            state.pid = event["pid"]
            self._children[state.pid] = connection
            _delivered(connection, b'{"cmd":"welcome"}\n')


class _Connection:
    """What is known of one connection: the child's pid, and the beginning of a line."""

    def __init__(self):
        self.pid = None
        self._pieces = []

    def lines(self, data):
        """The lines that `data` completes."""
        *ended, rest = data.split(b"\n")
        if ended:
            ended[0] = b"".join([*self._pieces, ended[0]])
            self._pieces = []
        self._pieces.append(rest)
        return ended


def _delivered(connection, line):
    try:
        connection.sendall(line)
    except OSError:
        return False
    return True
