"""Times and sizes as people read them."""

from __future__ import annotations

SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def time_text(seconds: float) -> str:
    """Return ``7d``, ``1.5h``, ``0.2s``: in the greatest unit that fits, to four digits."""
    for unit in ("d", "h", "m"):
        if seconds >= SECONDS[unit]:
            return f"{seconds / SECONDS[unit]:.4g}{unit}"
    return f"{seconds:.3g}s"


def size_text(size: float) -> str:
    """Return ``20GiB``, ``1.5MiB``, ``17B``."""
    units = ("KiB", "MiB", "GiB", "TiB")
    for power in range(len(units), 0, -1):
        if size >= 1 << 10 * power:
            return f"{size / (1 << 10 * power):.4g}{units[power - 1]}"
    return f"{size:g}B"


def age_text(seconds: float) -> str:
    """Return ``3 s``, ``16 min``, ``2.5 h``, ``3 d``: to read at a glance."""
    seconds = max(0.0, seconds)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.0f} d"
