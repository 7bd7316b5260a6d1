"""Any value as one line of JSON."""

from __future__ import annotations

import json
from typing import Any

import msgspec


def to_json(data: Any) -> str:
    """``data`` as one line of JSON; values that JSON lacks become their texts."""
    try:
        return msgspec.json.encode(data, enc_hook=str).decode()
    # Integers of more than 64 bits and lone surrogates, which a json column can hold.
    except (OverflowError, UnicodeEncodeError):
        return json.dumps(msgspec.to_builtins(data, enc_hook=str))
