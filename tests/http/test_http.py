"""HTTP over raw sockets: framing, limits, the order of checks, CORS, pages, streams.

Case ids are those of docs/security.md.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import resource
import select
import socket
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fjmcp_broker
from rigs.child_control import ChildControl
from rigs.mcp_client import McpClient, OAuthClient
from rigs.raw_http import Answer, Wire, ask, get, host, mcp_post, post
from rigs.rig import Rig, text_of

# An exception that ends a thread of the broker is a traceback
# on stderr: it fails the test during which it came.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
OK, PING = b"HTTP/1.1 200 OK", {"jsonrpc": "2.0", "id": 1, "method": "ping"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One Rig for all tests that leave nothing behind."""
    made = Rig(tmp_path_factory.mktemp("http"), header_timeout="2s", body_timeout="2s")
    yield made
    made.close()


@pytest.fixture(scope="module")
def token(shared):
    return shared.login().tokens["access_token"]


# -- framing


@pytest.mark.parametrize(
    "lines, status",
    [
        (["Content-Length: 3", "Transfer-Encoding: chunked"], 400),
        (["Content-Length: 3", "Content-Length: 3"], 400),
        (["Content-Length: 3, 3"], 400),
        (["Content-Length: +3"], 400),
        (["Content-Length: -1"], 400),
        (["Content-Length: 0_3"], 400),
        (["Content-Length: 0x3"], 400),
        (["Content-Length:"], 400),
        (["Content-Length: 18446744073709551616"], 400),
        ([b"Content-Length: \xb2"], 400),
        (["Transfer-Encoding: xchunked"], 501),
        (["Transfer-Encoding: chunked, identity"], 501),
        (["Transfer-Encoding: chunked", "Transfer-Encoding: chunked"], 501),
        (["Transfer-Encoding: gzip, chunked"], 501),
        (["X: a\rY: b"], 400),
        (["X: a", " folded"], 400),
        (["X : a"], 400),
        (["nocolon"], 400),
        (["X: a\0b"], 400),
        (["X: a\x07b"], 400),
        ([": a"], 400),
        ([b"X\xe9: a"], 400),
        (["X y: a"], 400),
        (["Host: other"], 400),
        (["Expect: nonsense"], 417),
    ],
    ids=str,
)
def test_H01_H02_H03_H04_what_could_be_read_in_two_ways_is_refused_and_the_connection_closed(
    shared, lines, status
):
    with Wire(shared) as wire:
        wire.send(
            post(shared, "/oauth/token", b"", *lines).replace(b"Content-Length: 0\r\n", b"", 1)
            + b"abc"
            + get(shared)
        )
        answer = wire.answer()
        assert answer.status == status and answer.header("connection") == "close" and answer.json()["error"]
        assert wire.is_closed()


@pytest.mark.parametrize("length", [b"5", b"0", b"3"])
def test_H01_a_length_beside_chunked_is_refused_though_the_chunks_are_good(shared, length):
    lines = b"Content-Length: " + length, "Transfer-Encoding: chunked"
    with Wire(shared) as wire:
        answer = wire.send(get(shared, "/oauth/token", *lines, method=b"POST") + b"0\r\n\r\n").answer()
        assert answer.status == 400 and "Transfer-Encoding" in answer.json()["error_description"]
        assert wire.is_closed()


@pytest.mark.parametrize(
    "first, status",
    [
        (b"GET /healthz HTTP/1.1\n", 400),
        (b"GET  /healthz HTTP/1.1\r\n", 400),
        (b"GET /healthz\x85HTTP/1.1\r\n", 400),
        (b"GET /a b HTTP/1.1\r\n", 400),
        (b"GET /healthz\r\n", 400),
        (b"GET /healthz HTTP/1.9\r\n", 505),
        (b"GET /healthz HTTP/2.0\r\n", 505),
        (b"GET /healthz HTTP/0.9\r\n", 505),
        (b"GET /healthz http/1.1\r\n", 400),
        (b"get /healthz HTTP/1.1\r\n", 400),
        (b"\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\r\n", 400),
        (b"GET /h\xc3\xa4 HTTP/1.1\r\n", 400),
        (b"CONNECT example.org:443 HTTP/1.1\r\n", 400),
    ],
    ids=str,
)
def test_H05_H06_a_request_line_is_exactly_one(shared, first, status):
    with Wire(shared) as wire:
        answer = wire.send(first + host(shared) + b"\r\n" + get(shared)).answer()
        assert answer.status == status
        assert wire.is_closed()


