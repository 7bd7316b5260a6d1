"""Watchers of the write-ahead log that rows serve: which they are, and that they break no write."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, cast

import psycopg2.errors as pg
import pytest

import pgsignals
from pgsignals import Hub, watch
from pgsignals.core.transport import Transport
from pgsignals.core.watchers import normalize
from pgsignals.hub.durable import DurableDelivery
from pgsignals.outbox import housekeeping
from pgsignals.postgres.connection import opened
from pgsignals.resolvers import BUILTIN
from pgsignals.triggers.definitions import define
from tests.conftest import Database, Recorder
from tests.waiting import eventually

PUBLISHED = (
    "SELECT pubname::text, prrelid::regclass::text FROM pg_publication_rel r"
    " JOIN pg_publication p ON p.oid = prpubid ORDER BY 1, 2"
)

SHAPE = (
    "(id int PRIMARY KEY, note text, price numeric, twice int GENERATED ALWAYS AS (id * 2) STORED)"
)


def lacking(db: Database, *watchers: Any) -> dict[str, str]:
    """Why rows do not serve each operation; an empty text where they do."""
    with db.connection.cursor() as cursor:
        found = define(cursor, normalize(watchers), BUILTIN, "default", Transport.WAL)
    return {each.topic.op: each.lacking for each in found}


def written(db: Database, statement: str) -> bool:
    """Whether PostgreSQL ran a statement that it may refuse for want of a replica identity."""
    with contextlib.suppress(pg.ObjectNotInPrerequisiteState, pg.InvalidColumnReference):
        db(statement)
        return True
    return False


TABLES = {
    "plain": (f"CREATE TABLE t {SHAPE}", {"inserted", "updated", "deleted", "truncated"}),
    "without a key": ("CREATE TABLE t (note text)", {"inserted", "truncated"}),
    "full": (
        "CREATE TABLE t (note text); ALTER TABLE t REPLICA IDENTITY FULL",
        {"inserted", "updated", "deleted", "truncated"},
    ),
    "identity of nothing": (
        f"CREATE TABLE t {SHAPE}; ALTER TABLE t REPLICA IDENTITY NOTHING",
        {"inserted", "truncated"},
    ),
    "deferrable key": (
        "CREATE TABLE t (id int PRIMARY KEY DEFERRABLE)",
        {"inserted", "truncated"},
    ),
    "another index": (
        "CREATE TABLE t (id int PRIMARY KEY, code int NOT NULL UNIQUE);"
        " ALTER TABLE t REPLICA IDENTITY USING INDEX t_code_key",
        {"inserted", "truncated"},
    ),
    "numeric key": (
        "CREATE TABLE t (id numeric PRIMARY KEY)",
        {"inserted", "deleted", "truncated"},
    ),
    "unlogged": ("CREATE UNLOGGED TABLE t (id int PRIMARY KEY)", set()),
    "partitioned": (
        "CREATE TABLE t (id int PRIMARY KEY) PARTITION BY RANGE (id)",
        {"inserted", "updated", "deleted", "truncated"},
    ),
    "partition": (
        "CREATE TABLE whole (id int PRIMARY KEY) PARTITION BY RANGE (id);"
        " CREATE TABLE t PARTITION OF whole DEFAULT",
        set(),
    ),
    "child without a key": (
        "CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE child () INHERITS (t)",
        {"inserted", "truncated"},
    ),
}


@pytest.mark.parametrize("table", TABLES.values(), ids=list(TABLES))
def test_tables_whose_rows_say_all(each_db: Database, table: tuple[str, set[str]]) -> None:
    """Rows serve the operations of which the log has all; triggers send messages for the others."""
    create, served = table
    each_db(create)
    found = lacking(each_db, ("t", "inserted", "updated", "deleted", "truncated"))
    assert {op for op, reason in found.items() if not reason} == served


WATCHERS = {
    "a condition": (watch("t", "inserted", when="NEW.id > 1"), False, False),
    "a computed column": (watch("t", "inserted", extra=["twice"]), False, False),
    "values of new rows": (watch("t", "inserted", extra=["note", "price"]), True, True),
    "old values": (watch("t", "updated", extra=["note"]), False, True),
    "last values": (watch("t", "deleted", extra=["note", "price"]), False, True),
    "real differences": (watch("t", "updated", columns=["note"]), False, True),
    "differences of numbers": (watch("t", "updated", columns=["price"]), False, False),
}


@pytest.mark.parametrize("watcher", WATCHERS.values(), ids=list(WATCHERS))
def test_watchers_that_rows_serve(each_db: Database, watcher: tuple[Any, bool, bool]) -> None:
    """Old values take REPLICA IDENTITY FULL; conditions and texts that may vary, a trigger."""
    watched, by_default, by_full = watcher
    each_db("CREATE TABLE t (id int PRIMARY KEY, note text, price numeric)")
    if "twice" in watched.extra:
        each_db("ALTER TABLE t ADD twice int GENERATED ALWAYS AS (id * 2) STORED")
    assert all(not reason for reason in lacking(each_db, watched).values()) == by_default
    each_db("ALTER TABLE t REPLICA IDENTITY FULL")
    assert all(not reason for reason in lacking(each_db, watched).values()) == by_full


def test_no_published_table_breaks_writes(each_dsn: str, each_db: Database) -> None:
    """A table without an identity is written to as before, whoever watches its updates."""
    each_db("CREATE TABLE keyless (note text); INSERT INTO keyless VALUES ('a')")
    with Hub() as hub:
        hub.start(each_dsn, ["keyless"], delivery="wal")
        each_db("UPDATE keyless SET note = 'b'; DELETE FROM keyless")
        assert each_db(PUBLISHED) == [("pgsignals_inserts", "keyless")]


def test_a_key_that_is_dropped(
    hub: Hub, each_dsn: str, each_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its table's UPDATEs fail until the consumer has taken it out, and then come as messages."""
    monkeypatch.setattr(housekeeping, "EVERY_SECONDS", 0.05)
    each_db("CREATE TABLE t (id int PRIMARY KEY, note text); INSERT INTO t VALUES (1, 'a')")
    heard, gaps = Recorder(), Recorder()
    hub.subscribe(heard, "t", "updated")
    hub.on_gap(gaps)
    hub.start(each_dsn, ["t"], delivery="wal", name="mailer")
    assert ("pgsignals", "t") in each_db(PUBLISHED)
    each_db("UPDATE t SET note = 'b'")
    assert heard.wait(1)[0].id == 1
    each_db("ALTER TABLE t DROP CONSTRAINT t_pkey")
    eventually(lambda: written(each_db, "UPDATE t SET note = 'c'"), bool)
    gaps.wait(1)
    eventually(lambda: hub.status().reconnects, lambda count: count > 0)
    eventually(lambda: hub.health().ready, bool)
    each_db("UPDATE t SET note = 'd'")
    [event] = heard.wait_until(lambda event: event.id is None)[-1:]
    assert event.op == "updated"
    assert ("pgsignals", "t") not in each_db(PUBLISHED)


