"""Tool rules over the running program.

What an operator denies is listed nowhere and reaches no child, in whatever way it is asked for.
"""

import fnmatch
import signal
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fjmcp_broker
from rigs import mcp_client
from rigs.browser import open_account
from rigs.listing import READER, WRITER, Listing, called, request, tool
from rigs.mcp_client import META, MODERN, McpClient, OAuthClient, header_value
from rigs.modern_requests import call, connect, listening, refused, retry_of
from rigs.rig import Rig, text_of

DENIED = "The operator of this server does not allow this tool."
MODERN_META = {META + "protocolVersion": MODERN, META + "clientCapabilities": {}}
EVERYBODY = {}
NO_DELETING = {"deny": ["delete_*"]}
READING = {"access": "read"}
NOTHING = {"allow": []}


def put_rules(rig, *tables):
    """What SIGHUP does with other rules in the file."""
    broker = rig.broker
    broker.settings.tool_rules = fjmcp_broker.KINDS["tool_rules"](list(tables))
    broker.endpoint.judge.rules_changed(broker.sessions)


@pytest.fixture
def listing(make_rig, tmp_path, monkeypatch):
    """A login with full access before a child whose tools a test chooses."""
    monkeypatch.setattr(mcp_client, "judge", None)  # its results are not what a schema wants
    made = Listing(make_rig, tmp_path, "full")
    made.say([tool(READER, True), tool(WRITER), tool("create_repo")])
    return made


def clients_of(listing):
    """{where: McpClient} of one login in every way of asking."""
    return {
        "session": listing.session(),
        "batch": listing.session("2025-03-26"),
        "pool": listing.pool,
        "modern": connect(listing.rig, oauth=listing.oauth),
    }


def in_its_way(where, mcp, method, params, request_id=1):
    """The answer to a request, as a batch where that is the way."""
    if where == "modern":
        params = {**params, "_meta": MODERN_META}
        name = {"Mcp-Name": header_value(params["name"])} if "name" in params else {}
        headers = {"Mcp-Method": method, "MCP-Protocol-Version": MODERN, **name}
        return mcp.post(request(method, params, request_id), headers=headers).messages()[-1]
    body = request(method, params, request_id)
    if where != "batch":
        return mcp.post(body).messages()[-1]
    answers = mcp.post([body, request("tools/list", {}, "other")]).messages()
    answers = [each for answer in answers for each in (answer if isinstance(answer, list) else [answer])]
    return next(answer for answer in answers if answer.get("id") == request_id)


def outcome(answer):
    """What became of a tools/call: `ran`, `denied` or the code of an error."""
    if "error" in answer:
        return answer["error"]["code"]
    text = text_of(answer["result"])
    assert answer["result"].get("isError", False) is (text == DENIED)
    return "denied" if text == DENIED else "ran"


def names_of(answer):
    return [each["name"] for each in answer["result"]["tools"]]


# -- calls and lists, in every way of asking


def test_what_a_rule_denies_is_listed_nowhere_and_reaches_no_child(listing):
    put_rules(listing.rig, NO_DELETING)
    for where, mcp in clients_of(listing).items():
        assert names_of(in_its_way(where, mcp, "tools/list", {})) == [READER, "create_repo"], where
        for name, expected in (
            (WRITER, "denied"),
            (READER, "ran"),
            ("create_repo", "ran"),
            ("other", -32601),
        ):
            assert outcome(in_its_way(where, mcp, "tools/call", {"name": name})) == expected, where
    assert {params["name"] for params in listing.heard("tools/call")} == {READER, "create_repo"}


def test_each_page_of_a_list_is_filtered(listing):
    listing.say(
        [tool("delete_a"), tool("a")],
        [tool("delete_b")],
        [tool("b"), tool("x" * 300), {"name": 3}, "no tool"],
    )
    put_rules(listing.rig, NO_DELETING)
    for where, mcp in clients_of(listing).items():
        pages = [in_its_way(where, mcp, "tools/list", {"cursor": cursor}) for cursor in ("0", "1", "2")]
        assert list(map(names_of, pages)) == [["a"], [], ["b"]], where
        assert [page["result"].get("nextCursor") for page in pages] == ["1", "2", None]


def test_a_rule_that_reads_only_denies_writing_tools_to_a_full_login_without_a_step_up(listing):
    put_rules(listing.rig, READING)
    for where, mcp in clients_of(listing).items():
        assert names_of(in_its_way(where, mcp, "tools/list", {})) == [READER]
        assert outcome(in_its_way(where, mcp, "tools/call", {"name": WRITER})) == "denied"
        assert outcome(in_its_way(where, mcp, "tools/call", {"name": READER})) == "ran"


