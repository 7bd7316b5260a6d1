"""gunicorn's configuration for gevent: psycopg2 waits as greenlets do, in each worker."""

from __future__ import annotations

from typing import Any


def post_fork(server: Any, worker: Any) -> None:
    """gevent has patched the standard library by now, and the application is not loaded."""
    from psycogreen.gevent import patch_psycopg

    patch_psycopg()


def post_worker_init(worker: Any) -> None:
    """No fork follows."""
    worker.wsgi.extensions["pgsignals"].start(worker.wsgi)
