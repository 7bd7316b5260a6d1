"""From a model to its table: what the resolver says, completed by PostgreSQL's catalogue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from psycopg2.extensions import cursor as Cursor

from .errors import ModelError, TableError, near

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

# Types of pg_catalog whose `=` is a real equality; anything else is compared by its text.
_COMPARABLE = frozenset(
    "bool int2 int4 int8 float4 float8 numeric money text varchar bpchar name char bytea date time "  # noqa: SIM905
    "timetz timestamp timestamptz interval uuid inet cidr macaddr macaddr8 bit varbit jsonb oid "
    "pg_lsn tsvector xid8".split()
)
# Types of pg_catalog whose text is the same whatever the writing session has set.
_SETTLED = frozenset(
    "bool int2 int4 int8 numeric text varchar bpchar name char uuid inet cidr macaddr macaddr8 bit "  # noqa: SIM905
    "varbit json jsonb jsonpath oid xid xid8 cid tid pg_lsn tsvector tsquery".split()
)


@dataclass(frozen=True)
class TableRef:
    """What a model says about its table, before the catalogue is asked.

    ``schema`` None means that the name is looked up through ``search_path``. ``attributes`` maps
    attribute names to column names (a column that is not in it goes by its own name; of two
    attributes for one column, receivers see the first). ``key`` lists the key's columns as the
    model declares them, for tables that have no primary key in the database. ``only`` restricts
    the model to the rows whose column holds one of the values (single-table inheritance).
    ``elsewhere`` names attributes that live in another table, for a clear error.
    """

    name: str
    schema: str | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)
    key: tuple[str, ...] = ()
    only: tuple[str, tuple[object, ...]] | None = None
    elsewhere: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Column:
    """A column, with what is needed to render and compare its values.

    ``base_oid`` is the type beneath any domain, which is the
    one that a query's result announces. ``output`` is the type's output function. ``virtual``: a
    generated column that is not stored, which triggers do not see.
    """

    name: str
    attribute: str
    base_oid: int
    base_type: tuple[str, str]
    output: tuple[str, str]
    domain: bool
    comparable: bool
    settled: bool
    virtual: bool = False


@dataclass(frozen=True)
class Table:
    """A table as the catalogue describes it. ``key`` holds column names, in the key's order.

    ``inherits``: it is a partition, or another table's child.
    """

    schema: str
    name: str
    oid: int
    partitioned: bool
    inherits: bool
    columns: tuple[Column, ...]
    key: tuple[str, ...]
    only: tuple[str, tuple[object, ...]] | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    elsewhere: Mapping[str, str] = field(default_factory=dict)

    @property
    def qualified(self) -> str:
        """The name for messages: ``schema.table``."""
        return f"{self.schema}.{self.name}"

    @cached_property
    def key_columns(self) -> tuple[Column, ...]:
        """The key's columns, in the key's order."""
        by_name = {column.name: column for column in self.columns}
        return tuple(by_name[name] for name in self.key)

    @cached_property
    def _by_attribute(self) -> Mapping[str, Column]:
        by_name = {column.name: column for column in self.columns}
        found = {attribute: by_name[name] for attribute, name in self.aliases.items()}
        found.update((column.attribute, column) for column in self.columns)
        return found

    def column(self, attribute: str) -> Column:
        """The column that the model calls ``attribute``.

        Raises TableError, with near names, when there is none.
        """
        column = self._by_attribute.get(attribute)
        if column is not None and column.virtual:
            raise TableError(
                f"{self.qualified} computes {attribute!r} when it is read (VIRTUAL), and "
                "triggers do not. Name the columns that it is made of, or make it STORED."
            )
        if column is not None:
            return column
        if attribute in self.elsewhere:
            raise TableError(
                f"{attribute!r} is not a column of {self.qualified}: it lives in the table "
                f"{self.elsewhere[attribute]}. Watch the model of that table for it."
            )
        raise TableError(
            f"{self.qualified} has no column {attribute!r}"
            f"{near(attribute, self._by_attribute)} "
            f"Its columns: {', '.join(c.attribute for c in self.columns)}."
        )


class Resolver(Protocol):
    """Knows the tables of one kind of model (a plugin of the hook ``pgsignals_resolver``)."""

    name: str

    def resolve(self, model: object) -> TableRef | None:
        """What the model says of its table; None when the model is not of this kind.

        Raises ModelError for a model of this kind that has no table of its own.
        """

    def load(
        self, model: object, table: Table, session: object, ids: Sequence[tuple[object, ...]]
    ) -> list[Any] | None:
        """The records with these keys, by one query, in the order of ``ids``.

        Each id is a tuple of key values in the order of ``table.key``. Records that are gone are
        left out. None when the session is not of a kind that this resolver can use. Parameters
        of the resolver's own, with defaults, are options of the user's ``load``.
        """


def resolve(model: object, resolvers: Sequence[Resolver]) -> tuple[TableRef, Resolver]:
    """The first resolver that knows the model, and what it says.

    Raises ModelError when none does.
    """
    for resolver in resolvers:
        ref = resolver.resolve(model)
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

_NAMES = """
SELECT CASE WHEN %(schema)s IS NULL AND pg_catalog.pg_table_is_visible(c.oid) THEN c.relname
            ELSE n.nspname || '.' || c.relname END
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p') AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast')
LIMIT 5000
"""

# Follows domains down to the type that a query's result announces, and arrays to their elements.
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
    """The table as the catalogue of ``cursor``'s database describes it.

    Raises TableError when there is no such table, or it is not one that can have triggers.
    """
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
    return Table(
        schema=schema,
        name=name,
        oid=oid,
        partitioned=kind == "p",
        inherits=inherits,
        columns=columns,
        key=key,
        only=ref.only,
        aliases={a: c for a, c in ref.attributes.items() if c in present},
        elsewhere=ref.elsewhere,
    )
