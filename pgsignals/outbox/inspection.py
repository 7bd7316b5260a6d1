"""The state of the outbox and its consumers, for ``status`` and ``pgsignals consumers``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

from psycopg2.extensions import cursor as Cursor

from ..consumers.backfills.requests import BackfillState, backfills
from ..consumers.channels import Channel, read_channels, wanted
from ..consumers.consumer_store import claim_key
from ..consumers.parking_store import ParkedState, read_parked
from ..consumers.slot_states import SlotState, read_slots
from ..core.events import event_uid
from ..postgres.snapshot import Snapshot
from ..triggers import names
from .schema import SEGMENTS

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
# A longer backlog is not counted to its end.
_MOST_ROWS = 200_000


@dataclass(frozen=True)
class ConsumerState:
    """One partition of a consumer.

    ``lag`` counts the events that it has not acknowledged (of at most 200,000 messages),
    ``lag_seconds`` is the age of the oldest of them, which happened at ``oldest_at`` and has the
    uid ``oldest``. Each partition counts the events of all. ``lost_until``: until when events were
    dropped that the consumer had not read, if no Gap has told it yet. ``holder`` is the process
    that reads the partition, ``active`` whether its session lives. ``dead_letters`` counts those of
    all partitions.

    A consumer of the write-ahead log has ``unread_bytes`` of it to read, most of which may be of no
    concern to it, and None of the outbox. How many events that is, nobody knows: ``lag`` is 0, and
    ``lag_seconds`` says for how long not all has been acknowledged. ``slot`` is its replication
    slot; None if it has none, of the outbox or because somebody has dropped it.
    """

    name: str
    part: int
    parts: int
    ephemeral: bool
    active: bool
    holder: str | None
    lag: int
    lag_seconds: float
    oldest_at: datetime | None
    oldest: str | None
    lost_until: datetime | None
    acknowledged: int
    acknowledged_at: datetime
    dead_letters: int
    unread_bytes: int | None = None
    slot: SlotState | None = None


@dataclass(frozen=True)
class OutboxState:
    """The outbox at one moment: its size, its segments in use (``partitions``), and its consumers.

    ``shed`` counts statements that found the outbox full while no consumer lived. ``backfills`` are
    those that are running. ``parked`` are events kept for single receivers that are too slow, or
    that have to be called again; their consumers have gone past them. ``streams`` is the slot by
    which the server keeps its log for streams to browsers, if there is one.
    """

    bytes: int
    partitions: int
    shed: int
    consumers: tuple[ConsumerState, ...]
    backfills: tuple[BackfillState, ...] = ()
    parked: tuple[ParkedState, ...] = ()
    streams: SlotState | None = None


_CONSUMERS = """
SELECT c.name, c.part, c.parts, c.ephemeral, c.holder, c.token, c.snapshot,
       coalesce(c.target, c.snapshot), c.last_id, c.floor,
       c.acknowledged, c.acknowledged_at, c.lost_until, c.channels,
       (SELECT pg_catalog.count(*) FROM pgsignals.dead_letters d WHERE d.consumer = c.name),
       CASE WHEN c.epoch LIKE '%-wal/%'
            THEN (pg_catalog.pg_current_wal_flush_lsn() - '0/0'::pg_lsn)::bigint - c.lsn END,
       -- An idle consumer says so three times in a lease.
       CASE WHEN age > c.lease THEN age ELSE 0 END
FROM pgsignals.consumers c
CROSS JOIN LATERAL (
  SELECT extract(epoch FROM pg_catalog.clock_timestamp() - c.acknowledged_at)::float8 AS age
) AS quiet
ORDER BY c.name, c.part
"""

# A message has a line for its header, and one for each event.
_LAG = f"""
WITH unread AS MATERIALIZED (
  SELECT o.id, o.txid, o.channel,
         substring(substring(o.payload, 1, 100) FROM '"t":([0-9]+)')::bigint AS at,
         pg_catalog.length(o.payload)
           - pg_catalog.length(pg_catalog.replace(o.payload, E'\\n', '')) AS events
  FROM pgsignals.outbox AS o
  JOIN ROWS FROM (pg_catalog.unnest(%(channels)s::bigint[]),
                  pg_catalog.unnest(%(untils)s::bigint[])) AS w(channel, until)
    ON o.channel = w.channel AND (w.until IS NULL OR o.id < w.until)
  WHERE o.id > %(floor)s AND (o.txid >= %(xmax)s OR o.txid = ANY (%(running)s::bigint[]))
    AND NOT (o.id <= %(last_id)s AND o.txid < %(target_xmax)s
             AND o.txid <> ALL (%(target_running)s::bigint[]))
  ORDER BY o.id LIMIT {_MOST_ROWS}
)
SELECT (SELECT pg_catalog.sum(events) FROM unread), pg_catalog.clock_timestamp(),
       at, channel, txid, id
