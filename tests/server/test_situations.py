"""What each situation in the database yields, on the oldest and the newest PostgreSQL.

In each delivery: what differs there is asserted as such.
"""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

import psycopg2
import psycopg2.extras
import pytest
from psycopg2 import sql

import pgsignals
from pgsignals import Event, Gap, Hub, watch
from pgsignals.errors import ReceiverError, WatcherError
from pgsignals.hub.hub import Delivery
from pgsignals.testing import Server
from tests.conftest import DEADLINE, Database, Recorder

MULTIBYTE = "ħ€😀"

notify_only = pytest.mark.parametrize("delivery", ["notify"])


class Scene:
    """A Hub at work on one database, and all that it delivered, in order."""

    def __init__(self, hub: Hub, dsn: str, db: Database, delivery: Delivery) -> None:
        self.hub = hub
        self.delivery = delivery
        self.dsn = dsn
        self.db = db
        self.recorder = Recorder()
        self.gaps = Recorder()
        self._sentinels = 0
        db("CREATE TABLE sentinels (id int PRIMARY KEY)")

    @property
    def whole(self) -> bool:
        """Whether values of any length travel."""
        return self.delivery == "outbox"

    def start(self, *watchers: Any, dsn: str | None = None, **options: Any) -> None:
        """Start the Hub."""
        self.hub.start(dsn or self.dsn, watchers, delivery=self.delivery, **options)

    def watch(self, *watchers: Any, dsn: str | None = None) -> Scene:
        """Start the Hub, and record the events of all watchers."""
        self.start(*watchers, ("sentinels", "inserted"), dsn=dsn)
        self.hub.on_gap(self.gaps)
        for target in dict.fromkeys(map(_target, (*watchers, "sentinels"))):
            self.hub.subscribe(self.recorder, target)
        return self

    def events(self) -> list[Event]:
        """All events since the last call, up to one that is made now."""
        self._sentinels += 1
        number = self._sentinels
        self.db("INSERT INTO sentinels VALUES (%s)", [number])
        arrived = self.recorder.wait_until(lambda e: e.table == "sentinels" and e.id == number)
        before = [n for n, e in enumerate(arrived) if e.table == "sentinels" and e.id == number - 1]
        return arrived[before[0] + 1 if before else 0 : -1]

    def brief(self) -> list[tuple[str, Any]]:
        """Like ``events``, only the operation and the id of each."""
        return [(event.op, event.id) for event in self.events()]

    def values(self) -> list[tuple[Any, ...]]:
        """Like ``events``, only the operation and the values of each."""
        return [(event.op, *event.values.values()) for event in self.events()]

    def channels(self, table: str) -> list[str]:
        """The channels on which the triggers of a table notify."""
        return [state.name for state in self.hub.status().watchers if state.table == table]


def _target(watcher: Any) -> Any:
    if isinstance(watcher, pgsignals.Watcher):
        return watcher.label or watcher.model
    return watcher[0] if isinstance(watcher, tuple) else watcher


@pytest.fixture
def scene(hub: Hub, each_dsn: str, each_db: Database, delivery: Delivery) -> Scene:
    """A Hub that is not started yet, and a fresh database on each tested version."""
    return Scene(hub, each_dsn, each_db, delivery)


@pytest.fixture
def items(scene: Scene) -> Scene:
    """The same, with a table of items."""
    scene.db("CREATE TABLE items (id int PRIMARY KEY, name text, owner_id int, price numeric)")
    return scene


@pytest.fixture
def orders(scene: Scene) -> Scene:
    """A partitioned table with two partitions."""
    scene.db(
        "CREATE TABLE orders (id int, region text, note text, PRIMARY KEY (region, id))"
        " PARTITION BY LIST (region);"
        "CREATE TABLE orders_eu PARTITION OF orders FOR VALUES IN ('eu');"
        "CREATE TABLE orders_us PARTITION OF orders FOR VALUES IN ('us')"
    )
    return scene


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
    """10,000 rows are 10,000 events, and a hundredth as many messages at most."""
    items.watch(("items", "inserted"))
    listener = Listener(items.dsn, items.channels("items"))
    with closing(listener):
        items.db("INSERT INTO items (id) SELECT generate_series(1, 10000)")
        payloads = listener.payloads(items.db)
    if items.delivery == "outbox":
        assert payloads == []
        payloads = [text for (text,) in items.db("SELECT payload FROM pgsignals.outbox")]
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


# --- columns and when -----------------------------------------------------------------------------


def test_columns_must_really_differ(items: Scene) -> None:
    """SET to the same value is silent, NULL counts as a value, and other columns do not matter."""
    items.db("INSERT INTO items VALUES (1, 'a', 7, 1.0), (2, NULL, 7, 1.0)")
    items.watch(watch("items", "updated", columns=["name", "price"]))
    items.db("UPDATE items SET name = name")
    items.db("UPDATE items SET owner_id = 8, price = 1.00")
    assert items.brief() == []
    items.db("UPDATE items SET name = 'a'")
    items.db("UPDATE items SET name = NULL WHERE id = 1")
    items.db("UPDATE items SET price = 2 WHERE id = 2")
    first, second, third = items.events()
    assert (first.id, first.changed, first.old["name"]) == (2, {"name"}, None)
    assert (second.id, second.changed, second.values["name"]) == (1, {"name"}, None)
    assert (third.id, third.changed) == (2, {"price"})


def test_columns_that_a_before_trigger_changes(items: Scene) -> None:
    """What counts is the row as it was stored, not what the statement named."""
    items.db("INSERT INTO items VALUES (1, 'a')")
    items.db(
        "CREATE FUNCTION fill() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN NEW.name := 'by trigger'; RETURN NEW; END $$;"
        "CREATE TRIGGER fill BEFORE UPDATE ON items FOR EACH ROW EXECUTE FUNCTION fill()"
    )
    items.watch(watch("items", "updated", columns=["name"]))
    items.db("UPDATE items SET owner_id = 1")
    items.db("UPDATE items SET name = 'ignored'")
    assert items.values() == [("updated", "by trigger")]


@pytest.mark.parametrize(
    ("type_name", "before", "equal", "different"),
    [
        ("json", '{"a":1}', '{"a":1}', '{"a":2}'),
        ("jsonb", '{"a":1,"b":2}', '{"b":2, "a":1}', '{"a":2}'),
        ("xml", "<a/>", "<a/>", "<b/>"),
        ("point", "(1,2)", "(1,2)", "(1,3)"),
        ("float8", "NaN", "NaN", "1"),
        ("text[]", "{a,NULL}", "{a,NULL}", "{a,b}"),
        ("int4range", "[1,3]", "[1,4)", "[1,5)"),
    ],
)
def test_columns_of_any_type_are_compared(
    scene: Scene, type_name: str, before: str, equal: str, different: str
) -> None:
    """Types without an equality of their own are compared by their text."""
    scene.db(f"CREATE TABLE t (id int PRIMARY KEY, v {type_name})")
    try:
        scene.db("INSERT INTO t VALUES (1, %s)", [before])
    except psycopg2.errors.FeatureNotSupported:
        pytest.skip(f"a server without {type_name}")
    scene.watch(watch("t", "updated", columns=["v"]))
    scene.db("UPDATE t SET v = %s", [equal])
    assert scene.brief() == []
    scene.db("UPDATE t SET v = %s", [different])
    assert scene.brief() == [("updated", 1)]


