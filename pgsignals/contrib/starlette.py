"""Starlette and FastAPI: ``sse``, a response that tells a browser of changes."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import pgsignals

from ..errors import ConfigurationError, MissingExtraError, StateError
from ..events import Event, model_identity
from ..hub import Hub
from .exact import ExactClient, ExactFeed, open_feed
from .sse import EVERYTHING, HEADERS, Client, Feed, View, encode, last_event_id, wanted_of

try:
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import Receive, Scope, Send
except ImportError as error:
    raise MissingExtraError(
        "pgsignals.contrib.starlette needs Starlette, which FastAPI has: "
        "pip install 'pgsignals[starlette]'"
    ) from error

log = logging.getLogger("pgsignals")

# When browsers that got no stream try again, in milliseconds.
_LATER = 15_000
_PARAMETER = "last-event-id"


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
    """A response that tells the browser of changes, for ``new EventSource(url)``.

    Each of ``targets`` is a model, a table's name, a label or a watcher, or a tuple of one and
    operations, of ``hub``, by default the default one. Every event is a message with JSON that
    names the record; every possible loss is one of the type ``gap``. The browser goes on where it
    was when it connects again, by Last-Event-ID or by the parameter ``last-event-id``; where that
    is not known here, or more than ``size`` events ago, it gets a ``gap``.

    ``visible`` says whether this browser may know of an event. ``data`` makes what it is told, a
    text or what becomes JSON, and ``name`` the type of the message. They are plain functions, and
    called in a thread, so that they may wait. When one of them raises, the browser gets a ``gap``
    in place of the event.

    ``retry`` is after how many milliseconds the browser connects again. After ``keepalive`` seconds
    without an event something is sent all the same, after ``lifetime`` seconds the stream ends, so
    that the browser connects again and is authorised again. A browser that takes nothing for
    ``send_timeout`` seconds is given up. When the server is told to end, by SIGTERM or Ctrl-C, so
    do the streams.

    Raises ReceiverError when no watcher delivers a target.
    """
    if retry < 0 or keepalive <= 0 or lifetime <= 0 or send_timeout <= 0:
        raise ConfigurationError(
            f"retry={retry!r}, keepalive={keepalive!r}, lifetime={lifetime!r}, "
            f"send_timeout={send_timeout!r}: give milliseconds from 0, and seconds above 0."
        )
    try:
        feed = _feed(hub or pgsignals.default_hub, targets, size)
    except StateError as error:
        # Any other status than 200 would make an EventSource give up for good.
        log.warning("a browser was told to come back later: %s", error)
        return Response(encode(retry=max(retry, _LATER)), headers=dict(HEADERS))
    view = View(visible, data, name)
    waits = view != EVERYTHING or isinstance(feed, ExactFeed)
    last_id = last_event_id(
        request.headers.get("Last-Event-ID"), request.query_params.get(_PARAMETER)
    )
    # From here on, so that nothing is missed before the server gets to sending.
    client = feed.connect(last_id, _nothing, view)
    return _Stream(client, waits, retry, keepalive, lifetime, send_timeout)


def position(*targets: Any, hub: Hub | None = None, size: int = 1000) -> str:
    """Where the stream of these targets is now, to render into a page.

    With ``new EventSource("/events?last-event-id=…")`` the browser hears of all that happened
    since. Raises StateError when the Hub is not running.
    """
    return _feed(hub or pgsignals.default_hub, targets, size).position


_feeds: weakref.WeakKeyDictionary[Hub, dict[Any, Feed | ExactFeed]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def _feed(hub: Hub, targets: tuple[Any, ...], size: int) -> Feed | ExactFeed:
    """The feed that all streams of these targets share."""
    key = (size, *((model_identity(what), *ops) for what, ops in map(wanted_of, targets)))
    with _lock:
        of_hub = _feeds.setdefault(hub, {})
        feed = of_hub.get(key)
        if feed is None or feed.closed:
            if not hub.running:
                raise StateError("The Hub is not running: there is nothing to stream.")
            feed = of_hub[key] = open_feed(hub, *targets, size=size, ordered=hub._workers == 1)
    return feed


class _Stream(Response):
    """One browser's messages, as they come, until it goes."""

    def __init__(
        self,
        client: Client | ExactClient,
        waits: bool,
        retry: int,
        keepalive: float,
        lifetime: float,
        send_timeout: float,
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers(HEADERS)
        self._client = client
        self._waits = waits
        self._retry = retry
        self._keepalive = keepalive
        self._end = time.monotonic() + lifetime
        self._send_timeout = send_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop, woken = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            loop.call_soon_threadsafe(woken.set)

        self._client.wake = wake
        _end_with_the_server(loop)
        tasks = {
            asyncio.ensure_future(self._send_all(woken, send)),
            asyncio.ensure_future(_disconnected(receive)),
        }
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._client.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()

    async def _send_all(self, woken: asyncio.Event, send: Send) -> None:
        async def sent(message: dict[str, Any]) -> None:
            await asyncio.wait_for(send(message), self._send_timeout)

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
            await body(self._client.opening(self._retry))
            while True:
                woken.clear()
                if chunk := await self._read():
                    await body(chunk)
                    continue
                left = self._end - time.monotonic()
                if self._client.ended or left <= 0:
                    return await body(b"", more=False)
                try:
                    await asyncio.wait_for(woken.wait(), min(self._keepalive, left))
                except asyncio.TimeoutError:
                    await body(self._client.keepalive())
        except asyncio.TimeoutError:
            log.info("a browser that took nothing for %g s is given up", self._send_timeout)
        except OSError:
            log.debug("a browser has gone")

    async def _read(self) -> bytes:
        return await run_in_threadpool(self._client.read) if self._waits else self._client.read()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _nothing() -> None:
    """Wakes nobody: the client has not begun to read."""


_watched: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()


def _end_with_the_server(loop: asyncio.AbstractEventLoop) -> None:
    """End the streams once the server is told to end, which would wait for them, for ever maybe.

    The server's handlers are called as before.
    """
    if loop in _watched or threading.current_thread() is not threading.main_thread():
        return
    _watched.add(loop)
    for number in (signal.SIGTERM, signal.SIGINT):
        server = signal.getsignal(number)
        if callable(server):
            signal.signal(number, _ending(loop, server))


def _ending(
    loop: asyncio.AbstractEventLoop, server: Callable[[int, FrameType | None], Any]
) -> Callable[[int, FrameType | None], None]:
    def handle(number: int, frame: FrameType | None) -> None:
        # It interrupts the main thread wherever that is: it may take no lock.
        if not loop.is_closed():
            loop.call_soon_threadsafe(_end_streams)
        server(number, frame)

    return handle


def _end_streams() -> None:
    with _lock:
        feeds = [feed for of_hub in _feeds.values() for feed in of_hub.values()]
    for feed in feeds:
        feed.close()
