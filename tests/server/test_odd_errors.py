"""Errors that are hard to report stop nothing, and a thread that ends all the same is told of."""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NoReturn

import pytest

import pgsignals
from pgsignals import Event, Gap, Hub
from pgsignals.backoff import Backoff
from pgsignals.core.tables import TableRef
from pgsignals.dispatch.batches import Batcher
from pgsignals.dispatch.dispatcher import Dispatcher
from pgsignals.dispatch.forwarder import Forwarder
from pgsignals.dispatch.isolation import Isolation
from pgsignals.dispatch.retries import Retries
from pgsignals.hub.hub import Delivery
from pgsignals.outbox import housekeeping
from pgsignals.sources.notify import NotifySource
from pgsignals.sources.polling import Poller
from tests.conftest import DEADLINE, Database, Recorder
from tests.hub_parts import break_pages, relay_source, tail_source
from tests.odd_errors import ODD, SECRET
from tests.waiting import eventually

KINDS = list(ODD)
CUT = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE application_name = 'pgsignals' AND datname = current_database()"
)


def odd(number: int) -> BaseException:
    """An error, another one for each number."""
    return ODD[KINDS[number % len(KINDS)]]()


@pytest.fixture
def shop(each_db: Database) -> Database:
    """A database with a table."""
    each_db("CREATE TABLE items (id bigserial PRIMARY KEY, name text)")
    return each_db


class Raising(logging.Handler):
    """A handler that is broken."""

    def emit(self, record: logging.LogRecord) -> None:
        raise odd(2)


@pytest.fixture
def broken_log() -> Iterator[None]:
    """A program whose logging is broken."""
    handler = Raising()
    logging.getLogger("pgsignals").addHandler(handler)
    yield
    logging.getLogger("pgsignals").removeHandler(handler)


def options(delivery: Delivery) -> dict[str, Any]:
    """What ``start`` gets."""
    return {"delivery": delivery, "name": None if delivery == "notify" else "mailer"}


def well(hub: Hub) -> bool:
    """Whether nothing has been lost, and nothing is left to do."""
    health, status = hub.health(), hub.status()
    return (health.alive, health.ready, health.reason, health.depth) == (True, True, "", 0) and (
        status.reconnects,
        status.retrying,
        status.unacknowledged,
    ) == (0, 0, 0)


@pytest.mark.usefixtures("broken_log")
@pytest.mark.parametrize("workers", [1, 3])
def test_no_error_of_a_receiver_stops_anything(
    hub: Hub, shop: Database, recorder: Recorder, delivery: Delivery, workers: int
) -> None:
    """Everybody gets every event, each error is signalled, and in outbox delivery a dead letter."""
    count = len(KINDS)
    failed = Recorder()

    retrying: Any = {} if delivery == "notify" else {"retries": 1, "backoff": 0.001}

    @hub.on("items", **retrying)
    def raises(event: Event) -> None:
        raise odd(event.id)

    @hub.on_batch("items", every=0, max_size=1, retries=0)
    def raises_with_a_batch(batch: pgsignals.Batch) -> None:
        raise odd(batch[0].id)

    def raises_for_a_signal(model: object, event: Event) -> NoReturn:
        raise odd(event.id)

    def raises_again(hub: Hub, *, error: BaseException, **_: Any) -> None:
        failed(error)
        raise error

    if delivery == "notify":
        hub.signal("items", "inserted").connect(raises_for_a_signal)
    hub.receiver_failed.connect(raises_again)
    hub.subscribe(recorder, "items")
    hub.start(shop.dsn, ["items"], workers=workers, **options(delivery))
    shop("INSERT INTO items SELECT generate_series(1, %s)", (count,))
    assert {event.id for event in recorder.wait(count)} == set(range(1, count + 1))
    shop("INSERT INTO items VALUES (1000)")
    assert recorder.wait(count + 1)[-1].id == 1000
    failed.wait(3 * (count + 1) if delivery != "notify" else 3 * count)
    eventually(lambda: well(hub), bool)
    if delivery != "notify":
        letters = shop("SELECT receiver, error, traceback FROM pgsignals.dead_letters")
        assert len(letters) == 2 * (count + 1)
        assert all(error and trace for _, error, trace in letters)


