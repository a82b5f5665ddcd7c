"""A scripted browser for tests and demos.

What Chromium does with redirects, cookies, forms and fetch metadata. It follows the
rules that logins depend on and that break in practice: which cookies a cross-site
request carries, what becomes of a POST in a redirect, what `Origin` and
`Sec-Fetch-Site` say along a redirect chain. It runs no script and loads no subresource.

    browser = Browser()
    callback = approve_login(browser, authorize_url, "alice", "secret")
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, parse_qsl, urlencode, urljoin, urlsplit, urlunsplit

if TYPE_CHECKING:
    from rigs.rig import Rig

Routes = Mapping[str, str]
Headers = Mapping[str, Any]  # a value None takes a header away
Stop = Callable[[str], object]
Fields = Mapping[str, str] | Sequence[tuple[str, str]]

MAX_REDIRECTS = 20
TIMEOUT = 30
REDIRECTS = (301, 302, 303, 307, 308)
DEFAULT_PORTS = {"http": 80, "https": 443}
USER_AGENT = "Mozilla/5.0 (X11; Linux x86_64) scripted-browser"
ACCEPT_PAGES = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
FORM_TYPE = "application/x-www-form-urlencoded"
REFUSES_REFERRER = "no-referrer"
LOGIN_STEPS = 8


class BrowserError(Exception):
    """A request that got no answer, or a form that has not what was asked of it."""


class LoginFailed(BrowserError):
    """A login that came to something else than its callback; `page` is where it ended."""

    def __init__(self, why: str, page: Page) -> None:
        super().__init__(f"{why}: {page.status} at {page.url}\n{page.words[:2000]}")
        self.page = page


# ---- Origins and sites
# ----------------------------------------------------------------------------------------------


def origin_of(url: str) -> str:
    """The origin of a URL as browsers write it (default ports left out), or "null" for what has none."""
    parts = urlsplit(url)
    if parts.scheme not in DEFAULT_PORTS or not parts.hostname:
        return "null"
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    port = parts.port or DEFAULT_PORTS[parts.scheme]
    return f"{parts.scheme}://{host}" + ("" if port == DEFAULT_PORTS[parts.scheme] else f":{port}")


def is_address(host: str) -> bool:
    """Whether this host is an IP address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether this host is this machine by its very name."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    return is_address(host) and ipaddress.ip_address(host).is_loopback


def site_of(origin: str) -> object:
    """(scheme, registrable domain), ports aside.

    Two labels stand for the public suffix list, enough for tests.
    """
    if origin == "null":
        return object()  # equal to no other site, not even to another opaque origin's
    parts = urlsplit(origin)
    host = parts.hostname or ""
    return parts.scheme, host if is_address(host) else ".".join(host.split(".")[-2:])


def relation(initiator: str, url: str) -> str:
    """What Sec-Fetch-Site says about one URL.

    "same-origin", "same-site" or "cross-site" with the initiator.
    """
    if initiator != "null" and initiator == origin_of(url):
        return "same-origin"
    return "same-site" if site_of(initiator) == site_of(origin_of(url)) else "cross-site"


def is_trustworthy(url: str) -> bool:
    """Whether fetch metadata is sent there: browsers keep it from plain HTTP to other machines."""
    parts = urlsplit(url)
    return parts.scheme == "https" or is_loopback(parts.hostname or "")


# ---- Cookies
# --------------------------------------------------------------------------------------------------------


@dataclass
class Cookie:
    name: str
    value: str
    domain: str
    path: str = "/"
    host_only: bool = True
    secure: bool = False
    http_only: bool = False
    same_site: str = "lax"
    expires: float | None = None

    def fits_host(self, host: str) -> bool:
        """Whether requests to this host may carry it."""
        if self.host_only or is_address(host):
            return host == self.domain
        return host == self.domain or host.endswith("." + self.domain)

    def fits_path(self, path: str) -> bool:
        """Whether requests for this path may carry it (RFC 6265, 5.1.4)."""
        return path == self.path or path.startswith(self.path if self.path.endswith("/") else self.path + "/")


