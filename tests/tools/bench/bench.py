"""`python3 tests/tools/bench/bench.py [--quick] [--only ROW]`.

The broker beside the bridges a user could pick instead, as ratios. The broker runs as users
run it (OAuth, audit, metrics on, log to a file); the others only bridge. All stand before
the same child (child.c) and under the same load (load.c, faster than what it measures).
Rounds alternate between them, so that a slow phase of the machine hits all alike; the
median of the rounds counts. A peer that cannot be installed is named and left out.

    --program NAME=PATH   another fjmcp_broker.py beside
    ours, such as that of the last release; may be repeated
    --json FILE           the figures as JSON too
    --history FILE        append this run's ratios as one line of JSON (docs/performance.jsonl)

Absolute figures belong to this machine and this hour; the ratios are what counts.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import resource
import socket
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]

from bridges import (  # noqa: E402
    PROTOCOL,
    Bridge,
    McpClient,
    NotInstalled,
    OAuthClient,
    compiled,
    peers,
    start_broker,
    start_peer,
)

ROOT = HERE.parent.parent.parent
OURS = "broker"
TICK = os.sysconf("SC_CLK_TCK")
MODERN = "2026-07-28"
INITIALIZE = {
    "protocolVersion": PROTOCOL,
    "capabilities": {},
    "clientInfo": {"name": "bench", "version": "1"},
}
BASE_HEADERS = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}


def memory(pid: int) -> float:
    """Resident memory of a process, MiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise OSError("no VmRSS")


def cpu(pid: int) -> float:
    """Seconds of CPU that a process has used, its children's not among them."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def http_request(bridge: Bridge, body: bytes, headers: dict[str, str]) -> bytes:
    """One POST as bytes."""
    host, port = bridge.address
    lines = [f"POST /mcp HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: {len(body)}"]
    given = BASE_HEADERS | headers | ({"Authorization": f"Bearer {bridge.token}"} if bridge.token else {})
    lines += [f"{name}: {value}" for name, value in given.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


def rpc(method: str, params: dict[str, object]) -> bytes:
    """A JSON-RPC request."""
    return json.dumps({"jsonrpc": "2.0", "id": 7, "method": method, "params": params}).encode()


def small_call(size: int = 2) -> bytes:
    """A tools/call whose answer has that many bytes of text."""
    return rpc("tools/call", {"name": "get_echo", "arguments": {"size": size}})


def legacy_request(bridge: Bridge, client: McpClient, body: bytes) -> bytes:
    """A request of a session."""
    headers = {"MCP-Protocol-Version": PROTOCOL}
    if client.session_id:
        headers["Mcp-Session-Id"] = client.session_id
    return http_request(bridge, body, headers)


def modern_request(bridge: Bridge) -> bytes:
    """A small call of the modern era (MCP 2026-07-28 streamable-http)."""
    prefix = "io.modelcontextprotocol/"
    meta = {f"{prefix}protocolVersion": MODERN, f"{prefix}clientCapabilities": {}}
    meta[f"{prefix}clientInfo"] = {"name": "bench", "version": "1"}
    params = {"name": "get_echo", "arguments": {"size": 2}, "_meta": meta}
    headers = {"MCP-Protocol-Version": MODERN, "Mcp-Method": "tools/call", "Mcp-Name": "get_echo"}
    return http_request(bridge, rpc("tools/call", params), headers)


class Bench:
    """The rows, and what they need: the compiled load generator and child, how long and how often."""

    def __init__(self, cache: Path, quick: bool) -> None:
        self.load_program = compiled(cache, "load")
        self.child = [str(compiled(cache, "child"))]
        self.seconds = 1.0 if quick else 4.0
        self.quick = quick

    def load(
        self, bridge: Bridge, requests: list[bytes], calls: int = 1_000_000, seconds: float = 0.0
    ) -> dict[str, float]:
        """Repeat these requests, one a connection; figures of load.c.

        OSError when over 1 in 100 answers was wrong.
        """
        data = b"".join(b"%d\n%s" % (len(request), request) for request in requests)
        host, port = bridge.address
        words = [self.load_program, host, str(port), str(calls), str(seconds or self.seconds)]
        done = subprocess.run(words, input=data, capture_output=True, timeout=300)
        if done.returncode:
            raise OSError(done.stderr.decode()[-300:])
        result = json.loads(done.stdout)
        if result["errors"] * 100 > result["calls"]:  # a peer that fails now and then is still compared
            raise OSError(f"{result['errors']} errors: {done.stderr.decode()[-300:]}")
        return result

    @contextlib.contextmanager
    def sessions(self, bridge: Bridge, count: int):
        """That many open sessions, ended afterwards."""
        opened = [bridge.session() for _ in range(count)]
        try:
            yield opened
        finally:
            for client in opened:
                with contextlib.suppress(Exception):
                    client.delete()
                client.close()

    def small(self, bridge: Bridge, count: int) -> dict[str, float]:
        """Small calls in that many sessions; microseconds of the bridge's own CPU a call besides."""
        with self.sessions(bridge, count) as opened:
            requests = [legacy_request(bridge, client, small_call()) for client in opened]
            self.load(bridge, requests, calls=50 * count)
            before = cpu(bridge.pid)
            result = self.load(bridge, requests)
            result["cpu_us"] = (cpu(bridge.pid) - before) / result["calls"] * 1e6
            return result

    def modern(self, bridge: Bridge) -> dict[str, float]:
        """Small calls of the modern era through a legacy child, one connection."""
        self.load(bridge, [modern_request(bridge)], calls=50)
        return self.load(bridge, [modern_request(bridge)])

    def large(self, bridge: Bridge) -> dict[str, float]:
        """Calls that answer with 1 MiB, one session."""
        with self.sessions(bridge, 1) as opened:
            return self.load(bridge, [legacy_request(bridge, opened[0], small_call(1 << 20))], calls=400)

    def tool_list(self, bridge: Bridge) -> dict[str, float]:
        """tools/list of about 100 KB, one session."""
        with self.sessions(bridge, 1) as opened:
            return self.load(bridge, [legacy_request(bridge, opened[0], rpc("tools/list", {}))], calls=4000)

    def opening(self, bridge: Bridge) -> dict[str, float]:
        """Milliseconds from `initialize` to its answer.

        A child started for it (where the bridge starts one).
        """
        taken = []
        for _ in range(20 if self.quick else 60):
            client = McpClient(bridge.url, bridge.token, protocol=PROTOCOL)
            with contextlib.suppress(Exception):  # the connection is there before the clock starts
                client.post({"jsonrpc": "2.0", "id": 0, "method": "ping"})
            began = time.perf_counter()
            response = client.post(json.loads(rpc("initialize", INITIALIZE)))
            taken.append((time.perf_counter() - began) * 1000)
            client.session_id = response.headers.get("Mcp-Session-Id")
            client.version = PROTOCOL
            with contextlib.suppress(Exception):
                client.delete()
            client.close()
        return {"p50_ms": statistics.median(taken)}


