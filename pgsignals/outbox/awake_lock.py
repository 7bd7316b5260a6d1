"""The times at which a consumer polls the outbox: soon, and at next to no cost for writers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ..postgres.snapshot import Snapshot
from ..triggers import names

# Seconds between two polls of an awake consumer, up to BUSY_SECONDS where reading takes long, which
# leaves that time to the writers.
LOOK_SECONDS = 0.002
BUSY_SECONDS = 0.004
# A consumer that finds nothing new for so long goes to sleep.
LINGER_SECONDS = 0.1
# Seconds between two polls while transactions that saw the consumer awake, and so sent no
# notification, may still commit.
DOZE_SECONDS = 0.02
# The least time between two wake-ups of other consumers, each of which keeps them awake for
# LINGER_SECONDS.
WAKE_OTHERS_SECONDS = 0.03
# Seconds between two polls of a sleeping consumer, which polls in case an awake one died before it
# could wake the others.
SLEEP_SECONDS = 5.0


class AwakeLock:
    """Says when to poll again: often while there is something new, seldom when writers will notify.

    One awake consumer holds the lock, by which writers see that they need not notify, and wakes the
    others when it finds something. Before it sleeps, it releases the lock and goes on polling until
    the transactions that may have seen the lock have ended: otherwise their rows would wait for up
    to SLEEP_SECONDS. ``execute`` runs statements in the session that reads.
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
        """Whether the next poll should try to get the lock."""
        return self.awake and not self._held

    def looked(self, seen: Snapshot, held: bool) -> None:
        """Note what a poll has ``seen`` and, if the lock was wanted, whether it is ``held`` now."""
        self._seen = seen
        if self.awake:
            self._held = held

    def wake(self) -> None:
        """Stay awake from now on, since there is something new, or may be."""
        self.awake = True
        self._dozing = None
        self._roused_at = time.monotonic()

    def stir(self) -> None:
        """Wake the other consumers with the next pause, since there may be something for them."""
        self._stirred = True

    def pause(self, worked: float) -> float:
        """Seconds until the next poll unless a notification comes; reading took ``worked``."""
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
            # A long transaction that has not written to the outbox is not waited for.
            self._asked_at = now
            if not self._writers_under_way():
                self._dozing = None
        if self._dozing is None:
            # Poll once more: the transaction waited for may have committed after the last poll.
            return 0.0
        return LOOK_SECONDS if now - self._dozed_at < LINGER_SECONDS else DOZE_SECONDS

    def _release(self) -> None:
        """Let writers send a notification again."""
        self._execute(
            "SELECT pg_catalog.pg_advisory_unlock(%s, %s)", (names.LOCK_CLASS, names.AWAKE_LOCK)
        )
        self._held = False
        # Only after the release: a transaction that began before may have seen the lock.
        [(snapshot,)] = self._execute("SELECT pg_catalog.pg_current_snapshot()::text")
        self._dozing = Snapshot.parse(snapshot)

    def _writers_under_way(self) -> bool:
        """Whether a transaction that has written to the outbox is under way."""
        [(found,)] = self._execute(
            "SELECT EXISTS (SELECT FROM pg_catalog.pg_locks"
            " WHERE relation = 'pgsignals.outbox'::pg_catalog.regclass"
            " AND mode = 'RowExclusiveLock' AND granted)"
        )
        return bool(found)
