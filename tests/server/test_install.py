"""Installing: safe beside writers and other installers, and no more than is needed."""

from __future__ import annotations

import logging
import multiprocessing
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import psycopg2
import pytest
from psycopg2.extensions import cursor as Cursor

import pgsignals
from pgsignals import Hub, watch
from pgsignals.core.watchers import normalize
from pgsignals.resolvers import BUILTIN
from pgsignals.testing import Server
from pgsignals.triggers import installer, names
from pgsignals.triggers.catalogue import read_installed
from pgsignals.triggers.definitions import define
from pgsignals.triggers.installer import Limits
from pgsignals.triggers.sql import Trigger
from tests.conftest import DEADLINE, Database, Recorder
from tests.waiting import eventually

OURS = """
SELECT t.tgname::text, t.tgrelid::regclass::text FROM pg_trigger t
WHERE NOT t.tgisinternal AND t.tgname LIKE 'pgsignals%' ORDER BY 2, 1
"""
FUNCTIONS = "SELECT proname::text FROM pg_proc WHERE proname LIKE 'pgsignals%' ORDER BY 1"


@contextmanager
def session(dsn: str) -> Iterator[Cursor]:
    """A connection like the one that installs."""
    connection = psycopg2.connect(dsn)
    connection.autocommit = True
    try:
        with connection.cursor() as cursor:
            yield cursor
    finally:
        connection.close()


def compiled(dsn: str, watchers: Sequence[Any], namespace: str = "default") -> list[Trigger]:
    """The triggers that these watchers need."""
    with session(dsn) as cursor:
        found = define(cursor, normalize(watchers), BUILTIN, namespace)
    return [definition.trigger for definition in found]


def install(dsn: str, watchers: Sequence[Any], namespace: str = "default") -> list[str]:
    """Install without listening; the names of what was created."""
    triggers = compiled(dsn, watchers, namespace)
    with session(dsn) as cursor:
        return [trigger.name for trigger in installer.install(cursor, namespace, triggers)]


def poll(question: Callable[[], Any]) -> Any:
    """The first answer that is true."""
    return eventually(question, bool)


class Counted(Cursor):
    """Counts its statements."""

    count = 0

    def execute(self, query: Any, parameters: Any = None) -> None:
        Counted.count += 1
        super().execute(query, parameters)


@pytest.mark.parametrize("tables", [1, 40])
def test_a_start_with_many_tables(dsn: str, db: Database, tables: int) -> None:
    """What is there already is found by as many statements for many tables as for one."""
    watched = [f"t{number}" for number in range(tables)]
    for each in watched:
        db(f"CREATE TABLE {each} (id int PRIMARY KEY)")
    install(dsn, watched)
    connection = psycopg2.connect(dsn, cursor_factory=Counted)
    connection.autocommit = True
    try:
        with connection.cursor() as cursor:
            Counted.count = 0
            found = define(cursor, normalize(watched), BUILTIN, "default")
            assert installer.install(cursor, "default", [each.trigger for each in found]) == []
    finally:
        connection.close()
    assert Counted.count <= 12


def test_a_first_start_asks_four_things_for_each_table(dsn: str, db: Database) -> None:
    """A table to install on costs four messages, and nothing is read again for each."""
    counts = []
    for tables in (10, 20):
        watched = [f"t{tables}_{number}" for number in range(tables)]
        for each in watched:
            db(f"CREATE TABLE {each} (id int PRIMARY KEY)")
        triggers = compiled(dsn, watched)
        connection = psycopg2.connect(dsn, cursor_factory=Counted)
        connection.autocommit = True
        try:
            with connection.cursor() as cursor:
                Counted.count = 0
                assert len(installer.install(cursor, "default", triggers)) == 3 * tables
        finally:
            connection.close()
        counts.append(Counted.count)
    assert counts[1] - counts[0] == 4 * 10


