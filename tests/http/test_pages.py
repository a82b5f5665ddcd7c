"""The pages in a real browser (Debian's Chromium).

What a person does, sees and hears from the consent page to the callback.
"""

import http.server
import os
import ssl
import subprocess
import threading
from urllib.parse import parse_qsl, urlsplit

import pytest

from rigs.mcp_client import McpClient, OAuthClient
from rigs.rig import text_of

pytestmark = [pytest.mark.real("chromium"), pytest.mark.timeout(90, func_only=True)]
PHONE = {
    "viewport": {"width": 360, "height": 740},
    "is_mobile": True,
    "has_touch": True,
    "device_scale_factor": 2,
}
LIMIT = 20_000  # milliseconds, as the browser counts
CONTRAST = 4.5  # WCAG 2.2, 1.4.3 (AA)
CONTROL_CONTRAST = 3.0  # WCAG 2.2, 1.4.11 (AA)


class Callback(http.server.ThreadingHTTPServer):
    """A client's redirect URI: a page, or for paths under /onward a redirect into an application.

    Claude.ai's redirect URI leads into an application like that.
    """

    daemon_threads = True

    def __init__(self, certificate=None):
        self.queries = []
        super().__init__(("127.0.0.1", 0), self._handler())
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self.port = self.server_address[1]
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,))
        self._thread.start()

    def _handler(self):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                path, _, query = self.path.partition("?")
                if "code=" in query or "error=" in query:
                    self.server.queries.append(dict(parse_qsl(query)))
                body = b"<title>Connected</title>"
                self.send_response(307 if path.startswith("/onward") else 200)
                self.send_header(
                    "Location" if path.startswith("/onward") else "X-None", "claude://claude.ai/done?" + query
                )
                self.send_header("Content-Type", "text/html")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        return Handler

    def close(self):
        self.shutdown()
        self._thread.join()
        self.server_close()


@pytest.fixture
def callback():
    server = Callback()
    yield server
    server.close()


@pytest.fixture
def open_browser(real_part):
    """A function that starts Chromium, with further arguments."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = []

        def start(*arguments):
            opened.append(
                playwright.chromium.launch(
                    executable_path=real_part("chromium"), args=["--no-sandbox", *arguments]
                )
            )
            return opened[-1]

        yield start
        for browser in opened:
            browser.close()


@pytest.fixture
def browser(open_browser):
    return open_browser()


def new_page(browser, **options):
    page = browser.new_context(**options).new_page()
    page.set_default_timeout(LIMIT)
    page.troubles = []
    page.on(
        "console",
        lambda message: (
            page.troubles.append(message.text) if "Content Security Policy" in message.text else None
        ),
    )
    return page


def client_at(rig, redirect_uri, name="Claude"):
    client = OAuthClient(rig.url, name=name, redirect_uri=redirect_uri)
    client.discover()
    assert client.register().status == 201
    return client


def sign_in(page):
    """Forgejo's part: sign in, and grant where it asks."""
    page.fill("[name=user_name]", "alice")
    page.fill("[name=password]", "secret")
    page.press("[name=password]", "Enter", no_wait_after=True)


def grant(page):
    page.locator("[name=granted][value=true]").click(no_wait_after=True)


def allow(page, access="Full access"):
    """The two acts of an approval: what the application may do, and that it may."""
    page.get_by_label(access).check()
    page.get_by_role("button", name="Allow").click()


def approve(page, url):
    """From the authorization URL to Forgejo's last click.

    The redirects that follow are the test's to await.
    """
    page.goto(url)
    allow(page)
    sign_in(page)
    grant(page)


# -- the whole way


def test_18_a_login_ends_at_a_loopback_callback_and_the_code_works(browser, rig, callback):
    client = client_at(rig, f"http://localhost:{callback.port}/callback")
    page = new_page(browser)
    approve(page, client.authorize_url())
    page.wait_for_url("http://localhost:*/callback?*")
    assert page.title() == "Connected" and not page.troubles
    client.finish(page.url)
    mcp = McpClient(rig.url + "/mcp", client.tokens["access_token"])
    assert "alice" in text_of(mcp.call_tool("get_my_user_info"))
    mcp.close()


