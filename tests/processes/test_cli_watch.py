"""``pgsignals watch``, run as a user runs it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg2.extensions
import pytest

import pgsignals
from pgsignals import Hub
from tests.conftest import DEADLINE, Database, Recorder
from tests.forked import Forked, run

Watch = Callable[..., Forked]


@pytest.fixture
def watching(dsn: str) -> Iterator[Watch]:
    """Starts ``pgsignals watch`` and returns when it is ready."""
    started: list[Forked] = []

    def start(*arguments: str, cwd: Path | None = None) -> Forked:
        command = Forked("-m", "pgsignals", "watch", *arguments, dsn=dsn, cwd=cwd)
        started.append(command)
        assert command.err().startswith("Watching ")
        return command

    yield start
    for command in started:
        if command.process.poll() is None:
            command.process.kill()
            command.process.wait()


@pytest.fixture(autouse=True)
def orders(db: Database) -> None:
    """A table of orders."""
    db("CREATE TABLE orders (id serial PRIMARY KEY, status text DEFAULT 'new', note text)")


def triggers(db: Database) -> int:
    """How many triggers of ours there are."""
    [(count,)] = db("SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'pgsignals%'")
    return int(count)


def without_time(line: str) -> str:
    """The line without the clock time that it must begin with."""
    found = re.fullmatch(r"\d\d:\d\d:\d\d\.\d{3}  (.*)", line)
    assert found, line
    return found[1]


def test_prints_one_line_for_each_event(watching: Watch, db: Database) -> None:
    """Table, operation, id and what an update changed, one event a line, nothing else on stdout."""
    command = watching("orders")
    db("INSERT INTO orders DEFAULT VALUES")
    db("UPDATE orders SET status = 'paid'")
    db("UPDATE orders SET status = NULL, id = 7")
    db("DELETE FROM orders")
    assert [without_time(command.out()) for _ in range(4)] == [
        "public.orders  inserted  id=1",
        "public.orders  updated   id=1  status: 'new' → 'paid'",
        "public.orders  updated   id=7  id: 1 → 7  status: 'paid' → NULL",
        "public.orders  deleted   id=7",
    ]
    result = command.interrupt()
    assert (result.code, result.out) == (0, [])
    assert result.err == ["Removed 3 triggers.", "4 events"]
    assert triggers(db) == 0


def test_says_what_it_watches(dsn: str) -> None:
    """The ready line names each table with its operations."""
    command = Forked(
        "-m", "pgsignals", "watch", "orders:updated,inserted", "public.orders:truncated", dsn=dsn
    )
    assert command.err() == (
        "Watching orders (inserted, updated), public.orders (truncated). Press Ctrl-C to stop."
    )
    assert command.interrupt().code == 0


def test_ends_at_sigterm_as_at_ctrl_c(watching: Watch, db: Database) -> None:
    """A service manager's SIGTERM ends it cleanly too."""
    command = watching("orders")
    command.process.send_signal(signal.SIGTERM)
    result = command.end()
    assert (result.code, result.err[-1]) == (0, "0 events")
    assert triggers(db) == 0


def test_nothing_comes_of_a_rollback(watching: Watch, db: Database) -> None:
    """What was rolled back is not printed."""
    command = watching("orders")
    db("BEGIN; INSERT INTO orders DEFAULT VALUES; ROLLBACK; INSERT INTO orders (id) VALUES (99)")
    assert without_time(command.out()) == "public.orders  inserted  id=99"


