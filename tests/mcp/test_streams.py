"""Streams: what comes on which, once each; what is resumed, who takes over, and when they end."""

import json

import pytest

import fjmcp_broker
from rigs.busy_clients import same
from rigs.heard import answer_of
from rigs.mcp_client import McpClient, StreamEnded
from rigs.processes import in_thread
from rigs.rig import text_of

SLOW = {"name": "get_slow", "arguments": {"key": "k"}}


def note(number):
    return {"jsonrpc": "2.0", "method": "notifications/message", "params": {"level": "info", "data": number}}


def numbers(stream, count):
    """The data of so many messages of a stream, in order."""
    found = []
    while len(found) < count:
        event = stream.next(15)
        if isinstance(event.data, dict) and event.data.get("method") == "notifications/message":
            found.append(event.data["params"]["data"])
    return found


def await_read(rig, control):
    """Wait until the broker has read all that the child was told to print: lines are read in order."""
    before = len(rig.log.named("stray_answer_from_child"))
    control.emit({"jsonrpc": "2.0", "id": 424242, "result": {}})
    rig.log.wait("stray_answer_from_child", before + 1)


def quiet(stream):
    """Whether nothing more comes."""
    try:
        return not stream.next(0.3)
    except (TimeoutError, StreamEnded):
        return True


# -- resume


def test_a_GET_stream_resumes_after_the_last_event_id_with_each_message_exactly_once(controlled, control):
    mcp = controlled.session()
    stream = mcp.open_stream()
    for number in range(5):
        control.emit(note(number))
    events = [stream.next(15) for _ in range(5)]
    assert [event.data["params"]["data"] for event in events] == list(range(5))
    stream.close()
    for number in (5, 6):
        control.emit(note(number))
    for seen in (2, 4):
        resumed = mcp.open_stream(last_event_id=events[seen].id)
        assert numbers(resumed, 6 - seen) == list(range(seen + 1, 7)) and quiet(resumed)
        resumed.close()


def test_a_GET_stream_without_an_id_goes_on_behind_what_was_taken(controlled, control):
    mcp = controlled.session()
    ours = controlled.broker.sessions.all()[0].frontend.get_stream
    stream = mcp.open_stream()
    control.emit(note(1))
    assert numbers(stream, 1) == [1]
    stream.close()
    with ours._changed:  # what is sent before a hang-up is noticed is lost, but to one who resumes by its id
        assert ours._changed.wait_for(lambda: not ours.is_open, 20)
    control.emit(note(2))
    later = mcp.open_stream()
    assert numbers(later, 1) == [2] and quiet(later)
    later.close()


def test_a_POST_stream_resumes_with_progress_and_answer_each_once(controlled, control):
    mcp = controlled.session()
    _, stream = mcp.start_request("tools/call", {**SLOW, "_meta": {"progressToken": "mine"}}, id="slow")
    call = control.wait_event(event="call", tool="get_slow")
    token = call["id"]  # the broker puts its own number in both places
    for step in (1, 2):
        control.emit(
            {
                "jsonrpc": "2.0",
                "method": "notifications/progress",
                "params": {"progressToken": token, "progress": step},
            }
        )
    first = stream.next(15)
    while not (isinstance(first.data, dict) and first.data.get("method") == "notifications/progress"):
        first = stream.next(15)
    stream.close()
    control.release("k")
    resumed = mcp.open_stream(last_event_id=first.id)
    answer, before = answer_of(resumed, "slow")
    assert [event.data["params"] for event in before] == [{"progressToken": "mine", "progress": 2}]
    assert text_of(answer.data["result"]) == "slow k"
    assert resumed.ended.wait(30)  # a POST's stream ends with its answer, also when it is resumed
    again = mcp.open_stream(last_event_id=first.id)
    assert answer_of(again, "slow")[0].data == answer.data  # a client may lose it again
    again.close()


def test_a_hang_up_cancels_nothing_and_the_answer_waits(controlled, control):
    mcp = controlled.session()
    _, stream = mcp.start_request("tools/call", SLOW, id="slow")
    control.wait_event(event="call", tool="get_slow")
    opening = stream.next(15)  # an event that is only an id, to resume from
    stream.close()
    resumed = mcp.open_stream(last_event_id=opening.id)
    control.release("k")
    assert text_of(answer_of(resumed, "slow")[0].data["result"]) == "slow k"
    assert "cancelled" not in {event["event"] for event in control.events}
    resumed.close()


