"""Reads what is installed: our tagged functions and their triggers, as the catalogue has them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter

import msgspec
from psycopg2.extensions import cursor as Cursor

from ..core.transport import Delivery, Transport
from . import names
from .bodies.common import TABLES
from .publications import Published, read_published
from .sql import publication_of


class Tag(msgspec.Struct, frozen=True, rename={"format": "pgsignals"}):
    """The COMMENT that marks a function as ours and says what it is for."""

    format: int
    namespace: str
    op: str
    label: str | None
    hash: str
    delivery: Delivery | None = None
    rows: bool = False
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fired:
    """A table that has the trigger, and whether it fires: ``enabled`` as in ``pg_trigger``."""

    oid: int
    schema: str
    table: str
    enabled: str
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Installed:
    """One function of ours and its triggers; all have the same ``name``.

    A function with ``rows`` in its tag has no triggers: its tables are in a publication of ours.

    ``body`` is the function's text without the OIDs of the tables that it was ``made_for``.
    ``fired`` are the tables that have the trigger now, without partitions. It writes to
    ``transport``, and is ``able`` to, unless its owner lacks a right. ``consumed``: a durable
    consumer, which may be down now, reads what it writes. In the partitions ``silent_parts`` the
    trigger is disabled, or fires at other times than the table's.
    """

    tag: Tag
    function_schema: str
    name: str
    body: str
    made_for: tuple[int, ...]
    fired: tuple[Fired, ...]
    listeners: int
    consumed: bool = False
    transport: Transport = Transport.NOTIFY
    able: bool = True
    owner: str = ""
    silent_parts: tuple[str, ...] = ()

    @cached_property
    def main(self) -> Fired | None:
        """The watched table, or another that has the trigger; None without one."""
        own = self.made_for[:1]
        ours = [each for each in self.fired if own == (each.oid,)]
        return next(iter(ours or self.fired), None)

    @property
    def schema(self) -> str:
        """The present schema of the table, which may have been moved since."""
        return self.function_schema if self.main is None else self.main.schema

    @property
    def table(self) -> str | None:
        """The present name of the table; None without a trigger."""
        return None if self.main is None else self.main.table

    @property
    def copied(self) -> bool:
        """Whether the trigger came with a copy of its table (a restore, say), and sends nothing."""
        known = bool(self.made_for and self.fired)
        return known and all(each.oid not in self.made_for for each in self.fired)

    @property
    def missing_columns(self) -> tuple[str, ...]:
        """The columns that the trigger reads, and that the table does not have any more."""
        if self.main is None:
            return ()
        return tuple(c for c in self.tag.columns if c not in self.main.columns)

    @property
    def in_use(self) -> bool:
        """Whether a listener or consumer would miss events without the trigger."""
        return not self.copied and (self.listeners > 0 or self.consumed)

    @property
    def hash(self) -> str:
        """The hash in the names of the function and the trigger."""
        return self.tag.hash


_tags = msgspec.json.Decoder(Tag)

# The first match in a function's text is ours; a watcher's condition may have others.
_TABLES = re.compile(r"'\{([^'}]*)\}+'::pg_catalog\.oid\[\]")

# Only functions carry a tag: commenting on a trigger takes owning the table, creating it only the
# TRIGGER privilege. ``tgparentid = 0`` leaves out the clones that PostgreSQL keeps in partitions.
#
# Each row is of a function, or of one of its triggers. Joined here, since no index has a trigger's
# function, they would be read once for each other where the planner knows them to be few. In one
# query, so that all are of one moment.
_FUNCTIONS = """
SELECT p.oid, p.proname, true, f.nspname, d.description, p.prosrc, p.prosecdef,
       pg_catalog.pg_get_userbyid(p.proowner), NULL::oid, NULL::text, NULL::text, NULL::text[],
       0::oid
FROM pg_catalog.pg_proc p
JOIN pg_catalog.pg_namespace f ON f.oid = p.pronamespace
JOIN pg_catalog.pg_description d
  ON d.objoid = p.oid AND d.classoid = 'pg_catalog.pg_proc'::pg_catalog.regclass
WHERE p.proname LIKE 'pgsignals\\_%%' AND p.pronargs = 0
  AND (%(names)s::pg_catalog.name[] IS NULL OR p.proname = ANY (%(names)s::pg_catalog.name[]))
UNION ALL
SELECT t.tgfoid, t.tgname, false, n.nspname, NULL, NULL, NULL, NULL,
       c.oid, c.relname, t.tgenabled::text,
       ARRAY(SELECT a.attname::text FROM pg_catalog.pg_attribute a
             WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
               AND a.attgenerated <> 'v'), t.oid
FROM pg_catalog.pg_trigger t
JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE t.tgname LIKE 'pgsignals\\_%%' AND t.tgparentid = 0
  AND (%(names)s::pg_catalog.name[] IS NULL OR t.tgname = ANY (%(names)s::pg_catalog.name[]))
"""

# A partition's trigger can be disabled, or made to fire for replicas only, by itself.
_SILENT_PARTS = """
SELECT t.tgfoid, pg_catalog.array_agg(t.tgrelid::pg_catalog.regclass::text ORDER BY t.tgrelid)
FROM pg_catalog.pg_trigger t JOIN pg_catalog.pg_trigger p ON p.oid = t.tgparentid
WHERE t.tgenabled <> p.tgenabled AND t.tgname LIKE 'pgsignals\\_%%'
  AND (%(names)s::pg_catalog.name[] IS NULL OR t.tgname = ANY (%(names)s::pg_catalog.name[]))
