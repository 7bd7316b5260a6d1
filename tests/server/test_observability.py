"""What an operator sees: metrics, traces, health, and the fields of log records."""

from __future__ import annotations

import importlib
import logging
import re
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
from flask import Flask
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.parser import text_string_to_metric_families
from werkzeug.test import Client

import pgsignals
from pgsignals import Event, Gap, Health, Hub, MissingExtraError, watch
from pgsignals.contrib.otel import OpenTelemetryTracer, _writer
from pgsignals.contrib.prometheus import PrometheusMetrics
from pgsignals.core.events import Message
from pgsignals.hub.hub import Delivery
from pgsignals.hub.notify import NotifyDelivery
from pgsignals.sources import notify
from pgsignals.testing import Server
from tests.conftest import DEADLINE, Database, Recorder
from tests.paths import ROOT
from tests.proxy import Proxy
from tests.waiting import eventually

KILL = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE application_name = 'pgsignals' AND datname = current_database()"
)
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN_ID = "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE_ID}-{SPAN_ID}-01"

Scrape = Callable[[], dict[str, float]]


@pytest.fixture(autouse=True)
def items(db: Database) -> None:
    """A table."""
    db("CREATE TABLE items (id bigserial PRIMARY KEY, name text)")


@pytest.fixture
def registry() -> CollectorRegistry:
    """An empty registry."""
    return CollectorRegistry()


