"""What writers and strangers do, on the oldest and the newest PostgreSQL, and what comes of it.

In each delivery: what differs there is asserted as such.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import psycopg2
import psycopg2.extras
import pytest

import pgsignals
from pgsignals import Hub, watch
from pgsignals.hub.hub import Delivery
from pgsignals.testing import Server
from tests.conftest import Database
from tests.scene import Scene
from tests.scene import items as items
from tests.scene import orders as orders
from tests.scene import scene as scene
from tests.scene import writer as writer

notify_only = pytest.mark.parametrize("delivery", ["notify"])


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


@notify_only
@pytest.mark.parametrize("number", ["garbage", "-5", "1e3", "9223372036854775807", " 7 ", "-", ""])
def test_sequence_of_anybody_never_breaks_a_row_trigger(orders: Scene, number: str) -> None:
    """In a row trigger, too, the counter may have been set to anything."""
    orders.watch("orders")
    orders.db("SELECT set_config('pgsignals.sequence', %s, false)", [number])
    orders.db("INSERT INTO orders (id, region) VALUES (1, 'eu'), (2, 'us'), (3, 'eu')")
    assert [event.key["id"] for event in orders.events()] == [1, 2, 3]
    assert list(orders.gaps.items) == []


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
