"""Receivers that are too slow, and a notification queue that fills: bounded, and announced."""

from __future__ import annotations

import logging
import re
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pgsignals import Gap, Hub
from pgsignals.dispatch import batches
from pgsignals.dispatch.dispatcher import Dispatcher
from pgsignals.sources import notify
from pgsignals.testing import Server
from tests.broadcasters import Collector, message
from tests.conftest import DEADLINE, NEWEST, Database, Recorder
from tests.hub_parts import collected
from tests.waiting import eventually

TOTAL = 200_000
# Two records of which each of two workers has one.
FIRST = 1
SECOND = next(i for i in range(2, 100) if hash((i,)) % 2 != hash((FIRST,)) % 2)


@pytest.fixture
def items(db: Database) -> None:
    """A table."""
    db("CREATE TABLE items (id bigserial PRIMARY KEY)")


class Gates:
    """A broadcaster whose records each have a gate, open unless it was shut."""

    def __init__(self) -> None:
        self.order = Recorder()
        self.entered: dict[Any, threading.Event] = defaultdict(threading.Event)
        self.gates: dict[Any, threading.Event] = {}

    def shut(self, record: Any) -> threading.Event:
        """Hold up the record's events until the gate that is returned is set."""
        self.gates[record] = threading.Event()
        return self.gates[record]

    def publish(self, events: Any) -> None:
        """Note each event, once its gate is open."""
        for event in events:
            self.entered[event.id].set()
            if (gate := self.gates.get(event.id)) is not None:
                gate.wait(DEADLINE)
            self.order((event._message.sequence, event.id))

    def flush(self, timeout: float) -> bool:
        """Nothing is ever under way."""
        return True

    def close(self) -> None:
        """Nothing to give up."""


@pytest.fixture
def gates() -> Gates:
    """A broadcaster that can be held up, record by record."""
    return Gates()


@pytest.fixture
def pair(gates: Gates) -> Iterator[Dispatcher]:
    """A dispatcher whose two workers hold ten events each."""
    made = Dispatcher([gates], 2, 20, gates.order)
    made.start()
    yield made
    for gate in gates.gates.values():
        gate.set()
    made.stop(DEADLINE)


def fill(dispatcher: Dispatcher, gates: Gates, record: int) -> threading.Event:
    """Hold up a record's worker and fill its queue."""
    gate = gates.shut(record)
    for sequence in range(10):
        dispatcher.submit(message(sequence, (record,)))
    assert gates.entered[record].wait(DEADLINE)
    assert dispatcher.full
    return gate


def gaps(gates: Gates) -> list[Gap]:
    """The Gaps so far."""
    return [item for item in gates.order.items if isinstance(item, Gap)]


def test_only_the_slow_workers_share_is_dropped(pair: Dispatcher, gates: Gates) -> None:
    """While one worker is given up, the other goes on; one Gap covers all that was dropped."""
    gate = fill(pair, gates, FIRST)
    pair.give_up()
    assert not pair.full
    for sequence in range(10, 30):
        pair.submit(message(sequence, (FIRST,), (SECOND,)))
    assert gates.order.wait(20) == [(s, SECOND) for s in range(10, 30)]
    assert pair.shed == 20
    assert gaps(gates) == []
    gate.set()
    gap = gates.order.wait_until(lambda item: isinstance(item, Gap))[-1]
    assert gap.reason == "overflow"
    pair.submit(message(30, (FIRST,)))
    delivered = gates.order.wait_until(lambda item: item == (30, FIRST))
    own = [item for item in delivered if item != gap and item[1] == FIRST]
    assert own == [(s, FIRST) for s in (*range(10), 30)]
    assert gaps(gates) == [gap]


def test_each_period_has_its_gap(pair: Dispatcher, gates: Gates) -> None:
    """A worker that is given up twice has two Gaps; where nothing was dropped there is none."""
    for period in range(3):
        gate = fill(pair, gates, FIRST)
        pair.give_up()
        if period < 2:
            pair.submit(message(99, (FIRST,)))
        gate.set()
        pair.settle(lambda period=period: gates.order(f"end of {period}"))
        gates.order.wait_until(lambda item, period=period: item == f"end of {period}")
    assert len(gaps(gates)) == 2


def test_a_gap_spans_the_times_of_what_was_dropped(pair: Dispatcher, gates: Gates) -> None:
    """Commits come in another order than their statements ran: the Gap covers them all."""
    gate = fill(pair, gates, FIRST)
    pair.give_up()
    for at_us in (3_000_000, 1_000_000, 2_000_000):
        late = message(99, (FIRST,))
        late.at_us = at_us
        pair.submit(late)
    gate.set()
    gap = gates.order.wait_until(lambda item: isinstance(item, Gap))[-1]
    assert (gap.since.timestamp(), gap.until.timestamp()) == (1, 3)


