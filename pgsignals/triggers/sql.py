"""From a watcher to SQL: the text of its trigger and function. Nothing here talks to a server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from psycopg2 import sql
from psycopg2.extensions import cursor as Cursor

from ..payload import RAW_TYPES, VERSION, Field, Layout
from ..tables import Column, Table
from . import names, outbox_body

# Bump when the generated text is meant to replace what older versions installed.
FORMAT = 1

_EVENTS = {"inserted": "INSERT", "updated": "UPDATE", "deleted": "DELETE", "truncated": "TRUNCATE"}
_TEXT = ("text", "varchar", "name")
_CHANNEL = "pgsignals:channel"
_KEY = "pgsignals:key"

# What a value's text depends on in the writer's session, and how we want it.
_SETTINGS = (
    ("DateStyle", "ISO, MDY"),
    ("TimeZone", "UTC"),
    ("IntervalStyle", "postgres"),
    ("bytea_output", "hex"),
    ("extra_float_digits", "1"),
    ("lc_monetary", "C"),
    ("xmlbinary", "base64"),
)


@dataclass(frozen=True)
class Specification:
    """One operation of one watcher, resolved against its table: what a trigger must do.

    ``tracked`` are the columns whose values travel; ``columns`` those that must differ. ``durable``
    triggers write to the outbox, others notify.
    """

    namespace: str
    table: Table
    op: str
    label: str | None = None
    columns: tuple[Column, ...] = ()
    tracked: tuple[Column, ...] = ()
    when: str | None = None
    replicated: bool = False
    durable: bool = False

    @property
    def compared(self) -> bool:
        """Whether the old values travel too."""
        return self.op == "updated" and bool(self.tracked)

    @property
    def row_level(self) -> bool:
        """Whether PostgreSQL demands a row trigger.

        Statement triggers do not see rows that reach a partition by the parent's name or the
        other way round, and the apply worker of a subscription fires no statement triggers.
        """
        if self.op == "truncated":
            return False
        return self.replicated or self.table.partitioned or self.table.inherits


def value_text(column: Column, alias: str) -> sql.Composable:
    """The column's value exactly as a query's text result has it, or NULL."""
    if column.output == ("pg_catalog", "textout"):
        # Not every type with this output function, refcursor for one, can be passed to it.
        return sql.SQL("{}::text").format(_value(column, alias))
    return sql.SQL("textin({output}({value}))").format(
        output=sql.Identifier(*column.output), value=_value(column, alias)
    )


def value_json(column: Column, alias: str, bounded: bool = False) -> sql.Composable:
    """The column's value as JSON text: a number, a boolean, a string or ``null``.

    ``bounded``: of a value that no notification has room for, only as much as shows that.
    """
    value = _value(column, alias)
    schema, base_type = column.base_type
    if schema == "pg_catalog" and base_type in RAW_TYPES:
        return sql.SQL("coalesce({}::text, 'null')").format(value)
    if schema != "pg_catalog" or base_type not in _TEXT:
        value = value_text(column, alias)
    if bounded:
        value = sql.SQL("left({}::text, 8000)").format(value)
    return sql.SQL("coalesce(pg_catalog.to_json({})::text, 'null')").format(value)


def differs(column: Column) -> sql.Composable:
    """Whether an update changed the column."""
    side = _value if column.comparable else value_text
    return sql.SQL("{} IS DISTINCT FROM {}").format(side(column, "old"), side(column, "new"))


def _value(column: Column, alias: str) -> sql.Composable:
    value: sql.Composable = sql.SQL("{}.{}").format(sql.SQL(alias), sql.Identifier(column.name))
    if column.domain:
        return sql.SQL("{}::{}").format(value, sql.Identifier(*column.base_type))
    return value


def _line(spec: Specification, moved: bool) -> sql.Composable:
    """One row as a line of JSON, with a tab between the key and the values."""
    alias = "old" if spec.op == "deleted" else "new"
    key = spec.table.key_columns
    keys = [value_json(column, alias) for column in key]
    if moved:
        keys += [value_json(column, "old") for column in key]
    bounded = not spec.durable
    values = [value_json(column, alias, bounded) for column in spec.tracked]
    if spec.compared:
        values += [value_json(column, "old", bounded) for column in spec.tracked]
        flags = sql.SQL(" || ").join(
            sql.SQL("CASE WHEN {} THEN '1' ELSE '0' END").format(differs(column))
            for column in spec.tracked
        )
        values.append(sql.SQL("""'"' || {} || '"'""").format(flags))
    if len(keys) == 1 and not values and key[0].base_type in [("pg_catalog", t) for t in RAW_TYPES]:
        return keys[0]
    comma = sql.SQL(" || ',' || ")
    parts: list[sql.Composable] = [sql.SQL("'['")]
    if keys:
        parts.append(comma.join(keys))
    if values:
        parts += [sql.SQL("E'\\t,'") if keys else sql.SQL("E'\\t'"), comma.join(values)]
    parts.append(sql.SQL("']'"))
    return sql.SQL(" || ").join(parts)


def _conditions(spec: Specification) -> sql.Composable:
    found: list[sql.Composable] = []
    if spec.table.only is not None:
        name, accepted = spec.table.only
        column = next(c for c in spec.table.columns if c.name == name)
        alias = "old" if spec.op == "deleted" else "new"
        found.append(
            sql.SQL("{} IN ({})").format(
                value_text(column, alias),
                sql.SQL(", ").join(sql.Literal(str(value)) for value in accepted),
            )
        )
    if spec.columns:
        found.append(sql.SQL("({})").format(sql.SQL(" OR ").join(map(differs, spec.columns))))
    if spec.when is not None:
        # On lines of its own, so that a comment at its end cannot swallow the parenthesis.
        found.append(sql.SQL("(\n{}\n)").format(sql.SQL(spec.when)))
    return sql.SQL(" AND ").join(found) if found else sql.SQL("true")


def _rows(spec: Specification) -> sql.Composable:
    """The FROM clause; nothing in a row trigger, where ``new`` and ``old`` are variables.

    Transition tables have no row identity. PostgreSQL fills both in the order in which it updates
    (AfterTriggerSaveEvent in trigger.c adds the old and the new row of one update in one call), so
    that rows are paired by position. Pairing by key would lose rows whose key changes, and
    multiplies rows that two foreign keys' actions update inside one statement.
    """
    if spec.row_level:
        return sql.SQL("")
    if spec.op == "inserted":
        return sql.SQL("FROM pgs_new AS new")
    if spec.op == "deleted":
        return sql.SQL("FROM pgs_old AS old")
    if not spec.table.key and not spec.tracked and not spec.columns and spec.when is None:
        return sql.SQL("FROM pgs_new AS new")
    number = "pgs_n"
    while number in {column.name for column in spec.table.columns}:
        number += "_"
    return sql.SQL(
        "FROM (SELECT row_number() OVER () AS {number}, * FROM pgs_old) AS old\n"
        "        JOIN (SELECT row_number() OVER () AS {number}, * FROM pgs_new) AS new\n"
        "          ON new.{number} = old.{number}"
    ).format(number=sql.SQL(number))


def _select(spec: Specification) -> sql.Composable:
    """Fills ``pgs_lines`` and, with rows whose key changed, ``pgs_moved``."""
    if spec.op == "truncated":
        return sql.SQL("pgs_lines := '[]';")
    key = spec.table.key_columns
    if spec.op != "updated" or not key:
        return sql.SQL(
            "SELECT string_agg({line}, E'\\n') INTO pgs_lines\n"
            "        {rows}\n        WHERE {conditions};"
        ).format(line=_line(spec, False), rows=_rows(spec), conditions=_conditions(spec))
    moved = sql.SQL(" OR ").join(map(differs, key))
    return sql.SQL(
        "SELECT string_agg({line}, E'\\n') FILTER (WHERE NOT ({moved})),\n"
        "             string_agg({moved_line}, E'\\n') FILTER (WHERE {moved})\n"
        "        INTO pgs_lines, pgs_moved\n"
        "        {rows}\n        WHERE {conditions};"
    ).format(
        line=_line(spec, False),
        moved_line=_line(spec, True),
        moved=moved,
        rows=_rows(spec),
        conditions=_conditions(spec),
    )


# The notification limit is 7,999 bytes (NOTIFY_PAYLOAD_MAX_LENGTH), in the server's encoding; the
# header's sequence and flags, added to each message, take at most 70.
#
# Where the watcher has a condition, names are looked up in the installer's search_path. pg_catalog
# comes first in it, but a better fit elsewhere wins: hence each operator has operands of exactly
# its types, and polymorphic functions are qualified.
_BODY = """
#variable_conflict use_column
DECLARE
  pgs_lines text;
  pgs_moved text;
  pgs_messages text[];
  pgs_text text;
  pgs_flags text;
  pgs_context text;
  pgs_start text;
  pgs_head text;
  pgs_sequence bigint;
  pgs_encoding name;
  pgs_data bytea;
  pgs_piece bytea;
  pgs_at int;
  pgs_size int;
  pgs_room int;
