"""A browser's EventSource, without a browser."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pgsignals.contrib.event_stream import EVERYTHING, View
from pgsignals.contrib.ring import RingClient, RingFeed
from tests.conftest import DEADLINE
from tests.waiting import eventually


@dataclass
class Browser:
    """What an EventSource makes of a stream: messages, and the id to go on from."""

    messages: list[tuple[str, Any]] = field(default_factory=list)
    last_id: str = ""
    retry: int | None = None
    comments: int = 0

    def receive(self, stream: bytes) -> list[tuple[str, Any]]:
        """The messages of ``stream``, whose data is JSON."""
        before = len(self.messages)
        data: list[str] = []
        kind = ""
        for line in stream.decode().split("\n"):
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if not line:
                if data:
                    self.messages.append((kind or "message", json.loads("\n".join(data))))
                data, kind = [], ""
            elif not name:
                self.comments += 1
            elif name == "data":
                data.append(value)
            elif name == "event":
                kind = value
            elif name == "id":
                self.last_id = value
            elif name == "retry":
                self.retry = int(value)
        return self.messages[before:]


class Tab:
    """A browser that reads a feed from a thread of its own server."""

    def __init__(self, feed: RingFeed[Any], browser: Browser, view: View = EVERYTHING) -> None:
        self._woken = threading.Event()
        self.browser = browser
        self.client: RingClient = feed.connect(browser.last_id or None, self._woken.set, view)
        browser.receive(self.client.opening())

    def more(self, enough: Callable[[], bool] = lambda: False) -> bytes:
        """The next piece, as soon as there is one; empty at the end, or when it is ``enough``."""
        deadline = time.monotonic() + DEADLINE
        while True:
            self._woken.clear()
            if (piece := self.client.read()) or self.client.ended:
                return piece
            while not self._woken.wait(0.1):
                if enough():
                    return b""
                assert time.monotonic() < deadline, f"only {self.browser.messages}"

    def wait(self, count: int) -> list[Any]:
        """The ids, or reasons of gaps, of all messages so far, which are so many at least."""
        while len(self.browser.messages) < count:
            self.browser.receive(self.more())
        return told(self.browser)

    def stay(self) -> None:
        """Have what is not for this browser, or for nobody, move its id on."""
        before = self.browser.last_id

        def after() -> str | None:
            self.browser.receive(self.client.read() + self.client.keepalive())
            return self.browser.last_id

        eventually(after, lambda last_id: last_id != before)


def told(browser: Browser) -> list[Any]:
    """The ids, or reasons of gaps, of the messages."""
    return [data["reason"] if kind == "gap" else data["id"] for kind, data in browser.messages]
