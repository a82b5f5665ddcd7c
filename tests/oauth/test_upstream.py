"""The one credential of each user at Forgejo, under load.

Refreshed once, never lost by a race, and each refusal known for what it is.
"""

import contextlib
import socket
import ssl
import subprocess
import threading
import time

import pytest

import fjmcp_broker
from rigs.browser import Browser, BrowserError, approve_login
from rigs.busy_clients import Load, same
from rigs.fake_forgejo import (
    cut_body,
    hang,
    html,
    lose_response,
    oauth_error,
    redirect,
    status,
    truncated_json,
    wrong_content_type,
)
from rigs.mcp_client import ClientError, McpClient, OAuthClient, RpcError
from rigs.processes import ended, in_thread
from rigs.rig import text_of, token_of, who

TOKEN, USERINFO = "/login/oauth/access_token", "/login/oauth/userinfo"
LIST = {"jsonrpc": "2.0", "id": 1, "method": "prompts/list"}
CALL = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "tools/call",
    "params": {"name": "get_my_user_info", "arguments": {}},
}


@pytest.fixture
def lasting(make_rig):
    """A Rig whose own tokens outlive any test, so that only Forgejo's expire."""
    return make_rig(
        access_token_lifetime="60d", session_idle_timeout="60d", max_sessions=30, max_sessions_per_user=30
    )


def refreshes(rig):
    return sum(request.form.get("grant_type") == "refresh_token" for request in rig.forgejo.requests[:])


def spent_tokens(rig):
    """How many refreshes with a stored token were asked for, answered or not; a probe carries none."""
    return sum(
        request.form.get("grant_type") == "refresh_token" and "client_secret" in request.form
        for request in rig.forgejo.requests[:]
    )


def exchanges(rig):
    return sum(request.form.get("grant_type") == "authorization_code" for request in rig.forgejo.requests[:])


def state(rig):
    """What `users` lists of alice."""
    names, rows = rig.broker.store.listing("users", rig.clock.now())
    return next(row[names.index("state")] for row in rows if row[names.index("login")] == "alice")


# -- one refresh for all


def test_20_sessions_of_a_user_around_expiry_make_one_refresh(lasting):
    rig = lasting
    client = rig.login()
    sessions = []
    for _ in range(20):
        sessions.append(McpClient(rig.url + "/mcp", client.tokens["access_token"]))
        sessions[-1].initialize()
    rig.clock.advance(3590)
    barrier, names = threading.Barrier(20), []

    def call(mcp):
        barrier.wait(20)
        names.append(who(mcp))

    with rig.forgejo.hold(TOKEN) as gate:
        joins = [in_thread(call, mcp) for mcp in sessions]
        gate.wait_arrived()
        gate.open()
        assert not [outcome for join in joins if (outcome := join())]
    assert names == ["alice"] * 20
    rig.log.wait("child_stopped", 20)
    assert refreshes(rig) == 1 and rig.forgejo.count(TOKEN) == exchanges(rig) + 1


def test_a_refresh_is_on_disk_before_any_child_has_it(lasting):
    rig = lasting
    mcp = rig.session()
    rig.clock.advance(3590)
    token = token_of(mcp)
    assert refreshes(rig) == 1
    rig.restart()
    assert token_of(same(mcp)) == token and refreshes(rig) == 1


def test_a_credential_of_a_live_login_that_nobody_uses_is_kept_fresh_every_ten_days(lasting):
    rig = lasting
    mcp = rig.session()
    for _ in range(5):
        rig.clock.advance(10 * 86400 + 700)
        done = refreshes(rig)
        rig.log.wait("upstream_refreshed", done + 1)
        ended("refresh")  # it looks whose token it is, which must not be days later
    assert who(same(mcp)) == "alice"  # 50 days, and Forgejo's refresh token dies after 730 hours


# -- logins and refreshes that meet


