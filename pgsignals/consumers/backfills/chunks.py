"""Existing rows as events: reads a chunk of a table, and makes a message of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import psycopg2
from psycopg2 import errors as pg
from psycopg2 import sql

from ...core.errors import PayloadError
from ...core.events import Message, Topic, model_identity, model_name
from ...core.payload import VERSION, Cast, Decoder
from ...triggers import names
from ...triggers.definitions import Definition
from ...triggers.sql import SETTINGS, Specification, fields, row_text, value_of_text, value_text
from ..consumer_store import ConsumerStore

OP = "snapshot"
# The most bytes of a chunk, unless one row alone is longer.
CHUNK_BYTES = 1 << 20
# How long a chunk waits for a table that somebody has locked: events of the log wait meanwhile.
LOCK_MILLISECONDS = 100


class SnapshotMessage(Message):
    """The rows of a chunk. Their uids depend on the backfill and their keys alone.

    So a row that is delivered again, by another process too, has the same uid.
    """

    uids: Sequence[str] = ()
    lines: Sequence[str] = ()

    def uid(self, number: int) -> str:
        return self.uids[number]

    def row_payload(self, number: int) -> str:
        head = _Head(VERSION, self.txid, 0, self.at_us, self.uids[number])
        return f"{msgspec.json.encode(head).decode()}\n{self.lines[number]}"


class _Head(msgspec.Struct):
    """The header of the payload of a chunk's row, which has the row's uid."""

    v: int
    x: int
    s: int
    t: int
    u: str


_head = msgspec.json.Decoder(_Head)


@dataclass(frozen=True)
class SnapshotTopic:
    """The topic of a backfill of a model or label, with all columns that its watchers ask for.

    A watcher's condition does not count, since it is about a change, which a snapshot is not.
    """

    topic: Topic
    spec: Specification
    channel: int

    def decoder(self, cast: Cast) -> SnapshotDecoder:
        """Return a decoder for the topic's rows."""
        return SnapshotDecoder(self, cast)

    def fits(self, schema: str, table: str, label: str | None, model: str | None) -> bool:
        """Whether a request of these names means this topic; ``model`` if a table has several."""
        topic = self.topic
        return (topic.schema, topic.table, topic.label) == (schema, table, label) and (
            model is None or model == model_name(topic.model)
        )


def snapshot_topics(definitions: Sequence[Definition]) -> list[SnapshotTopic]:
    """Return a topic for each label, and for each model without one, whose table has a key."""
    groups: dict[tuple[str | None, int | str], list[Definition]] = {}
    for definition in definitions:
        watcher, table = definition.watcher, definition.trigger.spec.table
        if definition.topic.op != "truncated" and table.key:
            identity = "" if watcher.label is not None else model_identity(watcher.model)
            groups.setdefault((watcher.label, identity), []).append(definition)
    return [_snapshot_topic(group) for group in groups.values()]


def _snapshot_topic(group: Sequence[Definition]) -> SnapshotTopic:
    first = group[0]
    table = first.trigger.spec.table
    tracked = tuple(dict.fromkeys(c for each in group for c in each.trigger.spec.tracked))
    spec = Specification(
        namespace=first.trigger.spec.namespace,
        table=table,
        op=OP,
        label=first.watcher.label,
        tracked=tracked,
        transport=first.trigger.spec.transport,
    )
    hashed = names.digest(
        OP,
        spec.namespace,
        table.schema,
        table.name,
        spec.label or "",
        model_name(first.watcher.model),
        repr(fields((*table.key_columns, *tracked))),
        *(column.name for column in (*table.key_columns, *tracked)),
    )
    topic = replace(
        first.topic,
        op=OP,
        key=tuple(column.attribute for column in table.key_columns),
        values=tuple(column.attribute for column in tracked),
        compared=False,
        name=hashed[:8],
    )
    return SnapshotTopic(topic, spec, names.channel_key(hashed))


class SnapshotDecoder(Decoder):
    """Makes messages of chunks, and of kept payloads (dead letters, say) of a chunk's row."""

    def __init__(self, source: SnapshotTopic, cast: Cast) -> None:
        spec = source.spec
        super().__init__(source.topic, fields(spec.table.key_columns), fields(spec.tracked), cast)
        self.source = source

    def decode(self, payload: str) -> SnapshotMessage:
        """Decode a payload that was kept of one row: see Decoder."""
        head, _, line = payload.partition("\n")
        try:
            header = _head.decode(head)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise PayloadError(f"a dead letter of a backfill: {error}") from error
        return self.message(header.x, header.t, [line], [header.u])

    def message(
        self, txid: int, at_us: int, lines: Sequence[str], uids: Sequence[str]
    ) -> SnapshotMessage:
        """Return a message of these lines. Raises PayloadError."""
        head = _Head(VERSION, txid, 0, at_us, "")
        payload = "\n".join((msgspec.json.encode(head).decode(), *lines))
        found = super().decode(payload)
        if not isinstance(found, Message):
            raise PayloadError("rows of a table that no trigger would write")
        return SnapshotMessage(found.topic, txid, 0, at_us, {}, found.rows, uids=uids, lines=lines)


