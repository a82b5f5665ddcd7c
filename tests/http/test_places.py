"""What is served at once, for whom.

At a limit a request of who holds most is refused, and everybody else is served.
"""

import contextlib
import json
import select
import socket
import threading
import types
from urllib.parse import urlsplit

import pytest

import fjmcp_broker
from fjmcp_broker import Bodies, Body, HTTPError, Places, Seat, network_of, read_address
from rigs.browser import Browser
from rigs.mcp_client import McpClient, OAuthClient
from rigs.modern_requests import connect, listening
from rigs.raw_http import Answer, Wire, ask, get, mcp_post, post
from rigs.rig import text_of

FORM = "Content-Type: application/x-www-form-urlencoded"
PING = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
ATTACKER = "X-Forwarded-For: 203.0.113.9"
ANOTHER = "X-Forwarded-For: 203.0.113.10"


def unfinished(rig, path, *lines, length=1000, sent=b"a"):
    """A request of whose body something is missing."""
    return get(rig, path, f"Content-Length: {length}", *lines, method=b"POST") + sent


def at_once(rig, data, count):
    """That many connections which have sent this, and wait."""
    return [Wire(rig).send(data) for _ in range(count)]


def close(wires):
    for wire in wires:
        wire.sock.close()


def held(server):
    """Requests, streams and bytes of bodies that are counted for somebody."""
    return server.places.total(), server.bodies.total


def nothing_held(rig):
    """Wait until no connection is open, and see that nothing is counted any more."""
    server = rig.broker.server
    with server._changed:
        assert server._changed.wait_for(lambda: not server._connections, 20)
    assert held(server) == (0, 0) and server._making_room == 0
    assert not server.bodies._by_owner and not server.bodies._weights


def until_held(server, count):
    """Wait until so many places are taken: what was sent has been read."""
    for _ in range(2000):
        if server.places.total() >= count:
            return
        threading.Event().wait(0.01)
    raise AssertionError(server.places._held)


# -- at a limit


def process(make_installation, **settings):
    """(installation, something that Wire connects to): the broker as a process of its own."""
    place = make_installation(**settings)
    place.start()
    server = types.SimpleNamespace(port=urlsplit(place.url).port)
    return place, types.SimpleNamespace(broker=types.SimpleNamespace(server=server))


def answers(wires, count):
    """The first `count` answers of connections that are otherwise left waiting."""
    waiting = {wire.sock: wire for wire in wires}
    found = []
    while len(found) < count:
        answered, _, _ = select.select(waiting, [], [], 20)
        assert answered
        found += [waiting.pop(sock).answer() for sock in answered]
    return found


def go_on(place, rig, oauth):
    """Everybody else is served.

    The health check, another address, another user's calls, and a login in a browser.
    """
    assert ask(rig, get(rig)).status == 200
    assert ask(rig, get(rig, "/", ANOTHER)).status == 200
    with McpClient(place.url + "/mcp", oauth.tokens["access_token"]) as mcp:
        mcp.initialize()
        assert "bob" in text_of(mcp.call_tool("get_my_user_info"))
    assert OAuthClient(place.url).login(Browser(), "bob", "secret")["access_token"]


def test_an_address_at_its_limit_is_refused_and_everybody_else_is_served_and_logs_in(make_installation):
    place, rig = process(make_installation, max_requests_per_address=8)
    bob = OAuthClient(place.url)
    bob.login(None, "bob", "secret")
    for _ in range(2):  # what a limit has refused takes nothing from the next round
        wires = at_once(rig, unfinished(rig, "/oauth/token", FORM, ATTACKER), 40)
        refused = answers(wires, 32)
        assert [answer.status for answer in refused] == [429] * 32
        assert (
            int(refused[0].header("retry-after")) >= 1 and refused[0].json()["error"] == "too_many_requests"
        )
        assert ask(rig, get(rig, "/", ATTACKER)).status == 429
        go_on(place, rig, bob)
        close(wires)


