"""The logger ``pgsignals``, as the library's own modules use it."""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from types import TracebackType

from .redaction import described, legible, trace_text, type_name

_MOST_MESSAGE = 8_000

ErrorInfo = tuple[type[BaseException], BaseException, TracebackType | None]


def error_info(error: BaseException) -> ErrorInfo:
    """Return an error as a record's ``exc_info``; logging would ask it whether it is true."""
    try:
        return type(error), error, error.__traceback__
    # An error's class may have a __traceback__ of its own, which may raise.
    except BaseException:
        return type(error), error, None


class _Log(logging.Logger):
    """Hands records to the logger of its name, and survives the errors of handlers there.

    The records' messages and tracebacks are legible and have no credentials in them. The error
    itself, which may have some, stays only in records about a receiver, for handlers that report it
    whole to the receiver's author; errors of broadcasters and drivers do not stay.
    """

    def __init__(self, target: logging.Logger) -> None:
        super().__init__(target.name)
        self._target = target

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802 - it is logging's.
        return self._target.isEnabledFor(level)

    def getEffectiveLevel(self) -> int:  # noqa: N802
        return self._target.getEffectiveLevel()

    def handle(self, record: logging.LogRecord) -> None:
        try:
            _make_safe(record)
            self._target.handle(record)
        # A handler of the user's may raise, and the thread that logs has to go on.
        except Exception as error:
            if logging.raiseExceptions:
                # A program without a terminal may have no stderr, or one that is closed.
                with suppress(Exception):
                    sys.stderr.write(f"pgsignals: logging failed: {described(error)}\n")


def _make_safe(record: logging.LogRecord) -> None:
    try:
        text = record.getMessage()
    # The text of an argument may raise anything.
    except BaseException as error:
        text = f"{record.msg} (it cannot be filled in: {type_name(error)})"
        record.msg, record.args = text, None
    if (shown := legible(text, _MOST_MESSAGE)) != text:
        record.msg, record.args = shown, None
    if record.exc_info and record.exc_info[1] is not None:
        # Formatters take exc_text for the traceback that they have formatted before.
        record.exc_text = trace_text(record.exc_info[1])
        if "receiver" not in record.__dict__:
            record.exc_info = None


log = _Log(logging.getLogger("pgsignals"))