def test_a_login_that_overtakes_a_refresh_wins_and_nobody_is_logged_out(lasting):
    rig = lasting
    first = rig.session()
    rig.clock.advance(3590)
    gate = rig.forgejo.hold(TOKEN, at="checked")
    rig.tick()
    gate.wait_arrived()  # the refresh has been checked, not yet done
    second = rig.session("alice")
    gate.open()
    rig.log.wait("upstream_refreshed")
    for mcp in (first, second):
        assert who(same(mcp)) == "alice"
    rig.clock.advance(3590)
    for mcp in (first, second):
        assert who(same(mcp)) == "alice"
    assert state(rig) == "active"


def test_a_refresh_refused_because_a_login_came_first_logs_nobody_out(lasting):
    rig = lasting
    first = rig.session()
    rig.clock.advance(3590)
    with rig.forgejo.hold(TOKEN) as gate:
        rig.tick()
        gate.wait_arrived()  # the refresh waits before Forgejo's door
        login = in_thread(rig.session, "alice")
        gate.wait_arrived(2)  # and so does the exchange
        gate.open()
    second = login()
    for mcp in (first, second):
        while same(mcp).post(LIST).status == 503:
            rig.clock.advance(1)
        assert who(same(mcp)) == "alice"
    assert state(rig) == "active" and not rig.log.named("logged_out_upstream")


def test_the_exchange_of_a_login_that_ends_badly_replaces_the_credential_all_the_same(lasting):
    rig = lasting
    mcp = rig.session()
    rig.forgejo.inject(USERINFO, status(500, "oops"))
    with pytest.raises((BrowserError, ClientError)):
        rig.login("alice")
    assert exchanges(rig) == 2  # it has killed the older refresh token
    rig.clock.advance(3590)
    assert who(mcp) == "alice" and refreshes(rig) == 1 and state(rig) == "active"


def test_a_login_that_is_abandoned_at_Forgejo_changes_nothing(lasting):
    rig = lasting
    mcp = rig.session()
    other = OAuthClient(rig.url, name="abandoned")
    other.discover()
    other.register()
    with pytest.raises(BrowserError):
        approve_login(Browser(), other.authorize_url(), "alice", "wrong password")
    rig.clock.advance(3590)
    assert who(mcp) == "alice" and exchanges(rig) == 1 and refreshes(rig) == 1


def test_a_login_whose_exchange_never_answers_leaves_the_others_working(lasting):
    rig = lasting
    mcp = rig.session()
    rig.forgejo.inject(TOKEN, lose_response())
    with pytest.raises((BrowserError, ClientError)):
        rig.login("alice")
    assert who(mcp) == "alice"  # until its token ends: the refresh token died with the answer that was lost
    rig.clock.advance(3700)
    assert same(mcp).post(CALL).status == 401
    rig.login("alice")
    assert who(same(mcp)) == "alice"


# -- what is lost is said once, and one login revives all


@pytest.mark.parametrize("lost", [lose_response, cut_body, wrong_content_type, truncated_json])
def test_a_lost_refresh_answer_is_one_clean_401_and_invalid_grant_and_one_login_revives_every_client(
    lasting, lost
):
    rig = lasting
    sessions = [rig.session("alice") for _ in range(3)]
    rig.forgejo.inject(TOKEN, lost())
    rig.clock.advance(3590)
    rig.tick()
    rig.forgejo.wait_for(lambda request: request.form.get("grant_type") == "refresh_token")
    while state(rig) == "active":  # transient at first: the same token is tried again, and only then refused
        rig.clock.advance(1)
        rig.tick()
    bob = rig.session("bob")  # not before: the lost answer must be alice's
    for mcp in sessions:
        refused = same(mcp).post(CALL)
        assert refused.status == 401 and 'error="invalid_token"' in refused.headers["WWW-Authenticate"]
        answer = mcp.oauth.refresh()
        assert answer.status == 400 and answer.json()["error"] == "invalid_grant"
    assert len(rig.log.wait("logged_out_upstream")) == 1
    asked = rig.forgejo.count(TOKEN)
    rig.login("alice")
    assert [who(same(mcp)) for mcp in (*sessions, bob)] == ["alice"] * 3 + ["bob"]
    assert all(mcp.oauth.refresh().status == 200 for mcp in sessions)
    assert exchanges(rig) == 3 + 1 + 1 and rig.forgejo.count(TOKEN) - asked == 1  # the login


