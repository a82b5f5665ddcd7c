"""Between HTTP and a child's lines.

One message stays one message, ids are each caller's own, and sessions belong to who opened them. Case ids are
those of docs/security.md, groups J, P and X.
"""

import inspect
import json
import os
import re
import resource
import socket
import subprocess
import sys
import threading

import pytest

import fjmcp_broker
from rigs.busy_clients import children, health, same
from rigs.heard import INITIALIZE, Heard
from rigs.mcp_client import McpClient
from rigs.processes import await_end, in_thread, session
from rigs.rig import json_of, text_of, who
from rigs.running_child import ECHO, Running, counts

# An exception that ends a thread of the broker is a traceback
# on stderr: it fails the test during which it came.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
PING = {"jsonrpc": "2.0", "id": "a ping", "method": "ping"}


# -- J: bridge and JSON-RPC


@pytest.mark.parametrize("separator", ["\n", "\r\n", "\n\n\t"])
def test_J01_a_pretty_printed_body_is_one_line_for_the_child(controlled, control, separator):
    mcp = controlled.session()
    sent = Heard(mcp, control)
    body = json.dumps({**PING, "method": "prompts/list"}, indent=1).replace("\n", separator).encode()
    assert mcp.post(body).json()["result"]["prompts"]
    assert sent.methods() == ["prompts/list"]


def test_J02_line_ends_within_strings_reach_the_child_as_one_message(controlled, control):
    mcp = controlled.session()
    text = 'a\nb\rc\x00d\x85e\u2028f\u2029g\ud83d\ude00"\\{"jsonrpc":"2.0","id":1,"method":"ping"}\n'
    sent = Heard(mcp, control)
    assert text_of(mcp.call_tool("get_echo", text=text)) == text.encode("utf-16", "surrogatepass").decode(
        "utf-16"
    )
    assert sent.methods() == ["tools/call"]


def test_J05_two_callers_with_the_same_id_get_each_their_own_answer(controlled, control):
    mcp = controlled.session()
    joins = {}
    for key in ("a", "b"):
        message = {
            "jsonrpc": "2.0",
            "id": 7,
            "method": "tools/call",
            "params": {"name": "get_slow", "arguments": {"key": key}},
        }
        joins[key] = in_thread(same(mcp).post, message)
        control.wait_event(
            lambda event, key=key: event["event"] == "call" and event["args"].get("key") == key
        )
    control.release("b")
    control.release("a")
    for key, join in joins.items():
        answer = [message for message in join().messages() if "result" in message]
        assert [message["id"] for message in answer] == [7] and text_of(answer[0]["result"]) == f"slow {key}"


@pytest.mark.parametrize(
    "request_id",
    [
        "null",
        "true",
        "{}",
        "[]",
        "1.5",
        "1e400",
        "9" * 5000,
        "1.0",
        '"' + "x" * 257 + '"',
        '"' + "x" * 1_000_000 + '"',
    ],
    ids=lambda text: text[:12],
)
def test_J06_an_id_that_is_none_is_refused_and_nothing_is_forwarded(controlled, control, request_id):
    mcp = controlled.session()
    sent = Heard(mcp, control)
    answer = mcp.post(b'{"jsonrpc":"2.0","id":' + request_id.encode() + b',"method":"ping"}')
    assert answer.status == 400 and answer.json()["error"]["code"] in (-32600, -32700)
    assert sent.methods() == []


def test_J09_deep_nesting_is_refused_and_a_string_full_of_brackets_is_not(rig):
    mcp = rig.session()
    for deep in (
        b'{"a":' * 100_000,
        b"[" * 1_000_000,
        b'{"jsonrpc":"2.0","id":1,"method":"ping","params":{"a":' + b"[" * 70 + b"]" * 70 + b"}}",
    ):
        assert mcp.post(deep).status == 400
    assert text_of(mcp.call_tool("get_echo", text='[{"\\' * 200)) == '[{"\\' * 200


