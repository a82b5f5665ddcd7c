"""Who a number at Forgejo means.

The same person under another name, another person under the same number, another Forgejo under the same URL.
"""

import sqlite3

import pytest

import fjmcp_broker
from rigs.browser import BrowserError
from rigs.busy_clients import same
from rigs.fake_forgejo import FakeForgejo, status
from rigs.mcp_client import ClientError, McpClient, OAuthClient
from rigs.processes import ended
from rigs.rig import who

ME = "/api/v1/user"
USERINFO = "/login/oauth/userinfo"
CALL = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "tools/call",
    "params": {"name": "get_my_user_info", "arguments": {}},
}
LATER = "2026-08-08T08:08:08Z"


def user(rig, number):
    return rig.broker.store.user(str(number))


def replaced(rig, login, new, created=LATER):
    """Make the number of a user mean somebody else, as a Forgejo does that was restored or made anew."""
    person = rig.forgejo._need_user(login)
    rig.forgejo.revoke_grant(login, rig.app.client_id)
    person.login, person.created = new, created
    return str(person.id)


def assert_ended(rig, mcp, number):
    """Nothing that the first person held works or is there."""
    assert same(mcp).post(CALL).status == 401
    assert mcp.oauth.refresh().json()["error"] == "invalid_grant"
    (record,) = rig.log.wait("identity_changed")
    assert record["user"] == number


# -- one number, two people


@pytest.mark.parametrize("login", ["victim", "alice"])
def test_a_number_whose_account_was_made_at_another_time_is_another_person_whatever_the_login(rig, login):
    mcp = rig.session("alice")
    number = replaced(rig, "alice", login)
    other = rig.session(login)
    assert_ended(rig, mcp, number)
    assert who(other) == login and other.oauth.refresh().status == 200
    assert len(rig.broker.store.sessions_of(number)) == 1


@pytest.mark.parametrize(
    "unreadable", [status(403, {"message": "required scope(s): [read:user]"}), status(502)]
)
def test_where_the_account_cannot_be_read_the_login_tells(rig, unreadable):
    mcp = rig.session("alice")
    number = replaced(rig, "alice", "victim")
    rig.forgejo.inject(ME, unreadable, times=None)
    rig.login("victim")
    assert_ended(rig, mcp, number)


def test_the_same_login_without_a_readable_account_is_the_same_person_in_any_case(rig):
    mcp = rig.session("alice")
    rig.forgejo.inject(ME, status(502), times=None)
    rig.forgejo.rename("alice", "Alice")
    rig.login("Alice")
    rig.forgejo.clear_faults()
    assert who(same(mcp)) == "Alice" and not rig.log.named("identity_changed")


def test_a_renamed_user_is_the_same_person(rig):
    mcp = rig.session("alice")
    rig.forgejo.rename("alice", "alicia")
    rig.login("alicia")
    assert who(same(mcp)) == "alicia" and not rig.log.named("identity_changed")
    assert user(rig, 1001).former_login == "alice"


def test_the_moment_counts_and_not_the_time_zone_it_is_written_in(rig):
    mcp = rig.session("alice")
    rig.forgejo._need_user("alice").created = "2026-01-02T05:04:05+02:00"
    rig.login("alice")
    assert mcp.oauth.refresh().status == 200 and not rig.log.named("identity_changed")


@pytest.mark.parametrize("written", ["", "yesterday", None, 7, "0001-01-01T00:00:00Z", "2026-01-02T03:04:05"])
def test_a_moment_that_cannot_be_read_is_no_moment(rig, written):
    mcp = rig.session("alice")
    rig.forgejo._need_user("alice").created = written
    rig.login("alice")
    assert mcp.oauth.refresh().status == 200 and not rig.log.named("identity_changed")
    assert user(rig, 1001).account_created == 1767323045.0  # what was known stays


