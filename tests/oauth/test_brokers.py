"""Several brokers of one store.

A login, a session, a token mean the same at each, and what only one may do one does.
"""

import base64
import copy
import threading
import time
from urllib.parse import parse_qsl, urlsplit

import pytest

import fjmcp_broker
from rigs.brokers import Brokers
from rigs.browser import Browser, approve_login, open_account
from rigs.fake_forgejo import oauth_error
from rigs.mcp_client import MODERN, OAuthClient, RpcError, StreamEnded
from rigs.modern_requests import ALL_INPUT, call, retry_of
from rigs.processes import in_thread
from rigs.rig import who

TOKEN = "/login/oauth/access_token"
LIST = {"jsonrpc": "2.0", "id": 1, "method": "prompts/list"}
KEY = base64.b64encode(b"k" * 32).decode()  # with which the suite's databases are made
LASTING = {"access_token_lifetime": "60d", "session_idle_timeout": "60d"}  # only Forgejo's own tokens expire


@pytest.fixture
def make_brokers(tmp_path, engine, request):
    """A function that makes Brokers, on each engine of the store; all of them are ended with the test."""
    made = []
    new_database = None if engine == "sqlite" else request.getfixturevalue("new_database")

    def make(count=2, **arguments):
        folder = tmp_path / f"brokers{len(made)}"
        folder.mkdir()
        if new_database:
            place = new_database()
            arguments |= {"store": {"store_url": place.url, "store_password": place.password}, "key": KEY}
        made.append(Brokers(folder, count, **arguments))
        return made[-1]

    yield make
    for brokers in made:
        brokers.close()


@pytest.fixture
def two(make_brokers):
    """Brokers a and b."""
    return make_brokers()


def until(is_so, limit=30):
    """Wait for what another thread brings about."""
    deadline = time.monotonic() + limit
    while not is_so():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


def await_stream_end(stream):
    """Return once a stream has ended, whatever comes on it before."""
    with pytest.raises(StreamEnded):
        while True:
            stream.next(20)


def refreshes(brokers):
    return sum(request.form.get("grant_type") == "refresh_token" for request in brokers.forgejo.requests[:])


def user_row(member, user="alice"):
    return member.store.user(member.brokers.forgejo._need_user(user).sub)


# -- sessions


def test_a_session_goes_on_at_another_broker_whether_or_not_its_own_still_lives(two):
    a, b = two.all
    mcp = a.session()
    assert mcp.session_id.startswith("a.")
    assert who(b.at(mcp)) == "alice" and who(mcp) == "alice"
    a.stop()
    assert who(b.at(mcp)) == "alice"


def test_a_session_that_ends_at_one_broker_ends_at_all_with_its_streams(two):
    a, b = two.all
    mcp = a.session()
    there = b.at(mcp)
    stream = there.open_stream()
    assert mcp.delete().status == 204
    await_stream_end(stream)
    until(lambda: there.post(LIST).status == 404)
    assert there.post(LIST).json()["error"]["code"] == -32001


def test_a_login_that_is_revoked_at_one_broker_ends_streams_and_children_at_all(two):
    a, b = two.all
    mcp = a.session()
    there = b.at(mcp)
    there.list_tools()
    streams = [each.open_stream() for each in (mcp, there)]
    mcp.oauth.revoke(mcp.oauth.tokens["refresh_token"])
    for stream in streams:
        await_stream_end(stream)
    for member in two.all:
        until(lambda member=member: not member.broker.capacity.count())
    assert there.post(LIST).status == 401


def test_what_was_set_at_another_broker_is_replayed_to_the_next_child(two):
    a, b = two.all
    mcp = a.session()
    there = b.at(mcp)
    there.list_tools()
    mcp.request("logging/setLevel", {"level": "error"})
    (session,) = b.broker.sessions.all()
    assert session.backends.sleep("idle")
    there.list_tools()
    assert session.replay.level == "error"


def test_what_a_modern_client_is_asked_is_answered_at_the_broker_that_asked(two):
    oauth = two.all[0].login()
    here, there = (each.client(oauth, protocol=MODERN, capabilities=ALL_INPUT) for each in two.all)
    here.auto = None
    asked = call(here, "ask_elicit")
    assert asked["requestState"].startswith("a.")
    with pytest.raises(RpcError) as refused:
        call(there, "ask_elicit", **retry_of(asked))
    assert refused.value.code == -32602 and "'a'" in refused.value.message
    assert call(here, "ask_elicit", **retry_of(asked))["resultType"] == "complete"


