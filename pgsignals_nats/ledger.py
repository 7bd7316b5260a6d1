"""The messages that a broadcaster has sent, what became of them, and how far it is."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

from .messages import Item


class Ledger:
    """Messages that were published and have not been counted as arrived.

    One that is known is not sent again when its event is published again: it would arrive behind
    what was sent after it. One that was refused is. The first failure is kept until it is taken.
    One thread publishes, and another hears what becomes of the messages.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._known: dict[str, Item] = {}
        # The uids of the events, in the order in which they were first published.
        self._order: deque[str] = deque()
        self._under_way = 0
        self._failure: str | None = None
        # How often sending has failed.
        self.failures = 0

    @property
    def unacknowledged(self) -> int:
        """The number of messages that are under way."""
        return self._under_way

    def lacks(self, uid: str) -> bool:
        """Whether the message of this uid is to be sent."""
        item = self._known.get(uid)
        return item is None or item.refused

    def send(self, items: Sequence[Item], *, counted: bool) -> None:
        """Note that messages are under way; those of events are ``counted``."""
        known = self._known
        if counted:
            self._order.extend([item.uid for item in items if item.uid not in known])
        for item in items:
            known[item.uid] = item
        with self._lock:
            self._under_way += len(items)

    def arrive(self, items: Sequence[Item]) -> None:
        """Note that the server has messages."""
        for item in items:
            item.arrived = True
        with self._lock:
            self._under_way -= len(items)
            self._changed.notify_all()

    def refuse(self, items: Sequence[Item], failure: str) -> None:
        """Note that the server does not have messages, and why."""
        with self._lock:
            for item in items:
                item.refused = True
            self._under_way -= len(items)
            self._note(failure)

    def lose_arrived(self, failure: str) -> None:
        """Note that messages which arrived are lost; any of them is a failure.

        Otherwise events that nobody has counted yet would not be published again.
        """
        with self._lock:
            lost = [item for item in self._known.values() if item.arrived]
            for item in lost:
                item.arrived, item.refused = False, True
            if lost:
                self._note(failure)

    def _note(self, failure: str) -> None:
        self.failures += 1
        if self._failure is None:
            self._failure = failure
        self._changed.notify_all()

    def take_failure(self) -> str | None:
        """Return the first failure since the last call."""
        with self._lock:
            failure, self._failure = self._failure, None
            return failure

    def count(self) -> int:
        """Return how many more events have arrived, with all before them, and forget these."""
        found = 0
        known, order = self._known, self._order
        while order and known[order[0]].arrived:
            del known[order.popleft()]
            found += 1
        return found

    def wait_for_first(self, timeout: float) -> None:
        """Wait until the first event arrives or sending fails."""
        order = self._order
        if order:
            self._wait(lambda: self._known[order[0]].arrived, timeout)

    def wait_for_all(self, timeout: float) -> bool:
        """Wait until nothing is under way or sending fails; return whether all has arrived."""
        return self._wait(lambda: not self._under_way, timeout) and self._failure is None

    def _wait(self, reached: Callable[[], bool], timeout: float) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or reached(), timeout)
            return reached()

    def clear(self) -> None:
        """Begin anew, since all has arrived."""
        self._known.clear()
        self._order.clear()
