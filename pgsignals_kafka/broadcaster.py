"""Events to Kafka: in order per record, acknowledged by all replicas, repeated with equal uids."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any, NamedTuple

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from pgsignals import BrokerError, Event, Gap
from pgsignals.broadcasters.ledger import Chunk, ChunkLedger
from pgsignals.cloudevents import Heading, Writer, former_record_key, header_name
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
# The length that the headers which differ between the events of a topic have at most, but for ids.
_MOST_MORE = 1_500
# The most topics of ours whose headers are kept.
_MOST_COMMON = 1_000
_ID = header_name("id", PREFIX)
_ROOM_SECONDS = 10.0
_LOOK_AROUND_SECONDS = 0.01
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

Headers = dict[str, str | bytes | None]


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
        self._ledger: ChunkLedger[tuple[KafkaError, str]] = ChunkLedger()
        # The hashes of values that were refused for their length: they are cut when they are sent
        # again.
        self._too_long: set[int] = set()
        # By the topics of our own.
        self._common: dict[object, _Common] = {}
        # The Gap that readers have yet to be told, and whether it is under way.
        self._missed: Gap | None = None
        self._telling = False
        # What has been announced, and the topics that it went to: one that comes to be later has
        # lost as much.
        self._announced: Gap | None = None
        self._told: dict[str, _Chunk] = {}
        self._process = os.getpid()

    @classmethod
    def from_url(cls, url: str) -> KafkaBroadcaster:
        """``kafka://user:password@host:port,host:port/?prefix=…&librdkafka.NAME=…``."""
        return cls(**SendingOptions.read(url))

    def publish(self, events: Sequence[Event]) -> None:
        """Send events, waiting where librdkafka's queue has no room. Raises BrokerError."""
        self._begin()
        chunk, limits = self._open(), self._topics.limits
        uids, known, tombstones = chunk.uids, self._ledger.known, self._options.tombstones
        latest: Heading | None = None
        for event, heading, uid, key, value in self._writer.write(events):
            if heading is not latest:
                latest = heading
                common = self._common.get(heading.of_topic) or self._add_common(event, heading)
                topic = common.topic
                if topic not in limits or (self._announced is not None and topic not in self._told):
                    self._prepare(events)
                limit = limits[topic]
                # Nearly all are so far from the limit that a look at each header would be a waste.
                room = limit - common.length - _MOST_MORE
                produce = self._producer(limit).produce
                headers = common.headers.copy()
                for name, text in heading.more.items():
                    headers[header_name(name, PREFIX)] = text
            if uid in known:
                continue
            headers[_ID] = uid
            if (
                len(value) + len(key or b"") + 4 * len(uid) > room
                and _length(headers, key, value) > limit
            ) or (self._too_long and hash(value) in self._too_long):
                value = self._writer.data(event, key_only=True)
            try:
                produce(topic, value, key, on_delivery=chunk, headers=headers)
                chunk.left += 1
            except (BufferError, KafkaException):
                self._produce(chunk, topic, key, value, headers)
            if tombstones:
                if event.op == "deleted":
                    self._produce(chunk, topic, key, None)
                elif (former := former_record_key(event)) is not None:
                    self._produce(chunk, topic, former, None)
            uids.append(uid)
            known.add(uid)

    def _prepare(self, events: Sequence[Event]) -> None:
        names = {self._topics.name_of(each.schema, each.table) for each in events}
        self._topics.prepare(names)
        if self._announced is not None and (late := names - self._told.keys()):
            self._tell(self._announced, self._partitions(late))

    def _add_common(self, event: Event, heading: Heading) -> _Common:
        if len(self._common) >= _MOST_COMMON:
            self._common.clear()
        topic, headers = self._topics.name_of(event.schema, event.table), _headers(heading.common)
        found = _Common(topic, headers, _length(headers, None, b""))
        self._common[heading.of_topic] = found
        return found

    def arrived(self, timeout: float) -> int:
        """See Pipelined."""
        self._begin()
        deadline = time.monotonic() + timeout
        while not (found := self._ledger.arrived()):
            left = deadline - time.monotonic()
            if left <= 0 or not self._producers:
                break
            # One alone is waited for; of several, an idle one would hold up the others' count.
            most = left if len(self._producers) == 1 else min(left, _LOOK_AROUND_SECONDS)
            for producer in self._producers.values():
                self._serve(producer.poll, most)
            self._check()
        if found:
            self._settle()
        elif timeout:
            self._stalled(timeout)
        return found

    def flush(self, timeout: float) -> bool:
        self._begin()
        if not self._producers:
            self._topics.reach(timeout)
            # What had arrived before all was given up must not be counted behind this.
            self._ledger.clear()
            return True
        left = sum(self._serve(producer.flush, timeout) for producer in self._producers.values())
        self._check()
        if left:
            self._stalled(timeout)
            return False
        self._ledger.clear()
        if self._telling:
            self._missed, self._telling = None, False
        self._too_long.clear()
        self._settle()
        return True

    def _settle(self) -> None:
        """Note that brokers acknowledge records."""
        # Leaders may have changed while they were away.
        due = self._errors.latest is not None or self._topics.look_due
        self._errors.clear()
        if due:
            self._compare_topics()

    def _stalled(self, timeout: float) -> None:
        """Find out why nothing is acknowledged. Raises BrokerError with the reason, if any."""
        self._compare_topics()
        if self._errors.latest is not None:
            what = f"records are not acknowledged after {timeout:g} s"
            raise broker_error(self._options, what, self._errors)

    def check(self, tables: Sequence[tuple[str, str]]) -> None:
        self._begin()
        self._topics.reach(self._options.timeout)
        self._topics.check({self._options.topic_of(*table) for table in tables})

    def announce(self, gap: Gap) -> None:
        """Send a Gap to every partition of every topic, since each has readers of its own.

        A topic that is made later gets it before its first event.
        """
        self._begin()
        self._announce(gap)

    def _announce(self, gap: Gap) -> None:
        pattern = re.compile(self._options.topic_pattern(None, None))
        there = {name: count for name, count in self._list().items() if pattern.match(name)}
        self._topics.prepare(there)
        self._told.clear()
        self._tell(gap, there)
        if (former := self._announced) is not None:
            gap = replace(
                gap, since=min(gap.since, former.since), until=max(gap.until, former.until)
            )
        self._announced = gap

    def _tell(self, gap: Gap, partitions: Mapping[str, int]) -> None:
        """Send a Gap to the partitions of topics, of which each has so many."""
        attributes, data = self._writer.gap(gap)
        chunk, headers, known = self._open(), _headers(attributes), self._ledger.known
        chunk.counts = False
        for name, count in partitions.items():
            for partition in range(count):
                uid = f"{attributes['id']}/{name}/{partition}"
                if uid not in known:
                    self._produce(chunk, name, None, data, headers, partition)
                    chunk.uids.append(uid)
                    known.add(uid)
            # Not before: a topic that has been told in part is told again.
            self._told[name] = chunk

    def _list(self) -> dict[str, int]:
        """Return how many partitions each topic has. Raises BrokerError."""
        try:
            there = self._producer(DEFAULT_LIMIT).list_topics(timeout=self._options.timeout).topics
        except KafkaException as error:
            raise broker_error(self._options, "no answer", self._errors, error) from error
        return {name: len(found.partitions) for name, found in there.items()}

    def _partitions(self, names: Collection[str]) -> dict[str, int]:
        """Return how many partitions these topics have, which may be new. Raises BrokerError."""
        deadline = time.monotonic() + self._options.timeout
        while True:
            there = self._list()
            found = {name: there[name] for name in names if there.get(name)}
            if len(found) == len(names):
                return found
            if time.monotonic() >= deadline:
                what = f"the topic {min(set(names) - found.keys())} has no partitions yet"
                raise broker_error(self._options, what, self._errors)
            time.sleep(0.05)

    def close(self) -> None:
        if self._process != os.getpid():
            self._abandon()
            return
        self._give_up()
        self._ledger.clear()

    def _abandon(self) -> None:
        """Begin anew in the child of a fork, where a lock of the parent's may be held for ever."""
        for producer in self._producers.values():
            inherit(producer)
        self._producers = {}
        self._ledger = ChunkLedger()
        self._errors.clear()
        self._topics.limits.clear()
        self._told.clear()
        self._telling = False
        self._process = os.getpid()

    def _begin(self) -> None:
        if self._process != os.getpid():
            self._abandon()
        for producer in self._producers.values():
            self._serve(producer.poll, 0)
        self._check()
        if self._missed is not None and not self._telling:
            self._announce(self._missed)
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

    def _open(self) -> _Chunk:
        chunk = _Chunk(self._refused)
        self._ledger.open(chunk)
        return chunk

    def _produce(
        self,
        chunk: _Chunk,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        headers: Headers | None = None,
        partition: int = -1,
    ) -> None:
        """Send a record, once there is room for it."""
        producer = self._producer(self._topics.limits[topic])
        waited = 0.0
        while True:
            try:
                producer.produce(topic, value, key, partition, on_delivery=chunk, headers=headers)
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
                chunk.left += 1
                return

    def _refused(self, error: KafkaError, message: Message) -> None:
        if error.code() == KafkaError.MSG_SIZE_TOO_LARGE:
            self._too_long.add(hash(message.value()))
        if error.code() not in (KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT):
            self._ledger.fail((error, message.topic() or ""))

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
        self._told = {name: chunk for name, chunk in self._told.items() if chunk.left == 0}

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


class _Common(NamedTuple):
    """What the records of the events of a topic of ours share: Kafka's topic, and headers."""

    topic: str
    headers: Headers
    length: int


class _Chunk(Chunk):
    """Records that were sent together: librdkafka calls it for each while it is polled."""

    __slots__ = ("_refused",)

    def __init__(self, refused: Callable[[KafkaError, Message], None]) -> None:
        super().__init__()
        self._refused = refused

    def __call__(self, error: KafkaError | None, message: Message) -> None:
        if error is None:
            self.left -= 1
        else:
            self._refused(error, message)


def _headers(attributes: Mapping[str, str]) -> Headers:
    # Bytes, since the client would encode each text anew.
    return {header_name(name, PREFIX): text.encode() for name, text in attributes.items()}


def _length(headers: Headers, key: bytes | None, value: bytes) -> int:
    """Return the most that a record with these may take of what its topic allows."""
    size = len(value) + len(key or b"") + _OVERHEAD
    for name, text in headers.items():
        # A character outside ASCII has four bytes at most.
        most = 4 if isinstance(text, str) and not text.isascii() else 1
        size += len(name) + len(text or "") * most + _HEADER_OVERHEAD
    return size