def test_tables_that_are_alike_have_functions_of_their_own(dsn: str, db: Database) -> None:
    """Texts that are written once for tables of one shape say nothing of any one of them."""
    db(
        "CREATE TABLE one (id int PRIMARY KEY, s text);"
        "CREATE TABLE two (id int PRIMARY KEY, t text);"
        "CREATE TABLE three (id int PRIMARY KEY, pgs_n int);"
        "CREATE TABLE parts (id int PRIMARY KEY, s text) PARTITION BY HASH (id);"
        "CREATE TABLE part PARTITION OF parts FOR VALUES WITH (MODULUS 1, REMAINDER 0)"
    )
    tables = ["one", "two", "three", "parts"]
    seen = Recorder()
    with Hub() as hub:
        for table in (*tables, "again"):
            hub.subscribe(seen, table)
        hub.start(dsn, [*tables, watch("one", label="again")])
        for number, table in enumerate(tables):
            db(f"INSERT INTO {table} VALUES ({number}); UPDATE {table} SET id = id + 10")
        found = seen.wait(10)
    assert sorted((e.table, e.op, e.label or "", e.id) for e in found) == sorted(
        (table, op, label, number + 10 * (op == "updated"))
        for number, table in enumerate(tables)
        for op in ("inserted", "updated")
        for label in (("", "again") if table == "one" else ("",))
    )


def test_a_crash_of_the_server_after_a_start_undoes_no_trigger() -> None:
    """Once installing has returned, the triggers of all tables outlive the server."""
    tables = [f"t{number}" for number in range(8)]
    with Server(fsync=True) as server:
        dsn = server.create_database()
        with session(dsn) as cursor:
            for each in tables:
                cursor.execute(f"CREATE TABLE {each} (id int PRIMARY KEY)")
        assert len(install(dsn, tables)) == 24
        server.stop("immediate")
        server.start()
        with session(dsn) as cursor:
            cursor.execute(OURS)
            assert len(cursor.fetchall()) == 24


def until_deaf(db: Database, names: Sequence[str]) -> None:
    """Wait until the server has noticed that nobody listens to the triggers any more."""
    with session(db.dsn) as cursor:
        poll(
            lambda: (
                not any(
                    item.listeners
                    for item in read_installed(cursor, "default")
                    if item.name in names
                )
            )
        )


@pytest.fixture
def orders(db: Database) -> str:
    """A table with a status and a total."""
    db("CREATE TABLE orders (id serial PRIMARY KEY, status text, total numeric)")
    return "orders"


# ---- many at once ----

PROCESSES, ROUNDS = 20, 4


def start_together(dsn: str, barrier: Any, outcomes: Any) -> None:
    """What each process does: start with the same watchers at the same moment as the others."""
    problems = []
    for number in range(ROUNDS):
        barrier.wait(100)
        try:
            hub = Hub().start(
                dsn,
                ["orders", ("users", "inserted"), watch("orders", "updated", label="again")],
                namespace=f"round {number}",
                install_timeout=60,
            )
        except BaseException as error:
            problems.append(f"{type(error).__name__}: {error}")
            hub = Hub()
        barrier.wait(100)
        hub.stop()
    outcomes.put(problems)


