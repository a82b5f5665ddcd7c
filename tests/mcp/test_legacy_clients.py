"""/mcp for legacy clients, through the whole broker: sessions, streams, questions, errors, what survives."""

import json
import os
import signal
import threading
from pathlib import Path

import pytest

import fjmcp_broker
from rigs.mcp_client import McpClient, RpcError
from rigs.rig import json_of, text_of


def children(rig):
    return rig.broker.capacity.count()


def raw(mcp, body, **headers):
    return mcp.post(body, headers=headers)


def test_a_user_calls_tools_as_themselves_and_two_users_never_meet(rig):
    alice, bob = rig.session("alice"), rig.session("bob")
    for _ in range(3):
        assert '"login": "alice"' in text_of(alice.call_tool("get_my_user_info"))
        assert '"login": "bob"' in text_of(bob.call_tool("get_my_user_info"))
    assert "bob" not in text_of(alice.call_tool("list_my_repos"))


def test_P01_a_child_gets_an_allow_listed_environment_with_its_users_token_only(rig, monkeypatch):
    monkeypatch.setenv("FORGEJO_MCP_ALLOW_FILE_PATH_UPLOAD", "1")
    environment = json_of(rig.session().call_tool("get_env"))
    ours = {"FORGEJO_ACCESS_TOKEN", "FORGEJO_URL", "FORGEJO_USER_AGENT"}
    passed = {
        "PATH",
        "HOME",
        "LANG",
        "TZ",
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "NO_PROXY",
        "http_proxy",
        "https_proxy",
        "no_proxy",
    }
    assert ours <= set(environment) <= ours | passed | {"LC_CTYPE", "PWD", "SHLVL", "_", "TOKEN_BACKWARDS"}
    assert environment["TOKEN_BACKWARDS"][::-1] not in json_of(rig.session().call_tool("get_argv"))


def test_a_child_is_told_the_address_of_Forgejo_that_works_from_here(rig):
    rig.broker.settings.forgejo_internal_url = rig.forgejo.url.replace("127.0.0.1", "localhost")
    environment = json_of(rig.session().call_tool("get_env"))
    assert environment["FORGEJO_URL"] == rig.forgejo.url.replace("127.0.0.1", "localhost")
    assert environment["FORGEJO_USER_AGENT"] == f"fjmcp-broker/{fjmcp_broker.__version__}"


@pytest.mark.parametrize("given", ["SSL_CERT_FILE", None])
def test_a_child_trusts_the_systems_authorities_and_the_operators(make_rig, tmp_path, monkeypatch, given):
    own = tmp_path / "ca.pem"
    own.write_text("\ufeffthe operator's\n")
    system = tmp_path / "system.pem"
    system.write_text("the system's\n")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    if given:
        monkeypatch.setenv(given, str(system))
    else:
        monkeypatch.setattr(fjmcp_broker, "AUTHORITIES", ("/nowhere", str(system)))
    rig = make_rig(forgejo_ca_file=str(own))
    for _ in range(2):
        path = Path(json_of(rig.session().call_tool("get_env"))["SSL_CERT_FILE"])
        assert path.read_text() == "the system's\n\nthe operator's\n"
        path.write_text("somebody wrote over it")
    own.write_text("the operator's next\n")
    path = Path(json_of(rig.session().call_tool("get_env"))["SSL_CERT_FILE"])
    assert "next" in path.read_text() and os.listdir(path.parent) and not path.parent.stat().st_mode & 0o022


def test_authorities_are_never_read_from_a_folder_that_others_can_write(make_rig, tmp_path, monkeypatch):
    own = tmp_path / "ca.pem"
    own.write_text("the operator's\n")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (tmp_path / f"fjmcp-broker-{os.geteuid()}").mkdir()
    (tmp_path / f"fjmcp-broker-{os.geteuid()}").chmod(0o777)
    rig = make_rig(forgejo_ca_file=str(own))
    path = Path(json_of(rig.session().call_tool("get_env"))["SSL_CERT_FILE"])
    assert path.parent == rig.directory and "the operator's" in path.read_text()


def test_P04_a_child_has_no_file_descriptor_but_its_three_pipes(rig):
    descriptors = json_of(rig.session().call_tool("get_fds"))
    named = (
        descriptors
        if isinstance(descriptors, dict)
        else {str(number): target for number, target in descriptors}
    )
    assert not [
        target for target in named.values() if "broker.db" in str(target) or "eventpoll" in str(target)
    ]
    assert sum("pipe:" in str(target) for target in named.values()) == 3