def test_json_is_one_object_a_line(watching: Watch, db: Database) -> None:
    """--json prints what to_dict has, whatever the values' types."""
    db(
        "CREATE TYPE point2 AS (x int, y int);"
        "CREATE TABLE odd (id uuid PRIMARY KEY, n numeric, f float8, b bytea, r int4range,"
        " p point2, d interval, j json, t timestamptz, a int[])"
    )
    command = watching("odd:inserted", "--all-columns", "--json")
    db(
        "INSERT INTO odd VALUES ('00000000-0000-0000-0000-000000000001', 1.50, 'NaN', '\\x00ff',"
        " '[1,5)', '(1,2)', '1 day', '[123456789012345678901234567890, \"\\ud800\"]',"
        " '2026-01-02 03:04:05+00', '{1,NULL}')"
    )
    db("INSERT INTO odd (id) VALUES ('00000000-0000-0000-0000-000000000002')")
    odd, empty = (json.loads(command.out()) for _ in range(2))
    assert (odd["op"], odd["table"], odd["id"]) == (
        "inserted",
        "odd",
        "00000000-0000-0000-0000-000000000001",
    )
    assert odd["values"]["n"] == "1.50"
    assert odd["values"]["j"] == [123456789012345678901234567890, "\ud800"]
    assert odd["values"]["a"] == [1, None]
    assert odd["values"]["p"] == "(1,2)"
    assert odd["values"]["t"].startswith("2026-01-02T03:04:05")
    assert set(empty["values"].values()) == {None}


def test_update_in_json_has_old_and_changed(watching: Watch, db: Database) -> None:
    """An update's JSON has the former values and which differ."""
    db("INSERT INTO orders DEFAULT VALUES")
    command = watching("orders:updated", "--json")
    db("UPDATE orders SET status = 'paid'")
    event = json.loads(command.out())
    assert event["values"] == {"status": "paid", "note": None}
    assert event["old"] == {"status": "new", "note": None}
    assert event["changed"] == ["status"]


def test_ends_after_count(watching: Watch, db: Database) -> None:
    """--count ends it after so many events, though more have come."""
    command = watching("orders", "--count", "2")
    db("INSERT INTO orders SELECT FROM generate_series(1, 5)")
    result = command.end()
    assert (result.code, len(result.out), result.err[-1]) == (0, 2, "2 events")
    assert triggers(db) == 0


@pytest.mark.parametrize(("arguments", "code"), [((), 0), (("--count", "1"), 124)])
def test_ends_after_timeout(dsn: str, db: Database, arguments: tuple[str, ...], code: int) -> None:
    """--timeout ends it; with --count that is a failure, which its exit code tells."""
    result = run("watch", "orders", "--timeout", "0.1", *arguments, dsn=dsn)
    assert (result.code, result.out, result.err[-1]) == (code, [], "0 events")
    assert triggers(db) == 0


def test_exec_runs_a_command_for_each_event(watching: Watch, db: Database, tmp_path: Path) -> None:
    """--exec gets the JSON on stdin and the essentials in variables."""
    command = watching(
        "orders:inserted",
        "--count=2",
        "--exec",
        'echo "$PGSIGNALS_OP $PGSIGNALS_TABLE $PGSIGNALS_ID" >> log; cat >> log',
        cwd=tmp_path,
    )
    db("INSERT INTO orders (id) VALUES (1), (2)")
    assert command.end().code == 0
    first, first_json, second, second_json = (tmp_path / "log").read_text().splitlines()
    assert (first, second) == ("inserted public.orders 1", "inserted public.orders 2")
    assert [json.loads(first_json)["id"], json.loads(second_json)["id"]] == [1, 2]


def test_exec_that_fails_is_told_and_goes_on(watching: Watch, db: Database) -> None:
    """A failing command is reported on stderr, what it prints does not mix with the events."""
    command = watching(
        "orders:inserted", "--count=2", "--exec", "echo hello; exit $((PGSIGNALS_ID + 2))"
    )
    db("INSERT INTO orders (id) VALUES (1), (2)")
    result = command.end()
    assert (result.code, len(result.out)) == (0, 2)
    assert result.err == [
        "hello",
        "--exec ended with exit code 3 for inserted on orders id=1",
        "hello",
        "--exec ended with exit code 4 for inserted on orders id=2",
        "Removed 1 trigger.",
        "2 events",
    ]


