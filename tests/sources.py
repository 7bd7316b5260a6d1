"""What a source lives by, as anybody sees it: its thread, and its session in the server."""

from __future__ import annotations

import threading

from tests.conftest import Database
from tests.waiting import eventually

SESSIONS = (
    "SELECT pid FROM pg_stat_activity"
    " WHERE application_name = 'pgsignals' AND datname = current_database()"
)


def source_thread() -> threading.Thread:
    """The thread of the only source of this process."""
    [found] = (each for each in threading.enumerate() if each.name == "pgsignals-source")
    return found


def source_session(db: Database) -> int:
    """The session of the only source of this database, by its process."""
    # The session that has installed goes a little after its client has.
    [(found,)] = eventually(lambda: db(SESSIONS), lambda rows: len(rows) == 1)
    return int(found)
