"""How the outbox and its consumers stand: what ``status`` and ``pgsignals consumers`` tell."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from psycopg2.extensions import cursor as Cursor

from ..triggers import names
from .backfill import BackfillState, backfills
from .cursors import Snapshot
from .schema import SLOTS

# Of a longer backlog it is enough to know that it is longer.
_MOST_ROWS = 200_000


@dataclass(frozen=True)
class ConsumerState:
    """One part of a consumer.

    ``lag`` counts the events that it has not acknowledged (of at most 200,000 messages),
    ``lag_seconds`` is the age of the oldest of them. ``holder`` is the process that reads for it,
    ``active`` whether that is there. ``dead_letters`` are those of all its parts.
    """

    name: str
    part: int
    parts: int
    ephemeral: bool
    active: bool
    holder: str | None
    lag: int
    lag_seconds: float
    acknowledged: int
    acknowledged_at: datetime
    dead_letters: int


@dataclass(frozen=True)
class OutboxState:
    """The outbox at one moment: its size, its partitions in use, and who reads it.

    ``shed`` counts statements that found it full while no consumer lived. ``backfills`` are those
    that are running.
    """

    bytes: int
    partitions: int
    shed: int
    consumers: tuple[ConsumerState, ...]
    backfills: tuple[BackfillState, ...] = ()


_CONSUMERS = """
SELECT c.name, c.part, c.parts, c.ephemeral, c.holder, c.token, c.snapshot,
       coalesce(c.target, c.snapshot), c.last_id, c.floor,
       c.lease_until > pg_catalog.clock_timestamp(), c.acknowledged, c.acknowledged_at,
       (SELECT pg_catalog.count(*) FROM pgsignals.dead_letters d WHERE d.consumer = c.name)
FROM pgsignals.consumers c ORDER BY c.name, c.part
"""

# A message has a line for its header, and one for each event.
_LAG = f"""
SELECT coalesce(pg_catalog.sum(
         pg_catalog.length(payload)
         - pg_catalog.length(pg_catalog.replace(payload, E'\\n', ''))), 0),
       coalesce(extract(epoch FROM pg_catalog.clock_timestamp())
         - pg_catalog.min(substring(payload FROM '"t":([0-9]+)')::float8) / 1e6, 0)
FROM (
  SELECT payload FROM pgsignals.outbox
  WHERE id > %(floor)s AND (txid >= %(xmax)s OR txid = ANY (%(running)s::bigint[]))
    AND NOT (id <= %(last_id)s AND txid < %(target_xmax)s
             AND txid <> ALL (%(target_running)s::bigint[]))
    AND channel = ANY (%(channels)s::bigint[])
  ORDER BY id LIMIT {_MOST_ROWS}
) AS unread
"""


def read_outbox(cursor: Cursor) -> OutboxState:
    """The outbox and all its consumers. The schema must be there."""
    sizes = []
    for slot in range(SLOTS):
        cursor.execute(
            f"SELECT pg_catalog.pg_total_relation_size('pgsignals.outbox_{slot}'),"
            f" EXISTS (SELECT FROM pgsignals.outbox_{slot})"
        )
        sizes += cursor.fetchall()
    cursor.execute("SELECT last_value FROM pgsignals.outbox_shed")
    [(shed,)] = cursor.fetchall()
    cursor.execute("SELECT name, part, channels FROM pgsignals.consumers")
    channels = {(name, part): wanted for name, part, wanted in cursor.fetchall()}
    held = _held(cursor)
    cursor.execute(_CONSUMERS)
    consumers = []
    for row in cursor.fetchall():
        name, part, parts, ephemeral, holder, token, since, until, last_id, floor, *rest = row
        leased, count, at, dead = rest
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
                "channels": channels.get((name, part), []),
            },
        )
        [(lag, seconds)] = cursor.fetchall()
        key = (names.cursor_key(name, part) + token) % 2147483647
        active = holder is not None and bool(leased) and key in held
        consumers.append(
            ConsumerState(
                name,
                part,
                parts,
                ephemeral,
                active,
                holder,
                int(lag),
                max(0.0, float(seconds)),
                count,
                at,
                dead,
            )
        )
    return OutboxState(
        sum(size for size, _ in sizes),
        sum(used for _, used in sizes),
        shed,
        tuple(consumers),
        tuple(each for each in backfills(cursor) if each.state == "running"),
    )


def _held(cursor: Cursor) -> set[int]:
    """The locks of the claims whose sessions live."""
    cursor.execute(
        "SELECT objid::bigint FROM pg_catalog.pg_locks WHERE locktype = 'advisory'"
        " AND classid = %s AND objsubid = 2 AND granted AND database ="
        " (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())",
        (names.CURSOR_CLASS,),
    )
    return {key for (key,) in cursor.fetchall()}