class CookieJar:
    """The cookies of one browser, of all hosts. As in real browsers a port separates nothing."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.clock = clock
        # (domain, path, name) -> Cookie, oldest first
        self._cookies: dict[tuple[str, str, str], Cookie] = {}
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[Cookie]:
        with self._lock:
            now = self.clock()
            alive = {
                key: cookie
                for key, cookie in self._cookies.items()
                if cookie.expires is None or cookie.expires > now
            }
            self._cookies = alive
            return iter(list(alive.values()))

    def __len__(self) -> int:
        return sum(1 for _cookie in self)  # list() would ask for the length first

    def get(self, name: str, default: Cookie | None = None) -> Cookie | None:
        """The first cookie of this name, or `default`."""
        return next((cookie for cookie in self if cookie.name == name), default)

    def value(self, name: str) -> str:
        """The value of the first cookie of this name; KeyError if there is none."""
        cookie = self.get(name)
        if cookie is None:
            raise KeyError(name)
        return cookie.value

    def set(self, name: str, value: str, url: str, **attributes: Any) -> None:
        """Put in a cookie for a URL's host, past all rules (an attacker's toss, a copied session)."""
        self._put(Cookie(name, value, urlsplit(url).hostname or "", **attributes))

    def delete(self, name: str) -> None:
        """Forget every cookie of this name."""
        with self._lock:
            self._cookies = {key: cookie for key, cookie in self._cookies.items() if cookie.name != name}

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._cookies = {}

    def _put(self, cookie: Cookie) -> None:
        key = (cookie.domain, cookie.path, cookie.name)
        with self._lock:
            if cookie.expires is not None and cookie.expires <= self.clock():
                self._cookies.pop(key, None)
            else:
                self._cookies[key] = cookie  # replacing keeps the place, as browsers keep the creation time

    def take(self, url: str, set_cookie: str) -> bool:
        """Store one Set-Cookie header that came from `url`; True if it was accepted."""
        cookie = self._parsed(url, set_cookie)
        if cookie is None or not self._may_set(cookie, urlsplit(url)):
            return False
        self._put(cookie)
        return True

    def _parsed(self, url: str, text: str) -> Cookie | None:
        pair, *attributes = text.split(";")
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            return None
        parts = urlsplit(url)
        cookie = Cookie(name.strip(), value.strip(), parts.hostname or "", default_path(parts.path))
        max_age = None
        for attribute in attributes:
            key, _equals, value = (part.strip() for part in attribute.partition("="))
            key = key.lower()
            if key == "max-age" and re.fullmatch(r"-?\d+", value):
                max_age = int(value)
            elif key == "expires":
                cookie.expires = http_date(value, cookie.expires)
            elif key == "path":
                cookie.path = value if value.startswith("/") else default_path(parts.path)
            elif key == "domain" and value.lstrip("."):
                cookie.domain, cookie.host_only = value.lstrip(".").lower(), False
            elif key == "secure":
                cookie.secure = True
            elif key == "httponly":
                cookie.http_only = True
            elif key == "samesite":
                cookie.same_site = value.lower() if value.lower() in ("strict", "lax", "none") else "lax"
        if max_age is not None:
            cookie.expires = self.clock() + max_age
        return cookie

    def _may_set(self, cookie: Cookie, parts: SplitResult) -> bool:
        host, is_https = parts.hostname or "", parts.scheme == "https"
        if not cookie.host_only:
            if not cookie.fits_host(host) or ("." not in cookie.domain and cookie.domain != host):
                return False
        if cookie.secure and not is_https:
            return False
        if cookie.same_site == "none" and not cookie.secure:
            return False
        prefix = cookie.name.lower()
        if prefix.startswith(("__host-", "__secure-")) and not cookie.secure:
            return False
        if prefix.startswith("__host-") and not (cookie.host_only and cookie.path == "/"):
            return False
        return is_https or not self._shadows_secure(cookie)

    def _shadows_secure(self, new: Cookie) -> bool:
        """Plain HTTP may not lay a cookie over a Secure one (RFC 6265bis, "leave Secure cookies alone")."""
        return any(
            old.secure and old.name == new.name and (old.fits_host(new.domain) or new.fits_host(old.domain))
            for old in self
        )

    def header(self, url: str, method: str = "GET", site: str = "none") -> str:
        """The Cookie header of a top-level navigation to `url`, or "". `site` is as in Sec-Fetch-Site."""
        parts = urlsplit(url)
        fitting = [
            cookie
            for cookie in self
            if cookie.fits_host(parts.hostname or "")
            and cookie.fits_path(parts.path or "/")
            and (parts.scheme == "https" or not cookie.secure)
            and crosses(cookie.same_site, method, site)
        ]
        fitting.sort(key=lambda cookie: -len(cookie.path))
        return "; ".join(f"{cookie.name}={cookie.value}" for cookie in fitting)


def crosses(same_site: str, method: str, site: str) -> bool:
    """Whether a cookie of this SameSite goes with a top-level navigation.

    Chromium's two minutes of grace for POSTs with a cookie that
    names no SameSite are left out: nothing may rely on them.
    """
    if site != "cross-site" or same_site == "none":
        return True
    return same_site == "lax" and method in ("GET", "HEAD")


def default_path(path: str) -> str:
    """The path of a cookie that names none (RFC 6265, 5.1.4)."""
    return path[: path.rfind("/")] or "/" if path.startswith("/") else "/"


def http_date(text: str, default: float | None) -> float | None:
    """Seconds since the epoch of a cookie's date, or `default` if it cannot be read."""
    try:
        return parsedate_to_datetime(text.replace("-", " ")).timestamp()
    except (ValueError, TypeError):
        return default


