"""Notify delivery to a broker that is slow: it alone misses events, and is told so."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import pgsignals
from pgsignals.cloudevents import Received, read
from tests.brokers import Kafka, as_written, free_port, read_all
from tests.conftest import DEADLINE, Database, Recorder
from tests.proxy import Proxy
from tests.waiting import eventually


class Backend:
    """A broadcaster that can be held up."""

    def __init__(self, name: str) -> None:
        self.arrived = Recorder()
        self.open = threading.Event()
        self.open.set()
        self.stuck = threading.Event()
        self._name = name
        self._published: list[Any] = []

    def __str__(self) -> str:
        return f"{self._name}://"

    def publish(self, events: Sequence[pgsignals.Event]) -> None:
        self._published += events

    def announce(self, gap: pgsignals.Gap) -> None:
        self._published.append(gap)

    def flush(self, timeout: float) -> bool:
        if not self.open.is_set():
            self.stuck.set()
            self.open.wait()
        published, self._published = self._published, []
        for item in published:
            self.arrived(item)
        return True

    def close(self) -> None:
        """Nothing to give up."""


@pytest.fixture
def shop(db: Database) -> Database:
    """A database with a table."""
    db("CREATE TABLE items (id bigint PRIMARY KEY, text text)")
    return db


def test_a_slow_broker_alone_misses_events(
    hub: pgsignals.Hub, shop: Database, recorder: Recorder
) -> None:
    """Receivers and the other broker get everything meanwhile; it gets a Gap in the right place."""
    slow, fast, gaps = Backend("slow"), Backend("fast"), Recorder()
    hub.subscribe(recorder, "items")
    hub.on_gap(gaps)
    hub.start(shop.dsn, ["items"], backends=[slow, fast], queue_size=1000)
    shop("INSERT INTO items VALUES (0)")
    fast.arrived.wait(1)
    slow.arrived.wait(1)
    slow.open.clear()
    most = 0
    for first in range(1, 5001, 500):
        shop("INSERT INTO items SELECT generate_series(%s, %s)", (first, first + 499))
        recorder.wait(first + 500)
        fast.arrived.wait(first + 500)
        most = max(most, hub.status().backends[0].depth)
    assert slow.stuck.wait(DEADLINE)
    # One message more than there is room for, at most.
    assert 1000 <= most < 2000
    status = hub.status().backends[0]
    assert (status.ready, status.delivered, status.lost) == (False, 1, 5000 - status.depth)
    assert not gaps.items
    slow.open.set()
    [gap] = gaps.wait(1)
    assert gap.reason == "overflow"
    assert "slow://" in gap.detail
    told = slow.arrived.wait_until(lambda item: isinstance(item, pgsignals.Gap))
    assert [event.id for event in told[:-1]] == list(range(len(told) - 1))
    assert told[-1] == gap
    assert gap.since <= recorder.items[len(told)].at <= gap.until
    shop("INSERT INTO items VALUES (5001)")
    assert slow.arrived.wait_until(lambda item: getattr(item, "id", 0) == 5001)[-2] == gap
    assert [event.id for event in fast.arrived.wait(5002)] == list(range(5002))
    status = hub.status().backends[0]
    assert (status.ready, status.lost + status.delivered) == (True, 5002)


def resident() -> int:
    """MiB of this process that are in memory."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) // 1024


@pytest.mark.timeout(300)
def test_kafka_at_a_crawl(hub: pgsignals.Hub, shop: Database, recorder: Recorder) -> None:
    """Memory is bounded, nobody else is held up, and Kafka gets what fits and a Gap."""
    port = free_port()
    kafka = Kafka(**{"advertised.listeners": f"PLAINTEXT://127.0.0.1:{port}"})
    proxy = Proxy("127.0.0.1", kafka.port)
    proxy.port = port
    fast, gaps = Backend("fast"), Recorder()
    watcher = pgsignals.watch("items", "inserted", extra=["text"])
    try:
        kafka.start()
        proxy.accept()
        hub.subscribe(recorder, "items")
        hub.on_gap(gaps)
        url = f"kafka://127.0.0.1:{port}/?prefix=shop&create=true&partitions=1"
        hub.start(shop.dsn, [watcher], backends=[url, fast], queue_size=5000)
        shop("INSERT INTO items VALUES (0)")
        eventually(lambda: hub.status().backends[0].delivered, lambda count: count == 1, 60)
        proxy.slow(rate=100_000)
        before = resident()
        # 30 MB that lz4 cannot make smaller, of which the broker takes 0.1 a second.
        for first in range(1, 30_001, 2000):
            shop(
                "INSERT INTO items SELECT i, (SELECT string_agg(md5(random()::text || i || j), '')"
                " FROM generate_series(1, 31) AS j) FROM generate_series(%s, %s) AS i",
                (first, first + 1999),
            )
            recorder.wait(first + 2000, 60)
            fast.arrived.wait(first + 2000, 60)
            # The tests' own lists are not what is measured.
            for kept in (recorder, fast.arrived):
                kept.items[:-1] = [None] * (len(kept.items) - 1)
        assert resident() - before < 120
        status = hub.status().backends[0]
        assert status.lost > 15_000
        proxy.slow()
        [gap] = gaps.wait(1, 60)
        assert gap.reason == "overflow"
        shop("INSERT INTO items VALUES (30001)")
        written = read_all(kafka, "shop", 30_003 - status.lost)
        found = [read(*as_written(each)) for each in written]
        assert found[-2] == gap
        ids = [event.key["id"] for event in found if isinstance(event, Received)]
        assert ids.pop() == 30_001
        assert ids == list(range(len(ids)))
    finally:
        hub.stop()
        proxy.refuse()
        proxy.cut()
        kafka.close()
