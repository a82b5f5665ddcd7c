"""A session outlives its child, a crash and the broker; a request in flight is told what is known of it.

Nothing is done twice.
"""

import contextlib
import json
import os
import signal
import sqlite3
import sys

import pytest

import fjmcp_broker
from rigs.busy_clients import CUT, Load, children, health, same
from rigs.mcp_client import McpClient, RpcError, StreamEnded
from rigs.processes import await_end, hanging_call, in_thread, session
from rigs.rig import TESTS, json_of, text_of, token_of, who

LIST = {"jsonrpc": "2.0", "id": 1, "method": "prompts/list"}


def kill_child(rig, mcp, number=signal.SIGKILL):
    """End the child that serves this session, and wait until that was noticed."""
    ended = len(rig.log.named("child_stopped"))
    os.kill(int(text_of(mcp.call_tool("get_pid"))), number)
    rig.log.wait("child_stopped", ended + 1)


# -- 1: after everything the session goes on


def test_after_an_idle_stop_the_session_goes_on_with_its_log_level_and_subscriptions(rig):
    mcp = rig.session()
    mcp.request("logging/setLevel", {"level": "error"})
    mcp.request("resources/subscribe", {"uri": "test://kept"})
    mcp.request("resources/subscribe", {"uri": "test://dropped"})
    mcp.request("resources/unsubscribe", {"uri": "test://dropped"})
    rig.clock.advance(901)
    assert rig.log.wait("child_stopped")[0]["reason"] == "idle" and children(rig) == 0
    seen = json_of(mcp.call_tool("get_initialize"))
    assert seen["level"] == "error" and seen["subscriptions"] == ["test://kept"] and seen["initialized"] == 1
    assert seen["params"]["clientInfo"] == mcp.info and who(mcp) == "alice"


def test_a_child_is_not_stopped_before_its_time(rig):
    mcp = rig.session()
    rig.clock.stop()
    first = text_of(mcp.call_tool("get_pid"))
    rig.clock.advance(890)
    for _ in range(3):
        rig.tick()
    assert text_of(mcp.call_tool("get_pid")) == first


@pytest.mark.parametrize("number", ["SIGKILL", "SIGSEGV", "SIGTERM"])
def test_P09_after_a_crash_between_requests_the_session_goes_on(rig, number):
    mcp = rig.session()
    kill_child(rig, mcp, signal.Signals[number])
    assert who(mcp) == "alice" and children(rig) == 1


def test_P09_kill_9_of_the_child_in_mid_call_is_told_and_nothing_is_written_twice(rig):
    mcp = rig.session()
    pid = int(text_of(mcp.call_tool("get_pid")))
    with rig.forgejo.hold("/api/v1/repos", method="POST") as gate:
        join = in_thread(
            same(mcp).call_tool, "create_issue", owner="alice", repo="alice-private", title="once"
        )
        gate.wait_arrived()
        os.kill(pid, signal.SIGKILL)
        error = join()
    assert isinstance(error, RpcError) and (error.http_status, error.code) == (200, -32000)
    assert error.data == {"reason": "child_died", "outcome_unknown": True, "retryable": True}
    assert who(mcp) == "alice"
    assert rig.forgejo.count("/api/v1/repos", "POST") == 1


def test_eviction_at_the_cap_costs_no_session_and_no_answer(make_rig):
    rig = make_rig(max_sessions=2)
    for name in ("carol", "dave"):
        rig.forgejo.add_user(name)
    sessions = {name: rig.session(name) for name in ("alice", "bob", "carol", "dave")}
    with Load(sessions.values(), lambda mcp, _: (who(mcp), children(rig))) as load:
        load.wait(40)
    assert not load.failures
    names = {mcp: name for name, mcp in sessions.items()}
    assert all(outcome[0] == names[mcp] and outcome[1] <= 2 for mcp, _, outcome in load.outcomes)
    assert set(names) == {mcp for mcp, _, _ in load.outcomes}


def test_of_one_user_at_their_cap_the_longest_idle_child_makes_room_and_others_keep_theirs(make_rig):
    rig = make_rig(max_sessions_per_user=1)
    bob, first, second = rig.session("bob"), rig.session("alice"), rig.session("alice")
    kept = text_of(bob.call_tool("get_pid"))
    assert [who(mcp) for mcp in (first, second, first)] == ["alice"] * 3
    assert children(rig) == 2 and text_of(bob.call_tool("get_pid")) == kept


