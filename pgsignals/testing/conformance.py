"""Tests to inherit of what every broadcaster and every source has to keep.

::

    class TestMyBroadcaster(BroadcasterConformance):
        @pytest.fixture
        def broadcaster(self, broker):
            return MyBroadcaster(broker.url)

        @pytest.fixture
        def written(self, broker):
            return lambda count: broker.read(count)
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest
from psycopg2.extras import DateTimeTZRange, NumericRange

from pgsignals.core.events import Event, Gap, Message, Topic
from pgsignals.plugins.broadcaster import Broadcaster, Pipelined
from pgsignals.plugins.cloudevents import from_cloudevent, read
from pgsignals.plugins.source import RemoteSource, Wanted

Written = tuple[Mapping[str, str], bytes]
ReadBack = Callable[[int], Sequence[Written]]
MakeSource = Callable[[], RemoteSource]

TABLE = "conformance"
"""The table, in the schema ``public``, whose events the tests send; and ``conformance_2``."""

DEADLINE = 30.0

_VALUES: dict[str, Any] = {
    "text": "ħ😀\n\"'\\ %41",
    "number": Decimal("12345678901234567890.50"),
    "real": float("inf"),
    "flag": True,
    "nothing": None,
    "token": uuid.UUID("0b7e9a1c-0000-4000-8000-000000000001"),
    "day": date(2024, 2, 29),
    "at": datetime(2024, 7, 1, 12, 34, 56, 789, tzinfo=timezone(timedelta(hours=5, minutes=45))),
    "span": timedelta(days=-1, seconds=3, microseconds=7),
    "raw": memoryview(b"\x00\xff"),
    "whole": NumericRange(1, 10, "[)"),
    "period": DateTimeTZRange(datetime(2024, 1, 1, tzinfo=timezone.utc), None, "()"),
    "list": [[Decimal("1.5"), None], [Decimal("2"), Decimal("3")]],
    "document": {"a": [1, 2.5, None, {"b": "c"}]},
}


def make_event(
    number: int,
    op: str = "updated",
    *,
    record: int = 1,
    table: str = TABLE,
    values: Mapping[str, Any] | None = None,
) -> Event:
    """Return an event of the record ``record``; ``number``, and its uid, tell it from others."""
    given = {"number": number} if values is None else dict(values)
    compared = op == "updated"
    topic = Topic(
        model=f"public.{table}",
        op=op,
        label=None,
        schema="public",
        table=table,
        key=("id",),
        values=tuple(given),
        compared=compared,
        loader=lambda session, ids, /, **options: [],
        name="conform",
    )
    row: list[Any] = [record, *given.values()]
    if compared:
        row += [None for _ in given]
        row.append("".join("01"[value is not None] for value in given.values()))
    at_us = 1_700_000_000_000_000 + number
    message = Message(topic, 1000 + number, 1, at_us, {"by": "conformance"}, [tuple(row)])
    return Event(message, 0, tuple(row))


def _send(broadcaster: Broadcaster, *batches: Sequence[Event]) -> None:
    """Publish batches, and wait until all has arrived."""
    for events in batches:
        broadcaster.publish(events)
    assert broadcaster.flush(DEADLINE) is True


class BroadcasterConformance:
    """Tests of a broadcaster that sends CloudEvents.

    Inherit, and give the fixtures ``broadcaster``, for one test each, and ``written``: a function
    that waits for so many messages and returns them all, in the order of each record, as
    attributes and data; and ``too_long``, the length of a text that the broadcaster does not take
    in one message, or None.
    """

    @pytest.fixture
    def broadcaster(self) -> Broadcaster:
        """A new broadcaster to a place where nothing has been written yet."""
        raise NotImplementedError

    @pytest.fixture
    def written(self) -> ReadBack:
        """A function that reads back what has been written."""
        raise NotImplementedError

    @pytest.fixture
    def too_long(self) -> int | None:
        """The length of a text that does not fit a message."""
        return None

    @pytest.fixture(autouse=True)
    def _closed(self, broadcaster: Broadcaster) -> Iterator[None]:
        self._broadcaster = broadcaster
        yield
        broadcaster.close()

    def _send(self, *batches: Sequence[Event]) -> None:
        _send(self._broadcaster, *batches)

    def test_a_flush_without_events_connects(self) -> None:
        """A broker that is there shows before there are events."""
        assert self._broadcaster.flush(DEADLINE) is True

    def test_its_text_says_where(self) -> None:
        """Log lines name the broadcaster by something better than an address in memory."""
        assert str(self._broadcaster)
        assert " at 0x" not in str(self._broadcaster)

    def test_an_event_arrives_as_it_is(self, written: ReadBack) -> None:
        """Values of all kinds are equal on the other side."""
        events = [
            make_event(1, "inserted", values=_VALUES),
            make_event(2, "updated", values=_VALUES),
            make_event(3, "deleted", values=_VALUES),
        ]
        self._send(events)
        assert [from_cloudevent(*each) for each in written(3)] == events

    def test_events_of_a_record_stay_in_order(self, written: ReadBack) -> None:
        """Each record's events come in their order, in a large batch and over several batches."""
        events = [make_event(number, record=number % 20) for number in range(1000)]
        self._send(events[:700], events[700:])
        found = [from_cloudevent(*each) for each in written(1000)]
        for record in range(20):
            numbers = [event.values["number"] for event in found if event.id == record]
            assert numbers == list(range(record, 1000, 20))

    def test_several_tables_in_one_batch(self, written: ReadBack) -> None:
        """A batch may have events of several tables."""
        events = [make_event(1), make_event(2, table=f"{TABLE}_2"), make_event(3)]
        self._send(events)
        found = {event.uid: event for event in (from_cloudevent(*each) for each in written(3))}
        assert found == {event.uid: event for event in events}

    def test_what_is_published_again_ends_in_order(self, written: ReadBack) -> None:
        """Events that are published again, with the flush not waited for, leave the latest last."""
        events = [make_event(number) for number in range(10)]
        self._send(events, events)
        last = make_event(10)
        self._send([last])
        found = [from_cloudevent(*each).uid for each in written(11)]
        assert set(found) == {event.uid for event in [*events, last]}
        # The last mention of each is in order, whatever came twice.
        latest = [uid for at, uid in enumerate(found) if uid not in found[at + 1 :]]
        assert latest == [event.uid for event in [*events, last]]

    def test_what_has_arrived_is_counted(self, written: ReadBack) -> None:
        """A broadcaster that is Pipelined counts each event once, when it is there."""
        broadcaster = self._broadcaster
        if not isinstance(broadcaster, Pipelined):
            pytest.skip("it does not count")
        events = [make_event(number, record=number % 20) for number in range(1000)]
        broadcaster.publish(events[:600])
        broadcaster.publish(events[600:])
        counted, deadline = 0, time.monotonic() + DEADLINE
        while counted < len(events) and time.monotonic() < deadline:
            counted += broadcaster.arrived(DEADLINE)
        assert counted == len(events)
        assert broadcaster.arrived(0.0) == 0
        found = [from_cloudevent(*each).uid for each in written(1000)]
        assert sorted(found) == sorted(event.uid for event in events)

    def test_what_is_too_long_comes_without_values(
        self, written: ReadBack, too_long: int | None
    ) -> None:
        """An event that does not fit comes with its key, flagged, and holds up nobody."""
        if too_long is None:
            pytest.skip("nothing is too long for it")
        events = [make_event(1), make_event(2, values={"text": "x" * too_long}), make_event(3)]
        self._send(events)
        found = [from_cloudevent(*each) for each in written(3)]
        assert [(event.uid, event.id, event.truncated) for event in found] == [
            (event.uid, event.id, event is events[1]) for event in events
        ]

    def test_a_gap_is_told(self, written: ReadBack) -> None:
        """A Gap reaches the readers, behind what came before it."""
        self._send([make_event(1)])
        now = datetime.now(timezone.utc)
        gap = Gap(now - timedelta(seconds=3), now, "reconnected", "because")
        self._broadcaster.announce(gap)
        assert self._broadcaster.flush(DEADLINE) is True
        assert read(*written(2)[-1]) == gap

    def test_closing_twice(self) -> None:
        """A broadcaster may be closed more than once, connected or not."""
        self._broadcaster.close()
        self._broadcaster.close()


