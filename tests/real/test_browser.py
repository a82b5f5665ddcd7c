"""tests/rigs/browser.py: what the login tests stand on.

The rules of redirects, cookies, forms and fetch metadata.
"""

import http.server
import threading
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest

from rigs.browser import Browser, BrowserError, CookieJar, LoginFailed, approve_login, origin_of, relation
from rigs.fake_forgejo import FakeForgejo

SHOP = "https://shop.example"
LOGIN = "https://login.shop.example"
OTHER = "https://other.test"
ORIGINS = (SHOP, LOGIN, OTHER, "http://shop.example")


class Site:
    """One server that answers for all ORIGINS.

    `answers` maps a path to (status, headers, body); what is not in it is an empty 200. `seen` holds (method,
    host, path, headers, body) of each request.
    """

    def __init__(self):
        self.answers, self.seen = {}, []
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_args):
                pass

            def do_GET(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
                path = urlsplit(self.path).path
                site.seen.append((self.command, self.headers["Host"], self.path, self.headers, body))
                status, headers, text = site.answers.get(path, (200, {}, ""))
                self.send_response(status)
                for name, value in headers.items():
                    for each in value if isinstance(value, list) else [value]:
                        self.send_header(name, each)
                if "Content-Type" not in headers:
                    self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            do_POST = do_GET

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = "http://127.0.0.1:%d" % self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def browser(self, *args, **options):
        return Browser(*args, routes=dict.fromkeys(ORIGINS, self.url), **options)

    def redirect(self, path, status, location, **headers):
        self.answers[path] = status, {"Location": location, **headers}, ""

    def cookies_of(self, index=-1):
        return self.seen[index][3].get("Cookie")

    def sent(self, name, index=-1):
        return self.seen[index][3].get(name)

    def stop(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def site():
    made = Site()
    yield made
    made.stop()


# ---- Redirects
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "method", "body"),
    [(301, "GET", ""), (302, "GET", ""), (303, "GET", ""), (307, "POST", "a=1"), (308, "POST", "a=1")],
)
def test_a_redirected_post_keeps_its_method_and_body_only_with_307_and_308(site, status, method, body):
    site.redirect("/from", status, "/to")
    page = site.browser().post(SHOP + "/from", {"a": "1"})
    assert [(seen[0], seen[2], seen[4]) for seen in site.seen] == [
        ("POST", "/from", "a=1"),
        (method, "/to", body),
    ]
    assert (site.sent("Content-Type") is None) == (body == "")
    assert page.history == [(status, "POST", SHOP + "/from"), (200, method, SHOP + "/to")]
    assert (page.url, page.redirected_to) == (SHOP + "/to", None)


def test_a_redirect_into_an_app_is_not_followed_but_reported(site):
    site.redirect("/from", 303, "cursor://anysphere.cursor-mcp/oauth/callback?code=1")
    page = site.browser().get(SHOP + "/from")
    assert page.redirected_to == "cursor://anysphere.cursor-mcp/oauth/callback?code=1"
    assert (page.status, len(site.seen)) == (303, 1)


def test_redirects_end_at_the_origins_named_as_callbacks_and_where_stop_says_so(site):
    site.redirect("/from", 302, OTHER + "/callback?code=1")
    browser = site.browser([OTHER + "/callback"])
    assert browser.get(SHOP + "/from").redirected_to == OTHER + "/callback?code=1"
    assert browser.get(SHOP + "/from", stop=lambda url: False).url == OTHER + "/callback?code=1"


def test_a_circle_of_redirects_ends_after_twenty(site):
    site.redirect("/from", 302, "/from")
    page = site.browser().get(SHOP + "/from")
    assert (page.redirected_to, len(site.seen)) == (SHOP + "/from", 21)


def test_a_redirect_status_without_location_is_a_page(site):
    site.answers["/from"] = 302, {}, "<p>nowhere</p>"
    page = site.browser().get(SHOP + "/from")
    assert (page.status, page.words, page.redirected_to) == (302, "nowhere", None)


def test_a_fragment_survives_a_redirect_that_has_none(site):
    site.redirect("/from", 302, "/to?x=1")
    page = site.browser().get(SHOP + "/from#part")
    assert page.url == SHOP + "/to?x=1#part"
    assert site.seen[-1][2] == "/to?x=1"


def test_each_request_is_announced_to_the_hop_hook(site):
    site.redirect("/from", 302, "/to")
    hops = []
    site.browser(hop=hops.append).get(SHOP + "/from")
    assert hops == [SHOP + "/from", SHOP + "/to"]


