"""The thread of a source that reads from PostgreSQL, for as long as the source is not stopped."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

import psycopg2
from psycopg2.extensions import cursor as Cursor

from ..core.backoff import Backoff
from ..core.errors import ConnectError, DatabaseError
from ..core.logging import log
from ..core.metrics import Meter
from ..core.payload import Cast
from ..core.redaction import error_text
from ..core.threads import Thread
from ..postgres.connection import connect, make_cast
from ..postgres.dsn import display
from ..postgres.session import Session
from ..postgres.waiter import Waiter
from ..triggers.definitions import Definition
from .clock import ServerClock
from .session_checks import (
    IN_RECOVERY,
    explaining_read_only,
    listen_to,
    refuse_standby,
    server_time,
)
from .trigger_watch import Triggers, TriggerWatch

# After a connection that lasted this long, the pauses between tries begin anew from the shortest.
HEALTHY_SECONDS = 60.0


class ConnectAnew(DatabaseError):
    """There is something else to read, which connecting again finds, at once."""


@dataclass(frozen=True)
class Timing:
    """Patience with the server, in seconds.

    Every ``heartbeat`` seconds the source notifies itself; if nothing has come after ``timeout``,
    it gives the connection up. ``timeout`` also bounds connecting, and ``statement`` each statement
    that reads the catalogue or installs, with its wait for locks.
    """

    heartbeat: float = 30.0
    timeout: float = 10.0
    statement: float = 60.0


class ConnectionSettings(Protocol):
    """The connection strings of a source, and its patience."""

    @property
    def dsn(self) -> str:
        """The connection string for the catalogue and for installing."""

    @property
    def session_dsn(self) -> str:
        """The connection string of the session that the source reads in."""

    @property
    def timing(self) -> Timing:
        """The patience with the server."""


class Preparer(Triggers, Protocol):
    """Prepares all that a source needs before it can read, through an ordinary connection."""

    def define(self, cursor: Cursor) -> Sequence[Definition]:
        """Resolve the watchers; return the definitions to read."""

    def install(self, cursor: Cursor, definitions: Sequence[Definition]) -> None:
        """Make sure that the triggers are there. Called when the source is listening already."""

    @property
    def missing(self) -> str:
        """Why some of the triggers are not there; empty if all are."""


class SessionThread(ABC):
    """Opens a session, reads in it, and opens another whenever it is lost.

    ``purpose`` says, in errors, what the session is for. The thread is taken for hung when no turn
    of its loop has begun for ``turn_seconds`` and the timeout.
    """

    def __init__(
        self,
        settings: ConnectionSettings,
        preparer: Preparer,
        meter: Meter,
        purpose: str,
        turn_seconds: float,
    ) -> None:
        self._dsn = settings.dsn
        self._listen_dsn = settings.session_dsn
        self._timing = settings.timing
        self._preparer = preparer
        self._meter = meter
        self._purpose = purpose
        self._turn_seconds = turn_seconds
        self._waiter = Waiter()
        self._backoff = Backoff()
        self._stopping = False
        self._thread = Thread("source", self._run)
        self._session: Session | None = None
        self._clock = ServerClock()
        self._turned_at = time.monotonic()
        self.own_channel = f"pgsignals_ping_{secrets.token_hex(8)}"
        self.triggers = TriggerWatch(
            self._dsn, self._timing.timeout, self._timing.statement, preparer
        )
        self.invalid = 0
        self.reconnects = 0
        # By OID, the messages of tables that are not, or no longer, the watched ones.
        self.foreign: Counter[int] = Counter()

    @property
    def is_connected(self) -> bool:
        """Whether the source has a session to read in."""
        return self._session is not None

    @property
    def is_alive(self) -> bool:
        """Whether the thread reads without hanging, or connects again."""
        # In this order, since a new session's first turn is noted before the session is.
        if self._session is None or not self._thread.is_alive():
            return self._thread.is_alive()
        return time.monotonic() - self._turned_at <= self._turn_seconds + self._timing.timeout

    @property
    def failure(self) -> str:
        """The error that has ended the thread; empty if there was none."""
        return self._thread.failure

    def now(self) -> datetime:
        """Return the server's time, late by the network's delay at most."""
        return self._clock.now()

    def start(self) -> None:
        """Connect once in the caller's thread, so that it gets the error, then read."""
        try:
            self._open()
        except (psycopg2.OperationalError, psycopg2.InterfaceError, OSError) as error:
            raise ConnectError(
                f"Connected to PostgreSQL at {display(self._listen_dsn)}, but {self._purpose} "
                f"could not begin: {error_text(error)}"
            ) from error
        self._thread.start()

    def wake(self) -> None:
        """Wake the thread, which begins its next turn at once."""
        self._waiter.wake()

    def stop(self, timeout: float) -> None:
        """Stop reading and close the session, waiting at most ``timeout`` seconds."""
        self._stopping = True
        self._waiter.wake()
        if not self._thread.began:
            self._close()
            self._waiter.close()
        # A callback that this thread makes may stop the Hub.
        elif self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def abandon(self) -> None:
        """In the child of a fork, close our copies of the descriptors, and send nothing."""
        self._waiter.close()
        if self._session is not None:
            self._session.abandon()

    @abstractmethod
    def _listen(self, session: Session, cursor: Cursor, definitions: Sequence[Definition]) -> None:
        """Begin to listen in the new session, before anything is installed."""

    @abstractmethod
    def _begin(
        self, session: Session, definitions: Sequence[Definition], asked_at: datetime, cast: Cast
    ) -> None:
        """Begin to read in the new session; the definitions were resolved after ``asked_at``."""

    @abstractmethod
    def _read(self, session: Session) -> None:
        """Read until the source is stopped; raise if the session is lost."""

    @abstractmethod
    def _lost(self, error: Exception) -> None:
        """Note that the session is lost."""

    @abstractmethod
    def _regained(self) -> None:
        """Note that there is a session again."""

    @property
    def _cancelled(self) -> bool:
        """Whether a statement under way is to be given up, since the source stops."""
        return self._stopping

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._read_once()
        finally:
            self._close()
            self._waiter.close()

    def _read_once(self) -> None:
        """Read until the source is stopped, or the session is lost; then open another session."""
        session, began = self._session, time.monotonic()
        assert session is not None
        try:
            self._read(session)
        except ConnectAnew as error:
            log.info("%s", error)
            self._close()
            self._reconnect(at_once=True)
        # Any error, an unknown one too: without the thread the Hub would be deaf for good.
        except Exception as error:
            if self._stopping:
                return
            if time.monotonic() - began > HEALTHY_SECONDS:
                self._backoff.reset()
            known = isinstance(error, psycopg2.Error | OSError | DatabaseError)
            log.warning(
                "lost the connection, and connecting again: %s",
                error_text(error),
                exc_info=not known,
            )
            self._close()
            self._lost(error)
            self._reconnect()

    def _reconnect(self, at_once: bool = False) -> None:
        """Connect again, with pauses between tries, until it succeeds or the source is stopped."""
        while not self._stopping:
            if not at_once:
                self._waiter.sleep(self._backoff.next(), lambda: self._stopping)
            at_once = False
            if self._stopping:
                return
            try:
                self._open()
            # Any error: a plugin's resolver, which is asked each time, may raise anything.
            except Exception as error:
                log.warning("still not connected, and trying again: %s", error_text(error))
                continue
            self.reconnects += 1
            self._meter.count("reconnects")
            self._regained()
            return

    def _open(self) -> None:
        """Connect, listen, install, and begin to read."""
        log.debug("connecting to %s", display(self._listen_dsn))
        timeout = self._timing.timeout
        connection = connect(self._dsn, timeout, self._timing.statement)
        session = Session(self._listen_dsn, self._waiter, lambda: self._cancelled)
        try:
            with connection.cursor() as cursor:
                cursor.execute(IN_RECOVERY)
                refuse_standby(self._dsn, cursor.fetchall())
                asked_at = server_time(cursor)
                definitions = self._preparer.define(cursor)
                encoding = connection.info.parameter_status("server_encoding")
                session.open(timeout, encoding or "UTF8")
                refuse_standby(self._listen_dsn, session.execute(IN_RECOVERY, timeout=timeout))
                self._listen(session, cursor, definitions)
                with explaining_read_only(self._dsn):
                    self._preparer.install(cursor, definitions)
                cast = make_cast(connection)
            self._begin(session, definitions, asked_at, cast)
        except BaseException:
            session.close()
            raise
        finally:
            connection.close()
        self._turned_at = time.monotonic()
        self._session = session

    def _refuse(self) -> None:
        """Count a payload that cannot be read."""
        self.invalid += 1
        self._meter.count("invalid_payloads")

    def _prove_round_trip(self, session: Session, cursor: Cursor) -> None:
        """Raise ConnectError unless a notification from ``cursor``'s session reaches ``session``.

        Otherwise the Hub would be deaf behind a pooler that pools transactions, where LISTEN
        succeeds and nothing ever arrives. The notification is sent by the other connection: one
        that a session sends to itself may come back even there, with the answer. ``session`` is
        then set up to be kept.
        """
        channel, timeout = self.own_channel, self._timing.timeout
        session.execute(listen_to(channel), timeout=timeout)
        [(ours,)] = session.execute("SELECT pg_catalog.pg_backend_pid()", timeout=timeout)
        cursor.execute(
            "SELECT pg_catalog.pg_backend_pid(), pg_catalog.pg_notify(%s, '')", (channel,)
        )
        [(others, _)] = cursor.fetchall()
        deadline = time.monotonic() + timeout
        while not any(notify.channel == channel for notify in session.receive()):
            # Two connections that share a backend are behind a pooler: do not wait for the timeout.
            if others == ours or time.monotonic() >= deadline or self._stopping:
                raise ConnectError(
                    f"At {display(self._listen_dsn)} LISTEN succeeds, but no notification arrives "
                    f"(within {timeout:g} s). PgBouncer with pool_mode=transaction (or statement) "
                    "does that: keep the pooled DSN, and give a direct one to listen on with "
                    "listen_dsn=. Both must lead to the same database of the same server."
                )
            session.wait(deadline - time.monotonic())
        session.keep(timeout)

    def _close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            with contextlib.suppress(psycopg2.Error):
                session.close()
