"""What a consumer makes of a database whose history is not the one it knew."""

from __future__ import annotations

import subprocess
from contextlib import closing
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


@pytest.mark.parametrize("meanwhile", ["it runs", "it is down"])
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
    # In one transaction, so that no consumer finds half of it. Its locks, of all there is, may be
    # such as somebody who is at work waits for the other way round: then it is to be repeated.
    restore = [programs / "pg_restore", "--clean", "--if-exists", "-1", f"--dbname={dsn}", dump]
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
    db("INSERT INTO items VALUES (3)")
    recorder.wait_until(lambda event: event.id == 3)


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
