"""Errors as texts that are safe to keep and to show: legible, short, and without credentials.

An error may be anybody's: its text may be missing, endless, no Unicode or a secret, and asking for
it may raise. Nothing in this module raises.
"""

from __future__ import annotations

import re
import traceback

MOST_TEXT = 4_000
MOST_TRACE = 50_000
# So many characters are searched for secrets. Far fewer are shown, so that no secret is cut.
_READ = 16_000
_MOST_FRAMES = 100
_MOST_CAUSES = 50

# Up to the last @, because a password may hold an @ that should have been written as %40.
_URL_SECRET = re.compile(r"(://[^/?#@:\s]*):\S*@")
# In a URL of NATS, a user without a password is a token.
_URL_TOKEN = re.compile(r"(\bnats://)[^/?#@:\s]+@", re.IGNORECASE)
_URL_PARAMETER = re.compile(r"([?&](?:ssl)?password=)[^&#\s]*", re.IGNORECASE)
# Settings in a connection string, and in the repr of a mapping.
_SECRETS = re.compile(
    r"(password|passwd|passphrase|secret(?:[_-]?access)?(?:[_-]?key)?|api[_-]?key)"
    r"['\"]?\s*[=:]\s*('(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\S+)",
    re.IGNORECASE,
)
_HEADERS = re.compile(
    r"(authorization['\"]?\s*[=:]\s*['\"]?(?:(?:basic|bearer|digest)\s+)?)[^\s'\"]+", re.IGNORECASE
)


def redact(text: str) -> str:
    """Return ``text`` without the passwords of connection strings in it, and other secrets."""
    # Behind the last @, the search for an @ would begin anew at each "://".
    head, at, tail = text.rpartition("@")
    text = _URL_SECRET.sub(r"\1:***@", head + at) + tail
    text = _URL_TOKEN.sub(r"\1***@", text)
    text = _URL_PARAMETER.sub(r"\1***", text)
    text = _HEADERS.sub(r"\1***", text)
    return _SECRETS.sub(r"\1=***", text)


def legible(text: str, most: int = MOST_TEXT) -> str:
    """Return ``text`` redacted, as UTF-8 and PostgreSQL can hold it, cut to ``most`` or so."""
    # A subclass of str may do anything in its methods.
    text = str.__str__(text)
    shown = redact(text[:_READ]).replace("\0", "\N{REPLACEMENT CHARACTER}")
    shown = shown.encode("utf-8", "backslashreplace").decode("utf-8")
    if len(text) <= _READ and len(shown) <= most:
        return shown
    return f"{shown[:most]}… (of {len(text):,} characters)"


def type_name(error: BaseException) -> str:
    """Return the name of an error's type."""
    try:
        name = type(error).__name__
        return legible(name, 200) if isinstance(name, str) else "an error"
    # A metaclass may raise anything.
    except BaseException:
        return "an error"


def error_text(error: BaseException) -> str:
    """Return an error's text, or the name of its type if it has none."""
    try:
        text = str(error)
    # Whatever the error raises, the code that reports it has to go on.
    except BaseException as problem:
        return f"{type_name(error)}, whose text cannot be had: {type_name(problem)}"
    return legible(text).strip() or type_name(error)


def described(error: BaseException) -> str:
    """Return an error's type and text: ``ValueError: no such thing``."""
    name, text = type_name(error), error_text(error)
    return text if text.startswith(name) else f"{name}: {text}"


def trace_text(error: BaseException) -> str:
    """Return an error with its traceback, and the errors that led to it, unless very many."""
    try:
        if _has_few_causes(error):
            found = traceback.TracebackException(
                type(error), error, error.__traceback__, limit=-_MOST_FRAMES, compact=True
            )
            pieces = list(found.format())
        else:
            pieces = [
                "Traceback (most recent call last):",
                *traceback.format_tb(error.__traceback__, limit=-_MOST_FRAMES),
                described(error),
                f"(More than {_MOST_CAUSES} errors led to it.)",
            ]
        text = "\n".join(legible(piece).rstrip("\n") for piece in pieces)
    # Formatting asks errors for more than their texts, which may raise.
    except BaseException:
        text = described(error)
    if len(text) <= MOST_TRACE:
        return text
    left_out = len(text) - MOST_TRACE
    return f"{text[: MOST_TRACE // 4]}\n… ({left_out:,} characters)\n{text[-3 * MOST_TRACE // 4 :]}"


def _has_few_causes(error: BaseException) -> bool:
    waiting: list[BaseException] = [error]
    known: set[int] = set()
    while waiting:
        each = waiting.pop()
        if id(each) in known:
            continue
        known.add(id(each))
        if len(known) > _MOST_CAUSES:
            return False
        parts = getattr(each, "exceptions", ())
        linked = (each.__cause__, each.__context__, *(parts if isinstance(parts, tuple) else ()))
        waiting += [one for one in linked if isinstance(one, BaseException)]
    return True
