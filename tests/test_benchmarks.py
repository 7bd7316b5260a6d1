"""The benchmarks measure what they say: their table, their plots, and their counting."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks.baselines import ROW_TRIGGER, asyncpg_listener, psycopg_notifies, select_loop
from benchmarks.harness import Counter, Figure, connect, execute, interleave, shop, watching
from benchmarks.plots import line_plot
from pgsignals.testing import Server

ROWS = 2_000


@pytest.mark.parametrize("listen", [watching, select_loop, psycopg_notifies, asyncpg_listener])
def test_each_side_receives_as_many_events_as_were_written(server: Server, listen: object) -> None:
    """No listener that is compared misses a row or counts one twice."""
    if listen is asyncpg_listener:
        pytest.importorskip("asyncpg")
    dsn = shop(server, *([] if listen is watching else [ROW_TRIGGER]))
    counter = Counter()
    counter.expect(ROWS)
    with listen(dsn, counter):  # type: ignore[operator]
        connection = connect(dsn)
        execute(
            connection,
            "INSERT INTO orders (customer_id, total) SELECT 7, 1 FROM generate_series(1, %s)",
            (ROWS,),
        )
        connection.close()
        counter.wait()
    assert counter.received == ROWS


def test_a_target_is_judged_by_the_median() -> None:
    """At most and at least are told apart, and a line without a target is never missed."""
    assert Figure("a", [1.0, 1.1, 9.0], "", 1.1).met
    assert not Figure("a", [1.0, 1.2, 9.0], "", 1.1).met
    assert not Figure("a", [1.0, 1.2, 9.0], "", 1.3, at_most=False).met
    assert Figure("a", [99.0], "").met


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
