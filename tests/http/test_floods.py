"""Floods, slow readers and slow writers against the broker.

An honest client is answered all the while, and nothing of it stays. Completion and counts decide, never a
time. The long forms run with --long.
"""

import contextlib
import gc
import json
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from rigs.mcp_client import OAuthClient
from rigs.raw_http import Answer, Wire, get, mcp_post, post
from rigs.rig import text_of

# An exception that ends a thread of the broker is a traceback
# on stderr: it fails the test during which it came.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
PING = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
CALL = {"jsonrpc": "2.0", "id": 1, "method": "tools/call"}


def resident():
    """Memory of this process in bytes, what is free given back first."""
    gc.collect()
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def settle(rig, left=1):
    """Wait until no more than `left` connections are open: the honest client keeps one."""
    server = rig.broker.server
    with server._changed:
        assert server._changed.wait_for(lambda: len(server._connections) <= left, 40)


def descriptors():
    return len(os.listdir("/proc/self/fd"))


class Honest:
    """A client that goes on calling, in a thread, until told to stop; it must be served every time."""

    def __init__(self, rig):
        self.mcp, self.served, self._stop, self._failure = rig.session(), 0, threading.Event(), None
        self._thread = threading.Thread(target=self._run)

    def _run(self):
        try:
            while not self._stop.is_set():
                assert "alice" in text_of(self.mcp.call_tool("get_my_user_info"))
                self.served += 1
        except BaseException as error:
            self._failure = error

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_exc):
        self._stop.set()
        self._thread.join(60)
        self.mcp.close()
        assert self._failure is None and not self._thread.is_alive() and self.served > 0


@pytest.fixture
def nothing_stays(scale):
    """After the test there are as many threads and file descriptors as before, and not much more memory."""

    @contextlib.contextmanager
    def check(rig, megabytes):
        rig.session().close()  # what is made once is made
        settle(rig, 0)
        threads, files, memory = threading.active_count(), descriptors(), resident()
        yield
        settle(rig, 0)
        assert threading.active_count() <= threads + 8  # the children's threads of the honest client
        assert descriptors() <= files + 16
        assert resident() - memory < megabytes << 20

    return check


def test_N02_H15_connections_in_waves_come_and_go(make_rig, nothing_stays, scale):
    """Of each wave a third says nothing, a third half a request, a third asks.

    Then all are left at once, some by a reset.
    """
    rig = make_rig(trusted_proxies="127.0.0.0/8", header_timeout="30s")
    size, waves = scale(150, 2000), scale(4, 5)
    with nothing_stays(rig, scale(60, 300)), Honest(rig):
        for wave in range(waves):
            wires = [Wire(rig) for _ in range(size)]
            for number, wire in enumerate(wires):
                if number % 3:
                    wire.send(get(rig)[:-2] if number % 3 == 1 else get(rig))
            assert {wire.answer().status for wire in wires[2::3]} == {200}
            for number, wire in enumerate(wires):
                if (number + wave) % 2:
                    wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                wire.sock.close()
            settle(rig)


def test_H15_at_the_limit_connections_are_refused_at_once_and_those_that_are_there_are_served(
    make_rig, scale, monkeypatch
):
    limit = scale(60, 1000)
    rig = make_rig(max_connections=limit, header_timeout="60s")
    wires = [Wire(rig) for _ in range(limit)]
    with rig.broker.server._changed:
        rig.broker.server._changed.wait_for(lambda: rig.broker.server.open_connections == limit, 0)
    assert (
        wires[-1].send(get(rig)).answer().status == 200
    )  # the last of them was accepted, and so all before it
    start, started = threading.Thread.start, []
    monkeypatch.setattr(
        threading.Thread, "start", lambda thread: (started.append(thread.name), start(thread))
    )
    for _ in range(limit):
        with Wire(rig) as refused:
            assert refused.is_closed()
    assert "connection" not in started
    assert rig.broker.server.open_connections == limit
    assert {wire.send(get(rig)).answer().status for wire in wires} == {200}
    for wire in wires:
        wire.sock.close()
    settle(rig, 0)


def test_H14_slow_writers_of_headers_and_bodies_are_cut_and_cost_nothing_but_their_connection(
    make_rig, nothing_stays, scale
):
    rig = make_rig(header_timeout="500ms", body_timeout="500ms")
    token = rig.login().tokens["access_token"]
    parts = [
        b"POST /mc",
        get(rig)[:-2],
        mcp_post(rig, token, PING)[:-3],
        post(rig, "/oauth/token", b"a" * 99, "Content-Type: application/x-www-form-urlencoded")[:-9],
        get(rig, "/mcp", f"Authorization: Bearer {token}", "Transfer-Encoding: chunked", method=b"POST")
        + b"5\r\nab",
    ]
    with nothing_stays(rig, 60), Honest(rig):
        wires = [Wire(rig).send(parts[number % len(parts)]) for number in range(scale(100, 1500))]
        assert {wire.answer().status for wire in wires} == {408}
        assert all(wire.is_closed() for wire in wires)
        for wire in wires:
            wire.sock.close()
        settle(rig)


