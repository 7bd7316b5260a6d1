"""What the setting PGSIGNALS says, and what it leaves to Django's own settings."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from typing import Any

import psycopg2.extensions
from django.apps import apps
from django.conf import settings
from django.db import connections
from django.utils.module_loading import import_string

from ...errors import ConfigurationError, near
from ...hub import Hub
from ...watchers import Watcher, normalize

# What Django keeps beside the parameters of libpq.
_NOT_LIBPQ = (
    "assume_role",
    "client_encoding",
    "context",
    "cursor_factory",
    "isolation_level",
    "pool",
    "prepare_threshold",
    "server_side_binding",
)


def options() -> dict[str, Any]:
    """Parameters of ``Hub.start``, those for DSN and watchers included.

    Raises ConfigurationError for a key of PGSIGNALS that there is not.
    """
    given = dict(getattr(settings, "PGSIGNALS", {}))
    known = [name.upper() for name in inspect.signature(Hub.start).parameters if name != "self"]
    for key in given:
        if key not in (*known, "DATABASE"):
            raise ConfigurationError(
                f"PGSIGNALS has the unknown key {key!r}{near(str(key), known)} "
                f"There are DATABASE and {', '.join(known)}."
            )
    alias = given.pop("DATABASE", "default")
    found = {key.lower(): value for key, value in given.items()}
    found.setdefault("dsn", dsn_of(alias))
    found["watchers"] = watchers()
    return found


def database() -> str:
    """The alias of the watched database."""
    return str(getattr(settings, "PGSIGNALS", {}).get("DATABASE", "default"))


def default_delivery() -> str:
    """The delivery of the project's listeners."""
    return str(getattr(settings, "PGSIGNALS", {}).get("DELIVERY", "notify"))


def default_namespace() -> str:
    """Whose triggers the project's are."""
    return str(getattr(settings, "PGSIGNALS", {}).get("NAMESPACE", "default"))


def dsn_of(alias: str) -> str:
    """The connection string of one of Django's databases."""
    connection: Any = connections[alias]
    if connection.vendor != "postgresql":
        raise ConfigurationError(
            f"The database {alias!r} is of {connection.vendor}: name one of PostgreSQL in "
            "PGSIGNALS['DATABASE']."
        )
    parameters = {
        "dbname" if name == "database" else name: value
        for name, value in connection.get_connection_params().items()
        if name not in _NOT_LIBPQ and value is not None
    }
    return psycopg2.extensions.make_dsn(**{name: str(it) for name, it in parameters.items()})


def watchers() -> tuple[Watcher, ...]:
    """What PGSIGNALS['WATCHERS'] says, or else the ``WATCHERS`` of all ``signals`` modules.

    Raises WatcherError for what cannot be watched.
    """
    given = getattr(settings, "PGSIGNALS", {}).get("WATCHERS")
    if isinstance(given, str):
        given = import_string(given)
    if given is not None:
        return normalize(given)
    found: list[Any] = []
    for config in apps.get_app_configs():
        declared: Iterable[Any] = getattr(sys.modules.get(f"{config.name}.signals"), "WATCHERS", ())
        found += declared
    return normalize(found)
