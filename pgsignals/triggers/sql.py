"""Writes the SQL of a watcher's trigger and function. Nothing here talks to a server."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

from psycopg2 import sql

from ..core.payload import RAW_TYPES, VERSION, Field, Layout
from ..core.tables import Column, Relation, Table
from ..core.transport import Transport
from . import names
from .bodies import BODIES, common
from .quoting import dollar_quoted, literal, quoted_identifier, rendered

# Bump when the generated text is meant to replace what older versions installed.
FORMAT = 3


_EVENTS = {"inserted": "INSERT", "updated": "UPDATE", "deleted": "DELETE", "truncated": "TRUNCATE"}
_TEXT = ("text", "varchar", "name")
# Types of pg_catalog with several texts for one value, whose values are compared by the type's `=`.
# Values of other types are compared by their texts: a value that the type does not have, such as a
# label that an enum has yet to get, would be an error.
_LOOSE = ("bool", "bpchar", "numeric", "float4", "float8")
_CHANNEL = "pgsignals:channel"
_KEY = "pgsignals:key"
# The column by which old and new rows are paired.
_NUMBER = "pgs_n"


# The settings of the writer's session that a value's text depends on, and the values we need.
SETTINGS = (
    ("DateStyle", "ISO, MDY"),
    ("TimeZone", "UTC"),
    ("IntervalStyle", "postgres"),
    ("bytea_output", "hex"),
    ("extra_float_digits", "1"),
    ("lc_monetary", "C"),
    ("xmlbinary", "base64"),
)


_OPERATOR = re.compile(r"(?<= )(?:\|\||<=|>=|<>|[-+*/<>=~])(?= )")


@lru_cache(maxsize=32)
def _qualified(text: str) -> str:
    """Return ``text`` with each operator between spaces looked up in pg_catalog alone."""
    return _OPERATOR.sub(r"OPERATOR(pg_catalog.\g<0>)", text)


_THEN = _qualified(" || ")


# PostgreSQL 14 writes a "char" beyond ASCII as its byte, which is no text; later versions write an
# octal escape, which these expressions give on all versions. Arrays of one dimension are rewritten
# by their elements; others are left alone.
_CHAR = _qualified(
    "CASE WHEN {value}::pg_catalog.int4 < 0"
    " THEN pg_catalog.encode(pg_catalog.charsend({value}), 'escape')"
    " ELSE pg_catalog.textin({output}({value})) END"
)
_CHARS = _qualified(
    "pg_catalog.textin(CASE WHEN 0 > ANY ({value}::pg_catalog.int4[])"
    " AND pg_catalog.array_ndims({value}) = 1 AND pg_catalog.array_lower({value}, 1) = 1"
    " THEN pg_catalog.array_out(ARRAY(SELECT "
    + _CHAR.replace("{value}", "pgs_each.c").replace("{output}", "pg_catalog.charout")
    + " FROM pg_catalog.unnest({value}) AS pgs_each (c))) ELSE {output}({value}) END)"
)


@dataclass(frozen=True)
class Specification:
    """One operation of one watcher, resolved against its table: all that defines a trigger.

    ``tracked`` are the columns whose values are sent, ``columns`` those of which one must differ.
    The trigger writes to ``transport``; with ``rows`` there is none, since rows of the write-ahead
    log say all. ``model`` names the model, if it shares its table.
    """

    namespace: str
    table: Table
    op: str
    label: str | None = None
    columns: tuple[Column, ...] = ()
    tracked: tuple[Column, ...] = ()
    when: str | None = None
    replicated: bool = False
    transport: Transport = Transport.NOTIFY
    model: str = ""
    rows: bool = False

    @property
    def compared(self) -> bool:
        """Whether the old values are sent, too."""
        return self.op == "updated" and bool(self.tracked)

    @property
    def row_level(self) -> bool:
        """Whether only a row trigger sees all changes.

        Statement triggers do not see rows that reach a partition or a child by the parent's name,
        or the other way round; and the apply worker of a subscription fires no statement triggers.
        """
        if self.op == "truncated":
            return False
        table = self.table
        return self.replicated or table.partitioned or table.inherits or bool(table.children)

    @property
    def relations(self) -> tuple[Relation, ...]:
        """The tables that get the trigger: the watched one, and those that inherit from it.

        PostgreSQL itself gives it to partitions. TRUNCATE of a child does not truncate the table,
        so that children get no trigger for it.
        """
        own = Relation(self.table.schema, self.table.name, self.table.oid)
        return (own,) if self.op == "truncated" else (own, *self.table.children)


def value_text(column: Column, alias: str) -> sql.Composable:
    """Return SQL for the column's value, exactly as a query's text result has it, or NULL."""
    if column.output == ("pg_catalog", "textout"):
        # By a cast: some types with this output function, refcursor say, cannot be passed to it.
        return sql.SQL("{}::pg_catalog.text").format(_value(column, alias))
    text = {("pg_catalog", "char"): _CHAR, ("pg_catalog", "_char"): _CHARS}.get(
        column.base_type, "pg_catalog.textin({output}({value}))"
    )
    return sql.SQL(text).format(output=sql.Identifier(*column.output), value=_value(column, alias))


def value_of_text(column: Column, text: str) -> sql.Composable:
    """Return SQL for the value with this text by ``value_text``, of the type below any domain."""
    if column.base_type == ("pg_catalog", "char") and re.fullmatch(r"\\[0-7]{3}", text):
        # PostgreSQL 14 does not read the octal escape that later versions write.
        return sql.SQL('({})::pg_catalog."char"').format(sql.SQL(str(int(text[1:], 8) - 256)))
    return sql.SQL("{}::{}").format(sql.Literal(text), sql.Identifier(*column.base_type))


def value_json(column: Column, alias: str, bounded: bool = False) -> sql.Composable:
    """Return SQL for the column's value as JSON text: a number, a boolean, a string or ``null``.

    ``bounded`` cuts a value that no notification has room for, to a length that shows as much.
    """
    value = _value(column, alias)
    schema, base_type = column.base_type
    if schema == "pg_catalog" and base_type in RAW_TYPES:
        return sql.SQL("coalesce({}::pg_catalog.text, 'null')").format(value)
    if schema != "pg_catalog" or base_type not in _TEXT:
        value = value_text(column, alias)
    if bounded:
        value = sql.SQL("pg_catalog.left({}::pg_catalog.text, 8000)").format(value)
    return sql.SQL("coalesce(pg_catalog.to_json({})::pg_catalog.text, 'null')").format(value)


def differs(column: Column) -> sql.Composable:
    """Return SQL for whether an update changed the column.

    It is IS DISTINCT FROM spelled out: that one looks for its operator in the search_path.
    """
    side = _value if column.comparable else value_text
    return sql.SQL(
        "(({old} OPERATOR(pg_catalog.=) {new}) IS NOT TRUE"
        " AND NOT ({old} IS NULL AND {new} IS NULL))"
    ).format(old=side(column, "old"), new=side(column, "new"))


def _value(column: Column, alias: str) -> sql.Composable:
    value: sql.Composable = sql.SQL("{}.{}").format(sql.SQL(alias), sql.Identifier(column.name))
    if column.domain:
        return sql.SQL("{}::{}").format(value, sql.Identifier(*column.base_type))
    return value


def _line(spec: Specification, moved: bool) -> sql.Composable:
    """Return SQL for one row as a line of JSON, with a tab between the key and the values."""
    alias = "old" if spec.op == "deleted" else "new"
    key = spec.table.key_columns
    keys = [value_json(column, alias) for column in key]
    if moved:
        keys += [value_json(column, "old") for column in key]
    bounded = not spec.transport.durable
    values = [value_json(column, alias, bounded) for column in spec.tracked]
    if spec.compared:
        values += [value_json(column, "old", bounded) for column in spec.tracked]
        flags = sql.SQL(_THEN).join(
            sql.SQL("CASE WHEN {} THEN '1' ELSE '0' END").format(differs(column))
            for column in spec.tracked
        )
        values.append(sql.SQL(f"""'"'{_THEN}{{}}{_THEN}'"'""").format(flags))
    if len(keys) == 1 and not values and key[0].base_type in [("pg_catalog", t) for t in RAW_TYPES]:
        return keys[0]
    comma = sql.SQL(f"{_THEN}','{_THEN}")
    parts: list[sql.Composable] = [sql.SQL("'['")]
    if keys:
        parts.append(comma.join(keys))
    if values:
        parts += [sql.SQL("E'\\t,'") if keys else sql.SQL("E'\\t'"), comma.join(values)]
    parts.append(sql.SQL("']'"))
    return sql.SQL(_THEN).join(parts)


def _conditions(spec: Specification) -> sql.Composable:
    found: list[sql.Composable] = []
    if spec.table.only is not None:
        # A row that an update moves out of the class, or into it, is an event for the class.
        sides = {"updated": ("old", "new"), "deleted": ("old",)}.get(spec.op, ("new",))
        belongs = [_belongs(spec.table, spec.table.only, side) for side in sides]
        found.append(sql.SQL("({})").format(sql.SQL(" OR ").join(belongs)))
    if spec.columns:
        found.append(sql.SQL("({})").format(sql.SQL(" OR ").join(map(differs, spec.columns))))
    if spec.when is not None:
        # On lines of its own, so that a comment at its end cannot swallow the parenthesis.
        found.append(sql.SQL("(\n{}\n)").format(sql.SQL(spec.when)))
    return sql.SQL(" AND ").join(found) if found else sql.SQL("true")


def _belongs(table: Table, only: tuple[str, tuple[object, ...]], alias: str) -> sql.Composable:
    """Return SQL for whether a row is the model's own, where models share a table."""
    name, accepted = only
    column = next(c for c in table.columns if c.name == name)
    loose = column.base_type[0] == "pg_catalog" and column.base_type[1] in _LOOSE
    return sql.SQL("{} OPERATOR(pg_catalog.=) ANY (ARRAY[{}]::{}[])").format(
        _value(column, alias) if loose else value_text(column, alias),
        sql.SQL(", ").join(sql.Literal(str(value)) for value in accepted),
        sql.Identifier(*(column.base_type if loose else ("pg_catalog", "text"))),
    )


