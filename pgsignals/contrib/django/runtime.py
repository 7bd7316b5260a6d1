"""Starting a Hub with Django's settings, and keeping Django's connections healthy under it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from django.db import close_old_connections

import pgsignals

from ...errors import ConfigurationError
from ...events import Event, Gap
from ...hub import Hub
from ...metrics import Tracer, span
from .conf import options


def start(hub: Hub | None = None, **overrides: Any) -> Hub:
    """Start a Hub, by default the default one, as the setting PGSIGNALS says.

    ``overrides`` are parameters of :func:`pgsignals.start` that take precedence. Call it where a
    process begins to serve, as in ``wsgi.py``, and not at import of an application: ``migrate``
    and the reloader's parent import those too.

    Raises what ``pgsignals.start`` raises, and ConfigurationError without watchers.
    """
    hub = hub or pgsignals.default_hub
    chosen = options() | overrides
    if not chosen["watchers"]:
        raise ConfigurationError(
            "There is nothing to watch: give the module signals.py of an application a list "
            "WATCHERS, or set PGSIGNALS['WATCHERS']."
        )
    chosen["tracer"] = _Hygiene(chosen.get("tracer"))
    # Ahead of the others: a Gap often comes because the database was away.
    hub._gap_receivers = {_close_old: _close_old, **hub._gap_receivers}
    return hub.start(**chosen)


class _Hygiene:
    """Does around each event what Django does around each request."""

    def __init__(self, tracer: Tracer | None) -> None:
        self._tracer = tracer

    @contextmanager
    def receiving(self, events: Sequence[Event], receiver: str, /) -> Iterator[None]:
        """See Tracer."""
        close_old_connections()
        try:
            with span(self._tracer, events, receiver):
                yield
        finally:
            close_old_connections()


def _close_old(gap: Gap) -> None:
    close_old_connections()