def test_J09_more_values_than_a_body_may_have_are_refused_before_they_are_parsed(rig):
    mcp = rig.session()
    body = b'{"jsonrpc":"2.0","id":"many","method":"ping","params":{"a":[%s1]}}'
    refused = mcp.post(body % (b"[]," * 270_000))
    assert refused.status == 400 and refused.json()["error"]["code"] == -32700
    assert mcp.post(body % (b"[]," * 100_000)).json()["result"] == {}


@pytest.mark.parametrize("reader", [fjmcp_broker.read_json, fjmcp_broker.read_child_json])
@pytest.mark.parametrize(
    "text, value",
    [
        (r'"\ud800"', "\ufffd"),
        (r'"\uDFFF\uD800x"', "\ufffd\ufffdx"),
        (r'"\ud83d\ud83d\ude00\ude00"', "\ufffd\U0001f600\ufffd"),
        (r'"\\ud800"', r"\ud800"),
        (r'"\\\ud800\\"', "\\\ufffd\\"),
        (r'["\\", "\ud83d\ude00", "\udc00\n"]', ["\\", "\U0001f600", "\ufffd\n"]),
        (r'{"\udead": "\"\ud800"}', {"\ufffd": '"\ufffd'}),
    ],
)
def test_half_a_surrogate_pair_is_read_as_others_read_it(reader, text, value):
    assert reader(text.encode()) == value


def listing(request_id, name="get_a", more=""):
    return (
        '{"jsonrpc":"2.0","id":%s,"result":{"tools":[{"name":"%s"}]}%s}' % (request_id, name, more)
    ).encode()


def remembering(line):
    program = fjmcp_broker.Program("", "legacy", False)
    message = fjmcp_broker.classify_sloppy(program.read(line))
    program.note_listing(fjmcp_broker.Answer(1, line, message))
    return program


def test_a_list_of_tools_is_read_once_if_its_line_is_the_same_but_for_the_id():
    program = remembering(listing(1))
    again = program.read(listing(23))
    assert again == json.loads(listing(23)) and again["result"] is program.listing.result
    for other in (listing(2, "get_b"), listing(2, "get_aa"), listing(2, more=',"id":3'), listing('"2"')):
        assert program.read(other) == json.loads(other)
    for wrong in (listing("02"), listing(2)[:-1], listing(2) + b"}"):
        with pytest.raises(ValueError):
            program.read(wrong)


@pytest.mark.parametrize("more", [',"id":1', ',"id":2', ',"error":null', ',"x":{}'])
def test_a_list_of_tools_whose_line_says_more_is_read_each_time(more):
    assert remembering(listing(1, more=more)).listing is None


def test_a_list_of_tools_that_is_very_long_is_read_each_time():
    assert remembering(listing(1, "g" * fjmcp_broker.Listing.LONGEST)).listing is None


def test_a_line_is_read_though_another_child_of_the_program_replaces_its_list_meanwhile(monkeypatch):
    program = remembering(listing(1))
    looks = iter([program.listing, None])
    monkeypatch.setattr(fjmcp_broker.Program, "listing", property(lambda self: next(looks)), raising=False)
    assert program.read(listing(2)) == json.loads(listing(2))


def test_members_that_are_the_same_once_halves_of_pairs_are_replaced_are_refused():
    with pytest.raises(ValueError, match="twice"):
        fjmcp_broker.read_json(rb'{"\ud800": 1, "\udfff": 2}')


@pytest.mark.parametrize(
    "text", ["[" * 65 + "]" * 65, '{"a":' * 65 + "1" + "}" * 65, "[" * 70 + "{", "]" * 70 + "[" * 70]
)
def test_no_text_that_is_too_deep_reaches_a_recursive_parser(text):
    with pytest.raises(ValueError, match="nested"):
        fjmcp_broker.read_json(text.encode())


def test_depth_is_that_of_brackets_outside_of_strings():
    deep = '["\\\\[","\\"{",' * 32 + '{"[\\\\":' * 32 + '"]"' + "}" * 32 + "]" * 32
    fjmcp_broker.read_json(deep.encode())
    with pytest.raises(ValueError, match="nested"):
        fjmcp_broker.read_json(f"[{deep}]".encode())


