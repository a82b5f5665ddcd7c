"""/mcp for clients of 2026-07-28 before a child of the earlier eras.

Design 5; the specification's pages are named by their titles.
"""

import base64
import json
import os
import signal
import socket
import threading
from urllib.parse import urlsplit

import pytest

from rigs.mcp_client import META, MODERN, McpClient, StreamEnded, header_value
from rigs.modern_requests import (
    ALL_INPUT,
    asked_methods,
    call,
    connect,
    listening,
    refused,
    retry_of,
    subscription_of,
)
from rigs.rig import json_of, text_of

HEADER = "MCP-Protocol-Version"


def calls_of(control, tool):
    """How often the children were called with this tool."""
    return sum(event["event"] == "call" and event["tool"] == tool for event in control.events)


def encoded(text):
    return f"=?base64?{base64.b64encode(text.encode()).decode()}?="


# -- Which era a request is of


def bare(method, meta=None, **params):
    return {
        "jsonrpc": "2.0",
        "id": 1,
        "method": method,
        "params": {**params, **({} if meta is None else {"_meta": meta})},
    }


def metadata(version=MODERN):
    return {META + "protocolVersion": version, META + "clientCapabilities": {}}


@pytest.mark.parametrize(
    "header, meta, status, code",
    [
        (MODERN, None, 400, -32602),
        (MODERN, {}, 400, -32602),
        (MODERN, {META + "clientCapabilities": {}}, 400, -32602),
        (MODERN, {META + "protocolVersion": MODERN}, 400, -32602),
        (MODERN, {**metadata(), META + "clientCapabilities": []}, 400, -32602),
        (None, metadata(), 400, -32020),
        ("2025-11-25", metadata(), 400, -32020),
        ("2099-01-01", metadata(), 400, -32020),
        ("2099-01-01", metadata("2099-01-01"), 400, -32022),
    ],
)
def test_the_version_is_said_in_header_and_metadata_alike_or_the_request_is_refused(
    rig, header, meta, status, code
):
    answer = connect(rig).post(bare("tools/list", meta), headers={HEADER: header})
    assert (answer.status, answer.json()["error"]["code"], answer.json()["id"]) == (status, code, 1)


def test_an_unknown_version_is_told_which_ones_are_known(rig):
    answer = (
        connect(rig).post(bare("tools/list", metadata("2099-01-01")), headers={HEADER: "2099-01-01"}).json()
    )
    assert answer["error"]["data"]["requested"] == "2099-01-01"
    assert MODERN in answer["error"]["data"]["supported"]