def _rows(spec: Specification) -> sql.Composable:
    """Return the FROM clause of the statement that reads the rows.

    Transition tables have no row identity. PostgreSQL fills both in the order in which it updates
    (AfterTriggerSaveEvent in trigger.c adds the old and the new row of one update in one call), so
    that rows are paired by position. Pairing by key would lose rows whose key changes, and multiply
    rows that two foreign keys' actions update inside one statement.
    """
    if spec.row_level:
        # The row is a parameter, of the table's present type.
        return sql.SQL("FROM {}").format(
            sql.SQL(", ").join(
                sql.SQL(f"pg_catalog.unnest(ARRAY[${number}]) AS {side}")
                for number, side in enumerate(_sides(spec), 1)
            )
        )
    if spec.op == "inserted":
        return sql.SQL("FROM pgs_new AS new")
    if spec.op == "deleted":
        return sql.SQL("FROM pgs_old AS old")
    if not (
        spec.table.key or spec.table.only or spec.tracked or spec.columns or spec.when is not None
    ):
        return sql.SQL("FROM pgs_new AS new")
    number = _NUMBER
    while number in {column.name for column in spec.table.columns}:
        number += "_"
    return sql.SQL(
        "FROM (SELECT pg_catalog.row_number() OVER () AS {number}, * FROM pgs_old) AS old\n"
        "        JOIN (SELECT pg_catalog.row_number() OVER () AS {number}, * FROM pgs_new) AS new\n"
        "          ON new.{number} OPERATOR(pg_catalog.=) old.{number}"
    ).format(number=sql.SQL(number))


