"""The forwarder to a broker that tells how far it is, whatever that and the leases do."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

import pytest

from pgsignals import BrokerError, Event, Gap
from pgsignals.core.metrics import Meter
from pgsignals.dispatch.forwarder import CHUNK, WINDOW, Forwarder
from pgsignals.dispatch.in_flight import Lease, Page
from pgsignals.testing.conformance import make_event
from tests.conftest import DEADLINE
from tests.waiting import eventually


class Broker:
    """A broker whose ``log`` has what arrived, a broadcaster to it, and the log that is read.

    ``trouble`` is the chance of each thing that can go wrong. When a lease is over, what is behind
    the cursor is read again.
    """

    def __init__(self, seed: int = 0, trouble: float = 0.0) -> None:
        self.forwarder: Forwarder
        self.log: list[Any] = []
        self.calls: list[str] = []
        self.most = 0
        self._chance = random.Random(seed)
        self._trouble = trouble
        # What is under way, and the events that have arrived and have yet to be counted.
        self._sent: list[Any] = []
        self._uncounted: list[Event] = []
        self._lease = Lease(math.inf)
        self._cursor = 0
        self._pages: list[tuple[list[Event], Gap | None, list[Page]]] = []

    def __str__(self) -> str:
        return "broker://test"

    def write(self, events: Sequence[Event] = (), gap: Gap | None = None) -> None:
        """Have the forwarder read a page."""
        self._pages.append(([*events], gap, []))
        self._read(self._pages[-1])

    def _read(self, read: tuple[list[Event], Gap | None, list[Page]]) -> None:
        events, gap, pages = read
        pages.append(Page(self._lease, len(events)))
        if gap is None:
            self.forwarder.submit_page(events, pages[-1])
        else:
            self.forwarder.gap(gap, pages[-1])

    @property
    def done(self) -> int:
        """The number of pages that are done, each of which must have arrived by then."""
        done = [any(page.done for page in pages) for _, _, pages in self._pages[self._cursor :]]
        count = self._cursor + (done.index(False) if False in done else len(done))
        there = {item if isinstance(item, Gap) else item.uid for item in self.log}
        for events, gap, _ in self._pages[:count]:
            assert {event.uid for event in events} <= there
            assert gap is None or gap in there
        return count

    def _happens(self) -> bool:
        return self._chance.random() < self._trouble

    def _misbehave(self) -> None:
        if self._happens():
            # The cursor is behind what is done.
            if self._chance.random() < 0.5:
                self._cursor = self.done
            self._lease.end()
            self._lease = Lease(math.inf)
            for each in self._pages[self._cursor :]:
                self._read(each)
        if self._happens():
            # What is under way is given up, but for what the broker has got.
            self._arrive(self._chance.randint(0, len(self._sent)))
            self._sent.clear()
            raise BrokerError("refused")
        if self._happens():
            raise BrokerError("nobody knows")

    def _arrive(self, count: int) -> None:
        arrived, self._sent = self._sent[:count], self._sent[count:]
        self.log += arrived
        self._uncounted += [item for item in arrived if isinstance(item, Event)]

    def publish(self, events: Sequence[Event]) -> None:
        self._misbehave()
        known = {item.uid for item in self._sent if isinstance(item, Event)}
        known |= {event.uid for event in self._uncounted}
        for event in events:
            if event.uid not in known:
                self._sent.append(event)
        self.most = max(self.most, len(self._sent))
        self.calls.append("publish")
        self._misbehave()

    def announce(self, gap: Gap) -> None:
        self._sent.append(gap)
        self._misbehave()

    def arrived(self, timeout: float) -> int:
        self._misbehave()
        self.calls.append("arrived")
        if timeout and self._happens():
            return 0
        least = min(1, len(self._sent)) if timeout else 0
        self._arrive(self._chance.randint(least, len(self._sent)))
        found = len(self._uncounted)
        self._uncounted.clear()
        return found

    def flush(self, timeout: float) -> bool:
        self._misbehave()
        self.calls.append("flush")
        if self._happens():
            self._arrive(self._chance.randint(0, len(self._sent)))
            return False
        self._arrive(len(self._sent))
        self._uncounted.clear()
        return True

    def close(self) -> None:
        """Nothing is written to it any more."""


class _Quiet:
    def count(self, name: str, amount: int, /, **labels: str) -> None:
        """Count nothing."""

    def gauge(self, name: str, read: Any, /, **labels: str) -> None:
        """Read nothing."""


@pytest.fixture
def meter() -> Meter:
    """A meter that nobody reads."""
    return Meter(_Quiet())


def run(broker: Broker, meter: Meter, pages: int, length: int) -> list[Event]:
    """Forward pages of events, some of them of one, and two Gaps; return the events."""
    broker.forwarder = Forwarder(broker, 10**6, meter)
    broker.forwarder._backoff.next = lambda: 0.0  # type: ignore[method-assign]
    events = [make_event(number, record=number % 7) for number in range(pages * length)]
    at = datetime(2026, 1, 1, tzinfo=timezone.utc)
    for number in range(pages):
        broker.write(events[number * length : (number + 1) * length])
        if number in (pages // 3, pages // 2):
            broker.write(gap=Gap(at, at, "overflow", str(number)))
    broker.forwarder.start()
    eventually(lambda: broker.done, lambda done: done == pages + 2, DEADLINE)
    assert broker.forwarder.stop(DEADLINE)
    return events


def latest(log: Sequence[Any]) -> list[Any]:
    """The last mention of each, in their order."""
    found: dict[Any, Any] = {}
    for item in log:
        identity = item if isinstance(item, Gap) else item.uid
        found.pop(identity, None)
        found[identity] = item
    return list(found.values())


def test_it_publishes_on_while_events_are_under_way(meter: Meter) -> None:
    """Without trouble, each comes once, in order, and one flush at the end is enough."""
    broker = Broker(1)
    events = run(broker, meter, 30, 1000)
    assert [item for item in broker.log if isinstance(item, Event)] == events
    assert CHUNK < broker.most <= WINDOW
    # One for each Gap, one at the end, and one for the connection at the start.
    assert broker.calls.count("flush") <= 4


@pytest.mark.parametrize(("pages", "length"), [(40, 1), (40, 40), (9, 1700)])
@pytest.mark.parametrize("seed", range(8))
def test_nothing_is_lost_or_overtaken(meter: Meter, seed: int, pages: int, length: int) -> None:
    """Whatever fails, a page is done only when its events have come, and the latest come last."""
    broker = Broker(seed, 0.03)
    events = run(broker, meter, pages, length)
    found = [item for item in latest(broker.log) if isinstance(item, Event)]
    assert [event.uid for event in found] == [event.uid for event in events]
    gaps = [item for item in broker.log if isinstance(item, Gap)]
    assert {gap.detail for gap in gaps} == {str(pages // 3), str(pages // 2)}
