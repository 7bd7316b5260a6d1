"""Checks whether the database at hand is the one in which a model's framework keeps its rows."""

from __future__ import annotations

import os
from typing import Any

import psycopg2.extensions
from psycopg2.extensions import cursor as Cursor

from ..core.errors import ConnectError, ModelError
from ..core.home import Home
from .connection import opened
from .dsn import display, libpq_dsn

# The identity of a running server and a database in it, whichever way a connection came there.
# Copies of a cluster have its identifier, too: the server's start tells them apart, unless one is
# in recovery, and so a standby of the other.
_IDENTITY = """
SELECT system_identifier::text, d.oid::text, pg_catalog.pg_is_in_recovery(),
       (pg_catalog.date_part('epoch', pg_catalog.pg_postmaster_start_time()) * 1e6)::int8
FROM pg_catalog.pg_control_system(), pg_catalog.pg_database AS d
WHERE d.datname = pg_catalog.current_database()
"""


# Pairs of addresses that lead to one database. Each pair is asked about once, as settings are
# compared.
_alike: set[tuple[tuple[str, ...], str]] = set()


def check_home(cursor: Cursor, home: Home) -> None:
    """Raise ModelError unless ``cursor`` is of the model's database.

    Also raises what ``is_home`` raises.
    """
    if is_home(cursor, home):
        return
    there = "which is not PostgreSQL" if home.dsn is None else display(home.dsn)
    raise ModelError(
        f"{home.model} is of {home.name} ({there}), and this is another database "
        f"({_place(cursor)}), whose table of that name has nothing to do with it. "
        f"{home.fix}".rstrip()
    )


def is_home(cursor: Cursor, home: Home) -> bool:
    """Whether ``cursor`` is of the model's database.

    Addresses with the same host, port and name are taken for one database. Otherwise both servers
    are asked, since one database has many addresses: a socket and TCP, a pooler, a standby.
    Raises ConnectError when the model's server cannot be asked.
    """
    if home.dsn is None:
        return False
    here = _address(cursor.connection.get_dsn_parameters())
    if (here, home.dsn) in _alike or here == _address(_parsed(home.dsn)):
        return True
    alike = _same(_ask(cursor), _ask_there(cursor, home, home.dsn))
    if alike:
        _alike.add((here, home.dsn))
    return alike


def _place(cursor: Cursor) -> str:
    """Return the address of a cursor's database, for messages."""
    parameters = cursor.connection.get_dsn_parameters()
    shown = {name: parameters[name] for name in ("host", "port", "dbname") if name in parameters}
    return display(psycopg2.extensions.make_dsn(**shown))


def _parsed(dsn: str) -> dict[str, str]:
    """Return the parts of a connection string, with libpq's defaults for those it leaves out."""
    given: dict[str, str] = psycopg2.extensions.parse_dsn(libpq_dsn(dsn))
    if "service" in given or ("PGSERVICE" in os.environ and "dbname" not in given):
        return {}
    for name, variable in (("host", "PGHOST"), ("hostaddr", "PGHOSTADDR"), ("port", "PGPORT")):
        if variable in os.environ:
            given.setdefault(name, os.environ[variable])
    if "dbname" not in given and "PGDATABASE" in os.environ:
        given["dbname"] = os.environ["PGDATABASE"]
    return given


def _address(parameters: dict[str, str]) -> tuple[str, ...]:
    return (
        parameters.get("hostaddr") or parameters.get("host", ""),
        parameters.get("port", "5432"),
        parameters.get("dbname", ""),
    )


def _ask(cursor: Cursor) -> tuple[Any, ...]:
    cursor.execute(_IDENTITY)
    [identity] = cursor.fetchall()
    return tuple(identity)


def _ask_there(cursor: Cursor, home: Home, dsn: str) -> tuple[Any, ...]:
    try:
        with opened(dsn) as there:
            return _ask(there)
    except ConnectError as error:
        raise ConnectError(
            f"{home.model} is of {home.name}, and whether that is this database ({_place(cursor)}) "
            f"could not be asked: {error}"
        ) from error


def _same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    *named, standby, started = one
    *named_there, standby_there, started_there = other
    return named == named_there and (standby or standby_there or started == started_there)