def _sides(spec: Specification) -> tuple[str, ...]:
    """Return the names of the rows that the operation has."""
    return {"inserted": ("new",), "deleted": ("old",)}.get(spec.op, ("old", "new"))


def _select(spec: Specification) -> sql.Composable:
    """Return SQL that fills ``pgs_lines`` and, with rows whose key changed, ``pgs_moved``."""
    if spec.op == "truncated":
        return sql.SQL(
            "pgs_lines := CASE WHEN pgs_try OPERATOR(pg_catalog.<) {} THEN '[]' END;"
        ).format(sql.SQL(str(common.BY_ERROR)))
    line, conditions = _line(spec, False), _conditions(spec)
    key = spec.table.key_columns if spec.op == "updated" else ()
    moved = sql.SQL(" OR ").join(map(differs, key))
    aggregate = sql.SQL("pg_catalog.string_agg({}, E'\\n')")
    fetched: tuple[sql.Composable, ...] = (aggregate.format(line),)
    if key:
        fetched = (
            sql.SQL("{} FILTER (WHERE NOT ({}))").format(fetched[0], moved),
            sql.SQL("{} FILTER (WHERE {})").format(aggregate.format(_line(spec, True)), moved),
        )
    into = "pgs_lines, pgs_moved" if key else "pgs_lines"
    if not spec.row_level:
        return sql.SQL(
            "IF pgs_try OPERATOR(pg_catalog.=) {attempt} THEN\n"
            "        SELECT {fetched}\n"
            "          INTO {into}\n"
            "          {rows}\n"
            "          WHERE {conditions};\n"
            "      END IF;"
        ).format(
            attempt=sql.SQL(str(common.BY_STATEMENT)),
            fetched=sql.SQL(",\n          ").join(fetched),
            into=sql.SQL(into),
            rows=_rows(spec),
            conditions=conditions,
        )
    # New and old are variables here, and an expression costs a third of a query. But the session
    # keeps its plan for good: after ALTER COLUMN TYPE only a statement that is planned anew works.
    assign = sql.SQL("pgs_lines := {};").format(line)
    if key:
        assign = sql.SQL("IF {} THEN pgs_moved := {}; ELSE {} END IF;").format(
            moved, _line(spec, True), assign
        )
    statement = sql.SQL("SELECT {} {} WHERE {}").format(
        sql.SQL(", ").join(fetched), _rows(spec), conditions
    )
    return sql.SQL("").join(
        (
            sql.SQL(
                "IF pgs_try OPERATOR(pg_catalog.=) {by_variables} THEN\n"
                "        IF {conditions} THEN\n          {assign}\n        END IF;\n"
                "      ELSIF pgs_try OPERATOR(pg_catalog.=) {by_statement} THEN\n"
                "        EXECUTE "
            ).format(
                by_variables=sql.SQL(str(common.BY_VARIABLES)),
                by_statement=sql.SQL(str(common.BY_STATEMENT)),
                conditions=conditions,
                assign=assign,
            ),
            sql.SQL(dollar_quoted(rendered(statement))),
            sql.SQL(f" INTO {into} USING {', '.join(_sides(spec))};\n      END IF;"),
        )
    )


