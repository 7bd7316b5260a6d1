"""Times and sizes as people write them."""

from __future__ import annotations

import re

import click

from ..core.units import SECONDS as _SECONDS
from ..core.units import size_text as size_text
from ..core.units import time_text as time_text

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
