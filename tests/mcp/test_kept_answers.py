"""Answers that wait for a client: how many over all, of a user, of a session, and how long.

And the error for an answer that is gone.
"""

import json
import threading
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fjmcp_broker
from fjmcp_broker import EventStream, KeptBytes, Owner
from rigs.busy_clients import same
from rigs.heard import answer_of
from rigs.processes import in_thread
from rigs.rig import FakeClock, text_of, who

KIB = 1024
GONE = {"reason": "answer_dropped", "outcome_unknown": False, "retryable": False}


def accountant(**values):
    """(accountant, its clock) with small bounds."""
    bounds = {"kept_bytes": 64 * KIB, "kept_bytes_per_session": 8 * KIB, "kept_time": 300, **values}
    clock = FakeClock()
    clock.stop()
    return KeptBytes(types.SimpleNamespace(**bounds), clock), clock


def stream_of(kept, user="alice", session=1, *, named=True, answers=1, stall=0.0):
    stream = EventStream(256, 1 << 20, stall, answers, kept, Owner(user, session), lost)
    stream.named = named
    return stream


def lost(request_id):
    return f"lost {request_id}".encode()


def answered(stream, size, request_id="x"):
    """The stream, with an answer of that size on it."""
    stream.put(b"a" * size, answer=True, request_id=request_id)
    return stream


def read(stream):
    """What a client that comes back for everything finds."""
    reader = stream.open(0)
    found = []
    while (item := reader.take(0.0)) is not None:
        found.append(item.data)
        reader.ack(item)
    reader.close()
    return found


def is_there(stream):
    return read(stream)[0].startswith(b"a")


# -- the accountant


def test_at_the_bound_of_a_session_its_oldest_answer_goes_and_word_of_it_stays():
    kept, _ = accountant()
    mine = [answered(stream_of(kept), 3 * KIB, number) for number in range(3)]
    other = answered(stream_of(kept, session=2), 3 * KIB)
    assert [is_there(stream) for stream in mine] == [False, True, True] and is_there(other)
    assert read(mine[0]) == [b"lost 0"] and kept.total == 9 * KIB


def test_one_user_has_a_quarter_and_loses_its_own_oldest():
    kept, _ = accountant()
    bob = answered(stream_of(kept, "bob", 99), 8 * KIB)
    mine = [answered(stream_of(kept, session=number), 8 * KIB) for number in range(3)]
    assert [is_there(stream) for stream in mine] == [False, True, True] and is_there(bob)


def test_when_all_is_full_the_oldest_of_who_holds_most_goes():
    kept, _ = accountant(kept_bytes=40 * KIB)  # a user: 10
    users = ["a", "b", "c", "d"]
    held = {user: [answered(stream_of(kept, user, user), KIB) for _ in range(8)] for user in users}
    most = [answered(stream_of(kept, "a", "a2"), KIB) for _ in range(2)]
    for number in range(8):
        answered(stream_of(kept, "e", number), KIB)
    assert kept.total == 40 * KIB
    assert [is_there(stream) for stream in held["a"]][:2] == [False, False] and all(map(is_there, most))
    assert sum(is_there(stream) for user in users for stream in held[user]) == 30


def test_what_is_being_read_is_never_dropped_and_who_wants_to_add_waits_for_it():
    kept, _ = accountant()
    first = stream_of(kept, named=False)
    reader = first.open()
    answered(first, 8 * KIB + SMALL)
    second = stream_of(kept, stall=20.0)
    waiting = second.open()
    join = in_thread(answered, second, SMALL, "later")
    assert waiting.take(0.3) is None
    item = reader.take(0.0)
    assert item.data.startswith(b"a")
    reader.ack(item)
    reader.close()
    join()
    assert waiting.take(10).data.startswith(b"a")
    waiting.close()


SMALL = fjmcp_broker.SMALL_ANSWER


def test_a_child_that_waits_too_long_for_a_reader_loses_its_own_answer():
    kept, _ = accountant(kept_bytes_per_session=2 * SMALL, kept_bytes=64 * SMALL)
    first, second = stream_of(kept), stream_of(kept)
    readers = [first.open(), second.open()]
    answered(first, 2 * SMALL)
    answered(second, SMALL, "second")
    assert readers[0].take(0.0).data.startswith(b"a") and readers[1].take(0.0).data == b"lost second"


def test_who_reads_slowly_from_all_sides_holds_up_nobody_else():
    kept, _ = accountant(kept_bytes=64 * SMALL, kept_bytes_per_session=16 * SMALL)
    slow = []
    for number in range(4):
        stream = stream_of(kept, f"slow {number}", number)
        slow.append((stream, stream.open()))
        answered(stream, 16 * SMALL)
    assert kept.total == 64 * SMALL
    honest = stream_of(kept, "honest", 9)
    reader = honest.open()
    answered(honest, 2 * SMALL)
    assert reader.take(0.0).data.startswith(b"a")
    fifth = answered(stream_of(kept, "slow 1", 10), 2 * SMALL)  # who holds much himself is not let by
    assert not is_there(fifth)
    for _, other in slow:
        assert other.take(0.0).data.startswith(b"a")


