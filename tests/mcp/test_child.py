"""Children: how they end, what they may do to us, and that none is left.

Lower half through the whole broker.
"""

import contextlib
import functools
import io
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import types
from pathlib import Path

import pytest

import fjmcp_broker
from fjmcp_broker import Child, ChildFailed, ChildMissing, Guardian, Log
from rigs import mcp_client, modern_requests
from rigs.mcp_client import McpClient, RpcError
from rigs.processes import await_end, in_thread
from rigs.rig import text_of
from rigs.running_child import ECHO, TOKEN, Running, Values, counts


@pytest.fixture
def start(guardian):
    made = []

    def run(program, **values):
        made.append(Running(guardian, program, **values))
        return made[-1]

    yield run
    for running in made:
        running.child.kill("test over")
        running.end()


IGNORE = (
    "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('ready', "
    "flush=True)\nwhile True: time.sleep(60)\n"
)


def test_lines_go_in_and_come_out_whole(start):
    running = start(ECHO)
    for line in (b'{"a":1}', b"x" * 500_000, "\u00e4\u2028".encode()):
        assert running.child.send(line)
        assert running.line() == line


def test_a_child_that_reads_its_end_of_input_leaves_by_itself(start):
    running = start(ECHO)
    running.child.stop("idle")
    assert running.end() == "idle"
    assert not running.child.send(b"more") and not running.child.alive


def test_P10_a_child_that_ignores_SIGTERM_is_killed_after_its_time(start):
    running = start(IGNORE)
    assert running.line() == b"ready"
    running.child.stop("idle")
    assert running.end() == "idle"
    assert await_end([running.child.pid]) == []


@pytest.mark.parametrize(
    "program, reason",
    [
        ("raise SystemExit(3)", "exited with status 3"),
        ("import os; os.kill(os.getpid(), 11)", "killed by SIGSEGV"),
        ("import os; os.kill(os.getpid(), 40)", "killed by signal 40"),
        ("print('half a line', end='', flush=True)", "exited with status 0"),
    ],
)
def test_P09_why_a_child_ended_is_told(start, program, reason):
    running = start(program)
    assert running.end() == reason
    assert running.lines.empty()


WRITE = "import os, sys, time\ntoken = os.environ['FORGEJO_ACCESS_TOKEN'].encode()\n"


def test_the_childs_token_stands_in_no_line_of_its_output(start):
    running = start(WRITE + "os.write(1, b'{' + token + b' and ' + token + b'}' + bytes([10]))\n")
    assert running.line() == b"{[token] and [token]}"


@pytest.mark.parametrize("before", [0, 10, 1960, 1975, 1999, 2000])
def test_the_childs_token_stands_in_no_line_of_stderr_however_it_is_cut(start, before):
    running = start(
        WRITE
        + f"os.write(2, b'x' * {before} + token[:9])\ntime.sleep(0.1)\n"
        + "os.write(2, token[9:] + b' end' + bytes([10]))\n"
    )
    running.end()
    said = running.log.getvalue() + "".join(running.child.last_words)
    assert "xxx" in said or "[token] end" in said
    assert not [TOKEN[at : at + 6] for at in range(len(TOKEN) - 6) if TOKEN[at : at + 6] in said]


def test_the_last_words_of_a_child_are_kept_and_bounded(start):
    running = start(
        "import sys\nfor n in range(500): print('noise', n, 'x' * 5000, file=sys.stderr)\nprint('why', "
        "file=sys.stderr)"
    )
    running.end()
    assert len(running.child.last_words) == fjmcp_broker.LAST_WORDS and running.child.last_words[-1] == "why"
    assert max(map(len, running.child.last_words)) <= fjmcp_broker.LAST_WORD


def test_a_child_that_has_ended_by_itself_is_not_said_to_have_been_stopped(start):
    running = start("raise SystemExit(7)")
    descriptor = os.pidfd_open(running.child.pid) if not running.ended.is_set() else None
    if descriptor is not None:
        select.select([descriptor], [], [], 20)
        os.close(descriptor)
    running.child.stop("idle")
    assert running.end() == "exited with status 7" and not running.child.asked


