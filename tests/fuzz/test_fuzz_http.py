"""HTTP and JSON-RPC under fuzzing.

A second, slow and plain reading of RFC 9112 says what the bytes mean; the server must refuse or agree. Bugs
that were found stay as examples. --long runs many more.
"""

import contextlib
import json
import socket
import string
import types

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import fjmcp_broker
from rigs.raw_http import Wire, ask, get, mcp_post, post
from rigs.rig import AuditLog, FakeClock, Rig, text_of

TOKEN = set(string.ascii_letters + string.digits + "!#$%&'*+-.^_`|~")
MANY = settings(max_examples=250)


# -- the reference: RFC 9112, one clause at a time


class Invalid(Exception):
    """No reading is right: it must be refused."""


class Incomplete(Exception):
    """More would have to come."""


def line_at(data, at):
    """The line that begins there and where the next one begins (2.2); neither CR nor LF stands in it."""
    end = data.find(b"\r\n", at)
    line = data[at : end if end >= 0 else len(data)]
    if b"\n" in line or end >= 0 and b"\r" in line:
        raise Invalid("bare CR or LF")
    if end < 0:
        raise Incomplete
    return line.decode("latin-1"), end + 2


def fields_at(data, at):
    """The field lines up to the empty one (5).

    A map of lower-case names to lists of values, and where it ends.
    """
    fields = {}
    while True:
        line, at = line_at(data, at)
        if not line:
            return fields, at
        name, colon, value = line.partition(":")
        if not colon or not name or not set(name) <= TOKEN:
            raise Invalid("field name")
        value = value.strip(" \t")
        if any(ord(character) < 32 and character != "\t" or ord(character) == 127 for character in value):
            raise Invalid("field value")
        fields.setdefault(name.lower(), []).append(value)


def body_at(data, at, fields, version):
    """The body and where it ends (6.3, 7.1)."""
    lengths, codings = fields.get("content-length", []), fields.get("transfer-encoding", [])
    if codings:
        if lengths or version == "HTTP/1.0" or [coding.lower() for coding in codings] != ["chunked"]:
            raise Invalid("framing")
        return chunks_at(data, at)
    if not lengths:
        return b"", at
    if len(lengths) > 1 or not lengths[0] or not set(lengths[0]) <= set(string.digits):
        raise Invalid("Content-Length")
    end = at + int(lengths[0])
    if end > len(data):
        raise Incomplete
    return data[at:end], end


def chunks_at(data, at):
    body = b""
    while True:
        line, at = line_at(data, at)
        size, semicolon, extension = line.partition(";")
        size = size.rstrip(" \t") if semicolon else size
        if (
            not size
            or not set(size) <= set(string.hexdigits)
            or any(not 32 <= ord(c) < 127 and c != "\t" for c in extension)
        ):
            raise Invalid("chunk")
        if int(size, 16) == 0:
            _, at = fields_at(data, at)
            return body, at
        end = at + int(size, 16)
        if end + 2 > len(data):
            raise Incomplete
        if data[end : end + 2] != b"\r\n":
            raise Invalid("chunk end")
        body, at = body + data[at:end], end + 2


def request_at(data, at):
    """One request as (method, target, fields, body), where it ends, and whether the connection goes on.

    RFC 9112 3, 9.3.
    """
    line, at = line_at(data, at)
    if not line:  # one empty line before a request is ignored (2.2)
        line, at = line_at(data, at)
    words = line.split(" ")
    if len(words) != 3:
        raise Invalid("request line")
    method, target, version = words
    if (
        not method
        or not set(method) <= TOKEN
        or not target
        or any(not 33 <= ord(character) <= 126 for character in target)
    ):
        raise Invalid("request line")
    if version not in ("HTTP/1.0", "HTTP/1.1"):
        raise Invalid("version")
    fields, at = fields_at(data, at)
    hosts = fields.get("host", [])
    if len(hosts) > 1 or version == "HTTP/1.1" and not hosts:
        raise Invalid("Host")
    scheme, authority, rest = target.partition("://")
    if authority and scheme.lower() in ("http", "https") and rest:
        host, slash, path = rest.partition("/")
        fields["host"], target = [host], "/" + path
    elif not target.startswith("/") and (method, target) != ("OPTIONS", "*"):
        raise Invalid("target")
    body, at = body_at(data, at, fields, version)
    tokens = {token.strip().lower() for value in fields.get("connection", []) for token in value.split(",")}
    lives = "close" not in tokens and (version == "HTTP/1.1" or "keep-alive" in tokens)
    return (method, target, fields, body), at, lives


