"""The account page: what a user has connected, seen and ended by that user alone."""

import urllib.parse

import pytest

from rigs import fake_forgejo
from rigs.browser import Browser, approve_login, open_account
from rigs.mcp_client import McpClient, OAuthClient
from rigs.rig import rows


def press(browser, page, name, value=None):
    """Press the button of this name (and value) on a page, whatever form it is in."""
    for form in page.forms:
        for button in form.buttons:
            if button.name == name and value in (None, button.value):
                return browser.submit(page, (name, button.value), form=form)
    raise AssertionError(f"no button {name} on {page.words}")


def status(rig, client):
    return (
        McpClient(rig.url + "/mcp", client.tokens["access_token"])
        .post({"jsonrpc": "2.0", "id": 1, "method": "ping"})
        .status
    )


def test_a_user_sees_their_applications_and_sessions_and_nobody_elses(rig):
    rig.login("alice", name="My editor")
    rig.login("alice", name="My reader", access="read")
    rig.session("alice")
    rig.login("bob", name="Bobs app")
    _, page = open_account(rig)
    assert page.status == 200 and "You are alice" in page.words
    assert (
        "My editor reads and writes" in page.words
        and "My reader reads only" in page.words
        and "Bobs app" not in page.words
    )
    assert page.text.count('name="session"') == 1 and page.headers["cache-control"] == "no-store"


def test_several_logins_of_one_application_are_shown_and_ended_as_one(rig):
    client = rig.login("alice")
    first = client.tokens
    client.login(None, "alice", "secret")
    browser, page = open_account(rig)
    assert page.text.count('name="client"') == 1
    page = press(browser, page, "client")
    assert "Nothing is connected." in page.words and page.url == rig.url + "/account"
    assert (
        status(rig, client) == 401
        and client.refresh(refresh_token=first["refresh_token"]).json()["error"] == "invalid_grant"
    )
    assert {record["reason"] for record in rig.log.named("token_revoked")} == {"ended by the user"}


def test_disconnecting_an_application_leaves_the_others_and_ends_its_sessions_and_children(rig):
    mcp, other = rig.session("alice"), rig.session("alice")
    browser, page = open_account(rig)
    press(browser, page, "client", mcp.oauth.client_id)
    rig.tick()
    assert mcp.post({"jsonrpc": "2.0", "id": 1, "method": "ping"}).status == 401 and "alice" in str(
        other.call_tool("get_my_user_info")
    )
    rig.log.wait("session_ended")


def test_ending_a_session_ends_its_child_at_once_and_keeps_the_login(rig):
    mcp = rig.session("alice")
    browser, page = open_account(rig)
    page = press(browser, page, "session")
    assert "session" not in page.words
    assert (
        mcp.post({"jsonrpc": "2.0", "id": 1, "method": "ping"}).status == 404
        and mcp.oauth.refresh().status == 200
    )
    rig.log.wait("child_stopped")


def test_nobody_ends_what_belongs_to_another(rig):
    mcp = rig.session("bob")
    browser, page = open_account(rig, "alice")
    fields = page.forms[-1].fields
    name = rows(rig.broker.store, "SELECT hash FROM sessions")[0].hash.hex()
    for added in ({"client": mcp.oauth.client_id}, {"session": name}):
        browser.post(rig.url + "/account/end", {**fields, **added})
    assert "bob" in str(mcp.call_tool("get_my_user_info"))


@pytest.mark.parametrize("path", ["/account/login", "/account/end"])
@pytest.mark.parametrize(
    "attack", ["no csrf", "wrong csrf", "cross-site", "other origin", "another browser", "other form"]
)
def test_C03_C04_C05_forms_of_the_account_page_are_believed_from_their_own_browser_only(rig, path, attack):
    client = rig.login("alice")
    if path == "/account/end":
        browser, page = open_account(rig)
    else:
        browser = Browser()
        page = browser.get(rig.url + "/account")
    fields, headers = {**page.forms[0].fields, "client": client.client_id}, {}
    if attack == "no csrf":
        del fields["csrf"]
    elif attack == "wrong csrf":
        fields["csrf"] = "x"
    elif attack == "cross-site":
        headers = {"Sec-Fetch-Site": "cross-site"}
    elif attack == "other origin":
        headers = {"Sec-Fetch-Site": None, "Origin": "https://evil.example"}
    elif attack == "another browser":
        browser, _ = open_account(rig, "bob")
    else:
        fields["csrf"] = browser.get(client.authorize_url()).form_with("login").fields["csrf"]
    before = len(rig.forgejo.requests)
    assert browser.post(rig.url + path, fields, headers=headers).status == 403
    assert len(rig.forgejo.requests) == before and status(rig, client) == 200


