"""The live example in real browsers: they show what the database holds, whoever changes it."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser import chromium
from tests.conftest import DEADLINE, Database
from tests.paths import ROOT

expect.set_options(timeout=DEADLINE * 1000)


class Site:
    """The example, served as its README says."""

    def __init__(self, dsn: str, delivery: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        self._variables = {"PGSIGNALS_DSN": dsn, "FLASK_PGSIGNALS_DELIVERY": delivery}
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Serve, at the same address as before."""
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "flask", "--app", "examples/live_orders/app.py"),
                *("run", "--port", str(self.port)),
            ],
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **self._variables},
        )
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if "Running on" in line:
                return
        pytest.fail("it does not serve")

    def stop(self) -> None:
        """End it at once, as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


@pytest.fixture
def delivery() -> str:
    """How the example delivers, unless a test says otherwise."""
    return "notify"


@pytest.fixture
def site(dsn: str, db: Database, delivery: str) -> Iterator[Site]:
    """The example, on the tables of the examples."""
    db((ROOT / "examples/schema.sql").read_text())
    db(
        "INSERT INTO orders (customer, total, status) VALUES ('Grace Hopper', 129.90, 'shipped'),"
        " ('Alan Turing', 64, 'new')"
    )
    made = Site(dsn, delivery)
    made.start()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A running browser."""
    with chromium() as running:
        yield running


@pytest.fixture
def pages(browser: Browser, site: Site) -> Iterator[list[Page]]:
    """Two browsers, each with its own profile, that show the page, and raise no error."""
    contexts = [browser.new_context() for _ in range(2)]
    opened = [context.new_page() for context in contexts]
    errors: list[str] = []
    for page in opened:
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(site.url)
        expect(page.locator("#state")).to_have_text("Live")
    yield opened
    for context in contexts:
        context.close()
    assert errors == []


def rows(page: Page) -> list[list[str]]:
    """What the page shows: number, customer, status and total of each order."""
    return [
        [re.sub(r"\s+", " ", row.locator(f".{name}").first.inner_text()) for name in _COLUMNS]
        for row in page.locator("tbody tr").all()
    ]


_COLUMNS = ("id", "customer", "status", "number")


def truth(db: Database) -> list[list[str]]:
    """What it should show."""
    return [
        [f"#{number}", customer, status.capitalize(), f"€{total:,.2f}"]
        for number, customer, status, total in db(
            "SELECT id, customer, status, total FROM orders ORDER BY id DESC LIMIT 50"
        )
    ]


def test_both_pages_change(pages: list[Page], db: Database) -> None:
    """An insert, an update, a delete and a TRUNCATE by SQL are on both pages, and are marked."""
    db("INSERT INTO orders (customer, total) VALUES ('<b>Ada</b> & Co', 18.40)")
    for page in pages:
        expect(page.locator('tr[data-key="3"].added .customer')).to_have_text("<b>Ada</b> & Co")
    db("UPDATE orders SET status = 'paid', total = 70 WHERE id = 2")
    for page in pages:
        expect(page.locator('tr[data-key="2"].changed .badge')).to_have_text("Paid")
        expect(page.locator('dd[data-key="revenue"]')).to_have_text("€218.30")
        # A row that did not change was left alone.
        expect(page.locator('tr[data-key="1"].changed, tr[data-key="1"].added')).to_have_count(0)
    db("DELETE FROM orders WHERE id = 1")
    for page in pages:
        expect(page.locator('tr[data-key="1"]')).to_have_count(0)
        assert rows(page) == truth(db)
    db("TRUNCATE orders")
    for page in pages:
        expect(page.get_by_text("No orders yet")).to_be_visible()
        expect(page.locator('dd[data-key="total"]')).to_have_text("0")


def test_what_one_does_the_other_sees(pages: list[Page], db: Database) -> None:
    """Buttons only write to the database; what is shown comes from its events."""
    one, other = pages
    one.get_by_label("Customer").fill("Radia Perlman")
    one.get_by_label("Total").fill("96")
    one.get_by_role("button", name="Place order").click()
    expect(other.locator('tr[data-key="3"] .customer')).to_have_text("Radia Perlman")
    other.get_by_role("button", name="Mark paid").first.click()
    for page in pages:
        expect(page.locator('tr[data-key="3"] .badge')).to_have_text("Paid")
    assert db("SELECT customer, total, status FROM orders WHERE id = 3")[0][2] == "paid"