def answer_of_child(controlled, control, result):
    """What a client gets when its child answers with `result`, bytes of JSON.

    The members stand in this order, or with `result` first.
    """
    mcp = controlled.session()
    found = []
    for number, line in enumerate(
        (b'{"jsonrpc":"2.0","id":%d,"result":%s}\n', b'{"result":%s,"id":%d,"jsonrpc":"2.0"}\n')
    ):
        call = {"name": "get_slow", "arguments": {"key": f"unanswered {number}"}}
        join = in_thread(mcp.post, {"jsonrpc": "2.0", "id": 5, "method": "tools/call", "params": call})
        event = control.wait_event(event="call", args=call["arguments"])
        control.raw(line % ((event["id"], result) if number == 0 else (result, event["id"])))
        found.append(join())
    return found


def test_line_separators_of_unicode_are_escaped_in_what_a_client_is_sent(controlled, control):
    text = "a\u0085b\u2028c\u2029d \u00e9 \U0001f600"
    result = json.dumps({"content": [{"type": "text", "text": text}]}, ensure_ascii=False).encode()
    for answer in answer_of_child(controlled, control, result):
        assert not set(answer.text) & set("\u0085\u2028\u2029")
        assert text_of(answer.json()["result"]) == text


def test_a_childs_number_that_no_double_holds_stays_as_it_was_or_is_null(controlled, control):
    for answer in answer_of_child(
        controlled, control, b'{"content":[],"structuredContent":{"v":1e400,"w":[-1E999,1.5]}}'
    ):
        value = json.loads(answer.text, parse_constant=pytest.fail)["result"]["structuredContent"]
        assert value["w"][1] == 1.5 and value["v"] in (None, float("inf"))
        assert "Infinity" not in answer.text


def test_half_a_surrogate_pair_of_a_child_reaches_no_client(controlled, control):
    for answer in answer_of_child(
        controlled, control, rb'{"content":[{"type":"text","text":"\\\ud800\ud83d\ude00"}]}'
    ):
        assert text_of(answer.json()["result"]) == "\\\ufffd\U0001f600"


@pytest.mark.parametrize("chunked", [False, True])
def test_J10_a_body_above_the_limit_is_refused_and_nothing_is_forwarded(make_rig, control, chunked):
    rig = make_rig(child=("--control", control.path), max_body="100KiB")
    mcp = rig.session()
    sent = Heard(mcp, control)
    body = json.dumps({**PING, "params": {"x": "y" * 200_000}}).encode()
    if chunked:
        answer = raw_post(
            rig, mcp, b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body), "Transfer-Encoding: chunked"
        )
    else:
        answer = raw_post(rig, mcp, body, f"Content-Length: {len(body)}")
    assert answer.startswith(b"HTTP/1.1 413 ") and b"\r\nConnection: close\r\n" in answer
    assert sent.methods() == []


def raw_post(rig, mcp, body, framing):
    head = "".join(
        f"{name}: {value}\r\n"
        for name, value in {**mcp.headers(), "Host": rig.url[7:], "Content-Type": "application/json"}.items()
    )
    with socket.create_connection(("127.0.0.1", int(rig.url.rpartition(":")[2])), timeout=20) as sock:
        sock.sendall(f"POST /mcp HTTP/1.1\r\n{head}{framing}\r\n\r\n".encode())
        sock.sendall(body)
        answer = b""
        while data := sock.recv(65536):
            answer += data
        return answer


