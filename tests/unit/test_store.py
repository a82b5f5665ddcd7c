"""The store: what is on disk, who may open it, and what a crash between any two statements leaves."""

import ast
import contextlib
import inspect
import json
import os
import random
import re
import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import fjmcp_broker
from fjmcp_broker import ConfigurationError, Keyring, Store, StoreUnavailable, token_hash
from rigs.rig import rows
from rigs.stores import DAY, KEYS, NOW, add_client, add_grant, pair, redeem


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "broker.db")


@pytest.fixture
def store(place):
    """A store on each engine."""
    made = Store(place, KEYS)
    yield made
    made.close()


@pytest.fixture
def sqlite_store(path):
    made = Store(path, KEYS)
    yield made
    made.close()


def is_sqlite(store):
    return isinstance(store.engine, fjmcp_broker.SqliteEngine)


def add_user(store, sub="1", login="alice"):
    store.update_user(sub, login, login, [], NOW)
    store.save_credential(sub, b"box", 1, 1, NOW + 3600, NOW)
    store.set_user_status(sub, "active")


def filled(store):
    """A user, a client, a grant with its first pair, and a session."""
    add_user(store)
    add_client(store)
    grant = add_grant(store)
    assert redeem(store)
    store.add_session(b"s", "1", "c", "2025-11-25", {}, {}, NOW, 10)
    return grant


