"""The Django application, in a real project with two applications, on a real PostgreSQL."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from psycopg2.extensions import parse_dsn

from pgsignals.testing import Server
from tests.commands import Program, Result
from tests.conftest import DEADLINE, Database
from tests.django_project import PROJECT, Project
from tests.waiting import eventually

BOTH_DRIVERS = pytest.mark.parametrize("project", ["psycopg", "psycopg2"], indirect=True)


@pytest.fixture
def project(tmp_path: Path, dsn: str, request: pytest.FixtureRequest) -> Iterator[Project]:
    """The example, with one of the drivers that Django has."""
    made = Project(tmp_path / "project", dsn, getattr(request, "param", "psycopg"))
    yield made
    made.close()


@pytest.fixture
def migrated(project: Project) -> Project:
    """The example, its tables and its triggers."""
    project.run("migrate", "--verbosity", "0")
    return project


def triggers(db: Database) -> list[str]:
    """The tables of our triggers, one name for each."""
    return [
        table
        for (table,) in db(
            "SELECT tgrelid::regclass::text FROM pg_trigger WHERE tgname LIKE 'pgsignals%'"
            " ORDER BY 1"
        )
    ]


def listeners(db: Database) -> set[int]:
    """The sessions that listen."""
    found = db(
        "SELECT DISTINCT pid FROM pg_locks WHERE locktype = 'advisory'"
        " AND mode = 'ShareLock' AND database ="
        " (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    return {pid for (pid,) in found}


def listening(db: Database) -> int:
    """How many sessions listen."""
    return len(listeners(db))


def reload(project: Project, db: Database) -> None:
    """Change what the receiver prints, and wait until another session listens."""
    before = listeners(db)
    project.write("shop/signals.py", 'print(f"order {event.id}:', 'print(f"now {event.id}:')

    def after() -> set[int]:
        now = listeners(db)
        if now & before:
            # Django's reloader takes for granted what it finds at its first look, a moment after
            # the listener has started.
            (project.path / "shop/signals.py").touch()
        return now

    eventually(after, lambda now: bool(now) and not now & before)


@BOTH_DRIVERS
def test_the_readme(project: Project, db: Database) -> None:
    """What the README shows is what happens; `zero` removes the triggers."""
    readme = (PROJECT / "README.md").read_text()
    commands = re.findall(r"^python manage.py (.*)$", readme, re.MULTILINE)
    assert commands == ["migrate", "pgsignals listen"]
    [printed] = re.findall(r"^The listener prints\n\n```\n(.*?)^```$", readme, re.M | re.DOTALL)
    project.run(*commands[0].split())
    listener = project.start(*commands[1].split())
    assert listener.err() == "Listening. Press Ctrl-C to stop."
    for statement in re.findall(r'^psql -c "(.*)"$', readme, re.MULTILINE):
        db(statement)
    assert [listener.out() for _ in printed.splitlines()] == printed.splitlines()
    listener.process.send_signal(signal.SIGTERM)
    assert listener.end() == Result(0, [], [])
    project.run("migrate", "shop", "zero")
    assert triggers(db) == []
    assert db("SELECT proname FROM pg_proc WHERE proname LIKE 'pgsignals%'") == []


def test_records_load_with_what_belongs_to_them(migrated: Project, db: Database) -> None:
    """A receiver of one application loads a record and its related ones by Django's ORM."""
    listener = migrated.fork("pgsignals", "listen")
    listener.err()
    db(
        "WITH made AS (INSERT INTO shop_order (customer) VALUES ('Ann') RETURNING id)"
        " INSERT INTO shop_line (order_id, text)"
        " SELECT id, text FROM made, unnest('{tea,cup}'::text[]) text"
    )
    assert listener.out() == "order 1 of Ann: tea, cup"


