"""Coroutine functions as receivers: run on a loop, in order, and stopped without a deadlock."""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import pgsignals
from pgsignals import Batch, Event, Gap, Hub, ReceiverError, StateError
from pgsignals.dispatch.coroutines import CoroutineReceiver, Coroutines, LeftBehind
from pgsignals.dispatch.registry import receiver_name
from pgsignals.plugins.within import within
from pgsignals.testing import simulated
from tests.conftest import DEADLINE, Database, Recorder
from tests.waiting import eventually, settle

WRITE = "INSERT INTO items (name) SELECT 'a' FROM generate_series(1, %s)"


@pytest.fixture(autouse=True)
def items(db: Database) -> None:
    """A table to write to."""
    db("CREATE TABLE items (id bigserial PRIMARY KEY, name text)")


@contextmanager
def loop_in_a_thread() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop that runs in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(DEADLINE)
        loop.close()


def test_they_run_on_the_given_loop(hub: Hub, dsn: str, db: Database, recorder: Recorder) -> None:
    """Coroutine functions, methods, partials and objects get their events on the loop."""

    class Receiver:
        async def __call__(self, event: Event) -> None:
            recorder(("object", asyncio.get_running_loop()))

        async def method(self, event: Event) -> None:
            recorder(("method", asyncio.get_running_loop()))

    async def named(name: str, event: Event) -> None:
        await asyncio.sleep(0)  # It goes on in another turn of the loop.
        recorder((name, asyncio.get_running_loop()))

    hub.on("items", "inserted")(functools.partial(named, "partial"))
    hub.on("items", id=1)(Receiver())
    hub.subscribe(Receiver().method, "items")
    with loop_in_a_thread() as loop:
        hub.start(dsn, ["items"], loop=loop)
        db(WRITE, [1])
        assert dict(recorder.wait(3)) == {"partial": loop, "object": loop, "method": loop}
        assert hub.stop()


def test_the_loop_is_the_one_where_start_is_called(hub: Hub, dsn: str, db: Database) -> None:
    """Without loop= it is the running loop, and `async with` lets receivers finish."""
    seen: list[int] = []

    async def main() -> None:
        entered, gate = asyncio.Event(), asyncio.Event()
        gate.set()

        @hub.on("items", "inserted")
        async def slow(event: Event) -> None:
            if not gate.is_set():
                entered.set()
            await gate.wait()
            seen.append(event.id)

        async def open_at_the_end() -> None:
            await asyncio.to_thread(eventually, lambda: hub.running, lambda running: not running)
            gate.set()

        async with hub.start(dsn, ["items"]):
            await asyncio.to_thread(db, WRITE, [5])
            await asyncio.to_thread(settle, hub)
            gate.clear()
            await asyncio.to_thread(db, WRITE, [5])
            await entered.wait()
            opening = asyncio.ensure_future(open_at_the_end())
        assert not hub.running
        await opening

    asyncio.run(asyncio.wait_for(main(), DEADLINE))
    assert seen[:6] == [1, 2, 3, 4, 5, 6]


def test_a_worker_waits_for_their_end(hub: Hub, dsn: str, db: Database) -> None:
    """The next event of a worker comes when the coroutine has ended, so that order is kept."""
    steps: list[tuple[str, int]] = []
    gate, done = threading.Event(), threading.Event()

    @hub.on("items", "inserted")
    async def stepwise(event: Event) -> None:
        steps.append(("begin", event.id))
        await asyncio.to_thread(gate.wait, DEADLINE)
        steps.append(("end", event.id))
        if event.id == 4:
            done.set()

    with loop_in_a_thread() as loop:
        hub.start(dsn, ["items"], loop=loop)
        db(WRITE, [4])
        eventually(hub.health, lambda health: health.depth == 4)
        gate.set()
        assert done.wait(DEADLINE)
        hub.stop()
    assert steps == [(step, number) for number in range(1, 5) for step in ("begin", "end")]


def test_a_slow_one_makes_the_queue_grow(hub: Hub, dsn: str, db: Database) -> None:
    """Events wait in the queue, not as tasks of the loop, while a coroutine is at work."""
    entered = threading.Event()

    async def main(loop: asyncio.AbstractEventLoop) -> None:
        release = asyncio.Event()

        @hub.on("items", "inserted")
        async def slow(event: Event) -> None:
            entered.set()
            await release.wait()

        before = len(asyncio.all_tasks())
        await asyncio.to_thread(hub.start, dsn, ["items"], loop=loop)
        await asyncio.to_thread(db, WRITE, [50])
        await asyncio.to_thread(entered.wait, DEADLINE)
        assert hub.health().depth == 50
        assert len(asyncio.all_tasks()) == before + 1
        release.set()
        assert await hub.astop()

    async def run() -> None:
        await asyncio.wait_for(main(asyncio.get_running_loop()), DEADLINE)

    asyncio.run(run())


