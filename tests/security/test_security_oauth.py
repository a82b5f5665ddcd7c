"""The security catalogue of the authorization server, case by case over sockets.

Groups A, C, K, T, R, D and U. What test_oauth.py and test_clients.py show already is not repeated;
docs/security.md says which test shows which case.
"""

import base64
import hashlib
import json
import threading
import urllib.parse
from concurrent.futures import ThreadPoolExecutor

import pytest

import fjmcp_broker
from rigs import fake_forgejo
from rigs.browser import Browser, approve_login
from rigs.fake_forgejo import MISSING
from rigs.mcp_client import McpClient, OAuthClient, Wire
from rigs.rig import rows

FORM = {"Content-Type": "application/x-www-form-urlencoded"}
CHALLENGE = "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM"


def http(rig, method, path, body=None, headers=None):
    wire = Wire(rig.url)
    try:
        return wire.exchange(
            method, rig.url + path, body.encode() if isinstance(body, str) else body, headers or {}
        )
    finally:
        wire.close()


def query_of(url):
    return dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(url).query, keep_blank_values=True))


def registered(rig, **asked):
    client = OAuthClient(rig.url)
    client.discover()
    answer = client.register(**asked)
    assert answer.status == 201, answer.text
    return client


@pytest.fixture
def client(rig):
    return registered(rig)


def code_for(client, user="alice", browser=None, **arguments):
    return query_of(approve_login(browser or Browser(), client.authorize_url(**arguments), user, "secret"))[
        "code"
    ]


def bearer_status(rig, token):
    return McpClient(rig.url + "/mcp", token).post({"jsonrpc": "2.0", "id": 1, "method": "ping"}).status


def count(rig, table):
    return rows(rig.broker.store, f"SELECT count(*) AS n FROM {table}")[0].n


def to_forgejo(rig, browser, client, **arguments):
    """Approve, and stop where the browser would go to Forgejo; the page whose `redirected_to` that is."""
    page = browser.get(client.authorize_url(**arguments))
    return browser.submit(
        page,
        ("decision", "approve"),
        form=page.form_with("login"),
        access="full",
        stop=lambda url: url.startswith(rig.forgejo.url),
    )


def at_callback(rig, browser, client, user="alice"):
    """The callback URL with Forgejo's answer, not yet visited."""
    stop = lambda url: url.startswith(rig.url + "/oauth/callback")
    page = browser.get(to_forgejo(rig, browser, client).redirected_to, stop=stop)
    while not page.redirected_to:
        if page.forms and any(form.fields.keys() & {"user_name"} for form in page.forms):
            page = browser.submit(
                page, form=page.form_with("user_name"), stop=stop, user_name=user, password="secret"
            )
        else:
            page = browser.submit(page, ("granted", "true"), stop=stop)
    return page.redirected_to


# -- A. the authorization endpoint


def test_A01_an_unknown_client_leaves_no_row_and_no_cookie(rig, client):
    before = count(rig, "clients")
    page = Browser().get(client.authorize_url(client_id="fjd_nobody"))
    assert page.status == 400 and not page.redirected_to and "set-cookie" not in page.headers
    assert (count(rig, "clients"), count(rig, "logins")) == (before, 0)


@pytest.mark.parametrize("uris", [["https://a.example/cb"], ["https://a.example/cb", "https://b.example/cb"]])
def test_A03_a_missing_redirect_uri_is_never_guessed(rig, uris):
    page = Browser().get(registered(rig, redirect_uris=uris).authorize_url(redirect_uri=None))
    assert page.status == 400 and not page.redirected_to


@pytest.mark.parametrize(
    "name", ["client_id", "redirect_uri", "state", "code_challenge", "scope", "response_type"]
)
def test_A04_a_parameter_sent_twice_is_refused(rig, client, name):
    page = Browser(callbacks=(client.redirect_uri,)).get(
        client.authorize_url(state="s", scope="forgejo:read") + f"&{name}=other"
    )
    if name in ("client_id", "redirect_uri"):
        assert page.status == 400 and not page.redirected_to
    else:
        assert query_of(page.redirected_to)["error"] == "invalid_request"


@pytest.mark.parametrize(
    "challenge",
    ["a" * 42, "a" * 44, "a" * 200, "+" * 43, "/" * 43, "a" * 42 + "=", "ä" * 43, "a" * 42 + "\0", " " * 43],
)
def test_A07_a_challenge_is_43_characters_of_base64url(client, challenge):
    page = Browser(callbacks=(client.redirect_uri,)).get(client.authorize_url(code_challenge=challenge))
    assert page.status == 400 or query_of(page.redirected_to)["error"] == "invalid_request"


@pytest.mark.parametrize(
    "change, error",
    [
        ({"code_challenge_method": "s256"}, "invalid_request"),
        ({"code_challenge_method": "S512"}, "invalid_request"),
        ({"response_type": "code token"}, "unsupported_response_type"),
        ({"response_type": "id_token"}, "unsupported_response_type"),
        ({"response_mode": "form_post"}, "invalid_request"),
        ({"response_mode": "web_message"}, "invalid_request"),
    ],
)
def test_A06_A08_A09_other_methods_types_and_modes_are_never_honoured(client, change, error):
    page = Browser(callbacks=(client.redirect_uri,)).get(client.authorize_url(**change))
    assert query_of(page.redirected_to)["error"] == error and "#" not in page.redirected_to


@pytest.mark.parametrize(
    "resource",
    [
        "https://other.example/mcp",
        "{}/mcp#frag",
        "/mcp",
        "{}/other",
        "{}/MCP",
        "{}.evil.example/mcp",
        "{}@evil.example/mcp",
    ],
)
def test_A10_a_foreign_resource_is_an_invalid_target(rig, client, resource):
    page = Browser(callbacks=(client.redirect_uri,)).get(
        client.authorize_url(resource=resource.format(rig.url))
    )
    assert query_of(page.redirected_to)["error"] == "invalid_target"


def test_A10_a_foreign_resource_beside_ours_is_an_invalid_target(client):
    page = Browser(callbacks=(client.redirect_uri,)).get(
        client.authorize_url() + "&resource=https%3A%2F%2Fother.example%2Fmcp"
    )
    assert query_of(page.redirected_to)["error"] == "invalid_target"


@pytest.mark.parametrize(
    "resource, granted",
    [
        ("HTTPS://Broker.EXAMPLE/mcp", True),
        ("https://broker.example/MCP", False),
        ("https://broker.example/mcp/x", False),
    ],
)
def test_A11_the_case_of_the_host_does_not_matter_and_that_of_the_path_does(make_rig, resource, granted):
    rig = make_rig(public_url="https://broker.example")
    rig.broker.store.add_client("c", "dynamic", "C", ["https://a.example/cb"], None, "none", {}, 0)
    query = urllib.parse.urlencode(
        {
            "response_type": "code",
            "client_id": "c",
            "redirect_uri": "https://a.example/cb",
            "code_challenge": CHALLENGE,
            "code_challenge_method": "S256",
            "resource": resource,
        }
    )
    answer = http(rig, "GET", f"/oauth/authorize?{query}")
    if granted:
        assert answer.status == 200
    else:
        assert query_of(answer.headers["Location"])["error"] == "invalid_target"


def test_A11_the_resource_is_compared_as_a_url_and_stored_canonical(rig, client):
    code = code_for(client, resource=rig.url.replace("http", "HTTP") + "/mcp/")
    assert client.redeem(code, resource=None).status == 200
    assert rows(rig.broker.store, "SELECT resource FROM grants")[0].resource == rig.url + "/mcp"


@pytest.mark.parametrize(
    "state",
    [
        "a b&c=d",
        "é€",
        "<script>alert(1)</script>",
        "%0d%0aX-Evil: 1",
        "a\r\nX-Evil: 1",
        '"><img>',
        "s" * 2048,
    ],
)
def test_A13_the_state_comes_back_byte_for_byte_and_splits_nothing(rig, client, state):
    answer = query_of(
        approve_login(Browser(), client.authorize_url(state=state), "alice", "secret", decision="deny")
    )
    assert answer["state"] == state
    page = Browser().get(client.authorize_url(state=state))
    assert page.status == 200 and "x-evil" not in page.headers and "<script>alert" not in page.text


