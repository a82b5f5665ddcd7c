"""Scripted MCP clients for tests and demos: one that logs in (OAuthClient), one that speaks MCP (McpClient).

They do what real clients do, strictly: an answer with another id, a missing `iss` or a changed `state` is an
error here, and nothing is sent twice by itself. Standard library only.

    oauth = OAuthClient("http://127.0.0.1:8080")
    tokens = oauth.login(None, "alice", "secret")
    with McpClient(oauth.mcp_url, tokens["access_token"]) as client:
        client.initialize()
        client.call_tool("get_my_user_info")
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import itertools
import json
import queue
import re
import secrets
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from rigs.browser import (
    Browser,
    Headers,
    Routes,
    approve_login,
    connect,
    host_header,
    origin_of,
    request_target,
)

Json = dict[str, Any]
Begun = tuple[http.client.HTTPConnection, socket.socket, http.client.HTTPResponse]

TIMEOUT = 30
LEGACY = "2025-11-25"
MODERN = "2026-07-28"
META = "io.modelcontextprotocol/"
EVENT_STREAM = "text/event-stream"
METHOD_NOT_FOUND = -32601
INTERNAL_ERROR = -32603
NAMED_BY = {"tools/call": "name", "prompts/get": "name", "resources/read": "uri"}
# Called with (message, revision, method of the request it answers) for each message that a client receives.
judge = None


class ClientError(Exception):
    """Something a client must not accept."""


class HttpError(ClientError):
    """An HTTP answer without the JSON-RPC message it should have had; `response` is the answer."""

    def __init__(self, response: Response, wanted: str = "an answer") -> None:
        super().__init__(f"HTTP {response.status} instead of {wanted}: {response.text[:1000]}")
        self.response, self.http_status = response, response.status


class RpcError(ClientError):
    """A JSON-RPC error: `code`, `message`, `data`, and the HTTP status it came with."""

    def __init__(self, code: int, message: str, data: Any = None, http_status: int | None = None) -> None:
        super().__init__(f"{code} {message}" + ("" if data is None else f" {data}"))
        self.code, self.message, self.data, self.http_status = code, message, data, http_status


class StreamEnded(ClientError):
    """A stream that was over before what was waited for."""


@dataclass
class Event:
    """One server-sent event: `data` is the parsed JSON, or the text if it is none.

    The text is "" in an event that is only an id, as servers send to make a stream resumable from its start.
    """

    id: str | None
    data: object
    event: str = "message"


@dataclass
class Response:
    """One HTTP answer, read to its end."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes
    events: list[Event] = field(default_factory=list)

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", "replace")

    def json(self) -> Any:
        """The body as JSON; ClientError with the body if it is none."""
        try:
            return json.loads(self.body)
        except ValueError as error:
            raise ClientError(f"HTTP {self.status}, not JSON: {self.text[:1000]!r}") from error

    def messages(self) -> list[Json]:
        """All JSON-RPC messages in it, of a JSON body (a batch too) or of an event stream."""
        if self.headers.get_content_type() == EVENT_STREAM:
            return [event.data for event in self.events if isinstance(event.data, dict)]
        try:
            value = json.loads(self.body)
        except ValueError:
            return []
        return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, dict)]


