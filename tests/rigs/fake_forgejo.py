"""A fake Forgejo for tests and demos: its OAuth2 provider and a little of its API.

It answers as a Forgejo of July 2026 was measured to, oddities included (every token
error is a 400, only the API knows that a user is suspended, its 401 quotes the token,
one valid refresh token per user and application), because those oddities are what its
clients get wrong; the other profiles are older servers, from their source. Tokens are
signed as by a Forgejo with JWT_SIGNING_ALGORITHM = HS256. State lives in memory.

In a test:

    with FakeForgejo() as forgejo:
        app = forgejo.add_app(["http://127.0.0.1:8080/oauth/callback"])
        forgejo.inject("/login/oauth/access_token", lose_response())

As a program: `python3 fake_forgejo.py --port 3000` prints
the users and the application and serves until stopped.
"""

from __future__ import annotations

import argparse
import base64
import copy
import hashlib
import hmac
import html as html_text
import ipaddress
import itertools
import json
import re
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from email.message import Message
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler
from typing import Any, Self, cast
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

WAIT = 30.0
CONSENT_LIMIT = 600
OIDC_SCOPES = ("openid", "profile", "email", "groups")
SCOPE_CATEGORIES = (
    "activitypub",
    "admin",
    "misc",
    "notification",
    "organization",
    "package",
    "issue",
    "repository",
    "user",
)
API_SCOPES = {f"{level}:{category}" for level in ("read", "write") for category in SCOPE_CATEGORIES}
API_SCOPES |= {"all", "public-only"}
PROHIBITED = "This account is prohibited from signing in, please contact your site administrator."
NOT_ACTIVATED = "This account is not activated."
BAD_CREDENTIALS = "Credentials are incorrect or have expired. Please try again.\n"
SIGNED_IN_ONLY = "Only signed in user is allowed to call APIs."
CREATED = "2026-01-02T03:04:05Z"
MISSING = object()
"""As a value in `json_override`: leave this member out."""


@dataclass(frozen=True)
class Profile:
    """What differs between the servers and versions met in practice."""

    rotates_refresh_tokens: bool
    api_reads_scopes: bool
    s256_lost_on_consent: bool
    binds_code_to_redirect: str  # the error for a mismatch, or "" where only registration is checked
    binds_refresh_to_client: bool
    checks_refresh_type: bool
    code_lifetime: int | None
    scope_of_grant_follows_request: bool
    name_falls_back_to_login: bool
    names_auth_failures: bool
    groups_when_none: bool
    web_knows_suspension: bool
    csrf_tokens: bool
    session_cookie: str


PROFILES = {
    "forgejo": Profile(
        True,
        True,
        False,
        "unauthorized_client",
        True,
        True,
        None,
        False,
        True,
        True,
        False,
        False,
        False,
        "session",
    ),
    "forgejo-old": Profile(
        False, False, True, "", False, False, None, False, False, False, False, True, True, "i_like_gitea"
    ),
    "gitea": Profile(
        False,
        True,
        False,
        "invalid_grant",
        True,
        False,
        CONSENT_LIMIT,
        True,
        True,
        False,
        True,
        True,
        True,
        "i_like_gitea",
    ),
}


# ---- What is stored
# -------------------------------------------------------------------------------------------------


@dataclass
class User:
    id: int
    sub: str
    login: str
    password: str
    full_name: str
    groups: list[str]
    admin: bool
    created: str = CREATED
    suspended: bool = False
    inactive: bool = False
    must_change_password: bool = False

    @property
    def email(self) -> str:
        return f"{self.login}@example.test"


@dataclass
class App:
    id: int
    client_id: str
    client_secret: str
    redirect_uris: list[str]
    confidential: bool
    name: str

    def accepts_redirect(self, uri: str) -> bool:
        """Forgejo's comparison: case and one trailing slash of the whole string do not count.

        A public client's loopback address may carry any port.
        """

        def plain(text: str) -> str:
            return text.lower().removesuffix("/")

        registered = {plain(known) for known in self.redirect_uris}
        return plain(uri) in registered or (
            not self.confidential and plain(_without_loopback_port(uri)) in registered
        )


@dataclass
class Grant:
    id: int
    user_id: int
    app_id: int
    scope: str
    nonce: str = ""
    counter: int = 0


@dataclass
class Code:
    code: str
    grant_id: int
    redirect_uri: str
    challenge: str
    method: str
    made_at: float

    def accepts(self, verifier: str) -> bool:
        if self.method == "S256":
            return _b64(hashlib.sha256(verifier.encode()).digest()) == self.challenge
        return self.method == "" or (self.method == "plain" and verifier == self.challenge)


@dataclass
class Repo:
    id: int
    owner_id: int
    name: str
    private: bool
    issues: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class WebSession:
    csrf: str
    user_id: int | None = None
    values: dict[str, Any] = field(default_factory=dict)


@dataclass
class Identity:
    """The bearer of an access token, as the API's middleware sees it."""

    user: User
    grant: Grant
    scopes: set[str]


class BadToken(Exception):
    """A presented token that does not count; the text is Forgejo's reason."""


class Refusal(Exception):
    """Carries the response to give instead of going on."""

    def __init__(self, response: Response) -> None:
        super().__init__(response.status)
        self.response = response


class Cut(Exception):
    """End the connection without an answer."""


# ---- Requests, responses, log
# ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recorded:
    """One request.

    `status` is 0 while it hangs in a fault, and stays 0 if it was never answered; a lost answer keeps its
    status. `query` and `form` map each name to its first value; the names in `headers` are lower-case.
    """

    method: str
    path: str
    query: dict[str, str]
    user_agent: str
    auth_user: str | None
    grant_id: int | None
    status: int
    form: dict[str, str] = field(default_factory=dict, repr=False)
    headers: dict[str, str] = field(default_factory=dict, repr=False)


class RequestLog(Sequence[Recorded]):
    """The requests in the order in which they were processed or began to hang.

    Each once, logged before its answer is sent, so that whoever sees the answer finds it here.
    """

    def __init__(self) -> None:
        self._items: list[Recorded] = []
        self._changed = threading.Condition()

    def __len__(self) -> int:
        with self._changed:
            return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        with self._changed:
            return self._items[index]

    def __repr__(self) -> str:
        return "\n".join(map(repr, self[:]))

    def replace(self, old: Recorded | None, new: Recorded) -> None:
        """Put `new` where `old` is, or at the end."""
        with self._changed:
            place = next((n for n, item in enumerate(self._items) if item is old), len(self._items))
            self._items[place : place + 1] = [new]
            self._changed.notify_all()

    def clear(self) -> None:
        with self._changed:
            self._items.clear()

    def count(self, path_prefix: str, method: str | None = None) -> int:
        """How many requests were logged under this path (of this method)."""
        return sum(_matches(item, path_prefix, method) for item in self[:])

    def wait_for(
        self, predicate: Callable[[Recorded], object], timeout: float = WAIT, *, start: int = 0
    ) -> Recorded:
        """The first logged request from index `start` on that satisfies `predicate`.

        Blocks until there is one. TimeoutError, with the log as text, if none comes.
        """

        def found() -> Recorded | None:
            return next((item for item in self._items[start:] if predicate(item)), None)

        with self._changed:
            hit = self._changed.wait_for(found, timeout)
            if hit is None:
                raise TimeoutError("no such request; logged:\n" + "\n".join(map(repr, self._items)))
            return hit


class Request:
    """One request read from the wire; the handlers note in `auth_user` and `grant_id` whom they served."""

    def __init__(self, method: str, target: str, headers: Message, body: bytes) -> None:
        parts = urlsplit(target)
        self.method, self.path, self.headers, self.body = method, unquote(parts.path), headers, body
        self.target = target  # as the browser asked for it
        self.query = _first_values(parts.query)
        self.auth_user: str | None = None
        self.grant_id: int | None = None
        self.session: Any = None
        self.session_id: Any = None
        self.form = self._read_form()

    def below(self, path: str) -> bool:
        """Take this path off the front, as a proxy does.

        False when the request is for something beside it.
        """
        inside = self.path == path or self.path.startswith(path + "/")
        self.path = (self.path.removeprefix(path) or "/") if inside else self.path
        return inside

    def _read_form(self) -> dict[str, str]:
        """Form or JSON body as name to text, as Forgejo binds both to the same struct."""
        kind = self.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        text = self.body.decode("utf-8", "replace")
        if kind == "application/x-www-form-urlencoded":
            return _first_values(text)
        if kind == "application/json":
            value = self.json()
            if isinstance(value, dict):
                return {
                    name: item if isinstance(item, str) else json.dumps(item) for name, item in value.items()
                }
        return {}

    def json(self) -> Any:
        try:
            return json.loads(self.body)
        except ValueError:
            return None

    def cookie(self, name: str) -> str | None:
        try:
            morsel = SimpleCookie(self.headers.get("Cookie", "")).get(name)
        except CookieError:
            return None
        return morsel.value if morsel else None

    def recorded(self, status: int) -> Recorded:
        return Recorded(
            self.method,
            self.path,
            self.query,
            self.headers.get("User-Agent", ""),
            self.auth_user,
            self.grant_id,
            status,
            self.form,
            {k.lower(): v for k, v in self.headers.items()},
        )


