"""Flask: an extension that starts a Hub in each process that serves, and live pages by SSE."""

from __future__ import annotations

from ...core.errors import MissingExtraError

try:
    import flask as _flask  # noqa: F401 - to say what is missing
except ImportError as error:
    raise MissingExtraError(
        "The Flask extension needs the package flask: pip install 'pgsignals[flask]'"
    ) from error

from .extension import PgSignals
from .health import health
from .streaming import position, sse

__all__ = ["PgSignals", "health", "position", "sse"]
