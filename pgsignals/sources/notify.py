"""Messages by LISTEN: at most once, every possible loss announced by a Gap."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta, timezone

import psycopg2
from psycopg2.extensions import connection as Connection

from ..connection import Backoff, Waiter, connect, redact
from ..errors import PayloadError, PgSignalsError
from ..events import Gap, Message
from ..payload import Broken, Decoder
from . import Sink

log = logging.getLogger("pgsignals")

Prepare = Callable[[Connection], Mapping[str, Decoder]]

# How long reading may pause for slow receivers before events are shed: while it does, the server
# keeps what we have not read in its notification queue, which all of its databases share.
PAUSE_SECONDS = 30.0
# A connection that lasted this long was a good one: the next loss starts the pauses anew.
HEALTHY_SECONDS = 60.0


class NotifySource:
    """Listens on one connection, in one thread, for as long as it is not stopped.

    ``prepare`` makes a fresh connection listen and says how to decode each of its channels.
    """

    def __init__(self, dsn: str, prepare: Prepare, sink: Sink) -> None:
        self._dsn = dsn
        self._prepare = prepare
        self._sink = sink
        self._waiter = Waiter()
        self._backoff = Backoff()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="pgsignals-source", daemon=True)
        self._connection: Connection | None = None
        self._decoders: Mapping[str, Decoder] = {}
        self._clock_offset = timedelta(0)
        self._heard = datetime.now(timezone.utc)
        self._loss = ""
        self._shedding_since: datetime | None = None
        self.invalid = 0
        self.reconnects = 0
        self.shed = 0
        self.received = 0

    @property
    def is_connected(self) -> bool:
        """Whether it is listening now."""
        return self._connection is not None

    def start(self) -> None:
        """Connect once in the caller's thread, so that it gets the error, then listen."""
        self._open()
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Stop listening and close the connection."""
        self._stopping = True
        self._waiter.wake()
        if self._thread.ident is None:
            self._close()
            self._waiter.close()
        else:
            self._thread.join(timeout)

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
        connection = self._connection
        assert connection is not None
        self._sink.connected()
        self._drain(connection)
        while not self._stopping:
            pause = 0.1 if self._shedding_since is not None else None
            if self._waiter.wait(connection.fileno(), pause):
                self._drain(connection)
            self._end_shedding()

    def _drain(self, connection: Connection) -> None:
        """Handle all that has arrived.

        Over TLS, one poll may bring one notification of several that the socket no longer shows.
        """
        connection.poll()
        while connection.notifies:
            arrived = connection.notifies[:]
            del connection.notifies[: len(arrived)]
            self._heard = self._now()
            for notify in arrived:
                if self._stopping:
                    return
                self._receive(notify.channel, notify.payload)
            connection.poll()

    def _receive(self, channel: str, payload: str) -> None:
        decoder = self._decoders.get(channel)
        if decoder is None:
            return
        try:
            message = decoder.decode(payload)
        except PayloadError as error:
            self.invalid += 1
            log.warning(
                "ignored a payload on %s that is not from pgsignals: %s",
                channel,
                error,
                extra={"channel": channel},
            )
            return
        if isinstance(message, Message):
            self.received += len(message.rows)
            if self._has_room(message):
                self._sink.submit(message)
        elif isinstance(message, Broken):
            at = datetime.fromtimestamp(message.at_us / 1e6, timezone.utc)
            log.error("a watcher is broken: %s", message.error, extra={"channel": channel})
            self._sink.gap(Gap(at, at, "watcher_broken", message.error))

    def _has_room(self, message: Message) -> bool:
        """Pause until there is room for the message; when that takes too long, shed it instead."""
        if self._shedding_since is not None:
            if self._sink.full or not self._end_shedding():
                self.shed += len(message.rows)
                return False
            return True
        deadline = time.monotonic() + PAUSE_SECONDS
        while self._sink.full and not self._stopping:
            if self._sink.wait_for_room(0.1):
                break
            if time.monotonic() >= deadline:
                self._shedding_since = message.at
                self.shed += len(message.rows)
                log.error("receivers are too slow: shedding events until there is room")
                return False
        return not self._stopping

    def _end_shedding(self) -> bool:
        """Announce what was shed, once there is room again; whether there is."""
        if self._shedding_since is None or not self._sink.wait_for_room(0):
            return self._shedding_since is None
        since, self._shedding_since = self._shedding_since, None
        self._sink.gap(Gap(since, self._now(), "overflow", "receivers were too slow"))
        return True

    def _now(self) -> datetime:
        return datetime.now(timezone.utc) + self._clock_offset

    def _open(self) -> None:
        connection = connect(self._dsn)
        try:
            self._decoders = self._prepare(connection)
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_catalog.clock_timestamp()")
                row = cursor.fetchone()
            assert row is not None
            self._clock_offset = row[0] - datetime.now(timezone.utc)
        except BaseException:
            connection.close()
            raise
        self._connection = connection

    def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                connection.close()
            except psycopg2.Error as error:
                log.debug("closing a broken connection: %s", redact(str(error)))

    def _reconnect(self) -> None:
        """Connect again, however long it takes, and announce what may have been missed."""
        since = self._heard
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
            # Only now that LISTEN is back: a Gap announced earlier would end before the loss does.
            until = self._heard = self._now()
            log.info("connected again; events since %s may be missing", since)
            self._sink.gap(Gap(since, until, "reconnected", self._loss))
            return
