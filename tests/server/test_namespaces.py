"""Two applications that watch one table under different namespaces do not know each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg2
import pytest
from psycopg2.extensions import cursor as Cursor

import pgsignals
from pgsignals import Hub, watch
from pgsignals.core.transport import Transport
from pgsignals.core.watchers import normalize
from pgsignals.hub.hub import Delivery
from pgsignals.outbox.schema import install_schema
from pgsignals.resolvers import BUILTIN
from pgsignals.triggers.catalogue import read_installed
from pgsignals.triggers.definitions import define
from pgsignals.triggers.installer import install, prune, uninstall
from tests.conftest import Database, Recorder

WATCHERS = ["orders", watch("orders", "updated", columns=["status"], label="changed")]

# A trigger of somebody else's, called as if it were ours.
FOREIGN = "pgsignals_0123456789abcdef"


@contextmanager
def session(dsn: str) -> Iterator[Cursor]:
    """A connection in autocommit mode."""
    connection = psycopg2.connect(dsn)
    connection.autocommit = True
    try:
        with connection.cursor() as cursor:
            yield cursor
    finally:
        connection.close()


@pytest.fixture
def orders(db: Database) -> str:
    """A watched table with three foreign triggers, two of them called much like ours."""
    db("CREATE TABLE orders (id serial PRIMARY KEY, status text)")
    db("CREATE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'")
    db(f"CREATE FUNCTION {FOREIGN}() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'")
    for name, function in (("audit", "audit"), (FOREIGN, FOREIGN), ("pgsignals_audit", "audit")):
        db(f"CREATE TRIGGER {name} AFTER INSERT ON orders EXECUTE FUNCTION {function}()")
    db(f"""COMMENT ON FUNCTION {FOREIGN}() IS 'see pgsignals, namespace "default"'""")
    db("""COMMENT ON TRIGGER pgsignals_audit ON orders IS '{"pgsignals": 1}'""")
    return "orders"


def everything(db: Database) -> set[tuple[Any, ...]]:
    """All triggers and functions with their text."""
    found = db(
        "SELECT t.tgname::text, pg_get_triggerdef(t.oid), t.tgenabled FROM pg_trigger t"
        " WHERE NOT tgisinternal UNION ALL SELECT proname, prosrc, NULL FROM pg_proc"
        " WHERE pronamespace = 'public'::regnamespace"
    )
    return set(found)


def install_in(dsn: str, namespace: str, delivery: Delivery) -> None:
    """Install the watchers without listening."""
    with session(dsn) as cursor:
        if delivery != "notify":
            install_schema(cursor)
        definitions = define(cursor, normalize(WATCHERS), BUILTIN, namespace, Transport(delivery))
        install(cursor, namespace, [definition.trigger for definition in definitions])


def test_both_get_every_event(dsn: str, db: Database, orders: str, delivery: Delivery) -> None:
    """The same watchers in two namespaces deliver to both, each once."""
    seen = Recorder(), Recorder()
    with Hub() as one, Hub() as two:
        for hub, namespace, recorder in ((one, "one", seen[0]), (two, "two", seen[1])):
            hub.subscribe(recorder, orders)
            hub.start(dsn, WATCHERS, namespace=namespace, delivery=delivery)
        db("INSERT INTO orders (status) VALUES ('a'); DELETE FROM orders")
        for recorder in seen:
            assert [event.op for event in recorder.wait(2)] == ["inserted", "deleted"]


@pytest.mark.usefixtures("by_triggers")
def test_uninstalling_one_leaves_the_other_and_all_foreign_triggers(
    dsn: str, db: Database, orders: str, delivery: Delivery
) -> None:
    """``uninstall`` takes exactly what its own namespace has installed, even when forced."""
    foreign = everything(db)
    install_in(dsn, "one", delivery)
    with_one = everything(db)
    install_in(dsn, "two", delivery)
    assert len(everything(db) - with_one) == len(with_one - foreign) == 8
    with session(dsn) as cursor:
        assert len(uninstall(cursor, "two", force=True)) == 4
        assert everything(db) == with_one
        assert uninstall(cursor, "two") == []
        assert len(uninstall(cursor, "one")) == 4
    assert everything(db) == foreign


def test_pruning_one_leaves_the_other_and_all_foreign_triggers(
    dsn: str, db: Database, orders: str, delivery: Delivery
) -> None:
    """``prune``, and a start that prunes, take only stale triggers of the own namespace."""
    foreign = everything(db)
    install_in(dsn, "one", delivery)
    with_one = everything(db)
    install_in(dsn, "two", delivery)
    with session(dsn) as cursor:
        assert len(prune(cursor, "two")) == 4
    assert everything(db) == with_one
    with Hub().start(dsn, [("orders", "deleted")], namespace="two", delivery=delivery):
        pass
    assert with_one < everything(db)
    with session(dsn) as cursor:
        prune(cursor, "one")
        prune(cursor, "two")
    assert everything(db) == foreign


def test_status_tells_of_the_own_namespace_only(
    hub: Hub, dsn: str, db: Database, orders: str, delivery: Delivery
) -> None:
    """What another namespace has installed is neither listed nor STALE."""
    install_in(dsn, "one", delivery)
    hub.start(dsn, WATCHERS, namespace="two", delivery=delivery)
    status = hub.status()
    assert status.namespace == "two"
    assert [state.status for state in status.watchers] == ["INSTALLED"] * 4
    with session(dsn) as cursor:
        assert read_installed(cursor, "default") == []
        assert {item.tag.namespace for item in read_installed(cursor, "one")} == {"one"}


def test_a_listener_of_one_namespace_does_not_keep_the_other(
    hub: Hub, dsn: str, db: Database, orders: str, delivery: Delivery
) -> None:
    """Somebody who listens in one namespace is no reason to keep the triggers of another."""
    install_in(dsn, "one", delivery)
    hub.start(dsn, WATCHERS, namespace="two", delivery=delivery)
    with session(dsn) as cursor:
        assert len(uninstall(cursor, "one")) == 4
        with pytest.raises(pgsignals.DatabaseError, match="in the namespace 'two'"):
            uninstall(cursor, "two")


@pytest.mark.parametrize("namespace", ['"; DROP TABLE orders; --', "ns %s $pgsignals$ '", "ü" * 63])
def test_any_text_is_a_namespace(
    hub: Hub,
    dsn: str,
    db: Database,
    orders: str,
    recorder: Recorder,
    namespace: str,
    delivery: Delivery,
) -> None:
    """A namespace is only hashed and quoted: whatever it is, it works."""
    hub.subscribe(recorder, orders)
    hub.start(dsn, WATCHERS, namespace=namespace, delivery=delivery)
    db("INSERT INTO orders DEFAULT VALUES")
    assert recorder.wait(1)[0].id == 1
    assert {state.status for state in hub.status().watchers} == {"INSTALLED"}