def test_a_refresh_lost_between_Forgejos_answer_and_our_disk_is_known_as_our_own_doing(lasting, monkeypatch):
    def full(*_arguments):
        raise fjmcp_broker.StoreUnavailable("database or disk is full")

    rig = lasting
    mcp = rig.session()
    with rig.forgejo.hold(TOKEN, at="checked") as gate:
        rig.clock.advance(3590)
        call = in_thread(same(mcp).post, CALL)
        gate.wait_arrived()
        monkeypatch.setattr(
            rig.broker.store, "save_credential", full
        )  # between Forgejo's answer and our disk
        gate.open()
        assert call().status == 503
    rig.broker.reaper.stop()
    ended("reaper", "refresh")  # else the first broker refreshes beside the second
    before = rig.log
    rig.restart()
    assert same(mcp).post(CALL).status == 401
    # The reaper of the first broker may have tried the spent token again before it was stopped.
    told = before.named("logged_out_upstream") or rig.log.wait("logged_out_upstream")
    assert told[0]["interrupted"] is True
    rig.login("alice")
    assert who(same(mcp)) == "alice"


# -- Forgejo in trouble


FAULTS = {
    "502": lambda: status(502, "<html>bad gateway", "text/html"),
    "429": lambda: status(429, {"error": "invalid_grant"}),
    "a page": html,
    "a redirect": lambda: redirect("/elsewhere"),
    "503 as JSON": lambda: status(503, {"error": "invalid_grant"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_K19_what_says_nothing_about_the_login_logs_nobody_out(lasting, fault):
    rig = lasting
    mcp = rig.session()
    rig.clock.stop()
    rig.forgejo.inject(TOKEN, FAULTS[fault](), times=None)
    rig.clock.advance(3590)
    assert who(mcp) == "alice"  # the token still has ten seconds
    rig.clock.advance(30)
    refused = same(mcp).post(CALL)
    assert (
        refused.status == 503
        and refused.json()["error"]["data"]["reason"] == "upstream_down"
        and "Retry-After" in refused.headers
    )
    assert mcp.oauth.refresh().status == 200 and state(rig) == "active"
    rig.forgejo.clear_faults()
    rig.clock.advance(61)
    assert who(same(mcp)) == "alice"


def test_Forgejo_away_for_an_hour_logs_nobody_out_and_is_not_hammered(lasting):
    rig = lasting
    sessions = [rig.session(name) for name in ("alice", "bob")]
    rig.clock.advance(3590)
    rig.forgejo.inject(TOKEN, status(502, "away", "text/plain"), times=None)
    before = spent_tokens(rig)
    for _ in range(360):
        rig.clock.advance(10)
        rig.tick()
        ended("refresh")
    for mcp in sessions:
        assert same(mcp).post(CALL).status == 503
        assert mcp.oauth.refresh().status == 200
    asked = spent_tokens(rig) - before
    assert 2 * 45 <= asked <= 2 * 75  # two users, 1 s doubling to 60 s
    assert state(rig) == "active" and not rig.log.named("logged_out_upstream")
    rig.forgejo.clear_faults()
    rig.clock.advance(61)
    assert [who(same(mcp, mcp.oauth.tokens["access_token"])) for mcp in sessions] == ["alice", "bob"]


def test_an_outage_shorter_than_the_tokens_life_is_not_noticed(lasting):
    rig = lasting
    mcp = rig.session()
    rig.clock.advance(3400)
    rig.forgejo.inject(TOKEN, status(502, "away", "text/plain"), times=None)
    with Load([mcp], lambda client, _: who(client)) as load:
        for _ in range(10):
            load.wait(3)
            rig.clock.advance(10)
            rig.tick()
        rig.forgejo.clear_faults()
        rig.clock.advance(60)
        rig.tick()
        rig.log.wait("upstream_refreshed")
        load.wait(3)
    assert not load.failures


# -- each refusal is known for what it is


def test_X10_a_suspended_user_is_shut_out_and_let_in_again(lasting):
    rig = lasting
    mcp, bob = rig.session(), rig.session("bob")
    rig.forgejo.suspend("alice")
    rig.clock.advance(3590)
    while same(mcp).post(LIST).status != 401:
        rig.tick()
    assert state(rig) in ("suspended", "logged_out") and who(bob) == "bob"
    assert mcp.oauth.refresh().json()["error"] == "invalid_grant"
    with pytest.raises((BrowserError, ClientError)):
        rig.login("alice")
    rig.forgejo.unsuspend("alice")
    rig.login("alice")
    assert who(same(mcp)) == "alice"


def test_a_page_instead_of_userinfo_alone_does_not_make_anybody_suspended(lasting):
    rig = lasting
    mcp = rig.session()
    rig.forgejo.inject(USERINFO, html(), times=None)  # a proxy's page; the API still knows the token
    rig.clock.advance(3590)
    assert who(mcp) == "alice"
    rig.log.wait("upstream_refreshed")
    assert state(rig) == "active" and who(same(mcp)) == "alice"


def test_a_revoked_grant_is_a_logout_of_that_user_only(lasting):
    rig = lasting
    mcp, bob = rig.session(), rig.session("bob")
    rig.forgejo.revoke_grant("alice", rig.app.client_id)
    rig.clock.advance(3590)
    while same(mcp).post(LIST).status != 401:
        rig.tick()
    assert rig.log.wait("logged_out_upstream")[0]["user"] == rig.forgejo._need_user("alice").sub
    assert who(bob) == "bob"
    rig.login("alice")
    assert who(same(mcp)) == "alice"


def test_J25_a_tools_error_that_is_Forgejo_refusing_the_token_is_looked_into_once_a_minute(lasting):
    rig = lasting
    mcp = rig.session()
    rig.forgejo.revoke_grant("alice", rig.app.client_id)
    answer = same(mcp).post(CALL)  # the child's own words pass; the broker asks Forgejo itself
    assert answer.status == 200 and "fja_" not in answer.text
    rig.log.wait("logged_out_upstream")
    assert same(mcp).post(CALL).status == 401
    asked = rig.forgejo.count("/api/v1/user", "GET")
    bob = rig.session("bob")
    for _ in range(5):
        with pytest.raises(RpcError):
            bob.call_tool("get_error")
    rig.forgejo.wait_for(lambda request: request.path == "/api/v1/user" and request.auth_user == "bob")
    assert rig.forgejo.count("/api/v1/user", "GET") == asked + 1 and who(bob) == "bob"


def test_a_deleted_application_is_the_operators_fault_and_logs_nobody_out(lasting):
    rig = lasting
    mcp = rig.session()
    rig.forgejo.delete_app(rig.app.client_id)
    rig.clock.advance(3700)
    refused = same(mcp).post(CALL)
    assert refused.status == 503 and refused.json()["error"]["data"]["reason"] == "upstream_misconfigured"
    assert rig.log.wait("forgejo_refuses_client")[0]["level"] == "error"
    assert state(rig) == "active"


def test_a_rotated_secret_is_the_operators_fault_and_heals_with_the_new_one(lasting):
    rig = lasting
    mcp = rig.session()
    secret = rig.forgejo.rotate_secret(rig.app.client_id)
    rig.clock.advance(3700)
    refused = same(mcp).post(CALL)
    assert refused.status == 503 and refused.json()["error"]["data"]["reason"] == "upstream_misconfigured"
    assert rig.log.wait("forgejo_refuses_client")[0]["level"] == "error"
    assert mcp.oauth.refresh().status == 200 and state(rig) == "active"
    rig.values["forgejo_oauth_client_secret"] = secret
    rig.restart()
    assert who(same(mcp)) == "alice"


def test_a_refusal_is_believed_only_of_the_credential_that_is_stored(lasting):
    rig = lasting
    mcp = rig.session()
    refusal = rig.forgejo.inject(TOKEN, oauth_error("invalid_grant", "as if"), method="POST")
    rig.clock.advance(3590)
    rig.tick()
    refusal.wait_hit()
    rig.log.wait("logged_out_upstream")
    rig.login("alice")
    assert who(same(mcp)) == "alice" and state(rig) == "active"


def test_P20_X11_a_child_never_works_with_an_expired_token(lasting):
    rig = lasting
    mcp = rig.session()
    seen = []
    for _ in range(6):
        rig.clock.advance(3590)
        mcp.oauth.refresh()
        seen.append(text_of(same(mcp, mcp.oauth.tokens["access_token"]).call_tool("get_my_user_info")))
    assert all('"login": "alice"' in text for text in seen)


def test_a_user_no_longer_allowed_is_shut_out_at_the_next_refresh(make_rig):
    rig = make_rig(access_token_lifetime="60d", allowed_groups="staff")
    rig.forgejo._need_user("alice").groups.append("staff")
    mcp = rig.session()
    rig.forgejo._need_user("alice").groups.remove("staff")
    rig.clock.advance(3590)
    while same(mcp).post(LIST).status != 401:
        rig.tick()
    assert state(rig) == "refused"
    assert [record["reason"] for record in rig.log.named("access_refused")] == [
        "no longer among the allowed users and groups"
    ]


# -- which credential is the newer one


def test_a_login_after_Forgejo_was_restored_counts_though_its_grants_have_lower_numbers(lasting):
    rig = lasting
    kept = rig.forgejo.backup()
    for _ in range(2):
        mcp = rig.session()
        rig.forgejo.revoke_grant("alice", rig.app.client_id)
    mcp = rig.session()  # the third grant's number is the highest that Forgejo gave
    rig.forgejo.restore(kept)
    rig.clock.advance(3700)
    assert same(mcp).post(CALL).status == 401
    rig.login()
    assert who(same(mcp)) == "alice"
    rig.clock.advance(3700)
    assert who(same(mcp)) == "alice"


def test_of_two_logins_that_overlap_the_one_Forgejo_counted_later_is_kept(lasting):
    rig = lasting
    gate = rig.forgejo.hold(TOKEN, method="POST")
    first = in_thread(rig.login)
    gate.wait_arrived()
    second = in_thread(rig.login)
    gate.wait_arrived(2)
    answered = rig.forgejo.inject(TOKEN, hang(processed=True))  # whichever is first, its answer comes last
    gate.let(1)
    answered.wait_hit()
    gate.open()
    rig.forgejo.wait_for(lambda request: request.path == TOKEN and request.status == 200)
    rig.log.wait("token_issued")
    answered.release()
    first(), second()
    row = rig.broker.store.user(rig.forgejo._need_user("alice").sub)
    assert row.credential_count == rig.forgejo.grant_of("alice", rig.app.client_id).counter == 2


def test_a_login_saves_its_credential_once(lasting, monkeypatch):
    rig = lasting
    rig.login()
    saved, real = [], rig.broker.store.save_credential
    monkeypatch.setattr(
        rig.broker.store, "save_credential", lambda *given: saved.append(given[0]) or real(*given)
    )
    rig.login()
    rig.login("bob")
    assert saved == [rig.forgejo._need_user(name).sub for name in ("alice", "bob")]


def test_a_refusal_is_believed_once_the_callbacks_of_that_moment_have_ended_whatever_comes_after(lasting):
    rig = lasting
    mcp = rig.session()
    rig.forgejo.revoke_grant("alice", rig.app.client_id)
    rig.clock.advance(3590)
    upstream, sub = rig.broker.upstream, rig.forgejo._need_user("alice").sub
    with upstream.callback():
        with pytest.raises(fjmcp_broker.UpstreamDown):
            upstream.refresh(sub)
        rubbish = upstream.callback()
        rubbish.__enter__()  # and one is always under way from now on
        rig.clock.advance(5)
        with pytest.raises(fjmcp_broker.UpstreamDown):
            upstream.refresh(sub)
        assert state(rig) == "active"
    assert state(rig) == "logged_out" and len(rig.log.named("logged_out_upstream")) == 1
    assert same(mcp).post(CALL).status == 401
    rubbish.__exit__(None, None, None)


def test_a_refusal_does_not_count_when_a_callback_of_that_moment_brought_another_credential(lasting):
    rig = lasting
    mcp = rig.session()
    rig.clock.advance(3590)
    rig.forgejo.inject(TOKEN, oauth_error("invalid_grant", "replaced by the login"), method="POST")
    upstream, sub = rig.broker.upstream, rig.forgejo._need_user("alice").sub
    with upstream.callback():
        with pytest.raises(fjmcp_broker.UpstreamDown):
            upstream.refresh(sub)
        rig.login()
    assert state(rig) == "active" and who(same(mcp)) == "alice"


# -- an outage, from its first minute to its end


@pytest.mark.parametrize("fault", [*FAULTS, "an access_denied of a filter"])
def test_an_outage_of_the_token_endpoint_beyond_the_tokens_life_logs_nobody_out(lasting, fault):
    rig = lasting
    mcp = rig.session()
    made = FAULTS.get(fault, lambda: status(403, {"error": "access_denied"}))
    rig.forgejo.inject(TOKEN, made(), times=None)
    rig.clock.advance(3599)
    same(mcp).post(CALL)
    rig.clock.advance(2)
    # A call that was let in just before sees the API refuse
    # the token that ran out; that says nothing of the login.
    assert rig.broker.upstream.examine(rig.forgejo._need_user("alice").sub) == "unknown"
    assert same(mcp).post(CALL).status == 503 and state(rig) == "active"
    rig.forgejo.clear_faults()
    rig.clock.advance(60)
    assert who(same(mcp)) == "alice"


def test_once_Forgejo_answers_again_every_session_is_served_within_ten_seconds(lasting):
    rig = lasting
    sessions = [rig.session(name) for name in ("alice", "bob")]
    rig.clock.advance(3700)
    rig.forgejo.inject(TOKEN, status(502, "away", "text/plain"), times=None)
    for _ in range(60):
        rig.clock.advance(10)
        rig.tick()
        ended("refresh", "probe")
    assert [same(mcp).post(CALL).status for mcp in sessions] == [503, 503]
    rig.forgejo.clear_faults()
    rig.clock.advance(4)
    rig.tick()
    rig.log.wait("forgejo_answers_again")
    assert [who(same(mcp)) for mcp in sessions] == ["alice", "bob"]
    assert len(rig.log.named("forgejo_answers_again")) == 1


def test_a_probe_spends_no_token_and_carries_no_secret(lasting):
    rig = lasting
    rig.session()
    rig.clock.advance(3700)
    rig.forgejo.inject(TOKEN, status(502), times=None)
    with contextlib.suppress(fjmcp_broker.UpstreamDown):
        rig.broker.upstream.refresh(rig.forgejo._need_user("alice").sub)
    rig.tick()
    probe = rig.forgejo.wait_for(lambda request: request.form.get("refresh_token") == "probe")
    assert set(probe.form) == {"grant_type", "client_id", "refresh_token"}
    assert "authorization" not in probe.headers
    ended("probe")


def test_a_session_whose_child_could_not_start_while_Forgejo_was_away_wakes_soon_after(lasting):
    rig = lasting
    mcp = rig.session()
    rig.broker.sessions.all()[0].backends.sleep("test")
    rig.forgejo.inject("/api/v1/version", status(502, "away", "text/plain"), times=None)
    for _ in range(8):
        assert same(mcp).post(CALL).json()["error"]["data"]["reason"] == "upstream_down"
    session = rig.broker.sessions.all()[0]
    assert session.backends.retry_at - time.monotonic() <= 5
    session.backends.retry_at = 0.0  # as if these seconds had passed
    rig.forgejo.clear_faults()
    assert who(same(mcp)) == "alice"


# -- what the operator and the client are told


@pytest.mark.parametrize("wrong", ["client", "secret"])
def test_a_wrong_client_id_or_secret_is_never_called_a_Forgejo_that_cannot_be_reached(lasting, wrong):
    rig = lasting
    mcp = rig.session()
    if wrong == "secret":
        rig.forgejo.rotate_secret(rig.app.client_id)
    else:
        rig.forgejo.delete_app(rig.app.client_id)
    rig.clock.advance(3700)
    for _ in range(3):  # the second and third are answered from the wait after the first
        refused = same(mcp).post(CALL)
        assert refused.status == 503 and "Retry-After" in refused.headers
        assert refused.json()["error"]["data"]["reason"] == "upstream_misconfigured"
        assert "reached" not in refused.text and "registration" in refused.text
    with pytest.raises((BrowserError, ClientError)) as error:
        rig.login("bob")
    assert "reached" not in str(error.value)
    records = rig.log.named("forgejo_refuses_client")
    assert records and all(record["level"] == "error" for record in records)


@pytest.mark.parametrize("where", ["login", "refresh", "userinfo", "introspection"])
def test_why_Forgejo_could_not_be_asked_is_a_warning_at_most_once_a_minute_of_a_kind(lasting, where):
    rig = lasting
    mcp = rig.session()
    path = {"login": TOKEN, "refresh": TOKEN, "userinfo": USERINFO}.get(where, "/login/oauth/introspect")
    rig.clock.stop()
    rig.forgejo.inject(path, redirect("https://sso.example.org/wall?next=secret"), times=None)
    told = lambda: [r for r in rig.log.named("forgejo_cannot_be_asked") if r["where"] == where]  # noqa: E731
    for _ in range(3):
        if where in ("login", "introspection"):
            with contextlib.suppress(BrowserError, ClientError):
                rig.login("bob")
        else:
            rig.clock.advance(3600 if not told() else 1)
            with contextlib.suppress(fjmcp_broker.UpstreamDown):
                rig.broker.upstream.refresh(rig.forgejo._need_user("alice").sub)
    (record,) = told()
    assert record["level"] == "warning" and "303 to https://sso.example.org/wall" in record["reason"]
    assert "secret" not in record["reason"]
    rig.clock.advance(61)
    if where in ("login", "introspection"):
        with contextlib.suppress(BrowserError, ClientError):
            rig.login("bob")
    else:
        with contextlib.suppress(fjmcp_broker.UpstreamDown):
            rig.broker.upstream.refresh(rig.forgejo._need_user("alice").sub)
    assert len(told()) == 2 and mcp.token


def test_a_home_made_authority_is_trusted_though_its_certificates_lack_extensions(tmp_path):
    def openssl(*words):
        subprocess.run(["openssl", *words], check=True, capture_output=True, cwd=tmp_path)

    (tmp_path / "ext").write_text(
        "subjectAltName=DNS:localhost\nauthorityKeyIdentifier=none\nsubjectKeyIdentifier=none\n"
    )
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl(
        "req", "-x509", *curve, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=Home CA"
    )
    openssl("req", *curve, "-keyout", "s.key", "-out", "s.csr", "-subj", "/CN=localhost")
    signing = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "ext")
    openssl("x509", "-req", "-in", "s.csr", *signing, "-out", "s.pem", "-days", "2")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "s.pem", tmp_path / "s.key")

    def serve():
        with context.wrap_socket(listener.accept()[0], server_side=True) as connection:
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        join = in_thread(serve)
        url = f"https://localhost:{listener.getsockname()[1]}/"
        assert fjmcp_broker.fetch("GET", url, ca_file=str(tmp_path / "ca.pem")).status == 200
        join()
    assert not fjmcp_broker.tls_context(str(tmp_path / "ca.pem")).verify_flags & ssl.VERIFY_X509_STRICT


@pytest.mark.parametrize(
    "content, said",
    [(None, "No such file"), ("rubbish\n", "holds no certificate"), ("", "holds no certificate")],
)
def test_a_forgejo_ca_file_that_cannot_be_used_is_named(tmp_path, content, said):
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_text(content)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"https://127.0.0.1:{listener.getsockname()[1]}/"
        with pytest.raises(fjmcp_broker.FetchFailed) as error:
            fjmcp_broker.fetch("GET", url, ca_file=str(path))
    assert str(path) in str(error.value) and said in str(error.value)


def test_a_secret_that_only_introspection_refuses_is_named_as_such(rig):
    rig.forgejo.inject("/login/oauth/introspect", status(401, "no"), times=None)
    rig.login()  # a public application logs in with any secret
    (record,) = rig.log.named("forgejo_refuses_client")
    assert (record["level"], record["where"]) == ("error", "introspection")
    assert "secret" in record["reason"] and not rig.log.named("forgejo_cannot_be_asked")
