"""Reads every trigger of ours in a database, in all namespaces, and tells them apart."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from psycopg2 import sql
from psycopg2.extensions import cursor as Cursor

from ..core.errors import DatabaseError
from ..core.transport import Transport
from ..triggers.catalogue import Installed, read_installed
from ..triggers.installer import judge
from ..triggers.names import channel_key
from .model import WatcherState

# As triggers/sql.py writes the condition of a watcher, which nothing else in a body looks like.
_CONDITION = re.compile(r"(?:WHERE|AND) \(\n(.*?)\n\)", re.DOTALL)


def read_watchers(
    cursor: Cursor, consumers: Mapping[int, Sequence[str]] | None = None
) -> tuple[list[WatcherState], list[Installed]]:
    """Return the state of every watcher in the database, and the same as the catalogue has them.

    ``consumers`` are the names of those that read a channel, by its number.
    """
    installed = read_installed(cursor, None)
    return judge_all(installed, consumers or {}), installed


def judge_all(
    installed: Sequence[Installed], consumers: Mapping[int, Sequence[str]]
) -> list[WatcherState]:
    """Return the states of what is installed. Pure."""
    same: dict[object, list[str]] = defaultdict(list)
    for item in installed:
        same[_work(item)].append(item.name)
    found = []
    for item in installed:
        state = judge(item)
        condition = _CONDITION.search(item.body)
        found.append(
            WatcherState(
                name=item.name,
                namespace=item.tag.namespace,
                delivery=item.transport.value,
                served=state.served,
                schema=item.schema,
                table=item.table,
                op=item.tag.op,
                label=item.tag.label,
                columns=item.tag.columns,
                condition="" if condition is None else condition[1],
                owner=item.owner,
                status=state.status,
                detail=state.detail or ("nobody listens" if not item.in_use else ""),
                listeners=item.listeners,
                consumers=tuple(sorted(consumers.get(channel_key(item.hash), ()))),
                twins=tuple(name for name in same[_work(item)] if name != item.name),
            )
        )
    return found


def _work(item: Installed) -> object:
    """Return a value that triggers have in common that do the same for the same tables.

    Only their own names differ: of the function, and of its channel in a log.
    """
    if not item.fired:
        return item.name
    body = item.body.replace(item.name, "").replace(str(channel_key(item.hash)), "")
    tables = tuple(sorted(each.oid for each in item.fired))
    return item.transport, item.tag.op, item.tag.rows, item.tag.columns, tables, body


def read_definition(cursor: Cursor, name: str) -> str:
    """Return the SQL of a trigger and its function. Raises DatabaseError if it is not ours."""
    items = [item for item in read_installed(cursor, None, [name]) if item.name == name]
    if not items:
        raise DatabaseError(f"There is no trigger {name!r} of ours.")
    [item, *_] = items
    function = sql.Identifier(item.function_schema, item.name).as_string(cursor)
    cursor.execute(
        "SELECT pg_catalog.pg_get_functiondef(p.oid), ARRAY("
        "  SELECT pg_catalog.pg_get_triggerdef(t.oid, true) FROM pg_catalog.pg_trigger AS t"
        "  WHERE t.tgfoid = p.oid AND t.tgparentid = 0 ORDER BY t.tgrelid)"
        " FROM pg_catalog.pg_proc AS p WHERE p.oid = %s::pg_catalog.regprocedure",
        (f"{function}()",),
    )
    [(body, triggers)] = cursor.fetchall()
    if item.transport is Transport.WAL and item.tag.rows:
        tables = ", ".join(f"{each.schema}.{each.table}" for each in item.fired) or "no table"
        return (
            f"-- Rows of the write-ahead log serve it: {tables} in a publication of ours.\n{body}"
        )
    return "\n\n".join(f"{each};" for each in (*triggers, body.rstrip()))