@pytest.fixture
def tidy(hub: Hub, each_db: Database, monkeypatch: pytest.MonkeyPatch) -> Callable[[], object]:
    """Tidies up as the Hub does every few seconds, once it reads."""
    monkeypatch.setattr(housekeeping, "EVERY_SECONDS", 3600)

    def run() -> None:
        delivery = cast(DurableDelivery, hub._delivery)
        eventually(lambda: delivery._active, bool)
        with each_db.connection.cursor() as cursor:
            delivery._look_after(cursor)

    return run


def test_a_letter_of_a_row(hub: Hub, each_dsn: str, each_db: Database) -> None:
    """What a receiver could not take is kept as it came, and comes again equal in all."""
    each_db(
        "CREATE TABLE t (id uuid PRIMARY KEY, price numeric, at timestamptz);"
        " ALTER TABLE t REPLICA IDENTITY FULL"
    )
    broken, failed, heard = [True], Recorder(), Recorder()

    def receive(event: pgsignals.Event) -> None:
        if broken:
            failed(event)
            raise ValueError("poison")
        heard(event)

    hub.subscribe(receive, "t", "deleted", retries=0)
    watchers = [watch("t", "deleted", extra=["price", "at"])]
    hub.start(each_dsn, watchers, delivery="wal", name="mailer")
    each_db(
        "INSERT INTO t VALUES (gen_random_uuid(), 1.50, now()), (gen_random_uuid(), NULL, now());"
        " DELETE FROM t"
    )
    first = failed.wait(2)
    kept = "SELECT count(*) FROM pgsignals.dead_letters"
    eventually(lambda: each_db(kept), lambda rows: rows == [(2,)])
    hub.stop()
    broken.clear()
    hub.start(each_dsn, watchers, delivery="wal", name="mailer")
    each_db("UPDATE pgsignals.dead_letters SET retry = true")
    each_db("NOTIFY pgsignals_wake, 'redeliver'")
    again = heard.wait(2)

    def told(event: pgsignals.Event) -> Any:
        return event.uid, event.id, event.values, event.txid, event.at

    assert sorted(map(told, again), key=str) == sorted(map(told, first), key=str)


