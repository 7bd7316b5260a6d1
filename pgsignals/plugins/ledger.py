"""A ledger of the events that a broadcaster of a plugin has sent, and of their fate."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from typing import Generic, TypeVar

Failure = TypeVar("Failure")


class SentLedger(Generic[Failure]):
    """The uids that were sent since the last flush that succeeded, and why sending failed.

    A uid in the ledger is not sent again when its event is published again: it would arrive behind
    what was sent after it. A refused uid leaves the ledger, and its event is sent again. The
    first failure is kept until it is taken. Any thread may use the ledger.
    """

    def __init__(self) -> None:
        # Each event takes this lock; that of a Condition by itself costs several times more.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._under_way: set[str] = set()
        self._acknowledged: set[str] = set()
        self._failure: Failure | None = None

    def __contains__(self, uid: str) -> bool:
        # Without the lock: a uid is acknowledged before it ceases to be under way.
        return uid in self._under_way or uid in self._acknowledged

    @property
    def unacknowledged(self) -> int:
        """The number of uids that are under way."""
        return len(self._under_way)

    def send(self, uid: str) -> None:
        """Note that a uid is under way."""
        self._under_way.add(uid)

    def acknowledge(self, uid: str) -> None:
        """Note that the broker has a uid's event, unless the uid was given up meanwhile."""
        with self._lock:
            if uid in self._under_way:
                self._acknowledged.add(uid)
                self._under_way.remove(uid)
                if not self._under_way:
                    self._changed.notify_all()

    def refuse(self, uids: Iterable[str], failure: Failure | None = None) -> None:
        """Note that the broker does not have the events of these uids, and why."""
        with self._lock:
            self._under_way.difference_update(uids)
            self._note(failure)

    def fail(self, failure: Failure) -> None:
        """Note what went wrong with the connection, or with all that is under way."""
        with self._lock:
            self._note(failure)

    def forget_acknowledged(self, failure: Failure) -> None:
        """Forget the acknowledged uids, which the broker has lost; any of them is a failure.

        Otherwise events that nobody has flushed yet would not be published again.
        """
        with self._lock:
            if self._acknowledged:
                self._acknowledged.clear()
                self._note(failure)

    def give_up(self) -> None:
        """Forget the uids that are under way, and the failure."""
        with self._lock:
            self._under_way.clear()
            self._failure = None

    def clear(self) -> None:
        """Begin anew, since all has arrived and is flushed, or all is to be sent again."""
        with self._lock:
            self._under_way.clear()
            self._acknowledged.clear()

    def take_failure(self) -> Failure | None:
        """Return the first failure since the last call."""
        with self._lock:
            failure, self._failure = self._failure, None
            return failure

    def wait(self, timeout: float) -> bool:
        """Wait until nothing is under way or sending failed; return whether all is acknowledged."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._failure is not None or not self._under_way, timeout
            )
            return self._failure is None and not self._under_way

    def _note(self, failure: Failure | None) -> None:
        if self._failure is None:
            self._failure = failure
        self._changed.notify_all()


class Chunk:
    """Events that were sent one after another; ``left`` of their messages have yet to arrive.

    ``uids`` are the events whose messages have all been sent; unless it ``counts``, they are of
    something else. Who sends counts ``left`` up before
    a message can arrive, and who hears of its arrival counts it down, not of its refusal.
    """

    __slots__ = ("counts", "left", "uids")

    def __init__(self) -> None:
        self.counts = True
        self.left = 0
        self.uids: list[str] = []


class ChunkLedger(Generic[Failure]):
    """Chunks of events in the order of their sending, for a broadcaster that is Pipelined.

    ``known`` are the uids of its chunks, which are not sent again when their events are published
    again: who sends enters each of them. ``arrived`` forgets them from the first on, as far as they
    have arrived. The first failure is kept until it is taken.
    """

    def __init__(self) -> None:
        self.known: set[str] = set()
        self._chunks: deque[Chunk] = deque()
        self._failure: Failure | None = None

    def open(self, chunk: Chunk) -> None:
        """Enter a chunk that is about to be sent."""
        self._chunks.append(chunk)

    def arrived(self) -> int:
        """Return how many more events have arrived, with all before them."""
        found = 0
        chunks = self._chunks
        while chunks and chunks[0].left == 0:
            chunk = chunks.popleft()
            self.known.difference_update(chunk.uids)
            if chunk.counts:
                found += len(chunk.uids)
        return found

    def fail(self, failure: Failure) -> None:
        """Note what went wrong."""
        if self._failure is None:
            self._failure = failure

    def take_failure(self) -> Failure | None:
        """Return the first failure since the last call."""
        failure, self._failure = self._failure, None
        return failure

    def give_up(self) -> None:
        """Forget all from the first chunk on that has not arrived, and the failure.

        Also what has arrived behind it: sent again, the events before it would come behind it.
        """
        kept = 0
        while kept < len(self._chunks) and self._chunks[kept].left == 0:
            kept += 1
        while len(self._chunks) > kept:
            self.known.difference_update(self._chunks.pop().uids)
        self._failure = None

    def clear(self) -> None:
        """Begin anew, since all has arrived and is flushed, or all is to be sent again."""
        self._chunks.clear()
        self.known.clear()
