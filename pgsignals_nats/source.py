"""Events from NATS JetStream: each acknowledged after receivers have returned."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import re
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any
from urllib.parse import unquote

import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, ConsumerInfo, DeliverPolicy

from pgsignals import BrokerError, ConfigurationError, Gap, PgSignalsError
from pgsignals.backoff import Backoff
from pgsignals.sources import RemoteSink, Wanted

from .connection import SUBJECT, Loop, Server, read_url, stream_error

log = logging.getLogger("pgsignals.nats")

_AT_ONCE = 500
# Messages that receivers may have at a time.
_MOST = 10_000
# A pull request ends after so long and is made anew, so that a server which has forgotten it, and
# a consumer that is gone, are noticed.
_PULL_SECONDS = 5.0
_ACK_SECONDS = 30.0
# How soon a loss is noticed.
_LOOK_SECONDS = 2.0
# A consumer without a name is forgotten by the server when nobody has read for so long.
_FORGOTTEN_SECONDS = 300.0


class NatsSource:
    """Reads the subjects of the watched tables from their stream.

    With a name it is a durable consumer of that name, which begins with what comes after its first
    start; without, it reads all from now on. Raises ConfigurationError for what cannot be.
    """

    def __init__(
        self,
        *hosts: str,
        prefix: str = "pgsignals",
        subject: str = SUBJECT,
        stream: str | None = None,
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
        self._set_up(
            Server(
                hosts,
                *(prefix, subject, stream, tls, ca, cert, key, creds, nkey, user, password),
                config or {},
            )
        )

    @classmethod
    def from_url(cls, url: str) -> NatsSource:
        """``nats://user:password@host:port/?prefix=…``; ``nats://token@host`` for a token."""
        server, options = read_url(url)
        if options:
            raise ConfigurationError(
                f"nats://…?{next(iter(options))}=… is for backends=, where events are sent to: "
                "leave it out where they are read."
            )
        found = cls.__new__(cls)
        found._set_up(server)
        return found

    def _set_up(self, server: Server) -> None:
        self._server = server
        self._loop: Loop | None = None
        self._client: Client | None = None
        self._stopping = False
        self._consumer = ""
        # The last message of the stream that has been read, or was none of ours.
        self._floor = 0
        # The first that was skipped, when it is not known yet whether it is there and not ours.
        self._skipped: int | None = None
        self._heard: datetime | None = None
        self._arrived: list[Msg] = []
        self._unsettled: dict[int, Msg] = {}
        # What is not to come again though nobody could take it, and why.
        self._refused: dict[int, str] = {}
        self._pending = 0
        self._settled = threading.Condition()

    def __str__(self) -> str:
        return str(self._server)

    def __repr__(self) -> str:
        return f"<NatsSource {self}>"

    @property
    def is_connected(self) -> bool:
        """See RemoteSource."""
        return self._client is not None and self._client.is_connected

    @property
    def is_alive(self) -> bool:
        """See RemoteSource."""
        return self._loop is not None and self._loop.is_alive and not self._reading.done()

    def start(self, wanted: Sequence[Wanted], name: str | None, sink: RemoteSink) -> None:
        """See RemoteSource."""
        self._sink = sink
        self._name = name
        self._durable = None if name is None else _consumer_name(name)
        self._filters = sorted(
            {self._server.filter_of(w.schema, w.table, op) for w in wanted for op in w.ops}
            | {self._server.gap_subject}
        )
        self._heard = datetime.now(timezone.utc)
        loop = Loop()
        try:
            loop.run(self._connect(), 20.0)
        except TimeoutError as error:
            loop.close()
            raise BrokerError(f"{self}: not connected: {error}") from error
        except BaseException:
            loop.close()
            raise
        self._loop = loop
        self._reading = asyncio.run_coroutine_threadsafe(self._read(), self._loop.loop)

    def refuse(self, position: str, reason: str) -> None:
        """See RemoteSource: it is terminated, which the server publishes an advisory of."""
        self._refused[int(position.rpartition("/")[2])] = reason

    def stop(self, timeout: float) -> None:
        """See RemoteSource."""
        loop = self._loop
        if loop is None or not hasattr(self, "_reading"):
            return
        self._stopping = True
        loop.call(self._wake)
        try:
            self._reading.result(timeout)
        except (TimeoutError, asyncio.CancelledError):
            log.debug("%s: still reading", self)

    def close(self, timeout: float) -> None:
        """See RemoteSource."""
        loop, self._loop = self._loop, None
        if loop is None or loop.inherited:
            return
        if hasattr(self, "_reading"):
            self._reading.cancel()
        try:
            loop.run(self._leave(), max(1.0, timeout))
        except (TimeoutError, OSError, nats.errors.Error) as error:
            log.debug("%s: %r", self, error)
        loop.close()

    def abandon(self) -> None:
        """See RemoteSource."""
        self._loop = None

    async def _connect(self) -> None:
        self._awake = asyncio.Event()
        client = await self._server.connect(self._closed)
        jetstream = client.jetstream(timeout=5)
        try:
            state = (await jetstream.stream_info(self._server.stream_name)).state
            info = await self._find_consumer(jetstream, state.last_seq)
            self._inbox = client.new_inbox()
            await client.subscribe(
                self._inbox, cb=self._take, pending_msgs_limit=-1, pending_bytes_limit=-1
            )
        except (nats.errors.Error, asyncio.TimeoutError) as error:
            await client.close()
            raise stream_error(self._server, error) from error
        self._consumer = info.name
        self._jetstream = jetstream
        self._asked = 0
        self._asked_at = 0.0
        self._client = client
        self._announce_loss(state.first_seq)

    async def _find_consumer(self, jetstream: JetStreamContext, last: int) -> ConsumerInfo:
        stream = self._server.stream_name
        if self._durable is not None:
            try:
                info: ConsumerInfo = await jetstream.consumer_info(stream, self._durable)
            except nats.js.errors.NotFoundError:
                pass
            else:
                if sorted(info.config.filter_subjects or ()) != self._filters:
                    info = await jetstream.add_consumer(
                        stream,
                        info.config,
                        filter_subjects=self._filters,
                        filter_subject=None,
                    )
                if not self._floor:
                    floor = info.ack_floor.stream_seq if info.ack_floor is not None else 0
                    idle = not info.num_pending and not info.num_ack_pending
                    self._floor = last if idle else floor
                return info
        elif self._consumer:
            try:
                found: ConsumerInfo = await jetstream.consumer_info(stream, self._consumer)
                return found
            except nats.js.errors.NotFoundError:
                log.debug("%s: the consumer is gone, making another", self)
        # One that is made again goes on where the former was.
        again = bool(self._floor)
        self._floor = self._floor or last
        return await jetstream.add_consumer(
            stream,
            ConsumerConfig(
                durable_name=self._durable,
                deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
                opt_start_seq=self._first_unsettled() if again else self._floor + 1,
                ack_policy=AckPolicy.EXPLICIT,
                ack_wait=_ACK_SECONDS,
                max_ack_pending=_MOST,
                filter_subjects=self._filters,
                inactive_threshold=None if self._durable else _FORGOTTEN_SECONDS,
            ),
        )

    def _first_unsettled(self) -> int:
        return min((*self._unsettled, self._floor + 1))

    async def _closed(self) -> None:
        self._wake()

    def _wake(self) -> None:
        self._awake.set()

    async def _read(self) -> None:
        backoff = Backoff()
        self._sink.connected()
        while not self._stopping:
            try:
                await self._keep_reading()
            except (nats.errors.Error, asyncio.TimeoutError, OSError, PgSignalsError) as error:
                failure: Exception = error
            # Whatever it is, reading must go on.
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
            await self._pull(client)
            self._awake.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._awake.wait(), 0.1 if self._sink.full else 1.0)
            now = time.monotonic()
            if now - looked_at >= _LOOK_SECONDS:
                looked_at = now
                await self._look(client)

    async def _pull(self, client: Client) -> None:
        """Ask for more when there is room and the former request is over."""
        now = time.monotonic()
        if now - self._asked_at > _PULL_SECONDS + 1:
            self._asked = 0  # Its end has got lost.
        if self._asked > 0 or self._sink.full or len(self._unsettled) + _AT_ONCE > _MOST:
            return
        self._asked, self._asked_at = _AT_ONCE, now
        request = {"batch": _AT_ONCE, "expires": int(_PULL_SECONDS * 1e9)}
        await client.publish(
            f"$JS.API.CONSUMER.MSG.NEXT.{self._server.stream_name}.{self._consumer}",
            json.dumps(request).encode(),
            reply=self._inbox,
        )

    async def _take(self, message: Msg) -> None:
        headers = message.headers or {}
        if (status := headers.get("Status")) is not None:
            if status != "100":
                self._asked = 0
                self._wake()
            if status in ("404", "408"):
                return
            description = headers.get("Description", "")
            if status == "409" and "Deleted" not in description:
                return
            if status not in ("100", "404", "408"):
                if self._stopping:
                    return
                # The consumer is gone: connecting again makes another.
                log.warning("%s: %s %s", self, status, description)
                if self._client is not None:
                    await self._client.close()
            return
        self._asked -= 1
        if self._asked <= 0:
            self._wake()
        if self._stopping:
            return  # Not acknowledged: whoever comes next gets it.
        metadata = message.metadata
        sequence = metadata.sequence.stream
        if sequence > self._floor + 1 and self._skipped is None:
            self._skipped = self._floor + 1
        self._floor = max(self._floor, sequence)
        self._heard = metadata.timestamp
        self._unsettled[sequence] = message
        self._sink.receive(
            _attributes(headers),
            message.data,
            position=f"{self._server.stream_name}/{sequence}",
            redelivered=metadata.num_delivered > 1,
        )
        if not self._arrived:
            asyncio.get_running_loop().call_soon(self._settle)
        self._arrived.append(message)

    def _settle(self) -> None:
        """Have what has just come acknowledged once receivers are done with it."""
        arrived, self._arrived = self._arrived, []
        loop = self._loop
        if not arrived or loop is None:
            return
        with self._settled:
            self._pending += 1

        def settled() -> None:
            loop.call(lambda: asyncio.ensure_future(self._acknowledge(arrived)))

        self._sink.settle(settled)

    async def _acknowledge(self, messages: Sequence[Msg]) -> None:
        try:
            for message in messages:
                sequence = message.metadata.sequence.stream
                self._unsettled.pop(sequence, None)
                reason = self._refused.pop(sequence, None)
                client = self._client
                if client is None or not client.is_connected:
                    continue  # It comes again.
                answer = b"" if reason is None else b"+TERM " + reason.encode()
                await client.publish(message.reply, answer)
        except (nats.errors.Error, OSError) as error:
            log.debug("%s: could not acknowledge: %r", self, error)
        finally:
            with self._settled:
                self._pending -= 1
            self._wake()

    async def _look(self, client: Client) -> None:
        """Say that receivers are still at it, and see whether the stream lost what was to come."""
        for message in list(self._unsettled.values()):
            await client.publish(message.reply, b"+WPI")
        state = (await self._jetstream.stream_info(self._server.stream_name)).state
        info = await self._jetstream.consumer_info(self._server.stream_name, self._consumer)
        self._announce_loss(state.first_seq)
        delivered = info.delivered.stream_seq if info.delivered is not None else 0
        # What another member of the name has, or nobody wants, is not lost to us.
        self._floor = max(self._floor, state.last_seq if not info.num_pending else delivered)

    def _announce_loss(self, first: int) -> None:
        expected, self._skipped = self._skipped or self._floor + 1, None
        if first <= expected:
            return
        detail = f"the stream {self._server.stream_name} begins at {first}, and {expected} was next"
        log.error("%s: events were deleted before they were read: %s", self, detail)
        now = datetime.now(timezone.utc)
        self._sink.gap(Gap(self._heard or now, now, "retention", detail))
        self._floor = max(self._floor, first - 1)

    async def _leave(self) -> None:
        """Send the acknowledgements that are due, and close the connection."""
        client, self._client = self._client, None
        if client is None:
            return
        self._client = client
        deadline = time.monotonic() + 1.0
        while self._pending and time.monotonic() < deadline:
            self._awake.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._awake.wait(), 0.1)
        if client.is_connected:
            # What is not acknowledged is not refused either: the server would bring what is refused
            # in any order, and brings in the right one what it takes for lost.
            await client.flush(2)
            if self._durable is None and self._consumer:
                with contextlib.suppress(nats.js.errors.APIError):  # It is gone already.
                    await self._jetstream.delete_consumer(self._server.stream_name, self._consumer)
        await client.close()


def _attributes(headers: Mapping[str, str]) -> dict[str, str]:
    found = {}
    for name, text in headers.items():
        lower = name.lower()
        if lower == "content-type":
            found["datacontenttype"] = unquote(text)
        elif lower.startswith("ce-"):
            found[lower.removeprefix("ce-")] = unquote(text)
    return found


def _consumer_name(name: str) -> str:
    """The durable's name: what it may not have is replaced, and told apart by a hash."""
    if re.fullmatch(r"[A-Za-z0-9_-]+", name):
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9_-]', '_', name)}-{digest}"
