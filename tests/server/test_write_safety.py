"""A watcher never breaks a write, whatever is taken from a trigger's function, or fails in it."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial

import psycopg2
import pytest
from psycopg2 import errors as pg

import pgsignals
from pgsignals import Hub, watch
from pgsignals.hub.hub import Delivery
from pgsignals.testing import Server
from tests.conftest import DEADLINE, Database, Recorder
from tests.table_changes import covering
from tests.waiting import eventually

# Tables of each kind, and writes that fire every trigger in every way, twice in a transaction.
TABLES = """
CREATE TABLE plain (id int PRIMARY KEY, note text, total int);
CREATE TABLE parted (id int, note text, total int, PRIMARY KEY (id)) PARTITION BY HASH (id);
CREATE TABLE parted_0 PARTITION OF parted FOR VALUES WITH (MODULUS 1, REMAINDER 0);
CREATE FUNCTION big(total int) RETURNS boolean LANGUAGE sql RETURN total > -1
"""
WRITES = """
INSERT INTO {table} SELECT n, pg_catalog.repeat('long', n * 900), n
  FROM pg_catalog.generate_series(1, 3) AS n;
UPDATE {table} SET note = 'b', id = id + 100 WHERE id < 3;
DELETE FROM {table} WHERE id = 101
"""


def watchers(table: str) -> list[pgsignals.Watcher]:
    """One of each kind."""
    return [
        watch(table, "inserted", "deleted", extra=["note"]),
        watch(table, "updated", columns=["note"], when="public.big(NEW.total)"),
    ]


class Safety:
    """A database whose triggers belong to a role that is no superuser, and a writer."""

    def __init__(self, db: Database, role: str, delivery: Delivery) -> None:
        self.db = db
        self.role = role
        self.delivery = delivery

    def survives(self, damage: str, writes: str) -> None:
        """Do damage, write, and undo both; fails with PostgreSQL's error if the write does."""
        self.db("BEGIN")
        try:
            self.db(damage)
            self.db(f"SET LOCAL ROLE {self.role}_w")
            self.db(writes)
        finally:
            self.db("ROLLBACK")


@pytest.fixture
def safety(
    each_dsn: str, each_db: Database, delivery: Delivery, by_triggers: None
) -> Iterator[Safety]:
    """Triggers on both kinds of tables, installed by their owner, of whom no Hub runs."""
    role = f"owner_{each_db.connection.info.dbname}"
    replication = "REPLICATION" if delivery == "wal" else ""
    each_db(f"CREATE ROLE {role} LOGIN {replication}; CREATE ROLE {role}_w")
    each_db(f"ALTER DATABASE {each_db.connection.info.dbname} OWNER TO {role}")
    each_db(f"GRANT ALL ON SCHEMA public TO {role}; SET ROLE {role}")
    each_db(TABLES)
    each_db(f"GRANT ALL ON plain, parted, parted_0 TO {role}_w; RESET ROLE")
    hub = Hub()
    hub.start(
        each_dsn.replace("postgres@", f"{role}@"),
        [*watchers("plain"), *watchers("parted")],
        delivery=delivery,
    )
    hub.stop()
    yield Safety(each_db, role, delivery)
    each_db(
        f"ALTER DATABASE {each_db.connection.info.dbname} OWNER TO postgres;"
        f"DROP OWNED BY {role}, {role}_w CASCADE; DROP ROLE {role}, {role}_w"
    )


FUNCTIONS = """
SELECT p.oid::regprocedure::text, p.prosrc FROM pg_proc p
WHERE p.proname LIKE 'pgsignals\\_%' ORDER BY 1
"""


