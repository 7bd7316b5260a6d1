"""Events to NATS JetStream: pipelined, and yet in order per record."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from datetime import datetime, timezone

import nats.errors
from nats.aio.client import Client
from nats.js import JetStreamContext

from pgsignals import BrokerError, Event, Gap
from pgsignals.cloudevents import Heading, Writer
from pgsignals.urls import BrokerEnd, taking

from .connection import Loop, connect, stream_error
from .ledger import Ledger
from .messages import Heads, Item, safe
from .options import SendingOptions
from .progress import EPOCH
from .sending import Sender
from .stream import Stream, check

log = logging.getLogger("pgsignals.nats")


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
        self._heads = Heads(options)
        self._loop: Loop | None = None
        self._stream = Stream(options)
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
        self._ledger = Ledger()
        # How many failures have been raised, or were there when nothing was published yet.
        self._failures = 0
        # It belongs to the loop's thread.
        self._sender = Sender(self._ledger, self._stream)

    def publish(self, events: Sequence[Event]) -> None:
        loop = self._begin()
        ledger, limit = self._ledger, self._stream.limit
        items: dict[str, Item] = {}
        latest: Heading | None = None
        for event, heading, uid, key, data in self._writer.write(events):
            if heading is not latest:
                latest = heading
                head = self._heads.of(event, heading)
            if uid in items or not ledger.lacks(uid):
                continue
            name = safe(uid)
            size = head.size + 2 * len(name) + len(data)
            if size > limit:
                size -= len(data)
                data = self._writer.data(event, key_only=True)
                size += len(data)
            record = None if key is None else head.origin.table + key
            items[uid] = Item(uid, name, head, data, record, size)
        self._send(loop, list(items.values()), counted=True)

    def arrived(self, timeout: float) -> int:
        """See Pipelined."""
        loop = self._begin()
        found = self._ledger.count()
        if not found and timeout:
            deadline = time.monotonic() + timeout
            self._ledger.wait_for_first(timeout)
            self._check()
            found = self._ledger.count()
            if not found:
                self._expire(loop, deadline)
        return found

    def flush(self, timeout: float) -> bool:
        loop = self._begin()
        deadline = time.monotonic() + timeout
        if self._ledger.wait_for_all(timeout):
            self._ledger.clear()
            self._stream.flushed()
            return True
        self._expire(loop, deadline)
        return False

    def _expire(self, loop: Loop, deadline: float) -> None:
        """Raise BrokerError if messages should have been acknowledged long ago."""
        loop.run(self._sender.expire(), max(1.0, deadline - time.monotonic()))
        self._check()

    def check(self, tables: Sequence[tuple[str, str]]) -> None:
        loop = Loop()
        try:
            loop.connect(check(self._options, tables), self._options)
        finally:
            loop.close()

    def announce(self, gap: Gap) -> None:
        self._tell(self._begin(), self._gap_item(gap))

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
        if (notice := self._stream.notice) is not None:
            self._tell(self._loop, notice)
        return self._loop

    def _check(self) -> None:
        # Read first: what fails from now on is not known to who publishes.
        self._failures = self._ledger.failures
        if (failure := self._ledger.take_failure()) is not None:
            raise BrokerError(f"{self}: {failure}")

    async def _connect(self) -> None:
        sender = self._sender
        client = await connect(self._options, sender.lost)
        self._jetstream = client.jetstream(timeout=5)
        self._max_payload = client.max_payload
        try:
            await self._find_stream()
            inbox = client.new_inbox()
            await client.subscribe(
                f"{inbox}.*",
                cb=sender.acknowledged,
                pending_msgs_limit=-1,
                pending_bytes_limit=-1,
            )
        except (BrokerError, nats.errors.Error, asyncio.TimeoutError) as error:
            await client.close()
            if isinstance(error, BrokerError):
                raise
            raise stream_error(self._options, error) from error
        sender.use(client, inbox)
        self._client = client

    async def _find_stream(self) -> None:
        """Find the stream; tell the readers of another one, and send again what it lacks."""
        if why := await self._stream.find(self._jetstream, self._max_payload):
            log.error("%s: events that were sent may be lost: %s", self, why)
            gap = Gap(EPOCH, datetime.now(timezone.utc), "restored", why)
            self._stream.notice = self._gap_item(gap)
            self._ledger.lose_arrived(why)

    def _gap_item(self, gap: Gap) -> Item:
        attributes, data = self._writer.gap(gap)
        uid, head = attributes["id"], self._heads.of_gap(attributes)
        return Item(uid, uid, head, data, None, head.size + 2 * len(uid) + len(data))

    def _tell(self, loop: Loop, item: Item) -> None:
        if self._ledger.lacks(item.uid):
            self._send(loop, [item], counted=False)

    def _send(self, loop: Loop, items: Sequence[Item], *, counted: bool) -> None:
        if items:
            self._ledger.send(items, counted=counted)
            loop.call(self._sender.take, items, self._failures)
