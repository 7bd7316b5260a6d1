"""How the command line is read, and what is said when it is wrong."""

from __future__ import annotations

import json
from datetime import datetime, time, timedelta, timezone

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from pgsignals.cli import main
from pgsignals.cli.options import Watched, parse_watched
from pgsignals.cli.output import printable
from pgsignals.core.json import to_json
from pgsignals.core.watchers import DEFAULT_OPERATIONS, OPERATIONS
from pgsignals.triggers.quoting import quoted
from pgsignals.triggers.resolvers.plain import parse_name

NAMES = st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), min_size=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["watch"], "Give what to watch"),
        (["install"], "Give what to watch"),
        (["sql"], "Give what to watch"),
        (["watch", "orders:updted"], "did you mean 'updated'"),
        (["watch", "orders:"], "unknown operation ''"),
        (["watch", "orders:updated,updated"], "names an operation twice"),
        (["watch", "a.b.c"], "is not a table's name"),
        (["watch", 'a"b'], "write TABLE or TABLE:OPERATION"),
        (["watch", "a:b:c"], "write TABLE or TABLE:OPERATION"),
        (["watch", "orders:inserted", "--columns=a"], "no WATCH argument has 'updated'"),
        (["watch", "orders", "--columns=a,,b"], "give column names, separated by commas"),
        (["watch", "orders", "--ids-only", "--extra=a"], "--ids-only does not go with"),
        (["watch", "--app=shop", "--when=true"], "The watchers of --app say themselves"),
        (["watch", "orders", "--count=0"], "0 is not in the range"),
        (["watch", "orders", "--timeout=-1"], "-1.0 is not in the range"),
        (["demo", "--seconds=-1"], "-1.0 is not in the range"),
        (["nothing"], "No such command 'nothing'"),
    ],
)
def test_a_wrong_command_line_says_what_is_right(arguments: list[str], message: str) -> None:
    """What is wrong with the command line is said before any database is asked: exit code 2."""
    result = CliRunner().invoke(main, [*arguments, *_nowhere(arguments)])
    assert result.exit_code == 2
    assert message in result.output


def _nowhere(arguments: list[str]) -> list[str]:
    return ["--dsn=host=/nowhere"] if arguments[0] in ("watch", "install", "sql") else []


@pytest.mark.parametrize("command", ["", *sorted(main.commands)])
def test_every_command_has_help(command: str) -> None:
    """--help explains every command."""
    result = CliRunner().invoke(main, [*filter(None, [command]), "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.output


@given(NAMES, NAMES, st.lists(st.sampled_from(OPERATIONS), min_size=1, unique=True))
def test_any_quoted_name_can_be_watched(schema: str, name: str, ops: list[str]) -> None:
    """A table of any name can be given, in quotes, with and without operations."""
    table = quoted(schema, name).replace("%%", "%")
    assert parse_watched(table) == Watched(table, DEFAULT_OPERATIONS)
    assert parse_watched(f"{table}:{','.join(ops)}") == Watched(table, tuple(ops))
    assert parse_name(table) == (schema, name)


@given(st.text(st.sampled_from('ab:". ,\0')))
def test_any_text_is_read_or_refused(text: str) -> None:
    """A WATCH argument is understood, or a usage error; never anything else."""
    try:
        found = parse_watched(text)
    except click.BadParameter:
        return
    assert set(found.ops) <= set(OPERATIONS)


@given(st.text())
def test_what_is_printed_stays_in_its_line(text: str) -> None:
    """No text moves the cursor or breaks the line, and what is harmless is not changed."""
    shown = printable(text)
    assert shown.isprintable()
    assert shown == text or not text.isprintable()


@given(
    st.datetimes(
        datetime(1, 1, 3),
        datetime(9999, 12, 29),
        timezones=st.timedeltas(timedelta(hours=-23), timedelta(hours=23)).map(
            lambda offset: timezone(timedelta(seconds=offset // timedelta(seconds=1)))
        ),
    )
)
def test_a_time_stays_what_it_is(at: datetime) -> None:
    """A time is the same one in JSON, also where its offset from UTC has seconds."""
    found = json.loads(to_json({"value": [at, at.timetz()]}))["value"]
    moment, clock = (each.replace("Z", "+00:00") for each in found)
    assert datetime.fromisoformat(moment) == at
    assert time.fromisoformat(clock) == at.timetz()


@given(st.recursive(st.none() | st.integers() | st.text() | st.binary(), st.lists))
def test_whatever_an_event_holds_becomes_json(value: object) -> None:
    """Values that JSON or UTF-8 lacks do not stop an event from being printed on one line."""
    line = to_json({"value": value})
    line.encode()
    assert "\n" not in line
