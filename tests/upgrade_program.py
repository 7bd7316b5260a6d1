"""An application that tells its events, and as a program one of a made-up next version.

As a program it takes commands from stdin and answers on stdout, in lines of JSON.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from typing import Any

import msgspec

import pgsignals
from pgsignals.core.payload import Layout
from pgsignals.outbox import schema
from pgsignals.triggers import rows, sql
from pgsignals.triggers.bodies import BODIES

Tell = Callable[[tuple[Any, ...]], None]

# What the next version adds: columns to tables that writers and consumers use, and a table.
NEXT = schema.Upgrade(
    schema.VERSION + 1,
    schema.VERSION,
    (
        "CREATE TABLE pgsignals.next (id bigint PRIMARY KEY)",
        "ALTER TABLE pgsignals.consumers ADD COLUMN next text NOT NULL DEFAULT ''",
    ),
    ("ALTER TABLE pgsignals.outbox ADD COLUMN next text",),
)


class Application:
    """Watches the table ``items``, and tells what it hears: ("event", id) and ("gap", reason)."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._hub = pgsignals.Hub()
        self._held = threading.Event()

    def start(self, dsn: str, hold: int | None = None, **options: Any) -> None:
        """``hold``: the receiver does not return from the event of that id."""
        hub = self._hub = pgsignals.Hub()
        held = self._held = threading.Event()

        @hub.on("items", "inserted")
        def receive(event: pgsignals.Event) -> None:
            if event.id == hold:
                held.wait()
            else:
                self._tell(("event", event.id))

        @hub.on_gap
        def miss(gap: pgsignals.Gap) -> None:
            self._tell(("gap", gap.reason))

        hub.start(dsn, [pgsignals.watch("items", "inserted", extra=["note"])], **options)

    def stop(self) -> None:
        """What is held is given up."""
        self._hub.stop(timeout=0.5 if self._held_back else 30.0)
        self._held.set()

    @property
    def _held_back(self) -> bool:
        return bool(self._hub.running and self._hub.status().depth)


def become_next(strange: bool) -> None:
    """From here on this process has the next version; ``strange``: old ones cannot read it."""
    schema.UPGRADES = (*schema.UPGRADES, NEXT)
    schema.VERSION = NEXT.version
    sql.FORMAT += 1
    rows.FORMAT = sql.FORMAT
    for transport, body in BODIES.items():
        sql.BODIES[transport] = body.replace("BEGIN", "-- of the next version\nBEGIN", 1)  # type: ignore[index]
    if strange:
        decode = Layout.decode
        Layout.encode = lambda self: json.dumps({"next": msgspec.json.encode(self).decode()})  # type: ignore[method-assign]
        Layout.decode = lambda text: decode(json.loads(text).get("next", text))  # type: ignore[method-assign, assignment, misc]


def main() -> None:
    """Obey until stdin ends."""
    lock = threading.Lock()

    def tell(words: tuple[Any, ...]) -> None:
        with lock:
            sys.stdout.write(f"{json.dumps(words)}\n")
            sys.stdout.flush()

    become_next(sys.argv[1:] == ["strange"])
    application = Application(tell)
    for line in sys.stdin:
        command, options = json.loads(line)
        try:
            getattr(application, command)(**options)
        except pgsignals.PgSignalsError as error:
            tell(("failed", str(error)))
        else:
            tell(("done", command))


if __name__ == "__main__":
    main()
