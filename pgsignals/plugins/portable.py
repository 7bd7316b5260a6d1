"""Values as JSON has them, and back: where JSON has no type, they travel as text, with a tag."""

from __future__ import annotations

import json
import math
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any

import msgspec
from psycopg2.extras import DateRange, DateTimeRange, DateTimeTZRange, NumericRange, Range

_encode_plain = msgspec.json.Encoder().encode
# The types whose values JSON has.
PLAIN = frozenset((str, int, bool, type(None)))


def convert(value: Any) -> tuple[Any, str | None]:
    """Return one value as JSON has it, and its type if JSON has none for it."""
    kind = type(value)
    if kind in PLAIN:
        return value, None
    if kind in TEXTS:
        return TEXTS[kind](value)
    if kind is float:
        return (value, None) if math.isfinite(value) else (repr(value), "float8")
    if kind is list:
        return _convert_list(value)
    if kind is dict:
        return (value, None) if _is_json(value) else (json.dumps(value, default=str), "json")
    # A caster of the program's own has made the value; the reader gets its text.
    return str(value), None


def _convert_list(value: list[Any]) -> tuple[Any, str | None]:
    """Convert an array, or a list in a json column."""
    leaves = list(_leaves(value))
    kinds = {type(leaf) for leaf in leaves} - {type(None)}
    if kinds <= PLAIN:
        return value, None
    if len(kinds) == 1 and (kinds <= TEXTS.keys() or kinds == {float}):
        tags = {tag for leaf in leaves if leaf is not None and (tag := convert(leaf)[1])}
        if "numrange" in tags:
            tags.discard("int8range")  # The tag that a range without bounds is given.
        if not tags:
            return value, None
        if len(tags) == 1:
            return _each(value, lambda leaf: convert(leaf)[0]), f"{tags.pop()}[]"
    if _is_json(value):
        return value, None
    return json.dumps(value, default=str), "json"


def _leaves(value: list[Any]) -> Iterator[Any]:
    left: list[Any] = [value]
    while left:
        item = left.pop()
        if type(item) is list:
            left.extend(item)
        else:
            yield item


def _is_json(value: Any) -> bool:
    """Whether JSON can hold ``value`` as it is; even a json column can give infinite numbers."""
    left = [value]
    while left:
        item = left.pop()
        if type(item) is dict:
            left.extend(item.values())
        elif type(item) is list:
            left.extend(item)
        elif type(item) is float:
            if not math.isfinite(item):
                return False
        elif type(item) not in PLAIN:
            return False
    return True


def _each(value: Any, call: Callable[[Any], Any]) -> Any:
    if type(value) is list:
        return [_each(item, call) for item in value]
    return None if value is None else call(value)


def _interval_text(value: timedelta) -> str:
    # As ISO 8601 has it, and PostgreSQL reads it; each part has its own sign.
    return f"P{value.days}DT{value.seconds}.{value.microseconds:06d}S"


def _datetime(value: datetime) -> tuple[str, str]:
    # msgspec writes the same text as isoformat() in a fifth of the time, but for the Z of UTC.
    if value.tzinfo is None:
        return _encode_plain(value)[1:-1].decode(), "timestamp"
    if value.tzinfo is timezone.utc:
        return f"{_encode_plain(value)[1:-2].decode()}+00:00", "timestamptz"
    return value.isoformat(), "timestamptz"


def _bytes_text(value: bytes | bytearray | memoryview) -> str:
    return "\\x" + bytes(value).hex()


def _range(value: Range[Any]) -> tuple[str, str]:
    kind = type(value)
    if kind is NumericRange:
        bounds = (value.lower, value.upper)
        tag = "numrange" if any(type(bound) is Decimal for bound in bounds) else "int8range"
    else:
        tag = _RANGE_TAGS[kind]
    if value.isempty:
        return "empty", tag
    lower, upper = (
        "" if bound is None else str(convert(bound)[0]) for bound in (value.lower, value.upper)
    )
    opening, closing = "[" if value.lower_inc else "(", "]" if value.upper_inc else ")"
    return f"{opening}{lower},{upper}{closing}", tag


