"""Positions in the write-ahead log, as numbers and as PostgreSQL's text."""

from __future__ import annotations

from .errors import PayloadError


def read_lsn(text: str) -> int:
    """Return the number of an LSN that PostgreSQL has written: ``16/B374D848``.

    Raises PayloadError.
    """
    high, slash, low = text.partition("/")
    try:
        found = (int(high, 16) << 32) + int(low, 16)
    except ValueError as error:
        raise PayloadError(f"{text!r} is not an LSN") from error
    if not slash or not 0 <= found < 1 << 64:
        raise PayloadError(f"{text!r} is not an LSN")
    return found


def lsn_text(lsn: int) -> str:
    """Return the text of an LSN, as PostgreSQL writes and reads it."""
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"
