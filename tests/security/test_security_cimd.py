"""Clients that describe themselves at a URL of their own (Client ID Metadata Documents).

Used end to end, and attacked.
"""

import contextlib
import gzip
import json
import socket
import struct
import threading
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor

import pytest

import fjmcp_broker
from rigs.browser import Browser, approve_login
from rigs.document_web import DOCUMENTS, PUBLIC, DocumentWeb, RsaKey, make_authority
from rigs.mcp_client import McpClient, OAuthClient
from rigs.rig import rows

ME = "https://app.example/client.json"
MINE = {
    "client_id": ME,
    "client_name": "An app",
    "redirect_uris": ["https://app.example/cb"],
    "token_endpoint_auth_method": "none",
}
CHALLENGE = "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM"
JWT_BEARER = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"


@pytest.fixture(scope="session")
def authority(tmp_path_factory):
    return make_authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def key():
    return RsaKey()


@pytest.fixture
def web(authority):
    web = DocumentWeb(authority)
    yield web
    web.close()


@pytest.fixture
def cimd(make_rig, web):
    return make_rig(web=web.guarded())


def ask(rig, client_id, redirect_uri="https://app.example/cb", address=None):
    """The page that a person sees whose client has this client_id."""
    query = {
        "response_type": "code",
        "client_id": client_id,
        "redirect_uri": redirect_uri,
        "code_challenge": CHALLENGE,
        "code_challenge_method": "S256",
        "state": "s",
    }
    headers = {"X-Forwarded-For": address} if address else {}
    page = Browser().get(rig.url + "/oauth/authorize?" + urllib.parse.urlencode(query), headers=headers)
    assert not page.redirected_to
    return page


def refused(rig, client_id, **arguments):
    page = ask(rig, client_id, **arguments)
    return page.status == 400 and "cannot be looked up" in page.text


def client_of(rig, document, redirect_uri=None):
    """An OAuth client with the client_id of a document."""
    client = OAuthClient(rig.url, redirect_uri=redirect_uri or document["redirect_uris"][0])
    client.discover()
    client.client_id = document["client_id"]
    return client


def code_for(client, **arguments):
    callback = approve_login(
        Browser(), client.authorize_url(), "alice", "secret", redirect_uri=client.redirect_uri, **arguments
    )
    return dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(callback).query))["code"]


# -- as real clients use it


@pytest.mark.parametrize(
    "name, redirect_uri",
    [
        ("claude", None),
        ("claude_code", "http://localhost:3118/callback"),
        ("vscode", "http://127.0.0.1:51234/"),
        ("zed", "http://127.0.0.1:27523/callback"),
        ("goose", "http://127.0.0.1:41000/oauth_callback"),
    ],
)
def test_14_the_documents_of_real_clients_lead_to_tools(cimd, web, name, redirect_uri):
    client = client_of(cimd, DOCUMENTS[name], redirect_uri)
    web.publish(DOCUMENTS[name])
    assert (
        client.metadata["client_id_metadata_document_supported"] is True
        and "none" in client.metadata["token_endpoint_auth_methods_supported"]
    )
    page = Browser().get(client.authorize_url())
    assert (
        DOCUMENTS[name]["client_name"] in page.words
        and urllib.parse.urlsplit(client.client_id).hostname in page.words
    )
    assert client.redeem(code_for(client)).status == 200
    assert client.refresh().status == 200 and client.revoke("x").status == 200
    with McpClient(cimd.url + "/mcp", client.tokens["access_token"]) as mcp:
        mcp.initialize()
        assert "alice" in mcp.call_tool("get_my_user_info")["content"][0]["text"]
    assert web.asked == [client.client_id] and web.connected == [(PUBLIC, 443)]


def test_14_chatgpt_proves_itself_with_a_key_of_its_jwks_uri(cimd, web, key):
    document, client, assertion = chatgpt(cimd, web, key)
    code = code_for(client)
    assert client.redeem(code).json()["error"] == "invalid_client"
    assert client.redeem(code, **assertion()).status == 200
    assert client.refresh(**assertion()).status == 200
    assert client.refresh(client_id=None, **assertion()).status == 200
    assert client.revoke(client.tokens["refresh_token"], **assertion()).status == 200
    assert client.refresh(**assertion()).json()["error"] == "invalid_grant"
    assert web.asked == [document["client_id"], document["jwks_uri"]]


def test_14_a_document_that_also_lists_none_needs_no_key(cimd, web, key):
    web.publish(
        {**DOCUMENTS["chatgpt"], "token_endpoint_auth_methods_supported": ["none", "private_key_jwt"]}
    )
    client = client_of(cimd, DOCUMENTS["chatgpt"])
    assert client.redeem(code_for(client)).status == 200


def test_a_preregistered_client_id_may_look_like_a_url_and_is_never_fetched(cimd, web):
    cimd.broker.store.add_client(ME, "configured", "Mine", ["https://app.example/cb"], None, "none", {}, 0.0)
    assert ask(cimd, ME).status == 200 and not web.resolved


# -- S. what strangers may make us do