@dataclass
class Response:
    """`send_only`: how many bytes of the body to send before the connection is cut; None for all of it."""

    status: int
    body: bytes = b""
    content_type: str = ""
    headers: list[tuple[str, str]] = field(default_factory=list)
    send_only: int | None = None

    def cookie(self, name: str, value: str, *, http_only: bool = True) -> Self:
        age = "; Max-Age=0" if value == "" else ""
        self.headers.append(
            ("Set-Cookie", f"{name}={value}; Path=/; SameSite=Lax{age}" + "; HttpOnly" * http_only)
        )
        return self

    def json(self) -> Any:
        return json.loads(self.body)

    def with_json(self, value: object) -> Self:
        self.body = json.dumps(value).encode()
        return self


def _json(status: int, value: object) -> Response:
    return Response(
        status, json.dumps(value, separators=(",", ":")).encode(), "application/json;charset=utf-8"
    )


def _text(status: int, text: str, headers: Iterable[tuple[str, str]] = ()) -> Response:
    return Response(status, text.encode(), "text/plain; charset=utf-8", list(headers))


def _see_other(location: str) -> Response:
    return Response(303, headers=[("Location", location)])


# ---- Faults
# ---------------------------------------------------------------------------------------------------------


Pause = Callable[[threading.Event], None]
Before = Callable[[Request, Pause], Response | None]
After = Callable[[Response, Pause], Response]


class Fault:
    """Something that goes wrong with a request.

    `before(request, pause)` runs before the request is processed and may return the response to give instead;
    `after(response, pause)` runs once it was processed and returns what to send. Either may raise Cut.
    `pause(event)` blocks until the event is set, and raises Cut if the server stops first.
    """

    def __init__(self, before: Before | None = None, after: After | None = None) -> None:
        self.released = threading.Event()
        self._before, self._after = before, after

    def release(self) -> None:
        """Let requests that hang in this fault go on."""
        self.released.set()

    def before(self, request: Request, pause: Pause) -> Response | None:
        return self._before(request, pause) if self._before else None

    def after(self, response: Response, pause: Pause) -> Response:
        return self._after(response, pause) if self._after else response


def hang(*, processed: bool = False) -> Fault:
    """No answer until `.release()`, then it is handled normally; the server's stop cuts the connection.

    With `processed` the request takes effect first and only the answer hangs.
    """
    fault = Fault()

    def wait_before(_request: Request, pause: Pause) -> None:
        pause(fault.released)

    def wait_after(response: Response, pause: Pause) -> Response:
        pause(fault.released)
        return response

    fault._before, fault._after = (None, wait_after) if processed else (wait_before, None)
    return fault


def slow_until(event: threading.Event) -> Fault:
    """The request waits for `event` (a threading.Event) before it is processed."""
    return Fault(before=lambda _request, pause: pause(event))


def run(action: Callable[[], object]) -> Fault:
    """Call `action()` just before the request is processed, for a change at exactly this point."""

    def before(_request: Request, _pause: Pause) -> None:
        action()

    return Fault(before=before)


def status(
    code: int, body: object = b"", content_type: str | None = None, headers: Mapping[str, str] | None = None
) -> Fault:
    """Answer so, without processing. `body` may be bytes, text, or a value to send as JSON."""
    if not isinstance(body, (bytes, str)):
        body, default = json.dumps(body), "application/json;charset=utf-8"
    else:
        default = "text/plain; charset=utf-8"
    data = body.encode() if isinstance(body, str) else body
    extra = list(dict(headers or {}).items())
    return Fault(before=lambda _request, _pause: Response(code, data, content_type or default, list(extra)))


def oauth_error(error: str, description: str = "") -> Fault:
    """Answer as the token endpoint refuses: 400 with this error, without processing."""
    return status(400, {"error": error, "error_description": description})


def html(
    code: int = 200, text: str = "<!DOCTYPE html><html><body><h1>Proxy page</h1></body></html>"
) -> Fault:
    """Answer with an HTML page, without processing."""
    return status(code, text, "text/html; charset=utf-8")


def redirect(location: str, code: int = 303) -> Fault:
    """Answer with a redirect, without processing."""
    return status(code, b"", headers={"Location": location})


def lose_response() -> Fault:
    """Process the request fully, then cut the connection.

    What it changed stays changed, nobody hears of it.
    """

    def after(_response: Response, _pause: Pause) -> Response:
        raise Cut

    return Fault(after=after)


def cut_body() -> Fault:
    """Announce the whole body, send half of it, cut the connection."""

    def after(response: Response, _pause: Pause) -> Response:
        response.send_only = len(response.body) // 2
        return response

    return Fault(after=after)


def json_override(change: Any) -> Fault:
    """Process the request, then change its JSON.

    A dict replaces members (MISSING removes one), a callable maps the whole value to another.
    """

    def merged(value: dict[str, Any]) -> dict[str, Any]:
        value = {**value, **change}
        return {name: item for name, item in value.items() if item is not MISSING}

    mapping = change if callable(change) else merged
    return Fault(after=lambda response, _pause: response.with_json(mapping(response.json())))


def wrong_content_type(content_type: str = "text/plain") -> Fault:
    """Process the request and send the right body under another media type."""

    def after(response: Response, _pause: Pause) -> Response:
        response.content_type = content_type
        return response

    return Fault(after=after)


def truncated_json() -> Fault:
    """Process the request and send the first half of the JSON as a complete HTTP message."""

    def after(response: Response, _pause: Pause) -> Response:
        response.body = response.body[: len(response.body) // 2]
        return response

    return Fault(after=after)


def huge_json(size: int = 32 << 20) -> Fault:
    """Process the request and send its JSON object with `size` bytes of padding first."""

    def after(response: Response, _pause: Pause) -> Response:
        return response.with_json({"padding": "x" * size, **response.json()})

    return Fault(after=after)


class Injection:
    """A fault in its place: it strikes the nth to (nth + times - 1)th request counted from its injection."""

    def __init__(
        self, path_prefix: str, fault: Fault, nth: int, times: int | None, method: str | None
    ) -> None:
        self.path_prefix, self.fault, self.nth, self.times, self.method = (
            path_prefix,
            fault,
            nth,
            times,
            method,
        )
        self.hits = self._seen = 0
        self._changed = threading.Condition()

    def strikes(self, request: Request) -> bool:
        if not _matches(request, self.path_prefix, self.method):
            return False
        with self._changed:
            self._seen += 1
            due = self._seen >= self.nth and (self.times is None or self._seen < self.nth + self.times)
            if due:
                self.hits += 1
                self._changed.notify_all()
            return due

    def wait_hit(self, n: int = 1, timeout: float = WAIT) -> bool:
        """Block until the fault has struck n times; TimeoutError otherwise."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.hits >= n, timeout):
                raise TimeoutError(f"{self.hits} of {n} requests met the fault at {self.path_prefix}")
            return True

    def release(self) -> None:
        """Let what hangs in it go on."""
        self.fault.release()


class Gate:
    """Holds requests to a path until it is opened.

    `arrived` is an Event, set once one has come; `count` says how many came in all, held or passed.
    """

    def __init__(self, path_prefix: str, method: str | None, at: str) -> None:
        self.path_prefix, self.method, self.at = path_prefix, method, at
        self.arrived, self.count = threading.Event(), 0
        self._admitted, self._passed = 0, 0
        self._open = self._abandoned = False
        self._changed = threading.Condition()

    def wait_arrived(self, n: int = 1, timeout: float = WAIT) -> bool:
        """Block until n requests in all have come to the gate; TimeoutError otherwise."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.count >= n, timeout):
                raise TimeoutError(f"{self.count} of {n} requests arrived at {self.path_prefix}")
            return True

    def let(self, n: int = 1) -> None:
        """Let n of the requests pass, and hold the others."""
        with self._changed:
            self._admitted += n
            self._changed.notify_all()

    def open(self) -> None:
        """Let all pass, those that wait and those to come."""
        with self._changed:
            self._open = True
            self._changed.notify_all()

    def abandon(self) -> None:
        """Cut the connections that wait here: the server stops."""
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()

    def pass_through(self) -> None:
        with self._changed:
            self.count += 1
            self.arrived.set()
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._open or self._abandoned or self._passed < self._admitted)
            if self._abandoned and not self._open:
                raise Cut
            self._passed += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.open()


# ---- The server
# -----------------------------------------------------------------------------------------------------