# ---- Pages and forms
# ------------------------------------------------------------------------------------------------


@dataclass
class Button:
    name: str
    value: str
    label: str = ""
    action: str | None = None
    validates: bool = True


@dataclass
class Form:
    """One form.

    `fields` is what a submit sends if nothing is touched; `radios` maps a name to the
    values offered. `required` names what has to be chosen before a button submits;
    `enter_submits`: whether the Enter key does, which in Chromium presses the first
    submit button that is not disabled, and sends nothing if that one submits to a dialog.
    """

    action: str
    method: str
    fields: dict[str, str] = field(default_factory=dict)
    radios: dict[str, list[str]] = field(default_factory=dict)
    buttons: list[Button] = field(default_factory=list)
    required: set[str] = field(default_factory=set)
    enter_submits: bool = True

    def button(self, name: str, value: str | None = None) -> Button | None:
        """The button of this name (and value), or None."""
        return next(
            (button for button in self.buttons if button.name == name and value in (None, button.value)), None
        )

    def __contains__(self, name: str) -> bool:
        return name in self.fields or name in self.radios or self.button(name) is not None


@dataclass(repr=False)
class Page:
    """What one navigation came to. `history` holds (status, method, url) of each answer, this one's last;
    `redirected_to` is the URL the browser did not follow, if it stopped at a redirect."""

    url: str
    status: int
    headers: http.client.HTTPMessage
    body: bytes
    history: list[tuple[int, str, str]]
    redirected_to: str | None = None

    def __post_init__(self) -> None:
        charset = self.headers.get_content_charset("utf-8")
        self.text = self.body.decode(charset, "replace")
        reader = _PageReader(self.url)
        if self.headers.get_content_type() in ("text/html", "application/xhtml+xml"):
            reader.feed(self.text)
            reader.close()
        self.forms = reader.forms
        self.words = " ".join(" ".join(reader.words).split()) or self.text

    def __repr__(self) -> str:
        there = f" -> {self.redirected_to}" if self.redirected_to else ""
        return f"<Page {self.status} {self.url}{there}: {self.words[:200]!r}>"

    def form_with(self, *names: str) -> Form | None:
        """The first form that has all these fields or buttons, or None."""
        return next((form for form in self.forms if all(name in form for name in names)), None)


