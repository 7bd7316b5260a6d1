"""gunicorn's configuration, with the recommended place to start: each worker, once it is there."""

from __future__ import annotations

import os
from typing import Any

import pgsignals


def post_worker_init(worker: Any) -> None:
    """The application is loaded, its receivers are known, and no fork follows."""
    pgsignals.start(os.environ["PGSIGNALS_DSN"], ["items"])
