"""The exit codes of every command are those that the documentation lists."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import click
import pytest

from pgsignals import Hub
from pgsignals.cli import main
from tests.commands import Program
from tests.conftest import Database
from tests.forked import run
from tests.paths import ROOT

PAGE = (ROOT / "docs/cli.md").read_text()

# What ends with each code, given a table "orders" and the consumer "mailer", which is down.
CASES: dict[str, dict[int, list[str]]] = {
    "watch": {
        0: ["watch", "orders", "--timeout", "0"],
        1: ["watch", "nothing"],
        2: ["watch"],
        124: ["watch", "orders", "--count", "1", "--timeout", "0"],
    },
    "install": {0: ["install", "orders"], 1: ["install", "nothing"], 2: ["install"]},
    "uninstall": {
        0: ["uninstall", "--namespace", "other"],
        1: ["uninstall"],
        2: ["uninstall", "--yes"],
    },
    "sql": {0: ["sql", "orders"], 1: ["sql", "nothing"], 2: ["sql"]},
    "status": {0: ["status"], 1: ["status", "orders:truncated"], 2: ["status", "a:b:c"]},
    "doctor": {0: ["doctor"], 1: ["doctor", "nothing"], 2: ["doctor", "a:b:c"]},
    "relay": {2: ["relay"]},
    "consumers": {
        0: ["consumers", "list"],
        1: ["consumers", "drop", "nobody"],
        2: ["consumers", "reset", "mailer"],
    },
    "backfill": {
        0: ["backfill", "orders", "--name", "mailer", "--no-wait"],
        1: ["backfill", "orders", "--name", "nobody"],
        2: ["backfill", "orders"],
    },
    "backfills": {
        0: ["backfills", "list"],
        1: ["backfills", "cancel", "7"],
        2: ["backfills", "cancel"],
    },
    "dead-letters": {
        0: ["dead-letters", "list"],
        1: ["dead-letters", "show", "1"],
        2: ["dead-letters", "retry"],
    },
    "retention": {
        0: ["retention"],
        1: ["retention", "--time", "1s"],
        2: ["retention", "--time", "1"],
    },
    "plugins": {0: ["plugins"], 2: ["plugins", "x"]},
    "top": {0: ["top", "--once"], 2: ["top", "--every", "x"]},
    "console": {2: ["console", "--port", "x"]},
    "demo": {0: ["demo", "--seconds", "0"], 2: ["demo", "--seconds", "x"]},
}
# What takes more than a command line, below or with the command's own tests.
ELSEWHERE = {
    ("relay", 0),
    ("relay", 1),
    ("backfill", 130),
    ("plugins", 1),
    ("demo", 1),
    ("top", 1),
    ("console", 0),
    ("console", 1),
}


@pytest.fixture
def shop(dsn: str, db: Database) -> str:
    """A database with a table, and a consumer that is down."""
    db("CREATE TABLE orders (id bigint PRIMARY KEY)")
    Hub().start(dsn, ["orders"], delivery="outbox", name="mailer").stop()
    return dsn


def documented() -> set[tuple[str, int]]:
    """The commands of the table, each with the codes that it lists."""
    table = PAGE[PAGE.index("## Exit codes") :]
    found = set()
    for name, _, _, others in re.findall(
        r"^\| `([a-z-]+)` \| (.+?) \| (.+?) \|(.*?)\|$", table, re.MULTILINE
    ):
        codes = {0, 1, 2, *map(int, re.findall(r"\b(\d+):", others))}
        found |= {(name, code) for code in codes}
    return found


def test_every_command_is_listed() -> None:
    """The table has each command that there is, and what each case here does."""
    assert {name for name, _ in documented()} == set(main.commands)
    tried = {(name, code) for name, codes in CASES.items() for code in codes}
    assert documented() == tried | ELSEWHERE


@pytest.mark.parametrize(
    ("code", "arguments"),
    [(code, arguments) for codes in CASES.values() for code, arguments in codes.items()],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_codes(shop: str, code: int, arguments: list[str]) -> None:
    """Each ends as it is listed, without a traceback."""
    result = run(*arguments, dsn=shop)
    assert result.code == code, result
    assert "Traceback" not in "\n".join(result.err)


@pytest.mark.parametrize(
    "command",
    [name for name, codes in CASES.items() if 1 in codes and name != "demo"],
)
def test_a_database_that_is_away(command: str) -> None:
    """Whatever needs the database ends with 1 without it, and never tells the password."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        dsn = f"postgresql://me:s3cret@127.0.0.1:{unused.getsockname()[1]}/shop"
        arguments = CASES[command][0]
        result = run(*arguments, dsn=dsn)
    assert result.code == 1
    assert "s3cret" not in "\n".join([*result.out, *result.err])
    assert "Traceback" not in "\n".join(result.err)


def test_a_demo_without_postgresql(tmp_path: Path) -> None:
    """Where there is no server to start, the demo says so and ends with 1."""
    program = Program("-m", "pgsignals", "demo", PGSIGNALS_POSTGRES_BIN=str(tmp_path))
    result = program.end()
    assert result.code == 1
    assert "Traceback" not in "\n".join(result.err)


def test_help_says_the_same() -> None:
    """The help of each command, or of its group, has its exit codes."""
    with click.Context(main) as context:
        for name in main.list_commands(context):
            command = main.get_command(context, name)
            assert command is not None
            assert "Exit codes:" in str(command.help), name
