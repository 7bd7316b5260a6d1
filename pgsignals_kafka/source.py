"""Events from Kafka: acknowledged, by committing offsets, after receivers have returned."""

from __future__ import annotations

import functools
import logging
import re
import threading
import time
from collections.abc import Mapping, Sequence, Set
from datetime import datetime, timezone
from typing import Any

from confluent_kafka import (
    TIMESTAMP_NOT_AVAILABLE,
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    TopicPartition,
)

from pgsignals import ConfigurationError, Gap
from pgsignals.sources import RemoteSink, Wanted

from .connection import TOPIC, Cluster, Errors, broker_error, inherit, read_url

log = logging.getLogger("pgsignals.kafka")

_AT_ONCE = 1_000
_COMMIT_SECONDS = 1.0
# How soon new topics and partitions are found, and whether a broker that was away is back.
_LOOK_SECONDS = 5.0
_EPOCH = datetime.fromtimestamp(0, timezone.utc)

# What is committed beside an offset by a member that has nothing more under way: nothing from there
# on has been delivered.
_CLEAN = "clean"

_Place = tuple[str, int]


class KafkaSource:
    """Reads the topics of the watched tables.

    With a name it is a member of the consumer group of that name, which begins with what comes
    after its first start; without, it reads all partitions from now on and commits nothing. Topics
    that appear later are read from their beginning.
    """

    def __init__(
        self,
        servers: str,
        *,
        prefix: str = "pgsignals",
        topic: str = TOPIC,
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
        self._set_up(
            Cluster(servers, prefix, topic, tls, ca, cert, key, sasl, user, password, config or {}),
            timeout,
        )

    @classmethod
    def from_url(cls, url: str) -> KafkaSource:
        """``kafka://user:password@host:port,host:port/?prefix=…&librdkafka.NAME=…``."""
        cluster, options = read_url(url)
        if options:
            raise ConfigurationError(
                f"kafka://…?{next(iter(options))}=… is for backends=, where events are sent to: "
                "leave it out where they are read."
            )
        found = cls.__new__(cls)
        found._set_up(cluster, 10.0)
        return found

    def _set_up(self, cluster: Cluster, timeout: float) -> None:
        self._cluster = cluster
        self._timeout = timeout
        self._errors = Errors()
        self._lock = threading.Lock()
        # What may be committed: the offset after the last record that receivers are done with.
        self._settled: dict[_Place, int] = {}
        self._committed: dict[_Place, int] = {}
        # How far each partition has been read; also which ones are ours.
        self._read: dict[_Place, int] = {}
        # Up to where a former member of the group may have delivered each.
        self._known: dict[_Place, int] = {}
        self._heard: dict[_Place, datetime] = {}
        self._stopping = threading.Event()
        self._assigned = threading.Event()
        self._looked_at = self._committed_at = time.monotonic()
        self._lost = False
        self._paused = False
        self._started = _EPOCH

    def __str__(self) -> str:
        return str(self._cluster)

    def __repr__(self) -> str:
        return f"<KafkaSource {self}>"

    @property
    def is_connected(self) -> bool:
        """See RemoteSource."""
        return self.is_alive and not self._lost

    @property
    def is_alive(self) -> bool:
        """See RemoteSource."""
        return self._thread.is_alive()

    def start(self, wanted: Sequence[Wanted], name: str | None, sink: RemoteSink) -> None:
        """See RemoteSource."""
        self._sink = sink
        self._name = name
        self._patterns = sorted({self._cluster.topic_pattern(w.schema, w.table) for w in wanted})
        self._wanted = re.compile("|".join(self._patterns))
        self._thread = threading.Thread(target=self._run, name="pgsignals-kafka", daemon=True)
        self._consumer = Consumer(
            {
                # Without a name nothing is committed, but librdkafka wants a group all the same.
                "group.id": name or "pgsignals",
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                # Ours to decide, since what is gone has to be announced.
                "auto.offset.reset": "error",
                "partition.assignment.strategy": "cooperative-sticky",
                "topic.metadata.refresh.interval.ms": round(_LOOK_SECONDS * 1000),
                "fetch.wait.max.ms": 100,
                "queued.max.messages.kbytes": 16_384,
                "allow.auto.create.topics": False,
            }
            | self._cluster.client_config(self._errors)
        )
        try:
            known = self._topics()
            self._started = datetime.now(timezone.utc)
            # What is there now is read from now on; what comes later, from its beginning.
            self._at_start = {place for place in known if self._wanted.match(place[0])}
            if name is None:
                self._take(known, end=True)
            else:
                self._consumer.subscribe(
                    self._patterns, on_assign=self._on_assign, on_revoke=self._on_revoke
                )
                self._join()
        except KafkaException as error:
            failure = broker_error(self._cluster, "not connected", self._errors, error)
            self._consumer.close()
            raise failure from error
        except BaseException:
            self._consumer.close()
            raise
        self._errors.clear()
        self._thread.start()

    def refuse(self, position: str, reason: str) -> None:
        """See RemoteSource: Kafka knows offsets only, and that is committed past the record."""
        log.debug("%s: %s is passed over: %s", self, position, reason)

    def stop(self, timeout: float) -> None:
        """See RemoteSource."""
        self._stopping.set()
        if hasattr(self, "_thread") and self._thread.ident is not None:
            self._thread.join(timeout)

    def close(self, timeout: float) -> None:
        """See RemoteSource."""
        consumer = getattr(self, "_consumer", None)
        if consumer is None or self._thread.ident is None or self._thread.is_alive():
            return
        # All of it once more: what was committed in the background may not have arrived.
        self._committed.clear()
        self._commit(asynchronous=False, leaving=set(self._read))
        consumer.close()

    def abandon(self) -> None:
        """See RemoteSource."""
        if hasattr(self, "_consumer"):
            inherit(self._consumer)

    def _topics(self) -> list[_Place]:
        try:
            found = self._consumer.list_topics(timeout=self._timeout).topics
        except KafkaException as error:
            self._consumer.poll(0)  # Brings the cause.
            raise broker_error(self._cluster, "not connected", self._errors, error) from error
        return [(topic, number) for topic, each in found.items() for number in each.partitions]

    def _take(self, known: Sequence[_Place], *, end: bool) -> None:
        """Without a group: read the partitions that are new."""
        new = [p for p in known if p not in self._read and self._wanted.match(p[0])]
        places = []
        for topic, number in new:
            low, high = self._consumer.get_watermark_offsets(
                TopicPartition(topic, number), timeout=self._timeout
            )
            places.append(TopicPartition(topic, number, high if end else low))
            self._read[topic, number] = places[-1].offset
        if places:
            self._consumer.incremental_assign(places)

    def _join(self) -> None:
        """Wait until the group has said which partitions are ours, if there are any yet."""
        deadline = time.monotonic() + self._timeout
        while self._at_start and not self._assigned.is_set() and time.monotonic() < deadline:
            # The poll that brings the assignment may bring a message as well.
            read: dict[_Place, int] = {}
            self._handle(self._consumer.poll(0.1), read)
            if read:
                self._sink.settle(functools.partial(self._settle, read))

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Begin where the group is; where it has never been, now or at the beginning.

        That is committed at once: whoever gets the partition next must begin there too.
        """
        if partitions:
            begin = []
            for each in consumer.committed(partitions, timeout=self._timeout):
                place, offset = (each.topic, each.partition), each.offset
                low, high = consumer.get_watermark_offsets(each, timeout=self._timeout)
                self._known[place] = 0
                if offset < 0:
                    offset = high if place in self._at_start else low
                elif each.metadata != _CLEAN:
                    # Whoever had it may have delivered, and not committed, whatever is there now.
                    self._known[place] = high
                begin.append(TopicPartition(*place, offset))
                self._read[place] = offset
                self._committed.pop(place, None)
                with self._lock:
                    self._settled[place] = offset
            # Before anything is delivered: should this process die, the offsets are not clean.
            self._commit(asynchronous=False)
            consumer.incremental_assign(begin)
            if self._paused:
                consumer.pause(begin)
        self._assigned.set()
        log.debug("%s: reading %s", self, sorted(self._read))

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Let receivers finish with what another member gets, as far as that takes no time."""
        if not self._stopping.is_set():
            done = threading.Event()
            self._sink.settle(done.set)
            done.wait(5.0)
            self._commit(asynchronous=False, leaving={(p.topic, p.partition) for p in partitions})
        for each in partitions:
            place = each.topic, each.partition
            self._read.pop(place, None)
            with self._lock:
                self._settled.pop(place, None)
        consumer.incremental_unassign(partitions)

    def _run(self) -> None:
        self._sink.connected()
        while not self._stopping.is_set():
            try:
                self._turn()
            # Whatever it is, the thread must go on reading.
            except Exception as error:
                known = isinstance(error, KafkaException)
                log.warning("%s: %s", self, error, exc_info=not known)
                self._stopping.wait(1.0)

    def _turn(self) -> None:
        self._make_room()
        first = self._consumer.poll(0.2)
        if first is not None:
            read: dict[_Place, int] = {}
            # Handled before more is asked for, which may take a partition away.
            self._handle(first, read)
            for message in self._consumer.consume(_AT_ONCE - 1, timeout=0):
                self._handle(message, read)
            if read:
                self._sink.settle(functools.partial(self._settle, read))
        now = time.monotonic()
        if now - self._committed_at >= _COMMIT_SECONDS:
            self._committed_at = now
            self._commit(asynchronous=True)
        if now - self._looked_at >= _LOOK_SECONDS:
            self._looked_at = now
            self._look()
        self._judge()

    def _make_room(self) -> None:
        """While receivers have no room, read nothing, but go on polling, or the group expels us."""
        if self._sink.full and not self._paused:
            self._paused = True
            self._consumer.pause(self._consumer.assignment())
        elif self._paused and self._sink.wait_for_room(0.1):
            self._paused = False
            self._consumer.resume(self._consumer.assignment())

    def _handle(self, message: Message | None, read: dict[_Place, int] | None = None) -> None:
        if message is None:
            return
        if (error := message.error()) is not None:
            if error.code() == KafkaError._AUTO_OFFSET_RESET:
                self._lose(message)
            elif error.code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
                log.debug("%s: not there yet: %s", self, error.str())
            elif error.code() != KafkaError._PARTITION_EOF:
                log.warning("%s: %s", self, error.str())
            return
        topic, number, offset = message.topic(), message.partition(), message.offset()
        assert topic is not None and number is not None and offset is not None  # noqa: PT018
        if read is None:
            read = {}
        read[topic, number] = self._read[topic, number] = offset + 1
        kind, at = message.timestamp()
        if kind != TIMESTAMP_NOT_AVAILABLE:
            self._heard[topic, number] = datetime.fromtimestamp(at / 1000, timezone.utc)
        value = message.value()
        if value is None:
            return  # A tombstone: the event of the deletion came before it.
        self._sink.receive(
            _attributes(message),
            value,
            position=f"{topic}/{number}/{offset}",
            redelivered=offset < self._known.get((topic, number), 0),
        )

    def _lose(self, message: Message) -> None:
        """What was to be read next is not there any more: announce that, and read on."""
        topic, number = message.topic(), message.partition()
        assert topic is not None and number is not None  # noqa: PT018
        place = topic, number
        low, high = self._consumer.get_watermark_offsets(
            TopicPartition(topic, number), timeout=self._timeout
        )
        since = self._heard.get(place, _EPOCH if self._name is not None else self._started)
        before = self._read.get(place, 0)
        detail = f"{topic}/{number} has the offsets from {low} to {high}, and {before} was next"
        log.error("%s: events were deleted before they were read: %s", self, detail)
        self._sink.gap(Gap(since, datetime.now(timezone.utc), "retention", detail))
        self._read[place] = low
        # Not seek(), which a partition that has no position refuses.
        self._consumer.incremental_unassign([TopicPartition(topic, number)])
        self._consumer.incremental_assign([TopicPartition(topic, number, low)])

    def _settle(self, read: Mapping[_Place, int]) -> None:
        with self._lock:
            for place, offset in read.items():
                self._settled[place] = offset

    def _commit(self, *, asynchronous: bool, leaving: Set[_Place] = frozenset()) -> None:
        if self._name is None:
            return
        with self._lock:
            due = {
                place: offset
                for place, offset in self._settled.items()
                if place in self._read
                and (place in leaving or offset != self._committed.get(place))
            }
        if not due:
            return
        offsets = []
        for place, offset in due.items():
            clean = place in leaving and offset == self._read[place]
            offsets.append(TopicPartition(*place, offset, _CLEAN if clean else ""))
        try:
            if asynchronous:
                self._consumer.commit(offsets=offsets, asynchronous=True)
            else:
                self._consumer.commit(offsets=offsets, asynchronous=False)
        except KafkaException as error:
            # It comes again, to us or to the next member.
            log.warning("%s: could not commit: %s", self, error)
        else:
            self._committed.update(due)

    def _look(self) -> None:
        """Find new partitions, and whether a broker that was away is back."""
        if self._name is not None and not self._lost:
            return
        try:
            known = self._consumer.list_topics(timeout=2.0).topics
        except KafkaException as error:
            log.debug("%s: %s", self, error)
            return
        if self._name is None:
            places = [
                (topic, number) for topic, each in known.items() for number in each.partitions
            ]
            self._take(places, end=False)
        if self._lost:
            self._lost = False
            self._errors.clear()
            self._sink.connected()

    def _judge(self) -> None:
        if self._errors.down and not self._lost:
            self._lost = True
            failure = broker_error(self._cluster, "the connection is lost", self._errors)
            log.warning("%s", failure)
            self._sink.disconnected(failure)


def _attributes(message: Message[Any, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    headers: Any = message.headers() or ()  # A list of pairs, whatever the annotation says.
    for name, value in headers:
        if isinstance(value, bytes):
            text = value.decode("utf-8", "replace")
            if name == "content-type":
                found["datacontenttype"] = text
            elif name.startswith("ce_"):
                found[name.removeprefix("ce_")] = text
    return found
