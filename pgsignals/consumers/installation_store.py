"""The triggers as a consumer last knew them, and losses that have yet to be announced."""

from __future__ import annotations

from datetime import datetime

from ..triggers.fingerprint import TARGET, Fingerprint
from .consumer_store import ConsumerStore


class InstallationStore:
    """The fingerprint of the triggers in ``pgsignals.consumers``, in all rows of one consumer."""

    def __init__(self, consumer: ConsumerStore) -> None:
        self._execute = consumer.execute
        self._name = consumer.name

    def read(self) -> str | None:
        """Return the fingerprint of the triggers as this consumer last knew them."""
        found = self._execute(
            "SELECT installation FROM pgsignals.consumers WHERE name = %s ORDER BY part LIMIT 1",
            (self._name,),
        )
        return found[0][0] if found else None

    def keep(self, found: Fingerprint, at: datetime, announced: bool = False) -> bool:
        """Keep the fingerprint ``found`` of the triggers, which have been right until ``at``.

        Return False if another process has marked a loss that has not been ``announced``. An
        upgrade that altered the outbox after ``found`` was read has put a newer fingerprint there,
        which stays.
        """
        return bool(
            self._execute(
                "UPDATE pgsignals.consumers SET verified_at = %s,"
                f" installation = CASE WHEN ({TARGET}) = %s THEN %s ELSE installation END"
                " WHERE name = %s AND (%s OR installation IS DISTINCT FROM '') RETURNING part",
                (at, found.target, found.encode(), self._name, announced),
            )
        )

    def mark_loss(self, since: datetime) -> None:
        """Mark a loss since the triggers were last right; the next process to look announces it."""
        self._execute(
            "UPDATE pgsignals.consumers SET installation = '',"
            " verified_at = least(verified_at, %s::timestamptz) WHERE name = %s",
            (since, self._name),
        )

    def doubt(self, since: datetime | None) -> datetime | None:
        """Mark a loss, to be announced as a Gap, since the triggers were last known to be right.

        The Gap begins at ``since`` at the latest. Until a fingerprint is kept again, each process
        that starts announces one, too. Return where the Gap begins, unless unacknowledged events go
        back further.
        """
        found = self._execute(
            "UPDATE pgsignals.consumers SET installation = '', acknowledged_at ="
            " least(acknowledged_at, verified_at, %(since)s::timestamptz),"
            " lost_until = pg_catalog.clock_timestamp() WHERE name = %(name)s"
            " RETURNING least(verified_at, %(since)s::timestamptz)",
            {"since": since, "name": self._name},
        )
        return min((at for (at,) in found if at is not None), default=since)
