"""/mcp before a child that speaks 2026-07-28 and nothing else.

For legacy clients the broker is the server that it is not.
"""

import json
import os
import shlex
import signal
import threading

import pytest

from rigs.mcp_client import META, MODERN, McpClient, RpcError
from rigs.modern_requests import (
    ALL_INPUT,
    ANSWERS,
    asked_methods,
    call,
    connect,
    listening,
    refused,
    retry_of,
    subscription_of,
)
from rigs.rig import CHILD, json_of, text_of

NEW = ("resultType", "ttlMs", "cacheScope")


@pytest.fixture
def make_modern(make_rig, control):
    """A function that makes a Rig with modern children that can be told what to do."""

    def make(*child, **settings):
        return make_rig(child=("--era", "modern", "--control", control.path, *child), **settings)

    return make


@pytest.fixture
def rig(make_modern):
    return make_modern()


def first_messages(control):
    """{pid: the methods that a child was sent, in order}."""
    found = {}
    for event in control.events:
        if event["event"] == "message":
            found.setdefault(event["pid"], []).append(event["method"])
    return found


def replace_child(rig, control, mcp):
    """Kill the child of a session and let the session have a new one."""
    stopped = len(rig.log.named("child_stopped"))
    os.kill(int(text_of(mcp.call_tool("get_pid"))), signal.SIGKILL)
    rig.log.wait("child_stopped", stopped + 1)
    return int(text_of(mcp.call_tool("get_pid")))


# -- The handshake that the child has not


@pytest.mark.parametrize("version", ["2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25", "2099-01-01"])
def test_the_broker_answers_initialize_in_the_childs_words(make_modern, version):
    rig = make_modern("--mode", "instructions=read me first")
    mcp = McpClient(rig.url + "/mcp", rig.login().tokens["access_token"])
    opened = mcp.initialize(version=version)
    assert opened["protocolVersion"] == (version if version < "2026" else "2025-11-25")
    assert opened["serverInfo"]["name"] == "Forgejo MCP Server" and opened["instructions"] == "read me first"
    assert {"tools", "resources", "prompts", "logging"} <= set(opened["capabilities"]) and mcp.session_id
    assert not [name for name in NEW if name in opened]
    assert "alice" in text_of(mcp.call_tool("get_my_user_info"))


def test_no_modern_child_is_ever_sent_what_it_does_not_know(rig, control):
    mcp = rig.session(capabilities={"roots": {"listChanged": True}})
    assert mcp.request("ping") == {}
    mcp.request("logging/setLevel", {"level": "info"})
    mcp.request("resources/subscribe", {"uri": "test://note"})
    mcp.notify("notifications/roots/list_changed")
    mcp.list_tools()
    replace_child(rig, control, mcp)
    sent = {method for methods in first_messages(control).values() for method in methods}
    assert sent <= {
        "server/discover",
        "tools/list",
        "tools/call",
        "subscriptions/listen",
        "notifications/cancelled",
    }


def test_every_request_carries_what_the_client_said_of_itself_when_it_opened(rig):
    mcp = rig.session(capabilities={"elicitation": {}, "roots": {"listChanged": True}})
    meta = json_of(call(mcp, "get_meta", _meta={"traceparent": "00-1-2-01"}))
    assert meta[META + "protocolVersion"] == MODERN and meta[META + "clientInfo"] == mcp.info
    assert set(meta[META + "clientCapabilities"]) >= {"elicitation"} and meta["traceparent"] == "00-1-2-01"


@pytest.mark.parametrize(
    "method, params",
    [
        ("tools/list", {}),
        ("prompts/list", {}),
        ("resources/list", {}),
        ("resources/templates/list", {}),
        ("resources/read", {"uri": "test://note"}),
        ("tools/call", {"name": "get_pid"}),
        ("prompts/get", {"name": "summary"}),
    ],
)
def test_results_lose_what_is_new_in_them(rig, method, params):
    result = rig.session().request(method, params)
    assert not [name for name in NEW if name in result] and META + "serverInfo" not in result.get("_meta", {})


def test_requests_without_a_session_id_are_served_too(rig):
    mcp = McpClient(rig.url + "/mcp", rig.login().tokens["access_token"])
    assert "alice" in text_of(mcp.call_tool("get_my_user_info")) and mcp.request("ping") == {}


def test_a_session_outlives_its_child_and_the_broker(rig, control):
    mcp = rig.session()
    first = int(text_of(mcp.call_tool("get_pid")))
    assert replace_child(rig, control, mcp) != first
    rig.restart()
    assert "alice" in text_of(mcp.call_tool("get_my_user_info"))


# -- Questions


@pytest.fixture
def answering(rig):
    """A legacy session that answers every question; `asked` is what it was asked."""
    mcp, asked = rig.session(capabilities=ALL_INPUT), []

    def answer(method, params):
        asked.append((method, params))
        return ANSWERS[method]

    mcp.on_request, mcp.asked = answer, asked
    return mcp