def test_whatever_is_taken_away(safety: Safety) -> None:
    """Each object, right and sequence value that the functions use may be missing."""
    db, role = safety.db, safety.role
    sources = db(FUNCTIONS)
    damages = []
    called = set()
    for _, source in sources:
        called |= set(re.findall(r"pg_catalog\.(\w+)\(", source))
    procedures = db(
        "SELECT p.oid::regprocedure::text FROM pg_proc p WHERE p.proname = ANY (%s)"
        " AND p.pronamespace = 'pg_catalog'::regnamespace AND p.prokind = 'f'",
        [list(called)],
    )
    assert len(procedures) > 30
    damages += [
        f"REVOKE EXECUTE ON FUNCTION pg_catalog.{each} FROM PUBLIC"
        for (each,) in procedures
        # A writer cannot do without these either.
        if not each.startswith(("repeat", "generate_series", "int"))
    ]
    damages += [
        "DROP FUNCTION big(int)",
        "REVOKE EXECUTE ON FUNCTION big(int) FROM PUBLIC",
        "ALTER TABLE plain DROP COLUMN total; ALTER TABLE plain ADD COLUMN total int",
        "ALTER TABLE parted DROP COLUMN total; ALTER TABLE parted ADD COLUMN total int",
        "ALTER TABLE plain ALTER note TYPE varchar",
        "ALTER TABLE plain ALTER id TYPE bigint",
        "ALTER TABLE parted ALTER total TYPE bigint",
        *(f"ALTER FUNCTION {name} OWNER TO {role}_w" for name, _ in sources),
    ]
    if safety.delivery == "outbox":
        relations = db(
            "SELECT relname, relkind::text FROM pg_class"
            " WHERE relnamespace = 'pgsignals'::regnamespace AND relkind IN ('r', 'p', 'S')"
        )
        for name, kind in relations:
            if name.endswith("_id_seq"):
                continue
            what = "SEQUENCE" if kind == "S" else "TABLE"
            damages.append(f"DROP {what} pgsignals.{name} CASCADE")
            damages.append(f"ALTER {what} pgsignals.{name} RENAME TO gone")
            damages.append(f"REVOKE ALL ON {what} pgsignals.{name} FROM {role}")
            if kind == "S":
                damages.append(f"ALTER SEQUENCE pgsignals.{name} RESTART")
                damages.append(
                    f"ALTER SEQUENCE pgsignals.{name} MINVALUE 0 MAXVALUE 1 RESTART 1;"
                    f"SELECT setval('pgsignals.{name}', 1)"
                )
            else:
                damages.append(f"TRUNCATE pgsignals.{name} CASCADE")
        damages += [
            "DROP SCHEMA pgsignals CASCADE",
            "ALTER SCHEMA pgsignals RENAME TO gone",
            f"REVOKE ALL ON SCHEMA pgsignals FROM {role}",
            "DROP FUNCTION pgsignals.has_room()",
            f"REVOKE ALL ON FUNCTION pgsignals.has_room() FROM {role}",
            "DROP FUNCTION pgsignals.put",
            f"REVOKE ALL ON FUNCTION pgsignals.put FROM {role}",
            "ALTER TABLE pgsignals.outbox ADD CHECK (id < 0)",
            "ALTER TABLE pgsignals.outbox ADD COLUMN more int NOT NULL",
            "ALTER TABLE pgsignals.outbox DROP COLUMN relation",
            "ALTER TABLE pgsignals.outbox ENABLE ROW LEVEL SECURITY;"
            "ALTER TABLE pgsignals.outbox FORCE ROW LEVEL SECURITY",
            "CREATE FUNCTION pgsignals.refuse() RETURNS trigger LANGUAGE plpgsql AS"
            " 'BEGIN ASSERT false; END'; CREATE TRIGGER refuse BEFORE INSERT ON pgsignals.outbox_0"
            " FOR EACH ROW EXECUTE FUNCTION pgsignals.refuse()",
            f"REASSIGN OWNED BY {role} TO {role}_w",
        ]
    for damage in damages:
        for table in ("plain", "parted"):
            try:
                safety.survives(damage, WRITES.format(table=table))
            except psycopg2.Error as error:
                pytest.fail(f"a write to {table} failed after {damage}: {error}")