def reference(data):
    """The requests that the bytes hold, and how they end: "end", "invalid" or "incomplete"."""
    found, at = [], 0
    try:
        while at < len(data):
            request, at, lives = request_at(data, at)
            found.append(request)
            if not lives:
                return found, "end"
    except Invalid:
        return found, "invalid"
    except Incomplete:
        return found, "incomplete"
    return found, "end"


# -- the server: one that tells what it has read


def echo(request):
    """What was read, as JSON; refused as the broker refuses."""
    try:
        body = request.read_body(1 << 16)
    except fjmcp_broker.HTTPError as error:
        return fjmcp_broker.error_response(error)
    target = request.path + ("?" + request.query if request.query else "")
    return fjmcp_broker.json_response(200, [request.method, target, request.headers, body.hex()])


@pytest.fixture(scope="module")
def shared():
    """A server without anything behind it, in the shape of what a Wire connects to."""
    values = {
        "public_url": "http://localhost:1",
        "forgejo_url": "http://localhost:2",
        "forgejo_oauth_client_id": "x",
        "forgejo_oauth_client_secret": "y",
    }
    made = fjmcp_broker.load_settings(values, {})
    log = AuditLog(made, FakeClock())
    server = fjmcp_broker.Server(made, echo, log, ("127.0.0.1", 0))
    server.start()
    yield types.SimpleNamespace(broker=types.SimpleNamespace(server=server), log=log)
    server.drain()
    server.close(5)


def served(shared, *pieces):
    """(what the server says it read, the status of a refusal or None); after a refusal nothing may come."""
    requests, refused = [], None
    with Wire(shared) as wire:
        with contextlib.suppress(OSError):
            for piece in pieces:
                wire.send(piece)
            wire.sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(EOFError, ConnectionResetError):
            while True:
                answer = wire.answer()
                if answer.status == 100:
                    continue
                assert refused is None, "an answer after a refusal"
                if answer.status != 200:
                    assert answer.header("connection") == "close"
                    refused = answer.status
                elif answer.body:
                    method, target, fields, body = answer.json()
                    requests.append((method, target, fields, bytes.fromhex(body)))
    assert not shared.log.named("internal_error")
    return requests, refused


def plainly(requests):
    """With targets as the server splits them: an empty query is none."""
    return [
        (method, target.removesuffix("?") if target.count("?") == 1 else target, fields, body)
        for method, target, fields, body in requests
    ]


# -- what is sent

names = st.text(st.sampled_from(sorted(TOKEN)), min_size=1, max_size=12).filter(
    lambda name: name.lower() not in ("host", "content-length", "transfer-encoding", "connection", "expect")
)
values = st.text(
    st.characters(min_codepoint=33, max_codepoint=255).filter(lambda c: ord(c) != 127)
    | st.sampled_from(" \t"),
    max_size=20,
).map(lambda value: value.strip(" \t"))
spaces = st.sampled_from(["", " ", "\t", "  \t"])
targets = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=20).map(
    lambda rest: "/" + rest
)


@st.composite
def fields_of(draw, first=()):
    lines = [*first, *draw(st.lists(st.tuples(names, values), max_size=4))]
    return "".join(
        f"{name}:{draw(spaces)}{value}{draw(spaces)}\r\n" for name, value in draw(st.permutations(lines))
    ).encode("latin-1")


