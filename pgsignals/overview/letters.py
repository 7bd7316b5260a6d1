"""Dead letters as an operator sees them: the record that each is about, and what went wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from psycopg2.extensions import cursor as Cursor

from ..consumers.channels import Channel
from ..core.errors import DatabaseError, PayloadError
from ..core.events import Event, Message, Topic
from ..core.json import to_json
from ..core.payload import Decoder, Layout
from ..core.redaction import legible
from ..core.rows import decoder_of
from ..postgres.session import legible_rows
from .events import read_rows
from .model import Letter, LetterDetail

# What is shown at once, of how long an error.
MOST_LETTERS = 50
_LONGEST_ERROR = 300
_LONGEST_TRACEBACK = 8_000

_COLUMNS = "id, consumer, receiver, channel, number, payload, attempts, at, retry"
_NO_LAYOUT = Layout("", "", "", "", None, "", (), (), (), (), False)


def _never_loaded(*_: Any, **__: Any) -> Any:
    raise DatabaseError("An event of a dead letter loads no record.")


def read_letters(
    cursor: Cursor, known: Mapping[int, Channel], before: int | None = None, consumer: str = ""
) -> tuple[Letter, ...]:
    """Return the latest dead letters, below an id, of one consumer or of all."""
    rows = legible_rows(
        cursor,
        f"SELECT {_COLUMNS}, pg_catalog.left(error, {_LONGEST_ERROR}) FROM pgsignals.dead_letters"
        " WHERE (%(before)s::bigint IS NULL OR id < %(before)s)"
        " AND (%(consumer)s = '' OR consumer = %(consumer)s)"
        f" ORDER BY id DESC LIMIT {MOST_LETTERS}",
        {"before": before, "consumer": consumer},
    )
    return tuple(_letter(Letter, known, row) for row in rows)


def read_letter(
    cursor: Cursor, known: Mapping[int, Channel], key: int, values: bool
) -> LetterDetail:
    """Return a dead letter, with its values if they may be seen.

    Raises DatabaseError when there is none with this id.
    """
    rows = legible_rows(
        cursor,
        f"SELECT {_COLUMNS}, pg_catalog.left(error, 4000), uid, traceback"
        " FROM pgsignals.dead_letters WHERE id = %s",
        (key,),
    )
    if not rows:
        raise DatabaseError(f"There is no dead letter {key} any more.")
    [(*row, uid, traceback)] = rows
    channel, number, payload = row[3:6]
    event = _event(known, channel, number, payload)
    shown = ""
    if values and event is not None:
        shown = to_json({"values": event.values, "old": event.old, "context": event.context})
    detail: LetterDetail = _letter(
        LetterDetail,
        known,
        row,
        uid=uid,
        traceback=_shortened(legible(traceback, 50_000)),
        values=shown,
    )
    return detail


def _shortened(text: str) -> str:
    """Return a text whose end, where a traceback says what was raised, is whole."""
    if len(text) <= _LONGEST_TRACEBACK:
        return text
    cut = len(text) - _LONGEST_TRACEBACK
    return f"… ({cut:,} characters)\n{text[-_LONGEST_TRACEBACK:]}"


def _letter(kind: Callable[..., Any], known: Mapping[int, Channel], row: Any, **more: Any) -> Any:
    key, consumer, receiver, channel, number, payload, attempts, at, retrying, error = row
    layout = known[channel].layout if channel in known else _NO_LAYOUT
    event = _event(known, channel, number, payload)
    record, op = "", layout.op
    if event is not None:
        record = ", ".join(f"{name} {value}" for name, value in event.key.items())
    elif channel not in known and (found := read_rows(payload)) is not None and found[1]:
        # Nothing in the database describes the rows of a backfill; their keys are where they are.
        op, record = "snapshot", found[1][0][0]
    return kind(
        id=key,
        consumer=consumer,
        receiver=receiver,
        table=f"{layout.schema}.{layout.table}" if layout.table else "",
        op=op,
        record=record,
        error=legible(error, _LONGEST_ERROR),
        attempts=attempts,
        at=at,
        retrying=retrying,
        **more,
    )


def _event(known: Mapping[int, Channel], channel: int, number: int, payload: str) -> Event | None:
    """Return the event of a dead letter; None if its channel or its text cannot be read."""
    if channel not in known:
        return None
    layout = known[channel].layout
    topic = Topic(
        layout.table,
        layout.op,
        layout.label,
        layout.schema,
        layout.table,
        layout.key,
        layout.values,
        layout.compared,
        _never_loaded,
        layout.name,
    )
    decoder: Decoder = decoder_of(topic, layout, lambda oid, text: text)
    try:
        message = decoder.decode(payload)
    except PayloadError:
        return None
    if not isinstance(message, Message) or len(message.rows) != 1:
        return None
    return Event(message, number, message.rows[0])