@dataclass(frozen=True)
class Scope:
    """The rows that a backfill goes through; uids have its ``number`` and when it was ``begun``."""

    number: int
    begun: str
    condition: str | None
    search_path: str


@dataclass(frozen=True)
class Chunk:
    """Some rows of a table in the order of its key, as they were at a ``watermark`` of the log.

    ``message`` has the rows that meet the backfill's condition, if any do, and ``size`` is the
    length of their text. ``scanned`` counts all rows, and ``last_key`` is the last one's key.
    ``cut``: CHUNK_BYTES ended the chunk before as many rows as were asked for. ``last``: there are
    no more rows.
    """

    watermark: str
    message: SnapshotMessage | None
    scanned: int
    last_key: tuple[str, ...] | None
    size: int
    cut: bool
    last: bool


def read_chunk(
    consumer: ConsumerStore,
    decoder: SnapshotDecoder,
    scope: Scope,
    after: Sequence[str] | None,
    limit: int,
    statement_seconds: float,
) -> Chunk:
    """Read the next rows behind the key ``after``, at most ``limit``, and their watermark.

    Raises PayloadError, and psycopg2.Error, after which the session is usable unless it is lost.
    """
    spec = decoder.source.spec
    opening = _opening(consumer.log.marking, spec, scope, statement_seconds)
    chunk = _chunk(spec, scope, after, limit)
    try:
        answer = _read(consumer, opening, chunk, consumer.session.execute)
    except (pg.CharacterNotInRepertoire, pg.UntranslatableCharacter):
        answer = _read(consumer, opening, chunk, consumer.session.execute_unconverted)
    watermark, xmax, at_us, rows, last_key = answer
    found = rows[0][1] if rows else 0
    matching = [(consumer.session.text(line), key) for line, _, *key in rows if line is not None]
    message = None
    if matching:
        lines = [line for line, _ in matching]
        uids = [_uid(decoder.topic, scope, key) for _, key in matching]
        message = decoder.message(xmax, at_us, lines, uids)
    return Chunk(
        watermark=watermark,
        message=message,
        scanned=len(rows),
        last_key=last_key,
        size=sum(len(line) for line, _ in matching),
        cut=len(rows) < found,
        last=found < limit and len(rows) == found,
    )


def _read(
    consumer: ConsumerStore,
    opening: sql.Composable,
    chunk: sql.Composable,
    read: Callable[..., Any],
) -> tuple[str, int, int, list[tuple[Any, ...]], tuple[str, ...] | None]:
    """Read the watermark, its snapshot's xmax, the time, the rows, and the last row's key."""
    try:
        [(watermark, xmax, at_us, same)] = consumer.execute(opening)
        if not same:
            # The key that reading goes on behind means nothing in another table of the same name.
            consumer.execute("ROLLBACK")
            raise PayloadError("the table was made anew meanwhile: ask for its rows again")
        rows = read(chunk, timeout=consumer.timeout)
        last_key = tuple(rows[-1][2:]) if rows else None
        for each in last_key or ():
            # Reading goes on behind this key. One that cannot be sent back is refused here; refused
            # with its acknowledgement, it would keep all others from being saved.
            each.encode()
    except psycopg2.Error as error:
        if error.pgcode is not None:
            consumer.execute("ROLLBACK")
        raise
    except UnicodeError as error:
        # A database that holds any bytes is sent Latin-1, which a model's discriminator may not fit
        # into. To others, bytes that are no text cannot be sent.
        consumer.execute("ROLLBACK")
        raise PayloadError(f"a text that cannot be sent to this database: {error}") from error
    consumer.execute("COMMIT")
    return watermark, xmax, at_us, rows, last_key


def _uid(topic: Topic, scope: Scope, key: Sequence[str]) -> str:
    hasher = hashlib.blake2b(f"{scope.number} {scope.begun}".encode(), digest_size=16)
    for text in key:
        data = text.encode("utf-8", "surrogatepass")
        hasher.update(b" %d:" % len(data))
        hasher.update(data)
    return f"{topic.name}-{OP}-{scope.number:x}-{hasher.hexdigest()}"


def table_name(spec: Specification) -> sql.Composable:
    """Return the table as its triggers see it: without the tables that inherit from it."""
    name = sql.Identifier(spec.table.schema, spec.table.name)
    return name if spec.table.partitioned else sql.SQL("ONLY {}").format(name)