def test_initialize_is_legacy_always_and_one_token_serves_both_eras_in_turn(rig):
    modern = connect(rig)
    opening = {
        "protocolVersion": "2025-11-25",
        "capabilities": {},
        "clientInfo": {"name": "t", "version": "1"},
    }
    answer = modern.post(
        {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": opening}, headers={HEADER: MODERN}
    )
    assert answer.status == 200 and answer.json()["result"]["protocolVersion"] == "2025-11-25"
    legacy = McpClient(modern.url, modern.token, session_id=answer.headers["Mcp-Session-Id"])
    for _ in range(2):
        assert "resultType" not in legacy.call_tool("get_my_user_info")
        assert modern.call_tool("get_my_user_info")["resultType"] == "complete"


def test_without_a_version_anywhere_a_request_is_legacy(rig):
    answer = McpClient(rig.url + "/mcp", rig.login().tokens["access_token"]).post(bare("tools/list")).json()
    assert "resultType" not in answer["result"] and answer["result"]["tools"]


def test_a_session_header_is_ignored_and_none_is_given(rig):
    mcp = connect(rig)
    for foreign in ("x" * 43, rig.session("bob").session_id):
        answer = mcp.post(bare("tools/list", metadata()), headers={"Mcp-Session-Id": foreign})
        assert answer.status == 200 and "Mcp-Session-Id" not in answer.headers


# -- Headers that mirror the body (Streamable HTTP, Request Metadata)


@pytest.mark.parametrize(
    "method, params, headers",
    [
        ("tools/list", {}, {"Mcp-Method": None}),
        ("tools/list", {}, {"Mcp-Method": "prompts/list"}),
        ("tools/list", {}, {"Mcp-Method": "TOOLS/LIST"}),
        ("tools/call", {"name": "get_pid"}, {"Mcp-Name": None}),
        ("tools/call", {"name": "get_pid"}, {"Mcp-Name": "create_issue"}),
        ("tools/call", {"name": "get_pid"}, {"Mcp-Name": "GET_PID"}),
        ("tools/call", {"name": "get_pid"}, {"Mcp-Name": encoded("create_issue")}),
        ("tools/call", {"name": "get_pid"}, {"Mcp-Name": "=?base64?no base64!?="}),
        ("tools/call", {"name": "get_pid"}, {"Mcp-Name": "=?base64?/w==?="}),
        ("prompts/get", {"name": "summary"}, {"Mcp-Name": "other"}),
        ("resources/read", {"uri": "test://note"}, {"Mcp-Name": None}),
        ("resources/read", {"uri": "test://note"}, {"Mcp-Name": "test://whoami"}),
    ],
)
def test_a_header_that_says_other_than_the_body_is_refused(rig, method, params, headers):
    assert refused(connect(rig), method, params, headers)[:2] == (400, -32020)


@pytest.mark.parametrize(
    "headers",
    [
        {"Mcp-Name": encoded("get_my_user_info")},
        {"mcp-name": "get_my_user_info"},
        {"MCP-METHOD": "tools/call"},
        {"Mcp-Param-Other": "not ours"},
    ],
)
def test_header_names_have_no_case_and_values_may_be_encoded(rig, headers):
    assert "alice" in text_of(call(connect(rig), "get_my_user_info", headers=headers))


def test_a_name_that_no_header_can_hold_is_compared_decoded(rig):
    mcp, uri = connect(rig), "test://echo/Grüße, 世界 "
    assert header_value(uri).startswith("=?base64?")
    assert mcp.request("resources/read", {"uri": uri})["contents"][0]["text"] == "Grüße, 世界 "


MIRRORED = {
    "name": "get_query",
    "inputSchema": {
        "type": "object",
        "properties": {
            "region": {"type": "string", "x-mcp-header": "Region"},
            "limit": {"type": "integer", "x-mcp-header": "Limit"},
            "deep": {"type": "object", "properties": {"flag": {"type": "boolean", "x-mcp-header": "Flag"}}},
        },
    },
}


@pytest.fixture
def mirroring(make_rig, tmp_path):
    """A client before a child with a tool that has its arguments mirrored."""
    file = tmp_path / "tools.json"
    file.write_text(json.dumps([MIRRORED]))
    return connect(make_rig(child=("--mode", f"more_tools={file}")))


@pytest.mark.parametrize(
    "arguments, headers",
    [
        ({}, {}),
        ({"region": "eu"}, {"Mcp-Param-Region": "eu"}),
        ({"region": "eu"}, {"MCP-PARAM-REGION": encoded("eu")}),
        ({"region": " padded "}, {"Mcp-Param-Region": encoded(" padded ")}),
        ({"region": None}, {}),
        ({"limit": 42}, {"Mcp-Param-Limit": "42"}),
        ({"limit": 42}, {"Mcp-Param-Limit": "42.0"}),
        ({"deep": {"flag": True}}, {"Mcp-Param-Flag": "true"}),
        ({"deep": {}}, {}),
        ({"region": "=?base64?x?="}, {"Mcp-Param-Region": encoded("=?base64?x?=")}),
    ],
)
def test_an_argument_and_its_header_agree(mirroring, arguments, headers):
    assert text_of(call(mirroring, "get_query", arguments, headers)) == f"get_query {json.dumps(arguments)}"


@pytest.mark.parametrize(
    "arguments, headers",
    [
        ({"region": "eu"}, {}),
        ({"region": "eu"}, {"Mcp-Param-Region": "us"}),
        ({"region": "eu"}, {"Mcp-Param-Region": "EU"}),
        ({}, {"Mcp-Param-Region": "eu"}),
        ({"region": "eu"}, {"Mcp-Param-Region": encoded("us")}),
        ({"region": "eu"}, {"Mcp-Param-Region": "=?base64?!?="}),
        ({"limit": 42}, {"Mcp-Param-Limit": "43"}),
        ({"limit": 42}, {"Mcp-Param-Limit": "many"}),
        ({"deep": {"flag": True}}, {}),
        ({"deep": {"flag": True}}, {"Mcp-Param-Flag": "True"}),
    ],
)
def test_an_argument_without_its_header_or_with_another_is_refused(mirroring, arguments, headers):
    assert refused(mirroring, "tools/call", {"name": "get_query", "arguments": arguments}, headers)[:2] == (
        400,
        -32020,
    )


# -- What is served


@pytest.mark.parametrize(
    "method",
    [
        "nothing/known",
        "ping",
        "logging/setLevel",
        "resources/subscribe",
        "resources/unsubscribe",
        "roots/list",
    ],
)
def test_a_method_that_this_revision_has_not_is_not_found(rig, method):
    assert refused(connect(rig), method)[:2] == (404, -32601)


def test_discover_says_what_the_child_said_in_its_handshake(make_rig):
    found = connect(make_rig(child=("--mode", "instructions=read me first"))).request("server/discover")
    assert MODERN in found["supportedVersions"] and found["instructions"] == "read me first"
    assert {"tools", "resources", "prompts", "logging"} <= set(found["capabilities"])
    assert found["_meta"][META + "serverInfo"]["name"] == "Forgejo MCP Server"
    assert (found["resultType"], found["ttlMs"], found["cacheScope"]) == ("complete", 0, "private")


@pytest.mark.parametrize(
    "method, params, kept",
    [
        ("tools/list", {}, True),
        ("prompts/list", {}, True),
        ("resources/list", {}, True),
        ("resources/templates/list", {}, True),
        ("resources/read", {"uri": "test://note"}, True),
        ("tools/call", {"name": "get_pid"}, False),
        ("prompts/get", {"name": "summary"}, False),
        (
            "completion/complete",
            {"ref": {"type": "ref/prompt", "name": "summary"}, "argument": {"name": "topic", "value": "x"}},
            False,
        ),
    ],
)
def test_every_result_is_stamped_with_its_kind_its_server_and_for_how_long_it_may_be_kept(
    rig, method, params, kept
):
    result = connect(rig).request(method, params)
    assert (
        result["resultType"] == "complete"
        and result["_meta"][META + "serverInfo"]["name"] == "Forgejo MCP Server"
    )
    assert not kept or (result["ttlMs"], result["cacheScope"]) == (0, "private")


def test_all_pages_of_a_list_come(make_rig):
    names = [tool["name"] for tool in connect(make_rig(child=("--mode", "page=7"))).list_tools()]
    assert len(names) == len(set(names)) > 30 and "get_my_user_info" in names


def test_a_childs_errors_keep_their_text_and_lose_the_codes_of_earlier_revisions(rig):
    mcp = connect(rig)
    assert refused(mcp, "resources/read", {"uri": "test://none"})[:2] == (200, -32602)
    assert refused(mcp, "tools/call", {"name": "get_error", "arguments": {}})[1] == -32603


def test_a_call_whose_child_dies_is_answered_that_its_outcome_is_unknown(rig):
    mcp = connect(rig)
    status, code, data = refused(mcp, "tools/call", {"name": "crash", "arguments": {}})
    assert (status, code, data["reason"], data["outcome_unknown"]) == (200, -32603, "child_died", True)
    assert "alice" in text_of(mcp.call_tool("get_my_user_info"))


@pytest.mark.parametrize("token", ["mine", 7, "7", "", 10**15])
def test_progress_comes_on_the_requests_own_stream_under_its_own_token(rig, token):
    mcp, told = connect(rig), []
    mcp.on_notification = lambda method, params: told.append(
        (method, params["progressToken"], params["progress"])
    )
    assert text_of(call(mcp, "get_progress", {"n": 3}, _meta={"progressToken": token})) == "3 steps"
    assert told == [("notifications/progress", token, step) for step in (1, 2, 3)] and type(
        told[0][1]
    ) is type(token)
    assert [event.id for event in mcp.events] == [None] * 4  # streams are not resumable


def test_two_requests_with_the_same_progress_token_and_id_each_get_their_own(rig):
    oauth = rig.login()
    clients = [connect(rig, oauth=oauth) for _ in range(4)]
    seen, barrier = {}, threading.Barrier(len(clients))

    def run(number, mcp):
        told = []
        mcp.on_notification = lambda method, params: told.append(params["total"])
        barrier.wait(30)
        answer = mcp.request(
            "tools/call",
            {"name": "get_progress", "arguments": {"n": number + 1}, "_meta": {"progressToken": "same"}},
            id="same",
        )
        seen[number] = (text_of(answer), told)

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert seen == {n: (f"{n + 1} steps", [n + 1] * (n + 1)) for n in range(4)}


def test_log_messages_come_only_to_the_request_that_said_from_which_level(rig):
    mcp, heard = connect(rig), []
    mcp.on_notification = lambda method, params: heard.append((params["level"], params["data"]))
    call(mcp, "get_log", {"text": "unasked"})
    call(mcp, "get_log", {"text": "low", "level": "info"}, _meta={META + "logLevel": "error"})
    call(mcp, "get_log", {"text": "high", "level": "critical"}, _meta={META + "logLevel": "error"})
    call(mcp, "get_log", {"text": "unasked again", "level": "critical"})
    assert heard == [("critical", "high")]


def test_an_unknown_log_level_is_an_invalid_parameter(rig):
    assert refused(connect(rig), "tools/list", {"_meta": {META + "logLevel": "loud"}})[1] == -32602


# -- Other messages and methods


def test_notifications_are_accepted_and_responses_and_batches_refused(rig):
    mcp = connect(rig)
    accepted = mcp.post(
        {"jsonrpc": "2.0", "method": "notifications/roots/list_changed", "params": {"_meta": metadata()}}
    )
    assert (accepted.status, accepted.body) == (202, b"")
    for body in ({"jsonrpc": "2.0", "id": 1, "result": {}}, [bare("tools/list", metadata())], []):
        answer = mcp.post(body, headers={HEADER: MODERN})
        assert (answer.status, answer.json()["error"]["code"]) == (400, -32600)


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_there_is_no_stream_to_get_and_no_session_to_delete(rig, method):
    mcp = connect(rig)
    answer = mcp._wire.exchange(method, mcp.url, None, {**mcp.headers(), "Accept": "text/event-stream"})
    assert answer.status == 405 and "POST" in answer.headers["Allow"]


@pytest.mark.parametrize(
    "body, code",
    [
        (b"{", -32700),
        (b'{"a":1,"a":2}', -32600),
        (b'{"jsonrpc":"2.0","id":null,"method":"tools/list"}', -32600),
    ],
)
def test_what_is_no_message_is_refused_with_its_code(rig, body, code):
    answer = connect(rig).post(body, headers={HEADER: MODERN, "Mcp-Method": "tools/list"})
    assert (answer.status, answer.json()["error"]["code"]) == (400, code)


# -- Cancelling


def test_closing_the_stream_cancels_the_call_at_the_child(controlled, control):
    mcp = connect(controlled)
    request_id, stream = mcp.start_request("tools/call", {"name": "get_slow", "arguments": {"key": "k"}})
    called = control.wait_event(event="call", tool="get_slow")
    stream.close()
    assert control.wait_event(event="cancelled")["requestId"] == called["id"]
    control.release("k")
    assert "alice" in text_of(mcp.call_tool("get_my_user_info"))


def test_hanging_up_before_anything_was_answered_cancels_too(controlled, control):
    mcp = connect(controlled)
    message = bare("tools/call", metadata(), name="get_slow", arguments={"key": "k"})
    body, target = json.dumps(message).encode(), urlsplit(mcp.url)
    lines = [
        f"POST {target.path} HTTP/1.1",
        f"Host: {target.netloc}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        *(f"{name}: {value}" for name, value in mcp.headers(message).items()),
    ]
    with socket.create_connection((target.hostname, target.port)) as wire:
        wire.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        called = control.wait_event(event="call", tool="get_slow")
    assert control.wait_event(event="cancelled")["requestId"] == called["id"]
    control.release("k")


# -- Subscriptions


def test_a_listener_is_told_what_it_asked_for_and_nothing_else(rig):
    mcp = connect(rig)
    with listening(mcp, "sub", resourceSubscriptions=["test://note"]) as (honoured, stream, _):
        assert honoured == {"resourceSubscriptions": ["test://note"]}
        call(mcp, "change_tools")
        call(mcp, "get_touched", {"uri": "test://whoami"})
        call(mcp, "get_touched", {"uri": "test://note"})
        told = stream.next()
        assert (told.data["method"], told.data["params"]["uri"]) == (
            "notifications/resources/updated",
            "test://note",
        )
        assert subscription_of(told.data) == "sub" and told.id is None


def test_what_the_child_cannot_tell_of_is_left_out_of_the_acknowledgement(rig):
    with listening(connect(rig), toolsListChanged=True, promptsListChanged=True) as (honoured, *_):
        assert honoured == {"toolsListChanged": True}  # the child promises list_changed of its tools only


def test_several_listeners_share_a_child_and_each_hears_under_its_own_id(controlled, control):
    mcp = connect(controlled)
    wanted = {"toolsListChanged": True, "resourceSubscriptions": ["test://note"]}
    with listening(mcp, 1, **wanted) as (_, one, _), listening(mcp, "1", **wanted) as (_, two, _):
        call(mcp, "get_touched", {"uri": "test://note"})
        call(mcp, "change_tools")
        for stream, own in ((one, 1), (two, "1")):
            heard = [stream.next().data for _ in range(2)]
            assert sorted(message["method"][14:] for message in heard) == [
                "resources/updated",
                "tools/list_changed",
            ]
            assert [(type(subscription_of(m)), subscription_of(m)) for m in heard] == [(type(own), own)] * 2
        assert len(control.children) == 1
        two.close()
        call(mcp, "get_touched", {"uri": "test://note"})
        assert one.next().data["method"] == "notifications/resources/updated"
        sent = [event["method"] for event in control.events if event["event"] == "message"]
        assert (sent.count("resources/subscribe"), sent.count("resources/unsubscribe")) == (1, 0)
    control.wait_event(event="message", method="resources/unsubscribe")


def test_a_listener_hears_its_end_when_the_broker_stops(rig):
    with listening(connect(rig), 9, toolsListChanged=True) as (_, stream, _):
        rig.stop()
        last = stream.next().data
        assert last["id"] == 9 and last["result"]["resultType"] == "complete" and subscription_of(last) == 9
        with pytest.raises(StreamEnded):
            stream.next()


def test_a_revoked_grant_ends_its_listeners_within_a_moment(rig):
    mcp = connect(rig)
    with listening(mcp, toolsListChanged=True) as (_, stream, _):
        mcp.oauth.revoke(mcp.oauth.tokens["refresh_token"])
        rig.tick()
        assert stream.ended.wait(30)


def test_a_listener_keeps_its_child_awake_until_it_leaves(controlled, control):
    mcp = connect(controlled)
    with listening(mcp, toolsListChanged=True):
        controlled.clock.advance(3000)
        controlled.tick()
        assert len(control.children) == 1
        call(mcp, "change_tools")


# -- Input that a child asks for


@pytest.mark.parametrize(
    "tool, method",
    [
        ("ask_elicit", "elicitation/create"),
        ("ask_sampling", "sampling/createMessage"),
        ("ask_roots", "roots/list"),
    ],
)
def test_a_childs_question_becomes_input_required_and_the_retry_reaches_the_held_call(
    controlled, control, tool, method
):
    mcp = connect(controlled, capabilities=ALL_INPUT)
    asked = call(mcp, tool)
    assert asked_methods(asked) == [method] and len(asked["inputRequests"]) == 1
    ended = call(mcp, tool, **retry_of(asked))
    assert (
        ended["resultType"] == "complete"
        and json_of(ended) == list(retry_of(asked)["inputResponses"].values())[0]
    )
    assert calls_of(control, tool) == 1


def test_questions_asked_at_once_are_collected_in_one_result(controlled, control):
    mcp = connect(controlled, capabilities=ALL_INPUT)
    asked = call(mcp, "ask_all")
    assert asked_methods(asked) == ["elicitation/create", "roots/list", "sampling/createMessage"]
    answers = json_of(call(mcp, "ask_all", **retry_of(asked)))
    assert [sorted(answer) for answer in answers] == [
        ["action", "content"],
        ["content", "model", "role"],
        ["roots"],
    ]
    three = call(mcp, "ask_elicit", {"count": 3})
    assert asked_methods(three) == ["elicitation/create"] * 3
    assert len(json_of(call(mcp, "ask_elicit", {"count": 3}, **retry_of(three)))) == 3


def test_a_call_asks_again_in_another_round_under_another_state(controlled, control):
    mcp = connect(controlled, capabilities=ALL_INPUT)
    first = call(mcp, "ask_twice")
    second = call(mcp, "ask_twice", **retry_of(first))
    assert second["requestState"] != first["requestState"] and asked_methods(second) == ["elicitation/create"]
    assert len(json_of(call(mcp, "ask_twice", **retry_of(second)))) == 2
    assert calls_of(control, "ask_twice") == 1


def test_what_was_not_answered_is_asked_again_and_what_was_not_asked_is_ignored(controlled, control):
    mcp = connect(controlled, capabilities=ALL_INPUT)
    asked = call(mcp, "ask_all")
    whole = retry_of(asked)
    one = dict(list(whole["inputResponses"].items())[:1])
    again = call(mcp, "ask_all", **retry_of(asked, {**one, "never asked": {"action": "accept"}}))
    assert again["resultType"] == "input_required" and set(again["inputRequests"]) == set(
        whole["inputResponses"]
    ) - set(one)
    assert len(json_of(call(mcp, "ask_all", **retry_of(again)))) == 3
    assert calls_of(control, "ask_all") == 1


def test_a_refusal_of_the_person_reaches_the_child(rig):
    mcp = connect(rig, capabilities=ALL_INPUT)
    asked = call(mcp, "ask_elicit")
    key = next(iter(asked["inputRequests"]))
    assert json_of(call(mcp, "ask_elicit", **retry_of(asked, {key: {"action": "decline"}}))) == {
        "action": "decline"
    }


def test_a_retry_may_come_through_another_connection_and_a_refreshed_token(rig):
    mcp = connect(rig, capabilities=ALL_INPUT)
    asked = call(mcp, "ask_elicit")
    mcp.oauth.refresh()
    other = connect(rig, oauth=mcp.oauth, capabilities=ALL_INPUT)
    assert json_of(call(other, "ask_elicit", **retry_of(asked)))["action"] == "accept"


def changed(state):
    """A state with one character of its middle changed."""
    middle = len(state) // 2
    return state[:middle] + ("A" if state[middle] != "A" else "B") + state[middle + 1 :]


def test_a_state_that_is_tampered_with_foreign_or_for_another_request_is_refused_and_nothing_else_happens(
    controlled, control
):
    mcp = connect(controlled, capabilities=ALL_INPUT)
    asked = call(mcp, "ask_elicit", {"message": "Which?"})
    right = {"name": "ask_elicit", "arguments": {"message": "Which?"}, **retry_of(asked)}
    wrong = [
        (mcp, {**right, "requestState": changed(asked["requestState"])}),
        (mcp, {**right, "requestState": ""}),
        (mcp, {**right, "requestState": "x"}),
        (mcp, {**right, "requestState": asked["requestState"][:-4]}),
        (mcp, {**right, "name": "ask_roots"}),
        (mcp, {**right, "arguments": {"message": "Other?"}}),
        (connect(controlled, "bob", capabilities=ALL_INPUT), right),
        (connect(controlled, capabilities=ALL_INPUT), right),
    ]
    for number, (client, params) in enumerate(wrong):
        assert refused(client, "tools/call", params)[1] == -32602, number
    assert calls_of(control, "ask_elicit") == 1 and calls_of(control, "ask_roots") == 0
    assert json_of(mcp.request("tools/call", right))["action"] == "accept"


def test_a_state_is_good_for_one_retry(controlled, control):
    mcp = connect(controlled, capabilities=ALL_INPUT)
    asked = call(mcp, "ask_elicit")
    call(mcp, "ask_elicit", **retry_of(asked))
    assert refused(mcp, "tools/call", {"name": "ask_elicit", "arguments": {}, **retry_of(asked)})[1] == -32602
    assert calls_of(control, "ask_elicit") == 1


def test_two_retries_at_once_are_one_answer_and_one_refusal(controlled, control):
    mcp = connect(controlled, capabilities=ALL_INPUT)
    asked, barrier, ended = call(mcp, "ask_elicit"), threading.Barrier(2), []

    def retry():
        other = connect(controlled, oauth=mcp.oauth, capabilities=ALL_INPUT)
        message = other._message("tools/call", {"name": "ask_elicit", "arguments": {}, **retry_of(asked)}, 1)
        barrier.wait(30)
        ended.append(other.post(message).messages()[-1])

    threads = [threading.Thread(target=retry) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted("result" in message for message in ended) == [False, True]
    assert [message["error"]["code"] for message in ended if "error" in message] == [-32602]


def test_a_call_that_is_never_retried_is_cancelled_at_its_bound(make_rig, control):
    mcp = connect(make_rig(child=("--control", control.path), input_timeout="1s"), capabilities=ALL_INPUT)
    asked = call(mcp, "ask_elicit")
    control.wait_event(event="cancelled")
    assert refused(mcp, "tools/call", {"name": "ask_elicit", "arguments": {}, **retry_of(asked)})[1] == -32602
    assert calls_of(control, "ask_elicit") == 1


@pytest.mark.parametrize("end", ["kill the child", "restart the broker"])
def test_a_call_that_is_gone_is_not_run_again(controlled, control, end):
    mcp = connect(controlled, capabilities=ALL_INPUT)
    asked = call(mcp, "ask_elicit")
    if end == "kill the child":
        os.kill(control.children[0], signal.SIGKILL)
        controlled.log.wait("child_stopped")
    else:
        controlled.restart()
    assert refused(mcp, "tools/call", {"name": "ask_elicit", "arguments": {}, **retry_of(asked)})[1] == -32602
    assert calls_of(control, "ask_elicit") == 1


@pytest.mark.parametrize(
    "tool, capability", [("ask_elicit", "elicitation"), ("ask_sampling", "sampling"), ("ask_roots", "roots")]
)
def test_a_capability_that_was_not_declared_is_named_when_it_is_needed(rig, tool, capability):
    others = {name: {} for name in ALL_INPUT if name != capability}
    for declared in ({}, others):
        mcp = connect(rig, capabilities=declared)
        status, code, data = refused(mcp, "tools/call", {"name": tool, "arguments": {}})
        assert (status, code, list(data["requiredCapabilities"])) == (400, -32021, [capability])


def test_two_calls_that_ask_at_the_same_time_each_get_their_own_answers(controlled):
    """Nothing is attributed by guess: calls that may ask have a child each."""
    clients = [connect(controlled, capabilities=ALL_INPUT)]
    call(clients[0], "ask_elicit")  # from now on this binary is known to ask
    clients += [connect(controlled, oauth=clients[0].oauth, capabilities=ALL_INPUT) for _ in range(3)]
    asked = [call(mcp, "ask_elicit", {"message": f"for {number}"}) for number, mcp in enumerate(clients)]
    for number, question in enumerate(asked):
        assert [each["params"]["message"] for each in question["inputRequests"].values()] == [f"for {number}"]
    for number, (mcp, question) in enumerate(zip(clients, asked)):
        key = next(iter(question["inputRequests"]))
        answer = {key: {"action": "accept", "content": {"answer": str(number)}}}
        ended = call(mcp, "ask_elicit", {"message": f"for {number}"}, **retry_of(question, answer))
        assert json_of(ended)["content"] == {"answer": str(number)}