def test_a_server_that_is_not_there_is_a_browser_error_with_the_url():
    with FakeForgejo() as gone:
        url = gone.url
    with pytest.raises(BrowserError, match=url):
        Browser().get(url)


# ---- Fetch metadata
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("initiator", "expected"),
    [
        (None, "none"),
        (SHOP + "/page", "same-origin"),
        (LOGIN, "same-site"),
        (OTHER, "cross-site"),
        ("http://shop.example", "cross-site"),
    ],
)
def test_sec_fetch_site_tells_how_the_target_is_related_to_who_began(site, initiator, expected):
    site.browser().get(SHOP + "/page", initiator=initiator)
    assert site.sent("Sec-Fetch-Site") == expected
    assert (site.sent("Sec-Fetch-Mode"), site.sent("Sec-Fetch-Dest")) == ("navigate", "document")
    assert site.sent("Origin") is None


def test_a_redirect_chain_that_was_cross_site_once_stays_cross_site(site):
    site.redirect("/from", 303, OTHER + "/over")
    site.redirect("/over", 302, SHOP + "/back")
    site.browser().post(SHOP + "/from", {})
    assert [seen[3]["Sec-Fetch-Site"] for seen in site.seen] == ["same-origin", "cross-site", "cross-site"]


def test_a_typed_address_says_none_along_its_redirects(site):
    site.redirect("/from", 302, OTHER + "/to")
    site.browser().get(SHOP + "/from")
    assert [seen[3]["Sec-Fetch-Site"] for seen in site.seen] == ["none", "none"]


@pytest.mark.parametrize(
    ("origin", "header", "expected"),
    [("", SHOP, "same-origin"), (OTHER, OTHER, "cross-site"), ("null", "null", "cross-site")],
)
def test_a_post_names_its_origin(site, origin, header, expected):
    site.browser().post(SHOP + "/page", {}, origin=origin)
    assert (site.sent("Origin"), site.sent("Sec-Fetch-Site")) == (header, expected)


def test_the_origin_of_a_post_is_hidden_after_a_detour_over_a_third_party(site):
    site.redirect("/from", 307, OTHER + "/over")
    site.redirect("/over", 307, SHOP + "/back")
    site.browser().post(SHOP + "/from", {})
    assert [seen[3]["Origin"] for seen in site.seen] == [SHOP, SHOP, "null"]


@pytest.mark.parametrize(
    ("policy", "action", "expected"),
    [
        ("no-referrer", SHOP, "null"),
        ("same-origin", SHOP, SHOP),
        ("same-origin", OTHER, "null"),
        ("", OTHER, SHOP),
    ],
)
def test_the_referrer_policy_of_a_page_decides_about_the_origin_of_its_forms(site, policy, action, expected):
    site.answers["/page"] = (
        200,
        {"Referrer-Policy": policy},
        f'<form method="post" action="{action}/send"></form>',
    )
    browser = site.browser()
    browser.submit(browser.get(SHOP + "/page"))
    assert site.sent("Origin") == expected


def test_fetch_metadata_stay_away_from_plain_http_to_other_machines_and_from_old_browsers(site):
    site.browser().get("http://shop.example/page")
    assert site.sent("Sec-Fetch-Site") is None
    site.browser(fetch_metadata=False).post(SHOP + "/page", {})
    assert (site.sent("Sec-Fetch-Site"), site.sent("Origin")) == (None, SHOP)
    Browser().get(site.url)
    assert site.sent("Sec-Fetch-Site") == "none"


def test_headers_can_be_added_and_taken_away(site):
    site.browser().post(SHOP + "/page", {}, headers={"Origin": None, "X-Extra": "1"})
    assert (site.sent("Origin"), site.sent("X-Extra")) == (None, "1")


def test_loopback_addresses_on_two_ports_are_two_origins_of_one_site():
    assert relation("http://127.0.0.1:1", "http://127.0.0.1:2/x") == "same-site"
    assert relation("http://127.0.0.1:1", "http://localhost:1/x") == "cross-site"
    assert relation("null", "https://shop.example/") == "cross-site"
    assert origin_of("HTTPS://Shop.example:443/x") == SHOP
    assert origin_of("http://[::1]:80/x") == "http://[::1]"


# ---- Cookies
# --------------------------------------------------------------------------------------------------------