def test_a_clean_restart_costs_no_session_and_an_idle_client_does_not_notice(rig):
    sessions = [rig.session(name) for name in ("alice", "bob", "alice")]
    for mcp in sessions:
        mcp.request("logging/setLevel", {"level": "notice"})
    for _ in range(2):
        rig.restart()
        assert health(rig)["sessions"] == 3 and children(rig) == 0
        assert [who(same(mcp)) for mcp in sessions] == ["alice", "bob", "alice"]
    assert json_of(same(sessions[1]).call_tool("get_initialize"))["level"] == "notice"


def test_kill_9_of_the_broker_under_load_costs_no_session_and_writes_nothing_twice(make_installation):
    installation = make_installation()
    broker = installation.start()
    sessions = {session(installation, name): name for name in ("alice", "bob", "alice", "bob")}

    def call(mcp, number):
        name = next(name for each, name in sessions.items() if each.session_id == mcp.session_id)
        mcp.call_tool("create_issue", owner=name, repo=f"{name}-private", title=f"number {number}")
        return who(mcp)

    with Load(sessions, call) as load:
        for _ in range(3):
            load.wait(12)
            pids = broker.children()
            broker.kill()
            broker = installation.start()
            assert await_end(pids) == []
        load.wait(12)
    assert all(isinstance(failure, CUT) for failure in load.failures), load.failures
    titles = installation.forgejo.issue_titles()
    assert len(titles) == len(set(titles))
    for mcp, number, outcome in load.outcomes:
        assert isinstance(outcome, Exception) or (outcome == sessions[mcp] and f"number {number}" in titles)
    assert {who(same(mcp)) for mcp in sessions} == {"alice", "bob"}


def test_an_upgrade_that_migrates_the_schema_costs_no_session(rig, monkeypatch):
    mcp = rig.session()
    rig.stop()
    monkeypatch.setattr(
        fjmcp_broker,
        "MIGRATIONS",
        (
            *fjmcp_broker.MIGRATIONS,
            "ALTER TABLE sessions ADD COLUMN later TEXT NOT NULL DEFAULT 'x';\n"
            "CREATE TABLE later (n INTEGER);\n",
        ),
    )
    rig.start()
    assert who(same(mcp)) == "alice" and who(rig.session("bob")) == "bob"
    mcp.oauth.refresh()
    assert who(same(mcp, mcp.oauth.tokens["access_token"])) == "alice"
    with sqlite3.connect(rig.values["store_path"]) as db:
        assert db.execute("SELECT count(*) FROM sessions WHERE later = 'x'").fetchone() == (2,)
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()


def test_the_broker_never_repeats_a_call_by_itself_whatever_ended_it(make_rig, control):
    rig = make_rig(child=("--control", control.path))
    mcp = rig.session()
    ends = {
        "exit": lambda: control.command({"cmd": "exit", "code": 0}),
        "crash": lambda: os.kill(control.children[-1], signal.SIGKILL),
        "restart": rig.restart,
    }
    for key, end in ends.items():
        join = in_thread(same(mcp).call_tool, "get_slow", key=key)
        control.wait_event(
            lambda event, key=key: event["event"] == "call" and event["args"].get("key") == key
        )
        end()
        assert isinstance(join(), Exception)
        assert who(same(mcp)) == "alice"
    assert [
        event["args"]["key"]
        for event in control.events
        if event["event"] == "call" and event["tool"] == "get_slow"
    ] == list(ends)


# -- 2: rotation, busy children, replay


def test_tokens_rotate_under_constant_load_and_no_call_notices(make_rig):
    rig = make_rig(access_token_lifetime="30d", session_idle_timeout="30d")
    sessions = [rig.session(name) for name in ("alice", "bob", "alice")]
    with Load(sessions, lambda mcp, _: (who(mcp), token_of(mcp))) as load:
        for _ in range(4):
            load.wait(12)
            old = {outcome[1] for _, _, outcome in load.outcomes if not isinstance(outcome, Exception)}
            rig.clock.advance(3400)
            load.wait_each(
                lambda mcp, outcome, old=old: isinstance(outcome, Exception) or outcome[1] not in old
            )
        load.wait(12)
    assert not load.failures, load.failures
    owners = dict(zip(sessions, ("alice", "bob", "alice")))
    assert all(outcome[0] == owners[mcp] for mcp, _, outcome in load.outcomes)
    tokens = {outcome[1] for _, _, outcome in load.outcomes}
    assert (
        2 * (1 + 4) <= len(tokens) <= 2 * (1 + 4) + 1
    )  # one a user and turn, whatever the load; alice's first login had another
    assert "logged_out_upstream" not in {record["event"] for record in rig.log.records}


