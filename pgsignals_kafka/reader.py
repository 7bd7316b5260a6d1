"""The reading of partitions by one consumer, with or without a consumer group."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping, Sequence, Set
from datetime import datetime, timezone
from typing import Any

from confluent_kafka import Consumer, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, ClusterMetadata  # type: ignore[attr-defined]

from pgsignals import Gap
from pgsignals.sources import RemoteSink
from pgsignals.sources.missed import announce_missed

from .connection import Errors, client_config, inherit, reach
from .history import Topic, look
from .options import Options
from .progress import EPOCH, Partition, Progress

log = logging.getLogger("pgsignals.kafka")

# The seconds in which new topics and partitions are found, and a broker that was away.
LOOK_SECONDS = 5.0
_CONSUMER: dict[str, Any] = {
    "enable.auto.commit": False,
    "enable.auto.offset.store": False,
    # The reader decides, since records that are gone have to be announced.
    "auto.offset.reset": "error",
    "partition.assignment.strategy": "cooperative-sticky",
    "topic.metadata.refresh.interval.ms": round(LOOK_SECONDS * 1000),
    "fetch.wait.max.ms": 100,
    "queued.max.messages.kbytes": 16_384,
    "allow.auto.create.topics": False,
}


class Reader:
    """Reads all partitions of the wanted topics from now on, and commits nothing."""

    # librdkafka wants a group all the same.
    group = "pgsignals"
    # Whether the reader has to find new partitions; a group assigns them.
    finds_partitions = True
    # Partitions that are assigned and not read yet.
    gained: Sequence[TopicPartition] = ()

    def __init__(
        self, options: Options, patterns: list[str], errors: Errors, sink: RemoteSink
    ) -> None:
        self._options = options
        self._patterns = patterns
        self._wanted = re.compile("|".join(patterns))
        self._errors = errors
        self._sink = sink
        self.progress = Progress()
        self.paused = False
        # The Gaps to announce once the partitions are read again.
        self._missed: list[Gap] = []
        self.consumer = self._connect()
        self._admin = self._connect_admin()

    @property
    def joining(self) -> bool:
        """Whether a group has yet to assign the first partitions."""
        return False

    @property
    def partitions(self) -> list[Partition]:
        """The partitions that are ours, also those that are not read yet."""
        return [*self.progress.read, *((each.topic, each.partition) for each in self.gained)]

    def start(self) -> None:
        """Begin to read. Raises BrokerError or KafkaException."""
        known = self._known_at_start()
        self.progress.began = datetime.now(timezone.utc)
        self._take(known, end=True)

    def _known_at_start(self) -> list[Partition]:
        return _partitions(reach(self.consumer, self._options, self._errors, self._options.timeout))

    def topics(self, timeout: float) -> list[Partition]:
        """Return all partitions that the brokers have. Raises KafkaException if none answers."""
        return _partitions(self.consumer.list_topics(timeout=timeout))

    def look_at(self, topics: Collection[str], timeout: float | None = None) -> dict[str, Topic]:
        """Return the topics as they are now. Raises KafkaException."""
        found = look(self._admin, topics, timeout or self._options.timeout)
        if any(len(topic.ends) < topic.partitions for topic in found.values()):
            # This client does not believe in a leader of an older epoch either, and would never
            # say where a partition ends that was put back; another one says it the next time.
            self._admin = self._connect_admin()
        return found

    def take_new(self, known: Sequence[Partition]) -> None:
        """Read the new ones of these partitions from their beginning. Raises KafkaException."""
        self._take(known, end=False)

    def _take(self, known: Sequence[Partition], *, end: bool) -> None:
        progress = self.progress
        new = [p for p in known if p not in progress.read and self._wanted.match(p[0])]
        now = self.look_at({topic for topic, _ in new})
        begin = []
        for partition in new:
            low, high = self.watermarks(self.consumer, partition)
            begin.append(TopicPartition(*partition, high if end else low))
            progress.begin(partition, begin[-1].offset)
            topic = partition[0]
            if topic in now:
                progress.ids.setdefault(topic, now[topic].id)
        if begin:
            self.consumer.incremental_assign(begin)

    def take_over(self) -> None:
        """Read the partitions that a group has assigned. Raises KafkaException."""

    def pause(self) -> None:
        """Read nothing; polling goes on, or a group would expel its member."""
        self.paused = True
        self.consumer.pause(self.consumer.assignment())

    def resume(self) -> None:
        """Read on."""
        self.paused = False
        self.consumer.resume(self.consumer.assignment())

    def commit(self, *, asynchronous: bool, leaving: Set[Partition] = frozenset()) -> None:
        """Commit, to a group, what receivers are done with."""

    def watermarks(self, consumer: Consumer, partition: Partition) -> tuple[int, int]:
        """Return the first offset of a partition, and its end. Raises KafkaException."""
        timeout = self._options.timeout
        found = consumer.get_watermark_offsets(TopicPartition(*partition), timeout=timeout)
        assert found is not None
        return found

    def _offset_since(
        self, consumer: Consumer, partition: Partition, time: datetime | None, low: int, high: int
    ) -> int:
        """Return the first offset whose record is not older than ``time``; the first for None."""
        if time is None:
            return low
        milliseconds = round(time.timestamp() * 1000)
        [found] = consumer.offsets_for_times(
            [TopicPartition(*partition, milliseconds)], timeout=self._options.timeout
        )
        return found.offset if found.offset >= 0 else high

    def lose(self, partition: Partition, why: str, *, restored: bool = False) -> None:
        """Announce that the next offset of a partition is not there any more, and read on."""
        progress = self.progress
        low, high = self.watermarks(self.consumer, partition)
        before, since = progress.read.get(partition, 0), progress.since(partition)
        detail = (
            f"{partition[0]}/{partition[1]} has the offsets from {low} to {high}, and {before} was "
            f"next: {why}"
        )
        if restored or before > high:
            time = progress.known_since(partition)
            begin = self._offset_since(self.consumer, partition, time, low, high)
            self._missed.append(Gap(since, since, "restored", detail))
        else:
            begin = low
            self._missed.append(Gap(since, since, "retention", detail))
        progress.begin_anew(partition, begin)
        # A partition that has no position refuses seek().
        self.consumer.incremental_unassign([TopicPartition(*partition)])
        self.consumer.incremental_assign([TopicPartition(*partition, begin)])
        if self.paused:
            self.consumer.pause([TopicPartition(*partition)])
        self._announce_missed()

    def drop(self, partition: Partition) -> None:
        """Read a partition no more, since it is not there any more."""
        self.progress.read.pop(partition)
        self.consumer.incremental_unassign([TopicPartition(*partition)])

    def begin_anew(self, why: str) -> None:
        """Read by a new consumer, which knows nothing of the past. Raises KafkaException."""
        since = min(map(self.progress.since, self.partitions), default=EPOCH)
        consumer = self._connect()
        try:
            begin = self._find_begin_anew(consumer)
        except KafkaException:
            consumer.close()
            raise
        self._missed.append(Gap(since, since, "restored", why))
        self.progress.clear()
        self._forget_assignment()
        self.consumer.close()
        self.consumer = consumer
        self._begin_anew_at(begin)

    def _find_begin_anew(self, consumer: Consumer) -> dict[Partition, int]:
        begin = {}
        for partition in self.progress.read:
            low, high = self.watermarks(consumer, partition)
            time = self.progress.known_since(partition)
            begin[partition] = self._offset_since(consumer, partition, time, low, high)
        return begin

    def _forget_assignment(self) -> None:
        """Forget the partitions that a group has assigned; without a group, there are none."""

    def _begin_anew_at(self, begin: Mapping[Partition, int]) -> None:
        self.progress.read.update(begin)
        partitions = [TopicPartition(*partition, offset) for partition, offset in begin.items()]
        self.consumer.incremental_assign(partitions)
        if self.paused:
            self.consumer.pause(partitions)
        self._announce_missed()

    def _announce_missed(self) -> None:
        missed, self._missed = self._missed, []
        announce_missed(missed, self._sink, log, self._options)

    def close(self) -> None:
        """Commit what is due, and give the consumer back."""
        # All of it once more: a commit in the background may not have arrived.
        self.commit(asynchronous=False, leaving=set(self.progress.read))
        self.consumer.close()

    def leave(self) -> None:
        """Wait for no receiver any more when partitions go to another member of a group."""

    def abandon(self) -> None:
        """Leave the clients to the parent of this process."""
        inherit(self.consumer)
        inherit(self._admin)

    def _connect_admin(self) -> AdminClient:
        # With Errors of its own, since it does not read.
        return AdminClient(client_config(self._options, Errors()))

    def _connect(self) -> Consumer:
        config = _CONSUMER | {"group.id": self.group}
        return Consumer(config | client_config(self._options, self._errors))


def _partitions(found: ClusterMetadata) -> list[Partition]:
    return [(topic, number) for topic, each in found.topics.items() for number in each.partitions]
