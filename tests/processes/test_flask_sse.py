"""Streams to browsers from a threaded gunicorn, and from servers without threads."""

from __future__ import annotations

import contextlib
import http.client
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from flask import Flask, Response
from psycopg2.extensions import make_dsn, parse_dsn

import pgsignals
from pgsignals import Hub
from pgsignals.contrib.event_stream import HEADERS
from pgsignals.contrib.flask import PgSignals, position, sse
from pgsignals.contrib.flask.extension import Process
from tests.commands import Program
from tests.conftest import DEADLINE, Database
from tests.event_source import Browser
from tests.paths import ROOT
from tests.proxy import Proxy
from tests.served import Tab
from tests.waiting import settle


@pytest.fixture(autouse=True)
def items(db: Database) -> None:
    """The table of the application."""
    db("CREATE TABLE items (id bigserial PRIMARY KEY, tenant integer NOT NULL DEFAULT 1)")


class Server:
    """A gunicorn with one worker of some threads, and tabs that are closed at the end."""

    def __init__(
        self,
        dsn: str,
        *arguments: str,
        threads: int = 8,
        clients: str = "",
        delivery: str = "notify",
    ) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
        self.port: int = self._listener.getsockname()[1]
        os.environ["SSE_CLIENTS"] = clients
        try:
            self.program = Program(
                *("-m", "gunicorn", "--worker-class=gthread", f"--threads={threads}"),
                *("--config=python:tests.flask_gunicorn", "--no-control-socket", *arguments),
                *(f"--bind=fd://{self._listener.fileno()}", "tests.flask_shop:create_app()"),
                dsn=dsn,
                cwd=ROOT,
                descriptors=[self._listener.fileno()],
                SHOP_DELIVERY=delivery,
            )
        finally:
            del os.environ["SSE_CLIENTS"]
        self.worker = int(self.program.out().split()[0])
        self.tabs: list[Tab] = []

    def open(self, path: str = "/events", browser: Browser | None = None) -> Tab:
        """Open a tab."""
        self.tabs.append(Tab(self.port, path, browser))
        return self.tabs[-1]

    def get(self, path: str) -> str:
        """The body of a page."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE)
        with contextlib.closing(connection):
            connection.request("GET", path)
            return connection.getresponse().read().decode()

    def memory(self) -> int:
        """The worker's resident memory, in bytes."""
        pages = Path(f"/proc/{self.worker}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def close(self) -> None:
        """End everything; safe to call twice."""
        if self._listener.fileno() < 0:
            return
        for tab in self.tabs:
            tab.close()
        if self.program.process.poll() is None:
            for process in (self.program.process.pid, self.worker):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        self._listener.close()
        self.program.end()


@pytest.fixture
def serve(dsn: str) -> Iterator[Callable[..., Server]]:
    """Starts servers that listen already."""
    started: list[Server] = []

    def start(*arguments: str, **options: Any) -> Server:
        started.append(Server(dsn, *arguments, **options))
        return started[-1]

    yield start
    for each in started:
        each.close()


def test_browsers_hear_of_changes(serve: Callable[..., Server], db: Database) -> None:
    """Each tab gets each event, at once, with the headers of a stream that no proxy keeps back."""
    server = serve()
    tabs = [server.open() for _ in range(2)]
    for name, value in HEADERS.items():
        assert tabs[0].response.headers[name] == value
    db("INSERT INTO items DEFAULT VALUES")
    db("UPDATE items SET tenant = 2")
    for tab in tabs:
        assert tab.wait(2) == [1, 1]
        assert [data["op"] for _, data in tab.browser.messages] == ["inserted", "updated"]
        assert tab.browser.retry == 3000


def test_each_tab_sees_what_it_may(serve: Callable[..., Server], db: Database) -> None:
    """The filter of one client is not that of another."""
    server = serve()
    first, second = server.open("/events?tenant=1"), server.open("/events?tenant=2")
    db("INSERT INTO items (tenant) VALUES (1), (2), (1), (2)")
    assert first.wait(2) == [1, 3]
    assert second.wait(2) == [2, 4]


def test_a_tab_goes_on_where_it_was(serve: Callable[..., Server], db: Database) -> None:
    """What happened while it was away comes first; after a restart it gets a gap."""
    server = serve()
    tab = server.open()
    db("INSERT INTO items DEFAULT VALUES")
    assert tab.wait(1) == [1]
    tab.close()
    other = server.open()
    db("INSERT INTO items DEFAULT VALUES")
    assert other.wait(1) == [2]
    rendered = server.get("/position")
    db("INSERT INTO items DEFAULT VALUES")
    again = server.open(browser=tab.browser)
    assert again.wait(3) == [1, 2, 3]
    assert server.open(f"/events?last-event-id={rendered}").wait(1) == [3]
    server.close()
    restarted = serve()
    after = restarted.open(browser=tab.browser)
    assert after.wait(4) == [1, 2, 3, "unknown_id"]
    db("INSERT INTO items DEFAULT VALUES")
    assert after.wait(5)[4] == 4


@pytest.mark.parametrize("delivery", ["outbox", "wal"])
def test_a_server_that_is_killed(serve: Callable[..., Server], db: Database, delivery: str) -> None:
    """In durable delivery what was missed comes once, late commits too, and the filter holds."""
    server = serve(delivery=delivery)
    tab = server.open("/events?tenant=1")
    db("INSERT INTO items DEFAULT VALUES")
    assert tab.wait(1) == [1]
    slow = psycopg2.connect(db.dsn)
    try:
        slow.cursor().execute("INSERT INTO items (tenant) VALUES (1), (2)")
        db("INSERT INTO items DEFAULT VALUES")
        assert tab.wait(2) == [1, 4]
        server.close()
        db("INSERT INTO items (tenant) VALUES (1), (2), (1)")
        slow.commit()
    finally:
        slow.close()
    restarted = serve(delivery=delivery)
    again = restarted.open("/events?tenant=1", browser=tab.browser)
    # In an outbox in the order of their ids, since they were committed before it came back.
    assert again.wait(5) == [1, 4, *((2, 5, 7) if delivery == "outbox" else (5, 7, 2))]
    db("INSERT INTO items DEFAULT VALUES")
    assert again.wait(6)[5] == 8
    forged = restarted.open("/events", browser=Browser(last_id=f"{tab.browser.last_id}A"))
    assert forged.wait(1) == ["unknown_id"]


def test_silence_is_kept_alive(serve: Callable[..., Server], db: Database) -> None:
    """Without events something comes all the same, and what is not visible moves the id."""
    tab = serve().open("/events?keepalive=0.05&tenant=1")
    while tab.browser.comments < 2:
        assert tab.more()
    first = tab.browser.last_id
    db("INSERT INTO items (tenant) VALUES (2)")
    while tab.browser.last_id == first:
        assert tab.more()
    assert tab.browser.messages == []


def test_a_stream_ends_to_be_authorised_again(serve: Callable[..., Server], db: Database) -> None:
    """After its lifetime the browser connects again and misses nothing."""
    server = serve()
    tab = server.open("/events?lifetime=0.05")
    while tab.more():
        pass
    db("INSERT INTO items DEFAULT VALUES")
    assert server.open(browser=tab.browser).wait(1) == [1]


def test_a_stream_holds_no_connection(serve: Callable[..., Server], db: Database) -> None:
    """More tabs than the pool has connections are open, and pages that need one are served."""
    server = serve()
    tabs = [server.open() for _ in range(6)]  # The pool has two.
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=DEADLINE)
    with contextlib.closing(connection):
        connection.request("POST", "/")
        assert connection.getresponse().read() == b"1"
    for tab in tabs:
        assert tab.wait(1) == [1]