@pytest.mark.parametrize(
    "data, status",
    [
        (lambda rig: b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n" + host(rig) + b"\r\n", 414),
        (lambda rig: b"G" * 20000, 414),
        (lambda rig: get(rig, "/healthz", *[f"X-{n}: 1" for n in range(101)]), 431),
        (lambda rig: get(rig, "/healthz", "X: " + "a" * 33000), 431),
        (lambda rig: b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 30000, 431),
    ],
)
def test_H13_headers_have_limits(shared, data, status):
    with Wire(shared) as wire:
        try:
            wire.send(data(shared))
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert wire.answer().status == status


def test_B11_HTTP_1_1_needs_exactly_one_host(shared):
    assert ask(shared, b"GET /healthz HTTP/1.1\r\n\r\n").status == 400
    assert ask(shared, b"GET /healthz HTTP/1.0\r\n\r\n").status == 200


@pytest.mark.parametrize(
    "chunks, status",
    [
        (b"5\r\nhello\r\n0\r\n\r\n", 400),
        (b"1;ext=1\r\n1\r\n0\r\nTrailer: x\r\n\r\n", 400),
        (b"5\r\nhello!!0\r\n\r\n", 400),
        (b"-5\r\nhello\r\n0\r\n\r\n", 400),
        (b"0x5\r\nhello\r\n0\r\n\r\n", 400),
        (b"5 \n\r\nhello", 400),
        (b"FFFFFFFFF\r\n", 400),
        (b"7fffffff\r\n", 413),
        (b"0\r\nbad trailer\r\n\r\n", 400),
    ],
)
def test_H02_malformed_and_oversized_chunks_are_refused(shared, token, chunks, status):
    head = get(shared, "/mcp", "Transfer-Encoding: chunked", f"Authorization: Bearer {token}", method=b"POST")
    assert ask(shared, head + chunks).status == status


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_H02_chunked_bodies_are_read(shared, token, size):
    body = json.dumps(PING).encode()
    chunks = b"".join(
        b"%x;note=1\r\n%s\r\n" % (len(part), part)
        for part in (body[n : n + size] for n in range(0, len(body), size))
    )
    with Wire(shared) as wire:
        wire.send(
            get(
                shared, "/mcp", "Transfer-Encoding: chunked", f"Authorization: Bearer {token}", method=b"POST"
            )
            + chunks
            + b"0\r\nX-Trailer: 1\r\n\r\n"
            + get(shared)
        )
        assert wire.answer().json() == {"jsonrpc": "2.0", "id": 1, "result": {}}
        assert wire.answer().json()["status"] == "ok"


def test_a_body_of_very_many_chunks_is_refused(shared, token):
    form = "Content-Type: application/x-www-form-urlencoded"
    head = get(shared, "/oauth/token", "Transfer-Encoding: chunked", form, method=b"POST")
    refused = ask(shared, head + b"1\r\n \r\n" * 60_000 + b"0\r\n\r\n")
    assert refused.status == 400 and b"too many chunks" in refused.body
    document = json.dumps({"redirect_uris": ["https://app.example/cb"], "client_name": "x" * 3900}).encode()
    pieces = b"".join(b"1\r\n%c\r\n" % byte for byte in document)
    head = get(shared, "/oauth/register", "Transfer-Encoding: chunked", method=b"POST")
    assert ask(shared, head + pieces + b"0\r\n\r\n").status == 201


def test_one_empty_line_before_a_request_is_ignored_and_no_second_one(shared):
    document = post(shared, "/oauth/register", b"{}")
    with Wire(shared) as wire:
        wire.send(b"\r\n" + get(shared) + b"\r\n" + document + b"\r")
        assert [wire.answer().status, wire.answer().status] == [200, 400]
        assert wire.send(b"\n" + get(shared)).answer().status == 200
    for blank in (b"\r\n\r\n", b"\n", b"\r\r\n", b" \r\n"):
        assert ask(shared, blank + get(shared)).status == 400


def test_an_empty_line_alone_begins_no_request(make_rig):
    rig = make_rig(header_timeout="1s", idle_timeout="1s")
    with Wire(rig) as wire:
        assert wire.send(get(rig) + b"\r\n").answer().status == 200
        assert wire.is_closed()


def test_a_host_that_is_not_ours_is_told_which_is(make_rig):
    rig = make_rig(public_url="https://mcp.example.org:8443")
    for name in ("mcp.example.org", "evil.example", "mcp.example.org:443"):
        answer = ask(rig, get(rig, "/.well-known/oauth-protected-resource", f"Host: {name}", own_host=False))
        assert answer.status == 421 and "mcp.example.org:8443" in answer.json()["error_description"]
        assert "evil" not in answer.json()["error_description"]


@pytest.mark.parametrize(
    "path, lines, status",
    [
        ("/mcp", [], 401),
        ("/mcp", ["Authorization: Bearer x"], 401),
        ("/nowhere", [], 404),
        ("/oauth/authorize", [], 405),
        ("/mcp", ["Origin: https://evil.example"], 403),
    ],
)
def test_H07_a_body_left_unread_is_never_parsed_as_a_request(shared, path, lines, status):
    smuggled = get(shared)
    with Wire(shared) as wire:
        answer = wire.send(post(shared, path, smuggled, *lines)).answer()
        assert answer.status == status and answer.header("connection") == "close"
        assert wire.is_closed()


def test_H07_a_body_that_is_too_long_to_read_is_no_request_either(shared):
    head = get(
        shared,
        "/oauth/token",
        "Content-Type: application/x-www-form-urlencoded",
        "Content-Length: 99999",
        method=b"POST",
    )
    with Wire(shared) as wire:
        answer = wire.send(head + get(shared)).answer()
        assert answer.status == 413 and answer.header("connection") == "close"
        assert wire.is_closed()


def test_H08_pipelined_requests_are_answered_in_order(shared):
    with Wire(shared) as wire:
        wire.send(
            get(shared) + get(shared, "/nowhere") + get(shared, "/.well-known/oauth-protected-resource")
        )
        assert [wire.answer().status for _ in range(3)] == [200, 404, 200]


@pytest.mark.parametrize(
    "path",
    ["//mcp", "/./mcp", "/x/../mcp", "/%6dcp", "/mcp%00", "/mcp;x", "/MCP", "/mcp//", "/.well-known/x"],
)
def test_H10_routes_match_exactly_and_404_is_json(shared, path):
    answer = ask(shared, get(shared, path))
    assert (
        answer.status == 404
        and answer.header("content-type") == "application/json"
        and answer.json()["error"] == "not_found"
    )


def test_H09_an_absolute_target_names_the_host(shared):
    port = shared.broker.server.port
    assert (
        ask(shared, get(shared, f"http://127.0.0.1:{port}/.well-known/oauth-authorization-server")).status
        == 200
    )
    assert ask(shared, get(shared, "http://evil.example/mcp")).status == 421


@pytest.mark.parametrize("method", [b"TRACE", b"PUT", b"PATCH", b"SEND"])
def test_H11_other_methods_are_refused_with_what_is_allowed(shared, token, method):
    answer = ask(shared, get(shared, "/mcp", f"Authorization: Bearer {token}", method=method))
    assert answer.status == 405 and "POST" in answer.header("allow")
    assert ask(shared, get(shared, "/oauth/token", "X-HTTP-Method-Override: POST")).status == 405


@pytest.mark.parametrize("part", ["request line", "header", "body", "nothing"])
def test_H14_a_slow_sender_meets_a_deadline_however_it_drips(make_rig, part):
    rig = make_rig(header_timeout="300ms", body_timeout="300ms")
    token = rig.login().tokens["access_token"]
    full = {
        "request line": b"GET /hea",
        "header": get(rig)[:-2],
        "body": mcp_post(rig, token, PING)[:-5],
        "nothing": b"",
    }[part]
    with Wire(rig) as wire:
        wire.send(full)
        if part == "nothing":
            assert wire.is_closed()
        else:
            assert wire.answer().status == 408 and wire.is_closed()


@pytest.mark.parametrize("part", ["request line", "header", "body"])
def test_H14_a_byte_now_and_then_moves_no_deadline(make_rig, part):
    """The deadline is of the whole part: a sender that always has one more byte meets it all the same."""
    rig = make_rig(header_timeout="1s", body_timeout="1s")
    head = "Content-Type: application/x-www-form-urlencoded", "Content-Length: 60000"
    begun = {
        "request line": b"GET /hea",
        "header": get(rig)[:-2] + b"X: ",
        "body": get(rig, "/oauth/token", *head, method=b"POST"),
    }[part]
    with Wire(rig) as wire:
        wire.send(begun)
        for _ in range(500):  # each waits 50 ms: without the deadline all are sent, and no answer comes
            if select.select([wire.sock], [], [], 0.05)[0]:
                break
            wire.send(b"a")
        else:
            raise AssertionError("500 bytes were waited for")
        assert wire.answer().status == 408 and wire.is_closed()


def test_H14_a_client_that_never_reads_loses_its_connection_and_hurts_nobody(make_rig):
    rig = make_rig(write_timeout="300ms")
    mcp = rig.session()
    with Wire(rig) as wire:
        wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        call = {
            "jsonrpc": "2.0",
            "id": 1,
            "method": "tools/call",
            "params": {"name": "get_echo", "arguments": {"text": "x", "size": 12000000}},
        }
        wire.send(mcp_post(rig, mcp.token, call, session=mcp.session_id))
        with rig.broker.server._changed:
            assert rig.broker.server._changed.wait_for(lambda: rig.broker.server.open_connections <= 2, 20)
    assert "alice" in text_of(mcp.call_tool("get_my_user_info"))


def test_H15_connections_have_a_limit_and_the_limit_is_per_address_behind_no_proxy(make_rig):
    rig = make_rig(max_connections=5)
    wires = [Wire(rig) for _ in range(5)]
    for wire in wires:
        assert wire.send(get(rig)).answer().status == 200
    with Wire(rig) as sixth:
        assert sixth.is_closed()
    wires.pop().sock.close()
    with rig.broker.server._changed:
        assert rig.broker.server._changed.wait_for(lambda: rig.broker.server.open_connections < 5, 20)
    assert ask(rig, get(rig)).status == 200
    for wire in wires:
        wire.sock.close()


def test_H16_without_file_descriptors_it_recovers(make_rig):
    rig = make_rig()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Wire(rig) as wire:
        assert wire.send(get(rig)).answer().status == 200
        waiting = socket.socket()
        waiting.settimeout(20)
        taken = []
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 3, hard))
            with contextlib.suppress(OSError):  # until not one is left, in the gaps below neither
                while True:
                    taken.append(os.dup(0))
            waiting.connect(("127.0.0.1", rig.broker.server.port))
            waiting.sendall(get(rig))
            assert wire.send(get(rig)).answer().status == 200
            assert not select.select([waiting], [], [], 0)[0]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for descriptor in taken:
                os.close(descriptor)
        assert taken and waiting.recv(100).startswith(OK)
        waiting.close()


