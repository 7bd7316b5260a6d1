"""In which order events of several transactions come from the outbox."""

from __future__ import annotations

from typing import Any

import psycopg2
import pytest

import pgsignals
from pgsignals.testing import Server
from tests.conftest import Database, Recorder


@pytest.fixture
def shop(dsn: str, db: Database) -> Database:
    """A database with a table."""
    db("CREATE TABLE items (id bigint PRIMARY KEY, n int NOT NULL DEFAULT 0)")
    return db


def start(hub: pgsignals.Hub, shop: Database, *ops: str, **options: Any) -> None:
    items = pgsignals.watch("items", *ops, extra=["n"] if "truncated" not in ops else [])
    hub.start(shop.dsn, [items], delivery="outbox", name="mailer", **options)


@pytest.mark.parametrize("hub_is_up", [True, False])
def test_ids_in_the_opposite_order_of_commits(
    hub: pgsignals.Hub, shop: Database, recorder: Recorder, hub_is_up: bool
) -> None:
    """Both come, whichever order is read in; while a consumer reads, as they are committed."""
    hub.on("items", "inserted")(recorder)
    start(hub, shop)
    if not hub_is_up:
        assert hub.stop()
    first = psycopg2.connect(shop.dsn)
    try:
        first.cursor().execute("INSERT INTO items VALUES (1)")
        shop("INSERT INTO items VALUES (2)")
        if hub_is_up:
            recorder.wait(1)
        first.commit()
    finally:
        first.close()
    if not hub_is_up:
        start(hub, shop)
    came = [event.id for event in recorder.wait(2)]
    # Of different records, within one window, the id decides.
    assert came == ([2, 1] if hub_is_up else [1, 2])
    assert [int(event.position) for event in recorder.items] == sorted(
        (int(event.position) for event in recorder.items), reverse=hub_is_up
    )


def test_a_transaction_in_another_database(
    server: Server, hub: pgsignals.Hub, shop: Database, recorder: Recorder
) -> None:
    """It may last as long as it likes: it delays no event."""
    hub.on("items", "inserted")(recorder)
    start(hub, shop)
    elsewhere = psycopg2.connect(server.create_database())
    try:
        elsewhere.cursor().execute("CREATE TABLE lasting ()")
        for key in range(1, 4):
            shop("INSERT INTO items VALUES (%s)", (key,))
            recorder.wait(key)
        # The cursor too goes on: nothing that has been delivered comes again.
        assert hub.stop()
        shop("INSERT INTO items VALUES (4)")
        start(hub, shop)
        assert [event.id for event in recorder.wait(4)] == [1, 2, 3, 4]
    finally:
        elsewhere.close()


def test_one_transaction_in_its_own_order(
    hub: pgsignals.Hub, shop: Database, recorder: Recorder
) -> None:
    """Statements of many rows, of one, and TRUNCATE come as they ran."""
    hub.on("items")(lambda event: recorder((event.op, event.id)))
    start(hub, shop, "inserted", "updated", "deleted", "truncated")
    shop(
        "BEGIN; INSERT INTO items SELECT generate_series(1, 3);"
        " UPDATE items SET n = 1 WHERE id = 2;"
        " SAVEPOINT s; UPDATE items SET n = 2; ROLLBACK TO s;"
        " UPDATE items SET id = 9 WHERE id = 3; DELETE FROM items WHERE id = 1; COMMIT"
    )
    shop("TRUNCATE items")
    assert recorder.wait(7) == [
        ("inserted", 1),
        ("inserted", 2),
        ("inserted", 3),
        ("updated", 2),
        ("updated", 9),
        ("deleted", 1),
        ("truncated", None),
    ]


def test_a_key_that_goes_from_one_record_to_another(
    hub: pgsignals.Hub, shop: Database, recorder: Recorder
) -> None:
    """Who takes a key that another transaction gave up comes after it, whatever ids they have."""
    shop("INSERT INTO items VALUES (1, 10)")
    hub.on("items")(lambda event: recorder((event.op, event.values["n"])))
    start(hub, shop, "inserted", "updated", "deleted")
    later = psycopg2.connect(shop.dsn)
    try:
        with later.cursor() as cursor:
            cursor.execute("SELECT pg_current_xact_id()")
            shop("DELETE FROM items WHERE id = 1")
            cursor.execute("INSERT INTO items VALUES (1, 20)")
        later.commit()
    finally:
        later.close()
    assert recorder.wait(2) == [("deleted", 10), ("inserted", 20)]


def test_a_trigger_that_changes_the_row_again(
    hub: pgsignals.Hub, shop: Database, recorder: Recorder
) -> None:
    """What an AFTER trigger of the table's own did comes before what made it fire."""
    shop(
        "CREATE FUNCTION again() RETURNS trigger LANGUAGE plpgsql AS"
        " $$BEGIN UPDATE items SET n = 7 WHERE id = NEW.id; RETURN NULL; END$$;"
        " CREATE TRIGGER again AFTER INSERT ON items FOR EACH ROW EXECUTE FUNCTION again()"
    )
    hub.on("items")(lambda event: recorder((event.op, event.values["n"])))
    start(hub, shop, "inserted", "updated")
    shop("INSERT INTO items VALUES (1)")
    assert recorder.wait(2) == [("updated", 7), ("inserted", 0)]
