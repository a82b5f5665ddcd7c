"""`python3 tests/bench/bench.py [--quick]`: the broker beside other bridges, in one run, as ratios.

Everything of the broker is on (OAuth token, JSON log, SQLite); the others only bridge. All stand before the same child
(echo_child.py) and under the same load (wrk, one thread and one kept connection for each session). Needs wrk and npm. Rounds are interleaved, so that a slow phase of the machine hits all alike;
the median of the rounds counts. Peers are installed, pinned, below `.cache/bench`; one that cannot be is named and left out.
Printed: p50 and p99 of a small call in one session, calls a second in 8 and 32 sessions, memory at rest of the bridge alone, and
of the broker: waking beyond the child's own start, 10,000 sessions on file, open streams, open/close cycles.
"""

import argparse
import contextlib
import hashlib
import json
import os
import resource
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BENCH = Path(__file__).resolve().parent
sys.path.insert(0, str(BENCH.parent))

from broker_process import Installation  # noqa: E402
from fake_forgejo import FakeForgejo  # noqa: E402
from mcp_client import McpClient, OAuthClient  # noqa: E402

ROOT = BENCH.parent.parent
CHILD = [sys.executable, "-I", str(BENCH / "echo_child.py")]
NPM = {"supergateway": "4.0.0", "mcp-proxy": "6.7.19"}
PYPI = {"mcp-proxy": "0.13.0"}


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def install(cache):
    """{name: function from a port to a command}; what cannot be installed is named."""
    cache.mkdir(parents=True, exist_ok=True)
    shell, found = " ".join(CHILD), {}
    with named_failure("npm peers"):
        subprocess.run(
            [
                "npm",
                "install",
                "--no-audit",
                "--no-fund",
                "--silent",
                "--prefix",
                str(cache / "npm"),
                *(f"{name}@{version}" for name, version in NPM.items()),
            ],
            check=True,
            capture_output=True,
            timeout=300,
        )
        programs = cache / "npm" / "node_modules" / ".bin"
        found["supergateway"] = lambda port: [
            programs / "supergateway",
            "--stdio",
            shell,
            "--outputTransport",
            "streamableHttp",
            "--stateful",
            "--port",
            str(port),
            "--logLevel",
            "none",
        ]
        found["mcp-proxy (npm)"] = lambda port: [
            programs / "mcp-proxy",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--server",
            "stream",
            "--",
            *CHILD,
        ]
    with named_failure("PyPI peers"):
        if not (cache / "venv" / "bin" / "mcp-proxy").exists():
            subprocess.run(
                [sys.executable, "-m", "venv", str(cache / "venv")],
                check=True,
                capture_output=True,
                timeout=120,
            )
            subprocess.run(
                [
                    cache / "venv" / "bin" / "pip",
                    "install",
                    "-q",
                    *(f"{name}=={version}" for name, version in PYPI.items()),
                ],
                check=True,
                capture_output=True,
                timeout=300,
            )
        found["mcp-proxy (PyPI)"] = lambda port: [
            cache / "venv" / "bin" / "mcp-proxy",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--",
            *CHILD,
        ]
    return found


@contextlib.contextmanager
def named_failure(what):
    try:
        yield
    except (OSError, subprocess.SubprocessError) as error:
        print(f"left out: {what}: {error}", file=sys.stderr)