def test_A13_a_state_that_is_too_long_or_not_utf8_is_refused(rig, client):
    page = Browser(callbacks=(client.redirect_uri,)).get(client.authorize_url(state="s" * 2049))
    assert query_of(page.redirected_to)["error"] == "invalid_request"
    for name in ("state", "x"):
        assert Browser().get(client.authorize_url(state=None) + f"&{name}=%FF").status == 400


def test_A12_a_scope_that_is_too_long_is_refused(client):
    page = Browser(callbacks=(client.redirect_uri,)).get(client.authorize_url(scope="s" * 4097))
    assert query_of(page.redirected_to)["error"] == "invalid_request"
    assert Browser().get(client.authorize_url(scope="s" * 4096)).status == 200


def test_A14_after_an_approval_prompt_none_is_no_silent_code_either(client):
    browser = Browser()
    approve_login(browser, client.authorize_url(), "alice", "secret")
    page = browser.get(
        client.authorize_url(prompt="none"),
        stop=lambda url: url.startswith(client.redirect_uri),
        initiator="https://evil.example/",
    )
    answer = query_of(page.redirected_to)
    assert answer["error"] == "interaction_required" and "code" not in answer


class NothingFetched:
    """The public web of a broker that must ask nothing of it."""

    def __init__(self):
        self.asked = []

    def get(self, url, cap):
        self.asked.append(url)
        raise fjmcp_broker.FetchFailed("nothing may be fetched")


@pytest.mark.parametrize("added", [{"request": "a.b.c"}, {"request_uri": "https://app.example/request"}])
def test_A15_a_request_object_is_neither_read_nor_fetched(make_rig, added):
    web = NothingFetched()
    client = registered(make_rig(web=web))
    page = Browser(callbacks=(client.redirect_uri,)).get(client.authorize_url(**added))
    assert query_of(page.redirected_to)["error"] == f"{next(iter(added))}_not_supported" and not web.asked


def test_A16_an_authorization_request_by_POST_is_refused(rig, client):
    query = client.authorize_url().partition("?")[2]
    answer = http(rig, "POST", "/oauth/authorize", query, FORM)
    assert answer.status == 405 and answer.headers["Allow"] == "GET, HEAD"


def test_A17_oversized_and_ambiguous_queries_are_refused(rig, client):
    assert Browser().get(client.authorize_url() + "&" + "&".join(f"a{n}=1" for n in range(200))).status == 400
    assert http(rig, "GET", "/oauth/authorize?x=" + "x" * 65536).status == 414
    assert (
        Browser().get(client.authorize_url(client_id=None) + f"&x=1;client_id={client.client_id}").status
        == 400
    )


@pytest.mark.parametrize("uri", ["https://a.example/cb?a=b", "https://a.example/cb?"])
def test_A19_the_query_of_a_redirect_uri_is_kept_and_extended(rig, uri):
    client = registered(rig, redirect_uris=[uri])
    page = Browser(callbacks=("https://a.example",)).get(
        client.authorize_url(redirect_uri=uri, response_type="x", state="s")
    )
    assert page.redirected_to.startswith(uri) and page.redirected_to.count("?") == 1
    answer = urllib.parse.parse_qs(urllib.parse.urlsplit(page.redirected_to).query)
    assert answer["iss"] == [rig.url] and answer["state"] == ["s"]
    assert answer.get("a") == (["b"] if "a=b" in uri else None) and answer["error"]


@pytest.mark.parametrize("name", ["code", "state", "iss", "error", "error_description"])
def test_A19_a_redirect_uri_with_a_name_of_our_answer_is_not_registered(rig, name):
    assert OAuthClient(rig.url).register(redirect_uris=[f"https://a.example/cb?{name}=x"]).status == 400


def test_A20_many_authorization_requests_store_nothing_and_are_limited_by_address(make_rig):
    rig = make_rig(rate_authorize="100")
    client = registered(rig)
    rig.clock.stop()
    path = client.authorize_url()[len(rig.url) :]
    statuses = [http(rig, "GET", path, headers={"X-Forwarded-For": "203.0.113.9"}) for _ in range(110)]
    assert [answer.status for answer in statuses] == [200] * 100 + [429] * 10
    assert int(statuses[-1].headers["Retry-After"]) >= 1 and count(rig, "logins") == 0
    assert http(rig, "GET", path, headers={"X-Forwarded-For": "203.0.113.10"}).status == 200
    assert http(rig, "GET", path).status == 200


def test_A21_A22_what_follows_the_form_is_a_GET_that_no_referrer_or_cache_sees(rig, client):
    browser = Browser()
    page = browser.get(client.authorize_url())
    fields = {**page.form_with("login").fields, "decision": "approve", "access": "full"}
    answer = browser.post(rig.url + "/oauth/consent", fields, stop=lambda url: True)
    assert (
        answer.status == 303
        and answer.headers["referrer-policy"] == "no-referrer"
        and answer.headers["cache-control"] == "no-store"
    )
    assert page.headers["referrer-policy"] == "same-origin" and page.headers["cache-control"] == "no-store"
    browser = Browser()
    done = browser.get(
        at_callback(rig, browser, client), stop=lambda url: url.startswith(client.redirect_uri)
    )
    assert "code" in query_of(done.redirected_to) and done.headers["referrer-policy"] == "no-referrer"
    assert done.headers["cache-control"] == "no-store"
    text = page.text.replace(client.redirect_uri, "").replace(f'<a href="{rig.forgejo.url}"', "")
    assert "//" not in text  # nothing from elsewhere


# -- C. consent


def test_C06_before_the_approval_nothing_is_stored_and_forgejo_hears_nothing(rig, client):
    before = len(rig.forgejo.requests)
    browser = Browser()
    page = browser.get(client.authorize_url())
    assert count(rig, "logins") == 0 and len(rig.forgejo.requests) == before
    ((name, mark),) = [cookie.partition("=")[::2] for cookie in page.headers["set-cookie"].split("\n")]
    assert name == "fjmcp"
    away = browser.submit(
        page,
        ("decision", "approve"),
        form=page.form_with("login"),
        access="full",
        stop=lambda url: url.startswith(rig.forgejo.url),
    )
    state = query_of(away.redirected_to)["state"]
    assert count(rig, "logins") == 1 and state not in mark  # the state is made by the approval


def test_C08_an_approved_client_is_asked_about_again_wherever_the_person_comes_from(rig, client):
    browser = Browser()
    approve_login(browser, client.authorize_url(), "alice", "secret")
    for initiator in (None, "https://evil.example/"):
        page = browser.get(client.authorize_url(), initiator=initiator)
        assert page.status == 200 and page.form_with("login") and not page.redirected_to


def test_C09_no_page_can_be_framed(rig, client):
    browser = Browser()
    pages = [
        browser.get(client.authorize_url()),
        browser.get(rig.url + "/"),
        browser.get(rig.url + "/account"),
        browser.get(client.authorize_url(client_id="nobody")),
        browser.get(rig.url + "/oauth/callback"),
        browser.post(rig.url + "/oauth/consent", {"x": "y"}),
        browser.post(rig.url + "/account/end", {}),
        browser.get(rig.url + "/oauth/consent"),
    ]
    assert {page.status for page in pages} == {200, 400, 403, 405}
    for page in pages:
        policy = page.headers["content-security-policy"]
        assert (
            "default-src 'none'" in policy
            and "frame-ancestors 'none'" in policy
            and "base-uri 'none'" in policy
            and "form-action" not in policy
        )
        assert page.headers["x-frame-options"] == "DENY" and "<script" not in page.text


