"""What holds in all four cells of {legacy, modern client} x {legacy, modern child}.

Gate, limits and audit; nothing is lost or crossed.
"""

import functools
import json
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rigs.child_control import ChildControl
from rigs.mcp_client import META, McpClient, OAuthClient, RpcError
from rigs.modern_requests import ALL_INPUT, call, connect, refused, retry_of
from rigs.rig import Rig, text_of

CHILD_ERAS, CLIENT_ERAS = ("legacy", "modern"), ("legacy", "modern")


def child_arguments(era):
    return ("--era", era) if era == "modern" else ()


def client_of(rig, era, user="alice", access="full", capabilities=None, **arguments):
    """A client of this era that is ready to ask."""
    if era == "modern":
        return connect(rig, user, access, capabilities, **arguments)
    oauth = rig.login(user, access, **arguments)
    mcp = McpClient(rig.url + "/mcp", oauth.tokens["access_token"], capabilities=capabilities)
    mcp.initialize()
    mcp.oauth = oauth
    return mcp


@pytest.fixture(params=CHILD_ERAS, ids=lambda era: f"{era}-child")
def child_era(request):
    return request.param


@pytest.fixture(params=CLIENT_ERAS, ids=lambda era: f"{era}-client")
def client_era(request):
    return request.param


@pytest.fixture
def make_cell(make_rig, child_era):
    """A function that makes a Rig whose children are of the cell's era."""
    return lambda *child, **values: make_rig(child=(*child_arguments(child_era), *child), **values)


# -- The gate


def test_read_only_lists_on_every_page_and_calls_only_what_reads(make_cell, client_era):
    mcp = client_of(make_cell("--mode", "page=5"), client_era, access="read")
    names = {tool["name"] for tool in mcp.list_tools()}
    assert {"get_my_user_info", "hint_reader"} <= names and not names & {
        "create_issue",
        "change_tools",
        "ask_elicit",
    }
    assert (
        "alice" in text_of(mcp.call_tool("get_my_user_info"))
        and text_of(mcp.call_tool("hint_reader")) == "read"
    )
    refused = mcp.call_tool("create_issue", owner="alice", repo="r", title="t")
    assert refused["isError"] and "read only" in text_of(refused)


def test_a_write_that_was_never_asked_for_is_a_step_up(make_cell, client_era):
    mcp = client_of(make_cell(), client_era, access="read", scope="forgejo:read")
    answer = mcp.post(mcp._message("tools/call", {"name": "create_issue", "arguments": {}}, 1))
    assert answer.status == 403 and 'error="insufficient_scope"' in answer.headers["WWW-Authenticate"]


def test_the_scope_of_the_token_decides_and_not_the_era_it_was_first_used_in(make_cell):
    rig = make_cell()
    oauth = rig.login(access="read")
    legacy = McpClient(rig.url + "/mcp", oauth.tokens["access_token"])
    legacy.initialize()
    modern = connect(rig, oauth=oauth)
    for mcp in (legacy, modern, legacy):
        assert mcp.call_tool("create_issue", owner="a", repo="r", title="t")["isError"]


# -- Limits


def test_a_call_that_is_never_answered_gets_an_error_at_its_time(make_cell, client_era):
    mcp = client_of(make_cell(request_timeout="1s"), client_era)
    with pytest.raises(RpcError) as error:
        mcp.call_tool("silent")
    assert error.value.data["reason"] == "timed_out"
    assert error.value.code == (-32603 if client_era == "modern" else -32000)


def test_more_requests_at_once_than_allowed_are_refused_and_lose_nothing(make_cell, client_era):
    with ChildControl() as control:
        rig = make_cell("--control", control.path, max_inflight=2)
        mcp = client_of(rig, client_era)
        results = []
        threads = [
            threading.Thread(target=lambda: results.append(text_of(mcp.call_tool("get_slow", key="k"))))
            for _ in range(2)
        ]
        for number, thread in enumerate(threads, 1):
            thread.start()
            control.wait_event(lambda event: sum(e["event"] == "call" for e in control.events) >= number)
        with pytest.raises(RpcError) as error:
            mcp.call_tool("get_slow", key="k")
        assert (error.value.http_status, error.value.data["reason"]) == (429, "busy")
        control.release("k")
        for thread in threads:
            thread.join(20)
        assert results == ["slow k"] * 2


