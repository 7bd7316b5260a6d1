"""The pages on Flask and on server-sent events: each block of them is run, in a browser too."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from flask import Flask, g
from playwright.sync_api import expect
from werkzeug.serving import make_server

import pgsignals
from pgsignals.contrib.flask import PgSignals
from tests.browser import chromium
from tests.conftest import DEADLINE, Database, Recorder
from tests.event_source import Browser
from tests.paths import ROOT
from tests.waiting import settle

DOCS = ROOT / "docs"

expect.set_options(timeout=DEADLINE * 1000)


def blocks(page: str, language: str) -> list[str]:
    """The blocks of a page."""
    text = (DOCS / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def run(block: str, dsn: str, **names: Any) -> dict[str, Any]:
    """What a block defines, for a database of the test's and with a Hub of its own."""
    block = block.replace("postgresql://localhost/shop", dsn)
    names["__name__"] = __name__
    exec(block.replace("PgSignals(", "PgSignals(hub=pgsignals.Hub(), "), names)
    return names


@pytest.fixture
def shop(db: Database) -> Database:
    """A database with the table of the pages."""
    db("CREATE TABLE orders (id serial PRIMARY KEY, customer_id int DEFAULT 7)")
    return db


@pytest.fixture
def started() -> Iterator[list[PgSignals]]:
    """Extensions whose Hubs are stopped at the end."""
    found: list[PgSignals] = []
    yield found
    for signals in found:
        signals.hub.stop()


def test_flask(dsn: str, shop: Database, started: list[PgSignals], recorder: Recorder) -> None:
    """The application calls its receiver, is healthy, and streams, started as gunicorn does."""
    application, hook, *_ = blocks("flask.md", "python")
    names = run(application, dsn, print=lambda *words: recorder(words))
    started.append(names["signals"])
    app = names["create_app"]()
    run(hook, dsn)["post_worker_init"](SimpleNamespace(wsgi=app))
    client = app.test_client()
    assert client.get("/health/ready").status_code == 200
    browser = Browser()
    browser.receive(client.get("/events").data)
    shop("INSERT INTO orders DEFAULT VALUES")
    shop("UPDATE orders SET customer_id = 8")
    assert recorder.wait(1) == [("changed:", 1)]
    settle(names["signals"].hub)
    answer = client.get("/events", headers={"Last-Event-ID": browser.last_id})
    assert [data["op"] for _, data in browser.receive(answer.data)] == ["inserted", "updated"]


@pytest.fixture
def served(dsn: str, shop: Database, started: list[PgSignals]) -> Iterator[tuple[Flask, str]]:
    """The application of the page on server-sent events, and its address."""
    names = run(blocks("sse.md", "python")[0], dsn)
    started.append(names["signals"])
    app: Flask = names["create_app"]()

    @app.get("/")
    def page() -> str:
        [script] = blocks("sse.md", "js")
        return (
            "<p id=count>0</p><script>function refresh() {"
            "const shown = document.getElementById('count');"
            f"shown.textContent = Number(shown.textContent) + 1; }}\n{script}</script>"
        )

    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield app, f"http://127.0.0.1:{server.port}/"
    app.extensions["pgsignals.process"].end_streams()
    server.shutdown()
    thread.join(DEADLINE)
    server.server_close()


def test_three_lines(served: tuple[Flask, str], shop: Database) -> None:
    """The page's lines refresh in a real browser: once it is connected, and at each change."""
    _, url = served
    with chromium() as browser:
        page = browser.new_page()
        page.goto(url)
        shown = page.locator("#count")
        expect(shown).to_have_text("1")
        shop("INSERT INTO orders DEFAULT VALUES")
        expect(shown).to_have_text("2")
        page.close()


def test_a_position_and_a_filter(dsn: str, served: tuple[Flask, str]) -> None:
    """A page with a position, and a stream that is one customer's."""
    app, _ = served
    _, page, filtered = blocks("sse.md", "python")
    with app.app_context():
        app.extensions["pgsignals"].start(app)
    with app.test_request_context():
        found = re.search(r'EventSource\("/events\?last-event-id=(.*)"\)', run(page, dsn)["page"]())
        assert found is not None
        assert found[1] == app.extensions["pgsignals.process"].feed(["orders"]).position
        g.user = SimpleNamespace(id=7)
        response = run(filtered, dsn)["events"]()
        assert response.headers["Content-Type"].startswith("text/event-stream")
        response.close()


def test_keeping_for_longer(dsn: str, shop: Database, hub: pgsignals.Hub) -> None:
    """The setting of the page is one, in each of the durable deliveries."""
    hub.start(dsn, ["orders"], delivery="outbox")
    found = re.findall(r"^  (UPDATE pgsignals.*;)$", (DOCS / "sse.md").read_text(), re.M)
    [statement] = {*found}
    shop(statement)
    assert shop("SELECT keep_seconds FROM pgsignals.settings") == [(600,)]