def test_what_was_dropped_is_announced_at_stop(pair: Dispatcher, gates: Gates) -> None:
    """A dispatcher that stops while it drops events says so before it ends."""
    gate = fill(pair, gates, FIRST)
    pair.give_up()
    pair.submit(message(99, (FIRST,)))
    stopping = threading.Thread(target=pair.stop, args=(DEADLINE,))
    stopping.start()
    gate.set()
    stopping.join(DEADLINE)
    assert len(gaps(gates)) == 1


@pytest.mark.parametrize(("slow", "quick"), [(FIRST, SECOND), (SECOND, FIRST)])
def test_a_record_that_moves_from_or_to_a_worker_given_up(
    pair: Dispatcher, gates: Gates, slow: int, quick: int
) -> None:
    """A change of key is dropped when one of its two workers is given up, and holds up nobody."""
    gate = fill(pair, gates, slow)
    pair.give_up()
    pair.submit(message(50, (SECOND, FIRST), moved=True))
    pair.submit(message(51, (quick,)))
    assert gates.order.wait(1) == [(51, quick)]
    gate.set()
    pair.stop(DEADLINE)
    assert pair.shed == 1
    assert (50, SECOND) not in gates.order.items
    assert pair.depth == 0


def test_moves_to_a_slow_worker_fill_its_queue(pair: Dispatcher, gates: Gates) -> None:
    """Changes of key that wait for the former key's worker are bounded like events."""
    gate = gates.shut(SECOND)
    pair.submit(message(0, (SECOND,)))
    for sequence in range(9):
        pair.submit(message(sequence, (SECOND, FIRST), moved=True))
    assert pair.full
    gate.set()
    assert pair.wait_for_room(DEADLINE)


def test_the_oldest_event(pair: Dispatcher, gates: Gates) -> None:
    """Its age counts from its arrival until it is handled."""
    assert pair.oldest == 0
    gate = gates.shut(FIRST)
    began = time.monotonic()
    pair.submit(message(0, (FIRST,)))
    pair.submit(message(1, (SECOND,)))
    gates.order.wait(1)
    first, second = pair.oldest, pair.oldest
    assert 0 < first < second <= time.monotonic() - began
    gate.set()
    pair.stop(DEADLINE)
    assert pair.oldest == 0


@pytest.mark.parametrize("workers", [1, 4])
def test_stop_by_a_worker_waits_for_nobody_who_waits_for_it(
    workers: int, collector: Collector
) -> None:
    """stop() called while a Gap is announced returns at once, and no event is handled after it."""
    stopped = Recorder()
    dispatcher = Dispatcher([collector], workers, 100)
    dispatcher.start()
    began = time.monotonic()
    dispatcher.announce(lambda: stopped(dispatcher.stop(DEADLINE)))
    dispatcher.submit(message(0, *((i,) for i in range(50))))
    assert stopped.wait(1) == [True]
    assert time.monotonic() - began < DEADLINE / 2
    assert collector.closed
    assert collector.order == []


@pytest.fixture
def collector() -> Collector:
    """A broadcaster that notes what it was given."""
    return Collector()


def memory(field: str) -> float:
    """A figure of this process in megabytes."""
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