class FakeForgejo:
    """One instance on `host`.

    `profile` is a name in PROFILES or a Profile; `clock` (replaceable at any time) gives the seconds by which
    tokens and codes expire. Two users exist from the start, alice and bob, password "secret". The port is
    bound at once and kept until `stop()`; until `start()` and while `down()` it refuses. `path` ("/git") puts
    all of it below that path, as a proxy with a sub-path does. `require_signin` is REQUIRE_SIGNIN_VIEW,
    `additional_grant_scopes` is ENABLE_ADDITIONAL_GRANT_SCOPES: then userinfo hides what a user has in
    `private_organizations` (a set of names) from a grant without read:organization, all or read:admin.
    """

    def __init__(
        self,
        *,
        port: int = 0,
        host: str = "127.0.0.1",
        clock: Callable[[], float] = time.time,
        access_lifetime: float = 3600,
        refresh_lifetime: float = 730 * 3600,
        profile: str | Profile = "forgejo",
        version: str = "11.0.1+gitea-1.22.0",
        issuer_slash: bool = True,
        path: str = "",
        require_signin: bool = False,
        additional_grant_scopes: bool = False,
    ) -> None:
        self.clock, self.access_lifetime, self.refresh_lifetime = clock, access_lifetime, refresh_lifetime
        self.profile = PROFILES[profile] if isinstance(profile, str) else profile
        self.version, self.issuer_slash, self.path = version, issuer_slash, path
        self.require_signin, self.additional_grant_scopes = require_signin, additional_grant_scopes
        self.private_organizations: set[str] = set()
        self.requests = RequestLog()
        self.wait_for, self.count = self.requests.wait_for, self.requests.count
        self._lock = threading.RLock()  # guards all state below; never held while a request waits or is sent
        self._key = secrets.token_bytes(32)
        self._users: dict[int | None, User] = {}
        self._apps: dict[str, App] = {}
        self._grants: dict[int, Grant] = {}
        self._codes: dict[str, Code] = {}
        self._repos: dict[int, Repo] = {}
        self._sessions: dict[str | None, WebSession] = {}
        self._user_ids, self._ids = itertools.count(1001), itertools.count(1)
        self._injections: list[Injection] = []
        self._gates: list[Gate] = []
        self._stopping = threading.Event()
        self._connections: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()
        self._listener: Any = None
        self._acceptor: Any = None
        self.host = host
        if port:
            socket.create_server((host, port)).close()  # SO_REUSEPORT below would share a taken port silently
        self._reservation = self._bound_socket(port)
        self.port = self._reservation.getsockname()[1]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}{path}"
        for login in ("alice", "bob"):
            self.add_user(login)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    # -- life --

    def _bound_socket(self, port: int) -> socket.socket:
        """A socket that reserves the port without listening.

        So nobody else gets it while the server is down.
        """
        made = socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.bind((self.host, port))
        return made

    def start(self) -> Self:
        """Serve; returns self."""
        self.up()
        return self

    def up(self) -> None:
        """Accept connections (again), on the same port."""
        if self._listener is None:
            self._listener = self._bound_socket(self.port)
            self._listener.listen(128)
            self._acceptor = threading.Thread(target=self._accept, args=(self._listener,), daemon=True)
            self._acceptor.start()

    def down(self) -> None:
        """Refuse connections and cut those that are open. State stays."""
        if self._listener is not None:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._acceptor.join(WAIT)
            self._listener.close()
            self._listener = None
        self.drop_connections()

    def drop_connections(self) -> None:
        """Cut every open connection, idle keep-alive ones too."""
        with self._lock:
            for connection in self._connections:
                _shutdown(connection)

    def stop(self) -> None:
        """End every connection and thread, and give the port back."""
        self._stopping.set()
        with self._lock:
            injections, gates = list(self._injections), list(self._gates)
        for injection in injections:
            injection.release()
        for gate in gates:
            gate.abandon()
        self.down()
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join(WAIT)
        self._reservation.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, address = listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(connection, address), daemon=True)
            with self._lock:
                self._connections.add(connection)
                self._threads.add(thread)
            thread.start()

    def _serve(self, connection: socket.socket, address: Any) -> None:
        try:
            _Handler(connection, address, cast(Any, self))
        except OSError:
            pass
        finally:
            _shutdown(connection)
            with self._lock:
                self._connections.discard(connection)
                self._threads.discard(threading.current_thread())
            connection.close()

    # -- what an administrator or a user can do --

    def add_user(
        self,
        login: str,
        password: str = "secret",
        *,
        sub: str | None = None,
        full_name: str = "",
        groups: Iterable[str] = (),
        admin: bool = False,
        created: str = CREATED,
    ) -> User:
        """A new user with one private repository and one issue in it.

        `sub` overrides what userinfo calls them.
        """
        with self._lock:
            if self._user_named(login):
                raise ValueError(f"user exists: {login}")
            number = int(sub) if sub is not None and str(sub).isdigit() else next(self._user_ids)
            if number in self._users:
                raise ValueError(f"user id exists: {number}")
            sub = str(number if sub is None else sub)
            user = User(number, sub, login, password, full_name, list(groups), admin, created)
            self._users[user.id] = user
            self.add_repo(login, f"{login}-private")
            return user

    def add_repo(self, login: str, name: str, *, private: bool = True) -> Repo:
        """A repository of this user with one issue that names them."""
        with self._lock:
            repo = Repo(next(self._ids), self._need_user(login).id, name, private)
            self._repos[repo.id] = repo
            repo.issues.append(
                {"title": f"First issue of {login}", "body": f"Written by {login}.", "user_id": repo.owner_id}
            )
            return repo

    def issue_titles(self) -> list[str]:
        """The titles of all issues there are, each as often as it was written."""
        with self._lock:
            return [issue["title"] for repo in self._repos.values() for issue in repo.issues]

    def add_app(
        self,
        redirect_uris: Iterable[str],
        *,
        confidential: bool = True,
        name: str = "broker",
        client_id: str | None = None,
        client_secret: str | None = None,
    ) -> App:
        """A registered OAuth2 application."""
        with self._lock:
            app = App(
                next(self._ids),
                client_id or _uuid(),
                client_secret or _secret("gto_"),
                list(redirect_uris),
                confidential,
                name,
            )
            self._apps[app.client_id] = app
            return app

    def suspend(self, login: str) -> None:
        self._need_user(login).suspended = True

    def unsuspend(self, login: str) -> None:
        self._need_user(login).suspended = False

    def deactivate(self, login: str) -> None:
        self._need_user(login).inactive = True

    def must_change_password(self, login: str, value: bool = True) -> None:
        self._need_user(login).must_change_password = value

    def rename(self, login: str, new: str) -> None:
        """The id, and so `sub`, stays."""
        with self._lock:
            self._need_user(login).login = new

    def delete_user(self, login: str) -> None:
        with self._lock:
            user = self._users.pop(self._need_user(login).id)
            self._drop_grants(lambda grant: grant.user_id == user.id)
            self._repos = {n: repo for n, repo in self._repos.items() if repo.owner_id != user.id}
            self._sessions = {n: s for n, s in self._sessions.items() if s.user_id != user.id}

    def backup(self) -> Any:
        """A copy of all that a backup of Forgejo holds.

        Accounts, applications, grants and their counters, the signing key.
        """
        with self._lock:
            numbers = next(self._user_ids), next(self._ids)
            self._user_ids, self._ids = map(itertools.count, numbers)
            kept = (self._users, self._apps, self._grants, self._codes, self._repos)
            return copy.deepcopy(kept), numbers, self._key

    def restore(self, kept: Any) -> None:
        """Become what a backup holds: what was made after it is gone, and its numbers are given again."""
        with self._lock:
            tables, numbers, self._key = kept
            self._users, self._apps, self._grants, self._codes, self._repos = copy.deepcopy(tables)
            self._user_ids, self._ids = map(itertools.count, numbers)
            self._sessions = {}

    def delete_app(self, client_id: str) -> None:
        with self._lock:
            app = self._apps.pop(client_id)
            self._drop_grants(lambda grant: grant.app_id == app.id)

    def revoke_grant(self, login: str, client_id: str) -> None:
        """As the user's own settings page does; KeyError if there is none."""
        with self._lock:
            grant = self.grant_of(login, client_id)
            if grant is None:
                raise KeyError((login, client_id))
            self._drop_grants(lambda other: other is grant)

    def _drop_grants(self, doomed: Callable[[Grant], object]) -> None:
        self._grants = {n: grant for n, grant in self._grants.items() if not doomed(grant)}
        self._codes = {n: code for n, code in self._codes.items() if code.grant_id in self._grants}

    def rotate_secret(self, client_id: str) -> str:
        """The application's new secret; tokens stay valid, as in Forgejo."""
        with self._lock:
            self._apps[client_id].client_secret = _secret("gto_")
            return self._apps[client_id].client_secret

    def set_grant_scope(self, login: str, client_id: str, scope: str) -> Grant:
        """Give the grant this scope; makes the grant if there is none, as an earlier login would have."""
        with self._lock:
            grant = self.grant_of(login, client_id) or self._make_grant(
                self._need_user(login), self._apps[client_id], scope
            )
            grant.scope = scope
            return grant

    def grant_of(self, login: str, client_id: str) -> Grant | None:
        """The user's one grant to this application, or None."""
        with self._lock:
            user, app = self._user_named(login), self._apps.get(client_id)
            return self._grant_for(user, app) if user and app else None

    def issue_tokens(self, login: str, client_id: str, scope: str = "") -> dict[str, Any]:
        """A token response as from a login; an existing grant keeps its scope."""
        with self._lock:
            app = self._apps[client_id]
            user = self._need_user(login)
            return self._token_response(self._grant_for(user, app) or self._make_grant(user, app, scope), app)

    def _need_user(self, login: str) -> User:
        user = self._user_named(login)
        if user is None:
            raise KeyError(login)
        return user

    def _user_named(self, login: str) -> User | None:
        with self._lock:
            return next((user for user in self._users.values() if user.login.lower() == login.lower()), None)

    def _grant_for(self, user: User, app: App) -> Grant | None:
        return next((g for g in self._grants.values() if (g.user_id, g.app_id) == (user.id, app.id)), None)

    def _make_grant(self, user: User, app: App, scope: str) -> Grant:
        grant = Grant(next(self._ids), user.id, app.id, scope)
        self._grants[grant.id] = grant
        return grant

    # -- faults and gates --

    def inject(
        self,
        path_prefix: str,
        fault: Fault,
        *,
        nth: int = 1,
        times: int | None = 1,
        method: str | None = None,
    ) -> Injection:
        """Make the nth request from now on under this path, and the times - 1 after it (None: all), go wrong.
        `fault` is a Fault, or one of the functions that make one without arguments. Returns the Injection."""
        made = fault if isinstance(fault, Fault) else fault()
        injection = Injection(path_prefix, made, nth, times, method)
        with self._lock:
            self._injections.append(injection)
        return injection

    def clear_faults(self) -> None:
        """Forget all faults; what hangs in them goes on."""
        with self._lock:
            cleared, self._injections = self._injections, []
        for injection in cleared:
            injection.release()

    def hold(self, path_prefix: str, *, method: str | None = None, at: str = "arrival") -> Gate:
        """A closed Gate before this path.

        `at="checked"`, on the token endpoint, holds a refresh between the check of its token and the step
        that voids it: Forgejo has no transaction there, two can pass the check.
        """
        gate = Gate(path_prefix, method, at)
        with self._lock:
            self._gates.append(gate)
        return gate

    def _wait_at_gates(self, request: Request, at: str) -> None:
        with self._lock:
            gates = [
                gate
                for gate in self._gates
                if gate.at == at and _matches(request, gate.path_prefix, gate.method)
            ]
        for gate in gates:
            gate.pass_through()

    def _striking_fault(self, request: Request) -> Fault:
        with self._lock:
            struck = [injection.fault for injection in self._injections if injection.strikes(request)]
        return struck[0] if struck else Fault()

    # -- one request --

    def answer(self, request: Request) -> Response:
        """The response to send; raises Cut where the connection is to end without one. Logs the request."""
        self._wait_at_gates(request, "arrival")
        fault = self._striking_fault(request)
        entry = None

        def log(status: int) -> None:
            nonlocal entry
            recorded = request.recorded(status)
            self.requests.replace(entry, recorded)
            entry = recorded

        def pause(event: threading.Event) -> None:
            if not event.is_set():
                log(0)
            while not event.wait(0.1):
                if self._stopping.is_set():
                    break
            if self._stopping.is_set():
                raise Cut

        status_known = 0
        try:
            response = fault.before(request, pause) or self._process(request)
            status_known = response.status
            return fault.after(response, pause)
        finally:
            log(status_known)

    def _process(self, request: Request) -> Response:
        try:
            return self._route(request)
        except Refusal as refusal:
            return refusal.response

    def _route(self, request: Request) -> Response:
        """Dispatch; the lock is held but where a refresh waits at a gate."""
        if request.path == "/login/oauth/access_token" and request.method == "POST":
            return self._access_token(request)
        with self._lock:
            if request.path.startswith("/api/v1/"):
                return self._api(request)
            method = "GET" if request.method == "HEAD" else request.method
            known = {path for _method, path in self._PAGES}
            handler = self._PAGES.get((method, request.path))
            if handler:
                return handler(self, request)
            revoke = re.fullmatch(r"/user/settings/applications/oauth2/\d+/revoke/(\d+)", request.path)
            if revoke and method == "POST":
                return self._revoke_by_user(request, int(revoke[1]))
            return (
                _text(405, "")
                if request.path in known
                else self._page(404, "Not found", "<p>No such page.</p>")
            )

    # -- discovery, keys --

    @property
    def issuer(self) -> str:
        return self.url + "/" * self.issuer_slash

    def _discovery(self, _request: Request) -> Response:
        base = self.url + "/login/oauth/"
        return _json(
            200,
            {
                "issuer": self.issuer,
                "authorization_endpoint": base + "authorize",
                "token_endpoint": base + "access_token",
                "jwks_uri": base + "keys",
                "userinfo_endpoint": base + "userinfo",
                "introspection_endpoint": base + "introspect",
                "response_types_supported": ["code", "id_token"],
                "id_token_signing_alg_values_supported": ["HS256"],
                "subject_types_supported": ["public"],
                "scopes_supported": list(OIDC_SCOPES),
                "claims_supported": [
                    "aud",
                    "exp",
                    "iat",
                    "iss",
                    "sub",
                    "name",
                    "preferred_username",
                    "profile",
                    "picture",
                    "website",
                    "locale",
                    "updated_at",
                    "email",
                    "email_verified",
                    "groups",
                ],
                "code_challenge_methods_supported": ["plain", "S256"],
                "grant_types_supported": ["authorization_code", "refresh_token"],
            },
        )

    def _keys(self, _request: Request) -> Response:
        return _json(200, {"keys": [{"kty": "oct", "alg": "HS256", "use": "sig"}]})

    # -- tokens --

    def _sign(self, claims: dict[str, Any], key: bytes | None = None) -> str:
        signed = ".".join(
            _b64(json.dumps(part, separators=(",", ":")).encode())
            for part in ({"alg": "HS256", "typ": "JWT"}, claims)
        )
        return signed + "." + _b64(hmac.digest(key or self._key, signed.encode(), "sha256"))

    def _claims(self, token: str) -> dict[str, Any]:
        """The claims of a token we signed that has not expired; BadToken otherwise."""
        signed, _, signature = token.rpartition(".")
        if signed.count(".") != 1:
            raise BadToken("token is malformed: token contains an invalid number of segments")
        expected = _b64(hmac.digest(self._key, signed.encode(), "sha256"))
        if not hmac.compare_digest(expected.encode(), signature.encode()):
            raise BadToken("token signature is invalid: signature is invalid")
        claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(signed.partition(".")[2] + "=="))
        if self.clock() >= claims["exp"]:
            raise BadToken("token has invalid claims: token is expired")
        return claims

    def _token_response(self, grant: Grant, app: App) -> dict[str, Any]:
        """Void older refresh tokens, where the profile does that, and mint the next pair.

        Whole seconds and no unique claim: two access tokens of
        one grant made in the same second are the same string.
        """
        if self.profile.rotates_refresh_tokens:
            grant.counter += 1
        now = int(self.clock())
        response = {
            "access_token": self._sign(
                {"gnt": grant.id, "tt": 0, "exp": now + self.access_lifetime, "iat": now}
            ),
            "token_type": "bearer",
            "expires_in": self.access_lifetime,
            "refresh_token": self._sign(
                {
                    "gnt": grant.id,
                    "tt": 1,
                    **({"cnt": grant.counter} if grant.counter else {}),
                    "exp": now + self.refresh_lifetime,
                    "iat": now,
                }
            ),
        }
        if "openid" in grant.scope.split():
            response["id_token"] = self._id_token(grant, app, now)
        return response

    def _id_token(self, grant: Grant, app: App, now: int) -> str:
        user, scopes = self._users[grant.user_id], grant.scope.split()
        claims = {
            "iss": self.issuer,
            "sub": user.sub,
            "aud": [app.client_id],
            "exp": now + self.access_lifetime,
            "iat": now,
        }
        if grant.nonce:
            claims["nonce"] = grant.nonce
        if "profile" in scopes:
            claims |= {
                "name": self._display_name(user),
                "preferred_username": user.login,
                "profile": f"{self.url}/{user.login}",
                "picture": f"{self.url}/avatars/{user.id}",
                "locale": "en-US",
                "updated_at": now,
            }
        if "email" in scopes:
            claims |= {"email": user.email, "email_verified": not user.inactive}
        if "groups" in scopes:
            claims["groups"] = self._shown_groups(user, grant)
        return self._sign(claims, app.client_secret.encode())

    def _display_name(self, user: User) -> str:
        return user.full_name or (user.login if self.profile.name_falls_back_to_login else "")

    # -- the token endpoint --

    def _access_token(self, request: Request) -> Response:
        form = request.form
        client_id, secret = form.get("client_id", ""), form.get("client_secret", "")
        if not client_id or not secret:
            client_id, secret = self._basic_client(request, client_id, secret)
        if form.get("grant_type") == "refresh_token":
            return self._refresh(request, form.get("refresh_token", ""), client_id, secret)
        if form.get("grant_type") == "authorization_code":
            with self._lock:
                return self._exchange(request, form, client_id, secret)
        raise _token_error(
            "unsupported_grant_type", "Only refresh_token or authorization_code grant type is supported"
        )

    @staticmethod
    def _basic_client(request: Request, client_id: str, secret: str) -> tuple[str, str]:
        """Fill in what the body lacks from the Basic header; Forgejo does not URL-decode the two."""
        scheme, _, data = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "basic":
            return client_id, secret
        pair = _basic_pair(data)
        if pair is None:
            raise _token_error("invalid_request", "cannot parse basic auth header")
        for name, sent, known in (("client_id", client_id, pair[0]), ("client_secret", secret, pair[1])):
            if sent and sent != known:
                raise _token_error(
                    "invalid_request", f"{name} in request body inconsistent with Authorization header"
                )
        return pair

    def _client(self, client_id: str, secret: str, wrong_secret: str, mark: str) -> App:
        """The application.

        The two grant types differ in the error for a wrong secret and in a quotation mark.
        """
        app = self._apps.get(client_id)
        if app is None:
            raise _token_error(
                "invalid_client", f"cannot load client with client id: {mark}{client_id}{mark}"
            )
        if app.confidential and not hmac.compare_digest(app.client_secret.encode(), secret.encode()):
            raise _token_error(
                wrong_secret, "invalid client secret" if secret else "invalid empty client secret"
            )
        return app

    def _exchange(self, request: Request, form: dict[str, str], client_id: str, secret: str) -> Response:
        app = self._client(client_id, secret, "unauthorized_client", "'")
        redirect_uri = form.get("redirect_uri", "")
        if redirect_uri and not app.accepts_redirect(redirect_uri):
            raise _token_error("unauthorized_client", "unexpected redirect URI")
        code = self._codes.get(form.get("code", ""))
        if code is None:
            raise _token_error("unauthorized_client", "client is not authorized")
        if (
            self.profile.code_lifetime is not None
            and self.clock() >= code.made_at + self.profile.code_lifetime
        ):
            raise _token_error("invalid_grant", "authorization code expired")
        if not code.accepts(form.get("code_verifier", "")):
            raise _token_error("unauthorized_client", "failed PKCE code challenge")
        if self.profile.binds_code_to_redirect and redirect_uri != code.redirect_uri:
            raise _token_error(
                self.profile.binds_code_to_redirect, "redirect_uri does not match the authorization request"
            )
        grant = self._grants[code.grant_id]
        if grant.app_id != app.id:
            raise _token_error("invalid_grant", "invalid grant")
        self._note(request, grant)
        del self._codes[code.code]
        return _json(200, self._token_response(grant, app))

    def _refresh(self, request: Request, token: str, client_id: str, secret: str) -> Response:
        with self._lock:
            app, grant = self._checked_refresh(request, token, client_id, secret)
        self._wait_at_gates(request, "checked")
        with self._lock:
            return _json(200, self._token_response(grant, app))

    def _checked_refresh(
        self, request: Request, token: str, client_id: str, secret: str
    ) -> tuple[App, Grant]:
        app = self._client(client_id, secret, "invalid_client", '"')
        try:
            claims = self._claims(token)
        except BadToken:
            raise _token_error("unauthorized_client", "unable to parse refresh token") from None
        if self.profile.checks_refresh_type and claims["tt"] != 1:
            raise _token_error("unauthorized_client", "token is not a refresh token")
        grant = self._grants.get(claims["gnt"])
        if grant is None:
            raise _token_error("invalid_grant", "grant does not exist")
        self._note(request, grant)
        if self.profile.binds_refresh_to_client and grant.app_id != app.id:
            raise _token_error("invalid_grant", "refresh token was not issued to this client")
        if self.profile.rotates_refresh_tokens and claims.get("cnt") != grant.counter:
            raise _token_error("unauthorized_client", "token was already used")
        return app, grant

    def _note(self, request: Request, grant: Grant) -> None:
        request.grant_id, request.auth_user = grant.id, self._users[grant.user_id].login

    # -- who is the bearer --

    def _identity(self, request: Request, parameter: str | None = None) -> Identity | None:
        """The Identity behind the Authorization header (or a parameter), None without one.

        BadToken with Forgejo's reason: a line for each method of
        authentication that was tried, the first of which quotes the token.
        """
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if not (scheme == "token" or scheme.lower() == "bearer"):
            if not parameter:
                return None
            token = parameter
        try:
            claims = self._claims(token)
            grant = self._grants.get(claims["gnt"])
            if grant is None:
                raise BadToken("oauth2 grant not found or revoked")
            if claims["tt"] != 0:
                raise BadToken("token was not an oauth2 access token")
            if claims["iat"] > self.clock():
                raise BadToken("token was expired")
        except BadToken as bad:
            quoted = f"access token does not exist [sha: {token}]\n{bad}"
            raise BadToken(
                quoted if self.profile.names_auth_failures else "user does not exist [uid: 0, name: ]"
            ) from None
        self._note(request, grant)
        scopes = _api_scopes(grant.scope) if self.profile.api_reads_scopes else {"all"}
        return Identity(self._users[grant.user_id], grant, scopes)

    # -- userinfo, introspection --

    def _userinfo(self, request: Request) -> Response:
        try:
            who = self._identity(request, request.query.get("access_token"))
        except BadToken:
            return _text(
                401, BAD_CREDENTIALS if self.profile.names_auth_failures else "Failed to authenticate user\n"
            )
        if who is None:
            return _text(401, "no valid authorization", [("WWW-Authenticate", 'Bearer realm=""')])
        user = who.user
        if self.profile.web_knows_suspension:
            self._refuse_web_access(user)
        value: dict[str, Any] = {
            "sub": user.sub,
            "name": self._display_name(user),
            "preferred_username": user.login,
            "email": user.email,
            "picture": f"{self.url}/avatars/{user.id}",
        }
        groups = self._shown_groups(user, who.grant)
        if groups or self.profile.groups_when_none:
            value["groups"] = groups or None
        return _json(200, value)

    def _shown_groups(self, user: User, grant: Grant) -> list[str]:
        """An organization is spelled as it was made, its teams in lower case."""
        shows_all = {"all", "read:organization", "read:admin"} & set(grant.scope.split())
        hidden = self.private_organizations if self.additional_grant_scopes and not shows_all else ()
        parts = [group.partition(":") for group in user.groups]
        return [name + colon + team.lower() for name, colon, team in parts if name not in hidden]

    def _refuse_web_access(self, user: User) -> None:
        """Web routes answer such users with a page, or the way to the password form.

        Never with an error status.
        """
        if user.suspended:
            raise Refusal(self._page(200, "Sign-in prohibited", f"<p>{PROHIBITED}</p>"))
        if user.inactive:
            raise Refusal(self._page(200, "Activate your account", f"<p>{NOT_ACTIVATED}</p>"))
        if user.must_change_password:
            raise Refusal(_see_other(self.path + "/user/settings/change_password"))

    def _introspect(self, request: Request) -> Response:
        scheme, _, data = request.headers.get("Authorization", "").partition(" ")
        pair = (_basic_pair(data) if scheme.lower() == "basic" else None) or ("", "")
        app = self._apps.get(pair[0])
        if not (
            app and app.confidential and hmac.compare_digest(app.client_secret.encode(), pair[1].encode())
        ):
            return _text(401, "no valid authorization", [("WWW-Authenticate", 'Basic realm=""')])
        try:
            grant = self._grants.get(self._claims(request.form.get("token", ""))["gnt"])
        except BadToken:
            grant = None
        if grant is None:
            return _json(200, {"active": False})
        self._note(request, grant)
        user = self._users[grant.user_id]
        issued_to = next(app for app in self._apps.values() if app.id == grant.app_id)
        value = {
            "active": True,
            "scope": grant.scope,
            "username": user.login,
            "iss": self.issuer,
            "sub": user.sub,
            "aud": [issued_to.client_id],
        }
        return _json(200, {name: item for name, item in value.items() if item != ""})

    # -- pages: sign-in, consent --

    def _session(self, request: Request) -> tuple[WebSession, User | None]:
        """The browser's session, made if it has none; `_page` sends its cookies."""
        if request.session is None:
            request.session_id = request.cookie(self.profile.session_cookie)
            request.session = self._sessions.get(request.session_id)
        if request.session is None:
            request.session_id, request.session = secrets.token_hex(16), WebSession(secrets.token_urlsafe(24))
            self._sessions[request.session_id] = request.session
        user = self._users.get(request.session.user_id)
        request.auth_user = user.login if user else None
        return request.session, user

    def _with_cookies(self, request: Request, response: Response) -> Response:
        response.cookie(self.profile.session_cookie, request.session_id)
        return response.cookie("_csrf", request.session.csrf) if self.profile.csrf_tokens else response

    def _csrf_field(self, session: WebSession) -> str:
        hidden = f'<input type="hidden" name="_csrf" value="{session.csrf}">'
        return hidden if self.profile.csrf_tokens else ""

    def _check_csrf(self, request: Request) -> WebSession:
        """Older servers compare a token.

        A newer one reads Origin and Sec-Fetch-Site, and lets pass what sends neither.
        """
        session, _user = self._session(request)
        if self.profile.csrf_tokens:
            good = hmac.compare_digest(session.csrf.encode(), request.form.get("_csrf", "").encode())
        else:
            site = request.headers.get("Sec-Fetch-Site")
            own = self.url.removesuffix(self.path)
            good = site in (None, "same-origin", "none") and (
                site is not None or request.headers.get("Origin") in (None, own)
            )
        if not good:
            raise Refusal(_text(400, "Invalid CSRF token.\n"))
        return session

    def _page(self, status_code: int, title: str, body: str) -> Response:
        text = _PAGE.format(title=html_text.escape(title), body=body)
        return Response(status_code, text.encode(), "text/html; charset=utf-8")

    def _signed_in(self, request: Request) -> tuple[WebSession, User]:
        """The signed-in user of this browser, or a Refusal that leads to the sign-in page and back."""
        session, user = self._session(request)
        if user is None:
            response = self._with_cookies(request, _see_other(self.path + "/user/login"))
            raise Refusal(response.cookie("redirect_to", quote(request.target, safe="")))
        self._refuse_web_access(user)
        return session, user

    def _login_page(self, request: Request, message: str = "") -> Response:
        _session, user = self._session(request)
        if user:
            return _see_other(self.path + "/")
        return self._with_cookies(
            request,
            self._page(
                200,
                "Sign in",
                _LOGIN.format(
                    base=self.path,
                    message=f'<p class="flash" role="alert">{html_text.escape(message)}</p>'
                    if message
                    else "",
                    users="".join(
                        f"<li><code>{html_text.escape(user.login)}</code> / "
                        f"<code>{html_text.escape(user.password)}</code></li>"
                        for user in self._users.values()
                    ),
                ),
            ),
        )

    def _login(self, request: Request) -> Response:
        user = self._user_named(request.form.get("user_name", ""))
        if user is None or user.password != request.form.get("password", ""):
            return self._login_page(request, "Username or password is incorrect.")
        if user.suspended:
            return self._page(200, "Sign-in prohibited", f"<p>{PROHIBITED}</p>")
        self._session(request)
        del self._sessions[request.session_id]
        request.session_id, request.session = (
            secrets.token_hex(16),
            WebSession(secrets.token_urlsafe(24), user.id),
        )
        self._sessions[request.session_id] = request.session
        request.auth_user = user.login
        target = unquote(request.cookie("redirect_to") or self.path + "/")
        local = target.startswith("/") and not target.startswith(("//", "/\\"))
        response = self._with_cookies(request, _see_other(target if local else self.path + "/"))
        return response.cookie("redirect_to", "")

    def _logout(self, request: Request) -> Response:
        self._session(request)
        self._sessions.pop(request.session_id, None)
        response = _see_other(self.path + "/user/login").cookie(self.profile.session_cookie, "")
        return response.cookie("redirect_to", quote(request.query.get("redirect_to", ""), safe=""))

    def _home(self, request: Request) -> Response:
        session, user = self._signed_in(request)
        apps = {app.id: app for app in self._apps.values()}
        rows = "".join(
            _GRANT_ROW.format(
                base=self.path,
                name=html_text.escape(apps[grant.app_id].name),
                id=grant.id,
                scope=html_text.escape(grant.scope or "(none)"),
                csrf=self._csrf_field(session),
            )
            for grant in self._grants.values()
            if grant.user_id == user.id
        )
        return self._page(
            200,
            "Forgejo",
            _HOME.format(
                base=self.path,
                login=html_text.escape(user.login),
                rows=rows or "<p>No application has access.</p>",
            ),
        )

    def _revoke_by_user(self, request: Request, grant_id: int) -> Response:
        self._check_csrf(request)
        _session, user = self._signed_in(request)
        self._drop_grants(lambda grant: (grant.id, grant.user_id) == (grant_id, user.id))
        return _see_other(self.path + "/")

    def _authorize(self, request: Request) -> Response:
        session, user = self._signed_in(request)
        asked = request.query | (request.form if request.method == "POST" else {})
        client_id, redirect_uri = asked.get("client_id", ""), asked.get("redirect_uri", "")
        wrong_type = asked.get("response_type") != "code"
        if not client_id or wrong_type and self.profile.web_knows_suspension:
            return self._page(500, "Internal Server Error", "<p>An error occurred.</p>")
        app = self._apps.get(client_id)
        if app is None:
            return self._page(400, "Authorization failed", "<p>Client ID not registered</p>")
        if not app.accepts_redirect(redirect_uri):
            return self._page(400, "Authorization failed", "<p>Unregistered Redirect URI</p>")
        if wrong_type:
            return self._authorize_error(asked, "unsupported_response_type", "Only code is supported.")
        method, challenge = asked.get("code_challenge_method", ""), asked.get("code_challenge", "")
        if method not in ("", "plain", "S256"):
            return self._authorize_error(asked, "invalid_request", "unsupported code challenge method")
        if not method and not app.confidential:
            return self._authorize_error(asked, "invalid_request", "PKCE is required for public clients")
        if method == "plain" or (method == "S256" and not self.profile.s256_lost_on_consent):
            session.values |= {"challenge": challenge, "method": method}
        grant = self._grant_for(user, app)
        if grant:
            request.grant_id = grant.id
            if app.confidential:
                self._follow_scope(grant, asked)
                return self._redirect_with_code(grant, asked, challenge, method)
        session.values |= {name: asked.get(name, "") for name in ("client_id", "redirect_uri", "state")}
        return self._with_cookies(request, self._consent_page(request, user, app, asked))

    def _consent_page(self, request: Request, user: User, app: App, asked: dict[str, str]) -> Response:
        hidden = {
            name: asked.get(name, "") for name in ("client_id", "state", "scope", "nonce", "redirect_uri")
        }
        inputs = self._csrf_field(request.session) + "".join(
            f'<input type="hidden" name="{name}" value="{html_text.escape(value)}">'
            for name, value in hidden.items()
        )
        return self._page(
            200,
            f"Authorize {app.name}",
            _CONSENT.format(
                base=self.path,
                inputs=inputs,
                name=html_text.escape(app.name),
                login=html_text.escape(user.login),
                other=html_text.escape(
                    self.path + "/user/logout?" + urlencode({"redirect_to": request.target})
                ),
                scope=html_text.escape(hidden["scope"] or "(none)"),
                redirect=html_text.escape(hidden["redirect_uri"]),
            ),
        )

    def _consent(self, request: Request) -> Response:
        session = self._check_csrf(request)
        _session, user = self._signed_in(request)
        form = request.form
        if any(
            session.values.get(name) != form.get(name, "") for name in ("client_id", "redirect_uri", "state")
        ):
            return _text(400, "Bad Request\n")
        if form.get("granted") not in ("true", "1", "on"):
            return self._authorize_error(form, "access_denied", "the request is denied")
        app = self._apps.get(form["client_id"])
        if app is None:
            return self._page(500, "Internal Server Error", "<p>An error occurred.</p>")
        grant = self._grant_for(user, app) or self._make_grant(user, app, form.get("scope", ""))
        request.grant_id = grant.id
        self._follow_scope(grant, form)
        if grant.scope != form.get("scope", ""):
            return self._authorize_error(form, "server_error", "a grant exists with different scope")
        return self._redirect_with_code(
            grant, form, session.values.get("challenge", ""), session.values.get("method", "")
        )

    def _follow_scope(self, grant: Grant, asked: dict[str, str]) -> None:
        if self.profile.scope_of_grant_follows_request and asked.get("scope"):
            grant.scope = asked["scope"]

    def _redirect_with_code(
        self, grant: Grant, asked: dict[str, str], challenge: str, method: str
    ) -> Response:
        text = "gta_" + base64.b32encode(secrets.token_bytes(32)).decode().rstrip("=").lower()
        self._codes[text] = Code(text, grant.id, asked["redirect_uri"], challenge, method, self.clock())
        grant.nonce = asked.get("nonce") or grant.nonce
        state = {"state": asked["state"]} if asked.get("state") else {}
        return _see_other(_with_query(asked["redirect_uri"], {"code": text, **state}))

    @staticmethod
    def _authorize_error(asked: dict[str, str], error: str, description: str) -> Response:
        return _see_other(
            _with_query(
                asked["redirect_uri"],
                {"error": error, "error_description": description, "state": asked.get("state", "")},
            )
        )

    _PAGES = {
        ("GET", "/"): _home,
        ("GET", "/.well-known/openid-configuration"): _discovery,
        ("GET", "/login/oauth/keys"): _keys,
        ("GET", "/login/oauth/authorize"): _authorize,
        ("POST", "/login/oauth/authorize"): _authorize,
        ("POST", "/login/oauth/grant"): _consent,
        ("GET", "/login/oauth/userinfo"): _userinfo,
        ("POST", "/login/oauth/userinfo"): _userinfo,
        ("POST", "/login/oauth/introspect"): _introspect,
        ("POST", "/login/oauth/access_token"): _access_token,
        ("GET", "/user/login"): _login_page,
        ("POST", "/user/login"): _login,
        ("GET", "/user/logout"): _logout,
        ("POST", "/user/logout"): _logout,
    }

    # -- the API --

    def _api_error(self, code: int, message: str, **more: object) -> Response:
        return _json(code, {"message": message, "url": f"{self.url}/api/swagger", **more})

    def _not_found(self) -> Response:
        return self._api_error(404, "The target couldn't be found.", errors=None)

    def _api(self, request: Request) -> Response:
        """Authentication comes first, on every path: a bad token is refused even where none is needed."""
        try:
            who: Any = self._identity(request)  # None only for handlers that take it
        except BadToken as bad:
            return self._api_error(401, str(bad))
        if who:
            self._refuse_api_access(who.user)
        elif self.require_signin:
            return self._api_error(403, SIGNED_IN_ONLY)
        path = request.path.removeprefix("/api/v1")
        method = "GET" if request.method == "HEAD" else request.method
        paths = [(route, match) for route in self._API if (match := re.fullmatch(route[1], path))]
        if not paths:
            return self._not_found()
        for (route_method, _pattern, needs_token, wanted, handler), match in paths:
            if route_method == method:
                if needs_token and who is None:
                    return self._api_error(401, "token is required")
                for categories in wanted if who else ():
                    self._require_scopes(who, "read" if method == "GET" else "write", categories)
                return handler(self, request, who, *match.groups())
        return _text(405, "")

    def _refuse_api_access(self, user: User) -> None:
        """These 403s have no `url`, and one text serves the suspended and the inactive."""
        if user.suspended or user.inactive:
            raise Refusal(_json(403, {"message": PROHIBITED}))
        if user.must_change_password:
            where = f"{self.url}/user/change_password"
            raise Refusal(_json(403, {"message": f"You must change your password. Change it at: {where}"}))

    def _require_scopes(self, who: Identity, level: str, categories: Iterable[str]) -> None:
        wanted = [f"{level}:{category}" for category in categories]
        if not all(_allows(who.scopes, scope) for scope in wanted):
            raise Refusal(
                self._api_error(
                    403, f"token does not have at least one of required scope(s): [{' '.join(wanted)}]"
                )
            )

    def _api_version(self, _request: Request, _who: Identity) -> Response:
        return _json(200, {"version": self.version})

    def _api_me(self, _request: Request, who: Identity) -> Response:
        return _json(200, self._user_json(who.user))

    def _api_user(self, _request: Request, _who: Identity, login: str) -> Response:
        user = self._user_named(login)
        if user is None:
            return self._api_error(404, f"user redirect does not exist [name: {login}]")
        return _json(200, self._user_json(user))

    def _api_my_repos(self, request: Request, who: Identity) -> Response:
        return self._listing(
            request,
            [self._repo_json(repo, who) for repo in self._visible_repos(who) if repo.owner_id == who.user.id],
        )

    def _api_new_repo(self, request: Request, who: Identity) -> Response:
        asked = request.json()
        if not isinstance(asked, dict) or not asked.get("name"):
            return self._api_error(422, "[Name]: Required")
        repo = self.add_repo(who.user.login, str(asked["name"]), private=bool(asked.get("private")))
        return _json(201, self._repo_json(repo, who))

    def _api_user_repos(self, request: Request, who: Identity, login: str) -> Response:
        user = self._user_named(login)
        if user is None:
            return self._api_error(404, f"user redirect does not exist [name: {login}]")
        return self._listing(
            request,
            [self._repo_json(repo, who) for repo in self._visible_repos(who) if repo.owner_id == user.id],
        )

    def _api_search(self, request: Request, who: Identity) -> Response:
        word = request.query.get("q", "").lower()
        found = [self._repo_json(repo, who) for repo in self._visible_repos(who) if word in repo.name.lower()]
        response = self._listing(request, found)
        return response.with_json({"ok": True, "data": response.json()})

    def _api_repo(self, _request: Request, who: Identity, owner: str, name: str) -> Response:
        return _json(200, self._repo_json(self._find_repo(who, owner, name), who))

    def _api_issues(self, request: Request, who: Identity, owner: str, name: str) -> Response:
        repo = self._find_repo(who, owner, name)
        return self._listing(request, [self._issue_json(repo, n) for n in range(len(repo.issues), 0, -1)])

    def _api_new_issue(self, request: Request, who: Identity, owner: str, name: str) -> Response:
        repo = self._find_repo(who, owner, name)
        asked = request.json()
        if not isinstance(asked, dict) or not asked.get("title"):
            return self._api_error(422, "[Title]: Required")
        repo.issues.append(
            {"title": str(asked["title"]), "body": str(asked.get("body", "")), "user_id": who.user.id}
        )
        return _json(201, self._issue_json(repo, len(repo.issues)))

    def _api_notifications(self, request: Request, who: Identity) -> Response:
        mine = [repo for repo in self._visible_repos(who) if repo.owner_id == who.user.id]
        return self._listing(
            request,
            [
                {
                    "id": repo.id,
                    "unread": True,
                    "pinned": False,
                    "updated_at": CREATED,
                    "url": f"{self.url}/api/v1/notifications/threads/{repo.id}",
                    "repository": self._repo_json(repo, who),
                    "subject": {
                        "title": f"Notification for {who.user.login}",
                        "type": "Issue",
                        "state": "open",
                        "url": self._issue_json(repo, 1)["url"],
                        "html_url": self._issue_json(repo, 1)["html_url"],
                    },
                }
                for repo in mine
            ],
        )

    def _api_my_orgs(self, request: Request, who: Identity) -> Response:
        names = [group for group in who.user.groups if ":" not in group]
        return self._listing(
            request,
            [
                {
                    "id": 5000 + place,
                    "name": name,
                    "username": name,
                    "full_name": name,
                    "email": "",
                    "website": "",
                    "description": f"Organization of {who.user.login}",
                    "location": "",
                    "visibility": "public",
                    "avatar_url": f"{self.url}/avatars/{name}",
                    "repo_admin_change_team_access": False,
                }
                for place, name in enumerate(names)
            ],
        )

    def _listing(self, request: Request, items: Sequence[object]) -> Response:
        page, limit = (
            _positive(request.query.get(name), default) for name, default in (("page", 1), ("limit", 30))
        )
        response = _json(200, items[(page - 1) * limit : page * limit])
        response.headers.append(("X-Total-Count", str(len(items))))
        return response

    def _visible_repos(self, who: Identity) -> list[Repo]:
        hide_private = who is None or "public-only" in who.scopes
        return [
            repo
            for repo in self._repos.values()
            if not repo.private or (not hide_private and repo.owner_id == who.user.id)
        ]

    def _find_repo(self, who: Identity, owner: str, name: str) -> Repo:
        user = self._user_named(owner)
        for repo in self._visible_repos(who):
            if user and repo.owner_id == user.id and repo.name.lower() == name.lower():
                return repo
        raise Refusal(self._not_found())

    def _user_json(self, user: User) -> dict[str, Any]:
        return {
            "id": user.id,
            "login": user.login,
            "login_name": "",
            "source_id": 0,
            "full_name": user.full_name,
            "email": user.email,
            "avatar_url": f"{self.url}/avatars/{user.id}",
            "html_url": f"{self.url}/{user.login}",
            "language": "",
            "is_admin": user.admin,
            "last_login": CREATED,
            "created": user.created,
            "restricted": False,
            "active": not user.inactive,
            "prohibit_login": user.suspended,
            "location": "",
            "website": "",
            "description": "",
            "visibility": "public",
            "followers_count": 0,
            "following_count": 0,
            "starred_repos_count": 0,
            "username": user.login,
        }

    def _repo_json(self, repo: Repo, who: Identity) -> dict[str, Any]:
        owner = self._users[repo.owner_id]
        full_name, mine = f"{owner.login}/{repo.name}", who is not None and who.user is owner
        return {
            "id": repo.id,
            "owner": self._user_json(owner),
            "name": repo.name,
            "full_name": full_name,
            "description": f"Repository of {owner.login}",
            "empty": False,
            "private": repo.private,
            "fork": False,
            "template": False,
            "parent": None,
            "mirror": False,
            "size": 1,
            "html_url": f"{self.url}/{full_name}",
            "clone_url": f"{self.url}/{full_name}.git",
            "ssh_url": f"ssh://git@127.0.0.1/{full_name}.git",
            "website": "",
            "stars_count": 0,
            "forks_count": 0,
            "watchers_count": 1,
            "archived": False,
            "open_issues_count": len(repo.issues),
            "open_pr_counter": 0,
            "default_branch": "main",
            "created_at": CREATED,
            "updated_at": CREATED,
            "has_issues": True,
            "permissions": {"admin": mine, "push": mine, "pull": True},
        }

    def _issue_json(self, repo: Repo, number: int) -> dict[str, Any]:
        issue, owner = repo.issues[number - 1], self._users[repo.owner_id]
        full_name = f"{owner.login}/{repo.name}"
        author = self._users.get(issue["user_id"], owner)
        return {
            "id": repo.id * 1000 + number,
            "number": number,
            "title": issue["title"],
            "body": issue["body"],
            "url": f"{self.url}/api/v1/repos/{full_name}/issues/{number}",
            "html_url": f"{self.url}/{full_name}/issues/{number}",
            "user": self._user_json(author),
            "labels": [],
            "milestone": None,
            "assignee": None,
            "assignees": None,
            "state": "open",
            "is_locked": False,
            "comments": 0,
            "created_at": CREATED,
            "updated_at": CREATED,
            "closed_at": None,
            "due_date": None,
            "pull_request": None,
            "repository": {"id": repo.id, "name": repo.name, "owner": owner.login, "full_name": full_name},
        }

    # method, path, is a token needed, groups of scope categories of which each is checked by itself, handler
    _API = (
        ("GET", "/version", False, (), _api_version),
        ("GET", "/user", True, (["user"],), _api_me),
        ("GET", "/user/repos", True, (["user"], ["repository"]), _api_my_repos),
        ("POST", "/user/repos", True, (["user"], ["repository"]), _api_new_repo),
        ("GET", "/user/orgs", True, (["user", "organization"],), _api_my_orgs),
        ("GET", "/users/([^/]+)", False, (["user"],), _api_user),
        ("GET", "/users/([^/]+)/repos", False, (["user"], ["repository"]), _api_user_repos),
        ("GET", "/repos/search", False, (["repository"],), _api_search),
        ("GET", "/repos/([^/]+)/([^/]+)", False, (["repository"],), _api_repo),
        ("GET", "/repos/([^/]+)/([^/]+)/issues", False, (["issue"],), _api_issues),
        ("POST", "/repos/([^/]+)/([^/]+)/issues", True, (["issue"],), _api_new_issue),
        ("GET", "/notifications", True, (["notification"],), _api_notifications),
    )