def test_the_first_persons_pooled_child_serves_the_other_person_nothing(rig):
    mcp = rig.session("alice")
    without = McpClient(rig.url + "/mcp", mcp.oauth.tokens["access_token"])
    assert without.post(CALL).status == 200  # a child in the pool of (alice, client)
    number = replaced(rig, "alice", "victim")
    mcp.oauth.login(None, "victim", "secret")  # through the same client
    assert [session for session in rig.broker.sessions.all() if session.sub == number] == []
    answer = McpClient(rig.url + "/mcp", mcp.oauth.tokens["access_token"]).post(CALL)
    assert '\\"login\\": \\"victim\\"' in answer.text
    reasons = [r["reason"] for r in rig.log.named("child_stopped")]
    assert "identity changed" in reasons


def test_the_account_page_of_the_first_person_is_closed(rig):
    rig.session("alice")
    store = rig.broker.store
    store.open_account(b"browser", "1001", rig.clock.now() + 1000)
    replaced(rig, "alice", "victim")
    rig.login("victim")
    assert store.account(b"browser", rig.clock.now()) is None


def test_an_identity_that_changed_ends_the_logins_before_the_new_credential_is_stored(rig, monkeypatch):
    mcp = rig.session("alice")
    replaced(rig, "alice", "victim")
    seen = []
    real = rig.broker.store.save_credential

    def save(*given):
        seen.append((rig.broker.store.grants_of(given[0], rig.clock.now()), user(rig, given[0]).credential))
        return real(*given)

    monkeypatch.setattr(rig.broker.store, "save_credential", save)
    rig.login("victim")
    assert seen == [([], None)] and mcp.token


def test_a_login_that_fails_after_the_exchange_stores_nothing_of_another_person(rig):
    rig.session("alice")
    before = user(rig, 1001)
    replaced(rig, "alice", "victim")
    rig.forgejo.inject(USERINFO, status(500), times=None)
    with pytest.raises((BrowserError, ClientError)):
        rig.login("victim")
    assert user(rig, 1001).credential == before.credential


def test_answers_that_name_different_people_end_the_login(rig):
    rig.session("alice")
    rig.forgejo.inject(ME, status(200, {"id": 4242, "login": "alice", "created": LATER}))
    with pytest.raises((BrowserError, ClientError)) as error:
        rig.login("alice")
    assert "temporarily_unavailable" in str(error.value) and not rig.log.named("identity_changed")


def test_a_refresh_that_brings_another_persons_token_ends_the_logins_of_the_number(rig):
    kept = rig.forgejo.backup()
    rig.forgejo.add_user("carol", created="2026-05-05T05:05:05Z")
    mcp = rig.session("carol")
    number = str(rig.forgejo._need_user("carol").id)
    rig.forgejo.restore(kept)
    rig.forgejo.add_user("dave", created=LATER)
    rig.forgejo.issue_tokens(
        "dave", rig.app.client_id, "openid read:user"
    )  # dave has carol's grant number now
    rig.clock.advance(3590)
    assert same(mcp).post(CALL).status == 401
    assert rig.log.wait("identity_changed")[0]["user"] == number


def test_a_person_renamed_meanwhile_keeps_everything_at_a_refresh(rig):
    mcp = rig.session("alice")
    rig.forgejo.rename("alice", "alicia")
    rig.clock.advance(3590)
    rig.broker.upstream.refresh("1001")  # unless the reaper was first
    ended("refresh")
    assert user(rig, 1001).login == "alicia" and mcp.oauth.refresh().status == 200


# -- users and groups, without case


@pytest.mark.parametrize(
    "allowed, groups",
    [
        ({"allowed_groups": "myorg"}, ("MyOrg",)),
        ({"allowed_groups": "MyOrg:Owners"}, ("myorg:owners",)),
        ({"allowed_users": "CAROL"}, ()),
    ],
)
def test_allowed_users_and_groups_are_compared_without_case(make_rig, allowed, groups):
    rig = make_rig(**allowed)
    rig.forgejo.add_user("carol", groups=groups)
    mcp = rig.session("carol")
    rig.broker.upstream.refresh(str(rig.forgejo._need_user("carol").id))
    assert who(same(mcp)) == "carol"
    with pytest.raises((BrowserError, ClientError)):
        rig.login("bob")


