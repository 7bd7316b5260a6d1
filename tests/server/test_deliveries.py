"""What holds of every delivery: by notifications, from the outbox, and from any other log.

The third one here is a list in memory, which the whole of durable delivery reads.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import pgsignals
from pgsignals.errors import ConfigurationError
from pgsignals.hub.setup import OutboxSetup
from pgsignals.postgres.session import Session
from tests.broadcasters import Broker
from tests.conftest import DEADLINE, Database, Recorder
from tests.memory_log import Entries, MemoryProvider
from tests.waiting import eventually


class Writer(ABC):
    """What a test writes to, rows of ``items``, for Hubs of one delivery."""

    delivery: Any
    durable = True

    def __init__(self, db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        self.db = db

    @abstractmethod
    def write(self, *numbers: int) -> None:
        """Insert rows of these keys by one statement."""

    def start(self, hub: pgsignals.Hub, **options: Any) -> None:
        """Start a Hub that hears of them, with a consumer's name where there are some."""
        if self.durable:
            options.setdefault("name", "mailer")
        hub.start(self.db.dsn, [("items", "inserted")], delivery=self.delivery, **options)

    def disconnect(self) -> None:
        """End the sessions that Hubs read in."""
        self.db(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )


class Notifications(Writer):
    """Triggers that notify."""

    delivery = "notify"
    durable = False

    def write(self, *numbers: int) -> None:
        self.db("INSERT INTO items SELECT unnest(%s)", ([*numbers],))


class DurableWriter(Writer):
    """A delivery whose events wait for their consumer; ``divisible``, in partitions of it."""

    delivery = "outbox"
    divisible = True

    @abstractmethod
    def shed(self) -> None:
        """Have a writer leave a message out."""


class Outbox(DurableWriter):
    """Triggers that write to the outbox."""

    def write(self, *numbers: int) -> None:
        self.db("INSERT INTO items SELECT unnest(%s)", ([*numbers],))

    def shed(self) -> None:
        self.db("SELECT nextval('pgsignals.outbox_shed')")


class Wal(Outbox):
    """Triggers that write messages into the server's own log."""

    delivery = "wal"
    divisible = False


