"""The console in a real browser, with a real application that has its troubles."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from pgsignals import Event, Hub, watch
from tests.browser import chromium
from tests.conftest import DEADLINE, Database
from tests.console import console
from tests.waiting import eventually

expect.set_options(timeout=DEADLINE * 1000)

VIEWS = ("health", "consumers", "dead-letters", "watchers", "events", "backfills")
MARKUP = "<img src=x onerror=alert(1)>"


@dataclass
class Shop:
    """An application: its poison receiver takes an order 7 once it is ``mended``."""

    url: str
    db: Database
    mended: threading.Event
    taken: list[Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A running browser."""
    with chromium() as running:
        yield running


@pytest.fixture
def shop(dsn: str, db: Database) -> Iterator[Shop]:
    """Consumers, two of them with a poison receiver, a backfill that goes on, and a broker away."""
    db(f'CREATE TABLE "{MARKUP}" (id text PRIMARY KEY, note text)')
    db("CREATE TABLE orders (id bigint PRIMARY KEY, status text)")
    db("INSERT INTO orders SELECT n, 'old' FROM generate_series(100, 1099) n")
    mended, going, taken = threading.Event(), threading.Event(), list[Any]()
    mailer, auditor, indexer, caches = Hub(), Hub(), Hub(), Hub()

    @mailer.on("orders", "inserted", retries=0)
    def send(event: Event) -> None:
        if event.id == 7 and not mended.is_set():
            raise ValueError(f"no price {MARKUP}")
        taken.append(event.id)

    @indexer.on("orders", "snapshot")
    def index(event: Event) -> None:
        if event.id > 599:
            going.wait()

    @auditor.on(MARKUP, retries=0)
    def audit(event: Event) -> None:
        raise ValueError(MARKUP)

    with ExitStack() as stack:
        mailer.start(
            dsn,
            ["orders"],
            delivery="outbox",
            name="mailer",
            backends={"kafka": "kafka://127.0.0.1:9/?prefix=shop"},
        )
        stack.callback(mailer.stop)
        indexer.start(dsn, ["orders"], delivery="outbox", name="indexer")
        stack.callback(indexer.stop)
        stack.callback(going.set)
        marked = watch(
            f'"{MARKUP}"', "inserted", extra=["note"], when=f"NEW.note <> '{MARKUP}!'", label=MARKUP
        )
        auditor.start(dsn, [marked], delivery="outbox", name=MARKUP, namespace=MARKUP)
        stack.callback(auditor.stop)
        caches.start(dsn, ["orders"], namespace="caches")
        stack.callback(caches.stop)
        indexer.backfill("orders", chunk=100)
        db("INSERT INTO orders VALUES (6, 'new'), (7, 'new')")
        db(f'INSERT INTO "{MARKUP}" VALUES (%s, %s)', (MARKUP, MARKUP))
        eventually(lambda: db("SELECT count(*) FROM pgsignals.dead_letters"), lambda r: r == [(2,)])
        running = stack.enter_context(console(dsn, "--allow-actions", "--show-values"))
        yield Shop(running.url, db, mended, taken)


@pytest.fixture
def open_page(browser: Browser, shop: Shop) -> Iterator[Callable[..., Page]]:
    """Opens pages of the console, which raise no error, ask nobody else, and run no markup."""
    wrong: list[str] = []
    with ExitStack() as stack:

        def make(width: int = 1280, scheme: str = "light") -> Page:
            context = browser.new_context(
                viewport={"width": width, "height": 860},
                color_scheme=scheme,  # type: ignore[arg-type]
                bypass_csp=False,
            )
            stack.callback(context.close)
            page = context.new_page()
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on("dialog", lambda dialog: wrong.append(dialog.message))
            page.on(
                "request",
                lambda asked: None if asked.url.startswith(shop.url) else wrong.append(asked.url),
            )
            page.goto(shop.url)
            expect(page.locator("#live")).to_have_text("Live")
            return page

        yield make
    assert wrong == []


def view(page: Page, name: str) -> None:
    """Go to a view, by its link."""
    page.locator(f'nav a[href="#{name}"]').click()
    expect(page.locator(f"#{name}")).to_be_visible()


