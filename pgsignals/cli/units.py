"""Times and sizes as people write them."""

from __future__ import annotations

import re

import click

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_BYTES = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_NUMBER = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,6})?) ?([A-Za-z]*)")


def parse_time(text: str) -> float:
    """Return seconds, from ``90s``, ``30m``, ``12h``, ``7d``, ``2w``. Raises click.BadParameter."""
    found = _NUMBER.fullmatch(text.strip())
    if found is None or found[2] not in _SECONDS:
        raise click.BadParameter(f"{text!r}: write a number with s, m, h, d or w, such as 7d.")
    return float(found[1]) * _SECONDS[found[2]]


def parse_size(text: str) -> int:
    """Return bytes, from ``500MiB``, ``20GiB``, or a number alone. Raises click.BadParameter."""
    found = _NUMBER.fullmatch(text.strip())
    if found is None or found[2] not in _BYTES:
        raise click.BadParameter(
            f"{text!r}: write a number with KiB, MiB, GiB or TiB, such as 20GiB."
        )
    return int(float(found[1]) * _BYTES[found[2]])


def time_text(seconds: float) -> str:
    """Return ``7d``, ``1.5h``, ``0.2s``: in the greatest unit that fits, to four digits."""
    for unit in ("d", "h", "m"):
        if seconds >= _SECONDS[unit]:
            return f"{seconds / _SECONDS[unit]:.4g}{unit}"
    return f"{seconds:.3g}s"


def size_text(size: float) -> str:
    """Return ``20GiB``, ``1.5MiB``, ``17B``."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size >= _BYTES[unit]:
            return f"{size / _BYTES[unit]:.4g}{unit}"
    return f"{size:g}B"
