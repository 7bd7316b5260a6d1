"""The feeds of a Hub: each is opened once, and shared by all streams of its targets.

In durable delivery, opening a feed takes a connection to the database. A thread of its own makes
it, and no lock is held meanwhile: a database that does not answer holds up only callers that wait
for that feed, and these for as long as they like.
"""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

from ..core.errors import StateError
from ..core.process import after_fork
from ..core.threads import Thread
from ..hub.hub import Hub
from .resumable import check_targets, open_feed
from .ring import RingFeed
from .sse import feed_key

# The seconds that threads wait for a feed to be opened, counted from when that has begun.
PATIENCE_SECONDS = 2.0


class Opening:
    """A feed that is open, or being opened."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._future: Future[RingFeed[Any]] = Future()
        # So that no caller who waits may cancel it for the others.
        self._future.set_running_or_notify_cancel()

    @property
    def done(self) -> bool:
        """Whether ``wait`` returns, or raises, at once."""
        return self._future.done()

    @property
    def feed(self) -> RingFeed[Any] | None:
        """The feed, once it has been opened."""
        done = self._future.done() and self._future.exception() is None
        return self._future.result() if done else None

    @property
    def over(self) -> bool:
        """Whether another one is needed, since this one could not be opened, or has ended."""
        feed = self.feed
        return self._future.done() if feed is None else feed.closed

    def wait(self, patience: float | None = None) -> RingFeed[Any]:
        """Return the feed, opened within ``patience`` seconds since that began; by default, a few.

        Raises StateError if the feed cannot be opened, or not so soon.
        """
        patience = PATIENCE_SECONDS if patience is None else patience
        try:
            return self._future.result(max(0.0, self._began + patience - time.monotonic()))
        except FutureTimeoutError:
            raise StateError("The log cannot be read now: the database is slow.") from None

    async def awaited(self) -> RingFeed[Any]:
        """Return the feed, however long that takes. Raises StateError if it cannot be opened."""
        return await asyncio.wrap_future(self._future)

    def fill(self, hub: Hub, targets: Sequence[Any], size: int, ordered: bool) -> None:
        """Open the feed now."""
        try:
            self._future.set_result(open_feed(hub, *targets, size=size, ordered=ordered))
        # Whatever is raised, it is for the callers that wait.
        except BaseException as error:
            self._future.set_exception(error)


class Feeds:
    """The feeds of one Hub."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._lock = threading.Lock()
        self._openings: dict[Hashable, Opening] = {}
        _all.add(self)

    def open(self, targets: Sequence[Any], size: int, ordered: bool) -> Opening:
        """Return the feed of these targets, without waiting until it is open.

        Raises ReceiverError if no watcher delivers a target, and StateError if the Hub is not
        running.
        """
        hub, key = self._hub, (size, feed_key(targets))
        if not hub.running:
            raise StateError("The Hub is not running: there is nothing to stream.")
        with self._lock:
            opening = self._openings.get(key)
            if opening is not None and not opening.over:
                return opening
            opening = Opening()
            if hub._reads_log:
                # The caller gets the error for a wrong target, which the thread could only keep.
                check_targets(hub, targets, size)
                Thread("feed", opening.fill, hub, targets, size, ordered).start()
            else:
                opening.fill(hub, targets, size, ordered)
                opening.wait()
            self._openings[key] = opening
        return opening

    def values(self) -> list[RingFeed[Any]]:
        """Return the feeds that have been opened."""
        feeds = (opening.feed for opening in list(self._openings.values()))
        return [feed for feed in feeds if feed is not None]

    def forked(self) -> None:
        """Forget them in the child of a fork: they are the parent's, and the lock may be held."""
        self._lock = threading.Lock()
        self._openings = {}


_all: weakref.WeakSet[Feeds] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for feeds in list(_all):
        feeds.forked()


after_fork(_after_fork_in_child)