def test_an_answer_larger_than_the_share_lives_while_its_connection_does():
    kept, _ = accountant(kept_bytes_per_session=SMALL)
    stream = stream_of(kept)
    reader = stream.open()
    answered(stream, 2 * SMALL, "big")
    assert reader.take(0.0).data.startswith(b"a")
    reader.close()
    assert read(stream) == [b"lost big"] and kept.total == 0
    alone = answered(stream_of(kept), 2 * SMALL, "nobody")
    assert read(alone) == [b"lost nobody"] and kept.total == 0


def test_after_its_time_an_answer_goes_but_not_while_it_is_read():
    kept, clock = accountant()
    waits, is_read = answered(stream_of(kept), KIB, 1), answered(stream_of(kept), KIB, 2)
    reader = is_read.open()
    clock.advance(301)
    kept.expire()
    assert read(waits) == [b"lost 1"] and reader.take(0.0).data.startswith(b"a")
    reader.close()
    clock.advance(301)
    kept.expire()
    assert read(is_read) == [b"lost 2"]
    assert (kept.total, kept.users, kept.sessions, len(kept.ages)) == (0, {}, {}, 0)


def test_what_no_client_can_name_is_kept_for_none():
    kept, _ = accountant()
    stream = stream_of(kept, named=False)
    stream.open().close()
    answered(stream, 2 * SMALL)
    assert stream.finished and not stream._items and kept.total == 0


def test_a_small_answer_that_a_client_waits_for_is_never_charged():
    kept, _ = accountant()
    stream = stream_of(kept, named=False)
    reader = stream.open()
    answered(stream, KIB)
    assert kept.total == 0
    reader.ack(reader.take(0.0))
    reader.close()
    assert kept.total == 0


def test_events_keep_their_own_bound_and_answers_are_not_pushed_out_by_them():
    kept, _ = accountant(kept_bytes=1 << 24, kept_bytes_per_session=1 << 20)
    stream = EventStream(10, 1 << 20, 0.0, 2, kept, Owner("alice", 1), lost)
    stream.named = True
    answered(stream, 100)
    for number in range(50):
        stream.put(b"event %d" % number)
    found = read(stream)
    assert found[0].startswith(b"a") and found[1:] == [b"event %d" % number for number in range(40, 50)]
    assert kept.total == sum(map(len, found))


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["put", "event", "open", "take", "close", "expire", "forget"]),
        st.integers(0, 7),
        st.integers(1, 40 * KIB),
    ),
    max_size=60,
)


@given(steps=STEPS)
def test_whatever_happens_the_sums_are_right_and_no_bound_is_passed(steps):
    kept, clock = accountant(kept_bytes=128 * KIB, kept_bytes_per_session=20 * KIB)
    streams = [stream_of(kept, f"user {n % 4}", n, named=n % 3 != 0, answers=1000) for n in range(8)]
    readers = {}
    for what, number, size in steps:
        stream = streams[number]
        if what in ("put", "event"):
            stream.put(b"a" * size, answer=what == "put", request_id=number)
        elif what == "open":
            readers[number] = stream.open()
        elif what == "expire":
            clock.advance(200)
            kept.expire()
        elif what == "forget":
            stream.forget()
        elif number in readers and what == "take":
            item = readers[number].take(0.0)
            if item:
                readers[number].ack(item)
        elif number in readers:
            readers.pop(number).close()
        charged = [item for stream in streams for item in stream._items.values() if item.kept]
        assert (
            kept.total == sum(len(item.data) for item in charged) == sum(h.bytes for h in kept.users.values())
        )
        assert kept.total == sum(h.bytes for h in kept.sessions.values()) and len(kept.ages) == len(charged)
        assert all(holder.bytes <= 40 * KIB for holder in kept.sessions.values())
        assert all(holder.bytes <= 40 * KIB for holder in kept.users.values())
        assert kept.total <= 128 * KIB + 40 * KIB and len(kept._most) <= 4 * 4 + 257
    for stream in streams:
        while stream._reader:
            stream._reader.close()
        stream.forget()
    assert (kept.total, kept.users, kept.sessions, len(kept.ages)) == (0, {}, {}, 0)