GROUP BY 1
"""

# Advisory keys are 32-bit numbers that pg_locks shows as unsigned oids.
_LISTENERS = """
SELECT l.pid, pg_catalog.array_agg(l.objid::bigint)
FROM pg_catalog.pg_locks l
WHERE l.locktype = 'advisory' AND l.classid = %s AND l.objsubid = 2 AND l.granted
  AND l.mode = 'ShareLock'
  AND l.database = (SELECT oid FROM pg_catalog.pg_database
                    WHERE datname = pg_catalog.current_database())
GROUP BY 1
"""

# The relations of the schema without a right on which a trigger's function could only say that it
# cannot write.
_WRITTEN: Mapping[Transport, Sequence[tuple[str, str]]] = {
    Transport.OUTBOX: (("outbox", "INSERT"), ("outbox_id", "UPDATE")),
    Transport.WAL: (("wal_secret", "SELECT"),),
}

_ABLE = """
SELECT r.rolname, pg_catalog.bool_and(
  pg_catalog.has_schema_privilege(r.oid, n.oid, 'USAGE')
  AND CASE c.relkind WHEN 'S' THEN pg_catalog.has_sequence_privilege(r.oid, c.oid, needed.right)
      ELSE pg_catalog.has_table_privilege(r.oid, c.oid, needed.right) END)
FROM pg_catalog.pg_roles r
JOIN pg_catalog.pg_namespace n ON n.nspname = 'pgsignals'
CROSS JOIN ROWS FROM (pg_catalog.unnest(%s::pg_catalog.name[]), pg_catalog.unnest(%s::text[]))
  AS needed (name, "right")
JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = needed.name
WHERE r.rolname = ANY (%s)
GROUP BY 1 HAVING pg_catalog.count(*) = %s
"""


def _read_consumed(cursor: Cursor) -> set[int] | None:
    """Return the channels that durable consumers read; None if this role may not read them."""
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


def normalized(body: str) -> str:
    """Return a function's text without the OIDs of the tables that it was made for."""
    return _TABLES.sub(f"'{TABLES}'::pg_catalog.oid[]", body)


def _made_for(body: str) -> tuple[int, ...]:
    found = _TABLES.search(body)
    return tuple(int(each) for each in found[1].split(",") if each.isdecimal()) if found else ()


def read_listeners(cursor: Cursor) -> list[list[int]]:
    """Return, for each session that listens, the keys for ``names.listens``."""
    cursor.execute(_LISTENERS, (names.LISTENER_CLASS,))
    return [keys for _, keys in cursor.fetchall()]


def read_installed(
    cursor: Cursor, namespace: str | None, named: Collection[str] | None = None
) -> list[Installed]:
    """Return our functions of a namespace, or of all, with their triggers, by table and operation.

    ``named`` narrows them to these names. A function without a tag of ours is never among them,
    whatever its name.
    """
    listeners = [names.marks_of(keys) for keys in read_listeners(cursor)]
    channels = _read_consumed(cursor)
    parameters = {"names": None if named is None else list(named)}
    cursor.execute(_FUNCTIONS, parameters)
    functions, triggers = [], defaultdict(list)
    for oid, name, of_function, *row, _ in sorted(cursor.fetchall(), key=itemgetter(-1)):
        if of_function:
            functions.append((oid, name, *row))
        else:
            home, *_, table_oid, table, enabled, columns = row
            triggers[oid, name].append(Fired(table_oid, home, table, enabled, tuple(columns)))
    cursor.execute(_SILENT_PARTS, parameters)
    silent = dict(cursor.fetchall())
    owners = {owner for *_, durable, owner, _, _, _, _ in functions if durable}
    able = {each: _read_able(cursor, owners, each) for each in _WRITTEN}
    found = []
    published: Published | None = None
    for oid, name, home, description, body, durable, owner, *_ in functions:
        try:
            tag = _tags.decode(description)
        except (msgspec.MsgspecError, RecursionError):
            continue
        # Functions of before the first release do not say.
        transport = Transport(tag.delivery or ("outbox" if durable else "notify"))
        if namespace not in (None, tag.namespace) or name != names.object_name(tag.hash):
            continue
        fired = tuple(triggers[oid, name])
        if tag.rows:
            published = read_published(cursor) if published is None else published
            fired = _published(published, tag.op, _made_for(body))
        found.append(
            Installed(
                tag=tag,
                function_schema=home,
                name=name,
                body=normalized(body),
                made_for=_made_for(body),
                fired=fired,
                listeners=sum(names.marked(marks, tag.hash) for marks in listeners),
                # A role that may not read the consumers takes every trigger on the outbox for
                # consumed: otherwise it could remove one that a consumer needs.
                consumed=transport.durable
                and (channels is None or names.channel_key(tag.hash) in channels),
                transport=transport,
                able=not durable or able[transport].get(owner, False),
                owner=owner,
                silent_parts=tuple(silent.get(oid, ())),
            )
        )
    return sorted(found, key=lambda item: (item.schema, item.table or "", item.tag.op, item.name))


def _published(published: Published, op: str, oids: Sequence[int]) -> tuple[Fired, ...]:
    """Return those of the tables that are in the publication of an operation."""
    found = ((oid, published.get((publication_of(op), oid))) for oid in oids)
    return tuple(Fired(oid, each[0], each[1], "O", tuple(each[2])) for oid, each in found if each)


def _read_able(cursor: Cursor, owners: Set[str], transport: Transport) -> dict[str, bool]:
    """Return, for each of these owners of functions, whether it may write to the transport."""
    if not owners:
        return {}
    needed = _WRITTEN[transport]
    named, rights = [name for name, _ in needed], [right for _, right in needed]
    cursor.execute(_ABLE, (named, rights, list(owners), len(needed)))
    return dict(cursor.fetchall())