def row_text(spec: Specification) -> tuple[sql.Composable, sql.Composable]:
    """Return SQL for a trigger's line of a row ``new``, and for whether it would send that."""
    return _line(spec, False), _conditions(spec)


# The beginning of a message, as arguments of concat(), which renders numbers by their types.
_HEAD = _qualified(
    r"""'{{"v":{version},"t":', (pg_catalog.date_part('epoch', pg_catalog.clock_timestamp())
      * 1e6::pg_catalog.float8)::pg_catalog.int8, ',"x":', pg_catalog.pg_current_xact_id(),
      {relation}pgs_context"""
)


@dataclass(frozen=True)
class Trigger:
    """A compiled trigger: its ``hash``, and all the SQL that creates and drops it.

    ``creation`` writes what creates it, which most starts have no use for.
    """

    spec: Specification
    hash: str
    body: str
    creation: Callable[[], Sequence[str]] = field(repr=False, compare=False)

    @cached_property
    def create(self) -> Sequence[str]:
        """The statements that create the function and the trigger."""
        return self.creation()

    @property
    def drop(self) -> Sequence[str]:
        """The statements that remove both."""
        return (drop_statement(self.spec.table.schema, self.name),)

    @property
    def name(self) -> str:
        """The name of the trigger, of its function, and of the channel it notifies."""
        return names.object_name(self.hash)

    @property
    def witness(self) -> str:
        """The name by which the catalogue tells whether the trigger has been there all the time."""
        if self.spec.rows:
            return rows_witness(self.spec.op, self.relations)
        return self.name

    @property
    def relations(self) -> tuple[int, ...]:
        """The OIDs of the tables that get the trigger."""
        return tuple(relation.oid for relation in self.spec.relations)


