"""Looks over a database for what would keep pgsignals from working, and says how to mend it."""

from __future__ import annotations

from .database import examine
from .findings import FAIL, OK, WARN, Finding

__all__ = ["FAIL", "OK", "WARN", "Finding", "examine"]