@BOTH_DRIVERS
def test_migrations_run_the_sql_that_sqlmigrate_shows(migrated: Project, db: Database) -> None:
    """What status finds after migrate is whole; what sqlmigrate prints can be run by hand."""
    status = migrated.run("pgsignals", "status")
    assert [line.split()[0] for line in status.out[1:5]] == ["INSTALLED"] * 4
    migrated.run("migrate", "shop", "0001")
    assert triggers(db) == ["billing_payment"]
    assert migrated.end("pgsignals", "status").code == 1
    printed = "\n".join(migrated.run("sqlmigrate", "shop", "0002").out)
    assert printed.count("CREATE TRIGGER") == 3
    db(printed)
    assert migrated.run("pgsignals", "status").code == 0
    backwards = "\n".join(migrated.run("sqlmigrate", "--backwards", "shop", "0002").out)
    assert backwards.count("DROP FUNCTION") == 3
    db(backwards)
    assert triggers(db) == ["billing_payment"]


@BOTH_DRIVERS
def test_sqlmigrate_before_the_tables_are_there(project: Project, db: Database) -> None:
    """The SQL is shown for tables that earlier migrations have yet to create; nothing is left."""
    printed = "\n".join(project.run("sqlmigrate", "shop", "0002").out)
    assert printed.count("CREATE TRIGGER") == 3
    assert 'ON "public"."shop_order"' in printed
    both = "\n".join(project.run("sqlmigrate", "billing", "0001").out)
    assert both.index("CREATE TABLE") < both.index("CREATE TRIGGER")
    assert db("SELECT relname FROM pg_class WHERE relname ~ '^(shop|billing)_'") == []
    project.run("migrate", "shop", "0001", "--verbosity", "0")
    db(printed)
    assert triggers(db) == ["shop_order"] * 3


def test_a_migration_that_fails_leaves_nothing(project: Project, db: Database) -> None:
    """Tables and triggers of one migration come together or not at all."""
    project.write("billing/migrations/0001_initial.py", '["order_id", "amount"]', '["amont"]')
    result = project.end("migrate", "billing")
    assert result.code == 1
    assert "did you mean 'amount'" in "\n".join(result.err)
    assert db("SELECT 1 FROM pg_class WHERE relname = 'billing_payment'") == []


def test_a_table_that_is_locked(
    migrated: Project, db: Database, connect: Callable[..., Database], dsn: str
) -> None:
    """A migration gives up a locked table soon, so that no writer queues behind it."""
    migrated.run("migrate", "shop", "0001")
    other = connect(dsn)
    other.connection.autocommit = False
    other("INSERT INTO shop_order (customer) VALUES ('Bob')")
    result = migrated.end("migrate", "shop")
    assert result.code == 1
    error = result.err[-1]
    assert "InstallLockError: The table public.shop_order is locked" in error
    pid = other.connection.get_backend_pid()
    assert f"held by pid {pid} (" in error
    assert "run the migration again" in error
    other.connection.rollback()
    migrated.run("migrate", "shop")
    assert triggers(db) == ["billing_payment", *["shop_order"] * 3]


def test_a_listener_is_never_made_deaf(migrated: Project, db: Database) -> None:
    """Backwards, a trigger that somebody listens to stays, and the rest goes."""
    listener = migrated.fork("pgsignals", "listen")
    listener.err()
    migrated.run("migrate", "billing", "zero")
    migrated.run("migrate", "shop", "0001")
    assert triggers(db) == ["shop_order"] * 3
    db("INSERT INTO shop_order (customer) VALUES ('Ann')")
    assert listener.out() == "order 1 of Ann: nothing yet"


def test_nothing_starts_by_itself(migrated: Project, db: Database) -> None:
    """Neither import nor migrate, check or shell starts a Hub, though signals.py is imported."""
    program = (
        "import sys, pgsignals; assert 'shop.signals' in sys.modules;"
        "print(pgsignals.default_hub.running)"
    )
    assert migrated.run("shell", "--verbosity", "0", "-c", program).out == ["False"]
    for command in ("check", "migrate", "showmigrations"):
        assert not [line for line in migrated.run(command).err if "istening" in line]
    assert listening(db) == 0


