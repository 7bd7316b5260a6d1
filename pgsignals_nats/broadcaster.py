"""Events to NATS JetStream: pipelined, and yet in order per record."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from urllib.parse import quote

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext

from pgsignals import BrokerError, Event, Gap
from pgsignals.broadcasters.ledger import SentLedger
from pgsignals.cloudevents import Writer, header_name, record_key
from pgsignals.urls import BrokerEnd, taking

from .connection import PREFIX, Loop, connect, stream_error
from .history import ID
from .options import SendingOptions
from .ordering import Item, RecordQueue
from .progress import EPOCH
from .stream import Stream, check

log = logging.getLogger("pgsignals.nats")

# The most messages that are under way at a time.
_WINDOW = 2_000
# A message that is not acknowledged after so many seconds is taken for lost.
_ACK_SECONDS = 10.0
_HEADER_OVERHEAD = 8
# The length of the other headers, with room for what is added to the id of a message that is sent
# once more.
_HEAD = 56


class NatsBroadcaster(BrokerEnd[SendingOptions]):
    """Sends events to a subject for each operation of a table, all of one stream.

    Its keywords are the options of ``nats://`` URLs, ``user``, ``password``, and ``config``,
    settings of nats-py's ``connect``. A message that is longer than the server takes goes without
    values, flagged as truncated.

    No event of a record is sent before the one before it is acknowledged, so that none that fails
    is overtaken. A message that the server takes for a duplicate of one that it has no more is sent
    once more. A stream in the place of the one that was written to gets a Gap. Raises
    ConfigurationError for an option that is wrong; connects when it is first used.
    """

    @taking(SendingOptions)
    def __init__(self, options: SendingOptions) -> None:
        self._options = options
        self._writer = Writer(options.source or f"/pgsignals/{options.prefix}")
        self._loop: Loop | None = None
        self._stream = Stream(options)
        # The Gap that readers of a stream have yet to be told; it outlasts the connection.
        self._notice: Item | None = None
        self._forget()

    @classmethod
    def from_url(cls, url: str) -> NatsBroadcaster:
        """``nats://user:password@host:port/?prefix=…``; ``nats://token@host`` for a token."""
        return cls(**SendingOptions.read(url))

    def _forget(self) -> None:
        """Begin with nothing published."""
        self._client: Client | None = None
        self._jetstream: JetStreamContext
        self._stream.forget()
        self._ledger: SentLedger[str] = SentLedger()
        # These belong to the loop's thread.
        self._queue = RecordQueue()
        self._looking: set[asyncio.Task[None]] = set()
        self._pumping = False
        self._inbox = ""

    def publish(self, events: Sequence[Event]) -> None:
        loop = self._begin()
        items: dict[str, Item] = {}
        for event in events:
            uid = event.uid
            if uid in self._ledger or uid in items:
                continue
            headers = _headers(self._writer.attributes(event), self._options.stream_name)
            payload = self._writer.data(event)
            if len(payload) + _size(headers) > self._stream.limit:
                payload = self._writer.data(event, key_only=True)
            subject = self._options.subject_of(event.schema, event.table, event.op)
            key = record_key(event)
            record = None if key is None else (event.schema, event.table, key)
            items[uid] = Item(uid, subject, payload, headers, record)
        self._send(loop, list(items.values()))

    def flush(self, timeout: float) -> bool:
        self._begin()
        deadline = time.monotonic() + timeout
        if self._ledger.wait(timeout):
            self._ledger.clear()
            self._stream.flushed()
            return True
        loop = self._loop
        assert loop is not None
        loop.run(self._expire(), max(1.0, deadline - time.monotonic()))
        self._check()
        return False

    def check(self, tables: Sequence[tuple[str, str]]) -> None:
        loop = Loop()
        try:
            loop.connect(check(self._options, tables), self._options)
        finally:
            loop.close()

    def announce(self, gap: Gap) -> None:
        self._send(self._begin(), [self._gap_item(gap)])

    def close(self) -> None:
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
        client = self._client
        if client is None or not client.is_connected or self._stream.astray:
            lost = client is None or not client.is_connected
            work = self._connect() if lost else self._find_stream()
            self._loop.connect(work, self._options)
            self._check()
        if self._notice is not None:
            self._send(self._loop, [self._notice])
        return self._loop

    def _check(self) -> None:
        if (failure := self._ledger.take_failure()) is not None:
            raise BrokerError(f"{self}: {failure}")

    async def _connect(self) -> None:
        client = await connect(self._options, self._lost)
        self._jetstream = client.jetstream(timeout=5)
        self._max_payload = client.max_payload
        try:
            await self._find_stream()
            self._inbox = client.new_inbox()
            await client.subscribe(
                f"{self._inbox}.*",
                cb=self._acknowledged,
                pending_msgs_limit=-1,
                pending_bytes_limit=-1,
            )
        except (BrokerError, nats.errors.Error, asyncio.TimeoutError) as error:
            await client.close()
            if isinstance(error, BrokerError):
                raise
            raise stream_error(self._options, error) from error
        self._client = client

    async def _find_stream(self) -> None:
        """Find the stream; tell the readers of another one, and send again what it lacks."""
        if why := await self._stream.find(self._jetstream, self._max_payload):
            log.error("%s: events that were sent may be lost: %s", self, why)
            gap = Gap(EPOCH, datetime.now(timezone.utc), "restored", why)
            self._notice = self._gap_item(gap)
            self._ledger.forget_acknowledged(why)

    def _gap_item(self, gap: Gap) -> Item:
        attributes, data = self._writer.gap(gap)
        headers = _headers(attributes, self._options.stream_name)
        return Item(attributes["id"], self._options.gap_subject, data, headers, None)

    def _send(self, loop: Loop, items: Sequence[Item]) -> None:
        new = [item for item in items if item.uid not in self._ledger]
        if new:
            for item in new:
                self._ledger.send(item.uid)
            loop.call(self._take, new)

    def _take(self, items: Sequence[Item]) -> None:
        self._queue.add(items)
        self._start_pump()

    def _start_pump(self) -> None:
        if not self._pumping and self._queue:
            self._pumping = True
            self._pump_task = asyncio.ensure_future(self._pump())

    async def _pump(self) -> None:
        """Send what may be sent: one message of a record at a time."""
        queue = self._queue
        try:
            client = self._client
            while queue and len(queue.under_way) < _WINDOW:
                if client is None or not client.is_connected:
                    await self._lost()
                    return
                item = queue.next()
                if item is None:
                    continue
                token = queue.send(item)
                item.sent_at = time.monotonic()
                try:
                    await client.publish(
                        item.subject,
                        item.payload,
                        reply=f"{self._inbox}.{token}",
                        headers=item.headers,
                    )
                except (nats.errors.Error, OSError) as error:
                    if queue.under_way.pop(token, None) is not None:
                        self._refused(item, str(error) or type(error).__name__)
        finally:
            self._pumping = False

    async def _acknowledged(self, message: Msg) -> None:
        token = message.subject.rpartition(".")[2]
        item = self._queue.under_way.pop(token, None)
        if item is None:
            return
        if message.headers and message.headers.get("Status") == "503":
            self._stream.astray = True
            self._refused(item, f"no stream takes the subject {item.subject}")
            return
        answer = json.loads(message.data)
        if "error" in answer:
            self._refused(item, f"{item.subject}: {answer['error'].get('description', 'refused')}")
        elif answer.get("duplicate"):
            item.sent_at = time.monotonic()
            self._queue.under_way[token] = item
            task = asyncio.ensure_future(self._look_for(token, item, answer["seq"]))
            self._looking.add(task)
            task.add_done_callback(self._looking.discard)
        else:
            self._stream.saw(item, answer["seq"])
            self._arrived(item)

    async def _look_for(self, token: str, item: Item, sequence: int) -> None:
        """Send a message once more if the one that it is a duplicate of is not there.

        The server remembers ids for longer than messages: after a purge it acknowledges messages
        that it does not store.
        """
        under_way = self._queue.under_way
        try:
            there = await self._stream.has(item, sequence)
        except (nats.errors.Error, asyncio.TimeoutError, OSError) as error:
            if under_way.pop(token, None) is not None:
                self._refused(item, f"{item.subject}: a duplicate is looked for: {error!r}")
            return
        if under_way.pop(token, None) is None:
            return  # The message was given up meanwhile.
        if there:
            self._arrived(item)
            return
        # The same id each time, so that the message is not there twice, whoever sends it.
        item.headers[ID] = f"{item.uid}/{sequence}"
        self._queue.add_again(item)
        self._start_pump()

    def _arrived(self, item: Item) -> None:
        if self._notice is not None and item.uid == self._notice.uid:
            self._notice = None
        self._ledger.acknowledge(item.uid)
        self._queue.done(item)
        self._start_pump()

    def _refused(self, item: Item, why: str) -> None:
        """Give up the message, and those of the record behind it: they are published again."""
        self._ledger.refuse([each.uid for each in self._queue.give_up(item)], why)
        self._start_pump()

    async def _lost(self) -> None:
        """Give up all that is not acknowledged."""
        if items := self._queue.give_up_all():
            self._ledger.refuse([item.uid for item in items], "the connection is lost")

    async def _expire(self) -> None:
        """Give up messages that should have been acknowledged long ago."""
        due = time.monotonic() - _ACK_SECONDS
        under_way = self._queue.under_way
        for token, item in list(under_way.items()):
            if item.sent_at < due and under_way.pop(token, None) is not None:
                self._refused(item, f"{item.subject}: no acknowledgement in {_ACK_SECONDS:g} s")


def _headers(attributes: Mapping[str, str], stream: str) -> dict[str, str]:
    found = {
        ID: attributes["id"],
        "Nats-Expected-Stream": stream,
    }
    for name, text in attributes.items():
        # As CloudEvents has it for headers: what is not printable ASCII is percent-encoded.
        safe = text if text.isascii() and text.isprintable() and "%" not in text else quote(text)
        found[header_name(name, PREFIX)] = safe
    return found


def _size(headers: Mapping[str, str]) -> int:
    return _HEAD + sum(len(n) + len(text) + _HEADER_OVERHEAD for n, text in headers.items())