def test_rules_come_before_scope(listing):
    listing.oauth.login(
        None, "alice", "secret", "read", scope="forgejo:read"
    )  # a writing tool would lead to a step-up
    listing.pool = McpClient(listing.rig.url + "/mcp", listing.oauth.tokens["access_token"])
    assert listing.pool.post(request("tools/call", {"name": WRITER})).status == 403
    put_rules(listing.rig, NO_DELETING)
    answer = listing.pool.post(request("tools/call", {"name": WRITER}))
    assert answer.status == 200 and outcome(answer.json()) == "denied"
    assert listing.pool.post(request("tools/call", {"name": "create_repo"})).status == 403


def test_whom_no_rule_matches_may_call_nothing(listing):
    put_rules(listing.rig, {"users": ["bob"]}, {"groups": ["staff"]}, {"clients": ["https://claude.ai/*"]})
    for where, mcp in clients_of(listing).items():
        assert names_of(in_its_way(where, mcp, "tools/list", {})) == []
        assert outcome(in_its_way(where, mcp, "tools/call", {"name": READER})) == "denied"
        assert in_its_way(where, mcp, "prompts/list", {})["error"]["code"] == -32601
    assert listing.heard("tools/call") == [] and listing.heard("prompts/list") == []


def test_the_first_rule_that_matches_user_and_client_decides(listing):
    client_id = listing.oauth.client_id
    put_rules(
        listing.rig,
        {"users": ["id:999"]},
        {"users": ["ALICE"], "clients": [client_id], **NO_DELETING},
        NOTHING,
    )
    assert called(listing.pool, "create_repo") == "ran" and called(listing.pool, WRITER) == "refused"
    put_rules(listing.rig, {"users": ["alice"], "clients": [client_id[:-1]]}, NOTHING)
    assert called(listing.pool, "create_repo") == "refused"


def test_a_name_in_another_spelling_is_another_name(listing):
    put_rules(listing.rig, NO_DELETING)
    listing.say([tool(WRITER), tool("Delete_repo"), tool("create_repo")])
    mcp = listing.session()
    names = (WRITER, "delete_REPO", " " + WRITER, WRITER.upper(), "Delete_repo", ["delete_repo"], None)
    outcomes = [called(mcp, name) for name in names]
    assert outcomes == ["refused", "refused", -32601, -32601, "ran", -32602, -32602]
    assert [params["name"] for params in listing.heard("tools/call")] == ["Delete_repo"]


def test_a_child_that_renames_its_tools_gains_nothing(listing):
    put_rules(listing.rig, {"allow": ["create_*"]})
    mcp = listing.session()
    stream = mcp.open_stream()
    assert called(mcp, "create_repo") == "ran"
    listing.say([tool("make_repo"), tool(READER, True)])
    mcp.notify("notifications/poke")
    assert stream.next(15).data["method"] == "notifications/tools/list_changed"
    assert [called(mcp, name) for name in ("create_repo", "make_repo", READER)] == [
        -32601,
        "refused",
        "refused",
    ]
    assert mcp.list_tools() == []
    stream.close()


def test_a_task_of_a_denied_tool_cannot_be_changed(listing):
    mcp = listing.session()
    for name in (WRITER, "create_repo"):
        assert called(mcp, name, task={}) == "ran"
    put_rules(listing.rig, NO_DELETING)
    for method in ("tasks/cancel", "tasks/update"):
        denied, done, unknown = (
            mcp.post(request(method, {"taskId": f"task of {name}"})).json()
            for name in (WRITER, "create_repo", "x")
        )
        assert denied["error"]["code"] == unknown["error"]["code"] == -32601 and done["result"] == {
            "did": method
        }


def test_the_mirrored_headers_of_a_denied_tool_are_not_told(listing):
    schema = {"type": "object", "properties": {"owner": {"type": "string", "x-mcp-header": "Owner"}}}
    listing.say([{**tool(WRITER), "inputSchema": schema}, {**tool("create_repo"), "inputSchema": schema}])
    for rule in (NO_DELETING, {"users": ["bob"]}):
        put_rules(listing.rig, rule)
        modern = connect(listing.rig, oauth=listing.oauth)
        answer = in_its_way("modern", modern, "tools/call", {"name": WRITER, "arguments": {"owner": "x"}})
        assert outcome(answer) == "denied"
    put_rules(listing.rig, EVERYBODY)
    answer = in_its_way("modern", modern, "tools/call", {"name": WRITER, "arguments": {"owner": "x"}})
    assert answer["error"]["code"] == -32020


