"""The command ``pgsignals``."""

from __future__ import annotations

import logging

import click
import psycopg2

from pgsignals import __version__
from pgsignals.connection import redact
from pgsignals.errors import PgSignalsError
from pgsignals.plugins import load_plugins

from .demo import demo
from .doctor import doctor
from .install import install, uninstall
from .output import notice
from .plugins import plugins
from .sql import sql
from .status import status
from .watch import watch


class _Main(click.Group):
    """A group whose commands may raise our errors: each becomes a message and exit code 1."""

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

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (PgSignalsError, psycopg2.Error) as error:
            raise click.ClickException(redact(str(error)).strip()) from error
        except click.UsageError as error:
            if "://" not in error.format_message():
                raise
            # The message would quote the argument that is wrong, and so its password.
            raise click.UsageError(
                "A connection string is given by --dsn or by PGSIGNALS_DSN.", error.ctx
            ) from None


class _Notices(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        notice(self.format(record))


@click.group(cls=_Main, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("-v", "--verbose", is_flag=True, help="Tell each step on stderr.")
@click.pass_context
def main(ctx: click.Context, verbose: bool) -> None:
    """PostgreSQL changes as Python signals.

    Exit codes: 0 well, 1 an error or a failed check, 2 a wrong command line.
    """
    log = logging.getLogger("pgsignals")
    handler = _Notices()
    log.addHandler(handler)
    log.setLevel(logging.DEBUG if verbose else logging.WARNING)
    log.propagate = False
    ctx.call_on_close(lambda: log.removeHandler(handler))


for command in (demo, doctor, install, plugins, sql, status, uninstall, watch):
    main.add_command(command)

__all__ = ["main"]
