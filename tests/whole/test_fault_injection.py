"""Each start of a thread, each delivery and each call of the store fails once.

What was taken out is put back or finished, and nobody waits for ever.
"""

import contextlib
import inspect
import os
import sys
import threading
import time

import pytest

import fjmcp_broker
from rigs import mcp_client, modern_requests
from rigs.mcp_client import ClientError, McpClient
from rigs.rig import Rig, text_of

WAIT = 40
DELIVERIES = (
    (fjmcp_broker.EventStream, "put"),
    (fjmcp_broker.Child, "send"),
    (fjmcp_broker.LegacyCall, "answer"),
    (fjmcp_broker.ModernCall, "answer"),
    (fjmcp_broker.SessionFrontend, "on_notification"),
    (fjmcp_broker.SessionFrontend, "on_questions"),
    (fjmcp_broker.StatelessFrontend, "on_notification"),
    (fjmcp_broker.StatelessFrontend, "on_questions"),
)
NOT_CALLS = ("healthy", "close", "backup")
OUR_THREADS = ("stdout-", "stderr-", "connection", "start", "refresh", "give-up", "examine")


def unavailable():
    return fjmcp_broker.StoreUnavailable("injected")


class Faults:
    """Counts the calls of some functions while it is armed, and lets the one of a number raise."""

    def __init__(self, monkeypatch):
        self._patch = monkeypatch
        self._lock = threading.Lock()
        self.count, self.failing, self.armed, self.where = 0, None, False, ""

    def _fails(self, where):
        with self._lock:
            if not self.armed:
                return False
            self.count += 1
            if self.count != self.failing:
                return False
            self.where = where
            return True

    def wrap(self, owner, name, error):
        """Let the calls of `owner.name` that stand in the broker's own code count."""
        real = getattr(owner, name)

        def wrapped(*arguments, **named):
            frame = sys._getframe(1)
            is_brokers = frame.f_code.co_filename == fjmcp_broker.__file__
            if is_brokers and self._fails(f"{name} at line {frame.f_lineno}"):
                raise error()
            return real(*arguments, **named)

        self._patch.setattr(owner, name, wrapped)

    @contextlib.contextmanager
    def at(self, number):
        """Within, the call of this number fails (None: they are only counted)."""
        with self._lock:
            self.count, self.failing, self.where, self.armed = 0, number, "", True
        try:
            yield
        finally:
            with self._lock:
                self.armed = False


@pytest.fixture
def faults(monkeypatch):
    """Faults of no function yet; whoever has to wait for something takes a second or three here."""
    monkeypatch.setattr(fjmcp_broker, "PLACE_WAIT", 3)
    monkeypatch.setattr(fjmcp_broker, "QUESTION_GRACE", 1)
    monkeypatch.setattr(mcp_client, "judge", None)
    return Faults(monkeypatch)


