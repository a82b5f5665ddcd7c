"""A session that ends is on record once, whatever ended it.

Also one that is only a row, whose child sleeps since long.
"""

import pytest

from rigs.browser import open_account
from rigs.mcp_client import ClientError, McpClient


def revoke(rig, mcp):
    mcp.oauth.revoke(mcp.oauth.tokens["refresh_token"])


def delete(rig, mcp):
    McpClient(mcp.url, mcp.token, session_id=mcp.session_id).delete()


def leave_unused(rig, mcp):
    rig.broker.settings.session_lifetime = 86400
    rig.clock.advance(2 * 86400)


def let_the_login_expire(rig, mcp):
    rig.clock.advance(91 * 86400)


def end_login(rig, mcp):
    store = rig.broker.store
    (grant,) = store.find_grants("client", mcp.oauth.client_id, rig.clock.now())
    store.end_grant(grant.grant_id, "revoked by operator", rig.clock.now(), for_log=True)


def open_another(rig, mcp):
    rig.broker.settings.max_session_rows_per_user = 1
    rig.clock.advance(1)
    again = McpClient(mcp.url, mcp.oauth.tokens["access_token"])
    again.initialize()


def end_on_the_account_page(rig, mcp):
    browser, page = open_account(rig)
    form = next(each for each in page.forms if each.button("session"))
    browser.submit(page, ("session", form.button("session").value), form=form)


WAYS = {
    "revoked by client": revoke,
    "deleted by client": delete,
    "expired": leave_unused,
    "grant ended": let_the_login_expire,
    "revoked by operator": end_login,
    "too many sessions of this user": open_another,
    "ended by the user": end_on_the_account_page,
}


@pytest.mark.parametrize("reason", WAYS)
@pytest.mark.parametrize("in_memory", [True, False], ids=["awake", "only a row"])
def test_a_session_that_ends_is_on_record_once(rig, reason, in_memory):
    mcp = rig.session()
    label = rig.log.named("session_opened")[0]["session"]
    mcp.call_tool("get_pid")
    if not in_memory:
        rig.restart()
    WAYS[reason](rig, mcp)
    for _ in range(3):
        rig.tick()
    found = [each for each in rig.log.named("session_ended") if each["session"] == label]
    assert [(each["reason"], each["client"]) for each in found] == [(reason, mcp.oauth.client_id)]
    with pytest.raises(ClientError):
        McpClient(mcp.url, mcp.oauth.tokens["access_token"], session_id=mcp.session_id).call_tool("get_pid")


def test_a_broker_that_stops_ends_no_session(rig):
    mcp = rig.session()
    mcp.call_tool("get_pid")
    log = rig.log
    rig.restart()
    assert not log.named("session_ended")
    assert McpClient(mcp.url, mcp.oauth.tokens["access_token"], session_id=mcp.session_id).call_tool(
        "get_pid"
    )
    rig.tick()
    assert not rig.log.named("session_ended")


def test_sessions_that_an_operators_command_ends_while_no_broker_runs_are_logged_at_the_next_start(rig):
    mcp = rig.session()
    store = rig.broker.store
    (grant,) = store.find_grants("client", mcp.oauth.client_id, rig.clock.now())
    rig.broker.reaper.stop()
    store.end_grant(grant.grant_id, "revoked by operator", rig.clock.now(), for_log=True)
    rig.restart()
    rig.log.wait("session_ended")
    rig.tick()
    assert len(rig.log.named("session_ended")) == len(rig.log.named("token_revoked")) == 1


def test_a_broker_alone_takes_no_lease_to_log_or_to_sweep(rig, monkeypatch):
    mcp = rig.session()
    taken = []
    monkeypatch.setattr(rig.broker.store, "take_lease", lambda *given: taken.append(given) or True)
    delete(rig, mcp)
    rig.log.wait("session_ended")
    rig.broker.reaper._sweep(rig.clock.now())
    assert taken == []
