"""What the bench compares.

The broker as users run it, and the bridges a user could pick instead, each as a process.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent.parent
sys.path[:0] = [str(TESTS)]

from rigs.broker_process import BROKER, Installation  # noqa: E402
from rigs.fake_forgejo import FakeForgejo  # noqa: E402
from rigs.mcp_client import McpClient, OAuthClient  # noqa: E402

NPM = {"supergateway": "4.0.0", "mcp-proxy": "6.7.19"}
PYPI = {"mcp-proxy": "0.13.0"}
FASTMCP = """
import sys
from fastmcp.client.transports import StdioTransport
from fastmcp.server import create_proxy
create_proxy(StdioTransport(sys.argv[2], sys.argv[3:]), name="bench").run(
    transport="http", host="127.0.0.1", port=int(sys.argv[1]), path="/mcp", show_banner=False)
"""
PROTOCOL = "2025-06-18"
START_LIMIT = 60


class NotInstalled(Exception):
    """A part of the bench that cannot be had; the text says why."""


def run(*words: object, **more: object) -> None:
    """Run a command to its end; NotInstalled with the end of its output when it fails."""
    done = subprocess.run(
        [str(word) for word in words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        **more,
    )
    if done.returncode:
        raise NotInstalled(f"{words[0]}: {done.stdout.strip()[-300:]}")


def compiled(cache: Path, name: str) -> Path:
    """The program made of NAME.c, made anew when its text changes."""
    source = HERE / f"{name}.c"
    program = cache / f"{name}-{hashlib.sha256(source.read_bytes()).hexdigest()[:12]}"
    if not program.exists():
        compiler = shutil.which("cc") or shutil.which("gcc")
        if not compiler:
            raise NotInstalled("no C compiler (Debian: apt-get install gcc libc6-dev)")
        cache.mkdir(parents=True, exist_ok=True)
        run(compiler, "-O2", "-o", program, source)
    return program


def installed_npm(cache: Path) -> Path:
    """The folder of the npm peers' programs."""
    folder = cache / "npm"
    stamp = folder / ("-".join(f"{name}@{version}" for name, version in NPM.items()))
    if not stamp.exists():
        if not shutil.which("npm"):
            raise NotInstalled("npm is not installed")
        wanted = [f"{name}@{version}" for name, version in NPM.items()]
        run("npm", "install", "--no-audit", "--no-fund", "--silent", "--prefix", folder, *wanted)
        stamp.touch()
    return folder / "node_modules" / ".bin"


def installed_pypi(cache: Path) -> Path:
    """The environment with the PyPI peer."""
    folder = cache / "pypi"
    stamp = folder / "-".join(f"{name}=={version}" for name, version in PYPI.items())
    if not stamp.exists():
        run(sys.executable, "-m", "venv", folder)
        run(
            folder / "bin" / "pip", "install", "-q", *(f"{name}=={version}" for name, version in PYPI.items())
        )
        stamp.touch()
    return folder / "bin"


def fastmcp_python(cache: Path) -> Path:
    """The interpreter of the suite's environment with FastMCP."""
    found = sorted(cache.parent.glob("fastmcp-py*/venv/bin/python"))
    if not found:
        raise NotInstalled("FastMCP: run `python3 tests/run.py` once, which installs it")
    return found[-1]


def peers(cache: Path) -> dict[str, Callable[[int, list[str]], list[object]]]:
    """{name: function from a port and the child's words to a command}.

    What cannot be installed is named and left out.
    """
    found: dict[str, Callable[[int, list[str]], list[object]]] = {}
    try:
        npm = installed_npm(cache)
        found["supergateway"] = lambda port, child: [
            npm / "supergateway", "--stdio", " ".join(child), "--outputTransport", "streamableHttp",
            "--stateful",
            "--port", port, "--logLevel", "none",
        ]  # fmt: skip
        found["mcp-proxy (npm)"] = lambda port, child: [
            npm / "mcp-proxy", "--host", "127.0.0.1", "--port", port, "--server", "stream", "--", *child,
        ]  # fmt: skip
    except NotInstalled as error:
        print(f"left out: npm peers: {error}", file=sys.stderr)
    try:
        pypi = installed_pypi(cache)
        found["mcp-proxy (PyPI)"] = lambda port, child: [
            pypi / "mcp-proxy", "--host", "127.0.0.1", "--port", port, "--", *child,
        ]  # fmt: skip
    except NotInstalled as error:
        print(f"left out: PyPI peer: {error}", file=sys.stderr)
    try:
        python = fastmcp_python(cache)
        found["FastMCP"] = lambda port, child: [python, "-c", FASTMCP, port, *child]
    except NotInstalled as error:
        print(f"left out: {error}", file=sys.stderr)
    return found


