"""Finds a model's table: its name by the resolvers, all else by PostgreSQL's catalogue."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from psycopg2.extensions import cursor as Cursor

from ..core.errors import ModelError, PgSignalsError, TableError, near
from ..core.redaction import described, legible
from ..core.tables import Column, Relation, Resolver, Table, TableRef
from ..core.watchers import OPERATIONS
from ..postgres.home_check import check_home

_KINDS = {
    "v": "a view: watch the tables that it reads",
    "m": "a materialized view: watch the tables that it reads",
    "f": "a foreign table: run pgsignals on the server that holds the rows",
    "i": "an index: watch its table",
    "I": "an index: watch its table",
    "S": "a sequence: watch the table that uses it",
    "c": "a composite type: watch a table",
    "t": "a TOAST table: watch the table it belongs to",
}


# Types of pg_catalog whose `=` is a real equality; values of others are compared by their texts.
_COMPARABLE = frozenset(
    "bool int2 int4 int8 float4 float8 numeric money text varchar bpchar name char bytea date time "  # noqa: SIM905
    "timetz timestamp timestamptz interval uuid inet cidr macaddr macaddr8 bit varbit jsonb oid "
    "pg_lsn tsvector xid8".split()
)
# Types of pg_catalog whose text does not depend on the writing session's settings.
_SETTLED = frozenset(
    "bool int2 int4 int8 numeric text varchar bpchar name char uuid inet cidr macaddr macaddr8 bit "  # noqa: SIM905
    "varbit json jsonb jsonpath oid xid xid8 cid tid pg_lsn tsvector tsquery".split()
)


def resolve(model: object, resolvers: Sequence[Resolver]) -> tuple[TableRef, Resolver]:
    """Return the model's table by the first resolver that knows the model, and that resolver.

    Raises ModelError when none does.
    """
    for resolver in resolvers:
        try:
            ref = resolver.resolve(model)
        except PgSignalsError:
            raise
        # A plugin may raise anything, of a table that changed, say: a running source must only see
        # our errors, which do not stop it.
        except Exception as error:
            name = legible(str(resolver.name), 100)
            raise ModelError(
                f"The resolver {name} cannot tell the table of a model: {described(error)}"
            ) from error
        if ref is not None:
            return ref, resolver
    if _resolves(type(model), resolvers):
        raise ModelError(
            f"{legible(repr(model), 200)} is an instance of {type(model).__name__}: give the class."
        )
    raise ModelError(
        f"{model!r} is not something that pgsignals can watch. Give an SQLAlchemy, SQLModel, "
        "Flask-SQLAlchemy or Django model, an sqlalchemy.Table, or a name such as 'orders' or "
        "'public.orders'; resolvers present: "
        f"{', '.join(resolver.name for resolver in resolvers)}."
    )


def _resolves(kind: type, resolvers: Sequence[Resolver]) -> bool:
    try:
        return any(resolver.resolve(kind) is not None for resolver in resolvers)
    # Of a class that is no model, or one without a table, a plugin may raise anything.
    except Exception:
        return False


# Each of these asks about all tables at once: hundreds of round trips would take seconds.
_FIND = """
SELECT given.number, c.oid, n.nspname, c.relname, c.relkind,
       EXISTS (SELECT FROM pg_catalog.pg_inherits i WHERE i.inhrelid = c.oid)
FROM ROWS FROM (pg_catalog.unnest(%(names)s::pg_catalog.name[]),
                pg_catalog.unnest(%(schemas)s::pg_catalog.name[]))
  WITH ORDINALITY AS given (name, schema, number)
JOIN pg_catalog.pg_class c ON c.relname = given.name
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE CASE WHEN given.schema IS NULL THEN pg_catalog.pg_table_is_visible(c.oid)
           ELSE n.nspname = given.schema END