@pytest.mark.parametrize(
    "body",
    [
        json.dumps(PING).encode("utf-16"),
        json.dumps(PING).encode("utf-32"),
        b"\xef\xbb\xbf" + json.dumps(PING).encode(),
        b'{"jsonrpc":"2.0","id":"\xc0\xaf","method":"ping"}',
        b'{"jsonrpc":"2.0","id":"\xed\xa0\x80","method":"ping"}',
        b'{"jsonrpc":"2.0","id":"\xff","method":"ping"}',
        b'{"jsonrpc":"2.0","id":1,"method":"ping","params":{"x":NaN}}',
        b'{"jsonrpc":"2.0","id":1,"method":"ping","params":{"x":-Infinity}}',
        b'{"jsonrpc":"2.0","id":1,"method":"ping","params":{"x":1e999}}',
        b'{"jsonrpc":"2.0","id":1,"method":"ping","method":"tools/list"}',
        b'{"jsonrpc":"2.0","id":1,"method":"ping","params":{"a":1,"a":2}}',
        b'{"jsonrpc":"2.0","id":1,"method":"ping"}\n{"jsonrpc":"2.0","id":2,"method":"ping"}',
    ],
    ids=[
        "UTF-16",
        "UTF-32",
        "BOM",
        "overlong",
        "encoded surrogate",
        "no UTF-8",
        "NaN",
        "Infinity",
        "1e999",
        "key twice",
        "inner key twice",
        "two messages",
    ],
)
def test_J03_J11_J12_J13_J14_what_parsers_could_read_in_two_ways_is_refused_and_not_forwarded(
    controlled, control, body
):
    mcp = controlled.session()
    sent = Heard(mcp, control)
    answer = mcp.post(body)
    assert answer.status == 400 and answer.json()["error"]["code"] in (-32700, -32600)
    assert sent.methods() == []


def test_J12_a_lone_surrogate_is_passed_on_escaped_or_refused_and_breaks_nothing(rig):
    mcp = rig.session()
    for body in (
        b'{"jsonrpc":"2.0","id":"\\ud800","method":"ping"}',
        b'{"jsonrpc":"2.0","id":"another","method":"ping","params":{"x":"\\udfff"}}',
    ):
        answer = mcp.post(body)
        assert answer.status in (200, 400) and answer.json()
    assert not rig.log.named("internal_error") and who(mcp) == "alice"


def test_J13_a_key_that_differs_only_in_case_does_not_change_what_the_child_does(controlled, control):
    mcp = controlled.session()
    sent = Heard(mcp, control)
    twins = {"Method": "tools/call", "ID": 99, "Params": {"name": "crash"}}
    mcp.post({**PING, "method": "prompts/list", **twins})
    assert sent.methods() == ["prompts/list"]
    sent = [event for event in control.events if event["event"] == "call"]
    assert not [event for event in sent if event["tool"] == "crash"]


def test_J17_the_lifecycle_out_of_order_starts_no_second_child_for_a_session(controlled, control):
    mcp = controlled.session()
    assert mcp.post({**PING, "id": 2}).status == 200
    again = mcp.post(INITIALIZE)  # opens a session of its own, whatever session the header names
    assert again.status == 200 and again.headers["Mcp-Session-Id"] != mcp.session_id
    assert who(mcp) == "alice" and health(controlled)["sessions"] == 2
    early = McpClient(mcp.url, mcp.token, session_id=again.headers["Mcp-Session-Id"])
    assert early.request("ping") == {}  # before `initialized`
    assert (
        early.post({"jsonrpc": "2.0", "method": "notifications/initialized"}).status == 202
        and who(early) == "alice"
    )


def test_J18_a_clients_meta_is_the_childs_business_and_steers_nothing_here(controlled, control):
    mcp = controlled.session()
    meta = {"progressToken": "mine", "io.fjmcp/internal": True, "requestId": 1}
    answer = mcp.request("tools/call", {"name": "get_progress", "arguments": {"n": 1}, "_meta": meta})
    assert text_of(answer) == "1 steps"
    refused = mcp.post({**PING, "method": "broker/internal"})
    assert refused.status == 200 and refused.json()["error"]["code"] == -32601