def test_their_errors_are_reported(hub: Hub, dsn: str, db: Database, recorder: Recorder) -> None:
    """What one raises is sent to receiver_failed with the function itself, and others run on."""
    failures = Recorder()

    @hub.receiver_failed.connect
    def note(sender: Hub, **details: Any) -> None:
        failures((details["receiver"], details["event"].id, type(details["error"])))

    @hub.on("items")
    async def broken(event: Event) -> None:
        raise LookupError("no such thing")

    hub.subscribe(recorder, "items")
    with loop_in_a_thread() as loop:
        hub.start(dsn, ["items"], loop=loop)
        db(WRITE, [1])
        assert failures.wait(1) == [(broken, 1, LookupError)]
        recorder.wait(1)
        hub.stop()


def test_batches_and_gaps(hub: Hub, dsn: str, db: Database, recorder: Recorder) -> None:
    """on_batch and on_gap take coroutine functions too."""

    @hub.on_batch("items", every=0)
    async def batch(batch: Batch) -> None:
        recorder(batch.ids)

    @hub.on_gap
    async def gap(gap: Gap) -> None:
        recorder(gap.reason)

    with loop_in_a_thread() as loop:
        hub.start(dsn, ["items"], loop=loop)
        db(WRITE, [1])
        recorder.wait(1)
        db(
            "SELECT pg_terminate_backend(pid, 20000) FROM pg_stat_activity"
            " WHERE pid <> pg_backend_pid()"
            " AND application_name = 'pgsignals' AND datname = current_database()"
        )
        assert recorder.wait(2) == [[1], "reconnected"]
        hub.stop()


@pytest.mark.parametrize("kind", ["on", "on_batch", "on_gap"])
def test_without_a_loop(hub: Hub, dsn: str, kind: str) -> None:
    """A coroutine function is refused where no loop could run it, at start and after it."""

    async def later(item: Any) -> None: ...

    decorate = hub.on_gap if kind == "on_gap" else getattr(hub, kind)("items")
    hub.start(dsn, ["items"])
    with pytest.raises(ReceiverError, match=r"later is a coroutine function.*loop="):
        decorate(later)
    hub.stop()
    decorate(later)
    with pytest.raises(ReceiverError, match=r"later is a coroutine function.*loop="):
        hub.start(dsn, ["items"])


