"""The store on PostgreSQL: what becomes of a batch when server, wire or another broker comes between."""

import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import fjmcp_broker
from fjmcp_broker import ConfigurationError, PostgresServer, Store, StoreUnavailable, token_hash
from rigs.cut_wire import COMMIT, CutWire
from rigs.loopback import free_port
from rigs.postgresql_server import AS_NOBODY
from rigs.rig import rows
from rigs.stores import KEYS, NOW, add_client, add_grant, redeem

pytestmark = pytest.mark.real("postgresql")


@pytest.fixture(params=["postgresql"])
def engine(request):
    """Only this one."""
    return request.param


@pytest.fixture
def store(place):
    made = Store(place, KEYS)
    yield made
    made.close()


def once(*plans):
    """A plan for a wire: what happens to the first message that one of these pairs names.

    A pair is a test of a message, and what happens then.
    """
    left = list(plans)

    def plan(message):
        for test, what in left:
            if test(message):
                left.clear()
                return what
        return None

    return plan


def is_commit(message):
    return message == COMMIT


def fill(store):
    store.update_user("1", "alice", "Alice", [], NOW)
    add_client(store)


# -- commits whose answer is lost


@pytest.mark.parametrize("what", ["before", "after"])
def test_a_commit_whose_answer_is_lost_is_looked_up_and_its_code_redeemed_once(place, store, what):
    fill(store)
    add_grant(store, "code")
    with CutWire(place) as wire:
        beyond = Store(wire.place, KEYS)
        wire.plan = once((is_commit, what))
        made = redeem(beyond, "code", "1")
        assert made and made.sub == "1"
        assert redeem(beyond, "code", "2") is None
        beyond.close()
    assert [row.n for row in rows(store, "SELECT count(*) AS n FROM access_tokens")] == [1]
    assert store.bearer(token_hash("1a"), NOW) and store.bearer(token_hash("2a"), NOW) is None


@pytest.mark.parametrize("what", ["before", "after"])
def test_a_connection_that_is_cut_at_any_message_loses_nothing_and_does_nothing_twice(place, store, what):
    fill(store)
    for number in range(40):
        with CutWire(place) as wire:
            beyond = Store(wire.place, KEYS)
            count = itertools.count()
            cut = once((lambda message, count=count, number=number: next(count) == number, what))
            wire.plan = cut
            add_grant(beyond, f"code{number}")
            was_cut = next(count) > number
            beyond.close()
        assert (
            len(rows(store, "SELECT 1 FROM grants")) == len(rows(store, "SELECT 1 FROM codes")) == number + 1
        )
        if not was_cut:
            break
    assert number > 5


def test_a_commit_that_nobody_can_look_up_is_unavailable_and_its_lock_is_free_again(
    place, store, monkeypatch
):
    monkeypatch.setattr(fjmcp_broker, "BUSY_WAIT", 1)
    monkeypatch.setattr(fjmcp_broker, "SETTLE_WAIT", 1)
    monkeypatch.setattr(fjmcp_broker, "AWAY_PAUSE", 0)
    fill(store)
    with CutWire(place) as wire:
        beyond = Store(wire.place, KEYS)
        seen = []
        wire.plan = lambda message: "hold" if seen or is_commit(message) and not seen.append(1) else None
        with pytest.raises(StoreUnavailable):
            add_grant(beyond, "code")
        wire.plan = lambda message: None
        monkeypatch.setattr(fjmcp_broker, "BUSY_WAIT", 30)
        beyond.update_user("2", "bob", "Bob", [], NOW)
        beyond.close()
    assert store.user("2")


def test_a_batch_that_was_looked_up_is_never_committed_later(store):
    engine = store.engine
    assert engine._is_committed("never begun") is False
    with pytest.raises(fjmcp_broker.PostgresError) as found:
        connection = engine._writer.connection(time.monotonic() + 30)
        connection.command(fjmcp_broker.BEGIN_BATCH.format(batch="never begun"), time.monotonic() + 30)
    engine._writer.drop()
    assert found.value.code == "23505"
    assert engine._is_committed("never begun") is False