class _Handler(BaseHTTPRequestHandler):
    """One connection. `server` is the FakeForgejo."""

    server: Any

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_args: object) -> None:
        pass

    def _handle(self) -> None:
        try:
            request = Request(self.command, self.path, self.headers, self._read_body())
        except ValueError:
            self.send_error(400)
            return
        if not request.below(self.server.path):
            self.send_error(404)
            return
        try:
            response = self.server.answer(request)
        except Cut:
            self.close_connection = True
            return
        headers = [
            ("Date", self.date_time_string(self.server.clock())),
            ("Content-Length", str(len(response.body))),
        ]
        if response.content_type:
            headers.append(("Content-Type", response.content_type))
        head = "".join(f"{name}: {value}\r\n" for name, value in headers + response.headers)
        phrase = self.responses.get(response.status, ("Unknown",))[0]
        body = b"" if self.command == "HEAD" else response.body[: response.send_only]
        if response.send_only is not None:
            self.close_connection = True
        self.wfile.write(f"HTTP/1.1 {response.status} {phrase}\r\n{head}\r\n".encode("latin-1") + body)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _handle

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", "").lower():
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)


# ---- Small helpers
# --------------------------------------------------------------------------------------------------


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _uuid() -> str:
    digits = secrets.token_hex(16)
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def _secret(prefix: str) -> str:
    return prefix + base64.b32encode(secrets.token_bytes(32)).decode().rstrip("=").lower()


