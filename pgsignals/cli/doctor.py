"""``pgsignals doctor``: checks for what would keep pgsignals from working here."""

from __future__ import annotations

from collections.abc import Iterable

import click

from pgsignals.core.json import to_json
from pgsignals.hub.options import all_resolvers
from pgsignals.overview.checks import FAIL, OK, WARN, Finding, examine

from .options import Scope, json_option, scope_options
from .output import coloured, examples, printable

_COLOURS = {OK: "green", WARN: "yellow", FAIL: "red"}


@click.command(
    epilog=examples("pgsignals doctor", "pgsignals doctor --app shop.signals:WATCHERS --json")
)
@scope_options
@json_option
@click.pass_context
def doctor(ctx: click.Context, scope: Scope, as_json: bool) -> None:
    """Check what pgsignals needs of the database.

    Each check is one line, with the fix where one is due. With watchers it also checks their
    triggers, those of --delivery, and whether this role may install them. Where there is an outbox,
    that and its consumers are checked too; where the write-ahead log is read, or with --delivery
    wal, the server's settings for that, the replication slots and the publications.

    Exit codes: 0 when nothing failed (warnings may be there), otherwise 1; 2 a wrong command line.
    """
    watchers = scope.watchers(required=False)
    resolvers = all_resolvers(())
    found = examine(scope.dsn, watchers, resolvers, scope.namespace, scope.delivery, scope.capture)
    ctx.exit(print_findings(found, as_json))


def print_findings(findings: Iterable[Finding], as_json: bool) -> int:
    """Print each check as soon as it is done, or all as one object; return the exit code."""
    done = []
    for finding in findings:
        done.append(finding)
        if not as_json:
            level = coloured(f"{finding.level:<4}", _COLOURS[finding.level])
            text = f"{finding.check}: {' '.join(finding.message.split())}"
            fix = f"  Fix: {finding.fix}" if finding.fix else ""
            click.echo(f"{level}  {printable(text + fix)}")
    healthy = all(finding.level != FAIL for finding in done)
    if as_json:
        click.echo(to_json({"ok": healthy, "checks": done}))
    return 0 if healthy else 1
