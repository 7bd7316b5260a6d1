"""What users get wrong: an error at the decorator or at start that says so, or it works."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Callable
from decimal import Decimal
from enum import Enum, IntEnum
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import orm

import pgsignals
from pgsignals import Hub
from tests.conftest import Database, Recorder
from tests.waiting import eventually


class Status(Enum):
    """A choice that is no text."""

    PAID = "paid"


class Level(IntEnum):
    """A choice that is a number."""

    HIGH = 2


class Counting:
    """What metrics= would take, if it were an object."""

    def count(self, name: str, amount: int, /, **labels: str) -> None:
        """Count nothing."""

    def gauge(self, name: str, read: Callable[[], float], /, **labels: str) -> None:
        """Keep nothing."""


class Yielding:
    """A callable that only makes a generator."""

    def __call__(self, event: Any) -> Any:
        yield event


TABLES = sa.MetaData()
ORDERS = sa.Table(
    "orders",
    TABLES,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("paid_at", key="paid"),
)


def event_generator(event: Any) -> Any:
    yield event


async def async_generator(event: Any) -> Any:
    yield event


@pytest.fixture
def orders(db: Database) -> None:
    """A table with columns of several types."""
    db(
        "CREATE TABLE orders (id int PRIMARY KEY, status text, uid uuid, total numeric, ok bool,"
        " paid_at timestamptz);"
        "CREATE TABLE lines (a int, b text, PRIMARY KEY (a, b))"
    )


COLUMNS = pgsignals.watch("orders", "inserted", extra=["status", "uid", "total", "ok"])


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (lambda hub: hub.on(print), "@on above builtins.print has no model: write @on(Model)"),
        (lambda hub: hub.on(event_generator), "has no model"),
        (lambda hub: hub.on_batch(async_generator), "@on_batch(Model)"),
        (lambda hub: hub.on(partial(print)), "has no model"),
        (lambda hub: hub.on("orders")(event_generator), "has a yield in it"),
        (lambda hub: hub.on("orders")(async_generator), "iterate over stream()"),
        (lambda hub: hub.on("orders")(Yielding()), "has a yield in it"),
        (lambda hub: hub.on_batch("orders")(event_generator), "has a yield in it"),
        (lambda hub: hub.on_gap(event_generator), "has a yield in it"),
        (lambda hub: hub.on("orders")(lambda: None), "cannot be called with the event alone"),
        (lambda hub: hub.on("orders")(lambda a, b: None), "missing a required argument: 'b'"),
        (lambda hub: hub.on_batch("orders")(lambda: None), "with the Batch alone"),
        (lambda hub: hub.on_gap(lambda: None), "with the Gap alone"),
        (lambda hub: hub.subscribe(lambda: None, "orders"), "with the event alone"),
        (lambda hub: hub.on("orders")("text"), "cannot be called"),
        (lambda hub: hub.run(), "call start() before it"),
        (lambda hub: hub.wait_for("orders"), "not running"),
        (lambda hub: pgsignals.watch("orders", "UPDATE"), "did you mean 'updated'"),
        (lambda hub: pgsignals.watch("orders", "Inserted"), "did you mean 'inserted'"),
        (lambda hub: hub.on("orders", "update")(print), "did you mean 'updated'"),
    ],
)
def test_before_start(hub: Hub, mistake: Callable[[Hub], Any], words: str) -> None:
    """What can be told without a database is told where it is written."""
    with pytest.raises(pgsignals.PgSignalsError) as caught:
        mistake(hub)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"watchers": {"orders": "updated"}}, "a mapping loses its values here"),
        ({"watchers": ["orders:updated"]}, "the watcher ('orders', 'updated')"),
        ({"watchers": [Counting()]}, "is not something that pgsignals can watch"),
        ({"watchers": ["order"]}, "did you mean 'orders'"),
        (
            {"watchers": [pgsignals.watch(ORDERS, "updated", columns=["paid_at"])]},
            "by the model's names: it is 'paid' there",
        ),
        ({"metrics": Counting}, "metrics=<class"),
        ({"metrics": object()}, "count() and gauge()"),
        ({"tracer": object()}, "receiving()"),
        ({"name": "mailer"}, 'add delivery="outbox"'),
    ],
)
def test_at_start(hub: Hub, dsn: str, orders: None, given: dict[str, Any], words: str) -> None:
    """What is wrong with an argument is told by start, which leaves nothing behind."""
    with pytest.raises(pgsignals.ConfigurationError) as caught:
        hub.start(dsn, **{"watchers": ["orders"], **given})
    assert words in str(caught.value)
    assert not hub.running


def test_an_instance_of_a_model(hub: Hub, dsn: str, orders: None) -> None:
    """A record in place of its class is named as such."""

    class Base(orm.DeclarativeBase):
        pass

    class Order(Base):
        __tablename__ = "orders"
        id = orm.mapped_column(sa.Integer, primary_key=True)

    with pytest.raises(pgsignals.ModelError, match="is an instance of Order: give the class"):
        hub.start(dsn, [Order(id=1)])


@pytest.mark.parametrize("before", [True, False], ids=["before start", "after it"])
@pytest.mark.parametrize(
    ("filters", "words"),
    [
        ({"id": "x"}, "id is of type int4"),
        ({"id": "1.0"}, "id is of type int4"),
        ({"id": uuid.UUID(int=1)}, "id is of type int4"),
        ({"status": 1}, "status is of type text"),
        ({"status": Status.PAID}, "status is of type text"),
        ({"uid": "no uuid"}, "uid is of type uuid"),
        ({"uid": 1}, "uid is of type uuid"),
        ({"total": "much"}, "total is of type numeric"),
        ({"ok": "perhaps"}, "ok is of type bool"),
        ({"op": "inserted"}, "an operation comes behind the model"),
        ({"stat": "x"}, "did you mean 'status'"),
    ],
)
def test_a_filter_that_nothing_matches(
    hub: Hub, dsn: str, orders: None, before: bool, filters: dict[str, Any], words: str
) -> None:
    """A filter by a value that no event of the column can have is an error, not a silence."""

    def listen() -> None:
        hub.subscribe(print, "orders", "inserted", **filters)

    (listen if before else partial(hub.start, dsn, [COLUMNS]))()
    with pytest.raises(pgsignals.ReceiverError) as caught:
        (partial(hub.start, dsn, [COLUMNS]) if before else listen)()
    assert words in str(caught.value)


@pytest.mark.parametrize("before", [True, False], ids=["before start", "after it"])
@pytest.mark.parametrize(
    "filters",
    [
        {"id": "1"},
        {"id": 1},
        {"uid": "00000000-0000-0000-0000-00000000000A"},
        {"uid": "{0000000000000000000000000000000a}"},
        {"total": "2.50"},
        {"total": Decimal("2.5")},
        {"total": 2.5},
        {"ok": "true"},
        {"ok": True},
        {"status": "paid"},
        {"status": "paid", "id": "1"},
    ],
    ids=str,
)
def test_a_filter_by_texts(
    hub: Hub, dsn: str, db: Database, orders: None, before: bool, filters: dict[str, Any]
) -> None:
    """A filter's text, as a URL has it, is read as a value of the column's type."""
    found, all_of_them = Recorder(), Recorder()
    if before:
        subscription = hub.subscribe(found, "orders", "inserted", **filters)
    hub.start(dsn, [COLUMNS])
    if not before:
        subscription = hub.subscribe(found, "orders", "inserted", **filters)
    hub.subscribe(all_of_them, "orders")
    stream = hub.stream("orders", "inserted", **filters)
    db(
        "INSERT INTO orders VALUES (2, 'new', '00000000-0000-0000-0000-00000000000b', 3, false),"
        " (1, 'paid', '00000000-0000-0000-0000-00000000000a', 2.5, true)"
    )
    all_of_them.wait(2)
    [event] = found.wait(1)
    assert event.id == 1
    assert stream.get(5) == event
    subscription.cancel()
    db("INSERT INTO orders SELECT 3, status, uid, total, ok FROM orders WHERE id = 1")
    all_of_them.wait(3)
    assert len(found.items) == 1


def test_a_column_that_gets_another_type(hub: Hub, dsn: str, db: Database) -> None:
    """A filter goes by the new type as it was given, and one that fits no more stops nobody."""
    db("CREATE TABLE items (id int PRIMARY KEY, n int)")
    by_text, by_number, all_of_them = Recorder(), Recorder(), Recorder()
    hub.subscribe(by_text, "items", "inserted", n="7")
    hub.subscribe(by_number, "items", "inserted", n=7)
    hub.subscribe(all_of_them, "items", "inserted")
    hub.start(dsn, [pgsignals.watch("items", "inserted", extra=["n"])], heartbeat=0.2)
    db("INSERT INTO items VALUES (1, 7)")
    assert [by_text.wait(1)[0].id, by_number.wait(1)[0].id] == [1, 1]
    db("ALTER TABLE items ALTER n TYPE text")
    eventually(
        lambda: db("INSERT INTO items SELECT max(id) + 1, '7' FROM items"),
        lambda _: len(by_text.items) > 1 and by_text.items[-1].values["n"] == "7",
    )
    all_of_them.wait_until(lambda event: event.values["n"] == "7")
    # Until the new type is known, events have values of the former one.
    assert {event.values["n"] for event in by_number.items} == {7}


def test_a_filter_by_a_key_of_several_columns(
    hub: Hub, dsn: str, db: Database, orders: None, recorder: Recorder
) -> None:
    """Each part of the tuple is read as its column's value, and another number of parts refused."""
    hub.subscribe(recorder, "lines", "inserted", id=("1", "x"))
    hub.start(dsn, ["lines"])
    db("INSERT INTO lines VALUES (2, 'x'), (1, 'x')")
    [event] = recorder.wait(1)
    assert event.id == (1, "x")
    for wrong in ("1", (1,), (1, "x", 2)):
        with pytest.raises(pgsignals.ReceiverError, match=r"key of .* is \(a, b\)"):
            hub.subscribe(recorder, "lines", "inserted", id=wrong)