def _first_values(text: str) -> dict[str, str]:
    values: dict[str, str] = {}
    for name, value in parse_qsl(text, keep_blank_values=True):
        values.setdefault(name, value)
    return values


def _with_query(uri: str, added: Mapping[str, str]) -> str:
    parts = urlsplit(uri)
    return urlunsplit(
        parts._replace(query=urlencode(sorted({**_first_values(parts.query), **added}.items())))
    )


def _without_loopback_port(uri: str) -> str:
    parts = urlsplit(uri)
    try:
        loopback = ipaddress.ip_address(parts.hostname or "").is_loopback
        has_port = parts.port is not None
    except ValueError:
        return uri
    strip = parts.scheme == "http" and loopback and has_port
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition(":")[0])) if strip else uri


def _matches(request: Request | Recorded, path_prefix: str, method: str | None) -> bool:
    return request.path.startswith(path_prefix) and method in (None, request.method)


def _basic_pair(data: str) -> tuple[str, str] | None:
    try:
        name, colon, password = base64.b64decode(data, validate=True).decode().partition(":")
    except ValueError:
        return None
    return (name, password) if colon else None


def _token_error(error: str, description: str) -> Refusal:
    return Refusal(_json(400, {"error": error, "error_description": description}))


def _api_scopes(grant_scope: str) -> set[str]:
    """What a grant's scope is worth at the API: its valid API scopes, or everything if there is none."""
    return {name for name in grant_scope.split(" ") if name in API_SCOPES} or {"all"}


