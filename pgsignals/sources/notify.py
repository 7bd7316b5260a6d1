"""Messages by LISTEN: at most once, every possible loss announced by a Gap."""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Protocol

import psycopg2
from psycopg2.extensions import Notify
from psycopg2.extensions import cursor as Cursor

from ..connection import Backoff, Session, Waiter, connect, display, make_cast, redact
from ..errors import ConnectError, PayloadError, PgSignalsError
from ..events import Gap, Message, microseconds, moment
from ..inspection import QUEUE_WARNING, read_queue_usage
from ..metrics import Meter
from ..payload import Broken, Decoder
from ..triggers.definitions import Definition
from . import Sink
from .opening import (
    IN_RECOVERY,
    explaining_read_only,
    keep_triggers,
    listen_to,
    prove_round_trip,
    refuse_standby,
)

log = logging.getLogger("pgsignals")

# How long reading may pause for slow receivers before their events are shed: while it does, the
# server keeps what we have not read in its notification queue, which all of its databases share.
PAUSE_SECONDS = 30.0
# The same where a pause leaves another worker without work.
IDLE_SECONDS = 1.0
# What the heartbeat's payload begins with; the rest is the usage of the server's queue.
_USAGE = "usage "
# A connection that lasted this long was a good one: the next loss starts the pauses anew.
HEALTHY_SECONDS = 60.0


@dataclass(frozen=True)
class Timing:
    """Patience with the server, in seconds.

    Each ``heartbeat`` a notification is sent to ourselves; when it, or anything else, has not come
    after ``timeout``, the connection is given up. ``timeout`` also bounds connecting, and
    ``statement`` each statement that reads the catalogue or installs, its wait for locks included.
    """

    heartbeat: float = 30.0
    timeout: float = 10.0
    statement: float = 60.0


class Preparer(Protocol):
    """What a source needs done before it can listen, through an ordinary connection."""

    def define(self, cursor: Cursor) -> Sequence[Definition]:
        """What to listen to."""

    def install(self, cursor: Cursor, definitions: Sequence[Definition]) -> None:
        """Make sure that the triggers are there. Called when the source is listening already."""