FROM unread ORDER BY at, id LIMIT 1
"""


def wanted_channels(stored: Sequence[int], known: Mapping[int, Channel]) -> dict[int, int | None]:
    """Return the channels that definitions with these channels read, each up to an id or all.

    See ``wanted``.
    """
    found: dict[int, int | None] = {}
    for own in stored:
        if own in known:
            for key, ids in wanted(own, known).items():
                until = ids[-1][1]
                if until is None or found.get(key, until) is None:
                    found[key] = None
                else:
                    found[key] = max(until, found.get(key) or 0)
    return found


def read_outbox(cursor: Cursor) -> OutboxState:
    """Return the state of the outbox and all its consumers. The schema must be there."""
    sizes = []
    for segment in range(SEGMENTS):
        cursor.execute(
            f"SELECT pg_catalog.pg_total_relation_size('pgsignals.outbox_{segment}'),"
            f" EXISTS (SELECT FROM pgsignals.outbox_{segment})"
        )
        sizes += cursor.fetchall()
    cursor.execute("SELECT last_value FROM pgsignals.outbox_shed")
    [(shed,)] = cursor.fetchall()
    known = read_channels(cursor)
    held = held_claims(cursor)
    slots = read_slots(cursor)
    cursor.execute("SELECT pg_catalog.current_database()")
    [(database,)] = cursor.fetchall()
    cursor.execute(_CONSUMERS)
    consumers = []
    for row in cursor.fetchall():
        name, part, parts, ephemeral, holder, token, *position = row[:10]
        count, at, lost_until, stored, dead, unread_bytes, seconds = row[10:]
        lag, oldest_at, oldest = 0, None, None
        slot = None if unread_bytes is None else slots.get(names.slot_name(database, name))
        if unread_bytes is None:
            lag, seconds, oldest_at, oldest = _lag(
                cursor, position, wanted_channels(stored, known), known
            )
        active = holder is not None and claim_key(name, part, token) in held
        consumers.append(
            ConsumerState(
                name,
                part,
                parts,
                ephemeral,
                active,
                holder,
                lag,
                seconds,
                oldest_at,
                oldest,
                lost_until,
                count,
                at,
                dead,
                unread_bytes,
                slot,
            )
        )
    return OutboxState(
        sum(size for size, _ in sizes),
        sum(used for _, used in sizes),
        shed,
        tuple(consumers),
        tuple(each for each in backfills(cursor) if each.state == "running"),
        tuple(read_parked(cursor)),
        slots.get(names.streams_slot(database)),
    )


def _lag(
    cursor: Cursor,
    position: Sequence[Any],
    channels: Mapping[int, int | None],
    known: Mapping[int, Channel],
) -> tuple[int, float, datetime | None, str | None]:
    """Return how many events of the outbox are not acknowledged, and the age of the oldest.

    Also when that happened, and its uid; a position is its snapshot, target, last id and floor.
    """
    since, until, last_id, floor = position
    snapshot, target = Snapshot.parse(since), Snapshot.parse(until)
    cursor.execute(
        _LAG,
        {
            "floor": floor,
            "xmax": snapshot.xmax,
            "running": list(snapshot.running),
            "last_id": last_id,
            "target_xmax": target.xmax,
            "target_running": list(target.running),
            "channels": list(channels),
            "untils": list(channels.values()),
        },
    )
    # One row, or none if all is acknowledged.
    for events, now, micros, channel, txid, sequence in cursor.fetchall():
        at = _EPOCH + timedelta(microseconds=micros)
        seconds = max(0.0, (now - at).total_seconds())
        return int(events), seconds, at, event_uid(known[channel].layout.name, txid, sequence, 0)
    return 0, 0.0, None, None


def held_claims(cursor: Cursor) -> set[int]:
    """Return the keys of the claims' locks whose sessions live."""
    cursor.execute(
        "SELECT objid::bigint FROM pg_catalog.pg_locks WHERE locktype = 'advisory'"
        " AND classid = %s AND objsubid = 2 AND granted AND database ="
        " (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())",
        (names.CURSOR_CLASS,),
    )
    return {key for (key,) in cursor.fetchall()}
