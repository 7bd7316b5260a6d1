"""The messages of a broadcaster before they are acknowledged, one of each record at a time."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(eq=False, slots=True)
class Item:
    """A message, from when it is published to when it is acknowledged."""

    uid: str
    subject: str
    payload: bytes
    headers: dict[str, str]
    record: object
    sent_at: float = 0.0


class RecordQueue:
    """Messages to send, in the order of each record, and those that are under way, by a token.

    No message of a record is given out before the one before it is ``done``: otherwise one that
    fails would be overtaken. Messages without a record wait for nobody. All of it belongs to one
    thread.
    """

    def __init__(self) -> None:
        self.under_way: dict[str, Item] = {}
        self._tokens = itertools.count()
        self._waiting: deque[Item] = deque()
        # The next messages of records whose turn it is.
        self._ready: deque[Item] = deque()
        # By record, while one of its messages is ready or under way, those that come after it.
        self._behind: dict[object, deque[Item]] = {}

    def __bool__(self) -> bool:
        """Whether there may be something to send."""
        return bool(self._ready or self._waiting)

    def add(self, items: Iterable[Item]) -> None:
        """Queue messages."""
        self._waiting.extend(items)

    def add_again(self, item: Item) -> None:
        """Queue a message that was under way, before the others of its record."""
        self._ready.append(item)

    def next(self) -> Item | None:
        """Return the next message to send; None if it has to wait for another of its record."""
        if self._ready:
            return self._ready.popleft()
        item = self._waiting.popleft()
        if item.record is not None:
            if item.record in self._behind:
                self._behind[item.record].append(item)
                return None
            self._behind[item.record] = deque()
        return item

    def send(self, item: Item) -> str:
        """Note that a message is under way; return the token to acknowledge it by."""
        token = f"{next(self._tokens):x}"
        self.under_way[token] = item
        return token

    def done(self, item: Item) -> None:
        """Let the next message of the record go."""
        if item.record is not None:
            behind = self._behind[item.record]
            if behind:
                self._ready.append(behind.popleft())
            else:
                del self._behind[item.record]

    def give_up(self, item: Item) -> list[Item]:
        """Remove the messages of the record behind ``item``; return all of them, with ``item``."""
        given_up = [item]
        if item.record is not None:
            given_up += self._behind.pop(item.record, ())
            given_up += [each for each in self._waiting if each.record == item.record]
            self._waiting = deque(each for each in self._waiting if each.record != item.record)
        return given_up

    def give_up_all(self) -> list[Item]:
        """Remove all messages, and return them."""
        items = [
            *self.under_way.values(),
            *self._ready,
            *itertools.chain(*self._behind.values()),
            *self._waiting,
        ]
        self.under_way.clear()
        self._ready.clear()
        self._behind.clear()
        self._waiting.clear()
        return items
