"""A child that misbehaves hurts the requests of its own session and nothing else.

Case ids are those of docs/security.md.
"""

import itertools
import json
import os
import signal
import socket

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rigs import mcp_client
from rigs.busy_clients import children, same
from rigs.child_control import ChildControl
from rigs.mcp_client import HttpError, RpcError
from rigs.processes import await_end, in_thread
from rigs.rig import Rig, text_of, who


@pytest.fixture(autouse=True)
def unjudged(monkeypatch):
    """What such a child says of itself is passed on as it is, and keeps to no schema."""
    monkeypatch.setattr(mcp_client, "judge", None)


def beside(rig, misbehave, *, again=True):
    """What came of a call of alice's that misbehaves.

    Bob's session works meanwhile and after, and so does alice's again.
    """
    alice, bob = rig.session("alice"), rig.session("bob")
    pid = text_of(bob.call_tool("get_pid"))
    join = in_thread(misbehave, alice)
    for _ in range(5):
        assert who(bob) == "bob"
    outcome = join()
    assert who(bob) == "bob" and text_of(bob.call_tool("get_pid")) == pid
    if again:
        assert who(same(alice)) == "alice"
    return outcome


# -- what ends the child, and says so


@pytest.mark.parametrize(
    "tool, arguments, settings, reason",
    [
        ("endless_line", {}, {}, "answer_too_large"),
        ("big_line", {"bytes": 20_000_000}, {}, "answer_too_large"),
        ("partial_line", {"exit": True, "ms": 0}, {}, "child_died"),
        ("bad_lines", {"n": 100}, {}, "child_died"),
        ("crash", {"signal": "SIGSEGV"}, {}, "child_died"),
        ("silent", {}, {"request_timeout": "1s"}, "timed_out"),
        ("null_id", {}, {"request_timeout": "1s"}, "timed_out"),
        ("wrong_id", {}, {"request_timeout": "1s"}, "timed_out"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_J08_J20_J22_P09_what_goes_wrong_is_told_to_its_own_call_only(
    make_rig, tool, arguments, settings, reason
):
    rig = make_rig(**settings)
    error = beside(rig, lambda mcp: mcp.call_tool(tool, **arguments))
    assert isinstance(error, RpcError) and (error.http_status, error.code) == (200, -32000)
    assert error.data == {"reason": reason, "outcome_unknown": True, "retryable": reason == "child_died"}
    if reason == "timed_out":
        assert not rig.log.named("child_stopped")
    else:
        assert len(rig.log.wait("child_stopped")) == 1


@pytest.mark.parametrize(
    "tool, arguments, answer",
    [
        ("null_id", {"answer": True}, "right id"),
        ("wrong_id", {"answer": True}, "right id"),
        ("double_answer", {}, "first"),
        ("bad_lines", {"n": 99}, "99 bad lines"),
        ("partial_line", {"ms": 300}, "two halves"),
        ("stderr_flood", {"bytes": 30_000_000}, "flooded"),
        ("big_line", {"bytes": 15_000_000}, None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_J08_J20_P15_what_is_only_odd_costs_nothing(make_rig, tool, arguments, answer):
    rig = make_rig()
    text = text_of(beside(rig, lambda mcp: mcp.call_tool(tool, **arguments)))
    assert text == answer or answer is None and len(text) > 14_000_000
    assert not rig.log.named("child_stopped")


def test_only_the_call_whose_answer_is_too_large_is_told_so(make_rig, control):
    rig = make_rig(child=("--control", control.path), max_line="1MiB")
    mcp = rig.session()
    other = in_thread(same(mcp).call_tool, "get_slow", key="k")
    control.wait_event(event="call", tool="get_slow")
    with pytest.raises(RpcError) as refusal:
        mcp.call_tool("big_line", bytes=2_000_000)
    assert refusal.value.data == {"reason": "answer_too_large", "outcome_unknown": True, "retryable": False}
    assert other().data == {"reason": "child_died", "outcome_unknown": True, "retryable": True}


WORDS = "cannot load config: permission denied"


def test_why_a_child_dies_at_its_start_is_a_warning_without_its_token(make_rig, tmp_path):
    program = tmp_path / "program"
    program.write_text(f'#!/bin/sh\necho "{WORDS} $FORGEJO_ACCESS_TOKEN" >&2\nexit 3\n')
    program.chmod(0o755)
    rig = make_rig(forgejo_mcp_binary=f"{program},x", debug="false")
    mcp = mcp_client.McpClient(rig.url + "/mcp", rig.login().tokens["access_token"])
    with pytest.raises(RpcError) as refusal:
        mcp.initialize()
    assert refusal.value.data["reason"] == "starting_failed" and WORDS not in str(refusal.value)
    # It is started twice, the second time without the question for its era: each death is told.
    for record in rig.log.wait("child_died"):
        assert (record["level"], record["at"], record["reason"]) == (
            "warning",
            "start",
            "exited with status 3",
        )
        assert record["stderr"] == [f"{WORDS} [token]"]


def test_an_unexpected_end_is_a_warning_and_an_idle_stop_is_none(rig):
    mcp = rig.session()
    rig.clock.advance(901)
    rig.log.wait("child_stopped")
    assert not rig.log.named("child_died")
    with pytest.raises(RpcError):
        mcp.call_tool("crash", signal="SIGSEGV")
    (record,) = rig.log.wait("child_died")
    assert (record["level"], record["at"], record["reason"]) == ("warning", "work", "killed by SIGSEGV")


def test_warnings_of_children_that_die_come_at_a_fixed_rate(rig):
    log = rig.broker.log
    for number in range(500):
        log.bounded("warning", "child_died", "alice", number=number)
    log.bounded("warning", "child_died", "bob", number=0)
    assert len(rig.log.named("child_died")) == 11


def test_J08_stray_and_second_answers_are_counted_and_dropped(rig):
    mcp = rig.session()
    for tool in ("double_answer", "wrong_id", "null_id"):
        mcp.call_tool(tool, answer=True)
    assert mcp.request("ping") == {}
    assert len(rig.log.wait("stray_answer_from_child", 2)) + len(rig.log.wait("bad_line_from_child")) >= 3


def test_J20_bad_lines_are_logged_without_what_is_in_them(rig):
    mcp = rig.session()
    mcp.call_tool("bad_lines", n=5)
    assert rig.log.wait("bad_line_from_child", 5) and "no JSON at all" not in rig.log.text


def test_J16_a_child_that_stops_reading_is_given_up_and_hurts_only_its_own_session(rig):
    def clog(mcp):
        mcp.call_tool("stop_reading")
        return same(mcp).call_tool("get_echo", text="x" * 3_000_000)

    error = beside(rig, clog)
    assert isinstance(error, RpcError) and error.data["reason"] == "child_died"
    assert "stuck" in {record["reason"] for record in rig.log.wait("child_stopped")}


@pytest.mark.parametrize(
    "mode", ["junk_at_start", "flood_stderr_at_start=3000000", "ignore_term", "term_waits"]
)
def test_a_child_that_starts_or_ends_oddly_serves(make_rig, mode):
    rig = make_rig(child=("--mode", mode), stop_timeout="300ms")
    mcp = rig.session()
    pid = int(text_of(mcp.call_tool("get_pid")))
    rig.clock.advance(901)
    rig.log.wait("child_stopped")
    assert await_end([pid]) == [] and who(mcp) == "alice"


def test_P10_an_ignored_SIGTERM_and_a_grandchild_outlive_neither_their_time_nor_the_session(make_rig):
    rig = make_rig(child=("--mode", "ignore_term"), stop_timeout="300ms")
    mcp, bob = rig.session(), rig.session("bob")
    pids = [int(text_of(mcp.call_tool(tool))) for tool in ("get_pid", "grandchild")]
    mcp.delete()
    assert await_end(pids) == []
    rig.log.wait("child_stopped")
    assert who(bob) == "bob" and children(rig) == 1


def test_P10_a_grandchild_in_a_session_of_its_own_holds_up_neither_the_end_nor_the_place(make_rig):
    rig = make_rig(max_sessions=1, stop_timeout="300ms")
    mcp = rig.session()
    sleeper = int(text_of(mcp.call_tool("grandchild", own_session=True)))
    try:
        assert who(rig.session("bob")) == "bob"  # alice's child made room
    finally:
        os.kill(sleeper, signal.SIGKILL)


def test_P16_a_child_that_floods_a_client_which_does_not_read_is_held_back_and_memory_stays_flat(
    make_rig, control
):
    rig = make_rig(child=("--control", control.path), write_timeout="2s")
    mcp, bob = rig.session(), rig.session("bob")
    head = "".join(
        f"{name}: {value}\r\n"
        for name, value in {**mcp.headers(), "Host": rig.url.removeprefix("http://")}.items()
    )
    line = (
        json.dumps(
            {
                "jsonrpc": "2.0",
                "method": "notifications/message",
                "params": {"level": "info", "data": "x" * 60000},
            }
        ).encode()
        + b"\n"
    )
    before = resident()
    with socket.create_connection(("127.0.0.1", int(rig.url.rpartition(":")[2]))) as deaf:
        deaf.sendall(f"GET /mcp HTTP/1.1\r\n{head}\r\n".encode())
        deaf.recv(1000)
        flooded = in_thread(lambda: [control.raw(line * 10, control.children[0]) for _ in range(60)])
        for _ in range(20):
            assert who(bob) == "bob"
        assert flooded() == [1] * 60  # for the connection of who takes nothing is cut at its time
    assert resident() - before < 30 << 20
    assert who(same(mcp)) == "alice"


def resident():
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmRSS"))


# -- what it prints is data


EVIL = "data: forged\n\nevent: evil\nid: 99-1\nretry: 1\n\r\u2028\u0085"


def test_J19_a_bare_CR_between_tokens_injects_nothing_into_a_stream(make_rig, control):
    rig = make_rig(child=("--control", control.path))
    mcp = rig.session()
    stream = mcp.open_stream()
    control.raw(b'{"jsonrpc":"2.0",\r"method":"notifications/message",\revent:1}\n')
    body = json.dumps({"level": "info", "data": EVIL}).encode()
    control.raw(b'{"jsonrpc":"2.0",\r"method":\r"notifications/message","params":' + body + b"}\n")
    event = stream.next()
    assert (
        event.event == "message"
        and event.data["params"]["data"] == EVIL
        and "\r" not in json.dumps(event.data)
    )
    stream.close()


@pytest.mark.parametrize("streamed", [False, True])
def test_J19_a_bare_CR_in_an_answer_injects_nothing_either(make_rig, control, streamed):
    rig = make_rig(child=("--control", control.path))
    mcp = rig.session()
    request_id, answer = None, []

    def call():
        message = {
            "jsonrpc": "2.0",
            "id": "mine",
            "method": "tools/call",
            "params": {"name": "silent", "arguments": {}},
        }
        answer.append(mcp.post(message, headers={} if streamed else {"Accept": "application/json"}))

    join = in_thread(call)
    request_id = control.wait_event(event="call", tool="silent")["id"]
    if streamed:
        control.emit(
            {
                "jsonrpc": "2.0",
                "method": "notifications/message",
                "params": {"level": "info", "data": "first"},
            }
        )
    content = json.dumps({"content": [{"type": "text", "text": EVIL}]}).encode()
    control.raw(b'{"jsonrpc":"2.0","id":%d,"result":\r%s,\r"x":1}\n' % (request_id, content))
    join()
    messages = answer[0].messages()
    assert messages[-1]["id"] == "mine" and messages[-1]["result"]["content"][0]["text"] == EVIL
    assert b"\r" not in answer[0].body.replace(b"\r\n", b"") and len(messages) == 1 + streamed


# -- whatever it prints (issue: fuzzed lines, through a real child that prints what it is told)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One Rig, and one session each of alice and bob, for many examples."""
    with ChildControl() as control:
        made = Rig(tmp_path_factory.mktemp("fuzz"), child=("--control", control.path))
        made.control = control
        made.alice, made.bob = made.session("alice"), made.session("bob")
        made.pid = int(text_of(made.alice.call_tool("get_pid")))
        yield made
        made.close()


LEAVES = (
    st.none()
    | st.booleans()
    | st.floats()
    | st.text(max_size=20)
    | st.integers(min_value=10**6)
    | st.integers(max_value=-1)
    | st.just(10**70)
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["progressToken", "requestId", "_meta", "uri", "code", "message", "tools", "\ud800", "id"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
METHODS = st.sampled_from(
    [
        "notifications/progress",
        "notifications/cancelled",
        "notifications/message",
        "notifications/tools/list_changed",
        "notifications/resources/updated",
        "roots/list",
        "sampling/createMessage",
        "elicitation/create",
        "ping",
        "",
        "\n",
    ]
)
RPC = st.fixed_dictionaries(
    {},
    optional={
        "jsonrpc": st.just("2.0") | VALUES,
        "id": VALUES,
        "method": METHODS | VALUES,
        "params": VALUES,
        "result": VALUES,
        "error": VALUES,
    },
)
ORDERLY = st.builds(
    lambda method, params, more: {"jsonrpc": "2.0", "method": method, "params": params, **more},
    METHODS,
    st.dictionaries(st.sampled_from(["progressToken", "requestId", "data", "uri"]), VALUES, max_size=3),
    st.fixed_dictionaries({}, optional={"id": LEAVES}),
)
LINES = st.binary(max_size=60).map(lambda line: line.replace(b"\n", b"\r")) | (VALUES | RPC | ORDERLY).map(
    lambda value: json.dumps(value, ensure_ascii=True).encode()
)
KEYS = itertools.count(1)


@settings(
    max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
@given(lines=st.lists(LINES, max_size=12), streamed=st.booleans())
def test_J08_J19_J20_whatever_a_child_prints_its_call_is_answered_and_nobody_else_hears_of_it(
    shared, lines, streamed
):
    key = f"key {next(KEYS)}"
    caller = same(shared.alice)
    message = {
        "jsonrpc": "2.0",
        "id": key,
        "method": "tools/call",
        "params": {"name": "get_slow", "arguments": {"key": key}},
    }
    accept = {} if streamed else {"Accept": "application/json"}
    join = in_thread(caller.post, message, headers=accept)
    shared.control.wait_event(lambda event: event["event"] == "call" and event["args"].get("key") == key)
    shared.control.raw(b"".join(line + b"\n" for line in lines), shared.pid)
    shared.control.release(key, shared.pid)
    answer = join()
    answers = [each for each in answer.messages() if each.get("id") == key]
    assert len(answers) == 1 and text_of(answers[0]["result"]) == f"slow {key}"
    heard = len(shared.bob.events)
    assert who(shared.bob) == "bob" and len(shared.bob.events) <= heard + 1
    assert (
        not shared.log.named("internal_error")
        + shared.log.named("reader_failed")
        + shared.log.named("child_stopped")
    )
    caller.close()


def test_after_all_of_it_both_sessions_go_on(shared):
    try:
        assert (who(shared.alice), who(shared.bob)) == ("alice", "bob")
    except HttpError as error:
        pytest.fail(str(error))
