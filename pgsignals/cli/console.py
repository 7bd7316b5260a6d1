"""``pgsignals console``: a web page of a database's signals."""

from __future__ import annotations

import logging
import os

import click

from .interrupt import interruptible
from .options import dsn_option
from .output import examples, notice


@click.command(
    epilog=examples("pgsignals console", "pgsignals console --port 9000 --allow-actions")
)
@dsn_option
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="The address to listen at. Anywhere but on this machine alone, a password is needed.",
)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8270, show_default=True, help="0: any."
)
@click.option(
    "--hostname",
    "hostnames",
    metavar="NAME",
    multiple=True,
    help="A name by which browsers may ask for it, beside addresses and localhost; may be given "
    "several times.",
)
@click.option("--allow-actions", is_flag=True, help="Let dead letters be retried and dropped.")
@click.option("--show-values", is_flag=True, help="Show what rows hold, and not their keys alone.")
def console(
    dsn: str,
    host: str,
    port: int,
    hostnames: tuple[str, ...],
    allow_actions: bool,
    show_values: bool,
) -> None:
    """Show watchers, consumers, events, dead letters, backfills and findings on a web page.

    It installs nothing, is no consumer, and keeps the last hour in memory. It ends at Ctrl-C or
    SIGTERM.

    With the variable PGSIGNALS_CONSOLE_PASSWORD it asks for that password, and any user's name.

    Exit codes: 0 well; 1 an error; 2 a wrong command line.
    """
    from pgsignals.console.guards import PASSWORD_VARIABLE
    from pgsignals.console.server import ConsoleServer

    # Each action is a line in the log.
    log = logging.getLogger("pgsignals")
    log.setLevel(min(log.level, logging.INFO))
    try:
        server = ConsoleServer(
            dsn,
            host,
            port,
            hostnames=hostnames,
            password=os.environ.get(PASSWORD_VARIABLE, ""),
            allow_actions=allow_actions,
            show_values=show_values,
        )
    except OSError as error:
        raise click.ClickException(
            f"Cannot listen at {host}, port {port}: {error.strerror or error}. "
            "Take another --port or --host."
        ) from error
    with interruptible() as end:
        server.start()
        notice(f"The console is at {server.url} Press Ctrl-C to stop.")
        end.wait()
        server.close()
