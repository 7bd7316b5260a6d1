"""Makes definitions of watchers: resolves them against the catalogue, checks and compiles them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import psycopg2
from psycopg2 import sql
from psycopg2.extensions import cursor as Cursor

from ..core.errors import ConfigurationError, WatcherError, near
from ..core.events import Topic, model_identity, model_name
from ..core.payload import Cast, Decoder
from ..core.rows import RowsDecoder
from ..core.tables import Resolver, Table
from ..core.transport import Capture, Transport
from ..core.watchers import Watcher
from ..postgres.session_settings import error_position
from .capture import Identity, identities, why_not_rows
from .rows import compile_rows
from .sql import Specification, Trigger, compile_trigger, fields, layout_of
from .table_lookup import describe_all, resolve

# Triggers by the schema, table, operation, label and model of their specification.
Compiled = dict[tuple[str, str, str, "str | None", str], Trigger]


@dataclass(frozen=True)
class Definition:
    """One operation of one watcher: the topic of its events, and the trigger that sends them.

    ``lacking`` says why rows of the write-ahead log would not do in the trigger's place.
    """

    watcher: Watcher
    topic: Topic
    trigger: Trigger
    lacking: str = field(default="", kw_only=True)

    def __str__(self) -> str:
        return f"{self.topic.op} of {self.watcher}"

    @property
    def channel(self) -> str:
        """The notification channel."""
        return self.trigger.name

    def decoder(self, cast: Cast) -> Decoder:
        """Return a decoder for the trigger's payloads."""
        spec = self.trigger.spec
        if spec.rows:
            return RowsDecoder(self.topic, layout_of(spec, self.trigger.hash), cast)
        key = () if spec.op == "truncated" else fields(spec.table.key_columns)
        relations = None if spec.transport.durable else frozenset(self.trigger.relations)
        return Decoder(self.topic, key, fields(spec.tracked), cast, relations)


def define(
    cursor: Cursor,
    watchers: Sequence[Watcher],
    resolvers: Sequence[Resolver],
    namespace: str,
    transport: Transport = Transport.NOTIFY,
    compiled: Compiled | None = None,
    capture: Capture | None = None,
) -> list[Definition]:
    """Return the definitions of all watchers, in their order.

    ``compiled`` has the triggers of a former call, and takes those of this one: a trigger is
    compiled again only where something has changed, since hundreds of them take half a second.
    In the write-ahead log, ``capture`` says whether rows or messages serve all; None: rows do where
    they can.

    Raises WatcherError and its kinds: a model that nobody knows, a table that is missing or a
    view, a column that the table lacks, a condition that PostgreSQL rejects, and what rows lack
    that have to serve all.
    """
    cursor.execute("SELECT pg_catalog.current_schemas(false)")
    row = cursor.fetchone()
    schemas: list[str] = row[0] if row is not None else []
    path = sql.SQL(", ").join(sql.Identifier(s) for s in (*schemas, "pg_temp")).as_string(cursor)
    found = []
    found_by_name: dict[str, Watcher] = {}
    models = {model_identity(watcher.model): watcher.model for watcher in watchers}
    resolved = [resolve(model, resolvers) for model in models.values()]
    described = describe_all(cursor, [ref for ref, _ in resolved])
    tables = dict(zip(models, described, strict=True))
    resolvers_of = {key: found for key, (_, found) in zip(models, resolved, strict=True)}
    replica: Mapping[int, Identity] = {}
    if transport is Transport.WAL and capture != "messages":
        oids = {each.oid for table in described for each in table.children}
        oids |= {table.oid for table in described}
        replica = identities(cursor, oids)
    for watcher in watchers:
        identity = model_identity(watcher.model)
        table, resolver = tables[identity], resolvers_of[identity]
        columns = tuple(table.column(name) for name in watcher.columns)
        extra = tuple(table.column(name) for name in watcher.extra)
        tracked = tuple(dict.fromkeys((*columns, *extra)))
        for op in watcher.ops:
            with_rows = op != "truncated"
            spec = Specification(
                namespace=namespace,
                table=table,
                op=op,
                label=watcher.label,
                columns=columns,
                tracked=tracked if with_rows else (),
                when=watcher.when if with_rows else None,
                replicated=watcher.replicated,
                transport=transport,
                model="" if table.only is None else model_name(watcher.model),
            )
            if spec.when is not None:
                _check_condition(cursor, watcher, spec)
            lacking = ""
            if transport is Transport.WAL:
                lacking = _lacking(spec, capture, replica)
                if capture == "rows" and lacking:
                    raise WatcherError(
                        f'capture="rows" cannot serve {op!r} of the watcher {watcher}: {lacking}. '
                        "Leave capture= out, and a trigger sends messages for it."
                    )
                spec = replace(spec, rows=not lacking)
            key = (table.schema, table.name, op, watcher.label, spec.model)
            trigger = None if compiled is None else compiled.get(key)
            # What a condition means is also a matter of the search path.
            if trigger is None or trigger.spec != spec or spec.when is not None:
                trigger = compile_rows(spec) if spec.rows else compile_trigger(spec, path)
            if compiled is not None:
                compiled[key] = trigger
            twin = found_by_name.setdefault(trigger.name, watcher)
            if twin is not watcher:
                raise WatcherError(
                    f"The watchers {twin} and {watcher} both deliver {op!r} of {table.qualified} "
                    "with nothing to tell them apart: drop one, or give it a label."
                )
            topic = Topic(
                model=watcher.model,
                op=op,
                label=watcher.label,
                schema=table.schema,
                table=table.name,
                key=tuple(c.attribute for c in table.key_columns) if with_rows else (),
                values=tuple(c.attribute for c in spec.tracked),
                compared=spec.compared,
                loader=RecordLoader(watcher.model, table, resolver, resolvers),
                name=trigger.hash[:8],
                types={
                    each.attribute: each.base_type[1]
                    for each in ((*table.key_columns, *spec.tracked) if with_rows else ())
                    if each.base_type[0] == "pg_catalog"
                },
            )
            found.append(Definition(watcher, topic, trigger, lacking=lacking))
    return found