def statements(source: str) -> Iterator[int]:
    """The places in a function's text where a statement begins, but for its declarations."""
    lines = source.split("\n")
    start = lines.index("BEGIN")
    at = sum(len(line) + 1 for line in lines[:start])
    inside = False
    for line in lines[start:]:
        text = line.strip()
        begins = re.match(
            r"(?:IF|FOR|FOREACH|WHILE|LOOP|SELECT|INSERT|NOTIFY|EXECUTE|OPEN|CLOSE|RAISE|RETURN|EXIT)\b"
            r"|pgs_\w+ :=",
            text,
        )
        if begins and not inside:
            yield at + len(line) - len(line.lstrip())
        if text and not text.startswith("--"):
            inside = not text.endswith((";", "THEN", "LOOP", "ELSE", "BEGIN"))
        at += len(line) + 1


def test_each_statement_fails(safety: Safety) -> None:
    """Wherever the function fails, with an error or an assertion, the write succeeds.

    The first statement of a function is the loop around its block; behind the block it only runs
    the query that was opened inside.
    """
    db = safety.db
    tried = 0
    for name, source in db(FUNCTIONS):
        places = [
            at
            for at in statements(source)
            if source.index("    BEGIN") < at < source.index("    EXCEPTION WHEN")
        ]
        assert len(places) > 20
        table = db(
            "SELECT t.tgrelid::regclass::text FROM pg_trigger t"
            " WHERE t.tgfoid = %s::regprocedure AND t.tgparentid = 0",
            [name],
        )[0][0]
        [(made,)] = db("SELECT pg_get_functiondef(%s::regprocedure)", [name])
        for number, at in enumerate(places):
            failure = "ASSERT false; " if number % 2 else "PERFORM 1 / 0; "
            damage = made.replace(source, source[:at] + failure + source[at:])
            assert damage != made
            try:
                safety.survives(damage, WRITES.format(table=table))
            except psycopg2.Error as error:
                pytest.fail(
                    f"a write failed with {failure} before {source[at : at + 60]!r}: {error}"
                )
            tried += 1
    assert tried > 200


# What a trigger's function does with the rights of the role, or of the writer.
RIGHTS = {
    "outbox": ("{} ON SCHEMA pgsignals {} {}", "{} ON TABLE pgsignals.outbox {} {}"),
    "notify": ("{} ON FUNCTION pg_catalog.pg_notify(text, text) {} PUBLIC",),
    "wal": (
        "{} ON FUNCTION EMIT {} PUBLIC",
        "{} ON SEQUENCE pgsignals.wal_secret {} {}",
    ),
}


def rights(safety: Safety) -> list[str]:
    """Them, for a delivery and a version."""
    arguments = "boolean, text, text"
    if safety.db.connection.server_version >= 170000:
        arguments += ", boolean"
    emit = f"pg_catalog.pg_logical_emit_message({arguments})"
    return [each.replace("EMIT", emit) for each in RIGHTS[safety.delivery]]


def has_come(counts: list[int], aim: int) -> bool:
    """Whether counts together have come to so many."""
    return sum(counts) >= aim


def test_rights_that_come_and_go(safety: Safety, each_dsn: str) -> None:
    """A right that is revoked in the middle of a transaction costs no write, wherever it is."""
    safety.db(f"ALTER ROLE {safety.role}_w LOGIN")
    safety.db("INSERT INTO plain SELECT n, '', n FROM generate_series(1, 99) AS n")
    dsn = each_dsn.replace("postgres@", f"{safety.role}_w@")
    done = threading.Event()
    progress = threading.Condition()
    committed = [0, 0, 0, 0]

    def write(writer: int) -> None:
        with closing(psycopg2.connect(dsn)) as connection:
            while not done.is_set():
                with connection, connection.cursor() as cursor:
                    for number in range(5):
                        cursor.execute(
                            "UPDATE plain SET note = (note = '')::text WHERE id = %s",
                            [1 + 10 * writer + number],
                        )
                with progress:
                    committed[writer] += 1
                    progress.notify()

    with ThreadPoolExecutor(len(committed)) as pool:
        writers = [pool.submit(write, each) for each in range(len(committed))]
        try:
            for number in range(200):
                right = rights(safety)[number % len(rights(safety))]
                for change in (("REVOKE ALL", "FROM"), ("GRANT ALL", "TO")):
                    # Each comes in the middle of transactions, and not right upon another.
                    with progress:
                        aim = sum(committed) + len(committed)
                        assert progress.wait_for(partial(has_come, committed, aim), DEADLINE)
                    safety.db(right.format(*change, safety.role))
        finally:
            done.set()
        for each in writers:
            each.result(DEADLINE)


