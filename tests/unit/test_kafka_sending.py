"""What a Kafka broadcaster counts and tells when records are refused, with a producer's model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from typing import Any, ClassVar
from unittest import mock

import pytest
from confluent_kafka import KafkaError, KafkaException

from pgsignals import BrokerError, Event, Gap
from pgsignals.core.events import Message, Topic
from pgsignals.core.metrics import Meter
from pgsignals.dispatch.forwarder import Forwarder
from pgsignals.errors import PluginError
from pgsignals_kafka import KafkaBroadcaster
from pgsignals_kafka.topics import DEFAULT_LIMIT

TOPIC = Topic("public.t", "inserted", None, "public", "t", ("id",), (), False, mock.Mock(), "t")
NAME = "x.public.t"
GAP = Gap(datetime.fromtimestamp(0, timezone.utc), datetime.now(timezone.utc), "overflow")


class Record:
    """A record that was produced."""

    def __init__(self, topic: str, value: bytes, done: Callable[..., None], kind: str) -> None:
        self.topic, self.value, self.done, self.kind = topic, value, done, kind


class Producer:
    """librdkafka as far as it is asked here: records wait until a test delivers or refuses them."""

    made: ClassVar[list[Producer]] = []
    partitions: ClassVar[dict[str, int] | None] = None

    def __init__(self, config: Any) -> None:
        self.waiting: list[Record] = []
        self._ended: list[tuple[Record, KafkaError | None]] = []
        Producer.made.append(self)

    def produce(
        self,
        topic: str,
        value: bytes,
        key: bytes | None,
        partition: int = -1,
        on_delivery: Any = None,
        headers: Any = None,
    ) -> None:
        """Queue a record."""
        kind = dict(headers or {}).get("ce_type", "")
        kind = kind.decode() if isinstance(kind, bytes) else kind
        self.waiting.append(Record(topic, value, on_delivery, kind))

    def end(self, count: int, error: KafkaError | None = None) -> None:
        """Deliver, or refuse, the first records."""
        self._ended += [(self.waiting.pop(0), error) for _ in range(count)]

    def poll(self, timeout: float) -> int:
        """Call back for what has ended."""
        if not self._ended:
            time.sleep(timeout)
        ended, self._ended = self._ended, []
        for record, error in ended:
            about = mock.Mock(**{"value.return_value": record.value})
            about.topic.return_value = record.topic
            record.done(error, about)
        return len(ended)

    def flush(self, timeout: float) -> int:
        """Return how many are left."""
        if self._ended:
            self.poll(0)
        return len(self.waiting)

    def purge(self) -> None:
        """Give up what waits."""
        self.end(len(self.waiting), KafkaError(KafkaError._PURGE_QUEUE))

    def list_topics(self, timeout: float) -> Any:
        """Return the topics, if a broker answers."""
        if Producer.partitions is None:
            raise KafkaException(KafkaError(KafkaError._TRANSPORT))
        found = {name: mock.Mock(partitions=range(n)) for name, n in Producer.partitions.items()}
        return mock.Mock(topics=found)


@pytest.fixture
def broadcaster(monkeypatch: pytest.MonkeyPatch) -> Iterator[KafkaBroadcaster]:
    """A broadcaster whose topics need no broker."""
    monkeypatch.setattr("pgsignals_kafka.broadcaster.Producer", Producer)
    monkeypatch.setattr(Producer, "made", [])
    monkeypatch.setattr(Producer, "partitions", None)
    found = KafkaBroadcaster.from_url("kafka://localhost:9092/?prefix=x")
    topics = found._topics
    monkeypatch.setattr(
        topics, "prepare", lambda names: topics.limits.update(dict.fromkeys(names, 500_000))
    )
    monkeypatch.setattr(topics, "reach", lambda timeout: None)
    topics._looked_at = time.monotonic() + 3600
    yield found
    found.close()


def events(first: int, end: int) -> list[Event]:
    """Events of one statement."""
    message = Message(TOPIC, 1, first, 1_000_000, {}, [(n,) for n in range(first, end)])
    return [Event(message, number, row) for number, row in enumerate(message.rows)]


def kinds() -> list[str]:
    """The kinds of the records that wait, of all producers."""
    return [each.kind for producer in Producer.made for each in producer.waiting]


def test_a_flush_without_producers_ends_the_count(broadcaster: KafkaBroadcaster) -> None:
    """What arrived before a refusal is not counted for what is published behind a flush."""
    broadcaster.publish(events(0, 5))
    broadcaster.publish(events(5, 10))
    [producer] = Producer.made
    producer.end(5)
    producer.end(1, KafkaError(KafkaError.TOPIC_AUTHORIZATION_FAILED))
    with pytest.raises(BrokerError, match="refused"):
        broadcaster.arrived(0.0)
    assert broadcaster.flush(0.1)
    broadcaster.publish(events(10, 20))
    assert broadcaster.arrived(0.0) == 0
    Producer.made[-1].end(10)
    assert broadcaster.arrived(0.0) == 10


def test_a_late_topic_whose_brokers_do_not_answer(broadcaster: KafkaBroadcaster) -> None:
    """It is told of the Gap at the next try, and no event goes before that."""
    broadcaster._announced = GAP
    with pytest.raises(BrokerError, match="no answer"):
        broadcaster.publish(events(0, 2))
    assert kinds() == []
    Producer.partitions = {NAME: 2}
    broadcaster.publish(events(0, 2))
    assert kinds() == [*["pgsignals.gap"] * 2, *["pgsignals.inserted"] * 2]
    broadcaster.publish(events(2, 3))
    assert kinds()[4:] == ["pgsignals.inserted"]


@pytest.mark.parametrize("which", ["_missed", "_announced"])
def test_a_gap_under_way_when_it_is_closed(broadcaster: KafkaBroadcaster, which: str) -> None:
    """It is told again by who goes on."""
    Producer.partitions = {NAME: 1}
    setattr(broadcaster, which, GAP)
    for _ in range(2):
        broadcaster.publish(events(0, 2))
        assert kinds() == ["pgsignals.gap", *["pgsignals.inserted"] * 2]
        broadcaster.close()
        assert kinds() == []
    broadcaster.publish(events(0, 2))
    Producer.made[-1].end(3)
    assert broadcaster.flush(0.1)
    broadcaster.publish(events(2, 3))
    assert kinds() == ["pgsignals.inserted"]


def test_an_idle_producer_holds_up_no_other(broadcaster: KafkaBroadcaster) -> None:
    """Where one of two has nothing to do, the other one's records are counted at once."""
    broadcaster._producer(DEFAULT_LIMIT)
    broadcaster.publish(events(0, 5))
    idle, busy = Producer.made
    assert not idle.waiting
    polled: list[float] = []
    poll = busy.poll

    def answering(timeout: float) -> int:
        polled.append(timeout)
        if len(polled) == 2:
            busy.end(5)
        return poll(timeout)

    busy.poll = answering  # type: ignore[method-assign]
    began = time.monotonic()
    assert broadcaster.arrived(60.0) == 5
    # Not a share of what there is.
    assert time.monotonic() - began < 30.0


def test_a_broadcaster_that_counts_too_much(broadcaster: KafkaBroadcaster) -> None:
    """Nothing is acknowledged by a count that goes beyond what was published."""
    forwarder = Forwarder(broadcaster, 100, Meter())
    forwarder.submit_page(events(0, 3))
    forwarder._publish(forwarder._take())
    with pytest.raises(PluginError, match="counts 4 events of 3"):
        forwarder._done(4)
    assert forwarder.status.delivered == 0
