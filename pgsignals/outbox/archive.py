"""Reads again what the outbox still holds, for readers that come back with a resume token."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import psycopg2

from ..consumers.decoding import Row
from ..consumers.schema import LOCK_WAIT
from ..postgres.session import Session
from ..postgres.snapshot import Snapshot
from ..postgres.waiter import Waiter
from .cursors import Window
from .log import read_statement
from .resume_tokens import ALL, Emptied, ResumePoint

Answer = TypeVar("Answer")

# Smaller pages than a consumer's: each slow reader keeps one in memory.
PAGE_ROWS = 200
PAGE_BYTES = 32 << 10

_STATE = """
SELECT pg_catalog.pg_current_snapshot()::text, shed.last_value, gone.emptied_id,
       gone.emptied_snapshot
FROM pgsignals.outbox_shed AS shed
LEFT JOIN LATERAL (
  SELECT emptied_id, emptied_snapshot FROM pgsignals.segments
  WHERE emptied_id IS NOT NULL ORDER BY emptied_id DESC LIMIT 1
) AS gone ON true
"""


@dataclass(frozen=True)
class Found:
    """A page of the rows of a point's window; ``whole`` if it is the window's last.

    ``lost``: rows that belong to the window may be gone. ``ahead``: the database has not reached
    the point, or not again since it went back in time.
    """

    rows: list[Row]
    whole: bool
    lost: bool
    ahead: bool


class Archive:
    """One session for all readers that come back, which take turns; any thread may call it."""

    def __init__(self, dsn: str, encoding: str, timeout: float) -> None:
        self._dsn = dsn
        self._encoding = encoding
        self._timeout = timeout
        self._lock = threading.Lock()
        self._waiter: Waiter | None = None
        self._session: Session | None = None
        self._closed = False

    def read(self, point: ResumePoint) -> Found:
        """Read the next rows of the window that the point is in; the point must have a target.

        Raises psycopg2.Error, OSError and ConnectError when the database does not answer.
        """
        assert point.target is not None
        window = Window.between(point.since, point.target, 0)
        # A row of which the reader has only some events is read again, for the rest of them.
        behind = point.last_id if point.number == ALL else point.last_id - 1
        # Where none has ended of those that ran at its beginning, a window has rows of transactions
        # from ``xmax`` on alone, whose ids are above ``high``.
        after = max(point.floor if window.ended else point.high, behind)

        def ask(session: Session) -> Found:
            found = session.execute(
                "EXECUTE pgsignals_reread (%s, %s, %s::bigint[], %s, %s::bigint[])",
                (
                    after,
                    window.since.xmax,
                    list(window.ended),
                    window.target.xmax,
                    list(window.target.running),
                ),
                timeout=self._timeout,
            )
            rows = [Row(row[0], row[1], row[2], session.text(row[3])) for row in found]
            # Only after the rows: otherwise a segment emptied in between would go unnoticed.
            lost, ahead = self._look(session, point)
            return Found(rows, not _is_full(rows), lost, ahead)

        return self._ask(ask)

    def check(self, point: ResumePoint) -> tuple[bool, bool]:
        """Whether something may be lost, and whether the point is ahead, as in Found."""
        return self._ask(lambda session: self._look(session, point))

    def close(self) -> None:
        """End the session; safe to call twice."""
        # Before the lock: a thread that waits for an answer gives up, and lets go of the lock.
        self._closed = True
        if (waiter := self._waiter) is not None:
            waiter.wake()
        with self._lock:
            self._drop()

    def abandon(self) -> None:
        """Give up all in the child of a fork: the lock may be held, the session is the parent's."""
        self._lock = threading.Lock()
        self._closed = True
        if self._session is not None:
            self._session.abandon()
            self._session = None
        if self._waiter is not None:
            self._waiter.close()
            self._waiter = None

    def _look(self, session: Session, point: ResumePoint) -> tuple[bool, bool]:
        [(snapshot, shed, emptied_id, emptied_snapshot)] = session.execute(
            _STATE, timeout=self._timeout
        )
        lost = shed > point.shed
        if emptied_id is not None:
            lost = lost or point.lacks(Emptied(emptied_id, Snapshot.parse(emptied_snapshot)))
        return lost, point.reached.xmax > Snapshot.parse(snapshot).xmax

    def _ask(self, ask: Callable[[Session], Answer]) -> Answer:
        # Otherwise, behind a server that does not answer, each reader would wait for all others.
        if not self._lock.acquire(timeout=self._timeout):
            raise TimeoutError("the database has not answered others either")
        try:
            if self._closed:
                raise psycopg2.InterfaceError("the session is closed")
            try:
                return ask(self._opened())
            except BaseException:
                self._drop()
                raise
        finally:
            self._lock.release()

    def _opened(self) -> Session:
        if self._session is None:
            waiter = self._waiter = Waiter()
            session = self._session = Session(self._dsn, waiter, lambda: self._closed)
            session.open(self._timeout, self._encoding)
            session.keep(self._timeout)
            session.execute(
                f"SET lock_timeout TO '{LOCK_WAIT}';"
                " SET enable_seqscan TO off; SET enable_bitmapscan TO off; SET jit TO off;"
                " SET plan_cache_mode TO force_generic_plan;"
                + read_statement("pgsignals_reread", PAGE_ROWS, PAGE_BYTES),
                timeout=self._timeout,
            )
        return self._session

    def _drop(self) -> None:
        session, self._session = self._session, None
        waiter, self._waiter = self._waiter, None
        if session is not None:
            session.close()
        if waiter is not None:
            waiter.close()


def _is_full(rows: list[Row]) -> bool:
    # The server cuts a page by bytes, and up to four of them are one character here. A page that
    # may have been cut is taken for full: otherwise the rest of the window would be lost.
    size = sum(len(row.payload) for row in rows)
    return bool(rows) and (len(rows) >= PAGE_ROWS or 4 * size >= PAGE_BYTES)