def test_C19_an_account_login_cannot_be_finished_in_another_browser(rig):
    browser = Browser()
    page = browser.get(rig.url + "/account")
    away = browser.submit(page, form=page.forms[0], stop=lambda url: url.startswith(rig.forgejo.url))
    state = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(away.redirected_to).query))["state"]
    before = rig.forgejo.count("/login/oauth/access_token")
    victim = Browser()
    victim.get(rig.url + "/account")
    assert victim.get(f"{rig.url}/oauth/callback?state={state}&code=x").status == 403
    assert rig.forgejo.count("/login/oauth/access_token") == before


def test_the_cookie_of_the_page_is_new_at_each_login_and_useless_after_leaving(rig):
    browser, page = open_account(rig)
    taken = browser.cookies.header(rig.url + "/account", "GET", "none")
    page = press(browser, page, "leave")
    assert "Log in at" in page.words
    assert "Log in at" in Browser().get(rig.url + "/account", headers={"Cookie": taken}).words
    open_account(rig, browser=browser)
    assert browser.cookies.header(rig.url + "/account", "GET", "none") != taken


def test_a_login_to_the_page_lasts_half_an_hour(rig):
    browser, page = open_account(rig)
    rig.clock.advance(1801)
    assert "Log in at" in browser.get(rig.url + "/account").words
    assert browser.submit(page, ("leave", "1"), form=page.forms[-1]).status in (400, 403)


def test_K12_whoever_may_not_use_the_server_sees_no_account(make_rig):
    rig = make_rig(allowed_users="bob")
    browser = Browser()
    page = browser.get(rig.url + "/account")
    page = browser.submit(page, form=page.forms[0])
    page = browser.submit(page, form=page.form_with("user_name"), user_name="alice", password="secret")
    if page.status == 200:
        page = browser.submit(page, ("granted", "true"))
    assert page.status == 403 and "may not use this server" in page.words
    assert "Log in at" in browser.get(rig.url + "/account").words


def test_trouble_at_forgejo_is_said_on_a_page(rig):
    browser, _ = open_account(rig)
    press(browser, browser.get(rig.url + "/account"), "leave")
    rig.forgejo.inject("/login/oauth/access_token", fake_forgejo.status(500))
    page = browser.get(rig.url + "/account")
    page = browser.submit(page, form=page.forms[0])
    assert page.status == 403 and "Forgejo cannot be reached" in page.words


def test_an_account_login_does_not_disturb_a_consent_page_that_is_open(rig):
    client = OAuthClient(rig.url)
    client.discover()
    client.register()
    browser = Browser()
    shown = browser.get(client.authorize_url())
    open_account(rig, browser=browser)
    approved = browser.submit(
        shown,
        ("decision", "approve"),
        form=shown.form_with("login"),
        access="full",
        stop=lambda url: url.startswith(rig.forgejo.url),
    )
    assert approved.redirected_to
    assert approve_login(browser, client.authorize_url(), "alice", "secret")


def test_the_page_survives_a_restart_and_an_unregistered_application_is_named_by_its_id(rig):
    client = rig.login("alice")
    browser, _ = open_account(rig)
    rig.broker.store.engine.run({}, ["DELETE FROM clients"])
    rig.restart()
    assert client.client_id in browser.get(rig.url + "/account").words


def test_rights_that_Forgejo_did_not_grant_are_named_with_the_remedy_on_the_page_and_in_the_log(rig):
    rig.forgejo.set_grant_scope("alice", rig.app.client_id, "openid profile write:repository")
    rig.login("alice")
    _, page = open_account(rig)
    assert "Some tools will not work" in page.words and "read:user" in page.words
    assert f'href="{rig.forgejo.url}/user/settings/applications"' in page.text
    assert "write:repository" not in page.words  # that one was granted
    record = rig.log.wait("login_lacks_scopes")[0]
    assert record["level"] == "warning" and record["login"] == "alice" and "connect again" in record["remedy"]
    assert "write:issue" in record["missing"].split() and "write:repository" not in record["missing"].split()


@pytest.mark.parametrize(
    "granted",
    [
        None,
        "openid profile all",
        "openid profile write:user write:misc write:repository write:issue write:notification "
        "write:organization",
    ],
)
def test_a_login_with_all_rights_hears_nothing_of_them(rig, granted):
    if granted:
        rig.forgejo.set_grant_scope("alice", rig.app.client_id, granted)
    rig.login("alice")
    _, page = open_account(rig)
    assert "will not work" not in page.words and not rig.log.named("login_lacks_scopes")


def test_where_Forgejo_does_not_say_what_it_granted_nothing_is_claimed(rig):
    rig.forgejo.set_grant_scope("alice", rig.app.client_id, "openid read:user")
    rig.forgejo.inject("/login/oauth/introspect", fake_forgejo.status(401, "no"), times=None)
    rig.login("alice")
    _, page = open_account(rig)
    assert "will not work" not in page.words and not rig.log.named("login_lacks_scopes")
