"""The values that filters ask for, as the types of columns have them."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from datetime import date, time, timedelta
from decimal import Decimal, InvalidOperation
from enum import Enum
from typing import Any

_BOOLS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


def converted(value: Any, builtin: str | None) -> Any:
    """Return a filter's value as events of a column of this built-in type have it.

    A text is read as the value of another type, since URL parameters are texts. Values of columns
    of types that are not named here stay what they are. Raises ValueError for a value that no such
    column has.
    """
    read = _READERS.get(builtin or "")
    return value if read is None or value is None else read(value)


def _integer(value: Any) -> Any:
    if isinstance(value, str):
        if not re.fullmatch(r"\s*[+-]?[0-9]+\s*", value):
            raise ValueError
        return int(value)
    return _number(value)


def _number(value: Any) -> Any:
    # Anything may be equal to a number, but for what Python has otherwise.
    if isinstance(value, _OTHERS | bytes):
        raise ValueError
    return value


def _decimal(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return Decimal(value)
        except InvalidOperation as error:
            raise ValueError from error
    return _number(value)


def _float(value: Any) -> Any:
    return float(value) if isinstance(value, str) else _number(value)


def _bool(value: Any) -> Any:
    if isinstance(value, str):
        if value.lower() not in _BOOLS:
            raise ValueError
        return _BOOLS[value.lower()]
    return _number(value)


def _uuid(value: Any) -> Any:
    if isinstance(value, str):
        return uuid.UUID(value)
    if isinstance(value, int | float | Decimal | bytes | date):
        raise ValueError
    return value


def _bytes(value: Any) -> Any:
    # As a query gives them; events have bytes.
    return bytes(value) if isinstance(value, memoryview | bytearray) else value


def _text(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float | Decimal | Enum | _OTHERS):
        raise ValueError
    return value


_OTHERS = uuid.UUID | date | time | timedelta
_READERS: dict[str, Callable[[Any], Any]] = {
    "int2": _integer,
    "int4": _integer,
    "int8": _integer,
    "numeric": _decimal,
    "float4": _float,
    "float8": _float,
    "bool": _bool,
    "uuid": _uuid,
    "bytea": _bytes,
    "text": _text,
    "varchar": _text,
    "bpchar": _text,
    "name": _text,
}
