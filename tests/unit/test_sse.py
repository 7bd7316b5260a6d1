"""The feed that browsers are served from: its wire format, its bounds, and going on after a break.

A parser that follows the WHATWG's rules stands for the browser.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pgsignals
from pgsignals.contrib.event_stream import EVERYTHING, View, encode, last_event_id
from pgsignals.contrib.ring import Entry, Ring
from pgsignals.contrib.sse import Client, Feed
from pgsignals.contrib.sse import _Position as Position
from pgsignals.core.process import guard
from pgsignals.testing import Simulation, simulated
from pgsignals.testing.conformance import make_event
from tests.event_source import Browser
from tests.hub_parts import subscriptions

WATCHERS = [
    pgsignals.watch("orders", "inserted", "updated", extra=["tenant"]),
    "users",
    pgsignals.watch("orders", "inserted", label="new_order"),
]


@pytest.fixture
def source() -> Iterator[tuple[pgsignals.Hub, Simulation]]:
    """A Hub whose events are made up."""
    hub = pgsignals.Hub()
    with simulated(WATCHERS, hub=hub) as simulation:
        yield hub, simulation


def _ids(messages: list[tuple[str, Any]]) -> list[Any]:
    return [data["reason"] if kind == "gap" else data["id"] for kind, data in messages]


def _connect(feed: Feed, browser: Browser, view: View = EVERYTHING) -> Client:
    """The browser connects with the id that it has, as an EventSource does."""
    client = feed.connect(browser.last_id or None, lambda: None, view)
    browser.receive(client.opening())
    return client


@given(st.text(), st.none() | st.text("ab\n\r", min_size=1) | st.text(min_size=1))
def test_data_arrives_as_it_was(data: str, name: str | None) -> None:
    """Whatever its lines, a text arrives with the line ends of the format, or is refused."""
    try:
        message = encode(json.dumps(data), event=name).decode()
    except pgsignals.ConfigurationError:
        assert name is not None
        assert any(c in name for c in "\r\n\0") or name.startswith(" ")
        return
    assert Browser().receive(message.encode()) == [(name or "message", data)]


def test_lines_of_a_text() -> None:
    """Each line of the data is one of the message, whichever way it ends."""
    assert encode("a\r\nb\rc\n") == b"data: a\ndata: b\ndata: c\ndata: \n\n"


@pytest.mark.parametrize(
    ("header", "query", "expected"),
    [
        (None, None, None),
        ("", "", None),
        ("a", "b", "a"),
        (None, "b", "b"),
        ("a\nb", "c", "c"),
        ("x" * 4097, None, None),
    ],
)
def test_last_event_id(header: str | None, query: str | None, expected: str | None) -> None:
    """The header goes before the parameter; what no feed can have given is nothing."""
    assert last_event_id(header, query) == expected


def test_a_browser_is_told_which_record_changed(
    source: tuple[pgsignals.Hub, Simulation],
) -> None:
    """By default it gets the record's id and no column, context or former value."""
    hub, simulation = source
    browser = Browser()
    client = _connect(Feed(hub, "orders"), browser)
    event = simulation.emit("orders", "updated", id=7, values={"tenant": 1}, context={"user": 1})
    [(kind, data)] = browser.receive(client.read())
    assert kind == "message"
    assert data == {
        "op": "updated",
        "schema": "public",
        "table": "orders",
        "id": 7,
        "at": event.at.isoformat().replace("+00:00", "Z"),
    }
    assert browser.last_id == event.uid


def test_an_id_is_exact_in_javascript(source: tuple[pgsignals.Hub, Simulation]) -> None:
    """An integer that a JavaScript number cannot hold is a text."""
    hub, simulation = source
    browser = Browser()
    client = _connect(Feed(hub, "users"), browser)
    for number in (2**53 - 1, 2**53, -(2**63)):
        simulation.emit("users", "inserted", id=number)
    assert _ids(browser.receive(client.read())) == [2**53 - 1, str(2**53), str(-(2**63))]


