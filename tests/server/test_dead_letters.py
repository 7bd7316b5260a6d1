"""A dead letter has the row of its own record alone, and is delivered from it as it was."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable
from typing import Any

import pytest
from psycopg2.sql import SQL, Identifier, Literal

from pgsignals import Event, Hub, watch
from pgsignals.testing import Server
from tests.conftest import Database, Recorder
from tests.inside import run
from tests.waiting import eventually

ITEMS = watch("items", "inserted", "updated", "deleted", extra=["name"])


@pytest.fixture
def shop(each_db: Database) -> Database:
    """A database with a table."""
    each_db("CREATE TABLE items (id bigint, part text, name text, PRIMARY KEY (id, part))")
    return each_db


class Poison:
    """A receiver that cannot take some events, until it can."""

    def __init__(self, *ids: int) -> None:
        self.poisonous = set(ids)
        self.refused, self.taken = Recorder(), Recorder()

    def __call__(self, event: Event) -> None:
        if event.key["id"] in self.poisonous:
            self.refused(event)
            raise ValueError(f"poison {event.key['id']}")
        self.taken(event)


def said(event: Event) -> dict[str, Any]:
    """All that an event says, but that it has come before."""
    names = ("op", "id", "key", "values", "old", "changed", "uid", "txid", "at", "context")
    return {name: getattr(event, name) for name in names}


def letters(db: Database, count: int) -> list[str]:
    """The payloads of all dead letters, once there are so many."""
    query = "SELECT payload FROM pgsignals.dead_letters ORDER BY id"
    return [text for (text,) in eventually(lambda: db(query), lambda rows: len(rows) == count)]


@pytest.mark.parametrize("workers", [1, 3])
def test_a_letter_has_its_own_row_alone(hub: Hub, shop: Database, workers: int) -> None:
    """Of a statement of many rows; and shows it, and is delivered again with all that it said."""
    poison = Poison(7, 1007)
    hub.subscribe(poison, "items", retries=0)
    hub.start(shop.dsn, [ITEMS], delivery="outbox", name="mailer", workers=workers)
    shop("INSERT INTO items SELECT n, 'a', 'name of ' || n FROM generate_series(1, 100) AS n")
    shop("UPDATE items SET name = 'secret of ' || id")
    shop("UPDATE items SET id = id + 1000, name = E'line\\nof\\t' || id")
    shop("DELETE FROM items")
    refused = poison.refused.wait(4)
    assert [event.op for event in refused] == ["inserted", "updated", "updated", "deleted"]
    payloads = letters(shop, 4)
    for payload in payloads:
        assert payload.count("\n") == 1
        assert not re.search(r"of(\\t| )(6|8)", payload)
    listed = run("dead-letters", "list", "--json", dsn=shop.dsn)
    found = json.loads(listed.out[0])["dead_letters"]
    assert [each["payload"] for each in found] == payloads
    for each, event in zip(found, refused, strict=True):
        assert each["uid"] == event.uid
        shown = run("dead-letters", "show", str(each["id"]), dsn=shop.dsn)
        assert shown.out[1:3] == each["payload"].split("\n")
        assert not re.search(r"of(\\t| )(6|8)", "\n".join(shown.out))
    assert len(poison.taken.wait(396)) == 396
    poison.poisonous.clear()
    assert run("dead-letters", "retry", "--all", dsn=shop.dsn).code == 0
    again = poison.taken.wait(400)[396:]
    assert all(event.redelivered for event in again)
    key: Callable[[Event], str] = lambda event: event.uid  # noqa: E731
    assert [said(event) for event in sorted(again, key=key)] == [
        said(event) for event in sorted(refused, key=key)
    ]
    letters(shop, 0)


def test_a_letter_of_a_long_row(hub: Hub, shop: Database) -> None:
    """A row that is longer than a page, and what stands around it, keep apart as well."""
    poison = Poison(2)
    hub.subscribe(poison, "items", retries=0)
    hub.start(shop.dsn, [ITEMS], delivery="outbox", name="mailer")
    shop(
        "INSERT INTO items SELECT n, 'a', repeat(n::text, 20000 * (n % 3))"
        " FROM generate_series(0, 5) AS n"
    )
    [refused] = poison.refused.wait(1)
    [payload] = letters(shop, 1)
    assert payload.count("\n") == 1
    assert "55555" not in payload
    poison.poisonous.clear()
    run("dead-letters", "retry", "--all", dsn=shop.dsn)
    again = poison.taken.wait(6)[-1]
    assert said(again) == said(refused)
    assert again.values["name"] == "2" * 40000


def test_a_letter_that_comes_back_is_kept_again(hub: Hub, shop: Database) -> None:
    """With its one row, and the same uid, as often as its receiver refuses it."""
    poison = Poison(2)
    hub.subscribe(poison, "items", retries=0)
    hub.start(shop.dsn, [ITEMS], delivery="outbox", name="mailer")
    shop("INSERT INTO items SELECT n, 'a', 'name' FROM generate_series(1, 3) AS n")
    [payload] = letters(shop, 1)
    for tries in (2, 3):
        run("dead-letters", "retry", "--all", dsn=shop.dsn)
        poison.refused.wait(tries)
        eventually(
            lambda: shop("SELECT attempts, payload FROM pgsignals.dead_letters"),
            lambda rows, tries=tries: rows == [(tries, payload)],  # type: ignore[misc]
        )
    assert len({event.uid for event in poison.refused.items}) == 1


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1", "EUC_JP"])
def test_an_error_that_the_database_cannot_spell(
    hub: Hub, each_server: Server, connect: Callable[[str], Database], encoding: str
) -> None:
    """It is kept as far as it can be, and nothing behind it waits."""
    name = f"db_{secrets.token_hex(6)}"
    connect(each_server.dsn())(
        SQL("CREATE DATABASE {} ENCODING {} LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0").format(
            Identifier(name), Literal(encoding)
        )
    )
    db = connect(each_server.dsn(name))
    db("CREATE TABLE items (id bigint PRIMARY KEY, name text)")
    taken = Recorder()

    @hub.on("items", retries=0)
    def größe(event: Event) -> None:
        if event.id == 1 and not event.redelivered:
            raise ValueError("日本 é \N{GRINNING FACE} \udce9")
        taken(event.id)

    hub.start(db.dsn, [watch("items", extra=["name"])], delivery="outbox", name="mailer")
    db("INSERT INTO items VALUES (1, 'a'), (2, 'b')")
    assert taken.wait(1) == [2]
    [payload] = letters(db, 1)
    assert payload.endswith('"a"]')
    db("INSERT INTO items VALUES (3, 'c')")
    assert taken.wait(2) == [2, 3]
    eventually(hub.status, lambda status: not status.unacknowledged)
    assert hub.status().reconnects == 0
    db.connection.set_client_encoding("UTF8")
    [(error,)] = db("SELECT error FROM pgsignals.dead_letters")
    assert error.startswith("ValueError: ")
    assert ("日本" in error) == (encoding == "SQL_ASCII")
    if encoding == "SQL_ASCII":
        assert run("dead-letters", "retry", "--all", dsn=db.dsn).code == 0
        assert taken.wait(3)[-1] == 1


def test_what_is_shown_moves_no_cursor(hub: Hub, shop: Database) -> None:
    """What a row or an error holds is shown by its escapes."""

    @hub.on("items", retries=0)
    def raises(event: Event) -> None:
        raise ValueError("\x1b[2J \x9b2J")

    hub.start(shop.dsn, [ITEMS], delivery="outbox", name="mailer")
    shop("INSERT INTO items VALUES (1, 'a', E'\\u009b2J')")
    letters(shop, 1)
    [(key,)] = shop("SELECT id FROM pgsignals.dead_letters")
    for command in (["list"], ["show", str(key)]):
        shown = "\n".join(run("dead-letters", *command, dsn=shop.dsn).out)
        assert "\x1b" not in shown
        assert "\x9b" not in shown
        assert "x1b[2J" in shown
