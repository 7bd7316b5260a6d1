"""Any value as one line of JSON."""

from __future__ import annotations

import json
from datetime import datetime, time
from typing import Any

import msgspec

_TIMES = (datetime, time)


def to_json(data: Any) -> str:
    """Return ``data`` as one line of JSON; values that JSON lacks become their texts."""
    plain = _legible(msgspec.to_builtins(data, builtin_types=_TIMES, enc_hook=str))
    try:
        return msgspec.json.encode(plain).decode()
    # For integers of more than 64 bits and lone surrogates, which a json column can hold.
    except (OverflowError, UnicodeEncodeError):
        return json.dumps(msgspec.to_builtins(plain))


def _legible(plain: Any) -> Any:
    """Return ``plain`` with a text for each time whose offset has seconds, as a ``timetz``'s can.

    msgspec would cut the seconds off, which makes another time of it.
    """
    if isinstance(plain, dict):
        return {key: _legible(value) for key, value in plain.items()}
    if isinstance(plain, list | tuple):
        return [_legible(value) for value in plain]
    if isinstance(plain, _TIMES) and (offset := plain.utcoffset()) and offset.seconds % 60:
        return plain.isoformat()
    return plain
