"""The command ``pgsignals``."""

from __future__ import annotations

import click

from pgsignals import __version__
from pgsignals.plugins.loader import load_plugins

from .backfill import backfill, backfills
from .console import console
from .demo import demo
from .doctor import doctor
from .groups import ErrorsAsMessages, log_to_stderr
from .install import install, uninstall
from .outbox import consumers, dead_letters
from .output import examples
from .plugins import plugins
from .relay import relay
from .retention import retention
from .sql import sql
from .status import status
from .top import top
from .watch import watch


class _Main(ErrorsAsMessages):
    """The commands of pgsignals, and those that plugins add."""

    _loaded = False

    def list_commands(self, ctx: click.Context) -> list[str]:
        self._load_plugins()
        return super().list_commands(ctx)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.commands:
            self._load_plugins()
        return super().get_command(ctx, cmd_name)

    def _load_plugins(self) -> None:
        if not self._loaded:
            self._loaded = True
            load_plugins().add_commands(self)


@click.group(
    cls=_Main,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples(
        "pgsignals watch orders --dsn postgresql://localhost/shop",
        "pgsignals status --app shop.signals:WATCHERS",
        "pgsignals doctor",
    ),
)
@click.version_option(__version__)
@click.option("-v", "--verbose", is_flag=True, help="Tell each step on stderr.")
@click.pass_context
def main(ctx: click.Context, verbose: bool) -> None:
    """PostgreSQL changes as Python signals.

    Exit codes: 0 well, 1 an error or a failed check, 2 a wrong command line.
    """
    log_to_stderr(ctx, verbose)


for command in (
    backfill,
    backfills,
    console,
    consumers,
    dead_letters,
    demo,
    doctor,
    install,
    plugins,
    relay,
    retention,
    sql,
    status,
    top,
    uninstall,
    watch,
):
    main.add_command(command)

__all__ = ["main"]