BEGIN
  IF current_setting('pgsignals.muted', true) = 'on' THEN
    RETURN NULL;
  END IF;
  pgs_start := '{{"v":{version},"t":'
    || (date_part('epoch', clock_timestamp()) * 1e6::float8)::bigint::text;
  BEGIN
    {select}
    IF pgs_lines IS NULL AND pgs_moved IS NULL THEN
      RETURN NULL;
    END IF;

    -- Only now: a statement that changed no row must not take a transaction id for our sake.
    pgs_head := pgs_start || ',"x":' || pg_current_xact_id()::text;
    pgs_context := current_setting('pgsignals.context', true);
    IF octet_length(pgs_context) BETWEEN 1 AND 2000 THEN
      pgs_context := pg_catalog.to_json(pgs_context)::text;
      IF octet_length(pgs_context) <= 4000 THEN
        pgs_head := pgs_head || ',"c":' || pgs_context;
      END IF;
    END IF;
    -- Counts messages of the transaction, since PostgreSQL collapses notifications that are equal.
    -- Anybody can set it to anything.
    pgs_text := current_setting('pgsignals.sequence', true);
    pgs_sequence := CASE WHEN pgs_text ~ '^[0-9]{{1,15}}$' THEN pgs_text::bigint ELSE 0 END;
    pgs_room := 7929 - octet_length(pgs_head);
    IF pgs_moved IS NULL AND octet_length(pgs_lines) <= pgs_room THEN
      pgs_sequence := pgs_sequence + 1;
      pgs_text := pgs_head || ',"s":' || pgs_sequence::text || E'}}\\n' || pgs_lines;
    ELSE
      pgs_messages := '{{}}';
      pgs_flags := '';
      pgs_encoding := getdatabaseencoding();
      FOREACH pgs_text IN ARRAY ARRAY[pgs_lines, pgs_moved] LOOP
        pgs_data := convert_to(pgs_text, pgs_encoding);
        pgs_at := 1;
        WHILE pgs_at <= octet_length(pgs_data) LOOP
          pgs_piece := substring(pgs_data FROM pgs_at FOR pgs_room + 1);
          pgs_size := octet_length(pgs_piece);
          IF pgs_size > pgs_room THEN
            -- Whole lines only: what follows the last newline is left for the next message.
            pgs_size := pgs_room - octet_length(
              decode(split_part(encode(pgs_piece, 'escape'), E'\\n', -1), 'escape'));
          END IF;
          pgs_sequence := pgs_sequence + 1;
          IF pgs_size >= 0 THEN
            pgs_messages := pg_catalog.array_append(pgs_messages,
              pgs_head || ',"s":' || pgs_sequence::text || pgs_flags || E'}}\\n'
              || convert_from(substring(pgs_piece FROM 1 FOR pgs_size), pgs_encoding));
            pgs_at := pgs_at + pgs_size + 1;
          ELSE
            -- One row is longer than a notification: only its key, before the tab, goes.
            pgs_size := 16384;
            LOOP
              pgs_piece := substring(pgs_data FROM pgs_at FOR pgs_size);
              EXIT WHEN octet_length(pgs_piece) < pgs_size
                OR position('\\x0a'::bytea IN pgs_piece) > 0;
              pgs_size := pgs_size * 2;
            END LOOP;
            pgs_size := position('\\x0a'::bytea IN pgs_piece) - 1;
            IF pgs_size >= 0 THEN
              pgs_piece := substring(pgs_piece FROM 1 FOR pgs_size);
            END IF;
            pgs_at := pgs_at + octet_length(pgs_piece) + 1;
            pgs_text := convert_from(pgs_piece, pgs_encoding);
            IF strpos(pgs_text, E'\\t') > 0 THEN
              pgs_text := split_part(pgs_text, E'\\t', 1) || ']';
            END IF;
            IF octet_length(pgs_text) <= pgs_room THEN
              pgs_messages := pg_catalog.array_append(pgs_messages,
                pgs_head || ',"s":' || pgs_sequence::text || pgs_flags || ',"cut":true}}'
                || E'\\n' || pgs_text);
            ELSE
              pgs_text := translate(
                encode(convert_to(pgs_text, 'UTF8'), 'base64'), E'\\n', '');
              pgs_size := (octet_length(pgs_text) + pgs_room - 1) / pgs_room;
              FOR pgs_part IN 1..pgs_size LOOP
                pgs_messages := pg_catalog.array_append(pgs_messages,
                  pgs_head || ',"s":' || pgs_sequence::text || pgs_flags
                  || ',"cut":true,"part":[' || pgs_part::text || ',' || pgs_size::text || ']}}'
                  || E'\\n' || substr(pgs_text, (pgs_part - 1) * pgs_room + 1, pgs_room));
              END LOOP;
            END IF;
          END IF;
        END LOOP;
        pgs_flags := ',"moved":true';
      END LOOP;
    END IF;
  EXCEPTION WHEN OTHERS THEN
    -- The write must go on: what broke is reported in place of the rows.
    pgs_sequence := coalesce(pgs_sequence, 0) + 1;
    pgs_messages := NULL;
    pgs_text := pgs_start || ',"x":' || pg_current_xact_id()::text || ',"s":'
      || pgs_sequence::text || ',"error":' || pg_catalog.to_json(left(SQLERRM, 400))::text || '}}';
  END;
  -- Not in the block: each notification would keep its subtransaction's memory to the end.
  -- Assignments, since PERFORM would run the call as a query of its own.
  IF pgs_messages IS NULL THEN
    pgs_text := pg_notify({channel}, pgs_text);
  ELSE
    FOREACH pgs_text IN ARRAY pgs_messages LOOP
      pgs_text := pg_notify({channel}, pgs_text);
    END LOOP;
  END IF;
  pgs_text := set_config('pgsignals.sequence', pgs_sequence::text, true);
  RETURN NULL;