@pytest.mark.parametrize(
    "name",
    [
        "<img src=x onerror=alert(1)>",
        '"><script>alert(1)</script>',
        "{{7*7}}",
        "%s%n",
        "{0}",
        "</title><b>",
        "&lt;",
    ],
)
def test_C10_a_clients_name_is_inert_text(rig, name):
    page = Browser().get(registered(rig, client_name=name).authorize_url())
    assert (
        page.status == 200
        and name in page.words
        and "<img" not in page.text
        and "<script" not in page.text
        and "<b>" not in page.text
    )


def test_C11_a_name_cannot_hide_or_turn_around_what_follows(rig):
    client = registered(rig, client_name="Forgejo\u202e\u200b Offi\ncial\u2066" + "x" * 3000)
    page = Browser().get(client.authorize_url())
    assert (
        "Forgejo Offi cial" in page.words
        and not set("\u202e\u200b\u2066") & set(page.text)
        and "x" * 101 not in page.text
    )
    client = registered(rig, client_name="\u202e\u200b", redirect_uris=["https://xn--frgejo-mxa.example/cb"])
    page = Browser().get(client.authorize_url(redirect_uri="https://xn--frgejo-mxa.example/cb"))
    assert "An application without a name" in page.words and "xn--frgejo-mxa.example" in page.words


def test_C12_the_page_says_who_where_to_and_what(rig, client):
    words = Browser().get(client.authorize_url()).words
    assert (
        "http://localhost/callback" in words
        and "Any program on this device" in words
        and client.client_id in words
    )
    assert client.name in words
    assert (
        "see and change your repositories and their contents" in words
        and "see and change issues and pull requests" in words
    )


def test_C12_the_host_that_gets_the_answer_stands_apart_from_its_url(rig):
    uri = "https://assistant.example/cb"
    words = Browser().get(registered(rig, redirect_uris=[uri]).authorize_url(redirect_uri=uri)).words
    assert uri in words and "assistant.example" in words.replace(uri, "")
    assert "Any program on this device" not in words


@pytest.mark.parametrize("field", ["logo_uri", "client_uri", "tos_uri", "policy_uri"])
def test_C13_links_of_a_client_are_neither_kept_nor_shown(rig, field):
    client = registered(rig, **{field: "javascript:alert(1)"})
    row = rig.broker.store.client(client.client_id)
    assert "javascript" not in repr(row) and "javascript" not in Browser().get(client.authorize_url()).text


def test_C15_the_cookie_is_for_this_host_only(make_rig, rig, client):
    assert Browser().get(client.authorize_url()).headers["set-cookie"].split("=", 1)[0] == "fjmcp"
    assert Browser().get(client.authorize_url()).headers["set-cookie"].split("; ")[1:] == [
        "Max-Age=600",
        "Path=/",
        "HttpOnly",
        "SameSite=Lax",
    ]
    secure = make_rig(public_url="https://broker.example")
    secure.broker.store.add_client("c", "dynamic", "C", ["https://a.example/cb"], None, "none", {}, 0)
    query = urllib.parse.urlencode(
        {
            "response_type": "code",
            "client_id": "c",
            "redirect_uri": "https://a.example/cb",
            "code_challenge": CHALLENGE,
            "code_challenge_method": "S256",
        }
    )
    cookie = http(secure, "GET", f"/oauth/authorize?{query}").headers["Set-Cookie"]
    assert cookie.startswith("__Host-fjmcp=") and cookie.split("; ")[1:] == [
        "Max-Age=600",
        "Path=/",
        "HttpOnly",
        "SameSite=Lax",
        "Secure",
    ]


def test_C16_two_cookies_of_the_name_are_an_attack(rig, client):
    page = Browser().get(client.authorize_url(), headers={"Cookie": f"fjmcp={'a' * 43}; fjmcp={'b' * 43}"})
    assert page.status == 400


@pytest.mark.parametrize("cookie", ["a" * 43, "", "a" * 42, "ä" * 43, "a" * 5000, None])
def test_C17_a_changed_cookie_is_none(rig, client, cookie):
    browser = Browser()
    fields = browser.get(client.authorize_url()).form_with("login").fields
    headers = {
        **FORM,
        "Sec-Fetch-Site": "same-origin",
        **({"Cookie": "fjmcp=" + cookie} if cookie is not None else {}),
    }
    answer = http(
        rig,
        "POST",
        "/oauth/consent",
        urllib.parse.urlencode({**fields, "decision": "approve", "access": "full"}),
        headers,
    )
    assert answer.status == 403 and count(rig, "logins") == 0


def test_C19_a_login_of_somebody_else_cannot_be_finished_in_a_victims_browser(rig, client):
    url = at_callback(rig, Browser(), client)
    before = rig.forgejo.count("/login/oauth/access_token")
    page = Browser().get(url)
    assert page.status == 403 and rig.forgejo.count("/login/oauth/access_token") == before
    assert count(rig, "grants") == 0


def test_C20_fields_added_to_the_form_change_nothing(rig, client):
    browser = Browser()
    page = browser.get(client.authorize_url(scope="forgejo:read", state="mine"))
    added = {
        "client_id": "x",
        "redirect_uri": "https://evil.example/",
        "scope": "forgejo:write",
        "access": "full",
        "state": "x",
        "code_challenge": "x",
    }
    fields = {**page.form_with("login").fields, **added, "decision": "deny"}
    answer = browser.post(rig.url + "/oauth/consent", fields, stop=lambda url: True)
    assert answer.redirected_to.startswith(client.redirect_uri + "?")
    assert query_of(answer.redirected_to)["state"] == "mine"
    page = browser.get(client.authorize_url(scope="forgejo:read"))
    browser.post(
        rig.url + "/oauth/consent",
        {**page.form_with("login").fields, **added, "decision": "approve"},
        stop=lambda url: True,
    )
    given = rig.log.named("consent_given")[-1]
    assert (given["scope"], given["client"]) == ("forgejo:read", client.client_id)


# -- K. the callback and what is upstream


def test_K01_an_expired_or_used_state_asks_nothing_of_forgejo(rig, client):
    browser = Browser()
    url = at_callback(rig, browser, client)
    rig.clock.advance(601)
    before = rig.forgejo.count("/login/oauth/access_token")
    assert browser.get(url).status == 400
    url = at_callback(rig, browser, client)
    assert "code" in query_of(
        browser.get(url, stop=lambda url: url.startswith(client.redirect_uri)).redirected_to
    )
    again = browser.get(url, stop=lambda url: url.startswith(client.redirect_uri))
    assert "code" in query_of(again.redirected_to)
    assert rig.forgejo.count("/login/oauth/access_token") == before + 1 and count(rig, "grants") == 1
    rig.clock.advance(601)
    assert browser.get(url).status == 400


@pytest.mark.parametrize("cookie", [None, "fjmcp=" + "a" * 43])
def test_K02_without_the_browsers_cookie_no_code_is_exchanged(rig, client, cookie):
    url = at_callback(rig, Browser(), client)
    before = rig.forgejo.count("/login/oauth/access_token")
    assert http(rig, "GET", url[len(rig.url) :], headers={"Cookie": cookie} if cookie else {}).status == 403
    assert rig.forgejo.count("/login/oauth/access_token") == before


@pytest.mark.parametrize(
    "change", [str.swapcase, lambda state: state[:-1], lambda state: state + "%20", lambda state: state + "x"]
)
def test_K03_the_state_is_compared_exactly(rig, client, change):
    browser = Browser()
    url = at_callback(rig, browser, client)
    state = query_of(url)["state"]
    assert browser.get(url.replace(state, change(state))).status == 400
    assert browser.get(url, stop=lambda url: url.startswith(client.redirect_uri)).redirected_to