def test_when_for_each_operation(items: Scene) -> None:
    """A condition sees OLD and NEW where the operation has them."""
    items.watch(
        watch("items", "inserted", when="NEW.price > 10"),
        watch("items", "updated", when="NEW.price > OLD.price"),
        watch("items", "deleted", when="OLD.name IS NULL"),
    )
    items.db(
        "INSERT INTO items (id, name, price) VALUES (1, 'a', 5), (2, NULL, 11), (3, 'c', NULL)"
    )
    items.db("UPDATE items SET price = CASE id WHEN 1 THEN 6 ELSE 1 END")
    items.db("DELETE FROM items")
    assert items.brief() == [("inserted", 2), ("updated", 1), ("deleted", 2)]


@pytest.mark.parametrize(
    "when",
    [
        "NEW.name = 'it''s 100%' -- a comment",
        "NEW.name LIKE 'it''s%%' /* another ) */",
        "NEW.name = $pgsignals$it's 100%$pgsignals$",
        "NEW.name ~ '^it.s \\d+%$' AND NOT '{}' = ANY (ARRAY[NEW.name])",
        "new.name = E'it\\'s 100%'\n",
        "EXISTS (SELECT FROM owners o WHERE o.id = NEW.owner_id AND o.name = 'me')",
        "length(NEW.name) = 9 OR NEW.name IS NULL",
    ],
)
def test_when_runs_as_written(items: Scene, when: str) -> None:
    """Quotes, percent signs, braces, comments and subqueries reach PostgreSQL as they are."""
    items.db("CREATE TABLE owners (id int, name text); INSERT INTO owners VALUES (7, 'me')")
    items.watch(watch("items", "inserted", "updated", when=when))
    items.db("INSERT INTO items VALUES (1, 'it''s 100%', 7), (2, 'other', 8)")
    items.db("UPDATE items SET price = 1")
    assert items.brief() == [("inserted", 1), ("updated", 1)]


@pytest.mark.parametrize("level", ["statement", "row"])
def test_settings_by_which_a_writer_reads_sql(items: Scene, level: str) -> None:
    """Triggers and conditions mean the same to a writer whose session reads literals otherwise."""
    items.watch(
        watch(
            "items",
            "inserted",
            "updated",
            extra=["name"],
            when=r"NEW.name ~ '^a\\d\n?$' OR NEW.name = 'a\'",
            replicated=level == "row",
        )
    )
    items.db("SET standard_conforming_strings TO off")
    items.db("SET escape_string_warning TO off; SET transform_null_equals TO on")
    items.db("SET backslash_quote TO on")
    items.db("INSERT INTO items VALUES (1, E'a\\\\d'), (2, 'b'), (3, E'a\\\\')")
    items.db("INSERT INTO items SELECT 4, E'a\\\\' FROM generate_series(1, 1)")
    items.db("UPDATE items SET id = id + 10 WHERE name <> 'b'")
    items.db("RESET ALL")
    assert not items.gaps.items
    assert items.brief() == [
        (op, n + m) for op, m in (("inserted", 0), ("updated", 10)) for n in (1, 3, 4)
    ]


def test_when_resolves_names_where_it_was_installed(items: Scene) -> None:
    """Functions are found in the installer's search_path, whatever the writer's is."""
    items.db(
        "CREATE SCHEMA shop;"
        "CREATE FUNCTION shop.is_big(numeric) RETURNS bool LANGUAGE sql AS 'SELECT $1 > 10';"
        "CREATE SCHEMA other;"
        "CREATE FUNCTION other.is_big(numeric) RETURNS bool LANGUAGE sql AS 'SELECT $1 <= 10'"
    )
    items.watch(
        watch("items", "inserted", when="is_big(NEW.price)"),
        dsn=f"{items.dsn}?options=-csearch_path%3Dshop,public",
    )
    items.db("SET search_path TO other, public")
    items.db("INSERT INTO items (id, price) VALUES (1, 5), (2, 11)")
    items.db("SET search_path TO public")
    assert items.brief() == [("inserted", 2)]


@pytest.mark.parametrize("when", [None, "NEW.name = 'a'"])
@pytest.mark.parametrize("installer", ["public", "evil,public"])
def test_a_hostile_search_path_changes_nothing(
    items: Scene, when: str | None, installer: str
) -> None:
    """Functions, operators and types that shadow PostgreSQL's own are not used by the triggers."""
    items.db(
        "CREATE SCHEMA evil;"
        "CREATE FUNCTION evil.no(text, text) RETURNS bool LANGUAGE sql AS 'SELECT false';"
        "CREATE OPERATOR evil.= (LEFTARG = text, RIGHTARG = text, FUNCTION = evil.no);"
        "CREATE FUNCTION evil.glue(text, text) RETURNS text LANGUAGE sql AS $$SELECT 'evil'$$;"
        "CREATE FUNCTION evil.glue(text, bigint) RETURNS text LANGUAGE sql AS $$SELECT 'evil'$$;"
        "CREATE OPERATOR evil.|| (LEFTARG = text, RIGHTARG = text, FUNCTION = evil.glue);"
        "CREATE OPERATOR evil.|| (LEFTARG = text, RIGHTARG = bigint, FUNCTION = evil.glue);"
        "CREATE FUNCTION evil.pg_notify(text, text) RETURNS void LANGUAGE sql AS '';"
        "CREATE FUNCTION evil.to_json(text) RETURNS text LANGUAGE sql AS $$SELECT 'evil'$$;"
        "CREATE DOMAIN evil.text AS varchar(1);"
        "CREATE FUNCTION evil.times(float8, int) RETURNS float8 LANGUAGE sql AS 'SELECT -1e0';"
        "CREATE OPERATOR evil.* (LEFTARG = float8, RIGHTARG = int, FUNCTION = evil.times);"
        "CREATE TABLE evil.pgs_new (id int)"
    )
    items.watch(
        watch("items", "inserted", "updated", when=when, extra=["name"]),
        dsn=f"{items.dsn}?options=-csearch_path%3D{installer}",
    )
    items.db("SET search_path TO evil, pg_catalog, public")
    items.db("INSERT INTO items VALUES (1, 'a'); UPDATE items SET owner_id = 1")
    items.db("SET search_path TO public")
    assert items.values() == [("inserted", "a"), ("updated", "a")]
    assert not items.gaps.items


