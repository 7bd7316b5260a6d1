"""What holds of a consumer whatever the log is that it reads: of the outbox, and of a mere list."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from typing import Any

import pytest

from pgsignals.consumers import dead_letters
from pgsignals.consumers.acks import Partition
from pgsignals.consumers.backfills.chunks import snapshot_topics
from pgsignals.consumers.backfills.requests import Backfill, request
from pgsignals.consumers.backfills.runner import Backfilling
from pgsignals.consumers.claims import Claims, Consumer
from pgsignals.consumers.consumer_store import Channels, Progress
from pgsignals.consumers.dead_letters import DeadLetter, DeadLetters, Undeliverable
from pgsignals.consumers.pages import LogPage
from pgsignals.consumers.parking import Parking
from pgsignals.consumers.parking_store import kept_as
from pgsignals.core.events import Event, Gap, Message
from pgsignals.core.transport import Transport
from pgsignals.core.watchers import normalize
from pgsignals.dispatch.durable_in_process import DurableInProcess, Failed
from pgsignals.dispatch.held_events import Held, Ledger
from pgsignals.dispatch.registry import Registry, Retrying
from pgsignals.metrics import Meter
from pgsignals.outbox.log import OutboxLog
from pgsignals.outbox.schema import install_schema
from pgsignals.postgres.connection import make_cast
from pgsignals.postgres.session import Session
from pgsignals.postgres.waiter import Waiter
from pgsignals.resolvers import BUILTIN
from pgsignals.triggers.definitions import define
from pgsignals.triggers.installer import install
from tests.conftest import DEADLINE, Database
from tests.memory_log import Entries, KeptDecoder, MemoryLog
from tests.waiting import eventually

CHANNEL = 7


class Written(ABC):
    """A log that a test writes to, of rows of ``items``."""

    def __init__(self, db: Database) -> None:
        self.db = db
        with db.connection.cursor() as cursor:
            install_schema(cursor)
            self.definitions = define(
                cursor, normalize(["items"]), BUILTIN, "default", Transport.OUTBOX
            )
        [self.definition] = [each for each in self.definitions if each.topic.op == "inserted"]
        self.cast = make_cast(db.connection)
        self.decoder: Any = self.definition.decoder(self.cast)

    @abstractmethod
    def write(self, number: int) -> None:
        """Write a message of one event, of this key."""

    @abstractmethod
    def shed(self) -> None:
        """Leave one out."""

    @abstractmethod
    def open(self, session: Session, holder: str) -> Any:
        """The log as a process sees it."""

    @abstractmethod
    def payload(self, row: Any) -> str:
        """The payload of what was read."""


class WrittenOutbox(Written):
    """The outbox, which triggers write to."""

    def __init__(self, db: Database) -> None:
        super().__init__(db)
        with db.connection.cursor() as cursor:
            install(cursor, "default", [each.trigger for each in self.definitions])

    def write(self, number: int) -> None:
        self.db("INSERT INTO items VALUES (%s)", (number,))

    def shed(self) -> None:
        self.db("SELECT nextval('pgsignals.outbox_shed')")

    def open(self, session: Session, holder: str) -> OutboxLog:
        log = OutboxLog(session, "mailer", holder, 30.0)
        log.open()
        return log

    def payload(self, row: Any) -> str:
        return str(row.payload)


class WrittenList(Written):
    """A list in memory: the database has nothing of it."""

    def __init__(self, db: Database) -> None:
        super().__init__(db)
        self.entries = Entries()
        self.decoder = KeptDecoder(self.decoder)

    def write(self, number: int) -> None:
        self.entries.write(number)

    def shed(self) -> None:
        self.entries.shed += 1

    def open(self, session: Session, holder: str) -> MemoryLog:
        return MemoryLog(self.entries, session, "mailer", holder, 30.0)

    def payload(self, row: str) -> str:
        return row


class Process:
    """A process that reads the log, as far and as often as the test has it."""

    def __init__(
        self, written: Written, holder: str, receive: Callable[[Event], None], epoch: str
    ) -> None:
        self.written = written
        self.gaps: list[Gap] = []
        self._waiter = Waiter()
        self._session = Session(written.db.dsn, self._waiter, lambda: False)
        self._session.open(DEADLINE)
        self._session.keep(DEADLINE)
        [(self._backend,)] = self._session.execute("SELECT pg_backend_pid()", timeout=DEADLINE)
        self.log = written.open(self._session, holder)
        self.registry = Registry()
        topics = [each.topic for each in snapshot_topics(written.definitions)]
        self.registry.bind([written.definition.topic, *topics])
        self.receiver = self.registry.subscribe(
            receive, "items", ("inserted", "snapshot"), {}, "receive", retrying=Retrying(0)
        )
        # It goes on, so that others may be parked.
        self.registry.subscribe(lambda event: None, "items", (), {}, "quick")
        self.ledger = Ledger(self.registry, most=1)
        self.receivers = DurableInProcess(
            self.registry, lambda *_: None, self._keep_dead_letter, ledger=self.ledger
        )
        self.dead_letters = DeadLetters(Meter(), self._waiter.wake)
        self.parking = Parking(self.ledger, self._feed, lambda: False, lambda gap, told: told())
        self.backfilling = Backfilling(lambda topic: True)
        self.claims = Claims(Consumer("mailer"), "mailer", self._tell, self.now, self._begun)
        self.dead_letters.open(self.log.consumer)
        self.parking.open(self.claims, self.log.consumer, lambda event: CHANNEL, self._decoders)
        snapshots = [each.decoder(written.cast) for each in snapshot_topics(written.definitions)]
        self.backfilling.begin(self.log.consumer, snapshots, 60.0)
        self.claims.enrol(self.log, epoch, Channels((CHANNEL,), 0, ()))
        self.claims.claim()

    def now(self) -> datetime:
        return datetime.now(timezone.utc)

    @property
    def parts(self) -> Sequence[Partition]:
        return list(self.claims.parts.values())

    def _decoders(self) -> dict[int, Any]:
        return {CHANNEL: self.written.decoder}

    def _tell(self, gap: Gap, page: LogPage) -> None:
        self.gaps.append(gap)
        page.acknowledge()

    def _begun(self, part: Partition) -> None:
        self.parking.begun(part)

    def _keep_dead_letter(self, failed: Failed, kept: Callable[[], None]) -> None:
        event = kept_as(failed.event, failed.receiver, CHANNEL)
        self.dead_letters.add(Undeliverable(*event, str(failed.error), "", failed.tries), kept)

    def _feed(self, receiver: Any, events: Sequence[tuple[Event, Held]]) -> bool:
        for event, held in events:
            self.receivers.call(receiver, event, held)
        return True

    def read(self) -> None:
        """Deliver what there is by now; nothing is acknowledged."""
        for part in self.parts:
            poll = self.log.poll()
            self.claims.note_shed(part, poll.shed)
            while True:
                if part.reader.at_end:
                    self.backfilling.take(part)
                if not self.backfilling.holds(part):
                    part.reader.read_to(poll.watermark)
                if part.reader.at_end and not self.backfilling.holds(part):
                    return
                while not part.reader.at_end:
                    self._read_page(part)
                if self.backfilling.holds(part):
                    message, progress = self.backfilling.give(part)
                    self._submit(part, [message] if message else [], part.reader.position, progress)

    def _read_page(self, part: Partition) -> None:
        rows = part.reader.read()
        messages = [self.written.decoder.decode(self.written.payload(row)) for row in rows]
        for message in messages:
            message.redelivered = part.reader.doubts(message)
        self._submit(part, messages, part.reader.turn(rows))

    def _submit(
        self,
        part: Partition,
        messages: Sequence[Message],
        position: Any,
        progress: Progress | None = None,
    ) -> None:
        count = sum(len(message.rows) for message in messages)
        page = LogPage(part.lease, position, count, progress=progress)
        part.add(page)
        for message in messages:
            message.page = page
            self.receivers.publish([Event(message, n, row) for n, row in enumerate(message.rows)])
        page.acknowledge()

    def acknowledge(self) -> None:
        """Save what has been asked for, and how far it has come."""
        self.dead_letters.save()
        self.claims.acknowledge(renew=False)

    def redeliver(self, deliver: Callable[[Event, DeadLetter], bool]) -> None:
        self.dead_letters.redeliver(self._decoders(), deliver)

    def leave(self) -> None:
        """Acknowledge for the last time, and end."""
        self.dead_letters.save()
        self.parking.leave()
        self.claims.release()
        self.crash()

    def crash(self) -> None:
        """End without a word."""
        self.claims.drop()
        self._session.close()
        self._waiter.close()
        # Until then its claim is taken by nobody.
        eventually(self._sessions, lambda count: count == 0)

    def _sessions(self) -> int:
        activity = "SELECT count(*) FROM pg_stat_activity WHERE pid = %s"
        [(count,)] = self.written.db(activity, (self._backend,))
        return int(count)


Start = Callable[..., Process]


@pytest.fixture(params=[WrittenOutbox, WrittenList], ids=["outbox", "list"])
def written(db: Database, request: pytest.FixtureRequest) -> Written:
    """Each log in turn."""
    db("CREATE TABLE items (id bigint PRIMARY KEY)")
    made: Written = request.param(db)
    return made


@pytest.fixture
def start(written: Written) -> Iterator[Start]:
    """Starts processes that have ended when the test has."""
    processes: list[Process] = []

    def make(receive: Callable[[Event], None], epoch: str = "here/1") -> Process:
        processes.append(Process(written, f"process {len(processes)}", receive, epoch))
        return processes[-1]

    yield make
    for each in processes:
        with contextlib.suppress(OSError):
            each.crash()


class Events(list[tuple[Any, bool]]):
    """What a receiver got: of each event, the key and whether it may have come before."""

    def __call__(self, event: Event) -> None:
        self.append((event.id, event.redelivered))


def test_reading_goes_on_where_it_was_acknowledged(written: Written, start: Start) -> None:
    """What was acknowledged does not come again, in the order in which it was written."""
    received = Events()
    first = start(received)
    for number in (1, 2, 3):
        written.write(number)
    first.read()
    first.acknowledge()
    first.leave()
    written.write(4)
    second = start(received)
    second.read()
    assert received == [(1, False), (2, False), (3, False), (4, False)]
    second.leave()
    assert written.db("SELECT acknowledged, clean FROM pgsignals.consumers") == [(4, True)]


def test_what_was_not_acknowledged_comes_again(written: Written, start: Start) -> None:
    """After a crash, what may have been delivered is redelivered, and what is new is not."""
    received = Events()
    first = start(received)
    written.write(1)
    first.read()
    first.crash()
    second = start(received)
    written.write(2)
    second.read()
    assert received == [(1, False), (1, True), (2, False)]


def test_a_page_waits_for_its_receivers(written: Written, start: Start) -> None:
    """What a receiver holds is not acknowledged, nor anything behind it."""
    held: list[Held] = []
    process = start(lambda event: held.append(process.ledger.hold(process.receiver, event)))
    written.write(1)
    process.read()
    process.acknowledge()
    assert written.db("SELECT acknowledged FROM pgsignals.consumers") == [(0,)]
    held[0].release()
    process.acknowledge()
    assert written.db("SELECT acknowledged FROM pgsignals.consumers") == [(1,)]


def test_one_process_reads(written: Written, start: Start) -> None:
    """While a process lives nobody else reads; whom another has followed acknowledges nothing."""
    first, second = start(Events()), start(Events())
    assert [len(each.parts) for each in (first, second)] == [1, 0]
    written.write(1)
    first.read()
    written.db("UPDATE pgsignals.consumers SET holder = NULL")
    second.claims.claim()
    assert len(second.parts) == 1
    first.acknowledge()
    assert first.parts == []
    assert written.db("SELECT acknowledged FROM pgsignals.consumers") == [(0,)]


def test_a_dead_letter(written: Written, start: Start) -> None:
    """What a receiver cannot take is kept with its payload, acknowledged, and delivered again."""
    received = Events()

    def receive(event: Event) -> None:
        if not event.redelivered:
            raise ValueError("poison")
        received(event)

    process = start(receive)
    written.write(1)
    process.read()
    assert written.db("SELECT uid FROM pgsignals.dead_letters") == []
    process.acknowledge()
    with written.db.connection.cursor() as cursor:
        [letter] = dead_letters.dead_letters(cursor)
        assert letter.payload.endswith("\n1")
        dead_letters.retry(cursor, [letter.id])
    again: list[tuple[str, int]] = []
    process.redeliver(lambda event, letter: bool(again.append((event.uid, event.id)) or True))
    assert again == [(letter.uid, 1)]
    process.dead_letters.discard(letter.id)
    process.acknowledge()
    assert written.db("SELECT uid FROM pgsignals.dead_letters") == []
    assert written.db("SELECT acknowledged FROM pgsignals.consumers") == [(1,)]


def test_a_slow_receiver(written: Written, start: Start) -> None:
    """What a receiver is late with is parked, so that others go on, and brought back to it."""
    held: list[Held] = []
    first = start(lambda event: held.append(first.ledger.hold(first.receiver, event)))
    for number in (1, 2, 3):
        written.write(number)
    first.read()
    first.ledger.look()
    first.parking.save()
    assert written.db("SELECT acknowledged FROM pgsignals.consumers") == [(3,)]
    parked = written.db("SELECT uid, payload FROM pgsignals.parked ORDER BY id")
    assert [payload.partition("\n")[2] for _, payload in parked] == ["1", "2", "3"]
    first.leave()
    received: list[tuple[str, int, bool]] = []
    second = start(lambda event: received.append((event.uid, event.id, event.redelivered)))
    while second.parking.turn(feeding=True):
        pass
    assert received == [(uid, number, True) for number, (uid, _) in enumerate(parked, 1)]
    second.parking.leave()
    assert written.db("SELECT FROM pgsignals.parked") == []


def test_a_backfill(written: Written, start: Start) -> None:
    """Rows come behind what was written before they were read, and before all that comes later."""
    received: list[tuple[str, int]] = []
    process = start(lambda event: received.append((event.op, event.id)))
    written.write(1)
    written.db("INSERT INTO items VALUES (1) ON CONFLICT DO NOTHING")
    with written.db.connection.cursor() as cursor:
        number = request(cursor, "mailer", "public", "items")
    process.read()
    written.write(2)
    process.read()
    assert received == [("inserted", 1), ("snapshot", 1), ("inserted", 2)]
    process.acknowledge()
    backfill = Backfill(written.db.dsn, number).status
    assert (backfill.state, backfill.done, backfill.delivered) == ("done", 1, 1)


def test_what_writers_left_out(written: Written, start: Start) -> None:
    """It becomes a Gap, once, whoever reads."""
    first = start(Events())
    written.shed()
    first.read()
    first.read()
    assert [gap.reason for gap in first.gaps] == ["retention"]
    first.acknowledge()
    first.leave()
    second = start(Events())
    second.read()
    assert second.gaps == []


def test_another_history(written: Written, start: Start) -> None:
    """What was acknowledged of another history says nothing: after a Gap, all comes again."""
    received = Events()
    first = start(received)
    written.write(1)
    first.read()
    first.acknowledge()
    first.leave()
    second = start(received, epoch="elsewhere/1")
    second.read()
    assert [gap.reason for gap in second.gaps] == ["restored"]
    assert received == [(1, False), (1, True)]