def _lacking(spec: Specification, capture: Capture | None, replica: Mapping[int, Identity]) -> str:
    if capture == "messages":
        return 'capture="messages" was asked for'
    return why_not_rows(spec, replica)


@dataclass(frozen=True)
class RecordLoader:
    """Fetches records of one model through whatever session the user has."""

    model: Any
    table: Table
    resolver: Resolver
    resolvers: Sequence[Resolver]

    def __call__(
        self, session: Any, ids: Sequence[tuple[Any, ...]], /, **options: Any
    ) -> list[Any]:
        if not self.table.key:
            raise ConfigurationError(
                f"{self.table.qualified} has no key, so that its events cannot load a record. Give "
                "it a primary key, or ask for the columns with extra=."
            )
        load: Any = self.resolver.load
        known = list(inspect.signature(load).parameters)[4:]
        for name in options:
            if name not in known:
                raise ConfigurationError(
                    f"load() of {model_name(self.model)} does not know {name}="
                    f"{near(name, known)} It takes {', '.join(known) or 'a session only'}."
                )
        found: list[Any] | None = load(self.model, self.table, session, ids, **options)
        if found is None:
            raise ConfigurationError(
                f"load() of {model_name(self.model)} cannot use {type(session).__name__}: give an "
                "SQLAlchemy Session or Connection for an SQLAlchemy model, nothing or a database "
                "alias for a Django model, a psycopg2 connection for a plain table name."
            )
        return found


def _check_condition(cursor: Cursor, watcher: Watcher, spec: Specification) -> None:
    """Check the condition: PostgreSQL plans it as the trigger will.

    Raises WatcherError with PostgreSQL's message and the position in the user's text.
    """
    sides = {"inserted": ["new"], "deleted": ["old"]}.get(spec.op, ["new", "old"])
    # A row is made from the table's type, since the role may lack the right to read the table. As
    # in a trigger, it has no virtual columns, and rows of an update have a number, so that a
    # condition cannot pass them as the table's type.
    columns: list[sql.Composable] = [
        sql.Identifier(column.name) for column in spec.table.columns if not column.virtual
    ]
    if spec.op == "updated":
        columns.append(sql.SQL("row_number() OVER ()"))
    row = sql.SQL("(SELECT {} FROM (SELECT (NULL::{}).*) AS row) AS {}")
    rows = [
        row.format(
            sql.SQL(", ").join(columns),
            sql.Identifier(spec.table.schema, spec.table.name),
            sql.SQL(side),
        )
        for side in sides
    ]
    head = (
        sql.SQL("EXPLAIN SELECT FROM {} WHERE (\n")
        .format(sql.SQL(" CROSS JOIN ").join(rows))
        .as_string(cursor)
    )
    assert spec.when is not None
    try:
        cursor.execute(f"{head}{spec.when}\n)")
    except psycopg2.Error as error:
        if error.pgcode is None:
            raise
        where = ""
        if (found := error_position(error)) is not None:
            position = found - len(head)
            if 0 < position <= len(spec.when):
                where = f" at character {position} ({spec.when[position - 1 :][:20]!r})"
        hint = f" {error.diag.message_hint}" if error.diag.message_hint else ""
        raise WatcherError(
            f"The watcher {watcher} has a condition that PostgreSQL rejects for {spec.op!r}: "
            f"{error.diag.message_primary}{where}.{hint} when={spec.when!r}; it may use "
            f"{' and '.join(side.upper() for side in sides)}, and must be true or false."
        ) from error
