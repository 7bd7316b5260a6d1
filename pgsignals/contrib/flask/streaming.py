"""``sse``: a response that goes on, one for each browser."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from flask import Flask, Response, current_app, request

from ...core.errors import StateError
from ...core.events import Event
from ..event_stream import HEADERS, View
from ..ring import RingClient
from ..stream_options import LATER, StreamOptions, come_back
from .extension import process_of


def sse(
    *targets: Any,
    visible: Callable[[Event], bool] | None = None,
    data: Callable[[Event], Any] | None = None,
    name: Callable[[Event], str] | None = None,
    retry: int = 3000,
    keepalive: float = 15.0,
    lifetime: float = 3600.0,
    send_timeout: float = 60.0,
    bind_key: str | None = None,
) -> Response:
    """Return a response that tells the browser of changes, for ``new EventSource(url)``.

    Each of ``targets`` is a model, a table's name, a label or a watcher, or a tuple of one and
    operations. Every event is a message with JSON that names the record; every possible loss is one
    of the type ``gap``. A browser that connects again goes on where it was, by Last-Event-ID or by
    the parameter ``last-event-id``; if that position is not known here, it gets a ``gap``.

    ``visible`` says whether this browser may know of an event. ``data`` makes the message's data, a
    text or a value that becomes JSON, and ``name`` the message's type. They are called in an
    application context, after the request: what they need of the user has to be taken before.
    If one of them raises, the browser gets a ``gap`` in place of the event.

    The browser connects again after ``retry`` milliseconds. After ``keepalive``
    seconds without an event something is sent all the same. After ``lifetime`` seconds the stream
    ends, so that the browser connects again and is authorised again. A browser that takes nothing
    for ``send_timeout`` seconds is dropped, if the server and the system allow that.

    A stream takes a thread of the server. A server without threads ends the stream after the events
    that are there, so that browsers poll.

    ``bind_key`` is that of the PgSignals whose watchers deliver the targets.

    Raises ReceiverError if no watcher delivers a target.
    """
    options = StreamOptions(View(visible, data, name), retry, keepalive, lifetime, send_timeout)
    process = process_of(None, bind_key)
    limit = current_app.config.get("PGSIGNALS_SSE_CLIENTS")
    try:
        feed = process.feed(targets)
    except StateError as error:
        return _response(come_back(error, retry))
    if limit is not None and process.streams >= limit:
        return _response(come_back(f"there are {limit} streams already", max(retry, LATER)))
    _limit_sending(send_timeout)
    woken = threading.Event()
    client = options.connect(feed, woken.set, request.headers, request.args)
    # A server without threads could serve nobody else meanwhile.
    polled = not request.environ.get("wsgi.multithread", True)
    app = current_app._get_current_object()  # type: ignore[attr-defined]
    return _response(_Stream(app, client, woken, options, polled))


def _response(content: bytes | Iterator[bytes]) -> Response:
    return current_app.response_class(content, headers=HEADERS)


def position(*targets: Any, bind_key: str | None = None) -> str:
    """Return the position of the stream of these targets now, to render into a page.

    With ``new EventSource("/events?last-event-id={{ position }}")`` the browser hears of all that
    happened since. Raises StateError if the Hub is not running.
    """
    return process_of(None, bind_key).feed(targets).position


@dataclass(eq=False)
class _Stream:
    """One browser's messages, as they come, for the server to iterate over.

    Not a generator, since a server may close a response that it has not begun to send: a generator
    that has not begun would not close its client.
    """

    app: Flask
    client: RingClient
    woken: threading.Event
    options: StreamOptions
    polled: bool

    def __post_init__(self) -> None:
        self._began = time.monotonic()
        self._opening: bytes | None = self.client.opening(self.options.retry)

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if (opening := self._opening) is not None:
            self._opening = None
            return opening
        while True:
            self.woken.clear()
            # A context for each read: one that lasts would hold a connection to the database.
            with self.app.app_context():
                chunk = self.client.read()
            if chunk:
                return chunk
            patience = self.options.patience(self.client, self._began)
            if self.polled or not patience:
                raise StopIteration
            if not self.woken.wait(patience):
                return self.client.keepalive()

    def close(self) -> None:
        """Close the client; the server calls this, whatever has ended the response."""
        self.client.close()


def _limit_sending(seconds: float) -> None:
    """Limit the time that the system keeps the connection of a browser that takes nothing.

    Otherwise a browser that is gone without a word, or does not read, would keep its thread.
    """
    line = request.environ.get("gunicorn.socket") or request.environ.get("werkzeug.socket")
    if isinstance(line, socket.socket) and hasattr(socket, "TCP_USER_TIMEOUT"):
        # A socket of the file system does not have this option.
        with suppress(OSError):
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))