def test_initialize_opens_a_session_with_the_childs_own_words(rig):
    client = rig.login()
    mcp = McpClient(rig.url + "/mcp", client.tokens["access_token"])
    result = mcp.initialize()
    assert result["serverInfo"]["name"] == "Forgejo MCP Server"
    assert result["protocolVersion"] == "2025-11-25"


@pytest.mark.parametrize("version", ["2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25", "2099-01-01"])
def test_any_version_is_negotiated(rig, version):
    mcp = McpClient(rig.url + "/mcp", rig.login().tokens["access_token"], protocol="2025-11-25")
    negotiated = mcp.initialize(version=version)["protocolVersion"]
    assert negotiated == (version if version < "2026" else "2025-11-25")


def test_a_session_outlives_its_child_and_the_broker(rig):
    mcp = rig.session()
    mcp.request("logging/setLevel", {"level": "warning"})
    mcp.request("resources/subscribe", {"uri": "test://watched"})
    first = int(text_of(mcp.call_tool("get_pid")))
    os.kill(first, signal.SIGKILL)
    rig.log.wait("child_stopped")
    second = int(text_of(mcp.call_tool("get_pid")))
    assert second != first
    rig.restart()
    assert int(text_of(mcp.call_tool("get_pid"))) not in (first, second)
    seen = json_of(mcp.call_tool("get_initialize"))
    assert "warning" in json.dumps(seen) and "test://watched" in json.dumps(seen)


def test_an_idle_child_is_stopped_and_its_session_stays(make_rig):
    rig = make_rig(session_idle_timeout="15m")
    mcp = rig.session()
    rig.tick()
    assert children(rig) == 1
    rig.clock.advance(901)
    session = rig.broker.sessions.all()[0]
    session.backend.used_at -= 2
    rig.tick()
    assert rig.log.wait("child_stopped")[0]["reason"] == "idle"
    assert "alice" in text_of(mcp.call_tool("get_my_user_info"))


def test_concurrent_requests_to_a_sleeping_session_wake_one_child(rig):
    mcp = rig.session()
    os.kill(int(text_of(mcp.call_tool("get_pid"))), signal.SIGKILL)
    rig.log.wait("child_stopped")
    pids, barrier = [], threading.Barrier(8)

    def call():
        other = McpClient(mcp.url, mcp.token, session_id=mcp.session_id)
        barrier.wait(30)
        pids.append(text_of(other.call_tool("get_pid")))

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(pids) == 8 and len(set(pids)) == 1


def test_a_call_whose_child_dies_is_answered_that_its_outcome_is_unknown(rig):
    mcp = rig.session()
    with pytest.raises(RpcError) as error:
        mcp.call_tool("crash")
    assert error.value.code == -32000 and error.value.http_status == 200
    assert error.value.data == {"reason": "child_died", "outcome_unknown": True, "retryable": True}
    assert "alice" in text_of(mcp.call_tool("get_my_user_info"))


def test_J22_a_call_that_is_never_answered_gets_an_error_at_its_time(make_rig):
    mcp = make_rig(request_timeout="1s").session()
    with pytest.raises(RpcError) as error:
        mcp.call_tool("silent")
    assert error.value.data["reason"] == "timed_out"


def test_X01_X07_unknown_foreign_and_ended_sessions_are_answered_alike(rig):
    alice, bob = rig.session("alice"), rig.session("bob")
    body = {"jsonrpc": "2.0", "id": 7, "method": "ping"}
    foreign = raw(McpClient(alice.url, bob.token, session_id=alice.session_id), body)
    unknown = raw(McpClient(alice.url, bob.token, session_id="x" * 43), body)
    assert (foreign.status, foreign.body) == (unknown.status, unknown.body)
    assert foreign.status == 404 and foreign.json()["error"]["code"] == -32001 and foreign.json()["id"] == 7
    assert alice.request("ping") == {}
    ended = alice.session_id
    alice.delete()
    again = raw(McpClient(alice.url, alice.token, session_id=ended), body)
    assert (again.status, again.body) == (unknown.status, unknown.body)


def test_J05_ids_keep_their_type_and_two_of_the_same_get_each_their_own(rig):
    mcp = rig.session()
    for request_id in ("1", 1, "x" * 256, 10**63, -5, ""):
        answer = raw(mcp, {"jsonrpc": "2.0", "id": request_id, "method": "ping"}).json()
        assert answer["id"] == request_id and type(answer["id"]) is type(request_id)


