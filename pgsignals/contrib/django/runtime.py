"""Starting a Hub with Django's settings, and keeping Django's connections healthy under it."""

from __future__ import annotations

import selectors
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from django.db import close_old_connections, connections

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
    hub._gap_receivers = {_before_gap: _before_gap, **hub._gap_receivers}
    return hub.start(**chosen)


class _Hygiene:
    """Does around each event what Django does around each request."""

    def __init__(self, tracer: Tracer | None) -> None:
        self._tracer = tracer

    @contextmanager
    def receiving(self, events: Sequence[Event], receiver: str, /) -> Iterator[None]:
        """See Tracer."""
        _close_unusable()
        try:
            with span(self._tracer, events, receiver):
                yield
        finally:
            close_old_connections()


def _close_unusable() -> None:
    """Close, too, what the server has cut: Django alone would find that out by a query's failure.

    An idle connection has nothing to read until then, so that it costs no round trip to know.
    """
    close_old_connections()
    for connection in connections.all(initialized_only=True):
        driver: Any = connection.connection
        if driver is None or connection.in_atomic_block or driver.closed:
            continue
        with selectors.DefaultSelector() as selector:
            selector.register(driver.fileno(), selectors.EVENT_READ)
            if selector.select(0) and not connection.is_usable():
                connection.close()


def _before_gap(gap: Gap) -> None:
    _close_unusable()
