"""Several brokers of one PostgreSQL while brokers and the database die: `chaos.py --brokers 3 --minutes 10`.

Everybody's requests come to any broker that lives, and logins to another at each step, so that nothing rests
on what one of them has in memory. Brokers are killed at random and at their commits, the database is
restarted, killed, and replaced by its synchronous standby. Besides what chaos.py checks: no credential at
Forgejo is spent twice unless the broker died that spent it, and no session is lost.
"""

import collections
import contextlib
import random
import subprocess
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rigs.broker_process import BROKER, NotReady
from rigs.browser import Browser
from rigs.fake_forgejo import FakeForgejo
from rigs.fleet import Fleet
from rigs.mcp_client import McpClient, OAuthClient
from rigs.postgresql_server import Server
from tools import chaos

# The broker, ended like `kill -9` at a chosen commit: just before it, or after it.
CRASHING = """
import os, signal, sys
sys.path.insert(0, {folder!r})
import fjmcp_broker as broker

left, after = {count}, {after}
command = broker.PostgresConnection.command

def counted(self, text, until):
    global left
    left -= text == "COMMIT"
    if left == 0 and not after:
        os.kill(os.getpid(), signal.SIGKILL)
    command(self, text, until)
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

broker.PostgresConnection.command = counted
sys.exit(broker.main())
"""
DATABASE = {"restart_database", "kill_database", "fail_over"}


class Hopping(Browser):
    """A browser each of whose requests comes to another broker."""

    def __init__(self, world):
        def hop(_url):
            self.routes = world.a_member().routes

        super().__init__(routes=world.a_member().routes, hop=hop)


@dataclass(eq=False)
class Seat(chaos.Seat):
    """One session of one person's application, whose requests come to any broker."""

    world: "World"

    def client(self):
        routes = self.world.a_member().routes
        token = self.oauth.tokens["access_token"]
        return McpClient(self.oauth.mcp_url, token, session_id=self.session_id, routes=routes)


class AllBrokers:
    """The brokers' children, as one."""

    def __init__(self, fleet):
        self.fleet = fleet

    def children(self):
        found = []
        for member in self.fleet.members:
            with contextlib.suppress(OSError):
                found += member.process.children() if member.is_running else []
        return found