@pytest.mark.parametrize(
    "tool, method",
    [
        ("ask_elicit", "elicitation/create"),
        ("ask_sampling", "sampling/createMessage"),
        ("ask_roots", "roots/list"),
    ],
)
def test_input_required_becomes_a_question_and_its_answer_the_retry(answering, tool, method):
    assert json_of(answering.call_tool(tool)) == ANSWERS[method]
    assert [asked for asked, _ in answering.asked] == [method]


def test_several_questions_and_several_rounds_end_in_one_answer(answering):
    assert json_of(answering.call_tool("ask_all")) == list(ANSWERS.values())
    assert len(json_of(answering.call_tool("ask_elicit", count=3))) == 3
    assert len(json_of(answering.call_tool("ask_twice", message="x"))) == 2
    assert [method for method, _ in answering.asked].count("elicitation/create") == 1 + 3 + 2


def test_a_question_that_the_client_answers_with_an_error_ends_the_call_with_it(rig):
    mcp = rig.session(capabilities=ALL_INPUT)  # it has no handler: every question is answered with an error
    for tool in (
        "ask_elicit",
        "ask_sampling",
        "ask_roots",
    ):  # a retry carries results, and has no form for an error
        with pytest.raises(RpcError) as error:
            mcp.call_tool(tool)
        assert error.value.code == -32601 and "not supported" in error.value.message
    assert mcp.request("ping") == {}


def test_a_capability_that_was_not_declared_is_an_error_of_the_call(rig):
    mcp = rig.session()
    with pytest.raises(RpcError):
        mcp.call_tool("ask_elicit")
    assert mcp.request("ping") == {}