@pytest.fixture
def scrape(registry: CollectorRegistry) -> Iterator[Scrape]:
    """Reads the registry over HTTP, as Prometheus does: each series by ``name{label=value}``."""
    server, thread = start_http_server(0, "127.0.0.1", registry)

    def read() -> dict[str, float]:
        url = f"http://127.0.0.1:{server.server_port}/metrics"
        with urllib.request.urlopen(url, timeout=DEADLINE) as answer:
            text = answer.read().decode()
        return {
            sample.name
            + "".join(f" {k}={v}" for k, v in sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if not sample.name.endswith("_created")
        }

    yield read
    server.shutdown()
    server.server_close()
    thread.join(DEADLINE)


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    """Where finished spans go."""
    return InMemorySpanExporter()


@pytest.fixture
def tracer(exporter: InMemorySpanExporter) -> OpenTelemetryTracer:
    """A tracer that exports at once."""
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return OpenTelemetryTracer(provider.get_tracer("test"))


def write_traced(db: Database, sql: str, **context: Any) -> None:
    """Run a statement in a transaction whose context is this."""
    db.connection.autocommit = False
    with db.connection, pgsignals.context(db.connection, **context):
        db(sql)
    db.connection.autocommit = True


def links_of(span: ReadableSpan) -> list[tuple[str, str]]:
    """The ids of the traces and spans that a span links to."""
    return [
        (f"{link.context.trace_id:032x}", f"{link.context.span_id:016x}") for link in span.links
    ]


def test_counters_begin_at_zero(
    hub: Hub, dsn: str, registry: CollectorRegistry, scrape: Scrape
) -> None:
    """All that is known at the start is there, so that the first rise of a counter is seen."""
    hub.on("items")(print)
    hub.on_batch("items")(max)
    hub.start(dsn, ["items"], metrics=PrometheusMetrics(registry))
    with hub.stream("items"):
        found = scrape()
    assert found == {
        "pgsignals_connected hub=default": 1,
        "pgsignals_lag_seconds hub=default": 0,
        "pgsignals_oldest_seconds hub=default": 0,
        "pgsignals_queue_depth hub=default": 0,
        "pgsignals_reconnects_total hub=default": 0,
        "pgsignals_shed_events_total hub=default": 0,
        "pgsignals_invalid_payloads_total hub=default": 0,
        **{
            f"pgsignals_gaps_total hub=default reason={reason}": 0
            for reason in (
                "reconnected",
                "overflow",
                "watcher_broken",
                "retention",
                "restored",
                "unknown_name",
            )
        },
        **{
            f"pgsignals_events_total hub=default op={op} table=public.items": 0
            for op in ("inserted", "updated", "deleted")
        },
        **{
            f"pgsignals_receiver_failures_total hub=default receiver=builtins.{name}": 0
            for name in ("print", "max")
        },
    }
    hub.stop()
    assert scrape()["pgsignals_connected hub=default"] == 0


def test_what_is_counted(
    hub: Hub,
    dsn: str,
    db: Database,
    recorder: Recorder,
    registry: CollectorRegistry,
    scrape: Scrape,
) -> None:
    """Events, failures, invalid payloads, reconnects and Gaps each move their own counter."""
    order = Recorder()

    @hub.on("items", "updated")
    def fail(event: Event) -> None:
        raise LookupError

    hub.subscribe(recorder, "items")
    hub.on_gap(order)
    hub.start(dsn, ["items"], metrics=PrometheusMetrics(registry))
    db("INSERT INTO items (name) SELECT 'a' FROM generate_series(1, 3)")
    db("UPDATE items SET name = 'b' WHERE id <= 2")
    # A channel goes by the name of its trigger.
    channel = hub.status().watchers[0].name
    db("SELECT pg_notify(%s, 'forged')", (channel,))
    db("DELETE FROM items WHERE id = 1")
    recorder.wait(6)
    db(KILL)
    order.wait(1)
    found = scrape()
    name = f"{__name__}.test_what_is_counted.<locals>.fail"
    assert found["pgsignals_events_total hub=default op=inserted table=public.items"] == 3
    assert found["pgsignals_events_total hub=default op=updated table=public.items"] == 2
    assert found["pgsignals_events_total hub=default op=deleted table=public.items"] == 1
    assert found[f"pgsignals_receiver_failures_total hub=default receiver={name}"] == 2
    assert found["pgsignals_invalid_payloads_total hub=default"] == 1
    assert found["pgsignals_reconnects_total hub=default"] == 1
    assert found["pgsignals_gaps_total hub=default reason=reconnected"] == 1
    assert found["pgsignals_shed_events_total hub=default"] == 0


def test_a_receiver_that_falls_behind(
    hub: Hub,
    dsn: str,
    db: Database,
    registry: CollectorRegistry,
    scrape: Scrape,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Depth and age show it at once, shedding makes the Hub unready, and afterwards all is well."""
    monkeypatch.setattr(notify, "PAUSE_SECONDS", 0.0)
    entered, gate = threading.Event(), threading.Event()
    gaps, handled, sheds = Recorder(), Recorder(), Recorder()

    class Told(PrometheusMetrics):
        def count(self, name: str, amount: int, /, **labels: str) -> None:
            super().count(name, amount, **labels)
            if name == "shed_events":
                sheds(amount)

    @hub.on("items")
    def wait(event: Event) -> None:
        entered.set()
        gate.wait(DEADLINE)
        handled(event)

    hub.on_gap(gaps)
    hub.start(dsn, ["items"], metrics=Told(registry), queue_size=2)
    try:
        db("INSERT INTO items DEFAULT VALUES")
        assert entered.wait(DEADLINE)
        found = scrape()
        assert found["pgsignals_queue_depth hub=default"] == 1
        assert found["pgsignals_oldest_seconds hub=default"] > 0
        assert hub.health().ready
        for _ in range(4):
            db("INSERT INTO items DEFAULT VALUES")
        assert sheds.wait(4) == [0, 1, 1, 1]
        assert scrape()["pgsignals_shed_events_total hub=default"] == 3
        health = hub.health()
        assert (health.alive, health.ready, health.connected) == (True, False, True)
        assert health.reason == "receivers are too slow, and events are dropped"
        assert health.depth == 2
    finally:
        gate.set()
    gaps.wait(1)
    found = scrape()
    assert found["pgsignals_gaps_total hub=default reason=overflow"] == 1
    assert hub.health().ready
    assert [event.id for event in handled.wait(2)] == [1, 2]


def test_lag_is_by_the_servers_clock(hub: Hub, dsn: str, db: Database, recorder: Recorder) -> None:
    """An event that was committed late is as old as its statement, whatever this clock says."""
    hub.subscribe(recorder, "items")
    hub.start(dsn, ["items"])
    db("INSERT INTO items DEFAULT VALUES")
    recorder.wait(1)
    assert 0 <= hub.health().lag < DEADLINE
    db("BEGIN")
    [(began,)] = db("INSERT INTO items DEFAULT VALUES RETURNING statement_timestamp()")
    db("SELECT pg_sleep(0.5)")
    db("COMMIT")
    [_, event] = recorder.wait(2)
    assert event.at >= began
    lag = hub.health().lag
    [(now,)] = db("SELECT clock_timestamp()")
    # The server's clock is known but for the time that a question to it takes, and never early.
    assert 0.3 <= lag <= (now - event.at).total_seconds()


def test_several_hubs_share_a_registry(
    hub: Hub,
    dsn: str,
    db: Database,
    recorder: Recorder,
    registry: CollectorRegistry,
    scrape: Scrape,
) -> None:
    """The label ``hub`` tells them apart, and a namespace makes other names."""
    hub.subscribe(recorder, "items")
    hub.start(dsn, [("items", "inserted")], metrics=PrometheusMetrics(registry))
    with (
        Hub().start(
            dsn, [("items", "inserted")], metrics=PrometheusMetrics(registry, hub="second")
        ) as second,
        Hub().start(dsn, [("items", "inserted")], metrics=PrometheusMetrics(registry, "shop")),
    ):
        second.subscribe(recorder, "items")
        db("INSERT INTO items DEFAULT VALUES")
        recorder.wait(2)
    found = scrape()
    series = "op=inserted table=public.items"
    assert found[f"pgsignals_events_total hub=default {series}"] == 1
    assert found[f"pgsignals_events_total hub=second {series}"] == 1
    assert found["pgsignals_connected hub=default"] == 1
    assert found["pgsignals_connected hub=second"] == 0
    assert found["shop_connected hub=default"] == 0


def test_metrics_that_raise(
    hub: Hub, dsn: str, db: Database, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    """Their error is logged, and events arrive all the same."""

    class Broken:
        def count(self, name: str, amount: int, /, **labels: str) -> None:
            raise LookupError("nobody counts")

        def gauge(self, name: str, read: Callable[[], float], /) -> None:
            raise LookupError("nobody reads")

    hub.subscribe(recorder, "items")
    hub.start(dsn, ["items"], metrics=Broken())
    db("INSERT INTO items DEFAULT VALUES")
    recorder.wait(1)
    assert "could not count events" in caplog.text
    assert "could not take the gauge connected" in caplog.text


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [
        ("prometheus", "prometheus_client", "metrics"),
        ("otel", "opentelemetry", "otel"),
    ],
)
def test_a_missing_package(
    module: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says what to install."""
    monkeypatch.delitem(sys.modules, f"pgsignals.contrib.{module}")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'pgsignals\[{extra}\]'"):
        importlib.import_module(f"pgsignals.contrib.{module}")


def test_a_span_links_to_the_writer(
    hub: Hub,
    dsn: str,
    db: Database,
    recorder: Recorder,
    exporter: InMemorySpanExporter,
    tracer: OpenTelemetryTracer,
) -> None:
    """Each call of a receiver is a consumer span, linked to the writer's where it is known."""
    hub.subscribe(recorder, "items")
    hub.start(dsn, [("items", "inserted")], tracer=tracer)
    write_traced(db, "INSERT INTO items DEFAULT VALUES", traceparent=TRACEPARENT, user_id=7)
    db("INSERT INTO items DEFAULT VALUES")
    events = recorder.wait(2)
    hub.stop()
    linked, alone = exporter.get_finished_spans()
    assert linked.kind is SpanKind.CONSUMER
    assert linked.name == "process public.items"
    assert linked.parent is None
    assert links_of(linked) == [(TRACE_ID, SPAN_ID)]
    assert dict(linked.attributes or {}) == {
        "messaging.system": "postgresql",
        "messaging.operation.type": "process",
        "messaging.operation.name": "process",
        "messaging.destination.name": "public.items",
        "messaging.message.id": events[0].uid,
        "pgsignals.op": "inserted",
        "pgsignals.receiver": f"{type(recorder).__module__}.Recorder",
    }
    assert linked.status.status_code is StatusCode.UNSET
    assert links_of(alone) == []
    assert alone.context.trace_id != linked.context.trace_id


@pytest.mark.parametrize("kind", [LookupError, SystemExit, StopIteration])
def test_the_error_of_a_receiver_is_in_its_span(
    hub: Hub,
    dsn: str,
    db: Database,
    recorder: Recorder,
    exporter: InMemorySpanExporter,
    tracer: OpenTelemetryTracer,
    kind: type[BaseException],
) -> None:
    """It is recorded once, reported as ever, and the other receivers' spans are well."""
    failed = Recorder()

    @hub.on("items")
    def fail(event: Event) -> None:
        raise kind("no such thing")

    hub.subscribe(recorder, "items", id=1)
    hub.signal("items", "inserted").connect(lambda model, event: recorder(model), weak=False)
    hub.receiver_failed.connect(
        lambda hub, receiver, event, error: failed((receiver, error)), weak=False
    )
    hub.start(dsn, ["items"], tracer=tracer)
    db("INSERT INTO items DEFAULT VALUES")
    recorder.wait(2)
    [(receiver, error)] = failed.wait(1)
    assert receiver is fail
    assert type(error) is kind
    hub.stop()
    by_status = {
        status: [s for s in exporter.get_finished_spans() if s.status.status_code is status]
        for status in StatusCode
    }
    assert len(by_status[StatusCode.UNSET]) == 2
    [span] = by_status[StatusCode.ERROR]
    assert span.status.description == "no such thing"
    assert (span.attributes or {})["error.type"] == kind.__name__
    assert [event.name for event in span.events] == ["exception"]


def test_a_batch_is_one_span(
    hub: Hub,
    dsn: str,
    db: Database,
    recorder: Recorder,
    exporter: InMemorySpanExporter,
    tracer: OpenTelemetryTracer,
) -> None:
    """It links to each writer once, and neither collecting nor a stream is a call."""
    hub.on_batch("items", every=3600)(recorder)
    hub.start(dsn, ["items"], tracer=tracer)
    with hub.stream("items") as stream:
        write_traced(
            db,
            "INSERT INTO items (name) SELECT 'a' FROM generate_series(1, 3)",
            traceparent=TRACEPARENT,
        )
        for _ in range(3):
            assert stream.get(DEADLINE) is not None
    hub.stop()
    [span] = exporter.get_finished_spans()
    assert (span.attributes or {})["messaging.batch.message_count"] == 3
    assert "messaging.message.id" not in (span.attributes or {})
    assert links_of(span) == [(TRACE_ID, SPAN_ID)]


@given(
    st.dictionaries(
        st.sampled_from(["traceparent", "tracestate", "other"]),
        st.one_of(
            st.none(),
            st.integers(),
            st.text(),
            st.lists(st.integers()),
            st.from_regex(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}", fullmatch=True),
        ),
    )
)
def test_any_context_is_survived(context: dict[str, Any]) -> None:
    """What a writer says of its trace is a valid span or nothing."""
    writer = _writer(context)
    assert writer is None or writer.is_valid


def test_a_tracer_of_ones_own(hub: Hub, dsn: str, db: Database, recorder: Recorder) -> None:
    """Anything with ``receiving`` traces, and the receiver runs inside it."""
    steps = Recorder()

    class Steps:
        def receiving(self, events: Any, receiver: str, /) -> AbstractContextManager[None]:
            @contextmanager
            def span() -> Iterator[None]:
                steps("begin")
                yield
                steps("end")

            return span()

    hub.subscribe(lambda event: steps(event.id), "items")
    hub.start(dsn, ["items"], tracer=Steps())
    db("INSERT INTO items DEFAULT VALUES")
    assert steps.wait(3) == ["begin", 1, "end"]


def test_a_tracer_that_raises(
    hub: Hub, dsn: str, db: Database, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    """Its error is logged, and events and batches arrive all the same."""

    class Broken:
        def receiving(self, events: Any, receiver: str, /) -> AbstractContextManager[None]:
            raise LookupError

    hub.subscribe(recorder, "items")
    hub.on_batch("items", every=0)(recorder)
    hub.start(dsn, ["items"], tracer=Broken())
    db("INSERT INTO items DEFAULT VALUES")
    recorder.wait(2)
    assert caplog.text.count("could not begin a span") == 2


def test_health_over_a_life(hub: Hub, dsn: str, server: Server) -> None:
    """Alive and ready from start to stop; without the connection, which a new process would not
    have either, only alive.
    """
    order = Recorder()
    hub.connected.connect(lambda hub: order("connected"), weak=False)
    assert hub.health() == Health(False, False, False, "it is not running")
    hub.disconnected.connect(lambda hub, error: order("disconnected"), weak=False)
    with Proxy("127.0.0.1", server.port) as proxy:
        hub.start(dsn, ["items"], listen_dsn=dsn.replace(str(server.port), str(proxy.port)))
        assert hub.health() == Health(True, True, True, "")
        proxy.refuse()
        proxy.cut()
        order.wait_until(lambda item: item == "disconnected")
        assert hub.health() == Health(
            True, False, False, "the connection is lost, and being made again"
        )
        proxy.accept()
        order.wait(3)
        assert hub.health() == Health(True, True, True, "")
        hub.stop()
    assert hub.health() == Health(False, False, False, "it is not running")
    assert pgsignals.health() == pgsignals.default_hub.health()


def test_the_probes_of_the_documentation(dsn: str) -> None:
    """What the page shows for Flask and for plain WSGI answers 503, and 200 while a Hub runs."""
    page = (ROOT / "docs" / "observability.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    [for_flask] = [block for block in blocks if "@app.get" in block]
    [plain] = [block for block in blocks if "def probe" in block]
    app = Flask(__name__)
    exec(for_flask, {"app": app})
    names: dict[str, Any] = {}
    exec(plain.partition("\nserver =")[0], names)
    clients = app.test_client(), Client(names["probe"])

    def answers() -> list[tuple[int, int]]:
        return [
            (client.get("/healthz").status_code, client.get("/readyz").status_code)
            for client in clients
        ]

    assert answers() == [(503, 503)] * 2
    with pgsignals.start(dsn, ["items"]):
        assert answers() == [(200, 200)] * 2
        assert clients[0].get("/readyz").json["connected"] is True
    assert answers() == [(503, 503)] * 2


def test_health_of_a_thread_that_hangs(
    hub: Hub, dsn: str, db: Database, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that listens and does not turn for heartbeat + timeout is not alive."""
    entered, gate = threading.Event(), threading.Event()
    hub.subscribe(recorder, "items")
    hub.start(dsn, ["items"], heartbeat=0.05, heartbeat_timeout=2.0)
    submit = NotifyDelivery.submit

    def hang(self: NotifyDelivery, message: Message) -> None:
        entered.set()
        gate.wait(DEADLINE)
        submit(self, message)

    monkeypatch.setattr(NotifyDelivery, "submit", hang)
    db("INSERT INTO items DEFAULT VALUES")
    try:
        assert entered.wait(DEADLINE)
        health = eventually(hub.health, lambda found: not found.alive)
        assert (health.alive, health.ready) == (False, False)
        assert health.reason == "the thread that listens has ended or hangs"
    finally:
        gate.set()
    recorder.wait(1)


def test_deliveries_at_debug(
    hub: Hub,
    dsn: str,
    db: Database,
    recorder: Recorder,
    delivery: Delivery,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each event is logged with how many receivers get it, before the first does."""
    caplog.set_level(logging.DEBUG, "pgsignals")
    hub.subscribe(recorder, "items")
    hub.start(dsn, ["items"], delivery=delivery)
    db("INSERT INTO items VALUES (7)")
    recorder.wait(1)
    [record] = [each for each in caplog.records if each.msg.startswith("delivering")]
    assert record.getMessage() == "delivering <Event public.items inserted id=7> to 1 receivers"
    assert vars(record)["event_uid"] == recorder.items[0].uid


def test_the_fields_of_log_records(
    hub: Hub, dsn: str, db: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """A filter finds what went wrong with which receiver, table, operation, event and Gap."""
    gaps = Recorder()
    seen = Recorder()

    @hub.on("items", "inserted")
    def fail(event: Event) -> None:
        seen(event)
        raise LookupError

    @hub.on_gap
    def fail_gap(gap: Gap) -> None:
        gaps(gap)
        raise LookupError

    failures: list[logging.LogRecord] = []

    class OfItems(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            return getattr(record, "table", None) == "public.items"

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            failures.append(record)

    handler = Keep(logging.ERROR)
    handler.addFilter(OfItems())
    logger = logging.getLogger("pgsignals")
    logger.addHandler(handler)
    try:
        hub.start(dsn, [watch("items", "inserted", extra=["name"])])
        db("INSERT INTO items (name) VALUES ('a')")
        [event] = seen.wait(1)
        db("ALTER TABLE items RENAME name TO title")
        db("INSERT INTO items (title) VALUES ('b')")
        [gap] = gaps.wait(1)
        hub.stop()
    finally:
        logger.removeHandler(handler)
    # Two threads log, in either order: the source of its watcher, a worker of the receiver.
    broken, raised = sorted(failures, key=lambda record: hasattr(record, "receiver"))
    where = f"{__name__}.test_the_fields_of_log_records.<locals>"
    assert (
        vars(raised).items()
        >= {"receiver": f"{where}.fail", "event_uid": event.uid, "op": "inserted"}.items()
    )
    assert vars(broken)["op"] == "inserted"
    assert vars(broken)["channel"].startswith("pgsignals")
    assert gap.reason == "watcher_broken"
    told = [r for r in caplog.records if getattr(r, "gap_reason", None) == "watcher_broken"]
    assert [getattr(r, "receiver", None) for r in told] == [None, f"{where}.fail_gap"]
