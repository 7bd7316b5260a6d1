"""Compares what was committed with what was delivered. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from .ledger import Announced, Delivery

# A version of a record, as the writer made it: the record, its n, and the statement's nonce.
Version = tuple[int, int, str]

_MOST_SHOWN = 5


def _twins(uid: str, other: str) -> bool:
    """Whether both are of one transaction, and came through different triggers.

    So it is where a process died, and the one after it needed another trigger.
    """
    channel, transaction, *_ = uid.split("-")
    other_channel, other_transaction, *_ = other.split("-")
    return channel != other_channel and transaction == other_transaction


@dataclass
class Book:
    """What one consumer has got so far, by version and in the order of the first deliveries."""

    consumer: str
    uids: dict[Version, str] = field(default_factory=dict)
    versions: dict[str, Version] = field(default_factory=dict)
    heights: dict[int, int] = field(default_factory=dict)
    latest: dict[int, int] = field(default_factory=dict)
    """The n of each record's last occurrence, whether it was delivered before or not."""
    deliveries: int = 0
    unmarked: int = 0
    """Deliveries of what had been delivered, and that were not said to be ``redelivered``."""
    gaps: list[Announced] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def note(self, delivery: Delivery) -> None:
        """Take a delivery in, and check what can be checked without knowing what was committed."""
        self.deliveries += 1
        self.latest[delivery.record] = delivery.n
        version = (delivery.record, delivery.n, delivery.nonce)
        known = self.uids.get(version)
        if known is not None:
            if delivery.uid != known and not (delivery.redelivered and _twins(known, delivery.uid)):
                self._complain(f"{version} came as {known} and as {delivery.uid}", delivery)
            self.unmarked += not delivery.redelivered
            return
        if (other := self.versions.get(delivery.uid)) is not None:
            self._complain(f"{delivery.uid} stands for {other} and for {version}", delivery)
        height = self.heights.get(delivery.record, 0)
        if delivery.n <= height:
            self._complain(f"{version} came after n = {height} of the same record", delivery)
        self.heights[delivery.record] = max(height, delivery.n)
        self.uids[version] = delivery.uid
        self.versions[delivery.uid] = version

    def _complain(self, problem: str, delivery: Delivery) -> None:
        place = f"process {delivery.process}, its delivery {delivery.sequence}"
        self.problems.append(f"{self.consumer}: {problem} ({place})")

    @property
    def outdated(self) -> int:
        """Records whose last occurrence is that of an older version."""
        return sum(n < self.heights[record] for record, n in self.latest.items())

    def announced(self, committed: Mapping[Version, datetime]) -> set[Version]:
        """What was committed, has not been delivered, and lies in a Gap."""
        return {
            version
            for version in committed.keys() - self.uids.keys()
            if any(gap.since <= committed[version] <= gap.until for gap in self.gaps)
        }

    def missing(self, committed: Mapping[Version, datetime]) -> set[Version]:
        """What was committed, and has neither been delivered nor announced as missing."""
        return committed.keys() - self.uids.keys() - self.announced(committed)

    def judge(self, committed: Mapping[Version, datetime]) -> list[str]:
        """All that is wrong, nothing being under way any more; ``committed`` says when."""
        found = list(self.problems)
        for what, versions in (
            ("committed, but not delivered", self.missing(committed)),
            ("delivered, but not committed", self.uids.keys() - committed.keys()),
        ):
            if versions:
                some = ", ".join(
                    f"{version} at {committed.get(version, 'no time')}"
                    for version in sorted(versions)[:_MOST_SHOWN]
                )
                found.append(f"{self.consumer}: {len(versions)} {what}: {some}")
        return found