def test_a_busy_child_is_neither_slept_nor_evicted(make_rig, control):
    rig = make_rig(child=("--control", control.path), max_sessions=1, request_timeout="1h")
    mcp = rig.session()
    join = hanging_call(mcp, control)
    rig.clock.advance(3 * 901)
    waiting = in_thread(rig.session, "bob")
    rig.log.wait("login", 2)
    for _ in range(4):
        rig.tick()
    assert not rig.log.named("child_stopped")
    control.release("k")
    assert text_of(join()) == "slow k"
    assert who(waiting()) == "bob"  # the place was free the moment the call had ended


def test_a_child_whose_question_is_open_is_neither_slept_nor_evicted(make_rig, control):
    rig = make_rig(child=("--control", control.path), max_sessions=1)
    mcp = rig.session(capabilities={"elicitation": {}})
    _, stream = mcp.start_request("tools/call", {"name": "ask_elicit", "arguments": {}})
    question = stream.next()
    while not (isinstance(question.data, dict) and "method" in question.data):
        question = stream.next()
    rig.clock.advance(901)
    for _ in range(4):
        rig.tick()
    assert not rig.log.named("child_stopped")
    mcp.reply(question.data["id"], {"action": "accept", "content": {"answer": "blue"}})
    assert "blue" in json.dumps(stream.next().data)
    stream.close()


def test_a_child_that_keeps_state_is_neither_slept_nor_replaced(make_rig):
    rig = make_rig(child_keeps_state="true", access_token_lifetime="30d")
    mcp = rig.session()
    first = text_of(mcp.call_tool("get_pid"))
    rig.clock.advance(3400)
    rig.log.wait("upstream_refreshed")
    rig.tick()
    rig.tick()
    assert text_of(mcp.call_tool("get_pid")) == first and not rig.log.named("child_stopped")


def test_what_a_child_asks_during_a_replay_reaches_the_client(make_rig):
    rig = make_rig(child=("--mode", "asks_on_init"))
    mcp = rig.session(capabilities={"roots": {}})
    kill_child(rig, mcp)
    caller = same(mcp)
    stream = mcp.open_stream()
    mcp.on_request = caller.on_request = lambda method, params: {"roots": [{"uri": "file:///mine"}]}
    join = in_thread(answer_all, mcp, stream)
    while (seen := json_of(caller.call_tool("get_initialize"))["answer_on_init"]) is None:
        rig.tick()
    assert seen == {
        "roots": [{"uri": "file:///mine"}]
    }  # asked on the GET stream, or on that of the call which woke it
    stream.close()
    join()


def answer_all(mcp, stream):
    """Do with everything on a stream what a client does, until it ends."""
    with contextlib.suppress(StreamEnded):
        while True:
            mcp.handle(stream.next().data)


def test_what_a_child_asks_during_a_replay_is_answered_with_an_error_where_nobody_listens(
    make_rig, monkeypatch
):
    monkeypatch.setattr(fjmcp_broker, "QUESTION_GRACE", 1)
    rig = make_rig(child=("--mode", "asks_on_init"))
    mcp = rig.session(capabilities={"roots": {}})
    kill_child(rig, mcp)
    assert who(mcp) == "alice"  # it holds up nobody
    while (seen := json_of(mcp.call_tool("get_initialize"))["answer_on_init"]) is None:
        rig.tick()
    assert "error" in seen


def test_a_new_child_with_other_tools_is_said_so_and_one_with_the_same_is_not(make_rig, tmp_path):
    more = tmp_path / "more.json"
    rig = make_rig(child=("--mode", f"more_tools={more}"))
    mcp = rig.session()
    before = {tool["name"] for tool in mcp.list_tools()}
    stream = mcp.open_stream()
    kill_child(rig, mcp)
    who(mcp)
    more.write_text(json.dumps(["get_later"]))
    kill_child(rig, mcp)
    who(mcp)
    assert stream.next().data["method"] == "notifications/tools/list_changed"
    assert {tool["name"] for tool in mcp.list_tools()} - before == {"get_later"}
    kill_child(rig, mcp)
    who(mcp)
    mcp.request("prompts/list")
    with pytest.raises(TimeoutError):
        stream.next(0.3)  # once said, it is not said again
    stream.close()