# -- a renamed user, for the operator


def test_revoke_finds_a_renamed_user_by_both_logins_before_and_after_the_broker_knows(make_installation):
    place = make_installation()
    place.start()
    for name, learnt in (("alice", True), ("alicia", True), ("alicia", False)):
        client = OAuthClient(place.url)
        client.login(None, "alice", "secret")
        place.forgejo.rename("alice", "alicia")
        if learnt:
            OAuthClient(place.url).login(None, "alicia", "secret")
        done = place.command("revoke", "--user", name.upper())
        assert done.returncode == 0 and "ended " in done.stdout, (name, done.stderr)
        assert client.refresh().json()["error"] == "invalid_grant"
        place.forgejo.rename("alicia", "alice")


def test_a_former_login_that_somebody_else_has_now_means_that_person(rig):
    mcp = rig.session("alice")
    rig.forgejo.rename("alice", "alicia")
    rig.login("alicia")
    rig.forgejo.add_user("alice")
    rig.login("alice")
    store, now = rig.broker.store, rig.clock.now()
    assert {grant.sub for grant in store.find_grants("user", "ALICE", now)} == {
        str(rig.forgejo._need_user("alice").id)
    }
    assert {grant.sub for grant in store.find_grants("user", "alicia", now)} == {"1001"} and mcp.token


# -- one store, one Forgejo


@pytest.fixture
def moved(make_installation):
    """A function that starts an Installation with a login of alice.

    It lets the installation's settings name another Forgejo.
    """
    others = []

    def make(*, created=None, same_people=True, app=True):
        place = make_installation()
        place.start()
        client = OAuthClient(place.url)
        client.login(None, "alice", "secret")
        place.broker.stop()
        other = FakeForgejo().start()
        others.append(other)
        if same_people:
            other.restore(place.forgejo.backup())
        if created:
            other._need_user("alice").created = created
        place.write(**{**place.settings, "forgejo_url": other.url})
        return place, client, other

    yield make
    for other in others:
        other.stop()


def refuses_to_start(place):
    done = place.command("serve")
    assert done.returncode == 2 and "rebind" in done.stderr, done.stderr
    return True


def test_a_store_of_another_Forgejo_refuses_to_start_names_rebind_and_check_says_so_too(moved):
    place, _, _ = moved()
    assert refuses_to_start(place)
    checked = place.command("check")
    assert checked.returncode == 1 and "rebind --forget" in checked.stdout
    assert refuses_to_start(place)  # nothing of that has changed the store


@pytest.mark.parametrize("spelled", ["{url}/", "HTTP://127.0.0.1:{port}"])
def test_another_spelling_of_the_same_URL_is_the_same_Forgejo(make_installation, spelled):
    place = make_installation()
    place.start()
    OAuthClient(place.url).login(None, "alice", "secret")
    place.broker.stop()
    url = spelled.format(url=place.forgejo.url, port=place.forgejo.port)
    place.write(**{**place.settings, "forgejo_url": url})
    place.start()


def test_the_default_port_written_out_is_the_same_URL(tmp_path):
    keyring = fjmcp_broker.Keyring([b"k" * 32])
    store = fjmcp_broker.Store(str(tmp_path / "db"), keyring)
    assert store.bound_to(fjmcp_broker._safe_url("https://Git.example.org:443/")) == "https://git.example.org"
    store.update_user("1", "alice", "", [], 1.0)
    assert store.bound_to("https://git.example.org/git") == "https://git.example.org"
    store.close()


def test_a_store_in_which_nobody_has_logged_in_takes_any_URL(make_installation):
    place = make_installation()
    place.start()
    place.broker.stop()
    with FakeForgejo() as other:
        place.write(**{**place.settings, "forgejo_url": other.url})
        place.start()
        place.broker.stop()


