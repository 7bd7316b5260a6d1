"""Events from NATS JetStream: each acknowledged after receivers have returned."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from urllib.parse import unquote

import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext

from pgsignals import BrokerError, Gap, PgSignalsError
from pgsignals.backoff import Backoff
from pgsignals.cloudevents import attributes_of
from pgsignals.plugins.within import within
from pgsignals.sources import RemoteSink, Wanted
from pgsignals.sources.missed import announce_missed
from pgsignals.urls import BrokerEnd, taking

from .connection import PREFIX, Loop, connect, stream_error
from .consumer import MOST, Consumer
from .options import Options, SendingOptions
from .progress import Progress
from .pulling import AT_ONCE, Pull

log = logging.getLogger("pgsignals.nats")

# The seconds in which a loss is noticed.
_LOOK_SECONDS = 2.0
# The longest pause between tries to connect, or to find the stream, is that of Kafka's client.
_BACKOFF_SECONDS = 5.0


class NatsSource(BrokerEnd[Options]):
    """Reads the subjects of the watched tables from their stream.

    With a name it is a durable consumer of that name, which begins with what comes after its first
    start; without, it reads all from now on. Its keywords are the options of ``nats://`` URLs for
    both sides, ``user``, ``password`` and ``config``. Raises ConfigurationError for an option that
    is wrong.
    """

    _sink: RemoteSink
    _consumer: Consumer
    _awake: asyncio.Event
    _jetstream: JetStreamContext
    _pull: Pull

    @taking(Options)
    def __init__(self, options: Options) -> None:
        self._options = options
        self._loop: Loop | None = None
        self._client: Client | None = None
        self._reading: concurrent.futures.Future[None] | None = None
        self._stopping = False
        self._progress = Progress()
        # The Gap to announce once there is a consumer.
        self._missed: Gap | None = None
        self._arrived: list[Msg] = []
        # Groups of messages that receivers have; the loop's thread counts them.
        self._pending = 0

    @classmethod
    def from_url(cls, url: str) -> NatsSource:
        """``nats://user:password@host:port/?prefix=…``; ``nats://token@host`` for a token."""
        return cls(**Options.read(url, sending=SendingOptions))

    @property
    def is_connected(self) -> bool:
        return self._client is not None and self._client.is_connected

    @property
    def is_alive(self) -> bool:
        loop, reading = self._loop, self._reading
        return loop is not None and loop.is_alive and reading is not None and not reading.done()

    def start(self, wanted: Sequence[Wanted], name: str | None, sink: RemoteSink) -> None:
        self._sink = sink
        options = self._options
        filters = {options.subject_of(w.schema, w.table, op) for w in wanted for op in w.ops}
        filters.add(options.gap_subject)
        self._consumer = Consumer(options, name, filters, self._progress)
        if name is None:
            self._progress.heard = datetime.now(timezone.utc)
        loop = Loop()
        try:
            loop.connect(self._connect(), options)
        except BaseException:
            loop.close()
            raise
        self._loop = loop
        self._reading = asyncio.run_coroutine_threadsafe(self._read(), loop.loop)

    def refuse(self, position: str, reason: str) -> None:
        """Terminate the message once it is settled; the server publishes an advisory of that."""
        self._progress.refused[int(position.rpartition("/")[2])] = reason

    def stop(self, timeout: float) -> None:
        loop, reading = self._loop, self._reading
        if loop is None or reading is None:
            return
        self._stopping = True
        loop.call(self._wake)
        try:
            reading.result(timeout)
        except (concurrent.futures.TimeoutError, concurrent.futures.CancelledError):
            log.debug("%s: still reading", self)

    def close(self, timeout: float) -> None:
        loop, self._loop = self._loop, None
        if loop is None or loop.inherited:
            return
        if self._reading is not None:
            self._reading.cancel()
        try:
            loop.run(self._leave(), max(1.0, timeout))
        except (TimeoutError, OSError, nats.errors.Error) as error:
            log.debug("%s: %r", self, error)
        loop.close()

    def abandon(self) -> None:
        self._loop = None

    async def _connect(self) -> None:
        self._awake = asyncio.Event()
        progress = self._progress
        client = await connect(self._options, self._closed)
        jetstream = client.jetstream(timeout=5)
        try:
            stream = await jetstream.stream_info(self._options.stream_name)
            if found := await progress.history.other_now(jetstream, stream):
                progress.begin_anew()
                self._missed = Gap(progress.heard, progress.heard, "restored", found)
            info, gap = await self._consumer.find(jetstream, stream)
            self._missed = gap or self._missed
            self._pull = Pull(client, self._take, self._wake, self._lose_consumer)
            await self._pull.open()
        except (nats.errors.Error, asyncio.TimeoutError) as error:
            await client.close()
            raise stream_error(self._options, error) from error
        progress.history.follow(stream)
        self._consumer.adopt(info)
        self._jetstream = jetstream
        self._client = client
        # Only now that there is a consumer, which has what comes from now on.
        progress.anew = None
        missed, self._missed = self._missed, None
        self._announce(missed)
        self._announce(progress.lost(self._options.stream_name, stream.state.first_seq))

    async def _closed(self) -> None:
        self._wake()

    def _wake(self) -> None:
        self._awake.set()

    async def _read(self) -> None:
        backoff = Backoff(most=_BACKOFF_SECONDS)
        self._sink.connected()
        while not self._stopping:
            try:
                await self._keep_reading()
                await self._pull.stop()
            except (nats.errors.Error, asyncio.TimeoutError, OSError, PgSignalsError) as error:
                failure: Exception = error
            # Whatever is raised, reading must go on.
            except Exception as error:
                log.exception("%s", self)
                failure = error
            if self._stopping:
                return
            log.warning("%s: the connection is lost: %r", self, failure)
            self._sink.disconnected(failure)
            await self._reconnect(backoff)

    async def _reconnect(self, backoff: Backoff) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close()
        while not self._stopping:
            await asyncio.sleep(backoff.next())
            try:
                await self._connect()
            except (BrokerError, OSError) as error:
                log.warning("still not connected: %s", error)
            else:
                backoff.reset()
                self._sink.connected()
                return

    async def _keep_reading(self) -> None:
        client = self._client
        assert client is not None
        looked_at = time.monotonic()
        while not self._stopping:
            if not client.is_connected:
                raise nats.errors.ConnectionClosedError
            if not self._sink.full and len(self._progress.unsettled) + AT_ONCE <= MOST:
                await self._pull.ask(self._options.stream_name, self._consumer.name)
            await self._sleep(0.1 if self._sink.full else 1.0)
            now = time.monotonic()
            if now - looked_at >= _LOOK_SECONDS:
                looked_at = now
                await self._look(client)

    async def _sleep(self, seconds: float) -> None:
        """Wait until something happens, or for so long."""
        self._awake.clear()
        with contextlib.suppress(asyncio.TimeoutError):
            await within(seconds, self._awake.wait())

    def _take(self, message: Msg) -> None:
        headers = message.headers or {}
        sequence = self._progress.saw(message, headers)
        self._sink.receive(
            _attributes(headers),
            message.data,
            position=f"{self._options.stream_name}/{sequence}",
            redelivered=message.metadata.num_delivered > 1,
        )
        if not self._arrived:
            asyncio.get_running_loop().call_soon(self._settle)
        self._arrived.append(message)

    async def _lose_consumer(self, why: str) -> None:
        """End the connection, since connecting again makes another consumer."""
        if not self._stopping:
            log.warning("%s: %s", self, why)
            if self._client is not None:
                await self._client.close()

    def _settle(self) -> None:
        """Acknowledge the messages that have just come once receivers are done with them."""
        arrived, self._arrived = self._arrived, []
        loop = self._loop
        if not arrived or loop is None:
            return
        generation = self._progress.generation
        self._pending += 1

        def settled() -> None:
            loop.call(lambda: asyncio.ensure_future(self._acknowledge(arrived, generation)))

        self._sink.settle(settled)

    async def _acknowledge(self, messages: Sequence[Msg], generation: int) -> None:
        progress = self._progress
        try:
            for message in messages:
                if generation != progress.generation:
                    return  # This would acknowledge the message that has the same number now.
                sequence = message.metadata.sequence.stream
                progress.unsettled.pop(sequence, None)
                reason = progress.refused.pop(sequence, None)
                client = self._client
                if client is None or not client.is_connected:
                    continue  # The message comes again.
                answer = b"" if reason is None else b"+TERM " + reason.encode()
                await client.publish(message.reply, answer)
        except (nats.errors.Error, OSError) as error:
            log.debug("%s: could not acknowledge: %r", self, error)
        finally:
            self._pending -= 1
            self._wake()

    async def _look(self, client: Client) -> None:
        """Say that receivers are still at work, and see whether the stream lost unread messages."""
        progress = self._progress
        for message in list(progress.unsettled.values()):
            await client.publish(message.reply, b"+WPI")
        name = self._options.stream_name
        info = await self._jetstream.consumer_info(name, self._consumer.name)
        # After the consumer's state, which a purge moves past what it removes.
        stream = await self._jetstream.stream_info(name)
        if self._consumer.is_other(info) or progress.history.other(stream):
            raise nats.errors.Error(f"{name}, or its consumer {info.name}, was made anew")
        progress.history.follow(stream)
        self._announce(progress.lost(name, stream.state.first_seq))
        progress.looked(info, stream.state.last_seq)

    def _announce(self, gap: Gap | None) -> None:
        if gap is not None:
            announce_missed([gap], self._sink, log, self)

    async def _leave(self) -> None:
        """Send the acknowledgements that are due, and close the connection."""
        client = self._client
        if client is None:
            return
        deadline = time.monotonic() + 1.0
        while self._pending and time.monotonic() < deadline:
            await self._sleep(0.1)
        if client.is_connected:
            # A message that is not acknowledged is not refused either: the server would bring
            # refused ones in any order, and brings in the right one those that it takes for lost.
            await client.flush(2)
            if self._consumer.durable is None and self._consumer.name:
                with contextlib.suppress(nats.js.errors.APIError):  # The consumer is gone already.
                    await self._jetstream.delete_consumer(
                        self._options.stream_name, self._consumer.name
                    )
        await client.close()


def _attributes(headers: Mapping[str, str]) -> dict[str, str]:
    return attributes_of(((n.lower(), unquote(text)) for n, text in headers.items()), PREFIX)