class _Sink:
    """The sink of these tests; ``settles`` says whether receivers return."""

    def __init__(self, *, settles: bool = True) -> None:
        self.events: list[Event] = []
        self.gaps: list[Gap] = []
        self.settles = settles
        self.full = False
        self.positions: list[str] = []
        self._unsettled: list[Callable[[], None]] = []
        self._changed = threading.Condition()

    def receive(
        self,
        attributes: Mapping[str, str],
        data: bytes | None,
        *,
        position: str | None = None,
        redelivered: bool = False,
    ) -> None:
        event = from_cloudevent(attributes, data or b"")
        with self._changed:
            self.events.append(event)
            self.positions.append(position or "")
            self._changed.notify_all()

    def settle(self, call: Callable[[], None]) -> None:
        with self._changed:
            self._unsettled.append(call)
        if self.settles:
            self.settle_all()

    def settle_all(self) -> None:
        """Let receivers return from all that has come."""
        with self._changed:
            calls, self._unsettled = self._unsettled, []
        for call in calls:
            call()

    def wait_for_room(self, timeout: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self.full, timeout)

    def gap(self, gap: Gap) -> None:
        self.gaps.append(gap)

    def connected(self) -> None:
        """Do nothing: no test asks."""

    def disconnected(self, error: BaseException) -> None:
        """Do nothing: no test asks."""

    def wait(self, *numbers: int) -> None:
        """Wait until these events are here, and fail if there are others."""
        with self._changed:
            self._changed.wait_for(lambda: set(numbers) <= set(self.numbers), DEADLINE)
        assert sorted(set(self.numbers)) == sorted(numbers)

    @property
    def numbers(self) -> list[int]:
        return [event.values["number"] for event in self.events]