# Shadows, in a schema that the writer puts first, of each function and operator that the triggers
# could look up: of the same arguments, and raising.
_SHADOWS = """
DO $do$
DECLARE
  f record;
BEGIN
  CREATE SCHEMA evil;
  FOR f IN
    SELECT DISTINCT p.proname, pg_get_function_identity_arguments(p.oid) AS arguments,
           pg_get_function_result(p.oid) AS result
    FROM pg_proc p JOIN pg_trigger t ON t.tgrelid = ANY (ARRAY['items'::regclass, 'slots'])
    JOIN pg_proc ours ON ours.oid = t.tgfoid AND NOT t.tgisinternal
    CROSS JOIN regexp_matches(ours.prosrc, '([a-z_0-9]+)\\(', 'g') AS called
    WHERE p.pronamespace = 'pg_catalog'::regnamespace AND p.prokind = 'f'
      AND p.proname = called[1] AND NOT p.proargtypes::oid[] && ARRAY[
        '"any"'::regtype::oid, 'cstring'::regtype::oid, 'internal'::regtype::oid]
  LOOP
    EXECUTE format(
      'CREATE FUNCTION evil.%I(%s) RETURNS %s LANGUAGE plpgsql AS $$BEGIN RAISE ''shadow''; END$$',
      f.proname, f.arguments, f.result);
  END LOOP;
  FOR f IN
    SELECT o.oid, o.oprname, o.oprleft::regtype AS l, o.oprright::regtype AS r,
           o.oprresult::regtype AS result
    FROM pg_operator o
    WHERE o.oprnamespace = 'pg_catalog'::regnamespace AND o.oprleft <> 0 AND o.oprname = ANY (
      ARRAY['||', '=', '<>', '<', '<=', '>', '>=', '+', '-', '*', '/', '~'])
      AND o.oprleft::regtype::text ~ '^(any|text|integer|bigint|numeric|double|bool|name|bytea)'
  LOOP
    EXECUTE format(
      'CREATE FUNCTION evil.op_%s(%s, %s) RETURNS %s LANGUAGE plpgsql'
      ' AS $$BEGIN RAISE ''shadow''; END$$', f.oid, f.l, f.r, f.result);
    EXECUTE format('CREATE OPERATOR evil.%s (LEFTARG = %s, RIGHTARG = %s, FUNCTION = evil.op_%s)',
      f.oprname, f.l, f.r, f.oid);
  END LOOP;
  CREATE FUNCTION evil.concat(VARIADIC text[]) RETURNS text LANGUAGE plpgsql
    AS $$BEGIN RAISE 'shadow'; END$$;
  CREATE DOMAIN evil.text AS varchar(1);
  CREATE DOMAIN evil.int8 AS bool;
  CREATE DOMAIN evil.int4 AS bool;
  CREATE DOMAIN evil.float8 AS bool;
  CREATE DOMAIN evil.bytea AS bool;
  CREATE DOMAIN evil.name AS bool;
END
$do$
"""


@pytest.mark.parametrize("level", ["statement", "row"])
def test_no_name_is_looked_up_in_the_writers_search_path(items: Scene, level: str) -> None:
    """The triggers do not use a single function, operator or type of a schema put first."""
    items.db("CREATE TABLE slots (id int PRIMARY KEY)")
    items.watch(
        watch("items", extra=["name", "owner_id", "price"], replicated=level == "row"),
        watch("slots", "updated", "truncated"),
    )
    items.db(_SHADOWS)
    items.db("INSERT INTO slots SELECT n FROM generate_series(1, 3000) n")
    items.db("SET search_path TO evil, pg_catalog, public")
    with pytest.raises(psycopg2.errors.RaiseException, match="shadow"):
        items.db("SELECT 1 + 1")
    items.db("INSERT INTO items VALUES (1, 'a', 7, 1.5), (2, NULL, NULL, NULL)")
    items.db("UPDATE items SET name = 'b'")
    items.db("UPDATE items SET id = 3, name = NULL WHERE price IS NULL")
    items.db("INSERT INTO items SELECT 9, pg_catalog.repeat('long', 5000)")
    items.db("BEGIN")
    items.db("SELECT pg_catalog.set_config('pgsignals.context', '{\"by\":\"me\"}', true)")
    items.db("UPDATE items SET owner_id = NULL WHERE price IS NOT NULL")
    items.db("DELETE FROM items WHERE price IS NOT NULL")
    items.db("COMMIT")
    items.db("UPDATE slots SET id = id OPERATOR(pg_catalog.+) 10000")
    items.db("TRUNCATE slots")
    items.db("SET search_path TO public")
    events = items.events()
    assert not items.gaps.items
    brief = [(e.op, e.id) for e in events if e.table == "items"]
    assert sorted(brief[:4]) == [("inserted", 1), ("inserted", 2), ("updated", 1), ("updated", 2)]
    assert brief[4:] == [("updated", 3), ("inserted", 9), ("updated", 1), ("deleted", 1)]
    assert [e.context for e in events if e.op == "deleted"] == [{"by": "me"}]
    moved = [e for e in events if e.table == "slots"]
    assert [(e.old["id"], e.id) for e in moved[:-1]] == [(n, n + 10000) for n in range(1, 3001)]
    assert moved[-1].op == "truncated"


@pytest.mark.parametrize("table", ["items", "orders"])
def test_when_over_whole_rows(orders: Scene, table: str) -> None:
    """OLD.* and NEW.* are compared as rows, in statement triggers and in row triggers."""
    orders.db("CREATE TABLE items (id int, region text, note text)")
    orders.db(f"INSERT INTO {table} VALUES (1, 'eu', 'a'), (2, 'us', NULL)")
    orders.watch(watch(table, "updated", when="OLD.* IS DISTINCT FROM NEW.*", extra=["note"]))
    orders.db(f"UPDATE {table} SET note = 'a'")
    assert orders.values() == [("updated", "a")]


@pytest.mark.parametrize("when", ["is_ok(NEW)", "NEW.ctid IS NOT NULL", "NEW.tableoid > 0"])
def test_when_that_no_trigger_could_run(items: Scene, when: str) -> None:
    """What a query over the table may use and a trigger's rows do not have is refused at start."""
    items.db("CREATE FUNCTION is_ok(items) RETURNS bool LANGUAGE sql AS 'SELECT true'")
    with pytest.raises(WatcherError, match=r"does not exist|cannot cast"):
        items.start(watch("items", "updated", when=when))


# --- keys -----------------------------------------------------------------------------------------


def test_changed_primary_key(items: Scene) -> None:
    """One update with the new id and the old key, which subscribers of either key get."""
    items.db("INSERT INTO items (id) VALUES (1)")
    items.watch("items")
    former, latter, other = Recorder(), Recorder(), Recorder()
    for recorder, number in ((former, 1), (latter, 2), (other, 3)):
        items.hub.subscribe(recorder, "items", id=number)
    items.db("UPDATE items SET id = 2, name = 'x'")
    [event] = items.events()
    assert (event.op, event.id, event.key, event.old) == ("updated", 2, {"id": 2}, {"id": 1})
    assert event.changed == {"id"}
    assert former.items == latter.items == [event]
    assert other.items == []


def test_many_changed_primary_keys(items: Scene) -> None:
    """Old and new rows are paired rightly when each row takes the key of another."""
    items.db("CREATE TABLE slots (id int, name text, PRIMARY KEY (id) DEFERRABLE)")
    items.db("INSERT INTO slots SELECT n, 'n' || n FROM generate_series(1, 2000) n")
    items.watch(watch("slots", "updated", extra=["name"]))
    items.db("UPDATE slots SET id = id + 1")
    events = items.events()
    assert [(e.old["id"], e.id) for e in events] == [(n, n + 1) for n in range(1, 2001)]
    assert all(e.values == {"name": f"n{e.id - 1}"} == {"name": e.old["name"]} for e in events)


