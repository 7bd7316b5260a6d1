"""The partitions of a consumer that this process reads: their claims, acknowledgements, losses."""

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
    """A consumer; one whose ``name`` is None reads for this process alone and ends with it.

    ``parts`` is the number of partitions, for as many processes. A process that does not renew its
    claim for ``lease`` seconds is taken for hung.
    """

    name: str | None = None
    parts: int = 1
    lease: float = 5.0


class Claims:
    """The claims of this process on partitions of a consumer, in the session that reads.

    ``name`` is the consumer's in the database. ``tell`` takes each Gap, with a page that is done
    once receivers have been told; ``now`` is the server's clock. ``begun`` is called for each
    partition whose reading begins at the acknowledged position.
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
        # The name of the log's history.
        self.epoch = ""
        self._channels = Channels((), 0, ())
        self._log: Log
        # The server's time before which everything is known to have been acknowledged.
        self._settled_at: datetime | None = None
        self._enrolled_at = 0.0
        # What was committed by then, or lost at a writer, is in the last poll: see Poll.
        self.polled_as_of: float | None = None
        self._holders: Stillness[int] = Stillness()
        self._members: Stillness[str] = Stillness()

    @property
    def complete(self) -> bool:
        """Whether this process reads all partitions."""
        return len(self.parts) == self._consumer.parts

    @property
    def outstanding(self) -> int:
        """The number of events that are in flight."""
        return sum(part.outstanding for part in list(self.parts.values()))

    def enrol(self, source: Log, epoch: str, channels: Channels) -> None:
        """Register the consumer, at first and whenever it has been removed since.

        Its row keeps the triggers of its own ``channels`` from being pruned while it is away.
        Raises DatabaseError if it has another number of partitions.
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
            log.info("the consumer %s is new, and gets what is committed from now on", self._name)
        elif new:
            log.error(
                "the consumer %s had been removed, and begins anew: events committed since may "
                "be lost",
                self._name,
            )
        if new or self._settled_at is None:
            self._settled_at = now
        self._enrolled_at, self.polled_as_of = time.monotonic(), None

    def drop(self) -> None:
        """End all leases, since the session is lost: nothing that was read is delivered now."""
        for part in self.parts.values():
            part.lease.end()
        self.parts.clear()

    def claim(self) -> None:
        """Claim partitions up to this process's share, and leave those beyond it."""
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
            # Only after the claim: the former holder delivers and acknowledges until then.
            reader = self._log.reader(claim.position, claim.clean)
            part = self.parts[number] = Partition(claim, reader, asked_at + lease)
            self._begin(part, claim.lost_until)
        if not self.parts and time.monotonic() - self._enrolled_at >= lease:
            # Otherwise this process would stay deaf where the consumer itself is gone: housekeeping
            # forgets an unnamed one that was away for long, and an operator may drop any.
            self.enrol(self._log, self.epoch, self._channels)

    def _count_members(self) -> int:
        """Count the processes that share the partitions, except those that hang."""
        found = self._log.consumer.members(self._consumer.lease)
        still = self._members.note({holder: (self.epoch, beat) for holder, beat in found.items()})
        return sum(still[holder] < beat.lease for holder, beat in found.items())

    def _hung(self) -> dict[int, Beat]:
        """Return the partitions whose holders have missed a lease, with their last beats."""
        found = self._log.consumer.beats()
        still = self._holders.note({part: (self.epoch, beat) for part, beat in found.items()})
        return {part: beat for part, beat in found.items() if still[part] >= beat.lease}

    def acknowledge(self, renew: bool) -> None:
        """Save each partition's position; with ``renew``, also one that has not changed."""
        for number, part in list(self.parts.items()):
            part.collect()
            gone = part.leaving and not part.pages
            if part.dirty or renew or gone or part.lease.over:
                self._save(number, part, release=gone)

    def park(self, part: Partition, pages: int, late: Sequence[Late]) -> None:
        """Acknowledge the first ``pages`` pages, and park what holds them in one transaction."""
        part.collect(pages)
        self._save(part.claim.part, part, release=False, late=late)

    def release(self) -> None:
        """Acknowledge for the last time, and give up the claims, so that others read at once."""
        for number, part in list(self.parts.items()):
            part.collect()
            self._save(number, part, release=True)

    def note_shed(self, part: Partition, shed: int, since: datetime | None = None) -> bool:
        """Announce what writers could not write to the log; return whether there was anything.

        The writers' transactions need not have ended. The Gap begins where everything had been
        acknowledged, or at ``since`` if that is earlier.
        """
        if shed > part.announcing.shed:
            detail = self._log.shed_detail(shed - part.announcing.shed)
            log.error("events are lost: %s; run `pgsignals doctor` for the cause", detail)
            began = min(part.claim.acknowledged_at, since or part.claim.acknowledged_at)
            gap = Gap(began, self._now(), "retention", detail)
            self._tell(part, gap, shed=shed)
            return True
        return False

    def _save(self, number: int, part: Partition, release: bool, late: Sequence[Late] = ()) -> None:
        asked_at = time.monotonic()
        lease = self._consumer.lease
        as_of = self.polled_as_of if part.current else None
        kept = self._log.consumer.acknowledge(
            part.claim,
            part.acknowledged,
            part.unsaved,
            age=None if as_of is None else asked_at - as_of,
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
            if not self.parts:
                self._log.left()
            return
        acknowledged_at, lost_until = kept
        if lost_until is not None:
            # The process that noted the loss also kept the time since when; the Gap begins there.
            since = min(part.claim.acknowledged_at, acknowledged_at)
            part.claim = replace(part.claim, acknowledged_at=since)
        self._log.acknowledged(part.acknowledged)
        if as_of is not None and lost_until is None:
            since = self._now() - timedelta(seconds=time.monotonic() - as_of)
            part.claim = replace(part.claim, acknowledged_at=since)
            if all(each.current for each in self.parts.values()):
                self._settled_at = part.claim.acknowledged_at
        if part.lease.holds():
            part.lease.deadline = asked_at + lease
            self._note_loss(part, lost_until)
            return
        log.warning(
            "the lease of part %d was over for a while: what was not acknowledged is delivered "
            "again",
            number,
        )
        part.rewind(self._log.reader(part.acknowledged, clean=False))
        part.lease.deadline = asked_at + lease
        self._begin(part, lost_until)

    def _begin(self, part: Partition, lost_until: datetime | None) -> None:
        self._note_history(part)
        if part.reader.lost:
            log.error("events of %s are lost: %s", self._name, part.reader.lost)
            lost_until = self._log.consumer.mark_lost()
        self._note_loss(part, lost_until, part.reader.lost)
        self._begun(part)

    def _note_history(self, part: Partition) -> None:
        """Announce that the database's history is not the one that was acknowledged.

        In another database, or one that has gone back in time, the acknowledged position means
        nothing: all that the log holds is read again.
        """
        cluster, _, timeline = part.announcing.epoch.partition("/")
        our_cluster, _, our_timeline = self.epoch.partition("/")
        detail = ""
        if cluster != our_cluster:
            detail = (
                "cluster, database, log or its secret are others: "
                f"{our_cluster}, and were {cluster}"
            )
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

    def _note_loss(self, part: Partition, lost_until: datetime | None, why: str = "") -> None:
        """Announce rows that were dropped before they were read."""
        known = part.announcing.lost_until
        if lost_until is not None and (known is None or lost_until > known):
            detail = why or (
                "events were dropped before they were read, or never noted: the consumer was late, "
                "or had been removed, or a trigger was missing"
            )
            log.error("%s has lost events: %s", self._name, detail)
            gap = Gap(part.claim.acknowledged_at, lost_until, "retention", detail)
            self._tell(part, gap, lost_until=lost_until)

    def _tell(self, part: Partition, gap: Gap, **known: Any) -> None:
        """Announce a loss, which stays marked until receivers have been told.

        Should this process die before, the next holder announces it.
        """
        self._tell_of(gap, part.announce(replace(part.announcing, **known)))
