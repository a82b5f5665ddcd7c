"""What must hold when several things go wrong at once.

Children that nobody names, failed reads of the store, requests that are half wrong.
"""

import os
import select
import sys
import threading
import time
import unittest.mock

import pytest

import fjmcp_broker
from rigs import mcp_client
from rigs.mcp_client import McpClient, RpcError
from rigs.modern_requests import ALL_INPUT, call, connect, retry_of
from rigs.processes import in_thread
from rigs.rig import TESTS

STUBBORN = """
import json, signal, sys, threading
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for line in sys.stdin:
    message = json.loads(line)
    if "id" not in message or "method" not in message:
        continue
    answer = {"error": {"code": -32601, "message": "no"}}
    if message["method"] == "initialize" and "fail" not in sys.argv:
        server = {"name": "x", "version": "1"}
        answer = {"result": {"protocolVersion": "2025-11-25", "capabilities": {}, "serverInfo": server}}
    print(json.dumps({"jsonrpc": "2.0", "id": message["id"], **answer}), flush=True)
threading.Event().wait()
"""


def opening(**params):
    return {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "initialize",
        "params": {"protocolVersion": "2025-11-25", "capabilities": {}, **params},
    }


def client(rig):
    return McpClient(rig.url + "/mcp", rig.login().tokens["access_token"])


def places_are_free(rig):
    """Whether no child has a place, soon."""
    return rig.broker.capacity.wait_until_empty(15)


def has_ended(pid):
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], 15)[0])
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("end", ["sleep", "delete", "failed handshake"])
def test_a_child_that_ignores_its_end_is_killed_whoever_stopped_it(make_rig, tmp_path, end):
    script = tmp_path / "stubborn.py"
    script.write_text(STUBBORN)
    fails = ",fail" if end == "failed handshake" else ""
    rig = make_rig(forgejo_mcp_binary=f"{sys.executable},{script}{fails}", stop_timeout="300ms")
    if fails:
        assert "error" in client(rig).post(opening()).json()
    else:
        mcp = rig.session()
        session = rig.broker.sessions.all()[0]
        if end == "sleep":
            assert session.backends.sleep("idle")
        else:
            mcp.delete()
    assert places_are_free(rig)
    started = rig.log.named("child_started")
    assert len(started) == 1 and has_ended(started[0]["pid"])


@pytest.mark.parametrize("era", ["legacy", "modern"])
def test_capabilities_that_are_no_object_are_refused_and_take_no_place(make_rig, era):
    rig = make_rig(child=("--era", era) if era == "modern" else ())
    answer = client(rig).post(opening(capabilities="x"))
    assert (answer.status, answer.json()["error"]["code"]) == (400, -32602)
    assert not rig.broker.capacity.count() and not rig.broker.sessions.all()


def test_a_revocation_is_in_force_although_the_grants_could_not_be_read_once(rig, monkeypatch):
    mcp = rig.session()
    rig.tick()
    real, failed = rig.broker.store.living_pairs, []

    def living_pairs(subs, now):
        if not failed:
            failed.append(now)
            raise fjmcp_broker.StoreUnavailable("busy")
        return real(subs, now)

    monkeypatch.setattr(rig.broker.store, "living_pairs", living_pairs)
    mcp.oauth.revoke(mcp.oauth.tokens["refresh_token"])
    rig.log.wait("child_stopped")
    assert failed and places_are_free(rig)


def test_a_place_whose_client_has_no_login_any_more_goes_alone_from_its_pool(rig):
    sessions = rig.broker.sessions
    places = [sessions.lease("1", "x", {}, alone=True).frontend.session for _ in range(2)]
    sessions.forget_but(set(), places[:1], "grant ended")
    assert sessions.all() == places[1:] and places[0].ended and not places[1].ended