def test_the_check_warns_of_drift(migrated: Project, db: Database) -> None:
    """check --database says what is missing, outdated or cannot be; without it nothing is asked."""
    check = ("check", "--database", "default")
    assert "no issues" in migrated.run(*check).out[0]
    db("ALTER TABLE billing_payment DISABLE TRIGGER ALL")
    warning = "\n".join(migrated.run(*check).err)
    assert "pgsignals.W001" in warning
    assert "inserted on public.billing_payment is outdated: the trigger is disabled" in warning
    assert "pgsignals.W001" not in "\n".join(migrated.run("check").err)
    migrated.write("project/settings.py", '{"INSTALL": "check"}', '{"INSTAL": "check"}')
    failed = migrated.end(*check)
    assert failed.code == 1
    assert "unknown key 'INSTAL' (did you mean 'INSTALL'?)" in "\n".join(failed.err)


def test_the_outbox(migrated: Project, db: Database) -> None:
    """The setting DELIVERY goes for migrations, the check, the commands and the listener."""
    check = ("check", "--database", "default")
    migrated.write(
        "project/settings.py",
        '{"INSTALL": "check"}',
        '{"INSTALL": "check", "DELIVERY": "outbox", "NAME": "shop"}',
    )
    warning = "\n".join(migrated.run(*check).err)
    assert warning.count("pgsignals.W001") == 5
    assert "The schema pgsignals, which durable delivery needs, is missing" in warning
    assert migrated.end("pgsignals", "status").code == 1
    migrated.write(
        "shop/migrations/0002_watchers.py",
        "InstallWatchers(",
        "InstallWatchers(delivery=None, watchers=",
    )
    migrated.run("migrate", "shop", "0001")
    migrated.run("migrate", "billing", "zero")
    assert triggers(db) == []
    migrated.write("project/settings.py", '"NAME": "shop"', '"NAME": "shop", "NAMESPACE": "shop"')
    assert "CREATE SCHEMA pgsignals" in "\n".join(migrated.run("sqlmigrate", "shop", "0002").out)
    assert db("SELECT 1 FROM pg_namespace WHERE nspname = 'pgsignals'") == []
    migrated.run("migrate")
    assert "no issues" in migrated.run(*check).out[0]
    assert migrated.run("pgsignals", "status").out[1].startswith("INSTALLED")
    assert migrated.run("pgsignals", "sql").out == [
        "-- Nothing to do: the database is as it should be."
    ]

    listener = migrated.fork("pgsignals", "listen")
    listener.err()
    db("INSERT INTO shop_order (customer) VALUES ('Ann')")
    assert listener.out() == "order 1 of Ann: nothing yet"
    listener.process.send_signal(signal.SIGTERM)
    assert listener.end().code == 0
    db("INSERT INTO shop_order (customer) VALUES ('Bob')")
    assert '"name":"shop"' in migrated.run("pgsignals", "consumers", "list", "--json").out[0]
    # The consumer is down, and its triggers stay; once it is given up they go, the schema not.
    migrated.run("migrate", "shop", "0001")
    assert triggers(db).count("shop_order") == 3
    migrated.run("migrate", "shop")
    listener = migrated.fork("pgsignals", "listen")
    assert listener.out() == "order 2 of Bob: nothing yet"
    listener.process.send_signal(signal.SIGTERM)
    listener.end()
    migrated.run("pgsignals", "consumers", "drop", "shop")
    migrated.run("migrate", "shop", "0001")
    assert triggers(db) == ["billing_payment"]
    assert db("SELECT 1 FROM pg_namespace WHERE nspname = 'pgsignals'") == [(1,)]