class Wire:
    """HTTP/1.1 with keep-alive to one server: a pool of connections, one for each exchange under way.

    A connection that was closed while idle is replaced before
    anything is sent; after sending nothing is ever repeated.
    """

    def __init__(
        self, url: str, *, routes: Routes | None = None, context: ssl.SSLContext | None = None
    ) -> None:
        self._url, self._routes, self._context = url, routes, context
        self._idle: list[http.client.HTTPConnection] = []
        self._lock, self._closed = threading.Lock(), False

    def begin(
        self, method: str, url: str, body: bytes | None, headers: Mapping[str, str], timeout: float
    ) -> Begun:
        """Send a request; gives (connection, socket, response) once the response's head is there."""
        connection = self._take(timeout)
        try:
            connection.putrequest(method, request_target(url), skip_host=True, skip_accept_encoding=True)
            for name, value in {"Host": host_header(url), **headers}.items():
                connection.putheader(name, value)
            if body is not None and not any(name.lower() == "content-length" for name in headers):
                connection.putheader("Content-Length", str(len(body)))
            try:
                connection.endheaders(body)
            except (BrokenPipeError, ConnectionResetError):
                pass  # a server may refuse before it has read all; its answer counts
            wire = connection.sock
            return connection, wire, connection.getresponse()
        except BaseException:
            connection.close()
            raise

    def exchange(
        self,
        method: str,
        url: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = TIMEOUT,
    ) -> Response:
        """One request and its whole answer."""
        connection, _socket, answer = self.begin(method, url, body, headers or {}, timeout)
        try:
            response = Response(answer.status, answer.headers, answer.read())
        except BaseException:
            connection.close()
            raise
        self.give_back(connection)
        return response

    def _take(self, timeout: float) -> http.client.HTTPConnection:
        while True:
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                connection = connect(self._url, routes=self._routes, timeout=timeout, context=self._context)
                connection.connect()
                return connection
            if not readable(connection.sock):
                connection.sock.settimeout(timeout)
                return connection
            connection.close()

    def give_back(self, connection: http.client.HTTPConnection) -> None:
        """Keep a connection for the next exchange, if it is still open and its answer was read."""
        with self._lock:
            if connection.sock is not None and not self._closed:
                self._idle.append(connection)
                return
        connection.close()

    def close(self) -> None:
        """Close what is idle, and from now on what is given back."""
        with self._lock:
            self._closed, idle, self._idle = True, self._idle, []
        for connection in idle:
            connection.close()


def readable(wire: socket.socket) -> bool:
    """Whether an idle socket has something to say, which can only be its end (or a server out of step)."""
    poll = select.poll()
    poll.register(wire, select.POLLIN | select.POLLHUP | select.POLLERR)
    return bool(poll.poll(0))


# ---- OAuth
# ----------------------------------------------------------------------------------------------------------


def challenge_parameters(header: str | None) -> dict[str, str]:
    """The parameters of a WWW-Authenticate: Bearer header as a dict."""
    pairs = re.findall(r'([\w-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,]+))', header or "")
    return {name.lower(): re.sub(r"\\(.)", r"\1", quoted) or plain for name, quoted, plain in pairs}


def well_known(url: str, name: str) -> str:
    """The well-known URL of this name for an identifier, its path behind (RFC 8414 and RFC 9728)."""
    return f"{origin_of(url)}/.well-known/{name}{urlsplit(url).path.rstrip('/')}"


@dataclass
class Attempt:
    """One authorization request: what its code is redeemed with."""

    verifier: str | None
    redirect_uri: str | None
    resource: str | None


