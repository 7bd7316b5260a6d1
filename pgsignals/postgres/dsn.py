"""Connection strings: as they are given, as libpq takes them, and without their secrets."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Protocol, TypeAlias
from urllib.parse import quote, unquote

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


class EngineURL(Protocol):
    """The attributes of an SQLAlchemy URL (``make_url``, ``URL.create``) that are read."""

    @property
    def query(self) -> Any:
        """The parameters for the driver."""

    def get_dialect(self) -> Any:
        """Return the class of its dialect."""


class MultiHostURL(Protocol):
    """A URL of pydantic, as its ``PostgresDsn``; its text has the password."""

    @property
    def scheme(self) -> str:
        """The part before ``://``."""

    def hosts(self) -> Any:
        """Return its hosts."""


# What a database may be given by.
Database: TypeAlias = str | Engine | EngineURL | MultiHostURL

# libpq's names of parameters that drivers without libpq call otherwise.
_LIBPQ_NAMES = {
    "database": "dbname",
    "username": "user",
    "ssl": "sslmode",
    "timeout": "connect_timeout",
}
_PORTABLE = ("host", "port", "dbname", "user", "password", "sslmode")

# What asyncpg, SQLAlchemy over it, and Prisma take for themselves, and the server never sees.
_OF_CLIENTS = {
    "async_fallback",
    "command_timeout",
    "connection_limit",
    "max_cacheable_statement_size",
    "max_cached_statement_lifetime",
    "pgbouncer",
    "pool_timeout",
    "prepared_statement_cache_size",
    "prepared_statement_name_func",
    "socket_timeout",
    "statement_cache_size",
}
_SSL_WORDS = {"true": "require", "1": "require", "false": "disable", "0": "disable"}
_URL = re.compile(r"(postgres(?:ql)?)(?:\+\w+)?(://[^?]*)(?:\?([^@]*))?", re.DOTALL)
_HOST_AND_PORT = re.compile(r"([^:/\[\]]+|\[[^\]]*\]):(\d+)")


def dsn_of(given: Database) -> str:
    """Return a connection string: as it is given, or from an engine or a URL object.

    URL objects are SQLAlchemy's and pydantic's. An engine's ``connect_args`` or ``creator`` are not
    in its URL, and so not in the string. Raises ConfigurationError for anything else, and for an
    engine of another database.
    """
    if isinstance(given, str):
        return given.strip()
    if hasattr(given, "scheme") and hasattr(given, "hosts"):
        return str(given)
    dialect: Any = getattr(given, "dialect", None)
    url: Any = getattr(given, "url", None)
    if hasattr(given, "get_dialect") and hasattr(given, "query"):
        dialect, url = given.get_dialect()(), given
    name = getattr(dialect, "name", None)
    if dialect is None or url is None or name is None:
        hint = " Watchers come after it: start(watchers=[…])." if isinstance(given, list) else ""
        raise ConfigurationError(
            f"dsn={redact(repr(given))}: give a connection string, '' for libpq's defaults, an "
            f"SQLAlchemy Engine, AsyncEngine or URL, or pydantic's PostgresDsn.{hint}"
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
    """Return a connection string as libpq takes it, also from the URLs of others.

    Those are SQLAlchemy's ``postgresql+driver://``, and the parameters of asyncpg and Prisma.
    """
    dsn = dsn.strip()
    found = _URL.fullmatch(dsn)
    if found is None:
        # No URL, or one whose password may hold the "?": libpq says what is wrong.
        return re.sub(r"^(postgres(?:ql)?)\+\w+://", r"\1://", dsn)
    scheme, place, query = found.groups()
    if query is None:
        return scheme + place
    pairs = [(name, value) for name, _, value in (each.partition("=") for each in query.split("&"))]
    known = "&".join(f"{name}={value}" if value else name for name, value in _for_libpq(pairs))
    return f"{scheme}{place}{'?' if known else ''}{known}"


def _for_libpq(pairs: Iterable[tuple[str, str]]) -> Iterable[tuple[str, str]]:
    """Return the parameters of a URL, percent-encoded, by libpq's names."""
    found: dict[str, str] = {}
    hosts: list[str] = []
    options: list[str] = []
    verified = False
    for name, value in pairs:
        if name in _OF_CLIENTS:
            continue
        if name == "host":
            hosts.append(unquote(value))
        elif name == "options":
            options.append(value)
        elif name == "schema":
            # Prisma's: "public" is where names are looked up anyway.
            if value != "public":
                name = unquote(value).replace('"', '""')
                name = re.sub(r"([\\\s])", r"\\\1", name)
                options.append(quote(f'-c search_path="{name}"', safe=""))
        elif name == "sslaccept":
            verified = value == "strict"
        elif name == "ssl":
            found["sslmode"] = _SSL_WORDS.get(value, value)
        else:
            found[_LIBPQ_NAMES.get(name, name)] = value
    if hosts:
        found |= _hosts(hosts)
    if options:
        found["options"] = "%20".join(options)
    if verified and found.get("sslmode", "prefer") in ("prefer", "require"):
        found["sslmode"] = "verify-full"
    return found.items()


def _hosts(hosts: list[str]) -> dict[str, str]:
    """Return libpq's parameters for the hosts of SQLAlchemy, each of which may have its port."""
    apart = [_HOST_AND_PORT.fullmatch(each) for each in hosts]
    if not any(apart):
        return {"host": quote(",".join(hosts), safe=",")}
    names = [
        each if found is None else found[1].strip("[]")
        for each, found in zip(hosts, apart, strict=True)
    ]
    ports = ["" if found is None else found[2] for found in apart]
    return {"host": quote(",".join(names), safe=","), "port": ",".join(ports)}


_UNKNOWN_OPTION = re.compile(
    r'invalid (?:connection option|URI query parameter:?) "([a-z][a-z_]{0,40})"'
)
# A password may stand there that is not quoted as it should be, of which libpq takes the rest for
# something else.
_DOUBTFUL = re.compile(r"pass|://.*@|[@:/?#]", re.DOTALL | re.IGNORECASE)
_DOUBTFUL_URL = re.compile(r"pass|://[^/?#]*:.*[/?#].*@|[?].*@|#", re.DOTALL | re.IGNORECASE)


def malformed(dsn: str, error: str) -> str | None:
    """Return what is wrong with a connection string that libpq does not understand.

    None where the answer might show a part of a password.
    """
    url = _URL.fullmatch(dsn) is not None
    if (_DOUBTFUL_URL if url else _DOUBTFUL).search(dsn):
        return None
    if "=" not in dsn and not url:
        return (
            'it has no "=": a database alone is written dbname=NAME, and otherwise it is a URL '
            "(postgresql://…) or pairs NAME=VALUE"
        )
    found = _UNKNOWN_OPTION.search(error)
    if found is None:
        return None
    name = found[1]
    meant = _LIBPQ_NAMES.get(name)
    hint = (
        f"it is {meant} there"
        if meant
        else f"a setting of the server is written options=-c%20{name}%3D…"
        if url
        else f"a setting of the server is written options='-c {name}=…'"
    )
    return f"libpq has no option {name!r}; {hint}"


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