def test_the_write_ahead_log(migrated: Project, db: Database) -> None:
    """With DELIVERY "wal" migrations publish tables, and the listener reads their rows."""
    check = ("check", "--database", "default")
    migrated.write(
        "project/settings.py",
        '{"INSTALL": "check"}',
        '{"INSTALL": "check", "DELIVERY": "wal", "NAME": "shop"}',
    )
    assert migrated.end("pgsignals", "status").code == 1
    migrated.run("migrate", "shop", "0001")
    migrated.run("migrate", "billing", "zero")
    sql = "\n".join(migrated.run("sqlmigrate", "shop", "0002").out)
    assert "ALTER PUBLICATION pgsignals ADD TABLE ONLY" in sql
    migrated.run("migrate")
    assert "no issues" in migrated.run(*check).out[0]
    assert "rows" in "\n".join(migrated.run("pgsignals", "status").out)
    published = "SELECT DISTINCT prrelid::regclass::text FROM pg_publication_rel"
    assert ("shop_order",) in db(published)
    listener = migrated.fork("pgsignals", "listen")
    listener.err()
    db("INSERT INTO shop_order (customer) VALUES ('Ann')")
    assert listener.out() == "order 1 of Ann: nothing yet"
    listener.process.send_signal(signal.SIGTERM)
    assert listener.end().code == 0
    # The consumer is down, and its tables stay published; once it is given up they are not.
    migrated.run("migrate", "shop", "0001")
    assert ("shop_order",) in db(published)
    migrated.run("migrate", "shop")
    migrated.run("pgsignals", "consumers", "drop", "shop")
    migrated.run("migrate", "shop", "0001")
    assert ("shop_order",) not in db(published)
    migrated.run("migrate", "billing", "zero")
    migrated.write("project/settings.py", '"NAME": "shop"', '"CAPTURE": "messages"')
    migrated.run("migrate")
    assert ("shop_order",) not in db(published)
    assert triggers(db).count("shop_order") > 0
    assert "no issues" in migrated.run(*check).out[0]


def test_the_check_finds_a_field_that_there_is_not(project: Project) -> None:
    """A misspelt column is a mistake before the tables are there, and after."""
    project.write("shop/signals.py", 'columns=["status"]', 'columns=["statuss"]')
    for command in ("migrate", "check"):
        failed = project.end(command, "--database", "default")
        assert failed.code == 1
        error = "\n".join(failed.err)
        assert "'statuss', which is no field of Order (did you mean 'status'?)" in error
        assert "pgsignals.E001" in error
        project.run("migrate", "--skip-checks")


def test_the_check_leaves_tables_to_the_migrations(project: Project) -> None:
    """Before the first migrate nothing is warned of; a database that is away is a warning."""
    assert project.run("migrate").err == []
    project.write(
        "project/settings.py", '"CHECK"' if False else 'os.environ.get("PGPORT", "")', '"1"'
    )
    result = project.end("check", "--database", "default")
    assert "pgsignals.W002" in "\n".join(result.err)


def test_install_and_other_commands(migrated: Project, db: Database) -> None:
    """install, sql, status and uninstall work on the project's watchers and database."""
    migrated.run("migrate", "shop", "0001")
    assert "3 triggers installed, 1 already there." in migrated.run("pgsignals", "install").out
    assert "Nothing to do" in migrated.run("pgsignals", "sql").out[0]
    assert '"ok":true' in migrated.run("pgsignals", "status", "--json").out[0]
    migrated.run("pgsignals", "uninstall")
    assert triggers(db) == []
    failed = migrated.end("pgsignals", "listen")
    assert failed.code == 1
    assert "pgsignals install" in "\n".join(failed.err)


@BOTH_DRIVERS
def test_a_dead_connection_heals(migrated: Project, db: Database) -> None:
    """A receiver whose Django connection was cut works at the next event; none is left open."""
    listener = migrated.fork("pgsignals", "listen")
    listener.err()
    pay = "INSERT INTO billing_payment (order_id, amount) VALUES (%s, 1)"
    for number in (1, 2):
        db("INSERT INTO shop_order (customer) VALUES ('Ann')")
        assert listener.out() == f"order {number} of Ann: nothing yet"
        db(pay, [number])
        assert listener.out() == f"payment {number}: 1.00"
        assert listener.out() == f"order {number}: new -> paid"
        # Everything but the listening itself, which has its own ways of healing.
        db(
            "SELECT pg_terminate_backend(pid, 20000) FROM pg_stat_activity"
            " WHERE pid <> pg_backend_pid()"
            " AND datname = current_database() AND application_name <> 'pgsignals'"
        )


