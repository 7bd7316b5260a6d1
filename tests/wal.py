"""Consumers of the write-ahead log, and what is done to their replication slots."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import psycopg2

import pgsignals
from tests.conftest import Database, Recorder
from tests.waiting import eventually

_GONE = (
    psycopg2.errors.ObjectInUse,
    psycopg2.errors.ObjectNotInPrerequisiteState,
    psycopg2.errors.UndefinedObject,
)


def start(hub: pgsignals.Hub, dsn: str, *watchers: Any, **options: Any) -> pgsignals.Hub:
    """Start a Hub that reads the log for the consumer ``mailer``."""
    options.setdefault("name", "mailer")
    return hub.start(dsn, watchers or ["items"], delivery="wal", **options)


def slots(db: Database, *columns: str) -> list[Any]:
    """What the slots of the database say, by default their names."""
    found = db(
        f"SELECT {', '.join(columns or ['slot_name'])} FROM pg_replication_slots"
        " WHERE database = current_database() ORDER BY slot_name"
    )
    return found if len(columns) > 1 else [value for (value,) in found]


def strike(db: Database, statement: str) -> None:
    """Run a statement on the only slot, ``%(slot)s``, while nobody reads from it."""
    [slot] = slots(db)

    def struck() -> bool:
        end_readers(db)
        try:
            for each in statement.split(";"):
                db(each, {"slot": slot})
        except _GONE:
            # Its reader was back before.
            return False
        return True

    eventually(struck, bool)


def end_readers(db: Database) -> None:
    """End the sessions that read from slots of the database, and wait for that."""
    db(
        "SELECT pg_terminate_backend(active_pid, 5000) FROM pg_replication_slots"
        " WHERE database = current_database() AND active"
    )


def disconnect(db: Database) -> None:
    """End all other sessions of the database."""
    db(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )


def until_saved(db: Database, name: str = "mailer") -> None:
    """Wait until the consumer has acknowledged all that is committed by now."""
    [(end,)] = db("SELECT (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::bigint")
    eventually(
        lambda: db("SELECT lsn FROM pgsignals.consumers WHERE name = %s", (name,)),
        lambda found: bool(found) and found[0][0] >= end,
    )


def until_heard(db: Database, recorder: Recorder, first: int) -> None:
    """Insert items, from the ``first`` on, until one is heard of: those before may lie in a Gap."""
    number = first - 1

    def heard() -> bool:
        nonlocal number
        number += 1
        db("INSERT INTO items VALUES (%s)", (number,))
        return any((getattr(each, "id", None) or 0) >= first for each in [*recorder.items])

    eventually(heard, bool)


def gaps(items: Sequence[Any]) -> list[pgsignals.Gap]:
    """The Gaps among what came."""
    return [each for each in items if isinstance(each, pgsignals.Gap)]


def check_deliveries(events: Sequence[pgsignals.Event], column: str) -> None:
    """Assert that each record's changes came in order, and what came again said so.

    ``column`` counts a record's changes.
    """
    known: dict[Any, dict[int, str]] = defaultdict(dict)
    for event in events:
        seen, number = known[event.id], event.values[column]
        if number in seen:
            assert event.redelivered, event
            assert event.uid == seen[number], event
        else:
            assert number > max(seen, default=-1), event
            seen[number] = event.uid
