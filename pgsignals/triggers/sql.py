"""From a watcher to SQL: the text of its trigger and function. Nothing here talks to a server."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from psycopg2 import sql
from psycopg2.extensions import cursor as Cursor

from ..payload import RAW_TYPES, VERSION, Field, Layout
from ..tables import Column, Table
from . import names, outbox_body

# Bump when the generated text is meant to replace what older versions installed.
FORMAT = 2

_EVENTS = {"inserted": "INSERT", "updated": "UPDATE", "deleted": "DELETE", "truncated": "TRUNCATE"}
_TEXT = ("text", "varchar", "name")
_CHANNEL = "pgsignals:channel"
_KEY = "pgsignals:key"

# What a value's text depends on in the writer's session, and how we want it.
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


def _qualified(text: str) -> str:
    """``text`` with each operator that stands between spaces looked up in pg_catalog alone."""
    return _OPERATOR.sub(r"OPERATOR(pg_catalog.\g<0>)", text)


_THEN = _qualified(" || ")


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
        return sql.SQL("{}::pg_catalog.text").format(_value(column, alias))
    return sql.SQL("pg_catalog.textin({output}({value}))").format(
        output=sql.Identifier(*column.output), value=_value(column, alias)
    )


def value_json(column: Column, alias: str, bounded: bool = False) -> sql.Composable:
    """The column's value as JSON text: a number, a boolean, a string or ``null``.

    ``bounded``: of a value that no notification has room for, only as much as shows that.
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
    """Whether an update changed the column.

    IS DISTINCT FROM, spelled out, since it looks for its operator in the search_path.
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
        name, accepted = spec.table.only
        column = next(c for c in spec.table.columns if c.name == name)
        alias = "old" if spec.op == "deleted" else "new"
        found.append(
            sql.SQL("{} OPERATOR(pg_catalog.=) ANY (ARRAY[{}]::pg_catalog.text[])").format(
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
    """The FROM clause of a statement trigger.

    Transition tables have no row identity. PostgreSQL fills both in the order in which it updates
    (AfterTriggerSaveEvent in trigger.c adds the old and the new row of one update in one call), so
    that rows are paired by position. Pairing by key would lose rows whose key changes, and
    multiplies rows that two foreign keys' actions update inside one statement.
    """
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
        "FROM (SELECT pg_catalog.row_number() OVER () AS {number}, * FROM pgs_old) AS old\n"
        "        JOIN (SELECT pg_catalog.row_number() OVER () AS {number}, * FROM pgs_new) AS new\n"
        "          ON new.{number} OPERATOR(pg_catalog.=) old.{number}"
    ).format(number=sql.SQL(number))


def _select(spec: Specification) -> sql.Composable:
    """Fills ``pgs_lines`` and, with rows whose key changed, ``pgs_moved``."""
    if spec.op == "truncated":
        return sql.SQL("pgs_lines := '[]';")
    line, conditions = _line(spec, False), _conditions(spec)
    key = spec.table.key_columns if spec.op == "updated" else ()
    moved = sql.SQL(" OR ").join(map(differs, key))
    if spec.row_level:
        # new and old are variables here, and an expression costs a third of a query.
        assign = sql.SQL("pgs_lines := {};").format(line)
        if key:
            assign = sql.SQL("IF {} THEN pgs_moved := {}; ELSE {} END IF;").format(
                moved, _line(spec, True), assign
            )
        return sql.SQL("IF {} THEN\n      {}\n    END IF;").format(conditions, assign)
    aggregate = sql.SQL("pg_catalog.string_agg({}, E'\\n')")
    if not key:
        return sql.SQL(
            "SELECT {line} INTO pgs_lines\n        {rows}\n        WHERE {conditions};"
        ).format(line=aggregate.format(line), rows=_rows(spec), conditions=conditions)
    return sql.SQL(
        "SELECT {line} FILTER (WHERE NOT ({moved})),\n"
        "             {moved_line} FILTER (WHERE {moved})\n"
        "        INTO pgs_lines, pgs_moved\n"
        "        {rows}\n        WHERE {conditions};"
    ).format(
        line=aggregate.format(line),
        moved_line=aggregate.format(_line(spec, True)),
        moved=moved,
        rows=_rows(spec),
        conditions=conditions,
    )


def row_text(spec: Specification) -> tuple[sql.Composable, sql.Composable]:
    """A line as the trigger would write it of a row called ``new``, and whether it would."""
    return _line(spec, False), _conditions(spec)


# The notification limit is 7,999 bytes (NOTIFY_PAYLOAD_MAX_LENGTH), in the server's encoding; of
# several messages, the header's sequence and flags, added to each, take at most 70.
#
# Names are looked up in the writer's search_path, or the installer's where the watcher has a
# condition: hence each function, type and operator is qualified, and what looks for an operator by
# itself (IN, BETWEEN, IS DISTINCT FROM) is not used. A SET clause would cost a third of the whole:
# beside 32 writers, of which each statement sets it and back, a twelfth of their throughput.
#
# What most statements come to, one short message in a transaction's first statement, has few
# expressions, since plpgsql prepares each that it evaluates anew in every transaction.
_BODY = _qualified(r"""
#variable_conflict use_column
DECLARE
  pgs_lines pg_catalog.text;
  pgs_moved pg_catalog.text;
  pgs_messages pg_catalog.text[];
  pgs_text pg_catalog.text;
  pgs_flags pg_catalog.text;
  pgs_context pg_catalog.text;
  pgs_head pg_catalog.text;
  pgs_sequence pg_catalog.int8 := 1;
  pgs_encoding pg_catalog.name;
  pgs_data pg_catalog.bytea;
  pgs_piece pg_catalog.bytea;
  pgs_at pg_catalog.int4;
  pgs_size pg_catalog.int4;
  pgs_room pg_catalog.int4;
