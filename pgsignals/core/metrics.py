"""The protocols of metrics and traces, by which a Hub is observed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import NamedTuple, Protocol

from .events import Event
from .logging import error_info, log
from .process import notice_fork


class Metrics(Protocol):
    """Keeps the numbers of one Hub; ``COUNTERS`` and ``GAUGES`` name all of them.

    Its methods are called from several threads, among them the one that listens: they must return
    at once. Their errors are logged and hurt no event.
    """

    def count(self, name: str, amount: int, /, **labels: str) -> None:
        """Add ``amount`` to a counter; 0 makes it known before anything has happened."""

    def gauge(self, name: str, read: Callable[[], float], /, **labels: str) -> None:
        """Take a gauge's value from ``read``, now and then; ``read`` replaces an earlier one."""


class Tracer(Protocol):
    """Makes a span for each call of a receiver."""

    def receiving(
        self, events: Sequence[Event], receiver: str, /
    ) -> AbstractContextManager[object]:
        """Return the span of a receiver's call with an event, or with a Batch of events.

        The receiver's error passes through the span, and goes on whatever the span returns. If the
        span cannot begin or end, that is logged, and the call counts as it would without a span.
        """


@contextmanager
def span(tracer: Tracer | None, events: Sequence[Event], receiver: str) -> Iterator[None]:
    """Run the block in the span that ``tracer``, if there is one, makes for a receiver's call."""
    if tracer is None:
        yield
        return
    with ExitStack() as stack:
        try:
            stack.enter_context(tracer.receiving(events, receiver))
        except BaseException:
            log.exception("%r could not begin a span", tracer, extra={"receiver": receiver})
        within = stack.pop_all()
    try:
        yield
    except BaseException as error:
        _end(within, tracer, receiver, error)
        raise
    _end(within, tracer, receiver, None)


def _end(within: ExitStack, tracer: Tracer, receiver: str, error: BaseException | None) -> None:
    """End a span. Whatever the tracer does, the receiver has raised ``error``, or nothing."""
    try:
        within.__exit__(*((None, None, None) if error is None else error_info(error)))
    except BaseException as problem:
        if problem is not error:
            log.exception("%r could not end a span", tracer, extra={"receiver": receiver})


class Measure(NamedTuple):
    """A counter or a gauge: its meaning, and the names of its labels."""

    help: str
    labels: tuple[str, ...] = ()


COUNTERS = {
    "events": Measure("Events that have arrived.", ("table", "op")),
    "receiver_failures": Measure("Calls of receivers that raised.", ("receiver",)),
    "reconnects": Measure("Connections lost and replaced."),
    "gaps": Measure("Gaps announced.", ("reason",)),
    "shed_events": Measure("Events dropped since receivers were too slow."),
    "dead_letters": Measure("Events kept since a receiver could not take them.", ("receiver",)),
    "given_up": Measure("Events from a broker that a receiver could not take.", ("receiver",)),
    "invalid_payloads": Measure("Payloads on our channels that pgsignals did not write."),
    "backend_events": Measure("Events that a broker has acknowledged.", ("backend",)),
    "backend_failures": Measure("Tries to pass events on to a broker that failed.", ("backend",)),
    "backend_lost": Measure("Events dropped since a broker was away or too slow.", ("backend",)),
}

GAUGES = {
    "connected": Measure("Whether the Hub is listening, 1 or 0."),
    "queue_depth": Measure("Events that wait for receivers or are with one."),
    "oldest_seconds": Measure("For how long the oldest of these has been here."),
    "lag_seconds": Measure("Age of the latest events when they were handed to receivers."),
    "backend_depth": Measure("Events that wait for a broker's acknowledgement.", ("backend",)),
    "slot_retained_bytes": Measure(
        "The write-ahead log that the server keeps for a consumer's replication slot.",
        ("consumer",),
    ),
    "slot_safe_bytes": Measure(
        "How much more may be written before the server may give the slot up.", ("consumer",)
    ),
}


class Meter:
    """Passes numbers on to a Metrics, if there is one, and survives its errors."""

    def __init__(self, metrics: Metrics | None = None) -> None:
        self._metrics = metrics

    def count(self, name: str, amount: int = 1, /, **labels: str) -> None:
        if self._metrics is None:
            return
        try:
            self._metrics.count(name, amount, **labels)
        except BaseException:
            log.exception("%r could not count %s", self._metrics, name)

    def gauge(self, name: str, read: Callable[[], float], /, **labels: str) -> None:
        if self._metrics is None:
            return

        def read_here() -> float:
            notice_fork()
            return read()

        try:
            self._metrics.gauge(name, read_here, **labels)
        except BaseException:
            log.exception("%r could not take the gauge %s", self._metrics, name)
