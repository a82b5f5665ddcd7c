"""Five logins and fifty addresses attack the real broker.

An honest person goes on working meanwhile, and memory comes back afterwards.

    python3 tests/tools/chaos.py --hostile                  ten minutes
    python3 tests/tools/chaos.py --hostile --minutes 0.5

ATTACKS is the table: a function of a Target and an Attacker each, called again and again by a thread of its
own; each attacker is a process. What must hold is judged by Siege.judge(): every call of the honest person
was answered, /healthz within a second, memory and tasks (threads of the broker, its children and theirs)
stayed below what the unit allows, and at rest the broker has no more than 15 MiB above what it had before.
"""

import contextlib
import http.client
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rigs.broker_process import Installation  # noqa: E402
from rigs.fake_forgejo import FakeForgejo  # noqa: E402
from rigs.mcp_client import LEGACY, META, MODERN, McpClient, OAuthClient  # noqa: E402

CHILD = (sys.executable, "-I", str(Path(__file__).resolve().parent.parent / "rigs" / "stdio_child.py"))
MIB = 1 << 20
ATTACKERS = 5
ADDRESSES = tuple(f"198.51.100.{number}" for number in range(1, 51))
MEMORY_MAX = 3 << 30  # of the unit, for the broker and all its children
TASKS_MAX = 6144
SLACK = 15 * MIB
NOFILE = 16384
FAILURES = (OSError, http.client.HTTPException, ValueError)


class Broken(Exception):
    """Something that an attacker must not be able to do."""


@dataclass(frozen=True)
class Target:
    """Where the broker is."""

    host: str
    port: int


@dataclass
class Attacker:
    """One login of somebody hostile, with a random generator and the sockets that it holds open."""

    token: str
    session_id: str
    random: random.Random
    held: list = field(default_factory=list)

    def address(self):
        return self.random.choice(ADDRESSES)

    def hold(self, sock, at_most=100):
        """Keep a connection open, the newest ones only."""
        self.held.append(sock)
        while len(self.held) > at_most:
            self.held.pop(0).close()


# -- requests, by hand