@st.composite
def bodies(draw):
    """(field lines that frame it, bytes on the wire)."""
    body = draw(st.binary(max_size=60))
    how = draw(st.sampled_from(["none", "length", "chunked"]))
    if how == "none":
        return [], b""
    if how == "length":
        return [("Content-Length", draw(st.sampled_from(["", "0", "000"])) + str(len(body)))], body
    wire, at = b"", 0
    while at < len(body):
        size = draw(st.integers(1, len(body) - at))
        extension = draw(st.sampled_from(["", ";a", " ; a=b", ';x="y z"']))
        wire += (
            f"{draw(st.sampled_from(['', '0']))}{size:{draw(st.sampled_from('xX'))}}{extension}\r\n".encode()
            + body[at : at + size]
            + b"\r\n"
        )
        at += size
    return [("Transfer-Encoding", draw(st.sampled_from(["chunked", "Chunked"])))], wire + b"0\r\n" + draw(
        fields_of()
    ) + b"\r\n"


@st.composite
def requests_of(draw):
    method = draw(st.sampled_from(["GET", "POST", "DELETE", "OPTIONS", "PATCH"]))
    target = draw(targets | st.sampled_from(["http://other.example/x?y", "HTTPS://h", "/?"]))
    framing, body = draw(bodies())
    more = draw(
        st.sampled_from(
            [[], [], [("Connection", "keep-alive")], [("Connection", "close")], [("Connection", "x, Close")]]
        )
    )
    head = draw(fields_of([("Host", "localhost"), *framing, *more]))
    return f"{method} {target} HTTP/1.1\r\n".encode() + head + b"\r\n" + body


@MANY
@given(parts=st.lists(requests_of(), min_size=1, max_size=3), cut=st.integers(0, 400))
def test_requests_that_are_right_are_read_exactly_however_they_are_cut(shared, parts, cut):
    data = b"".join(parts)
    expected, end = reference(data)
    assert end == "end"
    assert served(shared, data[:cut], data[cut:]) == (plainly(expected), None)


NASTY = [
    b"\r",
    b"\n",
    b"\r\n",
    b" ",
    b"\t",
    b":",
    b"\0",
    b"\x7f",
    b"\xa0",
    b"0",
    b"-1",
    b"+",
    b",",
    b";",
    b"\r\n ",
    b"\r\n\r\n",
    b"Host: x\r\n",
    b"Content-Length: 5\r\n",
    b"Content-Length: 0\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: identity\r\n",
    b"Expect: 100-continue\r\n",
    b"Connection: close\r\n",
    b"0\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"HTTP/1.0",
    b"HTTP/1.1",
]


def mutated(data, changes):
    for place, length, piece in changes:
        at = place % (len(data) + 1)
        data = data[:at] + piece + data[at + length :]
    return data


broken = st.builds(
    mutated,
    st.lists(requests_of(), min_size=1, max_size=3).map(b"".join),
    st.lists(
        st.tuples(st.integers(0, 2000), st.integers(0, 6), st.sampled_from(NASTY) | st.binary(max_size=4)),
        min_size=1,
        max_size=3,
    ),
)


def agrees(shared, data):
    """What the server served is what the reference reads.

    It may stop earlier, by a refusal or a hang-up, but never go on further.
    """
    expected, end = reference(data)
    got, refused = served(shared, data)
    expected = plainly(expected)
    assert got == expected[: len(got)], (data, got, expected)
    if end == "invalid" and len(got) == len(expected):
        assert refused, data


