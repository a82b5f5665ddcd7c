#!/usr/bin/env python3
"""fjmcp-broker: lets people use their own Forgejo from MCP clients, as themselves.

It is three things at once: an OAuth 2.1 authorization server for MCP clients, an OAuth client of Forgejo (which says who the user
is), and a supervisor that gives each MCP session its own `forgejo-mcp --transport stdio` child holding only that user's token.

    MCP client --HTTPS--> Caddy/nginx --HTTP--> fjmcp_broker.py --stdio--> forgejo-mcp --> Forgejo

Four ideas carry the design:
  1. A session is a durable row; a child is a cache. Children stop and come back, the client never notices.
  2. One Forgejo credential per Forgejo user, because Forgejo keeps one refresh token per (user, application).
  3. Every era of MCP on one URL; what an era means is decided at the edge, per request.
  4. Nothing is lost and no one gets in: consent in the same browser, hashed tokens, sealed credentials, commit before answer.

Contents, in dependency order; a section names only what stands above it:
  Terms · Settings · Log · Seal · Store · Forgejo · Messages · HTTP values · Pages · Clients · Authorization · Child · Session ·
  Registry and reaper · Gate and /mcp · HTTP server · Broker · Commands
"""

import base64
import binascii
import collections
import contextlib
import ctypes
import difflib
import email.utils
import errno
import fcntl
import fnmatch
import functools
import getpass
import hashlib
import hmac
import html
import http
import http.client
import http.server
import io
import ipaddress
import itertools
import json
import os
import queue
import re
import secrets
import select
import shutil
import signal
import socket
import socketserver
import sqlite3
import ssl
import stat
import subprocess
import sys
import threading
import time
import tomllib
import unicodedata
import weakref
from dataclasses import dataclass, field, replace
from urllib.parse import parse_qsl, quote, unquote_plus, urlencode, urlsplit

__version__ = "0.1.0"


# ======================================================================================================================
# Terms
# Owns the words and numbers of the protocols, the three kinds of refusal, the clock and randomness.
# Must not know configuration, storage, or HTTP.
# ======================================================================================================================

READ, WRITE = "forgejo:read", "forgejo:write"
SCOPES = (READ, WRITE)

LEGACY_VERSIONS = ("2025-11-25", "2025-06-18", "2025-03-26", "2024-11-05")
FIRST_MODERN_VERSION = "2026-07-28"
BATCH_VERSION = "2025-03-26"  # the only revision with JSON-RPC batches
META_VERSION = "io.modelcontextprotocol/protocolVersion"

PARSE_ERROR, INVALID_REQUEST, METHOD_NOT_FOUND, INVALID_PARAMS, INTERNAL_ERROR = -32700, -32600, -32601, -32602, -32603
SERVER_ERROR, SESSION_NOT_FOUND, UNSUPPORTED_VERSION = -32000, -32001, -32022

REFRESH_GRACE = 120  # seconds in which a rotated refresh token still answers with the newest pair of its chain
CODE_ATTEMPTS = 3  # wrong verifiers after which an authorization code is burned
QUESTION_GRACE = 10  # seconds a child's question waits for a stream it can be put on
PLACE_WAIT = 20  # seconds a request waits for a place among `max_sessions`


class Refusal(Exception):
    """A request that is answered with an HTTP status and a sentence: `status`, `code` (a word for programs), `sentence`, headers."""

    def __init__(self, status, code, sentence, headers=()):
        super().__init__(f"{status} {code}: {sentence}")
        self.status, self.code, self.sentence, self.headers = status, code, sentence, tuple(headers)


class OAuthError(Refusal):
    """A refusal of an OAuth endpoint; `code` is the `error` of RFC 6749 5.2, RFC 7591 3.2.2 or RFC 8707 2."""

    def __init__(self, code, sentence, status=400, headers=()):
        super().__init__(status, code, sentence, headers)


class RpcError(Exception):
    """A JSON-RPC error on its way to a client: `code`, `message`, `data` (dict or None), and the HTTP `status` it travels with."""

    def __init__(self, code, message, data=None, status=200, headers=()):
        super().__init__(message)
        self.code, self.message, self.data, self.status, self.headers = code, message, data, status, tuple(headers)


class Clock:
    """Wall time in seconds. Tests inject another; waits on sockets and locks use real time and never ask it."""

    def now(self):
        return time.time()


def new_secret(prefix=""):
    """A 256-bit random token, URL-safe, with a typed prefix (`fja_` access, `fjr_` refresh, `fjc_` code)."""
    return prefix + secrets.token_urlsafe(32)


def digest(secret):
    """What the store keeps of a token: its SHA-256. No stretching: the input has 256 bits of entropy."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def b64url(data):
    """Base64url without padding (RFC 7636 appendix A)."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def unb64url(text):
    """The inverse of b64url; ValueError for anything that is not base64url."""
    if not re.fullmatch(r"[A-Za-z0-9_-]*", text):
        raise ValueError("not base64url")
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def is_loopback_name(host):
    """Whether a host as spelled in a URL can only mean this machine (RFC 8252 8.3)."""
    return host in ("localhost", "127.0.0.1", "::1", "[::1]")


# ======================================================================================================================
# Settings
# Owns the one table from which the TOML keys, flags, environment variables, `--help` and the documentation come.
# Must not know what the settings are used for; it reads files, and opens nothing else.
# ======================================================================================================================

REQUIRED = object()
ENVIRONMENT_PREFIX = "FJMCP_BROKER_"
FORGEJO_SCOPE = re.compile(
    r"openid|profile|email|groups|all|public-only"
    r"|(read|write):(activitypub|admin|misc|notification|organization|package|issue|repository|user)"
)


@dataclass(frozen=True)
class Setting:
    """One setting: its `name`, `kind` (a key of KINDS), `default` as it would be written, and `help`.

    `reload`: SIGHUP takes a new value over. `secret`: may stand in `secrets_file` and is never shown.
    """

    name: str
    kind: str
    default: object
    help: str
    reload: bool = False
    secret: bool = False


SETTINGS = (
    Setting("public_url", "origin", REQUIRED, "origin that clients see, no path; https, or http on loopback"),
    Setting("listen", "address", "127.0.0.1:8080", "address to listen on, HOST:PORT"),
    Setting("forgejo_url", "base_url", REQUIRED, "Forgejo as users and forgejo-mcp see it; https, or http on loopback"),
    Setting("forgejo_internal_url", "any_url", "", "Forgejo as this server reaches it, where that differs"),
    Setting("forgejo_authorize_url", "any_url", "", "override of <forgejo_url>/login/oauth/authorize"),
    Setting("forgejo_token_url", "any_url", "", "override of <forgejo_url>/login/oauth/access_token"),
    Setting("forgejo_userinfo_url", "any_url", "", "override of <forgejo_url>/login/oauth/userinfo"),
    Setting("forgejo_introspection_url", "any_url", "", "override of <forgejo_url>/login/oauth/introspect"),
    Setting("forgejo_ca_file", "path", "", "certificate authority to trust for Forgejo, PEM"),
    Setting("forgejo_oauth_client_id", "text", REQUIRED, "client id of the OAuth2 application in Forgejo"),
    Setting("forgejo_oauth_client_secret", "text", REQUIRED, "client secret of the OAuth2 application in Forgejo", secret=True),
    Setting("forgejo_oauth_scopes", "forgejo_scopes",
            "openid profile read:user read:misc write:repository write:issue write:notification write:organization",
            "what is asked of Forgejo; frozen by Forgejo at each user's first login"),
    Setting("forgejo_mcp_binary", "command", "forgejo-mcp",
            "path, run with `--transport stdio --url <forgejo_url>`; or a list, run as it is"),
    Setting("store_path", "path", "broker.db", "SQLite database"),
    Setting("key_file", "path", "", "sealing keys, one base64 key a line, newest first; empty: beside the store"),
    Setting("key", "text", "", "sealing keys themselves, instead of key_file", secret=True),
    Setting("secrets_file", "path", "", "TOML file with any of the secret settings; /dev/stdin is read once"),
    Setting("max_sessions", "count", 50, "children awake at once", reload=True),
    Setting("max_sessions_per_user", "count", 10, "children awake at once of one user", reload=True),
    Setting("max_session_rows_per_user", "count", 1000, "sessions kept of one user; above it the longest unused goes", reload=True),
    Setting("session_idle_timeout", "duration", "15m", "a child idle this long is stopped; its session stays", reload=True),
    Setting("session_lifetime", "duration", "90d", "a session unused this long ends", reload=True),
    Setting("access_token_lifetime", "duration", "1h", "life of an access token", reload=True),
    Setting("refresh_token_lifetime", "duration", "90d", "life of a refresh token, renewed at each use", reload=True),
    Setting("request_timeout", "duration", "300s", "a request without an answer gets an error", reload=True),
    Setting("input_timeout", "duration", "600s", "how long a client may take to answer a question of the child", reload=True),
    Setting("allowed_users", "list", "", "Forgejo logins that may use the broker; empty: everyone", reload=True),
    Setting("allowed_groups", "list", "", "`org` or `org:team` that may use the broker; empty: everyone", reload=True),
    Setting("allowed_origins", "list", "https://claude.ai,https://claude.com,https://chatgpt.com",
            "web origins that may call /mcp, besides our own and loopback ones", reload=True),
    Setting("allowed_redirect_schemes", "list", "cursor,vscode,vscode-insiders,jetbrains",
            "private-use schemes that a redirect URI may have", reload=True),
    Setting("read_only_tools", "list", "get_*,list_*,search_*,check_*,download_*", "names of tools that only read", reload=True),
    Setting("trusted_proxies", "networks", "127.0.0.0/8,::1/128", "peers whose X-Forwarded-For is believed", reload=True),
    Setting("max_connections", "count", 4096, "open HTTP connections", reload=True),
    Setting("max_connections_per_address", "count", 256, "open HTTP connections of one address", reload=True),
    Setting("max_body", "size", "4MiB", "body of a request to /mcp", reload=True),
    Setting("max_form", "size", "64KiB", "body of any other request", reload=True),
    Setting("max_line", "size", "16MiB", "line of a child's output", reload=True),
    Setting("max_inflight", "count", 32, "requests of one session at once", reload=True),
    Setting("stream_events", "count", 256, "events that a stream keeps for a client to resume", reload=True),
    Setting("stream_bytes", "size", "1MiB", "bytes that a stream keeps for a client to resume", reload=True),
    Setting("header_timeout", "duration", "10s", "time for a request's header", reload=True),
    Setting("body_timeout", "duration", "30s", "time for a request's body", reload=True),
    Setting("write_timeout", "duration", "30s", "time in which a client must take what is sent to it", reload=True),
    Setting("idle_timeout", "duration", "150s", "time an unused connection is kept", reload=True),
    Setting("start_timeout", "duration", "20s", "time for a child to start and to answer `initialize`", reload=True),
    Setting("stop_timeout", "duration", "5s", "time for a child to end after SIGTERM", reload=True),
    Setting("code_lifetime", "duration", "60s", "life of an authorization code", reload=True),
    Setting("login_lifetime", "duration", "10m", "life of a login, from the consent page to the callback", reload=True),
    Setting("rate_register", "rate", 120, "registrations a minute from one address", reload=True),
    Setting("rate_authorize", "rate", 240, "requests a minute from one address to authorize, consent and callback", reload=True),
    Setting("rate_token", "rate", 600, "requests a minute from one address to token and revoke", reload=True),
    Setting("child_keeps_state", "switch", False, "the child keeps state between calls: never put it to sleep or replace it"),
    Setting("client_documents", "switch", True, "accept a client_id that is the https URL of the client's own description, and fetch it", reload=True),
    Setting("strict_scopes", "switch", False, "refuse a login to which Forgejo granted other scopes than asked", reload=True),
    Setting("metrics_listen", "any_address", "", "address for GET /metrics; empty: none"),
    Setting("log_format", "log_format", "json", "`json`, or `text` for people"),
    Setting("debug", "switch", False, "log what children write to stderr, and each request", reload=True),
    Setting("clients", "clients", (), "[[clients]]: client_id, name, redirect_uris, client_secret (file only)"),
)
SETTING = {setting.name: setting for setting in SETTINGS}


def _text(value):
    if not isinstance(value, str):
        raise ValueError("must be text")
    if any(ord(character) < 32 or ord(character) == 127 for character in value.replace("\n", "").replace("\t", "")):
        raise ValueError("must not contain control characters")
    return value.strip()


def _url(value):
    text = _text(value).rstrip("/")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise ValueError("is not a URL") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be a URL that starts with https:// (or http:// on loopback)")
    if "@" in parts.netloc or parts.query or parts.fragment or not re.fullmatch(r"[\x21-\x7e]+", text):
        raise ValueError("must be a plain URL: no user name, query or fragment")
    host = parts.hostname.lower()
    host = f"[{host}]" if ":" in host else host
    if port and port != {"http": 80, "https": 443}[parts.scheme]:
        host += f":{port}"
    return f"{parts.scheme}://{host}{parts.path}"


def _base_url(value):
    url = _url(value)
    if url.startswith("http:") and not is_loopback_name(urlsplit(url).hostname):
        raise ValueError("must be https; http is for loopback only")
    return url


def _origin(value):
    url = _base_url(value)
    if urlsplit(url).path:
        raise ValueError("must be an origin without a path, such as https://mcp.example.org")
    return url


def _address(value):
    host, _, port = _text(value).rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError("must be HOST:PORT, such as 127.0.0.1:8080")
    return host.strip("[]"), int(port)


def _integer(value, unit=""):
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,12}", value.strip()):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"must be a whole number of at least 1{unit}")
    return value


def _rate(value):
    if _integer(value) < 60:
        raise ValueError("must be at least 60 a minute: many users of one client share addresses")
    return _integer(value)


def _scaled(value, units, example):
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    text = _text(value).lower().replace(" ", "")
    parts = re.findall(r"([0-9]+(?:\.[0-9]+)?)([a-z]*)", text)
    if not parts or "".join(number + unit for number, unit in parts) != text or any(unit not in units for _, unit in parts):
        raise ValueError(f"must be such as {example}")
    total = sum(float(number) * units[unit] for number, unit in parts)
    if not 0 < total < 2**53:
        raise ValueError(f"must be more than nothing, such as {example}")
    return int(total) if total == int(total) else total


def _duration(value):
    return _scaled(value, {"": 1, "ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}, "30s, 15m, 1h or 90d")


def _size(value):
    units = {"": 1, "b": 1, "k": 1024, "kb": 1024, "kib": 1024, "m": 1 << 20, "mb": 1 << 20, "mib": 1 << 20}
    return int(_scaled(value, units, "64KiB or 4MiB"))


def _switch(value):
    if isinstance(value, bool):
        return value
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if not isinstance(value, str) or value.strip().lower() not in words:
        raise ValueError("must be true or false")
    return words[value.strip().lower()]


def _list(value):
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)):
        raise ValueError("must be a list of text")
    return tuple(item for item in map(_text, items) if item)


def _networks(value):
    try:
        return tuple(ipaddress.ip_network(item, strict=False) for item in _list(value))
    except ValueError as error:
        raise ValueError(f"must be a list of addresses or networks: {error}") from None


def _command(value):
    if isinstance(value, str) and "," not in value:
        if not _text(value):
            raise ValueError("must name a program")
        return _text(value)
    if not _list(value):
        raise ValueError("must name a program")
    return _list(value)


def _log_format(value):
    if value not in ("json", "text"):
        raise ValueError("must be json or text")
    return value


def _forgejo_scopes(value):
    names = _text(value).split()
    wrong = [name for name in names if not FORGEJO_SCOPE.fullmatch(name)]
    if wrong:
        raise ValueError(f"contains no scope of Forgejo: {', '.join(wrong)}. Names are separated by spaces, such as `read:user`")
    # Without one valid API scope Forgejo grants everything, the administration API included.
    if not any(":" in name or name == "all" for name in names):
        raise ValueError("names no API scope (such as read:user): Forgejo would then grant everything")
    return " ".join(names)


def _clients(value):
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, dict) for item in value):
        raise ValueError("must be written as [[clients]] tables")
    known, seen = {"client_id", "name", "redirect_uris", "client_secret"}, set()
    for item in value:
        for key in set(item) - known:
            raise ValueError(f"has the unknown key {key!r}; known are {', '.join(sorted(known))}")
        if not isinstance(item.get("client_id"), str) or not re.fullmatch(r"[\x21-\x7e]{1,200}", item["client_id"]):
            raise ValueError("needs a client_id of visible characters in each table")
        if item["client_id"] in seen:
            raise ValueError(f"has the client_id {item['client_id']!r} twice")
        seen.add(item["client_id"])
        if not _list(item.get("redirect_uris") or ()):
            raise ValueError(f"needs redirect_uris for {item['client_id']!r}")
    return tuple({**item, "redirect_uris": _list(item["redirect_uris"])} for item in value)


def _optional(parse):
    return lambda value: parse(value) if value else ""


KINDS = {
    "text": _text, "path": _text, "origin": _origin, "base_url": _base_url, "any_url": _optional(_url), "address": _address,
    "any_address": _optional(_address),
    "count": _integer, "rate": _rate, "size": _size, "duration": _duration, "switch": _switch, "list": _list,
    "networks": _networks, "command": _command, "log_format": _log_format, "forgejo_scopes": _forgejo_scopes, "clients": _clients,
}


class Settings:
    """The settings in force, one attribute each as its kind's value; `sources` says where each came from."""

    def __init__(self, values, sources):
        self.__dict__.update(values)
        self.sources = sources

    def reload(self, newer):
        """Take over what may change while running; return the names of settings that changed but may not."""
        refused = []
        for setting in SETTINGS:
            if getattr(newer, setting.name) != getattr(self, setting.name):
                if setting.reload:
                    setattr(self, setting.name, getattr(newer, setting.name))
                else:
                    refused.append(setting.name)
        return refused

    @property
    def resource(self):
        """The canonical resource identifier of the MCP endpoint (RFC 8707)."""
        return self.public_url + "/mcp"


class ConfigurationError(Exception):
    """Everything that is wrong with a configuration, a sentence each, in `problems`."""

    def __init__(self, problems):
        super().__init__("\n".join(problems))
        self.problems = problems


def has_file_form(setting):
    """Whether `<name>_file` may stand for the setting: for every setting that is one piece of text."""
    return setting.kind in ("text", "forgejo_scopes") and setting.name + "_file" not in SETTING


def _suggest(name, problem, problems):
    near = difflib.get_close_matches(name, [*SETTING, *(s.name + "_file" for s in SETTINGS if has_file_form(s))], 1, 0.6)
    problems.append(f"{problem}" + (f"; did you mean {near[0]!r}?" if near else ""))


def _lookup(name):
    """The setting that a key names and whether it names its file form; (None, False) for an unknown key."""
    if name in SETTING:
        return SETTING[name], False
    base = SETTING.get(name.removesuffix("_file")) if name.endswith("_file") else None
    return (base, True) if base and has_file_form(base) else (None, False)


@functools.cache
def _standard_input():
    """All of standard input, read once and then closed to everybody: children must find nothing there."""
    data = sys.stdin.buffer.read()
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    return data


def _read_toml(path, problems):
    try:
        if path == "/dev/stdin":
            return tomllib.loads(_standard_input().decode())
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        problems.append(f"cannot read {path}: {error.strerror}")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        problems.append(f"{path} is not TOML: {error}")
    return {}


def load_settings(flags, environ, config_path=None):
    """Settings from flags (name -> text), the environment and a TOML file, in that order of precedence, else defaults.

    Raises ConfigurationError with every problem at once, each naming its key and where the value came from.
    """
    problems, raw = [], {}

    def offer(table, source, only=None):
        for name, value in table.items():
            setting, in_file = _lookup(name)
            if setting is None or (only and not only(setting)):
                _suggest(name, f"{source}: unknown setting {name!r}" if setting is None
                         else f"{source}: {name!r} is not a secret setting and does not belong here", problems)
            elif setting.kind == "clients" and not source.startswith("file"):
                problems.append(f"{source}: {name!r} can be given in the configuration file only")
            elif in_file:
                try:
                    with open(value, encoding="utf-8") as file:
                        raw[setting.name] = (file.read().strip(), f"{source}, {value}")
                except (OSError, TypeError, UnicodeDecodeError) as error:
                    problems.append(f"{source}: {name}: cannot read {value!r}: {getattr(error, 'strerror', None) or error}")
            else:
                raw[setting.name] = (value, source)

    if config_path:
        offer(_read_toml(config_path, problems), f"file {config_path}")
    variables = {key[len(ENVIRONMENT_PREFIX):].lower(): value for key, value in environ.items()
                 if key.startswith(ENVIRONMENT_PREFIX) and key != ENVIRONMENT_PREFIX + "CONFIG"}
    for table, source in ((variables, "environment"), (flags, "flag")):
        if "secrets_file" in table:
            raw["secrets_file"] = (table["secrets_file"], source)
    if raw.get("secrets_file", ("",))[0]:
        path = raw["secrets_file"][0]
        offer(_read_toml(path, problems), f"file {path}", only=lambda setting: setting.secret)
    offer(variables, "environment")
    offer(flags, "flag")

    values, sources, unreadable = {}, {}, list(problems) if config_path and not raw else []
    for setting in SETTINGS:
        value, source = raw.get(setting.name, (setting.default, "default"))
        if value is REQUIRED or (value == "" and setting.default is REQUIRED):
            if not unreadable:  # a file that cannot be read is one problem, not one a setting
                problems.append(f"{setting.name} is missing: {setting.help}. Set it in the file, as --{setting.name.replace('_', '-')}"
                                f" or as {ENVIRONMENT_PREFIX}{setting.name.upper()}")
            continue
        try:
            values[setting.name] = KINDS[setting.kind](value)
        except (ValueError, TypeError) as error:
            shown = "" if setting.secret else f" = {value!r}"
            problems.append(f"{source}: {setting.name}{shown}: {error}")
        sources[setting.name] = source
    if values.get("public_url", "").startswith("http:") and values.get("listen") and not is_loopback_name(values["listen"][0]):
        problems.append(f"{sources['listen']}: listen: with an http public_url it must be on loopback: tokens would travel in the clear")
    if problems:
        raise ConfigurationError(problems)
    return Settings(values, sources)


# ======================================================================================================================
# Log
# Owns what leaves the program for operators: one line per event on stderr, and the counters of /metrics.
# Must not be handed a token, code, secret, cookie or tool argument; it escapes what it is given and judges nothing.
# ======================================================================================================================

class Log:
    """Writes events as JSON objects (or text for people), one a line. Safe from any thread."""

    def __init__(self, settings, stream=None, clock=None):
        self._settings, self._stream, self._clock = settings, stream or sys.stderr, clock or Clock()
        self._lock = threading.Lock()  # guards the stream; a leaf: nothing is taken while it is held
        self._request = threading.local()
        self.counters = collections.Counter()

    @contextlib.contextmanager
    def request(self, request_id):
        """Everything this thread logs within carries the request's id."""
        self._request.id = request_id
        try:
            yield
        finally:
            self._request.id = None

    def event(self, level, event, **fields):
        """Log one event: `level` is debug, info, warning or error; fields are plain values."""
        if level == "debug" and not self._settings.debug:
            return
        record = {"time": round(self._clock.now(), 3), "level": level, "event": event}
        if getattr(self._request, "id", None):
            record["request"] = self._request.id
        record.update((key, value) for key, value in fields.items() if value is not None)
        if self._settings.log_format == "text":
            moment = time.strftime("%H:%M:%S", time.localtime(record.pop("time")))
            rest = " ".join(f"{key}={json.dumps(value)}" for key, value in record.items() if key not in ("level", "event"))
            line = f"{moment} {level:7} {event} {rest}\n"
        else:
            line = json.dumps(record) + "\n"
        with self._lock, contextlib.suppress(OSError, ValueError):
            self._stream.write(line)
            self._stream.flush()

    def audit(self, event, **fields):
        """Log a fact that someone may later have to prove: who did what through which client."""
        self.counters[event] += 1
        self.event("info", event, audit=True, **fields)


# ======================================================================================================================
# Seal
# Owns the sealing keys and the one construction by which a secret may lie in the database (encrypt-then-MAC, HMAC-SHA256).
# Must not know what it seals, nor where that is stored.
# ======================================================================================================================

MAGIC = b"FJ1"


