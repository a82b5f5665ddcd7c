"""Each call of a tool leaves one audit record that says truly what became of it, whatever that is."""

import contextlib
import time

import pytest

import fjmcp_broker
from rigs import mcp_client
from rigs.mcp_client import ClientError, McpClient, RpcError
from rigs.modern_requests import ALL_INPUT, call, connect, retry_of
from rigs.processes import in_thread
from rigs.rig import text_of

ERAS = ("legacy", "modern")


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


@pytest.mark.parametrize("era", ERAS)
def test_a_call_whose_broker_stops_has_an_unknown_outcome(rig, era):
    mcp = caller(rig, era)
    call(mcp, "get_pid")
    asked = in_thread(call, mcp, "silent")
    assert wait_for_call(rig)
    rig.broker.sessions.close("broker stopping")
    asked()
    assert records(rig, 2)[1] == ("silent", "unknown")


def caller(rig, era, **arguments):
    """A client of an era, logged in."""
    return rig.session(**arguments) if era == "legacy" else connect(rig, **arguments)


def again(mcp):
    """The same client over another connection."""
    return McpClient(mcp.url, mcp.token, protocol=mcp.protocol, session_id=mcp.session_id)


def calls_in_flight(rig):
    found = []
    for session in rig.broker.sessions.all():
        with session.lock:
            found += session.calls()
    return found


def wait_for_call(rig, count=1):
    """The calls in flight, once there are so many."""
    for _ in range(2000):
        if len(calls_in_flight(rig)) >= count:
            return calls_in_flight(rig)
        time.sleep(0.01)
    raise AssertionError("no call is in flight")


def ends(rig, mcp, tool, **arguments):
    """(tool, outcome) of a call that is made now, whatever the client hears of it."""
    before = len(rig.log.named("tool_called"))
    with contextlib.suppress(ClientError):
        call(mcp, tool, arguments)
    return records(rig, before + 1)[before]


# -- what a child makes of it


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize(
    "tool, arguments, outcome",
    [
        ("get_result", {"result": {"content": [], "isError": True}}, "tool_error"),
        ("get_error", {}, "error"),
        ("get_failure", {"code": -32000, "message": "no"}, "error"),
        ("get_result", {"result": {"task": {"taskId": "t1", "status": "working"}}}, "started"),
        ("crash", {}, "unknown"),
        ("crash", {"signal": "SIGKILL"}, "unknown"),
    ],
)
def test_what_became_of_a_call_is_what_its_child_made_of_it(rig, monkeypatch, era, tool, arguments, outcome):
    monkeypatch.setattr(mcp_client, "judge", None)  # a task's handle is no result of every revision
    assert ends(rig, caller(rig, era), tool, **arguments) == (tool, outcome)
    assert len(rig.log.named("tool_called")) == 1


@pytest.mark.parametrize("era", ERAS)
def test_a_call_that_is_answered_too_late_has_an_unknown_outcome(rig, era):
    mcp = caller(rig, era)
    asked = in_thread(call, mcp, "silent")
    (running,) = wait_for_call(rig)
    running.deadline = 0
    assert isinstance(asked(), RpcError)
    assert records(rig) == [("silent", "unknown")]


@pytest.mark.parametrize("era", ERAS)
def test_a_call_that_its_client_cancels_is_cancelled(rig, era):
    mcp = caller(rig, era)
    request_id, stream = mcp.start_request("tools/call", {"name": "silent", "arguments": {}})
    wait_for_call(rig)
    if era == "legacy":
        mcp.notify("notifications/cancelled", {"requestId": request_id})
    stream.close()
    assert records(rig) == [("silent", "cancelled")]


def test_a_client_that_hangs_up_cancels_nothing_in_a_session(rig):
    mcp = rig.session()
    _, stream = mcp.start_request("tools/call", {"name": "get_slow", "arguments": {"ms": 3000}})
    wait_for_call(rig)
    stream.close()
    assert records(rig) == [("get_slow", "ok")]


# -- what is never sent


@pytest.mark.parametrize("era", ERAS)
def test_a_call_of_a_session_with_too_many_in_flight_is_an_error(make_rig, era):
    rig = make_rig(max_inflight=1)
    mcp = caller(rig, era)
    asked = in_thread(call, mcp, "silent")
    wait_for_call(rig)
    assert ends(rig, again(mcp), "get_pid") == ("get_pid", "error")
    rig.broker.sessions.close("over")
    asked()


@pytest.mark.parametrize("era", ERAS)
def test_a_call_of_a_user_with_too_many_requests_is_an_error(make_rig, era):
    rig = make_rig(max_requests_per_user=1)
    mcp = caller(rig, era)
    asked = in_thread(call, mcp, "silent")
    wait_for_call(rig)
    assert ends(rig, again(mcp), "get_pid") == ("get_pid", "error")
    assert [each["reason"] for each in rig.log.named("refused")][-1:] == ["too_many_requests"]
    rig.broker.sessions.close("over")
    asked()


@pytest.mark.parametrize("era", ERAS)
def test_a_call_that_finds_no_child_is_an_error(rig, era):
    mcp = caller(rig, era)
    call(mcp, "get_pid")
    records(rig, 1)
    for session in rig.broker.sessions.all():
        session.backends.sleep("idle")
    rig.broker.settings.forgejo_mcp_binary = ["/nonexistent/forgejo-mcp"]
    assert ends(rig, mcp, "get_pid") == ("get_pid", "error")


def test_a_call_of_a_session_that_is_gone_is_an_error_without_a_session(rig):
    mcp = rig.session()
    call(mcp, "get_pid")
    records(rig, 1)
    gone = McpClient(mcp.url, mcp.token, session_id="x" * 43)
    assert ends(rig, gone, "get_pid") == ("get_pid", "error")
    assert rig.log.named("tool_called")[-1]["session"] is None


