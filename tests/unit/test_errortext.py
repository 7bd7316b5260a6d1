"""Errors as texts: whatever they are, they can be kept and shown, and give nothing away."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgsignals.core.logging import error_info, log
from pgsignals.core.redaction import (
    MOST_TEXT,
    MOST_TRACE,
    described,
    error_text,
    legible,
    redact,
    trace_text,
)
from tests.odd_errors import ODD, SECRET, Unspeakable


def raised(make: Callable[[], BaseException]) -> BaseException:
    """The error, with a traceback where it takes one."""
    error = make()
    try:
        raise error
    except BaseException as caught:
        return caught


@pytest.mark.parametrize("kind", ODD)
def test_any_error_has_texts(kind: str) -> None:
    """Each is short, and what UTF-8 and PostgreSQL can hold; none raises."""
    error = raised(ODD[kind])
    for text, most in (
        (error_text(error), MOST_TEXT),
        (described(error), MOST_TEXT + 300),
        (trace_text(error), MOST_TRACE),
    ):
        assert type(text) is str
        assert 0 < len(text) <= most + 100
        assert "\0" not in text
        text.encode()


@given(st.text(), st.integers(1, 50))
def test_any_text_is_legible(text: str, most: int) -> None:
    """What is not is replaced, and what is stays as it is."""
    text.encode("utf-8", "surrogatepass")
    shown = legible(text, most)
    shown.encode()
    assert "\0" not in shown
    assert len(shown) <= 6 * most + 40
    if text.isprintable() and text.isascii() and len(text) <= most and redact(text) == text:
        assert shown == text


def test_a_plain_error_reads_as_ever() -> None:
    """Its text is its own, and its traceback Python's, with what led to it."""
    try:
        try:
            raise LookupError("first")
        except LookupError as cause:
            raise ValueError("then") from cause
    except ValueError as caught:
        error = caught
    assert (error_text(error), described(error)) == ("then", "ValueError: then")
    trace = trace_text(error)
    assert trace.index("LookupError: first") < trace.index("direct cause")
    assert trace.endswith("ValueError: then")
    assert "in test_a_plain_error_reads_as_ever" in trace


@pytest.mark.parametrize(
    "text",
    [
        f"postgresql://shop:{SECRET}@db/shop",
        f"cannot reach redis://:{SECRET}@cache:6379/0, nor https://a.b/c@d",
        f"amqp://u:{SECRET}/{SECRET}@{SECRET}@host",
        f"postgresql://db/shop?user=a&password={SECRET}",
        f"nats://{SECRET}@host",
        f"host=db password='{SECRET} \\' {SECRET}' dbname=shop",
        f"{{'sasl.password': '{SECRET}'}}",
        f'{{"client_secret": "{SECRET}", "api_key": "{SECRET}"}}',
        f"AWS_SECRET_ACCESS_KEY={SECRET}",
        f"headers={{'Authorization': 'Bearer {SECRET}'}}",
        f"Authorization: Basic {SECRET}",
    ],
)
@pytest.mark.parametrize("before", [0, MOST_TEXT - 40, MOST_TEXT - 20, 15_990])
def test_no_text_has_a_secret(text: str, before: int) -> None:
    """Nor has a traceback, wherever the text is cut."""
    error = raised(lambda: ValueError("." * before + " " + text))
    error.__cause__ = raised(lambda: ConnectionError(text))
    for shown in (error_text(error), described(error), trace_text(error)):
        assert SECRET not in shown


def test_redaction_takes_no_time() -> None:
    """A text that looks for its end again and again is looked through once."""
    assert len(error_text(ValueError("://a:" * 1_000_000))) <= MOST_TEXT + 100


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """What a formatter makes of the records of the library's logger."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger("pgsignals").addHandler(handler)
    yield stream
    logging.getLogger("pgsignals").removeHandler(handler)


def test_a_record_has_no_secret(written: io.StringIO, caplog: pytest.LogCaptureFixture) -> None:
    """Neither its message nor its traceback; a receiver's error stays in it, another's does not."""
    error = raised(lambda: ConnectionError(f"redis://:{SECRET}@cache"))
    log.error("with %s", error, exc_info=error_info(error))
    log.error("again", exc_info=error_info(error), extra={"receiver": "shop.mail"})
    assert SECRET not in written.getvalue()
    assert written.getvalue().count("ConnectionError: redis://:***@cache") == 2
    first, second = caplog.records
    assert (first.exc_info, first.name) == (None, "pgsignals")
    assert second.exc_info is not None
    assert second.exc_info[1] is error
    assert first.funcName == "test_a_record_has_no_secret"


@pytest.mark.threads_die
@pytest.mark.parametrize("kind", ODD)
def test_any_error_can_be_logged(kind: str, written: io.StringIO) -> None:
    """Given as an argument and with its traceback; what cannot be filled in is said."""
    error = raised(ODD[kind])
    log.error("it was %s", error, exc_info=error_info(error))
    assert "it was" in written.getvalue()
    written.getvalue().encode()


class Raising(logging.Handler):
    """A handler that is broken."""

    def emit(self, record: logging.LogRecord) -> None:
        raise Unspeakable


def test_a_handler_that_raises(capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever logs goes on, and stderr says so."""
    handler = Raising()
    logging.getLogger("pgsignals").addHandler(handler)
    try:
        log.error("something")
    finally:
        logging.getLogger("pgsignals").removeHandler(handler)
    assert "logging failed: Unspeakable" in capsys.readouterr().err


def test_the_level_is_the_loggers() -> None:
    """What is set for the logger of this name holds at once, and children log as before."""
    logger = logging.getLogger("pgsignals")
    before = logger.level
    try:
        for level in (logging.DEBUG, logging.CRITICAL, logging.INFO):
            logger.setLevel(level)
            assert log.isEnabledFor(logging.INFO) == (level <= logging.INFO)
            assert log.getEffectiveLevel() == level
    finally:
        logger.setLevel(before)