def contents(path):
    """Every row of every table."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        names = [
            name
            for (name,) in db.execute(
                "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%' AND name != "
                "'meta' ORDER BY 1"
            )
        ]
        return {name: sorted(map(repr, db.execute(f"SELECT * FROM {name}"))) for name in names}


# -- the files


def test_G01_files_are_private_whatever_the_umask(path):
    before = os.umask(0)
    try:
        store = Store(path, KEYS)
        add_user(store)
        for name in (path, path + "-wal", path + "-shm", path + ".lock"):
            assert stat.S_IMODE(os.stat(name).st_mode) == 0o600, name
        store.close()
    finally:
        os.umask(before)
    os.chmod(path, 0o644)
    Store(path, KEYS).close()
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_G02_a_link_in_the_stores_place_is_not_followed(tmp_path, path):
    (tmp_path / "victim").write_text("keep")
    os.symlink(tmp_path / "victim", path)
    with pytest.raises(ConfigurationError):
        Store(path, KEYS)
    assert (tmp_path / "victim").read_text() == "keep"


def test_G02_a_file_that_is_somebody_elses_is_refused(path, monkeypatch):
    Store(path, KEYS).close()

    def not_ours(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", not_ours)
    with pytest.raises(ConfigurationError, match="cannot use .*Operation not permitted"):
        Store(path, KEYS)


def test_G01_the_programs_files_are_private_whatever_the_umask(make_installation):
    before = os.umask(0)
    try:
        installation = make_installation()
        installation.start()
    finally:
        os.umask(before)
    made = {
        name: stat.S_IMODE((installation.folder / name).stat().st_mode)
        for name in ("broker.db", "broker.db-wal", "broker.db-shm", "broker.db.lock", "key")
    }
    assert set(made.values()) == {0o600}, made


def test_G04_what_was_revoked_is_gone_from_the_files(sqlite_store, path):
    grant = filled(sqlite_store)
    sqlite_store.rotate(token_hash("1r"), None, NOW, *pair("2"), b"a sealed successor")
    gone = (token_hash("1a"), token_hash("2a"), b"a sealed successor")
    assert all(any(part in Path(name).read_bytes() for name in (path, path + "-wal")) for part in gone)
    sqlite_store.end_grant(grant, "revoked", NOW)
    sqlite_store.close()
    left = b"".join(file.read_bytes() for file in Path(path).parent.iterdir())
    assert not any(part in left for part in gone)
    sqlite_store.__init__(path, KEYS)  # for the fixture's close


def test_every_commit_is_on_disk_before_the_call_returns(sqlite_store):
    for connection in (sqlite_store.engine._writer, sqlite_store.engine._reader):
        pragmas = {
            name: connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("journal_mode", "synchronous", "secure_delete", "foreign_keys", "trusted_schema")
        }
        assert pragmas == {
            "journal_mode": "wal",
            "synchronous": 2,
            "secure_delete": 1,
            "foreign_keys": 1,
            "trusted_schema": 0,
        }


def test_G07_a_second_broker_is_kept_out_and_a_command_is_not(sqlite_store, path):
    with pytest.raises(ConfigurationError, match="another broker is using"):
        Store(path, KEYS)
    beside = Store(path, KEYS, alone=False)
    add_user(beside)
    assert sqlite_store.user("1").login == "alice"
    beside.close()


def test_G08_what_is_no_store_is_refused_and_left_as_it_was(path):
    Path(path).write_bytes(b"not a database, but somebody's data" * 100)
    with pytest.raises(ConfigurationError, match="cannot be used"):
        Store(path, KEYS)
    assert Path(path).read_bytes().startswith(b"not a database")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:4096],
        lambda data: data[:-5000],
        lambda data: data[:100] + b"\xff" * 200 + data[300:],
        lambda data: b"\xff" * 16 + data[16:],
        lambda data: data[:8192] + os.urandom(4096) + data[12288:],
    ],
    ids=["cut to a page", "cut in a page", "first page", "header", "another page"],
)
def test_G08_a_damaged_store_is_refused_and_never_made_anew(path, spoil):
    store = Store(path, KEYS)
    filled(store)
    store.close()
    damaged = spoil(Path(path).read_bytes())
    Path(path).write_bytes(damaged)
    with pytest.raises(ConfigurationError, match="cannot be used"):
        Store(path, KEYS)
    assert Path(path).read_bytes() == damaged


def test_G08_an_emptied_store_lets_nobody_in(path):
    store = Store(path, KEYS)
    filled(store)
    store.close()
    Path(path).write_bytes(b"")  # as a first start leaves it that was killed before its first commit
    store = Store(path, KEYS)
    assert store.bearer(token_hash("1a"), NOW) is None and store.find_grants("all", "", NOW) == []
    store.close()


def test_G07_a_process_that_keeps_it_locked_costs_writers_a_wait_and_readers_nothing(path, monkeypatch):
    monkeypatch.setattr(fjmcp_broker, "BUSY_WAIT", 0.3)
    store = Store(path, KEYS)
    filled(store)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    refused = []

    def write():
        try:
            add_client(store, "late")
        except StoreUnavailable as error:
            refused.append(error.status)

    threads = [threading.Thread(target=write) for _ in range(6)]
    for thread in threads:
        thread.start()
    assert store.bearer(token_hash("1a"), NOW)
    for thread in threads:
        thread.join(20)
    assert refused == [503] * 6  # nobody queues up behind those who wait
    other.execute("ROLLBACK")
    add_client(store, "late")
    assert store.client("late")
    other.close()
    store.close()


def test_G06_the_token_endpoint_issues_nothing_that_is_not_committed(rig):
    client = rig.login()
    before = dict(client.tokens)
    writer = rig.broker.store.engine._writer
    writer.execute(f"PRAGMA max_page_count = {writer.execute('PRAGMA page_count').fetchone()[0]}")
    with contextlib.suppress(StoreUnavailable):
        for number in range(1000):
            rig.broker.store.add_client(f"big{number}", "dynamic", "n" * 1000, [], None, "none", {}, NOW)
    while True:  # what room is left in the last pages
        answer = client.refresh()
        if answer.status != 200:
            break
    assert (
        answer.status == 503
        and answer.json()["error"] == "temporarily_unavailable"
        and answer.headers["retry-after"]
    )
    assert before["access_token"] and rig.broker.store.healthy()
    writer.execute("PRAGMA max_page_count = 1000000")
    assert client.refresh().status == 200


def test_G15_whatever_is_in_a_field_stays_in_it(store):
    nasty = "x'; DROP TABLE users; --\" \\ %s {0} ? :now \u202e"
    store.update_user("1", nasty, nasty, [nasty], NOW)
    store.add_client(nasty, "dynamic", nasty, [nasty], None, nasty, {nasty: nasty}, NOW)
    store.finish_login("1", nasty, nasty, nasty, nasty, b"h", nasty, nasty, NOW, NOW + 60, NOW + 60)
    assert (
        store.user("1").login == nasty
        and store.client(nasty).name == nasty
        and store.user("1").groups == [nasty]
    )
    assert [row.client_id for row in store.find_grants("client", nasty, NOW)] == [nasty]
    assert not store.find_grants("client", "' OR 1 --", NOW) and not store.find_grants("user", "%", NOW)


def values_of(expression):
    """The statements that an argument stands for.

    NameError for one that is put together while the program runs.
    """
    if isinstance(expression, ast.Starred):
        return [text for part in values_of(expression.value) for text in part]
    if isinstance(expression, ast.IfExp):
        return values_of(expression.body) + values_of(expression.orelse)
    if isinstance(expression, ast.Subscript):
        return list(evaluated(expression.value).values())
    return [evaluated(expression)]


def evaluated(expression):
    return eval(compile(ast.Expression(expression), "<statement>", "eval"), dict(vars(fjmcp_broker)))


def statements():
    """(method, statement) for all that the store runs, from the syntax tree."""
    which = {"_run": slice(1, None), "_run_each": slice(0, 1), "_all": slice(1, 2), "_one": slice(1, 2)}
    which["_read"] = slice(0, 1)
    found = []
    for owner in Store.__mro__[:-1]:
        for method in ast.parse(inspect.getsource(owner)).body[0].body:
            for node in ast.walk(method):
                name = node.func.attr if is_call_of_self(node) else ""
                if name in which and method.name not in ("_all", "_one"):
                    found += [
                        (method.name, text)
                        for argument in node.args[which[name]]
                        for text in values_of(argument)
                    ]
    return found


def is_call_of_self(node):
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "self"
    )


def test_G15_SQL_is_built_from_the_programs_own_words_only():
    found = statements()
    assert len(found) > 80 and {type(text) for _, text in found} == {str}


ROWS_OF = {"client_row": fjmcp_broker.ClientRow, "user_row": fjmcp_broker.UserRow}


def test_the_fields_of_a_row_are_the_columns_of_its_statement(store):
    compared = set()
    for node in ast.walk(ast.parse(inspect.getsource(fjmcp_broker))):
        if is_call_of_self(node) and node.args and node.func.attr in ("_all", "_one"):
            make = ast.unparse(node.args[0])
            row = ROWS_OF.get(make) or getattr(fjmcp_broker, make.removesuffix("._make"), None)
            for statement in values_of(node.args[1]) if hasattr(row, "_fields") else ():
                nothing = dict.fromkeys(re.findall(r":(\w+)", statement), 0 if is_sqlite(store) else None)
                columns, _ = store._read(statement, nothing)
                assert tuple(columns) == row._fields, statement
                compared.add(row)
    assert len(compared) > 12


def test_G13_a_wrong_key_refuses_to_start_and_names_the_store(path):
    Store(path, KEYS).close()
    with pytest.raises(ConfigurationError, match="does not belong to"):
        Store(path, Keyring([b"x" * 32]))
    Store(path, Keyring([b"n" * 32, b"k" * 32])).close()


def test_G13_a_lost_key_file_is_never_made_anew_beside_an_existing_store(make_rig):
    rig = make_rig()
    rig.stop()
    key = Path(rig.values["store_path"] + ".key")
    kept = key.read_text()
    key.unlink()
    with pytest.raises(ConfigurationError, match="Put the key back"):
        rig.start()
    assert not key.exists()
    key.write_text(kept)
    rig.start()


# -- versions


def test_G09_a_store_of_a_newer_program_is_refused_and_left_as_it_was(path):
    Store(path, KEYS).close()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(ConfigurationError, match="newer version"):
        Store(path, KEYS)


def test_G09_a_migration_happens_whole_or_not_at_all(path, monkeypatch):
    store = Store(path, KEYS)
    filled(store)
    store.close()
    before = contents(path)
    steps = "ALTER TABLE users ADD COLUMN note TEXT;\nUPDATE users SET note = login;\n"
    monkeypatch.setattr(fjmcp_broker, "MIGRATIONS", (*fjmcp_broker.MIGRATIONS, steps + "this is not SQL;\n"))
    with pytest.raises((StoreUnavailable, ConfigurationError)):
        Store(path, KEYS)
    assert contents(path) == before
    monkeypatch.setattr(fjmcp_broker, "MIGRATIONS", (*fjmcp_broker.MIGRATIONS[:-1], steps))
    store = Store(path, KEYS)
    assert rows(store, "SELECT note FROM users") == [("alice",)] and store.session(b"s", "1", "c")
    store.close()


OLD_STORES = Path(__file__).resolve().parent / "stores"
LATER = (
    "ALTER TABLE users ADD COLUMN note TEXT;\nUPDATE users SET note = login;\nCREATE INDEX users_by_note ON "
    "users (note);\n"
)


def old_store(path):
    """A store as the first released file left it."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript((OLD_STORES / "version1.sql").read_text())


