"""The comparison of topics with what was read of them: others may come in their place."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from confluent_kafka import KafkaError, KafkaException

from .history import Topic
from .progress import Partition
from .reader import Reader


class Changes:
    """Notices topics that are made anew or put back to an older state, and has them read anew."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._progress = reader.progress
        # The next offsets of partitions that had more when they were last looked at.
        self._stalled: dict[Partition, int] = {}

    def resume_stopped(self) -> None:
        """Read partitions that librdkafka has stopped; raises KafkaException without an answer."""
        progress = self._progress
        for partition, why in list(progress.stopped.items()):
            if partition in progress.read:
                generation = progress.generation
                self.compare(self._reader.look_at([partition[0]]))
                if generation == progress.generation:
                    self._reader.lose(partition, why)
            progress.stopped.pop(partition, None)

    def compare(self, now: Mapping[str, Topic]) -> None:
        """Check whether topics are those that were read, as they were. Raises KafkaException."""
        progress = self._progress
        for partition in sorted(set(self._reader.partitions)):
            if (topic := now.get(partition[0])) is None:
                continue
            where = f"{partition[0]}/{partition[1]}"
            end, epoch = topic.ends.get(partition[1], (sys.maxsize, None))
            if topic.id != progress.ids.get(partition[0], topic.id):
                progress.epochs.pop(partition, None)
                if partition in progress.read:
                    self._lose_topic(partition, topic)
                continue
            if epoch is not None and epoch < (
                before := progress.epochs.setdefault(partition, epoch)
            ):
                self._reader.begin_anew(f"{where} is at epoch {epoch}, and was at {before}")
                break
            if end < (read := progress.read.get(partition, 0)):
                self._reader.begin_anew(f"{where} ends at {end}, and {read} was next")
                break
            if epoch is not None:
                progress.epochs[partition] = epoch
        progress.ids.update({name: each.id for name, each in now.items()})

    def find_stalled(self, now: Mapping[str, Topic]) -> None:
        """Check whether librdkafka has missed an older state of the brokers. Raises KafkaException.

        librdkafka does not believe in a leader of an older epoch than it was told of, maybe when
        brokers ended, and waits for a later one without a word.
        """
        before, self._stalled = self._stalled, {}
        if self._reader.paused:
            return
        for partition in self._reader.partitions:
            topic = now.get(partition[0])
            read = self._progress.read.get(partition, -1)
            if topic is None or topic.ends.get(partition[1], (0, None))[0] <= read:
                continue
            # A partition that has just been made may be unknown for a moment.
            due = before.get(partition) == read or (read < 0 and partition in self._progress.heard)
            if due and not self._finds_leader(partition):
                where = f"{partition[0]}/{partition[1]}"
                self._reader.begin_anew(f"the leader of {where} has an older state")
                return
            self._stalled[partition] = read

    def _finds_leader(self, partition: Partition) -> bool:
        try:
            self._reader.watermarks(self._reader.consumer, partition)
        except KafkaException as error:
            return bool(error.args[0].code() != KafkaError._UNKNOWN_PARTITION)
        return True

    def _lose_topic(self, partition: Partition, topic: Topic) -> None:
        if partition[1] < topic.partitions:
            self._progress.begun[partition[0]] = 0
            self._reader.lose(partition, f"it was made anew, as {topic.id}", restored=True)
        else:
            self._reader.drop(partition)
