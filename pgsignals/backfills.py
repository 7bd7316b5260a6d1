"""The handle of a backfill: how far it is, its end, and ending it early."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from psycopg2.extensions import cursor as Cursor

from .connection import connect
from .errors import DatabaseError
from .outbox import backfill as administration
from .outbox.backfill import BackfillState

POLL_SECONDS = 0.2


class Backfill:
    """A backfill that was asked for; it goes on without this object.

    Each attribute asks the database: ``status`` has them all from one moment.
    """

    def __init__(self, dsn: str, number: int) -> None:
        self._dsn = dsn
        self.id = number

    @property
    def status(self) -> BackfillState:
        """How it stands. Raises DatabaseError once it is forgotten, days after its end."""
        with self._opened() as cursor:
            return administration.backfill(cursor, self.id)

    @property
    def state(self) -> str:
        """``running``, ``done``, ``failed`` or ``cancelled``."""
        return self.status.state

    @property
    def done(self) -> int:
        """How many rows it has gone through, whose events are acknowledged."""
        return self.status.done

    @property
    def total(self) -> int:
        """How many rows there are to go through: of many, as the planner estimates."""
        return self.status.total

    def wait(self, timeout: float | None = None) -> bool:
        """Block until all rows are delivered and acknowledged (True).

        False after ``timeout`` seconds, and when it is cancelled. Raises DatabaseError, with the
        reason, when it has failed.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        for status in self.follow():
            if status.state != "running":
                break
            if deadline is not None and time.monotonic() >= deadline:
                return False
        if status.state == "failed":
            raise DatabaseError(f"Backfill {self.id} of {status.target} failed: {status.error}")
        return status.state == "done"

    def follow(self, every: float = POLL_SECONDS) -> Iterator[BackfillState]:
        """How it stands, every so many seconds until it has ended."""
        with self._opened() as cursor:
            while True:
                status = administration.backfill(cursor, self.id)
                yield status
                if status.state != "running":
                    return
                time.sleep(every)

    def cancel(self) -> bool:
        """End it; what is with receivers is still delivered. False when it had ended already."""
        with self._opened() as cursor:
            return administration.cancel(cursor, self.id)

    def __repr__(self) -> str:
        return f"<Backfill {self.id}>"

    @contextmanager
    def _opened(self) -> Iterator[Cursor]:
        connection = connect(self._dsn)
        try:
            with connection.cursor() as cursor:
                yield cursor
        finally:
            connection.close()
