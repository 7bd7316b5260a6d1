"""The parts of a consumer that this process reads: claimed, acknowledged, and told of losses."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from ..errors import DatabaseError
from ..events import Gap
from ..outbox.pages import Page
from ..outbox.parts import Part
from ..outbox.store import Look, Store

log = logging.getLogger("pgsignals")


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
        begun: Callable[[Store, Part], None],
    ) -> None:
        self._consumer = consumer
        self._name = name
        self._tell_of = tell
        self._now = now
        self._begun = begun
        self.parts: dict[int, Part] = {}
        # Whose history the database is of.
        self.epoch = ""
        self._channels: Sequence[int] = ()
        # Until when, by the server's clock, all is known to have been acknowledged.
        self._settled_at: datetime | None = None
        self._enrolled_at = 0.0

    @property
    def complete(self) -> bool:
        """Whether this process reads all parts."""
        return len(self.parts) == self._consumer.parts

    @property
    def outstanding(self) -> int:
        """Events that have been read and not been acknowledged."""
        return sum(part.outstanding for part in list(self.parts.values()))

    def enrol(self, store: Store, epoch: str, channels: Sequence[int]) -> None:
        """Make the consumer known, at first and whenever it has been removed since.

        ``channels`` are those whose triggers nobody may remove while it is away. Raises
        DatabaseError when it has another number of parts.
        """
        self.epoch, self._channels = epoch, channels
        present, new = store.register(
            self._consumer.parts,
            self._consumer.name is None,
            epoch,
            channels,
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
        self._enrolled_at = time.monotonic()

    def drop(self) -> None:
        """The session is lost: deliver nothing more of what has been read."""
        for part in self.parts.values():
            part.reign.end()
        self.parts.clear()

    def claim(self, store: Store) -> None:
        """See that this process reads its share of the parts."""
        parts, lease = self._consumer.parts, self._consumer.lease
        share = parts
        if parts > 1:
            share = math.ceil(parts / max(1, store.members(lease)))
        for part in [*self.parts.values()][share:]:
            part.leaving = True
        wanted = [number for number in range(parts) if number not in self.parts]
        random.shuffle(wanted)
        for number in wanted:
            if len(self.parts) >= share:
                break
            asked_at = time.monotonic()
            claim = store.claim(number, lease, self._channels, self.epoch)
            if claim is None:
                continue
            log.info("reading part %d of %d for the consumer %s", number, parts, self._name)
            # Only now has the former holder acknowledged, and delivered, for the last time.
            look = store.look(awake=True)
            part = self.parts[number] = Part(claim, look, asked_at + lease)
            self._begin(store, part, look, claim.lost_until)
        if not self.parts and time.monotonic() - self._enrolled_at >= lease:
            # Where the consumer itself is gone, there is nothing to claim: a process without a name
            # that was away for long is forgotten, and a consumer at work may be dropped.
            self.enrol(store, self.epoch, self._channels)

    def acknowledge(self, store: Store, renew: bool) -> None:
        """Save how far each part has come; with ``renew``, also where it has come no further."""
        for number, part in list(self.parts.items()):
            part.collect()
            gone = part.leaving and not part.pages
            if part.dirty or renew or gone or part.reign.over:
                self._save(store, number, part, release=gone)

    def release(self, store: Store) -> None:
        """Acknowledge for the last time, and let others read at once."""
        for number, part in list(self.parts.items()):
            part.collect()
            self._save(store, number, part, release=True)

    def note_shed(self, part: Part, look: Look) -> None:
        """Announce what writers left out, since the outbox was full and nobody there to read it."""
        if look.shed > part.telling.shed:
            log.error("%d statements found the outbox full", look.shed - part.telling.shed)
            detail = "the outbox was full, and no consumer was there"
            gap = Gap(part.claim.acknowledged_at, self._now(), "retention", detail)
            self._tell(part, gap, shed=look.shed)

    def _save(self, store: Store, number: int, part: Part, release: bool) -> None:
        asked_at = time.monotonic()
        lease = self._consumer.lease
        ours, lost_until = store.acknowledge(
            part.claim,
            part.acknowledged,
            part.unsaved,
            lease,
            current=part.current,
            release=release,
            clean=not part.pages and part.doubtful is None,
            progress=list(part.progress.values()),
        )
        part.saved()
        if not ours:
            log.warning("another process has taken over part %d of %s", number, self._name)
        if not ours or release:
            part.reign.end()
            del self.parts[number]
            return
        if part.current and lost_until is None:
            part.claim = replace(part.claim, acknowledged_at=self._now())
            if all(each.current for each in self.parts.values()):
                self._settled_at = part.claim.acknowledged_at
        if part.reign.holds():
            part.reign.deadline = asked_at + lease
            self._note_loss(part, lost_until)
            return
        log.warning("the lease was over for a while: reading part %d again", number)
        look = store.look(awake=True)
        part.rewind(look)
        part.reign.deadline = asked_at + lease
        self._begin(store, part, look, lost_until)

    def _begin(self, store: Store, part: Part, look: Look, lost_until: datetime | None) -> None:
        self._note_history(part, look)
        self._note_loss(part, lost_until)
        self._begun(store, part)

    def _note_history(self, part: Part, look: Look) -> None:
        """Announce that what was acknowledged is of a history that is not the database's any more.

        In another database, or another past, that says nothing: all that is there is read again.
        """
        cluster, _, timeline = part.telling.epoch.partition("/")
        our_cluster, _, our_timeline = self.epoch.partition("/")
        detail = ""
        if cluster != our_cluster:
            detail = f"cluster, database or outbox are others: {our_cluster}, and were {cluster}"
        elif part.acknowledged.snapshot.xmax > look.snapshot.xmax:
            detail = "the database has gone back in time"
        if detail:
            part.start_over(look)
        elif timeline != our_timeline:
            detail = (
                f"the server was promoted (timeline {our_timeline}, and was {timeline}): what was "
                "committed just before may be gone"
            )
        if detail:
            log.error("the history of the database has changed: %s", detail)
            gap = Gap(part.claim.acknowledged_at, self._now(), "restored", detail)
            self._tell(part, gap, epoch=self.epoch)

    def _note_loss(self, part: Part, lost_until: datetime | None) -> None:
        """Announce that rows were dropped which had not been read."""
        known = part.telling.lost_until
        if lost_until is not None and (known is None or lost_until > known):
            detail = (
                "events were dropped before they were read, or never noted: the consumer was late, "
                "or had been removed, or a trigger was missing"
            )
            log.error("%s has lost events: %s", self._name, detail)
            gap = Gap(part.claim.acknowledged_at, lost_until, "retention", detail)
            self._tell(part, gap, lost_until=lost_until)

    def _tell(self, part: Part, gap: Gap, **known: Any) -> None:
        """Announce a loss, which stays marked until receivers have been told.

        Should this process die before, whoever reads next announces it.
        """
        self._tell_of(gap, part.tell(replace(part.telling, **known)))