@pytest.mark.parametrize("era", ERAS)
def test_what_the_login_or_a_rule_does_not_allow_is_denied(rig, era):
    mcp = caller(rig, era, access="read")
    assert ends(rig, mcp, "create_issue", owner="o", repo="r", title="t") == ("create_issue", "denied")
    full = caller(rig, era, user="bob")
    rig.broker.settings.tool_rules = fjmcp_broker.KINDS["tool_rules"]([{"deny": ["create_*"]}])
    assert ends(rig, full, "create_issue", owner="o", repo="r", title="t") == ("create_issue", "denied")


def test_a_step_up_is_denied(rig):
    oauth = rig.login(access="read", scope="forgejo:read")
    assert ends(rig, connect(rig, oauth=oauth), "crash") == ("crash", "denied")


def test_each_call_of_a_batch_is_on_record_with_its_own_outcome(rig, monkeypatch):
    monkeypatch.setattr(mcp_client, "judge", None)
    rig.broker.settings.tool_rules = fjmcp_broker.KINDS["tool_rules"]([{"deny": ["create_*"]}])
    mcp = rig.session(protocol="2025-03-26")
    tools = [
        ("get_pid", {}),
        ("get_result", {"result": {"content": [], "isError": True}}),
        ("get_failure", {"code": -1, "message": "no"}),
        ("create_issue", {}),
        ("silent", {}),
    ]
    batch = [
        {"jsonrpc": "2.0", "id": number, "method": "tools/call", "params": {"name": name, "arguments": given}}
        for number, (name, given) in enumerate(tools)
    ]
    ping = {"jsonrpc": "2.0", "id": "p", "method": "ping"}
    asked = in_thread(mcp.post, [*batch, ping])
    records(rig, 4)
    again(mcp).notify("notifications/cancelled", {"requestId": 4})
    asked()
    assert sorted(records(rig, 5)) == [
        ("create_issue", "denied"),
        ("get_failure", "error"),
        ("get_pid", "ok"),
        ("get_result", "tool_error"),
        ("silent", "cancelled"),
    ]


def test_of_a_batch_that_is_refused_for_one_message_the_calls_before_it_are_errors(rig):
    mcp = rig.session(protocol="2025-03-26")
    call(mcp, "get_pid")
    good = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "get_pid"}}
    bad = {"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": {"name": "get_pid", "Name": "crash"}}
    assert mcp.post([good, bad]).status == 400
    assert records(rig, 2) == [("get_pid", "ok"), ("get_pid", "error")]


# -- questions and retries


def test_a_question_and_its_retry_are_one_call(rig):
    mcp = connect(rig, capabilities=ALL_INPUT)
    mcp.auto = None
    asked = call(mcp, "ask_elicit")
    assert asked["resultType"] == "input_required" and not rig.log.named("tool_called")
    assert call(mcp, "ask_elicit", **retry_of(asked))["resultType"] == "complete"
    assert records(rig) == [("ask_elicit", "ok")]
    with contextlib.suppress(RpcError):
        call(mcp, "ask_elicit", **retry_of(asked))  # a second time: nothing is run, and nothing is on record
    assert len(rig.log.named("tool_called")) == 1


def test_a_question_that_nobody_answers_leaves_an_unknown_outcome(make_rig):
    rig = make_rig(input_timeout="1s")
    mcp = connect(rig, capabilities=ALL_INPUT)
    mcp.auto = None
    assert call(mcp, "ask_elicit")["resultType"] == "input_required"
    assert records(rig) == [("ask_elicit", "unknown")]


def test_a_held_call_that_new_rules_deny_is_denied(rig):
    mcp = connect(rig, capabilities=ALL_INPUT)
    mcp.auto = None
    asked = call(mcp, "ask_elicit")
    rig.broker.settings.tool_rules = fjmcp_broker.KINDS["tool_rules"]([{"deny": ["ask_*"]}])
    assert "does not allow" in text_of(call(mcp, "ask_elicit", **retry_of(asked)))
    assert records(rig) == [("ask_elicit", "denied")]


# -- the first call of a login


def first_calls(rig):
    return sum(
        rig.log.metrics.value("fjmcp_connect_total", (client, "first_call"))
        for client in fjmcp_broker.KNOWN_CLIENTS
    )


@pytest.mark.parametrize("era", ERAS)
def test_the_first_call_of_a_login_that_its_child_answers_is_counted(rig, era):
    mcp = caller(rig, era)
    with contextlib.suppress(RpcError):
        call(mcp, "no_such_tool")
    assert records(rig) and first_calls(rig) == 0
    for _ in range(3):
        call(mcp, "get_pid")
    records(rig, 4)
    assert first_calls(rig) == 1
    call(caller(rig, era, user="bob"), "get_pid")
    records(rig, 5)
    assert first_calls(rig) == 2
    rig.restart()
    call(connect(rig, oauth=mcp.oauth), "get_pid")
    records(rig)
    assert first_calls(rig) == 1


def test_the_first_call_is_counted_under_the_clients_name(rig):
    client = rig.login(name="Claude Code (forgejo)")
    call(connect(rig, oauth=client), "get_pid")
    records(rig)
    assert rig.log.metrics.value("fjmcp_connect_total", ("claude", "first_call")) == 1


def test_the_first_call_of_a_login_is_counted_once_and_the_set_is_bounded():
    seen = fjmcp_broker.FirstCalls()
    assert [seen.is_first(7), seen.is_first(7)] == [True, False]
    assert all(seen.is_first(number) for number in range(100, 100 + seen.MOST))
    assert seen.is_first(7)