@pytest.mark.parametrize(
    "body, status, code",
    [
        (b"{", 400, -32700),
        (b"", 400, -32700),
        (b'{"a":1,"a":2}', 400, -32600),
        (b"[]", 400, -32600),
        (b"1", 400, -32600),
        (b'{"jsonrpc":"2.0","id":null,"method":"ping"}', 400, -32600),
        (b'{"jsonrpc":"2.0","id":1.5,"method":"ping"}', 400, -32600),
        (b'{"jsonrpc":"1.0","id":1,"method":"ping"}', 400, -32600),
        (b'{"jsonrpc":"2.0","id":1,"method":"ping"}{}', 400, -32700),
        (b"[" * 100000, 400, -32700),
        (b"\xff\xfe", 400, -32700),
        (b'{"jsonrpc":"2.0","id":1,"method":"ping","params":NaN}', 400, -32700),
        (b'{"jsonrpc":"2.0","id":1,"method":"ping","params":[1]}', 400, -32600),
        (b'{"jsonrpc":"2.0","id":' + b"9" * 5000 + b"}", 400, -32700),
        (b'[{"jsonrpc":"2.0","id":1,"method":"ping"}]', 400, -32600),
    ],
)
def test_what_is_no_message_is_refused_with_its_code(rig, body, status, code):
    mcp = rig.session()
    answer = raw(mcp, body)
    assert answer.status == status and answer.json()["error"]["code"] == code
    assert mcp.request("ping") == {}


def test_a_batch_is_answered_in_a_session_of_2025_03_26(rig):
    mcp = rig.session(protocol="2025-03-26")
    answer = raw(
        mcp,
        [
            {"jsonrpc": "2.0", "id": 1, "method": "ping"},
            {"jsonrpc": "2.0", "method": "notifications/x"},
            {"jsonrpc": "2.0", "id": "2", "method": "ping"},
        ],
    )
    assert {item["id"] for item in answer.json()} == {1, "2"}


def test_requests_without_a_session_id_are_served_by_a_pool(rig):
    mcp = McpClient(rig.url + "/mcp", rig.login().tokens["access_token"])
    assert "alice" in text_of(mcp.call_tool("get_my_user_info"))
    assert raw(mcp, {"jsonrpc": "2.0", "method": "notifications/initialized"}).status == 202
    with pytest.raises(RpcError) as error:
        mcp.request("logging/setLevel", {"level": "info"})
    assert error.value.code == -32601


def test_progress_and_questions_travel_on_the_requests_stream(rig):
    mcp = rig.session(capabilities={"elicitation": {}})
    seen = []
    mcp.on_notification = lambda method, params: seen.append((method, params.get("progressToken")))
    mcp.on_request = lambda method, params: {"action": "accept", "content": {"name": "x"}}
    mcp.request(
        "tools/call", {"name": "get_progress", "arguments": {"n": 3}, "_meta": {"progressToken": "mine"}}
    )
    assert seen == [("notifications/progress", "mine")] * 3
    assert json_of(mcp.call_tool("ask_elicit"))["action"] == "accept"


def test_the_get_stream_carries_what_belongs_to_no_request_and_resumes(controlled, control):
    mcp = controlled.session()
    stream = mcp.open_stream()
    stream.wait_comment(10)
    control.emit(
        {"jsonrpc": "2.0", "method": "notifications/message", "params": {"level": "info", "data": 1}}
    )
    first = stream.next(30)
    stream.close()
    control.emit(
        {"jsonrpc": "2.0", "method": "notifications/message", "params": {"level": "info", "data": 2}}
    )
    resumed = mcp.open_stream(last_event_id=first.id)
    assert resumed.next(30).data["params"]["data"] == 2
    resumed.close()


def test_a_newer_get_stream_takes_over(controlled, control):
    mcp = controlled.session()
    older = mcp.open_stream()
    older.wait_comment(10)
    newer = mcp.open_stream()
    newer.wait_comment(10)
    control.emit(
        {"jsonrpc": "2.0", "method": "notifications/message", "params": {"level": "info", "data": 1}}
    )
    assert newer.next(30).data["params"]["data"] == 1
    newer.close()


def test_cancelling_reaches_the_child_and_frees_the_request(controlled, control):
    mcp = controlled.session()
    done = []
    thread = threading.Thread(
        target=lambda: done.append(
            raw(
                mcp,
                {
                    "jsonrpc": "2.0",
                    "id": 99,
                    "method": "tools/call",
                    "params": {"name": "get_slow", "arguments": {"key": "k"}},
                },
            )
        )
    )
    thread.start()
    control.wait_event(lambda event: event.get("event") == "call" and event.get("tool") == "get_slow")
    McpClient(mcp.url, mcp.token, session_id=mcp.session_id).notify(
        "notifications/cancelled", {"requestId": 99}
    )
    control.wait_event(lambda event: event.get("event") == "cancelled")
    thread.join(20)
    assert done and done[0].status == 200
    control.release("k")


