"""The console: a web page of one database's signals, by itself or in a Flask application."""

from __future__ import annotations

from ..core.errors import MissingExtraError

try:
    import flask as _flask  # noqa: F401 - to say what is missing
except ImportError as error:
    raise MissingExtraError(
        "The console needs the package flask: pip install 'pgsignals[console]'"
    ) from error

from .pages import console

__all__ = ["console"]
