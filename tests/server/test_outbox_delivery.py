"""Outbox delivery: at least once, in order, from where a consumer had acknowledged."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import psycopg2
import pytest

import pgsignals
from pgsignals.outbox import awake_lock, housekeeping
from pgsignals.outbox.housekeeping import tidy
from pgsignals.outbox.inspection import read_outbox
from pgsignals.sources import durable
from pgsignals.triggers import names
from pgsignals.triggers.catalogue import read_installed
from pgsignals.triggers.installer import prune
from tests.conftest import DEADLINE, Database, Recorder
from tests.forked import run
from tests.waiting import eventually


@pytest.fixture
def shop(each_dsn: str, each_db: Database) -> Database:
    """A database with a table."""
    each_db("CREATE TABLE items (id bigint PRIMARY KEY, name text, n int NOT NULL DEFAULT 0)")
    return each_db


def start(hub: pgsignals.Hub, shop: Database, **options: Any) -> pgsignals.Hub:
    options.setdefault("name", "mailer")
    items = pgsignals.watch("items", extra=["name", "n"])
    return hub.start(shop.dsn, [items], delivery="outbox", **options)


def acknowledged(hub: pgsignals.Hub, count: int) -> None:
    """Wait until the consumer has acknowledged so many events."""

    def so_far() -> int:
        outbox = hub.status().outbox
        assert outbox is not None
        return sum(each.acknowledged for each in outbox.consumers)

    eventually(so_far, lambda found: found >= count)


def test_what_events_say(hub: pgsignals.Hub, shop: Database, recorder: Recorder) -> None:
    """Events say what they say in notify delivery, and where they are in the outbox."""
    hub.on("items")(recorder)
    start(hub, shop)
    shop("INSERT INTO items VALUES (1, 'a')")
    shop("UPDATE items SET name = 'b', id = 2")
    shop("DELETE FROM items")
    inserted, updated, deleted = recorder.wait(3)
    assert (inserted.op, inserted.id, inserted.values) == ("inserted", 1, {"name": "a", "n": 0})
    assert (updated.id, updated.old["id"], updated.old["name"]) == (2, 1, "a")
    assert updated.changed == {"id", "name"}
    assert (deleted.op, deleted.values["name"]) == ("deleted", "b")
    positions = [int(event.position) for event in (inserted, updated, deleted)]
    assert positions == sorted(positions)
    assert not any(event.redelivered for event in (inserted, updated, deleted))


def test_it_goes_on_where_it_was(hub: pgsignals.Hub, shop: Database, recorder: Recorder) -> None:
    """What is committed while no process of the name runs comes when one does, once."""
    hub.on("items", "inserted")(recorder)
    start(hub, shop)
    shop("INSERT INTO items VALUES (1)")
    recorder.wait(1)
    assert hub.stop()
    shop("INSERT INTO items SELECT generate_series(2, 5000)")
    start(hub, shop)
    assert [event.id for event in recorder.wait(5000)] == list(range(1, 5001))
    acknowledged(hub, 5000)
    assert len({event.uid for event in recorder.items}) == 5000


def test_nothing_from_a_rollback(hub: pgsignals.Hub, shop: Database, recorder: Recorder) -> None:
    """Rolled back transactions and savepoints give no event."""
    hub.on("items")(recorder)
    start(hub, shop)
    shop("BEGIN; INSERT INTO items VALUES (1); ROLLBACK")
    shop(
        "BEGIN; INSERT INTO items VALUES (2); SAVEPOINT s; INSERT INTO items VALUES (3);"
        " ROLLBACK TO s; INSERT INTO items VALUES (4); COMMIT"
    )
    assert [event.id for event in recorder.wait(2)] == [2, 4]


def test_a_slow_transaction(hub: pgsignals.Hub, shop: Database, recorder: Recorder) -> None:
    """A transaction that commits late delays its own rows alone, and loses none."""
    hub.on("items", "inserted")(recorder)
    start(hub, shop)
    slow = psycopg2.connect(shop.dsn)
    try:
        slow.cursor().execute("INSERT INTO items VALUES (1)")
        shop("INSERT INTO items VALUES (2)")
        assert [event.id for event in recorder.wait(1)] == [2]
        slow.commit()
        assert [event.id for event in recorder.wait(2)] == [2, 1]
    finally:
        slow.close()


def test_a_transaction_that_began_long_ago(
    hub: pgsignals.Hub, shop: Database, recorder: Recorder, until_polled: Callable[[], None]
) -> None:
    """The rows of a transaction that is the latest of all are found, however old they are.

    No snapshot shows that it runs before a later one has ended, and its ids are low by then.
    """
    hub.on("items", "inserted")(recorder)
    start(hub, shop)
    others = psycopg2.connect(shop.dsn)
    try:
        others.cursor().execute("INSERT INTO items VALUES (1)")
        for _ in range(2):
            until_polled()
        others.commit()
        assert [event.id for event in recorder.wait(1)] == [1]
    finally:
        others.close()


def test_a_record_in_commit_order(hub: pgsignals.Hub, shop: Database, recorder: Recorder) -> None:
    """Two transactions on one row whose ids are the other way round come in commit order."""
    hub.on("items", "updated")(recorder)
    shop("INSERT INTO items VALUES (1, 'first')")
    start(hub, shop)
    early = psycopg2.connect(shop.dsn)
    try:
        with early.cursor() as cursor:
            cursor.execute("SELECT pg_current_xact_id()")
            shop("UPDATE items SET name = 'second'")
            cursor.execute("UPDATE items SET name = 'third'")
        early.commit()
    finally:
        early.close()
    events = recorder.wait(2)
    assert [event.values["name"] for event in events] == ["second", "third"]
    assert events[0].txid > events[1].txid


def test_a_long_row(hub: pgsignals.Hub, shop: Database, recorder: Recorder) -> None:
    """A row that no notification has room for comes whole, among others of its statement."""
    hub.on("items")(recorder)
    start(hub, shop)
    shop("INSERT INTO items SELECT g, repeat('ä', 50000 * (g % 2)) FROM generate_series(1, 9) AS g")
    events = recorder.wait(9)
    assert [len(event.values["name"]) for event in events] == [
        50000 * (i % 2) for i in range(1, 10)
    ]
    assert not any(event.truncated for event in events)


def test_a_failing_receiver(hub: pgsignals.Hub, shop: Database, recorder: Recorder) -> None:
    """A record that a receiver cannot take becomes a dead letter, and holds up no other."""

    @hub.on("items", "inserted", retries=2, backoff=0.01)
    def receive(event: pgsignals.Event) -> None:
        if event.id == 500:
            raise ValueError("poison")
        recorder(event)

    start(hub, shop)
    shop("INSERT INTO items SELECT generate_series(1, 1000)")
    assert 500 not in {event.id for event in recorder.wait(999)}
    acknowledged(hub, 1000)
    [(error, attempts, trace)] = shop(
        "SELECT error, attempts, traceback FROM pgsignals.dead_letters"
    )
    assert (error, attempts) == ("ValueError: poison", 3)
    assert "in receive" in trace


def test_a_poison_receiver(hub: pgsignals.Hub, db: Database, recorder: Recorder) -> None:
    """Poison receiver: 1,000 records, one always failing: 999 delivered without waiting, one dead.

    The one is a dead letter after its tries, and `retry` delivers it once the receiver can take it.
    """
    db("CREATE TABLE items (id bigint PRIMARY KEY, name text, n int NOT NULL DEFAULT 0)")
    poison, passed = threading.Event(), threading.Event()
    poison.set()

    @hub.on("items", "inserted", retries=1, backoff=0.01)
    def receive(event: pgsignals.Event) -> None:
        if event.id == 500 and poison.is_set():
            if "a try" in recorder.items:
                assert passed.wait(DEADLINE)
            recorder("a try")
            raise ValueError("poison")
        recorder(event.id)
        if event.id == 1000:
            passed.set()

    start(hub, db)
    db("INSERT INTO items SELECT generate_series(1, 1000)")
    assert recorder.wait(1001) == [
        *range(1, 500),
        "a try",
        *range(501, 1001),
        "a try",
    ]
    eventually(lambda: db("SELECT count(*) FROM pgsignals.dead_letters"), lambda n: n == [(1,)])
    poison.clear()
    assert run("dead-letters", "retry", "--all", "--dsn", db.dsn).code == 0
    assert recorder.wait(1002)[-1] == 500
    eventually(lambda: db("SELECT count(*) FROM pgsignals.dead_letters"), lambda n: n == [(0,)])


def test_a_dead_letter_again(hub: pgsignals.Hub, shop: Database, recorder: Recorder) -> None:
    """A dead letter that is asked for again is delivered to its receiver, and forgotten."""
    broken = threading.Event()
    broken.set()

    @hub.on("items", "inserted", retries=0)
    def receive(event: pgsignals.Event) -> None:
        if broken.is_set():
            raise ValueError("poison")
        recorder(event)

    start(hub, shop)
    shop("INSERT INTO items VALUES (1, 'one')")
    acknowledged(hub, 1)
    broken.clear()
    shop("UPDATE pgsignals.dead_letters SET retry = true")
    shop("NOTIFY pgsignals_wake, 'redeliver'")
    [event] = recorder.wait(1)
    assert (event.id, event.values["name"], event.redelivered) == (1, "one", True)
    hub.stop()
    assert shop("SELECT * FROM pgsignals.dead_letters") == []


@pytest.mark.parametrize("later", ["wait", "follow"])
def test_later_events_of_the_record(
    hub: pgsignals.Hub, shop: Database, recorder: Recorder, later: Any
) -> None:
    """Behind an event that fails, others of its record wait, or follow, as its receiver says."""
    fails, written = 2, threading.Event()

    @hub.on("items", retries=3, backoff=0.01, later=later)
    def receive(event: pgsignals.Event) -> None:
        nonlocal fails
        if event.op == "inserted":
            if not fails:
                # Taken once all that may follow has come.
                assert written.wait(DEADLINE)
            else:
                fails -= 1
                raise ValueError
        recorder(event)

    start(hub, shop)
    shop("INSERT INTO items VALUES (1)")
    shop("UPDATE items SET n = 1")
    shop("UPDATE items SET n = 2")
    if later == "follow":
        recorder.wait(2)
    else:
        # The event that fails, and those that wait behind it.
        eventually(hub.status, lambda status: status.retrying == 3)
    written.set()
    expected = [0, 1, 2] if later == "wait" else [1, 2, 0]
    assert [event.values["n"] for event in recorder.wait(3)] == expected


# What fails at first, and what its receiver gets of these, in turn.
KEY_CHANGES = {
    "behind the former key": (
        "inserted 1",
        "INSERT INTO items VALUES (1); UPDATE items SET id = 2; UPDATE items SET n = 1;"
        " INSERT INTO items VALUES (3)",
        ["inserted 3", "inserted 1", "updated 2", "updated 2"],
    ),
    "behind the new key": (
        "deleted 2",
        "INSERT INTO items VALUES (1), (2); DELETE FROM items WHERE id = 2;"
        " UPDATE items SET id = 2; INSERT INTO items VALUES (3)",
        ["inserted 1", "inserted 2", "inserted 3", "deleted 2", "updated 2"],
    ),
    "before either key": (
        "updated 2",
        "INSERT INTO items VALUES (1); UPDATE items SET id = 2; INSERT INTO items VALUES (1);"
        " DELETE FROM items WHERE id = 2; INSERT INTO items VALUES (3)",
        ["inserted 1", "inserted 3", "updated 2", "deleted 2", "inserted 1"],
    ),
}


@pytest.mark.parametrize("parked", [False, True], ids=["taken at last", "parked"])
@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("case", KEY_CHANGES)
def test_later_events_of_a_record_that_changes_its_key(
    hub: pgsignals.Hub, db: Database, recorder: Recorder, case: str, workers: int, parked: bool
) -> None:
    """An update that changes a key waits for both keys, and what comes later for it."""
    failing, statements, expected = KEY_CHANGES[case]
    db("CREATE TABLE items (id bigint PRIMARY KEY, name text, n int NOT NULL DEFAULT 0)")
    tried, passed = threading.Event(), threading.Event()

    @hub.on("items", retries=3 if not parked else 1, backoff=0.01)
    def receive(event: pgsignals.Event) -> None:
        what = f"{event.op} {event.id}"
        if what == failing:
            again = tried.is_set()
            tried.set()
            if again:
                # By then, everything else has come, or waits.
                assert passed.wait(DEADLINE)
            if parked or not again:
                raise ValueError
        recorder(what)
        if what == "inserted 3":
            passed.set()

    start(hub, db, workers=workers)
    for statement in statements.split(";"):
        db(statement)
    expected = [each for each in expected if each != failing or not parked]
    found = recorder.wait(len(expected))
    # Of different records, several workers keep no order.
    for key in "12":
        own = [each for each in found if each in (f"{each[:-1]}{key}", "updated 2")]
        assert own == [each for each in expected if each in (f"{each[:-1]}{key}", "updated 2")]
    if workers == 1:
        assert found == expected
    acknowledged(hub, len(expected) + parked)
    assert hub.status().retrying == 0
    letters = db("SELECT count(*) FROM pgsignals.dead_letters")
    assert letters == [(int(parked),)]


def test_what_was_not_acknowledged(hub: pgsignals.Hub, shop: Database, recorder: Recorder) -> None:
    """An event whose receiver had not taken it at stop() comes again, with its uid, and says so."""
    failed = Recorder()

    def fail(event: pgsignals.Event) -> None:
        failed(event)
        raise ValueError

    failing = hub.subscribe(fail, "items", retries=9, backoff=60)
    start(hub, shop)
    shop("INSERT INTO items VALUES (1)")
    [before] = failed.wait(1)
    hub.stop()
    failing.cancel()
    hub.on("items")(recorder)
    start(hub, shop)
    [event] = recorder.wait(1)
    assert event.uid == before.uid
    assert event.redelivered
    assert not before.redelivered


def test_batches(hub: pgsignals.Hub, shop: Database, recorder: Recorder) -> None:
    """A Batch is acknowledged when its receiver has taken it, at the second try if need be."""
    fails = 1

    # It is full with these, however long they take to come.
    @hub.on_batch("items", every=3600, max_size=100, backoff=0.01)
    def receive(batch: pgsignals.Batch) -> None:
        nonlocal fails
        if fails:
            fails -= 1
            raise ValueError
        recorder(batch)

    start(hub, shop)
    shop("INSERT INTO items SELECT generate_series(1, 100)")
    [batch] = recorder.wait(1)
    assert sorted(batch.ids) == list(range(1, 101))
    acknowledged(hub, 100)


def test_a_standby(shop: Database, recorder: Recorder) -> None:
    """Of two with one name, one reads; when it stops, the other goes on; nothing comes twice."""
    hubs = [pgsignals.Hub(), pgsignals.Hub()]
    try:
        for each in hubs:
            each.on("items", "inserted")(recorder)
            start(each, shop)
        assert [each.status().active for each in hubs] == [True, False]
        shop("INSERT INTO items VALUES (1)")
        recorder.wait(1)
        hubs[0].stop()
        shop("INSERT INTO items VALUES (2)")
        assert [event.id for event in recorder.wait(2)] == [1, 2]
        assert hubs[1].status().active
    finally:
        for each in hubs:
            each.stop()
    assert len(recorder.items) == 2


def test_without_a_name(shop: Database) -> None:
    """Processes without a name get all events each, and leave nothing behind."""
    hubs = [pgsignals.Hub(), pgsignals.Hub()]
    recorders = [Recorder(), Recorder()]
    for each, recorder in zip(hubs, recorders, strict=True):
        each.on("items", "inserted")(recorder)
        start(each, shop, name=None)
    shop("INSERT INTO items SELECT generate_series(1, 10)")
    for each, recorder in zip(hubs, recorders, strict=True):
        assert [event.id for event in recorder.wait(10)] == list(range(1, 11))
        assert each.stop()
    assert shop("SELECT * FROM pgsignals.consumers") == []


def test_partitions(shop: Database) -> None:
    """Processes that share a name's partitions get each record's events once, in order."""
    hubs = [pgsignals.Hub(), pgsignals.Hub()]
    recorder = Recorder()
    try:
        for each in hubs:
            each.on("items")(recorder)
            start(each, shop, partitions=4)
        shop("INSERT INTO items SELECT generate_series(1, 100)")
        for _ in range(5):
            shop("UPDATE items SET n = n + 1")
        events = recorder.wait(600)
        for record in range(1, 101):
            own = [event.values["n"] for event in events if event.id == record]
            assert own == [0, 1, 2, 3, 4, 5]
    finally:
        for each in hubs:
            each.stop()


def test_it_sleeps_and_wakes(
    hub: pgsignals.Hub, shop: Database, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without events the consumer sleeps, though transactions elsewhere last, and one wakes it."""
    # Nothing but an event wakes it.
    for each in (
        (awake_lock, "SLEEP_SECONDS"),
        (durable, "SHARE_SECONDS"),
        (durable, "TURN_SECONDS"),
    ):
        monkeypatch.setattr(*each, 3600.0)
    elsewhere = psycopg2.connect(shop.dsn)
    hub.on("items")(recorder)
    try:
        elsewhere.cursor().execute("SELECT pg_current_xact_id()")
        start(hub, shop, lease=3600.0, heartbeat=3600.0)
        awake = (
            "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND classid = %s"
            " AND objid = %s AND database = (SELECT oid FROM pg_database"
            " WHERE datname = current_database())"
        )
        lock = (names.LOCK_CLASS, names.AWAKE_LOCK)
        for round_ in (1, 2):
            eventually(lambda: shop(awake, lock), lambda rows: not rows)
            shop("INSERT INTO items VALUES (%s)", (round_,))
            recorder.wait(round_)
    finally:
        elsewhere.close()