@pytest.mark.parametrize(
    "url",
    [
        "http://app.example/c",
        "https://app.example",
        "https://app.example/",
        "https://app.example?x",
        "https://app.example/c#f",
        "https://u@app.example/c",
        "https://u:p@app.example/c",
        "https://app.example/./c",
        "https://app.example/a/../c",
        "https://app.example/a/%2e%2E/c",
        "https://app.example/..",
        " https://app.example/c",
        "https://app.example/c ",
        "https://app.exa\tmple/c",
        "https://app.example/c\n",
        "https://app.example\\@evil.example/c",
        "https:\\\\app.example/c",
        "https://äpp.example/c",
        "https://app.example/ä",
        "https://app.example/" + "c" * 2000,
        "https:///c",
        "https://.example/c",
        "https://app..example/c",
        "https://-app.example/c",
        "https://APP.example/c",
        "HTTPS://app.example/c",
        "ftp://app.example/c",
        "https://app/c",
        "https://localhost/c",
        "https://ex%61mple.com/c",
        "https://app.example:/c",
        "//app.example/c",
    ],
)
def test_S01_what_is_no_plain_https_url_is_an_unknown_client_before_any_lookup(cimd, web, url):
    assert ask(cimd, url).status == 400 and not web.resolved


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.1",
        "0177.0.0.1",
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "①②⑦.0.0.1",
        "127。0。0。1",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "169.254.169.254",
        "93.184.216.34",
        "app.example.127.0.0.1",
        "1.1.1.1.",
    ],
)
def test_S02_no_spelling_of_an_address_is_looked_up(cimd, web, host):
    assert ask(cimd, f"https://{host}/c").status == 400 and not web.resolved


PRIVATE = [
    "10.0.0.1",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "0.0.0.0",
    "198.18.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "224.0.0.1",
    "127.0.0.1",
    "127.255.0.1",
    "192.0.0.8",
    "192.88.99.1",
    "::1",
    "::",
    "fc00::1",
    "fe80::1",
    "fe80::1%lo",
    "fd00:ec2::254",
    "ff02::1",
]
WRAPPED = [
    "::ffff:127.0.0.1",
    "::127.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b:1::7f00:1",
    "2002:7f00:1::",
    "2001:0:1::1",
    "::ffff:0:127.0.0.1",
    "fec0::1",
    "5f00::1",
    "3fff::1",
    "2001:db8::1",
]


def test_S03_S04_no_address_but_a_public_one_is_ever_connected_to(cimd, web):
    web.publish(MINE)
    for number, address in enumerate((*PRIVATE, *WRAPPED)):
        host = f"h{number}.app.example"
        web.names[host] = [address]
        assert refused(cimd, f"https://{host}/c"), address
    assert len(web.resolved) == len(PRIVATE) + len(WRAPPED) and not web.connected


@pytest.mark.parametrize(
    "address",
    ["93.184.216.34", "8.8.8.8", "172.15.0.1", "172.32.0.1", "100.128.0.1", "2606:2800:220:1::1", "2a00::1"],
)
def test_S03_public_addresses_are_public(address):
    assert fjmcp_broker.is_public(address)


def test_S05_one_private_address_among_public_ones_refuses_all(cimd, web):
    web.publish(MINE)
    for answer in ([PUBLIC, "10.0.0.1"], ["::1", PUBLIC], []):
        web.names["app.example"] = answer
        assert refused(cimd, ME)
        cimd.clock.advance(61)
    assert not web.connected


def test_S06_the_name_is_resolved_once_and_the_checked_address_connected_to_under_the_names_certificate(
    cimd, web
):
    web.publish(MINE)
    answers = iter([[PUBLIC], ["127.0.0.1"]])
    web.names["app.example"] = lambda: next(answers)
    assert ask(cimd, ME).status == 200
    assert web.resolved == ["app.example"] and web.connected == [(PUBLIC, 443)]
    other = web.publish({**MINE, "client_id": "https://other.example/c"})
    assert refused(cimd, other)  # its certificate is not of that name
    assert web.connected[1:] == [(PUBLIC, 443)] and web.asked == [ME]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("target", ["http://127.0.0.1/", "https://app.example/good.json"])
def test_S07_redirects_are_not_followed(cimd, web, status, target):
    web.publish({**MINE, "client_id": "https://app.example/good.json"})
    web.publish(MINE, status=status, headers=(("Location", target),))
    assert refused(cimd, ME) and web.asked == [ME]


def drip(connection, ended):
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 4000\r\n\r\n")
    while not ended.wait(0.2):
        connection.sendall(b" ")


def endless(head, piece):
    def answer(connection, ended):
        connection.sendall(head)
        while not ended.is_set():
            connection.sendall(piece)

    return answer


def silence(connection, ended):
    ended.wait(30)


