"""The stand-in for forgejo-mcp, over real pipes."""

import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rigs import schemas
from rigs.child_control import ChildControl
from rigs.fake_forgejo import FakeForgejo, status

CHILD = Path(__file__).with_name("stdio_child.py")
WAIT = 10
TOKEN = "test.token"
MARK = hashlib.sha256(TOKEN.encode()).hexdigest()[:8]


class Child:
    """A running stdio_child with its lines collected."""

    def __init__(self, *argv, token=TOKEN, environment=None):
        env = {"PATH": os.environ["PATH"], "FORGEJO_ACCESS_TOKEN": token, **(environment or {})}
        self.process = subprocess.Popen(
            [sys.executable, CHILD, *map(str, argv)],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.pid = self.process.pid
        self.lines = []
        self.errors = b""
        self.next_id = 0
        self.changed = threading.Condition()
        self.threads = [threading.Thread(target=self.read_lines), threading.Thread(target=self.read_errors)]
        for thread in self.threads:
            thread.start()

    def read_lines(self):
        for line in self.process.stdout:
            with self.changed:
                self.lines.append(line)
                self.changed.notify_all()
        with self.changed:
            self.lines.append(None)
            self.changed.notify_all()

    def read_errors(self):
        self.errors = self.process.stderr.read()

    def write(self, data):
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def send(self, **message):
        self.write(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")

    def request(self, method, params=None):
        """Send a request; its id."""
        self.next_id += 1
        self.send(id=self.next_id, method=method, params=params or {})
        return self.next_id

    def call(self, name, /, **arguments):
        """Send a tools/call; its id."""
        return self.request("tools/call", {"name": name, "arguments": arguments})

    def messages(self):
        """What of the lines is JSON objects."""
        found = []
        for line in self.lines:
            try:
                found.append(json.loads(line or b"null"))
            except ValueError:
                pass
        return [message for message in found if isinstance(message, dict)]

    def wait(self, predicate):
        """The first message that satisfies the predicate."""
        with self.changed:
            found = self.changed.wait_for(
                lambda: (
                    next((message for message in self.messages() if predicate(message)), None)
                    or (None in self.lines and "ended")
                ),
                WAIT,
            )
            assert isinstance(found, dict), f"no such message ({found}): {self.lines[-5:]}"
            return found

    def answer(self, request_id):
        return self.wait(lambda message: message.get("id") == request_id and "method" not in message)

    def ask(self, method, params=None):
        """The result of a request."""
        answer = self.answer(self.request(method, params))
        assert "result" in answer, answer
        return answer["result"]

    def text(self, name, /, **arguments):
        """The text a tool answers."""
        return self.text_of(self.call(name, **arguments))

    def text_of(self, request_id):
        answer = self.answer(request_id)
        assert "result" in answer, answer
        return answer["result"]["content"][0]["text"]

    def asked_by_child(self, method):
        return self.wait(lambda message: message.get("method") == method)

    def initialize(self, version="2025-06-18", **params):
        result = self.ask("initialize", {"protocolVersion": version, "capabilities": {}, **params})
        self.send(method="notifications/initialized")
        return result

    def wait_output(self, predicate):
        with self.changed:
            assert self.changed.wait_for(lambda: predicate(self.lines), WAIT), self.lines[-5:]

    def end(self):
        """Close stdin; the status."""
        self.process.stdin.close()
        return self.status()

    def status(self):
        status = self.process.wait(WAIT)
        for thread in self.threads:
            thread.join(WAIT)
        return status

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for thread in self.threads:
            thread.join(WAIT)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            try:
                stream.close()
            except BrokenPipeError:
                pass


@pytest.fixture
def start():
    """A function that starts a child with these arguments.

    Without a Forgejo unless an environment names one.
    """
    children = []

    def run(*argv, **more):
        flags = () if "environment" in more or "--url" in argv else ("--no-forgejo",)
        children.append(Child(*flags, *argv, **more))
        return children[-1]

    yield run
    for child in children:
        child.close()


@pytest.fixture
def control():
    with ChildControl() as listening:
        yield listening


@pytest.fixture
def forgejo():
    with FakeForgejo() as running:
        running.add_repo("alice", "notes")
        yield running


@pytest.fixture
def token(forgejo):
    app = forgejo.add_app(["http://127.0.0.1:1/callback"])
    return forgejo.issue_tokens("alice", app.client_id)["access_token"]


# ---- Handshake and plain methods
# -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked, given",
    [
        ("2024-11-05", "2024-11-05"),
        ("2025-03-26", "2025-03-26"),
        ("2025-06-18", "2025-06-18"),
        ("2025-11-25", "2025-11-25"),
        ("2026-07-28", "2025-11-25"),
        ("1999-01-01", "2025-11-25"),
    ],
)
def test_a_known_version_is_granted_and_any_other_answered_with_the_newest(start, asked, given):
    assert start().initialize(asked) == {
        "protocolVersion": given,
        "serverInfo": {"name": "Forgejo MCP Server", "version": "0.0.0-test"},
        "capabilities": {
            "logging": {},
            "resources": {"subscribe": True},
            "tools": {"listChanged": True},
            "prompts": {},
        },
    }


def test_what_the_client_told_at_and_after_initialize_is_remembered(start):
    child = start()
    child.initialize(clientInfo={"name": "test"})
    child.ask("logging/setLevel", {"level": "warning"})
    child.ask("resources/subscribe", {"uri": "test://note"})
    child.ask("resources/subscribe", {"uri": "test://whoami"})
    child.ask("resources/unsubscribe", {"uri": "test://note"})
    child.send(method="notifications/cancelled", params={"requestId": 77})
    told = json.loads(child.text("get_initialize"))
    assert told["params"]["clientInfo"] == {"name": "test"}
    assert [told[name] for name in ("initialize", "initialized", "setLevel", "subscribe", "unsubscribe")] == [
        1,
        1,
        1,
        2,
        1,
    ]
    assert (told["level"], told["subscriptions"], told["cancelled"]) == ("warning", ["test://whoami"], [77])


def test_resources_prompts_completion_and_ping_are_answered(start):
    child = start()
    assert child.ask("ping") == {}
    assert [entry["uri"] for entry in child.ask("resources/list")["resources"]] == [
        "test://note",
        "test://whoami",
    ]
    assert (
        child.ask("resources/templates/list")["resourceTemplates"][0]["uriTemplate"] == "test://echo/{text}"
    )
    assert child.ask("resources/read", {"uri": "test://echo/hi"})["contents"][0]["text"] == "hi"
    assert child.ask("resources/read", {"uri": "test://whoami"})["contents"][0]["text"] == MARK
    assert child.ask("prompts/list")["prompts"][0]["name"] == "summary"
    prompt = child.ask("prompts/get", {"name": "summary", "arguments": {"topic": "tests"}})
    assert prompt["messages"][0]["content"]["text"] == "Sum up tests"
    completed = child.ask("completion/complete", {"ref": {}, "argument": {"name": "topic", "value": "te"}})
    assert completed["completion"]["values"] == ["te-completed"]


@pytest.mark.parametrize(
    "method, params, code",
    [
        ("server/discover", {}, -32601),
        ("logging/setLevel", {"level": "info"}, -32603),
        ("tools/call", {"name": "no_such_tool"}, -32602),
        ("tools/call", {"name": "get_error"}, -32603),
        ("tools/call", {"name": "get_echo", "arguments": {}}, -32603),
        ("resources/read", {"uri": "test://none"}, -32002),
        ("resources/read", {}, -32602),
        ("prompts/get", {"name": "none"}, -32602),
        ("tools/list", {"cursor": "x"}, -32602),
    ],
)
def test_what_cannot_be_answered_gets_the_error_code_of_forgejo_mcp(start, method, params, code):
    child = start()
    assert child.answer(child.request(method, params))["error"]["code"] == code


@pytest.mark.parametrize(
    "line, code",
    [
        (b"\n", -32700),
        (b"nonsense\n", -32700),
        (b"\xff\n", -32700),
        (b'[{"jsonrpc":"2.0","id":1,"method":"ping"}]\n', -32700),
        (b'{"id":1,"method":"ping"}\n', -32600),
    ],
)
def test_a_line_that_is_no_request_is_refused_and_the_next_one_served(start, line, code):
    child = start()
    child.write(line)
    child.wait(lambda message: message.get("error", {}).get("code") == code)
    child.next_id = 1
    assert child.ask("ping") == {}


def test_ids_come_back_as_mcp_go_returns_them(start):
    child = start()
    for request_id in ("a string", 2**53, 2**53 + 1, 10**21):
        child.send(id=request_id, method="ping")
    child.send(id=None, method="ping")
    child.ask("ping")
    assert child.lines[:4] == [
        b'{"jsonrpc":"2.0","id":%s,"result":{}}\n' % text
        for text in (b'"a string"', b"9007199254740992", b"9007199254740992", b"1e+21")
    ]
    assert len(child.lines) == 5


def test_a_tool_listing_shows_schemas_and_the_annotations_mcp_go_stamps(start):
    tools = {entry["name"]: entry for entry in start().ask("tools/list")["tools"]}
    assert tools["create_issue"]["inputSchema"] == {
        "type": "object",
        "properties": {name: {"type": "string"} for name in ("owner", "repo", "title")},
        "required": ["owner", "repo", "title"],
    }
    assert [name for name in tools if tools[name]["annotations"]["readOnlyHint"]] == ["hint_reader"]
    assert {"get_my_user_info", "list_my_repos", "get_slow", "endless_line", "stop_reading"} <= set(tools)


def test_the_pages_of_a_paged_listing_make_up_the_whole(start):
    whole, child = start().ask("tools/list")["tools"], start("--mode", "page=7")
    pages = [child.ask("tools/list")]
    while "nextCursor" in pages[-1]:
        pages.append(child.ask("tools/list", {"cursor": pages[-1]["nextCursor"]}))
    assert [entry for page in pages for entry in page["tools"]] == whole
    assert {len(page["tools"]) for page in pages[:-1]} == {7}


# ---- Command line and Forgejo
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["version", "--version", "-version"])
def test_version_is_printed_without_a_url(word):
    printed = subprocess.run([CHILD, word], stdout=subprocess.PIPE, timeout=WAIT, check=True)
    assert printed.stdout == b"forgejo-mcp 0.0.0-test\n"


