"""Events to NATS JetStream: pipelined, and yet in order per record."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import StreamConfig

from pgsignals import BrokerError, Event, Gap
from pgsignals.cloudevents import Writer, record_key

from .connection import SUBJECT, Loop, Server, read_url, stream_error

log = logging.getLogger("pgsignals.nats")

# Messages under way at a time.
_WINDOW = 2_000
# A message that is not acknowledged after so many seconds is taken for lost.
_ACK_SECONDS = 10.0
_HEADER_OVERHEAD = 8
_HEAD = 32


class _Item:
    """A message, from when it is published to when it is acknowledged."""

    __slots__ = ("headers", "payload", "record", "sent_at", "subject", "uid")

    def __init__(
        self, uid: str, subject: str, payload: bytes, headers: dict[str, str], record: object
    ) -> None:
        self.uid = uid
        self.subject = subject
        self.payload = payload
        self.headers = headers
        self.record = record
        self.sent_at = 0.0


class NatsBroadcaster:
    """Sends events to a subject for each operation of a table, all of one stream.

    ``create`` makes the stream if it is missing, with ``replicas``, ``max_age`` in seconds and a
    duplicate ``window`` in seconds; without it a missing stream is an error. ``stream`` is its
    name, by default the prefix. A message that is longer than the server takes goes without
    values, flagged as truncated. ``source`` is the attribute of that name. ``config`` are
    settings of nats-py's ``connect``.

    No event of a record is sent before the one before it is acknowledged, so that none that fails
    is overtaken. Raises ConfigurationError for what cannot be; connects when it is first used.
    """

    def __init__(
        self,
        *hosts: str,
        prefix: str = "pgsignals",
        subject: str = SUBJECT,
        stream: str | None = None,
        create: bool = False,
        replicas: int = 1,
        max_age: float | None = None,
        window: float = 120.0,
        source: str | None = None,
        tls: bool = False,
        ca: str | None = None,
        cert: str | None = None,
        key: str | None = None,
        creds: str | None = None,
        nkey: str | None = None,
        user: str | None = None,
        password: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        server = Server(
            hosts,
            *(prefix, subject, stream, tls, ca, cert, key, creds, nkey, user, password),
            config or {},
        )
        self._set_up(
            server, create=create, replicas=replicas, max_age=max_age, window=window, source=source
        )

    @classmethod
    def from_url(cls, url: str) -> NatsBroadcaster:
        """``nats://user:password@host:port/?prefix=…``; ``nats://token@host`` for a token."""
        server, options = read_url(url)
        found = cls.__new__(cls)
        found._set_up(server, **options)
        return found

    def _set_up(
        self,
        server: Server,
        *,
        create: bool = False,
        replicas: int = 1,
        max_age: float | None = None,
        window: float = 120.0,
        source: str | None = None,
    ) -> None:
        self._server = server
        self._create = create
        self._replicas = replicas
        self._max_age = max_age
        self._duplicate_window = window
        self._writer = Writer(source or f"/pgsignals/{server.prefix}")
        self._loop: Loop | None = None
        self._forget()

    def _forget(self) -> None:
        """Begin with nothing published."""
        self._client: Client | None = None
        self._limit = 0
        self._lock = threading.Condition()
        # What was published since the last flush that succeeded, and whether it is acknowledged.
        self._sent: dict[str, bool] = {}
        self._unacknowledged = 0
        self._failure = ""
        # These belong to the loop's thread.
        self._tokens = itertools.count()
        self._queue: deque[_Item] = deque()
        # The next of records whose turn it is.
        self._ready: deque[_Item] = deque()
        self._under_way: dict[str, _Item] = {}
        # By record, while one of its messages is ready or under way, those that come after it.
        self._behind: dict[object, deque[_Item]] = {}
        self._pumping = False
        self._inbox = ""

    def __str__(self) -> str:
        return str(self._server)

    def __repr__(self) -> str:
        return f"<NatsBroadcaster {self}>"

    def publish(self, events: Sequence[Event]) -> None:
        """See Broadcaster. Raises BrokerError."""
        loop = self._begin()
        items = []
        for event in events:
            uid = event.uid
            if uid in self._sent:
                continue
            headers = _headers(self._writer.attributes(event), self._server.stream_name)
            payload = self._writer.data(event)
            if len(payload) + _size(headers) > self._limit:
                payload = self._writer.data(event, key_only=True)
            subject = self._server.subject_of(event.schema, event.table, event.op)
            key = record_key(event)
            record = None if key is None else (event.schema, event.table, key)
            items.append(_Item(uid, subject, payload, headers, record))
        self._enqueue(loop, items)

    def flush(self, timeout: float) -> bool:
        """See Broadcaster."""
        self._begin()
        deadline = time.monotonic() + timeout
        with self._lock:
            self._lock.wait_for(lambda: self._failure or not self._unacknowledged, timeout)
            if not self._failure and not self._unacknowledged:
                self._sent.clear()
                return True
        loop = self._loop
        assert loop is not None
        loop.run(self._expire(), max(1.0, deadline - time.monotonic()))
        self._check()
        return False

    def check(self, tables: Sequence[tuple[str, str]]) -> None:
        """See Checkable. Raises BrokerError."""
        loop = Loop()
        try:
            loop.run(self._look(tables), 20.0)
        except TimeoutError as error:
            raise BrokerError(f"{self}: not connected: {error}") from error
        finally:
            loop.close()

    async def _look(self, tables: Sequence[tuple[str, str]]) -> None:
        client = await self._server.connect(_ignore)
        try:
            info = await client.jetstream(timeout=5).stream_info(self._server.stream_name)
        except (nats.errors.Error, asyncio.TimeoutError) as error:
            if not (self._create and isinstance(error, nats.js.errors.NotFoundError)):
                raise stream_error(self._server, error) from error
            return
        finally:
            await client.close()
        patterns = info.config.subjects or []
        for schema, table in tables:
            subject = self._server.subject_of(schema, table, "inserted")
            if not any(_covers(pattern, subject) for pattern in patterns):
                raise BrokerError(
                    f"{self}: the stream {self._server.stream_name} takes {', '.join(patterns)}, "
                    f"but not {subject}. Add {self._server.prefix}.> to its subjects."
                )

    def announce(self, gap: Gap) -> None:
        """See Broadcaster."""
        loop = self._begin()
        attributes, data = self._writer.gap(gap)
        headers = _headers(attributes, self._server.stream_name)
        item = _Item(attributes["id"], self._server.gap_subject, data, headers, None)
        self._enqueue(loop, [item])

    def close(self) -> None:
        """See Broadcaster."""
        loop, self._loop = self._loop, None
        if loop is not None and not loop.inherited:
            client = self._client
            if client is not None and not client.is_closed:
                try:
                    loop.run(client.close(), 2.0)
                except (TimeoutError, OSError, nats.errors.Error) as error:
                    log.debug("%s: %r", self, error)
            loop.close()
        self._forget()

    def _begin(self) -> Loop:
        if self._loop is not None and self._loop.inherited:
            self._loop = None
            self._forget()
        if self._loop is None:
            self._loop = Loop()
        self._check()
        if self._client is None or not self._client.is_connected:
            try:
                self._loop.run(self._connect(), 20.0)
            except TimeoutError as error:
                raise BrokerError(f"{self}: not connected: {error}") from error
        return self._loop

    def _check(self) -> None:
        with self._lock:
            failure, self._failure = self._failure, ""
        if failure:
            raise BrokerError(f"{self}: {failure}")

    async def _connect(self) -> None:
        client = await self._server.connect(self._lost)
        try:
            jetstream = client.jetstream(timeout=5)
            try:
                info = await jetstream.stream_info(self._server.stream_name)
            except nats.js.errors.NotFoundError:
                if not self._create:
                    raise
                info = await jetstream.add_stream(
                    StreamConfig(
                        name=self._server.stream_name,
                        subjects=[f"{self._server.prefix}.>"],
                        num_replicas=self._replicas,
                        max_age=self._max_age,
                        duplicate_window=self._duplicate_window,
                        allow_direct=True,
                    )
                )
                log.info("created the stream %s", self._server.stream_name)
            self._inbox = client.new_inbox()
            await client.subscribe(
                f"{self._inbox}.*",
                cb=self._acknowledged,
                pending_msgs_limit=-1,
                pending_bytes_limit=-1,
            )
        except (nats.errors.Error, asyncio.TimeoutError) as error:
            await client.close()
            raise stream_error(self._server, error) from error
        limit = client.max_payload
        most = info.config.max_msg_size
        self._limit = min(limit, most) if most is not None and most > 0 else limit
        self._client = client

    def _enqueue(self, loop: Loop, items: Sequence[_Item]) -> None:
        if not items:
            return
        with self._lock:
            for item in items:
                self._sent[item.uid] = False
            self._unacknowledged += len(items)
        loop.call(self._take, items)

    def _take(self, items: Sequence[_Item]) -> None:
        self._queue.extend(items)
        self._start_pump()

    def _start_pump(self) -> None:
        if not self._pumping and (self._ready or self._queue):
            self._pumping = True
            self._pump_task = asyncio.ensure_future(self._pump())

    async def _pump(self) -> None:
        """Send what may be sent: one message of a record at a time."""
        try:
            client = self._client
            while (self._ready or self._queue) and len(self._under_way) < _WINDOW:
                if client is None or not client.is_connected:
                    self._fail_all("the connection is lost")
                    return
                item = self._next()
                if item is None:
                    continue
                token = f"{next(self._tokens):x}"
                item.sent_at = time.monotonic()
                self._under_way[token] = item
                try:
                    await client.publish(
                        item.subject,
                        item.payload,
                        reply=f"{self._inbox}.{token}",
                        headers=item.headers,
                    )
                except (nats.errors.Error, OSError) as error:
                    if self._under_way.pop(token, None) is not None:
                        self._refused(item, str(error) or type(error).__name__)
        finally:
            self._pumping = False

    def _next(self) -> _Item | None:
        """The next message to send; None when it has to wait for another of its record."""
        if self._ready:
            return self._ready.popleft()
        item = self._queue.popleft()
        if item.record is not None:
            if item.record in self._behind:
                self._behind[item.record].append(item)
                return None
            self._behind[item.record] = deque()
        return item

    async def _acknowledged(self, message: Msg) -> None:
        item = self._under_way.pop(message.subject.rpartition(".")[2], None)
        if item is None:
            return
        if message.headers and message.headers.get("Status") == "503":
            self._refused(item, f"no stream takes the subject {item.subject}")
            return
        answer = json.loads(message.data)
        if "error" in answer:
            self._refused(item, f"{item.subject}: {answer['error'].get('description', 'refused')}")
            return
        with self._lock:
            if item.uid in self._sent:
                self._sent[item.uid] = True
            self._unacknowledged -= 1
            if not self._unacknowledged:
                self._lock.notify_all()
        if item.record is not None:
            behind = self._behind[item.record]
            if behind:
                self._ready.append(behind.popleft())
            else:
                del self._behind[item.record]
        self._start_pump()

    def _refused(self, item: _Item, why: str) -> None:
        """Give up the message, and those of the record behind it: they are published again."""
        dropped = [item]
        if item.record is not None:
            dropped += self._behind.pop(item.record, ())
            dropped += [each for each in self._queue if each.record == item.record]
            self._queue = deque(each for each in self._queue if each.record != item.record)
        self._drop(dropped, why)
        self._start_pump()

    def _drop(self, items: Sequence[_Item], why: str) -> None:
        with self._lock:
            for item in items:
                self._sent.pop(item.uid, None)
            self._unacknowledged -= len(items)
            self._failure = self._failure or why
            self._lock.notify_all()

    def _fail_all(self, why: str) -> None:
        """Give up all that is not acknowledged."""
        items = [
            *self._under_way.values(),
            *self._ready,
            *itertools.chain(*self._behind.values()),
            *self._queue,
        ]
        self._under_way.clear()
        self._ready.clear()
        self._behind.clear()
        self._queue.clear()
        if items:
            self._drop(items, why)

    async def _lost(self) -> None:
        self._fail_all("the connection is lost")

    async def _expire(self) -> None:
        """Give up what should have been acknowledged long ago."""
        due = time.monotonic() - _ACK_SECONDS
        for token, item in list(self._under_way.items()):
            if item.sent_at < due and self._under_way.pop(token, None) is not None:
                self._refused(item, f"{item.subject}: no acknowledgement in {_ACK_SECONDS:g} s")


