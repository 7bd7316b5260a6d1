"""Traces for OpenTelemetry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ..core.errors import MissingExtraError
from ..core.events import Event
from ..core.redaction import error_text, trace_text, type_name

try:
    from opentelemetry import trace
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError as error:
    raise MissingExtraError(
        "Traces for OpenTelemetry need the package opentelemetry-api: pip install 'pgsignals[otel]'"
    ) from error

_w3c = TraceContextTextMapPropagator()


class OpenTelemetryTracer:
    """Makes a consumer span for each call of a receiver, by default of the global tracer provider.

    A span begins a trace of its own, and links to that of the writer if ``event.context`` has its
    ``traceparent``. The error of a receiver is recorded in the span.
    """

    def __init__(self, tracer: trace.Tracer | None = None) -> None:
        self._tracer = trace.get_tracer("pgsignals") if tracer is None else tracer

    @contextmanager
    def receiving(self, events: Sequence[Event], receiver: str, /) -> Iterator[None]:
        table = f"{events[0].schema}.{events[0].table}"
        attributes: dict[str, str | int] = {
            "messaging.system": "postgresql",
            "messaging.operation.type": "process",
            "messaging.operation.name": "process",
            "messaging.destination.name": table,
            "pgsignals.receiver": receiver,
        }
        if len(events) == 1:
            attributes["messaging.message.id"] = events[0].uid
            attributes["pgsignals.op"] = events[0].op
        else:
            attributes["messaging.batch.message_count"] = len(events)
        with self._tracer.start_as_current_span(
            f"process {table}",
            # An empty context, since a worker goes on with nobody's trace.
            context=Context(),
            kind=trace.SpanKind.CONSUMER,
            attributes=attributes,
            links=_links(events),
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield
            # OpenTelemetry leaves out SystemExit and its like, which are a receiver's failure too.
            except BaseException as error:
                # As record_exception() does, but safe for an error with any text.
                span.add_event(
                    "exception",
                    {
                        "exception.type": type_name(error),
                        "exception.message": error_text(error),
                        "exception.stacktrace": trace_text(error),
                    },
                )
                span.set_attribute("error.type", type_name(error))
                span.set_status(trace.Status(trace.StatusCode.ERROR, error_text(error)))
                raise


def _links(events: Sequence[Event]) -> list[trace.Link]:
    """Return links to the writers' spans, each once."""
    writers = filter(None, (_writer(event.context) for event in events))
    by_id = {(writer.trace_id, writer.span_id): writer for writer in writers}
    return [trace.Link(writer) for writer in by_id.values()]


def _writer(context: Mapping[str, Any]) -> trace.SpanContext | None:
    """Return the writer's span, if the context has one; anybody can set the context to anything."""
    carrier = {
        name: value
        for name in ("traceparent", "tracestate")
        if isinstance(value := context.get(name), str)
    }
    if "traceparent" not in carrier:
        return None
    span = trace.get_current_span(_w3c.extract(carrier, Context())).get_span_context()
    return span if span.is_valid else None