def test_H18_100_continue_comes_only_when_the_body_is_wanted(shared, token):
    body = json.dumps(PING).encode()
    with Wire(shared) as wire:
        wire.send(
            get(
                shared,
                "/mcp",
                f"Content-Length: {len(body)}",
                "Expect: 100-continue",
                f"Authorization: Bearer {token}",
                method=b"POST",
            )
        )
        assert wire.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue"
        assert wire.send(body).answer().json()["result"] == {}
    assert (
        ask(shared, get(shared, "/mcp", "Content-Length: 9", "Expect: 100-continue", method=b"POST")).status
        == 401
    )
    assert (
        ask(
            shared,
            get(
                shared,
                "/mcp",
                "Content-Length: 99999999",
                "Expect: 100-continue",
                f"Authorization: Bearer {token}",
                method=b"POST",
            ),
        ).status
        == 413
    )


def test_H19_HTTP_1_0_is_served_and_never_chunked(shared, token):
    with Wire(shared) as wire:
        answer = wire.send(get(shared, version=b"HTTP/1.0")).answer()
        assert answer.status == 200 and wire.is_closed()
    with Wire(shared) as wire:
        for _ in range(2):
            answer = wire.send(
                get(shared, "/healthz", "Connection: keep-alive", version=b"HTTP/1.0")
            ).answer()
            assert answer.header("connection") == "keep-alive"
    with Wire(shared) as wire:
        wire.send(get(shared, "/healthz", "Accept: text/event-stream", version=b"HTTP/1.0"))
        head = Answer(wire.until(b"\r\n\r\n"), b"")
        assert "transfer-encoding" not in head.headers and head.headers["connection"] == ["close"]
        wire.until(b": open\n\n")
        assert wire.is_closed()