def test_each_view_is_filled(shop: Shop, open_page: Callable[..., Page]) -> None:
    """Each view shows what the application has, live, and whatever it holds as text."""
    page = open_page()
    expect(page.locator("#figures")).to_contain_text("Dead letters")
    expect(page.locator("#findings")).to_contain_text("dead letters: 1 of")
    view(page, "consumers")
    expect(page.locator('#t-consumers tr[data-key="mailer"]')).to_contain_text("active")
    backend = page.locator('#t-consumers tr[data-key="mailer/kafka"]')
    expect(backend).to_contain_text("its broker has acknowledged nothing")
    expect(backend.locator("svg.spark path")).to_have_count(2)
    view(page, "watchers")
    expect(page.locator("#t-watchers tbody tr")).to_have_count(7)
    expect(page.locator("#t-watchers")).to_contain_text(f"public.{MARKUP}")
    page.get_by_label("Filter").first.fill("caches")
    expect(page.locator("#t-watchers tbody tr")).to_have_count(3)
    page.get_by_role("button", name="SQL of inserted on orders").click()
    expect(page.locator("#detail pre")).to_contain_text("CREATE TRIGGER")
    page.get_by_role("button", name="Close").click()
    view(page, "backfills")
    expect(page.locator("#t-backfills")).to_contain_text("running")
    expect(page.locator("#t-backfills progress")).to_have_count(1)
    view(page, "events")
    shop.db("UPDATE orders SET status = 'paid' WHERE id = 6")
    rows = page.locator("#t-events tbody tr")
    expect(rows.filter(has_text="updated").filter(has_text="caches")).to_have_count(1)
    page.get_by_role("button", name="Pause").click()
    shop.db("DELETE FROM orders WHERE id = 6")
    expect(page.locator("#events-count")).to_have_text("Paused; new ones are kept.")
    expect(rows.filter(has_text="deleted")).to_have_count(0)
    page.get_by_role("button", name="Go on").click()
    expect(rows.filter(has_text="deleted").filter(has_text="caches")).to_have_count(1)
    page.locator("#events-filter").fill("nothing has this")
    expect(rows).to_have_count(0)
    view(page, "dead-letters")
    expect(page.locator("#t-letters")).to_contain_text(f"ValueError: no price {MARKUP}")
    expect(page.locator("#t-letters")).to_contain_text(f"id {MARKUP}")
    assert page.locator("main img").count() == 0


def test_a_letter_is_retried_by_its_button(shop: Shop, open_page: Callable[..., Page]) -> None:
    """From the cause in its traceback to a retry that arrives; what is dropped has gone."""
    page = open_page()
    view(page, "dead-letters")
    page.get_by_role("button", name="public.orders inserted id 7").click()
    expect(page.locator("#detail pre").first).to_contain_text("in send")
    shop.mended.set()
    page.locator("#detail").get_by_role("button", name="Retry").click()
    expect(page.locator("#told")).to_contain_text("1 dead letter will be delivered again")
    expect(page.locator("#t-letters tbody tr")).to_have_count(1)
    assert 7 in shop.taken
    page.locator("#t-letters input[type=checkbox]").check()
    page.get_by_role("button", name="Drop 1…").click()
    expect(page.locator("#sure")).to_contain_text("Drop 1 dead letter?")
    page.locator("#sure").get_by_role("button", name="Drop").click()
    expect(page.get_by_text("There are no dead letters.")).to_be_visible()
    assert shop.db("SELECT count(*) FROM pgsignals.dead_letters") == [(0,)]


def test_by_keyboard_alone(shop: Shop, open_page: Callable[..., Page]) -> None:
    """Tab, Enter, Space and Escape lead to a letter, choose it, and close what has opened."""
    page = open_page()
    page.locator('nav a[href="#dead-letters"]').focus()
    page.keyboard.press("Enter")
    box = page.locator("#t-letters input[type=checkbox]").first
    expect(box).to_be_visible()
    box.focus()
    page.keyboard.press("Space")
    expect(page.locator("#retry")).to_have_text("Retry 1")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#detail")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#detail")).to_be_hidden()
    # What is told every two seconds leaves the choice and the focus.
    before = page.locator("#t-letters tbody tr").first.locator("td").last.inner_text()
    expect(page.locator("#t-letters tbody tr").first.locator("td").last).not_to_have_text(before)
    expect(box).to_be_checked()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_everybody_can_use_it(
    shop: Shop, open_page: Callable[..., Page], width: int, scheme: str
) -> None:
    """axe finds no violation in any view, by day or by night, and a telephone is wide enough."""
    page = open_page(width, scheme)
    found = {}
    for name in VIEWS:
        view(page, name)
        results = Axe().run(page)
        if results.violations_count:
            found[name] = results.generate_report()
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    view(page, "dead-letters")
    page.get_by_role("button", name="public.orders inserted id 7").click()
    expect(page.locator("#detail pre").first).to_be_visible()
    results = Axe().run(page)
    if results.violations_count:
        found["detail"] = results.generate_report()
    assert found == {}
