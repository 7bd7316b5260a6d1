"""Dead letters: events that a receiver could not take, kept until delivered again or discarded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from queue import Empty, SimpleQueue

import psycopg2
from psycopg2 import errors as pg
from psycopg2.extensions import cursor as Cursor

from ..core.errors import DatabaseError, PayloadError
from ..core.events import Event, Message
from ..core.logging import log
from ..core.metrics import Meter
from ..core.payload import Decoder
from ..postgres.session import legible_rows
from ..triggers.names import wake_statement
from .consumer_store import ConsumerStore
from .parking_store import Kept
from .schema import IMPATIENT

# The notification by which the active consumer learns that dead letters are to be delivered again.
NOTICE = "redeliver"


@dataclass(frozen=True)
class Undeliverable(Kept):
    """An event that a receiver could not take; ``error`` is the last attempt's."""

    error: str
    traceback: str
    attempts: int


@dataclass(frozen=True)
class DeadLetter:
    """A dead letter to deliver again; ``payload`` is a message of its event's row alone.

    ``number`` is the row's in the message that it came in, so that the event's uid is the same.
    """

    key: int
    receiver: str
    channel: int
    number: int
    payload: str
    attempts: int


# A dead letter's payload is the message's header and the line of its own event, of all lines.
_ADD = (
    IMPATIENT
    + """
INSERT INTO pgsignals.dead_letters
  (consumer, receiver, uid, channel, number, payload, error, traceback, attempts)
SELECT %(consumer)s, %(receiver)s, %(uid)s, %(channel)s, %(number)s,
       coalesce((SELECT pg_catalog.concat_ws(
                   E'\\n', pg_catalog.split_part(payload, E'\\n', 1),
                   pg_catalog.split_part(payload, E'\\n', %(number)s + 2))
                 FROM {messages} AS m WHERE id = %(id)s),
                (SELECT payload FROM pgsignals.parked
                 WHERE consumer = %(consumer)s AND uid = %(uid)s LIMIT 1), %(payload)s),
       %(error)s, %(traceback)s, %(attempts)s
ON CONFLICT (consumer, receiver, uid) DO UPDATE
SET error = excluded.error, traceback = excluded.traceback, attempts = excluded.attempts,
    at = excluded.at, retry = false
"""
)


class DeadLetters:
    """Keeps and removes dead letters for workers, in the thread with the session."""

    def __init__(self, meter: Meter, wake: Callable[[], object]) -> None:
        self._meter = meter
        self._wake = wake
        self._queue: SimpleQueue[tuple[Undeliverable | int, Callable[[], None]]] = SimpleQueue()
        self._consumer: ConsumerStore

    def open(self, consumer: ConsumerStore) -> None:
        """Use another session."""
        self._consumer = consumer

    def add(self, event: Undeliverable, kept: Callable[[], None]) -> None:
        """Keep an event as a dead letter at the next save, and call ``kept`` then."""
        self._queue.put((event, kept))
        self._wake()

    def discard(self, key: int) -> None:
        """Remove a dead letter at the next save, since it has been delivered."""
        self._queue.put((key, lambda: None))
        self._wake()

    def save(self) -> None:
        """Keep and remove the dead letters that have been asked for by now."""
        with contextlib.suppress(Empty):
            while True:
                event, kept = self._queue.get_nowait()
                if isinstance(event, Undeliverable):
                    try:
                        self._keep(event)
                    except pg.LockNotAvailable:
                        # Try again with the next page: until then the event is unacknowledged.
                        self._queue.put((event, kept))
                        return
                    self._meter.count("dead_letters", receiver=event.receiver)
                else:
                    self._consumer.execute(
                        "DELETE FROM pgsignals.dead_letters WHERE id = %s", (event,)
                    )
                kept()

    def _keep(self, event: Undeliverable) -> None:
        """Keep an event. Raises LockNotAvailable while somebody has locked the log's messages."""
        try:
            self._insert(event, self._consumer.session.given)
        except (psycopg2.DataError, UnicodeError):
            # The database's encoding lacks a character of it. Otherwise it would never be kept, and
            # the event would be delivered again for ever.
            self._insert(event, lambda text: text.encode("ascii", "backslashreplace").decode())

    def _insert(self, event: Undeliverable, fitting: Callable[[str], str]) -> None:
        self._consumer.execute(
            _ADD.format(messages=self._consumer.log.messages),
            {
                "consumer": self._consumer.name,
                "receiver": fitting(event.receiver),
                "uid": event.uid,
                "channel": event.channel,
                "number": event.number,
                "id": event.id,
                "payload": self._consumer.session.given(event.payload or ""),
                "error": fitting(event.error),
                "traceback": fitting(event.traceback),
                "attempts": event.attempts,
            },
        )

    def redeliver(
        self, decoders: Mapping[int, Decoder], deliver: Callable[[Event, DeadLetter], bool]
    ) -> None:
        """Deliver again the dead letters for which that was asked, each to its receiver.

        ``decoders`` are by channel; ``deliver`` returns whether the receiver is there.
        """
        for letter in self._wanted_again():
            decoder = decoders.get(letter.channel)
            message = None
            if decoder is not None:
                with contextlib.suppress(PayloadError):
                    message = decoder.decode(letter.payload)
            if not isinstance(message, Message) or len(message.rows) != 1:
                log.error(
                    "dead letter %d cannot be read any more, and is kept: no watcher of this "
                    "process reads its channel, or its text is damaged",
                    letter.key,
                )
                continue
            message.redelivered = True
            event = Event(message, letter.number, message.rows[0])
            if not deliver(event, letter):
                log.error(
                    "dead letter %d is kept: this process does not have its receiver %s; retry it "
                    "when that is there",
                    letter.key,
                    letter.receiver,
                )

    def _wanted_again(self) -> list[DeadLetter]:
        """Return the dead letters to deliver again, each once for every request."""
        rows = self._consumer.execute(
            "UPDATE pgsignals.dead_letters SET retry = false WHERE consumer = %s AND retry"
            " RETURNING id, receiver, channel, number, payload, attempts",
            (self._consumer.name,),
        )
        text = self._consumer.session.text
        return [
            DeadLetter(key, text(receiver), channel, number, text(payload), attempts)
            for key, receiver, channel, number, payload, attempts in sorted(rows)
        ]