def head(target, method, path, address, token=None, length=None, **headers):
    """The head of a request that came through the proxy from an address."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {target.host}", f"X-Forwarded-For: {address}"]
    lines += [f"Authorization: Bearer {token}"] if token else []
    lines += [f"Content-Length: {length}"] if length is not None else []
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def connect(target):
    return socket.create_connection(("127.0.0.1", target.port), timeout=15)


def sent(target, data, wait=True):
    """Send bytes on a new connection.

    With `wait` read a little of what is answered and close, else the socket.
    """
    sock = connect(target)
    sock.sendall(data)
    if not wait:
        return sock
    with sock:
        return sock.recv(4096)


def call(target, attacker, message, *, modern=False, wait=True, body=None):
    """POST a JSON-RPC message (or `body`) to /mcp as an attacker."""
    body = json.dumps(message).encode() if body is None else body
    era = (
        {"MCP_Protocol_Version": MODERN, "Mcp_Method": message["method"]}
        if modern
        else {"Mcp_Session_Id": attacker.session_id}
    )
    if modern and "name" in message.get("params", {}):
        era["Mcp_Name"] = message["params"]["name"]
    start = head(
        target,
        "POST",
        "/mcp",
        attacker.address(),
        attacker.token,
        len(body),
        Content_Type="application/json",
        Accept="application/json, text/event-stream",
        **era,
    )
    return sent(target, start + body, wait)


def request(method, params=None, **more):
    return {"jsonrpc": "2.0", "id": 1, "method": method, "params": params or {}, **more}


def tool(name, **arguments):
    return request("tools/call", {"name": name, "arguments": arguments})


def meta(capabilities):
    return {"_meta": {META + "protocolVersion": MODERN, META + "clientCapabilities": capabilities}}


# -- attacks


def untaken_answers(target, attacker):
    """Large answers whose client hangs up, before or after it had an event id."""
    size = attacker.random.choice([100_000, 1 << 20, 3 << 20])
    sock = call(target, attacker, tool("get_echo", text="x", size=size), wait=False)
    time.sleep(attacker.random.choice([0, 0.05]))
    sock.close()


def slow_readers(target, attacker):
    """Large answers that are read a byte at a time."""
    sock = call(target, attacker, tool("get_echo", text="x", size=2 << 20), wait=False)
    sock.recv(1)
    attacker.hold(sock, 30)


def refused_listens(target, attacker):
    """Listeners that are refused, each with other capabilities that are as large as may be."""
    capabilities = {"elicitation": {"n": attacker.random.random(), "x": [{}] * 15000}}
    call(target, attacker, request("subscriptions/listen", meta(capabilities)), modern=True)


def listens(target, attacker):
    """Listeners to everything, each in another pool."""
    wanted = {"toolsListChanged": True, "resourceSubscriptions": ["test://note"]}
    params = {"notifications": wanted, **meta({"elicitation": {"n": attacker.random.random()}})}
    attacker.hold(call(target, attacker, request("subscriptions/listen", params), modern=True, wait=False))


def streams(target, attacker):
    """GET streams that nobody reads."""
    data = head(
        target,
        "GET",
        "/mcp",
        attacker.address(),
        attacker.token,
        Accept="text/event-stream",
        Mcp_Session_Id=attacker.session_id,
    )
    attacker.hold(sent(target, data, wait=False))


def slow_bodies(target, attacker):
    """Bodies that never end, of a login and of nobody."""
    who = attacker.random.choice(["/mcp", "/oauth/token", "/oauth/register"])
    token = attacker.token if who == "/mcp" else None
    size = 4 * MIB if token else 60_000
    data = head(target, "POST", who, attacker.address(), token, size, Content_Type="application/json")
    attacker.hold(sent(target, data + b"x" * (size // 2), wait=False))


def json_bombs(target, attacker):
    """Bodies whose parsing costs many times their size, or never should."""
    body = attacker.random.choice(
        [
            b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"a":[' + b"{}," * 600_000 + b"{}]}}",
            b"[" * 200_000,
            b'{"a":' * 65 + b'"' + b'\\"' * 20_000,
            b'{"jsonrpc":"2.0","id":1,"method":"ping","params":{"a":' + b"9" * 100_000 + b"}}",
        ]
    )
    call(target, attacker, request("tools/call"), body=body)


def registrations(target, attacker):
    """Clients that nobody ever uses."""
    body = json.dumps(
        {
            "client_name": "x" * 100,
            "redirect_uris": [f"https://x.example/{attacker.random.random()}/{n}" for n in range(10)],
        }
    ).encode()
    sent(
        target,
        head(
            target,
            "POST",
            "/oauth/register",
            attacker.address(),
            None,
            len(body),
            Content_Type="application/json",
        )
        + body,
    )


def floods(target, attacker):
    """Children that send questions, notifications, junk, stray answers or stderr without end."""
    kind = attacker.random.choice(["questions", "notifications", "junk", "answers", "stderr"])
    size = attacker.random.choice([10, 60_000])
    call(target, attacker, tool("flood", kind=kind, bytes=size, ms=2000), wait=False).close()
    time.sleep(1)


def subscriptions(target, attacker):
    """Subscriptions without end to what has a long name."""
    uri = f"test://echo/{attacker.random.random()}" + "u" * attacker.random.choice([10, 2000, 100_000])
    call(target, attacker, request("resources/subscribe", {"uri": uri}))


def sessions(target, attacker):
    """A session for each request."""
    params = {
        "protocolVersion": LEGACY,
        "capabilities": {},
        "clientInfo": {"name": "x" * 1000, "version": "1"},
    }
    body = json.dumps(request("initialize", params)).encode()
    start = head(
        target,
        "POST",
        "/mcp",
        attacker.address(),
        attacker.token,
        len(body),
        Content_Type="application/json",
        Accept="application/json, text/event-stream",
    )
    sent(target, start + body)


def heads(target, attacker):
    """Heads that are long, wrong or never end; addresses and tokens that are none."""
    kind = attacker.random.randrange(3)
    if kind == 0:
        sent(target, head(target, "GET", "/" + "x" * 7000, attacker.address(), X=" " * 20_000 + "x"))
    elif kind == 1:
        attacker.hold(
            sent(target, b"GET / HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: 198.51.100.7\r\n", wait=False)
        )
    else:
        sent(
            target,
            head(target, "POST", "/mcp", attacker.address(), "fja_" + "x" * 43, 1 << 20) + b"x" * (1 << 20),
        )


# (attack, seconds between two of one attacker)
ATTACKS = (
    (untaken_answers, 0.1),
    (slow_readers, 0.3),
    (refused_listens, 0.2),
    (listens, 0.3),
    (streams, 0.2),
    (slow_bodies, 0.1),
    (json_bombs, 0.5),
    (registrations, 0.1),
    (floods, 2.0),
    (subscriptions, 0.2),
    (sessions, 0.5),
    (heads, 0.1),
)


# -- the processes beside the broker: each attacker, and a watcher


def attack(target, attacker, attacks, seconds):
    """Attack for so long, each in a thread of its own; how often, by the attack's name."""
    over, counts = threading.Event(), dict.fromkeys(attacks, 0)

    def repeat(function, pause):
        while not over.wait(pause * attacker.random.uniform(0.5, 1.5)):
            with contextlib.suppress(*FAILURES):
                function(target, attacker)
            counts[function.__name__] += 1

    threads = [threading.Thread(target=repeat, args=each) for each in ATTACKS if each[0].__name__ in attacks]
    for thread in threads:
        thread.start()
    time.sleep(seconds)
    over.set()
    for thread in threads:
        thread.join(60)
    return counts