def test_X08_an_event_id_of_another_session_or_user_replays_nothing_of_it(controlled, control):
    alice, bob = controlled.session("alice"), controlled.session("bob")
    stream = alice.open_stream()
    pids = control.children
    control.emit(note("alice's"), pids[0])
    event = stream.next(15)
    stream.close()
    control.emit(note("alice's too"), pids[0])
    control.emit(note("bob's"), pids[1])
    key = event.id.rpartition("-")[0]
    other = bob.open_stream(last_event_id=f"{key}-0")
    assert numbers(other, 1) == ["bob's"] and quiet(other)
    other.close()
    mine = alice.open_stream(last_event_id=event.id)
    assert numbers(mine, 1) == ["alice's too"]
    mine.close()


@pytest.mark.parametrize(
    "event_id", ["", "x", "-", "9999", "a-b", "x" * 300 + "-1", "\u00e9-1".encode().decode("latin-1")]
)
def test_an_event_id_that_is_none_of_ours_opens_the_stream_as_if_there_were_none(
    controlled, control, event_id
):
    mcp = controlled.session()
    control.emit(note(1))
    stream = mcp.open_stream(headers={"Last-Event-ID": event_id})
    assert numbers(stream, 1) == [1]
    stream.close()


def test_event_ids_of_before_a_restart_never_match_again(controlled, control):
    mcp = controlled.session()
    stream = mcp.open_stream()
    for number in range(3):
        control.emit(note(number))
    old = [stream.next(15).id for _ in range(3)]
    stream.close()
    controlled.restart()
    caller = same(mcp)
    caller.call_tool("get_pid")
    control.emit(note("new"), control.children[-1])
    stream = caller.open_stream(last_event_id=old[-1])
    event = stream.next(15)
    assert event.data["params"]["data"] == "new" and event.id not in old
    stream.close()


def test_a_stale_event_id_opens_the_sessions_stream_if_nobody_reads_it_and_else_a_quiet_one(
    controlled, control
):
    mcp = controlled.session()
    first = mcp.open_stream(last_event_id="0aBcDeFgHiJk-3")
    others = [mcp.open_stream(last_event_id=each) for each in ("0aBcDeFgHiJk-3", "x", "another-1")]
    for number in range(2):
        control.emit(note(number))
        assert numbers(first, 1) == [number]
    assert all(quiet(other) and not other.ended.is_set() for other in others) and not first.ended.is_set()
    first.close()
    for other in others:
        other.close()


def test_of_two_stale_event_ids_at_once_one_gets_the_sessions_stream_and_the_other_a_quiet_one(controlled):
    controlled.session()
    front = controlled.broker.sessions.all()[0].frontend
    first = []

    def seat(_key):  # between the look whether the stream is free and its opening another request has it
        if not first:
            first.append(front.get_stream.open())

    second = front.open_stream("0aBcDeFgHiJk-3", seat)
    assert not first[0].ended and second.stream is not front.get_stream
    for reader in (*first, second):
        reader.close()


def test_a_quiet_stream_ends_no_stream_of_a_post_and_resumes_nothing(controlled, control):
    mcp = controlled.session()
    stream = mcp.open_stream()
    request_id, post = same(mcp).start_request("tools/call", SLOW)
    other = mcp.open_stream(last_event_id="0aBcDeFgHiJk-3")
    control.release("k")
    answer_of(post, request_id)
    control.emit(note(1))
    assert numbers(stream, 1) == [1] and quiet(other)
    for each in (stream, post, other):
        each.close()


@pytest.mark.parametrize("end", ["deleted", "revoked"])
def test_a_quiet_stream_ends_with_its_session(controlled, end):
    mcp = controlled.session()
    stream = mcp.open_stream()
    quiet_one = mcp.open_stream(last_event_id="0aBcDeFgHiJk-3")
    if end == "deleted":
        same(mcp).delete()
    else:
        mcp.oauth.revoke(mcp.oauth.tokens["refresh_token"])
        controlled.tick()
    assert quiet_one.ended.wait(15) and stream.ended.wait(15)


def test_a_session_with_a_quiet_stream_stays_in_memory(controlled):
    mcp = controlled.session()
    stream = mcp.open_stream()
    other = mcp.open_stream(last_event_id="0aBcDeFgHiJk-3")
    stream.close()
    front = controlled.broker.sessions.all()[0].frontend
    reader = front.get_stream
    with reader._changed:
        assert reader._changed.wait_for(lambda: not reader.is_open, 15)
    assert not front.keeps_nothing
    other.close()


