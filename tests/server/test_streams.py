"""Streams: iterating, from plain code and from asyncio, and what a slow reader learns."""

from __future__ import annotations

import asyncio
import gc
import threading
from typing import Any

import pytest

from pgsignals import ConfigurationError, Event, Gap, Hub, WaitTimeout
from tests.conftest import DEADLINE, Database, Recorder
from tests.hub_parts import gap_receivers, subscriptions


@pytest.fixture(autouse=True)
def running(hub: Hub, dsn: str, db: Database) -> Hub:
    """A Hub that watches a table."""
    db("CREATE TABLE items (id bigserial PRIMARY KEY, name text)")
    return hub.start(dsn, ["items"])


def insert(db: Database, count: int = 1) -> None:
    """Insert so many rows by one statement."""
    db("INSERT INTO items (name) SELECT 'a' FROM generate_series(1, %s)", [count])


def test_iterating(hub: Hub, db: Database) -> None:
    """A stream yields events from its beginning on, until it is closed."""
    with hub.stream("items") as events:
        insert(db, 3)
        assert [next(events).id for _ in range(3)] == [1, 2, 3]
    assert list(events) == []


def test_get_with_a_timeout(hub: Hub) -> None:
    """get gives None when nothing comes in time."""
    with hub.stream("items") as events:
        assert events.get(timeout=0.01) is None


def test_stopping_the_hub_ends_the_iteration(hub: Hub, db: Database) -> None:
    """A loop over a stream ends, with all that had arrived, when the Hub stops."""
    seen: list[int] = []
    first = threading.Event()
    events = hub.stream("items")

    def read() -> None:
        for event in events:
            seen.append(event.id)
            first.set()

    reader = threading.Thread(target=read)
    reader.start()
    insert(db, 5)
    assert first.wait(DEADLINE)
    hub.stop()
    reader.join(DEADLINE)
    assert seen == [1, 2, 3, 4, 5]


def test_a_slow_reader_hears_of_its_loss(hub: Hub, db: Database, recorder: Recorder) -> None:
    """What does not fit is dropped, and iterating raises where it was."""
    hub.subscribe(recorder, "items")
    events = hub.stream("items", maxsize=2)
    insert(db, 5)
    recorder.wait(5)
    assert [next(events).id, next(events).id] == [1, 2]
    with pytest.raises(OverflowError, match="maxsize"):
        next(events)
    insert(db)
    assert next(events).id == 6


def test_a_slow_reader_can_go_on_with_gaps(hub: Hub, db: Database, recorder: Recorder) -> None:
    """With gaps=True the loss is a Gap, in its place between the events."""
    hub.subscribe(recorder, "items")
    events = hub.stream("items", maxsize=2, gaps=True)
    insert(db, 5)
    recorder.wait(5)
    first: Any = next(events)
    second: Any = next(events)
    insert(db)
    recorder.wait(6)
    gap: Any = next(events)
    last: Any = next(events)
    assert [first.id, second.id, last.id] == [1, 2, 6]
    assert isinstance(gap, Gap)
    assert gap.reason == "overflow"
    assert recorder.items[2].at == gap.since == gap.until


def test_a_forgotten_stream_goes(hub: Hub) -> None:
    """A stream that nobody holds any more is unsubscribed, closed or not."""
    events = hub.stream("items", gaps=True)
    assert len(subscriptions(hub)) == 1
    del events
    gc.collect()
    assert subscriptions(hub) == []
    assert gap_receivers(hub) == []


def test_maxsize_is_checked(hub: Hub) -> None:
    """A stream that could hold nothing is refused."""
    with pytest.raises(ConfigurationError, match="maxsize=0"):
        hub.stream("items", maxsize=0)


def test_asyncio(hub: Hub, db: Database) -> None:
    """`async for` yields events without blocking the loop, and ends when the Hub stops."""

    async def read() -> list[int]:
        seen = []
        async with hub.stream("items") as events:
            await asyncio.to_thread(insert, db, 3)
            async for event in events:
                seen.append(event.id)
                if len(seen) == 3:
                    await asyncio.to_thread(hub.stop)
        return seen

    assert asyncio.run(asyncio.wait_for(read(), DEADLINE)) == [1, 2, 3]


def test_asyncio_can_be_cancelled(hub: Hub, db: Database) -> None:
    """A task that waits for events can be cancelled, and the stream goes on for the next."""

    async def read() -> Event:
        async with hub.stream("items") as events:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(events.__anext__(), 0.01)
            await asyncio.to_thread(insert, db)
            return await events.__anext__()

    assert asyncio.run(asyncio.wait_for(read(), DEADLINE)).id == 1


def test_a_loop_that_is_gone_hurts_nobody(hub: Hub, db: Database, recorder: Recorder) -> None:
    """Events for a stream whose loop has ended are no failure for the others."""
    hub.subscribe(recorder, "items")
    kept: list[Any] = []

    async def leave_open() -> None:
        events = hub.stream("items")
        kept.append(events)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(events.__anext__(), 0.01)

    failures = Recorder()
    hub.receiver_failed.connect(lambda hub, **details: failures(details), weak=False)
    asyncio.run(leave_open())
    insert(db, 2)
    recorder.wait(2)
    hub.stop()
    assert failures.items == []


def test_waiting_without_end_ends_with_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """wait_for without a timeout raises WaitTimeout when the Hub is stopped meanwhile."""
    make = hub.stream

    def make_and_stop(*arguments: Any, **options: Any) -> Any:
        made = make(*arguments, **options)
        threading.Thread(target=hub.stop).start()
        return made

    monkeypatch.setattr(hub, "stream", make_and_stop)
    with pytest.raises(WaitTimeout, match="before the Hub was stopped"):
        hub.wait_for("items", timeout=None)
