"""The partitions that this process reads of a consumer: claimed, acknowledged, told of losses."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from ..core.errors import DatabaseError
from ..core.events import Gap
from ..core.logging import log
from ..core.rng import chance
from ..dispatch.in_flight import Page
from .acks import Partition
from .consumer_store import Beat, Channels
from .liveness import Stillness
from .log import Log
from .parking_store import Late


@dataclass(frozen=True)
class Consumer:
    """Who reads: ``name`` None reads for this process alone, and is forgotten with it.

    ``parts`` share the records among as many processes. A process that does not renew its claim for
    ``lease`` seconds is taken for hung.
    """

    name: str | None = None
    parts: int = 1
    lease: float = 5.0


class Claims:
    """What this process holds of a consumer, in the session of the thread that reads for it.

    ``name`` is what the database knows the consumer by, ``tell`` takes each Gap, and the page that
    is done once receivers have been told; ``now`` is the server's clock. ``begun`` is called for
    each part that is read from where it was acknowledged.
    """

    def __init__(
        self,
        consumer: Consumer,
        name: str,
        tell: Callable[[Gap, Page], None],
        now: Callable[[], datetime],
        begun: Callable[[Partition], None],
    ) -> None:
        self._consumer = consumer
        self._name = name
        self._tell_of = tell
        self._now = now
        self._begun = begun
        self.parts: dict[int, Partition] = {}
        # The history that the log is of.
        self.epoch = ""
        self._channels = Channels((), 0, ())
        self._log: Log
        # Until when, by the server's clock, all is known to have been acknowledged.
        self._settled_at: datetime | None = None
        self._enrolled_at = 0.0
        # When the last poll began: what was committed, or left out, later may not be in it.
        self.polled_at = time.monotonic()
        self._holders: Stillness[int] = Stillness()
        self._members: Stillness[str] = Stillness()

    @property
    def complete(self) -> bool:
        """Whether this process reads all parts."""
        return len(self.parts) == self._consumer.parts

    @property
    def outstanding(self) -> int:
        """Events that have been read and not been acknowledged."""
        return sum(part.outstanding for part in list(self.parts.values()))

    def enrol(self, source: Log, epoch: str, channels: Channels) -> None:
        """Make the consumer of a log known, at first and whenever it has been removed since.

        The triggers of its own ``channels`` nobody may remove while it is away. Raises
        DatabaseError when it has another number of parts.
        """
        self._log, self.epoch, self._channels = source, epoch, channels
        present, new = self._log.consumer.register(
            self._consumer.parts,
            self._consumer.name is None,
            epoch,
            channels.own,
            self._settled_at,
        )
        if present != self._consumer.parts:
            raise DatabaseError(
                f"The consumer {self._name!r} has {present} partitions, and this process was told "
                f"partitions={self._consumer.parts}: a record's events would go to two. Stop its "
                "processes, run `pgsignals consumers drop`, and start all with the same number."
            )
        now = self._now()
        if new and self._settled_at is None:
            log.info("the consumer %s begins here", self._name)
        elif new:
            log.error("the consumer %s had been removed, and begins anew", self._name)
        if new or self._settled_at is None:
            self._settled_at = now
        self._enrolled_at = self.polled_at = time.monotonic()

    def drop(self) -> None:
        """The session is lost: deliver nothing more of what has been read."""
        for part in self.parts.values():
            part.lease.end()
        self.parts.clear()

    def claim(self) -> None:
        """See that this process reads its share of the parts."""
        parts, lease = self._consumer.parts, self._consumer.lease
        share = parts
        if parts > 1:
            share = math.ceil(parts / max(1, self._count_members()))
        for part in [*self.parts.values()][share:]:
            part.leaving = True
        wanted = [number for number in range(parts) if number not in self.parts]
        chance.shuffle(wanted)
        hung = self._hung() if wanted else {}
        for number in wanted:
            if len(self.parts) >= share:
                break
            asked_at = time.monotonic()
            claim = self._log.consumer.claim(
                number, lease, self._channels, self.epoch, hung.get(number)
            )
            if claim is None:
                continue
            log.info("reading part %d of %d for the consumer %s", number, parts, self._name)
            # Only now has the former holder acknowledged, and delivered, for the last time.
            reader = self._log.reader(claim.position, claim.clean)
            part = self.parts[number] = Partition(claim, reader, asked_at + lease)
            self._begin(part, claim.lost_until)
        if not self.parts and time.monotonic() - self._enrolled_at >= lease:
            # Where the consumer itself is gone, there is nothing to claim: a process without a name
            # that was away for long is forgotten, and a consumer at work may be dropped.
            self.enrol(self._log, self.epoch, self._channels)

    def _count_members(self) -> int:
        """Count the processes that share the parts, without those that hang in a live session."""
        found = self._log.consumer.members(self._consumer.lease)
        still = self._members.note({holder: (self.epoch, beat) for holder, beat in found.items()})
        return sum(still[holder] < beat.lease for holder, beat in found.items())

    def _hung(self) -> dict[int, Beat]:
        """The parts whose leases are over, and since which beat."""
        found = self._log.consumer.beats()
        still = self._holders.note({part: (self.epoch, beat) for part, beat in found.items()})
        return {part: beat for part, beat in found.items() if still[part] >= beat.lease}

    def acknowledge(self, renew: bool) -> None:
        """Save how far each part has come; with ``renew``, also where it has come no further."""
        for number, part in list(self.parts.items()):
            part.collect()
            gone = part.leaving and not part.pages
            if part.dirty or renew or gone or part.lease.over:
                self._save(number, part, release=gone)

    def park(self, part: Partition, pages: int, late: Sequence[Late]) -> None:
        """Acknowledge the first pages, since what holds them is parked with that."""
        part.collect(pages)
        self._save(part.claim.part, part, release=False, late=late)

    def release(self) -> None:
        """Acknowledge for the last time, and let others read at once."""
        for number, part in list(self.parts.items()):
            part.collect()
            self._save(number, part, release=True)

    def note_shed(self, part: Partition, shed: int, since: datetime | None = None) -> bool:
        """Announce what writers left out, since they could not write to the log; if they did.

        Their transactions need not have ended. They did it after ``since`` at the earliest, or
        after all had been acknowledged.
        """
        if shed > part.announcing.shed:
            detail = self._log.shed_detail(shed - part.announcing.shed)
            log.error("events were lost: %s; `pgsignals doctor` tells more", detail)
            began = min(part.claim.acknowledged_at, since or part.claim.acknowledged_at)
            gap = Gap(began, self._now(), "retention", detail)
            self._tell(part, gap, shed=shed)
            return True
        return False

    def _save(self, number: int, part: Partition, release: bool, late: Sequence[Late] = ()) -> None:
        asked_at = time.monotonic()
        age = asked_at - self.polled_at
        lease = self._consumer.lease
        kept = self._log.consumer.acknowledge(
            part.claim,
            part.acknowledged,
            part.unsaved,
            age=age if part.current else None,
            release=release,
            clean=not part.pages and not part.reader.unsure,
            progress=list(part.progress.values()),
            late=late,
        )
        part.saved()
        if kept is None:
            log.warning("another process has taken over part %d of %s", number, self._name)
        if kept is None or release:
            part.lease.end()
            del self.parts[number]
            return
        acknowledged_at, lost_until = kept
        if lost_until is not None:
            # Whoever noted the loss knows since when.
            since = min(part.claim.acknowledged_at, acknowledged_at)
            part.claim = replace(part.claim, acknowledged_at=since)
        if part.current and lost_until is None:
            since = self._now() - timedelta(seconds=time.monotonic() - self.polled_at)
            part.claim = replace(part.claim, acknowledged_at=since)
            if all(each.current for each in self.parts.values()):
                self._settled_at = part.claim.acknowledged_at
        if part.lease.holds():
            part.lease.deadline = asked_at + lease
            self._note_loss(part, lost_until)
            return
        log.warning("the lease was over for a while: reading part %d again", number)
        part.rewind(self._log.reader(part.acknowledged, clean=False))
        part.lease.deadline = asked_at + lease
        self._begin(part, lost_until)

    def _begin(self, part: Partition, lost_until: datetime | None) -> None:
        self._note_history(part)
        self._note_loss(part, lost_until)
        self._begun(part)

    def _note_history(self, part: Partition) -> None:
        """Announce that what was acknowledged is of a history that is not the database's any more.

        In another database, or another past, that says nothing: all that is there is read again.
        """
        cluster, _, timeline = part.announcing.epoch.partition("/")
        our_cluster, _, our_timeline = self.epoch.partition("/")
        detail = ""
        if cluster != our_cluster:
            detail = f"cluster, database or log are others: {our_cluster}, and were {cluster}"
        elif part.reader.ahead:
            detail = "the database has gone back in time"
        if detail:
            part.reader.start_over()
        elif timeline != our_timeline:
            detail = (
                f"the server was promoted (timeline {our_timeline}, and was {timeline}): what was "
                "committed just before may be gone"
            )
        if detail:
            log.error("the history of the database has changed: %s", detail)
            gap = Gap(part.claim.acknowledged_at, self._now(), "restored", detail)
            self._tell(part, gap, epoch=self.epoch)

    def _note_loss(self, part: Partition, lost_until: datetime | None) -> None:
        """Announce that rows were dropped which had not been read."""
        known = part.announcing.lost_until
        if lost_until is not None and (known is None or lost_until > known):
            detail = (
                "events were dropped before they were read, or never noted: the consumer was late, "
                "or had been removed, or a trigger was missing"
            )
            log.error("%s has lost events: %s", self._name, detail)
            gap = Gap(part.claim.acknowledged_at, lost_until, "retention", detail)
            self._tell(part, gap, lost_until=lost_until)

    def _tell(self, part: Partition, gap: Gap, **known: Any) -> None:
        """Announce a loss, which stays marked until receivers have been told.

        Should this process die before, whoever reads next announces it.
        """
        self._tell_of(gap, part.announce(replace(part.announcing, **known)))