@pytest.mark.parametrize("style", ["flag", "flag with equals sign", "environment"])
def test_at_start_the_version_is_asked_twice_with_token_and_user_agent(start, forgejo, token, style):
    flags = {
        "flag": ["--transport", "stdio", "--url", forgejo.url],
        "environment": [],
        "flag with equals sign": ["-transport=stdio", f"-url={forgejo.url}", "--debug"],
    }[style]
    environment = {"FORGEJO_USER_AGENT": "broker/9"}
    if style == "environment":
        environment["FORGEJO_URL"] = forgejo.url
    start(*flags, token=token, environment=environment).initialize()
    seen = [(entry.path, entry.user_agent, entry.auth_user, entry.status) for entry in forgejo.requests]
    assert seen == [("/api/v1/version", "broker/9", "alice", 200)] * 2


def test_the_forgejo_tools_act_as_the_user_of_the_token(start, forgejo, token):
    child = start("--url", forgejo.url, token=token)
    assert json.loads(child.text("get_my_user_info"))["Result"]["login"] == "alice"
    assert [repo["full_name"] for repo in json.loads(child.text("list_my_repos"))["Result"]] == [
        "alice/alice-private",
        "alice/notes",
    ]
    issue = json.loads(child.text("create_issue", owner="alice", repo="notes", title="Käse"))["Result"]
    assert (issue["title"], issue["user"]["login"]) == ("Käse", "alice")