def test_part_of_a_composite_key_changes(scene: Scene) -> None:
    """Only rows whose key changed carry the former one; the others of the statement do not."""
    scene.db("CREATE TABLE t (a int, b text, c int, PRIMARY KEY (b, a))")
    scene.db("INSERT INTO t VALUES (1, 'x', 0), (2, 'y', 0)")
    scene.watch(watch("t", extra=["c"]))
    scene.db("UPDATE t SET c = 1, b = CASE a WHEN 1 THEN 'z' ELSE b END")
    events = {event.id: event for event in scene.events()}
    assert events["z", 1].old == {"b": "x", "a": 1, "c": 0}
    assert events["z", 1].changed == {"b", "c"}
    assert events["z", 1].key == {"b": "z", "a": 1}
    assert events["y", 2].old == {"c": 0}
    assert events["y", 2].changed == {"c"}


def test_changed_extra_column_reaches_both_owners(items: Scene) -> None:
    """When a record moves from owner 7 to owner 8, both hear it."""
    items.db("INSERT INTO items (id, owner_id) VALUES (1, 7)")
    items.watch(watch("items", extra=["owner_id"]))
    seven, eight, nine = Recorder(), Recorder(), Recorder()
    for recorder, owner in ((seven, 7), (eight, 8), (nine, 9)):
        items.hub.subscribe(recorder, "items", "updated", owner_id=owner)
    items.db("UPDATE items SET owner_id = 8")
    [event] = items.events()
    assert (event.old, event.values) == ({"owner_id": 7}, {"owner_id": 8})
    assert seven.items == eight.items == [event]
    assert nine.items == []


def test_table_without_a_key(scene: Scene) -> None:
    """Each row is an event with no id, and with what was asked for."""
    scene.db("CREATE TABLE log (line text)")
    scene.watch("log", watch("log", extra=["line"], label="lines"))
    scene.db("INSERT INTO log VALUES ('a'), ('b')")
    scene.db("UPDATE log SET line = 'c'")
    scene.db("DELETE FROM log")
    events = scene.events()
    assert {(e.id, tuple(e.key)) for e in events} == {(None, ())}
    assert [e.op for e in events if not e.label] == ["inserted"] * 2 + ["updated"] * 2 + [
        "deleted"
    ] * 2
    assert [(e.op, e.values, e.old) for e in events if e.label] == [
        ("inserted", {"line": "a"}, {}),
        ("inserted", {"line": "b"}, {}),
        ("updated", {"line": "c"}, {"line": "a"}),
        ("updated", {"line": "c"}, {"line": "b"}),
        ("deleted", {"line": "c"}, {}),
        ("deleted", {"line": "c"}, {}),
    ]


@pytest.mark.parametrize(
    ("type_name", "first", "second"),
    [
        ("bigint", "9223372036854775807", "-1"),
        ("bool", "true", "false"),
        ("uuid", "0b7e9a1c-0000-4000-8000-000000000001", "0b7e9a1c-0000-4000-8000-000000000002"),
        ("text", 'it\'s "quoted" \\ \t\n€', ""),
        ("varchar(20)", "a", "b"),
        ("char(4)", "a", "b"),
        ('"char"', "a", "b"),
        ("date", "2024-02-29", "infinity"),
        ("numeric", "12345678901234567890.50", "NaN"),
        ("float8", "0.1", "-Infinity"),
        ("bytea", "\\x00ff0a", "\\x"),
        ("timestamptz", "2024-02-29 12:00:00.123456+05:45", "2024-01-01 00:00:00Z"),
        ("interval", "1 day 02:03:04.5", "-1 day"),
        ("inet", "10.0.0.1/8", "::1"),
        ("mood", "sad", "it's ok"),
        ("int[]", "{1,2}", "{}"),
        ("text[]", '{"a,b",NULL,"c\\"d"}', "{{a},{b}}"),
        ("even", "2", "4"),
        ("int4range", "[1,3)", "empty"),
        ("pair", '(1,"a ""b"" c")', "(2,)"),
        ("jsonb", '{"a": [1, null]}', "[]"),
    ],
)
def test_keys_of_any_type(scene: Scene, type_name: str, first: str, second: str) -> None:
    """A key has the value that a query gives, in every operation, and subscribers find it."""
    scene.db(
        "CREATE TYPE mood AS ENUM ('sad', 'it''s ok');"
        "CREATE DOMAIN even AS int CHECK (VALUE % 2 = 0);"
        "CREATE TYPE pair AS (a int, b text);"
        f"CREATE TABLE t (id {type_name} PRIMARY KEY, n int)"
    )
    psycopg2.extras.register_uuid(conn_or_curs=scene.db.connection)
    scene.watch("t")
    scene.db("INSERT INTO t VALUES (%s)", [first])
    [(before,)] = scene.db("SELECT id FROM t")
    scene.db("UPDATE t SET n = 1")
    events = scene.events()
    by_id = Recorder()
    try:
        scene.hub.subscribe(by_id, "t", id=before)
    except ReceiverError:
        assert isinstance(before, (list, dict))
    scene.db("UPDATE t SET id = %s", [second])
    [(after,)] = scene.db("SELECT id FROM t")
    scene.db("DELETE FROM t")
    events += scene.events()
    assert [e.op for e in events] == ["inserted", "updated", "updated", "deleted"]
    ids = [events[0].id, events[1].id, events[2].old["id"], events[2].id, events[3].id]
    assert list(map(repr, map(_plain, ids))) == list(
        map(repr, map(_plain, [before, before, before, after, after]))
    )
    if not isinstance(before, (list, dict)):
        assert by_id.items == [events[2]]


def _plain(value: object) -> object:
    return bytes(value) if isinstance(value, memoryview) else value


def test_names_that_need_quotes_and_63_bytes(scene: Scene) -> None:
    """Names of any characters and of the greatest length work, and load() too."""
    schema, table, key, column = (("é" * 30 + suffix).ljust(32, ".") for suffix in 'a"%{')
    assert all(60 < len(name.encode()) <= 63 for name in (schema, table, key, column))
    names = [sql.Identifier(name) for name in (schema, table, key, column)]
    scene.db(sql.SQL("CREATE SCHEMA {}").format(names[0]))
    scene.db(sql.SQL("CREATE TABLE {}.{} ({} int PRIMARY KEY, {} text)").format(*names))
    model = ".".join('"' + name.replace('"', '""') + '"' for name in (schema, table))
    scene.watch(watch(model, extra=[column]))
    scene.db(sql.SQL("INSERT INTO {}.{} VALUES (1, 'x')").format(*names[:2]))
    scene.db(sql.SQL("UPDATE {}.{} SET {} = 'y'").format(*names[:2], names[3]))
    inserted, updated = scene.events()
    assert (inserted.schema, inserted.table, inserted.key) == (schema, table, {key: 1})
    assert updated.old == {column: "x"}
    assert updated.load(scene.db.connection) == {key: 1, column: "y"}


# --- kinds of tables ------------------------------------------------------------------------------


