"""A table of the latest orders that redraws itself: python live_page.py [DSN]"""

from __future__ import annotations

import os
import sys
import threading
from contextlib import closing, suppress

import psycopg2

import pgsignals

NEWEST = "SELECT id, customer, total, status FROM orders ORDER BY id DESC LIMIT 20"
CLEAR = "\033[2J\033[H"


class Page:
    """What is on the screen."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        # Batches and Gaps come from different threads.
        self._lock = threading.Lock()

    def draw(self) -> None:
        """Read the newest orders and print them."""
        with self._lock:
            with closing(psycopg2.connect(self._dsn)) as connection, connection.cursor() as cursor:
                cursor.execute(NEWEST)
                rows = cursor.fetchall()
            lines = [f"{'order':>6}  {'customer':<20} {'total':>10}  status"]
            lines += ["{:>6}  {:<20} {:>10}  {}".format(*row) for row in rows]
            start = CLEAR if sys.stdout.isatty() else ""
            print(start + "\n".join(lines), end="\n\n", flush=True)


def main() -> None:
    dsn = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("PGSIGNALS_DSN", "")
    page = Page(dsn)

    @pgsignals.on_batch("orders", every=0.1)
    def changed(batch: pgsignals.Batch) -> None:
        page.draw()

    @pgsignals.on_gap
    def missed(gap: pgsignals.Gap) -> None:
        page.draw()

    orders = pgsignals.watch("orders", "inserted", "updated", "deleted", "truncated")
    with pgsignals.start(dsn, [orders]) as hub, suppress(KeyboardInterrupt):
        page.draw()  # After start: what changes from here on is heard.
        hub.wait()


if __name__ == "__main__":
    main()