def test_a_right_that_is_revoked_behind_the_block(safety: Safety, each_dsn: str) -> None:
    """What a function sends behind its block needs no right that it has not been given inside."""
    db, waits = safety.db, "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    db(f"ALTER ROLE {safety.role}_w LOGIN; INSERT INTO plain VALUES (1, '', 1)")
    behind = (
        f"  IF {'pgs_proved' if safety.delivery == 'outbox' else 'pgs_sending'} IS NOT NULL THEN\n"
    )
    waiting = "PERFORM pg_catalog.pg_advisory_lock_shared(7);"
    if safety.delivery != "outbox":
        # At a lock on a table PostgreSQL hears of changed rights. The outbox's function, which
        # would not bear that, takes all its locks inside the block.
        waiting += " PERFORM FROM pg_catalog.pg_am;"
    for _, source in db(FUNCTIONS):
        [(made,)] = db("SELECT pg_get_functiondef(oid) FROM pg_proc WHERE prosrc = %s", [source])
        assert source.count(behind) == 1
        db(made.replace(behind, f"{behind}{waiting}"))

    def write(note: str) -> None:
        cursor.execute("UPDATE plain SET note = %s", [note])

    dsn = each_dsn.replace("postgres@", f"{safety.role}_w@")
    for number, right in enumerate(rights(safety)):
        db("SELECT pg_advisory_lock(7)")
        # A session plans all that it runs behind the block for the first time.
        with (
            closing(psycopg2.connect(dsn)) as connection,
            connection,
            connection.cursor() as cursor,
            ThreadPoolExecutor(1) as pool,
        ):
            if safety.delivery != "wal":
                # The first message of a transaction goes out inside the block; in the log, none.
                write("a")
            second = pool.submit(write, f"b{number}")
            try:
                eventually(lambda: db(waits), bool)
                db(right.format("REVOKE ALL", "FROM", safety.role))
            finally:
                db("SELECT pg_advisory_unlock(7)")
            second.result(DEADLINE)
        db(right.format("GRANT ALL", "TO", safety.role))


def test_a_statement_that_is_cancelled(safety: Safety) -> None:
    """A cancellation inside a trigger's function ends the write, as it would without a watcher."""
    db = safety.db
    db(
        "CREATE OR REPLACE FUNCTION big(total int) RETURNS boolean LANGUAGE plpgsql AS"
        " 'BEGIN PERFORM pg_sleep(60); RETURN true; END'"
    )
    db("INSERT INTO plain VALUES (1, 'a', 1); SET statement_timeout TO '200ms'")
    with pytest.raises(pg.QueryCanceled):
        db("UPDATE plain SET note = 'b'")


def test_a_partition_that_somebody_has_locked(
    safety: Safety, connect: Callable[[str], Database]
) -> None:
    """Whoever writes while no consumer lives waits for no lock on a former partition."""
    if safety.delivery != "outbox":
        pytest.skip("there are no partitions")
    other = connect(safety.db.dsn)
    other("BEGIN; LOCK TABLE pgsignals.outbox_3 IN ACCESS EXCLUSIVE MODE")
    safety.db("SET statement_timeout TO '20s'")
    for number in range(60):
        safety.db("INSERT INTO plain VALUES (%s, 'a', 1)", [number])
    other("ROLLBACK")
    assert safety.db("SELECT count(*) FROM pgsignals.outbox") == [(60,)]


