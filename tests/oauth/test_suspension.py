"""Suspended, inactive and must-change-password users.

Seen at Forgejo's API alone, shut out while it lasts, and nothing of theirs is lost.
"""

import threading

import pytest

from rigs.browser import BrowserError
from rigs.busy_clients import same
from rigs.fake_forgejo import html, run, status
from rigs.mcp_client import ClientError, RpcError
from rigs.processes import ended
from rigs.rig import who

VERSION = "/api/v1/version"
CALL = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "tools/call",
    "params": {"name": "get_my_user_info", "arguments": {}},
}


@pytest.fixture
def lasting(make_rig):
    """A Rig whose own tokens outlive any test, so that only Forgejo's expire."""
    return make_rig(access_token_lifetime="60d", session_idle_timeout="60d")


def sub_of(rig, login="alice"):
    return rig.forgejo._need_user(login).sub


def user(rig, login="alice"):
    return rig.broker.store.user(sub_of(rig, login))


def refused_call(mcp):
    """A call that the tool answers with an error: the broker then asks Forgejo."""
    with pytest.raises(RpcError):
        same(mcp).call_tool("get_my_user_info")


@pytest.mark.parametrize("trouble", ["suspend", "deactivate", "must_change_password"])
def test_who_may_not_sign_in_is_shut_out_after_a_tools_error_and_nothing_is_deleted(lasting, trouble):
    rig = lasting
    mcp, bob = rig.session(), rig.session("bob")
    grants = rig.broker.store.grants_of(sub_of(rig), rig.clock.now())
    getattr(rig.forgejo, trouble)("alice")
    refused_call(mcp)
    (record,) = rig.log.wait("suspended")
    first = "This account is prohibited from signing in, please contact your site administrator."
    if trouble == "must_change_password":
        first = "You must change your password."
    assert record["reason"] == first == user(rig).status_reason and record["user"] == sub_of(rig)
    refused = same(mcp).post(CALL)
    assert refused.status == 401 and 'error="invalid_token"' in refused.headers["WWW-Authenticate"]
    assert mcp.oauth.refresh().json()["error"] == "invalid_grant"
    assert rig.broker.store.grants_of(sub_of(rig), rig.clock.now()) == grants
    assert rig.broker.store.sessions_of(sub_of(rig)) and who(bob) == "bob"


def test_a_suspension_is_seen_at_the_next_refresh_though_userinfo_and_the_token_endpoint_say_nothing(lasting):
    rig = lasting
    rig.session()
    rig.forgejo.suspend("alice")
    rig.clock.advance(3590)
    rig.tick()
    rig.log.wait("suspended")
    assert user(rig).status == "suspended"


def test_a_child_that_cannot_start_for_a_suspended_user_is_a_401_and_not_a_failing_program(lasting):
    rig = lasting
    mcp = rig.session()
    rig.broker.sessions.all()[0].backends.sleep("test")
    rig.forgejo.suspend("alice")
    assert same(mcp).post(CALL).status == 401
    assert user(rig).status == "suspended"


def test_open_streams_of_a_suspended_user_end_and_those_of_others_do_not(lasting):
    rig = lasting
    mcp, bob = rig.session(), rig.session("bob")
    stream, others = mcp.open_stream(), bob.open_stream()
    rig.forgejo.suspend("alice")
    refused_call(mcp)
    rig.log.wait("suspended")
    assert stream.ended.wait(30)
    assert who(bob) == "bob" and not others.ended.is_set()


def test_open_streams_end_when_Forgejo_ended_the_login(lasting):
    rig = lasting
    mcp = rig.session()
    stream = mcp.open_stream()
    rig.forgejo.revoke_grant("alice", rig.app.client_id)
    refused_call(mcp)
    rig.log.wait("logged_out_upstream")
    assert stream.ended.wait(30)
    assert same(mcp).post(CALL).status == 401


def test_any_request_of_a_suspended_user_asks_again_at_most_once_a_minute_and_a_200_ends_it(lasting):
    rig = lasting
    mcp = rig.session()
    rig.forgejo.suspend("alice")
    refused_call(mcp)
    rig.log.wait("suspended")
    rig.clock.stop()
    rig.clock.advance(61)
    asked = rig.forgejo.count(VERSION)
    for _ in range(4):
        assert same(mcp).post(CALL).status == 401
        assert mcp.oauth.refresh().status == 400
    assert rig.forgejo.count(VERSION) == asked + 1
    rig.forgejo.unsuspend("alice")
    assert same(mcp).post(CALL).status == 401  # the minute is not over
    rig.clock.advance(61)
    assert who(same(mcp)) == "alice" and user(rig).status == "active"
    assert user(rig).status_reason is None and rig.log.named("suspension_ended")


