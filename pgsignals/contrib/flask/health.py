"""Liveness and readiness as URLs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flask import Blueprint

from ...hub.status import Health
from .extension import processes_of

health = Blueprint("pgsignals_health", __name__, url_prefix="/health")
"""``/health/live`` and ``/health/ready``: 200 or 503, and why, as JSON."""


def _worst(well: Callable[[Health], bool]) -> Health:
    """The health of the first of the application's databases that is not well, or of the first."""
    found = [process.health() for process in processes_of(None).values()]
    return min(found, key=well)


@health.get("/live")
def live() -> tuple[dict[str, Any], int]:
    """Whether the process is worth keeping."""
    now = _worst(lambda each: each.alive)
    return {"alive": now.alive, "reason": now.reason}, 200 if now.alive else 503


@health.get("/ready")
def ready() -> tuple[dict[str, Any], int]:
    """Whether it hears of changes, and receivers keep up."""
    now = _worst(lambda each: each.ready)
    answer = {
        "ready": now.ready,
        "connected": now.connected,
        "reason": now.reason,
        "depth": now.depth,
        "oldest": now.oldest,
        "lag": now.lag,
    }
    return answer, 200 if now.ready else 503