_RANGE_TAGS: dict[type, str] = {
    DateRange: "daterange",
    DateTimeRange: "tsrange",
    DateTimeTZRange: "tstzrange",
}

TEXTS: dict[type, Callable[[Any], tuple[str, str]]] = {
    uuid.UUID: lambda value: (str(value), "uuid"),
    Decimal: lambda value: (str(value), "numeric"),
    datetime: _datetime,
    date: lambda value: (value.isoformat(), "date"),
    time: lambda value: (value.isoformat(), "time" if value.tzinfo is None else "timetz"),
    timedelta: lambda value: (_interval_text(value), "interval"),
    bytes: lambda value: (_bytes_text(value), "bytea"),
    bytearray: lambda value: (_bytes_text(value), "bytea"),
    memoryview: lambda value: (_bytes_text(value), "bytea"),
    NumericRange: _range,
    DateRange: _range,
    DateTimeRange: _range,
    DateTimeTZRange: _range,
}


def restore_all(values: Mapping[str, Any], types: Mapping[str, str]) -> dict[str, Any]:
    return {name: _restore(value, types.get(name)) for name, value in values.items()}


def _restore(value: Any, tag: str | None) -> Any:
    """Return the Python value again; a value that cannot be made one stays as it came."""
    if tag is None or value is None:
        return value
    try:
        if tag.endswith("[]") and isinstance(value, list):
            return _each(value, _FROM_TEXT[tag[:-2]])
        return _FROM_TEXT[tag](value)
    except (KeyError, ValueError, TypeError, ArithmeticError, AttributeError):
        # A type of a later version, or of the sender's own.
        return value


_INTERVAL = re.compile(r"P(-?\d+)DT(\d+)\.(\d{6})S")


def _read_interval(text: str) -> timedelta:
    found = _INTERVAL.fullmatch(text)
    if found is None:
        raise ValueError(text)
    return timedelta(*map(int, found.groups()))


def _read_bytes(text: str) -> memoryview:
    if not text.startswith("\\x"):
        raise ValueError(text)
    return memoryview(bytes.fromhex(text[2:]))


def _range_reader(
    kind: Callable[..., Any], read_bound: Callable[[str], Any]
) -> Callable[[str], Any]:
    def read_range(text: str) -> Any:
        if text == "empty":
            return kind(empty=True)
        lower, upper = text[1:-1].split(",")
        return kind(
            read_bound(lower) if lower else None,
            read_bound(upper) if upper else None,
            text[0] + text[-1],
        )

    return read_range


_FROM_TEXT: dict[str, Callable[[Any], Any]] = {
    "uuid": uuid.UUID,
    "numeric": Decimal,
    "float8": float,
    "timestamp": datetime.fromisoformat,
    "timestamptz": datetime.fromisoformat,
    "date": date.fromisoformat,
    "time": time.fromisoformat,
    "timetz": time.fromisoformat,
    "interval": _read_interval,
    "bytea": _read_bytes,
    "json": json.loads,
    "int8range": _range_reader(NumericRange, int),
    "numrange": _range_reader(NumericRange, Decimal),
    "daterange": _range_reader(DateRange, date.fromisoformat),
    "tsrange": _range_reader(DateTimeRange, datetime.fromisoformat),
    "tstzrange": _range_reader(DateTimeTZRange, datetime.fromisoformat),
}


def encode(data: Any) -> bytes:
    """Return the JSON of data, also of those that msgspec refuses."""
    try:
        return msgspec.json.encode(data, enc_hook=str)
    # Lone surrogates and integers of more than 64 bits, which a json column can hold.
    except (UnicodeEncodeError, OverflowError):
        return json.dumps(data, default=str, separators=(",", ":")).encode()
