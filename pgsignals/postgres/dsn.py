"""Connection strings: as they are given, as libpq takes them, and without their secrets."""

from __future__ import annotations

import re
from typing import Any, Protocol

import psycopg2
import psycopg2.extensions

from ..core.errors import ConfigurationError
from ..core.redaction import redact

_SHOWN = ("service", "host", "hostaddr", "port", "dbname", "user")
# A URL's password up to the last @. If it has characters that should have been percent-encoded,
# libpq takes what follows the first of them for the host, the port or the database.
_URL_PASSWORD = re.compile(r"\s*postgres(?:ql)?://[^:/?#@]*:(.*)@", re.DOTALL)


def display(dsn: str) -> str:
    """Return the parts of a connection string that are no secret, for messages.

    It shows nothing of a string in which some other part may turn out to be the password.
    """
    given = legible_parts(libpq_dsn(dsn))
    if given is None:
        return "the given DSN"
    shown = " ".join(f"{name}={given[name]}" for name in _SHOWN if name in given)
    return redact(shown) or "the default of libpq"


def legible_parts(dsn: str) -> dict[str, str] | None:
    """Return a connection string's parts; None if its author may have meant others than libpq's."""
    try:
        given: dict[str, str] = psycopg2.extensions.parse_dsn(dsn)
    except (psycopg2.Error, UnicodeError):
        return None
    password = _URL_PASSWORD.match(dsn)
    if password is not None and re.search(r"[/?#@]", password[1]):
        return None
    return given if re.fullmatch(r"[\d,]*", given.get("port", "")) else None


class Engine(Protocol):
    """The attributes of an SQLAlchemy Engine or AsyncEngine that :func:`dsn_of` reads."""

    @property
    def url(self) -> Any:
        """The URL of the database."""

    @property
    def dialect(self) -> Any:
        """The kind of database, and its driver."""


# libpq's names of parameters that drivers without libpq call otherwise.
_LIBPQ_NAMES = {"database": "dbname", "ssl": "sslmode"}
_PORTABLE = ("host", "port", "dbname", "user", "password", "sslmode")


def dsn_of(given: str | Engine) -> str:
    """Return a connection string: as it is given, or from an SQLAlchemy engine's URL.

    An engine's ``connect_args`` or ``creator`` are not in its URL, and so not in the string.
    Raises ConfigurationError for anything else, and for an engine of another database.
    """
    if isinstance(given, str):
        return given
    dialect, url = getattr(given, "dialect", None), getattr(given, "url", None)
    name = getattr(dialect, "name", None)
    if dialect is None or url is None or name is None:
        hint = " Watchers come after it: start(watchers=[…])." if isinstance(given, list) else ""
        raise ConfigurationError(
            f"dsn={redact(repr(given))}: give a connection string, '' for libpq's defaults, or an "
            f"SQLAlchemy Engine or AsyncEngine.{hint}"
        )
    if name != "postgresql":
        raise ConfigurationError(f"The engine is of {name}: give one of PostgreSQL.")
    _, parameters = dialect.create_connect_args(url)
    parts = {_LIBPQ_NAMES.get(key, key): value for key, value in parameters.items()}
    if dialect.driver not in ("psycopg2", "psycopg", "psycopg_async", "psycopg2cffi"):
        parts = {key: parts[key] for key in _PORTABLE if key in parts}
    return psycopg2.extensions.make_dsn(
        **{
            key: ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            for key, value in parts.items()
            # A value of another type is an object for the driver alone.
            if isinstance(value, str | int | list | tuple)
        }
    )


def libpq_dsn(dsn: str) -> str:
    """Return a connection string as libpq takes it, also from ``postgresql+driver://``."""
    return re.sub(r"^(postgres(?:ql)?)\+\w+://", r"\1://", dsn)


def libpq_options(dsn: str, timeout: float) -> dict[str, Any]:
    """Return the parameters that we add to the user's connection string where it has none."""
    defaults = {
        "connect_timeout": max(2, round(timeout)),
        "keepalives": 1,
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        "tcp_user_timeout": 60_000,
        "fallback_application_name": "pgsignals",
    }
    given = psycopg2.extensions.parse_dsn(dsn)
    return {name: value for name, value in defaults.items() if name not in given} | {
        "client_encoding": "UTF8"
    }