OVERLONG = {
    "drip": drip,
    "silence": silence,
    "continue": endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
    "early hints": endless(b"", b"HTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\n" * 100),
    "headers": endless(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 100),
    "one header": endless(b"HTTP/1.1 200 OK\r\nX: ", b"y" * 1000),
    "chunks": endless(
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"1\r\n \r\n" * 100,
    ),
    "no end": endless(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n", b" " * 1000),
}


def test_S08_an_answer_that_is_too_large_or_never_ends_is_let_go_of(cimd, web):
    big = json.dumps({**MINE, "padding": "x" * 5120}).encode()
    web.publish(big, ME)
    assert refused(cimd, ME)
    coded = json.dumps({**MINE, "client_id": "https://app.example/gzip"}).encode()
    web.publish(
        gzip.compress(coded), "https://app.example/gzip", headers=(("Content-Encoding", "gzip"),)
    )  # good, were it decoded
    assert refused(cimd, "https://app.example/gzip")
    for name, answer in OVERLONG.items():
        web.answers[f"https://app.example/{name.replace(' ', '-')}"] = lambda connection, answer=answer: (
            answer(connection, web.ended)
        )
    urls = [url for url in web.answers if url != ME and "gzip" not in url]
    with ThreadPoolExecutor(len(urls)) as pool:
        assert all(pool.map(lambda url: refused(cimd, url) or ask(cimd, url).status == 503, urls))
    assert ask(cimd, web.publish({**MINE, "client_id": "https://app.example/after"})).status == 200


@pytest.mark.parametrize(
    "answer",
    [
        *(OVERLONG[name] for name in ("continue", "no end")),
        endless(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n", b"x" * 1000),
        endless(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"X: y\r\n" * 100),
        endless(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n" * 100),
    ],
)
def test_S08_all_bytes_of_an_answer_are_counted_not_only_those_of_its_body(answer):
    ended = threading.Event()

    def serve():
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            answer(connection, ended)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(fjmcp_broker.FetchFailed, match="^the answer is too large$"):
            fjmcp_broker.fetch("GET", f"http://127.0.0.1:{listener.getsockname()[1]}/", cap=5120, deadline=60)
        ended.set()
        thread.join()


@pytest.mark.parametrize(
    "change",
    [
        {"status": 204},
        {"status": 206},
        {"status": 404},
        {"status": 500},
        {"kind": "text/html"},
        {"kind": ""},
        {"body": b"{"},
        {"body": b"[]"},
        {"body": b'"x"'},
        {"body": json.dumps(MINE).encode("utf-16")},
        {"body": json.dumps(MINE).encode().replace(b"}", b', "client_name": "B"}')},
        {"body": json.dumps(MINE).encode().replace(b"}", b', "n": NaN}')},
        {"body": b"[" * 4000},
    ],
)
def test_S09_what_is_no_json_object_is_no_document(cimd, web, change):
    web.publish(
        change.get("body", json.dumps(MINE).encode()),
        ME,
        status=change.get("status", 200),
        kind=change.get("kind", "application/json"),
    )
    assert refused(cimd, ME)


@pytest.mark.parametrize(
    "kind", ["application/json; charset=utf-8", "application/cimd+json", "Application/JSON"]
)
def test_S09_every_json_content_type_is_read(cimd, web, kind):
    web.publish(MINE, kind=kind)
    assert ask(cimd, ME).status == 200


@pytest.mark.parametrize(
    "claimed",
    [
        ME + "/",
        ME.upper(),
        "https://app.example/client%2ejson",
        "https://evil.example/client.json",
        None,
        5,
        [ME],
    ],
)
def test_S10_a_document_must_name_its_own_url_byte_for_byte(cimd, web, claimed):
    web.publish({**MINE, "client_id": claimed}, ME)
    assert refused(cimd, ME)


@pytest.mark.parametrize(
    "change",
    [
        {"client_secret": "s"},
        {"client_secret_expires_at": 0},
        {"token_endpoint_auth_method": "client_secret_post"},
        {"token_endpoint_auth_method": "client_secret_jwt"},
        {"jwks": {"keys": [{"kty": "oct", "k": "c2VjcmV0"}]}},
        {"jwks": {"keys": [{"kty": "RSA", "n": "AQAB", "e": "AQAB", "d": "AQAB"}]}},
        {"jwks": "x"},
        {"redirect_uris": []},
        {"redirect_uris": None},
        {"redirect_uris": ["javascript:alert(1)"]},
        {"redirect_uris": ["https://app.example/cb", "http://evil.example/cb"]},
        {"redirect_uris": [{}]},
        {"grant_types": ["client_credentials"]},
        {"grant_types": 5},
        {"response_types": ["token"]},
    ],
)
def test_S11_a_document_with_a_secret_or_a_wrong_redirect_uri_is_refused(cimd, web, change):
    web.publish({**MINE, **change})
    assert refused(cimd, ME)


@pytest.mark.parametrize("port", [22, 25, 80, 443, 6379, 8443, 0, 99999])
def test_S12_a_port_is_never_connected_to(cimd, web, port):
    assert ask(cimd, f"https://app.example:{port}/c").status == 400 and not web.resolved


def test_S13_our_own_name_and_forgejos_are_never_fetched(make_rig, web):
    rig = make_rig(
        web=web.guarded(), public_url="https://app.example", forgejo_internal_url="https://git.app.example"
    )
    for host in ("app.example", "git.app.example"):
        assert ask(rig, f"https://{host}/c").status == 400
    assert not web.resolved
    assert ask(rig, web.publish({**MINE, "client_id": "https://x.app.example/c"})).status == 200


def test_S14_few_are_fetched_at_a_time_and_applications_in_use_do_not_wait_for_strangers(cimd, web):
    web.publish(MINE, headers=(("Cache-Control", "max-age=60"),))
    client = client_of(cimd, MINE)
    client.redeem(code_for(client))
    cimd.clock.advance(3700)
    arrived, lock, most = threading.Semaphore(0), threading.Lock(), []
    here = []

    def hold(connection):
        with lock:
            here.append(1)
            most.append(len(here))
        arrived.release()
        web.ended.wait(3)
        with lock:
            here.pop()

    urls = [f"https://h{number}.app.example/c" for number in range(12)]
    web.answers.update((url, hold) for url in urls)
    with ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(ask, cimd, url) for url in urls]
        for _ in range(4):
            assert arrived.acquire(timeout=30)
        assert ask(cimd, ME).status == 200
        assert {future.result().status for future in asked} <= {400, 503}
    assert max(most) == 4


def test_S14_one_host_is_not_flooded_through_us_and_a_failure_is_remembered(cimd, web):
    cimd.clock.stop()
    for _ in range(5):
        assert refused(cimd, "https://app.example/missing")
    assert len(web.asked) == 1
    pages = [ask(cimd, f"https://app.example/{number}") for number in range(70)]
    assert (
        len(web.asked) == 60
        and [page.status for page in pages[59:]] == [429] * 11
        and int(pages[-1].headers["retry-after"]) >= 1
    )
    assert ask(cimd, web.publish({**MINE, "client_id": "https://other.app.example/c"})).status == 200


def test_S14_parallel_logins_fetch_a_document_once(cimd, web):
    web.publish(MINE)
    with ThreadPoolExecutor(8) as pool:
        assert {page.status for page in pool.map(lambda _: ask(cimd, ME), range(8))} == {200}
    assert web.asked == [ME]


def test_S14_what_is_kept_of_strangers_is_bounded_and_clients_with_a_login_stay(cimd, web):
    web.publish(MINE)
    client = client_of(cimd, MINE)
    client.redeem(code_for(client))
    store, now = cimd.broker.store, cimd.clock.now()
    for number in range(60):
        store.keep_document(
            f"https://x.example/{number}",
            "" if number % 2 else "N",
            ["https://x.example/"],
            "none",
            {},
            now + number,
            0,
            keep=40,
        )
    assert rows(store, "SELECT count(*) AS n FROM clients")[0].n == 41 and client.refresh().status == 200
    store.engine.run_each(
        "INSERT INTO clients (client_id, kind, name, redirect_uris, auth_method, metadata, created_at,"
        " used_at) VALUES (:url, 'document', 'N', '[]', 'none', '{}', 0, :now)",
        [{"url": f"https://y.example/{number}", "now": now} for number in range(1100)],
    )
    assert refused(cimd, "https://app.example/one-more")
    assert rows(store, "SELECT count(*) AS n FROM clients")[0].n == 1001 and client.refresh().status == 200
    assert {row[1] for row in store.listing("clients", now)[1]} == {"document"}


@pytest.mark.parametrize(
    "control, seconds",
    [
        ("max-age=315360000", 86400),
        ("max-age=1", 60),
        ("max-age=-5", 3600),
        ("max-age=1e30", 60),
        ("no-store", 60),
        ("public, max-age=7200", 7200),
        ("no-cache, max-age=7200", 60),
        ("", 3600),
        ("s-maxage=5", 3600),
        ("max-age=" + "9" * 400, 86400),
    ],
)
def test_S15_a_document_is_kept_as_its_origin_says_within_bounds(control, seconds):
    assert fjmcp_broker.freshness(fjmcp_broker.Fetched(200, {"cache-control": control}, b"")) == seconds


def test_S15_what_a_document_dropped_is_refused_once_it_is_read_anew_and_a_page_is_no_document(cimd, web):
    web.publish(
        {**MINE, "redirect_uris": ["https://app.example/cb", "https://app.example/old"]},
        headers=(("Cache-Control", "max-age=120"),),
    )
    assert ask(cimd, ME, "https://app.example/old").status == 200
    web.publish(MINE)
    assert ask(cimd, ME, "https://app.example/old").status == 200
    cimd.clock.advance(121)
    assert ask(cimd, ME, "https://app.example/old").status == 400
    assert ask(cimd, ME).status == 200
    web.publish(MINE, kind="text/html")
    cimd.clock.advance(3601)
    assert refused(cimd, ME)
    web.publish(MINE)
    assert refused(cimd, ME)
    cimd.clock.advance(61)
    assert ask(cimd, ME).status == 200


def reset(connection):
    """End a connection so that the other side sees it reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def away(web, how):
    """The origin of MINE fails in one of the ways that say nothing about the document."""
    if isinstance(how, int):
        web.publish(b"<h1>Just a moment</h1>", ME, status=how, kind="text/html")
    elif how in ("gone", "unresolved"):
        web.names["app.example"] = [] if how == "gone" else Trouble(socket.gaierror(-3, "try again"))
    elif how == "unreachable":
        web.refused.add(PUBLIC)
    else:
        web.answers[ME] = reset if how == "reset" else lambda connection: web.ended.wait(20)


class Trouble:
    """What a name's look-up raises."""

    def __init__(self, error):
        self.error = error

    def __call__(self):
        raise self.error


AWAY = [403, 429, 500, 502, 503, 504, 520, 599, "gone", "unresolved", "unreachable", "reset", "silent"]


@pytest.mark.parametrize("how", AWAY)
def test_S15_while_its_origin_only_fails_the_last_good_document_serves_for_a_week_and_consent_says_so(
    cimd, web, how, monkeypatch
):
    monkeypatch.setattr(fjmcp_broker.PublicWeb, "SECONDS", 0.5 if how == "silent" else 5.0)
    cimd.clock.stop()
    web.publish(MINE)
    assert "unconfirmed" not in ask(cimd, ME).words
    since = fjmcp_broker.moment(cimd.clock.now())[:10]
    cimd.clock.advance(4000)
    away(web, how)
    page = ask(cimd, ME)
    assert page.status == 200 and f"unconfirmed since {since}" in page.words
    asked = len(web.resolved)
    assert ask(cimd, ME).status == 200 and len(web.resolved) == asked  # a failure is kept for a minute
    cimd.clock.advance(7 * 86400 - 4010)
    cimd.restart()
    assert ask(cimd, ME).status == 200
    cimd.clock.advance(20)
    assert refused(cimd, ME)
    web.names.clear()
    web.refused.clear()
    web.publish(MINE)
    cimd.clock.advance(61)
    assert ask(cimd, ME).status == 200 and "unconfirmed" not in ask(cimd, ME).words


@pytest.mark.parametrize("how", AWAY)
def test_S15_an_origin_that_fails_is_no_document_where_there_never_was_one(cimd, web, how, monkeypatch):
    monkeypatch.setattr(fjmcp_broker.PublicWeb, "SECONDS", 0.5 if how == "silent" else 5.0)
    away(web, how)
    assert refused(cimd, ME)


@pytest.mark.parametrize(
    "change",
    [
        {"status": 404},
        {"status": 410},
        {"status": 401},
        {"status": 400},
        {"status": 204},
        {"status": 302, "headers": (("Location", ME),)},
        {"kind": "text/html"},
        {"document": {**MINE, "client_id": ME + "x"}},
        {"document": {**MINE, "client_secret": "s"}},
        {"document": b"<h1>Welcome</h1>"},
        {"document": b"{" + b" " * 6000 + b"}"},
        {"names": ["10.0.0.1"]},
        {"names": [PUBLIC, "127.0.0.1"]},
    ],
)
def test_S15_what_an_origin_says_counts_at_once_and_no_later_failure_takes_it_back(cimd, web, change):
    web.publish(MINE)
    assert ask(cimd, ME).status == 200
    cimd.clock.advance(4000)
    web.names |= {"app.example": change.pop("names")} if "names" in change else {}
    web.publish(change.pop("document", MINE), ME, **change)
    assert refused(cimd, ME)
    web.names.clear()
    web.publish(MINE, status=503)
    cimd.clock.advance(61)
    assert refused(cimd, ME)


def test_S08_every_checked_address_is_tried_in_turn_within_one_deadline(authority, web, monkeypatch):
    web.publish(MINE)
    dead = ["2606:4700::6812:1", "93.184.216.35", "93.184.216.36", "93.184.216.37"]
    web.refused.update(dead)
    web.names["app.example"] = [*dead, PUBLIC]
    assert web.guarded().get(ME, 5120).status == 200
    assert [address for address, port in web.connected] == [*dead, PUBLIC]
    web.connected.clear()
    web.patience.clear()
    web.silent.update(dead)
    web.refused.clear()
    monkeypatch.setattr(fjmcp_broker.PublicWeb, "SECONDS", 4.0)
    assert web.guarded().get(ME, 5120).status == 200
    assert [address for address, port in web.connected] == [*dead, PUBLIC]
    assert sum(web.patience[:-1]) < 3.0
    web.silent.add(PUBLIC)
    web.patience.clear()
    with pytest.raises(fjmcp_broker.FetchFailed) as failed:
        web.guarded().get(ME, 5120)
    assert failed.value.away and sum(web.patience) <= 4.0 and len(web.patience) == 5


def test_S08_an_address_where_no_tls_is_spoken_is_left_for_the_next(web, monkeypatch):
    web.publish(MINE)
    web.names["app.example"] = ["93.184.216.35", PUBLIC]
    web.deaf.add("93.184.216.35")
    monkeypatch.setattr(fjmcp_broker.PublicWeb, "SECONDS", 4.0)
    assert web.guarded().get(ME, 5120).status == 200 and len(web.connected) == 2


def test_S08_an_address_with_another_names_certificate_ends_the_search(web):
    url = web.publish({**MINE, "client_id": "https://other.example/c"})
    web.names["other.example"] = [PUBLIC, "93.184.216.35"]
    with pytest.raises(fjmcp_broker.FetchFailed) as failed:
        web.guarded().get(url, 5120)
    assert not failed.value.away and web.connected == [(PUBLIC, 443)]


def test_S08_a_name_server_that_says_nothing_is_waited_for_within_the_same_deadline(cimd, web, monkeypatch):
    monkeypatch.setattr(fjmcp_broker.PublicWeb, "SECONDS", 0.3)
    silent = [f"h{number}.app.example" for number in range(6)]
    web.names.update((host, lambda: web.ended.wait(30) and []) for host in silent)
    with ThreadPoolExecutor(6) as pool:
        pages = list(pool.map(lambda host: ask(cimd, f"https://{host}/c"), silent))
    assert {page.status for page in pages} == {400}
    assert ask(cimd, web.publish(MINE)).status == 200  # the six are still being looked up
    web.ended.set()


def test_S08_the_look_ups_that_hang_are_bounded_and_forgejos_are_not_among_them(web, monkeypatch):
    monkeypatch.setattr(fjmcp_broker.PublicWeb, "SECONDS", 0.1)
    monkeypatch.setattr(fjmcp_broker, "STRANGERS_LOOKUPS", threading.BoundedSemaphore(2))
    web.names["app.example"] = lambda: web.ended.wait(30) and []
    for _ in range(5):
        with pytest.raises(fjmcp_broker.FetchFailed) as failed:
            web.guarded().get(ME, 5120)
        assert failed.value.away
    assert len(web.resolved) == 2
    assert fjmcp_broker.resolve_until(
        time.monotonic() + 10, "localhost", lambda _: ["::1"], fjmcp_broker.LOOKUPS
    )
    web.ended.set()


def test_S14_one_strangers_slow_documents_leave_room_for_anothers(cimd, web):
    arrived = threading.Semaphore(0)

    def hold(connection):
        arrived.release()
        web.ended.wait(20)

    urls = [f"https://h{number}.app.example/c" for number in range(8)]
    web.answers.update((url, hold) for url in urls)
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, cimd, url, address="203.0.113.9") for url in urls]
        for _ in range(2):
            assert arrived.acquire(timeout=30)
        assert ask(cimd, web.publish(MINE), address="198.51.100.7").status == 200
        assert not arrived.acquire(blocking=False) and not any(each.done() for each in asked)
        web.ended.set()