# -- other methods


@pytest.mark.parametrize(
    "rule, denied, served",
    [
        (
            {"resources": False},
            (
                "resources/list",
                "resources/templates/list",
                "resources/read",
                "resources/subscribe",
                "an/extension",
            ),
            ("prompts/list", "prompts/get", "tasks/list", "logging/setLevel"),
        ),
        (
            {"prompts": False},
            ("prompts/list", "prompts/get", "x"),
            ("resources/list", "resources/subscribe", "tools/list"),
        ),
        ({"allow": ["*"]}, ("prompts/list", "resources/read", "completion/complete"), ("tasks/get",)),
        ({}, ("tools/delete", "Tools/Call", "tasks/cancel"), ("completion/complete", "resources/read")),
    ],
)
def test_a_method_that_the_rule_leaves_out_is_not_served(listing, rule, denied, served):
    put_rules(listing.rig, rule)
    mcp = listing.session()
    for method in denied:
        answer = mcp.post(request(method, {"uri": "x", "name": "x"})).json()
        assert answer["error"]["code"] == -32601, method
        assert listing.heard(method) == []
    for method in served:
        assert "result" in mcp.post(request(method, {"uri": "x", "name": "x"})).json(), method
    modern = connect(listing.rig, oauth=listing.oauth)
    for method in denied:
        if method not in ("resources/subscribe", "logging/setLevel"):
            assert refused(modern, method, {"uri": "x", "name": "x"})[:2] == (404, -32601)


@pytest.mark.parametrize(
    "params, served",
    [
        ({"ref": {"type": "ref/prompt", "name": "x"}}, True),
        ({"ref": {"type": "ref/resource", "uri": "x"}}, False),
        ({"ref": {"type": "ref/prompt"}, "Ref": {"type": "ref/resource"}}, False),
        ({"ref": {"type": "ref/prompt", "TYPE": "ref/resource"}}, False),
        ({"ref": "ref/prompt"}, False),
    ],
)
def test_what_completes_a_resource_goes_with_the_resources(listing, params, served):
    put_rules(listing.rig, {"resources": False})
    answer = listing.pool.post(request("completion/complete", params)).json()
    assert ("result" in answer) is served


def test_a_client_is_told_only_of_capabilities_that_it_may_use(rig):
    oauth = rig.login()
    for rule, gone in (
        ({"prompts": False}, {"prompts"}),
        ({"resources": False}, {"resources"}),
        ({"allow": ["*"]}, {"prompts", "resources", "completions"}),
    ):
        put_rules(rig)
        before = _capabilities(rig, oauth)
        put_rules(rig, rule)
        after = _capabilities(rig, oauth)
        for full, left in zip(before, after, strict=True):
            assert {"tools", "prompts", "resources"} <= set(full) and set(full) - set(left) == gone & set(
                full
            )


def _capabilities(rig, oauth):
    """What initialize and server/discover say."""
    legacy = McpClient(rig.url + "/mcp", oauth.tokens["access_token"])
    return [
        legacy.initialize()["capabilities"],
        connect(rig, oauth=oauth).request("server/discover")["capabilities"],
    ]


# -- rules that change while running


def test_a_running_session_is_told_and_held_to_new_rules(listing):
    mcp = listing.session()
    stream = mcp.open_stream()
    assert called(mcp, WRITER) == "ran"
    put_rules(listing.rig, NO_DELETING)
    assert stream.next(15).data["method"] == "notifications/tools/list_changed"
    assert called(mcp, WRITER) == "refused" and names_of(mcp.post(request("tools/list", {})).json()) == [
        READER,
        "create_repo",
    ]
    put_rules(listing.rig)
    assert called(mcp, WRITER) == "ran"
    stream.close()


def test_a_modern_listener_is_told_of_new_rules(rig):
    with listening(connect(rig), toolsListChanged=True) as (_, stream, _):
        put_rules(rig, READING)
        assert stream.next(15).data["method"] == "notifications/tools/list_changed"
        put_rules(rig, {**READING, "deny": ["delete_*"]})
        assert stream.next(15).data["method"] == "notifications/tools/list_changed"