@pytest.mark.parametrize("kind", ["assertion", "error"])
def test_a_condition_that_fails(
    hub: Hub, each_dsn: str, each_db: Database, delivery: Delivery, recorder: Recorder, kind: str
) -> None:
    """A condition that fails by ASSERT, or otherwise, is a Gap with the message."""
    fails = "ASSERT n >= 0, 'negative total';" if kind == "assertion" else "n := n / 0;"
    each_db(
        "CREATE TABLE t (id serial PRIMARY KEY, total int);"
        "CREATE FUNCTION positive(n int) RETURNS bool LANGUAGE plpgsql AS"
        f" $$BEGIN {fails} RETURN true; END$$"
    )
    hub.on_gap(recorder)
    condition = watch("t", "inserted", when="positive(NEW.total)")
    hub.start(each_dsn, [condition], delivery=delivery, name=_name(delivery))
    each_db("INSERT INTO t (total) VALUES (-1)")
    [gap] = recorder.wait(1)
    assert gap.reason == "watcher_broken"
    assert ("negative total" if kind == "assertion" else "division by zero") in gap.detail


def _name(delivery: Delivery) -> str | None:
    return None if delivery == "notify" else "mailer"


def test_types_that_change_under_open_sessions(
    hub: Hub,
    each_dsn: str,
    each_db: Database,
    connect: Callable[[str], Database],
    delivery: Delivery,
    recorder: Recorder,
) -> None:
    """Sessions that wrote before an ALTER COLUMN TYPE are heard after it, on any kind of table."""
    each_db(
        "CREATE TABLE plain (id int, day date DEFAULT '2026-01-01', PRIMARY KEY (id, day));"
        "CREATE TABLE parted (LIKE plain INCLUDING ALL) PARTITION BY RANGE (day);"
        "CREATE TABLE part PARTITION OF parted DEFAULT;"
        "CREATE TABLE parent (id int, day date DEFAULT '2026-01-01');"
        "CREATE TABLE child () INHERITS (parent);"
        "ALTER TABLE parent ADD PRIMARY KEY (id, day)"
    )
    gaps = Recorder()
    hub.on_gap(gaps)
    tables = ["plain", "parted", "parent"]
    for table in tables:
        hub.subscribe(recorder, table)
    hub.start(each_dsn, tables, delivery=delivery, name=_name(delivery))
    pooled = connect(each_dsn)
    written = [*tables, "child"]
    for table in written:
        pooled(f"INSERT INTO {table} (id) VALUES (1)")
        pooled(f"UPDATE {table} SET id = 2 WHERE id = 1")
        pooled(f"DELETE FROM {table} WHERE id = 2")
    recorder.wait(12)
    for table in tables:
        each_db(f"ALTER TABLE {table} ALTER id TYPE bigint")
    for table in written:
        pooled(f"INSERT INTO {table} (id) VALUES ({2**40})")
        pooled(f"UPDATE {table} SET id = 4 WHERE id > 2")
        pooled(f"DELETE FROM {table} WHERE id = 4")
    events = recorder.wait(24)[12:]
    assert [(e.op, e.id[0]) for e in events] == 4 * [
        ("inserted", 2**40),
        ("updated", 4),
        ("deleted", 4),
    ]
    assert gaps.items == []


@pytest.fixture(scope="module")
def small_queue() -> Iterator[Server]:
    """A server whose notification queue is soon full; older ones cannot be told its size."""
    with Server(
        version=18, settings={"max_notify_queue_pages": "64", "wal_level": "logical"}
    ) as server:
        yield server


def fill(db: Database, share: float) -> None:
    """Fill the queue to a share, or until nothing fits any more; it is all for nobody."""
    for size in (7000, 700, 70, 7, 1):
        for number in range(20_000):
            if db("SELECT pg_notification_queue_usage()")[0][0] >= share:
                break
            try:
                db(f"NOTIFY x, '{number}{'y' * size}'")
            except pg.OperationalError:
                break