def test_a_line_above_the_bound_stops_its_child_and_the_next_call_has_another(make_cell, client_era):
    mcp = client_of(make_cell(max_line="1MiB"), client_era)
    with pytest.raises(RpcError) as error:
        mcp.call_tool("big_line", bytes=3_000_000)
    assert error.value.data["reason"] == "answer_too_large"
    assert "alice" in text_of(mcp.call_tool("get_my_user_info"))


def test_a_body_above_the_bound_is_refused(make_cell, client_era):
    mcp = client_of(make_cell(max_body="64KiB"), client_era)
    assert (
        mcp.post(
            mcp._message("tools/call", {"name": "get_echo", "arguments": {"text": "x" * 70_000}}, 1)
        ).status
        == 413
    )


def test_at_the_cap_the_longest_idle_child_makes_room_for_either_era(make_cell):
    rig = make_cell(max_sessions=1)
    clients = [(client_of(rig, era, user), user) for era in CLIENT_ERAS for user in ("alice", "bob")]
    for mcp, user in clients * 2:
        assert user in text_of(mcp.call_tool("get_my_user_info"))
        assert rig.broker.capacity.count() == 1


def test_a_client_that_is_down_with_its_forgejo_is_told_so(make_cell, client_era):
    rig = make_cell()
    mcp = client_of(rig, client_era)
    rig.forgejo.down()
    pid = [record["pid"] for record in rig.log.named("child_started")]
    if pid:
        with pytest.raises(RpcError):
            mcp.call_tool("crash")
    answer = mcp.post(mcp._message("tools/call", {"name": "get_pid", "arguments": {}}, 1))
    assert (
        answer.status == 503
        and answer.json()["error"]["data"]["reason"] == "upstream_down"
        and "Retry-After" in answer.headers
    )
    rig.forgejo.up()
    assert text_of(mcp.call_tool("get_pid"))


# -- Audit


def test_starts_and_ends_of_children_are_on_record_with_user_client_and_reason(make_cell, client_era):
    rig = make_cell()
    mcp = client_of(rig, client_era)
    with pytest.raises(RpcError):
        mcp.call_tool("crash")
    mcp.call_tool("get_pid")
    rig.stop()
    started, stopped = rig.log.named("child_started"), rig.log.wait("child_stopped", 2)
    assert {record["client"] for record in started + stopped} == {mcp.oauth.client_id}
    assert len({record["user"] for record in started + stopped}) == 1 and all(
        record["reason"] for record in stopped
    )
    assert sorted(record["pid"] for record in started) == sorted(record["pid"] for record in stopped)


def test_no_token_question_answer_or_argument_is_in_the_log(make_cell, client_era):
    rig = make_cell()
    mcp = client_of(rig, client_era, capabilities={"elicitation": {}})
    mcp.on_request = lambda method, params: {"action": "accept", "content": {"answer": "private answer"}}
    asked = mcp.call_tool("ask_elicit", message="private question")
    if asked.get("resultType") == "input_required":
        key = next(iter(asked["inputRequests"]))
        answers = {key: {"action": "accept", "content": {"answer": "private answer"}}}
        call(mcp, "ask_elicit", {"message": "private question"}, **retry_of(asked, answers))
        assert asked["requestState"] not in rig.log.text
    mcp.call_tool("get_echo", text="private argument")
    assert not [
        word for word in ("private", mcp.token, mcp.oauth.tokens["refresh_token"]) if word in rig.log.text
    ]


# -- Nothing is lost


TEXTS = st.text(max_size=30)
NUMBERS = st.integers(-(10**40), 10**40) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
OBJECTS = st.dictionaries(TEXTS, VALUES, max_size=5)
IDS = st.text(max_size=256) | st.integers(-(10**63), 10**63)
TOKENS = st.text(max_size=50) | st.integers(-(2**53), 2**53)
CODES = st.sampled_from([-32603, -32602, -32600, -1, 1, 1234, -31999])


def exact(value):
    """A JSON value as a text that tells 1, 1.0, "1" and True apart, whatever the order of members."""
    return json.dumps(value, sort_keys=True)


class Cells:
    """A Rig for each era of children, and a client of each era before each."""

    def __init__(self, folder):
        self.rigs = {}
        for era in CHILD_ERAS:
            (folder / era).mkdir()
            self.rigs[era] = Rig(folder / era, child=child_arguments(era))
        self._clients = {}

    def client(self, child_era, client_era, *capabilities):
        """The client of this cell with these capabilities."""
        key = child_era, client_era, capabilities
        if key not in self._clients:
            self._clients[key] = client_of(
                self.rigs[child_era], client_era, capabilities=dict.fromkeys(capabilities, {})
            )
        return self._clients[key]

    def close(self):
        for rig in self.rigs.values():
            rig.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    cells = Cells(tmp_path_factory.mktemp("cells"))
    yield cells
    cells.close()