def test_a_cookie_comes_back_to_its_host_and_its_path_only(site):
    site.answers["/set"] = 200, {"Set-Cookie": ["wide=1; Path=/", "deep=2; Path=/oauth", "here=3"]}, ""
    browser = site.browser()
    browser.get(SHOP + "/set")
    browser.get(SHOP + "/oauth/callback")
    assert site.cookies_of() == "deep=2; wide=1; here=3"
    browser.get(SHOP + "/oauths")
    assert site.cookies_of() == "wide=1; here=3"
    browser.get(LOGIN + "/oauth")
    assert site.cookies_of() is None


def test_a_domain_cookie_reaches_subdomains_and_none_can_be_set_for_another_domain(site):
    site.answers["/set"] = (
        200,
        {"Set-Cookie": ["a=1; Domain=shop.example", "b=2; Domain=other.test", "c=3; Domain=example"]},
        "",
    )
    browser = site.browser()
    browser.get(LOGIN + "/set")
    browser.get(SHOP + "/")
    assert site.cookies_of() == "a=1"
    browser.get(OTHER + "/")
    assert site.cookies_of() is None


def test_a_secure_cookie_travels_by_https_only(site):
    site.answers["/set"] = 200, {"Set-Cookie": "s=1; Secure; Path=/"}, ""
    browser = site.browser()
    browser.get("http://shop.example/set")
    assert len(browser.cookies) == 0
    browser.get(SHOP + "/set")
    browser.get("http://shop.example/")
    assert site.cookies_of() is None
    browser.get(SHOP + "/")
    assert site.cookies_of() == "s=1"


def test_plain_http_cannot_lay_a_cookie_over_a_secure_one():
    jar = CookieJar()
    assert jar.take(SHOP, "s=mine; Secure; Path=/")
    assert not jar.take("http://shop.example", "s=tossed; Path=/")
    assert not jar.take("http://login.shop.example", "s=tossed; Domain=shop.example")
    assert jar.value("s") == "mine"


@pytest.mark.parametrize(
    ("url", "header", "accepted"),
    [
        (SHOP, "__Host-a=1; Secure; Path=/", True),
        (SHOP, "__Host-a=1; Path=/", False),
        (SHOP, "__Host-a=1; Secure; Path=/oauth", False),
        (SHOP + "/oauth/x", "__Host-a=1; Secure", False),
        (SHOP, "__Host-a=1; Secure; Path=/; Domain=shop.example", False),
        (SHOP, "__hOST-a=1; Path=/", False),
        ("http://127.0.0.1", "__Host-a=1; Secure; Path=/", False),
        (SHOP, "__Secure-a=1", False),
        (SHOP, "a=1; SameSite=None", False),
        (SHOP, "a=1; SameSite=None; Secure", True),
        (SHOP, "no pair", False),
    ],
)
def test_prefixes_bind_a_cookie_to_their_rules(url, header, accepted):
    assert CookieJar().take(url, header) is accepted


@pytest.mark.parametrize(
    ("attribute", "get", "post"),
    [
        ("", True, False),
        ("SameSite=Lax", True, False),
        ("SameSite=Strict", False, False),
        ("SameSite=None; Secure", True, True),
    ],
)
def test_same_site_keeps_a_cookie_from_cross_site_requests(site, attribute, get, post):
    browser = site.browser()
    browser.cookies.take(SHOP, f"c=1; {attribute}")
    browser.get(SHOP + "/", initiator=OTHER)
    assert (site.cookies_of() is not None) == get
    browser.post(SHOP + "/", {}, origin=OTHER)
    assert (site.cookies_of() is not None) == post
    for within in (lambda: browser.get(SHOP + "/"), lambda: browser.post(SHOP + "/", {}, origin=LOGIN)):
        within()
        assert site.cookies_of() == "c=1"


def test_max_age_beats_expires_and_zero_ends_a_cookie():
    now = [1000.0]
    jar = CookieJar(lambda: now[0])
    jar.take(SHOP, "a=1; Max-Age=60; Expires=Thu, 01 Jan 1970 00:00:00 GMT")
    jar.take(SHOP, "b=2; Expires=Thu, 01-Jan-1970 00:20:00 GMT")
    assert jar.header(SHOP) == "a=1; b=2"
    now[0] = 1061
    assert jar.header(SHOP) == "b=2"
    now[0] = 1200
    assert jar.header(SHOP) == ""
    jar.take(SHOP, "c=3")
    jar.take(SHOP, "c=; Max-Age=0")
    assert len(jar) == 0


