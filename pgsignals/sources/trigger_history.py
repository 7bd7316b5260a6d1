"""Whether a consumer's triggers have been there all the time: where not, events may be missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime

from ..consumers.claims import Claims
from ..consumers.installation_store import InstallationStore
from ..consumers.log import Log, MessageDecoder, Poll, Watermark, Writers
from ..core.logging import log
from ..postgres.session import Session
from ..triggers.definitions import Definition
from ..triggers.fingerprint import Fingerprint
from .trigger_watch import TriggersChangedError, TriggerWatch


class Installation:
    """Compares the triggers with those that the consumer has kept, and has losses announced."""

    def __init__(self, triggers: TriggerWatch, now: Callable[[], datetime]) -> None:
        self._triggers = triggers
        self._now = now
        self._log: Log
        self._store: InstallationStore
        # Those who may have written what is missing.
        self._doubted: Writers | None = None
        self._doubted_since: datetime | None = None
        # How much writers had left out when that was doubted for the last time.
        self._shed = -1
        # Whether a loss has been marked that has yet to be announced: whoever renews a claim does.
        self.marked = False

    @property
    def doubted(self) -> bool:
        """Whether a loss has yet to be announced once more."""
        return self._doubted is not None

    def open(self, source: Log) -> None:
        """Go on in the session of a log."""
        self._log, self._store = source, InstallationStore(source.consumer)
        self._doubted, self._shed = None, -1

    def compare(
        self,
        session: Session,
        definitions: Sequence[Definition],
        decoder: MessageDecoder,
        at: datetime,
        missing: str,
    ) -> None:
        """Note what was written without a trigger since this consumer last looked.

        ``definitions`` and ``missing`` are as in TriggerWatch, resolved since ``at``.
        """
        own, unread = decoder.predecessors()
        others = {name for former in own.values() for name in former}
        found = self._triggers.begin(session, definitions, at, missing, others)
        kept = self._store.read()
        if kept is not None and not found.covers(kept, own, unread):
            self.doubt(None)
        elif not missing:
            self._keep(found, at)

    def look(self, session: Session) -> bool:
        """Compare the triggers with what they were; whether events may be missing.

        Raises TriggersChangedError as TriggerWatch does.
        """
        since = self._triggers.verified_at
        try:
            found, gap = self._triggers.look(session, self._now, self._store.read)
        except TriggersChangedError:
            # All may be as it was by the time that it is looked at again.
            assert since is not None
            self._store.mark_loss(since)
            raise
        at = self._triggers.verified_at
        if gap is not None:
            self.doubt(since)
        elif not self._triggers.reason and self._doubted is None and at is not None:
            self._keep(found, at)
        return gap is not None

    def doubt(self, since: datetime | None) -> None:
        """Announce that events may be missing, and once more when all is over that runs by now.

        What a transaction that runs could not write is not missing before it has been committed,
        which is after the first Gap.
        """
        self._doubted, self._doubted_since = self._log.writers(), since
        if not self._end_doubt():
            # By the time of the second Gap another process may have kept the triggers, as of later.
            self._doubted_since = self._mark(since)

    def leave_to_others(self) -> None:
        """Leave it to whoever reads to announce a loss once more: the database has it marked.

        Announced by this process when it reads again, it would come twice, and be taken for a later
        one.
        """
        self._doubted = None

    def note_failed_writers(self, reading: bool) -> None:
        """Doubt it, since writers say that they cannot reach what triggers write to."""
        if self._doubted is None:
            log.error("events were lost: writers cannot reach the outbox")
            if reading:
                self.doubt(self._triggers.verified_at)
            else:
                self._mark(None)

    def note_shed(self, poll: Poll, claims: Claims) -> None:
        """Doubt it where writers have left something out, or no longer, if all is over by now.

        What they leave out while it is doubted is announced once that has ended, as of its
        beginning: all that was read since has been acknowledged meanwhile.
        """
        since = None
        if self._doubted is not None:
            since = self._doubted_since
            if not self._end_doubt(poll.watermark):
                return
        shed = [claims.note_shed(part, poll.shed, since) for part in claims.parts.values()]
        # A part that was claimed later may have yet to be told what all others have been.
        if any(shed) and poll.shed > self._shed:
            self._shed = poll.shed
            self.doubt(since or self._triggers.verified_at)

    def _end_doubt(self, watermark: Watermark | None = None) -> bool:
        """Announce it for the last time, if all is over that ran then."""
        if self._doubted is None or not self._log.have_ended(self._doubted, watermark):
            return False
        self._doubted = None
        self._mark(self._doubted_since)
        found, at = self._triggers.fingerprint, self._triggers.verified_at
        if not self._triggers.reason and found is not None and at is not None:
            self._store.keep(found, at, announced=True)
        return True

    def _mark(self, since: datetime | None) -> datetime | None:
        self.marked = True
        return self._store.doubt(since)

    def _keep(self, found: Fingerprint, at: datetime) -> None:
        # Another process, which reads by other triggers, may have missed what this one has had.
        if not self._store.keep(found, at):
            self.doubt(None)