class Peer:
    """A running bridge."""

    def __init__(self, command, port):
        self.url, self.token = f"http://127.0.0.1:{port}/mcp", "-"
        self.process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.pid = self.process.pid
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                return
            time.sleep(0.05)
        self.close()
        raise OSError("it does not listen")

    def close(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


SCRIPT = """
local sessions, count = {%s}, 0
function setup(thread) count = count + 1; thread:set("session", sessions[count]) end
function init(arguments)
  wrk.headers["Mcp-Session-Id"] = session ~= "" and session or nil
  body = wrk.format("POST", nil, nil, '{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"echo","arguments":{"text":"%s"}}}')
end
function request() return body end
function done(summary, latency)
  local errors = summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.status + summary.errors.timeout
  print(string.format('RESULT {"p50_ms": %%f, "p99_ms": %%f, "calls_per_s": %%f, "errors": %%d}', latency:percentile(50) / 1000,
        latency:percentile(99) / 1000, summary.requests / summary.duration * 1e6, errors))
end
"""


def load(server, sessions, seconds):
    """wrk with one thread and one kept connection for each session; {"p50_ms", "p99_ms", "calls_per_s"}."""
    opened = []
    for _ in range(sessions):
        client = McpClient(server.url, None if server.token == "-" else server.token, protocol="2025-06-18")
        client.initialize()
        client.call_tool("echo", text="warm")
        opened.append(client)
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(
            SCRIPT % (", ".join(json.dumps(client.session_id or "") for client in opened), "x" * 100)
        )
        script.flush()
        headers = {
            "Content-Type": "application/json",
            "Accept": "application/json, text/event-stream",
            "MCP-Protocol-Version": "2025-06-18",
        }
        if server.token != "-":
            headers["Authorization"] = f"Bearer {server.token}"
        done = subprocess.run(
            [
                "wrk",
                f"-t{sessions}",
                f"-c{sessions}",
                f"-d{seconds}s",
                "-s",
                script.name,
                *(word for name, value in headers.items() for word in ("-H", f"{name}: {value}")),
                server.url,
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )
    for client in opened:
        with contextlib.suppress(OSError):
            client.delete()
        client.close()
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        raise OSError((done.stderr or done.stdout).strip()[-300:])
    result = json.loads(line.removeprefix("RESULT "))
    if result["errors"]:
        raise OSError(f"{result['errors']} errors under load")
    return result


def memory(pid):
    """Resident memory in MiB of a process."""
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) / 1024


class Ours:
    """The broker, logged in."""

    def __init__(self, folder):
        self.forgejo = FakeForgejo().start()
        self.installation = Installation(
            folder,
            self.forgejo,
            CHILD,
            max_sessions=100,
            max_sessions_per_user=100,
            max_session_rows_per_user=20000,
        )
        self.broker = self.installation.start()
        client = OAuthClient(self.installation.url, name="bench")
        client.login(None, "alice", "secret", "full")
        self.client, self.url, self.token, self.pid = (
            client,
            self.installation.url + "/mcp",
            client.tokens["access_token"],
            self.broker.pid,
        )

    def close(self):
        self.installation.close()
        self.forgejo.stop()


def compare(ours, peers, rounds, seconds):
    """Print p50, p99 and calls/s of all, as the peer's (or the broker's) share."""
    servers, results = {"broker": ours}, {}
    for name, command in peers.items():
        with named_failure(name):
            port = free_port()
            servers[name] = Peer(command(port), port)
    try:
        resting = {name: memory(server.pid) for name, server in servers.items()}
        for _ in range(rounds):
            for name, server in list(servers.items()):
                with named_failure(name):
                    for sessions in (1, 8, 32):
                        results.setdefault((name, sessions), []).append(load(server, sessions, seconds))
    finally:
        for name, server in servers.items():
            if name != "broker":
                server.close()
    print(
        f"\n{'':18}{'p50 ms':>9}{'ratio':>7}{'p99 ms':>9}{'ratio':>7}{'calls/s 8':>11}{'ratio':>7}{'calls/s 32':>11}{'ratio':>7}"
        f"{'MiB at rest':>13}{'ratio':>7}"
    )

    def median(name, sessions, key):
        return statistics.median(one[key] for one in results[name, sessions])

    for name in servers:
        if not all((name, sessions) in results for sessions in (1, 8, 32)):
            print(f"{name:18}no result")
            continue
        row = [
            median(name, 1, "p50_ms"),
            median(name, 1, "p99_ms"),
            median(name, 8, "calls_per_s"),
            median(name, 32, "calls_per_s"),
            resting[name],
        ]
        base = [
            median("broker", 1, "p50_ms"),
            median("broker", 1, "p99_ms"),
            median("broker", 8, "calls_per_s"),
            median("broker", 32, "calls_per_s"),
            resting["broker"],
        ]
        ratios = [row[0] / base[0], row[1] / base[1], base[2] / row[2], base[3] / row[3], row[4] / base[4]]
        print(
            f"{name:18}{row[0]:9.2f}{ratios[0]:7.1f}{row[1]:9.2f}{ratios[1]:7.1f}{row[2]:11.0f}{ratios[2]:7.1f}{row[3]:11.0f}{ratios[3]:7.1f}"
            f"{row[4]:13.1f}{ratios[4]:7.1f}"
        )
    print("ratio: how many times the broker is better")


def own_start():
    """How long the child itself takes to answer `initialize`, in ms."""
    started = time.perf_counter()
    with subprocess.Popen(CHILD, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdin.write(b'{"jsonrpc":"2.0","id":1,"method":"initialize","params":{}}\n')
        child.stdin.flush()
        child.stdout.readline()
        took = time.perf_counter() - started
        child.stdin.close()
    return took * 1000


def waking(ours, rounds):
    """Kill the child, call: what that takes beyond the child's own start."""
    mcp = McpClient(ours.url, ours.token)
    mcp.initialize()
    beyond = []
    for _ in range(rounds):
        for pid in ours.broker.children():
            os.kill(pid, signal.SIGKILL)
        while ours.broker.children():
            time.sleep(0.01)
        started = time.perf_counter()
        mcp.request("ping")
        beyond.append((time.perf_counter() - started) * 1000 - own_start())
    print(
        f"waking a session: {statistics.median(beyond):.1f} ms beyond the child's own start (median of {rounds})"
    )
    mcp.delete()


def counts(pid):
    return (len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task")), round(memory(pid), 1))


def scale(ours, streams, cycles, rows):
    """Rows on file, open streams, and cycles that must leave nothing."""
    print(f"at the start:  (fds, threads, MiB) {counts(ours.pid)}")
    for _ in range(cycles):
        mcp = McpClient(ours.url, ours.token)
        mcp.initialize()
        mcp.delete()
        mcp.close()
    time.sleep(1)
    print(f"after {cycles} open/close cycles: {counts(ours.pid)}")
    ids = [os.urandom(24).hex() for _ in range(rows)]
    with contextlib.closing(sqlite3.connect(ours.installation.settings["store_path"], timeout=10)) as db, db:
        db.executemany(
            "INSERT INTO sessions (hash, sub, client_id, protocol_version, initialize, server, created_at, used_at) SELECT"
            " ?, sub, client_id, '2025-06-18', '{}', '{}', created_at, created_at FROM grants LIMIT 1",
            [(hashlib.sha256(name.encode()).digest(),) for name in ids],
        )
    mcp = McpClient(ours.url, ours.token)
    mcp.initialize()
    print(f"with {rows} sessions on file: p50 of a ping {ping(mcp):.2f} ms, {counts(ours.pid)}")
    opened = [open_stream(ours, name) for name in ids[:streams]]
    for sock in opened:
        if b"text/event-stream" not in (said := sock.recv(4096)):
            raise SystemExit(f"a stream was not opened: {said[:200]}")
    print(f"with {streams} open streams: p50 of a ping {ping(mcp):.2f} ms, {counts(ours.pid)}")
    for sock in opened:
        sock.close()


def ping(mcp):
    """The median of 200 pings, in ms."""
    times = []
    for _ in range(200):
        started = time.perf_counter()
        mcp.request("ping")
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1000


def open_stream(ours, session_id):
    """A socket on which a session's GET stream has been asked for."""
    host = ours.url.split("/")[2]
    sock = socket.create_connection((host.split(":")[0], int(host.split(":")[1])))
    sock.sendall(
        f"GET /mcp HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {ours.token}\r\nMcp-Session-Id: {session_id}\r\n\r\n".encode()
    )
    return sock


def main():
    parser = argparse.ArgumentParser(description="The broker beside other bridges, as ratios.")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and smaller numbers")
    quick = parser.parse_args().quick
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    if not shutil.which("wrk"):
        parser.error("wrk is not installed (Debian: apt-get install wrk)")
    cache = Path(os.environ.get("FJMCP_CACHE") or ROOT / ".cache") / "bench"
    peers = install(cache) if shutil.which("npm") else {}
    with tempfile.TemporaryDirectory(prefix="fjmcp-bench-") as folder:
        ours = Ours(Path(folder))
        try:
            compare(ours, peers, 2 if quick else 5, 1 if quick else 4)
            waking(ours, 5 if quick else 20)
            scale(ours, 200 if quick else 2000, 50 if quick else 1000, 1000 if quick else 10000)
        finally:
            ours.close()


if __name__ == "__main__":
    main()