def test_two_calls_in_one_session_each_get_their_own_answer(rig):
    mcp, results = rig.session(capabilities=ALL_INPUT), {}
    mcp.on_request = lambda method, params: {"action": "accept", "content": {"answer": params["message"]}}

    def ask(text):
        results[text] = json_of(mcp.call_tool("ask_elicit", message=text))["content"]["answer"]

    threads = [threading.Thread(target=ask, args=(f"question {number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == {f"question {number}": f"question {number}" for number in range(4)}


# -- What is told


def test_progress_and_cancellation_reach_their_request(rig, control):
    mcp, told, done = rig.session(), [], []
    mcp.on_notification = lambda method, params: told.append(params["progressToken"])
    call(mcp, "get_progress", {"n": 2}, _meta={"progressToken": "mine"})
    assert told == ["mine"] * 2
    message = {
        "jsonrpc": "2.0",
        "id": 99,
        "method": "tools/call",
        "params": {"name": "get_slow", "arguments": {"key": "k"}},
    }
    thread = threading.Thread(target=lambda: done.append(mcp.post(message)))
    thread.start()
    called = control.wait_event(event="call", tool="get_slow")
    McpClient(mcp.url, mcp.token, session_id=mcp.session_id).notify(
        "notifications/cancelled", {"requestId": 99}
    )
    assert control.wait_event(event="cancelled")["requestId"] == called["id"]
    thread.join(20)
    assert done
    control.release("k")


def test_the_level_of_a_session_goes_with_each_of_its_requests_and_survives_its_child(rig, control):
    mcp, heard = rig.session(), []
    mcp.on_notification = lambda method, params: heard.append(params["data"])
    mcp.request("logging/setLevel", {"level": "warning"})
    for _ in range(2):
        call(mcp, "get_log", {"text": "low", "level": "info"})
        call(mcp, "get_log", {"text": "high", "level": "error"})
        replace_child(rig, control, mcp)
    assert heard == ["high"] * 2
    with pytest.raises(RpcError):
        mcp.request("logging/setLevel", {"level": "loud"})


def test_what_a_session_listens_to_is_told_on_its_get_stream_until_it_is_taken_back(rig, control):
    mcp = rig.session()
    with mcp.open_stream() as stream:
        assert mcp.request("resources/subscribe", {"uri": "test://note"}) == {}
        for _ in range(2):
            call(mcp, "get_touched", {"uri": "test://whoami"})
            call(mcp, "get_touched", {"uri": "test://note"})
            told = stream.next().data
            assert (told["method"], told["params"]) == (
                "notifications/resources/updated",
                {"uri": "test://note"},
            )
            replace_child(rig, control, mcp)
        assert mcp.request("resources/unsubscribe", {"uri": "test://note"}) == {}
        call(mcp, "get_touched", {"uri": "test://note"})
        call(mcp, "change_tools")
        assert stream.next().data["method"] == "notifications/tools/list_changed"
    wanted = [
        event["notifications"].get("resourceSubscriptions")
        for event in control.events
        if event["event"] == "listen"
    ]
    assert wanted[-2:] == [["test://note"], None]


# -- Modern clients


def test_a_modern_clients_metadata_capabilities_and_questions_are_passed_on(rig):
    mcp = connect(rig, capabilities=ALL_INPUT)
    meta = json_of(call(mcp, "get_meta", _meta={"traceparent": "00-1-2-01", "com.example/x": [1]}))
    assert meta[META + "clientInfo"] == mcp.info and set(meta[META + "clientCapabilities"]) == set(ALL_INPUT)
    assert meta["traceparent"] == "00-1-2-01" and meta["com.example/x"] == [1]
    asked = call(mcp, "ask_all")
    assert asked_methods(asked) == ["elicitation/create", "roots/list", "sampling/createMessage"]
    assert json_of(call(mcp, "ask_all", **retry_of(asked))) == list(ANSWERS.values())
    first = call(mcp, "ask_twice")
    second = call(mcp, "ask_twice", **retry_of(first))
    assert len(json_of(call(mcp, "ask_twice", **retry_of(second)))) == 2
    assert (
        refused(
            mcp,
            "tools/call",
            {
                "name": "ask_twice",
                "arguments": {},
                **retry_of(second),
                "requestState": "x" + second["requestState"],
            },
        )[1]
        == -32602
    )
    assert refused(connect(rig), "tools/call", {"name": "ask_roots", "arguments": {}})[:2] == (400, -32021)


def test_a_state_of_a_modern_child_is_not_good_for_another_person(rig):
    asked = call(connect(rig, capabilities=ALL_INPUT), "ask_elicit")
    params = {"name": "ask_elicit", "arguments": {}, **retry_of(asked)}
    assert refused(connect(rig, "bob", capabilities=ALL_INPUT), "tools/call", params)[1] == -32602


def test_a_modern_child_may_say_how_long_its_lists_may_be_kept_but_they_are_always_private(make_modern):
    mcp = connect(make_modern("--mode", "ttl=5000"))
    for method in ("server/discover", "tools/list", "prompts/list"):
        result = mcp.request(method)
        assert (result["ttlMs"], result["cacheScope"]) == (5000, "private")


def test_listeners_share_the_child_and_hear_what_they_asked_for(rig):
    mcp = connect(rig)
    with (
        listening(mcp, 1, toolsListChanged=True) as (_, tools, _),
        listening(mcp, "1", resourceSubscriptions=["test://note"]) as (honoured, resources, _),
    ):
        assert honoured == {"resourceSubscriptions": ["test://note"]}
        call(mcp, "get_touched", {"uri": "test://note"})
        call(mcp, "change_tools")
        told = [(stream.next().data, own) for stream, own in ((tools, 1), (resources, "1"))]
        assert [message["method"][14:] for message, _ in told] == ["tools/list_changed", "resources/updated"]
        assert all(
            subscription_of(message) == own and type(subscription_of(message)) is type(own)
            for message, own in told
        )


def test_a_modern_client_cancels_by_closing_and_is_told_of_progress(rig, control):
    mcp, told = connect(rig), []
    mcp.on_notification = lambda method, params: told.append((params["progressToken"], params["progress"]))
    call(mcp, "get_progress", {"n": 2}, _meta={"progressToken": 7})
    assert told == [(7, 1), (7, 2)]
    _, stream = mcp.start_request("tools/call", {"name": "get_slow", "arguments": {"key": "k"}})
    called = control.wait_event(event="call", tool="get_slow")
    stream.close()
    assert control.wait_event(event="cancelled")["requestId"] == called["id"]
    control.release("k")


# -- Which era a child is of


def test_the_era_is_probed_at_the_first_spawn_and_remembered_for_the_binary(make_rig, control):
    rig = make_rig(child=("--control", control.path))
    mcp = rig.session()
    first = int(text_of(mcp.call_tool("get_pid")))
    second = replace_child(rig, control, mcp)
    sent = first_messages(control)
    assert sent[first][:2] == ["server/discover", "initialize"]
    assert sent[second][0] == "initialize"


def test_a_child_that_does_not_answer_the_probe_is_legacy(make_rig):
    rig = make_rig(child=("--mode", "deaf"))
    assert "alice" in text_of(rig.session().call_tool("get_my_user_info"))
    assert "alice" in text_of(connect(rig).call_tool("get_my_user_info"))


def test_a_binary_that_has_become_modern_in_place_is_noticed(make_rig, control, tmp_path):
    binary = tmp_path / "forgejo-mcp"

    def install(*era):
        fresh = tmp_path / "fresh"
        fresh.write_text('#!/bin/sh\nexec %s "$@"\n' % shlex.join([*CHILD, "--control", control.path, *era]))
        fresh.chmod(0o755)
        os.replace(fresh, binary)

    install()
    rig = make_rig(forgejo_mcp_binary=str(binary))
    legacy, modern = rig.session(), connect(rig)
    assert "alice" in text_of(legacy.call_tool("get_my_user_info"))
    install("--era", "modern")
    replace_child(rig, control, legacy)
    for mcp in (legacy, modern, rig.session("bob")):
        assert "modern" in json.loads(text_of(mcp.call_tool("get_argv")))
