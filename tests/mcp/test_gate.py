"""What the child reads is what the gate has read.

Spellings of members, requests in disguise, tools and methods of a login that may not write.
"""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import fjmcp_broker
from fjmcp_broker import KNOWN_META, KNOWN_PARAMS, RpcError, message_from
from rigs import mcp_client
from rigs.busy_clients import same
from rigs.client_rig import Program
from rigs.heard import INITIALIZE, Heard
from rigs.listing import READER, WRITER, Listing, called, request, tool
from rigs.mcp_client import META, MODERN, McpClient
from rigs.modern_requests import ALL_INPUT, call, connect, refused, retry_of
from rigs.processes import in_thread
from rigs.rig import Rig, json_of, text_of

MODERN_META = {META + "protocolVersion": MODERN, META + "clientCapabilities": {}}
# What lenient parsers fold into an ASCII letter, and what looks as if they did (no Go program does).
TWINS = {"k": "K\u212a", "s": "S\u017f"}
LOOKALIKES = {"i": "\u0131\u0130", "a": "\u00e4\uff41", "n": "\uff4e\u207f", "e": "\u0435", "m": "\uff2d"}


@st.composite
def spellings(draw, name, lookalikes=False):
    """`name` as a lenient parser reads it, never spelled exactly so.

    With `lookalikes` also what no parser should take for it.
    """
    letters = []
    for letter in name:
        choices = (
            letter
            + letter.upper()
            + TWINS.get(letter, "")
            + (LOOKALIKES.get(letter, "") if lookalikes else "")
        )
        letters.append(draw(st.sampled_from(choices)) + draw(st.sampled_from(["", "", "", "", "", "_", "-"])))
    spelled = "".join(letters)
    return spelled if spelled != name else name.upper()


PLACES = sorted(
    [(method, name) for method, names in KNOWN_PARAMS.items() for name in names._exact]
    + [
        ("completion/complete", "_meta"),
        ("an/extension", "_meta"),
        ("notifications/roots/list_changed", "_meta"),
    ]
)
disguises = st.sampled_from(PLACES).flatmap(lambda place: st.tuples(st.just(place[0]), spellings(place[1])))
meta_disguises = st.sampled_from(sorted(KNOWN_META._exact)).flatmap(spellings)


def notification(method, params):
    return {"jsonrpc": "2.0", "method": method, "params": params}


# -- The function itself


def taken(method, params):
    """What becomes of a message: "refused", "dropped", or its params."""
    message = notification(method, params) if method.startswith("notifications/") else request(method, params)
    try:
        found = message_from(message)
    except RpcError as error:
        assert (error.status, error.code) == (400, -32602)
        return "refused"
    return "dropped" if found is None else found.params


@settings(max_examples=300)
@given(disguise=disguises)
@example(("tools/call", "Name"))
@example(("tools/call", "argument\u017f"))
@example(("tasks/cancel", "tas\u212aId"))
@example(("tasks/cancel", "task_id"))
@example(("notifications/cancelled", "request-id"))
@example(("logging/setLevel", "LEVEL"))
@example(("an/extension", "_META"))
def test_a_member_that_a_lenient_parser_takes_for_a_known_one_is_refused_and_a_notification_with_it_dropped(
    disguise,
):
    method, name = disguise
    if name in KNOWN_PARAMS.get(method, fjmcp_broker.ANY_PARAMS)._exact:
        return
    expected = "dropped" if method.startswith("notifications/") else "refused"
    assert taken(method, {name: {}}) == expected


@settings(max_examples=200)
@given(name=meta_disguises, place=st.sampled_from(PLACES))
@example("progress_token", ("tools/call", "name"))
@example(META.upper() + "protocolVersion", ("an/extension", "_meta"))
@example(META + "logLEVEL", ("tools/call", "name"))
def test_so_is_a_member_of_meta(name, place):
    method = place[0]
    assert taken(method, {"_meta": {name: 1}}) == (
        "dropped" if method.startswith("notifications/") else "refused"
    )


