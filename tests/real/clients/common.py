"""What the SDK client programs share: arguments, the scripted login, the token storage, and the report.

Standard library only, so that both SDK environments can
import it; the SDKs' own classes come in from the programs.
"""

import argparse
import asyncio
import hashlib
import http.server
import importlib.metadata
import json
import sys
import threading
import time
import traceback
import urllib.parse
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from rigs.browser import Browser, approve_login  # noqa: E402

LOGIN_LIMIT = 30


def parse_arguments(description, argv=None):
    """The command line both programs take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("url", help="the bare MCP URL")
    parser.add_argument("login", help="Forgejo user name")
    parser.add_argument("password")
    parser.add_argument("--calls", nargs="*", default=["get_my_user_info"], metavar="TOOL")
    parser.add_argument(
        "--access", default="full", choices=["full", "read"], help="what to choose on the consent page"
    )
    parser.add_argument(
        "--scope", help="scope to put into the client's metadata (the SDK may choose another)"
    )
    parser.add_argument(
        "--expire-and-call", action="store_true", help="then let the token expire and call again"
    )
    parser.add_argument("--elicit", nargs="?", const="ask_elicit", metavar="TOOL")
    parser.add_argument(
        "--answer", type=json.loads, metavar="JSON", help="content of the elicitation's answer"
    )
    parser.add_argument("--progress", nargs="?", const="get_progress", metavar="TOOL")
    parser.add_argument(
        "--interactive-lines", action="store_true", help="commands on stdin, one JSON line for each"
    )
    parser.add_argument("--mode", default="auto", help="mcp 2.x: auto, legacy or a protocol version")
    return parser.parse_args(argv)


class CallbackListener:
    """A client's loopback redirect URI: a real listener that keeps the query of each request to /callback."""

    def __init__(self):
        self._arrived = threading.Condition()
        self._queries = []
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )
        self._thread.start()
        self.redirect_uri = "http://localhost:%d/callback" % self._server.server_address[1]

    def _handler(self):
        listener = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                parts = urllib.parse.urlsplit(self.path)
                known = parts.path == "/callback"
                self.send_response(200 if known else 404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                if known:
                    listener._keep(dict(urllib.parse.parse_qsl(parts.query)))

            def log_message(self, *_):
                pass

        return Handler

    def _keep(self, query):
        with self._arrived:
            self._queries.append(query)
            self._arrived.notify_all()

    def take(self):
        """The query of the oldest callback not yet taken; TimeoutError if none comes."""
        with self._arrived:
            if not self._arrived.wait_for(lambda: self._queries, LOGIN_LIMIT):
                raise TimeoutError("no callback within %d s" % LOGIN_LIMIT)
            return self._queries.pop(0)

    def close(self):
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Login:
    """The person at the browser: opens authorize URLs, logs in, consents, and lets the callback be called."""

    def __init__(self, arguments):
        self.listener = CallbackListener()
        self.rounds = []
        self._arguments = arguments
        self._browser = Browser()

    async def open(self, authorize_url):
        """The SDK's redirect handler."""
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(authorize_url).query)
        self.rounds.append(
            {name: query[name][0] for name in ("scope", "resource", "prompt") if name in query}
        )
        await asyncio.to_thread(self._walk, authorize_url)

    def _walk(self, authorize_url):
        who = self._arguments
        target = approve_login(self._browser, authorize_url, who.login, who.password, access=who.access)
        if not target.startswith(self.listener.redirect_uri):
            raise RuntimeError("the login ended at %s" % target.partition("?")[0])
        urllib.request.urlopen(target, timeout=LOGIN_LIMIT).close()

    async def callback(self):
        """The callback's query, as the SDK's callback handler needs it; RuntimeError for an OAuth error."""
        query = await asyncio.to_thread(self.listener.take)
        if "error" in query:
            raise RuntimeError(
                "authorization ended with %s: %s" % (query["error"], query.get("error_description"))
            )
        return query


class MemoryStorage:
    """The SDKs' token storage, in memory; counts what the SDK stores."""

    def __init__(self):
        self.tokens = None
        self.client_info = None
        self.stored = 0

    async def get_tokens(self):
        return self.tokens

    async def set_tokens(self, tokens):
        self.tokens = tokens
        self.stored += 1

    async def get_client_info(self):
        return self.client_info

    async def set_client_info(self, client_info):
        self.client_info = client_info

    def summary(self):
        """What is stored, without a secret: SHA-256 digests stand for the tokens."""
        tokens, client = self.tokens, self.client_info
        return {
            "scope": tokens and tokens.scope,
            "expires_in": tokens and tokens.expires_in,
            "access_sha256": digest(tokens and tokens.access_token),
            "refresh_sha256": digest(tokens and tokens.refresh_token),
            "client_id": client and client.client_id,
            "auth_method": client and client.token_endpoint_auth_method,
            "stored": self.stored,
        }


def digest(secret):
    """The SHA-256 of `secret` in hex, or None."""
    return secret and hashlib.sha256(secret.encode()).hexdigest()


def answer_for(schema):
    """Content that satisfies an elicitation's flat schema."""
    return {name: value_for(rule) for name, rule in schema.get("properties", {}).items()}


