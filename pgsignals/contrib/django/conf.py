"""The options that the setting PGSIGNALS gives, or leaves to Django's own settings."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from django.apps import apps
from django.conf import settings
from django.db import connections
from django.utils.module_loading import import_string

import pgsignals

from ...core.errors import ConfigurationError, near
from ...core.transport import Capture
from ...core.watchers import Watcher, normalize
from ...hub.hub import Hub
from ...hub.options import Options
from ...plugins.loader import load_plugins
from ...triggers.resolvers.django import DjangoResolver, connection_dsn

# Keys that lead to the database of PGSIGNALS, or belong to it.
_OF_ONE_DATABASE = ("DSN", "LISTEN_DSN", "WATCHERS")


def options(alias: str | None = None) -> Options:
    """Return the options of ``Hub.start``, with the DSN and the watchers.

    ``alias`` is of another database than that of PGSIGNALS; its options that differ are in
    DATABASES. Raises ConfigurationError for an unknown key of PGSIGNALS.
    """
    known = [each.name.upper() for each in fields(Options)]
    _check_keys("PGSIGNALS", _setting(), ["DATABASE", "DATABASES", *known])
    for other, given in _setting().get("DATABASES", {}).items():
        _check_keys(f"PGSIGNALS['DATABASES'][{other!r}]", given, ["HUB", *known])
    own = ("DATABASE", "DATABASES", "HUB")
    found = {key.lower(): value for key, value in _of(alias).items() if key not in own}
    alias = alias or database()
    found.setdefault("dsn", dsn_of(alias))
    found["watchers"] = watchers(alias)
    # A record that a receiver loads without a session comes from the database that is watched.
    found["resolvers"] = (
        *found.get("resolvers", ()),
        *load_plugins().resolvers(),
        DjangoResolver(using=alias),
    )
    return Options(**found)


def _check_keys(what: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in given:
        if key not in known:
            raise ConfigurationError(
                f"{what} has the unknown key {key!r}{near(str(key), known)} "
                f"There are {', '.join(known)}."
            )


def _setting() -> Mapping[str, Any]:
    found: Mapping[str, Any] = getattr(settings, "PGSIGNALS", {})
    return found


def _of(alias: str | None) -> dict[str, Any]:
    """Return a database's keys of PGSIGNALS; for another database, those of DATABASES go first."""
    given = dict(_setting())
    if alias in (None, database()):
        return given
    shared = {key: value for key, value in given.items() if key not in _OF_ONE_DATABASE}
    return shared | dict(given.get("DATABASES", {}).get(alias, {}))


def database() -> str:
    """Return the alias of the watched database."""
    return str(_setting().get("DATABASE", "default"))


def databases() -> list[str]:
    """Return the aliases of all databases that are watched."""
    return [database(), *_setting().get("DATABASES", {})]


def hub(alias: str | None = None) -> Hub:
    """Return the Hub of a database: the default one, unless DATABASES names another."""
    given = _of(alias).get("HUB", pgsignals.default_hub)
    found: Hub = import_string(given) if isinstance(given, str) else given
    return found


def default_delivery(alias: str | None = None) -> str:
    """Return the delivery of the project's listeners."""
    return str(_of(alias).get("DELIVERY", Options.delivery))


def default_capture(alias: str | None = None) -> Capture | None:
    """Return what serves the project's watchers in WAL delivery."""
    found: Capture | None = _of(alias).get("CAPTURE")
    return found


def default_namespace(alias: str | None = None) -> str:
    """Return the namespace of the project's triggers."""
    return str(_of(alias).get("NAMESPACE", Options.namespace))


def dsn_of(alias: str) -> str:
    """Return the connection string of one of Django's databases."""
    return connection_dsn(connections[alias])


def watchers(alias: str | None = None) -> tuple[Watcher, ...]:
    """Return PGSIGNALS['WATCHERS'], or else the ``WATCHERS`` of all ``signals`` modules.

    Those of another database are given in DATABASES, by its ``alias``.
    Raises WatcherError for what cannot be watched.
    """
    given = _of(alias).get("WATCHERS")
    if isinstance(given, str):
        given = import_string(given)
    if given is not None:
        return normalize(given)
    if alias not in (None, database()):
        return ()
    found: list[Any] = []
    for config in apps.get_app_configs():
        declared: Iterable[Any] = getattr(sys.modules.get(f"{config.name}.signals"), "WATCHERS", ())
        found += declared
    return normalize(found)