def test_targets(source: tuple[pgsignals.Hub, Simulation]) -> None:
    """A feed has what its targets say: all of a name, some operations, a label, a watcher."""
    hub, simulation = source
    feed = Feed(hub, ("users", "deleted"), WATCHERS[0], WATCHERS[2], "orders")
    browser = Browser()
    client = _connect(feed, browser)
    simulation.emit("users", "inserted", id=1)
    simulation.emit("users", "deleted", id=2)
    simulation.emit("orders", "updated", id=3)
    simulation.emit("new_order", "inserted", id=4)
    assert [(data["id"], data.get("label")) for _, data in browser.receive(client.read())] == [
        (2, None),
        (3, None),
        (4, "new_order"),
    ]


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        ((), pgsignals.ConfigurationError, "Give what to send"),
        (("orders", "updated"), pgsignals.ConfigurationError, "'updated' is nothing to send"),
        ((("orders", "updted"),), pgsignals.ReceiverError, "did you mean 'updated'"),
        (("orders", "invoices"), pgsignals.ReceiverError, "which no watcher delivers"),
    ],
)
def test_wrong_targets(
    source: tuple[pgsignals.Hub, Simulation],
    targets: tuple[Any, ...],
    error: type[Exception],
    message: str,
) -> None:
    """What no watcher delivers is refused, and leaves nobody subscribed."""
    hub, _ = source
    with pytest.raises(error, match=message):
        Feed(hub, *targets)
    assert subscriptions(hub) == []


def test_a_browser_goes_on_where_it_was(source: tuple[pgsignals.Hub, Simulation]) -> None:
    """What happened between two connections comes with the second, once, in order."""
    hub, simulation = source
    feed = Feed(hub, "users")
    browser = Browser()
    client = _connect(feed, browser)
    client.close()
    simulation.emit("users", "inserted", id=1)  # Before the first message that it ever got.
    client = _connect(feed, browser)
    assert _ids(browser.receive(client.read())) == [1]
    client.close()
    for number in (2, 3):
        simulation.emit("users", "inserted", id=number)
    client = _connect(feed, browser)
    assert _ids(browser.receive(client.read())) == [2, 3]
    assert client.read() == b""
    assert not client.ended


def test_a_page_begins_where_it_was_rendered(source: tuple[pgsignals.Hub, Simulation]) -> None:
    """With the feed's position in the page, nothing between rendering and connecting is missed."""
    hub, simulation = source
    feed = Feed(hub, "users")
    browser = Browser(last_id=feed.position)
    simulation.emit("users", "inserted", id=1)
    assert _ids(browser.receive(_connect(feed, browser).read())) == [1]


def test_another_process_goes_on_too(source: tuple[pgsignals.Hub, Simulation]) -> None:
    """An event's id is known to every process whose Hub has heard it, if there is one order."""
    hub, simulation = source
    first, second = Feed(hub, "users"), Feed(hub, "users")
    local = Feed(hub, "users", ordered=False), Feed(hub, "users", ordered=False)
    browser, other = Browser(), Browser()
    client, of_local = _connect(first, browser), _connect(local[0], other)
    simulation.emit("users", "inserted", id=1)
    browser.receive(client.read())
    other.receive(of_local.read())
    simulation.emit("users", "inserted", id=2)
    assert _ids(browser.receive(_connect(second, browser).read())) == [2]
    assert _ids(other.receive(_connect(local[1], other).read())) == ["unknown_id"]


def test_a_uid_of_a_former_history(source: tuple[pgsignals.Hub, Simulation]) -> None:
    """What has the uid of an earlier event is another one behind a Gap, and a repetition if not."""
    hub, _ = source
    feed, browser = Feed(hub, "users"), Browser()
    client = _connect(feed, browser)
    feed.put(make_event(1, record=1))
    feed.put(make_event(1, record=1))
    assert _ids(browser.receive(client.read())) == [1]
    now = datetime.now(timezone.utc)
    feed.put(pgsignals.Gap(now, now, "reconnected"))
    feed.put(make_event(1, record=2))
    assert _ids(browser.receive(client.read())) == ["reconnected", 2]
    feed.put(make_event(2, record=3))
    assert _ids(browser.receive(_connect(feed, browser).read())) == [3]


@pytest.mark.parametrize("last_id", ["gone", "0.0", "deadbeef.1", "users-1-1-0"])
def test_an_id_that_is_not_known_is_a_gap(
    source: tuple[pgsignals.Hub, Simulation], last_id: str
) -> None:
    """A browser from before a restart is told that it may have missed something, once."""
    hub, simulation = source
    feed = Feed(hub, "users")
    browser = Browser(last_id=last_id)
    client = _connect(feed, browser)
    assert browser.receive(client.read()) == [("gap", {"reason": "unknown_id"})]
    client.close()
    client = _connect(feed, browser)
    assert client.read() == b""
    simulation.emit("users", "inserted", id=1)
    assert _ids(browser.receive(client.read())) == [1]


