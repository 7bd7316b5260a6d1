"""What is installed: our tagged triggers and functions as the catalogue has them."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
from psycopg2.extensions import cursor as Cursor

from . import names


class Tag(msgspec.Struct, frozen=True, rename={"format": "pgsignals"}):
    """The COMMENT that marks an object as ours and says what it is for."""

    format: int
    namespace: str
    op: str
    label: str | None
    hash: str
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Installed:
    """One trigger of ours; ``table`` None for a function whose table is gone."""

    tag: Tag
    schema: str
    table: str | None
    name: str
    enabled: str
    body: str
    missing_columns: tuple[str, ...]
    listeners: int

    @property
    def hash(self) -> str:
        """The hash that the names carry."""
        return self.tag.hash


_tags = msgspec.json.Decoder(Tag)

_TRIGGERS = """
SELECT d.description, n.nspname, c.relname, t.tgname, t.tgenabled, p.prosrc,
       ARRAY(SELECT a.attname::text FROM pg_catalog.pg_attribute a
             WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped)
FROM pg_catalog.pg_trigger t
JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid AND p.pronamespace = c.relnamespace
JOIN pg_catalog.pg_description d
  ON d.objoid = t.oid AND d.classoid = 'pg_catalog.pg_trigger'::pg_catalog.regclass
WHERE t.tgparentid = 0 AND t.tgname LIKE 'pgsignals\\_%'
UNION ALL
SELECT d.description, n.nspname, NULL, p.proname, 'O', p.prosrc, NULL
FROM pg_catalog.pg_proc p
JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
JOIN pg_catalog.pg_description d
  ON d.objoid = p.oid AND d.classoid = 'pg_catalog.pg_proc'::pg_catalog.regclass
WHERE p.proname LIKE 'pgsignals\\_%'
  AND NOT EXISTS (SELECT FROM pg_catalog.pg_trigger t WHERE t.tgfoid = p.oid)
ORDER BY 2, 3, 4
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


def read_installed(cursor: Cursor, namespace: str) -> list[Installed]:
    """Our triggers, and functions left over, of one namespace.

    What does not carry a tag of ours is never returned, whatever its name.
    """
    cursor.execute(_LISTENERS, (names.LOCK_CLASS,))
    listeners = {int(key): int(count) for key, count in cursor.fetchall()}
    cursor.execute(_TRIGGERS)
    found = []
    for description, schema, table, name, enabled, body, columns in cursor.fetchall():
        try:
            tag = _tags.decode(description)
        except (msgspec.MsgspecError, RecursionError):
            continue
        if tag.namespace != namespace or name != names.object_name(tag.hash):
            continue
        gone = () if columns is None else tuple(c for c in tag.columns if c not in columns)
        key = names.lock_key(tag.hash) & 0xFFFFFFFF
        found.append(
            Installed(tag, schema, table, name, enabled, body, gone, listeners.get(key, 0))
        )
    return found