def value_for(rule):
    """A value that satisfies one property's schema."""
    if "default" in rule:
        return rule["default"]
    if rule.get("enum"):
        return rule["enum"][0]
    if rule.get("oneOf"):
        return rule["oneOf"][0]["const"]
    kind = rule.get("type", "string")
    if kind in ("integer", "number"):
        return rule.get("minimum", 1)
    if kind == "boolean":
        return True
    return [] if kind == "array" else "scripted"


class Conversation:
    """Runs what the arguments ask for over one connected client.

    `client` is the program's adapter: list_tools() -> tool names, call(name, arguments,
    on_progress) -> dict with text, is_error and structured, updated(uri, cause) (await
    `cause()` while subscribed to the resource; the uri told of), start(name, arguments),
    cancel() (of what start began), and the attributes protocol_version and server.
    """

    def __init__(self, arguments, client, provider, storage, login, questions):
        self.arguments = arguments
        self.client = client
        self.provider = provider
        self.storage = storage
        self.login = login
        self.questions = questions

    async def run(self):
        """The first calls, then what the options add; the result."""
        names = await self.client.list_tools()
        result = {
            "sdk": "mcp " + importlib.metadata.version("mcp"),
            "protocol_version": self.client.protocol_version,
            "server": self.client.server,
            "tools": len(names),
            "tool_names": names,
            "calls": [await self.call(name) for name in self.arguments.calls],
        }
        if self.arguments.elicit:
            result["elicit"] = await self.call(self.arguments.elicit)
        if self.arguments.progress:
            result["progress"] = await self.call(self.arguments.progress)
        if self.arguments.expire_and_call:
            result["refreshed"] = await self.refresh_and_call()
        return {**result, **self.standing()}

    async def call(self, name, arguments=None):
        """One tools/call: its result, the questions it asked and the progress it told of."""
        told = []

        async def on_progress(progress, total, message):
            told.append({"progress": progress, "total": total, "message": message})

        asked = len(self.questions)
        outcome = await self.client.call(name, arguments or {}, on_progress)
        return {
            "name": name,
            **outcome,
            "progress_count": len(told),
            "progress": told,
            "questions": self.questions[asked:],
        }

    def expire(self):
        """Let the SDK believe its access token has expired, so that its next request refreshes first."""
        self.provider.context.token_expiry_time = time.time() - 1

    async def refresh_and_call(self):
        """Expire the token, make the first calls again; what was stored before and after."""
        before = self.storage.summary()
        self.expire()
        calls = [await self.call(name) for name in self.arguments.calls] or [await self.client.list_tools()]
        return {"before": before, "after": self.storage.summary(), "calls": calls}

    async def command(self, line):
        """Carry out one line of --interactive-lines; its result."""
        verb, _, rest = line.strip().partition(" ")
        if verb == "call":
            name, _, arguments = rest.partition(" ")
            return {"call": await self.call(name, json.loads(arguments or "{}"))}
        if verb == "touch":
            return {
                "touched": await self.client.updated(rest, lambda: self.call("get_touched", {"uri": rest}))
            }
        if verb == "start":
            name, _, arguments = rest.partition(" ")
            await self.client.start(name, json.loads(arguments or "{}"))
            return {"started": name}
        if verb == "cancel":
            await self.client.cancel()
            return {"cancelled": True}
        if verb == "tools":
            return {"tool_names": await self.client.list_tools()}
        if verb == "refresh":
            self.expire()
            return {"tool_names": await self.client.list_tools()}
        if verb == "expire":
            self.expire()
            return {}
        if verb == "tokens":
            return {}
        raise ValueError("unknown command %r" % verb)

    async def answer_lines(self):
        """Read commands from stdin until "quit" or its end, one JSON line for each.

        An error is an answer too.
        """
        while True:
            line = await asyncio.to_thread(sys.stdin.readline)
            if line.strip() in ("", "quit"):
                return
            try:
                result = await self.command(line)
            except Exception as error:
                result = describe(error)
            say({**result, **self.standing()})

    def standing(self):
        """Where the login stands: tokens, authorize rounds and what they asked for."""
        return {
            "tokens": self.storage.summary(),
            "authorize_rounds": len(self.login.rounds),
            "authorize_queries": self.login.rounds,
        }


def describe(error):
    """An exception as a result; of a group, the first that is no group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    code = getattr(getattr(error, "error", None), "code", None)
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    return {
        "error": {"type": type(error).__name__, "message": str(error), "code": code, "http_status": status}
    }


def say(result):
    """Print one JSON line, at once."""
    print(json.dumps(result), flush=True)


def run_program(description, connect, argv=None):
    """Run a client program; gives the exit status.

    `connect(arguments, login, storage, converse)` builds the SDK's client and awaits `converse(client,
    provider, questions)` while it is connected. stdout has JSON lines only.
    """
    arguments = parse_arguments(description, argv)
    login, storage = Login(arguments), MemoryStorage()

    async def converse(client, provider, questions):
        conversation = Conversation(arguments, client, provider, storage, login, questions)
        result = await conversation.run()
        say(result)
        if arguments.interactive_lines:
            await conversation.answer_lines()

    try:
        asyncio.run(connect(arguments, login, storage, converse))
    except Exception as error:
        traceback.print_exc()
        say({**describe(error), "authorize_rounds": len(login.rounds), "tokens": storage.summary()})
        return 1
    finally:
        login.listener.close()
    return 0
