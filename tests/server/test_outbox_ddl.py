"""Tables that change or go while events of theirs are undelivered."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

import pgsignals
from pgsignals.triggers import installer
from tests.broadcasters import Broker
from tests.conftest import DEADLINE, Database, Recorder
from tests.forked import run

NAMED = pgsignals.watch("items", "inserted", extra=["name"])
PLAIN = pgsignals.watch("items", "inserted")
TITLED = pgsignals.watch("items", "inserted", extra=["title"])
GOODS = pgsignals.watch("goods", "inserted", extra=["name"])

ANEW = "CREATE TABLE items (id bigint PRIMARY KEY, name text)"
# What is done to the table, what is watched before and after, and what a later row is inserted
# into and said to be, if its trigger can still tell.
CHANGES: dict[str, tuple[str, Any, Any, str | None, dict[str, str] | None]] = {
    "column added": (
        "ALTER TABLE items ADD COLUMN price int NOT NULL DEFAULT 0",
        NAMED,
        NAMED,
        "items",
        {"name": "after"},
    ),
    "other column dropped": ("ALTER TABLE items DROP COLUMN name", PLAIN, PLAIN, "items", {}),
    "column renamed": (
        "ALTER TABLE items RENAME COLUMN name TO title",
        NAMED,
        NAMED,
        "items",
        None,
    ),
    "column renamed, and the watcher too": (
        "ALTER TABLE items RENAME COLUMN name TO title",
        NAMED,
        TITLED,
        "items",
        {"title": "after"},
    ),
    "column dropped": ("ALTER TABLE items DROP COLUMN name", NAMED, NAMED, "items", None),
    "column dropped, and from the watcher": (
        "ALTER TABLE items DROP COLUMN name",
        NAMED,
        PLAIN,
        "items",
        {},
    ),
    "table dropped": ("DROP TABLE items", NAMED, NAMED, None, None),
    "table created anew": (f"DROP TABLE items; {ANEW}", NAMED, NAMED, "items", {"name": "after"}),
    "table created anew with other columns": (
        "DROP TABLE items; CREATE TABLE items (name int, id uuid PRIMARY KEY)",
        NAMED,
        NAMED,
        None,
        None,
    ),
    "table renamed": (
        "ALTER TABLE items RENAME TO goods",
        NAMED,
        NAMED,
        "goods",
        {"name": "after"},
    ),
    "table renamed, and the watcher too": (
        "ALTER TABLE items RENAME TO goods",
        NAMED,
        GOODS,
        "goods",
        {"name": "after"},
    ),
}


@pytest.fixture
def shop(each_db: Database) -> Database:
    """A database with a table."""
    each_db(ANEW)
    return each_db


def start(hub: pgsignals.Hub, shop: Database, watcher: Any, **options: Any) -> None:
    options.setdefault("name", "mailer")
    hub.start(shop.dsn, [watcher], delivery="outbox", **options)


def insert(shop: Database, table: str, number: int, name: str) -> None:
    columns = [
        column
        for (column,) in shop(
            "SELECT column_name::text FROM information_schema.columns WHERE table_name = %s"
            " AND column_default IS NULL ORDER BY ordinal_position",
            (table,),
        )
    ]
    values = [number, name][: len(columns)]
    shop(
        f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join(['%s'] * len(values))})",
        values,
    )


def seen(recorder: Recorder, count: int) -> list[tuple[Any, dict[str, Any]]]:
    return [(event.id, event.values) for event in recorder.wait(count)]


@pytest.mark.parametrize("change", CHANGES)
def test_a_consumer_that_was_down(
    hub: pgsignals.Hub, shop: Database, recorder: Recorder, change: str
) -> None:
    """What was committed before is delivered as it was, and what comes after if that can be."""
    statement, before, after, table, values = CHANGES[change]
    start(hub, shop, before)
    assert hub.stop()
    insert(shop, "items", 1, "before")
    shop(statement)
    first = {"name": "before"} if before is NAMED else {}
    hub.on(after.model, "inserted")(recorder)
    gaps = Recorder()
    hub.on_gap(gaps)
    for _ in range(2):
        start(hub, shop, after)
        assert seen(recorder, 1) == [(1, first)]
        assert hub.stop()
    start(hub, shop, after)
    if table is not None:
        insert(shop, table, 2, "after")
        if values is None:
            assert gaps.wait(1)[0].reason == "watcher_broken"
        else:
            assert seen(recorder, 2)[1] == (2, values)
    assert hub.stop()
    assert len(recorder.items) == 1 + (values is not None)


@pytest.mark.parametrize("change", CHANGES)
def test_a_consumer_that_is_running(
    hub: pgsignals.Hub, shop: Database, recorder: Recorder, change: str
) -> None:
    """What was committed before is delivered as it was, though a receiver comes to it later."""
    statement, watcher, *_ = CHANGES[change]
    going, held = threading.Event(), threading.Event()

    @hub.on("items", "inserted")
    def receive(event: pgsignals.Event) -> None:
        going.set()
        held.wait(DEADLINE)
        recorder(event)

    start(hub, shop, watcher)
    try:
        insert(shop, "items", 1, "before")
        assert going.wait(DEADLINE)
        insert(shop, "items", 2, "before")
        shop(statement)
    finally:
        held.set()
    values = {"name": "before"} if watcher is NAMED else {}
    assert seen(recorder, 2) == [(1, values), (2, values)]
    assert hub.stop()


def test_a_broker_that_was_down(hub: pgsignals.Hub, shop: Database) -> None:
    """A broker gets what was committed before the table was dropped, too."""
    start(hub, shop, NAMED, backends=[Broker()])
    assert hub.stop()
    insert(shop, "items", 1, "before")
    shop("DROP TABLE items")
    back = Broker()
    start(hub, shop, NAMED, backends=[back])
    [event] = back.acknowledged.wait(1)
    assert (event.id, event.values) == (1, {"name": "before"})


def test_what_is_told_of_a_table_that_is_gone(
    hub: pgsignals.Hub, shop: Database, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    """The log and the status say so, and load() says why it cannot."""
    hub.on("items", "inserted")(recorder)
    start(hub, shop, NAMED)
    assert hub.stop()
    insert(shop, "items", 1, "before")
    shop("DROP TABLE items")
    start(hub, shop, NAMED)
    [event] = recorder.wait(1)
    assert "There is no table 'items'" in caplog.text
    [state] = [each for each in hub.status().watchers if each.status == "MISSING"]
    assert state.op == "inserted"
    assert "There is no table 'items'" in state.detail
    with pytest.raises(pgsignals.ConfigurationError, match="dropped or renamed"):
        event.load(shop.connection)


def test_others_beside_a_table_that_is_gone(
    hub: pgsignals.Hub, shop: Database, recorder: Recorder
) -> None:
    """The other watchers of the consumer go on as ever, those that are new included."""
    shop("CREATE TABLE users (id bigint PRIMARY KEY); CREATE TABLE logs (id bigint PRIMARY KEY)")
    for table in ("items", "users", "logs"):
        hub.on(table, "inserted")(lambda event: recorder((event.table, event.id)))
    watchers = [NAMED, ("users", "inserted")]
    with pgsignals.Hub() as former:
        former.start(shop.dsn, watchers, delivery="outbox", name="mailer")
    watchers.append(("logs", "inserted"))
    insert(shop, "items", 1, "before")
    shop("DROP TABLE items; INSERT INTO users VALUES (2)")
    hub.start(shop.dsn, watchers, delivery="outbox", name="mailer")
    shop("INSERT INTO logs VALUES (3)")
    assert recorder.wait(3) == [("items", 1), ("users", 2), ("logs", 3)]


def never_installed(shop: Database) -> None:
    """Nothing."""


def another_consumer(shop: Database) -> None:
    """Install the watcher for somebody else."""
    with pgsignals.Hub() as other:
        start(other, shop, NAMED, name="other")
    shop("DROP TABLE items")


def a_typing_error(shop: Database) -> None:
    """Install a watcher that asks for a column that is there."""
    with pgsignals.Hub() as other:
        start(other, shop, NAMED)


@pytest.mark.parametrize(
    ("prepare", "watcher"),
    [
        (never_installed, pgsignals.watch("itmes")),
        (another_consumer, NAMED),
        (a_typing_error, pgsignals.watch("items", "inserted", extra=["nmae"])),
        (a_typing_error, pgsignals.watch("items", "inserted", "deleted", extra=["nmae"])),
    ],
)
def test_what_stays_an_error(
    hub: pgsignals.Hub, shop: Database, prepare: Callable[[Database], None], watcher: Any
) -> None:
    """A table or column that this consumer has never read is an error at start."""
    prepare(shop)
    with pytest.raises(pgsignals.TableError):
        start(hub, shop, watcher)


def test_without_a_name(hub: pgsignals.Hub, shop: Database) -> None:
    """A process without a name has nothing left to deliver, so that a table has to be there."""
    with hub:
        start(hub, shop, NAMED, name=None)
    shop("DROP TABLE items")
    with pytest.raises(pgsignals.TableError):
        start(hub, shop, NAMED, name=None)


@pytest.mark.parametrize("made", ["by start", "by the command", "by its SQL"])
def test_what_was_written_without_a_trigger(
    hub: pgsignals.Hub, shop: Database, recorder: Recorder, made: str
) -> None:
    """A Gap, for each consumer that had it, says that a trigger was missing, and only then."""
    hub.on_gap(recorder)
    for _ in range(2):
        start(hub, shop, NAMED)
        assert hub.stop()
    shop(f"DROP TABLE items; {ANEW}; INSERT INTO items VALUES (1, 'unseen')")
    [(before,)] = shop("SELECT clock_timestamp()")
    if made != "by start":
        # Another watcher of the same, with the same triggers, makes them.
        app = ["items:inserted", "--delivery", "outbox", "--dsn", shop.dsn]
        with pgsignals.Hub() as other:
            start(other, shop, PLAIN, name="other")
        shop("DROP TABLE items; CREATE TABLE items (id bigint PRIMARY KEY, name text)")
        if made == "by the command":
            assert run("install", *app).code == 0
        else:
            shop("\n".join(run("sql", *app).out))
        gaps = Recorder()
        other.on_gap(gaps)
        with other:
            start(other, shop, PLAIN, name="other", install="check")
            assert [gap.reason for gap in gaps.wait(1)] == ["retention"]
    start(hub, shop, NAMED)
    [gap] = recorder.wait(1)
    assert gap.reason == "retention"
    assert gap.since < before < gap.until
    insert(shop, "items", 2, "seen")
    events = Recorder()
    hub.on("items", "inserted")(events)
    insert(shop, "items", 3, "seen")
    assert events.wait(1)
    assert hub.stop()
    assert len(recorder.items) == 1


def test_two_that_start_at_once(
    hub: pgsignals.Hub, shop: Database, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who finds triggers missing that another process then makes first is told of no loss."""
    lock = installer.in_install_lock
    with pgsignals.Hub() as other:

        def lock_late(*args: Any) -> Any:
            monkeypatch.undo()
            start(other, shop, NAMED)
            return lock(*args)

        monkeypatch.setattr(installer, "in_install_lock", lock_late)
        for each in (hub, other):
            each.on_gap(recorder)
        start(hub, shop, NAMED)
        other.on("items", "inserted")(lambda event: recorder(event.id))
        insert(shop, "items", 1, "seen")
        assert recorder.wait(1) == [1]
        other.stop()
        hub.on("items", "inserted")(lambda event: recorder(event.id))
        insert(shop, "items", 2, "seen")
        assert recorder.wait(2) == [1, 2]
