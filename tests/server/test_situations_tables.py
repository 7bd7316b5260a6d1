"""What each kind of table yields, and each change of it, on the oldest and the newest PostgreSQL.

In each delivery: what differs there is asserted as such.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from psycopg2 import sql

from pgsignals import Gap, Hub, watch
from pgsignals.errors import WatcherError
from pgsignals.hub.hub import Delivery
from pgsignals.testing import Server
from tests.conftest import Database, Recorder
from tests.scene import Scene
from tests.scene import items as items
from tests.scene import orders as orders
from tests.scene import scene as scene
from tests.waiting import eventually

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


def test_what_a_transaction_knows_of_partitions_ends_with_them(orders: Scene) -> None:
    """Partitions that a transaction has written to, and takes away and adds, are told apart."""
    orders.watch("orders")
    db = orders.db
    db("BEGIN; INSERT INTO orders (id, region) VALUES (1, 'eu'), (2, 'us')")
    db("SAVEPOINT here; INSERT INTO orders (id, region) VALUES (3, 'eu'); ROLLBACK TO here")
    db("INSERT INTO orders_eu (id, region) VALUES (4, 'eu')")
    db("SET CONSTRAINTS ALL IMMEDIATE; ALTER TABLE orders DETACH PARTITION orders_eu")
    db("INSERT INTO orders_eu (id, region) VALUES (5, 'eu')")
    db("ALTER TABLE orders ATTACH PARTITION orders_eu FOR VALUES IN ('eu')")
    db("INSERT INTO orders (id, region) VALUES (6, 'eu')")
    db("CREATE TABLE orders_af PARTITION OF orders FOR VALUES IN ('af')")
    db("INSERT INTO orders (id, region) VALUES (7, 'af'); COMMIT")
    assert [event.key["id"] for event in orders.events()] == [1, 2, 4, 6, 7]


@pytest.mark.parametrize("delivery", ["notify"])
def test_partitions_of_anybody_never_break_a_write(orders: Scene) -> None:
    """What a transaction knows of partitions may have been set to anything."""
    orders.watch("orders")
    [(name,)] = orders.db(
        "SELECT tgname::text FROM pg_trigger WHERE tgrelid = 'orders'::regclass"
        " AND tgname LIKE 'pgsignals%' AND tgtype & 4 > 0"
    )
    for number, setting in enumerate(("garbage", ",,", "1" * 5000, "€" * 3000)):
        orders.db("SELECT set_config(%s, %s, false)", [f"{name}.parts", setting])
        orders.db("INSERT INTO orders (id, region) VALUES (%s, 'eu')", [number])
    assert [event.key["id"] for event in orders.events()] == [0, 1, 2, 3]


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

    def broken() -> list[Gap]:
        return [gap for gap in list(items.gaps.items) if gap.reason == "watcher_broken"]

    eventually(broken, lambda found: len(found) >= 3)
    assert all("name" in gap.detail for gap in broken())
    # A look at the triggers may come in between, and marks a loss for a consumer of the outbox.
    others = {gap.reason for gap in items.gaps.items} - {"watcher_broken"}
    assert others <= ({"retention"} if items.delivery == "outbox" else set())
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
