"""Users by id, kept in memory until PostgreSQL says that they changed: python cache.py [DSN]"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from typing import Any

import psycopg2

import pgsignals


class Cache:
    """Keeps what ``load`` returns until it is told to forget."""

    def __init__(self, load: Callable[[int], Any]) -> None:
        self._load = load
        self._lock = threading.Lock()
        self._records: dict[int, Any] = {}
        self._loading: dict[int, object] = {}
        self._connected = False

    def get(self, user_id: int) -> tuple[Any, bool]:
        """The record, and whether it was kept."""
        with self._lock:
            if user_id in self._records:
                return self._records[user_id], True
            mark = self._loading[user_id] = object()
        record = self._load(user_id)
        with self._lock:
            # Whoever forgets the record meanwhile takes the mark away: it may be the old one.
            if self._loading.get(user_id) is mark:
                del self._loading[user_id]
                if self._connected:
                    self._records[user_id] = record
        return record, False

    def forget(self, user_id: int) -> None:
        """The record has changed."""
        with self._lock:
            self._records.pop(user_id, None)
            self._loading.pop(user_id, None)

    def connect(self) -> None:
        """From now on we are told of changes. What was kept earlier may be wrong."""
        with self._lock:
            self._connected = True
            self._records.clear()
            self._loading.clear()

    def disconnect(self) -> None:
        """From now on we are not told of changes."""
        with self._lock:
            self._connected = False
            self._records.clear()
            self._loading.clear()


def main() -> None:
    dsn = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("PGSIGNALS_DSN", "")

    def load(user_id: int) -> Any:
        with closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT name, email FROM users WHERE id = %s", (user_id,))
            return cursor.fetchone()

    cache = Cache(load)

    @pgsignals.on("users", "updated", "deleted", "inserted")
    def changed(event: pgsignals.Event) -> None:
        for user_id in {event.id, event.old.get("id", event.id)}:
            cache.forget(user_id)
            print(f"forgot {user_id}", flush=True)

    @pgsignals.on("users", "truncated")
    def emptied(event: pgsignals.Event) -> None:
        cache.connect()
        print("forgot all: the table was truncated", flush=True)

    @pgsignals.on_gap
    def missed(gap: pgsignals.Gap) -> None:
        cache.connect()
        print(f"forgot all: {gap.reason}", flush=True)

    @pgsignals.disconnected.connect
    def disconnected(hub: pgsignals.Hub, error: BaseException) -> None:
        cache.disconnect()

    users = pgsignals.watch("users", "inserted", "updated", "deleted", "truncated")
    with pgsignals.start(dsn, [users]), suppress(KeyboardInterrupt):
        cache.connect()
        print("ids of users, please; Ctrl-C ends", flush=True)
        for line in sys.stdin:
            record, kept = cache.get(int(line))
            print("hit" if kept else "miss", record, flush=True)


if __name__ == "__main__":
    main()
