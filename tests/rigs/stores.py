"""The two engines of the store, for tests that are to hold on both.

`place` is a new SQLite file or a new database of PostgreSQL.
"""

import time

import pytest

import fjmcp_broker
from fjmcp_broker import token_hash
from rigs.postgresql_server import PASSWORD

ENGINES = ("sqlite", pytest.param("postgresql", marks=pytest.mark.real("postgresql")))
KEYS = fjmcp_broker.Keyring([b"k" * 32])
LIMIT = 60
NOW = 1_800_000_000.0
DAY = 86400


EMPTY_ALL = """
    DO $$ BEGIN EXECUTE (
      SELECT 'TRUNCATE ' || string_agg(tablename, ', ') || ' RESTART IDENTITY'
      FROM pg_tables
      WHERE schemaname = 'public' AND tablename != 'schema_version'
    ); END $$
"""


class Databases:
    """Databases of one server, with the tables in them.

    One that a test is done with is emptied for the next that asks.
    """

    def __init__(self, server):
        self.server = server
        self._template = server.database()
        fjmcp_broker.Store(self.place(self._template), KEYS).close()
        self._free = []

    def place(self, name, socket=True):
        """A database as the store takes it; by its address a password is asked for, which takes time."""
        return fjmcp_broker.PostgresServer(self.server.url(name, socket=socket), PASSWORD)

    def take(self):
        """The name of a database with empty tables."""
        if not self._free:
            return self.server.database(self._template)
        name = self._free.pop()
        self.command(name, EMPTY_ALL)
        return name

    def give_back(self, name):
        """Another test may have it; nobody uses it any more."""
        self._free.append(name)

    def command(self, database, text):
        """Do something as the superuser."""
        where = {"host": str(self.server.folder), "port": str(self.server.port), "dbname": database}
        connection = fjmcp_broker.PostgresConnection({**where, "user": "postgres"}, time.monotonic() + LIMIT)
        try:
            connection.command(text, time.monotonic() + LIMIT)
        finally:
            connection.close()


@pytest.fixture(scope="session")
def databases(postgresql):
    """The Databases of this worker's server."""
    return Databases(postgresql)


@pytest.fixture
def new_database(databases):
    """A function that returns a database with empty tables, as the store takes it."""
    made = []

    def make():
        made.append(databases.take())
        return databases.place(made[-1])

    yield make
    for name in made:
        databases.give_back(name)


@pytest.fixture(params=ENGINES)
def engine(request):
    """The name of an engine: a test that uses it runs on each."""
    return request.param


@pytest.fixture
def place(engine, tmp_path, request):
    """Where a new store is, on each engine in turn."""
    if engine == "sqlite":
        return str(tmp_path / "broker.db")
    return request.getfixturevalue("new_database")()


# -- rows of a store, at NOW


def add_client(store, client_id="c", now=NOW):
    """An application that registered."""
    store.add_client(client_id, "dynamic", "name", ["https://x.example/cb"], None, "none", {}, now)


def add_grant(store, code="code", sub="1", client="c", now=NOW):
    """A login that was approved, with its code; the grant's id."""
    return store.finish_login(
        sub,
        client,
        "forgejo:read",
        "forgejo:read",
        "r",
        token_hash(code),
        "https://x.example/cb",
        "ch",
        now,
        now + 60,
        now + 60,
    )


def pair(name, now=NOW):
    """An access and a refresh token, as the store takes them."""
    return (token_hash(name + "a"), now + 3600), (token_hash(name + "r"), now + 90 * DAY)


def redeem(store, code="code", name="1", now=NOW):
    """Redeem a code for the pair of that name; what redeem_code returns."""
    return store.redeem_code(token_hash(code), "c", "https://x.example/cb", "ch", now, *pair(name, now), 3)
