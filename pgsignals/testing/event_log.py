"""The events and Gaps of a Hub, for assertions that wait instead of sleeping."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pgsignals
from pgsignals.core.events import Event, Gap, model_name
from pgsignals.hub.hub import Hub

_SHOWN = 20


class EventLog:
    """Remembers the events and Gaps of a Hub, by default the default one, from ``with`` on.

    It sees every event that the watchers deliver, whether or not a receiver listens, after that
    event's receivers have been called; batches come later.
    """

    def __init__(self, hub: Hub | None = None) -> None:
        self._hub = hub or pgsignals.default_hub
        self._condition = threading.Condition()
        self._events: list[Event] = []
        self._taken: set[int] = set()
        self.gaps: list[Gap] = []

    def __enter__(self) -> EventLog:
        self._hub._registry.observers += (self._see,)
        self._hub.gap.connect(self._see_gap)
        return self

    def __exit__(self, *_: object) -> None:
        registry = self._hub._registry
        registry.observers = tuple(o for o in registry.observers if o != self._see)
        self._hub.gap.disconnect(self._see_gap)

    def wait_for(self, target: Any, *ops: str, timeout: float = 5.0, **filters: Any) -> Event:
        """Return the first such event that was not returned before, within ``timeout`` seconds.

        Target, operations and filters are those of :func:`pgsignals.on`.
        Raises AssertionError, which lists what came instead, if none comes.
        """
        matches = self._hub._registry.matcher(target, ops, filters)
        deadline = time.monotonic() + timeout
        with self._condition:
            seen = 0
            while (found := self._first(matches, seen)) is None:
                seen = len(self._events)
                if not self._condition.wait(max(0.0, deadline - time.monotonic())):
                    raise AssertionError(
                        f"No event {_described(target, ops, filters)} within {timeout:g} s"
                        f"{self._others()}"
                    )
            self._taken.add(found)
            return self._events[found]

    def none(self, target: Any, *ops: str, timeout: float = 5.0, **filters: Any) -> None:
        """Assert that nothing committed so far was such an event, other than those returned.

        Raises AssertionError, also if a Gap says that events may be missing.
        """
        matches = self._hub._registry.matcher(target, ops, filters)
        self.settle(timeout)
        with self._condition:
            found = self._first(matches)
            if found is not None:
                raise AssertionError(
                    f"There is an event {_described(target, ops, filters)}: {self._events[found]!r}"
                )
            if self.gaps:
                raise AssertionError(
                    f"It cannot be told whether there was an event "
                    f"{_described(target, ops, filters)}: {self.gaps[0]!r}"
                )

    def all(self, target: Any, *ops: str, timeout: float = 5.0, **filters: Any) -> list[Event]:
        """Return all such events committed by now, those returned before, too, in order."""
        matches = self._hub._registry.matcher(target, ops, filters)
        self.settle(timeout)
        with self._condition:
            return [event for event in self._events if matches(event)]

    def settle(self, timeout: float = 5.0) -> None:
        """Wait until receivers have handled everything that is committed by now.

        Raises AssertionError if that takes more than ``timeout`` seconds, StateError if the Hub is
        not running.
        """
        if not self._hub._settle(timeout):
            raise AssertionError(
                f"What was committed has not been handled within {timeout:g} s: a receiver is "
                "slow, or the connection to the database is lost."
            )

    def _see(self, events: Sequence[Event]) -> None:
        with self._condition:
            self._events += events
            self._condition.notify_all()

    def _see_gap(self, hub: Hub, *, gap: Gap) -> None:
        with self._condition:
            self.gaps.append(gap)

    def _first(self, matches: Callable[[Event], bool], start: int = 0) -> int | None:
        """Return the number, from ``start`` on, of the first match that was not returned yet."""
        for number in range(start, len(self._events)):
            if number not in self._taken and matches(self._events[number]):
                return number
        return None

    def _others(self) -> str:
        if not self._hub.running:
            return ": the Hub is not running."
        others = [event for n, event in enumerate(self._events) if n not in self._taken]
        if not others and not self.gaps:
            return "; nothing else came. Was the transaction committed?"
        lines = [f"\n  {item!r}" for item in (*others[-_SHOWN:], *self.gaps)]
        return f"; what came (the last {_SHOWN} at most):{''.join(lines)}"


def _described(target: Any, ops: tuple[str, ...], filters: dict[str, Any]) -> str:
    texts = [model_name(target), *map(repr, ops), *(f"{k}={v!r}" for k, v in filters.items())]
    return f"({', '.join(texts)})"
