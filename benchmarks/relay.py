"""Relaying: a backlog in the outbox, and how fast a broker acknowledges it."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import pgsignals

from .catchup import leave_backlog
from .harness import DEADLINE, Bench, Figure, Miscounted, Unavailable, connect, ratios
from .processes import Child, hear, processor_seconds, say

EVENTS = {"Kafka": 200_000, "NATS": 100_000}
# What a bare loop for NATS sends before it waits: nats-py has no queue of its own.
_GROUP = 500


class Broker(Protocol):
    """A server of tests/brokers.py."""

    url: str
    process: Any

    def start(self) -> None:
        """Start it."""

    def close(self) -> None:
        """End it."""


@contextmanager
def started(kind: str) -> Iterator[Broker]:
    """The tests' own server, whose outcomes are pytest's. Raises Unavailable."""
    import pytest

    from tests import brokers

    try:
        broker: Broker = {"kafka": brokers.Kafka, "nats": brokers.Nats}[kind]()
        try:
            broker.start()
            yield broker
        finally:
            broker.close()
    except pytest.skip.Exception as reason:
        raise Unavailable(str(reason)) from reason
    except pytest.fail.Exception as reason:
        raise RuntimeError(str(reason)) from reason


def kafka(bench: Bench) -> list[Figure]:
    """Ours, and a loop of confluent-kafka over the same rows, which no relay can be faster than."""
    with started("kafka") as broker:
        return _measure(bench, broker, "Kafka", "confluent-kafka", kafka_records, 40_000)


def nats(bench: Bench) -> list[Figure]:
    """The same with NATS JetStream and nats-py: four times what it was without chains."""
    with started("nats") as broker:
        return _measure(bench, broker, "NATS", "nats-py", nats_records, None, 3.5)


def _measure(
    bench: Bench,
    broker: Broker,
    what: str,
    client: str,
    records: Callable[[str, str], int],
    target: float | None,
    target_ratio: float | None = None,
) -> list[Figure]:
    count = bench.scaled(EVENTS[what])
    dsn = bench.shop()
    turns = [f"round{number}" for number in range(bench.rounds)]
    urls = {name: f"{broker.url}?prefix={name}&create=true" for name in turns}
    leave_backlog(dsn, turns, count, single=False, backends=urls)
    bench.settle()
    used = {"database": 0.0, "our process": 0.0, "broker": 0.0}
    ours, bare, taken = [], [], []
    for name in turns:
        pids = {"database": bench.server.pid, "broker": broker.process.pid}
        with Child(__name__, "relay", dsn, name, urls[name], count) as relay:
            relay.hear()
            before = {part: processor_seconds(pid) for part, pid in pids.items()}
            relay.tell()
            rate, used_here = relay.hear()
            for part, pid in pids.items():
                used[part] += processor_seconds(pid) - before[part]
            used["our process"] += used_here
            taken.append(used_here)
        ours.append(rate)
        _check(records(broker.url, name), count)
        with Child(__name__, client, dsn, broker.url, f"bare{name}") as loop:
            sent, seconds = loop.hear()
        bare.append(count / seconds)
        _check(sent, count)
        _check(records(broker.url, f"bare{name}"), count)
    total = sum(used.values())
    return [
        Figure(f"relay outbox → {what}, acknowledged", ours, "events/s", target, at_most=False),
        Figure(f"  a bare {client} loop over the same rows", bare, "events/s"),
        Figure("  ours ÷ that", ratios(ours, bare), "", target_ratio, at_most=False),
        Figure("  processor time of our process, an event", [1e6 * u / count for u in taken], "µs"),
        *(
            Figure(f"  share of the processor time, {part}", [100 * seconds / total], "%")
            for part, seconds in used.items()
        ),
    ]


def _check(found: int, written: int) -> None:
    if found != written:
        raise Miscounted(f"the broker has {found:,} records of {written:,} rows")


def kafka_records(url: str, prefix: str) -> int:
    """How many records the topic of a prefix has."""
    from confluent_kafka import Consumer, TopicPartition

    consumer = Consumer({"bootstrap.servers": _servers(url), "group.id": "bench"})
    topic = f"{prefix}.public.orders"
    partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
    found = 0
    for partition in partitions:
        low, high = consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=10)
        found += high - low
    consumer.close()
    return found


def nats_records(url: str, prefix: str) -> int:
    """How many messages the stream of a prefix has."""
    import nats

    async def count() -> int:
        client = await nats.connect(url)
        info = await client.jetstream().stream_info(prefix)
        await client.close()
        return info.state.messages

    return asyncio.run(count())


def _servers(url: str) -> str:
    return url.partition("://")[2].rstrip("/")


class _Acknowledged:
    """Metrics of a Hub: counts what the broker has acknowledged."""

    def __init__(self, expected: int) -> None:
        self._left = expected
        self._finished = threading.Event()
        # When the first of them were acknowledged, and how many came after those; by then the
        # topic is made, and all are connected. A small load is acknowledged at once: it has to
        # count from the start.
        self._began_at = time.perf_counter()
        self._after = expected
        self._begun = False
        self._finished_at = 0.0

    def count(self, name: str, amount: int, /, **labels: str) -> None:
        """See pgsignals.Metrics."""
        if name == "backend_events" and amount:
            self._left -= amount
            at = time.perf_counter()
            if not self._begun and self._left > 0:
                self._began_at, self._after = at, self._left
            self._begun = True
            if self._left <= 0:
                self._finished_at = at
                self._finished.set()

    def gauge(self, name: str, read: Callable[[], float], /, **labels: str) -> None:
        """See pgsignals.Metrics."""

    def wait(self) -> float:
        """Events of each second, once the last that is expected has been acknowledged."""
        if not self._finished.wait(DEADLINE):
            raise Miscounted(f"{self._left:,} events have not been acknowledged")
        return self._after / (self._finished_at - self._began_at)


def _relay(dsn: str, name: str, url: str, count: str) -> None:
    """What ``pgsignals relay`` does."""
    say()
    hear()
    used = time.process_time()
    acknowledged = _Acknowledged(int(count))
    with pgsignals.Hub() as hub:
        hub.start(
            dsn,
            [pgsignals.watch("orders", "inserted")],
            delivery="outbox",
            name=name,
            backends=[url],
            workers=0,
            metrics=acknowledged,
        )
        rate = acknowledged.wait()
        used = time.process_time() - used
    say((rate, used))


def _rows(dsn: str) -> Iterator[tuple[int, str]]:
    connection = connect(dsn)
    connection.autocommit = False
    with connection.cursor("orders") as cursor:
        cursor.execute("SELECT id, json_build_object('id', id)::text FROM orders ORDER BY id")
        yield from cursor
    connection.close()


def _produce(dsn: str, url: str, prefix: str) -> None:
    from confluent_kafka import Producer
    from confluent_kafka.admin import AdminClient, NewTopic

    topic = f"{prefix}.public.orders"
    # The client has to outlive the call.
    admin = AdminClient({"bootstrap.servers": _servers(url)})
    admin.create_topics([NewTopic(topic)])[topic].result(10)
    producer = Producer(
        {
            "bootstrap.servers": _servers(url),
            "acks": "all",
            "enable.idempotence": True,
            "linger.ms": 5,
            "compression.type": "lz4",
        }
    )
    sent = 0

    def delivered(error: object, _message: object) -> None:
        nonlocal sent
        sent += error is None

    began = time.perf_counter()
    for key, text in _rows(dsn):
        while True:
            try:
                producer.produce(topic, text, str(key), on_delivery=delivered)
                break
            except BufferError:
                producer.poll(0.1)
        producer.poll(0)
    producer.flush(DEADLINE)
    say((sent, time.perf_counter() - began))


def _publish(dsn: str, url: str, prefix: str) -> None:
    import nats

    async def publish() -> tuple[int, float]:
        client = await nats.connect(url)
        jetstream = client.jetstream()
        await jetstream.add_stream(name=prefix, subjects=[f"{prefix}.>"])
        subject = f"{prefix}.public.orders.inserted"
        sent = 0
        began = time.perf_counter()
        group: list[Any] = []
        for key, text in _rows(dsn):
            headers = {"Nats-Msg-Id": str(key)}
            group.append(jetstream.publish(subject, text.encode(), headers=headers))
            if len(group) == _GROUP:
                sent += len(await asyncio.gather(*group))
                group.clear()
        sent += len(await asyncio.gather(*group))
        seconds = time.perf_counter() - began
        await client.close()
        return sent, seconds

    say(asyncio.run(publish()))


if __name__ == "__main__":
    {"relay": _relay, "confluent-kafka": _produce, "nats-py": _publish}[sys.argv[1]](*sys.argv[2:])