def answer_to(mcp, tool, arguments, request_id, **params):
    """(the message that answers the call, the progress tokens told before it)."""
    told = []
    mcp.on_notification = lambda method, params: told.append(params["progressToken"])
    message = mcp._message("tools/call", {"name": tool, "arguments": arguments, **params}, request_id)
    response = mcp.post(message)
    return response.messages()[-1], told


def hypothesis_case(**strategies):
    """A property with few examples: each is a round trip through sockets, broker and child."""

    def wrap(test):
        return settings(
            max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
        )(given(**strategies)(test))

    return wrap


@hypothesis_case(value=OBJECTS, request_id=IDS)
def test_arguments_and_ids_come_back_as_they_were(shared, child_era, client_era, value, request_id):
    answer, _ = answer_to(shared.client(child_era, client_era), "get_back", {"value": value}, request_id)
    assert exact(json.loads(text_of(answer["result"]))) == exact({"value": value})
    assert answer["id"] == request_id and type(answer["id"]) is type(request_id)


@hypothesis_case(text=TEXTS, structured=OBJECTS, extra=VALUES, failed=st.booleans())
def test_results_come_back_as_the_child_made_them(
    shared, child_era, client_era, text, structured, extra, failed
):
    made = {
        "content": [
            {"type": "text", "text": text},
            {"type": "resource", "resource": {"uri": "test://x", "text": text}},
        ],
        "isError": failed,
        "structuredContent": structured,
        "_meta": {"com.example/extra": extra},
    }
    result = answer_to(shared.client(child_era, client_era), "get_result", {"result": made}, 1)[0]["result"]
    result.pop("resultType", None)
    result["_meta"].pop(META + "serverInfo", None)
    assert exact(result) == exact(made)


@hypothesis_case(code=CODES, text=TEXTS, data=VALUES.filter(lambda value: value is not None))
def test_errors_come_back_as_the_child_made_them(shared, child_era, client_era, code, text, data):
    answer, _ = answer_to(
        shared.client(child_era, client_era),
        "get_failure",
        {"code": code, "message": text, "data": data},
        "e",
    )
    assert exact(answer["error"]) == exact({"code": code, "message": text, "data": data})


@hypothesis_case(token=TOKENS, request_id=IDS, n=st.integers(1, 4))
def test_progress_comes_back_under_the_token_it_was_asked_with(
    shared, child_era, client_era, token, request_id, n
):
    answer, told = answer_to(
        shared.client(child_era, client_era),
        "get_progress",
        {"n": n},
        request_id,
        _meta={"progressToken": token},
    )
    assert exact(told) == exact([token] * n) and exact(answer["id"]) == exact(request_id)


@hypothesis_case(
    text=TEXTS,
    content=st.dictionaries(TEXTS, TEXTS | st.booleans() | st.integers(-(2**53), 2**53), max_size=4),
)
def test_questions_and_answers_come_through_as_they_were(shared, child_era, client_era, text, content):
    mcp, asked = shared.client(child_era, client_era, "elicitation"), []
    answer = {"action": "accept", "content": content}
    mcp.on_request = lambda method, params: asked.append(params) or answer
    result = mcp.call_tool("ask_elicit", message=text)
    if result.get("resultType") == "input_required":
        ((key, question),) = result["inputRequests"].items()
        asked.append(question["params"])
        result = call(mcp, "ask_elicit", {"message": text}, **retry_of(result, {key: answer}))
    assert asked[0]["message"] == text and asked[0]["requestedSchema"]["required"] == ["answer"]
    assert exact(json.loads(text_of(result))) == exact(answer)


# -- Nothing is crossed


def all_at_once(tasks):
    """Run functions in a thread each; what failed, as texts."""
    failures = []

    def watched(task):
        try:
            task()
        except BaseException as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=watched, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
    return failures


