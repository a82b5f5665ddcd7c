"""Commands where the store is a database of PostgreSQL; and the way there from a SQLite file."""

import base64
import json

import pytest

import fjmcp_broker
from fjmcp_broker import ConfigurationError, Store
from rigs.processes import again, session
from rigs.rig import text_of, who
from rigs.stores import KEYS

pytestmark = pytest.mark.real("postgresql")
KEY = base64.b64encode(b"k" * 32).decode()


@pytest.fixture(params=["postgresql"])
def engine(request):
    """Only this one."""
    return request.param


@pytest.fixture
def installation(make_installation, place):
    """The program with a database of its own."""
    return make_installation(store_url=place.url, store_password=place.password, key=KEY)


def test_the_program_serves_from_a_database_and_its_commands_act_on_it(installation):
    installation.start()
    alice = session(installation)
    assert "alice" in text_of(alice.call_tool("get_my_user_info"))
    [user] = json.loads(installation.command("users", "--json").stdout)
    assert user["login"] == "alice" and user["grants"] == user["sessions"] == 1
    installation.broker.kill()
    installation.start()
    assert "alice" in text_of(again(alice).call_tool("get_my_user_info"))
    assert installation.command("revoke", "--user", "alice").stdout == "ended 1 login\n"
    assert json.loads(installation.command("sessions", "--json").stdout) == []
    assert alice.oauth.refresh().status == 400


def test_rebind_beside_a_running_broker_is_refused(installation):
    installation.start()
    for options in ((), ("--forget",)):
        done = installation.command("rebind", *options)
        assert done.returncode == 2 and "brokers are using" in done.stderr, done.stderr
    assert who(session(installation)) == "alice"
    installation.broker.stop()
    assert "already" in installation.command("rebind").stdout


def test_a_backup_of_a_database_is_its_own_programs(installation, tmp_path):
    done = installation.command("backup", str(tmp_path / "copy"))
    assert done.returncode == 2 and "pg_dump" in done.stderr and not (tmp_path / "copy").exists()


def test_a_key_file_that_is_missing_is_not_made(make_installation, place):
    installation = make_installation(store_url=place.url, store_password=place.password)
    done = installation.command("users")
    assert done.returncode == 2 and "key_file" in done.stderr and "openssl rand" in done.stderr
    assert not (installation.folder / "key").exists()


# -- check


def findings(place, monkeypatch, **facts):
    """(level, text) of what check says of a database, some of whose facts are made up."""
    settings = fjmcp_broker.load_settings(
        {
            "public_url": "https://mcp.example.org",
            "forgejo_url": "https://git.example.org",
            "forgejo_oauth_client_id": "id",
            "forgejo_oauth_client_secret": "s",
            "key": KEY,
            "store_url": place.url,
            "store_password": place.password,
        },
        {},
    )
    real = fjmcp_broker.PostgresEngine.facts
    monkeypatch.setattr(fjmcp_broker.PostgresEngine, "facts", lambda self: real(self)._replace(**facts))
    return [(level, text) for level, text, _ in fjmcp_broker.check_database(settings)]


def test_check_tries_the_database(place, monkeypatch):
    found = findings(place, monkeypatch, fsync="on")
    assert {level for level, _ in found} == {"ok"}
    assert "answers: PostgreSQL" in found[0][1] and "opens with this key" in found[1][1]


@pytest.mark.parametrize(
    "facts, level, text",
    [
        ({"synchronous_commit": "off"}, "fail", "may forget"),
        ({"fsync": "off"}, "fail", "may forget"),
        ({"now": 1.0}, "warn", "s apart"),
        ({"has_tables": False}, "ok", "will be made at the first start"),
        ({"has_tables": False, "may_make_tables": False}, "fail", "may not make tables"),
    ],
)
def test_check_says_what_is_not_well_with_the_database(place, monkeypatch, facts, level, text):
    found = findings(place, monkeypatch, **{"fsync": "on", **facts})
    assert [each for each in found if each[0] == level and text in each[1]], found


@pytest.mark.parametrize(
    "standbys, commit, level",
    [("", "on", "fail"), ("s", "local", "fail"), ("s", "remote_write", "fail"), ("s", "on", "ok")],
)
def test_check_demands_synchronous_replication_where_there_are_several_hosts(
    place, monkeypatch, standbys, commit, level
):
    host = place.url.partition("@")[2].partition("/")[0]
    several = fjmcp_broker.PostgresServer(place.url.replace(host, f"{host},{host}"), place.password)
    facts = {"fsync": "on", "synchronous_standbys": standbys, "synchronous_commit": commit}
    found = findings(several, monkeypatch, **facts)
    assert ("the next one may lack" in str(found)) == (level == "fail")