def test_18_a_login_ends_in_an_application_with_its_own_scheme(browser, rig):
    client = client_at(rig, "cursor://anysphere.cursor-mcp/oauth/callback", "Cursor")
    page = new_page(browser)
    # This machine has no such application: that the browser tried is all there is to see.
    with page.expect_event(
        "requestfailed",
        lambda request: request.url.startswith("cursor://anysphere.cursor-mcp/oauth/callback?code="),
    ) as tried:
        approve(page, client.authorize_url())
    assert dict(parse_qsl(urlsplit(tried.value.url).query))["iss"] == rig.url and not page.troubles


def test_C18_18_a_login_goes_through_an_https_callback_into_an_application(open_browser, rig, tmp_path):
    paths = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=claude.ai",
            "-out",
            paths[0],
            "-keyout",
            paths[1],
        ],
        check=True,
        capture_output=True,
    )
    server = Callback(paths)
    try:
        browser = open_browser(
            f"--host-resolver-rules=MAP claude.ai 127.0.0.1:{server.port}", "--ignore-certificate-errors"
        )
        client = client_at(rig, "https://claude.ai/onward/auth_callback")
        page = new_page(browser)
        with page.expect_event(
            "requestfailed", lambda request: request.url.startswith("claude://claude.ai/done?code=")
        ):
            approve(page, client.authorize_url())
        assert len(server.queries) == 1 and not page.troubles
    finally:
        server.close()


def test_read_only_is_what_the_person_gets_who_chooses_it(browser, rig, callback):
    client = client_at(rig, f"http://localhost:{callback.port}/callback")
    page = new_page(browser)
    page.goto(client.authorize_url())
    allow(page, "Read only")
    sign_in(page)
    grant(page)
    page.wait_for_url("http://localhost:*/callback?*")
    client.finish(page.url)
    assert client.tokens["scope"] == "forgejo:read"


def test_a_refusal_goes_back_to_the_client_at_once(browser, rig, callback):
    client = client_at(rig, f"http://localhost:{callback.port}/callback")
    page = new_page(browser)
    page.goto(client.authorize_url())
    page.get_by_role("button", name="Refuse").click()
    page.wait_for_url("http://localhost:*/callback?error=access_denied*")
    assert rig.forgejo.count("/login/oauth/authorize") == 0


def test_with_the_keyboard_alone(browser, rig, callback):
    client = client_at(rig, f"http://localhost:{callback.port}/callback")
    page = new_page(browser)
    page.goto(client.authorize_url())
    order = []
    for _ in range(3):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.value"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid", "what has the focus is not seen"
    assert order == ["full", "deny", "approve"]
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")  # decides nothing
    page.keyboard.press("Space")
    page.keyboard.press("ArrowDown")  # to Read only
    assert page.evaluate("document.activeElement.value") == "read"
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    sign_in(page)
    grant(page)
    page.wait_for_url("http://localhost:*/callback?*")
    client.finish(page.url)
    assert client.tokens["scope"] == "forgejo:read"


# -- what decides, and what does not


def was_answered(rig):
    return bool(rig.log.named("consent_given") or rig.log.named("consent_refused"))


def test_enter_decides_nothing_wherever_the_focus_is_but_on_a_button(browser, rig, callback):
    page = new_page(browser)
    page.goto(client_at(rig, f"http://localhost:{callback.port}/callback").authorize_url())
    page.keyboard.press("Enter")
    for access in ("Full access", "Read only"):
        page.get_by_label(access).check()
        page.get_by_label(access).press("Enter")
    page.goto(page.url)  # whatever had been sent would have left the page by now
    assert page.get_by_role("heading", level=1).inner_text() == "Connect an application?"
    assert not was_answered(rig)


def test_nothing_is_chosen_beforehand_and_no_double_click_approves(browser, rig, callback):
    page = new_page(browser)
    page.goto(client_at(rig, f"http://localhost:{callback.port}/callback").authorize_url())
    assert page.locator("[name=access]:checked").count() == 0
    page.get_by_role("button", name="Allow").dblclick()
    assert page.evaluate("document.querySelector('[name=access]').validity.valueMissing")
    for access in ("Full access", "Read only"):
        page.get_by_label(access).dblclick()
    page.goto(page.url)
    assert not was_answered(rig)


def test_where_only_reading_was_asked_for_nothing_else_is_offered(browser, rig, callback):
    client = client_at(rig, f"http://localhost:{callback.port}/callback")
    page = new_page(browser)
    page.goto(client.authorize_url(scope="forgejo:read"))
    assert page.locator("[name=access]").count() == 1 and page.get_by_label("Read only").is_checked()
    assert "change" not in page.locator("form").inner_text()


