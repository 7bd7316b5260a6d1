"""Messages from a log: at least once, in commit-consistent order, from the cursor on."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Protocol

from psycopg2.extensions import cursor as DatabaseCursor

from ..consumers.acks import Partition
from ..consumers.backfills.requests import NOTICE
from ..consumers.backfills.runner import Backfilling
from ..consumers.claims import Claims, Consumer
from ..consumers.dead_letters import NOTICE as REDELIVER
from ..consumers.dead_letters import DeadLetters
from ..consumers.log import DecoderHooks, Log, LogProvider
from ..consumers.parking import Parking
from ..core.errors import DatabaseError
from ..core.events import Event, microseconds
from ..core.logging import log
from ..core.metrics import Meter
from ..core.payload import Cast
from ..core.redaction import error_text
from ..core.rng import chance
from ..postgres.session import Session
from ..triggers import names
from ..triggers.bodies.common import CANNOT_WRITE
from ..triggers.definitions import Definition
from .handover import Handover
from .polling import DurableSink, Follower, Poller
from .session_checks import explaining_missing_rights, keep_triggers, listen_to, queue_is_full
from .thread import ConnectAnew, ConnectionSettings, Preparer, SessionThread
from .trigger_history import Installation
from .trigger_watch import TriggersChangedError

ACKNOWLEDGE_SECONDS = 0.2
# How often the process tries to claim partitions that others read.
CLAIM_SECONDS = 0.5
# The longest wait of a turn, whatever the log says.
TURN_SECONDS = 5.0
# How often, at least, a process that reads all partitions looks for others to share them with.
SHARE_SECONDS = 2.0


class DurablePreparer(Preparer, LogProvider, Protocol):
    """Defines and installs for the source, and makes the log and decoder that it reads with."""

    @property
    def coming(self) -> Sequence[Definition]:
        """The definitions for the log that the consumer goes to; none if it stays."""

    def handover(self, former: Log, holder: str, timeout: float) -> Handover | None:
        """Return what brings the consumer from a log to the one that is wanted; None if it is."""


class DurableSource(SessionThread):
    """Reads a log for one consumer, in one session, from one thread.

    At most ``most`` events of a partition are in flight at once, without those that are parked.
    """

    def __init__(
        self,
        settings: ConnectionSettings,
        preparer: DurablePreparer,
        sink: DurableSink,
        meter: Meter,
        consumer: Consumer,
        most: int,
        parking: Parking | None = None,
        follower: Follower | None = None,
    ) -> None:
        super().__init__(settings, preparer, meter, "reading events", TURN_SECONDS)
        self._provider: DurablePreparer = preparer
        # While the consumer goes to another log.
        self._handover: Handover | None = None
        self._sink = sink
        self._consumer = consumer
        self._holder = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self.name = consumer.name or f"process {self._holder}"
        self._paused = False
        # The log that the session reads, once it has begun to.
        self._log: Log | None = None
        self._parking = parking
        if parking is not None:
            parking.ledger.wake = self._waiter.wake
        self._verify_at = 0.0
        self.dead_letters = DeadLetters(meter, self._waiter.wake)
        self._backfilling = Backfilling(sink.hears)
        self._installation = Installation(self.triggers, self.now)
        begun = self._part_begun if follower is None else follower.part_begun
        self._claims = Claims(consumer, self.name, sink.gap, self.now, begun)
        self._decoder = preparer.decoder(
            DecoderHooks(
                self.now,
                lambda broken: self.triggers.failure(broken, self.now()),
                self.foreign,
                self._refuse,
                (lambda: None) if parking is None else parking.described,
            )
        )
        self._poller = Poller(
            sink, consumer, most, self._claims, self._decoder, self._backfilling, follower
        )

    @property
    def is_active(self) -> bool:
        """Whether this process reads, rather than standing by for another one."""
        return bool(self._claims.parts)

    @property
    def outstanding(self) -> int:
        """The number of events that are in flight."""
        return self._claims.outstanding

    @property
    def received(self) -> int:
        """The number of events that have been read."""
        return self._poller.received

    def start(self) -> None:
        with explaining_missing_rights(self._dsn, self._listen_dsn, self._provider.missing_grants):
            super().start()

    def pause(self) -> None:
        """Read no further, but go on acknowledging the events in flight."""
        self._paused = True
        self._waiter.wake()

    def stop(self, timeout: float) -> None:
        """Acknowledge what is done, and leave the rest to the next holders of the partitions."""
        self._paused = True
        super().stop(timeout)

    def abandon(self) -> None:
        self._claims.drop()
        if self._log is not None:
            self._log.abandon()
        super().abandon()

    def look_again(self) -> None:
        """Look at the triggers soon, since they have changed."""
        self._verify_at = 0.0
        self._waiter.wake()

    def settle(self, call: Callable[[], None]) -> None:
        """Call ``call`` once everything committed by now has been submitted."""
        self._poller.settle(call)
        self._waiter.wake()

    def channel_of(self, event: Event) -> int:
        """Return the channel that an event came through; 0, which none has, if it is forgotten."""
        return self._decoder.channel_of(event)

    @property
    def _cancelled(self) -> bool:
        # A stop must not cancel the statements of the session: the last acknowledgement is among
        # them.
        return self._stopping and self._session is None

    def _listen(
        self, session: Session, cursor: DatabaseCursor, definitions: Sequence[Definition]
    ) -> None:
        if queue_is_full(cursor):
            log.warning(
                "PostgreSQL's notification queue is full: events come late, since nobody "
                "wakes this consumer; `pgsignals doctor` tells who is in the way"
            )
        else:
            self._prove_round_trip(session, cursor)
        keep_triggers(session, [*definitions, *self._provider.coming], self._timing.timeout)

    def _begin(
        self, session: Session, definitions: Sequence[Definition], asked_at: datetime, cast: Cast
    ) -> None:
        try:
            self._begin_reading(session, definitions, asked_at, cast)
        except BaseException:
            self._close_log()
            raise

    def _begin_reading(
        self, session: Session, definitions: Sequence[Definition], asked_at: datetime, cast: Cast
    ) -> None:
        self._log = store = self._provider.log(
            session, self.name, self._holder, self._timing.timeout
        )
        # Requests, for a backfill say, come as notifications, whatever the log is.
        session.execute(listen_to(names.WAKE_CHANNEL), timeout=self._timing.timeout)
        store.open()
        epoch, server = store.surroundings()
        self._clock.set(microseconds(server))
        self.dead_letters.open(store.consumer)
        if self._parking is not None:
            self._parking.open(
                self._claims, store.consumer, self.channel_of, self._decoder.decoders
            )
        self._decoder.begin(store, definitions, cast)
        self._claims.enrol(store, epoch, self._decoder.channels)
        self._installation.open(store)
        self._installation.compare(
            session, definitions, self._decoder, asked_at, self._preparer.missing
        )
        self._backfilling.begin(
            store.consumer,
            [*self._decoder.decoders().values()],
            self._consumer.lease,
        )
        self._handover = self._provider.handover(store, self._holder, self._timing.timeout)
        self._poller.begin()
        if self._handover is not None:
            self._handover.begin()
        self._claim()
        store.stir()

    def _read(self, session: Session) -> None:
        try:
            self._read_on(session)
            self._leave()
        except Exception as error:
            if not self._stopping:
                raise
            log.warning(
                "could not acknowledge at the end, so that some events may be delivered again: %s",
                error_text(error),
            )

    def _lost(self, error: Exception) -> None:
        self._sink.disconnected(error)

    def _regained(self) -> None:
        # No Gap: reading goes on from the cursor.
        log.info("connected again")

    def _close(self) -> None:
        self._claims.drop()
        self._close_log()
        super()._close()

    def _close_log(self) -> None:
        former, self._log = self._log, None
        if former is not None:
            former.close()

    def _read_on(self, session: Session) -> None:
        """Read, acknowledge and keep the claims until paused and stopped."""
        store, parts = self._log, self._claims.parts
        assert store is not None
        self._sink.connected()
        acknowledge_at = claim_at = renew_at = time.monotonic()
        while not self._stopping:
            now = self._turned_at = time.monotonic()
            if self._heard(session):
                store.wake()
            if not parts:
                self._installation.leave_to_others()
            if now >= claim_at:
                self._claim()
                if not parts and store.consumer.elsewhere():
                    raise ConnectAnew(f"the consumer {self.name} reads another log by now")
                claim_at = now + CLAIM_SECONDS * chance.uniform(0.8, 1.2)
                if self._claims.complete:
                    claim_at = now + min(SHARE_SECONDS, self._consumer.lease / 3)
            found = more = False
            if parts:
                found, more = self._poll(store)
                if found:
                    store.wake()
            self.dead_letters.save()
            if self._parking is not None and parts:
                # No parked event is fed while the source stops: no receiver is called any more.
                fed = self._parking.turn(not self._paused)
                more = more or fed
            if self._installation.marked:
                # A renewal announces the loss: renew now, not a third of a long lease later.
                self._installation.marked = False
                acknowledge_at = renew_at = now
            if parts and now >= acknowledge_at:
                acknowledge_at = now + ACKNOWLEDGE_SECONDS
                due = now >= renew_at
                if due:
                    renew_at = now + self._consumer.lease / 3
                    self._look_around(store)
                    self._redeliver()
                    if self._parking is not None:
                        self._parking.tell_of_losses()
                self._claims.acknowledge(due)
                if self._handover is not None:
                    self._hand_over(self._handover)
            if parts and now >= self._verify_at:
                self._verify_at = now + self._timing.heartbeat
                self._look_at_triggers(session)
            if more or self._installation.marked:
                continue
            pause = store.pause(time.monotonic() - now) if parts else CLAIM_SECONDS
            wake_at = min(claim_at, now + TURN_SECONDS)
            if parts:
                # A renewal is made with an acknowledgement: woken before that is due, the thread
                # would spin until then.
                wake_at = min(wake_at, max(renew_at, acknowledge_at), self._verify_at)
                if self._installation.doubted or any(part.busy for part in parts.values()):
                    wake_at = min(wake_at, acknowledge_at)
            session.wait(max(0.0, min(pause, wake_at - time.monotonic())))

    def _look_around(self, store: Log) -> None:
        epoch, server = store.surroundings()
        self._clock.set(microseconds(server))
        if epoch != self._claims.epoch:
            # Connecting again compares the histories, and announces a Gap.
            raise DatabaseError("the log has been made anew, by a restore say")

    def _heard(self, session: Session) -> bool:
        """Act on the notifications that have arrived; return whether there were any."""
        heard: set[str] = set()
        while arrived := session.receive():
            heard.update(notify.payload for notify in arrived)
        if NOTICE in heard:
            self._backfilling.look_again()
        if CANNOT_WRITE in heard:
            self._installation.note_failed_writers(self.is_active)
        if REDELIVER in heard:
            self._redeliver()
        return bool(heard)

    def _poll(self, store: Log) -> tuple[bool, bool]:
        """Poll, and read a page for each partition with room; return as ``Poller.read`` does."""
        poll = self._poller.poll(store)
        self._installation.note_shed(poll, self._claims)
        ending = False
        if self._handover is not None:
            poll = self._handover.limit(poll)
            self._claims.polled_as_of, ending = poll.as_of, self._handover.ending
        return self._poller.read(store, poll, self._held_up, ending)

    def _hand_over(self, handover: Handover) -> None:
        """Have the consumer go on in the other log once all before is acknowledged."""
        parts = list(self._claims.parts.values())
        if not self._claims.complete or not all(
            handover.done(part) and not self._backfilling.holds(part) for part in parts
        ):
            return
        if self._paused or self._installation.marked or self._installation.doubted:
            return
        self.dead_letters.save()
        if self._parking is not None:
            self._parking.leave()
        handover.hand_over(parts[0])

    def _held_up(self) -> bool:
        return self._paused or (self._parking is not None and self._parking.ledger.blocks)

    def _look_at_triggers(self, session: Session) -> None:
        try:
            missing = self._installation.look(session)
        except TriggersChangedError:
            self._finish(session)
            raise
        if missing:
            # The triggers that were installed again may have channels that are not known yet.
            self._decoder.describe()

    def _finish(self, session: Session) -> None:
        """Read all windows to their ends and acknowledge them, for at most a statement's timeout.

        A session that reads through other triggers begins a window anew. Otherwise it would deliver
        events of the window again, with other uids, and behind them those of these triggers alone.
        """
        deadline = time.monotonic() + self._timing.timeout
        while not self._stopping and time.monotonic() < deadline:
            self._turned_at = time.monotonic()
            more = not self._paused and self._poller.read_windows()
            self.dead_letters.save()
            self._claims.acknowledge(renew=True)
            parts = self._claims.parts.values()
            unread = not self._paused and any(not part.reader.at_end for part in parts)
            if not unread and not any(part.pages for part in parts):
                return
            if not more:
                session.wait(ACKNOWLEDGE_SECONDS)

    def _claim(self) -> None:
        if not self._paused:
            self._claims.claim()

    def _part_begun(self, part: Partition) -> None:
        """Prepare for a partition whose reading begins at the acknowledged position."""
        # Look at the triggers at once, and keep their fingerprint: the one that is kept is of the
        # former holder's triggers, which may be pruned now that nobody reads through them.
        self._verify_at = 0.0
        if self._parking is not None:
            self._parking.begun(part)

    def _redeliver(self) -> None:
        self.dead_letters.redeliver(self._decoder.decoders(), self._sink.redeliver)

    def _leave(self) -> None:
        """Acknowledge for the last time, and give up the claims, so that others read at once."""
        store = self._log
        assert store is not None
        self.dead_letters.save()
        if self._parking is not None and self._claims.parts:
            self._parking.leave()
        self._claims.release()
        if self._consumer.name is None:
            store.consumer.forget()
        if self._consumer.parts > 1:
            store.consumer.leave()
