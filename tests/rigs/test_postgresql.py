"""The suite's own PostgreSQL.

A database for each test, a server that restarts, dies, and is replaced by its standby.
"""

import pytest

from rigs.postgresql_server import PASSWORD

pytestmark = pytest.mark.real("postgresql")


def as_broker(server, url, statement):
    """What psql answers to the role of the broker, by its password."""
    parted = url.replace("@", f":{PASSWORD.replace(' ', '%20')}@", 1)
    return server.run("psql", "-X", "-A", "-t", "-q", "-d", parted, "-c", statement).strip()


def test_each_test_has_a_database_of_its_own(postgresql):
    first, second = postgresql.database(), postgresql.database()
    as_broker(postgresql, postgresql.url(first), "CREATE TABLE here (n integer)")
    found = "SELECT count(*) FROM pg_tables WHERE tablename = 'here'"
    assert as_broker(postgresql, postgresql.url(first), found) == "1"
    assert as_broker(postgresql, postgresql.url(second, socket=True), found) == "0"


def test_what_was_committed_survives_a_restart_and_a_kill(own_postgresql):
    server = own_postgresql()
    name = server.database()
    as_broker(server, server.url(name), "CREATE TABLE kept (n integer); INSERT INTO kept VALUES (1)")
    server.restart()
    as_broker(server, server.url(name), "INSERT INTO kept VALUES (2)")
    server.kill()
    server.start()
    assert as_broker(server, server.url(name), "SELECT sum(n) FROM kept") == "3"


def test_a_promoted_standby_has_all_that_was_committed(own_postgresql):
    server = own_postgresql()
    follower = server.standby()
    try:
        name = server.database()
        as_broker(server, server.url(name), "CREATE TABLE kept (n integer); INSERT INTO kept VALUES (1)")
        server.kill()
        follower.promote()
        url = server.url(name, follower, target_session_attrs="read-write")
        assert as_broker(server, url, "SELECT sum(n) FROM kept") == "1"
        as_broker(server, url, "INSERT INTO kept VALUES (2)")
    finally:
        follower.close()