@pytest.mark.parametrize(
    "error",
    [
        OSError(24, "Too many open files"),
        RuntimeError("can't start new thread"),
        ValueError("embedded null byte"),
    ],
)
def test_a_child_that_cannot_be_started_leaves_nothing(guardian, monkeypatch, error):
    before = counts()
    target, name = (threading.Thread, "start") if isinstance(error, RuntimeError) else (subprocess, "Popen")

    def fail(*_arguments, **_named):
        raise error

    guardian.watch("stdin:0")  # the guardian itself has started
    guardian.forget("stdin:0")
    before = counts()
    monkeypatch.setattr(target, name, fail)
    with pytest.raises(ChildFailed):
        Child(
            [sys.executable, "-c", ECHO],
            {},
            "user",
            guardian,
            Values(),
            Log(Values(), io.StringIO()),
            print,
            print,
        )
    monkeypatch.undo()
    assert counts() == before


def test_P09_no_zombie_is_left(start):
    running = start(ECHO)
    running.child.kill("over")
    running.end()
    with pytest.raises(ChildProcessError):
        os.waitid(os.P_PID, running.child.pid, os.WEXITED | os.WNOHANG)


@pytest.mark.parametrize("session", [False, True])
def test_P10_a_grandchild_that_holds_the_pipes_holds_nobody_up(start, session):
    running = start(
        "import subprocess, sys\nsleeper = subprocess.Popen([sys.executable, '-c', 'import time; "
        f"time.sleep(60)'], start_new_session={session})\nprint(sleeper.pid, flush=True)\n"
    )
    grandchild = int(running.line())
    assert running.end() == "exited with status 0"
    if not session:
        assert await_end([grandchild]) == []
    else:  # it left our process group, so it is not ours to kill; the service manager's control group has it
        os.kill(grandchild, signal.SIGKILL)


def test_a_line_at_the_limit_passes_and_one_above_it_ends_the_child(start):
    running = start(
        "print('x' * 1000, flush=True)\nprint('x' * 1001, flush=True)\nimport time; time.sleep(60)",
        max_line=1000,
    )
    assert len(running.line()) == 1000
    assert running.end() == "line_too_long"


def test_J20_a_line_without_an_end_ends_the_child_before_it_fills_the_memory(start):
    running = start("import sys\nwhile True: sys.stdout.write('x' * 65536)", max_line=1 << 20)
    assert running.end() == "line_too_long"


def tiny_pieces(pipe):
    """A pipe's bytes as a child writes them that flushes after each number."""
    for number in range(100_000):
        yield b"%02d" % (number % 100)
    yield b"\n"


def test_a_line_that_comes_in_tiny_pieces_takes_little_more_memory_than_its_bytes():
    lines = []
    child = types.SimpleNamespace(
        SMALL=Child.SMALL,
        _process=types.SimpleNamespace(stdout=None),
        _settings=types.SimpleNamespace(max_line=1 << 20),
        _token=b"token",
        _chunks=tiny_pieces,
        _on_line=lines.append,
    )
    tracemalloc.start()
    try:
        Child._read_stdout(child)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert lines == [b"".join(tiny_pieces(None))[:-1]]
    assert peak < 5 * len(lines[0])


def test_P15_a_flood_on_stderr_is_drained_and_capped(start):
    running = start(
        "import sys\nfor n in range(20000): print('noise', n, file=sys.stderr)\nprint('done', flush=True)"
    )
    assert running.line() == b"done"
    running.end()
    assert 0 < running.log.getvalue().count("child_stderr") < 2000


def test_J16_a_child_that_does_not_read_is_given_up(start):
    running = start("import time; time.sleep(60)")
    assert not running.child.send(b"x" * 2_000_000, deadline=0.2)
    assert running.end() == "stuck"


def test_P18_a_program_that_is_none_is_said_so(guardian, tmp_path):
    script = tmp_path / "not-executable"
    script.write_text("nothing")
    for command in (["/nowhere/x"], [str(script)]):
        with pytest.raises(ChildMissing):
            Child(command, {}, "user", guardian, Values(), Log(Values(), io.StringIO()), print, print)


def test_P19_200_starts_and_ends_leave_nothing(start, guardian):
    warm = Running(guardian, ECHO)
    warm.child.stop("over")
    warm.end()
    before = counts()
    for _ in range(10):
        batch = [Running(guardian, "pass") for _ in range(20)]
        for running in batch:
            running.end()
    for thread in threading.enumerate():
        if thread.name.startswith(("stdout-", "stderr-")):
            thread.join(30)
    assert counts() == before
    with pytest.raises(ChildMissing):
        Child(["/nowhere/x"], {}, "user", guardian, Values(), Log(Values(), io.StringIO()), print, print)
    assert counts() == before


# -- the guardian