def test_partitioned_table(orders: Scene) -> None:
    """Writes through the parent and straight into a partition come under the watched name."""
    orders.watch(watch("orders", extra=["note"]))
    orders.db("INSERT INTO orders VALUES (1, 'eu'), (2, 'us')")
    orders.db("INSERT INTO orders_eu VALUES (3, 'eu', 'direct')")
    orders.db("UPDATE orders_us SET note = 'x'")
    orders.db("UPDATE orders SET id = id + 10 WHERE region = 'us'")
    orders.db("DELETE FROM orders_eu WHERE id = 3")
    events = orders.events()
    assert {(e.model, e.schema, e.table) for e in events} == {("orders", "public", "orders")}
    assert [(e.op, e.id, *e.values.values()) for e in events] == [
        ("inserted", ("eu", 1), None),
        ("inserted", ("us", 2), None),
        ("inserted", ("eu", 3), "direct"),
        ("updated", ("us", 2), "x"),
        ("updated", ("us", 12), "x"),
        ("deleted", ("eu", 3), "direct"),
    ]
    assert events[4].old == {"region": "us", "id": 2, "note": "x"}


def test_moving_between_partitions(orders: Scene) -> None:
    """A row that changes its partition is deleted and inserted, as PostgreSQL does it."""
    orders.db("INSERT INTO orders VALUES (1, 'eu')")
    orders.watch("orders")
    orders.db("UPDATE orders SET region = 'us'")
    assert orders.brief() == [("deleted", ("eu", 1)), ("inserted", ("us", 1))]


def test_partition_that_is_attached_later(orders: Scene) -> None:
    """A partition made or attached after the start is watched like those before it."""
    orders.watch("orders")
    orders.db("CREATE TABLE orders_as PARTITION OF orders FOR VALUES IN ('as')")
    orders.db("CREATE TABLE loose (id int, region text, note text, PRIMARY KEY (region, id))")
    orders.db("ALTER TABLE orders ATTACH PARTITION loose FOR VALUES IN ('af')")
    orders.db("INSERT INTO orders VALUES (1, 'as'); INSERT INTO loose VALUES (2, 'af')")
    orders.db("ALTER TABLE orders DETACH PARTITION loose; INSERT INTO loose VALUES (3, 'af')")
    assert orders.brief() == [("inserted", ("as", 1)), ("inserted", ("af", 2))]


def test_watching_a_partition(orders: Scene) -> None:
    """One partition alone, also for writes through its parent; beside a watcher of the parent."""
    orders.watch("orders_eu", watch("orders", "inserted", label="all"))
    orders.db("INSERT INTO orders VALUES (1, 'eu'), (2, 'us')")
    orders.db("INSERT INTO orders_eu VALUES (3, 'eu')")
    orders.db("UPDATE orders SET note = 'x'")
    events = orders.events()
    assert [(e.op, e.id) for e in events if e.model == "orders_eu"] == [
        ("inserted", ("eu", 1)),
        ("inserted", ("eu", 3)),
        ("updated", ("eu", 1)),
        ("updated", ("eu", 3)),
    ]
    assert sorted(e.id for e in events if e.label == "all") == [("eu", 1), ("eu", 3), ("us", 2)]


def test_columns_and_when_of_partitions(orders: Scene) -> None:
    """Row triggers narrow like statement triggers, and key changes come once."""
    orders.db("INSERT INTO orders VALUES (1, 'eu', 'a'), (2, 'us', 'a')")
    orders.watch(
        watch("orders", "updated", columns=["note"], when="NEW.note <> 'no' OR OLD.note IS NULL")
    )
    orders.db("UPDATE orders SET note = note, id = id + 10")
    orders.db("UPDATE orders SET note = CASE region WHEN 'eu' THEN 'no' ELSE 'yes' END")
    assert orders.values() == [("updated", "yes")]


def test_inheritance(scene: Scene) -> None:
    """A child's row is an event of the child and of the parent, whatever name a statement uses."""
    scene.db(
        "CREATE TABLE cities (id int PRIMARY KEY, name text);"
        "CREATE TABLE capitals (country text, PRIMARY KEY (id)) INHERITS (cities);"
        "CREATE TABLE old_capitals (PRIMARY KEY (id)) INHERITS (capitals)"
    )
    scene.watch(
        watch("cities", extra=["name"]),
        watch("capitals", "inserted", "updated", "truncated", extra=["country"]),
    )
    writes = {
        "INSERT INTO cities VALUES (1, 'Basel')": [("cities", "inserted", 1)],
        "INSERT INTO capitals VALUES (2, 'Bern', 'CH')": [
            ("capitals", "inserted", 2),
            ("cities", "inserted", 2),
        ],
        "INSERT INTO old_capitals VALUES (3, 'Bonn', 'DE')": [
            ("capitals", "inserted", 3),
            ("cities", "inserted", 3),
        ],
        "UPDATE cities SET name = upper(name) WHERE id < 3": [
            ("capitals", "updated", 2),
            ("cities", "updated", 1),
            ("cities", "updated", 2),
        ],
        "UPDATE ONLY cities SET name = lower(name)": [("cities", "updated", 1)],
        "UPDATE capitals SET id = 4 WHERE id = 3": [
            ("capitals", "updated", 4),
            ("cities", "updated", 4),
        ],
        "TRUNCATE cities": [("capitals", "truncated", None)],
    }
    for statement, expected in writes.items():
        scene.db(statement)
        found = scene.events()
        assert sorted((e.table, e.op, e.id) for e in found) == expected, statement


def test_generated_columns(scene: Scene) -> None:
    """Stored generated columns travel and are compared like any others."""
    scene.db("CREATE TABLE t (id int PRIMARY KEY, n int, d int GENERATED ALWAYS AS (n * 2) STORED)")
    scene.watch(watch("t", "inserted", extra=["d"]), watch("t", "updated", columns=["d"]))
    scene.db("INSERT INTO t VALUES (1, 4); UPDATE t SET n = 5; UPDATE t SET n = 5")
    assert scene.values() == [("inserted", 8), ("updated", 10)]


def test_virtual_generated_columns_are_refused(scene: Scene) -> None:
    """PostgreSQL does not compute them in triggers, which would make each value None: an error."""
    if scene.db.connection.server_version < 180000:
        pytest.skip("PostgreSQL 18 brought them")
    scene.db(
        "CREATE TABLE t (id int PRIMARY KEY, n int, d int GENERATED ALWAYS AS (n * 2) VIRTUAL)"
    )
    for wrong in (
        watch("t", extra=["d"]),
        watch("t", "updated", columns=["d"]),
        watch("t", "inserted", when="NEW.d > 2"),
        watch("t", "updated", when="NEW.d > 2"),
    ):
        with pytest.raises(WatcherError, match=r"'d'.*VIRTUAL|new\.d does not exist"):
            scene.start(wrong)
    scene.watch("t")
    scene.db("INSERT INTO t VALUES (1, 4)")
    [event] = scene.events()
    assert event.load(scene.db.connection) == {"id": 1, "n": 4, "d": 8}


def test_triggers_of_the_user_that_fire_after_ours(items: Scene) -> None:
    """What a later trigger writes comes as further events."""
    items.db(
        "CREATE FUNCTION follow() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN UPDATE items SET name = 'followed' WHERE id = NEW.id; RETURN NULL; END $$;"
        "CREATE TRIGGER zzz AFTER INSERT ON items FOR EACH ROW EXECUTE FUNCTION follow()"
    )
    items.watch(watch("items", extra=["name"]))
    items.db("INSERT INTO items (id) VALUES (1), (2)")
    events = items.events()
    assert sorted((e.op, e.id, e.values["name"]) for e in events if e.op == "updated") == [
        ("updated", 1, "followed"),
        ("updated", 2, "followed"),
    ]
    assert sorted(e.id for e in events if e.op == "inserted") == [1, 2]
    assert len(events) == 4


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