def test_columns_when_and_extra_narrow_and_show(watching: Watch, db: Database) -> None:
    """--columns and --when choose the updates, --extra shows values that did not change."""
    db("INSERT INTO orders (note) VALUES ('a'), ('b')")
    command = watching(
        "orders:updated", "--columns=status", "--extra=note", "--when", "NEW.status <> 'x'"
    )
    db("UPDATE orders SET note = note WHERE id = 1")
    db("UPDATE orders SET status = 'x' WHERE id = 1")
    db("UPDATE orders SET status = 'paid' WHERE id = 2")
    assert without_time(command.out()) == (
        "public.orders  updated   id=2  status: 'new' → 'paid'  note='b'"
    )


def test_all_columns_shows_every_value(watching: Watch, db: Database) -> None:
    """--all-columns shows values of inserted and deleted records too."""
    command = watching("orders", "--all-columns")
    db("INSERT INTO orders DEFAULT VALUES; DELETE FROM orders")
    assert without_time(command.out()).endswith("inserted  id=1  status='new'  note=NULL")
    assert without_time(command.out()).endswith("deleted   id=1  status='new'  note=NULL")


def test_ids_only_needs_no_values(watching: Watch, dsn: str, db: Database) -> None:
    """--ids-only uses the triggers that a plain install has made, and leaves them."""
    assert run("install", "orders", dsn=dsn).code == 0
    db("INSERT INTO orders DEFAULT VALUES")
    command = watching("orders", "--ids-only")
    db("UPDATE orders SET status = 'paid'")
    assert without_time(command.out()) == "public.orders  updated   id=1"
    assert command.interrupt().err == ["1 event"]
    assert triggers(db) == 3


def test_truncate_and_tables_without_a_key(watching: Watch, db: Database) -> None:
    """TRUNCATE is one line, and a record without a key has no id to show."""
    db("CREATE TABLE logs (line text)")
    command = watching("logs:inserted,truncated", "--extra=line")
    db("INSERT INTO logs VALUES ('x'); TRUNCATE logs")
    assert without_time(command.out()) == "public.logs  inserted  line='x'"
    assert without_time(command.out()) == "public.logs  truncated"


def test_no_value_moves_the_cursor(watching: Watch, db: Database) -> None:
    """Line ends and escape sequences in names and values are spelled out, long values cut."""
    db('CREATE TABLE "evil\x1b[2J\n" (id text PRIMARY KEY, note text)')
    command = watching('"evil\x1b[2J\n":inserted', "--extra=note")
    db('INSERT INTO "evil\x1b[2J\n" VALUES (%s, %s)', ("\x1b[H\r\n\u202e", "x" * 1000))
    line = without_time(command.out())
    assert line.startswith(r"public.evil\x1b[2J\n  inserted  id='\x1b[H\r\n\u202e'  note='xxx")
    assert line.endswith("x…")
    assert len(line) < 300


def test_leaves_triggers_that_were_there(watching: Watch, dsn: str, db: Database) -> None:
    """Only what it has installed itself goes at the end."""
    assert run("install", "orders:inserted", dsn=dsn).code == 0
    command = watching("orders:inserted,deleted")
    assert triggers(db) == 2
    assert command.interrupt().err == ["Removed 1 trigger.", "0 events"]
    assert run("status", "orders:inserted", dsn=dsn).code == 0


def test_leaves_triggers_that_others_have_come_to_use(
    watching: Watch, hub: Hub, dsn: str, db: Database, recorder: Recorder
) -> None:
    """An application that shares a trigger goes on hearing when the watch has ended."""
    command = watching("orders:inserted,deleted")
    hub.on("orders")(recorder)
    hub.start(dsn, [("orders", "inserted")], prune=False)
    result = command.interrupt()
    assert result.code == 0
    assert result.err[0] == "Removed 1 trigger."
    assert result.err[1].startswith("Left 1 trigger in place")
    db("INSERT INTO orders DEFAULT VALUES")
    assert recorder.wait(1)[0].op == "inserted"


def test_two_watches_leave_nothing(watching: Watch, db: Database) -> None:
    """Of two that share triggers, the one that installed them may end first: the rest is told."""
    first = watching("orders:inserted")
    second = watching("orders:inserted")
    assert first.interrupt().err[0].startswith("Left 1 trigger in place")
    db("INSERT INTO orders DEFAULT VALUES")
    assert without_time(second.out()) == "public.orders  inserted  id=1"


