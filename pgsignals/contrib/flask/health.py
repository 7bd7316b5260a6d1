"""Liveness and readiness as URLs."""

from __future__ import annotations

from typing import Any

from flask import Blueprint

from .extension import process_of

health = Blueprint("pgsignals_health", __name__, url_prefix="/health")
"""``/health/live`` and ``/health/ready``: 200 or 503, and why, as JSON."""


@health.get("/live")
def live() -> tuple[dict[str, Any], int]:
    """Whether the process is worth keeping."""
    now = process_of(None).health()
    return {"alive": now.alive, "reason": now.reason}, 200 if now.alive else 503


@health.get("/ready")
def ready() -> tuple[dict[str, Any], int]:
    """Whether it hears of changes, and receivers keep up."""
    now = process_of(None).health()
    answer = {
        "ready": now.ready,
        "connected": now.connected,
        "reason": now.reason,
        "depth": now.depth,
        "oldest": now.oldest,
        "lag": now.lag,
    }
    return answer, 200 if now.ready else 503
