"""Watchers that are served by rows of the write-ahead log, without a trigger.

Their tables are in a publication of ours. A function that nothing calls marks each of them, so that
they are found, compared and removed like triggers.
"""

from __future__ import annotations

from collections.abc import Sequence

from psycopg2 import sql

from . import names
from .bodies.common import TABLES
from .publications import creating_publications, publishing
from .quoting import dollar_quoted, literal, rendered
from .sql import (
    FORMAT,
    Specification,
    Trigger,
    creating,
    fields,
    layout_of,
    publication_of,
    registration,
    tagging,
)


def compile_rows(spec: Specification) -> Trigger:
    """Return what serves ``spec`` by rows: a mark and a publication in place of a trigger."""
    columns = (*spec.table.key_columns, *spec.tracked)
    hashed = names.digest(
        "rows",
        str(FORMAT),
        spec.namespace,
        spec.table.schema,
        spec.table.name,
        spec.op,
        str(spec.replicated),
        spec.label or "",
        spec.model,
        repr(spec.table.only),
        repr([column.name for column in columns]),
        repr(fields(columns)),
        repr([column.name for column in spec.columns]),
    )
    body = (
        "BEGIN\n"
        "  -- Nothing calls this: it marks that the rows of these tables are read from the log.\n"
        f"  PERFORM '{TABLES}'::pg_catalog.oid[];\n"
        "  RETURN NULL;\n"
        "END"
    )
    return Trigger(spec, hashed, body, lambda: _creation(spec, hashed, body))


def _creation(spec: Specification, hashed: str, body: str) -> list[str]:
    """Return the statements that mark a function, and publish the tables that it marks."""
    name = names.object_name(hashed)
    function = sql.Identifier(spec.table.schema, name)
    made = sql.SQL("CREATE FUNCTION {}() RETURNS trigger LANGUAGE plpgsql\n  AS {}").format(
        function, sql.SQL(dollar_quoted(body))
    )
    quoted = [rendered(sql.Identifier(each.schema, each.name)) for each in spec.relations]
    published = publication_of(spec.op)
    create: list[str] = [
        *creating_publications(),
        # Writers that wrote before have ended: otherwise their transactions would come in part.
        *(f"LOCK TABLE {each} IN SHARE ROW EXCLUSIVE MODE" for each in quoted),
        creating(rendered(made), quoted, TABLES),
        rendered(tagging(spec, hashed)),
        *(publishing(each, published) for each in quoted),
    ]
    create += [
        rendered(each)
        for each in registration(
            spec.table.schema,
            hashed,
            layout_of(spec, hashed).encode(),
            spec.transport,
            serving(quoted),
        )
    ]
    return create


def serving(tables: Sequence[str]) -> str:
    """Return the query for ``registration`` that gives these tables, by their quoted names."""
    oids = ", ".join(f"{literal(each)}::pg_catalog.regclass::pg_catalog.oid" for each in tables)
    # Names may have braces, too.
    oids = oids.replace("{", "{{").replace("}", "}}")
    return (
        "SELECT ({channel})::bigint, relation\n"
        f"  FROM pg_catalog.unnest(ARRAY[{oids}]) AS t (relation)"
    )