def test_many_threads_leave_the_sums_right():
    kept, _ = accountant()

    def work(number):
        for _ in range(200):
            stream = stream_of(kept, f"user {number % 3}", number)
            reader = stream.open() if number % 2 else None
            answered(stream, 3 * KIB)
            if reader:
                reader.close()
            stream.forget()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (kept.total, kept.users, kept.sessions, len(kept.ages)) == (0, {}, {}, 0)


# -- through the broker


def left_behind(rig, control, mcp, key, size=0):
    """A call whose client hung up after it had an event id; the id. The answer is there when this returns."""
    arguments = {"key": key, "size": size}
    _, stream = mcp.start_request("tools/call", {"name": "get_slow", "arguments": arguments}, id=key)
    opening = stream.next(15)
    stream.close()
    control.wait_event(lambda event: event["event"] == "call" and event["args"].get("key") == key)
    (session,) = [each for each in rig.broker.sessions.all() if each.is_durable and each.calls()]
    number = next(iter(session.backend.pending))
    text = "x" * size
    result = {"content": [{"type": "text", "text": text}]}
    ours = session.frontend.streams[opening.id.rpartition("-")[0]]
    with ours._changed:  # the broker knows that nobody reads
        assert ours._changed.wait_for(lambda: not ours.is_open, 20)
    control.emit({"jsonrpc": "2.0", "id": number, "result": result})
    with ours._changed:
        assert ours._changed.wait_for(lambda: ours.finished, 20)
    return opening.id


def come_back(mcp, event_id, request_id):
    stream = mcp.open_stream(last_event_id=event_id)
    message = answer_of(stream, request_id)[0].data
    stream.close()
    return message


@pytest.fixture
def tight(make_rig, control):
    """A Rig with small bounds, whose children can be told what to do."""
    return make_rig(
        child=("--control", control.path),
        kept_bytes="400KiB",
        kept_bytes_per_session="50KiB",
        kept_time="5m",
        session_idle_timeout="2s",
    )


def test_the_oldest_answer_of_a_session_goes_and_who_comes_back_is_told_so(tight, control):
    mcp = tight.session()
    ids = {key: left_behind(tight, control, mcp, key, 20_000) for key in ("a", "b", "c")}
    gone = come_back(mcp, ids["a"], "a")
    assert (gone["error"]["code"], gone["error"]["data"]) == (-32000, GONE)
    assert [len(text_of(come_back(mcp, ids[key], key)["result"])) for key in ("b", "c")] == [20_000, 20_000]
    large = left_behind(tight, control, mcp, "large", 60_000)
    assert come_back(mcp, large, "large")["error"]["data"] == GONE
    assert who(same(mcp)) == "alice"


def test_an_answer_that_nobody_fetched_goes_with_its_time_and_the_session_leaves_memory(tight, control):
    mcp = tight.session()
    event_id = left_behind(tight, control, mcp, "slow", 20_000)
    broker = tight.broker
    assert 20_000 < broker.kept.total < 21_000
    tight.clock.advance(301)
    tight.tick()
    tight.log.wait("child_stopped")
    assert broker.kept.total == 0
    assert come_back(mcp, event_id, "slow")["error"]["data"] == GONE
    tight.clock.advance(400)
    tight.tick()
    assert broker.sessions.all() == [] and who(same(mcp)) == "alice"


def test_a_call_that_is_answered_at_once_leaves_nothing(rig):
    mcp = rig.session()
    for size in (10, 100_000):
        mcp.call_tool("get_echo", text="x" * size)
    (session,) = rig.broker.sessions.all()
    mcp.close()
    kept = rig.broker.kept
    with kept.lock:  # the answer is with the client a moment before its thread knows
        assert kept.lock.wait_for(lambda: not kept.total, 15)
    assert not session.frontend.streams


def test_a_modern_retry_whose_answer_was_given_up_is_told_in_its_own_code():
    message = json.loads(fjmcp_broker.modern_answer_dropped("q"))
    assert (message["id"], message["error"]["code"], message["error"]["data"]) == ("q", -32603, GONE)


def test_ended_sessions_are_charged_for_nothing(tight, control):
    mcp = tight.session()
    left_behind(tight, control, mcp, "slow", 20_000)
    assert mcp.delete().status == 204
    assert tight.broker.kept.total == 0


def test_streams_that_a_client_may_come_back_to_are_few(rig):
    rig.session()
    (session,) = rig.broker.sessions.all()
    front = session.frontend
    for number in range(100):
        stream = session.new_stream(1)
        stream.named = True
        front.name_stream(stream)
        answered(stream, 10, number)
        if number < 50:
            read(stream)
    session.tick(0.0)
    assert len(front.streams) == 58 and rig.broker.kept.total == 580
    for number in range(30):
        stream = session.new_stream(1)
        front.name_stream(stream)
        answered(stream, 10, number)
    session.tick(0.0)
    assert len(front.streams) == 64
