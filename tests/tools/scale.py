"""What one broker holds: thousands of sessions on file, few children awake, thousands of open streams.

Printed in figures.

    python3 tests/tools/scale.py
    10,000 sessions, 50 children, 2,000 streams, 1,000 cycles
    python3 tests/tools/scale.py --child /usr/bin/forgejo-mcp
    with the real tool process instead of the suite's

The broker is the real program under the limits of its unit as far as a process can be given them
(LimitNOFILE, LimitCORE, MALLOC_ARENA_MAX); what MemoryMax and TasksMax would have to be is computed from what
was seen. Figures are of this machine; what is checked is that every answer is its own user's, that there are
never too many children, and that at rest everything is given back.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import resource
import secrets
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rigs.broker_process import Installation  # noqa: E402
from rigs.busy_clients import health  # noqa: E402
from rigs.fake_forgejo import FakeForgejo  # noqa: E402
from rigs.mcp_client import LEGACY, McpClient, OAuthClient  # noqa: E402
from rigs.rig import token_of

CHILD = (sys.executable, "-I", str(Path(__file__).resolve().parent.parent / "rigs" / "stdio_child.py"))
USERS, WORKERS, NOFILE, MIB = 20, 8, 16384, 1 << 20
INITIALIZE = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {
        "protocolVersion": LEGACY,
        "capabilities": {},
        "clientInfo": {"name": "scale", "version": "1"},
    },
}
CALL = {
    "jsonrpc": "2.0",
    "id": 2,
    "method": "tools/call",
    "params": {"name": "get_my_user_info", "arguments": {}},
}


class Wrong(Exception):
    """Something that does not hold."""


def figures(pid):
    """(resident bytes, threads, file descriptors) of a process."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) << 10, int(fields["Threads"]), len(os.listdir(f"/proc/{pid}/fd"))


def shown(pid):
    memory, threads, descriptors = figures(pid)
    return f"{memory / MIB:.0f} MiB, {threads} threads, {descriptors} descriptors"