def test_a_new_child_that_speaks_another_version_is_not_passed_on(make_rig, tmp_path):
    version = tmp_path / "version"
    rig = make_rig(child=("--mode", f"version_file={version}"))
    mcp = rig.session(protocol="2025-11-25")
    version.write_text("2025-03-26")
    kill_child(rig, mcp)
    assert who(mcp) == "alice"
    assert rig.log.named("child_speaks_another_version")
    assert mcp.post([LIST]).status == 400  # batches are for sessions that were negotiated at 2025-03-26
    rig.restart()
    assert who(same(mcp)) == "alice"


# -- 3: limits that degrade


def test_waiting_for_a_place_ends_with_503_and_the_reason_busy(make_rig, control, monkeypatch):
    monkeypatch.setattr(fjmcp_broker, "PLACE_WAIT", 1)
    rig = make_rig(child=("--control", control.path), max_sessions=1)
    alice = rig.session()
    join = hanging_call(alice, control)
    token = rig.login("bob").tokens["access_token"]
    answer = McpClient(rig.url + "/mcp", token).post(
        {
            "jsonrpc": "2.0",
            "id": 5,
            "method": "initialize",
            "params": {
                "protocolVersion": "2025-11-25",
                "capabilities": {},
                "clientInfo": {"name": "b", "version": "1"},
            },
        }
    )
    assert answer.status == 503 and int(answer.headers["Retry-After"]) > 0 and answer.json()["id"] == 5
    assert answer.json()["error"]["data"] == {"reason": "busy", "outcome_unknown": False, "retryable": True}
    assert health(rig)["sessions"] == 1  # what could not be opened is not kept
    control.release("k")
    assert text_of(join()) == "slow k"


def test_X12_one_users_busy_children_leave_room_for_another(make_rig, control, monkeypatch):
    monkeypatch.setattr(fjmcp_broker, "PLACE_WAIT", 1)
    rig = make_rig(child=("--control", control.path), max_sessions=3, max_sessions_per_user=2)
    busy = [hanging_call(rig.session("alice"), control, key) for key in ("a", "b")]
    control.wait_event(lambda event: event["event"] == "call" and event["args"].get("key") == "b")
    third = rig.login("alice").tokens["access_token"]
    answer = McpClient(rig.url + "/mcp", third).post(LIST)
    assert answer.status == 503 and answer.json()["error"]["data"]["reason"] == "busy"
    assert who(rig.session("bob")) == "bob"
    for key, join in zip("ab", busy):
        control.release(key)
        assert text_of(join()) == f"slow {key}"


def test_a_session_that_is_opened_while_grants_are_looked_at_is_not_ended(rig, monkeypatch):
    read, opened = rig.broker.store.living_pairs, []

    def then_someone_logs_in(subs, now):
        found = read(subs, now)
        if not opened:
            opened.append(None)
            opened.append(rig.session("bob"))
        return found

    monkeypatch.setattr(rig.broker.store, "living_pairs", then_someone_logs_in)
    rig.session("alice")
    rig.tick()
    rig.log.wait("session_opened", 2)
    monkeypatch.undo()
    rig.tick()
    assert who(opened[1]) == "bob" and not rig.log.named("session_ended")


def test_above_the_rows_of_a_user_the_session_unused_for_longest_ends_and_others_stay(make_rig):
    rig = make_rig(max_session_rows_per_user=2)
    bob = rig.session("bob")
    sessions = []
    for _ in range(3):
        sessions.append(rig.session("alice"))
        rig.clock.advance(1)
    assert same(sessions[0]).post(LIST).status == 404
    assert [who(mcp) for mcp in (*sessions[1:], bob)] == ["alice", "alice", "bob"]


def test_J15_above_max_inflight_a_request_is_refused_and_may_be_sent_again(make_rig, control):
    rig = make_rig(child=("--control", control.path), max_inflight=2)
    mcp = rig.session()
    joins = [in_thread(same(mcp).call_tool, "get_slow", key=key) for key in "ab"]
    for key in "ab":
        control.wait_event(
            lambda event, key=key: event["event"] == "call" and event["args"].get("key") == key
        )
    refused = mcp.post(LIST)
    assert refused.status == 429 and refused.json()["error"]["data"] == {
        "reason": "busy",
        "outcome_unknown": False,
        "retryable": True,
    }
    for key in "ab":
        control.release(key)
    assert sorted(text_of(join()) for join in joins) == ["slow a", "slow b"]
    assert mcp.post(LIST).status == 200


