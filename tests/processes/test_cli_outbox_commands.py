"""``retention``, ``watch --delivery outbox`` and ``uninstall --schema``, as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import click
import pytest

from pgsignals import Hub, watch
from pgsignals.cli.units import parse_size, parse_time, size_text, time_text
from pgsignals.outbox.schema import RETENTION_BYTES, RETENTION_SECONDS
from tests.commands import Command
from tests.conftest import DEADLINE, Database, Recorder
from tests.forked import run


@pytest.fixture(autouse=True)
def orders(db: Database) -> None:
    """A table of orders."""
    db("CREATE TABLE orders (id bigint PRIMARY KEY, status text)")


@pytest.fixture
def outbox(dsn: str) -> None:
    """An outbox with the triggers of orders."""
    assert run("install", "orders", "--delivery", "outbox", dsn=dsn).code == 0


def triggers(db: Database) -> int:
    """How many triggers of ours there are."""
    [(count,)] = db("SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'pgsignals%'")
    return int(count)


# --- retention ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("outbox")
def test_retention_is_shown_and_set(dsn: str, db: Database) -> None:
    """Without options it tells what holds; each option sets one cap and leaves the other."""
    shown = run("retention", dsn=dsn)
    assert shown.code == 0
    assert shown.out[0].startswith("What is not read is kept for 3d, in up to 4GiB. The outbox has")
    assert run("retention", "--time", "12h", dsn=dsn).code == 0
    assert db("SELECT retention_seconds, retention_bytes FROM pgsignals.settings") == [
        (43200.0, RETENTION_BYTES)
    ]
    changed = run("retention", "--time", "7d", "--size", "20GiB", "--json", dsn=dsn)
    answer = json.loads(changed.out[0])
    assert (answer["seconds"], answer["bytes"]) == (7 * 86400.0, 20 << 30)
    assert answer["used_bytes"] > 0
    assert RETENTION_SECONDS == 3 * 86400


@pytest.mark.usefixtures("outbox")
@pytest.mark.parametrize("option", [("--time", "59s"), ("--size", "8191KiB")])
def test_a_retention_that_would_keep_nothing(
    dsn: str, db: Database, option: tuple[str, str]
) -> None:
    """A cap below which events would go before anybody can read them is refused."""
    before = db("SELECT * FROM pgsignals.settings")
    refused = run("retention", *option, dsn=dsn)
    assert refused.code == 1
    assert "or more" in refused.err[0]
    assert db("SELECT * FROM pgsignals.settings") == before


def test_who_loses_events_by_a_shorter_retention(dsn: str, db: Database) -> None:
    """A consumer that is later than what is kept from now on is named."""
    Hub().start(dsn, ["orders"], delivery="outbox", name="mailer").stop()
    db("INSERT INTO orders VALUES (1)")
    db("UPDATE pgsignals.outbox SET payload = regexp_replace(payload, '\"t\":\\d+', '\"t\":1')")
    told = run("retention", "--time", "1h", dsn=dsn)
    assert told.code == 0
    assert "The consumer 'mailer'" in told.err[0]
    assert run("retention", "--time", "50000w", dsn=dsn).err == []


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("1.5h", 5400), ("7d", 604800), ("2w", 1209600)],
)
def test_times(text: str, seconds: float) -> None:
    """Times have a unit, and are told so that they can be given again."""
    assert parse_time(text) == seconds
    assert parse_time(time_text(seconds)) == seconds


@pytest.mark.parametrize(
    ("text", "size"), [("17", 17), ("500MiB", 500 << 20), ("1.5 GiB", 3 << 29), ("2TiB", 2 << 40)]
)
def test_sizes(text: str, size: int) -> None:
    """Sizes are bytes, or have a unit, and are told so that they can be given again."""
    assert parse_size(text) == size
    assert parse_size(size_text(size)) == size


@pytest.mark.parametrize("text", ["", "7", "d", "-1d", "1e3s", "7 days", "1d2h", "nan", "inf"])
def test_what_is_no_time(text: str) -> None:
    """Anything else is refused, with what would do."""
    with pytest.raises(click.BadParameter, match="such as 7d"):
        parse_time(text)


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e9", "20GB", "1 GiB 1", "20gib"])
def test_what_is_no_size(text: str) -> None:
    """Units of a thousand and others are refused, with what would do."""
    with pytest.raises(click.BadParameter, match="such as 20GiB"):
        parse_size(text)


# --- watch ----------------------------------------------------------------------------------------


Watch = Callable[..., Command]


@pytest.fixture
def watching(dsn: str) -> Iterator[Watch]:
    """Starts ``pgsignals watch --delivery outbox``, and returns when it is ready."""
    started: list[Command] = []

    def start(*arguments: str) -> Command:
        command = Command("watch", *arguments, "--delivery", "outbox", dsn=dsn)
        started.append(command)
        assert command.err().startswith("Watching ")
        return command

    yield start
    for command in started:
        if command.process.poll() is None:
            command.process.kill()
            command.process.wait()


def test_watch_reads_the_outbox(watching: Watch, db: Database) -> None:
    """Without a name it prints what happens from now on, and leaves no trigger and no consumer."""
    command = watching("orders", "--json")
    db("INSERT INTO orders VALUES (1, repeat('x', 20000))")
    event = json.loads(command.out())
    assert (event["op"], event["id"], event["truncated"]) == ("inserted", 1, False)
    result = command.interrupt()
    assert (result.code, result.err) == (0, ["Removed 3 triggers.", "1 event"])
    assert triggers(db) == 0
    assert db("SELECT name FROM pgsignals.consumers") == []


def test_watch_goes_on_where_it_was(watching: Watch, db: Database) -> None:
    """With a name it prints, the next time, what happened meanwhile, and nothing twice."""
    command = watching("orders", "--name", "audit", "--ids-only", "--json")
    db("INSERT INTO orders VALUES (1)")
    assert json.loads(command.out())["id"] == 1
    result = command.interrupt()
    assert result.code == 0
    assert result.err == [
        "The consumer 'audit' stays: `pgsignals consumers drop` gives it up.",
        "1 event",
    ]
    db("INSERT INTO orders VALUES (2), (3)")
    again = watching("orders", "--name", "audit", "--ids-only", "--json")
    assert [json.loads(again.out())["id"] for _ in range(2)] == [2, 3]
    assert again.interrupt().out == []


def test_what_could_not_be_printed_comes_again(dsn: str, watching: Watch, db: Database) -> None:
    """An event that was lost on the way to stdout is not acknowledged, nor are those after it."""
    arguments = ["watch", "orders", "--name", "audit", "--ids-only", "--json"]
    with open("/dev/full", "w") as full:
        process = subprocess.Popen(
            [sys.executable, "-m", "pgsignals", *arguments, "--delivery", "outbox"],
            stdout=full,
            stderr=subprocess.PIPE,
            env={**os.environ, "PGSIGNALS_DSN": dsn},
            text=True,
        )
        assert process.stderr is not None
        with process.stderr:
            assert process.stderr.readline().startswith("Watching")
            db("INSERT INTO orders SELECT generate_series(1, 30)")
            assert "Cannot print to stdout" in process.stderr.read()
        assert process.wait(DEADLINE) == 1
    again = watching(*arguments[1:])
    assert [json.loads(again.out())["id"] for _ in range(30)] == list(range(1, 31))
    assert again.interrupt().out == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "a"], "add --delivery outbox"),
        (
            ["--name", "a", "--delivery", "outbox", "--count", "1"],
            "--count does not go with --name",
        ),
    ],
)
def test_options_of_watch_that_do_not_go(arguments: list[str], message: str) -> None:
    """What would lose events, or means nothing, is a wrong command line."""
    result = run("watch", "orders", *arguments, dsn="host=/nowhere")
    assert result.code == 2
    assert message in "\n".join(result.err)


# --- uninstall --schema ---------------------------------------------------------------------------


def test_the_schema_goes_with_its_triggers(dsn: str, db: Database) -> None:
    """--schema --yes removes the schema and what writes to it, in all namespaces, and no more."""
    for namespace in ("default", "reports"):
        with Hub().start(dsn, ["orders"], delivery="outbox", name=namespace, namespace=namespace):
            pass
    db("INSERT INTO orders VALUES (1)")
    assert run("install", "orders:updated", dsn=dsn).code == 0
    assert triggers(db) == 7
    result = run("uninstall", "--schema", "--yes", dsn=dsn)
    assert (result.code, result.out) == (0, ["6 triggers and the schema pgsignals removed."])
    assert triggers(db) == 1
    assert db("SELECT FROM pg_namespace WHERE nspname = 'pgsignals'") == []
    db("INSERT INTO orders VALUES (2)")
    again = run("uninstall", "--schema", "--yes", dsn=dsn)
    assert again.code == 1
    assert "no outbox" in again.err[0]


def test_it_asks_and_says_what_would_be_lost(dsn: str, db: Database) -> None:
    """Without an answer nothing is removed; the question names consumers and what they miss."""
    Hub().start(dsn, ["orders"], delivery="outbox", name="mailer").stop()
    db("INSERT INTO orders VALUES (1), (2)")
    result = run("uninstall", "--schema", dsn=dsn)
    assert result.code == 1
    asked = "\n".join(result.err)
    assert "1 consumer, 'mailer' with 2 events unread; 0 dead letters; 3 triggers" in asked
    assert "Remove all that?" in asked
    assert triggers(db) == 3


def test_it_refuses_while_a_consumer_is_active(
    hub: Hub, dsn: str, db: Database, recorder: Recorder
) -> None:
    """A consumer at work is named, and goes on."""
    hub.subscribe(recorder, "orders")
    hub.start(dsn, [watch("orders", "inserted")], delivery="outbox", name="mailer")
    refused = run("uninstall", "--schema", "--yes", dsn=dsn)
    assert refused.code == 1
    assert "Processes read the outbox" in refused.err[0]
    assert "'mailer'" in refused.err[0]
    db("INSERT INTO orders VALUES (1)")
    recorder.wait(1)
    hub.stop()
    assert run("uninstall", "--schema", "--yes", "--json", dsn=dsn).out == [
        '{"schema":"pgsignals","removed":[{"schema":"public","table":"orders","op":"inserted"}]}'
    ]


def test_a_schema_that_is_not_ours_stays(dsn: str, db: Database) -> None:
    """A schema of that name that somebody else made is left alone."""
    db("CREATE SCHEMA pgsignals; CREATE TABLE pgsignals.precious (id int)")
    result = run("uninstall", "--schema", "--yes", dsn=dsn)
    assert result.code == 1
    assert "did not make" in result.err[0]
    assert db("SELECT count(*) FROM pgsignals.precious") == [(0,)]


@pytest.mark.usefixtures("outbox")
def test_who_does_not_own_it_cannot_remove_it(dsn: str, db: Database) -> None:
    """The error says who can, and the triggers stay."""
    name = f"stranger_{dsn.rpartition('/')[2]}"
    db(f"CREATE ROLE {name} LOGIN")
    db(f"GRANT USAGE ON SCHEMA pgsignals TO {name}")
    db(f"GRANT SELECT ON ALL TABLES IN SCHEMA pgsignals TO {name}")
    db(f"GRANT SELECT ON ALL SEQUENCES IN SCHEMA pgsignals TO {name}")
    try:
        result = run("uninstall", "--schema", "--yes", dsn=dsn.replace("postgres@", f"{name}@"))
        assert result.code == 1
        assert "owner" in result.err[0]
        assert triggers(db) == 3
    finally:
        db(f"DROP OWNED BY {name}; DROP ROLE {name}")


@pytest.mark.parametrize("arguments", [["--yes"], ["--schema", "--force"]])
def test_options_of_uninstall_that_do_not_go(arguments: list[str]) -> None:
    """What means nothing is a wrong command line."""
    assert run("uninstall", *arguments, dsn="host=/nowhere").code == 2
