"""What we compare with: a row trigger that notifies, and a bare loop that listens to it."""

from __future__ import annotations

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
