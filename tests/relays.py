"""Brokers that ``pgsignals relay`` passes events on to, and the program."""

from __future__ import annotations

import asyncio
import json
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import nats
import pytest
from confluent_kafka import OFFSET_BEGINNING, Consumer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]

from pgsignals.testing import find_installations
from tests.brokers import ODD_PASSWORD, Kafka, Nats
from tests.commands import Program, Result
from tests.conftest import DEADLINE, Database


def psql(dsn: str, script: str) -> None:
    """Have psql run a script."""
    beside = (found.bindir / "psql" for found in find_installations())
    program = next(path for path in beside if path.exists())
    subprocess.run(
        [program, "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", dsn, "-f", "-"],
        input=script.encode(),
        check=True,
    )


class KafkaBroker:
    """Apache Kafka, as the tests of the relay use it; with a port that asks for a password."""

    def __init__(self, server: Kafka) -> None:
        self.port = server.port
        self.guarded = f"kafka://127.0.0.1:{server.sasl_port}/"
        self.url = server.url
        self.missing = "there is no topic"

    def ids(self, prefix: str) -> list[int]:
        """The ids of all records of the table orders, by confluent-kafka alone."""
        consumer = Consumer({"bootstrap.servers": f"127.0.0.1:{self.port}", "group.id": "foreign"})
        try:
            topic = f"{prefix}.public.orders"
            places = [
                TopicPartition(topic, number, OFFSET_BEGINNING)
                for number in consumer.list_topics(topic, timeout=DEADLINE).topics[topic].partitions
            ]
            ends = [consumer.get_watermark_offsets(place, timeout=DEADLINE)[1] for place in places]
            consumer.assign(places)
            found: list[int] = []
            while len(found) < sum(ends):
                arrived = consumer.consume(sum(ends) - len(found), timeout=DEADLINE)
                assert arrived, f"{len(found)} of {sum(ends)}"
                found += [json.loads(each.value())["key"]["id"] for each in arrived]
            return found
        finally:
            consumer.close()

    def create(self, prefix: str) -> None:
        """Create what the events of orders need."""
        admin = AdminClient({"bootstrap.servers": f"127.0.0.1:{self.port}"})
        for answer in admin.create_topics([NewTopic(f"{prefix}.public.orders", 2, 1)]).values():
            answer.result(DEADLINE)


class NatsBroker:
    """A nats-server, as the tests of the relay use it; another one asks for a password."""

    def __init__(self) -> None:
        self.server = Nats()
        self.server.start()
        self._guarded = Nats(f'authorization {{ user: bob, password: "{ODD_PASSWORD}" }}\n')
        self._guarded.start()
        self.port = self.server.port
        self.guarded = self._guarded.url
        self.url = self.server.url
        self.missing = "there is no stream"

    def ids(self, prefix: str) -> list[int]:
        """The ids of all messages of the table orders, by nats-py alone."""

        async def read() -> list[int]:
            client = await nats.connect(self.url)
            jetstream = client.jetstream()
            count = (await jetstream.stream_info(prefix)).state.messages
            subscription = await jetstream.subscribe(f"{prefix}.>", ordered_consumer=True)
            found = []
            while len(found) < count:
                message = await subscription.next_msg(DEADLINE)
                found.append(json.loads(message.data)["key"]["id"])
            await client.close()
            return found

        return asyncio.run(read())

    def create(self, prefix: str) -> None:
        """Create what the events of orders need."""

        async def create() -> None:
            client = await nats.connect(self.url)
            await client.jetstream().add_stream(name=prefix, subjects=[f"{prefix}.>"])
            await client.close()

        asyncio.run(create())

    def close(self) -> None:
        """End both."""
        self.server.close()
        self._guarded.close()


Broker = KafkaBroker | NatsBroker


@pytest.fixture
def kafka_broker(kafka: Kafka) -> KafkaBroker:
    """A running Apache Kafka."""
    return KafkaBroker(kafka)


@pytest.fixture(scope="module")
def nats_broker() -> Iterator[NatsBroker]:
    """A running nats-server."""
    running = NatsBroker()
    yield running
    running.close()


@pytest.fixture(params=["kafka", "nats"])
def broker(request: pytest.FixtureRequest) -> Broker:
    """Each kind of broker."""
    found: Broker = request.getfixturevalue(f"{request.param}_broker")
    return found


@pytest.fixture
def prefix() -> str:
    """A prefix that no other test uses."""
    return f"t{uuid.uuid4().hex[:8]}"


@pytest.fixture(autouse=True)
def orders(db: Database) -> None:
    """A table of orders."""
    db("CREATE TABLE orders (id bigserial PRIMARY KEY, status text, total numeric(10, 2))")


@pytest.fixture
def start(dsn: str) -> Iterator[Callable[..., Program]]:
    """Starts relays, or other programs, that are ended at the end."""
    started: list[Program] = []

    def start(*arguments: str, relay: bool = True, **variables: str) -> Program:
        command = ("-m", "pgsignals", "relay", *arguments) if relay else arguments
        started.append(Program(*command, dsn=dsn if relay else "", **variables))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.wait(DEADLINE)


def says(program: Program, wanted: str) -> str:
    """The first line of its stderr, from here on, with a text in it."""
    while True:
        line = program.err()
        if wanted in line:
            return line


def terminate(program: Program) -> Result:
    """Send SIGTERM and wait for the end."""
    program.process.terminate()
    return program.end()


def write(folder: Path, text: str) -> Path:
    """A file of TOML."""
    path = folder / "pgsignals.toml"
    path.write_text(text)
    return path
