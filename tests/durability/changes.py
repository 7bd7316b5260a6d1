"""What somebody does, while others write, to the table and to the rights of its owner."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

import psycopg2
from psycopg2.extensions import cursor as Cursor

from .writers import Board, Target

CHANGES = ("REVOKE", "ALTER TABLE")

# Owns the table, the triggers' functions and the outbox, and is no superuser.
OWNER = "keeper"
SUPERUSER = "postgres"
WRITER = "writer"

ROLES = f"""
CREATE ROLE {OWNER} LOGIN REPLICATION;
CREATE ROLE {WRITER} LOGIN;
ALTER ROLE {WRITER} SET deadlock_timeout TO '50ms';
GRANT ALL ON SCHEMA public TO {OWNER};
ALTER DEFAULT PRIVILEGES FOR ROLE {OWNER} IN SCHEMA public GRANT ALL ON TABLES TO {WRITER};
"""

_RIGHTS = (
    "SCHEMA pgsignals",
    "TABLE pgsignals.outbox",
    "SEQUENCE pgsignals.outbox_id",
    "SEQUENCE pgsignals.outbox_segment",
    "SEQUENCE pgsignals.outbox_shed",
    "SEQUENCE pgsignals.outbox_full",
    "ALL SEQUENCES IN SCHEMA pgsignals",
)

# Those that count in delivery from the write-ahead log.
_WAL_RIGHTS = (
    "SCHEMA pgsignals",
    "SEQUENCE pgsignals.wal_secret",
    "SEQUENCE pgsignals.outbox_shed",
    "ALL SEQUENCES IN SCHEMA pgsignals",
)

# What happens to the slot of a consumer. Whoever reads from it is sent away first, and comes back:
# the server may be asked again and again.
_SLOT_STRIKES = {
    "slot dropped": "SELECT pg_catalog.pg_drop_replication_slot(%(slot)s)",
    "slot advanced": "SELECT pg_catalog.pg_replication_slot_advance("
    "%(slot)s, pg_catalog.pg_current_wal_lsn())",
    "slot made anew": "SELECT pg_catalog.pg_drop_replication_slot(%(slot)s);"
    "SELECT pg_catalog.pg_create_logical_replication_slot(%(slot)s, 'pgoutput')",
}
_STRIKES = 20

# Writers queue behind a change that waits for its lock, and so does the campaign.
_LOCK_WAIT = "400ms"
_BELOW = "PARTITION BY RANGE (id)"
_AFTERMATH = timedelta(seconds=15)
# A process knows the server's clock late by the time that an answer takes.
_LATE = timedelta(seconds=0.5)
# Of the tables that inherit: no two have had the same records.
_CHILD_RECORDS = 10_000
_FIRST_OF_CHILDREN = 100_000
_UNKNOWN = (
    "SELECT WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_trigger"
    " WHERE tgrelid = '{child}'::pg_catalog.regclass AND tgname LIKE 'pgsignals%')"
)


@dataclass(frozen=True)
class Form:
    """Statements that change the table; those of ``undo`` are due later.

    ``through`` is another name by which rows are written then, ``away`` says that the table's own
    name is nobody's meanwhile, and ``child`` that the other table has records of its own. Nobody
    can know of one that has come and gone: it stays until it has triggers.
    """

    name: str
    do: str
    undo: str = ""
    through: str = ""
    away: bool = False
    child: bool = False


FORMS = (
    Form(
        "made anew",
        "LOCK TABLE records; CREATE TABLE records_new (LIKE records INCLUDING ALL);"
        "INSERT INTO records_new SELECT * FROM records;"
        "DROP TABLE records; ALTER TABLE records_new RENAME TO records",
    ),
    Form(
        "made partitioned",
        "ALTER TABLE records RENAME TO records_then;"
        f"CREATE TABLE records (LIKE records_then INCLUDING ALL) {_BELOW};"
        "ALTER TABLE records ATTACH PARTITION records_then DEFAULT",
        "ALTER TABLE records DETACH PARTITION records_then;"
        "DROP TABLE records; ALTER TABLE records_then RENAME TO records",
        through="records_then",
    ),
    Form(
        "attached below another",
        f"CREATE TABLE everything (LIKE records INCLUDING ALL) {_BELOW};"
        "ALTER TABLE everything ATTACH PARTITION records DEFAULT",
        "ALTER TABLE everything DETACH PARTITION records; DROP TABLE everything",
        through="everything",
    ),
    Form(
        "with a child",
        "CREATE TABLE {child} (PRIMARY KEY (id)) INHERITS (records)",
        "DROP TABLE {child}",
        child=True,
    ),
    Form(
        "another type",
        "ALTER TABLE records ALTER n TYPE bigint",
        "ALTER TABLE records ALTER n TYPE int",
    ),
    Form(
        "renamed away and back",
        "ALTER TABLE records RENAME TO records_away",
        "ALTER TABLE records_away RENAME TO records",
        through="records_away",
        away=True,
    ),
)


@dataclass
class Period:
    """When a change was made, by the server's clock, which is this machine's.

    A transaction that could not write an event then may go on for a while, and a process that reads
    a part for the first time since is told of it all.
    """

    since: datetime
    until: datetime | None = None

    def overlaps(self, since: datetime, until: datetime) -> bool:
        """Whether some of both is at the same time."""
        return self.since <= until + _LATE and (
            self.until is None or since <= self.until + _AFTERMATH
        )


@dataclass
class _Step:
    """Statements that are due, and tried until they get their locks, and those that follow.

    Of ``next``, ``due`` says how much later. ``stays``: what follows may wait for a later round.
    ``lasts``: the period ends with the next step. ``unless``: a query that finds a row while it is
    too early.
    """

    statements: str
    role: str
    due: float
    name: str = ""
    targets: tuple[Target, ...] = ()
    next: _Step | None = None
    period: Period | None = None
    leaves: bool = False
    returns: bool = False
    unless: str = ""
    stays: bool = False
    lasts: bool = False


class Changes:
    """Changes the table and the rights, one of each kind at a time; ``periods`` says when.

    ``board`` tells the writers by which names they can write; ``dsns`` has a URL for each role.
    """

    def __init__(
        self,
        board: Board,
        dsns: Mapping[str, str],
        chance: random.Random,
        delivery: str = "outbox",
    ) -> None:
        self._rights = {"outbox": _RIGHTS, "wal": _WAL_RIGHTS, "both": _RIGHTS + _WAL_RIGHTS}[
            delivery
        ]
        self.periods: list[Period] = []
        self.made: Counter[str] = Counter()
        self._board = board
        self._dsns = dsns
        self._chance = chance
        self._steps: dict[str, _Step] = {}
        self._children = 0

    def inject(self, fault: str, now: float) -> bool:
        """Begin a change, or undo the one that there is; whether there was anything to do."""
        step = self._steps.get(fault)
        if step is None:
            self._steps[fault] = self._revoke(now) if fault == "REVOKE" else self._alter(now)
            return True
        early = step.stays and step.due > now
        if early:
            step.due = now
        return early

    def strike_slot(self, fault: str) -> bool:
        """Do to a slot what ``fault`` says, at once; return whether that could be done."""
        with closing(psycopg2.connect(self._dsns[SUPERUSER])) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(
                    "SELECT slot_name FROM pg_catalog.pg_replication_slots"
                    " WHERE slot_type = 'logical'"
                )
                slots = sorted(name for (name,) in cursor.fetchall())
                if not slots:
                    return False
                slot = {"slot": self._chance.choice(slots)}
                with self.period():
                    return any(_strike(cursor, fault, slot) for _ in range(_STRIKES))

    @contextmanager
    def period(self) -> Iterator[None]:
        """A change of something else is made within."""
        period = Period(_now())
        self.periods.append(period)
        try:
            yield
        finally:
            period.until = _now()

    def tend(self, now: float) -> None:
        """Take the steps that are due; what finds a lock taken is tried again."""
        for fault, step in [*self._steps.items()]:
            if now < step.due or not self._take(step):
                continue
            self.made[step.name] += 1
            if step.next is None:
                del self._steps[fault]
                continue
            step.next.due += now
            if step.lasts:
                step.next.period = step.period
            self._steps[fault] = step.next

    def heal(self) -> None:
        """Give back what is away: a right, or the table's name."""
        while away := [step for step in self._steps.values() if not step.stays]:
            for step in away:
                step.due = 0.0
            self.tend(0.0)

    def explain(self, since: datetime, until: datetime) -> bool:
        """Whether something was changed in a period."""
        return any(each.overlaps(since, until) for each in self.periods)

    @property
    def last(self) -> str:
        """When something was changed for the last time."""
        return f"{self.periods[-1].since} to {self.periods[-1].until}" if self.periods else "never"

    def _revoke(self, now: float) -> _Step:
        right = self._chance.choice(self._rights)
        back = _Step(
            f"GRANT ALL ON {right} TO {OWNER}",
            SUPERUSER,
            self._chance.uniform(0.05, 1.0),
            f"GRANT on {right}",
        )
        revoke = f"REVOKE ALL ON {right} FROM {OWNER}"
        return _Step(revoke, SUPERUSER, now, f"REVOKE on {right}", next=back, lasts=True)

    def _alter(self, now: float) -> _Step:
        form = self._chance.choice(FORMS)
        self._children += form.child
        child = f"records_child_{self._children}"
        targets = [Target("records")]
        if form.child:
            first = _FIRST_OF_CHILDREN + self._children * _CHILD_RECORDS
            targets += [Target(child, first), Target("records", first, update=True)]
        elif form.through:
            targets.append(Target(form.through))
        step = _Step(
            form.do.format(child=child),
            OWNER,
            now,
            f"ALTER TABLE, {form.name}",
            tuple(targets),
            leaves=form.away,
        )
        if form.undo:
            step.next = _Step(
                form.undo.format(child=child),
                OWNER,
                self._chance.uniform(0.1, 0.6 if form.away else 5.0),
                f"ALTER TABLE, {form.name}, undone",
                (Target("records"),),
                returns=form.away,
                unless=_UNKNOWN.format(child=child) if form.child else "",
                stays=not form.away,
            )
        return step

    def _take(self, step: _Step) -> bool:
        if step.period is None:
            step.period = Period(_now())
            self.periods.append(step.period)
        if step.leaves:
            self._board.leave()
        try:
            with closing(psycopg2.connect(self._dsns[step.role])) as connection:
                with connection.cursor() as cursor:
                    cursor.execute(f"SET lock_timeout TO '{_LOCK_WAIT}'")
                    if step.unless:
                        cursor.execute(step.unless)
                        if cursor.fetchall():
                            return False
                    cursor.execute(step.statements)
                connection.commit()
        except (
            psycopg2.errors.LockNotAvailable,
            psycopg2.errors.DeadlockDetected,
            # The same row of the catalogue was changed at the same moment.
            psycopg2.errors.InternalError_,
        ):
            if step.leaves:
                self._board.come_back()
            return False
        if not step.lasts:
            step.period.until = _now()
        if step.returns:
            self._board.come_back()
        if step.targets:
            self._board.targets = step.targets
        return True


def _strike(cursor: Cursor, fault: str, slot: Mapping[str, str]) -> bool:
    cursor.execute(
        "SELECT pg_catalog.pg_terminate_backend(active_pid, 100)"
        " FROM pg_catalog.pg_replication_slots WHERE slot_name = %(slot)s AND active",
        slot,
    )
    try:
        for statement in _SLOT_STRIKES[fault].split(";"):
            cursor.execute(statement, slot)
    except (
        # Its reader is back already, or has not gone yet.
        psycopg2.errors.ObjectInUse,
        # Its reader has made another one meanwhile.
        psycopg2.errors.DuplicateObject,
        psycopg2.errors.UndefinedObject,
        # It cannot be moved to where it is.
        psycopg2.errors.ObjectNotInPrerequisiteState,
    ):
        return False
    return True


def _now() -> datetime:
    return datetime.now(timezone.utc)
