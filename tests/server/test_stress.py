"""Receivers that do what they should not, and threads that race: nobody else is hurt."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pgsignals import Gap, Hub, StateError, WaitTimeout
from tests.conftest import DEADLINE, Database, Recorder
from tests.waiting import eventually

KILL = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE application_name = 'pgsignals' AND datname = current_database()"
)
SECONDS = 8.0
THREADS = 8


@pytest.fixture(autouse=True)
def items(db: Database) -> None:
    """A table."""
    db("CREATE TABLE items (id bigserial PRIMARY KEY, name text)")


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Fails a test that leaves one of our threads or a descriptor behind."""
    descriptors = len(os.listdir("/proc/self/fd"))
    yield
    eventually(_threads, lambda names: not names)
    eventually(lambda: len(os.listdir("/proc/self/fd")), lambda count: count <= descriptors)


def _threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("pgsignals-")]


class Trigger:
    """Something that makes a Hub call ``misbehave`` in one of its threads."""

    @staticmethod
    def event(hub: Hub, db: Database, misbehave: Callable[[], object]) -> None:
        """A receiver of events."""
        hub.subscribe(lambda event: misbehave(), "items")
        db("INSERT INTO items SELECT FROM generate_series(1, 20)")

    @staticmethod
    def batch(hub: Hub, db: Database, misbehave: Callable[[], object]) -> None:
        """A receiver of batches."""
        hub.on_batch("items", every=0)(lambda batch: misbehave())
        db("INSERT INTO items SELECT FROM generate_series(1, 20)")

    @staticmethod
    def gap(hub: Hub, db: Database, misbehave: Callable[[], object]) -> None:
        """A receiver of Gaps."""
        hub.on_gap(lambda gap: misbehave())
        db(KILL)

    @staticmethod
    def connected(hub: Hub, db: Database, misbehave: Callable[[], object]) -> None:
        """A receiver of the signal that the connection is there."""
        hub.connected.connect(lambda hub: misbehave(), weak=False)
        db(KILL)

    @staticmethod
    def disconnected(hub: Hub, db: Database, misbehave: Callable[[], object]) -> None:
        """A receiver of the signal that the connection is lost."""
        hub.disconnected.connect(lambda hub, error: misbehave(), weak=False)
        db(KILL)

    @staticmethod
    def failure(hub: Hub, db: Database, misbehave: Callable[[], object]) -> None:
        """A receiver of other receivers' failures."""
        hub.subscribe(lambda event: 1 / 0, "items")
        hub.receiver_failed.connect(lambda hub, **failure: misbehave(), weak=False)
        db("INSERT INTO items SELECT FROM generate_series(1, 20)")


KINDS = ("event", "batch", "gap", "connected", "disconnected", "failure")
everywhere = pytest.mark.parametrize("kind", KINDS)
with_workers = pytest.mark.parametrize("workers", [1, 4])


@everywhere
@with_workers
def test_any_receiver_may_stop_the_hub(
    kind: str, workers: int, hub: Hub, dsn: str, db: Database
) -> None:
    """stop() returns wherever it is called, without waiting for itself."""
    outcome = Recorder()

    def stop() -> None:
        began = time.monotonic()
        hub.stop(DEADLINE)
        outcome(time.monotonic() - began)

    hub.start(dsn, ["items"], workers=workers)
    getattr(Trigger, kind)(hub, db, stop)
    assert outcome.wait(1)[0] < DEADLINE / 2
    assert hub.wait(DEADLINE)
    assert not hub.running


@everywhere
def test_any_receiver_may_restart_the_hub(kind: str, hub: Hub, dsn: str, db: Database) -> None:
    """A Hub that one of its receivers stops and starts goes on, once."""
    done = threading.Event()

    def restart() -> None:
        if not done.is_set():
            hub.stop(DEADLINE)
            hub.start(dsn, ["items"])
            done.set()

    hub.start(dsn, ["items"])
    getattr(Trigger, kind)(hub, db, restart)
    assert done.wait(DEADLINE)
    _assert_delivers(hub, db)
    assert hub.stop()


@everywhere
def test_start_in_a_receiver_is_refused(kind: str, hub: Hub, dsn: str, db: Database) -> None:
    """A running Hub cannot be started by its receivers either, and goes on running."""
    refused = Recorder()

    def start() -> None:
        try:
            hub.start(dsn, ["items"])
        except StateError as error:
            refused(error)

    hub.start(dsn, ["items"])
    getattr(Trigger, kind)(hub, db, start)
    assert "running already" in str(refused.wait(1)[0])
    _assert_delivers(hub, db)


