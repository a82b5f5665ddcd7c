"""Several brokers of one store in the test's own process, behind one public_url.

What a proxy would choose, a test chooses.
"""

import contextlib
import socket
from pathlib import Path

import fjmcp_broker
from rigs.browser import Browser
from rigs.fake_forgejo import FakeForgejo
from rigs.mcp_client import McpClient, OAuthClient
from rigs.rig import AuditLog, FakeClock, broker_values, tick_one_at_a_time


class Member:
    """One of the brokers: `routes` lead the public URL to it."""

    def __init__(self, brokers, name):
        self.brokers, self.name = brokers, name
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.address = "http://127.0.0.1:%d" % self.socket.getsockname()[1]
        self.broker = self.log = None
        self.key_file = brokers.directory / f"key-{name}"
        self.write_keys(brokers.key)

    def write_keys(self, text):
        """Write this broker's key file anew."""
        new = self.key_file.with_suffix(".new")
        new.write_text(text)
        new.chmod(0o600)
        new.rename(self.key_file)

    @property
    def routes(self):
        return {self.brokers.url: self.address}

    @property
    def store(self):
        return self.broker.store

    def start(self):
        """Build this broker anew, on its port, beside the others."""
        values = {**self.brokers.values, "broker_name": self.name, "key_file": str(self.key_file)}
        settings = fjmcp_broker.load_settings({name: str(value) for name, value in values.items()}, {})
        self.log = AuditLog(settings, self.brokers.clock)
        self.broker = fjmcp_broker.Broker(
            settings, clock=self.brokers.clock, log=self.log, listener=self.socket.dup()
        )
        tick_one_at_a_time(self.broker.reaper)
        self.broker.start()
        return self

    def stop(self):
        if self.broker:
            self.broker.stop()
            self.broker = None

    def login(self, user="alice", access="full"):
        """A client that logged in here."""
        client = OAuthClient(self.brokers.url, name="Test client", routes=self.routes)
        client.login(Browser(routes=self.routes), user, "secret", access)
        return client

    def client(self, oauth, session_id=None, **arguments):
        """An MCP client with that login's token, whose requests come here."""
        token = oauth.tokens["access_token"]
        mcp = McpClient(
            self.brokers.url + "/mcp", token, session_id=session_id, routes=self.routes, **arguments
        )
        mcp.oauth = oauth
        return mcp

    def session(self, user="alice", oauth=None, **arguments):
        """A session that was opened here."""
        mcp = self.client(oauth or self.login(user), **arguments)
        mcp.initialize()
        return mcp

    def at(self, mcp):
        """The same session's client, whose requests come here."""
        return self.client(mcp.oauth, mcp.session_id)

    def tick(self):
        self.broker.reaper.tick()


class Brokers:
    """`count` brokers named a, b, c … of one store, a fake Forgejo, one clock for all.

    `store`: the settings that name the store, of one that takes
    several brokers. Without it, SQLite's file is opened by each.
    """

    def __init__(
        self, directory, count=2, *, store=None, key=None, child=(), access_lifetime=3600, **settings
    ):
        self.directory, self.key = Path(directory), (key or fjmcp_broker.new_key()).strip() + "\n"
        self.clock = FakeClock()
        self.forgejo = FakeForgejo(clock=self.clock, access_lifetime=access_lifetime).start()
        self._patched = contextlib.ExitStack()
        if store is None:
            self._share_sqlite()
        names = [chr(ord("a") + number) for number in range(count)]
        self.all = [Member(self, name) for name in names]
        self.url = self.all[0].address
        self.app = self.forgejo.add_app([self.url + "/oauth/callback"])
        self.values = {
            **broker_values(self.directory, self.url, self.forgejo, self.app, child),
            **(store or {}),
            **settings,
        }
        for member in self.all:
            member.start()

    def _share_sqlite(self):
        """Let several brokers open one SQLite file, which the program itself refuses."""
        real = fjmcp_broker.Store

        def beside(place, keyring, alone=True):
            store = real(place, keyring, alone=False)
            store.is_shared = True
            return store

        fjmcp_broker.Store = beside
        self._patched.callback(setattr, fjmcp_broker, "Store", real)

    def close(self):
        for member in self.all:
            member.stop()
            member.socket.close()
        self.forgejo.stop()
        self._patched.close()

    def __enter__(self):
        return self

    def __exit__(self, *_exc):
        self.close()