def open_stream(bridge: Bridge, session_id: str | None) -> socket.socket:
    """A socket on which a session's GET stream is open."""
    host, port = bridge.address
    sock = socket.create_connection((host, port), timeout=60)
    headers = (
        f"GET /mcp HTTP/1.1\r\nHost: {host}:{port}\r\nAccept: text/event-stream\r\nMCP-Protocol-Version: "
        f"{PROTOCOL}\r\n"
    )
    headers += f"Authorization: Bearer {bridge.token}\r\n" if bridge.token else ""
    headers += f"Mcp-Session-Id: {session_id}\r\n" if session_id else ""
    sock.sendall((headers + "\r\n").encode())
    if b"text/event-stream" not in sock.recv(4096).lower():
        raise OSError("no stream was opened")
    return sock


def stream_memory(bench: Bench, bridge: Bridge, count: int) -> float:
    """KiB of the bridge's memory that each of `count` idle GET streams takes.

    The sessions are there before.
    """
    opened: list[McpClient] = []
    streams: list[socket.socket] = []
    try:
        for _ in range(count):
            client = bridge.session()
            client.close()
            opened.append(client)
        time.sleep(1)
        before = memory(bridge.pid)
        streams = [open_stream(bridge, client.session_id) for client in opened]
        time.sleep(1)
        return (memory(bridge.pid) - before) * 1024 / count
    finally:
        for sock in streams:
            sock.close()
        for client in opened:
            with contextlib.suppress(Exception):
                client.delete()
                client.close()