# -- whether documents can be read from here at all


def advertised(rig):
    return OAuthClient(rig.url).discover()["client_id_metadata_document_supported"]


def test_documents_are_advertised_until_none_could_be_read_for_half_an_hour_and_again_after_one(cimd, web):
    cimd.clock.stop()
    look = cimd.broker.documents.look_out
    assert advertised(cimd) and not look() and advertised(cimd)
    assert set(web.asked) == set(fjmcp_broker.WELL_KNOWN_DOCUMENTS)
    warned = cimd.log.named("client_documents_unreadable")
    assert len(warned) == 1 and all("status 404" in reason for reason in warned[0]["reasons"])
    cimd.clock.advance(1790)
    assert not look() and advertised(cimd)
    cimd.clock.advance(11)
    assert not advertised(cimd)
    cimd.restart()  # does not begin anew
    assert not advertised(cimd) and not cimd.broker.documents.look_out()
    assert ask(cimd, web.publish(MINE)).status == 200 and advertised(cimd)
    assert cimd.broker.documents.look_out() and advertised(cimd)
    cimd.restart()
    assert advertised(cimd)


@pytest.mark.parametrize("good", range(3))
def test_one_document_that_can_be_read_is_enough(cimd, web, good):
    cimd.broker.documents.look_out()
    cimd.clock.advance(1801)
    url = fjmcp_broker.WELL_KNOWN_DOCUMENTS[good]
    web.publish(next(document for document in DOCUMENTS.values() if document["client_id"] == url))
    assert not advertised(cimd) and cimd.broker.documents.look_out() and advertised(cimd)