def test_H20_a_reset_in_the_middle_leaves_no_trace(shared, token):
    for data in (
        b"POST /mcp HT",
        get(shared)[:-2],
        mcp_post(shared, token, PING)[:-3],
        mcp_post(shared, token, PING),
    ):
        wire = Wire(shared)
        wire.send(data)
        wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        wire.sock.close()
    assert ask(shared, get(shared)).status == 200
    assert "Traceback" not in shared.log.text and not shared.log.named("internal_error")


@pytest.mark.parametrize("method", [b"GET", b"HEAD", b"DELETE"])
def test_H21_a_body_where_none_belongs_does_not_desync(shared, method):
    with Wire(shared) as wire:
        answer = wire.send(
            get(shared, "/healthz", f"Content-Length: {len(get(shared))}", method=method) + get(shared)
        )
        assert answer.answer(head_only=method == b"HEAD").header("connection") == "close"
        assert wire.is_closed()


def test_H22_answers_give_nothing_away(shared):
    for data in (get(shared), get(shared, "/nowhere"), b"nonsense\r\n\r\n", get(shared, "/mcp")):
        answer = ask(shared, data)
        assert (
            answer.header("server") == "fjmcp-broker" and answer.header("x-content-type-options") == "nosniff"
        )
        assert answer.header("date").endswith("GMT")


