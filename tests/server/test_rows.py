"""Watchers of the write-ahead log that rows serve: which they are, and that they break no write."""

from __future__ import annotations

import contextlib
from typing import Any

import psycopg2.errors as pg
import pytest

import pgsignals
from pgsignals import Hub, watch
from pgsignals.core.transport import Transport
from pgsignals.core.watchers import normalize
from pgsignals.outbox import housekeeping
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

    def written() -> bool:
        with contextlib.suppress(pg.ObjectNotInPrerequisiteState):
            each_db("UPDATE t SET note = 'c'")
            return True
        return False

    eventually(written, bool)
    gaps.wait(1)
    eventually(lambda: hub.status().reconnects, lambda count: count > 0)
    eventually(lambda: hub.health().ready, bool)
    each_db("UPDATE t SET note = 'd'")
    [event] = heard.wait_until(lambda event: event.id is None)[-1:]
    assert event.op == "updated"
    assert ("pgsignals", "t") not in each_db(PUBLISHED)


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