def test_only_the_program_that_asked_is_known_to_ask(make_rig, tmp_path):
    script = tmp_path / "program"
    text = f'#!/bin/sh\nexec {sys.executable} -I {TESTS}/stdio_child.py "$@"\n'
    script.write_text(text)
    script.chmod(0o755)
    rig = make_rig(forgejo_mcp_binary=f"{script},x")
    first = connect(rig, capabilities=ALL_INPUT)
    first.request("tools/list")
    old = rig.broker.sessions.all()[0].backend.program.fingerprint
    script.write_text(text + "# an upgrade\n")
    connect(rig, "bob", capabilities=ALL_INPUT).request("tools/list")
    new = rig.broker.sessions.all()[-1].backend.program.fingerprint
    assert old != new
    first.auto = None
    assert call(first, "ask_elicit")["resultType"] == "input_required"
    assert rig.broker.store.program(old).sends_requests
    assert not rig.broker.store.program(new).sends_requests
    assert not rig.broker.launcher.sends_requests


def test_a_call_ends_with_its_session_and_gives_its_lease_back(rig):
    mcp = connect(rig)
    call(mcp, "get_pid")
    (place,) = rig.broker.sessions.all()
    asked = in_thread(call, mcp, "silent")
    while not any(each.method == "tools/call" for each in place.calls()):
        time.sleep(0.01)
    place.end("grant ended")
    assert asked().data["reason"] == "session_ended"
    while place.frontend.users:  # the answer goes first
        time.sleep(0.01)


def test_requests_do_not_make_the_reaper_read_all_grants(rig, monkeypatch):
    mcp = rig.session()
    mcp.list_tools()  # what is remembered of the first list is written down
    rig.tick()
    rig.tick()
    read = []
    real = rig.broker.store.living_pairs
    monkeypatch.setattr(
        rig.broker.store, "living_pairs", lambda subs, now: read.append(now) or real(subs, now)
    )
    for _ in range(5):
        assert mcp.request("tools/list")["tools"]
        rig.tick()
    assert read == []


def test_a_stream_whose_grant_ended_while_it_was_let_in_ends(rig):
    mcp = rig.session()
    reaper, store = rig.broker.reaper, rig.broker.store
    row = store.bearer(fjmcp_broker.token_hash(mcp.token), rig.clock.now())
    caller = fjmcp_broker.Caller(
        row.sub, row.login, row.client_id, row.grant_id, row.scope, row.requested_scope, row.expires_at
    )
    store.end_grant(row.grant_id, "test", rig.clock.now())
    rig.tick()
    reader = fjmcp_broker.EventStream().open()
    reaper.track(reader, caller, True)
    rig.tick()
    assert reader.ended


def test_a_failing_session_keeps_the_reaper_from_nothing_else(rig, monkeypatch):
    mcp, bob = rig.session(), rig.session("bob")
    first = rig.broker.sessions.all()[0]
    monkeypatch.setattr(first, "tick", lambda now: 1 / 0)
    mcp.oauth.revoke(mcp.oauth.tokens["refresh_token"])
    rig.tick()
    assert first.ended and rig.log.named("reaper_failed") and bob.request("ping") == {}


@pytest.mark.parametrize("what", ["start", "refresh", "look"])
def test_without_a_thread_nothing_stays_marked(rig, monkeypatch, what):
    mcp = rig.session()
    session = rig.broker.sessions.all()[0]
    session.backends.sleep("idle")
    places_are_free(rig)

    def none(_thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none)
        if what == "start":
            session.backends.start_in_background()
        elif what == "refresh":
            rig.broker.reaper._refresh_in_background(session.sub, 1)
        else:
            rig.broker.launcher.examine_in_background(session.sub)
    assert not session.backends.starting and not rig.broker.reaper._refreshing
    assert mcp.call_tool("get_pid")