def test_after_a_login_failed_for_a_document_documents_are_not_advertised_until_one_was_read(cimd, web):
    web.publish(b"no", ME, status=403)
    assert advertised(cimd) and refused(cimd, ME) and not advertised(cimd)
    web.publish(DOCUMENTS["vscode"])
    assert cimd.broker.documents.look_out() and advertised(cimd)
    cimd.clock.advance(61)
    assert refused(cimd, ME) and advertised(cimd)  # that one's trouble: others can be read


def test_what_a_stranger_publishes_wrongly_says_nothing_of_this_server(cimd, web):
    for number, status in enumerate((200, 404, 301)):
        web.publish(b"x", f"https://app.example/{number}", status=status)
        assert refused(cimd, f"https://app.example/{number}")
    assert advertised(cimd)


def test_a_known_client_is_served_where_documents_are_not_advertised(cimd, web):
    web.publish(MINE)
    client = client_of(cimd, MINE)
    client.redeem(code_for(client))
    cimd.restart()
    cimd.broker.documents.look_out()
    web.publish(MINE, status=403)
    cimd.clock.advance(4000)
    assert not advertised(cimd) and ask(cimd, ME).status == 200 and client.refresh().status == 200


def test_S16_token_and_refresh_fetch_nothing_and_go_on_while_the_document_is_away(cimd, web):
    web.publish(MINE, headers=(("Cache-Control", "max-age=60"),))
    client = client_of(cimd, MINE)
    code = code_for(client)
    web.publish(MINE, status=500)
    assert client.redeem(code).status == 200
    cimd.clock.advance(3000)
    assert ask(cimd, ME).status == 200
    asked = len(web.asked)
    assert client.refresh().status == 200 and len(web.asked) == asked