def watch(target, seconds):
    """Ask for /healthz again and again; how long each answer took, None for one that was not 200."""
    times, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        started = time.monotonic()
        try:
            answer = sent(target, head(target, "GET", "/healthz", "192.0.2.1", Connection="close"))
        except OSError:
            answer = b""
        times.append(time.monotonic() - started if answer.startswith(b"HTTP/1.1 200 ") else None)
        time.sleep(0.25)
    return times


def beside(what):
    """What a process is told on its standard input, it does."""
    target = Target(what["host"], what["port"])
    if "token" not in what:
        return watch(target, what["seconds"])
    attacker = Attacker(what["token"], what["session_id"], random.Random(what["seed"]))
    return attack(target, attacker, what["attacks"], what["seconds"])


class Process:
    """This file as a process of its own; result() waits for what it has to say."""

    def __init__(self, **what):
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._process.stdin.write(json.dumps(what))
        self._process.stdin.close()

    def result(self):
        with self._process:
            return json.load(self._process.stdout)


# -- the siege


def resident(pid):
    """Resident bytes of a process, 0 when it is gone."""
    with contextlib.suppress(OSError, StopIteration):
        with open(f"/proc/{pid}/status", encoding="ascii") as status:
            return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmRSS"))
    return 0


def tasks(pid):
    """The threads of a process."""
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return 0