@pytest.mark.parametrize("delivery", ["notify", "outbox"])
def test_a_tab_that_stops_reading(
    serve: Callable[..., Server], db: Database, delivery: str
) -> None:
    """It holds nobody up and costs no memory; when it reads on, it gets a gap and the rest.

    In outbox delivery it gets all that there is.
    """
    server = serve(delivery=delivery)
    stuck, other = server.open(), server.open()
    count, rounds = 20_000, 3
    for number in range(rounds):
        db("INSERT INTO items (tenant) SELECT 0 FROM generate_series(1, %s)", (count,))
        # The reader may be lapped as well on a busy machine; it goes on to the end.
        last = (number + 1) * count
        while not other.browser.messages or other.browser.messages[-1][1].get("id") != last:
            assert other.more()
        if number == 0:
            before = server.memory()
    assert server.memory() - before < 16 * 2**20
    while not stuck.browser.messages or stuck.browser.messages[-1][1].get("id") != count * rounds:
        assert stuck.more()
    reasons = [data["reason"] for kind, data in stuck.browser.messages if kind == "gap"]
    if delivery == "notify":
        assert reasons
        assert set(reasons) == {"slow"}
    else:
        told = [data["id"] for _, data in stuck.browser.messages]
        assert told == list(range(1, count * rounds + 1))