@dataclass(frozen=True)
class KeptLetter:
    """A dead letter: ``payload`` has its record's row alone, below the header of the message.

    ``number`` counts the rows of the message that it came in, from 0.
    """

    id: int
    consumer: str
    receiver: str
    uid: str
    number: int
    payload: str
    error: str
    traceback: str
    attempts: int
    at: datetime


_LETTERS = (
    "SELECT id, consumer, receiver, uid, number, payload, error, traceback, attempts, at"
    " FROM pgsignals.dead_letters"
)


def dead_letters(cursor: Cursor) -> list[KeptLetter]:
    """Return all dead letters, the latest last."""
    return [KeptLetter(*row) for row in legible_rows(cursor, f"{_LETTERS} ORDER BY id")]


def dead_letter(cursor: Cursor, key: int) -> KeptLetter:
    """Return a dead letter. Raises DatabaseError when there is none with this id."""
    rows = legible_rows(cursor, f"{_LETTERS} WHERE id = %s", (key,))
    if not rows:
        raise DatabaseError(f"There is no dead letter {key}: see `pgsignals dead-letters list`.")
    return KeptLetter(*rows[0])


def retry(cursor: Cursor, keys: Sequence[int] | None) -> int:
    """Ask the active process to deliver these, or all, again; return how many there are.

    Raises DatabaseError, and asks for none, if one of these is not there.
    """
    _require(cursor, keys)
    cursor.execute(
        "UPDATE pgsignals.dead_letters SET retry = true"
        " WHERE %(keys)s::bigint[] IS NULL OR id = ANY (%(keys)s::bigint[])",
        {"keys": None if keys is None else list(keys)},
    )
    count = cursor.rowcount
    cursor.execute(wake_statement(NOTICE))
    return count


def drop_letters(cursor: Cursor, keys: Sequence[int] | None) -> int:
    """Discard these, or all; return how many there were.

    Raises DatabaseError, and discards none, if one of these is not there.
    """
    _require(cursor, keys)
    cursor.execute(
        "DELETE FROM pgsignals.dead_letters"
        " WHERE %(keys)s::bigint[] IS NULL OR id = ANY (%(keys)s::bigint[])",
        {"keys": None if keys is None else list(keys)},
    )
    return cursor.rowcount


def _require(cursor: Cursor, keys: Sequence[int] | None) -> None:
    cursor.execute(
        "SELECT key FROM pg_catalog.unnest(%s::bigint[]) AS key"
        " WHERE NOT EXISTS (SELECT FROM pgsignals.dead_letters WHERE id = key)",
        (list(keys or ()),),
    )
    if missing := [str(key) for (key,) in cursor.fetchall()]:
        raise DatabaseError(
            f"There is no dead letter {', '.join(missing)}: see `pgsignals dead-letters list`."
        )