def test_stop_in_the_loops_thread_does_not_hang(
    hub: Hub, dsn: str, db: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """stop() where the loop runs leaves coroutines behind at once, and says so."""
    finished = []

    async def main() -> None:
        entered, stopped, over = asyncio.Event(), asyncio.Event(), asyncio.Event()

        @hub.on("items", "inserted")
        async def slow(event: Event) -> None:
            entered.set()
            await stopped.wait()
            finished.append(event.id)
            over.set()

        hub.start(dsn, ["items"])
        await asyncio.to_thread(db, WRITE, [3])
        await entered.wait()
        began = time.monotonic()
        assert hub.stop(timeout=DEADLINE) is False
        assert time.monotonic() - began < DEADLINE / 2
        stopped.set()
        await over.wait()

    with caplog.at_level(logging.WARNING, "pgsignals"):
        asyncio.run(asyncio.wait_for(main(), 2 * DEADLINE))
    assert "3 calls of coroutine receivers were not waited for" in caplog.text
    assert finished == [1]


@pytest.mark.parametrize("how", ["stop", "astop"])
def test_a_coroutine_may_stop_the_hub(hub: Hub, dsn: str, db: Database, how: str) -> None:
    """A receiver that stops the Hub is the last one called, and goes on itself."""
    seen: list[int] = []

    async def main() -> None:
        over = asyncio.Event()

        @hub.on("items", "inserted")
        async def last(event: Event) -> None:
            seen.append(event.id)
            if how == "stop":
                hub.stop(timeout=DEADLINE)
            else:
                await hub.astop(timeout=DEADLINE)
            over.set()

        hub.start(dsn, ["items"])
        await asyncio.to_thread(db, WRITE, [3])
        await over.wait()
        assert not hub.running

    asyncio.run(asyncio.wait_for(main(), DEADLINE - 1))
    assert seen == [1]


def test_a_closed_loop(hub: Hub, dsn: str, db: Database, recorder: Recorder) -> None:
    """Events for a loop that is gone are failures that say so; plain receivers go on."""
    failures = Recorder()

    @hub.receiver_failed.connect
    def note(sender: Hub, **details: Any) -> None:
        failures(details["error"])

    async def main() -> None:
        @hub.on("items")
        async def late(event: Event) -> None: ...

        hub.start(dsn, ["items"])

    hub.subscribe(recorder, "items")
    asyncio.run(main())
    db(WRITE, [1])
    [error] = failures.wait(1)
    assert isinstance(error, StateError)
    assert "is closed" in str(error)
    recorder.wait(1)
    assert hub.stop()


def test_a_loop_that_closes_in_the_meantime(hub: Hub, dsn: str, db: Database) -> None:
    """A worker that waits for a loop which never gets to it learns that it was closed."""
    failures = Recorder()

    @hub.receiver_failed.connect
    def note(sender: Hub, **details: Any) -> None:
        failures(details["error"])

    loop = asyncio.new_event_loop()

    @hub.on("items")
    async def never(event: Event) -> None: ...

    hub.start(dsn, ["items"], loop=loop)
    db(WRITE, [1])
    eventually(lambda: list(loop._ready), bool)  # type: ignore[attr-defined]
    loop.close()
    assert isinstance(failures.wait(1)[0], StateError)


def test_the_context_goes_along(hub: Hub, dsn: str, db: Database, recorder: Recorder) -> None:
    """A tracer's span is current inside the coroutine."""
    from contextvars import ContextVar

    current: ContextVar[str] = ContextVar("current", default="none")

    class Tracer:
        @contextmanager
        def receiving(self, events: Any, receiver: str, /) -> Iterator[None]:
            token = current.set(receiver)
            yield
            current.reset(token)

    async def traced(event: Event) -> None:
        recorder(current.get())

    hub.subscribe(traced, "items")
    with loop_in_a_thread() as loop:
        hub.start(dsn, ["items"], loop=loop, tracer=Tracer())
        db(WRITE, [1])
        assert recorder.wait(1)[0].endswith("traced")
        hub.stop()


def test_simulated() -> None:
    """In a simulation they run before emit returns, on a loop of their own or on the test's."""
    hub, seen = Hub(), []

    @hub.on("items")
    async def receive(event: Event) -> None:
        seen.append((event.id, asyncio.get_running_loop()))

    with simulated(["items"], hub=hub) as db:
        db.emit("items", "inserted", id=1)
    assert seen[0][0] == 1

    async def main() -> None:
        with simulated(["items"], hub=hub) as db:
            await asyncio.to_thread(db.emit, "items", "inserted", id=2)
            assert seen[1] == (2, asyncio.get_running_loop())
            with pytest.raises(StateError, match="to_thread"):
                db.emit("items", "inserted", id=3)

    asyncio.run(main())


def test_the_default_hub_has_astop() -> None:
    """astop is a function of the module, safe when nothing was started."""
    assert asyncio.run(pgsignals.astop())


def test_what_is_left_behind_does_not_pass_for_handled() -> None:
    """A call that is dropped raises, since durable delivery acknowledges what returns."""
    coroutines = Coroutines()

    async def receive(event: object) -> None: ...

    with loop_in_a_thread() as loop:
        coroutines.begin(loop)
        assert coroutines.call(receive, None) is None
        coroutines.leave()
        with pytest.raises(LeftBehind, match="astop"):
            coroutines.call(receive, None)
    assert coroutines.dropped == 1


def test_their_names_in_messages() -> None:
    """A wrapped coroutine function goes by its own name, whatever kind of callable it is."""

    class Receiver:
        async def __call__(self, event: object) -> None: ...

    async def named(name: str, event: object) -> None: ...

    prefix = f"{__name__}.test_their_names_in_messages.<locals>"
    for fn, name in ((functools.partial(named, "a"), "named"), (Receiver(), "Receiver")):
        assert receiver_name(CoroutineReceiver(fn, Coroutines())) == f"{prefix}.{name}"


def test_a_cancellation_that_meets_the_end() -> None:
    """Whoever is cancelled at the moment that the work ends is cancelled, and so is the work."""

    async def main() -> None:
        for rounds in range(5):
            work: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            task = asyncio.ensure_future(within(DEADLINE, work))
            # Turns of the loop, at each of which the two may meet.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            work.set_result(1)
            for _ in range(rounds):
                await asyncio.sleep(0)
            cancelled = task.cancel()
            await asyncio.wait({task})
            assert task.cancelled() == cancelled
        ended: list[str] = []

        async def endless() -> None:
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                ended.append("work")

        task = asyncio.ensure_future(within(DEADLINE, endless()))
        # Turns of the loop, in which the work begins.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        assert (task.cancelled(), ended) == (True, ["work"])

    asyncio.run(asyncio.wait_for(main(), DEADLINE))


def test_work_within_a_time() -> None:
    """It returns or raises what the work does, or TimeoutError, once the work has ended."""
    ended: list[str] = []

    async def slow() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended.append("slow")

    async def failing() -> None:
        raise ZeroDivisionError

    async def main() -> None:
        assert await within(DEADLINE, asyncio.sleep(0, "slept")) == "slept"
        with pytest.raises(ZeroDivisionError):
            await within(DEADLINE, failing())
        with pytest.raises(asyncio.TimeoutError):
            await within(0.01, slow())
        assert ended == ["slow"]

    asyncio.run(main())