@pytest.mark.parametrize("kind", ["VIRTUAL", "STORED"])
def test_a_computed_column_in_a_full_identity(
    hub: Hub,
    each_dsn: str,
    each_db: Database,
    each_version: int,
    tidy: Callable[[], object],
    kind: str,
) -> None:
    """PostgreSQL 18 refuses UPDATEs from then on, until the consumer takes the table out."""
    if each_version < 18:
        pytest.skip("older versions have no such rule")
    each_db(
        "CREATE TABLE t (id int PRIMARY KEY, note text); INSERT INTO t VALUES (1, 'a');"
        " ALTER TABLE t REPLICA IDENTITY FULL"
    )
    heard = Recorder()
    hub.subscribe(heard, "t", "updated")
    hub.start(each_dsn, ["t"], delivery="wal", name="mailer")
    tidy()
    assert ("pgsignals", "t") in each_db(PUBLISHED)
    each_db(f"ALTER TABLE t ADD g int GENERATED ALWAYS AS (id * 2) {kind}")
    assert not written(each_db, "UPDATE t SET note = 'b'")
    tidy()
    assert ("pgsignals", "t") not in each_db(PUBLISHED)
    eventually(lambda: hub.status().reconnects, lambda count: count > 0)
    eventually(lambda: hub.health().ready, bool)
    each_db("UPDATE t SET id = 2")
    heard.wait_until(lambda event: event.id == 2)


COMPUTED = {
    "full": "ALTER TABLE t REPLICA IDENTITY FULL",
    "index": (
        "CREATE UNIQUE INDEX beside ON t (id, twice); ALTER TABLE t ALTER twice SET NOT NULL;"
        " ALTER TABLE t REPLICA IDENTITY USING INDEX beside"
    ),
}


@pytest.mark.parametrize("identity", COMPUTED.values(), ids=list(COMPUTED))
def test_a_computed_column_in_an_identity(
    each_dsn: str, each_db: Database, each_version: int, identity: str
) -> None:
    """A table is served by messages where PostgreSQL 18 would refuse its UPDATEs."""
    each_db(f"CREATE TABLE t {SHAPE}; INSERT INTO t VALUES (1, 'a')")
    each_db(identity)
    with Hub() as hub:
        hub.start(each_dsn, ["t"], delivery="wal")
        each_db("UPDATE t SET note = 'b'; DELETE FROM t")
        assert (("pgsignals", "t") in each_db(PUBLISHED)) == (each_version < 18)


def test_a_table_that_comes_to_be_served_by_messages(
    hub: Hub, each_dsn: str, each_db: Database, tidy: Callable[[], object]
) -> None:
    """It leaves the publication soon, not only when the consumer starts again."""
    each_db("CREATE TABLE t (id int PRIMARY KEY, code int NOT NULL UNIQUE)")
    heard = Recorder()
    hub.subscribe(heard, "t", "deleted")
    hub.start(each_dsn, ["t"], delivery="wal", name="mailer")
    tidy()
    each_db("ALTER TABLE t REPLICA IDENTITY USING INDEX t_code_key")
    eventually(lambda: hub.status().reconnects, lambda count: count > 0)
    each_db("INSERT INTO t VALUES (1, 10); DELETE FROM t")
    assert heard.wait(1)[0].id == 1
    assert ("pgsignals", "t") in each_db(PUBLISHED)
    tidy()
    assert ("pgsignals", "t") not in each_db(PUBLISHED)
    each_db("INSERT INTO t VALUES (2, 20); DELETE FROM t")
    assert heard.wait(2)[1].id == 2


LEAVES = {
    "nothing": "ALTER TABLE leaf REPLICA IDENTITY NOTHING",
    "full, with a computed column": "ALTER TABLE leaf REPLICA IDENTITY FULL",
    "another index": (
        "CREATE UNIQUE INDEX leaf_code ON leaf (code);"
        " ALTER TABLE leaf REPLICA IDENTITY USING INDEX leaf_code"
    ),
}
WHOLE = (
    "CREATE TABLE t (id int PRIMARY KEY, code int NOT NULL, note text,"
    " twice int GENERATED ALWAYS AS (id * 2) STORED) PARTITION BY RANGE (id)"
)


@pytest.mark.parametrize("leaf", LEAVES)
def test_partitions_that_lack_an_identity(
    each_dsn: str, each_db: Database, each_version: int, leaf: str
) -> None:
    """The whole table is served by what its weakest partition has, however deep that is."""
    each_db(f"{WHOLE}; CREATE TABLE branch PARTITION OF t DEFAULT PARTITION BY RANGE (id)")
    each_db("CREATE TABLE leaf PARTITION OF branch DEFAULT; INSERT INTO t VALUES (1, 10, 'a')")
    each_db(LEAVES[leaf])
    with Hub() as hub:
        hub.start(each_dsn, ["t"], delivery="wal")
        each_db("UPDATE t SET note = 'b'; DELETE FROM t")
        published = ("pgsignals", "t") in each_db(PUBLISHED)
        assert published == (leaf == "full, with a computed column" and each_version < 18)


