"""Compares what was committed with what was delivered. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from .ledger import Delivery

# A version of a record, as the writer made it: the record, its n, and the statement's nonce.
Version = tuple[int, int, str]

_MOST_SHOWN = 5


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
    problems: list[str] = field(default_factory=list)

    def note(self, delivery: Delivery) -> None:
        """Take a delivery in, and check what can be checked without knowing what was committed."""
        self.deliveries += 1
        self.latest[delivery.record] = delivery.n
        version = (delivery.record, delivery.n, delivery.nonce)
        known = self.uids.get(version)
        if known is not None:
            if known != delivery.uid:
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

    def missing(self, committed: Iterable[Version]) -> set[Version]:
        """What was committed and has not been delivered."""
        return set(committed) - self.uids.keys()

    def judge(self, committed: Collection[Version]) -> list[str]:
        """All that is wrong, nothing being under way any more."""
        found = list(self.problems)
        everything = set(committed)
        for what, versions in (
            ("committed, but not delivered", everything - self.uids.keys()),
            ("delivered, but not committed", self.uids.keys() - everything),
        ):
            if versions:
                some = ", ".join(map(str, sorted(versions)[:_MOST_SHOWN]))
                found.append(f"{self.consumer}: {len(versions)} {what}: {some}")
        return found