class Flood:
    """200,000 rows in 400 statements, and a receiver that gets them beside whoever else does."""

    def __init__(self, hub: Hub, db: Database) -> None:
        self._db = db
        self._updated = Recorder()
        self._by_thread: dict[int, int] = defaultdict(int)
        hub.subscribe(self._count, "items", "inserted")
        hub.subscribe(self._updated, "items", "updated")

    def _count(self, event: Any) -> None:
        # Counting by thread: four of them add to one integer otherwise.
        self._by_thread[threading.get_ident()] += 1

    @property
    def handled(self) -> int:
        """How many inserts have been handled."""
        return sum(list(self._by_thread.values()))

    def run(self) -> tuple[list[float], float]:
        """What each INSERT took, and how long it was until all were handled, in ms."""
        target = self.handled + TOTAL
        began = time.monotonic()
        writes = [
            self._timed("INSERT INTO items SELECT FROM generate_series(1, 500)")
            for _ in range(TOTAL // 500)
        ]
        eventually(lambda: self.handled, lambda count: count >= target, 4 * DEADLINE)
        assert self.handled == target
        return writes, 1000 * (time.monotonic() - began)

    def latencies(self) -> list[float]:
        """From 400 UPDATEs, of records of all workers, until the receiver is called, in ms."""
        found = []
        for number in range(1, 401):
            self._updated.items.clear()
            began = time.monotonic()
            self._db("UPDATE items SET id = id WHERE id = %s", (number,))
            self._updated.wait(1)
            found.append(1000 * (time.monotonic() - began))
        return found

    def _timed(self, statement: str) -> float:
        began = time.monotonic()
        self._db(statement)
        return 1000 * (time.monotonic() - began)


def test_a_slow_receiver_costs_the_others_nothing(
    hub: Hub, dsn: str, db: Database, items: None, record_property: Callable[[str, object], None]
) -> None:
    """A receiver takes a second for each of 200,000 events, with four workers.

    Memory stays bounded, no write waits, the other receivers get every event as soon as without it,
    and a Gap that names it announces what it lost.
    """
    release, gaps, first = threading.Event(), Recorder(), Recorder()

    def slow(event: Any) -> None:
        first(event)
        release.wait(1.0)

    hub.on_gap(gaps)
    hub.start(dsn, ["items"], workers=4)
    flood = Flood(hub, db)
    writes_alone, took_alone = flood.run()
    alone = flood.latencies()
    threads = threading.active_count()

    hub.subscribe(slow, "items")
    Path("/proc/self/clear_refs").write_text("5")  # The highest use counts from here.
    before = memory("VmRSS")
    writes, took = flood.run()
    growth = memory("VmHWM") - before
    beside = flood.latencies()

    status = hub.status()
    calls = len(first.items)
    # What is not dropped waits, is with the receiver, or was. UPDATEs may find room.
    assert TOTAL + 400 - status.shed - calls <= status.depth <= 10_000 + 4
    [name] = status.aside
    assert name.endswith("slow")
    assert name in hub.health().reason
    assert threading.active_count() == threads + 4
    assert not gaps.items
    release.set()
    eventually(lambda: hub.status().depth, lambda depth: depth == 0, 4 * DEADLINE)
    eventually(lambda: len(gaps.items), lambda count: count == 4)
    assert {(gap.reason, name in gap.detail) for gap in gaps.items} == {("overflow", True)}
    assert len(first.items) + hub.status().shed == TOTAL + 400
    assert hub.health().ready
    assert hub.stop()

    figures = {
        "memory growth, MB": round(growth, 1),
        "INSERT of 500 rows, median and worst, ms: alone": spread(writes_alone),
        "INSERT of 500 rows, median and worst, ms: beside": spread(writes),
        "all handled by the others, ms: alone, beside": (round(took_alone), round(took)),
        "UPDATE until receiver, median and p99, ms: alone": spread(alone, 0.99),
        "UPDATE until receiver, median and p99, ms: beside": spread(beside, 0.99),
        "shed": status.shed,
    }
    for what, value in figures.items():
        record_property(what, value)
    assert growth < 100
    # It would be a second and more for each, if they waited; now and then the machine is busy.
    assert spread(writes, 0.95)[1] < 1000 * notify.IDLE_SECONDS
    assert statistics.median(beside) < 3 * statistics.median(alone) + 5
    assert spread(beside, 0.95)[1] < 500


def spread(times: list[float], share: float = 1.0) -> tuple[float, float]:
    """The median, and the value that ``share`` of them do not exceed."""
    most = sorted(times)[min(len(times) - 1, int(share * len(times)))]
    return round(statistics.median(times), 2), round(most, 2)


def test_memory_is_bounded_with_one_worker(
    hub: Hub,
    dsn: str,
    db: Database,
    items: None,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    """The only worker blocks while 200,000 events arrive: the queue's size is the bound."""
    monkeypatch.setattr(notify, "PAUSE_SECONDS", 0.2)
    monkeypatch.setattr(notify, "IDLE_SECONDS", 0.2)
    gate, order = threading.Event(), Recorder()
    hub.subscribe(lambda event: gate.wait(4 * DEADLINE), "items", "inserted")
    hub.on_gap(order)
    hub.start(dsn, ["items"])
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    for _ in range(20):
        db("INSERT INTO items SELECT FROM generate_series(1, 10000)")
    eventually(lambda: hub.status().received, lambda count: count == TOTAL, 4 * DEADLINE)
    growth = memory("VmHWM") - before
    status = hub.status()
    record_property("memory growth, MB", round(growth, 1))
    assert status.depth < 11_000
    assert status.shed + status.depth == TOTAL
    assert growth < 50
    gate.set()
    assert order.wait(1)[0].reason == "overflow"


@pytest.mark.parametrize("workers", [1, 4])
def test_a_batch_receiver_that_is_too_slow(
    workers: int, hub: Hub, dsn: str, db: Database, items: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it collects is bounded, too: the rest is dropped, with a Gap, and stop() drains."""
    monkeypatch.setattr(notify, "PAUSE_SECONDS", 0.2)
    monkeypatch.setattr(notify, "IDLE_SECONDS", 0.2)
    gate, entered = threading.Event(), threading.Event()
    gaps, others, sizes = Recorder(), Recorder(), Recorder()

    @hub.on_batch("items", "inserted", every=0, max_size=100)
    def slow(batch: Any) -> None:
        entered.set()
        gate.wait(4 * DEADLINE)
        sizes(len(batch))

    hub.on_gap(gaps)
    hub.start(dsn, ["items"], workers=workers, queue_size=1000)
    db("INSERT INTO items DEFAULT VALUES")
    assert entered.wait(DEADLINE)
    hub.subscribe(others, "items", "updated")
    for _ in range(20):
        db("INSERT INTO items SELECT FROM generate_series(1, 1000)")
    eventually(lambda: hub.status().shed, lambda count: count > 5000)
    assert collected(hub) <= 100 + batches.SPARE
    if workers > 1:
        eventually(lambda: hub.status().received, lambda count: count == 20_001)
        assert hub.status().aside[0].endswith("slow")
        db("UPDATE items SET id = id WHERE id = 1")
        assert others.wait(1)[0].id == 1
    gate.set()
    assert gaps.wait(1)[0].reason == "overflow"
    eventually(lambda: sum(sizes.items) + hub.status().shed, lambda count: count == 20_001)
    assert hub.stop()


def test_a_batch_receiver_that_stops_the_hub_while_it_is_behind(
    hub: Hub, dsn: str, db: Database, items: None
) -> None:
    """The worker that waits for it is not waited for by it."""
    full, outcome = threading.Event(), Recorder()

    @hub.on_batch("items", "inserted", every=0, max_size=1)
    def stop(batch: Any) -> None:
        if not outcome.items:
            full.wait(DEADLINE)
            began = time.monotonic()
            outcome((hub.stop(DEADLINE), time.monotonic() - began))

    hub.start(dsn, ["items"], queue_size=50_000)
    db("INSERT INTO items DEFAULT VALUES")
    db("INSERT INTO items SELECT FROM generate_series(1, 20000)")
    eventually(lambda: collected(hub), lambda count: count == 1 + batches.SPARE)
    full.set()
    [(drained, seconds)] = outcome.wait(1)
    assert drained
    assert seconds < DEADLINE / 2


def test_the_log_warns_before_writers_fail(
    hub: Hub,
    connect: Callable[[str], Database],
    caplog: pytest.LogCaptureFixture,
    until_looked: Callable[[], None],
) -> None:
    """A foreign listener in a transaction fills the queue: the log tells, from a tenth on."""
    caplog.set_level(logging.WARNING, "pgsignals")

    def warned() -> list[float]:
        return [r.queue_usage for r in caplog.records if hasattr(r, "queue_usage")]

    with Server(NEWEST, {"max_notify_queue_pages": "64"}) as server:
        dsn = server.dsn()
        db, foreign = connect(dsn), connect(dsn)
        db("CREATE TABLE items (id bigserial PRIMARY KEY)")
        with hub.start(dsn, ["items"], heartbeat=0.05):
            foreign("LISTEN somewhere")
            foreign("BEGIN")
            foreign("SELECT 1")
            page = "SELECT count(pg_notify('elsewhere', i || repeat('x', 7000)))"
            db(f"{page} FROM generate_series(1, 3) i")
            until_looked()
            assert warned() == []
            db(f"{page} FROM generate_series(4, 12) i")
            eventually(warned, bool)
            assert 0.1 <= warned()[0] < 0.3
            assert "doctor" in caplog.text
            # A writer still commits, long after the first warning.
            db("INSERT INTO items DEFAULT VALUES")
            assert hub.status().queue_usage < 0.3


def test_the_log_warns_while_reading_pauses(
    hub: Hub, connect: Callable[[str], Database], caplog: pytest.LogCaptureFixture
) -> None:
    """Where our own receivers are what holds the queue up, the log tells, too."""
    gate = threading.Event()
    with Server(NEWEST, {"max_notify_queue_pages": "1024"}) as server:
        dsn = server.dsn()
        db = connect(dsn)
        db("CREATE TABLE items (id text PRIMARY KEY)")
        db("CREATE VIEW ten AS SELECT generate_series(1, 10) AS number")
        hub.subscribe(lambda event: gate.wait(DEADLINE), "items")
        with hub.start(dsn, ["items"], queue_size=1, heartbeat=0.05):
            statement = "INSERT INTO items SELECT %s || '/' || number || repeat('x', 2000) FROM ten"
            for number in range(10_000):
                db(statement, (number,))
                if any(hasattr(record, "queue_usage") for record in caplog.records):
                    break
            gate.set()
            assert any(hasattr(record, "queue_usage") for record in caplog.records)
