"""The bearer gate, HTTP and limits under attack, over sockets: groups B, H and N of docs/security.md.

What test_http.py proves is not repeated.
"""

import json
import re
import threading

import pytest

import fjmcp_broker
from rigs.browser import Browser, approve_login
from rigs.child_control import ChildControl
from rigs.mcp_client import McpClient, OAuthClient
from rigs.raw_http import Answer, Wire, ask, flood, get, host, mcp_post, post
from rigs.rig import Rig, text_of

PING = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
FORM = "Content-Type: application/x-www-form-urlencoded"
METADATA = (
    "/.well-known/oauth-authorization-server",
    "/.well-known/oauth-protected-resource",
    "/.well-known/oauth-protected-resource/mcp",
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One Rig for all tests that leave nothing behind."""
    made = Rig(tmp_path_factory.mktemp("security"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def client(shared):
    """A logged-in OAuth client."""
    return shared.login()


@pytest.fixture(scope="module")
def token(client):
    return client.tokens["access_token"]


def children(rig):
    return rig.broker.counts()[1]


def refused_with_401(rig, *lines, method=b"POST", error="invalid_token"):
    """Whether a request to /mcp with these header lines gets 401, with that error or none.

    And whether it started no child.
    """
    before = children(rig)
    answer = ask(rig, get(rig, "/mcp", *lines, method=method))
    challenge = answer.header("www-authenticate") or ""
    assert (
        answer.status == 401
        and challenge.startswith("Bearer ")
        and f'resource_metadata="{rig.url}/.well-known/' in challenge
    )
    assert 'scope="forgejo:read forgejo:write"' in challenge
    assert (f'error="{error}"' in challenge) if error else ("error" not in challenge)
    assert children(rig) == before
    return answer


# -- B: who is calling


@pytest.mark.parametrize("method", [b"POST", b"GET", b"DELETE"])
def test_B01_without_a_token_the_challenge_leads_to_the_metadata_and_names_no_error(shared, method):
    refused_with_401(shared, method=method, error=None)


def test_B02_a_token_that_is_not_good_is_named_invalid(make_rig):
    rig = make_rig()
    good = rig.login().tokens["access_token"]
    ended = rig.login()
    ended.revoke(ended.tokens["access_token"])
    for bad in (
        "garbage",
        "fja_",
        good[:-1],
        good + "A",
        good.swapcase(),
        good.upper(),
        good[4:],
        ended.tokens["access_token"],
        "fja_" + "A" * 43,
        good + "\u00e9",
    ):
        refused_with_401(rig, f"Authorization: Bearer {bad}".encode())
    rig.clock.advance(3601)
    refused_with_401(rig, f"Authorization: Bearer {good}")
    assert children(rig) == 0


def test_B03_no_other_secret_of_ours_is_a_token(make_rig):
    rig = make_rig()
    client = OAuthClient(rig.url, auth_method="client_secret_post")
    client.login(None, "alice", "secret")
    callback = approve_login(Browser(), client.authorize_url(), "alice", "secret")
    code = re.search(r"[?&]code=([^&]+)", callback)[1]
    page = ask(rig, get(rig, client.authorize_url().removeprefix(rig.url)))
    csrf = re.search(rb'name="csrf" value="([^"]+)"', page.body)[1].decode()
    cookie = page.header("set-cookie").partition("=")[2].partition(";")[0]
    box = re.search(rb'name="login" value="([^"]+)"', page.body)[1].decode()
    session = McpClient(rig.url + "/mcp", client.tokens["access_token"])
    session.initialize()
    started = children(rig)
    for other in (
        client.tokens["refresh_token"],
        client.client_id,
        client.client_secret,
        session.session_id,
        csrf,
        cookie,
        box,
        code,
        rig.app.client_secret,
        "Zm9v",
    ):
        refused_with_401(rig, f"Authorization: Bearer {other}")
    assert children(rig) == started


def test_B04_the_users_forgejo_token_opens_nothing_and_goes_nowhere(make_rig):
    rig = make_rig()
    rig.login()
    upstream = rig.forgejo.issue_tokens("alice", rig.app.client_id, "read:user")["access_token"]
    before = rig.forgejo.count("/")
    refused_with_401(rig, f"Authorization: Bearer {upstream}")
    assert rig.forgejo.count("/") == before


def test_B05_a_token_for_another_resource_is_refused(make_rig):
    rig = make_rig()
    token = rig.login().tokens["access_token"]
    rig.stop()
    rig.values["public_url"] = "https://elsewhere.example"  # another broker on the same database
    rig.start()
    answer = ask(rig, mcp_post(rig, token, PING))
    assert answer.status == 401 and 'error="invalid_token"' in answer.header("www-authenticate")


def test_B06_a_token_anywhere_but_in_the_header_is_not_there(shared, token):
    refused = [
        ask(shared, get(shared, f"/mcp?access_token={token}", method=b"POST")),
        ask(shared, post(shared, "/mcp", f"access_token={token}".encode(), FORM)),
        ask(shared, get(shared, "/mcp", f"Cookie: access_token={token}; token={token}", method=b"POST")),
    ]
    assert [answer.status for answer in refused] == [401] * 3
    assert all("error" not in answer.header("www-authenticate") for answer in refused)
    assert token not in shared.log.text


@pytest.mark.parametrize(
    "lines, status",
    [
        (["Authorization: Bearer {0}", "Authorization: Bearer {0}"], 400),
        (["Authorization: Bearer {0}, Bearer {0}"], 401),
        (["Authorization: bearer {0}"], 200),
        (["AUTHORIZATION: BEARER {0}"], 200),
        (["Authorization: Bearer\t{0}"], 401),
        (["Authorization: Basic {0}"], 401),
        (["Authorization: {0}"], 401),
        (["Authorization: Bearer"], 401),
        (["Authorization:"], 401),
    ],
    ids=str,
)
def test_B07_one_header_of_one_form_whatever_the_case_of_the_scheme(shared, token, lines, status):
    body = json.dumps(PING).encode()
    assert ask(shared, post(shared, "/mcp", body, *(line.format(token) for line in lines))).status == status


def test_B08_too_small_a_scope_names_the_whole_scope_and_the_metadata(make_rig):
    rig = make_rig()
    client = rig.login(access="read", scope="forgejo:read")
    mcp = McpClient(rig.url + "/mcp", client.tokens["access_token"])
    mcp.initialize()
    call = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "tools/call",
        "params": {"name": "create_issue", "arguments": {}},
    }
    answer = ask(rig, mcp_post(rig, mcp.token, call, session=mcp.session_id))
    challenge = answer.header("www-authenticate")
    assert answer.status == 403 and 'error="insufficient_scope"' in challenge
    assert 'scope="forgejo:read forgejo:write"' in challenge and "resource_metadata=" in challenge


@pytest.mark.parametrize("method", [b"POST", b"GET", b"DELETE"])
def test_B09_the_token_is_asked_for_before_a_byte_of_the_body_and_before_the_session(shared, method):
    with Wire(shared) as wire:  # 4 GB are announced and none sent: an answer shows that none was waited for
        answer = wire.send(
            get(shared, "/mcp", "Content-Length: 4294967296", "Mcp-Session-Id: nonsense", method=method)
        ).answer()
        assert answer.status == 401 and answer.header("connection") == "close"
        assert wire.is_closed()


@pytest.mark.parametrize(
    "name",
    ["evil.example", "127.0.0.1", "user@127.0.0.1:{0}", "127.0.0.1:{0}/x", "127.0.0.1:{0}.evil.example", ""],
)
@pytest.mark.parametrize("path", ["/mcp", "/", "/oauth/token", "/oauth/authorize", "/nowhere", *METADATA])
def test_B11_another_hosts_name_is_refused_on_every_path(shared, path, name):
    line = f"Host: {name.format(shared.broker.server.port)}"
    answer = ask(shared, get(shared, path, line, "Origin: https://claude.ai", own_host=False))
    assert answer.status == 421
    if path == "/mcp":
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("path", METADATA)
def test_B12_metadata_comes_from_the_configuration_whatever_the_headers_say(shared, path):
    plain = ask(shared, get(shared, path))
    poisoned = ask(
        shared,
        get(
            shared,
            path,
            "X-Forwarded-Host: evil.example",
            "X-Forwarded-Proto: ftp",
            "Forwarded: host=evil.example",
            "X-Forwarded-For: 203.0.113.9",
            "X-Original-URL: /evil",
        ),
    )
    assert (
        plain.status == poisoned.status == 200
        and plain.body == poisoned.body
        and shared.url.encode() in plain.body
    )


def test_B15_a_stream_ends_when_its_token_does(make_rig):
    rig = make_rig()
    mcp = rig.session()
    with Wire(rig) as wire:
        wire.send(
            get(
                rig,
                "/mcp",
                f"Authorization: Bearer {mcp.token}",
                f"Mcp-Session-Id: {mcp.session_id}",
                "Accept: text/event-stream",
            )
        )
        assert Answer(wire.until(b"\r\n\r\n"), b"").status == 200
        wire.until(b": open\n\n")
        rig.clock.advance(3601)
        rig.tick()
        wire.until(b"0\r\n\r\n")


def test_B16_tokens_are_found_by_their_digest_and_by_nothing_else(make_rig):
    rig = make_rig()
    token = rig.login().tokens["access_token"]
    for wild in (
        token[:-1] + "%",
        "fja_%",
        token[:-1] + "_",
        "fja_" + "_" * 43,
        token[:20] + "*",
        "' OR 1=1 --",
    ):
        refused_with_401(rig, f"Authorization: Bearer {wild}")
    rig.stop()
    assert all(token.encode() not in path.read_bytes() for path in rig.directory.iterdir() if path.is_file())


# -- H: HTTP


def test_H06_only_one_request_line_is_served_and_helpers_are_no_methods(shared):
    for method in (b"__CLASS__", b"SENDERROR", b"DO", b"A" * 17):
        assert ask(shared, get(shared, "/healthz", method=method)).status in (400, 405)


@pytest.mark.parametrize(
    "path, kind",
    [
        ("/", "page"),
        ("/oauth/authorize", "page"),
        ("/oauth/callback", "page"),
        ("/oauth/consent", "page"),
        ("/oauth/token", "json"),
        (METADATA[0], "json"),
        ("/healthz", "json"),
    ],
)
def test_H11_a_method_that_is_not_served_names_those_that_are(shared, path, kind):
    answer = ask(shared, get(shared, path, "X-HTTP-Method-Override: GET", method=b"PATCH"))
    allowed = answer.header("allow").split(", ")
    assert answer.status == 405 and "PATCH" not in allowed
    if kind == "page":
        assert (
            answer.header("content-type").startswith("text/html")
            and answer.header("x-frame-options") == "DENY"
        )
        assert (
            "frame-ancestors 'none'" in answer.header("content-security-policy")
            and answer.header("cache-control") == "no-store"
        )
    for method in allowed:
        served = ask(
            shared, get(shared, path, "Content-Length: 0", method=method.encode()), head_only=method == "HEAD"
        )
        assert served.status != 405


def test_H12_reflected_values_come_back_escaped_or_not_at_all(shared):
    evil = "x%0d%0aSet-Cookie:%20evil=1%0d%0a%0d%0a<script>"
    client = OAuthClient(shared.url)
    client.discover()
    client.register()
    path = client.authorize_url().removeprefix(shared.url)
    for name in ("state", "scope", "code_challenge", "response_type", "resource"):
        answer = ask(shared, get(shared, re.sub(f"{name}=[^&]*", f"{name}={evil}", path)))
        assert "evil" not in str(answer.headers.get("set-cookie")) and answer.status in (200, 303, 400)
        assert b"<script>" not in answer.body
    answer = ask(
        shared,
        get(
            shared,
            "/mcp",
            "Origin: https://claude.ai",
            "Access-Control-Request-Headers: x<y>\x80;z".encode("latin-1"),
            method=b"OPTIONS",
        ),
    )
    assert answer.status == 204 and answer.header("access-control-allow-headers") == "xyz"


def test_H12_a_header_that_would_split_the_answer_becomes_a_500(make_rig):
    rig = make_rig()
    rig.broker.routes["/"].methods["GET"] = lambda request: fjmcp_broker.Response(
        200, b"x", "text/plain", (("X-Reflected", "a\r\nEvil: 1"),)
    )
    answer = ask(rig, get(rig, "/"))
    assert answer.status == 500 and "evil" not in answer.headers and rig.log.named("internal_error")


def test_H15_connections_of_one_address_have_a_limit_unless_it_is_a_trusted_proxy(make_rig):
    rig = make_rig(max_connections_per_address=3, trusted_proxies="192.0.2.1")
    wires = [Wire(rig) for _ in range(3)]
    assert [wire.send(get(rig)).answer().status for wire in wires] == [200] * 3
    with Wire(rig) as fourth:
        assert fourth.is_closed()
    for wire in wires:
        wire.sock.close()
    proxied = make_rig(max_connections_per_address=3)
    wires = [Wire(proxied) for _ in range(6)]
    assert [wire.send(get(proxied)).answer().status for wire in wires] == [200] * 6
    for wire in wires:
        wire.sock.close()


def test_H17_without_threads_connections_are_dropped_and_the_next_is_served(make_rig, monkeypatch):
    rig = make_rig()
    start, refused = threading.Thread.start, threading.Event()

    def no_thread(thread):
        if thread.name == "connection":
            refused.set()
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        with Wire(rig) as wire:
            assert wire.is_closed() and refused.is_set()
    assert ask(rig, get(rig)).status == 200 and rig.broker.server.open_connections <= 1


def test_H20_a_failure_while_accepting_costs_one_connection_only(make_rig, monkeypatch):
    rig = make_rig()
    with monkeypatch.context() as patch:
        patch.setattr(rig.broker.server, "_has_room_for", lambda newcomer: 1 / 0)
        with Wire(rig) as wire:
            rig.log.wait("internal_error")
            assert wire.is_closed()
    assert ask(rig, get(rig)).status == 200


def test_H21_HEAD_has_no_body_even_where_GET_would_stream(shared):
    with Wire(shared) as wire:
        answer = wire.send(get(shared, "/healthz", "Accept: text/event-stream", method=b"HEAD")).answer(
            head_only=True
        )
        assert answer.status == 200 and "transfer-encoding" not in answer.headers
        assert wire.send(get(shared)).answer().json()["status"] == "ok"


# -- N: limits


def padded(rig, size):
    """A request whose header has exactly `size` bytes after its request line, the empty line included."""
    head = host(rig) + b"X: \r\n\r\n"
    return b"GET /healthz HTTP/1.1\r\n" + head.replace(b"X: ", b"X: " + b"a" * (size - len(head)))


@pytest.mark.parametrize(
    "what, fits, exceeds, status",
    [
        (
            "request line of 8 KiB",
            lambda rig: get(rig, "/" + "a" * (8192 - 16)),
            lambda rig: get(rig, "/" + "a" * (8193 - 16)),
            414,
        ),
        ("header of 32 KiB", lambda rig: padded(rig, 32768), lambda rig: padded(rig, 32769), 431),
        (
            "100 header lines",
            lambda rig: get(rig, "/healthz", *["X: 1"] * 99),
            lambda rig: get(rig, "/healthz", *["X: 1"] * 100),
            431,
        ),
        (
            "form of 64 KiB",
            lambda rig: post(rig, "/oauth/token", b"a" * 65536, FORM),
            lambda rig: post(rig, "/oauth/token", b"a" * 65537, FORM),
            413,
        ),
        (
            "registration of 64 KiB",
            lambda rig: post(rig, "/oauth/register", b"a" * 65536),
            lambda rig: post(rig, "/oauth/register", b"a" * 65537),
            413,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_N01_what_fits_is_read_and_one_byte_more_is_refused(shared, what, fits, exceeds, status):
    assert ask(shared, fits(shared)).status not in (413, 414, 431)
    assert flood(shared, exceeds(shared)).status == status


def test_N01_a_message_has_at_most_max_body(shared, token):
    def sized(size):
        body = json.dumps(PING).encode()
        return body + b" " * (size - len(body))

    head = f"Authorization: Bearer {token}"
    assert ask(shared, post(shared, "/mcp", sized(4 << 20), head)).json()["result"] == {}
    assert flood(shared, post(shared, "/mcp", sized((4 << 20) + 1), head)).status == 413
    chunks = b"%x\r\n%s\r\n" % ((4 << 20) + 1, sized((4 << 20) + 1))
    assert (
        flood(
            shared,
            get(shared, "/mcp", head, "Transfer-Encoding: chunked", method=b"POST") + chunks + b"0\r\n\r\n",
        ).status
        == 413
    )


def test_N01_a_message_is_at_most_64_deep(shared, token):
    def deep(levels):
        return (
            b'{"jsonrpc":"2.0","id":1,"method":"ping","params":'
            + b'{"a":' * (levels - 1)
            + b"1"
            + b"}" * (levels - 1)
            + b"}"
        )

    head = f"Authorization: Bearer {token}"
    assert ask(shared, post(shared, "/mcp", deep(64), head)).json()["result"] == {}
    answer = ask(shared, post(shared, "/mcp", deep(65), head))
    assert answer.status == 400 and answer.json()["error"]["code"] == -32700


def test_N01_a_session_has_at_most_max_inflight_requests_at_once(make_rig, tmp_path):
    with ChildControl(str(tmp_path / "control")) as control:
        rig = make_rig(child=("--control", control.path), max_inflight=2)
        mcp = rig.session()
        wires = [Wire(rig), Wire(rig)]
        for number, wire in enumerate(wires, 1):
            call = {
                "jsonrpc": "2.0",
                "id": number,
                "method": "tools/call",
                "params": {"name": "get_slow", "arguments": {"key": str(number)}},
            }
            wire.send(mcp_post(rig, mcp.token, call, session=mcp.session_id))
            control.wait_event(
                lambda event, key=str(number): (
                    event.get("event") == "call" and f'"{key}"' in json.dumps(event)
                )
            )
        answer = ask(
            rig, mcp_post(rig, mcp.token, {**PING, "id": 3, "method": "prompts/list"}, session=mcp.session_id)
        )
        assert (
            answer.status == 429
            and answer.header("retry-after")
            and answer.json()["error"]["data"]["reason"] == "busy"
        )
        for key, wire in zip("12", wires):
            control.release(key)
            wire.until(b'"result"')
            wire.sock.close()


EVIL_TEXTS = {
    "spaces": b" " * 60000,
    "tabs": b"\t " * 30000,
    "quotes": b'"' * 60000,
    "backslashes": b"\\" * 60000,
    "commas": b"," * 60000,
    "percents": b"%" * 60000,
    "ampersands": b"a=1&" * 15000,
    "semicolons": b";" * 60000,
    "letters": b"a" * 60000 + b"!",
    "colons": b":" * 60000,
}


@pytest.mark.parametrize("text", EVIL_TEXTS.values(), ids=EVIL_TEXTS)
def test_N03_the_worst_texts_for_patterns_and_parsers_are_answered(shared, token, text):
    """A pattern that goes back and forth would take longer than the test may."""
    head = f"Authorization: Bearer {token}"
    for path, line in (
        ("/mcp", head),
        ("/oauth/token", FORM),
        ("/oauth/register", "X: y"),
        ("/oauth/revoke", FORM),
        ("/oauth/consent", FORM),
    ):
        assert 400 <= ask(shared, post(shared, path, text, line)).status < 500
    quoted = (
        b'{"jsonrpc":"2.0","id":1,"method":"ping","params":{"a":' + json.dumps(text.decode()).encode() + b"}}"
    )
    assert ask(shared, post(shared, "/mcp", quoted, head)).status == 200
    for name in (
        "Accept",
        "Cookie",
        "X-Forwarded-For",
        "Last-Event-ID",
        "Content-Type",
        "Mcp-Session-Id",
        "Connection",
        "Access-Control-Request-Headers",
        "Origin",
        "MCP-Protocol-Version",
        "Authorization",
    ):
        assert (
            200
            <= ask(
                shared, get(shared, "/mcp", f"{name}: x".encode() + text[:30000] + b"x", method=b"OPTIONS")
            ).status
            < 500
        )


@pytest.mark.parametrize("size", [20000])
def test_N04_many_keys_that_might_collide_are_answered(shared, token, size):
    keys = [
        f"k{number * (2**61 - 1)}" for number in range(size)
    ]  # equal modulo the hash of integers, were they used as such
    message = {**PING, "params": {"_meta": dict.fromkeys(keys, 0)}}
    assert (
        ask(
            shared, post(shared, "/mcp", json.dumps(message).encode(), f"Authorization: Bearer {token}")
        ).json()["result"]
        == {}
    )
    form = "&".join(f"{key}=1" for key in keys)[:60000].encode()
    assert ask(shared, post(shared, "/oauth/token", form, FORM)).status == 400


def test_N05_health_needs_no_login_and_tells_numbers_only(shared):
    answer = ask(shared, get(shared, "/healthz", "Host: anything.example", own_host=False))
    assert answer.status == 200 and answer.header("cache-control") == "no-store"
    assert set(answer.json()) == {"status", "version", "git", "store", "sessions", "children"}
    assert isinstance(answer.json()["sessions"], int) and re.fullmatch("[0-9a-f]{40}", answer.json()["git"])


def test_N05_health_does_not_wait_for_a_writer(make_rig):
    rig = make_rig()
    with rig.broker.store.engine._write_lock:
        assert ask(rig, get(rig)).json()["store"] == "ok"


def test_after_all_of_it_an_honest_client_is_served(shared):
    assert "alice" in text_of(shared.session().call_tool("get_my_user_info"))
    assert not shared.log.named("internal_error")