def test_H14_slow_readers_are_cut_and_hold_no_one(make_rig, nothing_stays, scale):
    """Each asks for more than sockets hold and never reads.

    Plain answers, and a stream of a session of its own.
    """
    rig = make_rig(write_timeout="500ms")
    mcp = rig.session()
    mcp.close()  # its session stays
    call = {**CALL, "params": {"name": "get_echo", "arguments": {"text": "x", "size": 12000000}}}
    with nothing_stays(rig, scale(150, 400)), Honest(rig):
        for _ in range(scale(1, 10)):
            wires = []
            for _ in range(4):
                wire = Wire(rig)
                wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                wires.append(wire.send(mcp_post(rig, mcp.token, call, session=mcp.session_id)))
            settle(rig)
            for wire in wires:
                wire.sock.close()


def test_N02_authorization_requests_leave_nothing_behind(make_rig, nothing_stays, scale):
    """A login that nobody approves lives in its page: neither rows nor memory grow, however many begin."""
    rig = make_rig()
    client = OAuthClient(rig.url)
    client.discover()
    client.register()
    paths = [client.authorize_url().removeprefix(rig.url) for _ in range(16)]
    database = rig.directory / "broker.db"

    def begin(count):
        with Wire(rig) as wire:
            for number in range(count):
                answer = wire.send(get(rig, paths[number % 16])).answer()
                assert answer.status == 200 and b'name="login"' in answer.body
        return count

    size = database.stat().st_size
    with nothing_stays(rig, 60), Honest(rig), ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(begin, [scale(40, 50000 // 8)] * 8)) == scale(320, 50000)
    assert database.stat().st_size - size < 1 << 20


def test_N02_a_flood_from_one_address_meets_its_limit_and_another_address_none(make_rig, scale):
    rig = make_rig(rate_authorize=60)
    client = OAuthClient(rig.url)
    client.discover()
    client.register()
    path = client.authorize_url().removeprefix(rig.url)
    with Honest(rig), Wire(rig) as wire:
        statuses = [
            wire.send(get(rig, path, "X-Forwarded-For: 203.0.113.9")).answer()
            for _ in range(scale(200, 5000))
        ]
        refused = [answer for answer in statuses if answer.status == 429]
        assert sum(answer.status == 200 for answer in statuses) >= 60 and refused
        assert all(
            int(answer.header("retry-after")) >= 1 and answer.header("content-type").startswith("text/html")
            for answer in refused
        )
        assert wire.send(get(rig, path, "X-Forwarded-For: 203.0.113.10")).answer().status == 200


def test_N02_a_flood_from_many_addresses_fills_no_memory(make_rig, nothing_stays, scale):
    rig = make_rig()
    with nothing_stays(rig, 60), Honest(rig), Wire(rig) as wire:
        for number in range(scale(300, 30000)):
            address = f"2001:db8:{number >> 16:x}:{number & 0xFFFF:x}::1"
            assert (
                wire.send(get(rig, "/oauth/authorize?client_id=x", f"X-Forwarded-For: {address}"))
                .answer()
                .status
                == 400
            )


def test_N02_requests_without_a_good_token_start_nothing(make_rig, nothing_stays, scale):
    rig = make_rig()
    body = json.dumps(PING).encode()

    def knock(count):
        with Wire(rig) as wire:
            for number in range(count):
                bad = "fja_" + f"{number:043d}"
                assert (
                    wire.send(post(rig, "/mcp", body, f"Authorization: Bearer {bad}", "Mcp-Session-Id: x"))
                    .answer()
                    .status
                    == 401
                )
                wire.sock.close()
                wire.sock, wire.buffer = (
                    socket.create_connection(("127.0.0.1", rig.broker.server.port), 20),
                    b"",
                )
        return count

    with nothing_stays(rig, 60), Honest(rig), ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(knock, [scale(60, 5000)] * 4)) == scale(240, 20000)


def test_N02_streams_that_are_opened_and_left_stay_bounded(make_rig, nothing_stays, scale):
    """A newer GET takes over from an older one, so one session holds one stream however many are opened."""
    rig = make_rig()
    mcp = rig.session()
    mcp.close()  # its session stays
    request = get(
        rig,
        "/mcp",
        f"Authorization: Bearer {mcp.token}",
        f"Mcp-Session-Id: {mcp.session_id}",
        "Accept: text/event-stream",
    )
    with nothing_stays(rig, 60), Honest(rig):
        wires = []
        for _ in range(scale(60, 1000)):
            wires.append(Wire(rig).send(request))
            assert Answer(wires[-1].until(b"\r\n\r\n"), b"").status == 200
            wires[-1].until(b": open\n\n")
        for wire in wires[:-1]:
            wire.until(b"0\r\n\r\n")  # ended in order when the next one came
        for wire in wires:
            wire.sock.close()
        settle(rig)