def test_K04_of_many_callbacks_at_once_one_is_exchanged(rig, client):
    browser = Browser()
    url = at_callback(rig, browser, client)
    before = rig.forgejo.count("/login/oauth/access_token")
    cookie = browser.cookies.get("fjmcp")
    header = {"Cookie": f"fjmcp={getattr(cookie, 'value', cookie)}"}
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: http(rig, "GET", url[len(rig.url) :], headers=header), range(20)))
    assert {answer.status for answer in answers} == {303} and count(rig, "grants") == 1
    assert len({answer.headers["Location"] for answer in answers}) == 1
    assert rig.forgejo.count("/login/oauth/access_token") == before + 1


@pytest.mark.parametrize(
    "error, told",
    [("access_denied", "access_denied"), ("server_error", "server_error"), ("<script>", "server_error")],
)
def test_K05_forgejos_words_are_not_passed_on(rig, client, error, told):
    browser = Browser()
    state = query_of(to_forgejo(rig, browser, client, state="s").redirected_to)["state"]
    query = urllib.parse.urlencode(
        {"state": state, "error": error, "error_description": "<script>alert(1)</script>"}
    )
    page = browser.get(
        f"{rig.url}/oauth/callback?{query}", stop=lambda url: url.startswith(client.redirect_uri)
    )
    answer = query_of(page.redirected_to)
    assert (
        answer["error"] == told
        and "alert" not in page.redirected_to
        and answer["state"] == "s"
        and answer["iss"] == rig.url
    )


@pytest.mark.parametrize("added", ["&error=x", "&code=x", "&state=x", "&iss=https://evil.example"])
def test_K06_K07_an_ambiguous_answer_or_one_of_another_issuer_is_refused_and_burns_nothing(
    rig, client, added
):
    browser = Browser()
    url = at_callback(rig, browser, client)
    before = rig.forgejo.count("/login/oauth/access_token")
    assert browser.get(url + added).status == 400 and rig.forgejo.count("/login/oauth/access_token") == before
    good = url + f"&iss={rig.forgejo.url}"
    assert "code" in query_of(
        browser.get(good, stop=lambda url: url.startswith(client.redirect_uri)).redirected_to
    )


@pytest.mark.parametrize(
    "fault, error",
    [
        (fake_forgejo.status(500), "temporarily_unavailable"),
        (fake_forgejo.html(), "temporarily_unavailable"),
        (fake_forgejo.lose_response(), "temporarily_unavailable"),
        (fake_forgejo.redirect("/followed"), "temporarily_unavailable"),
        (fake_forgejo.huge_json(10 << 20), "temporarily_unavailable"),
        (fake_forgejo.cut_body(), "temporarily_unavailable"),
        (fake_forgejo.json_override({"access_token": MISSING}), "temporarily_unavailable"),
        (fake_forgejo.json_override({"access_token": 5}), "temporarily_unavailable"),
        (fake_forgejo.json_override({"access_token": "x" * 100_000}), "temporarily_unavailable"),
        (fake_forgejo.json_override({"access_token": "a\0b"}), "temporarily_unavailable"),
        (fake_forgejo.json_override({"access_token": "a\nX: y"}), "temporarily_unavailable"),
        (fake_forgejo.json_override({"refresh_token": "\u00fc"}), "temporarily_unavailable"),
        (fake_forgejo.json_override({"refresh_token": "x" * 100_000}), "temporarily_unavailable"),
        (fake_forgejo.json_override({"token_type": "mac"}), "temporarily_unavailable"),
        (fake_forgejo.json_override(lambda value: [value]), "temporarily_unavailable"),
        (fake_forgejo.oauth_error("invalid_grant"), "server_error"),
        (fake_forgejo.oauth_error("invalid_client"), "server_error"),
    ],
    ids=lambda value: value if isinstance(value, str) else "fault",
)
def test_K08_K09_whatever_forgejo_answers_the_client_is_told_and_nothing_breaks(rig, client, fault, error):
    rig.forgejo.inject("/login/oauth/access_token", fault)
    answer = query_of(approve_login(Browser(), client.authorize_url(), "alice", "secret"))
    assert answer["error"] == error and answer["iss"] == rig.url and count(rig, "grants") == 0
    assert rig.forgejo.count("/followed") == 0
    assert code_for(client)


@pytest.mark.parametrize("life", [-1, "x", 1e300, None, True, 0])
def test_K08_a_senseless_life_of_forgejos_token_is_not_believed(rig, client, life):
    rig.forgejo.inject("/login/oauth/access_token", fake_forgejo.json_override({"expires_in": life}))
    client.redeem(code_for(client))
    left = rig.broker.store.user("1001").access_expires_at - rig.clock.now()
    assert 0 < left <= 3600 and bearer_status(rig, client.tokens["access_token"]) == 200


@pytest.mark.parametrize("login", ["x" * 5000, "a\nb", "\u202eecila", "", 5])
def test_K10_a_login_is_a_short_text_of_characters_that_are_seen(rig, client, login):
    rig.forgejo.inject("/login/oauth/userinfo", fake_forgejo.json_override({"preferred_username": login}))
    answer = query_of(approve_login(Browser(), client.authorize_url(), "alice", "secret"))
    assert answer["error"] == "temporarily_unavailable" and count(rig, "users") == 0


@pytest.mark.parametrize("sub", ["2002", 0, "", "1001 ", "01001", [1001], "0", -1, "alice", None])
def test_K10_a_user_is_a_number_that_both_answers_agree_on(rig, client, sub):
    rig.forgejo.inject("/login/oauth/userinfo", fake_forgejo.json_override({"sub": sub}))
    assert (
        query_of(approve_login(Browser(), client.authorize_url(), "alice", "secret"))["error"]
        == "temporarily_unavailable"
    )
    assert count(rig, "users") == 0


def test_K10_a_renamed_user_stays_the_same_and_a_reused_name_is_another(rig, client):
    client.redeem(code_for(client))
    rig.forgejo.rename("alice", "alicia")
    rig.forgejo.add_user("alice", sub=4242)
    code_for(client, "alicia")
    code_for(registered(rig), "alice")
    users = {row.login: row.sub for row in rows(rig.broker.store, "SELECT login, sub FROM users")}
    assert users == {"alicia": "1001", "alice": "4242"}


def test_K11_a_suspended_user_is_shut_out_at_the_next_refresh_and_back_after_a_login(rig):
    mcp = rig.session()
    rig.forgejo.suspend("alice")
    rig.clock.advance(3500)
    rig.tick()
    rig.log.wait("suspended")
    assert rig.broker.store.user("1001").status == "suspended"
    assert bearer_status(rig, mcp.token) == 401 and mcp.oauth.refresh().json()["error"] == "invalid_grant"
    rig.forgejo.unsuspend("alice")
    rig.login("alice")
    assert mcp.oauth.refresh().status == 200


def test_K12_a_user_who_is_no_longer_allowed_loses_grants_and_children_at_the_next_refresh(make_rig):
    rig = make_rig(allowed_groups="staff")
    rig.forgejo.add_user("carol", groups=("staff",))
    mcp = rig.session("carol")
    sub = rows(rig.broker.store, "SELECT sub FROM users")[0].sub
    rig.broker.settings.allowed_groups = ("other",)
    rig.broker.upstream.refresh(sub)
    rig.tick()
    assert rig.log.wait("access_refused")[0]["user"] == sub and rig.broker.store.user(sub).status == "refused"
    assert not rig.broker.store.grants_of(sub, rig.clock.now()) and bearer_status(rig, mcp.token) == 401
    assert rig.log.wait("child_stopped")
    rig.broker.settings.allowed_groups = ("staff",)
    assert mcp.oauth.refresh().json()["error"] == "invalid_grant"
    assert bearer_status(rig, rig.login("carol").tokens["access_token"]) == 200


def test_K13_what_forgejo_really_granted_is_kept_and_refused_only_when_strict(make_rig):
    for strict in ("off", "on"):
        rig = make_rig(strict_scopes=strict)
        rig.forgejo.set_grant_scope("alice", rig.app.client_id, "openid read:user")
        answer = query_of(approve_login(Browser(), registered(rig).authorize_url(), "alice", "secret"))
        assert ("error" in answer) is (strict == "on")
        if strict == "off":
            assert rig.broker.store.user("1001").upstream_scope == "openid read:user"