def test_before_a_new_person_is_let_in_under_an_old_number_every_broker_has_ended_what_the_old_one_had(two):
    a, b = two.all
    mcp = a.session()
    (session,) = a.broker.sessions.all()
    b.broker.upstream._admission.end_person(user_row(b), "alice")
    assert session.ended and a.at(mcp).post(LIST).status == 401


def test_a_broker_that_is_gone_is_waited_for_no_longer_than_its_time(two):
    a, b = two.all
    a.session()
    a.broker.reaper.stop()
    join = in_thread(b.broker.upstream._admission.end_person, user_row(b), "alice")
    two.clock.advance(fjmcp_broker.Brokers.GONE)
    assert join() is None


def test_that_a_number_means_another_person_is_on_record_though_nobody_can_tell_what_others_did(
    two, monkeypatch
):
    a, b = two.all
    a.session()
    b.broker.reaper.stop()

    def away(_since):
        raise fjmcp_broker.StoreUnavailable("the database is away")

    row = user_row(b)
    monkeypatch.setattr(b.store, "brokers", away)
    with pytest.raises(fjmcp_broker.StoreUnavailable):
        b.broker.upstream._admission.end_person(row, "alice")
    assert b.log.named("identity_changed")[0]["grants"] == 1


# -- keys


def key_of_box(member, box):
    """Which of a member's keys, newest first, sealed a box."""
    return member.broker.brokers._keyring.ids.index(box[3:7].hex())


def test_a_new_key_seals_once_every_broker_has_it_and_until_then_all_boxes_open_everywhere(make_brokers):
    brokers = make_brokers()
    a, b = brokers.all
    new = fjmcp_broker.new_key()
    keys = a.broker.brokers._keyring
    a.write_keys(new + brokers.key)
    until(lambda: a.store.brokers(0)[0].key_ids.count(" ") == 1)
    for member in brokers.all:
        member.login()
        assert key_of_box(a, user_row(member).credential) == 1
    assert who(b.session()) == "alice"
    with pytest.raises(fjmcp_broker.ConfigurationError, match="not known to these brokers: b"):
        fjmcp_broker.check_rotation(a.store.brokers(0), keys, False)
    b.write_keys(new + brokers.key)
    until(lambda: len(keys.common) == 2)
    fjmcp_broker.check_rotation(a.store.brokers(0), keys, False)
    a.login()
    assert key_of_box(a, user_row(a).credential) == 0 and who(b.session()) == "alice"


def test_a_broker_without_the_key_that_the_others_seal_with_does_not_start(make_brokers):
    brokers = make_brokers()
    a, b = brokers.all
    b.stop()
    new = fjmcp_broker.new_key()
    a.write_keys(new + brokers.key)
    until(lambda: len(a.broker.brokers._keyring.common or ()) == 2)
    with pytest.raises(fjmcp_broker.ConfigurationError, match="seal with a key that is not here"):
        b.start()


def test_two_brokers_of_one_name_are_told(make_brokers):
    brokers = make_brokers()
    a, b = brokers.all
    b.stop()
    b.name = "a"
    b.start()
    a.log.wait("broker_name_twice")


def test_a_broker_that_ended_in_order_is_not_listed_any_more(two):
    a, b = two.all
    assert [each.label for each in a.store.brokers(0)] == ["a", "b"]
    b.stop()
    assert [each.label for each in a.store.brokers(0)] == ["a"]


# -- logins


class Hopping(Browser):
    """A browser each of whose requests comes to the next broker."""

    def __init__(self, brokers):
        self.turn = 0

        def hop(_url):
            self.turn += 1
            self.routes = brokers.all[self.turn % len(brokers.all)].routes

        super().__init__(routes=brokers.all[0].routes, hop=hop)


def test_a_login_may_take_each_of_its_steps_at_another_broker(two):
    a, b = two.all
    client = OAuthClient(two.url, routes=a.routes)
    client.discover()
    client.register()
    browser = Hopping(two)
    callback = approve_login(
        browser, client.authorize_url(), "alice", "secret", access="full", redirect_uri=client.redirect_uri
    )
    client._routes = b.routes
    client.finish(callback)
    client._routes = a.routes
    assert client.refresh().status == 200
    assert who(b.session(oauth=client)) == "alice" and browser.turn > 3


def test_the_account_page_is_the_same_at_every_broker(two):
    two.all[0].login()
    _, page = open_account(two, browser=Hopping(two))
    assert page.status == 200 and "Test client" in page.words


