"""Which clock decides.

A wall clock that is set, forward or back, logs nobody out, deletes nothing and stops nothing.
"""

import sqlite3

import pytest

import fjmcp_broker
from rigs.browser import Browser, approve_login
from rigs.busy_clients import same
from rigs.fake_forgejo import status
from rigs.mcp_client import ClientError, McpClient, OAuthClient
from rigs.rig import FakeClock, who

DAY = 86400
HOUR = 3600
CALL = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "tools/call",
    "params": {"name": "get_my_user_info", "arguments": {}},
}


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def steady(clock):
    clock.stop()
    return fjmcp_broker.SteadyClock(clock)


def rows(rig):
    """How many grants, refresh tokens and sessions are on file."""
    with sqlite3.connect(rig.values["store_path"]) as db:
        counts = [
            db.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            for table in ("grants", "refresh_tokens", "sessions")
        ]
    db.close()
    return counts


def set_and_followed(rig, seconds):
    """The wall clock is set, and stays so until it is followed."""
    rig.clock.step_wall(seconds)
    rig.tick()
    rig.clock.advance(601)
    rig.tick()
    assert rig.log.wait("the wall clock is followed")


# -- the clock itself


@pytest.mark.parametrize("step", [-10 * DAY, -600, -61, 61, 600, 100 * DAY])
def test_a_step_of_the_wall_clock_is_followed_once_it_has_stayed_for_ten_minutes(clock, steady, step):
    before = steady.now()
    clock.step_wall(step)
    assert steady.compare() == ("differs", step) and steady.now() == before
    clock.advance(599)
    assert steady.compare()[0] == "differs" and steady.now() == before + 599
    clock.advance(1)
    assert steady.compare()[0] == "followed" and steady.now() == pytest.approx(before + 600 + step)
    assert steady.compare() is None


def test_a_step_that_is_taken_back_or_changes_begins_its_ten_minutes_anew(clock, steady):
    before = steady.now()
    clock.step_wall(100 * DAY)
    steady.compare()
    clock.advance(500)
    clock.step_wall(-100 * DAY)
    assert steady.compare()[0] == "agrees"
    clock.step_wall(HOUR)
    steady.compare()
    clock.advance(500)
    clock.step_wall(HOUR)
    assert steady.compare()[0] == "differs"
    clock.advance(500)
    assert steady.compare()[0] == "differs" and steady.now() == before + 1500


@pytest.mark.parametrize("step", [-59, -1, 1, 59])
def test_a_small_difference_is_nothing(clock, steady, step):
    before = steady.now()
    clock.step_wall(step)
    for _ in range(20):
        assert steady.compare() is None
        clock.advance(60)
    assert steady.now() == before + 1200


def test_what_a_followed_step_forward_moved_is_forgiven_for_a_week_and_taken_back_by_one_back(clock, steady):
    assert steady.leap() == 0
    for step, leap in ((10 * DAY, 10 * DAY), (-4 * DAY, 6 * DAY), (-20 * DAY, 0), (DAY, DAY)):
        clock.step_wall(step)
        steady.compare()
        clock.advance(600)
        assert steady.compare()[0] == "followed" and steady.leap() == pytest.approx(leap)
    clock.advance(7 * DAY)
    assert steady.leap() == 0


def test_the_real_clocks_agree_and_time_that_a_suspended_machine_slept_has_passed():
    real = fjmcp_broker.Clock()
    assert fjmcp_broker.SteadyClock(real).compare() is None
    assert real.boottime() >= real.monotonic() - 1  # it counts what the monotonic clock leaves out


# -- a glitch


@pytest.mark.parametrize("step", [-10 * DAY, -HOUR, 2 * HOUR, 100 * DAY, 30 * 365 * DAY])
def test_a_glitch_of_the_wall_clock_is_not_noticed_but_in_the_log(rig, step):
    mcp = rig.session()
    rig.clock.advance(2 * HOUR)  # sweeps have begun
    assert mcp.oauth.refresh().status == 200
    mcp = same(mcp, mcp.oauth.tokens["access_token"])
    mcp.oauth = None
    before = rows(rig)
    rig.clock.step_wall(step)
    for _ in range(5):
        rig.clock.advance(100)
        rig.tick()
        assert who(same(mcp)) == "alice"
    (record, *_) = rig.log.named("the wall clock was set; it is followed if it stays so")
    assert record["level"] == "warning" and record["seconds"] == pytest.approx(step, abs=1)
    rig.clock.step_wall(-step)
    rig.tick()
    assert rig.log.named("the wall clock is right again") and not rig.log.named("the wall clock is followed")
    assert rows(rig) == before and who(same(mcp)) == "alice"


def test_the_log_says_at_most_once_a_minute_that_the_clock_differs(rig):
    rig.clock.stop()
    rig.clock.step_wall(DAY)
    for _ in range(50):
        rig.tick()
    assert len(rig.log.named("the wall clock was set; it is followed if it stays so")) == 1


# -- a step that stays


