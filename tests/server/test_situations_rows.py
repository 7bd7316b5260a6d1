"""What each statement yields, on the oldest and the newest PostgreSQL: which events, how many.

In each delivery: what differs there is asserted as such.
"""

from __future__ import annotations

import select
import time
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import psycopg2
import psycopg2.extras
import pytest
from psycopg2 import sql

from pgsignals import watch
from tests.conftest import DEADLINE, Database
from tests.scene import Scene
from tests.scene import items as items
from tests.scene import orders as orders
from tests.scene import scene as scene

MULTIBYTE = "ħ€😀"


class Listener:
    """A bare connection that hears the channels of a table."""

    def __init__(self, dsn: str, channels: Sequence[str]) -> None:
        self._connection = psycopg2.connect(dsn)
        self._connection.autocommit = True
        with self._connection.cursor() as cursor:
            for channel in (*channels, "the_end"):
                cursor.execute(sql.SQL("LISTEN {}").format(sql.Identifier(channel)))

    def payloads(self, db: Database) -> list[str]:
        """What has been notified until now."""
        db("NOTIFY the_end")
        deadline = time.monotonic() + DEADLINE
        found: list[str] = []
        while time.monotonic() < deadline:
            select.select([self._connection], [], [], DEADLINE)
            self._connection.poll()
            while self._connection.notifies:
                notify = self._connection.notifies.pop(0)
                if notify.channel == "the_end":
                    return found
                found.append(notify.payload)
        raise AssertionError("the notification of the end did not come")

    def close(self) -> None:
        self._connection.close()


# --- which rows, under which operation ------------------------------------------------------------


def test_insert_update_delete(items: Scene) -> None:
    """The plain statements yield their operations, in the order in which they were made."""
    items.watch("items")
    items.db("INSERT INTO items VALUES (1, 'a'), (2, 'b')")
    items.db("UPDATE items SET name = 'c'")
    items.db("DELETE FROM items WHERE id = 1")
    assert items.brief() == [
        ("inserted", 1),
        ("inserted", 2),
        ("updated", 1),
        ("updated", 2),
        ("deleted", 1),
    ]


def test_insert_select_and_copy(items: Scene) -> None:
    """COPY and INSERT … SELECT yield an event for each row."""
    items.watch("items")
    with items.db.connection.cursor() as cursor:
        cursor.copy_expert("COPY items (id) FROM STDIN", file=_Lines("1\n2\n"))
    items.db("INSERT INTO items (id) SELECT generate_series(3, 5)")
    assert items.brief() == [("inserted", n) for n in range(1, 6)]


class _Lines:
    def __init__(self, text: str) -> None:
        self._text = text

    def read(self, size: int = -1) -> str:
        text, self._text = self._text, ""
        return text


def test_merge(items: Scene) -> None:
    """Each row that MERGE touches comes under what was done to it; DO NOTHING is silent."""
    if items.db.connection.server_version < 150000:
        pytest.skip("PostgreSQL 15 brought it")
    items.db("INSERT INTO items (id, name) VALUES (1, 'update'), (2, 'delete'), (3, 'nothing')")
    items.watch("items")
    items.db(
        "MERGE INTO items i USING (VALUES (1), (2), (3), (4)) AS s (id) ON i.id = s.id"
        " WHEN MATCHED AND i.name = 'delete' THEN DELETE"
        " WHEN MATCHED AND i.name = 'update' THEN UPDATE SET name = 'updated'"
        " WHEN MATCHED THEN DO NOTHING"
        " WHEN NOT MATCHED THEN INSERT (id) VALUES (s.id)"
    )
    assert sorted(items.brief()) == [("deleted", 2), ("inserted", 4), ("updated", 1)]


def test_merge_by_source(items: Scene) -> None:
    """WHEN NOT MATCHED BY SOURCE, where PostgreSQL has it, is heard too."""
    if items.db.connection.server_version < 170000:
        pytest.skip("PostgreSQL 17 brought it")
    items.db("INSERT INTO items (id) VALUES (1), (2)")
    items.watch("items")
    items.db(
        "MERGE INTO items i USING (VALUES (1)) AS s (id) ON i.id = s.id"
        " WHEN NOT MATCHED BY SOURCE THEN DELETE"
    )
    assert items.brief() == [("deleted", 2)]


def test_on_conflict(items: Scene) -> None:
    """An upsert yields what really happened to each row, and nothing for DO NOTHING."""
    items.db("INSERT INTO items (id) VALUES (1)")
    items.watch("items")
    items.db(
        "INSERT INTO items (id, name) VALUES (1, 'a'), (2, 'b')"
        " ON CONFLICT (id) DO UPDATE SET name = excluded.name"
    )
    items.db("INSERT INTO items (id) VALUES (1), (3) ON CONFLICT DO NOTHING")
    items.db(
        "INSERT INTO items (id) VALUES (1) ON CONFLICT (id) DO UPDATE SET name = 'x' WHERE false"
    )
    events = items.brief()
    assert sorted(events[:2]) == [("inserted", 2), ("updated", 1)]
    assert events[2:] == [("inserted", 3)]