def test_a_login_at_its_limits_is_refused_and_everybody_else_is_served_and_logs_in(make_installation):
    place, rig = process(
        make_installation, max_requests_per_user=8, max_streams_per_user=4, max_connections=40
    )
    alice, bob = OAuthClient(place.url), OAuthClient(place.url)
    token = alice.login(None, "alice", "secret")["access_token"]
    bob.login(None, "bob", "secret")
    listen = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "subscriptions/listen",
        "params": {
            "notifications": {},
            "_meta": {
                "io.modelcontextprotocol/protocolVersion": "2026-07-28",
                "io.modelcontextprotocol/clientCapabilities": {},
            },
        },
    }
    modern = ("MCP-Protocol-Version: 2026-07-28", "Mcp-Method: subscriptions/listen", ATTACKER)
    listeners = []
    for expected in [200] * 4 + [429] * 4:
        listeners += at_once(rig, mcp_post(rig, token, listen, *modern), 1)
        assert Answer(listeners[-1].until(b"\r\n\r\n"), b"").status == expected
    wires = at_once(rig, unfinished(rig, "/mcp", f"Authorization: Bearer {token}", ATTACKER), 28)
    assert [answer.status for answer in answers(wires, 20)] == [429] * 20
    go_on(place, rig, bob)
    close((*wires, *listeners))


def test_a_user_at_the_limit_of_requests_is_refused_unread_and_another_user_of_the_address_is_served(
    make_rig,
):
    rig = make_rig(max_requests_per_user=4, max_requests_per_address=2)
    alice, bob = (rig.login(user).tokens["access_token"] for user in ("alice", "bob"))
    slow = unfinished(rig, "/mcp", f"Authorization: Bearer {alice}", ATTACKER)
    wires = at_once(rig, slow, 4)
    until_held(rig.broker.server, 4)
    with Wire(rig) as fifth:
        answer = fifth.send(slow).answer()
        assert answer.status == 429 and int(answer.header("retry-after")) >= 1
    assert ask(rig, mcp_post(rig, bob, PING, ATTACKER)).status == 200
    close(wires)
    nothing_held(rig)
    assert ask(rig, mcp_post(rig, alice, PING, ATTACKER)).status == 200


def test_streams_of_a_user_have_a_limit_of_their_own(make_rig):
    rig = make_rig(max_streams_per_user=3, max_requests_per_user=3)
    alice = [rig.session() for _ in range(3)]
    modern = connect(rig)

    def stream(mcp):
        wire = Wire(rig)
        wire.send(
            get(
                rig,
                "/mcp",
                f"Authorization: Bearer {mcp.token}",
                f"Mcp-Session-Id: {mcp.session_id}",
                "Accept: text/event-stream",
            )
        )
        return wire, Answer(wire.until(b"\r\n\r\n"), b"").status

    with listening(modern):
        wires, statuses = zip(*map(stream, alice), strict=True)
        assert statuses == (200, 200, 429)
        again, status = stream(alice[0])  # takes over from the first: one stream as before
        assert status == 200
        wires[0].until(b"0\r\n\r\n")
        answer = modern.post(modern._message("subscriptions/listen", {"notifications": {}}, 9))
        assert answer.status == 429
        assert "alice" in text_of(alice[2].call_tool("get_my_user_info"))  # a call is no stream
        with connect(rig, "bob") as bob, listening(bob):
            pass
    close((*wires, again))
    for mcp in (*alice, modern):
        mcp.close()
    nothing_held(rig)