def test_two_people_who_log_in_at_once_at_two_brokers_are_each_themselves(two):
    people = ["alice", "bob", "bob", "alice"]
    joins = [in_thread(member.session, user) for member, user in zip(two.all * 2, people)]
    assert [who(join()) for join in joins] == people


def callback_of(brokers, browser, client):
    """The URL of a callback with Forgejo's code in it, not opened yet."""
    stop = lambda url: url.startswith(brokers.url + "/oauth/callback")
    page = browser.get(client.authorize_url())
    form = page.form_with("login")
    page = browser.submit(page, ("decision", "approve"), form, stop=stop, access="full")
    page = browser.submit(
        page, form=page.form_with("user_name"), stop=stop, user_name="alice", password="secret"
    )
    page = page if page.redirected_to else browser.submit(page, ("granted", "true"), stop=stop)
    return page.redirected_to


def begun(brokers, member):
    """(client, browser, URL of the callback) of a login that has come as far as Forgejo."""
    client = OAuthClient(brokers.url, routes=member.routes)
    client.discover()
    client.register()
    browser = Browser(routes=member.routes)
    return client, browser, callback_of(brokers, browser, client)


def test_K04_a_callback_that_comes_to_two_brokers_is_exchanged_once_and_answered_alike(two):
    client, browser, url = begun(two, two.all[0])
    stop = lambda url: url.startswith(client.redirect_uri)
    with two.forgejo.hold(TOKEN) as gate:
        joins = []
        for member in two.all:
            each = copy.copy(browser)
            each.routes = member.routes
            joins.append(in_thread(each.get, url, stop=stop))
            gate.wait_arrived()
        gate.open()
        places = {join().redirected_to for join in joins}
    assert len(places) == 1
    client.finish(places.pop())
    assert two.forgejo.count(TOKEN) == 1


def test_a_callback_whose_broker_died_over_it_is_refused_at_another_once_its_time_is_over(two):
    a, b = two.all
    client, browser, url = begun(two, a)
    state_hash = fjmcp_broker.token_hash(dict(parse_qsl(urlsplit(url).query))["state"])
    now = two.clock.now()
    assert a.store.take_lease("callback " + state_hash.hex(), "dead", now, now + 80)
    assert a.store.take_login(state_hash, now)
    browser.routes = b.routes
    join = in_thread(browser.get, url)
    until(lambda: b.broker.server.open_connections)
    two.clock.advance(81)
    assert join().status == 400


def test_a_code_is_redeemed_once_over_all_brokers_and_a_second_time_ends_its_grant(two):
    a, b = two.all
    client, browser, url = begun(two, a)
    answer = browser.get(url, stop=lambda url: url.startswith(client.redirect_uri)).redirected_to
    client.finish(answer)
    code = dict(parse_qsl(urlsplit(answer).query))["code"]
    client._routes = b.routes
    assert client.redeem(code).json()["error"] == "invalid_grant"
    b.log.wait("reuse_detected")
    client._routes = a.routes
    assert client.refresh().json()["error"] == "invalid_grant"


def test_one_refresh_token_at_all_brokers_at_once_is_rotated_once(make_brokers):
    brokers = make_brokers(3)
    oauth = brokers.all[0].login()
    token = oauth.tokens["refresh_token"]

    def refresh(member):
        client = copy.copy(oauth)
        client._routes = member.routes
        assert client.refresh(refresh_token=token).status == 200
        return client.tokens["refresh_token"]

    joins = [in_thread(refresh, member) for member in brokers.all * 3]
    answers = {join() for join in joins}
    assert len(answers) == 1 and answers != {token}
    assert sum(len(member.log.named("token_refreshed")) for member in brokers.all) == 1


# -- the one credential at Forgejo


def test_20_sessions_of_a_user_at_three_brokers_around_expiry_make_one_refresh(make_brokers):
    brokers = make_brokers(3, max_sessions=30, max_sessions_per_user=30, **LASTING)
    oauth = brokers.all[0].login()
    members = [brokers.all[number % 3] for number in range(20)]
    sessions = [member.session(oauth=oauth) for member in members]
    brokers.clock.advance(3590)
    barrier = threading.Barrier(20)

    def act(mcp):
        barrier.wait(20)
        return who(mcp)

    with brokers.forgejo.hold(TOKEN) as gate:
        joins = [in_thread(act, mcp) for mcp in sessions]
        gate.wait_arrived()
        gate.open()
        assert [join() for join in joins] == ["alice"] * 20
    assert [who(mcp) for mcp in sessions] == ["alice"] * 20
    assert refreshes(brokers) == 1