def test_H12_no_value_can_split_a_response():
    for value in ("a\r\nSet-Cookie: x=1", "a\nb", "a\0b"):
        with pytest.raises(ValueError):
            fjmcp_broker.write_head(200, [("Location", value)])
    with pytest.raises(ValueError):
        fjmcp_broker.write_head(200, [("Bad Name", "x")])


def test_H24_plain_http_is_for_loopback_only():
    values = {
        "public_url": "http://localhost:8080",
        "forgejo_url": "https://forge.example",
        "forgejo_oauth_client_id": "x",
        "forgejo_oauth_client_secret": "y",
        "listen": "0.0.0.0:8080",
    }
    with pytest.raises(fjmcp_broker.ConfigurationError, match="listen"):
        fjmcp_broker.load_settings(values, {})
    fjmcp_broker.load_settings({**values, "public_url": "https://mcp.example"}, {})


def test_a_bug_reaches_the_client_as_a_number_and_the_operator_as_a_place(make_rig):
    rig = make_rig()

    def broken(request):
        raise KeyError("canary")

    rig.broker.routes["/"].methods["GET"] = broken
    answer = ask(rig, get(rig, "/"))
    assert answer.status == 500 and b"canary" not in answer.body and b"Traceback" not in answer.body
    seen = rig.log.wait("internal_error")[0]
    assert seen["error"] == "KeyError" and seen["line"] > 0


# -- the order of checks


def test_the_order_of_checks(shared, token):
    evil = "Origin: https://evil.example"
    no_host = "Host: evil.example"
    assert ask(shared, get(shared, "/nowhere", no_host, own_host=False)).status == 421
    assert ask(shared, get(shared, "/mcp", no_host, evil, own_host=False)).status == 421
    assert ask(shared, get(shared, "/healthz", no_host, own_host=False)).status == 200
    assert ask(shared, get(shared, "/nowhere", evil)).status == 404
    assert ask(shared, get(shared, "/mcp", evil)).status == 403
    assert ask(shared, get(shared, "/mcp", evil, method=b"OPTIONS")).status == 403
    assert ask(shared, get(shared, "/mcp", method=b"OPTIONS")).status == 204
    assert ask(shared, get(shared, "/mcp", method=b"PUT")).status == 401
    assert ask(shared, get(shared, "/mcp", f"Authorization: Bearer {token}", method=b"PUT")).status == 405
    assert ask(shared, post(shared, "/mcp", b"{", f"Authorization: Bearer {token}")).status == 400


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "[::1]", "LOCALHOST"])
def test_B11_B12_loopback_names_with_the_listening_port_are_ours(shared, name):
    data = get(
        shared,
        "/.well-known/oauth-authorization-server",
        f"Host: {name}:{shared.broker.server.port}",
        own_host=False,
    )
    answer = ask(shared, data)
    assert answer.status == 200 and answer.json()["issuer"] == shared.url  # never from the header
    assert ask(shared, data.replace(b":%d\r\n" % shared.broker.server.port, b":1\r\n", 1)).status == 421