def test_read_only_lists_and_calls_only_what_reads(rig):
    mcp = rig.session(access="read")
    names = {tool["name"] for tool in mcp.list_tools()}
    assert "get_my_user_info" in names and "hint_reader" in names and "create_issue" not in names
    assert "alice" in text_of(mcp.call_tool("get_my_user_info"))
    mcp.call_tool("hint_reader")
    refused = mcp.call_tool("create_issue", owner="alice", repo="r", title="t")
    assert refused["isError"] and "read only" in text_of(refused)


def test_a_write_without_ever_asking_for_it_is_a_step_up(rig):
    client = rig.login(access="read", scope="forgejo:read")
    mcp = McpClient(rig.url + "/mcp", client.tokens["access_token"])
    mcp.initialize()
    answer = raw(
        mcp,
        {
            "jsonrpc": "2.0",
            "id": 1,
            "method": "tools/call",
            "params": {"name": "create_issue", "arguments": {}},
        },
    )
    assert answer.status == 403
    assert 'error="insufficient_scope"' in answer.headers["www-authenticate"]


def test_a_revoked_grant_ends_its_sessions_streams_and_children(rig):
    mcp = rig.session()
    stream = mcp.open_stream()
    stream.wait_comment(10)
    mcp.oauth.revoke(mcp.oauth.tokens["refresh_token"])
    rig.log.wait("child_stopped")
    assert raw(mcp, {"jsonrpc": "2.0", "id": 1, "method": "ping"}).status == 401


def test_a_busy_child_is_relieved_when_the_token_rotates(controlled, control):
    rig, mcp = controlled, controlled.session()
    other = McpClient(mcp.url, mcp.token, session_id=mcp.session_id)
    done = []
    thread = threading.Thread(target=lambda: done.append(other.call_tool("get_slow", key="k")))
    thread.start()
    control.wait_event(lambda event: event.get("event") == "call" and event.get("tool") == "get_slow")
    rig.clock.advance(3500)
    rig.tick()
    rig.log.wait("child_started", 2)
    assert "alice" in text_of(mcp.call_tool("get_my_user_info"))
    control.release("k")
    thread.join(20)
    assert done
    rig.log.wait("child_stopped")


def test_at_the_cap_the_longest_idle_child_makes_room(make_rig):
    rig = make_rig(max_sessions=1)
    alice, bob = rig.session("alice"), rig.session("bob")
    for mcp, name in ((alice, "alice"), (bob, "bob"), (alice, "alice")):
        assert name in text_of(mcp.call_tool("get_my_user_info"))
    assert children(rig) == 1


def test_why_a_child_cannot_start_is_told_apart(make_rig):
    rig = make_rig()
    mcp = rig.session()
    os.kill(int(text_of(mcp.call_tool("get_pid"))), signal.SIGKILL)
    rig.log.wait("child_stopped")
    rig.forgejo.down()
    answer = raw(mcp, {"jsonrpc": "2.0", "id": 1, "method": "prompts/list"})
    assert (
        answer.status == 503
        and answer.json()["error"]["data"]["reason"] == "upstream_down"
        and "retry-after" in answer.headers
    )
    rig.forgejo.up()
    assert mcp.request("prompts/list")["prompts"]


def test_a_missing_binary_is_said_so(make_rig):
    rig = make_rig(forgejo_mcp_binary="/nowhere/forgejo-mcp")
    mcp = McpClient(rig.url + "/mcp", rig.login().tokens["access_token"])
    answer = raw(
        mcp,
        {
            "jsonrpc": "2.0",
            "id": 1,
            "method": "initialize",
            "params": {
                "protocolVersion": "2025-11-25",
                "capabilities": {},
                "clientInfo": {"name": "t", "version": "1"},
            },
        },
    )
    assert answer.status == 500 and answer.json()["error"]["data"]["reason"] == "child_missing"


@pytest.mark.parametrize(
    "tool, arguments",
    [
        ("bad_lines", {"n": 5}),
        ("double_answer", {}),
        ("stderr_flood", {"bytes": 300000}),
        ("get_echo", {"text": "x", "size": 3000000}),
    ],
)
def test_a_child_that_misbehaves_a_little_still_serves(rig, tool, arguments):
    mcp = rig.session()
    mcp.call_tool(tool, **arguments)
    assert mcp.request("ping") == {}


def test_B01_without_a_token_every_method_is_told_where_to_log_in(rig):
    mcp = McpClient(rig.url + "/mcp", None)
    answer = raw(mcp, {"jsonrpc": "2.0", "id": 1, "method": "ping"})
    assert answer.status == 401 and "error=" not in answer.headers["www-authenticate"]
    assert (
        f'resource_metadata="{rig.url}/.well-known/oauth-protected-resource/mcp"'
        in answer.headers["www-authenticate"]
    )