END
"""


@dataclass(frozen=True)
class Trigger:
    """A trigger, compiled: its ``hash`` and all the SQL that makes and unmakes it."""

    spec: Specification
    hash: str
    body: str
    create: tuple[str, ...]
    drop: tuple[str, ...]
    comment: str

    @property
    def name(self) -> str:
        """The name of the trigger, of its function, and of the channel it notifies."""
        return names.object_name(self.hash)

    @property
    def lock_key(self) -> int:
        """The key of the advisory lock that its listeners share."""
        return names.lock_key(self.hash)


def compile_trigger(spec: Specification, cursor: Cursor, search_path: str) -> Trigger:
    """The trigger of ``spec``.

    ``cursor`` only lends its connection to the quoting. ``search_path`` is what names in the
    watcher's condition are looked up in; it does not count for the hash, so that roles with
    different search paths agree on what is installed.
    """
    table = sql.Identifier(spec.table.schema, spec.table.name)
    body = (
        sql.SQL(outbox_body.BODY if spec.durable else _BODY)
        .format(
            select=_select(spec),
            channel=sql.Literal(_CHANNEL),
            key=sql.SQL(_KEY),
            version=sql.SQL(str(VERSION)),
        )
        .as_string(cursor)
    )
    level = "ROW" if spec.row_level else "STATEMENT"
    event = _EVENTS[spec.op]
    hashed = names.digest(
        str(FORMAT),
        spec.namespace,
        spec.table.schema,
        spec.table.name,
        event,
        level,
        str(spec.replicated),
        spec.label or "",
        body,
    )
    name = names.object_name(hashed)
    body = body.replace(_CHANNEL, name).replace(_KEY, f"({names.channel_key(hashed)})")
    function = sql.Identifier(spec.table.schema, name)
    trigger = sql.Identifier(name)
    comment = json.dumps(
        {
            "pgsignals": FORMAT,
            "namespace": spec.namespace,
            "op": spec.op,
            "label": spec.label,
            "hash": hashed,
            "columns": sorted(
                {c.name for c in (*spec.table.key_columns, *spec.tracked, *spec.columns)}
            ),
        }
    )

    path = "pg_catalog, pg_temp"
    if spec.when is not None:
        path = search_path
    settings: list[sql.Composable] = [sql.SQL("SET search_path TO {}").format(sql.SQL(path))]
    if spec.durable:
        # Writers hold no grant on the outbox.
        settings.insert(0, sql.SQL("SECURITY DEFINER"))
    rendered = (*spec.table.key_columns, *spec.tracked, *spec.columns)
    if not all(column.settled for column in rendered):
        settings += [
            sql.SQL("SET {} TO {}").format(sql.SQL(name_), sql.Literal(value))
            for name_, value in _SETTINGS
        ]
    referencing = {
        "inserted": "REFERENCING NEW TABLE AS pgs_new ",
        "updated": "REFERENCING OLD TABLE AS pgs_old NEW TABLE AS pgs_new ",
        "deleted": "REFERENCING OLD TABLE AS pgs_old ",
        "truncated": "",
    }[spec.op]
    create: list[sql.Composable] = [
        sql.SQL("CREATE FUNCTION {}() RETURNS trigger LANGUAGE plpgsql\n  {}\nAS {}").format(
            function, sql.SQL("\n  ").join(settings), sql.SQL(_dollar_quoted(body))
        ),
        sql.SQL("REVOKE ALL ON FUNCTION {}() FROM PUBLIC").format(function),
        sql.SQL("COMMENT ON FUNCTION {}() IS {}").format(function, sql.Literal(comment)),
        sql.SQL(
            f"CREATE TRIGGER {{}} AFTER {event} ON {{}}\n"
            f"  {'' if spec.row_level else referencing}FOR EACH {level} EXECUTE FUNCTION {{}}()"
        ).format(trigger, table, function),
    ]
    if spec.replicated:
        create.append(sql.SQL("ALTER TABLE {} ENABLE ALWAYS TRIGGER {}").format(table, trigger))
    if spec.durable:
        create.append(_register(spec, hashed))
    return Trigger(
        spec,
        hashed,
        body,
        tuple(statement.as_string(cursor) for statement in create),
        (drop_statement(cursor, spec.table.schema, name),),
        comment,
    )


def _register(spec: Specification, hashed: str) -> sql.Composable:
    """Says what the rows of this trigger are, for whoever reads them later, and since when.

    It runs after CREATE TRIGGER, which holds the table: whoever wrote to it before has ended, and
    has lower ids than ``since``.
    """
    key = () if spec.op == "truncated" else spec.table.key_columns
    layout = Layout(
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
    )
    return sql.SQL(
        "INSERT INTO pgsignals.channels (channel, since, definition)\n"
        "  VALUES ({}, pg_catalog.nextval('pgsignals.outbox_id'), {})\n"
        "  ON CONFLICT (channel) DO UPDATE\n"
        "    SET since = excluded.since, definition = excluded.definition"
    ).format(sql.Literal(names.channel_key(hashed)), sql.Literal(layout.encode()))


def fields(columns: Sequence[Column]) -> tuple[Field, ...]:
    """How columns travel."""
    return tuple(
        Field(c.base_oid, c.base_type[1] if c.base_type[0] == "pg_catalog" else None)
        for c in columns
    )


def drop_statement(cursor: Cursor, schema: str, name: str) -> str:
    """SQL that removes a function of ours and its trigger, wherever its table has gone.

    By CASCADE, since dropping a trigger by itself would take owning the table.
    """
    statement = sql.SQL("DROP FUNCTION IF EXISTS {}() CASCADE")
    return statement.format(sql.Identifier(schema, name)).as_string(cursor)


def _dollar_quoted(body: str) -> str:
    tag = "$pgsignals$"
    while tag in body:
        tag = f"{tag[:-1]}_$"
    return f"{tag}{body}{tag}"
