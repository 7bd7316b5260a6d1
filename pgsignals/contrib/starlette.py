"""Starlette and FastAPI: ``sse``, a response that tells a browser of changes."""

from __future__ import annotations

import asyncio
import signal
import time
import weakref
from collections.abc import Callable
from typing import Any

import pgsignals

from ..core.errors import MissingExtraError, StateError
from ..core.events import Event
from ..core.logging import log
from ..hub.hub import Hub
from ..plugins.within import within
from .event_stream import EVERYTHING, HEADERS, View
from .feeds import Feeds, Opening
from .ring import RingClient, RingFeed
from .shutdown import before_handlers
from .stream_options import LATER, StreamOptions, come_back

try:
    from anyio import CapacityLimiter, to_thread
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import Receive, Scope, Send
except ImportError as error:
    raise MissingExtraError(
        "pgsignals.contrib.starlette needs Starlette, which FastAPI has: "
        "pip install 'pgsignals[starlette]'"
    ) from error

# The seconds that position() may hold up the event loop while a feed opens, all calls together.
_LOOP_SECONDS = 0.25
# Reading has threads of its own: those that wait for the database are none of the application's.
_READING_THREADS = 40


def sse(
    request: Request,
    *targets: Any,
    hub: Hub | None = None,
    visible: Callable[[Event], bool] | None = None,
    data: Callable[[Event], Any] | None = None,
    name: Callable[[Event], str] | None = None,
    retry: int = 3000,
    keepalive: float = 15.0,
    lifetime: float = 3600.0,
    send_timeout: float = 60.0,
    size: int = 1000,
) -> Response:
    """Return a response that tells the browser of changes, for ``new EventSource(url)``.

    Each of ``targets`` is a model, a table's name, a label or a watcher, or a tuple of one and
    operations, of ``hub``, by default the default one. Every event is a message with JSON that
    names the record; every possible loss is one of the type ``gap``. A browser that connects again
    goes on where it was, by Last-Event-ID or by the parameter ``last-event-id``; if that position
    is not known here, or more than ``size`` events ago, it gets a ``gap``.

    ``visible`` says whether this browser may know of an event. ``data`` makes the message's data, a
    text or a value that becomes JSON, and ``name`` the message's type. They are plain functions,
    and called in a thread, so that they may wait. If one of them raises, the browser gets a ``gap``
    in place of the event.

    The browser connects again after ``retry`` milliseconds. After ``keepalive``
    seconds without an event something is sent all the same. After ``lifetime`` seconds the stream
    ends, so that the browser connects again and is authorised again. A browser that takes nothing
    for ``send_timeout`` seconds is given up. The streams end, too, when the server is told to end,
    by SIGTERM or Ctrl-C.

    The function waits for nothing: in durable delivery a thread connects to the database, and until
    that has succeeded the browser is told to come back later.

    Raises ReceiverError if no watcher delivers a target.
    """
    options = StreamOptions(View(visible, data, name), retry, keepalive, lifetime, send_timeout)

    def connect(feed: RingFeed[Any]) -> RingClient:
        return options.connect(feed, _nothing, request.headers, request.query_params)

    try:
        opening = _open(hub, targets, size)
        # If the feed is open, from here on: nothing is missed before the server gets to sending.
        client = connect(opening.wait()) if opening.done else None
    except StateError as error:
        return _come_back(error, retry)
    return _Stream(client, opening, connect, options)


def _come_back(error: StateError, retry: int) -> Response:
    return Response(come_back(error, max(retry, LATER)), headers=dict(HEADERS))