class Scene:
    """A broker with a session of alice and requests of bob without one.

    What they do, and what must hold after it.
    """

    def __init__(self, folder):
        self.rig = Rig(
            folder,
            request_timeout="3s",
            input_timeout="3s",
            start_timeout="5s",
            access_token_lifetime="300d",
            session_idle_timeout="300d",
        )
        self.alice = self.rig.session("alice", capabilities=modern_requests.ALL_INPUT)
        self.bob = modern_requests.connect(self.rig, "bob", capabilities=modern_requests.ALL_INPUT)
        self.late = []

    def step(self, function, *arguments, **named):
        """Do something that may fail, but must not wait for ever."""
        try:
            return function(*arguments, **named)
        except TimeoutError as error:
            self.late.append(f"{getattr(function, '__name__', function)}: {error}")
        except (ClientError, OSError, KeyError):
            pass
        return None

    def play(self):
        """Calls, questions, news, a crash, an idle stop, refreshes, a session that is opened and ended.

        Tokens are refreshed here and at Forgejo.
        """
        self.step(self.alice.call_tool, "get_log")
        self.step(self.alice.call_tool, "ask_elicit")
        self.step(modern_requests.call, self.bob, "get_log")
        self.step(modern_requests.call, self.bob, "ask_elicit")
        self.step(self.listen)
        self.crash_and_sleep()
        self.step(self.alice.oauth.refresh)
        self.rig.clock.advance(3400)
        self.rig.tick()
        self.step(self.alice.call_tool, "get_log")
        self.step(modern_requests.call, self.bob, "get_log")
        self.step(self.open_and_end)
        self.step(self.alice.notify, "notifications/cancelled", {"requestId": "nobody's"})
        self.rig.tick()

    def listen(self):
        wanted = {"toolsListChanged": True, "resourceSubscriptions": ["test://note"]}
        with self.bob.start_request("subscriptions/listen", {"notifications": wanted})[1] as stream:
            if stream.response is None:  # else it was refused
                stream.next()

    def crash_and_sleep(self):
        pid = self.step(lambda: int(text_of(self.alice.call_tool("get_pid"))))
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        for session in self.rig.broker.sessions.all():
            session.backends.sleep("idle")

    def open_and_end(self):
        with contextlib.closing(McpClient(self.alice.url, self.alice.token)) as other:
            other.initialize()
            other.call_tool("get_pid")
            other.delete()

    def holds(self):
        """Asserts that both work, and that nothing is marked or taken by who is gone."""
        assert not self.late
        self.alice.token = self.alice.oauth.tokens["access_token"]
        assert text_of(self.alice.call_tool("get_echo", text="again")) == "again"
        assert text_of(modern_requests.call(self.bob, "get_echo", {"text": "again"})) == "again"
        assert soon(lambda: not self.left_over()), self.left_over()

    def left_over(self):
        """What is still marked, taken or waiting."""
        broker, reaper = self.rig.broker, self.rig.broker.reaper
        found = []
        for session in broker.sessions.all():
            pending = [each.pending for each in session.backends.all() if each.pending]
            found += [f"{session.sub}: {pending}"] if pending else []
            found += [f"{session.sub} starts"] if session.backends.starting else []
            users = getattr(session.frontend, "users", 0)
            found += [f"{session.sub}: {users} leases"] if users else []
            found += [f"{session.sub}: questions are open"] if session.questions.open else []
        awake = sum(not child.ended.is_set() for child in broker.launcher._children)
        places = broker.capacity.count()
        found += [f"{places} places of {awake} children"] if places != awake else []
        waiting = broker.capacity._waiting
        found += [f"{waiting} wait for a place"] if waiting else []
        return found + ([f"refreshing {reaper._refreshing}"] if reaper._refreshing else [])

    def at_rest(self):
        """The descriptors once nobody is connected, every child sleeps and no thread is left."""
        self.alice.close()
        self.bob.close()
        broker, server = self.rig.broker, self.rig.broker.server
        for session in broker.sessions.all():
            session.backends.sleep("idle", though_listening=True)
        assert soon(lambda: not broker.capacity.count() and not server.open_connections)
        assert soon(lambda: not threads()), threads()
        return len(os.listdir("/proc/self/fd"))


def threads():
    """The names of the threads that requests, children and the reaper have started."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(OUR_THREADS)]


def soon(predicate):
    """Whether something becomes true within WAIT seconds."""
    end = time.monotonic() + WAIT
    while not predicate():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture
def scene(tmp_path):
    made = Scene(tmp_path)
    yield made
    made.alice.close()
    made.bob.close()
    made.rig.close()


def prepare(faults, kind):
    """Let the calls of this kind count."""
    if kind == "threads":
        faults.wrap(threading.Thread, "start", lambda: RuntimeError("can't start new thread"))
    elif kind == "deliveries":
        for owner, name in DELIVERIES:
            faults.wrap(owner, name, lambda: RuntimeError("injected"))
    else:
        for name, _function in inspect.getmembers(fjmcp_broker.Store, inspect.isfunction):
            if not name.startswith("_") and name not in NOT_CALLS:
                faults.wrap(fjmcp_broker.Store, name, unavailable)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["threads", "deliveries", "store"])
def test_whatever_fails_once_costs_its_own_request_and_leaves_nothing(scene, faults, kind, scale):
    prepare(faults, kind)
    with faults.at(None):
        scene.play()
    scene.holds()
    points = faults.count
    assert points > 15
    before = scene.at_rest()
    step = max(1, points // scale(6, points))
    for number in range(1 + step // 2, points + 1, step):
        with faults.at(number):
            scene.play()
        try:
            scene.holds()
        except Exception as error:
            raise AssertionError(f"after number {number} of {points}, {faults.where}: {error!r}") from error
    assert soon(lambda: scene.at_rest() <= before)