class List(DurableWriter):
    """A list in memory, in place of the outbox."""

    def __init__(self, db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(db, monkeypatch)
        self.entries = Entries()
        provider = MemoryProvider(self.entries)
        monkeypatch.setattr(OutboxSetup, "log", lambda setup, *of: provider.log(*of))
        monkeypatch.setattr(OutboxSetup, "decoder", lambda setup, hooks: provider.decoder(hooks))

    def write(self, *numbers: int) -> None:
        self.entries.write(*numbers)

    def shed(self) -> None:
        self.entries.shed += 1


DURABLE = {"outbox": Outbox, "wal": Wal, "list": List}
DELIVERIES = {"notify": Notifications, **DURABLE}


def made(
    kind: type[Writer], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Writer:
    db = request.getfixturevalue("db")
    db("CREATE TABLE items (id bigint PRIMARY KEY)")
    return kind(db, monkeypatch)


@pytest.fixture(params=DELIVERIES.values(), ids=list(DELIVERIES))
def writer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Writer:
    """Each delivery in turn."""
    return made(request.param, request, monkeypatch)


@pytest.fixture(params=DURABLE.values(), ids=list(DURABLE))
def durable(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> DurableWriter:
    """Each delivery whose events wait for their consumer."""
    found = made(request.param, request, monkeypatch)
    assert isinstance(found, DurableWriter)
    return found


@pytest.fixture
def another(hub: pgsignals.Hub) -> Iterator[Callable[[], pgsignals.Hub]]:
    """Makes further Hubs, as other processes have."""
    made: list[pgsignals.Hub] = []

    def make() -> pgsignals.Hub:
        made.append(pgsignals.Hub())
        return made[-1]

    yield make
    for each in made:
        each.stop()


def ids(recorder: Recorder, count: int) -> list[Any]:
    """The keys of the first events."""
    return [event.id for event in recorder.wait(count)]


def test_all_arrives_in_order(hub: pgsignals.Hub, writer: Writer, recorder: Recorder) -> None:
    """Each row comes once, in the order in which it was written, with what it is and when."""
    hub.subscribe(recorder, "items")
    writer.start(hub)
    writer.write(3, 1, 2)
    for number in range(4, 500):
        writer.write(number)
    assert ids(recorder, 499) == [3, 1, 2, *range(4, 500)]
    assert {event.op for event in recorder.items} == {"inserted"}
    assert len({event.uid for event in recorder.items}) == 499
    times = [event.at for event in recorder.items]
    assert times == sorted(times)
    assert not any(event.redelivered for event in recorder.items)


def test_who_fails_keeps_nobody(hub: pgsignals.Hub, writer: Writer, recorder: Recorder) -> None:
    """Other receivers, and later events, come whatever one receiver raises."""

    @hub.on("items", "inserted", retries=0)
    def fails(event: pgsignals.Event) -> None:
        raise ValueError(f"not {event.id}")

    hub.subscribe(recorder, "items")
    writer.start(hub)
    writer.write(1)
    writer.write(2, 3)
    assert ids(recorder, 3) == [1, 2, 3]
    assert hub.health().ready


def test_batches(hub: pgsignals.Hub, writer: Writer, recorder: Recorder) -> None:
    """A receiver of batches gets all events, in order, as many at once as it wants at most."""

    @hub.on_batch("items", "inserted", max_size=10, every=0.05)
    def receive(batch: pgsignals.Batch) -> None:
        recorder([event.id for event in batch.events])

    writer.start(hub)
    writer.write(*range(1, 26))
    batches = recorder.wait_until(lambda batch: batch[-1] == 25)
    assert [number for batch in batches for number in batch] == [*range(1, 26)]
    assert max(map(len, batches)) <= 10


def test_several_workers(hub: pgsignals.Hub, writer: Writer, recorder: Recorder) -> None:
    """With several workers each event still comes once."""
    hub.subscribe(recorder, "items")
    writer.start(hub, workers=4)
    writer.write(*range(1, 1001))
    assert sorted(ids(recorder, 1000)) == [*range(1, 1001)]


def test_stopping_handles_what_was_read(
    hub: pgsignals.Hub, writer: Writer, recorder: Recorder
) -> None:
    """What is under way when the Hub is stopped is handled, and stop() says so."""
    entered, gate = threading.Event(), threading.Event()

    @hub.on("items", "inserted")
    def receive(event: pgsignals.Event) -> None:
        entered.set()
        assert gate.wait(DEADLINE)
        recorder(event)

    writer.start(hub)
    writer.write(1)
    assert entered.wait(DEADLINE)
    stopping = threading.Thread(target=lambda: recorder(hub.stop(DEADLINE)))
    stopping.start()
    gate.set()
    stopping.join(DEADLINE)
    [event, drained] = recorder.wait(2)
    assert (event.id, drained) == (1, True)
    assert not hub.running


def test_a_lost_connection(hub: pgsignals.Hub, writer: Writer, recorder: Recorder) -> None:
    """It is connected again, and what may be missing is a Gap; where events wait, nothing is."""
    hub.subscribe(recorder, "items")
    hub.on_gap(recorder)
    writer.start(hub)
    writer.write(1)
    recorder.wait(1)
    writer.disconnect()
    eventually(lambda: hub.status().reconnects, lambda count: count == 1)
    eventually(lambda: hub.health().ready, bool)
    writer.write(2)
    found = recorder.wait_until(lambda each: getattr(each, "id", None) == 2)
    gaps = [each.reason for each in found if isinstance(each, pgsignals.Gap)]
    assert gaps == ([] if writer.durable else ["reconnected"])
    assert [each.id for each in found if not isinstance(each, pgsignals.Gap)][-1] == 2


def test_brokers_get_all(hub: pgsignals.Hub, writer: Writer, recorder: Recorder) -> None:
    """A backend gets what receivers get, in the same order."""
    broker = Broker()
    hub.subscribe(recorder, "items")
    writer.start(hub, backends=[broker])
    writer.write(1, 2, 3)
    writer.write(4)
    assert ids(recorder, 4) == [1, 2, 3, 4]
    assert ids(broker.acknowledged, 4) == [1, 2, 3, 4]


def test_waiting_for_an_event(hub: pgsignals.Hub, writer: Writer) -> None:
    """A program can wait for one event, and has it once it came."""
    writer.start(hub)
    written = threading.Thread(target=lambda: writer.write(1, 2))
    with hub.stream("items") as stream:
        written.start()
        assert [next(stream).id, next(stream).id] == [1, 2]
    written.join(DEADLINE)


def test_it_goes_on_where_it_was(
    hub: pgsignals.Hub,
    durable: DurableWriter,
    recorder: Recorder,
    another: Callable[[], pgsignals.Hub],
) -> None:
    """What is written while no process of the name runs comes when one does, once."""
    hub.subscribe(recorder, "items")
    durable.start(hub)
    durable.write(1)
    recorder.wait(1)
    assert hub.stop()
    durable.write(2, 3)
    later, received = another(), Recorder()
    later.subscribe(received, "items")
    durable.start(later)
    durable.write(4)
    assert ids(received, 3) == [2, 3, 4]
    assert ids(recorder, 1) == [1]


def test_one_of_two_processes_reads(
    hub: pgsignals.Hub,
    durable: DurableWriter,
    recorder: Recorder,
    another: Callable[[], pgsignals.Hub],
) -> None:
    """Of two processes with one name one gets the events, and the other those after its end."""
    standby, received = another(), Recorder()
    hub.subscribe(recorder, "items")
    standby.subscribe(received, "items")
    durable.start(hub)
    durable.start(standby)
    durable.write(1, 2)
    assert ids(recorder, 2) == [1, 2]
    assert not standby.status().active
    assert hub.stop()
    durable.write(3)
    assert ids(received, 1) == [3]
    assert standby.status().active


def test_partitions_share_the_records(
    hub: pgsignals.Hub,
    durable: DurableWriter,
    recorder: Recorder,
    another: Callable[[], pgsignals.Hub],
) -> None:
    """Two processes that share a consumer's partitions get each record once between them.

    A log that has no partitions refuses them, and names the way.
    """
    other, received = another(), Recorder()
    hub.subscribe(recorder, "items")
    other.subscribe(received, "items")
    if not durable.divisible:
        with pytest.raises(ConfigurationError, match="backends="):
            durable.start(hub, partitions=4)
        return
    durable.start(hub, partitions=4)
    durable.start(other, partitions=4)
    eventually(lambda: other.status().active, bool)
    durable.write(*range(1, 101))
    everything = set(range(1, 101))
    eventually(
        lambda: {event.id for each in (recorder, received) for event in [*each.items]},
        lambda found: found == everything,
    )
    # A partition that changes hands on a slow machine may bring what it had under way once more.
    new = [each.id for each in [*recorder.items, *received.items] if not each.redelivered]
    assert len(new) == len(set(new))


def test_an_idle_consumer_rests(
    hub: pgsignals.Hub, durable: DurableWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing is written it waits in each turn, also when its claim is due to be renewed."""
    turns, wait = Recorder(), Session.wait

    def counted(self: Session, timeout: float | None) -> bool:
        turns(timeout)
        return wait(self, timeout)

    durable.start(hub, lease=1.0)

    def beat() -> int:
        [(number,)] = durable.db("SELECT beat FROM pgsignals.consumers")
        return int(number)

    first = eventually(beat, lambda number: number > 3)
    monkeypatch.setattr(Session, "wait", counted)
    eventually(beat, lambda number: number >= first + 8)
    assert sum(seconds < 0.001 for seconds in turns.items) < 50


def test_a_dead_letter(hub: pgsignals.Hub, durable: DurableWriter, recorder: Recorder) -> None:
    """What a receiver cannot take is kept, and comes again when somebody asks for it."""
    broken = threading.Event()
    broken.set()

    @hub.on("items", "inserted", retries=1, backoff=0.01)
    def receive(event: pgsignals.Event) -> None:
        if event.id == 2 and broken.is_set():
            raise ValueError("poison")
        recorder(event)

    durable.start(hub)
    durable.write(1, 2, 3)
    assert ids(recorder, 2) == [1, 3]
    kept = "SELECT attempts, error FROM pgsignals.dead_letters"
    eventually(lambda: durable.db(kept), lambda rows: rows == [(2, "ValueError: poison")])
    broken.clear()
    durable.db("UPDATE pgsignals.dead_letters SET retry = true")
    durable.db("NOTIFY pgsignals_wake, 'redeliver'")
    [_, _, event] = recorder.wait(3)
    assert (event.id, event.redelivered) == (2, True)
    eventually(lambda: durable.db(kept), lambda rows: rows == [])


def test_what_writers_left_out(
    hub: pgsignals.Hub, durable: DurableWriter, recorder: Recorder
) -> None:
    """What could not be written is a Gap, in its place among the events."""
    hub.subscribe(recorder, "items")
    hub.on_gap(recorder)
    durable.start(hub)
    durable.write(1)
    recorder.wait(1)
    durable.shed()
    found = recorder.wait_until(lambda each: isinstance(each, pgsignals.Gap))
    assert [getattr(each, "id", each) for each in found[:-1]] == [1]
    assert found[-1].reason == "retention"
    durable.write(2)
    last = recorder.wait_until(lambda each: getattr(each, "id", None) == 2)[-1]
    assert last.id == 2


def test_a_broker_that_is_away(
    hub: pgsignals.Hub, durable: DurableWriter, another: Callable[[], pgsignals.Hub]
) -> None:
    """What a backend has not acknowledged waits for it, also over the end of the process."""
    broker = Broker()
    broker.away.set()
    durable.start(hub, backends=[broker], workers=0)
    durable.write(1, 2)
    assert broker.refused.wait(DEADLINE)
    hub.stop(1.0)
    back = Broker()
    durable.start(another(), backends=[back], workers=0)
    durable.write(3)
    assert ids(back.acknowledged, 3) == [1, 2, 3]


def test_a_backfill(hub: pgsignals.Hub, durable: DurableWriter, recorder: Recorder) -> None:
    """The rows that a table has come as snapshots, beside what is written meanwhile."""
    durable.db("INSERT INTO items SELECT generate_series(1, 30)")
    hub.subscribe(recorder, "items", "snapshot")
    durable.start(hub)
    durable.write(31)
    backfill = hub.backfill("items", chunk=10)
    assert backfill.wait(DEADLINE)
    snapshots = {event.id for event in recorder.wait(30) if event.op == "snapshot"}
    assert set(range(1, 31)) <= snapshots
