"""Slots in pools: how many a user has, and what keeps a child awake for a listener.

And what a listener hears of a child's next start.
"""

import json

import pytest

import fjmcp_broker
from rigs.modern_requests import ALL_INPUT, call, connect, listening, refused, retry_of
from rigs.rig import text_of, who


def awake(rig):
    """How many children have a place."""
    return rig.broker.capacity.count()


def fall_asleep(rig):
    """All that is idle goes to sleep."""
    before = len(rig.log.named("child_stopped"))
    rig.clock.advance(901)
    rig.log.wait("child_stopped", before + 1)


def next_message(stream):
    return stream.next(15).data


def spelled(number):
    return {"elicitation": {"n": number}}


# -- how many


def test_a_pool_is_known_by_a_digest_of_small_capabilities(rig):
    oauth = rig.login()
    mcp = connect(rig, capabilities={"elicitation": {"x": "y" * 5000}}, oauth=oauth)
    assert refused(mcp, "tools/list")[:2] == (400, -32602) and rig.broker.sessions.pools == {}
    assert connect(rig, capabilities=spelled(1), oauth=oauth).list_tools()
    ((_, _, digest),) = rig.broker.sessions.pools
    assert len(digest) == 32


def test_the_order_of_members_makes_no_other_pool(rig):
    oauth = rig.login()
    for value in ({"a": {}, "b": {}}, {"b": {}, "a": {}}):
        connect(rig, capabilities={"elicitation": value}, oauth=oauth).list_tools()
    assert len(rig.broker.sessions.all()) == 1


def test_places_of_a_user_are_bounded_and_those_used_longest_ago_go(rig, monkeypatch):
    monkeypatch.setattr(fjmcp_broker, "MAX_POOLED", 3)
    oauth, other = rig.login(), connect(rig, "bob")
    assert who(other) == "bob"
    for number in range(6):
        assert who(connect(rig, capabilities=spelled(number), oauth=oauth)) == "alice"
    own = [place for place in rig.broker.sessions.all() if place.initialize["capabilities"]]
    assert [place.initialize["capabilities"] for place in own] == [spelled(number) for number in (3, 4, 5)]
    rig.log.wait("child_stopped", 3)
    assert who(other) == "bob" and len(rig.log.named("child_stopped")) == 3


def test_places_in_use_are_never_taken_away_and_too_many_are_refused(rig, monkeypatch):
    monkeypatch.setattr(fjmcp_broker, "MAX_POOLED", 2)
    monkeypatch.setattr(fjmcp_broker, "MAX_POOLED_IN_USE", 2)
    sessions = rig.broker.sessions
    used = [sessions.lease("1", "c", spelled(number), False).frontend for number in range(2)]
    with pytest.raises(fjmcp_broker.RpcError) as refusal:
        sessions.lease("1", "c", spelled(2), False)
    assert (refusal.value.status, refusal.value.data["reason"]) == (429, "busy")
    assert sessions.lease("1", "c", spelled(1), False).frontend is used[1]
    assert sessions.lease("2", "c", spelled(2), False).frontend not in used


def test_a_place_that_never_had_a_child_goes_with_its_request(rig):
    sessions = rig.broker.sessions
    sessions.lease("1", "c", {}, False).release()
    assert sessions.pools == {}


def test_a_held_call_whose_child_dies_is_held_no_longer(controlled, control):
    mcp = connect(controlled, capabilities=ALL_INPUT)
    asked = call(mcp, "ask_elicit")
    assert len(controlled.broker.sessions.suspended.calls) == 1
    control.command({"cmd": "exit", "code": 1})
    controlled.log.wait("child_stopped")
    assert controlled.broker.sessions.suspended.calls == {}
    params = {"name": "ask_elicit", "arguments": {}, **retry_of(asked)}
    assert refused(mcp, "tools/call", params)[1] == -32602


# -- listeners