"""


_FAMILY = """
WITH RECURSIVE family AS (
    SELECT i.inhparent AS head, i.inhrelid AS relation FROM pg_catalog.pg_inherits i
    WHERE i.inhparent = ANY (%(oids)s::pg_catalog.oid[])
  UNION
    SELECT f.head, i.inhrelid
    FROM family f JOIN pg_catalog.pg_inherits i ON i.inhparent = f.relation
)
SELECT f.head, n.nspname, c.relname, c.oid
FROM family f JOIN pg_catalog.pg_class c ON c.oid = f.relation
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relpersistence <> 't' AND NOT c.relispartition
ORDER BY c.oid
"""


_NAMES = """
SELECT CASE WHEN %(schema)s IS NULL AND pg_catalog.pg_table_is_visible(c.oid) THEN c.relname
            ELSE n.nspname || '.' || c.relname END
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p') AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast')
LIMIT 5000
"""


# Follows domains down to the type that a query's result has, and arrays to their elements.
_COLUMNS = """
WITH RECURSIVE base AS (
    SELECT a.attrelid, a.attnum, a.atttypid AS typid FROM pg_catalog.pg_attribute a
    WHERE a.attrelid = ANY (%(oids)s::pg_catalog.oid[]) AND a.attnum > 0 AND NOT a.attisdropped
  UNION ALL
    SELECT b.attrelid, b.attnum, t.typbasetype FROM base b
    JOIN pg_catalog.pg_type t ON t.oid = b.typid WHERE t.typtype = 'd'
)
SELECT a.attrelid, a.attname, t.oid, tn.nspname, t.typname,
       pn.nspname, p.proname, a.atttypid <> t.oid,
       CASE WHEN t.typcategory = 'A' AND t.typelem <> 0 THEN e.typname ELSE t.typname END,
       CASE WHEN t.typcategory = 'A' AND t.typelem <> 0 THEN en.nspname ELSE tn.nspname END,
       CASE WHEN t.typcategory = 'A' AND t.typelem <> 0 THEN e.typtype ELSE t.typtype END,
       a.attgenerated = 'v'
FROM base b
JOIN pg_catalog.pg_attribute a ON a.attrelid = b.attrelid AND a.attnum = b.attnum
JOIN pg_catalog.pg_type t ON t.oid = b.typid AND t.typtype <> 'd'
JOIN pg_catalog.pg_namespace tn ON tn.oid = t.typnamespace
JOIN pg_catalog.pg_proc p ON p.oid = t.typoutput
JOIN pg_catalog.pg_namespace pn ON pn.oid = p.pronamespace
LEFT JOIN pg_catalog.pg_type e ON e.oid = t.typelem
LEFT JOIN pg_catalog.pg_namespace en ON en.oid = e.typnamespace
ORDER BY a.attrelid, a.attnum
"""


_KEY = """
SELECT i.indrelid, a.attname
FROM pg_catalog.pg_index i
CROSS JOIN LATERAL pg_catalog.unnest(i.indkey::pg_catalog.int2[])
  WITH ORDINALITY AS k(attnum, position)
JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
WHERE i.indrelid = ANY (%(oids)s::pg_catalog.oid[])
  AND i.indisprimary AND k.position <= i.indnkeyatts