def test_two_people_both_eras_and_four_clients_at_once_never_meet(make_cell):
    """All use the same ids and progress tokens and ask and answer at the same time.

    Each sees its own and nothing else.
    """
    rig = make_cell()
    clients = [
        (f"{user}-{era}", user, client_of(rig, era, user, capabilities={"elicitation": {}}))
        for user in ("alice", "bob")
        for era in CLIENT_ERAS
    ]
    barrier = threading.Barrier(len(clients))

    def use(mark, user, mcp):
        told = []
        mcp.on_notification = lambda method, params: told.append(
            (method, params.get("progressToken"), params.get("total"))
        )
        mcp.on_request = lambda method, params: {
            "action": "accept",
            "content": {"answer": f"{mark} to {params['message']}"},
        }
        barrier.wait(20)
        for number in range(12):
            total = 1 + number % 3 + 10 * [name for name, _, _ in clients].index(mark)
            del told[:]
            steps = mcp.request(
                "tools/call",
                {"name": "get_progress", "arguments": {"n": total}, "_meta": {"progressToken": number}},
                id=number,
            )
            assert (
                text_of(steps) == f"{total} steps"
                and told == [("notifications/progress", number, total)] * total
            )
            who = mcp.request("tools/call", {"name": "get_my_user_info", "arguments": {}}, id=str(number))
            assert f'"login": "{user}"' in text_of(who)
            echoed = mcp.request(
                "tools/call", {"name": "get_echo", "arguments": {"text": f"{mark}-{number} "}}, id=number
            )
            assert text_of(echoed) == f"{mark}-{number} "
            asked = mcp.call_tool("ask_elicit", message=f"{mark} {number}")
            if asked.get("resultType") == "input_required":
                ((key, question),) = asked["inputRequests"].items()
                answer = mcp.on_request(question["method"], question["params"])
                asked = call(
                    mcp, "ask_elicit", {"message": f"{mark} {number}"}, **retry_of(asked, {key: answer})
                )
            assert json.loads(text_of(asked))["content"] == {"answer": f"{mark} to {mark} {number}"}

    assert all_at_once([functools.partial(use, *client) for client in clients]) == []


def two_users_of_one_application(rig):
    """OAuth clients of alice and bob with the same client_id.

    As all who use the same desktop program have.
    """
    alice = rig.login("alice")
    bob = OAuthClient(rig.url)
    bob.discover()
    bob.client_id = alice.client_id
    bob.login(None, "bob", "secret")
    assert bob.client_id == alice.client_id
    return alice, bob


def test_X13_two_users_of_one_application_share_no_child(make_cell):
    rig = make_cell()
    users = dict(zip(("alice", "bob"), two_users_of_one_application(rig)))
    for user, oauth in users.items():
        legacy = McpClient(rig.url + "/mcp", oauth.tokens["access_token"])
        for mcp in (connect(rig, oauth=oauth), legacy):
            assert f'"login": "{user}"' in text_of(mcp.call_tool("get_my_user_info"))
    assert rig.broker.capacity.count() == 2


@pytest.mark.parametrize("loaded", [True, False])
def test_X01_another_user_of_the_same_application_has_no_part_in_a_session(make_cell, loaded):
    rig = make_cell()
    alice, bob = two_users_of_one_application(rig)
    mcp = McpClient(rig.url + "/mcp", alice.tokens["access_token"])
    mcp.initialize()
    if not loaded:
        rig.restart()
    stranger = McpClient(mcp.url, bob.tokens["access_token"], session_id=mcp.session_id)
    assert stranger.post({"jsonrpc": "2.0", "id": 1, "method": "ping"}).status == 404
    assert stranger.delete().status == 404
    assert "alice" in text_of(mcp.call_tool("get_my_user_info"))


def test_X13_a_state_is_not_good_for_another_user_of_the_same_application(make_cell):
    rig = make_cell()
    alice, bob = two_users_of_one_application(rig)
    asked = call(connect(rig, oauth=alice, capabilities=ALL_INPUT), "ask_elicit")
    again = retry_of(asked)
    stranger = connect(rig, oauth=bob, capabilities=ALL_INPUT)
    assert refused(stranger, "tools/call", {"name": "ask_elicit", "arguments": {}, **again})[1] == -32602
    ended = call(connect(rig, oauth=alice, capabilities=ALL_INPUT), "ask_elicit", **again)
    assert ended["resultType"] == "complete"


def test_one_token_speaks_both_eras_at_once(make_cell):
    rig = make_cell()
    oauth = rig.login()
    legacy = McpClient(rig.url + "/mcp", oauth.tokens["access_token"])
    legacy.initialize()
    modern = connect(rig, oauth=oauth)

    def use(mcp, stamped):
        for number in range(20):
            result = mcp.request(
                "tools/call", {"name": "get_echo", "arguments": {"text": f"{stamped} {number}"}}, id=number
            )
            assert (text_of(result), "resultType" in result) == (f"{stamped} {number}", stamped)

    assert all_at_once([functools.partial(use, *pair) for pair in ((legacy, False), (modern, True))]) == []