def test_K14_where_forgejo_is_comes_from_the_configuration_only(rig, client):
    url = client.authorize_url() + "&issuer=https://evil.example&forgejo_url=https://evil.example"
    browser = Browser()
    page = browser.get(url, headers={"X-Forwarded-Host": "evil.example", "Forwarded": "host=evil.example"})
    approved = browser.submit(
        page, ("decision", "approve"), form=page.form_with("login"), access="full", stop=lambda url: True
    )
    target = approved.redirected_to
    assert (
        target.startswith(rig.forgejo.url + "/login/oauth/authorize?")
        and query_of(target)["redirect_uri"] == rig.url + "/oauth/callback"
    )


def test_K15_proxies_of_the_environment_are_ignored_and_certificates_checked(rig, monkeypatch, tmp_path):
    from rigs.document_web import DocumentWeb, make_authority

    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert rig.login().tokens
    web = DocumentWeb(make_authority(tmp_path))
    here = ["127.0.0.1"]
    try:
        with pytest.raises(fjmcp_broker.FetchFailed, match="CERTIFICATE|certificate"):
            fjmcp_broker.fetch(
                "GET",
                "https://app.example/",
                addresses=here,
                connect=lambda address, timeout: web._connect(("x", 443), timeout),
            )
        with pytest.raises(fjmcp_broker.FetchFailed, match="ostname|match"):
            fjmcp_broker.fetch(
                "GET",
                "https://other.example/",
                ca_file=str(web._ca),
                addresses=here,
                connect=lambda address, timeout: web._connect(("x", 443), timeout),
            )
        assert not web.asked
    finally:
        web.close()


def test_K17_of_two_who_need_a_refresh_at_once_one_asks(rig):
    rig.session(), rig.session()
    rig.clock.advance(3600)
    before = rig.forgejo.count("/login/oauth/access_token")
    with rig.forgejo.hold("/login/oauth/access_token") as gate, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(rig.broker.upstream.credential, "1001") for _ in range(8)]
        gate.wait_arrived()
        gate.open()
        assert len({future.result()[0] for future in asked}) == 1
    assert rig.forgejo.count("/login/oauth/access_token") == before + 1


def test_K18_a_refresh_lost_in_a_crash_ends_in_one_login_and_no_loop(rig):
    mcp = rig.session()
    rig.clock.advance(3600)
    client = mcp.oauth
    client.refresh()
    rig.forgejo.inject("/login/oauth/access_token", fake_forgejo.lose_response())
    with pytest.raises(fjmcp_broker.UpstreamDown):
        rig.broker.upstream.refresh("1001")
    rig.restart()
    stale = McpClient(mcp.url, client.tokens["access_token"], session_id=mcp.session_id)
    call = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "tools/call",
        "params": {"name": "get_my_user_info", "arguments": {}},
    }
    refused = stale.post(call)
    assert refused.status == 401 and 'error="invalid_token"' in refused.headers["www-authenticate"]
    before = rig.forgejo.count("/login/oauth/access_token")
    assert stale.post(call).status == 401 and rig.forgejo.count("/login/oauth/access_token") == before
    assert rig.log.named("logged_out_upstream")[0]["interrupted"] is True
    rig.login("alice")
    assert stale.post(call).status == 200


# -- T. the token endpoint


@pytest.mark.parametrize("verifier", ["v" * 42, "v" * 129, "v" * 43 + "+", "ä" * 43, "v" * 42 + "="])
def test_T01_a_malformed_verifier_is_an_invalid_request_and_costs_nothing(client, verifier):
    code = code_for(client)
    for _ in range(5):
        assert client.redeem(code, code_verifier=verifier).json()["error"] == "invalid_request"
    assert client.redeem(code).status == 200


@pytest.mark.parametrize("wrong, status", [(2, 200), (3, 400)])
def test_T01_two_wrong_verifiers_are_forgiven_and_the_third_burns_the_code(client, wrong, status):
    code = code_for(client)
    for _ in range(wrong):
        assert client.redeem(code, code_verifier="x" * 43).json()["error"] == "invalid_grant"
    assert client.redeem(code).status == status


def test_T02_the_challenge_is_no_verifier(client):
    url = client.authorize_url()
    code = query_of(approve_login(Browser(), url, "alice", "secret"))["code"]
    assert (
        client.redeem(code, code_verifier=query_of(url)["code_challenge"]).json()["error"] == "invalid_grant"
    )


def test_T03_a_code_without_a_challenge_opens_with_nothing(rig, client):
    code = code_for(client)
    rig.broker.store.engine.run({}, ["UPDATE codes SET challenge = ''"])
    assert client.redeem(code).json()["error"] == "invalid_grant"
    assert client.redeem(code, code_verifier=None).json()["error"] == "invalid_request"


def test_T07_a_code_that_only_begins_like_a_used_one_ends_nothing(rig, client):
    code = code_for(client)
    client.redeem(code)
    tokens = client.tokens
    assert client.redeem(code[:-1] + ("A" if code[-1] != "A" else "B")).json()["error"] == "invalid_grant"
    assert bearer_status(rig, tokens["access_token"]) == 200


@pytest.mark.parametrize(
    "grant",
    [
        "password",
        "client_credentials",
        "urn:ietf:params:oauth:grant-type:token-exchange",
        "urn:ietf:params:oauth:grant-type:jwt-bearer",
        "implicit",
        "AUTHORIZATION_CODE",
    ],
)
def test_T10_other_grant_types_are_not_served(client, grant):
    assert client.redeem("x", grant_type=grant).json()["error"] == "unsupported_grant_type"


def token_request(rig, fields, headers=None, path="/oauth/token"):
    return http(
        rig,
        "POST",
        path,
        fields if isinstance(fields, (str, bytes)) else urllib.parse.urlencode(fields),
        {**FORM, **(headers or {})},
    )


def test_T10_a_parameter_sent_twice_is_refused(rig, client):
    answer = token_request(
        rig,
        [
            ("grant_type", "refresh_token"),
            ("grant_type", "authorization_code"),
            ("client_id", client.client_id),
        ],
    )
    assert answer.status == 400 and answer.json()["error"] == "invalid_request"


def basic(text):
    return {
        "Authorization": "Basic "
        + base64.b64encode(text if isinstance(text, bytes) else text.encode()).decode()
    }


def test_T11_credentials_come_in_one_place(rig):
    client = registered(rig, token_endpoint_auth_method="client_secret_basic")
    header = basic(f"{client.client_id}:{client.client_secret}")
    for fields in ({"client_secret": client.client_secret}, {"client_id": "other"}):
        answer = token_request(rig, {"grant_type": "refresh_token", "refresh_token": "x", **fields}, header)
        assert answer.status == 400 and answer.json()["error"] == "invalid_request"


@pytest.mark.parametrize(
    "value",
    [
        "Basic !!!!",
        "Basic " + base64.b64encode(b"no-colon").decode(),
        "Basic " + base64.b64encode(b"\xff\xfe:x").decode(),
        "Basic",
        "Basic YWJj*ZGVm",
        "Bearer x",
        "Basic " + base64.b64encode(b"%ff:x").decode(),
    ],
)
def test_T12_a_malformed_basic_header_is_401_with_a_challenge(rig, value):
    answer = token_request(
        rig, {"grant_type": "refresh_token", "refresh_token": "x"}, {"Authorization": value}
    )
    assert (
        answer.status == 401
        and answer.json()["error"] == "invalid_client"
        and answer.headers["WWW-Authenticate"].startswith("Basic ")
    )


def test_T12_credentials_in_basic_are_form_encoded(rig):
    rig.broker.store.add_client(
        "a:b c",
        "configured",
        "C",
        ["https://a.example/cb"],
        fjmcp_broker.token_hash("p:%w"),
        "client_secret_basic",
        {},
        0,
    )
    answer = token_request(
        rig, {"grant_type": "refresh_token", "refresh_token": "x"}, basic("a%3Ab+c:p%3A%25w")
    )
    assert answer.json()["error"] == "invalid_grant"


