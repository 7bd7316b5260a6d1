"""Liveness and readiness as URLs."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from flask import Blueprint

from .extension import processes_of

health = Blueprint("pgsignals_health", __name__, url_prefix="/health")
"""``/health/live`` and ``/health/ready``: 200 or 503, and why, as JSON."""


def _answer(well: str, *more: str) -> tuple[dict[str, Any], int]:
    """Answer for the first of the application's databases that is not ``well``, or the first."""
    found = [process.health() for process in processes_of(None).values()]
    now = min(found, key=attrgetter(well))
    answer = {name: getattr(now, name) for name in (well, *more)}
    return answer, 200 if answer[well] else 503


@health.get("/live")
def live() -> tuple[dict[str, Any], int]:
    """Whether the process is worth keeping."""
    return _answer("alive", "reason")


@health.get("/ready")
def ready() -> tuple[dict[str, Any], int]:
    """Whether the process hears of changes, and its receivers keep up."""
    return _answer("ready", "connected", "reason", "depth", "oldest", "lag")
