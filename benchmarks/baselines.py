"""What we compare with: a row trigger that notifies, and a bare loop that listens to it."""

from __future__ import annotations

import asyncio
import json
import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .harness import connect, execute

# The way of EctoWatch, and of nearly every tutorial: one JSON for each row.
ROW_TRIGGER = """
    CREATE FUNCTION notify_row() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE
      payload text;
    BEGIN
      payload := jsonb_build_object(
        'type', 'inserted', 'values', jsonb_build_object('id', NEW.id))::text;
      PERFORM pg_notify('orders_inserted', payload);
      RETURN NEW;
    END $$;
    CREATE TRIGGER notify_row AFTER INSERT ON orders
      FOR EACH ROW EXECUTE FUNCTION notify_row()
"""


@contextmanager
def select_loop(dsn: str, receiver: Callable[[Any], object]) -> Iterator[None]:
    """Listens as psycopg2's documentation shows it, and calls ``receiver`` with each JSON."""
    connection = connect(dsn)
    execute(connection, "LISTEN orders_inserted")
    ended, end = socket.socketpair()

    def listen() -> None:
        sockets = [connection.fileno(), ended.fileno()]
        while ended.fileno() not in select.select(sockets, [], [])[0]:
            connection.poll()
            while connection.notifies:
                receiver(json.loads(connection.notifies.pop(0).payload))

    thread = threading.Thread(target=listen, name="select-loop")
    thread.start()
    try:
        yield
    finally:
        end.close()
        thread.join()
        ended.close()
        connection.close()


@contextmanager
def psycopg_notifies(dsn: str, receiver: Callable[[Any], object]) -> Iterator[None]:
    """psycopg 3's generator of notifications, as its documentation shows it."""
    import psycopg

    connection = psycopg.connect(dsn, autocommit=True)
    connection.execute("LISTEN orders_inserted")
    stopping = threading.Event()

    def listen() -> None:
        # The generator ends only by its timeout; one that ends soon might lose what comes between.
        for notify in connection.notifies():
            if stopping.is_set():
                return
            receiver(json.loads(notify.payload))

    thread = threading.Thread(target=listen, name="psycopg-notifies")
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        with psycopg.connect(dsn, autocommit=True) as other:
            other.execute("NOTIFY orders_inserted")
        thread.join()
        connection.close()


@contextmanager
def asyncpg_listener(dsn: str, receiver: Callable[[Any], object]) -> Iterator[None]:
    """asyncpg's ``add_listener``, with an event loop of its own."""
    import asyncpg

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="asyncpg-listener")
    thread.start()

    async def begin() -> Any:
        connection = await asyncpg.connect(dsn)
        await connection.add_listener(
            "orders_inserted", lambda _connection, _pid, _channel, text: receiver(json.loads(text))
        )
        return connection

    connection = asyncio.run_coroutine_threadsafe(begin(), loop).result()
    try:
        yield
    finally:
        asyncio.run_coroutine_threadsafe(connection.close(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