def test_S17_all_failures_look_alike(cimd, web):
    web.names |= {"private.app.example": ["10.0.0.1"], "gone.app.example": []}
    web.answers["https://cut.app.example/c"] = lambda connection: None
    hosts = ("private", "gone", "cut", "missing", "forbidden")
    pages = [ask(cimd, f"https://{host}.app.example/c") for host in hosts]
    assert len({page.text.replace(page.headers["X-Request-Id"], "") for page in pages}) == 1


def test_S18_switched_off_a_url_is_an_unknown_client_and_nothing_is_advertised(make_rig, web):
    rig = make_rig(web=web.guarded(), client_documents="off")
    assert ask(rig, web.publish(MINE)).status == 400 and not web.resolved
    metadata = OAuthClient(rig.url).discover()
    assert metadata["client_id_metadata_document_supported"] is False
    assert "private_key_jwt" not in metadata["token_endpoint_auth_methods_supported"]


def test_S19_an_answer_that_stays_on_the_device_is_warned_of(cimd, web):
    web.publish({**MINE, "redirect_uris": ["http://localhost/callback", "https://app.example/cb"]})
    page = ask(cimd, ME, "http://localhost:3118/callback")
    assert "http://localhost:3118/callback" in page.words and "Any program on this device" in page.words
    assert "Any program on this device" not in ask(cimd, ME).words


