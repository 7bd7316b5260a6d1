"""Errors that receivers and plugins may raise, and that are hard to report."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any, NoReturn

# A password as it stands in an error's text, and how many such texts there are.
SECRET = "nightingale"


class Unspeakable(Exception):
    """Its text cannot be had."""

    def __str__(self) -> str:
        raise AttributeError("status")

    __repr__ = __str__


class Exiting(Exception):
    """Asking for its text ends the thread."""

    def __str__(self) -> str:
        raise SystemExit(3)


class NoText(Exception):
    """Its text is none."""

    def __str__(self) -> str:
        return 7  # type: ignore[return-value]


class Words(str):
    """A text whose methods raise."""

    def strip(self, *_: Any) -> NoReturn:
        raise RuntimeError("strip")

    replace = encode = rstrip = __getitem__ = __format__ = __len__ = strip  # type: ignore[assignment]


class Wordy(Exception):
    """Its text is of a type of its own."""

    def __str__(self) -> str:
        return Words("said")


class Untrue(Exception):
    """It is not even true, and cannot be compared."""

    def __bool__(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("compared")

    def __hash__(self) -> int:
        raise RuntimeError("hashed")


class Undecided(Exception):
    """Whether it is true cannot be told."""

    def __bool__(self) -> bool:
        raise RuntimeError("asked")


class Nameless(type):
    """A type without a name."""

    @property
    def __name__(cls) -> str:  # type: ignore[override]
        raise RuntimeError("name")


class OfNoName(Exception, metaclass=Nameless):
    """An error of such a type."""


class Untraceable(Exception):
    """What led to it cannot be told."""

    @property
    def __traceback__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("traceback")

    @property
    def __cause__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("cause")


def circular() -> Exception:
    """Two errors that each led to the other."""
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    first.__context__, second.__context__ = second, first
    return first


def chained() -> Exception:
    """An error that very many led to."""
    error = ValueError(0)
    for number in range(1, 20_000):
        error, former = ValueError(number), error
        error.__cause__ = former
    return error


def malformed() -> Exception:
    """A syntax error whose place is none."""
    error = SyntaxError("odd")
    error.filename, error.lineno = object(), object()  # type: ignore[assignment]
    error.text, error.offset = object(), object()  # type: ignore[assignment]
    return error


def noted() -> Exception:
    """An error whose notes are no texts."""
    error = ValueError("noted")
    error.__notes__ = Unspeakable()  # type: ignore[assignment]
    return error


def grouped() -> BaseException:
    """Errors within errors, where Python has that."""
    group: Any = getattr(builtins, "ExceptionGroup", lambda text, errors: ValueError(text))
    error: BaseException = Unspeakable()
    for depth in range(200):
        error = group(f"at {depth}", [error, ValueError(depth)])
    return error


ODD: dict[str, Callable[[], BaseException]] = {
    "a lone surrogate": lambda: ValueError(b"caf\xe9.txt".decode("utf-8", "surrogateescape")),
    "a zero byte": lambda: ValueError("a\0b"),
    "other letters": lambda: ValueError("日本 \N{GRINNING FACE}"),
    "no text at all": ValueError,
    "a text that cannot be had": Unspeakable,
    "a text that ends the thread": Exiting,
    "a text that is none": NoText,
    "a text of a type of its own": Wordy,
    "endless": lambda: ValueError("x" * 5_000_000),
    "endless and in other letters": lambda: ValueError("\udce9\0ä" * 1_000_000),
    "a type without a name": OfNoName,
    "an odd name": type("\x1b\n" * 1000, (Exception,), {"__module__": None}),
    "not true": Untrue,
    "true or not": Undecided,
    "no traceback": Untraceable,
    "a circle": circular,
    "a long chain": chained,
    "malformed": malformed,
    "with notes": noted,
    "a group": grouped,
    "SystemExit": lambda: SystemExit(1),
    "KeyboardInterrupt": KeyboardInterrupt,
    "BaseException": lambda: BaseException("base"),
    "StopIteration": StopIteration,
    "RecursionError": RecursionError,
}