class Siege:
    """The broker with its usual settings, an honest person, and those who attack."""

    def __init__(self, folder, *, seed=1, attacks=ATTACKS, patience=900, **settings):
        self.seed, self.patience = seed, patience
        self.attacks = [function.__name__ for function, _ in attacks]
        self.forgejo = FakeForgejo(access_lifetime=86400).start()
        before = os.environ.get("MALLOC_ARENA_MAX")
        os.environ["MALLOC_ARENA_MAX"] = "2"  # as the unit has it
        self.installation = Installation(folder, self.forgejo, CHILD, **settings)
        try:
            self.broker = self.installation.start()
        finally:
            if before is None:
                del os.environ["MALLOC_ARENA_MAX"]
        self.pid = self.broker.pid
        self.honest = self._session("alice")
        self.hostile = []
        for number in range(ATTACKERS):
            self.forgejo.add_user(f"mallory{number}")
            self.hostile.append(self._session(f"mallory{number}"))
        self.calls, self.failures, self.peaks = 0, [], (0, 0)
        self._over = threading.Event()

    def _session(self, user):
        """(url, token, session id) of a user who logged in and made a call."""
        oauth = OAuthClient(self.installation.url, name=f"application of {user}")
        oauth.login(None, user, "secret")
        with contextlib.closing(McpClient(oauth.mcp_url, oauth.tokens["access_token"])) as mcp:
            mcp.initialize()
            mcp.call_tool("get_my_user_info")
            return mcp.url, mcp.token, mcp.session_id

    def close(self):
        self.installation.close()
        self.forgejo.stop()

    def at_rest(self, limit):
        """The broker's resident bytes once they are at most `limit` and its children sleep.

        Or when it has had its time for that.
        """
        deadline = time.monotonic() + self.patience
        while (self.broker.children() or resident(self.pid) > limit) and time.monotonic() < deadline:
            time.sleep(0.25)
        return resident(self.pid)

    def _work(self):
        """The honest person: a call again and again, each of which must be answered."""
        url, token, session_id = self.honest
        while not self._over.is_set():
            with contextlib.closing(McpClient(url, token, session_id=session_id)) as mcp:
                try:
                    text = mcp.call_tool("get_my_user_info")["content"][0]["text"]
                    assert '"login": "alice"' in text, text
                except Exception as error:
                    self.failures.append(f"{type(error).__name__}: {error}"[:300])
            self.calls += 1
            self._over.wait(0.1)

    def _count(self):
        while not self._over.wait(0.25):
            pids = [self.pid, *self.broker.children()]
            self.peaks = tuple(map(max, self.peaks, (sum(map(resident, pids)), sum(map(tasks, pids)))))

    def run(self, seconds):
        """Attack for so long; gives what was seen."""
        rest = resident(self.pid)
        host = self.installation.url[7:]
        what = {"host": host, "port": int(host.rpartition(":")[2]), "seconds": seconds}
        threads = [threading.Thread(target=self._work), threading.Thread(target=self._count)]
        for thread in threads:
            thread.start()
        watcher = Process(**what)
        attackers = [
            Process(**what, token=token, session_id=name, seed=self.seed + n, attacks=self.attacks)
            for n, (_, token, name) in enumerate(self.hostile)
        ]
        time.sleep(seconds)
        busy = resident(self.pid)
        counts = [process.result() for process in attackers]
        times = watcher.result()
        self._over.set()
        for thread in threads:
            thread.join(60)
        answered = sorted(each for each in times if each is not None) or [float("inf")]
        self.failures += ["/healthz did not answer"] * times.count(None)
        return {
            "rest": rest,
            "at the end": busy,
            "after": self.at_rest(rest + SLACK),
            "memory": self.peaks[0],
            "tasks": self.peaks[1],
            "calls": self.calls,
            "failed": len(self.failures),
            "healthz p50": statistics.median(answered),
            "healthz max": answered[-1],
            **{name: sum(each[name] for each in counts) for name in self.attacks},
        }

    def judge(self, seen, seconds_allowed):
        """Raise Broken for what must not be."""
        if self.failures:
            raise Broken(f"{len(self.failures)} of {self.calls} calls failed: {self.failures[:5]}")
        if seen["memory"] > MEMORY_MAX or seen["tasks"] > TASKS_MAX:
            raise Broken(f"{seen['memory'] / MIB:.0f} MiB, {seen['tasks']} tasks")
        if seen["healthz max"] > seconds_allowed:
            raise Broken(f"/healthz took {seen['healthz max']:.2f} s")
        if seen["after"] > seen["rest"] + SLACK:
            raise Broken(f"{seen['after'] / MIB:.0f} MiB at rest, {seen['rest'] / MIB:.0f} before")
        if not all(seen[name] for name in self.attacks):
            raise Broken(f"attacks that never ran: {[name for name in self.attacks if not seen[name]]}")


def run(folder, seconds, *, say=print, seconds_allowed=1.0, **arguments):
    """A whole siege; what was seen. Broken if something must not be."""
    siege = Siege(folder, **arguments)
    try:
        seen = siege.run(seconds)
        for name, value in seen.items():
            in_bytes = name in ("rest", "at the end", "after", "memory")
            say(f"{value / MIB:10.1f} MiB  {name}" if in_bytes else f"{value:10.6g}  {name}")
        siege.judge(seen, seconds_allowed)
        return seen
    finally:
        siege.close()


if __name__ == "__main__":
    json.dump(beside(json.load(sys.stdin)), sys.stdout)