def publication_of(op: str) -> str:
    """Return the publication that a table has to be in for an operation to be read from its rows.

    A table without a replica identity must not be in one that publishes updates or deletes:
    PostgreSQL would refuse these to everybody.
    """
    return names.PUBLICATION if op in ("updated", "deleted") else names.INSERTS_PUBLICATION


def rows_witness(op: str, relations: Iterable[int]) -> str:
    """Return the name by which the catalogue tells whether tables have been published."""
    return f"rows {publication_of(op)} {','.join(map(str, sorted(relations)))}"


def _relation(spec: Specification, token: str) -> tuple[sql.Composable, ...]:
    """Return SQL for the watched table's OID, and for two tests of whether a row is one of its own.

    A function serves the table that it was made for, by its OID, its partitions and children, and
    no other: neither the copies in a cloned schema, nor a table by which somebody would have the
    function run with its owner's rights. A partition may have been detached, and a child may not
    inherit any more, so that each call tests. The first test is quick, and mostly suffices; the
    second one is sure, and has a query, which takes five times as long.
    """
    tables = sql.SQL(f"'{token}'::pg_catalog.oid[]")
    watched = sql.SQL("({})[1]").format(tables)
    own = sql.SQL("(TG_RELID OPERATOR(pg_catalog.=) {})").format(watched)
    if spec.table.partitioned:
        quick = sql.SQL(
            "((pg_catalog.pg_partition_root(TG_RELID)::pg_catalog.oid"
            " OPERATOR(pg_catalog.=) {0}) IS TRUE OR TG_RELID OPERATOR(pg_catalog.=) {0})"
        ).format(watched)
        sure = sql.SQL(
            "EXISTS (SELECT FROM pg_catalog.pg_partition_ancestors(TG_RELID) AS pgs_each (relation)"
            " WHERE pgs_each.relation::pg_catalog.oid OPERATOR(pg_catalog.=) {})"
        ).format(watched)
        return watched, quick, sure
    if not spec.table.children or spec.op == "truncated":
        return sql.SQL("TG_RELID"), own, sql.SQL("false")
    sure = sql.SQL(
        "EXISTS (WITH RECURSIVE pgs_each AS ("
        "SELECT i.inhparent FROM pg_catalog.pg_inherits AS i"
        " WHERE i.inhrelid OPERATOR(pg_catalog.=) TG_RELID"
        " UNION SELECT i.inhparent FROM pgs_each JOIN pg_catalog.pg_inherits AS i"
        " ON i.inhrelid OPERATOR(pg_catalog.=) pgs_each.inhparent)"
        " SELECT FROM pgs_each WHERE pgs_each.inhparent OPERATOR(pg_catalog.=) {})"
    ).format(watched)
    return watched, own, sure


def _remembered(quick: sql.Composable, sure: sql.Composable) -> tuple[sql.Composable, ...]:
    """Return SQL for ``_relation``'s tests by what the transaction knows already.

    A transaction that has written to a partition holds a lock that keeps others from detaching it,
    and asking for its root takes a fifth of a row trigger's time. Not where functions have their
    owner's rights: anybody can set the parameter to anything.
    """
    parameter = sql.Literal(f"{_CHANNEL}.parts")
    known = sql.SQL("pg_catalog.current_setting({}, true)").format(parameter)
    entry = sql.SQL(_qualified("(',' || TG_RELID::pg_catalog.text || ',')"))
    mine = sql.SQL("((pg_catalog.strpos({}, {}) OPERATOR(pg_catalog.>) 0) IS TRUE)")
    # Some thousand partitions are not worth what copying a long text costs.
    remember = sql.SQL(
        "\n        IF (pg_catalog.octet_length({0}) OPERATOR(pg_catalog.>) 2000) IS NOT TRUE THEN"
        "\n          pgs_text := pg_catalog.set_config("
        "{2}, pg_catalog.concat({0}, {1}), true);"
        "\n        END IF;"
    )
    return (
        mine.format(known, entry),
        sql.SQL("({} OR {})").format(quick, sure),
        remember.format(known, entry, parameter),
    )