def test_what_is_listed_follows_the_choice(browser, rig, callback):
    page = new_page(browser)
    page.goto(client_at(rig, f"http://localhost:{callback.port}/callback").authorize_url())
    rights = {}
    for access in ("full", "read"):
        described = page.locator(f"[name=access][value={access}]").get_attribute("aria-describedby")
        rights[access] = page.locator(f"#{described}").inner_text()
    assert "see and change your repositories" in rights["full"]
    assert "see your" in rights["read"] and "your repositories" in rights["read"]
    assert "change" not in rights["read"]


def test_a_page_of_another_site_cannot_hold_the_consent_page_in_a_frame(browser, rig, callback):
    page = new_page(browser)
    page.goto(f"http://localhost:{callback.port}/")
    url = client_at(rig, f"http://localhost:{callback.port}/callback").authorize_url()
    with page.expect_event("console", lambda message: "frame" in message.text.lower()):
        page.evaluate(
            "url => document.body.append(Object.assign(document.createElement('iframe'), {src: url}))", url
        )
    assert page.frames[-1].locator("button").count() == 0


# -- what goes wrong


def test_a_form_sent_twice_leads_to_forgejo_twice(browser, rig, callback):
    client = client_at(rig, f"http://localhost:{callback.port}/callback")
    page = new_page(browser)
    page.goto(client.authorize_url())
    page.evaluate(
        "document.forms[0].target = '_blank'"
    )  # as an impatient second click does: the same form, sent again
    headings = []
    for _ in range(2):
        with page.expect_popup() as opened:
            allow(page)
        headings.append(opened.value.get_by_role("heading", level=1).inner_text())
    assert headings == ["Sign in", "Sign in"]


def test_a_form_left_too_long_says_so(browser, rig, callback):
    client = client_at(rig, f"http://localhost:{callback.port}/callback")
    page = new_page(browser)
    page.goto(client.authorize_url())
    rig.clock.advance(700)
    allow(page)
    assert page.get_by_role("heading", level=1).inner_text() == "This login has expired"


def test_a_login_finished_in_another_browser_says_so(browser, rig, callback):
    client = client_at(rig, f"http://localhost:{callback.port}/callback")
    mine, theirs = new_page(browser), new_page(browser)
    mine.goto(client.authorize_url())
    allow(mine)
    mine.wait_for_url(rig.forgejo.url + "/**")
    sign_in(mine)
    mine.locator("[name=granted][value=true]").wait_for()
    fields = mine.evaluate(
        "Object.fromEntries(new FormData(document.forms[0], "
        "document.querySelector('[name=granted][value=true]')))"
    )
    granted = mine.request.post(rig.forgejo.url + "/login/oauth/grant", form=fields, max_redirects=0)
    theirs.goto(granted.headers["location"])
    assert theirs.get_by_role("heading", level=1).inner_text() == "This login began in another browser"
    assert not callback.queries


@pytest.mark.parametrize(
    "path, heading",
    [
        ("/oauth/authorize?client_id=nobody", "This application is not registered here"),
        ("/oauth/callback?code=x&state=y", "This login has expired"),
        ("/nowhere", "There is no such page"),
    ],
)
def test_error_pages_say_what_to_do(browser, rig, path, heading):
    page = new_page(browser, **PHONE)
    page.goto(rig.url + path)
    assert page.get_by_role("heading", level=1).inner_text() == heading
    words = page.locator("main").inner_text()
    assert "again" in words or "Check the address" in words
    assert page.get_by_role("link", name="Home page").get_attribute("href") == "/"
    assert "name the request" in words
    assert fits(page)


# -- how it looks and sounds


def fits(page):
    """Whether nothing is wider than the screen."""
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


# WCAG 2.2's formula for the contrast of two colours, and the colour behind an element.
COLOURS = """
        const rgb = text => text.match(/[0-9.]+/g).map(Number)
        const light = ([r, g, b]) => [r, g, b].map(
            v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0)
        const behind = element => { for (; element; element = element.parentElement) {
            const colour = rgb(getComputedStyle(element).backgroundColor)
            if (colour.length < 4 || colour[3]) return colour }
            return [255, 255, 255] }
        const ratio = (one, other) => { const [a, b] = [light(one), light(other)]
            return (Math.max(a, b) + .05) / (Math.min(a, b) + .05) }
"""


def contrast(page):
    """The lowest contrast of any visible text with what is behind it."""
    return page.evaluate(
        "() => {"
        + COLOURS
        + """return Math.min(...[...document.querySelectorAll('main *')]
            .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()))
            .map(e => ratio(rgb(getComputedStyle(e).color), behind(e))))}"""
    )


