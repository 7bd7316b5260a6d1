"""Server-sent events by Starlette and FastAPI, from a real uvicorn, and the example."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import psycopg2
import pytest
import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from psycopg2.extensions import make_dsn, parse_dsn
from starlette.concurrency import run_in_threadpool

import pgsignals
from pgsignals import ConfigurationError, Event, Hub, ReceiverError, StateError
from pgsignals.contrib.starlette import _feeds, aposition, position, sse
from tests.commands import Program
from tests.conftest import DEADLINE, Database
from tests.paths import ROOT
from tests.proxy import Proxy
from tests.waiting import eventually

EXAMPLE = ROOT / "examples" / "fastapi_live"


@pytest.fixture(autouse=True)
def items(db: Database) -> None:
    """A table to write to."""
    db("CREATE TABLE items (id bigserial PRIMARY KEY, owner int)")


class Site:
    """An application that uvicorn serves in a thread of this process."""

    def __init__(self, dsn: str, hub: Hub, **options: Any) -> None:
        self.hub = hub
        self.errors: list[BaseException] = []
        self.sessions = 0

        @asynccontextmanager
        async def lifespan(app: FastAPI) -> Any:
            async with hub.start(dsn, [pgsignals.watch("items", extra=["owner"])]):
                yield

        app = FastAPI(lifespan=lifespan)

        @app.get("/events")
        async def events(request: Request) -> Response:
            return sse(request, "items", hub=hub, **options)

        @app.get("/mine/{owner}")
        def mine(request: Request, owner: int) -> Response:
            def visible(event: Event) -> bool:
                return event.values["owner"] == owner

            return sse(
                request,
                ("items", "inserted"),
                hub=hub,
                visible=visible,
                data=lambda event: f"item\n{event.id}",
                name=lambda event: "new",
                keepalive=0.05,
            )

        @app.get("/with-a-session")
        async def with_a_session(
            request: Request,
            _: None = Depends(self._session, scope="function"),
        ) -> Response:
            return sse(request, "items", hub=hub, **options)

        @app.get("/position")
        async def where() -> str:
            return position("items", hub=hub, size=options.get("size", 1000))

        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on"))
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        eventually(lambda: self._server.started, bool)

    async def _session(self) -> AsyncIterator[None]:
        """Stand for a session of SQLAlchemy, which takes a connection of its pool."""
        self.sessions += 1
        yield
        self.sessions -= 1

    def _run(self) -> None:
        asyncio.run(self._server.serve(sockets=[self._listener]))

    @property
    def clients(self) -> int:
        """How many browsers are connected."""
        return sum(feed.clients for feed in _feeds.get(self.hub, {}).values())

    def close(self) -> None:
        """Tell the server to end, and its streams as a signal would."""
        self._server.should_exit = True
        for feed in _feeds.get(self.hub, {}).values():
            feed.close()
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive()


@pytest.fixture
def serve(dsn: str, hub: Hub) -> Iterator[Callable[..., Site]]:
    """Serves the application until the end."""
    started: list[Site] = []

    def start(**options: Any) -> Site:
        started.append(Site(dsn, hub, **options))
        return started[-1]

    yield start
    for site in started:
        site.close()


class Browser:
    """An EventSource: it connects, and reads message by message."""

    def __init__(self, url: str, last_id: str | None = None) -> None:
        headers = {} if last_id is None else {"Last-Event-ID": last_id}
        self._client = httpx.Client(timeout=DEADLINE)
        self._request = self._client.stream("GET", url, headers=headers)
        self.response = self._request.__enter__()
        self._lines = self.response.iter_lines()
        self.opening = self.message()

    def message(self) -> dict[str, str]:
        """The fields of the next message, comments as the field without a name."""
        found: dict[str, str] = {}
        for line in self._lines:
            if not line:
                return found
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            found[name] = f"{found[name]}\n{value}" if name in found else value
        raise EOFError

    def close(self) -> None:
        self._request.__exit__(None, None, None)
        self._client.close()

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def test_a_browser_is_told(serve: Callable[..., Site], db: Database) -> None:
    """A stream begins at once; each event is a message with an id that names the record."""
    site = serve()
    with Browser(f"{site.url}/events") as browser:
        assert browser.response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert browser.response.headers["cache-control"] == "no-store, no-transform"
        assert browser.opening["retry"] == "3000"
        db("INSERT INTO items (owner) VALUES (7)")
        message = browser.message()
        told = json.loads(message["data"])
        assert (told["op"], told["table"], told["id"]) == ("inserted", "items", 1)
        assert "owner" not in message["data"]
        assert message["id"]


def test_a_session_is_closed_before_the_stream(serve: Callable[..., Site], db: Database) -> None:
    """With the scope that the documentation shows, a stream holds nothing of its dependencies."""
    site = serve()
    with Browser(f"{site.url}/with-a-session") as browser:
        db("INSERT INTO items (owner) VALUES (7)")
        assert browser.message()["data"]
        assert site.sessions == 0


def test_views_and_keepalives(serve: Callable[..., Site], db: Database) -> None:
    """What is not visible is not told, and the id moves on with the keepalives all the same."""
    site = serve()
    with Browser(f"{site.url}/mine/7") as browser:
        db("INSERT INTO items (owner) VALUES (1), (7)")
        while "data" not in (message := browser.message()):
            pass
        assert (message["event"], message["data"]) == ("new", "item\n2")
        assert browser.message() == {"": ""}
        db("INSERT INTO items (owner) VALUES (1)")
        while "id" not in (message := browser.message()):
            assert message == {"": ""}
        assert "data" not in message


def test_resuming(serve: Callable[..., Site], db: Database) -> None:
    """A browser goes on after its last id, by header or parameter, and is told of a gap if not."""
    site = serve(size=5)
    at = httpx.get(f"{site.url}/position").json()
    db("INSERT INTO items SELECT n, 7 FROM generate_series(1, 3) n")
    with Browser(f"{site.url}/events?last-event-id={at}") as browser:
        messages = [browser.message() for _ in range(3)]
        assert [json.loads(message["data"])["id"] for message in messages] == [1, 2, 3]
    with Browser(f"{site.url}/events", messages[1]["id"]) as browser:
        assert json.loads(browser.message()["data"])["id"] == 3
        db("INSERT INTO items SELECT n, 7 FROM generate_series(4, 6) n")
        assert json.loads(browser.message()["data"])["id"] == 4
    db("INSERT INTO items SELECT n, 7 FROM generate_series(7, 9) n")
    eventually(lambda: httpx.get(f"{site.url}/position").json(), lambda now: now.endswith(".9"))
    with Browser(f"{site.url}/events", messages[1]["id"]) as browser:
        gap = browser.message()
        assert (gap["event"], json.loads(gap["data"])) == ("gap", {"reason": "unknown_id"})
        assert gap["id"]


@pytest.mark.parametrize("delivery", ["outbox", "wal"])
def test_a_server_that_is_killed(dsn: str, db: Database, delivery: str) -> None:
    """In durable delivery what was missed comes once, late commits too, and the filter holds."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/events/7"

    def started() -> Program:
        server = Program(
            *("-m", "uvicorn", "tests.starlette_shop:app", "--port", str(port)),
            dsn=dsn,
            SHOP_DELIVERY=delivery,
        )
        while "running on" not in server.err():
            pass
        return server

    def number(browser: Browser) -> int:
        while "data" not in (message := browser.message()):
            pass
        assert "event" not in message, message
        last_ids.append(message["id"])
        return int(json.loads(message["data"])["id"])

    last_ids: list[str] = []
    slow = psycopg2.connect(dsn)
    server = started()
    try:
        with Browser(url) as browser:
            slow.cursor().execute("INSERT INTO items VALUES (1, 7), (2, 8)")
            db("INSERT INTO items VALUES (3, 7)")
            assert number(browser) == 3
            server.process.kill()
        server.end()
        slow.commit()
        db("INSERT INTO items VALUES (4, 8), (5, 7)")
        server = started()
        with Browser(url, last_ids[-1]) as browser:
            assert [number(browser), number(browser)] == [1, 5]
            db("INSERT INTO items VALUES (6, 7)")
            assert number(browser) == 6
        with Browser(url, f"A{last_ids[-1]}") as browser:
            gap = browser.message()
            assert (gap["event"], json.loads(gap["data"])) == ("gap", {"reason": "unknown_id"})
    finally:
        slow.close()
        server.process.kill()
        server.process.wait(DEADLINE)