def test_no_error_of_a_coroutine_stops_anything(
    shop: Database, recorder: Recorder, delivery: Delivery
) -> None:
    """Its loop goes on, and it counts as an error, even when it is not true."""
    # Ctrl-C ends an event loop, by design.
    kinds = [kind for kind in KINDS if kind != "KeyboardInterrupt"]
    failed = Recorder()

    async def main() -> None:
        hub = Hub()

        @hub.on("items", retries=0)
        async def raises(event: Event) -> None:
            if event.id < len(kinds):
                raise ODD[kinds[event.id]]()

        def note(hub: Hub, event: Event, **_: Any) -> None:
            failed(event.id)

        hub.receiver_failed.connect(note)
        hub.subscribe(recorder, "items")
        async with hub.start(shop.dsn, ["items"], **options(delivery)):
            shop("INSERT INTO items SELECT generate_series(0, %s)", (len(kinds),))
            await asyncio.to_thread(recorder.wait, len(kinds) + 1)
            await asyncio.to_thread(eventually, lambda: well(hub), bool)

    asyncio.run(main())
    assert failed.items == list(range(len(kinds)))
    assert [event.id for event in recorder.items] == list(range(len(kinds) + 1))
    if delivery != "notify":
        assert shop("SELECT count(*) FROM pgsignals.dead_letters") == [(len(kinds),)]


def test_no_error_of_a_gap_receiver_stops_anything(
    hub: Hub, shop: Database, recorder: Recorder
) -> None:
    """Nor one of a receiver of a signal of the Hub: events follow."""
    numbers = itertools.count()

    def raises(*_: Any, **__: Any) -> None:
        raise odd(next(numbers))

    for _ in range(len(KINDS)):
        hub.on_gap(lambda gap: raises())
        hub.gap.connect(lambda hub, gap: raises(), weak=False)
        hub.connected.connect(lambda hub: raises(), weak=False)
        hub.disconnected.connect(lambda hub, error: raises(), weak=False)
    gaps = Recorder()
    hub.on_gap(gaps)
    hub.subscribe(recorder, "items")
    hub.start(shop.dsn, ["items"])
    shop(CUT)
    gaps.wait(1)
    shop("INSERT INTO items DEFAULT VALUES")
    recorder.wait(1)
    assert hub.health().ready


class OddMetrics:
    """Raises whatever it is told."""

    def __init__(self) -> None:
        self._numbers = itertools.count()

    def count(self, name: str, amount: int = 1, /, **labels: str) -> None:
        raise odd(next(self._numbers))

    def gauge(self, name: str, read: Callable[[], float], /, **labels: str) -> None:
        raise odd(next(self._numbers))

    def __repr__(self) -> str:
        raise odd(next(self._numbers))


