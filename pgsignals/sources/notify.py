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
from psycopg2 import errors as pg
from psycopg2 import sql
from psycopg2.extensions import Notify
from psycopg2.extensions import cursor as Cursor

from ..connection import Backoff, Session, Waiter, connect, display, make_cast, redact
from ..errors import ConnectError, PayloadError, PgSignalsError
from ..events import Gap, Message
from ..inspection import QUEUE_WARNING, read_queue_usage
from ..metrics import Meter
from ..payload import Broken, Decoder
from ..triggers import names
from ..triggers.definitions import Definition
from . import Sink

log = logging.getLogger("pgsignals")

# How long reading may pause for slow receivers before their events are shed: while it does, the
# server keeps what we have not read in its notification queue, which all of its databases share.
PAUSE_SECONDS = 30.0
# The same where a pause leaves another worker without work.
IDLE_SECONDS = 1.0
# After so many reads in a row that brought little, in quick succession, what comes within so many
# seconds is read together.
TOGETHER_AFTER = 16
TOGETHER_SECONDS = 0.001
TOGETHER_BYTES = 8192
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


class _Pace:
    """Whether small notifications come so quickly that several are better read together.

    To be woken for each would cost the listener, and the writers on the same machine, more than
    their handling.
    """

    def __init__(self) -> None:
        self._quick = 0

    def note(self, since: float, arrived: Sequence[Notify]) -> None:
        """Some have arrived, ``since`` seconds after those before."""
        quick = len(arrived) > 1 or since < TOGETHER_SECONDS
        small = sum(len(notify.payload) for notify in arrived) < TOGETHER_BYTES
        self._quick = self._quick + 1 if quick and small else 0

    @property
    def is_quick(self) -> bool:
        """Whether to let more come before reading on."""
        return self._quick >= TOGETHER_AFTER


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
        self._heard = self._asked = datetime.now(timezone.utc)
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
        pace = _Pace()
        while not self._stopping:
            arrived = session.receive()
            # All of them, stopping or not: stop() says whether what had arrived was handled.
            for notify in arrived:
                self._receive(notify)
            now = self._turned_at = time.monotonic()
            if arrived:
                pace.note(now - heard_at, arrived)
                heard_at = now
            if not self._asking and now - asked_at >= self._timing.heartbeat:
                self._asked = self.now()
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
                if pace.is_quick:
                    time.sleep(TOGETHER_SECONDS)
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
        log.debug("received %d bytes on %s", len(notify.payload), notify.channel)
        if isinstance(message, Message):
            self.received += len(message.rows)
            if self._sink.full:
                self._make_room()
            self._sink.submit(message)
            # Notifications come in the order of their commits: nothing before this is missing. The
            # worker is on its way meanwhile.
            self._heard = max(self._heard, min(message.at, self.now()))
        elif isinstance(message, Broken):
            at = datetime.fromtimestamp(message.at_us / 1e6, timezone.utc)
            log.error(
                "a watcher is broken: %s",
                message.error,
                extra={"channel": notify.channel, **decoder.topic.fields},
            )
            self._sink.gap(Gap(at, at, "watcher_broken", message.error))

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

    def _open(self) -> datetime:
        """Connect, listen, install; returns the server's time from which on nothing is missed."""
        log.debug("connecting to %s", display(self._listen_dsn))
        connection = connect(self._dsn, self._timing.timeout, self._timing.statement)
        session = Session(self._listen_dsn, self._waiter, lambda: self._stopping)
        try:
            with connection.cursor() as cursor:
                cursor.execute(_IN_RECOVERY)
                _refuse_standby(self._dsn, cursor.fetchall())
                self._judge(read_queue_usage(cursor))
                definitions = self._preparer.define(cursor)
                encoding = connection.info.parameter_status("server_encoding")
                session.open(self._timing.timeout, encoding or "UTF8")
                listening = self._begin_listening(session, cursor, definitions)
                self._install(cursor, definitions)
            cast = make_cast(connection)
            self._decoders = {d.channel: d.decoder(cast) for d in definitions}
        except BaseException:
            session.close()
            raise
        finally:
            connection.close()
        self._turned_at = time.monotonic()
        self._session = session
        self._asked = self._heard = listening
        return listening

    def _install(self, cursor: Cursor, definitions: Sequence[Definition]) -> None:
        try:
            self._preparer.install(cursor, definitions)
        except pg.ReadOnlySqlTransaction as error:
            raise ConnectError(
                f"Transactions are read-only at {display(self._dsn)}, so that the triggers cannot "
                "be installed. Set default_transaction_read_only to off for this role or "
                "database, or have `pgsignals install` run by a role that may write and start "
                'with install="check".'
            ) from error

    def _begin_listening(
        self, session: Session, cursor: Cursor, definitions: Sequence[Definition]
    ) -> datetime:
        timeout = self._timing.timeout
        _refuse_standby(self._listen_dsn, session.execute(_IN_RECOVERY, timeout=timeout))
        self._prove_round_trip(session, cursor)
        # Before looking whether the triggers are there: whoever prunes takes these locks, so that
        # from here on nobody removes what we are about to rely on.
        session.execute(
            "SELECT pg_catalog.pg_advisory_lock_shared(%s, key)"
            " FROM pg_catalog.unnest(%s::int[]) AS key",
            (names.LOCK_CLASS, [d.trigger.lock_key for d in definitions]),
            timeout=timeout,
        )
        for definition in definitions:
            session.execute(_listen_to(definition.channel), timeout=timeout)
            log.debug("listening on %s for %s", definition.channel, definition)
        listening: datetime
        [(listening,)] = session.execute("SELECT pg_catalog.clock_timestamp()", timeout=timeout)
        self._clock_offset = listening - datetime.now(timezone.utc)
        return listening

    def _prove_round_trip(self, session: Session, cursor: Cursor) -> None:
        """Behind a pooler that pools transactions, LISTEN succeeds and nothing ever arrives.

        The notification comes from the other connection: what a session says to itself may come
        back even there, within the answer.
        """
        timeout = self._timing.timeout
        session.execute(_listen_to(self.own_channel), timeout=timeout)
        [(ours,)] = session.execute("SELECT pg_catalog.pg_backend_pid()", timeout=timeout)
        cursor.execute(
            "SELECT pg_catalog.pg_backend_pid(), pg_catalog.pg_notify(%s, '')", (self.own_channel,)
        )
        [(others, _)] = cursor.fetchall()
        deadline = time.monotonic() + timeout
        while not any(notify.channel == self.own_channel for notify in session.receive()):
            # Two connections with one backend: no need to wait for what will not come.
            if others == ours or time.monotonic() >= deadline or self._stopping:
                raise ConnectError(
                    f"At {display(self._listen_dsn)} LISTEN succeeds, but no notification arrives "
                    f"(within {timeout:g} s). PgBouncer with pool_mode=transaction (or statement) "
                    "does that: keep the pooled DSN, and give a direct one to listen on with "
                    "listen_dsn=. Both must lead to the same database of the same server."
                )
            session.wait(deadline - time.monotonic())

    def _close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            with contextlib.suppress(psycopg2.Error):
                session.close()

    def _reconnect(self) -> None:
        """Connect again, however long it takes, and announce what may have been missed."""
        since = self._heard
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


_IN_RECOVERY = "SELECT pg_catalog.pg_is_in_recovery()"


def _listen_to(channel: str) -> sql.Composed:
    return sql.SQL("LISTEN {}").format(sql.Identifier(channel))


def _refuse_standby(dsn: str, answer: Sequence[tuple[bool]]) -> None:
    [(standby,)] = answer
    if standby:
        raise ConnectError(
            f"The server at {display(dsn)} is a standby, where LISTEN is not possible. Connect to "
            "the primary: target_session_attrs=read-write in the DSN picks it among several hosts."
        )