def still_good(path):
    """What a user of the old store has.

    A token, a refresh token, a session, a credential that opens, a login under way.
    """
    store = Store(path, KEYS)
    try:
        assert store.bearer(token_hash("a2-alice"), NOW).login == "alice" and store.bearer(
            token_hash("a2-bob"), NOW
        )
        assert store.session(token_hash("session-bob"), "2", "fjd_app") and store.client(
            "own"
        ).secret_hash == token_hash("hush")
        assert KEYS.unseal("upstream", "user:1", store.user("1").credential) == {
            "access": "access-alice",
            "refresh": "refresh-alice",
        }
        assert (
            store.refresh_token(token_hash("r1-alice")).rotated_at == NOW
            and store.refresh_token(token_hash("r2-alice")).ended_at is None
        )
        assert len(store.find_grants("all", "", NOW)) == 3
        assert store.take_login(token_hash("state"), NOW).kind == "client"
        assert store.rotate(token_hash("r2-bob"), None, NOW, *pair("next"), b"box")
        return rows(store, "PRAGMA user_version")[0][0]
    finally:
        store.close()


@pytest.mark.parametrize("later", [False, True])
def test_G09_a_store_of_the_first_release_is_brought_up_to_date_and_nothing_is_lost(path, monkeypatch, later):
    if later:
        monkeypatch.setattr(fjmcp_broker, "MIGRATIONS", (*fjmcp_broker.MIGRATIONS, LATER))
    old_store(path)
    assert still_good(path) == len(fjmcp_broker.MIGRATIONS)