def test_foreign_key_cascades(items: Scene) -> None:
    """Rows that a foreign key deletes or updates are heard like any others."""
    items.db(
        "CREATE TABLE parts (id int PRIMARY KEY,"
        " item_id int REFERENCES items ON DELETE CASCADE ON UPDATE CASCADE)"
    )
    items.db(
        "CREATE TABLE notes (id int PRIMARY KEY, item_id int REFERENCES items ON DELETE SET NULL)"
    )
    items.db("INSERT INTO items (id) VALUES (1), (2)")
    items.db("INSERT INTO parts VALUES (10, 1), (11, 1), (20, 2)")
    items.db("INSERT INTO notes VALUES (10, 2), (11, 2)")
    items.watch("parts", watch("notes", extra=["item_id"]))
    items.db("UPDATE items SET id = 3 WHERE id = 1")
    assert items.brief() == [("updated", 10), ("updated", 11)]
    items.db("DELETE FROM items WHERE id = 2")
    events = items.events()
    assert sorted((e.table, e.op, e.id) for e in events) == [
        ("notes", "updated", 10),
        ("notes", "updated", 11),
        ("parts", "deleted", 20),
    ]
    assert [(e.old, e.values) for e in events if e.table == "notes"] == [
        ({"item_id": 2}, {"item_id": None})
    ] * 2


def test_two_foreign_keys_update_one_row_twice(items: Scene) -> None:
    """Two SET NULL actions of one statement are two updates, each with its own old and new row."""
    items.db(
        "CREATE TABLE links (id int PRIMARY KEY,"
        " a int REFERENCES items ON DELETE SET NULL, b int REFERENCES items ON DELETE SET NULL)"
    )
    items.db("INSERT INTO items (id) VALUES (1), (2)")
    items.db("INSERT INTO links VALUES (1, 1, 1), (2, 1, 2), (3, 2, 1)")
    items.watch(watch("links", "updated", extra=["a", "b"]))
    items.db("DELETE FROM items")
    steps: dict[int, list[tuple[Any, Any]]] = {}
    for event in items.events():
        assert len(event.changed) == 1
        steps.setdefault(event.id, []).append((event.old, event.values))
    for number, before in ((1, {"a": 1, "b": 1}), (2, {"a": 1, "b": 2}), (3, {"a": 2, "b": 1})):
        [(old, between), (same, new)] = steps[number]
        assert (old, same, new) == (before, between, {"a": None, "b": None})


def test_writable_ctes(items: Scene) -> None:
    """The statements inside one WITH are heard, each under its own operation."""
    items.db("INSERT INTO items (id) VALUES (1), (2)")
    items.watch("items")
    items.db(
        "WITH gone AS (DELETE FROM items WHERE id = 1 RETURNING id),"
        " changed AS (UPDATE items SET name = 'x' WHERE id = 2 RETURNING id)"
        " INSERT INTO items (id) SELECT id + 10 FROM gone UNION SELECT id + 10 FROM changed"
    )
    assert sorted(items.brief()) == [
        ("deleted", 1),
        ("inserted", 11),
        ("inserted", 12),
        ("updated", 2),
    ]


def test_a_statement_that_touches_no_row_is_silent(items: Scene) -> None:
    """No row, no event."""
    items.watch("items")
    items.db("UPDATE items SET name = 'x'; DELETE FROM items; INSERT INTO items SELECT WHERE false")
    assert items.brief() == []


# --- how many messages and events -----------------------------------------------------------------


def test_rows_of_a_statement_share_messages(items: Scene) -> None:
    """10,000 rows are 10,000 events, and a hundredth as many messages at most, or none."""
    items.watch(("items", "inserted"))
    listener = Listener(items.dsn, items.channels("items"))
    with closing(listener):
        items.db("INSERT INTO items (id) SELECT generate_series(1, 10000)")
        payloads = listener.payloads(items.db)
    if items.delivery != "notify":
        assert payloads == []
    if items.delivery == "outbox":
        payloads = [text for (text,) in items.db("SELECT payload FROM pgsignals.outbox")]
    if items.delivery != "wal":
        assert 1 < len(payloads) <= 100
        assert max(map(len, payloads)) < 8160
    assert [event.id for event in items.events()] == list(range(1, 10001))


def test_packed_rows_keep_their_values(items: Scene) -> None:
    """Rows of every length around the limit of a message come whole, and in order."""
    items.watch(watch("items", "inserted", extra=["name"]))
    items.db(
        "INSERT INTO items (id, name) SELECT n, repeat(%s, n) FROM generate_series(1, 880) n",
        [MULTIBYTE],
    )
    events = items.events()
    assert [event.id for event in events] == list(range(1, 881))
    assert all(e.truncated or e.values == {"name": MULTIBYTE * e.id} for e in events)
    cut = [event.id for event in events if event.truncated]
    if items.whole:
        assert cut == []
        return
    assert cut == list(range(cut[0], 881))
    assert 7700 < cut[0] * len(MULTIBYTE.encode()) < 8000


