"""Decides which watchers of the write-ahead log rows can serve, and says what others lack."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from psycopg2.extensions import cursor as Cursor

from ..core.tables import Column, Relation
from .publications import HAS_IDENTITY, IDENTITY_COLUMNS, IS_IDENTITY, parts
from .sql import Specification

# Types of pg_catalog each of whose values has one text: two values are equal if their texts are.
_SPELT = frozenset(("text", "varchar", "name", "int2", "int4", "int8"))
_EXACT = frozenset(
    "bool int2 int4 int8 text varchar name uuid date timestamp timestamptz time bytea oid xid8 "  # noqa: SIM905
    "inet cidr macaddr macaddr8 pg_lsn bit varbit".split()
)


@dataclass(frozen=True)
class Identity:
    """What the log has of a table's old rows, and what it has not of new ones.

    ``columns`` are those of the replica identity, and of those of all partitions: None without one,
    and ``full`` for all. ``unfit`` says which table could not be updated any more if this one were
    published, and why. ``generated`` columns are not in the log. Texts of ``loose`` columns may be
    equal though they differ. ``logged``: there are rows of the table in the log, and of all
    partitions. ``part``: it is a partition.
    """

    columns: frozenset[str] | None
    full: bool
    unfit: str
    generated: frozenset[str]
    loose: frozenset[str]
    logged: bool
    part: bool


# A row for each table, and then one for each of its partitions that has rows.
_IDENTITIES = f"""
SELECT member.root, pg_catalog.concat(n.nspname, '.', c.relname), c.relreplident = 'f',
       (SELECT pg_catalog.array_agg(a.attname::text)
        FROM pg_catalog.pg_index i
        JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum = ANY ({IDENTITY_COLUMNS})
        WHERE {IS_IDENTITY}),
       {HAS_IDENTITY},
       ARRAY(SELECT a.attname::text FROM pg_catalog.pg_attribute a
             WHERE a.attrelid = c.oid AND a.attnum > 0 AND a.attgenerated <> ''
               AND NOT a.attisdropped),
       ARRAY(SELECT a.attname::text FROM pg_catalog.pg_attribute a
             JOIN pg_catalog.pg_collation l ON l.oid = a.attcollation
             WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
               AND NOT l.collisdeterministic),
       c.relpersistence = 'p' AND c.relkind IN ('r', 'p'), c.relispartition
FROM ({parts("SELECT pg_catalog.unnest(%s::pg_catalog.oid[])")}) AS member
JOIN pg_catalog.pg_class c ON c.oid = member.oid AND (c.oid = member.root OR c.relkind <> 'p')
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
ORDER BY c.oid <> member.root, c.oid
"""


def identities(cursor: Cursor, relations: Collection[int]) -> dict[int, Identity]:
    """Return the identities of the tables with these OIDs."""
    if not relations:
        return {}
    cursor.execute(_IDENTITIES, (list(relations),))
    found: dict[int, Identity] = {}
    for oid, place, full, columns, fit, generated, loose, logged, part in cursor.fetchall():
        unfit = "" if fit else f"{place} has no replica identity"
        if not fit and (full or columns is not None):
            unfit = f"{place} has a computed column in its replica identity"
        each = Identity(
            None if columns is None else frozenset(columns),
            full,
            unfit,
            frozenset(generated),
            frozenset(loose),
            logged,
            part,
        )
        found[oid] = _weakest(found[oid], each) if oid in found else each
    return found


def _weakest(whole: Identity, part: Identity) -> Identity:
    """Return what the log has of a table of which ``part`` is a partition."""
    columns = whole.columns
    if columns is not None and not part.full:
        columns &= part.columns or frozenset()
    return replace(
        whole,
        columns=columns,
        unfit=whole.unfit or part.unfit,
        logged=whole.logged and part.logged,
    )


def why_not_rows(spec: Specification, known: Mapping[int, Identity]) -> str:
    """Return what rows lack for a watcher's operation; empty if they can serve it."""
    if spec.when is not None:
        return "when= is asked of rows as the writer's transaction sees them"
    for each in spec.relations:
        identity = known.get(each.oid)
        if identity is None:
            return f"{each.schema}.{each.name} has gone"
        if lacking := _lacking(spec, each, identity):
            return lacking
    return ""


def _lacking(spec: Specification, table: Relation, identity: Identity) -> str:
    place = f"{table.schema}.{table.name}"
    if not identity.logged:
        return (
            f"{place} is not in the log, since it, or a partition, is unlogged or a foreign table"
        )
    if identity.part:
        return f"{place} is a partition, whose rows come under the name of the whole table"
    if spec.op == "truncated":
        return ""
    wanted = {column.name for column in (*spec.table.key_columns, *spec.tracked)}
    if spec.table.only is not None:
        wanted.add(spec.table.only[0])
    if computed := wanted & identity.generated:
        return f"{place} computes {min(computed)!r}, which is not in the log"
    if spec.table.only is not None and not _spelt(_named(spec, spec.table.only[0]), identity):
        return f"the model's own rows are known by {spec.table.only[0]!r}, whose text may vary"
    if spec.op == "inserted":
        return ""
    return _lacking_identity(spec, place, identity)


def _lacking_identity(spec: Specification, place: str, identity: Identity) -> str:
    if identity.unfit:
        return f"{identity.unfit}, so that publishing it would break its UPDATEs"
    full = identity.full and not spec.table.partitioned
    if identity.columns is None and not full:
        return f"{place} has REPLICA IDENTITY FULL, which is not that of its partitions"
    if full:
        compared = (*spec.table.key_columns, *spec.tracked) if spec.op == "updated" else ()
    else:
        if spec.tracked or spec.table.only is not None:
            return f"{place} has no REPLICA IDENTITY FULL, and old values are asked for"
        key = {column.name for column in spec.table.key_columns}
        if missing := key - (identity.columns or set()):
            return f"the replica identity of {place} lacks {min(missing)!r} of the key"
        compared = spec.table.key_columns if spec.op == "updated" else ()
    for column in compared:
        if not _exact(column, identity):
            return f"only PostgreSQL can tell whether {column.name!r} differs: its text may vary"
    return ""


def _named(spec: Specification, name: str) -> Column:
    return next(column for column in spec.table.columns if column.name == name)


def _spelt(column: Column, identity: Identity) -> bool:
    """Whether each value of the column has one text, which is also that of Python's value."""
    schema, base_type = column.base_type
    return column.name not in identity.loose and schema == "pg_catalog" and base_type in _SPELT


def _exact(column: Column, identity: Identity) -> bool:
    """Whether values of the column are equal exactly if their texts are."""
    if column.name in identity.loose:
        return False
    # Values of other types are compared by their texts anyway.
    schema, base_type = column.base_type
    return not column.comparable or (schema == "pg_catalog" and base_type in _EXACT)