def test_a_known_token_counts_for_its_grant_once_it_is_read(make_rig, monkeypatch):
    rig = make_rig()
    client = rig.login()
    places, seen = rig.broker.server.places, []
    spend = fjmcp_broker.Limiter.spend
    monkeypatch.setattr(
        fjmcp_broker.Limiter, "spend", lambda *given: (seen.append(dict(places._held)), spend(*given))[1]
    )
    refresh_token = client.tokens["refresh_token"]
    body = f"grant_type=refresh_token&client_id={client.client_id}&refresh_token={refresh_token}"
    assert ask(rig, post(rig, "/oauth/token", body.encode(), FORM, ATTACKER)).status == 200
    assert list(seen[-1]) == [("requests", "grant 1")]
    nothing_held(rig)
    guess = b"grant_type=refresh_token&client_id=x&refresh_token=fjr_x"
    assert ask(rig, post(rig, "/oauth/token", guess, FORM, ATTACKER)).status == 401
    assert list(seen[-1]) == [("requests", "address 203.0.113.9")]


def test_a_proxy_that_names_no_client_has_no_limit_of_its_own(make_rig):
    rig = make_rig(max_requests_per_address=2)
    wires = at_once(rig, unfinished(rig, "/oauth/token", FORM), 6)
    until_held(rig.broker.server, 6)
    assert ask(rig, get(rig)).status == 200
    close(wires)
    nothing_held(rig)


def test_no_place_is_kept_however_a_request_ends(make_rig, monkeypatch):
    rig = make_rig(max_requests_per_user=2, body_timeout="500ms", write_timeout="500ms")
    mcp = rig.session()
    bearer = f"Authorization: Bearer {mcp.token}"
    rig.broker.routes["/"].methods["GET"] = lambda request: 1 / 0
    big = {
        **PING,
        "method": "tools/call",
        "params": {"name": "get_echo", "arguments": {"text": "x", "size": 3000000}},
    }
    endings = [
        get(rig),
        get(rig, "/", ATTACKER),  # the handler raises
        b"nonsense\r\n\r\n",
        get(rig, "/nowhere", "Content-Length: 9", method=b"POST"),
        unfinished(rig, "/mcp", bearer, length=1 << 20, sent=b"a" * 100000),  # too slow
        unfinished(rig, "/mcp", bearer, length=1 << 30),
        unfinished(rig, "/mcp", "Authorization: Bearer x"),
        get(rig, "/mcp", bearer, "Transfer-Encoding: chunked", method=b"POST") + b"5\r\nabcdeXX",
        mcp_post(rig, mcp.token, big, session=mcp.session_id),  # never read
        unfinished(rig, "/oauth/token", FORM, ATTACKER),
    ]
    for hangs_up in (False, True):
        for ending in endings:
            wire = Wire(rig)
            wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            wire.send(ending)
            if not hangs_up and ending is not endings[8]:
                with contextlib.suppress(EOFError, OSError):
                    wire.answer()
            elif hangs_up:
                wire.sock.close()
            if ending is endings[8] and not hangs_up:
                with rig.broker.server._changed:  # cut by the broker
                    assert rig.broker.server._changed.wait_for(
                        lambda: rig.broker.server.open_connections <= 1, 20
                    )
            wire.sock.close()
    start = threading.Thread.start

    def no_connection(thread):
        if thread.name == "connection":
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_connection)
        with Wire(rig) as wire:
            assert wire.is_closed()
    mcp.close()
    nothing_held(rig)


def test_a_strangers_request_takes_no_second_thread(make_rig):
    rig = make_rig(max_requests_per_address=16)
    before = threading.active_count()
    wires = at_once(rig, get(rig, "/healthz", "Accept: text/event-stream", ATTACKER), 16)
    for wire in wires:
        wire.until(b": open\n\n")
    assert threading.active_count() <= before + 16
    for wire in wires:
        wire.until(b"0\r\n\r\n")  # after a moment it ends by itself
    close(wires)
    nothing_held(rig)


# -- connections