def compile_trigger(spec: Specification, search_path: str) -> Trigger:
    """Return the compiled trigger of ``spec``.

    Names in the watcher's condition are looked up in ``search_path``, which is not part of the
    hash, so that roles with different search paths agree on what is installed.
    """
    body, token = _body(_shape(spec))
    hashed = names.digest(
        str(FORMAT),
        spec.namespace,
        spec.table.schema,
        spec.table.name,
        _EVENTS[spec.op],
        _level(spec),
        str(spec.replicated),
        spec.label or "",
        body,
    )
    name = names.object_name(hashed)
    body = body.replace(_CHANNEL, name).replace(_KEY, f"({names.channel_key(hashed)})")
    return Trigger(spec, hashed, body, lambda: _creation(spec, hashed, body, token, search_path))


def _creation(
    spec: Specification, hashed: str, body: str, token: str, search_path: str
) -> list[str]:
    """Return the statements that create a trigger."""
    name = names.object_name(hashed)
    function = sql.Identifier(spec.table.schema, name)
    made = sql.SQL("CREATE FUNCTION {}() RETURNS trigger LANGUAGE plpgsql\n  {}AS {}").format(
        function,
        sql.SQL("").join(sql.SQL("{}\n  ").format(each) for each in _settings(spec, search_path)),
        sql.SQL(dollar_quoted(body)),
    )
    table = sql.Identifier(spec.table.schema, spec.table.name)
    create: list[sql.Composable] = [
        sql.SQL(creating(rendered(made), [rendered(table)], token)),
        # A role that adds a partition needs the right, since the trigger is cloned as that role.
        sql.SQL("GRANT EXECUTE ON FUNCTION {}() TO PUBLIC").format(function),
        tagging(spec, hashed),
        *_triggers(spec, name),
    ]
    if spec.transport.durable:
        # They run after CREATE TRIGGER, which holds the table's lock: transactions that wrote to
        # the table before have ended, and have lower ids than ``since``.
        create += registration(
            spec.table.schema, hashed, layout_of(spec, hashed).encode(), spec.transport
        )
    return [rendered(statement) for statement in create]


def tagging(spec: Specification, hashed: str) -> sql.Composable:
    """Return the statement that marks a function as ours and says what it is for."""
    columns = {c.name for c in (*spec.table.key_columns, *spec.tracked, *spec.columns)}
    tag = {
        "pgsignals": FORMAT,
        "namespace": spec.namespace,
        "op": spec.op,
        "label": spec.label,
        "hash": hashed,
        "delivery": spec.transport.value,
        **({"rows": True} if spec.rows else {}),
        "columns": sorted(columns),
    }
    function = sql.Identifier(spec.table.schema, names.object_name(hashed))
    return sql.SQL("COMMENT ON FUNCTION {}() IS {}").format(function, sql.Literal(json.dumps(tag)))


def _shape(spec: Specification) -> Specification:
    """Return the specification without what its function's body does not depend on.

    So most tables share their bodies, of which hundreds take long to write.
    """
    table, only = spec.table, spec.table.only
    used = {*table.key, *(c.name for c in (*spec.tracked, *spec.columns))}
    if only is not None:
        name, accepted = only
        used.add(name)
        only = name, tuple(map(str, accepted))
    own = replace(
        table,
        schema="",
        name="",
        oid=0,
        # Names of our own must not be taken.
        columns=tuple(c for c in table.columns if c.name in used or c.name.startswith(_NUMBER)),
        only=only,
        aliases={},
        elsewhere={},
        children=(Relation("", "", 0),) if table.children else (),
    )
    return replace(spec, namespace="", label=None, model="", table=own)


def _level(spec: Specification) -> str:
    return "ROW" if spec.row_level else "STATEMENT"


@lru_cache(maxsize=256)
def _body(spec: Specification) -> tuple[str, str]:
    """Return the function's body, without its own names yet, and the placeholder in it.

    The placeholder is for the table's OID, which only CREATE FUNCTION knows.
    """
    select = _select(spec)
    # It must not occur in the rest of the text.
    token, written = common.TABLES, rendered(select)
    while token in written:
        token = f"{token[:-1]}_}}"
    relation, mine, sure = _relation(spec, token)
    remember: sql.Composable = sql.SQL("")
    if spec.table.partitioned and spec.row_level and not spec.transport.durable:
        mine, sure, remember = _remembered(mine, sure)
    # A message of a log has the table beside its payload, and so not in it.
    told = sql.SQL("") if spec.transport.durable else sql.SQL("""',"r":', {}, """).format(relation)
    first = common.BY_VARIABLES if spec.row_level else common.BY_STATEMENT
    body = sql.SQL(_qualified(BODIES[spec.transport])).format(
        first=sql.SQL(str(first)),
        select=select,
        head=sql.SQL(_HEAD).format(version=sql.SQL(str(VERSION)), relation=told),
        channel=sql.Literal(_CHANNEL),
        notified=sql.Identifier(_CHANNEL),
        key=sql.SQL(_KEY),
        mine=mine,
        sure=sure,
        remember=remember,
        relation=relation,
    )
    return rendered(body), token