# -- private_key_jwt


def chatgpt(rig, web, key):
    """ChatGPT's document with a key, and its client.

    And a function that makes the fields of a fresh assertion.
    """
    document = DOCUMENTS["chatgpt"]
    web.publish(document)
    web.publish({"keys": [{"kty": "EC", "crv": "P-256", "x": "x", "y": "y"}, key.jwk]}, document["jwks_uri"])
    client = client_of(rig, document)
    numbers = iter(range(1000))

    def assertion(header=None, block=None, signer=key, **claims):
        now = rig.clock.now()
        claims = {
            "iss": client.client_id,
            "sub": client.client_id,
            "aud": rig.url,
            "iat": now,
            "exp": now + 60,
            "jti": str(next(numbers)),
            **claims,
        }
        claims = {name: value for name, value in claims.items() if value is not None}
        return {"client_assertion": signer.jwt(claims, header, block), "client_assertion_type": JWT_BEARER}

    return document, client, assertion


@pytest.fixture
def proven(cimd, web, key):
    """A client logged in with an assertion, and the function that makes more."""
    _, client, assertion = chatgpt(cimd, web, key)
    assert client.redeem(code_for(client), **assertion()).status == 200
    return client, assertion


@pytest.mark.parametrize(
    "claims",
    [
        {"iss": "https://evil.example/c"},
        {"iss": None},
        {"sub": "https://app.example/c"},
        {"aud": "https://other.example"},
        {"aud": None},
        {"aud": []},
        {"aud": 5},
        {"aud": {"x": 1}},
        {"exp": None},
        {"exp": 0},
        {"exp": "x"},
        {"exp": 4e9},
        {"exp": True},
        {"nbf": 4e9},
        {"nbf": "x"},
    ],
)
def test_an_assertion_for_another_server_client_or_time_proves_nothing(proven, claims):
    client, assertion = proven
    answer = client.refresh(**assertion(**claims))
    assert answer.status == 401 and answer.json()["error"] == "invalid_client"


def test_an_assertion_must_not_mix_our_audience_with_anothers(cimd, proven):
    client, assertion = proven
    assert client.refresh(**assertion(aud=[cimd.url, "https://other.example"])).status == 401
    for audience in (cimd.url + "/oauth/token", cimd.url + "/token", [cimd.url]):
        assert client.refresh(**assertion(aud=audience)).status == 200


@pytest.mark.parametrize(
    "header",
    [{"alg": "none"}, {"alg": "HS256"}, {"alg": "RS512"}, {"alg": None}, {"crit": ["x"]}, {"kid": "other"}],
)
def test_an_assertion_with_another_algorithm_or_key_proves_nothing(proven, header):
    client, assertion = proven
    assert client.refresh(**assertion(header=header)).status == 401


@pytest.mark.parametrize(
    "damage",
    [
        lambda jwt: jwt.rpartition(".")[0] + ".",
        lambda jwt: jwt[:-4] + "AAAA",
        lambda jwt: "a.b",
        lambda jwt: "a.b.c.d",
        lambda jwt: jwt + "=",
        lambda jwt: "x" * 9000,
        lambda jwt: jwt.replace(".", "", 1),
        lambda jwt: "ä.ä.ä",
        lambda jwt: "W10.W10.AA",
    ],
)
def test_a_damaged_assertion_proves_nothing(proven, damage):
    client, assertion = proven
    fields = assertion()
    assert client.refresh(**{**fields, "client_assertion": damage(fields["client_assertion"])}).status == 401
    assert client.refresh(**{**fields, "client_assertion_type": "other"}).status == 401
    assert client.refresh(**fields).status == 200


@pytest.mark.parametrize(
    "forge",
    [
        lambda key, message: key.block(message)[:2] + b"\xfe" + key.block(message)[3:],
        lambda key, message: (
            key.block(message)[:11] + b"\0" + key.block(message)[-51:] + b"\0" * (key.size - 63)
        ),
        lambda key, message: b"\0\2" + key.block(message)[2:],
        lambda key, message: key.block(message).replace(bytes.fromhex("0500"), bytes.fromhex("0501")),
        lambda key, message: b"\0" * (key.size - 32) + key.block(message)[-32:],
    ],
)
def test_the_whole_padded_block_counts_not_what_can_be_found_in_it(proven, key, forge):
    client, assertion = proven
    assert client.refresh(**assertion(block=lambda message: forge(key, message))).status == 401


@pytest.mark.parametrize("sub", ["\ud800", 5, None, "", ["x"], "https://app.example/unknown"])
def test_an_assertion_that_names_no_client_of_ours_is_refused(rig, key, sub):
    client = OAuthClient(rig.url)
    client.discover()
    fields = {"client_assertion": key.jwt({"iss": sub, "sub": sub}), "client_assertion_type": JWT_BEARER}
    assert client.refresh(client_id=None, refresh_token="x", **fields).json()["error"] in (
        "invalid_request",
        "invalid_client",
    )