def test_partitions_that_are_not_in_the_log(each_db: Database) -> None:
    """A table that has an unlogged partition is served by messages."""
    each_db("CREATE TABLE t (id int PRIMARY KEY) PARTITION BY RANGE (id)")
    each_db("CREATE UNLOGGED TABLE leaf PARTITION OF t DEFAULT")
    assert all("unlogged" in reason for reason in lacking(each_db, "t").values())


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_partition_that_comes_later(
    hub: Hub,
    each_dsn: str,
    each_db: Database,
    each_version: int,
    monkeypatch: pytest.MonkeyPatch,
    leaf: str,
) -> None:
    """One that does not fit, attached to a table that is read, has it served by messages."""
    if leaf == "full, with a computed column" and each_version < 18:
        pytest.skip("older versions have no such rule")
    monkeypatch.setattr(housekeeping, "EVERY_SECONDS", 0.05)
    heard, gaps = Recorder(), Recorder()
    hub.subscribe(heard, "t", "deleted")
    hub.on_gap(gaps)
    each_db(WHOLE)
    hub.start(each_dsn, ["t"], delivery="wal", name="mailer")
    assert ("pgsignals", "t") in each_db(PUBLISHED)
    each_db(f"CREATE TABLE leaf (LIKE t INCLUDING ALL); {LEAVES[leaf]}")
    each_db("ALTER TABLE t ATTACH PARTITION leaf DEFAULT; INSERT INTO t VALUES (1, 10, 'a')")
    eventually(lambda: written(each_db, "UPDATE t SET note = 'b'"), bool)
    eventually(lambda: hub.status().reconnects, lambda count: count > 0)
    eventually(lambda: hub.health().ready, bool)
    eventually(lambda: each_db(PUBLISHED), lambda found: ("pgsignals", "t") not in found)
    told = len(gaps.items)
    each_db("DELETE FROM t")
    [event] = heard.wait(1)
    assert event.id == 1
    assert len(gaps.items) == told
    assert ("pgsignals", "t") not in each_db(PUBLISHED)


IDENTITIES = {
    "another index": ["USING INDEX b"],
    "another index for a while": ["USING INDEX b", "USING INDEX a"],
    "the key": ["DEFAULT"],
}


@pytest.mark.parametrize("changes", IDENTITIES.values(), ids=list(IDENTITIES))
def test_another_identity_while_it_is_down(
    hub: Hub, each_dsn: str, each_db: Database, changes: list[str]
) -> None:
    """Rows of the time between may lack what was known of old ones: that is a Gap."""
    each_db(
        "CREATE TABLE t (id int PRIMARY KEY, code int NOT NULL); CREATE UNIQUE INDEX a ON t (id);"
        " CREATE UNIQUE INDEX b ON t (id, code); ALTER TABLE t REPLICA IDENTITY USING INDEX a"
    )
    gaps, heard = Recorder(), Recorder()
    hub.on_gap(gaps)
    hub.subscribe(heard, "t", "updated")
    hub.start(each_dsn, ["t"], delivery="wal", name="mailer")
    hub.stop()
    assert not gaps.items
    for change in changes:
        each_db(f"ALTER TABLE t REPLICA IDENTITY {change}")
    hub.start(each_dsn, ["t"], delivery="wal", name="mailer")
    gaps.wait(1)


def test_the_same_identity_while_it_is_down(hub: Hub, each_dsn: str, each_db: Database) -> None:
    """A key whose index is built anew, and an identity of all columns, lose nothing: no Gap."""
    each_db("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)")
    gaps, heard = Recorder(), Recorder()
    hub.on_gap(gaps)
    hub.subscribe(heard, "t", "updated")
    hub.start(each_dsn, ["t"], delivery="wal", name="mailer")
    hub.stop()
    each_db("REINDEX INDEX CONCURRENTLY t_pkey")
    each_db("ALTER TABLE t REPLICA IDENTITY FULL")
    hub.start(each_dsn, ["t"], delivery="wal", name="mailer")
    each_db("UPDATE t SET id = 2")
    heard.wait_until(lambda event: event.id == 2)
    assert not gaps.items


def test_questions_are_not_compiled(dsn: str) -> None:
    """What is asked of partitions takes milliseconds, and compiling it would take a second."""
    with opened(dsn) as cursor:
        cursor.execute("SHOW jit")
        assert cursor.fetchall() == [("off",)]
