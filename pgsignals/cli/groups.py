"""The common part of groups of commands: errors as messages, the log on stderr."""

from __future__ import annotations

import logging

import click
import psycopg2

from pgsignals.core.errors import PgSignalsError
from pgsignals.core.redaction import redact

from .output import notice


class ErrorsAsMessages(click.Group):
    """A group whose commands may raise our errors: each becomes a message and exit code 1."""

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


def log_to_stderr(ctx: click.Context, verbose: bool) -> None:
    """Write the library's log to stderr while the command runs, each step if ``verbose``."""
    log = logging.getLogger("pgsignals")
    handler = _Notices()
    before = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.DEBUG if verbose else logging.WARNING)
    log.propagate = False

    def restore() -> None:
        log.removeHandler(handler)
        log.level, log.propagate = before

    ctx.call_on_close(restore)
