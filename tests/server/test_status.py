"""How things stand: INSTALLED, OUTDATED, MISSING, STALE, and what a Hub counts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import psycopg2
import pytest

import pgsignals
from pgsignals import Hub, watch
from pgsignals.core.watchers import normalize
from pgsignals.postgres.notification_queue import read_queue_usage
from pgsignals.resolvers import BUILTIN
from pgsignals.triggers.definitions import define
from pgsignals.triggers.inspection import read_states
from pgsignals.triggers.installer import State, install
from tests.conftest import Database, Recorder


def states(dsn: str, watchers: Sequence[Any] = (), namespace: str = "default") -> list[State]:
    """What ``read_states`` tells."""
    with closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        return read_states(cursor, normalize(watchers), BUILTIN, namespace)


def told(found: Sequence[State]) -> list[tuple[Any, ...]]:
    """What matters most of states."""
    return [(s.status, s.table, s.op, s.label, s.listeners, s.detail) for s in found]


def install_now(dsn: str, watchers: Sequence[Any]) -> None:
    """Install without listening."""
    with closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        definitions = define(cursor, normalize(watchers), BUILTIN, "default")
        install(cursor, "default", [definition.trigger for definition in definitions])


@pytest.fixture
def orders(db: Database) -> str:
    """A table with a status and a total."""
    db("CREATE TABLE orders (id serial PRIMARY KEY, status text, total numeric)")
    return "orders"


def test_a_running_hub(hub: Hub, dsn: str, db: Database, orders: str, recorder: Recorder) -> None:
    """Each trigger is INSTALLED with its listeners; the numbers count since start."""
    hub.subscribe(recorder, orders)
    watcher = watch(orders, "updated", columns=["status"], label="changed")
    hub.start(dsn, [(orders, "inserted"), watcher], namespace="shop")
    with Hub().start(dsn, [(orders, "inserted")], namespace="shop"):
        db("INSERT INTO orders DEFAULT VALUES")
        recorder.wait(1)
        status = hub.status()
    assert told(status.watchers) == [
        ("INSTALLED", "orders", "inserted", None, 2, ""),
        ("INSTALLED", "orders", "updated", "changed", 1, ""),
    ]
    assert {state.schema for state in status.watchers} == {"public"}
    assert (status.namespace, status.running, status.connected) == ("shop", True, True)
    assert (status.received, status.invalid, status.shed, status.reconnects) == (1, 0, 0, 0)
    assert 0 <= status.queue_usage <= 1


def test_nothing_installed(dsn: str, orders: str) -> None:
    """A watcher without its trigger is MISSING, one line for each operation."""
    assert told(states(dsn, [orders])) == [
        ("MISSING", "orders", op, None, 0, "") for op in ("inserted", "updated", "deleted")
    ]
    assert states(dsn) == []


def test_another_definition_is_outdated(dsn: str, orders: str) -> None:
    """A changed watcher is OUTDATED, and what it was installed for is STALE."""
    install_now(dsn, [(orders, "inserted")])
    assert told(states(dsn, [watch(orders, "inserted", extra=["status"])])) == [
        (
            "OUTDATED",
            "orders",
            "inserted",
            None,
            0,
            "installed for another definition of the watcher or of the table",
        ),
        ("STALE", "orders", "inserted", None, 0, ""),
    ]


def test_a_changed_key_or_type_is_another_definition(dsn: str, db: Database, orders: str) -> None:
    """When the table's key or a watched column's type changes, so must the trigger."""
    watchers = [watch(orders, "inserted", extra=["total"])]
    install_now(dsn, watchers)
    db("ALTER TABLE orders ALTER total TYPE text")
    assert states(dsn, watchers)[0].status == "OUTDATED"
    install_now(dsn, watchers)
    db("ALTER TABLE orders DROP CONSTRAINT orders_pkey, ADD PRIMARY KEY (status)")
    assert states(dsn, watchers)[0].status == "OUTDATED"


def test_a_renamed_column_is_outdated(hub: Hub, dsn: str, db: Database, orders: str) -> None:
    """The detail names the column and what is near; other watchers are not touched by it."""
    watcher = watch(orders, "updated", columns=["status"], extra=["total"])
    db("CREATE TABLE users (id int PRIMARY KEY, status text)")
    hub.start(dsn, [watcher, watch("users", "updated", columns=["status"])])
    db("ALTER TABLE orders RENAME status TO state")
    broken, fine = hub.status().watchers[::-1]
    assert told([broken]) == [
        (
            "OUTDATED",
            "orders",
            "updated",
            None,
            1,
            "public.orders has no column 'status' (did you mean 'state'?). "
            "Its columns: id, state, total.",
        )
    ]
    assert told([fine]) == [("INSTALLED", "users", "updated", None, 1, "")]
    assert sorted(told(states(dsn))) == [
        ("INSTALLED", "users", "updated", None, 1, ""),
        ("OUTDATED", "orders", "updated", None, 1, "the table has no column 'status' any more"),
    ]


def test_a_dropped_table_is_missing(hub: Hub, dsn: str, db: Database, orders: str) -> None:
    """The detail says that the table is gone; the functions that it leaves are listed."""
    hub.start(dsn, [(orders, "inserted")])
    db("DROP TABLE orders")
    left, missing = hub.status().watchers
    assert (missing.status, missing.table) == ("MISSING", "orders")
    assert "There is no table 'orders'" in missing.detail
    assert (left.status, left.table, left.detail) == (
        "OUTDATED",
        None,
        "a function without its trigger",
    )
    hub.stop()


def test_what_nobody_needs_is_stale(hub: Hub, dsn: str, db: Database, orders: str) -> None:
    """STALE is what no watcher needs and nobody listens to; in use elsewhere is INSTALLED."""
    install_now(dsn, [orders])
    found = {state.op: state.status for state in states(dsn, [(orders, "inserted")])}
    assert found == {"inserted": "INSTALLED", "updated": "STALE", "deleted": "STALE"}
    assert {state.status for state in states(dsn)} == {"STALE"}
    hub.start(dsn, [(orders, "updated")], prune=False)
    found = {state.op: state.status for state in states(dsn, [(orders, "inserted")])}
    assert found == {"inserted": "INSTALLED", "updated": "INSTALLED", "deleted": "STALE"}


@pytest.mark.parametrize(
    ("damage", "status", "detail"),
    [
        ("ALTER TABLE orders DISABLE TRIGGER USER", "OUTDATED", "the trigger is disabled"),
        ("DROP TRIGGER {name} ON orders", "MISSING", "its function is there, but not the trigger"),
        (
            "CREATE OR REPLACE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN END'",
            "OUTDATED",
            "somebody has changed the function",
        ),
    ],
)
def test_damage(
    hub: Hub, dsn: str, db: Database, orders: str, damage: str, status: str, detail: str
) -> None:
    """What somebody did to a trigger shows, with its reason, while the hub runs."""
    hub.start(dsn, [(orders, "inserted")])
    [state] = hub.status().watchers
    db(damage.format(name=state.name))
    assert told(hub.status().watchers) == [(status, "orders", "inserted", None, 1, detail)]


def test_a_model_that_nobody_knows_is_missing(dsn: str, orders: str) -> None:
    """A watcher that cannot be resolved does not keep the others from being told of."""
    install_now(dsn, [(orders, "inserted")])
    watchers = [watch(7, "inserted"), watch(orders, "inserted")]
    with closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        fine, unknown = read_states(cursor, watchers, BUILTIN, "default")
    assert (fine.status, unknown.status, unknown.table) == ("INSTALLED", "MISSING", "7")
    assert "is not something that pgsignals can watch" in unknown.detail


def test_a_hub_that_does_not_run_has_no_status(hub: Hub) -> None:
    """Without a database to ask, the error says what to do."""
    with pytest.raises(pgsignals.StateError, match=r"no database to ask\. Call start\(\)"):
        hub.status()


def test_the_queue_is_empty_at_rest(dsn: str) -> None:
    """The share of the server's notification queue in use is a number from 0 to 1."""
    with closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        assert 0 <= read_queue_usage(cursor) < 0.01