def test_a_token_revoked_while_running_makes_calls_fail_with_forgejos_words(start, forgejo, token):
    child = start("--url", forgejo.url, token=token)
    child.initialize()
    forgejo.delete_user("alice")
    error = child.answer(child.call("get_my_user_info"))["error"]
    assert error["code"] == -32603
    assert error["message"].startswith("get user info err: ")


@pytest.mark.parametrize(
    "trouble", ["bad token", "no url", "refused", "502 page", "version too old", "version odd"]
)
def test_without_a_working_forgejo_the_start_fails_with_a_fatal_line_and_status_1(
    start, forgejo, token, trouble
):
    url = forgejo.url
    if trouble == "refused":
        forgejo.stop()
    elif trouble == "502 page":
        forgejo.inject("/api/v1/version", status(502, b"<h1>Bad gateway</h1>", "text/html"))
    elif trouble.startswith("version"):
        forgejo.version = "1.10.9" if trouble == "version too old" else "development"
    child = start(
        token="bad.token" if trouble == "bad token" else token,
        environment={"FORGEJO_URL": "" if trouble == "no url" else url},
    )
    assert child.status() == 1
    assert b"\tFATAL\t" in child.errors
    assert child.lines == [None]


def test_without_a_forgejo_the_users_are_told_apart_by_their_tokens(start):
    assert [start(token=name).text("get_my_user_info") for name in ("a.a", "b.b")] == [
        hashlib.sha256(name).hexdigest()[:8] for name in (b"a.a", b"b.b")
    ]


def test_environment_command_line_pid_and_descriptors_are_shown(start, control):
    child = (
        start(
            "--control",
            control.path,
            "--unknown",
            "--also=unknown",
            environment={"FORGEJO_URL": "", "MINE": "1"},
        )
        if False
        else start(
            "--no-forgejo",
            "--control",
            control.path,
            "--unknown",
            "--also=unknown",
            environment={"MINE": "1"},
        )
    )
    assert json.loads(child.text("get_env"))["MINE"] == "1"
    assert json.loads(child.text("get_argv"))[1:] == [
        "--no-forgejo",
        "--control",
        control.path,
        "--unknown",
        "--also=unknown",
    ]
    assert child.text("get_pid") == str(child.pid)
    assert set(json.loads(child.text("get_fds"))) == {"0", "1", "2"}


def test_an_inherited_descriptor_is_shown(start):
    reader, writer = os.pipe()
    try:
        process = subprocess.run(
            [sys.executable, CHILD, "--no-forgejo"],
            pass_fds=[writer],
            timeout=WAIT,
            check=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            input=b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"get_fds"}}\n',
        )
    finally:
        os.close(reader)
        os.close(writer)
    answer = json.loads(process.stdout)["result"]["content"][0]["text"]
    assert set(json.loads(answer)) == {"0", "1", "2", str(writer)}


