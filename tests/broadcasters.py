"""Broadcasters that note what they are given."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pgsignals
from pgsignals.core.events import Message, Topic
from tests.conftest import DEADLINE, Recorder


class Broker:
    """A broadcaster that can be away, and remembers what it has acknowledged."""

    def __init__(self) -> None:
        self.away = threading.Event()
        self.refused = threading.Event()
        self.closed = threading.Event()
        self.acknowledged = Recorder()
        self._published: list[pgsignals.Event | pgsignals.Gap] = []

    def __str__(self) -> str:
        return "broker://test"

    def publish(self, events: Sequence[pgsignals.Event]) -> None:
        self._published += events

    def flush(self, timeout: float) -> bool:
        published, self._published = self._published, []
        if self.away.is_set():
            if published:
                self.refused.set()
            return False
        for item in published:
            self.acknowledged(item)
        return True

    def announce(self, gap: pgsignals.Gap) -> None:
        self._published.append(gap)

    def close(self) -> None:
        self.closed.set()


def topic(key: tuple[str, ...] = ("id",)) -> Topic:
    """A topic of updates without values."""
    return Topic("t", "updated", None, "public", "t", key, (), False, lambda session, ids: [])


def message(number: int, *rows: tuple[Any, ...], moved: bool = False) -> Message:
    """A message that carries the rows."""
    return Message(TOPIC, 1, number, 0, {}, rows, moved)


TOPIC = topic()


class Collector:
    """A broadcaster that notes what each thread was given."""

    def __init__(self) -> None:
        self.by_id: dict[Any, list[int]] = defaultdict(list)
        self.threads: dict[Any, set[str]] = defaultdict(set)
        self.order: list[tuple[int, Any]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.closed = False

    def publish(self, events: Any) -> None:
        """Note the events, once the gate is open."""
        self.gate.wait(DEADLINE)
        for event in events:
            self.by_id[str(event.id)].append(event._message.sequence)
            self.threads[str(event.id)].add(threading.current_thread().name)
            self.order.append((event._message.sequence, event.id))

    def flush(self, timeout: float) -> bool:
        """Nothing is ever under way."""
        return True

    def close(self) -> None:
        """Note that it was closed."""
        self.closed = True