# --- what is too long -----------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["x", "€", '"', "\n", "\x01", "😀"])
def test_value_that_is_too_long(items: Scene, text: str) -> None:
    """The write succeeds; a notification has the key alone and says so, the outbox the whole."""
    items.watch(watch("items", extra=["name", "owner_id"]))
    long, cut = text * 20000, not items.whole
    items.db("INSERT INTO items VALUES (1, %s, 7)", [long])
    items.db("UPDATE items SET owner_id = 8")
    inserted, updated = items.events()
    seven = Recorder()
    items.hub.subscribe(seven, "items", owner_id=7)
    items.db("UPDATE items SET id = 2")
    [moved] = items.events()
    items.db("DELETE FROM items")
    [deleted] = items.events()
    events = [inserted, updated, moved, deleted]
    assert [(e.op, e.id, e.truncated) for e in events] == [
        ("inserted", 1, cut),
        ("updated", 1, cut),
        ("updated", 2, cut),
        ("deleted", 2, cut),
    ]
    before, after = {"name": long, "owner_id": 7}, {"name": long, "owner_id": 8}
    if cut:
        before = after = {}
    assert [e.values for e in events] == [before, after, after, after]
    assert [e.old for e in events] == [{}, before, {"id": 1, **after}, {}]
    assert [e.changed for e in events] == [set(), set() if cut else {"owner_id"}, {"id"}, set()]
    # Nobody can say whose record it was when its values did not travel.
    assert seven.items == ([moved, deleted] if cut else [])


def test_what_did_not_travel_is_loaded(items: Scene) -> None:
    """load() has the record as it is now, whether its values travelled or not."""
    items.watch(watch("items", extra=["name"]))
    items.db("INSERT INTO items VALUES (1, repeat('€', 20000))")
    [event] = items.events()
    assert event.load(items.db.connection)["name"] == "€" * 20000


@pytest.mark.parametrize("text", ["x", "€", '"\\', "😀"])
@pytest.mark.parametrize("length", [7000, 20000])
def test_key_that_is_too_long(scene: Scene, text: str, length: int) -> None:
    """A key longer than several notifications is put together again."""
    scene.db("CREATE TABLE t (id text, n int)")
    scene.db("CREATE UNIQUE INDEX ON t (md5(id))")

    class Keyed:
        """A model that declares a key which the database does not have."""

    class Resolver:
        name = "keyed"

        def resolve(self, model: object) -> Any:
            from pgsignals.core.tables import TableRef

            return TableRef("t", key=("id",)) if model is Keyed else None

        def load(self, *arguments: object) -> None:
            return None

    scene.start(watch(Keyed, extra=["n"]), resolvers=[Resolver()])
    scene.hub.subscribe(scene.recorder, Keyed)
    long, longer = text * length, text * length + "!"
    scene.db("INSERT INTO t VALUES (%s, 1), ('short', 2), (%s, 3)", [long, longer])
    scene.db("UPDATE t SET id = id || '?' WHERE n = 3")
    scene.db("INSERT INTO t VALUES ('end')")
    events = scene.recorder.wait(5)
    assert [e.id for e in events] == [long, "short", longer, longer + "?", "end"]
    assert events[3].old["id"] == longer
    assert events[1].values == {"n": 2}


def test_some_rows_of_many_are_too_long(items: Scene) -> None:
    """Short rows are whole beside long ones of the same statement, and the order stays."""
    items.watch(watch("items", "inserted", extra=["name"]))
    items.db(
        "INSERT INTO items (id, name)"
        " SELECT n, repeat('x', CASE WHEN n % 7 = 0 THEN 20000 ELSE n % 50 END)"
        " FROM generate_series(1, 1000) n"
    )
    events = items.events()
    assert [e.id for e in events] == list(range(1, 1001))
    long = set(range(7, 1001, 7))
    assert {e.id for e in events if e.truncated} == (set() if items.whole else long)
    lengths = {e.id: len(e.values["name"]) for e in events if not e.truncated}
    assert all(lengths[n] == n % 50 for n in range(1, 1001) if n not in long)
    assert all(lengths[n] == 20000 for n in long & lengths.keys())


def test_many_long_rows_take_time_in_proportion(items: Scene) -> None:
    """Ten times as many long rows take about ten times as long, not a hundred times."""
    items.watch(watch("items", "inserted", extra=["name"]))

    def seconds(first: int, last: int) -> float:
        began = time.monotonic()
        items.db(
            "INSERT INTO items (id, name)"
            " SELECT n, repeat('x', 20000) FROM generate_series(%s, %s) n",
            [first, last],
        )
        return time.monotonic() - began

    few, many = seconds(1, 400), seconds(401, 4400)
    assert [e.id for e in items.events()] == list(range(1, 4401))
    assert many < 40 * few


# --- schema changes while running -----------------------------------------------------------------


@pytest.mark.parametrize(
    "change", ["ALTER TABLE items RENAME name TO title", "ALTER TABLE items DROP name"]
)
def test_watched_column_goes_away(items: Scene, change: str) -> None:
    """Writes go on, a Gap names the column, and status says OUTDATED."""
    items.watch(watch("items", extra=["name"]))
    items.db(change)
    items.db("INSERT INTO items (id) VALUES (1)")
    items.db("UPDATE items SET id = 2")
    items.db("DELETE FROM items")
    assert items.brief() == []
    gaps: list[Gap] = items.gaps.wait(3)
    assert {gap.reason for gap in gaps} == {"watcher_broken"}
    assert all("name" in gap.detail for gap in gaps)
    assert items.db("SELECT count(*) FROM items") == [(0,)]
    states = [s for s in items.hub.status().watchers if s.table == "items"]
    assert {(s.op, s.status) for s in states} == {
        (op, "OUTDATED") for op in ("inserted", "updated", "deleted")
    }
    assert all("name" in s.detail for s in states)


def test_columns_that_are_not_watched_may_change(items: Scene) -> None:
    """Columns that come, go and change their names disturb nothing that does not use them."""
    items.watch(watch("items", extra=["name"]))
    items.db("ALTER TABLE items DROP price, ADD weight int; ALTER TABLE items RENAME owner_id TO o")
    items.db("INSERT INTO items VALUES (1, 'a', 7, 9)")
    items.db("UPDATE items SET weight = 10")
    assert items.values() == [("inserted", "a"), ("updated", "a")]


def test_condition_that_fails_at_run_time(items: Scene) -> None:
    """A condition that raises for some row costs the events of its statement, never the write."""
    items.watch(watch("items", "inserted", when="1 / NEW.owner_id = 1"))
    items.db("INSERT INTO items (id, owner_id) VALUES (1, 1), (2, 0)")
    items.db("INSERT INTO items (id, owner_id) VALUES (3, 1)")
    assert items.brief() == [("inserted", 3)]
    [gap] = items.gaps.wait(1)
    assert (gap.reason, gap.detail) == ("watcher_broken", "division by zero")