def test_positions_that_cannot_be(source: tuple[pgsignals.Hub, Simulation]) -> None:
    """Neither the future nor what the ring no longer holds is resumed from."""
    hub, simulation = source
    feed = Feed(hub, "users", size=2)
    start = feed.position
    for number in range(3):
        simulation.emit("users", "inserted", id=number)
    token = start.partition(".")[0]
    for last_id in (start, f"{token}.4", f"{token}.-1", f"{token}.{'9' * 19}", f"{token}.²"):
        browser = Browser(last_id=last_id)
        assert _ids(browser.receive(_connect(feed, browser).read())) == ["unknown_id"]


def test_a_gap_reaches_everybody(source: tuple[pgsignals.Hub, Simulation]) -> None:
    """A Gap is a message, without PostgreSQL's words, and stands where it was for later ones."""
    hub, simulation = source
    feed = Feed(hub, "users")
    browser, absent = Browser(), Browser()
    client = _connect(feed, browser)
    _connect(feed, absent).close()
    simulation.emit("users", "inserted", id=1)
    gap = simulation.gap("watcher_broken", detail="column secret does not exist")
    simulation.emit("users", "inserted", id=2)
    messages = browser.receive(client.read())
    assert _ids(messages) == [1, "watcher_broken", 2]
    assert messages[1][1].keys() == {"reason", "since", "until"}
    assert messages[1][1]["since"] == gap.since.isoformat().replace("+00:00", "Z")
    assert absent.receive(_connect(feed, absent).read()) == messages


def test_a_client_that_stops_reading_gets_a_gap(
    source: tuple[pgsignals.Hub, Simulation],
) -> None:
    """The feed holds its size and no more; who was too slow is told, and goes on with the rest."""
    hub, simulation = source
    feed = Feed(hub, "users", size=3)
    slow, quick = Browser(), Browser()
    of_slow, of_quick = _connect(feed, slow), _connect(feed, quick)
    for number in range(10):
        simulation.emit("users", "inserted", id=number)
        assert _ids(quick.receive(of_quick.read())) == [number]
    assert _ids(slow.receive(of_slow.read())) == ["slow", 7, 8, 9]
    assert len(feed._numbers) == 3


def test_a_message_holds_a_bounded_number_of_events(
    source: tuple[pgsignals.Hub, Simulation],
) -> None:
    """What has piled up is sent in pieces, and nothing of it is left out."""
    hub, simulation = source
    browser = Browser()
    client = _connect(Feed(hub, "users"), browser)
    for number in range(250):
        simulation.emit("users", "inserted", id=number)
    sizes = [len(browser.receive(client.read())) for _ in range(4)]
    assert sizes == [100, 100, 50, 0]
    assert _ids(browser.messages) == list(range(250))


def test_a_ring_that_is_cleared() -> None:
    """Its numbers go on, and who had read to its end is as far behind as everybody else."""
    ring = Ring(2)
    entries = [Entry(None, Position("token", 0)) for _ in range(4)]
    assert [ring.put(entry) for entry in entries[:3]] == [None, None, entries[0]]
    assert ring.page(0) == (1, entries[1:3])
    end = ring.next
    assert ring.page(end) == (end, [])
    ring.clear()
    assert ring.oldest == ring.next > end
    ring.put(entries[3])
    assert ring.page(end) == (end + 1, [entries[3]])


def test_who_waits_is_woken_once(source: tuple[pgsignals.Hub, Simulation]) -> None:
    """A burst wakes a client once, however long, and only one that has read all there was."""
    hub, simulation = source
    feed = Feed(hub, "users")
    woken: list[int] = []
    client = feed.connect(None, lambda: woken.append(1))
    simulation.emit("users", "inserted", id=1)
    assert woken == []
    assert client.read() != b""
    assert client.read() == b""
    for number in range(3):
        simulation.emit("users", "inserted", id=number)
    assert woken == [1]


def test_a_client_that_cannot_be_woken_stops_nobody(
    source: tuple[pgsignals.Hub, Simulation],
) -> None:
    """The next client is woken all the same, and the receiver does not fail."""
    hub, simulation = source
    feed = Feed(hub, "users")
    woken: list[int] = []

    def fail() -> None:
        raise RuntimeError("Event loop is closed")

    for wake in (fail, lambda: woken.append(1)):
        feed.connect(None, wake).read()
    simulation.emit("users", "inserted", id=1)
    assert woken == [1]