@pytest.mark.parametrize("step", [100 * DAY, 10 * 365 * DAY])
def test_what_only_a_step_forward_expires_is_a_503_at_token_and_good_again_when_the_clock_is(rig, step):
    mcp = rig.session()
    rig.clock.advance(2 * HOUR)
    set_and_followed(rig, step)
    before = rows(rig)
    assert same(mcp).post(CALL).status == 401
    answer = mcp.oauth.refresh()
    assert answer.status == 503 and "Retry-After" in answer.headers
    assert answer.json()["error"] == "temporarily_unavailable"
    for _ in range(3):
        rig.clock.advance(61)
        rig.tick()
    assert rows(rig) == before
    rig.clock.step_wall(-step)
    rig.tick()
    rig.clock.advance(601)
    rig.tick()
    rig.log.wait("the wall clock is followed", 2)
    assert mcp.oauth.refresh().status == 200


def test_a_code_that_only_a_step_forward_expires_is_a_503(rig):
    client = OAuthClient(rig.url, name="slow")
    client.discover()
    client.register()
    rig.clock.stop()
    rig.clock.step_wall(HOUR)
    rig.tick()
    rig.clock.advance(590)
    callback = approve_login(Browser(), client.authorize_url(), "alice", "secret")
    rig.clock.advance(11)
    rig.tick()
    rig.log.wait("the wall clock is followed")
    with pytest.raises(ClientError) as error:
        client.finish(callback)
    assert "503" in str(error.value)


def test_a_token_that_was_rotated_just_before_a_step_forward_is_no_theft(rig):
    mcp = rig.session()
    old = mcp.oauth.tokens["refresh_token"]
    rig.clock.stop()
    rig.clock.step_wall(HOUR)
    rig.tick()
    rig.clock.advance(590)
    assert mcp.oauth.refresh().status == 200
    newest = mcp.oauth.tokens["refresh_token"]
    rig.clock.advance(11)
    rig.tick()
    rig.log.wait("the wall clock is followed")
    mcp.oauth.tokens["refresh_token"] = old
    assert mcp.oauth.refresh().status == 503 and not rig.log.named("reuse_detected")
    mcp.oauth.tokens["refresh_token"] = newest
    assert mcp.oauth.refresh().status == 200


def test_what_expired_before_a_step_is_still_an_invalid_grant(make_rig):
    rig = make_rig(refresh_token_lifetime="2h")
    mcp = rig.session()
    rig.clock.advance(3 * HOUR)
    set_and_followed(rig, HOUR)
    answer = mcp.oauth.refresh()
    assert answer.status == 400 and answer.json()["error"] == "invalid_grant"


# -- a start with a wrong clock


@pytest.mark.parametrize("wrong", [400 * DAY, -400 * DAY])
def test_a_start_with_a_wrong_clock_deletes_nothing_for_an_hour(rig, wrong):
    mcp = rig.session()
    before = rows(rig)
    rig.clock.step_wall(wrong)
    rig.restart()
    for _ in range(5):
        rig.clock.advance(100)
        rig.tick()
    rig.clock.step_wall(-wrong)
    rig.tick()
    rig.clock.advance(601)
    rig.tick()
    rig.log.wait("the wall clock is followed")
    assert rows(rig) == before
    assert mcp.oauth.refresh().status == 200


def test_after_the_first_hour_what_had_its_time_goes(rig):
    rig.session()
    rig.restart()
    rig.clock.advance(200 * DAY)
    rig.tick()
    assert rows(rig) == [0, 0, 0]


# -- waits within the process


@pytest.mark.parametrize("step", [-10 * DAY, 10 * DAY])
def test_back_off_rates_and_idle_times_do_not_go_by_the_wall_clock(make_rig, step):
    rig = make_rig(session_idle_timeout="2m")
    rig.session()
    sub = rig.forgejo._need_user("alice").sub
    rig.forgejo.inject("/login/oauth/access_token", status(502))
    with pytest.raises(fjmcp_broker.UpstreamDown):
        rig.broker.upstream.refresh(sub)
    set_and_followed(rig, step)
    assert rig.broker.upstream.refresh(sub) in (True, False)
    rig.clock.advance(121)
    rig.tick()
    rig.log.wait("child_stopped")
    limiter = fjmcp_broker.Limiter(rig.broker.clock)
    for _ in range(3):
        limiter.spend("kind", "key", 3)
    set_back = rig.clock.now()
    rig.clock.step_wall(-DAY)
    rig.clock.advance(60)
    limiter.spend("kind", "key", 3)
    assert rig.clock.now() < set_back


def test_the_use_of_a_session_is_written_down_by_the_calendar(rig):
    mcp = rig.session()
    rig.clock.advance(DAY)
    mcp.oauth.refresh()
    again = McpClient(rig.url + "/mcp", mcp.oauth.tokens["access_token"])
    again.session_id = mcp.session_id
    rig.broker.sessions.find(mcp.session_id, "1001", mcp.oauth.client_id).session.notify("notifications/x")
    rig.broker.sessions.save_uses()
    (row,) = rig.broker.store.sessions_of("1001")
    assert row.used_at == pytest.approx(rig.clock.now(), abs=30)