def test_a_cookie_does_not_know_ports():
    jar = CookieJar()
    jar.take("http://127.0.0.1:1", "a=1")
    assert jar.header("http://127.0.0.1:2") == "a=1"
    assert jar.header("http://localhost:1") == ""


def test_a_redirect_sets_its_cookies_before_the_next_request(site):
    site.redirect("/from", 303, "/to", **{"Set-Cookie": "fresh=1; Path=/"})
    site.browser().get(SHOP + "/from")
    assert site.cookies_of() == "fresh=1"


# ---- Forms
# ----------------------------------------------------------------------------------------------------------

FORM = """<title>T</title><style>.no {}</style><form action="send?x=1" method="post">
<input type=hidden name=csrf value="a&amp;b"><input name=text value=t><input name=off value=1 disabled>
<input type=radio name=access value=full checked><input type=radio name=access value=read>
<input type=checkbox name=yes checked><input type=checkbox name=no>
<select name=pick><option value=1>one<option value=2 selected>two</select><textarea name=area>words</textarea>
<button name=decision value=approve>Yes, allow</button>
<button name=decision value=deny formaction="/deny">No</button>
<button type=button name=never value=1>Script</button></form><form action="/find"><input name=q></form>"""


def form_of(text):
    return {name: values[0] for name, values in parse_qs(text, keep_blank_values=True).items()}


def test_a_form_is_read_with_what_it_would_send(site):
    site.answers["/dir/page"] = 200, {}, FORM
    page = site.browser().get(SHOP + "/dir/page")
    form, find = page.forms
    assert (form.action, form.method) == (SHOP + "/dir/send?x=1", "POST")
    assert form.fields == {
        "csrf": "a&b",
        "text": "t",
        "access": "full",
        "yes": "on",
        "pick": "2",
        "area": "words",
    }
    assert form.radios == {"access": ["full", "read"]}
    assert [(button.name, button.value, button.label) for button in form.buttons] == [
        ("decision", "approve", "Yes, allow"),
        ("decision", "deny", "No"),
    ]
    assert (find.action, find.method) == (SHOP + "/find", "GET")
    assert "Yes, allow" in page.words and ".no" not in page.words


def test_a_submit_sends_the_fields_the_pressed_button_and_the_changes(site):
    site.answers["/dir/page"] = 200, {}, FORM
    browser = site.browser()
    page = browser.get(SHOP + "/dir/page")
    browser.submit(page, ("decision", "approve"), access="read", text=None)
    assert site.seen[-1][2] == "/dir/send?x=1"
    assert form_of(site.seen[-1][4]) == {
        "csrf": "a&b",
        "access": "read",
        "yes": "on",
        "pick": "2",
        "area": "words",
        "decision": "approve",
    }
    assert (site.sent("Origin"), site.sent("Sec-Fetch-Site")) == (SHOP, "same-origin")
    browser.submit(page, ("decision", "deny"))
    assert (site.seen[-1][2], form_of(site.seen[-1][4])["decision"]) == ("/deny", "deny")


def test_a_form_whose_required_choice_is_not_made_is_not_sent_but_by_a_button_that_does_not_ask(site):
    site.answers["/page"] = (
        200,
        {},
        """<form method=post><input type=radio name=access value=full required>
        <button name=decision value=deny formnovalidate>No</button>
        <button name=decision value=approve>Yes</button></form>""",
    )
    browser = site.browser()
    page = browser.get(SHOP + "/page")
    with pytest.raises(BrowserError, match="nothing is chosen for {'access'}"):
        browser.submit(page, ("decision", "approve"))
    browser.submit(page, ("decision", "approve"), access="full")
    assert form_of(site.seen[-1][4]) == {"access": "full", "decision": "approve"}
    browser.submit(page, ("decision", "deny"))
    assert form_of(site.seen[-1][4]) == {"decision": "deny"}


def test_enter_sends_nothing_where_the_first_button_submits_to_a_dialog(site):
    form = """<form method=post><button hidden disabled></button>%s<button name=yes>Yes</button></form>"""
    browser = site.browser()
    site.answers["/page"] = 200, {}, form % ""
    browser.submit(browser.get(SHOP + "/page"))  # Chromium passes over what is disabled
    assert site.seen[-1][0] == "POST"
    site.answers["/page"] = 200, {}, form % "<button hidden formmethod=dialog></button>"
    with pytest.raises(BrowserError, match="Enter sends nothing"):
        browser.submit(browser.get(SHOP + "/page"))