def test_a_tab_that_does_not_read_loses_its_thread(
    serve: Callable[..., Server], db: Database
) -> None:
    """After send_timeout the server drops it, and its place is free for another."""
    server = serve(clients="1")
    stuck = server.open("/events?send_timeout=0.5")
    stuck.more()
    deadline = time.monotonic() + 2 * DEADLINE
    while True:
        # Enough for the buffers of both ends.
        db("INSERT INTO items (tenant) SELECT 0 FROM generate_series(1, 20000)")
        tab = server.open()
        tab.more()
        if tab.browser.retry == 3000:
            break
        assert time.monotonic() < deadline


def test_no_more_streams_than_allowed(serve: Callable[..., Server], db: Database) -> None:
    """One too many is told to come back later, by an answer after which a browser does so."""
    server = serve(clients="2")
    tabs = [server.open() for _ in range(2)]
    refused = server.open()
    while refused.more():
        pass
    assert (refused.browser.retry, refused.browser.last_id) == (15_000, "")
    db("INSERT INTO items DEFAULT VALUES")
    assert [tab.wait(1) for tab in tabs] == [[1], [1]]
    tabs[0].close()
    deadline = time.monotonic() + DEADLINE
    while True:
        db("INSERT INTO items DEFAULT VALUES")  # The server notices when it writes.
        tab = server.open()
        tab.more()
        if tab.browser.retry == 3000:
            break
        assert time.monotonic() < deadline


def test_streams_do_not_hold_up_the_end(serve: Callable[..., Server]) -> None:
    """At SIGTERM streams end at once, long before the graceful timeout, and so does the server."""
    server = serve("--graceful-timeout=100")
    tabs = [server.open() for _ in range(3)]
    for tab in tabs:
        tab.more()
    server.program.process.terminate()
    for tab in tabs:
        while tab.more():
            pass
    assert server.program.process.wait(DEADLINE) == 0


CLIENTS = 500


@pytest.mark.parametrize("delivery", ["notify", "outbox"])
def test_500_tabs_on_one_process(serve: Callable[..., Server], db: Database, delivery: str) -> None:
    """A gthread worker with as many threads serves them all, and other pages meanwhile.

    With ``-s`` it prints the figures that the documentation states.
    """
    server = serve("--worker-connections=2000", threads=CLIENTS + 8, delivery=delivery)
    server.open().more()
    before = server.memory()
    tabs = [server.open() for _ in range(CLIENTS)]
    for tab in tabs:
        tab.more()
    grown = server.memory() - before
    assert grown < CLIENTS * 2**18
    assert server.get("/") == str(server.worker)
    spreads = []
    for number in range(1, 6):
        db("INSERT INTO items DEFAULT VALUES")
        began = time.monotonic()
        _wait_for_all(tabs)
        spreads.append(time.monotonic() - began)
        for tab in tabs:
            assert tab.wait(number)[-1] == number
    assert server.get("/") == str(server.worker)
    status = Path(f"/proc/{server.worker}/status").read_text()
    threads = int(status.partition("Threads:")[2].split()[0])
    assert threads < CLIENTS + 24
    sys.stdout.write(
        f"\n{CLIENTS} streams ({delivery}): {grown / CLIENTS / 1024:.0f} KiB of memory each,"
        f" {threads} threads, an event has reached all of them after"
        f" {1000 * sorted(spreads)[2]:.0f} ms\n"
    )


