"""The outcome of a check."""

from __future__ import annotations

from dataclasses import dataclass

OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True)
class Finding:
    """The outcome of one check. ``fix`` says what to do unless ``level`` is ``ok``."""

    check: str
    level: str
    message: str
    fix: str = ""
