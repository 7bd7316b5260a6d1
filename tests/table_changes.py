"""What can be done to a watched table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pgsignals.hub.hub import Delivery
from tests.conftest import Database

SHAPE = "(id int, day date NOT NULL DEFAULT '2026-01-01', note text, PRIMARY KEY (id, day))"


OURS = (
    "SELECT tgname FROM pg_trigger WHERE tgrelid = 'orders'::regclass AND tgname LIKE 'pgsignals%'"
)


class Change:
    """What somebody does to a watched table, and how rows are written to it afterwards."""

    def __init__(self, statements: str, into: str = "orders", newest: bool = False) -> None:
        self.statements = statements
        self.into = into
        self.newest = newest

    @property
    def of_trigger(self) -> bool:
        """Whether it is done to a trigger, rather than to the table."""
        return "{trigger}" in self.statements

    def make(self, db: Database) -> None:
        """Do it; ``{trigger}`` is each trigger of the table in turn."""
        if "{trigger}" not in self.statements:
            db(self.statements)
            return
        for (trigger,) in db(OURS):
            db(self.statements.format(trigger=trigger))


CHANGES = {
    "made anew": Change(f"DROP TABLE orders; CREATE TABLE orders {SHAPE}"),
    "made partitioned": Change(
        f"ALTER TABLE orders RENAME TO legacy; CREATE TABLE orders {SHAPE}"
        " PARTITION BY RANGE (day); ALTER TABLE orders ATTACH PARTITION legacy DEFAULT"
    ),
    "attached below another": Change(
        f"CREATE TABLE all_orders {SHAPE} PARTITION BY RANGE (day);"
        "ALTER TABLE all_orders ATTACH PARTITION orders DEFAULT",
        into="all_orders",
    ),
    "with a child": Change(
        "CREATE TABLE more_orders (PRIMARY KEY (id, day)) INHERITS (orders)", into="more_orders"
    ),
    "trigger disabled": Change("ALTER TABLE orders DISABLE TRIGGER {trigger}"),
    "trigger dropped": Change("DROP TRIGGER {trigger} ON orders"),
    "function dropped": Change("DROP FUNCTION {trigger}() CASCADE"),
    "function emptied": Change(
        "CREATE OR REPLACE FUNCTION {trigger}() RETURNS trigger LANGUAGE plpgsql"
        " AS 'BEGIN RETURN NULL; END'"
    ),
}


def name_of(delivery: Delivery) -> str | None:
    """A consumer's name, where there are some."""
    return None if delivery == "notify" else "mailer"


def now(db: Database) -> datetime:
    """The server's time."""
    [(at,)] = db("SELECT clock_timestamp()")
    assert isinstance(at, datetime)
    return at


@dataclass
class Period:
    """Two moments, by the server's clock, between which something happened."""

    early: datetime
    late: datetime


@contextmanager
def timed(db: Database) -> Iterator[Period]:
    """The time that the body takes: all that it does is committed in it."""
    early = now(db)
    period = Period(early, early)
    yield period
    period.late = now(db)


def covering(gaps: Sequence[Any], lost: datetime | Period) -> bool:
    """Whether one of the Gaps holds a moment, or one of a period, which nobody knows better."""
    period = Period(lost, lost) if isinstance(lost, datetime) else lost
    return any(gap.since <= period.late and period.early <= gap.until for gap in gaps)
