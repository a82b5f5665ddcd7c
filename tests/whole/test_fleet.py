"""Brokers of one PostgreSQL, behind nginx and HAProxy as docs/scale.md has them, killed and replaced."""

import threading
import time

import pytest

from fjmcp_broker import new_key
from rigs import fleet as rig
from rigs.broker_process import run_program
from rigs.fake_forgejo import FakeForgejo
from rigs.mcp_client import MODERN, McpClient, RpcError, StreamEnded
from rigs.modern_requests import ALL_INPUT, call, retry_of
from rigs.processes import in_thread
from rigs.rig import who

LIST = {"jsonrpc": "2.0", "id": 1, "method": "prompts/list"}
pytestmark = [pytest.mark.real("postgresql"), pytest.mark.timeout(120, func_only=True)]


@pytest.fixture
def make_fleet(tmp_path, postgresql):
    """A function that starts a Fleet; all of them are ended with the test."""
    made = []

    def make(count=2, server=postgresql, **arguments):
        folder = tmp_path / f"fleet{len(made)}"
        folder.mkdir()
        forgejo = FakeForgejo().start()
        made.append(rig.Fleet(folder, server, forgejo, count, **arguments))
        return made[-1].start()

    yield make
    for each in made:
        each.close()
        each.forgejo.stop()


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.real(name)) for name in rig.PROXIES])
def make_proxied(request, real_part, make_fleet, tmp_path):
    """A function that starts a Fleet behind a proxy."""
    running = []

    def make(count, **arguments):
        fleet = make_fleet(count, **arguments)
        proxy = rig.proxy(request.param, real_part(request.param), tmp_path / "proxy", fleet)
        running.append(proxy)
        proxy.__enter__()
        return fleet

    yield make
    for proxy in running:
        proxy.__exit__(None, None, None)


def members_with_children(fleet):
    """The names of the brokers that have a child."""
    return [member.name for member in fleet.members if member.is_running and member.process.children()]


def test_a_session_stays_at_its_broker_and_goes_on_at_another_when_that_is_gone(make_proxied):
    fleet = make_proxied(3)
    sessions = {user: fleet.session(user) for user in ("alice", "bob")}
    for _ in range(3):
        assert {user: who(mcp) for user, mcp in sessions.items()} == {"alice": "alice", "bob": "bob"}
    homes = {mcp.session_id.partition(".")[0] for mcp in sessions.values()}
    assert set(members_with_children(fleet)) == homes
    mcp = sessions["alice"]
    home = next(each for each in fleet.members if each.name == mcp.session_id[0])
    home.kill()
    assert who(mcp) == "alice"
    assert set(members_with_children(fleet)) - {home.name}
    home.start()


def test_what_a_client_is_asked_in_the_middle_of_a_call_finds_its_broker_again(make_proxied):
    fleet = make_proxied(2)
    for user in ("alice", "bob"):
        oauth = fleet.login(user)
        token = oauth.tokens["access_token"]
        mcp = McpClient(
            fleet.url + "/mcp", token, protocol=MODERN, capabilities=ALL_INPUT, routes=fleet.routes
        )
        mcp.auto = None
        asked = call(mcp, "ask_elicit")
        assert call(mcp, "ask_elicit", **retry_of(asked))["resultType"] == "complete"


def test_a_login_revoked_at_one_broker_ends_the_streams_at_the_others(make_fleet):
    fleet = make_fleet(2)
    a, b = fleet.members
    mcp = fleet.session(routes=a.routes)
    there = fleet.at(mcp, b)
    streams = [each.open_stream() for each in (mcp, there)]
    mcp.oauth.revoke(mcp.oauth.tokens["refresh_token"])
    for stream in streams:
        with pytest.raises(StreamEnded):
            while True:
                stream.next(20)
    assert there.post(LIST).status == 401


def keep_calling(fleet, mcp, over, outcomes):
    """Call from a session until it is over; `outcomes` has a failed call's status or error, else None."""
    while not over.is_set():
        try:
            answer = fleet.at(mcp, None).post(LIST)
            outcomes.append(answer.status if answer.status != 200 else None)
        except Exception as error:
            outcomes.append(repr(error))


def test_a_rolling_upgrade_under_load_fails_no_call(make_proxied):
    fleet = make_proxied(2, kept=True)
    sessions = [fleet.session(user) for user in ("alice", "bob") * 2]
    over, outcomes = threading.Event(), [[] for _ in sessions]
    joins = [in_thread(keep_calling, fleet, mcp, over, heard) for mcp, heard in zip(sessions, outcomes)]
    for member in fleet.members:
        seen = [len(heard) for heard in outcomes]
        until_good(lambda: all(len(heard) > count for heard, count in zip(outcomes, seen)) or 1 / 0)
        assert member.stop() == 0
        member.start()
    over.set()
    for join in joins:
        join()
    assert {outcome for heard in outcomes for outcome in heard} == {None}


def until_good(act, limit=60):
    """What `act` returns once it does not fail any more."""
    deadline = time.monotonic() + limit
    while True:
        try:
            return act()
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def test_a_database_that_restarts_loses_no_session(make_fleet, own_postgresql):
    server = own_postgresql()
    fleet = make_fleet(2, server=server)
    sessions = [fleet.session(user, member.routes) for member in fleet.members for user in ("alice", "bob")]
    server.kill()
    refused = fleet.at(sessions[0], fleet.members[1]).post(LIST)
    assert refused.status == 503 and refused.headers["Retry-After"]
    server.start()
    for mcp in sessions:
        for member in fleet.members:
            assert until_good(lambda: who(fleet.at(mcp, member))) in ("alice", "bob")


def test_a_promoted_standby_is_found_and_has_every_session(make_fleet, own_postgresql):
    server = own_postgresql()
    follower = server.standby()
    try:
        fleet = make_fleet(2, server=server, others=[follower])
        mcp = fleet.session(routes=fleet.members[0].routes)
        server.kill()
        follower.promote()
        for member in fleet.members:
            assert until_good(lambda: who(fleet.at(mcp, member))) == "alice"
        assert until_good(mcp.oauth.refresh).status == 200
    finally:
        follower.close()


def test_rotate_key_refuses_until_every_broker_has_the_new_key(make_fleet):
    fleet = make_fleet(2)
    fleet.login(routes=fleet.members[0].routes)
    a, b = fleet.members
    keys = new_key().strip() + "," + fleet.settings["key"]
    config = a.write(key=keys)
    refused = run_program("--config", str(config), "rotate-key")
    assert refused.returncode == 2 and "not known to these brokers: a, b" in refused.stderr
    fleet.settings["key"] = keys
    for member in fleet.members:
        assert member.stop() == 0
        member.start()
    done = run_program("--config", str(config), "rotate-key")
    assert done.returncode == 0 and "sealed 1 credential" in done.stdout, done.stderr
    assert who(fleet.session(routes=b.routes)) == "alice"


def test_a_refused_requestState_names_the_broker_that_has_the_call(make_fleet):
    fleet = make_fleet(2)
    a, b = fleet.members
    token = fleet.login(routes=a.routes).tokens["access_token"]
    here, there = (
        McpClient(fleet.url + "/mcp", token, protocol=MODERN, capabilities=ALL_INPUT, routes=each.routes)
        for each in (a, b)
    )
    here.auto = None
    asked = call(here, "ask_elicit")
    with pytest.raises(RpcError) as refused:
        call(there, "ask_elicit", **retry_of(asked))
    assert refused.value.code == -32602 and "'a'" in refused.value.message
