"""Messages from the outbox: at least once, in commit-consistent order, from the cursor on."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import secrets
import socket
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from queue import Empty, SimpleQueue
from typing import Protocol

import psycopg2
from psycopg2.extensions import cursor as DatabaseCursor

from ..connection import Backoff, Session, Waiter, connect, display, make_cast, redact
from ..errors import ConnectError, DatabaseError, PayloadError, PgSignalsError, PrivilegeError
from ..events import Event, Gap, Message, Topic
from ..metrics import Meter
from ..outbox.backfill import NOTICE, BackfillStore
from ..outbox.cursors import Snapshot
from ..outbox.pages import Page
from ..outbox.parts import Part
from ..outbox.privileges import missing_grants
from ..outbox.store import (
    Cursor,
    DeadLetter,
    Letter,
    Progress,
    Row,
    Store,
)
from ..outbox.wakefulness import SLEEP_SECONDS, Wakefulness
from ..payload import Broken, Cast, Decoder
from ..triggers import names
from ..triggers.definitions import Definition
from .backfilling import Backfilling
from .claims import Claims, Consumer
from .letters import Letters
from .notify import HEALTHY_SECONDS, Timing
from .opening import (
    IN_RECOVERY,
    explaining_read_only,
    keep_triggers,
    prove_round_trip,
    refuse_standby,
)

log = logging.getLogger("pgsignals")

ACKNOWLEDGE_SECONDS = 0.2
# How often, awake, it notes from which id on later transactions write, at the price of a
# transaction's id: after so many rows, which it would read again with each page, or so long.
NOTE_ROWS = 50
NOTE_SECONDS = 0.1
# How often a part that another process reads is asked for.
CLAIM_SECONDS = 0.5


class DurableSink(Protocol):
    """What the source feeds. None of its methods runs code of the user's."""

    @property
    def full(self) -> bool:
        """Whether the source should read no further for now."""

    def submit_page(self, events: Sequence[Event], page: Page) -> None:
        """Take events, and call ``page.finish`` when they have been handed to all receivers."""

    def gap(self, gap: Gap, page: Page | None = None) -> None:
        """Tell the receivers of a Gap, before anything that is submitted later.

        ``page.finish`` is called when they have been told.
        """

    def redeliver(self, event: Event, letter: DeadLetter) -> bool:
        """Take an event for one receiver; whether there is that receiver."""

    def hears(self, topic: Topic) -> bool:
        """Whether somebody takes events of the topic."""

    def connected(self) -> None:
        """Tell the receivers that events can arrive from now on."""

    def disconnected(self, error: BaseException) -> None:
        """Tell the receivers that the connection is lost."""


class OutboxPreparer(Protocol):
    """What the source needs done before it can read, through an ordinary connection."""

    def define(self, cursor: DatabaseCursor) -> Sequence[Definition]:
        """What to deliver."""

    def install(self, cursor: DatabaseCursor, definitions: Sequence[Definition]) -> None:
        """Make sure that the schema and the triggers are there."""

    def decoders(
        self, channels: Sequence[tuple[int, int, str]], cast: Cast
    ) -> Mapping[int, ChannelDecoder]:
        """How to read each channel that a watcher wants."""


@dataclass(frozen=True)
class ChannelDecoder:
    """Reads a channel's messages; those with an id from ``until`` on have a successor's twin."""

    decoder: Decoder
    until: int | None = None


