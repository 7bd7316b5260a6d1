"""What is installed: our tagged functions and their triggers as the catalogue has them."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
from psycopg2.extensions import cursor as Cursor

from . import names


class Tag(msgspec.Struct, frozen=True, rename={"format": "pgsignals"}):
    """The COMMENT that marks a function as ours and says what it is for."""

    format: int
    namespace: str
    op: str
    label: str | None
    hash: str
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Installed:
    """One function of ours and its trigger; both have the same ``name``.

    ``schema`` and ``table`` are where the trigger is now: a table may have been renamed or moved
    since. Without a trigger ``table`` is None, and ``schema`` the function's. ``durable``: it
    writes to the outbox. ``consumed``: a durable consumer, which may be down now, reads that.
    """

    tag: Tag
    function_schema: str
    schema: str
    table: str | None
    name: str
    enabled: str
    body: str
    missing_columns: tuple[str, ...]
    listeners: int
    consumed: bool = False
    durable: bool = False

    @property
    def in_use(self) -> bool:
        """Whether somebody would miss events without it."""
        return self.listeners > 0 or self.consumed

    @property
    def hash(self) -> str:
        """The hash that the names carry."""
        return self.tag.hash


_tags = msgspec.json.Decoder(Tag)

# Only functions carry a tag: to comment on a trigger one must own the table, while TRIGGER is all
# it takes to create one. The clones that PostgreSQL keeps in partitions have a parent.
_FUNCTIONS = """
SELECT DISTINCT ON (f.nspname, p.proname)
       d.description, f.nspname, coalesce(n.nspname, f.nspname), c.relname, p.proname,
       coalesce(t.tgenabled, 'O'), p.prosrc,
       ARRAY(SELECT a.attname::text FROM pg_catalog.pg_attribute a
             WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped),
       p.prosecdef
FROM pg_catalog.pg_proc p
JOIN pg_catalog.pg_namespace f ON f.oid = p.pronamespace
JOIN pg_catalog.pg_description d
  ON d.objoid = p.oid AND d.classoid = 'pg_catalog.pg_proc'::pg_catalog.regclass
LEFT JOIN pg_catalog.pg_trigger t
  ON t.tgfoid = p.oid AND t.tgname = p.proname AND t.tgparentid = 0
LEFT JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid
LEFT JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE p.proname LIKE 'pgsignals\\_%' AND p.pronargs = 0
ORDER BY f.nspname, p.proname, t.oid
"""

# Advisory keys are 32-bit numbers that pg_locks shows as unsigned oids.
_LISTENERS = """
SELECT l.objid::bigint, count(DISTINCT l.pid)
FROM pg_catalog.pg_locks l
WHERE l.locktype = 'advisory' AND l.classid = %s AND l.objsubid = 2 AND l.granted
  AND l.mode = 'ShareLock'
  AND l.database = (SELECT oid FROM pg_catalog.pg_database
                    WHERE datname = pg_catalog.current_database())
GROUP BY 1
"""


def _read_consumed(cursor: Cursor) -> set[int] | None:
    """The channels that durable consumers read; None where this role may not know."""
    cursor.execute(
        "SELECT pg_catalog.has_schema_privilege(n.oid, 'USAGE')"
        " AND pg_catalog.has_table_privilege(c.oid, 'SELECT')"
        " FROM pg_catalog.pg_namespace n"
        " JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = 'consumers'"
        " WHERE n.nspname = 'pgsignals'"
    )
    row = cursor.fetchone()
    if row is None:
        return set()
    if not row[0]:
        return None
    cursor.execute(
        "SELECT pg_catalog.unnest(channels) FROM pgsignals.consumers WHERE NOT ephemeral"
    )
    return {channel for (channel,) in cursor.fetchall()}


def read_installed(cursor: Cursor, namespace: str | None) -> list[Installed]:
    """Our functions of one namespace, or of all, with their triggers, by table and operation.

    What does not carry a tag of ours is never returned, whatever its name.
    """
    cursor.execute(_LISTENERS, (names.LOCK_CLASS,))
    listeners = {int(key): int(count) for key, count in cursor.fetchall()}
    channels = _read_consumed(cursor)
    cursor.execute(_FUNCTIONS)
    found = []
    for (
        description,
        home,
        schema,
        table,
        name,
        enabled,
        body,
        columns,
        durable,
    ) in cursor.fetchall():
        try:
            tag = _tags.decode(description)
        except (msgspec.MsgspecError, RecursionError):
            continue
        if namespace not in (None, tag.namespace) or name != names.object_name(tag.hash):
            continue
        gone = () if table is None else tuple(c for c in tag.columns if c not in columns)
        key = names.lock_key(tag.hash) & 0xFFFFFFFF
        # Who may not know leaves every trigger alone that writes to the outbox.
        consumed = durable and (channels is None or names.channel_key(tag.hash) in channels)
        count = listeners.get(key, 0)
        found.append(
            Installed(tag, home, schema, table, name, enabled, body, gone, count, consumed, durable)
        )
    return sorted(found, key=lambda item: (item.schema, item.table or "", item.tag.op, item.name))
