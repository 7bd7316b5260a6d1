"""Starting a Hub with Django's settings, and keeping Django's connections healthy under it."""

from __future__ import annotations

import selectors
import threading
from collections.abc import Sequence
from typing import Any

from django.db import connections
from django.db.backends.signals import connection_created

from ...core.errors import ConfigurationError
from ...core.events import Gap
from ...hub.hub import Hub
from .conf import hub as hub_of
from .conf import options


def start(hub: Hub | None = None, database: str | None = None, **overrides: Any) -> Hub:
    """Start a Hub, by default the default one, as the setting PGSIGNALS says.

    ``database`` is the alias of another database than that of PGSIGNALS, for a Hub of its own with
    watchers of its own: DATABASES in PGSIGNALS names them, or give ``hub`` and ``watchers``.

    ``overrides`` are parameters of :func:`pgsignals.start` that take precedence. Call this where a
    process begins to serve, as in ``wsgi.py``, and not at import of an application: ``migrate``
    and the reloader's parent import those too.

    Raises what ``pgsignals.start`` raises, and ConfigurationError without watchers.
    """
    hub = hub or hub_of(database)
    chosen = options(database).given | overrides
    if not chosen.get("watchers"):
        raise ConfigurationError(
            "There is nothing to watch: give the module signals.py of an application a list "
            "WATCHERS, or set PGSIGNALS['WATCHERS']; or, for another database, "
            "PGSIGNALS['DATABASES'] or start(watchers=[…])."
        )
    hub._around = _Hygiene
    # Ahead of the other receivers, since a Gap often comes because the database was away.
    callbacks = hub._callbacks
    callbacks.gap_receivers = {_before_gap: _before_gap, **callbacks.gap_receivers}
    return hub.start(**chosen)


class _Connections(threading.local):
    """Django's connections that this thread has open; None before anybody has looked."""

    opened: list[Any] | None = None

    def look(self) -> list[Any]:
        """Return the open connections; Django tells of further ones once anybody has looked."""
        known: Sequence[Any] = self.opened or ()
        if self.opened is None:
            known = connections.all(initialized_only=True)
        self.opened = [each for each in known if each.connection is not None]
        return self.opened


_here = _Connections()


def _note(connection: Any, **_: object) -> None:
    """Note a new connection; Django calls this in the thread that has connected."""
    if _here.opened is not None and connection not in _here.opened:
        _here.opened.append(connection)


connection_created.connect(_note)


class _Hygiene:
    """Does around each call what Django does around each request.

    A thread without open connections, as one whose receivers use no ORM, pays next to nothing.
    """

    def __enter__(self) -> None:
        if _here.opened != []:
            _close_unusable()

    def __exit__(self, *_: object) -> None:
        if _here.opened:
            for connection in _here.look():
                connection.close_if_unusable_or_obsolete()
            _here.look()


def _close_unusable() -> None:
    """Close unusable connections, also those that the server has cut.

    Django alone would find those out by a query's failure. An idle connection has nothing to read
    until it is cut, so that knowing costs no round trip.
    """
    for connection in _here.look():
        connection.close_if_unusable_or_obsolete()
        driver: Any = connection.connection
        if driver is None or connection.in_atomic_block or driver.closed:
            continue
        with selectors.DefaultSelector() as selector:
            selector.register(driver.fileno(), selectors.EVENT_READ)
            if selector.select(0) and not connection.is_usable():
                connection.close()


def _before_gap(gap: Gap) -> None:
    _close_unusable()
