"""Fixtures of PostgreSQL: a server for all tests of one worker, with a new database for each that asks.

A test that stops, kills or replaces a server asks for one of its own (`own_postgresql`).
"""

from pathlib import Path

import pytest

from rigs.postgresql_server import Server


@pytest.fixture(scope="session")
def postgresql(real_part):
    """A server for all tests of this worker. Who stops it disturbs the others."""
    server = Server(Path(real_part("postgresql")).parent).create()
    yield server
    server.close()


@pytest.fixture
def own_postgresql(real_part):
    """A function that makes a server of the test's own; `settings` go into its postgresql.conf.

    All end with the test.
    """
    made = []

    def make(**settings):
        made.append(Server(Path(real_part("postgresql")).parent, **settings))
        return made[-1].create()

    yield make
    for server in made:
        server.close()