def _headers(attributes: Mapping[str, str], stream: str) -> dict[str, str]:
    found = {
        "Nats-Msg-Id": attributes["id"],
        "Nats-Expected-Stream": stream,
    }
    for name, text in attributes.items():
        # As CloudEvents has it for headers: what is not printable ASCII is percent-encoded.
        safe = text if text.isascii() and text.isprintable() and "%" not in text else quote(text)
        found["content-type" if name == "datacontenttype" else f"ce-{name}"] = safe
    return found


def _covers(pattern: str, subject: str) -> bool:
    """Whether a stream's subject, which may have wildcards, takes a message's."""
    wanted = subject.split(".")
    tokens = pattern.split(".")
    if tokens[-1] == ">":
        return len(wanted) >= len(tokens) and _same(tokens[:-1], wanted)
    return len(wanted) == len(tokens) and _same(tokens, wanted)


def _same(tokens: Sequence[str], wanted: Sequence[str]) -> bool:
    return all(token in ("*", each) for token, each in zip(tokens, wanted, strict=False))


async def _ignore() -> None:
    """The end of a connection that was opened to look."""


def _size(headers: Mapping[str, str]) -> int:
    return _HEAD + sum(len(n) + len(text) + _HEADER_OVERHEAD for n, text in headers.items())
