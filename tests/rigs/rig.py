"""One broker in the test's own process, with real sockets, real children and a fake Forgejo.

What most tests stand on.
"""

from __future__ import annotations

import collections
import io
import json
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import fjmcp_broker
from rigs.fake_forgejo import App, FakeForgejo
from rigs.mcp_client import McpClient, OAuthClient

if TYPE_CHECKING:
    from fjmcp_broker import PublicWeb
    from rigs.mcp_client import Json

TESTS = Path(__file__).resolve().parent
CHILD = (sys.executable, "-I", str(TESTS / "stdio_child.py"))


class FakeClock(fjmcp_broker.Clock):
    """A machine's clocks, moved by a test.

    They start at the real time and run on, so that two moments differ.
    """

    def __init__(self) -> None:
        self.offset, self.wrong_by = 0.0, 0.0
        self._stopped_at: float | None = None
        self._began = time.time() - time.monotonic()

    def _runs(self) -> float:
        return self._began + time.monotonic()  # unlike the machine's wall clock it is never set

    def boottime(self) -> float:
        return (self._stopped_at or self._runs()) + self.offset

    monotonic = __call__ = boottime

    def now(self) -> float:
        return self.boottime() + self.wrong_by

    def advance(self, seconds: float) -> None:
        """Time passes, by every clock."""
        self.offset += seconds

    def step_wall(self, seconds: float) -> None:
        """Somebody sets the wall clock; no time passes."""
        self.wrong_by += seconds

    def stop(self) -> None:
        """From here on only `advance` moves it: no rate limit recovers while a test runs."""
        self._stopped_at = self._runs()


class AuditLog(fjmcp_broker.Log):
    """A log that keeps its records and lets a test wait for one."""

    def __init__(self, settings: fjmcp_broker.Settings, clock: FakeClock) -> None:
        super().__init__(settings, io.StringIO(), clock)
        self.records: list[dict[str, Any]] = []
        self._arrived = threading.Condition()

    def event(self, level: str, event: str, **fields: Any) -> None:
        super().event(level, event, **fields)
        with self._arrived:
            self.records.append({"level": level, "event": event, **fields})
            self._arrived.notify_all()

    def named(self, event: str) -> list[dict[str, Any]]:
        with self._arrived:
            return [record for record in self.records if record["event"] == event]

    def wait(self, event: str, count: int = 1, timeout: float = 30) -> list[dict[str, Any]]:
        """The records of an event once there are `count` of them."""
        with self._arrived:
            enough = self._arrived.wait_for(
                lambda: sum(r["event"] == event for r in self.records) >= count, timeout
            )
            assert enough, f"no {event!r} in {[r['event'] for r in self.records]}"
        return self.named(event)

    @property
    def text(self) -> str:
        assert isinstance(self._stream, io.StringIO)
        return self._stream.getvalue()


def broker_values(
    directory: Path, url: str, forgejo: FakeForgejo, app: App, child: Sequence[str] = ()
) -> dict[str, Any]:
    """The settings of a broker at `url` before that Forgejo, whose children are the scripted one."""
    return {
        "public_url": url,
        "forgejo_url": forgejo.url,
        "forgejo_oauth_client_id": app.client_id,
        "forgejo_oauth_client_secret": app.client_secret,
        "forgejo_mcp_binary": ",".join((*CHILD, *child)),
        "store_path": str(directory / "broker.db"),
        "debug": "true",
    }


class Rig:
    """A fake Forgejo and a broker before it, restartable on the same port and store."""

    def __init__(
        self,
        directory: Path,
        *,
        child: Sequence[str] = (),
        access_lifetime: float = 3600,
        web: PublicWeb | None = None,
        forgejo_args: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        self.directory, self.clock, self.web = Path(directory), FakeClock(), web
        self.forgejo = FakeForgejo(
            clock=self.clock, access_lifetime=access_lifetime, **(forgejo_args or {})
        ).start()
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.app = self.forgejo.add_app([self.url + "/oauth/callback"])
        self.values = {**broker_values(self.directory, self.url, self.forgejo, self.app, child), **settings}
        self.broker: Any = None  # a Broker, None while it is stopped
        self.log: Any = None  # the newest broker's AuditLog
        self.start()

    def start(self) -> Self:
        """Build the broker anew, on the same port and store, as a restart would."""
        settings = fjmcp_broker.load_settings(
            {k: v if isinstance(v, str) else str(v) for k, v in self.values.items()}, {}
        )
        self.log = AuditLog(settings, self.clock)
        self.broker = fjmcp_broker.Broker(
            settings, clock=self.clock, log=self.log, listener=self.socket.dup(), web=self.web
        )
        tick_one_at_a_time(self.broker.reaper)
        self.broker.start()
        return self

    def stop(self) -> None:
        if self.broker:
            self.broker.stop()
            self.broker = None

    def restart(self) -> Self:
        self.stop()
        return self.start()

    def close(self) -> None:
        self.stop()
        self.socket.close()
        self.forgejo.stop()

    def login(self, user: str = "alice", access: str | None = "full", **arguments: Any) -> OAuthClient:
        """A logged-in OAuth client."""
        client = OAuthClient(self.url, name=arguments.pop("name", "Test client"))
        client.login(None, user, "secret", access, **arguments)
        return client

    def session(
        self,
        user: str = "alice",
        access: str | None = "full",
        capabilities: Json | None = None,
        protocol: str = "2025-11-25",
    ) -> McpClient:
        """An initialized MCP session of a user who logged in through a client of its own."""
        client = self.login(user, access)
        mcp = McpClient(
            self.url + "/mcp",
            client.tokens["access_token"],
            protocol=protocol,
            capabilities=capabilities or {},
        )
        mcp.initialize()
        mcp.oauth = client
        return mcp

    def tick(self) -> None:
        self.broker.reaper.tick()


def tick_one_at_a_time(reaper: fjmcp_broker.Reaper) -> None:
    """A test ticks beside the reaper's own thread.

    Each tick is whole, as it is where only that thread ticks.
    """
    tick, ticking = reaper.tick, threading.Lock()

    def one_tick() -> None:
        with ticking:
            tick()

    vars(reaper)["tick"] = one_tick


def rows(
    store: fjmcp_broker.Store, statement: str, parameters: Mapping[str, object] | None = None
) -> list[Any]:
    """What a statement finds in a store: rows with names."""
    columns, found = store.engine.read(statement, parameters or {})
    # mypy wants to know the names, which are those of the statement.
    row: Any = collections.namedtuple("Row", columns, rename=True)  # type: ignore[misc]
    return [row._make(values) for values in found]


def text_of(result: Json) -> str:
    """The text of a tool's result."""
    return str(result["content"][0]["text"])


def json_of(result: Json) -> Any:
    """The JSON in the text of a tool's result."""
    return json.loads(text_of(result))


def who(mcp: McpClient) -> str:
    """The login of whose token a session's child has."""
    return str(json_of(mcp.call_tool("get_my_user_info"))["Result"]["login"])


def token_of(mcp: McpClient) -> str:
    """The token of Forgejo that a session's child holds."""
    return str(json_of(mcp.call_tool("get_env"))["TOKEN_BACKWARDS"])[::-1]