def test_the_oldest_of_a_few_addresses_that_take_every_connection_makes_room(make_rig):
    rig = make_rig(max_connections=30, max_requests_per_address=64)
    attackers = at_once(rig, unfinished(rig, "/oauth/token", FORM, ATTACKER), 1)
    until_held(rig.broker.server, 1)  # it is the oldest: a request counts from when its head has been read
    attackers += at_once(rig, unfinished(rig, "/oauth/token", FORM, ATTACKER), 29)
    until_held(rig.broker.server, 30)
    for _ in range(3):
        assert ask(rig, get(rig, "/healthz", ANOTHER)).status == 200
    assert attackers[0].is_closed()
    close(attackers)
    nothing_held(rig)


def test_silent_connections_of_one_peer_make_room_for_another_peers_and_not_for_its_own(make_rig):
    rig = make_rig(max_connections=30, trusted_proxies="192.0.2.1", header_timeout="60s")
    port = rig.broker.server.port

    def connection(address):
        wire = Wire.__new__(Wire)
        wire.sock, wire.buffer = socket.create_connection(("127.0.0.1", port), 20, (address, 0)), b""
        return wire

    silent = [connection("127.0.0.2") for _ in range(30)]
    assert silent[-1].send(get(rig)).answer().status == 200  # all have been accepted
    assert connection("127.0.0.2").is_closed()
    with connection("127.0.0.3") as another:
        assert another.send(get(rig)).answer().status == 200
    assert silent[0].is_closed()
    close(silent)
    nothing_held(rig)


def test_a_users_requests_are_never_cut_to_make_room(make_rig):
    rig = make_rig(max_connections=30)
    token = rig.login().tokens["access_token"]
    wires = at_once(rig, unfinished(rig, "/mcp", f"Authorization: Bearer {token}"), 30)
    until_held(rig.broker.server, 30)
    with Wire(rig) as refused:
        with contextlib.suppress(OSError):
            refused.send(get(rig))
        assert refused.is_closed()
    close(wires)
    nothing_held(rig)


# -- bodies


def test_bodies_without_room_end_the_slowest_of_who_holds_most(make_rig):
    rig = make_rig(body_bytes="1MiB", max_body="256KiB")
    alice, bob = (rig.login(user).tokens["access_token"] for user in ("alice", "bob"))
    size = 256 << 10
    body = json.dumps(PING).encode().ljust(size)
    slow = unfinished(rig, "/mcp", f"Authorization: Bearer {alice}", length=size, sent=body[:-1])
    wires = []
    for number in range(1, 5):  # four have room: each but its first 16 KiB
        wires += at_once(rig, slow, 1)
        for _ in range(2000):
            if rig.broker.server.bodies.total == number * (size - 1 - Bodies.FREE):
                break
            threading.Event().wait(0.01)
    with Wire(rig) as honest:
        answer = honest.send(post(rig, "/mcp", body, f"Authorization: Bearer {bob}")).answer()
        assert answer.status == 200
    answer = wires[0].answer()  # had the most time for as much as the others
    assert answer.status == 503 and answer.header("connection") == "close" and answer.header("retry-after")
    assert rig.broker.server.bodies.total <= 1 << 20
    for wire in wires[1:]:
        assert wire.send(body[-1:]).answer().status == 200
    close(wires)
    nothing_held(rig)


def test_small_bodies_are_free(make_rig):
    rig = make_rig(body_bytes="64KiB", max_body="16KiB")
    token = rig.login().tokens["access_token"]
    wires = at_once(
        rig, unfinished(rig, "/mcp", f"Authorization: Bearer {token}", length=16384, sent=b" " * 16000), 30
    )
    until_held(rig.broker.server, 30)
    assert rig.broker.server.bodies.total == 0
    close(wires)
    nothing_held(rig)


def test_bytes_of_bodies_stay_within_their_limit_and_every_byte_is_given_back():
    limit = 1 << 20
    bodies = Bodies(types.SimpleNamespace(body_bytes=limit))
    ended = []
    made = []
    for number in range(200):
        body = Body(f"user {number % 7}", 0.0, lambda number=number: ended.append(number))
        made.append(body)
        with contextlib.suppress(HTTPError):
            for _ in range(number % 5):
                bodies.grow(body, 20000)
        assert bodies.total == sum(each.charged * (not each.ended) for each in made) <= limit
    assert ended and all(made[number].ended for number in ended)
    with pytest.raises(HTTPError):  # one that was ended while it waited learns it with its next byte
        bodies.grow(made[ended[0]], 1)
    for body in made:
        bodies.close(body)
    assert bodies.total == 0 and not bodies._by_owner


