"""Events to Kafka: in order per record, acknowledged by all replicas, repeated with equal uids."""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from pgsignals import BrokerError, Event, Gap
from pgsignals.broadcasters.ledger import SentLedger
from pgsignals.cloudevents import Writer, former_record_key, header_name, record_key
from pgsignals.urls import BrokerEnd, taking

from .connection import PREFIX, Errors, broker_error, client_config, inherit
from .options import SendingOptions
from .progress import EPOCH
from .topics import DEFAULT_LIMIT, Topics

log = logging.getLogger("pgsignals.kafka")

# The length of a batch with one record beyond what is counted below; generous, since sizes are
# varints.
_OVERHEAD = 128
_HEADER_OVERHEAD = 9
# The length of the names of all attributes that there may be, with their overhead.
_MOST_NAMES = 1_000
_ROOM_SECONDS = 10.0
_PRODUCER = {
    "acks": "all",
    "enable.idempotence": True,
    # A record that fails ends the producer, rather than be overtaken by later ones.
    "enable.gapless.guarantee": True,
    # Records wait for a broker in librdkafka, in their order, for as long as it takes.
    "message.timeout.ms": 0,
    "partitioner": "murmur2_random",
    "compression.type": "lz4",
    "linger.ms": 5,
    "queue.buffering.max.messages": 100_000,
    "queue.buffering.max.kbytes": 65_536,
}


