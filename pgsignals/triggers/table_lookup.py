"""Finds a model's table: its name by the resolvers, all else by PostgreSQL's catalogue."""

from __future__ import annotations

from collections.abc import Sequence

from psycopg2.extensions import cursor as Cursor

from ..core.errors import ModelError, PgSignalsError, TableError, near
from ..core.redaction import described, legible
from ..core.tables import Column, Relation, Resolver, Table, TableRef
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
    raise ModelError(
        f"{model!r} is not something that pgsignals can watch. Give an SQLAlchemy, SQLModel, "
        "Flask-SQLAlchemy or Django model, an sqlalchemy.Table, or a name such as 'orders' or "
        "'public.orders'; resolvers present: "
        f"{', '.join(resolver.name for resolver in resolvers)}."
    )


_FIND = """
SELECT c.oid, n.nspname, c.relname, c.relkind,
       EXISTS (SELECT FROM pg_catalog.pg_inherits i WHERE i.inhrelid = c.oid)
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relname = %(name)s
  AND CASE WHEN %(schema)s IS NULL THEN pg_catalog.pg_table_is_visible(c.oid)
           ELSE n.nspname = %(schema)s END
"""


_FAMILY = """
WITH RECURSIVE family AS (
    SELECT i.inhrelid AS relation FROM pg_catalog.pg_inherits i WHERE i.inhparent = %(oid)s
  UNION
    SELECT i.inhrelid FROM family f JOIN pg_catalog.pg_inherits i ON i.inhparent = f.relation
)
SELECT n.nspname, c.relname, c.oid
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
    SELECT a.attnum, a.atttypid AS typid FROM pg_catalog.pg_attribute a
    WHERE a.attrelid = %(oid)s AND a.attnum > 0 AND NOT a.attisdropped
  UNION ALL
    SELECT b.attnum, t.typbasetype FROM base b
    JOIN pg_catalog.pg_type t ON t.oid = b.typid WHERE t.typtype = 'd'
)
SELECT a.attname, t.oid, tn.nspname, t.typname,
       pn.nspname, p.proname, a.atttypid <> t.oid,
       CASE WHEN t.typcategory = 'A' AND t.typelem <> 0 THEN e.typname ELSE t.typname END,
       CASE WHEN t.typcategory = 'A' AND t.typelem <> 0 THEN en.nspname ELSE tn.nspname END,
       CASE WHEN t.typcategory = 'A' AND t.typelem <> 0 THEN e.typtype ELSE t.typtype END,
       a.attgenerated = 'v'
FROM base b
JOIN pg_catalog.pg_attribute a ON a.attrelid = %(oid)s AND a.attnum = b.attnum
JOIN pg_catalog.pg_type t ON t.oid = b.typid AND t.typtype <> 'd'
JOIN pg_catalog.pg_namespace tn ON tn.oid = t.typnamespace
JOIN pg_catalog.pg_proc p ON p.oid = t.typoutput
JOIN pg_catalog.pg_namespace pn ON pn.oid = p.pronamespace
LEFT JOIN pg_catalog.pg_type e ON e.oid = t.typelem
LEFT JOIN pg_catalog.pg_namespace en ON en.oid = e.typnamespace
ORDER BY a.attnum
"""


_KEY = """
SELECT a.attname
FROM pg_catalog.pg_index i
CROSS JOIN LATERAL pg_catalog.unnest(i.indkey::pg_catalog.int2[])
  WITH ORDINALITY AS k(attnum, position)
JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
WHERE i.indrelid = %(oid)s AND i.indisprimary AND k.position <= i.indnkeyatts
ORDER BY k.position
"""


def describe(cursor: Cursor, ref: TableRef) -> Table:
    """Return the table as the catalogue of ``cursor``'s database describes it.

    Raises TableError when there is no such table, or when it cannot have triggers; ModelError when
    the model is of another database.
    """
    if ref.home is not None:
        check_home(cursor, ref.home)
    wanted = ref.name if ref.schema is None else f"{ref.schema}.{ref.name}"
    cursor.execute(_FIND, {"name": ref.name, "schema": ref.schema})
    row = cursor.fetchone()
    if row is None:
        cursor.execute(_NAMES, {"schema": ref.schema})
        known = [name for (name,) in cursor.fetchall()]
        where = "" if ref.schema is not None else " on the search_path"
        raise TableError(
            f"There is no table {wanted!r}{where}{near(wanted, known)} Create it first, by a "
            "migration for instance, or say which schema has it: 'schema.table'."
        )
    oid, schema, name, kind, inherits = row
    if kind not in ("r", "p"):
        raise TableError(f"{wanted!r} is {_KINDS.get(kind, 'not a table')}.")

    attribute_of: dict[str, str] = {}
    for attribute, column_name in ref.attributes.items():
        attribute_of.setdefault(column_name, attribute)
    cursor.execute(_COLUMNS, {"oid": oid})
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
        ) in cursor.fetchall()
    )
    present = {column.name for column in columns}
    cursor.execute(_KEY, {"oid": oid})
    key = tuple(column_name for (column_name,) in cursor.fetchall()) or ref.key
    if missing := [column_name for column_name in key if column_name not in present]:
        raise TableError(f"{schema}.{name} lacks the model's key column {missing[0]!r}.")
    if ref.only is not None and ref.only[0] not in present:
        raise TableError(f"{schema}.{name} lacks the model's discriminator {ref.only[0]!r}.")
    children: tuple[Relation, ...] = ()
    if kind != "p":
        cursor.execute(_FAMILY, {"oid": oid})
        children = tuple(Relation(*each) for each in cursor.fetchall())
    return Table(
        schema=schema,
        name=name,
        oid=oid,
        children=children,
        partitioned=kind == "p",
        inherits=inherits,
        columns=columns,
        key=key,
        only=ref.only,
        aliases={a: c for a, c in ref.attributes.items() if c in present},
        elsewhere=ref.elsewhere,
    )
