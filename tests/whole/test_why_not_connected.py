"""Why could X not connect?

Each way to fail leaves a record that names it, with the id that the answer shows; operate.md has them all.
"""

import base64
import hashlib
import json
import re
from pathlib import Path

import pytest

import fjmcp_broker
from rigs.browser import Browser, approve_login
from rigs.mcp_client import OAuthClient
from rigs.raw_http import ask, get, mcp_post, post

OPERATE = (Path(fjmcp_broker.__file__).parent / "docs/operate.md").read_text()
CHALLENGE = base64.urlsafe_b64encode(hashlib.sha256(b"v" * 43).digest()).rstrip(b"=").decode()


def registered(rig, **more):
    client = OAuthClient(rig.url, name="Test client", **more)
    client.discover()
    client.register()
    return client


def seen(rig, request):
    """The refused record of an answer, by the id that it shows."""
    lines = [json.loads(line) for line in rig.log.text.splitlines()]
    (record,) = [each for each in lines if each["event"] == "refused" and each["request"] == request]
    return record


def authorize(rig, client, without=(), **more):
    values = {
        "client_id": client.client_id,
        "redirect_uri": client.redirect_uri,
        "response_type": "code",
        "code_challenge": CHALLENGE,
        "code_challenge_method": "S256",
        **more,
    }
    query = "&".join(f"{name}={value}" for name, value in values.items() if name not in without)
    return ask(rig, get(rig, f"/oauth/authorize?{query}"))


def token(rig, *lines, **fields):
    body = "&".join(f"{name}={value}" for name, value in fields.items()).encode()
    return ask(
        rig, post(rig, "/oauth/token", body, "Content-Type: application/x-www-form-urlencoded", *lines)
    )


def ping(rig, bearer, *lines, **more):
    return ask(rig, mcp_post(rig, bearer, {"jsonrpc": "2.0", "id": 1, "method": "ping"}, *lines, **more))


FAILURES = {
    "unknown_client": lambda rig, c: authorize(rig, c, client_id="fjd_gone"),
    "redirect_uri": lambda rig, c: authorize(rig, c, redirect_uri="https://evil.example/"),
    "no_pkce": lambda rig, c: authorize(rig, c, without=["code_challenge"]),
    "invalid_target": lambda rig, c: authorize(rig, c, resource="https://other.example/mcp"),
    "unsupported_response_type": lambda rig, c: authorize(rig, c, response_type="token"),
    "repeated": lambda rig, c: authorize(rig, c, without=["scope"], state="x&client_id=y"),
    "expired": lambda rig, c: ask(rig, get(rig, "/oauth/callback?state=gone&code=x")),
    "malformed_answer": lambda rig, c: ask(rig, get(rig, "/oauth/callback?state=gone")),
    "wrong_browser": lambda rig, c: ask(
        rig, post(rig, "/oauth/consent", b"login=x&csrf=y", "Content-Type: application/x-www-form-urlencoded")
    ),
    "foreign_form": lambda rig, c: ask(
        rig, post(rig, "/oauth/consent", b"login=x", "Sec-Fetch-Site: cross-site")
    ),
    "bad_code": lambda rig, c: token(
        rig,
        client_id=c.client_id,
        client_secret=c.client_secret or "",
        grant_type="authorization_code",
        code="fjc_x",
        code_verifier="v" * 43,
    ),
    "bad_refresh_token": lambda rig, c: token(
        rig,
        client_id=c.client_id,
        client_secret=c.client_secret or "",
        grant_type="refresh_token",
        refresh_token="fjr_x",
    ),
    "unsupported_grant_type": lambda rig, c: token(
        rig, client_id=c.client_id, client_secret=c.client_secret or "", grant_type="password"
    ),
    "bad_token": lambda rig, c: ping(rig, "fja_" + "x" * 43),
    "no_token": lambda rig, c: ask(rig, get(rig, "/mcp")),
    "forbidden_origin": lambda rig, c: ping(rig, "x", "Origin: https://evil.example"),
    "misdirected_request": lambda rig, c: ask(
        rig, b"GET /mcp HTTP/1.1\r\nHost: other.example\r\nConnection: close\r\n\r\n"
    ),
    "not_found": lambda rig, c: ask(rig, get(rig, "/nothing")),
    "no_metadata": lambda rig, c: ask(rig, get(rig, "/.well-known/openid-configuration")),
    "method_not_allowed": lambda rig, c: ask(rig, get(rig, "/oauth/token")),
    "bad_request": lambda rig, c: ask(rig, b"GET /mcp HTTP/1.1\r\n\r\n"),
    "version_not_supported": lambda rig, c: ask(rig, b"GET /mcp HTTP/3.0\r\n\r\n"),
    "invalid_redirect_uri": lambda rig, c: ask(
        rig, post(rig, "/oauth/register", b'{"redirect_uris":["javascript:1"]}')
    ),
    "invalid_client_metadata": lambda rig, c: ask(rig, post(rig, "/oauth/register", b"no json")),
}