ORDER BY i.indrelid, k.position
"""


def describe(cursor: Cursor, ref: TableRef) -> Table:
    """Return the table as the catalogue of ``cursor``'s database describes it.

    Raises TableError when there is no such table, or when it cannot have triggers; ModelError when
    the model is of another database.
    """
    return describe_all(cursor, [ref])[0]


def describe_all(cursor: Cursor, refs: Sequence[TableRef]) -> list[Table]:
    """The tables as the catalogue describes them, in their order; raises what ``describe`` does."""
    if not refs:
        return []
    names, schemas = [ref.name for ref in refs], [ref.schema for ref in refs]
    cursor.execute(_FIND, {"names": names, "schemas": schemas})
    rows = {number - 1: row for number, *row in cursor.fetchall()}
    for number, ref in enumerate(refs):
        if ref.home is not None:
            check_home(cursor, ref.home)
        _check_kind(cursor, ref, rows.get(number))
    asked = {"oids": [oid for oid, *_ in rows.values()]}
    columns, keys, families = (_grouped(cursor, each, asked) for each in (_COLUMNS, _KEY, _FAMILY))
    return [
        _table(ref, rows[number], *(each[rows[number][0]] for each in (columns, keys, families)))
        for number, ref in enumerate(refs)
    ]


def _check_kind(cursor: Cursor, ref: TableRef, row: Sequence[Any] | None) -> None:
    """Raise TableError unless there is a table, as ``row`` of _FIND says."""
    wanted = ref.name if ref.schema is None else f"{ref.schema}.{ref.name}"
    if row is None:
        cursor.execute(_NAMES, {"schema": ref.schema})
        known = [name for (name,) in cursor.fetchall()]
        where = "" if ref.schema is not None else " on the search_path"
        name, separator, op = wanted.rpartition(":")
        if separator and op in OPERATIONS:
            raise TableError(
                f"There is no table {wanted!r}{where}: the operation is apart from the name, as in "
                f"the watcher ({name!r}, {op!r})."
            )
        raise TableError(
            f"There is no table {wanted!r}{where}{near(wanted, known)} Create it first, by a "
            "migration for instance, or say which schema has it: 'schema.table'."
        )
    kind = row[3]
    if kind not in ("r", "p"):
        raise TableError(f"{wanted!r} is {_KINDS.get(kind, 'not a table')}.")


def _grouped(cursor: Cursor, query: str, asked: dict[str, Any]) -> Mapping[int, list[Any]]:
    """The rows of a query by their first column, the OID of a table, without that."""
    cursor.execute(query, asked)
    found: dict[int, list[Any]] = defaultdict(list)
    for oid, *row in cursor.fetchall():
        found[oid].append(row)
    return found


def _table(
    ref: TableRef,
    row: Sequence[Any],
    column_rows: Sequence[Any],
    key_rows: Sequence[Any],
    family: Sequence[Any],
) -> Table:
    oid, schema, name, kind, inherits = row
    attribute_of: dict[str, str] = {}
    for attribute, column_name in ref.attributes.items():
        attribute_of.setdefault(column_name, attribute)
    columns = tuple(
        Column(
            name=column_name,
            attribute=attribute_of.get(column_name, column_name),
            base_oid=base_oid,
            base_type=(type_schema, base_type),
            output=(output_schema, output),
            domain=domain,
            comparable=element_kind in ("e", "r", "m")
            or (element_schema == "pg_catalog" and element in _COMPARABLE),
            settled=element_kind == "e" or (element_schema == "pg_catalog" and element in _SETTLED),
            virtual=virtual,
        )
        for (
            column_name,
            base_oid,
            type_schema,
            base_type,
            output_schema,
            output,
            domain,
            element,
            element_schema,
            element_kind,
            virtual,
        ) in column_rows
    )
    present = {column.name for column in columns}
    key = tuple(column_name for (column_name,) in key_rows) or ref.key
    if missing := [column_name for column_name in key if column_name not in present]:
        raise TableError(f"{schema}.{name} lacks the model's key column {missing[0]!r}.")
    if ref.only is not None and ref.only[0] not in present:
        raise TableError(f"{schema}.{name} lacks the model's discriminator {ref.only[0]!r}.")
    return Table(
        schema=schema,
        name=name,
        oid=oid,
        children=() if kind == "p" else tuple(Relation(*each) for each in family),
        partitioned=kind == "p",
        inherits=inherits,
        columns=columns,
        key=key,
        only=ref.only,
        aliases={a: c for a, c in ref.attributes.items() if c in present},
        elsewhere=ref.elsewhere,
    )