def test_the_reapers_of_all_brokers_refresh_a_credential_once(make_brokers):
    brokers = make_brokers(3, **LASTING)
    oauth = brokers.all[0].login()
    sessions = [member.session(oauth=oauth) for member in brokers.all]
    before = user_row(brokers.all[0]).credential_seq
    brokers.clock.advance(3400)
    until(lambda: user_row(brokers.all[0]).credential_seq > before)
    for member in brokers.all:
        member.tick()
    assert [who(mcp) for mcp in sessions] == ["alice"] * 3 and refreshes(brokers) == 1


def dead_refresh(member, seconds=17):
    """Another broker began a refresh of alice's credential, and died."""
    row, now = user_row(member), member.brokers.clock.now()
    holder, member.store.holder = member.store.holder, "dead"
    assert member.store.begin_refresh(row.sub, row.credential_seq, now, now + seconds)
    member.store.holder = holder


def stop_reapers(brokers):
    """No broker refreshes by itself from now on."""
    for member in brokers.all:
        member.broker.reaper.stop()
    for thread in threading.enumerate():
        if thread.name == "reaper":
            thread.join(30)


def test_a_broker_that_died_over_a_refresh_holds_others_up_no_longer_than_its_lease(
    make_brokers, monkeypatch
):
    monkeypatch.setattr(fjmcp_broker, "LEASE_WATCH", 0.3)
    brokers = make_brokers(**LASTING)
    mcp = brokers.all[0].session()
    stop_reapers(brokers)
    brokers.clock.advance(3598)
    dead_refresh(brokers.all[0])
    join = in_thread(who, brokers.all[1].at(mcp))
    brokers.clock.advance(18)
    assert join() == "alice" and refreshes(brokers) == 1


def test_while_another_broker_refreshes_calls_go_on_with_the_token_that_is_still_good(make_brokers):
    brokers = make_brokers(**LASTING)
    a, b = brokers.all
    mcp = a.session()
    stop_reapers(brokers)
    brokers.clock.advance(3550)
    dead_refresh(a, 3600)
    assert who(b.at(mcp)) == "alice" and refreshes(brokers) == 0
    a.store.end_lease(f"user {user_row(a).sub}", "dead")


def test_a_refusal_waits_for_the_callback_at_another_broker_that_may_have_caused_it(
    make_brokers, monkeypatch
):
    monkeypatch.setattr(fjmcp_broker.Brokers, "GONE", 7200.0)  # the clock leaps over their reports
    brokers = make_brokers(**LASTING)
    a, b = brokers.all
    mcp = a.session()
    brokers.forgejo.inject(TOKEN, oauth_error("invalid_grant", "replaced by the login"), method="POST")
    stop_reapers(brokers)
    brokers.clock.advance(3590)
    with b.broker.upstream.callback():
        with pytest.raises(fjmcp_broker.UpstreamDown):
            a.broker.upstream.refresh(user_row(a).sub)
        b.login()
    a.broker.upstream.settle()
    assert user_row(a).status == "active" and who(a.at(mcp)) == "alice"


def test_a_refusal_is_believed_once_the_callback_at_another_broker_has_ended_without_a_login(
    make_brokers, monkeypatch
):
    monkeypatch.setattr(fjmcp_broker.Brokers, "GONE", 7200.0)  # the clock leaps over their reports
    brokers = make_brokers(**LASTING)
    a, b = brokers.all
    mcp = a.session()
    brokers.forgejo.revoke_grant("alice", brokers.app.client_id)
    stop_reapers(brokers)
    brokers.clock.advance(3590)
    with b.broker.upstream.callback():
        with pytest.raises(fjmcp_broker.UpstreamDown):
            a.broker.upstream.refresh(user_row(a).sub)
        a.broker.upstream.settle()
        assert user_row(a).status == "active"
    a.broker.upstream.settle()
    a.log.wait("logged_out_upstream")
    assert mcp.post(LIST).status == 401


def test_a_refusal_does_not_wait_for_the_callback_of_a_broker_that_is_gone(make_brokers):
    brokers = make_brokers(**LASTING)
    a, b = brokers.all
    a.session()
    brokers.forgejo.revoke_grant("alice", brokers.app.client_id)
    stop_reapers(brokers)
    brokers.clock.advance(3590)
    now = brokers.clock.now()
    assert a.store.take_lease("callback x", f"{'0' * 16} dead", now, now + 80)
    with pytest.raises(fjmcp_broker.LoggedOut):
        a.broker.upstream.refresh(user_row(a).sub)