def _allows(scopes: set[str], wanted: str) -> bool:
    return bool(scopes & {"all", wanted, wanted.replace("read:", "write:")})


def _positive(text: str | None, default: int) -> int:
    return int(text) if text and text.isdigit() and int(text) else default


def _shutdown(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


# ---- Pages
# ----------------------------------------------------------------------------------------------------------

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ color-scheme: light dark; }}
body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 26rem; margin: 8vh auto; padding: 0 1rem; }}
label, input[type=text], input[type=password] {{ display: block; width: 100%; box-sizing: border-box; }}
input, button {{ font: inherit; padding: .5rem .75rem; margin: .25rem 0 .75rem; border: 1px solid #888;
  border-radius: .35rem; }}
button {{ cursor: pointer; }} .primary {{ background: #c2410c; border-color: #c2410c; color: #fff; }}
.flash {{ border-left: .25rem solid #b91c1c; padding-left: .75rem; }} code {{ overflow-wrap: anywhere; }}
footer {{ margin-top: 2rem; opacity: .7; font-size: .85rem; }}
</style></head><body><main><h1>{title}</h1>{body}</main>
<footer>A stand-in for Forgejo, for tests and demos.</footer></body></html>"""

_LOGIN = """{message}<form method="post" action="{base}/user/login">
<label for="user_name">Username</label>
<input id="user_name" name="user_name" type="text" autocomplete="username" required autofocus>
<label for="password">Password</label>
<input id="password" name="password" type="password" autocomplete="current-password" required>
<button class="primary">Sign in</button></form>
<h2>Demo users</h2><ul>{users}</ul>"""

_CONSENT = """<p><strong>{name}</strong> asks for access to the account <strong>{login}</strong>.</p>
<p>Scopes: <code>{scope}</code></p><p>You will be sent to <code>{redirect}</code></p>
<form method="post" action="{base}/login/oauth/grant">{inputs}
<button class="primary" name="granted" value="true">Authorize application</button>
<button name="granted" value="false">Cancel</button></form>
<p><a href="{other}">Use another account</a></p>"""

_HOME = """<p>Signed in as <strong>{login}</strong>. <a href="{base}/user/logout">Sign out</a></p>
<h2>Authorized applications</h2>{rows}"""

_GRANT_ROW = """<form method="post" action="{base}/user/settings/applications/oauth2/1/revoke/{id}">
{csrf}<p><strong>{name}</strong><br><code>{scope}</code></p>
<button>Revoke</button></form>"""


# ---- As a program
# ---------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Serve a fake Forgejo on 127.0.0.1 until stopped.")
    parser.add_argument("--port", type=int, default=3000, help="0 picks a free one (default: %(default)s)")
    parser.add_argument(
        "--redirect-uri", action="append", help="may be repeated (default: a broker on port 8080)"
    )
    parser.add_argument("--client-id", help="default: made up")
    parser.add_argument("--client-secret", help="default: made up")
    parser.add_argument("--access-lifetime", type=int, default=3600, help="seconds (default: %(default)s)")
    parser.add_argument("--profile", choices=PROFILES, default="forgejo")
    options = parser.parse_args(argv)
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_args: stopped.set())
    try:
        forgejo = FakeForgejo(
            port=options.port, access_lifetime=options.access_lifetime, profile=options.profile
        )
    except OSError as error:
        parser.error(f"cannot listen on port {options.port}: {error.strerror}")
    app = forgejo.add_app(
        options.redirect_uri or [f"http://{host}:8080/oauth/callback" for host in ("127.0.0.1", "localhost")],
        client_id=options.client_id,
        client_secret=options.client_secret,
    )
    with forgejo:
        print(f"url            {forgejo.url}")
        print("users          alice / secret, bob / secret")
        print(f"redirect_uris  {' '.join(app.redirect_uris)}")
        print(f"client_id      {app.client_id}")
        print(f"client_secret  {app.client_secret}", flush=True)
        stopped.wait()


if __name__ == "__main__":
    main()