class OutboxSource:
    """Reads the outbox for one consumer, in one session, from one thread.

    ``dsn`` is for the catalogue and for installing, ``listen_dsn`` for reading. ``most`` events are
    under way at once.
    """

    def __init__(
        self,
        dsn: str,
        listen_dsn: str,
        preparer: OutboxPreparer,
        sink: DurableSink,
        timing: Timing,
        meter: Meter,
        consumer: Consumer,
        most: int,
    ) -> None:
        self._dsn = dsn
        self._listen_dsn = listen_dsn
        self._preparer = preparer
        self._sink = sink
        self._timing = timing
        self._meter = meter
        self._consumer = consumer
        self._most = most
        self._holder = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self.name = consumer.name or f"process {self._holder}"
        self._waiter = Waiter()
        self._backoff = Backoff()
        self._paused = self._stopping = False
        self._thread = threading.Thread(target=self._run, name="pgsignals-source", daemon=True)
        self._session: Session | None = None
        self._store: Store
        self._cast: Cast
        self._definitions: Sequence[Definition] = ()
        self._decoders: Mapping[int, ChannelDecoder] = {}
        self._claims = Claims(consumer, self.name, sink.gap, self.now, self._begun)
        self._given_out = self._noted = 0
        self._noted_at = 0.0
        self._letters = Letters(meter)
        self._asked: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._awaited: list[tuple[Snapshot, Callable[[], None]]] = []
        self._redeliver = threading.Event()
        self._clock_offset = timedelta(0)
        self._turned_at = time.monotonic()
        self._own_channel = f"pgsignals_ping_{secrets.token_hex(8)}"
        self._state = Wakefulness()
        self._backfilling = Backfilling(sink.hears)
        self.invalid = 0
        self.reconnects = 0
        self.received = 0

    @property
    def is_connected(self) -> bool:
        """Whether it can read now."""
        return self._session is not None

    @property
    def is_active(self) -> bool:
        """Whether it reads, rather than standing by for another process."""
        return bool(self._claims.parts)

    @property
    def is_alive(self) -> bool:
        """Whether its thread goes on: it reads, and does not hang, or it connects again."""
        if self._session is None or not self._thread.is_alive():
            return self._thread.is_alive()
        return time.monotonic() - self._turned_at <= SLEEP_SECONDS + self._timing.timeout

    @property
    def outstanding(self) -> int:
        """Events that have been read and not been acknowledged."""
        return self._claims.outstanding

    def now(self) -> datetime:
        """The server's clock, late by a network's delay at most."""
        return datetime.now(timezone.utc) + self._clock_offset

    def start(self) -> None:
        """Connect once in the caller's thread, so that it gets the error, then read."""
        try:
            self._open()
        except psycopg2.errors.InsufficientPrivilege as error:
            if not (grants := self._missing_grants()):
                raise
            raise PrivilegeError(
                f"At {display(self._listen_dsn)} this role cannot be a consumer of the outbox: "
                f"{error.diag.message_primary}. Have the owner of the schema 'pgsignals' run: "
                f"{'; '.join(grants)}."
            ) from error
        except (psycopg2.OperationalError, psycopg2.InterfaceError, OSError) as error:
            raise ConnectError(
                f"Connected to PostgreSQL at {display(self._listen_dsn)}, but reading the outbox "
                f"could not begin: {redact(str(error)).strip()}"
            ) from error
        self._thread.start()

    def _missing_grants(self) -> list[str]:
        connection = connect(self._listen_dsn)
        try:
            with connection.cursor() as cursor:
                return missing_grants(cursor)
        finally:
            connection.close()

    def pause(self) -> None:
        """Read no further, but go on acknowledging what has been read."""
        self._paused = True
        self._waiter.wake()

    def stop(self, timeout: float) -> None:
        """Acknowledge what has been taken care of, and leave the rest to whoever comes next."""
        self._paused = self._stopping = True
        self._waiter.wake()
        if self._thread.ident is None:
            self._close()
            self._waiter.close()
        elif self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def abandon(self) -> None:
        """In the child of a fork: close our copies of the descriptors, and say nothing."""
        self._waiter.close()
        self._claims.drop()
        if self._session is not None:
            self._session.abandon()

    def bury(self, letter: Letter, kept: Callable[[], None]) -> None:
        """Have an event kept as a dead letter, and ``kept`` called then."""
        self._letters.bury(letter, kept)
        self._waiter.wake()

    def unbury(self, key: int) -> None:
        """Have a dead letter forgotten."""
        self._letters.unbury(key)
        self._waiter.wake()

    def settle(self, call: Callable[[], None]) -> None:
        """Have ``call`` called once all that is committed by now has been submitted."""
        self._asked.put(call)
        self._waiter.wake()

    def channel_of(self, event: Event) -> int:
        """The channel that an event came through."""
        topic = event._message.topic
        return next(
            key for key, found in self._decoders.items() if found.decoder.topic.name == topic.name
        )

    def _run(self) -> None:
        try:
            self._keep_reading()
        finally:
            self._close()
            self._waiter.close()

    def _keep_reading(self) -> None:
        while not self._stopping:
            began = time.monotonic()
            try:
                self._read_on()
                self._leave()
            # Whatever it is, an unknown error included, the thread must go on reading.
            except Exception as error:
                if self._stopping:
                    log.warning("could not acknowledge at the end: %s", redact(str(error)).strip())
                    return
                if time.monotonic() - began > HEALTHY_SECONDS:
                    self._backoff.reset()
                known = isinstance(error, psycopg2.Error | OSError)
                log.warning(
                    "lost the connection: %s", redact(str(error)).strip(), exc_info=not known
                )
                self._close()
                self._sink.disconnected(error)
                self._reconnect()

    def _reconnect(self) -> None:
        """Connect again, however long it takes; the cursor says where to go on."""
        while not self._stopping:
            self._waiter.sleep(self._backoff.next(), lambda: self._stopping)
            if self._stopping:
                return
            try:
                self._open()
            except (PgSignalsError, psycopg2.Error, OSError) as error:
                log.warning("still not connected: %s", redact(str(error)).strip())
                continue
            self.reconnects += 1
            self._meter.count("reconnects")
            log.info("connected again")
            return

    def _open(self) -> None:
        log.debug("connecting to %s", display(self._listen_dsn))
        timeout = self._timing.timeout
        connection = connect(self._dsn, timeout, self._timing.statement)
        # Once connected, the last acknowledgement is still to come when it stops.
        session = Session(
            self._listen_dsn, self._waiter, lambda: self._stopping and self._session is None
        )
        try:
            with connection.cursor() as cursor:
                cursor.execute(IN_RECOVERY)
                refuse_standby(self._dsn, cursor.fetchall())
                self._definitions = self._preparer.define(cursor)
                encoding = connection.info.parameter_status("server_encoding")
                session.open(timeout, encoding or "UTF8")
                refuse_standby(self._listen_dsn, session.execute(IN_RECOVERY, timeout=timeout))
                prove_round_trip(
                    session,
                    cursor,
                    self._listen_dsn,
                    self._own_channel,
                    timeout,
                    lambda: self._stopping,
                )
                keep_triggers(session, self._definitions, timeout)
                with explaining_read_only(self._dsn):
                    self._preparer.install(cursor, self._definitions)
                self._cast = make_cast(connection)
            store = Store(session, self.name, self._holder, timeout)
            self._register(store, session)
        except BaseException:
            session.close()
            raise
        finally:
            connection.close()
        self._store = store
        self._turned_at = time.monotonic()
        self._session = session

    def _register(self, store: Store, session: Session) -> None:
        store.open()
        [(server,)] = session.execute(
            "SELECT pg_catalog.clock_timestamp()", timeout=self._timing.timeout
        )
        self._clock_offset = server - datetime.now(timezone.utc)
        self._decoders = self._preparer.decoders(store.channels(), self._cast)
        channels = [names.channel_key(each.trigger.hash) for each in self._definitions]
        epoch, _ = store.surroundings()
        self._claims.enrol(store, epoch, channels)
        self._backfilling.begin(
            BackfillStore(session, self.name, self._timing.timeout),
            [each.decoder for each in self._decoders.values()],
            self._consumer.lease,
        )
        self._state = Wakefulness()
        self._given_out = store.look(awake=True).given_out
        self._claim(store)
        store.wake_others()

    def _close(self) -> None:
        self._claims.drop()
        session, self._session = self._session, None
        if session is not None:
            with contextlib.suppress(psycopg2.Error):
                session.close()

    def _read_on(self) -> None:
        """Read, acknowledge and keep the claims until paused and stopped."""
        session, store, state = self._session, self._store, self._state
        assert session is not None
        parts = self._claims.parts
        self._sink.connected()
        acknowledge_at = claim_at = renew_at = time.monotonic()
        while not self._stopping:
            now = self._turned_at = time.monotonic()
            if self._heard(session):
                state.wake(now)
            if now >= claim_at:
                self._claim(store)
                claim_at = now + CLAIM_SECONDS * random.uniform(0.8, 1.2)
                if self._claims.complete:
                    claim_at = now + self._consumer.lease / 3
            found = more = False
            if parts:
                found, more = self._look_and_read(store, state)
                if found:
                    state.wake(now)
            self._letters.save(store)
            if parts and now >= acknowledge_at:
                acknowledge_at = now + ACKNOWLEDGE_SECONDS
                due = now >= renew_at
                if due:
                    renew_at = now + self._consumer.lease / 3
                    self._look_around(store)
                    self._redeliver_letters(store)
                self._acknowledge(store, due)
            if more:
                continue
            done = time.monotonic()
            pause = state.pause(store, done, done - now) if parts else CLAIM_SECONDS
            wake_at = claim_at
            if parts:
                wake_at = min(wake_at, renew_at)
                if any(part.busy for part in parts.values()):
                    wake_at = min(wake_at, acknowledge_at)
            session.wait(max(0.0, min(pause, wake_at - time.monotonic())))

    def _look_around(self, store: Store) -> None:
        epoch, self._state.company = store.surroundings()
        if epoch != self._claims.epoch:
            # Beginning anew, receivers get a Gap.
            raise DatabaseError("the outbox has been made anew, by a restore say")

    def _heard(self, session: Session) -> bool:
        """Whether somebody says that there may be something."""
        heard = False
        while arrived := session.receive():
            for notify in arrived:
                heard = True
                if notify.payload.startswith("no outbox"):
                    now = self.now()
                    log.error("events were lost: %s", notify.payload)
                    self._sink.gap(Gap(now, now, "watcher_broken", notify.payload))
                elif notify.payload == "redeliver":
                    self._redeliver.set()
                elif notify.payload == NOTICE:
                    self._backfilling.look_again()
        if self._redeliver.is_set():
            self._redeliver.clear()
            self._redeliver_letters(self._store)
        return heard

    def _look_and_read(self, store: Store, state: Wakefulness) -> tuple[bool, bool]:
        """One look, and a page for each part that wants one; whether there was, and is more."""
        parts = self._claims.parts.values()
        asked: list[Callable[[], None]] = []
        with contextlib.suppress(Empty):
            while True:
                asked.append(self._asked.get_nowait())
        new = self._given_out - self._noted
        note = new >= NOTE_ROWS or (new > 0 and self._turned_at - self._noted_at >= NOTE_SECONDS)
        look = store.look(awake=state.held or not state.awake, begin=state.awake and note)
        if state.awake:
            state.held = look.awake
        state.seen = look.snapshot
        self._given_out = look.given_out
        if look.began is not None:
            self._noted, self._noted_at = look.given_out, self._turned_at
            for part in parts:
                part.floors.note(look.began + 1, look.given_out)
        self._awaited += [(look.snapshot, call) for call in asked]
        found = more = stirred = filling = False
        for part in parts:
            self._claims.note_shed(part, look)
            if part.outstanding >= self._most:
                # There may be room, which is not for the next acknowledgement to find.
                part.collect()
            ready = not (
                self._paused or part.leaving or self._sink.full or part.outstanding >= self._most
            )
            # A chunk of a backfill belongs between what its snapshot sees and what it does not.
            if ready and part.window is None:
                self._backfilling.take(part)
            if not self._backfilling.holds(part):
                part.advance(look.snapshot)
            filling = filling or self._backfilling.under_way(part)
            if part.window is not None:
                stirred = True
                if ready:
                    any_rows = self._read_page(store, part)
                    found = found or any_rows
                    more = more or part.window is not None
            if ready and part.window is None and self._backfilling.holds(part):
                message, progress = self._backfilling.give(part)
                messages = [] if message is None else [message]
                self._submit(part, messages, part.position, progress)
                more = True
        if found or (stirred and self._sink.full):
            state.stirred = True
        self._call_awaited()
        return found or filling, more

    def _call_awaited(self) -> None:
        due = [
            (wanted, call)
            for wanted, call in self._awaited
            if all(part.since.covers(wanted) for part in self._claims.parts.values())
        ]
        for each in due:
            self._awaited.remove(each)
            each[1]()

    def _read_page(self, store: Store, part: Part) -> bool:
        assert part.window is not None
        rows = store.read(part.window, part.last_id)
        doubtful = part.doubtful
        messages: list[Message] = []
        broken = False
        for row in rows:
            found = self._decode(row, part.claim.acknowledged_at)
            if isinstance(found, Gap):
                self._sink.gap(found)
                broken = True
            elif found is not None:
                found.redelivered = doubtful is not None and doubtful.sees(found.txid)
                messages.append(found)
        return self._submit(part, messages, part.turn(rows), broken=broken) or bool(rows)

    def _submit(
        self,
        part: Part,
        messages: Sequence[Message],
        cursor: Cursor,
        progress: Progress | None = None,
        broken: bool = False,
    ) -> bool:
        """Hand a page over to the sink; whether any of its events are the part's.

        ``broken``: a Gap, which is in the sink by now, belongs before the page's end.
        """
        events: list[Event] = []
        page = Page(part.reign, cursor, 0, progress=progress)
        for message in messages:
            message.page = page
            if self._consumer.parts == 1:
                events += [Event(message, n, row) for n, row in enumerate(message.rows)]
            else:
                width = len(message.topic.key)
                events += [
                    Event(message, n, row)
                    for n, row in enumerate(message.rows)
                    if _part_of(row[:width], self._consumer.parts) == part.claim.part
                ]
        page.count = len(events)
        part.add(page)
        if not events and not broken:
            page.finish()
            return False
        self.received += len(events)
        self._sink.submit_page(events, page)
        return True

    def _decode(self, row: Row, since: datetime) -> Message | Gap | None:
        found = self._decoders.get(row.channel)
        if found is None or (found.until is not None and row.id >= found.until):
            return None
        topic = found.decoder.topic
        try:
            message = found.decoder.decode(row.payload)
        except PayloadError as error:
            self.invalid += 1
            self._meter.count("invalid_payloads")
            detail = f"row {row.id} of the outbox cannot be read: {error}"
            log.error("%s", detail, extra=topic.fields)
            # Unlike a channel, which anybody may notify, it holds only what triggers wrote.
            return Gap(since, self.now(), "watcher_broken", detail)
        if isinstance(message, Broken):
            at = datetime.fromtimestamp(message.at_us / 1e6, timezone.utc)
            log.error("a watcher is broken: %s", message.error, extra=topic.fields)
            return Gap(at, at, "watcher_broken", message.error)
        if message is not None:
            message.position = str(row.id)
        return message

    def _claim(self, store: Store) -> None:
        if not self._paused:
            self._claims.claim(store)

    def _acknowledge(self, store: Store, renew: bool) -> None:
        self._claims.acknowledge(store, renew)

    def _begun(self, store: Store, part: Part) -> None:
        """A part is read from where it was acknowledged."""

    def _redeliver_letters(self, store: Store) -> None:
        decoders = {key: found.decoder for key, found in self._decoders.items()}
        self._letters.redeliver(store, decoders, self._sink.redeliver)

    def _leave(self) -> None:
        """Acknowledge for the last time, and let others read at once."""
        store = self._store
        self._letters.save(store)
        self._claims.release(store)
        if self._consumer.name is None:
            store.forget()
        if self._consumer.parts > 1:
            store.leave()


def _part_of(key: tuple[object, ...], parts: int) -> int:
    """Which part a record belongs to: the same in every process."""
    # What represents a memoryview is its address.
    values = tuple(bytes(each) if isinstance(each, memoryview) else each for each in key)
    return zlib.crc32(repr(values).encode()) % parts