def test_rebind_to_the_same_Forgejo_keeps_every_login(moved):
    place, client, other = moved()
    done = place.command("rebind")
    assert done.returncode == 0 and other.url in done.stdout, done.stderr
    assert not any("authorization" in request.headers for request in other.requests[:])
    place.start()
    assert client.refresh().status == 200
    mcp = McpClient(client.mcp_url, client.tokens["access_token"])
    mcp.initialize()
    assert who(mcp) == "alice"
    place.broker.stop()
    assert "already" in place.command("rebind").stdout


@pytest.mark.parametrize("other", [{"created": LATER}, {"same_people": False, "created": LATER}])
def test_rebind_to_another_Forgejo_changes_nothing(moved, other):
    place, client, _ = moved(**other)
    done = place.command("rebind")
    assert done.returncode == 1 and "somebody else" in done.stderr and refuses_to_start(place)


@pytest.mark.parametrize("state", ["down", "nobody", "signin"])
def test_rebind_where_the_users_cannot_be_seen_changes_nothing(moved, state):
    place, client, other = moved()
    if state == "down":
        other.down()
    elif state == "nobody":
        other.delete_user("alice")
    else:
        other.require_signin = True
    done = place.command("rebind")
    assert done.returncode == 1 and "Nothing was changed" in done.stderr and refuses_to_start(place)


def test_rebind_where_only_who_is_signed_in_sees_users_says_so_and_asks_with_a_token(moved):
    place, _, other = moved()
    other.require_signin = True
    done = place.command("rebind")
    assert done.returncode == 1 and "REQUIRE_SIGNIN_VIEW" in done.stderr and "--token FILE" in done.stderr
    token = place.folder / "token"
    for text, code, said in (("", 2, "must hold one token"), ("no-token", 1, "scope read:user")):
        token.write_text(text)
        done = place.command("rebind", "--token", str(token))
        assert (done.returncode, said in done.stderr) == (code, True), done.stderr
    assert "cannot read" in place.command("rebind", "--token", str(place.folder / "absent")).stderr
    app = other.add_app(["http://127.0.0.1/"])
    access = other.issue_tokens("bob", app.client_id, "read:user")
    token.write_text(access["access_token"] + "\n")
    done = place.command("rebind", "--token", str(token))
    assert done.returncode == 0 and "all logins go on" in done.stdout, done.stderr
    assert access["access_token"] not in done.stdout + done.stderr


def test_rebind_beside_a_running_broker_is_refused(make_installation):
    place = make_installation()
    place.start()
    done = place.command("rebind")
    assert done.returncode == 2 and "another broker is using" in done.stderr


def test_rebind_forget_ends_all_logins_and_keeps_clients(moved):
    place, client, other = moved(same_people=False, created=LATER)
    done = place.command("rebind", "--forget")
    assert done.returncode == 0 and "ended 1 login" in done.stdout, done.stderr
    app = other.add_app([place.url + "/oauth/callback"])
    place.write(
        **{
            **place.settings,
            "forgejo_oauth_client_id": app.client_id,
            "forgejo_oauth_client_secret": app.client_secret,
        }
    )
    place.start()
    assert client.refresh().json()["error"] == "invalid_grant"
    mcp = McpClient(client.mcp_url, client.tokens["access_token"])
    assert mcp.post(CALL).status == 401
    client.login(None, "alice", "secret")  # the registration is still good
    assert not place.records("identity_changed")


def test_a_store_made_before_takes_the_present_URL(make_installation):
    place = make_installation()
    place.start()
    OAuthClient(place.url).login(None, "alice", "secret")
    place.broker.stop()
    with sqlite3.connect(place.settings["store_path"]) as db:
        db.execute("DELETE FROM meta WHERE name = 'forgejo_url'")
    db.close()
    assert place.command("check").returncode in (0, 1)
    with sqlite3.connect(place.settings["store_path"]) as db:
        assert not db.execute("SELECT * FROM meta WHERE name = 'forgejo_url'").fetchall()
    db.close()
    place.start()
    place.broker.stop()
    with FakeForgejo() as other:
        place.write(**{**place.settings, "forgejo_url": other.url})
        assert refuses_to_start(place)