def test_a_number_that_is_a_choice(
    hub: Hub, dsn: str, db: Database, orders: None, recorder: Recorder
) -> None:
    """A member of an IntEnum is the number that it stands for."""
    hub.subscribe(recorder, "orders", "inserted", id=Level.HIGH)
    hub.start(dsn, [COLUMNS])
    db("INSERT INTO orders VALUES (2)")
    assert recorder.wait(1)[0].id == 2


@pytest.mark.parametrize(
    "options", [{"retries": 3}, {"backoff": 1.0}, {"later": "follow"}], ids=str
)
def test_retries_that_nobody_makes(hub: Hub, dsn: str, orders: None, options: Any) -> None:
    """In notify delivery nobody calls a receiver again, so that asking for it is an error."""
    hub.subscribe(print, "orders", **options)
    with pytest.raises(pgsignals.ReceiverError, match='delivery="outbox"'):
        hub.start(dsn, ["orders"])
    hub.start(dsn, ["orders"], delivery="outbox")


def test_no_retries(hub: Hub, dsn: str, orders: None) -> None:
    """Asking for none is what notify delivery does."""
    hub.subscribe(print, "orders", retries=0)
    hub.start(dsn, ["orders"])


PROGRAM = """
import os, sys
import pgsignals
if sys.argv[3:]:
    __import__(sys.argv[3])
hub = pgsignals.Hub()
hub.on("orders")(print)
hub.start(sys.argv[1], ["orders"], restart_after_fork=sys.argv[2] == "restarting")
if sys.argv[2] == "waiting":
    hub.wait(0.01)
if sys.argv[2] == "stopping":
    hub.stop()
if sys.argv[2] in ("forking", "restarting"):
    if (child := os.fork()):
        os.waitpid(child, 0)
        hub.wait(0)
    else:
        os._exit(0)
"""


def output(dsn: str, what: str, *modules: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, dsn, what, *modules],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("what", "told"), [("ending", True), ("waiting", False), ("stopping", False)]
)
def test_a_program_that_nothing_keeps(dsn: str, orders: None, what: str, told: bool) -> None:
    """A program that ends at once behind start() says that run() keeps one."""
    assert ("nothing kept it, as run() and wait() do" in output(dsn, what)) == told


@pytest.mark.parametrize(
    ("what", "modules", "told"),
    [
        ("forking", ["gunicorn.arbiter"], True),
        ("restarting", ["gunicorn.arbiter"], False),
        # As the children of multiprocessing.
        ("forking", [], False),
    ],
)
def test_a_fork_that_hears_nothing(
    dsn: str, orders: None, what: str, modules: list[str], told: bool
) -> None:
    """A worker that is forked from a server's master whose Hub runs says that it is deaf."""
    found = output(dsn, what, *modules)
    assert ("hears nothing itself: call start() in it" in found) == told