def test_B11_a_default_port_may_be_left_out_or_written(make_rig):
    rig = make_rig(public_url="https://mcp.example.org")
    path = "/.well-known/oauth-authorization-server"
    for name in ("mcp.example.org", "mcp.example.org:443", "MCP.example.org"):
        assert ask(rig, get(rig, path, f"Host: {name}", own_host=False)).status == 200
    for name in ("mcp.example.org:80", "mcp.example.org.evil.example", "evil.example", ""):
        assert ask(rig, get(rig, path, f"Host: {name}", own_host=False)).status == 421


# -- CORS


@pytest.mark.parametrize(
    "path",
    [
        "/oauth/token",
        "/oauth/register",
        "/oauth/revoke",
        "/token",
        "/register",
        "/revoke",
        "/.well-known/oauth-authorization-server",
        "/.well-known/oauth-protected-resource/mcp",
        "/mcp",
        "/mcp/",
    ],
)
def test_B14_a_preflight_is_answered_without_a_token_and_echoes_the_names(shared, path):
    answer = ask(
        shared,
        get(
            shared,
            path,
            "Origin: https://claude.ai",
            "Access-Control-Request-Method: POST",
            "Access-Control-Request-Headers: authorization,x-custom-1",
            method=b"OPTIONS",
        ),
    )
    assert answer.status == 204 and answer.body == b"" and "content-length" not in answer.headers
    assert answer.header("access-control-allow-headers") == "authorization,x-custom-1"
    assert "access-control-allow-credentials" not in answer.headers
    assert answer.header("access-control-allow-origin") == (
        "https://claude.ai" if path.startswith("/mcp") else "*"
    )


@pytest.mark.parametrize(
    "origin, listed",
    [
        ("https://claude.ai", True),
        ("https://claude.com", True),
        ("https://chatgpt.com", True),
        ("http://localhost:6274", True),
        ("http://127.0.0.1", True),
        ("http://[::1]:1", True),
        ("https://claude.ai.evil.example", False),
        ("null", False),
        ("http://claude.ai", False),
        ("http://localhost.evil.example", False),
        ("https://claude.ai:8443", False),
        ("file://", False),
    ],
)
def test_B10_origins_of_the_list_may_call_and_others_are_refused(shared, origin, listed):
    answer = ask(shared, get(shared, "/mcp", f"Origin: {origin}"))
    assert answer.status == (401 if listed else 403)
    if listed:
        assert answer.header("access-control-allow-origin") == origin and answer.header("vary") == "Origin"
        assert {"WWW-Authenticate", "Mcp-Session-Id", "MCP-Protocol-Version", "X-Request-Id"} == set(
            answer.header("access-control-expose-headers").split(", ")
        )
    else:
        assert "access-control-allow-origin" not in answer.headers


def test_B10_two_origins_are_none(shared):
    assert (
        ask(shared, get(shared, "/mcp", "Origin: https://claude.ai", "Origin: https://claude.ai")).status
        == 403
    )


@pytest.mark.parametrize(
    "path, status",
    [("/healthz", 200), ("/", 200), ("/.well-known/oauth-protected-resource", 200), ("/mcp", 401)],
)
def test_HEAD_is_GET_without_a_body(shared, path, status):
    with Wire(shared) as wire:
        answer = wire.send(get(shared, path, method=b"HEAD")).answer(head_only=True)
        assert answer.status == status and int(answer.header("content-length")) > 0
        assert wire.send(get(shared)).answer().status == 200  # nothing of a body is in between