def test_an_assertion_is_good_once_also_over_a_restart_and_without_a_jti(cimd, proven):
    client, assertion = proven
    for fields in (assertion(), assertion(jti=None)):
        assert client.refresh(**fields).status == 200
        assert client.refresh(**fields).status == 401
    fields = assertion()
    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(lambda _: client.refresh(**fields).status, range(8))) == [200] + [401] * 7
    cimd.restart()
    assert client.refresh(**fields).status == 401


def test_an_unknown_key_is_looked_for_at_most_once_a_minute_and_a_new_one_found(cimd, web, proven, key):
    client, assertion = proven
    newer = RsaKey(kid="k2")
    jwks = DOCUMENTS["chatgpt"]["jwks_uri"]
    before = web.asked.count(jwks)
    for _ in range(5):
        assert client.refresh(**assertion(signer=newer)).status == 401
    assert web.asked.count(jwks) == before == 1
    web.publish({"keys": [key.jwk, newer.jwk]}, jwks)
    cimd.clock.advance(61)
    assert client.refresh(**assertion(signer=newer)).status == client.refresh(**assertion()).status == 200
    assert web.asked.count(jwks) == 2


def test_keys_that_cannot_be_read_are_our_trouble_and_known_ones_go_on(cimd, web, proven):
    client, assertion = proven
    web.publish({}, DOCUMENTS["chatgpt"]["jwks_uri"], status=500)
    cimd.clock.advance(61)
    answer = client.refresh(**assertion(header={"kid": "new"}))
    assert answer.status == 503 and answer.headers["Retry-After"]
    assert client.refresh(**assertion()).status == 200


@pytest.mark.parametrize("status", [403, 429, 500, 503])
def test_keys_whose_origin_fails_serve_for_a_day_and_then_nobody_is_let_in_by_them(cimd, web, proven, status):
    client, assertion = proven
    client.refresh(**assertion())
    cimd.clock.advance(3500)
    web.publish(b"", DOCUMENTS["chatgpt"]["jwks_uri"], status=status)
    for _ in range(23):
        cimd.clock.advance(3600)
        assert client.refresh(**assertion()).status == 200
    cimd.clock.advance(200)
    answer = client.refresh(**assertion())
    assert answer.status == 503 and answer.headers["Retry-After"]
    cimd.restart()
    assert client.refresh(**assertion()).status == 503


@pytest.mark.parametrize("change", [{"status": 404}, {"status": 302}, {"kind": "text/html"}])
def test_keys_that_their_origin_no_longer_names_let_nobody_in(cimd, web, proven, key, change):
    client, assertion = proven
    web.publish({"keys": [key.jwk]}, DOCUMENTS["chatgpt"]["jwks_uri"], **change)
    cimd.clock.advance(3601)
    assert client.refresh(**assertion()).status == 503
    web.publish({"keys": [key.jwk]}, DOCUMENTS["chatgpt"]["jwks_uri"])
    cimd.clock.advance(61)
    assert client.refresh(**assertion()).status == 200


def test_keys_dropped_by_the_client_are_dropped_here_within_a_day(cimd, web, proven):
    client, assertion = proven
    web.publish({"keys": []}, DOCUMENTS["chatgpt"]["jwks_uri"])
    cimd.clock.advance(86401)
    assert client.refresh(**assertion()).status == 401


@pytest.mark.parametrize(
    "bits, e, usable",
    [
        (1024, 65537, False),
        (4096, 65537, True),
        (4098, 65537, False),
        (2048, 1, False),
        (2048, 2**32 + 1, False),
    ],
)
def test_keys_have_2048_to_4096_bits_and_a_sane_exponent(bits, e, usable):
    n = (1 << bits - 1) + 1
    jwk = {
        "kty": "RSA",
        "n": fjmcp_broker.b64url(n.to_bytes((bits + 7) // 8, "big")),
        "e": fjmcp_broker.b64url(e.to_bytes(5, "big")),
    }
    assert len(fjmcp_broker.public_rsa_keys({"keys": [jwk]})) == usable


@pytest.mark.parametrize(
    "uri", ["http://chatgpt.com/k", "https://127.0.0.1/k", "https://chatgpt.com:8443/k", 5]
)
def test_a_jwks_uri_goes_through_the_same_guard(cimd, web, key, uri):
    _, client, assertion = chatgpt(cimd, web, key)
    web.publish({**DOCUMENTS["chatgpt"], "jwks_uri": uri})
    asked = len(web.resolved)
    assert client.redeem(code_for(client), **assertion()).status == 401
    assert len(web.resolved) == asked + 1  # the document only


def test_inline_keys_are_used_as_they_are(cimd, web, key):
    _, client, assertion = chatgpt(cimd, web, key)
    web.publish(
        {
            **{name: value for name, value in DOCUMENTS["chatgpt"].items() if name != "jwks_uri"},
            "jwks": {"keys": [key.jwk]},
        }
    )
    assert client.redeem(code_for(client), **assertion()).status == 200 and len(web.asked) == 1


def test_a_client_without_keys_cannot_use_an_assertion(rig, key):
    client = rig.login()
    claims = {"iss": client.client_id, "sub": client.client_id, "aud": rig.url, "exp": rig.clock.now() + 60}
    assert client.refresh(client_assertion=key.jwt(claims), client_assertion_type=JWT_BEARER).status == 401
    assert client.refresh().status == 200