@pytest.mark.parametrize("secret", ["q+7/Zk%2B9w==", "a b", "100%", "%ff", "p:q", "ü%C3"])
def test_T12_a_secret_in_basic_is_taken_form_encoded_and_as_it_is(rig, secret):
    rig.broker.store.add_client(
        "my-app+1",
        "configured",
        "C",
        ["https://a.example/cb"],
        fjmcp_broker.token_hash(secret),
        "client_secret_basic",
        {},
        0,
    )
    form = {"grant_type": "refresh_token", "refresh_token": "x"}
    quoted = urllib.parse.quote("my-app+1", safe="") + ":" + urllib.parse.quote(secret, safe="")
    for text in (f"my-app+1:{secret}", quoted):
        for fields in (form, {**form, "client_id": "my-app+1", "client_secret": ""}):
            assert token_request(rig, fields, basic(text)).json()["error"] == "invalid_grant", text
    for text in ("my-app+1:" + secret + "x", "my-app 1:" + secret, "my-app+1:"):
        assert token_request(rig, form, basic(text)).json()["error"] == "invalid_client", text


@pytest.mark.parametrize("secret", [None, "", "wrong", "fjs_"])
def test_T13_a_client_with_a_secret_must_show_it(rig, secret):
    client = registered(rig, token_endpoint_auth_method="client_secret_post")
    fields = {
        "grant_type": "refresh_token",
        "refresh_token": "x",
        "client_id": client.client_id,
        **({"client_secret": secret} if secret is not None else {}),
    }
    answer = token_request(rig, fields)
    assert answer.status == 401 and answer.json()["error"] == "invalid_client"


@pytest.mark.parametrize(
    "kind",
    [
        "application/json",
        "multipart/form-data; boundary=x",
        "text/plain",
        "",
        "application/x-www-form-urlencoded2",
    ],
)
def test_T14_only_a_form_is_read(rig, client, kind):
    fields = {"grant_type": "refresh_token", "client_id": client.client_id, "refresh_token": "x"}
    for body in (json.dumps(fields), urllib.parse.urlencode(fields)):
        answer = http(rig, "POST", "/oauth/token", body, {"Content-Type": kind})
        assert answer.status == 400 and answer.json()["error"] == "invalid_request"
    assert token_request(rig, fields).json()["error"] == "invalid_grant"


@pytest.mark.parametrize("charset", ["ISO-8859-1", "utf8", "US-ASCII", '"utf-16"', "no such one"])
def test_T14_the_charset_of_a_form_decides_nothing(rig, charset):
    client = rig.login()
    fields = {
        "grant_type": "refresh_token",
        "client_id": client.client_id,
        "refresh_token": client.tokens["refresh_token"],
    }
    kind = {"Content-Type": f"application/x-www-form-urlencoded; charset={charset}"}
    assert http(rig, "POST", "/oauth/token", urllib.parse.urlencode(fields), kind).status == 200


@pytest.mark.parametrize(
    "nested", ["[" * 20_000, '{"a":' * 9_000, "[" * 65 + '"' + '\\"' * 10_000, "1" * 9_000, '{"sub":1e999}']
)
def test_an_assertion_whatever_is_in_it_is_refused_in_the_words_of_the_rfc(rig, nested):
    assertion = f"a.{fjmcp_broker.b64url(nested.encode())}.c"
    fields = {"grant_type": "refresh_token", "refresh_token": "x", "client_assertion": assertion}
    assert token_request(rig, fields).json()["error"] == "invalid_request"
    assert not rig.log.named("internal_error")


def test_T14_parameters_in_the_url_are_refused(rig, client):
    query = urllib.parse.urlencode(
        {"grant_type": "refresh_token", "client_id": client.client_id, "refresh_token": "secret"}
    )
    assert http(rig, "POST", "/oauth/token?" + query, query, FORM).json()["error"] == "invalid_request"


def test_T16_a_refresh_may_ask_for_less_and_never_gets_more(rig):
    client = rig.login()
    narrower = client.refresh(scope="forgejo:read").json()
    assert narrower["scope"] == "forgejo:read"
    assert client.refresh(scope=None).json()["scope"] == "forgejo:read forgejo:write"
    reader = rig.login(access="read")
    assert reader.refresh(scope="forgejo:read forgejo:write").json()["scope"] == "forgejo:read"


def test_T17_T19_answers_are_json_uncached_without_cookies_and_open_to_browsers_without_credentials(
    rig, client
):
    good = client.redeem(code_for(client))
    assert good.headers["Pragma"] == "no-cache"
    for answer in (
        good,
        client.redeem("x"),
        client.revoke("x"),
        token_request(rig, {"grant_type": "x"}, {"Origin": "https://evil.example"}),
    ):
        assert (
            answer.headers["Cache-Control"] == "no-store"
            and answer.headers.get_content_type() == "application/json"
        )
        assert answer.headers["Access-Control-Allow-Origin"] == "*" and "Set-Cookie" not in answer.headers
        assert "Access-Control-Allow-Credentials" not in answer.headers


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "PATCH"])
def test_T18_only_POST_is_served(rig, method):
    answer = http(rig, method, "/oauth/token")
    assert answer.status == 405 and answer.headers["Allow"] == "POST, OPTIONS"


def test_T20_unknown_and_wrong_tokens_are_told_alike(rig, client):
    other = rig.login("bob")
    answers = {
        client.refresh(refresh_token=token).text
        for token in ("fjr_" + "a" * 43, "x", "", other.tokens["refresh_token"])
    }
    assert len(answers) == 1
    code = code_for(other)
    assert client.redeem(code).text == client.redeem("fjc_" + "a" * 43).text


@pytest.mark.parametrize("value", ["%00", "a%00b", "%ED%A0%80", "%FF", "%C0%80"])
@pytest.mark.parametrize(
    "name", ["client_id", "code", "refresh_token", "code_verifier", "redirect_uri", "resource", "scope"]
)
def test_T21_what_is_no_text_is_an_invalid_request(rig, name, value):
    answer = token_request(rig, f"grant_type=authorization_code&{name}={value}")
    assert answer.status == 400 and answer.json()["error"] == "invalid_request"


def test_T21_a_replacement_character_is_only_another_character(rig, client):
    client.authorize_url()
    assert client.redeem("\ufffd" * 40).json()["error"] == "invalid_grant"


def test_T22_guessing_is_limited_by_address_and_whoever_has_a_login_is_not_hindered(make_rig):
    rig = make_rig(rate_token="60")
    client, shared = rig.login(), {"X-Forwarded-For": "160.79.104.10"}
    rig.clock.stop()
    guess = {"grant_type": "refresh_token", "client_id": client.client_id, "refresh_token": "fjr_guess"}
    answers = [token_request(rig, guess, shared) for _ in range(70)]
    assert [answer.status for answer in answers] == [400] * 60 + [429] * 10
    assert (
        int(answers[-1].headers["Retry-After"]) >= 1
        and answers[-1].headers.get_content_type() == "application/json"
    )
    good = token_request(rig, {**guess, "refresh_token": client.tokens["refresh_token"]}, shared)
    assert good.status == 200
    statuses = [
        token_request(rig, {**guess, "refresh_token": client.tokens["refresh_token"]}).status
        for _ in range(130)
    ]
    assert statuses.count(429) >= 10  # one grant alone is limited too
    rig.clock.advance(61)
    assert token_request(rig, guess, shared).status == 400


def test_T22_one_network_of_ipv6_is_one_address(make_rig):
    rig = make_rig(rate_token="60")
    rig.clock.stop()
    statuses = [
        token_request(
            rig, {"grant_type": "x", "client_id": "x"}, {"X-Forwarded-For": f"2001:db8::{n:x}"}
        ).status
        for n in range(65)
    ]
    assert statuses == [401] * 60 + [429] * 5
    assert (
        token_request(
            rig, {"grant_type": "x", "client_id": "x"}, {"X-Forwarded-For": "2001:db8:0:1::1"}
        ).status
        == 401
    )