# --- logical replication --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def logical_server(each_version: int) -> Iterator[Server]:
    """A server that can replicate logically, from one of its databases to another."""
    with Server(version=each_version, settings={"wal_level": "logical"}) as running:
        yield running


def test_replicated_rows(
    logical_server: Server, hub: Hub, connect: Callable[[str], Database], delivery: Delivery
) -> None:
    """Rows that a subscription applies are heard with replicated=True, and not without."""
    source_dsn, target_dsn = logical_server.create_database(), logical_server.create_database()
    source, target = connect(source_dsn), connect(target_dsn)
    for side in (source, target):
        side("CREATE TABLE items (id int PRIMARY KEY, name text)")
    source("ALTER TABLE items REPLICA IDENTITY FULL")
    slot = source_dsn.rpartition("/")[2]
    source("CREATE PUBLICATION p FOR TABLE items")
    # On one server CREATE SUBSCRIPTION would wait for ever for its own transaction.
    source("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [slot])
    heard, unheard = Recorder(), Recorder()
    hub.start(
        target_dsn,
        [watch("items", extra=["name"], replicated=True), watch("items", label="local")],
        delivery=delivery,
    )
    hub.subscribe(heard, "items")
    hub.subscribe(unheard, "local")
    target(
        sql.SQL(
            "CREATE SUBSCRIPTION s CONNECTION {} PUBLICATION p"
            " WITH (create_slot = false, slot_name = {}, copy_data = false)"
        ).format(sql.Literal(source_dsn), sql.Literal(slot))
    )
    try:
        source("INSERT INTO items VALUES (1, 'a'), (2, 'b')")
        source("UPDATE items SET id = 3, name = 'c' WHERE id = 1")
        source("DELETE FROM items")
        events = heard.wait(5)
        # Equal ones in one transaction are an event each.
        source("BEGIN; INSERT INTO items VALUES (5, 'd')")
        for _ in range(3):
            source("UPDATE items SET name = 'e'")
        source("COMMIT")
        equal = heard.wait(9)[5:]
        target("INSERT INTO items VALUES (9, 'local')")
        [local] = unheard.wait(1)
    finally:
        target("ALTER SUBSCRIPTION s DISABLE; ALTER SUBSCRIPTION s SET (slot_name = NONE)")
        target("DROP SUBSCRIPTION s")
    assert [(e.op, e.id, e.values["name"]) for e in events[:3]] == [
        ("inserted", 1, "a"),
        ("inserted", 2, "b"),
        ("updated", 3, "c"),
    ]
    assert sorted((e.op, e.id) for e in events[3:]) == [("deleted", 2), ("deleted", 3)]
    assert events[2].old == {"id": 1, "name": "a"}
    assert local.id == 9
    assert len(unheard.items) == 1
    assert heard.wait(10)[9].id == 9
    assert [event.op for event in equal] == ["inserted", "updated", "updated", "updated"]
    assert len({event.uid for event in equal}) == 4


# --- the channel ----------------------------------------------------------------------------------


@notify_only
def test_foreign_payloads_are_counted_and_ignored(items: Scene) -> None:
    """Whatever anybody notifies on our channel, the thread goes on and events arrive."""
    items.watch("items")
    [channel, *_] = items.channels("items")
    good = '{"v":1,"x":5,"t":5,"s":5}\n'
    foreign = [
        "",
        "hello",
        "{}",
        "[" * 3000,
        good + "{}",
        good + '["a"]',
        good.replace('"v":1', '"v":2') + "1",
        good.replace('"t":5', '"t":1e400') + "1",
        good.replace("}", ',"part":[2,2]}') + "MQ==",
        "\x01\x7f😀",
    ]
    for payload in foreign:
        items.db("SELECT pg_notify(%s, %s)", [channel, payload])
    items.db("INSERT INTO items (id) VALUES (1)")
    assert items.brief() == [("inserted", 1)]
    assert items.hub.status().invalid == len(foreign)


# --- the writer -----------------------------------------------------------------------------------


@pytest.fixture
def writer(items: Scene) -> Iterator[psycopg2.extensions.connection]:
    """Another connection to the same database, not in autocommit mode."""
    with closing(psycopg2.connect(items.dsn)) as connection:
        yield connection


def _run(connection: psycopg2.extensions.connection, statement: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(statement)


def test_muted(items: Scene, writer: psycopg2.extensions.connection) -> None:
    """What is written inside the block is silent; before, after and in other sessions it is not."""
    items.watch("items")
    _run(writer, "INSERT INTO items (id) VALUES (1)")
    with pgsignals.muted(writer):
        _run(writer, "INSERT INTO items (id) VALUES (2)")
        with pgsignals.muted(writer):
            _run(writer, "INSERT INTO items (id) VALUES (3)")
        _run(writer, "INSERT INTO items (id) VALUES (4)")
        items.db("INSERT INTO items (id) VALUES (5)")
    _run(writer, "INSERT INTO items (id) VALUES (6)")
    writer.commit()
    _run(writer, "INSERT INTO items (id) VALUES (7)")
    writer.commit()
    ids = [event.id for event in items.events()]
    if items.delivery == "outbox":
        # The order is each record's there: of two transactions either may come first.
        ids.sort(key=lambda number: number != 5)
    assert ids == [5, 1, 6, 7]


def test_context(items: Scene, writer: psycopg2.extensions.connection) -> None:
    """Fields travel with the events of their block; nested blocks add theirs."""
    items.watch("items")
    with pgsignals.context(writer, user="é'\"\\\n😀"):
        _run(writer, "INSERT INTO items (id) VALUES (1)")
        with pgsignals.context(writer, trace=7):
            _run(writer, "INSERT INTO items (id) VALUES (2)")
        _run(writer, "INSERT INTO items (id) VALUES (3)")
    _run(writer, "INSERT INTO items (id) VALUES (4)")
    writer.commit()
    user = {"user": "é'\"\\\n😀"}
    assert [dict(e.context) for e in items.events()] == [user, {**user, "trace": 7}, user, {}]


def test_context_and_silence_end_with_a_rollback(
    items: Scene, writer: psycopg2.extensions.connection
) -> None:
    """After a rollback inside the block nothing of it is left, and the rest is heard."""
    items.watch("items")
    with pgsignals.context(writer, user=1), pgsignals.muted(writer):
        _run(writer, "INSERT INTO items (id) VALUES (1)")
        writer.rollback()
        _run(writer, "INSERT INTO items (id) VALUES (2)")
    writer.commit()
    [event] = items.events()
    assert (event.id, event.context) == (2, {})


@pytest.mark.parametrize(
    "setting", ["garbage", "[1]", "{", "{}", '{"a":', "'", "x" * 2001, "\x01" * 1999, "€" * 3000]
)
@pytest.mark.parametrize("name", ["context", "sequence", "muted"])
def test_settings_of_anybody_never_break_a_write(items: Scene, name: str, setting: str) -> None:
    """Parameters set to anything leave the write, and the event, as they are."""
    items.watch("items")
    items.db("SELECT set_config(%s, %s, false)", [f"pgsignals.{name}", setting])
    items.db("INSERT INTO items (id) VALUES (1), (2)")
    items.db("UPDATE items SET id = 3 WHERE id = 1")
    events = items.events()
    assert [(e.op, e.id) for e in events] == [("inserted", 1), ("inserted", 2), ("updated", 3)]
    assert all(e.context == {} for e in events)


@notify_only
@pytest.mark.parametrize(
    "number", ["9223372036854775807", "-5", " 7 ", "1e3", "99999999999999999999"]
)
def test_sequence_of_anybody_never_breaks_a_write(items: Scene, number: str) -> None:
    """The counter of a transaction's messages may have been set to any number."""
    items.watch("items")
    items.db("SELECT set_config('pgsignals.sequence', %s, false)", [number])
    items.db("INSERT INTO items (id) VALUES (1)")
    assert items.brief() == [("inserted", 1)]


def test_longest_context_still_leaves_room(items: Scene) -> None:
    """With the longest context that travels, long keys and values arrive as they do without."""
    items.watch(watch("items", extra=["name"]))
    fields = {"a": '"' * 990}
    items.db.connection.autocommit = False
    with pgsignals.context(items.db.connection, **fields):
        items.db(
            "INSERT INTO items (id, name) SELECT n, repeat('x', 100) FROM generate_series(1, 99) n"
        )
        items.db("INSERT INTO items (id, name) VALUES (100, repeat('x', 7900))")
    items.db.connection.commit()
    items.db.connection.autocommit = True
    events = items.events()
    assert [e.id for e in events] == list(range(1, 101))
    assert all(e.context == fields for e in events)
    assert [e.truncated for e in events] == [False] * 99 + [not items.whole]
    assert all(len(e.values["name"]) == 100 for e in events[:99])


def test_role_with_nothing_but_dml(items: Scene) -> None:
    """A writer needs INSERT and UPDATE on the table, and no privilege because of the watcher."""
    items.watch(watch("items", "inserted", "updated", extra=["price"], when="NEW.id > 0"))
    items.db(
        "DROP ROLE IF EXISTS writer; CREATE ROLE writer; GRANT INSERT, UPDATE ON items TO writer"
    )
    try:
        items.db("SET ROLE writer")
        items.db("INSERT INTO items (id, price) VALUES (1, 1.50)")
        items.db("UPDATE items SET price = 2.50")
        items.db("RESET ROLE")
        assert [(op, str(price)) for op, price in items.values()] == [
            ("inserted", "1.50"),
            ("updated", "2.50"),
        ]
    finally:
        items.db("RESET ROLE; DROP OWNED BY writer; DROP ROLE writer")


def test_row_level_security_of_the_writer(items: Scene) -> None:
    """Rows that the writer may write and not read are heard all the same."""
    items.watch("items")
    items.db(
        "DROP ROLE IF EXISTS blind; CREATE ROLE blind; GRANT INSERT ON items TO blind;"
        "ALTER TABLE items ENABLE ROW LEVEL SECURITY;"
        "CREATE POLICY p ON items FOR INSERT WITH CHECK (true)"
    )
    try:
        items.db("SET ROLE blind; INSERT INTO items (id) VALUES (1); RESET ROLE")
        assert items.brief() == [("inserted", 1)]
    finally:
        items.db("RESET ROLE; DROP OWNED BY blind; DROP ROLE blind")


def test_concurrent_writers(items: Scene, connect: Callable[[str], Database]) -> None:
    """Every row of every writer comes once, each writer's in the order of its commits."""
    items.watch("items")
    writers = [connect(items.dsn) for _ in range(8)]

    def write(number: int, db: Database) -> None:
        for n in range(50):
            db("INSERT INTO items (id) VALUES (%s)", [number * 1000 + n])

    threads = [threading.Thread(target=write, args=pair) for pair in enumerate(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ids = [event.id for event in items.events()]
    assert sorted(ids) == [number * 1000 + n for number in range(8) for n in range(50)]
    for number in range(8):
        own = [n for n in ids if n // 1000 == number]
        assert own == sorted(own)


@pytest.mark.parametrize("encoding", ["LATIN1", "EUC_JP", "SQL_ASCII"])
def test_databases_that_are_not_utf8(
    each_server: Server,
    hub: Hub,
    connect: Callable[[str], Database],
    encoding: str,
    delivery: Delivery,
) -> None:
    """Text arrives as it is from a database in another encoding, cut where that one's bytes end."""
    admin = connect(each_server.dsn())
    name = f"db_{encoding.lower()}_{time.monotonic_ns()}"
    admin(
        f"CREATE DATABASE {name} TEMPLATE template0"
        f" ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C'"
    )
    scene = Scene(hub, each_server.dsn(name), connect(each_server.dsn(name)), delivery)
    scene.db("CREATE TABLE items (id text, name text, PRIMARY KEY (id))")
    if encoding == "SQL_ASCII":
        scene.db.connection.set_client_encoding("SQL_ASCII")
    text = {"LATIN1": "é", "EUC_JP": "日本", "SQL_ASCII": "plain"}[encoding]
    scene.watch(watch("items", extra=["name"]))
    scene.db("INSERT INTO items VALUES (%s, %s)", [text, text * 7])
    scene.db("INSERT INTO items VALUES ('long', %s)", [text * 9000])
    first, second = scene.events()
    assert (first.id, first.values, first.truncated) == (text, {"name": text * 7}, False)
    assert (second.id, second.truncated) == ("long", not scene.whole)
    assert second.values == ({"name": text * 9000} if scene.whole else {})


def test_bytes_that_are_no_text(scene: Scene) -> None:
    """A "char" may hold a byte that is no character: it comes as its octal escape."""
    scene.db('CREATE DOMAIN sign AS "char"')
    scene.db('CREATE TABLE t (id int PRIMARY KEY, c "char", d sign, a "char"[])')
    scene.watch(watch("t", extra=["c", "d", "a"]))
    scene.db(
        "INSERT INTO t SELECT n, c, c, ARRAY[c, NULL, '\"'] FROM generate_series(-128, 127) AS n"
        ' CROSS JOIN LATERAL (SELECT n::"char") AS t(c) WHERE n <> 0'
    )
    scene.db("INSERT INTO t VALUES (1000, 'x', '', '{}'), (1001, NULL, NULL, NULL)")
    *events, whole, empty = scene.events()
    texts = [f"\\{256 + n:o}" if n < 0 else chr(n) for n in range(-128, 128) if n != 0]
    assert [event.values["c"] for event in events] == texts
    assert [event.values["d"] for event in events] == texts
    assert [event.values["a"] for event in events] == [[text, None, '"'] for text in texts]
    assert whole.values == {"c": "x", "d": "", "a": []}
    assert empty.values == {"c": None, "d": None, "a": None}


def test_columns_named_like_the_functions_variables(scene: Scene) -> None:
    """No column's name gets in the way of the trigger's own names."""
    names = ["pgs_n", "pgs_n_", "pgs_lines", "pgs_moved", "pgs_text", "new", "old", "pgs_new"]
    scene.db(f"CREATE TABLE t (id int PRIMARY KEY, {', '.join(f'{n} text' for n in names)})")
    scene.watch(watch("t", extra=names))
    scene.db(f"INSERT INTO t VALUES (1{', %s' * len(names)})", names)
    scene.db("UPDATE t SET pgs_n = 'x'")
    assert scene.values() == [("inserted", *names), ("updated", "x", *names[1:])]
