"""Replays what a client was seen to send (tests/transcripts/*.toml) against a broker, request by request.

A transcript says, beside the client's name and where each fact was read: the discovery requests in their
order with the status that lets the client go on, the registration body, how it authenticates, the redirect
URI it authorizes with, how it spells `resource` ("" leaves it out), and what its MCP requests look like.
{origin} and {mcp} stand for the broker's URLs.
"""

import base64
import hashlib
import http.client
import json
import secrets
import tomllib
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from rigs.browser import Browser, approve_login

FOLDER = Path(__file__).resolve().parent.parent / "real" / "transcripts"
LIMIT = 30


def transcripts():
    """{name: transcript} of every client."""
    return {path.stem: tomllib.loads(path.read_text()) for path in sorted(FOLDER.glob("*.toml"))}


@dataclass
class Answer:
    """What came back: status, headers (lower-case names), body."""

    status: int
    headers: dict
    body: bytes

    def json(self):
        return json.loads(self.body)

    def message(self):
        """The JSON-RPC answer, from JSON or from the last event of a stream."""
        if self.headers["content-type"] == "application/json":
            return self.json()
        assert self.headers["content-type"] == "text/event-stream", self.headers
        return json.loads(
            [line[6:] for line in self.body.decode().split("\n") if line.startswith("data: {")][-1]
        )