def test_J21_a_client_that_hangs_up_leaves_no_thread_and_no_traceback(controlled, control):
    mcp = controlled.session()
    threads = threading.active_count()
    for number in range(5):
        _, stream = same(mcp).start_request(
            "tools/call", {"name": "get_slow", "arguments": {"key": str(number)}}, id=number
        )
        stream.close()
    for number in range(5):
        control.release(str(number))
    server = controlled.broker.server
    with server._changed:
        assert server._changed.wait_for(lambda: server.open_connections <= 1, 20)
    assert who(mcp) == "alice" and threading.active_count() <= threads + 2
    assert not controlled.log.named("internal_error") and not controlled.log.named("connection failed")


@pytest.mark.parametrize("kind", ["text/plain", "application/json; charset=utf-16", "x", ""])
def test_J23_the_content_type_of_a_message_is_not_looked_at(rig, kind):
    mcp = rig.session()
    assert mcp.post(PING, headers={"Content-Type": kind}).json()["result"] == {}


# -- P: processes


def test_P02_P03_what_is_in_the_brokers_environment_or_secret_is_in_no_childs_environment_or_arguments(
    make_installation, monkeypatch
):
    for name in (
        "FORGEJO_MCP_ALLOW_FILE_PATH_UPLOAD",
        "FORGEJO_DEBUG",
        "CREDENTIALS_DIRECTORY",
        "INVOCATION_ID",
        "GITEA_TOKEN",
    ):
        monkeypatch.setenv(name, "canary")
    installation = make_installation()
    broker = installation.start()
    mcp = session(installation)
    environment = json_of(mcp.call_tool("get_env"))
    assert "canary" not in environment.values() and not {"NOTIFY_SOCKET", "LISTEN_FDS"} & set(environment)
    token = environment["TOKEN_BACKWARDS"][::-1]
    for pid in (broker.pid, *broker.children()):
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            line = file.read().decode()
        assert token not in line and installation.app.client_secret not in line
    assert installation.app.client_secret not in json.dumps(environment)


def test_P04_children_started_at_once_hold_nothing_of_each_other(make_rig):
    rig = make_rig(max_sessions=30, max_sessions_per_user=30)
    token = rig.login().tokens["access_token"]
    barrier = threading.Barrier(20)

    def descriptors():
        mcp = McpClient(rig.url + "/mcp", token)
        barrier.wait(20)
        mcp.initialize()
        return json_of(mcp.call_tool("get_fds"))

    for join in [in_thread(descriptors) for _ in range(20)]:
        found = join()
        assert sum("pipe:" in target for target in found.values()) == 3
        assert not [target for target in found.values() if re.search(r"socket:|\.db|pidfd|eventpoll", target)]