def own_start(child: list[str]) -> float:
    """How long the child itself takes to answer `initialize`, ms."""
    began = time.perf_counter()
    with subprocess.Popen(child, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout
        process.stdin.write(rpc("initialize", {"protocolVersion": PROTOCOL}) + b"\n")
        process.stdin.flush()
        process.stdout.readline()
        took = time.perf_counter() - began
        process.stdin.close()
    return took * 1000


def waking(bench: Bench, child: list[str], awake: int, rounds: int) -> float:
    """Milliseconds that a call takes which wakes a sleeping session, beyond the child's own start.

    `awake` other children run.
    """
    bridge = start_broker("waking", child, max_sessions=awake + 1, max_sessions_per_user=awake + 1)
    try:
        opened = [bridge.session() for _ in range(awake + 2)]
        taken = []
        for number in range(rounds + awake + 2):
            client = opened[
                number % len(opened)
            ]  # one more session than places: the one used longest ago sleeps
            began = time.perf_counter()
            client.call_tool("get_echo", size=2)
            took = (time.perf_counter() - began) * 1000
            if number >= awake + 2:
                taken.append(took - own_start(child))
        return statistics.median(taken)
    finally:
        bridge.close()


def after_calls(bench: Bench, name: str, program: Path | None, calls: int, sessions: int) -> dict[str, float]:
    """Memory of the broker at rest, after that many calls in that many sessions, and once all have ended."""
    bridge = start_broker(name, bench.child, program)
    try:
        time.sleep(2)
        figures = {"rest_mib": memory(bridge.pid)}
        with bench.sessions(bridge, sessions) as opened:
            requests = [legacy_request(bridge, client, small_call()) for client in opened]
            bench.load(bridge, requests, calls=calls, seconds=120)
            figures["loaded_mib"] = memory(bridge.pid)
        lowest = time.monotonic() + 90
        figures["after_mib"] = memory(bridge.pid)
        while time.monotonic() < lowest and figures["after_mib"] > figures["rest_mib"] + 8:
            time.sleep(2)
            figures["after_mib"] = min(figures["after_mib"], memory(bridge.pid))
        return figures
    finally:
        bridge.close()


def reaper_cost(bridge: Bridge, seconds: float) -> float:
    """Milliseconds of CPU a second that the broker takes when nobody calls."""
    before = cpu(bridge.pid)
    time.sleep(seconds)
    return (cpu(bridge.pid) - before) / seconds * 1000


def add_rows(bridge: Bridge, count: int) -> list[str]:
    """Write that many sessions of the bench's user into the store; their ids."""
    ids = [os.urandom(24).hex() for _ in range(count)]
    path = bridge.extra["installation"].settings["store_path"]
    with contextlib.closing(sqlite3.connect(path, timeout=10)) as db, db:
        columns = [row[1] for row in db.execute("PRAGMA table_info(sessions)") if row[1] != "hash"]
        listed = ", ".join(columns)
        copy = f"INSERT INTO sessions (hash, {listed}) SELECT ?, {listed} FROM sessions LIMIT 1"
        db.executemany(copy, [(hashlib.sha256(name.encode()).digest(),) for name in ids])
    return ids


def growth(bench: Bench, program: Path | None) -> list[tuple[str, float, float, float]]:
    """(what was before, p50 ms of a small call, the reaper's ms of CPU a second, MiB).

    Nothing may grow with what was.
    """
    rows = []
    bridge = start_broker("growth", bench.child, program)
    seconds = 3.0 if bench.quick else 10.0
    try:
        with bench.sessions(bridge, 1) as opened:
            request = legacy_request(bridge, opened[0], small_call())

            def note(what: str) -> None:
                result = bench.load(bridge, [request], calls=2000)
                rows.append((what, result["p50_ms"], reaper_cost(bridge, seconds), memory(bridge.pid)))

            bench.load(bridge, [request], calls=1)
            note("1 call")
            bench.load(bridge, [request], calls=1000)
            note("1,000 calls")
            bench.load(bridge, [request], calls=10_000 if bench.quick else 100_000, seconds=200)
            note("10,000 calls" if bench.quick else "100,000 calls")
            ids = add_rows(bridge, 1000 if bench.quick else 10_000)
            note(f"{len(ids):,} sessions on file")
            streams = [open_stream(bridge, name) for name in ids[: 60 if bench.quick else 1000]]
            note(f"{len(streams):,} idle streams")
            for sock in streams:
                sock.close()
    finally:
        bridge.close()
    return rows


def logins(bridge: Bridge, count: int) -> dict[str, float]:
    """Milliseconds of a whole login (registration to tokens, both pages fetched), and of a refresh."""
    whole, refreshes = [], []
    for _ in range(count):
        began = time.perf_counter()
        oauth = OAuthClient(bridge.extra["installation"].url, name="bench")
        oauth.login(None, "alice", "secret", "full")
        whole.append((time.perf_counter() - began) * 1000)
        began = time.perf_counter()
        oauth.refresh()
        refreshes.append((time.perf_counter() - began) * 1000)
    return {"login_ms": statistics.median(whole), "refresh_ms": statistics.median(refreshes)}


# (name of the row, unit, whether more is better, key of its figures)
LOAD_ROWS: tuple[tuple[str, str, bool, str, Callable[[Bench, Bridge], dict[str, float]], str], ...] = (
    ("small call p50", "ms", False, "small 1", lambda bench, bridge: bench.small(bridge, 1), "p50_ms"),
    ("small call p99", "ms", False, "small 1", lambda bench, bridge: bench.small(bridge, 1), "p99_ms"),
    (
        "calls/s, 8 sessions", "/s", True, "small 8",
        lambda bench, bridge: bench.small(bridge, 8), "calls_per_s",
    ),
    (
        "CPU a call, 8 sessions", "us", False, "small 8",
        lambda bench, bridge: bench.small(bridge, 8), "cpu_us",
    ),
    (
        "calls/s, 32 sessions", "/s", True, "small 32",
        lambda bench, bridge: bench.small(bridge, 32), "calls_per_s",
    ),
    ("initialize with spawn", "ms", False, "opening", lambda bench, bridge: bench.opening(bridge), "p50_ms"),
    ("1 MiB result", "ms", False, "large", lambda bench, bridge: bench.large(bridge), "p50_ms"),
)  # fmt: skip


def measured(
    bench: Bench, bridges: dict[str, Bridge], rounds: int, only: str
) -> dict[str, dict[str, list[float]]]:
    """{row: {bridge: its figure in each round}}, round by round, bridge by bridge."""
    found: dict[str, dict[str, list[float]]] = {}
    for number in range(rounds):
        for name, bridge in bridges.items():
            done: dict[str, dict[str, float]] = {}
            for row, _, _, key, measure, value in LOAD_ROWS:
                if only not in row:
                    continue
                try:
                    if key not in done:
                        done[key] = measure(bench, bridge)
                    found.setdefault(row, {}).setdefault(name, []).append(done[key][value])
                except Exception as error:
                    print(f"left out: {row} of {name}: {error}", file=sys.stderr)
        print(f"round {number + 1} of {rounds} done", file=sys.stderr)
    return found


def started(
    bench: Bench, child: list[str], programs: dict[str, Path | None], commands: dict
) -> dict[str, Bridge]:
    """Every bridge, running."""
    bridges = {name: start_broker(name, child, program) for name, program in programs.items()}
    for name, command in commands.items():
        try:
            bridges[name] = start_peer(name, command, child)
        except Exception as error:
            print(f"left out: {name}: {error}", file=sys.stderr)
    return bridges


def close_all(bridges: dict[str, Bridge]) -> None:
    """End what was started."""
    for bridge in bridges.values():
        bridge.close()


def compare(
    bench: Bench, programs: dict[str, Path | None], commands: dict, options: argparse.Namespace
) -> list[dict]:
    """The rows in which the broker stands beside its peers."""
    rounds = options.rounds or (2 if options.quick else 5)
    rows: list[dict] = []
    bridges = started(bench, bench.child, programs, commands)
    try:
        time.sleep(2)
        single = {
            "start to first answer": ("ms", {name: bridge.started_ms for name, bridge in bridges.items()}),
            "memory at rest": ("MiB", {name: memory(bridge.pid) for name, bridge in bridges.items()}),
        }
        found = measured(bench, bridges, rounds, options.only)
        modern = []
        if options.only in "modern call p50":
            modern = [bench.modern(bridges[OURS])["p50_ms"] for _ in range(rounds)]
        if options.only in "memory of an idle GET stream":
            count = 100 if options.quick else 1000
            figures = {}
            for name, bridge in bridges.items():
                try:
                    figures[name] = stream_memory(bench, bridge, count)
                except Exception as error:
                    print(f"left out: streams of {name}: {error}", file=sys.stderr)
            single["memory of an idle GET stream"] = ("KiB", figures)
    finally:
        close_all(bridges)
    for row, unit, more_is_better, *_ in LOAD_ROWS:
        if row in found:
            medians = {name: statistics.median(values) for name, values in found[row].items()}
            rows.append({"row": row, "unit": unit, "more": more_is_better, "figures": medians})
    if options.only in "100 KB tools/list":
        lists = started(bench, [*bench.child, "100000"], programs, commands)
        try:
            figures = {}
            for name, bridge in lists.items():
                try:
                    values = [bench.tool_list(bridge)["p50_ms"] for _ in range(min(rounds, 3))]
                    figures[name] = statistics.median(values)
                except Exception as error:
                    print(f"left out: tools/list of {name}: {error}", file=sys.stderr)
            rows.append({"row": "100 KB tools/list", "unit": "ms", "more": False, "figures": figures})
        finally:
            close_all(lists)
    for row, (unit, figures) in single.items():
        if options.only in row:
            rows.append({"row": row, "unit": unit, "more": False, "figures": figures})
    if modern and "small call p50" in found:
        own = statistics.median(found["small call p50"][OURS])
        figures = {OURS: statistics.median(modern), "our legacy call": own}
        rows.append({"row": "modern call p50", "unit": "ms", "more": False, "figures": figures})
    return rows


def ratios(row: dict) -> dict[str, float]:
    """How many times better the broker is than each other in a row."""
    figures = row["figures"]
    ours = figures.get(OURS)
    if not ours:
        return {}
    better = {}
    for name, figure in figures.items():
        if name != OURS and figure:
            better[name] = round(ours / figure if row["more"] else figure / ours, 2)
    return better


def print_table(rows: list[dict]) -> None:
    """The rows for people: the figure, and in brackets how many times better the broker is."""
    names = list(dict.fromkeys(name for row in rows for name in row["figures"]))
    print(f"\n{'':32}" + "".join(f"{name:>24}" for name in names))
    for row in rows:
        better = ratios(row)
        cells = []
        for name in names:
            figure = row["figures"].get(name)
            shown = "-" if figure is None else f"{figure:.2f}" if figure < 1000 else f"{figure:,.0f}"
            cells.append(f"{shown + (f' ({better[name]}x)' if name in better else ''):>24}")
        print(f"{row['row'] + ', ' + row['unit']:32}" + "".join(cells))
    print("(…x): how many times the broker is better than that one, in this run")


def alone(bench: Bench, options: argparse.Namespace) -> dict[str, object]:
    """What only the broker is measured in."""
    found: dict[str, object] = {}
    if options.only in "memory after calls":
        found["memory after 30,000 calls in 33 sessions"] = after_calls(
            bench, OURS, None, 3000 if options.quick else 30000, 33
        )
    if options.only in "waking":
        rounds = 10 if options.quick else 40
        found["waking beyond the child's own start, ms"] = {
            "alone": waking(bench, bench.child, 1, rounds),
            "10 awake": waking(bench, bench.child, 10, rounds),
        }
    if options.only in "growth":
        found["growth"] = growth(bench, None)
    if options.only in "login":
        bridge = start_broker("login", bench.child)
        try:
            found["login and refresh, ms"] = logins(bridge, 5 if options.quick else 30)
        finally:
            bridge.close()
    return found


def main() -> int:
    """Run the bench; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds and smaller numbers")
    parser.add_argument(
        "--rounds", type=int, default=0, help="how often each is measured (default 5, quick 2)"
    )
    parser.add_argument("--only", default="", help="only rows whose name holds this")
    parser.add_argument("--no-peers", action="store_true", help="the broker alone")
    parser.add_argument(
        "--program",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="another fjmcp_broker.py beside ours",
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--history", metavar="FILE", help="append the ratios as one line of JSON")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    cache = Path(os.environ.get("FJMCP_CACHE") or ROOT / ".cache") / "bench"
    programs: dict[str, Path | None] = {OURS: None}
    for given in options.program:
        name, _, path = given.partition("=")
        programs[name] = Path(path).resolve()
    try:
        bench = Bench(cache, options.quick)
        commands = {} if options.no_peers else peers(cache)
    except NotInstalled as error:
        parser.error(str(error))
    rows = compare(bench, programs, commands, options)
    print_table(rows)
    others = alone(bench, options)
    for what, figures in others.items():
        print(f"{what}: {json.dumps(figures)}")
    record = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": sys.version.split()[0],
        "quick": options.quick,
        "ratios": {row["row"]: ratios(row) for row in rows},
        "broker": {row["row"]: round(row["figures"][OURS], 3) for row in rows if OURS in row["figures"]},
        "alone": others,
    }
    if options.json:
        Path(options.json).write_text(json.dumps({**record, "rows": rows}, indent=1) + "\n")
    if options.history:
        with open(options.history, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
