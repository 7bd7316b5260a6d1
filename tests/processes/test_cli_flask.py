"""``flask pgsignals``: the commands, for the database and the watchers of an application."""

from __future__ import annotations

import json
import signal

import pytest
from click.testing import CliRunner
from flask import Flask

from pgsignals import Hub
from pgsignals.cli.flask import group
from pgsignals.contrib.flask import PgSignals
from tests.commands import Program, Result
from tests.conftest import DEADLINE, Database
from tests.paths import ROOT

FLASK = ("-m", "flask", "--app", "tests.flask_shop", "pgsignals")


@pytest.fixture(autouse=True)
def items(db: Database) -> None:
    """The table of the application, and one that it does not watch."""
    db("CREATE TABLE items (id bigserial PRIMARY KEY, tenant integer NOT NULL DEFAULT 1)")
    db("CREATE TABLE other (id bigserial PRIMARY KEY)")


def run(dsn: str, *arguments: str) -> Result:
    """Run a command to its end."""
    return Program(*FLASK, *arguments, dsn=dsn, cwd=ROOT).end()


def test_install_and_status(dsn: str) -> None:
    """What the application watches is installed, and checked, without being named."""
    missing = run(dsn, "status", "--json")
    assert missing.code == 1
    installed = run(dsn, "install")
    assert installed.out[-1] == "2 triggers installed, 0 already there."
    status = run(dsn, "status", "--json")
    assert (status.code, json.loads(status.out[0])["ok"]) == (0, True)
    assert run(dsn, "doctor").code == 0
    assert "CREATE" not in "\n".join(run(dsn, "sql").out)
    assert run(dsn, "uninstall").out[-1] == "2 triggers removed from namespace 'default'."


@pytest.mark.parametrize(
    ("watched", "listed", "table"),
    [([], "Item (inserted, updated)", "items"), (["other:inserted"], "other (inserted)", "other")],
)
def test_watch(dsn: str, db: Database, watched: list[str], listed: str, table: str) -> None:
    """The application's watchers, or what is named in their place."""
    program = Program(*FLASK, "watch", *watched, "--count=1", "--json", dsn=dsn, cwd=ROOT)
    assert program.err() == f"Watching {listed}. Press Ctrl-C to stop."
    db("INSERT INTO items DEFAULT VALUES")
    db("INSERT INTO other DEFAULT VALUES")
    assert json.loads(program.out())["table"] == table
    assert program.end().code == 0


def test_run(dsn: str, db: Database) -> None:
    """It calls the receivers in the application's context until SIGTERM, and ends well."""
    program = Program(*FLASK, "run", dsn=dsn, cwd=ROOT)
    process = program.process.pid
    assert program.out() == f"{process} connected "
    assert program.err() == "Listening for 'shop'. Press Ctrl-C to stop."
    db("INSERT INTO items (tenant) VALUES (7)")
    assert program.out() == f"{process} shop item 1 7 "
    program.process.send_signal(signal.SIGTERM)
    assert program.process.wait(DEADLINE) == 0
    program.end()


def test_the_outbox(dsn: str) -> None:
    """The commands go by the application's delivery, and administer its outbox."""
    app = Flask("shop")
    app.config |= {"PGSIGNALS_DSN": dsn, "PGSIGNALS_DELIVERY": "outbox", "PGSIGNALS_NAME": "mailer"}
    signals = PgSignals(app, watchers=["items"], hub=Hub())

    def invoke(*arguments: str) -> str:
        result = CliRunner().invoke(group, arguments, obj=_info(app))
        assert result.exit_code == 0, result.output
        return result.output

    assert "CREATE SCHEMA pgsignals" in invoke("sql")
    assert "3 triggers installed" in invoke("install")
    assert json.loads(invoke("status", "--json"))["ok"]
    app.config["PGSIGNALS_INSTALL"] = "check"
    signals.start(app)
    assert signals.stop(app)
    [consumer] = json.loads(invoke("consumers", "list", "--json"))["consumers"]
    assert consumer["name"] == "mailer"
    assert invoke("dead-letters", "list") == "There are no dead letters.\n"
    assert "Forgot the consumer 'mailer'" in invoke("consumers", "drop", "mailer")
    help_ = CliRunner().invoke(group, ["watch", "--help"], obj=_info(app)).output
    assert "flask pgsignals watch orders:inserted" in help_
    assert "--dsn" not in help_


def test_the_write_ahead_log(dsn: str, db: Database) -> None:
    """The commands go by the application's delivery and capture."""
    app = Flask("shop")
    app.config |= {"PGSIGNALS_DSN": dsn, "PGSIGNALS_DELIVERY": "wal", "PGSIGNALS_NAME": "mailer"}
    signals = PgSignals(app, watchers=["items"], hub=Hub())

    def invoke(*arguments: str) -> str:
        result = CliRunner().invoke(group, arguments, obj=_info(app))
        assert result.exit_code == 0, result.output
        return result.output

    assert "ALTER PUBLICATION" in invoke("sql")
    invoke("install")
    states = json.loads(invoke("status", "--json"))["watchers"]
    assert {each["served"] for each in states} == {"rows"}
    app.config["PGSIGNALS_INSTALL"] = "check"
    signals.start(app)
    assert signals.stop(app)
    assert "the write-ahead log can be read" in invoke("doctor")
    assert "reads the write-ahead log by the replication slot" in invoke("consumers", "list")
    invoke("consumers", "drop", "mailer")
    assert db("SELECT FROM pg_replication_slots WHERE database = current_database()") == []
    app.config["PGSIGNALS_CAPTURE"] = "messages"
    invoke("install")
    states = json.loads(invoke("status", "--json", "items"))["watchers"]
    assert {each["served"] for each in states if each["lacking"]} == {"messages"}


def test_errors_are_messages() -> None:
    """What is wrong is told without a traceback and without the password."""
    app = Flask("shop")
    runner = CliRunner()
    without = runner.invoke(group, ["status"], obj=_info(app))
    assert (without.exit_code, without.output) == (
        1,
        "Error: The application 'shop' has no PgSignals: call init_app(app).\n",
    )
    app.config["PGSIGNALS_DSN"] = "postgresql://u:secret@127.0.0.1:1/d"
    PgSignals(app, watchers=["items"])
    away = runner.invoke(group, ["status"], obj=_info(app))
    assert away.exit_code == 1
    assert "Cannot connect" in away.output
    assert "secret" not in away.output


def _info(app: Flask) -> object:
    from flask.cli import ScriptInfo

    return ScriptInfo(create_app=lambda: app)
