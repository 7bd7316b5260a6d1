"""``manage.py pgsignals``."""

from __future__ import annotations

import argparse
import sys
import threading
from dataclasses import replace
from functools import partial
from typing import Any

import click
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.utils import autoreload

from pgsignals.cli import main
from pgsignals.cli.embedded import commands_for
from pgsignals.cli.groups import ErrorsAsMessages
from pgsignals.contrib.django import start
from pgsignals.contrib.django.conf import options
from pgsignals.core.errors import PgSignalsError
from pgsignals.hub.options import Options
from pgsignals.postgres.dsn import dsn_of


def _application(alias: str | None) -> Options:
    chosen = options(alias)
    return replace(chosen, dsn=dsn_of(chosen.dsn))


class Command(BaseCommand):
    """Runs a listener, or a command of ``pgsignals`` with this project's database and watchers."""

    help = (
        "Listen for changes and call the receivers until SIGTERM or Ctrl-C; or run a command of "
        "pgsignals with this project's database and watchers."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        """Add the subcommand, and the arguments that are passed on to it."""
        parser.add_argument(
            "--database",
            metavar="ALIAS",
            help="Another database than that of PGSIGNALS, which has it in its DATABASES.",
        )
        parser.add_argument("subcommand", choices=["listen", *self._commands(None)])
        parser.add_argument(
            "arguments",
            nargs=argparse.REMAINDER,
            help="Options of the subcommand: --reload for listen, which starts it again when code "
            "changes; those of `pgsignals SUBCOMMAND --help` for the others.",
        )

    def handle(
        self, *, subcommand: str, arguments: list[str], database: str | None = None, **_: Any
    ) -> None:
        """Run the subcommand."""
        try:
            if subcommand != "listen":
                self._run(subcommand, arguments, database)
            elif arguments == ["--reload"]:
                autoreload.run_with_reloader(self._listen, database)
            elif arguments:
                raise CommandError(f"listen takes --reload and nothing else, not {arguments!r}.")
            else:
                self._listen(database)
        except PgSignalsError as error:
            raise CommandError(str(error)) from error

    def _listen(self, database: str | None) -> None:
        with start(database=database) as hub:
            self.stderr.write("Listening. Press Ctrl-C to stop.")
            # The reloader runs this in a thread, and looks after signals itself.
            if threading.current_thread() is threading.main_thread():
                hub.run()
            else:
                hub.wait()

    def _commands(self, database: str | None) -> dict[str, click.Command]:
        assert isinstance(main, click.Group)
        return commands_for(main, partial(_application, database), "manage.py pgsignals")

    def _run(self, subcommand: str, arguments: list[str], database: str | None) -> None:
        group = ErrorsAsMessages("pgsignals", commands=self._commands(database))
        try:
            code = group.main(
                [subcommand, *arguments],
                prog_name="manage.py pgsignals",
                standalone_mode=False,
            )
        except click.ClickException as error:
            raise CommandError(error.format_message(), returncode=error.exit_code) from error
        if code:
            sys.exit(code)