BEGIN
  BEGIN
    -- One look at all three.
    IF pg_catalog.concat(
      pg_catalog.current_setting('pgsignals.muted', true),
      pg_catalog.current_setting('pgsignals.context', true),
      pg_catalog.current_setting('pgsignals.sequence', true)) <> ''
    THEN
      IF pg_catalog.current_setting('pgsignals.muted', true) = 'on' THEN
        RETURN NULL;
      END IF;
      pgs_text := pg_catalog.current_setting('pgsignals.context', true);
      IF pgs_text <> '' AND pg_catalog.octet_length(pgs_text) <= 2000 THEN
        pgs_text := pg_catalog.to_json(pgs_text)::pg_catalog.text;
        IF pg_catalog.octet_length(pgs_text) <= 4000 THEN
          pgs_context := ',"c":' || pgs_text;
        END IF;
      END IF;
      -- Counts messages of the transaction, since PostgreSQL collapses notifications that are
      -- equal. Anybody can set it to anything.
      pgs_text := pg_catalog.current_setting('pgsignals.sequence', true);
      IF pgs_text ~ '^[0-9]{{1,15}}$' THEN
        pgs_sequence := pgs_text::pg_catalog.int8 + 1;
      END IF;
    END IF;

    {select}
    -- Only with rows: a statement that changed none must not take a transaction id for our sake.
    pgs_text := CASE WHEN pgs_lines IS NOT NULL AND pgs_moved IS NULL THEN
      pg_catalog.concat({head}, ',"s":', pgs_sequence, E'}}\n', pgs_lines) END;
    IF pgs_text IS NULL OR pg_catalog.octet_length(pgs_text) > 7999 THEN
      IF pgs_lines IS NULL AND pgs_moved IS NULL THEN
        RETURN NULL;
      END IF;
      pgs_head := pg_catalog.concat({head});
      pgs_room := 7929 - pg_catalog.octet_length(pgs_head);
      pgs_messages := '{{}}';
      pgs_flags := '';
      pgs_encoding := pg_catalog.getdatabaseencoding();
      pgs_sequence := pgs_sequence - 1;
      FOREACH pgs_text IN ARRAY ARRAY[pgs_lines, pgs_moved] LOOP
        pgs_data := pg_catalog.convert_to(pgs_text, pgs_encoding);
        pgs_at := 1;
        WHILE pgs_at <= pg_catalog.octet_length(pgs_data) LOOP
          pgs_piece := substring(pgs_data FROM pgs_at FOR pgs_room + 1);
          pgs_size := pg_catalog.octet_length(pgs_piece);
          IF pgs_size > pgs_room THEN
            -- Whole lines only: what follows the last newline is left for the next message.
            pgs_size := pgs_room - pg_catalog.octet_length(pg_catalog.decode(
              pg_catalog.split_part(pg_catalog.encode(pgs_piece, 'escape'), E'\n', -1), 'escape'));
          END IF;
          pgs_sequence := pgs_sequence + 1;
          IF pgs_size >= 0 THEN
            pgs_messages := pg_catalog.array_append(pgs_messages, pg_catalog.concat(
              pgs_head, ',"s":', pgs_sequence, pgs_flags, E'}}\n',
              pg_catalog.convert_from(substring(pgs_piece FROM 1 FOR pgs_size), pgs_encoding)));
            pgs_at := pgs_at + pgs_size + 1;
          ELSE
            -- One row is longer than a notification: only its key, before the tab, goes.
            pgs_size := 16384;
            LOOP
              pgs_piece := substring(pgs_data FROM pgs_at FOR pgs_size);
              EXIT WHEN pg_catalog.octet_length(pgs_piece) < pgs_size
                OR position(E'\\x0a'::pg_catalog.bytea IN pgs_piece) > 0;
              pgs_size := pgs_size * 2;
            END LOOP;
            pgs_size := position(E'\\x0a'::pg_catalog.bytea IN pgs_piece) - 1;
            IF pgs_size >= 0 THEN
              pgs_piece := substring(pgs_piece FROM 1 FOR pgs_size);
            END IF;
            pgs_at := pgs_at + pg_catalog.octet_length(pgs_piece) + 1;
            pgs_text := pg_catalog.convert_from(pgs_piece, pgs_encoding);
            IF pg_catalog.strpos(pgs_text, E'\t') > 0 THEN
              pgs_text := pg_catalog.split_part(pgs_text, E'\t', 1) || ']';
            END IF;
            IF pg_catalog.octet_length(pgs_text) <= pgs_room THEN
              pgs_messages := pg_catalog.array_append(pgs_messages, pg_catalog.concat(
                pgs_head, ',"s":', pgs_sequence, pgs_flags, E',"cut":true}}\n', pgs_text));
            ELSE
              pgs_text := pg_catalog.translate(pg_catalog.encode(
                pg_catalog.convert_to(pgs_text, 'UTF8'), 'base64'), E'\n', '');
              pgs_size := (pg_catalog.octet_length(pgs_text) + pgs_room - 1) / pgs_room;
              FOR pgs_part IN 1..pgs_size LOOP
                pgs_messages := pg_catalog.array_append(pgs_messages, pg_catalog.concat(
                  pgs_head, ',"s":', pgs_sequence, pgs_flags,
                  ',"cut":true,"part":[', pgs_part, ',', pgs_size, E']}}\n',
                  pg_catalog.substr(pgs_text, (pgs_part - 1) * pgs_room + 1, pgs_room)));
              END LOOP;
            END IF;
          END IF;
        END LOOP;
        pgs_flags := ',"moved":true';
      END LOOP;
    END IF;
  EXCEPTION WHEN OTHERS THEN
    -- The write must go on: what broke is reported in place of the rows.
    pgs_sequence := pgs_sequence + 1;
    pgs_messages := NULL;
    pgs_context := NULL;
    pgs_text := pg_catalog.concat({head}, ',"s":', pgs_sequence, ',"error":',
      pg_catalog.to_json(pg_catalog.left(SQLERRM, 400)), '}}');
  END;
  -- Not in the block: each notification would keep its subtransaction's memory to the end.
  -- Assignments, since PERFORM would run the call as a query of its own.
  IF pgs_messages IS NULL THEN
    pgs_text := pg_catalog.pg_notify({channel}, pgs_text);
  ELSE
    FOREACH pgs_text IN ARRAY pgs_messages LOOP
      pgs_text := pg_catalog.pg_notify({channel}, pgs_text);
    END LOOP;
  END IF;
  pgs_text := pg_catalog.set_config('pgsignals.sequence', pgs_sequence::pg_catalog.text, true);
  RETURN NULL;