def _settings(spec: Specification, search_path: str) -> list[sql.Composable]:
    """Return the function's clauses beside its body.

    Each SET costs a statement of one row about as much as reading that row does.
    """
    settings: list[sql.Composable] = []
    if spec.transport.durable:
        # Writers have no privileges on the log.
        settings.append(sql.SQL("SECURITY DEFINER"))
    if spec.when is not None:
        settings.append(sql.SQL("SET search_path TO {}").format(sql.SQL(search_path)))
        if "\\" in spec.when:
            # Otherwise the writer's session says whether a backslash escapes what follows it, such
            # as the quote that ends a literal: then the function did not compile.
            settings.append(sql.SQL("SET standard_conforming_strings TO on"))
    rendered = (*spec.table.key_columns, *spec.tracked, *spec.columns)
    if not all(column.settled for column in rendered):
        settings += [
            sql.SQL("SET {} TO {}").format(sql.SQL(name), sql.Literal(value))
            for name, value in SETTINGS
        ]
    return settings


def _triggers(spec: Specification, name: str) -> Iterator[sql.Composable]:
    """Yield what creates the trigger on each of its tables."""
    function, trigger = sql.Identifier(spec.table.schema, name), sql.Identifier(name)
    referencing = {
        "inserted": "REFERENCING NEW TABLE AS pgs_new ",
        "updated": "REFERENCING OLD TABLE AS pgs_old NEW TABLE AS pgs_new ",
        "deleted": "REFERENCING OLD TABLE AS pgs_old ",
        "truncated": "",
    }[spec.op]
    for each in spec.relations:
        table = sql.Identifier(each.schema, each.name)
        yield sql.SQL(
            f"CREATE TRIGGER {{}} AFTER {_EVENTS[spec.op]} ON {{}}\n"
            f"  {'' if spec.row_level else referencing}FOR EACH {_level(spec)}"
            " EXECUTE FUNCTION {}()"
        ).format(trigger, table, function)
        if spec.replicated:
            yield sql.SQL("ALTER TABLE {} ENABLE ALWAYS TRIGGER {}").format(table, trigger)


def layout_of(spec: Specification, hashed: str) -> Layout:
    """Return the description of the messages of a trigger, by its hash."""
    key = () if spec.op == "truncated" else spec.table.key_columns
    only = None
    if spec.rows and spec.table.only is not None:
        name, accepted = spec.table.only
        only = name, tuple(map(str, accepted))
    return Layout(
        namespace=spec.namespace,
        schema=spec.table.schema,
        table=spec.table.name,
        op=spec.op,
        label=spec.label,
        name=hashed[:8],
        key=tuple(c.attribute for c in key),
        key_fields=fields(key),
        values=tuple(c.attribute for c in spec.tracked),
        value_fields=fields(spec.tracked),
        compared=spec.compared,
        model=spec.model,
        rows=spec.rows,
        columns=tuple(c.name for c in (*key, *spec.tracked)) if spec.rows else (),
        differing=tuple(map(spec.tracked.index, spec.columns)) if spec.rows else (),
        only=only,
        replicated=spec.replicated,
        delivery=spec.transport.value,
    )


# SQL for the present id of a log, as readers compare it with those of messages. In the write-ahead
# log, messages have the number of their transaction's commit: a transaction that has written to the
# table before has committed at a lower one, and a later one will at a higher one.
_PRESENT_ID: Mapping[Transport, str] = {
    Transport.OUTBOX: "pg_catalog.nextval('pgsignals.outbox_id')",
    Transport.WAL: "(pg_catalog.pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::bigint",
}


