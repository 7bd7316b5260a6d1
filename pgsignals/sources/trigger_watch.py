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

# What is wrong when nothing is, any more.
TOUCHED = "somebody has changed a trigger, its function, the tables that have it or its rights"


class TriggersChangedError(DatabaseError):
    """A trigger is not what it was; connecting again installs what is missing."""


class Triggers(Protocol):
    """The questions that the watch asks, through an ordinary connection, of who prepares sources.

    ``listened`` is what the source itself reads: another one may have connected since.
    """

    def drift(self, cursor: Cursor, listened: Sequence[Definition]) -> Drift | None:
        """Why the triggers of ``listened`` are not what the watchers need by now."""

    def repair(self, cursor: Cursor, listened: Sequence[Definition]) -> str:
        """Install what is missing, as far as that is allowed; why something is missing still."""


class TriggerWatch:
    """Compares fingerprints of the catalogue, and asks what has changed only where they differ."""

    def __init__(self, dsn: str, timeout: float, patience: float, triggers: Triggers) -> None:
        self._dsn = dsn
        self._timeout = timeout
        self._patience = patience
        self._triggers = triggers
        self._definitions: Sequence[Definition] = ()
        # As it was at the last look.
        self.fingerprint: Fingerprint | None = None
        # Until when, by the server's clock, all triggers are known to have been there.
        self.verified_at: datetime | None = None
        self._fresh = True
        # Why events are missing at this moment.
        self.reason = ""

    def begin(
        self,
        session: Session,
        definitions: Sequence[Definition],
        at: datetime,
        missing: str,
        others: Collection[str] = (),
    ) -> Fingerprint:
        """Remember what is installed, and say it, and what ``others`` are.

        ``definitions`` have been resolved since ``at``: whether they still were what the watchers
        need when this looked, the first ``look`` asks. ``missing``: why some of it is not as it
        should be.
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
        """The fingerprint by now, and a Gap where events may be missing since ``verified_at``.

        While something is missing, each look tries to mend it, and the one that succeeds gives a
        Gap of the whole time. ``kept`` asks for the fingerprint that the consumer keeps. Raises
        TriggersChangedError where others are to be listened to, or what is to be read has to be
        asked anew.
        """
        # Taken before the catalogue is read: what is changed meanwhile is the next look's.
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
        if drift is not None:
            at = now()
        # Again: what was changed when it was read may have been undone before all that was asked.
        found = self._read(session)
        former = _forgive(former, found, kept)
        if durable and self.reason and found.triggers != former.triggers:
            # What is installed by now may write to a channel, or of a table, that the log did
            # not know yet when this session asked it what to read.
            raise TriggersChangedError("what was missing is installed")
        known, self.reason, self.fingerprint = self.reason, missing, found
        # What has changed since may be what nobody asked about: the next look does.
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
        # Not before the repair, or whatever it was, has been seen.
        return found, Gap(since, max(since, now()), "watcher_broken", detail)

    def failure(self, broken: Broken, at: datetime) -> Gap:
        """The Gap for a trigger that could not describe a change, as is known since ``at``."""
        if broken.at_us is None:
            return self.silent_failure(at)
        # The transaction was committed later.
        return Gap(moment(broken.at_us), at, "watcher_broken", broken.error)

    def silent_failure(self, at: datetime) -> Gap:
        """The Gap for a trigger that could not even say when it failed.

        The writer's transaction has committed just before ``at``, and had begun some time ago.
        """
        detail = "a trigger's function could not write, nor say why: see `pgsignals doctor`"
        log.error("events were lost: %s", detail)
        return Gap(min(at, self.verified_at or at), at, "watcher_broken", detail)

    def _read(self, session: Session, others: Collection[str] = ()) -> Fingerprint:
        asked = Question(self._definitions, others).parameters
        # Names are of any bytes where the database holds any.
        for name in ("schemas", "names"):
            asked[name] = [session.given(each) for each in asked[name]]
        [row] = session.execute(QUERY, asked, timeout=self._timeout)
        return parse(row)


def _forgive(
    former: Fingerprint, found: Fingerprint, kept: Callable[[], str | None]
) -> Fingerprint:
    """``former``, with what triggers write to by now if the consumer keeps that.

    An upgrade of the schema has altered it, or another process has announced the loss.
    """
    if found.target != former.target and found.has_target_of(kept() or ""):
        return replace(former, target=found.target)
    return former