def failing(store, monkeypatch, method):
    """From now on a method of this store finds the database gone, until the patch is undone."""

    def fail(*_arguments, **_named):
        raise fjmcp_broker.StoreUnavailable("away")

    monkeypatch.setattr(store, method, fail)


@pytest.mark.parametrize("refused_meanwhile", [False, True])
def test_a_pair_that_cannot_be_stored_is_stored_once_the_store_answers_again(
    make_brokers, monkeypatch, refused_meanwhile
):
    brokers = make_brokers(**LASTING)
    a, b = brokers.all
    mcp = a.session()
    row = user_row(a)
    with monkeypatch.context() as patch:
        failing(a.store, patch, "save_credential")
        with pytest.raises(fjmcp_broker.StoreUnavailable):
            a.broker.upstream.refresh(row.sub, row.credential_seq)
        if refused_meanwhile:  # its lease is over, and another broker spends the same pair
            assert b.store.set_user_status(row.sub, "logged_out", row.credential_seq)
    until(lambda: user_row(b).credential_seq == row.credential_seq + 1)
    assert user_row(b).status == "active" and who(b.at(mcp)) == "alice"
    assert refreshes(brokers) == 1


def test_a_pair_of_an_older_refresh_never_replaces_a_newer_one(make_brokers):
    brokers = make_brokers(**LASTING)
    a, b = brokers.all
    a.session()
    row = user_row(a)
    b.login()
    newer = user_row(b)
    assert newer.credential_seq > row.credential_seq
    numbers = (row.credential_grant, row.credential_count, 0.0, 0.0, row.credential_order)
    assert a.store.save_credential(row.sub, b"old", *numbers, row.credential_seq) is None
    assert user_row(a).credential == newer.credential


# -- the database


def test_a_database_that_does_not_answer_holds_up_no_child_that_is_to_stop(make_brokers, monkeypatch):
    brokers = make_brokers(1)
    (a,) = brokers.all
    a.session()
    asked, on = threading.Event(), threading.Event()

    def silent(_most):
        asked.set()
        on.wait(60)
        raise fjmcp_broker.StoreUnavailable("no answer in time")

    monkeypatch.setattr(a.store, "operator_records", silent)
    assert asked.wait(30)
    brokers.clock.advance(901)
    stopped = a.log.wait("child_stopped")[0]["reason"]
    on.set()
    assert stopped == "idle"


def test_rows_that_have_had_their_time_are_dropped_by_one_broker(make_brokers, monkeypatch):
    brokers = make_brokers(3)
    swept = []
    for member in brokers.all:
        real = member.store.sweep
        monkeypatch.setattr(
            member.store,
            "sweep",
            lambda *given, real=real, name=member.name: swept.append(name) or real(*given),
        )
    for member in brokers.all:
        member.broker.reaper._sweep(brokers.clock.now())
    assert swept == ["a"]


# -- what operators do


def test_what_an_operator_did_is_in_the_log_of_one_broker(make_brokers):
    brokers = make_brokers(3)
    oauth = brokers.all[0].login()
    store = brokers.all[0].store
    (grant,) = store.find_grants("all", "", brokers.clock.now())
    assert store.end_grant(grant.grant_id, "revoked by operator", brokers.clock.now(), for_log=True)
    until(lambda: not store.operator_records(10))
    for member in brokers.all:
        member.tick()
    assert sum(len(member.log.named("token_revoked")) for member in brokers.all) == 1
    assert oauth.refresh().json()["error"] == "invalid_grant"


def test_a_record_that_was_committed_late_under_a_lower_number_is_logged(make_brokers, monkeypatch):
    (a,) = make_brokers(1).all
    insert = """
        INSERT INTO operator_records (record_id, event, client_id, reason)
        VALUES (:number, 'client_removed', :client, 'removed by operator')
    """
    real = a.store.drop_operator_records

    def drop(*logged):
        monkeypatch.setattr(a.store, "drop_operator_records", real)
        a.store.engine.run({"number": 6, "client": "late"}, [insert])
        real(*logged)

    monkeypatch.setattr(a.store, "drop_operator_records", drop)
    a.store.engine.run({"number": 7, "client": "early"}, [insert])
    assert [each["client"] for each in a.log.wait("client_removed", 2)] == ["early", "late"]
    until(lambda: not a.store.operator_records(10))