def test_rules_that_leave_somebody_the_same_are_no_news(listing):
    mcp = listing.session()
    stream = mcp.open_stream()
    called(mcp, READER)
    put_rules(listing.rig, {"users": ["bob"], **READING}, {**NO_DELETING})
    assert stream.next(15).data["method"] == "notifications/tools/list_changed"
    put_rules(listing.rig, {"users": ["carol"], **READING}, {**NO_DELETING})
    mcp.notify("notifications/poke")
    kinds = [stream.next(15).data["method"] for _ in range(3)]
    assert kinds == [f"notifications/{kind}/list_changed" for kind in ("prompts", "resources", "tools")]
    stream.close()


@pytest.mark.parametrize("child", [(), ("--era", "modern")])
def test_a_held_call_that_the_new_rules_deny_ends_at_its_retry(make_rig, child):
    rig = make_rig(child=child)
    modern = connect(rig, capabilities={"elicitation": {}})
    asked = call(modern, "ask_elicit")
    assert asked["resultType"] == "input_required"
    put_rules(rig, {"deny": ["ask_*"]})
    answer = call(modern, "ask_elicit", **retry_of(asked))
    assert answer["isError"] and text_of(answer) == DENIED
    put_rules(rig)
    assert (
        refused(modern, "tools/call", {"name": "ask_elicit", "arguments": {}, **retry_of(asked)})[1] == -32602
    )
    again = call(modern, "ask_elicit")
    put_rules(rig, {"deny": ["delete_*"]})
    assert not call(modern, "ask_elicit", **retry_of(again)).get("isError")


def test_subscriptions_end_with_the_right_to_resources(controlled, control):
    rig = controlled
    mcp = rig.session()
    mcp.request("resources/subscribe", {"uri": "test://note"})
    modern = connect(rig, oauth=mcp.oauth)
    wanted = {"resourceSubscriptions": ["test://note"]}
    with listening(modern, **wanted) as (honoured, stream, _):
        assert honoured == wanted
        sessions = rig.broker.sessions.all()
        assert len(sessions) == 2 and all(session.replay.subscriptions for session in sessions)
        put_rules(rig, {"resources": False})
        assert not any(session.replay.subscriptions for session in sessions)
    with listening(modern, **wanted, toolsListChanged=True) as (honoured, _, _):
        assert honoured == {"toolsListChanged": True}


def test_groups_are_those_of_the_last_refresh(make_rig):
    rig = make_rig()
    dora = rig.forgejo.add_user("dora", groups=["Acme", "Acme:trainees"])
    put_rules(rig, {"groups": ["acme:TRAINEES"], **READING}, EVERYBODY)
    mcp = rig.session("dora")
    stream = mcp.open_stream()
    assert "change_tools" not in {each["name"] for each in mcp.list_tools()}
    dora.groups.remove("Acme:trainees")
    assert "change_tools" not in {each["name"] for each in mcp.list_tools()}
    rig.broker.upstream.refresh(dora.sub)
    assert "change_tools" in {each["name"] for each in mcp.list_tools()}
    assert stream.next(15).data["method"] == "notifications/tools/list_changed"
    stream.close()


def test_sighup_takes_rules_over_and_says_what_is_doubtful(make_installation):
    installation = make_installation()
    written = installation.config.read_text()
    installation.config.write_text(
        written + '[[tool_rules]]\ngroups = ["staff"]\n[[tool_rules]]\ndeny = ["change_*"]\n'
    )
    installation.start()
    oauth = OAuthClient(installation.url, name="Test client")
    oauth.login(None, "alice", "secret", "full")
    mcp = McpClient(installation.url + "/mcp", oauth.tokens["access_token"])
    mcp.initialize()
    stream = mcp.open_stream()
    assert "change_tools" not in {each["name"] for each in mcp.list_tools()}
    assert text_of(mcp.call_tool("change_tools")) == DENIED
    installation.config.write_text(
        written
        + '[[tool_rules]]\nusers = ["alice"]\naccess = "read"\n'
        + '[[tool_rules]]\n[[tool_rules]]\nusers = ["bob"]\n'
    )
    installation.broker.process.send_signal(signal.SIGHUP)
    assert stream.next(15).data["method"] == "notifications/tools/list_changed"
    assert (
        text_of(mcp.call_tool("change_tools")) == DENIED and text_of(mcp.call_tool("create_issue")) == DENIED
    )
    assert not mcp.call_tool("get_my_user_info").get("isError")
    installation.config.write_text(written + "[[tool_rules]]\nusers = []\n")
    installation.broker.process.send_signal(signal.SIGHUP)
    while not installation.records("settings_not_reloaded"):
        time.sleep(0.02)
    assert text_of(mcp.call_tool("create_issue")) == DENIED  # what was in force stays
    (wrong,) = installation.records("settings_not_reloaded")
    assert "tool_rules: rule 1: users = []: names nobody" in str(wrong["problems"])
    problems = [record["problem"] for record in installation.records("tool_rules_doubtful")]
    assert any("rule 1 takes rights by group or login, and rule 2" in problem for problem in problems)
    assert any("rule 3 can never decide: rule 2" in problem for problem in problems)
    stream.close()