class KafkaBroadcaster(BrokerEnd[SendingOptions]):
    """Sends events to a topic for each table, keyed by the record's key.

    Its keywords are the options of ``kafka://`` URLs, ``user``, ``password``, ``config`` (settings
    of librdkafka) and ``timeout``. A record that is longer than the topic takes goes without
    values, flagged as truncated. Topics that were put back to an older state get a Gap.

    Raises ConfigurationError for an option that is wrong; connects when it is first used.
    """

    @taking(SendingOptions)
    def __init__(self, options: SendingOptions) -> None:
        self._options = options
        self._errors = Errors()
        self._topics = Topics(options, self._errors)
        self._writer = Writer(options.source or f"/pgsignals/{options.prefix}")
        # By the largest batch that a producer may make: a topic that takes less has one of its own.
        self._producers: dict[int, Producer] = {}
        # A failure is an error and the topic that it is about.
        self._ledger: SentLedger[tuple[KafkaError, str]] = SentLedger()
        self._too_long: set[str] = set()
        # The Gap that readers have yet to be told, and whether it is under way.
        self._missed: Gap | None = None
        self._telling = False
        self._process = os.getpid()

    @classmethod
    def from_url(cls, url: str) -> KafkaBroadcaster:
        """``kafka://user:password@host:port,host:port/?prefix=…&librdkafka.NAME=…``."""
        return cls(**SendingOptions.read(url))

    def publish(self, events: Sequence[Event]) -> None:
        """Send events, waiting where librdkafka's queue has no room. Raises BrokerError."""
        self._begin()
        topics = [self._topics.name_of(event.schema, event.table) for event in events]
        self._topics.prepare(topics)
        limits, ledger = self._topics.limits, self._ledger
        attributes, data = self._writer.attributes, self._writer.data
        for event, topic in zip(events, topics, strict=True):
            uid = event.uid
            if uid in ledger:
                continue
            key = record_key(event)
            about = attributes(event)
            value = data(event, key_only=uid in self._too_long)
            if _exceeds(limits[topic], key, value, about):
                value = data(event, key_only=True)
            self._produce(topic, key, value, _headers(about), uid)
            if self._options.tombstones:
                if event.op == "deleted":
                    self._produce(topic, key, None, [], f"{uid}/deleted")
                elif (former := former_record_key(event)) is not None:
                    self._produce(topic, former, None, [], f"{uid}/moved")
        for producer in self._producers.values():
            self._serve(producer.poll, 0)

    def flush(self, timeout: float) -> bool:
        self._begin()
        if not self._producers:
            self._topics.reach(timeout)
            return True
        left = sum(self._serve(producer.flush, timeout) for producer in self._producers.values())
        self._check()
        if left:
            self._compare_topics()
            if self._errors.latest is not None:
                what = f"{left} records are not acknowledged after {timeout:g} s"
                raise broker_error(self._options, what, self._errors)
            return False
        # Leaders may have changed while brokers were away.
        due = self._errors.latest or self._topics.look_due
        self._errors.clear()
        self._ledger.clear()
        self._too_long.clear()
        if self._telling:
            self._missed, self._telling = None, False
        if due:
            self._compare_topics()
        return True

    def check(self, tables: Sequence[tuple[str, str]]) -> None:
        self._begin()
        self._topics.reach(self._options.timeout)
        self._topics.check({self._options.topic_of(*table) for table in tables})

    def announce(self, gap: Gap) -> None:
        """Send a Gap to every partition of every topic, since each has readers of its own."""
        self._begin()
        self._tell(gap)

    def _tell(self, gap: Gap) -> None:
        pattern = re.compile(self._options.topic_pattern(None, None))
        try:
            producer = self._producer(DEFAULT_LIMIT)
            known = producer.list_topics(timeout=self._options.timeout).topics
        except KafkaException as error:
            raise broker_error(self._options, "no answer", self._errors, error) from error
        topics = {name: found for name, found in known.items() if pattern.match(name)}
        self._topics.prepare(topics)
        attributes, data = self._writer.gap(gap)
        for name, found in topics.items():
            for partition in found.partitions:
                uid = f"{attributes['id']}/{name}/{partition}"
                if uid not in self._ledger:
                    self._produce(name, None, data, _headers(attributes), uid, partition)

    def close(self) -> None:
        if self._process != os.getpid():
            self._abandon()
            return
        self._purge()
        self._ledger.clear()

    def _abandon(self) -> None:
        """Begin anew in the child of a fork, where a lock of the parent's may be held for ever."""
        for producer in self._producers.values():
            inherit(producer)
        self._producers = {}
        self._ledger = SentLedger()
        self._errors.clear()
        self._topics.limits.clear()
        self._telling = False
        self._process = os.getpid()

    def _begin(self) -> None:
        if self._process != os.getpid():
            self._abandon()
        for producer in self._producers.values():
            self._serve(producer.poll, 0)
        self._check()
        if self._missed is not None and not self._telling:
            self._tell(self._missed)
            self._telling = True

    def _serve(self, call: Callable[[float], int], timeout: float) -> int:
        """Poll or flush, which raise a producer's fatal error past our callbacks."""
        try:
            return call(timeout)
        except (KafkaException, SystemError) as error:
            log.debug("%s: %r", self, error)
            fatal = error.args[0] if isinstance(error, KafkaException) else None
            self._ledger.fail((fatal or KafkaError(KafkaError._FATAL), ""))
            return 1

    def _produce(
        self,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        headers: list[tuple[str, str | bytes | None]],
        uid: str,
        partition: int = -1,
    ) -> None:
        producer = self._producer(self._topics.limits[topic])
        done = functools.partial(self._delivered, uid)
        waited = 0.0
        while True:
            try:
                producer.produce(
                    topic, value, key, partition, on_delivery=done, headers=headers or None
                )
            except BufferError:
                if waited >= _ROOM_SECONDS:
                    what = f"no room for further records within {_ROOM_SECONDS:g} s"
                    raise broker_error(self._options, what, self._errors) from None
                self._serve(producer.poll, 0.1)
                waited += 0.1
                self._check()
            except KafkaException as error:
                self._ledger.fail((error.args[0], topic))
                self._check()
            else:
                self._ledger.send(uid)
                return

    def _delivered(self, uid: str, error: KafkaError | None, message: Message) -> None:
        """Enter a record's fate in the ledger; librdkafka calls this while it is polled."""
        if error is None:
            self._ledger.acknowledge(uid)
            return
        if error.code() == KafkaError.MSG_SIZE_TOO_LARGE:
            self._too_long.add(uid)
        purged = error.code() in (KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT)
        self._ledger.refuse([uid], None if purged else (error, message.topic() or ""))

    def _check(self) -> None:
        """Raise the reason for which a record was refused.

        Records that are still under way are given up first: if the record's later event arrived,
        the earlier one would come behind it when it is sent again.
        """
        failure = self._ledger.take_failure()
        if failure is None:
            return
        error, topic = failure
        self._give_up()
        raise broker_error(self._options, f"the topic {topic} refused a record", Errors(), error)

    def _give_up(self) -> None:
        self._purge()
        self._ledger.give_up()
        self._topics.limits.clear()
        self._telling = False

    def _purge(self) -> None:
        producers, self._producers = self._producers, {}
        for producer in producers.values():
            producer.purge()
            self._serve(producer.flush, 1.0)

    def _compare_topics(self) -> None:
        """Check that the topics are those that were written to. Raises BrokerError."""
        if why := self._topics.look_for_others():
            log.error("%s: events that were sent may be lost: %s", self, why)
            self._give_up()
            # Events that were acknowledged since the last flush are sent again, too.
            self._ledger.clear()
            self._missed = Gap(EPOCH, datetime.now(timezone.utc), "restored", why)
            raise BrokerError(f"{self}: {why}.")

    def _producer(self, limit: int) -> Producer:
        if limit not in self._producers:
            limits: dict[str, Any] = {
                "message.max.bytes": max(1_000, limit),
                "batch.size": max(1, min(1_000_000, limit - _OVERHEAD)),
            }
            config = _PRODUCER | limits | client_config(self._options, self._errors)
            self._producers[limit] = Producer(config)
        return self._producers[limit]


def _headers(attributes: Mapping[str, str]) -> list[tuple[str, str | bytes | None]]:
    return [(header_name(name, PREFIX), text) for name, text in attributes.items()]


def _exceeds(limit: int, key: bytes | None, value: bytes, attributes: Mapping[str, str]) -> bool:
    """Whether the record may take more than its topic allows."""
    size = len(value) + len(key or b"") + _OVERHEAD
    # Nearly all are so far from the limit that a look at each attribute would be a waste.
    if size + 4 * sum(map(len, attributes.values())) + _MOST_NAMES <= limit:
        return False
    for name, text in attributes.items():
        # A character outside ASCII has four bytes at most.
        size += len(name) + len(text) * (1 if text.isascii() else 4) + _HEADER_OVERHEAD
    return size > limit