def test_what_the_first_release_stored_has_its_new_names(path):
    old_store(path)
    with contextlib.closing(sqlite3.connect(path)) as db:
        asked = db.execute("SELECT grant_id, asked FROM grants ORDER BY 1").fetchall()
        db.execute("UPDATE users SET state = 'refused' WHERE sub = '2'")
        db.execute("INSERT INTO binaries VALUES ('f', 'legacy', 1, ?)", (NOW,))
        db.commit()
    store = Store(path, KEYS)
    assert rows(store, "SELECT grant_id, requested_scope FROM grants ORDER BY 1") == asked and len(asked) == 4
    assert store.bearer(token_hash("a2-alice"), NOW).requested_scope == asked[0][1]
    assert (store.user("1").status, store.user("2").status) == ("active", "refused")
    assert store.credential_ages(["1", "2"]).keys() == {"1"} and store.program("f") == ("legacy", 1)
    store.close()


KILLED_MIGRATION = """
import itertools, os, shutil, sys
sys.path.insert(0, sys.argv[1])
import fjmcp_broker as b
b.MIGRATIONS = (*b.MIGRATIONS, sys.argv[3])
connect = b.SqliteEngine._connect

def migrate(path, number):
    count = itertools.count()
    def traced(path):
        connection = connect(path)
        connection.set_trace_callback(lambda sql: next(count) == number and os.kill(os.getpid(), 9))
        return connection
    b.SqliteEngine._connect = staticmethod(traced)
    b.Store(path, b.Keyring([b"k" * 32])).close()
    os._exit(0)

for number in itertools.count():
    path = sys.argv[2] + "." + str(number)
    shutil.copy(sys.argv[2], path)
    status = os.waitpid(os.fork() or migrate(path, number), 0)[1]
    print(path, os.waitstatus_to_exitcode(status), flush=True)
    if status != 9:
        break
"""


def test_G09_a_migration_killed_between_any_two_statements_is_whole_or_did_not_begin(tmp_path, monkeypatch):
    versions = len(fjmcp_broker.MIGRATIONS)
    monkeypatch.setattr(fjmcp_broker, "MIGRATIONS", (*fjmcp_broker.MIGRATIONS, LATER))
    template, seen = str(tmp_path / "template.db"), set()
    old_store(template)
    done = subprocess.run(
        [sys.executable, "-c", KILLED_MIGRATION, str(Path(fjmcp_broker.__file__).parent), template, LATER],
        capture_output=True,
        text=True,
        timeout=100,
    )
    ends = [line.split() for line in done.stdout.splitlines()]
    assert len(ends) > 40 and [code for _, code in ends] == ["-9"] * (len(ends) - 1) + ["0"], done.stderr
    for path, _ in ends:
        with contextlib.closing(sqlite3.connect(path)) as db:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            assert ("note" in [row[1] for row in db.execute("PRAGMA table_info(users)")]) == (
                version == versions + 1
            )
        seen.add(version)
        assert still_good(path) == versions + 1
    assert {1, versions + 1} <= seen


DOCUMENT = (Path(fjmcp_broker.__file__).parent / "docs" / "storage.md").read_text()


def described():
    """{table: its section of docs/storage.md}."""
    sections = re.split(r"^## ", DOCUMENT, flags=re.MULTILINE)[1:]
    return {name: text for text in sections for name in text.partition("\n")[0].split(", ")}


def test_every_column_is_described_and_stands_in_an_example(sqlite_store):
    tables = {}
    for table, column in rows(
        sqlite_store,
        "SELECT m.name, c.name AS column_name FROM sqlite_master m, pragma_table_info(m.name) c"
        " WHERE m.type = 'table' AND m.name NOT LIKE 'sqlite%'",
    ):
        tables.setdefault(table, set()).add(column)
    sections = described()
    assert tables.keys() <= sections.keys() and len(tables) == 15
    for table, columns in tables.items():
        text = sections[table]
        prose = "\n".join(line for line in text.splitlines() if line.startswith("|"))
        assert columns <= set(re.findall(r"`(\w+)`", prose)), table
        examples, start = [], text.index("```json\n") + 8
        while text[start] == "{":
            example, length = json.JSONDecoder().raw_decode(text[start:])
            examples.append(set(example))
            start += length + 1
        assert columns in examples, table


# -- work that grows with what others have stored


def explained(store, act):
    """(plan of each statement that runs, steps of SQLite's machine that all took together).

    Of something done to a store.
    """
    statements, steps = [], []
    store.engine._writer.set_trace_callback(statements.append)
    store.engine._writer.set_progress_handler(lambda: steps.append(1), 10)
    act()
    store.engine._writer.set_trace_callback(None)
    store.engine._writer.set_progress_handler(None, 0)
    words = ("INSERT", "UPDATE", "DELETE", "SELECT")
    return {
        statement: [row.detail for row in rows(store, "EXPLAIN QUERY PLAN " + statement)]
        for statement in statements
        if statement.strip().startswith(words)
    }, len(steps)


