"""``sse``: a response that goes on, one for each browser."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from flask import Flask, Response, current_app, request

from ...errors import ConfigurationError, StateError
from ...events import Event
from ..exact import ExactClient
from ..sse import HEADERS, Client, View, encode, last_event_id
from .extension import process_of

log = logging.getLogger("pgsignals")

# When browsers for which there was no room try again, in milliseconds.
_LATER = 15_000
_PARAMETER = "last-event-id"


def sse(
    *targets: Any,
    visible: Callable[[Event], bool] | None = None,
    data: Callable[[Event], Any] | None = None,
    name: Callable[[Event], str] | None = None,
    retry: int = 3000,
    keepalive: float = 15.0,
    lifetime: float = 3600.0,
    send_timeout: float = 60.0,
) -> Response:
    """A response that tells the browser of changes, for ``new EventSource(url)``.

    Each of ``targets`` is a model, a table's name, a label or a watcher, or a tuple of one and
    operations. Every event is a message with JSON that names the record; every possible loss is one
    of the type ``gap``. The browser goes on where it was when it connects again, by Last-Event-ID
    or by the parameter ``last-event-id``; where that is not known here, it gets a ``gap``.

    ``visible`` says whether this browser may know of an event. ``data`` makes what it is told, a
    text or what becomes JSON, and ``name`` the type of the message. They are called in an
    application context, after the request: what they need of the user has to be taken before.
    When one of them raises, the browser gets a ``gap`` in place of the event.

    ``retry`` is after how many milliseconds the browser connects again. After ``keepalive`` seconds
    without an event something is sent all the same, after ``lifetime`` seconds the stream ends, so
    that the browser connects again and is authorised again. A browser that takes nothing for
    ``send_timeout`` seconds is dropped, where the server and the system allow that.

    A stream takes a thread of the server. A server without threads ends it after what is there, so
    that browsers poll.

    Raises ReceiverError when no watcher delivers a target.
    """
    if retry < 0 or keepalive <= 0 or lifetime <= 0 or send_timeout <= 0:
        raise ConfigurationError(
            f"retry={retry!r}, keepalive={keepalive!r}, lifetime={lifetime!r}, "
            f"send_timeout={send_timeout!r}: give milliseconds from 0, and seconds above 0."
        )
    process = process_of(None)
    limit = current_app.config.get("PGSIGNALS_SSE_CLIENTS")
    try:
        feed = process.feed(targets)
    except StateError as error:
        return _come_back(retry, str(error))
    if limit is not None and process.streams >= limit:
        return _come_back(max(retry, _LATER), f"there are {limit} streams already")
    _limit_sending(send_timeout)
    woken = threading.Event()
    stream = _Stream(
        current_app._get_current_object(),  # type: ignore[attr-defined]
        feed.connect(
            last_event_id(request.headers.get("Last-Event-ID"), request.args.get(_PARAMETER)),
            woken.set,
            View(visible, data, name),
        ),
        woken,
        retry,
        keepalive,
        time.monotonic() + lifetime,
        polled=not request.environ.get("wsgi.multithread", True),
    )
    return current_app.response_class(stream, headers=HEADERS)


def _come_back(milliseconds: int, reason: str) -> Response:
    """A stream that ends at once: after any other status than 200 an EventSource gives up."""
    log.warning("a browser was told to come back later: %s", reason)
    return current_app.response_class(encode(retry=milliseconds), headers=HEADERS)


def position(*targets: Any) -> str:
    """Where the stream of these targets is now, to render into a page.

    With ``new EventSource("/events?last-event-id={{ position }}")`` the browser hears of all that
    happened since. Raises StateError when the Hub is not running.
    """
    return process_of(None).feed(targets).position


class _Stream:
    """What the server iterates over: one browser's messages, as they come.

    Not a generator, since a server may close a response that it has not begun to send.
    """

    def __init__(
        self,
        app: Flask,
        client: Client | ExactClient,
        woken: threading.Event,
        retry: int,
        keepalive: float,
        end: float,
        polled: bool,
    ) -> None:
        self._app = app
        self._client = client
        self._woken = woken
        self._opening: bytes | None = client.opening(retry)
        self._keepalive = keepalive
        self._end = end
        self._polled = polled

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if (opening := self._opening) is not None:
            self._opening = None
            return opening
        while True:
            self._woken.clear()
            # A context for each time: one that lasts would hold a connection to the database.
            with self._app.app_context():
                chunk = self._client.read()
            if chunk:
                return chunk
            left = self._end - time.monotonic()
            if self._client.ended or self._polled or left <= 0:
                raise StopIteration
            if not self._woken.wait(min(self._keepalive, left)):
                return self._client.keepalive()

    def close(self) -> None:
        """Called by the server, whatever the reason."""
        self._client.close()


def _limit_sending(seconds: float) -> None:
    """Have the system give up the connection when the browser takes nothing for that long.

    Otherwise a browser that is gone without a word, or does not read, would keep its thread.
    """
    line = request.environ.get("gunicorn.socket") or request.environ.get("werkzeug.socket")
    if isinstance(line, socket.socket) and hasattr(socket, "TCP_USER_TIMEOUT"):
        # A socket of the file system has no such option.
        with suppress(OSError):
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))
