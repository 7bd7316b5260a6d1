"""The announcement of events that a broker has lost before they were read, for plugins."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone

from ..core.events import Gap
from .source import RemoteSink


def announce_missed(
    gaps: Sequence[Gap], sink: RemoteSink, log: logging.Logger, source: object
) -> None:
    """Log Gaps that end now and tell them to the sink, all of one reason as one Gap."""
    now = datetime.now(timezone.utc)
    for reason in sorted({gap.reason for gap in gaps}):
        alike = [gap for gap in gaps if gap.reason == reason]
        detail = "; ".join(sorted({gap.detail for gap in alike}))
        since = min(gap.since for gap in alike)
        # A new name is no error.
        level = logging.WARNING if reason == "unknown_name" else logging.ERROR
        log.log(level, "%s: events may have been missed: %s", source, detail)
        sink.gap(replace(alike[0], since=since, until=max(since, now), detail=detail))
