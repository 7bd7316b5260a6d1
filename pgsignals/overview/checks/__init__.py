"""The checks for what would keep pgsignals from working with a database, and how to mend it."""

from __future__ import annotations

from .database import examine
from .findings import FAIL, OK, WARN, Finding

__all__ = ["FAIL", "OK", "WARN", "Finding", "examine"]
