"""The statements that park events for single receivers in the database."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from psycopg2.extensions import cursor as Cursor

from ..core.events import Event

if TYPE_CHECKING:
    from .consumer_store import ConsumerStore

# The most rows and bytes that are read at once.
_ROWS = 2000
_BYTES = 256 << 10


@dataclass(frozen=True)
class Kept:
    """An event kept for one receiver: the row ``number`` of the log's message ``id``.

    Where the log does not hold the event (a row of a backfill, say), ``id`` is None and ``payload``
    is a message of this one row.
    """

    receiver: str
    uid: str
    channel: int
    number: int
    id: int | None
    payload: str | None


@dataclass(frozen=True)
class Late(Kept):
    """An event that is parked, since its receiver has yet to take it."""

    redelivered: bool


def kept_as(
    event: Event, receiver: str, channel: int
) -> tuple[str, str, int, int, int | None, str | None]:
    """Return the fields of Kept for an event."""
    message, number = event._message, event._number
    payload = message.row_payload(number)
    if payload is None:
        return receiver, event.uid, channel, number, message.sequence, None
    return receiver, event.uid, channel, 0, None, payload


@dataclass(frozen=True)
class Parked:
    """A parked event: ``payload`` is its message with this one row left, once row ``number``."""

    key: int
    part: int
    uid: str
    channel: int
    number: int
    payload: str
    redelivered: bool


@dataclass(frozen=True)
class ParkedState:
    """The count of events parked for one receiver of a consumer, and the time of the oldest."""

    consumer: str
    receiver: str
    events: int
    since: datetime


# Sent with an acknowledgement, as one transaction: the acknowledged position goes past the event,
# which then comes from nowhere else. A parked payload is the message's header line and the row's.
_PARK = """
WITH ours AS MATERIALIZED (
  SELECT FROM pgsignals.consumers
  WHERE name = %(name)s AND part = %(part)s AND holder = %(holder)s AND token = %(token)s
  FOR UPDATE
), late AS MATERIALIZED (
  SELECT * FROM ROWS FROM (
    pg_catalog.unnest(%(late_receivers)s::text[]), pg_catalog.unnest(%(late_uids)s::text[]),
    pg_catalog.unnest(%(late_channels)s::bigint[]), pg_catalog.unnest(%(late_numbers)s::int[]),
    pg_catalog.unnest(%(late_ids)s::bigint[]), pg_catalog.unnest(%(late_payloads)s::text[]),
    pg_catalog.unnest(%(late_redelivered)s::boolean[])
  ) WITH ORDINALITY AS l(receiver, uid, channel, number, id, payload, redelivered, n)
), lines AS MATERIALIZED (
  SELECT o.id, t.line, t.n FROM {messages} AS o
  CROSS JOIN LATERAL pg_catalog.string_to_table(o.payload, E'\\n') WITH ORDINALITY AS t(line, n)
  WHERE o.id = ANY (%(late_ids)s::bigint[])
)
INSERT INTO pgsignals.parked
  (consumer, part, receiver, uid, channel, message, number, payload, redelivered)
SELECT %(name)s, %(part)s, l.receiver, l.uid, l.channel, l.id, l.number,
       coalesce(l.payload, head.line || E'\\n' || body.line), l.redelivered