# -- no sequence of requests calls a tool that the rules deny

RULES = [
    (),
    (EVERYBODY,),
    (NO_DELETING,),
    (READING,),
    (NOTHING,),
    ({"users": ["bob"]},),
    ({"allow": ["get_*"], "deny": ["get_my*"]},),
    ({"users": ["id:9999"]}, NO_DELETING),
]
NAMES = [
    READER,
    WRITER,
    "create_repo",
    "Delete_repo",
    "delete_repo ",
    "get_my_user_info\0",
    "unlisted",
    "delete_*",
]
steps = st.lists(
    st.one_of(
        st.tuples(st.just("rules"), st.sampled_from(RULES)),
        st.tuples(
            st.just("call"),
            st.sampled_from(["session", "batch", "pool", "modern"]),
            st.lists(st.sampled_from(NAMES), min_size=1, max_size=3),
        ),
        st.tuples(st.just("tools"), st.lists(st.sampled_from(NAMES), max_size=4, unique=True)),
        st.tuples(st.just("sleep")),
    ),
    min_size=2,
    max_size=8,
)


def admitted(rules, listed, name):
    """Whether alice may call a tool by these rules, spelled out anew."""
    if not rules:
        return True
    for rule in rules:
        if rule.get("users") in (["bob"], ["id:9999"]):
            continue
        globs = lambda key: any(fnmatch.fnmatchcase(name, glob) for glob in rule.get(key, []))  # noqa: E731
        reads = name == READER or "access" not in rule
        return name in listed and reads and not globs("deny") and ("allow" not in rule or globs("allow"))
    return False


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A Listing for a whole module, with its clients in every way of asking."""
    folder = tmp_path_factory.mktemp("rules")
    before = mcp_client.judge
    mcp_client.judge = None
    rigs = []

    def make_rig(**arguments):
        rigs.append(Rig(folder, **arguments))
        return rigs[0]

    made = Listing(make_rig, folder, "full")
    yield made, clients_of(made)
    rigs[0].close()
    mcp_client.judge = before


@settings(max_examples=60)
@given(steps)
def test_no_sequence_of_requests_calls_a_tool_that_the_rules_deny(shared, sequence):
    listing, clients = shared
    rules = ()
    listed = [READER, WRITER, "create_repo"]
    put_rules(listing.rig)
    _list(listing, clients, listed)
    for step in sequence:
        if step[0] == "rules":
            rules = step[1]
            put_rules(listing.rig, *rules)
        elif step[0] == "tools":
            listed = step[1]
            _list(listing, clients, listed)
        elif step[0] == "sleep":
            for session in listing.rig.broker.sessions.all():
                session.backends.sleep("idle")
        else:
            _, where, names = step
            before = len(listing.heard("tools/call"))
            shown = names_of(in_its_way(where, clients[where], "tools/list", {}))
            assert shown == [name for name in listed if admitted(rules, listed, name)]
            for name in names:
                in_its_way(where, clients[where], "tools/call", {"name": name})
            ran = [params["name"] for params in listing.heard("tools/call")[before:]]
            assert ran == [name for name in names if admitted(rules, listed, name)]


def _list(listing, clients, names):
    """The child has these tools from now on, and says so to whom it serves."""
    listing.say([tool(name, name == READER) for name in names])
    for mcp in clients.values():
        if not mcp.is_modern and mcp.session_id:
            mcp.notify("notifications/poke")
    for session in listing.rig.broker.sessions.all():
        if session.backend and session.backend.is_alive:
            session.backend.on_line(b'{"jsonrpc":"2.0","method":"notifications/tools/list_changed"}')


@pytest.fixture(scope="module")
def shared_go(shared, real_part, tmp_path_factory):
    rig = Rig(tmp_path_factory.mktemp("go"), forgejo_mcp_binary=real_part("mcp-go-child"))
    oauth = rig.login()
    token = oauth.tokens["access_token"]
    clients = {
        "session": McpClient(rig.url + "/mcp", token),
        "batch": McpClient(rig.url + "/mcp", token, protocol="2025-03-26"),
        "pool": McpClient(rig.url + "/mcp", token),
        "modern": connect(rig, oauth=oauth),
    }
    for where in ("session", "batch"):
        clients[where].initialize()
    yield rig, clients
    rig.close()


@pytest.mark.real("mcp-go-child")
@settings(max_examples=100)
@given(
    where=st.sampled_from(["session", "batch", "pool", "modern"]),
    name=st.sampled_from(
        [WRITER, WRITER.upper(), "Delete_repo", WRITER + "\0", " " + WRITER, "delete\u005frepo", READER]
    ),
    rule=st.sampled_from([NO_DELETING, READING, {"allow": ["get_*"]}, {"users": ["bob"], "allow": ["*"]}]),
    twin=st.sampled_from(["", "Name", "NAME", "n_ame", "arguments"]),
)
def test_no_spelling_makes_a_child_on_mcp_go_run_a_denied_tool(shared_go, where, name, rule, twin):
    rig, clients = shared_go
    put_rules(rig, rule)
    params = {"name": name, **({twin: WRITER if twin != "arguments" else {"name": WRITER}} if twin else {})}
    params |= {"_meta": MODERN_META} if where == "modern" else {}
    headers = (
        {"Mcp-Method": "tools/call", "Mcp-Name": header_value(name), "MCP-Protocol-Version": MODERN}
        if where == "modern"
        else {}
    )
    body = request("tools/call", params, "call")
    answer = clients[where].post(
        [body, request("tools/list", {}, "list")] if where == "batch" else body, headers=headers
    )
    assert "RAN " + WRITER not in answer.text and '"name":"' + WRITER not in answer.text
    may_read = rule is not None and name == READER and twin in ("", "arguments") and "users" not in rule
    assert ("RAN " + READER in answer.text) is may_read


def test_the_account_page_says_what_the_rules_leave_to_each_application(rig):
    editor = rig.login(name="My <b>editor</b>")
    rig.login(name="My reader")
    _, page = open_account(rig)
    assert "What the operator allows" not in page.words
    put_rules(rig, {"clients": [editor.client_id], "deny": ["delete_*"]}, {"users": ["ALICE"], **READING})
    _, page = open_account(rig)
    assert "My <b>editor</b> : All tools, but none named delete_*." in page.words
    assert "My reader : Tools that only read." in page.words


# -- rules that change while nobody looks


def rules_of(rig, *tables):
    """Other rules in the file, taken over by a start."""
    rig.restart()
    rig.broker.settings.tool_rules = fjmcp_broker.KINDS["tool_rules"](list(tables))


def resumed(mcp):
    """The same session as a new client process sees it, and what it is told of lists."""
    again = McpClient(mcp.url, mcp.token, session_id=mcp.session_id)
    told = []
    again.on_notification = lambda method, params: told.append(method)
    return again, told


@pytest.mark.parametrize(
    "first, then", [((), (NO_DELETING,)), ((NO_DELETING,), ()), ((READING,), (EVERYBODY,))]
)
def test_a_session_is_told_of_rules_that_changed_across_a_restart(rig, first, then):
    rig.broker.settings.tool_rules = fjmcp_broker.KINDS["tool_rules"](list(first))
    mcp = rig.session()
    mcp.list_tools()
    rules_of(rig, *then)
    with resumed(mcp)[0].open_stream() as stream:
        kinds = {stream.next(15).data["method"] for _ in range(3)}
    assert kinds == {f"notifications/{kind}/list_changed" for kind in ("prompts", "resources", "tools")}


def test_a_session_that_calls_before_it_listens_is_told_once_when_it_listens(rig):
    mcp = rig.session()
    mcp.list_tools()
    rules_of(rig, NO_DELETING)
    again, told = resumed(mcp)
    again.list_tools()
    again.list_tools()
    with again.open_stream() as stream:
        told += [stream.next(15).data["method"] for _ in range(3)]
    assert sorted(told) == [
        f"notifications/{kind}/list_changed" for kind in ("prompts", "resources", "tools")
    ]


def test_a_session_is_not_told_of_rules_that_leave_it_the_same_across_a_restart(rig):
    rig.broker.settings.tool_rules = fjmcp_broker.KINDS["tool_rules"]([NO_DELETING])
    mcp = rig.session()
    mcp.list_tools()
    rules_of(rig, {"users": ["carol"], **READING}, NO_DELETING)
    again, told = resumed(mcp)
    again.list_tools()
    assert told == []
