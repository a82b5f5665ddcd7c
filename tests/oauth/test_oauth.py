"""The authorization server, attacked and used through the whole broker."""

import hashlib
import json
import threading
import urllib.parse

import pytest

from rigs.browser import Browser, approve_login, query_of
from rigs.mcp_client import McpClient, OAuthClient
from rigs.rig import rows


def bearer_status(rig, token):
    return McpClient(rig.url + "/mcp", token).post({"jsonrpc": "2.0", "id": 1, "method": "ping"}).status


@pytest.fixture
def client(rig):
    client = OAuthClient(rig.url)
    client.discover()
    client.register()
    return client


def to_redirect(client, url):
    """What the client is told by a redirect from the authorization endpoint."""
    page = Browser(callbacks=(client.redirect_uri,)).get(url)
    assert page.redirected_to, (page.status, page.words)
    pairs = urllib.parse.parse_qsl(urllib.parse.urlsplit(page.redirected_to).query, keep_blank_values=True)
    assert len(dict(pairs)) == len(pairs), page.redirected_to  # each parameter once, `iss` above all
    return dict(pairs)


# -- discovery


@pytest.mark.parametrize(
    "path",
    [
        "/.well-known/oauth-authorization-server",
        "/.well-known/oauth-authorization-server/mcp",
        "/mcp/.well-known/oauth-authorization-server",
    ],
)
def test_the_authorization_server_metadata_is_in_all_its_places(rig, path):
    page = Browser().get(rig.url + path)
    metadata = json.loads(page.text)
    assert metadata["issuer"] == rig.url and metadata["code_challenge_methods_supported"] == ["S256"]
    assert metadata["scopes_supported"] == ["forgejo:read", "forgejo:write", "offline_access"]
    assert metadata["authorization_response_iss_parameter_supported"] is True
    assert None not in metadata.values() and "" not in metadata.values()
    assert page.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("path", ["", "/mcp", "/mcp/"])
def test_the_protected_resource_metadata_names_exactly_the_mcp_url(rig, path):
    metadata = json.loads(Browser().get(rig.url + "/.well-known/oauth-protected-resource" + path).text)
    assert metadata["resource"] == rig.url + "/mcp" and metadata["authorization_servers"] == [rig.url]
    assert "offline_access" not in metadata["scopes_supported"]


def test_what_is_not_there_under_well_known_is_a_json_404(rig):
    page = Browser().get(rig.url + "/.well-known/openid-configuration")
    assert page.status == 404 and json.loads(page.text)["error"]


# -- registration


@pytest.mark.parametrize(
    "uri",
    [
        "javascript:alert(1)",
        "JaVaScRiPt:x",
        "data:text/html,x",
        "file:///etc/passwd",
        "http://evil.com/cb",
        "https://a.com@evil.com/cb",
        "https://evil.com\\@a.com/cb",
        "http://localhost.evil.com/",
        "https://a.com/#f",
        "http://localhost@evil.com",
        "https://*.a.com/cb",
        "https://ex%61mple.com/",
        "https://a.com/?code=1",
        "http://localhost:99999/cb",
        "http://localhost:0/",
        "//a.com/cb",
        "",
        "unknown-scheme://cb",
        5,
        None,
    ],
)
def test_D02_U02_redirect_uris_that_deceive_are_not_registered(rig, uri):
    answer = OAuthClient(rig.url).register(redirect_uris=[uri])
    assert answer.status == 400 and answer.json()["error"] == "invalid_redirect_uri"


def test_cursors_set_of_three_is_registered_and_an_unknown_scheme_does_not_spoil_a_set(rig):
    uris = [
        "cursor://anysphere.cursor-mcp/oauth/callback",
        "https://www.cursor.com/agents/mcp/oauth/callback",
        "http://localhost:8787/callback",
    ]
    assert (
        OAuthClient(rig.url).register(redirect_uris=uris, application_type="web").json()["redirect_uris"]
        == uris
    )
    assert OAuthClient(rig.url).register(redirect_uris=[*uris, "foo://bar"]).json()["redirect_uris"] == uris


