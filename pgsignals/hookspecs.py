"""The hooks that plugins may implement (entry-point group ``pgsignals``)."""

from __future__ import annotations

import pluggy

from .tables import Resolver

PROJECT = "pgsignals"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def pgsignals_resolver() -> Resolver:  # type: ignore[empty-body]
    """A resolver for one more kind of model.

    It is asked before the built-in ones. Example::

        @pgsignals.hookimpl
        def pgsignals_resolver():
            return PonyResolver()
    """