class Scale:
    """A broker with many users and a store full of sessions."""

    def __init__(self, folder, *, child, awake, sessions, say):
        self.say, self.awake, self.child = say, awake, child
        self.forgejo = FakeForgejo(access_lifetime=86400).start()
        self.users = [f"user{number}" for number in range(USERS)]
        for user in self.users:
            self.forgejo.add_user(user)
        self.installation = Installation(
            folder,
            self.forgejo,
            child,
            max_sessions=str(awake),
            max_sessions_per_user=str(awake),
            max_session_rows_per_user=str(sessions),
            max_streams_per_user="3000",
            session_idle_timeout="2s",
        )
        self.broker = self.installation.start()
        self.tokens = {}
        for user in self.users:
            oauth = OAuthClient(self.installation.url, name=f"scale of {user}")
            self.tokens[user] = oauth.login(None, user, "secret")["access_token"]
        self.url = self.installation.url + "/mcp"
        self.sessions = self._filled(sessions)

    def _filled(self, count):
        """Open one session of each user, then copy its row with new ids.

        As if `count` had been opened over the weeks.
        """
        opened = {}
        for user in self.users:
            with contextlib.closing(McpClient(self.url, self.tokens[user])) as mcp:
                mcp.initialize()
                opened[user] = mcp.session_id
        self.broker.stop()
        found = [(user, opened[user]) for user in self.users]
        with contextlib.closing(sqlite3.connect(self.installation.folder / "broker.db")) as db:
            columns = [row[1] for row in db.execute("PRAGMA table_info(sessions)") if row[1] != "hash"]
            copy = (
                f"INSERT INTO sessions (hash, {', '.join(columns)}) SELECT ?, "
                f"{', '.join(columns)} FROM sessions WHERE hash = ?"
            )
            for number in range(count - len(found)):
                user, session_id = self.users[number % USERS], secrets.token_urlsafe(32)
                db.execute(
                    copy, [hashlib.sha256(each.encode()).digest() for each in (session_id, opened[user])]
                )
                found.append((user, session_id))
            db.commit()
        self.broker = self.installation.start()
        return found

    def close(self):
        self.installation.close()
        self.forgejo.stop()

    def call(self, user, session_id):
        """One tool call; seconds it took."""
        with contextlib.closing(McpClient(self.url, self.tokens[user], session_id=session_id)) as mcp:
            started = time.monotonic()
            answer = mcp.post(CALL, timeout=60)
            took = time.monotonic() - started
        if f'\\"login\\": \\"{user}\\"' not in answer.text:
            raise Wrong(f"{user} was answered {answer.status} {answer.text[:300]}")
        return took

    def at_rest(self):
        """Wait until every child sleeps."""
        deadline = time.monotonic() + 60
        while self.broker.children():
            if time.monotonic() > deadline:
                raise Wrong("children do not go to sleep")
            time.sleep(0.1)
        return figures(self.broker.pid)

    # -- what is measured

    def random_requests(self, count):
        """Requests to sessions chosen at random.

        Gives (broker's peak, the children's memory and threads) with all places taken.
        """
        choice = random.Random(1)
        chosen = [choice.choice(self.sessions) for _ in range(count)]
        most, peak, children = 0, (0, 0, 0), []
        with ThreadPoolExecutor(WORKERS) as pool:
            running = [pool.submit(self.call, *session) for session in chosen]
            while not all(future.done() for future in running):
                pids = self.broker.children()
                if len(pids) >= most:
                    with contextlib.suppress(OSError, KeyError):
                        children = [figures(pid)[:2] for pid in pids]
                most, peak = max(most, len(pids)), max(peak, figures(self.broker.pid))
                time.sleep(0.05)
            times = sorted(future.result() * 1000 for future in running)
        if (
            most > self.awake + WORKERS
        ):  # each on its way out still holds its place, but a reaped one is seen for a moment
            raise Wrong(f"{most} children")
        if health(self.installation)["sessions"] != len(self.sessions):
            raise Wrong("sessions were lost")
        self.say(
            f"{count} requests to {len(self.sessions)} sessions, {most} children at most: "
            f"p50 {times[len(times) // 2]:.0f} ms, p99 {times[int(len(times) * 0.99)]:.0f} ms; "
            f"broker {peak[0] / MIB:.0f} MiB, {peak[1]} threads, {peak[2]} descriptors"
        )
        return peak, children

    def wake_up(self, count):
        """Milliseconds from a request to a sleeping session to its answer.

        Without those of the child's own start and answer.
        """
        own, woken = [], []
        for user, session_id in self.sessions[:count]:
            own.append(self._own_start(user))
            woken.append(self.call(user, session_id))
        beyond = (statistics.median(woken) - statistics.median(own)) * 1000
        self.say(
            f"a wake-up: {statistics.median(woken) * 1000:.1f} ms, "
            f"of which the child's own start and answer {statistics.median(own) * 1000:.1f} ms; "
            f"beyond it {beyond:.1f} ms (median of {count}; goal: below 10)"
        )
        return beyond

    def _own_start(self, user):
        environment = {
            "PATH": os.environ["PATH"],
            "FORGEJO_ACCESS_TOKEN": self._upstream_token(user),
            "FORGEJO_URL": self.forgejo.url,
        }
        lines = [
            json.dumps(message).encode() + b"\n"
            for message in (INITIALIZE, {"jsonrpc": "2.0", "method": "notifications/initialized"}, CALL)
        ]
        started = time.monotonic()
        with subprocess.Popen(
            self.child,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as child:
            child.stdin.write(lines[0])
            child.stdin.flush()
            child.stdout.readline()
            child.stdin.write(lines[1] + lines[2])
            child.stdin.flush()
            child.stdout.readline()
            took = time.monotonic() - started
            child.stdin.close()
        return took

    def _upstream_token(self, user):
        """The token that this user's children hold, without minting one: that would end it."""
        with contextlib.closing(McpClient(self.url, self.tokens[user])) as mcp:
            return token_of(mcp)

    def streams(self, count):
        """Open so many GET streams, one a session; gives the broker's figures with all of them open."""
        before, opened = self.at_rest(), []
        for user, session_id in self.sessions[:count]:
            sock = socket.create_connection(
                ("127.0.0.1", int(self.installation.url.rpartition(":")[2])), timeout=20
            )
            sock.sendall(
                (
                    f"GET /mcp HTTP/1.1\r\nHost: {self.installation.url[7:]}\r\nAuthorization: "
                    f"Bearer {self.tokens[user]}\r\n"
                    f"Accept: text/event-stream\r\nMcp-Session-Id: {session_id}\r\n\r\n"
                ).encode()
            )
            if not sock.recv(4096).startswith(b"HTTP/1.1 200 "):
                raise Wrong("a stream was refused")
            opened.append(sock)
        during = figures(self.broker.pid)
        self.call(*self.sessions[0])
        self.say(
            f"{count} GET streams: {shown(self.broker.pid)}, "
            f"{(during[0] - before[0]) / count / 1024:.0f} KiB each; no child awake for them"
        )
        for sock in opened:
            sock.close()
        return during

    def cycles(self, count):
        """Open and end so many sessions."""

        def one(number):
            user = self.users[number % USERS]
            with contextlib.closing(McpClient(self.url, self.tokens[user])) as mcp:
                mcp.initialize()
                mcp.call_tool("get_my_user_info")
                if mcp.delete().status != 204:
                    raise Wrong("DELETE was refused")

        started = time.monotonic()
        with ThreadPoolExecutor(WORKERS // 2) as pool:
            list(pool.map(one, range(count)))
        self.say(f"{count} sessions opened, used and ended in {time.monotonic() - started:.1f} s")

    def given_back(self, what, before):
        """Wait until threads and descriptors are back where they were; the broker's resident bytes."""
        deadline = time.monotonic() + 60
        while any(now > then for now, then in zip(figures(self.broker.pid)[1:], before[1:])):
            if time.monotonic() > deadline:
                raise Wrong(
                    f"after {what}: {shown(self.broker.pid)}, before {before[1]} threads, "
                    f"{before[2]} descriptors"
                )
            time.sleep(0.1)
        self.say(f"at rest after {what}: {shown(self.broker.pid)} (before: {before[0] / MIB:.0f} MiB)")
        return figures(self.broker.pid)[0]


def run(folder, *, sessions, awake, requests, streams, cycles, wakes, child=CHILD, say=print):
    """The whole run; gives {figure: value}. Wrong when something does not hold."""
    scale = Scale(folder, child=child, awake=awake, sessions=sessions, say=say)
    try:
        say(
            f"fresh, {len(scale.sessions)} sessions on file: {shown(scale.broker.pid)}; store "
            f"{os.path.getsize(scale.installation.folder / 'broker.db') / MIB:.1f} MiB"
        )
        beyond = scale.wake_up(wakes)
        peak, children = scale.random_requests(requests)
        rest = scale.at_rest()
        during = scale.streams(streams)
        scale.given_back(f"{streams} streams", rest)
        scale.cycles(min(100, cycles))  # what is made once has been made
        warm = scale.at_rest()
        scale.cycles(cycles)
        scale.at_rest()
        memory = scale.given_back(f"{cycles} cycles", warm)
        child_memory = max((memory for memory, _ in children), default=0)
        child_threads = max((threads for _, threads in children), default=0)
        tasks = during[1] + peak[1] + awake * child_threads + 1
        needed = during[0] + (peak[0] - rest[0]) + awake * child_memory
        say(f"a child: {child_memory / MIB:.0f} MiB, {child_threads} threads")
        say(
            f"with {awake} children and {streams} streams at once TasksMax needs {tasks}, "
            f"MemoryMax {needed / MIB:.0f} MiB"
        )
        return {"beyond": beyond, "grown": memory - warm[0], "tasks": tasks, "memory": needed}
    finally:
        scale.close()


def main():
    parser = argparse.ArgumentParser(description="Measure what one broker holds.")
    for name, value in (
        ("sessions", 10000),
        ("awake", 50),
        ("requests", 2000),
        ("streams", 2000),
        ("cycles", 1000),
        ("wakes", 40),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--child", help="a tool process to run as `CHILD --transport stdio --url URL`")
    options = vars(parser.parse_args())
    child = options.pop("child")
    os.environ["MALLOC_ARENA_MAX"] = "2"
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (NOFILE, NOFILE))
    with tempfile.TemporaryDirectory(prefix="fjmcp-scale-") as folder:
        run(Path(folder), **options, child=(child, "--transport", "stdio") if child else CHILD)


if __name__ == "__main__":
    main()