@pytest.mark.parametrize("uri", ["claude://claude.ai/mcp-auth-callback/sdk", "CLAUDE://claude.ai/x"])
def test_the_desktop_apps_own_scheme_is_registered_and_its_login_asked(rig, uri):
    client = OAuthClient(rig.url, redirect_uri=uri)
    client.discover()
    assert client.register().json()["redirect_uris"] == [uri]
    assert Browser().get(client.authorize_url()).status == 200


def test_a_registration_echoes_what_was_asked_and_has_nothing_empty(rig):
    answer = OAuthClient(rig.url).register(
        scope="claudeai", token_endpoint_auth_method="none", client_uri=None
    )
    document = answer.json()
    assert answer.status == 201 and document["scope"] == "claudeai" and "client_secret" not in document
    assert None not in document.values() and "" not in document.values()
    secret = OAuthClient(rig.url).register(token_endpoint_auth_method="client_secret_post").json()
    assert secret["client_secret"] and secret["client_secret_expires_at"] == 0


# -- authorize


def test_A01_an_unknown_client_is_shown_a_page_and_never_redirected(rig, client):
    page = Browser().get(client.authorize_url(client_id="nobody"))
    assert page.status == 400 and not page.redirected_to and "not registered" in page.text


@pytest.mark.parametrize(
    "uri",
    [
        "https://evil.example/cb",
        "http://localhost/callback/",
        "http://localhost/callback?x",
        "http://127.0.0.2/callback",
        "http://localhost/CALLBACK",
        "https://localhost/callback",
        "http://localhost:99999/callback",
        "http://localho\u017ft/callback",
        "http://LOCALHO\u017fT:1/callback",
        "",
    ],
)
def test_A02_U01_a_redirect_uri_that_does_not_match_is_shown_a_page(client, uri):
    page = Browser().get(client.authorize_url(redirect_uri=uri))
    assert page.status == 400 and not page.redirected_to


@pytest.mark.parametrize(
    "uri", ["http://localhost:49152/callback", "http://127.0.0.1:5/callback", "http://[::1]:65535/callback"]
)
def test_U04_a_loopback_redirect_uri_matches_on_any_port_and_name(client, uri):
    assert Browser().get(client.authorize_url(redirect_uri=uri)).status == 200


@pytest.mark.parametrize(
    "change, error",
    [
        ({"response_type": "token"}, "unsupported_response_type"),
        ({"response_type": None}, "invalid_request"),
        ({"code_challenge": None}, "invalid_request"),
        ({"code_challenge_method": "plain"}, "invalid_request"),
        ({"code_challenge_method": None}, "invalid_request"),
        ({"code_challenge": "short"}, "invalid_request"),
        ({"resource": "https://other.example/mcp"}, "invalid_target"),
        ({"response_mode": "fragment"}, "invalid_request"),
        ({"prompt": "none"}, "interaction_required"),
        ({"request": "x"}, "request_not_supported"),
        ({"request_uri": "https://x"}, "request_uri_not_supported"),
        ({"code_challenge": ""}, "invalid_request"),
        ({"response_type": ""}, "invalid_request"),
    ],
)
def test_A05_A06_A08_A09_A14_A15_A18_a_wrong_request_goes_back_with_error_state_and_iss(
    rig, client, change, error
):
    answer = to_redirect(client, client.authorize_url(state="s t&a=te", **change))
    assert answer["error"] == error and answer["state"] == "s t&a=te" and answer["iss"] == rig.url


@pytest.mark.parametrize("spelling", ["{}/mcp", "{}/mcp/", "{}", "{}/", None])
def test_A10_the_spellings_of_the_resource_that_clients_send_are_accepted(rig, client, spelling):
    url = client.authorize_url(resource=spelling and spelling.format(rig.url))
    assert Browser().get(url).status == 200


@pytest.mark.parametrize(
    "name", ["resource", "response_mode", "request", "request_uri", "scope", "prompt", "state", "nonce", "x"]
)
def test_an_empty_parameter_is_an_absent_one(rig, client, name):
    url = client.authorize_url(**{name: None})
    assert Browser().get(f"{url}&{name}=").status == Browser().get(f"{url}&{name}").status == 200