FROM ours CROSS JOIN late AS l
LEFT JOIN lines AS head ON head.id = l.id AND head.n = 1
LEFT JOIN lines AS body ON body.id = l.id AND body.n = l.number + 2
-- What the log has dropped is a Gap.
WHERE coalesce(l.payload, head.line || body.line) IS NOT NULL
ORDER BY l.n
ON CONFLICT (consumer, receiver, uid) DO NOTHING;
"""


def parking_statement(messages: str) -> str:
    """Return the statement that parks late events, of which ``messages`` holds some: see Log."""
    return _PARK.format(messages=messages)


def parking_values(late: Sequence[Late], given: Callable[[str], str]) -> dict[str, list[Any]]:
    """Return the parameters of that statement that the acknowledgement does not have too."""
    return {
        "late_receivers": [each.receiver for each in late],
        "late_uids": [each.uid for each in late],
        "late_channels": [each.channel for each in late],
        "late_numbers": [each.number for each in late],
        "late_ids": [each.id for each in late],
        "late_payloads": [None if each.payload is None else given(each.payload) for each in late],
        "late_redelivered": [each.redelivered for each in late],
    }


_FETCH = f"""
SELECT id, part, uid, channel, number, payload, redelivered FROM (
  SELECT *, pg_catalog.sum(pg_catalog.octet_length(payload)) OVER (ORDER BY id) AS size FROM (
    SELECT * FROM pgsignals.parked
    WHERE consumer = %s AND receiver = %s AND part = ANY (%s::int[]) AND id > %s
    ORDER BY id LIMIT %s
  ) AS page
) AS sized
WHERE size - pg_catalog.octet_length(payload) < {_BYTES} ORDER BY id
"""


class ParkingStore:
    """The parked events of one consumer, through the session of the thread that reads."""

    def __init__(self, consumer: ConsumerStore) -> None:
        self._name = consumer.name
        self._messages = consumer.log.messages
        self._execute = consumer.execute
        self._text = consumer.session.text

    def receivers(self, part: int) -> dict[str, int]:
        """Return the receivers for which events of a partition are parked, with the latest key."""
        rows = self._execute(
            "SELECT receiver, pg_catalog.max(id) FROM pgsignals.parked"
            " WHERE consumer = %s AND part = %s GROUP BY receiver",
            (self._name, part),
        )
        return dict(rows)

    def fetch(self, receiver: str, parts: Sequence[int], after: int, most: int) -> list[Parked]:
        """Return the events parked for a receiver behind a key, as many as a page takes."""
        rows = self._execute(
            _FETCH,
            (self._name, receiver, list(parts), after, min(most, _ROWS)),
        )
        return [
            Parked(key, part, uid, channel, number, self._text(payload), redelivered)
            for key, part, uid, channel, number, payload, redelivered in rows
        ]

    def forget_replayed(self, part: int, after: int) -> None:
        """Forget the parked events that come again in the log's order, since it is read anew."""
        self._execute(
            "DELETE FROM pgsignals.parked AS p WHERE consumer = %s AND part = %s AND message > %s"
            f" AND EXISTS (SELECT FROM {self._messages} AS o WHERE o.id = p.message)",
            (self._name, part, after),
        )

    def remove(self, receivers: Sequence[str], uids: Sequence[str]) -> None:
        """Remove the events that their receivers have taken."""
        self._execute(
            "DELETE FROM pgsignals.parked AS p"
            " USING ROWS FROM (pg_catalog.unnest(%s::text[]), pg_catalog.unnest(%s::text[]))"
            "   AS t(receiver, uid)"
            " WHERE p.consumer = %s AND p.receiver = t.receiver AND p.uid = t.uid",
            (list(receivers), list(uids), self._name),
        )

    def losses(self, parts: Sequence[int]) -> list[tuple[int, str, datetime, datetime]]:
        """Return the partition, receiver, begin and end of each loss of parked events."""
        return [
            (part, receiver, since, until)
            for part, receiver, since, until in self._execute(
                "SELECT part, receiver, since, until FROM pgsignals.parked_lost"
                " WHERE consumer = %s AND part = ANY (%s::int[])",
                (self._name, list(parts)),
            )
        ]

    def told(self, part: int, receiver: str, until: datetime) -> None:
        """Forget a loss that receivers have been told of."""
        self._execute(
            "DELETE FROM pgsignals.parked_lost"
            " WHERE consumer = %s AND part = %s AND receiver = %s AND until <= %s",
            (self._name, part, receiver, until),
        )


def read_parked(cursor: Cursor) -> list[ParkedState]:
    """Return the state of what is parked for each consumer and receiver."""
    cursor.execute(
        "SELECT consumer, receiver, pg_catalog.count(*), pg_catalog.min(at)"
        " FROM pgsignals.parked GROUP BY 1, 2 ORDER BY 1, 2"
    )
    return [ParkedState(*row) for row in cursor.fetchall()]


# The oldest events that exceed the bytes go first, as they do from a log.
_DROP = """
WITH old AS (
  DELETE FROM pgsignals.parked WHERE id IN (
    SELECT id FROM (
      SELECT id, at, pg_catalog.sum(pg_catalog.octet_length(payload)::bigint)
               OVER (ORDER BY id DESC) AS size
      FROM pgsignals.parked
    ) AS p
    WHERE at < pg_catalog.clock_timestamp() - %(seconds)s * interval '1 s'
       OR (%(full)s AND size > %(bytes)s)
  ) RETURNING consumer, part, receiver, at,
    -- It was written long before it was parked.
    pg_catalog.to_timestamp(
      pg_catalog.substring(pg_catalog.substring(payload, 1, 100), '"t":([0-9]+)')::float8 / 1e6
    ) AS written
)
INSERT INTO pgsignals.parked_lost AS l
SELECT consumer, part, receiver, pg_catalog.min(least(at, written)), pg_catalog.max(at)
FROM old GROUP BY 1, 2, 3
ON CONFLICT (consumer, part, receiver) DO UPDATE
SET since = least(l.since, excluded.since), until = greatest(l.until, excluded.until)
RETURNING consumer, receiver
"""


def drop_parked(cursor: Cursor, seconds: float, size: int) -> list[tuple[str, str]]:
    """Drop what has been parked for too long, or is too much; return its consumers and receivers.

    A Gap tells them.
    """
    cursor.execute(
        "SELECT EXISTS (SELECT FROM pgsignals.parked"
        "   WHERE at < pg_catalog.clock_timestamp() - %(seconds)s * interval '1 s'),"
        " pg_catalog.pg_total_relation_size('pgsignals.parked') > %(bytes)s",
        {"seconds": seconds, "bytes": size},
    )
    [(old, full)] = cursor.fetchall()
    if not (old or full):
        return []
    cursor.execute(_DROP, {"seconds": seconds, "bytes": size, "full": full})
    return list(cursor.fetchall())
