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


# Of a finding: the level, the message and the fix.
Outcome = tuple[str, str, str]


def ok(message: str) -> Outcome:
    """Nothing is to be done."""
    return OK, message, ""


def warn(message: str, fix: str) -> Outcome:
    """What works, but not well."""
    return WARN, message, fix


def fail(message: str, fix: str) -> Outcome:
    """What does not work."""
    return FAIL, message, fix
