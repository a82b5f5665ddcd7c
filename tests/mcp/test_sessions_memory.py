"""What is kept of what comes from outside has a bound in bytes, an owner and a time.

At a bound only its owner loses something.
"""

import ast
import gc
import json
import time
import types
import weakref
from pathlib import Path

import pytest

import fjmcp_broker
from fjmcp_broker import Allowance, anew
from rigs import mcp_client
from rigs.busy_clients import same
from rigs.mcp_client import McpClient, RpcError
from rigs.modern_requests import call, connect, listening, refused, retry_of
from rigs.rig import text_of, who

FILE = Path(fjmcp_broker.__file__)


@pytest.fixture
def unjudged(monkeypatch):
    """What a child that floods says keeps to no schema."""
    monkeypatch.setattr(mcp_client, "judge", None)


# -- exceptions


class Traced:
    """Something that a request holds."""


def test_an_exception_raised_anew_keeps_no_frame_and_no_cause_of_the_first_time():
    try:
        try:
            raise KeyError("cause")
        except KeyError:
            raise fjmcp_broker.unavailable("busy", "x") from None
    except fjmcp_broker.RpcError as error:
        copy = anew(error)
    assert (copy.__traceback__, copy.__context__, copy.__cause__) == (None, None, None)
    assert (copy.code, copy.message, copy.status) == (-32000, "x", 503) and copy.data["reason"] == "busy"


def test_no_request_is_kept_by_the_failure_to_start_a_child(make_rig):
    rig = make_rig(child=("--mode", "exit1"))
    mcp = McpClient(rig.url + "/mcp", rig.login().tokens["access_token"])
    for _ in range(3):
        assert mcp.post({"jsonrpc": "2.0", "id": 1, "method": "tools/list"}).status == 503
    (place,) = rig.broker.sessions.all()
    place.backends.retry_at = float("inf")
    kept = []

    def refused_with(something):
        kept.append(weakref.ref(something))
        with pytest.raises(fjmcp_broker.RpcError):
            place.backends.ensure()

    gc.disable()
    try:
        for _ in range(5):
            refused_with(Traced())
        assert [each() for each in kept] == [None] * 5
    finally:
        gc.enable()


def test_no_stored_exception_is_raised_as_it_is():
    raises = [node for node in ast.walk(ast.parse(FILE.read_text())) if isinstance(node, ast.Raise)]
    assert len(raises) > 50
    assert [ast.unparse(node) for node in raises if isinstance(node.exc, ast.Attribute)] == []


# -- children that flood


