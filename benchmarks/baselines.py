"""What we compare with: what one would write by hand, and the listeners of other libraries."""

from __future__ import annotations

import asyncio
import json
import queue
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

# An outbox written by hand: the events in a table, in the order of a sequence.
OUTBOX = """
    CREATE TABLE events (id bigserial PRIMARY KEY, payload jsonb NOT NULL);
    CREATE FUNCTION keep_row() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
      INSERT INTO events (payload) VALUES (jsonb_build_object(
        'type', 'inserted', 'values', jsonb_build_object('id', NEW.id)));
      RETURN NEW;
    END $$;
    CREATE TRIGGER keep_row AFTER INSERT ON orders
      FOR EACH ROW EXECUTE FUNCTION keep_row()
"""
_POLL_SECONDS = 0.01
_POLL_ROWS = 1_000


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
def select_loop_with_worker(dsn: str, receiver: Callable[[Any], object]) -> Iterator[None]:
    """The same loop, which hands what it has decoded to a second thread, as ours does."""
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def work() -> None:
        while (item := waiting.get()) is not None:
            receiver(item)

    worker = threading.Thread(target=work, name="select-loop-worker")
    worker.start()
    try:
        with select_loop(dsn, waiting.put):
            yield
    finally:
        waiting.put(None)
        worker.join()


@contextmanager
def polled_outbox(dsn: str, receiver: Callable[[Any], object]) -> Iterator[None]:
    """Reads the outbox written by hand from the last id on: it misses whoever commits late."""
    connection = connect(dsn)
    ended = threading.Event()

    def poll() -> None:
        last = 0
        with connection.cursor() as cursor:
            while True:
                # What is committed by then is read before it ends.
                ending = ended.is_set()
                cursor.execute(
                    "SELECT id, payload FROM events WHERE id > %s ORDER BY id LIMIT %s",
                    (last, _POLL_ROWS),
                )
                rows = cursor.fetchall()
                for last, payload in rows:  # noqa: B007
                    receiver(payload)
                if not rows and (ending or ended.wait(_POLL_SECONDS)) and ending:
                    return

    thread = threading.Thread(target=poll, name="polled-outbox")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
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