def test_an_empty_parameter_beside_a_full_one_is_no_repetition_and_two_full_ones_are(rig, client):
    url = client.authorize_url(state="s")
    assert Browser().get(url + "&client_id=&redirect_uri=&state=&resource=").status == 200
    assert to_redirect(client, url + "&scope=a&scope=b")["error"] == "invalid_request"
    assert Browser().get(url + "&client_id=" + client.client_id).status == 400


# -- consent and callback


def test_C01_every_login_is_asked_even_where_forgejo_would_ask_nothing(rig, client):
    browser = Browser()
    approve_login(browser, client.authorize_url(), "alice", "secret")
    page = browser.get(client.authorize_url())
    assert page.status == 200 and page.form_with("login", "csrf")


def test_C02_what_was_approved_in_one_browser_cannot_be_finished_in_another(rig, client):
    mine, theirs = Browser(), Browser()
    page = mine.get(client.authorize_url())
    approved = mine.submit(
        page,
        ("decision", "approve"),
        form=page.form_with("login"),
        access="full",
        stop=lambda url: url.startswith(rig.forgejo.url),
    )
    before = rig.forgejo.count("/login/oauth/access_token")
    shown = theirs.get(approved.redirected_to)
    login = theirs.submit(shown, form=shown.form_with("user_name"), user_name="alice", password="secret")
    if login.forms and not login.redirected_to:
        login = theirs.submit(login, ("granted", "true"), form=0)
    assert login.status == 403
    assert rig.forgejo.count("/login/oauth/access_token") == before


