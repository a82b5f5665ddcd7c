"""Raw connections to the broker of a Rig.

What is sent is exactly what is written, and what comes back is read strictly.
"""

import contextlib
import json
import socket


class Answer:
    """One response as it came: status, headers (lower-case names to lists), body."""

    def __init__(self, head, body):
        first, *lines = head.decode("latin-1").split("\r\n")
        self.status, self.headers, self.body = int(first.split()[1]), {}, body
        for line in lines:
            name, _, value = line.partition(": ")
            self.headers.setdefault(name.lower(), []).append(value)

    def header(self, name):
        return self.headers.get(name, [None])[0]

    def json(self):
        return json.loads(self.body)


class Wire:
    """A raw connection that can send anything and reads answers one by one."""

    def __init__(self, rig):
        self.sock, self.buffer = (
            socket.create_connection(("127.0.0.1", rig.broker.server.port), timeout=20),
            b"",
        )

    def __enter__(self):
        return self

    def __exit__(self, *_exc):
        self.sock.close()

    def send(self, data):
        self.sock.sendall(data)
        return self

    def more(self):
        data = self.sock.recv(65536)
        self.buffer += data
        return data

    def until(self, end):
        while end not in self.buffer:
            if not self.more():
                raise EOFError(self.buffer)
        found, _, self.buffer = self.buffer.partition(end)
        return found

    def answer(self, head_only=False):
        answer = Answer(self.until(b"\r\n\r\n"), b"")
        length = int(answer.header("content-length") or 0) if not head_only else 0
        while len(self.buffer) < length:
            if not self.more():
                raise EOFError(self.buffer)
        answer.body, self.buffer = self.buffer[:length], self.buffer[length:]
        return answer

    def is_closed(self):
        """Whether nothing more comes but the end."""
        try:
            while data := self.sock.recv(65536):
                self.buffer += data
        except ConnectionResetError:
            pass
        return not self.buffer


def host(rig):
    return f"Host: 127.0.0.1:{rig.broker.server.port}\r\n".encode()


def get(rig, path="/healthz", *lines, version=b"HTTP/1.1", method=b"GET", own_host=True):
    extra = b"".join((line if isinstance(line, bytes) else line.encode()) + b"\r\n" for line in lines)
    return (
        method
        + b" "
        + (path if isinstance(path, bytes) else path.encode())
        + b" "
        + version
        + b"\r\n"
        + (host(rig) if own_host else b"")
        + extra
        + b"\r\n"
    )


def ask(rig, data, **arguments):
    with Wire(rig) as wire:
        return wire.send(data).answer(**arguments)


def post(rig, path, body, *lines):
    return get(rig, path, f"Content-Length: {len(body)}", *lines, method=b"POST") + body


def mcp_post(rig, token, message, *lines, session=None):
    body = json.dumps(message).encode()
    more = [f"Mcp-Session-Id: {session}"] if session else []
    return post(
        rig,
        "/mcp",
        body,
        f"Authorization: Bearer {token}",
        "Content-Type: application/json",
        "Accept: application/json, text/event-stream",
        *more,
        *lines,
    )


def flood(rig, data):
    """Send what may be refused at any byte; the answer, None if the connection was cut without one."""
    with Wire(rig) as wire:
        with contextlib.suppress(OSError):
            wire.send(data)
        try:
            return wire.answer()
        except (EOFError, ConnectionResetError):
            return None
