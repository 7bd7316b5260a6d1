"""The publications that the connections of consumers name."""

from __future__ import annotations

from psycopg2 import errors as pg
from psycopg2 import sql
from psycopg2.extensions import cursor as Cursor

from ..core.errors import DriftError, PrivilegeError
from ..postgres.privileges import current_role
from ..triggers.names import INSERTS_PUBLICATION, PUBLICATION
from ..triggers.publications import creating_publications


def missing_publications(cursor: Cursor, *, everything: bool = False) -> list[str]:
    """Return the statements that make the publications; none if they are there."""
    cursor.execute(
        "SELECT pg_catalog.count(*) FROM pg_catalog.pg_publication WHERE pubname = ANY (%s)",
        ([PUBLICATION, INSERTS_PUBLICATION],),
    )
    there = cursor.fetchall() == [(2,)]
    return [] if there and not everything else creating_publications()


def check_publications(cursor: Cursor) -> None:
    """Raise DriftError unless the publications are there."""
    if missing_publications(cursor):
        raise DriftError(
            f'install="check" found no publications {PUBLICATION!r} and {INSERTS_PUBLICATION!r}, '
            "which WAL delivery needs. Run `pgsignals install --delivery wal` as the tables' "
            "owner, or apply what `pgsignals sql --delivery wal` prints."
        )


def ensure_publications(cursor: Cursor) -> None:
    """Make the publications unless they are there. Raises PrivilegeError.

    They have to be older than every slot, whatever is in them: the server looks for them as of the
    moment of a row's writing.
    """
    if not (missing := missing_publications(cursor)):
        return
    try:
        cursor.execute(";\n".join(missing))
    except pg.InsufficientPrivilege as error:
        cursor.execute("SELECT pg_catalog.current_database()")
        [(database,)] = cursor.fetchall()
        grant = sql.SQL("GRANT CREATE ON DATABASE {} TO {}").format(
            sql.Identifier(database), sql.Identifier(current_role(cursor))
        )
        raise PrivilegeError(
            f"This role may not make the publication {PUBLICATION!r}, which WAL delivery needs. "
            "Run `pgsignals install --delivery wal` as a role that may and start with "
            f'install="check", or have the owner run: {grant.as_string(cursor)}.'
        ) from error