def test_the_same_row_twice_in_a_transaction(items: Scene) -> None:
    """Notifications that are equal are not collapsed into one by PostgreSQL."""
    items.watch("items")
    items.db(
        "DO $$ BEGIN"
        " INSERT INTO items (id) VALUES (1); DELETE FROM items; INSERT INTO items (id) VALUES (1);"
        " FOR n IN 1..2 LOOP UPDATE items SET name = 'x' WHERE id = 1; END LOOP;"
        " END $$"
    )
    events = items.events()
    assert [e.op for e in events] == ["inserted", "deleted", "inserted", "updated", "updated"]
    assert len({e.uid for e in events}) == 5
    assert len({e.txid for e in events}) == 1


def test_savepoints_do_not_collapse_either(items: Scene) -> None:
    """A rolled-back savepoint takes its events with it and nothing of the others."""
    items.watch("items")
    with items.db.connection.cursor() as cursor:
        cursor.execute(
            "BEGIN; INSERT INTO items (id) VALUES (1); SAVEPOINT a;"
            " UPDATE items SET name = 'x'; ROLLBACK TO a; UPDATE items SET name = 'x';"
            " SAVEPOINT b; UPDATE items SET name = 'x'; RELEASE b;"
            " UPDATE items SET name = 'x'; COMMIT"
        )
    events = items.events()
    assert [event.op for event in events] == ["inserted", "updated", "updated", "updated"]
    assert len({event.uid for event in events}) == 4


def test_a_deferred_cascade_and_savepoints(items: Scene) -> None:
    """Rows of released savepoints count, those of rolled-back ones do not; a cascade is heard."""
    items.db(
        "CREATE TABLE nodes (id int PRIMARY KEY, parent int REFERENCES nodes ON DELETE CASCADE"
        " DEFERRABLE INITIALLY DEFERRED)"
    )
    items.watch("nodes")
    items.db(
        "BEGIN; SAVEPOINT a; INSERT INTO nodes VALUES (1); ROLLBACK TO a;"
        " INSERT INTO nodes VALUES (3, 2); SAVEPOINT b; INSERT INTO nodes VALUES (2);"
        " RELEASE b; SAVEPOINT c; INSERT INTO nodes VALUES (9); ROLLBACK TO c;"
        " INSERT INTO nodes VALUES (4, 3); COMMIT"
    )
    events = items.events()
    assert [(event.op, event.id) for event in events] == [("inserted", n) for n in (3, 2, 4)]
    assert len({event.uid for event in events}) == 3
    items.db("DELETE FROM nodes WHERE id = 2")
    assert sorted(items.brief()) == [("deleted", 2), ("deleted", 3), ("deleted", 4)]


def test_rollback_yields_nothing(items: Scene) -> None:
    """What was not committed did not happen."""
    items.watch("items")
    items.db("BEGIN; INSERT INTO items (id) VALUES (1); ROLLBACK")
    with pytest.raises(psycopg2.errors.UniqueViolation):
        items.db("INSERT INTO items (id) VALUES (1), (1)")
    assert items.brief() == []


def test_a_statement_without_rows_costs_no_transaction_id(items: Scene) -> None:
    """A statement that changes nothing stays a read: it takes no id, and its commit no flush."""
    items.watch("items")
    items.db("BEGIN")
    items.db("UPDATE items SET name = 'x' WHERE false")
    items.db("DELETE FROM items WHERE false")
    items.db("INSERT INTO items SELECT WHERE false")
    [(taken,)] = items.db("SELECT pg_current_xact_id_if_assigned()")
    items.db("COMMIT")
    assert taken is None
    assert items.brief() == []


# --- TRUNCATE -------------------------------------------------------------------------------------


def test_truncate(items: Scene) -> None:
    """TRUNCATE is one event, where it was asked for, also when it cascades."""
    items.db("CREATE TABLE parts (item_id int REFERENCES items)")
    items.db("INSERT INTO items (id) VALUES (1), (2)")
    items.watch(watch("items", "truncated", "deleted"), watch("parts", "truncated"))
    items.db("TRUNCATE items CASCADE")
    events = items.events()
    assert sorted((e.table, e.op, e.id) for e in events) == [
        ("items", "truncated", None),
        ("parts", "truncated", None),
    ]
    assert all((e.key, e.values, e.old) == ({}, {}, {}) for e in events)


def test_truncate_is_opt_in(items: Scene) -> None:
    """A bare model does not hear it."""
    items.watch("items")
    items.db("TRUNCATE items")
    assert items.brief() == []


def test_truncate_of_a_partitioned_table(orders: Scene) -> None:
    """The parent is truncated once, however many partitions it has."""
    orders.watch(watch("orders", "truncated"))
    orders.db("TRUNCATE orders")
    assert orders.brief() == [("truncated", None)]
