"""Any value as JSON has it."""

from __future__ import annotations

import json
import math
from datetime import datetime, time
from typing import Any

import msgspec

_TIMES = (datetime, time)


def to_plain(data: Any) -> Any:
    """Return ``data`` made of what ``json.dumps`` takes; values that JSON lacks become texts."""
    legible = _legible(msgspec.to_builtins(data, builtin_types=_TIMES, enc_hook=str))
    return msgspec.to_builtins(legible)


def to_json(data: Any) -> str:
    """Return ``data`` as one line of JSON; values that JSON lacks become their texts."""
    plain = to_plain(data)
    try:
        return msgspec.json.encode(plain).decode()
    # For integers of more than 64 bits and lone surrogates, which a json column can hold.
    except (OverflowError, UnicodeEncodeError):
        return json.dumps(plain)


def _legible(plain: Any) -> Any:
    """Return ``plain`` with texts for two kinds of values.

    Of a time whose offset has seconds, as a ``timetz``'s can, msgspec would cut these off, which
    makes another time of it. JSON has no number that is not finite.
    """
    if isinstance(plain, dict):
        return {key: _legible(value) for key, value in plain.items()}
    if isinstance(plain, list | tuple):
        return [_legible(value) for value in plain]
    if isinstance(plain, _TIMES) and (offset := plain.utcoffset()) and offset.seconds % 60:
        return plain.isoformat()
    if isinstance(plain, float) and not math.isfinite(plain):
        return "NaN" if math.isnan(plain) else "Infinity" if plain > 0 else "-Infinity"
    return plain