def test_a_full_outbox_without_a_consumer(
    hub: pgsignals.Hub, shop: Database, recorder: Recorder
) -> None:
    """While no consumer lives, the outbox stays within its bound, and on return a Gap says so."""
    start(hub, shop)
    hub.stop()
    shop("UPDATE pgsignals.settings SET retention_bytes = 1000000")
    # Of fifty statements, one looks: each of these fills a page.
    for number in range(1200):
        shop("INSERT INTO items VALUES (%s, repeat('x', 4000))", (number,))
    [(size,)] = shop(
        "SELECT sum(pg_total_relation_size(inhrelid)) FROM pg_inherits"
        " WHERE inhparent = 'pgsignals.outbox'::regclass"
    )
    assert 1_000_000 < size < 7_000_000
    gaps = Recorder()
    hub.on_gap(gaps)
    start(hub, shop)
    [gap] = gaps.wait(1)
    assert gap.reason == "retention"


def test_what_all_have_read_is_emptied(
    hub: pgsignals.Hub, shop: Database, recorder: Recorder
) -> None:
    """Housekeeping begins another partition, and empties those that every consumer has read."""
    hub.on("items", "inserted")(recorder)
    start(hub, shop)
    with shop.connection.cursor() as cursor:
        shop("INSERT INTO items SELECT generate_series(1, 5000)")
        recorder.wait(5000)
        tidy(cursor, segment_bytes=0)
        shop("INSERT INTO items VALUES (6000)")
        recorder.wait(5001)
        acknowledged(hub, 5001)
        assert tidy(cursor, segment_bytes=0) == [0]
    assert shop("SELECT count(*) FROM pgsignals.outbox_0") == [(0,)]