def test_a_refresh_by_the_client_may_be_the_request_that_ends_a_suspension(lasting):
    rig = lasting
    mcp = rig.session()
    rig.forgejo.suspend("alice")
    refused_call(mcp)
    rig.log.wait("suspended")
    rig.forgejo.unsuspend("alice")
    rig.clock.advance(61)
    assert mcp.oauth.refresh().status == 200


def test_a_suspension_ends_also_when_the_access_token_has_run_out_meanwhile(lasting):
    rig = lasting
    mcp = rig.session()
    rig.forgejo.suspend("alice")
    refused_call(mcp)
    rig.log.wait("suspended")
    rig.clock.advance(2 * 86400)
    assert same(mcp).post(CALL).status == 401  # refreshed, and still suspended
    rig.clock.advance(2 * 86400)
    rig.forgejo.unsuspend("alice")
    assert who(same(mcp)) == "alice"


def test_the_login_of_a_suspended_user_fails_with_Forgejos_own_sentence(lasting):
    rig = lasting
    mcp = rig.session()
    rig.forgejo.inject("/login/oauth/access_token", run(lambda: rig.forgejo.suspend("alice")))
    with pytest.raises((BrowserError, ClientError)) as error:
        rig.login("alice")
    assert "access_denied" in str(error.value) and "prohibited from signing in" in str(error.value)
    assert user(rig).status == "suspended" and same(mcp).post(CALL).status == 401
    rig.forgejo.unsuspend("alice")
    rig.login("alice")  # a login ends it, and the exchange that failed had replaced the credential
    assert user(rig).status == "active" and who(same(mcp)) == "alice"


@pytest.mark.parametrize(
    "answer",
    [
        lambda: html(403),
        lambda: html(200),
        lambda: status(
            403, {"message": "token does not have at least one of required scope(s): [read:misc]"}
        ),
        lambda: status(403, {"error": "forbidden"}),
        lambda: status(403, {"message": ""}),
        lambda: status(403, {"message": ["no"]}),
        lambda: status(500, {"message": "oops"}),
        lambda: status(429, {"message": "slow down"}),
    ],
)
def test_what_is_no_403_in_JSON_with_a_message_about_the_account_suspends_nobody(lasting, answer):
    rig = lasting
    mcp = rig.session()
    rig.forgejo.inject(VERSION, answer(), times=None)
    assert rig.broker.upstream.examine(sub_of(rig)) == "unknown"
    rig.clock.advance(3590)
    rig.broker.upstream.refresh(sub_of(rig))  # unless the reaper was first
    ended("refresh")
    assert rig.log.named("upstream_refreshed")
    rig.forgejo.clear_faults()
    assert user(rig).status == "active" and who(same(mcp)) == "alice"


def test_a_401_of_the_API_is_only_about_this_access_token_and_a_refresh_decides_once_in_ten_minutes(lasting):
    rig = lasting
    mcp = rig.session()
    rig.clock.stop()
    rig.forgejo.inject(VERSION, status(401, {"message": "token is expired"}), times=None)
    upstream, sub = rig.broker.upstream, sub_of(rig)
    refreshed = lambda: len(rig.log.named("upstream_refreshed"))  # noqa: E731
    assert [upstream.examine(sub) for _ in range(5)] == ["refused"] * 5
    assert refreshed() == 1 and user(rig).status == "active"
    rig.clock.advance(601)
    assert upstream.examine(sub) == "refused" and refreshed() == 2
    rig.forgejo.clear_faults()
    assert who(same(mcp)) == "alice"


def test_a_forged_sentence_of_Forgejo_reaches_page_and_log_without_the_token(lasting):
    rig = lasting
    rig.session()
    token = rig.broker.upstream.credential(sub_of(rig))[0]
    rig.forgejo.inject(VERSION, status(403, {"message": f"No {token} here\x1b[2J. More."}))
    assert rig.broker.upstream.examine(sub_of(rig)) == "suspended"
    assert user(rig).status_reason == "No [token] here[2J."
    assert token not in rig.log.text


def test_a_witness_that_comes_late_does_not_undo_a_login(lasting):
    rig = lasting
    rig.session()
    rig.forgejo.suspend("alice")
    gate = rig.forgejo.hold(VERSION)
    answers = []

    def ask():
        answers.append(rig.broker.upstream.examine(sub_of(rig)))

    thread = threading.Thread(target=ask)
    thread.start()
    gate.wait_arrived()
    kept = rig.broker.store.user(sub_of(rig)).credential_seq
    rig.forgejo.unsuspend("alice")
    rig.login("alice")
    rig.forgejo.suspend("alice")  # what the held question now hears is of the older credential
    gate.open()
    thread.join(20)
    assert answers == ["suspended"] and user(rig).credential_seq > kept
    assert user(rig).status == "active"
