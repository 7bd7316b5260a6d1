"""Events to Kafka: in order per record, acknowledged by all replicas, duplicates only by uid."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Message, Producer, TopicCollection
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, ResourceType  # type: ignore[attr-defined]

from pgsignals import BrokerError, Event, Gap
from pgsignals.cloudevents import Writer, former_record_key, record_key

from .connection import (
    TOPIC,
    Cluster,
    Errors,
    broker_error,
    inherit,
    process,
    read_url,
)

log = logging.getLogger("pgsignals.kafka")

# Of a batch with one record, beyond what is counted below; generous, since sizes are varints.
_OVERHEAD = 128
_HEADER_OVERHEAD = 9
# Of all attributes that there may be, the names and their overhead.
_MOST_NAMES = 1_000
# What a topic takes that does not tell: Kafka's default, max.message.bytes.
_DEFAULT_LIMIT = 1_048_588
_ROOM_SECONDS = 10.0
_CONTENT_TYPE = "content-type"


class KafkaBroadcaster:
    """Sends events to a topic for each table, keyed by the record's key.

    ``create`` makes missing topics, with ``partitions`` and ``replication`` or the brokers'
    defaults; without it a missing topic is an error. ``tombstones`` sends, after the event of a
    deleted record, a record without a value, which lets a compacted topic forget the key. A record
    that is longer than the topic takes (or ``max_bytes``) goes without values, flagged as
    truncated. ``source`` is the attribute of that name. ``config`` are settings of librdkafka.

    Raises ConfigurationError for what cannot be; connects when it is first used.
    """

    def __init__(
        self,
        servers: str,
        *,
        prefix: str = "pgsignals",
        topic: str = TOPIC,
        create: bool = False,
        partitions: int = -1,
        replication: int = -1,
        tombstones: bool = False,
        max_bytes: int | None = None,
        source: str | None = None,
        tls: bool = False,
        ca: str | None = None,
        cert: str | None = None,
        key: str | None = None,
        sasl: str | None = None,
        user: str | None = None,
        password: str | None = None,
        config: Mapping[str, str] | None = None,
        timeout: float = 10.0,
    ) -> None:
        cluster = Cluster(
            servers, prefix, topic, tls, ca, cert, key, sasl, user, password, config or {}
        )
        self._set_up(
            cluster,
            create=create,
            partitions=partitions,
            replication=replication,
            tombstones=tombstones,
            max_bytes=max_bytes,
            source=source,
            timeout=timeout,
        )

    @classmethod
    def from_url(cls, url: str) -> KafkaBroadcaster:
        """``kafka://user:password@host:port,host:port/?prefix=…&librdkafka.NAME=…``."""
        cluster, options = read_url(url)
        found = cls.__new__(cls)
        found._set_up(cluster, **options)
        return found

    def _set_up(
        self,
        cluster: Cluster,
        *,
        create: bool = False,
        partitions: int = -1,
        replication: int = -1,
        tombstones: bool = False,
        max_bytes: int | None = None,
        source: str | None = None,
        timeout: float = 10.0,
    ) -> None:
        self._cluster = cluster
        self._create = create
        self._partitions = partitions
        self._replication = replication
        self._tombstones = tombstones
        self._max_bytes = max_bytes
        self._writer = Writer(source or f"/pgsignals/{cluster.prefix}")
        self._timeout = timeout
        self._errors = Errors()
        self._topics: dict[tuple[str, str], str] = {}
        # What each topic takes at most, of those that are known to be there.
        self._limits: dict[str, int] = {}
        # By the largest batch that it may make: a topic that takes less has one of its own.
        self._producers: dict[int, Producer] = {}
        # What was sent since the last flush that succeeded, and whether it is acknowledged. What
        # comes again is not sent again, so that nothing gets behind what comes after it.
        self._sent: dict[str, bool] = {}
        self._too_long: set[str] = set()
        self._failure: tuple[KafkaError, str] | None = None
        self._process = process()

    def __str__(self) -> str:
        return str(self._cluster)

    def __repr__(self) -> str:
        return f"<KafkaBroadcaster {self}>"

    def publish(self, events: Sequence[Event]) -> None:
        """See Broadcaster. Waits where librdkafka's queue has no room. Raises BrokerError."""
        self._begin()
        topics = [self._topic_of(event) for event in events]
        self._know(set(topics) - self._limits.keys())
        sent, attributes, data = self._sent, self._writer.attributes, self._writer.data
        for event, topic in zip(events, topics, strict=True):
            uid = event.uid
            if uid in sent:
                continue
            key = record_key(event)
            about = attributes(event)
            value = data(event, key_only=uid in self._too_long)
            if _exceeds(self._limits[topic], key, value, about):
                value = data(event, key_only=True)
            self._produce(topic, key, value, _headers(about), uid)
            if self._tombstones:
                if event.op == "deleted":
                    self._produce(topic, key, None, [], f"{uid}/deleted")
                elif (former := former_record_key(event)) is not None:
                    self._produce(topic, former, None, [], f"{uid}/moved")
        for producer in self._producers.values():
            self._serve(producer.poll, 0)

    def flush(self, timeout: float) -> bool:
        """See Broadcaster."""
        self._begin()
        if not self._producers:
            self._reach(timeout)
            return True
        left = sum(self._serve(producer.flush, timeout) for producer in self._producers.values())
        self._check()
        if left:
            if self._errors.latest is not None:
                what = f"{left} records are not acknowledged after {timeout:g} s"
                raise broker_error(self._cluster, what, self._errors)
            return False
        self._errors.clear()
        self._sent.clear()
        self._too_long.clear()
        return True

    def check(self, tables: Sequence[tuple[str, str]]) -> None:
        """See Checkable. Raises BrokerError."""
        self._begin()
        self._reach(self._timeout)
        self._missing(self._admin(), {self._cluster.topic_of(*table) for table in tables})

    def announce(self, gap: Gap) -> None:
        """See Broadcaster: to every partition of every topic, since each has readers of its own."""
        self._begin()
        pattern = re.compile(self._cluster.topic_pattern(None, None))
        try:
            known = self._producer(_DEFAULT_LIMIT).list_topics(timeout=self._timeout).topics
        except KafkaException as error:
            raise broker_error(self._cluster, "no answer", self._errors, error) from error
        topics = {name: found for name, found in known.items() if pattern.match(name)}
        self._know(topics.keys() - self._limits.keys())
        attributes, data = self._writer.gap(gap)
        for name, found in topics.items():
            for partition in found.partitions:
                uid = f"{attributes['id']}/{name}/{partition}"
                self._produce(name, None, data, _headers(attributes), uid, partition)

    def close(self) -> None:
        """See Broadcaster."""
        producers, self._producers = self._producers, {}
        for producer in producers.values():
            if self._process != process():
                inherit(producer)
                continue
            producer.purge()
            self._serve(producer.flush, 1.0)
        self._sent.clear()

    def _begin(self) -> None:
        if self._process != process():
            self.close()
            self._limits.clear()
            self._errors = Errors()
            self._failure = None
            self._process = process()
        for producer in self._producers.values():
            self._serve(producer.poll, 0)
        self._check()

    def _serve(self, call: Callable[[float], int], timeout: float) -> int:
        """Poll or flush; the fatal error of a producer is raised there, past our callbacks."""
        try:
            return call(timeout)
        except (KafkaException, SystemError) as error:
            log.debug("%s: %r", self, error)
            if self._failure is None:
                fatal = error.args[0] if isinstance(error, KafkaException) else None
                self._failure = fatal or KafkaError(KafkaError._FATAL), ""
            return 1

    def _topic_of(self, event: Event) -> str:
        table = event.schema, event.table
        if table not in self._topics:
            self._topics[table] = self._cluster.topic_of(*table)
        return self._topics[table]

    def _produce(
        self,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        headers: list[tuple[str, str | bytes | None]],
        uid: str,
        partition: int = -1,
    ) -> None:
        producer = self._producer(self._limits[topic])
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
                    raise broker_error(self._cluster, what, self._errors) from None
                self._serve(producer.poll, 0.1)
                waited += 0.1
                self._check()
            except KafkaException as error:
                self._failure = error.args[0], topic
                self._check()
            else:
                self._sent[uid] = False
                return

    def _delivered(self, uid: str, error: KafkaError | None, message: Message) -> None:
        """Called by librdkafka, while it is polled or flushed."""
        if error is None:
            if uid in self._sent:
                self._sent[uid] = True
            return
        self._sent.pop(uid, None)
        if error.code() == KafkaError.MSG_SIZE_TOO_LARGE:
            self._too_long.add(uid)
        if self._failure is None and error.code() not in (
            KafkaError._PURGE_QUEUE,
            KafkaError._PURGE_INFLIGHT,
        ):
            self._failure = error, message.topic() or ""

    def _check(self) -> None:
        """Raise what a record was refused for.

        What is still under way is given up first: were a record's later event to arrive, the
        earlier one would come behind it when it is sent again.
        """
        if self._failure is None:
            return
        error, topic = self._failure
        producers, self._producers = self._producers, {}
        for producer in producers.values():
            producer.purge()
            self._serve(producer.flush, 1.0)
        self._sent = {uid: True for uid, arrived in self._sent.items() if arrived}
        self._limits.clear()
        self._failure = None
        raise broker_error(self._cluster, f"the topic {topic} refused a record", Errors(), error)

    def _producer(self, limit: int) -> Producer:
        if limit not in self._producers:
            config: dict[str, Any] = {
                "acks": "all",
                "enable.idempotence": True,
                # A record that fails ends the producer, rather than be overtaken by later ones.
                "enable.gapless.guarantee": True,
                # What waits for a broker waits here, in its order, for as long as it takes.
                "message.timeout.ms": 0,
                "partitioner": "murmur2_random",
                "compression.type": "lz4",
                "linger.ms": 5,
                "queue.buffering.max.messages": 100_000,
                "queue.buffering.max.kbytes": 65_536,
                "message.max.bytes": max(1_000, limit),
                "batch.size": max(1, min(1_000_000, limit - _OVERHEAD)),
            }
            self._producers[limit] = Producer(config | self._cluster.client_config(self._errors))
        return self._producers[limit]

    def _admin(self) -> AdminClient:
        return AdminClient(self._cluster.client_config(self._errors))

    def _reach(self, timeout: float) -> None:
        """See that a broker answers."""
        admin = self._admin()
        try:
            admin.list_topics(timeout=min(timeout, self._timeout))
        except KafkaException as error:
            admin.poll(0)
            raise broker_error(self._cluster, "not connected", self._errors, error) from error
        self._errors.clear()

    def _know(self, topics: Collection[str]) -> None:
        """See that the topics are there, and how long their records may be."""
        if not topics:
            return
        admin = self._admin()
        missing = self._missing(admin, topics)
        if missing:
            self._create_topics(admin, missing)
        self._limits.update(dict.fromkeys(topics, self._max_bytes or _DEFAULT_LIMIT))
        resources = [ConfigResource(ResourceType.TOPIC, name) for name in topics]
        for resource, answer in admin.describe_configs(
            resources, request_timeout=self._timeout
        ).items():
            try:
                limit = int(answer.result()["max.message.bytes"].value)
            except (KafkaException, KeyError, ValueError) as error:
                log.debug("%s does not tell how long records may be: %s", resource.name, error)
                continue
            self._limits[resource.name] = min(limit, self._max_bytes or limit)

    def _missing(self, admin: AdminClient, topics: Collection[str]) -> list[str]:
        """The topics that are to be created. Raises BrokerError where they must be there."""
        missing = []
        described = admin.describe_topics(
            TopicCollection(sorted(topics)), request_timeout=self._timeout
        )
        for name, answer in described.items():
            try:
                answer.result()
            except KafkaException as error:
                admin.poll(0)
                if error.args[0].code() != KafkaError.UNKNOWN_TOPIC_OR_PART:
                    what = f"the topic {name} cannot be looked at"
                    raise broker_error(self._cluster, what, self._errors, error) from error
                missing.append(name)
        if missing and not self._create:
            raise BrokerError(
                f"{self._cluster}: there is no topic {', '.join(missing)}. Create it, or have it "
                "created with create=true (and partitions=, replication=)."
            )
        return missing

    def _create_topics(self, admin: AdminClient, names: Sequence[str]) -> None:
        wanted = [
            NewTopic(name, num_partitions=self._partitions, replication_factor=self._replication)
            for name in names
        ]
        for name, answer in admin.create_topics(wanted, operation_timeout=self._timeout).items():
            try:
                answer.result()
            except KafkaException as error:
                if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                    what = f"the topic {name} cannot be created"
                    raise broker_error(self._cluster, what, self._errors, error) from error
            else:
                log.info("created the topic %s", name)


def _headers(attributes: Mapping[str, str]) -> list[tuple[str, str | bytes | None]]:
    return [(_header_name(name), text) for name, text in attributes.items()]


@functools.cache
def _header_name(attribute: str) -> str:
    return _CONTENT_TYPE if attribute == "datacontenttype" else f"ce_{attribute}"


def _exceeds(limit: int, key: bytes | None, value: bytes, attributes: Mapping[str, str]) -> bool:
    """Whether the record may take more than its topic allows."""
    size = len(value) + len(key or b"") + _OVERHEAD
    # Nearly all are so far from it that a look at each attribute would be a waste.
    if size + 4 * sum(map(len, attributes.values())) + _MOST_NAMES <= limit:
        return False
    for name, text in attributes.items():
        # A character outside ASCII has four bytes at most.
        size += len(name) + len(text) * (1 if text.isascii() else 4) + _HEADER_OVERHEAD
    return size > limit