def position(*targets: Any, hub: Hub | None = None, size: int = 1000) -> str:
    """Return the position of the stream of these targets now, to render into a page.

    With ``new EventSource("/events?last-event-id=…")`` the browser hears of all that happened
    since. Raises StateError if the Hub is not running, or the log cannot be read now.

    In durable delivery the first call, and each after the Hub has started anew, waits for a
    connection to the database: for two seconds, and in the thread of an event loop for a quarter of
    one. ``aposition`` waits without holding up the loop.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        patience = None
    else:
        patience = _LOOP_SECONDS
    return _open(hub, targets, size).wait(patience).position


async def aposition(*targets: Any, hub: Hub | None = None, size: int = 1000) -> str:
    """Like :func:`position`, but wait for the feed while the event loop goes on, however long."""
    return (await _open(hub, targets, size).awaited()).position


_feeds: weakref.WeakKeyDictionary[Hub, Feeds] = weakref.WeakKeyDictionary()


def _open(hub: Hub | None, targets: tuple[Any, ...], size: int) -> Opening:
    """Return the feed that all streams of these targets share, open or being opened."""
    hub = hub or pgsignals.default_hub
    feeds = _feeds.get(hub) or _feeds.setdefault(hub, Feeds(hub))
    return feeds.open(targets, size, ordered=hub._options.workers == 1)


class _Stream(Response):
    """One browser's messages, as they come, until the browser goes."""

    def __init__(
        self,
        client: RingClient | None,
        opening: Opening,
        connect: Callable[[RingFeed[Any]], RingClient],
        options: StreamOptions,
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers(HEADERS)
        self._client = client
        self._opening = opening
        self._connect = connect
        self._options = options
        self._began = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        _end_with_the_server(asyncio.get_running_loop())
        tasks = {
            asyncio.ensure_future(self._serve(scope, receive, send)),
            asyncio.ensure_future(_disconnected(receive)),
        }
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._client is not None:
                self._client.close()
        for task in done:
            task.result()

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._client is None:
            try:
                self._client = self._connect(await self._opening.awaited())
            except StateError as error:
                await _come_back(error, self._options.retry)(scope, receive, send)
                return
        await self._send_all(self._client, send)

    async def _send_all(self, client: RingClient, send: Send) -> None:
        options = self._options
        loop, woken = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            loop.call_soon_threadsafe(woken.set)

        client.wake = wake
        # The filters of a view may wait, too.
        waits = client.waits or options.view != EVERYTHING

        async def read() -> bytes:
            if not waits:
                return client.read()
            return await to_thread.run_sync(client.read, limiter=_limiter(loop))

        async def sent(message: dict[str, Any]) -> None:
            await within(options.send_timeout, send(message))

        async def body(chunk: bytes, more: bool = True) -> None:
            await sent({"type": "http.response.body", "body": chunk, "more_body": more})

        try:
            await sent(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            await body(client.opening(options.retry))
            while True:
                woken.clear()
                if chunk := await read():
                    await body(chunk)
                    continue
                patience = options.patience(client, self._began)
                if not patience:
                    return await body(b"", more=False)
                try:
                    await within(patience, woken.wait())
                except asyncio.TimeoutError:
                    await body(client.keepalive())
        except asyncio.TimeoutError:
            log.info("a browser that took nothing for %g s is given up", options.send_timeout)
        except OSError:
            log.debug("a browser has gone")


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _nothing() -> None:
    """Wake nobody, since the client has not begun to read."""


_limiters: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, CapacityLimiter] = (
    weakref.WeakKeyDictionary()
)


def _limiter(loop: asyncio.AbstractEventLoop) -> CapacityLimiter:
    if (limiter := _limiters.get(loop)) is None:
        limiter = _limiters[loop] = CapacityLimiter(_READING_THREADS)
    return limiter


_watched: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()


def _end_with_the_server(loop: asyncio.AbstractEventLoop) -> None:
    """End the streams once the server is told to end, which might wait for them for ever.

    The server's handlers are called as before.
    """

    def end() -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(_end_streams)

    if loop not in _watched and before_handlers(end, signal.SIGTERM, signal.SIGINT):
        _watched.add(loop)


def _end_streams() -> None:
    for feed in [feed for feeds in list(_feeds.values()) for feed in feeds.values()]:
        feed.close()
