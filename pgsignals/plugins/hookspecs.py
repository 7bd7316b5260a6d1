"""The hooks that plugins may implement (entry-point group ``pgsignals``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

from ..core.tables import Resolver
from .broadcaster import Broadcaster
from .source import RemoteSource

if TYPE_CHECKING:
    import click

PROJECT = "pgsignals"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def pgsignals_resolver() -> Resolver:  # type: ignore[empty-body]
    """Return a resolver for one more kind of model.

    The resolver is asked before the built-in ones. Example::

        @pgsignals.hookimpl
        def pgsignals_resolver():
            return PonyResolver()
    """


@hookspec
def pgsignals_broadcaster(url: str) -> Broadcaster | None:
    """Return a broadcaster for a URL of ``start(backends=[…])``; None for another plugin's URL.

    The broadcaster connects when it is first used, since a process may fork before that. Raises
    ConfigurationError for a URL of its own that is wrong. Example::

        @pgsignals.hookimpl
        def pgsignals_broadcaster(url):
            return Audit(url) if url.startswith("audit://") else None
    """


@hookspec
def pgsignals_source(url: str) -> RemoteSource | None:
    """Return a source for the URL that ``start`` gets instead of a database's; None for others.

    The source connects when it is started. Raises ConfigurationError for a wrong URL of its own.
    Example::

        @pgsignals.hookimpl
        def pgsignals_source(url):
            return AuditSource(url) if url.startswith("audit://") else None
    """


@hookspec
def pgsignals_commands(group: click.Group) -> None:
    """Add commands to the command line: ``group.add_command(audit)``."""