def test_what_a_token_with_write_began_a_read_only_token_cannot_finish(rig):
    oauth = rig.login()
    full = connect(rig, oauth=oauth, capabilities=ALL_INPUT)
    full.auto = None
    asked = call(full, "ask_elicit")
    oauth.login(None, "alice", "secret", "read")
    reader = connect(rig, oauth=oauth, capabilities=ALL_INPUT)
    reader.auto = None
    with pytest.raises(RpcError) as refusal:
        call(reader, "ask_elicit", **retry_of(asked))
    assert refusal.value.code == -32602 and "more access" in str(refusal.value)
    assert call(full, "ask_elicit", **retry_of(asked))["resultType"] == "complete"


def test_a_child_that_ends_before_its_start_has_returned_frees_its_place(rig, monkeypatch):
    class Quick(fjmcp_broker.Child):
        def __init__(self, _command, *rest):
            super().__init__([sys.executable, "-c", ""], *rest)
            assert self.ended.wait(15)

    monkeypatch.setattr(fjmcp_broker, "Child", Quick)
    assert "error" in client(rig).post(opening()).json()
    assert places_are_free(rig)


def test_requests_without_a_session_that_get_no_child_leave_no_lease(rig, monkeypatch):
    def spawn(*_arguments):
        raise fjmcp_broker.unavailable("starting_failed", "x")

    monkeypatch.setattr(rig.broker.launcher, "spawn", spawn)
    mcp = client(rig)
    for _ in range(3):
        assert mcp.post({"jsonrpc": "2.0", "id": 1, "method": "tools/list"}).status == 503
    assert [place.frontend.users for place in rig.broker.sessions.all()] == [0]


def test_a_batch_with_large_answers_loses_none_when_the_last_comes_after_the_wait_for_plain_json(monkeypatch):
    stream = fjmcp_broker.EventStream(256, 1 << 20, 35.0, answers=3)
    reader, written, due = stream.open(), [], [b'{"id":1}', b'{"id":2}', b'{"id":3}']
    take = reader.take

    def put_next():
        if due:
            stream.put(due.pop(0) + b" " * 700_000, answer=True)

    def take_and_go_on(*arguments):
        item = take(*arguments)
        if (
            item is None or len(due) == 2
        ):  # the second while the first is looked at, the third when the wait is over
            put_next()
        return item

    monkeypatch.setattr(reader, "take", take_and_go_on)
    put_next()
    server = unittest.mock.MagicMock()
    connection = fjmcp_broker.Connection(server, None, "192.0.2.1")
    monkeypatch.setattr(connection, "_write", written.append)
    monkeypatch.setattr(fjmcp_broker, "JSON_WAIT", 0.0)
    response = fjmcp_broker.Response(200, streaming=fjmcp_broker.StreamingResponse(reader, batch=True))
    connection._pump(response, response.streaming)
    assert all(b'{"id":%d}' % number in b"".join(written) for number in (1, 2, 3))


@pytest.mark.parametrize(
    "method, params, outcome",
    [
        ("tools/list", {"_meta": 5}, "result"),
        ("resources/subscribe", {"uri": 5}, "error"),
        ("resources/subscribe", {"uri": []}, "error"),
    ],
)
def test_a_request_with_wrong_parts_hurts_itself_only(make_rig, monkeypatch, method, params, outcome):
    monkeypatch.setattr(mcp_client, "judge", None)
    rig = make_rig(child=("--era", "modern"))
    mcp = rig.session()
    answer = mcp.post({"jsonrpc": "2.0", "id": "wrong", "method": method, "params": params})
    assert answer.status == 200 and answer.json()["id"] == "wrong" and outcome in answer.json()
    assert mcp.list_tools()


def test_capabilities_too_large_to_keep_are_refused(rig):
    mcp = connect(rig, capabilities={"experimental": {"x": {"y": "z" * rig.broker.settings.max_form}}})
    with pytest.raises(RpcError) as refusal:
        mcp.request("tools/list")
    assert (refusal.value.http_status, refusal.value.code) == (400, -32602)
