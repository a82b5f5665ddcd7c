"""The suite's own addresses and ports of the loopback network, and programs that listen there."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

READY_LIMIT = 20  # seconds
PROXY, POSTGRESQL, FLEET = 77, 78, 79  # networks: each kind of program has one


def own_address(network: int) -> str:
    """An address at which no other process of the suite listens: 127.0.0.1 is everybody's."""
    return f"127.{network}.%d.%d" % divmod(os.getpid() % 65536, 256)


def free_port(address: str) -> int:
    """A port of that address that nobody uses."""
    with socket.create_server((address, 0)) as listener:
        port = listener.getsockname()[1]
    assert isinstance(port, int)
    return port


@contextlib.contextmanager
def running(
    program: str,
    words: Iterable[object],
    folder: Path,
    address: tuple[str, int],
    environment: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """A program as a process, once it accepts connections at `address`; it prints to folder/output."""
    output = folder / "output"
    with open(output, "wb") as file:
        process = subprocess.Popen(
            [program, *map(str, words)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            cwd=folder,
            env=environment,
            process_group=0,
        )
    try:
        for _ in range(READY_LIMIT * 50):
            with contextlib.suppress(OSError), socket.create_connection(address, 1):
                break
            assert process.poll() is None, output.read_text()
            select.select([], [], [], 0.02)
        else:
            raise AssertionError(output.read_text())
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):  # it ended by itself
            os.killpg(process.pid, signal.SIGKILL)  # asked to end, Caddy waits for open streams
        process.wait()