@pytest.mark.parametrize("delivery", ["notify", "outbox"])
def test_a_page_recovers_from_a_restart(pages: list[Page], site: Site, db: Database) -> None:
    """While the server is down the page says so; once it is back it shows what has happened."""
    site.stop()
    for page in pages:
        expect(page.locator("#state")).to_have_text("Reconnecting")
    db("DELETE FROM orders WHERE id = 1")
    db("UPDATE orders SET status = 'cancelled' WHERE id = 2")
    db("INSERT INTO orders (customer, total) VALUES ('Barbara Liskov', 42.50)")
    site.start()
    for page in pages:
        expect(page.locator("#state")).to_have_text("Live")
        expect(page.locator('tr[data-key="3"]')).to_be_visible()
        assert rows(page) == truth(db)
    db("UPDATE orders SET status = 'shipped' WHERE id = 3")
    for page in pages:
        expect(page.locator('tr[data-key="3"] .badge')).to_have_text("Shipped")


@pytest.mark.parametrize("delivery", ["outbox"])
def test_a_browser_gets_what_it_has_missed(pages: list[Page], site: Site, db: Database) -> None:
    """In outbox delivery, EventSource itself comes back with its id, and each event comes once."""
    for page in pages:
        page.evaluate(
            "() => { window.told = []; const source = new EventSource('/events');"
            "const hear = (e) => window.told.push(e.type + ' ' + e.data);"
            "source.onmessage = hear; source.addEventListener('gap', hear);"
            "return new Promise((done) => { source.onopen = done; }); }"
        )
    db("UPDATE orders SET status = 'paid' WHERE id = 2")
    for page in pages:
        page.wait_for_function("window.told.length == 1")
    site.stop()
    db("DELETE FROM orders WHERE id = 1")
    db("INSERT INTO orders (customer, total) VALUES ('Barbara Liskov', 42.50)")
    site.start()
    for page in pages:
        page.wait_for_function("window.told.length >= 3")
    db("UPDATE orders SET status = 'shipped' WHERE id = 3")
    for page in pages:
        page.wait_for_function("window.told.length >= 4")
        told = [each.partition(" ") for each in page.evaluate("window.told")]
        assert [kind for kind, _, _ in told] == ["message"] * 4
        events = [json.loads(data) for _, _, data in told]
        assert [(each["op"], each["id"]) for each in events] == [
            ("updated", 2),
            ("deleted", 1),
            ("inserted", 3),
            ("updated", 3),
        ]


def test_a_burst_costs_few_requests(pages: list[Page], db: Database) -> None:
    """A thousand changes are shown by a few fetches, and the page ends with the truth."""
    fetched: list[str] = []
    pages[0].on("request", lambda request: fetched.append(request.url))
    db(
        "INSERT INTO orders (customer, total)"
        " SELECT 'Bulk ' || n, n FROM generate_series(1, 1000) n"
    )
    db("INSERT INTO orders (customer, total) VALUES ('The last', 1)")
    for page in pages:
        expect(page.locator(".customer").first).to_have_text("The last")
        expect(page.locator('dd[data-key="total"]')).to_have_text("1,003")
        assert rows(page) == truth(db)
    assert len(fetched) < 100


def test_nothing_is_fetched_from_elsewhere(browser: Browser, site: Site, db: Database) -> None:
    """The page needs no other host, and fits a telephone's width, whatever it shows."""
    db(
        "INSERT INTO orders (customer, total)"
        " SELECT repeat('Long name ', 8), 99999999.99 FROM generate_series(1, 200)"
    )
    context = browser.new_context(viewport={"width": 360, "height": 740})
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(site.url)
    expect(page.locator("#state")).to_have_text("Live")
    assert asked
    assert [url for url in asked if not url.startswith((site.url, "data:"))] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    expect(page.locator(".more")).to_have_text("The newest 50 of 202 orders")
    db("DELETE FROM orders WHERE id > 50")
    expect(page.locator(".more")).to_be_hidden()
    context.close()
