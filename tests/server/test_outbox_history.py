"""What a consumer makes of a database whose history is not the one it knew."""

from __future__ import annotations

import subprocess
from contextlib import closing, suppress
from itertools import count
from pathlib import Path

import psycopg2
import pytest
from psycopg2 import sql

import pgsignals
from pgsignals.testing import Server
from tests.conftest import DEADLINE, Database, Recorder
from tests.waiting import eventually


def test_a_promotion_is_noticed_at_once(hub: pgsignals.Hub, recorder: Recorder) -> None:
    """Also while the checkpoint after it, which takes minutes, is under way."""
    with Server(settings={"shared_buffers": "64MB", "checkpoint_timeout": "1h"}) as server:
        dsn = server.create_database()
        connection = psycopg2.connect(dsn)
        with connection, connection.cursor() as cursor:
            cursor.execute("CREATE TABLE items (id bigint PRIMARY KEY)")
        hub.start(dsn, ["items"], delivery="outbox", name="mailer")
        assert hub.stop()
        # What it replays it has to write at that checkpoint.
        with connection, connection.cursor() as cursor:
            cursor.execute("CREATE TABLE ballast AS SELECT generate_series(1, 200000) AS n")
        connection.close()
        server.stop("immediate")
        assert server._home is not None
        (server._home / "data" / "standby.signal").touch()
        server.start()
        connection = psycopg2.connect(dsn)
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_promote(true, %s)", (int(DEADLINE),))
            assert cursor.fetchall() == [(True,)]
        connection.close()
        hub.on("items", "inserted")(lambda event: None)
        hub.on_gap(recorder)
        hub.start(dsn, ["items"], delivery="outbox", name="mailer")
        [gap] = recorder.wait(1)
        assert gap.reason == "restored"
        assert "promoted" in gap.detail
        assert hub.stop()


def test_a_restored_database_is_noticed(
    server: Server, dsn: str, hub: pgsignals.Hub, recorder: Recorder
) -> None:
    """A copy in the same cluster has the cursor, but not what came after it was made."""
    with closing(psycopg2.connect(dsn)) as connection, connection, connection.cursor() as cursor:
        cursor.execute("CREATE TABLE items (id bigint PRIMARY KEY)")
    hub.start(dsn, ["items"], delivery="outbox", name="mailer")
    assert hub.stop()
    address, _, name = dsn.rpartition("/")
    with closing(psycopg2.connect(server.dsn())) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(
                sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(
                    sql.Identifier(f"{name}_restored"), sql.Identifier(name)
                )
            )
    hub.on_gap(recorder)
    hub.start(f"{address}/{name}_restored", ["items"], delivery="outbox", name="mailer")
    [gap] = recorder.wait(1)
    assert gap.reason == "restored"