def test_HEAD_with_a_token_says_which_methods_there_are(shared, token):
    answer = ask(
        shared, get(shared, "/mcp", f"Authorization: Bearer {token}", method=b"HEAD"), head_only=True
    )
    assert answer.status == 405 and answer.header("allow") == "POST, GET, DELETE"


# -- whose address


@pytest.mark.parametrize(
    "forwarded, address",
    [
        (["203.0.113.7"], "203.0.113.7"),
        (["198.51.100.1, 203.0.113.7"], "203.0.113.7"),
        (["203.0.113.7, 127.0.0.1"], "203.0.113.7"),
        (["198.51.100.1", "203.0.113.7"], "203.0.113.7"),
        (["203.0.113.7, nonsense"], "127.0.0.1"),
        (["2001:db8::7"], "2001:db8::7"),
        ([], "127.0.0.1"),
    ],
)
def test_B13_the_clients_address_is_read_from_the_right_past_trusted_proxies(shared, forwarded, address):
    body = json.dumps({"redirect_uris": ["http://localhost/cb"]}).encode()
    count = len(shared.log.named("client_registered"))
    assert (
        ask(
            shared,
            post(
                shared,
                "/oauth/register",
                body,
                "Content-Type: application/json",
                *(f"X-Forwarded-For: {value}" for value in forwarded),
            ),
        ).status
        == 201
    )
    assert shared.log.wait("client_registered", count + 1)[-1]["address"] == address


def test_B13_an_untrusted_peer_speaks_for_itself_only(make_rig):
    rig = make_rig(trusted_proxies="192.0.2.1")
    body = json.dumps({"redirect_uris": ["http://localhost/cb"]}).encode()
    ask(rig, post(rig, "/oauth/register", body, "X-Forwarded-For: 203.0.113.7"))
    assert rig.log.wait("client_registered")[-1]["address"] == "127.0.0.1"


# -- pages


def consent(rig, **arguments):
    client = OAuthClient(rig.url, name=arguments.pop("name", "A client"))
    client.discover()
    client.register()
    path = client.authorize_url(**arguments).removeprefix(rig.url)
    return ask(rig, get(rig, path))


def test_pages_carry_a_strict_policy_and_their_own_style(shared):
    for answer, policy in (
        (consent(shared), "same-origin"),
        (ask(shared, get(shared, "/")), "no-referrer"),
        (ask(shared, get(shared, "/oauth/authorize?client_id=unknown")), "no-referrer"),
    ):
        csp = answer.header("content-security-policy")
        style = re.search(rb"<style>(.*?)</style>", answer.body, re.DOTALL)[1]
        assert f"'sha256-{base64.b64encode(hashlib.sha256(style).digest()).decode()}'" in csp
        assert "form-action" not in csp and "frame-ancestors 'none'" in csp and "default-src 'none'" in csp
        assert answer.header("x-frame-options") == "DENY" and answer.header("cache-control") == "no-store"
        assert answer.header("referrer-policy") == policy
        assert b"<script" not in answer.body and not re.search(rb"\son[a-z]+=", answer.body)


@pytest.mark.parametrize(
    "name, shown",
    [
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ('"><img src=x>', "&quot;&gt;&lt;img src=x&gt;"),
        ("Claude\u202egro.evil", "Claudegro.evil"),
        ("a\x00b\x1bc", "abc"),
        ("", "An application without a name"),
        ("x" * 500, "x" * 99 + "…"),
        ("Cl\u200baude", "Claude"),
        ("two\nlines", "two lines"),
    ],
)
def test_C10_C11_a_clients_name_is_shown_as_text_and_nothing_else(shared, name, shown):
    page = consent(shared, name=name).body.decode()
    assert f'<bdi class="big">{shown}</bdi>' in page
    assert not re.search("[\u200b\u202e\x00\x1b]", page)


def test_error_pages_are_for_people_and_say_what_to_do(shared):
    for path in (
        "/oauth/authorize?client_id=unknown",
        "/oauth/callback?state=x&code=y",
        "/oauth/callback",
        "/authorize?%ff",
    ):
        answer = ask(shared, get(shared, path))
        assert answer.status == 400 and answer.header("content-type") == "text/html; charset=utf-8"
        assert b"<h1>" in answer.body and (b"again" in answer.body)


# -- streams


