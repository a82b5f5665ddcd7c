"""The two engines of the store, for tests that are to hold on both.

`place` is a new SQLite file or a new database of PostgreSQL.
"""

import time

import pytest

import fjmcp_broker
from rigs.postgresql_server import PASSWORD

ENGINES = ("sqlite", pytest.param("postgresql", marks=pytest.mark.real("postgresql")))
KEYS = fjmcp_broker.Keyring([b"k" * 32])
LIMIT = 60


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