def test_what_nobody_takes_is_bounded_and_the_newest_stays(make_rig, control):
    rig = make_rig(child=("--control", control.path), stream_events=10)
    mcp = rig.session()
    for number in range(50):
        control.emit(note(number))
    await_read(rig, control)
    stream = mcp.open_stream()
    assert numbers(stream, 10) == list(range(40, 50)) and quiet(stream)
    stream.close()


def test_a_buffer_is_bounded_in_bytes_too(make_rig, control):
    rig = make_rig(child=("--control", control.path), stream_bytes="100KiB")
    mcp = rig.session()
    for number in range(20):
        control.emit({**note(number), "params": {"level": "info", "data": number, "more": "x" * 20_000}})
    await_read(rig, control)
    stream = mcp.open_stream()
    assert numbers(stream, 5) == [15, 16, 17, 18, 19] and quiet(stream)
    stream.close()


# -- who gets what


def test_a_newer_GET_takes_over_at_once_and_nothing_is_lost_or_sent_twice(controlled, control):
    mcp = controlled.session()
    streams, taken = [mcp.open_stream()], []
    streams[0].wait_comment(10)
    for number in range(6):
        control.emit(note(number))
        taken += numbers(streams[-1], 1)
        streams.append(mcp.open_stream())
        assert streams[-2].ended.wait(30)
    assert taken == list(range(6)) and quiet(streams[-1])
    streams[-1].close()


def test_what_an_older_GET_is_sending_as_a_newer_takes_over_is_not_sent_again():
    stream = fjmcp_broker.EventStream()
    older = stream.open()
    stream.put(b"0")
    sent = older.take(0)
    in_between, newer = stream.open(), stream.open()  # one that was replaced before it read anything
    found = in_thread(newer.take, 0.1)
    older.ack(sent)
    assert found() is None and in_between.take(0) is None
    stream.put(b"1")
    assert newer.take(0).data == b"1"


def test_what_an_older_GET_could_not_send_is_for_the_newer(monkeypatch):
    stream = fjmcp_broker.EventStream()
    older = stream.open()
    stream.put(b"0")
    older.take(0)
    newer = stream.open()
    found = in_thread(newer.take, 30)
    older.close()
    assert found().data == b"0"
    newest = stream.open()
    monkeypatch.setattr(fjmcp_broker.Reader, "TAKE_OVER", 0.0)  # a client that is gone takes nothing any more
    assert newest.take(0).data == b"0"


def test_what_belongs_to_no_request_goes_to_the_GET_stream_of_its_session_only(controlled, control):
    alice, bob = controlled.session("alice"), controlled.session("bob")
    streams = [mcp.open_stream() for mcp in (alice, bob)]
    for stream in streams:
        stream.wait_comment(10)
    control.emit(note("alice's"), control.children[0])
    control.emit(note("bob's"), control.children[1])
    assert [numbers(stream, 1) for stream in streams] == [["alice's"], ["bob's"]]
    assert all(quiet(stream) for stream in streams)
    for stream in streams:
        stream.close()


def test_with_one_request_in_flight_a_message_goes_to_it_and_not_to_the_GET_stream(controlled, control):
    mcp = controlled.session()
    get = mcp.open_stream()
    get.wait_comment(10)
    _, post = mcp.start_request("tools/call", SLOW, id="slow")
    control.wait_event(event="call", tool="get_slow")
    control.emit(note("for it"))
    assert numbers(post, 1) == ["for it"] and quiet(get)
    control.release("k")
    answer_of(post, "slow")
    get.close()


def test_with_several_in_flight_a_message_goes_to_the_GET_stream_once(controlled, control):
    mcp = controlled.session()
    posts = []
    for name in "ab":
        join = in_thread(
            mcp.start_request, "tools/call", {"name": "get_slow", "arguments": {"key": name}}, name
        )
        control.wait_event(
            lambda event, name=name: event["event"] == "call" and event["args"].get("key") == name
        )
        posts.append(join()[1])
    get = mcp.open_stream()
    get.wait_comment(10)
    control.emit(note("whose?"))
    assert numbers(get, 1) == ["whose?"]
    for name, post in zip("ab", posts):
        control.release(name)
        _, before = answer_of(post, name)
        assert "whose?" not in json.dumps([event.data for event in before])
    get.close()


def test_with_several_in_flight_and_no_GET_it_goes_to_the_newest_open_POST_once(controlled, control):
    mcp = controlled.session()
    posts = []
    for name in "ab":
        join = in_thread(
            mcp.start_request, "tools/call", {"name": "get_slow", "arguments": {"key": name}}, name
        )
        control.wait_event(
            lambda event, name=name: event["event"] == "call" and event["args"].get("key") == name
        )
        posts.append(join()[1])
    control.emit(note("whose?"))
    assert numbers(posts[1], 1) == ["whose?"]
    control.release("a")
    assert "whose?" not in json.dumps([event.data for event in answer_of(posts[0], "a")[1]])
    control.release("b")
    answer_of(posts[1], "b")