class OddTracer:
    """Raises now when a span begins, now when it ends, and says that no error is one."""

    def __init__(self) -> None:
        self._numbers = itertools.count()

    def receiving(self, events: Any, receiver: str, /) -> AbstractContextManager[None]:
        number = next(self._numbers)

        @contextmanager
        def span() -> Iterator[None]:
            if number % 3 == 0:
                raise odd(number // 3)
            with_error = True
            try:
                yield
                with_error = False
            except BaseException:
                if number % 3 == 2:
                    return
            finally:
                if number % 3 == 1 or not with_error:
                    raise odd(number // 3)

        return span()

    __repr__ = OddMetrics.__repr__


def test_no_error_of_an_observer_stops_anything(
    hub: Hub, shop: Database, recorder: Recorder, delivery: Delivery
) -> None:
    """Each call of a receiver is made once, and is what it was: its errors are, and no others."""
    count, failed = 3 * len(KINDS), Recorder()

    @hub.on("items", retries=0)
    def raises_now_and_then(event: Event) -> None:
        recorder(event.id)
        if event.id % 2:
            raise LookupError(event.id)

    hub.receiver_failed.connect(
        lambda hub, event, error, **_: failed((event.id, error)), weak=False
    )
    hub.start(shop.dsn, ["items"], metrics=OddMetrics(), tracer=OddTracer(), **options(delivery))
    shop("INSERT INTO items SELECT generate_series(1, %s)", (count,))
    assert recorder.wait(count) == list(range(1, count + 1))
    wrong = list(range(1, count + 1, 2))
    found = failed.wait(len(wrong))
    assert [(number, error.args) for number, error in found] == [(n, (n,)) for n in wrong]
    eventually(lambda: well(hub), bool)
    assert len(recorder.items) == count
    if delivery != "notify":
        assert shop("SELECT count(*) FROM pgsignals.dead_letters") == [(len(wrong),)]


class OddBackend:
    """A broker that raises, by each of its methods in turn, before it takes anything."""

    def __init__(self) -> None:
        self.came = Recorder()
        self.raised = 0

    def __str__(self) -> str:
        return "odd://"

    def _raise(self) -> None:
        if self.raised < 2 * len(KINDS):
            self.raised += 1
            raise odd(self.raised // 2)

    def publish(self, events: Sequence[Event]) -> None:
        self._raise()
        for event in events:
            self.came(event.id)

    def flush(self, timeout: float) -> bool:
        self._raise()
        return True

    def announce(self, gap: Gap) -> None: ...

    def close(self) -> None:
        raise odd(2)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever tries again does so at once."""
    monkeypatch.setattr(Backoff, "next", lambda self: 0.0)


@pytest.mark.usefixtures("at_once", "broken_log")
def test_no_error_of_a_broadcaster_stops_anything(
    hub: Hub, shop: Database, recorder: Recorder, delivery: Delivery
) -> None:
    """It is tried again, whatever it raises, until it takes the events."""
    backend = OddBackend()
    hub.subscribe(recorder, "items")
    hub.start(shop.dsn, ["items"], backends=[backend], **options(delivery))
    shop("INSERT INTO items VALUES (1)")
    assert backend.came.wait(1) == [1]
    [status] = eventually(lambda: hub.health().backends, lambda found: found[0].delivered == 1)
    assert (status.ready, status.error, status.failures) == (True, "", 2 * len(KINDS))
    assert hub.health().ready
    recorder.wait(1)


class Telltale:
    """A broker whose errors have a password in them."""

    def __init__(self) -> None:
        self.asked = Recorder()

    def __str__(self) -> str:
        return f"redis://:{SECRET}@cache"

    def publish(self, events: Sequence[Event]) -> None:
        self.asked("publish")
        try:
            raise LookupError({"password": SECRET})
        except LookupError as cause:
            raise ConnectionError(f"no redis://:{SECRET}@cache") from cause

    def flush(self, timeout: float) -> bool:
        return True

    def announce(self, gap: Gap) -> None: ...

    def close(self) -> None:
        raise ConnectionError(f"no redis://:{SECRET}@cache")


def test_an_error_of_a_broadcaster_tells_no_secret(
    hub: Hub, shop: Database, delivery: Delivery, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither log, nor traceback, nor status, nor anything in a record has its password."""
    caplog.set_level(logging.DEBUG, "pgsignals")
    backend = Telltale()
    hub.start(shop.dsn, ["items"], backends=[backend], **options(delivery))
    shop("INSERT INTO items DEFAULT VALUES")
    backend.asked.wait(1)
    eventually(lambda: hub.health().backends[0], lambda found: found.error != "")
    told = [repr(hub.health()), repr(hub.status())]
    hub.stop(timeout=0.1)
    eventually(lambda: [r for r in caplog.records if "could not be closed" in r.msg], bool)
    told += [f"{record.getMessage()} {vars(record)}" for record in list(caplog.records)]
    assert "redis://:***@cache" in told[0]
    assert all(record.exc_info is None for record in caplog.records)
    assert [text for text in (*told, caplog.text) if SECRET in text] == []


class OddResolver:
    """Knows items, until it raises."""

    name = "odd"

    def __init__(self) -> None:
        self.broken = False
        self.raised = 0

    def resolve(self, model: object) -> TableRef | None:
        if self.broken:
            self.raised += 1
            raise odd(self.raised % 3)
        return TableRef("items") if model is Item else None

    def load(self, model: object, table: object, session: object, ids: object) -> None:
        return None


class Item:
    """A model."""


def test_a_resolver_that_raises_later(hub: Hub, shop: Database, delivery: Delivery) -> None:
    """When the connection is made again, what it said before holds, and events arrive."""
    connected, got = Recorder(), Recorder()
    resolver = OddResolver()
    hub.connected.connect(lambda hub: connected(hub), weak=False)
    hub.subscribe(got, Item)
    hub.start(shop.dsn, [Item], resolvers=[resolver], **options(delivery))
    connected.wait(1)
    resolver.broken = True
    shop(CUT)
    connected.wait(2)
    assert resolver.raised
    shop("INSERT INTO items DEFAULT VALUES")
    got.wait(1)


def test_a_filter_that_raises(
    hub: Hub, shop: Database, recorder: Recorder, delivery: Delivery
) -> None:
    """A value that cannot be compared is nobody's, and the others get their events."""

    class Incomparable(int):
        def __eq__(self, other: object) -> bool:
            raise RuntimeError("compared")

        __hash__ = int.__hash__

    hub.subscribe(recorder, "items", id=Incomparable(1))
    hub.subscribe(recorder, "items")
    hub.start(shop.dsn, ["items"], **options(delivery))
    shop("INSERT INTO items SELECT generate_series(1, 2)")
    assert [event.id for event in recorder.wait(2)] == [1, 2]
    eventually(lambda: well(hub), bool)


def test_a_receiver_without_a_name(hub: Hub, shop: Database, delivery: Delivery) -> None:
    """One whose attributes raise is called as any other, and its error reported."""
    failed = Recorder()

    class Odd:
        def __getattr__(self, name: str) -> NoReturn:
            raise RuntimeError(name)

        def __call__(self, model: object, event: Event) -> NoReturn:
            raise ValueError(event.id)

    receiver = Odd()
    hub.receiver_failed.connect(lambda hub, error, **_: failed(error.args), weak=False)
    hub.start(shop.dsn, ["items"], **options(delivery))
    hub.signal("items", "inserted").connect(receiver, weak=False)
    shop("INSERT INTO items SELECT generate_series(1, 2)")
    assert failed.wait(2) == [(1,), (2,)]
    assert hub.health().ready


# --- threads that end -----------------------------------------------------------------------------


class Fault(SystemExit):
    """What ends a thread."""


def faulty(*_: Any, **__: Any) -> NoReturn:
    """Stands where a fault is."""
    raise Fault


class Quiet:
    """A broker that takes everything."""

    def __str__(self) -> str:
        return "quiet://"

    def publish(self, events: Sequence[Event]) -> None: ...

    def flush(self, timeout: float) -> bool:
        return True

    def announce(self, gap: Gap) -> None: ...

    def close(self) -> None: ...


def ends(hub: Hub, thread: str) -> None:
    """Wait until health says which thread has ended, and that it was no wish of anybody's."""
    health = eventually(hub.health, lambda found: not found.alive)
    assert not health.ready
    assert re.match(f"the thread pgsignals-{thread} has ended by Fault: see", health.reason)


@pytest.mark.threads_die
@pytest.mark.parametrize(
    ("where", "what", "thread"),
    [
        (NotifySource, "_receive", "source"),
        (Dispatcher, "_attempt", "worker-[01]"),
        (Isolation, "_replace", "slow-call-monitor"),
        (Batcher, "flush", "batch(es)?"),
        (Forwarder, "_await_work", "quiet://"),
    ],
)
def test_a_thread_that_ends(
    hub: Hub,
    shop: Database,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    where: type,
    what: str,
    thread: str,
) -> None:
    """Health says so from then on, and names it; the log has where it ended."""
    go_on = threading.Event()
    hub.on_batch("items", every=0)(lambda batch: None)
    hub.subscribe(lambda event: go_on.wait(DEADLINE), "items", id=2)
    hub.subscribe(lambda event: None, "items")
    hub.start(shop.dsn, ["items"], workers=2, backends=[Quiet()])
    eventually(hub.health, lambda found: found.backends[0].ready)
    monkeypatch.setattr(where, what, faulty)
    shop("INSERT INTO items SELECT generate_series(1, 4)")
    try:
        ends(hub, thread)
    finally:
        go_on.set()
    if where is Forwarder:
        assert not hub.health().backends[0].ready
    record, *_ = eventually(
        lambda: [each for each in caplog.records if each.levelno == logging.CRITICAL], bool
    )
    assert "in faulty" in (record.exc_text or "")
    hub.stop(timeout=0.1)


@pytest.mark.threads_die
@pytest.mark.parametrize(
    ("where", "what", "thread"),
    [
        (Poller, "_submit", "source"),
        (Dispatcher, "_attempt", "worker-[01]"),
        (Retries, "_make", "retries"),
        (Batcher, "flush", "batches"),
        (housekeeping, "tidy", "housekeeper"),
        (Forwarder, "_await_work", "quiet://"),
    ],
)
def test_a_thread_of_outbox_delivery_that_ends(
    hub: Hub,
    shop: Database,
    monkeypatch: pytest.MonkeyPatch,
    where: Any,
    what: str,
    thread: str,
) -> None:
    """Health says so from then on, and names it."""
    monkeypatch.setattr(housekeeping, "EVERY_SECONDS", 0.05)

    @hub.on("items", retries=1, backoff=0.01)
    def raises(event: Event) -> None:
        raise LookupError

    hub.on_batch("items", every=0)(lambda batch: None)
    hub.start(shop.dsn, ["items"], backends=[Quiet()], **options("outbox"))
    eventually(hub.health, lambda found: found.backends[0].ready)
    monkeypatch.setattr(where, what, faulty)
    shop("INSERT INTO items DEFAULT VALUES")
    ends(hub, thread)
    if where is Forwarder:
        assert not hub.health().backends[0].ready


@pytest.mark.threads_die
@pytest.mark.parametrize("where", ["tail", "relay"])
def test_a_source_that_ends_beside_the_hubs_own(hub: Hub, shop: Database, where: str) -> None:
    """The one that reads for browsers, or for a broker, is told of too."""
    hub.subscribe(lambda event: None, "items")
    hub.start(shop.dsn, ["items"], backends=[Quiet()], **options("outbox"))
    break_pages(tail_source(hub) if where == "tail" else relay_source(hub), faulty)
    shop("INSERT INTO items DEFAULT VALUES")
    ends(hub, "source")


def test_a_loop_that_does_not_run(hub: Hub, shop: Database, delivery: Delivery) -> None:
    """While a worker waits for a coroutine there, the Hub is not ready, and says why."""
    loop = asyncio.new_event_loop()
    done = Recorder()

    @hub.on("items")
    async def receive(event: Event) -> None:
        done(event.id)

    hub.start(shop.dsn, ["items"], loop=loop, **options(delivery))
    shop("INSERT INTO items DEFAULT VALUES")
    health = eventually(hub.health, lambda found: not found.ready)
    assert (health.alive, health.connected) == (True, True)
    assert health.reason == "the event loop of the coroutine receivers does not run"
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    assert done.wait(1) == [1]
    eventually(lambda: well(hub), bool)
    hub.stop()
    loop.call_soon_threadsafe(loop.stop)
    thread.join(DEADLINE)
    loop.close()
