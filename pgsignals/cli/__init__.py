"""The command ``pgsignals``."""

from __future__ import annotations

import click

from pgsignals import __version__

from .demo import demo
from .doctor import doctor
from .groups import ErrorsAsMessages, log_to_stderr
from .install import install, uninstall
from .output import examples
from .sql import sql
from .status import status
from .watch import watch


@click.group(
    cls=ErrorsAsMessages,
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


for command in (demo, doctor, install, sql, status, uninstall, watch):
    main.add_command(command)

__all__ = ["main"]
