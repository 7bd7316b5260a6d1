"""The offsets up to which partitions have been read, and receivers have come."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Set
from datetime import datetime, timezone

from .history import Mark

Partition = tuple[str, int]

EPOCH = datetime.fromtimestamp(0, timezone.utc)


class Progress:
    """The offsets of the partitions that are ours, and what is known of their topics.

    Offsets lose their meaning when a partition has others in their place: ``generation`` counts
    how often, and records that were read in a former one are not settled any more. ``began`` is the
    time when reading without a group began; a group may have read anything before.
    """

    def __init__(self) -> None:
        self.began: datetime | None = None
        # The next offset to read; its keys are the partitions that are ours.
        self.read: dict[Partition, int] = {}
        # The offsets below which a former member of the group may have delivered records.
        self.redelivered_below: dict[Partition, int] = {}
        # The time of the latest record.
        self.heard: dict[Partition, datetime] = {}
        # That time when the topic was last looked at: later records may be of another in its place.
        self.sure: dict[Partition, datetime] = {}
        # The topics and leader epochs that offsets are of; and when the group began to read a
        # topic, in milliseconds.
        self.ids: dict[str, str] = {}
        self.epochs: dict[Partition, int] = {}
        self.begun: dict[str, int] = {}
        # Partitions that librdkafka does not read any more, since their next offset is not there.
        self.stopped: dict[Partition, str] = {}
        self.generation = 0
        # A lock, since receivers settle in threads of their own.
        self._lock = threading.Lock()
        self._settled: dict[Partition, int] = {}
        self._committed: dict[Partition, int] = {}

    def since(self, partition: Partition) -> datetime:
        """Return the time from which on records may have been missed."""
        return self.sure.get(partition, self.began or EPOCH)

    def known_since(self, partition: Partition) -> datetime | None:
        """Return the time from which on records are to be read, if it is known."""
        return self.sure.get(partition, self.began)

    def begin(self, partition: Partition, offset: int) -> None:
        """Read a partition from ``offset`` on; what is before it is settled."""
        self.read[partition] = offset
        self._committed.pop(partition, None)
        with self._lock:
            self._settled[partition] = offset

    def begin_anew(self, partition: Partition, offset: int) -> None:
        """Read a partition, whose former offsets have lost their meaning, from ``offset`` on."""
        with self._lock:
            self.generation += 1
        self.begin(partition, offset)
        self.redelivered_below[partition] = 0
        self.stopped.pop(partition, None)

    def settle(self, read: Mapping[Partition, int], generation: int) -> None:
        """Note that receivers are done with what is before these offsets."""
        with self._lock:
            if generation == self.generation:
                self._settled.update(read)

    def drop(self, partitions: Iterable[Partition]) -> None:
        """Forget the offsets of partitions that are not ours any more."""
        for partition in partitions:
            self.read.pop(partition, None)
            with self._lock:
                self._settled.pop(partition, None)

    def clear(self) -> None:
        """Forget all offsets, since another consumer begins anew."""
        with self._lock:
            self.generation += 1
            self._settled.clear()
        self.read.clear()
        self._committed.clear()
        self.epochs.clear()
        self.stopped.clear()

    def due(self, leaving: Set[Partition]) -> dict[Partition, int]:
        """Return the offsets to commit; those of partitions that are being left, in any case."""
        with self._lock:
            return {
                partition: offset
                for partition, offset in self._settled.items()
                if partition in self.read
                and (partition in leaving or offset != self._committed.get(partition))
            }

    def committed(self, offsets: Mapping[Partition, int]) -> None:
        """Note the offsets that were committed."""
        self._committed.update(offsets)

    def mark(self, partition: Partition, offset: int, leaving: Set[Partition]) -> Mark:
        """Return the mark that goes with an offset."""
        topic = partition[0]
        clean = partition in leaving and offset == self.read[partition]
        return Mark(self.ids.get(topic, ""), self.begun.get(topic), clean)