def registration(
    home: str,
    hashed: str,
    definition: str,
    transport: Transport,
    served: str = (
        "SELECT DISTINCT ({channel})::bigint, tgrelid FROM pg_catalog.pg_trigger\n"
        "  WHERE tgfoid = {function}::pg_catalog.regprocedure AND tgparentid = 0"
    ),
) -> list[sql.Composable]:
    """Return the statements that describe a trigger's channel to readers of a log.

    The trigger's function is in the schema ``home``. From here on, only messages of the tables that
    have the trigger now are read from the channel, or those that the query ``served`` gives.

    A consumer that reads the channel already had a trigger that is gone (its table was dropped and
    created anew, say), and has missed what was written since: it is marked to get a Gap. That is
    done in the transaction that creates the trigger, before which nobody can be sure that it was
    missing.
    """
    values: dict[str, sql.Composable] = {
        "channel": sql.SQL(str(names.channel_key(hashed))),
        "present": sql.SQL(_PRESENT_ID[transport]),
        "definition": sql.Literal(definition),
        "function": sql.SQL(literal(f"{quoted_identifier(home)}.{names.object_name(hashed)}()")),
    }
    statements = (
        # ``since`` stays for consumers that read the channel already, even if its trigger was
        # missing or is replaced: other channels that they would read in its place may have had the
        # same rows.
        "INSERT INTO pgsignals.channels (channel, since, made, definition)\n"
        "  SELECT {channel}, id, id, {definition}\n"
        "  FROM (SELECT {present} AS id) AS new\n"
        "  ON CONFLICT (channel) DO UPDATE\n"
        "  SET made = excluded.made, definition = excluded.definition,\n"
        "    since = CASE WHEN EXISTS (SELECT FROM pgsignals.consumers AS c\n"
        "      WHERE channels.channel OPERATOR(pg_catalog.=) ANY (c.channels))\n"
        "    THEN channels.since ELSE excluded.since END",
        # A table that had the trigger before, under this name or another, is not watched any more.
        "UPDATE pgsignals.relations SET until = {present}\n"
        "  WHERE channel = {channel} AND until IS NULL",
        f"INSERT INTO pgsignals.relations (channel, relation)\n  {served}\n"
        "  ON CONFLICT (channel, relation) DO UPDATE SET until = NULL",
        "DO $pgsignals$ DECLARE\n"
        "  consumer text;\n"
        "BEGIN\n"
        "  FOR consumer IN\n"
        "    UPDATE pgsignals.consumers SET lost_until = pg_catalog.clock_timestamp(),\n"
        "      acknowledged_at = least(acknowledged_at, verified_at)\n"
        "    WHERE ({channel})::bigint OPERATOR(pg_catalog.=) ANY (channels) RETURNING name\n"
        "  LOOP\n"
        "    RAISE WARNING 'the consumer % has missed what was written while a trigger was"
        " missing', consumer;\n"
        "  END LOOP;\n"
        "END $pgsignals$",
    )
    return [sql.SQL(statement).format(**values) for statement in statements]


def fields(columns: Sequence[Column]) -> tuple[Field, ...]:
    """Return the descriptions by which a decoder reads these columns."""
    return tuple(
        Field(c.base_oid, c.base_type[1] if c.base_type[0] == "pg_catalog" else None)
        for c in columns
    )


def drop_statement(schema: str, name: str) -> str:
    """Return SQL that removes a function of ours and its trigger, whatever its table is called now.

    It drops by CASCADE, since dropping a trigger by itself takes owning the table.
    """
    return (
        f"DROP FUNCTION IF EXISTS {quoted_identifier(schema)}.{quoted_identifier(name)}() CASCADE"
    )


def creating(statement: str, tables: Sequence[str], token: str) -> str:
    """Return a statement that makes a function for tables, whose OIDs only the database knows."""
    oids = ", ',', ".join(
        f"{literal(table)}::pg_catalog.regclass::pg_catalog.oid" for table in tables
    )
    code = (
        f"BEGIN\nEXECUTE pg_catalog.replace({dollar_quoted(statement)},\n"
        f"  '{token}', pg_catalog.concat('{{', {oids}, '}}'));\n"
        "END"
    )
    return f"DO {dollar_quoted(code)}"
