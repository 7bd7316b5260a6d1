"""An audit trail of PostgreSQL changes in a file, one JSON object a line."""

from __future__ import annotations

from .broadcaster import AuditBroadcaster

__all__ = ["AuditBroadcaster"]
