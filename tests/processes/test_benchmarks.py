"""The benchmarks measure what they say: their table, their plots, and their counting."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bulk, catchup, durable_latency, latency, pubsub, relay, single, subscriptions
from benchmarks import writers as writing
from benchmarks.__main__ import ROWS
from benchmarks.baselines import (
    OUTBOX,
    ROW_TRIGGER,
    asyncpg_listener,
    polled_outbox,
    psycopg_notifies,
    select_loop,
    select_loop_with_worker,
)
from benchmarks.harness import (
    INSERT_MANY,
    Bench,
    Counter,
    Figure,
    Miscounted,
    Plot,
    connect,
    consuming,
    execute,
    interleave,
    percentile,
    reading,
    shop,
    watching,
)
from benchmarks.plots import line_plot
from benchmarks.processes import Child, processor_seconds
from benchmarks.report import Results, Row, page, publish, table
from pgsignals.testing import Server
from tests.paths import ROOT

WRITTEN = 2_000


class Tiny(Bench):
    """A run of next to nothing, on the tests' server."""

    def __init__(self, server: Server) -> None:
        super().__init__(1, quick=True)
        self._server = server

    @property
    def server(self) -> Server:
        return self._server

    def scaled(self, size: int) -> int:
        return max(20, size // 1000)


@pytest.fixture
def tiny(server: Server) -> Iterator[Bench]:
    """A run whose databases are gone afterwards."""
    with Tiny(server) as bench:
        yield bench
        bench.tidy()


@pytest.mark.parametrize(
    ("listen", "statements"),
    [
        (watching, []),
        (consuming, []),
        (reading, []),
        (partial(reading, capture="messages"), []),
        (select_loop, [ROW_TRIGGER]),
        (select_loop_with_worker, [ROW_TRIGGER]),
        (psycopg_notifies, [ROW_TRIGGER]),
        (asyncpg_listener, [ROW_TRIGGER]),
        (polled_outbox, [OUTBOX]),
    ],
)
def test_each_side_receives_as_many_events_as_were_written(
    server: Server,
    listen: Callable[[str, Counter], AbstractContextManager[None]],
    statements: list[str],
) -> None:
    """No listener that is compared misses a row or counts one twice."""
    _write_and_count(shop(server, *statements), listen)


def test_django_pgpubsub_receives_as_many_events_as_were_written(server: Server) -> None:
    """The same of django-pgpubsub, in a process of its own, since Django is set up once."""
    module = "tests.processes.test_benchmarks"
    program = f"import sys; from {module} import pubsub_in; pubsub_in(*sys.argv[1:])"
    databases = [shop(server), shop(server)]
    done = subprocess.run(
        [sys.executable, "-c", program, *databases], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def pubsub_in(*databases: str) -> None:
    """What the process above does: in one database after the other."""
    for dsn in databases:
        _write_and_count(dsn, pubsub.listening, 100)


def _write_and_count(
    dsn: str, listen: Callable[[str, Counter], AbstractContextManager[None]], rows: int = WRITTEN
) -> None:
    counter = Counter()
    counter.expect(rows)
    with listen(dsn, counter):
        connection = connect(dsn)
        execute(connection, INSERT_MANY, (rows,))
        connection.close()
        counter.wait()
    assert counter.received == counter.written == rows


def test_an_event_that_is_missing_or_too_many() -> None:
    """Neither less nor more than was written passes for a count."""
    counter = Counter()
    counter.patience = 0.01
    counter.expect(2)
    counter(None)
    with pytest.raises(Miscounted, match="1 events have come of 2 rows"):
        counter.wait()
    counter(None)
    counter.wait()
    counter(None)
    with pytest.raises(Miscounted, match="3 events have come of 2 rows"):
        counter.expect(1)
    with pytest.raises(Miscounted):
        counter.wait_for_all(0)


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the first events that any counter gets is lost."""
    honest = Counter.__call__
    seen = 0

    def forget(counter: Counter, event: object) -> None:
        nonlocal seen
        seen += 1
        if seen != 11:
            honest(counter, event)

    monkeypatch.setattr(Counter, "__call__", forget)
    monkeypatch.setattr(Counter, "patience", 0.5)


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize(
    "measure",
    [
        single.measure,
        latency.measure,
        subscriptions.measure,
        durable_latency.measure,
        bulk.partitioned,
    ],
)
def test_a_row_notices_a_missing_event(
    tiny: Bench, measure: Callable[[Bench], list[Figure]]
) -> None:
    """A run in which one event is missing gives no figures."""
    with pytest.raises(Miscounted):
        measure(tiny)


@pytest.mark.usefixtures("forgetful")
def test_a_bulk_insert_notices_a_missing_event(tiny: Bench) -> None:
    """The same of one side that inserts many rows."""
    dsn, counter = tiny.shop(), Counter()
    side = bulk.Side(dsn, 100, counter)
    with watching(dsn, counter), pytest.raises(Miscounted):
        side.run()
    side.close()


@pytest.mark.usefixtures("forgetful")
def test_writers_notice_a_missing_event(tiny: Bench) -> None:
    """The same of pgbench's clients."""
    with pytest.raises(Miscounted):
        writing.Side(tiny, tiny.shop(), watching).run(2, 1.0)


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("delivery", ["outbox", "wal"])
def test_catching_up_notices_a_missing_event(tiny: Bench, delivery: str) -> None:
    """The same of a consumer that was away."""
    dsn = tiny.shop()
    catchup.leave_backlog(dsn, ["late"], 100, single=True, delivery=delivery)
    with pytest.raises(Miscounted):
        catchup.consume(dsn, "late", 100, delivery)


def test_a_relay_notices_a_missing_record(tiny: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker is asked how much it has."""
    monkeypatch.setitem(relay.EVENTS, "NATS", 1_000_000)
    honest = relay.nats_records
    assert len(relay.nats(tiny)) == 7
    monkeypatch.setattr(relay, "nats_records", lambda *given: honest(*given) - 1)
    with pytest.raises(Miscounted, match="999 records of 1,000 rows"):
        relay.nats(tiny)


def test_a_process_that_fails_fails_its_row() -> None:
    """A child that ends with an error, or too soon, gives no figure."""
    with pytest.raises(RuntimeError, match="ended with"), Child("benchmarks.memory"):
        pass
    with pytest.raises(RuntimeError, match="failed"), Child("benchmarks.memory") as child:
        child.hear()


def test_processor_time_has_that_of_children() -> None:
    """A process that works for a while, in a child, is seen to have worked."""
    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    work = "import time\nwhile time.process_time() < 0.3: pass"
    with subprocess.Popen(
        [sys.executable, "-c", f"{program}; print(); input()", work],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert processor_seconds(process.pid) >= 0.3
        process.communicate(b"\n")


def test_a_target_is_judged_by_the_median() -> None:
    """At most and at least are told apart, and a line without a target is never missed."""
    assert Figure("a", [1.0, 1.1, 9.0], "", 1.1).met
    assert not Figure("a", [1.0, 1.2, 9.0], "", 1.1).met
    assert not Figure("a", [1.0, 1.2, 9.0], "", 1.3, at_most=False).met
    assert Figure("a", [99.0], "").met


def test_percentiles() -> None:
    """They lie among the values, however few there are."""
    assert percentile([1.0, 2.0, 3.0], 50) == 2.0
    assert percentile([*range(1, 102)], 99) == 100.0
    assert percentile([1.0, 5.0], 99) <= 5.0


def test_the_sides_take_turns() -> None:
    """Every other round runs in reverse order."""
    calls: list[str] = []
    sides = {name: lambda name=name: calls.append(name) or 1.0 for name in "ab"}
    assert interleave(2, sides, warm_up=False) == {"a": [1.0, 1.0], "b": [1.0, 1.0]}
    assert "".join(calls) == "abba"


def test_a_plot_is_wellformed() -> None:
    """A plot has a line for each series, and names with markup do no harm."""
    svg = line_plot("t<", "x", "y", {"a&b": [(1, 10), (1000, 0.5)], "c": [(10, 3)]})
    root = ElementTree.fromstring(svg)
    assert len(root.findall("{http://www.w3.org/2000/svg}polyline")) == 2


def _row(**given: Any) -> Row:
    return Row(at="2026-01-01 00:00 UTC", load=0.5, seconds=1.0, rounds=5, quick=False, **given)


def test_results_of_several_runs(tmp_path: Path) -> None:
    """A run of some rows leaves the others' results, unless they are of another machine."""
    plot = Plot("rows", "t", "x", "y", {"a": [(1.0, 2.0)]})
    first = Results("here", {"bulk": _row(figures=[Figure("a", [1.5, 2.5], "ms", 1.0, plot=plot)])})
    first.save(tmp_path)
    again = Results.load(tmp_path, "here")
    assert again.rows["bulk"].figures[0].median == 2.0
    assert again.rows["bulk"].figures[0].plot == plot
    again.rows["relay-kafka"] = _row(problem="skipped: java is not installed")
    again.save(tmp_path)
    text = page(Results.load(tmp_path, "here"))
    assert "| a | 2 ms | 1.5 … 2.5 | ≤ 1 | **missed** |" in text
    assert "| relay-kafka: skipped: java is not installed | | | | |" in text
    assert not Results.load(tmp_path, "elsewhere").rows


def test_publishing(tmp_path: Path) -> None:
    """What a run wrote is copied: the page, the numbers and the plots."""
    source, into = tmp_path / "bench", tmp_path / "docs"
    plot = Plot("rows", "t", "x", "y", {"a": [(1.0, 2.0)]})
    Results("here", {"bulk": _row(figures=[Figure("a", [1.0], "", plot=plot)])}).save(source)
    found = {path.name for path in publish(source, into)}
    assert found == {"results.json", "results.md", "rows.svg"}
    assert {path.name for path in into.iterdir()} == found
    with pytest.raises(FileNotFoundError):
        publish(tmp_path / "nowhere", into)


def test_the_table_aligns() -> None:
    """Each line of a table has its columns under those of the first."""
    lines = table([Figure("x" * 60, [1.0, 2.0], "ms", 3.0), Figure("y", [5.0], "")]).splitlines()
    assert lines[1].index("1.5 ms") == lines[0].index("median") == lines[2].index("5")


def test_the_rows_are_documented() -> None:
    """Whoever looks a row up finds what it measures."""
    text = (ROOT / "benchmarks" / "README.md").read_text()
    assert [name for name in ROWS if f"`{name}`" not in text] == []
