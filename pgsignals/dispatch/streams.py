"""``stream``: events to iterate over, from plain code and from asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Generic, Protocol, TypeVar

from ..core.errors import ConfigurationError
from ..core.events import Event, Gap
from ..core.process import notice_fork

Item = TypeVar("Item", Event, "Event | Gap")


class Ending(Protocol):
    """Something that ends when its Hub is stopped."""

    def close(self) -> None:
        """End, since the Hub is stopped."""

    def forked(self) -> None:
        """In the child of a fork, renew locks, which threads that are not here may hold."""


class Stream(Generic[Item]):
    """Iterates over events as they come, until ``close`` or the Hub's end.

    It holds ``maxsize`` events at most. When it is read too slowly, what no longer fits is dropped
    and a Gap with the reason ``overflow`` stands in its place if the stream was made with
    ``gaps=True``; otherwise iterating raises OverflowError there, so that no loss goes unheard.
    """

    def __init__(self, maxsize: int, gaps: bool) -> None:
        if maxsize < 1:
            raise ConfigurationError(f"maxsize={maxsize!r}: a stream holds at least one event.")
        self._maxsize = maxsize
        self._gaps = gaps
        self._items: deque[Event | Gap] = deque()
        self._condition = threading.Condition()
        self._closed = False
        self._lost: list[Event] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._on_close: Callable[[], None] = lambda: None

    def put(self, item: Event | Gap) -> None:
        """Append an event; called by workers."""
        with self._condition:
            if self._closed or (isinstance(item, Gap) and not self._gaps):
                return
            if len(self._items) >= self._maxsize and isinstance(item, Event):
                self._lost = [*self._lost[:1], item]
            else:
                self._settle()
                self._items.append(item)
            self._wake()

    def close(self) -> None:
        """End the iteration once what has arrived is read."""
        notice_fork()
        with self._condition:
            if self._closed:
                return
            self._closed = True
            self._wake()
        self._on_close()

    def forked(self) -> None:
        """In the child of a fork, end: nothing will come, and the lock may be held for ever."""
        self._condition = threading.Condition()
        self._closed = True

    def _wake(self) -> None:
        self._condition.notify()
        if self._loop is not None:
            # The loop may have ended with the stream still open.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._resolve)

    def _resolve(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _settle(self) -> None:
        """Put the Gap where events were dropped, if any were."""
        if self._lost:
            first, last = self._lost[0], self._lost[-1]
            self._lost = []
            self._items.append(Gap(first.at, last.at, "overflow", "the stream was read too slowly"))

    def _take(self) -> Item | None:
        if not self._items:
            self._settle()
        if not self._items:
            return None
        item = self._items.popleft()
        if isinstance(item, Gap) and not self._gaps:
            raise OverflowError(
                f"The stream lost events from {item.since} to {item.until}: it holds "
                f"{self._maxsize} and was read too slowly. Raise maxsize=, or pass gaps=True to "
                "get the loss as a Gap and go on."
            )
        return item  # type: ignore[return-value]

    def get(self, timeout: float | None = None) -> Item | None:
        """Return the next item; None after ``timeout`` seconds, or when the stream has ended."""
        notice_fork()
        with self._condition:
            self._condition.wait_for(lambda: self._items or self._lost or self._closed, timeout)
            return self._take()

    def __iter__(self) -> Stream[Item]:
        return self

    def __next__(self) -> Item:
        item = self.get()
        if item is None:
            raise StopIteration
        return item

    def __aiter__(self) -> Stream[Item]:
        return self

    async def __anext__(self) -> Item:
        notice_fork()
        loop = asyncio.get_running_loop()
        while True:
            with self._condition:
                item = self._take()
                if item is not None:
                    return item
                if self._closed:
                    raise StopAsyncIteration
                self._loop = loop
                self._waiter = loop.create_future()
            await self._waiter

    def __enter__(self) -> Stream[Item]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> Stream[Item]:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