@pytest.fixture(scope="module")
def client(shared):
    return registered(shared)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    from rigs.rig import Rig

    rig = Rig(tmp_path_factory.mktemp("why"))
    yield rig
    rig.close()


@pytest.mark.parametrize("reason", FAILURES)
def test_the_log_says_why_and_the_answer_shows_the_id(shared, client, reason):
    answer = FAILURES[reason](shared, client)
    request = answer.header("x-request-id")
    record = seen(shared, request)
    assert record["reason"] == reason and record["status"] == answer.status
    assert record["address"] == "127.0.0.1" and record["endpoint"] in fjmcp_broker.REASONS
    assert reason in fjmcp_broker.REASONS[record["endpoint"]]
    assert (record["level"] == "debug") == (reason in fjmcp_broker.ROUTINE_REASONS)
    if "text/html" in (answer.header("content-type") or ""):
        assert request.encode() in answer.body


def test_a_session_that_is_gone_and_an_unknown_revision_are_named(shared):
    mcp = shared.session()
    bearer = mcp.oauth.tokens["access_token"]
    gone = ask(
        shared,
        mcp_post(shared, bearer, {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}, session="x" * 43),
    )
    record = seen(shared, gone.header("x-request-id"))
    assert (record["reason"], record["client"]) == ("session_not_found", mcp.oauth.client_id)
    assert record["user"] == shared.log.named("login")[-1]["user"]


def test_an_expired_token_is_routine_and_a_revoked_one_is_not(make_rig):
    rig = make_rig()
    client = rig.login()
    bearer = client.tokens["access_token"]
    rig.clock.advance(4000)
    assert seen(rig, ping(rig, bearer).header("x-request-id"))["reason"] == "token_expired"
    client.revoke(client.tokens["refresh_token"])
    assert seen(rig, ping(rig, bearer).header("x-request-id"))["reason"] in ("bad_token", "token_expired")


def test_an_account_that_may_not_come_is_named_with_the_client(make_rig):
    rig = make_rig(allowed_users="bob")
    client = registered(rig)
    with pytest.raises(Exception, match="access_denied"):
        client.login(Browser(), "alice", "secret")
    (record,) = [each for each in rig.log.named("refused") if each["reason"] == "account_refused"]
    (audit,) = rig.log.named("access_refused")
    assert record["client"] == client.client_id and audit["login"] == "alice"


def test_a_person_who_refuses_is_named(make_rig):
    rig = make_rig()
    url = registered(rig).authorize_url(state="s")
    assert "access_denied" in approve_login(Browser(), url, "alice", "secret", decision="deny")
    assert [each["reason"] for each in rig.log.named("refused") if each["level"] == "info"] == [
        "access_denied"
    ]


def test_each_reason_stands_in_operate_md_and_no_other():
    section = OPERATE[OPERATE.index("## Why could") : OPERATE.index("## The clock")]
    known = {reason for reasons in fjmcp_broker.REASONS.values() for reason in reasons}
    cells = " ".join(row.split("|")[2] for row in section.splitlines() if row.startswith("| "))
    assert known == set(re.findall(r"`([a-z_]+)`", cells)) - {"endpoint", "reason"}
    assert set(re.findall(r"`([a-z_]+)`\*", cells)) == fjmcp_broker.ROUTINE_REASONS


def test_ten_refusals_a_minute_are_written_and_the_rest_are_counted(make_rig, monkeypatch):
    rig = make_rig()
    for _ in range(25):
        ask(rig, get(rig, "/nothing"))
    assert len(rig.log.named("refused")) == 10
    assert rig.log.metrics.value("fjmcp_refusals_total", ("other", "not_found")) == 25
    now = fjmcp_broker.time.monotonic() + 61
    monkeypatch.setattr(fjmcp_broker.time, "monotonic", lambda: now)
    rig.log.flush()
    monkeypatch.undo()
    assert [each["suppressed"] for each in rig.log.named("refused")[10:]] == [15]


def test_no_more_than_600_refusals_a_minute_are_written_whoever_sends_them(make_rig):
    rig = make_rig()
    for number in range(700):
        rig.log.refused("other", 404, "not_found", f"192.0.2.{number}", {})
    assert len(rig.log.named("refused")) == 600


@pytest.mark.parametrize(
    "allowed, shown", [("full", "127.0.0.1"), ("network", "127.0.0.0/24"), ("off", None)]
)
def test_the_log_says_of_addresses_what_log_addresses_allows(make_rig, allowed, shown):
    rig = make_rig(log_addresses=allowed)
    request = ask(rig, get(rig, "/nothing")).header("x-request-id")
    assert seen(rig, request).get("address") == shown
