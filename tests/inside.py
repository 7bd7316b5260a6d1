"""Runs ``pgsignals`` in this process: what is proved is the command, and not that Python starts."""

from __future__ import annotations

import os

from click.testing import CliRunner

from pgsignals.cli import main
from tests.commands import Result


def run(*arguments: str, dsn: str = "", **variables: str) -> Result:
    """Run a command to its end, as ``tests.commands.run`` does it in a process of its own.

    What a Hub of this process logs meanwhile is among the lines on stderr.
    """
    without = {
        name: None
        for name in os.environ
        if name.startswith("PG") and name != "PGSIGNALS_POSTGRES_BIN"
    }
    done = CliRunner().invoke(
        main,
        arguments,
        prog_name="pgsignals",
        env={**without, "PGSIGNALS_DSN": dsn, **variables},
    )
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return Result(done.exit_code, done.stdout.splitlines(), done.stderr.splitlines())