MAY_SCAN = {
    "listing": "an operator's table",
    "find_grants": "an operator's search",
    "boxes": "a command: every box",
    "replace_box": "a command: boxes have no index",
    "known_people": "a command",
    "rebind": "a command: every session",
    "bound_to": "at the start: whether there is any user",
    "_check_key": "at the start: whether there is any credential",
    "sweep": "leases: one for each user whose credential is being refreshed, and each login under way",
    "callbacks": "the same",
    "brokers": "a handful",
    "report_broker": "a handful",
    "forget_broker": "leases, as above",
    "count_sessions": "counts the entries of an index",
    "end_orphaned_sessions": "each minute: the index of owners",
    "save_program": "20 rows",
}


def test_what_runs_for_requests_and_by_the_clock_finds_its_rows_by_an_index(sqlite_store):
    scans = {}
    for method, statement in statements():
        nothing = dict.fromkeys(re.findall(r":(\w+)", statement))
        for step in rows(sqlite_store, "EXPLAIN QUERY PLAN " + statement, nothing):
            if step.detail.startswith("SCAN") and "json_each" not in step.detail:
                scans.setdefault(method, []).append(step.detail)
    assert scans.keys() == MAY_SCAN.keys(), scans


def many_grants(store, count):
    with store.engine._batch() as db:
        db.executemany(
            "INSERT INTO grants (sub, client_id, scope, requested_scope, resource, created_at, used_at, "
            "expires_at) VALUES ('1', ?, 'x', 'x', 'r', 0, 0, ?)",
            [(f"fjd_{number}", NOW + DAY) for number in range(count)],
        )


def keep_document(store, number):
    uris = ["https://h.example/"]
    store.keep_document(f"https://h{number}.example/c", "n", uris, "none", {}, NOW, NOW + 60, keep=100)


@pytest.mark.parametrize(
    "act",
    [lambda s: keep_document(s, 1000), lambda s: s.sweep(NOW, DAY), lambda s: s.end_orphaned_sessions(NOW)],
    ids=["keep_document", "sweep", "end_orphaned_sessions"],
)
def test_nothing_that_is_done_while_others_wait_reads_all_grants(sqlite_store, act):
    add_user(sqlite_store)
    many_grants(sqlite_store, 10)
    for number in range(120):
        keep_document(sqlite_store, number)
        add_client(sqlite_store, f"fjd_{number}")
    plans, _ = explained(sqlite_store, lambda: act(sqlite_store))
    assert any("grants" in statement for statement in plans)
    for statement, plan in plans.items():
        assert not any(re.match(r"SCAN (grants|g|codes)\b(?! USING)", line) for line in plan), (
            statement,
            plan,
        )


def test_making_room_for_a_document_costs_the_same_whatever_grants_there_are(sqlite_store):
    add_user(sqlite_store)
    for number in range(150):
        keep_document(sqlite_store, number)
    steps = []
    for count in (100, 10_000):
        many_grants(sqlite_store, count)
        steps.append(explained(sqlite_store, lambda: keep_document(sqlite_store, len(steps) + 1000))[1])
    assert steps[0] > 10 and steps[1] < 1.2 * steps[0] + 10
    assert rows(sqlite_store, "SELECT count(*) AS n FROM clients")[0].n == 100


# -- crashes


class Crash(BaseException):
    """What `kill -9` is to a transaction: nothing after it happens."""


def crashing(connection, after):
    """Make a connection's statement number `after` (of a batch) the last; COMMIT counts as one."""
    count = iter(range(after))

    class Failing:
        def __init__(self):
            self.dead = False

        def execute(self, sql, *parameters):
            if not self.dead and next(count, None) is None:
                self.dead = True
                raise Crash(sql)
            return connection.execute(sql, *parameters)

        def executemany(self, sql, rows):
            self.execute("SELECT 1")
            return connection.executemany(sql, rows)

        def __getattr__(self, name):
            return getattr(connection, name)

    return Failing()