def test_keep_leaves_what_it_installed(watching: Watch, db: Database) -> None:
    """--keep leaves the triggers for the next time."""
    assert watching("orders", "--keep").interrupt().err == ["0 events"]
    assert triggers(db) == 3


def test_leaves_stale_triggers_of_others(watching: Watch, dsn: str, db: Database) -> None:
    """A watch never prunes what an application that is down has left."""
    db("CREATE TABLE users (id int PRIMARY KEY)")
    assert run("install", "users", dsn=dsn).code == 0
    watching("orders").interrupt()
    assert triggers(db) == 3


def test_a_closed_pipe_is_an_ordinary_end(dsn: str, db: Database) -> None:
    """With `| head -1` it ends as soon as nobody reads, removes its triggers, and complains not."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pgsignals", "watch", "orders:inserted"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PGSIGNALS_DSN": dsn},
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stderr.readline().startswith("Watching")
    db("INSERT INTO orders DEFAULT VALUES")
    assert "id=1" in process.stdout.readline()
    process.stdout.close()
    db("INSERT INTO orders DEFAULT VALUES")
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(DEADLINE) == 0
    assert err.splitlines() == ["Removed 1 trigger.", "1 event"]
    assert triggers(db) == 0


def test_a_full_disk_is_an_error(dsn: str, db: Database) -> None:
    """What cannot be printed ends it with one message, and its triggers go."""
    with open("/dev/full", "w") as full:
        process = subprocess.Popen(
            [sys.executable, "-m", "pgsignals", "watch", "orders:inserted"],
            stdout=full,
            stderr=subprocess.PIPE,
            env={**os.environ, "PGSIGNALS_DSN": dsn},
            text=True,
        )
    assert process.stderr is not None
    with process.stderr as err:
        assert err.readline().startswith("Watching")
        db("INSERT INTO orders DEFAULT VALUES")
        assert err.read().splitlines() == [
            "Removed 1 trigger.",
            "0 events",
            "Error: Cannot print to stdout: No space left on device.",
        ]
    assert process.wait(DEADLINE) == 1
    assert triggers(db) == 0


# ``pgsignals watch``, which gives up a locked table soon.
IMPATIENT = """
import functools
from pgsignals import Hub
from pgsignals.cli import main
Hub.start = functools.partialmethod(Hub.start, install_timeout=1.0)
main(prog_name="pgsignals")
"""


def test_a_failed_start_leaves_nothing(dsn: str, db: Database) -> None:
    """When one table stays locked, the triggers of the others go again."""
    db("CREATE TABLE zebras (id int PRIMARY KEY)")
    db("BEGIN; LOCK TABLE zebras IN ROW EXCLUSIVE MODE")
    result = Forked("-c", IMPATIENT, "watch", "orders", "zebras", dsn=dsn).end()
    db("ROLLBACK")
    assert result.code == 1
    assert result.err[0] == "Removed 3 triggers."
    assert result.err[1].startswith("Error: ")
    assert triggers(db) == 0


def test_a_lost_connection_is_told_and_survived(watching: Watch, db: Database) -> None:
    """The gap is announced on stderr, and events go on."""
    command = watching("orders:inserted")
    db(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    while "may be missing" not in command.err():
        pass
    db("INSERT INTO orders DEFAULT VALUES")
    assert without_time(command.out()) == "public.orders  inserted  id=1"
    result = command.interrupt()
    assert (result.code, result.out) == (0, [])
    assert triggers(db) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing",), "Error: There is no table 'nothing'"),
        (("orders:updated", "--columns=statu"), "Error: public.orders has no column 'statu'"),
        (("orders:inserted", "--when=NEW.x"), "Error: The watcher orders has a condition"),
        (("orders", "--dsn=postgresql://u:secret@127.0.0.1:1/x"), "Error: Cannot connect"),
        (("orders", "orders"), "Error: Two watchers without a label deliver"),
        (("--app=nowhere:x",), "Error: --app nowhere:x: ModuleNotFoundError"),
    ],
)
def test_an_error_is_a_message(dsn: str, arguments: tuple[str, ...], message: str) -> None:
    """What cannot be is told without a traceback or a password, with exit code 1 or 2."""
    result = run("watch", *arguments, dsn=dsn)
    assert (result.code, result.out) == (2 if "--app" in message else 1, [])
    text = "\n".join(result.err)
    assert text.startswith(message)
    assert "Traceback" not in text
    assert "secret" not in text


APP = """
import pgsignals

