"""Queues and workers: order per record, isolation, bounded memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from pgsignals.core.events import Event
from pgsignals.dispatch.dispatcher import Dispatcher
from tests.broadcasters import Collector, message
from tests.conftest import DEADLINE


@pytest.fixture
def collector() -> Collector:
    """A broadcaster that notes what it was given."""
    return Collector()


@pytest.fixture(params=[1, 4])
def dispatcher(request: pytest.FixtureRequest, collector: Collector) -> Iterator[Dispatcher]:
    """A dispatcher that runs, with one worker and with four."""
    made = Dispatcher([collector], request.param, 100)
    made.start()
    yield made
    made.stop(DEADLINE)


def test_order_per_record(dispatcher: Dispatcher, collector: Collector) -> None:
    """Events of one record are handled in order, all by the same worker."""
    for number in range(200):
        dispatcher.submit(message(number, *((i,) for i in range(20))))
    dispatcher.stop(DEADLINE)
    assert all(collector.by_id[str(i)] == list(range(200)) for i in range(20))
    assert all(len(names) == 1 for names in collector.threads.values())


def test_order_when_the_key_changes(dispatcher: Dispatcher, collector: Collector) -> None:
    """A record's events stay in order across its changes of key, whoever's worker that is."""
    sequence = 0
    for start in range(50):
        keys = [1000 * start + step for step in range(5)]
        dispatcher.submit(message(sequence, (keys[0],)))
        sequence += 1
        for old, new in itertools.pairwise(keys):
            dispatcher.submit(message(sequence, (new, old), moved=True))
            dispatcher.submit(message(sequence + 1, (new,)))
            sequence += 2
    dispatcher.stop(DEADLINE)
    for start in range(50):
        own = [s for s, key in collector.order if key // 1000 == start]
        assert own == sorted(own)
        assert len(own) == 9


def test_order_when_a_key_is_taken_over(dispatcher: Dispatcher, collector: Collector) -> None:
    """A record that takes the key of another comes after all that is known of the other."""
    collector.gate.clear()
    sequence = 0
    for key in range(50):
        # Both ways, which must not make two workers wait for one another.
        for new, old in ((key, 1000 + key), (1000 + key, key)):
            for _ in range(3):
                dispatcher.submit(message(sequence, (new,)))
                sequence += 1
            dispatcher.submit(message(sequence, (new, old), moved=True))
            sequence += 1
    collector.gate.set()
    assert dispatcher.stop(DEADLINE)
    for found in collector.by_id.values():
        assert found == sorted(found)
        assert len(found) == 4


def test_unhashable_keys(dispatcher: Dispatcher, collector: Collector) -> None:
    """A key of an array type is no obstacle."""
    dispatcher.submit(message(1, ([1, 2],)))
    assert dispatcher.stop(DEADLINE)
    assert len(collector.order) == 1


def test_an_announcement_comes_before_later_events(
    dispatcher: Dispatcher, collector: Collector
) -> None:
    """What is announced is called once, and before anything that is submitted after it."""
    announced: list[int] = []
    dispatcher.announce(lambda: announced.append(len(collector.order)))
    dispatcher.submit(message(1, *((i,) for i in range(50))))
    dispatcher.stop(DEADLINE)
    assert announced == [0]
    assert len(collector.order) == 50


def test_room(collector: Collector) -> None:
    """The depth counts events that wait or are handled, and room comes as they go."""
    collector.gate.clear()
    dispatcher = Dispatcher([collector], 1, 10)
    dispatcher.start()
    for number in range(10):
        dispatcher.submit(message(number, (number,)))
    assert dispatcher.full
    assert dispatcher.depth == 10
    assert not dispatcher.wait_for_room(0)
    collector.gate.set()
    assert dispatcher.wait_for_room(DEADLINE)
    assert not dispatcher.full
    assert dispatcher.stop(DEADLINE)
    assert dispatcher.depth == 0
    assert collector.closed


def test_a_broadcaster_that_raises_stops_nobody(
    collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    """The other broadcasters get what one could not take, and the log names the one."""

    class Broken(Collector):
        def publish(self, events: list[Event]) -> None:
            raise ConnectionError("no broker")

    dispatcher = Dispatcher([Broken(), collector], 1, 10)
    dispatcher.start()
    dispatcher.submit(message(1, (1,)))
    assert dispatcher.stop(DEADLINE)
    assert collector.order == [(1, 1)]
    assert "no broker" in caplog.text
