"""What travels of keys, of odd names and of long values, on the oldest and the newest PostgreSQL.

In each delivery: what differs there is asserted as such.
"""

from __future__ import annotations

import time
from typing import Any

import psycopg2
import psycopg2.extras
import pytest
from psycopg2 import sql

from pgsignals import watch
from pgsignals.errors import ReceiverError
from tests.conftest import Recorder
from tests.scene import Scene
from tests.scene import items as items
from tests.scene import scene as scene

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
