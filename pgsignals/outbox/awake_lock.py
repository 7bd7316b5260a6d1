"""When a consumer looks for something new: quick, and at next to no cost for writers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ..triggers import names
from .cursors import Snapshot

# Awake, it looks this often; less often while reading takes its time, which is then the writers'.
LOOK_SECONDS = 0.002
BUSY_SECONDS = 0.004
# Without anything new for so long it goes to sleep.
LINGER_SECONDS = 0.1
# While transactions may still commit that saw it awake, and so sent no notification.
DOZE_SECONDS = 0.02
# The others stay awake for LINGER_SECONDS after each of these.
WAKE_OTHERS_SECONDS = 0.03
# Asleep, it looks all the same, in case a consumer died that had seen something.
SLEEP_SECONDS = 5.0


class AwakeLock:
    """When to look again: often while there is something, seldom when writers will say so.

    Awake, a consumer holds a lock by which writers see that they need not notify, unless another
    one holds it, who then tells of what it finds. Before it sleeps, it gives the lock back and
    waits for the end of the transactions that may have seen it. ``execute`` runs statements in the
    session that reads.
    """

    def __init__(self, execute: Callable[..., list[tuple[Any, ...]]]) -> None:
        self._execute = execute
        self.awake = True
        self._held = False
        # Whether there are consumers in other processes.
        self.company = True
        self._stirred = False
        self._seen: Snapshot | None = None
        self._told_at = 0.0
        self._roused_at = time.monotonic()
        self._dozing: Snapshot | None = None
        self._dozed_at = 0.0
        self._asked_at = 0.0

    @property
    def wanted(self) -> bool:
        """Whether a look is to try to get the lock."""
        return self.awake and not self._held

    def looked(self, seen: Snapshot, held: bool) -> None:
        """Take note of a look: whether the lock was held, if it was wanted."""
        self._seen = seen
        if self.awake:
            self._held = held

    def wake(self) -> None:
        """There is something, or may be."""
        self.awake = True
        self._dozing = None
        self._roused_at = time.monotonic()

    def stir(self) -> None:
        """There may be something for the others, who are told with the next pause."""
        self._stirred = True

    def pause(self, worked: float) -> float:
        """Seconds until the next look, if nothing is heard before; the last took ``worked``."""
        now = time.monotonic()
        if self._stirred and self.company and now - self._told_at >= WAKE_OTHERS_SECONDS:
            self._execute(names.wake_statement("awake"))
            self._stirred, self._told_at = False, now
        if self.awake:
            if now - self._roused_at < LINGER_SECONDS or (self._stirred and self.company):
                return min(BUSY_SECONDS, max(LOOK_SECONDS, 2 * worked))
            self.awake = False
            if not self._held:
                return SLEEP_SECONDS
            self._release()
            self._dozed_at = self._asked_at = now
            return LOOK_SECONDS
        if self._dozing is None:
            return SLEEP_SECONDS
        if self._seen is not None and self._seen.xmin >= self._dozing.xmax:
            self._dozing = None
        elif now - self._asked_at >= 1.0:
            # Some transaction is long: one that has not written to the outbox is none of ours.
            self._asked_at = now
            if not self._writers_under_way():
                self._dozing = None
        if self._dozing is None:
            # One more look, since what was waited for may have just ended.
            return 0.0
        return LOOK_SECONDS if now - self._dozed_at < LINGER_SECONDS else DOZE_SECONDS

    def _release(self) -> None:
        """Let writers send a notification again."""
        self._execute(
            "SELECT pg_catalog.pg_advisory_unlock(%s, %s)", (names.LOCK_CLASS, names.AWAKE_LOCK)
        )
        self._held = False
        # Only now: whoever began before that may have seen the lock.
        [(snapshot,)] = self._execute("SELECT pg_catalog.pg_current_snapshot()::text")
        self._dozing = Snapshot.parse(snapshot)

    def _writers_under_way(self) -> bool:
        """Whether a transaction that has written to the outbox goes on."""
        [(found,)] = self._execute(
            "SELECT EXISTS (SELECT FROM pg_catalog.pg_locks"
            " WHERE relation = 'pgsignals.outbox'::pg_catalog.regclass"
            " AND mode = 'RowExclusiveLock' AND granted)"
        )
        return bool(found)