def test_start_waits_for_no_stop(hub: Hub, dsn: str, db: Database) -> None:
    """While receivers handle what had arrived at stop(), start() is refused with what to do."""
    entered, stopping, refused = threading.Event(), threading.Event(), Recorder()

    @hub.on("items")
    def start(event: Any) -> None:
        entered.set()
        stopping.wait(DEADLINE)
        with pytest.raises(StateError) as caught:
            hub.start(dsn, ["items"])
        refused(str(caught.value))

    hub.start(dsn, ["items"])
    db("INSERT INTO items DEFAULT VALUES")
    assert entered.wait(DEADLINE)
    stopper = threading.Thread(target=hub.stop)
    stopper.start()
    eventually(lambda: hub.running, lambda running: not running)
    stopping.set()
    assert "being stopped" in refused.wait(1)[0]
    stopper.join(DEADLINE)
    assert hub.wait(DEADLINE)
    hub.start(dsn, ["items"])


@everywhere
@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt, GeneratorExit])
def test_whatever_a_receiver_raises_stops_nobody(
    kind: str,
    error: type[BaseException],
    hub: Hub,
    dsn: str,
    db: Database,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Errors of every kind and in every kind of receiver are logged, and events go on coming."""
    raised = Recorder()

    def misbehave() -> None:
        raised("once")
        raise error("a mistake")

    hub.start(dsn, ["items"])
    getattr(Trigger, kind)(hub, db, misbehave)
    raised.wait(1)
    _assert_delivers(hub, db)
    hub.stop()
    assert "a mistake" in caplog.text


@with_workers
def test_subscribing_in_a_receiver(workers: int, hub: Hub, dsn: str, db: Database) -> None:
    """A receiver may subscribe others, which get what comes after, and cancel any of them."""
    seen, first = Recorder(), Recorder()
    subscriptions: list[Any] = []

    def nest(event: Any) -> None:
        first(event)
        if event.id == 1:
            subscriptions.append(hub.subscribe(seen, "items"))
            subscriptions.append(hub.subscribe(seen, "items", id=3))
            hub.on_gap(lambda gap: None)
            with hub.stream("items"):
                pass
        if event.id == 3:
            for subscription in subscriptions:
                subscription.cancel()

    hub.start(dsn, ["items"], workers=workers)
    hub.subscribe(nest, "items")
    for number in range(1, 5):
        db("INSERT INTO items (id) VALUES (%s)", (number,))
        first.wait(number)
    ids = [event.id for event in seen.items]
    assert 2 in ids
    assert 4 not in ids


def test_waiting_in_a_receiver(hub: Hub, dsn: str, db: Database) -> None:
    """A receiver that waits for what its own worker would deliver waits for its timeout only."""
    outcome, seen = Recorder(), Recorder()

    @hub.on("items", id=1)
    def wait(event: Any) -> None:
        with contextlib.suppress(WaitTimeout):
            hub.wait_for("items", id=2, timeout=0.2)
        outcome("over")

    hub.subscribe(seen, "items", id=2)
    hub.start(dsn, ["items"])
    db("INSERT INTO items (id) VALUES (1), (2)")
    outcome.wait(1)
    seen.wait(1)


@with_workers
def test_a_receiver_that_blocks_for_ever(workers: int, dsn: str, db: Database) -> None:
    """stop() gives up on it, says so, and a new Hub is not hindered by it."""
    blocked, release, seen = threading.Event(), threading.Event(), Recorder()
    hub = Hub()

    @hub.on("items", "inserted")
    def block(event: Any) -> None:
        blocked.set()
        release.wait(2 * DEADLINE)

    hub.start(dsn, ["items"], workers=workers)
    db("INSERT INTO items DEFAULT VALUES")
    assert blocked.wait(DEADLINE)
    assert not hub.stop(timeout=0.1)
    with Hub().start(dsn, ["items"], workers=workers) as other:
        other.subscribe(seen, "items")
        db("INSERT INTO items DEFAULT VALUES")
        assert seen.wait(1)[0].id == 2
    release.set()


def test_threads_that_race(dsn: str, db: Database) -> None:
    """Eight threads use one Hub and Hubs of their own in every way while rows are written.

    None of them waits for ever or fails, and what is shared still delivers.
    """
    shared = Hub().start(dsn, ["items"], workers=4)
    end = time.monotonic() + SECONDS
    errors, counts = Recorder(), Recorder()

    def write() -> None:
        writer = Database(dsn)
        while time.monotonic() < end:
            writer("INSERT INTO items SELECT FROM generate_series(1, 20)")
            writer("UPDATE items SET name = 'b' WHERE id % 50 = 0 AND name IS NULL")
        writer.connection.close()

    def kill() -> None:
        killer = Database(dsn)
        while time.monotonic() < end:
            # Those that listen already: a start whose session is killed fails, as it should.
            killer(KILL + " AND state = 'idle' AND query LIKE '%md5%'")
            counts("kill")
            # The pace of the losses is the test's own: in between there is time to be connected.
            time.sleep(1.0)
        killer.connection.close()

    def race(seed: int) -> None:
        choose = random.Random(seed)
        while time.monotonic() < end:
            action = choose.choice(ACTIONS)
            action(shared, dsn, choose)
            counts(action.__name__)

    def guarded(work: Callable[..., None], *arguments: Any) -> None:
        try:
            work(*arguments)
        except BaseException as error:
            errors(error)
            raise

    threads = [
        threading.Thread(target=guarded, args=(race, seed), name=f"race-{seed}")
        for seed in range(THREADS)
    ]
    threads += [threading.Thread(target=guarded, args=(work,)) for work in (write, kill)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, end + 2 * DEADLINE - time.monotonic()))
    stuck = [thread.name for thread in threads if thread.is_alive()]
    if stuck:
        faulthandler.dump_traceback(file=sys.__stderr__)
    assert stuck == []
    assert [repr(error) for error in errors.items] == []
    assert {action.__name__ for action in ACTIONS} <= set(counts.items)

    if not shared.running:
        shared.start(dsn, ["items"], workers=4)
    _assert_delivers(shared, db)
    assert shared.stop(DEADLINE)


def subscribe(hub: Hub, dsn: str, choose: random.Random) -> None:
    """Subscriptions of all kinds, and their ends."""
    made = [
        hub.subscribe(lambda event: event.uid, "items"),
        hub.subscribe(lambda event: event.uid, "items", "updated", id=choose.randrange(100)),
    ]
    choose.shuffle(made)
    for subscription in made:
        subscription.cancel()


def nest(hub: Hub, dsn: str, choose: random.Random) -> None:
    """A receiver that cancels itself and subscribes others."""

    def receive(event: Any) -> None:
        mine.cancel()
        hub.subscribe(lambda event: None, "items").cancel()

    mine = hub.subscribe(receive, "items", id=choose.randrange(1, 100))
    mine.cancel()


def signal(hub: Hub, dsn: str, choose: random.Random) -> None:
    """blinker's own way to connect and disconnect."""

    def receive(sender: Any, event: Any) -> None: ...

    hub.signal("items", "inserted").connect(receive)
    hub.signal("items", "inserted").disconnect(receive)


def stream(hub: Hub, dsn: str, choose: random.Random) -> None:
    """A stream that is read a little, and one that is forgotten."""
    hub.stream("items", maxsize=5)
    with hub.stream("items", maxsize=5, gaps=True) as events:
        for _ in range(choose.randrange(3)):
            item = events.get(0.05)
            assert item is None or isinstance(item, Gap) or item.uid


def wait(hub: Hub, dsn: str, choose: random.Random) -> None:
    """Waiting for an event, in vain or not, of a Hub that may be stopped at any time."""
    with contextlib.suppress(WaitTimeout, StateError):
        hub.wait_for("items", timeout=0.02)


def status(hub: Hub, dsn: str, choose: random.Random) -> None:
    """Looking at a Hub that may be stopped at any time."""
    with contextlib.suppress(StateError):
        assert hub.status().depth >= 0


def own_hub(hub: Hub, dsn: str, choose: random.Random) -> None:
    """A Hub from start to stop."""
    with Hub().start(dsn, ["items"], workers=choose.choice([1, 3])) as own:
        own.on("items")(lambda event: event.values)
        own.on_batch("items", every=0.01)(lambda batch: batch.ids)
        with contextlib.suppress(WaitTimeout):
            own.wait_for("items", timeout=0.05)


def restart(hub: Hub, dsn: str, choose: random.Random) -> None:
    """Stopping and starting the Hub that the others use."""
    if choose.random() < 0.3:
        hub.stop(DEADLINE)
    with contextlib.suppress(StateError):
        hub.start(dsn, ["items"], workers=choose.choice([1, 4]))


ACTIONS = (subscribe, nest, signal, stream, wait, status, own_hub, restart)


def _assert_delivers(hub: Hub, db: Database) -> None:
    """Sooner or later an event arrives; some may be lost, with a Gap, with a killed session."""
    seen = Recorder()
    hub.subscribe(seen, "items", "inserted")
    eventually(lambda: db("INSERT INTO items DEFAULT VALUES") or seen.items, bool)
