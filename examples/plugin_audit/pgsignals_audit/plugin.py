"""What pgsignals finds by the entry point: a kind of URL, and a command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO

import click

import pgsignals
from pgsignals.urls import parse_url, scheme_of

from .broadcaster import AuditBroadcaster


@pgsignals.hookimpl
def pgsignals_broadcaster(url: str) -> AuditBroadcaster | None:
    if scheme_of(url) != "audit":
        return None
    address = parse_url(url, {"source": str})
    if address.hosts or not address.path:
        raise pgsignals.ConfigurationError("audit:// wants a file: audit:///var/log/audit.jsonl.")
    return AuditBroadcaster(Path(address.path), **address.options)


@pgsignals.hookimpl
def pgsignals_commands(group: click.Group) -> None:
    group.add_command(audit)


@click.command()
@click.argument("file", type=click.File())
def audit(file: IO[str]) -> None:
    """Print what an audit trail tells, a line for each event."""
    for line in file:
        event = json.loads(line)
        about, data = event.get("subject", ""), event["data"]
        what = json.dumps(data.get("key", data))
        click.echo(f"{event['time']} {event['type'].removeprefix('pgsignals.')} {about} {what}")