def test_a_transaction_that_commits_while_it_is_tidied_up(
    hub: pgsignals.Hub, shop: Database, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A partition into which somebody commits while it is looked at is not emptied."""
    hub.on("items", "inserted")(recorder)
    start(hub, shop)
    slow = psycopg2.connect(shop.dsn)
    looked = housekeeping._late

    def commit_then(*arguments: Any) -> Any:
        found = looked(*arguments)
        hub.stop()
        slow.commit()
        return found

    try:
        slow.cursor().execute("INSERT INTO items VALUES (1)")
        shop("INSERT INTO items VALUES (2)")
        recorder.wait(1)
        acknowledged(hub, 1)
        with shop.connection.cursor() as cursor:
            tidy(cursor, segment_bytes=0)
            monkeypatch.setattr(housekeeping, "_late", commit_then)
            assert tidy(cursor) == []
    finally:
        slow.close()
    start(hub, shop)
    assert [event.id for event in recorder.wait(2)] == [2, 1]


def test_a_consumer_that_is_too_late(
    hub: pgsignals.Hub, shop: Database, recorder: Recorder
) -> None:
    """What is dropped since a consumer is too late is announced to it by a Gap."""
    start(hub, shop)
    hub.stop()
    with shop.connection.cursor() as cursor:
        shop("INSERT INTO items SELECT generate_series(1, 5000)")
        tidy(cursor, segment_bytes=0)
        shop("INSERT INTO items VALUES (6000)")
        shop("UPDATE pgsignals.settings SET retention_seconds = 0")
        assert tidy(cursor) == [0]
    gaps = Recorder()
    hub.on_gap(gaps)
    hub.on("items", "inserted")(recorder)
    start(hub, shop)
    [gap] = gaps.wait(1)
    assert gap.reason == "retention"
    assert [event.id for event in recorder.wait(1)] == [6000]


def test_a_loss_while_the_consumer_acknowledges(
    hub: pgsignals.Hub, shop: Database, recorder: Recorder
) -> None:
    """A loss that is noted while an acknowledgement waits for the same row is announced."""
    hub.on_gap(recorder)
    start(hub, shop, lease=1.0)
    tidying = psycopg2.connect(shop.dsn)
    try:
        # As housekeeping does when it drops a partition.
        tidying.cursor().execute("UPDATE pgsignals.consumers SET lost_until = now()")
        waiting = "SELECT pid FROM pg_locks WHERE locktype = 'transactionid' AND NOT granted"
        eventually(lambda: shop(waiting), bool)
        tidying.commit()
    finally:
        tidying.close()
    [gap] = recorder.wait(1)
    assert gap.reason == "retention"


def test_a_process_that_was_forgotten(
    hub: pgsignals.Hub, shop: Database, recorder: Recorder
) -> None:
    """A process without a name whose cursor is gone begins again, and a Gap says so."""
    gaps = Recorder()
    hub.on_gap(gaps)
    hub.on("items")(recorder)
    start(hub, shop, name=None, lease=1.0)
    # As housekeeping does with one that it has not heard of for a minute.
    shop("DELETE FROM pgsignals.consumers")
    [gap] = gaps.wait(1)
    assert gap.reason == "retention"
    shop("INSERT INTO items VALUES (1)")
    assert [event.id for event in recorder.wait(1)] == [1]


def test_another_cluster(hub: pgsignals.Hub, shop: Database, recorder: Recorder) -> None:
    """Where a cursor is of another cluster, a Gap says so, and all that is there comes again."""
    hub.on("items", "inserted")(recorder)
    start(hub, shop)
    shop("INSERT INTO items VALUES (1)")
    recorder.wait(1)
    hub.stop()
    shop("UPDATE pgsignals.consumers SET epoch = '1/1'")
    gaps = Recorder()
    hub.on_gap(gaps)
    start(hub, shop)
    [gap] = gaps.wait(1)
    assert gap.reason == "restored"
    again = recorder.wait(2)[1]
    assert again == recorder.items[0]
    assert again.redelivered


def test_another_definition_of_the_watcher(
    hub: pgsignals.Hub, shop: Database, recorder: Recorder
) -> None:
    """What a former definition's trigger wrote is delivered as it was, and nothing twice."""
    hub.on("items", "inserted")(recorder)
    start(hub, shop)
    hub.stop()
    shop("INSERT INTO items VALUES (1, 'before')")
    watcher = pgsignals.watch("items", "inserted", extra=["name"])
    hub.start(shop.dsn, [watcher], delivery="outbox", name="mailer", prune=False)
    shop("INSERT INTO items VALUES (2, 'after')")
    shop("INSERT INTO items VALUES (3, 'after')")
    assert [(event.id, event.values) for event in recorder.wait(3)] == [
        (1, {"name": "before", "n": 0}),
        (2, {"name": "after"}),
        (3, {"name": "after"}),
    ]
    acknowledged(hub, 3)


@pytest.mark.parametrize("delivery", ["notify", "outbox"])
def test_another_application_starts_meanwhile(
    hub: pgsignals.Hub, shop: Database, recorder: Recorder, delivery: Any
) -> None:
    """The triggers of a consumer that is down stay when another application starts."""
    shop("CREATE TABLE others (id bigint PRIMARY KEY)")
    hub.on("items", "inserted")(recorder)
    start(hub, shop)
    hub.stop()
    with pgsignals.Hub().start(shop.dsn, ["others"], delivery=delivery):
        shop("INSERT INTO items VALUES (1)")
    shop("INSERT INTO items VALUES (2)")
    start(hub, shop)
    shop("INSERT INTO items VALUES (3)")
    assert [event.id for event in recorder.wait(3)] == [1, 2, 3]


def test_who_may_not_know_the_consumers(hub: pgsignals.Hub, shop: Database) -> None:
    """A role that cannot read who the consumers are leaves their triggers alone."""
    start(hub, shop)
    hub.stop()
    with shop.connection.cursor() as cursor:
        shop("CREATE ROLE stranger")
        try:
            shop("SET ROLE stranger")
            assert all(item.consumed for item in read_installed(cursor, "default"))
            assert prune(cursor, "default") == []
        finally:
            shop("RESET ROLE")
            shop("DROP ROLE stranger")


def test_a_former_definition_goes(hub: pgsignals.Hub, shop: Database, recorder: Recorder) -> None:
    """What only a former definition of the consumer needed is removed by a later start."""
    start(hub, shop)
    hub.stop()
    watcher = pgsignals.watch("items", "inserted", extra=["name"])
    for _ in range(2):
        hub.start(shop.dsn, [watcher], delivery="outbox", name="mailer")
        hub.stop()
    assert shop("SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'pgsignals%'") == [(1,)]


def triggers(shop: Database) -> int:
    [(count,)] = shop("SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'pgsignals%'")
    assert isinstance(count, int)
    return count


def test_a_former_definition_goes_at_once(
    hub: pgsignals.Hub, shop: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its triggers are removed as soon as no process and no consumer needs them any more."""
    monkeypatch.setattr(housekeeping, "EVERY_SECONDS", 0.05)
    former = pgsignals.Hub()
    start(former, shop)
    assert triggers(shop) == 3
    watcher = pgsignals.watch("items", "inserted", extra=["name"])
    try:
        hub.start(shop.dsn, [watcher], delivery="outbox", name="mailer")
        assert not hub.status().active
        assert triggers(shop) == 4
    finally:
        former.stop()
    eventually(lambda: triggers(shop), lambda count: count == 1)


def test_the_lag_of_a_former_definition(
    hub: pgsignals.Hub, shop: Database, recorder: Recorder
) -> None:
    """What a former definition's trigger wrote counts until it is acknowledged, and once."""
    start(hub, shop)
    assert hub.stop()
    shop("INSERT INTO items SELECT generate_series(1, 5)")
    going, held = threading.Event(), threading.Event()

    @hub.on("items", "inserted")
    def receive(event: pgsignals.Event) -> None:
        recorder(event)
        going.set()
        held.wait(DEADLINE)

    watcher = pgsignals.watch("items", "inserted", extra=["name"])
    hub.start(shop.dsn, [watcher], delivery="outbox", name="mailer", prune=False)
    try:
        assert going.wait(DEADLINE)
        shop("INSERT INTO items VALUES (6), (7)")
        # Three operations, of which one is watched still.
        shop("DELETE FROM items WHERE id = 6")
        with shop.connection.cursor() as cursor:
            [consumer] = read_outbox(cursor).consumers
    finally:
        held.set()
    assert consumer.lag == 7
    first = recorder.wait(7)[0]
    assert (consumer.oldest, consumer.oldest_at) == (first.uid, first.at)
    assert consumer.lag_seconds > 0
    acknowledged(hub, 7)
    with shop.connection.cursor() as cursor:
        [consumer] = read_outbox(cursor).consumers
    assert (consumer.lag, consumer.lag_seconds, consumer.oldest) == (0, 0.0, None)


def test_a_schema_of_somebody_else(hub: pgsignals.Hub, shop: Database) -> None:
    """A schema of that name that we did not make is left alone, and the error says so."""
    shop("CREATE SCHEMA pgsignals")
    with pytest.raises(pgsignals.DatabaseError, match="pgsignals did not make"):
        start(hub, shop)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delivery": "outbox", "partitions": 2, "name": None}, "add name="),
        ({"delivery": "outbox", "name": ""}, "not empty"),
        ({"delivery": "outbox", "lease": 0}, "lease=0"),
        ({"delivery": "notify", "name": "mailer"}, 'delivery="outbox"'),
        ({"delivery": "pigeon"}, "'notify', 'outbox'"),
    ],
)
def test_options_that_cannot_be(
    hub: pgsignals.Hub, dsn: str, options: dict[str, Any], message: str
) -> None:
    """An option that does not fit is refused, with what would."""
    with pytest.raises(pgsignals.ConfigurationError, match=message):
        hub.start(dsn, ["items"], **options)


def test_an_unreadable_row_is_a_gap(hub: pgsignals.Hub, shop: Database, recorder: Recorder) -> None:
    """A message that was damaged is announced, and those around it are delivered."""
    start(hub, shop)
    assert hub.stop()
    for number in (1, 2, 3):
        shop("INSERT INTO items VALUES (%s)", (number,))
    shop(
        "UPDATE pgsignals.outbox SET payload = left(payload, -3)"
        " WHERE id = (SELECT min(id) + 1 FROM pgsignals.outbox)"
    )
    hub.on("items")(recorder)
    hub.on_gap(recorder)
    start(hub, shop)
    found = recorder.wait(3)
    assert [event.id for event in found if isinstance(event, pgsignals.Event)] == [1, 3]
    [gap] = [each for each in found if isinstance(each, pgsignals.Gap)]
    assert gap.reason == "watcher_broken"
    assert "cannot be read" in gap.detail
