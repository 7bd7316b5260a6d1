"""Notices that somebody has changed a watched table or its triggers while a source runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import datetime
from typing import Protocol

from psycopg2.extensions import cursor as Cursor

from ..core.errors import DatabaseError
from ..core.events import Gap, moment
from ..core.logging import log
from ..core.payload import Broken
from ..postgres.connection import connect
from ..postgres.session import Session
from ..triggers.definitions import Definition
from ..triggers.fingerprint import QUERY, Fingerprint, Question, parse
from ..triggers.installer import Drift

# The detail of a Gap when the triggers are right again by the time of the look.
TOUCHED = "somebody has changed a trigger, its function, the tables that have it or its rights"


class TriggersChangedError(DatabaseError):
    """A trigger has changed; connecting again installs what is missing."""


class Triggers(Protocol):
    """Answers the watch's questions, through an ordinary connection.

    ``listened`` are the definitions that the source itself reads: another source of the same
    preparer may have connected since with others.
    """

    def drift(self, cursor: Cursor, listened: Sequence[Definition]) -> Drift | None:
        """Return how the triggers of ``listened`` differ from what the watchers need by now."""

    def repair(self, cursor: Cursor, listened: Sequence[Definition]) -> str:
        """Install what is missing, as far as allowed; return why some is missing still, or ""."""


class TriggerWatch:
    """Compares fingerprints of the catalogue, and asks what has changed only if they differ."""

    def __init__(self, dsn: str, timeout: float, patience: float, triggers: Triggers) -> None:
        self._dsn = dsn
        self._timeout = timeout
        self._patience = patience
        self._triggers = triggers
        self._definitions: Sequence[Definition] = ()
        # The fingerprint at the last look.
        self.fingerprint: Fingerprint | None = None
        # The server's time up to which all triggers are known to have been there.
        self.verified_at: datetime | None = None
        self._fresh = True
        # The server's time at which the catalogue was read for the last time.
        self._read_at: datetime
        # Why events are missing at this moment; empty if none are.
        self.reason = ""

    def begin(
        self,
        session: Session,
        definitions: Sequence[Definition],
        at: datetime,
        missing: str,
        others: Collection[str] = (),
    ) -> Fingerprint:
        """Begin to watch; return the fingerprint of the installed triggers and of ``others``.

        ``definitions`` were resolved after ``at``; the first ``look`` asks whether they still are
        what the watchers need. ``missing`` says why some triggers are not as they should be.
        """
        self._definitions = definitions
        if not missing or self.verified_at is None:
            self.verified_at = at
        self.reason, self._fresh = missing, True
        found = self._read(session, others)
        self.fingerprint = found if not others else self._read(session)
        return found

    def look(
        self,
        session: Session,
        now: Callable[[], datetime],
        kept: Callable[[], str | None] = lambda: None,
    ) -> tuple[Fingerprint, Gap | None]:
        """Return the present fingerprint, and a Gap if events may be missing since ``verified_at``.

        While something is missing, each look tries to install it, and the look that succeeds
        returns a Gap of the whole time. ``kept`` returns the fingerprint that the consumer keeps.
        Raises TriggersChangedError if other triggers are to be read, or the log has to be asked
        anew which channels to read.
        """
        # Taken before the catalogue is read: a change in between is left to the next look.
        at = now()
        former, found = self.fingerprint, self._read(session)
        asked_about = found
        assert former is not None
        durable = any(each.trigger.spec.transport.durable for each in self._definitions)
        former = _forgive(former, found, kept)
        same = found == former or (not durable and found == replace(former, target=found.target))
        if same and not self._fresh and not self.reason:
            self.verified_at, self.fingerprint = at, found
            return found, None
        listened = self._definitions
        connection = connect(self._dsn, self._timeout, self._patience)
        with closing(connection), connection.cursor() as cursor:
            drift = self._triggers.drift(cursor, listened)
            if drift is not None and drift.moved:
                raise TriggersChangedError(drift.reason)
            missing = "" if drift is None else self._triggers.repair(cursor, listened)
        # What was missing is known to be right only since the repair.
        if drift is not None:
            at = now()
        # Read it again: a change that the first reading saw may have been undone before the drift
        # was asked.
        found = self._read(session)
        former = _forgive(former, found, kept)
        if durable and self.reason and found.triggers != former.triggers:
            # The triggers installed by now may have channels or tables that the log did not know
            # when this session began. Otherwise their rows would be taken for foreign ones.
            raise TriggersChangedError("what was missing is installed")
        known, self.reason, self.fingerprint = self.reason, missing, found
        # A change after the first reading may have escaped the questions: the next look asks again.
        self._fresh = found != asked_about
        since, detail = self.verified_at or at, ""
        if missing and missing != known:
            log.error("events are missing: %s", missing)
            detail = missing
        elif not missing:
            self.verified_at = at
            touched = found.triggers != former.triggers or found.undone(former.relations)
            if drift is not None:
                detail = drift.reason
            elif known or touched or (durable and found.target != former.target):
                detail = TOUCHED
        if not detail:
            return found, None
        # The Gap ends when the repair was seen, since until then events may have been missed. That
        # is by the server's own clock: ours may be late, and a loss would lie behind the Gap.
        return found, Gap(since, max(since, self._read_at), "watcher_broken", detail)

    def failure(self, broken: Broken, at: datetime) -> Gap:
        """Return the Gap for a change that its trigger could not describe, known since ``at``."""
        if broken.at_us is None:
            return self.silent_failure(at)
        # It ends at ``at``, since the transaction committed later than the trigger failed.
        return Gap(moment(broken.at_us), at, "watcher_broken", broken.error)

    def silent_failure(self, at: datetime) -> Gap:
        """Return the Gap for a trigger that could not even say when it failed.

        The writer's transaction committed just before ``at``, and may have begun long before.
        """
        detail = "a trigger's function could not write, nor say why: see `pgsignals doctor`"
        log.error("events are lost: %s", detail)
        return Gap(min(at, self.verified_at or at), at, "watcher_broken", detail)

    def _read(self, session: Session, others: Collection[str] = ()) -> Fingerprint:
        asked = Question(self._definitions, others).parameters
        # In a database of any bytes names may be of any bytes, too.
        for name in ("schemas", "names"):
            asked[name] = [session.given(each) for each in asked[name]]
        [(*row, self._read_at)] = session.execute(QUERY, asked, timeout=self._timeout)
        return parse(row)


def _forgive(
    former: Fingerprint, found: Fingerprint, kept: Callable[[], str | None]
) -> Fingerprint:
    """Return ``former`` with the present target, if that is what the consumer keeps.

    Then an upgrade of the schema has altered it, or another process has announced the loss.
    """
    if found.target != former.target and found.has_target_of(kept() or ""):
        return replace(former, target=found.target)
    return former