def test_T22_D05_all_addresses_together_have_a_ceiling(make_rig):
    rig = make_rig(rate_register="60")
    rig.clock.stop()
    body = json.dumps({"redirect_uris": ["https://a.example/cb"]})
    statuses = [
        http(rig, "POST", "/register", body, {"X-Forwarded-For": f"203.0.{n % 250}.{n // 250}"}).status
        for n in range(1230)
    ]
    assert statuses == [201] * 1200 + [429] * 30


# -- R. refresh tokens


def test_R05_an_older_token_within_its_time_gets_the_newest_pair_and_later_ends_the_grant(rig):
    client = rig.login()
    rig.clock.stop()
    r0 = client.tokens["refresh_token"]
    for _ in range(4):
        client.refresh()
        rig.clock.advance(20)
    newest = client.tokens
    assert client.refresh(refresh_token=r0).json()["refresh_token"] == newest["refresh_token"]
    rig.clock.advance(60)
    assert client.refresh(refresh_token=r0).json()["error"] == "invalid_grant"
    assert bearer_status(rig, newest["access_token"]) == 401


def test_R07_a_refresh_that_races_a_revocation_leaves_nothing_alive(rig):
    for _ in range(12):
        client = rig.login()
        tokens, barrier = client.tokens, threading.Barrier(6)

        def race(number):
            barrier.wait(30)
            return (
                client.revoke(tokens["refresh_token"])
                if number == 0
                else client.refresh(refresh_token=tokens["refresh_token"])
            )

        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(race, range(6)))
        assert answers[0].status == 200
        for answer in answers[1:]:
            if answer.status == 200:
                assert bearer_status(rig, answer.json()["access_token"]) == 401
                assert client.refresh(refresh_token=answer.json()["refresh_token"]).status == 400
        assert bearer_status(rig, tokens["access_token"]) == 401


def test_R09_a_login_unused_for_its_lifetime_ends_and_every_use_renews_it(make_rig):
    rig = make_rig(refresh_token_lifetime="10d")
    client = rig.login()
    for _ in range(3):
        rig.clock.advance(9 * 86400)
        assert client.refresh().status == 200
    rig.clock.advance(10 * 86400 + 1)
    assert client.refresh().json()["error"] == "invalid_grant"


def test_R10_an_answer_lost_in_a_crash_is_given_again(make_installation):
    installation = make_installation()
    installation.start()
    client = OAuthClient(installation.url)
    client.login(None, "alice", "secret")
    r0 = client.tokens["refresh_token"]
    first = client.refresh(refresh_token=r0).json()
    installation.broker.kill()
    installation.start()
    again = client.refresh(refresh_token=r0).json()
    assert (again["access_token"], again["refresh_token"]) == (first["access_token"], first["refresh_token"])


def test_R11_trouble_upstream_rotates_nothing_away(rig):
    client = rig.login()
    rig.forgejo.down()
    assert client.refresh().status == 200
    rig.broker.store.set_user_status("1001", "logged_out")
    r1 = client.tokens["refresh_token"]
    assert client.refresh().json()["error"] == "invalid_grant"
    assert rig.broker.store.refresh_token(hashlib.sha256(r1.encode()).digest()).rotated_at is None
    rig.forgejo.up()
    rig.login()
    assert client.refresh(refresh_token=r1).status == 200


def test_R12_R16_a_revoked_login_is_over_with_the_next_request(rig):
    mcp = rig.session()
    older = mcp.oauth.tokens
    newer = mcp.oauth.refresh().json()
    assert mcp.oauth.revoke(older["refresh_token"]).status == 200  # any of the chain
    for tokens in (older, newer):
        assert bearer_status(rig, tokens["access_token"]) == 401
    assert mcp.oauth.refresh(refresh_token=newer["refresh_token"]).json()["error"] == "invalid_grant"
    rig.tick()
    assert count(rig, "sessions") == 0


@pytest.mark.parametrize("hint", ["access_token", "refresh_token", "nonsense"])
def test_R14_a_wrong_hint_still_finds_the_token(rig, hint):
    client = rig.login()
    assert client.revoke(client.tokens["access_token"], token_type_hint=hint).status == 200
    assert bearer_status(rig, client.tokens["access_token"]) == 401
    assert client.refresh().status == 200
    other = rig.login()
    assert other.revoke(other.tokens["refresh_token"], token_type_hint=hint).status == 200
    assert other.refresh().json()["error"] == "invalid_grant"
    assert bearer_status(rig, other.tokens["access_token"]) == 401
    rig.clock.advance(91 * 86400)
    assert client.revoke(client.tokens["refresh_token"], token_type_hint=hint).status == 200


def test_R15_ending_one_login_leaves_a_users_others_and_the_credential(rig):
    first, second = rig.login(), rig.login()
    assert first.revoke(first.tokens["refresh_token"]).status == 200
    assert bearer_status(rig, second.tokens["access_token"]) == 200
    assert rig.broker.upstream.credential("1001")[0] and second.refresh().status == 200


@pytest.mark.parametrize("jump", [86400, -86400])
def test_R17_a_clock_that_jumps_makes_no_token_immortal_or_negative(rig, jump):
    client = rig.login()
    rig.clock.advance(jump)
    answer = client.refresh()
    assert answer.status == 200 and 0 < answer.json()["expires_in"] <= 3600
    rig.tick()
    rig.clock.advance(-jump)
    assert client.refresh().json()["expires_in"] in range(1, 3601)
    access = client.tokens["access_token"]
    rig.clock.advance(2 * 86400)
    assert bearer_status(rig, access) == 401


# -- D. dynamic registration


@pytest.mark.parametrize(
    "uris",
    [
        MISSING,
        [],
        "https://a.example/cb",
        ["https://a.example/cb"] * 100,
        [5],
        [None],
        {},
        [["https://a.example"]],
    ],
)
def test_D01_redirect_uris_are_a_list_of_one_to_ten(rig, uris):
    body = {} if uris is MISSING else {"redirect_uris": uris}
    answer = http(rig, "POST", "/oauth/register", json.dumps(body))
    assert answer.status == 400 and answer.json()["error"] == "invalid_redirect_uri"


@pytest.mark.parametrize("number, status", [(10, 201), (11, 400)])
def test_D01_ten_redirect_uris_are_taken_and_eleven_are_not(rig, number, status):
    uris = [f"https://a.example/{n}" for n in range(number)]
    assert OAuthClient(rig.url).register(redirect_uris=uris).status == status


@pytest.mark.parametrize(
    "uri",
    [
        " javascript:alert(1)",
        "java\tscript:alert(1)",
        "javascript\n:x",
        "java\0script:x",
        "vbscript:x",
        "blob:x",
        "about:blank",
        "VIEW-SOURCE:x",
        "ws://a.example",
        "https://a.example/\r\nX: y",
        "\x01https://a.example/",
    ],
)
def test_D02_schemes_that_run_or_hide_are_refused_however_spelled(rig, uri):
    assert OAuthClient(rig.url).register(redirect_uris=[uri]).json()["error"] == "invalid_redirect_uri"


@pytest.mark.parametrize(
    "uri",
    [
        "http://evil.example/cb",
        "http://10.0.0.1/cb",
        "http://[fe80::1]/cb",
        "http://localhost.evil.example/cb",
    ],
)
def test_D03_plain_http_is_for_loopback(rig, uri):
    assert OAuthClient(rig.url).register(redirect_uris=[uri]).status == 400