@dataclass
class Bridge:
    """A running bridge: where it answers, with which token, its process, and how to end it."""

    name: str
    url: str
    token: str | None
    pid: int
    close: Callable[[], None]
    started_ms: float = 0.0
    extra: dict[str, object] = field(default_factory=dict)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        host, port = self.url.split("/")[2].split(":")
        return host, int(port)

    def session(self, **more: object) -> McpClient:
        """A new session that has been initialized."""
        client = McpClient(self.url, self.token, protocol=PROTOCOL, **more)
        client.initialize()
        return client


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def start_peer(name: str, command: Callable[[int, list[str]], list[object]], child: list[str]) -> Bridge:
    """Start a peer and wait for its first answer; NotInstalled when it gives none."""
    port = free_port()
    began = time.perf_counter()
    process = subprocess.Popen(
        [str(word) for word in command(port, child)],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip

    def close() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    bridge = Bridge(name, f"http://127.0.0.1:{port}/mcp", None, process.pid, close)
    try:
        first_answer(bridge, began)
    except BaseException:
        close()
        raise
    return bridge


def first_answer(bridge: Bridge, began: float) -> None:
    """Wait until `initialize` is answered; notes how long after `began` (perf_counter) that was."""
    while True:
        try:
            with contextlib.suppress(ConnectionError), contextlib.closing(bridge.session()) as client:
                bridge.started_ms = (time.perf_counter() - began) * 1000
                with contextlib.suppress(Exception):
                    client.delete()
                return
        except Exception:  # a bridge that listens before it can answer
            if time.perf_counter() - began > START_LIMIT:
                raise
        if time.perf_counter() - began > START_LIMIT:
            raise NotInstalled(f"{bridge.name} does not answer")
        time.sleep(0.005)


def start_broker(name: str, child: list[str], program: Path | None = None, **settings: object) -> Bridge:
    """The broker as users run it.

    OAuth, audit and metrics on, its log in a file, its memory limited to two arenas as in the unit.
    """
    folder = Path(tempfile.mkdtemp(prefix="fjmcp-bench-"))
    forgejo = FakeForgejo(access_lifetime=86400).start()
    values = {
        "max_sessions": 1200, "max_sessions_per_user": 1200, "max_session_rows_per_user": 20000,
        "metrics_listen": f"127.0.0.1:{free_port()}", "session_idle_timeout": "1h",
    } | settings  # fmt: skip
    if b"max_streams_per_user" in (program or BROKER).read_bytes():  # an older program knows no such limit
        values = {"max_streams_per_user": 2000} | values
    installation = Installation(folder, forgejo, child, program=program, **values)
    os.environ["MALLOC_ARENA_MAX"] = "2"
    began = time.perf_counter()
    broker = installation.start()
    bridge = Bridge(name, installation.url + "/mcp", None, broker.pid, lambda: None)

    def close() -> None:
        installation.close()
        forgejo.stop()
        shutil.rmtree(folder, ignore_errors=True)

    bridge.close = close
    try:
        await_health(installation.url, began, bridge)
        oauth = OAuthClient(installation.url, name="bench")
        oauth.login(None, "alice", "secret", "full")
        bridge.token = oauth.tokens["access_token"]
        bridge.extra = {"installation": installation, "oauth": oauth, "forgejo": forgejo}
    except BaseException:
        close()
        raise
    return bridge


def await_health(url: str, began: float, bridge: Bridge) -> None:
    """The broker's first answer is any: nobody has logged in yet."""
    host, port = url.split("/")[2].split(":")
    with socket.create_connection((host, int(port)), timeout=START_LIMIT) as sock:
        sock.sendall(f"GET /healthz HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n".encode())
        if not sock.recv(4096).startswith(b"HTTP/1.1 200"):
            raise NotInstalled("the broker does not answer")
    bridge.started_ms = (time.perf_counter() - began) * 1000