class SourceConformance:
    """Tests of a source, with the broadcaster that it belongs to.

    Inherit, and give the fixtures ``broadcaster``, for one test each, and ``make_source``, which
    makes any number of sources of what the broadcaster writes.
    """

    @pytest.fixture
    def broadcaster(self) -> Broadcaster:
        """A new broadcaster to a place where nothing has been written yet."""
        raise NotImplementedError

    @pytest.fixture
    def make_source(self) -> MakeSource:
        """A function that makes sources of what the broadcaster writes."""
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def _ready(self, broadcaster: Broadcaster, make_source: MakeSource) -> Iterator[None]:
        self._broadcaster, self._make_source = broadcaster, make_source
        self._send(0)
        self._started: list[RemoteSource] = []
        yield
        for source in self._started:
            self._end(source)
        broadcaster.close()

    def _send(self, *numbers: int) -> None:
        _send(self._broadcaster, [make_event(number) for number in numbers])

    def _start(self, name: str | None, sink: _Sink) -> RemoteSource:
        source = self._make_source()
        source.start([Wanted(TABLE, "public", ("inserted", "updated", "deleted"))], name, sink)
        self._started.append(source)
        return source

    @staticmethod
    def _end(source: RemoteSource) -> None:
        source.stop(DEADLINE)
        source.close(DEADLINE)

    def test_it_begins_now(self) -> None:
        """Without a name, what came before the start is not read, and all that comes after is."""
        sink = _Sink()
        self._start(None, sink)
        self._send(1, 2, 3)
        sink.wait(1, 2, 3)
        assert sink.events == [make_event(number) for number in (1, 2, 3)]

    def test_each_gets_all_without_a_name(self) -> None:
        """Two sources without a name have the same events."""
        sinks = [_Sink(), _Sink()]
        for sink in sinks:
            self._start(None, sink)
        self._send(1, 2)
        for sink in sinks:
            sink.wait(1, 2)

    def test_a_name_goes_on_where_it_was(self) -> None:
        """Events that come while nobody of the name reads go to the next reader, and none twice."""
        first, second = _Sink(), _Sink()
        self._end(self._start("one", first))
        self._send(1)
        source = self._start("one", first)
        first.wait(1)
        self._end(source)
        self._send(2, 3)
        self._start("one", second)
        second.wait(2, 3)

    def test_what_receivers_have_not_finished_comes_again(self) -> None:
        """Events that were read and not settled go to the next one of the name."""
        stuck, second = _Sink(settles=False), _Sink()
        source = self._start("one", stuck)
        self._send(1, 2)
        stuck.wait(1, 2)
        self._end(source)
        self._start("one", second)
        second.wait(1, 2)
        assert [event.uid for event in second.events] == [event.uid for event in stuck.events]

    def test_what_was_refused_does_not_come_again(self) -> None:
        """An event that no receiver could take is over for its name once it is settled."""
        first, second = _Sink(settles=False), _Sink()
        source = self._start("one", first)
        self._send(1)
        first.wait(1)
        source.refuse(first.positions[0], "a receiver raised ValueError")
        first.settles = True
        first.settle_all()
        self._end(source)
        self._send(2)
        self._start("one", second)
        second.wait(2)

    def test_names_are_apart(self) -> None:
        """Each name gets all events."""
        sinks = {name: _Sink() for name in ("one", "two")}
        for name, sink in sinks.items():
            self._start(name, sink)
        self._send(1)
        for sink in sinks.values():
            sink.wait(1)

    def test_it_says_how_it_is(self) -> None:
        """A source is alive and connected from its start to its end, which takes no long time."""
        source = self._start(None, _Sink())
        assert source.is_alive
        assert source.is_connected
        began = time.monotonic()
        self._end(source)
        assert not source.is_alive
        assert time.monotonic() - began < DEADLINE