PROBE = """
import ctypes, contextlib, os, subprocess, sys
{source}
hide_from_children()
print(subprocess.run([sys.executable, "-I", "-c", '''
import os
try:
    open(f"/proc/{{os.getppid()}}/environ", "rb").read()
    print("readable")
except PermissionError:
    print("denied")
'''], capture_output=True, text=True, env={{}}).stdout.strip())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody without rights")
def test_P06_a_child_of_the_same_user_cannot_read_the_brokers_memory_and_environment(tmp_path):
    program = PROBE.format(source=inspect.getsource(fjmcp_broker.hide_from_children))
    done = subprocess.run(
        ["/usr/bin/python3" if os.path.exists("/usr/bin/python3") else sys.executable, "-I", "-c", program],
        cwd="/",
        user=65534,
        group=65534,
        extra_groups=[],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.stdout.strip() == "denied", done.stderr


def test_P08_what_a_user_is_called_reaches_no_command_line(rig):
    rig.forgejo.rename("bob", "--x$(id)")
    mcp = rig.session("--x$(id)")
    assert "$(id)" not in text_of(mcp.call_tool("get_argv")) and who(mcp) == "--x$(id)"


def test_P12_no_child_is_tied_to_the_thread_that_started_it(rig):
    mcp = rig.session()  # the thread of that connection ends with it
    pid = text_of(mcp.call_tool("get_pid"))
    mcp.close()
    server = rig.broker.server
    with server._changed:
        assert server._changed.wait_for(lambda: not server.open_connections, 20)
    assert text_of(same(mcp).call_tool("get_pid")) == pid


def test_P13_SIGTERM_with_many_sessions_leaves_no_child_and_a_whole_store(make_installation):
    installation = make_installation(max_sessions="20", max_sessions_per_user="20")
    broker = installation.start()
    first = session(installation)
    sessions = [first]
    for _ in range(14):
        sessions.append(McpClient(first.url, first.token))
        sessions[-1].initialize()
    pids = broker.children()
    assert len(pids) == 15
    assert broker.stop() == 0 and await_end(pids) == []
    assert not os.path.exists(installation.settings["store_path"] + "-wal") or not os.path.getsize(
        installation.settings["store_path"] + "-wal"
    )
    installation.start()
    assert [who(same(mcp)) for mcp in sessions] == ["alice"] * 15


def test_P14_a_client_that_opens_session_after_session_gets_no_more_children_than_allowed(make_rig):
    rig = make_rig(max_sessions_per_user=2, max_session_rows_per_user=10)
    client, bob = rig.login(), rig.session("bob")
    mcp = McpClient(rig.url + "/mcp", client.tokens["access_token"])
    for _ in range(25):
        assert mcp.post(INITIALIZE).status == 200
        assert children(rig) <= 3
    assert health(rig)["sessions"] == 11 and who(bob) == "bob"


def test_P19_without_file_descriptors_no_child_starts_nothing_leaks_and_it_recovers(guardian):  # noqa: F811
    warm = Running(guardian, ECHO)
    warm.child.stop("over")
    warm.end()
    refused, before, limits = 0, counts(), resource.getrlimit(resource.RLIMIT_NOFILE)
    for spare in range(9):
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest_descriptor() + 1 + spare, limits[1]))
        made = None
        try:
            made = Running(guardian, ECHO)
        except fjmcp_broker.ChildFailed:
            refused += 1
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        if made:
            made.child.stop("over")
            made.end()
        assert counts() == before
    assert refused >= 5
    again = Running(guardian, ECHO)
    again.child.send(b"works")
    assert again.line() == b"works"
    again.child.stop("over")
    again.end()


def highest_descriptor():
    return max(map(int, os.listdir("/proc/self/fd")[:-1]))


# -- X: sessions are their owner's


def test_X01_a_strangers_request_is_answered_as_for_an_unknown_id_by_every_method_and_leaves_no_trace(rig):
    alice, bob = rig.session("alice"), rig.session("bob")
    first = text_of(alice.call_tool("get_pid"))
    told = []
    for session_id in (alice.session_id, "x" * 43):
        stranger = McpClient(alice.url, bob.token, session_id=session_id)
        listen = {**stranger.headers(), "Accept": "text/event-stream"}
        answers = [
            stranger.post(PING),
            stranger.delete(),
            stranger._wire.exchange("GET", stranger.url, None, listen),
        ]
        assert [answer.status for answer in answers] == [404] * 3
        assert answers[0].json()["error"]["code"] == -32001
        told.append([answer.body for answer in answers])
    assert told[0] == told[1]
    assert text_of(alice.call_tool("get_pid")) == first and rig.log.named("session_ended") == []
    rig.clock.advance(890)
    McpClient(alice.url, bob.token, session_id=alice.session_id).post(PING)
    rig.clock.advance(15)
    rig.log.wait("child_stopped", 2)  # what a stranger sends keeps no child awake


def test_X02_another_client_of_the_same_user_has_no_part_in_a_session_but_another_login_of_the_same_client_has(  # noqa: E501 -- docs/security.md names it
    rig,
):
    mcp = rig.session("alice")
    other = rig.login("alice", name="another client")
    assert (
        McpClient(mcp.url, other.tokens["access_token"], session_id=mcp.session_id).post(PING).status == 404
    )
    tokens = mcp.oauth.login(None, "alice", "secret")
    assert who(same(mcp, tokens["access_token"])) == "alice"


def test_X01_X02_a_session_that_is_only_a_row_is_its_owners_too(rig):
    mcp = rig.session("alice")
    strangers = [rig.login("bob"), rig.login("alice", name="another client")]
    rig.restart()  # nothing of the session is in memory
    for stranger in strangers:
        token = stranger.tokens["access_token"]
        told = [
            McpClient(mcp.url, token, session_id=session_id).post(PING)
            for session_id in (mcp.session_id, "x" * 43)
        ]
        assert [answer.status for answer in told] == [404] * 2 and told[0].body == told[1].body
        assert McpClient(mcp.url, token, session_id=mcp.session_id).delete().status == 404
    assert who(same(mcp)) == "alice"


def test_X03_session_ids_are_long_random_and_visible(rig):
    token = rig.login().tokens["access_token"]
    found = {McpClient(rig.url + "/mcp", token).post(INITIALIZE).headers["Mcp-Session-Id"] for _ in range(5)}
    found |= {fjmcp_broker.new_secret() for _ in range(10_000)}
    assert len(found) == 10_005 and all(re.fullmatch(r"[A-Za-z0-9_-]{43}", each) for each in found)


def test_X04_without_a_session_id_not_even_the_only_session_is_meant(rig):
    mcp = rig.session()
    pid = text_of(mcp.call_tool("get_pid"))
    assert text_of(McpClient(mcp.url, mcp.token).call_tool("get_pid")) != pid
    assert text_of(mcp.call_tool("get_pid")) == pid and health(rig)["sessions"] == 1


@pytest.mark.parametrize(
    "session_id",
    ["x" * 10_000, "x" * 257, "a b", "caf\u00e9", "\x7f"],
    ids=["10 KB", "257", "space", "Latin-1", "DEL"],
)
def test_X05_a_malformed_session_id_is_refused(rig, session_id):
    token = rig.login().tokens["access_token"]
    answer = McpClient(rig.url + "/mcp", token, session_id=session_id).post(PING)
    assert answer.status in (400, 431)


def test_X05_two_session_ids_are_none(rig):
    mcp = rig.session()
    body = json.dumps(PING).encode()
    answer = raw_post(
        rig,
        mcp,
        body,
        f"Content-Length: {len(body)}\r\nConnection: close\r\nMcp-Session-Id: {mcp.session_id}",
    )
    assert answer.startswith(b"HTTP/1.1 400 ")


def test_X06_a_session_id_that_a_client_chooses_is_never_taken(rig):
    mcp = rig.session()
    chosen = McpClient(mcp.url, mcp.token, session_id="chosen-by-the-client-" + "x" * 22)
    answer = chosen.post(INITIALIZE)
    assert answer.status == 200 and answer.headers["Mcp-Session-Id"] != chosen.session_id
    assert chosen.post(PING).status == 404


def test_X07_a_session_unused_for_its_lifetime_is_gone_and_a_used_one_stays(make_rig):
    rig = make_rig(session_lifetime="10d", access_token_lifetime="60d")
    unused, used = rig.session(), rig.session()
    for _ in range(2):
        rig.clock.advance(4 * 86400)
        rig.tick()
        assert used.request("prompts/list") and unused.request("ping") == {}  # a ping is no use
    rig.clock.advance(4 * 86400)
    rig.tick()
    assert unused.post(PING).status == 404 and used.post(PING).status == 200
    assert used.request("prompts/list")


def test_X09_marks_of_two_users_never_cross_in_200_calls_each(rig):
    owners = {name: rig.session(name) for name in ("alice", "bob")}

    def calls(name, mcp):
        seen = []
        mcp.on_notification = lambda method, params: seen.append(json.dumps(params))
        for number in range(200):
            mark = f"mark-of-{name}-{number}"
            seen.append(text_of(mcp.call_tool("get_echo", text=mark)))
            assert seen[-1] == mark
            if number % 20 == 0:
                mcp.call_tool("get_log", text=mark)
        return seen

    for name, join in {name: in_thread(calls, name, mcp) for name, mcp in owners.items()}.items():
        seen = join()
        other = "bob" if name == "alice" else "alice"
        assert len(seen) >= 200 and not [text for text in seen if f"mark-of-{other}" in text]
    assert "mark-of-" not in rig.log.text