@pytest.mark.parametrize(
    "change",
    [
        {"grant_types": ["implicit"]},
        {"grant_types": ["refresh_token"]},
        {"response_types": ["token"]},
        {"grant_types": "code"},
        {"token_endpoint_auth_method": "private_key_jwt"},
        {"token_endpoint_auth_method": "tls_client_auth"},
        {"token_endpoint_auth_method": 5},
        {"response_types": [5]},
    ],
)
def test_D04_what_is_not_served_is_not_registered(rig, change):
    answer = OAuthClient(rig.url).register(**change)
    assert answer.status == 400 and answer.json()["error"] == "invalid_client_metadata"


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100000,
        b'{"a":' * 20000,
        b'{"redirect_uris": ["https://a.example/"], "redirect_uris": ["https://b.example/"]}',
        b'{"x": NaN}',
        b'{"x": 1e999}',
        b"\xff",
        b"",
        b"[]",
        b'{"x": ' + b"9" * 5000 + b"}",
        b"\x00",
    ],
)
def test_D06_hostile_json_is_a_400(rig, body):
    answer = http(rig, "POST", "/oauth/register", body)
    assert answer.status in (400, 413) and answer.json()["error"]


def test_D06_a_large_registration_is_a_413(rig):
    assert http(rig, "POST", "/oauth/register", b'{"x": "' + b"x" * (1 << 20) + b'"}').status == 413


def test_D07_the_client_chooses_neither_its_id_nor_its_secret(rig):
    asked = {
        "client_id": "mine",
        "client_secret": "mine",
        "registration_access_token": "mine",
        "client_id_issued_at": 1,
    }
    made = OAuthClient(rig.url).register(token_endpoint_auth_method="client_secret_post", **asked).json()
    assert (
        "mine" not in made.values()
        and made["client_id_issued_at"] > 1
        and rig.broker.store.client("mine") is None
    )


def test_D08_D10_nothing_that_a_registration_names_is_fetched_and_it_cannot_be_managed(make_rig):
    web = NothingFetched()
    rig = make_rig(web=web)
    urls = dict.fromkeys(
        ("jwks_uri", "sector_identifier_uri", "logo_uri", "policy_uri", "tos_uri"), "https://a.example/x"
    )
    made = OAuthClient(rig.url).register(software_statement="a.b.c", **urls).json()
    assert not {"registration_client_uri", "registration_access_token"} & made.keys()
    assert Browser().get(registered(rig, **urls).authorize_url()).status == 200 and not web.asked
    for method in ("GET", "PUT", "DELETE"):
        assert http(rig, method, "/oauth/register").status == 405
        assert http(rig, method, f"/oauth/register/{made['client_id']}").status == 404


def test_D09_a_secret_is_shown_once_and_kept_as_a_hash(rig):
    answer = OAuthClient(rig.url).register(token_endpoint_auth_method="client_secret_post")
    made = answer.json()
    assert answer.headers["Cache-Control"] == "no-store"
    row = rig.broker.store.client(made["client_id"])
    assert row.secret_hash == hashlib.sha256(made["client_secret"].encode()).digest() and made[
        "client_secret"
    ] not in repr(row)


def test_D11_a_name_that_is_trusted_elsewhere_is_worth_nothing(rig):
    first = registered(rig, client_name="Claude")
    approve_login(Browser(), first.authorize_url(), "alice", "secret")
    second = registered(rig, client_name="Claude", redirect_uris=["https://evil.example/cb"])
    assert second.client_id != first.client_id
    page = Browser().get(second.authorize_url(redirect_uri="https://evil.example/cb"))
    assert "evil.example" in page.words and "the name is not verified" in page.words


@pytest.mark.parametrize("nothing", [None, "", []])
def test_a_registration_may_name_nothing_where_it_has_nothing_to_say(rig, nothing):
    for name in ("token_endpoint_auth_method", "grant_types", "response_types", "scope", "application_type"):
        body = json.dumps({"redirect_uris": ["http://localhost/cb"], name: nothing}).encode()
        assert http(rig, "POST", "/oauth/register", body).status == 201


def test_D12_a_registered_scope_raises_no_login(rig):
    client = registered(rig, scope="forgejo:write admin root")
    callback = approve_login(
        Browser(), client.authorize_url(scope="forgejo:read"), "alice", "secret", access="read"
    )
    client.redeem(query_of(callback)["code"])
    assert client.tokens["scope"] == "forgejo:read"


# -- U. redirect URIs


@pytest.mark.parametrize(
    "uri",
    [
        "https://a.example/cb/",
        "https://a.example/cb/../x",
        "https://a.example/cb%2f",
        "https://a.example/CB",
        "https://a.example/cb?x",
        "https://a.example/cb#f",
        "//a.example/cb",
        "https://a.example:443/cb",
        "HTTPS://A.example/cb",
        "https://a.example/cb ",
        "https://a.example//cb",
        "https://a.example:8443/cb",
        "https://a.example.evil.example/cb",
    ],
)
def test_U01_U06_elsewhere_than_on_loopback_every_byte_counts(rig, uri):
    page = Browser().get(
        registered(rig, redirect_uris=["https://a.example/cb"]).authorize_url(redirect_uri=uri)
    )
    assert page.status == 400 and not page.redirected_to


@pytest.mark.parametrize(
    "uri",
    [
        "https://a.com@evil.example/cb",
        "https://evil.example\\@a.com/cb",
        "https://a.com#@evil.example",
        "http://localhost.evil.example",
        "http://localhost\0.evil.example",
        "http://127.0.0.1.evil.example",
        "http://localhost@evil.example",
        "https://*.a.com/*",
        "https://a.com*/cb",
        "https://exämple.com/cb",
        "https://ex%61mple.com/cb",
        "https://a.com/cb#",
        "https://a.com/\r\nX",
        'https://a.com/"',
        "https://a.com/ ",
        "https://a.com/<",
        "http://127.0.0.1:٣/cb",
        "http://127.0.0.2/cb",
        "http://0.0.0.0/cb",
        "http://[::ffff:127.0.0.1]/cb",
        "https:a.com/cb",
        "https:///cb",
        "https://a.com:99999/cb",
    ],
)
def test_U02_U03_U07_U08_U09_U10_what_a_browser_may_read_otherwise_is_not_registered(rig, uri):
    assert OAuthClient(rig.url).register(redirect_uris=[uri]).json()["error"] == "invalid_redirect_uri"


@pytest.mark.parametrize(
    "uri",
    [
        "http://127.0.0.2/cb",
        "http://0.0.0.0/cb",
        "http://[::ffff:127.0.0.1]/cb",
        "https://127.0.0.1/cb",
        "http://127.0.0.1/other",
        "http://127.0.0.1:0/cb",
        "http://127.0.0.1:99999/cb",
        "http://localho\u017ft/cb",
        "http://127.0.0.1:٣/cb",
        "http://127.0.0.1:/cb",
        "http://127.1/cb",
        "http://u@127.0.0.1/cb",
        "http://127.0.0.1:80:80/cb",
        "http://127.0.0.1/cb?x=1",
    ],
)
def test_U05_what_only_resembles_loopback_does_not_match(rig, uri):
    page = Browser().get(
        registered(rig, redirect_uris=["http://127.0.0.1/cb"]).authorize_url(redirect_uri=uri)
    )
    assert page.status == 400 and not page.redirected_to


def test_U11_private_schemes_are_a_list_and_named_on_the_page(rig):
    assert OAuthClient(rig.url).register(redirect_uris=["com.example:/cb"]).status == 400
    client = registered(rig, redirect_uris=["cursor://x/cb"])
    page = Browser().get(client.authorize_url(redirect_uri="cursor://x/cb"))
    assert (
        "cursor:" in page.words
        and "Any program on this device" in page.words
        and "http-equiv" not in page.text
    )


def test_U12_the_port_at_the_token_endpoint_is_the_one_of_the_login(rig, client):
    uri = "http://localhost:49152/callback"
    code = query_of(
        approve_login(Browser(), client.authorize_url(redirect_uri=uri), "alice", "secret", redirect_uri=uri)
    )["code"]
    assert (
        client.redeem(code, redirect_uri="http://localhost:49153/callback").json()["error"] == "invalid_grant"
    )
    assert client.redeem(code, redirect_uri=uri).status == 200