def test_J24_progress_goes_by_its_token_whichever_type_and_never_to_another(controlled, control):
    mcp, bob = controlled.session(), controlled.session("bob")
    posts = {}
    for name, token in (("a", 7), ("b", "7")):
        join = in_thread(
            mcp.start_request,
            "tools/call",
            {"name": "get_slow", "arguments": {"key": name}, "_meta": {"progressToken": token}},
            name,
        )
        number = control.wait_event(
            lambda event, name=name: event["event"] == "call" and event["args"].get("key") == name
        )["id"]
        control.emit(
            {
                "jsonrpc": "2.0",
                "method": "notifications/progress",
                "params": {"progressToken": number, "progress": 1},
            },
            control.children[0],
        )
        # what other children and unknown tokens say reaches nobody
        control.emit(
            {
                "jsonrpc": "2.0",
                "method": "notifications/progress",
                "params": {"progressToken": number, "progress": 99},
            },
            control.children[1],
        )
        control.emit(
            {
                "jsonrpc": "2.0",
                "method": "notifications/progress",
                "params": {"progressToken": token, "progress": 98},
            }
        )
        posts[name] = (join()[1], token)
    for name, (post, token) in posts.items():
        control.release(name, control.children[0])
        _, before = answer_of(post, name)
        progress = [event.data["params"] for event in before if isinstance(event.data, dict)]
        assert progress == [{"progressToken": token, "progress": 1}] and type(
            progress[0]["progressToken"]
        ) is type(token)
    assert bob.request("ping") == {}


def test_J24_cancelling_another_sessions_request_id_cancels_nothing(controlled, control):
    alice, bob = controlled.session("alice"), controlled.session("bob")
    _, stream = alice.start_request("tools/call", SLOW, id=41)
    number = control.wait_event(event="call", tool="get_slow")["id"]
    for request_id in (41, number, "41"):
        bob.notify("notifications/cancelled", {"requestId": request_id})
    for request_id in (
        "41",
        41.0,
        None,
        [41],
    ):  # of the right session, but not the request's id as it was written
        same(alice).notify(
            "notifications/cancelled", {"requestId": request_id} if request_id is not None else {}
        )
    bob.request("ping")
    control.release("k")
    assert text_of(answer_of(stream, 41)[0].data["result"]) == "slow k"
    assert "cancelled" not in {event["event"] for event in control.events}


def test_J07_an_answer_nobody_asked_for_reaches_no_child_and_no_other_session(controlled, control):
    alice, bob = controlled.session("alice", capabilities={"elicitation": {}}), controlled.session("bob")
    _, stream = alice.start_request("tools/call", {"name": "ask_elicit", "arguments": {}}, id="asking")
    question = stream.next(15)
    while not (isinstance(question.data, dict) and "method" in question.data):
        question = stream.next(15)
    before = len(control.events)
    for request_id in (question.data["id"], 1, 2, 3, "1"):
        assert bob.reply(request_id, {"action": "accept", "content": {"answer": "stolen"}}).status == 202
    bob.request("ping")
    assert [
        event["pid"]
        for event in control.events[before:]
        if event["event"] == "message" and event["method"] is None
    ] == []
    assert alice.reply(question.data["id"], {"action": "decline"}).status == 202
    assert alice.reply(question.data["id"], {"action": "accept"}).status == 202  # a second one is dropped
    answer, _ = answer_of(stream, "asking")
    assert json.loads(text_of(answer.data["result"])) == {"action": "decline"}


# -- time


def test_a_slow_call_begins_to_stream_long_before_its_answer_and_is_kept_alive(controlled, control):
    mcp = controlled.session(protocol="2025-06-18")
    _, stream = mcp.start_request(
        "tools/call", SLOW, id="slow", timeout=10
    )  # returns with the head of the stream
    assert stream.status == 200 and stream.headers["Content-Type"] == "text/event-stream"
    assert stream.wait_comment(10)
    control.release("k")
    answer_of(stream, "slow")


def test_a_quiet_stream_gets_a_comment_every_15_s(controlled):
    stream = controlled.session().open_stream()
    assert stream.wait_comment(10)  # at its beginning
    assert stream.wait_comment(17)
    stream.close()