class _PageReader(HTMLParser):
    """Collects the forms and the visible words of a page."""

    def __init__(self, url: str) -> None:
        super().__init__(convert_charrefs=True)
        self.url = url
        self.forms: list[Form] = []
        self.words: list[str] = []
        self._form: Form | None = None
        self._button: Button | None = None
        self._select: str | None = None
        self._textarea: str | None = None
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._start(tag, {name: value or "" for name, value in attrs})

    def _start(self, tag: str, attrs: dict[str, str]) -> None:
        if tag in ("style", "script", "template"):
            self._hidden += 1
        elif tag == "form":
            self._form = Form(
                urljoin(self.url, attrs.get("action") or self.url), attrs.get("method", "get").upper()
            )
            self.forms.append(self._form)
        elif self._form is not None and attrs.get("formmethod") == "dialog":
            self._form.enter_submits = self._form.enter_submits and bool(self._form.buttons)
        elif self._form is not None and "disabled" not in attrs:
            self._control(self._form, tag, attrs)

    def _control(self, form: Form, tag: str, attrs: dict[str, str]) -> None:
        if tag == "input":
            self._input(form, attrs)
        elif tag == "button" and attrs.get("type", "submit").lower() == "submit":
            self._button = self._new_button(form, attrs)
        elif tag == "select":
            self._select = attrs.get("name", "")
        elif tag == "option" and self._select:
            if "selected" in attrs or self._select not in form.fields:
                form.fields[self._select] = attrs.get("value", "")
        elif tag == "textarea":
            self._textarea = attrs.get("name", "")
            if self._textarea:
                form.fields[self._textarea] = ""

    def _input(self, form: Form, attrs: dict[str, str]) -> None:
        name, kind = attrs.get("name", ""), attrs.get("type", "text").lower()
        if kind == "submit":
            self._new_button(form, attrs).label = attrs.get("value", "")
        elif not name or kind in ("button", "reset", "image", "file"):
            return
        elif kind in ("radio", "checkbox"):
            value = attrs.get("value", "on")
            if kind == "radio":
                form.radios.setdefault(name, []).append(value)
            if "required" in attrs:
                form.required.add(name)
            if "checked" in attrs:
                form.fields[name] = value
        else:
            form.fields[name] = attrs.get("value", "")

    def _new_button(self, form: Form, attrs: dict[str, str]) -> Button:
        action = urljoin(self.url, attrs["formaction"]) if "formaction" in attrs else None
        validates = "formnovalidate" not in attrs
        button = Button(attrs.get("name", ""), attrs.get("value", ""), action=action, validates=validates)
        form.buttons.append(button)
        return button

    def handle_endtag(self, tag: str) -> None:
        if tag in ("style", "script", "template"):
            self._hidden = max(0, self._hidden - 1)
        elif tag == "form":
            self._form = self._button = self._select = self._textarea = None
        elif tag == "button":
            self._button = None
        elif tag == "select":
            self._select = None
        elif tag == "textarea":
            self._textarea = None

    def handle_data(self, data: str) -> None:
        if self._textarea and self._form is not None:
            self._form.fields[self._textarea] += data
        if self._button is not None:
            self._button.label = f"{self._button.label} {data}".strip()
        if not self._hidden:
            self.words.append(data)


# ---- The browser
# ----------------------------------------------------------------------------------------------------


def connect(
    url: str, *, routes: Routes | None = None, timeout: float = TIMEOUT, context: ssl.SSLContext | None = None
) -> http.client.HTTPConnection:
    """An unopened http.client connection for a URL.

    `routes` maps an origin to the origin that is really spoken to ({"https://broker.example":
    "http://127.0.0.1:8080"}: what a proxy that ends TLS does; or to https elsewhere).
    """
    origin = origin_of(url)
    asked, parts = urlsplit(origin), urlsplit((routes or {}).get(origin, origin))
    if parts.scheme == "http":
        return http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout)
    # The certificate is that of the name which was asked for, wherever it is spoken to.
    connection = http.client.HTTPSConnection(
        asked.hostname or "", asked.port, timeout=timeout, context=context
    )
    # http.client has no public way to another address than the name's.
    vars(connection)["_create_connection"] = lambda _address, *rest: socket.create_connection(
        (parts.hostname, parts.port), *rest
    )
    return connection


def host_header(url: str) -> str:
    """The Host header of a request for this URL."""
    return origin_of(url).partition("://")[2]


def request_target(url: str) -> str:
    """The path and query of a URL as they stand in the request line."""
    parts = urlsplit(url)
    return urlunsplit(("", "", parts.path or "/", parts.query, ""))