def test_a_get_form_puts_its_fields_into_the_query(site):
    site.answers["/page"] = 200, {}, FORM
    browser = site.browser()
    browser.submit(browser.get(SHOP + "/page"), form=1, q="a b")
    assert (site.seen[-1][0], site.seen[-1][2]) == ("GET", "/find?q=a+b")


def test_a_button_or_form_that_is_not_there_is_an_error(site):
    site.answers["/page"] = 200, {}, FORM
    browser = site.browser()
    page = browser.get(SHOP + "/page")
    with pytest.raises(BrowserError, match="no button"):
        browser.submit(page, ("decision", "maybe"))
    with pytest.raises(BrowserError, match="no form"):
        browser.submit(page, form=2)


# ---- A login
# --------------------------------------------------------------------------------------------------------

CONSENT = """<p>Demo asks</p><form method="post" action="/oauth/consent">
<input type="hidden" name="login" value="sealed">
{radios}<button name="decision" value="approve">Allow</button>
<button name="decision" value="deny">Refuse</button></form>"""
BOTH = (
    '<input type="radio" name="access" value="full" checked><input type="radio" name="access" value="read">'
)
CALLBACK = "http://localhost:7777/callback"


@pytest.fixture
def forgejo():
    with FakeForgejo() as running:
        yield running


@pytest.fixture
def authorize_url(site, forgejo):
    """An authorization request at `site`, whose consent page leads to Forgejo and from there to CALLBACK."""
    app = forgejo.add_app([CALLBACK])
    site.answers["/authorize"] = 200, {}, CONSENT.format(radios=BOTH)
    site.redirect(
        "/oauth/consent",
        303,
        forgejo.url
        + "/login/oauth/authorize?"
        + urlencode(
            {"response_type": "code", "client_id": app.client_id, "redirect_uri": CALLBACK, "state": "s"}
        ),
    )
    return SHOP + "/authorize?" + urlencode({"redirect_uri": CALLBACK})


def test_a_login_goes_through_consent_sign_in_and_grant_to_the_callback(site, authorize_url):
    callback = approve_login(site.browser(), authorize_url, "alice", "secret", access="read")
    assert callback.startswith(CALLBACK + "?code=") and callback.endswith("&state=s")
    assert form_of(site.seen[-1][4]) == {"login": "sealed", "access": "read", "decision": "approve"}


def test_a_second_login_in_the_same_browser_needs_no_sign_in(site, forgejo, authorize_url):
    browser = site.browser()
    approve_login(browser, authorize_url, "alice", "secret")
    approve_login(browser, authorize_url, "alice", "secret")
    assert forgejo.count("/user/login", "POST") == 1


def test_a_refusal_goes_straight_back_to_the_client(site, forgejo, authorize_url):
    site.redirect("/oauth/consent", 303, CALLBACK + "?error=access_denied&state=s")
    assert (
        approve_login(site.browser(), authorize_url, "alice", "secret", decision="deny")
        == CALLBACK + "?error=access_denied&state=s"
    )
    assert form_of(site.seen[-1][4])["decision"] == "deny"
    assert forgejo.count("/") == 0


def test_a_wrong_password_fails_with_the_words_of_the_page(site, authorize_url):
    with pytest.raises(LoginFailed, match="Username or password is incorrect"):
        approve_login(site.browser(), authorize_url, "alice", "wrong")


def test_an_access_that_is_not_offered_fails(site, authorize_url):
    site.answers["/authorize"] = (
        200,
        {},
        CONSENT.format(radios='<input type="radio" name="access" value="read" checked>'),
    )
    with pytest.raises(LoginFailed, match="offers access"):
        approve_login(site.browser(), authorize_url, "alice", "secret")
    assert approve_login(site.browser(), authorize_url, "alice", "secret", access=None).startswith(CALLBACK)


def test_an_error_page_fails_with_its_status_and_words(site, authorize_url):
    site.answers["/authorize"] = 400, {}, "<h1>Unknown client</h1>"
    with pytest.raises(LoginFailed, match="(?s)400.*Unknown client"):
        approve_login(site.browser(), authorize_url, "alice", "secret")


def test_a_redirect_to_another_address_than_the_clients_fails(site, authorize_url):
    site.redirect("/authorize", 302, "evil://callback?code=1")
    with pytest.raises(LoginFailed, match="evil://callback"):
        approve_login(site.browser(), authorize_url, "alice", "secret")