def _opening(
    marking: str, spec: Specification, scope: Scope, statement_seconds: float
) -> sql.Composable:
    """Begin a transaction; return its watermark, and whether the table is still the one asked for.

    The table is locked before the snapshot is taken: a snapshot from before a rewriting ALTER TABLE
    sees no rows.
    """
    settings = [
        *SETTINGS,
        ("lock_timeout", f"{LOCK_MILLISECONDS}ms"),
        ("statement_timeout", f"{round(statement_seconds * 1000)}ms"),
        # A process that hangs here must not keep its snapshot and its lock.
        ("idle_in_transaction_session_timeout", f"{round(statement_seconds * 4000)}ms"),
    ]
    own_types = {c.base_type[0] for c in spec.table.key_columns} - {"pg_catalog"}
    path: list[sql.Composable] = [sql.SQL("pg_catalog"), *map(sql.Identifier, sorted(own_types))]
    if scope.condition is not None and scope.search_path:
        path.append(sql.SQL(scope.search_path))
    path.append(sql.SQL("pg_temp"))
    return sql.SQL(
        "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; {}SET LOCAL search_path TO {};"
        " LOCK TABLE {} IN ACCESS SHARE MODE;"
        " SELECT {}, pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot())"
        "::pg_catalog.text::pg_catalog.int8, (pg_catalog.date_part('epoch',"
        " pg_catalog.clock_timestamp()) OPERATOR(pg_catalog.*) 1e6::pg_catalog.float8)"
        "::pg_catalog.int8, (SELECT table_oid OPERATOR(pg_catalog.=) pg_catalog.to_regclass("
        "pg_catalog.format('%I.%I', schema_name, table_name))::pg_catalog.oid"
        " FROM pgsignals.backfills WHERE id OPERATOR(pg_catalog.=) {})"
    ).format(
        sql.SQL("").join(
            sql.SQL("SET LOCAL {} TO {}; ").format(sql.SQL(name), sql.Literal(value))
            for name, value in settings
        ),
        sql.SQL(", ").join(path),
        table_name(spec),
        sql.SQL(marking),
        sql.Literal(scope.number),
    )


def _chunk(
    spec: Specification, scope: Scope, after: Sequence[str] | None, limit: int
) -> sql.Composable:
    """Return the query for a chunk: rows by the key, whether they meet the condition or not.

    Otherwise a condition that few rows meet would have one chunk go through the whole table. The
    condition sees a row's columns by their names, and by NEW.
    """
    line, conditions = row_text(replace(spec, when=scope.condition))
    columns = spec.table.key_columns
    behind: sql.Composable = sql.SQL("")
    if after is not None:
        # ORDER BY goes by the type's own operators. Those of an extension are in its schema, and
        # `pg_catalog.>` would find a cast to another order.
        settled = all(c.comparable or c.base_type[0] == "pg_catalog" for c in columns)
        behind = sql.SQL(" WHERE ROW({}) {} ROW({})").format(
            sql.SQL(", ").join(sql.Identifier(c.name) for c in columns),
            sql.SQL("OPERATOR(pg_catalog.>)" if settled else ">"),
            sql.SQL(", ").join(
                value_of_text(c, text) for c, text in zip(columns, after, strict=True)
            ),
        )
    return sql.SQL(
        "SELECT pgs_line, pgs_found, {names} FROM (\n"
        "  SELECT *, pg_catalog.count(*) OVER () AS pgs_found,\n"
        "         pg_catalog.sum(pg_catalog.octet_length(pgs_line)) OVER (ROWS UNBOUNDED PRECEDING)"
        " AS pgs_size\n"
        "  FROM (\n"
        "    SELECT CASE WHEN {conditions} THEN {line} END AS pgs_line, {keys}\n"
        "    FROM (SELECT * FROM {table}{behind} ORDER BY {order} LIMIT {limit}) AS new\n"
        # OFFSET 0 keeps the planner from merging the levels, which would compute each line twice.
        "    OFFSET 0\n"
        "  ) AS lines\n"
        ") AS sized\n"
        "WHERE coalesce(pgs_size, 0) OPERATOR(pg_catalog.-)"
        " coalesce(pg_catalog.octet_length(pgs_line), 0) OPERATOR(pg_catalog.<) {most}"
    ).format(
        names=sql.SQL(", ").join(sql.Identifier(f"pgs_key{n}") for n in range(len(columns))),
        conditions=conditions,
        line=line,
        keys=sql.SQL(", ").join(
            sql.SQL("{} AS {}").format(value_text(c, "new"), sql.Identifier(f"pgs_key{n}"))
            for n, c in enumerate(columns)
        ),
        table=table_name(spec),
        behind=behind,
        order=sql.SQL(", ").join(sql.Identifier(c.name) for c in columns),
        limit=sql.Literal(limit),
        most=sql.Literal(CHUNK_BYTES),
    )
