"""A broker at the end of the way: it suffers too, and is read back by clients that are not ours."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

import nats
from confluent_kafka import OFFSET_BEGINNING, Consumer, TopicPartition
from nats.js.api import ConsumerConfig, DeliverPolicy
from nats.js.errors import NotFoundError

from tests.brokers import Kafka, Nats, free_port
from tests.proxy import Proxy

from .ledger import Announced, Delivery, Note

PREFIX = "durable"
BROKER_FAULTS = ("broker killed", "broker cut", "broker in a black hole")
_SECONDS = 30.0


class Destination(ABC):
    """A broker behind a proxy: relays go to ``url``; ``consumer`` is what the verdict calls it."""

    # Whether what is sent again within the duplicate window is not there twice.
    deduplicates = False

    def __init__(self, kind: str, process: Kafka | Nats, port: int) -> None:
        self.consumer = f"relay/{kind}"
        self._process = process
        self._proxy = Proxy("127.0.0.1", process.port)
        self._proxy.port = port
        self._sequence = 0
        self._stalled_until: float | None = None
        self._start_at: float | None = None

    @property
    @abstractmethod
    def url(self) -> str:
        """Where relays send events to."""

    @abstractmethod
    def _messages(self) -> Iterator[tuple[Mapping[str, str], bytes]]:
        """The attributes and the data of what is there since the last time, each record's in order.

        Waits where the broker is not back yet.
        """

    def start(self) -> None:
        """Start the broker and the proxy."""
        self._process.start()
        self._proxy.__enter__()

    def close(self) -> None:
        """End both."""
        self._proxy.__exit__(None, None, None)
        self._process.close()

    def inject(self, fault: str, length: float, now: float) -> bool:
        """Have it suffer for so long; whether it can at this time."""
        if self._start_at is not None or self._stalled_until is not None:
            return False
        if fault == "broker killed":
            self._process.stop(signal.SIGKILL)
            self._start_at = now + length
        elif fault == "broker cut":
            self._proxy.cut()
        else:
            self._proxy.stall()
            self._stalled_until = now + length
        return True

    def tend(self, now: float) -> None:
        """End what it has suffered long enough."""
        if self._start_at is not None and now >= self._start_at:
            self._start_at = None
            self._process.start()
        if self._stalled_until is not None and now >= self._stalled_until:
            self._stalled_until = None
            self._proxy.resume()

    def heal(self) -> None:
        """End what it suffers."""
        self.tend(float("inf"))

    def read(self) -> Iterator[Note]:
        """What has arrived since the last time, by the wire format as it is documented."""
        for attributes, data in self._messages():
            body = json.loads(data)
            if attributes["type"] == "pgsignals.gap":
                since, until = (_time(body[name]) for name in ("since", "until"))
                detail = f"{body['reason']}: {body['detail']}"
                yield Announced(self.consumer, 0, since, until, detail)
                continue
            self._sequence += 1
            yield Delivery(
                self.consumer,
                0,
                self._sequence,
                body["key"]["id"],
                body["values"]["n"],
                body["values"]["nonce"],
                attributes["id"],
                # A broker does not tell.
                redelivered=True,
            )


def _time(text: str) -> datetime:
    # Of Python 3.10, fromisoformat does not take a Z.
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


class KafkaDestination(Destination):
    """Apache Kafka, read by confluent-kafka."""

    def __init__(self) -> None:
        port = free_port()
        # Clients are told this address by the broker, whichever they begin with.
        broker = Kafka(**{"advertised.listeners": f"PLAINTEXT://127.0.0.1:{port}"})
        super().__init__("kafka", broker, port)
        self._address = f"127.0.0.1:{port}"
        self._next: dict[int, int] = {}

    @property
    def url(self) -> str:
        """See Destination."""
        return f"kafka://{self._address}/?prefix={PREFIX}&create=true&partitions=3"

    def _messages(self) -> Iterator[tuple[Mapping[str, str], bytes]]:
        topic = f"{PREFIX}.public.records"
        consumer = Consumer({"bootstrap.servers": self._address, "group.id": "verdict"})
        try:
            found = consumer.list_topics(topic, timeout=_SECONDS).topics[topic]
            ends = {
                number: consumer.get_watermark_offsets(
                    TopicPartition(topic, number), timeout=_SECONDS
                )[1]
                for number in found.partitions
            }
            behind = {n for n, end in ends.items() if self._next.get(n, 0) < end}
            consumer.assign(
                [TopicPartition(topic, n, self._next.get(n, OFFSET_BEGINNING)) for n in behind]
            )
            deadline = time.monotonic() + _SECONDS
            while behind and time.monotonic() < deadline:
                for message in consumer.consume(1000, timeout=1.0):
                    if message.error() is not None:
                        continue
                    number, offset = message.partition(), message.offset()
                    self._next[number] = offset + 1
                    if self._next[number] >= ends[number]:
                        behind.discard(number)
                    headers: Any = message.headers()
                    attributes = {name: value.decode() for name, value in headers}
                    yield (
                        {name.removeprefix("ce_"): text for name, text in attributes.items()},
                        message.value(),
                    )
        finally:
            consumer.close()


class NatsDestination(Destination):
    """nats-server, read by nats-py."""

    deduplicates = True

    def __init__(self) -> None:
        port = free_port()
        super().__init__("nats", Nats(), port)
        self._address = f"nats://127.0.0.1:{port}/"
        self._next = 1

    @property
    def url(self) -> str:
        """See Destination."""
        # The window is longer than any campaign.
        return f"{self._address}?prefix={PREFIX}&create=true&window=86400"

    def _messages(self) -> Iterator[tuple[Mapping[str, str], bytes]]:
        found = asyncio.run(self._fetch())
        self._next += len(found)
        yield from found

    async def _fetch(self) -> list[tuple[Mapping[str, str], bytes]]:
        client = await nats.connect(self._address, connect_timeout=int(_SECONDS))
        try:
            jetstream = client.jetstream(timeout=_SECONDS)
            found: list[tuple[Mapping[str, str], bytes]] = []
            try:
                last = (await jetstream.stream_info(PREFIX)).state.last_seq
            except NotFoundError:
                # Nothing has been relayed yet. Later on it would be a loss.
                if self._next > 1:
                    raise
                return found
            if last < self._next:
                return found
            begin = ConsumerConfig(
                deliver_policy=DeliverPolicy.BY_START_SEQUENCE, opt_start_seq=self._next
            )
            subscription = await jetstream.subscribe(
                f"{PREFIX}.>", ordered_consumer=True, config=begin
            )
            while self._next + len(found) <= last:
                message = await subscription.next_msg(_SECONDS)
                headers = message.headers or {}
                found.append(
                    (
                        {n.lower().removeprefix("ce-"): text for n, text in headers.items()},
                        message.data,
                    )
                )
            return found
        finally:
            await client.close()


DESTINATIONS: Mapping[str, type[KafkaDestination] | type[NatsDestination]] = {
    "kafka": KafkaDestination,
    "nats": NatsDestination,
}
