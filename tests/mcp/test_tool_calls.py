"""Each call of a tool leaves one audit record that says truly what became of it, whatever that is."""

import contextlib
import time

import pytest

from rigs.mcp_client import RpcError
from rigs.modern_requests import ALL_INPUT, call, connect, retry_of
from rigs.processes import in_thread


def records(rig, count=1):
    """(tool, outcome) of each call on record, once there are so many."""
    rig.log.wait("tool_called", count)
    return [(each["tool"], each["outcome"]) for each in rig.log.named("tool_called")]


def test_an_answered_call_is_on_record_with_who_made_it_through_what(rig):
    mcp = rig.session()
    mcp.call_tool("get_pid")
    assert records(rig) == [("get_pid", "ok")]
    (record,) = rig.log.named("tool_called")
    (session,) = rig.broker.sessions.all()
    assert (record["login"], record["user"], record["session"]) == ("alice", session.sub, session.label)
    assert record["client"] == session.client_id and record["ms"] >= 0


def test_a_call_without_a_session_is_on_record_with_none(rig):
    call(connect(rig), "get_pid")
    assert records(rig) == [("get_pid", "ok")]
    assert rig.log.named("tool_called")[0]["session"] is None


def test_a_name_that_no_child_lists_is_not_logged(rig):
    mcp = rig.session()
    mcp.call_tool("get_pid")
    with contextlib.suppress(RpcError):
        mcp.call_tool("a secret in the wrong place")
    (_, (tool, outcome)) = records(rig, 2)
    assert tool == "(unknown)" and outcome in ("error", "tool_error")


def test_without_audit_calls_nothing_is_on_record(make_rig):
    rig = make_rig(audit_calls="off")
    rig.session().call_tool("get_pid")
    assert not rig.log.named("tool_called")


@pytest.mark.parametrize("era", ["legacy", "modern"])
def test_a_call_whose_broker_stops_has_an_unknown_outcome(rig, era):
    mcp = rig.session() if era == "legacy" else connect(rig)
    call(mcp, "get_pid") if era == "modern" else mcp.call_tool("get_pid")
    asked = in_thread(call if era == "modern" else lambda each, name: each.call_tool(name), mcp, "silent")
    assert wait_for_call(rig)
    rig.broker.sessions.close("broker stopping")
    asked()
    assert records(rig, 2)[1] == ("silent", "unknown")


def wait_for_call(rig):
    """Whether a call is in flight, soon."""
    for _ in range(1000):
        for session in rig.broker.sessions.all():
            with session.lock:
                if session.calls():
                    return True
        time.sleep(0.01)
    return False


def test_a_question_and_its_retry_are_one_call(rig):
    mcp = connect(rig, capabilities=ALL_INPUT)
    mcp.auto = None
    asked = call(mcp, "ask_elicit")
    assert asked["resultType"] == "input_required" and not rig.log.named("tool_called")
    assert call(mcp, "ask_elicit", **retry_of(asked))["resultType"] == "complete"
    assert records(rig) == [("ask_elicit", "ok")]
