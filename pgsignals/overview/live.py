"""What changes from second to second, read by one statement, as the server makes JSON of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

import msgspec
from psycopg2.extensions import cursor as Cursor

from ..consumers.backfills.requests import _STATES as _BACKFILLS
from ..consumers.backfills.requests import BackfillState
from ..consumers.parking_store import ParkedState
from ..consumers.slot_states import _SLOTS, SlotState
from ..outbox.schema import SEGMENTS
from ..postgres.session import legible_rows
from ..triggers import names

# A longer backlog is not counted to its end, since this is asked for again and again.
MOST_MESSAGES = 20_000
# The most messages of the outbox to show since the last look, and to count.
MOST_SHOWN, MOST_COUNTED = 100, 20_000
MOST_BACKFILLS = 20


@dataclass(frozen=True)
class RawConsumer:
    """A partition of a consumer as its row has it, with what is unread of its log."""

    name: str
    part: int
    parts: int
    ephemeral: bool
    holder: str | None
    token: int
    wal: bool
    acknowledged: int
    acknowledged_at: datetime
    lost_until: datetime | None
    channels: tuple[int, ...]
    unread_bytes: int | None
    quiet: float
    events: int
    messages: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class RawLetters:
    """The dead letters of a consumer: how many, and what shows that others have come or gone."""

    consumer: str
    count: int
    latest: int
    at: datetime
    retrying: int


@dataclass(frozen=True)
class Written:
    """What was written to the outbox since the last look."""

    id: int
    channel: int
    payload: str


@dataclass(frozen=True)
class Counted:
    """How many events a channel of the outbox has had since the last look."""

    channel: int
    events: int


@dataclass(frozen=True)
class Changed:
    """How many rows of a table have been inserted, updated and deleted, as the server counts."""

    oid: int
    inserted: int
    updated: int
    deleted: int


@dataclass(frozen=True)
class Durable:
    """What the schema of durable delivery has."""

    bytes: int
    shed: int
    held: tuple[int, ...]
    consumers: tuple[RawConsumer, ...]
    letters: tuple[RawLetters, ...]
    parked: tuple[ParkedState, ...]
    backfills: tuple[BackfillState, ...]
    last_id: int
    written: tuple[Written, ...]
    counted: tuple[Counted, ...]


@dataclass(frozen=True)
class Live:
    """All that changes from second to second; ``durable`` is None without its schema."""

    at: datetime
    queue: float
    slots: tuple[SlotState, ...]
    changed: tuple[Changed, ...]
    durable: Durable | None = None


def _many(kind: type, query: str) -> str:
    """Return SQL for a query's rows as JSON: an array of objects with a dataclass's names."""
    columns = ", ".join(f'"{each.name}"' for each in fields(kind))
    return f"(SELECT coalesce(pg_catalog.json_agg(j), '[]') FROM ({query}) AS j ({columns}))"


def _literally(query: str) -> str:
    """Return a query that was written without parameters for a statement that has some."""
    return query.replace("%", "%%")


_CHANGED = (
    "SELECT relid::bigint, n_tup_ins, n_tup_upd, n_tup_del FROM pg_catalog.pg_stat_all_tables"
    " WHERE relid = ANY (%(tables)s::pg_catalog.oid[])"
)
_COMMON = f"""
  'at', pg_catalog.clock_timestamp(),
  'queue', pg_catalog.pg_notification_queue_usage(),
  'slots', {_many(SlotState, _literally(_SLOTS))},
  'changed', {_many(Changed, _CHANGED)}
"""

# A snapshot is xmin:xmax:running,…. What is unread is as in outbox/inspection.py.
_CONSUMERS = f"""
SELECT c.name, c.part, c.parts, c.ephemeral, c.holder, c.token, c.wal, c.acknowledged,
       c.acknowledged_at, c.lost_until, c.channels,
       CASE WHEN c.wal THEN ((CASE WHEN pg_catalog.pg_is_in_recovery()
         THEN pg_catalog.pg_last_wal_replay_lsn() ELSE pg_catalog.pg_current_wal_flush_lsn() END)
         - '0/0'::pg_lsn)::bigint - c.lsn END,
       -- An idle consumer says so three times in a lease.
       CASE WHEN quiet > c.lease THEN quiet ELSE 0 END,
       coalesce(lag.events, 0)::bigint, lag.messages, coalesce(lag.bytes, 0)::bigint,
       coalesce(greatest(0, extract(epoch FROM pg_catalog.clock_timestamp()) - lag.at / 1e6), 0)
