"""on_batch: each record once in a period, loaded by one query."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from pgsignals import ConfigurationError, Hub
from tests.conftest import Database, Recorder


@pytest.fixture(autouse=True)
def items(db: Database) -> None:
    """A table of ten records."""
    db("CREATE TABLE items (id int PRIMARY KEY, n int)")
    db("INSERT INTO items SELECT g, 0 FROM generate_series(1, 10) g")


def test_the_latest_of_each_record(hub: Hub, dsn: str, db: Database, recorder: Recorder) -> None:
    """However often a record changes in a period, the batch has its latest event, once."""
    hub.on_batch("items", "updated", every=60, max_size=10)(recorder)
    hub.start(dsn, [("items", "updated")])
    for _ in range(3):
        db("UPDATE items SET n = n + 1 WHERE id <= 5")
    db("UPDATE items SET n = n + 1 WHERE id >= 5")
    [batch] = recorder.wait(1)
    assert sorted(batch.ids) == list(range(1, 11))
    assert len(batch) == 10
    assert batch.ids == [event.id for event in batch]


def test_one_query_loads_it(hub: Hub, dsn: str, db: Database, recorder: Recorder) -> None:
    """load gets the batch's records as they are now; those that are gone are left out."""
    hub.on_batch("items", "updated", every=60, max_size=10)(recorder)
    hub.start(dsn, [("items", "updated")])
    db("UPDATE items SET n = id")
    [batch] = recorder.wait(1)
    db("DELETE FROM items WHERE id > 2")
    assert batch.load(db.connection) == [{"id": 1, "n": 1}, {"id": 2, "n": 2}]


def test_the_period_ends_by_time(hub: Hub, dsn: str, db: Database, recorder: Recorder) -> None:
    """The first change starts the period, at whose end the receiver is called."""
    hub.on_batch("items", every=0.05)(recorder)
    hub.start(dsn, ["items"])
    db("UPDATE items SET n = 1 WHERE id = 1")
    assert recorder.wait(1)[0].ids == [1]
    db("DELETE FROM items WHERE id = 1")
    assert [event.op for event in recorder.wait(2)[1]] == ["deleted"]


def test_stop_flushes(hub: Hub, dsn: str, db: Database, recorder: Recorder) -> None:
    """What was collected when the Hub stops is delivered."""
    arrived = Recorder()
    hub.on_batch("items", every=3600)(recorder)
    hub.subscribe(arrived, "items")
    hub.start(dsn, ["items"])
    db("UPDATE items SET n = 1 WHERE id = 1")
    arrived.wait(1)
    hub.stop()
    assert recorder.items[0].ids == [1]


def test_a_failing_batch_receiver(hub: Hub, dsn: str, db: Database) -> None:
    """What a batch receiver raises is reported by its own name, and the next batch comes."""
    failures, calls = Recorder(), Recorder()

    @hub.receiver_failed.connect
    def note(sender: Hub, **details: Any) -> None:
        failures(details["receiver"].__name__)

    @hub.on_batch("items", every=0)
    def broken(batch: Any) -> None:
        calls(batch)
        raise KeyboardInterrupt

    hub.start(dsn, ["items"])
    for number in (1, 2):
        db("UPDATE items SET n = 1 WHERE id = %s", [number])
        calls.wait(number)
    assert failures.wait(2) == ["broken", "broken"]


def test_records_without_a_key(hub: Hub, dsn: str, db: Database, recorder: Recorder) -> None:
    """Events of a table without a key cannot be told apart, so that each stays."""
    db("CREATE TABLE lines (text text)")
    hub.on_batch("lines", every=60, max_size=3)(recorder)
    hub.start(dsn, [("lines", "inserted")])
    db("INSERT INTO lines VALUES ('a'), ('a'), ('b')")
    assert recorder.wait(1)[0].ids == [None, None, None]


def test_keys_that_do_not_hash(hub: Hub, dsn: str, db: Database, recorder: Recorder) -> None:
    """Records whose key is an array are told apart."""
    db("CREATE TABLE paths (path int[] PRIMARY KEY)")
    hub.on_batch("paths", every=60, max_size=2)(recorder)
    hub.start(dsn, [("paths", "inserted")])
    db("INSERT INTO paths VALUES ('{1}'), ('{1,2}')")
    assert recorder.wait(1)[0].ids == [[1], [1, 2]]


def test_the_receivers_name_is_in_errors(hub: Hub, dsn: str) -> None:
    """A batch receiver that nothing reaches is named like any other."""

    @hub.on_batch("nothing")
    def reindex(batch: Any) -> None: ...

    with pytest.raises(ValueError, match="reindex listens to"):
        hub.start(dsn, ["items"])


def test_periods_are_checked(hub: Hub) -> None:
    """A negative period and an empty batch are refused."""
    with pytest.raises(ConfigurationError, match="every=-1"):
        hub.on_batch("items", every=-1)
    with pytest.raises(ConfigurationError, match="max_size=0"):
        hub.on_batch("items", max_size=0)


def test_workers_are_not_held_up(hub: Hub, dsn: str, db: Database, recorder: Recorder) -> None:
    """While a batch receiver is at work, single receivers go on."""
    entered, release = threading.Event(), threading.Event()

    @hub.on_batch("items", every=0)
    def slow(batch: Any) -> None:
        entered.set()
        release.wait(10)

    hub.subscribe(recorder, "items")
    hub.start(dsn, ["items"])
    db("UPDATE items SET n = 1 WHERE id = 1")
    assert entered.wait(10)
    db("UPDATE items SET n = 1 WHERE id = 2")
    recorder.wait(2)
    release.set()