def test_an_allowance_grants_its_burst_and_then_its_rate(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(fjmcp_broker.time, "monotonic", lambda: now[0])
    allowance = Allowance(3, 2)
    assert [allowance.grants() for _ in range(5)] == [True] * 3 + [False] * 2 and allowance.refused == 2
    now[0] += 1
    assert [allowance.grants() for _ in range(3)] == [True, True, False]
    now[0] += 60
    assert allowance.spend(3) == 0 and allowance.spend(4) == 2


def ask(number, size=0):
    return {
        "jsonrpc": "2.0",
        "id": number,
        "method": "elicitation/create",
        "params": {"message": "x" * size, "requestedSchema": {"type": "object", "properties": {}}},
    }


@pytest.mark.parametrize("count, size", [(fjmcp_broker.MAX_QUESTIONS, 0), (10, 100_000)])
def test_questions_that_wait_for_a_client_are_bounded_in_number_and_bytes(
    controlled, control, unjudged, count, size
):
    mcp, bob = controlled.session(capabilities={"elicitation": {}}), controlled.session("bob")
    pid = control.children[0]
    for number in range(count + 5):
        control.emit(ask(f"q{number}", size), pid)
    refusal = control.wait_event(event="message", method=None, pid=pid)
    session = next(each for each in controlled.broker.sessions.all() if each.questions.open)
    assert refusal["id"] == f"q{count}" and len(session.questions.open) == count
    assert sum(question.size for question in session.questions.open) <= fjmcp_broker.MAX_QUESTION_BYTES
    assert who(bob) == "bob" and who(same(mcp)) == "alice"


def test_junk_between_good_lines_is_logged_at_a_fixed_rate_and_counted(controlled, control):
    mcp = controlled.session()
    for _ in range(40):
        control.raw(b'junk\n{"jsonrpc":"2.0","method":"notifications/x"}\n' * 10)
    control.emit({"jsonrpc": "2.0", "method": "ping", "id": "read"})
    control.wait_event(event="message", method=None, id="read")
    assert 10 <= len(controlled.log.named("bad_line_from_child")) <= 12
    assert who(same(mcp)) == "alice"


def test_a_child_that_sends_without_end_is_read_no_faster_than_its_allowance(
    controlled, control, monkeypatch
):
    held = []
    monkeypatch.setattr(fjmcp_broker, "FLOOD_BURST", 64)
    monkeypatch.setattr(fjmcp_broker, "FLOOD_RATE", 1)
    monkeypatch.setattr(
        fjmcp_broker.Child, "hold_back", lambda child, seconds: held.append((child.pid, seconds))
    )
    mcp, bob = controlled.session(), controlled.session("bob")
    pid = control.children[0]
    line = json.dumps({"jsonrpc": "2.0", "method": "notifications/x", "params": {"data": "x" * 500_000}})
    for _ in range(3):
        control.raw(line.encode() + b"\n", pid)
    control.emit({"jsonrpc": "2.0", "method": "ping", "id": "read"}, pid)
    control.wait_event(event="message", method=None, id="read")
    waits = [seconds for each, seconds in held if each == pid and seconds > 0]
    assert waits
    assert text_of(same(bob).call_tool("get_echo", text="x" * 1_000_000)) and not [
        seconds for each, seconds in held if each != pid and seconds > 0
    ]
    assert who(same(mcp)) == "alice"


# -- subscriptions


@pytest.mark.parametrize("era", ["legacy", "modern"])
def test_subscriptions_of_a_session_are_bounded_in_number_and_length(make_rig, era):
    rig = make_rig(child=("--era", era), max_subscriptions=3)
    mcp = rig.session()

    def code(uri):
        try:
            return mcp.request("resources/subscribe", {"uri": uri})
        except RpcError as error:
            return error.http_status, error.code

    uris = [f"test://echo/{number}" for number in range(4)]
    assert code("test://echo/" + "u" * 3000) == (200, -32602)
    assert [code(uri) for uri in uris] == [{}, {}, {}, (200, -32602)]
    assert code(uris[0]) == {}  # again, which is no more
    mcp.request("resources/unsubscribe", {"uri": uris[1]})
    assert code(uris[3]) == {}
    (session,) = rig.broker.sessions.all()
    row = rig.broker.store.session(session.name, session.sub, session.client_id)
    assert (
        sorted(json.loads(row.subscriptions)) == [uris[0], uris[2], uris[3]]
        and not session.replay.subscribing
    )


def test_a_subscription_whose_child_dies_does_not_count(controlled, control):
    mcp = controlled.session()
    (session,) = controlled.broker.sessions.all()
    assert not session.replay.begin_subscription("test://note") and session.replay.subscribing
    session.replay.end_subscription("test://note")
    control.command({"cmd": "exit", "code": 1})
    controlled.log.wait("child_stopped")
    assert mcp.request("resources/subscribe", {"uri": "test://note"}) == {} and not session.replay.subscribing


def test_a_session_on_file_with_more_subscriptions_than_allowed_is_cut(rig):
    mcp = rig.session()
    (session,) = rig.broker.sessions.all()
    uris = [f"test://echo/{number}" for number in range(200)]
    rig.broker.store.update_session(session.name, None, ["x" * 5000, *uris], None, None)
    rig.restart()
    assert who(same(mcp)) == "alice"
    (session,) = rig.broker.sessions.all()
    assert (
        len(session.replay.subscriptions) in (127, 128) and max(map(len, session.replay.subscriptions)) < 100
    )


@pytest.mark.parametrize(
    "wanted",
    [
        None,
        [],
        {"resourceSubscriptions": [f"test://echo/{number}" for number in range(129)]},
        {"resourceSubscriptions": ["test://echo/" + "u" * 3000]},
    ],
)
def test_a_refused_listener_leaves_nothing_and_starts_nothing(rig, wanted):
    mcp = connect(rig, capabilities={"elicitation": {}})
    params = {} if wanted is None else {"notifications": wanted}
    assert refused(mcp, "subscriptions/listen", params)[:2] == (400, -32602)
    assert (rig.broker.sessions.all(), rig.broker.sessions.pools) == ([], {})
    assert not rig.log.named("child_started")


def test_a_listener_has_as_many_resources_as_allowed(rig):
    uris = [f"test://echo/{number}" for number in range(128)]
    with listening(connect(rig), resourceSubscriptions=uris) as (honoured, _, _):
        assert sorted(honoured["resourceSubscriptions"]) == sorted(uris)


# -- what a child says of itself, and what a client answers it


def test_a_child_that_says_too_much_of_itself_is_not_started(make_rig, monkeypatch):
    monkeypatch.setattr(fjmcp_broker, "MAX_SERVER", 5000)
    rig = make_rig(child=("--mode", f"instructions={'x' * 5000}"))
    with pytest.raises(RpcError) as refusal:
        rig.session()
    assert (refusal.value.http_status, refusal.value.data["reason"]) == (503, "starting_failed")
    assert rig.log.named("child_says_too_much_of_itself")


class Backend:
    """A backend that notes what it is told."""

    def __init__(self, collects):
        self.dialect, self.told = types.SimpleNamespace(is_modern=collects), []

    def answer(self, question, result, error, last):
        self.told.append((result, error, last))


@pytest.mark.parametrize("collects", [False, True])
def test_answers_to_questions_are_kept_only_for_a_child_that_gets_them_together_and_within_a_body(
    make_rig, collects
):
    rig = make_rig(max_body="10KiB")
    rig.session()
    (session,) = rig.broker.sessions.all()
    backend = Backend(collects)
    asking = fjmcp_broker.Call("tools/call", {}, 0.0)
    for number in range(3):
        question = fjmcp_broker.OpenQuestion(backend, f"q{number}", "roots/list", {})
        assert session.questions.ask(question, asking, 60)
        session.questions.answer(question, {"x": "y" * 4000})
    errors = [error for _, error, _ in backend.told]
    assert [bool(error) for error in errors] == [False, False, collects]
    assert len(json.dumps(asking.input_responses)) < (16_000 if collects else 10)


# -- what is parsed


MARK = "parsed and kept"
HEAVY = b"[" + b",".join([b'{"%s":[]}' % MARK.encode()] * 1000) + b"]"


def parsed_values():
    """How many of the objects in HEAVY are in memory; the test itself has none but bytes."""
    gc.collect()
    return sum(1 for each in gc.get_objects() if type(each) is dict and each.keys() == {MARK})


def wait_until(condition):
    """Until a connection's thread has let go of its request, too."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_a_client_says_of_itself_is_parsed_only_while_a_child_is_told(rig):
    body = (
        b'{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25",'
        b'"clientInfo":{"name":"x","version":"1"},"capabilities":{"experimental":{"x":{"y":'
        + HEAVY
        + b"}}}}}"
    )
    with McpClient(rig.url + "/mcp", rig.login().tokens["access_token"]) as mcp:
        assert mcp.post(body).status == 200
    (session,) = rig.broker.sessions.all()
    assert len(session.initialize["capabilities"]["experimental"]["x"]["y"]) == 1000
    wait_until(lambda: parsed_values() == 0)


def test_a_log_level_that_is_none_is_never_kept_whatever_a_child_lets_pass(rig):
    with McpClient(rig.url + "/mcp", rig.login().tokens["access_token"]) as mcp:
        mcp.initialize()
        mcp.request("logging/setLevel", {"level": "error"})
        (session,) = rig.broker.sessions.all()
        assert session.replay.level == "error"
        fat = fjmcp_broker.Message("request", 1, "logging/setLevel", {"level": "x" * 1000}, {})
        assert fjmcp_broker.remembers(session, fat) is None
        # A broker of before may have kept one.
        rig.broker.store.update_session(session.name, "x" * 1000, [], None, None)
        rig.restart()
        assert text_of(mcp.call_tool("get_echo", text="awake")) == "awake"
        (session,) = rig.broker.sessions.all()
        assert session.replay.level is None


@pytest.mark.parametrize("protocol", (mcp_client.LEGACY, mcp_client.MODERN))
@pytest.mark.parametrize("era", ("legacy", "modern"))
def test_a_call_in_flight_holds_nothing_of_it_that_was_parsed(make_rig, control, era, protocol):
    rig = make_rig(child=("--era", era, "--control", control.path))
    mcp = McpClient(
        rig.url + "/mcp",
        rig.login().tokens["access_token"],
        protocol=protocol,
        capabilities={"elicitation": {}},
    )
    with mcp:
        if not mcp.is_modern:
            mcp.initialize()
        message = mcp._message("tools/call", {"name": "get_slow", "arguments": {"key": "k"}}, 7)
        body = json.dumps(message).encode().replace(b'"name"', b'"heavy": ' + HEAVY + b', "name"', 1)
        with mcp.open_post(body, headers=mcp.headers(message)) as stream:
            control.wait_event(event="call", tool="get_slow")
            wait_until(lambda: parsed_values() == 0)
            control.release("k")
            while not (event := stream.next()).data:
                pass
            assert text_of(event.data["result"]) == "slow k"


def test_a_modern_child_asks_in_the_middle_of_a_large_call_and_of_one_that_is_too_large(make_rig):
    rig = make_rig(child=("--era", "modern"))
    mcp = connect(rig, capabilities={"elicitation": {}})
    asked = call(mcp, "ask_elicit", {"message": "x" * 500_000})
    answered = call(mcp, "ask_elicit", {"message": "x" * 500_000}, **retry_of(asked))
    assert answered["resultType"] == "complete", answered
    status, code, data = refused(
        mcp, "tools/call", {"name": "ask_elicit", "arguments": {"pad": "x" * 2_000_000}}
    )
    assert (status, code, data["reason"]) == (200, -32603, "bad_answer")
