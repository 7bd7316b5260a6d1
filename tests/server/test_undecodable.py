"""Bytes in a table that no client can decode: the event comes, with what can be read of them."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable

import pytest
from psycopg2.sql import SQL, Identifier, Literal

import pgsignals
from pgsignals import Hub, watch
from pgsignals.contrib.resumable import open_feed
from pgsignals.hub.hub import Delivery
from pgsignals.testing import Server
from tests.conftest import DEADLINE, Database, Recorder
from tests.event_source import Browser, Tab
from tests.forked import run
from tests.waiting import eventually

ITEMS = watch("items", extra=["name"])
# A text with a byte at its end that its database's clients cannot have in UTF-8.
ODD = {
    # Damaged, by an extension say: PostgreSQL itself refuses it when it is written.
    "UTF8": "'\\x61ff'::bytea::text",
    "SQL_ASCII": "convert_from('\\x61ff', 'SQL_ASCII')",
    # A character that Unicode does not have: the server cannot convert it.
    "WIN1252": "convert_from('\\x6181', 'WIN1252')",
}
LEGIBLE = "a\N{REPLACEMENT CHARACTER}"


@pytest.fixture(params=ODD)
def encoding(request: pytest.FixtureRequest) -> str:
    """The encoding of the database."""
    return str(request.param)


@pytest.fixture
def shop(each_server: Server, connect: Callable[[str], Database], encoding: str) -> Database:
    """A database of that encoding, with a table and a function that gives such a text."""
    name = f"db_{secrets.token_hex(6)}"
    connect(each_server.dsn())(
        SQL("CREATE DATABASE {} ENCODING {} LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0").format(
            Identifier(name), Literal(encoding)
        )
    )
    db = connect(each_server.dsn(name))
    db("CREATE TABLE items (id int PRIMARY KEY, name text)")
    db("CREATE CAST (bytea AS text) WITHOUT FUNCTION")
    return db


def write_odd(shop: Database, encoding: str, key: int) -> None:
    """Add a row with such a text between two others, in one statement each."""
    shop("INSERT INTO items VALUES (%s, 'before')", (key - 1,))
    shop(f"INSERT INTO items VALUES (%s, {ODD[encoding]})", (key,))
    shop("INSERT INTO items VALUES (%s, 'behind')", (key + 1,))


def names(recorder: Recorder, count: int) -> list[tuple[int, str]]:
    return [(event.id, event.values["name"]) for event in recorder.wait(count)]


def test_the_others_go_on(
    hub: Hub, shop: Database, encoding: str, delivery: Delivery, recorder: Recorder
) -> None:
    """Each event comes once and in order; what cannot be read is replaced in it.

    PostgreSQL itself ends a session that it cannot convert a notification for: that is a Gap.
    """
    gaps = Recorder()
    hub.on_gap(gaps)
    hub.on("items")(recorder)
    hub.start(shop.dsn, [ITEMS], delivery=delivery)
    write_odd(shop, encoding, 2)
    if (encoding, delivery) == ("WIN1252", "notify"):
        gaps.wait(1)
        shop("INSERT INTO items VALUES (4, 'after it')")
        assert recorder.wait_until(lambda event: event.id == 4)
        return
    assert names(recorder, 3) == [(1, "before"), (2, LEGIBLE), (3, "behind")]
    assert gaps.items == []
    assert hub.status().reconnects == 0


def test_a_dead_letter(hub: Hub, shop: Database, encoding: str, recorder: Recorder) -> None:
    """It is kept, shown, and delivered again."""
    refused = Recorder()

    @hub.on("items", retries=0)
    def refuses(event: pgsignals.Event) -> None:
        if event.id == 2 and not event.redelivered:
            refused(event)
            raise ValueError("odd")
        recorder(event)

    hub.start(shop.dsn, [ITEMS], delivery="outbox", name="mailer")
    write_odd(shop, encoding, 2)
    assert names(recorder, 2) == [(1, "before"), (3, "behind")]
    eventually(lambda: shop("SELECT id FROM pgsignals.dead_letters"), lambda rows: len(rows) == 1)
    [(key,)] = shop("SELECT id FROM pgsignals.dead_letters")
    listed = run("dead-letters", "list", "--json", dsn=shop.dsn)
    [letter] = json.loads(listed.out[0])["dead_letters"]
    assert letter["payload"].endswith(f'"{LEGIBLE}"]')
    assert run("dead-letters", "show", str(key), dsn=shop.dsn).code == 0
    assert run("dead-letters", "retry", "--all", dsn=shop.dsn).code == 0
    assert names(recorder, 3)[-1] == (2, LEGIBLE)
    assert recorder.items[-1].uid == refused.items[0].uid


def test_one_that_is_parked(hub: Hub, shop: Database, encoding: str, recorder: Recorder) -> None:
    """The receiver that it was parked for gets it when it can take it."""
    gate, others = threading.Event(), Recorder()

    @hub.on("items")
    def hangs(event: pgsignals.Event) -> None:
        gate.wait(2 * DEADLINE)
        recorder(event)

    hub.on("items")(others)
    hub.start(shop.dsn, [ITEMS], delivery="outbox", name="mailer", workers=2, queue_size=2)
    for key in range(2, 30, 3):
        write_odd(shop, encoding, key)
    others.wait(30)
    parked = "SELECT count(*) FROM pgsignals.parked"
    eventually(lambda: shop(parked), lambda found: found[0][0] > 20)
    gate.set()
    recorder.wait(30)
    assert {event.id: event.values["name"] for event in recorder.items} == {
        key + n: text
        for key in range(2, 30, 3)
        for n, text in enumerate(("before", LEGIBLE, "behind"), -1)
    }


def test_a_backfill(hub: Hub, shop: Database, encoding: str, recorder: Recorder) -> None:
    """It goes through such rows like through others."""
    hub.on("items", "snapshot")(recorder)
    write_odd(shop, encoding, 2)
    hub.start(shop.dsn, [ITEMS], delivery="outbox", name="mailer")
    assert hub.backfill("items", chunk=2).wait(DEADLINE)
    assert names(recorder, 3) == [(1, "before"), (2, LEGIBLE), (3, "behind")]


def test_a_browser_that_comes_back(hub: Hub, shop: Database, encoding: str) -> None:
    """It gets what it has missed."""
    hub.start(shop.dsn, [ITEMS], delivery="outbox")
    feed = open_feed(hub, "items", size=1000, ordered=True)
    tab = Tab(feed, Browser())
    shop("INSERT INTO items VALUES (0, 'first')")
    tab.wait(1)
    tab.client.close()
    write_odd(shop, encoding, 2)
    again = Tab(feed, Browser(last_id=tab.browser.last_id))
    assert again.wait(3) == [1, 2, 3]


def test_a_backfill_behind_a_key_that_is_odd(
    hub: Hub, shop: Database, encoding: str, recorder: Recorder
) -> None:
    """It fails where the server cannot be told the key again, and the consumer goes on."""
    shop("CREATE TABLE words (word text PRIMARY KEY)")
    shop(f"INSERT INTO words VALUES ({ODD[encoding]})")
    hub.on("words")(recorder)
    hub.start(shop.dsn, ["words"], delivery="outbox", name="mailer")
    backfill = hub.backfill("words", chunk=1)
    if encoding == "SQL_ASCII":
        assert backfill.wait(DEADLINE)
    else:
        with pytest.raises(pgsignals.DatabaseError, match="cannot be sent to this database"):
            backfill.wait(DEADLINE)
    shop("INSERT INTO words VALUES ('behind')")
    assert recorder.wait_until(lambda event: event.id == "behind")


def test_a_backfill_by_bytes(
    hub: Hub, each_dsn: str, each_db: Database, recorder: Recorder
) -> None:
    """A key of type "char" goes on behind each of its values, on every version of PostgreSQL."""
    each_db('CREATE TABLE signs (sign "char" PRIMARY KEY)')
    each_db('INSERT INTO signs SELECT n::"char" FROM generate_series(-128, 127) AS n WHERE n <> 0')
    hub.on("signs", "snapshot")(recorder)
    hub.start(each_dsn, ["signs"], delivery="outbox", name="mailer")
    assert hub.backfill("signs", chunk=10).wait(DEADLINE)
    texts = [chr(n) if n < 128 else f"\\{n:o}" for n in range(1, 256)]
    assert [event.id for event in recorder.items] == texts
