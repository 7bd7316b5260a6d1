"""Brings a consumer from one log to another, between two transactions.

Everything that a snapshot sees comes from the former log, and all else from the target. Both are
written to at once for a while, by triggers of both:

- From before the id W, the target has been written to, and has been kept: it has all of the
  transactions from W on, since a trigger is made when those that wrote to the table have ended.
- A snapshot that sees all transactions below W is the boundary. Nothing before it is left to the
  target, and nothing behind it is left out there.
- Snapshots fit the order of each record: a transaction that waited for another one is seen by none
  that does not see that other one.

Until the one statement by which the consumer goes to the target, it is a consumer of the former log
like any other: whatever happens before, all of this begins anew.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from ..consumers.acks import Partition
from ..consumers.log import MovableLog, Poll, Watermark, Writers
from ..core.errors import DatabaseError
from ..core.logging import log
from ..core.redaction import error_text
from ..triggers.fingerprint import Fingerprint
from .thread import ConnectAnew

# How often it is asked whether the transactions have ended.
ASK_SECONDS = 0.1


class Handover:
    """Brings a consumer from the ``former`` log, in which it reads, to the ``target``.

    ``look`` returns the fingerprint of the triggers that write to the target, whose channels are
    ``channels``, and ``check`` raises DatabaseError if one is missing.
    """

    def __init__(
        self,
        former: MovableLog,
        target: MovableLog,
        look: Callable[[], Fingerprint],
        check: Callable[[], None],
        channels: Sequence[int],
    ) -> None:
        self._former = former
        self._target = target
        self._look = look
        self._check = check
        self._channels = channels
        self._fingerprint: Fingerprint
        self._writers: Writers
        self._boundary: Watermark | None = None
        self._ask_at = 0.0

    def begin(self) -> None:
        """Have the target kept from now on. To be called before anything is read."""
        self._former.leave()
        # In this order: all were there at the check, and as long as the fingerprint is the same.
        self._fingerprint = self._look()
        self._check()
        self._target.keep()
        # Last: from here on, all that a transaction with a later id does is in the target.
        self._writers = self._former.writers()

    @property
    def ending(self) -> bool:
        """Whether reading ends at the boundary."""
        return self._boundary is not None

    def limit(self, poll: Poll) -> Poll:
        """Return the poll, or one that ends at the boundary once that is known."""
        now = time.monotonic()
        if self._boundary is None and now >= self._ask_at:
            self._ask_at = now + ASK_SECONDS
            if self._former.have_ended(self._writers, poll.watermark):
                self._boundary = self._former.end()
                log.info("reading what is left before the consumer goes on in another log")
        if self._boundary is None:
            return poll
        return replace(poll, watermark=self._boundary, as_of=None)

    def done(self, part: Partition) -> bool:
        """Whether all up to the boundary is acknowledged, of a partition whose chunks are done."""
        return (
            self._boundary is not None
            and part.reader.at_end
            and part.reader.covers(self._boundary)
            and not (part.pages or part.dirty)
        )

    def hand_over(self, part: Partition) -> None:
        """Have the consumer go on in the target, and raise ConnectAnew.

        Returns if a loss has to be announced first. Raises DatabaseError if it has to begin anew.
        """
        store, target = self._former.consumer, self._target
        if self._look() != self._fingerprint:
            raise DatabaseError("a trigger has changed while the consumer went to another log")
        if not target.keeps():
            raise DatabaseError("what was kept for the consumer, who goes to another log, is gone")
        epoch, _ = target.surroundings()
        snapshot = self._former.seen(part.acknowledged)
        if not store.hand_over(
            part.claim,
            target,
            target.behind(snapshot),
            epoch,
            self._channels,
            self._fingerprint.encode(),
        ):
            return
        log.info("the consumer %s goes on in another log, behind %s", store.name, snapshot)
        try:
            self._former.forsake()
        except Exception as error:
            log.warning("what was kept for %s is left: %s", store.name, error_text(error))
        raise ConnectAnew(f"the consumer {store.name} goes on in another log")