class OAuthClient:
    """An MCP client's OAuth side.

    `broker_url` is the public URL (or the MCP URL itself). Requests' fields can be replaced by keyword; None
    leaves one out. `routes` and `context` are as in browser.connect.
    """

    def __init__(
        self,
        broker_url: str,
        *,
        name: str = "scripted client",
        redirect_uri: str = "http://localhost/callback",
        auth_method: str = "none",
        routes: Routes | None = None,
        context: ssl.SSLContext | None = None,
    ) -> None:
        self.broker_url = broker_url.rstrip("/").removesuffix("/mcp")
        self.mcp_url = self.broker_url + "/mcp"
        self.name, self.redirect_uri, self.auth_method = name, redirect_uri, auth_method
        # None until they are known; whoever reads their members has come that far.
        self.client_id: Any = None
        self.client_secret: Any = None
        self.challenge: Any = None
        self.resource_metadata: Any = None
        self.metadata: Any = None
        self.tokens: Any = None
        self._routes, self._context = routes, context
        self._attempts: dict[str | None, Attempt] = {}
        self._last_attempt: Attempt | None = None

    # -- finding out --

    def discover(self) -> Any:
        """From a 401 at the MCP URL to the authorization server's metadata (returned).

        What was found on the way is in `challenge` (its parameters) and
        `resource_metadata`. ClientError where a client would give up.
        """
        refused = self._http("POST", self.mcp_url, b"{}", {"Content-Type": "application/json"})
        if refused.status != 401:
            raise HttpError(refused, "a 401 challenge")
        self.challenge = challenge_parameters(refused.headers.get("WWW-Authenticate"))
        where = self.challenge.get("resource_metadata")
        if not where:
            raise ClientError(f"no resource_metadata in {refused.headers.get('WWW-Authenticate')!r}")
        self.resource_metadata = self._document(where)
        if self.resource_metadata.get("resource") != self.mcp_url:
            raise ClientError(f"resource {self.resource_metadata.get('resource')!r} is not {self.mcp_url}")
        issuer = self.resource_metadata["authorization_servers"][0]
        metadata = self._document(well_known(issuer, "oauth-authorization-server"))
        if metadata.get("issuer") != issuer:
            raise ClientError(f"issuer {metadata.get('issuer')!r} is not {issuer!r}")
        if "S256" not in metadata.get("code_challenge_methods_supported", ()):
            raise ClientError("the metadata do not promise PKCE with S256")
        self.metadata = metadata
        return metadata

    def _document(self, url: str) -> Any:
        response = self._http("GET", url)
        if response.status != 200:
            raise HttpError(response, f"the document at {url}")
        return response.json()

    def register(self, **overrides: Any) -> Response:
        """Dynamic registration; on 201 the client is this one from now on."""
        asked = {
            "client_name": self.name,
            "redirect_uris": [self.redirect_uri],
            "grant_types": ["authorization_code", "refresh_token"],
            "response_types": ["code"],
            "token_endpoint_auth_method": self.auth_method,
        }
        asked = {name: value for name, value in {**asked, **overrides}.items() if value is not None}
        response = self._http(
            "POST",
            self._endpoint("registration_endpoint"),
            json.dumps(asked).encode(),
            {"Content-Type": "application/json"},
        )
        if response.status == 201:
            made = response.json()
            self.client_id, self.client_secret = made["client_id"], made.get("client_secret")
            self.auth_method = made.get("token_endpoint_auth_method", self.auth_method)
        return response

    def _endpoint(self, name: str) -> str:
        if self.metadata is None:
            self.discover()
        return str(self.metadata[name])

    # -- logging in --

    def authorize_url(self, scope: str | None = None, resource: str | None = "", **overrides: Any) -> str:
        """An authorization request's URL, with a new state and PKCE pair.

        `resource` is the MCP URL unless given.
        """
        verifier = secrets.token_urlsafe(48)
        digest = hashlib.sha256(verifier.encode()).digest()
        asked = {
            "response_type": "code",
            "client_id": self.client_id,
            "redirect_uri": self.redirect_uri,
            "state": secrets.token_urlsafe(16),
            "scope": scope,
            "resource": self.mcp_url if resource == "" else resource,
            "code_challenge": base64.urlsafe_b64encode(digest).decode().rstrip("="),
            "code_challenge_method": "S256",
        }
        asked = {name: value for name, value in {**asked, **overrides}.items() if value is not None}
        attempt = Attempt(verifier, asked.get("redirect_uri"), asked.get("resource"))
        self._attempts[asked.get("state")] = self._last_attempt = attempt
        return self._endpoint("authorization_endpoint") + "?" + urlencode(asked)

    def login(
        self,
        browser: Browser | None,
        login: str,
        password: str,
        access: str | None = "full",
        *,
        scope: str | None = None,
        **overrides: Any,
    ) -> Any:
        """The whole way, discovery and registration too if not yet done.

        Gives the token response as a dict and keeps it in `tokens`. `browser` None is a new one; `overrides`
        go into the authorization request.
        """
        if self.metadata is None:
            self.discover()
        if self.client_id is None:
            made = self.register()
            if made.status != 201:
                raise HttpError(made, "a registration")
        browser = browser or Browser(routes=self._routes, context=self._context)
        url = self.authorize_url(scope, **overrides)
        callback = approve_login(browser, url, login, password, access=access, redirect_uri=self.redirect_uri)
        return self.finish(callback)

    def finish(self, callback_url: str) -> Any:
        """What the client does when its redirect URI is called: check state and iss, redeem the code."""
        answer = dict(parse_qsl(urlsplit(callback_url).query))
        attempt = self._attempts.pop(answer.get("state"), None)
        if attempt is None:
            raise ClientError(f"the callback's state is unknown: {callback_url}")
        if answer.get("iss") != self.metadata["issuer"]:
            raise ClientError(f"the callback's iss is {answer.get('iss')!r}, not {self.metadata['issuer']!r}")
        if "code" not in answer:
            raise ClientError(
                f"the login ended with {answer.get('error')}: {answer.get('error_description')}"
            )
        response = self.redeem(
            answer["code"],
            code_verifier=attempt.verifier,
            redirect_uri=attempt.redirect_uri,
            resource=attempt.resource,
        )
        if response.status != 200:
            raise HttpError(response, "tokens")
        return self.tokens

    # -- tokens --

    def redeem(self, code: str, **overrides: Any) -> Response:
        """Exchange a code, by default of the latest `authorize_url`; on 200 the tokens are in `tokens`."""
        attempt = self._last_attempt or Attempt(None, self.redirect_uri, self.mcp_url)
        return self._grant(
            {
                "grant_type": "authorization_code",
                "code": code,
                "redirect_uri": attempt.redirect_uri,
                "code_verifier": attempt.verifier,
                "resource": attempt.resource,
            },
            overrides,
        )

    def refresh(self, **overrides: Any) -> Response:
        """Refresh, by default with the newest refresh token; on 200 the new tokens are in `tokens`."""
        token = (self.tokens or {}).get("refresh_token")
        return self._grant(
            {"grant_type": "refresh_token", "refresh_token": token, "resource": self.mcp_url}, overrides
        )

    def _grant(self, fields: Json, overrides: Json) -> Response:
        response = self._authenticated("token_endpoint", fields, overrides)
        if response.status == 200:
            self.tokens = response.json()
        return response

    def revoke(self, token: str, **overrides: Any) -> Response:
        """Revoke a token (RFC 7009)."""
        return self._authenticated("revocation_endpoint", {"token": token}, overrides)

    def _authenticated(self, endpoint: str, fields: Json, overrides: Json) -> Response:
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        if self.auth_method == "client_secret_basic":
            pair = f"{quote(self.client_id, safe='')}:{quote(self.client_secret, safe='')}"
            headers["Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
        else:
            fields["client_id"] = self.client_id
        if self.auth_method == "client_secret_post":
            fields["client_secret"] = self.client_secret
        fields = {name: value for name, value in {**fields, **overrides}.items() if value is not None}
        return self._http("POST", self._endpoint(endpoint), urlencode(fields).encode(), headers)

    def _http(
        self, method: str, url: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Response:
        wire = Wire(url, routes=self._routes, context=self._context)
        try:
            return wire.exchange(
                method,
                url,
                body,
                {"Accept": "application/json, text/event-stream", "Connection": "close", **(headers or {})},
            )
        finally:
            wire.close()


# ---- Streams
# --------------------------------------------------------------------------------------------------------


class EventReader:
    """Server-sent events, line by line: `feed(line)` gives an Event when one is complete.

    `comments` counts the keep-alives.
    """

    def __init__(self) -> None:
        self.comments = 0
        self.last_id: str | None = None
        self._id: str | None = None
        self._name: str | None = None
        self._data: list[str] = []

    def feed(self, data: bytes) -> Event | None:
        line = data.decode("utf-8", "replace").rstrip("\r\n")
        if not line:
            return self._complete()
        if line.startswith(":"):
            self.comments += 1
            return None
        name, _colon, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "id" and "\0" not in value:
            self._id = self.last_id = value
        elif name == "event":
            self._name = value
        return None

    def _complete(self) -> Event | None:
        data = "\n".join(self._data)
        made: Event | None = None
        if self._data or self._id is not None:
            try:
                made = Event(self._id, json.loads(data), self._name or "message")
            except ValueError:
                made = Event(self._id, data, self._name or "message")
        self._id, self._name, self._data = None, None, []
        return made


class SseStream:
    """A stream that a thread reads.

    `next(timeout)` gives its events in order; `close()` hangs up. If the answer was no event stream,
    `response` holds it and there are no events.
    """

    def __init__(
        self,
        connection: http.client.HTTPConnection,
        wire: socket.socket,
        answer: http.client.HTTPResponse,
        on_close: Callable[[SseStream], object] | None = None,
        received: Callable[[Any], object] | None = None,
    ) -> None:
        self.status, self.headers = answer.status, answer.headers
        self.response: Response | None = None
        self.ended = threading.Event()
        self._connection, self._wire, self._answer, self._on_close = connection, wire, answer, on_close
        self._reader, self._keepalive = EventReader(), threading.Semaphore(0)
        self._queue: queue.SimpleQueue[Event | None] = queue.SimpleQueue()  # None: the end
        self._thread: threading.Thread | None = None
        self._received = received or (lambda message: message)
        if answer.headers.get_content_type() != EVENT_STREAM:
            self.response = Response(answer.status, answer.headers, answer.read())
            self._finish()
        else:
            wire.settimeout(None)
            self._thread = threading.Thread(target=self._read, daemon=True)
            self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    @property
    def last_event_id(self) -> str | None:
        """The id to resume after, or None."""
        return self._reader.last_id

    def _read(self) -> None:
        try:
            while line := self._answer.readline():
                comments = self._reader.comments
                event = self._reader.feed(line)
                if event is not None:
                    self._queue.put(event)
                if self._reader.comments > comments:
                    self._keepalive.release()
        except (OSError, ValueError, AttributeError, http.client.HTTPException):
            pass  # closed from here or cut by the server: for who reads, both are the end
        finally:
            self._finish()

    def _finish(self) -> None:
        self._connection.close()
        self.ended.set()
        self._queue.put(None)
        if self._on_close is not None:
            self._on_close(self)

    def next(self, timeout: float = TIMEOUT) -> Event:
        """The next event. StreamEnded if there is none any more, TimeoutError if none came in time."""
        try:
            event = self._queue.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError("no event on the stream") from None
        if event is None:
            self._queue.put(None)
            raise StreamEnded("the stream has ended")
        self._received(event.data)
        return event

    def wait_comment(self, timeout: float = TIMEOUT) -> bool:
        """Wait for a keep-alive comment that was not waited for before; False if none came."""
        return self._keepalive.acquire(timeout=timeout)

    def close(self) -> None:
        """Hang up, and wait for the thread."""
        if self._thread is not None and not self.ended.is_set():
            try:
                self._wire.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(TIMEOUT)


# ---- MCP
# ------------------------------------------------------------------------------------------------------------


class McpClient:
    """One MCP client over Streamable HTTP, usable from several threads.

    With a `protocol` of 2026-07-28 or later requests carry their `_meta` and headers
    (modern); else `initialize` opens a session (legacy). `on_request(method, params)`
    answers the server's requests (its result is sent back; RpcError makes an error;
    without it `ping` is answered and all else refused); `on_notification(method,
    params)` gets what the server tells. `events` collects all events of POST answers.
    """

    def __init__(
        self,
        url: str,
        token: str,
        *,
        protocol: str = LEGACY,
        session_id: str | None = None,
        capabilities: Json | None = None,
        name: str = "scripted client",
        routes: Routes | None = None,
        context: ssl.SSLContext | None = None,
    ) -> None:
        self.url, self.token, self.protocol, self.session_id = url, token, protocol, session_id
        self.capabilities, self.info = capabilities or {}, {"name": name, "version": "1"}
        # What was negotiated: sent once it is known.
        self.version: str | None = protocol if session_id else None
        self.on_request: Callable[[str, Any], Any] | None = None
        self.on_notification: Callable[[str, Any], object] | None = None
        self.events: list[Event] = []
        self.server: Any = None
        self.oauth: Any = None  # the OAuthClient of a client that a rig has logged in
        self._ids = itertools.count(1)
        self._wire = Wire(url, routes=routes, context=context)
        self._streams: set[SseStream] = set()
        self._lock = threading.Lock()
        self._asked: dict[Any, str] = {}  # the method of each request sent, by its id

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    @property
    def is_modern(self) -> bool:
        return self.protocol >= MODERN

    def close(self) -> None:
        """Hang up everything; the session itself stays (see `delete`)."""
        with self._lock:
            streams = list(self._streams)
        for stream in streams:
            stream.close()
        self._wire.close()

    # -- requests --

    def initialize(
        self, capabilities: Json | None = None, version: str | None = None, timeout: float = TIMEOUT
    ) -> Any:
        """Open a session and tell the server so; gives the result of `initialize`, also kept in `server`."""
        if capabilities is not None:
            self.capabilities = capabilities
        self.session_id = self.version = None
        message = self._message(
            "initialize",
            {
                "protocolVersion": version or self.protocol,
                "capabilities": self.capabilities,
                "clientInfo": self.info,
            },
            next(self._ids),
        )
        response, answer = self._call(message, {}, timeout)
        self.server = self._result(response, answer)
        self.version = self.server["protocolVersion"]
        self.session_id = response.headers.get("Mcp-Session-Id")
        self.notify("notifications/initialized")
        return self.server

    def request(
        self,
        method: str,
        params: Json | None = None,
        id: object = None,
        timeout: float = TIMEOUT,
        headers: Headers | None = None,
    ) -> Any:
        """Send a request and give its result.

        RpcError for an error, HttpError for an answer without a message, StreamEnded if the stream was over
        before it, TimeoutError after `timeout` seconds.
        """
        message = self._message(method, params, next(self._ids) if id is None else id)
        return self._result(*self._call(message, headers or {}, timeout))

    def notify(self, method: str, params: Json | None = None, timeout: float = TIMEOUT) -> Response:
        """Send a notification; HttpError unless it is accepted with 202."""
        response = self.post(self._message(method, params), timeout=timeout)
        if response.status != 202:
            raise HttpError(response, "202")
        return response

    def reply(
        self, id: object, result: object = None, error: object = None, timeout: float = TIMEOUT
    ) -> Response:
        """Answer a request of the server with a result, or with an error object."""
        answer = {"error": error} if error is not None else {"result": result}
        return self.post({"jsonrpc": "2.0", "id": id, **answer}, timeout=timeout)

    def call_tool(self, name: str, /, **args: Any) -> Any:
        """The result of a tool call."""
        return self.request("tools/call", {"name": name, "arguments": args})

    def list_tools(self) -> list[Json]:
        """All tools, of all pages."""
        tools, cursor, seen = [], None, set()
        while True:
            page = self.request("tools/list", {"cursor": cursor} if cursor is not None else None)
            tools += page["tools"]
            cursor = page.get("nextCursor")
            if cursor is None:
                return tools
            if cursor in seen:
                raise ClientError(f"the pages of tools/list go in a circle at {cursor!r}")
            seen.add(cursor)

    def _message(self, method: str, params: Json | None = None, id: object = None) -> Json:
        message: Json = {"jsonrpc": "2.0", "method": method}
        if id is not None:
            message["id"] = id
        if self.is_modern and method != "initialize":
            meta = {
                META + "protocolVersion": self.protocol,
                META + "clientInfo": self.info,
                META + "clientCapabilities": self.capabilities,
            }
            params = {**(params or {}), "_meta": {**meta, **(params or {}).get("_meta", {})}}
        if params is not None:
            message["params"] = params
        return message

    @staticmethod
    def _result(response: Response, answer: Json | None) -> Any:
        if answer is None:
            if response.headers.get_content_type() == EVENT_STREAM:
                raise StreamEnded("the stream ended without the answer")
            raise HttpError(response, "a JSON-RPC answer")
        if "error" in answer:
            error = answer["error"]
            raise RpcError(error["code"], error["message"], error.get("data"), response.status)
        return answer["result"]

    # -- HTTP --

    def received(self, message: Any) -> Any:
        """A message of the server, judged by the revision that is spoken."""
        if (
            judge is not None and isinstance(message, dict) and not isinstance(message.get("error"), str)
        ):  # that is OAuth's form
            method = (
                self._asked.get((type(message.get("id")), message.get("id")))
                if "method" not in message
                else None
            )
            opened = message.get("result", {}).get("protocolVersion") if method == "initialize" else None
            # `initialize` is of the earlier eras, always, whatever the client speaks otherwise.
            judge(
                message,
                opened or (LEGACY if method == "initialize" else self.version or self.protocol),
                method,
            )
        return message

    def headers(self, message: Any = None) -> dict[str, str]:
        """The headers of a request that carries `message` (a dict, or None)."""
        headers = {"Accept": f"application/json, {EVENT_STREAM}"}
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        method = message.get("method") if isinstance(message, dict) else None
        if self.is_modern and method != "initialize":
            headers["MCP-Protocol-Version"] = self.protocol
            headers |= self._modern_headers(method, message)
        elif self.version is not None:
            headers["MCP-Protocol-Version"] = self.version
        if self.session_id is not None:
            headers["Mcp-Session-Id"] = self.session_id
        return headers

    @staticmethod
    def _modern_headers(method: str | None, message: Json) -> dict[str, str]:
        if method is None:
            return {}
        params = message.get("params")
        named = params.get(NAMED_BY.get(method)) if isinstance(params, dict) else None
        return {"Mcp-Method": method, **({"Mcp-Name": header_value(named)} if isinstance(named, str) else {})}

    def post(self, message: Any, headers: Headers | None = None, timeout: float = TIMEOUT) -> Response:
        """POST a message (or raw bytes) and read the answer to its end; nothing in it is an exception.

        `headers` are added; None takes one away.
        """
        return self._post(message, headers, timeout)[0]

    def _call(self, message: Json, headers: Headers, timeout: float) -> tuple[Response, Json | None]:
        """As post, until the answer to `message` is there: (Response, the answer or None)."""
        return self._post(message, headers, timeout, message["id"])

    def _post(
        self, message: Any, headers: Headers | None, timeout: float, awaited: object = None
    ) -> tuple[Response, Json | None]:
        deadline = time.monotonic() + timeout
        connection, wire, answer = self._begin("POST", message, headers, timeout)
        try:
            if answer.headers.get_content_type() == EVENT_STREAM:
                response, found = self._read_events(wire, answer, deadline, awaited)
            else:
                response, found = Response(answer.status, answer.headers, answer.read()), None
                for each in response.messages():
                    self.received(each)
        except BaseException:
            connection.close()
            raise
        self._wire.give_back(connection)
        if awaited is not None and found is None:
            found = next(
                (each for each in response.messages() if answers(each, awaited, response.status)), None
            )
        return response, found

    def _begin(self, method: str, message: Any, headers: Headers | None, timeout: float) -> Begun:
        body = message if isinstance(message, bytes | None) else json.dumps(message).encode()
        for asked in message if isinstance(message, list) else [message]:
            if isinstance(asked, dict) and "method" in asked and isinstance(asked.get("id"), str | int):
                self._asked[type(asked["id"]), asked["id"]] = asked["method"]
        made = self.headers(message)
        if body is not None:
            made["Content-Type"] = "application/json"
        for name, value in (headers or {}).items():
            made = {known: kept for known, kept in made.items() if known.lower() != name.lower()}
            if value is not None:
                made[name] = value
        return self._wire.begin(method, self.url, body, made, timeout)

    def _read_events(
        self, wire: socket.socket, answer: http.client.HTTPResponse, deadline: float, awaited: object
    ) -> tuple[Response, Json | None]:
        """Read a POST's stream to its end, handing on what is in it. The end must follow the answer."""
        reader = EventReader()
        lines: list[bytes] = []
        events: list[Event] = []
        found: Any = None
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("the answer's stream did not end in time")
            if not answer.isclosed():
                wire.settimeout(left)
            try:
                line = answer.readline()
            except (http.client.IncompleteRead, ConnectionError) as error:
                raise StreamEnded("the stream was cut") from error
            if not line:
                answer.read()  # nothing is left, but only this tells the connection that it is free again
                return Response(answer.status, answer.headers, b"".join(lines), events), found
            lines.append(line)
            event = reader.feed(line)
            if event is None:
                continue
            events.append(event)
            self.events.append(event)
            self.received(event.data)
            if awaited is not None and answers(event.data, awaited, answer.status):
                found = event.data
            else:
                self.handle(event.data)

    def handle(self, message: Any) -> None:
        """Do with a message of the server what a client does: answer a request, note a notification."""
        if not isinstance(message, dict) or "method" not in message:
            return
        method, params = message["method"], message.get("params")
        if "id" in message:
            self.reply(message["id"], **self._answer_to(method, params))
        elif self.on_notification is not None:
            self.on_notification(method, params)

    def _answer_to(self, method: str, params: Any) -> Json:
        try:
            if self.on_request is not None:
                return {"result": self.on_request(method, params)}
            if method == "ping":
                return {"result": {}}
            raise RpcError(METHOD_NOT_FOUND, f"{method} is not supported")
        except RpcError as error:
            data = {} if error.data is None else {"data": error.data}
            return {"error": {"code": error.code, "message": error.message, **data}}
        except Exception as error:  # the server must not wait for the answer of a handler that broke
            return {"error": {"code": INTERNAL_ERROR, "message": repr(error)}}

    # -- streams --

    def open_stream(
        self, last_event_id: str | None = None, timeout: float = TIMEOUT, headers: Headers | None = None
    ) -> SseStream:
        """GET the session's stream; HttpError if it is refused."""
        extra = {
            "Accept": EVENT_STREAM,
            **({"Last-Event-ID": last_event_id} if last_event_id else {}),
            **(headers or {}),
        }
        stream = self._stream("GET", None, extra, timeout)
        if stream.response is not None:
            raise HttpError(stream.response, "a stream")
        return stream

    def open_post(self, message: Any, headers: Headers | None = None, timeout: float = TIMEOUT) -> SseStream:
        """POST a message and give its answer as an SseStream that can be left before its end.

        Its events are not handled. `response` is set if the answer was plain.
        """
        return self._stream("POST", message, headers, timeout)

    def start_request(
        self,
        method: str,
        params: Json | None = None,
        id: object = None,
        headers: Headers | None = None,
        timeout: float = TIMEOUT,
    ) -> tuple[Any, SseStream]:
        """As open_post, for a request made here: gives (id, SseStream)."""
        id = next(self._ids) if id is None else id
        return id, self.open_post(self._message(method, params, id), headers, timeout)

    def _stream(self, method: str, message: Any, headers: Headers | None, timeout: float) -> SseStream:
        connection, wire, answer = self._begin(method, message, headers, timeout)
        stream = SseStream(connection, wire, answer, self._forget, self.received)
        with self._lock:
            if not stream.ended.is_set():
                self._streams.add(stream)
        return stream

    def _forget(self, stream: SseStream) -> None:
        with self._lock:
            self._streams.discard(stream)

    def delete(self, timeout: float = TIMEOUT) -> Response:
        """End the session; the id is kept so that its end can be observed."""
        return self._wire.exchange("DELETE", self.url, None, self.headers(), timeout)


def answers(message: object, id: object, status: int) -> bool:
    """Whether this is the answer to the request `id` (1, "1" and True are three ids).

    An HTTP error may answer without an id: the server need not have read so far.
    """
    if not isinstance(message, dict) or not ("result" in message or isinstance(message.get("error"), dict)):
        return False
    there = message.get("id")
    return (there is None and status >= 400) or (there == id and type(there) is type(id))


def header_value(text: str) -> str:
    """A parameter's value as a header: as it is if it can be, else in the spec's base64 form."""
    if re.fullmatch(r"[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?", text) and not text.startswith("=?base64?"):
        return text
    return f"=?base64?{base64.b64encode(text.encode()).decode()}?="