def _wait_for_all(tabs: list[Tab]) -> None:
    """Wait until something has arrived for each of them."""
    with selectors.DefaultSelector() as selector:
        for tab in tabs:
            selector.register(tab.connection.sock, selectors.EVENT_READ)
        while selector.get_map():
            arrived = selector.select(DEADLINE)
            assert arrived, f"nothing has come for {len(selector.get_map())}"
            for key, _ in arrived:
                selector.unregister(key.fileobj)


@pytest.fixture
def app(dsn: str) -> Iterator[Flask]:
    """An application whose test client is a server without threads."""
    made = Flask("shop")
    made.config["PGSIGNALS_DSN"] = dsn
    hub = Hub()
    PgSignals(made, watchers=["items"], hub=hub)

    @made.get("/events")
    def events() -> Response:
        return sse("items")

    @made.get("/wrong")
    def wrong() -> Response:
        return sse("itmes")

    @made.get("/position")
    def where() -> str:
        return position("items")

    yield made
    hub.stop()


def test_without_threads_browsers_poll(app: Flask, db: Database) -> None:
    """What is there is sent, and the stream ends; the next connection goes on."""
    client = app.test_client()
    browser = Browser()
    browser.receive(client.get("/events").data)
    hub = app.extensions["pgsignals"].hub
    with hub.stream("items") as events:
        db("INSERT INTO items DEFAULT VALUES")
        db("INSERT INTO items DEFAULT VALUES")
        assert [events.get(DEADLINE).id for _ in range(2)] == [1, 2]
    settle(hub)
    answer = client.get("/events", headers={"Last-Event-ID": browser.last_id})
    assert [data["id"] for _, data in browser.receive(answer.data)] == [1, 2]


@pytest.mark.parametrize("method", ["head", "get"])
def test_a_stream_that_is_not_read_leaves_the_feed(app: Flask, method: str) -> None:
    """An answer that is closed before it is sent counts no longer."""
    response = getattr(app.test_client(), method)("/events", buffered=False)
    response.close()
    assert app.extensions["pgsignals.process"].streams == 0


def test_streams_of_the_same_targets_share_a_feed(app: Flask) -> None:
    """However often it is asked for, what there is to keep is kept once."""
    process = app.extensions["pgsignals.process"]
    with app.test_request_context():
        process.start()
        feeds = {process.feed(["items"]), process.feed(["items"]), process.feed([("items",)])}
        assert len(feeds) == 1
        assert process.feed([("items", "inserted")]) not in feeds


def test_a_hub_that_does_not_run(app: Flask) -> None:
    """Browsers are told to come back; a page with a position cannot be made."""
    app.extensions["pgsignals"].stop(app)
    answer = app.test_client().get("/events")
    assert (answer.status_code, answer.data) == (200, b"retry: 3000\n\n")
    with app.test_request_context(), pytest.raises(pgsignals.StateError, match="not running"):
        position("items")