def hkdf(key, salt, info, length=64):
    """HKDF-SHA256 (RFC 5869)."""
    pseudo_random_key = hmac.digest(salt, key, "sha256")
    blocks, block = b"", b""
    for counter in range(1, -(-length // 32) + 1):
        block = hmac.digest(pseudo_random_key, block + info + bytes([counter]), "sha256")
        blocks += block
    return blocks[:length]


def _xor_stream(key, data):
    stream = b"".join(hmac.digest(key, counter.to_bytes(8, "big"), "sha256") for counter in range(-(-len(data) // 32)))
    return (int.from_bytes(data, "big") ^ int.from_bytes(stream[:len(data)], "big")).to_bytes(len(data), "big")


def _key_id(key):
    return hmac.digest(key, b"fjmcp/v1/kid", "sha256")[:4]


def _tag(mac_key, *parts):
    framed = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    return hmac.digest(mac_key, framed, "sha256")


def seal_with(key, purpose, owner, plain, salt=None):
    """A box holding `plain` (bytes, at most 64 KiB) that opens only with the same key, purpose and owner (text)."""
    if len(plain) > 65536:
        raise ValueError("too long to seal")
    # A fresh salt gives each box keys of its own, so the counter may start at 0 every time.
    salt = salt or os.urandom(32)
    keys = hkdf(key, salt, b"fjmcp/v1/box/" + purpose.encode())
    header = MAGIC + _key_id(key) + salt
    sealed = _xor_stream(keys[:32], plain)
    return header + sealed + _tag(keys[32:], header, purpose.encode(), owner.encode(), sealed)


def unseal_with(key, purpose, owner, box):
    """The inverse of seal_with; ValueError for every kind of failure, before anything is decrypted."""
    header, sealed, tag = box[:39], box[39:-32], box[-32:]
    if len(box) < 71 or header[:7] != MAGIC + _key_id(key):
        raise ValueError("not a box of this key")
    keys = hkdf(key, header[7:], b"fjmcp/v1/box/" + purpose.encode())
    if not hmac.compare_digest(tag, _tag(keys[32:], header, purpose.encode(), owner.encode(), sealed)):
        raise ValueError("box does not open")
    return _xor_stream(keys[:32], sealed)


class Keyring:
    """The sealing keys, newest first: the first seals, every one opens what names it."""

    def __init__(self, keys, reload=None):
        self.keys, self._reload = tuple(keys), reload

    @classmethod
    def parse(cls, text, reload=None):
        """A keyring from lines (or comma-separated) of base64 keys of 32 bytes; ValueError says what is wrong."""
        keys = []
        for line in filter(None, map(str.strip, re.split(r"[\n,]", text))):
            try:
                keys.append(base64.b64decode(line, validate=True))
            except binascii.Error:
                raise ValueError("a sealing key is not base64") from None
            if len(keys[-1]) != 32:
                raise ValueError("a sealing key must be 32 bytes, written as base64 (44 characters)")
        if not keys:
            raise ValueError("there is no sealing key")
        return cls(keys, reload)

    def text(self):
        """What parse() reads."""
        return "".join(base64.b64encode(key).decode() + "\n" for key in self.keys)

    def is_newest(self, box):
        """Whether a box was sealed with the newest key."""
        return bytes(box[3:7]) == _key_id(self.keys[0])

    def seal(self, purpose, owner, value):
        """A box holding a JSON value, padded so that its length says little."""
        plain = json.dumps(value, separators=(",", ":")).encode()
        return seal_with(self.keys[0], purpose, owner, plain + b" " * (-len(plain) % 256))

    def unseal(self, purpose, owner, box):
        """The JSON value of a box; ValueError when no key opens it for this purpose and owner."""
        for known in (True, False):
            for key in self.keys:
                if bytes(box[3:7]) == _key_id(key):
                    return json.loads(unseal_with(key, purpose, owner, bytes(box)))
            if known and self._reload:  # rotate-key may have put a new one into the file since
                self.keys = self._reload().keys
        raise ValueError("box of an unknown key")

    def chained(self, token):
        """For each key, the keyring that only the holder of `token` can use: for a rotated token's successor."""
        return Keyring(hkdf(token.encode(), key, b"fjmcp/v1/grace", 32) for key in self.keys)


def load_keyring(settings):
    """The keyring from `key`, `key_file` or the file beside the store, which is made when neither it nor the store exists.

    A key is never made for an existing store: it could open nothing in it. Raises ConfigurationError.
    """
    path = settings.key_file or settings.store_path + ".key"
    try:
        if settings.key:
            return Keyring.parse(settings.key)
        if not os.path.exists(path):
            if os.path.exists(settings.store_path):
                raise ConfigurationError([f"key_file: {path} is missing, and {settings.store_path} was sealed with it. Put the key back"])
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(base64.b64encode(os.urandom(32)).decode() + "\n")
                file.flush()
                os.fsync(file.fileno())
        with open(path, encoding="ascii") as file:
            return Keyring.parse(file.read(), lambda: load_keyring(settings))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError([f"key_file: cannot use {path}: {getattr(error, 'strerror', None) or error}"]) from None
    except ValueError as error:
        raise ConfigurationError([f"{'key' if settings.key else 'key_file: ' + path}: {error}"]) from None


# ======================================================================================================================
# Store
# Owns all SQL: what survives a crash. One method is one atomic batch that takes and returns plain values (docs/storage.md).
# Must not know what a box holds, nor decide anything outside of a statement.
# ======================================================================================================================

SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE clients (
  client_id TEXT PRIMARY KEY, kind TEXT NOT NULL, name TEXT NOT NULL, redirect_uris TEXT NOT NULL, secret_hash BLOB,
  auth_method TEXT NOT NULL, metadata TEXT NOT NULL, keys TEXT, fetched_at REAL, fresh_until REAL,
  created_at REAL NOT NULL, used_at REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX clients_by_use ON clients (kind, used_at);
CREATE TABLE assertions (hash BLOB PRIMARY KEY, expires_at REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE users (
  sub TEXT PRIMARY KEY, login TEXT NOT NULL, name TEXT NOT NULL, groups TEXT NOT NULL, state TEXT NOT NULL,
  credential BLOB, credential_grant INTEGER NOT NULL DEFAULT 0, credential_count INTEGER NOT NULL DEFAULT 0,
  credential_seq INTEGER NOT NULL DEFAULT 0, access_expires_at REAL NOT NULL DEFAULT 0, obtained_at REAL NOT NULL DEFAULT 0,
  refreshing_since REAL, upstream_scope TEXT, checked_at REAL NOT NULL, created_at REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE logins (
  state_hash BLOB PRIMARY KEY, form_hash BLOB NOT NULL UNIQUE, browser_hash BLOB NOT NULL, kind TEXT NOT NULL,
  sealed BLOB, expires_at REAL NOT NULL, taken_at REAL
) WITHOUT ROWID;
CREATE INDEX logins_by_expiry ON logins (expires_at);
CREATE TABLE grants (
  grant_id INTEGER PRIMARY KEY AUTOINCREMENT, sub TEXT NOT NULL REFERENCES users, client_id TEXT NOT NULL, scope TEXT NOT NULL,
  asked TEXT NOT NULL, resource TEXT NOT NULL, created_at REAL NOT NULL, used_at REAL NOT NULL, expires_at REAL NOT NULL,
  ended_at REAL, end_reason TEXT
);
CREATE INDEX grants_by_owner ON grants (sub, client_id, ended_at);
CREATE INDEX grants_by_end ON grants (ended_at);
CREATE TABLE codes (
  hash BLOB PRIMARY KEY, grant_id INTEGER NOT NULL REFERENCES grants ON DELETE CASCADE, client_id TEXT NOT NULL,
  redirect_uri TEXT NOT NULL, challenge TEXT NOT NULL, attempts INTEGER NOT NULL DEFAULT 0, expires_at REAL NOT NULL, used_at REAL
) WITHOUT ROWID;
CREATE TABLE access_tokens (
  hash BLOB PRIMARY KEY, grant_id INTEGER NOT NULL REFERENCES grants ON DELETE CASCADE, scope TEXT NOT NULL,
  issued_at REAL NOT NULL, expires_at REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX access_tokens_by_grant ON access_tokens (grant_id);
CREATE INDEX access_tokens_by_expiry ON access_tokens (expires_at);
CREATE TABLE refresh_tokens (
  hash BLOB PRIMARY KEY, grant_id INTEGER NOT NULL REFERENCES grants ON DELETE CASCADE, issued_at REAL NOT NULL,
  expires_at REAL NOT NULL, rotated_at REAL, successor BLOB
) WITHOUT ROWID;
CREATE INDEX refresh_tokens_by_grant ON refresh_tokens (grant_id);
CREATE INDEX refresh_tokens_by_rotation ON refresh_tokens (rotated_at) WHERE successor IS NOT NULL;
CREATE TABLE sessions (
  hash BLOB PRIMARY KEY, sub TEXT NOT NULL, client_id TEXT NOT NULL, protocol_version TEXT NOT NULL, initialize TEXT NOT NULL,
  server TEXT NOT NULL, log_level TEXT, subscriptions TEXT NOT NULL DEFAULT '[]', tools_hash BLOB,
  created_at REAL NOT NULL, used_at REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX sessions_by_owner ON sessions (sub, client_id, used_at);
CREATE INDEX sessions_by_use ON sessions (used_at);
CREATE TABLE binaries (fingerprint TEXT PRIMARY KEY, era TEXT NOT NULL, asks INTEGER NOT NULL, seen_at REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE account_logins (
  browser_hash BLOB PRIMARY KEY, sub TEXT NOT NULL, expires_at REAL NOT NULL
) WITHOUT ROWID;
"""
MIGRATIONS = (SCHEMA,)  # MIGRATIONS[n] takes a store from version n to n + 1

LIVE_GRANT = "ended_at IS NULL AND expires_at > :now"
LISTINGS = {
    "users": "SELECT sub, login, name, state, upstream_scope, checked_at, (SELECT count(*) FROM grants WHERE grants.sub = users.sub"
             f" AND {LIVE_GRANT}) AS grants, (SELECT count(*) FROM sessions WHERE sessions.sub = users.sub) AS sessions FROM users ORDER BY login",
    "clients": "SELECT client_id, kind, name, auth_method, created_at, used_at, (SELECT count(*) FROM grants WHERE grants.client_id ="
               f" clients.client_id AND {LIVE_GRANT}) AS grants FROM clients WHERE kind != 'unreadable' ORDER BY created_at",
    "grants": "SELECT grant_id, login, client_id, scope, created_at, used_at, expires_at FROM (SELECT * FROM grants WHERE"
              f" {LIVE_GRANT}) JOIN (SELECT sub, login FROM users) USING (sub) ORDER BY grant_id",
    "sessions": "SELECT substr(lower(hex(hash)), 1, 12) AS session, login, client_id, protocol_version, sessions.created_at, used_at"
                " FROM sessions JOIN users USING (sub) ORDER BY used_at DESC",
}


class StoreUnavailable(Refusal):
    """The database cannot be written or read just now (full, locked, broken); nothing was changed."""

    def __init__(self, reason):
        super().__init__(503, "temporarily_unavailable", "The server cannot save anything just now; try again in a moment.",
                         (("Retry-After", "5"),))
        self.reason = reason


@functools.cache
def _row_class(names):
    return collections.namedtuple("Row", names, rename=True)


def _row_factory(cursor, values):
    return _row_class(tuple(column[0] for column in cursor.description))._make(values)


class Store:
    """The SQLite database: one writer and one reader connection, WAL, every commit on disk before the call returns."""

    def __init__(self, path, keyring, alone=True):
        """Open, make or migrate the store; `alone` keeps a second broker out, operators' commands come beside one."""
        self.path, self._lock_file = path, None
        self._write_lock, self._read_lock = threading.Lock(), threading.Lock()  # guard a connection each; leaves
        if alone:
            self._claim(path)
        self._writer = self._reader = None
        try:
            self._writer, self._reader = self._connect(path), self._connect(path)
            self._migrate()
            self._check_key(keyring)
        except (sqlite3.Error, StoreUnavailable) as error:
            self.close()
            reason = getattr(error, "reason", error)
            raise ConfigurationError([f"store_path: {path} cannot be used: {reason}. Restore a backup; it is never made anew"]) from None
        except ConfigurationError:
            self.close()
            raise

    def _claim(self, path):
        """Take the store for this process; files are made 0600 before SQLite could make them otherwise."""
        try:
            self._lock_file = os.open(path + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
            for name in (path, path + "-wal", path + "-shm"):
                if os.path.exists(name):
                    os.chmod(name, 0o600)
        except BlockingIOError:
            raise ConfigurationError([f"store_path: another broker is using {path}"]) from None
        except OSError as error:
            raise ConfigurationError([f"store_path: cannot use {path}: {error.strerror}"]) from None

    @staticmethod
    def _connect(path):
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5, cached_statements=256)
        connection.row_factory = _row_factory
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "secure_delete=ON", "foreign_keys=ON", "trusted_schema=OFF"):
            connection.execute(f"PRAGMA {pragma}")
        return connection

    def _migrate(self):
        version = self._writer.execute("PRAGMA user_version").fetchone()[0]
        if version > len(MIGRATIONS):
            raise ConfigurationError([f"store_path: {self.path} was written by a newer version of this program (schema {version})"])
        for number, script in enumerate(MIGRATIONS[version:], version + 1):
            with self._batch() as db:
                for statement in filter(str.strip, script.split(";\n")):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {number}")

    def _check_key(self, keyring):
        """Refuse a wrong key at the start rather than at each user's next call."""
        probe = self._one("SELECT value FROM meta WHERE name = 'key_probe'")
        if probe is None:
            with self._batch() as db:
                db.execute("INSERT OR IGNORE INTO meta VALUES ('key_probe', ?)", (keyring.seal("probe", "store", "ok"),))
            return
        try:
            keyring.unseal("probe", "store", probe.value)
        except ValueError:
            raise ConfigurationError([f"key_file: the key does not belong to {self.path}"]) from None

    @contextlib.contextmanager
    def _batch(self):
        """One transaction: everything within is committed to disk together, or nothing is."""
        with self._write_lock:
            try:
                self._writer.execute("BEGIN IMMEDIATE")
                try:
                    yield self._writer
                    self._writer.execute("COMMIT")
                except BaseException:
                    with contextlib.suppress(sqlite3.Error):
                        self._writer.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                raise StoreUnavailable(str(error)) from error

    def _all(self, sql, *parameters):
        with self._read_lock:
            try:
                return self._reader.execute(sql, *parameters).fetchall()
            except sqlite3.Error as error:
                raise StoreUnavailable(str(error)) from error

    def _one(self, sql, *parameters):
        return next(iter(self._all(sql, *parameters)), None)

    def healthy(self):
        """Whether the store answers."""
        try:
            return self._one("SELECT 1 FROM meta") is not None
        except StoreUnavailable:
            return False

    def close(self):
        """Checkpoint and close; the lock goes with the process or here."""
        with self._write_lock, self._read_lock:
            for connection in filter(None, (self._reader, self._writer)):
                with contextlib.suppress(sqlite3.Error):
                    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                connection.close()
            if self._lock_file is not None:
                os.close(self._lock_file)

    # -- clients

    def add_client(self, client_id, kind, name, redirect_uris, secret_hash, auth_method, metadata, now):
        """Keep a client; one with the same id (a pre-registered one at the next start) is replaced."""
        with self._batch() as db:
            db.execute(
                "INSERT INTO clients (client_id, kind, name, redirect_uris, secret_hash, auth_method, metadata, created_at, used_at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (client_id) DO UPDATE SET kind = excluded.kind, name = excluded.name,"
                " redirect_uris = excluded.redirect_uris, secret_hash = excluded.secret_hash, auth_method = excluded.auth_method",
                (client_id, kind, name, json.dumps(redirect_uris), secret_hash, auth_method, json.dumps(metadata), now, now))

    def client(self, client_id):
        """A client's row (redirect_uris, metadata and keys as values), or None; `in_use`: somebody has logged in through it."""
        row = self._one("SELECT *, used_at > created_at AS in_use FROM clients WHERE client_id = ?", (client_id,))
        return row and row._replace(redirect_uris=json.loads(row.redirect_uris), metadata=json.loads(row.metadata), keys=json.loads(row.keys or "{}"))

    def drop_configured_clients(self, still_configured):
        """Forget pre-registered clients that the configuration no longer names."""
        with self._batch() as db:
            db.execute("DELETE FROM clients WHERE kind = 'configured' AND client_id NOT IN (SELECT value FROM json_each(?))",
                       (json.dumps(list(still_configured)),))

    # -- client documents

    def keep_document(self, url, name, redirect_uris, auth_method, metadata, now, fresh_until, keep=1000):
        """Keep what a client_id's own document says, or (without a name) that it could not be used; an older good one stays on file.

        Bounded: above `keep` the longest unused go, but never one with a live grant.
        """
        with self._batch() as db:
            db.execute(
                "INSERT INTO clients (client_id, kind, name, redirect_uris, auth_method, metadata, fetched_at, fresh_until, created_at, used_at)"
                " VALUES (:url, iif(:name = '', 'unreadable', 'document'), :name, :uris, :method, :metadata, :now, :fresh, :now, :now)"
                " ON CONFLICT (client_id) DO UPDATE SET fetched_at = :now, fresh_until = :fresh",
                {"url": url, "name": name, "uris": json.dumps(redirect_uris), "method": auth_method, "metadata": json.dumps(metadata),
                 "now": now, "fresh": fresh_until})
            if name:
                db.execute("UPDATE clients SET kind = 'document', name = ?, redirect_uris = ?, auth_method = ?, metadata = ? WHERE client_id = ?",
                           (name, json.dumps(redirect_uris), auth_method, json.dumps(metadata), url))
            db.execute("DELETE FROM clients WHERE client_id IN (SELECT client_id FROM clients WHERE kind IN ('document', 'unreadable') AND NOT"
                       f" EXISTS (SELECT 1 FROM grants WHERE grants.client_id = clients.client_id AND {LIVE_GRANT})"
                       " ORDER BY used_at DESC LIMIT -1 OFFSET :keep)", {"now": now, "keep": keep})

    def keep_keys(self, url, keys):
        """Keep the public keys that a document's jwks_uri named."""
        with self._batch() as db:
            db.execute("UPDATE clients SET keys = ? WHERE client_id = ?", (json.dumps(keys), url))

    def spend_assertion(self, assertion_hash, expires_at):
        """Whether a client's assertion comes for the first time (RFC 7523 3, jti)."""
        with self._batch() as db:
            return db.execute("INSERT OR IGNORE INTO assertions VALUES (?, ?)", (assertion_hash, expires_at)).rowcount == 1

    # -- account

    def open_account(self, browser_hash, sub, expires_at):
        """A browser may see and end what its user has connected."""
        with self._batch() as db:
            db.execute("INSERT INTO account_logins VALUES (?, ?, ?)", (browser_hash, sub, expires_at))

    def account(self, browser_hash, now):
        """The user (sub, login) that a browser has logged in to the account page, or None."""
        return self._one("SELECT sub, login FROM account_logins JOIN users USING (sub) WHERE browser_hash = ? AND expires_at > ?"
                         " AND state = 'active'", (browser_hash, now))

    def close_account(self, browser_hash):
        """A browser's login to the account page ends."""
        with self._batch() as db:
            db.execute("DELETE FROM account_logins WHERE browser_hash = ?", (browser_hash,))

    def grants_of(self, sub, now):
        """A user's live grants with their client's name, newest first."""
        return self._all("SELECT grant_id, sub, client_id, name, scope, grants.created_at, grants.used_at FROM grants LEFT JOIN clients"
                         f" USING (client_id) WHERE sub = :sub AND {LIVE_GRANT} ORDER BY grants.used_at DESC", {"sub": sub, "now": now})

    def sessions_of(self, sub):
        """A user's sessions with their client's name, the last used first."""
        return self._all("SELECT hash, client_id, name, sessions.created_at, sessions.used_at FROM sessions LEFT JOIN clients USING (client_id)"
                         " WHERE sub = ? ORDER BY sessions.used_at DESC", (sub,))

    # -- logins

    def approve_login(self, state_hash, form_hash, browser_hash, kind, sealed, expires_at, taken_at=None):
        """Keep an approved (or, with taken_at, a refused) login; False when this form was answered before."""
        with self._batch() as db:
            return db.execute("INSERT OR IGNORE INTO logins VALUES (?, ?, ?, ?, ?, ?, ?)",
                              (state_hash, form_hash, browser_hash, kind, sealed, expires_at, taken_at)).rowcount == 1

    def take_login(self, state_hash, now):
        """The login of a state, once: (browser_hash, kind, sealed), or None when unknown, expired or taken."""
        with self._batch() as db:
            row = db.execute("SELECT browser_hash, kind, sealed FROM logins WHERE state_hash = ?", (state_hash,)).fetchone()
            taken = db.execute("UPDATE logins SET taken_at = ?, sealed = NULL WHERE state_hash = ? AND taken_at IS NULL"
                               " AND expires_at > ?", (now, state_hash, now)).rowcount
            return row if taken else None

    def finish_login(self, sub, client_id, scope, asked, resource, code_hash, redirect_uri, challenge, now, expires_at, code_expires_at):
        """Make the grant of an approved login and its authorization code; the grant's id."""
        with self._batch() as db:
            grant_id = db.execute(
                "INSERT INTO grants (sub, client_id, scope, asked, resource, created_at, used_at, expires_at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?) RETURNING grant_id",
                (sub, client_id, scope, asked, resource, now, now, expires_at)).fetchone()[0]
            db.execute("INSERT INTO codes (hash, grant_id, client_id, redirect_uri, challenge, expires_at) VALUES (?, ?, ?, ?, ?, ?)",
                       (code_hash, grant_id, client_id, redirect_uri, challenge, code_expires_at))
            db.execute("UPDATE clients SET used_at = ? WHERE client_id = ?", (now, client_id))
            return grant_id

    # -- tokens

    def code(self, code_hash):
        """An authorization code with its grant: everything the token endpoint compares; None when unknown."""
        return self._one("SELECT codes.*, grants.sub, grants.scope, grants.ended_at, users.state FROM codes JOIN grants USING (grant_id)"
                         " JOIN users USING (sub) WHERE hash = ?", (code_hash,))

    def redeem_code(self, code_hash, client_id, redirect_uri, challenge, now, access, refresh, attempts):
        """Turn a code into a token pair, once: the grant's id and scope, or None and nothing is changed but a counted attempt.

        `access`, `refresh`: (hash, expires_at). RFC 6749 4.1.3, RFC 7636 4.6.
        """
        with self._batch() as db:
            row = db.execute(
                "UPDATE codes SET used_at = :now WHERE hash = :hash AND client_id = :client AND redirect_uri = :uri AND challenge = :challenge"
                " AND used_at IS NULL AND expires_at > :now AND attempts < :attempts"
                f" AND EXISTS (SELECT 1 FROM grants WHERE grant_id = codes.grant_id AND {LIVE_GRANT}) RETURNING grant_id",
                {"now": now, "hash": code_hash, "client": client_id, "uri": redirect_uri, "challenge": challenge,
                 "attempts": attempts}).fetchone()
            if row is None:
                db.execute("UPDATE codes SET attempts = attempts + 1 WHERE hash = ? AND client_id = ? AND redirect_uri = ?"
                           " AND challenge != ?", (code_hash, client_id, redirect_uri, challenge))
                return None
            return self._issue(db, row.grant_id, None, now, access, refresh)

    @staticmethod
    def _issue(db, grant_id, scope, now, access, refresh):
        grant = db.execute("UPDATE grants SET used_at = ?, expires_at = ? WHERE grant_id = ? RETURNING grant_id, sub, client_id, scope",
                           (now, refresh[1], grant_id)).fetchone()
        db.execute("INSERT INTO access_tokens VALUES (?, ?, ?, ?, ?)", (access[0], grant_id, scope or grant.scope, now, access[1]))
        db.execute("INSERT INTO refresh_tokens (hash, grant_id, issued_at, expires_at) VALUES (?, ?, ?, ?)",
                   (refresh[0], grant_id, now, refresh[1]))
        return grant

    def refresh_token(self, token_hash):
        """A refresh token with its grant and the user's state; None when unknown."""
        return self._one("SELECT refresh_tokens.*, grants.sub, grants.client_id, grants.scope, grants.resource, grants.ended_at, users.state"
                         " FROM refresh_tokens JOIN grants USING (grant_id) JOIN users USING (sub) WHERE hash = ?", (token_hash,))

    def rotate(self, token_hash, scope, now, access, refresh, successor):
        """Replace a refresh token by a pair, once: the grant, or None when it was rotated, has expired or its grant has ended."""
        with self._batch() as db:
            row = db.execute(
                "UPDATE refresh_tokens SET rotated_at = :now, successor = :box WHERE hash = :hash AND rotated_at IS NULL"
                f" AND expires_at > :now AND EXISTS (SELECT 1 FROM grants WHERE grant_id = refresh_tokens.grant_id AND {LIVE_GRANT})"
                " RETURNING grant_id", {"now": now, "box": successor, "hash": token_hash}).fetchone()
            return row and self._issue(db, row.grant_id, scope, now, access, refresh)

    def bearer(self, token_hash, now):
        """Who an access token speaks for: one row of token, grant and user, or None when it is not good (any more)."""
        return self._one(
            "SELECT t.grant_id, t.scope, t.expires_at, g.sub, g.client_id, g.asked, g.scope AS grant_scope, g.resource, u.login, u.state"
            " FROM access_tokens t JOIN grants g USING (grant_id) JOIN users u USING (sub)"
            " WHERE t.hash = ? AND t.expires_at > ? AND g.ended_at IS NULL AND g.expires_at > ?", (token_hash, now, now))

    def access_token(self, token_hash):
        """An access token's (expires_at, client_id), or None: for the grace of a refresh, and for revocation."""
        return self._one("SELECT t.expires_at, g.client_id FROM access_tokens t JOIN grants g USING (grant_id) WHERE hash = ?", (token_hash,))

    def drop_access_token(self, token_hash):
        """Revoke one access token (RFC 7009)."""
        with self._batch() as db:
            db.execute("DELETE FROM access_tokens WHERE hash = ?", (token_hash,))

    def end_grant(self, grant_id, reason, now):
        """End a grant with all its tokens, and its owner's sessions if it was their last; None when it had ended before."""
        with self._batch() as db:
            row = db.execute("UPDATE grants SET ended_at = ?, end_reason = ? WHERE grant_id = ? AND ended_at IS NULL"
                             " RETURNING sub, client_id", (now, reason, grant_id)).fetchone()
            db.execute("DELETE FROM access_tokens WHERE grant_id = ?", (grant_id,))
            db.execute("UPDATE refresh_tokens SET successor = NULL WHERE grant_id = ?", (grant_id,))
            if row:
                db.execute("DELETE FROM sessions WHERE sub = :sub AND client_id = :client AND NOT EXISTS"
                           f" (SELECT 1 FROM grants WHERE sub = :sub AND client_id = :client AND {LIVE_GRANT})",
                           {"sub": row.sub, "client": row.client_id, "now": now})
            return row

    def live_grants(self, now):
        """The ids of all grants that live, and the (sub, client_id) pairs that have one."""
        rows = self._all(f"SELECT grant_id, sub, client_id FROM grants WHERE {LIVE_GRANT}", {"now": now})
        return {row.grant_id for row in rows}, {(row.sub, row.client_id) for row in rows}

    def change_marker(self):
        """A value that changes when anyone has committed: the reader's data_version sees our writer as it sees other processes."""
        return self._one("PRAGMA data_version")[0]

    # -- users and their credential at Forgejo

    def user(self, sub):
        """A user's row (groups as a list), or None."""
        row = self._one("SELECT * FROM users WHERE sub = ?", (sub,))
        return row and row._replace(groups=json.loads(row.groups))

    def update_user(self, sub, login, name, groups, now):
        """Make or refresh what userinfo says of a user; the state and the credential stay."""
        with self._batch() as db:
            db.execute("INSERT INTO users (sub, login, name, groups, state, checked_at, created_at) VALUES (?, ?, ?, ?, 'logged_out', ?, ?)"
                       " ON CONFLICT (sub) DO UPDATE SET login = excluded.login, name = excluded.name, groups = excluded.groups,"
                       " checked_at = excluded.checked_at", (sub, login, name, json.dumps(list(groups)), now, now))

    def set_upstream_scope(self, sub, scope):
        """What Forgejo really granted, as introspection tells; None when unknown."""
        with self._batch() as db:
            db.execute("UPDATE users SET upstream_scope = ? WHERE sub = ?", (scope, sub))

    def refresh_started(self, sub, now):
        """Note that the stored refresh token is about to be spent: after a crash its refusal is known to be ours."""
        with self._batch() as db:
            db.execute("UPDATE users SET refreshing_since = ? WHERE sub = ?", (now, sub))

    def save_credential(self, sub, box, grant, count, expires_at, obtained_at):
        """Replace a known user's credential, whatever their state; the new sequence number, None when a newer one is stored.

        Newer is what Forgejo counted later: its grant's number, then the grant's counter. Equal or unreadable: the last one saved.
        """
        with self._batch() as db:
            row = db.execute(
                "UPDATE users SET credential = :box, credential_grant = :grant, credential_count = :count, access_expires_at = :expires,"
                " obtained_at = :obtained, credential_seq = credential_seq + 1, refreshing_since = NULL"
                " WHERE sub = :sub AND (:grant = 0 OR credential_grant < :grant"
                " OR (credential_grant = :grant AND credential_count <= :count)) RETURNING credential_seq",
                {"box": box, "grant": grant, "count": count, "expires": expires_at, "obtained": obtained_at, "sub": sub}).fetchone()
            return row and row.credential_seq

    def set_user_state(self, sub, state, if_seq=None):
        """Set a user's state, if wanted only while a credential is still the stored one; whether it was set."""
        with self._batch() as db:
            return db.execute("UPDATE users SET state = ?, refreshing_since = NULL WHERE sub = ? AND (? IS NULL OR credential_seq = ?)"
                              " AND state != ?", (state, sub, if_seq, if_seq, state)).rowcount == 1

    def users_to_refresh(self, obtained_before, now):
        """The users with a live grant whose credential is older than that: Forgejo's refresh token dies after 730 h unused."""
        return [row.sub for row in self._all(
            "SELECT sub FROM users WHERE state = 'active' AND obtained_at < :before AND EXISTS"
            f" (SELECT 1 FROM grants WHERE grants.sub = users.sub AND {LIVE_GRANT})", {"before": obtained_before, "now": now})]

    # -- sessions

    def add_session(self, session_hash, sub, client_id, protocol_version, initialize, server, now, keep):
        """Keep a session; of this user's, the longest unused above `keep` go: their hashes."""
        with self._batch() as db:
            db.execute("INSERT INTO sessions (hash, sub, client_id, protocol_version, initialize, server, created_at, used_at)"
                       " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                       (session_hash, sub, client_id, protocol_version, json.dumps(initialize), json.dumps(server), now, now))
            return [row.hash for row in db.execute(
                "DELETE FROM sessions WHERE hash IN (SELECT hash FROM sessions WHERE sub = ? ORDER BY used_at DESC, created_at DESC"
                " LIMIT -1 OFFSET ?) RETURNING hash", (sub, keep)).fetchall()]

    def session(self, session_hash, sub, client_id):
        """A session's row if it is theirs, else None."""
        return self._one("SELECT * FROM sessions WHERE hash = ? AND sub = ? AND client_id = ?", (session_hash, sub, client_id))

    def update_session(self, session_hash, log_level, subscriptions, tools_hash):
        """What has to be replayed to a new child."""
        with self._batch() as db:
            db.execute("UPDATE sessions SET log_level = ?, subscriptions = ?, tools_hash = ? WHERE hash = ?",
                       (log_level, json.dumps(sorted(subscriptions)), tools_hash, session_hash))

    def touch_sessions(self, uses):
        """Write down when sessions were last used: {hash: time}."""
        with self._batch() as db:
            db.executemany("UPDATE sessions SET used_at = max(used_at, ?) WHERE hash = ?", [(at, name) for name, at in uses.items()])

    def end_session(self, session_hash):
        """Forget a session; whether it was there."""
        with self._batch() as db:
            return db.execute("DELETE FROM sessions WHERE hash = ?", (session_hash,)).rowcount == 1

    def end_orphaned_sessions(self, now):
        """Forget the sessions of every (user, client) without a live grant: their hashes."""
        with self._batch() as db:
            return [row.hash for row in db.execute(
                "DELETE FROM sessions WHERE NOT EXISTS (SELECT 1 FROM grants g WHERE g.sub = sessions.sub AND g.client_id ="
                " sessions.client_id AND g.ended_at IS NULL AND g.expires_at > ?) RETURNING hash", (now,)).fetchall()]

    def count_sessions(self):
        """How many sessions are on file."""
        return self._one("SELECT count(*) AS n FROM sessions").n

    # -- for operators

    def listing(self, kind, now):
        """(column names, rows) of users, clients, grants (live ones) or sessions."""
        with self._read_lock:
            cursor = self._reader.execute(LISTINGS[kind], {"now": now})
            return [column[0] for column in cursor.description], cursor.fetchall()

    def find_grants(self, kind, value, now):
        """The live grants of a user (by login), a client, of an id, or (kind `all`) of everybody."""
        column = {"user": "login = :value COLLATE NOCASE", "client": "client_id = :value", "grant": "grant_id = :value", "all": "1"}[kind]
        return self._all(f"SELECT grant_id, sub, client_id FROM grants JOIN users USING (sub) WHERE {column} AND {LIVE_GRANT}",
                         {"value": value, "now": now})

    def backup(self, path):
        """Write a consistent copy to a file."""
        with self._read_lock, contextlib.closing(sqlite3.connect(path)) as copy:
            self._reader.backup(copy)

    def credentials(self):
        """(sub, box) of every credential."""
        return [(row.sub, bytes(row.credential)) for row in self._all("SELECT sub, credential FROM users WHERE credential IS NOT NULL")]

    def reseal(self, sub, old_box, new_box):
        """Replace a box by one of the same content; 0 when it is no longer the stored one."""
        with self._batch() as db:
            return db.execute("UPDATE users SET credential = ? WHERE sub = ? AND credential = ?", (new_box, sub, old_box)).rowcount

    def set_key_probe(self, box):
        """What tells at the next start whether the key is right."""
        with self._batch() as db:
            db.execute("UPDATE meta SET value = ? WHERE name = 'key_probe'", (box,))

    def sweep(self, now, session_lifetime, client_lifetime=30 * 86400):
        """Drop what has had its time; tombstones that reuse detection needs stay as long as their grant. Returns ended sessions."""
        with self._batch() as db:
            db.execute("DELETE FROM logins WHERE expires_at < ?", (now - 3600,))
            db.execute("DELETE FROM account_logins WHERE expires_at < ?", (now,))
            db.execute("DELETE FROM assertions WHERE expires_at < ?", (now,))
            db.execute("DELETE FROM access_tokens WHERE expires_at < ?", (now - 60,))
            db.execute("UPDATE refresh_tokens SET successor = NULL WHERE successor IS NOT NULL AND rotated_at < ?", (now - REFRESH_GRACE,))
            db.execute("DELETE FROM grants WHERE grant_id IN (SELECT grant_id FROM grants WHERE expires_at < ?1 OR ended_at < ?1 LIMIT 500)",
                       (now - 86400,))
            db.execute("DELETE FROM clients WHERE client_id IN (SELECT client_id FROM clients WHERE kind = 'dynamic' AND used_at < ?"
                       " AND NOT EXISTS (SELECT 1 FROM grants g WHERE g.client_id = clients.client_id AND g.ended_at IS NULL) LIMIT 500)",
                       (now - client_lifetime,))
            return [row.hash for row in db.execute("DELETE FROM sessions WHERE used_at < ? RETURNING hash",
                                                   (now - session_lifetime,)).fetchall()]


# ======================================================================================================================
# Forgejo
# Owns every outgoing HTTP request, what Forgejo's answers mean, and the one upstream credential of each user.
# Must not know MCP clients' tokens, sessions or children.
# ======================================================================================================================

class FetchFailed(Exception):
    """An outgoing request that brought no whole answer: unreachable, too slow, too large, not HTTP."""


class UpstreamDown(Exception):
    """Forgejo cannot be asked just now, or answered with something that means nothing: keep what there is, try later."""


class UpstreamRefused(Exception):
    """Forgejo refused the code, refresh token or access token: the user has to log in again."""


class UpstreamMisconfigured(Exception):
    """Forgejo refused this broker's client id or secret: the operator's fault, not the user's."""


class NotAUser(Exception):
    """userinfo answered with a page: Forgejo does so for suspended users, and so do proxies. Needs a second witness."""


class LoggedOut(Exception):
    """The user has no usable credential at Forgejo."""


class NotAllowed(Exception):
    """The user is not among those that may use this broker."""

    def __init__(self, sub, login, reason):
        super().__init__(reason)
        self.sub, self.login, self.reason = sub, login, reason


@dataclass(frozen=True)
class Fetched:
    """An answer: status, headers by lower-case name, and the body."""

    status: int
    headers: dict
    body: bytes

    def json(self):
        """The JSON object in a body that says it is JSON, else None."""
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if not re.fullmatch(r"application/([a-z0-9.-]+\+)?json", kind):
            return None
        try:
            value = read_json(self.body)
        except (ValueError, RecursionError):
            return None
        return value if isinstance(value, dict) else None


def _time_left(deadline):
    left = deadline - time.monotonic()
    if left <= 0:  # asked even when data is there: an answer that never ends would never let a time-out happen
        raise TimeoutError("the answer took too long")
    return left


class _Deadline(io.RawIOBase):
    """Reads from a socket until a moment, however slowly the bytes drip: a time-out per read would start anew at each byte."""

    def __init__(self, sock, deadline):
        self._sock, self._deadline = sock, deadline

    def readable(self):
        return True

    def readinto(self, buffer):
        self._sock.settimeout(_time_left(self._deadline))
        return self._sock.recv_into(buffer)


class _Socket:
    """What http.client asks of a socket, with one deadline over all of an answer."""

    def __init__(self, sock, deadline):
        self._sock, self._deadline = sock, deadline

    def makefile(self, mode):
        return io.BufferedReader(_Deadline(self._sock, self._deadline))

    def sendall(self, data):
        self._sock.settimeout(_time_left(self._deadline))
        self._sock.sendall(data)

    def close(self):
        """Nothing: http.client closes before the answer is read; fetch() closes after."""


def fetch(method, url, *, headers=(), body=b"", deadline=15.0, cap=262144, ca_file="", connect=None, on_data=None):
    """One HTTP request without proxies or redirects, all of it within `deadline` seconds and `cap` bytes; FetchFailed otherwise.

    `connect(timeout)` gives another socket than the name's; TLS and Host stay the name's. `on_data` is called when the body begins.
    """
    parts, end = urlsplit(url), time.monotonic() + deadline
    port = parts.port or {"https": 443, "http": 80}[parts.scheme]
    connection, sock = http.client.HTTPConnection(parts.hostname, port), None
    try:
        sock = connect(deadline) if connect else socket.create_connection((parts.hostname, port), timeout=deadline)
        if parts.scheme == "https":
            sock.settimeout(_time_left(end))
            sock = ssl.create_default_context(cafile=ca_file or None).wrap_socket(sock, server_hostname=parts.hostname)
        connection.sock = _Socket(sock, end)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request(method, target, body or None, {"Host": parts.netloc, "User-Agent": f"fjmcp-broker/{__version__}", "Accept": "application/json",
                                                          "Accept-Encoding": "identity", "Connection": "close", **dict(headers)})
        response = connection.getresponse()
        data = response.read(1)
        if on_data:
            on_data()
        data += response.read(cap)
        if len(data) > cap:
            raise FetchFailed("the answer is too large")
        return Fetched(response.status, {name.lower(): value for name, value in response.getheaders()}, data)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise FetchFailed(f"{type(error).__name__}: {error}") from None
    finally:
        if sock:
            sock.close()


# An explicit list, because `is_global` lets NAT64, 6to4, site-local and multicast addresses through. Of IPv6 only 2000::/3 is in use.
NOT_PUBLIC = tuple(map(ipaddress.ip_network, (
    "0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 192.88.99.0/24 192.168.0.0/16"
    " 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/3 ::/3 4000::/2 8000::/1 2001::/23 2001:db8::/32 2002::/16 3fff::/20").split()))


def is_public(address):
    """Whether an IP address, as text, is one of the public internet."""
    address = ipaddress.ip_address(address)
    return not any(address in network for network in NOT_PUBLIC)


def resolve_name(host):
    """The addresses of a host name, as texts."""
    return list(dict.fromkeys(entry[4][0] for entry in socket.getaddrinfo(host, 443, type=socket.SOCK_STREAM)))


class PublicWeb:
    """GETs what strangers name: from the public internet only, on port 443, with strict limits (OWASP SSRF; security.md finding 9)."""

    def __init__(self, resolve=resolve_name, connect=socket.create_connection, ca_file=""):
        self._resolve, self._connect, self._ca_file = resolve, connect, ca_file

    def get(self, url, cap):
        """A Fetched of at most `cap` bytes within 5 s; FetchFailed otherwise. One bad address among a name's refuses them all."""
        started = time.monotonic()
        try:
            addresses = self._resolve(urlsplit(url).hostname)
        except (OSError, ValueError) as error:
            raise FetchFailed(f"the name does not resolve: {error}") from None
        if not addresses or not all(map(is_public, addresses)):
            raise FetchFailed("the name is not of the public internet")
        # To the address that was checked: a name that resolves anew may resolve otherwise (DNS rebinding).
        return fetch("GET", url, cap=cap, ca_file=self._ca_file, deadline=5.0 - (time.monotonic() - started),
                     connect=lambda timeout: self._connect((addresses[0], 443), timeout=timeout))


def jwt_claims(token):
    """The claims of a JWT, unverified: it came straight from Forgejo over TLS. {} when it is none."""
    try:
        claims = json.loads(unb64url(token.split(".")[1]))
        return claims if isinstance(claims, dict) else {}
    except (ValueError, IndexError, AttributeError):
        return {}


def _claim(claims, name):
    value = claims.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62 else 0


@dataclass(frozen=True)
class Credential:
    """What Forgejo gave for a user. `grant` and `count` are its own numbers, by which newer is told from older; 0: unreadable."""

    access: str
    refresh: str
    expires_at: float
    obtained_at: float
    grant: int
    count: int
    subject: object

    @classmethod
    def from_answer(cls, answer, now, old_refresh=""):
        """From a token answer; UpstreamDown when it is not one."""
        access, refresh = answer.get("access_token"), answer.get("refresh_token") or old_refresh
        if not isinstance(access, str) or not access or not isinstance(refresh, str) or str(answer.get("token_type")).lower() != "bearer":
            raise UpstreamDown("Forgejo's token answer is incomplete")
        life = answer.get("expires_in")
        life = float(life) if isinstance(life, (int, float)) and not isinstance(life, bool) or isinstance(life, str) and life.isdigit() else 3600.0
        life = life if 0 < life < 366 * 86400 else 3600.0
        expires, issued = _claim(jwt_claims(access), "exp"), _claim(jwt_claims(access), "iat")
        if expires and issued and 0 < expires - issued < life:  # by the token's own clock, so that a skew does not matter
            life = expires - issued
        claims = jwt_claims(refresh)
        subject = jwt_claims(answer["id_token"]).get("sub") if isinstance(answer.get("id_token"), str) else None
        return cls(access, refresh, now + life, now, _claim(claims, "gnt"), _claim(claims, "cnt"), subject)


@dataclass(frozen=True)
class UserInfo:
    """Who a token belongs to: the numeric id as text (stable over renames), login, display name, groups."""

    sub: str
    login: str
    name: str
    groups: tuple


class Forgejo:
    """What this broker asks of Forgejo (reference: Forgejo's OAuth2 provider)."""

    def __init__(self, settings, clock):
        self._settings, self._clock = settings, clock
        base = settings.forgejo_internal_url or settings.forgejo_url
        self._authorize = settings.forgejo_authorize_url or settings.forgejo_url + "/login/oauth/authorize"
        self._token = settings.forgejo_token_url or base + "/login/oauth/access_token"
        self._userinfo = settings.forgejo_userinfo_url or base + "/login/oauth/userinfo"
        self._introspection = settings.forgejo_introspection_url or base + "/login/oauth/introspect"
        self._api = base + "/api/v1"

    def _fetch(self, method, url, **arguments):
        try:
            return fetch(method, url, ca_file=self._settings.forgejo_ca_file, **arguments)
        except FetchFailed as error:
            raise UpstreamDown(str(error)) from None

    def authorize_url(self, state, challenge):
        """Where the browser goes to log in. PKCE is sent but not relied on: older Forgejo drops the challenge."""
        query = {"response_type": "code", "client_id": self._settings.forgejo_oauth_client_id, "state": state,
                 "redirect_uri": self._settings.public_url + "/oauth/callback", "scope": self._settings.forgejo_oauth_scopes,
                 "code_challenge": challenge, "code_challenge_method": "S256"}
        return self._authorize + ("&" if "?" in self._authorize else "?") + urlencode(query, quote_via=quote)

    def _grant(self, form, old_refresh=""):
        form = {**form, "client_id": self._settings.forgejo_oauth_client_id, "client_secret": self._settings.forgejo_oauth_client_secret}
        answer = self._fetch("POST", self._token, body=urlencode(form).encode(),
                             headers=(("Content-Type", "application/x-www-form-urlencoded"),))
        value = answer.json()
        if answer.status == 200 and value is not None:
            return Credential.from_answer(value, self._clock.now(), old_refresh)
        error = value.get("error") if value and 400 <= answer.status < 500 and answer.status != 429 else None
        description = str(value.get("error_description"))[:200] if value else ""
        if error == "invalid_client" or error == "unauthorized_client" and "client secret" in description:
            raise UpstreamMisconfigured(f"{error}: {description}")
        if error in ("invalid_grant", "unauthorized_client", "access_denied"):
            raise UpstreamRefused(f"{error}: {description}")
        raise UpstreamDown(f"status {answer.status} {error or ''}".strip())

    def exchange(self, code, verifier):
        """A Credential for an authorization code."""
        return self._grant({"grant_type": "authorization_code", "code": code, "code_verifier": verifier,
                            "redirect_uri": self._settings.public_url + "/oauth/callback"})

    def refresh(self, refresh_token):
        """A Credential for a refresh token, which is spent by this."""
        return self._grant({"grant_type": "refresh_token", "refresh_token": refresh_token}, refresh_token)

    def userinfo(self, access):
        """The UserInfo of an access token; UpstreamRefused, NotAUser or UpstreamDown."""
        answer = self._fetch("GET", self._userinfo, headers=(("Authorization", f"Bearer {access}"),))
        if answer.status == 401:
            raise UpstreamRefused("userinfo: 401")
        if answer.status in (200, 303) and answer.json() is None:
            raise NotAUser(f"userinfo: {answer.status} without JSON")
        value = answer.json() if answer.status == 200 else None
        if value is None:
            raise UpstreamDown(f"userinfo: status {answer.status}")
        sub, login, groups = value.get("sub"), value.get("preferred_username"), value.get("groups") or []
        if not isinstance(sub, str) or not re.fullmatch(r"[1-9][0-9]{0,18}", sub) or not isinstance(login, str) or not login:
            raise UpstreamDown("userinfo names nobody")
        groups = tuple(group for group in groups if isinstance(group, str)) if isinstance(groups, list) else ()
        return UserInfo(sub, login, value["name"] if isinstance(value.get("name"), str) else "", groups)

    def refuses(self, access):
        """The second witness: whether the API itself refuses the token, in JSON."""
        try:
            answer = self._fetch("GET", self._api + "/user", headers=(("Authorization", f"token {access}"),))
        except UpstreamDown:
            return False
        value = answer.json()
        return value is not None and (answer.status == 401 or answer.status == 403 and "scope" not in str(value.get("message")))

    def introspect(self, token):
        """The scopes that Forgejo really granted, or None when it does not say."""
        credentials = f"{self._settings.forgejo_oauth_client_id}:{self._settings.forgejo_oauth_client_secret}"
        try:
            value = self._fetch("POST", self._introspection, body=urlencode({"token": token}).encode(), headers=(
                ("Content-Type", "application/x-www-form-urlencoded"),
                ("Authorization", "Basic " + base64.b64encode(credentials.encode()).decode()))).json()
        except UpstreamDown:
            return None
        return value["scope"] if value and value.get("active") is True and isinstance(value.get("scope"), str) else None


def allowed(settings, info):
    """Whether a user may use this broker, by login or by group."""
    if not settings.allowed_users and not settings.allowed_groups:
        return True
    return info.login.lower() in {user.lower() for user in settings.allowed_users} or bool(set(info.groups) & set(settings.allowed_groups))


class Upstream:
    """The one credential of each user at Forgejo: refreshed by one thread at a time, saved before it is used, shared by all clients.

    Forgejo keeps one refresh token per user and application, and every exchange or refresh kills the older one.
    """

    def __init__(self, settings, store, keyring, forgejo, log, clock):
        self._settings, self._store, self._keyring, self._forgejo = settings, store, keyring, forgejo
        self._log, self._clock = log, clock
        self._lock = threading.Lock()  # guards the dicts and the counter below; a leaf
        # A user's lock allows one refresh at a time; the only lock held across the network, taken before any other.
        self._user_locks, self._retry, self._asked, self._callbacks = {}, {}, {}, 0

    def _user_lock(self, sub):
        with self._lock:
            return self._user_locks.setdefault(sub, threading.Lock())

    @contextlib.contextmanager
    def callback(self):
        """While a login is being exchanged: a refusal seen meanwhile may be of the token which that login replaced."""
        with self._lock:
            self._callbacks += 1
        try:
            yield
        finally:
            with self._lock:
                self._callbacks -= 1

    def login(self, code, verifier):
        """Exchange a callback's code and say who logged in: UserInfo; NotAllowed, UpstreamRefused, UpstreamDown otherwise.

        The exchange has killed the user's older refresh token, so what it gave is saved before anything else can fail.
        """
        credential = self._forgejo.exchange(code, verifier)
        if isinstance(credential.subject, str) and self._store.user(credential.subject):
            self._save(credential.subject, credential)
        try:
            info = self._forgejo.userinfo(credential.access)
        except NotAUser:
            raise UpstreamRefused("userinfo answers with a page: the account may be suspended") from None
        if credential.subject is not None and credential.subject != info.sub:
            raise UpstreamDown("userinfo and id_token name different users")
        if not allowed(self._settings, info):
            self._shut_out(info.sub, "refused", "not among the allowed users and groups")
            raise NotAllowed(info.sub, info.login, "This account may not use this server")
        scope = self._forgejo.introspect(credential.access)
        asked = set(self._settings.forgejo_oauth_scopes.split())
        if self._settings.strict_scopes and scope is not None and set(scope.split()) != asked:
            raise NotAllowed(info.sub, info.login, "Forgejo granted other scopes than were asked")
        self._store.update_user(info.sub, info.login, info.name, info.groups, self._clock.now())
        self._save(info.sub, credential)
        self._store.set_upstream_scope(info.sub, scope)
        self._store.set_user_state(info.sub, "active")
        return info

    def _save(self, sub, credential):
        box = self._keyring.seal("upstream", f"user:{sub}", {"access": credential.access, "refresh": credential.refresh})
        with self._lock:
            self._retry.pop(sub, None)
        return self._store.save_credential(sub, box, credential.grant, credential.count, credential.expires_at, credential.obtained_at)

    def _opened(self, sub):
        user = self._store.user(sub)
        if user is None or user.state != "active" or user.credential is None:
            raise LoggedOut(sub)
        try:
            return user, self._keyring.unseal("upstream", f"user:{sub}", user.credential)
        except ValueError:
            raise LoggedOut(sub) from None

    def _left(self, user):
        return user.access_expires_at - self._clock.now(), user.access_expires_at - user.obtained_at

    def outlook(self, sub):
        """(sequence number, whether it should be refreshed ahead of need) of a user's credential; (None, False) when logged out."""
        user = self._store.user(sub)
        if user is None or user.state != "active":
            return None, False
        left, life = self._left(user)
        return user.credential_seq, left < min(300, life / 4)

    def credential(self, sub):
        """(access token, sequence number, time to ask again) for a request; LoggedOut, UpstreamDown or UpstreamMisconfigured."""
        user, box = self._opened(sub)
        left, life = self._left(user)
        if left < min(60, life / 8):
            try:
                self.refresh(sub, user.credential_seq)
            except (UpstreamDown, UpstreamMisconfigured):
                if left <= 0:
                    raise
            user, box = self._opened(sub)
            _, life = self._left(user)
        return box["access"], user.credential_seq, user.access_expires_at - min(60, life / 8)

    def refresh(self, sub, seen=None):
        """Refresh a user's credential, one thread at a time; False when another thread or login already did since `seen`."""
        if seen is None:
            seen = getattr(self._store.user(sub), "credential_seq", None)
        with self._user_lock(sub):
            user, box = self._opened(sub)
            if user.credential_seq != seen:
                return False
            now = self._clock.now()
            with self._lock:
                not_before, wait = self._retry.get(sub, (0.0, 0.0))
            if now < not_before:
                raise UpstreamDown("waiting to try again")
            self._store.refresh_started(sub, now)
            try:
                credential = self._forgejo.refresh(box["refresh"])
            except (UpstreamDown, UpstreamMisconfigured) as error:
                if isinstance(error, UpstreamMisconfigured):
                    self._log.event("error", "forgejo refuses this broker's client id or secret", reason=str(error))
                self._back_off(sub, now, wait)
                raise
            except UpstreamRefused as error:
                self._refused(sub, user, now, wait, error)
                raise LoggedOut(sub) from None
            self._save(sub, credential)
            self._log.event("info", "upstream refreshed", user=sub)
        self._check_again(sub, credential.access)
        return True

    def _back_off(self, sub, now, wait):
        wait = min(60.0, wait * 2 or 1.0)
        with self._lock:
            self._retry[sub] = (now + wait, wait)

    def _refused(self, sub, user, now, wait, error):
        with self._lock:
            login_under_way = self._callbacks > 0
        if login_under_way:
            self._back_off(sub, now, wait)
            raise UpstreamDown("a login is replacing this credential")
        if self._store.set_user_state(sub, "logged_out", user.credential_seq):
            self._log.audit("logged out upstream", user=sub, reason=str(error), interrupted=user.refreshing_since is not None)

    def _check_again(self, sub, access):
        """After each refresh: is this still a user who may be here?"""
        try:
            info = self._forgejo.userinfo(access)
        except (UpstreamDown, UpstreamRefused):
            return
        except NotAUser:
            if self._forgejo.refuses(access):
                self._shut_out(sub, "suspended", "Forgejo has suspended the account")
            return
        if info.sub != sub:
            self._shut_out(sub, "logged_out", "Forgejo names another user")
        elif not allowed(self._settings, info):
            self._shut_out(sub, "refused", "no longer among the allowed users and groups")
        else:
            self._store.update_user(sub, info.login, info.name, info.groups, self._clock.now())

    def _shut_out(self, sub, state, reason):
        if self._store.set_user_state(sub, state):
            self._log.audit("access refused", user=sub, reason=reason)
        now = self._clock.now()
        for grant in self._store.grants_of(sub, now) if state == "refused" else ():  # a suspension may be lifted again
            self._store.end_grant(grant.grant_id, reason, now)

    def may_ask(self, sub):
        """Whether the API may be asked (again) about a user's token: at most once a minute. It counts as asked."""
        now = self._clock.now()
        with self._lock:
            due = now - self._asked.get(sub, -60.0) >= 60
            self._asked[sub] = now if due else self._asked[sub]
        return due

    def note_tool_refusal(self, sub):
        """A tool answered with an error that may be Forgejo refusing the token: ask the API itself."""
        with contextlib.suppress(LoggedOut, StoreUnavailable):
            user, box = self._opened(sub)
            if self._forgejo.refuses(box["access"]) and self._store.set_user_state(sub, "logged_out", user.credential_seq):
                self._log.audit("logged out upstream", user=sub, reason="the API refuses the token")


# ======================================================================================================================
# Messages
# Owns what a JSON-RPC message is, in one function, and how one is written; and strict reading of JSON from outside.
# Must not know methods, sessions or HTTP.
# ======================================================================================================================

MAX_DEPTH = 64
ENVELOPE = re.compile(rb'\{"jsonrpc":"2\.0","id":([0-9]{1,15}),"(?:result|error)":')


def _unique(pairs):
    value = dict(pairs)
    if len(value) != len(pairs):  # Python keeps the last, others the first: a difference to attack with
        raise ValueError("an object has the same key twice")
    return value


def _no_constant(name):
    raise ValueError(f"{name} is not JSON")


def _finite(text):
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError("a number is too large")
    return value


_STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
_CHILD = json.JSONDecoder(parse_constant=_no_constant)
_ENCODER = json.JSONEncoder(separators=(",", ":"), check_circular=False)  # made once: json.dumps would make one a call


def _check_depth(text):
    """Refuse deep nesting before a recursive parser sees it."""
    depth, bare = 0, re.sub(r'"(?:[^"\\]|\\.)*"', "", text)
    for character in re.findall(r"[\[\]{}]", bare):
        depth += 1 if character in "[{" else -1
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH}")


def read_json(body):
    """The value of a JSON text from outside: strict UTF-8, no duplicate keys, NaN or endless numbers; ValueError otherwise."""
    text = body.decode("utf-8")
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(text)
    return _STRICT.decode(text)


def read_child_json(line):
    """The value of a line of a child: JSON, but trusted not to be an attack on parsers; ValueError otherwise."""
    return _CHILD.decode(line.decode("utf-8"))


def parse_json_object(body, error):
    """A JSON object from outside; OAuthError `error` when it is none."""
    try:
        value = read_json(body)
    except (ValueError, RecursionError) as problem:
        raise OAuthError(error, f"The body is not a JSON object: {problem}.") from None
    if not isinstance(value, dict):
        raise OAuthError(error, "The body is not a JSON object.")
    return value


@dataclass(frozen=True, slots=True)
class Message:
    """A JSON-RPC message: `kind` is request, notification or response; `body` is the whole object."""

    kind: str
    id: object
    method: str
    params: object
    body: dict


def is_request_id(value):
    """A string of up to 256 characters or an integer of up to 64 digits."""
    if isinstance(value, bool):
        return False
    return (isinstance(value, str) and len(value) <= 256) or (isinstance(value, int) and abs(value) < 10**64)


def classify(value):
    """The one decision what a JSON value is as a JSON-RPC message (JSON-RPC 2.0 4 and 5); ValueError says why it is none."""
    if not isinstance(value, dict):
        raise ValueError("a message must be an object")
    if value.get("jsonrpc") != "2.0":
        raise ValueError('"jsonrpc" must be "2.0"')
    if "method" in value:
        if not isinstance(value["method"], str) or "result" in value or "error" in value:
            raise ValueError("a request has a method of text, and neither result nor error")
        if not isinstance(value.get("params", {}), dict):
            raise ValueError("params must be an object")
        if "id" not in value:
            return Message("notification", None, value["method"], value.get("params"), value)
        if not is_request_id(value["id"]):
            raise ValueError("an id must be a string or an integer")
        return Message("request", value["id"], value["method"], value.get("params"), value)
    if ("result" in value) == ("error" in value) or not is_request_id(value.get("id")):
        raise ValueError("a response has an id, and either result or error")
    if "error" in value and not (isinstance(value["error"], dict) and isinstance(value["error"].get("code"), int)):
        raise ValueError("an error must be an object with a code")
    return Message("response", value["id"], "", None, value)


def dump(value):
    """A message as one line of bytes: ASCII, so that no character in it can end a line or a frame."""
    return _ENCODER.encode(value).encode()


def result_message(request_id, result):
    """A JSON-RPC result as bytes."""
    return dump({"jsonrpc": "2.0", "id": request_id, "result": result})


def error_message(request_id, code, message, data=None):
    """A JSON-RPC error as bytes."""
    error = {"code": code, "message": message} | ({"data": data} if data is not None else {})
    return dump({"jsonrpc": "2.0", "id": request_id, "error": error})


def with_id(line, message, request_id):
    """A child's answer with its id replaced: large ones keep their bytes, when the envelope leaves no doubt."""
    match = ENVELOPE.match(line)
    if match and int(match[1]) == message.id and message.body.keys() <= {"jsonrpc", "id", "result", "error"} and b"\r" not in line:
        return line[:match.start(1)] + dump(request_id) + line[match.end(1):]
    return dump({**message.body, "id": request_id})


# ======================================================================================================================
# HTTP values
# Owns what a handler is given and what it gives back: Request, Response, and Stream, the value of everything that waits.
# Must not know sockets, routes, or what the bytes mean.
# ======================================================================================================================

@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request: `headers` maps a lower-case name to the list of its values; `target` is the raw path, `query` the raw query.

    `read_body(limit)` returns the body's bytes, reading them only then; Refusal 413 or 400. `address` is the client's, as far as
    trusted proxies tell. `direct` is true when no proxy spoke for the client.
    """

    method: str
    path: str
    query: str
    headers: dict
    address: str
    direct: bool
    id: str
    read_body: object

    def header(self, name, default=None):
        """The value of a header that may stand once; Refusal 400 when it stands twice."""
        values = self.headers.get(name)
        if not values:
            return default
        if len(values) > 1:
            raise Refusal(400, "invalid_request", f"The header {name} may be sent only once.")
        return values[0]


@dataclass(frozen=True, slots=True)
class Later:
    """An answer that is still to come: the connection's thread pumps `reader` (of a Stream) until its last item.

    `json_wait`: seconds in which a last item that comes first is sent as plain JSON, None for however long it takes (no stream).
    `head`: extra headers. `prime`: open an event stream with an empty event that carries an id (MCP 2025-11-25).
    `batch`: the answers form one JSON array.
    """

    reader: object
    json_wait: object = 2.0
    head: tuple = ()
    prime: bool = False
    batch: bool = False


@dataclass(frozen=True, slots=True)
class Response:
    """One HTTP response: a status, headers as (name, value) pairs and a body of bytes, or a `later` that is pumped. """

    status: int
    body: bytes = b""
    content_type: str = ""
    headers: tuple = ()
    later: object = None
    close: bool = False


def json_response(status, value, headers=()):
    """A JSON response."""
    return Response(status, json.dumps(value).encode(), "application/json", tuple(headers))


NO_STORE = (("Cache-Control", "no-store"), ("Pragma", "no-cache"))


def refusal_response(error, headers=()):
    """A Refusal as JSON, for programs."""
    return json_response(error.status, {"error": error.code, "error_description": error.sentence}, (*error.headers, *headers))


def redirect(location):
    """A 303: what follows a form must be a GET (RFC 9700 4.12), and a URL with a code in it must not be cached."""
    return Response(303, headers=(("Location", location), ("Cache-Control", "no-store"), ("Referrer-Policy", "no-referrer")))


@dataclass(frozen=True, slots=True)
class Item:
    """One thing on a stream: a number, the bytes of a JSON-RPC message, whether it is an answer, and whether it is the last."""

    number: int
    data: bytes
    answer: bool = False
    last: bool = False


class Stream:
    """What the broker has to say on one POST or GET: numbered, bounded, resumable, with one reader at a time.

    Producers call put(); a reader takes items in order. Items stay for a client that resumes, within `max_items` and `max_bytes`.
    A producer waits while an attached reader lags by more than that; without a reader the oldest items fall out.
    """

    def __init__(self, max_items=256, max_bytes=1 << 20, stall=35.0, answers=0):
        self.key = b64url(os.urandom(9))  # new at every start of the broker, so stale event ids never match
        self._max_items, self._max_bytes, self._stall = max_items, max_bytes, stall
        self._changed = threading.Condition()  # guards everything below; a leaf: nothing is taken while it is held
        self._items = collections.deque()
        self._bytes = self._number = self._taken = 0
        self._reader = None
        self._answers_left = answers
        self.finished = False

    def put(self, data, answer=False):
        """Add a message; the last of the expected answers ends the stream. False when it has ended already."""
        with self._changed:
            if self._reader and not answer and (len(self._items) >= self._max_items or self._bytes >= self._max_bytes):
                self._changed.wait_for(lambda: self.finished or not self._reader_lags(), self._stall)
            if self.finished:
                return False
            self._number += 1
            self._answers_left -= answer
            last = answer and self._answers_left <= 0
            self._items.append(Item(self._number, data, answer, last))
            self._bytes += len(data)
            while len(self._items) > self._max_items or (self._bytes > self._max_bytes and len(self._items) > 1):
                if self._reader and self._items[0].number > self._reader.cursor:
                    break
                self._bytes -= len(self._items.popleft().data)
            self.finished = last
            self._changed.notify_all()
            return True

    def _reader_lags(self):
        untaken = [len(item.data) for item in self._items if item.number > self._reader.cursor] if self._reader else []
        return len(untaken) >= self._max_items or sum(untaken) >= self._max_bytes

    def end(self):
        """No more will come: an attached reader ends."""
        with self._changed:
            self.finished = True
            self._changed.notify_all()

    def open(self, after=None):
        """A Reader from the item after number `after` (default: what was not yet taken); it takes over from an older one."""
        with self._changed:
            if self._reader:
                self._reader.ended = True
            self._reader = Reader(self, self._taken if after is None else after)
            self._changed.notify_all()
            return self._reader

    @property
    def is_taken(self):
        """Whether a client took all that was put on it."""
        return self._taken >= self._number

    @property
    def is_open(self):
        """Whether a reader is attached."""
        return self._reader is not None


class Reader:
    """One client's reading of a Stream. take(timeout) -> Item, None on time-out; `ended` once there will be no more."""

    def __init__(self, stream, cursor):
        self.stream, self.cursor, self.ended = stream, cursor, False

    def take(self, timeout):
        """The next item, waiting at most `timeout` seconds; None then, or when the reader has `ended`."""
        stream = self.stream
        with stream._changed:
            while not self.ended:
                for item in stream._items:
                    if item.number > self.cursor:
                        return item
                if stream.finished:
                    self.ended = True
                elif not stream._changed.wait(timeout):
                    return None
            return None

    def taken(self, item):
        """The item has been handed to the client's socket."""
        with self.stream._changed:
            self.cursor = item.number
            self.stream._taken = max(self.stream._taken, item.number)
            self.stream._changed.notify_all()

    def close(self):
        """The client is gone, or has all it needs: the stream has no reader any more (unless a newer one took over)."""
        with self.stream._changed:
            self.ended = True
            if self.stream._reader is self:
                self.stream._reader = None
            self.stream._changed.notify_all()


class Limiter:
    """Token buckets by key: a burst of `rate` and `rate` a minute after that. Refusal 429 with Retry-After when empty."""

    def __init__(self, clock):
        self._clock, self._lock, self._buckets, self._limit = clock, threading.Lock(), {}, 10000  # the lock guards the rest; a leaf

    def spend(self, kind, key, rate):
        """Take one token of `key`'s bucket for `kind`."""
        now = self._clock.now()
        with self._lock:
            if len(self._buckets) > self._limit:  # full buckets are as good as none; looked for so seldom that it costs a flood nothing
                self._buckets = {k: v for k, v in self._buckets.items() if now - v[1] < 60}
                self._limit = max(10000, 2 * len(self._buckets))
            left, since = self._buckets.get((kind, key), (rate, now))
            left = min(rate, left + max(0, now - since) * rate / 60)
            self._buckets[kind, key] = (left - 1 if left >= 1 else left, now)
        if left < 1:
            raise Refusal(429, "too_many_requests", "Too many requests; try again in a moment.",
                          (("Retry-After", str(max(1, round((1 - left) * 60 / rate)))),))


# ======================================================================================================================
# Pages
# Owns all HTML: what people see. Plain functions from values to Response; every value is escaped.
# Must not know what a decision leads to.
# ======================================================================================================================

STYLE = """
:root{color-scheme:light dark;--ink:#1d2125;--quiet:#59636e;--paper:#fff;--back:#f3f4f6;--line:#d5d9de;--accent:#9a3b12;--on:#fff;--warn:#fff4e0}
@media(prefers-color-scheme:dark){:root{--ink:#eceef0;--quiet:#a9b1ba;--paper:#1c2024;--back:#121417;--line:#3a4047;--accent:#f29a66;--on:#201006;--warn:#33270f}}
*{box-sizing:border-box}body{margin:0;background:var(--back);color:var(--ink);font:1rem/1.55 system-ui,sans-serif}
main{max-width:36rem;margin:0 auto;padding:1.25rem}@media(min-width:40rem){main{margin:2.5rem auto;padding:2rem;background:var(--paper);border:1px solid var(--line);border-radius:.75rem}}
a{color:var(--accent)}h1{font-size:1.4rem;line-height:1.25;margin:0 0 1rem}h2{font-size:1.05rem;margin:1.5rem 0 .5rem}p{margin:.6rem 0}
code{font:.9em ui-monospace,monospace;overflow-wrap:anywhere}.box{border:1px solid var(--line);border-radius:.5rem;padding:.75rem 1rem;margin:1rem 0;overflow-wrap:anywhere}
.warn{background:var(--warn)}.quiet{color:var(--quiet);font-size:.92rem}.big{font-size:1.1rem;font-weight:600}ul{padding-left:1.2rem}li{margin:.3rem 0}
fieldset{border:1px solid var(--line);border-radius:.5rem;margin:1rem 0;padding:.5rem 1rem}legend{font-weight:600;padding:0 .3rem}
label{display:block;padding:.5rem 0 .5rem 1.8rem;text-indent:-1.8rem;cursor:pointer}input{width:1.1rem;height:1.1rem;margin:0 .6rem 0 0;vertical-align:-.15rem;accent-color:var(--accent)}
.row{display:flex;gap:.75rem;flex-wrap:wrap;margin-top:1.25rem}button{flex:1 1 9rem;min-height:2.9rem;font:inherit;font-weight:600;border-radius:.5rem;border:1px solid var(--line);background:transparent;color:inherit;cursor:pointer}
button.main{background:var(--accent);border-color:var(--accent);color:var(--on)}:focus-visible{outline:3px solid var(--accent);outline-offset:2px}
"""
STYLE_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
# No form-action: Chromium applies it to the whole redirect chain behind a form, down to the client's callback.
CONTENT_POLICY = f"default-src 'none'; style-src 'sha256-{STYLE_HASH}'; base-uri 'none'; frame-ancestors 'none'"

SCOPE_MEANINGS = {
    "repository": "your repositories and their contents", "issue": "issues and pull requests", "notification": "your notifications",
    "organization": "your organizations and teams", "user": "your profile and account settings", "package": "packages",
    "misc": "general information about the server", "activitypub": "federation", "admin": "administration of the whole server",
}


def scope_meaning(scope):
    """What a scope of Forgejo allows, in plain words; None for those that only say who somebody is."""
    level, colon, area = scope.partition(":")
    if scope == "all":
        return "everything you can do yourself"
    return f"{'see and change' if level == 'write' else 'see'} {SCOPE_MEANINGS.get(area, area)}" if colon else None


def page(status, title, body, *, form=False, headers=()):
    """A whole page. `body` is HTML whose values are escaped already; `form`: it has one (its Referrer-Policy lets Origin be sent)."""
    text = (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
            f'<meta name="robots" content="noindex"><title>{html.escape(title)}</title><style>{STYLE}</style></head>'
            f"<body><main><h1>{html.escape(title)}</h1>{body}</main></body></html>")
    return Response(status, text.encode(), "text/html; charset=utf-8", (
        ("Content-Security-Policy", CONTENT_POLICY), ("X-Frame-Options", "DENY"), ("Cache-Control", "no-store"),
        ("Referrer-Policy", "same-origin" if form else "no-referrer"), *headers))


def error_page(status, title, sentence, *, advice=(), headers=()):
    """A page that says what went wrong and what to do."""
    items = "".join(f"<li>{html.escape(item)}</li>" for item in advice)
    return page(status, title, f"<p>{html.escape(sentence)}</p>" + (f"<ul>{items}</ul>" if items else ""), headers=headers)


NOTICES = {  # what: (status, title, sentence, advice)
    "unknown client": (
        400, "This application is not registered here", "Its registration was removed, or belongs to another server. Let the application register again:", (
            "Claude.ai, Claude Desktop: remove the connector and add it again.",
            "Claude Code: /mcp, choose this server, clear its authentication, then authenticate.",
            "ChatGPT: delete the connector and create it again.",
            "VS Code: run the command “Authentication: Remove Dynamic Authentication Providers”.",
            "Cursor: remove the server in the settings and add it again.",
            "mcp-remote: delete the folder ~/.mcp-auth.",
            "Others: remove the server and add it again.")),
    "unreadable client": (
        400, "This application cannot be looked up", "The address by which it introduces itself could not be read just now, or what stands there does not "
        "describe it. Try again in a minute; if that does not help, ask who makes the application.", ()),
    "expired": (400, "This login has expired", "It took too long, or was finished already. Start again from your application.", ()),
    "answered": (400, "This was answered already", "If your application is still waiting, start again from it.", ()),
    "wrong browser": (
        403, "This login began in another browser", "For your safety it cannot go on here. If you started it yourself, start again from your application, "
        "allow cookies for this site, and stay in one browser. If somebody sent you this link, close it.", ()),
    "malformed": (400, "This request cannot be read", "Its parameters are malformed. Start again from your application.", ()),
    "malformed answer": (400, "This answer cannot be used", "Forgejo's answer is malformed. Start again from your application.", ()),
    "repeated": (400, "This request cannot be trusted", "It names client_id or redirect_uri more than once. Start again from your application.", ()),
    "redirect": (400, "This request cannot be trusted", "It wants the answer sent to an address (redirect_uri) that the application has not registered. "
                 "Remove the connection in your application and add it again.", ()),
    "undecided": (400, "Nothing was decided", "The form came without a choice. Go back and choose again.", ()),
    "foreign form": (403, "This form came from elsewhere", "Another website sent it. Start again from your application.", ()),
    "two cookies": (400, "This browser's cookies cannot be trusted", "Clear the cookies of this site and start again.", ()),
}


def notice(what):
    """The page of one of NOTICES."""
    status, title, sentence, advice = NOTICES[what]
    return error_page(status, title, sentence, advice=advice)


def destination(redirect_uri):
    """Where an answer goes, for people: the host of a website, or that it stays on this device."""
    parts = urlsplit(redirect_uri)
    if is_loopback_name(parts.hostname):
        return "an application on this device"
    return parts.hostname if parts.scheme == "https" else f"the application on this device that opens {parts.scheme}: links"


def consent_page(*, client_name, client_id, client_host, redirect_uri, may_write, forgejo_scopes, forgejo_host, login_box, csrf, headers=()):
    """The broker's own consent: who asks, where the answer goes, what is allowed; the person chooses or refuses."""
    name, where = html.escape(client_name), html.escape(destination(redirect_uri))
    meanings = "".join(f"<li>{html.escape(meaning)}</li>" for meaning in filter(None, map(scope_meaning, forgejo_scopes.split())))
    full = ('<label><input type="radio" name="access" value="full" checked><strong>Full access</strong>: use every tool, '
            "also those that change things</label>") if may_write else ""
    read = (f'<label><input type="radio" name="access" value="read"{"" if may_write else " checked"}><strong>Read only</strong>: '
            "use only tools that look things up</label>")
    known = (f"The application calls itself that in its description at <strong>{html.escape(client_host)}</strong>." if client_host
             else "The application calls itself that; the name is not verified.")
    local = ("<p>Any program on this device can ask in an application's name: make sure that it is the one you started.</p>"
             if urlsplit(redirect_uri).scheme != "https" else "")
    body = f"""
<div class="box"><p><span class="big">{name}</span> wants to use <span class="big">{html.escape(forgejo_host)}</span> as you.</p>
<p class="quiet">{known}</p>
<p>The answer goes to <strong>{where}</strong><br><code class="quiet">{html.escape(redirect_uri)}</code></p>{local}</div>
<p class="box warn">Go on only if you started this yourself, just now, in an application you trust.</p>
<h2>What it will be able to do</h2><ul>{meanings}</ul>
<form method="post" action="/oauth/consent">
<input type="hidden" name="login" value="{html.escape(login_box)}"><input type="hidden" name="csrf" value="{html.escape(csrf)}">
<fieldset><legend>How much of it?</legend>{full}{read}</fieldset>
<p class="quiet">Read only is enforced by this server, which decides tool by tool; the key it holds for you at {html.escape(forgejo_host)}
allows all of the above.</p>
<div class="row"><button name="decision" value="deny">Refuse</button><button class="main" name="decision" value="approve">Allow</button></div>
</form><p class="quiet">Next you log in at {html.escape(forgejo_host)}. Application id: <code>{html.escape(client_id)}</code></p>"""
    return page(200, "Connect an application?", body, form=True, headers=headers)


def account_login_page(forgejo_host, csrf, headers=()):
    """Before the account page: who are you?"""
    body = f"""
<p>Here you see which applications may use {html.escape(forgejo_host)} as you, and can end that.</p>
<form method="post" action="/account/login"><input type="hidden" name="csrf" value="{html.escape(csrf)}">
<div class="row"><button class="main">Log in at {html.escape(forgejo_host)}</button></div></form>"""
    return page(200, "Your applications", body, form=True, headers=headers)


def account_page(login, applications, sessions, csrf):
    """What a user has connected. `applications`: (client id, name, scopes, when used); `sessions`: (id, name, when begun, when used)."""
    def items(rows, field, action):
        forms = (f"""<li><form method="post" action="/account/end"><input type="hidden" name="csrf" value="{html.escape(csrf)}">
<strong>{html.escape(name)}</strong><br><span class="quiet">{html.escape(text)}</span>
<div class="row"><button name="{field}" value="{html.escape(key)}">{action}</button></div></form></li>""" for key, name, text in rows)
        return f"<ul>{''.join(forms)}</ul>" if rows else '<p class="quiet">None.</p>'

    shown_apps = [(key, name or key, f"{'reads and writes' if WRITE in scopes else 'reads only'}, last used {moment(used)}, id {key}")
                  for key, name, scopes, used in applications]
    shown_sessions = [(key, name or "An application", f"since {moment(begun)}, last used {moment(used)}") for key, name, begun, used in sessions]
    body = f"""
<p>You are <strong>{html.escape(login)}</strong>.</p>
<h2>Connected applications</h2>{items(shown_apps, "client", "Disconnect")}
<h2>Open sessions</h2>{items(shown_sessions, "session", "End session")}
<form method="post" action="/account/end"><input type="hidden" name="csrf" value="{html.escape(csrf)}">
<div class="row"><button name="leave" value="1">Log out of this page</button></div></form>"""
    return page(200, "Your applications", body, form=True)


def moment(seconds):
    """A time for people."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def home_page(public_url, forgejo_url):
    """For people who open the server's address."""
    url, host = html.escape(public_url + "/mcp"), html.escape(urlsplit(forgejo_url).netloc)
    body = f"""
<p>With this server, AI assistants work on <a href="{html.escape(forgejo_url)}">{host}</a> as you, with your own rights, after you log in.</p>
<div class="box"><p class="quiet">The address to give your assistant:</p><p class="big"><code>{url}</code></p></div>
<h2>How to connect</h2><ul>
<li><strong>Claude.ai, Claude Desktop</strong>: Settings, Connectors, Add custom connector; paste the address.</li>
<li><strong>Claude Code</strong>: <code>claude mcp add --transport http forgejo {url}</code>, then <code>/mcp</code>.</li>
<li><strong>ChatGPT</strong>: Settings, Connectors, Create; paste the address, authentication OAuth.</li>
<li><strong>VS Code</strong>: command “MCP: Add Server”, HTTP; paste the address.</li>
<li><strong>Cursor</strong>: Settings, MCP, Add: <code>{{"url": "{url}"}}</code>.</li>
<li><strong>Others</strong>: a remote MCP server (Streamable HTTP) with OAuth; or <code>npx mcp-remote {url}</code>.</li></ul>
<p><a href="/account">See and end what you have connected</a>.</p>"""
    return page(200, "Forgejo for AI assistants", body)


def clean_name(text, limit=100):
    """A client's name for the page: no control or formatting characters, one line, cut to size."""
    kept = "".join(" " if unicodedata.category(c) in ("Zl", "Zp", "Zs") or c in "\t\r\n" else c for c in text
                   if c in "\t\r\n" or unicodedata.category(c) not in ("Cc", "Cf", "Co", "Cs", "Cn"))
    return " ".join(kept.split())[:limit].strip() or "An application without a name"


# ======================================================================================================================
# Clients
# Owns who may ask for a login: registration (RFC 7591), pre-registered clients, clients that describe themselves at their own URL,
# redirect URIs, client authentication. Must not know users, tokens or Forgejo.
# ======================================================================================================================

AUTH_METHODS = ("none", "client_secret_post", "client_secret_basic")
URI_CHARACTERS = re.compile(r"[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]{1,2000}")
# What a browser and Python disagree on (user names, odd ports and hosts) is refused, not interpreted.
WEB_URI = re.compile(r"(?i:https?)://([A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[::1\])(?::([0-9]{1,5}))?(?:[/?].*)?")
RESERVED_PARAMETERS = {"code", "state", "iss", "error", "error_description"}


class UnusableScheme(ValueError):
    """A redirect URI with a private-use scheme that is not allowed here; harmless, so it may be left out of a set."""


def check_redirect_uri(uri, schemes):
    """ValueError, with the reason, unless the URI may be registered: https, http on loopback, or an allowed private-use scheme."""
    if not isinstance(uri, str) or not URI_CHARACTERS.fullmatch(uri):
        raise ValueError("is not a URI of at most 2,000 plain characters")
    if "#" in uri:
        raise ValueError("has a fragment")
    scheme = uri.partition(":")[0].lower()
    if ":" not in uri or not re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme):
        raise ValueError("has no scheme")
    if RESERVED_PARAMETERS & {name for name, _ in parse_qsl(urlsplit(uri).query, keep_blank_values=True)}:
        raise ValueError("has a query parameter of our answer's names (code, state, iss, error)")
    if scheme not in ("http", "https"):
        if scheme in ("javascript", "data", "file", "vbscript", "blob", "about", "view-source", "ws", "wss", "ftp"):
            raise ValueError(f"has the scheme {scheme}, which is never allowed")
        if scheme not in schemes:
            raise UnusableScheme(f"has the scheme {scheme}, which is not among allowed_redirect_schemes")
        return
    match = WEB_URI.fullmatch(uri)
    if not match or (match[2] and not 0 < int(match[2]) < 65536):
        raise ValueError("has no plain host and port")
    if scheme == "http" and not is_loopback_name(match[1].lower()):
        raise ValueError("is http, which is for loopback only; use https")


LOOPBACK_URI = re.compile(r"http://(?:localhost|127\.0\.0\.1|\[::1\])(?::([0-9]{1,5}))?(/[^?#]*)?(\?[^#]*)?", re.IGNORECASE)


def redirect_matches(registered, asked):
    """Exact, but for loopback: any port, its three names alike, and an empty path is `/` (RFC 8252 7.3)."""
    if registered == asked:
        return True
    ours, theirs = LOOPBACK_URI.fullmatch(registered), LOOPBACK_URI.fullmatch(asked)
    if not ours or not theirs or (theirs[1] and not 0 < int(theirs[1]) < 65536):
        return False
    return (ours[2] or "/", ours[3]) == (theirs[2] or "/", theirs[3])


def registrable_uris(uris, schemes, limit):
    """Of a client's redirect URIs those that may be used here; OAuthError when there is none, or one that deceives."""
    if not isinstance(uris, list) or not 1 <= len(uris) <= limit:
        raise OAuthError("invalid_redirect_uri", f"redirect_uris must be a list of 1 to {limit} URIs.")
    usable, unusable = [], None
    for uri in uris:
        try:
            check_redirect_uri(uri, schemes)
            usable.append(uri)
        except UnusableScheme as error:  # one such must not cost Cursor the other two of its set
            unusable = error
        except ValueError as error:
            raise OAuthError("invalid_redirect_uri", f"A redirect URI {error}.") from None
    if not usable:
        raise OAuthError("invalid_redirect_uri", f"A redirect URI {unusable}.")
    return usable


def choose(document, key, supported):
    """What is served of a list that was asked for; the first that is supported must be among it, and is the default."""
    values = document.get(key, [supported[0]])
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values) or supported[0] not in values:
        raise OAuthError("invalid_client_metadata", f"{key} must be a list that contains {supported[0]}.")
    return [value for value in supported if value in values]


def spend(limiter, settings, kind, request):
    """Refusal 429 above the `rate_<kind>` of the request's address, or twenty times that of all together.

    A loopback peer that speaks for nobody is the operator, or a proxy that hides who asks: no limit could be fair (clients.md 17).
    """
    if request.direct and is_loopback_name(request.address):
        return
    rate, address = getattr(settings, f"rate_{kind}"), request.address
    if ":" in address:  # whoever has one IPv6 address has the other 2^64 of its network too
        address = str(ipaddress.ip_network(f"{address.partition('%')[0]}/64", strict=False))
    limiter.spend(kind, address, rate)
    limiter.spend(kind, "all", 20 * rate)


# A name in lower case with a last label that is no number, so no spelling of an IP address; no port, user name, fragment or dot segment.
DOCUMENT_URL = re.compile(
    r"https://((?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?)"
    r"(?!/*(?:\?|$))(?!\S*/(?:\.|%2[eE]){1,2}(?:[/?]|$))/[A-Za-z0-9._~!$&'()*+,;=:@%/-]*(?:\?[A-Za-z0-9._~!$&'()*+,;=:@%/?-]*)?")
SHA256_PREFIX = bytes.fromhex("3031300d060960864801650304020105000420")  # DigestInfo of RFC 8017 9.2 note 1


def verify_rs256(message, signature, n, e):
    """Whether a signature is RSASSA-PKCS1-v1_5 with SHA-256 (RFC 8017 8.2.2). The whole block is compared, never parsed."""
    size = (n.bit_length() + 7) // 8
    number = int.from_bytes(signature, "big")
    if len(signature) != size or number >= n:
        return False
    info = SHA256_PREFIX + hashlib.sha256(message).digest()
    block = b"\0\1" + b"\xff" * (size - 3 - len(info)) + b"\0" + info
    return hmac.compare_digest(pow(number, e, n).to_bytes(size, "big"), block)


def public_rsa_keys(jwks):
    """[(kid, n, e)] of the usable keys of a JWK set (RFC 7517): RSA, 2048 to 4096 bits. ValueError for a secret or private one."""
    keys = jwks.get("keys") if isinstance(jwks, dict) else None
    if not isinstance(keys, list) or not all(isinstance(key, dict) for key in keys):
        raise ValueError("the keys are no JWK set")
    if any("d" in key or "k" in key for key in keys):
        raise ValueError("a private or symmetric key is published")
    usable = []
    for key in keys[:20]:
        if key.get("kty") == "RSA" and key.get("use", "sig") == "sig" and key.get("alg", "RS256") == "RS256":
            n, e = (int.from_bytes(unb64url(str(key.get(part, ""))), "big") for part in "ne")
            if 2048 <= n.bit_length() <= 4096 and n % 2 and 3 <= e < 2**32 and e % 2:
                usable.append((str(key["kid"]) if "kid" in key else None, n, e))
    return usable


def read_client_document(url, answer, schemes):
    """What a Client ID Metadata Document says, as (name, redirect URIs, auth method, what else is kept); ValueError or OAuthError.

    draft-ietf-oauth-client-id-metadata-document 4: its client_id is its own URL, byte for byte, and it has no secret.
    """
    document = answer.json() if answer.status == 200 else None
    if document is None:
        raise ValueError(f"status {answer.status}, or no JSON object")
    if document.get("client_id") != url:
        raise ValueError("its client_id is not its URL")
    method = document.get("token_endpoint_auth_method", "none")
    if any(name.startswith("client_secret") for name in document) or method not in ("none", "private_key_jwt"):
        raise ValueError("it relies on a secret")
    choose(document, "grant_types", ("authorization_code",))
    choose(document, "response_types", ("code",))
    also = document.get("token_endpoint_auth_methods_supported")
    if isinstance(also, list) and "none" in also:
        method = "none"
    kept = {name: document[name] for name in ("jwks", "jwks_uri") if name in document}
    if "jwks" in kept:
        public_rsa_keys(kept["jwks"])
    name = clean_name(document["client_name"] if isinstance(document.get("client_name"), str) else "")
    return name, registrable_uris(document.get("redirect_uris"), schemes, 100), method, kept


def freshness(answer):
    """Seconds for which a document may be used, by its Cache-Control: an hour if that is silent, at least a minute, at most a day."""
    control = answer.headers.get("cache-control", "").lower()
    age = re.search(r"(?<![a-z-])max-age=\"?([0-9]{1,9})", control)
    return 60 if re.search("no-store|no-cache", control) else min(86400, max(60, int(age[1]))) if age else 3600


class Documents:
    """Client ID Metadata Documents: a client_id that is the https URL of the client's own description.

    A stranger chooses the URL. So it is fetched from the public internet only, few at a time, and what came of it, good or bad, is
    kept: a good one as long as its origin says, a failure for a minute. /token never fetches one; it uses what the login used.
    """

    RETRY = 60

    def __init__(self, settings, store, log, clock, limiter, web):
        self._settings, self._store, self._log, self._clock, self._limiter, self._web = settings, store, log, clock, limiter, web
        # Strangers' documents never hold up those of applications that people have logged in to.
        self._slots = [threading.BoundedSemaphore(4) for in_use in (False, True)]
        self._flights, self._lock = weakref.WeakValueDictionary(), threading.Lock()  # the lock guards the dict; a leaf

    def may_be_one(self, client_id):
        """Whether a client_id is the URL of a document that we would fetch: not our own host's, nor Forgejo's."""
        match = DOCUMENT_URL.fullmatch(client_id) if len(client_id) <= 2000 and self._settings.client_documents else None
        ours = (self._settings.public_url, self._settings.forgejo_url, self._settings.forgejo_internal_url or self._settings.forgejo_url)
        return bool(match) and match[1] not in {urlsplit(url).hostname for url in ours}

    def client(self, url):
        """The client's row for a login, fetched if need be; None when its document cannot be used."""
        row = self._store.client(url)
        if self._is_due(row):
            with self._turn(url, row and row.in_use):
                if self._is_due(self._store.client(url)):
                    self._fetch(url)
            row = self._store.client(url)
        return row if row and row.fresh_until > self._clock.now() else None

    def _is_due(self, row):
        return row is None or row.fresh_until <= self._clock.now() >= row.fetched_at + self.RETRY

    @contextlib.contextmanager
    def _turn(self, url, in_use):
        """One fetch of a URL at a time, few of all, and a stranger's not too often from one host: nobody is flooded through us."""
        if not in_use:
            self._limiter.spend("document", urlsplit(url).hostname, 60)
        with self._lock:
            flight = self._flights.setdefault(url, threading.Lock())
        with self._acquired(flight, 15), self._acquired(self._slots[bool(in_use)], 5):
            yield

    @staticmethod
    @contextlib.contextmanager
    def _acquired(lock, seconds):
        if not lock.acquire(timeout=seconds):
            raise Refusal(503, "temporarily_unavailable", "Too many applications introduce themselves just now; try again in a moment.",
                          (("Retry-After", "5"),))
        try:
            yield
        finally:
            lock.release()

    def _fetch(self, url):
        now = self._clock.now()
        try:
            answer = self._web.get(url, 5120)
            self._store.keep_document(url, *read_client_document(url, answer, self._settings.allowed_redirect_schemes), now, now + freshness(answer))
        except (FetchFailed, ValueError, OAuthError) as error:
            self._store.keep_document(url, "", [], "none", {}, now, 0)
            self._log.event("info", "client document refused", client=url, reason=str(error))

    def check_assertion(self, client, assertion):
        """ValueError, with the reason, unless a JWT proves that the client made it, for us, just now (RFC 7523 3; RS256 only)."""
        try:
            signed, _, signature = assertion.rpartition(".")
            header, claims = (read_json(unb64url(part)) for part in signed.split("."))
            kid, now = header.get("kid"), self._clock.now()
            if header.get("alg") != "RS256" or "crit" in header or len(assertion) > 8192:
                raise ValueError("it is not signed with RS256")
            if claims.get("iss") != client.client_id or claims.get("sub") != client.client_id:
                raise ValueError("iss and sub are not the client_id")
            url, audience = self._settings.public_url, claims.get("aud")
            if not audience or not set([audience] if isinstance(audience, str) else audience) <= {url, url + "/oauth/token", url + "/token"}:
                raise ValueError("aud is not this server")
            expires, begins = claims.get("exp"), claims.get("nbf", 0)
            if not all(isinstance(moment, (int, float)) for moment in (expires, begins)) or not now < expires <= now + 3660 or begins > now + 60:
                raise ValueError("it has expired, is not valid yet, or lasts for more than an hour")
        except (AttributeError, TypeError, RecursionError):
            raise ValueError("it is not a JWT") from None
        if not any(verify_rs256(signed.encode(), unb64url(signature), n, e) for name, n, e in self._keys(client, kid) if kid in (None, name)):
            raise ValueError("its signature is not the client's")
        # Without a jti what was signed stands for it; the signature could be spelled in two ways.
        if not self._store.spend_assertion(digest(f"{client.client_id} {json.dumps(claims.get('jti')) if claims.get('jti') else signed}"), expires):
            raise ValueError("it was used before")

    def _keys(self, client, kid):
        """The client's keys; from its jwks_uri anew when `kid` is none of them, or after a day, but at most once a minute."""
        if "jwks" in client.metadata:
            return public_rsa_keys(client.metadata["jwks"])
        url = client.metadata.get("jwks_uri")
        if not isinstance(url, str) or not self.may_be_one(url):
            raise ValueError("the client publishes no keys")
        kept = client.keys
        if self._keys_due(kept, url, kid):
            with self._turn(url, client.in_use):
                kept = (self._store.client(client.client_id) or client).keys  # another may have fetched them meanwhile
                if self._keys_due(kept, url, kid):
                    kept = self._fetch_keys(client, url, kept)
        if not kept["ok"] and kid not in (key[0] for key in kept["keys"]):  # our trouble must not look like the client's fault
            raise Refusal(503, "temporarily_unavailable", "The client's keys cannot be read just now.", (("Retry-After", str(self.RETRY)),))
        return kept["keys"]

    def _keys_due(self, kept, url, kid):
        if kept.get("uri") != url:
            return True
        age = self._clock.now() - kept["at"]
        return age >= self.RETRY and (age >= 86400 or not kept["ok"] or kid not in (None, *(key[0] for key in kept["keys"])))

    def _fetch_keys(self, client, url, kept):
        now = self._clock.now()
        try:
            answer = self._web.get(url, 65536)
            kept = {"uri": url, "at": now, "ok": True, "keys": public_rsa_keys(answer.json() if answer.status == 200 else None)}
        except (FetchFailed, ValueError) as error:
            self._log.event("warning", "client keys cannot be read", client=client.client_id, reason=str(error))
            kept = {"uri": url, "at": now, "ok": False, "keys": kept["keys"] if kept.get("uri") == url else []}
        self._store.keep_keys(client.client_id, kept)
        return kept


def check_configured_clients(settings):
    """ConfigurationError for redirect URIs that no client may have; any private-use scheme is the operator's to choose."""
    problems = []
    for item in settings.clients:
        for uri in item["redirect_uris"]:
            try:
                with contextlib.suppress(UnusableScheme):
                    check_redirect_uri(uri, settings.allowed_redirect_schemes)
            except ValueError as error:
                problems.append(f"clients: the redirect URI {uri!r} of {item['client_id']!r} {error}")
    if problems:
        raise ConfigurationError(problems)


class Clients:
    """Finds, registers and authenticates clients."""

    def __init__(self, settings, store, log, clock, limiter, web):
        self._settings, self._store, self._log, self._clock, self._limiter = settings, store, log, clock, limiter
        self._documents = Documents(settings, store, log, clock, limiter, web)
        check_configured_clients(settings)
        store.drop_configured_clients(item["client_id"] for item in settings.clients)
        for item in settings.clients:
            secret = item.get("client_secret")
            store.add_client(item["client_id"], "configured", clean_name(item.get("name") or item["client_id"]), item["redirect_uris"],
                             digest(secret) if secret else None, "client_secret_basic" if secret else "none", {}, clock.now())

    def find(self, client_id):
        """The client of an id as it was last known, or None. Nothing is fetched."""
        client = self._store.client(client_id)
        usable = client and client.kind != "unreadable" and (client.kind != "document" or self._settings.client_documents)
        return client if usable else None

    def for_login(self, client_id):
        """The client of an id, its document fetched if it has one that is due; None when it is unknown or cannot be used."""
        client = self.find(client_id)
        if client and client.kind != "document":
            return client
        return self._documents.client(client_id) if self._documents.may_be_one(client_id) else None

    def register(self, request):
        """POST /oauth/register: dynamic registration (RFC 7591 3). Open to all, so nothing in it is believed."""
        spend(self._limiter, self._settings, "register", request)
        document = parse_json_object(request.read_body(self._settings.max_form), "invalid_client_metadata")
        uris = registrable_uris(document.get("redirect_uris"), self._settings.allowed_redirect_schemes, 10)
        method = document.get("token_endpoint_auth_method", "client_secret_basic")
        if method not in AUTH_METHODS:
            raise OAuthError("invalid_client_metadata", f"token_endpoint_auth_method must be one of {', '.join(AUTH_METHODS)}.")
        # Clients compare the answer with what they asked (clients.md 10); a refresh token is issued whatever it says.
        grant_types = choose(document, "grant_types", ("authorization_code", "refresh_token"))
        response_types = choose(document, "response_types", ("code",))
        # Whatever scope was asked, a later login decides; what is echoed is all that clients read (clients.md 10, 11).
        scope = document["scope"] if isinstance(document.get("scope"), str) and document["scope"] else " ".join(SCOPES)
        client_id, secret, now = new_secret("fjd_")[:36], None if method == "none" else new_secret("fjs_"), self._clock.now()
        name = clean_name(document.get("client_name") if isinstance(document.get("client_name"), str) else "")
        metadata = {"redirect_uris": uris, "client_name": name, "token_endpoint_auth_method": method, "scope": scope[:1000],
                    "grant_types": grant_types, "response_types": response_types}
        for key in ("application_type", "software_id", "software_version"):
            if isinstance(document.get(key), str) and 0 < len(document[key]) <= 200:
                metadata[key] = document[key]
        self._store.add_client(client_id, "dynamic", name, uris, secret and digest(secret), method, metadata, now)
        self._log.audit("client registered", client=client_id, name=name, address=request.address)
        answer = {"client_id": client_id, "client_id_issued_at": int(now), **metadata}
        if secret:
            answer.update(client_secret=secret, client_secret_expires_at=0)
        return json_response(201, answer, NO_STORE)

    def authenticate(self, request, form):
        """The client that speaks on /token or /revoke (RFC 6749 2.3.1): Basic, post or an assertion for one with a secret or keys."""
        client_id, secret, basic, assertion = form.get("client_id"), form.get("client_secret"), False, form.get("client_assertion")
        authorization = request.header("authorization")
        if authorization is not None:
            basic = True
            basic_id, basic_secret = self._basic(authorization)
            if secret is not None or client_id not in (None, basic_id):
                raise OAuthError("invalid_request", "Send the client's credentials in one place: the Authorization header or the body.")
            client_id, secret = basic_id, basic_secret
        if assertion and not client_id:  # RFC 7521 4.2: the assertion names the client; whether it may is checked below
            client_id = jwt_claims(assertion).get("sub")
        if not isinstance(client_id, str) or not client_id.isascii() or not client_id:
            raise OAuthError("invalid_request", "client_id is missing.")
        client = self.find(client_id)
        if client is None:
            raise self._refused(basic, "This client is not registered here (any more); register it again.")
        # A public client that sends a stray secret is let pass: it proves nothing and hurts nothing.
        if client.secret_hash and not (secret and hmac.compare_digest(client.secret_hash, digest(secret))):
            raise self._refused(basic, "The client's secret is missing or wrong.")
        if assertion or client.auth_method == "private_key_jwt":
            self._check_assertion(client, form, assertion or "")
        return client

    def _check_assertion(self, client, form, assertion):
        try:
            if form.get("client_assertion_type") != "urn:ietf:params:oauth:client-assertion-type:jwt-bearer" or client.secret_hash:
                raise ValueError("the client has a secret, or client_assertion_type is not jwt-bearer")
            self._documents.check_assertion(client, assertion)
        except ValueError as error:
            raise self._refused(False, f"The client's assertion is missing or wrong: {error}.") from None

    @staticmethod
    def _refused(basic, sentence):
        headers = (("WWW-Authenticate", 'Basic realm="fjmcp-broker"'),) if basic else ()
        return OAuthError("invalid_client", sentence, 401, headers)

    def _basic(self, authorization):
        scheme, _, value = authorization.partition(" ")
        try:
            if scheme.lower() != "basic":
                raise ValueError
            name, colon, secret = base64.b64decode(value.strip(), validate=True).decode().partition(":")
            if not colon:
                raise ValueError
            return unquote_plus(name, errors="strict"), unquote_plus(secret, errors="strict")
        except ValueError:
            raise self._refused(True, "The Authorization header is not Basic with a client_id and a secret.") from None


# ======================================================================================================================
# Authorization
# Owns the OAuth 2.1 endpoints: metadata, authorize, consent, callback, token, revoke; and the rules of grants and tokens.
# Must not know sessions or children; that a grant ended is learnt by others from the store.
# ======================================================================================================================

GRANT_RATE = 120  # requests a minute to /token that one login may make
ACCOUNT_LIFETIME = 1800  # seconds a browser stays logged in to the account page


class PageRefusal(Exception):
    """A refusal that is shown to a person: one of NOTICES, or a page. Nothing is redirected to a URI that was not validated."""

    def __init__(self, what):
        super().__init__(what)
        self.response = notice(what) if isinstance(what, str) else what


class ClientRedirect(Exception):
    """An error that goes back to the client's validated redirect_uri (RFC 6749 4.1.2.1)."""

    def __init__(self, error, description):
        super().__init__(error)
        self.error, self.description = error, description


def parse_form(raw, refusal):
    """A form (bytes) or query as {name: [values]}; raises `refusal` when it is not clean UTF-8, or has too many fields."""
    values = {}
    try:
        raw = raw.decode("ascii") if isinstance(raw, bytes) else raw
        for name, value in parse_qsl(raw, keep_blank_values=True, max_num_fields=100, encoding="utf-8", errors="strict"):
            values.setdefault(name, []).append(value)
    except ValueError:
        raise refusal from None
    if any("\0" in value for items in values.values() for value in items):
        raise refusal
    return values


def granted_scopes(asked):
    """Of the scopes asked for, those that exist; none or only unknown ones asked means both."""
    known = [scope for scope in SCOPES if scope in asked.split()]
    return known or list(SCOPES)


def canonical_resource(values, settings):
    """Whether every `resource` means our MCP endpoint, as real clients spell it; none given means it too (RFC 8707 2)."""
    accepted = {settings.resource, settings.resource + "/", settings.public_url, settings.public_url + "/"}
    for value in values:
        scheme, separator, rest = value.partition("://")
        authority, slash, path = rest.partition("/")
        authority = authority.lower().removesuffix({"https": ":443", "http": ":80"}.get(scheme.lower(), "\0"))
        if f"{scheme.lower()}{separator}{authority}{slash}{path}" not in accepted:
            return False
    return True


class Authorization:
    """The authorization server. Its handlers take a Request and give a Response."""

    def __init__(self, settings, store, keyring, clients, upstream, forgejo, log, clock, limiter, session_ended):
        self._settings, self._store, self._keyring, self._clients = settings, store, keyring, clients
        self._session_ended = session_ended  # called with the name of a session whose row is gone
        self._upstream, self._forgejo, self._log, self._clock, self._limiter = upstream, forgejo, log, clock, limiter
        secure = settings.public_url.startswith("https:")
        self._cookie_name = "__Host-fjmcp" if secure else "fjmcp"
        self._cookie_flags = f"; Path=/; HttpOnly; SameSite=Lax{'; Secure' if secure else ''}"
        self._forgejo_host = urlsplit(settings.forgejo_url).netloc

    # -- metadata

    def metadata(self, request):
        """RFC 8414: what this authorization server offers."""
        url, methods = self._settings.public_url, {"methods_supported": list(AUTH_METHODS)}
        if self._settings.client_documents:
            methods = {"methods_supported": [*AUTH_METHODS, "private_key_jwt"], "signing_alg_values_supported": ["RS256"]}
        return json_response(200, {
            "issuer": url, "authorization_endpoint": url + "/oauth/authorize", "token_endpoint": url + "/oauth/token",
            "registration_endpoint": url + "/oauth/register", "revocation_endpoint": url + "/oauth/revoke",
            "scopes_supported": [*SCOPES, "offline_access"], "response_types_supported": ["code"], "response_modes_supported": ["query"],
            "grant_types_supported": ["authorization_code", "refresh_token"], "code_challenge_methods_supported": ["S256"],
            **{f"{endpoint}_endpoint_auth_{name}": values for endpoint in ("token", "revocation") for name, values in methods.items()},
            "authorization_response_iss_parameter_supported": True,
            "client_id_metadata_document_supported": self._settings.client_documents,
        }, (("Cache-Control", "public, max-age=300"),))

    def resource_metadata(self, request):
        """RFC 9728: which authorization server guards the MCP endpoint."""
        return json_response(200, {
            "resource": self._settings.resource, "authorization_servers": [self._settings.public_url],
            "scopes_supported": list(SCOPES), "bearer_methods_supported": ["header"], "resource_name": "Forgejo",
        }, (("Cache-Control", "public, max-age=300"),))

    # -- authorize and consent

    def authorize(self, request):
        """GET /oauth/authorize: validate, then show our own consent page. Nothing is stored and nothing goes to Forgejo yet."""
        spend(self._limiter, self._settings, "authorize", request)
        form = parse_form(request.query, PageRefusal("malformed"))
        client, redirect_uri = self._authorized_target(form)
        try:
            login = self._authorization_request(form, client, redirect_uri)
        except ClientRedirect as error:
            return self._to_client(redirect_uri, form.get("state", [None])[0], error=error.error, error_description=error.description)
        cookie, headers = self._marked_browser(request)
        box = b64url(self._keyring.seal("login", digest(cookie).hex(), {**login, "expires": self._clock.now() + self._settings.login_lifetime}))
        return consent_page(
            client_name=client.name, client_id=client.client_id, client_host=urlsplit(client.client_id).hostname if client.kind == "document" else None,
            redirect_uri=redirect_uri, may_write=WRITE in login["scope"],
            forgejo_scopes=self._settings.forgejo_oauth_scopes, forgejo_host=self._forgejo_host,
            login_box=box, csrf=self._csrf(cookie, "consent:" + box), headers=headers)

    def _authorized_target(self, form):
        """The client and its validated redirect URI; before these are known, errors are shown and never redirected."""
        if len(form.get("client_id", ())) > 1 or len(form.get("redirect_uri", ())) > 1:
            raise PageRefusal("repeated")
        client_id = form.get("client_id", [""])[0]
        client = self._clients.for_login(client_id)
        if client is None:
            raise PageRefusal("unreadable client" if client_id.startswith("https://") else "unknown client")
        redirect_uri = form.get("redirect_uri", [""])[0]
        if not any(redirect_matches(registered, redirect_uri) for registered in client.redirect_uris):
            raise PageRefusal("redirect")
        return client, redirect_uri

    def _authorization_request(self, form, client, redirect_uri):
        """Everything else about an authorization request, checked in one place; ClientRedirect says what is wrong."""
        one = {name: values[0] for name, values in form.items()}
        pkce = one.get("code_challenge_method") == "S256" and re.fullmatch(r"[A-Za-z0-9_-]{43}", one.get("code_challenge", ""))
        for wrong, error, description in (
            (any(len(values) > 1 for name, values in form.items() if name != "resource"), "invalid_request", "A parameter is given more than once"),
            ("request" in one, "request_not_supported", "Request objects are not supported"),
            ("request_uri" in one, "request_uri_not_supported", "Request objects are not supported"),
            (not one.get("response_type"), "invalid_request", "response_type is missing"),
            (one.get("response_type") != "code", "unsupported_response_type", "response_type must be code"),
            (one.get("response_mode", "query") != "query", "invalid_request", "response_mode must be query"),
            (not pkce, "invalid_request", "PKCE is required: code_challenge with code_challenge_method=S256"),
            (not canonical_resource(form.get("resource", ()), self._settings), "invalid_target", f"resource must be {self._settings.resource}"),
            (len(one.get("state", "")) > 2048 or len(one.get("scope", "")) > 4096, "invalid_request", "state or scope is too long"),
            ("none" in one.get("prompt", "").split(), "interaction_required", "A person has to consent"),
        ):
            if wrong:
                raise ClientRedirect(error, description)
        return {"client": client.client_id, "redirect_uri": redirect_uri, "state": one.get("state"), "challenge": one["code_challenge"],
                "scope": granted_scopes(one.get("scope", ""))}

    def consent(self, request):
        """POST /oauth/consent: the person's decision, believed only from the browser that was shown the page (C02 to C05)."""
        form, cookie = self._posted(request, self._cookie_name, "consent:")
        box = form.get("login", "")
        try:
            login = self._keyring.unseal("login", digest(cookie).hex(), unb64url(box))
        except ValueError:
            raise PageRefusal("wrong browser") from None
        now = self._clock.now()
        if login["expires"] <= now:
            raise PageRefusal("expired")
        decision, access = form.get("decision"), form.get("access")
        if decision not in ("approve", "deny") or (decision == "approve" and access not in ("full", "read")):
            raise PageRefusal("undecided")
        # Reading is less than writing, so read only is a narrower grant even where only forgejo:write was asked.
        granted = login["scope"] if access == "full" and WRITE in login["scope"] else [READ]
        denied = decision == "deny"
        to_forgejo = self._start_login("client", {**login, "granted": granted}, cookie, box, now, now if denied else None)
        self._log.audit("consent refused" if denied else "consent given", client=login["client"], scope=" ".join(granted))
        if denied:
            return self._to_client(login["redirect_uri"], login["state"], error="access_denied", error_description="The person refused")
        return to_forgejo

    def _start_login(self, kind, login, cookie, box, now, taken_at=None):
        """Keep a login that only this browser can finish, and send the browser to Forgejo."""
        state, verifier = new_secret(), new_secret()
        sealed = self._keyring.seal("login", digest(state).hex(), {**login, "verifier": verifier})
        if not self._store.approve_login(digest(state), digest(box), digest(cookie), kind, None if taken_at else sealed,
                                         now + self._settings.login_lifetime, taken_at):
            raise PageRefusal("answered")
        return redirect(self._forgejo.authorize_url(state, b64url(hashlib.sha256(verifier.encode()).digest())))

    # -- callback

    def callback(self, request):
        """GET /oauth/callback: Forgejo's answer, taken once and only in the browser that consented."""
        spend(self._limiter, self._settings, "authorize", request)
        form = parse_form(request.query, PageRefusal("malformed answer"))
        if any(len(values) > 1 for values in form.values()) or not form.get("state") or ("code" in form) == ("error" in form) or \
                form.get("iss", [self._settings.forgejo_url])[0].rstrip("/") != self._settings.forgejo_url:  # RFC 9207 2.4
            raise PageRefusal("malformed answer")
        state, now = form["state"][0], self._clock.now()
        row = self._store.take_login(digest(state), now)
        if row is None:
            raise PageRefusal("expired")
        cookie = self._cookie(request, self._cookie_name)
        if not cookie or not hmac.compare_digest(digest(cookie), row.browser_hash):
            raise PageRefusal("wrong browser")
        try:
            login = self._keyring.unseal("login", digest(state).hex(), row.sealed)
        except ValueError:
            raise PageRefusal("expired") from None
        try:
            info = self._logged_in(form, login["verifier"])
            return self._account_opened(info, now) if row.kind == "account" else self._client_answered(login, info, now)
        except ClientRedirect as error:
            if row.kind == "account":
                raise PageRefusal(error_page(403, "You are not logged in", f"{error.description}.")) from None
            return self._to_client(login["redirect_uri"], login["state"], error=error.error, error_description=error.description)

    def _logged_in(self, form, verifier):
        """Who logged in at Forgejo; ClientRedirect with the error of RFC 6749 4.1.2.1 otherwise, in our words: Forgejo's are not shown."""
        if "error" in form:
            denied = form["error"][0] == "access_denied"
            raise ClientRedirect("access_denied" if denied else "server_error",
                                 "The login at Forgejo was refused" if denied else "Forgejo could not log the person in")
        try:
            with self._upstream.callback():
                return self._upstream.login(form["code"][0], verifier)
        except UpstreamDown:
            raise ClientRedirect("temporarily_unavailable", "Forgejo cannot be reached just now") from None
        except (UpstreamRefused, UpstreamMisconfigured) as error:
            self._log.event("error", "login failed at forgejo", reason=str(error))
            raise ClientRedirect("server_error", "Forgejo refused the login; the operator's log says why") from None
        except NotAllowed as error:
            self._log.audit("access refused", user=error.sub, login=error.login, reason=error.reason)
            raise ClientRedirect("access_denied", error.reason) from None

    def _client_answered(self, login, info, now):
        code, code_expires = new_secret("fjc_"), now + self._settings.code_lifetime
        grant_id = self._store.finish_login(info.sub, login["client"], " ".join(login["granted"]), " ".join(login["scope"]),
                                            self._settings.resource, digest(code), login["redirect_uri"], login["challenge"], now,
                                            code_expires, code_expires)
        self._log.audit("login", user=info.sub, login=info.login, client=login["client"], grant=grant_id, scope=" ".join(login["granted"]))
        return self._to_client(login["redirect_uri"], login["state"], code=code)

    # -- account

    def account(self, request):
        """GET /account: what a user has connected; first a login, which is bound to this browser as every other is."""
        spend(self._limiter, self._settings, "authorize", request)
        cookie = self._cookie(request, self._cookie_name + "-account")
        user = self._store.account(digest(cookie), self._clock.now()) if cookie else None
        if user is None:
            browser, headers = self._marked_browser(request)
            return account_login_page(self._forgejo_host, self._csrf(browser, "account login"), headers)
        applications = {}
        for grant in self._store.grants_of(user.sub, self._clock.now()):  # several logins of one application are one to people
            name, scopes, used = applications.get(grant.client_id, (grant.name, "", 0))[:3]
            applications[grant.client_id] = (name, f"{scopes} {grant.scope}", max(used, grant.used_at))
        sessions = [(row.hash.hex(), row.name, row.created_at, row.used_at) for row in self._store.sessions_of(user.sub)[:100]]
        return account_page(user.login, [(key, *shown) for key, shown in applications.items()], sessions, self._csrf(cookie, "account"))

    def account_login(self, request):
        """POST /account/login: to Forgejo, and back to the account page."""
        _, cookie = self._posted(request, self._cookie_name, "account login")
        return self._start_login("account", {}, cookie, new_secret(), self._clock.now())

    def _account_opened(self, info, now):
        cookie = new_secret()  # a new one at each login: one that somebody planted before is worth nothing
        self._store.open_account(digest(cookie), info.sub, now + ACCOUNT_LIFETIME)
        self._log.audit("account opened", user=info.sub, login=info.login)
        response = redirect(self._settings.public_url + "/account")
        set_cookie = f"{self._cookie_name}-account={cookie}; Max-Age={ACCOUNT_LIFETIME}{self._cookie_flags}"
        return replace(response, headers=(*response.headers, ("Set-Cookie", set_cookie)))

    def account_end(self, request):
        """POST /account/end: end one application's grants, one session, or this login; nothing but the user's own."""
        form, cookie = self._posted(request, self._cookie_name + "-account", "account")
        now = self._clock.now()
        user = self._store.account(digest(cookie), now)
        if user is None:
            raise PageRefusal("expired")
        for grant in self._store.grants_of(user.sub, now):
            if grant.client_id == form.get("client"):
                self._end(grant.grant_id, "ended by the user", user.sub, grant.client_id, "token revoked")
        for session in self._store.sessions_of(user.sub):
            if session.hash.hex() == form.get("session") and self._store.end_session(session.hash):
                self._session_ended(session.hash)
        if form.get("leave"):
            self._store.close_account(digest(cookie))
        return redirect(self._settings.public_url + "/account")

    # -- token

    def token(self, request):
        """POST /oauth/token (RFC 6749 4.1.3 and 6)."""
        client, form, resources = self._authenticated(request, "code", "refresh_token")
        grant_types = {"authorization_code": self._redeem, "refresh_token": self._refresh}
        if not form.get("grant_type"):
            raise OAuthError("invalid_request", "grant_type is missing.")
        if form["grant_type"] not in grant_types:
            raise OAuthError("unsupported_grant_type", "grant_type must be authorization_code or refresh_token.")
        if not canonical_resource(resources, self._settings):
            raise OAuthError("invalid_target", f"resource must be {self._settings.resource}.")
        return json_response(200, grant_types[form["grant_type"]](client, form), NO_STORE)

    def _authenticated(self, request, *token_names):
        """(client, form, resources) of a request with a token in one of these fields.

        Whoever holds a token that we issued is limited by its grant, whatever address they share; all others by their address.
        """
        values = self._token_form(request)
        form = {name: items[0] for name, items in values.items()}
        token = next((form[name] for name in token_names if form.get(name)), "")
        row = self._store.code(digest(token)) or self._store.refresh_token(digest(token)) if token else None
        if row:
            self._limiter.spend("grant", row.grant_id, GRANT_RATE)
        else:
            spend(self._limiter, self._settings, "token", request)
        return self._clients.authenticate(request, form), form, values.get("resource", ())

    def _token_form(self, request):
        kind, _, parameters = (request.header("content-type") or "").partition(";")
        if kind.strip().lower() != "application/x-www-form-urlencoded" or "charset" in parameters.lower() and "utf-8" not in parameters.lower():
            raise OAuthError("invalid_request", "Send the parameters as application/x-www-form-urlencoded.")
        values = parse_form(request.read_body(self._settings.max_form), OAuthError("invalid_request", "The body is malformed."))
        if request.query:
            raise OAuthError("invalid_request", "Send the parameters in the body; secrets do not belong in a URL.")
        repeated = [name for name, items in values.items() if len(items) > 1 and name != "resource"]
        if repeated:
            raise OAuthError("invalid_request", f"{repeated[0][:40]} is given more than once.")
        return values

    def _redeem(self, client, form):
        verifier, code = form.get("code_verifier", ""), form.get("code", "")
        if not code:
            raise OAuthError("invalid_request", "code is missing.")
        if not re.fullmatch(r"[A-Za-z0-9._~-]{43,128}", verifier):
            raise OAuthError("invalid_request", "code_verifier is missing or malformed (RFC 7636 4.1).")
        now, pair = self._clock.now(), self._new_pair()
        challenge = b64url(hashlib.sha256(verifier.encode()).digest())
        row = self._store.code(digest(code))
        if row and row.state != "active":
            raise self._logged_out()
        grant = self._store.redeem_code(digest(code), client.client_id, form.get("redirect_uri", ""), challenge, now,
                                        *self._hashed(pair, now), CODE_ATTEMPTS)
        if grant is None:
            # A code that comes twice was stolen from one of the two: what the first made ends (RFC 6749 4.1.2).
            if row and row.used_at is not None and row.client_id == client.client_id:
                self._end(row.grant_id, "code replayed", row.sub, client.client_id, "reuse detected")
            raise OAuthError("invalid_grant", "The code is unknown, expired or used, or belongs to another request. Start again.")
        self._log.audit("token issued", user=grant.sub, client=client.client_id, grant=grant.grant_id, scope=grant.scope)
        return self._pair_answer(pair, grant.scope, self._settings.access_token_lifetime)

    def _refresh(self, client, form):
        token, now = form.get("refresh_token", ""), self._clock.now()
        row = self._store.refresh_token(digest(token)) if token.startswith("fjr_") else None
        if row is None or row.client_id != client.client_id:  # another client's mistake must not end our client's grant
            raise OAuthError("invalid_grant", "The refresh token is unknown. Log in again.")
        scope = self._narrowed(form.get("scope", ""), row.scope)
        if row.ended_at is not None or row.expires_at <= now:
            raise OAuthError("invalid_grant", "The login has ended. Log in again.")
        if row.state != "active":
            raise self._logged_out()
        for _ in range(100):
            if row.rotated_at is None:
                pair = self._new_pair()
                box = self._keyring.chained(token).seal("successor", str(row.grant_id), pair)
                grant = self._store.rotate(digest(token), scope, now, *self._hashed(pair, now), box)
                if grant:
                    self._log.audit("token refreshed", user=row.sub, client=client.client_id, grant=row.grant_id)
                    return self._pair_answer(pair, scope or row.scope, self._settings.access_token_lifetime)
            row, token, answer = self._newest(token, now, scope)
            if answer:
                return answer
        raise OAuthError("invalid_grant", "The refresh token is too old. Log in again.")

    def _newest(self, token, now, scope):
        """One step along a chain: the row and token that follow a rotated one, or the newest pair as an answer.

        A client that lost an answer, or two of its processes, re-send a token shortly after its rotation: within 120 s
        that is answered with the newest pair. Later it is theft, and the grant ends (RFC 9700 4.14.2).
        """
        row = self._store.refresh_token(digest(token))
        if row is None or row.ended_at is not None:
            raise OAuthError("invalid_grant", "The login has ended. Log in again.")
        if row.rotated_at is None:
            return row, token, None
        if now - row.rotated_at > REFRESH_GRACE:
            self._end(row.grant_id, "refresh token re-used", row.sub, row.client_id, "reuse detected")
            raise OAuthError("invalid_grant", "The refresh token was used before. Log in again.")
        try:
            pair = self._keyring.chained(token).unseal("successor", str(row.grant_id), row.successor or b"")
        except ValueError:
            raise OAuthError("invalid_grant", "The refresh token was used before. Log in again.") from None
        newer, access = self._store.refresh_token(digest(pair["refresh"])), self._store.access_token(digest(pair["access"]))
        if newer and newer.rotated_at is None and access and access.expires_at > now and scope is None:
            return row, token, self._pair_answer(pair, row.scope, access.expires_at - now)
        return newer or row, pair["refresh"], None

    @staticmethod
    def _narrowed(asked, granted):
        """The narrower scope asked for at a refresh, None for the grant's own; wider is refused (RFC 6749 6)."""
        known = [scope for scope in SCOPES if scope in asked.split()]
        if not set(known) <= set(granted.split()):
            raise OAuthError("invalid_scope", f"The login granted {granted}; log in again for more.")
        return " ".join(known) if known and known != granted.split() else None

    @staticmethod
    def _new_pair():
        return {"access": new_secret("fja_"), "refresh": new_secret("fjr_")}

    def _hashed(self, pair, now):
        return ((digest(pair["access"]), now + self._settings.access_token_lifetime),
                (digest(pair["refresh"]), now + self._settings.refresh_token_lifetime))

    @staticmethod
    def _pair_answer(pair, scope, expires_in):
        return {"access_token": pair["access"], "token_type": "Bearer", "expires_in": max(1, int(expires_in)),
                "refresh_token": pair["refresh"], "scope": scope}

    def _end(self, grant_id, reason, sub, client_id, event):
        if self._store.end_grant(grant_id, reason, self._clock.now()):
            self._log.audit(event, user=sub, client=client_id, grant=grant_id, reason=reason)

    @staticmethod
    def _logged_out():
        return OAuthError("invalid_grant", "Forgejo ended this login. Log in again.")

    def revoke(self, request):
        """POST /oauth/revoke (RFC 7009): a refresh token ends its grant, an access token only itself; always 200."""
        client, form, _ = self._authenticated(request, "token")
        token = form.get("token", "")
        if not token:
            raise OAuthError("invalid_request", "token is missing.")
        refresh, access = self._store.refresh_token(digest(token)), self._store.access_token(digest(token))
        if refresh and refresh.client_id == client.client_id:
            self._end(refresh.grant_id, "revoked by client", refresh.sub, client.client_id, "token revoked")
        elif access and access.client_id == client.client_id:
            self._store.drop_access_token(digest(token))
            self._log.audit("token revoked", client=client.client_id)
        return json_response(200, {}, NO_STORE)

    # -- shared

    def _posted(self, request, cookie_name, purpose):
        """(form, cookie) of a form that this browser was shown: its CSRF value fits the cookie, and no other site sent it (C03 to C05)."""
        spend(self._limiter, self._settings, "authorize", request)
        site = request.header("sec-fetch-site")
        if site not in (None, "same-origin") or (site is None and request.header("origin") not in (None, self._settings.public_url)):
            raise PageRefusal("foreign form")
        values = parse_form(request.read_body(self._settings.max_form), PageRefusal("malformed"))
        form = {name: items[0] for name, items in values.items() if len(items) == 1}
        cookie = self._cookie(request, cookie_name)
        if not cookie or not hmac.compare_digest(self._csrf(cookie, purpose + form.get("login", "")).encode(), form.get("csrf", "").encode()):
            raise PageRefusal("wrong browser")
        return form, cookie

    @staticmethod
    def _csrf(cookie, purpose):
        return b64url(hmac.digest(cookie.encode(), purpose.encode(), "sha256"))

    def _cookie(self, request, wanted):
        """The value of a cookie, None when it is absent or not one we made; two of the name are an attack (C16)."""
        values = [value for line in request.headers.get("cookie", ()) for name, _, value in
                  (pair.strip().partition("=") for pair in line.split(";")) if name == wanted]
        if len(values) > 1:
            raise PageRefusal("two cookies")
        return values[0] if values and re.fullmatch(r"[A-Za-z0-9_-]{43}", values[0]) else None

    def _marked_browser(self, request):
        """(the browser's cookie, made now if it has none, the headers that set it): several tabs share one (C07)."""
        cookie = self._cookie(request, self._cookie_name) or new_secret()
        return cookie, (("Set-Cookie", f"{self._cookie_name}={cookie}; Max-Age={int(self._settings.login_lifetime)}{self._cookie_flags}"),)

    def _to_client(self, redirect_uri, state, **answer):
        """The authorization response: to the validated URI, with `iss` always (RFC 9207 2) and `state` byte for byte."""
        if state is not None:
            answer["state"] = state
        query = urlencode({**answer, "iss": self._settings.public_url}, quote_via=quote)
        return redirect(redirect_uri + ("&" if "?" in redirect_uri else "?") + query)


# ======================================================================================================================
# Child
# Owns processes: how a child is started, spoken to, stopped and reaped, and that none outlives the broker.
# Must not know JSON-RPC, sessions or users.
# ======================================================================================================================

GUARDIAN_SCRIPT = r"""
trap '' TERM INT HUP
groups= announced=
while read -r what which; do
  case $what in
    '?') announced="$announced $which" ;;
    '!') left=; for each in $announced; do [ "$each" = "$which" ] || left="$left $each"; done; announced=$left ;;
    '+') groups="$groups $which" ;;
    '-') left=; for each in $groups; do [ "$each" = "$which" ] || left="$left $each"; done; groups=$left ;;
    '.') exit 0 ;;
  esac
done
sleep 1
for inode in $announced; do
  for process in /proc/[0-9]*; do
    [ "$(readlink "$process/fd/0" 2>/dev/null)" = "pipe:[$inode]" ] && groups="$groups ${process#/proc/}"
  done
done
for group in $groups; do kill -KILL "-$group" 2>/dev/null; done
"""


class ChildMissing(Exception):
    """The program is not there, or is not one."""


class ChildFailed(Exception):
    """The program could not be started just now."""


class Guardian:
    """A small shell that outlives the broker by a moment and kills what children it left, also after `kill -9`."""

    def __init__(self):
        self._lock = threading.Lock()  # guards the pipe and the two sets; a leaf
        self._groups, self._announced, self._process = set(), set(), None

    def _tell(self, line):
        """Send a line; a guardian that has died is started anew and told everything. Under the lock."""
        with contextlib.suppress(OSError):
            if self._process and self._process.poll() is None:
                self._process.stdin.write(line)
                return
        self._process = subprocess.Popen(["/bin/sh", "-c", GUARDIAN_SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                                         stderr=subprocess.DEVNULL, start_new_session=True, close_fds=True, bufsize=0, env={"PATH": os.defpath})
        lines = [f"? {inode}\n" for inode in self._announced] + [f"+ {group}\n" for group in self._groups]
        self._process.stdin.write("".join(lines).encode())

    def announce(self, inode):
        """A child whose stdin is this pipe is about to be started."""
        with self._lock:
            self._announced.add(inode)
            self._tell(f"? {inode}\n".encode())

    def started(self, inode, group):
        """The announced child runs as this process group; None: it does not run."""
        with self._lock:
            self._announced.discard(inode)
            if group:
                self._groups.add(group)
            self._tell((f"+ {group}\n" if group else "").encode() + f"! {inode}\n".encode())

    def remove(self, group):
        """The group is gone; told before its leader is reaped, so that a re-used number is never killed."""
        with self._lock:
            self._groups.discard(group)
            self._tell(f"- {group}\n".encode())

    def close(self):
        """The broker ends in order and has stopped its children."""
        with self._lock:
            if self._process:
                with contextlib.suppress(OSError):
                    self._process.stdin.write(b".\n" if not self._groups else b"")
                self._process.stdin.close()
                self._process.wait()
                self._process = None


ENVIRONMENT_PASSED = ("PATH", "HOME", "LANG", "TZ", "SSL_CERT_FILE", "SSL_CERT_DIR", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY",
                      "http_proxy", "https_proxy", "no_proxy")


def child_environment(settings, access_token):
    """A child's whole environment: an allow-list and the user's own token. Nothing else of ours is inherited (P01, P02)."""
    passed = {name: os.environ[name] for name in ENVIRONMENT_PASSED if name in os.environ}
    return {**passed, "FORGEJO_ACCESS_TOKEN": access_token, "FORGEJO_URL": settings.forgejo_url,
            "FORGEJO_USER_AGENT": f"fjmcp-broker/{__version__}"}


def child_command(settings):
    """A child's arguments, from the configuration alone (P08); ChildMissing when the program cannot be found."""
    command = settings.forgejo_mcp_binary
    name = command if isinstance(command, str) else command[0]
    path = shutil.which(name)
    if path is None:
        raise ChildMissing(f"{name} is not an executable program")
    return [path, "--transport", "stdio", "--url", settings.forgejo_url] if isinstance(command, str) else [path, *command[1:]]


class Child:
    """A running child: lines in, lines out, and a certain end.

    `on_line(bytes)` is called for each line of output and `on_end(child)` once, both in the stdout reader's thread.
    """

    def __init__(self, command, environment, label, guardian, settings, log, on_line, on_end):
        self._guardian, self._settings, self._log, self._label = guardian, settings, log, label
        self._on_line, self._on_end = on_line, on_end
        self._write_lock = threading.Lock()  # one whole line at a time
        self._stop_lock = threading.Lock()  # guards reason and the ladder; a leaf
        self._reason, self._kill_at, self._killed, self._drop_pipes_at = None, None, False, None
        self.reason, self.ended = None, threading.Event()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self._spawn(command, environment)
        except BaseException:
            os.close(self._wake)
            raise
        os.set_blocking(self._stdin, False)
        self._stderr_thread = threading.Thread(target=self._read_stderr, daemon=True, name=f"stderr-{self.pid}")
        try:
            self._stderr_thread.start()
            threading.Thread(target=self._read_stdout, daemon=True, name=f"stdout-{self.pid}").start()
        except RuntimeError:  # no thread to be had: what was started must not stay behind
            self._on_end = lambda child: None
            self.kill("no thread")
            self._finish()
            raise ChildFailed("no thread can be started") from None

    def _spawn(self, command, environment):
        read_end, write_end = os.pipe()
        inode = os.fstat(read_end).st_ino
        self._guardian.announce(inode)
        group = None
        try:
            self._process = subprocess.Popen(command, env=environment, stdin=read_end, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                             start_new_session=True, close_fds=True, bufsize=0)
            group = self.pid = self._process.pid
        except (FileNotFoundError, PermissionError) as error:
            os.close(write_end)
            raise ChildMissing(f"{command[0]}: {error.strerror}") from None
        except OSError as error:
            os.close(write_end)
            raise ChildFailed(f"{command[0]}: {error.strerror}") from None
        finally:
            os.close(read_end)
            self._guardian.started(inode, group)
        self._stdin = write_end

    @property
    def alive(self):
        """Whether it runs and has not been told to stop."""
        return self._reason is None and not self.ended.is_set()

    def send(self, line, deadline=10.0):
        """Write a line; False when the child is gone or does not read. Half a line cannot be taken back, so that ends the child."""
        data, end = memoryview(line + b"\n"), time.monotonic() + deadline
        with self._write_lock:
            while data:
                if self._stdin is None:
                    return False
                try:
                    data = data[os.write(self._stdin, data):]
                except BlockingIOError:
                    poll = select.poll()
                    poll.register(self._stdin, select.POLLOUT)
                    if not self.alive or not poll.poll(max(0, min(1.0, end - time.monotonic())) * 1000) and time.monotonic() >= end:
                        self.kill("stuck")
                        return False
                except OSError:
                    return False
        return True

    def stop(self, reason):
        """Begin the end: close stdin, SIGTERM; tick() goes on to SIGKILL. The first reason stays."""
        with self._stop_lock:
            if self._reason is not None or self.ended.is_set():
                return
            self._reason, self._kill_at = reason, time.monotonic() + self._settings.stop_timeout
        with self._write_lock:
            self._close_stdin()
        self._signal(signal.SIGTERM)

    def kill(self, reason):
        """End it now."""
        with self._stop_lock:
            if self.ended.is_set():
                return
            self._reason = self._reason or reason
            self._kill_at, self._killed = time.monotonic(), True
        self._signal(signal.SIGKILL)

    def tick(self):
        """Advance the end: SIGKILL when SIGTERM was not enough; free the readers when a grandchild holds the pipes of a dead child."""
        now = time.monotonic()
        with self._stop_lock:
            if self.ended.is_set():
                return
            kill = self._kill_at is not None and now >= self._kill_at and not self._killed
            self._killed = self._killed or kill
        if kill:
            self._signal(signal.SIGKILL)
        if self._dead():
            self._signal(signal.SIGKILL)
            if self._drop_pipes_at is None:
                self._drop_pipes_at = now + 1
            elif now >= self._drop_pipes_at:
                with self._stop_lock:
                    if not self.ended.is_set():  # after that the number may be another file's
                        os.eventfd_write(self._wake, 1)

    def _dead(self):
        with contextlib.suppress(ChildProcessError):
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        return True

    def _signal(self, number):
        """Signal the whole group; its number cannot be another's, since the leader is reaped last."""
        with self._stop_lock:
            if not self.ended.is_set():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.pid, number)

    def _close_stdin(self):
        if self._stdin is not None:
            os.close(self._stdin)
            self._stdin = None

    def _chunks(self, pipe):
        """What comes out of a pipe, until its end or until tick() gives it up."""
        descriptor, poll = pipe.fileno(), select.poll()
        poll.register(descriptor, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if descriptor not in ready and self._wake in ready:
                return
            chunk = os.read(descriptor, 65536)
            if not chunk:
                return
            yield chunk
            if self._wake in ready:
                return

    def _read_stdout(self):
        try:
            self._read_lines()
        except Exception as error:
            self._log.event("error", "reader failed", user=self._label, error=f"{type(error).__name__}: {error}")
        self._finish()

    def _read_lines(self):
        parts, size = [], 0
        for chunk in self._chunks(self._process.stdout):
            *lines, rest = chunk.split(b"\n")
            for line in lines:
                parts.append(line)
                whole, parts, size = b"".join(parts), [], 0
                if len(whole) > self._settings.max_line:
                    self.kill("line_too_long")
                    return
                if whole.strip():
                    self._on_line(whole)
            parts.append(rest)
            size += len(rest)
            if size > self._settings.max_line:
                self.kill("line_too_long")
                return

    def _read_stderr(self):
        window, lines = time.monotonic(), 0
        for chunk in self._chunks(self._process.stderr):
            if time.monotonic() - window > 1:
                window, lines = time.monotonic(), 0
            for line in chunk.splitlines():
                lines += 1
                if lines <= 50:
                    self._log.event("debug", "child stderr", user=self._label, line=line[:2000].decode("utf-8", "replace"))

    def _finish(self):
        """The output has ended: so does the process. Only then is it reaped and reported, once."""
        self.stop("exited")
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        self._signal(signal.SIGKILL)  # stragglers of its group
        self._guardian.remove(self.pid)
        os.eventfd_write(self._wake, 1)
        if self._stderr_thread.ident:
            self._stderr_thread.join()
        with self._stop_lock:
            self.ended.set()
        status = self._process.wait()
        if self._reason == "exited":
            self._reason = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
        self.reason = self._reason
        with self._write_lock:
            self._close_stdin()
        for pipe in (self._process.stdout, self._process.stderr):
            pipe.close()
        os.close(self._wake)
        self._on_end(self)


# ======================================================================================================================
# Session
# Owns the life of a session: its calls, its streams, and the child that serves it now: wake, replay, replace, sleep, end.
# Must not know HTTP, tokens or other sessions; places and credentials it asks of the registry it was given.
# ======================================================================================================================

class Call:
    """One request on its way through a child: where its answer goes, and what must be restored in it."""

    __slots__ = ("id", "method", "params", "stream", "reader", "streamable", "transform", "after", "deadline", "token", "internal",
                 "answered")

    def __init__(self, request_id, method, params, stream, *, deadline, streamable=True, transform=None, after=None, internal=False):
        self.id, self.method, self.params, self.stream = request_id, method, params, stream
        self.streamable, self.transform, self.after, self.internal = streamable, transform, after, internal
        self.deadline, self.token, self.answered = deadline, None, False
        self.reader = stream.open() if internal else None

    def answer(self, line, message):
        """Pass the child's answer on, under the client's own id."""
        self.answered = True
        if self.transform and "result" in message.body:
            data = result_message(self.id, self.transform(message.body["result"]))
        else:
            data = with_id(line, message, self.id)
        if self.after and "result" in message.body:
            self.after(message.body["result"])
        self.stream.put(data, answer=True)

    def fail(self, reason, sentence, *, retryable, outcome_unknown=True, code=SERVER_ERROR):
        """Answer with an error of the broker's own (design 5: the table of cases)."""
        self.answered = True
        data = {"reason": reason, "outcome_unknown": outcome_unknown, "retryable": retryable}
        self.stream.put(error_message(self.id, code, sentence, data), answer=True)

    def wait(self, seconds):
        """For the broker's own calls: the answer's body, or None."""
        deadline = time.monotonic() + seconds
        while (item := self.reader.take(max(0.0, deadline - time.monotonic()))) is not None:
            self.reader.taken(item)
            if item.answer:
                return json.loads(item.data)
        return None


@dataclass
class Question:
    """A request of the child that its client has to answer."""

    link: object
    id: object
    call: object
    deadline: float
    asked_at: float


class Link:
    """A child together with what is under way on it. Its maps are guarded by the session's lock."""

    def __init__(self, session, seq, fresh_until):
        self.session, self.seq, self.fresh_until = session, seq, fresh_until  # of the credential that the child holds
        self.pending = {}  # our id towards the child -> Call
        self.numbers = itertools.count(1)
        self.child, self.bad_lines, self.initialized, self.used_at = None, 0, False, time.monotonic()
        self.stray = 0

    @property
    def alive(self):
        """Whether the child can still be spoken to."""
        return self.child is not None and self.child.alive

    def register(self, call):
        """Give a call its number; under the session's lock. The line to send is the answer."""
        number = next(self.numbers)
        self.pending[number] = call
        self.used_at = time.monotonic()
        body = {"jsonrpc": "2.0", "id": number, "method": call.method}
        params = call.params
        if params is not None:
            meta = params.get("_meta")
            if isinstance(meta, dict) and "progressToken" in meta:
                call.token = meta["progressToken"]
                params = {**params, "_meta": {**meta, "progressToken": number}}
            body["params"] = params
        return dump(body)

    def call(self, method, params, seconds):
        """A call of the broker's own; the answer's body, or None when there was none in time."""
        call = Call(0, method, params, Stream(answers=1), deadline=time.monotonic() + seconds, internal=True)
        with self.session.lock:
            line = self.register(call)
        if not self.child.send(line):
            return None
        return call.wait(seconds)

    def notify(self, method, params=None):
        """Send a notification to the child."""
        return self.child.send(dump({"jsonrpc": "2.0", "method": method} | ({"params": params} if params is not None else {})))

    def on_line(self, line):
        """A line of the child's output; in the child's reader thread."""
        if self.bad_lines >= 100:  # it was told to end; what it wrote before counts no more
            return
        try:
            message = classify(read_child_json(line))
        except (ValueError, RecursionError):
            self.bad_lines += 1
            self.session.log.event("warning", "bad line from child", user=self.session.sub, count=self.bad_lines)
            if self.bad_lines >= 100:
                self.child.kill("bad_lines")
            return
        self.bad_lines = 0
        if message.kind == "response":
            self._answered(line, message)
        else:
            self.session.from_child(self, message)

    def _answered(self, line, message):
        with self.session.lock:
            call = self.pending.pop(message.id, None) if isinstance(message.id, int) else None
        if call is None:
            self.stray += 1
            self.session.log.event("debug", "stray answer from child", user=self.session.sub)
            return
        self.used_at = time.monotonic()
        call.answer(line, message)
        self.session.call_ended(self, call, message)

    def on_end(self, child):
        """The child has ended; in its reader thread, once."""
        self.session.link_ended(self)


class Wake:
    """One start of a child that several requests wait for."""

    def __init__(self):
        self.done, self.link, self.error = threading.Event(), None, None


class Session:
    """A client's session, or (durable=False) the pool that serves a client's requests without a session id.

    `lock` guards link, draining, waking, questions, streams and the links' maps; it is never held across a spawn, a send or a wait.
    """

    def __init__(self, registry, name, sub, client_id, initialize, *, version=None, log_level=None, subscriptions=(), tools_hash=None,
                 durable=True):
        self.registry, self.settings, self.log = registry, registry.settings, registry.log
        self.name, self.sub, self.client_id, self.durable = name, sub, client_id, durable
        self.initialize, self.version, self.log_level = initialize, version, log_level
        self.subscriptions, self.tools_hash = set(subscriptions), tools_hash
        self.lock = threading.Lock()
        self.link, self.draining, self.waking, self.ended = None, set(), None, False
        self.questions, self.streams, self.question_numbers = {}, collections.OrderedDict(), itertools.count(1)
        self.get_stream = self._new_stream(0)
        self.failures, self.retry_at, self.failure, self.server = 0, 0.0, None, None
        self.used_at = self.saved_at = registry.clock.now()
        self.hints = None

    def _new_stream(self, answers):
        return Stream(self.settings.stream_events, self.settings.stream_bytes, self.settings.write_timeout + 5, answers)

    # -- requests, notifications and answers of the client

    def submit(self, messages, *, streamable=True, transform=None):
        """Send requests to the child, waking it if need be; a Stream that will carry their answers, already with its reader.

        Raises RpcError when the child cannot be had or too much is in flight.
        """
        stream = self._new_stream(len(messages))
        reader = stream.open()
        deadline = time.monotonic() + self.settings.request_timeout
        calls = [Call(m.id, m.method, m.params, stream, deadline=deadline, streamable=streamable, transform=transform and transform(m),
                      after=self._after(m)) for m in messages]
        self.used_at = self.registry.clock.now()
        for _ in range(3):
            link = self._awake()
            with self.lock:
                if self.ended or link is not self.link or not link.alive:
                    continue
                in_flight = sum(not call.internal for each in (link, *self.draining) for call in each.pending.values())
                if in_flight + len(calls) > self.settings.max_inflight:
                    raise RpcError(SERVER_ERROR, "Too many requests of this session are in flight; wait for answers.",
                                   {"reason": "busy", "outcome_unknown": False, "retryable": True}, 429, (("Retry-After", "1"),))
                lines = [link.register(call) for call in calls]
                if self.durable:
                    self.streams[stream.key] = stream
            for line in lines:
                link.child.send(line)  # a child that died meanwhile answers through link_ended
            return reader
        raise self._unavailable("child_died", "The tool process ended again and again.")

    def _after(self, message):
        """What a successful answer changes that has to be replayed to a new child."""
        params = message.params or {}
        if message.method == "logging/setLevel" and self.durable:
            return lambda result: self._remember(log_level=params.get("level"))
        if message.method == "resources/subscribe" and isinstance(params.get("uri"), str):
            return lambda result: self._remember(subscribe=params["uri"])
        if message.method == "resources/unsubscribe" and isinstance(params.get("uri"), str):
            return lambda result: self._remember(unsubscribe=params["uri"])
        if message.method == "tools/list" and not params.get("cursor") and self.durable:
            return lambda result: self._remember(tools_hash=tools_digest(result))
        return None

    def _remember(self, log_level=None, subscribe=None, unsubscribe=None, tools_hash=None):
        before = (self.log_level, frozenset(self.subscriptions), self.tools_hash)
        with self.lock:
            self.log_level = log_level or self.log_level
            self.subscriptions |= {subscribe} - {None}
            self.subscriptions -= {unsubscribe}
            self.tools_hash = tools_hash or self.tools_hash
            after = (self.log_level, frozenset(self.subscriptions), self.tools_hash)
        if self.durable and before != after:
            with contextlib.suppress(StoreUnavailable):  # what is lost is a replay's detail, not the answer
                self.registry.store.update_session(self.name, self.log_level, self.subscriptions, self.tools_hash)

    def notify(self, message):
        """A notification of the client: cancellation is translated, others go to a child that is awake."""
        with self.lock:
            link = self.link
        self.used_at = self.registry.clock.now()
        if message.method == "notifications/cancelled":
            self._cancel((message.params or {}).get("requestId"), message.params)
        elif link and message.method == "notifications/initialized":
            if not link.initialized:
                link.initialized = True
                link.notify(message.method, message.params)
        elif link:
            link.notify(message.method, message.params)

    def _cancel(self, request_id, params):
        with self.lock:
            found = [(link, number, call) for link in (self.link, *self.draining) if link for number, call in link.pending.items()
                     if not call.internal and call.id == request_id and type(call.id) is type(request_id)]
            if not found:
                return
            link, number, call = found[-1]
            del link.pending[number]
        link.notify("notifications/cancelled", {**params, "requestId": number})
        call.fail("cancelled", "The request was cancelled.", retryable=False)
        self.call_ended(link, call, None)

    def reply(self, message):
        """The client's answer to a question of the child; one that nobody asked is dropped (J07)."""
        with self.lock:
            question = self.questions.pop(message.id, None) if isinstance(message.id, str) else None
            if question and question.call:  # the clock stood while the client owed the answer
                question.call.deadline += time.monotonic() - question.asked_at
        if question:
            question.link.child.send(dump({**message.body, "id": question.id}))

    # -- what the child says of itself

    def from_child(self, link, message):
        """Route a notification or question of the child: to the request it belongs to, else where the client listens."""
        params = message.params or {}
        if message.method == "notifications/progress":
            with self.lock:
                call = link.pending.get(params.get("progressToken")) if isinstance(params.get("progressToken"), int) else None
            if call and call.token is not None and call.streamable:
                call.stream.put(dump({**message.body, "params": {**params, "progressToken": call.token}}))
        elif message.kind == "request":
            self._ask(link, message)
        elif message.method == "notifications/cancelled":
            self._withdraw(link, message)
        else:
            stream, _ = self._target(link)
            if stream:
                stream.put(dump(message.body))

    def _target(self, link):
        """The stream for what belongs to no request by itself, and the call it is taken to belong to."""
        with self.lock:
            calls = [call for each in {link, self.link, *self.draining} - {None} for call in each.pending.values() if not call.internal]
            here = [call for call in link.pending.values() if not call.internal]
            if len(calls) == 1 and calls[0].streamable and calls[0].stream.is_open:
                return calls[0].stream, calls[0] if here else None
            if not self.durable:  # a shared child: nothing is attributed by guess
                return None, None
            if self.get_stream.is_open:
                return self.get_stream, here[0] if len(here) == 1 else None
            still_open = [call for call in calls if call.streamable and call.stream.is_open]
            return (still_open[-1].stream if still_open else self.get_stream), here[0] if len(here) == 1 else None

    def _ask(self, link, message):
        if not self.durable:
            self._refuse_question(link, message.id, METHOD_NOT_FOUND, "This client was not said to answer questions")
            return
        stream, call = self._target(link)
        now = time.monotonic()
        limit = self.settings.input_timeout if stream.is_open else QUESTION_GRACE
        with self.lock:
            number = f"{stream.key}.{next(self.question_numbers)}"
            self.questions[number] = Question(link, message.id, call, now + limit, now)
        stream.put(dump({**message.body, "id": number}))

    @staticmethod
    def _refuse_question(link, question_id, code, sentence):
        link.child.send(error_message(question_id, code, sentence))

    def _withdraw(self, link, message):
        asked = (message.params or {}).get("requestId")
        with self.lock:
            numbers = [number for number, question in self.questions.items() if question.link is link and question.id == asked]
            for number in numbers:
                del self.questions[number]
        stream, _ = self._target(link)
        for number in numbers:
            stream.put(dump({**message.body, "params": {**message.params, "requestId": number}}))

    # -- the child: wake, replay, replace, sleep, end

    def _awake(self):
        """The link to an initialized child; one request starts it, the others wait for that start."""
        with self.lock:
            if self.ended:
                raise session_not_found()
            if self.link and self.link.alive and (self.settings.child_keeps_state or self.registry.clock.now() < self.link.fresh_until):
                return self.link
            if self.failures >= 3 and time.monotonic() < self.retry_at:
                raise self.failure
            wake, leader = self.waking or Wake(), self.waking is None
            self.waking = wake
        if leader:
            self._wake(wake, replay=True)
        elif not wake.done.wait(PLACE_WAIT + self.settings.start_timeout + 30):
            raise self._unavailable("starting_failed", "The tool process did not start in time.")
        if wake.error:
            raise wake.error
        return wake.link

    def open(self):
        """Start the first child of a new session with the client's own `initialize`; the child's result."""
        wake = self.waking = Wake()
        self._wake(wake, replay=False)
        if wake.error:
            raise wake.error
        return self.server

    def _wake(self, wake, replay):
        """Start a child and put it in place. Whatever happens, who waits for `wake` is told, and the next may try again."""
        error, link = None, None
        try:
            link = self._start(replay)
        except (RpcError, Refusal) as problem:
            error = problem
        except BaseException as problem:
            self.log.event("error", "start failed", user=self.sub, error=type(problem).__name__)
            error = self._unavailable("starting_failed", "The tool process could not be started.")
            if not isinstance(problem, Exception):
                raise
        finally:
            with self.lock:
                if link and self.ended:
                    error, link = session_not_found(), self._retire(link)
                old, self.waking = self.link if self.link is not link else None, None
                if link:
                    self.link, self.failures = link, 0
                    self.draining |= {old} - {None}
                elif error and isinstance(error, RpcError):
                    self.failures, self.failure = self.failures + 1, error
                    self.retry_at = time.monotonic() + min(60, 2 ** max(0, self.failures - 3))
                wake.link, wake.error = link, error
            wake.done.set()
            if link and old:
                self._stop_if_drained(old)

    @staticmethod
    def _retire(link):
        link.child.stop("session ended")

    def _start(self, replay):
        access, seq, fresh_until = self.registry.credential(self.sub)
        with self.lock:
            if self.link and self.link.alive and self.link.seq == seq:  # nothing newer was to be had
                return self.link
        self.registry.take_place(self)
        link = Link(self, seq, fresh_until)
        try:
            link.child = self.registry.spawn(access, self.sub, link)
        except BaseException:
            self.registry.release_place(self)
            raise
        self.log.audit("child started", user=self.sub, client=self.client_id, pid=link.child.pid, replay=replay)
        params = self.initialize if not replay or not self.version else {**self.initialize, "protocolVersion": self.version}
        answer = link.call("initialize", params, self.settings.start_timeout)
        if answer is None or "error" in answer and link.child.ended.is_set():
            link.child.stop("no answer to initialize")
            raise self.registry.why_not_started(self.sub, access)
        if "error" in answer:
            link.child.stop("initialize refused")
            error = answer["error"]
            raise RpcError(error["code"], str(error.get("message", "")), error.get("data"))
        result = answer["result"]
        if not isinstance(result, dict) or not isinstance(result.get("protocolVersion"), str):
            link.child.stop("initialize answered wrongly")
            raise self._unavailable("starting_failed", "The tool process does not speak MCP.")
        self._initialized(link, result, replay)
        return link

    def _initialized(self, link, result, replay):
        if not replay:
            self.server, self.version = result, result["protocolVersion"]
            return
        if self.version and result["protocolVersion"] != self.version:
            self.log.event("warning", "child speaks another version", user=self.sub, was=self.version, now=result["protocolVersion"])
        self.version = self.version or result["protocolVersion"]
        link.initialized = True
        link.notify("notifications/initialized")
        for method, params in self._to_replay():
            link.call(method, params, QUESTION_GRACE)
        if self.tools_hash:
            self._compare_tools(link)

    def _to_replay(self):
        if self.log_level:
            yield "logging/setLevel", {"level": self.log_level}
        for uri in sorted(self.subscriptions):
            yield "resources/subscribe", {"uri": uri}

    def _compare_tools(self, link):
        """Tell the client when the new child has other tools than the one it knew; the comparison holds up nobody."""
        def compare(result):
            digest_now = tools_digest(result)
            if digest_now != self.tools_hash:
                self._remember(tools_hash=digest_now)
                self.hints = None
                self.get_stream.put(dump({"jsonrpc": "2.0", "method": "notifications/tools/list_changed"}))

        call = Call(0, "tools/list", {}, Stream(answers=1), deadline=time.monotonic() + 60, internal=True, after=compare)
        with self.lock:
            line = link.register(call)
        link.child.send(line)

    def replace(self):
        """Serve the session with a child that holds the user's newest token: an idle child is put to sleep, a busy one relieved."""
        if self.settings.child_keeps_state or self.sleep("token rotated"):
            return
        with self.lock:
            if self.ended or self.waking or not self.link:
                return
            self.waking = wake = Wake()
        threading.Thread(target=self._wake, args=(wake, True), daemon=True).start()

    def sleep(self, reason):
        """Stop an idle child, keep the session; False when it is busy or there is none."""
        with self.lock:
            link = self.link
            if not link or self.waking or self._busy(link):
                return False
            self.link = None
        link.child.stop(reason)
        return True

    def _busy(self, link):
        return bool(link.pending) or any(question.link is link for question in self.questions.values())

    @property
    def keeps_nothing(self):
        """Whether it has no child, no reader, and nothing that a client has not taken."""
        streams = [self.get_stream, *self.streams.values()]
        return not (self.link or self.draining or self.waking) and all(stream.is_taken and not stream.is_open for stream in streams)

    def idle_since(self):
        """Since when (monotonic) the child has had nothing to do; None while it is busy or asleep."""
        with self.lock:
            return self.link.used_at if self.link and not self.waking and not self._busy(self.link) else None

    def call_ended(self, link, call, message):
        """A call has its answer: drained children go, waiting requests may get the place, a refusal by Forgejo is looked into."""
        if link is not self.link:
            self._stop_if_drained(link)
        self.registry.place_may_be_free()
        if message and call.method == "tools/call" and message.body.get("error", {}).get("code") == INTERNAL_ERROR:
            self.registry.tool_refused(self.sub)

    def _stop_if_drained(self, link):
        with self.lock:
            stop = link in self.draining and not self._busy(link)
        if stop:
            link.child.stop("replaced")

    def link_ended(self, link):
        """A child has ended: what was in flight on it is answered, its questions are moot, its place is free."""
        reason = link.child.reason
        with self.lock:
            if self.link is link:
                self.link = None
            self.draining.discard(link)
            calls, link.pending = list(link.pending.values()), {}
            for number in [n for n, question in self.questions.items() if question.link is link]:
                del self.questions[number]
        for call in calls:
            call.fail("child_died", f"The tool process ended ({reason}) before it answered; whether it did anything is not known.",
                      retryable=True)
        self.registry.release_place(self)
        self.log.audit("child stopped", user=self.sub, client=self.client_id, pid=link.child.pid, reason=reason)

    def tick(self, now):
        """Answer what has waited too long (monotonic time `now`); called by the reaper."""
        with self.lock:
            links = [link for link in (self.link, *self.draining) if link]
            asked = {id(question.call) for question in self.questions.values() if question.call}
            late = [(link, number) for link in links for number, call in link.pending.items()
                    if call.deadline <= now and id(call) not in asked]
            late = [(link, number, link.pending.pop(number)) for link, number in late]
            stale = [self.questions.pop(n) for n in [n for n, question in self.questions.items() if question.deadline <= now]]
            for question in stale:
                if question.call:
                    question.call.deadline += now - question.asked_at
            for key in [key for key, stream in self.streams.items() if stream.finished and stream.is_taken][:-8]:
                del self.streams[key]
            while len(self.streams) > 64:
                self.streams.popitem(last=False)
        for question in stale:
            self._refuse_question(question.link, question.id, SERVER_ERROR, "The client did not answer in time")
        for link, number, call in late:
            link.notify("notifications/cancelled", {"requestId": number, "reason": "timed out"})
            call.fail("timed_out", "The tool did not answer in time; whether it did anything is not known.", retryable=False)
            self.call_ended(link, call, None)
        for link in links:
            link.child.tick()
            if link is not self.link:
                self._stop_if_drained(link)

    def end(self, reason):
        """The session is over: its child stops, its streams end, what is in flight is answered."""
        with self.lock:
            if self.ended:
                return
            self.ended = True
            links, self.link = [link for link in (self.link, *self.draining) if link], None
            calls = [call for link in links for call in link.pending.values()]
            for link in links:
                link.pending = {}
            streams = [self.get_stream, *self.streams.values()]
        for call in calls:
            call.fail("session_ended", f"The session ended ({reason}); whether the call did anything is not known.", retryable=False)
        for link in links:
            link.child.stop(reason)
        for stream in streams:
            stream.end()
        if self.durable:
            self.log.audit("session ended", user=self.sub, client=self.client_id, reason=reason)

    # -- streams and tools

    def stream_after(self, event_id):
        """The stream and number that a Last-Event-ID names; the session's own stream when it names none of ours."""
        key, _, number = (event_id or "").rpartition("-")
        with self.lock:
            stream = self.get_stream if key == self.get_stream.key else self.streams.get(key)
        if stream is None or not re.fullmatch(r"[0-9]{1,15}", number):
            return self.get_stream, None
        return stream, int(number)

    def tool_reads(self, name):
        """Whether a tool only reads: by its name, else by a readOnlyHint of true; a hint of false decides nothing."""
        if name_reads(name, self.settings):
            return True
        if self.hints is None:
            self.hints = self._read_hints()
        return name in self.hints

    def _read_hints(self):
        link, cursor, names = self._awake(), None, set()
        for _ in range(100):
            answer = link.call("tools/list", {"cursor": cursor} if cursor else {}, QUESTION_GRACE)
            result = (answer or {}).get("result")
            if not isinstance(result, dict):
                break
            names |= {tool.get("name") for tool in result.get("tools", ()) if isinstance(tool, dict) and hint_reads(tool)}
            cursor = result.get("nextCursor")
            if not isinstance(cursor, str):
                break
        return names

    @staticmethod
    def _unavailable(reason, sentence):
        return RpcError(SERVER_ERROR, sentence, {"reason": reason, "outcome_unknown": False, "retryable": True}, 503, (("Retry-After", "2"),))


def session_not_found():
    """The answer for a session that has ended, expired, is somebody else's or never was: always the same."""
    return RpcError(SESSION_NOT_FOUND, "Session not found. Start a new one with initialize.", None, 404)


def name_reads(name, settings):
    """Whether a tool's name is one of `read_only_tools`."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in settings.read_only_tools)


def hint_reads(tool):
    """Whether a tool says of itself that it only reads."""
    annotations = tool.get("annotations")
    return isinstance(annotations, dict) and annotations.get("readOnlyHint") is True


def tools_digest(result):
    """A fingerprint of a tools/list result."""
    return hashlib.sha256(json.dumps(result.get("tools") if isinstance(result, dict) else None, sort_keys=True).encode()).digest()


# ======================================================================================================================
# Registry and reaper
# Owns which sessions are in memory and who has a place among the children; and everything that happens by the clock.
# Must not know HTTP or what a message says.
# ======================================================================================================================

class Registry:
    """Sessions and pools by name, places for children, and the way to credentials.

    `lock` (a condition) guards the maps and counts; dict work only, taken after a session's lock if both.
    """

    def __init__(self, settings, store, upstream, forgejo, guardian, log, clock):
        self.settings, self.store, self.upstream, self.forgejo = settings, store, upstream, forgejo
        self.guardian, self.log, self.clock = guardian, log, clock
        self.lock = threading.Condition()
        self.sessions, self.pools, self.places, self.waiting = {}, {}, collections.Counter(), 0
        self.closing = False

    # -- sessions

    def open(self, sub, client_id, initialize):
        """A new session with its first child: (session id, the child's initialize result)."""
        session_id, now = new_secret(), self.clock.now()
        name = digest(session_id)
        session = Session(self, name, sub, client_id, initialize)
        server = session.open()
        with self.lock:
            self.sessions[name] = session
        try:
            too_many = self.store.add_session(name, sub, client_id, session.version, initialize, server, now,
                                              self.settings.max_session_rows_per_user)
        except BaseException:
            self.forget([name], "could not be saved")
            raise
        self.log.audit("session opened", user=sub, client=client_id, version=session.version)
        self.forget(too_many, "too many sessions of this user")
        return session_id, server

    def find(self, session_id, sub, client_id):
        """The session of an id if it is this user's and client's; RpcError 404 for every other case, always the same."""
        name = digest(session_id)
        with self.lock:
            session = self.sessions.get(name)
        if session is None:
            row = self.store.session(name, sub, client_id)
            if row is None:
                raise session_not_found()
            found = Session(self, name, sub, client_id, json.loads(row.initialize), version=row.protocol_version, log_level=row.log_level,
                            subscriptions=json.loads(row.subscriptions), tools_hash=row.tools_hash)
            with self.lock:
                session = self.sessions.setdefault(name, found)
        if session.ended or (session.sub, session.client_id) != (sub, client_id):
            raise session_not_found()
        session.used_at = self.clock.now()  # from here on it is not unloaded
        return session

    def pool(self, sub, client_id):
        """The pool that serves a client's requests without a session id: a child that was told no capabilities."""
        with self.lock:
            if (sub, client_id) not in self.pools:
                initialize = {"protocolVersion": LEGACY_VERSIONS[0], "capabilities": {},
                              "clientInfo": {"name": "fjmcp-broker", "version": __version__}}
                self.pools[sub, client_id] = Session(self, (sub, client_id), sub, client_id, initialize, durable=False)
            pool = self.pools[sub, client_id]
            pool.used_at = self.clock.now()
            return pool

    def delete(self, session):
        """The client ends its session."""
        self.store.end_session(session.name)
        self.forget([session.name], "deleted by client")

    def forget(self, names, reason):
        """End sessions that the store has dropped, and pools that nobody may use any more."""
        for name in names:
            with self.lock:
                session = self.sessions.pop(name, None) or self.pools.pop(name, None)
            if session:
                session.end(reason)

    def save_uses(self):
        """Write down when sessions were last used, those that were since the last time."""
        used = {session.name: session.used_at for session in self.all() if session.durable and session.used_at > session.saved_at}
        if used:
            self.store.touch_sessions(used)
            for session in self.all():
                session.saved_at = used.get(session.name, session.saved_at)

    def unload(self, before):
        """Drop from memory what sleeps, was not used since, and keeps nothing for a client: the row is enough to come back."""
        with self.lock:
            for kept in (self.sessions, self.pools):
                for name in [name for name, session in kept.items() if session.used_at < before and session.keeps_nothing]:
                    del kept[name]

    def all(self):
        """Every session and pool in memory."""
        with self.lock:
            return [*self.sessions.values(), *self.pools.values()]

    def counts(self):
        """(sessions on file, children)."""
        return self.store.count_sessions(), sum(self.places.values())

    # -- places among max_sessions

    def take_place(self, session):
        """Wait for a place for a child, putting the longest idle one to sleep; RpcError 503 after 20 s."""
        deadline = time.monotonic() + PLACE_WAIT
        while True:
            with self.lock:
                own = self.places[session.sub] >= self.settings.max_sessions_per_user
                if not own and sum(self.places.values()) < self.settings.max_sessions:
                    self.places[session.sub] += 1
                    return
                others = [each for each in (*self.sessions.values(), *self.pools.values())
                          if each is not session and (not own or each.sub == session.sub)]
                self.waiting += 1
            try:
                idle = [(since, index, each) for index, each in enumerate(others) if (since := each.idle_since()) is not None]
                if idle and not self.settings.child_keeps_state:
                    min(idle)[2].sleep("place needed")
                with self.lock:
                    if time.monotonic() >= deadline or self.closing:
                        raise RpcError(SERVER_ERROR, "All places for tool processes are busy; try again in a moment.",
                                       {"reason": "busy", "outcome_unknown": False, "retryable": True}, 503, (("Retry-After", "5"),))
                    self.lock.wait(min(1.0, max(0.0, deadline - time.monotonic())))
            finally:
                with self.lock:
                    self.waiting -= 1

    def release_place(self, session):
        """A child is gone."""
        with self.lock:
            self.places[session.sub] -= 1
            if not self.places[session.sub]:
                del self.places[session.sub]
            self.lock.notify_all()

    def place_may_be_free(self):
        """A child may have become idle: whoever waits for a place looks again."""
        if self.waiting:
            with self.lock:
                self.lock.notify_all()

    # -- what a session needs of the world

    def credential(self, sub):
        """What Upstream.credential gives; RpcError or Refusal when there is none to be had."""
        try:
            return self.upstream.credential(sub)
        except LoggedOut:
            raise invalid_token(self.settings, "Forgejo ended this login; log in again.") from None
        except UpstreamDown:
            raise self.upstream_down() from None
        except UpstreamMisconfigured as error:
            self.log.event("error", "forgejo refuses this broker's client id or secret", reason=str(error))
            raise self.upstream_down() from None

    @staticmethod
    def upstream_down():
        """Forgejo cannot be reached."""
        return RpcError(SERVER_ERROR, "Forgejo cannot be reached just now; try again in a moment.",
                        {"reason": "upstream_down", "outcome_unknown": False, "retryable": True}, 503, (("Retry-After", "5"),))

    def spawn(self, access, sub, link):
        """Start a child for a link; RpcError when the binary is missing or cannot be run."""
        try:
            return Child(child_command(self.settings), child_environment(self.settings, access), sub, self.guardian, self.settings, self.log,
                         link.on_line, link.on_end)
        except ChildMissing as error:
            self.log.event("error", "forgejo-mcp is missing", reason=str(error))
            raise RpcError(INTERNAL_ERROR, "The tool program is missing on the server; tell its operator.",
                           {"reason": "child_missing", "outcome_unknown": False, "retryable": False}, 500) from None
        except ChildFailed as error:
            self.log.event("error", "forgejo-mcp cannot be started", reason=str(error))
            raise self._starting_failed() from None

    @staticmethod
    def _starting_failed():
        return RpcError(SERVER_ERROR, "The tool process could not be started; the operator's log says why.",
                        {"reason": "starting_failed", "outcome_unknown": False, "retryable": True}, 503, (("Retry-After", "5"),))

    def why_not_started(self, sub, access):
        """Why a child ended at its start: it exits alike when Forgejo is down and when it refuses the token, so we ask Forgejo."""
        try:
            self.forgejo.userinfo(access)
        except UpstreamDown:
            return self.upstream_down()
        except (UpstreamRefused, NotAUser):
            self.tool_refused(sub)
            return invalid_token(self.settings, "Forgejo refuses this login; log in again.")
        return self._starting_failed()

    def tool_refused(self, sub):
        """A tool's error may be Forgejo refusing the token: look into it, but not in the thread that has an answer to deliver."""
        if self.upstream.may_ask(sub):
            threading.Thread(target=self.upstream.note_tool_refusal, args=(sub,), daemon=True).start()

    def close(self, reason):
        """End every child; sessions stay on file."""
        self.closing = True
        for session in self.all():
            session.end(reason)


def invalid_token(settings, sentence):
    """401 for a presented token that is not good (RFC 6750 3.1)."""
    return Refusal(401, "invalid_token", sentence, (("WWW-Authenticate", challenge_header(settings, "invalid_token")),))


def challenge_header(settings, error=None, scope=" ".join(SCOPES)):
    """The WWW-Authenticate value that leads a client to our metadata (RFC 9728 5.1)."""
    url = f"{settings.public_url}/.well-known/oauth-protected-resource/mcp"
    shown = f', error="{error}"' if error else ""
    return f'Bearer resource_metadata="{url}", scope="{scope}"{shown}'


class Reaper:
    """What happens by the clock. tick() is a plain function; run() calls it at least once a second from a daemon thread."""

    def __init__(self, settings, store, registry, upstream, log, clock):
        self._settings, self._store, self._registry, self._upstream = settings, store, registry, upstream
        self._log, self._clock, self._stop = log, clock, threading.Event()
        self._marker, self._next_sweep, self._next_refresh, self._refreshing = None, 0.0, 0.0, set()
        self._streams, self._lock = {}, threading.Lock()  # the lock guards _streams and _refreshing; a leaf

    def watch(self, reader, caller, is_call):
        """End an open stream within 1 s of its grant's end and 60 s of its token's expiry (a running call only at revocation)."""
        with self._lock:
            self._streams[reader] = (caller, is_call)

    def run(self):
        """Tick until stopped."""
        while not self._stop.wait(0.5):
            try:
                self.tick()
            except StoreUnavailable as error:
                self._log.event("error", "store unavailable", reason=error.reason)
            except Exception as error:  # the reaper must outlive every surprise
                self._log.event("error", "reaper failed", error=f"{type(error).__name__}: {error}")

    def stop(self):
        """End run()."""
        self._stop.set()

    def tick(self):
        """One round: late calls, idle children, ended grants and sessions, tokens to refresh, rows to sweep."""
        now = self._clock.now()
        for session in self._registry.all():
            session.tick(time.monotonic())
            idle_since = session.idle_since()
            if idle_since is not None and not self._settings.child_keeps_state \
                    and now - session.used_at >= self._settings.session_idle_timeout \
                    and time.monotonic() - idle_since >= min(1.0, self._settings.session_idle_timeout):
                session.sleep("idle")
        self._end_what_was_revoked(now)
        self._refresh(now)
        if now >= self._next_sweep:
            self._next_sweep = now + 60
            self._registry.save_uses()
            self._registry.forget(self._store.end_orphaned_sessions(now), "grant ended")
            self._registry.forget(self._store.sweep(now, self._settings.session_lifetime), "expired")
            self._registry.unload(now - max(60, self._settings.session_idle_timeout))

    def _end_what_was_revoked(self, now):
        marker = self._store.change_marker()
        with self._lock:
            for reader in [reader for reader in self._streams if reader.ended]:
                del self._streams[reader]
            streams = list(self._streams.items())
        for reader, (caller, is_call) in streams:
            if not is_call and caller.expires_at <= now:
                reader.close()
        if marker == self._marker:
            return
        self._marker = marker
        live, pairs = self._store.live_grants(now)
        for reader, (caller, _) in streams:
            if caller.grant_id not in live:
                reader.close()
        orphaned = [session for session in self._registry.all() if (session.sub, session.client_id) not in pairs]
        self._registry.forget([session.name for session in orphaned], "grant ended")

    def _refresh(self, now):
        """Credentials of users with a child awake before they run out; every live one at least every ten days.

        A child with an older credential than the user's is replaced: by a refresh of ours, or by a login that overtook it.
        """
        awake = collections.defaultdict(list)
        for session in self._registry.all():
            if session.link:
                awake[session.sub].append(session)
        for sub, sessions in awake.items():
            seq, due = self._upstream.outlook(sub)
            if due:
                self._refresh_in_background(sub)
            for session in sessions:
                link = session.link
                if seq is None:
                    session.sleep("logged out")
                elif link and link.seq != seq:
                    session.replace()
        if now >= self._next_refresh:
            self._next_refresh = now + 600
            for sub in self._store.users_to_refresh(now - 10 * 86400, now):
                self._refresh_in_background(sub)

    def _refresh_in_background(self, sub):
        with self._lock:
            if sub in self._refreshing:
                return
            self._refreshing.add(sub)

        def refresh():
            try:
                self._upstream.refresh(sub)
            except Exception as error:  # logged where it is known what it means; the next tick tries again
                self._log.event("debug", "refresh failed", user=sub, error=type(error).__name__)
            finally:
                with self._lock:
                    self._refreshing.discard(sub)

        threading.Thread(target=refresh, daemon=True).start()


# ======================================================================================================================
# Gate and /mcp
# Owns the MCP endpoint: who is calling, what they may do, and which HTTP answer a JSON-RPC message gets.
# Must not know sockets or children.
# ======================================================================================================================

@dataclass(frozen=True, slots=True)
class Caller:
    """Whose token came: the user, client and grant, and what it may do. `asked` is what the login had asked for."""

    sub: str
    login: str
    client_id: str
    grant_id: int
    scope: str
    asked: str
    expires_at: float

    @property
    def may_write(self):
        """Whether all tools may be called."""
        return WRITE in self.scope.split()


class Endpoint:
    """POST, GET and DELETE of /mcp."""

    def __init__(self, settings, store, registry, reaper, log, clock):
        self._settings, self._store, self._registry, self._reaper = settings, store, registry, reaper
        self._log, self._clock = log, clock

    def gate(self, request):
        """The Caller of a request by its bearer token; Refusal 401 (RFC 6750 3). Each request reads its row: revocation is immediate."""
        authorization = request.header("authorization")
        if authorization is None:
            raise Refusal(401, "unauthorized", "Log in first: see WWW-Authenticate.",
                          (("WWW-Authenticate", challenge_header(self._settings)),))
        scheme, _, token = authorization.partition(" ")
        token = token.strip()
        row = None
        if scheme.lower() == "bearer" and re.fullmatch(r"fja_[A-Za-z0-9_-]{43}", token):
            row = self._store.bearer(digest(token), self._clock.now())
        if row is None or row.state != "active" or row.resource != self._settings.resource:
            raise invalid_token(self._settings, "The access token is unknown, expired or revoked.")
        return Caller(row.sub, row.login, row.client_id, row.grant_id, row.scope, row.asked, row.expires_at)

    # -- POST

    def post(self, request):
        """A JSON-RPC message, or a batch where its session allows one."""
        caller = self.gate(request)
        request_id = None
        try:
            value = self._read(request)
            request_id = value.get("id") if isinstance(value, dict) and is_request_id(value.get("id")) else None
            if isinstance(value, list):
                return self._batch(request, caller, value)
            try:
                message = classify(value)
            except ValueError as error:
                raise RpcError(INVALID_REQUEST, f"Not a JSON-RPC message: {error}.", None, 400) from None
            self._check_era(request, message)
            return self._legacy(request, caller, message)
        except RpcError as error:
            return rpc_error_response(request_id, error)

    def _read(self, request):
        body = request.read_body(self._settings.max_body)
        try:
            return read_json(body)
        except (ValueError, RecursionError) as error:
            duplicate = "twice" in str(error)
            raise RpcError(INVALID_REQUEST if duplicate else PARSE_ERROR, f"The body is not JSON: {str(error)[:200]}.", None, 400) from None

    def _check_era(self, request, message):
        """Modern requests (MCP 2026-07-28) are told which versions are served; `initialize` is legacy, always."""
        header = request.header("mcp-protocol-version")
        meta = (message.params or {}).get("_meta")
        asked = meta.get(META_VERSION) if isinstance(meta, dict) else None
        if message.method == "initialize":
            return
        if asked is not None or (header or "") >= FIRST_MODERN_VERSION:
            if message.method == "server/discover":
                raise RpcError(METHOD_NOT_FOUND, "This server speaks the initialize handshake; server/discover is not served.", None, 404)
            raise RpcError(UNSUPPORTED_VERSION, "Unsupported protocol version",
                           {"supported": list(LEGACY_VERSIONS), "requested": asked if isinstance(asked, str) else header}, 400)
        if header is not None and header not in LEGACY_VERSIONS:
            raise RpcError(INVALID_REQUEST, f"Unsupported MCP-Protocol-Version; supported: {', '.join(LEGACY_VERSIONS)}.",
                           {"supported": list(LEGACY_VERSIONS)}, 400)

    def _legacy(self, request, caller, message):
        if message.kind == "request" and message.method == "initialize":
            return self._initialize(caller, message)
        session = self._session(request, caller)
        if message.kind == "notification":
            if session.durable:
                session.notify(message)
            return Response(202)
        if message.kind == "response":
            session.reply(message)
            return Response(202)
        if not session.durable and message.method in ("logging/setLevel", "resources/subscribe", "resources/unsubscribe"):
            raise RpcError(METHOD_NOT_FOUND, f"{message.method} needs a session: send initialize, then the Mcp-Session-Id it returns.")
        refused = self._refused(caller, session, message)
        if refused is not None:
            return refused
        return self._submitted(request, caller, session, [message], batch=False)

    def _initialize(self, caller, message):
        params = message.params
        if not isinstance(params, dict) or not isinstance(params.get("protocolVersion"), str):
            raise RpcError(INVALID_PARAMS, "initialize needs params.protocolVersion.", None, 400)
        if len(dump(params)) > self._settings.max_form:  # they are kept, and replayed to each child
            raise RpcError(INVALID_PARAMS, "The params of initialize are too large.", None, 400)
        session_id, server = self._registry.open(caller.sub, caller.client_id, params)
        return Response(200, result_message(message.id, server), "application/json", (("Mcp-Session-Id", session_id),))

    def _session(self, request, caller):
        session_id = request.header("mcp-session-id")
        if session_id is None:
            return self._registry.pool(caller.sub, caller.client_id)
        if not re.fullmatch(r"[\x21-\x7e]{1,256}", session_id):
            raise RpcError(INVALID_REQUEST, "Mcp-Session-Id is malformed.", None, 400)
        return self._registry.find(session_id, caller.sub, caller.client_id)

    def _batch(self, request, caller, values):
        """Only a session negotiated at 2025-03-26 may send one, never with initialize in it."""
        session = self._session(request, caller)
        if not values or not session.durable or session.version != BATCH_VERSION:
            raise RpcError(INVALID_REQUEST, "Batches are not served here; send each message by itself.", None, 400)
        try:
            messages = [classify(value) for value in values]
        except ValueError as error:
            raise RpcError(INVALID_REQUEST, f"Not a JSON-RPC message: {error}.", None, 400) from None
        if any(message.method == "initialize" for message in messages):
            raise RpcError(INVALID_REQUEST, "initialize must not be in a batch.", None, 400)
        requests = [message for message in messages if message.kind == "request"]
        for message in requests:
            refused = self._refused(caller, session, message)
            if refused is not None:
                return refused
        for message in messages:
            if message.kind == "notification":
                session.notify(message)
            elif message.kind == "response":
                session.reply(message)
        return self._submitted(request, caller, session, requests, batch=True) if requests else Response(202)

    def _refused(self, caller, session, message):
        """The answer to a call that the token's scope does not allow, None for every other request."""
        if caller.may_write or message.method != "tools/call":
            return None
        name = (message.params or {}).get("name")
        if isinstance(name, str) and session.tool_reads(name):
            return None
        if WRITE not in caller.asked.split():
            raise Refusal(403, "insufficient_scope", "This tool writes; the login was for reading only.",
                          (("WWW-Authenticate", challenge_header(self._settings, "insufficient_scope")),))
        # The person was asked and chose read only: asking again would be a loop, so the model is told instead.
        text = "This connection is read only: that was chosen at its login. To use this tool, connect again and choose full access."
        return Response(200, result_message(message.id, {"content": [{"type": "text", "text": text}], "isError": True}), "application/json")

    def _submitted(self, request, caller, session, messages, batch):
        accept = request.headers.get("accept")
        streamable = bool(accept) and any("text/event-stream" in value for value in accept)
        transform = None if caller.may_write else lambda message: self._only_reading if message.method == "tools/list" else None
        reader = session.submit(messages, streamable=streamable, transform=transform)
        self._reaper.watch(reader, caller, True)
        prime = session.durable and session.version == LEGACY_VERSIONS[0]
        return Response(200, later=Later(reader, 2.0 if streamable else None, prime=prime, batch=batch))

    def _only_reading(self, result):
        if not isinstance(result, dict) or not isinstance(result.get("tools"), list):
            return result
        return {**result, "tools": [tool for tool in result["tools"] if isinstance(tool, dict) and
                                    (name_reads(str(tool.get("name")), self._settings) or hint_reads(tool))]}

    # -- GET and DELETE

    def get(self, request):
        """The session's stream for what belongs to no request; resumes what Last-Event-ID names."""
        caller = self.gate(request)
        try:
            self._check_version_header(request)
            session = self._session(request, caller)
        except RpcError as error:
            return rpc_error_response(None, error)
        if not session.durable:
            raise Refusal(405, "method_not_allowed", "Without an Mcp-Session-Id only POST is served.", (("Allow", "POST"),))
        stream, after = session.stream_after(request.header("last-event-id"))
        reader = stream.open(after)
        self._reaper.watch(reader, caller, False)
        return Response(200, later=Later(reader, 0))

    def _check_version_header(self, request):
        header = request.header("mcp-protocol-version") or ""
        if header >= FIRST_MODERN_VERSION:
            raise Refusal(405, "method_not_allowed", "This revision of MCP has only POST.", (("Allow", "POST"),))

    def delete(self, request):
        """The client ends its session."""
        caller = self.gate(request)
        self._check_version_header(request)
        try:
            session = self._session(request, caller)
        except RpcError as error:
            return rpc_error_response(None, error)
        if not session.durable:
            raise Refusal(405, "method_not_allowed", "Name the session to end with Mcp-Session-Id.", (("Allow", "POST"),))
        self._registry.delete(session)
        return Response(204)

    def head(self, request):
        """HEAD is how some clients look for the login: 401 without a token, 405 with one."""
        self.gate(request)
        raise Refusal(405, "method_not_allowed", "Use POST.", (("Allow", "POST, GET, DELETE"),))


def rpc_error_response(request_id, error):
    """An RpcError as an HTTP answer."""
    return Response(error.status, error_message(request_id, error.code, error.message, error.data), "application/json", error.headers)


# ======================================================================================================================
# HTTP server
# Owns sockets: accepting, strict framing and parsing, the one header writer, and the pump of everything that waits.
# Must not know routes or what is served; it is given one function from Request to Response.
# ======================================================================================================================

REQUEST_LINE = re.compile(rb"([A-Z]{1,16}) ([!-~]{1,8192}) HTTP/([0-9])\.([0-9])")
HEADER_LINE = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*((?:[!-~\x80-\xff](?:[ \t!-~\x80-\xff]*[!-~\x80-\xff])?)?)[ \t]*")
MAX_LINE, MAX_HEAD, MAX_HEADERS = 8192, 32768, 100
REASONS = {status.value: status.phrase for status in http.HTTPStatus} | {421: "Misdirected Request"}


class Gone(Exception):
    """The connection has ended, or must."""


class Watcher:
    """One thread that notices that clients hung up while their answers are still to come."""

    def __init__(self):
        self._epoll, self._readers, self._lock = select.epoll(), {}, threading.Lock()  # the lock guards the dict; a leaf
        self._end, self._end_writer = os.pipe2(os.O_CLOEXEC)

    def start(self):
        """Begin to watch."""
        self._epoll.register(self._end)
        threading.Thread(target=self._run, daemon=True, name="watcher").start()

    def close(self):
        """Watch no more: closing the writer is the hang-up that ends the thread."""
        os.close(self._end_writer)

    def watch(self, sock, reader):
        """Close the reader when the socket's peer hangs up. A half-closed connection counts as gone."""
        with self._lock:
            self._readers[sock.fileno()] = reader
            self._epoll.register(sock.fileno(), select.EPOLLRDHUP | select.EPOLLONESHOT)

    def forget(self, sock):
        """The answer is done."""
        with self._lock:
            if self._readers.pop(sock.fileno(), None):
                self._epoll.unregister(sock.fileno())

    def _run(self):
        while True:
            for descriptor, _ in self._epoll.poll():
                if descriptor == self._end:
                    os.close(self._end)
                    return
                with self._lock:
                    reader = self._readers.get(descriptor)
                if reader:
                    reader.close()


class Server(http.server.ThreadingHTTPServer):
    """Accepts connections and gives each a thread, within the limits."""

    request_queue_size, daemon_threads, block_on_close, allow_reuse_address = 1024, True, False, True

    def __init__(self, settings, handle, log, address, listener=None):
        self.settings, self.handle, self.log, self.watcher = settings, handle, log, Watcher()
        self._changed = threading.Condition()  # guards connections and draining; a leaf
        self._connections, self._addresses, self.draining = set(), collections.Counter(), False
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        socketserver.TCPServer.__init__(self, address, None, bind_and_activate=False)
        if listener:
            self.socket.close()
            self.socket = listener
        else:
            try:
                self.server_bind()
                self.server_activate()
            except OSError as error:
                self.socket.close()
                raise ConfigurationError([f"cannot listen on {address[0]}:{address[1]}: {error.strerror}"]) from None
        self.port = self.socket.getsockname()[1]

    def server_bind(self):
        """Bind without the look-up of our own name that http.server does."""
        socketserver.TCPServer.server_bind(self)

    def serve_forever(self, poll_interval=0.1):
        """Accept until `hurry`."""
        self.watcher.start()
        super().serve_forever(poll_interval)

    @property
    def open_connections(self):
        """How many connections there are."""
        return len(self._connections)

    def get_request(self):
        """Accept; without file descriptors left, wait a moment instead of spinning (H16)."""
        try:
            return self.socket.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                time.sleep(0.05)
            raise

    def process_request(self, sock, address):
        """Start a thread for a connection, or drop it at once when there are too many."""
        peer = address[0]
        with self._changed:
            full = self.draining or len(self._connections) >= self.settings.max_connections or (
                self._addresses[peer] >= self.settings.max_connections_per_address and not self.trusts(peer)
                and not is_loopback_name(peer))
            if not full:
                connection = Connection(self, sock, peer)
                self._connections.add(connection)
                self._addresses[peer] += 1
        if full:
            self.shutdown_request(sock)
            return
        try:
            threading.Thread(target=self._serve, args=(connection,), daemon=True, name="connection").start()
        except RuntimeError:  # no thread to be had (H17)
            self._ended(connection)
            self.shutdown_request(sock)

    def _serve(self, connection):
        try:
            connection.run()
        except (Gone, OSError):
            pass
        finally:
            self._ended(connection)
            self.shutdown_request(connection.sock)

    def _ended(self, connection):
        with self._changed:
            self._connections.discard(connection)
            self._addresses[connection.peer] -= 1
            if not self._addresses[connection.peer]:
                del self._addresses[connection.peer]
            self._changed.notify_all()

    def handle_error(self, request, client_address):
        """Never a traceback on stderr for what a peer did."""
        self.log.event("error", "connection failed", error=sys.exc_info()[0].__name__ if sys.exc_info()[0] else None)

    def trusts(self, address):
        """Whether a peer's X-Forwarded-For is believed."""
        try:
            return any(ipaddress.ip_address(address.partition("%")[0]) in network for network in self.settings.trusted_proxies)
        except ValueError:
            return False

    def hurry(self):
        """Stop accepting; idle connections and idle streams end now, the others with their answer."""
        self.shutdown()
        with self._changed:
            self.draining = True
            connections = list(self._connections)
        for connection in connections:
            connection.hurry()

    def wait_for_connections(self, seconds):
        """Until all connections have ended, or that long; those that are left."""
        with self._changed:
            self._changed.wait_for(lambda: not self._connections, seconds)
            return list(self._connections)

    def close(self, seconds):
        """Give connections that long, then cut them."""
        for connection in self.wait_for_connections(seconds):
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        self.watcher.close()


_dates = (0, "")


def http_date():
    """The Date header of this second."""
    global _dates
    now = int(time.time())
    if _dates[0] != now:
        _dates = (now, time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(now)))
    return _dates[1]


def write_head(status, headers):
    """The one place where headers are written. CR, LF and NUL are refused: nothing reflected can split a response (H12)."""
    lines = [f"HTTP/1.1 {status} {REASONS.get(status, 'Unknown')}", f"Date: {http_date()}", "Server: fjmcp-broker",
             "X-Content-Type-Options: nosniff"]
    for name, value in headers:
        if not re.fullmatch(r"[A-Za-z0-9-]+", name) or re.search(r"[\r\n\0]", value):
            raise ValueError("a header that would break the response")
        lines.append(f"{name}: {value}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


class Connection:
    """One connection: reads requests strictly, one at a time, and writes their responses."""

    def __init__(self, server, sock, peer):
        self.server, self.sock, self.peer, self.settings = server, sock, peer, server.settings
        self.buffer, self.busy, self.idle_reader, self.body_state, self.close_after = bytearray(), False, None, None, False
        self.http11 = True

    def run(self):
        """Serve requests until the connection ends."""
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        patience = self.settings.header_timeout  # a connection is worth keeping once a request has come over it
        while not self.close_after and not self.server.draining:
            try:
                request = self._read_request(patience)
            except Refusal as error:
                self._send(refusal_response(error), True)
                self._linger()
                return
            if request is None:
                return
            self.busy = True
            self._respond(request)
            self.busy, patience = False, self.settings.idle_timeout

    def hurry(self):
        """The server drains: an idle connection ends now, an idle stream too, anything else after its answer."""
        self.close_after = True
        reader = self.idle_reader
        if reader:
            reader.close()
        if not self.busy:
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RD)

    # -- reading

    def _receive(self, deadline):
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.sock.settimeout(left)
        data = self.sock.recv(65536)
        if not data:
            raise Gone
        self.buffer += data

    def _read_request(self, patience):
        """The next request, None when the connection ends between two; Refusal for anything that is not strictly HTTP."""
        try:
            if not self.buffer:
                self._receive(time.monotonic() + patience)
        except (TimeoutError, Gone):
            return None
        deadline, searched = time.monotonic() + self.settings.header_timeout, 0
        while (end := self.buffer.find(b"\r\n\r\n", max(0, searched - 3))) < 0:
            searched = len(self.buffer)
            first = self.buffer.find(b"\n")
            if first < 0 and searched > MAX_LINE + 40:
                raise Refusal(414, "uri_too_long", "The request line is too long.")
            if first >= 0 and (first == 0 or self.buffer[first - 1] != 13):
                raise Refusal(400, "bad_request", "Lines must end with CR LF.")
            if searched > MAX_HEAD:
                raise Refusal(431, "header_too_large", "The request's header is too large.")
            try:
                self._receive(deadline)
            except TimeoutError:
                raise Refusal(408, "request_timeout", "The request's header did not arrive in time.") from None
        if end > MAX_HEAD:
            raise Refusal(431, "header_too_large", "The request's header is too large.")
        head = bytes(self.buffer[:end])
        del self.buffer[:end + 4]
        return self._parse(head)

    def _parse(self, head):
        first, *lines = head.split(b"\r\n")
        match = REQUEST_LINE.fullmatch(first)
        if not match:
            if len(first) > MAX_LINE:
                raise Refusal(414, "uri_too_long", "The request line is too long.")
            if re.fullmatch(rb"[A-Z]{1,16} [!-~]+ HTTP/[0-9.]+", first):
                raise Refusal(505, "version_not_supported", "Only HTTP/1.1 and HTTP/1.0 are served.")
            raise Refusal(400, "bad_request", "The request line is malformed.")
        if match[3] != b"1" or match[4] not in (b"0", b"1"):
            raise Refusal(505, "version_not_supported", "Only HTTP/1.1 and HTTP/1.0 are served.")
        if len(lines) > MAX_HEADERS:
            raise Refusal(431, "header_too_large", "There are too many headers.")
        headers = {}
        for line in lines:
            field = HEADER_LINE.fullmatch(line)
            if not field:
                raise Refusal(400, "bad_request", "A header line is malformed.")
            headers.setdefault(field[1].decode().lower(), []).append(field[2].decode("latin-1"))
        self.http11 = match[4] == b"1"
        return self._request(match[1].decode(), match[2].decode(), headers)

    def _request(self, method, target, headers):
        if self.http11 and len(headers.get("host", ())) != 1 or len(headers.get("host", ())) > 1:
            raise Refusal(400, "bad_request", "Exactly one Host header is needed.")
        absolute = re.fullmatch(r"https?://([^/?#]+)([/?].*)?", target, re.IGNORECASE)
        if absolute:
            headers["host"] = [absolute[1]]
            target = absolute[2] or "/"
        if not target.startswith("/") and not (target == "*" and method == "OPTIONS") and not target.startswith("?"):
            raise Refusal(400, "bad_request", "The request's target is malformed.")
        self.body_state = self._framing(headers)
        tokens = {token.strip().lower() for value in headers.get("connection", ()) for token in value.split(",")}
        self.close_after |= "close" in tokens or not self.http11 and "keep-alive" not in tokens
        expect = headers.get("expect")
        if expect and [value.lower() for value in expect] != ["100-continue"]:
            raise Refusal(417, "expectation_failed", "Only Expect: 100-continue is understood.")
        path, _, query = target.partition("?")
        address, direct = self._client_address(headers)
        self.wants_continue = bool(expect) and self.http11
        return Request(method, path, query, headers, address, direct, os.urandom(6).hex(), self._read_body)

    def _framing(self, headers):
        """How the body is framed: None, a length, or "chunked"; whatever could be read in two ways is refused (RFC 9112 6.3)."""
        lengths, codings = headers.get("content-length"), headers.get("transfer-encoding")
        if codings:
            if lengths or not self.http11:
                raise Refusal(400, "bad_request", "Transfer-Encoding cannot stand with Content-Length or in HTTP/1.0.")
            if len(codings) != 1 or codings[0].lower() != "chunked":
                raise Refusal(501, "not_implemented", "The only transfer coding understood is chunked.")
            return "chunked"
        if lengths is None:
            return None
        if len(lengths) != 1 or not re.fullmatch(r"[0-9]{1,15}", lengths[0]):
            raise Refusal(400, "bad_request", "Content-Length must be one plain number.")
        return int(lengths[0]) or None

    def _client_address(self, headers):
        """The client's address, and whether no proxy spoke for it: X-Forwarded-For is read from the right, past trusted proxies."""
        values = headers.get("x-forwarded-for")
        if not values or not self.server.trusts(self.peer):
            return self.peer, True
        address = self.peer
        for item in reversed([item.strip() for value in values for item in value.split(",")]):
            try:
                address = str(ipaddress.ip_address(item))
            except ValueError:
                break
            if not self.server.trusts(address):
                break
        return address, False

    def _read_body(self, limit):
        """The request's body, read only now; 413 above `limit`, 408 when it is too slow, 400 when it is malformed."""
        framing, self.body_state = self.body_state, None
        if framing is None:
            return b""
        self.body_state = "unread"
        if framing != "chunked" and framing > limit:
            raise Refusal(413, "content_too_large", f"The body may have at most {limit} bytes.")
        if self.wants_continue and not self.buffer:
            self.sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        deadline = time.monotonic() + self.settings.body_timeout
        try:
            body = self._read_chunks(limit, deadline) if framing == "chunked" else self._exactly(framing, deadline)
        except TimeoutError:
            raise Refusal(408, "request_timeout", "The body did not arrive in time.") from None
        self.body_state = None
        return body

    def _exactly(self, size, deadline):
        while len(self.buffer) < size:
            self._receive(deadline)
        data = bytes(self.buffer[:size])
        del self.buffer[:size]
        return data

    def _line(self, deadline):
        while (end := self.buffer.find(b"\r\n")) < 0:
            if len(self.buffer) > MAX_LINE:
                raise Refusal(400, "bad_request", "A chunk's line is too long.")
            self._receive(deadline)
        return self._exactly(end + 2, deadline)[:-2]

    def _read_chunks(self, limit, deadline):
        parts, size = [], 0
        while True:
            match = re.fullmatch(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[\t !-~]*)?", self._line(deadline))
            if not match:
                raise Refusal(400, "bad_request", "A chunk's size is malformed.")
            length = int(match[1], 16)
            if length == 0:
                break
            size += length
            if size > limit:
                raise Refusal(413, "content_too_large", f"The body may have at most {limit} bytes.")
            parts.append(self._exactly(length, deadline))
            if self._exactly(2, deadline) != b"\r\n":
                raise Refusal(400, "bad_request", "A chunk does not end where it says.")
        for _ in range(MAX_HEADERS):
            line = self._line(deadline)
            if not line:
                return b"".join(parts)
            if not HEADER_LINE.fullmatch(line):
                break
        raise Refusal(400, "bad_request", "A trailer is malformed.")

    # -- writing

    def _respond(self, request):
        started = time.monotonic()
        with self.server.log.request(request.id):
            try:
                response = self.server.handle(request)
            except (Gone, OSError):
                raise
            except Exception as error:  # a bug: the operator learns where, the client only that
                where = error.__traceback__
                while where.tb_next:
                    where = where.tb_next
                self.server.log.event("error", "internal error", error=type(error).__name__, line=where.tb_lineno)
                response = json_response(500, {"error": "server_error", "error_description": f"Internal error {request.id}."})
            close = self.close_after or response.close or self.body_state is not None or self.server.draining
            if response.later is not None:
                self._pump(response, close)
            else:
                self._send(response, close, request.method == "HEAD")
            self.server.log.event("debug", "request", method=request.method, path=request.path[:200], status=response.status,
                                  ms=round((time.monotonic() - started) * 1000, 1), address=request.address)
        if close:
            self.close_after = True
            if self.body_state is not None:
                self._linger()

    def _write(self, data):
        self.sock.settimeout(self.settings.write_timeout)
        self.sock.sendall(data)

    def _send(self, response, close, head_only=False):
        headers = list(response.headers)
        if response.content_type:
            headers.append(("Content-Type", response.content_type))
        if response.status not in (204, 304):
            headers.append(("Content-Length", str(len(response.body))))
        if close:
            headers.append(("Connection", "close"))
        elif not self.http11:
            headers.append(("Connection", "keep-alive"))
        head = write_head(response.status, headers)
        self._write(head if head_only or response.status in (204, 304) else head + response.body)

    def _linger(self):
        """What the client still sends is read for a moment, else the reset would take our answer with it."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
            deadline, left = time.monotonic() + 1, 2 * self.settings.max_body
            while left > 0 and time.monotonic() < deadline:
                self.sock.settimeout(max(0.01, deadline - time.monotonic()))
                data = self.sock.recv(65536)
                if not data:
                    return
                left -= len(data)

    def _take(self, reader, timeout, watch=True):
        """The next item. The hang-up watch begins only once the wait is worth it, so that fast calls pay nothing."""
        item = reader.take(min(0.05, timeout))
        if item is None and not reader.ended and timeout > 0.05:
            self.server.watcher.watch(self.sock, reader)
            try:
                item = reader.take(timeout - 0.05)
            finally:
                self.server.watcher.forget(self.sock)
        return item

    def _pump(self, response, close):
        """Send what is still to come: as JSON when the answers are there in time, else as a stream of events."""
        later, reader, items = response.later, response.later.reader, []
        if later.json_wait == 0:
            self.idle_reader = reader
        try:
            if later.json_wait != 0:
                items = self._collect(later, reader)
                if items and items[-1].last:
                    body = b"[" + b",".join(i.data for i in items if i.answer) + b"]" if later.batch else items[-1].data
                    self._send(replace(response, body=body, content_type="application/json"), close)
                    for item in items:
                        reader.taken(item)
                    return
                if reader.ended:
                    self._send(json_response(503, {"error": "unavailable", "error_description": "The answer is not to be had here."}), True)
                    self.close_after = True
                    return
            self._stream(response, reader, items, close)
        finally:
            self.idle_reader = None
            reader.close()

    def _collect(self, later, reader):
        """Items until the last; for a client that can take a stream, only those that make plain JSON possible."""
        answers, deadline = [], None if later.json_wait is None else time.monotonic() + later.json_wait
        cursor = reader.cursor
        while True:
            item = self._take(reader, 3600.0 if deadline is None else max(0.0, deadline - time.monotonic()))
            if item is None:
                if reader.ended or deadline is not None:
                    break
                continue
            if deadline is not None and not item.answer:
                break
            reader.cursor = item.number
            if item.answer:
                answers.append(item)
            if item.last:
                return answers
        reader.cursor = cursor
        return []

    def _stream(self, response, reader, items, close):
        key, later = reader.stream.key, response.later
        headers = [*response.headers, *later.head, ("Content-Type", "text/event-stream"), ("Cache-Control", "no-store"),
                   ("X-Accel-Buffering", "no")]
        headers.append(("Transfer-Encoding", "chunked") if self.http11 else ("Connection", "close"))
        if close and self.http11:
            headers.append(("Connection", "close"))
        opening = f"id: {key}-{reader.cursor}\nretry: 1000\ndata: \n\n".encode() if later.prime else b": open\n\n"
        self._write(write_head(response.status, headers) + self._framed(opening))
        while True:
            item = self._take(reader, 15.0)
            if item is not None:
                frame = f"id: {key}-{item.number}\ndata: ".encode() + item.data.replace(b"\r", b" ").replace(b"\n", b" ") + b"\n\n"
                end = b"0\r\n\r\n" if item.last and self.http11 else b""
                self._write(self._framed(frame) + end)
                reader.taken(item)
                if item.last:
                    break
            elif reader.ended:
                if self.http11:
                    self._write(b"0\r\n\r\n")
                break
            else:
                self._write(self._framed(b": keep-alive\n\n"))
        if not self.http11:
            self.close_after = True

    def _framed(self, data):
        return b"%x\r\n%s\r\n" % (len(data), data) if self.http11 else data


# ======================================================================================================================
# Broker
# Owns the wiring and the route table: which path is whose, and the order of checks before a handler is asked.
# ======================================================================================================================

@dataclass(frozen=True)
class Route:
    """What a path serves: `methods` maps a method to its handler; `kind` is public, form, page, mcp or health."""

    kind: str
    methods: dict


CORS_HEADERS = "Authorization, Content-Type, Accept, MCP-Protocol-Version, Mcp-Session-Id, Last-Event-ID, Mcp-Method, Mcp-Name"
EXPOSED = "WWW-Authenticate, Mcp-Session-Id, MCP-Protocol-Version"


class Broker:
    """The whole program but its command line: everything built from settings, ready to serve."""

    def __init__(self, settings, *, clock=None, log=None, listener=None, web=None):
        self.settings, self.clock = settings, clock or Clock()
        self.log = log or Log(settings, clock=self.clock)
        keyring = load_keyring(settings)
        self.store = Store(settings.store_path, keyring)
        forgejo = Forgejo(settings, self.clock)
        self.upstream = Upstream(settings, self.store, keyring, forgejo, self.log, self.clock)
        self.guardian, limiter = Guardian(), Limiter(self.clock)
        self.registry = Registry(settings, self.store, self.upstream, forgejo, self.guardian, self.log, self.clock)
        self.reaper = Reaper(settings, self.store, self.registry, self.upstream, self.log, self.clock)
        clients = Clients(settings, self.store, self.log, self.clock, limiter, web or PublicWeb())
        authorization = Authorization(settings, self.store, keyring, clients, self.upstream, forgejo, self.log, self.clock, limiter,
                                      lambda name: self.registry.forget([name], "ended by the user"))
        endpoint = Endpoint(settings, self.store, self.registry, self.reaper, self.log, self.clock)
        self.routes = self._routes(clients, authorization, endpoint)
        self.server = Server(settings, self.handle, self.log, settings.listen, listener)
        self.metrics_server = Server(settings, self.metrics, self.log, settings.metrics_listen) if settings.metrics_listen else None
        self._blob = git_blob_id(__file__)

    def _routes(self, clients, authorization, endpoint):
        mcp = Route("mcp", {"POST": endpoint.post, "GET": endpoint.get, "DELETE": endpoint.delete, "HEAD": endpoint.head})
        server_metadata = Route("public", {"GET": authorization.metadata})
        resource_metadata = Route("public", {"GET": authorization.resource_metadata})
        routes = {"/": Route("page", {"GET": lambda request: home_page(self.settings.public_url, self.settings.forgejo_url)}),
                  "/healthz": Route("health", {"GET": self.health}), "/mcp": mcp, "/mcp/": mcp,
                  "/mcp/.well-known/oauth-authorization-server": server_metadata,
                  "/oauth/consent": Route("form", {"POST": authorization.consent}),
                  "/oauth/callback": Route("page", {"GET": authorization.callback}), "/account": Route("page", {"GET": authorization.account}),
                  "/account/login": Route("form", {"POST": authorization.account_login}),
                  "/account/end": Route("form", {"POST": authorization.account_end})}
        for suffix in ("", "/mcp"):
            routes["/.well-known/oauth-authorization-server" + suffix] = server_metadata
        for suffix in ("", "/mcp", "/mcp/"):
            routes["/.well-known/oauth-protected-resource" + suffix] = resource_metadata
        for prefix in ("/oauth", ""):  # the root ones are for clients that ignore metadata
            routes[prefix + "/authorize"] = Route("page", {"GET": authorization.authorize})
            routes[prefix + "/register"] = Route("public", {"POST": clients.register})
            routes[prefix + "/token"] = Route("public", {"POST": authorization.token})
            routes[prefix + "/revoke"] = Route("public", {"POST": authorization.revoke})
        return routes

    def handle(self, request):
        """Request -> Response, in the order of checks of design 3: Host, route, Origin, OPTIONS, bearer, method, body."""
        route = self.routes.get(request.path)
        extra = self._cors(request, route)
        try:
            if not (route and route.kind == "health"):
                self._check_host(request)
            if route is None:
                raise Refusal(404, "not_found", "There is nothing at this address.")
            self._check_origin(request, route)
            if request.method == "OPTIONS" and route.kind in ("public", "mcp"):
                return Response(204, headers=(*extra, *self._preflight(request, route)))
            response = self._method(request, route)(request)
        except PageRefusal as error:
            response = error.response
        except Refusal as error:
            response = self._refused(error, request, route)
        return replace(response, headers=(*response.headers, *extra)) if extra else response

    def _refused(self, error, request, route):
        if error.status == 421 or (error.status == 403 and error.code == "forbidden_origin"):
            return refusal_response(error)
        if route and route.kind in ("page", "form"):
            return error_page(error.status, "This did not work", error.sentence, headers=error.headers)
        return refusal_response(error, NO_STORE[:1])

    def _method(self, request, route):
        handler = route.methods.get(request.method) or (route.methods.get("GET") if request.method == "HEAD" else None)
        if handler is None and route.kind == "mcp":
            handler = route.methods["HEAD"]  # bearer before method
        if handler is None:
            raise Refusal(405, "method_not_allowed", f"Use {' or '.join(route.methods)}.", (("Allow", ", ".join(route.methods)),))
        return handler

    def _check_host(self, request):
        host = (request.headers.get("host") or [""])[0].lower()
        public = urlsplit(self.settings.public_url)
        name = f"[{public.hostname}]" if ":" in public.hostname else public.hostname
        accepted = {public.netloc, f"{name}:{public.port or {'https': 443, 'http': 80}[public.scheme]}"}
        accepted |= {f"{local}:{self.server.port}" for local in ("localhost", "127.0.0.1", "[::1]")}
        if host not in accepted:
            raise Refusal(421, "misdirected_request", "This server does not answer for that host name.")

    def _own_origin(self, origin):
        return origin == self.settings.public_url

    def _listed_origin(self, origin):
        match = re.fullmatch(r"https?://(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?", origin)
        return bool(match) or self._own_origin(origin) or origin in self.settings.allowed_origins

    def _check_origin(self, request, route):
        origins = request.headers.get("origin", [])
        if route.kind == "mcp" and origins and not (len(origins) == 1 and self._listed_origin(origins[0])):
            raise Refusal(403, "forbidden_origin", "This web origin may not call this server; the operator can add it to allowed_origins.")
        if route.kind == "form" and request.method == "POST" and origins and not self._own_origin(origins[0]):
            raise Refusal(403, "forbidden_origin", "This form was sent by another website.")

    def _cors(self, request, route):
        if route is None:
            return ()
        if route.kind == "public":
            return (("Access-Control-Allow-Origin", "*"), ("Access-Control-Expose-Headers", EXPOSED))
        origin = request.headers.get("origin", [""])[0]
        if route.kind == "mcp" and origin and self._listed_origin(origin):
            return (("Access-Control-Allow-Origin", origin), ("Vary", "Origin"), ("Access-Control-Expose-Headers", EXPOSED))
        return ()

    @staticmethod
    def _preflight(request, route):
        asked = (request.headers.get("access-control-request-headers") or [""])[0]
        names = asked if re.fullmatch(r"[A-Za-z0-9_, -]{1,1000}", asked) else CORS_HEADERS
        return (("Access-Control-Allow-Methods", ", ".join([*route.methods, "OPTIONS"])), ("Access-Control-Allow-Headers", names),
                ("Access-Control-Max-Age", "7200"))

    def health(self, request):
        """GET /healthz: 200, or 503 when the store fails. As an event stream it lasts a moment, which shows proxies that buffer."""
        if any("text/event-stream" in value for value in request.headers.get("accept", ())):
            stream = Stream()
            threading.Timer(0.5, stream.end).start()
            return Response(200, later=Later(stream.open(), 0))
        ok = self.store.healthy()
        sessions, children = self.registry.counts() if ok else (None, None)
        return json_response(200 if ok else 503, {"status": "ok" if ok else "failing", "version": __version__, "git": self._blob,
                                                  "store": "ok" if ok else "failing", "sessions": sessions, "children": children},
                             (("Cache-Control", "no-store"),))

    def metrics(self, request):
        """GET /metrics on its own listener: Prometheus text, counts without names."""
        if request.path != "/metrics":
            return refusal_response(Refusal(404, "not_found", "Only /metrics is here."))
        sessions, children = self.registry.counts()
        lines = [f"fjmcp_sessions {sessions}", f"fjmcp_children {children}", f"fjmcp_connections {self.server.open_connections}"]
        lines += [f'fjmcp_events_total{{event="{event}"}} {count}' for event, count in sorted(self.log.counters.items())]
        return Response(200, ("\n".join(lines) + "\n").encode(), "text/plain; version=0.0.4")

    def start(self):
        """Serve and reap in daemon threads."""
        threading.Thread(target=self.reaper.run, daemon=True, name="reaper").start()
        for server in filter(None, (self.server, self.metrics_server)):
            threading.Thread(target=server.serve_forever, daemon=True, name="accept").start()

    def stop(self, seconds=10.0):
        """Answer what was read, with an error what takes longer; stop the children, close the store."""
        servers = [server for server in (self.server, self.metrics_server) if server]
        for server in servers:
            server.hurry()
        self.server.wait_for_connections(seconds - 1)
        self.registry.close("broker stopping")
        for server in servers:
            server.close(1)
        deadline = time.monotonic() + self.settings.stop_timeout + 2
        while any(self.registry.places.values()) and time.monotonic() < deadline:
            for session in self.registry.all():
                for link in filter(None, (session.link, *session.draining)):
                    link.child.tick()
            with self.registry.lock:
                self.registry.lock.wait(0.1)
        self.reaper.stop()
        self.guardian.close()
        with contextlib.suppress(StoreUnavailable):
            self.registry.save_uses()
        self.store.close()


def git_blob_id(path):
    """The id git gives the running file, so that an operator can tell which revision answers."""
    with open(path, "rb") as file:
        data = file.read()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


# ======================================================================================================================
# Commands
# Owns the command line: flags from the table of settings, `serve`, signals and exit status.
# ======================================================================================================================

COMMAND_HELP = {
    "serve": "serve (the default command)",
    "check": "validate the configuration, then try it: store, key, Forgejo, forgejo-mcp, public URL",
    "init": "write a commented configuration, asking for what it cannot know (flags answer for it)",
    "users": "list the users; as JSON with --json",
    "clients": "list the clients; as JSON with --json",
    "grants": "list the logins; as JSON with --json",
    "sessions": "list the sessions; as JSON with --json",
    "revoke": "end logins: --user NAME, --client ID, --grant ID or --all; in force within a second",
    "backup": "FILE: write a consistent copy of the store, also while the broker runs",
    "rotate-key": "seal everything under a new key; may be interrupted and run again",
}
COMMAND_FLAGS = {"users": ("json",), "clients": ("json",), "grants": ("json",), "sessions": ("json",),
                 "revoke": ("user", "client", "grant", "all")}


def usage():
    """The text of --help, from the tables of commands and settings."""
    lines = ["usage: fjmcp_broker.py --config broker.toml [COMMAND] [--SETTING VALUE]...", "",
             "Lets people use their own Forgejo from MCP clients, as themselves.", "",
             "  --config FILE   TOML file with the settings (or FJMCP_BROKER_CONFIG)", "  --version       print the version",
             "  --help          print this", "", "Commands:", *(f"  {name:14}{text}" for name, text in COMMAND_HELP.items()), "",
             "Settings, each also as a key of the file and as FJMCP_BROKER_<NAME> (flag > environment > file > default).",
             "A setting that is one piece of text can be read from a file with --<name>-file.", ""]
    for setting in SETTINGS:
        if setting.kind != "clients":
            lines.append(f"  --{setting.name.replace('_', '-')}\n        {setting.help}{shown_default(setting)}")
    return "\n".join(lines)


def shown_default(setting):
    """A setting's default, in brackets, for people."""
    if setting.default in ("", False, ()):
        return ""
    return " (required)" if setting.default is REQUIRED else f" (default {setting.default})"


@dataclass(frozen=True)
class Arguments:
    """A command line: the configuration file, the command and its own words and flags, and settings given as flags."""

    config: object
    command: str
    words: tuple
    options: dict
    flags: dict

    def settings(self):
        """The settings, read now."""
        return load_settings(self.flags, os.environ, self.config)


def parse_arguments(arguments):
    """Arguments from the words of a command line; flags may stand before or after the command. ConfigurationError when they are wrong."""
    flags, options, words, problems, arguments = {}, {}, [], [], list(arguments)
    own = {name for names in COMMAND_FLAGS.values() for name in names}
    while arguments:
        argument = arguments.pop(0)
        if not argument.startswith("--"):
            words.append(argument)
            continue
        name, given, value = argument[2:].partition("=")
        key = name.replace("-", "_")
        setting, _ = _lookup(key)
        if setting is None and key != "config" and key not in own:
            _suggest(key, f"unknown flag --{name}", problems)
            continue
        is_switch = key in ("json", "all") or setting and setting.kind == "switch" and arguments[:1] not in (["true"], ["false"])
        if not given and not is_switch and not arguments:
            problems.append(f"--{name} needs a value")
            continue
        (flags if setting else options)[key] = value if given else "true" if is_switch else arguments.pop(0)
    command, *words = words or ["serve"]
    config = options.pop("config", None) or os.environ.get(ENVIRONMENT_PREFIX + "CONFIG")
    if command not in COMMANDS:
        problems.append(f"unknown command {command!r}; known: {', '.join(COMMANDS)}")
    elif len(words) != (command == "backup"):
        problems.append(f"{command} takes {'one FILE' if command == 'backup' else 'no further words'}")
    problems += [f"--{name} is not for {command}" for name in options if name not in COMMAND_FLAGS.get(command, ())]
    if problems:
        raise ConfigurationError(problems)
    return Arguments(config, command, tuple(words), options, flags)


# -- init


def configuration_text(values):
    """A broker.toml with the given values, every other setting commented out with its default and what it means."""
    lines = ["# fjmcp-broker. Each line that is commented out shows the default.", ""]
    for setting in SETTINGS:
        if setting.kind == "clients":
            continue
        forms = (setting.name, setting.name + "_file") if has_file_form(setting) else (setting.name,)
        given = {name: values[name] for name in forms if name in values}
        default = "" if setting.default is REQUIRED else setting.default
        lines.append(f"# {setting.help}{' (required)' if setting.default is REQUIRED else ''}")
        lines += [f"{name} = {json.dumps(value)}" for name, value in given.items()] or [f"# {setting.name} = {json.dumps(default)}"]
        lines.append("")
    return "\n".join([*lines, "# Clients that are known beforehand:", "# [[clients]]", '# client_id = "my-client"', '# name = "My client"',
                      '# redirect_uris = ["https://client.example.org/callback"]', '# client_secret = ""', ""])


def ask(name, problems, default=""):
    """A required setting from the terminal, asked again until it is one; a problem when nobody is there to answer."""
    setting = SETTING[name]
    if not sys.stdin.isatty():
        problems.append(f"{name} is missing: {setting.help}. Give it as --{name.replace('_', '-')}")
        return ""
    while True:
        print(f"{setting.help}", file=sys.stderr)
        text = (getpass.getpass(f"{name}: ") if setting.secret else input(f"{name}{f' [{default}]' if default else ''}: ")) or default
        try:
            KINDS[setting.kind](text)
            if text:
                return text
        except ValueError as error:
            print(f"  {error}", file=sys.stderr)


def write_new(path, text):
    """Make a file that only its owner can read; FileExistsError rather than overwrite one."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def secret_files(values, secrets, folder):
    """{path: text} of the files that keep these secrets; `values` then says where they are."""
    if "secrets_file" in values:
        values["secrets_file"] = os.path.abspath(values["secrets_file"])
        return {values["secrets_file"]: "".join(f"{name} = {json.dumps(text)}\n" for name, text in secrets.items())}
    places = {"forgejo_oauth_client_secret": ("client-secret", "forgejo_oauth_client_secret_file"), "key": ("sealing-key", "key_file")}
    files = {}
    for name, text in secrets.items():
        file, setting = places[name]
        values[setting] = os.path.join(folder, file)
        files[values[setting]] = text + "\n"
    return files


def init(arguments):
    """Write broker.toml, and the client secret and a new sealing key into files of their own: `secrets_file`, or one for each."""
    path, values, problems = os.path.abspath(arguments.config or "broker.toml"), dict(arguments.flags), []
    folder = os.path.dirname(path)
    for name in ("public_url", "forgejo_url", "forgejo_oauth_client_id", "forgejo_oauth_client_secret"):
        if name not in values and name + "_file" not in values:
            values[name] = ask(name, problems)
    for name, value in values.items():
        try:
            if value and name in SETTING:
                KINDS[SETTING[name].kind](value)
        except ValueError as error:
            problems.append(f"flag: {name}: {error}")
    if "secrets_file" in values and "forgejo_oauth_client_secret_file" in values:  # all secrets into the one file
        try:
            with open(values.pop("forgejo_oauth_client_secret_file"), encoding="utf-8") as file:
                values["forgejo_oauth_client_secret"] = file.read().strip()
        except OSError as error:
            problems.append(f"flag: forgejo_oauth_client_secret_file: cannot read {error.filename}: {error.strerror}")
    secrets = {"forgejo_oauth_client_secret": values.pop("forgejo_oauth_client_secret", None)}
    if "key_file" not in values:
        secrets["key"] = values.pop("key", None) or base64.b64encode(os.urandom(32)).decode()
    files = secret_files(values, {name: text for name, text in secrets.items() if text}, folder)
    problems += [f"{name} is there already; move it away first" for name in (path, *files) if os.path.exists(name)]
    if problems:
        raise ConfigurationError(problems)
    if "store_path" not in values:
        values["store_path"] = os.path.join(folder, "data", "broker.db")
        os.makedirs(os.path.dirname(values["store_path"]), mode=0o700, exist_ok=True)
    for name, text in files.items():
        write_new(name, text)
    write_new(path, configuration_text(values))
    print(f"Wrote {path}. In Forgejo, the OAuth2 application (confidential) needs the redirect URI\n  {values['public_url'].rstrip('/')}"
          f"/oauth/callback\nNext: python3 {sys.argv[0]} --config {path} check")
    return 0


# -- check


@dataclass(frozen=True)
class Finding:
    """One result of `check`: `level` is ok, warn or fail; what was seen, and how to mend it."""

    level: str
    text: str
    fix: str = ""


def check(arguments):
    """Try everything that serving needs, and name each problem with its fix; 0 when nothing fails."""
    try:
        settings = arguments.settings()
        findings = [finding for part in (check_store, check_urls, check_forgejo, check_child, check_public_url) for finding in part(settings)]
    except ConfigurationError as error:
        findings = [Finding("fail", problem) for problem in error.problems]
    for finding in findings:
        print(f"{finding.level:5} {finding.text}" + (f"\n      -> {finding.fix}" if finding.fix else ""))
    return 1 if any(finding.level == "fail" for finding in findings) else 0


def check_store(settings):
    """The store, its folder, and the sealing key."""
    path, key_path = os.path.abspath(settings.store_path), os.path.abspath(settings.key_file or settings.store_path + ".key")
    folder = os.path.dirname(path)
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        yield Finding("fail", f"store_path: {folder} is not a folder this user can write to", f"make it, for the user that serves: install -d -m 700 {folder}")
        return
    if os.stat(folder).st_mode & 0o077:
        yield Finding("warn", f"store_path: {folder} is open to other users", f"chmod 700 {folder}")
    if not settings.key and os.path.dirname(key_path) == folder:
        yield Finding("warn", f"key_file: {key_path} lies beside the store: who copies one has both", "keep the key elsewhere, and out of the backup of the store")
    if not settings.key and not os.path.exists(key_path) and not os.path.exists(path):
        yield Finding("ok", f"key_file: {key_path} will be made at the first start")
        return
    keyring = load_keyring(settings)
    if not settings.key and os.stat(key_path).st_mode & 0o077:
        yield Finding("warn", f"key_file: {key_path} is open to other users", f"chmod 600 {key_path}")
    if os.path.exists(path):
        store = Store(path, keyring, alone=False)
        older = sum(not keyring.is_newest(box) for _, box in store.credentials())
        yield Finding("ok", f"store_path: {path} opens with this key; sessions on file: {store.count_sessions()}")
        store.close()
        if older:
            yield Finding("warn", f"key_file: {older} credentials are still sealed with older keys", "run rotate-key, which goes on where it was")
        elif len(keyring.keys) > 1:
            yield Finding("ok", f"key_file: every credential is sealed with the newest of {len(keyring.keys)} keys; the others can be taken out")
    else:
        yield Finding("ok", f"store_path: {path} will be made at the first start")


def check_urls(settings):
    """What can be seen of the addresses without asking anybody."""
    check_configured_clients(settings)
    public = urlsplit(settings.public_url)
    if public.port and not is_loopback_name(public.hostname):
        yield Finding("warn", f"public_url: {settings.public_url} names a port; Claude.ai and others reach 443 only",
                      "let the proxy serve https on its usual port, and leave the port out")
    if public.scheme == "http":
        yield Finding("warn", "public_url: http on loopback is for trying out; web clients cannot reach it", "put a proxy with https in front")
    internal = urlsplit(settings.forgejo_internal_url) if settings.forgejo_internal_url else None
    if internal and internal.scheme == "http":
        try:
            private = ipaddress.ip_address(socket.getaddrinfo(internal.hostname, None)[0][4][0].partition("%")[0]).is_private
        except (OSError, ValueError):
            private = False
        if not private:
            yield Finding("warn", "forgejo_internal_url: http to an address that is not private: tokens would travel in the clear", "use https")


def check_forgejo(settings):
    """Forgejo: is it there, is it what it says, does its clock agree, does it know this application and its redirect URI."""
    base = settings.forgejo_internal_url or settings.forgejo_url
    try:
        answer = fetch("GET", base + "/.well-known/openid-configuration", ca_file=settings.forgejo_ca_file)
        version = fetch("GET", base + "/api/v1/version", ca_file=settings.forgejo_ca_file).json()
    except FetchFailed as error:
        yield Finding("fail", f"forgejo_url: {base} does not answer: {error}", "check the address, DNS, firewall and certificate (forgejo_ca_file)")
        return
    document = answer.json() if answer.status == 200 else None
    if document is None:
        yield Finding("fail", f"forgejo_url: {base} answers {answer.status}, and not as Forgejo does", "give the address under which Forgejo itself is")
        return
    yield Finding("ok", f"forgejo_url: {base} answers, version {(version or {}).get('version', 'unknown')}")
    if re.match(r"[0-8]\.", str((version or {}).get("version"))):
        yield Finding("warn", "forgejo_url: this Forgejo knows no scopes of OAuth2 tokens: each has all of its user's power", "upgrade Forgejo to 9 or newer")
    if document.get("authorization_endpoint") != settings.forgejo_url + "/login/oauth/authorize":
        yield Finding("warn", f"forgejo_url: Forgejo calls itself {document.get('issuer')}", "set forgejo_url to that, or ROOT_URL in Forgejo to the other")
    with contextlib.suppress(ValueError, TypeError):
        skew = email.utils.parsedate_to_datetime(answer.headers["date"]).timestamp() - time.time() if "date" in answer.headers else 0
        if abs(skew) > 60:
            yield Finding("fail", f"the clocks of Forgejo and of this machine differ by {abs(skew):.0f} s", "set both by NTP")
    yield from check_application(settings)


def check_application(settings):
    """The OAuth2 application: a code that cannot be good is refused for the first thing that is wrong, in Forgejo's order."""
    try:
        Forgejo(settings, Clock()).exchange("check", "check")
    except UpstreamMisconfigured as error:
        which = "secret" if "secret" in str(error) else "id"
        yield Finding("fail", f"forgejo_oauth_client_{which}: Forgejo refuses it: {error}", "copy it again from the application in Forgejo")
    except UpstreamRefused as error:
        if "redirect" in str(error).lower():
            yield Finding("fail", "the application in Forgejo has another redirect URI", f"set it to {settings.public_url}/oauth/callback")
        else:
            yield Finding("ok", "Forgejo knows the application, its secret and its redirect URI")
    except UpstreamDown as error:
        yield Finding("fail", f"Forgejo's token endpoint does not work: {error}", "look into Forgejo's log, and at proxies between")


def check_child(settings):
    """forgejo-mcp: is it there, new enough, and does it start and answer (without a token: as an anonymous user)."""
    try:
        command = child_command(settings)
        if isinstance(settings.forgejo_mcp_binary, str):
            shown = subprocess.run([command[0], "--version"], capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL).stdout.strip()
            number = re.search(r"v?([0-9]+)\.[0-9]+", shown)
            if number and int(number[1]) < 2:
                yield Finding("fail", f"forgejo_mcp_binary: {shown} is too old", "install forgejo-mcp 2.0 or newer")
        lines, ended, guardian = queue.SimpleQueue(), threading.Event(), Guardian()
        child = Child(command, child_environment(settings, ""), "check", guardian, settings, Log(settings, io.StringIO()), lines.put,
                      lambda child: (lines.put(b""), ended.set()))
    except (ChildMissing, ChildFailed, OSError, subprocess.TimeoutExpired) as error:
        yield Finding("fail", f"forgejo_mcp_binary: {error}", "install forgejo-mcp, and give its path")
        return
    child.send(dump({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {
        "protocolVersion": LEGACY_VERSIONS[0], "capabilities": {}, "clientInfo": {"name": "fjmcp-broker", "version": __version__}}}))
    try:
        server = json.loads(lines.get(timeout=settings.start_timeout) or b"{}").get("result", {}).get("serverInfo")
    except (queue.Empty, ValueError, AttributeError):
        server = None
    child.stop("checked")
    while not ended.wait(0.2):
        child.tick()
    guardian.close()
    if server:
        yield Finding("ok", f"forgejo_mcp_binary: {command[0]} starts and answers as {server.get('name')} {server.get('version')}")
    else:
        yield Finding("fail", f"forgejo_mcp_binary: {command[0]} does not answer ({child.reason})",
                      "run it by hand with FORGEJO_URL set; where Forgejo wants a login for everything it cannot start without a token")


def check_public_url(settings):
    """Whether clients would find this broker at its public URL, and whether a proxy holds streams back."""
    try:
        document = fetch("GET", settings.public_url + "/.well-known/oauth-authorization-server").json()
        health = fetch("GET", settings.public_url + "/healthz").json() or {}
        if (document or {}).get("issuer") != settings.public_url:
            yield Finding("fail", f"public_url: {settings.public_url} is not answered by this broker", "let the proxy pass everything on to `listen`")
            return
        if health.get("git") != git_blob_id(__file__):
            yield Finding("warn", "public_url: another revision of this file is running there", "restart the broker")
        yield Finding("ok", f"public_url: {settings.public_url} is answered by version {health.get('version')}")
        if first_byte_share(settings.public_url + "/healthz") > 0.5:
            yield Finding("fail", "public_url: the proxy holds streams back until they end", "turn its buffering off (docs/install.md)")
    except FetchFailed as error:
        yield Finding("warn", f"public_url: {settings.public_url} does not answer from here: {error}",
                      "start the broker and the proxy, then check again; some networks cannot reach their own public address")


def first_byte_share(url):
    """How late the first event of a short stream arrives, as a share of the whole time: near 1 when somebody buffers."""
    started, moments = time.monotonic(), []
    fetch("GET", url, headers=(("Accept", "text/event-stream"),), on_data=lambda: moments.append(time.monotonic() - started))
    return moments[0] / (time.monotonic() - started) if moments else 1.0


# -- for operators


def open_store(arguments):
    """The store, beside a broker that may be running. Root acts as the store's owner from here on: files that SQLite makes are the broker's."""
    settings = arguments.settings()
    if not os.path.exists(settings.store_path):
        raise ConfigurationError([f"store_path: there is no store at {settings.store_path}"])
    keyring, owner = load_keyring(settings), os.stat(settings.store_path)
    if os.geteuid() == 0:
        os.setegid(owner.st_gid)
        os.seteuid(owner.st_uid)
    return Store(settings.store_path, keyring, alone=False)


@contextlib.contextmanager
def as_ourselves():
    """Whoever ran the command, for a moment: the key's files and what an operator asks for are theirs."""
    acting = os.geteuid(), os.getegid()
    os.seteuid(os.getuid())
    os.setegid(os.getgid())
    try:
        yield
    finally:
        os.setegid(acting[1])
        os.seteuid(acting[0])


def listing(arguments):
    """users, clients, grants, sessions: a table for people, or JSON."""
    store = open_store(arguments)
    names, rows = store.listing(arguments.command, Clock().now())
    store.close()
    if "json" in arguments.options:
        print(json.dumps([dict(zip(names, row)) for row in rows], indent=1))
        return 0
    shown = [[clean_name(str(value), 300) if value is not None else "-" for value in row] for row in rows]
    shown = [[time.strftime("%Y-%m-%d %H:%M", time.localtime(float(value))) if name.endswith("_at") and value != "-" else value
              for name, value in zip(names, row)] for row in shown]
    widths = [max(map(len, column)) for column in zip(names, *shown)]
    for row in (names, *shown):
        print("  ".join(value.ljust(width) for value, width in zip(row, widths)).rstrip())
    return 0


def revoke(arguments):
    """End the logins of a user, a client, one login, or all of them; a running broker acts on it within a second."""
    options = arguments.options
    if len(options) != 1:
        raise ConfigurationError(["revoke needs exactly one of --user NAME, --client ID, --grant ID, --all"])
    log, store = Log(arguments.settings()), open_store(arguments)
    ended = store.find_grants(*next(iter(options.items())), Clock().now())
    for grant in ended:
        if store.end_grant(grant.grant_id, "revoked by operator", Clock().now()):
            log.audit("token revoked", user=grant.sub, client=grant.client_id, grant=grant.grant_id, reason="revoked by operator")
    store.close()
    print(f"ended {len(ended)} login{'' if len(ended) == 1 else 's'}")
    return 0 if ended else 1


def backup(arguments):
    """A consistent copy of the store; the key is not in it."""
    store = open_store(arguments)
    try:
        with as_ourselves():
            write_new(arguments.words[0], "")
            store.backup(arguments.words[0])
    except FileExistsError:
        raise ConfigurationError([f"{arguments.words[0]} is there already"]) from None
    finally:
        store.close()
    print(f"wrote {arguments.words[0]}; it opens only with the sealing key, which is not in it")
    return 0


def replace_key_file(path, text):
    """Write the keys anew in one step; the file stays its owner's."""
    fresh = f"{path}.new"
    with as_ourselves():
        owner = os.stat(path)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(fresh)
        write_new(fresh, text)
        if os.geteuid() == 0:
            os.chown(fresh, owner.st_uid, owner.st_gid)
        os.replace(fresh, path)


def rotate_key(arguments):
    """Put a new key before the others in key_file, then seal every credential anew; run again, it goes on where it was.

    Where the keys come from `key`, the operator has put the new one first and restarted; then only the sealing is left to do.
    """
    settings = arguments.settings()
    path = settings.key_file or settings.store_path + ".key"
    keyring = load_keyring(settings)
    store = open_store(arguments)
    if not settings.key and all(keyring.is_newest(box) for _, box in store.credentials()):
        keyring = Keyring((os.urandom(32), *keyring.keys))
        replace_key_file(path, keyring.text())
    count = 0
    for sub, box in store.credentials():
        if not keyring.is_newest(box):
            owner = f"user:{sub}"
            count += store.reseal(sub, box, keyring.seal("upstream", owner, keyring.unseal("upstream", owner, box)))
    store.set_key_probe(keyring.seal("probe", "store", "ok"))
    store.close()
    print(f"sealed {count} credential{'' if count == 1 else 's'} with the newest key.\n"
          "When the logins that are under way now have ended (10 minutes), `check` says whether older keys can be taken out.")
    return 0


def inherited_listener():
    """The listening socket that systemd (or who started us) handed over, or None (sd_listen_fds(3))."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or not os.environ.get("LISTEN_FDS", "").isdigit():
        return None
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    os.set_inheritable(3, False)
    return socket.socket(fileno=3)


def notify_service_manager(state):
    """Tell the service manager, where there is one (sd_notify(3))."""
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(state.encode(), "\0" + path[1:] if path.startswith("@") else path)


# -- serve


def hide_from_children():
    """Make /proc/<our pid> unreadable for processes of the same user: children, above all (prctl(2), PR_SET_DUMPABLE)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)


def serve(arguments):
    """Serve until SIGTERM or SIGINT; SIGHUP re-reads the settings. The exit status."""
    settings = arguments.settings()
    hide_from_children()
    broker = Broker(settings, listener=inherited_listener())
    # The kernel may give a signal to any thread, and a main thread that waits for a lock would not hear of it: it waits here instead.
    signals, wakes = socket.socketpair()
    wakes.setblocking(False)
    signal.set_wakeup_fd(wakes.fileno())
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: None)
    broker.start()
    broker.log.event("info", "serving", url=settings.public_url, port=broker.server.port, version=__version__)
    notify_service_manager("READY=1")
    while True:
        for number in signals.recv(64):
            if number == signal.SIGHUP:
                reload(broker, arguments)
                continue
            notify_service_manager("STOPPING=1")
            broker.log.event("info", "stopping")
            broker.stop()
            return 0


def reload(broker, arguments):
    """SIGHUP: take over what may change, name what may not, keep everything when the new settings are wrong."""
    try:
        refused = broker.settings.reload(arguments.settings())
        broker.log.event("info", "settings re-read", needs_restart=refused or None)
    except ConfigurationError as error:
        broker.log.event("error", "settings not re-read", problems=error.problems)


COMMANDS = {"serve": serve, "check": check, "init": init, "users": listing, "clients": listing, "grants": listing, "sessions": listing,
            "revoke": revoke, "backup": backup, "rotate-key": rotate_key}


def main(arguments=None):
    """The command line; the exit status: 0, 1 for a failure while running, 2 for wrong usage or configuration."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--help" in arguments or "-h" in arguments:
        print(usage())
        return 0
    if "--version" in arguments:
        print(f"fjmcp-broker {__version__}")
        return 0
    try:
        parsed = parse_arguments(arguments)
        return COMMANDS[parsed.command](parsed)
    except ConfigurationError as error:
        for problem in error.problems:
            print(f"fjmcp-broker: {problem}", file=sys.stderr)
        return 2
    except (OSError, StoreUnavailable) as error:
        print(f"fjmcp-broker: {getattr(error, 'reason', error)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