@BOTH_DRIVERS
@pytest.mark.parametrize("age", ["0", "None"])
def test_connections_do_not_leak(migrated: Project, db: Database, age: str) -> None:
    """Django's connection is closed after each event, or kept and healed with CONN_MAX_AGE."""
    migrated.write("project/settings.py", '"NAME":', f'"CONN_MAX_AGE": {age}, "NAME":')
    listener = migrated.fork("pgsignals", "listen")
    listener.err()
    others = (
        "SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
        " AND datname = current_database() AND application_name <> 'pgsignals'"
    )
    expected = 0 if age == "0" else 1
    for number in (1, 2, 3):
        db("INSERT INTO shop_order (customer) VALUES ('Ann')")
        assert listener.out() == f"order {number} of Ann: nothing yet"
        assert eventually(lambda: len(db(others)), lambda count: count == expected) == expected
        if age == "None":
            db(f"SELECT pg_terminate_backend(pid, 20000) FROM ({others}) AS cut")


def free_port() -> int:
    """A port of this machine that nobody uses."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def test_runserver_listens_once(migrated: Project, db: Database) -> None:
    """Under the reloader one process listens, the one that serves, also after a change."""
    port = free_port()
    server = migrated.start("runserver", f"127.0.0.1:{port}", LISTEN="1", PYTHONUNBUFFERED="1")
    try:
        db("INSERT INTO shop_order (customer) VALUES ('Ann')")
        url = f"http://127.0.0.1:{port}/"

        def answer() -> str:
            try:
                with urllib.request.urlopen(url, timeout=DEADLINE) as response:
                    return str(response.read().decode())
            except OSError:
                return ""

        assert eventually(answer, bool) == "1 Ann new"
        assert listening(db) == 1
        reload(migrated, db)
        assert eventually(lambda: listening(db), lambda count: count == 1) == 1
        db("UPDATE shop_order SET status = 'sent'")
        while not (line := server.out()).startswith("now 1"):
            pass
        # The server prints too, and may do so between a line and its end.
        assert line.startswith("now 1: new -> sent")
    finally:
        end_with_children(server)


def test_listen_reloads(migrated: Project, db: Database) -> None:
    """listen --reload starts again with the new code."""
    listener = migrated.start("pgsignals", "listen", "--reload")
    try:
        while listener.err() != "Listening. Press Ctrl-C to stop.":
            pass
        reload(migrated, db)
        while listener.err() != "Listening. Press Ctrl-C to stop.":
            pass
        db("INSERT INTO shop_order (customer) VALUES ('Ann')")
        db("UPDATE shop_order SET status = 'sent'")
        assert listener.out() == "order 1 of Ann: nothing yet"
        assert listener.out() == "now 1: new -> sent"
    finally:
        end_with_children(listener)


def end_with_children(program: Program) -> None:
    """Press Ctrl-C for a reloader and the process that it runs."""
    parent = program.process.pid
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    for pid in (*map(int, children), parent):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGINT)
    program.process.wait(DEADLINE)


def test_squashing_writes_watchers(migrated: Project) -> None:
    """squashmigrations can write the operation, and what it writes installs the same."""
    migrated.run("squashmigrations", "shop", "0001", "0002", "--noinput", "--verbosity", "0")
    [squashed] = (migrated.path / "shop/migrations").glob("*squashed*")
    text = squashed.read_text()
    assert "pgsignals.watch('shop.Order', 'updated', columns=['status'])" in text
    migrated.run("migrate", "--verbosity", "0")
    assert migrated.run("pgsignals", "status").code == 0


def test_a_database_that_is_not_postgresql(project: Project) -> None:
    """The error says which setting to change."""
    project.write("project/settings.py", "backends.postgresql", "backends.sqlite3")
    result = project.end("pgsignals", "listen")
    assert result.code == 1
    assert "is of sqlite: name one of PostgreSQL in PGSIGNALS['DATABASE']" in result.err[-1]


def test_django_is_named_when_it_is_missing() -> None:
    """Without Django the import says which extra to install."""
    program = "import sys; sys.modules['django'] = None; import pgsignals.contrib.django"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "pip install 'pgsignals[django]'" in done.stderr


def test_a_gap_comes_with_healthy_connections(migrated: Project, db: Database) -> None:
    """A gap receiver may use the ORM at once, though the database had cut all connections."""
    migrated.write("project/settings.py", '"NAME":', '"CONN_MAX_AGE": None, "NAME":')
    migrated.write(
        "shop/signals.py",
        '@pgsignals.on(Order, "updated")',
        "@pgsignals.on_gap\ndef resync(gap):\n"
        '    print(f"gap, {Order.objects.count()} orders", flush=True)\n\n\n'
        '@pgsignals.on(Order, "updated")',
    )
    listener = migrated.fork("pgsignals", "listen")
    listener.err()
    db("INSERT INTO shop_order (customer) VALUES ('Ann')")
    listener.out()
    db(
        "SELECT pg_terminate_backend(pid, 20000) FROM pg_stat_activity"
        " WHERE pid <> pg_backend_pid()"
        " AND datname = current_database()"
    )
    assert listener.out() == "gap, 1 orders"


ROUTER = """
class Reports:
    def db_for_write(self, model, **hints):
        return "reports" if model._meta.app_label == "billing" else None

    db_for_read = db_for_write

    def allow_migrate(self, db, app_label, **hints):
        return (db == "reports") == (app_label == "billing")