OPERATIONS = {
    "finish_login": lambda s, g: add_grant(s, "second"),
    "redeem_code": lambda s, g: (add_grant(s, "second"), redeem(s, "second", "2")),
    "rotate": lambda s, g: s.rotate(token_hash("1r"), None, NOW, *pair("2"), b"successor"),
    "end_grant": lambda s, g: s.end_grant(g, "revoked", NOW),
    "add_session": lambda s, g: s.add_session(b"t", "1", "c", "2025-11-25", {}, {}, NOW + 1, 1),
    "save_credential": lambda s, g: s.save_credential("1", b"new box", 1, 2, NOW + 7200, NOW),
    "update_user": lambda s, g: s.update_user("1", "renamed", "n", ["g"], NOW),
    "sweep": lambda s, g: s.sweep(NOW + 400 * DAY, 90 * DAY),
    "take_login": lambda s, g: (
        s.approve_login(b"l", b"f", b"b", "client", b"x", NOW + 60),
        s.take_login(b"l", NOW),
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_crash_between_any_two_statements_leaves_all_or_nothing(tmp_path, name):
    outcomes = []
    for after in range(40):
        path = str(tmp_path / f"{after}.db")
        store = Store(path, KEYS)
        grant = filled(store)
        before = repr(contents(path))
        real = store.engine._writer
        store.engine._writer = crashing(real, after)
        crashed = False
        try:
            OPERATIONS[name](store, grant)
        except Crash:
            crashed = True
        store.engine._writer = real
        real.rollback()
        store.close()
        outcomes.append((crashed, repr(contents(path)), before))
        if not crashed:
            break
    assert not outcomes[-1][0] and len(outcomes) > 2
    whole = {outcome for crashed, outcome, _ in outcomes}
    # An operation of one batch has two states, before and
    # after; two batches in a row have one more in between.
    assert len(whole) <= (3 if name in ("redeem_code", "take_login") else 2)
    assert outcomes[0][1] == outcomes[0][2] and outcomes[-1][1] != outcomes[-1][2]


LOADED = """
import os, sys
sys.path.insert(0, sys.argv[2])
import fjmcp_broker as b
from fjmcp_broker import token_hash
s, now, run = b.Store(sys.argv[1], b.Keyring([b'k' * 32])), 1_800_000_000.0, sys.argv[3]
s.update_user("1", "alice", "", [], now)
s.add_client("c", "dynamic", "n", [], None, "none", {}, now)
for number in range(100_000):
    name = f"{run}.{number}"
    code, soon, late = token_hash(name), now + 60, now + 99999
    def pair(access, refresh):
        return (token_hash(name + access), soon), (token_hash(name + refresh), late)
    s.finish_login("1", "c", "forgejo:read", "forgejo:read", "r", code, "u", "ch", now, late, soon)
    assert s.redeem_code(code, "c", "u", "ch", now, *pair("a", "r"), 3)
    os.write(1, f"redeemed {name}\\n".encode())
    assert s.rotate(token_hash(name + "r"), None, now, *pair("A", "R"), b"box")
    os.write(1, f"rotated {name}\\n".encode())
"""


def test_G05_kill_9_under_load_leaves_no_half_grant_and_nothing_usable_twice(path):
    chance = random.Random(7)
    for run in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", LOADED, path, str(Path(fjmcp_broker.__file__).parent), str(run)],
            stdout=subprocess.PIPE,
            text=True,
        )
        said = [process.stdout.readline() for _ in range(chance.randrange(1, 60))]
        process.kill()
        said += process.stdout.read().splitlines(keepends=True)
        process.wait()
        process.stdout.close()
        with contextlib.closing(sqlite3.connect(path)) as db:
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            assert db.execute(
                "SELECT count(*) FROM grants WHERE grant_id NOT IN (SELECT grant_id FROM codes)"
            ).fetchone() == (0,)
            assert db.execute(
                "SELECT count(*) FROM codes WHERE used_at IS NOT NULL AND grant_id NOT IN (SELECT grant_id "
                "FROM access_tokens)"
            ).fetchone() == (0,)
        store = Store(path, KEYS)
        for line in filter(lambda line: line.endswith("\n"), said):
            what, name = line.split()
            if what == "redeemed":
                assert (
                    store.redeem_code(token_hash(name), "c", "u", "ch", NOW, *pair("again" + name), 3) is None
                )
            else:
                assert store.rotate(token_hash(name + "r"), None, NOW, *pair("again" + name), b"box") is None
                assert store.refresh_token(token_hash(name + "R")).rotated_at is None
        store.close()


def test_G05_kill_9_after_the_call_returned_keeps_what_it_wrote(path):
    program = (
        "import sys, os; sys.path.insert(0, sys.argv[2]); import fjmcp_broker as b\n"
        "s = b.Store(sys.argv[1], b.Keyring([b'k' * 32]))\n"
        "for n in range(50): s.add_client(f'c{n}', 'dynamic', 'n', [], None, 'none', {}, 1.0)\n"
        "print('done', flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, path, str(Path(fjmcp_broker.__file__).parent)],
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == -9 and done.stdout == b"done\n"
    store = Store(path, KEYS)
    assert all(store.client(f"c{n}") for n in range(50))
    store.close()


def test_G06_a_full_disk_changes_nothing_and_is_forgotten_once_there_is_room(sqlite_store):
    filled(sqlite_store)
    pages = sqlite_store.engine._writer.execute("PRAGMA page_count").fetchone()[0]
    sqlite_store.engine._writer.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreUnavailable) as error:
        for number in range(1000):
            sqlite_store.add_client(f"big{number}", "dynamic", "n" * 1000, [], None, "none", {}, NOW)
    assert error.value.status == 503 and ("Retry-After", "5") in error.value.headers
    assert sqlite_store.bearer(token_hash("1a"), NOW) and sqlite_store.healthy()
    kept = sum(sqlite_store.client(f"big{n}") is not None for n in range(1000))
    assert kept < 1000 and sqlite_store.client(f"big{kept}") is None
    sqlite_store.engine._writer.execute("PRAGMA max_page_count = 1000000")
    add_client(sqlite_store, "small")
    assert sqlite_store.client("small")


def test_G16_many_threads_at_once_lose_nothing(store):
    add_user(store)
    add_client(store)
    failures = []

    def work(number):
        try:
            for n in range(20):
                code, name = f"{number}-{n}", f"{number}.{n}"
                add_grant(store, code)
                assert redeem(store, code, name)
                assert store.bearer(token_hash(name + "a"), NOW).sub == "1"
                assert store.rotate(token_hash(name + "r"), None, NOW, *pair(name + "x"), b"box")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    grants = store.find_grants("all", "", NOW)
    assert len(grants) == 160 and store.living_pairs(["1"], NOW) == {("1", "c")}


def test_of_two_that_redeem_or_rotate_the_same_only_one_does(store):
    filled(store)
    add_grant(store, "second")
    for attempt in (
        lambda name: redeem(store, "second", name),
        lambda name: store.rotate(token_hash("1r"), None, NOW, *pair(name), b"box"),
    ):
        results, barrier = [], threading.Barrier(6)

        def race(name, attempt=attempt, results=results, barrier=barrier):
            barrier.wait(30)
            results.append(attempt(name))

        threads = [threading.Thread(target=race, args=(f"race{id(attempt)}{n}",)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len([result for result in results if result]) == 1 and len(results) == 6


# -- what goes, what stays


def test_the_last_grant_of_an_owner_takes_its_sessions_along_and_another_keeps_them(store):
    first = filled(store)
    second = add_grant(store, "second")
    assert redeem(store, "second", "2")
    store.end_grant(first, "revoked", NOW)
    assert store.session(b"s", "1", "c") and store.bearer(token_hash("1a"), NOW) is None
    store.end_grant(second, "revoked", NOW)
    assert store.session(b"s", "1", "c") is None
    assert store.end_grant(second, "revoked", NOW) is None


def test_G17_sweeping_drops_what_had_its_time_and_keeps_what_reuse_detection_needs(store):
    filled(store)
    store.rotate(token_hash("1r"), None, NOW, *pair("2"), b"successor")
    store.sweep(NOW + 130, 90 * DAY)
    rotated = store.refresh_token(token_hash("1r"))
    assert rotated.rotated_at == NOW and rotated.successor is None
    assert store.sweep(NOW + 89 * DAY, 90 * DAY) == []
    assert store.refresh_token(token_hash("1r")) and store.bearer(token_hash("1a"), NOW) is None
    assert store.sweep(NOW + 91 * DAY + 1, 90 * DAY) == [b"s"]
    store.sweep(NOW + 93 * DAY, 90 * DAY)
    assert store.refresh_token(token_hash("1r")) is None and store.client("c") is None


def test_10_000_registrations_are_kept_then_swept_by_age_but_never_one_with_a_live_login(sqlite_store):
    add_user(sqlite_store)
    sqlite_store.engine.run_each(
        "INSERT INTO clients (client_id, kind, name, redirect_uris, auth_method, metadata, created_at,"
        " used_at) VALUES (:client_id, 'dynamic', 'n', '[]', 'none', '{}', :now, :now)",
        [{"client_id": f"d{n}", "now": NOW} for n in range(10_000)],
    )
    add_grant(sqlite_store, "code", client="d77")
    sqlite_store.redeem_code(token_hash("code"), "d77", "https://x.example/cb", "ch", NOW, *pair("1"), 3)
    sqlite_store.sweep(NOW + 29 * DAY, 90 * DAY)
    assert sqlite_store.client("d0") and sqlite_store.client("d9999")
    sqlite_store.sweep(NOW + 31 * DAY, 90 * DAY)
    assert (
        rows(sqlite_store, "SELECT count(*) AS n FROM clients")[0].n >= 9_000
    )  # a sweep takes a small batch
    for _ in range(20):
        sqlite_store.sweep(NOW + 31 * DAY, 90 * DAY)
    assert (
        sqlite_store.client("d77")
        and sqlite_store.client("d0") is None
        and sqlite_store.client("d9999") is None
    )


def test_above_the_rows_of_a_user_the_one_unused_for_longest_goes(store):
    add_user(store)
    for number in range(3):
        assert store.add_session(b"%d" % number, "1", "c", "v", {}, {}, NOW + number, 3) == []
    store.touch_sessions({b"0": NOW + 100})
    assert store.add_session(b"3", "1", "c", "v", {}, {}, NOW + 101, 3) == [b"1"]
    assert store.session(b"0", "1", "c")


@pytest.mark.parametrize(
    "grant, count, wins", [(1, 6, True), (1, 5, True), (1, 4, False), (2, 1, True), (0, 0, True)]
)
def test_of_two_credentials_the_one_that_forgejo_counted_later_stays(store, grant, count, wins):
    store.update_user("1", "alice", "", [], NOW)
    store.save_credential("1", b"first", 1, 5, NOW, NOW)
    assert bool(store.save_credential("1", b"second", grant, count, NOW, NOW)) is wins
    assert store.user("1").credential == (b"second" if wins else b"first")


def test_a_state_set_for_an_older_credential_does_not_stick(store):
    add_user(store)
    seen = store.user("1").credential_seq
    store.save_credential("1", b"newer", 1, 2, NOW, NOW)
    assert not store.set_user_status("1", "logged_out", seen)
    assert store.user("1").status == "active"


def test_everybody_sees_that_somebody_committed(store, place):
    before = store.change_marker()
    assert store.change_marker() == before
    add_client(store, "a")
    ours = store.change_marker()
    assert ours != before
    beside = Store(place, KEYS, alone=False)
    add_client(beside, "b")
    beside.close()
    assert store.change_marker() != ours


# -- registrations that nobody has logged in through


def register(store, client_id, network="203.0.113.0/24", now=NOW, **limits):
    store.register_client(
        client_id, "name", ["https://x.example/cb"], None, "none", {}, network, now, **limits
    )


def registered(store):
    return {row.client_id for row in rows(store, "SELECT client_id FROM clients")}


def test_of_unused_registrations_of_a_network_the_oldest_of_an_hour_go(store):
    for number in range(5):
        register(store, f"a{number}", now=NOW + number, hourly=3)
    register(store, "b", "198.51.100.0/24", NOW + 5, hourly=3)
    assert registered(store) == {"a2", "a3", "a4", "b"}
    register(store, "later", now=NOW + 3604, hourly=1)  # those before are an hour old
    assert registered(store) == {"a2", "a3", "b", "later"} | {"a4"}


def test_of_all_unused_registrations_the_oldest_go_and_none_that_was_used(store):
    add_user(store)
    register(store, "c", now=NOW)
    add_grant(store)
    for number in range(6):
        register(store, f"a{number}", f"198.51.{number}.0/24", NOW + number, total=4)
    assert registered(store) == {"c", "a2", "a3", "a4", "a5"}
    row = store.client("c")
    assert row.unused_since is None and row.network is None


def test_a_registration_at_the_limits_reads_an_index_and_no_row(sqlite_store):
    """Its cost is that of counting entries of an index, however large the rows are."""
    ran = []
    sqlite_store.engine._writer.set_trace_callback(ran.append)
    register(sqlite_store, "a")
    sqlite_store.engine._writer.set_trace_callback(None)
    deletes = [text for text in ran if text.strip().startswith("DELETE FROM clients")]
    assert len(deletes) == 2
    for statement, index in zip(deletes, ("clients_by_network", "clients_unused"), strict=True):
        steps = [row.detail for row in rows(sqlite_store, "EXPLAIN QUERY PLAN " + statement)]
        reads = [step for step in steps if step.startswith(("SCAN", "SEARCH"))]
        assert reads[0].startswith("SEARCH clients USING PRIMARY KEY")  # what is deleted, if anything
        assert all(f"USING COVERING INDEX {index}" in step for step in reads[1:]) and len(reads) == 2, steps


def test_a_registrations_network_is_forgotten_after_an_hour_and_a_logins_box_with_its_time(store):
    register(store, "a")
    store.approve_login(b"s", b"f", b"b", "client", b"box", NOW + 600)
    store.answer_login(b"s", b"box")
    store.sweep(NOW + 599, 90 * DAY)
    assert [(row.sealed, row.answer) for row in rows(store, "SELECT * FROM logins")] == [(b"box", b"box")]
    store.sweep(NOW + 3599, 90 * DAY)
    assert store.client("a").network == "203.0.113.0/24"
    assert [(row.sealed, row.answer) for row in rows(store, "SELECT * FROM logins")] == [(None, None)]
    store.sweep(NOW + 3601, 90 * DAY)
    row = store.client("a")
    assert row.network is None and row.unused_since == NOW


def test_what_an_older_store_registered_and_nobody_used_is_counted(path):
    old_store(path)
    with contextlib.closing(sqlite3.connect(path)) as db:
        kinds = db.execute("SELECT client_id, kind, used_at <= created_at FROM clients").fetchall()
    store = Store(path, KEYS)
    for client_id, kind, unused in kinds:
        assert (store.client(client_id).unused_since is not None) == (kind == "dynamic" and bool(unused))
    store.close()
    assert any(kind == "dynamic" for _, kind, _ in kinds)