def test_check_makes_no_tables(databases, monkeypatch):
    name = databases.server.database()
    place = databases.place(name)
    found = findings(place, monkeypatch, fsync="on")
    assert ("ok", "store_url: the tables will be made at the first start") in found
    assert databases.server.sql(name, "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == "0"


# -- copy-store


def test_everything_goes_on_from_a_copied_store_and_the_old_one_serves_no_more(make_installation, place):
    installation = make_installation(key=KEY, store_password=place.password)
    installation.start()
    alice, bob = session(installation), session(installation, "bob")
    running = installation.command("copy-store", place.url)
    assert running.returncode == 2 and "another broker is using" in running.stderr
    installation.broker.stop()
    done = installation.command("copy-store", place.url)
    assert done.returncode == 0 and "2 users" in done.stdout, done.stderr
    for refused in (("serve",), ("users",), ("copy-store", place.url)):
        told = installation.command(*refused)
        assert told.returncode == 2 and place.url in told.stderr, told.stderr
    assert place.url in installation.command("check").stdout
    installation.write(**{**installation.settings, "store_url": place.url})
    installation.start()
    for mcp, name in ((alice, "alice"), (bob, "bob")):
        assert name in text_of(again(mcp).call_tool("get_my_user_info"))
        mcp.oauth.refresh()
    carol = session(installation, "bob")
    numbers = [row["grant_id"] for row in json.loads(installation.command("grants", "--json").stdout)]
    assert len(set(numbers)) == 3 and carol.call_tool("get_my_user_info")


def old_store(path, now=1_800_000_000.0):
    store = Store(path, KEYS)
    store.bound_to("https://git.example.org")
    store.documents_fail(now)
    store.update_user("1", "älice", "A\N{GRINNING FACE}", ["org"], now, 1.5)
    store.save_credential("1", bytes(range(256)), 1, 2, now, now)
    for number in range(30):
        hashes = [b"%d-%d" % (number, each) for each in range(3)]
        made = store.finish_login("1", "c", "s", "s", "r", hashes[0], "u", "ch", now, now + 60, now + 60)
        store.redeem_code(hashes[0], "c", "u", "ch", now, (hashes[1], now + 9), (hashes[2], now + 9), 3)
    store.end_grant(made, "revoked", now, for_log=True)
    store.add_session(b"s", "1", "c", "2025-11-25", {"a": "\0"}, {}, now, 10)
    return store


def contents(store, tables):
    """All rows of all tables, but what a copy adds and an engine keeps otherwise."""
    found = {}
    for table in tables:
        columns, rows = store.engine.read(f"SELECT * FROM {table}", {})
        values = [dict(zip(columns, row)) for row in rows]
        if table == "meta":
            values = [{"name": each["name"], "value": as_bytes(each["value"])} for each in values]
            values = [each for each in values if each["name"] != "copied_to"]
        found[table] = sorted(map(repr, values))
    return found


def as_bytes(value):
    return value.encode() if isinstance(value, str) else value


def test_a_copy_has_every_row_as_it_was_and_counts_on(tmp_path, place):
    source = old_store(str(tmp_path / "broker.db"))
    source.engine.run({}, ["UPDATE meta SET value = CAST(value AS TEXT) WHERE name = 'forgejo_url'"])
    target = Store(place, KEYS)
    counts = fjmcp_broker.copied(source, target)
    assert counts["grants"] == counts["codes"] == 30
    assert contents(source, counts) == contents(target, counts)
    assert target.forgejo_url() == "https://git.example.org" and source.copied_to() == place.url
    assert target.user("1") == source.user("1")
    made = target.finish_login("1", "c", "s", "s", "r", b"new", "u", "ch", 1.0, 2.0, 2.0)
    assert made == 31
    source.close()
    target.close()


def test_a_database_that_is_not_empty_is_not_copied_to(tmp_path, place):
    source, target = old_store(str(tmp_path / "broker.db")), Store(place, KEYS)
    target.update_user("7", "somebody", "", [], 1.0)
    with pytest.raises(ConfigurationError, match="is not empty"):
        fjmcp_broker.copied(source, target)
    assert source.copied_to() is None
    source.close()
    target.close()


def test_a_copy_that_fails_half_way_leaves_nothing_and_one_that_was_not_noted_is_not_made_twice(
    tmp_path, place, monkeypatch
):
    source, target = old_store(str(tmp_path / "broker.db")), Store(place, KEYS)
    real = fjmcp_broker.rows_of

    def failing(execute, tables):
        for number, step in enumerate(real(execute, tables)):
            if number == 50:
                raise OSError("no more")
            yield step

    monkeypatch.setattr(fjmcp_broker, "rows_of", failing)
    with pytest.raises(OSError):
        fjmcp_broker.copied(source, target)
    assert source.copied_to() is None and target.user("1") is None and target.healthy()
    monkeypatch.setattr(fjmcp_broker, "rows_of", real)

    def killed(engine, counts):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fjmcp_broker, "compare_counts", killed)
        with pytest.raises(KeyboardInterrupt):
            fjmcp_broker.copied(source, target)
    assert source.copied_to() is None and target.user("1")
    target.update_user("1", "renamed", "", [], 1.0)  # what is done there stays
    fjmcp_broker.copied(source, target)
    assert source.copied_to() == place.url and target.user("1").login == "renamed"
    source.close()
    target.close()


def leave_copy_unnoted(installation, place):
    """Copy the store, and be killed before the file is marked."""
    source, target = Store(str(installation.folder / "broker.db"), KEYS), Store(place, KEYS)
    fjmcp_broker.copied(source, target)
    source.engine.run({}, ["DELETE FROM meta WHERE name = 'copied_to'"])
    source.close()
    target.close()


@pytest.mark.parametrize("by", ["serve", "revoke"])
def test_what_was_done_since_an_interrupted_copy_is_not_taken_for_copied(make_installation, place, by):
    installation = make_installation(key=KEY, store_password=place.password)
    installation.start()
    session(installation)
    installation.broker.stop()
    leave_copy_unnoted(installation, place)
    if by == "serve":
        installation.start()
        session(installation, "bob")
        installation.broker.stop()
    else:
        assert installation.command("revoke", "--all").returncode == 0
    done = installation.command("copy-store", place.url)
    assert done.returncode == 2 and "is not empty" in done.stderr, done.stderr
    assert installation.command("users").returncode == 0
