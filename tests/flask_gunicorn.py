"""gunicorn's configuration for an application with the extension, started before requests."""

from __future__ import annotations

from typing import Any


def post_worker_init(worker: Any) -> None:
    """No fork follows, and this is the main thread."""
    worker.wsgi.extensions["pgsignals"].start(worker.wsgi)