@pytest.mark.parametrize("meanwhile", ["it runs", "it is down", "it connects"])
def test_a_restore_over_the_database_is_noticed(
    server: Server,
    dsn: str,
    db: Database,
    hub: pgsignals.Hub,
    recorder: Recorder,
    tmp_path: Path,
    meanwhile: str,
) -> None:
    """``pg_restore --clean`` takes back what was delivered: a Gap says so, and events go on."""
    db("CREATE TABLE items (id bigint PRIMARY KEY)")
    gaps = Recorder()
    hub.on_gap(gaps)
    hub.on("items", "inserted")(recorder)
    hub.start(dsn, ["items"], delivery="outbox", name="mailer", lease=1.0)
    db("INSERT INTO items VALUES (1)")
    recorder.wait(1)
    dump = tmp_path / "dump"
    programs = server.installation.bindir
    subprocess.run([programs / "pg_dump", "-Fc", f"--file={dump}", dsn], check=True)
    db("INSERT INTO items VALUES (2)")
    recorder.wait(2)
    if meanwhile == "it is down":
        assert hub.stop()
    if meanwhile == "it connects":
        script = tmp_path / "script"
        subprocess.run(
            [programs / "pg_restore", "--clean", "--if-exists", f"--file={script}", dump],
            check=True,
        )
        _restore_while_it_connects(dsn, programs / "psql", script, db)
    else:
        # In one transaction, so that no consumer finds half of it. Its locks, of all there is, may
        # be such as somebody who is at work waits for the other way round: then it is to be
        # repeated.
        restore: list[str | Path] = [
            programs / "pg_restore",
            "--clean",
            "--if-exists",
            "-1",
            f"--dbname={dsn}",
            dump,
        ]
        done = eventually(
            lambda: subprocess.run(restore, stderr=subprocess.PIPE, text=True),
            lambda done: "deadlock detected" not in done.stderr,
        )
        assert not done.returncode, done.stderr
    assert db("SELECT id FROM items") == [(1,)]
    if meanwhile == "it is down":
        hub.start(dsn, ["items"], delivery="outbox", name="mailer", lease=1.0)
    assert "restored" in [
        gap.reason for gap in gaps.wait_until(lambda gap: gap.reason == "restored")
    ]
    # Who connects while it is restored finds the former table. What is written until it has looked
    # once more is lost, and a Gap says so.
    ids, written = count(3), {}

    def heard() -> list[int]:
        [(id_, at)] = db(f"INSERT INTO items VALUES ({next(ids)}) RETURNING id, clock_timestamp()")
        written[id_] = at
        return [event.id for event in recorder.items if event.id in written]

    first = eventually(heard, bool)[0]
    if meanwhile == "it is down":
        assert first == 3
    recorder.wait_until(lambda event: event.id == max(written))
    lost = {at for id_, at in written.items() if id_ < first}
    assert not [at for at in lost if not any(gap.since <= at <= gap.until for gap in gaps.items)]


def _restore_while_it_connects(dsn: str, psql: Path, script: Path, db: Database) -> None:
    """Commit a restore once a session that was made while it was under way waits for its locks."""

    def restored() -> bool:
        with subprocess.Popen(
            [psql, "-X", "-v", "ON_ERROR_STOP=1", dsn],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdin is not None
            assert process.stderr is not None
            with suppress(BrokenPipeError):
                process.stdin.write(f"BEGIN;\n{script.read_text()}\n{_END_OTHERS}")
                process.stdin.flush()
                eventually(lambda: process.poll() is not None or bool(db(_WAITS)), bool)
                process.stdin.write("COMMIT;\n")
                process.stdin.close()
            mistakes = process.stderr.read()
        # Its locks may be such as somebody at work waits for the other way round.
        assert not process.returncode or "deadlock detected" in mistakes, mistakes
        return not process.returncode

    eventually(restored, bool)


_END_OTHERS = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND application_name LIKE 'pgsignals%';
SELECT 'restored' AS all_but_committed;
"""
# A session of ours waits for a lock of one that has done all but commit.
_WAITS = """
SELECT waiter.pid FROM pg_stat_activity waiter, pg_stat_activity holder
WHERE waiter.datname = current_database() AND waiter.application_name LIKE 'pgsignals%'
  AND holder.pid = ANY (pg_blocking_pids(waiter.pid)) AND holder.query LIKE '%all_but_committed%'
"""


def test_a_claim_outlives_a_crash_of_the_server(hub: pgsignals.Hub) -> None:
    """Unlike an acknowledgement: or what its holder delivered would not be called redelivered."""
    # The log is written when something asks for it, not by itself.
    with Server(settings={"wal_writer_delay": "10s"}) as server:
        dsn = server.create_database()
        with closing(psycopg2.connect(dsn)) as connection, connection, connection.cursor() as each:
            each.execute("CREATE TABLE items (id bigint PRIMARY KEY)")
        hub.start(dsn, ["items"], delivery="outbox", name="mailer")
        assert hub.stop()
        with closing(psycopg2.connect(dsn)) as connection, connection, connection.cursor() as each:
            each.execute("CREATE TABLE and_so_the_log_is_written ()")
        hub.start(dsn, ["items"], delivery="outbox", name="mailer")
        server.stop("immediate")
        hub.stop()
        server.start()
        with closing(psycopg2.connect(dsn)) as connection, connection.cursor() as each:
            each.execute("SELECT clean FROM pgsignals.consumers")
            assert each.fetchall() == [(False,)]
