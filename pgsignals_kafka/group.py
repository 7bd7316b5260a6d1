"""The reading of partitions as a member of a consumer group."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence, Set
from datetime import datetime, timezone

from confluent_kafka import Consumer, KafkaException, TopicPartition

from pgsignals import Gap
from pgsignals.sources import RemoteSink

from .connection import Errors
from .history import Mark, Topic
from .options import Options
from .progress import EPOCH, Partition
from .reader import Reader

log = logging.getLogger("pgsignals.kafka")

_SETTLE_SECONDS = 5.0


class GroupReader(Reader):
    """Reads the partitions that a group assigns, from the group's offsets, and commits."""

    finds_partitions = False

    def __init__(
        self,
        options: Options,
        patterns: list[str],
        errors: Errors,
        sink: RemoteSink,
        group: str,
    ) -> None:
        self.group = group
        super().__init__(options, patterns, errors, sink)
        self._assigned = False
        self._leaving = False
        # A partition that is there at the start is read from then on; a later one, from its
        # beginning.
        self._at_start: set[Partition] = set()

    @property
    def joining(self) -> bool:
        return bool(self._at_start) and not self._assigned

    def start(self) -> None:
        known = self._known_at_start()
        self._at_start = {partition for partition in known if self._wanted.match(partition[0])}
        now = self.look_at({topic for topic, _ in self._at_start})
        self.progress.ids = {topic: each.id for topic, each in now.items()}
        self._subscribe()

    def take_new(self, known: Sequence[Partition]) -> None:
        """Do nothing, since the group assigns new partitions."""

    def leave(self) -> None:
        self._leaving = True

    def _subscribe(self) -> None:
        self.consumer.subscribe(
            self._patterns, on_assign=self._on_assign, on_revoke=self._on_revoke
        )

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Try at once to read, since a start waits for that.

        Nothing may be raised here: poll() makes a KafkaError of it, which is no exception and
        passes by any ``except BaseException``.
        """
        self.gained = [*self.gained, *partitions]
        try:
            self._take_over(consumer)
        except KafkaException as error:
            log.debug("%s: trying again: %s", self._options, error)
            # The group wants an answer.
            consumer.incremental_assign([])

    def take_over(self) -> None:
        if self.gained:
            self._take_over(self.consumer)

    def _take_over(self, consumer: Consumer) -> None:
        """Begin at the group's offsets; if it has none, now or at the partition's beginning.

        The offsets are committed at once: the next member that gets the partition must begin there,
        too. Raises KafkaException if the brokers do not answer; then it must be called again.
        """
        if partitions := self.gained:
            progress = self.progress
            now = self.look_at({each.topic for each in partitions})
            committed = self._read_marks(consumer, partitions, now)
            begin = []
            for each in partitions:
                partition = each.topic, each.partition
                topic = now.get(each.topic)
                offset = self._find_begin(consumer, partition, *committed[partition], topic)
                begin.append(TopicPartition(*partition, offset))
            for each in begin:
                progress.begin((each.topic, each.partition), each.offset)
            for name, found in now.items():
                progress.ids[name] = found.id
                progress.begun.setdefault(name, round(time.time() * 1000))
            # Before anything is delivered: if this process dies, the offsets are not marked clean.
            self.commit(asynchronous=False)
            consumer.incremental_assign(begin)
            self.gained = []
            if self.paused:
                consumer.pause(begin)
            self._announce_missed()
        self._assigned = True
        log.debug("%s: reading %s", self._options, sorted(self.progress.read))

    def _read_marks(
        self, consumer: Consumer, partitions: Sequence[TopicPartition], now: Mapping[str, Topic]
    ) -> dict[Partition, tuple[int, Mark]]:
        """Return what the group has committed, offsets and marks, also to others' partitions.

        If it has committed to a partition of a topic, note when it began to read the topic.
        """
        wanted = {(each.topic, each.partition) for each in partitions}
        wanted |= {(name, n) for name, topic in now.items() for n in range(topic.partitions)}
        found = {
            (each.topic, each.partition): (each.offset, Mark.read(each.metadata))
            for each in consumer.committed(
                [TopicPartition(*each) for each in sorted(wanted)], timeout=self._options.timeout
            )
        }
        for topic in {each.topic for each in partitions} - self.progress.begun.keys():
            known = ("", now[topic].id if topic in now else "")
            begun = [
                mark.begun or 0
                for (name, _), (offset, mark) in found.items()
                if name == topic and offset >= 0 and mark.topic in known
            ]
            if begun:
                self.progress.begun[topic] = min(begun)
        return found

    def _find_begin(
        self, consumer: Consumer, partition: Partition, offset: int, mark: Mark, now: Topic | None
    ) -> int:
        """Return the offset to begin at, by what the group and this process know of a partition."""
        progress, topic = self.progress, partition[0]
        low, high = self.watermarks(consumer, partition)
        progress.redelivered_below[partition] = 0
        ids = {mark.topic if offset >= 0 else "", progress.ids.get(topic, "")} - {""}
        if (now is not None and ids - {now.id}) or offset > high:
            progress.begun[topic] = 0
            detail = f"{topic}/{partition[1]} is not what it was: it goes from {low} to {high} now"
            since = progress.since(partition)
            self._missed.append(Gap(since, since, "restored", detail))
            known_since = progress.known_since(partition)
            return self._offset_since(consumer, partition, known_since, low, high)
        if offset >= 0:
            if not mark.clean:
                # The former member may have delivered, and not committed, all that is there now.
                progress.redelivered_below[partition] = high
            return offset
        if partition not in self._at_start:
            progress.begun.setdefault(topic, 0)
            return low
        if partition in progress.sure:
            # The group's offset is not known any more, and this process knows better.
            return self._offset_since(consumer, partition, progress.sure[partition], low, high)
        if topic in progress.begun:
            begun = datetime.fromtimestamp(progress.begun[topic] / 1000, timezone.utc)
            return self._offset_since(consumer, partition, begun, low, high)
        # Nobody knows how far a former group of this name had come.
        detail = f"the group {self.group} had no offset in {topic}, and begins now"
        self._missed.append(Gap(EPOCH, EPOCH, "unknown_name", detail))
        return high

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Let receivers finish with partitions that another member gets, for some seconds."""
        lost = {(each.topic, each.partition) for each in partitions}
        if not self._leaving:
            done = threading.Event()
            self._sink.settle(done.set)
            done.wait(_SETTLE_SECONDS)
            self.commit(asynchronous=False, leaving=lost)
        self.gained = [p for p in self.gained if (p.topic, p.partition) not in lost]
        given = [TopicPartition(*each) for each in sorted(lost & self.progress.read.keys())]
        self.progress.drop(lost)
        consumer.incremental_unassign(given)

    def commit(self, *, asynchronous: bool, leaving: Set[Partition] = frozenset()) -> None:
        due = self.progress.due(leaving)
        if not due:
            return
        offsets = [
            TopicPartition(*partition, offset, str(self.progress.mark(partition, offset, leaving)))
            for partition, offset in due.items()
        ]
        try:
            if asynchronous:
                self.consumer.commit(offsets=offsets, asynchronous=True)
            else:
                self.consumer.commit(offsets=offsets, asynchronous=False)
        except KafkaException as error:
            # The records come again, to us or to the next member.
            log.warning("%s: could not commit: %s", self._options, error)
        else:
            self.progress.committed(due)

    def _find_begin_anew(self, consumer: Consumer) -> dict[Partition, int]:
        return {}  # The group decides.

    def _forget_assignment(self) -> None:
        self.gained = []

    def _begin_anew_at(self, begin: Mapping[Partition, int]) -> None:
        self._subscribe()
