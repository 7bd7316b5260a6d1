"""Timeouts that are set for a role or a database at large do not end what the library does."""

from __future__ import annotations

import select
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import psycopg2
import pytest

import pgsignals
from pgsignals.hub.hub import Delivery
from pgsignals.outbox.archive import Archive
from pgsignals.postgres.connection import connect as ordinary
from pgsignals.triggers import names
from tests.conftest import DEADLINE, Database, Recorder
from tests.waiting import eventually

# Longer than any statement takes that waits for nobody.
SHORT = "500ms"


@pytest.fixture
def items(each_db: Database) -> Database:
    """A table."""
    each_db("CREATE TABLE items (id bigserial PRIMARY KEY)")
    return each_db


def set_for_all(db: Database, **settings: str) -> None:
    """Set it for every session that comes to the database from now on."""
    [(name,)] = db("SELECT quote_ident(current_database())")
    for setting, value in settings.items():
        db(f"ALTER DATABASE {name} SET {setting} TO '{value}'")


def until_a_stranger_is_ended(db: Database) -> None:
    """Wait until the server has ended the session of somebody who says nothing."""
    with closing(psycopg2.connect(db.dsn)) as stranger:
        assert select.select([stranger], [], [], DEADLINE)[0]


def until_idle_sessions_end(db: Database) -> None:
    """Wait for that, and until none of ours has said anything for longer."""
    until_a_stranger_is_ended(db)
    eventually(
        lambda: db(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pgsignals'"
            " AND datname = current_database()"
            " AND state_change > clock_timestamp() - 2 * %s::interval",
            (SHORT,),
        ),
        lambda talking: talking == [(0,)],
    )


def options(delivery: Delivery) -> dict[str, Any]:
    # Nobody says anything for longer than the timeout.
    return {} if delivery == "notify" else {"name": "mailer", "lease": 3600.0}


def test_an_idle_session_timeout(
    hub: pgsignals.Hub, delivery: Delivery, items: Database, recorder: Recorder
) -> None:
    """One that is shorter than the heartbeat ends no session of a Hub, which has no Gap."""
    set_for_all(items, idle_session_timeout=SHORT)
    gaps = Recorder()
    hub.on_gap(gaps)
    hub.on("items", "inserted")(recorder)
    hub.start(items.dsn, ["items"], delivery=delivery, **options(delivery))
    if delivery == "wal":
        # It asks again and again how far the log has come; only its stream says nothing.
        until_a_stranger_is_ended(items)
    else:
        until_idle_sessions_end(items)
    items("INSERT INTO items DEFAULT VALUES")
    recorder.wait(1)
    assert hub.status().reconnects == 0
    assert gaps.items == []


def test_a_session_for_those_who_come_back(hub: pgsignals.Hub, items: Database) -> None:
    """It is kept as well."""
    hub.start(items.dsn, ["items"], delivery="outbox")
    hub.stop()
    set_for_all(items, idle_session_timeout=SHORT)
    archive = Archive(items.dsn, "UTF8", 10.0)
    try:
        pid = archive._ask(lambda session: session.execute("SELECT pg_backend_pid()", timeout=10))
        until_idle_sessions_end(items)
        again = archive._ask(lambda session: session.execute("SELECT pg_backend_pid()", timeout=10))
        assert again == pid
    finally:
        archive.close()


TIMEOUTS = ("statement_timeout", "lock_timeout", "transaction_timeout")


def has(db: Database, setting: str) -> None:
    if db("SELECT current_setting(%s, true)", (setting,)) == [(None,)]:
        pytest.skip(f"this version has no {setting}")


def until_it_strikes(dsn: str, key: int) -> None:
    """Wait until the timeout ends a stranger who waits for the lock, too."""
    with closing(psycopg2.connect(dsn)) as stranger, pytest.raises(psycopg2.OperationalError):
        stranger.cursor().execute("SELECT pg_advisory_lock(%s, %s)", (names.LOCK_CLASS, key))