# ---- Calls
# -----------------------------------------------------------------------------------------------------------


def test_answers_come_out_of_order_when_calls_end_so(start, control):
    child = start("--control", control.path)
    first, second = child.call("get_slow", key="a"), child.call("get_slow", key="b")
    control.wait_event(event="call", id=second)
    control.release("b")
    assert child.text_of(second) == "slow b"
    assert child.ask("ping") == {}
    assert first not in [message["id"] for message in child.messages()]
    control.release("a")
    assert child.text_of(first) == "slow a"


def test_without_a_control_a_slow_call_ends_by_itself(start):
    assert start().text("get_slow", ms=1) == "slow "


def test_a_key_released_before_its_call_holds_nothing_up(start, control):
    child = start("--control", control.path)
    control.wait_event(event="start")
    control.release("early")
    assert child.text("get_slow", key="early") == "slow early"


def test_a_cancelled_call_is_reported_and_still_answers(start, control):
    child = start("--control", control.path)
    call = child.call("get_slow", key="k")
    child.send(method="notifications/cancelled", params={"requestId": call})
    assert control.wait_event(event="cancelled")["requestId"] == call
    control.release("k")
    assert child.text_of(call) == "slow k"


def test_an_echo_has_the_size_asked_for(start):
    child = start()
    assert child.text("get_echo", text="grüße \u2028 😀") == "grüße \u2028 😀"
    assert child.text("get_echo", text="abc", size=7) == "abcabca"
    assert len(child.text("get_echo", text="abc", size=3_000_000)) == 3_000_000


def test_progress_is_sent_by_token_and_only_then(start):
    child = start()
    assert child.text("get_progress", n=2) == "2 steps"
    child.answer(
        child.request(
            "tools/call", {"name": "get_progress", "arguments": {"n": 2}, "_meta": {"progressToken": "p"}}
        )
    )
    sent = [
        message["params"] for message in child.messages() if message.get("method") == "notifications/progress"
    ]
    assert [(step["progressToken"], step["progress"], step["total"]) for step in sent] == [
        ("p", 1, 2),
        ("p", 2, 2),
    ]


def test_log_messages_below_the_level_set_are_not_sent(start):
    child = start()
    child.initialize()
    child.text("get_log", text="before", level="debug")
    child.ask("logging/setLevel", {"level": "warning"})
    child.text("get_log", text="too low", level="info")
    child.text("get_log", text="high", level="error", n=2)
    sent = [message["params"]["data"] for message in child.messages() if "method" in message]
    assert sent == ["before", "high", "high"]


@pytest.mark.parametrize(
    "tool, method",
    [
        ("ask_elicit", "elicitation/create"),
        ("ask_sampling", "sampling/createMessage"),
        ("ask_roots", "roots/list"),
    ],
)
def test_a_question_to_the_client_returns_its_answer(start, tool, method):
    child = start()
    call = child.call(tool)
    asked = child.asked_by_child(method)
    child.send(id=asked["id"], result={"told": "yes"})
    assert json.loads(child.text_of(call)) == {"told": "yes"}


def test_several_questions_are_asked_at_once_and_an_error_is_an_answer(start):
    child = start()
    call = child.call("ask_elicit", count=2)
    child.wait(lambda message: message.get("id") == 2 and message.get("method") == "elicitation/create")
    child.send(id=2, error={"code": -1, "message": "no"})
    child.send(id=1, result={"action": "accept"})
    assert json.loads(child.text_of(call)) == [{"action": "accept"}, {"error": {"code": -1, "message": "no"}}]


def test_a_changed_tool_set_is_announced_and_listed(start):
    child = start()
    assert child.text("change_tools", name="get_new") == "changed"
    child.asked_by_child("notifications/tools/list_changed")
    assert "get_new" in [entry["name"] for entry in child.ask("tools/list")["tools"]]
    assert child.text("get_new", a=1) == 'get_new {"a": 1}'


# ---- Misbehaviour
# ----------------------------------------------------------------------------------------------------


def test_a_silent_call_is_never_answered(start):
    child = start()
    silent = child.call("silent")
    assert child.end() == 0
    assert silent not in [message["id"] for message in child.messages()]


def test_a_double_answer_is_two_answers_to_one_id(start):
    child = start()
    call = child.call("double_answer")
    assert child.end() == 0
    texts = [message["result"]["content"][0]["text"] for message in child.messages() if message["id"] == call]
    assert texts == ["first", "second"]


@pytest.mark.parametrize("tool, strange", [("wrong_id", "never-asked"), ("null_id", None)])
def test_a_wrong_or_null_id_comes_alone_or_before_the_right_one(start, tool, strange):
    child = start()
    alone = child.call(tool)
    assert child.text(tool, answer=True) == "right id"
    assert child.end() == 0
    ids = [message["id"] for message in child.messages()]
    assert ids.count(strange) == 2
    assert alone not in ids