def test_a_stream_waits_for_the_start_of_another_request(
    app: Flask, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two first requests one starts the Hub, and the other has its stream all the same."""
    hub = app.extensions["pgsignals"].hub
    begun, go = threading.Event(), threading.Event()
    start = hub.start

    def slow_start(*arguments: Any, **options: Any) -> Any:
        begun.set()
        assert go.wait(DEADLINE)
        return start(*arguments, **options)

    monkeypatch.setattr(hub, "start", slow_start)
    answers: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: answers.append(app.test_client().get("/events").data))
        for _ in range(2)
    ]
    threads[0].start()
    assert begun.wait(DEADLINE)
    with monkeypatch.context() as patch:
        asked = threading.Event()
        feed = Process.feed
        patch.setattr(Process, "feed", lambda *given: (asked.set(), feed(*given))[1])
        threads[1].start()
        assert asked.wait(DEADLINE)
        go.set()
        for thread in threads:
            thread.join(DEADLINE)
    assert len(answers) == 2
    for answer in answers:
        assert answer.startswith(b"retry: 3000\nid: ")


@pytest.fixture
def stalling(dsn: str) -> Iterator[tuple[str, Proxy]]:
    """The database through a proxy, and the proxy."""
    given = parse_dsn(dsn)
    with Proxy("127.0.0.1", int(given["port"])) as proxy:
        yield make_dsn(**given | {"host": "127.0.0.1", "port": proxy.port}), proxy


def outbox_app(dsn: str) -> Flask:
    """An application in outbox delivery with a Hub of its own, which is started."""
    app = Flask(__name__)
    app.config.update(PGSIGNALS_DSN=dsn, PGSIGNALS_DELIVERY="outbox")
    signals = PgSignals(app, watchers=["items"], hub=Hub)
    app.add_url_rule("/events", "events", lambda: sse("items"))
    app.add_url_rule("/position", "position", lambda: position("items"))
    signals.start(app)
    return app


def test_a_database_that_does_not_answer(
    dsn: str, stalling: tuple[str, Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who wants a stream of it waits for a while, and the requests for others do not."""
    far, proxy = stalling
    stuck, other = outbox_app(far), outbox_app(dsn)
    try:
        proxy.stall()
        monkeypatch.setattr("pgsignals.contrib.feeds.PATIENCE_SECONDS", 0.01)
        assert stuck.test_client().get("/events").data == b"retry: 3000\n\n"
        monkeypatch.setattr("pgsignals.contrib.feeds.PATIENCE_SECONDS", DEADLINE)
        answers: list[bytes] = []
        waiting = threading.Thread(
            target=lambda: answers.append(stuck.test_client().get("/position").data)
        )
        waiting.start()
        assert other.test_client().get("/position").status_code == 200
        assert not answers
        proxy.resume()
        waiting.join(DEADLINE)
        # Not the same: transactions of others move it.
        assert [len(each) for each in answers] == [len(stuck.test_client().get("/position").data)]
    finally:
        for each in (stuck, other):
            each.extensions["pgsignals"].stop(each)


def test_a_start_that_fails(app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is tried again, which may take long each time, browsers are told to come back."""
    tried, go = threading.Semaphore(0), threading.Event()

    def start(*_: Any, **__: Any) -> Any:
        tried.release()
        if not tried_once:
            tried_once.append(True)
            raise pgsignals.ConnectError("it is away")
        assert go.wait(DEADLINE)
        raise pgsignals.StateError("enough")

    tried_once: list[bool] = []
    before = set(threading.enumerate())
    monkeypatch.setattr(app.extensions["pgsignals"].hub, "start", start)
    client = app.test_client()
    try:
        assert client.get("/events").data == b"retry: 3000\n\n"
        for _ in range(2):
            assert tried.acquire(timeout=DEADLINE)
        monkeypatch.setattr("pgsignals.contrib.flask.extension._START_SECONDS", DEADLINE)
        assert client.get("/events").data == b"retry: 3000\n\n"
    finally:
        go.set()
        # Once nothing is in its way, trying again would start the Hub behind the test.
        process = app.extensions["pgsignals.process"]
        for thread in set(threading.enumerate()) - before:
            while thread.is_alive():
                process._error = None
                thread.join(0.05)


def test_what_no_watcher_delivers(app: Flask) -> None:
    """A stream of it is an error of the application, not a stream that is silent."""
    app.config["PROPAGATE_EXCEPTIONS"] = True
    with pytest.raises(pgsignals.ReceiverError, match="'itmes', which no watcher delivers"):
        app.test_client().get("/wrong")


@pytest.mark.parametrize(
    "options", [{"retry": -1}, {"keepalive": 0}, {"lifetime": 0}, {"send_timeout": 0}]
)
def test_times_that_cannot_be(app: Flask, options: dict[str, Any]) -> None:
    """A time below what makes sense is refused."""
    with app.test_request_context(), pytest.raises(pgsignals.ConfigurationError, match="seconds"):
        sse("items", **options)