@contextmanager
def held(db: Database, key: int) -> Iterator[None]:
    """Have one of our locks, for which somebody waits when this returns."""
    db("SELECT pg_advisory_lock(%s, %s)", (names.LOCK_CLASS, key))
    try:
        yield
    finally:
        db("SELECT pg_advisory_unlock(%s, %s)", (names.LOCK_CLASS, key))


def until_waited_for(db: Database, key: int) -> None:
    eventually(
        lambda: db(
            "SELECT count(*) > 0 FROM pg_locks WHERE classid = %s AND objid = %s AND NOT granted",
            (names.LOCK_CLASS, key),
        ),
        lambda waited: waited == [(True,)],
    )


# The first is waited for by an ordinary connection that installs, the other by the session that
# listens, in outbox delivery.
@pytest.mark.parametrize(
    ("delivery", "key"),
    [
        ("notify", names.INSTALL_LOCK),
        ("outbox", names.INSTALL_LOCK),
        ("outbox", names.ALIVE_LOCK),
    ],
)
@pytest.mark.parametrize("setting", TIMEOUTS)
def test_a_timeout_for_statements(
    hub: pgsignals.Hub,
    delivery: Delivery,
    key: int,
    setting: str,
    items: Database,
    recorder: Recorder,
) -> None:
    """A start that waits for somebody else's lock outlasts one, in each of its sessions."""
    has(items, setting)
    set_for_all(items, **{setting: SHORT})
    hub.on("items", "inserted")(recorder)
    failed: list[BaseException] = []

    def start() -> None:
        try:
            hub.start(items.dsn, ["items"], delivery=delivery, **options(delivery))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=start)
    with held(items, key):
        thread.start()
        until_waited_for(items, key)
        until_it_strikes(items.dsn, key)
    thread.join(DEADLINE)
    assert failed == []
    items("INSERT INTO items DEFAULT VALUES")
    recorder.wait(1)
    assert hub.status().reconnects == 0


def test_other_isolation(
    hub: pgsignals.Hub, delivery: Delivery, items: Database, recorder: Recorder
) -> None:
    """Ordinary connections read what is committed, whatever is the default of others."""
    set_for_all(items, default_transaction_isolation="serializable")
    hub.on("items", "inserted")(recorder)
    hub.start(items.dsn, ["items"], delivery=delivery, **options(delivery))
    items("INSERT INTO items DEFAULT VALUES")
    recorder.wait(1)
    with closing(ordinary(items.dsn)) as connection, connection.cursor() as cursor:
        cursor.execute("SHOW transaction_isolation")
        assert cursor.fetchall() == [("read committed",)]
        cursor.execute("BEGIN")
        cursor.execute("SHOW transaction_isolation")
        assert cursor.fetchall() == [("read committed",)]
        cursor.execute("COMMIT")


def test_a_process_that_hangs_in_a_transaction(
    items: Database, connect: Callable[[str], Database]
) -> None:
    """What an ordinary connection sets is over with each transaction; there, the server ends it."""
    set_for_all(items, idle_in_transaction_session_timeout="1ms", statement_timeout="1min")
    stranger = connect(items.dsn)
    with closing(ordinary(items.dsn)) as connection, connection.cursor() as cursor:
        cursor.execute("BEGIN")
        stranger("BEGIN")
        assert select.select([stranger.connection], [], [], DEADLINE)[0]
        cursor.execute("SHOW idle_in_transaction_session_timeout")
        assert cursor.fetchall() == [("1min",)]
        cursor.execute("COMMIT")
        cursor.execute("BEGIN; COMMIT; SHOW statement_timeout")
        assert cursor.fetchall() == [("1min",)]


def test_where_an_error_is(items: Database) -> None:
    """Positions in a condition are those of the user's text."""
    hub = pgsignals.Hub()
    watcher = pgsignals.watch("items", "inserted", when="NEW.id > 1 AND oops")
    with pytest.raises(pgsignals.WatcherError, match=r"at character 16 \('oops'\)"):
        hub.start(items.dsn, [watcher])