class NotifySource:
    """Listens in one session, from one thread, for as long as it is not stopped.

    ``dsn`` is for the catalogue and for installing, ``listen_dsn`` for listening.
    """

    def __init__(
        self,
        dsn: str,
        listen_dsn: str,
        preparer: Preparer,
        sink: Sink,
        timing: Timing,
        meter: Meter,
    ) -> None:
        self._dsn = dsn
        self._listen_dsn = listen_dsn
        self._preparer = preparer
        self._sink = sink
        self._timing = timing
        self._meter = meter
        self._waiter = Waiter()
        self._backoff = Backoff()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="pgsignals-source", daemon=True)
        self._session: Session | None = None
        self._decoders: Mapping[str, Decoder] = {}
        self.own_channel = f"pgsignals_ping_{secrets.token_hex(8)}"
        self._clock_offset = timedelta(0)
        self._ahead = 0.0
        # In microseconds since 1970, as messages have them: a datetime for each would take longer
        # than handing it over.
        self._heard = self._asked = microseconds(datetime.now(timezone.utc))
        self._asking = False
        self._usage_read_at = self._turned_at = time.monotonic()
        self._loss = ""
        self.invalid = 0
        self.reconnects = 0
        self.received = 0

    @property
    def is_connected(self) -> bool:
        """Whether it is listening now."""
        return self._session is not None

    @property
    def is_alive(self) -> bool:
        """Whether its thread goes on: it listens, and does not hang, or it connects again."""
        # In this order, since a new session's first turn is noted before the session is.
        if self._session is None or not self._thread.is_alive():
            return self._thread.is_alive()
        return time.monotonic() - self._turned_at <= self._timing.heartbeat + self._timing.timeout

    def start(self) -> None:
        """Connect once in the caller's thread, so that it gets the error, then listen."""
        try:
            self._open()
        except (psycopg2.OperationalError, psycopg2.InterfaceError, OSError) as error:
            raise ConnectError(
                f"Connected to PostgreSQL at {display(self._listen_dsn)}, but listening could not "
                f"begin: {redact(str(error)).strip()}"
            ) from error
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Stop listening and close the session."""
        self._stopping = True
        self._waiter.wake()
        if self._thread.ident is None:
            self._close()
            self._waiter.close()
        else:
            self._thread.join(timeout)

    def abandon(self) -> None:
        """In the child of a fork: close our copies of the descriptors, and say nothing."""
        self._waiter.close()
        if self._session is not None:
            self._session.abandon()

    def _run(self) -> None:
        try:
            self._keep_listening()
        finally:
            self._close()
            self._waiter.close()

    def _keep_listening(self) -> None:
        while not self._stopping:
            began = time.monotonic()
            try:
                self._listen()
            # Whatever it is, an unknown error included, the thread must go on listening.
            except Exception as error:
                if self._stopping:
                    break
                if time.monotonic() - began > HEALTHY_SECONDS:
                    self._backoff.reset()
                self._loss = redact(str(error)).strip()
                known = isinstance(error, psycopg2.Error | OSError)
                log.warning("lost the connection: %s", self._loss, exc_info=not known)
                self._close()
                self._sink.disconnected(error)
                self._reconnect()

    def _listen(self) -> None:
        session = self._session
        assert session is not None
        self._sink.connected()
        heard_at = asked_at = time.monotonic()
        self._asking = False
        while not self._stopping:
            arrived = session.receive()
            # All of them, stopping or not: stop() says whether what had arrived was handled.
            for notify in arrived:
                self._receive(notify)
            now = self._turned_at = time.monotonic()
            if arrived:
                heard_at = now
            if not self._asking and now - asked_at >= self._timing.heartbeat:
                self._asked = self._now()
                self._asking = True
                asked_at = now
                session.send(*self._question)
            if self._asking:
                due = max(heard_at, asked_at) + self._timing.timeout
                if now >= due:
                    raise TimeoutError(
                        f"no answer to the heartbeat within {self._timing.timeout:g} s"
                    )
            else:
                due = asked_at + self._timing.heartbeat
            if not arrived or session.plain:
                session.wait(due - now)

    @property
    def _question(self) -> tuple[str, tuple[str]]:
        """The heartbeat: only a notification proves that notifications arrive."""
        return (
            f"SELECT pg_catalog.pg_notify(%s, '{_USAGE}' ||"
            " pg_catalog.pg_notification_queue_usage())",
            (self.own_channel,),
        )

    def _receive(self, notify: Notify) -> None:
        if notify.channel == self.own_channel:
            self._receive_own(notify.payload)
            return
        decoder = self._decoders.get(notify.channel)
        if decoder is None:
            return
        try:
            message = decoder.decode(notify.payload)
        except PayloadError as error:
            self._refuse()
            log.warning(
                "ignored a payload on %s that is not from pgsignals: %s",
                notify.channel,
                error,
                extra={"channel": notify.channel, **decoder.topic.fields},
            )
            return
        if isinstance(message, Message):
            self.received += len(message.rows)
            if self._sink.full:
                self._make_room()
            self._sink.submit(message)
            # Notifications come in the order of their commits: nothing before this is missing. The
            # worker is on its way meanwhile.
            if message.at_us > self._heard:
                self._heard = min(message.at_us, self._now())
        elif isinstance(message, Broken):
            at = moment(message.at_us)
            log.error(
                "a watcher is broken: %s",
                message.error,
                extra={"channel": notify.channel, **decoder.topic.fields},
            )
            self._sink.gap(Gap(at, at, "watcher_broken", message.error))
        log.debug("received %d bytes on %s", len(notify.payload), notify.channel)

    def _receive_own(self, payload: str) -> None:
        if not payload.startswith(_USAGE):
            self._sink.reached(payload)
            return
        # All that was committed before we asked has arrived.
        self._heard = max(self._heard, self._asked)
        self._asking = False
        try:
            self._judge(float(payload.removeprefix(_USAGE)))
        except ValueError:
            self._refuse()

    def _refuse(self) -> None:
        self.invalid += 1
        self._meter.count("invalid_payloads")

    def _make_room(self) -> None:
        """Pause until each worker has room; when that takes too long, drop what is for the slow."""
        began = time.monotonic()
        while not (self._stopping or self._sink.wait_for_room(0.1)):
            now = self._turned_at = time.monotonic()
            if now - began >= (IDLE_SECONDS if self._sink.idle else PAUSE_SECONDS):
                log.error("receivers are too slow: their events are dropped until there is room")
                self._sink.give_up()
            elif now - self._usage_read_at >= self._timing.heartbeat:
                self._read_usage()

    def _read_usage(self) -> None:
        """Ask how full the server's queue is while reading pauses, and with it the heartbeat."""
        self._usage_read_at = time.monotonic()
        try:
            connection = connect(self._dsn, self._timing.timeout, self._timing.timeout)
            try:
                with connection.cursor() as cursor:
                    self._judge(read_queue_usage(cursor))
            finally:
                connection.close()
        except (ConnectError, psycopg2.Error) as error:
            log.warning("cannot tell how full the notification queue is: %s", redact(str(error)))

    def _judge(self, usage: float) -> None:
        self._usage_read_at = time.monotonic()
        if usage >= QUEUE_WARNING:
            log.warning(
                "PostgreSQL's notification queue is %.0f%% full: a listener stays in a transaction "
                "or reads too slowly. When it is full, whoever notifies cannot commit; `pgsignals "
                "doctor` tells more.",
                100 * usage,
                extra={"queue_usage": usage},
            )

    def now(self) -> datetime:
        """The server's clock, late by a network's delay at most."""
        return datetime.now(timezone.utc) + self._clock_offset

    def _now(self) -> int:
        return int(1e6 * (time.time() + self._ahead))

    def _open(self) -> datetime:
        """Connect, listen, install; returns the server's time from which on nothing is missed."""
        log.debug("connecting to %s", display(self._listen_dsn))
        connection = connect(self._dsn, self._timing.timeout, self._timing.statement)
        session = Session(self._listen_dsn, self._waiter, lambda: self._stopping)
        try:
            with connection.cursor() as cursor:
                cursor.execute(IN_RECOVERY)
                refuse_standby(self._dsn, cursor.fetchall())
                self._judge(read_queue_usage(cursor))
                definitions = self._preparer.define(cursor)
                encoding = connection.info.parameter_status("server_encoding")
                session.open(self._timing.timeout, encoding or "UTF8")
                listening = self._begin_listening(session, cursor, definitions)
                with explaining_read_only(self._dsn):
                    self._preparer.install(cursor, definitions)
            cast = make_cast(connection)
            self._decoders = {d.channel: d.decoder(cast) for d in definitions}
        except BaseException:
            session.close()
            raise
        finally:
            connection.close()
        self._turned_at = time.monotonic()
        self._session = session
        self._asked = self._heard = microseconds(listening)
        return listening

    def _begin_listening(
        self, session: Session, cursor: Cursor, definitions: Sequence[Definition]
    ) -> datetime:
        timeout = self._timing.timeout
        refuse_standby(self._listen_dsn, session.execute(IN_RECOVERY, timeout=timeout))
        prove_round_trip(
            session,
            cursor,
            self._listen_dsn,
            self.own_channel,
            timeout,
            lambda: self._stopping,
        )
        keep_triggers(session, definitions, timeout)
        for definition in definitions:
            session.execute(listen_to(definition.channel), timeout=timeout)
            log.debug("listening on %s for %s", definition.channel, definition)
        listening: datetime
        [(listening,)] = session.execute("SELECT pg_catalog.clock_timestamp()", timeout=timeout)
        self._clock_offset = listening - datetime.now(timezone.utc)
        self._ahead = self._clock_offset.total_seconds()
        return listening

    def _close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            with contextlib.suppress(psycopg2.Error):
                session.close()

    def _reconnect(self) -> None:
        """Connect again, however long it takes, and announce what may have been missed."""
        since = moment(self._heard)
        while not self._stopping:
            self._waiter.sleep(self._backoff.next(), lambda: self._stopping)
            if self._stopping:
                return
            try:
                until = self._open()
            except (PgSignalsError, psycopg2.Error, OSError) as error:
                log.warning("still not connected: %s", redact(str(error)).strip())
                continue
            self.reconnects += 1
            self._meter.count("reconnects")
            log.info("connected again; events since %s may be missing", since)
            # Only now that LISTEN is back: a Gap announced earlier would end before the loss does.
            self._sink.gap(Gap(since, until, "reconnected", self._loss))
            return