def test_J15_a_flood_of_notifications_hurts_nobody(make_rig):
    rig = make_rig()
    mcp, bob = rig.session(), rig.session("bob")
    for _ in range(1000):
        mcp.notify("notifications/whatever", {"text": "x" * 500})
    assert (who(mcp), who(bob)) == ("alice", "bob")


def test_an_open_GET_stream_keeps_no_child_awake_and_still_carries_what_comes_later(make_rig, control):
    rig = make_rig(child=("--control", control.path))
    mcp = rig.session()
    stream = mcp.open_stream()
    assert stream.wait_comment(10)
    rig.clock.advance(901)
    assert rig.log.wait("child_stopped")[0]["reason"] == "idle" and children(rig) == 0
    assert not stream.ended.is_set()
    who(mcp)
    control.emit(
        {"jsonrpc": "2.0", "method": "notifications/message", "params": {"level": "info", "data": "later"}},
        control.children[-1],
    )
    assert stream.next().data["params"]["data"] == "later"
    stream.close()


def test_three_failed_starts_are_answered_at_once_with_the_true_reason_and_it_recovers(make_rig, tmp_path):
    switch = tmp_path / "fails"
    rig = make_rig(child=("--mode", f"exit1={switch}"))
    mcp = rig.session()
    switch.write_text("")
    kill_child(rig, mcp)
    for _ in range(3):
        answer = mcp.post(LIST)
        assert answer.status == 503 and answer.json()["error"]["data"]["reason"] == "starting_failed"
    started = len(rig.log.named("child_started"))
    answer = mcp.post(LIST)
    assert (
        answer.status == 503
        and answer.json()["error"]["data"]["reason"] == "starting_failed"
        and "Retry-After" in answer.headers
    )
    assert len(rig.log.named("child_started")) == started
    switch.unlink()
    while mcp.post(LIST).status == 503:
        rig.tick()
    assert who(mcp) == "alice"


@pytest.mark.parametrize(
    "trouble, status, reason",
    [
        ("Forgejo is away", 503, "upstream_down"),
        ("the token is refused", 401, None),
        ("the program is gone", 500, "child_missing"),
        ("the program fails", 503, "starting_failed"),
        ("the program hangs", 503, "starting_failed"),
    ],
)
def test_why_no_child_can_be_had_is_told_apart_also_in_the_back_off(
    make_rig, tmp_path, trouble, status, reason
):
    program, switch = tmp_path / "program", tmp_path / "switch"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -I {TESTS}/stdio_child.py "$@"\n')
    program.chmod(0o755)
    mode = "hang_start" if "hangs" in trouble else "exit1"
    rig = make_rig(
        forgejo_mcp_binary=f"{program},--mode,{mode}={switch}",
        start_timeout="500ms" if "hangs" in trouble else "20s",
    )
    mcp = rig.session()
    kill_child(rig, mcp)
    if "away" in trouble:
        rig.forgejo.down()
    elif "refused" in trouble:
        rig.forgejo.revoke_grant("alice", rig.app.client_id)
    elif "gone" in trouble:
        program.unlink()
    else:
        switch.write_text("")
    for _ in range(4):
        answer = mcp.post(LIST)
        assert answer.status == status
        if reason:
            assert answer.json()["error"]["data"]["reason"] == reason
            assert answer.json()["error"]["code"] == (-32603 if status == 500 else -32000)
        else:
            assert 'error="invalid_token"' in answer.headers["WWW-Authenticate"]


def test_P18_a_missing_program_is_logged_loudly_and_costs_no_session(make_rig, tmp_path):
    program = tmp_path / "program"
    text = f'#!/bin/sh\nexec {sys.executable} -I {TESTS}/stdio_child.py "$@"\n'
    program.write_text(text)
    program.chmod(0o755)
    rig = make_rig(forgejo_mcp_binary=f"{program},x")
    mcp = rig.session()
    program.chmod(0o644)
    kill_child(rig, mcp)
    assert mcp.post(LIST).status == 500
    assert [record for record in rig.log.named("child_missing") if record["level"] == "error"]
    program.chmod(0o755)
    while mcp.post(LIST).status != 200:
        rig.tick()
    assert who(mcp) == "alice"