FROM (
  SELECT *, epoch LIKE '%%-wal/%%' AS wal,
         extract(epoch FROM pg_catalog.clock_timestamp() - acknowledged_at)::float8 AS quiet,
         split_part(snapshot, ':', 2)::bigint AS xmax,
         coalesce(string_to_array(nullif(split_part(snapshot, ':', 3), ''), ','), '{{}}')::bigint[]
           AS running,
         split_part(coalesce(target, snapshot), ':', 2)::bigint AS target_xmax,
         coalesce(string_to_array(nullif(split_part(coalesce(target, snapshot), ':', 3), ''), ','),
                  '{{}}')::bigint[] AS target_running
  FROM pgsignals.consumers
) AS c
CROSS JOIN LATERAL (
  SELECT pg_catalog.sum(events) AS events, pg_catalog.count(*) AS messages,
         pg_catalog.sum(bytes) AS bytes, pg_catalog.min(at) AS at
  FROM (
    SELECT pg_catalog.length(o.payload)
             - pg_catalog.length(pg_catalog.replace(o.payload, E'\\n', '')) AS events,
           pg_catalog.octet_length(o.payload) AS bytes,
           substring(substring(o.payload, 1, 100) FROM '"t":([0-9]+)')::bigint AS at
    FROM pg_catalog.json_to_recordset(%(wanted)s) AS w (consumer text, channel bigint, until bigint)
    JOIN pgsignals.outbox AS o
      ON o.channel = w.channel AND (w.until IS NULL OR o.id < w.until)
    WHERE w.consumer = c.name AND NOT c.wal
      AND o.id > c.floor AND (o.txid >= c.xmax OR o.txid = ANY (c.running))
      AND NOT (o.id <= c.last_id AND o.txid < c.target_xmax
               AND o.txid <> ALL (c.target_running))
    LIMIT {MOST_MESSAGES}
  ) AS unread
) AS lag
ORDER BY c.name, c.part
"""

_LETTERS = """
SELECT consumer, pg_catalog.count(*), pg_catalog.max(id), pg_catalog.max(at),
       pg_catalog.count(*) FILTER (WHERE retry)
FROM pgsignals.dead_letters GROUP BY 1
"""
_PARKED = """
SELECT consumer, receiver, pg_catalog.count(*), pg_catalog.min(at)
FROM pgsignals.parked GROUP BY 1, 2 ORDER BY 1, 2
"""
_WRITTEN = f"""
SELECT o.id, o.channel, o.payload FROM pgsignals.outbox AS o WHERE o.id > %(after)s
ORDER BY o.id DESC LIMIT {MOST_SHOWN}
"""
_COUNTED = f"""
SELECT channel, pg_catalog.sum(events)::bigint FROM (
  SELECT o.channel, pg_catalog.length(o.payload)
           - pg_catalog.length(pg_catalog.replace(o.payload, E'\\n', '')) AS events
  FROM pgsignals.outbox AS o WHERE o.id > %(after)s LIMIT {MOST_COUNTED}) AS recent
GROUP BY 1
"""
_SIZES = " + ".join(
    f"pg_catalog.pg_total_relation_size('pgsignals.outbox_{segment}')"
    for segment in range(SEGMENTS)
)
_BACKFILL = f"{_literally(_BACKFILLS)} ORDER BY b.id DESC LIMIT {MOST_BACKFILLS}"

_DURABLE = f"""
  'durable', pg_catalog.json_build_object(
    'bytes', {_SIZES},
    'shed', (SELECT last_value FROM pgsignals.outbox_shed),
    'held', coalesce((SELECT pg_catalog.json_agg(objid::bigint) FROM pg_catalog.pg_locks
      WHERE locktype = 'advisory' AND classid = {names.CURSOR_CLASS} AND objsubid = 2 AND granted
        AND database = (SELECT oid FROM pg_catalog.pg_database
                        WHERE datname = pg_catalog.current_database())), '[]'),
    'consumers', {_many(RawConsumer, _CONSUMERS)},
    'letters', {_many(RawLetters, _LETTERS)},
    'parked', {_many(ParkedState, _PARKED)},
    'backfills', {_many(BackfillState, _BACKFILL)},
    'last_id', (SELECT last_value FROM pgsignals.outbox_id),
    'written', {_many(Written, _WRITTEN)},
    'counted', {_many(Counted, _COUNTED)}
  )
"""

_live = msgspec.json.Decoder(Live)


def read_live(
    cursor: Cursor,
    durable: bool,
    tables: Sequence[int],
    wanted: Mapping[str, Mapping[int, int | None]],
    after: int | None,
) -> Live:
    """Read all that changes from second to second.

    ``tables`` are those whose changes to count, ``wanted`` the channels that each consumer reads,
    up to an id or all, and ``after`` the id behind which rows of the outbox are new; None: none is.
    """
    asked = [
        {"consumer": name, "channel": channel, "until": until}
        for name, channels in wanted.items()
        for channel, until in channels.items()
    ]
    parameters: dict[str, Any] = {
        "tables": list(tables),
        "wanted": json.dumps(asked),
        "after": 2**62 if after is None else after,
    }
    what = f"{_COMMON}, {_DURABLE}" if durable else _COMMON
    rows = legible_rows(cursor, f"SELECT pg_catalog.json_build_object({what})::text", parameters)
    [(text,)] = rows
    return _live.decode(text.encode("utf-8", "replace"))
