"""When a consumer looks for something new: quick, and at next to no cost for writers."""

from __future__ import annotations

import time

from .cursors import Snapshot
from .log import OutboxLog

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


class Wakefulness:
    """When to look again: often while there is something, seldom when writers will say so.

    Awake, a consumer holds a lock by which writers see that they need not notify, unless another
    one holds it, who then tells of what it finds. Before it sleeps, it gives the lock back and
    waits for the end of the transactions that may have seen it.
    """

    def __init__(self) -> None:
        self.awake = True
        self.held = False
        self.company = True
        self.stirred = False
        self.seen: Snapshot | None = None
        self._told_at = 0.0
        self._roused_at = time.monotonic()
        self._dozing: Snapshot | None = None
        self._dozed_at = 0.0
        self._asked_at = 0.0

    def wake(self, now: float) -> None:
        """There is something, or may be."""
        self.awake = True
        self._dozing = None
        self._roused_at = now

    def pause(self, store: OutboxLog, now: float, worked: float) -> float:
        """Seconds until the next look, if nothing is heard before; the last took ``worked``."""
        if self.stirred and self.company and now - self._told_at >= WAKE_OTHERS_SECONDS:
            store.wake_others()
            self.stirred, self._told_at = False, now
        if self.awake:
            if now - self._roused_at < LINGER_SECONDS or (self.stirred and self.company):
                return min(BUSY_SECONDS, max(LOOK_SECONDS, 2 * worked))
            self.awake = False
            if not self.held:
                return SLEEP_SECONDS
            store.release_awake()
            self.held = False
            self._dozing = store.poll(awake=True).snapshot
            self._dozed_at = self._asked_at = now
            return LOOK_SECONDS
        if self._dozing is None:
            return SLEEP_SECONDS
        if self.seen is not None and self.seen.xmin >= self._dozing.xmax:
            self._dozing = None
        elif now - self._asked_at >= 1.0:
            # Some transaction is long: one that has not written to the outbox is none of ours.
            self._asked_at = now
            if not store.writers_under_way():
                self._dozing = None
        if self._dozing is None:
            # One more look, since what was waited for may have just ended.
            return 0.0
        return LOOK_SECONDS if now - self._dozed_at < LINGER_SECONDS else DOZE_SECONDS
