"""Many people use the real broker while everything around it breaks.

Afterwards nothing may be lost, mixed up or left over.

    python3 tests/tools/chaos.py --minutes 10          as long as one likes
    python3 tests/tools/chaos.py --seed 7 --steps 20   the same again
    python3 tests/tools/chaos.py --brokers 3           several brokers of one PostgreSQL: see fleet_chaos.py
    python3 tests/tools/chaos.py --hostile             people
    attack it instead, for ten minutes: see hostile.py

Each step disturbs something (a child, the broker, Forgejo, the disk) while every session is being used, then
puts things right and checks what must hold:

- every session that nobody ended is still there and answers its own user, each request once;
- a call that failed failed in a way that the contract names for
  this disturbance, and what was written was written at most once
  (exactly once, if the call was answered): the broker repeats nothing;
- never more children than allowed; no process, file descriptor
  or thread is left over; `PRAGMA integrity_check` is ok.

The order of what is done comes from the seed; when things
meet does not, so a seed is a beginning and not a recording.
"""

import argparse
import collections
import contextlib
import http.client
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rigs.broker_process import BROKER, Installation, NotReady, command_of  # noqa: E402
from rigs.browser import BrowserError  # noqa: E402
from rigs.fake_forgejo import FakeForgejo, html, lose_response, status  # noqa: E402
from rigs.mcp_client import ClientError, McpClient, OAuthClient, StreamEnded  # noqa: E402
from tools import hostile  # noqa: E402

CHILD = (sys.executable, "-I", str(Path(__file__).resolve().parent.parent / "rigs" / "stdio_child.py"))
USERS = ("alice", "bob", "carol", "dave")
UPSTREAM_LIFETIME = 16  # seconds: credentials rotate all the time
MAX_CHILDREN, MAX_CHILDREN_OF_USER = 6, 3
SETTLE_LIMIT = 40
CUT = (OSError, http.client.HTTPException, StreamEnded)
REFUSED = (ClientError, BrowserError, *CUT)

# What may become of a call, by what is being disturbed: "cut" is a lost connection, a word is the reason in a
# JSON-RPC error, "tool" an error of the tool's own, 401 a login that Forgejo ended.
EXPLAINED = {
    "": set(),
    "child": {"child_died", "starting_failed", "busy"},
    "paused": {"child_died", "starting_failed", "busy", "tool"},
    "broker": {
        "cut",
        "child_died",
        "session_ended",
        "starting_failed",
        "busy",
        "upstream_down",
        "tool",
        401,
        503,
    },
    "Forgejo": {"upstream_down", "starting_failed", "busy", "child_died", "tool", 401, 503},
    "disk": {"busy", "starting_failed", "upstream_down", "tool", 401, 503},
}
AFTER = {
    "busy",
    "starting_failed",
    "upstream_down",
    "child_died",
    "session_ended",
    "tool",
    "cut",
    401,
    503,
}  # for a moment only

# The broker, ended like `kill -9` at a chosen commit: just before it, or after it and before the next.
CRASHING = """
import os, signal, sys
sys.path.insert(0, {folder!r})
import fjmcp_broker as broker

left, after = {count}, {after}
opened = broker.Store.__init__

def traced(statement):
    global left
    if left == 0 and after:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= statement == "COMMIT"
    if left == 0 and not after:
        os.kill(os.getpid(), signal.SIGKILL)

def opening(self, *arguments, **named):
    opened(self, *arguments, **named)
    self.engine._writer.set_trace_callback(traced)

broker.Store.__init__ = opening
sys.exit(broker.main())
"""


class Violation(Exception):
    """Something happened that must not."""


@dataclass(eq=False)
class Seat:
    """One session of one person's application."""

    user: str
    oauth: OAuthClient
    session_id: str

    def client(self):
        return McpClient(self.oauth.mcp_url, self.oauth.tokens["access_token"], session_id=self.session_id)