# -- several at once


def test_brokers_that_write_the_same_row_at_once_all_get_through(place):
    stores = [Store(place, KEYS) for _ in range(3)]
    fill(stores[0])
    failures = []

    def work(store):
        try:
            for _ in range(15):
                assert store.save_credential("1", b"box", 0, 0, NOW, NOW)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert not failures and stores[0].user("1").credential_seq == 45
    for store in stores:
        store.close()


def test_of_brokers_that_redeem_or_rotate_the_same_at_once_only_one_does(place):
    stores = [Store(place, KEYS) for _ in range(3)]
    fill(stores[0])
    for number in range(5):
        add_grant(stores[0], f"code{number}")
        results, barrier = [], threading.Barrier(3)

        def race(store, name, number=number, results=results, barrier=barrier):
            barrier.wait(30)
            results.append(redeem(store, f"code{number}", name))

        threads = [
            threading.Thread(target=race, args=(store, f"{number}.{nth}")) for nth, store in enumerate(stores)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len([each for each in results if each]) == 1 and len(results) == 3
    for store in stores:
        store.close()


def test_brokers_that_start_at_once_on_an_empty_database_make_its_tables_once(databases):
    server = databases.server
    place = databases.place(server.database())
    stores, failures = [], []

    def start():
        try:
            stores.append(Store(place, KEYS))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures and len(stores) == 4
    assert len(rows(stores[0], "SELECT version FROM schema_version")) == 1
    for store in stores:
        assert store.healthy()
        store.close()


# -- a pooler between

POOLER = """
[databases]
* = host={host} port={port} user=fjmcp
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = 2
"""


@pytest.fixture
def pooled(place, databases, real_part):
    """The database through pgbouncer, by whose rules no two transactions need be on the same connection."""
    server = databases.server
    listen = free_port("127.0.0.1")
    configuration = server.folder / f"pgbouncer{listen}.ini"
    configuration.write_text(POOLER.format(host=server.folder, port=server.port, listen=listen))
    configuration.chmod(0o644)
    words = [*(AS_NOBODY if os.geteuid() == 0 else ()), real_part("pgbouncer"), "-q", str(configuration)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    yield PostgresServer(f"postgresql://fjmcp@127.0.0.1:{listen}/{place.url.rpartition('/')[2]}")
    process.terminate()
    process.wait()


@pytest.mark.real("pgbouncer")
def test_several_brokers_share_a_pooler_that_gives_each_batch_another_connection(pooled, monkeypatch):
    monkeypatch.setattr(fjmcp_broker, "BUSY_WAIT", 60)  # it may still be starting
    stores = [Store(pooled, KEYS) for _ in range(4)]
    fill(stores[0])
    failures = []

    def work(number, store):
        try:
            for n in range(8):
                name = f"{number}.{n}"
                assert (
                    add_grant(store, name)
                    and redeem(store, name, name)
                    and redeem(store, name, "x" + name) is None
                )
                assert store.bearer(token_hash(name + "a"), NOW)
                assert store.save_credential("1", b"box", 0, 0, NOW, NOW)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=each) for each in enumerate(stores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert not failures and stores[0].user("1").credential_seq == 32
    assert stores[0].engine._is_committed("never begun") is False
    for store in stores:
        assert store.change_marker() == stores[0].change_marker()
        store.close()


# -- the server goes and comes


def test_a_server_that_is_killed_under_load_loses_nothing_that_was_answered(own_postgresql, monkeypatch):
    monkeypatch.setattr(fjmcp_broker, "BUSY_WAIT", 60)
    monkeypatch.setattr(fjmcp_broker, "SETTLE_WAIT", 60)
    server = own_postgresql()
    place = PostgresServer(server.url(server.database(), socket=True))
    stores = [Store(place, KEYS) for _ in range(2)]
    fill(stores[0])
    done, failures, stop = [], [], threading.Event()

    def work(number, store):
        try:
            for n in itertools.count():
                name = f"{number}.{n}"
                if stop.is_set():
                    return
                assert add_grant(store, name) and redeem(store, name, name)
                done.append(name)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=each) for each in enumerate(stores)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        seen = len(done)
        while len(done) < seen + 10 and not failures:
            time.sleep(0.01)
        server.kill()
        server.start()
    stop.set()
    for thread in threads:
        thread.join(100)
    assert not failures
    for name in done:
        assert stores[0].bearer(token_hash(name + "a"), NOW) and redeem(stores[1], name, "x" + name) is None
    numbers = [rows(stores[0], f"SELECT count(*) AS n FROM {table}")[0].n for table in ("grants", "codes")]
    assert numbers == [len(done)] * 2
    for store in stores:
        store.close()


def test_a_server_that_was_restarted_or_killed_is_found_again(own_postgresql):
    server = own_postgresql()
    place = PostgresServer(server.url(server.database()), "correct horse")
    store = Store(place, KEYS)
    fill(store)
    server.restart()
    assert store.user("1").login == "alice"
    add_grant(store, "code")
    server.kill()
    server.start()
    assert redeem(store, "code", "1") and store.bearer(token_hash("1a"), NOW)
    store.close()


def test_a_server_that_is_away_makes_the_store_unavailable_until_it_is_back(own_postgresql, monkeypatch):
    server = own_postgresql()
    store = Store(PostgresServer(server.url(server.database()), "correct horse"), KEYS)
    fill(store)
    monkeypatch.setattr(fjmcp_broker, "BUSY_WAIT", 0.5)
    monkeypatch.setattr(fjmcp_broker, "AWAY_PAUSE", 0)
    server.stop()
    with pytest.raises(StoreUnavailable) as error:
        add_grant(store, "code")
    assert error.value.status == 503 and "correct horse" not in error.value.reason
    assert not store.healthy()
    monkeypatch.setattr(fjmcp_broker, "BUSY_WAIT", 30)
    server.start()
    assert add_grant(store, "code") and store.healthy()
    store.close()


def test_of_several_hosts_the_one_that_can_be_written_to_is_used(own_postgresql, monkeypatch):
    server = own_postgresql()
    follower = server.standby()
    try:
        name = server.database()
        store = Store(PostgresServer(follower.url(name, server), "correct horse"), KEYS)
        fill(store)
        monkeypatch.setattr(fjmcp_broker, "BUSY_WAIT", 30)
        server.kill()
        follower.promote()
        assert store.user("1").login == "alice" and add_grant(store, "code")
        store.close()
    finally:
        follower.close()


def test_a_server_that_became_read_only_is_left_for_one_that_can_be_written_to(store):
    fill(store)
    connection = store.engine._writer.connection(time.monotonic() + 30)
    connection.command("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY", time.monotonic() + 30)
    assert add_grant(store, "code")


def test_a_host_that_never_answers_has_its_share_of_the_time_only(place, monkeypatch):
    monkeypatch.setattr(fjmcp_broker, "BUSY_WAIT", 4)
    silent = socket.create_server(("127.0.0.1", 0))
    url = place.url.replace("@", "@127.0.0.1:%d," % silent.getsockname()[1])
    store = Store(PostgresServer(url, place.password), KEYS)
    assert store.healthy()
    store.close()
    silent.close()


def test_a_server_that_falls_silent_costs_the_time_of_a_batch_and_a_new_connection(place, monkeypatch):
    with CutWire(place) as wire:
        beyond = Store(wire.place, KEYS)
        fill(beyond)
        monkeypatch.setattr(fjmcp_broker, "BUSY_WAIT", 0.5)
        monkeypatch.setattr(fjmcp_broker, "AWAY_PAUSE", 0)
        wire.plan = lambda message: "hold"
        for act in (lambda: beyond.user("1"), lambda: add_grant(beyond, "code")):
            with pytest.raises(StoreUnavailable) as error:
                act()
            assert "no answer in time" in error.value.reason
        wire.plan = lambda message: None
        monkeypatch.setattr(fjmcp_broker, "BUSY_WAIT", 30)
        assert beyond.user("1") and add_grant(beyond, "code")
        beyond.close()


def test_who_queues_while_no_connection_can_be_had_does_not_wait_in_turn(place, monkeypatch):
    with CutWire(place) as wire:
        beyond = Store(wire.place, KEYS)
        monkeypatch.setattr(fjmcp_broker, "BUSY_WAIT", 0.5)
        monkeypatch.setattr(fjmcp_broker, "AWAY_PAUSE", 100)
        wire.plan = lambda message: "hold"
        reasons = []
        for _ in range(3):
            with pytest.raises(StoreUnavailable) as error:
                beyond.user("1")
            reasons.append(error.value.reason.rpartition(": ")[2])
        assert reasons[2] == "there was no connection a moment ago"
        monkeypatch.setattr(fjmcp_broker, "AWAY_PAUSE", 0)
        wire.plan = lambda message: None
        monkeypatch.setattr(fjmcp_broker, "BUSY_WAIT", 30)
        assert beyond.user("1") is None
        beyond.close()


def test_a_batch_that_cannot_be_leaves_nothing_open(store):
    fill(store)
    store.open_account(b"browser", "1", NOW)
    with pytest.raises(StoreUnavailable):
        store.open_account(b"browser", "1", NOW)
    assert add_grant(store, "code")
    idle = "SELECT count(*) AS n FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'"
    assert rows(store, idle + " AND datname = current_database()")[0].n == 0


# -- what is refused, with the remedy


def test_a_wrong_password_is_unavailable_and_shown_nowhere(databases, monkeypatch):
    monkeypatch.setattr(fjmcp_broker, "BUSY_WAIT", 8)
    with pytest.raises(StoreUnavailable) as error:
        Store(PostgresServer(databases.server.url("postgres"), "wrong horse"), KEYS)
    assert "password authentication failed" in error.value.reason and "wrong horse" not in error.value.reason


def test_an_old_server_is_refused(place, monkeypatch):
    monkeypatch.setattr(fjmcp_broker, "OLDEST_POSTGRESQL", 999)
    with pytest.raises(ConfigurationError, match="it must be 999 or newer"):
        Store(place, KEYS)


def test_a_store_of_a_newer_release_is_refused_and_left_as_it_was(place, store):
    store.engine.run({}, ["UPDATE schema_version SET version = 999"])
    with pytest.raises(ConfigurationError, match=r"newer version of this program \(schema 999\)"):
        Store(place, KEYS)
    store.engine.run({}, [f"UPDATE schema_version SET version = {len(fjmcp_broker.MIGRATIONS)}"])


def test_a_user_who_may_make_no_tables_is_told_so(databases):
    server = databases.server
    name = server.database()
    server.sql("postgres", f"ALTER DATABASE {name} OWNER TO postgres")
    server.sql(name, "REVOKE CREATE ON SCHEMA public FROM public")
    with pytest.raises(ConfigurationError, match="createdb --owner"):
        Store(databases.place(name), KEYS)


def test_a_wrong_key_refuses_to_start_and_names_the_database(place, store):
    with pytest.raises(ConfigurationError, match="key_file: the key does not belong to PostgreSQL database"):
        Store(place, fjmcp_broker.Keyring([b"x" * 32]))


def test_without_the_client_library_the_package_is_named(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(fjmcp_broker.ctypes, "CDLL", missing)
    with pytest.raises(ConfigurationError, match="libpq5"):
        fjmcp_broker.libpq.__wrapped__()


# -- the client library


PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import fjmcp_broker as b
place = b.PostgresServer(sys.argv[2], sys.argv[3]) if sys.argv[3] else sys.argv[2]
store = b.Store(place, b.Keyring([b"k" * 32]))
print(store.healthy(), "libpq" in open("/proc/self/maps").read())
store.close()
"""


def run(where, password="", **environment):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(Path(fjmcp_broker.__file__).parent), where, password],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )
    return done.stdout.split(), done.stderr


def test_no_variable_of_libpq_is_honoured(place):
    wrong = {"PGSERVICE": "none", "PGHOSTADDR": "127.0.0.9", "PGUSER": "nobody", "PGOPTIONS": "-c nothing=1"}
    assert run(place.url, place.password, PGSSLMODE="require", **wrong) == (["True", "True"], "")


def test_without_store_url_the_client_library_is_not_loaded(tmp_path):
    assert run(str(tmp_path / "broker.db")) == (["True", "False"], "")


def test_values_come_back_as_they_went(store):
    values = {
        "t": "ä\u2028\N{GRINNING FACE}",
        "i": -(2**62),
        "f": 0.1 + 0.2,
        "b": bytes(range(256)),
        "o": True,
    }
    kinds = {"t": "TEXT", "i": "INTEGER", "f": "REAL", "b": "BLOB", "o": "BOOLEAN", "n": "TEXT"}
    statement = "SELECT " + ", ".join(f"CAST(:{name} AS {kind}) AS {name}" for name, kind in kinds.items())
    columns, found = store.engine.read(statement, {**values, "n": None})
    assert columns == list(kinds) and found == [(*values.values(), None)]
    assert store.engine.read("SELECT CAST(:t AS TEXT)", {"t": "a\0b"})[1] == [
        ("a\N{REPLACEMENT CHARACTER}b",)
    ]


def test_what_a_server_notes_is_not_written_to_stderr(store, capfd):
    connection = store.engine._writer.connection(time.monotonic() + 30)
    connection.command("DO $$ BEGIN RAISE WARNING 'noted'; END $$", time.monotonic() + 30)
    assert capfd.readouterr().err == ""


def test_old_batches_are_dropped(store):
    fill(store)
    store.engine.run({}, ["UPDATE batches SET made_at = made_at - interval '1 hour'"])
    store.engine._next_sweep = 0
    assert len(rows(store, "SELECT 1 FROM batches")) > 2
    store.change_marker()
    assert rows(store, "SELECT 1 FROM batches") == []


# -- time


def test_the_times_of_a_store_are_the_databases(store):
    began = time.time()
    now = store.clock().now()
    assert began - 5 < now < time.time() + 5
    store.change_marker()
    assert abs(store.clock().now() - store.clock().boottime()) < 5


def test_small_differences_of_the_databases_clock_are_followed_and_one_that_was_set_is_told(monkeypatch):
    machine = fjmcp_broker.Clock
    at = [1000.0]
    monkeypatch.setattr(machine, "boottime", lambda self: at[0])
    clock = fjmcp_broker.DatabaseClock()
    clock.observe(NOW, 1000.0)
    assert clock.now() == clock.boottime() == NOW
    at[0] = 1100.0
    clock.observe(NOW + 100.5, 1100.0)  # it runs faster
    assert clock.now() == clock.boottime() == NOW + 100.5
    clock.observe(NOW + 3700.5, 1100.0)  # somebody set it
    assert clock.boottime() == NOW + 100.5 and clock.now() == NOW + 3700.5
    at[0] = 1200.0
    clock.observe(NOW + 3801.0, 1200.0)  # and it still runs faster
    assert clock.boottime() == NOW + 201.0 and clock.now() == NOW + 3801.0
    at[0] = 1300.0
    clock.observe(NOW, 1200.0)  # an answer that took too long says nothing
    assert clock.now() == NOW + 3901.0
