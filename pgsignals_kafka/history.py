"""The identity of topics: others may come in their place, or an older state of them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from confluent_kafka import KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined]

log = logging.getLogger("pgsignals.kafka")


@dataclass(frozen=True)
class Topic:
    """A topic as it is now: its id, which another of its name does not have, and its partitions.

    A partition has its end and its leader's epoch, as far as brokers tell; an epoch only grows,
    unless the brokers were put back to an older state.
    """

    id: str
    partitions: int
    ends: Mapping[int, tuple[int, int | None]]

    def other(self, former: Topic) -> str:
        """Return the reason why it is not the former topic as it was; empty if nothing says so."""
        if self.id != former.id:
            return "was made anew"
        for number, (_, epoch) in self.ends.items():
            before = former.ends.get(number, (0, None))[1]
            if epoch is not None and before is not None and epoch < before:
                return f"is at epoch {epoch} in partition {number}, and was at {before}"
        return ""


def look(admin: AdminClient, names: Collection[str], timeout: float) -> dict[str, Topic]:
    """Return the topics that are there and may be looked at. Raises KafkaException."""
    if not names:
        return {}
    found: dict[str, tuple[str, int]] = {}
    partitions = []
    described = admin.describe_topics(TopicCollection(sorted(names)), request_timeout=timeout)
    for name, answer in described.items():
        try:
            topic = answer.result()
        except KafkaException as error:
            log.debug("%s: %s", name, error)
        else:
            found[name] = str(topic.topic_id), len(topic.partitions)
            # The answer to all would wait for a partition without a leader.
            led = [each.id for each in topic.partitions if each.leader is not None]
            partitions += [TopicPartition(name, number) for number in led]
    ends: dict[str, dict[int, tuple[int, int | None]]] = {name: {} for name in found}
    if partitions:
        end_of: OffsetSpec = OffsetSpec.latest()  # type: ignore[no-untyped-call]
        latest = dict.fromkeys(partitions, end_of)
        for partition, answer in admin.list_offsets(latest, request_timeout=timeout).items():
            try:
                end = answer.result()
            except KafkaException as error:
                log.debug("%s/%s: %s", partition.topic, partition.partition, error)
            else:
                ends[partition.topic][partition.partition] = end.offset, end.leader_epoch
    return {name: Topic(*found[name], ends[name]) for name in found}


@dataclass(frozen=True)
class Mark:
    """The metadata that a group commits beside an offset.

    ``topic`` is the id of the topic that the offset is of, ``begun`` the time when the group began
    to read it, in milliseconds. ``clean`` says that the member has nothing more under way, so that
    nothing from the offset on has been delivered.
    """

    topic: str = ""
    begun: int | None = None
    clean: bool = False

    def __str__(self) -> str:
        begun = "" if self.begun is None else str(self.begun)
        return f"{self.topic},{begun},{'clean' if self.clean else ''}"

    @classmethod
    def read(cls, text: str | None) -> Mark:
        """Return the mark in a text; an empty one if another program has committed."""
        parts = (text or "").split(",")
        if len(parts) != 3:
            return cls()
        topic, begun, clean = parts
        return cls(topic, int(begun) if begun.isascii() and begun.isdigit() else None, bool(clean))
