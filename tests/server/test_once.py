"""``once``: an event that is delivered again has no second effect."""

from __future__ import annotations

import psycopg2
import pytest

import pgsignals
from tests.conftest import Database, Recorder


@pytest.fixture
def shop(db: Database) -> Database:
    """A database with a table to watch, and one to write to."""
    db("CREATE TABLE items (id bigint PRIMARY KEY)")
    db("CREATE TABLE invoices (item bigint)")
    return db


def test_a_second_delivery(hub: pgsignals.Hub, shop: Database, recorder: Recorder) -> None:
    """A receiver that fails after its effect was committed does not have it twice."""

    @hub.on("items", backoff=0.01)
    def invoice(event: pgsignals.Event) -> None:
        connection = psycopg2.connect(shop.dsn)
        try:
            with connection, connection.cursor() as cursor:
                first = pgsignals.once(event, connection)
                if first:
                    cursor.execute("INSERT INTO invoices VALUES (%s)", (event.id,))
        finally:
            connection.close()
        recorder(first)
        if first:
            raise ValueError("after the effect")

    hub.start(shop.dsn, ["items"], delivery="outbox", name="mailer")
    shop("INSERT INTO items VALUES (1)")
    assert recorder.wait(2) == [True, False]
    assert shop("SELECT item FROM invoices") == [(1,)]


def test_a_rollback(hub: pgsignals.Hub, shop: Database, recorder: Recorder) -> None:
    """What was rolled back with the effect is not recorded; receivers do not share a record."""
    hub.on("items")(recorder)
    hub.start(shop.dsn, ["items"], delivery="outbox", name="mailer")
    shop("INSERT INTO items VALUES (1)")
    [event] = recorder.wait(1)
    connection = psycopg2.connect(shop.dsn)
    try:
        assert pgsignals.once(event, connection, scope="mail")
        connection.rollback()
        assert pgsignals.once(event, connection, scope="mail")
        assert not pgsignals.once(event, connection, scope="mail")
        assert pgsignals.once(event, connection, scope="invoice")
        with pytest.raises(pgsignals.ConfigurationError, match="scope="):
            pgsignals.once(event, connection)
        connection.rollback()
        connection.autocommit = True
        with pytest.raises(pgsignals.StateError, match="commits each statement"):
            pgsignals.once(event, connection, scope="mail")
    finally:
        connection.close()


def test_who_may_not(hub: pgsignals.Hub, shop: Database, recorder: Recorder) -> None:
    """INSERT on its table is all that a role needs, and without it the error has the GRANT."""
    hub.on("items")(recorder)
    hub.start(shop.dsn, ["items"], delivery="outbox", name="mailer")
    shop("INSERT INTO items VALUES (1)")
    [event] = recorder.wait(1)
    shop("CREATE ROLE clerk")
    connection = psycopg2.connect(shop.dsn, options="-c role=clerk")
    try:
        with pytest.raises(pgsignals.PrivilegeError, match=r"GRANT INSERT ON pgsignals\.processed"):
            pgsignals.once(event, connection, scope="mail")
        connection.rollback()
        shop("GRANT USAGE ON SCHEMA pgsignals TO clerk")
        shop("GRANT INSERT ON pgsignals.processed TO clerk")
        assert pgsignals.once(event, connection, scope="mail")
    finally:
        connection.close()
        hub.stop()
        shop("DROP OWNED BY clerk; DROP ROLE clerk")


def test_without_the_schema(hub: pgsignals.Hub, shop: Database, recorder: Recorder) -> None:
    """A database without an outbox is an error that says what to run."""
    hub.on("items")(recorder)
    hub.start(shop.dsn, ["items"])
    shop("INSERT INTO items VALUES (1)")
    [event] = recorder.wait(1)
    connection = psycopg2.connect(shop.dsn)
    try:
        with pytest.raises(pgsignals.DatabaseError, match="delivery outbox"):
            pgsignals.once(event, connection, scope="mail")
    finally:
        connection.close()
