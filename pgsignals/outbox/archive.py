"""Reads again what the outbox still holds, for those who come back to it with a resume token."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import psycopg2

from ..consumers.schema import LOCK_WAIT
from ..postgres.session import Session
from ..postgres.waiter import Waiter
from .cursors import Snapshot, Window
from .log import read_statement
from .reader import Row
from .resume_tokens import ALL, Emptied, ResumePoint

Answer = TypeVar("Answer")

# Somebody who is slow holds a page in memory.
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
    """A page of a point's window: ``whole`` when it is the last.

    ``lost``: something that belongs there may be gone. ``ahead``: the point is of a time that the
    database has not reached, or not again.
    """

    rows: list[Row]
    whole: bool
    lost: bool
    ahead: bool


class Archive:
    """One session for all who come back, who take turns; any thread may call it."""

    def __init__(self, dsn: str, encoding: str, timeout: float) -> None:
        self._dsn = dsn
        self._encoding = encoding
        self._timeout = timeout
        self._lock = threading.Lock()
        self._waiter: Waiter | None = None
        self._session: Session | None = None
        self._closed = False

    def read(self, point: ResumePoint) -> Found:
        """The next rows of the window that the point is in; it has a target.

        Raises psycopg2.Error, OSError and ConnectError when the database does not answer.
        """
        assert point.target is not None
        window = Window.between(point.since, point.target, 0)
        # Of a row of which not all events are known, the rest is wanted.
        behind = point.last_id if point.number == ALL else point.last_id - 1
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
            # Only afterwards, so that what was emptied before the rows were read is known.
            lost, ahead = self._look(session, point)
            return Found(rows, not _is_full(rows), lost, ahead)

        return self._ask(ask)

    def check(self, point: ResumePoint) -> tuple[bool, bool]:
        """Whether something may be lost, and whether the point is ahead, as in Found."""
        return self._ask(lambda session: self._look(session, point))

    def close(self) -> None:
        """End the session; safe to call twice."""
        # Whoever waits for an answer gives up, and the next one does not begin to.
        self._closed = True
        if (waiter := self._waiter) is not None:
            waiter.wake()
        with self._lock:
            self._drop()

    def abandon(self) -> None:
        """In the child of a fork: the lock may be held, and the session is the parent's."""
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
        # A server that does not answer costs each the time of one try, however many there are.
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
    # Rows are counted in characters here, and cut by bytes there, of which four make one.
    size = sum(len(row.payload) for row in rows)
    return bool(rows) and (len(rows) >= PAGE_ROWS or 4 * size >= PAGE_BYTES)