class Replay:
    """One client's way from the bare URL to a tool call.

    The steps are methods, in their order; `run` takes them all.
    """

    def __init__(self, origin, transcript):
        self.origin, self.mcp_url, self.facts = origin, origin + "/mcp", transcript
        self.client = self.tokens = self.session = None
        self._number = 0

    def send(self, method, path, body=None, headers=None):
        """One request on a connection of its own, with no header but these (and Host, Content-Length)."""
        connection = http.client.HTTPConnection(urlsplit(self.origin).netloc, timeout=LIMIT)
        try:
            connection.putrequest(method, path, skip_accept_encoding=True)
            for name, value in (headers or {}).items():
                connection.putheader(name, value)
            if body is not None:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            if answer.getheader("Content-Type", "").startswith("text/event-stream") and method == "GET":
                return Answer(
                    answer.status,
                    {name.lower(): value for name, value in answer.getheaders()},
                    answer.readline(),
                )
            return Answer(
                answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
            )
        finally:
            connection.close()

    def spelled(self, text):
        """A text of the transcript with the broker's URLs in it."""
        return text.replace("{mcp}", self.mcp_url).replace("{origin}", self.origin)

    def path(self, name):
        """An endpoint's path: of the metadata, or of those clients that make their own."""
        return f"/{name}" if self.facts.get("root_endpoints") else f"/oauth/{name}"

    # -- OAuth

    def discover(self):
        """Each request of the client's search.

        What it needs must be there, what it tries must not break it.
        """
        for line in self.facts["discovery"]:
            method, path, status = line.split()
            headers = dict(self.facts["headers"])
            if method == "OPTIONS":
                headers |= {
                    "Access-Control-Request-Method": "POST",
                    "Access-Control-Request-Headers": "authorization,mcp-protocol-version",
                }
            body = b'{"jsonrpc":"2.0","id":0,"method":"ping"}' if method == "POST" else None
            answer = self.send(method, path, body, headers)
            assert answer.status == int(status), f"{line}: {answer}"
            assert "location" not in answer.headers
            if answer.status == 401:
                assert (
                    f'resource_metadata="{self.origin}/.well-known/oauth-protected-resource/mcp"'
                    in answer.headers["www-authenticate"]
                )
                assert "error=" not in answer.headers["www-authenticate"]
            if "/.well-known/" in path and method == "GET":
                self._check_document(path, answer)
            if self.facts.get("cors"):
                assert answer.headers["access-control-allow-origin"] in ("*", headers["Origin"])

    def _check_document(self, path, answer):
        assert answer.headers["content-type"] == "application/json"
        document = answer.json()
        if answer.status != 200:
            return
        assert None not in document.values() and "" not in document.values()
        if "protected-resource" in path:
            assert document["resource"] == self.mcp_url and document["authorization_servers"] == [self.origin]
        else:
            assert document["issuer"] == self.origin and document["code_challenge_methods_supported"] == [
                "S256"
            ]

    def register(self):
        """RFC 7591, as often as the client does it; the last registration is used."""
        asked = self.facts["registration"]
        for _ in range(self.facts.get("registrations", 1)):
            answer = self.send(
                "POST",
                self.path("register"),
                json.dumps(asked).encode(),
                {**self.facts["headers"], "Content-Type": "application/json"},
            )
            assert answer.status == 201 and answer.headers["content-type"] == "application/json", answer
            self.client = answer.json()
        for name, value in asked.items():
            assert self.client.get(name, value) == value, name
        for name in ("redirect_uris", "grant_types", "response_types"):
            assert self.client[name] and isinstance(self.client[name], list)
        assert None not in self.client.values() and "" not in self.client.values()
        method = self.client["token_endpoint_auth_method"]
        assert (
            method
            == asked.get("token_endpoint_auth_method", "client_secret_basic")
            == self.facts["authentication"]
        )
        assert ("client_secret" in self.client) == (method != "none")

    def log_in(self, user):
        """The person's part, then the code for tokens."""
        verifier = secrets.token_urlsafe(48)
        asked = {
            "response_type": "code",
            "client_id": self.client["client_id"],
            "redirect_uri": self.facts["redirect_uri"],
            "state": secrets.token_urlsafe(24),
            "code_challenge_method": "S256",
            **self.facts["authorize"],
            "code_challenge": base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest())
            .decode()
            .rstrip("="),
        }
        resource = {"resource": self.spelled(self.facts["resource"])} if self.facts["resource"] else {}
        url = f"{self.origin}{self.path('authorize')}?{urlencode({**asked, **resource})}"
        callback = approve_login(Browser(), url, user, "secret")
        assert callback.startswith(self.facts["redirect_uri"] + "?")
        query = dict(parse_qsl(urlsplit(callback).query))
        assert (query["state"], query["iss"]) == (asked["state"], self.origin)
        self._token(
            {
                "grant_type": "authorization_code",
                "code": query["code"],
                "redirect_uri": self.facts["redirect_uri"],
                "code_verifier": verifier,
                **resource,
            }
        )

    def refresh(self):
        """Refresh as often as the client does; the tokens before stay good until they expire."""
        before = self.tokens
        for _ in range(self.facts.get("refreshes", 1)):
            resource = self.facts["refresh_resource"]
            self._token(
                {
                    "grant_type": "refresh_token",
                    "refresh_token": self.tokens["refresh_token"],
                    **({"resource": self.spelled(resource)} if resource else {}),
                }
            )
        assert self.tokens["refresh_token"] != before["refresh_token"]

    def _token(self, fields):
        headers = {
            **self.facts["headers"],
            "Content-Type": "application/x-www-form-urlencoded",
            "Accept": self.facts.get("token_accept", "application/json"),
        }
        client, method = self.client, self.facts["authentication"]
        if method == "client_secret_basic":
            pair = f"{quote(client['client_id'], safe='')}:{quote(client['client_secret'], safe='')}"
            headers["Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
        else:
            fields["client_id"] = client["client_id"]
        if method == "client_secret_post" or self.facts.get("stray_secret"):
            fields["client_secret"] = client.get("client_secret", "none-was-given")
        answer = self.send("POST", self.path("token"), urlencode(fields).encode(), headers)
        assert answer.status == 200, answer
        assert (answer.headers["content-type"], answer.headers["cache-control"]) == (
            "application/json",
            "no-store",
        )
        self.tokens = answer.json()
        assert (
            self.tokens["token_type"] == "Bearer"
            and type(self.tokens["expires_in"]) is int
            and self.tokens["scope"]
        )
        assert self.tokens["refresh_token"]

    # -- MCP

    def rpc(self, method, params=None, notification=False, headers=None):
        """One message, as this client sends it after `initialize`."""
        mcp = self.facts["mcp"]
        self._number += 1
        message = {
            "jsonrpc": "2.0",
            "method": method,
            **({} if notification else {"id": self._number}),
            **({} if params is None else {"params": params}),
        }
        sent = {
            **mcp["headers"],
            "Authorization": "Bearer " + self.tokens["access_token"],
            "Content-Type": "application/json",
        }
        if self.session and mcp.get("session", True):
            sent["Mcp-Session-Id"] = self.session
        if self.session and mcp["version_header"]:
            sent["MCP-Protocol-Version"] = (
                mcp["protocol"] if mcp["version_header"] is True else mcp["version_header"]
            )
        return self.send("POST", "/mcp", json.dumps(message).encode(), {**sent, **(headers or {})})

    def probe(self):
        """A modern client asks first.

        Whatever the answer, it is quick, JSON, and lets `initialize` follow.
        """
        version = self.facts["mcp"].get("probe")
        if version:
            meta = {
                "_meta": {
                    "io.modelcontextprotocol/protocolVersion": version,
                    "io.modelcontextprotocol/clientCapabilities": {},
                    "io.modelcontextprotocol/clientInfo": {"name": "replay", "version": "1"},
                }
            }
            answer = self.rpc(
                "server/discover",
                meta,
                headers={"MCP-Protocol-Version": version, "Mcp-Method": "server/discover"},
            )
            assert (
                answer.status in (200, 400, 404) and answer.headers["content-type"] == "application/json"
            ), answer
            assert answer.status == 200 or answer.json()["error"]["code"] in (-32022, -32601)

    def open(self):
        """`initialize` and `notifications/initialized`, and the stream if this client opens one."""
        wanted = self.facts["mcp"]["protocol"]
        answer = self.rpc(
            "initialize",
            {"protocolVersion": wanted, "capabilities": {}, "clientInfo": {"name": "replay", "version": "1"}},
        )
        assert answer.status == 200, answer
        assert answer.message()["result"]["protocolVersion"] == wanted
        self.session = answer.headers["mcp-session-id"]
        answer = self.rpc("notifications/initialized", notification=True)
        assert (answer.status, answer.body) == (202, b"")
        if self.facts["mcp"].get("stream"):
            headers = {
                **self.facts["mcp"]["headers"],
                "Authorization": "Bearer " + self.tokens["access_token"],
                "Mcp-Session-Id": self.session,
                "Accept": "text/event-stream",
            }
            answer = self.send("GET", "/mcp", headers=headers)
            assert (
                answer.status == 200 and answer.headers["content-type"] == "text/event-stream" and answer.body
            )

    def use(self, user):
        """List the tools and call one: it acts as this user."""
        answer = self.rpc("tools/list", {})
        assert answer.status == 200 and "get_my_user_info" in [
            tool["name"] for tool in answer.message()["result"]["tools"]
        ]
        answer = self.rpc("tools/call", {"name": "get_my_user_info", "arguments": {}})
        assert (
            answer.status == 200 and f'"login": "{user}"' in answer.message()["result"]["content"][0]["text"]
        ), answer

    def end(self):
        """DELETE, if this client does that."""
        if self.facts["mcp"].get("delete"):
            headers = {
                **self.facts["mcp"]["headers"],
                "Authorization": "Bearer " + self.tokens["access_token"],
                "Mcp-Session-Id": self.session,
            }
            assert self.send("DELETE", "/mcp", headers=headers).status == 204

    def run(self, user="alice"):
        """All of it, with a refresh in mid-session."""
        self.discover()
        self.register()
        self.log_in(user)
        self.probe()
        self.open()
        self.use(user)
        self.refresh()
        self.use(user)
        self.end()