names = st.text(max_size=8) | st.sampled_from(["Name", "_meta", "progress_token", "ARGUMENTS", "x"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)


@given(inner=st.dictionaries(names, values, min_size=1, max_size=4))
def test_what_is_in_arguments_and_capabilities_passes_as_it_is_whatever_its_names(inner):
    assert taken("tools/call", {"name": "x", "arguments": inner}) == {"name": "x", "arguments": inner}
    params = {"protocolVersion": "2025-11-25", "capabilities": {"experimental": inner}}
    assert taken("initialize", params) == params
    own = {"_meta": {"com.example/own": inner, "progressToken": "p"}, "name": "x", "somethingElse": inner}
    assert taken("tools/call", own) == own


@pytest.mark.parametrize("nothing", [None, []])
def test_null_and_an_empty_list_for_an_object_are_absent(nothing):
    assert message_from(request("tools/list", nothing)).params is None
    assert message_from(notification("notifications/initialized", nothing)).params is None
    assert taken("tools/call", {"name": "x", "arguments": nothing, "_meta": nothing}) == {"name": "x"}
    assert taken("initialize", {"protocolVersion": "v", "capabilities": nothing}) == {
        "protocolVersion": "v",
        "capabilities": {},
    }
    assert taken("an/extension", {"arguments": nothing, "_meta": nothing}) == {"arguments": nothing}


@pytest.mark.parametrize(
    "method", ["tools/call", "initialize", "Notifications/initialized", "notifications", "ping", ""]
)
def test_without_an_id_only_a_notification_is_one(method):
    assert message_from({"jsonrpc": "2.0", "method": method, "params": {"name": "x"}}) is None


@pytest.mark.parametrize(
    "text, value",
    [
        (r'{"a":"\ud800"}', {"a": "\ufffd"}),
        (r'{"a":"\udc00\ud800x"}', {"a": "\ufffd\ufffdx"}),
        (r'{"\uD83D":1}', {"\ufffd": 1}),
        (r'{"a":"\ud83d\ude00 \\ud800"}', {"a": "\U0001f600 \\ud800"}),
    ],
)
def test_a_surrogate_without_its_partner_is_read_as_go_reads_it(text, value):
    assert fjmcp_broker.read_json(text.encode()) == value
    assert fjmcp_broker.read_child_json(text.encode()) == value


def test_two_names_that_differ_in_a_lone_surrogate_only_are_one_name_twice():
    with pytest.raises(ValueError, match="twice"):
        fjmcp_broker.read_json(rb'{"\ud800":1,"\ud801":2}')


def test_members_in_another_order_and_whole_numbers_with_a_fraction_mean_the_same():
    assert fjmcp_broker.canonical({"a": 1.0, "b": {"c": 2, "d": [3]}}) == fjmcp_broker.canonical(
        {"b": {"d": [3.0], "c": 2}, "a": 1}
    )
    different = ({"a": 1}, {"a": 1.5}, {"a": "1"}, {"a": True}, {"a": [1, 2]}, {"a": [2, 1]}, {"a": None}, {})
    assert len({fjmcp_broker.canonical(each) for each in different}) == len(different)


@pytest.mark.parametrize(
    "hints, reads", [((True,), True), ((True, True), True), ((True, False), False), ((False, True), False)]
)
def test_of_two_tools_of_one_name_both_must_read(hints, reads):
    tools = {}
    page = [{"name": "x", "annotations": {"readOnlyHint": hint}} for hint in hints]
    fjmcp_broker.add_tools(tools, page, fjmcp_broker.MAX_LISTING)
    assert tools["x"].reads is reads


def test_what_is_kept_of_a_childs_list_is_bounded():
    tools = {}
    page = [{"name": f"{n:0256}", "annotations": {"readOnlyHint": True}} for n in range(10_000)]
    marked = {"properties": {"x" * 100_000: {"x-mcp-header": "H"}}}
    assert fjmcp_broker.add_tools(tools, [*page, tool("last")], fjmcp_broker.MAX_LISTING) <= 0
    assert 100 < len(tools) < 1000 and "last" not in tools
    tools = {}
    assert (
        fjmcp_broker.add_tools(tools, [{**tool(str(n)), "inputSchema": marked} for n in range(9)], 1 << 20)
        <= 0
    )
    assert len(tools) == 2


# -- A child on mcp-go


@pytest.fixture(scope="module")
def go_reader(real_part):
    """A function from a message to what Go's encoding/json makes of it."""
    with Program([real_part("mcp-go-child"), "read"]) as process:

        def read(message):
            process.tell(fjmcp_broker.dump(message).decode())
            return process.value()

        yield read


DECISIVE = ("name", "uri", "level", "cursor", "taskId", "requestId", "progressToken", "protocolVersion")


@pytest.mark.real("mcp-go-child")
@settings(max_examples=300)
@given(data=st.data(), method=st.sampled_from(sorted(KNOWN_PARAMS)), in_meta=st.booleans())
def test_go_reads_in_what_passes_the_gate_what_the_gate_read(go_reader, data, method, in_meta):
    known = sorted(KNOWN_META._exact if in_meta else KNOWN_PARAMS[method]._exact - {"_meta"})
    members = {name: "the gate's" for name in known if data.draw(st.booleans())}
    for name in data.draw(
        st.lists(st.sampled_from(known).flatmap(lambda name: spellings(name, True)), max_size=2)
    ):
        members.setdefault(name, "another")
    params = taken(method, {"_meta": members} if in_meta else members)
    if params in ("refused", "dropped"):
        return
    seen = go_reader(request(method, params))["params"]
    if in_meta:
        for name in (
            "progressToken",
            META + "protocolVersion",
            META + "clientCapabilities",
            META + "logLevel",
        ):
            assert seen["_meta"][name] == (params or {}).get("_meta", {}).get(name)
    else:
        for name in set(DECISIVE) & set(known):
            assert seen[name] == params.get(name)


@pytest.mark.real("mcp-go-child")
def test_go_folds_what_the_gate_folds(go_reader):
    for name in ("Name", "NAME", "nAmE"):
        assert go_reader({"params": {"name": "gate", name: "twin"}})["params"]["name"] == "twin"
    for method, name in (("tasks/cancel", "tas\u212aId"), ("tools/call", "argument\u017f")):
        assert "twin" in go_reader({"params": {name: "twin"}})["params"].values()
        assert taken(method, {name: "twin"}) == "refused"


@pytest.fixture(scope="module")
def shared(real_part, tmp_path_factory):
    rig = Rig(tmp_path_factory.mktemp("go"), forgejo_mcp_binary=real_part("mcp-go-child"))
    yield rig
    rig.close()


@pytest.fixture(scope="module")
def go_clients(shared):
    """{place: McpClient} of one read-only login.

    A session, one of the revision with batches, none, and the modern era.
    """
    oauth = shared.login(access="read")
    token = oauth.tokens["access_token"]
    made = {
        "session": McpClient(shared.url + "/mcp", token),
        "batch": McpClient(shared.url + "/mcp", token, protocol="2025-03-26"),
    }
    for mcp in made.values():
        mcp.initialize()
    return {**made, "pool": McpClient(shared.url + "/mcp", token), "modern": connect(shared, oauth=oauth)}


def headers_of(place):
    return (
        {"Mcp-Method": "tools/call", "Mcp-Name": READER, "MCP-Protocol-Version": MODERN}
        if place == "modern"
        else {}
    )


@pytest.mark.real("mcp-go-child")
@settings(max_examples=150)
@given(
    place=st.sampled_from(["session", "batch", "pool", "modern"]),
    twin=spellings("name"),
    first=st.booleans(),
    escaped=st.booleans(),
)
def test_no_spelling_makes_a_read_only_login_run_a_writing_tool(
    shared, go_clients, place, twin, first, escaped
):
    params = {twin: WRITER, "name": READER} if first else {"name": READER, twin: WRITER}
    params |= {"arguments": {}} | ({"_meta": MODERN_META} if place == "modern" else {})
    body = request("tools/call", params)
    text = json.dumps(
        [body, request("tools/list", {}, 2)] if place == "batch" else body, ensure_ascii=escaped
    )
    answer = go_clients[place].post(text.encode(), headers=headers_of(place))
    assert (answer.status, answer.json()["error"]["code"]) == (400, -32602) and "RAN" not in answer.text


@pytest.mark.real("mcp-go-child")
@pytest.mark.parametrize("place", ["session", "batch", "pool", "modern"])
def test_the_reading_tool_runs_in_a_child_on_mcp_go_and_the_writing_one_does_not(shared, go_clients, place):
    assert text_of(go_clients[place].call_tool(READER)) == "RAN " + READER
    assert go_clients[place].call_tool(WRITER)["isError"]
    for name in (WRITER.upper(), READER.upper(), " " + READER, READER + "\0", "get_another"):
        if place == "modern":
            assert refused_or_error(go_clients[place], name)
        else:
            answer = go_clients[place].post(request("tools/call", {"name": name}))
            assert "RAN" not in answer.text


def refused_or_error(mcp, name):
    try:
        return mcp.call_tool(name)["isError"]
    except mcp_client.RpcError as error:
        return error.code == -32601


# -- What reaches the child


@settings(max_examples=60)
@given(data=st.data())
def test_a_notification_in_disguise_reaches_no_child(shared_session, data):
    mcp, control = shared_session
    method = data.draw(st.sampled_from(["notifications/cancelled", "notifications/progress"]))
    known = (
        {"requestId": 1, "reason": "x"}
        if method.endswith("cancelled")
        else {"progressToken": 1, "progress": 1}
    )
    twin = data.draw(st.sampled_from(sorted(known) + ["_meta"]).flatmap(spellings))
    heard = Heard(mcp, control)
    assert mcp.post(notification(method, {**known, twin: 2})).status == 202
    assert mcp.post(notification("tools/call", {"name": "crash"})).status == 202
    assert heard.methods() == []


@pytest.fixture(scope="module")
def shared_session(tmp_path_factory):
    from rigs.child_control import ChildControl

    folder = tmp_path_factory.mktemp("shared")
    with ChildControl(str(folder / "control")) as control:
        rig = Rig(folder, child=("--control", control.path))
        yield rig.session(), control
        rig.close()


def test_what_is_no_disguise_goes_on_with_an_envelope_of_our_own(controlled, control):
    mcp = controlled.session()
    heard = Heard(mcp, control)
    body = {**request("prompts/list", {}), "Method": "tools/call", "PARAMS": {"name": "crash"}, "more": 1}
    assert mcp.post(body).json()["result"]["prompts"]
    mcp.notify("notifications/roots/list_changed")
    mcp.notify("notifications/progress", {"progressToken": 1, "progress": 1, "percent": 5})
    assert heard.methods() == ["prompts/list", "notifications/roots/list_changed", "notifications/progress"]


@given(twin=st.sampled_from(["protocolVersion", "capabilities", "clientInfo", "_meta"]).flatmap(spellings))
@settings(max_examples=30)
def test_initialize_in_disguise_starts_nothing(shared_session, twin):
    mcp, control = shared_session
    before = len(control.children)
    answer = mcp.post({**INITIALIZE, "params": {**INITIALIZE["params"], twin: {}}})
    assert (answer.status, answer.json()["error"]["code"]) == (400, -32602)
    assert "Mcp-Session-Id" not in answer.headers and len(control.children) == before


def test_of_a_batch_with_one_message_in_disguise_nothing_runs(controlled, control):
    mcp = controlled.session(protocol="2025-03-26")
    heard = Heard(mcp, control)
    answer = mcp.post([request("prompts/list", {}), request("tools/call", {"name": "x", "Name": "y"}, 2)])
    assert (answer.status, answer.json()["error"]["code"]) == (400, -32602)
    answer = mcp.post([request("prompts/list", {}), notification("notifications/progress", {"PROGRESS": 1})])
    assert answer.status == 200 and heard.methods() == ["prompts/list"]


def test_lone_surrogates_go_on_as_replacement_characters_in_both_directions(rig):
    mcp = rig.session()
    arguments = rb'{"value":{"a":"\ud800!"}}'
    body = (
        b'{"jsonrpc":"2.0","id":"s","method":"tools/call","params":{"name":"get_back","arguments":'
        + arguments
        + b"}}"
    )
    answer = mcp.post(body)
    assert (
        answer.status == 200
        and "\\ud800" not in answer.text
        and "\\ufffd!" in answer.text.replace("\ufffd", "\\ufffd")
    )


def test_a_childs_lone_surrogate_reaches_no_client(controlled, control):
    mcp = controlled.session()
    stream = mcp.open_stream()
    control.raw(
        rb'{"jsonrpc":"2.0","method":"notifications/message","params":{"level":"info","data":"a\ud800b"}}'
        + b"\n"
    )
    assert stream.next(15).data["params"]["data"] == "a\ufffdb"
    stream.close()


def test_an_answer_with_a_lone_surrogate_reaches_its_client_without_it(controlled, control):
    mcp = controlled.session()
    join = in_thread(same(mcp).post, request("tools/call", {"name": "silent"}))
    number = control.wait_event(event="call", tool="silent")["id"]
    said = rb'"result":{"content":[{"type":"text","text":"\ud800!\ud83d\ude00"}]}}'
    control.raw(b'{"jsonrpc":"2.0","id":%d,%s\n' % (number, said))
    answer = join()
    assert text_of(answer.messages()[-1]["result"]) == "\ufffd!\U0001f600" and "ud800" not in answer.text


# -- Null and [] where an object is due


@pytest.mark.parametrize("nothing", [None, []])
def test_null_and_empty_lists_are_taken_as_absent_in_sessions_pools_batches_and_the_modern_era(rig, nothing):
    empty = {"name": READER, "arguments": nothing, "_meta": nothing}
    mcp = rig.session(protocol="2025-03-26")
    pool = McpClient(rig.url + "/mcp", mcp.token)
    for client in (mcp, pool):
        assert "tools" in client.post(request("tools/list", nothing)).json()["result"]
        assert "alice" in client.post(request("tools/call", empty)).text
        assert client.post(notification("notifications/initialized", nothing)).status == 202
    answers = mcp.post([request("tools/list", nothing), request("tools/call", empty, 2)]).json()
    assert [set(answer) for answer in answers] == [{"jsonrpc", "id", "result"}] * 2
    opened = mcp.post({**INITIALIZE, "params": {**INITIALIZE["params"], "capabilities": nothing}})
    assert opened.status == 200
    session = McpClient(rig.url + "/mcp", mcp.token, session_id=opened.headers["Mcp-Session-Id"])
    assert json_of(session.call_tool("get_initialize"))["params"]["capabilities"] == {}
    modern = connect(rig, oauth=mcp.oauth)
    for more in (
        {"arguments": nothing},
        {"arguments": nothing, "requestState": None, "inputResponses": nothing},
    ):
        assert "alice" in text_of(modern.request("tools/call", {"name": READER, **more}))


def test_an_optional_member_of_the_metadata_may_be_null(rig):
    modern = connect(rig)
    meta = {**MODERN_META, META + "logLevel": None, META + "clientInfo": None}
    assert modern.post(request("tools/list", {"_meta": meta})).status == 200


def test_a_list_that_is_not_empty_is_no_object(rig):
    mcp = rig.session()
    assert mcp.post(request("tools/list", [1])).json()["error"]["code"] == -32600
    opening = {**INITIALIZE, "params": {**INITIALIZE["params"], "capabilities": [1]}}
    assert mcp.post(opening).json()["error"]["code"] == -32602


@pytest.mark.parametrize("change", ["order", "arguments absent", "arguments null", "number"])
def test_a_retry_that_means_the_same_goes_on_with_its_call_however_it_is_written(rig, change):
    modern = connect(rig, capabilities=ALL_INPUT)
    modern.auto = None
    given = {"message": "m", "count": 1} if change in ("order", "number") else {}
    asked = call(modern, "ask_elicit", given)
    arguments = {"order": {"count": 1, "message": "m"}, "number": {"message": "m", "count": 1.0}}.get(change)
    params = {**retry_of(asked), "name": "ask_elicit"}
    params |= {} if change == "arguments absent" else {"arguments": arguments}
    assert modern.request("tools/call", params)["resultType"] == "complete"


def test_a_retry_that_means_something_else_is_refused(rig):
    modern = connect(rig, capabilities=ALL_INPUT)
    modern.auto = None
    asked = call(modern, "ask_elicit", {"message": "m"})
    params = {"name": "ask_elicit", "arguments": {"message": "n"}, **retry_of(asked)}
    assert refused(modern, "tools/call", params)[1] == -32602


# -- Ping


def test_a_ping_wakes_no_child_and_keeps_none_awake(controlled):
    mcp = controlled.session(protocol="2025-03-26")
    pool = McpClient(controlled.url + "/mcp", mcp.token)
    store, sub = controlled.broker.store, controlled.broker.sessions.all()[0].sub
    controlled.clock.advance(1000)
    controlled.tick()
    controlled.log.wait("child_stopped")
    used = store.sessions_of(sub)
    for _ in range(2):
        controlled.clock.advance(100)
        assert mcp.request("ping") == {} and pool.request("ping") == {}
        assert mcp.post([request("ping", None), request("ping", {}, 2)]).json() == [
            {"jsonrpc": "2.0", "id": 1, "result": {}},
            {"jsonrpc": "2.0", "id": 2, "result": {}},
        ]
        controlled.tick()
    assert len(controlled.log.named("child_started")) == 1 and store.sessions_of(sub) == used


def test_a_ping_to_a_session_that_ended_is_404(rig):
    mcp = rig.session()
    mcp.delete()
    answer = mcp.post(request("ping", None))
    assert (answer.status, answer.json()["error"]["code"]) == (404, -32001)


def test_a_ping_to_a_session_on_file_finds_it_after_a_restart(rig):
    mcp = rig.session()
    rig.restart()
    assert mcp.request("ping") == {} and not rig.log.named("child_started")
    rig.clock.advance(91 * 86400)
    rig.tick()
    assert mcp.post(request("ping", None)).status in (401, 404)


# -- Tools and methods of a login that may not write


@pytest.fixture
def listing(make_rig, tmp_path, monkeypatch):
    monkeypatch.setattr(mcp_client, "judge", None)  # its results are not what a schema wants
    return Listing(make_rig, tmp_path)


@pytest.mark.parametrize("where", ["session", "pool"])
def test_a_tool_runs_for_a_reader_only_if_the_child_lists_it_under_exactly_that_name(listing, where):
    listing.say([tool(READER), tool("GET_twin"), tool("get_twin", True)], [tool("on_page_two", True)])
    mcp = listing.session() if where == "session" else listing.pool
    names = (
        READER,
        "get_twin",
        "on_page_two",
        "GET_twin",
        "Get_twin",
        "get_unlisted",
        " get_twin",
        "get_twin\n",
    )
    outcomes = [called(mcp, name) for name in names]
    assert outcomes == ["ran", "ran", "ran", "refused", "refused", -32601, "refused", -32601]
    assert [params["name"] for params in listing.heard("tools/call")] == list(names[:3])
    assert len(listing.heard("tools/list")) == 2  # each page once, whatever number of calls


def test_a_tool_that_is_not_listed_is_no_such_method_for_a_modern_reader(listing):
    modern = connect(listing.rig, oauth=listing.oauth)
    assert refused(modern, "tools/call", {"name": "get_unlisted", "arguments": {}})[:2] == (404, -32601)
    assert text_of(modern.call_tool(READER)) == "RAN " + READER


def test_in_a_batch_each_call_is_judged_by_itself(listing):
    mcp = listing.session("2025-03-26")
    names = (READER, "get_unlisted", WRITER)
    answers = mcp.post([request("tools/call", {"name": name}, name) for name in names]).json()
    found = {answer["id"]: answer for answer in answers}
    assert "RAN" in str(found[READER]) and found["get_unlisted"]["error"]["code"] == -32601
    assert found[WRITER]["result"]["isError"] and [p["name"] for p in listing.heard("tools/call")] == [READER]


def test_a_list_that_changed_is_asked_for_again(listing):
    listing.say([tool("hinted", True)])
    mcp = listing.session()
    stream = mcp.open_stream()
    assert called(mcp, "hinted") == "ran"
    listing.say([tool("hinted", False), tool("get_new")])
    assert called(mcp, "get_new") == -32601
    mcp.notify("notifications/poke")
    assert stream.next(15).data["method"] == "notifications/tools/list_changed"
    assert called(mcp, "hinted") == "refused" and called(mcp, "get_new") == "ran"
    stream.close()


def test_another_child_is_asked_for_its_own_list(listing):
    listing.say([tool("hinted", True)])
    mcp = listing.session()
    assert called(mcp, "hinted") == "ran"
    listing.say([tool("hinted", False)])
    listing.rig.clock.advance(1000)
    listing.rig.tick()
    listing.rig.log.wait("child_stopped")
    assert called(mcp, "hinted") == "refused"


def test_a_call_is_judged_anew_when_the_list_changes_before_it_is_sent(listing, monkeypatch):
    listing.say([tool("hinted", True)])
    mcp = listing.session()
    submit = fjmcp_broker.Session.submit

    def late(session, calls):
        monkeypatch.setattr(fjmcp_broker.Session, "submit", submit)
        listing.say([tool("hinted", False)])
        session.backend.on_line(b'{"jsonrpc":"2.0","method":"notifications/tools/list_changed"}')
        return submit(session, calls)

    monkeypatch.setattr(fjmcp_broker.Session, "submit", late)
    assert called(mcp, "hinted") == "refused" and listing.heard("tools/call") == []


def test_a_list_that_never_stands_still_lets_nothing_through(listing, monkeypatch):
    mcp = listing.session()
    submit = fjmcp_broker.Session.submit

    def late(session, calls):
        session.backend.on_line(b'{"jsonrpc":"2.0","method":"notifications/tools/list_changed"}')
        return submit(session, calls)

    monkeypatch.setattr(fjmcp_broker.Session, "submit", late)
    answer = mcp.post(request("tools/call", {"name": READER}))
    assert answer.status == 503 and answer.json()["error"]["data"]["retryable"]
    assert listing.heard("tools/call") == []


def test_a_child_that_does_not_say_its_tools_lets_nothing_through(listing, monkeypatch):
    listing.say()  # before the session: a child that has said its tools is not asked again
    monkeypatch.setattr(fjmcp_broker, "QUESTION_GRACE", 0.2)
    mcp = listing.session()
    answer = mcp.post(request("tools/call", {"name": READER}))
    assert answer.status == 503 and listing.heard("tools/call") == []


@pytest.mark.parametrize(
    "method",
    ["Tools/Call", "tools/call ", "tools/delete", "tasks/cancel", "tasks/update", "x", "broker/internal"],
)
def test_a_method_that_is_not_known_to_read_is_not_served_to_a_reader(listing, method):
    session, modern = listing.session(), connect(listing.rig, oauth=listing.oauth)
    for mcp in (session, listing.pool):
        answer = mcp.post(request(method, {"name": WRITER, "taskId": "task of delete_repo"}))
        assert (answer.status, answer.json()["error"]["code"]) == (200, -32601)
    if method == method.strip():
        assert refused(modern, method, {"taskId": "x"})[:2] == (404, -32601)
    assert listing.heard(method) == []


@pytest.mark.parametrize(
    "method",
    ["prompts/list", "resources/read", "completion/complete", "tasks/get", "tasks/result", "tasks/list"],
)
def test_a_method_that_reads_is_served_to_a_reader(listing, method):
    for mcp in (listing.session(), listing.pool):
        assert mcp.post(request(method, {"uri": "x"})).json()["result"] == {"did": method}


def test_a_writer_is_served_every_method_and_every_name(listing):
    listing.oauth.login(None, "alice", "secret", "full")
    mcp = listing.session()
    assert mcp.post(request("an/extension", {})).json()["result"] == {"did": "an/extension"}
    assert called(mcp, "Anything") == "ran"


@pytest.mark.parametrize("method", ["tasks/cancel", "tasks/update"])
def test_a_task_may_be_changed_by_who_may_make_its_call(listing, method):
    writer = listing.rig.login()
    writing = McpClient(listing.rig.url + "/mcp", writer.tokens["access_token"])
    writing.initialize()
    for name in (READER, WRITER):
        assert called(writing, name, task={}) == "ran"
    writer.login(None, "alice", "secret", "read")
    reading = McpClient(writing.url, writer.tokens["access_token"], session_id=writing.session_id)
    done = {
        name: reading.post(request(method, {"taskId": "task of " + name})).json() for name in (READER, WRITER)
    }
    assert done[READER]["result"] == {"did": method} and done[WRITER]["result"]["isError"]
    assert listing.heard(method) == [{"taskId": "task of " + READER}]


@pytest.mark.parametrize("child_era", ["legacy", "modern"])
def test_what_a_child_listed_before_it_was_listened_to_decides_nothing(make_rig, child_era):
    rig = make_rig(child=("--era", child_era) if child_era == "modern" else ())
    oauth = rig.login()
    full = connect(rig, oauth=oauth)
    call(full, "get_back", {"value": {}})
    (pool,) = rig.broker.sessions.all()
    assert pool.backend.tool_list._is_learnt.wait(60)  # for the audit records, before any gate needed it
    call(full, "change_tools", {"name": "get_later"})
    oauth.login(None, "alice", "secret", "read")
    assert call(connect(rig, oauth=oauth), "get_later")["content"]


@pytest.mark.parametrize("child_era", ["legacy", "modern"])
def test_a_child_of_either_era_is_heard_when_its_list_changes_though_no_client_listens(make_rig, child_era):
    rig = make_rig(child=("--era", child_era) if child_era == "modern" else ())
    oauth = rig.login()
    full = connect(rig, oauth=oauth)
    oauth.login(None, "alice", "secret", "read")
    reader = connect(rig, oauth=oauth)
    assert refused(reader, "tools/call", {"name": "get_later", "arguments": {}})[:2] == (404, -32601)
    call(full, "change_tools", {"name": "get_later"})
    assert call(reader, "get_later")["content"]
    assert len({event["pid"] for event in rig.log.named("child_started")}) == 1