def test_bad_lines_are_no_messages_and_an_answer_follows(start):
    child = start()
    assert child.text("bad_lines", n=7) == "7 bad lines"
    assert len(child.lines) == 8
    assert sum("id" in message for message in child.messages()) == 1


@pytest.mark.parametrize("size", [200, 65_536, 2_000_001])
def test_a_big_line_has_exactly_the_bytes_asked_for(start, size):
    child = start()
    child.text("big_line", bytes=size)
    assert len(child.lines[0]) == size + 1


def test_an_endless_line_never_ends_but_sigterm_ends_its_writer():
    process = subprocess.Popen(
        [sys.executable, CHILD, "--no-forgejo"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with process:
        try:
            process.stdin.write(
                b'{"jsonrpc":"2.0","id":5,"method":"tools/call","params":{"name":"endless_line"}}\n'
            )
            process.stdin.flush()
            data = process.stdout.read(1_000_000)
            process.terminate()
            data += process.stdout.read()
            assert process.wait(WAIT) == 0
        finally:
            process.kill()
    assert data.startswith(b'{"jsonrpc":"2.0","id":5,"result":{"content":[{"type":"text","text":"xxx')
    assert b"\n" not in data


def test_a_partial_line_is_completed_when_released_and_nothing_comes_between(start, control):
    child = start("--control", control.path)
    call = child.call("partial_line", key="half")
    control.wait_event(event="call", id=call)
    ping = child.request("ping")
    control.release("half")
    assert child.text_of(call) == "two halves"
    assert child.answer(ping)["result"] == {}


def test_a_partial_line_can_be_the_last_thing_a_child_writes(start):
    child = start()
    child.call("partial_line", exit=True)
    assert child.status() == 0
    assert len(child.lines) == 2
    assert not child.lines[0].endswith(b"\n")


def test_stderr_can_be_flooded(start):
    child = start("--mode", "flood_stderr_at_start=70001")
    assert child.text("stderr_flood", bytes=130_000) == "flooded"
    child.end()
    assert child.errors.count(b"flood ") >= 2 * 16 * (200_000 // 101 - 2) // 2
    assert len(child.errors) > 200_001


def test_a_grandchild_holds_stdout_after_the_child_has_ended(start):
    child = start()
    pid = int(child.text("grandchild"))
    try:
        child.process.stdin.close()
        assert child.process.wait(WAIT) == 0
        assert os.readlink(f"/proc/{pid}/fd/1") == os.readlink(
            f"/proc/self/fd/{child.process.stdout.fileno()}"
        )
        assert None not in child.lines
    finally:
        os.kill(pid, signal.SIGKILL)
    assert child.status() == 0
    assert child.lines[-1] is None


@pytest.mark.parametrize("own", [True, False])
def test_a_grandchild_is_in_the_group_of_the_child_unless_told_otherwise(start, own):
    child = start()
    pid = int(child.text("grandchild", own_session=own))
    try:
        assert (os.getpgid(pid) == pid) is own
    finally:
        os.kill(pid, signal.SIGKILL)


def test_a_child_that_stopped_reading_reads_on_when_released(start, control):
    child = start("--control", control.path)
    assert child.text("stop_reading", key="go") == "stopped"
    ping = child.request("ping")
    control.emit({"jsonrpc": "2.0", "method": "notifications/mark"})
    child.asked_by_child("notifications/mark")
    assert len(child.lines) == 2
    control.release("go")
    assert child.answer(ping)["result"] == {}


def test_a_child_that_stopped_reading_lets_its_pipe_fill_up_and_ends_on_sigterm(start):
    child = start()
    child.text("stop_reading")
    os.set_blocking(child.process.stdin.fileno(), False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(child.process.stdin.fileno(), b"\n" * 65536)
    assert select.select([], [child.process.stdin], [], 0)[1] == []
    child.process.terminate()
    assert child.status() == 0


# ---- Ends
# ------------------------------------------------------------------------------------------------------------


def test_at_the_end_of_input_running_calls_are_finished_and_a_cut_line_dropped(start, control):
    child = start("--control", control.path)
    call = child.call("get_slow", key="k")
    child.write(b'{"jsonrpc":"2.0","id":99,"method":"ping"}')
    child.process.stdin.close()
    control.wait_event(event="call", id=call)
    control.release("k")
    assert child.status() == 0
    assert [message["id"] for message in child.messages()] == [call]
    assert control.wait_event(event="exit", pid=child.pid)["code"] == 0


def test_a_question_open_at_the_end_of_input_ends_with_an_error(start):
    child = start()
    call = child.call("ask_roots")
    child.asked_by_child("roots/list")
    assert child.end() == 0
    assert "error" in json.loads(child.text_of(call))


def test_sigterm_ends_the_child_with_status_0_in_the_middle_of_a_call(start, control):
    child = start("--control", control.path)
    control.wait_event(event="call", id=child.call("get_slow", key="never"))
    child.process.terminate()
    assert child.status() == 0
    assert control.wait_event(event="exit")["reason"] == "SIGTERM"


def test_with_term_waits_sigterm_waits_for_the_running_calls(start, control):
    child = start("--control", control.path, "--mode", "term_waits")
    call = child.call("get_slow", key="k")
    control.wait_event(event="call", id=call)
    child.process.terminate()
    assert child.ask("ping") == {}
    control.release("k")
    assert child.status() == 0
    assert child.text_of(call) == "slow k"


def test_with_ignore_term_sigterm_changes_nothing(start):
    child = start("--mode", "ignore_term")
    child.ask("ping")
    child.process.terminate()
    assert child.ask("ping") == {}
    assert f"{int(json.loads(child.text('get_argv'))[-1] == 'ignore_term')}" == "1"
    assert child.end() == 0


def test_a_crash_has_status_3_or_the_signal_asked_for(start):
    for arguments, status_ in (
        ({}, 3),
        ({"signal": "SIGSEGV"}, -11),
        ({"signal": "SIGKILL"}, -9),
        ({"signal": "SIGTERM"}, -15),
    ):
        child = start()
        child.call("crash", **arguments)
        assert child.status() == status_


def test_a_child_whose_stdout_is_closed_dies_of_sigpipe():
    process = subprocess.Popen(
        [sys.executable, CHILD, "--no-forgejo"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with process:
        process.stdout.close()
        process.stdin.write(b'{"jsonrpc":"2.0","id":1,"method":"ping"}\n')
        process.stdin.flush()
        try:
            assert process.wait(WAIT) == -signal.SIGPIPE
        finally:
            process.kill()


# ---- Modes
# -----------------------------------------------------------------------------------------------------------


def test_exit1_fails_the_start_always_or_while_its_file_exists(start, tmp_path):
    assert start("--mode", "exit1").status() == 1
    flag = tmp_path / "down"
    flag.touch()
    assert start("--mode", f"exit1={flag}").status() == 1
    flag.unlink()
    assert start("--mode", f"exit1={flag}").ask("ping") == {}


def test_a_hanging_start_answers_nothing_and_dies_of_sigterm(start, control):
    child = start("--control", control.path, "--mode", "hang_start")
    child.request("initialize")
    control.wait_event(event="start")
    assert control.children == [child.pid]
    child.process.terminate()
    assert child.status() == -signal.SIGTERM
    assert child.lines == [None]
    control.wait_event(event="gone", pid=child.pid)
    assert control.children == []


def test_a_slow_start_ends_when_its_file_exists(start, control, tmp_path):
    child = start("--control", control.path, "--mode", f"slow_start={tmp_path / 'go'}")
    ping = child.request("ping")
    control.wait_event(event="start")
    assert not child.lines
    (tmp_path / "go").touch()
    assert child.answer(ping)["result"] == {}


def test_junk_at_start_comes_before_the_first_answer(start):
    child = start("--mode", "junk_at_start")
    child.ask("ping")
    assert [line.startswith(b"{") for line in child.lines] == [False, False, True]


def test_version_and_instructions_of_initialize_can_be_set(start):
    result = start("--mode", "version=2030-01-01", "--mode=instructions=a=b").initialize()
    assert (result["protocolVersion"], result["instructions"]) == ("2030-01-01", "a=b")


def test_more_tools_are_read_from_a_file_at_start(start, tmp_path):
    file = tmp_path / "tools.json"
    assert start("--mode", f"more_tools={file}").ask("ping") == {}
    file.write_text(
        json.dumps(["get_extra", {"name": "whole", "inputSchema": {"type": "object"}, "title": "T"}])
    )
    child = start("--mode", f"more_tools={file}")
    tools = {entry["name"]: entry for entry in child.ask("tools/list")["tools"]}
    assert tools["whole"] == {"name": "whole", "inputSchema": {"type": "object"}, "title": "T"}
    assert child.text("get_extra") == "get_extra {}"


def test_roots_are_asked_right_after_initialized_and_the_answer_kept(start):
    child = start("--mode", "asks_on_init")
    child.initialize()
    asked = child.asked_by_child("roots/list")
    assert child.ask("ping") == {}
    child.send(id=asked["id"], result={"roots": []})
    child.wait_for_text = None
    while (kept := json.loads(child.text("get_initialize"))["answer_on_init"]) is None:
        pass
    assert kept == {"roots": []}


# ---- Control
# ---------------------------------------------------------------------------------------------------------


def test_every_message_and_call_is_reported_with_the_pid(start, control):
    child = start("--control", control.path)
    child.initialize()
    call = child.call("get_echo", text="x")
    child.text_of(call)
    child.write(b"junk\n")
    assert control.wait_event(event="message", method="notifications/initialized")["pid"] == child.pid
    assert control.wait_event(event="call") == {
        "event": "call",
        "pid": child.pid,
        "tool": "get_echo",
        "id": call,
        "args": {"text": "x"},
    }
    control.wait_event(lambda event: event["event"] == "message" and event["method"] is None)
    assert [event["method"] for event in control.events if event["event"] == "message"] == [
        "initialize",
        "notifications/initialized",
        "tools/call",
        None,
    ]


def test_a_child_is_known_before_it_serves_anything(start, control):
    children = [start("--control", control.path) for _ in range(3)]
    for child in children:
        assert child.ask("ping") == {}
    assert sorted(control.children) == sorted(child.pid for child in children)


def test_commands_reach_one_child_or_all(start, control):
    first, second = start("--control", control.path), start("--control", control.path)
    first.ask("ping")
    second.ask("ping")
    assert control.emit({"jsonrpc": "2.0", "method": "notifications/one"}, pid=first.pid) == 1
    assert control.emit({"jsonrpc": "2.0", "method": "notifications/all"}) == 2
    for child in (first, second):
        child.asked_by_child("notifications/all")
    assert [len(child.lines) for child in (first, second)] == [3, 2]


def test_raw_text_is_written_as_it_is(start, control):
    child = start("--control", control.path)
    child.ask("ping")
    control.command({"cmd": "raw", "text": "half "})
    control.command({"cmd": "raw", "text": "a line ☃\n"})
    child.wait_output(lambda lines: "half a line ☃\n".encode() in lines)


def test_a_child_told_to_exit_does_so_with_that_status(start, control):
    child = start("--control", control.path)
    child.ask("ping")
    control.command({"cmd": "exit", "code": 7}, pid=child.pid)
    assert child.status() == 7
    assert control.wait_event(event="exit")["code"] == 7
    control.wait_event(event="gone")
    with pytest.raises(LookupError):
        control.release("k", pid=child.pid)


def test_a_child_killed_without_a_word_is_reported_as_gone(start, control):
    child = start("--control", control.path)
    child.ask("ping")
    child.process.kill()
    control.wait_event(event="gone", pid=child.pid)
    assert not [event for event in control.events if event["event"] == "exit"]


def test_an_event_that_does_not_come_is_an_error_that_shows_what_came(start, control):
    start("--control", control.path).ask("ping")
    control.wait_event(lambda event: "ping" in str(event))
    with pytest.raises(TimeoutError, match="ping"):
        control.wait_event(event="cancelled", timeout=0)


def test_no_child_outlives_its_control_however_stubborn(start, tmp_path):
    with ChildControl(tmp_path / "c") as control:
        hanging = start("--control", control.path, "--mode", "hang_start", "--mode", "ignore_term")
        calling = start("--control", control.path, "--mode", "ignore_term")
        calling.call("get_slow", key="never")
        control.wait_event(event="start", pid=hanging.pid)
        control.wait_event(event="call")
    assert hanging.status() == calling.status() == 4
    assert not (tmp_path / "c").exists()


def test_a_large_event_and_a_large_command_arrive_whole(start, control):
    child = start("--control", control.path)
    call = child.call("get_echo", text="y" * 3_000_000, size=1)
    assert control.wait_event(event="call", id=call)["args"]["text"] == "y" * 3_000_000
    control.emit({"jsonrpc": "2.0", "method": "notifications/big", "params": {"text": "z" * 3_000_000}})
    assert len(child.asked_by_child("notifications/big")["params"]["text"]) == 3_000_000


# ---- The era of 2026-07-28

META = "io.modelcontextprotocol/"


def meta(capabilities=(), **more):
    return {
        META + "protocolVersion": "2026-07-28",
        META + "clientCapabilities": {name: {} for name in capabilities},
        **more,
    }


def modern_answer(child, method, params=None, *, capabilities=(), **more):
    """The answer to a request with its metadata, which the revision's schema allows."""
    answer = child.answer(child.request(method, {**(params or {}), "_meta": meta(capabilities, **more)}))
    schemas.judge(answer, schemas.MODERN, method)
    return answer


def modern_call(child, name, capabilities=(), **params):
    return modern_answer(
        child, "tools/call", {"name": name, "arguments": {}, **params}, capabilities=capabilities
    )


@pytest.mark.parametrize(
    "method, params, code",
    [
        ("initialize", {"protocolVersion": "2025-11-25"}, -32602),
        ("tools/list", {}, -32602),
        ("tools/list", {"_meta": {META + "protocolVersion": "2026-07-28"}}, -32602),
        ("tools/list", {"_meta": {**meta(), META + "protocolVersion": "2099-01-01"}}, -32022),
        ("tools/list", {"_meta": {**meta(), META + "logLevel": "loud"}}, -32602),
        ("ping", {"_meta": meta()}, -32601),
        ("logging/setLevel", {"_meta": meta(), "level": "info"}, -32601),
    ],
)
def test_a_modern_child_knows_no_handshake_and_no_request_without_metadata(start, method, params, code):
    child = start("--era", "modern")
    answer = child.answer(child.request(method, params))
    schemas.judge(answer, schemas.MODERN)
    assert answer["error"]["code"] == code


def test_a_modern_child_says_what_it_is_and_how_long_its_lists_may_be_kept(start):
    child = start("--era", "modern", "--mode", "ttl=5000", "--mode", "instructions=read me")
    found = modern_answer(child, "server/discover")["result"]
    assert (found["supportedVersions"], found["instructions"], found["ttlMs"]) == (
        ["2026-07-28"],
        "read me",
        5000,
    )
    for method in ("tools/list", "prompts/list", "resources/list", "resources/templates/list"):
        assert modern_answer(child, method)["result"]["ttlMs"] == 5000
    assert modern_answer(child, "resources/read", {"uri": "test://none"})["error"]["code"] == -32602


def test_a_modern_child_asks_in_its_result_and_goes_on_in_the_retry(start):
    child, can = start("--era", "modern"), ("elicitation", "sampling", "roots")
    asked = modern_call(child, "ask_all", can)["result"]
    answers = {
        "round1-0": {"action": "decline"},
        "round1-1": {"role": "assistant", "content": {"type": "text", "text": "x"}, "model": "m"},
        "round1-2": {"roots": []},
    }
    assert [request["method"] for request in asked["inputRequests"].values()] == [
        "elicitation/create",
        "sampling/createMessage",
        "roots/list",
    ]
    partly = modern_call(
        child,
        "ask_all",
        can,
        inputResponses={"round1-0": {"action": "decline"}},
        requestState=asked["requestState"],
    )
    assert partly["result"]["resultType"] == "input_required"
    ended = modern_call(child, "ask_all", can, inputResponses=answers, requestState=asked["requestState"])[
        "result"
    ]
    assert json.loads(ended["content"][0]["text"]) == list(answers.values())


def test_a_modern_child_asks_in_several_rounds_and_refuses_a_state_that_is_not_its_own(start):
    child, no = start("--era", "modern"), {"action": "decline"}
    first = modern_call(child, "ask_twice", ["elicitation"])["result"]
    second = modern_call(
        child,
        "ask_twice",
        ["elicitation"],
        inputResponses={"round1-0": no},
        requestState=first["requestState"],
    )["result"]
    ended = modern_call(
        child,
        "ask_twice",
        ["elicitation"],
        inputResponses={"round2-0": no},
        requestState=second["requestState"],
    )["result"]
    assert first["requestState"] != second["requestState"] and json.loads(ended["content"][0]["text"]) == [
        no,
        no,
    ]
    assert (
        modern_call(child, "ask_twice", requestState="x" + second["requestState"])["error"]["code"] == -32602
    )
    assert modern_call(child, "ask_roots")["error"]["data"] == {"requiredCapabilities": {"roots": {}}}


def test_a_modern_child_logs_only_for_a_request_that_says_from_which_level(start):
    child = start("--era", "modern")
    modern_call(child, "get_log")
    modern_answer(
        child,
        "tools/call",
        {"name": "get_log", "arguments": {"text": "heard"}},
        **{META + "logLevel": "info"},
    )
    modern_answer(child, "tools/call", {"name": "get_log", "arguments": {}}, **{META + "logLevel": "error"})
    assert [
        message["params"]["data"]
        for message in child.messages()
        if message.get("method") == "notifications/message"
    ] == ["heard"]


def test_a_modern_child_tells_listeners_what_they_asked_for_until_they_cancel(start):
    child = start("--era", "modern")
    all_kinds = {"toolsListChanged": True, "promptsListChanged": True, "resourceSubscriptions": ["test://a"]}
    first = child.request("subscriptions/listen", {"_meta": meta(), "notifications": all_kinds})
    second = child.request(
        "subscriptions/listen", {"_meta": meta(), "notifications": {"toolsListChanged": True}}
    )
    child.send(method="notifications/cancelled", params={"requestId": second})
    modern_call(child, "get_touched", arguments={"uri": "test://a"})
    modern_call(child, "get_touched", arguments={"uri": "test://b"})
    modern_call(child, "change_tools")
    told = [message for message in child.messages() if "method" in message]
    for message in told:
        schemas.judge(message, schemas.MODERN)
    assert [
        (message["method"][14:], message["params"]["_meta"][META + "subscriptionId"]) for message in told
    ] == [
        ("subscriptions/acknowledged", first),
        ("subscriptions/acknowledged", second),
        ("resources/updated", first),
        ("tools/list_changed", first),
    ]
    assert told[0]["params"]["notifications"] == {
        "toolsListChanged": True,
        "resourceSubscriptions": ["test://a"],
    }
