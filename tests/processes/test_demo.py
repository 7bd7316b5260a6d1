"""The demonstration, run as a user runs it."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args

import psycopg2
import pytest

from pgsignals.hub.hub import Delivery
from tests.commands import Command
from tests.conftest import DEADLINE


def left_behind(folder: Path) -> list[str]:
    """What is still in the folder for temporary files."""
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for temporary files that anybody can enter, where the demonstration looks first."""
    folder = tmp_path / "tmp"
    folder.mkdir(mode=0o777)
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


@pytest.mark.parametrize("delivery", get_args(Delivery))
def test_shows_events_and_sums_up(temporary: Path, delivery: str) -> None:
    """It runs for the time given, prints lines and a summary, and leaves nothing behind."""
    command = Command("demo", "--seconds", "3", "--delivery", delivery)
    assert command.err() == "Starting a throwaway PostgreSQL …"
    assert re.fullmatch(r"PostgreSQL \d+ is running, and a shop is about to open\.", command.out())
    result = command.end()
    assert (result.code, result.err) == (0, [])
    events = [line for line in result.out if re.match(r"\d\d:\d\d:\d\d\.\d{3}  public\.", line)]
    header = next(n for n, line in enumerate(result.out) if line.startswith("TABLE OR LABEL"))
    counts = [int(line.split()[-1]) for line in result.out[header + 1 : -3]]
    summary = re.fullmatch(
        r"(\d+) events, [\d.]+ ms after the statement \(median\), 0 gaps\.", result.out[-3]
    )
    assert summary
    assert int(summary[1]) == len(events) == sum(counts) > 0
    assert result.out[-1] == "The server and its data are gone."
    assert left_behind(temporary) == []


def test_anybody_may_take_part(temporary: Path) -> None:
    """The printed connection string works from elsewhere, and that change is shown too."""
    command = Command("demo")
    while (found := re.search(r"psql (\S+) -c \"(.*)\"", command.out())) is None:
        pass
    dsn, statement = found.groups()
    connection = psycopg2.connect(dsn)
    with connection, connection.cursor() as cursor:
        cursor.execute(statement)
        cursor.execute("UPDATE products SET price = 99999.5 WHERE name = 'teapot'")
    connection.close()
    while "→ 99999.50" not in command.out():
        pass
    result = command.interrupt()
    assert result.code == 0
    assert result.out[-1] == "The server and its data are gone."
    assert left_behind(temporary) == []


def test_on_a_terminal_it_is_live(temporary: Path) -> None:
    """On a terminal a table of counts stays below the events, and Ctrl-C ends with the summary."""
    terminal, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "pgsignals", "demo"],
        stdin=child,
        stdout=child,
        stderr=child,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "60", "PYTHONUTF8": "1"},
    )
    os.close(child)
    text = ""
    while "table or label" not in text:
        text += _read(terminal) or pytest.fail(f"it ended: {text}")
    process.send_signal(signal.SIGINT)
    while (now := _read(terminal)) is not None:
        text += now
    os.close(terminal)
    assert process.wait(DEADLINE) == 0
    assert re.search(r'psql postgresql://\S+ -c "UPDATE .*"\r\n', text)
    assert text.rstrip().endswith("The server and its data are gone.")
    assert left_behind(temporary) == []


def _read(terminal: int) -> str | None:
    """What has been shown on the terminal; None when its last program has ended."""
    ready, _, _ = select.select([terminal], [], [], DEADLINE)
    assert ready, "nothing more was shown"
    try:
        return os.read(terminal, 65536).decode(errors="replace")
    except OSError:
        return None


def test_says_what_is_missing(tmp_path: Path) -> None:
    """Without a PostgreSQL there is one clear message."""
    result = subprocess.run(
        [sys.executable, "-m", "pgsignals", "demo"],
        env={**os.environ, "PGSIGNALS_POSTGRES_BIN": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "PGSIGNALS_POSTGRES_BIN" in result.stderr
    assert "Traceback" not in result.stderr