class World:
    """The broker, its surroundings and the people in front of it."""

    explained = EXPLAINED
    settings = {
        "session_idle_timeout": "2s",
        "stop_timeout": "1s",
        "request_timeout": "20s",
        "max_sessions": str(MAX_CHILDREN),
        "max_sessions_per_user": str(MAX_CHILDREN_OF_USER),
    }

    def __init__(self, folder, seed, *, seats=2, tmpfs=True):
        self.folder, self.random, self.counts = Path(folder), random.Random(seed), collections.Counter()
        self._habits, self._number, self._lock = random.Random(f"habits {seed}"), 0, threading.Lock()
        self.answered, self.unanswered, self.seats, self._doubt_until = [], [], [], 0.0
        self.forgejo = FakeForgejo(access_lifetime=UPSTREAM_LIFETIME).start()
        for user in USERS[2:]:
            self.forgejo.add_user(user)
        self.disk = self._small_disk() if tmpfs else None
        self.store = (self.disk or self.folder) / "broker.db"
        self.installation = Installation(
            self.folder,
            self.forgejo,
            CHILD,
            **self.settings,
        )
        self.installation.write(**{**self.installation.settings, "store_path": str(self.store)})
        self.broker = self.installation.start()
        self.sit_all_down(seats)

    def _small_disk(self):
        """A tmpfs that can be filled, where this machine lets us mount one."""
        place = self.folder / "disk"
        place.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=8m,mode=700", "none", place], capture_output=True
        )
        return place if done.returncode == 0 else None

    def __enter__(self):
        return self

    def __exit__(self, *_exc):
        self.close()

    def close(self):
        self.installation.close()
        self.forgejo.stop()
        if self.disk:
            subprocess.run(["umount", self.disk], check=True)

    # -- people

    def sit_all_down(self, seats):
        """Everybody opens a session in each of so many applications, and another in the last of them."""
        for user in USERS:
            for _ in range(seats):
                self.sit_down(user)
            self.sit_down(user, self.seats[-1].oauth)

    def sit_down(self, user, oauth=None):
        """A person opens a session, with a new application unless one is given."""
        if oauth is None:
            oauth = OAuthClient(self.installation.url, name=f"chaos of {user}")
            oauth.login(None, user, "secret")
        with contextlib.closing(McpClient(oauth.mcp_url, oauth.tokens["access_token"])) as mcp:
            mcp.initialize()
            self.seats.append(Seat(user, oauth, mcp.session_id))
        self.counts["sessions opened"] += 1

    def use(self, seat, allowed):
        """One call, a read or a write: what became of it, None when it was answered.

        Violation for what nothing explains.
        """
        with self._lock:
            self._number += 1
            title, writes = f"issue {self._number} of {seat.user}", self._habits.random() < 0.5
            if writes:
                self.unanswered.append(title)
        params = (
            {
                "name": "create_issue",
                "arguments": {"owner": seat.user, "repo": f"{seat.user}-private", "title": title},
            }
            if writes
            else {"name": "get_my_user_info", "arguments": {}}
        )
        with contextlib.closing(seat.client()) as mcp:
            try:
                answer = mcp.post({"jsonrpc": "2.0", "id": title, "method": "tools/call", "params": params})
                outcome = self._judged(seat, answer, title, writes)
            except CUT as error:
                outcome, answer = "cut", error
        if outcome is None and writes:
            self.answered.append(title)
        if outcome is not None and outcome not in allowed and not (outcome == 401 and self.in_doubt):
            raise Violation(f"{seat.user}: {outcome}: {getattr(answer, 'text', answer)!r}")
        with self._lock:
            self.counts[f"calls: {outcome or 'answered'}"] += 1
        return outcome

    def _judged(self, seat, answer, title, writes):
        """None for the right answer, else the word or status that says what became of the call."""
        messages = [message for message in answer.messages() if "method" not in message]
        if len(messages) > 1 or messages and messages[0].get("id") not in (title, None):
            raise Violation(f"{seat.user} was answered {answer.text[:500]}")
        if not messages or answer.status == 401:
            return answer.status if answer.status != 200 else "cut"
        if "error" in messages[0]:
            if isinstance(messages[0]["error"], str):  # of the broker's HTTP, not of the bridge
                return answer.status
            return (messages[0]["error"].get("data") or {}).get("reason") or (
                "tool" if messages[0]["error"]["code"] == -32603 else answer.status
            )
        text = messages[0]["result"]["content"][0]["text"]
        expected = title if writes else f'"login": "{seat.user}"'
        if expected not in text or [
            user for user in USERS if user != seat.user and f'"login": "{user}"' in text
        ]:
            raise Violation(f"{seat.user} was answered {text[:300]}")
        return None

    @property
    def in_doubt(self):
        """Whether a refresh at Forgejo may have been lost a while ago.

        It is noticed when the credential has had its time, by one 401.
        """
        return time.monotonic() < self._doubt_until

    def storm(self, kind, disturb):
        """Use every session at once, again and again, while `disturb` runs."""
        over = threading.Event()

        def keep_using(seat):
            while not over.is_set():
                self.use(seat, self.explained[kind])

        with ThreadPoolExecutor(len(self.seats)) as pool:
            running = [pool.submit(keep_using, seat) for seat in self.seats]
            try:
                disturb()
            finally:
                over.set()
            for future in running:
                future.result()

    # -- disturbances

    def pause(self, least, most):
        time.sleep(self.random.uniform(least, most))

    def kill_children(self):
        """Children die in the middle of what they do."""
        for _ in range(self.random.randint(1, 4)):
            self.pause(0.05, 0.3)
            self._signal_a_child(signal.SIGKILL, "children killed")

    def suspend_child(self):
        """A child stands still for a while."""
        pid = self._signal_a_child(signal.SIGSTOP, "children suspended")
        self.pause(0.2, 1)
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def _signal_a_child(self, number, what):
        pids = sorted(self.broker.children())
        if not pids:
            return None
        pid = self.random.choice(pids)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            self.counts[what] += 1
        return pid

    def suspend_broker(self):
        """The broker stands still for a while."""
        self.pause(0, 0.2)
        self.broker.process.send_signal(signal.SIGSTOP)
        self.pause(0.2, 1)
        self.broker.process.send_signal(signal.SIGCONT)
        self.counts["broker suspended"] += 1

    def kill_broker(self):
        """`kill -9`, then a new one."""
        self.pause(0.1, 0.6)
        before = self.broker.children()
        self.broker.kill()
        self.start()
        self.await_true(
            lambda: not [pid for pid in before if command_of(pid)], "children outlived the broker", limit=5
        )
        self.counts["broker killed"] += 1

    def restart_broker(self):
        """An orderly restart."""
        self.pause(0.1, 0.4)
        self.stop()
        self.start()
        self.counts["broker restarted"] += 1

    def crash_at_a_commit(self):
        """The broker dies just before or after one of its commits."""
        self.stop()
        program = self.folder / "crashing.py"
        program.write_text(
            CRASHING.format(
                folder=str(BROKER.parent), count=self.random.randint(1, 14), after=self.random.random() < 0.5
            )
        )
        self.installation.program = program
        try:
            self.installation.start()
            self._make_commits()
            self.installation.broker.process.wait(2)
            self.counts["broker ended at a commit"] += 1
        except NotReady:
            self.counts["broker ended at a commit"] += 1
        except subprocess.TimeoutExpired:
            self.counts["commits never reached"] += 1
        finally:
            self.installation.broker.kill()
            self.installation.program = None
            self.start()

    def _make_commits(self):
        """Everything that writes: a login with all its steps, a session, a refresh.

        It may go wrong, no more.
        """
        with contextlib.suppress(*REFUSED):
            oauth = OAuthClient(self.installation.url, name="chaos at a commit")
            oauth.login(None, self.random.choice(USERS), "secret")
            with contextlib.closing(McpClient(oauth.mcp_url, oauth.tokens["access_token"])) as mcp:
                mcp.initialize()
            oauth.refresh()

    def start(self):
        self.broker = self.installation.start()

    def stop(self):
        if (ended := self.broker.stop()) != 0:
            raise Violation(f"the broker ended with {ended} instead of 0")

    def break_forgejo(self):
        """Forgejo is away, answers nonsense, or loses an answer."""
        how = self.random.choice(["away", "errors", "pages", "lost"])
        if how == "away":
            self.forgejo.down()
        elif how == "lost":
            self.forgejo.inject("/login/oauth/access_token", lose_response())
        else:
            self.forgejo.inject(
                "/",
                html() if how == "pages" else status(502, "<html>bad gateway</html>", "text/html"),
                times=None,
            )
        self.pause(0.5, 2)
        self.forgejo.up()
        self.forgejo.clear_faults()
        self.counts[f"Forgejo {how}"] += 1

    def fill_disk(self):
        """There is no room left, then there is again.

        On a small disk, or where there is none by a limit on what the broker may write.
        """
        if self.disk:
            rubbish = self.disk / "rubbish"
            with contextlib.suppress(OSError), open(rubbish, "wb", buffering=0) as file:
                while file.write(bytes(65536)):
                    pass
        else:
            before = resource.prlimit(self.broker.pid, resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
        self._make_commits()
        self.pause(0.2, 1)
        if self.disk:
            rubbish.unlink()
        else:
            resource.prlimit(self.broker.pid, resource.RLIMIT_FSIZE, before)
        self.counts["disk filled"] += 1

    def refresh_everybody(self):
        """All applications refresh their tokens, some of them twice with the same one."""
        for oauth in {seat.oauth.client_id: seat.oauth for seat in self.seats}.values():
            old = oauth.tokens["refresh_token"]
            for answer in [oauth.refresh(refresh_token=old) for _ in range(self.random.randint(1, 2))]:
                if answer.status != 200 and not (self.in_doubt and answer.json()["error"] == "invalid_grant"):
                    raise Violation(f"a refresh was refused: {answer.text}")
            self.counts["tokens refreshed"] += 1

    def newcomer(self):
        """Somebody logs in again: Forgejo ends the refresh token that all of their other sessions live on."""
        self.sit_down(self.random.choice(USERS))

    def leave(self):
        """A session is ended, and stays so."""
        if len(self.seats) <= 2 * len(USERS):
            return
        seat = self.random.choice(self.seats)
        with contextlib.closing(seat.client()) as mcp:
            ended = mcp.delete()
            if ended.status == 401 and self.in_doubt:
                return
            if ended.status != 204:
                raise Violation(f"DELETE was answered {ended.status}")
            self.seats.remove(seat)
            answer = mcp.post({"jsonrpc": "2.0", "id": 1, "method": "ping"})
        if answer.status != 404 or answer.json()["error"]["code"] != -32001:
            raise Violation(f"an ended session was answered {answer.text}")
        self.counts["sessions ended"] += 1

    def rest(self):
        """Nobody does anything until all children sleep; the next calls wake them."""
        self.await_true(lambda: not self.broker.children(), "idle children were not stopped")
        self.counts["all asleep"] += 1

    # -- what must hold

    def await_true(self, condition, complaint, limit=SETTLE_LIMIT):
        deadline = time.monotonic() + limit
        while not condition():
            if time.monotonic() > deadline:
                raise Violation(complaint)
            time.sleep(0.02)

    def settle(self):
        """Every session answers again, each its own user.

        Who was logged out by a lost refresh logs in once.
        """
        for seat in self.seats:
            deadline = time.monotonic() + SETTLE_LIMIT
            while (outcome := self.use(seat, AFTER)) is not None:
                if outcome == 401:
                    seat.oauth.login(None, seat.user, "secret")
                    self.counts["logins to revive"] += 1
                if time.monotonic() > deadline:
                    raise Violation(f"{seat.user}'s session does not answer again: {outcome}")
                time.sleep(0.05)
        self.await_true(lambda: len(self.broker.children()) <= MAX_CHILDREN, "more children than allowed")

    def check_writes(self):
        """What was answered was written once; what was not was written at most once."""
        written = collections.Counter(self.forgejo.issue_titles())
        wrong = [title for title in self.answered if written[title] != 1] + [
            title for title in self.unanswered if written[title] > 1
        ]
        if wrong:
            raise Violation(f"written more or less than once: {[(title, written[title]) for title in wrong]}")

    def check_store(self):
        """The database is whole, and has every session that is in use."""
        with contextlib.closing(sqlite3.connect(f"file:{self.store}?mode=ro", uri=True, timeout=20)) as db:
            if (verdict := db.execute("PRAGMA integrity_check").fetchone()[0]) != "ok":
                raise Violation(verdict)
            if (count := db.execute("SELECT count(*) FROM sessions").fetchone()[0]) < len(self.seats):
                raise Violation(f"{count} sessions on file of {len(self.seats)}")

    def figures(self):
        """(threads, file descriptors) of the broker."""
        return len(os.listdir(f"/proc/{self.broker.pid}/task")), len(
            os.listdir(f"/proc/{self.broker.pid}/fd")
        )

    def last_lines(self):
        """What the log said last."""
        return self.installation.log_path.read_text().splitlines()[-30:]

    def check_leaks(self):
        """At rest, a broker that did much soon has no more than one that just started."""
        self.rest()
        self.stop()
        self.start()
        self.settle()  # whatever is made at the first call
        self.rest()
        fresh = self.figures()
        for _ in range(3):
            self.storm("child", self.kill_children)
        self.settle()
        self.rest()
        self.await_true(
            lambda: all(now <= then for now, then in zip(self.figures(), fresh)),
            f"left over: {self.figures()} after {fresh}",
        )
        self.counts["threads at rest"], self.counts["descriptors at rest"] = self.figures()

    STEPS = (
        (kill_children, "child", 4),
        (suspend_child, "child", 2),
        (suspend_broker, "paused", 1),
        (kill_broker, "broker", 3),
        (restart_broker, "broker", 2),
        (crash_at_a_commit, "broker", 4),
        (break_forgejo, "Forgejo", 3),
        (fill_disk, "disk", 1),
        (refresh_everybody, "", 2),
        (newcomer, None, 2),
        (leave, None, 1),
        (rest, None, 1),
    )

    def step(self, say):
        """Disturb something (with kind None while nobody calls), put it right, check."""
        disturb, kind, _ = self.random.choices(self.STEPS, [weight for *_, weight in self.STEPS])[0]
        say(disturb.__name__.replace("_", " "))
        try:
            if kind is None:
                disturb(self)
            else:
                self.storm(kind, lambda: disturb(self))
        finally:
            if kind in ("broker", "Forgejo", "disk", "paused"):
                self._doubt_until = time.monotonic() + 2 * UPSTREAM_LIFETIME
        self.settle()
        self.check_writes()
        self.check_store()
        self.counts["steps"] += 1


def run(seed, *, steps=None, minutes=None, say=print, tmpfs=True):
    """Steps until there were enough, and what must hold at rest; the counts."""
    with (
        tempfile.TemporaryDirectory(prefix="fjmcp-chaos-") as folder,
        World(folder, seed, tmpfs=tmpfs) as world,
    ):
        return take_steps(world, seed, steps, minutes, say, world.check_leaks)


def take_steps(world, seed, steps, minutes, say, *checks):
    """Steps until there were enough, then these checks; the counts.

    Violation, with what was done before it, if something must not be.
    """
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    done = []

    def tell(text):
        done.append(text)
        say(f"{len(done):4}  {text}")

    try:
        while (steps is None or len(done) < steps) and (deadline is None or time.monotonic() < deadline):
            world.step(tell)
        for check in checks:
            check()
    except Violation as error:
        raise Violation("\n".join([f"seed {seed}, after {done}: {error}", *world.last_lines()])) from error
    return world.counts


def besiege(seed, seconds):
    """Attack for so long, and say what came of it."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (hostile.NOFILE, hostile.NOFILE))
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="fjmcp-siege-") as folder:
        hostile.run(folder, seconds, seed=seed)


def run_fleet(options):
    """The same with several brokers; PostgreSQL is the suite's, or this machine's."""
    sys.path.insert(0, str(BROKER.parent))
    import run as suite
    from tools import fleet_chaos

    cache = os.environ.get("FJMCP_CACHE") or suite.ROOT / ".cache"
    folder, installer = suite.real_parts(cache, suite.probe_python(sys.executable))["postgresql"]
    state, program = suite.install(folder, lambda place: installer(place, suite.Commands()))
    if state != "ok":
        raise SystemExit(f"there is no PostgreSQL: {program}")
    binaries = Path(program).parent
    return fleet_chaos.run(
        options.seed, binaries, count=options.brokers, steps=options.steps, minutes=options.minutes
    )


def main():
    parser = argparse.ArgumentParser(
        description="Break everything around the broker, and see that nothing is lost."
    )
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--minutes", type=float)
    parser.add_argument(
        "--no-tmpfs",
        action="store_true",
        help="fill the disk by RLIMIT_FSIZE also where a tmpfs could be mounted",
    )
    parser.add_argument("--hostile", action="store_true", help="five logins and fifty addresses attack it")
    parser.add_argument(
        "--brokers", type=int, help="so many brokers of one PostgreSQL (see fleet_chaos.py), up to 3"
    )
    options = parser.parse_args()
    if options.hostile:
        return besiege(options.seed, 60 * (options.minutes or 10))
    if options.steps is None and options.minutes is None:
        options.minutes = 1
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print(f"seed {options.seed}", flush=True)
    if options.brokers:
        counts = run_fleet(options)
    else:
        counts = run(options.seed, steps=options.steps, minutes=options.minutes, tmpfs=not options.no_tmpfs)
    for name, count in sorted(counts.items()):
        print(f"{count:8}  {name}")


if __name__ == "__main__":
    main()