@pytest.mark.parametrize("era", ["legacy", "modern"])
def test_a_listener_to_changes_of_lists_keeps_no_child_awake_and_hears_what_the_next_start_finds(
    make_rig, tmp_path, era
):
    more = tmp_path / "more.json"
    rig = make_rig(child=("--era", era, "--mode", f"more_tools={more}"))
    mcp = connect(rig)
    assert who(mcp) == "alice"
    with listening(mcp, toolsListChanged=True) as (honoured, stream, _):
        assert honoured == {"toolsListChanged": True}
        fall_asleep(rig)
        assert awake(rig) == 0
        more.write_text(json.dumps(["get_more"]))
        assert who(connect(rig, oauth=mcp.oauth)) == "alice"
        assert next_message(stream)["method"] == "notifications/tools/list_changed"
        fall_asleep(rig)
        assert who(connect(rig, oauth=mcp.oauth)) == "alice"
        with pytest.raises(TimeoutError):
            stream.next(0.5)


def test_a_listener_to_changes_of_lists_is_acknowledged_from_what_is_known_of_the_program(rig):
    assert who(connect(rig)) == "alice"
    started = len(rig.log.named("child_started"))
    with listening(connect(rig, "bob"), toolsListChanged=True) as (honoured, _, _):
        assert honoured == {"toolsListChanged": True}
        assert len(rig.log.named("child_started")) == started


def test_a_listener_before_any_child_starts_one_to_know(rig):
    with listening(connect(rig), toolsListChanged=True) as (honoured, _, _):
        assert honoured == {"toolsListChanged": True} and len(rig.log.named("child_started")) == 1
        fall_asleep(rig)
        assert awake(rig) == 0


def test_a_listener_while_Forgejo_is_down_is_acknowledged_though_nothing_is_known_of_the_program(rig):
    mcp = connect(rig)
    rig.forgejo.down()
    with listening(mcp, toolsListChanged=True, promptsListChanged=False) as (honoured, _, _):
        assert honoured == {"toolsListChanged": True}
        rig.forgejo.up()
        assert who(connect(rig, oauth=mcp.oauth)) == "alice"


def test_a_listener_to_a_resource_is_refused_while_Forgejo_is_down(rig):
    mcp = connect(rig)
    rig.forgejo.down()
    wanted = {"notifications": {"resourceSubscriptions": ["file:///a"], "toolsListChanged": True}}
    assert refused(mcp, "subscriptions/listen", wanted)[0] == 503


def test_logins_that_listen_to_everything_leave_a_place_for_the_next_person(make_rig):
    rig = make_rig(max_sessions=2, max_sessions_per_user=1)
    alice, bob = connect(rig), connect(rig, "bob")
    rig.forgejo.add_user("carol")
    wanted = {"toolsListChanged": True, "resourceSubscriptions": ["test://note"]}
    with listening(alice, **wanted) as _, listening(bob, **wanted):
        assert awake(rig) == 2
        rig.clock.advance(901)
        rig.tick()
        assert awake(rig) == 2  # nobody needs their places
        carol = connect(rig, "carol")
        assert who(carol) == "carol"
        (stopped,) = rig.log.wait("child_stopped")
        assert stopped["reason"] == "place needed"
        for _ in range(3):  # who gave way does not take a place back from who uses it
            rig.tick()
            assert who(carol) == "carol"
        assert len(rig.log.named("child_stopped")) == 1


def test_a_listener_to_a_resource_that_gave_way_hears_again_when_a_place_is_free(make_rig, control):
    rig = make_rig(max_sessions=1, child=("--control", control.path))
    alice, bob = connect(rig), connect(rig, "bob")
    with listening(alice, resourceSubscriptions=["test://note"]) as (_, stream, _):
        (first,) = control.children
        rig.clock.advance(901)
        assert who(bob) == "bob"
        rig.clock.advance(901)
        again = control.wait_event(
            lambda event: event["pid"] != first and event.get("method") == "resources/subscribe", timeout=20
        )
        update = {"method": "notifications/resources/updated", "params": {"uri": "test://note"}}
        control.emit({"jsonrpc": "2.0", **update}, again["pid"])
        assert next_message(stream)["params"]["uri"] == "test://note"


def test_text_of_a_pool_is_its_own(rig):
    oauth = rig.login()
    first, second = (connect(rig, capabilities=spelled(number), oauth=oauth) for number in range(2))
    assert text_of(call(first, "get_pid")) != text_of(call(second, "get_pid"))
