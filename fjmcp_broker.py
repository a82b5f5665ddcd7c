#!/usr/bin/env python3
"""fjmcp-broker: lets people use their own Forgejo from MCP clients, as themselves.

It is three things at once: an OAuth 2.1 authorization server for MCP clients, an OAuth client of Forgejo
(which says who the user is), and a supervisor that gives each MCP session its own `forgejo-mcp --transport
stdio` child holding only that user's token.

    MCP client --HTTPS--> Caddy/nginx --HTTP--> fjmcp_broker.py --stdio--> forgejo-mcp --> Forgejo

Four ideas carry the design:
  1. A session is a durable row; a child is a cache. Children stop and come back, the client never notices.
  2. One Forgejo credential per Forgejo user, because Forgejo keeps one refresh token per (user, application).
  3. Every era of MCP on one URL; what an era means is decided at the edge, per request.
  4. Nothing is lost and no one gets in: consent in the same browser,
     hashed tokens, sealed credentials, commit before answer.

Contents, in dependency order; a section names only what stands above it:
  Vocabulary · Tool rules · Settings · Log and metrics · Seal · SQLite · PostgreSQL · Store · Brokers ·
  Messages · HTTP values · Outgoing HTTP · Forgejo · Forgejo credentials · Pages · Clients · Authorization ·
  Child process · Calls · Dialects · Backend · Launcher and capacity · Session · Frontends · Sessions ·
  Maintenance · Endpoint · HTTP server · Broker · Command line · Init · Doctor · Check · Operators · Serve
"""

from __future__ import annotations

import sys

# The file must compile on the Pythons that get this sentence, so it uses no syntax younger than 3.8.
if sys.version_info < (3, 11):
    sys.exit("fjmcp-broker needs Python 3.11 or newer; this is Python " + sys.version.split()[0])

# While Python runs a script, it keeps what it made of the script's text to compile it: 33 MiB here, more than
# the broker itself needs. So the Python that was started with this file compiles it, and is then replaced
# (execv) by another Python that is handed the compiled code. The process, its descriptors, environment,
# folder and arguments stay the same, and nothing is written to disk. The code waits in pipes, which hold all
# of it before anybody reads. Where the other Python might be of another version, or no such pipe can be made,
# this one goes on. Under `-m`, pdb or coverage, whose frames stand below this one, nothing of that happens.
if __name__ == "__main__" and sys._getframe().f_back is None:
    import fcntl
    import marshal
    import os

    compiled = marshal.dumps(sys._getframe().f_code)
    run_compiled = """import marshal, sys
parts = []
for number in sys.argv[1].split(","):
    with open(int(number), "rb") as pipe:
        parts.append(pipe.read())
code = marshal.loads(b"".join(parts))
del sys.argv[:2], parts
__file__ = code.co_filename
exec(code)"""
    readers = []
    part = 1 << 19  # bytes; an unprivileged process may have pipes of twice as many
    try:
        # sys.executable is found by the name that this process was given, and that may be any.
        if not os.path.samefile(sys.executable, "/proc/self/exe"):
            raise OSError("sys.executable is another program")
        for start in range(0, len(compiled), part):
            reader, writer = os.pipe()
            readers.append(reader)
            os.set_inheritable(reader, True)
            with open(writer, "wb", 0) as pipe:
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 2 * part)
                pipe.write(compiled[start : start + part])
        options = [word for word in sys.orig_argv[1 : -len(sys.argv)] if word != "--"]
        # -P -S: nothing is imported from this folder or the file's own, and only the standard library.
        words = [sys.executable, *options, "-P", "-S", "-c", run_compiled]
        os.execv(sys.executable, [*words, ",".join(map(str, readers)), *sys.argv])
    except OSError:
        for reader in readers:
            os.close(reader)

import array
import base64
import binascii
import bisect
import codecs
import collections
import contextlib
import ctypes
import datetime
import email.utils
import enum
import errno
import fcntl
import fnmatch
import functools
import gc
import hashlib
import heapq
import hmac
import http
import http.client
import io
import ipaddress
import itertools
import json
import math
import os
import pwd
import queue
import re
import resource
import secrets
import select
import signal
import socket
import sqlite3
import ssl
import stat
import string
import struct
import subprocess
import termios
import textwrap
import threading
import time
import tomllib
import traceback
import unicodedata
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import IO, Any, Final, Literal, NamedTuple, Protocol, TextIO, TypeVar
from urllib.parse import SplitResult, parse_qsl, quote, unquote, unquote_plus, urlencode, urlsplit

__version__ = "0.1.0"


# ============================================================================================================
# Vocabulary
# Owns the words and numbers of the protocols, the three kinds of refusal, the clock and randomness.
# Must not know configuration, storage, or HTTP.
# ============================================================================================================

READ = "forgejo:read"
WRITE = "forgejo:write"
SCOPES = (READ, WRITE)

LEGACY_VERSIONS = ("2025-11-25", "2025-06-18", "2025-03-26", "2024-11-05")
FIRST_MODERN_VERSION = "2026-07-28"
BATCH_VERSION = "2025-03-26"  # the only revision with JSON-RPC batches
META_VERSION = "io.modelcontextprotocol/protocolVersion"

PARSE_ERROR = -32700
INVALID_REQUEST = -32600
METHOD_NOT_FOUND = -32601
INVALID_PARAMS = -32602
INTERNAL_ERROR = -32603
SERVER_ERROR = -32000
SESSION_NOT_FOUND = -32001
UNSUPPORTED_VERSION = -32022

# Seconds in which a rotated refresh token still answers with the newest pair of its chain.
REFRESH_GRACE = 120
# Wrong verifiers after which an authorization code is burned.
CODE_ATTEMPTS = 3
# Seconds a child's question waits for a stream it can be put on.
QUESTION_GRACE = 10
# Seconds a request waits for a place among `max_sessions`.
PLACE_WAIT = 20

Headers = Iterable[tuple[str, str]]


AnyError = TypeVar("AnyError", bound=Exception)


class HTTPError(Exception):
    """A request is answered with this HTTP `status` and `headers`, and with an error in its body.

    `code` is a word for programs, `description` a sentence for people. `cause` is one of REASONS, for the log
    and the metrics; often that is the code.
    """

    def __init__(
        self, status: int, code: str, description: str, headers: Headers = (), cause: str = ""
    ) -> None:
        super().__init__(f"{status} {code}: {description}")
        self.status = status
        self.code = code
        self.description = description
        self.headers = tuple(headers)
        self.cause = cause or code


class OAuthError(HTTPError):
    """An OAuth endpoint answers with an error.

    `code` is the `error` of RFC 6749 5.2, RFC 7591 3.2.2 or RFC 8707 2.
    """

    def __init__(
        self, code: str, description: str, status: int = 400, headers: Headers = (), cause: str = ""
    ) -> None:
        super().__init__(status, code, description, headers, cause)


class RpcError(Exception):
    """A JSON-RPC error for a client: `code`, `message`, `data`; HTTP `status` and `headers`."""

    def __init__(
        self,
        code: int,
        message: str,
        data: Mapping[str, Any] | None = None,
        status: int = 200,
        headers: Headers = (),
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.data = data
        self.status = status
        self.headers = tuple(headers)


def anew(error: AnyError) -> AnyError:
    """Returns a copy of an exception without its traceback, cause and context.

    An exception that is kept is kept like this, and raised like this: each `raise` adds the frames of its
    thread, with all that these requests hold, to the traceback of the one object.
    """
    copy = type(error).__new__(type(error), *error.args)
    copy.__dict__.update(error.__dict__)
    return copy


class Clock:
    """The machine's three clocks, in seconds.

    Tests inject others; waits on sockets and locks use real time and never ask them.
    """

    def now(self) -> float:
        """Returns the wall clock's time, which an operator, NTP or a bad battery may set at any moment."""
        return time.time()

    def boottime(self) -> float:
        """Returns the time since the machine's boot.

        Nobody sets this clock, and it runs on while the machine is suspended.
        """
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def monotonic(self) -> float:
        """Returns a time for waits within this process."""
        return time.monotonic()


class SteadyClock:
    """Wall time that a step of the wall clock does not move: read at the start, carried on by CLOCK_BOOTTIME.

    A wall clock that differs is followed once it has for FOLLOW_AFTER seconds. What such a step forward
    expires is forgiven for a while, because the step itself may be the error.
    """

    TOLERANCE = 60.0
    FOLLOW_AFTER = 600.0
    FORGIVEN_FOR = 7 * 86400.0

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._offset = clock.now() - clock.boottime()
        self._differs = 0.0
        self._since: float | None = None
        self._leap = 0.0
        self._leaped_at = 0.0

    def now(self) -> float:
        """Returns the time that expiries are compared with."""
        return self._clock.boottime() + self._offset

    def wall(self) -> float:
        """Returns the wall clock's time."""
        return self._clock.now()

    def monotonic(self) -> float:
        """Returns a time for waits within this process."""
        return self._clock.monotonic()

    def leap(self) -> float:
        """Returns the seconds by which now() has lately followed the wall clock forward, else 0."""
        return self._leap if self._clock.boottime() - self._leaped_at < self.FORGIVEN_FOR else 0.0

    def compare(self) -> tuple[str, float] | None:
        """Compares with the wall clock and follows it when it has differed for long; the reaper calls this.

        Returns (`differs`, `agrees` (again) or `followed`, the difference in seconds), None for nothing new.
        """
        difference = self.wall() - self.now()
        if abs(difference) <= self.TOLERANCE:
            agrees_again = self._since is not None
            self._since = None
            return ("agrees", difference) if agrees_again else None
        boottime = self._clock.boottime()
        if self._since is None or abs(difference - self._differs) > self.TOLERANCE:
            # Another step: its ten minutes begin now.
            self._since = boottime
            self._differs = difference
        if boottime - self._since < self.FOLLOW_AFTER:
            return "differs", difference
        self._leap = max(0.0, self.leap() + difference)
        self._leaped_at = boottime
        self._offset += difference
        self._since = None
        return "followed", difference


class Seldom:
    """Says yes once in `seconds` for each key. It remembers no key for longer than that."""

    def __init__(self, clock: SteadyClock, seconds: float) -> None:
        self._clock = clock
        self._seconds = seconds
        # Guards the dict; a leaf.
        self._lock = threading.Lock()
        self._asked: collections.OrderedDict[object, float] = collections.OrderedDict()

    def due(self, key: object) -> bool:
        """Returns whether the last True for this key is long enough ago; True counts from now."""
        now = self._clock.monotonic()
        with self._lock:
            while self._asked and now - next(iter(self._asked.values())) >= self._seconds:
                self._asked.popitem(last=False)
            if key in self._asked:
                return False
            self._asked[key] = now
            return True


def new_secret(prefix: str = "") -> str:
    """Returns a random URL-safe token of 256 bits after a prefix.

    `fja_` is an access token, `fjr_` a refresh token, `fjc_` a code.
    """
    return prefix + secrets.token_urlsafe(32)


def token_hash(secret: str) -> bytes:
    """Returns the SHA-256 of a token, which the store keeps of it.

    No stretching: the token has 256 bits of entropy.
    """
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def b64url(data: bytes) -> str:
    """Returns base64url without padding (RFC 7636 appendix A)."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def unb64url(text: str) -> bytes:
    """Returns the bytes of a base64url text without padding. Raises ValueError."""
    if not re.fullmatch(r"[A-Za-z0-9_-]*", text):
        raise ValueError("not base64url")
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def is_loopback_name(host: str | None) -> bool:
    """Returns whether a host, as spelled in a URL, can only mean this machine (RFC 8252 8.3)."""
    return host in ("localhost", "127.0.0.1", "::1", "[::1]")


UNIX_PEER = "unix"  # stands for the peer of a Unix socket, which has no address


def network_of(address: str, v4: int = 32, v6: int = 64) -> str:
    """Returns the network for which an address is counted: an IPv6 address's /64, which has one owner."""
    if address == UNIX_PEER or ":" not in address and v4 == 32:
        return address
    prefix = v6 if ":" in address else v4
    return str(ipaddress.ip_network(f"{address.partition('%')[0]}/{prefix}", strict=False))


# ============================================================================================================
# Tool rules
# Owns who may use which tool: the values of [[tool_rules]], the rule that decides about a caller, and what is
# doubtful in a list of rules.
# Must not know the configuration file, HTTP or sessions. A
# rule sees a tool's name, never what its arguments make of it.
# ============================================================================================================

MAX_NAME = 256  # characters of a tool's name, or a task's id, that is remembered


@dataclass(frozen=True)
class Rights:
    """What a rule leaves to a caller.

    `allow` and `deny` are globs of tool names; `allow` None admits every name.
    """

    allow: tuple[str, ...] | None = None
    deny: tuple[str, ...] = ()
    reads_only: bool = False
    resources: bool = True
    prompts: bool = True

    def admits(self, tool: str) -> bool:
        """Returns whether a tool of this name may be used; with `reads_only` the tool must also only read."""
        if len(tool) > MAX_NAME or matches_any(tool, self.deny):
            return False
        return self.allow is None or matches_any(tool, self.allow)


NO_RIGHTS = Rights(allow=(), resources=False, prompts=False)


@dataclass(frozen=True)
class ToolRule:
    """One rule: whom it is for, and the rights that it leaves.

    None is everybody; of each condition given one entry must match. `users` (globs of a login, or `id:` and a
    number) and `groups` are casefolded; `clients` are globs of a client_id.
    """

    users: tuple[str, ...] | None = None
    groups: tuple[str, ...] | None = None
    clients: tuple[str, ...] | None = None
    rights: Rights = Rights()

    def is_for(self, sub: str, login: str, groups: Iterable[str], client_id: str) -> bool:
        """Returns whether the rule is for this caller; all its conditions must match."""
        name = login.casefold()
        theirs = {group.casefold() for group in groups}
        return (
            (self.users is None or f"id:{sub}" in self.users or matches_any(name, self.users))
            and (self.groups is None or not theirs.isdisjoint(self.groups))
            and (self.clients is None or matches_any(client_id, self.clients))
        )


def matches_any(text: str, globs: Iterable[str]) -> bool:
    """Returns whether one of the globs matches the whole text, with case.

    Linear: fnmatch never goes back behind a `*`.
    """
    return any(fnmatch.fnmatchcase(text, glob) for glob in globs)


def rights_of(
    rules: Sequence[ToolRule], sub: str, login: str, groups: Iterable[str], client_id: str
) -> Rights | None:
    """Returns the rights that the first matching rule leaves to a caller.

    NO_RIGHTS when none matches, None when there are no rules.
    """
    if not rules:
        return None
    return next((rule.rights for rule in rules if rule.is_for(sub, login, groups, client_id)), NO_RIGHTS)


def rights_sentence(rights: Rights | None) -> str:
    """Returns in plain words what the operator's rules leave to somebody; empty when there are no rules."""
    if rights is None:
        return ""
    if rights.allow == ():
        tools = "No tools"
    else:
        tools = "Tools that only read" if rights.reads_only else "All tools"
        if rights.allow is not None:
            tools += f" named {', '.join(rights.allow)}"
        if rights.deny:
            tools += f", but none named {', '.join(rights.deny)}"
    kinds = [name for name, may in (("resources", rights.resources), ("prompts", rights.prompts)) if not may]
    return f"{tools}; no {' and no '.join(kinds)}." if kinds else f"{tools}."


# -- what is doubtful in a list of rules


def rule_warnings(rules: Sequence[ToolRule], tools: Collection[str] = ()) -> list[str]:
    """Returns a sentence for each thing in these rules that hardly means what it says.

    `tools`: the child's tools, empty if not known.
    """
    found = []
    reached = []
    for number, rule in enumerate(rules, 1):
        before = never_reached(rule, rules[: number - 1])
        if before:
            takers = " and ".join(f"rule {taker}" for taker in before)
            found.append(
                f"tool_rules: rule {number} can never decide: {takers} before it takes all whom it is for"
            )
        else:
            reached.append((number, rule))
            found += [f"tool_rules: rule {number}: {doubt}" for doubt in doubtful_globs(rule, tools)]
    for place, (number, rule) in enumerate(reached):
        wider = [other for other, later in reached[place + 1 :] if escapes_to(rule, later, tools)]
        if wider:
            found.append(
                f"tool_rules: rule {number} takes rights by group or login, and rule {wider[0]} after it "
                "gives more: who leaves the group or is renamed gets that. Give the wider rights by group or "
                "login, and the narrower ones to the rest; or name people by `id:` and their number"
            )
    return found


def doubtful_globs(rule: ToolRule, tools: Collection[str]) -> Iterator[str]:
    """Yields what is doubtful in the globs of one rule."""
    for glob in rule.clients or ():
        if reaches_into_host(glob):
            yield (
                f"clients: {glob!r} has a wildcard that reaches into the host of a client's URL: "
                "clients of other hosts match it too. Put it behind the host, as in 'https://claude.ai/*'"
            )
    for key, globs in (("allow", rule.rights.allow or ()), ("deny", rule.rights.deny)):
        for glob in globs:
            if tools and not any(fnmatch.fnmatchcase(tool, glob) for tool in tools):
                yield f"{key}: {glob!r} matches no tool"


def matches_everything(glob: str) -> bool:
    """Returns whether a glob matches every text."""
    return set(glob) == {"*"}


def covers(wide: str, narrow: str) -> bool:
    """Returns whether a glob surely matches whatever another one does; a False may be wrong."""
    if wide == narrow or matches_everything(wide):
        return True
    # Read as a text, a glob stands for all that it matches only if
    # its wildcards fall to a `*`, and it has no set of characters.
    return not set(wide) & set("?[") and "[" not in narrow and fnmatch.fnmatchcase(narrow, wide)


def takes_user(wide: str, narrow: str) -> bool:
    """Returns whether an entry of `users` surely matches whoever another one does."""
    if "id:" in (wide[:3], narrow[:3]):
        return wide == narrow or matches_everything(wide)
    return covers(wide, narrow)


def takes_group(wide: str, narrow: str) -> bool:
    """Returns whether all members of a group are in another one.

    Forgejo reports a member of `org:team` as a member of `org` too.
    """
    return wide == narrow or narrow.startswith(wide + ":")


def takes_all(
    wide: tuple[str, ...] | None, narrow: str | None, takes: Callable[[str, str], bool] = covers
) -> bool:
    """Returns whether a condition surely holds wherever one entry of another (None: everybody) does."""
    if wide is None or takes is not takes_group and any(map(matches_everything, wide)):
        return True
    return narrow is not None and any(takes(glob, narrow) for glob in wide)


def never_reached(rule: ToolRule, earlier: Sequence[ToolRule]) -> list[int]:
    """Returns the numbers of the earlier rules that together match every caller of a rule, else []."""
    numbers: set[int] = set()
    for user, group, client in itertools.product(
        rule.users or (None,), rule.groups or (None,), rule.clients or (None,)
    ):
        for number, other in enumerate(earlier, 1):
            if (
                takes_all(other.users, user, takes_user)
                and takes_all(other.groups, group, takes_group)
                and takes_all(other.clients, client)
            ):
                numbers.add(number)
                break
        else:
            return []
    return sorted(numbers)


def reaches_into_host(glob: str) -> bool:
    """Returns whether a glob of a client_id has a wildcard before the path: it may match other hosts."""
    prefix = re.split(r"[*?\[]", glob, maxsplit=1)[0]
    if prefix == glob:
        return False
    return "https://".startswith(prefix) or bool(re.fullmatch(r"https?://[^/]*", prefix))


def escapes_to(narrow: ToolRule, wide: ToolRule, tools: Collection[str]) -> bool:
    """Returns whether a user who leaves the rule's group, or changes the login, may get more by a later rule.

    Not if the later rule names its users one by one, or if the earlier rule matches all of the later one's.
    """
    by_name = narrow.groups is not None or any(not user.startswith("id:") for user in narrow.users or ())
    named = wide.users is not None and not any(set(user) & set("*?[") for user in wide.users)
    same_people = all(
        takes_all(narrow.users, user, takes_user) and takes_all(narrow.groups, group, takes_group)
        for user, group in itertools.product(wide.users or (None,), wide.groups or (None,))
    )
    same_clients = any(
        one is None or other is None or covers(one, other) or covers(other, one)
        for one, other in itertools.product(narrow.clients or (None,), wide.clients or (None,))
    )
    return (
        by_name
        and not named
        and not same_people
        and same_clients
        and gives_more(wide.rights, narrow.rights, tools)
    )


def gives_more(more: Rights, less: Rights, tools: Collection[str]) -> bool:
    """Returns whether some rights include a thing that others do not.

    `tools` are compared by name; where none are known, the globs are.
    """
    if more.resources and not less.resources or more.prompts and not less.prompts:
        return True
    if less.reads_only and not more.reads_only and more.allow != ():
        return True
    if tools:
        return any(more.admits(tool) and not less.admits(tool) for tool in tools)
    allowed = ("*",) if more.allow is None else more.allow
    if any(not takes_all(less.allow, glob) for glob in allowed):
        return True
    return any(
        not takes_all(more.deny, denied)
        and any(covers(glob, denied) or covers(denied, glob) for glob in allowed)
        for denied in less.deny
    )


# ============================================================================================================
# Settings
# Owns the one table from which the TOML keys, flags,
# environment variables, `--help` and the documentation come.
# Must not know what the settings are used for; it reads files, and opens nothing else.
# ============================================================================================================

REQUIRED: Final = object()
ENVIRONMENT_PREFIX = "FJMCP_BROKER_"
CONFIGURATION_FILE = "broker.toml"
SYSTEM_CONFIGURATION = "/etc/fjmcp-broker/broker.toml"
FILE_ONLY_KINDS = ("clients", "tool_rules")
# Values of these kinds may hold a secret: one that is wrong is not shown.
HIDDEN_KINDS = (*FILE_ONLY_KINDS, "store_url")
FORGEJO_SCOPE = re.compile(
    r"openid|profile|email|groups|all|public-only"
    r"|(read|write):(activitypub|admin|misc|notification|organization|package|issue|repository|user)"
)


Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True)
class ConfiguredClient:
    """A client of a [[clients]] table; `name` and `client_secret` may be empty."""

    client_id: str
    name: str
    redirect_uris: tuple[str, ...]
    client_secret: str


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
    Setting(
        "forgejo_url",
        "base_url",
        REQUIRED,
        "Forgejo as users see it; https, or http on loopback",
    ),
    Setting(
        "forgejo_internal_url",
        "any_url",
        "",
        "Forgejo as this server and its children reach it, where that differs",
    ),
    Setting("forgejo_authorize_url", "any_url", "", "override of <forgejo_url>/login/oauth/authorize"),
    Setting("forgejo_token_url", "any_url", "", "override of <forgejo_url>/login/oauth/access_token"),
    Setting("forgejo_userinfo_url", "any_url", "", "override of <forgejo_url>/login/oauth/userinfo"),
    Setting("forgejo_introspection_url", "any_url", "", "override of <forgejo_url>/login/oauth/introspect"),
    Setting(
        "forgejo_ca_file",
        "path",
        "",
        "certificate authority to trust for Forgejo, PEM; children are given it and the system's",
    ),
    Setting("forgejo_oauth_client_id", "text", REQUIRED, "client id of the OAuth2 application in Forgejo"),
    Setting(
        "forgejo_oauth_client_secret",
        "text",
        REQUIRED,
        "client secret of the OAuth2 application in Forgejo",
        secret=True,
    ),
    Setting(
        "forgejo_oauth_scopes",
        "forgejo_scopes",
        "openid profile read:user read:misc write:repository write:issue write:notification "
        "read:organization write:organization",
        "what is asked of Forgejo; frozen by Forgejo at each user's first login",
    ),
    Setting(
        "forgejo_mcp_binary",
        "command",
        "forgejo-mcp",
        "path, run with `--transport stdio --url <forgejo_internal_url, else forgejo_url>`; "
        "or a list, run as it is",
    ),
    Setting(
        "broker_name",
        "broker_name",
        "",
        "this one's name among several brokers of one store; session ids and `requestState` begin with it,"
        " so that a proxy can route by it",
    ),
    Setting("store_path", "path", "broker.db", "SQLite database"),
    Setting(
        "store_url",
        "store_url",
        "",
        "PostgreSQL database of several brokers instead of the SQLite one, such as"
        " postgresql://fjmcp@db.internal/fjmcp?sslmode=verify-full",
    ),
    Setting("store_password", "text", "", "password at store_url", secret=True),
    Setting(
        "key_file", "path", "", "sealing keys, one base64 key a line, newest first; empty: beside the store"
    ),
    Setting("key", "text", "", "sealing keys themselves, instead of key_file", secret=True),
    Setting("secrets_file", "path", "", "TOML file with any of the secret settings; /dev/stdin is read once"),
    Setting("max_sessions", "count", 50, "children awake at once", reload=True),
    Setting("max_sessions_per_user", "count", 10, "children awake at once of one user", reload=True),
    Setting(
        "max_session_rows_per_user",
        "count",
        1000,
        "sessions kept of one user; above it the longest unused goes",
        reload=True,
    ),
    Setting(
        "session_idle_timeout",
        "duration",
        "15m",
        "a child idle this long is stopped; its session stays",
        reload=True,
    ),
    Setting("session_lifetime", "duration", "90d", "a session unused this long ends", reload=True),
    Setting("access_token_lifetime", "duration", "1h", "life of an access token", reload=True),
    Setting(
        "refresh_token_lifetime",
        "duration",
        "90d",
        "life of a refresh token, renewed at each use",
        reload=True,
    ),
    Setting("request_timeout", "duration", "300s", "a request without an answer gets an error", reload=True),
    Setting(
        "input_timeout",
        "duration",
        "600s",
        "how long a client may take to answer a question of the child",
        reload=True,
    ),
    Setting(
        "allowed_users", "names", "", "Forgejo logins that may use the broker; empty: everyone", reload=True
    ),
    Setting(
        "allowed_groups",
        "names",
        "",
        "`org` or `org:team` that may use the broker; empty: everyone",
        reload=True,
    ),
    Setting(
        "allowed_origins",
        "origins",
        "https://claude.ai,https://claude.com,https://chatgpt.com",
        "web origins that may call /mcp, besides our own and loopback ones",
        reload=True,
    ),
    Setting(
        "allowed_redirect_schemes",
        "schemes",
        "cursor,vscode,vscode-insiders,jetbrains,claude",
        "private-use schemes that a redirect URI may have",
        reload=True,
    ),
    Setting(
        "read_only_tools",
        "names",
        "get_*,list_*,search_*,check_*,download_*",
        "names of tools that only read",
        reload=True,
    ),
    Setting(
        "trusted_proxies",
        "networks",
        "127.0.0.0/8,::1/128",
        "peers whose X-Forwarded-For is believed; the peer of a Unix socket always is",
        reload=True,
    ),
    Setting("max_connections", "count", 3072, "open HTTP connections", reload=True),
    Setting("max_connections_per_address", "count", 256, "open HTTP connections of one address", reload=True),
    Setting(
        "max_requests_per_user",
        "count",
        128,
        "requests with a user's token that are read or answered at once",
        reload=True,
    ),
    Setting(
        "max_requests_per_address",
        "count",
        64,
        "requests without a valid token of one address that are read or answered at once",
        reload=True,
    ),
    Setting(
        "max_streams_per_user",
        "count",
        64,
        "streams (GET and subscriptions/listen) of one user at once",
        reload=True,
    ),
    Setting(
        "max_body",
        "size",
        "4MiB",
        "body of a request to /mcp; at most a quarter of body_bytes",
        reload=True,
    ),
    Setting(
        "body_bytes",
        "size",
        "64MiB",
        "bodies being read at once, without the first 16 KiB of each",
        reload=True,
    ),
    Setting("max_form", "size", "64KiB", "body of any other request", reload=True),
    Setting("max_line", "size", "16MiB", "line of a child's output", reload=True),
    Setting("max_inflight", "count", 32, "requests of one session at once", reload=True),
    Setting("stream_events", "count", 256, "events that a stream keeps for a client to resume", reload=True),
    Setting("stream_bytes", "size", "1MiB", "bytes that a stream keeps for a client to resume", reload=True),
    Setting(
        "kept_bytes",
        "size",
        "64MiB",
        "answers that wait for a client or are being sent, over all",
        reload=True,
    ),
    Setting("kept_bytes_per_session", "size", "8MiB", "such answers of one session", reload=True),
    Setting(
        "kept_time", "duration", "5m", "time that an answer waits for a client to come back", reload=True
    ),
    Setting(
        "max_subscriptions", "count", 128, "resources that a session or a listener subscribes to", reload=True
    ),
    Setting("header_timeout", "duration", "10s", "time for a request's header", reload=True),
    Setting("body_timeout", "duration", "30s", "time for a request's body", reload=True),
    Setting(
        "write_timeout",
        "duration",
        "30s",
        "time in which a client must take 64 KiB of what is sent to it, or the rest",
        reload=True,
    ),
    Setting("idle_timeout", "duration", "150s", "time an unused connection is kept", reload=True),
    Setting(
        "start_timeout",
        "duration",
        "20s",
        "time for a child to start and to answer `initialize`",
        reload=True,
    ),
    Setting("stop_timeout", "duration", "5s", "time for a child to end after SIGTERM", reload=True),
    Setting("code_lifetime", "duration", "60s", "life of an authorization code", reload=True),
    Setting(
        "login_lifetime",
        "duration",
        "10m",
        "life of a login, from the consent page to the callback",
        reload=True,
    ),
    Setting("rate_register", "rate", 120, "registrations a minute from one address", reload=True),
    Setting(
        "rate_authorize",
        "rate",
        240,
        "requests a minute from one address to authorize, consent and callback",
        reload=True,
    ),
    Setting("rate_token", "rate", 600, "requests a minute from one address to token and revoke", reload=True),
    Setting(
        "child_keeps_state",
        "switch",
        False,
        "the child keeps state between calls: never put it to sleep or replace it",
    ),
    Setting(
        "client_documents",
        "switch",
        True,
        "accept a client_id that is the https URL of the client's own description, and fetch it",
        reload=True,
    ),
    Setting(
        "strict_scopes",
        "switch",
        False,
        "refuse a login to which Forgejo granted other scopes than asked",
        reload=True,
    ),
    Setting(
        "log_addresses",
        "log_addresses",
        "full",
        "addresses in the log: `full`, `network` (the first 24 bits, of IPv6 48), or `off`",
        reload=True,
    ),
    Setting("audit_calls", "switch", True, "write an audit record for each call of a tool", reload=True),
    Setting("metrics_listen", "any_address", "", "address for GET /metrics; empty: none"),
    Setting("log_format", "log_format", "json", "`json`, or `text` for people"),
    Setting(
        "check_at_start",
        "switch",
        True,
        "after each start, ask Forgejo and start forgejo-mcp once as `check` does; "
        "what fails is a warning in the log",
    ),
    Setting("debug", "switch", False, "log what children write to stderr, and each request", reload=True),
    Setting(
        "tool_rules",
        "tool_rules",
        (),
        "[[tool_rules]]: users, groups, clients; allow, deny, access, resources, prompts: "
        "the first rule that matches a caller decides (file only; see operate.md)",
        reload=True,
    ),
    Setting(
        "clients", "clients", (), "[[clients]]: client_id, name, redirect_uris, client_secret (file only)"
    ),
)
SETTING = {setting.name: setting for setting in SETTINGS}
# Every key that may be given -> (its setting, whether the value
# names a file that holds it: for whatever is one piece of text).
KEYS = {
    setting.name + "_file": (setting, True)
    for setting in SETTINGS
    if setting.kind in ("text", "forgejo_scopes", "store_url")
}
KEYS |= {setting.name: (setting, False) for setting in SETTINGS}
DEFAULT_PORTS = {"http": 80, "https": 443}
DURATION_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
SIZE_UNITS = {
    "b": 1,
    "k": 1 << 10,
    "kb": 1 << 10,
    "kib": 1 << 10,
    "m": 1 << 20,
    "mb": 1 << 20,
    "mib": 1 << 20,
}
SWITCH_WORDS = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}
URL = re.compile(
    r'(https?)://([a-z0-9._-]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?(/[!"$->@-~]*)?', re.IGNORECASE | re.ASCII
)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("must be text")
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f]", value):
        raise ValueError("must not contain control characters")
    return value.strip()


def _url(value: object) -> str:
    if not _text(value).isascii():
        raise ValueError("must be written in ASCII, a host name with other letters as xn--… (IDNA)")
    match = URL.fullmatch(_text(value).rstrip("/"))
    if not match or not 0 < int(match[3] or 1) < 65536:
        raise ValueError(
            "must be a URL that starts with https:// (or http:// on loopback), without user name, "
            "query or fragment"
        )
    scheme = match[1].lower()
    host = match[2].lower()
    port = int(match[3] or 0)
    path = match[4] or ""
    is_default_port = port in (0, DEFAULT_PORTS[scheme])
    return f"{scheme}://{host}{path}" if is_default_port else f"{scheme}://{host}:{port}{path}"


def _safe_url(value: object, with_path: bool = True) -> str:
    url = _url(value)
    if url.startswith("http:") and not is_loopback_name(urlsplit(url).hostname):
        raise ValueError("must be https; http is for loopback only")
    if not with_path and urlsplit(url).path:
        raise ValueError("must be an origin without a path, such as https://mcp.example.org")
    return url


def _optional_url(value: object) -> str:
    return _url(value) if value else ""


def _address(value: object) -> tuple[str, int]:
    match = re.fullmatch(r"([^/\s]+):([0-9]{1,5})", _text(value))
    if not match or int(match[2]) > 65535:
        raise ValueError("must be HOST:PORT, such as 127.0.0.1:8080")
    return match[1].strip("[]"), int(match[2])


def _optional_address(value: object) -> tuple[str, int] | None:
    return _address(value) if value else None


def _integer(least: int, why: str = "") -> Callable[[object], int]:
    def parse(value: object) -> int:
        if isinstance(value, str) and re.fullmatch(r"[0-9]{1,12}", value.strip()):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"must be a whole number of at least {least}{why}")
        return value

    return parse


def _scaled(value: object, units: Mapping[str, float], example: str) -> float:
    """Returns a number with units, such as 1h30m, in the smallest of them. Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    text = _text(value).lower().replace(" ", "")
    parts = re.findall(r"([0-9]+(?:\.[0-9]+)?)([a-z]*)", text)
    written = "".join(number + unit for number, unit in parts)
    if not parts or written != text or any(unit and unit not in units for _, unit in parts):
        raise ValueError(f"must be such as {example}")
    total = sum(float(number) * units.get(unit, 1) for number, unit in parts)
    if not 0 < total < 2**53:
        raise ValueError(f"must be more than nothing, such as {example}")
    return int(total) if total == int(total) else total


def _duration(value: object) -> float:
    return _scaled(value, DURATION_UNITS, "30s, 15m, 1h or 90d")


def _size(value: object) -> int:
    return int(_scaled(value, SIZE_UNITS, "64KiB or 4MiB"))


def _switch(value: object) -> bool:
    word = str(value).strip().lower()
    if not isinstance(value, (str, bool)) or word not in SWITCH_WORDS:
        raise ValueError("must be true or false")
    return SWITCH_WORDS[word]


def _choice(*words: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        word = str(value).strip().lower()
        if word not in words:
            raise ValueError(f"must be {', '.join(words[:-1])} or {words[-1]}")
        return word

    return parse


def _list(value: object) -> tuple[str, ...]:
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)):
        raise ValueError("must be a list of text")
    return tuple(item for item in map(_text, items) if item)


def _names(value: object) -> tuple[str, ...]:
    """Returns a list of words.

    A space or a quote in one means that the list was written in another way than was read.
    """
    items = _list(value)
    for item in items:
        if re.search(r"[\s\"'`]", item):
            raise ValueError(
                f"contains {item!r}; names are separated by commas, such as a,b, or are a TOML list"
            )
    return items


def _origins(value: object) -> tuple[str, ...]:
    """Returns a list of web origins, as browsers spell them (RFC 6454 6.1)."""
    items = tuple(item.lower().removesuffix("/") for item in _names(value))
    for item in items:
        if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#]+", item):
            raise ValueError(f"contains {item!r}, which is no origin such as https://app.example.org")
    return items


def _schemes(value: object) -> tuple[str, ...]:
    """Returns a list of URI schemes; what follows one in a URI may stand there and is taken off."""
    items = tuple(item.lower().partition(":")[0] for item in _names(value))
    for item in items:
        if not re.fullmatch(r"[a-z][a-z0-9+.-]*", item):
            raise ValueError(f"contains {item!r}, which is no scheme such as myapp (of myapp://callback)")
    return items


def _networks(value: object) -> tuple[Network, ...]:
    try:
        return tuple(ipaddress.ip_network(item, strict=False) for item in _list(value))
    except ValueError as error:
        raise ValueError(f"must be a list of addresses or networks: {error}") from None


def _command(value: object) -> str | tuple[str, ...]:
    command = _text(value) if isinstance(value, str) and "," not in value else _list(value)
    if not command:
        raise ValueError("must name a program")
    return command


def _forgejo_scopes(value: object) -> str:
    names = _text(value).split()
    wrong = [name for name in names if not FORGEJO_SCOPE.fullmatch(name)]
    if wrong:
        raise ValueError(
            f"contains no scope of Forgejo: {', '.join(wrong)}. Names are separated by spaces, "
            "such as `read:user`"
        )
    # Without one valid API scope Forgejo grants everything, the administration API included.
    if not any(":" in name or name == "all" for name in names):
        raise ValueError("names no API scope (such as read:user): Forgejo would then grant everything")
    return " ".join(names)


POSTGRESQL_URL = re.compile(r"postgres(?:ql)?://(?:([^@/?#]*)@)?([^@/?#]*)(?:/([^/?#]*))?(?:\?([^#]*))?")
# Parameters of libpq that would name a server, or hold a secret, where nobody looks for it.
REFUSED_PARAMETERS = ("password", "passfile", "service", "servicefile", "sslpassword")


def postgresql_parameters(url: str) -> dict[str, str]:
    """Returns the parameters of libpq (PostgreSQL 34.1.2) that a URL gives.

    `host`, `hostaddr` and `port` may be lists. libpq is handed these and never the URL: what is judged here
    is what it reads. Raises ValueError.
    """
    match = POSTGRESQL_URL.fullmatch(url)
    if not match:
        raise ValueError("must be such as postgresql://USER@HOST/DATABASE?sslmode=verify-full")
    user, hosts, database, query = (part or "" for part in match.groups())
    if ":" in user:
        raise ValueError("must not hold a password: give it as store_password, which is never shown")
    parts = [re.fullmatch(r"(\[[^\]]*\]|[^:\[\]]*)(?::([0-9]*))?", each) for each in hosts.split(",")]
    places = [(part[1].strip("[]"), part[2] or "") for part in parts if part]
    if len(places) != len(parts):
        raise ValueError("has a host that is neither HOST nor HOST:PORT nor [ADDRESS]:PORT")
    found = {"user": user, "dbname": database, "host": ",".join(host for host, _ in places)}
    if any(port for _, port in places):
        found["port"] = ",".join(port for _, port in places)
    for pair in filter(None, query.split("&")):
        name, is_given, value = pair.partition("=")
        if name in REFUSED_PARAMETERS or not is_given:
            raise ValueError(f"must not have the parameter {name!r}")
        found[name] = value
    return {name: unquote(value) for name, value in found.items() if value}


class DatabaseHost(NamedTuple):
    """One of the hosts of a database: its name or its socket's folder, its address if given, its port.

    Without a name it is at libpq's own socket.
    """

    name: str
    address: str
    port: str

    @property
    def is_near(self) -> bool:
        """Returns whether only this machine's own programs can be there."""
        place = self.address or self.name
        return not place or place[0] in "/@" or is_loopback(place)


def database_hosts(parameters: Mapping[str, str]) -> list[DatabaseHost]:
    """Returns the hosts that libpq's parameters name, in their order. Raises ValueError."""
    names, addresses, ports = (parameters.get(key, "").split(",") for key in ("host", "hostaddr", "port"))
    count = max(len(names), len(addresses))
    if {len(names), len(addresses)} - {1, count} or len(ports) not in (1, count):
        raise ValueError("must have as many hosts as addresses, and one port or as many")
    lists = (each if len(each) == count else each * count for each in (names, addresses, ports))
    return [DatabaseHost(*each) for each in zip(*lists)]


def _store_url(value: object) -> str:
    url = _text(value)
    parameters = postgresql_parameters(url) if url else {}
    is_near = all(host.is_near for host in database_hosts(parameters))
    if not is_near and parameters.get("sslmode") != "verify-full":
        raise ValueError("needs sslmode=verify-full, unless the database is on loopback or a Unix socket")
    return url


def is_loopback(host: str) -> bool:
    """Returns whether a name or an address can only be this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return is_loopback_name(host)


def _client(value: object) -> ConfiguredClient:
    """Returns one [[clients]] table. Raises ValueError."""
    if not isinstance(value, dict):
        raise ValueError("must be written as [[clients]] tables")
    known = {"client_id", "name", "redirect_uris", "client_secret"}
    for key in set(value) - known:
        raise ValueError(f"has the unknown key {key!r}; known are {', '.join(sorted(known))}")
    client_id, name, secret = (_text(value.get(key, "")) for key in ("client_id", "name", "client_secret"))
    if not re.fullmatch(r"[\x21-\x7e]{1,200}", client_id):
        raise ValueError("needs a client_id of visible characters in each table")
    redirect_uris = _list(value.get("redirect_uris") or ())
    if not redirect_uris:
        raise ValueError(f"needs redirect_uris for {client_id!r}")
    return ConfiguredClient(client_id, name, redirect_uris, secret)


def _clients(value: object) -> tuple[ConfiguredClient, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError("must be written as [[clients]] tables")
    clients = tuple(map(_client, value))
    ids = [client.client_id for client in clients]
    for client_id in ids:
        if ids.count(client_id) > 1:
            raise ValueError(f"has the client_id {client_id!r} twice")
    return clients


def _truth(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _whom(
    is_good: Callable[[str], object], what: str, fold: bool = True
) -> Callable[[object], tuple[str, ...]]:
    """Returns a parser of a rule's condition: a list with at least one entry, each of which must be valid."""

    def parse(value: object) -> tuple[str, ...]:
        entries = _list(value)
        if not entries:
            raise ValueError("names nobody; leave it out for everybody")
        wrong = [entry for entry in entries if not is_good(entry)]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is not {what}")
        return tuple(entry.casefold() for entry in entries) if fold else entries

    return parse


RULE_KEYS = ("users", "groups", "clients", "allow", "deny", "access", "resources", "prompts")


def _tool_rules(value: object) -> tuple[ToolRule, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(table, dict) for table in value):
        raise ValueError("must be written as [[tool_rules]] tables")
    problems: list[str] = []
    rules = [_tool_rule(f"rule {number}", table, problems) for number, table in enumerate(value, 1)]
    if problems:
        raise ValueError("; ".join(problems))
    return tuple(rules)


def _tool_rule(about: str, table: Mapping[str, object], problems: list[str]) -> ToolRule:
    """Returns one table as a rule; what is wrong with it goes into `problems`, a sentence for each key."""
    for key in table:
        if key not in RULE_KEYS:
            hint = did_you_mean(key, RULE_KEYS) or f"; known are {', '.join(RULE_KEYS)}"
            problems.append(f"{about}: unknown key {key!r}{hint}")

    def read(key: str, parse: Callable[[Any], Any], default: Any) -> Any:
        try:
            return parse(table[key]) if key in table else default
        except ValueError as error:
            problems.append(f"{about}: {key} = {table[key]!r}: {error}")
            return default

    allow = read("allow", _list, None)
    rights = Rights(
        allow,
        read("deny", _list, ()),
        read("access", _access, False),
        read("resources", _truth, allow is None),
        read("prompts", _truth, allow is None),
    )
    return ToolRule(
        read("users", _whom(_is_login_glob, "a login, or `id:` and a number"), None),
        read("groups", _whom(_is_group, "`org` or `org:team`; it takes no wildcards"), None),
        read("clients", _whom(_is_client_glob, "a client_id; a name does not count", fold=False), None),
        rights,
    )


def _access(value: object) -> bool:
    if value != "read":
        raise ValueError('must be "read"; leave it out for all that the login may do')
    return True


def _is_login_glob(text: str) -> bool:
    return bool(re.fullmatch(r"id:[1-9][0-9]*|[\w.*?!\[\]-]+", text))


def _is_group(text: str) -> bool:
    return bool(re.fullmatch(r"[^*?\[\]:]+(:[^*?\[\]:]+)?", text))


def _is_client_glob(text: str) -> bool:
    return bool(re.fullmatch(r"[\x21-\x7e]+", text))


def _broker_name(value: object) -> str:
    text = _text(value)
    if not re.fullmatch(r"[a-z0-9-]{0,20}", text):
        raise ValueError("must be of at most 20 of the characters a-z, 0-9 and -")
    return text


# Each kind of setting: how a value is read, as text or as
# TOML has it. Raises ValueError with what it must be.
KINDS: dict[str, Callable[[object], object]] = {
    "text": _text,
    "path": _text,
    "origin": functools.partial(_safe_url, with_path=False),
    "base_url": _safe_url,
    "any_url": _optional_url,
    "address": _address,
    "any_address": _optional_address,
    "list": _list,
    "names": _names,
    "origins": _origins,
    "schemes": _schemes,
    "networks": _networks,
    "command": _command,
    "broker_name": _broker_name,
    "store_url": _store_url,
    "clients": _clients,
    "tool_rules": _tool_rules,
    "count": _integer(1),
    "rate": _integer(60, " a minute: many users of one client share addresses"),
    "forgejo_scopes": _forgejo_scopes,
    "duration": _duration,
    "size": _size,
    "switch": _switch,
    "log_format": _choice("json", "text"),
    "log_addresses": _choice("full", "network", "off"),
}


class Settings:
    """The settings in force, an attribute for each; `sources` says where each value came from."""

    public_url: str
    listen: tuple[str, int]
    forgejo_url: str
    forgejo_internal_url: str
    forgejo_authorize_url: str
    forgejo_token_url: str
    forgejo_userinfo_url: str
    forgejo_introspection_url: str
    forgejo_ca_file: str
    forgejo_oauth_client_id: str
    forgejo_oauth_client_secret: str
    forgejo_oauth_scopes: str
    forgejo_mcp_binary: str | tuple[str, ...]
    broker_name: str
    store_path: str
    store_url: str
    store_password: str
    key_file: str
    key: str
    secrets_file: str
    max_sessions: int
    max_sessions_per_user: int
    max_session_rows_per_user: int
    session_idle_timeout: float
    session_lifetime: float
    access_token_lifetime: float
    refresh_token_lifetime: float
    request_timeout: float
    input_timeout: float
    allowed_users: tuple[str, ...]
    allowed_groups: tuple[str, ...]
    allowed_origins: tuple[str, ...]
    allowed_redirect_schemes: tuple[str, ...]
    read_only_tools: tuple[str, ...]
    trusted_proxies: tuple[Network, ...]
    max_connections: int
    max_connections_per_address: int
    max_requests_per_user: int
    max_requests_per_address: int
    max_streams_per_user: int
    max_body: int
    body_bytes: int
    max_form: int
    max_line: int
    max_inflight: int
    stream_events: int
    stream_bytes: int
    kept_bytes: int
    kept_bytes_per_session: int
    kept_time: float
    max_subscriptions: int
    header_timeout: float
    body_timeout: float
    write_timeout: float
    idle_timeout: float
    start_timeout: float
    stop_timeout: float
    code_lifetime: float
    login_lifetime: float
    rate_register: int
    rate_authorize: int
    rate_token: int
    child_keeps_state: bool
    audit_calls: bool
    client_documents: bool
    strict_scopes: bool
    metrics_listen: tuple[str, int] | None
    log_format: str
    log_addresses: str
    check_at_start: bool
    debug: bool
    tool_rules: tuple[ToolRule, ...]
    clients: tuple[ConfiguredClient, ...]

    def __init__(self, values: Mapping[str, object], sources: Mapping[str, str]) -> None:
        self.__dict__.update(values)
        self.sources = sources

    def reload(self, newer: Settings) -> list[str]:
        """Takes over what may change while running.

        Returns the names of settings that changed but may not.
        """
        changed = [
            setting for setting in SETTINGS if getattr(newer, setting.name) != getattr(self, setting.name)
        ]
        for setting in changed:
            if setting.reload:
                setattr(self, setting.name, getattr(newer, setting.name))
        return [setting.name for setting in changed if not setting.reload]

    @property
    def resource(self) -> str:
        """The canonical resource identifier of the MCP endpoint (RFC 8707)."""
        return self.public_url + "/mcp"

    @property
    def broker_prefix(self) -> str:
        """What session ids and `requestState` begin with, so that a proxy finds the broker that gave them."""
        return self.broker_name and self.broker_name + "."


class ConfigurationError(Exception):
    """Everything that is wrong with a configuration, a sentence each, in `problems`."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns what to say after an unknown key: the nearest known one, if one is near."""
    import difflib  # here, because a broker that serves has no use for it

    near = difflib.get_close_matches(name, known, 1, 0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


@functools.cache
def _standard_input() -> bytes:
    """Returns all of standard input, and closes it: children must find nothing there."""
    data = sys.stdin.buffer.read()
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    return data


def decode_text(data: bytes) -> str:
    """Returns the text of a file: UTF-8, or the encoding of its byte order mark.

    Windows editors and PowerShell's `>` write such marks. Raises ValueError.
    """
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("it is no text in UTF-8; save it as UTF-8") from None


def read_file(path: str) -> bytes:
    """Returns a file's bytes. Raises OSError."""
    with open(path, "rb") as file:
        return file.read()


@dataclass(frozen=True)
class Table:
    """Settings as one source gives them; `text` is the TOML they were read from, "" if it was none."""

    source: str
    values: Mapping[str, object]
    text: str = ""
    secrets_only: bool = False

    def line(self, key: str) -> str:
        """Returns ` (line 3)`, where a key of the TOML's top level begins; "" for values without TOML."""
        lines = self.text.splitlines()
        for number, line in enumerate(lines):
            if begins_with_key(line, key):
                with contextlib.suppress(
                    ValueError
                ):  # within a text of several lines, what comes before is no TOML
                    tomllib.loads("\n".join(lines[:number]))
                    return f" (line {number + 1})"
        return ""


def begins_with_key(line: str, key: str) -> bool:
    """Returns whether a line of TOML begins with this key, bare or quoted, as a value's or a table's name."""
    rest = line.strip().lstrip("[").lstrip()
    for spelled in (key, f'"{key}"', f"'{key}'"):
        if rest.startswith(spelled) and rest[len(spelled) :].lstrip()[:1] in ("]", ".", "="):
            return True
    return False


class Given(NamedTuple):
    """A value that a source gives for a setting; `line` as Table.line says it."""

    value: object
    source: str
    line: str = ""


def _read_toml(path: str, problems: list[str], secrets_only: bool = False) -> Table:
    """Returns the keys of a TOML file; none, and a sentence in `problems`, when it cannot be read."""
    source = f"file {path}"
    try:
        text = decode_text(_standard_input() if path == "/dev/stdin" else read_file(path))
        return Table(source, tomllib.loads(text), text, secrets_only)
    except OSError as error:
        problems.append(f"cannot read {path}: {error.strerror}")
    except (ValueError, RecursionError) as error:
        problems.append(f"{path} is not TOML: {error}")
    return Table(source, {})


def _given(table: Table, name: str) -> tuple[Setting, Given]:
    """Returns the setting that a key of a source means, and its value. Raises ValueError."""
    setting, in_file = KEYS.get(name, (None, False))
    value = table.values[name]
    if setting is None and isinstance(value, dict):
        raise ValueError(f"unknown section [{name}]: settings stand at the top of the file, in no section")
    if setting is None:
        raise ValueError(f"unknown setting {name!r}{did_you_mean(name, KEYS)}")
    if table.secrets_only and not setting.secret:
        raise ValueError(f"{name!r} is not a secret setting and does not belong here")
    if setting.kind in FILE_ONLY_KINDS and not table.source.startswith("file"):
        raise ValueError(f"{name!r} can be given in the configuration file only")
    if not in_file:
        return setting, Given(value, table.source, table.line(name))
    try:
        content = decode_text(read_file(_text(value))).strip()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{name}: cannot read {value!r}: {reason}") from None
    return setting, Given(content, f"{table.source}, {value}")


def _tables(
    flags: Mapping[str, str], environ: Mapping[str, str], file: Table, problems: list[str]
) -> list[Table]:
    """Returns every source of settings; a later one counts before an earlier one."""
    variables = {
        key[len(ENVIRONMENT_PREFIX) :].lower(): value
        for key, value in environ.items()
        if key.startswith(ENVIRONMENT_PREFIX) and key != ENVIRONMENT_PREFIX + "CONFIG"
    }
    tables = [file, Table("environment", variables), Table("flag", flags)]
    paths = [table.values["secrets_file"] for table in tables if "secrets_file" in table.values]
    if paths and paths[-1] and isinstance(paths[-1], str):
        tables.insert(1, _read_toml(paths[-1], problems, secrets_only=True))
    return tables


def _missing(setting: Setting) -> str:
    flag = setting.name.replace("_", "-")
    variable = ENVIRONMENT_PREFIX + setting.name.upper()
    return f"{setting.name} is missing: {setting.help}. Set it in the file, as --{flag} or as {variable}"


def _conflicts(values: Mapping[str, Any], given: Mapping[str, Given]) -> Iterator[str]:
    """Yields a sentence for each pair of values that cannot be together."""
    listen = values.get("listen")
    if values.get("public_url", "").startswith("http:") and listen and not is_loopback_name(listen[0]):
        source, line = given["listen"][1:]
        yield (
            f"{source}: listen: with an http public_url it must be on loopback: tokens would travel in the"
            f" clear{line}"
        )
    if listen and listen == values.get("metrics_listen"):
        source, line = given["metrics_listen"][1:]
        yield f"{source}: metrics_listen: it is the address of `listen`; give it another port{line}"
    if values.get("store_url"):
        source, line = given["store_url"][1:]
        if not values.get("key") and not values.get("key_file"):
            yield f"{source}: store_url: key or key_file must be given, the same for every broker{line}"
        if values.get("child_keeps_state"):
            yield (
                f"{source}: store_url: it cannot be with child_keeps_state"
                f" ({given['child_keeps_state'].source}): a session may go on at another broker, with another"
                f" child{line}"
            )
    if values.get("max_body", 0) * 4 > values.get("body_bytes", math.inf):
        source, line = given["max_body"][1:]
        yield (
            f"{source}: max_body = {values['max_body']} is more than a quarter of body_bytes = "
            f"{values['body_bytes']} ({given['body_bytes'].source}): raise body_bytes or lower max_body{line}"
        )


def load_settings(
    flags: Mapping[str, str], environ: Mapping[str, str], config_path: str | None = None
) -> Settings:
    """Returns settings from flags (name -> text), the environment, a TOML file and defaults, in that order.

    Raises ConfigurationError with every problem at once, each naming its key and where the value came from.
    """
    problems: list[str] = []
    file = _read_toml(config_path, problems) if config_path else Table("file", {})
    tables = _tables(flags, environ, file, problems)
    is_unreadable = bool(problems)  # a file that cannot be read is one problem, not one a setting
    given = {setting.name: Given(setting.default, "default") for setting in SETTINGS}
    for table in tables:
        for name in table.values:
            try:
                setting, taken = _given(table, name)
                given[setting.name] = taken
            except ValueError as error:
                problems.append(f"{table.source}: {error}{table.line(name)}")
    values = {}
    for setting in SETTINGS:
        value, source, line = given[setting.name]
        if value is REQUIRED or (value == "" and setting.default is REQUIRED):
            if not is_unreadable:
                problems.append(_missing(setting))
            continue
        try:
            values[setting.name] = KINDS[setting.kind](value)
        except (ValueError, TypeError) as error:
            hidden = setting.secret or setting.kind in HIDDEN_KINDS
            shown = "" if hidden else f" = {value!r}"
            problems.append(f"{source}: {setting.name}{shown}: {error}{line}")
    problems += _conflicts(values, given)
    if problems and not config_path and os.path.exists(CONFIGURATION_FILE):
        problems.append(
            f"{CONFIGURATION_FILE} was not read: it or its folder belongs to another user, "
            f"or others may write there. If it is yours, name it: --config {CONFIGURATION_FILE}"
        )
    if problems:
        raise ConfigurationError(problems)
    return Settings(values, {name: value.source for name, value in given.items()})


def _is_mine_alone(path: str) -> bool:
    """Returns whether a file and its folder belong to the caller, and nobody else can write there."""
    real = os.path.realpath(path)
    try:
        found = [
            os.stat(each) for each in (real, os.path.dirname(real), os.path.dirname(os.path.abspath(path)))
        ]
    except OSError:
        return False
    return all(status.st_uid == os.geteuid() and not status.st_mode & 0o022 for status in found)


def find_configuration(environ: Mapping[str, str], is_to_be_made: bool = False) -> str | None:
    """Returns the configuration file where --config names none; None if there is none.

    One in the current folder is read only if nobody else can have put it there; `init` makes a new one there.
    """
    if named := environ.get(ENVIRONMENT_PREFIX + "CONFIG"):
        return named
    if is_to_be_made or _is_mine_alone(CONFIGURATION_FILE):
        return CONFIGURATION_FILE
    return SYSTEM_CONFIGURATION if os.path.exists(SYSTEM_CONFIGURATION) else None


# ============================================================================================================
# Log and metrics
# Owns what leaves the program for operators: one line per event on stderr, and the numbers of /metrics.
# Must not be handed a token, code, secret, cookie or tool
# argument; it escapes what it is given and judges nothing.
# ============================================================================================================

# What the journal calls a level (sd-daemon(3)).
PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3}
RECORDS_A_MINUTE = 10
RECORDS_IN_ALL = 600
RECORD_OWNERS = 1000

NULLABLE = ("session",)  # fields that are null where others are left out
AUDIT_EVENTS = (
    "client_registered client_removed consent_given consent_refused login account_opened token_issued "
    "token_refreshed token_revoked reuse_detected logged_out_upstream suspended identity_changed "
    "access_refused session_opened session_ended child_started child_stopped tool_called"
).split()
CALL_OUTCOMES = "ok tool_error error denied cancelled started unknown".split()
CHILD_STATES = "starting idle busy stopping".split()
FORGEJO_ENDPOINTS = "token userinfo introspection user users version".split()
FORGEJO_OUTCOMES = "ok refused failed".split()
CONNECT_STEPS = "discovery registered authorize consent login token first_call".split()

# Why a request was turned away, by the endpoint at which that happens. Routine ones are records at debug.
ROUTINE_REASONS = {
    "no_token", "token_expired", "no_metadata", "method_not_allowed", "method_not_found",
    "unsupported_version",
}  # fmt: skip
_ANYWHERE = (
    "misdirected_request method_not_allowed too_many_requests bad_request store_unavailable "
    "server_error other"
)
_BODY = " content_too_large request_timeout temporarily_unavailable"
_PAGE = " malformed two_cookies temporarily_unavailable"
_AUTHORIZE = (
    " repeated unknown_client unreadable_client redirect_uri no_pkce invalid_request "
    "unsupported_response_type request_not_supported request_uri_not_supported invalid_target "
    "interaction_required"
)
_FORM = _BODY + " foreign_form malformed wrong_browser two_cookies expired"
_CALLBACK = (
    " malformed_answer expired wrong_browser not_logged_in access_denied forgejo_denied forgejo_failed "
    "forgejo_down forgejo_misconfigured forgejo_refused account_refused"
)
_CLIENT = " invalid_request unknown_client invalid_client bad_assertion keys_unreadable"
_TOKEN = (
    " unsupported_grant_type invalid_target bad_code code_expired code_used bad_refresh_token login_ended "
    "login_expired refresh_token_reused logged_out suspended clock_was_set invalid_grant"
)
_MCP = (
    " forbidden_origin no_token token_expired bad_token logged_out suspended insufficient_scope parse_error"
    " invalid_message invalid_params method_not_found unsupported_version header_mismatch missing_capability"
    " session_not_found busy upstream_down upstream_misconfigured starting_failed child_missing"
)
REASONS = {
    endpoint: (_ANYWHERE + more).split()
    for endpoint, more in {
        "home": "",
        "healthz": "",
        "server_metadata": "",
        "resource_metadata": "",
        "register": _BODY + " invalid_request invalid_client_metadata invalid_redirect_uri",
        "authorize": _PAGE + _AUTHORIZE,
        "consent": _FORM + " undecided answered access_denied unknown_client",
        "callback": _PAGE + _CALLBACK,
        "token": _BODY + _CLIENT + _TOKEN,
        "revoke": _BODY + _CLIENT,
        "account": _PAGE,
        "account_login": _FORM,
        "account_end": _FORM,
        "mcp": _BODY + _MCP,
        "other": " not_found no_metadata uri_too_long header_too_large request_timeout version_not_supported"
        " expectation_failed not_implemented",
    }.items()
}

# The clients that are counted by name: hosts of their metadata
# documents, and what their names and User-Agents begin with.
KNOWN_CLIENTS = {
    "claude": (("claude.ai", "claude.com"), ("claude",), ("claude",)),
    "chatgpt": (("chatgpt.com", "openai.com"), ("chatgpt", "openai"), ("openai", "python/3.12 aiohttp")),
    "codex": ((), ("codex",), ("codex",)),
    "copilot": (("github.com",), ("github copilot", "copilot"), ("copilot", "github-copilot")),
    "vscode": (("vscode.dev",), ("visual studio code", "vs code"), ("visual studio code", "vscode")),
    "cursor": (("cursor.com", "cursor.sh"), ("cursor",), ("cursor",)),
    "gemini": ((), ("gemini",), ("gemini",)),
    "zed": (("zed.dev",), ("zed",), ("zed",)),
    "goose": (("goose-docs.ai",), ("goose",), ("goose",)),
    "opencode": (("opencode.ai",), ("opencode",), ("opencode",)),
    "jetbrains": ((), ("jetbrains", "intellij", "junie"), ("jetbrains", "junie")),
    "inspector": ((), ("mcp inspector",), ("mcp-inspector",)),
    "mcp_remote": ((), ("mcp cli proxy", "mcp-remote"), ("mcp-remote",)),
    "other": ((), (), ()),
}
# The client whose host is another's too, by the path of its document.
CODEX_DOCUMENT = "https://chatgpt.com/oauth/codex/"


def known_client(client_id: str = "", name: str = "", user_agent: str = "") -> str:
    """Returns the word of KNOWN_CLIENTS under which a client is counted, `other` for all others."""
    if client_id.startswith(CODEX_DOCUMENT):
        return "codex"
    host = client_id[8:].partition("/")[0] if client_id.startswith("https://") else ""
    for word, (hosts, names, agents) in KNOWN_CLIENTS.items():
        is_known = host in hosts or name.lower().startswith(names) or user_agent.lower().startswith(agents)
        if is_known:
            return word
    return "other"


@dataclass(frozen=True, slots=True)
class Family:
    """A metric family: its `labels`, and all values that each may have; `buckets` are those of a histogram.

    So every series is there from the start.
    """

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()
    series: tuple[tuple[str, ...], ...] = ((),)
    buckets: tuple[float, ...] = ()


def _each(*values: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    return tuple(itertools.product(*values))


_REQUEST_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 2.5, 10.0, 60.0)
_CALL_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0, 120.0, 300.0)
_START_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 20.0)
_FORGEJO_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 15.0)
_REFUSALS = tuple((endpoint, reason) for endpoint, reasons in REASONS.items() for reason in reasons)
# fmt: off
FAMILIES = (
    Family("fjmcp_build_info", "gauge", "The running version, and the git blob id of its file.",
        ("version", "git"), ()),
    Family("fjmcp_sessions", "gauge", "Sessions that the store holds."),
    Family("fjmcp_children", "gauge", "Children by state.", ("state",), _each(CHILD_STATES)),
    Family("fjmcp_children_limit", "gauge", "Children that may be awake at once (max_sessions)."),
    Family("fjmcp_connections", "gauge", "Open HTTP connections."),
    Family("fjmcp_streams", "gauge", "Event streams that are being sent."),
    Family("fjmcp_events_total", "counter", "Audit events.", ("event",), _each(AUDIT_EVENTS)),
    Family("fjmcp_refusals_total", "counter", "Requests that were turned away.", ("endpoint", "reason"),
        _REFUSALS),
    Family("fjmcp_connect_total", "counter", "Steps of connecting that succeeded.", ("client", "step"),
        _each(KNOWN_CLIENTS, CONNECT_STEPS)),
    Family("fjmcp_http_request_duration_seconds", "histogram",
        "Time until the head of an answer was sent, streams left out.",
        ("endpoint",), _each(REASONS), _REQUEST_BUCKETS),
    Family("fjmcp_tool_call_duration_seconds", "histogram", "Duration of tools/call.",
        ("outcome",), _each(CALL_OUTCOMES), _CALL_BUCKETS),
    Family("fjmcp_child_start_duration_seconds", "histogram",
        "Time until a started child has answered the handshake.",
        buckets=_START_BUCKETS),
    Family("fjmcp_forgejo_request_duration_seconds", "histogram", "Duration of requests to Forgejo.",
        ("endpoint", "outcome"), _each(FORGEJO_ENDPOINTS, FORGEJO_OUTCOMES), _FORGEJO_BUCKETS),
    Family("process_resident_memory_bytes", "gauge", "Resident memory size in bytes."),
    Family("process_cpu_seconds_total", "counter", "Total user and system CPU time spent in seconds."),
    Family("process_open_fds", "gauge", "Number of open file descriptors."),
    Family("process_max_fds", "gauge", "Maximum number of open file descriptors."),
    Family("process_start_time_seconds", "gauge", "Start time of the process since unix epoch in seconds."),
)
# fmt: on


class Metrics:
    """The counters and histograms of /metrics.

    Each has all its series from the start, so nothing grows with what comes in.
    """

    def __init__(self) -> None:
        self._families = {family.name: family for family in FAMILIES}
        # Guards the numbers; a leaf.
        self._lock = threading.Lock()
        self._values: dict[tuple[str, tuple[str, ...]], float] = {
            (family.name, labels): 0 for family in FAMILIES for labels in family.series if not family.buckets
        }
        # Of each series: how many observations fell into each bucket (the last: above all), and their sum.
        self._observed: dict[tuple[str, tuple[str, ...]], tuple[list[int], list[float]]] = {
            (family.name, labels): ([0] * (len(family.buckets) + 1), [0.0])
            for family in FAMILIES
            for labels in family.series
            if family.buckets
        }

    def count(self, name: str, labels: tuple[str, ...] = (), by: int = 1) -> None:
        """Adds to a counter.

        Labels that are no series of it count as the one whose last label is `other`, if there is one.
        """
        with self._lock:
            key = (name, labels)
            if key not in self._values:
                key = (name, (*labels[:-1], "other"))
            if key in self._values:
                self._values[key] += by

    def observe(self, name: str, labels: tuple[str, ...], seconds: float) -> None:
        """Adds an observation to a histogram."""
        bucket = bisect.bisect_left(self._families[name].buckets, seconds)
        with self._lock:
            counts, total = self._observed[name, labels]
            counts[bucket] += 1
            total[0] += seconds

    def value(self, name: str, labels: tuple[str, ...] = ()) -> float:
        """Returns what a counter stands at, or how often a histogram was observed."""
        with self._lock:
            if (name, labels) in self._observed:
                return sum(self._observed[name, labels][0])
            return self._values[name, labels]

    def text(self, gauges: Mapping[tuple[str, tuple[str, ...]], float]) -> bytes:
        """Returns all families in Prometheus' text format 0.0.4; the values of `gauges` are read now."""
        with self._lock:
            values = {**self._values, **gauges}
            observed = {key: (list(counts), total[0]) for key, (counts, total) in self._observed.items()}
        lines = []
        for family in FAMILIES:
            lines += [f"# HELP {family.name} {family.help}", f"# TYPE {family.name} {family.kind}"]
            for (name, labels), number in values.items():
                if name == family.name:
                    lines.append(f"{name}{_shown(family.labels, labels)} {number}")
            for (name, labels), (counts, total) in observed.items():
                if name == family.name:
                    lines += _histogram(family, labels, counts, total)
        return ("\n".join(lines) + "\n").encode()


def _shown(names: tuple[str, ...], values: tuple[str, ...]) -> str:
    """Returns labels in Prometheus' text format. No value of ours needs escaping."""
    return "{" + ",".join(f'{name}="{value}"' for name, value in zip(names, values)) + "}" if names else ""


def _histogram(family: Family, labels: tuple[str, ...], counts: list[int], total: float) -> Iterator[str]:
    """Yields the lines of a series of a histogram: its buckets count what is at most their bound."""
    bounds = [*(f"{bound:g}" for bound in family.buckets), "+Inf"]
    names = (*family.labels, "le")
    for bound, count in zip(bounds, itertools.accumulate(counts)):
        yield f"{family.name}_bucket{_shown(names, (*labels, bound))} {count}"
    shown = _shown(family.labels, labels)
    yield f"{family.name}_sum{shown} {total}"
    yield f"{family.name}_count{shown} {sum(counts)}"


def process_metrics() -> dict[tuple[str, tuple[str, ...]], float]:
    """Returns what Prometheus' client libraries tell of their process (/proc/self; proc(5))."""
    # The command's name, field 2, may contain blanks and brackets.
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    # Not from /proc/stat, which ProcSubset=pid of the shipped unit hides.
    boot = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    ticks = os.sysconf("SC_CLK_TCK")
    values = {
        "process_resident_memory_bytes": int(fields[21]) * os.sysconf("SC_PAGE_SIZE"),
        "process_cpu_seconds_total": (int(fields[11]) + int(fields[12])) / ticks,
        "process_open_fds": len(os.listdir("/proc/self/fd")),
        "process_max_fds": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "process_start_time_seconds": round(boot + int(fields[19]) / ticks, 2),
    }
    return {(name, ()): value for name, value in values.items()}


def is_journal(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Returns whether a stream goes to systemd's journal.

    JOURNAL_STREAM names the journal's device and inode (systemd.exec(5)).
    """
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):  # no file at all
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def silence_if_broken(stream: TextIO) -> None:
    """Turns a stream that cannot be written to /dev/null.

    Else the interpreter complains, as it ends, of what is left in it.
    """
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "w", encoding="ascii") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


def rfc3339(seconds: float) -> str:
    """Returns a time as RFC 3339 has it, in UTC, with milliseconds."""
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass(slots=True)
class Burst:
    """The records of one event and owner within a minute: how many were written and how many suppressed.

    `fields` says what they are about.
    """

    since: float
    level: str
    fields: dict[str, object]
    written: int = 0
    suppressed: int = 0


class Log:
    """Writes events as JSON objects (or text for people), one a line. Safe from any thread."""

    def __init__(self, settings: Settings, stream: TextIO | None = None, clock: Clock | None = None) -> None:
        self._settings = settings
        self._stream = stream or sys.stderr
        self._clock = clock or Clock()
        self._to_journal = is_journal(self._stream, os.environ)
        # Guards the stream and the bursts; a leaf.
        self._lock = threading.Lock()
        self._closed = False
        self._request = threading.local()
        self._bursts: dict[tuple[str, str], Burst] = {}
        self.metrics = Metrics()

    @contextlib.contextmanager
    def request(self, request_id: str) -> Iterator[None]:
        """Everything this thread logs within carries the request's id."""
        self._request.id = request_id
        try:
            yield
        finally:
            self._request.id = None

    def event(self, level: str, event: str, **fields: object) -> None:
        """Logs one event: `level` is debug, info, warning or error, `event` one word in snake_case.

        Fields are plain values.
        """
        if level == "debug" and not self._settings.debug:
            return
        moment = self._clock.now()
        known: dict[str, object] = {}
        if getattr(self._request, "id", None):
            known["request"] = self._request.id
        known.update((key, value) for key, value in fields.items() if value is not None or key in NULLABLE)
        self._hide_addresses(known)
        if self._settings.log_format == "text":
            rest = " ".join(f"{key}={json.dumps(value)}" for key, value in known.items())
            line = f"{time.strftime('%H:%M:%S', time.localtime(moment))} {level:7} {event} {rest}\n"
        else:
            line = json.dumps({"time": rfc3339(moment), "level": level, "event": event} | known) + "\n"
        if self._to_journal:
            line = f"<{PRIORITIES[level]}>{line}"
        with self._lock, contextlib.suppress(OSError, ValueError):
            if not self._closed:
                self._stream.write(line)
                self._stream.flush()

    def close(self) -> None:
        """Writes nothing from now on.

        A daemon thread that holds the stream as the interpreter ends would abort the process (Py_FinalizeEx).
        """
        with self._lock:
            self._closed = True
            silence_if_broken(self._stream)

    def _hide_addresses(self, fields: dict[str, object]) -> None:
        """Says no more of addresses than `log_addresses` allows."""
        allowed = self._settings.log_addresses
        if allowed == "full":
            return
        for name in ("address", "peer"):
            address = fields.pop(name, None)
            if address is not None and allowed == "network":
                fields[name] = network_of(str(address), 24, 48)

    def bounded(self, level: str, event: str, owner: str, **fields: object) -> None:
        """Log an event that a child or a stranger causes: ten a minute for each owner, 600 for each event.

        What was suppressed is a record with their number, when the minute is over (flush).
        """
        if level == "debug" and not self._settings.debug:
            return
        with self._lock:
            due = self._is_due(level, event, owner, fields)
        if due:
            self.event(level, event, **fields)

    def _is_due(self, level: str, event: str, owner: str, fields: dict[str, object]) -> bool:
        """Returns whether one more record may be written; it is counted. Under the lock."""
        now = time.monotonic()
        of_event = self._bursts.setdefault((event, ""), Burst(now, level, {}))
        burst = self._bursts.get((event, owner))
        if burst is None and len(self._bursts) >= RECORD_OWNERS:
            of_event.suppressed += 1
            return False
        if burst is None:
            burst = self._bursts[event, owner] = Burst(now, level, fields)
        if owner and burst.written >= RECORDS_A_MINUTE:
            burst.suppressed += 1
            return False
        if of_event.written >= RECORDS_IN_ALL:
            of_event.suppressed += 1
            return False
        of_event.written += 1
        if burst is not of_event:
            burst.written += 1
        return True

    def flush(self) -> None:
        """Forgets the minutes that are over, and writes how many records each suppressed."""
        now = time.monotonic()
        with self._lock:
            over = [(key, burst) for key, burst in self._bursts.items() if now - burst.since >= 60]
            for key, _ in over:
                del self._bursts[key]
        for (event, _), burst in over:
            if burst.suppressed:
                self.event(burst.level, event, suppressed=burst.suppressed, **burst.fields)

    def audit(self, event: str, **fields: object) -> None:
        """Log a fact that someone may later have to prove: who did what through which client."""
        self.metrics.count("fjmcp_events_total", (event,))
        self.event("info", event, audit=True, **fields)

    def refused(
        self, endpoint: str, status: int, reason: str, address: str, who: Mapping[str, object]
    ) -> None:
        """Counts and logs that a request was refused.

        `who`: client, client_name, user, user_agent, as far as known.
        """
        self.metrics.count("fjmcp_refusals_total", (endpoint, reason))
        level = "debug" if reason in ROUTINE_REASONS else "info"
        owner = f"{endpoint} {reason} {who.get('user') or who.get('client') or address}"
        fields = {"endpoint": endpoint, "status": status, "reason": reason, **who, "address": address}
        self.bounded(level, "refused", owner, **fields)

    def connect_step(self, step: str, client_id: str = "", name: str = "", user_agent: str = "") -> None:
        """Counts a step of connecting that a client has done (CONNECT_STEPS)."""
        self.metrics.count("fjmcp_connect_total", (known_client(client_id, name, user_agent), step))


class Allowance:
    """A token bucket for what one child sends: `burst` units at once, then `rate` a second.

    Not safe from several threads.
    """

    def __init__(self, burst: float, rate: float) -> None:
        self._burst = burst
        self._rate = rate
        self._left = burst
        self._since = time.monotonic()
        self.refused = 0  # units refused since the last that was granted

    def _refill(self) -> None:
        now = time.monotonic()
        self._left = min(self._burst, self._left + (now - self._since) * self._rate)
        self._since = now

    def grants(self, units: float = 1) -> bool:
        """Whether so many units are to be had; they are spent then, and else counted in `refused`."""
        self._refill()
        if self._left < units:
            self.refused += 1
            return False
        self._left -= units
        return True

    def spend(self, units: float) -> float:
        """Spend units in any case; the seconds to wait until the bucket holds nothing negative."""
        self._refill()
        self._left -= units
        return max(0.0, -self._left / self._rate)


# ============================================================================================================
# Seal
# Owns the sealing keys and the one construction by which a
# secret may lie in the database (encrypt-then-MAC, HMAC-SHA256).
# Must not know what it seals, nor where that is stored.
# ============================================================================================================

MAGIC = b"FJ1"


def hkdf(key: bytes, salt: bytes, info: bytes, length: int = 64) -> bytes:
    """Returns `length` bytes of HKDF-SHA256 (RFC 5869)."""
    pseudo_random_key = hmac.digest(salt, key, "sha256")
    blocks = b""
    block = b""
    for counter in range(1, -(-length // 32) + 1):
        block = hmac.digest(pseudo_random_key, block + info + bytes([counter]), "sha256")
        blocks += block
    return blocks[:length]


def _xor_stream(key: bytes, data: bytes) -> bytes:
    blocks = -(-len(data) // 32)
    stream = b"".join(hmac.digest(key, counter.to_bytes(8, "big"), "sha256") for counter in range(blocks))
    mixed = int.from_bytes(data, "big") ^ int.from_bytes(stream[: len(data)], "big")
    return mixed.to_bytes(len(data), "big")


def _key_id(key: bytes) -> bytes:
    return hmac.digest(key, b"fjmcp/v1/kid", "sha256")[:4]


def _tag(mac_key: bytes, *parts: bytes) -> bytes:
    framed = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    return hmac.digest(mac_key, framed, "sha256")


def seal_with(key: bytes, purpose: str, owner: str, plain: bytes, salt: bytes | None = None) -> bytes:
    """Returns `plain` (at most 64 KiB) in a box that opens only with the same key, purpose and owner.

    Raises ValueError for a longer one.
    """
    if len(plain) > 65536:
        raise ValueError("too long to seal")
    # A fresh salt gives each box keys of its own, so the counter may start at 0 every time.
    salt = salt or os.urandom(32)
    keys = hkdf(key, salt, b"fjmcp/v1/box/" + purpose.encode())
    header = MAGIC + _key_id(key) + salt
    sealed = _xor_stream(keys[:32], plain)
    return header + sealed + _tag(keys[32:], header, purpose.encode(), owner.encode(), sealed)


def unseal_with(key: bytes, purpose: str, owner: str, box: bytes) -> bytes:
    """Returns what is in a box. Raises ValueError for every kind of failure, before anything is decrypted."""
    header = box[:39]
    sealed = box[39:-32]
    tag = box[-32:]
    if len(box) < 71 or header[:7] != MAGIC + _key_id(key):
        raise ValueError("not a box of this key")
    keys = hkdf(key, header[7:], b"fjmcp/v1/box/" + purpose.encode())
    if not hmac.compare_digest(tag, _tag(keys[32:], header, purpose.encode(), owner.encode(), sealed)):
        raise ValueError("box does not open")
    return _xor_stream(keys[:32], sealed)


@contextlib.contextmanager
def new_file(path: str, expected: bytes | None = None) -> Iterator[str]:
    """Makes a file that only its owner can read, whole or not at all; yields a temporary name to fill.

    Raises FileExistsError unless the file's content is `expected` (None: it must not exist). The file is on
    disk, with its name, when the block has ended.
    """
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY)
    fresh = f"{path}.new"
    try:
        # Two at once would each make a key, and the one whose key is replaced would have sealed with it.
        fcntl.flock(folder, fcntl.LOCK_EX)
        if (read_file(path) if os.path.lexists(path) else None) != expected:
            raise FileExistsError(errno.EEXIST, "is there already", path)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(fresh)
        file = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            yield fresh
            if expected is not None:
                os.chown(fresh, os.stat(path).st_uid, os.stat(path).st_gid)
            os.fsync(file)
        finally:
            os.close(file)
        os.replace(fresh, path)
        os.fsync(folder)
    finally:
        os.close(folder)


def put_file(path: str, text: str, expected: bytes | None = None) -> None:
    """Makes a file with this text, as new_file does. Raises FileExistsError."""
    with new_file(path, expected) as fresh:
        with open(fresh, "w", encoding="utf-8") as file:
            file.write(text)


def new_key() -> str:
    """Returns a new sealing key, as a line of a key file."""
    return base64.b64encode(os.urandom(32)).decode() + "\n"


class Keyring:
    """The sealing keys, newest first: the first seals, every one opens the boxes that name it."""

    def __init__(self, keys: Iterable[bytes], path: str | None = None) -> None:
        self._keys = tuple(keys)
        self._path = path
        self._seen: tuple[int, int] | None = None
        # The ids of the keys that all brokers of the store have, None where this is the only one.
        self.common: frozenset[str] | None = None

    @property
    def ids(self) -> list[str]:
        """The ids of the keys, newest first; each box names one."""
        return [_key_id(key).hex() for key in self.keys]

    @property
    def _by_use(self) -> list[bytes]:
        """The keys; the one that seals is first: the newest that every broker of the store has."""
        return sorted(self.keys, key=lambda key: not self._is_common(key))

    def _is_common(self, key: bytes) -> bool:
        return self.common is None or _key_id(key).hex() in self.common

    @property
    def keys(self) -> tuple[bytes, ...]:
        """The keys; those of a file are read again when rotate-key has changed it."""
        if self._path:
            # A file that is gone or wrong is told at the next start.
            with contextlib.suppress(OSError, ValueError):
                status = os.stat(self._path)
                if self._seen != (status.st_ino, status.st_mtime_ns):
                    self._keys = Keyring.parse(decode_text(read_file(self._path)))._keys
                    self._seen = (status.st_ino, status.st_mtime_ns)
        return self._keys

    @classmethod
    def parse(cls, text: str, path: str | None = None) -> Keyring:
        """Returns a keyring of the base64 keys of 32 bytes in these lines (or between commas).

        Raises ValueError.
        """
        keys = []
        for line in filter(None, map(str.strip, re.split(r"[\n,]", text))):
            try:
                keys.append(base64.b64decode(line, validate=True))
            except binascii.Error:
                raise ValueError(
                    "a sealing key is not base64: put a line there that `openssl rand -base64 32` prints"
                ) from None
            if len(keys[-1]) != 32:
                raise ValueError("a sealing key must be 32 bytes, written as base64 (44 characters)")
        if not keys:
            raise ValueError("there is no sealing key")
        return cls(keys, path)

    def is_newest(self, box: bytes) -> bool:
        """Returns whether a box was sealed with the newest key."""
        return bytes(box[3:7]) == _key_id(self.keys[0])

    def seal(self, purpose: str, owner: str, value: object) -> bytes:
        """Returns a box with a JSON value in it, padded so that its length says little."""
        plain = json.dumps(value, separators=(",", ":")).encode()
        return seal_with(self._by_use[0], purpose, owner, plain + b" " * (-len(plain) % 256))

    def unseal(self, purpose: str, owner: str, box: bytes) -> Any:
        """Returns the JSON value in a box.

        Raises ValueError when no key opens it for this purpose and owner.
        """
        for key in self.keys:
            if bytes(box[3:7]) == _key_id(key):
                return json.loads(unseal_with(key, purpose, owner, bytes(box)))
        raise ValueError("box of an unknown key")

    def chained(self, token: str) -> Keyring:
        """Returns the keyring that only the holder of `token` can make, for sealing the token's successor."""
        return Keyring(hkdf(token.encode(), key, b"fjmcp/v1/grace", 32) for key in self._by_use)


def file_trouble(path: str, error: Exception) -> str:
    """Returns what keeps a file or a database from being used, for the operator, with the remedy.

    Only damage calls for a backup.
    """
    number = getattr(error, "errno", None)
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    said = getattr(error, "strerror", None) or str(error)
    free = 1 << 20
    with contextlib.suppress(OSError):
        disk = os.statvfs(os.path.dirname(os.path.abspath(path)))
        free = disk.f_bavail * disk.f_frsize
    # A full disk is one of the causes of these two.
    is_unclear = code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)
    if number in (errno.ENOSPC, errno.EDQUOT) or code == sqlite3.SQLITE_FULL or is_unclear and free < 65536:
        return f"the disk is full ({said}). Free some space there; nothing is lost, and no backup is needed"
    if number == errno.EROFS or code == sqlite3.SQLITE_READONLY:
        return (
            f"it cannot be written ({said}): its disk is mounted read-only, or it belongs to another user."
            " Mount the disk for writing, or chown the file to the user that serves"
        )
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return f"it is damaged ({said}). Restore a backup (docs/operate.md); it is never made anew"
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return f"another process keeps it locked ({said}). End that one, or try again"
    if number in (errno.EACCES, errno.EPERM) or code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return (
            f"{said}: user {os.geteuid()} may not use it. "
            "It and its folder must belong to the user that serves"
        )
    if code == sqlite3.SQLITE_IOERR:
        return (
            f"its disk fails ({said}). Look into the kernel's log (dmesg), and copy the file to another disk"
        )
    return said


def key_path(settings: Settings) -> str:
    """Returns where the sealing keys are, if they are not given as `key`."""
    return settings.key_file or settings.store_path + ".key"


def refuse_no_database(path: str) -> None:
    """Raises ConfigurationError for a store_path that is a folder, or another file than SQLite's."""
    if os.path.isdir(path):
        problem = (
            f"store_path: {path} is a folder. Name a file in it, such as {os.path.join(path, 'broker.db')}"
        )
        raise ConfigurationError([problem])
    with contextlib.suppress(OSError), open(path, "rb") as file:
        head = file.read(16)
        if head and head != b"SQLite format 3\0":
            raise ConfigurationError([f"store_path: {path} is another file, no store. Name one of its own"])


def load_keyring(settings: Settings) -> Keyring:
    """Returns the keyring of `key`, of `key_file`, or of the file beside the store.

    That file is made when neither it nor the store exists. A key is never made for an existing store: it
    could open nothing in it. Raises ConfigurationError.
    """
    path = key_path(settings)
    try:
        if settings.key:
            return Keyring.parse(settings.key)
        if not os.path.exists(path):
            if settings.store_url:
                missing = (
                    f"key_file: {path} is missing. It is the same for every broker of store_url, and is made"
                )
                raise ConfigurationError([f"{missing} once: openssl rand -base64 32"])
            if os.path.exists(settings.store_path):
                refuse_no_database(settings.store_path)
                raise ConfigurationError(
                    [
                        f"key_file: {path} is missing, and {settings.store_path} was sealed with it. "
                        "Put the key back"
                    ]
                )
            # The file exists now where another process is starting, too.
            with contextlib.suppress(FileExistsError):
                put_file(path, new_key())
        return Keyring.parse(decode_text(read_file(path)), path)
    except OSError as error:
        raise ConfigurationError([f"key_file: cannot use {path}: {file_trouble(path, error)}"]) from None
    except ValueError as error:
        raise ConfigurationError([f"{'key' if settings.key else 'key_file: ' + path}: {error}"]) from None


# ============================================================================================================
# SQLite
# Owns what an engine is (it runs the Store's batches on a database), and the one for a SQLite file.
# Must not know tables or what a statement is for.
# ============================================================================================================

Values = tuple[Any, ...]  # a row as the database gives it
Parameters = Mapping[str, object]
BUSY_WAIT = 5  # seconds that a batch waits for the database


class StoreUnavailable(HTTPError):
    """The database cannot be written or read just now (full, locked, broken, away); nothing was changed."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            503,
            "temporarily_unavailable",
            "The server cannot save anything just now; try again in a moment.",
            (("Retry-After", "5"),),
        )
        self.reason = reason


class Engine(Protocol):
    """What runs the Store's batches; each call but `close` raises StoreUnavailable.

    `name` is the database's for messages, `setting` the one that names it.
    """

    name: str
    setting: str

    def migrate(self, scripts: Sequence[str]) -> None:
        """Makes the tables, or brings them from version n to the last by scripts[n:].

        Raises ConfigurationError when they are of a newer release.
        """

    def run(self, parameters: Parameters, statements: Sequence[str]) -> list[Values]:
        """Runs the statements as one batch. Returns the rows of those that return any."""

    def run_each(self, statement: str, parameters: Iterable[Parameters]) -> None:
        """Runs one statement with each of the parameters, in one batch or several."""

    def read(self, statement: str, parameters: Parameters) -> tuple[list[str], list[Values]]:
        """Returns the names of the columns and the rows that a statement finds."""

    def change_marker(self) -> object:
        """Returns a value that changes when anyone has committed."""

    def clock(self) -> Clock:
        """Returns the clock by which the times in the database go."""

    def close(self) -> None:
        """Closes what is open."""


class SqliteEngine:
    """A SQLite file in WAL mode: one writer and one reader connection.

    Every commit is on disk before the call returns.
    """

    setting = "store_path"

    def __init__(self, path: str, alone: bool = True) -> None:
        """Opens or makes the file; `alone` keeps a second broker out, operators' commands come beside one.

        Raises ConfigurationError for a file that is none, is damaged or in use.
        """
        self.name = path
        self._opened = contextlib.ExitStack()
        # The locks guard a connection each; leaves.
        self._write_lock = threading.Lock()
        self._read_lock = threading.Lock()
        try:
            if alone:
                self._claim(path)
            self._writer = self._open(path)
            self._reader = self._open(path)
            self._check_pages()
        except sqlite3.Error as error:
            self.close()
            raise ConfigurationError([f"store_path: {self._trouble(error).reason}"]) from None
        except BaseException:
            self.close()
            raise

    def _claim(self, path: str) -> None:
        """Takes the store for this process; files are made 0600 before SQLite could make them otherwise."""
        try:
            lock_file = os.open(path + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            self._opened.callback(os.close, lock_file)
            fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
            for name in filter(os.path.exists, (path, path + "-wal", path + "-shm")):
                os.chmod(name, 0o600)
        except BlockingIOError:
            raise ConfigurationError([f"store_path: another broker is using {path}"]) from None
        except OSError as error:
            trouble = f"store_path: cannot use {path}: {file_trouble(path, error)}"
            raise ConfigurationError([trouble]) from None

    def _open(self, path: str) -> sqlite3.Connection:
        connection = self._connect(path)
        self._opened.callback(self._close_connection, connection)
        return connection

    @staticmethod
    def _close_connection(connection: sqlite3.Connection) -> None:
        with contextlib.suppress(sqlite3.Error):
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.close()

    @staticmethod
    def _connect(path: str) -> sqlite3.Connection:
        connection = sqlite3.connect(
            path, isolation_level=None, check_same_thread=False, timeout=BUSY_WAIT, cached_statements=256
        )
        for pragma in (
            "journal_mode=WAL",
            "synchronous=FULL",
            "secure_delete=ON",
            "foreign_keys=ON",
            "trusted_schema=OFF",
        ):
            connection.execute(f"PRAGMA {pragma}")
        return connection

    def _check_pages(self) -> None:
        problem = self._writer.execute("PRAGMA quick_check(1)").fetchone()[0]
        if problem != "ok":
            broken = sqlite3.DatabaseError(problem)
            broken.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
            raise broken

    def migrate(self, scripts: Sequence[str]) -> None:
        """Brings the tables to the last version; the version is SQLite's `user_version`."""
        version = int(self.read("PRAGMA user_version", {})[1][0][0])
        if version > len(scripts):
            raise ConfigurationError([newer_schema(self, version)])
        for number, script in enumerate(scripts[version:], version + 1):
            with self._batch() as writer:
                # A command beside us may have been faster.
                if writer.execute("PRAGMA user_version").fetchone()[0] < number:
                    for statement in statements_of(script):
                        writer.execute(statement)
                    writer.execute(f"PRAGMA user_version = {number}")

    def _trouble(self, error: sqlite3.Error) -> StoreUnavailable:
        return StoreUnavailable(f"{self.name} cannot be used: {file_trouble(self.name, error)}")

    @contextlib.contextmanager
    def _batch(self) -> Iterator[sqlite3.Connection]:
        """One transaction: everything within is committed to disk together, or nothing is."""
        # Without a limit threads would queue behind one that waits for another process.
        if not self._write_lock.acquire(timeout=BUSY_WAIT):
            raise StoreUnavailable("another process keeps it locked")
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
            raise self._trouble(error) from error
        finally:
            self._write_lock.release()

    def run(self, parameters: Parameters, statements: Sequence[str]) -> list[Values]:
        """Runs the statements as one batch. Returns the rows of those that return any."""
        rows: list[Values] = []
        with self._batch() as writer:
            for statement in statements:
                rows += writer.execute(statement, parameters).fetchall()
        return rows

    def run_each(self, statement: str, parameters: Iterable[Parameters]) -> None:
        """Runs one statement with each of the parameters, all in one batch."""
        with self._batch() as writer:
            writer.executemany(statement, parameters)

    def read(self, statement: str, parameters: Parameters) -> tuple[list[str], list[Values]]:
        """Returns the names of the columns and the rows that a statement finds."""
        with self._read_lock:
            try:
                cursor = self._reader.execute(statement, parameters)
                return [column[0] for column in cursor.description], cursor.fetchall()
            except sqlite3.Error as error:
                raise self._trouble(error) from error

    def change_marker(self) -> object:
        """Returns a value that changes when anyone has committed: the reader sees our writer as another."""
        return self.read("PRAGMA data_version", {})[1][0][0]

    def clock(self) -> Clock:
        """Returns the machine's clock: one broker writes all times."""
        return Clock()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[Callable[[str, Parameters], sqlite3.Cursor]]:
        """Nobody else can write within the block, which gets what executes statements of its own."""
        with self._batch() as writer:
            yield writer.execute

    def backup(self, path: str) -> None:
        """Writes a consistent copy to a file. Raises StoreUnavailable."""
        try:
            with self._read_lock, contextlib.closing(sqlite3.connect(path)) as copy:
                self._reader.backup(copy)
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            which = self.name if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) else path
            raise StoreUnavailable(f"{which} cannot be used: {file_trouble(which, error)}") from error

    def close(self) -> None:
        """Checkpoints and closes; the lock goes with the process or here."""
        with self._write_lock, self._read_lock:
            self._opened.close()


def statements_of(script: str) -> list[str]:
    """Returns the statements of a script, in which each ends a line."""
    return [statement for statement in script.split(";\n") if statement.strip()]


def newer_schema(engine: Engine, version: int) -> str:
    """Returns the sentence that refuses a store of a newer release."""
    return (
        f"{engine.setting}: {engine.name} was written by a newer version of this program (schema {version})"
    )


# ============================================================================================================
# PostgreSQL
# Owns how a batch runs on a PostgreSQL server that several brokers share: libpq, one connection to write and
# one to read, repeating what was undone, finding out what became of a commit whose answer was lost; and what
# PostgreSQL says otherwise than SQLite. Nothing of it is loaded without `store_url`.
# Must not know tables or what a statement is for; those of its own are batches and schema_version.
# ============================================================================================================

OLDEST_POSTGRESQL = 13
SETTLE_WAIT = 30  # seconds in which it must turn out what became of a commit; who asked waits
ATTEMPT_PAUSE = 0.2  # seconds between two attempts to connect
AWAY_PAUSE = 1.0  # seconds in which nobody tries anew after no connection could be made
MOST_ATTEMPTS = 100  # of one batch; its time is over before
MOST_STEPS = 500  # of one statement in a batch: each is a way to the server and back
BATCHES_KEPT = 600  # seconds
LOAD_WAIT = 3600  # seconds that a copy of a whole store may take
SMALL_DRIFT = 60.0  # seconds: what a database's clock may differ at once without having been set

# What PostgreSQL says otherwise than SQLite, in whose words all statements stand: (SQLite's, PostgreSQL's).
POSTGRESQL_WORDS = (
    (" WITHOUT ROWID", ""),
    ("INTEGER PRIMARY KEY AUTOINCREMENT", "INTEGER PRIMARY KEY"),
    ("INTEGER PRIMARY KEY", "INTEGER GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY"),
    (" INTEGER", " BIGINT"),
    (" REAL", " DOUBLE PRECISION"),
    (" BLOB", " BYTEA"),
    (" TEXT", ' TEXT COLLATE "C"'),
    (' AS TEXT COLLATE "C"', " AS TEXT"),
    ("LIMIT -1 OFFSET", "OFFSET"),
    ("json_each(:listed)", "json_array_elements_text(CAST(:listed AS json))"),
    ("hex(hash)", "encode(hash, 'hex')"),
    ("last_insert_rowid()", "lastval()"),
)
NAMED_PARAMETER = re.compile(r"(?<![\w:]):([a-z_]+)")

# Nothing here is the connection's own: with pgbouncer the next batch may run on another. Locks are waited for
# shorter than we wait; a commit is never cut short, even where the server's settings cut statements. Without
# scans of whole tables two brokers' batches seldom read what the other writes.
BEGIN_BATCH = """
    BEGIN ISOLATION LEVEL SERIALIZABLE;
    SET LOCAL lock_timeout = '4s';
    SET LOCAL statement_timeout = 0;
    SET LOCAL idle_in_transaction_session_timeout = '5s';
    SET LOCAL enable_seqscan = off;
    SET LOCAL jit = off;
    INSERT INTO batches (batch_id, is_committed) VALUES ('{batch}', TRUE)
"""
# Waits for the batch's end, and keeps it from being committed later if it is not here: no two have one id.
SETTLE_BATCH = """
    BEGIN;
    SET LOCAL lock_timeout = '4s';
    INSERT INTO batches (batch_id, is_committed) VALUES ('{batch}', FALSE) ON CONFLICT DO NOTHING;
    COMMIT
"""
ENGINE_TABLES = """
CREATE TABLE schema_version (version BIGINT NOT NULL);
CREATE TABLE batches (
  batch_id TEXT PRIMARY KEY, is_committed BOOLEAN NOT NULL,
  made_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX batches_by_age ON batches (made_at);
INSERT INTO schema_version (version) VALUES (0);
"""

# libpq-fe.h
CONNECTION_OK = 0
CONNECTION_BAD = 1
POLLING_FAILED = 0
POLLING_READING = 1
POLLING_OK = 3
COMMAND_OK = 1
TUPLES_OK = 2
BINARY = 1
# Functions of libpq: what they return, and take. p: a pointer, s: text, i: int, u: unsigned int, -: nothing.
LIBPQ_FUNCTIONS = """
    PQconnectStartParams p ppi
    PQconnectPoll        i p
    PQstatus             i p
    PQsocket             i p
    PQserverVersion      i p
    PQerrorMessage       s p
    PQsetnonblocking     i pi
    PQsetNoticeReceiver  p ppp
    PQsendQuery          i ps
    PQsendQueryParams    i psippppi
    PQflush              i p
    PQconsumeInput       i p
    PQisBusy             i p
    PQgetResult          p p
    PQresultStatus       i p
    PQresultErrorField   s pi
    PQntuples            i p
    PQnfields            i p
    PQfname              s pi
    PQftype              u pi
    PQgetisnull          i pii
    PQgetlength          i pii
    PQgetvalue           p pii
    PQclear              - p
    PQfinish             - p
"""
# Types by their numbers in pg_type.dat, in the binary form.
BOOLEAN = 16
BYTEA = 17
BIGINT = 20
TEXT = 25
DOUBLE = 701
DECODERS: dict[int, Callable[[bytes], object]] = {
    BOOLEAN: lambda data: data == b"\x01",
    BYTEA: bytes,
    **dict.fromkeys((BIGINT, 21, 23), lambda data: int.from_bytes(data, "big", signed=True)),
    DOUBLE: lambda data: struct.unpack(">d", data)[0],
    **dict.fromkeys((TEXT, 18, 19, 705, 1042, 1043), lambda data: data.decode()),
}


class PostgresError(Exception):
    """An error of the server (its SQLSTATE in `code`) or of the connection (`is_lost`)."""

    def __init__(self, message: str, code: str = "", is_lost: bool = True) -> None:
        super().__init__(" ".join(message.split()))
        self.code = code
        self.is_lost = is_lost

    @property
    def is_undone(self) -> bool:
        """Returns whether the batch may succeed when it is run again.

        It collided (40001, 40P01; 23505: another made the same row), or its connection or server is gone
        (25006: it is another server now that is written to).
        """
        return self.is_lost or self.code in ("40001", "40P01", "25006", "23505")


@functools.cache
def libpq() -> Any:
    """Returns PostgreSQL's client library. Raises ConfigurationError when it is not here.

    Variables PG* are taken out of the environment: libpq would take from them what the settings do not say.
    """
    for name in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[name]
    try:
        library = ctypes.CDLL("libpq.so.5")
    except OSError as error:
        missing = f"store_url: PostgreSQL's client library cannot be loaded ({error})"
        raise ConfigurationError([f"{missing}. Install it: Debian's package is libpq5"]) from None
    kinds = {"p": ctypes.c_void_p, "s": ctypes.c_char_p, "i": ctypes.c_int, "u": ctypes.c_uint, "-": None}
    for name, result, arguments in map(str.split, LIBPQ_FUNCTIONS.strip().splitlines()):
        function = getattr(library, name)
        function.restype = kinds[result]
        function.argtypes = [kinds[each] for each in arguments]
    return library


def postgresql_value(value: object) -> tuple[int, bytes | None]:
    """Returns the type's number and the binary form of a parameter; of a NULL PostgreSQL finds the type."""
    if value is None:
        return 0, None
    if isinstance(value, bool):
        return BOOLEAN, b"\x01" if value else b"\x00"
    if isinstance(value, int):
        return BIGINT, value.to_bytes(8, "big", signed=True)
    if isinstance(value, float):
        return DOUBLE, struct.pack(">d", value)
    if isinstance(value, bytes):
        return BYTEA, value
    # SQLite can keep NUL in a text, PostgreSQL cannot.
    return TEXT, str(value).replace("\0", "\ufffd").encode()


@functools.cache
def postgresql_statement(statement: str) -> tuple[bytes, tuple[str, ...]]:
    """Returns a statement in PostgreSQL's words, with $1, $2, …, and the names of these parameters."""
    for ours, theirs in POSTGRESQL_WORDS:
        statement = statement.replace(ours, theirs)
    names = tuple(dict.fromkeys(NAMED_PARAMETER.findall(statement)))
    return NAMED_PARAMETER.sub(lambda match: f"${names.index(match[1]) + 1}", statement).encode(), names


def c_array(kind: Any, values: Sequence[object]) -> Any:
    """Returns an array of C."""
    return (kind * len(values))(*values)


class PostgresConnection:
    """A connection to a server; each call ends by a moment of time.monotonic(), else raises PostgresError."""

    def __init__(self, parameters: Mapping[str, str], until: float) -> None:
        self._pq = libpq()
        words = [word.encode() for word in parameters], [word.encode() for word in parameters.values()]
        keys, values = (c_array(ctypes.c_char_p, [*each, None]) for each in words)
        self._handle = self._pq.PQconnectStartParams(keys, values, 0)
        if not self._handle:
            raise PostgresError("out of memory")
        try:
            self._connect(until)
        except BaseException:
            self.close()
            raise

    def _connect(self, until: float) -> None:
        state = POLLING_READING + 1  # writing, as libpq has it for the first time
        if self._pq.PQstatus(self._handle) == CONNECTION_BAD:
            raise self._lost()
        while state != POLLING_OK:
            self._wait(select.POLLIN if state == POLLING_READING else select.POLLOUT, until)
            state = self._pq.PQconnectPoll(self._handle)
            if state == POLLING_FAILED:
                raise self._lost()
        self._pq.PQsetnonblocking(self._handle, 1)
        # What a server notes beside its answers would go to stderr. This is a function of libpq that does
        # nothing with it: a callback of ours would be called where Python must not run.
        self._pq.PQsetNoticeReceiver(
            self._handle, ctypes.cast(self._pq.PQresultStatus, ctypes.c_void_p), None
        )

    def _lost(self) -> PostgresError:
        return PostgresError(self._pq.PQerrorMessage(self._handle).decode(errors="replace"))

    def _wait(self, events: int, until: float) -> int:
        """Waits for the socket; returns what it is ready for."""
        poll = select.poll()
        poll.register(self._pq.PQsocket(self._handle), events)
        ready = poll.poll(max(0.0, until - time.monotonic()) * 1000)
        if not ready:
            raise PostgresError("no answer in time")
        return ready[0][1]

    @property
    def version(self) -> int:
        """The server's major version."""
        return int(self._pq.PQserverVersion(self._handle)) // 10000

    def command(self, text: str, until: float) -> None:
        """Runs statements without parameters, as one message."""
        if not self._pq.PQsendQuery(self._handle, text.encode()):
            raise self._lost()
        self._results(until, is_binary=False)

    def execute(self, statement: str, parameters: Parameters, until: float) -> tuple[list[str], list[Values]]:
        """Runs one statement of the Store; returns the names of its columns and its rows."""
        text, names = postgresql_statement(statement)
        types, values = zip(*[postgresql_value(parameters[name]) for name in names]) if names else ((), ())
        sent = self._pq.PQsendQueryParams(
            self._handle,
            text,
            len(names),
            c_array(ctypes.c_uint, types),
            c_array(ctypes.c_char_p, values),
            c_array(ctypes.c_int, [len(value or b"") for value in values]),
            c_array(ctypes.c_int, [BINARY] * len(names)),
            BINARY,
        )
        if not sent:
            raise self._lost()
        return self._results(until)

    def _results(self, until: float, is_binary: bool = True) -> tuple[list[str], list[Values]]:
        """Sends what is left to send and reads all results; returns the last one's, if it is binary."""
        while self._pq.PQflush(self._handle) == 1:
            if self._wait(select.POLLIN | select.POLLOUT, until) & select.POLLIN:
                self._pq.PQconsumeInput(self._handle)
        found: tuple[list[str], list[Values]] = ([], [])
        failure: PostgresError | None = None
        while True:
            while self._pq.PQisBusy(self._handle):
                self._wait(select.POLLIN, until)
                if not self._pq.PQconsumeInput(self._handle):
                    raise self._lost()
            result = self._pq.PQgetResult(self._handle)
            if not result:
                break
            try:
                if self._pq.PQresultStatus(result) in (COMMAND_OK, TUPLES_OK):
                    found = self._found(result) if is_binary else found
                else:
                    failure = failure or self._failure(result)
            finally:
                self._pq.PQclear(result)
        if failure:
            raise failure
        return found

    def _failure(self, result: int) -> PostgresError:
        severity, code, message = (
            (self._pq.PQresultErrorField(result, ord(field)) or b"").decode(errors="replace")
            for field in "VCM"
        )
        if not message:
            return self._lost()
        is_bad = self._pq.PQstatus(self._handle) != CONNECTION_OK
        return PostgresError(message, code, is_bad or severity in ("FATAL", "PANIC"))

    def _found(self, result: int) -> tuple[list[str], list[Values]]:
        """Returns the names of a result's columns, and its rows."""
        columns = range(self._pq.PQnfields(result))
        decoders = [DECODERS[self._pq.PQftype(result, column)] for column in columns]
        rows = []
        for row in range(self._pq.PQntuples(result)):
            values: list[object] = []
            for column in columns:
                if self._pq.PQgetisnull(result, row, column):
                    values.append(None)
                    continue
                length = self._pq.PQgetlength(result, row, column)
                data = ctypes.string_at(self._pq.PQgetvalue(result, row, column), length)
                values.append(decoders[column](data))
            rows.append(tuple(values))
        return [self._pq.PQfname(result, column).decode() for column in columns], rows

    def close(self) -> None:
        """Ends it; what the server is doing for it is not cancelled."""
        handle, self._handle = self._handle, None
        if handle:
            self._pq.PQfinish(handle)


def resolved(name: str, until: float) -> list[str]:
    """Returns the addresses of a name, in a thread of its own: nothing else bounds the system's resolver.

    Raises PostgresError.
    """
    found: queue.SimpleQueue[list[str]] = queue.SimpleQueue()
    failures: list[OSError] = []

    def resolve() -> None:
        addresses: list[str] = []
        try:
            addresses = [str(each[4][0]) for each in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
        except OSError as error:
            failures.append(error)
        found.put(list(dict.fromkeys(addresses)))

    try:
        threading.Thread(target=resolve, daemon=True, name="resolve database").start()
        addresses = found.get(timeout=max(0.0, until - time.monotonic()))
    except (queue.Empty, RuntimeError):
        raise PostgresError(f"{name} was not resolved in time") from None
    if not addresses:
        raise PostgresError(f"{name} cannot be resolved: {failures[0] if failures else 'no address'}")
    return addresses


@dataclass(frozen=True)
class PostgresServer:
    """Where a database is, as `store_url` says it, and the password."""

    url: str
    password: str = field(default="", repr=False)

    @property
    def hosts(self) -> list[DatabaseHost]:
        """The hosts, of which one is written to."""
        return database_hosts(postgresql_parameters(self.url))

    @property
    def name(self) -> str:
        """The database as messages name it."""
        parameters = postgresql_parameters(self.url)
        hosts = ", ".join(host.name or host.address or "the local socket" for host in self.hosts)
        return f"PostgreSQL database {parameters.get('dbname') or parameters.get('user', '')!r} at {hosts}"

    def attempts(self, host: DatabaseHost, until: float) -> list[dict[str, str]]:
        """Returns libpq's parameters for each address of a host. Raises PostgresError when it has none."""
        given = postgresql_parameters(self.url)
        fixed = {
            # With sslmode=verify-full it is TLS that protects.
            "gssencmode": given.get("gssencmode", "disable"),
            "passfile": "/nonexistent",
            "password": self.password,
            "client_encoding": "UTF8",
            "application_name": "fjmcp-broker",
            "target_session_attrs": "read-write",
            "host": host.name,
            "port": host.port,
        }
        is_resolved = host.address or not host.name or host.name[0] in "/@"
        addresses = [host.address] if is_resolved else resolved(host.name, until)
        found = [{**given, **fixed, "hostaddr": address} for address in addresses]
        return [{name: value for name, value in each.items() if value} for each in found]


class PostgresLink:
    """One connection, made again whenever it is lost; `lock` is held by whoever uses it, a leaf."""

    def __init__(self, server: PostgresServer) -> None:
        self.lock = threading.Lock()
        self._server = server
        self._hosts = server.hosts
        self._connection: PostgresConnection | None = None
        self._failed_at = -math.inf

    def connection(self, until: float) -> PostgresConnection:
        """Returns the connection; raises PostgresError when none can be had in time.

        Just after that it is raised at once: else those who queue would each wait, one after the other.
        """
        first: PostgresError | None = None  # the last one may say only that no time was left
        while self._connection is None:
            if time.monotonic() < self._failed_at + AWAY_PAUSE:
                raise PostgresError("there was no connection a moment ago")
            try:
                self._connection = self._connect(until)
            except PostgresError as error:
                first = first or error
                if time.monotonic() + ATTEMPT_PAUSE >= until:
                    self._failed_at = time.monotonic()
                    raise first from None
                time.sleep(ATTEMPT_PAUSE)
        return self._connection

    def _connect(self, until: float) -> PostgresConnection:
        """Tries the hosts in turn, the one that was good last first; each has its share of the time."""
        failures = []
        for number, host in enumerate(list(self._hosts)):
            for_host = time.monotonic() + (until - time.monotonic()) / (len(self._hosts) - number)
            try:
                attempts = self._server.attempts(host, for_host)
                for nth, parameters in enumerate(attempts):
                    now = time.monotonic()
                    try:
                        made = PostgresConnection(parameters, now + (for_host - now) / (len(attempts) - nth))
                    except PostgresError as error:
                        failures.append(str(error))
                        continue
                    self._hosts.remove(host)
                    self._hosts.insert(0, host)
                    return made
            except PostgresError as error:
                failures.append(str(error))
        raise PostgresError("; ".join(dict.fromkeys(failures)))

    def drop(self) -> None:
        """Gives the connection up; the next use makes a new one."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def undo(self, error: BaseException, until: float) -> None:
        """Leaves no transaction open after an error: it is rolled back, or ends with the connection."""
        is_usable = isinstance(error, PostgresError) and not error.is_lost and error.code != "25006"
        try:
            if is_usable and self._connection is not None:
                self._connection.command("ROLLBACK", until)
                return
        except PostgresError:
            pass
        self.drop()


class DatabaseClock(Clock):
    """The database's clock, carried on by this machine's: all brokers of one database go by the same time.

    `boottime` follows small differences at once; a database's clock that was set shows in `now` alone, and
    SteadyClock decides when to follow it.
    """

    def __init__(self) -> None:
        self._seen: float | None = None
        self._steady = 0.0

    def observe(self, database_time: float, began: float) -> None:
        """Notes what the database's clock said to a question that began at a moment of Clock.boottime()."""
        answered = super().boottime()
        offset = database_time - (began + answered) / 2
        if self._seen is None:
            self._steady = offset
        elif answered - began > 1.0:
            return  # such an answer says too little
        elif abs(offset - self._seen) <= SMALL_DRIFT:
            self._steady += offset - self._seen
        self._seen = offset

    def now(self) -> float:
        """Returns the database's time."""
        return super().boottime() + (self._seen or 0.0)

    def boottime(self) -> float:
        """Returns the database's time as it would be if nobody had set it since."""
        return super().boottime() + self._steady


class DatabaseFacts(NamedTuple):
    """What `check` asks of a database."""

    version: str
    has_tables: bool
    may_make_tables: bool
    synchronous_commit: str
    synchronous_standbys: str
    fsync: str
    now: float


DATABASE_FACTS = {
    "version": "current_setting('server_version')",
    "has_tables": "to_regclass('schema_version') IS NOT NULL",
    "may_make_tables": "coalesce(has_schema_privilege(current_schema(), 'CREATE'), FALSE)",
    "synchronous_commit": "current_setting('synchronous_commit')",
    "synchronous_standbys": "current_setting('synchronous_standby_names')",
    "fsync": "current_setting('fsync')",
    "now": "CAST(extract(epoch FROM clock_timestamp()) AS DOUBLE PRECISION)",
}


class PostgresEngine:
    """A PostgreSQL database: one connection to write and one to read, both made again when lost.

    A batch is a SERIALIZABLE transaction, run again whole when it collided with another broker's.
    """

    setting = "store_url"

    def __init__(self, server: PostgresServer) -> None:
        """Connects. Raises StoreUnavailable, and ConfigurationError for a server that is too old."""
        libpq()
        self.name = server.name
        self.server = server
        self._writer = PostgresLink(server)
        self._reader = PostgresLink(server)
        self._clock = DatabaseClock()
        self._next_sweep = 0.0
        with self._held(self._reader) as until:
            version = self._reader.connection(until).version
        if version < OLDEST_POSTGRESQL:
            old = f"store_url: {self.name} runs PostgreSQL {version}; it must be {OLDEST_POSTGRESQL} or newer"
            raise ConfigurationError([old])
        self._look()

    @contextlib.contextmanager
    def _held(self, link: PostgresLink) -> Iterator[float]:
        """Holds a link within the block, which gets the moment by which it must end.

        Raises StoreUnavailable.
        """
        if not link.lock.acquire(timeout=BUSY_WAIT):
            raise StoreUnavailable(f"{self.name} does not answer in time")
        try:
            yield time.monotonic() + BUSY_WAIT
        except PostgresError as error:
            raise StoreUnavailable(f"{self.name} cannot be used: {error}") from error
        finally:
            link.lock.release()

    # -- writing

    def run(self, parameters: Parameters, statements: Sequence[str]) -> list[Values]:
        """Runs the statements as one batch. Returns the rows of those that return any."""
        return self._write([(statement, parameters) for statement in statements])

    def run_each(self, statement: str, parameters: Iterable[Parameters]) -> None:
        """Runs one statement with each of the parameters, some of them a batch."""
        steps = [(statement, each) for each in parameters]
        for first in range(0, len(steps), MOST_STEPS):
            self._write(steps[first : first + MOST_STEPS])

    def load(self, steps: Iterable[tuple[str, Parameters]]) -> None:
        """Runs one batch of any length, once; nothing else is written meanwhile. Raises StoreUnavailable."""
        with self._held(self._writer):
            if self._attempt(steps, time.monotonic() + LOAD_WAIT) is None:
                raise PostgresError("the connection was lost; nothing was written")

    def _write(self, steps: Sequence[tuple[str, Parameters]]) -> list[Values]:
        """Runs a batch until it is committed, or its time is over."""
        with self._held(self._writer) as until:
            for attempt in range(MOST_ATTEMPTS):
                try:
                    rows = self._attempt(steps, until)
                except PostgresError as error:
                    pause = secrets.randbelow(1000) / 1000 * min(0.2, 0.005 * 2**attempt)
                    is_stubborn = error.code == "23505" and attempt >= 2
                    if not error.is_undone or is_stubborn or time.monotonic() + pause >= until:
                        raise
                    time.sleep(pause)
                else:
                    if rows is not None:
                        return rows
                    until = time.monotonic() + BUSY_WAIT
            raise PostgresError("other brokers were in the way too often")

    def _attempt(self, steps: Iterable[tuple[str, Parameters]], until: float) -> list[Values] | None:
        """Runs a batch once. Returns its rows, None when its commit was lost and nothing was done."""
        connection = self._writer.connection(until)
        batch = secrets.token_hex(16)
        rows: list[Values] = []
        try:
            connection.command(BEGIN_BATCH.format(batch=batch), until)
            for statement, parameters in steps:
                rows += connection.execute(statement, parameters, until)[1]
        except BaseException as error:
            self._writer.undo(error, until)
            raise
        try:
            connection.command("COMMIT", time.monotonic() + BUSY_WAIT)
        except PostgresError as error:
            if not error.is_lost:
                raise  # the server says that nothing was committed
            self._writer.drop()
            return rows if self._is_committed(batch) else None
        return rows

    def _is_committed(self, batch: str) -> bool:
        """Returns whether a batch was done whose commit was not answered.

        It may still be under way, on a server that waits for its standby: then this waits, too. Raises
        PostgresError when nobody can tell in time.
        """
        last = time.monotonic() + SETTLE_WAIT
        while True:
            until = min(last, time.monotonic() + BUSY_WAIT)
            try:
                connection = self._writer.connection(until)
                connection.command(SETTLE_BATCH.format(batch=batch), until)
                found = "SELECT is_committed FROM batches WHERE batch_id = :batch"
                return bool(connection.execute(found, {"batch": batch}, until)[1][0][0])
            except PostgresError:
                self._writer.drop()
                if time.monotonic() >= last:
                    raise
                time.sleep(ATTEMPT_PAUSE)

    # -- reading

    def read(self, statement: str, parameters: Parameters) -> tuple[list[str], list[Values]]:
        """Returns the names of the columns and the rows that a statement finds."""
        with self._held(self._reader) as until:
            while True:
                connection = self._reader.connection(until)
                try:
                    return connection.execute(statement, parameters, until)
                except PostgresError as error:
                    self._reader.undo(error, until)
                    if not error.is_undone or time.monotonic() >= until:
                        raise
                except BaseException as error:
                    self._reader.undo(error, until)
                    raise

    def _look(self) -> str:
        """Returns which transactions are done, and looks at the database's clock."""
        began = Clock().boottime()
        statement = """
            SELECT
              CAST(pg_current_snapshot() AS TEXT),
              CAST(extract(epoch FROM clock_timestamp()) AS DOUBLE PRECISION)
        """
        snapshot, now = self.read(statement, {})[1][0]
        self._clock.observe(now, began)
        return str(snapshot)

    def change_marker(self) -> object:
        """Returns a value that changes when anyone has committed.

        Looks at the database's clock and drops old batches, too.
        """
        if time.monotonic() >= self._next_sweep:
            self._next_sweep = time.monotonic() + 60
            self.read(
                f"DELETE FROM batches WHERE made_at < clock_timestamp() - interval '{BATCHES_KEPT} seconds'",
                {},
            )
        return self._look()

    def clock(self) -> Clock:
        """Returns the database's clock."""
        return self._clock

    def facts(self) -> DatabaseFacts:
        """Returns how the server is set, and what the user may do here."""
        columns = ", ".join(f"{what} AS {name}" for name, what in DATABASE_FACTS.items())
        return DatabaseFacts._make(self.read(f"SELECT {columns}", {})[1][0])

    # -- tables

    def migrate(self, scripts: Sequence[str]) -> None:
        """Brings the tables to the last version, while other brokers that start wait."""
        with self._held(self._writer) as until:
            connection = self._writer.connection(until)
            try:
                # Not SERIALIZABLE: what another has made meanwhile must be seen once the lock is had.
                connection.command("BEGIN; SELECT pg_advisory_xact_lock(7066707)", until)
                version = self._version(connection, until)
                if version > len(scripts):
                    raise ConfigurationError([newer_schema(self, version)])
                for script in scripts[version:]:
                    for statement in statements_of(script):
                        connection.execute(statement, {}, until)
                if version < len(scripts):
                    connection.command(f"UPDATE schema_version SET version = {len(scripts)}", until)
                connection.command("COMMIT", until)
            except PostgresError as error:
                self._writer.undo(error, until)
                if error.code[:2] in ("42", "0A") or error.code == "25006":
                    raise ConfigurationError([f"store_url: {self._rights_trouble(error)}"]) from None
                raise
            except BaseException as error:
                self._writer.undo(error, until)
                raise

    def _version(self, connection: PostgresConnection, until: float) -> int:
        """Returns the version of the tables; those of the engine's own are made where there are none."""
        there = "SELECT to_regclass('schema_version') IS NOT NULL"
        if not connection.execute(there, {}, until)[1][0][0]:
            for statement in statements_of(ENGINE_TABLES):
                connection.execute(statement, {}, until)
        return int(connection.execute("SELECT max(version) FROM schema_version", {}, until)[1][0][0])

    def _rights_trouble(self, error: PostgresError) -> str:
        """Returns why the tables cannot be made, with the remedy."""
        return (
            f"{self.name}: the tables cannot be made or changed ({error}). The database must be the user's"
            " own, and empty at first: createdb --owner USER DATABASE"
        )

    def close(self) -> None:
        """Ends the connections."""
        for link in (self._writer, self._reader):
            with link.lock:
                link.drop()


# ============================================================================================================
# Store
# Owns all SQL: what survives a crash (docs/storage.md). A method is one static batch that takes and returns
# plain values. Database runs batches; ClientStore, UserStore, LoginStore, TokenStore and SessionStore hold
# the statements of an entity each; Store is all of them.
# Must not know what a box holds, nor decide anything between two statements.
# ============================================================================================================

SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE clients (
  client_id TEXT PRIMARY KEY, kind TEXT NOT NULL, name TEXT NOT NULL, redirect_uris TEXT NOT NULL,
  secret_hash BLOB, auth_method TEXT NOT NULL, metadata TEXT NOT NULL, keys TEXT,
  fetched_at REAL, fresh_until REAL, created_at REAL NOT NULL, used_at REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX clients_by_use ON clients (kind, used_at);
CREATE TABLE assertions (hash BLOB PRIMARY KEY, expires_at REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE users (
  sub TEXT PRIMARY KEY, login TEXT NOT NULL, name TEXT NOT NULL, groups TEXT NOT NULL, state TEXT NOT NULL,
  credential BLOB, credential_grant INTEGER NOT NULL DEFAULT 0, credential_count INTEGER NOT NULL DEFAULT 0,
  credential_seq INTEGER NOT NULL DEFAULT 0, access_expires_at REAL NOT NULL DEFAULT 0,
  obtained_at REAL NOT NULL DEFAULT 0, refreshing_since REAL, upstream_scope TEXT,
  checked_at REAL NOT NULL, created_at REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE logins (
  state_hash BLOB PRIMARY KEY, form_hash BLOB NOT NULL UNIQUE, browser_hash BLOB NOT NULL, kind TEXT NOT NULL,
  sealed BLOB, expires_at REAL NOT NULL, taken_at REAL
) WITHOUT ROWID;
CREATE INDEX logins_by_expiry ON logins (expires_at);
CREATE TABLE grants (
  grant_id INTEGER PRIMARY KEY AUTOINCREMENT, sub TEXT NOT NULL REFERENCES users, client_id TEXT NOT NULL,
  scope TEXT NOT NULL, asked TEXT NOT NULL, resource TEXT NOT NULL,
  created_at REAL NOT NULL, used_at REAL NOT NULL, expires_at REAL NOT NULL, ended_at REAL, end_reason TEXT
);
CREATE INDEX grants_by_owner ON grants (sub, client_id, ended_at);
CREATE INDEX grants_by_end ON grants (ended_at);
CREATE TABLE codes (
  hash BLOB PRIMARY KEY, grant_id INTEGER NOT NULL REFERENCES grants ON DELETE CASCADE,
  client_id TEXT NOT NULL, redirect_uri TEXT NOT NULL, challenge TEXT NOT NULL,
  attempts INTEGER NOT NULL DEFAULT 0, expires_at REAL NOT NULL, used_at REAL
) WITHOUT ROWID;
CREATE TABLE access_tokens (
  hash BLOB PRIMARY KEY, grant_id INTEGER NOT NULL REFERENCES grants ON DELETE CASCADE, scope TEXT NOT NULL,
  issued_at REAL NOT NULL, expires_at REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX access_tokens_by_grant ON access_tokens (grant_id);
CREATE INDEX access_tokens_by_expiry ON access_tokens (expires_at);
CREATE TABLE refresh_tokens (
  hash BLOB PRIMARY KEY, grant_id INTEGER NOT NULL REFERENCES grants ON DELETE CASCADE,
  issued_at REAL NOT NULL, expires_at REAL NOT NULL, rotated_at REAL, successor BLOB
) WITHOUT ROWID;
CREATE INDEX refresh_tokens_by_grant ON refresh_tokens (grant_id);
CREATE INDEX refresh_tokens_by_rotation ON refresh_tokens (rotated_at) WHERE successor IS NOT NULL;
CREATE TABLE sessions (
  hash BLOB PRIMARY KEY, sub TEXT NOT NULL, client_id TEXT NOT NULL, protocol_version TEXT NOT NULL,
  initialize TEXT NOT NULL, server TEXT NOT NULL, log_level TEXT, subscriptions TEXT NOT NULL DEFAULT '[]',
  tools_hash BLOB, created_at REAL NOT NULL, used_at REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX sessions_by_owner ON sessions (sub, client_id, used_at);
CREATE INDEX sessions_by_use ON sessions (used_at);
CREATE TABLE binaries (
  fingerprint TEXT PRIMARY KEY, era TEXT NOT NULL, asks INTEGER NOT NULL, seen_at REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE account_logins (
  browser_hash BLOB PRIMARY KEY, sub TEXT NOT NULL, expires_at REAL NOT NULL
) WITHOUT ROWID;
"""
VERSION_2 = """
CREATE INDEX grants_by_client ON grants (client_id, ended_at);
CREATE INDEX grants_by_expiry ON grants (expires_at);
CREATE INDEX codes_by_grant ON codes (grant_id);
ALTER TABLE grants RENAME COLUMN asked TO requested_scope;
ALTER TABLE logins ADD COLUMN decision TEXT NOT NULL DEFAULT '';
ALTER TABLE logins ADD COLUMN answer BLOB;
ALTER TABLE users RENAME COLUMN state TO status;
ALTER TABLE users ADD COLUMN status_reason TEXT;
ALTER TABLE users ADD COLUMN account_created REAL;
ALTER TABLE users ADD COLUMN former_login TEXT;
ALTER TABLE users ADD COLUMN credential_order INTEGER NOT NULL DEFAULT 0;
CREATE INDEX users_by_credential_order ON users (credential_order);
CREATE INDEX users_by_credential_age ON users (obtained_at);
ALTER TABLE clients ADD COLUMN network TEXT;
ALTER TABLE clients ADD COLUMN unused_since REAL;
UPDATE clients SET unused_since = created_at WHERE kind = 'dynamic' AND used_at <= created_at;
CREATE INDEX clients_unused ON clients (unused_since) WHERE unused_since IS NOT NULL;
CREATE INDEX clients_by_network ON clients (network, unused_since) WHERE network IS NOT NULL;
CREATE INDEX logins_kept ON logins (expires_at) WHERE sealed IS NOT NULL OR answer IS NOT NULL;
ALTER TABLE clients ADD COLUMN confirmed_at REAL;
UPDATE clients SET confirmed_at = CASE WHEN fresh_until > 0 THEN fetched_at ELSE used_at END
WHERE kind = 'document';
ALTER TABLE binaries RENAME TO programs;
ALTER TABLE programs RENAME COLUMN asks TO sends_requests;
CREATE INDEX assertions_by_expiry ON assertions (expires_at);
CREATE INDEX account_logins_by_expiry ON account_logins (expires_at);
CREATE INDEX account_logins_by_user ON account_logins (sub);
CREATE TABLE operator_records (
  record_id INTEGER PRIMARY KEY, event TEXT NOT NULL, sub TEXT, client_id TEXT, grant_id INTEGER,
  reason TEXT NOT NULL, session TEXT
);
CREATE TABLE brokers (
  instance TEXT PRIMARY KEY, name TEXT NOT NULL, version TEXT NOT NULL, key_ids TEXT NOT NULL,
  started_at REAL NOT NULL, seen_at REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE leases (
  name TEXT PRIMARY KEY, holder TEXT NOT NULL, until REAL NOT NULL, credential_seq INTEGER
) WITHOUT ROWID;
ALTER TABLE sessions ADD COLUMN rights_hash BLOB;
"""
MIGRATIONS = (SCHEMA, VERSION_2)  # MIGRATIONS[n] takes a store from version n to n + 1

# kept of one network, unused: a hosted client's servers register for all its users
REGISTRATIONS_AN_HOUR = 2000
REGISTRATIONS_IN_ALL = 100_000  # unused: 0.5 GiB on disk at their largest

RowType = TypeVar("RowType")


class OperatorRow(NamedTuple):
    """What the broker that runs is to log: what an operator's command did, or that a session ended."""

    record_id: int
    event: str
    sub: str | None
    client_id: str | None
    grant_id: int | None
    reason: str
    session: str | None


class ClientRow(NamedTuple):
    """A client; its JSON columns are read."""

    client_id: str
    kind: str
    name: str
    redirect_uris: list[str]
    secret_hash: bytes | None
    auth_method: str
    metadata: dict[str, Any]
    keys: dict[str, Any]
    fetched_at: float
    fresh_until: float
    confirmed_at: float | None
    created_at: float
    used_at: float
    network: str | None
    unused_since: float | None

    @property
    def in_use(self) -> bool:
        """Returns whether somebody has logged in through it."""
        return self.used_at > self.created_at


class UserRow(NamedTuple):
    """A user with their credential at Forgejo."""

    sub: str
    login: str
    name: str
    groups: list[str]
    account_created: float | None
    former_login: str | None
    status: str
    status_reason: str | None
    credential: bytes | None
    credential_grant: int
    credential_count: int
    credential_order: int
    credential_seq: int
    access_expires_at: float
    obtained_at: float
    refreshing_since: float | None
    upstream_scope: str | None
    checked_at: float
    created_at: float


class AgeRow(NamedTuple):
    """How old a user's credential at Forgejo is."""

    sub: str
    credential_seq: int
    access_expires_at: float
    obtained_at: float


class PersonRow(NamedTuple):
    """What tells one person from another who has the same number."""

    sub: str
    login: str
    account_created: float | None


class AccountRow(NamedTuple):
    """Whom a browser has logged in to the account page."""

    sub: str
    login: str


class AccountGrantRow(NamedTuple):
    """A live grant as the account page shows it; the client may be gone."""

    grant_id: int
    sub: str
    client_id: str
    name: str | None
    scope: str
    created_at: float
    used_at: float


class AccountSessionRow(NamedTuple):
    """A session as the account page shows it; the client may be gone."""

    hash: bytes
    client_id: str
    name: str | None
    created_at: float
    used_at: float


class LoginRow(NamedTuple):
    """An approved login, and the answer to its callback."""

    browser_hash: bytes
    kind: str
    sealed: bytes | None
    answer: bytes | None


class DecisionRow(NamedTuple):
    """How a consent form was answered."""

    state_hash: bytes
    decision: str


class GrantRow(NamedTuple):
    """A grant and its scope."""

    grant_id: int
    sub: str
    client_id: str
    scope: str


class CodeRow(NamedTuple):
    """An authorization code with its grant and user."""

    grant_id: int
    sub: str
    client_id: str
    scope: str
    ended_at: float | None
    login: str
    status: str
    expires_at: float
    used_at: float | None


class RefreshTokenRow(NamedTuple):
    """A refresh token with its grant and user; the scope is the grant's."""

    grant_id: int
    sub: str
    client_id: str
    scope: str
    ended_at: float | None
    login: str
    status: str
    expires_at: float
    rotated_at: float | None
    successor: bytes | None


class AccessTokenRow(NamedTuple):
    """An access token with its grant and user; the scope is the token's own, `groups` are JSON."""

    grant_id: int
    sub: str
    client_id: str
    scope: str
    grant_scope: str
    requested_scope: str
    resource: str
    ended_at: float | None
    login: str
    groups: str
    status: str
    expires_at: float


class SessionRow(NamedTuple):
    """A session; `initialize`, `server` and `subscriptions` are JSON."""

    hash: bytes
    sub: str
    client_id: str
    protocol_version: str
    initialize: str
    server: str
    log_level: str | None
    subscriptions: str
    tools_hash: bytes | None
    created_at: float
    used_at: float
    rights_hash: bytes | None


class ProgramRow(NamedTuple):
    """What is known of a program that children run."""

    era: str
    sends_requests: int


class BrokerRow(NamedTuple):
    """One of several brokers of this store; `key_ids` are divided by spaces, newest first."""

    instance: str
    name: str
    version: str
    key_ids: str
    started_at: float
    seen_at: float

    @property
    def label(self) -> str:
        """What people know it by."""
        return self.name or f"without a name ({self.instance[:6]})"


class LeaseRow(NamedTuple):
    """A lease: what its holder alone may do, until when."""

    name: str
    holder: str
    until: float


class BoxRow(NamedTuple):
    """A sealed box with the purpose and the owner that it was sealed for."""

    purpose: str
    owner: str
    box: bytes


def only(row: Values) -> Any:
    """Returns the value of a row of one column."""
    return row[0]


def client_row(row: Values) -> ClientRow:
    """Returns a client with its JSON columns read."""
    found: Any = ClientRow._make(row)
    client: ClientRow = found._replace(
        redirect_uris=json.loads(found.redirect_uris),
        metadata=json.loads(found.metadata),
        keys=json.loads(found.keys or "{}"),
    )
    return client


def user_row(row: Values) -> UserRow:
    """Returns a user with the groups read."""
    found: Any = UserRow._make(row)
    user: UserRow = found._replace(groups=json.loads(found.groups))
    return user


# Parts of statements. All are in SQLite's words; POSTGRESQL_WORDS has what another database says otherwise.
LIVE_GRANT = "ended_at IS NULL AND expires_at > :now"
ALL_BUT = "LIMIT -1 OFFSET"  # the rows after the first so many
IN_LIST = "(SELECT value FROM json_each(:listed))"  # the texts of a JSON list
IN_LIST_OF_IDS = "(SELECT CAST(value AS INTEGER) FROM json_each(:listed))"
SESSION_NAME = "substr(lower(hex(hash)), 1, 12)"  # the beginning of a session's hash, for people

# Statements that are used more than once, or for each request.
ACCESS_TOKEN = """
    SELECT
      t.grant_id,
      g.sub,
      g.client_id,
      t.scope,
      g.scope AS grant_scope,
      g.requested_scope,
      g.resource,
      g.ended_at,
      u.login,
      u.groups,
      u.status,
      t.expires_at
    FROM access_tokens t
    JOIN grants g ON g.grant_id = t.grant_id
    JOIN users u ON u.sub = g.sub
    WHERE t.hash = :hash
"""
BEARER = f"{ACCESS_TOKEN} AND t.expires_at > :now AND g.ended_at IS NULL AND g.expires_at > :now"
CLIENT = f"SELECT {', '.join(ClientRow._fields)} FROM clients WHERE client_id = :client_id"
USER = f"SELECT {', '.join(UserRow._fields)} FROM users WHERE sub = :sub"
SESSION = f"""
    SELECT {", ".join(SessionRow._fields)}
    FROM sessions
    WHERE hash = :hash AND sub = :sub AND client_id = :client_id
"""
LISTINGS = {
    "users": f"""
        SELECT
          sub,
          login,
          name,
          status AS state,
          upstream_scope,
          checked_at,
          (SELECT count(*) FROM grants WHERE grants.sub = users.sub AND {LIVE_GRANT}) AS grants,
          (SELECT count(*) FROM sessions WHERE sessions.sub = users.sub) AS sessions
        FROM users
        ORDER BY login
    """,
    "clients": f"""
        SELECT
          client_id,
          kind,
          name,
          auth_method,
          created_at,
          used_at,
          (SELECT count(*) FROM grants WHERE grants.client_id = clients.client_id AND {LIVE_GRANT}) AS grants
        FROM clients
        WHERE kind != 'unreadable'
        ORDER BY created_at
    """,
    "grants": f"""
        SELECT
          grant_id,
          login,
          client_id,
          (SELECT name FROM clients WHERE clients.client_id = grants.client_id) AS client_name,
          scope,
          grants.created_at,
          used_at,
          expires_at
        FROM grants
        JOIN users USING (sub)
        WHERE {LIVE_GRANT}
        ORDER BY grant_id
    """,
    "sessions": f"""
        SELECT
          {SESSION_NAME} AS session,
          login,
          client_id,
          (SELECT name FROM clients WHERE clients.client_id = sessions.client_id) AS client_name,
          protocol_version,
          sessions.created_at,
          used_at
        FROM sessions
        JOIN users USING (sub)
        ORDER BY used_at DESC
    """,
}
FIND_GRANTS = f"SELECT grant_id, sub, client_id, scope FROM grants JOIN users USING (sub) WHERE {LIVE_GRANT}"
# Logins do not depend on case; a former login means its user only while nobody has that login now.
GRANTS_OF = {
    "user": f"""{FIND_GRANTS}
        AND (
          lower(login) = lower(:value)
          OR lower(former_login) = lower(:value)
          AND NOT EXISTS (SELECT 1 FROM users WHERE lower(login) = lower(:value))
        )
    """,
    "client": f"{FIND_GRANTS} AND client_id = :value",
    "grant": f"{FIND_GRANTS} AND CAST(grant_id AS TEXT) = :value",
    "all": FIND_GRANTS,
}


def ended_sessions(which: str) -> str:
    """Returns the statement that has the sessions of a condition logged as ended, with :reason.

    It stands before the one that deletes them.
    """
    return f"""
        INSERT INTO operator_records (event, sub, client_id, session, reason)
        SELECT 'session_ended', sub, client_id, {SESSION_NAME}, :reason
        FROM sessions
        WHERE {which}
    """


WITHOUT_GRANT = f"""
    NOT EXISTS (
      SELECT 1
      FROM grants
      WHERE grants.sub = sessions.sub AND grants.client_id = sessions.client_id AND {LIVE_GRANT}
    )
"""
# The sessions of whose user and client :grant_id is the last login in force.
OF_LAST_GRANT = f"""
    (sub, client_id) = (SELECT sub, client_id FROM grants WHERE grant_id = :grant_id AND ended_at IS NULL)
    AND NOT EXISTS (
      SELECT 1
      FROM grants
      WHERE grants.sub = sessions.sub
        AND grants.client_id = sessions.client_id
        AND grant_id != :grant_id
        AND {LIVE_GRANT}
    )
"""
ABOVE_LIMIT = f"""
    hash IN (
      SELECT hash FROM sessions WHERE sub = :sub ORDER BY used_at DESC, created_at DESC {ALL_BUT} :keep
    )
"""
UNUSED = "used_at < :now - :session_lifetime"
# Each is bounded, so that no sweep takes long.
SWEEPS = (
    # Strangers make logins: their boxes (6 KiB) go with the login's time, the tombstones an hour later.
    """
    UPDATE logins
    SET sealed = NULL,
        answer = NULL
    WHERE (sealed IS NOT NULL OR answer IS NOT NULL) AND expires_at < :now
    """,
    "DELETE FROM logins WHERE expires_at < :now - 3600",
    "UPDATE clients SET network = NULL WHERE network IS NOT NULL AND created_at < :now - 3600",
    "DELETE FROM account_logins WHERE expires_at < :now",
    "DELETE FROM assertions WHERE expires_at < :now",
    "DELETE FROM leases WHERE until < :now - 3600",
    "DELETE FROM access_tokens WHERE expires_at < :now - 60",
    f"""
    UPDATE refresh_tokens
    SET successor = NULL
    WHERE successor IS NOT NULL AND rotated_at < :now - {REFRESH_GRACE}
    """,
    """
    DELETE FROM grants
    WHERE grant_id IN (
      SELECT grant_id FROM grants WHERE expires_at < :now - 86400 OR ended_at < :now - 86400 LIMIT 500
    )
    """,
    """
    DELETE FROM clients
    WHERE client_id IN (
      SELECT client_id
      FROM clients
      WHERE kind = 'dynamic'
        AND used_at < :now - :client_lifetime
        AND NOT EXISTS (SELECT 1 FROM grants g WHERE g.client_id = clients.client_id AND g.ended_at IS NULL)
      LIMIT 500
    )
    """,
    ended_sessions(UNUSED),
    f"DELETE FROM sessions WHERE {UNUSED} RETURNING hash",
)


Place = str | PostgresServer  # the path of a SQLite file, or a database of PostgreSQL


def store_place(settings: Settings) -> Place:
    """Returns where the settings say that the store is."""
    if settings.store_url:
        return PostgresServer(settings.store_url, settings.store_password)
    return settings.store_path


class Database:
    """Runs the batches of the classes below on the engine of a place."""

    def __init__(self, place: Place, keyring: Keyring, alone: bool = True) -> None:
        """Opens, makes or migrates the store; `alone` keeps a second broker out of a SQLite file.

        Raises ConfigurationError for what cannot be a store of this release, or is sealed with another key.
        """
        # Whether other brokers may serve from the same store.
        self.is_shared = not isinstance(place, str)
        # Whose leases are ours: another name at each start.
        self.holder = secrets.token_hex(8)
        self.engine: Engine = SqliteEngine(place, alone) if isinstance(place, str) else PostgresEngine(place)
        try:
            self.engine.migrate(MIGRATIONS)
            self._check_key(keyring)
            if alone and not self.is_shared:
                # Nobody else serves: who held these is gone.
                self._run({}, "DELETE FROM leases")
        except StoreUnavailable as error:
            self.close()
            if not isinstance(place, str):
                raise  # it may be there in a moment
            raise ConfigurationError([f"{self.engine.setting}: {error.reason}"]) from None
        except BaseException:
            self.close()
            raise

    def _check_key(self, keyring: Keyring) -> None:
        """Refuses a wrong key at the start rather than at each user's next call."""
        probe = self._key_probe()
        if probe is None:
            self._run(
                {"box": keyring.seal("probe", "store", "ok")},
                """
                INSERT INTO meta (name, value)
                SELECT 'key_probe', :box
                WHERE NOT EXISTS (SELECT 1 FROM users WHERE credential IS NOT NULL)
                ON CONFLICT DO NOTHING
                """,
            )
            probe = self._key_probe()
        try:
            keyring.unseal("probe", "store", probe or b"")
        except ValueError:
            raise ConfigurationError([f"key_file: the key does not belong to {self.engine.name}"]) from None

    def _key_probe(self) -> bytes | None:
        probe: bytes | None = self._one(only, "SELECT value FROM meta WHERE name = 'key_probe'", {})
        return probe

    def _note(self, name: str) -> str | None:
        """Returns a text of `meta`, or None; an older store has it as text, not as bytes."""
        value = self._one(only, "SELECT value FROM meta WHERE name = :name", {"name": name})
        return value.decode() if isinstance(value, bytes) else value

    def _run(self, parameters: Parameters, *statements: str) -> list[Values]:
        """Runs the statements as one batch. Returns the rows of those that return any."""
        return self.engine.run(parameters, statements)

    def _run_each(self, statement: str, parameters: Iterable[Parameters]) -> None:
        """Runs one statement with each of the parameters, in one batch or several."""
        self.engine.run_each(statement, parameters)

    def _read(self, statement: str, parameters: Parameters) -> tuple[list[str], list[Values]]:
        """Returns the names of the columns and the rows that a statement finds."""
        return self.engine.read(statement, parameters)

    def _all(
        self, make: Callable[[Values], RowType], statement: str, parameters: Parameters
    ) -> list[RowType]:
        """Returns what a statement finds, each row made into its type."""
        return [make(row) for row in self._read(statement, parameters)[1]]

    def _one(
        self, make: Callable[[Values], RowType], statement: str, parameters: Parameters
    ) -> RowType | None:
        """Returns the first row that a statement finds, or None."""
        rows = self._all(make, statement, parameters)
        return rows[0] if rows else None

    def change_marker(self) -> object:
        """Returns a value that changes when anyone has committed."""
        return self.engine.change_marker()

    def clock(self) -> Clock:
        """Returns the clock by which the times in the store go."""
        return self.engine.clock()

    def healthy(self) -> bool:
        """Returns whether the store answers."""
        try:
            return self._key_probe() is not None
        except StoreUnavailable:
            return False

    def close(self) -> None:
        """Closes the engine."""
        self.engine.close()


REGISTER_CLIENT = """
    INSERT INTO clients (
      client_id, kind, name, redirect_uris, secret_hash, auth_method, metadata,
      network, unused_since, created_at, used_at
    )
    VALUES (
      :client_id, 'dynamic', :name, :redirect_uris, :secret_hash, :auth_method, :metadata,
      :network, :now, :now, :now
    )
"""
DROP_REGISTRATIONS_OF_NETWORK = f"""
    DELETE FROM clients
    WHERE client_id IN (
      SELECT client_id
      FROM clients
      WHERE network = :network AND unused_since > :now - 3600
      ORDER BY unused_since DESC {ALL_BUT} :hourly
    )
"""
DROP_REGISTRATIONS = f"""
    DELETE FROM clients
    WHERE client_id IN (
      SELECT client_id
      FROM clients
      WHERE unused_since IS NOT NULL
      ORDER BY unused_since DESC {ALL_BUT} :total
    )
"""
# A new row says only that the document was asked for; what it says stands in the next statement.
KEEP_DOCUMENT = """
    INSERT INTO clients (
      client_id, kind, name, redirect_uris, auth_method, metadata,
      fetched_at, fresh_until, created_at, used_at
    )
    VALUES (
      :url, 'unreadable', :name, :redirect_uris, :auth_method, :metadata,
      :now, :fresh_until, :now, :now
    )
    ON CONFLICT (client_id) DO UPDATE
    SET fetched_at = :now,
        fresh_until = :fresh_until,
        confirmed_at = CASE WHEN :away = 1 THEN clients.confirmed_at END
"""
READ_DOCUMENT = """
    UPDATE clients
    SET kind = 'document',
        name = :name,
        redirect_uris = :redirect_uris,
        auth_method = :auth_method,
        metadata = :metadata,
        confirmed_at = :now
    WHERE client_id = :url AND :name != ''
"""
DROP_DOCUMENTS = f"""
    DELETE FROM clients
    WHERE (SELECT count(*) FROM clients WHERE kind IN ('document', 'unreadable')) > :keep
      AND client_id IN (
        SELECT client_id
        FROM clients
        WHERE kind IN ('document', 'unreadable')
          AND NOT EXISTS (SELECT 1 FROM grants WHERE grants.client_id = clients.client_id AND {LIVE_GRANT})
        ORDER BY used_at DESC {ALL_BUT} :keep
      )
"""


class ClientStore(Database):
    """Clients, their documents, and what they proved themselves with."""

    def client(self, client_id: str) -> ClientRow | None:
        """Returns a client, or None."""
        return self._one(client_row, CLIENT, {"client_id": client_id})

    def add_client(
        self,
        client_id: str,
        kind: str,
        name: str,
        redirect_uris: Sequence[str],
        secret_hash: bytes | None,
        auth_method: str,
        metadata: Mapping[str, object],
        now: float,
    ) -> None:
        """Keeps a client; one with the same id (a pre-registered one at the next start) is replaced."""
        self._run(
            {
                "client_id": client_id,
                "kind": kind,
                "name": name,
                "redirect_uris": json.dumps(redirect_uris),
                "secret_hash": secret_hash,
                "auth_method": auth_method,
                "metadata": json.dumps(metadata),
                "now": now,
            },
            """
            INSERT INTO clients (
              client_id, kind, name, redirect_uris, secret_hash, auth_method, metadata, created_at, used_at
            )
            VALUES (
              :client_id, :kind, :name, :redirect_uris, :secret_hash, :auth_method, :metadata, :now, :now
            )
            ON CONFLICT (client_id) DO UPDATE
            SET kind = excluded.kind,
                name = excluded.name,
                redirect_uris = excluded.redirect_uris,
                secret_hash = excluded.secret_hash,
                auth_method = excluded.auth_method
            """,
        )

    def register_client(
        self,
        client_id: str,
        name: str,
        redirect_uris: Sequence[str],
        secret_hash: bytes | None,
        auth_method: str,
        metadata: Mapping[str, object],
        network: str,
        now: float,
        hourly: int = REGISTRATIONS_AN_HOUR,
        total: int = REGISTRATIONS_IN_ALL,
    ) -> None:
        """Keeps a registration, and drops the oldest that nobody has logged in through in an hour.

        Of those `hourly` stay for one network and `total` in all.
        """
        self._run(
            {
                "client_id": client_id,
                "name": name,
                "redirect_uris": json.dumps(redirect_uris),
                "secret_hash": secret_hash,
                "auth_method": auth_method,
                "metadata": json.dumps(metadata),
                "network": network,
                "now": now,
                "hourly": hourly,
                "total": total,
            },
            REGISTER_CLIENT,
            DROP_REGISTRATIONS_OF_NETWORK,
            DROP_REGISTRATIONS,
        )

    def drop_configured_clients(self, still_configured: Iterable[str]) -> None:
        """Forgets pre-registered clients that the configuration no longer names."""
        self._run(
            {"listed": json.dumps(list(still_configured))},
            f"DELETE FROM clients WHERE kind = 'configured' AND client_id NOT IN {IN_LIST}",
        )

    def keep_document(
        self,
        url: str,
        name: str,
        redirect_uris: Sequence[str],
        auth_method: str,
        metadata: Mapping[str, object],
        now: float,
        fresh_until: float,
        keep: int = 1000,
        away: bool = False,
    ) -> None:
        """Keeps a client's metadata document, or (without a name) that it could not be used.

        An older good document stays on file. `away`: its origin could not be asked, so the older one counts
        as confirmed when it was. Bounded: above `keep` the longest unused go, but never one with a live
        grant.
        """
        self._run(
            {
                "url": url,
                "name": name,
                "redirect_uris": json.dumps(redirect_uris),
                "auth_method": auth_method,
                "metadata": json.dumps(metadata),
                "now": now,
                "fresh_until": fresh_until,
                "keep": keep,
                "away": int(away),
            },
            KEEP_DOCUMENT,
            READ_DOCUMENT,
            DROP_DOCUMENTS,
        )

    def documents_failing_since(self) -> float | None:
        """Returns since when no client's document can be read; None when the last one was read."""
        since = self._note("documents_failing_since")
        return None if since is None else float(since)

    def documents_fail(self, since: float | None) -> None:
        """Notes since when no document can be read, or (None) that one was read.

        An earlier `since` that is noted already stays.
        """
        if since is None:
            self._run({}, "DELETE FROM meta WHERE name = 'documents_failing_since'")
        else:
            self._run(
                {"since": repr(since).encode()},
                "INSERT INTO meta (name, value) VALUES ('documents_failing_since', :since) "
                "ON CONFLICT DO NOTHING",
            )

    def keep_keys(self, url: str, keys: Mapping[str, object]) -> None:
        """Keeps the public keys that a document's jwks_uri named."""
        self._run(
            {"keys": json.dumps(keys), "url": url}, "UPDATE clients SET keys = :keys WHERE client_id = :url"
        )

    def spend_assertion(self, assertion_hash: bytes, expires_at: float) -> bool:
        """Returns whether a client's assertion comes for the first time (RFC 7523 3, jti)."""
        return bool(
            self._run(
                {"hash": assertion_hash, "expires_at": expires_at},
                """
                INSERT INTO assertions (hash, expires_at)
                VALUES (:hash, :expires_at)
                ON CONFLICT DO NOTHING
                RETURNING 1
                """,
            )
        )


BIND = """
    INSERT INTO meta (name, value)
    VALUES ('forgejo_url', :url)
    ON CONFLICT (name) DO UPDATE SET value = excluded.value
"""
FORGET_USERS = (
    "SELECT grant_id, sub, client_id, scope FROM grants WHERE ended_at IS NULL",
    ended_sessions("true"),
    "DELETE FROM sessions",
    "DELETE FROM account_logins",
    "DELETE FROM logins",
    "DELETE FROM grants",
    "DELETE FROM users",
)


SAVE_CREDENTIAL = """
    UPDATE users
    SET credential = :box,
        status = CASE
          WHEN status = 'logged_out' AND credential_seq = :seq THEN 'active'
          ELSE status
        END,
        credential_grant = :grant,
        credential_count = :count,
        credential_seq = credential_seq + 1,
        credential_order = 1 + (SELECT max(credential_order) FROM users),
        access_expires_at = :expires_at,
        obtained_at = :obtained_at,
        refreshing_since = NULL
    WHERE sub = :sub
      AND (
        credential_seq = :seq
        OR (:seq IS NULL OR credential IS NOT NULL)
        AND (
          credential_order <= :began
          OR :grant = 0
          OR credential_grant < :grant
          OR credential_grant = :grant AND credential_count <= :count
        )
      )
    RETURNING credential_seq
"""
END_LEASE = "DELETE FROM leases WHERE name = :name AND holder = :holder"


class UserStore(Database):
    """Users, their credential at Forgejo, and the Forgejo whose users they are."""

    def user(self, sub: str) -> UserRow | None:
        """Returns a user, or None."""
        return self._one(user_row, USER, {"sub": sub})

    def update_user(
        self,
        sub: str,
        login: str,
        name: str,
        groups: Sequence[str],
        now: float,
        account_created: float | None = None,
    ) -> None:
        """Makes or refreshes what Forgejo says of a user; the status and the credential stay.

        A login that changed is kept as the former.
        """
        self._run(
            {
                "sub": sub,
                "login": login,
                "name": name,
                "groups": json.dumps(list(groups)),
                "account_created": account_created,
                "now": now,
            },
            """
            INSERT INTO users (sub, login, name, groups, status, account_created, checked_at, created_at)
            VALUES (:sub, :login, :name, :groups, 'logged_out', :account_created, :now, :now)
            ON CONFLICT (sub) DO UPDATE
            SET login = excluded.login,
                name = excluded.name,
                groups = excluded.groups,
                checked_at = excluded.checked_at,
                former_login = CASE
                  WHEN lower(users.login) = lower(excluded.login) THEN users.former_login
                  ELSE users.login
                END,
                account_created = coalesce(excluded.account_created, users.account_created)
            """,
        )

    def end_person(self, sub: str, reason: str, now: float) -> list[GrantRow]:
        """Ends all grants, sessions and account logins of a user's number, and forgets the credential.

        For a number that means another person now. Returns the grants that ended.
        """
        ended = self._run(
            {"sub": sub, "reason": reason, "now": now},
            """
            UPDATE grants
            SET ended_at = :now,
                end_reason = :reason
            WHERE sub = :sub AND ended_at IS NULL
            RETURNING grant_id, sub, client_id, scope
            """,
            "DELETE FROM access_tokens WHERE grant_id IN (SELECT grant_id FROM grants WHERE sub = :sub)",
            """
            UPDATE refresh_tokens
            SET successor = NULL
            WHERE grant_id IN (SELECT grant_id FROM grants WHERE sub = :sub)
            """,
            ended_sessions("sub = :sub"),
            "DELETE FROM sessions WHERE sub = :sub",
            "DELETE FROM account_logins WHERE sub = :sub",
            """
            UPDATE users
            SET status = 'logged_out',
                status_reason = NULL,
                credential = NULL,
                credential_grant = 0,
                credential_count = 0,
                credential_seq = credential_seq + 1,
                refreshing_since = NULL,
                upstream_scope = NULL,
                account_created = NULL,
                former_login = NULL
            WHERE sub = :sub
            """,
        )
        return [GrantRow._make(row) for row in ended]

    def set_upstream_scope(self, sub: str, scope: str | None) -> None:
        """Keeps what Forgejo really granted, as introspection tells; None when unknown."""
        self._run({"sub": sub, "scope": scope}, "UPDATE users SET upstream_scope = :scope WHERE sub = :sub")

    def begin_refresh(self, sub: str, seq: int, now: float, until: float) -> bool:
        """Takes the lease of a user's refresh, and notes that the stored refresh token is about to be spent.

        Returns False when another broker holds the lease, or another credential is stored by now. By the
        note a refusal that follows a crash is known to be ours.
        """
        return bool(
            self._run(
                {
                    "name": f"user {sub}",
                    "holder": self.holder,
                    "sub": sub,
                    "seq": seq,
                    "now": now,
                    "until": until,
                },
                """
                INSERT INTO leases (name, holder, until, credential_seq)
                SELECT :name, :holder, :until, credential_seq
                FROM users
                WHERE sub = :sub AND credential_seq = :seq
                ON CONFLICT (name) DO UPDATE
                SET holder = excluded.holder,
                    until = excluded.until,
                    credential_seq = excluded.credential_seq
                WHERE leases.until <= :now OR leases.holder = excluded.holder
                """,
                """
                UPDATE users
                SET refreshing_since = :now
                WHERE sub = :sub
                  AND credential_seq = :seq
                  AND EXISTS (SELECT 1 FROM leases WHERE name = :name AND holder = :holder AND until = :until)
                RETURNING 1
                """,
            )
        )

    def credential_order(self) -> int:
        """Returns the number of the last credential saved, of any user.

        It is read before an exchange or refresh begins.
        """
        return int(self._one(only, "SELECT max(credential_order) FROM users", {}) or 0)

    def save_credential(
        self,
        sub: str,
        box: bytes,
        grant: int,
        count: int,
        expires_at: float,
        obtained_at: float,
        began: int = 0,
        seq: int | None = None,
    ) -> int | None:
        """Replaces a known user's credential, and ends our lease of its refresh.

        Returns its sequence number, None when a newer one is stored. A refresh says by `seq` which
        credential it spent: while that is the stored one, the new one replaces it, and if another broker
        had it refused meanwhile, which could not know of the new one, the user is logged in again. Else,
        and for a login, `began` is what credential_order() was before the exchange: a stored credential
        that was saved by then is the older one, whatever Forgejo counts: a Forgejo restored from a
        backup counts from an older place. Of two that overlapped Forgejo's numbers tell the later: its
        grant's, then the grant's counter; equal or unreadable: the last one saved.
        """
        saved = self._run(
            {
                "sub": sub,
                "box": box,
                "grant": grant,
                "count": count,
                "expires_at": expires_at,
                "obtained_at": obtained_at,
                "began": began,
                "seq": seq,
                "name": f"user {sub}",
                "holder": self.holder,
            },
            SAVE_CREDENTIAL,
            END_LEASE,
        )
        return int(saved[0][0]) if saved else None

    def set_user_status(
        self, sub: str, status: str, if_seq: int | None = None, reason: str | None = None
    ) -> bool:
        """Sets a user's status and Forgejo's reason for it.

        With `if_seq` only while that credential is the stored one. Returns whether the status changed.
        """
        return bool(
            self._run(
                {"status": status, "reason": reason, "sub": sub, "seq": if_seq},
                """
                UPDATE users
                SET status = :status,
                    status_reason = :reason,
                    refreshing_since = NULL
                WHERE sub = :sub
                  AND status != :status
                  AND credential_seq = coalesce(:seq, credential_seq)
                RETURNING 1
                """,
            )
        )

    def credential_ages(self, subs: Iterable[str]) -> dict[str, AgeRow]:
        """Returns how old the credentials of these users are, of those that are active."""
        found = self._all(
            AgeRow._make,
            f"""
            SELECT sub, credential_seq, access_expires_at, obtained_at
            FROM users
            WHERE sub IN {IN_LIST} AND status = 'active'
            """,
            {"listed": json.dumps(list(subs))},
        )
        return {row.sub: row for row in found}

    def users_to_refresh(self, obtained_before: float, now: float) -> list[tuple[str, int]]:
        """Returns (sub, credential_seq) of the users with a live grant whose credential is older than that.

        Forgejo's refresh token dies after 730 h without use.
        """
        return self._all(
            lambda row: (row[0], row[1]),
            f"""
            SELECT sub, credential_seq
            FROM users
            WHERE obtained_at < :before
              AND status IN ('active', 'suspended')
              AND EXISTS (SELECT 1 FROM grants WHERE grants.sub = users.sub AND {LIVE_GRANT})
            """,
            {"before": obtained_before, "now": now},
        )

    def known_people(self, limit: int) -> list[PersonRow]:
        """Returns the users whom Forgejo was asked about last."""
        return self._all(
            PersonRow._make,
            "SELECT sub, login, account_created FROM users ORDER BY checked_at DESC LIMIT :limit",
            {"limit": limit},
        )

    def forgejo_url(self) -> str | None:
        """Returns the URL of the Forgejo whose users these are, None while the store knows none."""
        return self._note("forgejo_url")

    def bound_to(self, forgejo_url: str) -> str:
        """Returns the URL of the Forgejo whose users these are.

        A store without a URL or without users takes the given one. Users are known by their number, which
        means another person at another Forgejo.
        """
        if self.forgejo_url() != forgejo_url:
            self._run(
                {"url": forgejo_url.encode()},
                "INSERT INTO meta (name, value) VALUES ('forgejo_url', :url) ON CONFLICT DO NOTHING",
                """
                UPDATE meta
                SET value = :url
                WHERE name = 'forgejo_url' AND NOT EXISTS (SELECT 1 FROM users)
                """,
            )
        return self.forgejo_url() or forgejo_url

    def rebind(self, forgejo_url: str, forget: bool) -> list[GrantRow]:
        """Gives the store to another URL; with `forget` every user goes with all their logins.

        Returns the grants that ended by that.
        """
        parameters = {"url": forgejo_url.encode(), "reason": "another Forgejo"}
        ended = self._run(parameters, *(FORGET_USERS if forget else ()), BIND)
        return [GrantRow._make(row) for row in ended]


MAKE_GRANT = """
    INSERT INTO grants (sub, client_id, scope, requested_scope, resource, created_at, used_at, expires_at)
    VALUES (:sub, :client_id, :scope, :requested_scope, :resource, :now, :now, :expires_at)
"""
MAKE_CODE = """
    INSERT INTO codes (hash, grant_id, client_id, redirect_uri, challenge, expires_at)
    VALUES (:code_hash, last_insert_rowid(), :client_id, :redirect_uri, :challenge, :code_expires_at)
    RETURNING grant_id
"""


class LoginStore(Database):
    """Approved logins on their way through Forgejo, and browsers that are logged in to the account page."""

    def approve_login(
        self,
        state_hash: bytes,
        form_hash: bytes,
        browser_hash: bytes,
        kind: str,
        sealed: bytes | None,
        expires_at: float,
        taken_at: float | None = None,
        decision: str = "",
    ) -> bool:
        """Keeps an approved (or, with taken_at, a refused) login.

        Returns False when this form was answered before.
        """
        return bool(
            self._run(
                {
                    "state_hash": state_hash,
                    "form_hash": form_hash,
                    "browser_hash": browser_hash,
                    "kind": kind,
                    "sealed": sealed,
                    "expires_at": expires_at,
                    "taken_at": taken_at,
                    "decision": decision,
                },
                """
                INSERT INTO logins (
                  state_hash, form_hash, browser_hash, kind, sealed, expires_at, taken_at, decision
                )
                VALUES (
                  :state_hash, :form_hash, :browser_hash, :kind, :sealed, :expires_at, :taken_at, :decision
                )
                ON CONFLICT DO NOTHING
                RETURNING 1
                """,
            )
        )

    def answered_form(self, form_hash: bytes, now: float) -> DecisionRow | None:
        """Returns the answer to a form whose login still lives, or None."""
        return self._one(
            DecisionRow._make,
            "SELECT state_hash, decision FROM logins WHERE form_hash = :form_hash AND expires_at > :now",
            {"form_hash": form_hash, "now": now},
        )

    def login(self, state_hash: bytes, now: float) -> LoginRow | None:
        """Returns a state's login, taken or not, or None when it is unknown or has expired."""
        return self._one(
            LoginRow._make,
            """
            SELECT browser_hash, kind, sealed, answer
            FROM logins
            WHERE state_hash = :state_hash AND expires_at > :now
            """,
            {"state_hash": state_hash, "now": now},
        )

    def take_login(self, state_hash: bytes, now: float) -> LoginRow | None:
        """Returns the login of a state, once; None when it is unknown, has expired or was taken."""
        taken = self._run(
            {"state_hash": state_hash, "now": now},
            """
            SELECT browser_hash, kind, sealed, answer
            FROM logins
            WHERE state_hash = :state_hash AND taken_at IS NULL AND expires_at > :now
            """,
            """
            UPDATE logins
            SET taken_at = :now,
                sealed = NULL
            WHERE state_hash = :state_hash AND taken_at IS NULL AND expires_at > :now
            """,
        )
        return LoginRow._make(taken[0]) if taken else None

    def answer_login(self, state_hash: bytes, answer: bytes) -> None:
        """Keeps what the callback of a login was answered with, sealed."""
        self._run(
            {"state_hash": state_hash, "answer": answer},
            "UPDATE logins SET answer = :answer WHERE state_hash = :state_hash",
        )

    def finish_login(
        self,
        sub: str,
        client_id: str,
        scope: str,
        requested_scope: str,
        resource: str,
        code_hash: bytes,
        redirect_uri: str,
        challenge: str,
        now: float,
        expires_at: float,
        code_expires_at: float,
        answered: tuple[bytes, bytes] = (b"", b""),
    ) -> int:
        """Makes the grant of an approved login and its authorization code. Returns the grant's id.

        `answered`: the login's state_hash and the sealed answer
        to its callback, on disk together with the code in it.
        """
        state_hash, answer = answered
        made = self._run(
            {
                "sub": sub,
                "client_id": client_id,
                "scope": scope,
                "requested_scope": requested_scope,
                "resource": resource,
                "code_hash": code_hash,
                "redirect_uri": redirect_uri,
                "challenge": challenge,
                "now": now,
                "expires_at": expires_at,
                "code_expires_at": code_expires_at,
                "state_hash": state_hash,
                "answer": answer,
            },
            "UPDATE logins SET answer = :answer WHERE state_hash = :state_hash",
            MAKE_GRANT,
            MAKE_CODE,
            "UPDATE clients SET used_at = :now, unused_since = NULL, network = NULL "
            "WHERE client_id = :client_id",
        )
        return int(made[0][0])

    def open_account(self, browser_hash: bytes, sub: str, expires_at: float) -> None:
        """Lets a browser see and end what its user has connected."""
        self._run(
            {"browser_hash": browser_hash, "sub": sub, "expires_at": expires_at},
            "INSERT INTO account_logins (browser_hash, sub, expires_at) "
            "VALUES (:browser_hash, :sub, :expires_at)",
        )

    def account(self, browser_hash: bytes, now: float) -> AccountRow | None:
        """Returns the user that a browser has logged in to the account page, or None."""
        return self._one(
            AccountRow._make,
            """
            SELECT sub, login
            FROM account_logins
            JOIN users USING (sub)
            WHERE browser_hash = :browser_hash AND expires_at > :now AND status = 'active'
            """,
            {"browser_hash": browser_hash, "now": now},
        )

    def close_account(self, browser_hash: bytes) -> None:
        """Ends a browser's login to the account page."""
        self._run(
            {"browser_hash": browser_hash}, "DELETE FROM account_logins WHERE browser_hash = :browser_hash"
        )


# A batch that issues tokens inserts the access token first, if
# its conditions hold. That it is there decides about the rest.
ISSUED = "EXISTS (SELECT 1 FROM access_tokens WHERE hash = :access)"
ISSUE_REFRESH_TOKEN = """
    INSERT INTO refresh_tokens (hash, grant_id, issued_at, expires_at)
    SELECT :refresh, grant_id, :now, :refresh_expires_at
    FROM access_tokens
    WHERE hash = :access
"""
EXTEND_GRANT = """
    UPDATE grants
    SET used_at = :now,
        expires_at = :refresh_expires_at
    WHERE grant_id = (SELECT grant_id FROM access_tokens WHERE hash = :access)
    RETURNING grant_id, sub, client_id, scope
"""
REDEEM_CODE = """
    INSERT INTO access_tokens (hash, grant_id, scope, issued_at, expires_at)
    SELECT :access, g.grant_id, g.scope, :now, :access_expires_at
    FROM codes c
    JOIN grants g ON g.grant_id = c.grant_id
    WHERE c.hash = :hash
      AND c.client_id = :client_id
      AND :redirect_uri IN ('', c.redirect_uri)
      AND c.challenge = :challenge
      AND c.used_at IS NULL
      AND c.expires_at > :now
      AND c.attempts < :attempts
      AND g.ended_at IS NULL
      AND g.expires_at > :now
"""
COUNT_WRONG_VERIFIER = """
    UPDATE codes
    SET attempts = attempts + 1
    WHERE hash = :hash
      AND client_id = :client_id
      AND :redirect_uri IN ('', redirect_uri)
      AND challenge != :challenge
"""
ROTATE_REFRESH_TOKEN = """
    INSERT INTO access_tokens (hash, grant_id, scope, issued_at, expires_at)
    SELECT :access, g.grant_id, coalesce(:scope, g.scope), :now, :access_expires_at
    FROM refresh_tokens t
    JOIN grants g ON g.grant_id = t.grant_id
    WHERE t.hash = :hash
      AND t.rotated_at IS NULL
      AND t.expires_at > :now
      AND g.ended_at IS NULL
      AND g.expires_at > :now
"""


class TokenStore(Database):
    """Codes, tokens and the grants that they belong to."""

    def code(self, code_hash: bytes) -> CodeRow | None:
        """Returns an authorization code with its grant, or None."""
        return self._one(
            CodeRow._make,
            """
            SELECT
              t.grant_id,
              g.sub,
              g.client_id,
              g.scope,
              g.ended_at,
              u.login,
              u.status,
              t.expires_at,
              t.used_at
            FROM codes t
            JOIN grants g ON g.grant_id = t.grant_id
            JOIN users u ON u.sub = g.sub
            WHERE t.hash = :hash
            """,
            {"hash": code_hash},
        )

    def redeem_code(
        self,
        code_hash: bytes,
        client_id: str,
        redirect_uri: str,
        challenge: str,
        now: float,
        access: tuple[bytes, float],
        refresh: tuple[bytes, float],
        attempts: int,
    ) -> GrantRow | None:
        """Turns a code into a token pair, once.

        Returns the grant, or None and nothing is changed but a counted attempt. `access`, `refresh`: (hash,
        expires_at). RFC 6749 4.1.3, RFC 7636 4.6. An empty `redirect_uri` is one that the client did not
        send, as OAuth 2.1 10.2 has it: the challenge binds the code.
        """
        issued = self._run(
            {
                "hash": code_hash,
                "client_id": client_id,
                "redirect_uri": redirect_uri,
                "challenge": challenge,
                "now": now,
                "access": access[0],
                "access_expires_at": access[1],
                "refresh": refresh[0],
                "refresh_expires_at": refresh[1],
                "attempts": attempts,
            },
            REDEEM_CODE,
            f"UPDATE codes SET used_at = :now WHERE hash = :hash AND {ISSUED}",
            COUNT_WRONG_VERIFIER,
            ISSUE_REFRESH_TOKEN,
            EXTEND_GRANT,
        )
        return GrantRow._make(issued[0]) if issued else None

    def refresh_token(self, token_hash: bytes) -> RefreshTokenRow | None:
        """Returns a refresh token with its grant, or None."""
        return self._one(
            RefreshTokenRow._make,
            """
            SELECT
              t.grant_id,
              g.sub,
              g.client_id,
              g.scope,
              g.ended_at,
              u.login,
              u.status,
              t.expires_at,
              t.rotated_at,
              t.successor
            FROM refresh_tokens t
            JOIN grants g ON g.grant_id = t.grant_id
            JOIN users u ON u.sub = g.sub
            WHERE t.hash = :hash
            """,
            {"hash": token_hash},
        )

    def rotate(
        self,
        token_hash: bytes,
        scope: str | None,
        now: float,
        access: tuple[bytes, float],
        refresh: tuple[bytes, float],
        successor: bytes,
    ) -> GrantRow | None:
        """Replaces a refresh token by a pair, once.

        Returns the grant, None when it was rotated, has expired or its grant has ended.
        """
        issued = self._run(
            {
                "hash": token_hash,
                "scope": scope,
                "now": now,
                "access": access[0],
                "access_expires_at": access[1],
                "refresh": refresh[0],
                "refresh_expires_at": refresh[1],
                "successor": successor,
            },
            ROTATE_REFRESH_TOKEN,
            f"""
            UPDATE refresh_tokens
            SET rotated_at = :now,
                successor = :successor
            WHERE hash = :hash AND {ISSUED}
            """,
            ISSUE_REFRESH_TOKEN,
            EXTEND_GRANT,
        )
        return GrantRow._make(issued[0]) if issued else None

    def bearer(self, token_hash: bytes, now: float) -> AccessTokenRow | None:
        """Returns an access token with its grant and user, or None when it is not good (any more)."""
        return self._one(AccessTokenRow._make, BEARER, {"hash": token_hash, "now": now})

    def access_token(self, token_hash: bytes) -> AccessTokenRow | None:
        """Returns an access token with its grant, or None: for the grace of a refresh, and for revocation."""
        return self._one(AccessTokenRow._make, ACCESS_TOKEN, {"hash": token_hash})

    def drop_access_token(self, token_hash: bytes) -> None:
        """Revokes one access token (RFC 7009)."""
        self._run({"hash": token_hash}, "DELETE FROM access_tokens WHERE hash = :hash")

    def end_grant(self, grant_id: int, reason: str, now: float, for_log: bool = False) -> GrantRow | None:
        """Ends a grant with all its tokens, and its owner's sessions if it was their last.

        Returns None when it had ended before. `for_log`: the broker that runs finds it in operator_records.
        """
        ended = self._run(
            {"grant_id": grant_id, "reason": reason, "now": now, "for_log": for_log},
            """
            INSERT INTO operator_records (event, sub, client_id, grant_id, reason)
            SELECT 'token_revoked', sub, client_id, grant_id, :reason
            FROM grants
            WHERE grant_id = :grant_id AND ended_at IS NULL AND :for_log
            """,
            "DELETE FROM access_tokens WHERE grant_id = :grant_id",
            "UPDATE refresh_tokens SET successor = NULL WHERE grant_id = :grant_id",
            ended_sessions(OF_LAST_GRANT),
            f"DELETE FROM sessions WHERE {OF_LAST_GRANT}",
            """
            UPDATE grants
            SET ended_at = :now,
                end_reason = :reason
            WHERE grant_id = :grant_id AND ended_at IS NULL
            RETURNING grant_id, sub, client_id, scope
            """,
        )
        return GrantRow._make(ended[0]) if ended else None

    def grants_of(self, sub: str, now: float) -> list[AccountGrantRow]:
        """Returns a user's live grants with their client's name, newest first."""
        return self._all(
            AccountGrantRow._make,
            f"""
            SELECT grant_id, sub, client_id, name, scope, grants.created_at, grants.used_at
            FROM grants
            LEFT JOIN clients USING (client_id)
            WHERE sub = :sub AND {LIVE_GRANT}
            ORDER BY grants.used_at DESC
            """,
            {"sub": sub, "now": now},
        )

    def find_grants(self, kind: str, value: str, now: float) -> list[GrantRow]:
        """Returns the live grants of a user, a client, of an id, or (kind `all`) of everybody.

        A user is meant by their login, or by the one they had before if nobody has that now.
        """
        return self._all(GrantRow._make, GRANTS_OF[kind], {"value": value, "now": now})

    def living(self, grant_ids: Iterable[int], now: float) -> set[int]:
        """Returns those of these grants that live, and whose users are not shut out."""
        found = self._all(
            only,
            f"""
            SELECT grant_id
            FROM grants
            JOIN users USING (sub)
            WHERE grant_id IN {IN_LIST_OF_IDS} AND {LIVE_GRANT} AND status = 'active'
            """,
            {"listed": json.dumps(list(grant_ids)), "now": now},
        )
        return set(found)

    def living_pairs(self, subs: Iterable[str], now: float) -> set[tuple[str, str]]:
        """Returns the (sub, client_id) of these users that have a live grant."""
        return set(
            self._all(
                tuple,
                f"SELECT DISTINCT sub, client_id FROM grants WHERE sub IN {IN_LIST} AND {LIVE_GRANT}",
                {"listed": json.dumps(list(subs)), "now": now},
            )
        )


class SessionStore(Database):
    """Sessions, and what is known of the program that their children run."""

    def add_session(
        self,
        session_hash: bytes,
        sub: str,
        client_id: str,
        protocol_version: str,
        initialize: object,
        server: object,
        now: float,
        keep: int,
    ) -> list[bytes]:
        """Keeps a session. Of this user's, the longest unused above `keep` go: returns their hashes."""
        dropped = self._run(
            {
                "hash": session_hash,
                "sub": sub,
                "client_id": client_id,
                "protocol_version": protocol_version,
                "initialize": json.dumps(initialize),
                "server": json.dumps(server),
                "now": now,
                "keep": keep,
                "reason": "too many sessions of this user",
            },
            """
            INSERT INTO sessions (
              hash, sub, client_id, protocol_version, initialize, server, created_at, used_at
            )
            VALUES (:hash, :sub, :client_id, :protocol_version, :initialize, :server, :now, :now)
            """,
            ended_sessions(ABOVE_LIMIT),
            f"DELETE FROM sessions WHERE {ABOVE_LIMIT} RETURNING hash",
        )
        return [only(row) for row in dropped]

    def session(self, session_hash: bytes, sub: str, client_id: str) -> SessionRow | None:
        """Returns a session if it is theirs, else None."""
        return self._one(
            SessionRow._make, SESSION, {"hash": session_hash, "sub": sub, "client_id": client_id}
        )

    def sessions_of(self, sub: str) -> list[AccountSessionRow]:
        """Returns a user's sessions with their client's name, the last used first."""
        return self._all(
            AccountSessionRow._make,
            """
            SELECT hash, client_id, name, sessions.created_at, sessions.used_at
            FROM sessions
            LEFT JOIN clients USING (client_id)
            WHERE sub = :sub
            ORDER BY sessions.used_at DESC
            """,
            {"sub": sub},
        )

    def session_names(self, subs: Iterable[str]) -> set[bytes]:
        """Returns the hashes of all sessions of these users."""
        found = self._all(
            only,
            f"SELECT hash FROM sessions WHERE sub IN {IN_LIST}",
            {"listed": json.dumps(list(subs))},
        )
        return {bytes(name) for name in found}

    def count_sessions(self) -> int:
        """Returns how many sessions are on file."""
        return int(self._one(only, "SELECT count(*) FROM sessions", {}) or 0)

    def update_session(
        self,
        session_hash: bytes,
        log_level: str | None,
        subscriptions: Iterable[str],
        tools_hash: bytes | None,
        rights_hash: bytes | None,
    ) -> None:
        """Keeps what has to be replayed to a new child, and fingerprints of what the client knows."""
        self._run(
            {
                "hash": session_hash,
                "log_level": log_level,
                "subscriptions": json.dumps(sorted(subscriptions)),
                "tools_hash": tools_hash,
                "rights_hash": rights_hash,
            },
            """
            UPDATE sessions
            SET log_level = :log_level,
                subscriptions = :subscriptions,
                tools_hash = :tools_hash,
                rights_hash = :rights_hash
            WHERE hash = :hash
            """,
        )

    def touch_sessions(self, uses: Mapping[bytes, float]) -> None:
        """Writes down when sessions were last used: {hash: time}."""
        self._run_each(
            "UPDATE sessions SET used_at = :at WHERE hash = :hash AND used_at < :at",
            [{"hash": name, "at": at} for name, at in uses.items()],
        )

    def end_session(self, session_hash: bytes, reason: str) -> bool:
        """Forgets a session. Returns whether it was there."""
        return bool(
            self._run(
                {"hash": session_hash, "reason": reason},
                ended_sessions("hash = :hash"),
                "DELETE FROM sessions WHERE hash = :hash RETURNING 1",
            )
        )

    def end_orphaned_sessions(self, now: float) -> list[bytes]:
        """Forgets the sessions of every (user, client) without a live grant. Returns their hashes."""
        ended = self._run(
            {"now": now, "reason": "grant ended"},
            ended_sessions(WITHOUT_GRANT),
            f"DELETE FROM sessions WHERE {WITHOUT_GRANT} RETURNING hash",
        )
        return [only(row) for row in ended]

    def program(self, fingerprint: str) -> ProgramRow | None:
        """Returns what is known of a child's program, or None."""
        return self._one(
            ProgramRow._make,
            "SELECT era, sends_requests FROM programs WHERE fingerprint = :fingerprint",
            {"fingerprint": fingerprint},
        )

    def save_program(self, fingerprint: str, era: str, now: float) -> None:
        """Keeps the era of a child's program; only the newest programs are kept."""
        self._run(
            {"fingerprint": fingerprint, "era": era, "now": now},
            """
            INSERT INTO programs (fingerprint, era, sends_requests, seen_at)
            VALUES (:fingerprint, :era, 0, :now)
            ON CONFLICT (fingerprint) DO UPDATE
            SET era = excluded.era,
                seen_at = excluded.seen_at
            """,
            """
            DELETE FROM programs
            WHERE fingerprint NOT IN (SELECT fingerprint FROM programs ORDER BY seen_at DESC LIMIT 20)
            """,
        )

    def program_sends_requests(self, fingerprint: str) -> None:
        """Notes that a child's program asks things of its client."""
        self._run(
            {"fingerprint": fingerprint},
            "UPDATE programs SET sends_requests = 1 WHERE fingerprint = :fingerprint",
        )


class BrokerStore(Database):
    """The brokers of this store, and what one of them does for all: each lease has one holder, for a time."""

    def report_broker(self, row: BrokerRow) -> None:
        """Writes down that a broker is there, and forgets those that were not seen for a day."""
        self._run(
            {**row._asdict(), "forgotten": row.seen_at - 86400},
            """
            INSERT INTO brokers (instance, name, version, key_ids, started_at, seen_at)
            VALUES (:instance, :name, :version, :key_ids, :started_at, :seen_at)
            ON CONFLICT (instance) DO UPDATE
            SET key_ids = excluded.key_ids,
                seen_at = excluded.seen_at
            """,
            "DELETE FROM brokers WHERE seen_at < :forgotten",
        )

    def forget_broker(self, instance: str) -> None:
        """Drops a broker that has ended in order, with its leases."""
        self._run(
            {"instance": instance},
            "DELETE FROM brokers WHERE instance = :instance",
            "DELETE FROM leases WHERE holder = :instance",
        )

    def brokers(self, since: float) -> list[BrokerRow]:
        """Returns the brokers that were seen since then, by name."""
        return self._all(
            BrokerRow._make,
            """
            SELECT instance, name, version, key_ids, started_at, seen_at
            FROM brokers
            WHERE seen_at >= :since
            ORDER BY name, started_at
            """,
            {"since": since},
        )

    def take_lease(self, name: str, holder: str, now: float, until: float) -> bool:
        """Takes a lease that nobody holds now, or prolongs one's own. Returns whether it is ours."""
        return bool(
            self._run(
                {"name": name, "holder": holder, "now": now, "until": until},
                """
                INSERT INTO leases (name, holder, until)
                VALUES (:name, :holder, :until)
                ON CONFLICT (name) DO UPDATE
                SET holder = excluded.holder,
                    until = excluded.until
                WHERE leases.until <= :now OR leases.holder = excluded.holder
                RETURNING 1
                """,
            )
        )

    def end_lease(self, name: str, holder: str) -> None:
        """Gives a lease back, if it is still this holder's."""
        self._run({"name": name, "holder": holder}, END_LEASE)

    def lease(self, name: str) -> LeaseRow | None:
        """Returns who holds a lease or held it last, None when it was given back."""
        return self._one(
            LeaseRow._make, "SELECT name, holder, until FROM leases WHERE name = :name", {"name": name}
        )

    def callbacks(self, now: float, seen_since: float) -> set[str]:
        """Returns the names of the leases of callbacks under way, here or at a broker seen since then."""
        found = self._all(
            only,
            """
            SELECT name
            FROM leases
            WHERE name LIKE 'callback %'
              AND until > :now
              AND (
                holder LIKE :ours
                OR EXISTS (
                  SELECT 1 FROM brokers WHERE leases.holder LIKE instance || ' %' AND seen_at >= :seen_since
                )
              )
            """,
            {"now": now, "seen_since": seen_since, "ours": self.holder + " %"},
        )
        return set(found)


class Store(ClientStore, UserStore, LoginStore, TokenStore, SessionStore, BrokerStore):
    """All that the broker keeps, and what concerns several of its tables: listings, boxes, sweeping."""

    def listing(self, kind: str, now: float) -> tuple[list[str], list[Values]]:
        """Returns the column names and rows of users, clients, grants (live ones) or sessions."""
        return self._read(LISTINGS[kind], {"now": now})

    def forget_client(self, client_id: str) -> bool:
        """Removes a client's registration; its logins stay. Returns whether it was there."""
        removed = self._run(
            {"client_id": client_id},
            """
            INSERT INTO operator_records (event, client_id, reason)
            SELECT 'client_removed', client_id, 'removed by operator'
            FROM clients
            WHERE client_id = :client_id
            """,
            "DELETE FROM clients WHERE client_id = :client_id RETURNING 1",
        )
        return bool(removed)

    def operator_records(self, most: int) -> list[OperatorRow]:
        """Returns the oldest of what operators' commands have done and no broker has logged yet."""
        return self._all(
            OperatorRow._make,
            """
            SELECT record_id, event, sub, client_id, grant_id, reason, session
            FROM operator_records
            WHERE record_id > 0
            ORDER BY record_id
            LIMIT :most
            """,
            {"most": most},
        )

    def drop_operator_records(self, record_ids: Iterable[int]) -> None:
        """Drops what has been logged; a record with a lower number may have been committed since."""
        self._run(
            {"listed": json.dumps(list(record_ids))},
            f"DELETE FROM operator_records WHERE record_id IN {IN_LIST_OF_IDS}",
        )

    def name_copy(self) -> str:
        """Returns a random name of what is here, the same for every copy of it."""
        self._run(
            {"name": secrets.token_hex(8).encode()},
            "INSERT INTO meta (name, value) VALUES ('copy_name', :name) ON CONFLICT DO NOTHING",
        )
        return self.copy_name() or ""

    def copy_name(self) -> str | None:
        """Returns the name that what is here got when it was copied, or None."""
        return self._note("copy_name")

    def forget_copy(self) -> None:
        """Forgets the copy of a file that was made and not noted: it lacks what is done here from now on."""
        if not self.is_shared and self.copy_name():
            self._run({}, "DELETE FROM meta WHERE name = 'copy_name'")

    def copied_to(self) -> str | None:
        """Returns the URL of the database that has taken over what is here, or None."""
        return self._note("copied_to")

    def boxes(self) -> list[BoxRow]:
        """Returns all that stays sealed here: the key's probe and the credentials."""
        return self._all(
            BoxRow._make,
            """
            SELECT 'probe' AS purpose, 'store' AS owner, value AS box FROM meta WHERE name = 'key_probe'
            UNION ALL
            SELECT 'upstream', 'user:' || sub, credential FROM users WHERE credential IS NOT NULL
            """,
            {},
        )

    def replace_box(self, old: bytes, new: bytes) -> bool:
        """Replaces a box by one of the same content.

        Returns whether it was still there; no two are equal, each has its own salt.
        """
        return bool(
            self._run(
                {"old": old, "new": new},
                "UPDATE meta SET value = :new WHERE name = 'key_probe' AND value = :old RETURNING 1",
                "UPDATE users SET credential = :new WHERE credential = :old RETURNING 1",
            )
        )

    def sweep(self, now: float, session_lifetime: float, client_lifetime: float = 30 * 86400) -> list[bytes]:
        """Drops what has had its time; tombstones that reuse detection needs stay as long as their grant.

        Returns ended sessions.
        """
        ended = self._run(
            {
                "now": now,
                "session_lifetime": session_lifetime,
                "client_lifetime": client_lifetime,
                "reason": "expired",
            },
            *SWEEPS,
        )
        return [only(row) for row in ended]


# ============================================================================================================
# Brokers
# Owns what the brokers of one store know of each other: who
# is there, which keys they have, what each has seen.
# Must not know what a broker serves. With SQLite there is only one, and nothing of this is written.
# ============================================================================================================


class Brokers:
    """This broker among those of its store: it reports each second, and learns of the others."""

    EVERY = 1.0  # seconds between two reports
    GONE = 15.0  # seconds without a report after which nobody waits for a broker any more
    FORGOTTEN = 300.0  # seconds after which its keys do not count any more

    def __init__(
        self, settings: Settings, store: Store, keyring: Keyring, log: Log, clock: SteadyClock
    ) -> None:
        self._settings = settings
        self._store = store
        self._keyring = keyring
        self._log = log
        self._clock = clock
        self._started_at = clock.now()
        self._due = 0.0
        self._warned = Seldom(clock, 60.0)

    def join(self) -> None:
        """Reports this broker before it serves.

        Raises ConfigurationError when another one seals with a key that is not here.
        """
        if not self._store.is_shared:
            return
        others = self._others(self.FORGOTTEN)
        sealing = common_keys(others)[:1]
        if sealing and sealing[0] not in self._keyring.ids:
            names = ", ".join(each.label for each in others)
            self._store.close()
            raise ConfigurationError(
                [f"key_file: the brokers of this store ({names}) seal with a key that is not here"]
            )
        self._report(self._started_at)

    def report(self, seen_at: float) -> None:
        """Writes down, each second, that this broker has acted on all that was committed before `seen_at`.

        Learns with which keys it may seal: a box has to open at every broker.
        """
        if self._store.is_shared and self._clock.monotonic() >= self._due:
            self._due = self._clock.monotonic() + self.EVERY
            self._report(seen_at)

    def _report(self, seen_at: float) -> None:
        ids = self._keyring.ids
        self._store.report_broker(
            BrokerRow(
                self._store.holder,
                self._settings.broker_name,
                __version__,
                " ".join(ids),
                self._started_at,
                seen_at,
            )
        )
        others = self._others(self.FORGOTTEN)
        self._keyring.common = frozenset(ids).intersection(*(each.key_ids.split() for each in others))
        alike = [each for each in others if each.name == self._settings.broker_name]
        if [each for each in alike if each.seen_at > seen_at - 5] and self._warned.due(""):
            self._log.event(
                "warning",
                "broker_name_twice",
                name=self._settings.broker_name,
                means="another broker of this store has the same name: a proxy cannot tell them apart",
            )

    def _others(self, seconds: float) -> list[BrokerRow]:
        """Returns the other brokers that reported in the last so many seconds."""
        found = self._store.brokers(self._clock.now() - seconds)
        return [each for each in found if each.instance != self._store.holder]

    def await_all(self) -> None:
        """Waits until every other broker has acted on what is committed by now, or is gone."""
        if not self._store.is_shared:
            return
        now = self._clock.now()
        while self._clock.now() < now + self.GONE:
            if all(each.seen_at > now for each in self._others(self.GONE)):
                return
            time.sleep(0.1)

    def leave(self) -> None:
        """This broker serves no more."""
        if self._store.is_shared:
            self._store.forget_broker(self._store.holder)


def common_keys(brokers: Sequence[BrokerRow]) -> list[str]:
    """Returns the ids of the keys that all of these brokers have, as the first one orders them."""
    if not brokers:
        return []
    return [key for key in brokers[0].key_ids.split() if all(key in each.key_ids.split() for each in brokers)]


# ============================================================================================================
# Messages
# Owns what a JSON-RPC message is, in one function, and how
# one is written; and strict reading of JSON from outside.
# Must not know methods, sessions or HTTP.
# ============================================================================================================

MAX_DEPTH = 64
# A parsed value costs up to 250 bytes, and the parser lets no
# other thread run: this many cost 0.1 s and 60 MiB at most.
MAX_VALUES = 1 << 18
MAX_CHILD_VALUES = 1 << 20
VALUE_BYTES = 128  # of a parsed value, where it is one of many
NO_STRUCTURE = bytes(set(range(256)) - set(b'"[]{},'))
AS_SQUARE = bytes.maketrans(b"{}", b"[]")
HALF_PAIR = re.compile(rb"\\u[dD]")
# The escape of a first half of a pair without a second one, or of a second one without a first.
LONE_SURROGATE = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F][0-9a-fA-F]{2})"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
ENVELOPE = re.compile(rb'\{"jsonrpc":"2\.0","id":(0|[1-9][0-9]{0,14}),"result":')
# U+0085, U+2028 and U+2029, which some readers of event streams take for the end of a line.
LINE_SEPARATORS = ((b"\xc2\x85", b"\\u0085"), (b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"))
Kind = TypeVar("Kind")
Default = TypeVar("Default")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    # Of two equal keys Python keeps the last, others the first: a difference to attack with.
    if len(value) != len(pairs):
        raise ValueError("an object has the same key twice")
    return value


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError("a number is too large")
    return value


def _finite_or_null(text: str) -> float | None:
    """Returns a number of a child; None for one that no double can hold.

    JSON.stringify writes null for such a number. One number fails no call.
    """
    value = float(text)
    return None if math.isinf(value) else value


_STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
_CHILD = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite_or_null)
_STRICT_NUMBERS = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite)
_LENIENT = json.JSONDecoder(strict=False)
# Made once: json.dumps would make one a call.
_ENCODER = json.JSONEncoder(separators=(",", ":"), check_circular=False)


def _structure(body: bytes) -> bytes:
    """Returns the brackets and commas of a JSON text that stand outside its strings.

    Found by passes of C that are linear in the text.
    """
    bare = body.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, NO_STRUCTURE)
    return b"".join(bare.replace(b'""', b"").split(b'"')[::2])


def _check_values(body: bytes, most: int) -> None:
    """Raises ValueError if a JSON text may hold more than `most` values.

    Each value but the first follows a bracket or a comma. A whole one takes two bytes at least: `1,`, `[]`.
    """
    if len(body) > 2 * most and sum(map(body.count, (b"[", b"{", b","))) > most:
        marks = _structure(body)
        if len(marks) - marks.count(b"]") - marks.count(b"}") > most:
            raise ValueError(f"more than {most} values")


def weight_of(body: bytes) -> int:
    """Returns about how much memory a JSON text takes together with its value, counted without parsing it."""
    return len(body) + VALUE_BYTES * sum(map(body.count, (b"[", b"{", b",")))


def _check_depth(body: bytes) -> None:
    """ValueError if a JSON text is nested deeper than MAX_DEPTH, so that no recursive parser sees it.

    Taking away all empty pairs of brackets makes a text one less
    deep. What is not JSON may be refused here or by the parser.
    """
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return
    brackets = _structure(body).translate(AS_SQUARE, b",")
    for deeper in range(MAX_DEPTH, -1, -1):
        if brackets.count(b"[") <= deeper:
            return
        brackets = brackets.replace(b"[]", b"")
    raise ValueError(f"nested deeper than {MAX_DEPTH}, or a bracket is missing")


def without_lone_surrogates(body: bytes) -> bytes:
    """Returns a JSON text in which each escape of half a surrogate pair is U+FFFD.

    Go and others read it like that; Python would keep such halves.
    """
    if b"\\" not in body or not HALF_PAIR.search(body):
        return body
    # An escaped backslash is written in another way, so that each one that is left begins an escape.
    mended, found = LONE_SURROGATE.subn(rb"\\ufffd", body.replace(rb"\\", rb"\u005c"))
    return mended if found else body


def _decode(decoder: json.JSONDecoder, body: bytes) -> object:
    try:
        return decoder.decode(without_lone_surrogates(body).decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(body: bytes) -> object:
    """Returns the value of a JSON text from outside.

    Raises ValueError unless it is strict UTF-8 without duplicate keys, NaN or endless numbers, at most
    MAX_DEPTH deep and of at most MAX_VALUES values; depth and values are counted before it is parsed. Lone
    surrogates become U+FFFD.
    """
    _check_values(body, MAX_VALUES)
    _check_depth(body)
    return _decode(_STRICT, body)


class PlainResult(dict[str, object]):
    """A child's answer as its line has it: the envelope, then the result, and nothing else.

    Another reader finds in such a line what the broker found, so it may go on with its bytes.
    """


def read_child_json(line: bytes) -> object:
    """Returns the value of a child's line: JSON of at most MAX_CHILD_VALUES values; else ValueError."""
    _check_values(line, MAX_CHILD_VALUES)
    match = ENVELOPE.match(line)
    if match and b"\r" not in line:
        with contextlib.suppress(ValueError, RecursionError):  # else it is read as any other line
            text = without_lone_surrogates(line).decode("utf-8")
            result, end = _STRICT_NUMBERS.raw_decode(text, match.end())
            if text[end:] == "}":
                return PlainResult(jsonrpc="2.0", id=int(match[1]), result=result)
    return _decode(_CHILD, line)


def id_of_bad_line(line: bytes) -> object:
    """Returns the `id` of an answer that is almost JSON, else None.

    Such an answer has NaN, a byte that is no UTF-8 or a bare control character in it. With too many values to
    be parsed, its id is read from its beginning.
    """
    try:
        _check_values(line, MAX_CHILD_VALUES)
        value = _LENIENT.decode(line.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return answer_of(line[:LINE_HEAD])
    return whole(member(value, "id", object, None)) if member(value, "method", object, None) is None else None


ANSWER_HEAD = re.compile(
    rb'\s*(?:\[\s*)?\{\s*"jsonrpc"\s*:\s*"2\.0"\s*,\s*"id"\s*:\s*([0-9]{1,15})\s*,\s*"(?:result|error)"'
)
LINE_HEAD = 200  # bytes at the beginning of a line that may say whose answer it is


def answer_of(head: bytes) -> int | None:
    """Returns the id in the beginning of an answer, if it stands there."""
    match = ANSWER_HEAD.match(head)
    return int(match[1]) if match else None


def parse_json_object(body: bytes, error: str) -> dict[str, object]:
    """Returns a JSON object from outside; OAuthError `error` when it is none."""
    try:
        value = read_json(body)
    except ValueError as problem:
        raise OAuthError(error, f"The body is not a JSON object: {str(problem)[:200]}.") from None
    if not isinstance(value, dict):
        raise OAuthError(error, "The body is not a JSON object.")
    return value


def member(value: object, name: str, kind: type[Kind], default: Default) -> Kind | Default:
    """Returns a member of a JSON object from outside if it is there and of this type, else `default`.

    Anything may stand where a specification wants an object or a text:
    what is no object has no members, and a boolean is no integer.
    """
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, kind) or isinstance(found, bool) and kind is not bool:
        return default
    return found


@dataclass(frozen=True, slots=True)
class Message:
    """A JSON-RPC message: `kind` is request, notification or response; `body` is the whole object."""

    kind: str
    id: object
    method: str
    params: dict[str, Any] | None
    body: dict[str, Any]


def is_absent(value: object) -> bool:
    """Returns whether a value that should be an object stands for none: null, or PHP's `[]`."""
    return value is None or value == []


def is_request_id(value: object) -> bool:
    """Returns whether a value is a string of up to 256 characters or an integer of up to 64 digits."""
    if isinstance(value, bool):
        return False
    if isinstance(value, str):
        return len(value) <= 256
    return isinstance(value, int) and abs(value) < 10**64


def classify(value: object) -> Message:
    """Returns a JSON value as a JSON-RPC message (JSON-RPC 2.0 4 and 5).

    Raises ValueError with the reason when it is none.
    """
    if not isinstance(value, dict):
        raise ValueError("a message must be an object")
    if value.get("jsonrpc") != "2.0":
        raise ValueError('"jsonrpc" must be "2.0"')
    if "method" in value:
        return _classify_request(value)
    if ("result" in value) == ("error" in value) or not is_request_id(value.get("id")):
        raise ValueError("a response has an id, and either result or error")
    if "error" in value:
        error = value["error"]
        code = member(error, "code", int, None)
        if code is None or abs(code) >= 2**63:
            raise ValueError("an error must be an object with a code")
    return Message("response", value["id"], "", None, value)


def _classify_request(value: dict[str, Any]) -> Message:
    method = value["method"]
    if not isinstance(method, str) or "result" in value or "error" in value:
        raise ValueError("a request has a method of text, and neither result nor error")
    params = None if is_absent(value.get("params")) else value["params"]
    if not isinstance(params, dict | None):
        raise ValueError("params must be an object")
    if "id" not in value:
        return Message("notification", None, method, params, value)
    if not is_request_id(value["id"]):
        raise ValueError("an id must be a string or an integer")
    return Message("request", value["id"], method, params, value)


def classify_sloppy(value: object) -> Message:
    """Returns a child's JSON value as a message, also one with mistakes that leave no doubt.

    Raises ValueError with the reason when it is none.
    """
    try:
        message = classify(value)
    except ValueError:
        message = classify(mended(value))
    if "error" in message.body and member(message.body["error"], "message", str, None) is None:
        raise ValueError("an error has a message of text")
    return message


def mended(value: object) -> object:
    """Returns a message without the habits of serializers that leave no doubt about what is meant.

    Some write every member: a null where nothing is, beside a `method`, a `result` or an `error`. Some write
    `[]` for an empty object. Some know only numbers with a fraction: 3.0 is 3.
    """
    if not isinstance(value, dict):
        return value
    message = {name: each for name, each in value.items() if each is not None or name in ("id", "result")}
    if "method" in message or "error" in message:
        message = {name: each for name, each in message.items() if each is not None}
    if message.get("params") == []:
        del message["params"]
    if "id" in message:
        message["id"] = whole(message["id"])
    code = member(message.get("error"), "code", float, None)
    if code is not None:
        message["error"] = {**message["error"], "code": whole(code)}
    return message


def whole(number: object) -> object:
    """Returns the integer that a number with an empty fraction is, anything else unchanged."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


def dump(value: object) -> bytes:
    """Returns a message as one line of bytes: ASCII, so that no character in it can end a line or a frame."""
    return _ENCODER.encode(value).encode()


def asking(method: str, params: object, **more: object) -> dict[str, object]:
    """Returns the body of a request or notification: its method, and params where there are any."""
    body = {**more, "method": method}
    if params is not None:
        body["params"] = params
    return body


def without_meta(params: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Returns params (or a result) without these names in `_meta`, and without an empty `_meta`."""
    meta = params.get("_meta")
    if not isinstance(meta, dict) or meta.keys().isdisjoint(names):
        return params
    left = {name: value for name, value in meta.items() if name not in names}
    rest = {name: value for name, value in params.items() if name != "_meta"}
    return {**rest, "_meta": left} if left else rest


def result_message(request_id: object, result: object) -> bytes:
    """Returns a JSON-RPC result as bytes."""
    return dump({"jsonrpc": "2.0", "id": request_id, "result": result})


def error_message(request_id: object, code: int, message: str, data: object = None) -> bytes:
    """Returns a JSON-RPC error as bytes, without an id when none could be read.

    MCP's schemas want it left out; JSON-RPC itself says null.
    """
    body: dict[str, object] = {"jsonrpc": "2.0"}
    if request_id is not None:
        body["id"] = request_id
    error: dict[str, object] = {"code": code, "message": message}
    if data is not None:
        error["data"] = data
    return dump({**body, "error": error})


def escape_line_separators(line: bytes) -> bytes:
    """Returns a JSON text with U+0085, U+2028 and U+2029 escaped.

    Some readers of event streams take them for the end of a line.
    """
    if not line.isascii():
        for separator, escape in LINE_SEPARATORS:
            line = line.replace(separator, escape)
    return line


def with_id(
    line: bytes, message: Message, request_id: object, extra: Mapping[str, object] | None = None
) -> bytes:
    """Returns a child's answer with its id replaced and `extra` members in its result.

    A PlainResult keeps its bytes: a large result is not written anew.
    """
    line = escape_line_separators(line)
    match = ENVELOPE.match(line) if isinstance(message.body, PlainResult) else None
    if match:
        head = line[: match.start(1)] + dump(request_id)
        if not extra:
            return b"".join((head, memoryview(line)[match.end(1) :]))
        if line[match.end() : match.end() + 1] == b"{":
            more = dump(extra)[1:-1]
            if message.body["result"]:
                more += b","
            return head + line[match.end(1) : match.end() + 1] + more + line[match.end() + 1 :]
    body = {**message.body, "id": request_id}
    if extra:
        body["result"] = {**body["result"], **extra}
    return dump(body)


# ============================================================================================================
# HTTP values
# Owns what a handler is given and what it gives back: Request, Response, and
# EventStream, the value of everything that waits; and what is counted for
# whom: Limiter (requests by the minute), Places (at once), Bodies (in bytes).
# Must not know sockets, routes, or what the bytes mean.
# ============================================================================================================


def read_address(text: str) -> str:
    """Returns the one spelling of an IP address, an IPv4-mapped one as IPv4; raises ValueError for all else.

    Takes what proxies write into X-Forwarded-For: with a port (Azure, IIS, AWS's ALB on request), in
    brackets, as `::ffff:192.0.2.1` (one dual-stack socket: nginx, HAProxy, Node).
    """
    host = text.strip(" \t")
    if len(host) > 64:  # the longest address with a zone, brackets and a port
        raise ValueError("not an address")
    port = ""
    if host.startswith("["):
        host, bracket, port = host[1:].partition("]")
        if not bracket or port and not port.startswith(":"):
            raise ValueError("not an address")
        port = port[1:] if port else "0"
    elif host.count(":") == 1:
        host, _, port = host.partition(":")
    else:
        port = "0"
    if not (port.isascii() and port.isdecimal() and len(port) <= 5):
        raise ValueError("not a port")
    address = ipaddress.ip_address(host.partition("%")[0])
    return str(getattr(address, "ipv4_mapped", None) or address)


@dataclass(slots=True)
class Context:
    """A request's endpoint and sender, as learnt while it is served, for the log and the metrics."""

    endpoint: str = "other"
    client: str | None = None
    client_name: str | None = None
    user: str | None = None
    user_agent: str | None = None

    def who(self) -> dict[str, object]:
        """Returns from whom the request comes, as far as known."""
        return {
            "client": self.client and self.client[:200],
            "client_name": self.client_name and self.client_name[:100],
            "user": self.user,
            "user_agent": self.user_agent and self.user_agent[:200],
        }


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request.

    `headers` maps a lower-case name to the list of its values; `target` is the raw path, `query` the raw
    query. `read_body(limit, seconds, weigh)` reads and returns the body, which then weighs weigh(body) on its
    owner; HTTPError 413, 408, 400 or 503. `address` is the client's, as far as trusted proxies tell.
    `direct`: no proxy spoke for the client. `is_proxy`: the address is a trusted proxy's own, which stands
    for an unknown number of clients. `seat` is the request's place among what is served at once.
    """

    method: str
    path: str
    query: str
    headers: dict[str, list[str]]
    address: str
    direct: bool
    is_proxy: bool
    id: str
    read_body: Callable[..., bytes]
    seat: Seat
    context: Context

    def header(self, name: str, default: str | None = None) -> str | None:
        """Returns the value of a header that may stand once. Raises HTTPError 400 when it stands twice."""
        values = self.headers.get(name)
        if not values:
            return default
        if len(values) > 1:
            description = f"The header {name} may be sent only once."
            raise HTTPError(400, "invalid_request", description, cause="bad_request")
        return values[0]

    def first_header(self, name: str) -> str:
        """Returns the first value of a header, empty when there is none."""
        values = self.headers.get(name)
        return values[0] if values else ""


class Delivery(enum.Enum):
    """How the messages of a stream reach the client."""

    JSON = "json"  # its Accept admits no event stream: plain JSON, however long it takes
    JSON_THEN_SSE = (
        "json, then sse"  # plain JSON if the answer comes first and within JSON_WAIT, else an event stream
    )
    SSE = "sse"


JSON_WAIT = 2.0  # seconds


@dataclass(frozen=True, slots=True)
class StreamingResponse:
    """An answer that is still to come: the connection's thread writes the events of `reader` until the last.

    `event_ids`: the client can come back for what it missed; MCP 2026-07-28 has none. `prime`: open the event
    stream with an empty event that carries an id (MCP 2025-11-25). `batch`: the answers form one JSON array.
    `on_disconnect` is called when the client hangs up before the last item (MCP 2026-07-28 cancellation).
    `quiet`: the event stream ends once nothing has come for so many seconds; without it a comment is sent
    every 15 s.
    """

    reader: Reader
    delivery: Delivery = Delivery.JSON_THEN_SSE
    event_ids: bool = True
    prime: bool = False
    batch: bool = False
    on_disconnect: Callable[[], object] | None = None
    quiet: float | None = None


@dataclass(frozen=True, slots=True)
class Response:
    """One HTTP response: a status, headers as (name, value) pairs, and a body of bytes or `streaming`.

    `cause`, one of REASONS: the request was refused, for the log and the metrics.
    """

    status: int
    body: bytes = b""
    content_type: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    streaming: StreamingResponse | None = None
    cause: str = ""


def json_response(status: int, value: object, headers: Headers = (), cause: str = "") -> Response:
    """Returns a JSON response."""
    return Response(status, json.dumps(value).encode(), "application/json", tuple(headers), cause=cause)


NO_STORE = (("Cache-Control", "no-store"), ("Pragma", "no-cache"))


def error_response(error: HTTPError, headers: Headers = ()) -> Response:
    """Returns an HTTPError as JSON, for programs."""
    body = {"error": error.code, "error_description": error.description}
    return json_response(error.status, body, (*error.headers, *headers), error.cause)


def redirect(location: str) -> Response:
    """Returns a 303: a form is followed by a GET (RFC 9700 4.12), and a URL with a code is never cached."""
    headers = (("Location", location), ("Cache-Control", "no-store"), ("Referrer-Policy", "no-referrer"))
    return Response(303, headers=headers)


@dataclass(slots=True, eq=False)
class Event:
    """One event of a stream: its number, a JSON-RPC message, whether it is an answer, whether it is the last.

    `status` is the HTTP response's, should the answer be all there is. `kept`: its owner is charged for it.
    `dropped`: it stands for an answer that is gone.
    """

    number: int
    data: bytes
    answer: bool = False
    last: bool = False
    status: int = 200
    request_id: object = None
    kept: bool = False
    dropped: bool = False


class Holder:
    """The bytes of one user or one session, and its messages that may be dropped, oldest first."""

    __slots__ = ("bytes", "items")

    def __init__(self) -> None:
        self.bytes = 0
        self.items: collections.OrderedDict[Event, EventStream] = collections.OrderedDict()


@dataclass(frozen=True, slots=True)
class Owner:
    """Who is charged for a stream: a user, and one session (or slot of a pool) of that user by its number."""

    user: str
    session: int


class KeptBytes:
    """The accountant of everything that waits on streams for a client: how much, whose, and since when.

    Bounds (settings): `kept_bytes` over all, a quarter of it for one user, `kept_bytes_per_session`,
    `kept_time`. At a bound the oldest item of whoever holds most there is dropped; where a client reads all
    of that, whoever wants to add waits. While all is full a user may still hold an equal share: who reads
    slowly, from many sides, holds up nobody else. `lock` guards everything; a leaf: no stream's lock is taken
    while it is held. Each operation is O(log n).
    """

    def __init__(self, settings: Settings, clock: SteadyClock) -> None:
        self._settings = settings
        self._clock = clock
        self.lock = threading.Condition()
        self.total = 0
        self.users: dict[str, Holder] = {}
        self.sessions: dict[int, Holder] = {}
        self.ages: collections.OrderedDict[Event, tuple[float, Owner, EventStream]] = (
            collections.OrderedDict()
        )
        # A heap of (-bytes, user); entries that are no longer true are skipped.
        self._most: list[tuple[int, str]] = []

    def reserve(self, owner: Owner, size: int, patience: float, over: Callable[[], bool]) -> bool:
        """Charges an owner; False when there is no room within `patience` seconds, or before over()."""
        deadline = time.monotonic() + patience
        tries = 0
        while True:
            with self.lock:
                holder = self._full(owner, size)
                stream = item = None
                if holder is not None and holder.items and tries < 16:
                    item, stream = next(iter(holder.items.items()))
                if holder is None or item is None and self._may_exceed(owner, size, holder):
                    self._charge(owner, size)
                    return True
                if item is None:
                    left = deadline - time.monotonic()
                    if left <= 0 or over():
                        return False
                    self.lock.wait(min(0.2, left))
                    tries = 0
            if item is not None and stream is not None:
                stream.drop(item)
                tries += 1

    def _full(self, owner: Owner, size: int) -> Holder | None:
        """Returns the holder who must give something up before an owner can have so much more, else None.

        Under the lock. What is larger than a bound by itself needs all else there to go.
        """
        every = self._settings.kept_bytes
        session = self.sessions.get(owner.session)
        user = self.users.get(owner.user)
        if session and session.bytes + size > max(self._settings.kept_bytes_per_session, size):
            return session
        if user and user.bytes + size > max(every // 4, size):
            return user
        if self.total and self.total + size > max(every, size):
            return self._largest()
        return None

    def _largest(self) -> Holder | None:
        """Returns the user who holds most."""
        while self._most:
            held, name = self._most[0]
            user = self.users.get(name)
            if user and user.bytes == -held:
                return user
            heapq.heappop(self._most)
            if user:
                heapq.heappush(self._most, (-user.bytes, name))
        return None

    def _may_exceed(self, owner: Owner, size: int, holder: Holder) -> bool:
        """Returns whether the others fill everything, while this user has less than an equal share."""
        user = self.users.get(owner.user)
        session = self.sessions.get(owner.session)
        if holder is session or holder is user:
            return False
        return (user.bytes if user else 0) + size <= self._settings.kept_bytes // (len(self.users) + 1)

    def _charge(self, owner: Owner, size: int) -> None:
        self.users.setdefault(owner.user, Holder()).bytes += size
        self.sessions.setdefault(owner.session, Holder()).bytes += size
        self.total += size
        heapq.heappush(self._most, (-self.users[owner.user].bytes, owner.user))
        if len(self._most) > 4 * len(self.users) + 256:
            self._most = [(-user.bytes, name) for name, user in self.users.items()]
            heapq.heapify(self._most)

    def release(self, owner: Owner, size: int) -> None:
        """Take a charge back."""
        with self.lock:
            self._release(owner, size)

    def _release(self, owner: Owner, size: int) -> None:
        user = self.users[owner.user]
        session = self.sessions[owner.session]
        user.bytes -= size
        session.bytes -= size
        if not user.bytes:
            del self.users[owner.user]
        if not session.bytes:
            del self.sessions[owner.session]
        self.total -= size
        self.lock.notify_all()

    def keep(self, owner: Owner, stream: EventStream, item: Event) -> None:
        """From now on an item (its bytes are charged) may be dropped: as the newest of its owner."""
        item.kept = True
        with self.lock:
            self._forget(owner, item)
            self.ages[item] = (self._clock.monotonic(), owner, stream)
            self.users[owner.user].items[item] = stream
            self.sessions[owner.session].items[item] = stream

    def _forget(self, owner: Owner, item: Event) -> None:
        self.ages.pop(item, None)
        for holder in (self.users.get(owner.user), self.sessions.get(owner.session)):
            if holder:
                holder.items.pop(item, None)

    def gone(self, owner: Owner, item: Event, size: int) -> None:
        """An item was dropped, or is needed no more."""
        item.kept = False
        with self.lock:
            self._forget(owner, item)
            self._release(owner, size)

    def is_outsized(self, size: int) -> bool:
        """Returns whether something is larger than a session's share: it lives while its connection does."""
        return size > self._settings.kept_bytes_per_session

    def expire(self) -> None:
        """Drops what has waited longer than `kept_time`; a message being read begins anew."""
        before = self._clock.monotonic() - self._settings.kept_time
        with self.lock:
            tries = len(self.ages)
        for _ in range(tries):
            with self.lock:
                item = next(iter(self.ages), None)
                if item is None or self.ages[item][0] > before:
                    return
                stream = self.ages[item][2]
            stream.drop(item)


SMALL_ANSWER = 16384  # one that a client waits for is charged only if it stays: in most calls that is never


class EventStream:
    """What the broker has to say on one POST or GET: numbered, bounded, resumable, with one reader at a time.

    Producers call put(); a reader takes items in order. Items stay for a client that resumes: events within
    `max_items` and `max_bytes`, answers as long as the accountant `kept` allows. A producer waits while an
    attached reader lags by more than that; without a reader the oldest events fall out. Nothing stays on a
    stream that no client can name: `on_named` is called when the first event id is sent. `lost(request_id)`
    is said instead of an answer that is gone.
    """

    def __init__(
        self,
        max_items: int = 256,
        max_bytes: int = 1 << 20,
        stall: float = 35.0,
        answers: int = 0,
        kept: KeptBytes | None = None,
        owner: Owner | None = None,
        lost: Callable[[object], bytes] | None = None,
    ) -> None:
        self.key = b64url(os.urandom(9))  # new at every start of the broker, so stale event ids never match
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._stall = stall
        self._kept = kept
        self._owner = owner or Owner("", 0)
        self._lost = lost
        # Guards everything below; only the accountant's lock is taken while it is held.
        self._changed = threading.Condition()
        self._items: dict[int, Event] = {}
        self._events = 0  # how many of the items are no answers; `_bytes` are theirs
        self._bytes = 0
        self._number = 0
        self._taken = 0
        self._reader: Reader | None = None
        self._answers_left = answers
        self.named = kept is None
        self.on_named: Callable[[EventStream], None] | None = None
        self._unwanted = False  # no client can come back for what is put on it
        self.finished = False

    def put(self, data: bytes, answer: bool = False, status: int = 200, request_id: object = None) -> bool:
        """Add a message; the last of the expected answers ends the stream.

        False when it has ended already.
        """
        charged = False
        if self._kept and (not answer or len(data) >= SMALL_ANSWER):
            charged = self._reserve(data, answer)
            if not charged:
                data = self._lost(request_id) if answer and self._lost else b""
        with self._changed:
            if self._reader and not answer and self._is_full():
                self._changed.wait_for(lambda: self.finished or not self._reader_lags(), self._stall)
            if self.finished:
                self._uncharge(charged, data)
                return False
            self._add(data, answer, status, request_id, charged)
            stays = self._reader is None and self._kept is not None
        if stays:
            self._settle()
        return True

    def _add(self, data: bytes, answer: bool, status: int, request_id: object, charged: bool) -> None:
        """Append a message, unless nobody will ever come for it. Under the lock."""
        self._answers_left -= answer
        self.finished = answer and self._answers_left <= 0
        self._number += 1
        if self._unwanted or not data:
            self._uncharge(charged, data)
        else:
            item = Event(self._number, data, answer, self.finished, status, request_id)
            self._items[item.number] = item
            if charged and self._kept:
                self._kept.keep(self._owner, self, item)
            if not answer:
                self._events += 1
                self._bytes += len(data)
                self._let_events_go()
        self._changed.notify_all()

    def _is_full(self) -> bool:
        return self._events >= self._max_items or self._bytes >= self._max_bytes

    def _let_events_go(self) -> None:
        """Drop the oldest events that are too many, but none that an attached reader has still to take.

        Under the lock.
        """
        while self._events > self._max_items or self._bytes > self._max_bytes and self._events > 1:
            oldest = next(item for item in self._items.values() if not item.answer)
            if self._reader and oldest.number > self._reader.cursor:
                return
            self._remove(oldest)

    def _reader_lags(self) -> bool:
        if not self._reader:
            return False
        cursor = self._reader.cursor
        untaken = [
            len(item.data) for item in self._items.values() if item.number > cursor and not item.answer
        ]
        return len(untaken) >= self._max_items or sum(untaken) >= self._max_bytes

    # -- what is kept for a client that comes back

    def _reserve(self, data: bytes, answer: bool) -> bool:
        """Charge the owner for a message.

        A client that reads lets its child wait; nobody else does, but for a large answer.
        """
        assert self._kept
        patience = self._stall if answer or self._reader else 0.0
        return self._kept.reserve(self._owner, len(data), patience, lambda: self.finished or self._unwanted)

    def _uncharge(self, charged: bool, data: bytes) -> None:
        if charged and self._kept:
            self._kept.release(self._owner, len(data))

    def _remove(self, item: Event) -> None:
        """An item goes: an event without a trace, an answer leaves word that it is gone. Under the lock."""
        if item.kept and self._kept:
            self._kept.gone(self._owner, item, len(item.data))
        if item.answer and self._lost and not self._unwanted and not item.dropped:
            word = self._lost(item.request_id)
            self._items[item.number] = Event(item.number, word, True, item.last, dropped=True)
            return
        del self._items[item.number]
        if not item.answer:
            self._events -= 1
            self._bytes -= len(item.data)

    def drop(self, item: Event) -> None:
        """Let an item go that is not being read; one that is counts as new."""
        with self._changed:
            if self._items.get(item.number) is not item:
                return
            if self._reader and self._reader.cursor < item.number:
                if item.kept and self._kept:
                    self._kept.keep(self._owner, self, item)
                return
            self._remove(item)

    def _settle(self) -> None:
        """Nobody reads: uncharged messages are charged, an answer above the session's share is dropped."""
        assert self._kept
        with self._changed:
            items = [item for item in self._items.values() if not item.dropped]
        for item in items:
            if self._kept.is_outsized(len(item.data)):
                self.drop(item)
            elif not item.kept:
                self._charge_late(item)

    def _charge_late(self, item: Event) -> None:
        assert self._kept
        has_room = self._kept.reserve(self._owner, len(item.data), 0.0, lambda: True)
        with self._changed:
            is_here = self._items.get(item.number) is item and not item.kept
            if has_room and is_here:
                self._kept.keep(self._owner, self, item)
            elif has_room:
                self._kept.release(self._owner, len(item.data))
        if not has_room:
            self.drop(item)

    def _forget(self) -> None:
        """Keep nothing, now and later. Under the lock."""
        self._unwanted = True
        for item in list(self._items.values()):
            self._remove(item)

    def forget(self) -> None:
        """No client can come back: the stream's messages are dropped, once nobody reads it any more."""
        with self._changed:
            self.named = False
            if self._reader is None:
                self._forget()

    def announce(self) -> None:
        """Event ids are about to be sent: from now on a client can come back."""
        if not self.named and self.on_named:
            self.named = True
            self.on_named(self)

    def end(self) -> None:
        """No more will come: an attached reader ends."""
        with self._changed:
            self.finished = True
            self._changed.notify_all()

    def open(self, after: int | None = None) -> Reader:
        """Returns a Reader from the event after number `after` (default: the first not yet taken).

        It takes over from an older reader.
        """
        with self._changed:
            older = self._reader
            if older:
                older.ended = True
            if after is None:
                self._reader = Reader(self, self._taken, older.sender if older else None)
            else:
                self._reader = Reader(self, after)
            self._changed.notify_all()
            return self._reader

    def open_if_free(self) -> Reader | None:
        """Returns a Reader as open() gives it, None when there is one already."""
        with self._changed:
            if self._reader:
                return None
            self._reader = Reader(self, self._taken)
            return self._reader

    @property
    def is_taken(self) -> bool:
        """Returns whether a client took every message of the stream."""
        return self._taken >= self._number

    @property
    def holds_nothing(self) -> bool:
        """Returns whether no client reads it, and its untaken messages are gone."""
        with self._changed:
            if self._reader is not None:
                return False
            return all(item.dropped or item.number <= self._taken for item in self._items.values())

    @property
    def is_open(self) -> bool:
        """Returns whether a reader is attached."""
        return self._reader is not None


class Reader:
    """One client's reading of an EventStream.

    take(timeout) -> Event, None on time-out; `ended` once there will be no more. It takes over from `older`.
    """

    # Seconds in which an older reader's client has what is being sent to it, unless that client is gone.
    TAKE_OVER = 1.0

    def __init__(self, stream: EventStream, cursor: int, older: Reader | None = None) -> None:
        self.stream = stream
        self.cursor = cursor
        self.ended = False
        self._is_sending = False  # an item was taken, and is neither acknowledged nor given up
        self._older = older

    def take(self, timeout: float, after: int = 0) -> Event | None:
        """The next item, waiting at most `timeout` seconds; None then, or when the reader has `ended`."""
        stream = self.stream
        with stream._changed:
            self._take_over()
            while not self.ended:
                seen = max(self.cursor, after)
                item = stream._items.get(seen + 1)
                if item is None and seen < stream._number:
                    item = next((item for item in stream._items.values() if item.number > seen), None)
                if item is not None:
                    self._is_sending = True
                    return item
                if stream.finished:
                    self.ended = True
                elif not stream._changed.wait(timeout):
                    return None
            return None

    @property
    def sender(self) -> Reader:
        """Returns the reader that may be sending: the older one, until this one has taken over from it."""
        return self._older or self

    def _take_over(self) -> None:
        """Skips what the older reader sends just now: its client may have it before it is acknowledged.

        Under the lock.
        """
        older = self._older
        if older is None:
            return
        self.stream._changed.wait_for(lambda: self.ended or not older._is_sending, self.TAKE_OVER)
        self._older = None
        self.cursor = max(self.cursor, self.stream._taken)

    def ack(self, item: Event) -> None:
        """The item has been handed to the client's socket."""
        with self.stream._changed:
            self._is_sending = False
            self.cursor = item.number
            self.stream._taken = max(self.stream._taken, item.number)
            self.stream._changed.notify_all()

    @property
    def has_all(self) -> bool:
        """Returns whether the last item was handed over."""
        return self.stream.finished and self.cursor >= self.stream._number

    def close(self) -> None:
        """The client is gone, or has all it needs: the stream has no reader, unless a newer one took over."""
        stream = self.stream
        with stream._changed:
            self.ended = True
            self._is_sending = False
            was_last = stream._reader is self
            if was_last:
                stream._reader = None
                if not stream.named:
                    stream._forget()
            stream._changed.notify_all()
        if was_last and stream.named and stream._kept:
            stream._settle()


class Places:
    """Counts what is served at once, by kind and owner.

    A kind is "requests", "streams" or "lingering"; an owner is "user 42" or "address 192.0.2.1". Only a Seat
    takes and gives back, so that the count falls whatever becomes of a request.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the dict; a leaf
        # (kind, owner) -> name -> seats of that name
        self._held: dict[tuple[str, str], dict[object, int]] = {}

    def count(self, kind: str, owner: str) -> int:
        """Returns how many places of a kind an owner has."""
        with self._lock:
            return len(self._held.get((kind, owner), ()))

    def total(self) -> int:
        """Returns how many places are taken."""
        with self._lock:
            return sum(map(len, self._held.values()))

    def move(
        self, old: tuple[str, str, object] | None, new: tuple[str, str, object] | None, limit: int | None
    ) -> bool:
        """Gives `old` back and takes `new`, each (kind, owner, name).

        Returns False, changing nothing, if the owner has `limit` of that kind.
        """
        with self._lock:
            if new:
                names = self._held.get(new[:2], {})
                if limit is not None and new != old and new[2] not in names and len(names) >= limit:
                    return False
                self._held.setdefault(new[:2], names)
                names[new[2]] = names.get(new[2], 0) + 1
            if old:
                names = self._held[old[:2]]
                names[old[2]] -= 1
                if not names[old[2]]:
                    del names[old[2]]
                if not names:
                    del self._held[old[:2]]
            return True


class Seat:
    """A request's place among the Places: one at a time, moved by take(), given back by leave()."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self._held: tuple[str, str, object] | None = None
        self.owner = ""  # who asked last, be it in vain

    def take(self, kind: str, owner: str, limit: int | None, name: object = None) -> None:
        """Moves to a place of `owner`; HTTPError 429 when they have `limit` of that kind.

        Seats of one `name` count once.
        """
        self.owner = owner
        wanted = (kind, owner, self if name is None else name)
        if not self._places.move(self._held, wanted, limit):
            raise HTTPError(
                429,
                "too_many_requests",
                "Too many requests at once; try again when some have been answered.",
                (("Retry-After", "5"),),
            )
        self._held = wanted

    def leave(self) -> None:
        """Gives the place back."""
        held = self._held
        self._held = None
        self._places.move(held, None, None)


def seat_of_address(request: Request, settings: Settings) -> None:
    """Counts a request without a valid token for its address, unless that is a proxy's own.

    HTTPError 429 above `max_requests_per_address`.
    """
    limit = None if request.is_proxy else settings.max_requests_per_address
    request.seat.take("requests", f"address {network_of(request.address)}", limit)


@dataclass(eq=False, slots=True)
class Body:
    """A request's body: its owner, when its reading began, its bytes, and how many are charged.

    `end` ends the reading. `weight` is charged once it has been read.
    """

    owner: str
    began: float
    end: Callable[[], None]
    received: int = 0
    charged: int = 0
    weight: int = 0
    ended: bool = False


class Bodies:
    """The bytes of bodies being read, charged to their owners as they arrive; the first FREE of each are not.

    When there are more than `body_bytes`, the slowest body of who holds most is ended: not the newcomer's,
    whoever that is. One that has been read weighs on its owner until its request is answered or with a child;
    those of one owner weigh at most `body_bytes`, but for a single one, and four times that over all; above
    that an owner has an equal share.
    """

    FREE = 16384
    OWNERS = 4

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()  # guards everything below, and what is charged of every Body; a leaf
        self._by_owner: dict[str, set[Body]] = {}
        self.total = 0
        self._weights: dict[str, int] = {}  # of bodies that have been read, by owner

    def grow(self, body: Body, size: int) -> None:
        """Charges `size` bytes that have arrived; HTTPError 503 for a body that was ended, now or before."""
        victims = []
        with self._lock:
            body.received += size
            charge = max(0, body.received - self.FREE) - body.charged
            if charge and not body.ended:
                body.charged += charge
                self.total += charge
                self._by_owner.setdefault(body.owner, set()).add(body)
                while self.total > self._settings.body_bytes:
                    victims.append(self._slowest())
                    self._drop(victims[-1])
                    victims[-1].ended = True
        for victim in victims:
            if victim is not body:
                victim.end()
        if body.ended:
            raise self._no_room()

    @staticmethod
    def _no_room() -> HTTPError:
        return HTTPError(
            503,
            "temporarily_unavailable",
            "Too many large requests at once; try again in a moment.",
            (("Retry-After", "5"),),
        )

    def settle(self, body: Body, weight: int) -> None:
        """The body has been read, and weighs so much until close(); HTTPError 503 where that has no room."""
        with self._lock:
            self._drop(body)
            weight = max(0, weight - self.FREE)
            held = self._weights.get(body.owner, 0)
            limit = self._settings.body_bytes
            others = sum(self._weights.values()) - held
            share = self.OWNERS * limit // (len(self._weights) + 1)
            is_full = others + held + weight > self.OWNERS * limit and held + weight > share
            if weight and (held and held + weight > limit or others and is_full):
                raise self._no_room()
            if weight:
                self._weights[body.owner] = held + weight
                body.weight = weight

    def close(self, body: Body) -> None:
        """The body never will be read, or nothing of it waits any more."""
        with self._lock:
            self._drop(body)
            if body.weight:
                self._weights[body.owner] -= body.weight
                body.weight = 0
                if not self._weights[body.owner]:
                    del self._weights[body.owner]

    def _slowest(self) -> Body:
        now = time.monotonic()
        largest = max(self._by_owner.values(), key=lambda bodies: sum(body.charged for body in bodies))
        return min(largest, key=lambda body: body.received / (now - body.began + 0.001))

    def _drop(self, body: Body) -> None:
        bodies = self._by_owner.get(body.owner, set())
        if body in bodies:
            bodies.remove(body)
            self.total -= body.charged
            body.charged = 0
        if not bodies:
            self._by_owner.pop(body.owner, None)


class Limiter:
    """Token buckets by key: a burst of `rate` and `rate` a minute after that.

    HTTPError 429 with Retry-After when empty.
    """

    def __init__(self, clock: SteadyClock) -> None:
        self._clock = clock
        # Guards the dict; a leaf.
        self._lock = threading.Lock()
        self._buckets: dict[tuple[str, str | int], tuple[float, float]] = {}

    def is_spent(self, kind: str, key: str, rate: int) -> bool:
        """Returns whether spend() would refuse."""
        now = self._clock.monotonic()
        with self._lock:
            left, since = self._buckets.get((kind, key), (rate, now))
        return min(rate, left + max(0, now - since) * rate / 60) < 1

    def spend(self, kind: str, key: str | int, rate: int) -> None:
        """Take one token of `key`'s bucket for `kind`."""
        now = self._clock.monotonic()
        key = key if isinstance(key, int) else key[-64:]  # a stranger's host name may be longer
        with self._lock:
            left, since = self._buckets.pop((kind, key), (rate, now))
            left = min(rate, left + max(0, now - since) * rate / 60)
            self._buckets[kind, key] = (left - 1 if left >= 1 else left, now)
            if len(self._buckets) > 10000:
                del self._buckets[next(iter(self._buckets))]  # the one unused for longest
        if left < 1:
            raise HTTPError(
                429,
                "too_many_requests",
                "Too many requests; try again in a moment.",
                (("Retry-After", str(max(1, round((1 - left) * 60 / rate)))),),
            )


# ============================================================================================================
# Outgoing HTTP
# Owns every outgoing request: name resolution, connecting, TLS, one deadline and one cap over each answer.
# Must not know Forgejo, OAuth or MCP.
# ============================================================================================================


class FetchFailed(Exception):
    """An outgoing request that brought no whole answer: unreachable, too slow, too large, not HTTP.

    `away`: the name did not resolve, nothing there could be connected to, or it took too long.
    """

    def __init__(self, reason: str, away: bool = False) -> None:
        super().__init__(reason)
        self.away = away


@dataclass(frozen=True)
class Fetched:
    """An answer: status, headers by lower-case name, and the body."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> dict[str, object] | None:
        """Returns the JSON object in a body that says it is JSON, else None."""
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if not re.fullmatch(r"application/([a-z0-9.-]+\+)?json", kind):
            return None
        try:
            value = read_json(self.body)
        except ValueError:
            return None
        return value if isinstance(value, dict) else None


def _time_left(deadline: float) -> float:
    """Returns the seconds until a deadline. Raises TimeoutError after it."""
    left = deadline - time.monotonic()
    # Asked even when data is there: an answer that never ends would never let a time-out happen.
    if left <= 0:
        raise TimeoutError("the answer took too long")
    return left


def plain_reason(error: object) -> str:
    """Returns why a request failed, in words for operators instead of names of Python's classes."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not good: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return (
            f"it speaks no TLS as we do: {(error.reason or 'the handshake failed').replace('_', ' ').lower()}"
        )
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, http.client.HTTPException):
        return f"what it answers is not HTTP{f': {error}' if str(error) else ''}"
    return getattr(error, "strerror", None) or str(error)


class _Socket(io.RawIOBase):
    """A socket for http.client with one deadline and one cap over a whole answer, its heads included.

    A time-out for each read would start anew at each byte; http.client reads interim answers, chunks and
    trailers without end.
    """

    def __init__(self, sock: socket.socket, deadline: float, most: int) -> None:
        self._sock = sock
        self._deadline = deadline
        self._left = most

    def makefile(self, mode: str) -> io.BufferedReader:
        """Returns what http.client reads the answer from."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        """Returns True: io.BufferedReader asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Reads what is there. Raises TimeoutError at the deadline, FetchFailed above the cap."""
        self._sock.settimeout(_time_left(self._deadline))
        size = self._sock.recv_into(buffer)
        self._left -= size
        if self._left < 0:
            raise FetchFailed("the answer is too large")
        return size

    def sendall(self, data: bytes) -> None:
        """Sends all of the data. Raises TimeoutError at the deadline."""
        self._sock.settimeout(_time_left(self._deadline))
        self._sock.sendall(data)

    def close(self) -> None:
        """Does nothing: http.client closes before the answer is read; fetch() closes after."""


# Names of ours that are being looked up; and names that strangers named, which must not hold up ours.
LOOKUPS = threading.BoundedSemaphore(64)
STRANGERS_LOOKUPS = threading.BoundedSemaphore(64)
# Addresses of a name that are tried.
MAX_ADDRESSES = 16
# Bytes of an answer beside its body.
MAX_ANSWER_HEAD = 1 << 17


def resolve_name(host: str) -> list[str]:
    """Returns the addresses of a host name, as texts. Raises OSError, or ValueError for what is no name."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def resolve_until(
    end: float, host: str, resolve: Callable[[str], list[str]], places: threading.BoundedSemaphore
) -> list[str]:
    """Returns the addresses of a name.

    Raises FetchFailed when there is none, or none is known at `end` (monotonic). getaddrinfo(3) has no
    deadline: a name server that says nothing holds it for as long as the resolver tries. So it runs in a
    thread of its own, one of as many as there are `places`.
    """
    with contextlib.suppress(ValueError):
        return [str(ipaddress.ip_address(host))]
    found: queue.SimpleQueue[list[str] | Exception] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            found.put(resolve(host))
        except Exception as error:
            found.put(error)
        finally:
            places.release()

    if not places.acquire(timeout=max(0.0, end - time.monotonic())):
        raise FetchFailed("too many names are being looked up", away=True)
    try:
        threading.Thread(target=look_up, daemon=True, name="resolver").start()
    except RuntimeError:
        places.release()
        raise FetchFailed("no thread to look the name up", away=True) from None
    try:
        answer = found.get(timeout=max(0.0, end - time.monotonic()))
    except queue.Empty:
        raise FetchFailed("the name servers do not answer", away=True) from None
    if isinstance(answer, Exception) or not answer:
        reason = plain_reason(answer) if isinstance(answer, Exception) else "it has no address"
        raise FetchFailed(f"the name does not resolve: {reason}", away=True)
    return answer


def tls_context(ca_file: str) -> ssl.SSLContext:
    """Returns a context that verifies a server by the system's authorities, or by those in `ca_file`.

    Raises FetchFailed for a file that cannot be read or holds no certificate.
    """
    try:
        context = ssl.create_default_context(cafile=ca_file or None)
    except ssl.SSLError:
        raise FetchFailed(f"{ca_file} holds no certificate in PEM") from None
    except OSError as error:
        raise FetchFailed(f"cannot read the certificate authorities in {ca_file}: {error.strerror}") from None
    if ca_file:
        # Python 3.13 asks for extensions that home-made certificates lack; curl, Go and older Pythons do not.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def open_socket(
    parts: SplitResult, addresses: list[str], end: float, ca_file: str, connect: Callable[..., socket.socket]
) -> socket.socket:
    """Returns a socket to the first of these addresses that accepts, with TLS where the URL is https.

    Raises FetchFailed, or ssl.SSLCertVerificationError. No address but the last may use up the time until
    `end` (monotonic): each gets its share. Wherever it leads, the certificate must be of the URL's name.
    """
    context = tls_context(ca_file) if parts.scheme == "https" else None
    trouble: Exception = OSError("no address")
    port = parts.port or DEFAULT_PORTS[parts.scheme]
    tried = addresses[:MAX_ADDRESSES]
    for number, address in enumerate(tried):
        left = len(tried) - number
        until = end if left == 1 else time.monotonic() + _time_left(end) / (left + 1)
        sock = None
        try:
            sock = connect((address, port), timeout=_time_left(until))
            sock.settimeout(_time_left(until))
            return context.wrap_socket(sock, server_hostname=parts.hostname) if context else sock
        except OSError as error:
            if sock:
                sock.close()
            # The server there is not the name's owner: no other address is tried.
            if isinstance(error, ssl.SSLCertVerificationError):
                raise
            trouble = error
    raise FetchFailed(plain_reason(trouble), away=True)


def _exchange(
    connection: http.client.HTTPConnection,
    method: str,
    parts: SplitResult,
    headers: Headers,
    body: bytes,
    cap: int,
    on_data: Callable[[], None] | None,
) -> Fetched:
    """Sends a request and returns the answer. Raises FetchFailed for one above `cap` bytes."""
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    ours = {
        "Host": parts.netloc,
        "User-Agent": f"fjmcp-broker/{__version__}",
        "Accept": "application/json",
        "Accept-Encoding": "identity",
        "Connection": "close",
    }
    connection.request(method, target, body or None, {**ours, **dict(headers)})
    response = connection.getresponse()
    data = response.read(1)
    if on_data:
        on_data()
    data += response.read(cap)
    if len(data) > cap:
        raise FetchFailed("the answer is too large")
    return Fetched(response.status, {name.lower(): value for name, value in response.getheaders()}, data)


def fetch(
    method: str,
    url: str,
    *,
    headers: Headers = (),
    body: bytes = b"",
    deadline: float = 15.0,
    cap: int = 262144,
    ca_file: str = "",
    addresses: Sequence[str] = (),
    connect: Callable[..., socket.socket] = socket.create_connection,
    on_data: Callable[[], None] | None = None,
) -> Fetched:
    """Returns the answer to one HTTP request, without proxies or redirects.

    It may take `deadline` seconds and have `cap` bytes. Raises FetchFailed. `addresses` are used instead of
    the name's; TLS and Host stay the name's. `on_data` is called when the body begins.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    end = time.monotonic() + deadline
    connection = http.client.HTTPConnection(host, parts.port)
    sock = None
    try:
        reached = list(addresses) or resolve_until(end, host, resolve_name, LOOKUPS)
        sock = open_socket(parts, reached, end, ca_file, connect)
        connection.sock = _Socket(sock, end, cap + MAX_ANSWER_HEAD)
        return _exchange(connection, method, parts, headers, body, cap, on_data)
    except (OSError, http.client.HTTPException, ValueError) as error:
        away = isinstance(error, (ConnectionError, TimeoutError))
        raise FetchFailed(plain_reason(error), away) from None
    finally:
        if sock:
            sock.close()


# An explicit list, because `is_global` lets NAT64, 6to4, site-local
# and multicast addresses through. Of IPv6 only 2000::/3 is in use.
# fmt: off
NOT_PUBLIC = tuple(map(ipaddress.ip_network, (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
    "224.0.0.0/3", "::/3", "4000::/2", "8000::/1", "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20",
)))
# fmt: on


def is_public(address: str) -> bool:
    """Returns whether an IP address, as text, is one of the public internet."""
    parsed = ipaddress.ip_address(address)
    return not any(parsed in network for network in NOT_PUBLIC)


class PublicWeb:
    """GETs URLs that strangers name: from the public internet only, on port 443, with strict limits.

    OWASP SSRF; security.md finding 9.
    """

    SECONDS = 5.0

    def __init__(
        self,
        resolve: Callable[[str], list[str]] = resolve_name,
        connect: Callable[..., socket.socket] = socket.create_connection,
        ca_file: str = "",
    ) -> None:
        self._resolve = resolve
        self._connect = connect
        self._ca_file = ca_file

    def get(self, url: str, cap: int) -> Fetched:
        """Returns an answer of at most `cap` bytes within 5 s, resolving included. Raises FetchFailed.

        One bad address among a name's refuses them all. Those that were checked are connected to, one after
        the other: a name that resolves anew may resolve otherwise (DNS rebinding).
        """
        end = time.monotonic() + self.SECONDS
        host = urlsplit(url).hostname or ""
        addresses = resolve_until(end, host, self._resolve, STRANGERS_LOOKUPS)
        if not all(map(is_public, addresses)):
            raise FetchFailed("the name is not of the public internet")
        return fetch(
            "GET",
            url,
            cap=cap,
            ca_file=self._ca_file,
            deadline=end - time.monotonic(),
            addresses=addresses,
            connect=self._connect,
        )


def with_query(url: str, parameters: Mapping[str, str]) -> str:
    """Returns a URL with these parameters added to those it has."""
    return url + ("&" if "?" in url else "?") + urlencode(parameters, quote_via=quote)


# ============================================================================================================
# Forgejo
# Owns what this broker asks of Forgejo and what the answers mean.
# Must not know the store, MCP clients' tokens, sessions or children.
# ============================================================================================================


class UpstreamDown(Exception):
    """Forgejo cannot be reached, or its answer means nothing: nothing is changed, and tried again later."""


class UpstreamRefused(Exception):
    """Forgejo refused the code, refresh token or access token: the user has to log in again."""


class UpstreamMisconfigured(Exception):
    """Forgejo refused this broker's client id or secret: the operator's fault, not the user's."""


class Suspended(Exception):
    """Forgejo lets this user do nothing: suspended, inactive, or with a password to change.

    The text is Forgejo's first sentence.
    """


class LoggedOut(Exception):
    """The user has no usable credential at Forgejo."""


class NotAllowed(Exception):
    """The user is not among those that may use this broker."""

    def __init__(self, sub: str, login: str, reason: str) -> None:
        super().__init__(reason)
        self.sub = sub
        self.login = login
        self.reason = reason


def jwt_claims(token: object) -> dict[str, object]:
    """Returns the claims of a JWT, unverified; {} for a text that is no JWT.

    Forgejo's came straight over TLS, a client's are checked later.
    """
    try:
        claims = read_json(unb64url(str(token).split(".")[1]))
    except (ValueError, IndexError):
        return {}
    return claims if isinstance(claims, dict) else {}


def is_token(text: str) -> bool:
    """Returns whether a text can stand in a header and an environment (RFC 6749 A.12), and be sealed."""
    return bool(re.fullmatch(r"[\x21-\x7e]{1,8192}", text))


def _number(claims: Mapping[str, object], name: str) -> int:
    """Returns a claim that counts something, 0 where there is none."""
    value = member(claims, name, int, 0)
    return value if 0 <= value < 2**62 else 0


def _token_life(answer: Mapping[str, object]) -> float:
    """Returns the lifetime of a token answer's access token in seconds; an hour where it does not say."""
    life: float = member(answer, "expires_in", int, 0) or member(answer, "expires_in", float, 0.0)
    said = member(answer, "expires_in", str, "")
    if re.fullmatch(r"[0-9]{1,9}", said):
        life = float(said)
    if not 0 < life < 366 * 86400:
        life = 3600.0
    claims = jwt_claims(answer.get("access_token"))
    expires = _number(claims, "exp")
    issued = _number(claims, "iat")
    # By the token's own clock, so that a skew does not matter.
    if expires and issued and 0 < expires - issued < life:
        return expires - issued
    return life


@dataclass(frozen=True)
class Credential:
    """Forgejo's tokens for a user.

    `grant` and `count` are its own numbers, by which newer is told from older; 0: unreadable.
    """

    access: str
    refresh: str
    expires_at: float
    obtained_at: float
    grant: int
    count: int
    subject: str | None
    login: str | None

    @classmethod
    def from_answer(cls, answer: Mapping[str, object], now: float, old_refresh: str = "") -> Credential:
        """Returns the credential in a token answer. Raises UpstreamDown when it is not one."""
        access = member(answer, "access_token", str, "")
        refresh = answer.get("refresh_token") or old_refresh
        token_type = str(answer.get("token_type")).lower()
        if (
            not isinstance(refresh, str)
            or token_type != "bearer"
            or not (is_token(access) and is_token(refresh))
        ):
            raise UpstreamDown("Forgejo's token answer is incomplete")
        claims = jwt_claims(refresh)
        identity = jwt_claims(member(answer, "id_token", str, ""))
        return cls(
            access,
            refresh,
            now + _token_life(answer),
            now,
            _number(claims, "gnt"),
            _number(claims, "cnt"),
            member(identity, "sub", str, None),
            member(identity, "preferred_username", str, None),
        )


@dataclass(frozen=True)
class UserInfo:
    """Who a token belongs to: the numeric id as text (stable over renames), login, display name, groups."""

    sub: str
    login: str
    name: str
    groups: tuple[str, ...]


@dataclass(frozen=True)
class Account:
    """An account as the API shows it: number (as text), login, and creation time (None: unreadable)."""

    sub: str
    login: str
    created: float | None

    @classmethod
    def from_answer(cls, value: Mapping[str, object] | None) -> Account | None:
        """Returns the account in an answer of the API, None when there is none in it."""
        number = member(value, "id", int, None)
        login = member(value, "login", str, None)
        if value is None or number is None or login is None:
            return None
        created = None
        with contextlib.suppress(ValueError, OverflowError, TypeError):
            # Forgejo writes it in its own time zone, which may change: the moment is what counts.
            moment = datetime.datetime.fromisoformat(str(value.get("created")))
            created = moment.timestamp() if moment.tzinfo and moment.year >= 1970 else None
        return cls(str(number), login, created)


class Forgejo:
    """What this broker asks of Forgejo (reference: Forgejo's OAuth2 provider)."""

    def __init__(self, settings: Settings, clock: SteadyClock, metrics: Metrics | None = None) -> None:
        self._settings = settings
        self._clock = clock
        self._metrics = metrics or Metrics()
        base = settings.forgejo_internal_url or settings.forgejo_url
        self._authorize = settings.forgejo_authorize_url or settings.forgejo_url + "/login/oauth/authorize"
        self._token = settings.forgejo_token_url or base + "/login/oauth/access_token"
        self._userinfo = settings.forgejo_userinfo_url or base + "/login/oauth/userinfo"
        self._introspection = settings.forgejo_introspection_url or base + "/login/oauth/introspect"
        self._api = base + "/api/v1"
        self._names = {
            self._token: "token",
            self._userinfo: "userinfo",
            self._introspection: "introspection",
            self._api + "/user": "user",
            self._api + "/version": "version",
        }

    def _fetch(
        self,
        method: str,
        url: str,
        form: Mapping[str, str] | None = None,
        authorization: str | None = None,
        deadline: float = 15.0,
    ) -> Fetched:
        headers = [("Authorization", authorization)] if authorization else []
        if form:
            headers.append(("Content-Type", "application/x-www-form-urlencoded"))
        began = time.monotonic()
        outcome = "failed"
        try:
            answer = fetch(
                method,
                url,
                ca_file=self._settings.forgejo_ca_file,
                body=urlencode(form or {}).encode(),
                headers=headers,
                deadline=deadline,
            )
            if answer.status < 500:
                outcome = "ok" if answer.status < 400 else "refused"
            return answer
        except FetchFailed as error:
            raise UpstreamDown(str(error)) from None
        finally:
            labels = (self._names.get(url, "users"), outcome)
            seconds = time.monotonic() - began
            self._metrics.observe("fjmcp_forgejo_request_duration_seconds", labels, seconds)

    def authorize_url(self, state: str, challenge: str) -> str:
        """Returns where the browser logs in.

        PKCE is sent but not relied on: older Forgejo drops the challenge.
        """
        query = {
            "response_type": "code",
            "client_id": self._settings.forgejo_oauth_client_id,
            "state": state,
            "redirect_uri": self._settings.public_url + "/oauth/callback",
            "scope": self._settings.forgejo_oauth_scopes,
            "code_challenge": challenge,
            "code_challenge_method": "S256",
        }
        return with_query(self._authorize, query)

    def _grant(self, form: Mapping[str, str], old_refresh: str = "") -> Credential:
        """Returns the Credential that the token endpoint gives for a form.

        Raises UpstreamMisconfigured where Forgejo does not accept this broker,
        UpstreamRefused where it does not accept the code or token (it says both
        with status 400, RFC 6749 5.2 with 401 too), UpstreamDown for all else.
        """
        form = {
            **form,
            "client_id": self._settings.forgejo_oauth_client_id,
            "client_secret": self._settings.forgejo_oauth_client_secret,
        }
        answer = self._fetch("POST", self._token, form)
        value = answer.json()
        if answer.status == 200 and value is not None:
            return Credential.from_answer(value, self._clock.now(), old_refresh)
        error = member(value, "error", str, "") if answer.status in (400, 401) else ""
        description = str(member(value, "error_description", object, None))[:200]
        if error == "invalid_client" or error == "unauthorized_client" and "client secret" in description:
            raise UpstreamMisconfigured(f"{error}: {description}")
        if error in ("invalid_grant", "unauthorized_client"):
            raise UpstreamRefused(f"{error}: {description}")
        raise UpstreamDown(f"the token endpoint answers {unexpected(answer)}")

    def exchange(self, code: str, verifier: str) -> Credential:
        """Returns the Credential for an authorization code. Raises as _grant does."""
        return self._grant(
            {
                "grant_type": "authorization_code",
                "code": code,
                "code_verifier": verifier,
                "redirect_uri": self._settings.public_url + "/oauth/callback",
            }
        )

    def refresh(self, refresh_token: str) -> Credential:
        """Returns the Credential for a refresh token, which is spent by this. Raises as _grant does."""
        return self._grant({"grant_type": "refresh_token", "refresh_token": refresh_token}, refresh_token)

    def probe(self) -> None:
        """Returns if the token endpoint answers as one does, raises UpstreamDown otherwise.

        No token is spent, no secret sent.
        """
        form = {
            "grant_type": "refresh_token",
            "client_id": self._settings.forgejo_oauth_client_id,
            "refresh_token": "probe",
        }
        answer = self._fetch("POST", self._token, form, deadline=4.0)
        value = answer.json()
        if value is None or "error" not in value or answer.status >= 500:
            raise UpstreamDown(f"the token endpoint answers {unexpected(answer)}")

    def userinfo(self, access: str) -> UserInfo:
        """Returns the owner of an access token. Raises UpstreamRefused or UpstreamDown."""
        answer = self._fetch("GET", self._userinfo, authorization=f"Bearer {access}")
        if answer.status == 401:
            raise UpstreamRefused("userinfo answers 401")
        value = answer.json() if answer.status == 200 else None
        if value is None:
            raise UpstreamDown(f"userinfo answers {unexpected(answer)}")
        sub = member(value, "sub", str, "")
        login = member(value, "preferred_username", str, "")
        if not re.fullmatch(r"[1-9][0-9]{0,18}", sub) or not (0 < len(login) < 256 and login.isprintable()):
            raise UpstreamDown("userinfo names nobody")
        groups = (group for group in member(value, "groups", list, []) if isinstance(group, str))
        return UserInfo(sub, login, member(value, "name", str, ""), tuple(groups))

    def account(self, access: str) -> Account | None:
        """Returns the account of an access token as /api/v1/user shows it, None where it cannot be read.

        The token needs the scope read:user. Raises Suspended.
        """
        try:
            answer = self._fetch("GET", self._api + "/user", authorization=f"token {access}")
        except UpstreamDown:
            return None
        if prohibition := _prohibition(answer, access):
            raise Suspended(prohibition)
        return Account.from_answer(answer.json()) if answer.status == 200 else None

    def named_account(self, login: str, token: str = "") -> Account | None:
        """Returns the account that Forgejo shows under a login to anybody, or to a token; None for none.

        Raises UpstreamRefused where it shows nobody, UpstreamDown for all else.
        """
        authorization = f"token {token}" if token else None
        url = f"{self._api}/users/{quote(login, safe='')}"
        answer = self._fetch("GET", url, authorization=authorization)
        if answer.status in (401, 403):
            raise UpstreamRefused(f"the API answers {unexpected(answer)}")
        if answer.status == 404 and answer.json() is not None:
            return None
        account = Account.from_answer(answer.json()) if answer.status == 200 else None
        if account is None:
            raise UpstreamDown(f"the API answers {unexpected(answer)}")
        return account

    def standing(self, access: str) -> str:
        """Asks the API about a token: returns `good`, `refused` (401) or `unknown`.

        Only the API sees suspension; /version needs no scope. Raises Suspended for a suspended, inactive or
        must-change-password user.
        """
        try:
            answer = self._fetch("GET", self._api + "/version", authorization=f"token {access}")
        except UpstreamDown:
            return "unknown"
        if prohibition := _prohibition(answer, access):
            raise Suspended(prohibition)
        if answer.json() is None:
            return "unknown"
        return {200: "good", 401: "refused"}.get(answer.status, "unknown")

    def introspect(self, token: str) -> str | None:
        """Returns the scopes that Forgejo really granted, None when it does not say.

        Raises UpstreamMisconfigured where it refuses this broker's id or secret, UpstreamDown for all else.
        """
        client = f"{self._settings.forgejo_oauth_client_id}:{self._settings.forgejo_oauth_client_secret}"
        basic = "Basic " + base64.b64encode(client.encode()).decode()
        answer = self._fetch("POST", self._introspection, {"token": token}, basic)
        if answer.status == 401:
            raise UpstreamMisconfigured("introspection answers 401: it refuses the client id or its secret")
        value = answer.json() if answer.status == 200 else None
        if value is None:
            raise UpstreamDown(f"introspection answers {unexpected(answer)}")
        return member(value, "scope", str, None) if value.get("active") is True else None


def unexpected(answer: Fetched) -> str:
    """Returns a description of an answer that is not Forgejo's: its status, type, and redirect."""
    target = answer.headers.get("location", "")
    if 300 <= answer.status < 400 and target:
        parts = urlsplit(target)
        return f"status {answer.status} to {parts.scheme}://{parts.netloc}{parts.path}"[:300]
    value = answer.json()
    if value is None:
        kind = answer.headers.get("content-type", "").partition(";")[0] or "no type"
        return f"status {answer.status} ({kind[:60]})"
    said = value.get("error") or value.get("message") or ""
    return f"status {answer.status} {str(said)[:200]}".strip()


def _prohibition(answer: Fetched, access: str) -> str:
    """Returns the first sentence of the 403 that a user gets who may not sign in, else "".

    A 403 that names a scope is about the token.
    """
    message = member(answer.json() if answer.status == 403 else None, "message", str, "")
    if not message.strip() or "scope" in message.lower():
        return ""
    first = re.split(r"(?<=[.!?])\s", message.strip().replace(access, "[token]"), maxsplit=1)[0]
    return "".join(character for character in first if character.isprintable())[:200]


def missing_scopes(asked: str, granted: str) -> list[str]:
    """Returns the scopes asked for that are not granted.

    write:x includes read:x, `all` includes every scope of the API.
    """
    has = set(granted.split())

    def granted_by(scope: str) -> bool:
        is_api_scope = ":" in scope
        return bool(has & {scope, scope.replace("read:", "write:")}) or is_api_scope and "all" in has

    return [scope for scope in asked.split() if not granted_by(scope)]


# ============================================================================================================
# Forgejo credentials
# Owns the one credential of each user at Forgejo, and whether that user may be here.
# Must not know MCP clients' tokens, sessions or children.
# ============================================================================================================


def same_person(user: UserRow, login: str, created: float | None) -> bool:
    """Returns whether a user's number at Forgejo still means the same person.

    Decided by the creation time of the account, else by the login. A Forgejo that was restored or made anew
    gives numbers again.
    """
    if created is not None and user.account_created is not None:
        return created == user.account_created
    return login.casefold() == user.login.casefold()


def allowed(settings: Settings, info: UserInfo) -> bool:
    """Returns whether a user may use this broker, by login or by group, both compared without case.

    Forgejo compares them without case, too.
    """
    if not settings.allowed_users and not settings.allowed_groups:
        return True
    users = {user.casefold() for user in settings.allowed_users}
    groups = {group.casefold() for group in settings.allowed_groups}
    return info.login.casefold() in users or any(group.casefold() in groups for group in info.groups)


REFRESH_LEASE = 17.0  # seconds; a refresh takes 15 at most
# Seconds for which another's expired lease is watched before it is taken: after an outage of the
# store its holder comes first, which may have a pair that it could not save.
LEASE_WATCH = 3.0
CALLBACK_LEASE = 80.0  # seconds; a callback asks Forgejo four things at most
LEASE_PATIENCE = REFRESH_LEASE + LEASE_WATCH + 5
LEASE_POLL = 0.1  # seconds between two looks at a lease that another holds
CALLBACKS = "callback "  # what the names of their leases begin with


@dataclass(frozen=True)
class Refused:
    """A refresh that Forgejo refused while callbacks were under way, here or at another broker.

    It counts if the user's credential is still the stored one once these have ended.
    """

    user: UserRow
    reason: str
    callbacks: frozenset[str]


@dataclass(frozen=True)
class Unsaved:
    """A pair that Forgejo gave and that is not stored yet: the older one is spent.

    `began` and `seq` are as in `Store.save_credential`.
    """

    credential: Credential
    began: int
    seq: int | None


class TroubleLog:
    """Logs Forgejo's failures, so that the log says why people cannot log in: once a minute for each kind."""

    def __init__(self, log: Log, clock: SteadyClock) -> None:
        self._log = log
        self._warned = Seldom(clock, 60.0)

    def warn(self, event: str, where: str, error: object, level: str = "warning", **fields: object) -> None:
        """Logs an event, at most once a minute for each event, place and kind of error."""
        if self._warned.due((event, where, type(error), *fields.values())):
            self._log.event(level, event, where=where, reason=str(error), **fields)

    def failure(self, where: str, error: Exception) -> None:
        """Logs that Forgejo cannot be asked, refuses a user's token or code, or refuses this broker."""
        if isinstance(error, UpstreamMisconfigured):
            self.warn("forgejo_refuses_client", where, error, "error")
        elif isinstance(error, UpstreamRefused):
            self.warn("forgejo_refused", where, error)
        else:
            self.warn("forgejo_cannot_be_asked", where, error)

    def missing_scopes(self, info: UserInfo, missing: Sequence[str]) -> None:
        """Logs which scopes a login lacks, and the remedy."""
        if missing:
            self.warn(
                "login_lacks_scopes",
                "login",
                "Forgejo keeps the scopes of the first login",
                user=info.sub,
                login=info.login,
                missing=" ".join(missing),
                remedy="remove the application in Forgejo's settings, then connect again",
            )


class Admission:
    """Ends what a user may do here, on file and in the audit log."""

    def __init__(
        self, store: Store, log: Log, clock: SteadyClock, person_ended: Callable[[str], None]
    ) -> None:
        self._store = store
        self._log = log
        self._clock = clock
        # Called with a number that has come to mean another person.
        self._person_ended = person_ended

    def claim(self, sub: str, login: str, created: float | None) -> None:
        """Ends all logins of a number that means another person than the one on file."""
        user = self._store.user(sub)
        if user and not same_person(user, login, created):
            self.end_person(user, login)

    def end_person(self, user: UserRow, login: str) -> None:
        """Ends all logins of a user whose number means another person now, with this login."""
        ended = self._store.end_person(user.sub, "identity changed", self._clock.now())
        self._log.audit("identity_changed", user=user.sub, was=user.login, login=login, grants=len(ended))
        self._person_ended(user.sub)

    def suspend(self, user: UserRow | None, sentence: str) -> None:
        """Notes that Forgejo keeps a user out, unless a login came meanwhile.

        Nothing is deleted: a suspension may be lifted.
        """
        if user and self._store.set_user_status(user.sub, "suspended", user.credential_seq, sentence):
            self._log.audit("suspended", user=user.sub, login=user.login, reason=sentence)

    def deny_access(self, sub: str, state: str, reason: str) -> None:
        """Ends the logins of a user who is not among the allowed ones."""
        if self._store.set_user_status(sub, state):
            self._log.audit("access_refused", user=sub, reason=reason)
        now = self._clock.now()
        for grant in self._store.grants_of(sub, now):
            self._store.end_grant(grant.grant_id, reason, now)


def still_the_same(
    admission: Admission, forgejo: Forgejo, user: UserRow, info: UserInfo, access: str
) -> bool:
    """Returns whether the token is still that person's: a restored Forgejo may give a grant's number again.

    If it is not, that person's logins end.
    """
    if info.sub != user.sub:
        admission.end_person(user, info.login)
        return False
    if info.login.casefold() != user.login.casefold():
        try:
            account = forgejo.account(access)
        except Suspended:
            return True
        if account and not same_person(user, info.login, account.created):
            admission.end_person(user, info.login)
            return False
    return True


class Wait(NamedTuple):
    """When a user's next refresh is due (monotonic), how long after the last, and how that one failed."""

    not_before: float
    seconds: float
    error: Exception


class RefreshWaits:
    """When a failed refresh is tried again: after 1 s, doubling to 60 s, or once Forgejo answers again."""

    PROBE_EVERY = 3.0  # with the probe's own 4 s, a Forgejo that answers again is known to within 10 s

    def __init__(self, forgejo: Forgejo, log: Log, clock: SteadyClock) -> None:
        self._forgejo = forgejo
        self._log = log
        self._clock = clock
        # Guards the two below; a leaf.
        self._lock = threading.Lock()
        self._waits: dict[str, Wait] = {}
        self._last_probe_failed = False
        self._probed = Seldom(clock, self.PROBE_EVERY)

    def check(self, sub: str) -> None:
        """Raises the last attempt's error while a user's next one is not due."""
        with self._lock:
            wait = self._waits.get(sub)
        if wait and self._clock.monotonic() < wait.not_before:
            raise anew(wait.error)

    def failed(self, sub: str, error: UpstreamDown | UpstreamMisconfigured) -> None:
        """Notes a failed attempt: the next one is due after twice the last wait."""
        with self._lock:
            last = self._waits.get(sub)
            seconds = min(60.0, last.seconds * 2) if last else 1.0
            self._waits[sub] = Wait(self._clock.monotonic() + seconds, seconds, anew(error))

    def forget(self, sub: str) -> None:
        """Ends a user's wait: there is another credential, or none."""
        with self._lock:
            self._waits.pop(sub, None)

    def probe_due(self) -> bool:
        """Returns whether to probe Forgejo now: refreshes wait, and the last probe is long enough ago."""
        now = self._clock.monotonic()
        with self._lock:
            is_waiting = any(wait.not_before > now for wait in self._waits.values())
        return is_waiting and self._probed.due("")

    def probe(self) -> None:
        """Ends every wait once the token endpoint answers again.

        Sessions so come back within 10 s, however long Forgejo was away.
        """
        try:
            self._forgejo.probe()
        except UpstreamDown:
            with self._lock:
                self._last_probe_failed = True
            return
        with self._lock:
            is_back = self._last_probe_failed
            self._last_probe_failed = False
            if is_back:
                self._waits.clear()
        if is_back:
            self._log.event("info", "forgejo_answers_again")


class Pairs:
    """What Forgejo gave, sealed on file.

    What cannot be saved stays in memory until it can be: the older pair is spent.
    """

    def __init__(self, store: Store, keyring: Keyring) -> None:
        self._store = store
        self._keyring = keyring
        self._lock = threading.Lock()  # guards the dict; a leaf
        self._unsaved: dict[str, Unsaved] = {}

    def opened(self, sub: str, states: tuple[str, ...] = ("active",)) -> tuple[UserRow, dict[str, str]]:
        """Returns a user's row and credential. Raises LoggedOut without one, or in another state."""
        user = self._store.user(sub)
        if user is None or user.status not in states or user.credential is None:
            raise LoggedOut(sub)
        try:
            return user, self._keyring.unseal("upstream", f"user:{sub}", user.credential)
        except ValueError:
            raise LoggedOut(sub) from None

    def save(self, sub: str, credential: Credential, began: int, seq: int | None) -> None:
        """Saves a known user's new pair. Raises StoreUnavailable."""
        unsaved = Unsaved(credential, began, seq)
        try:
            self._save(sub, unsaved)
        except StoreUnavailable:
            with self._lock:
                self._unsaved[sub] = unsaved
            raise

    def save_pending(self, sub: str) -> None:
        """Saves a pair that is in memory only, if there is one of this user. Raises StoreUnavailable."""
        with self._lock:
            unsaved = self._unsaved.get(sub)
        if unsaved:
            self._save(sub, unsaved)
            with self._lock:
                if self._unsaved.get(sub) is unsaved:
                    del self._unsaved[sub]

    def save_all_pending(self) -> None:
        """Saves every pair that is in memory only. Raises StoreUnavailable."""
        with self._lock:
            subs = list(self._unsaved)
        for sub in subs:
            self.save_pending(sub)

    def _save(self, sub: str, unsaved: Unsaved) -> None:
        pair = unsaved.credential
        box = self._keyring.seal("upstream", f"user:{sub}", {"access": pair.access, "refresh": pair.refresh})
        numbers = (pair.grant, pair.count, pair.expires_at, pair.obtained_at)
        self._store.save_credential(sub, box, *numbers, unsaved.began, unsaved.seq)


def callbacks_under_way(store: Store, clock: SteadyClock) -> frozenset[str]:
    """Returns the callbacks that are under way at any broker that lives."""
    now = clock.now()
    return frozenset(store.callbacks(now, now - Brokers.GONE))


@contextlib.contextmanager
def callback_lease(store: Store, clock: SteadyClock, name: str, patience: float) -> Iterator[bool]:
    """Holds the lease of a callback; yields False where another still does after `patience` seconds."""
    holder = f"{store.holder} {secrets.token_hex(4)}"
    is_ours = await_lease(store, clock, CALLBACKS + name, holder, patience)
    try:
        yield is_ours
    finally:
        if is_ours:
            with contextlib.suppress(StoreUnavailable):  # it ends by its time
                store.end_lease(CALLBACKS + name, holder)


class RefreshTurn:
    """The wait for the lease of a user's refresh, for `patience` seconds."""

    def __init__(self, store: Store, clock: SteadyClock, sub: str, patience: float) -> None:
        self._store = store
        self._clock = clock
        self._sub = sub
        self._deadline = time.monotonic() + patience
        self._expired_at: float | None = None

    def take(self, seq: int) -> bool:
        """Returns whether the lease is ours now, to spend the credential of that number."""
        now = self._clock.now()
        held = self._store.lease(f"user {self._sub}")
        if held is None or held.holder == self._store.holder:
            self._expired_at = -math.inf
        elif held.until > now:
            self._expired_at = None
        elif self._expired_at is None:
            self._expired_at = time.monotonic()
        if self._expired_at is None or time.monotonic() < self._expired_at + LEASE_WATCH:
            return False
        return self._store.begin_refresh(self._sub, seq, now, now + REFRESH_LEASE)

    def wait(self) -> None:
        """Waits a moment. Raises UpstreamDown when that was long enough."""
        if time.monotonic() >= self._deadline:
            raise UpstreamDown("another broker is refreshing this credential")
        time.sleep(LEASE_POLL)


def await_lease(store: Store, clock: SteadyClock, name: str, holder: str, patience: float) -> bool:
    """Takes a lease for CALLBACK_LEASE, once nobody holds it.

    Returns False where somebody still does after `patience` seconds.
    """
    deadline = time.monotonic() + patience
    while True:
        now = clock.now()
        held = store.lease(name)
        if held is None or held.until <= now:
            if store.take_lease(name, holder, now, now + CALLBACK_LEASE):
                return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(LEASE_POLL)


class ForgejoCredentials:
    """The one credential of each user at Forgejo, shared by all clients.

    One thread at a time refreshes it, and it is saved before it is used. Forgejo keeps one refresh token per
    user and application, and every exchange or refresh kills the older one.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        keyring: Keyring,
        forgejo: Forgejo,
        log: Log,
        clock: SteadyClock,
        person_ended: Callable[[str], None] = lambda sub: None,
    ) -> None:
        self._settings = settings
        self._store = store
        self._keyring = keyring
        self._forgejo = forgejo
        self._log = log
        self._clock = clock
        # Guards the two below; a leaf.
        self._lock = threading.Lock()
        # A user's lock allows one refresh at a time in this process, the user's lease one among all
        # brokers; the only lock held across the network, taken before any other.
        self._user_locks: dict[str, threading.Lock] = {}
        self._refused: dict[str, Refused] = {}
        self._pairs = Pairs(store, keyring)
        self.waits = RefreshWaits(forgejo, log, clock)
        self._trouble = TroubleLog(log, clock)
        self._admission = Admission(store, log, clock, person_ended)
        # Users of whom the API was asked, and whose token was refreshed because the API refused it.
        self._asked = Seldom(clock, 60.0)
        self._forced = Seldom(clock, 600.0)

    def _user_lock(self, sub: str) -> threading.Lock:
        with self._lock:
            return self._user_locks.setdefault(sub, threading.Lock())

    # -- logins

    @contextlib.contextmanager
    def callback(self, name: str = "", patience: float = 0.0) -> Iterator[bool]:
        """Lasts while a login is exchanged: a refusal meanwhile may be that of the replaced token.

        One of a name at a time, over all brokers: yields whether its turn came within `patience` seconds.
        """
        try:
            with callback_lease(self._store, self._clock, name or secrets.token_hex(8), patience) as is_ours:
                yield is_ours
        finally:
            with contextlib.suppress(StoreUnavailable):
                self.settle()

    def settle(self) -> None:
        """Saves results that could not be saved before, and believes refusals whose callbacks have ended.

        Raises StoreUnavailable.
        """
        self._pairs.save_all_pending()
        with self._lock:
            refused = list(self._refused.values())
        running = callbacks_under_way(self._store, self._clock) if refused else frozenset()
        for each in refused:
            if not each.callbacks & running:
                with self._lock:
                    if self._refused.get(each.user.sub) is each:
                        del self._refused[each.user.sub]
                # Without the store the next refresh is refused again.
                self._logged_out(each.user, each.reason)

    def login(self, code: str, verifier: str) -> UserInfo:
        """Exchanges a callback's code and returns the user who logged in.

        Raises NotAllowed, UpstreamRefused, UpstreamMisconfigured or UpstreamDown. The exchange has killed the
        user's older refresh token, so its credential is saved as soon as it is known whose it is, whatever
        becomes of the login.
        """
        try:
            return self._login(code, verifier)
        except (UpstreamDown, UpstreamRefused, UpstreamMisconfigured) as error:
            self._trouble.failure("login", error)
            raise

    def _login(self, code: str, verifier: str) -> UserInfo:
        began = self._store.credential_order()
        credential = self._forgejo.exchange(code, verifier)
        info, created = self._identify(credential, began)
        known = self._store.user(info.sub) is not None
        if known:
            self._admission.claim(info.sub, info.login, created)
            self._save(info.sub, credential, began)
        if not allowed(self._settings, info):
            self._admission.deny_access(info.sub, "refused", "not among the allowed users and groups")
            raise NotAllowed(info.sub, info.login, "This account may not use this server")
        scope = self._granted(credential.access)
        asked = self._settings.forgejo_oauth_scopes
        if self._settings.strict_scopes and scope is not None and set(scope.split()) != set(asked.split()):
            raise NotAllowed(info.sub, info.login, "Forgejo granted other scopes than were asked")
        self._store.update_user(info.sub, info.login, info.name, info.groups, self._clock.now(), created)
        if not known:
            self._save(info.sub, credential, began)
        self._store.set_upstream_scope(info.sub, scope)
        self._store.set_user_status(info.sub, "active")
        if scope is not None:
            self._trouble.missing_scopes(info, missing_scopes(asked, scope))
        return info

    def _identify(self, credential: Credential, began: int) -> tuple[UserInfo, float | None]:
        """Returns a new credential's owner, and when that account was made (None: unreadable).

        Raises NotAllowed for a suspended user, UpstreamRefused or UpstreamDown where Forgejo does not say; a
        known user's credential is saved before that.
        """
        try:
            account = self._forgejo.account(credential.access)
        except Suspended as error:
            raise self._turned_away(credential, began, str(error)) from None
        try:
            info = self._forgejo.userinfo(credential.access)
        except (UpstreamDown, UpstreamRefused):
            self._save_for_known(credential, account, began)
            raise
        named = {name for name in (credential.subject, account and account.sub) if name}
        if named - {info.sub}:
            raise UpstreamDown("userinfo, the API and id_token name different users")
        return info, account.created if account else None

    def _turned_away(self, credential: Credential, began: int, sentence: str) -> NotAllowed:
        """Returns the refusal of a suspended user's login; the credential is kept for when that ends."""
        info = self._forgejo.userinfo(credential.access)
        user = self._store.user(info.sub)
        if user and same_person(user, info.login, None):
            self._save(info.sub, credential, began)
            self._admission.suspend(self._store.user(info.sub), sentence)
        return NotAllowed(info.sub, info.login, f"Forgejo says: {sentence}")

    def _save_for_known(self, credential: Credential, account: Account | None, began: int) -> None:
        """Saves a login's credential when userinfo fails but the API or the id_token name its user."""
        sub = account.sub if account else credential.subject
        login = account.login if account else credential.login
        user = self._store.user(sub) if isinstance(sub, str) else None
        if user and isinstance(login, str) and same_person(user, login, account.created if account else None):
            self._save(user.sub, credential, began)

    def _granted(self, access: str) -> str | None:
        """Returns the scopes that Forgejo granted, None when it does not say: the login goes on."""
        try:
            return self._forgejo.introspect(access)
        except (UpstreamDown, UpstreamMisconfigured) as error:
            self._trouble.failure("introspection", error)
            return None

    # -- the stored credential

    def _save(self, sub: str, credential: Credential, began: int, seq: int | None = None) -> None:
        self.waits.forget(sub)
        self._pairs.save(sub, credential, began, seq)

    def _left(self, user: UserRow | AgeRow) -> tuple[float, float]:
        return user.access_expires_at - self._clock.now(), user.access_expires_at - user.obtained_at

    def ages(self, subs: Iterable[str]) -> dict[str, tuple[int, bool]]:
        """Returns {sub: (number of the credential, whether to refresh it now)} of those who are logged in."""
        found = {}
        for sub, row in self._store.credential_ages(subs).items():
            left, life = self._left(row)
            found[sub] = row.credential_seq, left < min(300, life / 4)
        return found

    def credential(self, sub: str) -> tuple[str, int, float]:
        """Returns (access token, sequence number, time to ask again) for a request.

        Raises LoggedOut, UpstreamDown or UpstreamMisconfigured.
        """
        user, box = self._pairs.opened(sub)
        left, life = self._left(user)
        if left < min(60, life / 8):
            try:
                # Nobody waits long for another broker's refresh while the token is still good.
                self.refresh(sub, user.credential_seq, 2.0 if left > 5 else LEASE_PATIENCE)
            except (UpstreamDown, UpstreamMisconfigured):
                if left <= 0:
                    raise
            user, box = self._pairs.opened(sub)
            _, life = self._left(user)
        return box["access"], user.credential_seq, user.access_expires_at - min(60, life / 8)

    def refresh(self, sub: str, seen: int | None = None, patience: float = LEASE_PATIENCE) -> bool:
        """Refreshes a user's credential: one thread of one broker at a time.

        Returns False when another thread, broker or login already did since `seen`; another broker is waited
        for as long as `patience`. Raises LoggedOut, UpstreamDown or UpstreamMisconfigured.
        """
        if seen is None:
            seen = getattr(self._store.user(sub), "credential_seq", None)
        with self._user_lock(sub):
            self._pairs.save_pending(sub)
            turn = self._begin_refresh(sub, seen, patience)
            if turn is None:
                return False
            user, box, began = turn
            try:
                credential = self._forgejo.refresh(box["refresh"])
            except UpstreamRefused as error:
                return self._refresh_refused(user, str(error))
            except (UpstreamDown, UpstreamMisconfigured) as error:
                self._trouble.failure("refresh", error)
                self.waits.failed(sub, error)
                with contextlib.suppress(StoreUnavailable):  # it ends by its time
                    self._store.end_lease(f"user {sub}", self._store.holder)
                raise
            self._save(sub, credential, began, user.credential_seq)
            self._log.event("info", "upstream_refreshed", user=sub)
        self._check_again(user, credential.access)
        return True

    def _begin_refresh(
        self, sub: str, seen: int | None, patience: float
    ) -> tuple[UserRow, dict[str, str], int] | None:
        """Takes the lease of a user's refresh.

        Returns the user, the pair and credential_order(); None when there is a newer pair. Raises
        LoggedOut, and UpstreamDown while the lease is not to be had.
        """
        turn = RefreshTurn(self._store, self._clock, sub, patience)
        while True:
            user, box = self._pairs.opened(sub, ("active", "suspended"))
            if user.credential_seq != seen:
                return None
            self._check_turn(user)
            began = self._store.credential_order()
            if turn.take(user.credential_seq):
                return user, box, began
            turn.wait()

    def _check_turn(self, user: UserRow) -> None:
        """Raises UpstreamDown while the next attempt is not due, or callbacks decide about a refusal."""
        with self._lock:
            refused = self._refused.get(user.sub)
        if refused and refused.user.credential_seq == user.credential_seq:
            raise UpstreamDown("a login may be replacing this credential")
        self.waits.check(user.sub)

    def _refresh_refused(self, user: UserRow, reason: str) -> bool:
        """Believes a refusal if no login is under way that may have caused it, and no login came first.

        Returns False if one did. Raises LoggedOut, or UpstreamDown
        until the callbacks that are under way now have ended.
        """
        self._store.end_lease(f"user {user.sub}", self._store.holder)
        callbacks = callbacks_under_way(self._store, self._clock)
        if callbacks:
            with self._lock:
                self._refused[user.sub] = Refused(user, reason, callbacks)
            undecided = UpstreamDown("a login may be replacing this credential")
            self.waits.failed(user.sub, undecided)
            raise undecided
        if not self._logged_out(user, reason):
            return False
        raise LoggedOut(user.sub)

    def _logged_out(self, user: UserRow, reason: str) -> bool:
        """Notes that a user has to log in again, unless another credential is stored than the one refused.

        Returns whether it did.
        """
        if not self._store.set_user_status(user.sub, "logged_out", user.credential_seq):
            return False
        self.waits.forget(user.sub)
        # A crash of ours may have lost the answer.
        interrupted = user.refreshing_since is not None
        self._log.audit("logged_out_upstream", user=user.sub, reason=reason, interrupted=interrupted)
        return True

    # -- may this user be here

    def _check_again(self, user: UserRow, access: str) -> None:
        """Checks after each refresh: the same person's token, allowed here, not suspended; and acts on it."""
        sub = user.sub
        try:
            info = self._forgejo.userinfo(access)
        except (UpstreamDown, UpstreamRefused) as error:
            self._trouble.failure("userinfo", error)
        else:
            if not still_the_same(self._admission, self._forgejo, user, info, access):
                return
            if not allowed(self._settings, info):
                self._admission.deny_access(sub, "refused", "no longer among the allowed users and groups")
                return
            self._store.update_user(sub, info.login, info.name, info.groups, self._clock.now())
        self._asked.due(sub)
        self._judge(sub, access)

    def _judge(self, sub: str, access: str) -> str:
        """Asks the API about a user's token and acts on it.

        Returns `good`, `refused`, `unknown` or `suspended`.
        """
        user = self._store.user(sub)
        try:
            word = self._forgejo.standing(access)
        except Suspended as error:
            self._admission.suspend(user, str(error))
            return "suspended"
        if word == "good" and user and user.status == "suspended":
            if self._store.set_user_status(sub, "active", user.credential_seq):
                self._log.event("info", "suspension_ended", user=sub, login=user.login)
        return word

    def may_ask(self, sub: str) -> bool:
        """Returns whether the API may be asked (again) about a user's token: at most once a minute.

        It counts as asked.
        """
        return self._asked.due(sub)

    def examine(self, sub: str) -> str:
        """Asks Forgejo about a user's token.

        Returns `good`, `refused`, `suspended`, `logged out`,
        `misconfigured` (Forgejo refuses this broker) or `unknown`.

        A 401 says only that this access token is no good: a refresh decides, at most once in ten minutes.
        """
        try:
            user, box = self._pairs.opened(sub, ("active", "suspended"))
            if self._left(user)[0] <= 0 and self.refresh(sub, user.credential_seq):
                user, box = self._pairs.opened(sub, ("active", "suspended"))
            word = self._judge(sub, box["access"])
            if word == "refused" and self._forced.due(sub):
                self.refresh(sub, user.credential_seq)
        except LoggedOut:
            return "logged out"
        except UpstreamMisconfigured:
            return "misconfigured"
        except UpstreamDown:
            return "unknown"
        return word

    def readmitted(self, sub: str) -> bool:
        """Returns whether a suspended user is let in again; asks Forgejo at most once a minute."""
        if not self.may_ask(sub):
            return False
        self.examine(sub)
        return getattr(self._store.user(sub), "status", None) == "active"


# ============================================================================================================
# Pages
# Owns all HTML: what people see. Plain functions from values
# to Response; templates escape every value they take in.
# Must not know what a decision leads to.
# ============================================================================================================


class Html(str):
    """Text that is HTML already. Any other value is escaped where a template takes it in."""

    __slots__ = ()


# As html.escape(), whose module costs 0.4 MiB for a table of entities.
ESCAPES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#x27;"})


class EscapingFormatter(string.Formatter):
    """str.format() with one difference: a value that is not Html is escaped."""

    def format_field(self, value: object, format_spec: str) -> str:
        """Returns the text of one field of a template."""
        text = format(value, format_spec)
        return text if isinstance(value, Html) else text.translate(ESCAPES)


def fill(template: str, **values: object) -> Html:
    """Returns a template with its fields filled in; every value that is not Html is escaped."""
    return Html(EscapingFormatter().format(template, **values))


def fill_each(template: str, values: Iterable[object], **others: object) -> Html:
    """Returns the template once for each value, which it names `item`; `others` are the same in all."""
    return Html("".join(fill(template, item=value, **others) for value in values))


NO_HTML = Html("")

# --edge is the border of what can be operated: at least 3:1 to what surrounds it (WCAG 2.2, 1.4.11).
STYLE = """
:root{color-scheme:light dark;--ink:#1d2125;--quiet:#59636e;--paper:#fff;--back:#f3f4f6;--line:#d5d9de;
 --edge:#737c86;--accent:#9a3b12;--on:#fff;--warn:#fff4e0}
@media(prefers-color-scheme:dark){:root{--ink:#eceef0;--quiet:#a9b1ba;--paper:#1c2024;--back:#121417;
 --line:#3a4047;--edge:#858f99;--accent:#f29a66;--on:#201006;--warn:#33270f}}
*{box-sizing:border-box}
html{scroll-padding-bottom:6rem}
body{margin:0;background:var(--back);color:var(--ink);font:1rem/1.5 system-ui,sans-serif}
main{--around:var(--back);max-width:38rem;margin:0 auto;padding:1rem;overflow-wrap:anywhere}
@media(min-width:40.1rem){main{--around:var(--paper);margin:2rem auto;padding:1.75rem 2rem;
 background:var(--paper);border:1px solid var(--line);border-radius:.75rem}}
a{color:var(--accent)}
h1{font-size:1.4rem;line-height:1.25;margin:0 0 .8rem}
h2{font-size:1.05rem;margin:1.5rem 0 .5rem}
p{margin:.5rem 0}
ul{margin:.3rem 0;padding-left:1.2rem}
li{margin:.2rem 0}
code{font:.9em ui-monospace,monospace}
dt{font-weight:600;margin-top:.8rem}
dd{margin:.1rem 0 0}
summary{cursor:pointer;padding:.6rem 0}
.box{border:1px solid var(--line);border-radius:.5rem;padding:.5rem 1rem;margin:.8rem 0}
.warn{background:var(--warn)}
.quiet{color:var(--quiet);font-size:.92rem}
.big{font-size:1.1rem;font-weight:600}
fieldset{border:0;margin:1rem 0 0;padding:0}
legend{font-weight:600;padding:0}
.choice{border:1px solid var(--edge);border-radius:.5rem;margin:.6rem 0;padding:.1rem 1rem .5rem}
.choice:has(:checked){border-color:var(--accent);box-shadow:inset 0 0 0 1px var(--accent)}
.choice ul{padding-left:2.9rem}
.choice p{padding-left:1.8rem;margin:.2rem 0}
label{display:block;padding:.5rem 0 .2rem 1.8rem;text-indent:-1.8rem;cursor:pointer}
input{width:1.1rem;height:1.1rem;margin:0 .6rem 0 0;vertical-align:-.15rem;accent-color:var(--accent)}
button{flex:1 1 8rem;min-height:2.9rem;padding:.3rem 1rem;font:inherit;font-weight:600;border-radius:.5rem;
 border:1px solid var(--edge);background:transparent;color:inherit;cursor:pointer}
button.main{background:var(--accent);border-color:var(--accent);color:var(--on)}
:focus-visible{outline:3px solid var(--accent);outline-offset:2px}
.row{display:flex;gap:.75rem;flex-wrap:wrap;margin-top:1rem}
@media(max-width:40rem){.reach{position:sticky;bottom:0;padding:.6rem 0;background:var(--around);
 border-top:1px solid var(--line)}}
.apps{list-style:none;padding:0}
.apps>li{border-top:1px solid var(--line);padding:.5rem 0;margin:0}
.line{display:flex;gap:.2rem 1rem;flex-wrap:wrap;align-items:center;margin:0}
.line>div{flex:1 1 14rem;min-width:0}
.line button{flex:0 0 auto}
li.line{margin:.4rem 0}
"""
STYLE_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
# No form-action: Chromium applies it to the whole redirect
# chain behind a form, down to the client's callback.
CONTENT_POLICY = (
    f"default-src 'none'; style-src 'sha256-{STYLE_HASH}'; base-uri 'none'; frame-ancestors 'none'"
)

PAGE_TEMPLATE = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="robots" content="noindex">
<title>{title}</title><style>{style}</style></head><body><main><h1>{title}</h1>{body}</main></body></html>"""


def page(status: int, title: str, body: Html, *, form: bool = False, headers: Headers = ()) -> Response:
    """Returns a whole page. `form`: it has a form, so its Referrer-Policy lets the browser send Origin."""
    return Response(
        status,
        fill(PAGE_TEMPLATE, title=title, style=Html(STYLE), body=body).encode(),
        "text/html; charset=utf-8",
        (
            ("Content-Security-Policy", CONTENT_POLICY),
            ("X-Frame-Options", "DENY"),
            ("Cache-Control", "no-store"),
            ("Referrer-Policy", "same-origin" if form else "no-referrer"),
            *headers,
        ),
    )


def moment(seconds: float) -> str:
    """Returns a time for people."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def duration_in_words(seconds: float) -> str:
    """Returns a duration for people, in the largest unit of which it has at least two."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def clean_name(text: object, limit: int = 100) -> str:
    """Returns a client's name (any JSON value) for people: one line without control or formatting characters.

    "…" stands where it was cut.
    """
    kept = "".join(
        " " if unicodedata.category(c) in ("Zl", "Zp", "Zs") or c in "\t\r\n" else c
        for c in (text if isinstance(text, str) else "")
        if c in "\t\r\n" or unicodedata.category(c) not in ("Cc", "Cf", "Co", "Cs", "Cn")
    )
    name = " ".join(kept.split())
    if len(name) > limit:
        name = name[: limit - 1].rstrip() + "…"
    return name or "An application without a name"


def destination(redirect_uri: str) -> str:
    """Returns where an answer goes, for people: the host of a website, or that it stays on this device."""
    parts = urlsplit(redirect_uri)
    if is_loopback_name(parts.hostname):
        return "an application on this device"
    if parts.scheme == "https":
        return parts.hostname or ""
    return f"the application on this device that opens {parts.scheme}: links"


# -- errors


class ErrorText(NamedTuple):
    """What an error page says: its status and title, one or two sentences, and what to do, a line each."""

    status: int
    title: str
    sentence: str
    advice: tuple[str, ...] = ()


START_AGAIN = "Start again from your application."
REGISTER_AGAIN = (
    "Claude.ai, Claude Desktop: remove the connector and add it again.",
    "Claude Code: /mcp, choose this server, clear its authentication, then authenticate.",
    "ChatGPT: delete the connector and create it again.",
    "VS Code: run the command “Authentication: Remove Dynamic Authentication Providers”.",
    "Cursor: remove the server in the settings and add it again.",
    "mcp-remote: delete the folder ~/.mcp-auth.",
    "Others: remove the server and add it again.",
)
# fmt: off
ERROR_PAGES = {  # the reason, one word for the log: what the person reads
    "unknown_client": ErrorText(400, "This application is not registered here",
        "Its registration was removed, or belongs to another server. Let the application register again:",
        REGISTER_AGAIN),
    "unreadable_client": ErrorText(400, "This application cannot be looked up",
        "The address by which it introduces itself could not be read just now, or what stands there does "
        "not describe it. Try again in a minute; if that does not help, ask who makes the application."),
    "expired": ErrorText(400, "This login has expired",
        f"It took too long, or was finished already. {START_AGAIN}"),
    "answered": ErrorText(400, "This was answered already",
        "The answer was another one, and it stands. If your application is still waiting, "
        "start again from it."),
    "wrong_browser": ErrorText(403, "This login began in another browser",
        "For your safety it cannot go on here. If you started it yourself, "
        "start again from your application, allow cookies for this site, and stay in one browser. "
        "If somebody sent you this link, close it."),
    "malformed": ErrorText(400, "This request cannot be read",
        f"Its parameters are malformed. {START_AGAIN}"),
    "malformed_answer": ErrorText(400, "This answer cannot be used",
        f"Forgejo's answer is malformed. {START_AGAIN}"),
    "repeated": ErrorText(400, "This request cannot be trusted",
        f"It names client_id or redirect_uri more than once. {START_AGAIN}"),
    "redirect_uri": ErrorText(400, "This request cannot be trusted",
        "It wants the answer sent to an address (redirect_uri) that the application has not registered. "
        "Remove the connection in your application and add it again."),
    "undecided": ErrorText(400, "Nothing was decided",
        "The form came without a choice. Go back and choose again."),
    "foreign_form": ErrorText(403, "This form came from elsewhere",
        f"Another website sent it. {START_AGAIN}"),
    "two_cookies": ErrorText(400, "This browser's cookies cannot be trusted",
        "Clear the cookies of this site and start again."),
    "not_logged_in": ErrorText(403, "You are not logged in", "",
        ("Go to your applications and log in again.",)),
}
REFUSAL_PAGES = {  # status: (title, what to do); what happened is the refusal's own sentence
    404: ("There is no such page", "Check the address. What you can do here begins at the home page."),
    421: ("This server has another name", "Open the address that your operator gave you."),
    429: ("Too many requests", "Wait a minute, then load this page again."),
    503: ("Not available just now",
        "Wait a minute, then load this page again. If your application waits, start again from it."),
}
# fmt: on
ERROR_BODY = """<p>{sentence}</p>{advice}<p class="quiet">{request}<a href="/">Home page of this server</a> ·
<a href="/account">Your applications</a></p>"""
REQUEST_ID = """If you ask the operator for help, name the request <code>{item}</code>.<br>"""


def error_page(text: ErrorText, request_id: str, headers: Headers = ()) -> Response:
    """Returns the page that says what failed, what to do, and the id under which it is in the log."""
    advice = NO_HTML
    if text.advice:
        advice = fill("<ul>{items}</ul>", items=fill_each("<li>{item}</li>", text.advice))
    body = fill(ERROR_BODY, sentence=text.sentence, advice=advice, request=fill(REQUEST_ID, item=request_id))
    return page(text.status, text.title, body, headers=headers)


def refusal_page(error: HTTPError, request_id: str) -> Response:
    """Returns an HTTPError as a page, for people."""
    title, advice = REFUSAL_PAGES.get(error.status, ("This did not work", ""))
    text = ErrorText(error.status, title, error.description, (advice,) if advice else ())
    return error_page(text, request_id, error.headers)


class ErrorPage(Exception):
    """An error shown to a person: one of ERROR_PAGES, with its own sentence where `sentence` is given.

    Nothing is redirected to a URI that was not validated.
    """

    def __init__(self, reason: str, sentence: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        text = ERROR_PAGES[reason]
        self.text = text._replace(sentence=sentence) if sentence else text

    def response(self, request_id: str) -> Response:
        """Returns the page, which shows the request's id."""
        return error_page(self.text, request_id)


def connected_page() -> Response:
    """Returns the answer to a login that was finished before: it is no error."""
    body = """<p>This login was finished, and the application has taken its answer. You can close this page.
If the application still waits, start again from it.</p>
<p><a href="/account">See and end what you have connected</a>.</p>"""
    return page(200, "Your application is connected", Html(body))


# -- consent

SCOPE_MEANINGS = {
    "repository": "your repositories and their contents",
    "issue": "issues and pull requests",
    "notification": "your notifications",
    "organization": "your organizations and teams",
    "user": "your profile and account settings",
    "package": "packages",
    "misc": "general information about the server",
    "activitypub": "federation",
    "admin": "administration of the whole server",
}


def rights_in_words(scopes: str, *, may_write: bool) -> list[str]:
    """Returns the rights of Forgejo's scopes in plain words, a line each.

    First what can be changed (if `may_write`), then what can be seen. Scopes that only say who somebody is
    (openid, profile) allow nothing and are left out.
    """
    if "all" in scopes.split():
        return ["see and change all that you can"] if may_write else ["see all that you can see"]
    changed: list[str] = []
    seen: list[str] = []
    for scope in scopes.split():
        level, colon, area = scope.partition(":")
        if colon:
            areas = changed if may_write and level == "write" else seen
            areas.append(SCOPE_MEANINGS.get(area, area))
    rights = [f"see and change {area}" for area in changed]
    rights += [f"see {area}" for area in seen if area not in changed]
    return list(dict.fromkeys(rights))


@dataclass(frozen=True)
class ConsentQuestion:
    """What the consent page asks and tells.

    `client_host`: where the client's own description stands, if it has one; `unconfirmed_since`: since when
    that could not be read. `account`: the address of the account page. `lifetime`: seconds without use after
    which the access ends. `login_box`, `csrf`: what the form carries.
    """

    client_name: str
    client_id: str
    client_host: str | None
    unconfirmed_since: float | None
    redirect_uri: str
    may_write: bool
    forgejo_scopes: str
    forgejo_url: str
    account: str
    lifetime: float
    login_box: str
    csrf: str


# Enter presses the first submit button of a form: none where that is disabled (HTML
# 4.10.21.2), the first that is not disabled in Chromium. So the first is disabled,
# and the second submits to a dialog that is not there, which does nothing.
CONSENT_TEMPLATE = """
<div class="box">
<p><bdi class="big">{q.client_name}</bdi> wants to use <span class="big">{host}</span> as you.</p>
<p class="quiet">{known}</p>
<p>The answer goes to <strong>{where}</strong><br><code class="quiet">{q.redirect_uri}</code></p>{local}</div>
<p class="box warn">Go on only if you started this yourself, just now, in an application you trust.</p>
<form method="post" action="/oauth/consent"><button type="submit" hidden disabled></button>
<button type="submit" hidden formmethod="dialog" formnovalidate></button>
<input type="hidden" name="login" value="{q.login_box}"><input type="hidden" name="csrf" value="{q.csrf}">
<fieldset><legend>What may it do?</legend>{choices}</fieldset>
<p>You connect the account that is signed in at {host} in this browser; if none is, you sign in there next.
The access lasts until you end it at <code>{q.account}</code>,
or until it has not been used for {lifetime}.</p>
<div class="row reach"><button name="decision" value="deny" formnovalidate>Refuse</button>
<button class="main" name="decision" value="approve">Allow</button></div>
</form><p class="quiet">To connect another account, first
<a href="{q.forgejo_url}" target="_blank" rel="noopener">sign out at {host}</a> (opens a new page),
then come back here. Application id: <code>{q.client_id}</code></p>"""
CHOICE_TEMPLATE = """<div class="choice"><label>
<input type="radio" name="access" value="{value}" required{checked}
 aria-describedby="{value}-rights"><strong>{title}</strong>: {summary}</label>
<div id="{value}-rights"><ul>{rights}</ul>{note}</div></div>"""
LOCAL_APPLICATION = Html(
    "<p>Any program on this device can ask in an application's name: "
    "make sure that it is the one you started.</p>"
)
READ_ONLY_NOTE = """<p class="quiet">This server enforces that, tool by tool;
the key it keeps for you at {item} could do more.</p>"""


def who_asks(question: ConsentQuestion) -> str:
    """Returns how far the client's name can be believed."""
    if not question.client_host:
        return "The application calls itself that; the name is not verified."
    known = f"The application calls itself that in its description at {question.client_host}."
    if question.unconfirmed_since:
        known += (
            " That address does not answer: "
            f"the description is unconfirmed since {moment(question.unconfirmed_since)}."
        )
    return known


def consent_choices(question: ConsentQuestion, host: str) -> Html:
    """Returns the consent form's choices, each with its rights; a single choice is chosen already."""

    def choice(value: str, title: str, summary: str, note: Html) -> Html:
        rights = rights_in_words(question.forgejo_scopes, may_write=value == "full")
        return fill(
            CHOICE_TEMPLATE,
            value=value,
            title=title,
            summary=summary,
            checked=Html("" if question.may_write else " checked"),
            rights=fill_each("<li>{item}</li>", rights),
            note=note,
        )

    read_note = fill(READ_ONLY_NOTE, item=host)
    read_only = choice("read", "Read only", "use only tools that look things up", read_note)
    if not question.may_write:
        return read_only
    full = choice("full", "Full access", "use every tool, also those that change things", NO_HTML)
    return Html(full + read_only)


def consent_page(question: ConsentQuestion, headers: Headers = ()) -> Response:
    """Returns the consent page: it names the client, where the answer goes, and the rights asked for."""
    host = urlsplit(question.forgejo_url).netloc
    is_website = urlsplit(question.redirect_uri).scheme == "https"
    body = fill(
        CONSENT_TEMPLATE,
        q=question,
        host=host,
        known=who_asks(question),
        where=destination(question.redirect_uri),
        local=NO_HTML if is_website else LOCAL_APPLICATION,
        choices=consent_choices(question, host),
        lifetime=duration_in_words(question.lifetime),
    )
    return page(200, "Connect an application?", body, form=True, headers=headers)


# -- account

ACCOUNT_LOGIN_TEMPLATE = """<p>Here you see which applications may use {host} as you, and can end that.</p>
<form method="post" action="/account/login"><input type="hidden" name="csrf" value="{csrf}">
<div class="row"><button class="main">Log in at {host}</button></div></form>"""
MISSING_RIGHTS = """<p role="note" class="box warn"><strong>Some tools will not work.</strong>
At Forgejo this server has not got these rights: <code>{missing}</code>.
Forgejo keeps what was agreed to at the first login. To change that, remove this server from
<a href="{settings}">the authorized applications in Forgejo's settings</a>, then connect again.</p>"""
ACCOUNT_TEMPLATE = """<p>You are <strong>{login}</strong> at {host}.</p>{notes}<h2>Connected applications</h2>
<form method="post" action="/account/end"><input type="hidden" name="csrf" value="{csrf}">{applications}
<div class="row">{all}<button name="leave" value="1">Log out of this page</button></div></form>
<p class="quiet"><a href="/">How to connect an application</a></p>"""
APPLICATION_TEMPLATE = """<li><div class="line"><div><strong><bdi>{item.name}</bdi></strong>
<span class="quiet">{access}, answers go to {item.destinations}, last used {used}</span></div>
<button name="client" value="{item.client_id}" aria-label="Disconnect {item.name}">Disconnect</button></div>
{sessions}</li>"""
SESSIONS_TEMPLATE = (
    """<details><summary class="quiet">{count} open {noun}</summary><ul>{items}</ul></details>"""
)
SESSION_TEMPLATE = """<li class="line"><div class="quiet">since {began}, last used {used}</div>
<button name="session" value="{item.key}"
 aria-label="End the session of {name} since {began}">End session</button></li>"""
NOTHING_CONNECTED = """<p>Nothing is connected. To begin, give your assistant the address <code>{item}</code>;
the <a href="/">home page</a> says how, for each assistant.</p>"""
DISCONNECT_ALL = Html('<button name="all" value="1">Disconnect all</button>')


def account_login_page(forgejo_host: str, csrf: str, headers: Headers = ()) -> Response:
    """Returns the page before the account page: who are you?"""
    body = fill(ACCOUNT_LOGIN_TEMPLATE, host=forgejo_host, csrf=csrf)
    return page(200, "Your applications", body, form=True, headers=headers)


def missing_rights(missing: Sequence[str], forgejo_url: str) -> Html:
    """Returns the account page's note where Forgejo granted less than this server asks for."""
    if not missing:
        return NO_HTML
    settings_url = forgejo_url + "/user/settings/applications"
    return fill(MISSING_RIGHTS, missing=" ".join(missing), settings=settings_url)


def rules_note(left: Sequence[tuple[str, str]]) -> Html:
    """Returns a note of what the operator's rules leave to each application: its name, and a sentence.

    Without any it is empty.
    """
    lines = [
        fill("<li><strong>{name}</strong>: {rights}</li>", name=name, rights=rights)
        for name, rights in left
        if rights
    ]
    return (
        fill("<h2>What the operator allows</h2><ul>{lines}</ul>", lines=Html("".join(lines)))
        if lines
        else NO_HTML
    )


@dataclass(frozen=True)
class OpenSession:
    """A session as the account page shows it."""

    key: str
    began: float
    used: float


@dataclass(frozen=True)
class Application:
    """A connected application as the account page shows it: all its logins and sessions as one."""

    client_id: str
    name: str
    may_write: bool
    destinations: str
    used: float
    sessions: Sequence[OpenSession]


def application_line(application: Application) -> Html:
    """Returns one application as a line of the account page, its sessions folded into it."""
    sessions = NO_HTML
    if application.sessions:
        items = (
            fill(
                SESSION_TEMPLATE,
                item=session,
                name=application.name,
                began=moment(session.began),
                used=moment(session.used),
            )
            for session in application.sessions
        )
        count = len(application.sessions)
        noun = "session" if count == 1 else "sessions"
        sessions = fill(SESSIONS_TEMPLATE, count=count, noun=noun, items=Html("".join(items)))
    access = "reads and writes" if application.may_write else "reads only"
    return fill(
        APPLICATION_TEMPLATE,
        item=application,
        access=access,
        used=moment(application.used),
        sessions=sessions,
    )


def account_page(
    login: str, forgejo_host: str, address: str, applications: Sequence[Application], csrf: str, notes: Html
) -> Response:
    """Returns a user's connected applications, each with the button that ends it.

    `address` is that of the MCP endpoint.
    """
    lines = fill(NOTHING_CONNECTED, item=address)
    if applications:
        lines = fill(
            '<ul class="apps">{items}</ul>', items=Html("".join(map(application_line, applications)))
        )
    body = fill(
        ACCOUNT_TEMPLATE,
        login=login,
        host=forgejo_host,
        notes=notes,
        csrf=csrf,
        applications=lines,
        all=DISCONNECT_ALL if len(applications) > 1 else NO_HTML,
    )
    return page(200, "Your applications", body, form=True)


# -- home


class Assistant(NamedTuple):
    """An application that can be connected: the steps, and its version that was last seen to work, and when.

    Steps have `code`, *labels on screen* and {url}.
    """

    name: str
    steps: str
    seen: str = ""


SEEN = "2026-11-25"  # the day on which the versions below were connected, used, refreshed and restarted
# The home page and docs/connect.md are made from this table.
# fmt: off
ASSISTANTS = (
    Assistant("Claude.ai, Claude Desktop, Claude mobile",
        "*Settings → Connectors → Add custom connector*: a name, the address, *Add*; "
        "then *Connect*. In a team an owner adds it once, everybody connects themselves. "
        "Desktop and mobile take it over from the account."),
    Assistant("Claude Code",
        "`claude mcp add --transport http forgejo {url}`, then `claude mcp login forgejo`; "
        "or in a session `/mcp`, *forgejo*, *Authenticate*.", f"2.1.332, {SEEN}"),
    Assistant("ChatGPT",
        "*Settings → Apps → Advanced settings → Developer mode*; then *Settings → Apps → Create app*: "
        "a name, the address, authentication *OAuth*."),
    Assistant("Codex",
        "`codex mcp add forgejo --url {url}`, which logs in at once; later `codex mcp login forgejo`.",
        f"0.169.0, {SEEN}"),
    Assistant("VS Code",
        "Command *MCP: Add Server*, *HTTP*, the address. Or `.vscode/mcp.json`: "
        '`{"servers": {"forgejo": {"type": "http", "url": "{url}"}}}`.'),
    Assistant("Cursor",
        '*Settings → MCP → Add*: `{"mcpServers": {"forgejo": {"url": "{url}"}}}`; then *Login*.'),
    Assistant("Copilot CLI",
        "In a session `/mcp add`: type *HTTP*, the address, tools `*`; then follow the login.",
        f"1.0.102, {SEEN}"),
    Assistant("Gemini CLI",
        "`gemini mcp add --transport http forgejo {url}`; then in a session `/mcp auth forgejo`.",
        f"0.61.0, {SEEN}"),
    Assistant("OpenCode",
        '`opencode.json`: `{"mcp": {"forgejo": {"type": "remote", "url": "{url}"}}}`, '
        "then `opencode mcp auth forgejo`. "
        "From version 2: `opencode mcp add forgejo --url {url}`, then `/mcps`.", f"1.18.33, {SEEN}"),
    Assistant("Kilo",
        '`kilo.json`: `{"mcp": {"forgejo": {"type": "remote", "url": "{url}"}}}`, '
        "then `kilo mcp auth forgejo`.",
        f"7.7.9, {SEEN}"),
    Assistant("Qwen Code",
        "`qwen mcp add --transport http forgejo {url}`; then in a session `/mcp auth forgejo`.",
        f"0.24.4, {SEEN}"),
    Assistant("Cline",
        "*MCP Servers → Remote Servers*: a name, the address, *Streamable HTTP*, *Add Server*; "
        "then *Authenticate*.",
        f"3.0.65, {SEEN}"),
    Assistant("Kimi Code",
        "`kimi mcp add --transport http --auth oauth forgejo {url}`, then `kimi mcp auth forgejo`.",
        f"2.1.0, {SEEN}"),
    Assistant("Zed", 'In `settings.json`: `"context_servers": {"forgejo": {"url": "{url}"}}`.'),
    Assistant("Goose",
        "`goose configure`, *Add Extension*, *Remote Extension (Streamable HTTP)*, the address."),
    Assistant("LibreChat",
        "In `librechat.yaml`: `mcpServers: {forgejo: {type: streamable-http, url: \"{url}\"}}`; "
        "each user then connects."),
    Assistant("Open WebUI",
        "*Admin Settings → External Tools*, add: type *MCP (Streamable HTTP)*, the address, *OAuth 2.1*, "
        "*Register Client*; each user then connects."),
    Assistant("JetBrains AI Assistant",
        "*Settings → Tools → AI Assistant → Model Context Protocol (MCP)*, add as JSON: "
        '`{"mcpServers": {"forgejo": {"command": "npx", "args": ["mcp-remote", "{url}"]}}}`.'),
    Assistant("MCP Inspector",
        "`npx @modelcontextprotocol/inspector`: transport *Streamable HTTP*, the address, *Connect*.",
        f"2.12.0, {SEEN}"),
    Assistant("mcporter, mcpc", "`npx mcporter auth {url}`; `npx @apify/mcpc login {url}`.", SEEN),
    Assistant("Anything that only starts commands",
        "`npx mcp-remote {url}` as the command.", f"mcp-remote 0.15.1, {SEEN}"),
    Assistant("A program of your own",
        "Any MCP library with its OAuth support; the address is all it needs.",
        "the official SDKs for Python, TypeScript, Go (1.8.0), Java (2.1.0) and Rust (rmcp 3.11.0), "
        "FastMCP, mcp-go 1.2.1, AI SDK, LangChain, Mastra, pydantic-ai, openai-agents, strands, "
        f"llama-index, mcp-use, google-adk, autogen, smolagents: {SEEN}"),
)
# fmt: on
FIRST_ASSISTANTS = 6  # are shown at once, the others on request
HOME_TEMPLATE = """
<p>With this server, AI assistants work on <a href="{forgejo}">{host}</a> as you, with your own rights,
after you log in.</p>
<div class="box"><p class="quiet">The address to give your assistant:</p>
<p class="big"><code>{url}</code></p></div>
<h2>How to connect</h2><dl>{first}</dl>
<details><summary>Other assistants and programs</summary><dl>{others}</dl></details>
<p><a href="/account">See and end what you have connected</a>.</p>"""


def assistant_entry(assistant: Assistant, url: str) -> Html:
    """Returns how to connect one assistant, as an entry of the home page's list."""
    steps = assistant.steps.replace("{url}", url).translate(ESCAPES)
    steps = re.sub(r"`([^`]+)`", r"<code>\1</code>", steps)
    steps = re.sub(r"(?<![\w>])\*([^*<]+)\*", r"<em>\1</em>", steps)
    seen = fill('<br><span class="quiet">Seen to work: {item}</span>', item=assistant.seen)
    return fill(
        "<dt>{name}</dt><dd>{steps}{seen}</dd>",
        name=assistant.name,
        steps=Html(steps),
        seen=seen if assistant.seen else NO_HTML,
    )


def home_page(public_url: str, forgejo_url: str) -> Response:
    """Returns the page for people who open the server's address."""
    url = public_url + "/mcp"
    entries = [assistant_entry(assistant, url) for assistant in ASSISTANTS]
    body = fill(
        HOME_TEMPLATE,
        forgejo=forgejo_url,
        host=urlsplit(forgejo_url).netloc,
        url=url,
        first=Html("".join(entries[:FIRST_ASSISTANTS])),
        others=Html("".join(entries[FIRST_ASSISTANTS:])),
    )
    return page(200, "Forgejo for AI assistants", body)


# ============================================================================================================
# Clients
# Owns who may ask for a login: registration (RFC 7591), pre-registered clients, clients that describe
# themselves at their own URL, redirect URIs, client authentication. Must not know users, tokens or Forgejo.
# ============================================================================================================


@dataclass(frozen=True, slots=True)
class OAuthServices:
    """What the OAuth endpoints share; there is one of each in a broker."""

    settings: Settings
    store: Store
    keyring: Keyring
    log: Log
    clock: SteadyClock
    limiter: Limiter


AUTH_METHODS = ("none", "client_secret_post", "client_secret_basic")
URI_CHARACTERS = re.compile(r"[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]{1,2000}")
# What a browser and Python disagree on (user names, odd ports and hosts) is refused, not interpreted.
WEB_URI = re.compile(
    r"(?i:https?)://([A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[::1\])(?::([0-9]{1,5}))?(?:[/?].*)?"
)
MAX_REGISTRATION = 4096
KEPT_AS_COLUMNS = {"redirect_uris", "client_name", "token_endpoint_auth_method"}  # of a registration
RESERVED_PARAMETERS = {"code", "state", "iss", "error", "error_description"}


NEVER_ALLOWED_SCHEMES = frozenset(
    "javascript data file vbscript blob about view-source ws wss ftp".split()
)  # whatever allowed_redirect_schemes says


class UnusableScheme(ValueError):
    """A redirect URI with a private-use scheme that is not allowed here.

    It is harmless, so it may be left out of a set.
    """


def check_redirect_uri(uri: object, schemes: Collection[str]) -> str:
    """Returns a URI that may be registered: https, http on loopback, or an allowed private-use scheme.

    Raises ValueError with the reason.
    """
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
        if scheme in NEVER_ALLOWED_SCHEMES:
            raise ValueError(f"has the scheme {scheme}, which is never allowed")
        if scheme not in schemes:
            raise UnusableScheme(f"has the scheme {scheme}, which is not among allowed_redirect_schemes")
        return uri
    match = WEB_URI.fullmatch(uri)
    if not match or (match[2] and not 0 < int(match[2]) < 65536):
        raise ValueError("has no plain host and port")
    if scheme == "http" and not is_loopback_name(match[1].lower()):
        raise ValueError("is http, which is for loopback only; use https")
    return uri


LOOPBACK_URI = re.compile(
    r"http://(?:localhost|127\.0\.0\.1|\[::1\])(?::([0-9]{1,5}))?(/[^?#]*)?(\?[^#]*)?",
    re.IGNORECASE | re.ASCII,  # without ASCII, IGNORECASE takes U+017F for an s
)


def redirect_matches(registered: str, asked: str) -> bool:
    """Returns whether a redirect URI is a registered one.

    Exact, but for loopback: any port, its three names alike, and an empty path is `/` (RFC 8252 7.3).
    """
    if registered == asked:
        return True
    ours = LOOPBACK_URI.fullmatch(registered)
    theirs = LOOPBACK_URI.fullmatch(asked)
    if not ours or not theirs or (theirs[1] and not 0 < int(theirs[1]) < 65536):
        return False
    return (ours[2] or "/", ours[3]) == (theirs[2] or "/", theirs[3])


def registrable_uris(uris: object, schemes: Collection[str], limit: int) -> list[str]:
    """Returns those of a client's redirect URIs that may be used here.

    Raises OAuthError when there is none, or one that deceives.
    """
    if not isinstance(uris, list) or not 1 <= len(uris) <= limit:
        raise OAuthError("invalid_redirect_uri", f"redirect_uris must be a list of 1 to {limit} URIs.")
    usable = []
    unusable = None
    for uri in uris:
        try:
            usable.append(check_redirect_uri(uri, schemes))
        except UnusableScheme as error:  # one such must not cost Cursor the other two of its set
            unusable = error
        except ValueError as error:
            raise OAuthError("invalid_redirect_uri", f"A redirect URI {error}.") from None
    if not usable:
        raise OAuthError("invalid_redirect_uri", f"A redirect URI {unusable}.")
    return usable


def choose(document: Mapping[str, object], key: str, supported: tuple[str, ...]) -> list[str]:
    """Returns the entries of a requested list that are supported.

    An absent list stands for the first supported entry. Raises OAuthError unless that entry is requested.
    """
    values = document.get(key) or [supported[0]]  # null and an empty list are what some send for nothing
    if (
        not isinstance(values, list)
        or not all(isinstance(value, str) for value in values)
        or supported[0] not in values
    ):
        raise OAuthError("invalid_client_metadata", f"{key} must be a list that contains {supported[0]}.")
    return [value for value in supported if value in values]


def has_rate(request: Request) -> bool:
    """Returns whether a request's address has a rate limit.

    A loopback peer that speaks for nobody is the operator, or a proxy
    that hides who asks: no limit could be fair (clients.md 17).
    """
    return not (request.direct and (is_loopback_name(request.address) or request.address == UNIX_PEER))


def rate_limit(limiter: Limiter, settings: Settings, kind: str, request: Request) -> None:
    """HTTPError 429 above the `rate_<kind>` of the request's address, or twenty times that of all."""
    if has_rate(request):
        rate = getattr(settings, f"rate_{kind}")
        limiter.spend(kind, network_of(request.address), rate)
        limiter.spend(kind, "all", 20 * rate)


# A name in lower case with a last label that is no number, so no spelling of an IP address; no port, user
# name, fragment or dot segment.
DOCUMENT_URL = re.compile(
    r"https://((?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?)"
    r"(?=/)(?!/*(?:\?|$))(?!\S*/(?:\.|%2[eE]){1,2}(?:[/?]|$))"
    r"/[A-Za-z0-9._~!$&'()*+,;=:@%/-]*(?:\?[A-Za-z0-9._~!$&'()*+,;=:@%/?-]*)?"
)
SHA256_PREFIX = bytes.fromhex("3031300d060960864801650304020105000420")  # DigestInfo of RFC 8017 9.2 note 1


RsaKey = tuple[str | None, int, int]  # kid, n, e


def verify_rs256(message: bytes, signature: bytes, n: int, e: int) -> bool:
    """Returns whether a signature is RSASSA-PKCS1-v1_5 with SHA-256 (RFC 8017 8.2.2).

    The whole block is compared, never parsed.
    """
    size = (n.bit_length() + 7) // 8
    number = int.from_bytes(signature, "big")
    if len(signature) != size or number >= n:
        return False
    info = SHA256_PREFIX + hashlib.sha256(message).digest()
    block = b"\0\1" + b"\xff" * (size - 3 - len(info)) + b"\0" + info
    return hmac.compare_digest(pow(number, e, n).to_bytes(size, "big"), block)


def public_rsa_keys(jwks: object) -> list[RsaKey]:
    """Returns the usable keys of a JWK set (RFC 7517): RSA, 2048 to 4096 bits.

    ValueError for a secret or private one.
    """
    keys = member(jwks, "keys", list, None)
    if keys is None or not all(isinstance(key, dict) for key in keys):
        raise ValueError("the keys are no JWK set")
    if any("d" in key or "k" in key for key in keys):
        raise ValueError("a private or symmetric key is published")
    usable = []
    for key in keys[:20]:
        if key.get("kty") == "RSA" and key.get("use", "sig") == "sig" and key.get("alg", "RS256") == "RS256":
            n = int.from_bytes(unb64url(str(key.get("n", ""))), "big")
            e = int.from_bytes(unb64url(str(key.get("e", ""))), "big")
            if 2048 <= n.bit_length() <= 4096 and n % 2 and 3 <= e < 2**32 and e % 2:
                usable.append((str(key["kid"]) if "kid" in key else None, n, e))
    return usable


MAX_DOCUMENT = 5120  # bytes
MAX_KEY_SET = 65536  # bytes
# Documents that stand where real applications say. If none
# of them can be read from here, no application's can.
WELL_KNOWN_DOCUMENTS = (
    "https://claude.ai/oauth/mcp-oauth-client-metadata",
    "https://chatgpt.com/oauth/client.json",
    "https://vscode.dev/oauth/client-metadata.json",
)


def refuse_failing_origin(answer: Fetched) -> Fetched:
    """Returns the answer; raises FetchFailed (`away`) for one that only says that the origin is out of order.

    A filter before the origin may say so, too.
    """
    if answer.status in (403, 429) or 500 <= answer.status <= 599:
        raise FetchFailed(f"status {answer.status}", away=True)
    return answer


def unreadable_documents(web: PublicWeb, schemes: tuple[str, ...]) -> list[str]:
    """Returns why none of WELL_KNOWN_DOCUMENTS can be read from here, a reason each; empty when one can."""

    def read(number: int, url: str) -> None:
        try:
            read_client_document(url, web.get(url, MAX_DOCUMENT), schemes)
            reasons[number] = ""
        except (FetchFailed, ValueError, OAuthError) as error:
            reasons[number] = f"{url}: {error}"

    reasons = [f"{url}: not asked" for url in WELL_KNOWN_DOCUMENTS]
    readers = []
    for each in enumerate(WELL_KNOWN_DOCUMENTS):
        reader = threading.Thread(target=read, args=each, daemon=True, name="document")
        try:
            reader.start()
            readers.append(reader)
        except RuntimeError:  # no thread to be had
            read(*each)
    for reader in readers:
        reader.join()
    return reasons if all(reasons) else []


def read_client_document(
    url: str, answer: Fetched, schemes: tuple[str, ...]
) -> tuple[str, list[str], str, dict[str, Any]]:
    """What a Client ID Metadata Document says, as (name, redirect URIs, auth method, what else is kept).

    Raises ValueError or OAuthError. draft-ietf-oauth-client-id-metadata-document 4: its client_id is its own
    URL, byte for byte, and it has no secret.
    """
    document = answer.json() if answer.status == 200 else None
    if document is None:
        raise ValueError(f"status {answer.status}, or no JSON object")
    if document.get("client_id") != url:
        raise ValueError("its client_id is not its URL")
    method = document.get("token_endpoint_auth_method", "none")
    if any(name.startswith("client_secret") for name in document) or method not in (
        "none",
        "private_key_jwt",
    ):
        raise ValueError("it relies on a secret")
    choose(document, "grant_types", ("authorization_code",))
    choose(document, "response_types", ("code",))
    also = document.get("token_endpoint_auth_methods_supported")
    if isinstance(also, list) and "none" in also:
        method = "none"
    kept: dict[str, Any] = {name: document[name] for name in ("jwks", "jwks_uri") if name in document}
    if "jwks" in kept:
        public_rsa_keys(kept["jwks"])
    return (
        clean_name(document.get("client_name")),
        registrable_uris(document.get("redirect_uris"), schemes, 100),
        method,
        kept,
    )


def freshness(answer: Fetched) -> float:
    """Returns the seconds for which a document may be used, by its Cache-Control.

    An hour if that is silent, else a minute to a day.
    """
    control = answer.headers.get("cache-control", "").lower()
    if re.search("no-store|no-cache", control):
        return 60
    age = re.search(r"(?<![a-z-])max-age=\"?([0-9]{1,9})", control)
    return min(86400, max(60, int(age[1]))) if age else 3600


def temporarily(sentence: str, seconds: int, cause: str = "") -> HTTPError:
    """Returns the refusal of a request that may succeed after these seconds."""
    headers = (("Retry-After", str(seconds)),)
    return HTTPError(503, "temporarily_unavailable", sentence, headers, cause)


class ClientMetadataDocuments:
    """Client ID Metadata Documents: a client_id that is the https URL of the client's own description.

    A stranger chooses the URL. So it is fetched from the public internet only, few at a
    time, and what came of it, good or bad, is kept: a good one as long as its origin
    says, a failure for a minute. While the origin only fails, the last good one serves
    for a week, its keys for a day. /token never fetches one; it uses what the login used.
    """

    RETRY = 60
    UNCONFIRMED = 7 * 86400  # seconds that a document serves after it could be read last
    KEYS_FRESH = 3600
    KEYS_UNCONFIRMED = 86400
    ADVERTISED = 1800  # seconds that documents are advertised while none can be read
    SLOT_WAIT = 8  # seconds; a slot is held for no more than PublicWeb.SECONDS

    def __init__(self, services: OAuthServices, web: PublicWeb) -> None:
        self._settings = services.settings
        self._store = services.store
        self._log = services.log
        self._clock = services.clock
        self._limiter = services.limiter
        self._web = web
        # Strangers' documents never hold up those of applications
        # that people have logged in to, nor one stranger's another's.
        self._slots = [threading.BoundedSemaphore(4) for in_use in (False, True)]
        self._shares: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
        self._flights: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()  # guards the two dicts; a leaf
        self._failing_since = services.store.documents_failing_since()
        self._unread: str | None = (
            ""  # why a login's document could not be read, None once one was read; one assignment each
        )

    @property
    def advertised(self) -> bool:
        """Returns whether the server's metadata say that documents are read here.

        Not where a login's document failed, or where all have failed for half an hour. Clients that read it
        register no other way, and end on a page that blames them (clients.md 19).
        """
        since = self._failing_since
        fails = since is not None and self._clock.now() - since >= self.ADVERTISED
        return self._settings.client_documents and not self._unread and not fails

    def look_out(self) -> bool:
        """Learns whether documents can be read from here; False, and a warning, when not."""
        reasons = unreadable_documents(self._web, self._settings.allowed_redirect_schemes)
        if not reasons or self._unread is None:
            self._was_read()
            return True
        if self._failing_since is None:
            self._failing_since = self._clock.now()
            self._store.documents_fail(self._failing_since)
        self._log.event(
            "warning",
            "client_documents_unreadable",
            since=moment(self._failing_since),
            advertised=self.advertised,
            reasons=reasons,
            fix="let this server reach port 443 of the internet; until then applications register instead",
        )
        return False

    def _was_read(self) -> None:
        """A document could be read: from now on they are advertised."""
        self._unread = None
        if self._failing_since is not None:
            self._failing_since = None
            self._store.documents_fail(None)
            self._log.event("info", "client_documents_readable")

    def may_be_one(self, client_id: str) -> bool:
        """Returns whether a client_id is the URL of a document that may be fetched.

        Not one of our own host, nor of Forgejo's.
        """
        settings = self._settings
        if len(client_id) > 2000 or not settings.client_documents:
            return False
        match = DOCUMENT_URL.fullmatch(client_id)
        ours = (
            settings.public_url,
            settings.forgejo_url,
            settings.forgejo_internal_url or settings.forgejo_url,
        )
        return match is not None and match[1] not in {urlsplit(url).hostname for url in ours}

    def client(self, url: str, owner: str | None = None) -> ClientRow | None:
        """Returns the client's row for a login, fetched if need be; None when its document cannot be used.

        `owner` is whose request it is: one's fetches do not hold up another's. Its `fetched_at` is later than
        `confirmed_at` where the last good document serves because its origin fails.
        """
        row = self._store.client(url)
        if self._is_due(row):
            with self._turn(url, row is not None and row.in_use, owner):
                if self._is_due(self._store.client(url)):
                    self._fetch(url)
            row = self._store.client(url)
        return row if row and row.fresh_until > self._clock.now() else None

    def _is_old(self, fetched_at: float) -> bool:
        # A moment to come was written before the clock was set back.
        return abs(self._clock.now() - fetched_at) >= self.RETRY

    def _is_due(self, row: ClientRow | None) -> bool:
        return row is None or row.fresh_until <= self._clock.now() and self._is_old(row.fetched_at)

    @contextlib.contextmanager
    def _turn(self, url: str, in_use: bool, owner: str | None = None) -> Iterator[None]:
        """Allows one fetch of a URL at a time, few in all, and a stranger's not too often from one host.

        So nobody is flooded through this server.
        """
        if not in_use:
            self._limiter.spend("document", urlsplit(url).hostname or "", 60)
        with self._lock:
            waits: list[tuple[Any, int]] = [(self._flights.setdefault(url, threading.Lock()), 15)]
            if not in_use and owner is not None:
                waits.append((self._shares.setdefault(owner, threading.BoundedSemaphore(2)), self.SLOT_WAIT))
        waits.append((self._slots[in_use], self.SLOT_WAIT))
        with contextlib.ExitStack() as held:
            for lock, seconds in waits:
                if not lock.acquire(timeout=seconds):
                    raise temporarily(
                        "Too many applications introduce themselves just now; try again in a moment.", 5
                    )
                held.callback(lock.release)
            yield

    def _fetch(self, url: str) -> None:
        """Keeps what a document says, or that it could not be used."""
        now = self._clock.now()
        try:
            answer = refuse_failing_origin(self._web.get(url, MAX_DOCUMENT))
            read = read_client_document(url, answer, self._settings.allowed_redirect_schemes)
            self._store.keep_document(url, *read, now, now + freshness(answer))
            self._was_read()
        except (FetchFailed, ValueError, OAuthError) as error:
            away = isinstance(error, FetchFailed) and error.away
            row = self._store.client(url)
            until = row.confirmed_at + self.UNCONFIRMED if away and row and row.confirmed_at else 0
            self._store.keep_document(url, "", [], "none", {}, now, min(now + self.RETRY, until), away=away)
            if away and self._unread is not None:
                self._unread = str(error)
            self._log.event(
                "info", "client_document_refused", client=url, reason=str(error), last_good_serves=until > now
            )

    def check_assertion(self, client: ClientRow, assertion: str) -> None:
        """Raises ValueError, with the reason, unless a JWT proves that the client made it, for us, just now.

        RFC 7523 3; RS256 only.
        """
        signed, _, signature = assertion.rpartition(".")
        parts = signed.split(".")
        if len(parts) != 2:
            raise ValueError("it is not a JWT")
        header, claims = (read_json(unb64url(part)) for part in parts)
        if not isinstance(header, dict) or not isinstance(claims, dict):
            raise ValueError("it is not a JWT")
        if header.get("alg") != "RS256" or "crit" in header or len(assertion) > 8192:
            raise ValueError("it is not signed with RS256")
        expires = self._check_claims(client, claims)
        kid = header.get("kid")
        if kid is not None and not isinstance(kid, str):
            raise ValueError("its kid is no text")
        if not any(
            verify_rs256(signed.encode(), unb64url(signature), n, e)
            for name, n, e in self._keys(client, kid)
            if kid in (None, name)
        ):
            raise ValueError("its signature is not the client's")
        # Without a jti what was signed stands for it; the signature could be spelled in two ways.
        unique = json.dumps(claims["jti"]) if claims.get("jti") else signed
        if not self._store.spend_assertion(token_hash(f"{client.client_id} {unique}"), expires):
            raise ValueError("it was used before")

    def _check_claims(self, client: ClientRow, claims: dict[str, object]) -> float:
        """Returns when an assertion expires; ValueError unless it is the client's, for us, and valid now."""
        now = self._clock.now()
        url = self._settings.public_url
        audience = claims.get("aud")
        audiences = audience if isinstance(audience, list) else [audience]
        expires = claims.get("exp")
        begins = claims.get("nbf", 0)
        if (claims.get("iss"), claims.get("sub")) != (client.client_id, client.client_id):
            raise ValueError("iss and sub are not the client_id")
        if not audiences or any(
            each not in (url, url + "/oauth/token", url + "/token") for each in audiences
        ):
            raise ValueError("aud is not this server")
        if not isinstance(expires, (int, float)) or not isinstance(begins, (int, float)):
            raise ValueError("exp or nbf is no number")
        if not now < expires <= now + 3660 or begins > now + 60:
            raise ValueError("it has expired, is not valid yet, or lasts for more than an hour")
        return expires

    def _keys(self, client: ClientRow, kid: str | None) -> list[RsaKey]:
        """Returns the client's keys.

        They are fetched anew when `kid` is none of them, or after an hour, but at most once a minute.
        """
        if "jwks" in client.metadata:
            return public_rsa_keys(client.metadata["jwks"])
        url = client.metadata.get("jwks_uri")
        if not isinstance(url, str) or not self.may_be_one(url):
            raise ValueError("the client publishes no keys")
        kept = client.keys
        if self._keys_due(kept, url, kid):
            with self._turn(url, client.in_use):
                # Another may have fetched them meanwhile.
                kept = (self._store.client(client.client_id) or client).keys
                if self._keys_due(kept, url, kid):
                    kept = self._fetch_keys(client, url, kept)
        keys = [(name, n, e) for name, n, e in kept["keys"]]
        stale = self._clock.now() - kept.get("good", 0) >= self.KEYS_UNCONFIRMED
        if not kept["ok"] and (stale or not keys or kid not in (None, *(name for name, _, _ in keys))):
            # Our trouble, or their origin's, must not look like the client's fault.
            raise temporarily("The client's keys cannot be read just now.", self.RETRY, "keys_unreadable")
        return keys

    def _keys_due(self, kept: dict[str, Any], url: str, kid: str | None) -> bool:
        """Returns whether a client's keys are to be asked for: at most once a minute."""
        if kept.get("uri") != url:
            return True
        # A moment to come was written before the clock was set back.
        age = abs(self._clock.now() - kept["at"])
        known = kid in (None, *(key[0] for key in kept["keys"]))
        return age >= self.RETRY and (age >= self.KEYS_FRESH or not kept["ok"] or not known)

    def _fetch_keys(self, client: ClientRow, url: str, kept: dict[str, Any]) -> dict[str, Any]:
        """Fetches, keeps and returns the client's keys.

        Where their origin only fails, the last good ones serve for a day.
        """
        now = self._clock.now()
        try:
            answer = refuse_failing_origin(self._web.get(url, MAX_KEY_SET))
            keys = public_rsa_keys(answer.json() if answer.status == 200 else None)
            kept = {"uri": url, "at": now, "ok": True, "good": now, "keys": keys}
        except (FetchFailed, ValueError) as error:
            self._log.event("warning", "client_keys_unreadable", client=client.client_id, reason=str(error))
            away = isinstance(error, FetchFailed) and error.away and kept.get("uri") == url
            good = kept.get("good", kept["at"] if kept["ok"] else 0) if away else 0
            keys = kept["keys"] if now - good < self.KEYS_UNCONFIRMED else []
            kept = {"uri": url, "at": now, "ok": False, "good": good, "keys": keys}
        self._store.keep_keys(client.client_id, kept)
        return kept


def check_configured_clients(settings: Settings) -> None:
    """Raises ConfigurationError for redirect URIs that no client may have.

    The operator may choose any private-use scheme.
    """
    problems = []
    for client in settings.clients:
        for uri in client.redirect_uris:
            try:
                with contextlib.suppress(UnusableScheme):
                    check_redirect_uri(uri, settings.allowed_redirect_schemes)
            except ValueError as error:
                problems.append(f"clients: the redirect URI {uri!r} of {client.client_id!r} {error}")
    if problems:
        raise ConfigurationError(problems)


# What `doctor` registers: each redirect URI is some real client's. It is answered like any registration and
# kept nowhere, so that a trial leaves nothing behind however it ends; nobody can log in through it.
TRIAL_CLIENT = "fjmcp-broker-doctor"
TRIAL_REGISTRATION: dict[str, Any] = {
    "client_name": "fjmcp-broker doctor",
    "application_type": "web",
    "scope": "openid claudeai",
    "token_endpoint_auth_method": "none",
    "grant_types": ["authorization_code", "refresh_token"],
    "response_types": ["code"],
    "redirect_uris": [
        "cursor://anysphere.cursor-mcp/oauth/callback",
        "https://www.cursor.com/agents/mcp/oauth/callback",
        "http://localhost:3118/callback",
        "https://claude.ai/api/mcp/auth_callback",
        "https://claude.com/api/mcp/auth_callback",
        "https://chatgpt.com/connector/oauth/doctor",
        "https://vscode.dev/redirect",
        "http://127.0.0.1/",
        "http://127.0.0.1:33418/",
    ],
}


class Clients:
    """Finds, registers and authenticates clients."""

    def __init__(self, services: OAuthServices, web: PublicWeb) -> None:
        settings = services.settings
        store = services.store
        self._settings = settings
        self._store = store
        self._log = services.log
        self._clock = services.clock
        self._limiter = services.limiter
        self._documents = ClientMetadataDocuments(services, web)
        check_configured_clients(settings)
        store.drop_configured_clients(client.client_id for client in settings.clients)
        for client in settings.clients:
            secret = client.client_secret
            store.add_client(
                client.client_id,
                "configured",
                clean_name(client.name or client.client_id),
                client.redirect_uris,
                token_hash(secret) if secret else None,
                "client_secret_basic" if secret else "none",
                {},
                services.clock.now(),
            )

    def find(self, client_id: str) -> ClientRow | None:
        """Returns the client of an id as it was last known, or None. Nothing is fetched."""
        if client_id == TRIAL_CLIENT:
            return self._trial_client()
        client = self._store.client(client_id)
        usable = (
            client
            and client.kind != "unreadable"
            and (client.kind != "document" or self._settings.client_documents)
        )
        return client if usable else None

    def _trial_client(self) -> ClientRow:
        """Returns the client as which `doctor` asks."""
        name = TRIAL_REGISTRATION["client_name"]
        schemes = self._settings.allowed_redirect_schemes
        uris = registrable_uris(TRIAL_REGISTRATION["redirect_uris"], schemes, 10)
        now = self._clock.now()
        return ClientRow(
            TRIAL_CLIENT, "trial", name, uris, None, "none", {}, {}, now, now, now, now, now, None, None
        )

    @property
    def documents(self) -> ClientMetadataDocuments:
        """The clients that describe themselves at a URL of their own."""
        return self._documents

    def for_login(self, client_id: str, request: Request) -> ClientRow | None:
        """Returns the client of an id, whose document is fetched when due; None if unknown or unusable."""
        client = self.find(client_id)
        if client and client.kind != "document":
            return client
        if not self._documents.may_be_one(client_id):
            return None
        owner = network_of(request.address) if has_rate(request) else None
        return self._documents.client(client_id, owner)

    def register(self, request: Request) -> Response:
        """POST /oauth/register: dynamic registration (RFC 7591 3), open to all; nothing in it is believed."""
        rate_limit(self._limiter, self._settings, "register", request)
        document = parse_json_object(self._registration(request), "invalid_client_metadata")
        uris = registrable_uris(document.get("redirect_uris"), self._settings.allowed_redirect_schemes, 10)
        method = document.get("token_endpoint_auth_method") or "client_secret_basic"
        if not isinstance(method, str) or method not in AUTH_METHODS:
            raise OAuthError(
                "invalid_client_metadata",
                f"token_endpoint_auth_method must be one of {', '.join(AUTH_METHODS)}.",
            )
        # Clients compare the answer with their request (clients.md 10). A refresh token is always issued.
        grant_types = choose(document, "grant_types", ("authorization_code", "refresh_token"))
        response_types = choose(document, "response_types", ("code",))
        # The scope of each login counts, not this one; clients only read the echo (clients.md 10, 11).
        scope = member(document, "scope", str, "") or " ".join(SCOPES)
        is_trial = document == TRIAL_REGISTRATION
        client_id = TRIAL_CLIENT if is_trial else new_secret("fjd_")[:36]
        secret = None if method == "none" else new_secret("fjs_")
        now = self._clock.now()
        name = clean_name(document.get("client_name"))
        metadata: dict[str, object] = {
            "redirect_uris": uris,
            "client_name": name,
            "token_endpoint_auth_method": method,
            "scope": scope[:1000],
            "grant_types": grant_types,
            "response_types": response_types,
        }
        for key in ("application_type", "software_id", "software_version"):
            value = member(document, key, str, "")
            if 0 < len(value) <= 200:
                metadata[key] = value
        if not is_trial:
            self._store.register_client(
                client_id,
                name,
                uris,
                token_hash(secret) if secret else None,
                method,
                {key: metadata[key] for key in metadata.keys() - KEPT_AS_COLUMNS},
                network_of(request.address, 24, 48),
                now,
            )
        self._log.audit("client_registered", client=client_id, name=name, address=request.address)
        self._log.connect_step("registered", name=name)
        answer = {"client_id": client_id, "client_id_issued_at": int(now), **metadata}
        if secret:
            answer.update(client_secret=secret, client_secret_expires_at=0)
        return json_response(201, answer, NO_STORE)

    def _registration(self, request: Request) -> bytes:
        """Returns the body of a registration; OAuthError above 4 KiB.

        No client needs more, and strangers' rows stay on file.
        """
        limit = min(MAX_REGISTRATION, self._settings.max_form)
        try:
            return request.read_body(limit)
        except HTTPError as error:
            length = request.headers.get("content-length", ["0"])[0]
            if error.status != 413 or int(length) > self._settings.max_form:
                raise
            raise OAuthError(
                "invalid_client_metadata", f"A registration may have at most {limit} bytes."
            ) from None

    def authenticate(self, request: Request, form: dict[str, str]) -> ClientRow:
        """Returns the client of a request to /token or /revoke (RFC 6749 2.3.1).

        It authenticates by Basic, post, an assertion, or its id alone. Raises OAuthError `invalid_client` for
        one that is unknown, or whose secret or assertion is wrong.
        """
        assertion = form.get("client_assertion", "")
        authorization = request.header("authorization")
        basic = authorization is not None
        offered: list[tuple[Any, Any]] = [(form.get("client_id"), form.get("client_secret"))]
        if authorization is not None:
            offered = self._basic(authorization, form)
        if (
            assertion and offered[0][0] is None
        ):  # RFC 7521 4.2: the assertion names the client; it is checked below
            offered = [(jwt_claims(assertion).get("sub"), None)]
        if not isinstance(offered[0][0], str) or not offered[0][0]:
            raise OAuthError("invalid_request", "client_id is missing.")
        request.context.client = offered[0][0]
        for client_id, secret in offered:
            client = self.find(client_id) if client_id.isascii() else None
            # A public client that sends a stray secret is let pass: it proves nothing and hurts nothing.
            if client and (
                not client.secret_hash
                or secret
                and hmac.compare_digest(client.secret_hash, token_hash(secret))
            ):
                break
        else:
            if not any(self.find(client_id) for client_id, _ in offered if client_id.isascii()):
                raise self._refused(
                    basic,
                    "This client is not registered here (any more); register it again.",
                    "unknown_client",
                )
            raise self._refused(basic, "The client's secret is missing or wrong.")
        if assertion or client.auth_method == "private_key_jwt":
            self._check_assertion(client, form, assertion)
        return client

    def _check_assertion(self, client: ClientRow, form: dict[str, str], assertion: str) -> None:
        """Raises OAuthError `invalid_client` unless the form's assertion is the client's (RFC 7521 4.2)."""
        try:
            if (
                form.get("client_assertion_type") != "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
                or client.secret_hash
            ):
                raise ValueError("the client has a secret, or client_assertion_type is not jwt-bearer")
            self._documents.check_assertion(client, assertion)
        except ValueError as error:
            raise self._refused(
                False, f"The client's assertion is missing or wrong: {error}.", "bad_assertion"
            ) from None

    @staticmethod
    def _refused(basic: bool, sentence: str, cause: str = "") -> OAuthError:
        """Returns the error of failed client authentication; to Basic it names the scheme (RFC 6749 5.2)."""
        headers = (("WWW-Authenticate", 'Basic realm="fjmcp-broker"'),) if basic else ()
        return OAuthError("invalid_client", sentence, 401, headers, cause)

    def _basic(self, authorization: str, form: dict[str, str]) -> list[tuple[str, str]]:
        """Returns the readings (client_id, secret) of an Authorization header, one or two.

        Form-encoded as RFC 6749 2.3.1 wants, and as it stands: most clients do not encode, and a secret of an
        operator's own may hold `+` or `%`.
        """
        scheme, _, value = authorization.partition(" ")
        name = colon = secret = ""
        with contextlib.suppress(ValueError):
            name, colon, secret = base64.b64decode(value.strip(), validate=True).decode().partition(":")
        if not colon or scheme.lower() != "basic":
            raise self._refused(True, "The Authorization header is not Basic with a client_id and a secret.")
        readings = [(name, secret)]
        with contextlib.suppress(ValueError):
            readings.insert(0, (unquote_plus(name, errors="strict"), unquote_plus(secret, errors="strict")))
        if "client_secret" in form or form.get("client_id") not in (None, *(name for name, _ in readings)):
            raise OAuthError(
                "invalid_request",
                "Send the client's credentials in one place: the Authorization header or the body.",
            )
        return list(dict.fromkeys(readings))


# ============================================================================================================
# Authorization
# Owns the OAuth 2.1 endpoints: metadata, authorize, consent,
# callback, token, revoke; and the rules of grants and tokens.
# Must not know sessions or children; that a grant ended is learnt by others from the store.
# ============================================================================================================

SPENT_PATIENCE = 2  # seconds that an address which has spent its rate has for the body of a token request
GRANT_RATE = 120  # requests a minute to /token that one login may make
CLOCK_WAS_SET = "This server's clock was set; its operator has to see whether that is right. Try again later."
LOGGED_OUT = "Forgejo ended this login. Log in again."
FINISH_WAIT = (
    60  # seconds that a callback waits for an earlier one of the same login; Forgejo is asked several things
)
NOT_ACCEPTED = "Forgejo does not accept this server's registration; its operator has to mend it."
ACCOUNT_LIFETIME = 1800  # seconds a browser stays logged in to the account page
MAX_SHOWN_SESSIONS = 100  # on the account page


NO_PKCE = "PKCE is required: code_challenge with code_challenge_method=S256"


class AuthorizationError(Exception):
    """An error that goes back to the client's validated redirect_uri (RFC 6749 4.1.2.1)."""

    def __init__(self, error: str, description: str, cause: str = "") -> None:
        super().__init__(error)
        self.description = description
        self.answer = {"error": error, "error_description": description}
        self.cause = cause or error


def parse_form(raw: bytes | str, refusal: Exception) -> dict[str, list[str]]:
    """Returns a form (bytes) or query as {name: [values]}.

    Raises `refusal` when it is not clean UTF-8, or has too many fields. A parameter without a value is an
    absent one (RFC 6749 3.1, 3.2).
    """
    values: dict[str, list[str]] = {}
    try:
        text = raw.decode("ascii") if isinstance(raw, bytes) else raw
        for name, value in parse_qsl(text, max_num_fields=100, encoding="utf-8", errors="strict"):
            if "\0" in value:
                raise refusal
            values.setdefault(name, []).append(value)
    except ValueError:
        raise refusal from None
    return values


def known_scopes(asked: str) -> list[str]:
    """Returns those of the scopes asked for that exist."""
    return [scope for scope in SCOPES if scope in asked.split()]


def is_our_resource(values: Iterable[str], settings: Settings) -> bool:
    """Returns whether every `resource` means our MCP endpoint, as real clients spell it (RFC 8707 2).

    None given means it too.
    """
    accepted = {settings.resource, settings.resource + "/", settings.public_url, settings.public_url + "/"}
    for value in values:
        scheme, separator, rest = value.partition("://")
        authority, slash, path = rest.partition("/")
        authority = authority.lower().removesuffix({"https": ":443", "http": ":80"}.get(scheme.lower(), "\0"))
        if f"{scheme.lower()}{separator}{authority}{slash}{path}" not in accepted:
            return False
    return True


AnyGrant = (
    GrantRow | AccountGrantRow | CodeRow | RefreshTokenRow
)  # rows that name a grant, its user and client


def end_grant(services: OAuthServices, row: AnyGrant, reason: str, event: str = "token_revoked") -> None:
    """Ends a grant with all its tokens, with an audit record unless it had ended before."""
    if services.store.end_grant(row.grant_id, reason, services.clock.now()):
        services.log.audit(event, user=row.sub, client=row.client_id, grant=row.grant_id, reason=reason)


def server_metadata(settings: Settings, advertised: bool) -> Response:
    """Returns the authorization server's metadata (RFC 8414)."""
    url = settings.public_url
    methods: dict[str, list[str]] = {"methods_supported": list(AUTH_METHODS)}
    if settings.client_documents:
        methods = {
            "methods_supported": [*AUTH_METHODS, "private_key_jwt"],
            "signing_alg_values_supported": ["RS256"],
        }
    return json_response(
        200,
        {
            "issuer": url,
            "authorization_endpoint": url + "/oauth/authorize",
            "token_endpoint": url + "/oauth/token",
            "registration_endpoint": url + "/oauth/register",
            "revocation_endpoint": url + "/oauth/revoke",
            "scopes_supported": [*SCOPES, "offline_access"],
            "response_types_supported": ["code"],
            "response_modes_supported": ["query"],
            "grant_types_supported": ["authorization_code", "refresh_token"],
            "code_challenge_methods_supported": ["S256"],
            **{
                f"{endpoint}_endpoint_auth_{name}": values
                for endpoint in ("token", "revocation")
                for name, values in methods.items()
            },
            "authorization_response_iss_parameter_supported": True,
            "client_id_metadata_document_supported": advertised,
        },
        (("Cache-Control", "public, max-age=300"),),
    )


def resource_metadata(settings: Settings) -> Response:
    """Returns which authorization server guards the MCP endpoint (RFC 9728)."""
    return json_response(
        200,
        {
            "resource": settings.resource,
            "authorization_servers": [settings.public_url],
            "scopes_supported": list(SCOPES),
            "bearer_methods_supported": ["header"],
            "resource_name": "Forgejo",
        },
        (("Cache-Control", "public, max-age=300"),),
    )


class BrowserForms:
    """The cookies of the pages, and the forms that are believed only from the browser that was shown them."""

    def __init__(self, settings: Settings, limiter: Limiter) -> None:
        self._settings = settings
        self._limiter = limiter
        secure = settings.public_url.startswith("https:")
        self.name = "__Host-fjmcp" if secure else "fjmcp"
        self.account_name = self.name + "-account"
        self._flags = f"; Path=/; HttpOnly; SameSite=Lax{'; Secure' if secure else ''}"

    def posted(self, request: Request, cookie_name: str, purpose: str) -> tuple[dict[str, str], str]:
        """Returns (form, cookie) of a form that this browser was shown; ErrorPage otherwise (C03 to C05).

        Its CSRF value fits the cookie, and no other site sent it.
        """
        rate_limit(self._limiter, self._settings, "authorize", request)
        site = request.header("sec-fetch-site")
        if site not in (None, "same-origin") or (
            site is None and request.header("origin") not in (None, self._settings.public_url)
        ):
            raise ErrorPage("foreign_form")
        values = parse_form(request.read_body(self._settings.max_form), ErrorPage("malformed"))
        form = {name: items[0] for name, items in values.items() if len(items) == 1}
        cookie = self.cookie(request, cookie_name)
        if not cookie or not hmac.compare_digest(
            self.csrf(cookie, purpose + form.get("login", "")).encode(), form.get("csrf", "").encode()
        ):
            raise ErrorPage("wrong_browser")
        return form, cookie

    @staticmethod
    def csrf(cookie: str, purpose: str) -> str:
        """Returns the value that a form for this purpose carries in this browser."""
        return b64url(hmac.digest(cookie.encode(), purpose.encode(), "sha256"))

    def cookie(self, request: Request, wanted: str) -> str | None:
        """Returns the value of our cookie, None when it is absent or not ours; two are an attack (C16)."""
        values = [
            value
            for line in request.headers.get("cookie", ())
            for name, _, value in (pair.strip().partition("=") for pair in line.split(";"))
            if name == wanted
        ]
        if len(values) > 1:
            raise ErrorPage("two_cookies")
        return values[0] if values and re.fullmatch(r"[A-Za-z0-9_-]{43}", values[0]) else None

    def mark(self, request: Request) -> tuple[str, Headers]:
        """Returns (the browser's cookie, the headers that set it).

        The cookie is made if the browser has none. Several tabs share one (C07).
        """
        cookie = self.cookie(request, self.name) or new_secret()
        return cookie, (self.set_cookie(self.name, cookie, self._settings.login_lifetime),)

    def set_cookie(self, name: str, value: str, seconds: float) -> tuple[str, str]:
        """Returns the header that sets a cookie for so long."""
        return "Set-Cookie", f"{name}={value}; Max-Age={int(seconds)}{self._flags}"


class ForgejoLogins:
    """Logins at Forgejo: each is kept for the browser that began it, and finished with Forgejo's code."""

    def __init__(
        self, services: OAuthServices, upstream: ForgejoCredentials, forgejo: Forgejo, forms: BrowserForms
    ) -> None:
        self._settings = services.settings
        self._store = services.store
        self._keyring = services.keyring
        self._log = services.log
        self._clock = services.clock
        self._upstream = upstream
        self._forgejo = forgejo
        self._forms = forms

    @staticmethod
    def way() -> dict[str, str]:
        """Returns a new state and PKCE verifier for a login at Forgejo."""
        return {"way": new_secret(), "verifier": new_secret()}

    def keep(self, kind: str, login: dict[str, Any], cookie: str, form_hash: bytes, decided: str) -> bool:
        """Keeps a login that only this browser can finish.

        Returns False when its form was answered before.
        """
        now = self._clock.now()
        state_hash = token_hash(login["way"])
        denied = decided == "deny"
        sealed = None if denied else self._keyring.seal("login", state_hash.hex(), login)
        return self._store.approve_login(
            state_hash,
            form_hash,
            token_hash(cookie),
            kind,
            sealed,
            now + self._settings.login_lifetime,
            now if denied else None,
            decided,
        )

    def redirect(self, login: dict[str, Any], cookie: str) -> Response:
        """Returns the redirect to Forgejo's login; the browser's cookie lives as long as the login."""
        challenge = b64url(hashlib.sha256(login["verifier"].encode()).digest())
        response = redirect(self._forgejo.authorize_url(login["way"], challenge))
        mark = self._forms.set_cookie(self._forms.name, cookie, self._settings.login_lifetime)
        return replace(response, headers=(*response.headers, mark))

    @contextlib.contextmanager
    def turn(self, state_hash: bytes) -> Iterator[None]:
        """One callback of a state at a time, over all brokers.

        A second one (a double click, a reload) waits for the first one's answer.
        """
        with self._upstream.callback(state_hash.hex(), FINISH_WAIT) as is_ours:
            if not is_ours:
                raise temporarily("Forgejo takes long to answer; try again in a moment.", 5)
            yield

    def finish(self, form: dict[str, list[str]], verifier: str) -> UserInfo:
        """Returns the user who logged in at Forgejo; AuthorizationError in our words, never Forgejo's."""
        if "error" in form:
            denied = form["error"][0] == "access_denied"
            raise AuthorizationError(
                "access_denied" if denied else "server_error",
                "The login at Forgejo was refused" if denied else "Forgejo could not log the person in",
                "forgejo_denied" if denied else "forgejo_failed",
            )
        try:
            return self._upstream.login(form["code"][0], verifier)
        except UpstreamDown:
            raise AuthorizationError(
                "temporarily_unavailable", "Forgejo cannot be reached just now", "forgejo_down"
            ) from None
        except UpstreamMisconfigured:
            raise AuthorizationError(
                "server_error", NOT_ACCEPTED.rstrip("."), "forgejo_misconfigured"
            ) from None
        except UpstreamRefused:
            raise AuthorizationError(
                "server_error", "Forgejo refused the login; the operator's log says why", "forgejo_refused"
            ) from None
        except NotAllowed as error:
            self._log.audit("access_refused", user=error.sub, login=error.login, reason=error.reason)
            signed_in = f" (you are signed in at Forgejo as {error.login})" if error.login else ""
            raise AuthorizationError("access_denied", error.reason + signed_in, "account_refused") from None


class AccountPages:
    """The account page: a user's connected applications, seen and ended by that user alone."""

    def __init__(
        self,
        services: OAuthServices,
        forms: BrowserForms,
        logins: ForgejoLogins,
        session_ended: Callable[[bytes], object],
    ) -> None:
        self._services = services
        self._settings = services.settings
        self._store = services.store
        self._log = services.log
        self._clock = services.clock
        self._limiter = services.limiter
        self._forms = forms
        self._logins = logins
        self._session_ended = session_ended  # called with the hash of a session whose row is gone
        self._forgejo_host = urlsplit(services.settings.forgejo_url).netloc

    def show(self, request: Request) -> Response:
        """GET /account: a user's connected applications, after a login that is bound to this browser."""
        rate_limit(self._limiter, self._settings, "authorize", request)
        cookie = self._forms.cookie(request, self._forms.account_name)
        user = self._store.account(token_hash(cookie), self._clock.now()) if cookie else None
        if cookie is None or user is None:
            browser, headers = self._forms.mark(request)
            return account_login_page(self._forgejo_host, self._forms.csrf(browser, "account login"), headers)
        row = self._store.user(user.sub)
        granted = row.upstream_scope if row else None
        missing = missing_scopes(self._settings.forgejo_oauth_scopes, granted) if granted is not None else []
        applications = self._applications(user.sub)
        left = [(each.name, self._rights_of(user.sub, each.client_id)) for each in applications]
        return account_page(
            user.login,
            self._forgejo_host,
            self._settings.resource,
            applications,
            self._forms.csrf(cookie, "account"),
            Html(missing_rights(missing, self._settings.forgejo_url) + rules_note(left)),
        )

    def _rights_of(self, sub: str, client_id: str) -> str:
        """Returns what the operator's rules leave to a user through one application; empty without rules."""
        user = self._store.user(sub) if self._settings.tool_rules else None
        if user is None:
            return ""
        return rights_sentence(
            rights_of(self._settings.tool_rules, user.sub, user.login, user.groups, client_id)
        )

    def _applications(self, sub: str) -> list[Application]:
        """Returns a user's applications, the last used first; several logins of one application are one."""
        grants: dict[str, list[AccountGrantRow]] = {}
        for grant in self._store.grants_of(sub, self._clock.now()):
            grants.setdefault(grant.client_id, []).append(grant)
        sessions: dict[str, list[OpenSession]] = {}
        for row in self._store.sessions_of(sub)[:MAX_SHOWN_SESSIONS]:
            session = OpenSession(row.hash.hex(), row.created_at, row.used_at)
            sessions.setdefault(row.client_id, []).append(session)
        return [
            Application(
                client_id=client_id,
                name=logins[0].name or client_id,
                may_write=any(WRITE in grant.scope.split() for grant in logins),
                destinations=self._destinations(client_id),
                used=max(grant.used_at for grant in logins),
                sessions=sessions.get(client_id, []),
            )
            for client_id, logins in grants.items()
        ]

    def _destinations(self, client_id: str) -> str:
        """Returns where an application's answers go, for people."""
        client = self._store.client(client_id)
        places = dict.fromkeys(map(destination, client.redirect_uris if client else ()))
        return ", ".join(places) or "an address that is no longer registered"

    def login(self, request: Request) -> Response:
        """POST /account/login: to Forgejo, and back to the account page."""
        _, cookie = self._forms.posted(request, self._forms.name, "account login")
        login = self._logins.way()
        self._logins.keep("account", login, cookie, token_hash(new_secret()), "")
        return self._logins.redirect(login, cookie)

    def open(self, info: UserInfo, now: float) -> Response:
        """Returns the redirect of a browser to its account page, which it may see from now on."""
        cookie = new_secret()  # a new one at each login: one that somebody planted before is worth nothing
        self._store.open_account(token_hash(cookie), info.sub, now + ACCOUNT_LIFETIME)
        self._log.audit("account_opened", user=info.sub, login=info.login)
        response = redirect(self._settings.public_url + "/account")
        return replace(
            response,
            headers=(
                *response.headers,
                self._forms.set_cookie(self._forms.account_name, cookie, ACCOUNT_LIFETIME),
            ),
        )

    def end(self, request: Request) -> Response:
        """POST /account/end: ends all grants, one application's, one session or this login, of this user."""
        form, cookie = self._forms.posted(request, self._forms.account_name, "account")
        now = self._clock.now()
        user = self._store.account(token_hash(cookie), now)
        if user is None:
            raise ErrorPage("expired")
        for grant in self._store.grants_of(user.sub, now):
            if form.get("all") or grant.client_id == form.get("client"):
                end_grant(self._services, grant, "ended by the user")
        reason = "ended by the user"
        for session in self._store.sessions_of(user.sub):
            if session.hash.hex() == form.get("session") and self._store.end_session(session.hash, reason):
                self._session_ended(session.hash)
        if form.get("leave"):
            self._store.close_account(token_hash(cookie))
        return redirect(self._settings.public_url + "/account")


class AuthorizationEndpoint:
    """The authorization endpoint (RFC 6749 3.1): consent page, login at Forgejo, answer to the client."""

    def __init__(
        self,
        services: OAuthServices,
        clients: Clients,
        forms: BrowserForms,
        logins: ForgejoLogins,
        accounts: AccountPages,
    ) -> None:
        self._settings = services.settings
        self._store = services.store
        self._keyring = services.keyring
        self._log = services.log
        self._clock = services.clock
        self._limiter = services.limiter
        self._clients = clients
        self._forms = forms
        self._logins = logins
        self._accounts = accounts

    def authorize(self, request: Request) -> Response:
        """GET /oauth/authorize: validate, then show our own consent page.

        Nothing is stored and nothing goes to Forgejo yet.
        """
        rate_limit(self._limiter, self._settings, "authorize", request)
        form = parse_form(request.query, ErrorPage("malformed"))
        client, redirect_uri = self._authorized_target(form, request)
        try:
            login = self._authorization_request(form, client, redirect_uri)
        except AuthorizationError as error:
            login = {"redirect_uri": redirect_uri, "state": form.get("state", [None])[0]}
            return replace(self._to_client(login, **error.answer), cause=error.cause)
        self._log.connect_step("authorize", client.client_id, client.name)
        cookie, headers = self._forms.mark(request)
        # The way to Forgejo is in the form, so that the same decision sent twice is answered twice alike.
        login |= {"expires": self._clock.now() + self._settings.login_lifetime, **self._logins.way()}
        box = b64url(self._keyring.seal("login", token_hash(cookie).hex(), login))
        question = ConsentQuestion(
            client_name=client.name,
            client_id=client.client_id,
            client_host=urlsplit(client.client_id).hostname if client.kind == "document" else None,
            unconfirmed_since=client.confirmed_at if client.fetched_at != client.confirmed_at else None,
            redirect_uri=redirect_uri,
            may_write=WRITE in login["scope"],
            forgejo_scopes=self._settings.forgejo_oauth_scopes,
            forgejo_url=self._settings.forgejo_url,
            account=urlsplit(self._settings.public_url).netloc + "/account",
            lifetime=self._settings.refresh_token_lifetime,
            login_box=box,
            csrf=self._forms.csrf(cookie, "consent:" + box),
        )
        return consent_page(question, headers)

    def _authorized_target(self, form: dict[str, list[str]], request: Request) -> tuple[ClientRow, str]:
        """Returns the client and its validated redirect URI; until then errors are shown, not redirected."""
        if len(form.get("client_id", ())) > 1 or len(form.get("redirect_uri", ())) > 1:
            raise ErrorPage("repeated")
        client_id = form.get("client_id", [""])[0]
        request.context.client = client_id
        client = self._clients.for_login(client_id, request)
        if client is None:
            raise ErrorPage("unreadable_client" if client_id.startswith("https://") else "unknown_client")
        request.context.client_name = client.name
        redirect_uri = form.get("redirect_uri", [""])[0]
        if not any(redirect_matches(registered, redirect_uri) for registered in client.redirect_uris):
            raise ErrorPage("redirect_uri")
        return client, redirect_uri

    def _authorization_request(
        self, form: dict[str, list[str]], client: ClientRow, redirect_uri: str
    ) -> dict[str, Any]:
        """Returns the login that the rest of the request asks for; AuthorizationError says what is wrong."""
        one = {name: values[0] for name, values in form.items()}
        pkce = one.get("code_challenge_method") == "S256" and re.fullmatch(
            r"[A-Za-z0-9_-]{43}", one.get("code_challenge", "")
        )
        for wrong, error, description in (
            (
                any(len(values) > 1 for name, values in form.items() if name != "resource"),
                "invalid_request",
                "A parameter is given more than once",
            ),
            ("request" in one, "request_not_supported", "Request objects are not supported"),
            ("request_uri" in one, "request_uri_not_supported", "Request objects are not supported"),
            (not one.get("response_type"), "invalid_request", "response_type is missing"),
            (one.get("response_type") != "code", "unsupported_response_type", "response_type must be code"),
            (one.get("response_mode", "query") != "query", "invalid_request", "response_mode must be query"),
            (not pkce, "invalid_request", NO_PKCE),
            (
                not is_our_resource(form.get("resource", ()), self._settings),
                "invalid_target",
                f"resource must be {self._settings.resource}",
            ),
            (
                len(one.get("state", "")) > 2048 or len(one.get("scope", "")) > 4096,
                "invalid_request",
                "state or scope is too long",
            ),
            ("none" in one.get("prompt", "").split(), "interaction_required", "A person has to consent"),
        ):
            if wrong:
                raise AuthorizationError(error, description, "no_pkce" if description == NO_PKCE else "")
        return {
            "client": client.client_id,
            "redirect_uri": redirect_uri,
            "state": one.get("state"),
            "challenge": one["code_challenge"],
            "scope": known_scopes(one.get("scope", "")) or list(SCOPES),
        }

    def consent(self, request: Request) -> Response:
        """POST /oauth/consent: the decision, only from the browser that was shown the page (C02 to C05)."""
        form, cookie = self._forms.posted(request, self._forms.name, "consent:")
        box = form.get("login", "")
        try:
            login = self._logins.way() | self._keyring.unseal(
                "login", token_hash(cookie).hex(), unb64url(box)
            )
        except ValueError:
            raise ErrorPage("wrong_browser") from None
        request.context.client = login["client"]
        decision = form.get("decision")
        access = form.get("access")
        if decision not in ("approve", "deny") or (decision == "approve" and access not in ("full", "read")):
            raise ErrorPage("undecided")
        # Reading is less than writing, so read only is a
        # narrower grant even where only forgejo:write was asked.
        granted = login["scope"] if access == "full" and WRITE in login["scope"] else [READ]
        denied = decision == "deny"
        if login["client"] == TRIAL_CLIENT and not denied:
            raise ErrorPage("unknown_client")
        decided = "deny" if denied else " ".join(granted)
        if self._decided(cookie, box, {**login, "granted": granted}, decided):
            self._log.audit(
                "consent_refused" if denied else "consent_given",
                client=login["client"],
                scope=" ".join(granted),
            )
            if not denied:
                self._count_step("consent", login["client"])
        if denied:
            response = self._to_client(login, error="access_denied", error_description="The person refused")
            return replace(response, cause="access_denied")
        return self._logins.redirect(login, cookie)

    def _decided(self, cookie: str, box: str, login: dict[str, Any], decided: str) -> bool:
        """Keeps the decision on a form; False for the same decision sent again while its login lives.

        Raises ErrorPage for another decision than the first (C05), or a form that is too old.
        """
        now = self._clock.now()
        form_hash = token_hash(box)
        earlier = self._store.answered_form(form_hash, now)
        if earlier is None:
            if login["expires"] <= now:
                raise ErrorPage("expired")
            if self._logins.keep("client", login, cookie, form_hash, decided):
                return True
            earlier = self._store.answered_form(form_hash, now)  # the other click was faster
        if earlier is None or (earlier.state_hash, earlier.decision) != (token_hash(login["way"]), decided):
            raise ErrorPage("answered")
        return False

    def callback(self, request: Request) -> Response:
        """GET /oauth/callback: Forgejo's answer, taken once and only in the browser that consented."""
        rate_limit(self._limiter, self._settings, "authorize", request)
        form = parse_form(request.query, ErrorPage("malformed_answer"))
        if (
            any(len(values) > 1 for values in form.values())
            or not form.get("state")
            or ("code" in form) == ("error" in form)
            or form.get("iss", [self._settings.forgejo_url])[0].rstrip("/") != self._settings.forgejo_url
        ):  # RFC 9207 2.4
            raise ErrorPage("malformed_answer")
        state = form["state"][0]
        state_hash = token_hash(state)
        row = self._store.login(state_hash, self._clock.now())
        if row is None:
            raise ErrorPage("expired")
        cookie = self._forms.cookie(request, self._forms.name)
        if not cookie or not hmac.compare_digest(token_hash(cookie), row.browser_hash):
            raise ErrorPage("wrong_browser")
        with self._logins.turn(state_hash):
            taken = self._store.take_login(state_hash, self._clock.now())
            if taken is None:
                return self._answered_before(state_hash)
            try:
                login = self._keyring.unseal("login", state_hash.hex(), taken.sealed or b"")
            except ValueError:
                raise ErrorPage("expired") from None
            request.context.client = login.get("client")
            return self._finished(taken.kind, login, form, state_hash)

    def _answered_before(self, state_hash: bytes) -> Response:
        """The answer to a callback that comes again: the first one's while it is of use, then a page."""
        now = self._clock.now()
        row = self._store.login(state_hash, now)
        if row is None or row.answer is None:  # refused by the person, or lost in a crash
            raise ErrorPage("expired")
        try:
            answer = self._keyring.unseal("answer", state_hash.hex(), row.answer)
        except ValueError:
            raise ErrorPage("expired") from None
        code = self._store.code(token_hash(answer["code"])) if answer["code"] else None
        if code and code.used_at is not None:
            return connected_page()
        if answer["code"] and (code is None or code.expires_at <= now or code.ended_at is not None):
            raise ErrorPage("expired")
        response = redirect(answer["location"])
        return replace(response, headers=(*response.headers, *map(tuple, answer["headers"])))

    def _answer_box(self, state_hash: bytes, response: Response, code: str = "") -> bytes:
        """Returns the answer of a callback, sealed, as `_answered_before` reads it."""
        headers = dict(response.headers)
        location = headers.pop("Location")
        kept = [(name, value) for name, value in headers.items() if name == "Set-Cookie"]
        return self._keyring.seal(
            "answer", state_hash.hex(), {"location": location, "headers": kept, "code": code}
        )

    def _finished(
        self, kind: str, login: dict[str, Any], form: dict[str, list[str]], state_hash: bytes
    ) -> Response:
        """Returns the answer to a login's callback, and keeps it for the same callback sent again."""
        now = self._clock.now()
        try:
            info = self._logins.finish(form, login["verifier"])
            if kind != "account":
                return self._client_answered(login, info, now, state_hash)
            response = self._accounts.open(info, now)
        except AuthorizationError as error:
            if kind == "account":
                raise ErrorPage("not_logged_in", error.description + ".") from None
            response = replace(self._to_client(login, **error.answer), cause=error.cause)
        with contextlib.suppress(StoreUnavailable):  # this answer is good; only a repetition would find none
            self._store.answer_login(state_hash, self._answer_box(state_hash, response))
        return response

    def _client_answered(
        self, login: dict[str, Any], info: UserInfo, now: float, state_hash: bytes
    ) -> Response:
        """Returns the redirect to the client with the code of a new grant (RFC 6749 4.1.2)."""
        code = new_secret("fjc_")
        response = self._to_client(login, code=code)
        code_expires = now + self._settings.code_lifetime
        grant_id = self._store.finish_login(
            info.sub,
            login["client"],
            " ".join(login["granted"]),
            " ".join(login["scope"]),
            self._settings.resource,
            token_hash(code),
            login["redirect_uri"],
            login["challenge"],
            now,
            code_expires,
            code_expires,
            (state_hash, self._answer_box(state_hash, response, code)),
        )
        self._log.audit(
            "login",
            user=info.sub,
            login=info.login,
            client=login["client"],
            grant=grant_id,
            scope=" ".join(login["granted"]),
        )
        self._count_step("login", login["client"])
        return response

    def _count_step(self, step: str, client_id: str) -> None:
        """Counts a step of connecting for a client that is known by its id only."""
        client = self._clients.find(client_id)
        self._log.connect_step(step, client_id, client.name if client else "")

    def _to_client(self, login: dict[str, Any], **answer: str) -> Response:
        """Returns the authorization response, to the validated URI: `iss` (RFC 9207 2), exact `state`."""
        if login["state"] is not None:
            answer["state"] = login["state"]
        return redirect(with_query(login["redirect_uri"], {**answer, "iss": self._settings.public_url}))


class TokenEndpoint:
    """The token endpoint (RFC 6749 3.2) and the revocation endpoint (RFC 7009), with the rules of grants."""

    def __init__(self, services: OAuthServices, clients: Clients, upstream: ForgejoCredentials) -> None:
        self._services = services
        self._settings = services.settings
        self._store = services.store
        self._keyring = services.keyring
        self._log = services.log
        self._clock = services.clock
        self._limiter = services.limiter
        self._clients = clients
        self._upstream = upstream

    def token(self, request: Request) -> Response:
        """POST /oauth/token (RFC 6749 4.1.3 and 6)."""
        client, form, resources = self._authenticated(request, "code", "refresh_token")
        grant_types = {"authorization_code": self._redeem, "refresh_token": self._refresh}
        if not form.get("grant_type"):
            raise OAuthError("invalid_request", "grant_type is missing.")
        if form["grant_type"] not in grant_types:
            raise OAuthError(
                "unsupported_grant_type", "grant_type must be authorization_code or refresh_token."
            )
        if not is_our_resource(resources, self._settings):
            raise OAuthError("invalid_target", f"resource must be {self._settings.resource}.")
        return json_response(200, grant_types[form["grant_type"]](client, form), NO_STORE)

    def _authenticated(
        self, request: Request, *token_names: str
    ) -> tuple[ClientRow, dict[str, str], list[str]]:
        """Returns (client, form, resources) of a request with a token in one of these fields.

        Whoever holds a token that we issued is limited by its grant,
        whatever address they share; all others by their address.
        """
        # A charset is ignored: this type has none (WHATWG URL
        # 5), and clients write several for the same ASCII.
        kind = (request.header("content-type") or "").partition(";")[0]
        if kind.strip().lower() != "application/x-www-form-urlencoded":
            raise OAuthError("invalid_request", "Send the parameters as application/x-www-form-urlencoded.")
        if request.query:
            raise OAuthError(
                "invalid_request", "Send the parameters in the body; secrets do not belong in a URL."
            )
        values = parse_form(self._form_body(request), OAuthError("invalid_request", "The body is malformed."))
        resources = values.get("resource", [])
        form = {name: items[0] for name, items in values.items()}
        for name, items in values.items():
            if len(items) > 1 and name != "resource":
                raise OAuthError("invalid_request", f"{name[:40]} is given more than once.")
        token = next((form[name] for name in token_names if form.get(name)), "")
        row = (
            self._store.code(token_hash(token)) or self._store.refresh_token(token_hash(token))
            if token
            else None
        )
        if row:
            request.seat.take(
                "requests", f"grant {row.grant_id}", self._settings.max_requests_per_user
            )  # many logins share a hosted client's address
            self._limiter.spend("grant", row.grant_id, GRANT_RATE)
        else:
            rate_limit(self._limiter, self._settings, "token", request)
        return self._clients.authenticate(request, form), form, resources

    def _form_body(self, request: Request) -> bytes:
        """Returns the body of a token request.

        For an address above its rate only a body that has arrived already, else HTTPError 429. Such an
        address is not refused unread: the body may name a login that has a rate of its own.
        """
        rate = self._settings.rate_token
        if not has_rate(request) or not self._limiter.is_spent("token", network_of(request.address), rate):
            return request.read_body(self._settings.max_form)
        try:
            return request.read_body(self._settings.max_form, SPENT_PATIENCE)
        except HTTPError as error:
            if error.status == 408:
                rate_limit(self._limiter, self._settings, "token", request)
            raise

    def _redeem(self, client: ClientRow, form: dict[str, str]) -> dict[str, object]:
        """Returns the tokens for an authorization code, which is used up (RFC 6749 4.1.3, RFC 7636 4.6)."""
        verifier = form.get("code_verifier", "")
        code = form.get("code", "")
        if not code:
            raise OAuthError("invalid_request", "code is missing.")
        if not re.fullmatch(r"[A-Za-z0-9._~-]{43,128}", verifier):
            raise OAuthError("invalid_request", "code_verifier is missing or malformed (RFC 7636 4.1).")
        now = self._clock.now()
        pair = self._new_pair()
        challenge = b64url(hashlib.sha256(verifier.encode()).digest())
        row = self._store.code(token_hash(code))
        if row:
            self._check_user(row)
        grant = self._store.redeem_code(
            token_hash(code),
            client.client_id,
            form.get("redirect_uri", ""),
            challenge,
            now,
            *self._hashed(pair, now),
            CODE_ATTEMPTS,
        )
        if grant is None:
            # A code that comes twice was stolen from one of the
            # two: what the first made ends (RFC 6749 4.1.2).
            row = self._store.code(token_hash(code))  # read anew: the first may have come since
            if row and row.used_at is not None and row.client_id == client.client_id:
                end_grant(self._services, row, "code replayed", "reuse_detected")
            sentence = "The code is unknown, expired or used, or belongs to another request. Start again."
            if row and row.used_at is None and row.expires_at <= now:
                raise self._expired(row.expires_at, now, sentence, "code_expired")
            used = row is not None and row.used_at is not None
            raise OAuthError("invalid_grant", sentence, cause="code_used" if used else "bad_code")
        self._log.audit(
            "token_issued", user=grant.sub, client=client.client_id, grant=grant.grant_id, scope=grant.scope
        )
        self._log.connect_step("token", client.client_id, client.name)
        return self._pair_answer(pair, grant.scope, self._settings.access_token_lifetime)

    def _refresh(self, client: ClientRow, form: dict[str, str]) -> dict[str, object]:
        """Returns a rotated refresh token with its access token, or the newest pair of its chain.

        A client that lost an answer, or two of its processes, re-send a token
        shortly after its rotation: within 120 s that is answered with the
        newest pair. Later it is theft, and the grant ends (RFC 9700 4.14.2).
        """
        token = form.get("refresh_token", "")
        now = self._clock.now()
        for _ in range(100):
            row = self._store.refresh_token(token_hash(token)) if token.startswith("fjr_") else None
            if (
                row is None or row.client_id != client.client_id
            ):  # another client's mistake must not end our client's grant
                raise OAuthError(
                    "invalid_grant", "The refresh token is unknown. Log in again.", cause="bad_refresh_token"
                )
            scope = self._narrowed(form.get("scope", ""), row.scope)
            if row.ended_at is not None:
                raise OAuthError("invalid_grant", "The login has ended. Log in again.", cause="login_ended")
            if row.expires_at <= now:
                raise self._expired(
                    row.expires_at, now, "The login has ended. Log in again.", "login_expired"
                )
            self._check_user(row)
            if row.rotated_at is None:
                pair = self._new_pair()
                box = self._keyring.chained(token).seal("successor", str(row.grant_id), pair)
                if self._store.rotate(token_hash(token), scope, now, *self._hashed(pair, now), box):
                    self._log.audit(
                        "token_refreshed", user=row.sub, client=client.client_id, grant=row.grant_id
                    )
                    return self._pair_answer(pair, scope, self._settings.access_token_lifetime)
                continue  # another request was faster: the next look finds what it made
            pair = self._successor(token, row, row.rotated_at, now)
            newer = self._store.refresh_token(token_hash(pair["refresh"]))
            access = self._store.access_token(token_hash(pair["access"]))
            usable = newer is not None and newer.rotated_at is None
            if usable and access and access.expires_at > now and access.scope == scope:
                return self._pair_answer(pair, scope, access.expires_at - now)
            token = pair[
                "refresh"
            ]  # the newest pair has another scope than this request asks for: it is rotated
        raise OAuthError("invalid_grant", "The refresh token is too old. Log in again.")

    def _expired(self, expires_at: float, now: float, sentence: str, cause: str) -> HTTPError:
        """Returns the refusal of an expired code or token.

        If only a step of the wall clock expired it, it may be good again soon.
        """
        if now - self._clock.leap() < expires_at:
            return temporarily(CLOCK_WAS_SET, 60, "clock_was_set")
        return OAuthError("invalid_grant", sentence, cause=cause)

    def _check_user(self, row: CodeRow | RefreshTokenRow) -> None:
        """Raises OAuthError while Forgejo shuts a token's user out, who may be readmitted by now."""
        if row.status == "suspended" and self._upstream.readmitted(row.sub):
            return
        if row.status != "active":
            raise OAuthError(
                "invalid_grant", LOGGED_OUT, cause="suspended" if row.status == "suspended" else "logged_out"
            )

    def _successor(self, token: str, row: RefreshTokenRow, rotated_at: float, now: float) -> dict[str, str]:
        """Returns a rotated token's successors; reuse after the grace ends the grant (RFC 9700 4.14.2)."""
        grace_ends = rotated_at + REFRESH_GRACE
        if grace_ends < now <= grace_ends + self._clock.leap():
            raise temporarily(CLOCK_WAS_SET, 60, "clock_was_set")
        if now > grace_ends:
            end_grant(self._services, row, "refresh token re-used", "reuse_detected")
        else:
            with contextlib.suppress(ValueError):
                pair: dict[str, str] = self._keyring.chained(token).unseal(
                    "successor", str(row.grant_id), row.successor or b""
                )
                return pair
        raise OAuthError(
            "invalid_grant", "The refresh token was used before. Log in again.", cause="refresh_token_reused"
        )

    @staticmethod
    def _narrowed(asked: str, granted: str) -> str:
        """Returns the scopes that are both asked and granted, or the grant's where there are none.

        Clients repeat at each refresh what they asked at first, which the person may have narrowed (RFC 6749
        6 would refuse it).
        """
        return " ".join(scope for scope in known_scopes(asked) if scope in granted.split()) or granted

    @staticmethod
    def _new_pair() -> dict[str, str]:
        return {"access": new_secret("fja_"), "refresh": new_secret("fjr_")}

    def _hashed(self, pair: dict[str, str], now: float) -> tuple[tuple[bytes, float], tuple[bytes, float]]:
        return (
            (token_hash(pair["access"]), now + self._settings.access_token_lifetime),
            (token_hash(pair["refresh"]), now + self._settings.refresh_token_lifetime),
        )

    @staticmethod
    def _pair_answer(pair: dict[str, str], scope: str, expires_in: float) -> dict[str, object]:
        return {
            "access_token": pair["access"],
            "token_type": "Bearer",
            "expires_in": max(1, int(expires_in)),
            "refresh_token": pair["refresh"],
            "scope": scope,
        }

    def revoke(self, request: Request) -> Response:
        """POST /oauth/revoke (RFC 7009): ends a refresh token's grant, or an access token. Always 200."""
        client, form, _ = self._authenticated(request, "token")
        token = form.get("token", "")
        if not token:
            raise OAuthError("invalid_request", "token is missing.")
        refresh = self._store.refresh_token(token_hash(token))
        access = self._store.access_token(token_hash(token))
        if refresh and refresh.client_id == client.client_id:
            end_grant(self._services, refresh, "revoked by client")
        elif access and access.client_id == client.client_id:
            self._store.drop_access_token(token_hash(token))
            self._log.audit("token_revoked", client=client.client_id)
        return json_response(200, {}, NO_STORE)


class Authorization:
    """The authorization server: its endpoints, each a function from Request to Response."""

    def __init__(
        self,
        services: OAuthServices,
        clients: Clients,
        upstream: ForgejoCredentials,
        forgejo: Forgejo,
        session_ended: Callable[[bytes], object],
    ) -> None:
        self._settings = services.settings
        self._clients = clients
        forms = BrowserForms(services.settings, services.limiter)
        logins = ForgejoLogins(services, upstream, forgejo, forms)
        accounts = AccountPages(services, forms, logins, session_ended)
        endpoint = AuthorizationEndpoint(services, clients, forms, logins, accounts)
        tokens = TokenEndpoint(services, clients, upstream)
        self.authorize = endpoint.authorize
        self.consent = endpoint.consent
        self.callback = endpoint.callback
        self.account = accounts.show
        self.account_login = accounts.login
        self.account_end = accounts.end
        self.token = tokens.token
        self.revoke = tokens.revoke

    def metadata(self, request: Request) -> Response:
        """GET /.well-known/oauth-authorization-server."""
        return server_metadata(self._settings, self._clients.documents.advertised)

    def resource_metadata(self, request: Request) -> Response:
        """GET /.well-known/oauth-protected-resource."""
        return resource_metadata(self._settings)


# ============================================================================================================
# Child process
# Owns processes: how a child is started, spoken to, stopped and reaped, and that none outlives the broker.
# Must not know JSON-RPC, sessions or users.
# ============================================================================================================

GUARDIAN_SCRIPT = r"""
trap '' TERM INT HUP
known=
while read -r what which; do
  left=
  for each in $known; do [ "$each" = "$which" ] || left="$left $each"; done
  known=$left
  [ "$what" = + ] && known="$known $which"
done
[ "$known" ] || exit 0
sleep 1
for each in $known; do
  case $each in stdin:*)
    for process in /proc/[0-9]*; do
      stdin="$(readlink "$process/fd/0" 2>/dev/null)"
      [ "$stdin" = "pipe:[${each#stdin:}]" ] && kill -KILL "-${process#/proc/}" 2>/dev/null
    done ;;
  *) kill -KILL "-$each" 2>/dev/null ;;
  esac
done
"""


class ChildMissing(Exception):
    """The program is not there, or is not one."""


class ChildFailed(Exception):
    """The program could not be started just now."""


def adopts_orphans() -> bool:
    """Returns whether processes whose parents end become children of this one.

    As process 1, or as a subreaper (prctl(2), PR_GET_CHILD_SUBREAPER).
    """
    is_subreaper = ctypes.c_int(0)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(37, ctypes.byref(is_subreaper), 0, 0, 0)
    return os.getpid() == 1 or bool(is_subreaper.value)


class Guardian:
    """A small shell that outlives the broker by a moment and kills its children, also after `kill -9`.

    It knows a child by its process group, and one that is about to start by the pipe of its standard input
    (`stdin:INODE`). So it also knows which processes the broker did not start: those can be reaped for
    others.
    """

    def __init__(self) -> None:
        # Guards the pipe and the sets, and that no process of ours starts meanwhile; a leaf.
        self._lock = threading.Lock()
        self._known: set[int | str] = set()
        self._ending: set[int] = set()  # forgotten, but not yet reaped by the thread that has to
        self._process: subprocess.Popen[bytes] | None = None

    def _tell(self, line: str) -> None:
        """Send a line; a guardian that has died is started anew and told everything. Under the lock."""
        with contextlib.suppress(OSError):
            if self._process and self._process.stdin and self._process.poll() is None:
                self._process.stdin.write(line.encode())
                return
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", GUARDIAN_SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            close_fds=True,
            bufsize=0,
            env={"PATH": os.defpath},
        )
        assert self._process.stdin
        self._process.stdin.write("".join(f"+ {each}\n" for each in self._known).encode())

    def watch(self, child: int | str) -> None:
        """Kill this one if the broker dies; OSError when no guardian can be had."""
        with self._lock:
            self._known.add(child)
            self._tell(f"+ {child}\n")

    def forget(self, child: int | str) -> None:
        """It is gone; told before a group's leader is reaped, so that a re-used number is never killed."""
        with self._lock, contextlib.suppress(OSError):
            if child in self._known and isinstance(child, int):
                self._ending.add(child)
            self._known.discard(child)
            self._tell(f"- {child}\n")

    def reaped(self, child: int) -> None:
        """Its number may be another's from now on."""
        with self._lock:
            self._ending.discard(child)

    def reap_adopted(self) -> None:
        """Reaps ended processes that became the broker's children, but none that it started itself.

        The broker's own threads wait for its children. A process whose parent ends becomes a child of process
        1, or of the nearest subreaper (prctl(2)), and stays a zombie until that one waits for it. A process
        of ours that is about to start is announced, and its number not known yet: the next call looks again.
        """
        with self._lock, contextlib.suppress(ChildProcessError):
            while not any(isinstance(each, str) for each in self._known):
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if found is None or found.si_pid in self._known | self._ending:
                    return
                if self._process and found.si_pid == self._process.pid:
                    self._process.wait()
                    continue
                os.waitpid(found.si_pid, 0)

    def close(self) -> None:
        """The broker ends in order and has stopped its children; what is left is killed."""
        with self._lock:
            if self._process:
                self._process.communicate()
                self._process = None


# What a child sends unasked costs a unit a piece and one for
# each FLOOD_UNIT bytes; above this it is read no faster.
FLOOD_UNIT = 8192
FLOOD_BURST = 4096
FLOOD_RATE = 1024  # units a second

ENVIRONMENT_PASSED = (
    "PATH",
    "HOME",
    "LANG",
    "TZ",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
)


# Where systems keep their certificate authorities in one file;
# the places where Go looks (crypto/x509, root_linux.go).
AUTHORITIES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/tls/cacert.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/cert.pem",
)


def authorities_file(settings: Settings) -> str:
    """Returns the path of a PEM file with the system's certificate authorities and `forgejo_ca_file`.

    It is written when it is not there. SSL_CERT_FILE replaces a program's own list of authorities, so the
    operator's one alone would take the public ones away. Where no such file can be written, `forgejo_ca_file`
    itself is returned: Go still reads the system's directory of certificates.
    """
    system = os.environ.get("SSL_CERT_FILE") or next(filter(os.path.isfile, AUTHORITIES), "")
    with contextlib.suppress(OSError):
        paths = [path for path in (system, settings.forgejo_ca_file) if path]
        # Go finds no certificate behind a byte order mark.
        wanted = b"\n".join(read_file(path).removeprefix(codecs.BOM_UTF8) for path in paths)
        folder = os.path.join(os.environ.get("TMPDIR") or "/tmp", f"fjmcp-broker-{os.geteuid()}")
        if not is_own_folder(folder):
            folder = os.path.dirname(os.path.abspath(settings.store_path))
        path = os.path.join(folder, f"authorities-{hashlib.sha256(wanted).hexdigest()[:16]}.pem")
        if not os.path.isfile(path) or read_file(path) != wanted:
            put_authorities(path, wanted)
        return path
    return os.path.abspath(settings.forgejo_ca_file)


def is_own_folder(path: str) -> bool:
    """Makes the folder if it is missing; returns whether nobody else can put anything into it.

    Others can make names in /tmp, too.
    """
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        found = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022


def put_authorities(path: str, content: bytes) -> None:
    """Writes the file whole or not at all.

    Where it stands beside the store, `check` may have written it as root for another user.
    """
    fresh = f"{path}.{os.getpid()}.{threading.get_ident()}"
    try:
        with open(fresh, "xb") as file:
            file.write(content)
        os.chmod(fresh, 0o644)
        os.replace(fresh, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(fresh)
        raise


def child_environment(settings: Settings, access_token: str) -> dict[str, str]:
    """Returns a child's whole environment: an allow-list and the user's own token.

    Nothing else of ours is inherited (P01, P02).
    """
    environment = {name: os.environ[name] for name in ENVIRONMENT_PASSED if name in os.environ}
    if settings.forgejo_ca_file:
        environment["SSL_CERT_FILE"] = authorities_file(settings)
    return environment | {
        "FORGEJO_ACCESS_TOKEN": access_token,
        "FORGEJO_URL": settings.forgejo_internal_url or settings.forgejo_url,
        "FORGEJO_USER_AGENT": f"fjmcp-broker/{__version__}",
    }


def signal_name(number: int) -> str:
    """Returns a signal's name; real-time signals have none in Python (signal(7))."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def find_program(name: str) -> str | None:
    """Returns the path of a program, which is looked for in PATH if the name has no slash; None without one.

    As shutil.which(), whose module brings in three kinds of compression: 0.5 MiB.
    """
    for folder in [""] if "/" in name else os.get_exec_path():
        path = os.path.join(folder, name)
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    return None


def child_command(settings: Settings) -> list[str]:
    """Returns a child's arguments, from the configuration alone (P08); ChildMissing without the program."""
    command = settings.forgejo_mcp_binary
    name = command if isinstance(command, str) else command[0]
    path = find_program(name)
    if path is None:
        raise ChildMissing(f"{name} is not an executable program")
    if not isinstance(command, str):
        return [path, *command[1:]]
    return [path, "--transport", "stdio", "--url", settings.forgejo_internal_url or settings.forgejo_url]


SHOWN_LINES = 50  # lines of stderr that are logged at once, at debug
STDERR_LINE = 2000  # bytes of a line of stderr that are looked at
LAST_WORDS = 10  # lines of stderr that are kept for the operator, should the child end unexpectedly
LAST_WORD = 400  # characters of each


class Child:
    """A running child: lines in, lines out, and a certain end.

    `on_line(bytes)` is called for each line of output and `on_end(child)` once, both in the stdout reader's
    thread. The child's own token stands in no line: a tool that quotes its request in an error text must not
    show it to a client or a model. `too_long` is the beginning of the line above `max_line` that ended it.
    """

    # Bytes of a piece of a line, below which the next one is added to it: a child that writes two bytes at a
    # time would else make an object of 35 bytes of each.
    SMALL = 4096

    def __init__(
        self,
        command: Sequence[str],
        environment: dict[str, str],
        label: str,
        guardian: Guardian,
        settings: Settings,
        log: Log,
        on_line: Callable[[bytes], object],
        on_end: Callable[[Child], object],
    ) -> None:
        self._guardian = guardian
        self._settings = settings
        self._log = log
        self._label = label
        self._on_line = on_line
        self._on_end = on_end
        self._write_lock = threading.Lock()  # one whole line at a time; guards _stdin
        # Guards reason, _kill_at, and that nobody signals a number given back; a leaf.
        self._lock = threading.Lock()
        self.reason: str | None = None
        self._kill_at = math.inf
        self.ended = threading.Event()
        self.pid = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._stdin: int | None = None
        self._exit: int | None = None
        # No line has a line feed in it.
        self._token = environment.get("FORGEJO_ACCESS_TOKEN", "").encode() or b"\n"
        self._last_words: collections.deque[str] = collections.deque(maxlen=LAST_WORDS)
        self.too_long = b""
        self.asked = False  # whether it was stopped because nobody needs it any more
        try:
            self._start(command, environment)
        except BaseException as error:  # what was started must not stay behind
            is_missing = self._process is None and isinstance(error, (FileNotFoundError, PermissionError))
            if self._process:
                self.kill("not started")
            self._release()
            if not isinstance(error, Exception):
                raise
            raise (ChildMissing if is_missing else ChildFailed)(
                f"{command[0]}: {getattr(error, 'strerror', None) or error}"
            ) from None

    def _start(self, command: Sequence[str], environment: dict[str, str]) -> None:
        stdin, self._stdin = os.pipe()
        announced = f"stdin:{os.fstat(stdin).st_ino}"
        try:
            self._guardian.watch(announced)
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                close_fds=True,
                bufsize=0,
            )
            self.pid = self._process.pid
            self._guardian.watch(self.pid)
        finally:
            os.close(stdin)
            self._guardian.forget(announced)
        os.set_blocking(self._stdin, False)
        self._exit = os.pidfd_open(self.pid)
        threading.Thread(target=self._run, daemon=True, name=f"stdout-{self.pid}").start()

    @property
    def alive(self) -> bool:
        """Returns whether it runs and has not been told to stop."""
        return self.reason is None

    def send(self, line: bytes, deadline: float = 10.0) -> bool:
        """Write a line; False when the child is gone or does not read.

        Half a line cannot be taken back, so that ends the child.
        """
        data = memoryview(line + b"\n")
        end = time.monotonic() + deadline
        with self._write_lock:
            while data and self._stdin is not None:
                try:
                    data = data[os.write(self._stdin, data) :]
                except BlockingIOError:
                    if time.monotonic() >= end or not self.alive:
                        self.kill("stuck")
                        return False
                    poll = select.poll()
                    poll.register(self._stdin, select.POLLOUT)
                    poll.poll(100)
                except OSError:
                    return False
            return not data

    def stop(self, reason: str, asked: bool = True) -> None:
        """Begin the end: close stdin, SIGTERM; tick() goes on to SIGKILL.

        The first reason stays, and whether we wanted it.
        """
        with self._lock:
            if self.reason is not None:
                return
            has_exited = self._has_exited()  # and nobody has noticed yet: that it did is the reason
            self.reason = "exited" if has_exited else reason
            self.asked = asked and not has_exited
            self._kill_at = time.monotonic() + self._settings.stop_timeout
        self._close_stdin()
        self._signal(signal.SIGTERM)

    def _has_exited(self) -> bool:
        """Returns whether the process has ended by itself; under the lock, so that its descriptor is open."""
        if self._exit is None or self.ended.is_set():
            return self.ended.is_set()
        poll = select.poll()
        poll.register(self._exit, select.POLLIN)
        return bool(poll.poll(0))

    def kill(self, reason: str) -> None:
        """End it now."""
        with self._lock:
            self.reason = self.reason or reason
            self._kill_at = 0.0
        self._signal(signal.SIGKILL)

    def tick(self) -> None:
        """Advance the end: SIGKILL when SIGTERM was not enough."""
        if time.monotonic() >= self._kill_at:
            self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        """Signal the whole group; its number cannot be another's, since the leader is reaped last."""
        with self._lock, contextlib.suppress(ProcessLookupError, PermissionError):
            if not self.ended.is_set():
                os.killpg(self.pid, number)

    def _close_stdin(self) -> None:
        with self._write_lock:
            if self._stdin is not None:
                os.close(self._stdin)
                self._stdin = None

    def _chunks(self, pipe: IO[bytes] | None) -> Iterator[bytes]:
        """Yields a pipe's bytes until its end, or until a second after the process's.

        Then only a grandchild holds it open.
        """
        assert pipe and self._exit is not None
        poll = select.poll()
        until: float | None = None
        poll.register(pipe, select.POLLIN)
        poll.register(self._exit, select.POLLIN)
        while until is None or time.monotonic() < until:
            ready = dict(poll.poll(until and max(0.0, until - time.monotonic()) * 1000))
            if pipe.fileno() in ready:
                chunk = os.read(pipe.fileno(), 65536)
                if not chunk:
                    return
                yield chunk
            if self._exit in ready:
                poll.unregister(self._exit)
                self._signal(signal.SIGKILL)  # stragglers of its group
                until = time.monotonic() + 1

    def _read_stdout(self) -> None:
        parts: list[bytes] = []
        size = 0
        assert self._process
        for chunk in self._chunks(self._process.stdout):
            # Most chunks of a long line end nothing, and to look for one byte is faster than a split.
            pieces = chunk.split(b"\n") if b"\n" in chunk else [chunk]
            for number, piece in enumerate(pieces, 1):
                if parts and len(parts[-1]) < self.SMALL:
                    parts[-1] += piece
                else:
                    parts.append(piece)
                size += len(piece)
                if size > self._settings.max_line:
                    self.too_long = b"".join(parts)[:LINE_HEAD]
                    self.kill("line_too_long")
                    return
                if number < len(pieces):
                    line = b"".join(parts).replace(self._token, b"[token]")
                    parts = []
                    size = 0
                    if line.strip():
                        self._on_line(line)

    def hold_back(self, seconds: float) -> None:
        """Waits so long, or until the process ends: the child's reader waits, then the child at its pipe."""
        if seconds > 0 and self._exit is not None:
            poll = select.poll()
            poll.register(self._exit, select.POLLIN)
            poll.poll(math.ceil(seconds * 1000))

    def _stderr_lines(self) -> Iterator[bytes]:
        """Yields lines without the token, of each the first STDERR_LINE bytes.

        A token may come in two pieces, or stand across that limit. Of a flood the middle of each chunk is
        read and dropped.
        """
        limit = STDERR_LINE + len(self._token)
        flood = Allowance(FLOOD_BURST, FLOOD_RATE)
        kept = b""
        assert self._process
        for chunk in self._chunks(self._process.stderr):
            *ended, rest = chunk.split(b"\n")
            if len(ended) > 2 * SHOWN_LINES:
                ended = [*ended[:SHOWN_LINES], *ended[-SHOWN_LINES:]]
            for piece in ended:
                yield self._shown(kept + piece[: limit - len(kept)])
                kept = b""
            kept += rest[: limit - len(kept)]
            self.hold_back(flood.spend(len(chunk) / FLOOD_UNIT))
        yield self._shown(kept)

    def _shown(self, line: bytes) -> bytes:
        across = line.find(self._token, max(0, STDERR_LINE - len(self._token) + 1))
        return line[: across if 0 <= across < STDERR_LINE else STDERR_LINE].replace(self._token, b"[token]")

    def _read_stderr(self) -> None:
        logged = Allowance(SHOWN_LINES, 5)
        for line in filter(bytes.strip, self._stderr_lines()):
            shown = line.decode("utf-8", "replace").rstrip()
            self._last_words.append(shown[:LAST_WORD])
            if logged.grants():
                self._log.event("debug", "child_stderr", user=self._label, line=shown)

    @property
    def last_words(self) -> list[str]:
        """The last lines it wrote to stderr, once it has ended."""
        return list(self._last_words)

    def _run(self) -> None:
        """Reads lines until the output ends; then the process is reaped and its end reported, once."""
        stderr = threading.Thread(target=self._read_stderr, daemon=True, name=f"stderr-{self.pid}")
        try:
            stderr.start()
            self._read_stdout()
        except Exception as error:
            self._log.event(
                "error", "reader_failed", user=self._label, error=f"{type(error).__name__}: {error}"
            )
        try:
            self.stop("exited", asked=False)
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            self._signal(signal.SIGKILL)
            if stderr.ident:
                stderr.join()
        # Whatever went wrong: the process is reaped, and the owners of its calls and slot hear of the end.
        finally:
            try:
                self._end(self._release())
            finally:
                self._on_end(self)

    def _end(self, status: int) -> None:
        if self.reason == "exited":
            self.reason = (
                f"killed by {signal_name(-status)}" if status < 0 else f"exited with status {status}"
            )

    def _release(self) -> int:
        """Reaps the process and frees its slot and pipes; returns its exit status (0 if it never started)."""
        if self.pid:
            self._guardian.forget(self.pid)
        with self._lock:
            self.ended.set()
        self._close_stdin()
        if self._exit is not None:
            os.close(self._exit)
        if self._process is None:
            return 0
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe:
                pipe.close()
        try:
            return self._process.wait()
        finally:
            self._guardian.reaped(self.pid)


# ============================================================================================================
# Calls
# Owns one request on its way to a child: what it asks, its
# states, its deadline and its one end, which is on record.
# Must not know eras, children or sessions; where an answer goes is for its subclasses to say.
# ============================================================================================================

MAX_LOGGED_NAME = 128  # characters of a tool's name in its record
MAX_TOLD_AGAIN = 1 << 20  # bytes of a call that are kept to ask it again, should its child want input first
# What a child may ask of a client, and the capability it needs.
ASKS = {"elicitation/create": "elicitation", "sampling/createMessage": "sampling", "roots/list": "roots"}
UNKNOWN_TOOL = "(unknown)"


def unavailable(reason: str, sentence: str, status: int = 503, wait: int = 5) -> RpcError:
    """Returns an RpcError for what is not available now: nothing was done (design 5).

    The client may try again after `wait` seconds.
    """
    data = {"reason": reason, "outcome_unknown": False, "retryable": True}
    return RpcError(SERVER_ERROR, sentence, data, status, (("Retry-After", str(wait)),))


def session_not_found() -> RpcError:
    """Returns the one error for a session that has ended, expired, is somebody else's or never was."""
    return RpcError(SESSION_NOT_FOUND, "Session not found. Start a new one with initialize.", None, 404)


def answer_dropped(request_id: object, code: int = SERVER_ERROR) -> bytes:
    """Returns the error for a client that comes back for an answer which was dropped (design 5)."""
    data = {"reason": "answer_dropped", "outcome_unknown": False, "retryable": False}
    return error_message(request_id, code, "The answer was given up; nobody came for it in time.", data)


def modern_answer_dropped(request_id: object) -> bytes:
    """Returns the same in the words of MCP 2026-07-28, which has no use for the code of the legacy era."""
    return answer_dropped(request_id, INTERNAL_ERROR)


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool in a child's list: its readOnlyHint, and the (path, name) of arguments with an x-mcp-header."""

    reads: bool
    mirrored: tuple[tuple[tuple[str, ...], str], ...]


class ListChanged(Exception):
    """The child's list of tools is not the one any more by which a call was judged."""


class ToolCallRecord:
    """The audit record of one tools/call: written once, by whatever ends the call.

    `is_listed` is asked when the record is written: a name that
    no child lists is a client's free text, and not logged.
    """

    def __init__(self, who: Mapping[str, object], tool: str, write: Callable[..., object]) -> None:
        self.tool = tool
        self.session: str | None = None  # as operators see its name
        self.is_listed: Callable[[str], bool] = lambda name: False
        self.is_written = False
        self._who = who
        self._write = write
        self._began = time.monotonic()

    def write(self, outcome: str) -> None:
        """Writes the record, unless it is written."""
        if self.is_written:
            return
        self.is_written = True
        tool = self.tool[:MAX_LOGGED_NAME] if self.is_listed(self.tool) else UNKNOWN_TOOL
        fields = {**self._who, "session": self.session, "tool": tool}
        self._write(outcome, time.monotonic() - self._began, fields)


class CallState(enum.Enum):
    """Where a call is."""

    NEW = "new"  # not sent yet
    SENT = "sent"  # its child works on it
    WAITING_FOR_CLIENT = "waiting for client"  # its child has asked the client something; the clock stands
    SUSPENDED = (
        "suspended"  # a modern client has `input_required` for an answer; its retry goes on with the call
    )
    DONE = "done"  # answered, be it with an error
    CANCELLED = "cancelled"  # its client wants no answer any more
    TIMED_OUT = "timed out"  # its child, or its client, did not answer in time


# fmt: off
ENDED = frozenset((CallState.DONE, CallState.CANCELLED, CallState.TIMED_OUT))
NEXT_STATES: dict[CallState, frozenset[CallState]] = {
    CallState.NEW:                ENDED | {CallState.SENT},
    CallState.SENT:               ENDED | {CallState.WAITING_FOR_CLIENT, CallState.SENT},
    CallState.WAITING_FOR_CLIENT: ENDED | {CallState.SENT, CallState.SUSPENDED},
    CallState.SUSPENDED:          ENDED | {CallState.SENT, CallState.WAITING_FOR_CLIENT},
    CallState.DONE:               frozenset(),
    CallState.CANCELLED:          frozenset(),
    CallState.TIMED_OUT:          frozenset(),
}
# fmt: on


@dataclass(frozen=True, slots=True)
class RequestMeta:
    """A request's description of its client (MCP 2026-07-28 `_meta`); None: the session's description."""

    capabilities: dict[str, object] | None = None
    client_info: dict[str, object] | None = None
    log_level: str | None = None


SESSION_META = RequestMeta()


def progress_token(params: dict[str, object] | None) -> object:
    """Returns the token under which a client wants to hear of progress: a text, or a number; else None."""
    token = member(member(params, "_meta", dict, None), "progressToken", object, None)
    return token if isinstance(token, float) or is_request_id(token) else None


class Call:
    """One request in the form that both eras share: `params` without its era's own fields.

    A subclass knows where answers go: notify(), answer(), give(), error(), refuse() and close() put them
    there, and finish() is the only one that lets them. `on_success` is called with the result before it is
    delivered, `on_done` once when nothing more can come. `listing` is the child's list of tools by which the
    call was judged; None: it was not judged by one.
    """

    is_internal = False
    may_be_cut_off = False

    def __init__(
        self, method: str, params: dict[str, object] | None, deadline: float, meta: RequestMeta = SESSION_META
    ) -> None:
        self.method = method
        self.params = params
        self.deadline = deadline
        self.meta = meta
        self.line: bytes | None = None  # what the child was told, if it may have to be told again
        self.progress_token = progress_token(params)
        self.state = CallState.NEW
        self.waiting_since: float | None = None  # since when the client owes an answer: the clock stands
        self.undeclared: dict[str, object] = {}  # what the child asked of a client that cannot do it
        self.input_responses: dict[str, object] = {}
        self.request_state: object = None  # of a modern child: what goes into the retry
        self.listing: dict[str, Tool] | None = None
        self.on_success: Callable[[object], object] | None = None
        self.on_done: Callable[[], object] | None = None
        self.record: ToolCallRecord | None = None
        self.outcome = "error"
        self.ended_suspended = False  # whether it ended while its client was to retry
        self._state_lock = threading.Lock()  # guards the state: one end; a leaf

    # -- where what comes back goes

    def notify(self, body: dict[str, object]) -> None:
        """Passes a notification on that belongs to this call."""

    def answer(self, line: bytes, message: Message) -> None:
        """Delivers the child's answer."""
        raise NotImplementedError

    def give(self, result: dict[str, object]) -> None:
        """Delivers a result of the broker's own."""
        raise NotImplementedError

    def error(self, code: int, text: str, data: object) -> None:
        """Delivers an error."""
        raise NotImplementedError

    def refuse(self, error: dict[str, object], undeclared: dict[str, object]) -> None:
        """Delivers an error of a child or a client; `undeclared`: what the client should have declared."""
        self.error(
            member(error, "code", int, INTERNAL_ERROR), str(error.get("message", "")), error.get("data")
        )

    def close(self) -> None:
        """Lets go of a client to which nothing can be delivered."""

    def fail(
        self,
        reason: str,
        sentence: str,
        *,
        retryable: bool,
        outcome_unknown: bool = True,
        code: int = SERVER_ERROR,
    ) -> None:
        """Delivers an error of the broker's own (design 5: the table of cases)."""
        data = {"reason": reason, "outcome_unknown": outcome_unknown, "retryable": retryable}
        self.error(code, sentence, data)
        self.outcome = "unknown" if outcome_unknown else "error"

    def fail_undelivered(self) -> None:
        """Ends a call with an error, because its answer or question cannot be delivered."""
        self.fail(
            "bad_answer",
            "The tool's answer could not be passed on; whether it did anything is not known.",
            retryable=False,
            code=INTERNAL_ERROR,
        )

    def put_away(self, line: bytes | None) -> None:
        """Lets go of what the call asks, which its child is told: for minutes it may wait for the answer.

        `line` is kept in its place, for a child that may have to be told again.
        """
        self.line = line if line is not None and len(line) <= MAX_TOLD_AGAIN else None
        self.params = None
        if self.meta.capabilities is not None:
            known: dict[str, object] = {name: {} for name in ASKS.values() if name in self.meta.capabilities}
            self.meta = RequestMeta(known, None, self.meta.log_level)

    # -- states

    def enter(self, state: CallState) -> bool:
        """Changes the state; returns False, changing nothing, where the table has no way there."""
        with self._state_lock:
            if state not in NEXT_STATES[self.state]:
                return False
            self.state = state
            return True

    def stop_clock(self) -> None:
        """The client owes an answer from now on."""
        if self.state is CallState.SENT:
            self.enter(CallState.WAITING_FOR_CLIENT)
        if self.waiting_since is None:
            self.waiting_since = time.monotonic()

    def start_clock(self) -> None:
        """The client owes nothing any more: its deadline moves by the time it took."""
        if self.waiting_since is not None:
            self.deadline += time.monotonic() - self.waiting_since
            self.waiting_since = None
        if self.state is CallState.WAITING_FOR_CLIENT:
            self.enter(CallState.SENT)

    def finish(
        self,
        log: Log,
        deliver: Callable[[], object] | None,
        state: CallState = CallState.DONE,
        outcome: str = "",
    ) -> None:
        """Ends the call, once: delivers its end (None: nobody waits), calls `on_done`, writes its record.

        Raises nothing. A delivery that raises would leave its client waiting for ever, since no deadline
        covers the call now: an error goes instead.
        """
        with self._state_lock:
            if self.state in ENDED:
                return
            self.ended_suspended = self.state is CallState.SUSPENDED
            self.state = state
        try:
            if deliver:
                deliver()
        except Exception as error:
            log.event("error", "delivery_failed", method=self.method, error=type(error).__name__)
            try:
                self.fail_undelivered()
            except Exception as again:
                log.event("error", "delivery_failed", method=self.method, error=type(again).__name__)
                self.close()
        finally:
            self._release(log)
            if self.record:
                self.record.write(outcome or ("cancelled" if state is CallState.CANCELLED else self.outcome))

    def _release(self, log: Log) -> None:
        try:
            if self.on_done:
                self.on_done()
        except Exception as error:
            log.event("error", "release_failed", method=self.method, error=type(error).__name__)


def outcome_of(message: Message) -> str:
    """Returns what a child's answer to tools/call says became of the call."""
    result = member(message.body, "result", dict, None)
    if result is None:
        return "error"
    task = member(result, "task", dict, result if result.get("resultType") == "task" else None)
    if member(task, "taskId", str, ""):
        return "started"
    return "tool_error" if result.get("isError") is True else "ok"


class InternalCall(Call):
    """A call of the broker's own: wait(seconds) returns the answer's body, or None."""

    is_internal = True

    def __init__(self, method: str, params: dict[str, object] | None, seconds: float) -> None:
        super().__init__(method, params, time.monotonic() + seconds)
        self.may_be_cut_off = False  # whether its child may be put to sleep meanwhile
        self._done = threading.Event()
        self.body: dict[str, object] | None = None

    def answer(self, line: bytes, message: Message) -> None:
        """Keeps the child's answer."""
        self.body = message.body
        self._done.set()

    def error(self, code: int, text: str, data: object) -> None:
        """There will be no answer."""
        self._done.set()

    def close(self) -> None:
        """There will be no answer."""
        self._done.set()

    def wait(self, seconds: float) -> dict[str, object] | None:
        """Returns the answer's body, or None when there was none in time."""
        self._done.wait(seconds)
        return self.body


# ============================================================================================================
# Dialects
# Owns how a child of each era is spoken to: a call becomes a line, and a line one of four events. Legacy is
# 2025-11-25 and before (initialize), modern 2026-07-28 (metadata in each request). Must not know children,
# sessions or clients; it takes no lock.
# ============================================================================================================

META = "io.modelcontextprotocol/"
META_CLIENT = META + "clientInfo"
META_CAPABILITIES = META + "clientCapabilities"
META_LEVEL = META + "logLevel"
META_SERVER = META + "serverInfo"
META_SUBSCRIPTION = META + "subscriptionId"
MODERN_META = {META_VERSION, META_CLIENT, META_CAPABILITIES, META_LEVEL}
LEVELS = ("debug", "info", "notice", "warning", "error", "critical", "alert", "emergency")
NO_SUBSCRIPTION = -1  # a number that no stream of ours has
LEGACY_ONLY = ("initialize", "ping", "logging/setLevel", "resources/subscribe", "resources/unsubscribe")


@dataclass(frozen=True, slots=True)
class Answer:
    """The child's answer to a call: `line` is `message` as bytes."""

    number: int | None
    line: bytes
    message: Message


@dataclass(frozen=True, slots=True)
class Question:
    """What a child asks its client: (key, method, params) of each thing.

    `number` is the call it belongs to, None where the child does
    not say; `request_state` is for the child to read again.
    """

    number: int | None
    requests: tuple[tuple[object, str, dict[str, object] | None], ...]
    request_state: object = None


@dataclass(frozen=True, slots=True)
class Progress:
    """News of a call that goes on."""

    number: int | None
    message: Message


@dataclass(frozen=True, slots=True)
class Notice:
    """Any other notification; `subscription` is its stream's number, None where the child names none."""

    message: Message
    subscription: int | None = None


ChildEvent = Answer | Question | Progress | Notice


def call_number(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _decode_common(line: bytes, message: Message) -> ChildEvent | None:
    """Returns the event of a line that means the same in both eras, None for any other."""
    if message.kind == "response":
        return Answer(call_number(message.id), line, message)
    if message.method == "notifications/progress" and message.kind == "notification":
        return Progress(member(message.params, "progressToken", int, None), message)
    return None


def encode_message(body: dict[str, object]) -> bytes:
    """Returns a message as a line."""
    return dump({"jsonrpc": "2.0", **body})


def encode_cancellation(number: int, params: dict[str, object] | None) -> bytes:
    """Returns the notification that a call is cancelled, with the client's reason."""
    return encode_message(
        {"method": "notifications/cancelled", "params": {**(params or {}), "requestId": number}}
    )


class LegacyDialect:
    """The lines of an initialized child, whose questions are requests of its own in the middle of a call."""

    is_modern = False

    def __init__(self) -> None:
        self._level: str | None = None

    def level_before(self, call: Call) -> str | None:
        """Returns the log level that the child has to be set to before this call; None when it has it."""
        if call.meta.log_level in (None, self._level):
            return None
        self._level = call.meta.log_level
        return self._level

    def encode(self, number: int, call: Call) -> bytes:
        """Returns a call as a line."""
        params = call.params
        if call.progress_token is not None and params is not None:
            params = {**params, "_meta": {**member(params, "_meta", dict, {}), "progressToken": number}}
        return dump(asking(call.method, params, jsonrpc="2.0", id=number))

    def encode_answer(self, key: object, result: object, error: dict[str, object] | None) -> bytes:
        """Returns the client's answer to a question, as a line."""
        return encode_message({"id": key} | ({"error": error} if error else {"result": result}))

    def decode(self, line: bytes, message: Message) -> ChildEvent:
        """Returns the event that a child's line means."""
        if message.kind == "request":
            return Question(None, ((message.id, message.method, message.params),))
        return _decode_common(line, message) or Notice(message)


class ModernDialect:
    """Of a child that takes its client's metadata with each request, and asks by answering `input_required`.

    `initialize` is what the client of the session said of itself, for calls that say nothing.
    """

    is_modern = True

    def __init__(self, initialize: dict[str, object]) -> None:
        self._initialize = initialize
        self.log_level: str | None = None  # of the session: it goes with each request

    def level_before(self, call: Call) -> str | None:
        """None: the level goes with the call."""
        return None

    def encode(self, number: int, call: Call) -> bytes:
        """A call as a line, with what its client says of itself; after a question with the answers."""
        if call.line is None:
            params = dict(call.params or {})
            meta = self._metadata(params, call.meta)
        else:
            params = json.loads(call.line)["params"]
            meta = params["_meta"]
            params.pop("inputResponses", None)
            params.pop("requestState", None)
        if call.input_responses:
            params["inputResponses"] = call.input_responses
        if call.request_state:
            params["requestState"] = call.request_state
        level = call.meta.log_level or self.log_level
        if level:
            meta[META_LEVEL] = level
        if call.progress_token is not None:
            meta["progressToken"] = number
        return encode_message({"id": number, "method": call.method, "params": {**params, "_meta": meta}})

    def encode_listen(self, number: int, wanted: dict[str, object]) -> bytes:
        """Returns a request for a stream of notifications, as a line."""
        params = {"notifications": wanted, "_meta": self._metadata({}, SESSION_META)}
        return encode_message({"id": number, "method": "subscriptions/listen", "params": params})

    def _metadata(self, params: dict[str, object], meta: RequestMeta) -> dict[str, object]:
        declared = meta.capabilities or member(self._initialize, "capabilities", dict, {})
        capabilities = {
            name: {} if name == "roots" else value
            for name, value in declared.items()
            if name in ("experimental", "extensions", *ASKS.values()) and isinstance(value, dict)
        }
        client_info = meta.client_info or self._initialize.get("clientInfo")
        return {
            **member(params, "_meta", dict, {}),
            META_VERSION: FIRST_MODERN_VERSION,
            META_CLIENT: client_info or {"name": "fjmcp-broker", "version": __version__},
            META_CAPABILITIES: capabilities,
        }

    def decode(self, line: bytes, message: Message) -> ChildEvent:
        """Returns the event that a child's line means."""
        result = member(message.body, "result", dict, {})
        if message.kind == "response" and result.get("resultType") == "input_required":
            return Question(call_number(message.id), input_requests(result), result.get("requestState"))
        common = _decode_common(line, message)
        if common:
            return common
        meta = member(message.params, "_meta", dict, {})
        if META_SUBSCRIPTION not in meta:
            return Notice(message)
        return Notice(message, call_number(meta[META_SUBSCRIPTION]) or NO_SUBSCRIPTION)


Dialect = LegacyDialect | ModernDialect


def input_requests(result: dict[str, object]) -> tuple[tuple[object, str, dict[str, object] | None], ...]:
    """Returns what an `input_required` result asks of the client, as far as that can be asked.

    MCP 2026-07-28 patterns/mrtr.
    """
    requests = member(result, "inputRequests", dict, {})
    return tuple(
        (key, method, member(request, "params", dict, None))
        for key, request in requests.items()
        if (method := member(request, "method", str, "")) in ASKS
    )


# ============================================================================================================
# Backend
# Owns a child together with its dialect and what is under way
# on it: the calls it works on, and what it is subscribed to.
# Must not know clients, HTTP or who else has a child; it is
# given an owner, and tells that what its child says.
# ============================================================================================================

MAX_LISTING = 1 << 20  # bytes of what is kept of a child's list of tools
MAX_TOOL_PAGES = 100
EXIT_WAIT = 0.2  # seconds in which a child that gave no answer may turn out to have ended
BAD_LINES = 100  # lines in a row that are no messages, after which a child is stopped
LIST_KINDS = ("tools", "prompts", "resources")


def list_digest(result: object, name: str) -> bytes:
    """Returns a fingerprint of the list in a result of tools/list, prompts/list or resources/list."""
    listed = result.get(name) if isinstance(result, dict) else None
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).digest()


class Listing:
    """An answer to tools/list: how its line goes on after the id, and what that says."""

    LONGEST = 1 << 18  # bytes of a line; what is made of it takes a few times as many

    def __init__(self, rest: bytes, result: object) -> None:
        self.rest = rest
        self.result = result

    @functools.cached_property
    def digest(self) -> bytes:
        """Its fingerprint."""
        return list_digest(self.result, "tools")

    @classmethod
    def of(cls, line: bytes, body: dict[str, object]) -> Listing | None:
        """Returns what to remember of an answer's line: nothing if it says more than its result."""
        match = ENVELOPE.match(line) if len(line) <= cls.LONGEST else None
        if not match or not isinstance(body, PlainResult):
            return None
        return cls(line[match.end(1) :], body["result"])

    def read(self, line: bytes) -> dict[str, object] | None:
        """Returns what a line says that is this answer but for the id, None for any other."""
        match = ENVELOPE.match(line)
        if not match or len(line) - match.end(1) != len(self.rest) or not line.endswith(self.rest):
            return None
        return PlainResult(jsonrpc="2.0", id=int(match[1]), result=self.result)


class Program:
    """What is known of a child's program by its `fingerprint`: replacing the file changes that."""

    def __init__(self, fingerprint: str, era: str, sends_requests: bool) -> None:
        self.fingerprint = fingerprint
        self.era = era  # legacy, modern or both; empty: not known yet
        self.sends_requests = sends_requests  # whether it has been seen to ask its client for things
        self.server: dict[str, object] | None = None  # what it last said of itself, as an initialize result
        self.tool_names: frozenset[str] = frozenset()  # what it last listed
        # What it last listed, as it said it: children say the same again and again, and it is long.
        self.listing: Listing | None = None

    def read(self, line: bytes) -> object:
        """Returns the value of a line. Raises ValueError."""
        listing = self.listing  # another child's thread may replace it
        return listing and listing.read(line) or read_child_json(line)

    def digest(self, result: object) -> bytes:
        """Returns the fingerprint of the tools in a result of tools/list."""
        listing = self.listing
        return listing.digest if listing and listing.result is result else list_digest(result, "tools")

    def note_listing(self, answer: Answer) -> None:
        """Remembers an answer to tools/list, of several pages the last one."""
        result = member(answer.message.body, "result", dict, {})
        listing = self.listing
        is_known = listing is not None and listing.result is result
        if "tools" in result and "nextCursor" not in result and not is_known:
            self.listing = Listing.of(answer.line, answer.message.body)


class OpenQuestion:
    """One thing that a child asks its client in the middle of a call.

    `key` is its name where the child gave one, else its request id.
    """

    __slots__ = ("backend", "key", "method", "params", "call", "deadline", "size")

    def __init__(
        self,
        backend: Backend,
        key: object,
        method: str,
        params: dict[str, object] | None,
        call: Call | None = None,
    ) -> None:
        self.size = len(dump([key, method, params]))
        self.backend = backend
        self.key = key
        self.method = method
        self.params = params
        self.call = call
        self.deadline = 0.0


class BackendOwner(Protocol):
    """The owner of a backend, told of its child's messages. `lock` guards the backend's calls, too."""

    lock: threading.Lock

    def cancel(
        self,
        call: Call,
        params: dict[str, object] | None = None,
        deliver: Callable[[], object] | None = None,
        state: CallState = CallState.CANCELLED,
    ) -> bool:
        """Ends a call in flight."""

    def on_questions(self, backend: Backend, questions: list[OpenQuestion], call: Call | None) -> None:
        """The child asks its client for things; `call`: in the middle of this one."""

    def on_withdrawn(self, backend: Backend, message: Message) -> None:
        """The child wants no answer to a question any more."""

    def on_notification(self, backend: Backend, message: Message, is_subscribed: bool) -> None:
        """The child notifies its client; `is_subscribed`: of a subscribed resource, so not for a call."""

    def on_call_done(self, backend: Backend, call: Call, message: Message | None) -> None:
        """A call is over; `message`: by this answer of the child."""

    def on_end(self, backend: Backend) -> None:
        """The child has ended."""


class Backend:
    """A child, the dialect it speaks, and what is under way on it.

    `pending` is guarded by the owner's lock.
    """

    def __init__(self, owner: BackendOwner, user: str, log: Log, seq: int, fresh_until: float) -> None:
        self.owner = owner
        self.seq = seq  # of the credential that the child holds
        self.fresh_until = fresh_until
        self.pending: dict[int, Call] = {}  # our id towards the child -> Call
        self.program = Program("", "", False)
        self.ttl = 0  # ms for which what a modern child says of itself may be kept
        self.used_at = time.monotonic()
        self.is_closed = False  # whether the owner has heard of the end; under the owner's lock
        self.was_probed = False  # whether the handshake began by asking for its era
        self.serves = False  # whether the handshake succeeded
        self.has_failed = False  # whether the handshake failed
        self.bad_lines = 0
        self._user = user
        self._log = log
        self._child: Child | None = None
        self._dialect: Dialect | None = None
        self._subscriptions: LegacySubscriptions | ModernSubscriptions | None = None
        self._is_ready = False
        self._numbers = itertools.count(1)
        self._stray_answers = 0
        self.tool_list = ToolList(self)
        self._flood = Allowance(FLOOD_BURST, FLOOD_RATE)
        self._logged = Allowance(10, 1 / 6)  # records of lines that are no answers to anything

    # -- the child and its dialect

    @property
    def child(self) -> Child:
        """The process."""
        assert self._child
        return self._child

    @child.setter
    def child(self, child: Child) -> None:
        self._child = child

    @property
    def is_alive(self) -> bool:
        """Returns whether the child can still be spoken to."""
        return self._child is not None and self._child.alive

    @property
    def dialect(self) -> Dialect:
        """How the child is spoken to."""
        assert self._dialect
        return self._dialect

    def speak(self, dialect: Dialect) -> None:
        """From here on the child is spoken to like this."""
        self._dialect = dialect
        self._subscriptions = ModernSubscriptions(self) if dialect.is_modern else LegacySubscriptions(self)

    @property
    def has_dialect(self) -> bool:
        """Returns whether the child has been spoken to."""
        return self._dialect is not None

    @property
    def subscriptions(self) -> LegacySubscriptions | ModernSubscriptions:
        """What the child is subscribed to."""
        assert self._subscriptions
        return self._subscriptions

    # -- towards the child

    def register(self, call: Call) -> bytes:
        """Returns what to send for a call, which is in `pending` from now on; under the owner's lock."""
        number = next(self._numbers)
        self.pending[number] = call
        self.used_at = time.monotonic()
        try:
            level = self.dialect.level_before(call)
            line = self.dialect.encode(number, call)
            call.put_away(line if self.dialect.is_modern else None)
            if level:
                line = (
                    self.register(InternalCall("logging/setLevel", {"level": level}, QUESTION_GRACE))
                    + b"\n"
                    + line
                )
        except BaseException:
            del self.pending[number]
            raise
        call.enter(CallState.SENT)
        if call.record:
            call.record.is_listed = self.tool_list.has
        return line

    def unregister(self, calls: Iterable[Call]) -> None:
        """Takes calls out of `pending` that were not sent; under the owner's lock."""
        unsent = set(map(id, calls))
        self.pending = {number: call for number, call in self.pending.items() if id(call) not in unsent}

    def number_of(self, call: Call) -> int | None:
        """Returns the number of a call in flight, None when it is not; under the owner's lock."""
        return next((number for number, each in self.pending.items() if each is call), None)

    def next_number(self) -> int:
        """Returns a number for a message that is no call."""
        return next(self._numbers)

    def start(self, call: InternalCall) -> bool:
        """Sends a call of the broker's own; returns whether it went out."""
        with self.owner.lock:
            line = self.register(call)
        return self.child.send(line)

    def ask(self, method: str, params: dict[str, object] | None, seconds: float) -> dict[str, object] | None:
        """Makes a call of the broker's own; returns the answer's body, None when there was none in time."""
        call = InternalCall(method, params, seconds)
        return call.wait(seconds) if self.start(call) else None

    def send(self, body: dict[str, object]) -> bool:
        """Sends a message to the child."""
        return self.child.send(encode_message(body))

    def send_cancellation(self, number: int, params: dict[str, object] | None) -> None:
        """Tells the child that nobody waits for a call any more."""
        self.child.send(encode_cancellation(number, params))

    def make_ready(self, uris: set[str] | None) -> None:
        """The client's handshake is over; `uris` are resources that a session subscribes to at once."""
        if self.dialect.is_modern:
            if uris is not None and not self.subscriptions.is_listening:
                self.subscriptions.update(uris)
        elif not self._is_ready:
            self._is_ready = True
            self.send({"method": "notifications/initialized"})

    def forward(self, method: str, params: dict[str, object] | None) -> None:
        """Passes a notification of the client on; the modern era has none."""
        if not self.dialect.is_modern:
            self.send(asking(method, params))

    def set_level(self, level: str) -> None:
        """Sets the level from which on the child logs."""
        if isinstance(self.dialect, ModernDialect):
            self.dialect.log_level = level
        else:
            self.start(InternalCall("logging/setLevel", {"level": level}, QUESTION_GRACE))

    def retry(self, call: Call) -> None:
        """Sends a call again, to a modern child that has asked for input."""
        with self.owner.lock:
            number = self.number_of(call)
            if number is None:
                return
            line = self.register(call)
            del self.pending[number]
        self.child.send(line)

    def answer(
        self, question: OpenQuestion, result: object, error: dict[str, object] | None, is_last: bool
    ) -> None:
        """Hands a client's answer to the child.

        To a modern one all answers go with the retry; a refusal ends the call there.
        """
        if isinstance(self.dialect, LegacyDialect):
            self.child.send(self.dialect.encode_answer(question.key, result, error))
            return
        call = question.call
        if call and error:
            refuse = functools.partial(call.refuse, error, call.undeclared)
            self.owner.cancel(call, None, refuse, CallState.DONE)
        elif call and is_last:
            self.retry(call)

    # -- what the child says

    def on_line(self, line: bytes) -> None:
        """Takes a child's line, or batch (MCP 2025-03-26), in the thread that reads it; never raises."""
        # Either it was told to end, or it speaks before it was spoken to.
        if self.bad_lines >= BAD_LINES or self._dialect is None:
            return
        line = without_lone_surrogates(line)  # here already: an answer may go on as these bytes
        line = line.removeprefix(BYTE_ORDER_MARK)
        try:
            value = self.program.read(line)
        except ValueError:
            self._on_bad_line(line, id_of_bad_line(line))
            return
        if not isinstance(value, list) or not value:
            self._on_value(line, value)
            return
        for each in value:
            if self.bad_lines < BAD_LINES:  # else it was told to end
                self._on_value(dump(each), each)

    def _on_value(self, line: bytes, value: object) -> None:
        try:
            message = classify_sloppy(value)
        except ValueError:
            is_request = member(value, "method", object, None) is not None
            self._on_bad_line(line, None if is_request else whole(member(value, "id", object, None)))
            return
        self.bad_lines = 0
        try:
            self._on_message(line if message.body is value else dump(message.body), message)
            if message.kind != "response":
                self._hold_back(line)
        except Exception as error:
            # One message must not end the reader, and with it the child and all its calls.
            self._drop("error", "child_message_failed", line, error=type(error).__name__)
            if message.kind == "request":
                self.send({"id": message.id, "error": {"code": INTERNAL_ERROR, "message": "Internal error"}})

    def _on_bad_line(self, line: bytes, about: object) -> None:
        """A line that is no message; if it has the id of a call, that call ends with an error at once."""
        with self.owner.lock:
            is_number = isinstance(about, int) and not isinstance(about, bool)
            call = self.pending.pop(about, None) if is_number and isinstance(about, int) else None
        if call:
            fail = functools.partial(
                call.fail,
                "bad_answer",
                "The tool's answer is no JSON-RPC message; whether it did anything is not known.",
                retryable=False,
                code=INTERNAL_ERROR,
            )
            call.finish(self._log, fail)
            self.owner.on_call_done(self, call, None)
        self.bad_lines += 1
        self._drop("warning", "bad_line_from_child", line, count=self.bad_lines)
        if self.bad_lines >= BAD_LINES:
            self.child.kill("bad_lines")

    def _on_message(self, line: bytes, message: Message) -> None:
        if message.kind == "request" and message.method == "ping":
            self.send({"id": message.id, "result": {}})
            return
        if message.kind == "request" and self.dialect.is_modern:
            text = "A server of this revision does not send requests"
            self.send({"id": message.id, "error": {"code": METHOD_NOT_FOUND, "message": text}})
            return
        event = self.dialect.decode(line, message)
        if isinstance(event, Answer):
            self._on_answer(event)
        elif isinstance(event, Progress):
            self._on_progress(event)
        elif isinstance(event, Question):
            self._on_question(event, line)
        else:
            self._on_notice(event)

    def _on_answer(self, answer: Answer) -> None:
        with self.owner.lock:
            call = self.pending.get(answer.number) if answer.number is not None else None
            # A modern child has asked for input: until the retry its call has no answer.
            is_early = call is not None and self.dialect.is_modern and call.waiting_since is not None
            if call and not is_early and answer.number is not None:
                del self.pending[answer.number]
        if call is None:
            self._stray_answers += 1
            self._drop("debug", "stray_answer_from_child", answer.line, count=self._stray_answers)
        elif not is_early:
            self.used_at = time.monotonic()
            if call.method == "tools/list":
                self.program.note_listing(answer)
            call.finish(self._log, functools.partial(self._deliver, call, answer))
            self.owner.on_call_done(self, call, answer.message)

    @staticmethod
    def _deliver(call: Call, answer: Answer) -> None:
        try:
            if call.on_success and "result" in answer.message.body:
                call.on_success(answer.message.body["result"])
        finally:  # what is to be remembered of an answer is not the answer
            call.answer(answer.line, answer.message)
            call.outcome = outcome_of(answer.message)

    def _on_progress(self, progress: Progress) -> None:
        with self.owner.lock:
            call = self.pending.get(progress.number) if progress.number is not None else None
        if call and call.progress_token is not None:
            message = progress.message
            call.notify(
                {**message.body, "params": {**(message.params or {}), "progressToken": call.progress_token}}
            )

    def _on_question(self, question: Question, line: bytes) -> None:
        if question.number is None and not self.dialect.is_modern:
            questions = [OpenQuestion(self, *each) for each in question.requests]
            self.owner.on_questions(self, questions, None)
            return
        with self.owner.lock:
            call = self.pending.get(question.number) if question.number is not None else None
        if call is None:
            self._stray_answers += 1
            self._drop("debug", "stray_answer_from_child", line, count=self._stray_answers)
        elif call.waiting_since is None:
            try:
                self._ask_client(call, question)
            except Exception:  # what cannot be asked ends its call
                self.owner.cancel(call, None, call.fail_undelivered, CallState.DONE)
                raise

    def _ask_client(self, call: Call, question: Question) -> None:
        """Asks for all of it; the answers go with a retry (MCP 2026-07-28 patterns/mrtr)."""
        if call.line is None:
            self.owner.cancel(call, None, call.fail_undelivered, CallState.DONE)
            return
        call.request_state = question.request_state
        call.input_responses = {}
        if question.requests:
            questions = [OpenQuestion(self, *each, call) for each in question.requests]
            self.owner.on_questions(self, questions, call)
        else:  # it wants nothing but to be asked again, which must not become a loop at full speed
            run_later(1.0, self.retry, call)

    def _on_notice(self, notice: Notice) -> None:
        message = notice.message
        if message.method == "notifications/tools/list_changed":
            self.tool_list.on_change()
        if notice.subscription is not None:
            self.subscriptions.on_notice(notice)
        elif message.method == "notifications/cancelled":
            if not self.dialect.is_modern:
                self.owner.on_withdrawn(self, message)
        else:
            self.owner.on_notification(self, message, False)

    def _hold_back(self, line: bytes) -> None:
        """Lets a child that sends much unasked wait, at its own cost and not that of other threads."""
        wait = self._flood.spend(1 + len(line) / FLOOD_UNIT)
        if wait and self._child:
            self._child.hold_back(wait)

    def _drop(self, level: str, event: str, line: bytes, **fields: object) -> None:
        """Logs that a line is dropped, at a fixed rate: the log must not grow with what a child sends."""
        suppressed = self._logged.refused
        if self._logged.grants():
            self._logged.refused = 0
            self._log.event(level, event, user=self._user, suppressed=suppressed or None, **fields)
        self._hold_back(line)

    def on_end(self, child: Child) -> None:
        """The child has ended; in its reader thread, once."""
        self._child = child  # it may end before the thread that started it has it
        self.owner.on_end(self)


class ToolList:
    """What a child lists as its tools, guarded by the lock of its backend's owner."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.tools: dict[str, Tool] | None = None  # once asked; until the child says that they have changed
        self._changes = 0
        self._is_learnt: threading.Event | None = (
            None  # set once the answers to learn() are there, or never will be
        )

    def on_change(self) -> None:
        """The child has said that its tools have changed."""
        with self._backend.owner.lock:
            self._changes += 1
            self.tools = None

    def read(self) -> dict[str, Tool] | None:
        """Returns what the child lists, over all pages; None when it does not say in time.

        Raises ListChanged when it changed meanwhile. An error for an answer is a child without tools; it is
        not kept, since it may have had a passing reason.
        """
        changes = self._changes
        end = time.monotonic() + QUESTION_GRACE
        if self._is_learnt:
            self._is_learnt.wait(QUESTION_GRACE)
            if self.tools is not None:
                return self.tools
        tools: dict[str, Tool] = {}
        room = MAX_LISTING
        cursor: str | None = None
        for _ in range(MAX_TOOL_PAGES):
            params: dict[str, object] = {"cursor": cursor} if cursor else {}
            body = self._backend.ask("tools/list", params, end - time.monotonic())
            if body is None:
                return None
            page = member(body.get("result"), "tools", list, None)
            if page is None:
                return {}
            room = add_tools(tools, page, room)
            cursor = member(body.get("result"), "nextCursor", str, None)
            if cursor is None or room <= 0:
                break
        with self._backend.owner.lock:
            if changes != self._changes:
                raise ListChanged
            self.tools = tools
        self._backend.program.tool_names = frozenset(tools)
        return tools

    def has(self, name: str) -> bool:
        """Returns whether the child, or another of its program, is known to list a tool of this name."""
        return name in (self.tools or ()) or name in self._backend.program.tool_names

    def learn(self) -> None:
        """Asks for the list, unless another child of the program was asked; nobody waits for the answers."""
        with self._backend.owner.lock:
            if self._is_learnt or self._backend.program.tool_names:
                return
            self._is_learnt = threading.Event()
            line = self._ask_for_page({}, None, MAX_LISTING, MAX_TOOL_PAGES)
        self._backend.child.send(line)

    def _ask_for_page(self, tools: dict[str, Tool], cursor: str | None, room: int, pages: int) -> bytes:
        """Returns a request for a page, whose tools are added to `tools`; under the lock."""
        backend = self._backend
        changes = self._changes
        # A list of before the child is listened to may be out of date already, so it is not kept.
        is_heard = backend.subscriptions.hears_list_changes
        following: list[str] = []

        def note(result: object) -> None:
            left = add_tools(tools, member(result, "tools", list, []), room)
            backend.program.tool_names |= frozenset(tools)
            next_cursor = member(result, "nextCursor", str, None)
            with backend.owner.lock:
                if next_cursor is not None and left > 0 and pages > 1:
                    following.append(next_cursor)
                    line = self._ask_for_page(tools, next_cursor, left, pages - 1)
                elif is_heard and changes == self._changes:
                    self.tools = tools
            if following:
                backend.child.send(line)

        def done() -> None:
            if not following and self._is_learnt:
                self._is_learnt.set()

        call = InternalCall("tools/list", {"cursor": cursor} if cursor else {}, QUESTION_GRACE)
        call.on_success = note
        call.on_done = done
        call.may_be_cut_off = True
        return backend.register(call)


class LegacySubscriptions:
    """What a legacy child is subscribed to: each resource by a request of its own.

    Changes of lists it tells unasked.
    """

    hears_list_changes = True
    is_listening = True

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._uris: set[str] = set()

    def update(self, uris: set[str]) -> set[str]:
        """Subscribes to these resources and no others; returns those that the child refused."""
        asked = {}
        for uri in sorted(uris - self._uris):
            asked[uri] = InternalCall("resources/subscribe", {"uri": uri}, QUESTION_GRACE)
            self._backend.start(asked[uri])
        deadline = time.monotonic() + QUESTION_GRACE  # for all together: a start must not take minutes
        refused = set()
        for uri, call in asked.items():
            if "result" not in (call.wait(max(0.0, deadline - time.monotonic())) or {}):
                refused.add(uri)
        for uri in sorted(self._uris - uris):
            self._backend.start(InternalCall("resources/unsubscribe", {"uri": uri}, QUESTION_GRACE))
        self._uris = set(uris) - refused
        return refused

    def on_notice(self, notice: Notice) -> None:
        """There are no streams of subscriptions in this era."""


class ModernSubscriptions:
    """A modern child's one `subscriptions/listen`, for everything (MCP 2026-07-28 patterns/subscriptions)."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._listen: int | None = None
        self._listens: dict[int, threading.Event] = {}  # number -> when it is acknowledged
        self._kinds: dict[str, object] = {}
        self._honoured: set[str] = set()

    def note_capabilities(self, capabilities: dict[str, object]) -> None:
        """The child has said which of its lists it tells the changes of."""
        self._kinds = {
            f"{kind}ListChanged": True
            for kind in LIST_KINDS
            if member(member(capabilities, kind, dict, {}), "listChanged", bool, False)
        }

    @property
    def is_listening(self) -> bool:
        """Returns whether the child has acknowledged a stream."""
        return self._listen is not None

    @property
    def hears_list_changes(self) -> bool:
        """Returns whether the child notifies of changes of its list of tools: only on its stream, if ever."""
        return self.is_listening or "toolsListChanged" not in self._kinds

    def update(self, uris: set[str]) -> set[str]:
        """Listens to every change of lists and to these resources; returns those that the child refused.

        One stream replaces another.
        """
        backend = self._backend
        wanted = self._kinds | ({"resourceSubscriptions": sorted(uris)} if uris else {})
        number = backend.next_number()
        acknowledged = threading.Event()
        if wanted and isinstance(backend.dialect, ModernDialect):
            self._listens[number] = acknowledged
            backend.child.send(backend.dialect.encode_listen(number, wanted))
            acknowledged.wait(QUESTION_GRACE)
        old = self._listen
        self._listen = number if acknowledged.is_set() else None
        if self._listen is None:
            self._listens.pop(number, None)
        if old is not None:
            self._listens.pop(old, None)
            backend.send_cancellation(old, None)
        return set(uris) - (self._honoured if acknowledged.is_set() else set())

    def on_notice(self, notice: Notice) -> None:
        """Takes a notification that came on a stream; one of a stream that is over is dropped."""
        message = notice.message
        acknowledged = self._listens.get(notice.subscription or NO_SUBSCRIPTION)
        if acknowledged is None:
            return
        params = message.params or {}
        if message.method == "notifications/subscriptions/acknowledged":
            uris = member(member(params, "notifications", dict, {}), "resourceSubscriptions", list, [])
            self._honoured = {uri for uri in uris if isinstance(uri, str)}
            acknowledged.set()
        else:
            params = without_meta(params, {META_SUBSCRIPTION})
            self._backend.owner.on_notification(self._backend, replace(message, params=params), True)


def run_later(seconds: float, function: Callable[..., object], *arguments: object) -> None:
    """Calls a function after a while in a thread of its own.

    At once and in this thread when no other can be started.
    """
    timer = threading.Timer(seconds, function, arguments)
    timer.daemon = True
    try:
        timer.start()
    except RuntimeError:
        function(*arguments)


def add_tools(tools: dict[str, Tool], page: list[object], room: int) -> int:
    """Adds a page of tools/list, in `room` bytes; returns those that are left.

    What is not kept counts as not listed. Of a name that is listed
    twice nobody knows which tool runs: it reads only if both do.
    """
    for tool in page:
        name = tool.get("name") if isinstance(tool, dict) else None
        if not isinstance(tool, dict) or not isinstance(name, str) or len(name) > MAX_NAME:
            continue
        mirrored = tuple(marked_properties(tool.get("inputSchema")))
        room -= (
            256 + 4 * len(name) + 4 * sum(len(key) + 64 for path, mark in mirrored for key in (*path, mark))
        )
        if room <= 0:
            break
        reads = hint_reads(tool) and (name not in tools or tools[name].reads)
        tools[name] = Tool(reads, mirrored)
    return room


def hint_reads(tool: dict[str, object]) -> bool:
    """Returns whether a tool's readOnlyHint is true; false decides nothing (mcp-go stamps it on all)."""
    annotations = tool.get("annotations")
    return isinstance(annotations, dict) and annotations.get("readOnlyHint") is True


def marked_properties(schema: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """(path, name) of each property with an x-mcp-header, along `properties` alone."""
    properties = schema.get("properties") if isinstance(schema, dict) else None
    for key, part in properties.items() if isinstance(properties, dict) and len(path) < MAX_DEPTH else ():
        name = part.get("x-mcp-header") if isinstance(part, dict) else None
        if isinstance(name, str) and re.fullmatch(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,100}", name):
            yield (*path, key), name
        yield from marked_properties(part, (*path, key))


# ============================================================================================================
# Launcher and capacity
# Owns how a child is started: credential, process, handshake, and
# what is known of its program; and how many may be awake at once.
# Must not know sessions: who holds a slot is known by what it can be asked for.
# ============================================================================================================

PROBE_WAIT = 5.0  # seconds a child may keep silent when it is asked for its era; then it is legacy
MAX_SERVER = 1 << 18  # bytes of what a child says of itself when it starts
ANSWERED = ("ok", "tool_error", "started")  # outcomes of a tools/call that its child answered
KEPT_PROGRAMS = 4  # programs of which something is known in memory; the newest


class FirstCalls:
    """Which logins have called a tool since the start: of the last MOST that did so for the first time."""

    MOST = 10_000

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the dict; a leaf
        self._grants: dict[int, None] = {}

    def is_first(self, grant_id: int) -> bool:
        """Returns whether a login calls a tool for the first time; from now on it does not."""
        with self._lock:
            if grant_id in self._grants:
                return False
            self._grants[grant_id] = None
            if len(self._grants) > self.MOST:
                del self._grants[next(iter(self._grants))]
            return True


@dataclass(frozen=True, slots=True)
class Services:
    """What the rooms from here on share; there is one of each in a broker."""

    settings: Settings
    store: Store
    upstream: ForgejoCredentials
    keyring: Keyring
    watchdog: Guardian
    log: Log
    clock: SteadyClock
    kept: KeptBytes
    first_calls: FirstCalls

    def write_tool_call(
        self, grant_id: int, outcome: str, seconds: float, fields: Mapping[str, object]
    ) -> None:
        """Counts the end of a tools/call, and writes its audit record where `audit_calls` is on."""
        self.log.metrics.observe("fjmcp_tool_call_duration_seconds", (outcome,), seconds)
        if outcome in ANSWERED and self.first_calls.is_first(grant_id):
            client_id = str(fields["client"])
            with contextlib.suppress(StoreUnavailable):
                client = self.store.client(client_id)
                self.log.connect_step("first_call", client_id, client.name if client else "")
        if self.settings.audit_calls:
            self.log.audit("tool_called", **fields, outcome=outcome, ms=round(seconds * 1000, 1))


@dataclass(frozen=True, slots=True)
class Handshake:
    """A client's `initialize`, repeated to each child, and the version negotiated with the last child.

    `prefers_legacy`: where a child speaks both eras. The client of a session takes part in the legacy one.
    """

    initialize: dict[str, object]
    version: str | None
    prefers_legacy: bool


class Launcher:
    """Starts children, and knows how their programs described themselves.

    `lock` guards its containers; a leaf.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        self._settings = services.settings
        self.lock = threading.Lock()
        self._programs: dict[str, Program] = {}  # by fingerprint; the newest KEPT_PROGRAMS
        self._newest: Program | None = None  # the program of the child that was started last
        self._children: list[Child] = []  # every child not yet seen to have ended, whoever started it
        self.lists: dict[str, bytes] = {}  # kind of list -> digest of what any child last listed
        self.reaps = False  # whether processes that others started are handed to this one

    def credential(self, sub: str) -> tuple[str, int, float]:
        """Returns what ForgejoCredentials.credential returns; raises RpcError or HTTPError where it fails."""
        try:
            return self._services.upstream.credential(sub)
        except LoggedOut:
            raise invalid_token(
                self._settings, "Forgejo ended this login; log in again.", "logged_out"
            ) from None
        except UpstreamDown:
            raise self._upstream_down() from None
        except UpstreamMisconfigured:  # logged where it was seen
            raise self._upstream_misconfigured() from None

    def spawn(self, access_token: str, sub: str, backend: Backend) -> Child:
        """Starts a child for a backend; raises RpcError when the program is missing or cannot be run."""
        log = self._services.log
        try:
            child = Child(
                child_command(self._settings),
                child_environment(self._settings, access_token),
                sub,
                self._services.watchdog,
                self._settings,
                log,
                backend.on_line,
                backend.on_end,
            )
        except ChildMissing as error:
            log.event("error", "child_missing", reason=str(error))
            raise RpcError(
                INTERNAL_ERROR,
                "The tool program is missing on the server; tell its operator.",
                {"reason": "child_missing", "outcome_unknown": False, "retryable": False},
                500,
            ) from None
        except ChildFailed as error:
            log.event("error", "child_not_started", reason=str(error))
            raise self._starting_failed() from None
        with self.lock:
            self._children.append(child)
        return child

    def tick(self) -> None:
        """Continues ending every child that was told to stop, also those that no session names any more."""
        with self.lock:
            self._children = children = [child for child in self._children if not child.ended.is_set()]
        for child in children:
            child.tick()
        if self.reaps:
            self._services.watchdog.reap_adopted()

    # -- the handshake

    def shake_hands(self, backend: Backend, handshake: Handshake, probe: bool) -> dict[str, object] | None:
        """Shakes hands with a child, by the era its program is known to be of (legacy, unless `probe`).

        Returns what the child says of itself as an initialize result,
        None when it did not answer. Raises RpcError when it will not.
        """
        program = self._note_program(binary_fingerprint(child_command(self._settings)))
        backend.program = program
        known = program.era
        backend.was_probed = probe and not known
        seconds = self._settings.start_timeout
        try:
            era, server = connect(backend, handshake, known or ("" if probe else "legacy"), seconds)
        except RpcError:
            if known:  # it may be another program by now: look again next time
                self._save_era(program, "")
            raise
        if server is not None:
            if era != known:
                self._save_era(program, era)
            program.server = server
        return server

    def _note_program(self, fingerprint: str) -> Program:
        """The program of a child that is starting, as the store has it now."""
        row = self._services.store.program(fingerprint)
        with self.lock:
            program = self._programs.pop(fingerprint, None) or Program(fingerprint, "", False)
            program.era = row.era if row else ""
            program.sends_requests = bool(row and row.sends_requests)
            self._programs[fingerprint] = program
            while len(self._programs) > KEPT_PROGRAMS:
                del self._programs[next(iter(self._programs))]
            self._newest = program
        return program

    def _save_era(self, program: Program, era: str) -> None:
        program.era = era
        with contextlib.suppress(StoreUnavailable):  # it is asked again next time
            self._services.store.save_program(program.fingerprint, era, self._services.clock.now())

    @property
    def sends_requests(self) -> bool:
        """Returns whether the program of the newest child is known to ask its client for things."""
        return self._newest is not None and self._newest.sends_requests

    def note_sends_requests(self, program: Program) -> None:
        """Notes that children of this program send requests to their client.

        From now on a client that can be asked gets a child of its own.
        """
        if program.sends_requests:
            return
        program.sends_requests = True
        with contextlib.suppress(StoreUnavailable):
            self._services.store.program_sends_requests(program.fingerprint)

    def known_server(self) -> dict[str, object] | None:
        """Returns the program's own description at its last start, None when there was none."""
        with contextlib.suppress(ChildMissing, OSError):
            fingerprint = binary_fingerprint(child_command(self._settings))
            with self.lock:
                program = self._programs.get(fingerprint)
            return program.server if program else None
        return None

    def lists_tool(self, name: str) -> bool:
        """Returns whether the program of the newest child is known to list a tool of this name."""
        return self._newest is not None and name in self._newest.tool_names

    # -- why a child ended, or refused

    def why_not_started(self, sub: str) -> RpcError | HTTPError:
        """Returns why a child ended at its start, after asking Forgejo itself.

        forgejo-mcp exits alike when Forgejo is down and when it refuses the token.
        """
        found = self._services.upstream.examine(sub)
        if found in ("suspended", "logged out"):
            return invalid_token(self._settings, "Forgejo refuses this login; log in again.", "logged_out")
        if found == "misconfigured":
            return self._upstream_misconfigured()
        return self._upstream_down() if found == "unknown" else self._starting_failed()

    def examine_in_background(self, sub: str) -> None:
        """Looks, in another thread, whether Forgejo refuses the token: a tool's error may mean that.

        The calling thread has an answer to deliver.
        """
        upstream = self._services.upstream

        def examine() -> None:
            with contextlib.suppress(StoreUnavailable):
                upstream.examine(sub)

        if upstream.may_ask(sub):
            with contextlib.suppress(RuntimeError):  # no thread to be had: another refusal will come
                threading.Thread(target=examine, daemon=True, name="examine").start()

    @staticmethod
    def _upstream_down() -> RpcError:
        return unavailable("upstream_down", "Forgejo cannot be reached just now; try again in a moment.")

    @staticmethod
    def _upstream_misconfigured() -> RpcError:
        """Returns the error for a client id or secret that Forgejo refuses; only the operator can mend it."""
        return unavailable("upstream_misconfigured", NOT_ACCEPTED, wait=60)

    @staticmethod
    def _starting_failed() -> RpcError:
        return unavailable(
            "starting_failed", "The tool process could not be started; the operator's log says why."
        )


def connect(
    backend: Backend, handshake: Handshake, known: str, seconds: float
) -> tuple[str, dict[str, object] | None]:
    """Shakes hands with a new child, and probes its era unless it is `known`.

    Returns (era, the child's description of itself as an initialize result), the latter None when it did not
    answer. Raises RpcError when the child refuses. `both` is a child of either era. MCP 2026-07-28 stdio,
    backward compatibility.
    """
    era = known
    if known != "legacy" and not (known == "both" and handshake.prefers_legacy):
        backend.speak(ModernDialect(handshake.initialize))
        body = backend.ask("server/discover", None, seconds if known else min(seconds, PROBE_WAIT))
        result = member(body, "result", dict, None)
        versions = supported_versions(body)
        modern = FIRST_MODERN_VERSION in versions
        legacy = any(version in versions for version in LEGACY_VERSIONS)
        era = "legacy"
        if modern:
            era = "both" if legacy else "modern"
        if modern and result is not None and not (legacy and handshake.prefers_legacy):
            return era, discovered(backend, handshake, result)
        if backend.child.ended.is_set():
            return era, None
        if versions and not legacy:
            spoken = ", ".join(map(str, versions))
            raise unavailable("starting_failed", f"The tool process speaks only {spoken}.")
    backend.speak(LegacyDialect())
    return era, initialized(backend, handshake, seconds)


def supported_versions(body: dict[str, object] | None) -> list[object]:
    """Returns the versions that an answer to server/discover names, be it an error."""
    if member(body, "result", dict, None) is not None:
        return member(member(body, "result", dict, {}), "supportedVersions", list, [])
    error = member(body, "error", dict, {})
    if error.get("code") != UNSUPPORTED_VERSION:
        return []
    return member(member(error, "data", dict, {}), "supported", list, [])


def initialized(backend: Backend, handshake: Handshake, seconds: float) -> dict[str, object] | None:
    """Initializes a legacy child; returns its result, None when it gives none.

    Raises RpcError when it refuses.
    """
    params = handshake.initialize | ({"protocolVersion": handshake.version} if handshake.version else {})
    body = backend.ask("initialize", params, seconds)
    if body is None or "error" in body and backend.child.ended.is_set():
        return None
    if "error" in body:
        error = member(body, "error", dict, {})
        raise RpcError(error["code"], error["message"], error.get("data"))
    result = member(body, "result", dict, None)
    if result is None or member(result, "protocolVersion", str, None) is None:
        raise unavailable("starting_failed", "The tool process does not speak MCP.")
    return result


def discovered(backend: Backend, handshake: Handshake, result: dict[str, object]) -> dict[str, object]:
    """Returns a DiscoverResult as an initialize result, with the version of the session's client."""
    capabilities = member(result, "capabilities", dict, {})
    if isinstance(backend.subscriptions, ModernSubscriptions):
        backend.subscriptions.note_capabilities(capabilities)
    backend.ttl = max(0, member(result, "ttlMs", int, 0))
    info = member(member(result, "_meta", dict, {}), META_SERVER, dict, None)
    asked = handshake.version or handshake.initialize.get("protocolVersion")
    server: dict[str, object] = {
        "protocolVersion": asked if asked in LEGACY_VERSIONS else LEGACY_VERSIONS[0],
        "capabilities": capabilities,
        "serverInfo": info or {"name": "forgejo-mcp", "version": "unknown"},
    }
    instructions = member(result, "instructions", str, None)
    return server if instructions is None else server | {"instructions": instructions}


class SlotHolder(Protocol):
    """Who has a child awake, and can be asked to let it sleep."""

    @property
    def sub(self) -> str:
        """The user."""

    @property
    def used_at(self) -> float:
        """When it was last used (monotonic)."""

    def idle_since(self, though_listening: bool = False) -> float | None:
        """Since when (monotonic) the child has had nothing to do; None while it is busy or asleep."""

    def sleep(self, reason: str, though_listening: bool = False) -> bool:
        """Stops an idle child."""


class Capacity:
    """The slots for children, `max_sessions` in all and `max_sessions_per_user` for each user.

    `lock` (a condition) guards who holds them; list work only, taken after a session's lock if both.
    """

    def __init__(self, settings: Settings, clock: SteadyClock) -> None:
        self._settings = settings
        self._clock = clock
        self.lock = threading.Condition()
        self._holders: list[SlotHolder] = []  # one entry for each child
        self._waiting = 0
        self._is_closing = False

    def count(self) -> int:
        """Returns how many children there are."""
        return len(self._holders)

    def acquire_slot(self, holder: SlotHolder, modest: bool = False) -> None:
        """Waits for a slot, putting the longest idle child to sleep; raises RpcError 503 after 20 s.

        `modest`: only a free slot will do, at once.
        """
        deadline = time.monotonic() + PLACE_WAIT
        while True:
            with self.lock:
                if self._take(holder):
                    return
                others = self._others(holder)
                self._waiting += 1
            try:
                if modest:
                    raise unavailable("busy", "No place is free.")
                self._make_room(others)
                with self.lock:
                    if time.monotonic() >= deadline or self._is_closing:
                        raise unavailable(
                            "busy", "All places for tool processes are busy; try again in a moment."
                        )
                    self.lock.wait(min(1.0, max(0.0, deadline - time.monotonic())))
            finally:
                with self.lock:
                    self._waiting -= 1

    def _has_all_of_their_own(self, sub: str) -> bool:
        return sum(each.sub == sub for each in self._holders) >= self._settings.max_sessions_per_user

    def _take(self, holder: SlotHolder) -> bool:
        if self._has_all_of_their_own(holder.sub) or len(self._holders) >= self._settings.max_sessions:
            return False
        self._holders.append(holder)
        return True

    def _others(self, holder: SlotHolder) -> list[SlotHolder]:
        """Returns the slots that may be freed: the user's own, if they are at their limit. Under the lock."""
        only_own = self._has_all_of_their_own(holder.sub)
        return [
            each for each in self._holders if each is not holder and (not only_own or each.sub == holder.sub)
        ]

    def _make_room(self, others: list[SlotHolder]) -> None:
        """Stops the longest idle child, else one that only served listeners for `session_idle_timeout`."""
        if self._settings.child_keeps_state:
            return
        idle = [
            (since, index, each)
            for index, each in enumerate(others)
            if (since := each.idle_since()) is not None
        ]
        if idle:
            min(idle)[2].sleep("place needed")
            return
        rest = self._settings.session_idle_timeout
        now = self._clock.monotonic()
        listening = [
            (since, index, each)
            for index, each in enumerate(others)
            if now - each.used_at >= rest
            and (since := each.idle_since(though_listening=True)) is not None
            and time.monotonic() - since >= min(1.0, rest)
        ]
        if listening:
            min(listening)[2].sleep("place needed", though_listening=True)

    def release_slot(self, holder: SlotHolder) -> None:
        """A child is gone."""
        with self.lock:
            self._holders.remove(holder)
            self.lock.notify_all()

    def slot_may_be_free(self) -> None:
        """A child may have become idle: all that wait for a slot look again."""
        if self._waiting:
            with self.lock:
                self.lock.notify_all()

    def close(self) -> None:
        """Nobody waits for a slot any more."""
        self._is_closing = True

    def wait_until_empty(self, seconds: float) -> bool:
        """Waits until there is no child, at most that long; returns whether there is none."""
        with self.lock:
            return self.lock.wait_for(lambda: not self._holders, seconds)


def binary_fingerprint(command: list[str]) -> str:
    """Returns a fingerprint of a child's program: its words, and size and age of the files among them."""
    files = [
        (file.st_size, file.st_mtime_ns)
        for word in command
        if os.path.isfile(word)
        for file in (os.stat(word),)
    ]
    return hashlib.sha256(json.dumps([command, files]).encode()).hexdigest()


def challenge_header(settings: Settings, error: str | None = None, scope: str = " ".join(SCOPES)) -> str:
    """Returns the WWW-Authenticate value that leads a client to our metadata (RFC 9728 5.1)."""
    url = f"{settings.public_url}/.well-known/oauth-protected-resource/mcp"
    shown = f', error="{error}"' if error else ""
    return f'Bearer resource_metadata="{url}", scope="{scope}"{shown}'


def invalid_token(settings: Settings, description: str, cause: str) -> HTTPError:
    """Returns the 401 for a presented token that is not valid (RFC 6750 3.1)."""
    headers = (("WWW-Authenticate", challenge_header(settings, "invalid_token")),)
    return HTTPError(401, "invalid_token", description, headers, cause)


# ============================================================================================================
# Session
# Owns what one child at a time serves: calls and questions on their
# way, and the child's life: start, replay, replace, sleep, end.
# Must not know HTTP, tokens or eras: a frontend speaks with its client, backends with its children.
# ============================================================================================================

MAX_TASKS = 256  # of a session
MAX_URI = 2048  # bytes of a resource's URI that is kept because somebody subscribed to it
# Questions of one session's children that may wait for the client at once, and their bytes.
MAX_QUESTIONS = 64
MAX_QUESTION_BYTES = 1 << 20


def subscriptions_refused(uris: Iterable[str], count: int, settings: Settings) -> str:
    """Returns why these URIs may not be subscribed to, "" when they may; with them there would be `count`."""
    if any(len(uri.encode("utf-8", "surrogatepass")) > MAX_URI for uri in uris):
        return f"A resource's URI that is subscribed to may have at most {MAX_URI} bytes."
    if count > settings.max_subscriptions:
        return f"At most {settings.max_subscriptions} resources may be subscribed to."
    return ""


def rights_mark(rights: Rights | None) -> bytes:
    """Returns a fingerprint of what the operator's rules leave to a caller; empty without rules."""
    return b"" if rights is None else hashlib.sha256(repr(rights).encode()).digest()


class ReplayState:
    """A session's log level and subscriptions, which are replayed to a new child, and two fingerprints.

    These are of the tools that the client knows, and of what the operator's rules leave to it (rights_mark;
    None: it has called nothing yet). `save` writes all four down after a change, for a session that is on
    file. For a shared session, which is not, it is None, and `subscriptions` counts the listeners of each
    resource. `lock` is the session's.
    """

    def __init__(
        self,
        settings: Settings,
        save: Callable[[str | None, list[str], bytes | None, bytes | None], object] | None,
    ) -> None:
        self.lock = threading.Lock()
        self._settings = settings
        self._save = save
        self.level: str | None = None
        self.tools_hash: bytes | None = None
        self.subscriptions: collections.Counter[str] = collections.Counter()
        self.rights_hash: bytes | None = None
        self.subscribing: collections.Counter[str] = collections.Counter()  # asked for, not yet answered

    def read(self, row: SessionRow) -> None:
        """Takes over the state on file."""
        uris = json.loads(row.subscriptions)[: self._settings.max_subscriptions]
        with self.lock:
            self.level = row.log_level if row.log_level in LEVELS else None
            self.tools_hash = row.tools_hash
            self.rights_hash = row.rights_hash or self.rights_hash or b""
            self.subscriptions = collections.Counter(uri for uri in uris if len(uri) <= MAX_URI)

    def _change(self, change: Callable[[], None]) -> None:
        with self.lock:
            before = self._values()
            change()
            after = self._values()
        if self._save and before != after:
            with contextlib.suppress(StoreUnavailable):  # what is lost is a replay's detail, not the answer
                self._save(*after)

    def _values(self) -> tuple[str | None, list[str], bytes | None, bytes | None]:
        # Where no rule limits it nothing is kept, so that a first call writes nothing.
        return self.level, sorted(self.subscriptions), self.tools_hash, self.rights_hash or None

    def set_level(self, level: str) -> None:
        """The client has set the log level."""

        def change() -> None:
            self.level = level

        self._change(change)

    def note_rights(self, mark: bytes) -> bool:
        """Keeps what the operator's rules leave to the client; returns whether that changed."""
        if self.rights_hash == mark:
            return False
        was: list[bytes | None] = []

        def change() -> None:
            was.append(self.rights_hash)
            self.rights_hash = mark

        self._change(change)
        return was[0] not in (None, mark)

    def set_tools(self, digest: bytes) -> None:
        """The client has been told the list of tools with this fingerprint."""

        def change() -> None:
            self.tools_hash = digest

        self._change(change)

    def subscribe(self, uri: str) -> None:
        """The client subscribes to a resource: a session once, listeners are counted."""

        def change() -> None:
            if self._save is None or uri not in self.subscriptions:
                self.subscriptions[uri] += 1

        self._change(change)

    def unsubscribe(self, uri: str) -> None:
        """The client subscribes no more."""

        def change() -> None:
            self.subscriptions[uri] -= 1
            self.subscriptions = +self.subscriptions

        self._change(change)

    def begin_subscription(self, uri: object) -> str:
        """Counts a subscription until end_subscription(); returns why it may not be made, "" when it may."""
        if not isinstance(uri, str):
            return ""  # the child says what is wrong with it
        with self.lock:
            wanted = {uri, *self.subscriptions, *self.subscribing}
            complaint = subscriptions_refused([uri], len(wanted), self._settings)
            if not complaint:
                self.subscribing[uri] += 1
        return complaint

    def end_subscription(self, uri: str) -> None:
        """The child has answered, or never will."""
        with self.lock:
            self.subscribing[uri] -= 1
            self.subscribing = +self.subscribing


class Questions:
    """The questions of one session's children that are with its client; guarded by the session's lock."""

    def __init__(self, lock: threading.Lock, settings: Settings) -> None:
        self._lock = lock
        self._settings = settings
        self.open: set[OpenQuestion] = set()

    def ask(self, question: OpenQuestion, call: Call | None, seconds: float) -> bool:
        """Sends a question to the client; its call's deadline waits for the answer, at most that long.

        Returns False, and answers the child with an error, when too many are open: a child that floods
        questions hurts itself.
        """
        with self._lock:
            open_bytes = sum(each.size for each in self.open)
            is_full = len(self.open) >= MAX_QUESTIONS or open_bytes + question.size > MAX_QUESTION_BYTES
            question.call = call
            if not is_full:
                question.deadline = time.monotonic() + seconds
                self.open.add(question)
                if call:
                    call.stop_clock()
        if is_full:
            error: dict[str, object] = {
                "code": SERVER_ERROR,
                "message": "Too many questions to the client are open",
            }
            question.backend.answer(question, None, error, False)
        return not is_full

    def answer(
        self, question: OpenQuestion, result: object = None, error: dict[str, object] | None = None
    ) -> None:
        """Passes the client's answer on; one to a question that is not open any more is dropped (J07)."""
        with self._lock:
            if question not in self.open:
                return
            call = question.call
            if call and question.backend.dialect.is_modern:
                call.input_responses[str(question.key)] = result
                # They go to the child in one request.
                if len(dump(call.input_responses)) > self._settings.max_body:
                    error = {"code": SERVER_ERROR, "message": "The answers are too large together"}
            is_last = self._close(question)
        question.backend.answer(question, result, error, is_last)

    def _close(self, question: OpenQuestion) -> bool:
        """Returns whether it was the last one of its call. Under the lock."""
        self.open.discard(question)
        call = question.call
        is_last = not any(each.call is call for each in self.open)
        if call and is_last:
            call.start_clock()
        return is_last

    def withdraw(self, backend: Backend, key: object) -> list[OpenQuestion]:
        """The child wants no answer any more; returns what it had asked under this key."""
        with self._lock:
            gone = [each for each in self.open if each.backend is backend and each.key == key]
            for question in gone:
                self._close(question)
        return gone

    def of(self, call: Call) -> list[OpenQuestion]:
        """Returns the open questions of a call; under the lock."""
        return [each for each in self.open if each.call is call]

    def drop_of(self, call: Call) -> None:
        """The call has ended; under the lock."""
        self.open = {each for each in self.open if each.call is not call}

    def drop_from(self, backend: Backend) -> None:
        """The child has ended; under the lock."""
        self.open = {each for each in self.open if each.backend is not backend}


class Frontend(Protocol):
    """The client's side of a session."""

    @property
    def is_listening(self) -> bool:
        """Returns whether a client is subscribed to a resource: that keeps the child awake."""

    @property
    def needs_subscriptions(self) -> bool:
        """Returns whether a new child must be told that somebody listens."""

    @property
    def keeps_nothing(self) -> bool:
        """Returns whether nothing waits here for a client."""

    def on_start(self, backend: Backend) -> None:
        """A new child serves."""

    def on_notification(self, backend: Backend | None, message: Message, is_subscribed: bool) -> None:
        """The child notifies its client; `is_subscribed`: it surely belongs to no request."""

    def forget_resources(self) -> None:
        """Ends all subscriptions to resources."""

    def on_questions(self, backend: Backend, questions: list[OpenQuestion], call: Call | None) -> None:
        """The child asks its client for things; `call`: in the middle of this one."""

    def on_withdrawn(self, message: Message, questions: list[OpenQuestion]) -> None:
        """The child takes questions back."""

    def tick(self) -> None:
        """Forgets what is over; under the session's lock."""

    def end(self) -> None:
        """The session is over."""

    def unload(self) -> None:
        """The session leaves memory."""


class ChildStart:
    """One start of a child that several requests wait for. `modest`: it takes only a slot that is free."""

    def __init__(self, modest: bool = False) -> None:
        self.done = threading.Event()
        self.backend: Backend | None = None
        self.error: RpcError | HTTPError | None = None
        self.modest = modest


class Backends:
    """A session's children: the one that serves now, and those that only end their calls.

    Guarded by the session's lock.
    """

    def __init__(self, session: Session, services: Services, launcher: Launcher, capacity: Capacity) -> None:
        self._session = session
        self._lock = session.lock
        self._settings = services.settings
        self._clock = services.clock
        self._log = services.log
        self._launcher = launcher
        self._capacity = capacity
        self.current: Backend | None = None
        self.draining: set[Backend] = set()
        self.starting: ChildStart | None = None
        self.failures = 0  # starts that failed, since the last that did not
        self.retry_at = 0.0
        self._failure: RpcError | None = None

    @property
    def sub(self) -> str:
        """The user whose children these are."""
        return self._session.sub

    @property
    def used_at(self) -> float:
        """When the session was last used."""
        return self._session.used_at

    def all(self) -> list[Backend]:
        """Every one of them; under the lock."""
        return [each for each in (self.current, *self.draining) if each]

    # -- start

    def ensure(self) -> Backend:
        """Returns the backend to an initialized child: one request starts it, the others wait for it."""
        with self._lock:
            if self._session.ended:
                raise session_not_found()
            current = self.current
            if current and current.is_alive:
                if self._settings.child_keeps_state or self._clock.now() < current.fresh_until:
                    return current
            if self._failure and self.failures >= 3 and time.monotonic() < self.retry_at:
                raise anew(self._failure)
            start = self.starting or ChildStart()
            leads = self.starting is None
            self.starting = start
        if leads:
            self._lead(start)
        elif not start.done.wait(PLACE_WAIT + self._settings.start_timeout + 30):
            raise unavailable("starting_failed", "The tool process did not start in time.")
        if start.error and start.modest and not leads:  # it gave up where this request may wait
            return self.ensure()
        if start.error:
            raise anew(start.error)
        assert start.backend
        return start.backend

    def start_in_background(self, modest: bool = False, only_awake: bool = False) -> None:
        """Starts a child without waiting for it.

        `modest`: only if a slot is free. `only_awake`: only in the place of one that runs.
        """
        with self._lock:
            if self._session.ended or self.starting or only_awake and not self.current:
                return
            if time.monotonic() < self.retry_at:
                return
            start = self.starting = ChildStart(modest)
        try:
            threading.Thread(target=self._lead, args=(start,), daemon=True, name="start").start()
        except RuntimeError:
            # No thread is to be had just now: who joined this start is told, the next one may try again.
            busy = unavailable("busy", "The server is too busy; try again in a moment.")
            self._settle(start, None, busy)

    def _lead(self, start: ChildStart) -> None:
        """Starts a child. Whatever happens, the waiters for `start` are told, and the next may try again."""
        error: RpcError | HTTPError | None = None
        backend = None
        try:
            backend = self._start(start.modest)
        except (RpcError, HTTPError) as problem:
            error = anew(problem)
        except BaseException as problem:
            self._log.event("error", "start_failed", user=self.sub, error=type(problem).__name__)
            error = unavailable("starting_failed", "The tool process could not be started.")
            if not isinstance(problem, Exception):
                raise
        finally:
            self._settle(start, backend, error)

    def _settle(self, start: ChildStart, backend: Backend | None, error: RpcError | HTTPError | None) -> None:
        """A start is over: the child is in place, or its failure is noted; the waiters are told."""
        with self._lock:
            too_late = backend if self._session.ended else None
            if too_late:
                error = session_not_found()
                backend = None
            old = self.current if self.current is not backend else None
            self.starting = None
            if backend:
                self.current = None if backend.is_closed else backend
                self.failures = 0
                if old and not old.is_closed:
                    self.draining.add(old)
            else:
                self._note_failure(error, start.modest)
            start.backend = backend
            start.error = error
        start.done.set()
        if too_late:  # not under the lock: to stop it takes as long as a line that is being written to it
            too_late.child.stop("session ended")
        if backend and old:
            self.stop_if_drained(old)

    def _note_failure(self, error: RpcError | HTTPError | None, modest: bool) -> None:
        """Under the lock."""
        is_down = False
        if isinstance(error, RpcError):
            is_down = member(error.data, "reason", str, "") == "upstream_down"
            if not modest:
                self.failures += 1
                self._failure = error
        # Forgejo answers again without telling us: nobody may find out more than 10 s later.
        self.retry_at = time.monotonic() + min(5 if is_down else 60, 2 ** max(0, self.failures - 3))

    def _start(self, modest: bool, probe: bool = True) -> Backend:
        access_token, seq, fresh_until = self._launcher.credential(self.sub)
        with self._lock:
            current = self.current
            if current and current.is_alive and current.seq == seq:  # nothing newer was to be had
                return current
        is_replay = self._session.version is not None
        self._capacity.acquire_slot(self, modest)
        backend = Backend(self._session, self.sub, self._log, seq, fresh_until)
        try:  # a child that was started gives its slot back when it ends, whatever becomes of this start
            backend.child = self._launcher.spawn(access_token, self.sub, backend)
        except BaseException:
            self._capacity.release_slot(self)
            raise
        client = self._session.client_id
        began = time.monotonic()
        try:
            self._log.audit(
                "child_started", user=self.sub, client=client, pid=backend.child.pid, replay=is_replay
            )
            session = self._session
            handshake = Handshake(session.initialize, session.version, session.is_durable)
            server = self._launcher.shake_hands(backend, handshake, probe)
            if server is not None:
                self._session.on_handshake(backend, server, is_replay)
                backend.serves = True
                seconds = time.monotonic() - began
                self._log.metrics.observe("fjmcp_child_start_duration_seconds", (), seconds)
                return backend
        except BaseException:
            backend.has_failed = True
            backend.child.stop("the handshake failed")
            raise
        backend.has_failed = not backend.was_probed
        backend.child.ended.wait(EXIT_WAIT)
        backend.child.stop("no answer to the handshake")
        if backend.was_probed:  # some older programs end at a request that they do not know
            return self._start(modest, probe=False)
        raise self._launcher.why_not_started(self.sub)

    # -- replace, sleep, end

    def replace(self) -> None:
        """Has a child with the user's newest token serve: an idle one is stopped, a busy one is drained."""
        if not self._settings.child_keeps_state and not self.sleep("token rotated"):
            self.start_in_background(only_awake=True)

    def sleep(self, reason: str, though_listening: bool = False) -> bool:
        """Stops an idle child, keeps the session; returns False when it is busy or there is none."""
        with self._lock:
            backend = self.current
            if not backend or not self._is_idle(backend, though_listening):
                return False
            self.current = None
        backend.child.stop(reason)
        return True

    def idle_since(self, though_listening: bool = False) -> float | None:
        """Since when (monotonic) the child has had nothing to do; None while it is busy or asleep."""
        with self._lock:
            backend = self.current
            return backend.used_at if backend and self._is_idle(backend, though_listening) else None

    def _is_idle(self, backend: Backend, though_listening: bool) -> bool:
        if self.starting or self._session.is_busy(backend):
            return False
        return though_listening or not self._session.frontend.is_listening

    def state(self) -> str:
        """Returns one of CHILD_STATES for the child that serves, or `asleep`."""
        with self._lock:
            if self.starting:
                return "starting"
            if not self.current:
                return "asleep"
            return "busy" if self._session.is_busy(self.current) else "idle"

    def stop_if_drained(self, backend: Backend) -> None:
        """Stops a child that was replaced, once its calls are over."""
        with self._lock:
            is_drained = backend in self.draining and not self._session.is_busy(backend)
        if is_drained:
            backend.child.stop("replaced")

    def remove(self, backend: Backend) -> None:
        """A child has ended; under the lock."""
        backend.is_closed = True
        if self.current is backend:
            self.current = None
        self.draining.discard(backend)


@dataclass(frozen=True, slots=True)
class Identity:
    """Whose a session is.

    `name` is its name on file, None for one that is shared by requests without a session.
    """

    name: bytes | None
    sub: str
    client_id: str


class Session:
    """One child's user: a client's session (durable), or the requests of clients that share a child.

    `lock` guards its backends and their calls, questions, `replay`, and its frontend's state; it is never
    held across a spawn, a send or a wait.
    """

    def __init__(
        self,
        services: Services,
        launcher: Launcher,
        capacity: Capacity,
        identity: Identity,
        initialize: dict[str, object],
        replay: ReplayState,
        number: int,
    ) -> None:
        self.services = services
        self.settings = services.settings
        self.launcher = launcher
        self._capacity = capacity
        self.log = services.log
        self.name = identity.name
        self.sub = identity.sub
        self.client_id = identity.client_id
        self.is_durable = identity.name is not None
        self._initialize = dump(initialize)  # parsed, 64 KiB may cost 2 MiB
        self.version: str | None = None  # negotiated with the first child
        self.server: dict[str, object] | None = None  # what the newest child said of itself
        self.ttl = 0  # ms for which what a modern child says of itself may be kept
        self.replay = replay
        self.tasks: collections.OrderedDict[str, str] = collections.OrderedDict()  # a task's id -> its tool
        self.lock = replay.lock
        self.questions = Questions(self.lock, services.settings)
        self.backends = Backends(self, services, launcher, capacity)
        self.frontend: Frontend
        self.ended = False
        self.is_on_file = False  # whether its row was written: what has none any more was ended elsewhere
        # One change of subscriptions at a time, the child's answers awaited; taken before `lock`.
        self._subscription_lock = threading.Lock()
        self.used_at = self.saved_at = services.clock.monotonic()
        self._owner = Owner(identity.sub, number)

    @property
    def backend(self) -> Backend | None:
        """The child that serves now."""
        return self.backends.current

    @property
    def initialize(self) -> dict[str, object]:
        """The params of the client's `initialize`, which each child is told."""
        return dict(json.loads(self._initialize))

    @property
    def label(self) -> str | None:
        """What operators see of the session's name."""
        return self.name.hex()[:12] if self.name else None

    def new_stream(self, answers: int) -> EventStream:
        """Returns a stream to the client that ends with that many answers."""
        return EventStream(
            self.settings.stream_events,
            self.settings.stream_bytes,
            self.settings.write_timeout + 5,
            answers,
            self.services.kept,
            self._owner,
            answer_dropped if self.is_durable else modern_answer_dropped,
        )

    # -- calls and notifications of the client

    def submit(self, calls: Sequence[Call]) -> None:
        """Sends requests to the child, waking it if needed; RpcError without one, or above `max_inflight`.

        Raises ListChanged, and sends nothing, when one was judged by another list of tools than this child's.
        """
        self.used_at = self.services.clock.monotonic()
        for _ in range(3):
            backend = self.backends.ensure()
            with self.lock:
                if self.ended or backend is not self.backend or not backend.is_alive:
                    continue
                if any(
                    call.listing is not None and call.listing is not backend.tool_list.tools for call in calls
                ):
                    raise ListChanged
                if len(self.calls()) + len(calls) > self.settings.max_inflight:
                    raise unavailable(
                        "busy", "Too many requests of this session are in flight; wait for answers.", 429, 1
                    )
                try:
                    lines = [backend.register(call) for call in calls if not is_local(backend, call)]
                except BaseException:
                    backend.unregister(calls)
                    raise
            self._send(backend, calls, lines)
            return
        raise unavailable("starting_failed", "The tool process ended again and again.")

    def _send(self, backend: Backend, calls: Iterable[Call], lines: Iterable[bytes]) -> None:
        """Sends calls that have an owner already, so none may be left behind: one that fails is answered."""
        for line in lines:
            try:
                backend.child.send(line)  # a child that died meanwhile answers through on_end
            except Exception as error:  # half a batch may be gone: nobody can say which calls the child has
                self.log.event("error", "send_failed", user=self.sub, error=type(error).__name__)
                backend.child.kill("stuck")
        for call in calls:
            if is_local(backend, call):
                call.finish(self.log, functools.partial(serve_locally, self, backend, call))
                self.on_call_done(backend, call, None)

    def calls(self, backend: Backend | None = None) -> list[Call]:
        """Returns the client's requests in flight, on one backend or all; under the lock."""
        return [
            call
            for each in ([backend] if backend else self.backends.all())
            for call in each.pending.values()
            if not call.is_internal
        ]

    def is_busy(self, backend: Backend) -> bool:
        """Returns whether a child has something to do, or waits for its client; under the lock."""
        if any(not call.may_be_cut_off for call in backend.pending.values()):
            return True
        return any(each.backend is backend for each in self.questions.open)

    def notify(self, method: str, params: dict[str, object] | None = None) -> None:
        """A notification of the client for a child that is awake."""
        with self.lock:
            backend = self.backend
        self.used_at = self.services.clock.monotonic()
        if backend and backend.has_dialect:
            if method == "notifications/initialized":
                self._make_ready(backend)
            else:
                backend.forward(method, params)

    def cancel(
        self,
        call: Call,
        params: dict[str, object] | None = None,
        deliver: Callable[[], object] | None = None,
        state: CallState = CallState.CANCELLED,
    ) -> bool:
        """Ends a call in flight: its child is told, `deliver` answers. Returns whether it was in flight."""
        with self.lock:
            backend = next((each for each in self.backends.all() if each.number_of(call) is not None), None)
            number = backend.number_of(call) if backend else None
            if backend is None or number is None:
                return False
            del backend.pending[number]
            self.questions.drop_of(call)
        call.finish(self.log, deliver, state)
        try:
            backend.send_cancellation(number, params)
        finally:
            self.on_call_done(backend, call, None)
        return True

    # -- a new child

    def update_subscriptions(self) -> set[str]:
        """Makes the child's subscriptions what this session wants; returns the resources that it refused."""
        with self._subscription_lock:
            with self.lock:
                backend = self.backend
                uris = set(self.replay.subscriptions)
            return backend.subscriptions.update(uris) if backend else set()

    def on_handshake(self, backend: Backend, server: dict[str, object], is_replay: bool) -> None:
        """A new child described itself as `server`: the session adopts that, and replays its own state."""
        said = len(dump(server))
        if said > MAX_SERVER:  # it is kept, in memory and on file
            self.log.event("error", "child_says_too_much_of_itself", user=self.sub, bytes=said)
            raise unavailable("starting_failed", "The tool process says too much of itself.")
        version = member(server, "protocolVersion", str, "")
        if self.version and version != self.version:
            self.log.event(
                "warning", "child_speaks_another_version", user=self.sub, was=self.version, now=version
            )
        self.server = server
        self.ttl = backend.ttl
        self.version = self.version or version
        if is_replay or not self.is_durable:
            self._replay_to(backend)

    def _replay_to(self, backend: Backend) -> None:
        read_again(self)
        self._make_ready(backend)
        replay = self.replay
        if replay.level:
            backend.set_level(replay.level)
        if replay.subscriptions or self.frontend.needs_subscriptions:
            backend.subscriptions.update(set(replay.subscriptions))
        if replay.tools_hash:
            compare_tools(self, backend)
        self.frontend.on_start(backend)

    def _make_ready(self, backend: Backend) -> None:
        """The client's handshake is over; a session hears of changes from the start."""
        backend.make_ready(set(self.replay.subscriptions) if self.is_durable else None)
        if self.settings.audit_calls:
            backend.tool_list.learn()

    # -- what the child says

    def on_questions(self, backend: Backend, questions: list[OpenQuestion], call: Call | None) -> None:
        """The child asks its client for things: the frontend passes them on."""
        if call is None:
            self.launcher.note_sends_requests(backend.program)
        self.frontend.on_questions(backend, questions, call)

    def on_withdrawn(self, backend: Backend, message: Message) -> None:
        """The child wants no answer to a question any more."""
        request_id = member(message.params, "requestId", object, None)
        self.frontend.on_withdrawn(message, self.questions.withdraw(backend, request_id))

    def on_notification(self, backend: Backend, message: Message, is_subscribed: bool) -> None:
        """The child notifies its client."""
        self.frontend.on_notification(backend, message, is_subscribed)

    def on_call_done(self, backend: Backend, call: Call, message: Message | None) -> None:
        """A call is over: drained children stop, waiters may get the slot, a refused token is looked into."""
        if backend is not self.backend:
            self.backends.stop_if_drained(backend)
        self._capacity.slot_may_be_free()
        if call.method == "tools/call" and message:
            error = member(message.body, "error", dict, None)
            if member(error, "code", int, None) == INTERNAL_ERROR:
                self.launcher.examine_in_background(self.sub)

    def on_end(self, backend: Backend) -> None:
        """A child has ended: its calls are answered, its questions are withdrawn, its slot is free."""
        try:
            with self.lock:
                self.backends.remove(backend)
                calls = backend.pending
                backend.pending = {}
                self.questions.drop_from(backend)
            whose = answer_of(backend.child.too_long)
            reason = str(backend.child.reason)
            for number, call in calls.items():
                is_too_large = reason == "line_too_long" and whose in (None, number)
                call.finish(self.log, functools.partial(fail_lost, call, reason, is_too_large))
        finally:
            self._capacity.release_slot(self.backends)
            report_end(self, backend)

    # -- time, and the end

    @property
    def keeps_nothing(self) -> bool:
        """Returns whether it has no child and nothing that a client has not taken."""
        backends = self.backends
        if backends.current or backends.draining or backends.starting:
            return False
        return self.frontend.keeps_nothing

    def tick(self, now: float) -> None:
        """Answers what has waited too long (monotonic time `now`); called by the reaper."""
        with self.lock:
            backends = self.backends.all()
            late = [
                call
                for backend in backends
                for call in backend.pending.values()
                if call.deadline <= now and call.waiting_since is None
            ]
            stale = [question for question in self.questions.open if question.deadline <= now]
            self.frontend.tick()
        for backend in backends:
            if backend is not self.backend:
                self.backends.stop_if_drained(backend)
        if not backends and self.frontend.is_listening:  # its child died: what it listens to must go on
            self.backends.start_in_background(modest=True)
        if stale or late:
            # In another thread: a child that does not read must not delay the reaper.
            threading.Thread(target=self._give_up, args=(stale, late), daemon=True, name="give-up").start()

    def _give_up(self, questions: Iterable[OpenQuestion], calls: Iterable[Call]) -> None:
        for question in questions:
            call = question.call
            if call and call.state is CallState.SUSPENDED:
                sentence = "Nobody came back with the answers in time."
                fail = functools.partial(call.fail, "timed_out", sentence, retryable=False)
                self.cancel(call, {"reason": "no retry came"}, fail, CallState.TIMED_OUT)
            error: dict[str, object] = {
                "code": SERVER_ERROR,
                "message": "The client did not answer in time",
            }
            self.questions.answer(question, error=error)
        for call in calls:
            sentence = "The tool did not answer in time; whether it did anything is not known."
            fail = functools.partial(call.fail, "timed_out", sentence, retryable=False)
            self.cancel(call, {"reason": "timed out"}, fail, CallState.TIMED_OUT)

    def end(self, reason: str) -> None:
        """Ends the session: its child stops, its streams end, its calls are answered with that."""
        with self.lock:
            if self.ended:
                return
            self.ended = True
            backends = self.backends.all()
            self.backends.current = None
            calls = [call for backend in backends for call in backend.pending.values()]
            for backend in backends:
                backend.pending = {}
            self.questions.open = set()
        try:
            for call in calls:
                sentence = f"The session ended ({reason}); whether the call did anything is not known."
                fail = functools.partial(call.fail, "session_ended", sentence, retryable=False)
                call.finish(self.log, fail)
        finally:
            for backend in backends:
                backend.child.stop(reason)
            self.frontend.end()

    # -- tools

    def listing(self) -> dict[str, Tool] | None:
        """Returns the child's tools, asked once and after each change; None when the child is silent."""
        for _ in range(3):
            backend = self.backends.ensure()
            tools = backend.tool_list.tools
            if tools is None and not backend.subscriptions.hears_list_changes:
                self.update_subscriptions()
            with contextlib.suppress(ListChanged):
                tools = backend.tool_list.read() if tools is None else tools
                if tools is not None or backend.is_alive:
                    return tools
        return None

    def lists(self, name: str) -> bool:
        """Returns whether a child of this session is known to list a tool of this name."""
        backend = self.backend
        return backend.tool_list.has(name) if backend else self.launcher.lists_tool(name)

    def note_task(self, tool: str, result: object) -> None:
        """Keeps a task's tool, for tool rules (MCP 2025-11-25 tasks; the tasks extension of 2026-07-28)."""
        task = result.get("task", result) if isinstance(result, dict) else None
        task_id = member(task, "taskId", str, None)
        if task_id is not None and len(task_id) <= MAX_NAME and len(tool) <= MAX_NAME:
            with self.lock:
                self.tasks[task_id] = tool
                if len(self.tasks) > MAX_TASKS:
                    self.tasks.popitem(last=False)


def note_tools(session: Session, result: object) -> None:
    """Keeps a fingerprint of the tools that the client has been told of."""
    backend = session.backend
    session.replay.set_tools(backend.program.digest(result) if backend else list_digest(result, "tools"))


def note_rights(session: Session, rights: Rights | None) -> None:
    """Notifies the client of its lists when the operator's rules leave it another part of them.

    Ends subscriptions that it may not have any more.
    """
    if session.replay.note_rights(rights_mark(rights)):
        for kind in LIST_KINDS:
            changed = Message("notification", None, f"notifications/{kind}/list_changed", {}, {})
            session.frontend.on_notification(None, changed, True)
    if rights is not None and not rights.resources and session.replay.subscriptions:
        session.frontend.forget_resources()
        with contextlib.suppress(RuntimeError):  # no thread to be had: nobody hears of them anyway
            threading.Thread(target=session.update_subscriptions, daemon=True, name="subscribe").start()


def compare_tools(session: Session, backend: Backend) -> None:
    """Notifies the client, in the background, when the new child has other tools than the last one."""

    def compare(result: object) -> None:
        digest = backend.program.digest(result)
        if digest != session.replay.tools_hash:
            session.replay.set_tools(digest)
            changed = Message("notification", None, "notifications/tools/list_changed", {}, {})
            session.frontend.on_notification(backend, changed, True)

    call = InternalCall("tools/list", {}, 60)
    call.on_success = compare
    backend.start(call)


def is_local(backend: Backend, call: Call) -> bool:
    """Returns whether the broker answers a call itself: a modern child does not know the method any more."""
    return backend.dialect.is_modern and call.method in LEGACY_ONLY


def serve_locally(session: Session, backend: Backend, call: Call) -> None:
    """Answers, for a modern child: a log level goes with each request from now on, a subscription is made."""
    params = call.params or {}
    if call.method == "logging/setLevel":
        level = member(params, "level", str, "")
        if level not in LEVELS:
            call.error(INVALID_PARAMS, f"level must be one of {', '.join(LEVELS)}", None)
            return
        backend.set_level(level)
    uri = member(params, "uri", str, None)
    if call.method.startswith("resources/") and not change_subscription(session, call.method, uri):
        call.error(INVALID_PARAMS, "The resource cannot be subscribed to", None)
        return
    if call.on_success:
        call.on_success({})
    call.give({})


def change_subscription(session: Session, method: str, uri: str | None) -> bool:
    """Subscribes a session to a resource of a modern child, or ends that; returns whether it agrees."""
    if uri is None:
        return False
    if method == "resources/unsubscribe":
        session.replay.unsubscribe(uri)
    else:
        session.replay.subscribe(uri)
    is_refused = uri in session.update_subscriptions()
    if is_refused:
        session.replay.unsubscribe(uri)
    return not is_refused


def report_end(session: Session, backend: Backend) -> None:
    """Records the end of a child; an unexpected one is a warning with the last words of its stderr."""
    child = backend.child
    session.log.audit(
        "child_stopped", user=session.sub, client=session.client_id, pid=child.pid, reason=child.reason
    )
    # A child that ends because it was asked for its era is started again, to be asked less.
    is_probe = backend.was_probed and not backend.serves and not backend.has_failed
    if (backend.has_failed or not child.asked) and not is_probe:
        session.log.bounded(
            "warning",
            "child_died",
            session.sub,
            user=session.sub,
            pid=child.pid,
            at="work" if backend.serves else "start",
            reason=child.reason,
            stderr=child.last_words or None,
        )


def fail_lost(call: Call, reason: str, is_too_large: bool) -> None:
    """Answers a call whose child is gone (design 5: the table of cases)."""
    if is_too_large:
        call.fail(
            "answer_too_large",
            "The tool's answer was larger than the server passes on; whether it did anything is not known.",
            retryable=False,
        )
    else:
        call.fail(
            "child_died",
            f"The tool process ended ({reason}) before it answered; whether it did anything is not known.",
            retryable=True,
        )


def read_again(session: Session) -> None:
    """Takes over a session's state on file: another broker of this store may have served it since."""
    with contextlib.suppress(StoreUnavailable):
        row = session.name and session.services.store.session(session.name, session.sub, session.client_id)
        if row:
            session.replay.read(row)


# ============================================================================================================
# Frontends
# Owns how clients of each era are spoken to: where answers,
# questions and notifications of a session's child go.
# Must not know HTTP or tokens; of children only what the session tells.
# ============================================================================================================

HEADER_MISMATCH = -32020
MISSING_CAPABILITY = -32021
LEGACY_NOT_FOUND = -32002
LEGACY_URL_REQUIRED = -32042
STATUS_OF_ERROR = {
    METHOD_NOT_FOUND: 404,
    HEADER_MISMATCH: 400,
    MISSING_CAPABILITY: 400,
    UNSUPPORTED_VERSION: 400,
}
CACHEABLE = {
    "server/discover",
    "tools/list",
    "prompts/list",
    "resources/list",
    "resources/templates/list",
    "resources/read",
}
STAMPS = {"resultType", "ttlMs", "cacheScope"}
# The requests that may be answered by `input_required`.
MAY_ASK = ("tools/call", "prompts/get", "resources/read")
LIST_CHANGES = {f"notifications/{kind}/list_changed": f"{kind}ListChanged" for kind in LIST_KINDS}
LIST_CHANGED = {kind: method for method, kind in LIST_CHANGES.items()}
LISTS = {f"{kind}ListChanged": (f"{kind}/list", kind) for kind in LIST_KINDS}
SERVER_CAPABILITIES = (
    "experimental",
    "extensions",
    "logging",
    "completions",
    "prompts",
    "resources",
    "tools",
)
LEGACY_MISSING = re.compile(r"client does not support|\bcapabilit", re.IGNORECASE | re.ASCII)
COLLECT_WAIT = 0.05  # seconds in which a legacy child may ask more, so that all goes out in one answer

Change = Callable[[dict[str, object]], dict[str, object]]


def dump_notification(message: Message) -> bytes:
    """Returns a child's notification as it goes to a client."""
    return dump(asking(message.method, message.params or None, jsonrpc="2.0"))


# -- legacy clients


class LegacyCall(Call):
    """A call of a legacy client: what comes back goes to a stream that it may share with others of its batch.

    `streamable`: the client reads events. `change` is what is done to a result before this client sees it.
    """

    def __init__(
        self,
        message: Message,
        deadline: float,
        stream: EventStream,
        streamable: bool,
        meta: RequestMeta = SESSION_META,
        change: Change | None = None,
    ) -> None:
        super().__init__(message.method, message.params, deadline, meta)
        self.id = message.id
        self.stream = stream
        self.streamable = streamable
        self._change = change

    def notify(self, body: dict[str, object]) -> None:
        """Something that belongs to the request comes before its answer."""
        if self.streamable:
            self.stream.put(dump(body))

    def answer(self, line: bytes, message: Message) -> None:
        """Delivers the child's answer under the client's own id, without the modern era's own members."""
        result = member(message.body, "result", dict, None)
        if result is not None and (self._change or not STAMPS.isdisjoint(result)):
            self.give(result)
        else:
            self._put(with_id(line, message, self.id))

    def give(self, result: dict[str, object]) -> None:
        """Delivers a result."""
        plain = {name: value for name, value in result.items() if name not in STAMPS}
        plain = without_meta(plain, {META_SERVER})
        self._put(result_message(self.id, self._change(plain) if self._change else plain))
        self.outcome = "ok"

    def error(self, code: int, text: str, data: object) -> None:
        """Delivers an error; in this era a capability that the client lacks has no code of its own."""
        self._put(error_message(self.id, code, text, data))

    def _put(self, data: bytes) -> None:
        self.stream.put(data, answer=True, request_id=self.id)

    def close(self) -> None:
        """Ends the stream: nothing can be put on it."""
        self.stream.end()


class SessionFrontend:
    """A client with a session (legacy).

    What belongs to no request goes to its GET stream; questions go out as requests, and come back as
    responses.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        session.frontend = self
        self._numbers = itertools.count(1)
        self._asked: dict[str, OpenQuestion] = {}  # the id of our request -> what it asks
        self.streams: collections.OrderedDict[str, EventStream] = collections.OrderedDict()
        self.get_stream = session.new_stream(0)
        self.get_stream.named = True
        self._quiet: list[
            EventStream
        ] = []  # for who resumes what is not known any more; nothing is put on them

    @property
    def is_listening(self) -> bool:
        """Returns whether a client is subscribed to a resource; an open stream alone keeps no child awake."""
        return bool(self.session.replay.subscriptions) and self.get_stream.is_open

    @property
    def needs_subscriptions(self) -> bool:
        """Returns whether a new child must be told that somebody listens."""
        return self.is_listening

    def on_start(self, backend: Backend) -> None:
        """The session itself compares the tools of a new child."""

    @property
    def keeps_nothing(self) -> bool:
        """Returns whether no client reads, and what none has taken has gone by its time."""
        return all(
            stream.holds_nothing for stream in (self.get_stream, *list(self.streams.values()), *self._quiet)
        )

    # -- streams

    def name_stream(self, stream: EventStream) -> None:
        """A client has been told an id of this stream, and may come back for what is on it."""
        with self.session.lock:
            self.streams[stream.key] = stream

    def open_stream(self, event_id: str | None, seat: Callable[[str], None]) -> Reader:
        """Returns the reader of a GET: of the session's stream, or after the event that Last-Event-ID names.

        A client resumes each stream it had by itself (MCP 2025-11-25 transports, *Resumability*), also one of
        before a restart. Such an id opens the session's stream if nobody reads that; else a quiet one, or the
        two would end each other for ever. `seat` is called with a stream's key before it is opened, and may
        refuse: then no other reader has been ended.
        """
        key, _, number = (event_id or "").rpartition("-")
        with self.session.lock:
            stream = self.get_stream if key == self.get_stream.key else self.streams.get(key)
        if not event_id or stream is None or not re.fullmatch(r"[0-9]{1,15}", number):
            return self._open_own(seat, take_over=not event_id)
        seat(stream.key)
        return stream.open(int(number))

    def _open_own(self, seat: Callable[[str], None], take_over: bool) -> Reader:
        own = self.get_stream
        if take_over or not own.is_open:
            seat(own.key)
            reader = own.open() if take_over else own.open_if_free()
            if reader:
                return reader
        stream = self.session.new_stream(0)
        seat(stream.key)
        reader = stream.open()
        with self.session.lock:
            self._quiet = [each for each in self._quiet if each.is_open]
            self._quiet.append(stream)
            ended = self.session.ended
        if ended:  # end() has been here already
            stream.end()
        return reader

    # -- what the client says

    def on_message(self, message: Message) -> None:
        """A notification or an answer of the client."""
        if message.kind == "response":
            self._on_answer(message)
        elif message.method == "notifications/cancelled":
            self._on_cancelled(message.params or {})
        else:
            self.session.notify(message.method, message.params)

    def _on_cancelled(self, params: dict[str, object]) -> None:
        """The newest request of that id ends with an error, its child is told."""
        request_id = params.get("requestId")
        with self.session.lock:
            found = [
                call for call in self._calls() if call.id == request_id and type(call.id) is type(request_id)
            ]
        if found:
            fail = functools.partial(
                found[-1].fail, "cancelled", "The request was cancelled.", retryable=False
            )
            self.session.cancel(found[-1], params, fail)

    def _on_answer(self, message: Message) -> None:
        """The client's answer to a question; one that nobody asked is dropped (J07)."""
        with self.session.lock:
            question = self._asked.pop(message.id, None) if isinstance(message.id, str) else None
        if question:
            error = member(message.body, "error", dict, None)
            self.session.questions.answer(question, message.body.get("result"), error)

    # -- what the child says

    def _calls(self, backend: Backend | None = None) -> list[LegacyCall]:
        return [call for call in self.session.calls(backend) if isinstance(call, LegacyCall)]

    def _target(self, backend: Backend | None) -> tuple[EventStream, LegacyCall | None]:
        """Returns the stream for a message that belongs to no request, and the call it is counted to."""
        with self.session.lock:
            calls = self._calls()
            here = self._calls(backend)
            if len(calls) == 1 and calls[0].streamable and calls[0].stream.is_open:
                return calls[0].stream, calls[0] if here else None
            one = here[0] if len(here) == 1 else None
            if self.get_stream.is_open:
                return self.get_stream, one
            still_open = [call for call in calls if call.streamable and call.stream.is_open]
            return (still_open[-1].stream if still_open else self.get_stream), one

    def on_notification(self, backend: Backend | None, message: Message, is_subscribed: bool) -> None:
        """A notification of the child goes to the client where it listens."""
        stream = self.get_stream if is_subscribed else self._target(backend)[0]
        stream.put(dump_notification(message))

    def on_questions(self, backend: Backend, questions: list[OpenQuestion], call: Call | None) -> None:
        """Sends questions to the client, where it listens.

        Without an open stream it has 10 s instead of `input_timeout`.
        """
        session = self.session
        stream, guess = self._target(backend)
        for question in questions:
            number = f"{stream.key}.{next(self._numbers)}"
            seconds = session.settings.input_timeout if stream.is_open else QUESTION_GRACE
            if not session.questions.ask(question, call or guess, seconds):
                if call:  # it ended with this refusal
                    return
                continue
            with session.lock:
                self._asked[number] = question
            stream.put(dump(asking(question.method, question.params, jsonrpc="2.0", id=number)))

    def on_withdrawn(self, message: Message, questions: list[OpenQuestion]) -> None:
        """The child takes questions back: the client is told."""
        with self.session.lock:
            numbers = [number for number, question in self._asked.items() if question in questions]
            for number in numbers:
                del self._asked[number]
        for number in numbers:
            withdrawal = {**message.body, "params": {**(message.params or {}), "requestId": number}}
            self._target(questions[0].backend)[0].put(dump(withdrawal))

    def forget_resources(self) -> None:
        """Ends all subscriptions to resources."""
        for uri in list(self.session.replay.subscriptions):
            self.session.replay.unsubscribe(uri)

    # -- time, and the end

    def tick(self) -> None:
        """Forgets taken streams, but the newest, and questions that are over; under the session's lock."""
        over = [key for key, stream in self.streams.items() if stream.finished and not stream.is_open]
        taken = [key for key in over if self.streams[key].is_taken][:-8]
        for key in taken + over[: max(0, len(self.streams) - len(taken) - 64)]:
            stream = self.streams.pop(key, None)
            if stream:
                stream.forget()
        if self._asked:
            still_open = self.session.questions.open
            self._asked = {number: each for number, each in self._asked.items() if each in still_open}

    def end(self) -> None:
        """The session is over."""
        with self.session.lock:
            streams = [self.get_stream, *self.streams.values(), *self._quiet]
        for stream in streams:
            stream.end()
            stream.forget()

    def unload(self) -> None:
        """The session leaves memory: nothing of it is charged to anybody any more."""
        for stream in (self.get_stream, *self.streams.values()):
            stream.forget()


# -- modern clients, and legacy ones without a session


class SuspendedCalls:
    """Calls that wait for a client's retry, by the name in the retry's `requestState`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()  # guards the dict; a leaf
        self.calls: dict[str, tuple[ModernCall, float]] = {}

    def add(self, call: ModernCall) -> str:
        """Stores a suspended call; returns the name its retry must carry."""
        name = new_secret()
        with self._lock:
            self.calls[name] = (call, time.monotonic() + self._settings.input_timeout + 60)
        return name

    def take(self, name: str) -> ModernCall | None:
        """Returns the call of a name, once; None when there is none (any more)."""
        with self._lock:
            return self.calls.pop(name, (None, 0.0))[0]

    def expire(self) -> None:
        """Forgets calls for which nobody has come back."""
        now = time.monotonic()
        with self._lock:
            self.calls = {name: entry for name, entry in self.calls.items() if entry[1] > now}


class ModernCall(Call):
    """A call of a modern client, which may be asked for input and retry it under another id.

    MCP 2026-07-28 patterns/mrtr. `seal` makes the retry's requestState from the name of the suspended call.
    `change` is done to a result before this client sees it.
    """

    def __init__(
        self,
        frontend: StatelessFrontend,
        message: Message,
        deadline: float,
        meta: RequestMeta,
        suspended: SuspendedCalls,
        seal: Callable[[str], str],
        change: Change | None = None,
    ) -> None:
        params = None if message.params is None else without_meta(message.params, MODERN_META)
        super().__init__(message.method, params, deadline, meta)
        self.id = message.id
        self.session = frontend.session
        self.stream = self.session.new_stream(1)
        self.is_gone = False  # whether it ended in an error while its client was to come back
        self._frontend = frontend
        self._suspended = suspended
        self._seal = seal
        self._change = change
        self._name = ""
        self._asked: dict[str, OpenQuestion] = {}  # the name that the client knows -> what it was asked
        self._answering: set[OpenQuestion] = set()

    def notify(self, body: dict[str, object]) -> None:
        """Progress, and messages of the level that this request asked for; nothing else belongs to it."""
        wanted = self.meta.log_level
        level = member(body.get("params"), "level", str, "")
        is_heard = wanted and level in LEVELS and LEVELS.index(level) >= LEVELS.index(wanted)
        if (
            body["method"] == "notifications/progress"
            or body["method"] == "notifications/message"
            and is_heard
        ):
            self.stream.put(dump(body))

    def answer(self, line: bytes, message: Message) -> None:
        """Delivers the child's answer, with every member that this era wants there."""
        error = member(message.body, "error", dict, None)
        result = message.body.get("result")
        if error:
            self.refuse(error, self._missing(error))
        elif not isinstance(result, dict):
            self.error(INTERNAL_ERROR, "The tool process gave a result that is no object", None)
        elif self._change or "_meta" in result or "cacheScope" in result:
            self.give(result)
        else:
            self._put(with_id(line, message, self.id, self._stamps(result)))

    def _stamps(self, result: dict[str, object]) -> dict[str, object]:
        stamps: dict[str, object] = {"resultType": "complete", "_meta": self._frontend.server_meta}
        if self.method in CACHEABLE:
            stamps |= {"ttlMs": 0, "cacheScope": "private"}
        return {name: value for name, value in stamps.items() if name not in result}

    def give(self, result: dict[str, object]) -> None:
        """Delivers a result."""
        result = self._change(result) if self._change else result
        if self.method in CACHEABLE:  # nothing is for everybody here: each user has another token
            result = {**result, "cacheScope": "private"}
        meta = {**self._frontend.server_meta, **member(result, "_meta", dict, {})}
        self._put(result_message(self.id, self._stamps(result) | result | {"_meta": meta}))
        self.outcome = "ok"

    def error(self, code: int, text: str, data: object) -> None:
        """Delivers an error; the legacy era's own code for it is not used in this one.

        A call that was suspended is gone with it.
        """
        if self.ended_suspended:  # no retry can find it any more
            self.is_gone = True
            self._suspended.take(self._name)
        code = INTERNAL_ERROR if code == SERVER_ERROR else code
        self._put(error_message(self.id, code, text, data), STATUS_OF_ERROR.get(code, 200))

    def _put(self, data: bytes, status: int = 200) -> None:
        self.stream.put(data, answer=True, status=status, request_id=self.id)

    def close(self) -> None:
        """Ends the stream: nothing can be put on it."""
        self.stream.end()

    def refuse(self, error: dict[str, object], undeclared: dict[str, object]) -> None:
        """Delivers an error of a child or a client; `undeclared`: what the client should have declared."""
        text = str(error.get("message", ""))
        if undeclared:
            self.error(MISSING_CAPABILITY, text, {"requiredCapabilities": undeclared})
            return
        code = member(error, "code", int, INTERNAL_ERROR)
        code = {LEGACY_NOT_FOUND: INVALID_PARAMS, LEGACY_URL_REQUIRED: INTERNAL_ERROR}.get(code, code)
        self.error(code, text, error.get("data"))

    def _missing(self, error: dict[str, object]) -> dict[str, object]:
        """What a legacy child missed in its client, which it has no code for and says in words."""
        words = member(error, "message", str, "")
        if not LEGACY_MISSING.search(words):
            return {}
        named = re.findall(r"\b(sampling|elicitation|roots)\b", words)
        return {name: {} for name in named if name not in (self.meta.capabilities or {})}

    # -- suspended, and resumed

    def ask_client(self, questions: list[OpenQuestion], are_all: bool) -> None:
        """The child asks in the middle of this call; `are_all`: no further question follows at once."""
        for question in questions:
            self.session.questions.ask(question, self, self.session.settings.input_timeout)
        if are_all:
            self._suspend()
        else:
            run_later(COLLECT_WAIT, self._suspend)

    def _suspend(self) -> None:
        """Answers with `input_required`; what comes from here on waits for the retry. Raises nothing."""
        session = self.session
        with session.lock:
            questions = [each for each in session.questions.of(self) if each not in self._answering]
            if self.state is CallState.SUSPENDED or not questions or not self.enter(CallState.SUSPENDED):
                return
            self._asked = named_questions(questions)
            stream = self.stream
            self.stream = session.new_stream(1)
        try:
            stream.put(self._input_required(), answer=True, request_id=self.id)
        except Exception as error:  # the client waits at the old stream
            session.log.event("error", "delivery_failed", error=type(error).__name__)
            with session.lock:
                self.enter(CallState.WAITING_FOR_CLIENT)
                self.stream = stream
            session.cancel(self, None, self.fail_undelivered, CallState.DONE)

    def _input_required(self) -> bytes:
        requests = {key: asking(question.method, question.params) for key, question in self._asked.items()}
        self._name = self._suspended.add(self)
        result = {
            "resultType": "input_required",
            "inputRequests": requests,
            "requestState": self._seal(self._name),
            "_meta": self._frontend.server_meta,
        }
        return result_message(self.id, result)

    def anew(self, message: Message) -> ModernCall:
        """Returns a call for a retry that does not go on with this one."""
        return ModernCall(
            self._frontend, message, self.deadline, self.meta, self._suspended, self._seal, self._change
        )

    def resume(self, request_id: object, responses: dict[str, object]) -> Reader:
        """The client came back, with answers or without: returns a Reader of what follows.

        What is missing is asked again.
        """
        with self.session.lock:
            is_waiting = self.waiting_since is not None
            self.enter(CallState.WAITING_FOR_CLIENT if is_waiting else CallState.SENT)
            self.id = request_id
            asked = self._asked
            self._asked = {}
            answers = {key: responses[key] for key in asked if isinstance(responses.get(key), dict)}
            # A question that came with others has a timer of its own,
            # which must not ask it again while it is being answered.
            self._answering = {asked[key] for key in answers}
            reader = self.stream.open()
        for key, answer in answers.items():
            self.session.questions.answer(asked[key], answer)
        if len(answers) < len(asked):
            self._suspend()
        return reader


def named_questions(questions: list[OpenQuestion]) -> dict[str, OpenQuestion]:
    """Returns {key: question}: the child's key; a legacy child's questions are named by what they ask for."""
    named: dict[str, OpenQuestion] = {}
    for question in sorted(questions, key=lambda question: str(question.key)):
        key = str(question.key)
        if not question.backend.dialect.is_modern:
            schema = member(question.params, "requestedSchema", dict, {})
            properties = member(schema, "properties", dict, {})
            key = next(iter(properties)) if len(properties) == 1 else ASKS[question.method]
        named[key if key not in named else f"{key}_{len(named) + 1}"] = question
    return named


@dataclass(frozen=True, slots=True)
class Listener:
    """A `subscriptions/listen` that is served: its stream, its id, and its filter."""

    stream: EventStream
    id: object
    kinds: frozenset[str]
    uris: frozenset[str]

    def hears(self, message: Message) -> bool:
        """Returns whether a notification passes this listener's filter."""
        if message.method == "notifications/resources/updated":
            return member(message.params, "uri", str, None) in self.uris
        return LIST_CHANGES.get(message.method) in self.kinds


class StatelessFrontend:
    """Requests that share a child.

    A notification goes to a call only if that is the only one in flight; all others go to those who listen.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        session.frontend = self
        self.users = 0  # requests that use it now
        self.is_leased_alone = False
        self._listeners: dict[str, Listener] = {}  # a stream's key -> who reads it
        self._lists: dict[str, bytes] = {}  # kind -> digest of what the last child listed

    @property
    def server_meta(self) -> dict[str, object]:
        """What every result says of the child."""
        info = member(self.session.server, "serverInfo", dict, None)
        return {} if info is None else {META_SERVER: info}

    @property
    def is_listening(self) -> bool:
        """Returns whether a client is subscribed to a resource; changes of lists keep no child awake."""
        return any(listener.uris for listener in self._listeners.values())

    @property
    def needs_subscriptions(self) -> bool:
        """Returns whether a new child must be told that somebody listens."""
        return bool(self._kinds() or self.is_listening)

    @property
    def keeps_nothing(self) -> bool:
        """Returns whether nobody uses it."""
        return not self._listeners and not self.users

    def discover(self) -> dict[str, object]:
        """Returns the result of server/discover, from the child's own description.

        MCP 2026-07-28 server/discover.
        """
        session = self.session
        if session.server is None:
            session.backends.ensure()
        capabilities = member(session.server, "capabilities", dict, {})
        instructions = member(session.server, "instructions", str, None)
        result: dict[str, object] = {
            "supportedVersions": [FIRST_MODERN_VERSION, *LEGACY_VERSIONS],
            "ttlMs": session.ttl,
            "capabilities": {
                name: capabilities[name]
                for name in SERVER_CAPABILITIES
                if isinstance(capabilities.get(name), dict)
            },
        }
        return result if instructions is None else result | {"instructions": instructions}

    # -- who listens

    def _kinds(self) -> set[str]:
        """Returns the lists whose changes a listener wants to hear of."""
        return {kind for listener in self._listeners.values() for kind in listener.kinds}

    def on_start(self, backend: Backend) -> None:
        """A new child serves: listeners are told of lists that have changed."""
        with self.session.lock:
            kinds = self._kinds()
        for kind in kinds:
            self._compare_list(backend, kind)

    def _compare_list(self, backend: Backend, kind: str) -> None:
        """Asks for a list, and tells the listeners if it has changed; nobody waits for that."""
        method, member_name = LISTS[kind]
        latest = self.session.launcher.lists

        def compare(result: object) -> None:
            now = list_digest(result, member_name)
            before = self._lists.get(kind)
            self._lists[kind] = latest[kind] = now
            if before not in (None, now):
                self._tell_listeners(Message("notification", None, LIST_CHANGED[kind], {}, {}))

        call = InternalCall(method, {}, 60)
        call.on_success = compare
        backend.start(call)

    def _tell_listeners(self, message: Message) -> None:
        with self.session.lock:
            listeners = list(self._listeners.values())
        for listener in listeners:
            if listener.hears(message):
                listener.stream.put(tagged(message.method, message.params or {}, listener.id))

    def _capabilities(self, uris: set[str]) -> dict[str, object]:
        """What the program can do. A child is started only where one is needed, or nothing is known yet."""
        session = self.session
        known = session.server or session.launcher.known_server()
        if uris or known is None:
            try:
                session.backends.ensure()
            except RpcError as error:
                if uris or member(error.data, "reason", str, "") != "upstream_down":
                    raise
                # A client that is refused may never listen again, and
                # the next start of a child tells which lists changed.
                return {kind: {"listChanged": True} for kind in LIST_KINDS}
            known = session.server
        return member(known, "capabilities", dict, {})

    def listen(self, request_id: object, wanted: dict[str, object]) -> EventStream:
        """Serves a `subscriptions/listen`: returns its stream, which first says what is honoured.

        MCP 2026-07-28 patterns/subscriptions.
        """
        session = self.session
        uris = {uri for uri in member(wanted, "resourceSubscriptions", list, []) if isinstance(uri, str)}
        capabilities = self._capabilities(uris)
        kinds = {
            f"{kind}ListChanged"
            for kind in LIST_KINDS
            if wanted.get(f"{kind}ListChanged") is True
            and member(member(capabilities, kind, dict, {}), "listChanged", bool, False)
        }
        if not member(member(capabilities, "resources", dict, {}), "subscribe", bool, False):
            uris = set()
        uris -= self._subscribe(uris, bool(kinds))
        stream = session.new_stream(1)
        honoured: dict[str, object] = dict.fromkeys(sorted(kinds), True)
        if uris:
            honoured["resourceSubscriptions"] = sorted(uris)
        acknowledgement = "notifications/subscriptions/acknowledged"
        stream.put(tagged(acknowledgement, {"notifications": honoured}, request_id))
        with session.lock:
            self._listeners[stream.key] = Listener(stream, request_id, frozenset(kinds), frozenset(uris))
            backend = session.backend
        for kind in kinds:
            if backend and backend.is_alive and kind not in self._lists:
                self._compare_list(backend, kind)
            elif kind in session.launcher.lists:
                self._lists.setdefault(kind, session.launcher.lists[kind])
        return stream

    def _subscribe(self, uris: set[str], listens: bool) -> set[str]:
        """Counts a listener's resources, and subscribes the child to them; returns those it refused."""
        session = self.session
        counted: list[str] = []
        refused = uris
        try:
            for uri in uris:
                session.replay.subscribe(uri)
                counted.append(uri)
            refused = uris & session.update_subscriptions() if uris or listens else set()
        finally:
            for uri in refused.intersection(counted):
                session.replay.unsubscribe(uri)
        return refused

    def unlisten(self, stream: EventStream) -> None:
        """The client listens no more."""
        with self.session.lock:
            listener = self._listeners.pop(stream.key, None)
        if listener:
            for uri in listener.uris:
                self.session.replay.unsubscribe(uri)
            if listener.uris:
                self.session.update_subscriptions()

    def forget_resources(self) -> None:
        """Ends all subscriptions to resources; their listeners keep the rest."""
        with self.session.lock:
            listeners = {key: each for key, each in self._listeners.items() if each.uris}
            for key, listener in listeners.items():
                self._listeners[key] = replace(listener, uris=frozenset())
        for listener in listeners.values():
            for uri in listener.uris:
                self.session.replay.unsubscribe(uri)

    # -- what the child says

    def on_notification(self, backend: Backend | None, message: Message, is_subscribed: bool) -> None:
        """Notifications go to the listeners, those of a call to the only request in flight."""
        self._tell_listeners(message)
        with self.session.lock:
            calls = self.session.calls(backend)
        if len(calls) == 1 and not is_subscribed:
            calls[0].notify(asking(message.method, message.params or None, jsonrpc="2.0"))

    def on_questions(self, backend: Backend, questions: list[OpenQuestion], call: Call | None) -> None:
        """Asks the client of the questions' call, if it is known and can be asked.

        No question is attributed to a call by guess.
        """
        session = self.session
        are_all = call is not None
        with session.lock:
            calls = session.calls(backend)
        if call is None and len(calls) == 1:
            call = calls[0]
        declared = (call.meta.capabilities or {}) if call and call.method in MAY_ASK else {}
        able = [question for question in questions if ASKS.get(question.method) in declared]
        for question in set(questions) - set(able):
            self._decline(question, call)
        if call and call.undeclared:
            error: dict[str, object] = {
                "code": METHOD_NOT_FOUND,
                "message": "The client did not declare what this needs",
            }
            refuse = functools.partial(call.refuse, error, call.undeclared)
            session.cancel(call, None, refuse, CallState.DONE)
        if able and isinstance(call, ModernCall):
            call.ask_client(able, are_all)

    def _decline(self, question: OpenQuestion, call: Call | None) -> None:
        """Answers a question for a client that cannot."""
        if call and question.method in ASKS:
            call.undeclared[ASKS[question.method]] = {}
        self.session.questions.ask(question, call, QUESTION_GRACE)
        error: dict[str, object] = {
            "code": METHOD_NOT_FOUND,
            "message": "The client that asked cannot be told from others, "
            "or did not say that it answers such questions",
        }
        self.session.questions.answer(question, error=error)

    def on_withdrawn(self, message: Message, questions: list[OpenQuestion]) -> None:
        """The child withdraws questions: their call's retry returns the outcome."""

    def tick(self) -> None:
        """Nothing goes by the clock here."""

    def end(self) -> None:
        """Ends the listeners' streams in order (MCP 2026-07-28 patterns/subscriptions, graceful closure)."""
        with self.session.lock:
            listeners = list(self._listeners.values())
            self._listeners = {}
        for listener in listeners:
            result = {"resultType": "complete", "_meta": {META_SUBSCRIPTION: listener.id}}
            listener.stream.put(result_message(listener.id, result), answer=True)

    def unload(self) -> None:
        """Nothing is kept for a client here."""


def tagged(method: str, params: dict[str, object], request_id: object) -> bytes:
    """Returns a notification for the listener whose request had this id."""
    meta = {**member(params, "_meta", dict, {}), META_SUBSCRIPTION: request_id}
    return dump({"jsonrpc": "2.0", "method": method, "params": {**params, "_meta": meta}})


# ============================================================================================================
# Sessions
# Owns which sessions are in memory, by name, and which shared
# ones, by user, client and what the client can be asked.
# Must not know HTTP, or what a message says.
# ============================================================================================================

MAX_CAPABILITIES = 4096  # bytes of what a client says it can be asked, as JSON
MAX_POOLED = 32  # shared sessions of one user, used or not; above it those go that nobody uses
MAX_POOLED_IN_USE = 256


def known_capabilities(capabilities: dict[str, object]) -> dict[str, object]:
    """Of what a client says it can do, what a child may ask of it."""
    return {
        name: capabilities[name] for name in sorted(ASKS.values()) if isinstance(capabilities.get(name), dict)
    }


class Lease:
    """One request's use of a shared session; release() gives it back, once."""

    def __init__(self, sessions: Sessions, frontend: StatelessFrontend) -> None:
        self._sessions = sessions
        self.frontend = frontend
        self._is_held = True

    def release(self) -> None:
        """The request is over."""
        with self._sessions.lock:
            is_held = self._is_held
            self._is_held = False
            if is_held:
                self._sessions.give_back(self.frontend)


PoolKey = tuple[str, str, bytes]


class Sessions:
    """Sessions by name, and pools of shared ones by (user, client, digest of what the client can be asked).

    `lock` guards the maps; dict work only.
    """

    def __init__(self, services: Services, launcher: Launcher, capacity: Capacity) -> None:
        self._services = services
        self._settings = services.settings
        self._store = services.store
        self._log = services.log
        self._clock = services.clock
        self._launcher = launcher
        self._capacity = capacity
        self.lock = threading.Lock()
        self.sessions: dict[bytes, SessionFrontend] = {}
        self.pools: dict[PoolKey, list[StatelessFrontend]] = {}
        self.suspended = SuspendedCalls(services.settings)
        self._numbers = itertools.count(1)

    def _new(self, identity: Identity, initialize: dict[str, object], replay: ReplayState) -> Session:
        number = next(self._numbers)
        return Session(self._services, self._launcher, self._capacity, identity, initialize, replay, number)

    # -- sessions

    def open(self, sub: str, client_id: str, initialize: dict[str, object]) -> tuple[str, dict[str, object]]:
        """Opens a session with its first child; returns (session id, the child's initialize result)."""
        session_id = new_secret(self._settings.broker_prefix)
        name = token_hash(session_id)
        now = self._clock.now()
        replay = ReplayState(self._settings, functools.partial(self._store.update_session, name))
        frontend = SessionFrontend(self._new(Identity(name, sub, client_id), initialize, replay))
        session = frontend.session
        session.backends.ensure()
        with self.lock:
            self.sessions[name] = frontend
        try:
            too_many = self._store.add_session(
                name,
                sub,
                client_id,
                session.version or "",
                initialize,
                session.server,
                now,
                self._settings.max_session_rows_per_user,
            )
        except BaseException:
            self.forget([name], "could not be saved")
            raise
        session.is_on_file = True
        self._log.audit(
            "session_opened", user=sub, client=client_id, session=session.label, version=session.version
        )
        self.forget(too_many, "too many sessions of this user")
        return session_id, session.server or {}

    def find(self, session_id: str, sub: str, client_id: str, use: bool = True) -> SessionFrontend:
        """Returns the session of an id if it is this user's and client's; else always the same RpcError 404.

        Without `use` only its existence counts: it is not kept from being unloaded, nor from expiring.
        """
        name = token_hash(session_id)
        with self.lock:
            found = self.sessions.get(name)
            if use and found and (found.session.sub, found.session.client_id) == (sub, client_id):
                # In the lock: from here on unload() keeps it. What a stranger sends keeps nothing.
                found.session.used_at = self._clock.monotonic()
        if found is None:
            found = self._load(name, sub, client_id)
        session = found.session
        if session.ended or (session.sub, session.client_id) != (sub, client_id):
            raise session_not_found()
        return found

    def _load(self, name: bytes, sub: str, client_id: str) -> SessionFrontend:
        """Returns the session of a row; of two that load it at once both get the same."""
        row = self._store.session(name, sub, client_id)
        if row is None:
            raise session_not_found()
        replay = ReplayState(self._settings, functools.partial(self._store.update_session, name))
        replay.read(row)
        session = self._new(Identity(name, sub, client_id), json.loads(row.initialize), replay)
        session.version = row.protocol_version
        session.is_on_file = True
        loaded = SessionFrontend(session)
        with self.lock:
            return self.sessions.setdefault(name, loaded)

    def delete(self, session: Session) -> None:
        """The client ends its session."""
        assert session.name
        reason = "deleted by client"
        self._store.end_session(session.name, reason)
        self.forget([session.name], reason)

    # -- pools

    def lease(self, sub: str, client_id: str, capabilities: dict[str, object], alone: bool) -> Lease:
        """Returns a lease on a shared session of a client whose requests say what can be asked of it.

        `alone`: on one whose child serves nothing else meanwhile.
        """
        known = known_capabilities(capabilities)
        spelled = json.dumps(known, sort_keys=True).encode()
        if len(spelled) > MAX_CAPABILITIES:  # they are kept, and told to each child
            raise RpcError(INVALID_PARAMS, "What the client says it can be asked is too large.", None, 400)
        key = (sub, client_id, hashlib.sha256(spelled).digest())
        with self.lock:
            unused = self._make_room_in_pools(sub, key)
            frontend = self._free_in_pool(key, alone) or self._add_to_pool(key, known)
            frontend.users += 1
            frontend.is_leased_alone = alone
            frontend.session.used_at = self._clock.monotonic()
        for each in unused:
            each.session.end("another was used later")
        return Lease(self, frontend)

    def _free_in_pool(self, key: PoolKey, alone: bool) -> StatelessFrontend | None:
        """Under the lock."""
        pool = self.pools.setdefault(key, [])
        for frontend in reversed(pool) if alone else pool:
            if frontend.is_leased_alone or frontend.session.ended or alone and frontend.users:
                continue
            return frontend
        return None

    def _add_to_pool(self, key: PoolKey, capabilities: dict[str, object]) -> StatelessFrontend:
        """Under the lock."""
        initialize: dict[str, object] = {
            "protocolVersion": LEGACY_VERSIONS[0],
            "capabilities": capabilities,
            "clientInfo": {"name": "fjmcp-broker", "version": __version__},
        }
        replay = ReplayState(self._settings, None)
        frontend = StatelessFrontend(self._new(Identity(None, key[0], key[1]), initialize, replay))
        self.pools[key].append(frontend)
        return frontend

    def _make_room_in_pools(self, sub: str, key: PoolKey) -> list[StatelessFrontend]:
        """Takes out a user's shared sessions above the bound: those used longest ago, and not used now.

        Under the lock.
        """
        if key in self.pools:
            return []
        own = [frontend for name, pool in self.pools.items() if name[0] == sub for frontend in pool]
        unused = sorted((each for each in own if not each.users), key=lambda each: each.session.used_at)
        unused = unused[: max(0, len(own) - MAX_POOLED + 1)]
        if len(own) - len(unused) >= MAX_POOLED_IN_USE:
            raise unavailable("busy", "Too many requests of this user wait for tool processes.", 429, 1)
        for frontend in unused:
            self._take_out_of_pool(frontend)
        return unused

    def _take_out_of_pool(self, frontend: StatelessFrontend) -> None:
        """Under the lock."""
        for key, pool in list(self.pools.items()):
            if frontend in pool:
                pool.remove(frontend)
                if not pool:
                    del self.pools[key]

    def give_back(self, frontend: StatelessFrontend) -> None:
        """A lease is over; a session that never had a child, nor failed to get one, goes. Under the lock."""
        frontend.users -= 1
        frontend.is_leased_alone = frontend.is_leased_alone and frontend.users > 0
        backends = frontend.session.backends
        is_fresh = frontend.session.server is None and not backends.failures and not backends.starting
        if not frontend.users and is_fresh:
            self._take_out_of_pool(frontend)

    # -- the end of sessions

    def forget(self, names: Iterable[bytes], reason: str) -> None:
        """Ends all sessions that the store has dropped; no later look at the store names them again."""
        for name in names:
            with self.lock:
                frontend = self.sessions.pop(name, None)
            if frontend:
                self._end(frontend.session, reason)

    def forget_but(self, pairs: set[tuple[str, str]], sessions: Iterable[Session], reason: str) -> None:
        """Ends those of these sessions whose (user, client) is not among the pairs."""
        ended = {session for session in sessions if (session.sub, session.client_id) not in pairs}
        self._drop(lambda session: session in ended)
        for session in ended:
            self._end(session, reason)

    def forget_person(self, sub: str) -> None:
        """Ends every session of a number that has come to mean another person; their rows are gone."""
        for session in self._drop(lambda each: each.sub == sub):
            self._end(session, "identity changed")

    def _drop(self, which: Callable[[Session], bool]) -> set[Session]:
        """Drops sessions from memory and returns them; the others of a pool stay, with their children."""
        with self.lock:
            dropped = {session for session in self._all() if which(session)}
            self.sessions = {
                name: each for name, each in self.sessions.items() if each.session not in dropped
            }
            pools = {
                key: [each for each in pool if each.session not in dropped]
                for key, pool in self.pools.items()
            }
            self.pools = {key: pool for key, pool in pools.items() if pool}
        return dropped

    def _end(self, session: Session, reason: str) -> None:
        """Ends a session, which is dropped from the maps already. Raises nothing, so that others end, too."""
        try:
            session.end(reason)
        except Exception as error:
            self._log.event("error", "session_end_failed", user=session.sub, error=type(error).__name__)

    def close(self, reason: str) -> None:
        """Ends every child; sessions stay on file."""
        self._capacity.close()
        for session in self.all():
            self._end(session, reason)

    def end_streams(self) -> None:
        """Tells listeners that the end of their streams was no accident."""
        for session in self.all():
            if not session.is_durable:
                session.frontend.end()

    # -- time

    def save_uses(self) -> None:
        """Writes down when sessions were last used, those that were since the last time."""
        with self.lock:
            sessions = [(name, frontend.session) for name, frontend in self.sessions.items()]
        used = [(name, each, each.used_at) for name, each in sessions if each.used_at > each.saved_at]
        if used:
            started = self._clock.now() - self._clock.monotonic()  # when the monotonic clock said 0
            self._store.touch_sessions({name: started + used_at for name, _, used_at in used})
            for _, session, used_at in used:
                session.saved_at = used_at

    def unload(self, before: float) -> None:
        """Drops idle sessions without unread answers from memory; their row is enough to come back."""
        unloaded = self._drop(lambda session: session.used_at < before and session.keeps_nothing)
        self.suspended.expire()
        for session in unloaded:
            session.frontend.unload()

    def _all(self) -> list[Session]:
        shared = [frontend.session for pool in self.pools.values() for frontend in pool]
        return [*(frontend.session for frontend in self.sessions.values()), *shared]

    def all(self) -> list[Session]:
        """Returns every session in memory, shared ones too."""
        with self.lock:
            return self._all()

    def child_states(self) -> dict[str, int]:
        """Returns how many children there are in each of CHILD_STATES."""
        states = collections.Counter(session.backends.state() for session in self.all())
        counts = {state: states[state] for state in CHILD_STATES}
        counts["stopping"] = max(0, self._capacity.count() - sum(counts.values()))
        return counts

    def is_quiet(self) -> bool:
        """Returns whether no child has a request in flight just now."""
        return not any((backend := session.backend) and backend.pending for session in self.all())


# ============================================================================================================
# Maintenance
# Owns everything that happens by the clock: late calls, idle
# children, revocation, refreshes, rows and memory that go.
# Must not know HTTP or what a message says.
# ============================================================================================================


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose token came: the user, client and grant, and what it may do.

    `requested_scope` is what the login had asked for.
    """

    sub: str
    login: str
    client_id: str
    grant_id: int
    scope: str
    requested_scope: str
    expires_at: float
    groups: tuple[str, ...] = ()

    @property
    def may_write(self) -> bool:
        """Returns whether all tools may be called."""
        return WRITE in self.scope.split()


def resident_bytes() -> int:
    """Returns the resident memory of this process."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# An answer of 1 MiB needs some blocks of that size for a moment. Mapped and unmapped each time, their pages
# cost as much as all else that is done with it. So blocks come from the heaps, which keep what is free at
# their ends: the first until it is trimmed, the second for good. So that is no more than a few answers.
MALLOC_OPTIONS = (
    (-3, 4 << 20),  # M_MMAP_THRESHOLD: bytes
    (-1, 8 << 20),  # M_TRIM_THRESHOLD: bytes
    (-8, 2),  # M_ARENA_MAX: heaps
)


class Trimmer:
    """Gives memory back to the system after a busy time: free blocks of the allocator, and cyclic garbage.

    glibc returns only what is free at the top of a heap; between long-lived objects tens of MiB stay
    (measured: docs/limits.md).
    """

    EVERY = 10.0  # seconds while nobody calls
    BUSY = 60.0  # seconds while somebody does, for a collection holds up everybody's thread for some 20 ms
    LONGEST = 300.0  # seconds where it was of no use
    GROWN = 4 << 20  # bytes that make it worth the while

    def __init__(self) -> None:
        libc = ctypes.CDLL(None)
        self._trim = getattr(libc, "malloc_trim", None)  # glibc has it
        if self._trim:
            for number, value in MALLOC_OPTIONS:
                libc.mallopt(number, value)
        self._floor = self._level = 0  # the first round finds out: it gives back what the start has left
        self._last = 0.0
        self._pause = self.EVERY

    def tick(self, now: float, is_quiet: Callable[[], bool]) -> None:
        """Trims if there is more than at the best of times, less often the less it helps.

        `now` is monotonic.
        """
        if now < self._last + self._pause:
            return
        before = resident_bytes()
        if self._floor and before < self._floor + self.GROWN:
            return
        if self._floor and now < self._last + self.BUSY and not is_quiet():
            return
        gc.collect()
        if self._trim:
            self._trim(0)
        after = resident_bytes()
        has_use = before - after > self.GROWN // 4 or abs(before - self._level) > self.GROWN
        self._pause = self.EVERY if has_use else min(self.LONGEST, 2 * self._pause)
        self._floor = min(self._floor or after, after)
        self._level = after
        self._last = now


OPERATOR_RECORDS = 500  # of operators' commands, logged in one tick


class Reaper:
    """Everything that happens by the clock: tick() does what is due, run() calls it at least once a second.

    run() is a daemon thread.
    """

    # Seconds: by then a machine that starts with a wrong clock has been set right.
    FIRST_SWEEP = 3600.0

    def __init__(self, services: Services, launcher: Launcher, sessions: Sessions, brokers: Brokers) -> None:
        self._settings = services.settings
        self._store = services.store
        self._brokers = brokers
        self._upstream = services.upstream
        self._kept = services.kept
        self._log = services.log
        self._clock = services.clock
        self._launcher = launcher
        self._sessions = sessions
        self._stop = threading.Event()
        self._marker: object = None
        self._acted_at = self._clock.now()  # what was committed before it has been acted on
        self._next_sweep = self._clock.monotonic() + self.FIRST_SWEEP
        self._next_save = 0.0
        self._next_refresh = 0.0
        self._clock_reported = Seldom(services.clock, 60.0)
        self._trimmer = Trimmer()
        self._lock = threading.Lock()  # guards the three below; a leaf
        self._refreshing: set[str] = set()
        self._streams: dict[Reader, tuple[Caller, bool]] = {}
        self._unseen: list[Reader] = []

    def track(self, reader: Reader, caller: Caller, is_call: bool) -> None:
        """Has an open stream end 1 s after its grant, and 60 s after its token's expiry.

        A running call ends only at revocation.
        """
        with self._lock:
            self._streams[reader] = (caller, is_call)
            self._unseen.append(reader)  # its grant may have ended since it was let in

    def run(self) -> None:
        """Ticks until stopped.

        A database that is away holds up what is asked of it, and nothing that children and calls wait for.
        """
        if self._store.is_shared:
            threading.Thread(target=self._run, args=(self._tick_store,), daemon=True, name="reaper").start()
            self._run(self._tick_memory)
        else:
            self._run(self.tick)

    def _run(self, tick: Callable[[], object]) -> None:
        while not self._stop.wait(0.5):
            tick()

    def stop(self) -> None:
        """Ends run()."""
        self._stop.set()

    def tick(self) -> None:
        """One round: late calls, idle children, ended grants and sessions, tokens to refresh, rows to sweep.

        Raises nothing. A step that fails, for one session or for all, is
        logged and done again by the next round; the other steps go on.
        """
        self._tick_memory()
        self._tick_store()

    def _tick_memory(self) -> None:
        """What asks nothing of the store."""
        self._step(self._compare_clocks)
        self._step(self._log.flush)
        self._step(self._launcher.tick)
        for session in self._sessions.all():
            self._step(self._tick_session, session)
        self._step(self._kept.expire)
        self._step(self._trimmer.tick, time.monotonic(), self._sessions.is_quiet)

    def _tick_store(self) -> None:
        """What asks or changes the store."""
        now = self._clock.now()
        self._step(self._log_operators)
        self._step(self._end_what_was_revoked, now)
        self._step(self._brokers.report, self._acted_at)
        self._step(self._upstream.settle)
        self._step(self._refresh, now)
        monotonic = self._clock.monotonic()
        if monotonic >= self._next_save:
            self._next_save = monotonic + 60
            self._step(self._sessions.save_uses)
            self._step(self._sessions.unload, monotonic - max(60, self._settings.session_idle_timeout))
        if monotonic >= self._next_sweep:
            self._next_sweep = monotonic + 60
            self._step(self._sweep, now - self._clock.leap())  # what only a step of the clock expires stays

    def _is_ours(self, what: str, seconds: float) -> bool:
        """Takes the lease of what one broker does for all; returns whether it is ours, as it is alone."""
        now = self._clock.now()
        return not self._store.is_shared or self._store.take_lease(
            what, self._store.holder, now, now + seconds
        )

    def _sweep(self, now: float) -> None:
        """Drops rows that have had their time; of several brokers one does so, for a minute."""
        if not self._is_ours("sweep", 50):
            return
        self._step(self._forget, "grant ended", self._store.end_orphaned_sessions, now)
        self._step(self._forget, "expired", self._store.sweep, now, self._settings.session_lifetime)

    def _log_operators(self) -> None:
        """Logs what operators' commands have done, and which sessions ended, once over all brokers.

        A crash before it is dropped logs it twice.
        """
        records = self._store.operator_records(OPERATOR_RECORDS)
        if not records or not self._is_ours("operator records", 10):
            return
        # Another broker may have logged some before the lease was ours.
        records = self._store.operator_records(OPERATOR_RECORDS)
        for record in records:
            fields = {
                "user": record.sub,
                "client": record.client_id,
                "grant": record.grant_id,
                "session": record.session,
                "reason": record.reason,
            }
            known = {name: value for name, value in fields.items() if value is not None}
            self._log.audit(record.event, **known)
        if records:
            self._store.drop_operator_records([record.record_id for record in records])
        if self._store.is_shared:
            self._store.end_lease("operator records", self._store.holder)

    def _compare_clocks(self) -> None:
        """Follows the wall clock once it has differed for long; tells the operator before and after."""
        found = self._clock.compare()
        if found and (found[0] != "differs" or self._clock_reported.due("differs")):
            what, difference = found
            level = "info" if what == "agrees" else "warning"
            event = {
                "differs": "the wall clock was set; it is followed if it stays so",
                "agrees": "the wall clock is right again",
                "followed": "the wall clock is followed",
            }[what]
            self._log.event(level, event, seconds=round(difference, 3))

    def _step(self, function: Callable[..., object], *arguments: object) -> None:
        try:
            function(*arguments)
        except StoreUnavailable as error:
            self._log.event("error", "store_unavailable", reason=error.reason)
        except Exception as error:  # the reaper must outlive every surprise
            self._log.event("error", "reaper_failed", error=f"{type(error).__name__}: {error}")

    def _forget(self, reason: str, dropped: Callable[..., Iterable[bytes]], *arguments: object) -> None:
        self._sessions.forget(dropped(*arguments), reason)

    def _tick_session(self, session: Session) -> None:
        session.tick(time.monotonic())
        idle_since = session.backends.idle_since()
        if (
            idle_since is not None
            and not self._settings.child_keeps_state
            and self._clock.monotonic() - session.used_at >= self._settings.session_idle_timeout
            and time.monotonic() - idle_since >= min(1.0, self._settings.session_idle_timeout)
        ):
            session.backends.sleep("idle")

    def _end_what_was_revoked(self, now: float) -> None:
        marker = self._store.change_marker()
        with self._lock:
            for reader in [reader for reader in self._streams if reader.ended]:
                del self._streams[reader]
            streams = dict(self._streams)
            unseen = [reader for reader in self._unseen if reader in streams]
            self._unseen = []
        for reader, (caller, is_call) in streams.items():
            if not is_call and caller.expires_at <= now:
                reader.close()
        try:
            if marker != self._marker:
                self._end_streams_of(streams, now)
                self._marker = marker  # set last: if a step above raised, the next tick repeats it
            elif unseen:
                # Nobody has committed anything: only the grants of new streams are to be looked at.
                live = self._store.living({streams[reader][0].grant_id for reader in unseen}, now)
                for reader in unseen:
                    if streams[reader][0].grant_id not in live:
                        reader.close()
        except BaseException:
            with self._lock:
                self._unseen += unseen
            raise
        self._acted_at = now

    def _end_streams_of(self, streams: dict[Reader, tuple[Caller, bool]], now: float) -> None:
        """Ends streams and sessions whose grants have ended, and sessions that another broker has ended."""
        # Before the store is read: a session opened meanwhile may have a newer grant.
        sessions = self._sessions.all()
        on_file = {session.name for session in sessions if session.name and session.is_on_file}
        subs = {session.sub for session in sessions}
        # The grants of those who are shut out live on, for the day they are let in again.
        live = self._store.living({caller.grant_id for caller, _ in streams.values()}, now)
        for reader, (caller, _) in streams.items():
            if caller.grant_id not in live:
                reader.close()
        if sessions:
            self._sessions.forget_but(self._store.living_pairs(subs, now), sessions, "grant ended")
            self._sessions.forget(on_file - self._store.session_names(subs), "ended elsewhere")

    def _refresh(self, now: float) -> None:
        """Refreshes credentials of users with a running child early, and every live one each ten days.

        A child with an older credential than the user's is replaced: by a refresh of ours, or by a login that
        overtook it.
        """
        awake: dict[str, list[Session]] = collections.defaultdict(list)
        for session in self._sessions.all():
            if session.backend:
                awake[session.sub].append(session)
        ages = self._upstream.ages(awake) if awake else {}
        for sub, sessions in awake.items():
            seq, due = ages.get(sub, (None, False))
            if seq is not None and due:
                self._refresh_in_background(sub, seq)
            for session in sessions:
                backend = session.backend
                if seq is None:
                    session.backends.sleep("logged out", though_listening=True)
                elif backend and backend.seq != seq:
                    session.backends.replace()
        if self._upstream.waits.probe_due():
            with contextlib.suppress(RuntimeError):  # no thread to be had: it is due again
                threading.Thread(target=self._upstream.waits.probe, daemon=True, name="probe").start()
        if self._clock.monotonic() >= self._next_refresh:
            self._next_refresh = self._clock.monotonic() + 600
            for sub, seen in self._store.users_to_refresh(now - 10 * 86400, now):
                self._refresh_in_background(sub, seen)

    def _refresh_in_background(self, sub: str, seen: int) -> None:
        """Refreshes a credential unless another broker or a login does before us."""
        with self._lock:
            if sub in self._refreshing:
                return
            self._refreshing.add(sub)
        try:
            threading.Thread(target=self._refresh_one, args=(sub, seen), daemon=True, name="refresh").start()
        except RuntimeError as error:
            # No thread is to be had: the next tick tries again, and others have their turn.
            self._log.event("debug", "refresh_failed", user=sub, error=str(error))
            with self._lock:
                self._refreshing.discard(sub)

    def _refresh_one(self, sub: str, seen: int) -> None:
        try:
            self._upstream.refresh(sub, seen)
        except Exception as error:  # logged where it is known what it means; the next tick tries again
            self._log.event("debug", "refresh_failed", user=sub, error=type(error).__name__)
        finally:
            with self._lock:
                self._refreshing.discard(sub)


# ============================================================================================================
# Endpoint
# Owns /mcp: who is calling, what they may do, and which HTTP answer a JSON-RPC message gets.
# Must not know sockets or children.
# ============================================================================================================


class Names:
    """Names that the broker knows of the members of an object.

    Everybody else may read others for them; it finds those.
    """

    def __init__(self, *names: str) -> None:
        self._exact = frozenset(names)
        self._folded = frozenset(map(self._fold, names))

    @staticmethod
    def _fold(name: str) -> str:
        """Returns a name as lenient parsers compare it.

        Go's encoding/json ignores case, by Unicode's simple folding: U+017F is an s, U+212A a k; no other
        character becomes an ASCII letter, and nothing is normalized. casefold() folds these and more.
        encoding/json/v2 can be told to ignore `_` and `-` too.
        """
        return name.casefold().replace("_", "").replace("-", "")

    def disguised(self, members: Mapping[str, object]) -> str | None:
        """Returns an unknown member that a lenient parser would read as a known one, else None."""
        for name in members:
            if name not in self._exact and self._fold(name) in self._folded:
                return name
        return None


ANY_PARAMS = Names("_meta")
LISTED = Names("_meta", "cursor")
OF_URI = Names("_meta", "uri")
OF_TASK = Names("_meta", "taskId")
KNOWN_PARAMS = {
    "initialize": Names("_meta", "protocolVersion", "capabilities", "clientInfo"),
    "tools/list": LISTED,
    "tools/call": Names("_meta", "name", "arguments", "task", "inputResponses", "requestState"),
    "resources/list": LISTED,
    "resources/templates/list": LISTED,
    "resources/read": Names("_meta", "uri", "inputResponses", "requestState"),
    "resources/subscribe": OF_URI,
    "resources/unsubscribe": OF_URI,
    "prompts/list": LISTED,
    "prompts/get": Names("_meta", "name", "arguments", "inputResponses", "requestState"),
    "logging/setLevel": Names("_meta", "level"),
    "subscriptions/listen": Names("_meta", "notifications"),
    "tasks/list": LISTED,
    "tasks/get": OF_TASK,
    "tasks/result": OF_TASK,
    "tasks/cancel": OF_TASK,
    "tasks/update": Names("_meta", "taskId", "inputResponses", "requestState"),
    "notifications/cancelled": Names("_meta", "requestId", "reason"),
    "notifications/progress": Names("_meta", "progressToken", "progress", "total", "message"),
}
KNOWN_META = Names(
    "progressToken",
    META_VERSION,
    META_CLIENT,
    META_CAPABILITIES,
    META_LEVEL,
    META_SERVER,
    META_SUBSCRIPTION,
    META + "related-task",
)
UNSERVED_PATIENCE = 0.5  # seconds that the body of a POST which gets 429 has to arrive, to be on record
HEAVY = 1024  # bytes of a body; what it holds may take a hundred times that
# What a login that may not write is served besides tools/call:
# the specification's methods that change nothing at Forgejo.
READING_METHODS = frozenset(
    (
        "server/discover",
        "tools/list",
        "resources/list",
        "resources/templates/list",
        "resources/read",
        "resources/subscribe",
        "resources/unsubscribe",
        "prompts/list",
        "prompts/get",
        "completion/complete",
        "logging/setLevel",
        "subscriptions/listen",
        "tasks/list",
        "tasks/get",
        "tasks/result",
    )
)
TASK_CHANGES = ("tasks/update", "tasks/cancel")
# The members that may be null or an empty list, and are absent then; of every other method only `_meta`.
MAY_BE_ABSENT = {
    "initialize": ("_meta", "capabilities", "clientInfo"),
    "tools/call": ("_meta", "arguments", "inputResponses", "requestState"),
    "prompts/get": ("_meta", "arguments", "inputResponses", "requestState"),
    "resources/read": ("_meta", "inputResponses", "requestState"),
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the judge says of a request.

    `refuse` answers it (None: it may go to the child), with `outcome`
    on record; `listing` is the list of tools it was judged by.
    """

    refuse: Callable[[Call], None] | None = None
    listing: dict[str, Tool] | None = None
    outcome: str = "denied"


ADMITTED = Verdict()
NOT_SERVED = Verdict(
    lambda call: call.error(METHOD_NOT_FOUND, "This method is not served to a read-only connection", None)
)
NOT_ALLOWED = Verdict(lambda call: call.error(METHOD_NOT_FOUND, "The operator does not allow this", None))
TOOL_NOT_ALLOWED = Verdict(
    lambda call: call.give(
        {
            "content": [{"type": "text", "text": "The operator of this server does not allow this tool."}],
            "isError": True,
        }
    )
)
NO_SUCH_TOOL = Verdict(
    lambda call: call.error(METHOD_NOT_FOUND, "There is no tool of this name", None), outcome="error"
)
NO_NAME = Verdict(
    lambda call: call.error(INVALID_PARAMS, "params.name must be a text", None), outcome="error"
)


class Judge:
    """Decides which requests of a token go to a child, and which parts of a result are shown."""

    def __init__(self, services: Services) -> None:
        self._settings = services.settings
        self._store = services.store
        self._log = services.log

    def submit(self, caller: Caller, session: Session, asked: Sequence[tuple[Message, Call]]) -> None:
        """Sends those requests that this caller may make, and answers the others.

        Raises HTTPError as judge() does.
        """
        for _ in range(3):
            note_rights(session, self.rights(caller))
            verdicts = [self.judge(caller, session, message) for message, _ in asked]
            admitted = []
            for (_, call), verdict in zip(asked, verdicts, strict=True):
                call.listing = verdict.listing
                if verdict.refuse is None:
                    admitted.append(call)
            try:
                if admitted:
                    session.submit(admitted)
            except ListChanged:
                continue
            for (_, call), verdict in zip(asked, verdicts, strict=True):
                if verdict.refuse:
                    call.finish(self._log, functools.partial(verdict.refuse, call), outcome=verdict.outcome)
            return
        raise unavailable("busy", "The tool process changes its list of tools all the time.")

    def judge(self, caller: Caller, session: Session, message: Message) -> Verdict:
        """Returns whether this caller may make this request.

        Raises HTTPError 403, which leads to a step-up, and RpcError when the child does not say what it
        lists. Everything that the operator's rules or a token's scope forbid is forbidden here. Under a rule,
        or without forgejo:write, only what is known passes: a reading method of the specification, a tool
        that the child lists under exactly this name, a task of such a tool.
        """
        rights = self.rights(caller)
        if caller.may_write and rights is None:
            return ADMITTED
        params = message.params or {}
        if message.method == "tools/call":
            return self._judge_tool(caller, session, params.get("name"))
        if message.method in TASK_CHANGES:
            task_id = params.get("taskId")
            tool = session.tasks.get(task_id) if isinstance(task_id, str) else None
            verdict = NOT_SERVED if tool is None else self._judge_tool(caller, session, tool)
            return NOT_ALLOWED if verdict is TOOL_NOT_ALLOWED else verdict
        if message.method not in READING_METHODS:
            return NOT_SERVED
        return ADMITTED if rights is None or serves(rights, message) else NOT_ALLOWED

    def rights(self, caller: Caller) -> Rights | None:
        """Returns what the operator's rules, as they are now, leave to a caller; None without rules."""
        return rights_of(self._settings.tool_rules, caller.sub, caller.login, caller.groups, caller.client_id)

    def rules_changed(self, sessions: Sessions) -> None:
        """Tells every session in memory what the rules leave of its lists now."""
        with contextlib.suppress(StoreUnavailable):  # then each is told when its client calls next
            for session in sessions.all():
                user = self._store.user(session.sub)
                if user:
                    rules = self._settings.tool_rules
                    note_rights(
                        session, rights_of(rules, user.sub, user.login, user.groups, session.client_id)
                    )

    def _judge_tool(self, caller: Caller, session: Session, name: object) -> Verdict:
        if not isinstance(name, str):
            return NO_NAME
        rights = self.rights(caller)
        if rights is not None and not rights.admits(name):
            return TOOL_NOT_ALLOWED
        listing = session.listing()
        if listing is None:
            raise unavailable("busy", "The tool process does not say which tools it has.")
        tool = listing.get(name)
        is_reading = name_reads(name, self._settings) or bool(tool and tool.reads)
        rights = self.rights(caller)  # the child may have taken long
        if rights is not None and not (rights.admits(name) and (is_reading or not rights.reads_only)):
            return TOOL_NOT_ALLOWED
        if is_reading or caller.may_write:
            return Verdict(None, listing) if tool else NO_SUCH_TOOL
        if WRITE not in caller.requested_scope.split():
            raise HTTPError(
                403,
                "insufficient_scope",
                "This tool writes; the login was for reading only.",
                (("WWW-Authenticate", challenge_header(self._settings, "insufficient_scope")),),
            )
        # The person was asked and chose read only: asking
        # again would be a loop, so the model is told instead.
        text = (
            "This connection is read only: that was chosen at its login. "
            "To use this tool, connect again and choose full access."
        )
        result: dict[str, object] = {"content": [{"type": "text", "text": text}], "isError": True}
        return Verdict(lambda call: call.give(result))

    def change(self, caller: Caller, message: Message) -> Change | None:
        """Returns the change to a result before this caller sees it (its tools alone are listed), or None."""
        rights = self.rights(caller)
        if message.method != "tools/list" or caller.may_write and rights is None:
            return None
        return functools.partial(tools_left, rights, caller.may_write, self._settings)


class Exchange:
    """One POST: the request, who sent it, and the records of the tools that it calls."""

    def __init__(
        self, services: Services, request: Request, caller: Caller, is_listed: Callable[[str], bool]
    ) -> None:
        self.request = request
        self.caller = caller
        self._services = services
        self._is_listed = is_listed  # where no child of its own tells
        # By identity: a batch may hold thousands. The message is kept, so no other has its id().
        self._records: dict[int, tuple[Message, ToolCallRecord]] = {}
        self.is_heavy = False  # whether its body and what is in it take much memory

    def begin_record(self, message: Message) -> None:
        """From here on a tools/call is on record, whatever becomes of it."""
        if message.method != "tools/call" or message.kind != "request":
            return
        caller = self.caller
        who = {"user": caller.sub, "login": caller.login, "client": caller.client_id}
        name = member(message.params, "name", str, "")[:MAX_NAME]
        write = functools.partial(self._services.write_tool_call, caller.grant_id)
        record = ToolCallRecord(who, name, write)
        record.is_listed = self._is_listed
        self._records[id(message)] = (message, record)

    def begin_unserved(self) -> None:
        """Begins the records of the calls in a POST that gets 429, if its body is small and there at once."""
        if self.request.header("expect"):
            return
        with contextlib.suppress(HTTPError, RpcError):
            value, _ = read_value(self.request, Bodies.FREE, UNSERVED_PATIENCE)
            for each in value if isinstance(value, list) else [value]:
                message = message_from(each)
                if message:
                    self.begin_record(message)

    def record_of(self, message: Message, session: Session) -> ToolCallRecord | None:
        """Returns the record of a message, for its call to write."""
        if id(message) not in self._records:
            return None
        _, record = self._records[id(message)]
        record.session = session.label
        record.is_listed = session.lists
        return record

    def owner_of_state(self, message: Message) -> Callable[[], str]:
        """Returns a function that returns what a requestState of this message is bound to.

        Few calls are ever suspended; a heavy one is not held until then.
        """
        owner = functools.partial(owner_of_state, self.caller, message)
        return functools.partial(str, owner()) if self.is_heavy else owner

    def drop_records(self) -> None:
        """It is no call of its own, but the retry of one."""
        self._records = {}

    def end_records(self, error: BaseException) -> None:
        """No call came of it, or none that was sent."""
        for _, record in self._records.values():
            record.write(outcome_of_error(error))


def outcome_of_error(error: BaseException) -> str:
    """Returns what became of a tools/call that was not sent."""
    return "denied" if isinstance(error, HTTPError) and error.status == 403 else "error"


class Gate:
    """Lets requests in by their bearer token, and counts them."""

    def __init__(self, services: Services) -> None:
        self._settings = services.settings
        self._store = services.store
        self._upstream = services.upstream
        self._clock = services.clock

    def caller(self, request: Request) -> Caller:
        """Returns the owner of a request's bearer token, and counts the request for them.

        Raises HTTPError 401 as bearer() does, and 429 as seat() does.
        """
        caller = self.bearer(request)
        self.seat(request, caller)
        return caller

    def admit(self, exchange: Exchange) -> None:
        """Counts a POST for its user; raises HTTPError 429 as seat() does, with its calls on record."""
        try:
            self.seat(exchange.request, exchange.caller)
        except HTTPError:
            exchange.begin_unserved()
            raise

    def seat(self, request: Request, caller: Caller) -> None:
        """Counts a request for its user; raises HTTPError 429 above `max_requests_per_user`."""
        request.seat.take("requests", f"user {caller.sub}", self._settings.max_requests_per_user)

    def bearer(self, request: Request) -> Caller:
        """Returns the owner of a request's bearer token, read anew; raises HTTPError 401 (RFC 6750 3)."""
        authorization = request.header("authorization")
        if authorization is None:
            seat_of_address(request, self._settings)
            challenge = challenge_header(self._settings)
            raise HTTPError(
                401,
                "unauthorized",
                "Log in first: see WWW-Authenticate.",
                (("WWW-Authenticate", challenge),),
                "no_token",
            )
        scheme, _, token = authorization.partition(" ")
        token = token.strip()
        row = None
        if scheme.lower() == "bearer" and re.fullmatch(r"fja_[A-Za-z0-9_-]{43}", token):
            row = self._store.bearer(token_hash(token), self._clock.now())
        if row is None or row.resource != self._settings.resource:
            seat_of_address(request, self._settings)
            known = self._store.access_token(token_hash(token))
            has_expired = known is not None and known.expires_at <= self._clock.now()
            raise invalid_token(
                self._settings,
                "The access token is unknown, expired or revoked.",
                "token_expired" if has_expired else "bad_token",
            )
        request.context.user = row.sub
        request.context.client = row.client_id
        if row.status != "active":
            seat_of_address(request, self._settings)
            if not (row.status == "suspended" and self._upstream.readmitted(row.sub)):
                raise invalid_token(
                    self._settings,
                    "Forgejo does not let this user in at present; log in again.",
                    "suspended" if row.status == "suspended" else "logged_out",
                )
        return Caller(
            row.sub,
            row.login,
            row.client_id,
            row.grant_id,
            row.scope,
            row.requested_scope,
            row.expires_at,
            tuple(json.loads(row.groups)),
        )

    def count_stream(self, request: Request, caller: Caller, name: object = None) -> None:
        """Counts a request as a stream from now on; raises HTTPError 429 above `max_streams_per_user`."""
        request.seat.take("streams", f"user {caller.sub}", self._settings.max_streams_per_user, name)


class Endpoint:
    """POST, GET and DELETE of /mcp."""

    def __init__(self, services: Services, launcher: Launcher, sessions: Sessions, reaper: Reaper) -> None:
        self._services = services
        self._settings = services.settings
        self._keyring = services.keyring
        self._log = services.log
        self._launcher = launcher
        self._sessions = sessions
        self._reaper = reaper
        self._gate = Gate(services)
        self.judge = Judge(services)

    # -- POST

    def post(self, request: Request) -> Response:
        """A JSON-RPC message of either era, or a batch where its session allows one."""
        caller = self._gate.bearer(request)
        exchange = Exchange(self._services, request, caller, self._launcher.lists_tool)
        request_id = None
        modern = False
        try:
            self._gate.admit(exchange)
            value, exchange.is_heavy = read_value(request, self._settings.max_body)
            if isinstance(value, list):
                return self._batch(exchange, value)
            if isinstance(value, dict) and is_request_id(value.get("id")):
                request_id = value["id"]
            message = message_from(value)
            if message is None:
                return Response(202)
            exchange.begin_record(message)
            modern = is_modern(request, message)
            return (self._modern if modern else self._legacy)(exchange, message)
        except RpcError as error:
            exchange.end_records(error)
            return rpc_error_response(request_id, error, modern)
        except BaseException as error:
            exchange.end_records(error)
            raise

    def _deadline(self) -> float:
        return time.monotonic() + self._settings.request_timeout

    # -- POST, legacy

    def _legacy(self, exchange: Exchange, message: Message) -> Response:
        header = exchange.request.header("mcp-protocol-version")
        if message.method == "initialize":
            return self._initialize(exchange.caller, message)
        if header is not None and header not in LEGACY_VERSIONS:
            raise RpcError(
                INVALID_REQUEST,
                f"Unsupported MCP-Protocol-Version; supported: {', '.join(LEGACY_VERSIONS)}.",
                {"supported": list(LEGACY_VERSIONS)},
                400,
            )
        if message.method == "ping" and message.kind == "request":  # clients ping for hours: that is no use
            self._session(exchange.request, exchange.caller, use=False)
            return Response(200, result_message(message.id, {}), "application/json")
        frontend = self._session(exchange.request, exchange.caller)
        if message.kind != "request":
            if frontend:
                frontend.on_message(message)
            return Response(202)
        if frontend:
            return self._forward_session(exchange, frontend, [message], batch=False)
        return self._forward_alone(exchange, message)

    def _initialize(self, caller: Caller, message: Message) -> Response:
        params = initialize_params(message, self._settings.max_form)
        session_id, server = self._sessions.open(caller.sub, caller.client_id, params)
        headers = (("Mcp-Session-Id", session_id),)
        server = server_left(self.judge.rights(caller), server)
        return Response(200, result_message(message.id, server), "application/json", headers)

    def _session(self, request: Request, caller: Caller, use: bool = True) -> SessionFrontend | None:
        """Returns the session of a legacy request, None if it names none; RpcError if that does not exist."""
        session_id = request.header("mcp-session-id")
        if session_id is None:
            return None
        if not re.fullmatch(r"[\x21-\x7e]{1,256}", session_id):
            raise RpcError(INVALID_REQUEST, "Mcp-Session-Id is malformed.", None, 400)
        return self._sessions.find(session_id, caller.sub, caller.client_id, use)

    def _batch(self, exchange: Exchange, values: list[object]) -> Response:
        """Only a session negotiated at 2025-03-26 may send one, never with initialize in it."""
        frontend = self._session(exchange.request, exchange.caller, use=False)
        if not values or frontend is None or frontend.session.version != BATCH_VERSION:
            raise RpcError(
                INVALID_REQUEST, "Batches are not served here; send each message by itself.", None, 400
            )
        messages = []
        for value in values:
            message = message_from(value)
            if message:
                messages.append(message)
                exchange.begin_record(message)
        if any(message.method == "initialize" for message in messages):
            raise RpcError(INVALID_REQUEST, "initialize must not be in a batch.", None, 400)
        if any(message.method != "ping" for message in messages):
            frontend = self._session(exchange.request, exchange.caller) or frontend
        for message in messages:
            if message.kind != "request":
                frontend.on_message(message)
        requests = [message for message in messages if message.kind == "request"]
        return self._forward_session(exchange, frontend, requests, True) if requests else Response(202)

    def _forward_session(
        self, exchange: Exchange, frontend: SessionFrontend, messages: list[Message], batch: bool
    ) -> Response:
        """Sends requests of a session to its child; the responses share one stream."""
        session = frontend.session
        stream = session.new_stream(len(messages))
        stream.on_named = frontend.name_stream
        reader = stream.open()
        calls = [(message, self._legacy_call(exchange, session, message, stream)) for message in messages]
        asked = [
            (message, call)
            for message, call in calls
            if message.method != "ping" and may_subscribe(self._log, session, message, call)
        ]
        self._submit(exchange.caller, session, asked, reader)
        for message, call in calls:
            if message.method == "ping":
                call.finish(self._log, functools.partial(call.give, {}))
        self._reaper.track(reader, exchange.caller, True)
        prime = session.version == LEGACY_VERSIONS[0]
        delivery = delivery_for(exchange.request)
        return Response(200, streaming=StreamingResponse(reader, delivery, prime=prime, batch=batch))

    def _submit(
        self, caller: Caller, session: Session, asked: Sequence[tuple[Message, Call]], reader: Reader
    ) -> None:
        """Sends requests to their child; where that fails they end with an error, which answers the POST."""
        try:
            self.judge.submit(caller, session, asked)
        except BaseException as error:
            reader.close()
            for _, call in asked:
                call.finish(self._log, None, outcome=outcome_of_error(error))
            raise

    def _forward_alone(self, exchange: Exchange, message: Message) -> Response:
        """Sends a legacy request without a session to a shared child."""
        if message.method in ("logging/setLevel", "resources/subscribe", "resources/unsubscribe"):
            raise RpcError(
                METHOD_NOT_FOUND,
                f"{message.method} needs a session: send initialize, then the Mcp-Session-Id it returns.",
            )
        caller = exchange.caller
        lease = self._sessions.lease(caller.sub, caller.client_id, {}, alone=False)
        try:
            session = lease.frontend.session
            stream = session.new_stream(1)
            call = self._legacy_call(exchange, session, message, stream, RequestMeta(capabilities={}))
            call.on_done = lease.release
            reader = stream.open()
            self._submit(caller, session, [(message, call)], reader)
        except BaseException:
            lease.release()
            raise
        self._reaper.track(reader, caller, True)
        return Response(200, streaming=StreamingResponse(reader, delivery_for(exchange.request)))

    def _legacy_call(
        self,
        exchange: Exchange,
        session: Session,
        message: Message,
        stream: EventStream,
        meta: RequestMeta = SESSION_META,
    ) -> LegacyCall:
        change = self.judge.change(exchange.caller, message)
        streamable = takes_streams(exchange.request)
        call = LegacyCall(message, self._deadline(), stream, streamable, meta, change)
        call.on_success = remembers(session, message)
        call.record = exchange.record_of(message, session)
        return call

    # -- POST, modern

    def _modern(self, exchange: Exchange, message: Message) -> Response:
        """A request of MCP 2026-07-28: everything it needs is in it and in its headers (streamable-http)."""
        if message.kind == "notification":
            return Response(202)
        request = exchange.request
        caller = exchange.caller
        meta = check_metadata(request, message, self._settings.max_form)
        if message.method in LEGACY_ONLY:
            raise no_such_method(message.method)
        if "requestState" in (message.params or {}):
            return self._retry(exchange, message)
        if message.method == "subscriptions/listen":
            check_listener(message, self._settings)
            self._gate.count_stream(request, caller)
        declared = meta.capabilities or {}
        can_be_asked = bool(known_capabilities(declared))
        alone = meta.log_level is not None or self._launcher.sends_requests and can_be_asked
        lease = self._sessions.lease(caller.sub, caller.client_id, declared, alone)
        try:
            if message.method == "subscriptions/listen":
                return self._listen(caller, message, lease)
            return self._forward_modern(exchange, message, lease, meta)
        except BaseException:
            lease.release()
            raise

    def _forward_modern(
        self, exchange: Exchange, message: Message, lease: Lease, meta: RequestMeta
    ) -> Response:
        """Sends a modern request to a shared child."""
        caller = exchange.caller
        frontend = lease.frontend
        session = frontend.session
        # The headers of a tool that the rules deny say nothing of it: it is refused below.
        is_allowed = (
            self.judge.rights(caller) is None or self.judge.judge(caller, session, message).refuse is None
        )
        if message.method == "tools/call" and is_allowed:
            check_parameter_headers(exchange.request, message.params or {}, session)
        call = ModernCall(
            frontend,
            message,
            self._deadline(),
            meta,
            self._sessions.suspended,
            functools.partial(
                sealed_state,
                self._keyring,
                self._settings.broker_prefix,
                caller.may_write,
                exchange.owner_of_state(message),
            ),
            self.judge.change(caller, message),
        )
        call.on_success = remembers(session, message)
        call.on_done = lease.release
        call.record = exchange.record_of(message, session)
        reader = call.stream.open()
        if message.method == "server/discover":
            result = server_left(self.judge.rights(caller), frontend.discover())
            call.finish(self._log, functools.partial(call.give, result))
            return self._stream_answer(exchange, reader, call)
        self._submit(caller, session, [(message, call)], reader)
        return self._stream_answer(exchange, reader, call)

    def _stream_answer(self, exchange: Exchange, reader: Reader, call: ModernCall) -> Response:
        """Returns the answer to a modern call, which ends when its client hangs up."""
        self._reaper.track(reader, exchange.caller, True)
        hang_up = functools.partial(call.session.cancel, call, {"reason": "the client hung up"})
        delivery = delivery_for(exchange.request)
        return Response(
            200, streaming=StreamingResponse(reader, delivery, event_ids=False, on_disconnect=hang_up)
        )

    def _listen(self, caller: Caller, message: Message, lease: Lease) -> Response:
        """Returns the stream of a `subscriptions/listen`."""
        frontend = lease.frontend
        rights = self.judge.rights(caller)
        note_rights(frontend.session, rights)
        wanted = news_left(rights, member(message.params, "notifications", dict, {}))
        stream = frontend.listen(message.id, wanted)
        reader = stream.open()

        def hang_up() -> None:
            try:
                frontend.unlisten(stream)
            finally:
                lease.release()

        self._reaper.track(reader, caller, False)
        return Response(
            200, streaming=StreamingResponse(reader, Delivery.SSE, event_ids=False, on_disconnect=hang_up)
        )

    def _retry(self, exchange: Exchange, message: Message) -> Response:
        """A retry with the input that was asked for continues the suspended call; nothing is run again."""
        exchange.drop_records()
        caller = exchange.caller
        name = open_state(self._keyring, self._settings.broker_name, caller, message)
        call = self._sessions.suspended.take(name)
        if call is None or call.is_gone:
            raise RpcError(
                INVALID_PARAMS, "requestState was used before, or its call has ended; send the request anew."
            )
        if self.judge.rights(caller) is not None:
            verdict = self.judge.judge(caller, call.session, message)
            if verdict.refuse:
                # The rules changed since the call was suspended: it ends, its retry is judged as a new call.
                if call.record:
                    call.record.write(verdict.outcome)
                call.session.cancel(call, {"reason": "the operator does not allow it any more"})
                call = call.anew(message)
                reader = call.stream.open()
                call.finish(self._log, functools.partial(verdict.refuse, call))
                return self._stream_answer(exchange, reader, call)
        try:
            reader = call.resume(message.id, member(message.params, "inputResponses", dict, {}))
        except BaseException:  # no other retry can find it now
            call.session.cancel(call, {"reason": "the retry failed"})
            raise
        return self._stream_answer(exchange, reader, call)

    # -- GET and DELETE

    def get(self, request: Request) -> Response:
        """The session's stream for what belongs to no request; resumes what Last-Event-ID names."""
        caller = self._gate.caller(request)
        try:
            frontend = self._require_session(
                request, caller, "Without an Mcp-Session-Id only POST is served."
            )
        except RpcError as error:
            return rpc_error_response(None, error)
        seat = functools.partial(self._gate.count_stream, request, caller)
        reader = frontend.open_stream(request.header("last-event-id"), seat)
        note_rights(frontend.session, self.judge.rights(caller))
        self._reaper.track(reader, caller, False)
        return Response(200, streaming=StreamingResponse(reader, Delivery.SSE))

    def delete(self, request: Request) -> Response:
        """The client ends its session."""
        caller = self._gate.caller(request)
        try:
            frontend = self._require_session(request, caller, "Name the session to end with Mcp-Session-Id.")
            self._sessions.delete(frontend.session)
        except RpcError as error:
            return rpc_error_response(None, error)
        return Response(204)

    def _require_session(self, request: Request, caller: Caller, sentence: str) -> SessionFrontend:
        """Returns the session of a GET or DELETE; HTTPError 405 without one, and in the modern era."""
        allow = (("Allow", "POST"),)
        if (request.header("mcp-protocol-version") or "") >= FIRST_MODERN_VERSION:
            raise HTTPError(405, "method_not_allowed", "This revision of MCP has only POST.", allow)
        frontend = self._session(request, caller)
        if frontend is None:
            raise HTTPError(405, "method_not_allowed", sentence, allow)
        return frontend

    def head(self, request: Request) -> Response:
        """HEAD is how some clients look for the login: 401 without a token, 405 with one."""
        self._gate.caller(request)
        raise HTTPError(405, "method_not_allowed", "Use POST.", (("Allow", "POST, GET, DELETE"),))


def may_subscribe(log: Log, session: Session, message: Message, call: Call) -> bool:
    """Returns whether a call keeps to the bounds of subscriptions; one that does not is answered."""
    if message.method != "resources/subscribe":
        return True
    uri = (message.params or {}).get("uri")
    complaint = session.replay.begin_subscription(uri)
    if complaint:
        call.finish(log, functools.partial(call.error, INVALID_PARAMS, complaint, None))
        return False
    if isinstance(uri, str):
        call.on_done = functools.partial(session.replay.end_subscription, uri)
    return True


def read_value(request: Request, limit: int, seconds: float | None = None) -> tuple[object, bool]:
    """Returns the JSON value of a body of at most `limit` bytes, and whether it is a heavy one.

    Raises RpcError 400, and HTTPError as read_body() does.
    """
    body = request.read_body(limit, seconds, weight_of)
    try:
        return read_json(body), len(body) > HEAVY
    except ValueError as error:
        code = INVALID_REQUEST if "twice" in str(error) else PARSE_ERROR
        raise RpcError(code, f"The body is not JSON: {str(error)[:200]}.", None, 400) from None


def initialize_params(message: Message, limit: int) -> dict[str, object]:
    """Returns the params of initialize, of at most `limit` bytes: they are kept, and replayed to each child.

    Raises RpcError 400.
    """
    params = message.params
    if params is None or member(params, "protocolVersion", str, None) is None:
        raise RpcError(INVALID_PARAMS, "initialize needs params.protocolVersion.", None, 400)
    for name in ("capabilities", "clientInfo"):
        if not isinstance(params.get(name, {}), dict):
            raise RpcError(INVALID_PARAMS, "capabilities and clientInfo must be objects.", None, 400)
    if len(dump(params)) > limit:
        raise RpcError(INVALID_PARAMS, "The params of initialize are too large.", None, 400)
    return params


def check_listener(message: Message, settings: Settings) -> None:
    """Refuses a listener before anything is made for it; raises RpcError 400."""
    wanted = member(message.params, "notifications", dict, None)
    if wanted is None:
        raise RpcError(INVALID_PARAMS, "subscriptions/listen needs params.notifications.", None, 400)
    uris = member(wanted, "resourceSubscriptions", list, [])
    texts = {uri for uri in uris if isinstance(uri, str)}
    complaint = subscriptions_refused(texts, len(texts), settings)
    if complaint:
        raise RpcError(INVALID_PARAMS, complaint, None, 400)


CAUSES = {
    PARSE_ERROR: "parse_error",
    INVALID_REQUEST: "invalid_message",
    INVALID_PARAMS: "invalid_params",
    METHOD_NOT_FOUND: "method_not_found",
    SESSION_NOT_FOUND: "session_not_found",
    UNSUPPORTED_VERSION: "unsupported_version",
    HEADER_MISMATCH: "header_mismatch",
    MISSING_CAPABILITY: "missing_capability",
}


def rpc_error_response(request_id: object, error: RpcError, modern: bool = False) -> Response:
    """Returns an RpcError as an HTTP response; MCP 2026-07-28 does not use the codes of earlier revisions."""
    code = INTERNAL_ERROR if modern and error.code == SERVER_ERROR else error.code
    return Response(
        error.status,
        error_message(request_id, code, error.message, error.data),
        "application/json",
        error.headers,
        cause=cause_of(error),
    )


def cause_of(error: RpcError) -> str:
    """Returns one of REASONS for an error that turns a request away, empty for one that answers it."""
    if error.status < 400:
        return ""
    reason = member(error.data, "reason", str, None)
    return reason or CAUSES.get(error.code, "other")


def takes_streams(request: Request) -> bool:
    """Returns whether a client can read an event stream."""
    return any("text/event-stream" in value for value in request.headers.get("accept", ()))


def delivery_for(request: Request) -> Delivery:
    """How the answer to a call reaches this client."""
    return Delivery.JSON_THEN_SSE if takes_streams(request) else Delivery.JSON


def name_reads(name: str, settings: Settings) -> bool:
    """Returns whether a tool's name is one of `read_only_tools`."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in settings.read_only_tools)


def remembers(session: Session, message: Message) -> Callable[[object], object] | None:
    """Returns what a successful answer leaves behind, as a function of the result, or None.

    That is which tool a task belongs to; and of a client's session, what has to be replayed to a new child.
    """
    params = message.params or {}
    name = member(params, "name", str, None)
    if message.method == "tools/call" and name is not None:
        return functools.partial(session.note_task, name) if len(name) <= MAX_NAME else None
    if not session.is_durable:
        return None
    if message.method == "tools/list" and not params.get("cursor"):
        return functools.partial(note_tools, session)
    level = member(params, "level", str, None)
    # On file stays only what is a level, whatever a child lets pass.
    if message.method == "logging/setLevel" and level in LEVELS:
        return functools.partial(note_level, session, level)
    uri = member(params, "uri", str, None)
    if uri is None or len(uri) > MAX_URI:
        return None
    if message.method == "resources/subscribe":
        return lambda result: session.replay.subscribe(uri)
    if message.method == "resources/unsubscribe":
        return lambda result: session.replay.unsubscribe(uri)
    return None


def note_level(session: Session, level: str, result: object) -> None:
    """Keeps the log level that a client has set."""
    session.replay.set_level(level)


def sealed_state(keyring: Keyring, prefix: str, may_write: bool, owner: Callable[[], str], name: str) -> str:
    """Returns a suspended call's requestState: sealed, good for one retry of it (patterns/mrtr)."""
    content = {"held": name, "write": may_write}
    return prefix + b64url(keyring.seal("mrtr", owner(), content))


def open_state(keyring: Keyring, broker_name: str, caller: Caller, message: Message) -> str:
    """Returns the suspended call's name in a requestState.

    Raises RpcError when it is not good for this retry, or its call waits at another broker of this store.
    """
    giver, _, text = member(message.params, "requestState", str, "").rpartition(".")
    try:
        content = keyring.unseal("mrtr", owner_of_state(caller, message), unb64url(text))
        name = content["held"]
        could_write = content["write"]
    except (ValueError, TypeError):
        raise RpcError(INVALID_PARAMS, "requestState is not one that was given for this request.") from None
    if could_write and not caller.may_write:  # each request is limited by the token that it carries
        raise RpcError(
            INVALID_PARAMS, "requestState was given to a login with more access; send the request anew."
        )
    if giver != broker_name:
        sentence = (
            f"requestState was given by the broker {giver[:20]!r}, where its call waits, and came to"
            f" {broker_name!r}: send the request anew. The operator's proxy has to route by broker_name."
        )
        raise RpcError(INVALID_PARAMS, sentence)
    return str(name)


def owner_of_state(caller: Caller, message: Message) -> str:
    """Returns what a requestState is bound to: user, client and request, in one spelling."""
    what = {"arguments": {}} | {
        name: value
        for name, value in (message.params or {}).items()
        if name not in ("_meta", "requestState", "inputResponses")
    }
    meaning = hashlib.sha256(canonical([message.method, what])).hexdigest()
    return f"{caller.sub} {caller.client_id} {meaning}"


# -- what the child reads is what the gate has read


def message_from(value: object) -> Message | None:
    """Returns what a client sent as a message, with its params as they are meant; None for what is dropped.

    RpcError 400. All that goes to a child is written anew from this: its method, and its params without a
    member that a child could read as another than the gate does. A request without an id would pass the gate
    as a notification, and is none.
    """
    try:
        message = classify(value)
    except ValueError as error:
        raise RpcError(INVALID_REQUEST, f"Not a JSON-RPC message: {error}.", None, 400) from None
    if message.kind == "response":
        return message
    if message.kind == "notification" and not message.method.startswith("notifications/"):
        return None
    params = message.params or {}
    meta = params.get("_meta")
    name = KNOWN_PARAMS.get(message.method, ANY_PARAMS).disguised(params)
    if name is None and isinstance(meta, dict):
        name = KNOWN_META.disguised(meta)
    if name is None:
        meant = as_meant(message.method, params)
        return message if meant is params else replace(message, params=meant)
    if message.kind == "notification":
        return None
    raise RpcError(
        INVALID_PARAMS, f"The member {ascii(name[:60])} could be read as one of another name.", None, 400
    )


def as_meant(method: str, params: dict[str, object]) -> dict[str, object]:
    """Returns params without members that stand for absent ones: null, or an empty list for an object.

    Capabilities are empty then.
    """
    absent = {
        name for name in MAY_BE_ABSENT.get(method, ("_meta",)) if name in params and is_absent(params[name])
    }
    if absent:
        params = {name: value for name, value in params.items() if name not in absent}
    if method == "initialize" and "capabilities" in absent:
        params["capabilities"] = {}
    meta = params.get("_meta")
    if not isinstance(meta, dict) or None not in (meta.get(META_CLIENT, ""), meta.get(META_LEVEL, "")):
        return params
    left = {
        name: value
        for name, value in meta.items()
        if value is not None or name not in (META_CLIENT, META_LEVEL)
    }
    return {**params, "_meta": left}


def canonical(value: object) -> bytes:
    """Returns equal JSON values in one form: members in order, a whole number without a fraction."""

    def whole(part: object) -> object:
        if isinstance(part, dict):
            return {name: whole(each) for name, each in part.items()}
        if isinstance(part, list):
            return [whole(each) for each in part]
        return int(part) if isinstance(part, float) and part.is_integer() else part

    return json.dumps(whole(value), sort_keys=True, separators=(",", ":")).encode()


# -- the era of a request, and what MCP 2026-07-28 wants in it


def is_modern(request: Request, message: Message) -> bool:
    """Returns whether a message is of the modern era (design 5): by its `_meta`, else by the header.

    An `initialize` never is.
    """
    meta = (message.params or {}).get("_meta")
    if message.method == "initialize" and "protocolVersion" in (message.params or {}):
        return False
    header = request.header("mcp-protocol-version") or ""
    return (
        isinstance(meta, dict)
        and META_VERSION in meta
        or bool(re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", header))
        and header >= FIRST_MODERN_VERSION
    )


def no_such_method(method: str) -> RpcError:
    """Returns the 404 with -32601 (MCP 2026-07-28 streamable-http)."""
    return RpcError(METHOD_NOT_FOUND, f"{method[:100]} is not a method of this revision", None, 404)


def bad_metadata(code: int, sentence: str, data: dict[str, object] | None = None) -> RpcError:
    """Returns the 400 for a request whose metadata break the rules."""
    return RpcError(code, sentence, data, 400)


def check_metadata(request: Request, message: Message, limit: int) -> RequestMeta:
    """Returns a request's description of its client; RpcError 400 unless `_meta` and headers are correct.

    `limit`: the bytes that capabilities may have, which are kept as the key of a pool (MCP 2026-07-28 basic,
    streamable-http).
    """
    if message.kind == "response":
        raise bad_metadata(INVALID_REQUEST, "Clients of this revision do not send responses")
    params = message.params or {}
    meta = member(params, "_meta", dict, {})
    check_version(request, meta)
    capabilities = member(meta, META_CAPABILITIES, dict, None)
    if capabilities is None:
        raise bad_metadata(INVALID_PARAMS, f"params._meta needs {META_CAPABILITIES}")
    if len(dump(capabilities)) > limit:
        raise bad_metadata(INVALID_PARAMS, f"{META_CAPABILITIES} is too large")
    if not isinstance(meta.get(META_CLIENT, {}), dict):
        raise bad_metadata(INVALID_PARAMS, f"{META_CLIENT} must be an object")
    if meta.get(META_LEVEL, "info") not in LEVELS:
        raise bad_metadata(INVALID_PARAMS, f"{META_LEVEL} must be one of {', '.join(LEVELS)}")
    source = {"tools/call": "name", "prompts/get": "name", "resources/read": "uri"}.get(message.method)
    for name, value in (("Mcp-Method", message.method), ("Mcp-Name", params.get(source) if source else None)):
        if isinstance(value, str) and decoded_header(request, name) != value:
            sentence = f"Header mismatch: {name} is missing, or is not what the body says"
            raise bad_metadata(HEADER_MISMATCH, sentence)
    return RequestMeta(capabilities, meta.get(META_CLIENT), meta.get(META_LEVEL))


def check_version(request: Request, meta: dict[str, object]) -> None:
    """Raises RpcError 400 unless a request's version is served, and its header says the same."""
    version = member(meta, META_VERSION, str, None)
    if version is None:
        raise bad_metadata(INVALID_PARAMS, f"params._meta needs {META_VERSION}")
    if request.header("mcp-protocol-version") != version:
        sentence = "Header mismatch: MCP-Protocol-Version is not what the body says"
        raise bad_metadata(HEADER_MISMATCH, sentence)
    if version != FIRST_MODERN_VERSION:
        served: dict[str, object] = {
            "supported": [FIRST_MODERN_VERSION, *LEGACY_VERSIONS],
            "requested": version,
        }
        raise bad_metadata(UNSUPPORTED_VERSION, "Unsupported protocol version", served)


def decoded_header(request: Request, name: str) -> str | None:
    """Returns the value of a header that mirrors the body, None when it is absent.

    RpcError 400 for one that cannot be read (value encoding).
    """
    value = request.header(name.lower())
    match = re.fullmatch(r"=\?base64\?(.*)\?=", value or "", re.DOTALL)
    try:
        if match:
            return base64.b64decode(match[1], validate=True).decode()
        if value is None or value.isascii():
            return value
    except ValueError:
        pass
    raise RpcError(HEADER_MISMATCH, f"Header mismatch: {name} is malformed", None, 400)


def check_parameter_headers(request: Request, params: dict[str, object], session: Session) -> None:
    """Raises RpcError 400 where Mcp-Param headers differ from the arguments that they mirror.

    A tool's schema marks those with x-mcp-header.
    """
    name = params.get("name")
    tool = (session.listing() or {}).get(name) if isinstance(name, str) else None
    arguments = params.get("arguments")
    for path, name in tool.mirrored if tool else ():
        value = arguments
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        shown = None if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        header = decoded_header(request, f"Mcp-Param-{name}")
        same = (
            header == shown
            or isinstance(value, int)
            and not isinstance(value, bool)
            and is_number(header, value)
        )
        if not same and isinstance(value, (str, int, type(None))):
            raise RpcError(
                HEADER_MISMATCH,
                f"Header mismatch: Mcp-Param-{name} is missing, or is not what the body says",
                None,
                400,
            )


def is_number(text: str | None, number: int) -> bool:
    """Returns whether a text is that number, however it is written."""
    try:
        return (
            text is not None and re.fullmatch(r"[-+0-9.eE]{1,40}", text) is not None and float(text) == number
        )
    except (ValueError, OverflowError):
        return False


# -- what the operator's rules leave


COMPLETED = Names("_meta", "ref", "argument", "context")
REFERRED = Names("type", "name", "uri", "title")


def serves(rights: Rights, message: Message) -> bool:
    """Returns whether a request that calls no tool is served."""
    if message.method == "completion/complete":
        params = message.params or {}
        ref = member(params, "ref", dict, {})
        is_plain = not COMPLETED.disguised(params) and not REFERRED.disguised(ref)
        kind = member(ref, "type", str, "") if is_plain else ""
        return {"ref/prompt": rights.prompts, "ref/resource": rights.resources}.get(
            kind, rights.prompts and rights.resources
        )
    kind = message.method.partition("/")[0]
    return {"prompts": rights.prompts, "resources": rights.resources}.get(kind, True)


def server_left(rights: Rights | None, server: dict[str, object]) -> dict[str, object]:
    """Returns a server's description of itself without the capabilities that a caller may not use."""
    if rights is None:
        return server
    gone = {"prompts": not rights.prompts, "resources": not rights.resources}
    gone["completions"] = all(gone.values())
    capabilities = member(server, "capabilities", dict, {})
    return {
        **server,
        "capabilities": {name: value for name, value in capabilities.items() if not gone.get(name, False)},
    }


def news_left(rights: Rights | None, wanted: dict[str, object]) -> dict[str, object]:
    """Returns a listener's filter without the parts that its caller may not use."""
    if rights is None:
        return wanted
    gone = {
        "promptsListChanged": not rights.prompts,
        "resourcesListChanged": not rights.resources,
        "resourceSubscriptions": not rights.resources,
    }
    return {name: value for name, value in wanted.items() if not gone.get(name, False)}


def tools_left(
    rights: Rights | None, may_write: bool, settings: Settings, result: dict[str, object]
) -> dict[str, object]:
    """Returns a result of tools/list without the tools that a caller may not call."""
    tools = member(result, "tools", list, None)
    if tools is None:
        return result if rights is None else {**result, "tools": []}
    may_write = may_write and not (rights and rights.reads_only)
    left = []
    for tool in tools:
        name = member(tool, "name", object, None)
        is_allowed = rights is None or isinstance(name, str) and rights.admits(name)
        if isinstance(tool, dict) and is_allowed:
            if may_write or name_reads(str(name), settings) or hint_reads(tool):
                left.append(tool)
    return {**result, "tools": left}


# ============================================================================================================
# HTTP server
# Owns sockets: accepting, strict framing and parsing, the
# one header writer, and the pump of everything that waits.
# Must not know routes or what is served; it is given one function from Request to Response.
# ============================================================================================================

REQUEST_LINE = re.compile(rb"([A-Z]{1,16}) ([!-~]+) HTTP/([0-9]\.[0-9])")
FIELD = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):([\t -~\x80-\xff]*)")
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,8})(?:[ \t]*;[\t !-~]*)?")
ABSOLUTE_TARGET = re.compile(r"https?://([^/?#]+)(/.*)?", re.IGNORECASE | re.ASCII)
HEADER_LINE = re.compile(r"[A-Za-z0-9-]+: [^\r\n\0]*")
MAX_LINE = 8192
MAX_HEAD = 32768
MAX_HEADERS = 100
MIN_CHUNKS = 4096  # the chunks that any body may have; a large one may have more
MAX_HOPS = 32  # entries of X-Forwarded-For that are read
SEND_BUFFER = 65536  # the kernel doubles it
STEADY = 65536  # bytes that a client has to take within `write_timeout`
LINGERING = 64  # refused requests of one owner whose rest is read at once
FAIR_SHARE = 8  # connections that an address may have more than another before one of them makes room
MAKING_ROOM = 64  # connections that have been told to end, and still do, at most
URI_TOO_LONG = (414, "uri_too_long", "The request line is too long.")
HEADER_TOO_LARGE = (431, "header_too_large", "The request's header is too large.")
CHUNKED = -1  # stands for the length of a body that comes in chunks
# Seconds in which a connection that was just used may bring one more request while the server drains.
LAST_REQUEST = 0.3
# The name (FileDescriptorName=) of a socket that the service manager holds for /metrics.
METRICS = "metrics"


class Gone(Exception):
    """The connection has ended, or must."""


def bad_request(description: str) -> HTTPError:
    """Returns the 400 for bytes that are not strictly HTTP."""
    return HTTPError(400, "bad_request", description)


def interrupt(sock: socket.socket, how: int) -> None:
    """Wakes the thread that waits for a socket; a closed one stays closed."""
    with contextlib.suppress(OSError):
        sock.shutdown(how)


class DisconnectWatcher(threading.Thread):
    """One thread that notices for everybody that clients hung up while their answers are still to come."""

    def __init__(self, log: Log) -> None:
        super().__init__(daemon=True, name="watcher")
        self._log = log
        self._epoll = select.epoll()
        self._wake = os.eventfd(0)
        self._ended = False
        # Guards the dict and what is registered; a leaf.
        self._lock = threading.Lock()
        self._readers: dict[int, Reader] = {}
        self._epoll.register(self._wake, select.EPOLLIN)

    def close(self) -> None:
        """Watch no more."""
        self._ended = True
        os.eventfd_write(self._wake, 1)

    def watch(self, sock: socket.socket, reader: Reader) -> None:
        """Close the reader when the socket's peer hangs up. A half-closed connection counts as gone."""
        with self._lock:
            self._readers[sock.fileno()] = reader
            self._epoll.register(sock.fileno(), select.EPOLLRDHUP | select.EPOLLONESHOT)

    def forget(self, sock: socket.socket) -> None:
        """The answer is done."""
        with self._lock:
            if self._readers.pop(sock.fileno(), None):
                self._epoll.unregister(sock.fileno())

    def run(self) -> None:
        """Closes the readers of clients that hang up, until closed."""
        happened = select.poll()
        happened.register(self._epoll, select.POLLIN)
        while not self._ended:
            happened.poll()
            try:
                # What happened is asked only now: a socket may have been closed, and its number be another's.
                with self._lock:
                    readers = [self._readers.get(descriptor) for descriptor, _ in self._epoll.poll(0)]
                for reader in filter(None, readers):
                    reader.close()
            except Exception as error:  # it must outlive every surprise: nobody else hears of hang-ups
                self._log.event("error", "watcher_failed", error=type(error).__name__)
        self._epoll.close()
        os.close(self._wake)


class Listeners:
    """Several listening sockets as one, so that a connection is counted together whatever its address."""

    def __init__(self, sockets: Sequence[socket.socket]) -> None:
        self._sockets = {each.fileno(): each for each in sockets}
        self._wake = os.eventfd(0)
        self._epoll = select.epoll()
        self._epoll.register(self._wake, select.EPOLLIN)
        for number, each in self._sockets.items():
            each.setblocking(False)  # a process that shares it may be the faster one
            self._epoll.register(number, select.EPOLLIN)

    def accept(self) -> tuple[socket.socket, Any] | None:
        """Returns the next connection and its peer, None once stopped.

        Raises OSError when a connection cannot be taken.
        """
        while True:
            number = self._epoll.poll(-1, 1)[0][0]
            if number == self._wake:
                return None
            with contextlib.suppress(BlockingIOError):
                return self._sockets[number].accept()

    def stop(self) -> None:
        """Have accept() return None, now and later."""
        os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """Close them all."""
        self._epoll.close()
        os.close(self._wake)
        for each in self._sockets.values():
            each.close()


def address_of(listener: socket.socket) -> str:
    """Where a socket listens, for people."""
    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return "unix:" + (os.fsdecode(name) or "(unnamed)").replace("\0", "@")
    return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"


def listen_on(address: tuple[str, int]) -> socket.socket:
    """Returns a socket that listens. Raises ConfigurationError where that is not possible."""
    is_v6 = ":" in address[0]
    family = socket.AF_INET6 if is_v6 else socket.AF_INET
    try:
        return socket.create_server(address, family=family, backlog=1024, dualstack_ipv6=is_v6)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        if error.errno == errno.EPERM:  # SocketBindDeny=any of the shipped unit
            reason += (
                ". Under the shipped unit the service manager holds the sockets: "
                f"enable a socket unit, such as fjmcp-broker-metrics.socket with FileDescriptorName={METRICS}"
            )
        raise ConfigurationError([f"cannot listen on {address[0]}:{address[1]}: {reason}"]) from None


class Server:
    """Accepts connections within the limits and gives each a thread.

    `handle` makes a Response of a Request.
    """

    def __init__(
        self,
        settings: Settings,
        handle: Callable[[Request], Response],
        log: Log,
        address: tuple[str, int],
        listeners: Sequence[socket.socket] = (),
        purpose: str = "http",
    ) -> None:
        self.purpose = purpose
        self.settings = settings
        self.handle = handle
        self.log = log
        self.watcher = DisconnectWatcher(log)
        self.places = Places()
        self.bodies = Bodies(settings)
        # Guards everything below; a leaf.
        self._changed = threading.Condition()
        self._connections: set[Connection] = set()
        self._making_room = 0  # how many of them were told to end so that others have a place
        self._unheard_proxies = False  # whether it was logged that an X-Forwarded-For is not believed
        self.streams = 0  # how many connections send an event stream
        self.draining = False
        listeners = listeners or [listen_on(address)]
        self.addresses = [address_of(each) for each in listeners]
        self.ports = [0 if each.family == socket.AF_UNIX else each.getsockname()[1] for each in listeners]
        self.port = self.ports[0]
        self._listeners = Listeners(listeners)
        self._acceptor = threading.Thread(target=self._accept, daemon=True, name="accept")

    def start(self) -> None:
        """Accept until `drain`."""
        self.watcher.start()
        self._acceptor.start()

    @property
    def open_connections(self) -> int:
        """How many connections there are."""
        return len(self._connections)

    def _accept(self) -> None:
        while True:
            try:
                accepted = self._listeners.accept()
            except OSError:
                # No file descriptor is left (H16): until a connection
                # ends, or for a moment, instead of spinning.
                with self._changed:
                    self._changed.wait(0.05)
                continue
            if accepted is None:
                return
            try:
                self._admit(*accepted)
            except Exception as error:  # one connection is lost, and the operator learns why
                accepted[0].close()
                self.log.event("error", "internal_error", error=type(error).__name__)

    def _admit(self, sock: socket.socket, address: Any) -> None:
        """Give a connection a thread, or drop it at once when there are too many."""
        peer = UNIX_PEER if sock.family == socket.AF_UNIX else read_address(address[0])
        connection = Connection(self, sock, peer)
        with self._changed:
            has_room = self._has_room_for(connection)
            if has_room:
                self._connections.add(connection)
        if not has_room:
            sock.close()
            return
        try:
            threading.Thread(target=self._serve, args=(connection,), daemon=True, name="connection").start()
        except RuntimeError:  # no thread to be had (H17)
            self._ended(connection)

    def _has_room_for(self, newcomer: Connection) -> bool:
        """Returns whether a connection may stay, room made for it if need be."""
        owner = newcomer.peer_owner
        held = sum(each.peer_owner == owner for each in self._connections) if owner else 0
        if held >= self.settings.max_connections_per_address:
            return False
        if len(self._connections) - self._making_room < self.settings.max_connections:
            return True
        return self._make_room(newcomer)

    def _make_room(self, newcomer: Connection) -> bool:
        """Ends the oldest connection of the address that holds most, and much more than the newcomer's.

        Returns whether there was one. Counted are connections that wait for a request, and requests without a
        valid token. So a few addresses that take every connection, slowly, lose them again; whoever has
        logged in keeps theirs.
        """
        owned = collections.defaultdict(list)
        for connection in self._connections:
            owner = connection.owner()
            if owner is not None and not connection.evicted:
                owned[owner].append(connection)
        if not owned or self._making_room >= MAKING_ROOM:
            return False
        most = max(owned.values(), key=len)
        if len(most) <= len(owned.get(newcomer.peer_owner or "", ())) + FAIR_SHARE:
            return False
        oldest = min(most, key=lambda connection: connection.since)
        oldest.evicted = True
        self._making_room += 1
        interrupt(oldest.sock, socket.SHUT_RDWR)
        return True

    def _serve(self, connection: Connection) -> None:
        try:
            connection.run()
        except (Gone, OSError):
            pass
        finally:
            self._ended(connection)

    def _ended(self, connection: Connection) -> None:
        connection.sock.close()
        connection.seat.leave()
        with self._changed:
            self._connections.discard(connection)
            self._making_room -= connection.evicted
            self._changed.notify_all()

    @contextlib.contextmanager
    def counted_stream(self) -> Iterator[None]:
        """An event stream is counted while it is sent."""
        with self._changed:
            self.streams += 1
        try:
            yield
        finally:
            with self._changed:
                self.streams -= 1

    def trusts(self, address: str) -> bool:
        """Returns whether a peer's X-Forwarded-For is believed."""
        if address == UNIX_PEER:
            return True
        parsed = ipaddress.ip_address(address)
        return any(parsed in network for network in self.settings.trusted_proxies)

    def hear_no_proxy(self, peer: str) -> None:
        """Logs, once, that a peer writes X-Forwarded-For and is not a trusted proxy.

        Else all its clients would share one address unnoticed.
        """
        if not self._unheard_proxies:
            self._unheard_proxies = True
            self.log.event(
                "warning",
                "x_forwarded_for_ignored",
                peer=peer,
                advice="If this is your reverse proxy, add its address to trusted_proxies; "
                "until then all its clients count as one.",
            )

    def drain(self) -> None:
        """Accept no more; idle connections and idle streams end now, the others with their answer.

        One that was used a moment ago may have its next request on the way, which a close would meet with a
        reset: it has a moment for it, and then `Connection: close`.
        """
        self._listeners.stop()
        if self._acceptor.ident:
            self._acceptor.join()
        with self._changed:
            self.draining = True
            connections = list(self._connections)
        recently = time.monotonic() - 2
        waited_for = {each for each in connections if not each.busy and each.since > recently}
        for connection in connections:
            if connection not in waited_for:
                connection.drain()
        with self._changed:
            self._changed.wait_for(lambda: not waited_for & self._connections, LAST_REQUEST)
        for connection in waited_for:
            connection.drain()

    def wait_for_connections(self, seconds: float) -> list[Connection]:
        """Waits until all connections have ended, or that long; returns those that are left."""
        with self._changed:
            self._changed.wait_for(lambda: not self._connections, seconds)
            return list(self._connections)

    def close(self, seconds: float) -> None:
        """Give connections that long, then cut them."""
        for connection in self.wait_for_connections(seconds):
            interrupt(connection.sock, socket.SHUT_RDWR)
        self._listeners.close()
        self.watcher.close()


@functools.lru_cache(maxsize=1)
def http_date(second: int) -> str:
    """Returns a time as the Date header has it; formatted once a second."""
    return email.utils.formatdate(second, usegmt=True)


def write_head(status: int, headers: Iterable[tuple[str, str]]) -> bytes:
    """Returns the head of a response; headers are written here alone.

    CR, LF and NUL are refused: nothing reflected can split a response (H12).
    """
    lines = [
        f"HTTP/1.1 {status} {http.client.responses[status]}",
        f"Date: {http_date(int(time.time()))}",
        "Server: fjmcp-broker",
        "X-Content-Type-Options: nosniff",
    ]
    for name, value in headers:
        line = f"{name}: {value}"
        if not HEADER_LINE.fullmatch(line):
            raise ValueError("a header that would break the response")
        lines.append(line)
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


@dataclass(frozen=True, slots=True)
class Head:
    """A request's line and header; `http11`, whether the connection may be kept, and Expect: 100-continue."""

    method: str
    target: str
    headers: dict[str, list[str]]
    http11: bool
    keep_alive: bool
    wants_continue: bool


def read_fields(lines: Iterable[bytes]) -> dict[str, list[str]]:
    """Returns header or trailer fields: lower-case names to the lists of their values.

    Raises HTTPError 400.
    """
    fields: dict[str, list[str]] = {}
    for line in lines:
        match = FIELD.fullmatch(line)
        if not match:
            raise bad_request("A header line is malformed.")
        fields.setdefault(match[1].decode().lower(), []).append(match[2].strip(b" \t").decode("latin-1"))
    return fields


class RequestReader:
    """Reads the requests of one connection, strictly, one at a time.

    Gone when the connection has ended, or must.
    """

    def __init__(self, sock: socket.socket, settings: Settings, bodies: Bodies, seat: Seat) -> None:
        self._sock = sock
        self._settings = settings
        self._bodies = bodies
        self._seat = seat
        self._buffer = bytearray()
        self._body: Body | None = None  # the body that is read, or weighs on its owner
        self.unread = 0  # the body that is still to be read: its length, or CHUNKED
        self.send_continue: Callable[[], None] | None = None

    # -- bytes

    def _receive(self, deadline: float, late: Exception | None = None) -> None:
        left = deadline - time.monotonic()
        try:
            if left <= 0:
                raise TimeoutError
            self._sock.settimeout(left)
            data = self._sock.recv(65536)
        except TimeoutError:
            raise late or HTTPError(408, "request_timeout", "The request did not arrive in time.") from None
        if data:
            self._buffer += data
        if self._body:
            self._bodies.grow(self._body, len(data))
        if not data:
            raise Gone

    def discard(self, deadline: float) -> None:
        """Reads and drops the client's further bytes."""
        while True:
            self._receive(deadline)
            self._buffer.clear()

    def _exactly(self, size: int, deadline: float) -> bytes:
        while len(self._buffer) < size:
            self._receive(deadline)
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data

    def _line(self, deadline: float, limit: int, too_long: tuple[int, str, str]) -> bytes:
        """Returns the bytes before the next CR LF; a bare LF ends no line (RFC 9112 2.2)."""
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0 and len(self._buffer) < limit:
            searched = len(self._buffer)
            self._receive(deadline)
        if not 0 <= end < limit:
            raise HTTPError(*too_long)
        line = self._exactly(end + 1, deadline)
        if not line.endswith(b"\r\n"):
            raise bad_request("Lines must end with CR LF.")
        return line[:-2]

    def _field_lines(self, deadline: float) -> Iterator[bytes]:
        """Yields header or trailer lines up to the empty one, as they arrive."""
        left = MAX_HEAD
        for _ in range(MAX_HEADERS + 1):
            line = self._line(deadline, left, HEADER_TOO_LARGE)
            if not line:
                return
            yield line
            left -= len(line) + 2
        raise HTTPError(*HEADER_TOO_LARGE)

    # -- heads

    def read_head(self, patience: float) -> Head:
        """Returns the next request's head.

        Raises Gone when none begins in time, HTTPError for anything that is not strictly HTTP.
        """
        self._await_request(time.monotonic() + patience)
        first, fields = self._head_lines(time.monotonic() + self._settings.header_timeout)
        match = REQUEST_LINE.fullmatch(first)
        if not match:
            raise bad_request("The request line is malformed.")
        if match[3] not in (b"1.0", b"1.1"):
            raise HTTPError(505, "version_not_supported", "Only HTTP/1.1 and HTTP/1.0 are served.")
        http11 = match[3] == b"1.1"
        headers = read_fields(fields)
        hosts = len(headers.get("host", ()))
        if hosts > 1 or http11 and not hosts:
            raise bad_request("Exactly one Host header is needed.")
        method = match[1].decode()
        target = self._origin_form(method, match[2].decode(), headers)
        self.unread = self._framing(headers, http11)
        expect = [value.lower() for value in headers.get("expect", ())]
        if expect not in ([], ["100-continue"]):
            raise HTTPError(417, "expectation_failed", "Only Expect: 100-continue is understood.")
        options = ",".join(headers.get("connection", ())).lower().split(",")
        tokens = [option.strip() for option in options]
        keep_alive = "close" not in tokens and (http11 or "keep-alive" in tokens)
        return Head(method, target, headers, http11, keep_alive, bool(expect) and http11)

    def _await_request(self, until: float) -> None:
        """Waits for a request's first byte, past one empty line; Gone after `until`.

        RFC 9112 2.2: some clients end a body with such a line.
        """
        if not self._buffer:
            self._receive(until, Gone())
        if self._buffer == b"\r":
            self._receive(until, Gone())
        if self._buffer.startswith(b"\r\n"):
            del self._buffer[:2]
            if not self._buffer:
                self._receive(until, Gone())

    def _head_lines(self, deadline: float) -> tuple[bytes, Iterable[bytes]]:
        """Returns the request line and the header's lines; a head that has arrived is cut at once."""
        end = self._buffer.find(b"\r\n\r\n", 0, MAX_LINE)
        if end < 0:
            return self._line(deadline, MAX_LINE, URI_TOO_LONG), self._field_lines(deadline)
        first, *fields = bytes(self._buffer[:end]).split(b"\r\n")
        del self._buffer[: end + 4]
        if len(fields) > MAX_HEADERS:
            raise HTTPError(*HEADER_TOO_LARGE)
        return first, fields

    @staticmethod
    def _origin_form(method: str, target: str, headers: dict[str, list[str]]) -> str:
        """Returns the target as path and query; an absolute form's host replaces Host (RFC 9112 3.2.2)."""
        if target.startswith("/") or (method, target) == ("OPTIONS", "*"):
            return target
        absolute = ABSOLUTE_TARGET.fullmatch(target)
        if not absolute:
            raise bad_request("The request's target is malformed.")
        headers["host"] = [absolute[1]]
        return absolute[2] or "/"

    @staticmethod
    def _framing(headers: dict[str, list[str]], http11: bool) -> int:
        """Returns the body's length, or CHUNKED; refuses what could be read in two ways (RFC 9112 6.3)."""
        lengths = headers.get("content-length", ())
        codings = [coding.lower() for coding in headers.get("transfer-encoding", ())]
        if codings and (lengths or not http11):
            raise bad_request("Transfer-Encoding cannot stand with Content-Length or in HTTP/1.0.")
        if codings not in ([], ["chunked"]):
            raise HTTPError(501, "not_implemented", "The only transfer coding understood is chunked.")
        if codings:
            return CHUNKED
        if not lengths:
            return 0
        length = lengths[0]
        if len(lengths) > 1 or not (length.isascii() and length.isdecimal() and len(length) <= 15):
            raise bad_request("Content-Length must be one plain number.")
        return int(length)

    # -- bodies

    def read_body(
        self, limit: int, seconds: float | None = None, weigh: Callable[[bytes], int] = len
    ) -> bytes:
        """Returns the request's body, read only now; it weighs on its owner until let_go().

        HTTPError 413 above `limit`, 408 when it is too slow, 400 when it is malformed, 503 when bodies have
        no room and this one is the slowest of whoever holds most, or more than its owner may have.
        """
        if not self.unread:
            return b""
        too_large = HTTPError(413, "content_too_large", f"The body may have at most {limit} bytes.")
        if self.unread > limit:
            raise too_large
        if self.send_continue and not self._buffer:
            self.send_continue()
        now = time.monotonic()
        deadline = now + min(self._settings.body_timeout, seconds or math.inf)
        try:
            if self.unread == CHUNKED or self.unread > Bodies.FREE:
                self._body = self._new_body(now)
                self._bodies.grow(self._body, len(self._buffer))
            if self.unread == CHUNKED:
                body = self._chunks(limit, deadline, too_large)
            else:
                body = self._exactly(self.unread, deadline)
            self.unread = 0
            weight = weigh(body)
            if self._body or weight > Bodies.FREE:
                self._body = self._body or self._new_body(now)
                self._bodies.settle(self._body, weight)
        except BaseException:
            self.let_go()
            raise
        return body

    def _new_body(self, now: float) -> Body:
        return Body(self._seat.owner, now, functools.partial(interrupt, self._sock, socket.SHUT_RD))

    def let_go(self) -> None:
        """Nothing of the body waits any more."""
        if self._body:
            self._bodies.close(self._body)
            self._body = None

    def _chunks(self, limit: int, deadline: float, too_large: HTTPError) -> bytes:
        """Returns a chunked body (RFC 9112 7.1).

        A chunk costs a few microseconds however small it is, so their number has a bound, too.
        """
        body = bytearray()
        for _ in range(MIN_CHUNKS + limit // 64):
            line = self._line(deadline, MAX_LINE, (400, "bad_request", "A chunk's line is too long."))
            match = CHUNK_LINE.fullmatch(line)
            if not match:
                raise bad_request("A chunk's size is malformed.")
            size = int(match[1], 16)
            if size == 0:
                read_fields(self._field_lines(deadline))
                return bytes(body)
            if len(body) + size > limit:
                raise too_large
            chunk = self._exactly(size + 2, deadline)
            if not chunk.endswith(b"\r\n"):
                raise bad_request("A chunk does not end where it says.")
            body += chunk[:-2]
        raise bad_request("The body has too many chunks.")


class Connection:
    """One connection: serves its requests, one at a time, and writes their responses."""

    def __init__(self, server: Server, sock: socket.socket, peer: str) -> None:
        self.server = server
        self.sock = sock
        self.peer = peer
        self.settings = server.settings
        # Whose it is while it waits for a request: a proxy's may be anybody's.
        self.peer_owner = None if server.trusts(peer) else f"address {network_of(peer)}"
        self.since = time.monotonic()  # when it was opened, or last began or ended a request
        self.evicted = False  # ended by the server, to make room
        self.seat = Seat(server.places)
        self.reader = RequestReader(sock, server.settings, server.bodies, self.seat)
        self.busy = False
        self.idle_reader: Reader | None = None
        self.close_after = False
        # Of the request that is being served:
        self.http11 = True
        self.is_head = False
        self.request_id = ""
        self.context = Context()
        self._forwarded: tuple[object, object, tuple[str, bool, bool]] | None = None

    def run(self) -> None:
        """Serve requests until the connection ends."""
        if self.peer != UNIX_PEER:
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Without this the kernel grows the buffer of a client that does not read (to 4 MiB and more).
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        # A connection is worth keeping once a request has come over it.
        patience = self.settings.header_timeout
        while not self.close_after:
            self.request_id = os.urandom(6).hex()
            self.context = Context()
            self.is_head = False
            try:
                request = self._request(self.reader.read_head(patience))
            except HTTPError as error:
                self._refuse(error)
                return
            self.since = time.monotonic()
            self.seat.owner = f"address {network_of(request.address)}"
            self.busy = True
            try:
                with self.server.log.request(request.id):
                    self._respond(request)
            finally:
                self.seat.leave()
            self.busy = False
            self.since = time.monotonic()
            # Read after `busy` is cleared; drain() does both in the other order. An answer that began before
            # the server drained lacks `Connection: close`: a request may follow, and its answer has it.
            patience = LAST_REQUEST if self.server.draining else self.settings.idle_timeout

    def _request(self, head: Head) -> Request:
        self.http11 = head.http11
        self.is_head = head.method == "HEAD"
        self.close_after |= not head.keep_alive
        self.reader.send_continue = self._send_continue if head.wants_continue else None
        path, _, query = head.target.partition("?")
        return Request(
            head.method,
            path,
            query,
            head.headers,
            *self._client_address(head.headers),
            self.request_id,
            self.reader.read_body,
            self.seat,
            self.context,
        )

    def _refuse(self, error: HTTPError) -> None:
        """Answers a request that is not strictly HTTP; the connection ends."""
        self.since = time.monotonic()
        self.close_after = True
        with self.server.log.request(self.request_id):
            self.server.log.refused("other", error.status, error.cause, self.peer, {})
            self._send(error_response(error))
        self._linger()

    def drain(self) -> None:
        """The server drains: an idle connection or stream ends now, anything else after its answer."""
        reader = self.idle_reader
        # One that is finished ends by itself, once all of it is sent.
        if reader and not reader.stream.finished:
            reader.close()
        if not self.busy:  # what has arrived can still be read
            interrupt(self.sock, socket.SHUT_RD)

    def owner(self) -> str | None:
        """Returns whose connection this is among those that may be ended; None while a good token is served.

        One that waits for a request is its peer's; a proxy's, the last one's that was served over it.
        """
        owner = self.seat.owner
        if self.busy:
            return owner if owner.startswith("address ") else None
        return self.peer_owner or owner or None

    def _client_address(self, headers: dict[str, list[str]]) -> tuple[str, bool, bool]:
        """Returns the client's address, whether no proxy spoke for it, and whether it is a trusted proxy.

        A proxy's connection mostly brings one client's requests, so the last answer is remembered.
        """
        lines = headers.get("x-forwarded-for")
        known = self._forwarded
        trusted = self.settings.trusted_proxies
        if known and known[0] == lines and known[1] is trusted:
            return known[2]
        found = self._read_client_address(lines)
        self._forwarded = (lines, trusted, found)
        return found

    def _read_client_address(self, lines: list[str] | None) -> tuple[str, bool, bool]:
        """X-Forwarded-For is read from the right, past trusted proxies, up to an entry that is no address."""
        trusted = self.server.trusts(self.peer)
        if lines is None or not trusted:
            if lines is not None:
                self.server.hear_no_proxy(self.peer)
            return self.peer, True, trusted
        address = self.peer
        with contextlib.suppress(ValueError):
            for hop in reversed(",".join(lines).rsplit(",", MAX_HOPS)[-MAX_HOPS:]):
                address = read_address(hop)
                if not self.server.trusts(address):
                    return address, False, False
        return address, False, True

    # -- writing

    def _respond(self, request: Request) -> None:
        """Has a request answered, and sends the answer."""
        log = self.server.log
        try:
            try:
                response = self.server.handle(request)
            finally:
                self.reader.let_go()
            self.close_after |= bool(self.reader.unread or self.server.draining)
            if not response.streaming:
                self._send(response)
        except (Gone, OSError):
            raise
        except Exception as error:
            # For the operator; the client learns a number only.
            line = traceback.extract_tb(error.__traceback__)[-1].lineno
            log.event("error", "internal_error", error=type(error).__name__, line=line)
            log.refused(self.context.endpoint, 500, "server_error", request.address, self.context.who())
            self.close_after = True
            response = json_response(
                500, {"error": "server_error", "error_description": f"Internal error {request.id}."}
            )
            self._send(response)
        if response.streaming:
            self._pump(response, response.streaming)
        if self.settings.debug:
            log.bounded(
                "debug",
                "request",
                "",
                method=request.method,
                path=request.path[:200],
                status=response.status,
                ms=round((time.monotonic() - self.since) * 1000, 1),
                address=request.address,
            )
        if self.reader.unread:
            self._linger()

    def _write(self, data: bytes) -> None:
        """Sends data to a client that may be slow but steady: TimeoutError unless 64 KiB go out in time."""
        deadline = time.monotonic() + self.settings.write_timeout
        self.sock.settimeout(self.settings.write_timeout)
        sent = self.sock.send(data)
        if sent == len(data):
            return
        left = memoryview(data)[sent:]
        before = self._untaken() + len(left)
        while left:
            self.sock.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                left = left[self.sock.send(left) :]
            except TimeoutError:
                untaken = self._untaken() + len(left)
                if before - untaken < STEADY:
                    raise
                before = untaken
                deadline = time.monotonic() + self.settings.write_timeout

    def _untaken(self) -> int:
        """Returns how many bytes the kernel holds for the client."""
        held = array.array("i", [0])
        fcntl.ioctl(self.sock, termios.TIOCOUTQ, held)
        return held[0]

    def _send_continue(self) -> None:
        self._write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _send(self, response: Response) -> None:
        """Sends a response that is all there."""
        headers = [*response.headers, ("X-Request-Id", self.request_id)]
        is_bare = response.status in (204, 304)
        if response.content_type:
            headers.append(("Content-Type", response.content_type))
        if not is_bare:
            headers.append(("Content-Length", str(len(response.body))))
        if self.close_after or not self.http11:
            headers.append(("Connection", "close" if self.close_after else "keep-alive"))
        head = write_head(response.status, headers)
        self._write(head if is_bare or self.is_head else head + response.body)
        seconds = time.monotonic() - self.since
        endpoint = self.context.endpoint
        self.server.log.metrics.observe("fjmcp_http_request_duration_seconds", (endpoint,), seconds)

    def _linger(self) -> None:
        """Reads on for a moment, else a reset would destroy our answer; few at once of one owner."""
        owner = self.seat.owner or self.peer_owner or ""
        with contextlib.suppress(OSError, HTTPError):
            self.seat.take("lingering", owner, LINGERING)
            self.sock.shutdown(socket.SHUT_WR)
            self.reader.discard(time.monotonic() + 1)

    # -- what is still to come

    def _take(self, reader: Reader, timeout: float, after: int = 0) -> Event | None:
        """Returns the next event; only a longer wait pays for watching whether the client hangs up."""
        event = reader.take(min(0.05, timeout), after)
        if event is None and not reader.ended and timeout > 0.05:
            self.server.watcher.watch(self.sock, reader)
            try:
                event = reader.take(timeout - 0.05, after)
            finally:
                self.server.watcher.forget(self.sock)
        return event

    def _pump(self, response: Response, streaming: StreamingResponse) -> None:
        """Sends what is still to come: as JSON when all answers are there in time, else as a stream."""
        reader = streaming.reader
        try:
            if streaming.delivery is Delivery.SSE:
                self.idle_reader = reader
                self._stream(response, streaming)
                return
            events = self._collect(streaming)
            if events:
                self._send_collected(response, streaming, events)
            elif reader.ended:
                self.close_after = True
                description = "The answer is not to be had here."
                self._send(json_response(503, {"error": "unavailable", "error_description": description}))
            else:
                self._stream(response, streaming)
        finally:
            self.idle_reader = None
            reader.close()
            if streaming.on_disconnect and not reader.has_all:
                streaming.on_disconnect()

    def _collect(self, streaming: StreamingResponse) -> list[Event]:
        """Returns all answers; [] for a client of streams if another event comes first, or they are late."""
        reader = streaming.reader
        may_stream = streaming.delivery is Delivery.JSON_THEN_SSE
        deadline = time.monotonic() + JSON_WAIT
        answers = []
        seen = reader.cursor
        while True:
            timeout = max(0.0, deadline - time.monotonic()) if may_stream else 3600.0
            event = self._take(reader, timeout, seen)
            if event is None:
                if reader.ended or may_stream:
                    return []
                continue
            seen = event.number
            if event.answer:
                answers.append(event)
            elif may_stream:
                return []
            else:
                # It cannot be sent; who puts it must not wait.
                reader.ack(event)
            if event.last:
                return answers

    def _send_collected(
        self, response: Response, streaming: StreamingResponse, answers: Sequence[Event]
    ) -> None:
        last = answers[-1]
        if streaming.batch:
            body = b"[" + b",".join(event.data for event in answers) + b"]"
            self._send(Response(response.status, body, "application/json", response.headers))
        else:
            self._send(Response(last.status, last.data, "application/json", response.headers))
        for event in answers:
            streaming.reader.ack(event)

    def _stream(self, response: Response, streaming: StreamingResponse) -> None:
        """Sends an event stream, until its last event or for as long as there may be more."""
        reader = streaming.reader
        if streaming.event_ids:
            reader.stream.announce()
        headers = [
            *response.headers,
            ("X-Request-Id", self.request_id),
            ("Content-Type", "text/event-stream"),
            ("Cache-Control", "no-store"),
            ("X-Accel-Buffering", "no"),
        ]
        if self.http11:
            headers.append(("Transfer-Encoding", "chunked"))
        else:
            self.close_after = True  # its end is the end of the stream
        if self.close_after:
            headers.append(("Connection", "close"))
        opening = b": open\n\n"
        if streaming.prime:
            opening = f"id: {reader.stream.key}-{reader.cursor}\nretry: 1000\ndata: \n\n".encode()
        with self.server.counted_stream():
            self._write(write_head(response.status, headers) + self._framed(opening))
            self._send_events(streaming)

    def _send_events(self, streaming: StreamingResponse) -> None:
        reader = streaming.reader
        while True:
            event = self._take(reader, streaming.quiet or 15.0)
            if event is not None:
                frame = self._framed(self._frame(streaming, event))
                if event.last and self.http11:
                    frame += b"0\r\n\r\n"
                self._write(frame)
                reader.ack(event)
                if event.last:
                    return
            elif reader.ended or streaming.quiet:
                if self.http11:
                    self._write(b"0\r\n\r\n")
                return
            else:
                self._write(self._framed(b": keep-alive\n\n"))

    @staticmethod
    def _frame(streaming: StreamingResponse, event: Event) -> bytes:
        """An event of an event stream (WHATWG HTML 9.2)."""
        data = event.data.replace(b"\r", b" ").replace(b"\n", b" ")
        name = f"id: {streaming.reader.stream.key}-{event.number}\n" if streaming.event_ids else ""
        return name.encode() + b"data: " + data + b"\n\n"

    def _framed(self, data: bytes) -> bytes:
        return b"%x\r\n%s\r\n" % (len(data), data) if self.http11 else data


# ============================================================================================================
# Broker
# Owns the wiring and the route table: which path is whose, and the order of checks before a handler is asked.
# ============================================================================================================

LOOPBACK_ORIGIN = re.compile(r"https?://(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?")
LOOK_OUT = 600  # seconds between two looks whether client documents can be read, while none can
EXPOSED = (
    "Access-Control-Expose-Headers",
    "WWW-Authenticate, Mcp-Session-Id, MCP-Protocol-Version, X-Request-Id",
)


def other_forgejo(known: str, configured: str) -> str:
    """Returns the error for a store whose users are of another Forgejo than the configured one."""
    return (
        f"forgejo_url: the users in this store are those of {known}, not of {configured}. If it is the same "
        "Forgejo under another URL, run `rebind`; if it is another Forgejo, `rebind --forget` ends all logins"
    )


def open_store_of(settings: Settings, keyring: Keyring) -> Store:
    """Returns the store. Raises ConfigurationError when its users are of another Forgejo, or it was moved."""
    store = Store(store_place(settings), keyring)
    copied_to = store.copied_to()
    known = store.bound_to(settings.forgejo_url)
    if not copied_to and known == settings.forgejo_url:
        store.forget_copy()
        return store
    store.close()
    problem = moved(settings, copied_to) if copied_to else other_forgejo(known, settings.forgejo_url)
    raise ConfigurationError([problem])


def moved(settings: Settings, url: str) -> str:
    """Returns the sentence that refuses a store whose copy has taken over."""
    return f"store_path: what was in {settings.store_path} is in {url} now: set store_url to that"


def wrong_host(public_url: str) -> str:
    """Returns the sentence that refuses a request for another host."""
    return (
        f"This server answers for {urlsplit(public_url).netloc}, not for that host name. A proxy has to pass "
        "the client's Host header on, with its port (nginx: proxy_set_header Host $http_host)."
    )


Handler = Callable[[Request], Response]


@dataclass(frozen=True, slots=True)
class Route:
    """A path's endpoint: its name, its kind (page, health, public, mcp), and a handler for each method."""

    name: str
    kind: str
    methods: Mapping[str, Handler]


NO_ROUTE = Route("other", "", {})


class Broker:
    """The whole program but its command line: everything built from settings, ready to serve."""

    def __init__(
        self,
        settings: Settings,
        *,
        clock: Clock | None = None,
        log: Log | None = None,
        listener: socket.socket | None = None,
        web: PublicWeb | None = None,
        sockets: Sequence[tuple[str, socket.socket]] = (),
    ) -> None:
        self.settings = settings
        self.log = log or Log(settings, clock=clock)
        keyring = load_keyring(settings)
        self.store = open_store_of(settings, keyring)
        self.clock = SteadyClock(clock or self.store.clock())
        self.brokers = Brokers(settings, self.store, keyring, self.log, self.clock)
        self.brokers.join()
        forgejo = Forgejo(settings, self.clock, self.log.metrics)
        self.upstream = ForgejoCredentials(
            settings,
            self.store,
            keyring,
            forgejo,
            self.log,
            self.clock,
            self._person_ended,
        )
        self.guardian = Guardian()
        limiter = Limiter(self.clock)
        services = self._services(keyring)
        self.kept = services.kept
        self.launcher = Launcher(services)
        self.capacity = Capacity(settings, self.clock)
        self.sessions = Sessions(services, self.launcher, self.capacity)
        self.reaper = Reaper(services, self.launcher, self.sessions, self.brokers)
        oauth = OAuthServices(settings, self.store, keyring, self.log, self.clock, limiter)
        clients = Clients(oauth, web or PublicWeb())
        self.documents = clients.documents
        self._stopping = threading.Event()
        authorization = Authorization(oauth, clients, self.upstream, forgejo, self._end_session)
        self.endpoint = Endpoint(services, self.launcher, self.sessions, self.reaper)
        self.routes = self._routes(clients, authorization, self.endpoint)
        self.is_activated = bool(sockets)
        self.servers = self._listen([*sockets, *([("", listener)] if listener else [])])
        self.server = self.servers[0]
        self._hosts = own_hosts(settings.public_url, self.server.ports)
        self._blob = git_blob_id(__file__)

    def _person_ended(self, sub: str) -> None:
        """Ends, at every broker, what the earlier person of a number had, before the new one is let in."""
        self.sessions.forget_person(sub)
        self.brokers.await_all()

    def _end_session(self, name: bytes) -> None:
        self.sessions.forget([name], "ended by the user")

    def _services(self, keyring: Keyring) -> Services:
        return Services(
            self.settings,
            self.store,
            self.upstream,
            keyring,
            self.guardian,
            self.log,
            self.clock,
            KeptBytes(self.settings, self.clock),
            FirstCalls(),
        )

    def _listen(self, sockets: Sequence[tuple[str, socket.socket]]) -> list[Server]:
        """Opens the HTTP server, and the one of /metrics if there is one.

        They use the service manager's sockets, else those of the settings. A socket is for /metrics by its
        name, or by the address that `metrics_listen` says; any other is for HTTP.
        """
        settings = self.settings
        metrics_address = "%s:%d" % (settings.metrics_listen or ("", 0))
        for_metrics = [
            each for name, each in sockets if name == METRICS or address_of(each) == metrics_address
        ]
        for_http = [each for _, each in sockets if each not in for_metrics]
        open_ones = [each for each in for_http if each.family != socket.AF_UNIX]
        exposed = [address_of(each) for each in open_ones if not is_loopback_name(each.getsockname()[0])]
        if exposed and settings.public_url.startswith("http:"):
            raise ConfigurationError(
                [
                    f"with an http public_url the socket {exposed[0]} must be on loopback: "
                    "tokens would travel in the clear"
                ]
            )
        servers = [Server(settings, self.handle, self.log, settings.listen, for_http)]
        if for_metrics or settings.metrics_listen:
            address = settings.metrics_listen or ("", 0)
            servers.append(Server(settings, self.metrics, self.log, address, for_metrics, METRICS))
        return servers

    def _routes(self, clients: Clients, authorization: Authorization, endpoint: Endpoint) -> dict[str, Route]:
        """Returns what is served at each path; those at the root are for clients that ignore metadata."""
        server_metadata = "/.well-known/oauth-authorization-server"
        resource_metadata = "/.well-known/oauth-protected-resource"
        # fmt: off
        table: tuple[tuple[str, str, str, Handler, tuple[str, ...]], ...] = (
            ("home", "page", "GET HEAD", self._home, ("/",)),
            ("healthz", "health", "GET HEAD", self.health, ("/healthz",)),
            ("server_metadata", "public", "GET HEAD", authorization.metadata,
                (server_metadata, server_metadata + "/mcp", "/mcp" + server_metadata)),
            ("resource_metadata", "public", "GET HEAD", authorization.resource_metadata,
                (resource_metadata, resource_metadata + "/mcp", resource_metadata + "/mcp/")),
            ("authorize", "page", "GET HEAD", authorization.authorize, ("/oauth/authorize", "/authorize")),
            ("consent", "page", "POST", authorization.consent, ("/oauth/consent",)),
            ("callback", "page", "GET HEAD", authorization.callback, ("/oauth/callback",)),
            ("account", "page", "GET HEAD", authorization.account, ("/account",)),
            ("account_login", "page", "POST", authorization.account_login, ("/account/login",)),
            ("account_end", "page", "POST", authorization.account_end, ("/account/end",)),
            ("register", "public", "POST", clients.register, ("/oauth/register", "/register")),
            ("token", "public", "POST", authorization.token, ("/oauth/token", "/token")),
            ("revoke", "public", "POST", authorization.revoke, ("/oauth/revoke", "/revoke")),
        )
        # fmt: on
        routes: dict[str, Route] = {}
        for name, kind, verbs, handler, paths in table:
            methods = dict.fromkeys(verbs.split(), handler)
            if kind == "public":
                methods["OPTIONS"] = self._preflight
            routes |= dict.fromkeys(paths, Route(name, kind, methods))
        mcp = {
            "POST": endpoint.post,
            "GET": endpoint.get,
            "DELETE": endpoint.delete,
            "HEAD": endpoint.head,
            "OPTIONS": self._preflight,
        }
        return routes | dict.fromkeys(("/mcp", "/mcp/"), Route("mcp", "mcp", mcp))

    def handle(self, request: Request) -> Response:
        """Returns the answer to a request; one that turns it away is counted and logged."""
        route = self.routes.get(request.path, NO_ROUTE)
        context = request.context
        context.endpoint = route.name
        context.user_agent = request.first_header("user-agent")
        response = self._answer(request, route)
        if response.cause:
            self.log.refused(route.name, response.status, response.cause, request.address, context.who())
        elif route.name in ("server_metadata", "resource_metadata") and request.method == "GET":
            self.log.connect_step("discovery", user_agent=context.user_agent)
        return response

    def _answer(self, request: Request, route: Route) -> Response:
        """Answers a request, in design 3's order: Host, route, Origin, OPTIONS, bearer, method, body."""
        cors: tuple[tuple[str, str], ...] = ()
        try:
            if request.first_header("host").lower() not in self._hosts and route.kind != "health":
                raise HTTPError(421, "misdirected_request", wrong_host(self.settings.public_url))
            if route is NO_ROUTE:
                cause = "no_metadata" if request.path.startswith("/.well-known/") else "not_found"
                raise HTTPError(404, "not_found", "There is nothing at this address.", cause=cause)
            cors = self._cors(request, route.kind)
            handler = route.methods.get(request.method)
            if route.kind == "mcp":
                # There the bearer tells whose it is, and comes before the method.
                handler = handler or route.methods["HEAD"]
            else:
                seat_of_address(request, self.settings)
            if not handler:
                allowed = (("Allow", ", ".join(route.methods)),)
                raise HTTPError(405, "method_not_allowed", f"Use {next(iter(route.methods))}.", allowed)
            response = handler(request)
        except ErrorPage as error:
            response = replace(error.response(request.id), cause=error.reason)
        except HTTPError as error:
            if route.kind == "page" or error.status == 404 and is_page_request(request):
                response = replace(refusal_page(error, request.id), cause=error.cause)
            else:
                response = error_response(error, NO_STORE[:1])
        return replace(response, headers=(*response.headers, *cors)) if cors else response

    def _cors(self, request: Request, kind: str) -> tuple[tuple[str, str], ...]:
        """Returns the CORS headers of the answer; HTTPError 403 for a web origin that may not call.

        Forms are judged by who reads them.
        """
        if kind == "public":
            return ("Access-Control-Allow-Origin", "*"), EXPOSED
        origins = request.headers.get("origin", ()) if kind == "mcp" else ()
        if not origins:
            return ()
        origin = origins[0]
        is_listed = origin == self.settings.public_url or origin in self.settings.allowed_origins
        if len(origins) > 1 or not (is_listed or LOOPBACK_ORIGIN.fullmatch(origin)):
            description = (
                "This web origin may not call this server; the operator can add it to allowed_origins."
            )
            raise HTTPError(403, "forbidden_origin", description)
        return ("Access-Control-Allow-Origin", origin), ("Vary", "Origin"), EXPOSED

    def _preflight(self, request: Request) -> Response:
        asked = re.sub(r"[^A-Za-z0-9_, -]", "", request.first_header("access-control-request-headers"))
        headers = (
            ("Access-Control-Allow-Methods", ", ".join(self.routes[request.path].methods)),
            ("Access-Control-Allow-Headers", asked),
            ("Access-Control-Max-Age", "7200"),
        )
        return Response(204, headers=headers)

    def _home(self, request: Request) -> Response:
        return home_page(self.settings.public_url, self.settings.forgejo_url)

    def health(self, request: Request) -> Response:
        """GET /healthz: 200, or 503 when the store fails.

        As an event stream it lasts a moment, which shows proxies that buffer.
        """
        if request.method == "GET" and takes_streams(request):
            # No timer ends it: strangers would double the threads that they are allowed.
            return Response(200, streaming=StreamingResponse(EventStream().open(), Delivery.SSE, quiet=0.5))
        is_ok = self.store.healthy()
        sessions, children = self.counts() if is_ok else (None, None)
        state = {
            "status": "ok" if is_ok else "failing",
            "version": __version__,
            "git": self._blob,
            "store": "ok" if is_ok else "failing",
            "sessions": sessions,
            "children": children,
        }
        return json_response(200 if is_ok else 503, state, NO_STORE[:1])

    def counts(self) -> tuple[int, int]:
        """Returns (sessions on file, children)."""
        return self.store.count_sessions(), self.capacity.count()

    def metrics(self, request: Request) -> Response:
        """GET /metrics on its own listener: Prometheus text, counts without names."""
        if request.path != "/metrics":
            return json_response(404, {"error": "not_found", "error_description": "Only /metrics is here."})
        gauges: dict[tuple[str, tuple[str, ...]], float] = process_metrics()
        gauges["fjmcp_build_info", (__version__, self._blob)] = 1
        gauges["fjmcp_children_limit", ()] = self.settings.max_sessions
        gauges["fjmcp_connections", ()] = self.server.open_connections
        gauges["fjmcp_streams", ()] = self.server.streams
        with contextlib.suppress(StoreUnavailable):
            gauges["fjmcp_sessions", ()] = self.store.count_sessions()
        for state, number in self.sessions.child_states().items():
            gauges["fjmcp_children", (state,)] = number
        return Response(200, self.log.metrics.text(gauges), "text/plain; version=0.0.4; charset=utf-8")

    def start(self) -> None:
        """Serve and reap in daemon threads."""
        threading.Thread(target=self.reaper.run, daemon=True, name="reaper").start()
        for server in self.servers:
            server.start()

    def thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """Logs an exception that ended a thread, instead of a traceback on stderr."""
        place = traceback.extract_tb(failure.exc_traceback)[-1:]
        self.log.event(
            "error",
            "thread_failed",
            thread=failure.thread and failure.thread.name,
            error=failure.exc_type.__name__,
            line=place[0].lineno if place else None,
        )

    def look_out(self) -> None:
        """Learns in the background whether client documents can be read from here.

        At the start, then every 10 min while they cannot.
        """

        def watch() -> None:
            while not self._stopping.wait(0):
                try:
                    if self.settings.client_documents and self.documents.look_out():
                        return
                except Exception as error:  # it must go on: without it documents are never advertised
                    self.log.event("warning", "look_out_failed", error=type(error).__name__)
                self._stopping.wait(LOOK_OUT)

        threading.Thread(target=watch, daemon=True, name="look out").start()

    def stop(self, seconds: float = 10.0) -> None:
        """Answer what was read, with an error what takes longer; stop the children, close the store."""
        self._stopping.set()
        self.sessions.end_streams()
        for server in self.servers:
            server.drain()
        self.server.wait_for_connections(seconds - 1)
        self.sessions.close("broker stopping")
        for server in self.servers:
            server.close(1)
        self.capacity.wait_until_empty(self.settings.stop_timeout + 3)  # the reaper still ticks
        self.reaper.stop()
        self.guardian.close()
        for last in (self.upstream.settle, self.sessions.save_uses, self.brokers.leave):
            with contextlib.suppress(StoreUnavailable):
                last()
        self.store.close()


def is_page_request(request: Request) -> bool:
    """Returns whether a person's browser asks for a page.

    What is under /.well-known/ is for programs, whoever asks.
    """
    accepts_pages = any("text/html" in value for value in request.headers.get("accept", ()))
    return accepts_pages and request.method in ("GET", "HEAD") and "/.well-known/" not in request.path


def own_hosts(public_url: str, ports: Sequence[int]) -> set[str]:
    """Returns what a Host header may be: the public name, and loopback names with our ports.

    The public name's default port may be left out. A Unix socket has no port (0), and so none in a Host
    header.
    """
    parts = urlsplit(public_url)
    name = parts.hostname or ""
    if ":" in name:
        name = f"[{name}]"
    public = f"{name}:{parts.port or {'https': 443, 'http': 80}[parts.scheme]}"
    local = {
        f"{name}:{port}" if port else name for port in ports for name in ("localhost", "127.0.0.1", "[::1]")
    }
    return {parts.netloc, public, *local}


def git_blob_id(path: str) -> str:
    """Returns the id git gives the running file, so that an operator can tell which revision answers."""
    with open(path, "rb") as file:
        data = file.read()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


# ============================================================================================================
# Command line
# Owns the words of a command line: the table of commands, their
# flags, the help texts, which configuration file is read.
# Must not know what a command does.
# ============================================================================================================


@dataclass(frozen=True)
class Command:
    """A command: its help, the word it takes, and its own flags.

    `flags`: name -> (the word that follows it, "" for a switch; its help).
    """

    help: str
    flags: Mapping[str, tuple[str, str]] | None = None
    word: str = ""

    def own_flags(self) -> Mapping[str, tuple[str, str]]:
        """Returns its flags, none where it has none."""
        return self.flags or {}


LIST_FLAGS = {
    "json": ("", "a JSON list of objects instead of a table, with times in seconds since 1970"),
    "since": ("TIME", "only what was used since then: a date (2026-11-30), or how long ago (90m, 7d)"),
}
# fmt: off
COMMANDS = {
    "serve": Command("serve (the default command)"),
    "check": Command(
        "validate the configuration, then try it: store, key, Forgejo, forgejo-mcp, public URL", {
        "as": (
            "USER",
            "as root: with the rights of this user; without it, of the owner of the store or of its folder",
        ),
    }),
    "init": Command("write a commented configuration, asking for what it cannot know (flags answer for it)"),
    "doctor": Command(
        "do what real clients do at a public URL, short of logging in, and name what would break each",
        word="URL"
    ),
    "users": Command("list the users", LIST_FLAGS),
    "clients": Command("list the clients", LIST_FLAGS),
    "grants": Command("list the logins that are in force", LIST_FLAGS),
    "sessions": Command("list the sessions", LIST_FLAGS),
    "revoke": Command("end logins; in force in a running broker within a second", {
        "user": ("NAME", "the logins of a user, by the login at Forgejo"),
        "client": ("ID", "the logins through a client"),
        "grant": ("ID", "one login"),
        "all": ("", "every login"),
        "forget": ("", "with --client: remove the client's registration, too"),
    }),
    "rebind": Command(
        "the same Forgejo has another URL: it is asked for users known here, who must be the same", {
        "token": ("FILE", "ask with the token in it, where Forgejo shows users only to who is signed in"),
        "forget": ("", "it is another Forgejo: all logins end"),
    }),
    "backup": Command("write a consistent copy of the store, also while the broker runs", word="FILE"),
    "copy-store": Command(
        "copy the store into an empty database of PostgreSQL, while no broker runs; the file serves no more",
        word="URL",
    ),
    "rotate-key": Command("seal everything under a new key; may be interrupted and run again"),
}
# fmt: on
VALUED = {name for command in COMMANDS.values() for name, flag in command.own_flags().items() if flag[0]} | {
    "config"
}
SWITCHES = {name for command in COMMANDS.values() for name in command.own_flags()} - VALUED


def flag_of(name: str) -> str:
    """Returns a setting's flag."""
    return "--" + name.replace("_", "-")


def plain_settings() -> list[Setting]:
    """Returns the settings that have one value each, without the file's tables such as [[clients]]."""
    return [setting for setting in SETTINGS if setting.kind not in FILE_ONLY_KINDS]


def usage() -> str:
    """Returns the text of --help, made from the tables of commands and settings."""
    lines = [
        "usage: fjmcp-broker [--config FILE] [COMMAND] [--SETTING VALUE]...",
        "",
        "Lets people use their own Forgejo from MCP clients, as themselves.",
        "",
        "  --config FILE   TOML file with the settings; without it the one that FJMCP_BROKER_CONFIG names,",
        "                  else ./broker.toml (if it and its folder are yours and nobody else may write",
        f"                  there), else {SYSTEM_CONFIGURATION}",
        "  --version       print the version",
        "  --help          print this; COMMAND --help: what a command takes",
        "",
        "Commands:",
        *(f"  {name:12}  {command.help}" for name, command in COMMANDS.items()),
        "",
        "Settings, each also as a key of the file and as FJMCP_BROKER_<NAME> "
        "(flag > environment > file > default).",
        "A setting that is one piece of text can be read from a file with --<name>-file.",
        "",
    ]
    for setting in plain_settings():
        default = f" (default {setting.default})" if setting.default else ""
        if setting.default is REQUIRED:
            default = " (required)"
        lines.append(f"  {flag_of(setting.name)}\n        {setting.help}{default}")
    return "\n".join(lines)


def command_usage(name: str) -> str:
    """Returns the text of COMMAND --help."""
    command = COMMANDS[name]
    words = "".join(
        f" [--{flag} {value}]" if value else f" [--{flag}]"
        for flag, (value, _) in command.own_flags().items()
    )
    lines = [
        f"usage: fjmcp-broker [--config FILE] {name}{' ' + command.word if command.word else ''}{words}",
        "",
        command.help[0].upper() + command.help[1:] + ".",
        "",
        *(f"  {f'--{flag} {value}':16}{text}" for flag, (value, text) in command.own_flags().items()),
        "",
        "Every setting is a flag, too: fjmcp-broker --help lists them.",
        "Exit status: 0 done, 1 it failed or there was nothing to do, 2 wrong usage or configuration.",
    ]
    return "\n".join(lines)


@dataclass(frozen=True)
class Arguments:
    """A command line: the configuration file, the command with its word and flags, and settings as flags."""

    config: str | None
    command: str
    word: str
    options: dict[str, str]
    flags: dict[str, str]

    def settings(self) -> Settings:
        """Returns the settings, read now. Raises ConfigurationError."""
        return load_settings(self.flags, os.environ, self.config)


def parse_arguments(arguments: Sequence[str]) -> Arguments:
    """Returns the Arguments of a command line; flags stand before or after the command.

    Raises ConfigurationError.
    """
    problems: list[str] = []
    words, options, flags = split_flags(arguments, problems)
    name, *words = words or ["serve"]
    command = COMMANDS.get(name)
    if command is None:
        problems.append(f"unknown command {name!r}; known: {', '.join(COMMANDS)}")
    elif len(words) != bool(command.word):
        problems.append(f"{name} takes {f'one {command.word}' if command.word else 'no further words'}")
    config = options.pop("config", None) or find_configuration(os.environ, is_to_be_made=name == "init")
    if command:
        problems += [
            f"--{option} is not for {name}" for option in options if option not in command.own_flags()
        ]
    if problems:
        raise ConfigurationError(problems)
    return Arguments(config, name, "".join(words), options, flags)


def split_flags(
    arguments: Sequence[str], problems: list[str]
) -> tuple[list[str], dict[str, str], dict[str, str]]:
    """Returns the words, the command's flags and the settings of a command line.

    Adds what is wrong to `problems`.
    """
    words: list[str] = []
    options: dict[str, str] = {}
    flags: dict[str, str] = {}
    left = list(arguments)
    while left:
        argument = left.pop(0)
        if not argument.startswith("--"):
            words.append(argument)
            continue
        name, has_value, value = argument[2:].partition("=")
        key = name.replace("-", "_")
        setting, _ = KEYS.get(key, (None, False))
        is_switch = key in SWITCHES
        if setting and setting.kind == "switch":
            is_switch = left[:1] not in (["true"], ["false"])
        if not setting and key not in VALUED | SWITCHES:
            problems.append(f"unknown flag --{name}{did_you_mean(key, KEYS)}")
            continue
        if not has_value and not is_switch and not left:
            problems.append(f"--{name} needs a value")
            continue
        if not has_value:
            value = "true" if is_switch else left.pop(0)
        (flags if setting else options)[key] = value
    return words, options, flags


# ============================================================================================================
# Init
# Owns the first configuration file: the questions, the
# commented text, and the files that keep its secrets apart.
# Must not know whether what it writes works: `check` tries that.
# ============================================================================================================


def configuration_text(values: Mapping[str, str]) -> str:
    """Returns a broker.toml with these values; other settings are comments with their default and help."""
    lines = ["# fjmcp-broker. Each line that is commented out shows the default.", ""]
    for setting in plain_settings():
        keys = [key for key, (which, _) in KEYS.items() if which is setting and key in values]
        required = setting.default is REQUIRED
        default = json.dumps("" if required else setting.default)
        lines.append(f"# {setting.help}{' (required)' if required else ''}")
        lines += [f"{key} = {json.dumps(values[key])}" for key in keys] or [f"# {setting.name} = {default}"]
        lines.append("")
    lines += [
        "# Clients that are known beforehand:",
        "# [[clients]]",
        '# client_id = "my-client"',
        '# name = "My client"',
        '# redirect_uris = ["https://client.example.org/callback"]',
        '# client_secret = ""',
        "",
        "# Who may use which tool: the first rule that matches a caller decides; a caller that none matches",
        "# may use nothing. Without a rule everybody may use all that the login allows.",
        "# [[tool_rules]]",
        '# groups = ["example:staff"]',
        "# [[tool_rules]]",
        '# access = "read"',
        "",
    ]
    return "\n".join(lines)


def ask(setting: Setting, problems: list[str]) -> str:
    """Returns a required setting, asked on the terminal until it is valid.

    Without a terminal a missing one is a problem.
    """
    if not sys.stdin.isatty():
        problems.append(f"{setting.name} is missing: {setting.help}. Give it as {flag_of(setting.name)}")
        return ""
    from getpass import getpass  # here, as in did_you_mean()

    print(setting.help, file=sys.stderr)
    while True:
        prompt = f"{setting.name}: "
        text = getpass(prompt) if setting.secret else input(prompt)
        try:
            if KINDS[setting.kind](text):
                return text
        except ValueError as error:
            print(f"  {error}", file=sys.stderr)


def answers(arguments: Arguments, problems: list[str]) -> dict[str, str]:
    """Returns the values of the new file: the flags, and an answer for each required setting without one."""
    values = dict(arguments.flags)
    for setting in SETTINGS:
        if setting.default is REQUIRED and not {setting.name, setting.name + "_file"} & values.keys():
            values[setting.name] = ask(setting, problems)
    for name, value in values.items():
        try:
            if value and name in SETTING:
                KINDS[SETTING[name].kind](value)
        except ValueError as error:
            problems.append(f"flag: {name}: {error}")
    return values


def keep_secrets_apart(values: dict[str, str], folder: str, problems: list[str]) -> dict[str, str]:
    """Moves the client secret and a sealing key out of `values`; returns path -> text.

    A key is made if none is given. Both go into `secrets_file` if that is given, else each into a file of its
    own.
    """
    secret = "forgejo_oauth_client_secret"
    together = os.path.abspath(values["secrets_file"]) if "secrets_file" in values else None
    if together and secret + "_file" in values:
        try:
            values[secret] = decode_text(read_file(values.pop(secret + "_file"))).strip()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            problems.append(f"flag: {secret}_file: cannot read it: {reason}")
    if "key_file" not in values:
        values.setdefault("key", new_key().strip())
    files: dict[str, str] = {}
    for name, file in ((secret, "client-secret"), ("key", "sealing-key")):
        text = values.pop(name, None)
        if text and together:
            values["secrets_file"] = together
            files[together] = files.get(together, "") + f"{name} = {json.dumps(text)}\n"
        elif text:
            path = os.path.join(folder, file)
            values["key_file" if name == "key" else name + "_file"] = path
            files[path] = text + "\n"
    return files


def init(arguments: Arguments) -> int:
    """Writes broker.toml and the files of its secrets, never over a file that is there.

    Returns the exit status.
    """
    path = os.path.abspath(arguments.config or CONFIGURATION_FILE)
    folder = os.path.dirname(path)
    problems: list[str] = []
    values = answers(arguments, problems)
    files = keep_secrets_apart(values, folder, problems)
    problems += [
        f"{name} is there already; move it away first" for name in (path, *files) if os.path.exists(name)
    ]
    if problems:
        raise ConfigurationError(problems)
    if "store_path" not in values:
        values["store_path"] = os.path.join(folder, "data", "broker.db")
        os.makedirs(os.path.dirname(values["store_path"]), mode=0o700, exist_ok=True)
    for name, text in {**files, path: configuration_text(values)}.items():
        put_file(name, text)
    print(
        f"Wrote {path}. In Forgejo, the OAuth2 application (confidential) needs the redirect URI\n"
        f"  {values['public_url'].rstrip('/')}/oauth/callback\n"
        f"Next: {sys.argv[0]} --config {path} check"
    )
    return 0


# ============================================================================================================
# Doctor
# Owns the tables of what real clients send to a public URL and must get back, and how findings are told.
# Must not know this machine's configuration: it sees the URL as clients do.
# ============================================================================================================


class Finding(NamedTuple):
    """What a trial has shown: `level` is ok, warn or fail; `fix` says how to mend it."""

    level: str
    text: str
    fix: str = ""


def report(findings: Iterable[Finding]) -> collections.Counter[str]:
    """Prints findings as they come; returns how many there are of each level."""
    counts: collections.Counter[str] = collections.Counter()
    for level, text, fix in findings:
        counts[level] += 1
        print(f"{level:5} {text}" + (f"\n      -> {fix}" if fix else ""), flush=True)
    return counts


def guarded(findings: Iterable[Finding]) -> Iterator[Finding]:
    """Yields findings; an error that ends them becomes a finding of its own."""
    try:
        yield from findings
    except ConfigurationError as error:
        yield from (Finding("fail", problem) for problem in error.problems)
    except StoreUnavailable as error:
        yield Finding("fail", f"the store: {error.reason}")
    except OSError as error:
        yield Finding("fail", f"{error.filename}: {file_trouble(str(error.filename), error)}")
    except FetchFailed as error:
        fix = "its name, its certificate and port 443 must be good for everybody"
        yield Finding("fail", f"the URL does not answer: {error}", fix)


@dataclass(frozen=True)
class Probe:
    """A request of real clients: who needs it, `METHOD /path`, what must come back, how to mend it.

    `want` has the `status`, members of the JSON object (`json`) and headers in lower case. A value must be
    equal; of a list, each part must be in it; where the name begins with `!`, none may be.
    """

    needed_by: str
    request: str
    want: Mapping[str, Any]
    fix: str
    headers: Mapping[str, str] | None = None
    body: object = ""


LOOPBACK = "http%3A%2F%2Flocalhost%3A41999%2Fcallback"
WEB = ("https://claude.ai", "https://chatgpt.com", "http://localhost:6274")
USER_AGENTS = ("Claude-User", "openai-mcp/1.0.0", "python-httpx/0.28.1", "node", "Ruby", "")
PING = {"jsonrpc": "2.0", "id": 0, "method": "ping"}
PREFLIGHT = {
    "status": 204,
    "access-control-allow-headers": ["authorization", "content-type", "mcp-session-id"],
}
CONSENT = {
    "status": 200,
    "content-type": ["text/html"],
    "content-security-policy": ["frame-ancestors 'none'"],
    "!content-security-policy": ["form-action"],
}
PASS_ON = "let the proxy pass this on, with all headers, and its answer back"
UNCHANGED = "let the proxy leave answers alone; upgrade the broker"
BOTS = "exempt /mcp, /.well-known, /oauth, /register, /token from the proxy's bot rules"
CORS = "let the proxy pass OPTIONS on; add the origin to allowed_origins"
HINTS = {
    403: BOTS,
    413: "raise the proxy's limit for bodies",
    421: "let the proxy pass the Host header on unchanged",
    429: BOTS,
    **dict.fromkeys(
        (301, 302, 307, 308), "serve this path directly: clients do not repeat a POST, or drop its token"
    ),
    **dict.fromkeys(
        (500, 502, 503, 504), "start the broker, and give the proxy its address; look into both logs"
    ),
}


def discovery_probes(url: str) -> Iterator[Probe]:
    """Yields the first requests of clients (RFC 9728, RFC 8414), in the spellings that they use."""
    resource = {
        "resource": f"{url}/mcp",
        "authorization_servers": [url],
        "!scopes_supported": ["offline_access"],
    }
    server = {
        "issuer": url,
        "authorization_endpoint": f"{url}/oauth/authorize",
        "token_endpoint": f"{url}/oauth/token",
        "response_types_supported": ["code"],
        "registration_endpoint": f"{url}/oauth/register",
        "revocation_endpoint": f"{url}/oauth/revoke",
        "code_challenge_methods_supported": ["S256"],
        "grant_types_supported": ["authorization_code", "refresh_token"],
        "scopes_supported": ["offline_access"],
        "token_endpoint_auth_methods_supported": ["none", "client_secret_post", "client_secret_basic"],
        "authorization_response_iss_parameter_supported": True,
    }
    for who, path in (
        ("Claude, VS Code, Gemini CLI, Zed, SDKs", "/mcp"),
        ("clients given the URL with a slash", "/mcp/"),
        ("ChatGPT, Claude Code", ""),
    ):
        path = f"/.well-known/oauth-protected-resource{path}"
        yield Probe(who, f"GET {path}", {"status": 200, "json": resource}, PASS_ON)
    version = {"MCP-Protocol-Version": "2024-11-05"}
    for who, path in (
        ("every client", "/.well-known/oauth-authorization-server"),
        ("Claude.ai, Codex", "/.well-known/oauth-authorization-server/mcp"),
        ("Codex", "/mcp/.well-known/oauth-authorization-server"),
    ):
        yield Probe(who, f"GET {path}", {"status": 200, "json": server}, PASS_ON, version)
    for path in (
        "/.well-known/openid-configuration",
        "/.well-known/openid-configuration/mcp",
        "/mcp/.well-known/openid-configuration",
    ):
        yield Probe("Claude.ai, ChatGPT, SDKs", f"GET {path}", {"status": 404, "json": {}}, PASS_ON)


def endpoint_probes(url: str) -> Iterator[Probe]:
    """Yields requests of clients to /mcp without a token, and with an expired one."""
    challenge = {
        "status": 401,
        "!www-authenticate": ["error="],
        "www-authenticate": [
            "bearer ",
            f'resource_metadata="{url.lower()}/.well-known/oauth-protected-resource/mcp"',
            "scope=",
        ],
    }
    yield Probe("clients given the URL with a slash", "POST /mcp/", challenge, PASS_ON, body=PING)
    for method, who in (
        ("POST", "every client"),
        ("HEAD", "Gemini CLI, Claude.ai"),
        ("GET", "clients that open a stream first"),
        ("DELETE", "SDKs"),
    ):
        body = PING if method == "POST" else ""
        yield Probe(who, f"{method} /mcp", challenge, f"let the proxy pass {method} on", body=body)
    modern = {"MCP-Protocol-Version": "2026-07-28", "Mcp-Method": "server/discover"}
    yield Probe("clients of revision 2026-07-28", "POST /mcp", challenge, PASS_ON, modern, PING)
    for agent in USER_AGENTS:
        yield Probe("the client of that name", "POST /mcp", challenge, BOTS, {"User-Agent": agent}, PING)
    for origin in WEB:
        yield Probe("clients in a browser", "POST /mcp", challenge, CORS, {"Origin": origin}, PING)
    expired = {"status": 401, "www-authenticate": ['error="invalid_token"']}
    token = {"Authorization": "Bearer fja_expired"}
    yield Probe("every client whose token has expired", "POST /mcp", expired, PASS_ON, token, PING)


def browser_probes() -> Iterator[Probe]:
    """Yields the preflights of clients in a browser, and a request from an origin that is not allowed."""
    for origin in WEB:
        for path in ("/mcp", "/.well-known/oauth-protected-resource/mcp", "/oauth/register", "/oauth/token"):
            headers = {
                "Origin": origin,
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization, content-type, mcp-session-id",
            }
            yield Probe("clients in a browser", f"OPTIONS {path}", PREFLIGHT, CORS, headers)
    foreign = {"Origin": "https://attacker.example"}
    fix = "let the proxy pass Origin on; allowed_origins is for origins you trust"
    yield Probe("people who also visit other sites", "POST /mcp", {"status": 403}, fix, foreign, PING)


def refusal_probes() -> Iterator[Probe]:
    """Yields requests that must be refused, and how: clients go by the status and the answer's `error`."""
    script = {"status": 400, "json": {"error": "invalid_redirect_uri"}}
    body: object = {"redirect_uris": ["javascript:alert(1)"]}
    yield Probe("people: a script is no redirect URI", "POST /register", script, PASS_ON, body=body)
    page = {"status": 400, "content-type": ["text/html"], "location": None}
    unknown = "GET /authorize?client_id=nobody"
    yield Probe("people whose client was forgotten", unknown, page, PASS_ON)
    yield refresh_probe("clients that ignore metadata", "/token", "nobody", 401, "invalid_client")


def refresh_probe(who: str, path: str, client: str, status: int, error: str) -> Probe:
    """Returns the request of a client whose refresh token is unknown."""
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    want = {"status": status, "json": {"error": error}, "cache-control": ["no-store"]}
    body = f"grant_type=refresh_token&refresh_token=x&client_id={client}"
    return Probe(who, f"POST {path}", want, PASS_ON, form, body)


def registration_probe() -> Probe:
    """Returns the registration (RFC 7591) that the probes of a login need; the broker keeps nothing of it."""
    want = {
        "status": 201,
        "json": {**TRIAL_REGISTRATION, "client_secret": None},
        "cache-control": ["no-store"],
    }
    who = "Claude.ai, Cursor, VS Code: each its URI"
    return Probe(who, "POST /oauth/register", want, "see allowed_redirect_schemes", body=TRIAL_REGISTRATION)


def login_probes(url: str, client: str) -> Iterator[Probe]:
    """Yields authorization requests as clients spell them, up to the consent page, and a refresh."""
    authorize = (
        f"GET /oauth/authorize?response_type=code&client_id={client}&state=s&code_challenge_method=S256"
        f"&code_challenge={'A' * 43}&redirect_uri="
    )
    for who, uri in (
        ("Codex, Zed, Goose: a loopback port of the day", f"{LOOPBACK}&resource={url}/mcp"),
        ("clients without `resource`", LOOPBACK),
        (
            "Claude.ai, ChatGPT: unknown scopes, a slash",
            f"{LOOPBACK}&scope=claudeai+openid&prompt=consent&resource={url}/mcp/",
        ),
        ("Cursor", f"cursor%3A%2F%2Fanysphere.cursor-mcp%2Foauth%2Fcallback&resource={url}"),
        ("VS Code", "http%3A%2F%2F127.0.0.1%3A50001%2F"),
    ):
        yield Probe(who, authorize + uri, CONSENT, UNCHANGED)
    error = {
        "status": 303,
        "location": ["http://localhost:41999/callback?", "error=invalid_target", "iss="],
        "!location": ["code="],
    }
    foreign = f"{authorize}{LOOPBACK}&resource=https://attacker.example/mcp"
    yield Probe("clients that check `iss`, on errors too", foreign, error, UNCHANGED)
    yield refresh_probe("every client", "/oauth/token", client, 400, "invalid_grant")


def unlike(found: Mapping[str, Any], rules: Mapping[str, Any]) -> Iterator[str]:
    """Yields an object's differences from its rules, a few words for each broken rule."""
    for name, rule in rules.items():
        plain = name.removeprefix("!")
        value = found.get(plain)
        holds = [part in (value or ()) for part in rule] if isinstance(rule, list) else [value == rule]
        if name != plain and any(holds):
            yield f"{plain} is {value!r}"
        elif name == plain and not all(holds):
            yield f"{plain} is {value!r}, not {rule!r}"


def mistakes(answer: Fetched, want: Mapping[str, Any], origin: str | None) -> list[str]:
    """Returns an answer's mistakes, a few words each."""
    headers = {name: value.lower() for name, value in answer.headers.items()}
    document = answer.json() if "json" in want else {}
    if origin and want["status"] != 403 and headers.get("access-control-allow-origin") != "*":
        want = {**want, "access-control-allow-origin": [origin]}
    if answer.status != want["status"]:
        return [f"status is {answer.status}, not {want['status']}"]
    if document is None:
        return ["it is no JSON object, or not labelled as application/json"]
    empty = [f"{name} is {value!r}" for name, value in document.items() if value in (None, "")]
    return [
        *empty,
        *unlike(document, want.get("json", {})),
        *unlike(headers, {name: want[name] for name in want if name not in ("status", "json")}),
    ]


def tried(url: str, probe: Probe) -> tuple[Finding, Fetched]:
    """Returns what one probe shows, and the answer. Raises FetchFailed."""
    method, path = probe.request.split(" ")
    body = json.dumps(probe.body) if isinstance(probe.body, dict) else str(probe.body)
    own_headers = probe.headers or {}
    headers = {"Content-Type": "application/json", **own_headers}
    before = time.monotonic()
    answer = fetch(method, url + path, headers=tuple(headers.items()), body=body.encode())
    took = time.monotonic() - before
    wrong = "; ".join(mistakes(answer, probe.want, own_headers.get("Origin")))
    shown = f"{probe.request.partition('?')[0]} {own_headers or ''}".strip()
    if wrong:
        is_status = answer.status != probe.want["status"]
        fix = HINTS.get(answer.status, probe.fix) if is_status else probe.fix
        return Finding("fail", f"{shown}: {wrong}. Needed by {probe.needed_by}", fix), answer
    if took > 2:
        text = f"{shown}: took {took:.0f} s; Codex gives up after 5, Claude after 10"
        return Finding("warn", text, "look for what is slow between here and the broker"), answer
    return Finding("ok", f"{shown}: {probe.needed_by}"), answer


def examine(url: str, register: bool = True) -> Iterator[Finding]:
    """Yields what every probe shows; without `register`, those that need a client are left out.

    Raises FetchFailed.
    """
    for probe in (*discovery_probes(url), *endpoint_probes(url), *browser_probes(), *refusal_probes()):
        yield tried(url, probe)[0]
    if register:
        finding, answer = tried(url, registration_probe())
        yield finding
        client = member(answer.json(), "client_id", str, "")
        if answer.status == 201 and client:
            for probe in login_probes(url, client):
                yield tried(url, probe)[0]
    yield from check_plain_http(url)
    yield from check_streams(url)


def check_plain_http(url: str) -> Iterator[Finding]:
    """Yields a warning where an https URL is answered over http, too."""
    if url.startswith("https:"):
        with contextlib.suppress(FetchFailed):
            if "www-authenticate" in fetch("POST", url.replace("https:", "http:", 1) + "/mcp").headers:
                text = "POST /mcp: answered over http, too, where tokens travel in the clear"
                yield Finding("warn", text, "let the proxy redirect http to https")


def check_streams(url: str) -> Iterator[Finding]:
    """Yields a failure where a proxy buffers streams: a short one's first event came at its end."""
    moments: list[float] = []
    started = time.monotonic()
    accept = (("Accept", "text/event-stream"),)
    fetch(
        "GET",
        url + "/healthz",
        headers=accept,
        on_data=lambda: moments.append(time.monotonic() - started),
    )
    if not moments or moments[0] > 0.5 * (time.monotonic() - started):
        text = "GET /healthz: a proxy holds streams back until they end. Needed by every client"
        yield Finding("fail", text, "turn its buffering off (docs/install.md)")


def collapsed(findings: Iterable[Finding]) -> Iterator[Finding]:
    """Yields findings; failures of one remedy are told as one, if there are more than three of them."""
    failures: dict[str, list[Finding]] = {}
    for finding in findings:
        if finding.level == "fail":
            failures.setdefault(finding.fix, []).append(finding)
        else:
            yield finding
    for fix, alike in failures.items():
        if len(alike) <= 3:
            yield from alike
            continue
        statuses = sorted(
            {found[1] for each in alike if (found := re.search(r"status is ([0-9]+)", each.text))}
        )
        what = f"status {', '.join(statuses)}" if statuses else "another answer than they must get"
        yield Finding("fail", f"{len(alike)} requests get {what}, such as {alike[0].text}", fix)


def is_broker(url: str) -> Finding | None:
    """Returns why the answers at a URL are not fjmcp-broker's, None if they are, or nearly.

    Raises FetchFailed.
    """
    answer = fetch("GET", url + "/healthz")
    if member(answer.json(), "git", str, "") and member(answer.json(), "version", str, ""):
        return None
    metadata = fetch("GET", url + "/.well-known/oauth-protected-resource/mcp").json()
    if member(metadata, "resource", str, "") == url + "/mcp":
        return None
    fix = HINTS.get(
        answer.status, "give the proxy the broker's address (docs/install.md), or use the right URL"
    )
    return Finding("fail", f"what answers at {url} is not fjmcp-broker: {unexpected(answer)}", fix)


def examine_site(url: str, register: bool) -> Iterator[Finding]:
    """Yields what clients would meet at a URL; what follows from one cause is one finding.

    Raises FetchFailed.
    """
    stranger = is_broker(url)
    if stranger:
        yield stranger
    else:
        yield from collapsed(examine(url, register))


def check_reach(public: SplitResult) -> Iterator[Finding]:
    """Yields whether clients elsewhere can reach such a URL at all."""
    if public.port and not is_loopback_name(public.hostname):
        text = "public_url: it names a port; Claude.ai and others reach 443 only"
        yield Finding("warn", text, "let the proxy serve https on its usual port, and leave the port out")
    if public.scheme == "http":
        text = "public_url: http on loopback is for trying out; web clients cannot reach it"
        yield Finding("warn", text, "put a proxy with https in front")


def doctor(arguments: Arguments) -> int:
    """Does what real clients do at a public URL, short of logging in.

    Returns 1 when something would break, else 0.
    """
    try:
        url = str(KINDS["origin"](arguments.word.rstrip("/").removesuffix("/mcp")))
    except ValueError as error:
        raise ConfigurationError([f"{arguments.word} {error}"]) from None
    findings = itertools.chain(check_reach(urlsplit(url)), examine_site(url, register=True))
    return int(report(guarded(findings))["fail"] > 0)


# ============================================================================================================
# Check
# Owns the trial of everything that serving needs, with the rights of the user that serves.
# Must not change anything: what it starts it ends, what it opens it leaves as it was.
# ============================================================================================================

MACHINES = {
    3: "x86",
    40: "ARM",
    62: "x86-64",
    183: "ARM64",
    243: "RISC-V",
    21: "POWER",
    22: "S390",
}  # ELF's e_machine
# Networks in which http is nobody else's to read (RFC 1918, 4193, 6598; loopback and link-local).
PRIVATE = tuple(
    map(
        ipaddress.ip_network,
        "10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 ::1 "
        "fc00::/7 fe80::/10".split(),
    )
)


def check(arguments: Arguments) -> int:
    """Tries everything that serving needs and names each problem with its fix.

    Returns 1 when something fails, else 0.
    """
    named = arguments.options.get("as")
    if named and os.getuid() != 0 and named != user_name(os.getuid()):
        raise ConfigurationError(["--as is for root"])
    if named and named not in (user.pw_name for user in pwd.getpwall()):
        raise ConfigurationError([f"--as: there is no user {named!r}"])
    counts = report(guarded(check_all(arguments)))
    warned = f"{counts['warn']} warning{'' if counts['warn'] == 1 else 's'}"
    print(f"{counts['ok']} ok, {warned}, {counts['fail']} failed")
    return int(counts["fail"] > 0)


def check_all(arguments: Arguments) -> Iterator[Finding]:
    """Yields the findings of every part.

    Whoever is root acts as the user that serves from here on, for good.
    """
    settings = arguments.settings()
    server = serving_user(settings, arguments.options.get("as"))
    files = needed_files(settings, arguments.config)
    blob = git_blob_id(__file__)
    exposed = list(check_modes(settings, arguments.config, server.pw_uid))
    if server.pw_uid != os.getuid():
        become(server)
        yield Finding("ok", f"user: all of this is tried with the rights of {server.pw_name}")
    yield from exposed
    for part in (
        check_files(files, server),
        check_store(settings, server),
        check_people(settings),
        check_urls(settings),
        check_upstream(settings),
        check_containment(settings),
        check_documents(settings),
        check_public_url(settings, blob),
    ):
        yield from guarded(part)


# -- with whose rights


def user_name(uid: int) -> str:
    """Returns a user's name, or the number where it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def serving_user(settings: Settings, named: str | None) -> pwd.struct_passwd:
    """Returns the user that serves.

    That is the caller; for root the one named, else the owner of the store (of the key, where the store is no
    file) or of its folder.
    """
    uid, gid = os.getuid(), os.getgid()
    if named:
        return pwd.getpwnam(named)
    path = os.path.abspath(key_path(settings) if settings.store_url else settings.store_path)
    for place in (path, os.path.dirname(path)):
        if uid == 0 and os.path.exists(place):
            uid = os.stat(place).st_uid
            gid = os.stat(place).st_gid
            break
    try:
        return pwd.getpwuid(uid)
    except KeyError:
        return pwd.struct_passwd((str(uid), "", uid, gid, "", "/", ""))


def become(user: pwd.struct_passwd) -> None:
    """Takes on a user's rights, for good: a program that is tried must not find root's."""
    "name".encode(
        "idna"
    )  # what Python loads late must be loaded before: it may stand where that user cannot read
    try:
        groups = os.getgrouplist(user.pw_name, user.pw_gid)
    except OSError:
        groups = [user.pw_gid]
    os.setgroups(groups)
    os.setgid(user.pw_gid)
    os.setuid(user.pw_uid)


# -- files


def needed_files(settings: Settings, config: str | None) -> list[tuple[str, str]]:
    """Returns (setting, path) of the files that the user that serves reads by itself.

    `secrets_file` is not among them: the service manager opens it, as root.
    """
    found = [("the program", os.path.abspath(__file__))]
    found += [("the configuration", config)] if config else []
    found += [(name + "_file", path) for name, path in value_files(settings)]
    if not settings.key and os.path.exists(key_path(settings)):
        found.append(("key_file", key_path(settings)))
    found += [("forgejo_ca_file", settings.forgejo_ca_file)] if settings.forgejo_ca_file else []
    return found


def value_files(settings: Settings) -> list[tuple[str, str]]:
    """Returns (setting, path) of the values that were read from a file of their own (X_file)."""
    return [
        (name, source.partition(", ")[2])
        for name, source in settings.sources.items()
        if ", " in source and os.path.exists(source.partition(", ")[2])
    ]


def secret_files(settings: Settings, config: str | None) -> dict[str, str]:
    """Returns path -> what it is, of each file that holds a secret."""
    secrets_in = {settings.sources.get(name, "") for name in SETTING if SETTING[name].secret}
    found = {}
    has_client_secret = any(client.client_secret for client in settings.clients)
    if config and (has_client_secret or f"file {config}" in secrets_in):
        found[config] = "the configuration"
    if settings.secrets_file:
        found[settings.secrets_file] = "secrets_file"
    found |= {path: name + "_file" for name, path in value_files(settings) if SETTING[name].secret}
    if not settings.key:
        found[key_path(settings)] = "key_file"
    if not settings.store_url:
        found |= {settings.store_path + end: "store_path" for end in ("", "-wal", "-shm")}
        found[os.path.dirname(os.path.abspath(settings.store_path))] = "store_path"
    return found


def check_modes(settings: Settings, config: str | None, server: int) -> Iterator[Finding]:
    """Yields a warning for each file with a secret that other users may read.

    A group may where it is how the server reads it.
    """
    for path, what in secret_files(settings, config).items():
        try:
            found = os.stat(path)
        except OSError:
            continue
        is_folder = stat.S_ISDIR(found.st_mode)
        if is_folder and path in (settings.store_path, settings.secrets_file, key_path(settings)):
            continue  # a file is meant: what tries to read it says so
        if not is_folder and not stat.S_ISREG(found.st_mode):
            continue
        is_for_group = found.st_uid != server and not is_folder and what != "secrets_file"
        others = 0o007 if is_for_group else 0o077
        if found.st_mode & (others | 0o020):
            fix = f"chmod {'600' if others == 0o077 else '640'} {path}"
            if is_folder:
                fix = f"chmod 700 {path} if it is the store's alone, else give the store a folder of its own"
            yield Finding("warn", f"{what}: {path} is open to other users", fix)


def obstacle(path: str, rights: int) -> str:
    """Returns what keeps this process from a file, "" if nothing does.

    `rights` are as for access(2).
    """
    path = os.path.abspath(path)
    parts = path.split("/")
    for number in range(2, len(parts)):
        folder = "/".join(parts[:number])
        if os.path.isdir(folder) and not os.access(folder, os.X_OK):
            return f"it may not enter {folder}"
    if not os.path.exists(path):
        return "it is not there"
    if not os.access(path, rights):
        found = os.stat(path)
        return f"it belongs to {user_name(found.st_uid)} and has mode {stat.S_IMODE(found.st_mode):04o}"
    return ""


def check_files(files: Sequence[tuple[str, str]], server: pwd.struct_passwd) -> Iterator[Finding]:
    """Yields a failure for each file that the user that serves cannot read."""
    for what, path in files:
        reason = obstacle(path, os.R_OK)
        if reason:
            fix = f"let it: chown {server.pw_name} {path}, or chmod it and its folders"
            if not os.path.exists(path):
                fix = "put the file there, or give its right path"
            yield Finding("fail", f"{what}: {server.pw_name} cannot read {path}: {reason}", fix)


def check_store(settings: Settings, server: pwd.struct_passwd) -> Iterator[Finding]:
    """Yields findings about the store, its folder, and the sealing key."""
    if settings.store_url:
        yield from check_database(settings)
        return
    path = os.path.abspath(settings.store_path)
    key = os.path.abspath(key_path(settings))
    folder = os.path.dirname(path)
    refuse_no_database(path)
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        text = f"store_path: {folder} is not a folder this user can write to ({obstacle(folder, os.W_OK)})"
        owner = "" if server.pw_uid == 0 else f" -o {server.pw_name}"
        yield Finding("fail", text, f"make it, for the user that serves: install -d -m 700{owner} {folder}")
        return
    if not settings.key and os.path.dirname(key) == folder:
        text = f"key_file: {key} lies beside the store: who copies one has both"
        yield Finding("warn", text, "keep the key elsewhere, and out of the backup of the store")
    if not settings.key and os.path.exists(key) and not os.access(key, os.R_OK):
        return  # check_files has said so
    if not os.path.exists(path):
        if settings.key or os.path.exists(key):
            load_keyring(settings)
        text = f"store_path: {path} will be made at the first start, and so will the key if there is none"
        yield Finding("ok", text)
        return
    shut = [
        each for each in (path, path + "-wal", path + "-shm") if os.path.exists(each) and obstacle(each, 6)
    ]
    for each in shut:
        text = f"store_path: {server.pw_name} cannot write {each}: {obstacle(each, os.R_OK | os.W_OK)}"
        yield Finding("fail", text, f"chown {server.pw_name} {each}; chmod 600 {each}")
    if not shut:
        yield from check_opened_store(settings, path)


CLOCKS_AGREE = 5.0  # seconds: by more the log's times and the database's are not easily put together


def check_database(settings: Settings) -> Iterator[Finding]:
    """Yields what is to say of the database of several brokers: version, rights, what it keeps, its clock."""
    server = PostgresServer(settings.store_url, settings.store_password)
    with contextlib.closing(PostgresEngine(server)) as engine:
        facts = engine.facts()
        apart = abs(facts.now - time.time())
    yield Finding("ok", f"store_url: {server.name} answers: PostgreSQL {facts.version}")
    if not facts.has_tables and not facts.may_make_tables:
        text = "store_url: the user may not make tables there"
        yield Finding("fail", text, "make the database the user's own: createdb --owner USER DATABASE")
    elif not facts.has_tables:
        yield Finding("ok", "store_url: the tables will be made at the first start")
    is_synchronous = facts.synchronous_commit in ("on", "remote_apply")
    if facts.synchronous_commit == "off" or facts.fsync == "off":
        text = "store_url: what the server has answered it may forget (synchronous_commit or fsync is off)"
        yield Finding(
            "fail", text, "ALTER DATABASE … SET synchronous_commit = on; fsync = on in postgresql.conf"
        )
    elif len(server.hosts) > 1 and not (is_synchronous and facts.synchronous_standbys):
        text = "store_url: of several hosts the next one may lack what this one has answered"
        fix = (
            "replicate synchronously: synchronous_standby_names must name a standby, synchronous_commit be on"
        )
        yield Finding("fail", text, fix)
    if apart > CLOCKS_AGREE:
        text = (
            f"store_url: the database's clock, by which brokers go, and this server's are {apart:.0f} s apart"
        )
        yield Finding("warn", text, "let NTP set both")
    if facts.has_tables:
        yield from check_opened_store(settings, server)


def check_opened_store(settings: Settings, place: Place) -> Iterator[Finding]:
    """Yields whether the key opens the store, its Forgejo's URL, and which older keys are still needed."""
    keyring = load_keyring(settings)
    with contextlib.closing(Store(place, keyring, alone=False)) as store:
        older = sum(not keyring.is_newest(box) for _, _, box in store.boxes())
        where = f"{store.engine.setting}: {store.engine.name}"
        text = f"{where} opens with this key; sessions on file: {store.count_sessions()}"
        yield Finding("ok", text)
        if copied_to := store.copied_to():
            yield Finding("fail", moved(settings, copied_to))
        yield from check_brokers(store, keyring)
        known = store.forgejo_url()
        if known not in (None, settings.forgejo_url) and store.known_people(1):
            text = other_forgejo(str(known), settings.forgejo_url)
            yield Finding("fail", text, "run rebind, or set forgejo_url back")
    if older:
        text = f"key_file: {older} credentials are still sealed with older keys"
        yield Finding("warn", text, "run rotate-key, which goes on where it was")
    elif len(keyring.keys) > 1:
        count = len(keyring.keys)
        text = (
            f"key_file: every credential is sealed with the newest of {count} keys; "
            "the others can be taken out"
        )
        yield Finding("ok", text)


def check_brokers(store: Store, keyring: Keyring) -> Iterator[Finding]:
    """Yields which brokers serve from a store that several share, and which of them have other keys."""
    if not store.is_shared:
        return
    now = store.clock().now()
    brokers = store.brokers(now - Brokers.FORGOTTEN)
    seen = [f"{each.label} ({each.version}, seen {max(0, now - each.seen_at):.0f} s ago)" for each in brokers]
    yield Finding("ok", "brokers of this store: " + (", ".join(seen) or "none serves at present"))
    unaware = [each.label for each in brokers if keyring.ids[0] not in each.key_ids.split()]
    if unaware:
        text = f"key_file: the newest key here is not known to the brokers {', '.join(unaware)}"
        yield Finding("warn", text, "put the same keys into key_file (or `key`) of every broker")


# -- settings that are valid and still do not what is meant


def check_people(settings: Settings) -> Iterator[Finding]:
    """Yields settings of people and lifetimes that cannot be meant so."""
    scopes = set(settings.forgejo_oauth_scopes.split())
    if settings.allowed_groups and not scopes & {"read:organization", "read:admin", "all"}:
        text = (
            "allowed_groups: where Forgejo's [oauth2] ENABLE_ADDITIONAL_GRANT_SCOPES is true, "
            "it hides private memberships from a login without the scope read:organization, "
            "and so refuses those people (write:organization and groups do not help)"
        )
        fix = (
            "add read:organization to forgejo_oauth_scopes; who logged in before removes the application in"
            " Forgejo's settings and connects again"
        )
        yield Finding("warn", text, fix)
    if settings.access_token_lifetime < 600:
        text = (
            f"access_token_lifetime: {settings.access_token_lifetime:g} s is short: some clients refresh "
            "only when asked to log in again, or refuse tokens that live for less than 10 minutes"
        )
        yield Finding("warn", text, "set it to 10m or more; revocation is at once, whatever it is")


def check_listen(settings: Settings) -> Iterator[Finding]:
    """Yields why nothing can listen on the address of `listen`, unless a broker does already."""
    host, port = settings.listen
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
            return
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
    with contextlib.suppress(FetchFailed):
        name = f"[{host}]" if ":" in host else host
        answer = fetch("GET", f"http://{name}:{port}/healthz", deadline=5.0).json()
        if member(answer, "git", str, ""):
            return
    text = f"listen: {host}:{port} cannot be had: {reason}"
    fix = "give another, or end what listens there; under the units that is systemd, and `listen` is not used"
    yield Finding("warn", text, fix)


def check_urls(settings: Settings) -> Iterator[Finding]:
    """Yields findings about the addresses that need no request."""
    check_configured_clients(settings)
    yield from check_reach(urlsplit(settings.public_url))
    yield from check_listen(settings)
    if settings.forgejo_ca_file and os.access(settings.forgejo_ca_file, os.R_OK):
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(settings.forgejo_ca_file)
        except (ssl.SSLError, OSError):
            text = f"forgejo_ca_file: {settings.forgejo_ca_file} is no file of certificates in PEM"
            yield Finding(
                "fail", text, "give the authority's certificate; it begins with -----BEGIN CERTIFICATE-----"
            )
    internal = urlsplit(settings.forgejo_internal_url)
    if internal.scheme != "http" or internal.hostname is None:
        return
    with contextlib.suppress(OSError, ValueError):
        for *_, address in socket.getaddrinfo(internal.hostname, None):
            found = ipaddress.ip_address(str(address[0]).partition("%")[0])
            if not any(found in network for network in PRIVATE):
                text = (
                    f"forgejo_internal_url: http to {found}, which is not private: "
                    "tokens would travel in the clear"
                )
                yield Finding("warn", text, "use https")
                return


# -- Forgejo and forgejo-mcp: what serving needs of others


def check_upstream(settings: Settings) -> Iterator[Finding]:
    """Yields whether Forgejo and forgejo-mcp do what serving needs; tried again after each start."""
    away = False
    for finding in guarded(check_forgejo(settings)):
        away = away or finding.level == "fail" and finding.text.startswith("forgejo_url:")
        yield finding
    base = settings.forgejo_internal_url or settings.forgejo_url
    for finding in guarded(check_child(settings)):
        # A child that ends because Forgejo is not there has nothing to add to that.
        if not (away and finding.level == "fail" and urlsplit(base).netloc in finding.text):
            yield finding


def check_forgejo(settings: Settings) -> Iterator[Finding]:
    """Yields whether Forgejo answers, has our time, and knows this application and its redirect URI."""
    base = settings.forgejo_internal_url or settings.forgejo_url
    try:
        answer = fetch("GET", base + "/.well-known/openid-configuration", ca_file=settings.forgejo_ca_file)
        version = fetch("GET", base + "/api/v1/version", ca_file=settings.forgejo_ca_file)
    except FetchFailed as error:
        fix = "check the address, DNS, firewall and certificate (forgejo_ca_file)"
        if "speaks no TLS" in str(error):
            fix = "what listens there may speak http: give the right port, or http as forgejo_internal_url"
        yield Finding("fail", f"forgejo_url: {base} does not answer: {error}", fix)
        return
    number = member(version.json(), "version", str, "unknown")
    is_shut = any(each.status in (401, 403) or is_login_page(each) for each in (answer, version))
    document = answer.json() if answer.status == 200 else None
    if document is None and not is_shut:
        text = f"forgejo_url: {base} is not Forgejo: it answers {unexpected(answer)}"
        yield Finding("fail", text, "give the address under which Forgejo itself is")
        return
    shut = ", and answers only who is signed in" if is_shut else f", version {number}"
    yield Finding("ok", f"forgejo_url: {base} answers{shut}")
    if re.match(r"[0-8]\.", number):
        text = "forgejo_url: this Forgejo knows no scopes of OAuth2 tokens: each has all of its user's power"
        yield Finding("warn", text, "upgrade Forgejo to 9 or newer")
    authorize = member(document, "authorization_endpoint", str, "")
    if document is not None and authorize != settings.forgejo_url + "/login/oauth/authorize":
        text = f"forgejo_url: Forgejo calls itself {member(document, 'issuer', str, 'nothing')}"
        yield Finding("warn", text, "set forgejo_url to that, or ROOT_URL in Forgejo to the other")
    with contextlib.suppress(ValueError, TypeError, KeyError):
        skew = email.utils.parsedate_to_datetime(answer.headers["date"]).timestamp() - time.time()
        if abs(skew) > 60:
            text = f"the clocks of Forgejo and of this machine differ by {abs(skew):.0f} s"
            yield Finding("fail", text, "set both by NTP")
    yield from check_application(settings)


def is_login_page(answer: Fetched) -> bool:
    """Returns whether an answer only leads to Forgejo's login."""
    return 300 <= answer.status < 400 and "/user/login" in answer.headers.get("location", "")


def check_application(settings: Settings) -> Iterator[Finding]:
    """Yields whether Forgejo knows the application, its secret and its redirect URI.

    A code that cannot be good is refused for the first thing that
    is wrong, in Forgejo's order: id, secret, redirect URI, code.
    """
    forgejo = Forgejo(settings, SteadyClock(Clock()))
    try:
        forgejo.exchange("check", "check")
    except UpstreamMisconfigured as error:
        which = "secret" if "secret" in str(error) else "id"
        text = f"forgejo_oauth_client_{which}: Forgejo refuses it: {error}"
        yield Finding("fail", text, "copy it again from the application in Forgejo")
    except UpstreamRefused as error:
        if "redirect" in str(error).lower():
            text = "the application in Forgejo has another redirect URI"
            yield Finding("fail", text, f"set it to {settings.public_url}/oauth/callback")
        else:
            yield check_secret(forgejo)
    except UpstreamDown as error:
        fix = "look into Forgejo's log, and at proxies between"
        yield Finding("fail", f"Forgejo's token endpoint does not work: {error}", fix)


def check_secret(forgejo: Forgejo) -> Finding:
    """Returns whether Forgejo accepts the secret at a place that always checks it.

    A public application logs in with any secret.
    """
    try:
        forgejo.introspect("check")
    except UpstreamMisconfigured:
        text = (
            "forgejo_oauth_client_secret: the application in Forgejo is public, so that logins work with "
            "any secret; where Forgejo looks at it (introspection), it refuses this one"
        )
        return Finding("fail", text, "make the application confidential, and copy its secret again")
    except UpstreamDown:
        pass  # it may be switched off, and no login depends on it
    return Finding("ok", "Forgejo knows the application, its secret and its redirect URI")


def check_child(settings: Settings) -> Iterator[Finding]:
    """Yields whether forgejo-mcp exists, is new enough, starts, and answers an anonymous user."""
    name = program_name(settings)
    reason = unusable_program(name)
    if reason:
        fix = "install forgejo-mcp for this machine, where that user may run it, and give its path"
        yield Finding("fail", f"forgejo_mcp_binary: {user_name(os.geteuid())} cannot run it: {reason}", fix)
        yield from check_rules(settings, ())
        return
    try:
        command = child_command(settings)
        shown = program_version(settings, command)
        number = re.search(r"(?<![0-9])([0-9]{1,9})\.[0-9]", shown)
        if number and int(number[1]) < 2:
            text = f"forgejo_mcp_binary: {shown} is too old"
            yield Finding("fail", text, "install forgejo-mcp 2.34.1 or newer")
        outcome = try_child(settings, command, "")
        if not outcome.server and not outcome.wants_login:
            other = try_child(settings, command, "a-token-that-is-none")
            outcome = other if other.server or other.wants_login else outcome
    except (ChildMissing, ChildFailed, OSError) as error:
        fix = "install forgejo-mcp for this machine, and give its path"
        yield Finding("fail", f"forgejo_mcp_binary: {error}", fix)
        return
    yield told(command[0], outcome)
    yield from check_rules(settings, outcome.tools)


def check_rules(settings: Settings, tools: Collection[str]) -> Iterator[Finding]:
    """Yields what is doubtful in the tool rules, before these tools."""
    for sentence in rule_warnings(settings.tool_rules, tools):
        yield Finding("warn", sentence, 'see "Who may use which tool" in operate.md')


def told(path: str, outcome: ChildOutcome) -> Finding:
    """Returns the finding about a program's trial."""
    if outcome.server:
        who = f"{outcome.server.get('name')} {outcome.server.get('version')}"
        return Finding("ok", f"forgejo_mcp_binary: {path} starts and answers as {who}")
    said = "".join(f"\n      | {line}" for line in outcome.last_words)
    if outcome.wants_login:
        text = f"forgejo_mcp_binary: {path} starts, and wants a user's login, which no trial has{said}"
        return Finding("ok", text)
    fix = "run it by hand with FORGEJO_URL set"
    return Finding("fail", f"forgejo_mcp_binary: {path} does not answer ({outcome.reason}){said}", fix)


def program_name(settings: Settings) -> str:
    """Returns the program that children run, as configured."""
    command = settings.forgejo_mcp_binary
    return command if isinstance(command, str) else str(command[0])


def unusable_program(name: str) -> str:
    """Returns why this process cannot run a program, "" if nothing speaks against it."""
    path = find_program(name)
    if path is None and name.startswith("~"):
        return f"{name} begins with ~, which only shells expand: write the whole path"
    if path is None and " " in name and find_program(name.split()[0]):
        return f"{name} is a program with arguments: write them as a list, {json.dumps(name.split())}"
    if path is None and "/" not in name:
        return f"{name} is in no folder of PATH ({os.environ.get('PATH', '')})"
    if path is None:
        reason = obstacle(name, os.X_OK)
        if os.path.isdir(name):
            reason = "it is a folder"
        elif os.path.exists(name) and os.access(os.path.dirname(os.path.abspath(name)), os.X_OK):
            reason = f"it is no executable program for this user ({reason}; chmod 755 {name})"
        return f"{name} is not an executable program: {reason}"
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
    except OSError:
        return ""  # it may be run and not be read, as it should be
    return foreign_program(path, head)


def foreign_program(path: str, head: bytes) -> str:
    """Returns why the kernel will not run a program that begins like this, "" if it will."""
    if head.startswith(b"#!"):
        line = head[2:].partition(b"\n")[0].decode(errors="replace")
        interpreter = re.split(r"[ \t]", line.strip(" \t"))[0]
        if not os.path.exists(interpreter):
            ends = "; its lines end as on Windows (CR LF)" if line.endswith("\r") else ""
            return f"{path} is a script for {interpreter!r}, which is not here{ends}"
        if not os.access(interpreter, os.X_OK):
            return f"{path} is a script for {interpreter!r}, which is not executable"
        return ""
    if head.startswith(b"\x7fELF") and len(head) >= 64:
        return foreign_elf(path, head)
    kinds = {b"MZ": "Windows", b"\xcf\xfa\xed\xfe": "macOS", b"\xca\xfe\xba\xbe": "macOS"}
    system = next((name for magic, name in kinds.items() if head.startswith(magic)), "")
    if system:
        return f"{path} is a program for {system}"
    archives = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
    archive = next((name for magic, name in archives.items() if head.startswith(magic)), "")
    if archive:
        return f"{path} is an archive ({archive}) and has to be unpacked"
    return f"{path} is {'no program: it begins with ' + repr(head[:20]) if head else 'an empty file'}"


def foreign_elf(path: str, head: bytes) -> str:
    """Returns why this machine cannot run an ELF file, "" if it can: its architecture or loader.

    elf(5), PT_INTERP.
    """
    with open("/proc/self/exe", "rb") as file:
        own = file.read(64)
    order: Literal["little", "big"] = "little" if head[5] == 1 else "big"
    machine = int.from_bytes(head[18:20], order)
    known = int.from_bytes(own[18:20], "little" if own[5] == 1 else "big")
    if machine != known and (machine, known) != (3, 62):
        theirs = MACHINES.get(machine, f"machine {machine}")
        return f"{path} is built for {theirs}, and this machine is {MACHINES.get(known, os.uname().machine)}"
    if head[4] != 2:
        return ""
    start = int.from_bytes(head[32:40], order)
    size = int.from_bytes(head[54:56], order)
    for number in range(int.from_bytes(head[56:58], order)):
        entry = head[start + number * size :][:size]
        if len(entry) >= 56 and int.from_bytes(entry[:4], order) == 3:
            offset = int.from_bytes(entry[8:16], order)
            loader = head[offset : offset + 256].partition(b"\0")[0].decode(errors="replace")
            if loader and not os.path.exists(loader):
                return f"{path} needs the loader {loader}, which is not here: it is built for another Linux"
    return ""


def program_version(settings: Settings, command: list[str]) -> str:
    """Returns what the program says to --version, "" where it is a list, which is run as it is."""
    if not isinstance(settings.forgejo_mcp_binary, str):
        return ""
    with contextlib.suppress(subprocess.TimeoutExpired):
        done = subprocess.run(
            [command[0], "--version"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=20,
            stdin=subprocess.DEVNULL,
        )
        return done.stdout.strip()[:200]
    return ""


@dataclass(frozen=True)
class ChildOutcome:
    """How the trial of a child ended: what it says of itself, or its last words and the reason of its end."""

    server: dict[str, object]
    last_words: list[str]
    reason: str
    refusal: str
    tools: frozenset[str]

    @property
    def wants_login(self) -> bool:
        """Returns whether it ended, or refused, because an anonymous caller gets no answer."""
        return bool(NEEDS_LOGIN.search("\n".join([*self.last_words, self.refusal])))


NEEDS_LOGIN = re.compile(
    r"\b(?:401|403|unauthori[sz]ed|unauthenticated|forbidden|anonymous|sign(?:ed)?[- ]?in|log(?:ged)?[- ]?in"
    r"|authenticat\w*|authori[sz]ation|credentials?|(?:access|api|missing|invalid|no)[ _-]tokens?"
    r"|tokens? (?:is |are |was )?(?:required|missing|needed|invalid|not set|empty|does not))\b"
    r"|FORGEJO_ACCESS_TOKEN",
    re.IGNORECASE | re.ASCII,
)


def try_child(settings: Settings, command: list[str], token: str) -> ChildOutcome:
    """Starts a child as a session does, asks who it is, and ends it. Raises ChildMissing or ChildFailed."""
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    with contextlib.closing(Guardian()) as guardian:
        log = Log(settings, io.StringIO())
        environment = child_environment(settings, token)
        tools: frozenset[str] = frozenset()
        child = Child(
            command, environment, "check", guardian, settings, log, lines.put, lambda _: lines.put(b"")
        )
        try:
            server, refusal = introduced(child, lines, settings.start_timeout)
            if server and settings.tool_rules:
                tools = listed_tools(child, lines, settings.start_timeout)
        finally:
            child.stop("checked")
            child.ended.wait(1)
            child.kill("checked")
            child.ended.wait(settings.stop_timeout)
    return ChildOutcome(server, list(child.last_words), str(child.reason), refusal, tools)


def introduced(
    child: Child, lines: queue.SimpleQueue[bytes], seconds: float
) -> tuple[dict[str, object], str]:
    """Returns a child's description of itself, in either era, and an error's message; {} if it is late."""
    end = time.monotonic() + seconds
    us = {"name": "fjmcp-broker", "version": __version__}
    meta = {META_VERSION: FIRST_MODERN_VERSION, META_CLIENT: us, META_CAPABILITIES: {}}
    refusal = ""
    for method, params in (
        ("initialize", {"protocolVersion": LEGACY_VERSIONS[0], "capabilities": {}, "clientInfo": us}),
        ("server/discover", {"_meta": meta}),  # what refuses the handshake may speak the era that has none
    ):
        child.send(dump(asking(method, params, jsonrpc="2.0", id=method)))
        answer = next_answer(lines, end)
        result = member(answer, "result", dict, {})
        server = member(result, "serverInfo", dict, None)
        server = server or member(member(result, "_meta", dict, {}), META_SERVER, dict, None)
        refusal = refusal or member(member(answer, "error", dict, {}), "message", str, "")
        if server or child.ended.is_set():
            return server or {}, refusal
    return {}, refusal


def listed_tools(child: Child, lines: queue.SimpleQueue[bytes], seconds: float) -> frozenset[str]:
    """Returns the names of a child's tools, in either era, over all pages that arrive in time."""
    end = time.monotonic() + seconds
    us = {"name": "fjmcp-broker", "version": __version__}
    meta = {META_VERSION: FIRST_MODERN_VERSION, META_CLIENT: us, META_CAPABILITIES: {}}
    child.send(dump(asking("notifications/initialized", None, jsonrpc="2.0")))
    names: set[str] = set()
    cursor = ""
    for _ in range(MAX_TOOL_PAGES):
        params = {"_meta": meta, **({"cursor": cursor} if cursor else {})}
        child.send(dump(asking("tools/list", params, jsonrpc="2.0", id="tools/list")))
        result = member(next_answer(lines, end), "result", dict, {})
        names |= {member(tool, "name", str, "") for tool in member(result, "tools", list, [])}
        cursor = member(result, "nextCursor", str, "")
        if not cursor:
            break
    return frozenset(names - {""})


def next_answer(lines: queue.SimpleQueue[bytes], end: float) -> object:
    """Returns a child's next message that is neither request nor notification, None after `end`."""
    answer: object = {"method": ""}
    while member(answer, "method", str, None) is not None:  # it may say something before it answers
        try:
            line = lines.get(timeout=max(0.0, end - time.monotonic()))
            answer = read_child_json(line.removeprefix(BYTE_ORDER_MARK)) if line else None
        except (queue.Empty, ValueError):
            return None
        answer = answer[0] if isinstance(answer, list) and answer else answer
    return answer


def check_containment(settings: Settings) -> Iterator[Finding]:
    """Yields whether a child, run as this user, can read the broker's memory or other children's tokens."""
    try:
        path = os.path.realpath(child_command(settings)[0])
        binary = os.stat(path)
    except (ChildMissing, OSError):
        return  # check_child has said so
    if os.access(path, os.R_OK) or binary.st_uid == os.geteuid():
        text = (
            f"containment: {path} can be read by the user that serves, "
            "so the children of one user can read the tokens of others"
        )
        fix = (
            f"serve as a user of its own, not root; chown root:root {path}; chmod 0711 {path}"
            " (a script cannot be protected so)"
        )
        yield Finding("warn", text, fix)
    else:
        yield Finding("ok", f"containment: children of {path} cannot read each other's tokens")
    if hide_from_children():
        text = (
            "containment: children cannot read the broker's memory and environment "
            "(PR_SET_DUMPABLE is 0 when serving)"
        )
        yield Finding("ok", text)
    else:
        text = "containment: the broker cannot make itself unreadable (PR_SET_DUMPABLE)"
        yield Finding("warn", text, "serve on Linux with /proc, outside of emulators")


def hide_from_children() -> bool:
    """Makes /proc/<our pid> unreadable for processes of this user, children above all.

    Returns whether it is (prctl(2), PR_SET_DUMPABLE).
    """
    with contextlib.suppress(OSError, AttributeError):
        prctl = ctypes.CDLL(None).prctl
        return bool(prctl(4, 0, 0, 0, 0) == 0 and prctl(3, 0, 0, 0, 0) == 0)
    return False


# -- from outside


def check_documents(settings: Settings) -> Iterator[Finding]:
    """Yields whether clients' metadata documents (CIMD) can be read from here."""
    if not settings.client_documents:
        return
    reasons = unreadable_documents(PublicWeb(), settings.allowed_redirect_schemes)
    if not reasons:
        text = "client_documents: the descriptions that applications publish can be read from here"
        yield Finding("ok", text)
        return
    text = (
        "client_documents: none of three well-known ones can be read from here, so applications are told to"
        f" register instead. {'; '.join(reasons)}"
    )
    fix = (
        "let this server reach port 443 of the internet without a proxy, and look up names; or set"
        " client_documents = false"
    )
    yield Finding("warn", text, fix)


def check_public_url(settings: Settings, blob: str) -> Iterator[Finding]:
    """Yields whether clients find this broker at its public URL: `doctor` without the registration."""
    url = settings.public_url
    try:
        stranger = is_broker(url)
        if stranger:
            yield stranger._replace(text=f"public_url: {stranger.text}")
            return
        health = fetch("GET", url + "/healthz").json()
        if member(health, "git", str, "") != blob:
            text = "public_url: another revision of this file, or something else, is running there"
            yield Finding("warn", text, "restart the broker; let the proxy pass all to it")
        failures = [each for each in collapsed(examine(url, register=False)) if each.level != "ok"]
        version = member(health, "version", str, "unknown")
        yield from failures or [Finding("ok", f"public_url: {url} is answered by version {version}")]
    except FetchFailed as error:
        text = f"public_url: {url} does not answer from here: {error}"
        fix = (
            "start the broker and the proxy, then check again; "
            "some networks cannot reach their own public address"
        )
        yield Finding("warn", text, fix)


# ============================================================================================================
# Operators
# Owns what operators do beside a running broker: listings,
# revoking, backup, key rotation, another URL for Forgejo.
# Must not know a running broker: it acts on the store, and the broker notices.
# ============================================================================================================

MIN_COLUMN = 10  # characters; a table that would need narrower columns is told row by row


@contextlib.contextmanager
def acting_as(uid: int, gid: int) -> Iterator[None]:
    """Runs the block as another user, where the caller is root.

    Files that SQLite makes then are the broker's; keys and backups are not.
    """

    def become_for_now(uid: int, gid: int) -> None:
        if os.getuid() == 0:
            os.seteuid(0)
            os.setegid(gid)
            os.seteuid(uid)

    before = os.geteuid(), os.getegid()
    become_for_now(uid, gid)
    try:
        yield
    finally:
        become_for_now(*before)


@contextlib.contextmanager
def open_store(arguments: Arguments, alone: bool = False) -> Iterator[tuple[Settings, Keyring, Store]]:
    """Opens the store for the block, beside a running broker unless `alone`; root acts as its owner.

    Raises ConfigurationError.
    """
    settings = arguments.settings()
    owner = os.geteuid(), os.getegid()
    if not settings.store_url:
        if not os.path.exists(settings.store_path):
            raise ConfigurationError([f"store_path: there is no store at {settings.store_path}"])
        owner = os.stat(settings.store_path).st_uid, os.stat(settings.store_path).st_gid
    keyring = load_keyring(settings)
    with acting_as(*owner):
        with contextlib.closing(Store(store_place(settings), keyring, alone=alone)) as store:
            if copied_to := store.copied_to():
                raise ConfigurationError([moved(settings, copied_to)])
            if alone and store.is_shared:
                refuse_beside_brokers(store)
            yield settings, keyring, store


def refuse_beside_brokers(store: Store) -> None:
    """Raises ConfigurationError while brokers serve from a shared store, which no lock keeps out."""
    brokers = store.brokers(store.clock().now() - Brokers.GONE)
    if brokers:
        names = ", ".join(each.label for each in brokers)
        raise ConfigurationError(
            [
                f"store_url: brokers are using {store.engine.name}: {names}. Stop them; "
                f"one that was killed counts for {Brokers.GONE:.0f} s"
            ]
        )


# -- listings


def since_when(text: str, now: float) -> float:
    """Returns the moment that --since names: a date with or without a time (local), or how long ago.

    Raises ConfigurationError.
    """
    with contextlib.suppress(ValueError):
        return datetime.datetime.fromisoformat(text).timestamp()
    try:
        return now - float(str(KINDS["duration"](text)))
    except ValueError:
        problem = f"--since: {text!r} is neither a date such as 2026-11-30 nor a time such as 90m or 7d"
        raise ConfigurationError([problem]) from None


def listing(arguments: Arguments) -> int:
    """Prints users, clients, grants or sessions, as a table or as JSON. Returns the exit status."""
    options = arguments.options
    since = since_when(options["since"], Clock().now()) if "since" in options else 0.0
    with open_store(arguments) as (_, _, store):
        names, found = store.listing(arguments.command, store.clock().now())
    uses = [number for number, name in enumerate(names) if name in ("created_at", "used_at", "checked_at")]
    rows = [row for row in found if not since or max(row[number] or 0 for number in uses) >= since]
    if "json" in arguments.options:
        print(json.dumps([dict(zip(names, row)) for row in rows], indent=1))
        return 0
    cells = [[shown_cell(name, value) for name, value in zip(names, row)] for row in rows]
    from shutil import get_terminal_size  # here, as in did_you_mean()

    room = get_terminal_size().columns if sys.stdout.isatty() else None
    print("\n".join(table(list(names), cells, room)))
    return 0


def shown_cell(name: str, value: object) -> str:
    """Returns a value of a listing as people read it; the names of clients are strangers' texts."""
    if name.endswith("_at") and isinstance(value, (int, float)):
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(value))
    return "-" if value in (None, "") else clean_name(str(value), 300)


def table(names: list[str], rows: list[list[str]], room: int | None) -> list[str]:
    """Returns the lines of a table.

    Where it is wider than `room`, long cells go on below, or each row is a list of its own.
    """
    widths = [max(map(len, column)) for column in zip(names, *rows)]
    gaps = 2 * (len(widths) - 1)
    least = [min(width, MIN_COLUMN) for width in widths]
    if room is not None and sum(least) + gaps > room:
        label = max(map(len, names))
        blocks = [[f"{name:{label}}  {cell}" for name, cell in zip(names, row)] for row in rows]
        return [line for block in blocks for line in (*block, "")][:-1]
    while room is not None and sum(widths) + gaps > room:
        widths[widths.index(max(widths))] -= 1
    lines = []
    for row in (names, *rows):
        cells = [textwrap.wrap(cell, width, break_on_hyphens=False) for cell, width in zip(row, widths)]
        for parts in itertools.zip_longest(*cells, fillvalue=""):
            lines.append("  ".join(part.ljust(width) for part, width in zip(parts, widths)).rstrip())
    return lines


# -- revoking


def revoke(arguments: Arguments) -> int:
    """Ends the logins of a user, of a client, one, or all; a running broker acts on it within a second.

    Returns the exit status.
    """
    options = dict(arguments.options)
    forget = options.pop("forget", None) is not None
    if len(options) != 1 or forget and "client" not in options:
        wanted = (
            "revoke needs exactly one of --user NAME, --client ID, --grant ID, --all; "
            "--forget goes with --client"
        )
        raise ConfigurationError([wanted])
    kind, value = next(iter(options.items()))
    with open_store(arguments) as (settings, _, store):
        log = Log(settings)
        store.forget_copy()
        removed = forget and forget_client(settings, store, log, value)
        now = store.clock().now()
        ended = store.find_grants(kind, value, now)
        if kind == "user" and not ended:
            ended = grants_of_renamed(settings, store, value)
        for grant in ended:
            if store.end_grant(grant.grant_id, "revoked by operator", now, for_log=True):
                log.audit(
                    "token_revoked",
                    user=grant.sub,
                    client=grant.client_id,
                    grant=grant.grant_id,
                    reason="revoked by operator",
                )
        unknown = "" if ended or removed else unknown_target(store, kind, value, now)
    if unknown:
        print(f"fjmcp-broker: {unknown}", file=sys.stderr)
        return 1
    said = "; removed the registration" if removed else ""
    print(f"ended {len(ended)} login{'' if len(ended) == 1 else 's'}{said}")
    return 0


def forget_client(settings: Settings, store: Store, log: Log, client_id: str) -> bool:
    """Removes a client's registration, before its logins end: it starts no new one.

    Returns whether it was there.
    """
    if any(client.client_id == client_id for client in settings.clients):
        problem = f"{client_id} stands in [[clients]] of the configuration: take it out there, and restart"
        raise ConfigurationError([problem])
    removed = store.forget_client(client_id)
    if removed:
        log.audit("client_removed", client=client_id, reason="removed by operator")
    return removed


def unknown_target(store: Store, kind: str, value: str, now: float) -> str:
    """Returns why there was nothing to revoke."""
    if kind == "user":
        names, rows = store.listing("users", now)
        logins = {str(row[names.index("login")]).casefold() for row in rows}
        return f"{value} has no login in force" if value.casefold() in logins else f"no such user: {value}"
    if kind == "client":
        known = store.client(value) is not None
        return f"no login through {value} is in force" if known else f"no such client: {value}"
    return f"no such login in force: {value}" if kind == "grant" else "no login is in force"


def grants_of_renamed(settings: Settings, store: Store, login: str) -> list[Any]:
    """Returns the live grants of a user who is known to Forgejo, but not yet here, by that login.

    A new name is learnt at the next refresh.
    """
    try:
        account = Forgejo(settings, SteadyClock(Clock())).named_account(login)
    except (UpstreamDown, UpstreamRefused):
        return []
    user = store.user(account.sub) if account else None
    if user is None or account is None or account.created is None or account.created != user.account_created:
        return []
    return store.find_grants("user", user.login, store.clock().now())


# -- backup and keys


def backup(arguments: Arguments) -> int:
    """Writes a consistent copy of the store; the key is not in it. Returns the exit status."""
    path = arguments.word
    try:
        with open_store(arguments) as (_, _, store), acting_as(os.getuid(), os.getgid()):
            if not isinstance(store.engine, SqliteEngine):
                by = "PostgreSQL's own pg_dump makes the copy: pg_dump --format=custom --file=FILE store_url"
                raise ConfigurationError([f"backup: the store is {store.engine.name}. {by}"])
            with new_file(path) as fresh:
                store.engine.backup(fresh)
    except FileExistsError:
        raise ConfigurationError([f"{path} is there already"]) from None
    print(f"wrote {path}; it opens only with the sealing key, which is not in it")
    return 0


# What refers to other tables comes after them.
COPIED_FIRST = ("users", "grants")


def copy_store(arguments: Arguments) -> int:
    """Copies the SQLite store into an empty database of PostgreSQL, whole or not at all.

    Returns the exit status. The file serves no more then. Run again after it was interrupted, it goes on,
    unless the file was changed meanwhile.
    """
    settings = arguments.settings()
    try:
        server = PostgresServer(str(KINDS["store_url"](arguments.word)), settings.store_password)
    except ValueError as error:
        raise ConfigurationError([f"copy-store: URL {error}"]) from None
    if not os.path.exists(settings.store_path):
        raise ConfigurationError([f"store_path: there is no store at {settings.store_path}"])
    keyring = load_keyring(settings)
    owner = os.stat(settings.store_path)
    with acting_as(owner.st_uid, owner.st_gid), contextlib.ExitStack() as opened:
        source = opened.enter_context(contextlib.closing(Store(settings.store_path, keyring)))
        target = opened.enter_context(contextlib.closing(Store(server, keyring)))
        if copied_to := source.copied_to():
            raise ConfigurationError([moved(settings, copied_to)])
        counts = copied(source, target)
    shown = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    print(
        f"copied {shown}.\n{settings.store_path} serves no more. Set store_url = {arguments.word!r}"
        f" and, for every broker the same, key_file = {key_path(settings)!r} (or key)"
    )
    return 0


def copied(source: Store, target: Store) -> dict[str, int]:
    """Copies all rows and returns how many of each table; the source is marked as moved.

    Raises ConfigurationError when the target is not empty.
    """
    name = source.name_copy()
    assert isinstance(source.engine, SqliteEngine) and isinstance(target.engine, PostgresEngine)
    with source.engine.frozen() as execute:
        found = execute(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'", {}
        )
        tables = sorted((row[0] for row in found), key=lambda table: table not in COPIED_FIRST)
        tables.sort(key=lambda table: table != COPIED_FIRST[0])
        counts = {table: int(execute(f"SELECT count(*) FROM {table}", {}).fetchone()[0]) for table in tables}
        if target.copy_name() != name:
            if not is_empty(target, tables):
                raise ConfigurationError([f"copy-store: {target.engine.name} is not empty"])
            target.engine.load(rows_of(execute, tables))
            compare_counts(target.engine, counts)
        url = target.engine.server.url.encode()
        execute("INSERT INTO meta (name, value) VALUES ('copied_to', :url)", {"url": url})
    return counts


def compare_counts(engine: Engine, counts: Mapping[str, int]) -> None:
    """Raises ConfigurationError when a table has not as many rows as it should."""
    for table, count in counts.items():
        there = engine.read(f"SELECT count(*) FROM {table}", {})[1][0][0]
        if there != count:
            problem = f"{engine.name} has {there} rows of {table} instead of {count}"
            raise ConfigurationError([f"copy-store: {problem}; the store here was not changed"])


def is_empty(store: Store, tables: Sequence[str]) -> bool:
    """Returns whether a store holds nothing but the key's probe."""
    count = " + ".join(f"(SELECT count(*) FROM {table})" for table in tables if table != "meta")
    notes = "(SELECT count(*) FROM meta WHERE name != 'key_probe')"
    return bool(store.engine.read(f"SELECT {count} + {notes}", {})[1][0][0] == 0)


def rows_of(
    execute: Callable[[str, Parameters], sqlite3.Cursor], tables: Sequence[str]
) -> Iterator[tuple[str, Parameters]]:
    """Yields a statement and its parameters for each row of the tables; then those that let numbers go on."""
    yield "DELETE FROM meta", {}
    for table in tables:
        rows = execute(f"SELECT * FROM {table}", {})
        names = [column[0] for column in rows.description]
        listed = ", ".join(names)
        insert = f"INSERT INTO {table} ({listed}) VALUES ({', '.join(':' + name for name in names)})"
        for row in rows:
            values = dict(zip(names, row))
            if table == "meta" and isinstance(values["value"], str):
                values["value"] = values["value"].encode()
            yield insert, values
    for table, column, last in (
        ("grants", "grant_id", "SELECT max(seq) FROM sqlite_sequence WHERE name = 'grants'"),
        ("operator_records", "record_id", "SELECT max(record_id) FROM operator_records"),
    ):
        (number,) = execute(last, {}).fetchone()
        yield (
            f"SELECT setval(pg_get_serial_sequence('{table}', '{column}'), :next, FALSE)",
            {"next": (number or 0) + 1},
        )


def rotate_key(arguments: Arguments) -> int:
    """Puts a new key first in key_file, then seals every credential anew; returns the exit status.

    Run again, it goes on where it was. Where the keys come from `key`, only the sealing is done. Raises
    ConfigurationError with the three steps where `key` has no new one.
    """
    with open_store(arguments) as (settings, keyring, store):
        store.forget_copy()
        is_done = all(keyring.is_newest(box) for _, _, box in store.boxes())
        if store.is_shared:
            now = store.clock().now()
            check_rotation(store.brokers(now - Brokers.FORGOTTEN), keyring, is_done)
        elif settings.key and is_done and len(keyring.keys) == 1:
            raise ConfigurationError([three_steps(settings)])
        elif not settings.key and is_done:
            keyring = add_key(settings)
        count, lost = seal_anew(store, keyring)
    print(
        f"sealed {count} credential{'' if count == 1 else 's'} with the newest key.\n"
        "When the logins that are under way now have ended (10 minutes), "
        "`check` says whether older keys can be taken out."
    )
    if lost:
        text = f"{lost} credentials open with no key that is here; their users have to log in again."
        print(text, file=sys.stderr)
    return int(lost > 0)


def check_rotation(brokers: Sequence[BrokerRow], keyring: Keyring, is_done: bool) -> None:
    """Raises ConfigurationError where there is no new key, or not every broker of a shared store has it."""
    newest = keyring.ids[0]
    unaware = [each.label for each in brokers if newest not in each.key_ids.split()]
    if unaware:
        names = ", ".join(unaware)
        raise ConfigurationError(
            [
                f"the newest key here is not known to these brokers: {names}. Nothing was changed. "
                + SHARED_STEPS
            ]
        )
    if is_done and len(keyring.keys) == 1:
        raise ConfigurationError(["there is no new key. " + SHARED_STEPS])


SHARED_STEPS = """Steps for several brokers of one store:
  1. put a new key (openssl rand -base64 32) before the old one in key_file of every broker, which each reads
     by itself, or in `key`, and restart each; they seal with the old one until all have the new one
  2. run rotate-key once
  3. ten minutes later, when check says that the old key can be taken out, take it out everywhere"""


def three_steps(settings: Settings) -> str:
    """Returns how a key that stands in `key` is rotated: only the operator writes there."""
    return (
        f"the key stands in `key` ({settings.sources['key']}), where rotate-key writes nothing. "
        "Three steps:\n"
        "  1. put a new key (openssl rand -base64 32) and a comma before the old one in `key`, "
        "and restart the broker\n"
        "  2. run rotate-key: it seals everything with the new key\n"
        "  3. ten minutes later, when check says that the old key can be taken out, take it out and restart"
    )


def add_key(settings: Settings) -> Keyring:
    """Puts a new key before the others in key_file, and returns the keyring.

    If another rotate-key was faster, its key is used.
    """
    path = key_path(settings)
    with acting_as(os.getuid(), os.getgid()):
        before = read_file(path)
        with contextlib.suppress(FileExistsError):
            put_file(path, new_key() + decode_text(before), expected=before)
        return load_keyring(settings)


def seal_anew(store: Store, keyring: Keyring) -> tuple[int, int]:
    """Seals with the newest key what older keys sealed.

    Returns how many credentials, and how many open with no key.
    """
    count = 0
    lost = 0
    for purpose, owner, box in store.boxes():
        if keyring.is_newest(box):
            continue
        try:
            fresh = keyring.seal(purpose, owner, keyring.unseal(purpose, owner, box))
        except ValueError:
            lost += 1
            continue
        count += store.replace_box(box, fresh) and purpose == "upstream"
    return count, lost


# -- another URL for Forgejo


SIGNED_IN_ONLY = (
    "It shows them only to who is signed in (REQUIRE_SIGNIN_VIEW): make a token there (Settings, "
    "Applications; scope read:user) and give the file that holds it as --token FILE"
)


def rebind(arguments: Arguments) -> int:
    """Gives the store to the configured forgejo_url, while no broker runs. Returns the exit status.

    Without --forget it has to be the same Forgejo under another
    URL: it is asked for users known here, who must be the same.
    """
    with open_store(arguments, alone=True) as (settings, _, store):
        known = store.bound_to(settings.forgejo_url)
        if known == settings.forgejo_url:
            print(f"the store belongs to {known} already")
            return 0
        forget = "forget" in arguments.options
        token = token_of(arguments.options.get("token"))
        problem = "" if forget else differing_people(settings, store.known_people(50), token)
        if problem:
            print(f"fjmcp-broker: {problem}", file=sys.stderr)
            return 1
        store.forget_copy()
        ended = store.rebind(settings.forgejo_url, forget)
    log = Log(settings)
    for grant in ended:
        log.audit(
            "token_revoked",
            user=grant.sub,
            client=grant.client_id,
            grant=grant.grant_id,
            reason="another Forgejo",
        )
    said = f"; ended {len(ended)} login{'' if len(ended) == 1 else 's'}" if forget else "; all logins go on"
    print(f"the store belongs to {settings.forgejo_url} now, no longer to {known}{said}")
    return 0


def token_of(path: str | None) -> str:
    """Returns the token in a file, "" without a file. Raises ConfigurationError."""
    if path is None:
        return ""
    try:
        token = decode_text(read_file(path)).strip()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigurationError([f"--token: cannot read {path}: {reason}"]) from None
    if not re.fullmatch(r"[\x21-\x7e]{1,200}", token):
        raise ConfigurationError([f"--token: {path} must hold one token of Forgejo's and nothing else"])
    return token


def differing_people(settings: Settings, people: Sequence[Any], token: str) -> str:
    """Returns why a Forgejo seems not to have the users known here, "" if it has.

    Compared are number, login and the account's creation. It is asked as anybody may ask, or with the
    operator's `token`: none of a user's goes to a server that may be another.
    """
    forgejo = Forgejo(settings, SteadyClock(Clock()))
    same = 0
    hidden = 0
    for person in people:
        try:
            account = forgejo.named_account(person.login, token)
        except UpstreamDown as error:
            return f"{settings.forgejo_url} cannot be asked for {person.login}: {error}. Nothing was changed"
        except UpstreamRefused as error:
            remedy = "The token must be valid, and have the scope read:user" if token else SIGNED_IN_ONLY
            return f"{settings.forgejo_url} shows no users: {error}. {remedy}. Nothing was changed"
        if account is None:
            hidden += 1
        elif account.sub == person.sub and same_person(person, account.login, account.created):
            same += 1
        else:
            return (
                f"{person.login} is somebody else at {settings.forgejo_url}: it is another Forgejo. "
                "Nothing was changed"
            )
    if same and same >= hidden:
        return ""
    return (
        f"{settings.forgejo_url} shows {same} of the {len(people)} users known here, "
        "too few to tell that it is the same Forgejo. Nothing was changed; --forget ends all logins"
    )


# ============================================================================================================
# Serve
# Owns the life of the serving process: the service manager,
# signals, what is tried once after the start, the exit status.
# Must not know how anything is served: that is the Broker's.
# ============================================================================================================

RESTART_PAUSE = 5  # seconds


def is_activated() -> bool:
    """Returns whether a service manager started us with sockets (sd_listen_fds(3))."""
    return os.environ.get("LISTEN_PID") == str(os.getpid()) and os.environ.get("LISTEN_FDS", "").isdigit()


def inherited_sockets() -> list[tuple[str, socket.socket]]:
    """Returns (name, socket) of each listening socket of the service manager; children inherit none.

    Raises ConfigurationError for what is no listening stream socket.
    """
    if not is_activated():
        return []
    count = int(os.environ["LISTEN_FDS"])
    names = [*os.environ.get("LISTEN_FDNAMES", "").split(":"), *[""] * count]
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    found = []
    problems = []
    for number, name in zip(range(count), names):
        try:
            os.set_inheritable(3 + number, False)
            listener = socket.socket(fileno=3 + number)
            listens = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if not listens or listener.family not in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):
                raise OSError(errno.EINVAL, "it does not listen")
            found.append((name, listener))
        except OSError as error:
            problems.append(
                f"the service manager's socket {number} {name!r} is no listening stream socket "
                f"({error.strerror}): use ListenStream= with Accept=no"
            )
    if problems:
        raise ConfigurationError(problems)
    return found


def notify_service_manager(state: str) -> None:
    """Tells the service manager, where there is one (sd_notify(3))."""
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(state.encode(), "\0" + path[1:] if path.startswith("@") else path)


def serve(arguments: Arguments) -> int:
    """Serves until SIGTERM or SIGINT; SIGHUP re-reads the settings. Returns the exit status."""
    settings = arguments.settings()
    hide_from_children()
    broker = Broker(settings, sockets=inherited_sockets())
    broker.launcher.reaps = adopts_orphans()
    threading.excepthook = broker.thread_failed
    # The kernel may give a signal to any thread, and a main thread that
    # waits for a lock would not hear of it: it waits here instead.
    signals, wakes = socket.socketpair()
    wakes.setblocking(False)
    signal.set_wakeup_fd(wakes.fileno())
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(each, lambda number, frame: None)
    broker.start()
    warn_of_rules(broker)
    broker.look_out()
    announce(broker)
    notify_service_manager("READY=1")
    if settings.check_at_start:
        threading.Thread(target=try_upstream, args=(broker,), daemon=True, name="check").start()
    while True:
        for number in signals.recv(64):
            if number == signal.SIGHUP:
                reload(broker, arguments)
                continue
            notify_service_manager("STOPPING=1")
            broker.log.event("info", "stopping")
            broker.stop()
            broker.log.close()
            return 0


def warn_of_rules(broker: Broker) -> None:
    """Logs what is doubtful in the tool rules; `check` knows the child's tools too."""
    for sentence in rule_warnings(broker.settings.tool_rules):
        broker.log.event("warning", "tool_rules_doubtful", problem=sentence)


def announce(broker: Broker) -> None:
    """Logs which URLs and sockets are served, and settings that may surprise an operator."""
    settings = broker.settings
    sockets = [f"{server.purpose}: {address}" for server in broker.servers for address in server.addresses]
    broker.log.event(
        "info",
        "serving",
        url=settings.public_url,
        port=broker.server.port,
        sockets=sockets,
        version=__version__,
    )
    if broker.is_activated and settings.sources["listen"] != "default":
        broker.log.event(
            "warning",
            "listen_not_used",
            listen="%s:%d" % settings.listen,
            means="the service manager holds the sockets; change ListenStream= in its socket unit",
        )
    if settings.debug:
        means = "what forgejo-mcp writes to its stderr is logged, and each request's path"
        broker.log.event("warning", "debug_on", means=means)


def try_upstream(broker: Broker) -> None:
    """Logs as warnings what `check` finds wrong with Forgejo and forgejo-mcp; serving goes on."""
    for level, text, fix in check_upstream(broker.settings):
        if level == "fail":
            broker.log.event("warning", "check_failed", problem=text, fix=fix or None)


def reload(broker: Broker, arguments: Arguments) -> None:
    """SIGHUP: applies changes that may be made, names those that may not; wrong settings change nothing."""
    try:
        refused = broker.settings.reload(arguments.settings())
        broker.log.event("info", "settings_reloaded", needs_restart=refused or None)
        broker.endpoint.judge.rules_changed(broker.sessions)
        warn_of_rules(broker)
    except ConfigurationError as error:
        broker.log.event("error", "settings_not_reloaded", problems=error.problems)


RUN: dict[str, Callable[[Arguments], int]] = {  # what runs each command of COMMANDS
    "serve": serve,
    "check": check,
    "init": init,
    "doctor": doctor,
    "users": listing,
    "clients": listing,
    "grants": listing,
    "sessions": listing,
    "revoke": revoke,
    "rebind": rebind,
    "backup": backup,
    "copy-store": copy_store,
    "rotate-key": rotate_key,
}


def failed(problems: list[str], status: int, activated: bool) -> int:
    """Prints the problems and returns the exit status; after a pause where our sockets are the manager's.

    The service manager starts us again as soon as we are gone, for the connections that wait: without the
    pause it would give up for good.
    """
    for problem in problems:
        try:
            print(f"fjmcp-broker: {problem}", file=sys.stderr, flush=True)
        except BrokenPipeError:
            raise
        except OSError:  # the exit status says it
            silence_if_broken(sys.stderr)
    if activated:
        text = " ".join("; ".join(problems).split())
        notify_service_manager(f"STATUS=does not start: {text[:1500]}")
        time.sleep(RESTART_PAUSE)
    return status


def notes(arguments: Sequence[str]) -> list[str]:
    """Returns remarks about the configuration file that help when the configuration is wrong."""
    with contextlib.suppress(ConfigurationError, OSError):
        path = parse_arguments(arguments).config
        if path is None and os.path.exists("broker.toml"):
            return [
                "note: ./broker.toml was not read: others could write to it or its folder; "
                "name it with --config"
            ]
        if path and read_file(path).startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return [f"note: {path} begins with a byte order mark (BOM), which is skipped"]
    return []


def help_for(arguments: Sequence[str]) -> str | None:
    """Returns the text that --help or --version asks for, None where neither is asked."""
    if "--version" in arguments:
        return f"fjmcp-broker {__version__}"
    if not {"--help", "-h"} & set(arguments):
        return None
    words, _, _ = split_flags([each for each in arguments if each not in ("--help", "-h")], [])
    return command_usage(words[0]) if words and words[0] in COMMANDS else usage()


def open_standard_streams() -> None:
    """Opens /dev/null where standard input, output or error is closed.

    Else a file of ours would get its number, and what is printed.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest number, this one
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))


def end_by(number: signal.Signals) -> int:
    """Ends this process as a signal does that nobody handles.

    Returns what the shell would see if that fails: 128 and its number.
    """
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    return 128 + number


def run(arguments: Sequence[str], activated: bool) -> int:
    """Runs a command line and returns the exit status once all that it said is written.

    Raises BrokenPipeError where nobody reads it.
    """
    text = help_for(arguments)
    try:
        if text is not None:
            print(text)
            status = 0
        else:
            parsed = parse_arguments(arguments)
            status = RUN[parsed.command](parsed)
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        return status
    except ConfigurationError as error:
        return failed([*error.problems, *notes(arguments)], 2, activated)
    except StoreUnavailable as error:
        return failed([error.reason], 1, activated)
    except BrokenPipeError:
        raise
    except OSError as error:
        path = error.filename
        sentence = f"cannot go on: {error.strerror or error}"
        if isinstance(path, str):
            sentence = f"cannot use {path}: {file_trouble(path, error)}"
        return failed([sentence], 1, activated)


def main(arguments: list[str] | None = None) -> int:
    """Runs a command line and returns the exit status.

    0, 1 for a failure while running, 2 for wrong usage or configuration. As programs do, it ends by SIGPIPE
    where nobody reads what it says, and by SIGINT where it is interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    open_standard_streams()
    try:
        return run(arguments, is_activated())
    except BrokenPipeError:
        return end_by(signal.SIGPIPE)
    except KeyboardInterrupt:
        return end_by(signal.SIGINT)
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            silence_if_broken(stream)


if __name__ == "__main__":
    sys.exit(main())