def border_contrast(page):
    """The lowest contrast of the border of a button, or of a choice, with what is around it."""
    return page.evaluate(
        "() => {"
        + COLOURS
        + """return Math.min(...[...document.querySelectorAll('button:not([hidden]), .choice')]
            .map(e => ratio(rgb(getComputedStyle(e).borderTopColor), behind(e.parentElement))))}"""
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("options", [{}, PHONE], ids=["desktop", "phone"])
def test_the_consent_page_can_be_read_on_any_screen(browser, rig, callback, scheme, options):
    client = client_at(
        rig,
        "https://connector.example.org/with/a/rather/long/path/that/has/no/place/to/break?really=none&at=all",
        "An assistant with a name that is longer than one line of a telephone is wide",
    )
    page = new_page(browser, color_scheme=scheme, **options)
    page.goto(client.authorize_url())
    assert fits(page) and contrast(page) >= CONTRAST
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/)[0] < 128")
    assert dark == (scheme == "dark")
    for button in page.get_by_role("button").all():
        assert button.bounding_box()["height"] >= 44  # a finger's size
        assert button.bounding_box()["y"] < page.viewport_size["height"] or not options  # in reach on a phone
    assert border_contrast(page) >= CONTROL_CONTRAST
    if folder := os.environ.get("FJMCP_SCREENSHOTS"):
        page.screenshot(
            path=f"{folder}/consent-{scheme}-{'phone' if options else 'desktop'}.png", full_page=True
        )
        page.goto(rig.url + "/")
        page.screenshot(
            path=f"{folder}/home-{scheme}-{'phone' if options else 'desktop'}.png", full_page=True
        )
        page.goto(rig.url + "/oauth/authorize?client_id=nobody")
        page.screenshot(
            path=f"{folder}/error-{scheme}-{'phone' if options else 'desktop'}.png", full_page=True
        )


def test_the_page_for_people_who_open_the_address_fits_a_phone(browser, rig):
    page = new_page(browser, **PHONE)
    page.goto(rig.url + "/")
    assert fits(page) and contrast(page) >= CONTRAST and rig.url + "/mcp" in page.locator("main").inner_text()


@pytest.mark.parametrize("options", [{}, PHONE], ids=["desktop", "phone"])
def test_a_person_sees_and_ends_what_is_connected(browser, rig, options):
    client = rig.login(
        "alice", name="An assistant with a name that is longer than one line of a telephone is wide"
    )
    page = new_page(browser, **options)
    page.goto(rig.url + "/")
    page.get_by_role("link", name="See and end what you have connected").click()
    page.get_by_role("button", name="Log in at").click()
    sign_in(page)
    page.get_by_role("button", name="Disconnect").wait_for()
    assert (
        fits(page)
        and contrast(page) >= CONTRAST
        and "An assistant with a name" in page.locator("main").inner_text()
    )
    page.get_by_role("button", name="Disconnect").click()
    page.get_by_role("button", name="Disconnect").wait_for(state="detached")
    assert page.url == rig.url + "/account" and not page.troubles
    assert client.refresh().json()["error"] == "invalid_grant"
    page.get_by_role("button", name="Log out of this page").click()
    page.get_by_role("button", name="Log in at").wait_for()


def test_a_screen_reader_is_told_everything_in_order(browser, rig, callback):
    client = client_at(rig, f"http://localhost:{callback.port}/callback")
    page = new_page(browser)
    page.goto(client.authorize_url())
    snapshot = page.locator("main").aria_snapshot()
    parts = [
        'heading "Connect an application?" [level=1]',
        "Claude",
        "not verified",
        f"http://localhost:{callback.port}/callback",
        "Go on only if you started this yourself",
        'group "What may it do?"',
        'radio "Full access: use every tool, also those that change things"',
        "list:",
        "see and change your repositories",
        'radio "Read only: use only tools that look things up"',
        "list:",
        "You connect the account that is signed in",
        "until you end it at",
        'button "Refuse"',
        'button "Allow"',
    ]
    position = 0
    for part in parts:
        position = snapshot.find(part, position)
        assert position >= 0, f"{part} is not where it should be:\n{snapshot}"
    assert "[checked]" not in snapshot
    assert (
        page.evaluate("document.documentElement.lang") == "en" and page.title() == "Connect an application?"
    )