"""


def test_two_databases(
    project: Project, server: Server, db: Database, connect: Callable[[str], Database]
) -> None:
    """Each has its triggers, its check and its listener; neither watches the other's models."""
    dsn = server.create_database()
    reports = connect(dsn)
    (project.path / "project/routers.py").write_text(ROUTER)
    key = """("order", models.ForeignKey("shop.order", django.db.models.deletion.CASCADE))"""
    number = "models.BigIntegerField()"
    project.write("billing/migrations/0001_initial.py", key, f'("order_id", {number})')
    field = "order = models.ForeignKey(Order, models.CASCADE)"
    project.write("billing/models.py", field, f"order_id = {number}")
    with (project.path / "project/settings.py").open("a") as settings:
        settings.write(
            'DATABASE_ROUTERS = ["project.routers.Reports"]\n'
            f'reports = {{"NAME": {parse_dsn(dsn)["dbname"]!r}}}\n'
            'DATABASES["reports"] = DATABASES["default"] | reports\n'
        )
    for alias in ("default", "reports"):
        project.run("migrate", "--database", alias, "--verbosity", "0", "--skip-checks")
    assert triggers(db) == ["shop_order"] * 3
    assert triggers(reports) == ["billing_payment"]

    refused = project.end("pgsignals", "listen")
    assert refused.code == 1
    assert "Payment is of the database 'reports' of DATABASES" in "\n".join(refused.err)
    checked = project.end("check", "--database", "default")
    assert "pgsignals.E001" in "\n".join(checked.err)

    declared = "\n\nhub = pgsignals.Hub()\nPAYMENTS = ["
    project.write("billing/signals.py", "\n\nWATCHERS = [", declared)
    project.write("billing/signals.py", "@pgsignals.on", "@hub.on")
    with (project.path / "project/settings.py").open("a") as settings:
        settings.write(
            'PGSIGNALS["DATABASES"] = {"reports": {"WATCHERS": "billing.signals.PAYMENTS",'
            ' "HUB": "billing.signals.hub"}}\n'
        )
    for alias in ("default", "reports"):
        project.run("check", "--database", alias, "--fail-level", "INFO")
        assert project.run("pgsignals", "--database", alias, "status").code == 0
    mains = project.fork("pgsignals", "listen")
    others = project.fork("pgsignals", "--database", "reports", "listen")
    assert mains.err() == others.err() == "Listening. Press Ctrl-C to stop."
    db("INSERT INTO shop_order (customer) VALUES ('Ann')")
    assert mains.out() == "order 1 of Ann: nothing yet"
    reports("INSERT INTO billing_payment (order_id, amount) VALUES (1, 5)")
    assert others.out() == "payment 1: 5.00"
    assert mains.out() == "order 1: new -> paid"
    reports(
        "DROP FUNCTION "
        + reports("SELECT proname FROM pg_proc WHERE proname ~ '^pgsig'")[0][0]
        + " CASCADE"
    )
    checked = project.end("check", "--database", "reports")
    assert "pgsignals.W001" in "\n".join(checked.err)