def test_a_browser_that_goes_is_noticed(serve: Callable[..., Site]) -> None:
    """A stream ends when its browser goes, long before the next keepalive."""
    site = serve(keepalive=3600.0)
    browsers = [Browser(f"{site.url}/events") for _ in range(3)]
    assert site.clients == 3
    for browser in browsers:
        browser.close()
    eventually(lambda: site.clients, lambda count: count == 0)


def test_a_browser_that_stops_reading(serve: Callable[..., Site], db: Database) -> None:
    """It holds nobody up, is given up after send_timeout, and the feed keeps what it keeps."""
    site = serve(size=100, send_timeout=0.5)
    with socket.create_connection(("127.0.0.1", site.port)) as stuck:
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stuck.sendall(b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n")
        eventually(lambda: site.clients, lambda count: count == 1)
        with Browser(f"{site.url}/events") as browser:
            latest = 0
            deadline = time.monotonic() + 2 * DEADLINE
            while site.clients == 2:
                assert time.monotonic() < deadline
                db("INSERT INTO items (owner) SELECT 7 FROM generate_series(1, 100)")
                latest += 100
                while "data" not in (message := browser.message()) or (
                    json.loads(message["data"]).get("id") != latest
                ):
                    pass
        [feed] = _feeds[site.hub].values()
        assert len(feed._ring.entries) == 100


SCOPE = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": []}


class Visit:
    """A browser without a network: it takes what is sent, until it goes."""

    def __init__(self, hub: Hub, **options: Any) -> None:
        self.taken: list[bytes] = []
        self._gone, self._more = asyncio.Event(), asyncio.Event()
        self.response = sse(Request(SCOPE, self._receive), "items", hub=hub, **options)
        self.task = asyncio.ensure_future(self.response(SCOPE, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.taken.append(message.get("body", b""))
        self._more.set()

    async def until(self, text: bytes) -> None:
        """Take what comes until it has the text."""
        while text not in b"".join(self.taken):
            self._more.clear()
            await self._more.wait()

    async def leave(self) -> None:
        """Go, and wait for the end of the stream."""
        self._gone.set()
        await self.task


def test_a_browser_that_goes_while_something_is_sent(dsn: str, hub: Hub) -> None:
    """Its stream ends, in whichever turn of the event loop the two meet."""
    hub.start(dsn, ["items"])

    async def main() -> None:
        for turns in range(12):
            gone = asyncio.Event()

            async def receive(gone: asyncio.Event = gone) -> dict[str, Any]:
                await gone.wait()
                return {"type": "http.disconnect"}

            async def send(message: Any, gone: asyncio.Event = gone, turns: int = turns) -> None:
                if message.get("body"):
                    gone.set()
                    # Turns of the loop, of which each number is tried.
                    for _ in range(turns):
                        await asyncio.sleep(0)

            await sse(Request(SCOPE, receive), "items", hub=hub)(SCOPE, receive, send)

    asyncio.run(asyncio.wait_for(main(), DEADLINE))


@pytest.fixture
def stalling(dsn: str) -> Iterator[tuple[str, Proxy]]:
    """The database through a proxy, and the proxy."""
    given = parse_dsn(dsn)
    with Proxy("127.0.0.1", int(given["port"])) as proxy:
        yield make_dsn(**given | {"host": "127.0.0.1", "port": proxy.port}), proxy


def test_a_database_that_does_not_answer(
    stalling: tuple[str, Proxy], hub: Hub, db: Database
) -> None:
    """Streams and positions begin when it does, and the event loop goes on meanwhile."""
    dsn, proxy = stalling
    hub.start(dsn, ["items"], delivery="outbox")

    async def main() -> None:
        proxy.stall()
        visit = Visit(hub)
        with pytest.raises(StateError, match="cannot be read now"):
            position("items", hub=hub)
        place = asyncio.ensure_future(aposition("items", hub=hub))
        # Neither the loop nor the threads of the application wait for them.
        assert await run_in_threadpool(lambda: 1) == 1
        assert not visit.taken
        assert not place.done()
        proxy.resume()
        at = await place
        await visit.until(b"id: ")
        assert position("items", hub=hub) == at
        db("INSERT INTO items (owner) VALUES (7)")
        await visit.until(b"inserted")
        await visit.leave()

    asyncio.run(asyncio.wait_for(main(), DEADLINE))


def test_an_outbox_that_cannot_be_read(
    stalling: tuple[str, Proxy], hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A browser is told to come back, with a status that it survives."""
    dsn, proxy = stalling
    hub.start(dsn, ["items"], delivery="outbox")

    async def main() -> None:
        proxy.refuse()
        proxy.cut()
        visit = Visit(hub)
        await visit.task
        assert visit.taken == [b"", b"retry: 15000\n\n"]
        proxy.accept()
        with pytest.raises(ReceiverError, match="'itmes', which no watcher delivers"):
            await aposition("itmes", hub=hub)
        assert await aposition("items", hub=hub)

    asyncio.run(asyncio.wait_for(main(), DEADLINE))


def test_streams_that_wait_hold_up_nobody_else(dsn: str, hub: Hub, db: Database) -> None:
    """However many wait inside ``visible``, the threads of the application are free."""
    hub.start(dsn, ["items"])
    go, waiting = threading.Event(), threading.Semaphore(0)

    def visible(event: Event) -> bool:
        waiting.release()
        return go.wait(DEADLINE)

    async def main() -> None:
        visits = [Visit(hub, visible=visible) for _ in range(50)]
        for visit in visits:
            await visit.until(b"id: ")
        db("INSERT INTO items (owner) VALUES (7)")
        for _ in range(40):
            assert await asyncio.to_thread(waiting.acquire, timeout=DEADLINE)
        try:
            assert await run_in_threadpool(lambda: 1) == 1
        finally:
            go.set()
        for visit in visits:
            await visit.until(b"inserted")
            await visit.leave()

    asyncio.run(asyncio.wait_for(main(), DEADLINE))


def test_streams_end_after_their_lifetime(serve: Callable[..., Site]) -> None:
    """A stream ends by itself, so that the browser is authorised again."""
    site = serve(lifetime=1.0)
    began = time.monotonic()
    with Browser(f"{site.url}/events") as browser:
        assert browser.message() == {"": ""}
        with pytest.raises(EOFError):
            browser.message()
        assert time.monotonic() - began >= 1.0


def test_without_a_running_hub(dsn: str) -> None:
    """A browser is told to come back, with a status that an EventSource survives."""
    app, hub = FastAPI(), Hub()

    @app.get("/events")
    async def events(request: Request) -> Response:
        return sse(request, "items", hub=hub)

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get("/events")

    response = asyncio.run(ask())
    assert (response.status_code, response.text) == (200, "retry: 15000\n\n")


def test_options_are_checked() -> None:
    """Times that cannot be are refused."""
    request = Request({"type": "http", "headers": [], "query_string": b""})
    with pytest.raises(ConfigurationError, match="keepalive=0"):
        sse(request, "items", keepalive=0)


def test_starlette_is_named_when_it_is_missing() -> None:
    """Without Starlette the import says which extra to install."""
    program = "import sys; sys.modules['starlette.concurrency'] = None; import pgsignals.contrib.starlette"  # noqa: E501
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "pip install 'pgsignals[starlette]'" in done.stderr


def test_the_example(dsn: str, db: Database) -> None:
    """The page, its stream and the coroutine function of the example, and a clean end."""
    readme = (EXAMPLE / "README.md").read_text()
    [statement] = re.findall(r'^psql "\$PGSIGNALS_DSN" -c "(.*)"$', readme, re.MULTILINE)
    db((EXAMPLE.parent / "schema.sql").read_text())
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    server = Program("-m", "uvicorn", "main:app", "--port", str(port), dsn=dsn, cwd=EXAMPLE)
    url = f"http://127.0.0.1:{port}"
    try:
        while "running on" not in server.err():
            pass
        page = httpx.get(url).text
        [source] = re.findall(r'new EventSource\("(.*)"\)', page)
        db(statement)
        with Browser(f"{url}{source}") as browser:
            assert json.loads(browser.message()["data"])["op"] == "inserted"
            assert "<td>Ann</td><td>12.50</td><td>new</td>" in httpx.get(f"{url}/orders").text
            while "Ann has ordered for 12.50" not in (line := server.err()):
                assert "ERROR" not in line
            # The stream is open, and the server waits for it.
            server.process.send_signal(signal.SIGINT)
            with pytest.raises(EOFError):
                browser.message()
        result = server.end()
        assert not [line for line in result.err if "ERROR" in line or "Traceback" in line]
    finally:
        server.process.kill()
        server.process.wait(DEADLINE)
