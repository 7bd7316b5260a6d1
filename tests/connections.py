"""Connections of the frameworks to a test's own database."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import django
import django.conf
import django.db
from psycopg2.extensions import parse_dsn


def driver_url(dsn: str, driver: str) -> str:
    """The address as SQLAlchemy has it, for one of its drivers."""
    return dsn.replace("postgresql://", f"postgresql+{driver}://")


@contextmanager
def django_databases(**dsns: str) -> Iterator[None]:
    """Django's connections by their aliases, to these databases while the block lasts."""
    if not django.conf.settings.configured:
        django.conf.settings.configure()
    django.setup()
    connections: Any = django.db.connections
    settings, before = connections.settings, connections["default"]
    connections.settings = connections.configure_settings(
        {alias: _as_settings(parse_dsn(dsn)) for alias, dsn in dsns.items()}
    )
    for alias in dsns:
        connections[alias] = connections.create_connection(alias)
    try:
        yield
    finally:
        for alias in dsns:
            connections[alias].close()
            del connections[alias]
        connections.settings, connections["default"] = settings, before


@contextmanager
def django_connection(dsn: str) -> Iterator[Any]:
    """Django's default connection, to this database while the block lasts."""
    with django_databases(default=dsn):
        yield django.db.connections["default"]


def _as_settings(given: Mapping[str, str]) -> dict[str, Any]:
    names = {"NAME": "dbname", "USER": "user", "HOST": "host", "PORT": "port"}
    names["PASSWORD"] = "password"
    return {"ENGINE": "django.db.backends.postgresql"} | {
        name: given[key] for name, key in names.items() if key in given
    }
