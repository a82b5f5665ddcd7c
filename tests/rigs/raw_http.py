"""Raw connections to the broker of a Rig.

What is sent is exactly what is written, and what comes back is read strictly.
"""

from __future__ import annotations

import contextlib
import json
import socket
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rigs.rig import Rig


class Answer:
    """One response as it came: status, headers (lower-case names to lists), body."""

    def __init__(self, head: bytes, body: bytes) -> None:
        first, *lines = head.decode("latin-1").split("\r\n")
        self.status, self.body = int(first.split()[1]), body
        self.headers: dict[str, list[str]] = {}
        for line in lines:
            name, _, value = line.partition(": ")
            self.headers.setdefault(name.lower(), []).append(value)

    def header(self, name: str) -> str | None:
        values = self.headers.get(name)
        return values[0] if values else None

    def json(self) -> Any:
        return json.loads(self.body)


class Wire:
    """A raw connection that can send anything and reads answers one by one."""

    def __init__(self, rig: Rig) -> None:
        self.sock, self.buffer = (
            socket.create_connection(("127.0.0.1", rig.broker.server.port), timeout=20),
            b"",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> Self:
        self.sock.sendall(data)
        return self

    def more(self) -> bytes:
        data = self.sock.recv(65536)
        self.buffer += data
        return data

    def until(self, end: bytes) -> bytes:
        while end not in self.buffer:
            if not self.more():
                raise EOFError(self.buffer)
        found, _, self.buffer = self.buffer.partition(end)
        return found

    def answer(self, head_only: bool = False) -> Answer:
        answer = Answer(self.until(b"\r\n\r\n"), b"")
        length = int(answer.header("content-length") or 0) if not head_only else 0
        while len(self.buffer) < length:
            if not self.more():
                raise EOFError(self.buffer)
        answer.body, self.buffer = self.buffer[:length], self.buffer[length:]
        return answer

    def is_closed(self) -> bool:
        """Whether nothing more comes but the end."""
        try:
            while data := self.sock.recv(65536):
                self.buffer += data
        except ConnectionResetError:
            pass
        return not self.buffer


def host(rig: Rig) -> bytes:
    return f"Host: 127.0.0.1:{rig.broker.server.port}\r\n".encode()


def get(
    rig: Rig,
    path: str | bytes = "/healthz",
    *lines: str | bytes,
    version: bytes = b"HTTP/1.1",
    method: bytes = b"GET",
    own_host: bool = True,
) -> bytes:
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


def ask(rig: Rig, data: bytes, **arguments: bool) -> Answer:
    with Wire(rig) as wire:
        return wire.send(data).answer(**arguments)


def post(rig: Rig, path: str | bytes, body: bytes, *lines: str | bytes) -> bytes:
    return get(rig, path, f"Content-Length: {len(body)}", *lines, method=b"POST") + body


def mcp_post(rig: Rig, token: str, message: object, *lines: str | bytes, session: str | None = None) -> bytes:
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


def flood(rig: Rig, data: bytes) -> Answer | None:
    """Send what may be refused at any byte; the answer, None if the connection was cut without one."""
    with Wire(rig) as wire:
        with contextlib.suppress(OSError):
            wire.send(data)
        try:
            return wire.answer()
        except (EOFError, ConnectionResetError):
            return None