@MANY
@given(data=broken | st.binary(max_size=200))
@example(
    b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5 \r\nhello\r\n0\r\n\r\n"
)  # a space after a chunk's size was let pass
@example(b"GET ?x HTTP/1.1\r\nHost: x\r\n\r\n")  # a target without a path was let pass
@example(b"GET http://x?y HTTP/1.1\r\nHost: x\r\n\r\n")
@example(b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
@example(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\na")
def test_whatever_is_sent_is_refused_or_read_as_the_reference_reads_it(shared, data):
    agrees(shared, data)


@pytest.mark.long
@settings(max_examples=20000)
@given(data=broken | st.binary(max_size=400))
def test_the_same_for_long(shared, data):
    agrees(shared, data)


# -- JSON-RPC from clients, through /mcp


@pytest.fixture(scope="module")
def session(shared, tmp_path_factory):
    """A session of a broker with a child, over one raw connection at a time."""
    rig = Rig(tmp_path_factory.mktemp("fuzz"))
    yield rig, rig.session(protocol="2025-03-26")  # the revision with batches
    rig.close()


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**70), 10**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
METHODS = [
    "ping",
    "tools/list",
    "tools/call",
    "resources/list",
    "prompts/get",
    "logging/setLevel",
    "completion/complete",
    "notifications/initialized",
    "notifications/cancelled",
    "notifications/progress",
    "notifications/roots/list_changed",
    "server/discover",
    "subscriptions/listen",
    "rpc.x",
    "",
]
params = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["get_echo", "get_my_user_info", "nothing"]) | json_values,
        "arguments": json_values,
        "cursor": json_values,
        "requestId": json_values,
        "progressToken": json_values,
        "_meta": json_values
        | st.fixed_dictionaries(
            {},
            optional={
                "progressToken": json_values,
                fjmcp_broker.META_VERSION: st.sampled_from(["2026-07-28", "2025-11-25", "x"]) | json_values,
            },
        ),
    },
)
messages = st.fixed_dictionaries(
    {"jsonrpc": st.sampled_from(["2.0"] * 6 + ["1.0", 2, None])},
    optional={
        "id": st.integers(0, 9) | st.text(max_size=5) | json_values,
        "method": st.sampled_from(METHODS) | json_values,
        "params": params | json_values,
        "result": json_values,
        "error": json_values | st.fixed_dictionaries({"code": json_values, "message": json_values}),
    },
)
texts = (
    st.builds(
        lambda value: json.dumps(value).encode(), messages | st.lists(messages, max_size=3) | json_values
    )
    | st.binary(max_size=40)
    | st.builds(
        lambda value, at, piece: mutated(json.dumps(value).encode(), [(at, 1, piece)]),
        messages,
        st.integers(0, 300),
        st.sampled_from(
            [
                b"{",
                b"}",
                b"[",
                b'"',
                b"\\",
                b"\xff",
                b"NaN",
                b"1e999",
                b"\\ud800",
                b'"id":1,',
                b"\0",
                b"9" * 80,
            ]
        ),
    )
)
header_lines = st.lists(
    st.sampled_from(
        [
            "MCP-Protocol-Version: 2025-03-26",
            "MCP-Protocol-Version: 2026-07-28",
            "MCP-Protocol-Version: x",
            "Mcp-Method: ping",
            "Mcp-Name: get_echo",
            "Mcp-Session-Id: unknown",
            "Last-Event-ID: x-1",
        ]
    ),
    max_size=2,
    unique_by=lambda line: line[:14],
)


@settings(max_examples=200)
@given(body=texts, in_session=st.booleans(), lines=header_lines)
@example(b'{"jsonrpc":"2.0","id":1,"method":"ping","params":{"a":"\\ud800"}}', True, [])
@example(b"[" * 70 + b"]" * 70, True, [])
@example(b"[]", True, [])
@example(b'{"jsonrpc":"2.0","id":1,"id":2,"method":"ping"}', True, [])
def test_whatever_a_client_says_the_answer_is_json_rpc_or_a_refusal(session, body, in_session, lines):
    rig, mcp = session
    own = (
        [f"Mcp-Session-Id: {mcp.session_id}"]
        if in_session and not any("Session" in line for line in lines)
        else []
    )
    with Wire(rig) as wire:
        answer = wire.send(
            post(
                rig,
                "/mcp",
                body,
                f"Authorization: Bearer {mcp.token}",
                "Accept: application/json",
                *own,
                *lines,
            )
        ).answer()
        assert answer.status in (200, 202, 400, 404, 405, 429), (answer.status, answer.body)
        if answer.status == 200:
            messages_of = answer.json() if isinstance(answer.json(), list) else [answer.json()]
            assert all(
                message["jsonrpc"] == "2.0" and ("result" in message) != ("error" in message)
                for message in messages_of
            )
        elif answer.status != 202:
            assert "error" in answer.json()
        assert wire.send(get(rig)).answer().status == 200  # nothing was left on the connection
    assert not rig.log.named("internal_error")


def test_after_all_of_it_the_session_works(session):
    rig, mcp = session
    assert "alice" in text_of(mcp.call_tool("get_my_user_info"))
    assert (
        ask(rig, mcp_post(rig, mcp.token, {"jsonrpc": "2.0", "id": 1, "method": "ping"})).json()["result"]
        == {}
    )