END
""")

# What a message begins with, as arguments of concat(), which renders numbers by their types.
_HEAD = _qualified(
    r"""'{{"v":{version},"t":', (pg_catalog.date_part('epoch', pg_catalog.clock_timestamp())
      * 1e6::pg_catalog.float8)::pg_catalog.int8, ',"x":', pg_catalog.pg_current_xact_id(),
      pgs_context"""
)


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
        sql.SQL(_qualified(outbox_body.BODY) if spec.durable else _BODY)
        .format(
            select=_select(spec),
            head=sql.SQL(_HEAD).format(version=sql.SQL(str(VERSION))),
            channel=sql.Literal(_CHANNEL),
            key=sql.SQL(_KEY),
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

    # Each SET costs a statement of one row about as much as reading that row does.
    settings: list[sql.Composable] = []
    if spec.durable:
        # Writers hold no grant on the outbox.
        settings.append(sql.SQL("SECURITY DEFINER"))
    if spec.when is not None:
        settings.append(sql.SQL("SET search_path TO {}").format(sql.SQL(search_path)))
        if "\\" in spec.when:
            # Otherwise the writer's session says whether a backslash escapes what follows it, the
            # quote that ends a literal included: the function then did not compile.
            settings.append(sql.SQL("SET standard_conforming_strings TO on"))
    rendered = (*spec.table.key_columns, *spec.tracked, *spec.columns)
    if not all(column.settled for column in rendered):
        settings += [
            sql.SQL("SET {} TO {}").format(sql.SQL(name_), sql.Literal(value))
            for name_, value in SETTINGS
        ]
    referencing = {
        "inserted": "REFERENCING NEW TABLE AS pgs_new ",
        "updated": "REFERENCING OLD TABLE AS pgs_old NEW TABLE AS pgs_new ",
        "deleted": "REFERENCING OLD TABLE AS pgs_old ",
        "truncated": "",
    }[spec.op]
    create: list[sql.Composable] = [
        sql.SQL("CREATE FUNCTION {}() RETURNS trigger LANGUAGE plpgsql\n  {}AS {}").format(
            function,
            sql.SQL("").join(sql.SQL("{}\n  ").format(setting) for setting in settings),
            sql.SQL(_dollar_quoted(body)),
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
        create += _register(spec, hashed)
    return Trigger(
        spec,
        hashed,
        body,
        tuple(statement.as_string(cursor) for statement in create),
        (drop_statement(cursor, spec.table.schema, name),),
        comment,
    )


def _register(spec: Specification, hashed: str) -> list[sql.Composable]:
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
    return registration(hashed, layout.encode())


def registration(hashed: str, definition: str) -> list[sql.Composable]:
    """The statements by which readers of the outbox come to know a trigger's rows.

    A consumer that reads them by now had a trigger that is gone (its table was dropped and created
    anew, say), and has missed what was written since: it is marked to get a Gap. That is noted in
    the transaction that creates the trigger, before which nobody is sure that it was missing.
    """
    channel = sql.Literal(names.channel_key(hashed))
    statements = (
        "INSERT INTO pgsignals.channels (channel, since, definition)\n"
        "  VALUES ({channel}, pg_catalog.nextval('pgsignals.outbox_id'), {definition})\n"
        "  ON CONFLICT (channel) DO UPDATE\n"
        "    SET since = excluded.since, definition = excluded.definition",
        "DO $pgsignals$ DECLARE\n"
        "  consumer text;\n"
        "BEGIN\n"
        "  FOR consumer IN\n"
        "    UPDATE pgsignals.consumers SET lost_until = pg_catalog.clock_timestamp()\n"
        "    WHERE ({channel})::bigint OPERATOR(pg_catalog.=) ANY (channels) RETURNING name\n"
        "  LOOP\n"
        "    RAISE WARNING 'the consumer % has missed what was written while a trigger was"
        " missing', consumer;\n"
        "  END LOOP;\n"
        "END $pgsignals$",
    )
    return [
        sql.SQL(statement).format(channel=channel, definition=sql.Literal(definition))
        for statement in statements
    ]


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