def test_a_call_that_takes_longer_becomes_a_stream_and_its_hang_up_cancels_nothing(make_rig, tmp_path):
    with ChildControl(str(tmp_path / "control")) as control:
        rig = make_rig(child=("--control", control.path))
        mcp = rig.session()
        call = {
            "jsonrpc": "2.0",
            "id": 7,
            "method": "tools/call",
            "params": {"name": "get_slow", "arguments": {"key": "k"}},
        }
        with Wire(rig) as wire:
            head = Answer(
                wire.send(mcp_post(rig, mcp.token, call, session=mcp.session_id)).until(b"\r\n\r\n"), b""
            )
            assert (
                head.header("content-type") == "text/event-stream"
                and head.header("x-accel-buffering") == "no"
            )
            assert head.header("transfer-encoding") == "chunked"
            event_id = re.search(rb"id: (\S+)", wire.until(b"\n\n"))[1].decode()
        with rig.broker.server._changed:
            rig.broker.server._changed.wait_for(lambda: rig.broker.server.open_connections <= 1, 20)
        control.release("k")
        stream = mcp.open_stream(last_event_id=event_id)
        assert stream.next(15).data["id"] == 7
        assert not [event for event in control.events if event["event"] == "cancelled"]
        stream.close()


def test_a_client_that_cannot_take_a_stream_gets_json_however_long_it_takes(make_rig, tmp_path):
    with ChildControl(str(tmp_path / "control")) as control:
        rig = make_rig(child=("--control", control.path))
        mcp = rig.session()
        call = {
            "jsonrpc": "2.0",
            "id": 7,
            "method": "tools/call",
            "params": {"name": "get_slow", "arguments": {"key": "k"}},
        }
        data = mcp_post(rig, mcp.token, call, session=mcp.session_id).replace(b", text/event-stream", b"")
        with Wire(rig) as wire:
            wire.send(data)
            control.wait_event(event="call", tool="get_slow")
            threading.Timer(
                2.5, control.release, ("k",)
            ).start()  # longer than the 2 s after which others get a stream
            answer = wire.answer()
        assert answer.header("content-type") == "application/json" and answer.json()["id"] == 7


def test_every_body_has_the_length_its_header_says(shared, token):
    with Wire(shared) as wire:
        for path in (
            "/",
            "/healthz",
            "/mcp",
            "/nowhere",
            "/.well-known/oauth-protected-resource",
            "/oauth/authorize",
        ):
            answer = wire.send(get(shared, path)).answer()
            assert len(answer.body) == int(answer.header("content-length")) > 0
        assert wire.send(mcp_post(shared, token, PING)).answer().json()["result"] == {}


# -- anything at all


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    data=st.one_of(
        st.binary(max_size=300),
        st.builds(
            lambda line, heads, body: line + b"\r\n" + b"\r\n".join(heads) + b"\r\n\r\n" + body,
            st.sampled_from(
                [
                    b"GET / HTTP/1.1",
                    b"POST /oauth/token HTTP/1.1",
                    b"POST /mcp HTTP/1.1",
                    b"GET /oauth/authorize?a=%ff HTTP/1.1",
                ]
            ),
            st.lists(
                st.sampled_from(
                    [
                        b"Host: x",
                        b"Content-Length: 5",
                        b"Transfer-Encoding: chunked",
                        b"Expect: 100-continue",
                        b"Authorization: Bearer \xff",
                        b"Cookie: fjmcp=",
                        b"Connection: close",
                        b"X-Forwarded-For: ,,",
                    ]
                )
                | st.binary(max_size=30),
                max_size=6,
            ),
            st.binary(max_size=60),
        ),
    )
)
def test_whatever_is_sent_the_server_answers_the_next_one(shared, data):
    with Wire(shared) as wire:
        wire.sock.settimeout(5)
        wire.send(data)
        wire.sock.shutdown(socket.SHUT_WR)
        try:
            while wire.more():
                pass
        except ConnectionResetError:
            pass
        assert not wire.buffer.startswith(b"HTTP/1.1 500")
    assert not shared.log.named("internal_error")


def test_after_all_of_it_an_honest_client_is_served(shared):
    mcp = shared.session()
    assert isinstance(mcp, McpClient) and "alice" in text_of(mcp.call_tool("get_my_user_info"))