WATCHERS = [pgsignals.watch("orders", "updated", extra=["note"], label="order_changed")]

def create():
    return [("orders", "deleted")]

class Settings:
    WATCHERS = ["orders"]

broken = 7

def failing():
    raise RuntimeError("no settings")
"""


@pytest.mark.parametrize(
    ("app", "ready"),
    [
        ("shop:WATCHERS", "'order_changed' on orders (updated)"),
        ("shop", "'order_changed' on orders (updated)"),
        ("shop:create", "orders (deleted)"),
        ("shop:Settings", "orders (inserted, updated, deleted)"),
        ("shop:Settings.WATCHERS", "orders (inserted, updated, deleted)"),
    ],
)
def test_app_gives_watchers(dsn: str, tmp_path: Path, app: str, ready: str) -> None:
    """--app takes a list, a function, or something with WATCHERS, from the current directory."""
    (tmp_path / "shop.py").write_text(APP)
    command = Forked("-m", "pgsignals", "watch", "--app", app, dsn=dsn, cwd=tmp_path)
    assert command.err() == f"Watching {ready}. Press Ctrl-C to stop."
    assert command.interrupt().code == 0


def test_app_shows_what_its_watchers_ask_for(watching: Watch, db: Database, tmp_path: Path) -> None:
    """Events of a labelled watcher come with the label and the extra columns."""
    (tmp_path / "shop.py").write_text(APP)
    command = watching("--app", "shop", cwd=tmp_path)
    db("INSERT INTO orders (note) VALUES ('n'); UPDATE orders SET status = 'paid'")
    assert without_time(command.out()) == "public.orders  updated   [order_changed]  id=1  note='n'"


@pytest.mark.parametrize(
    ("app", "message"),
    [
        ("shop:broken", "gives 7, not a list of watchers"),
        ("shop:missing", "AttributeError"),
        ("shop:failing", "RuntimeError: no settings"),
    ],
)
def test_app_that_gives_none_is_an_error(dsn: str, tmp_path: Path, app: str, message: str) -> None:
    """What --app names and is not watchers is told in one line."""
    (tmp_path / "shop.py").write_text(APP)
    result = run("watch", "--app", app, dsn=dsn, cwd=tmp_path)
    assert result.code == 2
    [line] = result.err
    assert message in line


def test_libpq_variables_name_the_database(
    dsn: str, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --dsn and PGSIGNALS_DSN, libpq's variables count."""
    given = psycopg2.extensions.parse_dsn(dsn)
    environment: dict[str, Any] = {
        **os.environ,
        "PGHOST": given["host"],
        "PGPORT": given["port"],
        "PGUSER": given["user"],
        "PGDATABASE": given["dbname"],
    }
    environment.pop("PGSIGNALS_DSN", None)
    subprocess.run(
        [sys.executable, "-m", "pgsignals", "install", "orders"], env=environment, check=True
    )
    assert triggers(db) == 3


def test_context_is_shown(watching: Watch, db: Database) -> None:
    """Who did it stands at the end of the line."""
    command = watching("orders:inserted")
    with db.connection.cursor() as cursor:
        cursor.execute("BEGIN")
        with pgsignals.context(db.connection, user_id=7):
            cursor.execute("INSERT INTO orders DEFAULT VALUES")
        cursor.execute("COMMIT")
    assert without_time(command.out()).endswith("id=1  context={'user_id': 7}")
