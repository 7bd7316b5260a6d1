"""Finds out whether a consumer's triggers were there all the time: if not, events may be lost."""

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
    """Compares the triggers with the fingerprint that the consumer keeps, and announces losses."""

    def __init__(self, triggers: TriggerWatch, now: Callable[[], datetime]) -> None:
        self._triggers = triggers
        self._now = now
        self._log: Log
        self._store: InstallationStore
        # The writers under way at a first Gap; the loss is announced again when they have ended.
        self._doubted: Writers | None = None
        self._doubted_since: datetime | None = None
        # The log's shed count for which a doubt was begun last.
        self._shed = -1
        # Whether a loss is marked that the next renewal of a claim has to announce.
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
        """Announce a loss if changes may have fired no trigger since this consumer last looked.

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
        """Compare the triggers with the last look; return whether events may be missing.

        Raises TriggersChangedError as TriggerWatch does.
        """
        since = self._triggers.verified_at
        try:
            found, gap = self._triggers.look(session, self._now, self._store.read)
        except TriggersChangedError:
            # Mark it now: by the next look all may be as it was, and the loss would go unnoticed.
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
        """Announce that events may be missing, and again when the writers under way have ended.

        A transaction under way may have failed to write events. These are missing only once it has
        committed, which may be after the first Gap.
        """
        self._doubted, self._doubted_since = self._log.writers(), since
        if not self._end_doubt():
            # Keep the time for the second Gap: by then another process may have kept a fingerprint
            # with a later one.
            self._doubted_since = self._mark(since)

    def leave_to_others(self) -> None:
        """Leave the second announcement of a loss to the process that reads.

        The database has the loss marked. Otherwise this process would announce it, too, when it
        reads again, and it would be taken for another loss.
        """
        self._doubted = None

    def note_failed_writers(self, reading: bool) -> None:
        """Begin a doubt, since writers say that they cannot reach what triggers write to."""
        if self._doubted is None:
            log.error(
                "events are lost: triggers cannot write them; run `pgsignals doctor` for the cause"
            )
            if reading:
                self.doubt(self._triggers.verified_at)
            else:
                self._mark(None)

    def note_shed(self, poll: Poll, claims: Claims) -> None:
        """Begin a doubt if writers have shed events; first end one whose writers have ended.

        Events that writers shed during a doubt are announced when it ends, as lost since the doubt
        began: what was read since has been acknowledged, so that a Gap from there would be too
        short.
        """
        since = None
        if self._doubted is not None:
            since = self._doubted_since
            if not self._end_doubt(poll.watermark):
                return
        shed = [claims.note_shed(part, poll.shed, since) for part in claims.parts.values()]
        # Not for a partition that was claimed later, and has yet to hear what the others were told:
        # otherwise each would begin a doubt, and mark a loss for all, where nothing is lost.
        if any(shed) and poll.shed > self._shed:
            self._shed = poll.shed
            self.doubt(since or self._triggers.verified_at)

    def _end_doubt(self, watermark: Watermark | None = None) -> bool:
        """Announce the loss for the last time if the doubted writers have ended; return whether."""
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
        # False: another process has marked a loss; by its triggers, it may have missed what this
        # one has had.
        if not self._store.keep(found, at):
            self.doubt(None)