def test_a_stream_ends_within_its_second_when_its_login_is_revoked_and_the_running_call_is_told(
    controlled, control
):
    mcp = controlled.session()
    get = mcp.open_stream()
    _, post = mcp.start_request("tools/call", SLOW, id="slow")
    control.wait_event(event="call", tool="get_slow")
    mcp.oauth.revoke(mcp.oauth.tokens["refresh_token"])
    assert get.ended.wait(10) and post.ended.wait(30)
    controlled.log.wait("child_stopped")


def test_X10_of_a_logged_out_user_the_stream_ends_and_the_child_sleeps(controlled):
    mcp = controlled.session()
    stream = mcp.open_stream()
    controlled.forgejo.revoke_grant("alice", controlled.app.client_id)
    controlled.clock.advance(3400)
    controlled.log.wait("logged_out_upstream")
    controlled.log.wait("child_stopped")
    assert same(mcp).post({"jsonrpc": "2.0", "id": 1, "method": "ping"}).status == 401
    assert stream.ended.wait(30)


def test_a_GET_stream_ends_at_its_tokens_expiry_and_a_running_call_does_not(make_rig, control):
    rig = make_rig(child=("--control", control.path), request_timeout="3h", session_idle_timeout="9h")
    mcp = rig.session()
    get = mcp.open_stream()
    _, post = mcp.start_request("tools/call", SLOW, id="slow")
    control.wait_event(event="call", tool="get_slow")
    rig.clock.stop()
    rig.clock.advance(3500)
    rig.tick()
    assert not get.ended.is_set()
    rig.clock.advance(110)
    assert get.ended.wait(30)
    assert same(mcp).post({"jsonrpc": "2.0", "id": 1, "method": "ping"}).status == 401
    control.release("k")
    assert text_of(answer_of(post, "slow")[0].data["result"]) == "slow k"


def test_deleting_a_session_ends_its_streams_and_answers_what_runs(controlled, control):
    mcp = controlled.session()
    get = mcp.open_stream()
    _, post = mcp.start_request("tools/call", SLOW, id="slow")
    control.wait_event(event="call", tool="get_slow")
    assert same(mcp).delete().status == 204
    assert get.ended.wait(30)
    answer, _ = answer_of(post, "slow")
    assert answer.data["error"]["data"]["outcome_unknown"] is True and answer.data["error"]["code"] == -32000


def test_the_broker_stops_and_idle_streams_end_at_once(rig):
    mcp = rig.session()
    stream = mcp.open_stream()
    stream.wait_comment(10)
    stopping = in_thread(rig.stop)
    assert stream.ended.wait(30)
    assert stopping() is None


def test_a_question_waits_for_a_stream_and_the_calls_clock_stands_while_it_is_open(make_rig, control):
    rig = make_rig(child=("--control", control.path), request_timeout="1s")
    mcp = rig.session(capabilities={"elicitation": {}})
    _, stream = mcp.start_request("tools/call", {"name": "ask_elicit", "arguments": {}}, id="asking")
    question = stream.next(15)
    while not (isinstance(question.data, dict) and "method" in question.data):
        question = stream.next(15)
    with pytest.raises(TimeoutError):
        stream.next(1.8)  # longer than the call may take
    mcp.reply(question.data["id"], {"action": "decline"})
    assert json.loads(text_of(answer_of(stream, "asking")[0].data["result"])) == {"action": "decline"}


def test_a_question_nobody_answers_is_answered_with_an_error_at_its_time(make_rig, control):
    rig = make_rig(child=("--control", control.path), input_timeout="1s")
    mcp = rig.session(capabilities={"elicitation": {}})
    _, stream = mcp.start_request("tools/call", {"name": "ask_elicit", "arguments": {}}, id="asking")
    answer, before = answer_of(stream, "asking")
    assert "error" in json.loads(text_of(answer.data["result"])) and any(
        "elicitation/create" in json.dumps(event.data) for event in before
    )


def test_a_client_without_a_session_id_gets_nothing_by_guess(controlled, control):
    mcp = McpClient(controlled.url + "/mcp", controlled.login().tokens["access_token"])
    posts = []
    for name in "ab":
        posts.append(
            in_thread(
                mcp.post,
                {
                    "jsonrpc": "2.0",
                    "id": name,
                    "method": "tools/call",
                    "params": {"name": "get_slow", "arguments": {"key": name}},
                },
            )
        )
        control.wait_event(
            lambda event, name=name: event["event"] == "call" and event["args"].get("key") == name
        )
    control.emit(note("whose?"))
    for name, post in zip("ab", posts):
        control.release(name)
        assert "whose?" not in post().text