PARENT = """
import os, sys
sys.path.insert(0, sys.argv[1])
import fjmcp_broker as b, io
class S: max_line, stop_timeout, debug, log_format, log_addresses = 1 << 20, 5, False, "json", "full"
log, guardian = b.Log(S, io.StringIO()), b.Guardian()
def child_of(program):
    words = [sys.executable, "-I", "-u", "-c", program]
    return b.Child(words, {}, "u", guardian, S, log, lambda line: None, lambda child: None)
children = [child_of(program)
            for program in (sys.argv[2], sys.argv[3], sys.argv[2])]
gone = b.Child(["/bin/true"], {}, "u", guardian, S, log, lambda line: None, lambda child: None)
gone.ended.wait(20)
if sys.argv[4] == "guardian killed":
    guardian._process.kill(); guardian._process.wait()
    children.append(child_of(sys.argv[3]))
print(*[child.pid for child in children], flush=True)
os.read(0, 1)
"""


@pytest.mark.parametrize("case", ["plain", "guardian killed"])
def test_P11_kill_9_of_the_broker_takes_every_child_along(case):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(Path(fjmcp_broker.__file__).parent), ECHO, IGNORE, case],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) >= 3 and all(Path(f"/proc/{pid}").exists() for pid in pids)
    parent.kill()
    parent.wait()
    parent.stdin.close()
    parent.stdout.close()
    assert await_end(pids) == []


def test_a_guardian_that_goes_in_order_kills_nobody_else():
    bystander = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE, start_new_session=True
    )
    guardian = Guardian()
    guardian.watch(bystander.pid)
    guardian.forget(bystander.pid)
    guardian.close()
    assert bystander.poll() is None
    bystander.communicate(b"")


# -- through the whole broker: it hurts its own session only


def fails_alone(rig, call):
    """Run a call that goes wrong in alice's session.

    Bob's goes on meanwhile and after, and so does alice's own.
    """
    alice, bob = rig.session("alice"), rig.session("bob")
    join = in_thread(call, alice)
    assert "bob" in text_of(bob.call_tool("get_my_user_info"))
    error = join()
    assert "bob" in text_of(bob.call_tool("get_my_user_info"))
    assert "alice" in text_of(
        McpClient(alice.url, alice.token, session_id=alice.session_id).call_tool("get_my_user_info")
    )
    return error


@pytest.mark.parametrize(
    "tool, arguments, settings, reason",
    [
        ("crash", {}, {}, "child_died"),
        ("crash", {"signal": "SIGKILL"}, {}, "child_died"),
        ("silent", {}, {"request_timeout": "1s"}, "timed_out"),
        ("bad_lines", {"n": 150}, {}, "child_died"),
        ("big_line", {"bytes": 3_000_000}, {"max_line": "1MiB"}, "answer_too_large"),
        ("partial_line", {"exit": True, "ms": 0}, {}, "child_died"),
    ],
)
def test_J20_a_child_that_goes_wrong_costs_its_own_call_and_says_why(
    make_rig, tool, arguments, settings, reason
):
    rig = make_rig(**settings)
    error = fails_alone(rig, lambda mcp: mcp.call_tool(tool, **arguments))
    assert isinstance(error, RpcError) and error.code == -32000
    assert error.data["reason"] == reason and error.data["outcome_unknown"] is True