def test_C03_C05_a_form_fetched_elsewhere_or_changed_is_refused(rig, client):
    attacker, victim = Browser(), Browser()
    fields = attacker.get(client.authorize_url()).form_with("login").fields
    own = victim.get(client.authorize_url()).form_with("login").fields
    other = victim.get(client.authorize_url()).form_with("login").fields
    for form in (
        {**own, "csrf": "x"},
        {**own, "csrf": ""},
        {**own, "csrf": other["csrf"]},
        {**own, "csrf": fields["csrf"]},
        {**own, "login": other["login"]},
        fields,
        {**fields, "csrf": "x"},
        {k: v for k, v in fields.items() if k != "csrf"},
        {**fields, "login": fields["login"][:-2]},
    ):
        answer = victim.post(rig.url + "/oauth/consent", {**form, "decision": "approve", "access": "full"})
        assert answer.status == 403 and not answer.redirected_to


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"},
        {"Sec-Fetch-Site": None, "Origin": "null"},
        {"Sec-Fetch-Site": None, "Origin": "https://evil.example"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_C04_a_form_sent_by_another_site_is_refused(rig, client, headers):
    browser = Browser()
    fields = browser.get(client.authorize_url()).form_with("login").fields
    answer = browser.post(rig.url + "/oauth/consent", {**fields, "decision": "approve"}, headers=headers)
    assert answer.status == 403


def test_C04_a_form_without_both_headers_is_believed_by_its_cookie_alone(rig, client):
    browser = Browser()
    fields = browser.get(client.authorize_url()).form_with("login").fields
    answer = {**fields, "decision": "approve", "access": "full"}
    headers = {"Sec-Fetch-Site": None, "Origin": None}
    url = rig.url + "/oauth/consent"
    stop = lambda url: url.startswith(rig.forgejo.url)
    assert Browser().post(url, answer, headers=headers, stop=stop).status == 403
    assert browser.post(url, {**answer, "csrf": "x"}, headers=headers, stop=stop).status == 403
    assert browser.post(url, answer, headers=headers, stop=stop).redirected_to


DECISIONS = [
    {"decision": "approve", "access": "full"},
    {"decision": "approve", "access": "read"},
    {"decision": "deny", "access": "full"},
]


def decide(rig, browser, page, client, **decision):
    """The answer to a consent form."""
    fields = {**page.form_with("login").fields, **decision}
    stop = lambda url: url.startswith((rig.forgejo.url, client.redirect_uri))
    return browser.post(rig.url + "/oauth/consent", fields, stop=stop)


def finish(rig, browser, client, url):
    """From Forgejo's login page to the broker's callback: the callback's URL, which was not opened yet."""
    stop = lambda url: url.startswith(rig.url + "/oauth/callback")
    page = browser.get(url, stop=stop)
    if not page.redirected_to:
        page = browser.submit(
            page, form=page.form_with("user_name"), stop=stop, user_name="alice", password="secret"
        )
    return (
        page if page.redirected_to else browser.submit(page, ("granted", "true"), stop=stop)
    ).redirected_to


@pytest.mark.parametrize("first", DECISIONS)
def test_C05_the_same_decision_of_a_form_is_answered_twice_alike_and_another_is_refused(rig, client, first):
    browser = Browser()
    page = browser.get(client.authorize_url())
    answer = decide(rig, browser, page, client, **first).redirected_to
    rig.restart()
    assert answer and decide(rig, browser, page, client, **first).redirected_to == answer
    for other in DECISIONS:
        if other != first:
            refused = decide(rig, browser, page, client, **other)
            assert refused.status == 400 and "answered already" in refused.text
    assert decide(rig, browser, page, client, **first).redirected_to == answer
    assert len(rows(rig.broker.store, "SELECT 1 FROM logins")) == 1
    rig.clock.advance(601)
    assert "expired" in decide(rig, browser, page, client, **first).text


def test_C05_the_same_decision_is_answered_alike_as_long_as_its_login_lives(rig, client):
    rig.clock.stop()
    browser = Browser()
    page = browser.get(client.authorize_url())
    rig.clock.advance(599)
    answer = decide(rig, browser, page, client, **DECISIONS[0]).redirected_to
    rig.clock.advance(300)  # the form's own time is over
    assert answer and decide(rig, browser, page, client, **DECISIONS[0]).redirected_to == answer


def test_C05_of_many_clicks_at_once_all_lead_to_one_login(rig, client):
    page_browser = Browser()
    page = page_browser.get(client.authorize_url())
    barrier, places = threading.Barrier(8), []

    def click(decision):
        barrier.wait(30)
        places.append((decision, decide(rig, page_browser, page, client, **DECISIONS[decision])))

    threads = [threading.Thread(target=click, args=(number % 2,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    led = {(decision, answer.redirected_to) for decision, answer in places if answer.redirected_to}
    assert len(led) == 1 and len(places) == 8
    assert all((decision == next(iter(led))[0]) == bool(answer.redirected_to) for decision, answer in places)
    assert len(rig.log.named("consent_given")) == 1


def test_K04_a_callback_sent_again_gives_the_same_redirect_until_the_code_is_redeemed(rig, client):
    browser = Browser()
    page = browser.get(client.authorize_url(state="s"))
    to_forgejo = decide(rig, browser, page, client, **DECISIONS[0]).redirected_to
    url = finish(rig, browser, client, to_forgejo)
    stop = lambda url: url.startswith(client.redirect_uri)
    first = browser.get(url, stop=stop).redirected_to
    rig.restart()
    again = finish(
        rig, browser, client, to_forgejo
    )  # the second click: the same state, another code of Forgejo
    assert (
        query_of(again)["state"] == query_of(url)["state"]
        and query_of(again)["code"] != query_of(url)["code"]
    )
    for repeated in (url, again):
        assert browser.get(repeated, stop=stop).redirected_to == first
        assert Browser().get(repeated, stop=stop).status == 403
    assert client.redeem(query_of(first)["code"]).status == 200
    page = browser.get(again, stop=stop)
    assert page.status == 200 and not page.redirected_to and "is connected" in page.text
    assert client.refresh().status == 200 and len(rows(rig.broker.store, "SELECT 1 FROM grants")) == 1


def test_K04_a_callback_sent_again_after_its_code_has_expired_says_so(rig, client):
    browser = Browser()
    page = browser.get(client.authorize_url())
    url = finish(rig, browser, client, decide(rig, browser, page, client, **DECISIONS[0]).redirected_to)
    stop = lambda url: url.startswith(client.redirect_uri)
    assert browser.get(url, stop=stop).redirected_to
    rig.clock.advance(61)
    page = browser.get(url, stop=stop)
    assert page.status == 400 and "expired" in page.text


def test_K04_a_second_callback_waits_for_the_first(rig, client, monkeypatch):
    browser = Browser()
    page = browser.get(client.authorize_url())
    url = finish(rig, browser, client, decide(rig, browser, page, client, **DECISIONS[0]).redirected_to)
    here, on = threading.Event(), threading.Event()
    login = rig.broker.upstream.login

    def slow(*arguments):
        here.set()
        assert on.wait(20)
        return login(*arguments)

    monkeypatch.setattr(rig.broker.upstream, "login", slow)
    stop = lambda url: url.startswith(client.redirect_uri)
    places = []
    threads = [
        threading.Thread(target=lambda: places.append(browser.get(url, stop=stop).redirected_to))
        for _ in "ab"
    ]
    threads[0].start()
    assert here.wait(30)
    threads[1].start()
    threads[1].join(0.3)
    assert not places
    on.set()
    for thread in threads:
        thread.join(20)
    assert len(places) == 2 and len(set(places)) == 1 and "code" in query_of(places[0])


def test_K04_a_login_that_forgejo_refused_is_refused_alike_when_its_callback_comes_again(rig, client):
    browser = Browser()
    page = browser.get(client.authorize_url(state="s"))
    to_forgejo = decide(rig, browser, page, client, **DECISIONS[0]).redirected_to
    url = f"{rig.url}/oauth/callback?error=access_denied&state={query_of(to_forgejo)['state']}"
    stop = lambda url: url.startswith(client.redirect_uri)
    first = browser.get(url, stop=stop).redirected_to
    assert query_of(first)["error"] == "access_denied" and browser.get(url, stop=stop).redirected_to == first


def test_C07_two_tabs_do_not_disturb_each_other(rig, client):
    browser = Browser()
    first = browser.get(client.authorize_url())
    second = browser.get(client.authorize_url())
    states = set()
    for page in (first, second):
        answer = browser.submit(
            page,
            ("decision", "approve"),
            form=page.form_with("login"),
            access="full",
            stop=lambda url: url.startswith(rig.forgejo.url),
        )
        states.add(query_of(answer.redirected_to)["state"])
    assert len(states) == 2


def test_C14_a_refusal_goes_back_to_the_client(rig, client):
    callback = approve_login(Browser(), client.authorize_url(state="s"), "alice", "secret", decision="deny")
    answer = query_of(callback)
    assert (answer["error"], answer["state"], answer["iss"]) == ("access_denied", "s", rig.url)


def test_C14_what_was_refused_cannot_be_approved_with_the_same_form(rig, client):
    browser = Browser(callbacks=(client.redirect_uri,))
    page = browser.get(client.authorize_url())
    form = page.form_with("login")
    assert "access_denied" in browser.submit(page, ("decision", "deny"), form=form).redirected_to
    again = browser.submit(page, ("decision", "approve"), form=form, access="full", stop=lambda url: True)
    assert again.status == 400 and not again.redirected_to
    assert rig.forgejo.count("/login/oauth/authorize") == 0


def test_a_consent_page_left_too_long_says_so(rig, client):
    browser = Browser()
    page = browser.get(client.authorize_url())
    rig.clock.advance(601)
    answer = browser.submit(page, ("decision", "approve"), form=page.form_with("login"), access="full")
    assert answer.status == 400 and "expired" in answer.text


def test_the_login_survives_a_restart_between_page_and_callback(rig, client):
    browser = Browser()
    page = browser.get(client.authorize_url())
    rig.restart()
    approved = browser.submit(
        page,
        ("decision", "approve"),
        form=page.form_with("login"),
        access="full",
        stop=lambda url: url.startswith(rig.forgejo.url),
    )
    rig.restart()
    shown = browser.get(approved.redirected_to)
    done = browser.submit(
        shown,
        form=shown.form_with("user_name"),
        stop=lambda url: url.startswith("http://localhost/callback"),
        user_name="alice",
        password="secret",
    )
    if not done.redirected_to:
        done = browser.submit(
            done, ("granted", "true"), stop=lambda url: url.startswith("http://localhost/callback")
        )
    assert "code" in query_of(done.redirected_to)


def test_K01_K04_a_state_is_taken_once(rig, client):
    page = Browser().get(rig.url + "/oauth/callback?code=x&state=unknown")
    assert page.status == 400
    for query in ("", "?state=a", "?code=a", "?code=a&code=b&state=c", "?code=a&error=b&state=c"):
        assert Browser().get(rig.url + "/oauth/callback" + query).status == 400


def test_K12_someone_who_is_not_allowed_gets_no_code_and_leaves_no_credential(make_rig):
    rig = make_rig(allowed_users="bob")
    client = OAuthClient(rig.url)
    client.discover()
    client.register()
    answer = query_of(approve_login(Browser(), client.authorize_url(), "alice", "secret"))
    assert answer["error"] == "access_denied"
    assert rig.broker.store.user("1001") is None
    rig.login("bob")


# -- token


@pytest.fixture
def code(client):
    return query_of(approve_login(Browser(), client.authorize_url(), "alice", "secret"))["code"]


@pytest.mark.parametrize(
    "change, error",
    [
        ({"code_verifier": "x" * 43}, "invalid_grant"),
        ({"code_verifier": None}, "invalid_request"),
        ({"code_verifier": "x" * 42}, "invalid_request"),
        ({"redirect_uri": "http://localhost:1/callback"}, "invalid_grant"),
        ({"resource": "https://other.example/"}, "invalid_target"),
        ({"grant_type": "password"}, "unsupported_grant_type"),
        ({"grant_type": None}, "invalid_request"),
    ],
)
def test_T01_T05_T10_T15_a_wrong_redemption_is_refused_and_the_code_stays(client, code, change, error):
    answer = client.redeem(code, **change)
    assert (
        answer.status == 400
        and answer.json()["error"] == error
        and "no-store" in answer.headers["cache-control"]
    )
    assert client.redeem(code).status == 200


@pytest.mark.parametrize("name", ["redirect_uri", "resource", "scope", "client_secret", "client_assertion"])
@pytest.mark.parametrize("value", ["", None])
def test_a_code_is_redeemed_without_what_need_not_be_sent(client, code, name, value):
    assert client.redeem(code, **{name: value}).status == 200


def test_T01_a_code_is_burned_after_three_wrong_verifiers(client, code):
    for _ in range(3):
        client.redeem(code, code_verifier="x" * 43)
    assert client.redeem(code).json()["error"] == "invalid_grant"


def test_T04_another_client_cannot_redeem_or_spoil_a_code(rig, client, code):
    other = OAuthClient(rig.url)
    other.discover()
    other.register()
    assert client.redeem(code, client_id=other.client_id).json()["error"] == "invalid_grant"
    assert client.redeem(code).status == 200


def test_T06_a_replayed_code_ends_only_the_grant_it_made(rig, client, code):
    tokens = client.redeem(code).json()
    other = rig.login("alice")
    assert client.redeem(code).json()["error"] == "invalid_grant"
    assert bearer_status(rig, tokens["access_token"]) == 401
    assert bearer_status(rig, other.tokens["access_token"]) == 200


def test_T08_of_many_parallel_redemptions_one_succeeds(rig, client, code):
    answers, barrier = [], threading.Barrier(12)

    def redeem():
        barrier.wait(30)
        answers.append(client.redeem(code))

    threads = [threading.Thread(target=redeem) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(answer.status for answer in answers) == [200] + [400] * 11
    made = next(answer.json() for answer in answers if answer.status == 200)
    assert bearer_status(rig, made["access_token"]) == 401  # the others were replays
    assert client.refresh(refresh_token=made["refresh_token"]).json()["error"] == "invalid_grant"


def test_T09_a_code_lives_a_minute(rig, client, code):
    rig.clock.advance(61)
    assert client.redeem(code).json()["error"] == "invalid_grant"


@pytest.mark.parametrize("method", ["none", "client_secret_post", "client_secret_basic"])
def test_T13_every_way_of_client_authentication_works_and_a_wrong_secret_does_not(rig, method):
    client = OAuthClient(rig.url, auth_method=method)
    client.login(None, "alice", "secret")
    assert client.refresh().status == 200
    if method != "none":
        assert client.refresh(
            client_secret="wrong",
            **({"client_id": client.client_id} if method == "client_secret_post" else {}),
        ).status == (401 if method == "client_secret_post" else 400)  # a secret in two places is no secret


# -- refresh


def test_R01_a_refresh_rotates_and_both_access_tokens_work(rig):
    client = rig.login()
    before = client.tokens
    after = client.refresh().json()
    assert after["refresh_token"] != before["refresh_token"]
    assert bearer_status(rig, before["access_token"]) == bearer_status(rig, after["access_token"]) == 200


def test_R03_a_token_sent_again_soon_gets_the_newest_pair_and_that_still_refreshes_an_hour_later(rig):
    client = rig.login()
    rig.clock.stop()
    r0 = client.tokens["refresh_token"]
    r1 = client.refresh(refresh_token=r0).json()["refresh_token"]
    newest = client.refresh(refresh_token=r1).json()
    rig.clock.advance(100)
    again = client.refresh(refresh_token=r0).json()
    assert (again["refresh_token"], again["access_token"]) == (
        newest["refresh_token"],
        newest["access_token"],
    )
    rig.clock.advance(3600)
    assert client.refresh(refresh_token=again["refresh_token"]).status == 200


def test_R02_a_token_sent_again_late_ends_its_grant(rig):
    client = rig.login()
    r0 = client.tokens["refresh_token"]
    newest = client.refresh(refresh_token=r0).json()
    rig.clock.advance(121)
    assert client.refresh(refresh_token=r0).json()["error"] == "invalid_grant"
    assert client.refresh(refresh_token=newest["refresh_token"]).json()["error"] == "invalid_grant"
    assert bearer_status(rig, newest["access_token"]) == 401
    assert rig.log.named("reuse_detected")


def test_R04_parallel_refreshes_all_succeed_with_one_pair(rig):
    client = rig.login()
    r0, answers, barrier = client.tokens["refresh_token"], [], threading.Barrier(20)

    def refresh():
        barrier.wait(30)
        answers.append(client.refresh(refresh_token=r0))

    threads = [threading.Thread(target=refresh) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert {answer.status for answer in answers} == {200}
    assert len({answer.json()["refresh_token"] for answer in answers}) == 1
    assert len({answer.json()["access_token"] for answer in answers}) == 1


def test_R06_a_wrong_client_or_resource_rotates_nothing(rig):
    client, other = rig.login(), rig.login("bob")
    r0 = client.tokens["refresh_token"]
    assert other.refresh(refresh_token=r0).json()["error"] == "invalid_grant"
    assert (
        client.refresh(refresh_token=r0, resource="https://other.example").json()["error"] == "invalid_target"
    )
    row = rig.broker.store.refresh_token(hashlib.sha256(r0.encode()).digest())
    assert row.rotated_at is None and client.refresh(refresh_token=r0).status == 200


@pytest.mark.parametrize(
    "named",
    [
        "forgejo:read forgejo:write",
        "forgejo:write",
        " forgejo:write  forgejo:read ",
        "forgejo:read forgejo:write offline_access openid",
        "claudeai",
        "",
        None,
    ],
)
def test_R08_T16_a_refresh_that_names_more_than_was_granted_gets_what_was_granted(rig, named):
    client = rig.login(access="read")
    for _ in range(2):
        answer = client.refresh(scope=named)
        assert answer.status == 200 and answer.json()["scope"] == "forgejo:read"
        row = rig.broker.store.bearer(
            hashlib.sha256(answer.json()["access_token"].encode()).digest(), rig.clock.now()
        )
        assert row.scope == "forgejo:read"


@pytest.mark.parametrize("first", ["forgejo:read", "forgejo:write", None])
@pytest.mark.parametrize("again", ["forgejo:read", "forgejo:write", "forgejo:write forgejo:read", "", None])
def test_R08_a_refresh_sent_again_says_the_scope_that_its_token_has(rig, first, again):
    client = rig.login()
    r0 = client.tokens["refresh_token"]
    before = client.refresh(scope=first).json()
    answer = client.refresh(refresh_token=r0, scope=again).json()
    row = rig.broker.store.bearer(hashlib.sha256(answer["access_token"].encode()).digest(), rig.clock.now())
    assert (
        answer["scope"]
        == row.scope
        == (again if again in ("forgejo:read", "forgejo:write") else row.grant_scope)
    )
    assert (answer["access_token"] == before["access_token"]) == (answer["scope"] == before["scope"])
    assert (
        client.refresh(refresh_token=answer["refresh_token"], scope=None).json()["scope"] == row.grant_scope
    )


def test_R12_R13_R14_revocation(rig):
    client, other = rig.login(), rig.login("bob")
    assert other.revoke(client.tokens["refresh_token"]).status == 200
    assert bearer_status(rig, client.tokens["access_token"]) == 200
    assert client.revoke("garbage").status == 200
    extra = client.refresh().json()
    assert client.revoke(extra["access_token"]).status == 200
    assert bearer_status(rig, extra["access_token"]) == 401
    assert client.revoke(extra["refresh_token"]).status == 200
    assert client.refresh(refresh_token=extra["refresh_token"]).json()["error"] == "invalid_grant"


# -- upstream


def test_K16_a_second_login_of_a_user_leaves_the_first_client_working_through_its_next_refresh(rig):
    first = rig.session("alice")
    rig.session("alice")
    rig.clock.advance(3590)
    rig.tick()
    tokens = first.oauth.refresh().json()
    mcp = McpClient(first.url, tokens["access_token"], session_id=first.session_id)
    rig.clock.advance(60)
    assert "alice" in mcp.call_tool("get_my_user_info")["content"][0]["text"]
    assert rig.broker.store.user("1001").status == "active"


def test_a_refused_upstream_refresh_logs_out_and_one_login_revives_all(rig):
    mcp = rig.session()
    rig.forgejo.revoke_grant("alice", rig.app.client_id)
    rig.clock.advance(3600)
    tokens = None
    answer = mcp.oauth.refresh()
    tokens = answer.json()
    stale = McpClient(mcp.url, tokens["access_token"], session_id=mcp.session_id)
    refused = stale.post(
        {
            "jsonrpc": "2.0",
            "id": 1,
            "method": "tools/call",
            "params": {"name": "get_echo", "arguments": {"text": "x"}},
        }
    )
    if refused.status == 200:  # the child was still awake; the reaper's refresh is what finds out
        rig.tick()
        rig.log.wait("logged_out_upstream")
        refused = stale.post({"jsonrpc": "2.0", "id": 2, "method": "ping"})
    assert refused.status == 401 and 'error="invalid_token"' in refused.headers["www-authenticate"]
    assert mcp.oauth.refresh(refresh_token=tokens["refresh_token"]).json()["error"] == "invalid_grant"
    rig.login("alice")
    assert stale.post({"jsonrpc": "2.0", "id": 3, "method": "ping"}).status == 200


def test_K19_when_forgejo_is_away_nobody_is_logged_out(rig):
    mcp = rig.session()
    rig.forgejo.down()
    rig.clock.advance(3600)
    tokens = mcp.oauth.refresh().json()
    rig.tick()
    rig.forgejo.up()
    rig.clock.advance(120)
    revived = McpClient(mcp.url, tokens["access_token"], session_id=mcp.session_id)
    assert "alice" in revived.call_tool("get_my_user_info")["content"][0]["text"]


def test_G03_nothing_usable_lies_in_the_database(rig):
    client = rig.login()
    client.refresh()
    upstream = rig.forgejo.requests
    secrets_seen = [
        client.tokens["access_token"],
        client.tokens["refresh_token"],
        rig.app.client_secret,
        "secret",
    ]
    rig.stop()
    data = b"".join(path.read_bytes() for path in rig.directory.glob("broker.db*"))
    for secret in secrets_seen[:3]:
        assert secret.encode() not in data
    assert b"eyJ" not in data and upstream
