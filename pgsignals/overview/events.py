"""Events as an operator sees them: read from payloads without the watcher that they are for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

import msgspec

from ..core.payload import SILENT, Header
from .model import WatcherState

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_LONGEST = 300

_header = msgspec.json.Decoder(Header)


@dataclass(frozen=True)
class ShownEvent:
    """An event: its record's key and values as texts.

    ``values`` are those of ``columns=`` and ``extra=``, in this order, with the old ones of those
    that an update has changed. ``note`` says what else there is to know.
    """

    at: datetime
    namespace: str
    delivery: str
    table: str
    op: str
    label: str | None
    record: str
    values: str
    note: str = ""


def count_rows(payload: str) -> int:
    """Return the number of events in a payload; more lines than the header's are rows."""
    return max(1, payload.count("\n"))


def read_rows(payload: str) -> tuple[Header, list[tuple[str, str]]] | None:
    """Return a payload's header, and each row's key and values as texts; None for what is none.

    Anybody can send anything on a channel.
    """
    head, _, body = payload.partition("\n")
    try:
        header = _header.decode(head)
    except (msgspec.MsgspecError, RecursionError):
        return None
    if header.error is not None or header.part is not None or not body:
        return header, []
    return header, [_split(line, header.moved) for line in body.split("\n")]


def _split(line: str, moved: bool) -> tuple[str, str]:
    """Return the key and the values of a row, between which the trigger puts a tab."""
    key, tab, values = line.partition("\t")
    if not tab:
        return _key(line, moved), ""
    return _key(f"{key.rstrip(',')}]", moved), _values(f"[{values.lstrip(',')}")


def _key(text: str, moved: bool) -> str:
    try:
        key: Any = msgspec.json.decode(text)
    except (msgspec.MsgspecError, RecursionError):
        return ""
    if not isinstance(key, list):
        return _text(key)
    if moved and len(key) % 2 == 0:
        middle = len(key) // 2
        return f"{_joined(key[middle:])} → {_joined(key[:middle])}"
    return _joined(key)


def _values(text: str) -> str:
    """Return the values of a row; behind those of an update come the old ones and their flags."""
    try:
        found: Any = msgspec.json.decode(text)
    except (msgspec.MsgspecError, RecursionError):
        return ""
    middle, odd = divmod(len(found), 2)
    if odd and middle and re.fullmatch(f"[01]{{{middle}}}", str(found[-1])):
        now, before = found[:middle], found[middle:-1]
        changed = zip(now, before, found[-1], strict=True)
        return _cut(
            ", ".join(
                f"{_text(old)} → {_text(new)}" if flag == "1" else _text(new)
                for new, old, flag in changed
            )
        )
    return _joined(found)


def _joined(key: list[Any]) -> str:
    return _cut(", ".join(map(_text, key)))


def _text(value: Any) -> str:
    if value is None:
        return "NULL"
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def shown_events(watcher: WatcherState, payload: str, values: bool) -> Iterator[ShownEvent]:
    """Yield the events of a payload of a watcher's trigger, with their values if they may be seen.

    What is no payload of ours is left out.
    """
    table = f"{watcher.schema}.{watcher.table}"

    def event(at: datetime, record: str, shown: str, note: str = "") -> ShownEvent:
        return ShownEvent(
            at,
            watcher.namespace,
            watcher.delivery,
            table,
            watcher.op,
            watcher.label,
            record,
            shown,
            note,
        )

    if payload == SILENT:
        yield event(datetime.now(timezone.utc), "", "", "the trigger failed")
        return
    found = read_rows(payload)
    if found is None:
        return
    header, rows = found
    at = _EPOCH + timedelta(microseconds=header.t)
    if header.error is not None:
        # PostgreSQL's message may quote a value.
        yield event(at, "", "", "the trigger failed" + (f": {header.error}" if values else ""))
    elif header.part is not None and header.part[0] == 1:
        yield event(at, "", "", "its key is too long to travel in one piece")
    for record, shown in rows:
        yield event(at, record, shown if values else "", "too long to travel" if header.cut else "")