class Browser:
    """One person's browser.

    Redirects are followed until `stop(url)` is true; by default that is any URL that is not http(s) or whose
    origin is in `callbacks`, and always after `max_redirects`. `routes` and `context` are as in `connect`;
    `hop(url)` is called before each request; `fetch_metadata=False` makes a browser that sends no
    Sec-Fetch-*, as older ones do; `clock` gives the time by which cookies expire.
    """

    def __init__(
        self,
        callbacks: Iterable[str] = (),
        *,
        routes: Routes | None = None,
        context: ssl.SSLContext | None = None,
        hop: Callable[[str], object] | None = None,
        fetch_metadata: bool = True,
        timeout: float = TIMEOUT,
        max_redirects: int = MAX_REDIRECTS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.callbacks = {origin_of(url) for url in callbacks}
        self.routes, self.context, self.hop = dict(routes or {}), context, hop
        self.fetch_metadata, self.timeout, self.max_redirects = fetch_metadata, timeout, max_redirects
        self.cookies = CookieJar(clock)

    def stops_at(self, url: str) -> bool:
        """The default for `stop`."""
        return urlsplit(url).scheme not in DEFAULT_PORTS or origin_of(url) in self.callbacks

    def get(
        self,
        url: str,
        *,
        initiator: str | None = None,
        stop: Stop | None = None,
        headers: Headers | None = None,
    ) -> Page:
        """Navigate to `url`: typed into the address bar, or followed from a page at the URL `initiator`."""
        origin = None if initiator is None else origin_of(initiator)
        return self._navigate("GET", url, None, origin, origin, stop, headers)

    def post(
        self,
        url: str,
        fields: Fields,
        *,
        origin: str = "",
        stop: Stop | None = None,
        headers: Headers | None = None,
    ) -> Page:
        """Send a form from a page of `origin` (by default the target's own; "null" for an opaque one).

        `fields` is a dict or a list of pairs. `headers` are added last; a value None takes a header away.
        """
        origin = origin or origin_of(url)
        return self._navigate("POST", url, urlencode(fields).encode(), origin, origin, stop, headers)

    def submit(
        self,
        page: Page,
        /,
        button: tuple[str, str] | None = None,
        form: int | Form = 0,
        *,
        stop: Stop | None = None,
        **overrides: str | None,
    ) -> Page:
        """Submit a form of a page by one of its buttons.

        `form` is an index or a Form; `button` is (name, value) and must be there, None is the Enter key.
        `overrides` replace fields as they are (None takes one away). BrowserError where a browser would not
        send the form: Enter decides nothing, or what is required was not chosen.
        """
        form = self._form(page, form)
        pressed = self._pressed(page, form, button)
        if pressed is None and not form.enter_submits:
            raise BrowserError(
                f"Enter sends nothing: the first button of the form leads nowhere, on {page!r}"
            )
        fields = {name: value for name, value in {**form.fields, **overrides}.items() if value is not None}
        missing = form.required - fields.keys()
        if missing and (pressed is None or pressed.validates):
            raise BrowserError(f"nothing is chosen for {missing} on {page!r}")
        if pressed is not None and pressed.name:
            fields[pressed.name] = pressed.value
        action = (pressed.action if pressed is not None else None) or form.action
        initiator = origin_of(page.url)
        if form.method == "POST":
            return self._navigate(
                "POST", action, urlencode(fields).encode(), initiator, origin_header(page, action), stop, None
            )
        target = urlunsplit(urlsplit(action)._replace(query=urlencode(fields), fragment=""))
        return self._navigate("GET", target, None, initiator, initiator, stop, None)

    @staticmethod
    def _form(page: Page, form: int | Form) -> Form:
        if isinstance(form, Form):
            return form
        if form >= len(page.forms):
            raise BrowserError(f"no form number {form} on {page!r}")
        return page.forms[form]

    @staticmethod
    def _pressed(page: Page, form: Form, button: tuple[str, str] | None) -> Button | None:
        if button is None:
            return None
        found = form.button(*button)
        if found is None:
            raise BrowserError(f"no button {button} among {form.buttons} on {page!r}")
        return found

    def _navigate(
        self,
        method: str,
        url: str,
        body: bytes | None,
        initiator: str | None,
        origin: str | None,
        stop: Stop | None,
        headers: Headers | None,
    ) -> Page:
        """`initiator` is the origin that began it (None: the address bar).

        `origin` is what the Origin header shows.
        """
        stop = stop or self.stops_at
        site = "none" if initiator is None else "same-origin"
        history: list[tuple[int, str, str]] = []
        while True:
            if initiator is not None:
                site = farther(site, relation(initiator, url))
            page = self._exchange(
                method,
                url,
                body,
                self._headers(method, url, body, site, origin, headers),
                relation(initiator, url) if initiator else "none",
                history,
            )
            location = page.headers.get("Location")
            if page.status not in REDIRECTS or location is None:
                return page
            target = followed(url, location)
            if stop(target) or len(history) > self.max_redirects:
                page.redirected_to = target
                return page
            if page.status == 303 or (page.status in (301, 302) and method == "POST"):
                method, body = "GET", None
            if origin is not None and origin_of(target) != origin_of(url) and origin != origin_of(url):
                origin = "null"  # Fetch, "tainted origin": a third party in the chain hides who began it
            url = target

    def _headers(
        self, method: str, url: str, body: bytes | None, site: str, origin: str | None, extra: Headers | None
    ) -> dict[str, str]:
        headers: dict[str, Any] = {
            "Host": host_header(url),
            "Connection": "close",
            "User-Agent": USER_AGENT,
            "Accept": ACCEPT_PAGES,
            "Accept-Language": "en",
            "Accept-Encoding": "identity",
            "Upgrade-Insecure-Requests": "1",
        }
        if body is not None:
            headers["Content-Type"] = FORM_TYPE
            headers["Content-Length"] = str(len(body))
        if method not in ("GET", "HEAD"):
            headers["Origin"] = origin
        if self.fetch_metadata and is_trustworthy(url):
            headers |= {
                "Sec-Fetch-Site": site,
                "Sec-Fetch-Mode": "navigate",
                "Sec-Fetch-User": "?1",
                "Sec-Fetch-Dest": "document",
            }
        headers |= extra or {}
        return {name: value for name, value in headers.items() if value is not None}

    def _exchange(
        self,
        method: str,
        url: str,
        body: bytes | None,
        headers: dict[str, str],
        cookie_site: str,
        history: list[tuple[int, str, str]],
    ) -> Page:
        if self.hop is not None:
            self.hop(url)
        cookies = self.cookies.header(url, method, cookie_site)
        if cookies and "Cookie" not in headers:
            headers["Cookie"] = cookies
        connection = connect(url, routes=self.routes, timeout=self.timeout, context=self.context)
        with contextlib.closing(connection):
            try:
                # Headers are in `headers` to the last one: http.client would add a Host of its own otherwise.
                connection.putrequest(method, request_target(url), skip_host=True, skip_accept_encoding=True)
                for name, value in headers.items():
                    connection.putheader(name, value)
                connection.endheaders(body)
                response = connection.getresponse()
                page_body = response.read()
            except (OSError, http.client.HTTPException) as error:
                raise BrowserError(f"{method} {url}: {type(error).__name__}: {error}") from error
        for header in response.headers.get_all("Set-Cookie", ()):
            self.cookies.take(url, header)
        history.append((response.status, method, url))
        return Page(url, response.status, response.headers, page_body, list(history))


def origin_header(page: Page, action: str) -> str:
    """The Origin of a form on `page`: hidden when the page's referrer policy says so.

    Without this quirk a policy that locks browsers out of a site's own forms would pass every test.
    """
    origin = origin_of(page.url)
    policies = [word.strip().lower() for word in page.headers.get("Referrer-Policy", "").split(",")]
    if policies[-1] == REFUSES_REFERRER:
        return "null"
    return "null" if policies[-1] == "same-origin" and origin != origin_of(action) else origin


def farther(one: str, other: str) -> str:
    """The less related of two values of Sec-Fetch-Site; a redirect chain never gets closer again."""
    return max(one, other, key=("same-origin", "same-site", "cross-site").index)


def followed(url: str, location: str) -> str:
    """Where a Location header leads; a fragment lives on through a redirect that has none."""
    target, fragment = urljoin(url, location), urlsplit(url).fragment
    if fragment and not urlsplit(target).fragment:
        return f"{target}#{fragment}"
    return target


# ---- A login
# --------------------------------------------------------------------------------------------------------


def approve_login(
    browser: Browser,
    authorize_url: str,
    login: str,
    password: str,
    *,
    access: str | None = "full",
    decision: str = "approve",
    redirect_uri: str | None = None,
) -> str:
    """Walk an authorization request as a person does.

    The broker's consent page, Forgejo's sign-in and consent pages where they are shown, up to the client's
    redirect URI (by default the one in `authorize_url`). `access` is "full", "read", or None for what the
    page has chosen; `decision` is "approve" or "deny". Returns the callback URL, of an error too; it is not
    fetched. LoginFailed, with the page's words, if anything else comes up.
    """
    callback = redirect_uri or dict(parse_qsl(urlsplit(authorize_url).query)).get("redirect_uri")
    walk = _LoginWalk(browser, callback, login, password, access, decision)
    page = browser.get(authorize_url, stop=walk.stop)
    for _step in range(LOGIN_STEPS):
        if page.redirected_to is not None:
            if not walk.is_callback(page.redirected_to):
                raise LoginFailed(f"redirected to {page.redirected_to} instead of {callback}", page)
            return page.redirected_to
        page = walk.step(page)
    raise LoginFailed("no end to the login's pages", page)


@dataclass
class _LoginWalk:
    browser: Browser
    callback: str | None
    login: str
    password: str
    access: str | None
    decision: str
    signed_in: bool = False

    def is_callback(self, url: str) -> bool:
        if self.callback is None:
            return self.browser.stops_at(url)
        there, wanted = urlsplit(url), urlsplit(self.callback)
        return (there.scheme, there.netloc, there.path or "/") == (
            wanted.scheme,
            wanted.netloc,
            wanted.path or "/",
        )

    def stop(self, url: str) -> bool:
        return self.is_callback(url) or self.browser.stops_at(url)

    def step(self, page: Page) -> Page:
        consent = page.form_with("decision")
        if consent is not None:
            return self._answer_consent(page, consent)
        sign_in = page.form_with("user_name", "password")
        if sign_in is not None:
            return self._sign_in(page, sign_in)
        grant = page.form_with("granted")
        if grant is not None and urlsplit(grant.action).path.endswith("/login/oauth/grant"):
            return self.browser.submit(page, ("granted", "true"), grant, stop=self.stop)
        raise LoginFailed("not a page of a login", page)

    def _answer_consent(self, page: Page, form: Form) -> Page:
        chosen = {}
        if self.decision == "approve" and self.access is not None:
            offered = form.radios.get("access") or [form.fields.get("access", "")]
            if self.access not in offered:
                raise LoginFailed(f"the consent page offers access {offered}, not {self.access}", page)
            chosen["access"] = self.access
        return self.browser.submit(page, ("decision", self.decision), form, stop=self.stop, **chosen)

    def _sign_in(self, page: Page, form: Form) -> Page:
        if self.signed_in:
            raise LoginFailed(f"{self.login} could not sign in", page)
        self.signed_in = True
        return self.browser.submit(
            page, None, form, stop=self.stop, user_name=self.login, password=self.password
        )


def query_of(url: str) -> dict[str, str]:
    """The parameters of a URL's query."""
    return dict(parse_qsl(urlsplit(url).query, keep_blank_values=True))


def open_account(rig: Rig, user: str = "alice", browser: Browser | None = None) -> tuple[Browser, Page]:
    """(browser, page) of a user who logged in to the account page."""
    browser = browser or Browser()
    page = browser.get(rig.url + "/account")
    page = browser.submit(page, form=page.forms[0])
    while not page.url.startswith(rig.url + "/account"):
        if any("user_name" in form.fields for form in page.forms):
            page = browser.submit(
                page, form=page.form_with("user_name") or 0, user_name=user, password="secret"
            )
        else:
            page = browser.submit(page, ("granted", "true"))
    return browser, page