def test_each_sees_what_it_may(source: tuple[pgsignals.Hub, Simulation]) -> None:
    """What is not visible to a client reaches it in no way, not even by its id."""
    hub, simulation = source
    feed = Feed(hub, "orders")
    browser = Browser()
    client = _connect(feed, browser, View(visible=lambda event: event.values["tenant"] == 7))
    seen = simulation.emit("orders", "inserted", id=1, values={"tenant": 7})
    hidden = simulation.emit("orders", "inserted", id=2, values={"tenant": 8})
    sent = client.read() + client.read() + client.keepalive()
    assert _ids(browser.receive(sent)) == [1]
    assert hidden.uid.encode() not in sent
    assert browser.last_id not in ("", seen.uid, hidden.uid)
    simulation.emit("orders", "inserted", id=3, values={"tenant": 7})
    assert _ids(browser.receive(_connect(feed, browser).read())) == [3]


def test_a_view_shapes_what_is_sent(source: tuple[pgsignals.Hub, Simulation]) -> None:
    """The data and the type of a message are the view's, as JSON or as a text."""
    hub, simulation = source
    feed = Feed(hub, "orders")
    chosen = View(data=lambda event: event.values, name=lambda event: f"order-{event.op}")
    browser = Browser()
    client = _connect(feed, browser, chosen)
    html = feed.connect(None, lambda: None, View(data=lambda event: f"<b>\n{event.id}</b>"))
    simulation.emit("orders", "inserted", id=1, values={"tenant": 7})
    assert browser.receive(client.read()) == [("order-inserted", {"tenant": 7})]
    assert b"\ndata: <b>\ndata: 1</b>\n\n" in html.read()


@pytest.mark.parametrize(
    "view",
    [
        View(visible=lambda event: event.values["tenant"] > 0),
        View(data=lambda event: 1 // 0),
        View(name=lambda event: "two\nlines"),
    ],
)
def test_a_view_that_raises_hides_the_event_and_says_so(
    source: tuple[pgsignals.Hub, Simulation], view: View, caplog: pytest.LogCaptureFixture
) -> None:
    """The client gets a gap in place of the event, and the log the error."""
    hub, simulation = source
    browser = Browser()
    client = _connect(Feed(hub, "orders"), browser, view)
    event = simulation.emit("orders", "updated", id=1, truncated=True)
    assert browser.receive(client.read()) == [("gap", {"reason": "failed"})]
    [record] = caplog.records
    assert record.event_uid == event.uid  # type: ignore[attr-defined]


def test_it_ends_with_the_hub() -> None:
    """When the Hub stops, clients read what is there and end; a later event is not for them."""
    hub = pgsignals.Hub()
    browser = Browser()
    woken: list[int] = []
    with simulated(WATCHERS, hub=hub) as simulation:
        feed = Feed(hub, "users")
        client = feed.connect(None, lambda: woken.append(1))
        assert client.read() == b""
        simulation.emit("users", "inserted", id=1)
    assert feed.closed
    assert _ids(browser.receive(client.read())) == [1]
    assert not client.ended
    assert client.read() == b""
    assert client.ended
    late = feed.connect(None, lambda: None)
    assert late.read() == b""
    assert late.ended
    assert subscriptions(hub) == []


def test_a_client_that_leaves_is_forgotten(source: tuple[pgsignals.Hub, Simulation]) -> None:
    """The number of clients is that of the connected ones."""
    hub, _ = source
    feed = Feed(hub, "users")
    clients = [feed.connect(None, lambda: None) for _ in range(3)]
    assert feed.clients == 3
    for client in clients:
        client.read()
        client.close()
        client.close()
    assert feed.clients == 0
    assert feed._sleeping == {}


def test_in_the_child_of_a_fork_it_is_closed(source: tuple[pgsignals.Hub, Simulation]) -> None:
    """Also when the parent held its lock at the fork; the parent's goes on."""
    hub, simulation = source
    feed = Feed(hub, "users")
    client = _connect(feed, Browser())
    # As when it is started on a database: what a Hub does after a fork is done here, too.
    guard(hub)
    with feed._lock:
        child = os.fork()
    if child == 0:
        try:
            feed.close()
            code = 0 if feed.closed and not client.read() and client.ended else 1
        except BaseException:
            code = 2
        os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    simulation.emit("users", "inserted", id=1)
    assert client.read() != b""
