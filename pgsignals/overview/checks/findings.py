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


# The level, the message and the fix of a finding.
Outcome = tuple[str, str, str]


def ok(message: str) -> Outcome:
    """Return the outcome that nothing is to be done."""
    return OK, message, ""


def warn(message: str, fix: str) -> Outcome:
    """Return the outcome of something that works, but not well."""
    return WARN, message, fix


def fail(message: str, fix: str) -> Outcome:
    """Return the outcome of something that does not work."""
    return FAIL, message, fix