def test_what_has_been_read_weighs_on_its_owner_and_refuses_nobody_else():
    limit = 1 << 20
    bodies = Bodies(types.SimpleNamespace(body_bytes=limit))
    made = []

    def settle(owner, weight):
        made.append(Body(owner, 0.0, lambda: None))
        bodies.settle(made[-1], weight + Bodies.FREE)

    settle("user 1", 3 * limit)  # a single one may be as heavy as a body can
    for weight in (1, limit):
        with pytest.raises(HTTPError):
            settle("user 1", weight)
    for owner in ("user 2", "user 3"):
        settle(owner, limit - 1)
        settle(owner, 1)
        with pytest.raises(HTTPError):
            settle(owner, 1)
    settle("user 4", limit // 2)  # all is full: an equal share is left to each
    settle("user 5", limit // 2)
    with pytest.raises(HTTPError):
        settle("user 5", limit // 2)
    settle("user 5", -Bodies.FREE)  # a small one is free
    for body in made:
        bodies.close(body)
        bodies.close(body)
    assert not bodies._weights


def test_heavy_requests_that_wait_for_a_child_are_bounded_for_their_user_and_others_are_served(
    make_rig, control
):
    rig = make_rig(
        child=("--control", control.path), max_sessions_per_user="1", body_bytes="1MiB", max_body="256KiB"
    )
    token = rig.login().tokens["access_token"]
    waits, works = McpClient(rig.url + "/mcp", token), McpClient(rig.url + "/mcp", token)
    waits.initialize()
    works.initialize()
    _, stream = works.start_request("tools/call", {"name": "get_slow", "arguments": {"key": "k"}})
    control.wait_event(event="call", tool="get_slow")
    heavy = {"name": "get_echo", "arguments": {"text": "here", "more": [[]] * 3000}}
    message = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": heavy}
    head = (
        f"Authorization: Bearer {token}",
        f"Mcp-Session-Id: {waits.session_id}",
        "Accept: application/json",
    )
    wires = at_once(rig, post(rig, "/mcp", json.dumps(message).encode(), *head), 4)
    waiting = list(wires)
    while len(waiting) > 1:
        for sock in select.select([wire.sock for wire in waiting], [], [], 20)[0]:
            (wire,) = (each for each in waiting if each.sock is sock)
            waiting.remove(wire)
            refused = wire.answer()
            assert (refused.status, refused.json()["error"]) == (503, "temporarily_unavailable")
    bob = McpClient(rig.url + "/mcp", rig.login("bob").tokens["access_token"])
    bob.initialize()
    assert text_of(bob.call_tool("get_echo", text="x" * 200_000)) == "x" * 200_000
    control.release("k")
    assert text_of(waiting[0].answer().json()["result"]) == "here"
    stream.close()
    for mcp in (waits, works, bob):
        mcp.close()
    close(wires)
    nothing_held(rig)


# -- what is refused without its body


@pytest.mark.parametrize(
    "path, lines, status",
    [
        ("/mcp", (), 401),
        ("/mcp", ("Authorization: Bearer fja_" + "x" * 43,), 401),
        ("/mcp", ("Origin: https://evil.example",), 403),
        ("/oauth/consent", ("Origin: https://evil.example",), 403),
        ("/account/end", ("Sec-Fetch-Site: cross-site",), 403),
        ("/oauth/register", ("Content-Type: application/json", ANOTHER), 429),
        ("/oauth/token", (FORM, ANOTHER), 429),
        ("/oauth/revoke", (FORM, ANOTHER), 429),
        ("/oauth/token", ("Content-Type: text/plain",), 400),
    ],
)
def test_what_can_be_refused_without_the_body_is(make_rig, path, lines, status):
    rig = make_rig(rate_register="60", rate_token="60")
    rig.clock.stop()
    if status == 429:
        for _ in range(60):
            ask(rig, post(rig, path, b"{}", *lines))
    assert ask(rig, unfinished(rig, path, *lines, sent=b"")).status == status


@pytest.mark.parametrize("length, status", [(4097, 400), (65536, 400), (65537, 413)])
def test_a_registration_above_4_KiB_is_refused_by_its_length(rig, length, status):
    answer = ask(rig, unfinished(rig, "/oauth/register", length=length, sent=b""))
    assert answer.status == status
    assert status == 413 or answer.json()["error"] == "invalid_client_metadata"
    body = json.dumps({"redirect_uris": ["https://a.example/cb"], "x": "y" * 4000}).encode()
    chunked = get(rig, "/oauth/register", "Transfer-Encoding: chunked", method=b"POST")
    for size, expected in ((4096, 201), (4097, 400)):
        padded = body.ljust(size)
        assert ask(rig, post(rig, "/oauth/register", padded)).status == expected
        assert ask(rig, chunked + b"%x\r\n%s\r\n0\r\n\r\n" % (size, padded)).status == expected


# -- whose address


@pytest.mark.parametrize(
    "text, address",
    [
        ("203.0.113.7", "203.0.113.7"),
        (" 203.0.113.7\t", "203.0.113.7"),
        ("203.0.113.7:65535", "203.0.113.7"),
        ("[203.0.113.7]:80", "203.0.113.7"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        ("::FFFF:cb00:7107", "203.0.113.7"),
        ("[::ffff:203.0.113.7]:4711", "203.0.113.7"),
        ("2001:DB8:0::7", "2001:db8::7"),
        ("[2001:db8::7]", "2001:db8::7"),
        ("[2001:db8::7]:443", "2001:db8::7"),
        ("fe80::7%eth0", "fe80::7"),
    ],
)
def test_an_address_is_read_in_every_form_that_proxies_write(text, address):
    assert read_address(text) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "unknown",
        "_hidden",
        "unix",
        "203.0.113",
        "203.0.113.7:",
        "203.0.113.7:port",
        "203.0.113.7:123456",
        "203.0.113.7:\u0661",
        "[2001:db8::7",
        "[2001:db8::7]443",
        "2001:db8::7]",
        "203.0.113.7 198.51.100.1",
        "for=203.0.113.7",
        "203.0.113.007",
        "1" * 70,
    ],
)
def test_what_is_no_address_is_none(text):
    with pytest.raises(ValueError):
        read_address(text)


def test_limits_count_networks_of_IPv6_and_addresses_of_IPv4():
    assert (
        network_of("203.0.113.7") == "203.0.113.7" and network_of("2001:db8:1:2:3::7") == "2001:db8:1:2::/64"
    )
    assert network_of("203.0.113.7", 24, 48) == "203.0.113.0/24"
    assert network_of("2001:db8:1:2:3::7", 24, 48) == "2001:db8:1::/48"
    assert network_of(fjmcp_broker.UNIX_PEER, 24, 48) == fjmcp_broker.UNIX_PEER


def test_a_header_of_nothing_but_proxies_is_read_for_32_entries(make_rig):
    rig = make_rig()
    body = json.dumps({"redirect_uris": ["http://localhost/cb"]}).encode()
    for proxies, address in ((31, "203.0.113.7"), (32, "127.0.0.1")):
        ask(rig, post(rig, "/register", body, "X-Forwarded-For: 203.0.113.7" + ",127.0.0.1" * proxies))
        assert rig.log.named("client_registered")[-1]["address"] == address


def test_a_proxy_that_is_not_trusted_is_named_once_with_the_setting(make_rig):
    rig = make_rig(trusted_proxies="192.0.2.1")
    for number in range(5):
        assert ask(rig, get(rig, "/", f"X-Forwarded-For: 203.0.113.{number}")).status == 200
    (record,) = rig.log.named("x_forwarded_for_ignored")
    assert record["level"] == "warning" and record["peer"] == "127.0.0.1"
    assert "trusted_proxies" in record["advice"]


def test_the_peer_of_a_Unix_socket_is_a_trusted_proxy(make_rig, tmp_path):
    rig = make_rig()
    path = str(tmp_path / "s")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    server = fjmcp_broker.Server(
        rig.broker.settings, rig.broker.handle, rig.log, ("127.0.0.1", 0), [listener]
    )
    server.start()
    try:
        body = json.dumps({"redirect_uris": ["http://localhost/cb"]}).encode()
        for lines, address in (((), "unix"), ((ATTACKER,), "203.0.113.9")):
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(20)
                client.connect(path)
                client.sendall(post(rig, "/oauth/register", body, "Connection: close", *lines))
                assert client.recv(100).startswith(b"HTTP/1.1 201")
            assert rig.log.named("client_registered")[-1]["address"] == address
    finally:
        server.drain()
        server.close(5)


# -- readers


def test_a_slow_but_steady_reader_gets_all_of_it(make_rig):
    """It takes 128 KiB in each eighth of write_timeout, for longer than write_timeout."""
    rig = make_rig(write_timeout="2s")
    mcp = rig.session()
    size = 3 << 20
    call = {
        **PING,
        "method": "tools/call",
        "params": {"name": "get_echo", "arguments": {"text": "x", "size": size}},
    }
    with Wire(rig) as wire:
        wire.sock.close()
        wire.sock = socket.socket()
        wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        wire.sock.settimeout(20)
        wire.sock.connect(("127.0.0.1", rig.broker.server.port))
        wire.send(mcp_post(rig, mcp.token, call, session=mcp.session_id))
        got = 0
        while got < size:
            data = wire.sock.recv(131072, socket.MSG_WAITALL if size - got > 131072 else 0)
            assert data, got
            got += len(data)
            threading.Event().wait(0.2)
    mcp.close()


def test_the_kernel_holds_little_for_a_reader_that_stalls(make_rig):
    rig = make_rig(write_timeout="30s")
    mcp = rig.session()
    call = {
        **PING,
        "method": "tools/call",
        "params": {"name": "get_echo", "arguments": {"text": "x", "size": 9000000}},
    }
    with Wire(rig) as wire:
        wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wire.send(mcp_post(rig, mcp.token, call, session=mcp.session_id))
        wire.sock.recv(1)
        server = rig.broker.server
        with server._changed:
            busy = [connection for connection in server._connections if connection.busy]
        assert len(busy) == 1
        threading.Event().wait(0.5)  # it fills what it can
        assert 0 < busy[0]._untaken() <= 256 << 10
    mcp.close()


# -- the counts themselves


def test_places_are_counted_by_kind_owner_and_name():
    places = Places()
    one, other, third = Seat(places), Seat(places), Seat(places)
    one.take("requests", "user 1", 1)
    with pytest.raises(HTTPError) as refused:
        other.take("requests", "user 1", 1)
    assert refused.value.status == 429 and other.owner == "user 1"
    other.take("requests", "user 2", 1)
    one.take("streams", "user 1", 1, "s")
    other.take("requests", "user 1", 1)
    third.take("streams", "user 1", 1, "s")  # of one name: takes over
    one.leave()
    with pytest.raises(HTTPError):
        one.take("streams", "user 1", 1, "t")
    with pytest.raises(HTTPError):  # refused, it stays where it was
        other.take("streams", "user 1", 1, "t")
    assert places.count("requests", "user 1") == 1
    for seat in (one, other, third, third):
        seat.leave()
    assert places.total() == 0 and not places._held