@pytest.mark.parametrize(
    "message",
    [
        {"jsonrpc": "2.0", "id": 424242, "result": {"stray": True}},
        {"jsonrpc": "2.0", "id": None, "result": {}},
        {"jsonrpc": "2.0", "id": "text", "result": {}},
        {"jsonrpc": "2.0", "id": 1.5, "result": {}},
        {"id": 1},
        [],
        "text",
        7,
        {
            "jsonrpc": "2.0",
            "method": "notifications/progress",
            "params": {"progressToken": 99, "progress": 1},
        },
        {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": "nobody's"}},
        {"jsonrpc": "2.0", "method": 5},
        {"jsonrpc": "2.0", "id": True, "result": {}},
    ],
    ids=str,
)
def test_J08_what_a_child_says_out_of_turn_is_dropped_and_the_call_goes_on(make_rig, control, message):
    rig = make_rig(child=("--control", control.path))
    mcp = rig.session()
    caller = McpClient(mcp.url, mcp.token, session_id=mcp.session_id)
    join = in_thread(caller.call_tool, "get_slow", key="k")
    control.wait_event(event="call", tool="get_slow")
    control.emit(message)
    control.release("k")
    assert text_of(join()) == "slow k"
    assert mcp.request("ping") == {}


ANSWER = {"content": [{"type": "text", "text": "meant"}]}
PACKED = json.dumps(ANSWER, separators=(",", ":")).encode()


@pytest.fixture
def unjudged(monkeypatch):
    """What such a child says is passed on as it is, and keeps to no schema."""
    monkeypatch.setattr(mcp_client, "judge", None)


@pytest.mark.parametrize(
    "change",
    [
        lambda number: {"id": number, "result": ANSWER, "error": None},
        lambda number: {"id": float(number), "result": ANSWER},
        lambda number: {"id": number, "method": None, "params": None, "result": ANSWER, "error": None},
        lambda number: [{"id": number, "result": ANSWER}],
        lambda number: [
            {"id": None, "method": "notifications/message", "params": None},
            {"id": number, "result": ANSWER},
        ],
        lambda number: b'{"jsonrpc":"2.0","id":%d,"result":%s,"id":%d}' % (number, PACKED, number),
        lambda number: b'{"jsonrpc":"2.0","id":%d,"result":%s,"\\u0069d":%d}' % (number, PACKED, number),
        lambda number: b'{"jsonrpc":"2.0","id":%d,"result":{"a":1},"result":%s}' % (number, PACKED),
    ],
    ids=[
        "error null",
        "a fraction",
        "every member",
        "a batch of one",
        "a batch",
        "the id twice",
        "the id twice in two spellings",
        "two results",
    ],
)
@pytest.mark.usefixtures("unjudged")
def test_a_childs_sloppy_answer_is_taken_as_it_is_meant(make_rig, control, change):
    seen = answered_by(make_rig, control, change)
    assert seen == ANSWER


def test_a_number_that_no_double_holds_reaches_no_client_however_the_child_writes_its_answer(
    make_rig, control
):
    line = b'{"jsonrpc":"2.0","id":%d,"result":{"content":[],"structuredContent":{"v":1e400}}}'
    assert answered_by(make_rig, control, lambda number: line % number)["structuredContent"] == {"v": None}


@pytest.mark.parametrize(
    "change",
    [
        lambda number: {"id": number, "result": None, "error": {"code": -32603, "message": "no"}},
        lambda number: {"id": number, "error": {"code": -32603.0, "message": "no"}},
    ],
    ids=["result null", "a fraction"],
)
def test_a_childs_sloppy_error_is_taken_as_it_is_meant(make_rig, control, change):
    seen = answered_by(make_rig, control, change)
    assert isinstance(seen, RpcError) and (seen.code, seen.data) == (-32603, None) and "no" in str(seen)


@pytest.mark.parametrize(
    "line",
    [
        b'{"jsonrpc":"2.0","id":%d,"result":{},"error":{"code":1,"message":"both"}}',
        b'{"jsonrpc":"2.0","id":%d}',
        b'{"id":%d,"result":{}}',
        b'{"jsonrpc":"2.0","id":%d,"error":"no"}',
        b'{"jsonrpc":"2.0","id":%d,"error":{"code":"ECONNREFUSED","message":"no"}}',
        b'{"jsonrpc":"2.0","id":%d,"error":{"code":true,"message":"no"}}',
        b'{"jsonrpc":"2.0","id":%d,"error":{"code":1e300,"message":"no"}}',
        b'{"jsonrpc":"2.0","id":%d,"error":{"code":' + b"9" * 100 + b',"message":"no"}}',
        b'[{"jsonrpc":"2.0","id":%d,"result":' + b"[" * 100_000 + b"]" * 100_000 + b"}]",
        b'{"jsonrpc":"2.0","id":%d,"error":{"code":-32603,"message":["no"]}}',
        b'{"jsonrpc":"2.0","id":%d,"error":{"code":-32603}}',
        b'{"jsonrpc":"2.0","id":%d,"result":{"structuredContent":{"v":NaN}}}',
        b'{"jsonrpc":"2.0","id":%d,"result":{"content":[{"type":"text","text":"gr\xfc\xdfe"}]}}',
        b'{"jsonrpc":"2.0","id":%d,"result":{"content":[{"type":"text","text":"a\tb"}]}}',
        b'[{"jsonrpc":"2.0","id":%d}]',
    ],
    ids=str,
)
def test_an_improper_answer_fails_its_call_at_once_and_nothing_else(make_rig, control, line):
    seen = answered_by(make_rig, control, lambda number: line.replace(b"%d", b"%d" % number))
    assert isinstance(seen, RpcError) and seen.code == -32603
    assert seen.data == {"reason": "bad_answer", "outcome_unknown": True, "retryable": False}


def answered_by(make_rig, control, change):
    """What a call comes to whose child sends `change(id)`; the session goes on with the same child."""
    rig = make_rig(child=("--control", control.path), request_timeout="30s")
    mcp = rig.session()
    pid = text_of(mcp.call_tool("get_pid"))
    caller = McpClient(mcp.url, mcp.token, session_id=mcp.session_id)
    join = in_thread(caller.call_tool, "silent")
    number = control.wait_event(event="call", tool="silent")["id"]
    sent = change(number)
    if isinstance(sent, dict):
        sent = {"jsonrpc": "2.0", **sent}
    elif isinstance(sent, list):
        sent = [{"jsonrpc": "2.0", **each} for each in sent]
    control.raw((sent if isinstance(sent, bytes) else json.dumps(sent).encode()) + b"\n")
    seen = join()
    assert text_of(mcp.call_tool("get_pid")) == pid and not rig.log.named("reader_failed")
    return seen


@pytest.mark.parametrize(
    "message",
    [
        {"method": "notifications/resources/updated", "params": {"uri": []}},
        {"method": "notifications/resources/updated", "params": {"uri": {"a": 1}, "_meta": []}},
        {"method": "notifications/message", "params": {"level": {}, "data": 1}},
        {"method": "notifications/progress", "params": {"progressToken": [], "progress": "x"}},
        {"method": "notifications/cancelled", "params": {"requestId": {}}},
        {"method": "notifications/cancelled"},
        {"method": "notifications/tools/list_changed", "params": []},
        {"id": 9001, "method": "elicitation/create", "params": {"requestedSchema": [], "message": {}}},
        {"id": 9002, "method": "sampling/createMessage"},
        {"id": "x", "method": "roots/list", "params": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.usefixtures("unjudged")
def test_a_member_of_another_type_ends_neither_the_reader_nor_the_call(make_rig, control, message, pooled):
    rig = make_rig(child=("--control", control.path))
    mcp = modern_requests.connect(rig, capabilities=modern_requests.ALL_INPUT) if pooled else rig.session()
    call = functools.partial(modern_requests.call, mcp) if pooled else mcp.call_tool
    pid = text_of(call("get_pid"))
    news = (
        modern_requests.listening(mcp, resourceSubscriptions=["test://note"])
        if pooled
        else contextlib.nullcontext()
    )
    with news:
        control.emit({"jsonrpc": "2.0", **message}, int(pid))
        text_of(call("get_pid"))
        assert int(pid) in control.children
    assert not rig.log.named("reader_failed") + rig.log.named("child_message_failed")


def test_J20_99_bad_lines_and_a_good_one_are_forgiven(make_rig):
    rig = make_rig()
    mcp = rig.session()
    for _ in range(2):
        mcp.call_tool("bad_lines", n=99)
    assert not rig.log.named("child_stopped")


def test_a_large_answer_keeps_its_bytes(make_rig):
    mcp = make_rig().session()
    assert len(text_of(mcp.call_tool("get_echo", text="x", size=12_000_000))) == 12_000_000


def test_a_child_that_ends_between_requests_is_not_missed(make_rig):
    rig = make_rig()
    mcp = rig.session()
    os.kill(int(text_of(mcp.call_tool("get_pid"))), signal.SIGKILL)
    rig.log.wait("child_stopped")
    stream = mcp.open_stream()
    stream.wait_comment(10)
    assert (
        not rig.log.named("internal_error") and len(rig.log.named("child_started")) == 1
    )  # an open stream wakes nobody
    assert "alice" in text_of(mcp.call_tool("get_my_user_info"))
    stream.close()


def test_sessions_opened_and_closed_leave_nothing(make_rig):
    rig = make_rig()
    client = rig.login()

    def one():
        mcp = McpClient(rig.url + "/mcp", client.tokens["access_token"])
        mcp.initialize()
        mcp.call_tool("get_my_user_info")
        mcp.delete()
        mcp.close()

    one()
    wait_for_quiet(rig, 1)
    before = counts()
    for _ in range(15):
        one()
    wait_for_quiet(rig, 16)
    assert all(now <= then for now, then in zip(counts(), before))  # what came before them may end meanwhile


def wait_for_quiet(rig, stopped):
    """Until that many children have stopped and every connection of the test is gone."""
    rig.log.wait("child_stopped", stopped)
    poll, deadline = select.poll(), time.monotonic() + 20
    while (
        any(t.name.startswith(("stdout-", "stderr-", "connection")) for t in threading.enumerate())
        and time.monotonic() < deadline
    ):
        poll.poll(10)