@pytest.mark.parametrize("share", [0.6, 1.1], ids=["filling", "full"])
def test_a_full_notification_queue(
    small_queue: Server,
    connect: Callable[[str], Database],
    delivery: Delivery,
    share: float,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Writes go on, whoever fills the queue; what was not sent is an event later, or a Gap."""
    dsn = small_queue.create_database()
    db, writer, stuck = connect(dsn), connect(dsn), connect(dsn)
    db("CREATE TABLE t (id serial PRIMARY KEY)")
    heard, gaps = Recorder(), Recorder()
    with Hub() as hub:
        hub.subscribe(heard, "t")
        hub.on_gap(gaps)
        hub.start(dsn, ["t"], delivery=delivery, name=_name(delivery), heartbeat=0.2)
        writer("INSERT INTO t DEFAULT VALUES")
        heard.wait(1)
        for statement in ("LISTEN x", "BEGIN", "SELECT 1"):
            stuck(statement)
        fill(db, share)
        for session in (connect(dsn), connect(dsn)):
            session("INSERT INTO t DEFAULT VALUES")
            session("BEGIN; INSERT INTO t DEFAULT VALUES; INSERT INTO t DEFAULT VALUES; COMMIT")
        if delivery == "notify":
            # Between two heartbeats this queue could be filled and read; one of 8 GB could not.
            eventually(lambda: caplog.text, lambda text: "otification" in text)
        stuck("COMMIT")
        if delivery != "notify":
            assert {event.id for event in heard.wait(7, timeout=DEADLINE)} == set(range(1, 8))
        else:
            assert gaps.wait(1)[0].reason in ("watcher_broken", "reconnected")


def test_a_lock_on_the_outbox(
    hub: Hub, each_dsn: str, each_db: Database, connect: Callable[[str], Database]
) -> None:
    """A writer that waits for no lock for ever goes on, and what it could not write is a Gap."""
    each_db("CREATE TABLE t (id serial PRIMARY KEY)")
    gaps = Recorder()
    hub.on_gap(gaps)
    hub.start(each_dsn, ["t"], delivery="outbox", name="mailer")
    holder, writer = connect(each_dsn), connect(each_dsn)
    holder("BEGIN; LOCK TABLE pgsignals.outbox IN ACCESS EXCLUSIVE MODE")
    # Asked in the transaction, which is committed after that.
    [(lost_at,)] = writer(
        "SET lock_timeout TO '50ms'; INSERT INTO t DEFAULT VALUES; SELECT clock_timestamp()"
    )
    holder("ROLLBACK")
    eventually(lambda: list(gaps.items), lambda found: covering(found, lost_at))
    assert each_db("SELECT count(*) FROM t") == [(1,)]


@pytest.mark.parametrize("table", ["plain", "parted"])
def test_a_long_transaction(safety: Safety, connect: Callable[[str], Database], table: str) -> None:
    """Its later statements keep next to no memory of the session, and take no transaction ids."""
    db, count = safety.db, 2000
    other = connect(db.dsn)

    def used() -> tuple[int, int]:
        [(memory,)] = db("SELECT sum(total_bytes) FROM pg_backend_memory_contexts")
        [(ids,)] = other("SELECT pg_current_xact_id()::text::bigint")
        return memory, ids

    loop = (
        "DO $$ BEGIN FOR n IN {first}..{last} LOOP"
        " INSERT INTO {table} VALUES (n, 'a', n); END LOOP; END $$"
    )
    db("BEGIN")
    # What a session keeps for good, plans for one, is there after that.
    db(loop.format(first=1, last=count, table=table))
    memory, ids = used()
    db(loop.format(first=count + 1, last=2 * count, table=table))
    memory_then, ids_then = used()
    db("ROLLBACK")
    # A subtransaction that has notified keeps 8 kB to the end of the transaction. One that has
    # written has an id, and with many of them every snapshot of the server is slow.
    assert memory_then - memory < 1500 * count
    assert ids_then - ids < count / 10