def test_twenty_processes_start_together_four_times(
    dsn: str, db: Database, orders: str, server: Server
) -> None:
    """None fails, and each time there is exactly one set of triggers."""
    db("CREATE TABLE users (id serial PRIMARY KEY)")
    mark = len(server.log_text())
    # Each is a fork of one that has imported this module, and that nothing runs in.
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload(["pytest", __name__])
    barrier, outcomes = forking.Barrier(PROCESSES), forking.Queue()
    processes = [
        forking.Process(target=start_together, args=(dsn, barrier, outcomes), daemon=True)
        for _ in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    assert [outcomes.get(timeout=100) for _ in processes] == [[]] * PROCESSES
    for process in processes:
        process.join(DEADLINE)
        assert process.exitcode == 0
    placed = [table for _, table in db(OURS)]
    assert placed == ["orders"] * 4 * ROUNDS + ["users"] * ROUNDS
    assert len(db(FUNCTIONS)) == 5 * ROUNDS
    assert [line for line in server.log_lines_since(mark) if "ERROR" in line] == []


def test_installers_with_the_same_tables_in_another_order(dsn: str, db: Database) -> None:
    """Two that begin at opposite ends do not wait for each other for ever."""
    tables = [f"t{number}" for number in range(4)]
    for table in tables:
        db(f"CREATE TABLE {table} (id int PRIMARY KEY)")
    with ThreadPoolExecutor(2) as pool:
        for number in range(5):
            name = f"n{number}"
            both = [pool.submit(install, dsn, order, name) for order in (tables, tables[::-1])]
            assert sum(len(each.result(DEADLINE)) for each in both) == 12
    assert len(db(OURS)) == 60


# ---- nothing without need ----


def test_a_restart_with_unchanged_watchers_runs_no_ddl(
    dsn: str, db: Database, orders: str, server: Server
) -> None:
    """The server's log shows DDL for the first start and none for the second."""
    watchers = [orders, watch(orders, "updated", columns=["status"], when="true", label="x")]
    db(f"ALTER DATABASE {db.connection.info.dbname} SET log_statement = 'ddl'")
    logged = []
    for _ in range(2):
        mark = len(server.log_text())
        Hub().start(dsn, watchers).stop()
        logged.append([line for line in server.log_lines_since(mark) if "statement:" in line])
    first, second = logged
    assert first
    assert second == []


def test_a_column_that_no_watcher_uses_changes_nothing(dsn: str, db: Database, orders: str) -> None:
    """A migration elsewhere in the table is no reason to install again."""
    assert len(install(dsn, [orders, watch(orders, "updated", extra=["status"], label="x")])) == 4
    db("ALTER TABLE orders ADD COLUMN note text, DROP COLUMN total")
    assert install(dsn, [orders, watch(orders, "updated", extra=["status"], label="x")]) == []


# ---- locked tables ----


@pytest.mark.parametrize("mode", ["ROW EXCLUSIVE", "ACCESS EXCLUSIVE"])
def test_a_locked_table_gives_a_clear_error(
    hub: Hub,
    dsn: str,
    db: Database,
    orders: str,
    connect: Callable[[str], Database],
    mode: str,
) -> None:
    """After the bounded wait the error names the table, the wait, and who holds the lock."""
    holder = connect(dsn)
    holder("SET application_name = 'nightly import'")
    holder(f"BEGIN; LOCK TABLE {orders} IN {mode} MODE")
    pid = holder.connection.info.backend_pid
    began = time.monotonic()
    with pytest.raises(pgsignals.InstallLockError) as caught:
        hub.start(dsn, [orders], lock_timeout=0.05, install_timeout=0.4)
    assert time.monotonic() - began < 5
    message = str(caught.value)
    assert re.search(r"triggers of public\.orders could not be changed within \d\.\d s", message)
    assert "tries that waited 0.05 s each: canceling statement due to lock timeout." in message
    assert f"Locks are held by pid {pid} (nightly import, idle in transaction, for " in message
    assert "install_timeout=" in message
    assert db(OURS) == []
    holder("COMMIT")
    hub.start(dsn, [orders])


def test_the_holder_of_a_partition_is_named(
    hub: Hub, dsn: str, db: Database, connect: Callable[[str], Database]
) -> None:
    """A trigger on a partitioned table needs all its partitions."""
    db("CREATE TABLE parts (id int) PARTITION BY RANGE (id)")
    db("CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (100)")
    holder = connect(dsn)
    holder("BEGIN; INSERT INTO parts_1 VALUES (1)")
    pid = holder.connection.info.backend_pid
    with pytest.raises(pgsignals.InstallLockError, match=f"Locks are held by pid {pid} "):
        hub.start(dsn, ["parts"], lock_timeout=0.05, install_timeout=0.2)


def test_an_installer_that_hangs_is_named(
    hub: Hub, dsn: str, orders: str, connect: Callable[[str], Database]
) -> None:
    """Whoever holds the lock of installers is named, too."""
    other = connect(dsn)
    other("SET application_name = 'slow installer'")
    other("SELECT pg_advisory_lock(%s, %s)", (names.LOCK_CLASS, 0))
    with pytest.raises(pgsignals.InstallLockError, match=r"held by pid \d+ \(slow installer"):
        hub.start(dsn, [orders], lock_timeout=0.05, install_timeout=0.2)


def write_until(
    dsn: str, table: str, patience: str, done: threading.Event, begun: threading.Event
) -> float:
    """Insert rows one by one until ``done``; the longest that one took, in seconds.

    The server itself makes a writer fail that waits longer for a lock than ``patience``.
    """
    longest = 0.0
    with session(dsn) as cursor:
        cursor.execute(f"SET lock_timeout = '{patience}'")
        while not done.is_set():
            began = time.monotonic()
            cursor.execute(f"INSERT INTO {table} DEFAULT VALUES")
            longest = max(longest, time.monotonic() - began)
            begun.set()
    return longest


def test_writers_never_queue_for_longer_than_the_lock_timeout(
    hub: Hub, dsn: str, db: Database, orders: str, connect: Callable[[str], Database]
) -> None:
    """While start() waits behind an open transaction, a writer waits for one try at most."""
    holder = connect(dsn)
    holder("BEGIN; INSERT INTO orders DEFAULT VALUES")
    done, begun = threading.Event(), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(write_until, dsn, orders, "500ms", done, begun)
        assert begun.wait(DEADLINE)
        try:
            with pytest.raises(pgsignals.InstallLockError):
                hub.start(dsn, [orders], lock_timeout=0.2, install_timeout=2)
        finally:
            done.set()
        longest = writer.result(DEADLINE)
    assert longest > 0.1, "no writer ever queued, so that this proves nothing"


def test_a_locked_table_does_not_hold_up_the_writers_of_another(
    hub: Hub, dsn: str, db: Database, connect: Callable[[str], Database]
) -> None:
    """An installer holds no lock of one table while it waits for another.

    Otherwise the holder's second statement would be in a deadlock with it, and one of them fail.
    """
    db("CREATE TABLE a (id serial PRIMARY KEY); CREATE TABLE b (id serial PRIMARY KEY)")
    holder = connect(dsn)
    holder("BEGIN; INSERT INTO b DEFAULT VALUES")
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(hub.start, dsn, ["a", "b"], lock_timeout=DEADLINE)
        poll(lambda: db("SELECT 1 FROM pg_locks WHERE NOT granted AND relation = 'b'::regclass"))
        holder("SET lock_timeout = '100ms'")
        holder("INSERT INTO a DEFAULT VALUES")
        holder("COMMIT")
        starting.result(DEADLINE)
    assert [table for _, table in db(OURS)] == ["a"] * 3 + ["b"] * 3


def test_it_tries_again_until_the_lock_is_free(
    hub: Hub,
    dsn: str,
    orders: str,
    connect: Callable[[str], Database],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """When the open transaction ends within install_timeout, start succeeds."""
    caplog.set_level(logging.INFO, "pgsignals")
    holder = connect(dsn)
    holder("BEGIN; INSERT INTO orders DEFAULT VALUES")
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(hub.start, dsn, [orders], lock_timeout=0.05, install_timeout=60)
        poll(lambda: "public.orders is locked; trying again in" in caplog.text)
        assert not starting.done()
        holder("COMMIT")
        starting.result(DEADLINE)


def test_a_stale_trigger_of_a_locked_table_is_left(
    hub: Hub,
    dsn: str,
    db: Database,
    orders: str,
    connect: Callable[[str], Database],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Pruning tries once; what it cannot have is logged and left to a later start."""
    db("CREATE TABLE users (id serial PRIMARY KEY)")
    [stale] = install(dsn, [(orders, "deleted")])
    holder = connect(dsn)
    holder("BEGIN; INSERT INTO orders DEFAULT VALUES")
    hub.start(dsn, ["users"], lock_timeout=0.05)
    assert f"left the stale trigger {stale}: canceling statement due to lock" in caplog.text
    assert (stale, "orders") in db(OURS)
    holder("COMMIT")
    hub.stop()
    hub.start(dsn, ["users"])
    assert (stale, "orders") not in db(OURS)


# ---- versions side by side ----


def test_two_versions_listen_side_by_side_and_the_former_is_pruned_later(
    dsn: str, db: Database, orders: str
) -> None:
    """During a deploy both versions hear everything; the former goes when nobody needs it."""
    seen = {1: Recorder(), 2: Recorder()}
    former, latter = Hub(), Hub()
    with former, latter:
        for number, hub, extra in ((1, former, ["status"]), (2, latter, ["status", "total"])):
            hub.subscribe(seen[number], orders)
            hub.start(dsn, [watch(orders, "inserted", extra=extra)])
        db("INSERT INTO orders (status, total) VALUES ('new', 3)")
        assert seen[1].wait(1)[0].values == {"status": "new"}
        assert seen[2].wait(1)[0].values == {"status": "new", "total": 3}
        for hub in (former, latter):
            states = hub.status().watchers
            assert [(s.status, s.listeners) for s in states] == [("INSTALLED", 1)] * 2
        [old] = compiled(dsn, [watch(orders, "inserted", extra=["status"])])
        former.stop()
        until_deaf(db, [old.name])
        assert len(db(OURS)) == 2
        with Hub().start(dsn, [watch(orders, "inserted", extra=["status", "total"])]):
            [(left, _)] = db(OURS)
        db("INSERT INTO orders (status, total) VALUES ('newer', 4)")
        assert seen[2].wait(2)[1].values["status"] == "newer"
    [trigger] = compiled(dsn, [watch(orders, "inserted", extra=["status", "total"])])
    assert left == trigger.name


def test_prune_false_leaves_everything(hub: Hub, dsn: str, db: Database, orders: str) -> None:
    """A start may be told to remove nothing."""
    [stale] = install(dsn, [(orders, "deleted")])
    hub.start(dsn, [(orders, "inserted")], prune=False)
    assert (stale, "orders") in db(OURS)


def test_pruners_do_not_disturb_each_other(dsn: str, db: Database, orders: str) -> None:
    """Several that find the same stale triggers remove them once, without an error."""

    def prune(_: int) -> int:
        with session(dsn) as cursor:
            return len(installer.prune(cursor, "default"))

    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            install(dsn, [orders])
            list(pool.map(prune, range(4)))
            assert db(OURS) == db(FUNCTIONS) == []


def test_prune_can_be_narrowed_to_names(dsn: str, db: Database, orders: str) -> None:
    """``only`` keeps it off all other stale triggers."""
    names = install(dsn, [orders])
    with session(dsn) as cursor:
        [removed] = installer.prune(cursor, "default", only=[names[0], "pgsignals_other"])
    assert removed.name == names[0]
    assert sorted(name for name, _ in db(OURS)) == sorted(names[1:])


def test_a_hub_that_reconnects_creates_what_was_pruned_meanwhile(
    hub: Hub, server: Server, db: Database, dsn: str, orders: str, recorder: Recorder
) -> None:
    """While a hub was cut off nobody knew of it; when it is back it has its triggers again."""
    hub.subscribe(recorder, orders)
    back = threading.Event()
    hub.on_gap(lambda gap: back.set())
    hub.start(dsn, [orders])
    names = [name for name, _ in db(OURS)]
    name = db.connection.info.dbname
    with session(server.dsn()) as admin, session(dsn) as cursor:
        admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        cursor.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'pgsignals' AND datname = current_database()"
        )
        poll(lambda: not any(item.listeners for item in read_installed(cursor, "default")))
        assert len(installer.prune(cursor, "default")) == 3
        admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    assert back.wait(DEADLINE)
    assert [name for name, _ in db(OURS)] == names
    db("INSERT INTO orders DEFAULT VALUES")
    assert recorder.wait(1)[0].op == "inserted"


# ---- damage and its repair ----

DAMAGES = {
    "disabled": ("ALTER TABLE orders DISABLE TRIGGER {name}", "OUTDATED", "trigger is disabled"),
    "always": (
        "ALTER TABLE orders ENABLE ALWAYS TRIGGER {name}",
        "OUTDATED",
        "somebody has changed when the trigger fires",
    ),
    "edited": (
        "CREATE OR REPLACE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql"
        " AS 'BEGIN RETURN NULL; END'",
        "OUTDATED",
        "somebody has changed the function",
    ),
    "trigger dropped": (
        "DROP TRIGGER {name} ON orders",
        "MISSING",
        "its function is there, but not the trigger",
    ),
    "all dropped": ("DROP FUNCTION {name}() CASCADE", "MISSING", ""),
    "table swapped": (
        "ALTER TABLE orders RENAME TO orders_old;"
        " CREATE TABLE orders (LIKE orders_old INCLUDING ALL)",
        "MISSING",
        "the table that had it is now public.orders_old",
    ),
}


@pytest.mark.parametrize(("damage", "status", "detail"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_seen_and_repaired(
    hub: Hub,
    each_dsn: str,
    each_db: Database,
    recorder: Recorder,
    damage: str,
    status: str,
    detail: str,
) -> None:
    """What somebody did to a trigger shows in ``check`` and is mended by the next start."""
    each_db("CREATE TABLE orders (id serial PRIMARY KEY)")
    [name] = install(each_dsn, [("orders", "inserted")])
    each_db(damage.format(name=name))
    with pytest.raises(pgsignals.DriftError) as caught:
        Hub().start(each_dsn, [("orders", "inserted")], install="check")
    assert f"\n  {status} inserted on public.orders" in str(caught.value)
    assert detail in str(caught.value)
    hub.subscribe(recorder, "orders")
    hub.start(each_dsn, [("orders", "inserted")])
    assert [state.status for state in hub.status().watchers] == ["INSTALLED"]
    assert each_db(OURS) == [(name, "orders")]
    each_db("INSERT INTO orders DEFAULT VALUES")
    assert recorder.wait(1)[0].table == "orders"


def test_a_dropped_table_leaves_a_function_that_is_pruned(
    hub: Hub, dsn: str, db: Database, orders: str
) -> None:
    """PostgreSQL drops a table's triggers and not their functions; the next start does."""
    install(dsn, [orders])
    db("DROP TABLE orders; CREATE TABLE users (id serial PRIMARY KEY)")
    assert (len(db(OURS)), len(db(FUNCTIONS))) == (0, 3)
    hub.start(dsn, ["users"])
    assert (len(db(OURS)), len(db(FUNCTIONS))) == (3, 3)


def test_a_table_that_has_moved_loses_its_stale_trigger(
    hub: Hub, dsn: str, db: Database, orders: str
) -> None:
    """A trigger goes with its table into another schema; it is ours there, too."""
    install(dsn, [orders])
    db("CREATE SCHEMA archive; ALTER TABLE orders SET SCHEMA archive")
    hub.start(dsn, [("archive.orders", "inserted")])
    [(_, table)] = db(OURS)
    assert table == "archive.orders"
    assert len(db(FUNCTIONS)) == 1


STRANGE = 'we"ird. "sch%sema\'; DROP TABLE x; --'


def test_a_strange_name_lives_through_everything(
    hub: Hub, dsn: str, db: Database, recorder: Recorder
) -> None:
    """Installing, status, repair, check, and uninstalling quote whatever the schema is called."""
    quoted = '"' + STRANGE.replace('"', '""') + '"'
    db(f"CREATE SCHEMA {quoted}")
    db(f"CREATE TABLE {quoted}.{quoted} (id serial PRIMARY KEY)")
    model = f"{quoted}.{quoted}"
    hub.subscribe(recorder, model)
    hub.start(dsn, [(model, "inserted")])
    db(f"INSERT INTO {quoted}.{quoted} DEFAULT VALUES")
    event = recorder.wait(1)[0]
    assert (event.schema, event.table) == (STRANGE, STRANGE)
    [state] = hub.status().watchers
    assert (state.status, state.schema, state.table) == ("INSTALLED", STRANGE, STRANGE)
    hub.stop()
    db(f"ALTER TABLE {quoted}.{quoted} DISABLE TRIGGER USER")
    with pytest.raises(pgsignals.DriftError, match="DROP TABLE x"):
        hub.start(dsn, [(model, "inserted")], install="check")
    assert len(install(dsn, [(model, "inserted")])) == 1
    until_deaf(db, [state.name])
    with session(dsn) as cursor:
        assert len(installer.uninstall(cursor, "default")) == 1
    assert db(FUNCTIONS) == []


# ---- what is not ours ----


@pytest.mark.parametrize("kind", ["trigger", "function", "function of the trigger"])
def test_something_foreign_that_has_our_name_is_refused_and_left(
    hub: Hub, dsn: str, db: Database, orders: str, kind: str
) -> None:
    """An object without our comment is not ours, even by the very name: the error says so."""
    [trigger] = compiled(dsn, [(orders, "inserted")])
    body = "() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'"
    function = "foreign_function" if kind == "trigger" else trigger.name
    db(f"CREATE FUNCTION {function}{body}")
    if kind != "function":
        db(
            f"CREATE TRIGGER {trigger.name} AFTER INSERT ON orders"
            f" FOR EACH ROW EXECUTE FUNCTION {function}()"
        )
    before = db(OURS), db(FUNCTIONS)
    with pytest.raises(pgsignals.DatabaseError, match=r"already exists.*is not ours.*left alone"):
        hub.start(dsn, [(orders, "inserted")])
    with session(dsn) as cursor:
        assert installer.prune(cursor, "default") == []
        assert installer.uninstall(cursor, "default", force=True) == []
    assert (db(OURS), db(FUNCTIONS)) == before


# ---- install= ----


def test_check_names_all_that_is_missing_and_the_fix(
    hub: Hub, dsn: str, db: Database, orders: str
) -> None:
    """``install="check"`` changes nothing; its error lists each trigger and what to run."""
    install(dsn, [(orders, "inserted")])
    watchers = [
        watch(orders, "inserted", extra=["status"]),
        watch(orders, "updated", columns=["status"], label="changed"),
    ]
    before = db(OURS), db(FUNCTIONS)
    with pytest.raises(pgsignals.DriftError) as caught:
        hub.start(dsn, watchers, install="check")
    assert str(caught.value) == (
        'install="check" found triggers that are not as the watchers need them:\n'
        "  OUTDATED inserted on public.orders:"
        " installed for another definition of the watcher or of the table\n"
        "  MISSING updated on public.orders (label 'changed')\n"
        "As the tables' owner, run `pgsignals install` with these watchers, or apply what "
        "`pgsignals sql` prints."
    )
    assert (db(OURS), db(FUNCTIONS)) == before
    assert not hub.running


def test_check_passes_when_everything_is_there(
    hub: Hub, dsn: str, db: Database, orders: str, recorder: Recorder
) -> None:
    """``install="check"`` starts when an owner has installed, and prunes nothing."""
    install(dsn, [orders, watch(orders, "updated", label="stale")])
    hub.subscribe(recorder, orders)
    hub.start(dsn, [orders], install="check")
    db("INSERT INTO orders DEFAULT VALUES")
    assert recorder.wait(1)[0].id == 1
    assert len(db(OURS)) == 4


def test_off_does_not_look(
    hub: Hub, dsn: str, db: Database, orders: str, recorder: Recorder
) -> None:
    """``install="off"`` starts without triggers, and hears as soon as somebody installs them."""
    hub.subscribe(recorder, orders)
    hub.start(dsn, [orders], install="off")
    assert {state.status for state in hub.status().watchers} == {"MISSING"}
    db("INSERT INTO orders DEFAULT VALUES")
    assert len(install(dsn, [orders])) == 3
    db("INSERT INTO orders DEFAULT VALUES")
    assert recorder.wait(1)[0].id == 2


# ---- uninstall ----


def test_uninstall_refuses_while_somebody_listens(
    hub: Hub, dsn: str, db: Database, orders: str
) -> None:
    """The triggers of a running hub stay, unless it is forced."""
    hub.start(dsn, [orders])
    with session(dsn) as cursor:
        with pytest.raises(pgsignals.DatabaseError, match=r"listener needs \w+ on public.*force"):
            installer.uninstall(cursor, "default")
        assert len(db(OURS)) == 3
        assert len(installer.uninstall(cursor, "default", force=True)) == 3
    assert db(OURS) == db(FUNCTIONS) == []


def test_uninstall_waits_for_locks_like_install(
    dsn: str, db: Database, orders: str, connect: Callable[[str], Database]
) -> None:
    """A table in use gives the same clear error after a bounded wait."""
    install(dsn, [orders])
    holder = connect(dsn)
    holder("BEGIN; SELECT FROM orders")
    with session(dsn) as cursor:
        with pytest.raises(pgsignals.InstallLockError, match=r"public\.orders could not be"):
            installer.uninstall(cursor, "default", limits=Limits(0.05, 0.2))
        holder("COMMIT")
        installer.uninstall(cursor, "default")
    assert db(OURS) == []


# ---- starting while somebody removes ----


def test_a_start_between_look_and_removal_keeps_the_triggers(
    hub: Hub,
    dsn: str,
    db: Database,
    orders: str,
    connect: Callable[[str], Database],
    recorder: Recorder,
) -> None:
    """``uninstall`` that saw nobody listen looks again at the last moment."""
    install(dsn, [orders])
    gate = connect(dsn)
    gate("SELECT pg_advisory_lock(%s, %s)", (names.LOCK_CLASS, names.INSTALL_LOCK))

    def uninstall() -> None:
        with session(dsn) as cursor:
            installer.uninstall(cursor, "default")

    with ThreadPoolExecutor(1) as pool:
        removal = pool.submit(uninstall)
        poll(lambda: db("SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"))
        hub.subscribe(recorder, orders)
        hub.start(dsn, [orders])
        gate("SELECT pg_advisory_unlock_all()")
        with pytest.raises(pgsignals.DatabaseError, match="A listener needs"):
            removal.result(DEADLINE)
    db("INSERT INTO orders DEFAULT VALUES")
    assert recorder.wait(1)[0].id == 1


def test_a_start_while_the_trigger_is_being_pruned_creates_it_again(
    hub: Hub,
    dsn: str,
    db: Database,
    orders: str,
    connect: Callable[[str], Database],
    recorder: Recorder,
) -> None:
    """Whoever starts waits for whoever removes, and then finds the trigger gone."""
    install(dsn, [(orders, "inserted")])
    reader = connect(dsn)
    reader("BEGIN; SELECT FROM orders")

    def prune() -> int:
        with session(dsn) as cursor:
            return len(installer.prune(cursor, "default", limits=Limits(lock=DEADLINE)))

    with ThreadPoolExecutor(2) as pool:
        pruning = pool.submit(prune)
        poll(lambda: db("SELECT 1 FROM pg_locks WHERE locktype = 'relation' AND NOT granted"))
        hub.subscribe(recorder, orders)
        starting = pool.submit(hub.start, dsn, [(orders, "inserted")])
        poll(lambda: db("SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"))
        reader("COMMIT")
        assert pruning.result(DEADLINE) == 1
        starting.result(DEADLINE)
    db("INSERT INTO orders DEFAULT VALUES")
    assert recorder.wait(1)[0].id == 1