class World(chaos.World):
    """Brokers, their database, and the people in front of them."""

    explained = {
        **chaos.EXPLAINED,
        # No 401: who cannot be asked about ends nobody's login.
        "database": {"busy", "starting_failed", "upstream_down", "session_ended", "child_died", "tool", 503},
    }

    def __init__(self, folder, seed, binaries, *, count=3, seats=1):
        self.folder, self.random, self.counts = Path(folder), random.Random(seed), collections.Counter()
        self._habits, self._number, self._lock = random.Random(f"habits {seed}"), 0, threading.Lock()
        self._routes = random.Random(f"routes {seed}")
        self.answered, self.unanswered, self.seats, self._doubt_until = [], [], [], 0.0
        self._ends = contextlib.ExitStack()
        self.database = Server(binaries).create()
        self._ends.callback(lambda: self.database.close())
        self.follower = self.database.standby()
        self._ends.callback(self.follower.close)
        self.forgejo = FakeForgejo(access_lifetime=chaos.UPSTREAM_LIFETIME).start()
        self._ends.callback(self.forgejo.stop)
        for user in chaos.USERS[2:]:
            self.forgejo.add_user(user)
        self.fleet = Fleet(
            self.folder,
            self.database,
            self.forgejo,
            count,
            others=[self.follower],
            **self.settings,
        )
        self._ends.callback(self.fleet.close)
        self.fleet.start()
        self.broker = AllBrokers(self.fleet)
        self.sit_all_down(seats)

    def close(self):
        self._ends.close()

    def a_member(self):
        """Any broker that lives."""
        with self._lock:
            return self._routes.choice([each for each in self.fleet.members if each.is_running])

    # -- people

    def sit_down(self, user, oauth=None):
        """A person opens a session, with a new application unless one is given."""
        if oauth is None:
            oauth = OAuthClient(self.fleet.url, name=f"chaos of {user}", routes=self.a_member().routes)
            oauth.login(Hopping(self), user, "secret")
        routes = self.a_member().routes
        token = oauth.tokens["access_token"]
        with contextlib.closing(McpClient(oauth.mcp_url, token, routes=routes)) as mcp:
            mcp.initialize()
            self.seats.append(Seat(user, oauth, mcp.session_id, self))
        self.counts["sessions opened"] += 1

    # -- disturbances

    def kill_broker(self):
        """One broker dies, and comes back after a while; the others go on."""
        self.pause(0.1, 0.6)
        member = self.a_member()
        member.kill()
        self.pause(0, 1)
        member.start()
        self.counts["broker killed"] += 1

    def restart_broker(self):
        """One broker is replaced in order."""
        self.pause(0.1, 0.4)
        member = self.a_member()
        self._stop(member)
        member.start()
        self.counts["broker restarted"] += 1

    def _stop(self, member):
        if (ended := member.stop()) != 0:
            raise chaos.Violation(f"the broker {member.name} ended with {ended} instead of 0")

    def suspend_broker(self):
        """One broker stands still for a while, longer than its lease of a refresh at times."""
        member = self.a_member()
        member.process.process.send_signal(chaos.signal.SIGSTOP)
        self.pause(0.2, 1)
        member.process.process.send_signal(chaos.signal.SIGCONT)
        self.counts["broker suspended"] += 1

    def crash_at_a_commit(self):
        """One broker dies just before or after one of its commits."""
        member = self.a_member()
        self._stop(member)
        program = member.folder / "crashing.py"
        count, after = self.random.randint(1, 14), self.random.random() < 0.5
        program.write_text(CRASHING.format(folder=str(BROKER.parent), count=count, after=after))
        member.program = program
        try:
            member.start()
            self._make_commits()
            member.process.process.wait(4)
            self.counts["broker ended at a commit"] += 1
        except NotReady:
            self.counts["broker ended at a commit"] += 1
        except subprocess.TimeoutExpired:
            self.counts["commits never reached"] += 1
        finally:
            member.process.kill()
            member.program = None
            member.start()

    def _make_commits(self):
        """Everything that writes: a login with all its steps, a session, a refresh. It may go wrong."""
        with contextlib.suppress(*chaos.REFUSED):
            oauth = OAuthClient(self.fleet.url, name="chaos at a commit", routes=self.a_member().routes)
            oauth.login(Hopping(self), self.random.choice(chaos.USERS), "secret")
            token = oauth.tokens["access_token"]
            with contextlib.closing(McpClient(oauth.mcp_url, token, routes=self.a_member().routes)) as mcp:
                mcp.initialize()
            oauth.refresh()

    def restart_database(self):
        """The database is restarted in order, under load."""
        self.pause(0.1, 0.5)
        self.database.restart()
        self.counts["database restarted"] += 1

    def kill_database(self):
        """The database dies, and comes back."""
        self.pause(0.1, 0.5)
        self.database.kill()
        self.pause(0, 1)
        self.database.start()
        self.counts["database killed"] += 1

    def fail_over(self):
        """The database's machine is lost; its synchronous standby takes over. Once in a run."""
        if self.follower is self.database:
            return
        self.pause(0.1, 0.5)
        lost, self.database = self.database, self.follower
        lost.kill()
        self._ends.callback(lost.close)
        self.database.promote()
        self.counts["standby promoted"] += 1

    def refresh_everybody(self):
        """All applications refresh their tokens, with the same one at several brokers at once."""
        for oauth in {seat.oauth.client_id: seat.oauth for seat in self.seats}.values():
            old = oauth.tokens["refresh_token"]
            with ThreadPoolExecutor(3) as pool:
                found = list(pool.map(lambda member: self._refresh(oauth, old, member), self.fleet.members))
            tokens = {tokens["refresh_token"] for tokens in found if tokens}
            if len(tokens) > 1:
                raise chaos.Violation("one refresh token was rotated to several")
            oauth.tokens = next(filter(None, found), oauth.tokens)
            self.counts["tokens refreshed"] += 1

    def _refresh(self, oauth, token, member):
        """The tokens that one broker gives for a refresh token, None while the login has to be revived."""
        client = OAuthClient(self.fleet.url, routes=member.routes)
        client.metadata, client.client_id = oauth.metadata, oauth.client_id
        answer = client.refresh(refresh_token=token)
        if answer.status == 200:
            return answer.json()
        if self.in_doubt and answer.json()["error"] == "invalid_grant":
            return None
        raise chaos.Violation(f"a refresh was refused: {answer.text}")

    def newcomers(self):
        """Somebody logs in at two brokers at once: each ends the refresh token that the other brought."""
        user = self.random.choice(chaos.USERS)
        with ThreadPoolExecutor(2) as pool:
            for future in [pool.submit(self.sit_down, user) for _ in range(2)]:
                future.result()

    # -- what must hold

    def settle(self):
        """Every session answers again, its own user; who was logged out by a lost refresh logs in once."""
        for seat in self.seats:
            deadline = time.monotonic() + chaos.SETTLE_LIMIT
            good = 0
            while good < len(self.fleet.members):
                outcome = self.use(seat, {*chaos.AFTER, "cut"})
                good = good + 1 if outcome is None else 0
                if outcome == 401:
                    seat.oauth.login(Hopping(self), seat.user, "secret")
                    self.counts["logins to revive"] += 1
                if time.monotonic() > deadline:
                    raise chaos.Violation(f"{seat.user}'s session does not answer again: {outcome}")

    def check_store(self):
        """The database has every session that is in use, and one row for each code and token."""
        count = int(self.database.sql(self.fleet.database, "SELECT count(*) FROM sessions"))
        if count < len(self.seats):
            raise chaos.Violation(f"{count} sessions on file of {len(self.seats)}")

    def last_lines(self):
        """What each broker's log said last."""
        return [
            f"{member.name}: {line}"
            for member in self.fleet.members
            for line in member.log_path.read_text().splitlines()[-15:]
        ]

    def spent(self):
        """How often each credential at Forgejo was spent."""
        return collections.Counter(
            request.form["refresh_token"]
            for request in self.forgejo.requests[:]
            if request.form.get("grant_type") == "refresh_token" and "client_secret" in request.form
        )

    STEPS = (
        (chaos.World.kill_children, "child", 2),
        (suspend_broker, "paused", 1),
        (kill_broker, "broker", 4),
        (restart_broker, "broker", 2),
        (crash_at_a_commit, "broker", 4),
        (chaos.World.break_forgejo, "Forgejo", 2),
        (restart_database, "database", 2),
        (kill_database, "database", 2),
        (fail_over, "database", 1),
        (refresh_everybody, "", 2),
        (newcomers, None, 2),
        (chaos.World.leave, None, 1),
        (chaos.World.rest, None, 1),
    )

    def step(self, say):
        """As in chaos.py; where nothing but children died, no credential at Forgejo was spent twice."""
        before = self.spent()
        killed = sum(self.counts[what] for what in self.counts if what.startswith(("broker", "Forgejo")))
        super().step(say)
        after = self.spent()
        twice = [token for token, count in after.items() if count > 1 and count > before[token]]
        died = sum(self.counts[what] for what in self.counts if what.startswith(("broker", "Forgejo")))
        if twice and killed == died and not self.in_doubt:
            raise chaos.Violation(f"{len(twice)} credentials were spent twice")
        self.counts["credentials spent twice, where a broker died over one"] += len(twice)


def run(seed, binaries, *, count=3, steps=None, minutes=None, say=print, only=None):
    """Steps until there were enough; the counts. Violation if something is that must not be."""
    with (
        tempfile.TemporaryDirectory(prefix="fjmcp-chaos-") as folder,
        World(folder, seed, binaries, count=count) as world,
    ):
        if only:
            world.STEPS = [step for step in world.STEPS if step[0].__name__ in only]
        return chaos.take_steps(world, seed, steps, minutes, say)
