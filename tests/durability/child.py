"""A consumer: pgsignals in a process of its own, which notes what it gets, and may be told to die.

``python -m tests.durability.child '{"dsn": …}'``; the keys are those of `Orders`.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pgsignals
from pgsignals.consumers.consumer_store import ConsumerStore
from pgsignals.outbox import housekeeping
from pgsignals.outbox.log import OutboxLog
from pgsignals.outbox.reader import WindowReader
from pgsignals.plugins.loader import load_plugins
from pgsignals.sources.handover import Handover
from pgsignals.wal import reader as wal_reader
from pgsignals.wal import slots
from pgsignals.wal.log import WalLog
from pgsignals.wal.reader import WalReader
from pgsignals.wal.stream import ReplicationStream

from ..hub_parts import knowledge
from .ledger import Pen
from .mutants import MUTANTS

# Where a child can be told to die by SIGKILL.
FAILPOINTS = (
    "after the claim",
    "after a look",
    "after read",
    "before a receiver",
    "after a receiver",
    "before acknowledge",
    "after acknowledge",
    "before emptying",
    "before the commit of emptying",
    "after emptying",
)
# Those of a consumer of the write-ahead log.
WAL_FAILPOINTS = (
    *(each for each in FAILPOINTS if "emptying" not in each),
    "after the slot is made",
    "after the feedback",
)

# Those of a consumer that goes from one delivery to another.
MOVE_FAILPOINTS = ("while a move ends", "before a move", "after a move")

# Those of a process that passes events on to a broker.
RELAY_FAILPOINTS = ("before publish", "after publish", "after flush")

TABLE = "public.records"


@dataclass(frozen=True)
class Orders:
    """What a child is told. ``countdown``: at which passing of the failpoint it dies.

    ``pace`` is how many seconds a receiver takes.
    """

    dsn: str
    listen_dsn: str
    ledger: str
    consumer: str
    partitions: int
    workers: int
    lease: float
    patience: float
    heartbeat: float
    failpoint: str = ""
    countdown: int = 1
    mutant: str = ""
    flaky: float = 0.0
    backend: str = ""
    pace: float = 0.0
    delivery: str = "outbox"


class _Failpoint:
    """Counts how often it is passed, and ends the process as a crash does."""

    def __init__(self, orders: Orders, pen: Pen) -> None:
        self._name = orders.failpoint
        self._left = orders.countdown
        self._pen = pen
        self._lock = threading.Lock()

    def pass_by(self, name: str) -> None:
        if name != self._name:
            return
        with self._lock:
            self._left -= 1
            if self._left == 0:
                self._pen.remark("dies", name)
                os.kill(os.getpid(), signal.SIGKILL)
                # Delivered by the kernel before the call returns, but let nothing happen after it.
                signal.pause()


class _Cursor:
    """A cursor that passes a failpoint before it commits."""

    def __init__(self, cursor: Any, commits: Callable[[], None]) -> None:
        self._cursor = cursor
        self._commits = commits

    def execute(self, statement: Any, parameters: Any = None) -> None:
        if statement == "COMMIT":
            self._commits()
        self._cursor.execute(statement, parameters)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cursor, name)


def _wrap(owner: Any, name: str, before: Callable[..., None], after: Callable[..., None]) -> None:
    wrapped = getattr(owner, name)

    @functools.wraps(wrapped)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        before(*args, **kwargs)
        result = wrapped(*args, **kwargs)
        after(result)
        return result

    setattr(owner, name, wrapper)


def _nothing(*args: Any, **kwargs: Any) -> None: ...


def _plant(pen: Pen, failpoint: _Failpoint) -> None:
    """Put the failpoints in, and make housekeeping busy."""

    def if_any(name: str) -> Callable[[Any], None]:
        return lambda found: failpoint.pass_by(name) if found else None

    def acknowledging(
        store: Any, claim: Any, position: Any, count: int, *_: Any, **__: Any
    ) -> None:
        # One that only renews the lease is not worth dying for.
        state.worth = count > 0
        if state.worth:
            failpoint.pass_by("before acknowledge")

    def acknowledged(_: Any) -> None:
        if state.worth:
            failpoint.pass_by("after acknowledge")

    state = threading.local()
    _wrap(ConsumerStore, "claim", _nothing, if_any("after the claim"))
    _wrap(OutboxLog, "_look", _nothing, if_any("after a look"))
    _wrap(WindowReader, "read", _nothing, if_any("after read"))
    _wrap(WalLog, "_look", _nothing, if_any("after a look"))
    _wrap(WalReader, "read", _nothing, if_any("after read"))
    _wrap(slots, "create", _nothing, if_any("after the slot is made"))
    _wrap(ReplicationStream, "beat", _nothing, lambda _: failpoint.pass_by("after the feedback"))
    # So that positions lie within transactions, too.
    wal_reader.PAGE_CHANGES = 2
    _wrap(ConsumerStore, "acknowledge", acknowledging, acknowledged)

    def ending(handover: Any, poll: Any) -> Any:
        found = limit(handover, poll)
        if handover.ending:
            failpoint.pass_by("while a move ends")
        return found

    limit, Handover.limit = Handover.limit, ending  # type: ignore[method-assign]
    _wrap(
        ConsumerStore,
        "hand_over",
        lambda *_: failpoint.pass_by("before a move"),
        if_any("after a move"),
    )

    empty = housekeeping._empty

    def emptying(cursor: Any, segment: Any, *rest: Any, **options: Any) -> Any:
        failpoint.pass_by("before emptying")
        dying = _Cursor(cursor, lambda: failpoint.pass_by("before the commit of emptying"))
        done = empty(dying, segment, *rest, **options)
        if done is not None:
            pen.remark("emptied", str(segment.number))
            failpoint.pass_by("after emptying")
        return done

    housekeeping._empty = emptying
    housekeeping.EVERY_SECONDS = 0.3
    housekeeping.tidy = functools.partial(
        housekeeping.tidy, segment_bytes=64 << 10, segment_seconds=1.0
    )


def _plant_in_broadcaster(backend: str, failpoint: _Failpoint) -> None:
    kind = type(load_plugins().broadcaster(backend))
    _wrap(
        kind,
        "publish",
        lambda *_: failpoint.pass_by("before publish"),
        lambda _: failpoint.pass_by("after publish"),
    )
    _wrap(kind, "flush", _nothing, lambda done: failpoint.pass_by("after flush") if done else None)


def _tell(*_: Any) -> None:
    """Log what the source knows, for who wonders why it delivers nothing."""
    for line in knowledge(pgsignals.default_hub):
        logging.warning("%s", line)


def main() -> None:
    """Consume until SIGTERM."""
    signal.signal(signal.SIGUSR1, _tell)
    orders = Orders(**json.loads(sys.argv[1]))
    logging.basicConfig(format="%(asctime)s %(process)d %(levelname)s %(message)s", level="INFO")
    pen = Pen(Path(orders.ledger), orders.consumer)
    failpoint = _Failpoint(orders, pen)
    _plant(pen, failpoint)
    if orders.backend:
        _plant_in_broadcaster(orders.backend, failpoint)
    if orders.mutant:
        MUTANTS[orders.mutant]()
    chance = random.Random()

    @pgsignals.on(TABLE, "inserted", retries=20, backoff=0.01)
    @pgsignals.on(TABLE, "updated", retries=20, backoff=0.01)
    def receive(event: pgsignals.Event) -> None:
        if chance.random() < orders.flaky:
            pen.remark("raises")
            raise RuntimeError("now and then a receiver raises")
        failpoint.pass_by("before a receiver")
        if orders.pace:
            time.sleep(orders.pace)  # Slow by order: events wait while the campaign goes on.
        pen.deliver(
            event.id, event.values["n"], event.values["nonce"], event.uid, event.redelivered
        )
        failpoint.pass_by("after a receiver")

    @pgsignals.on_gap
    def note(gap: pgsignals.Gap) -> None:
        pen.announce(gap.since, gap.until, f"{gap.reason}: {gap.detail}")

    ends = threading.Event()
    former = signal.signal(signal.SIGTERM, lambda *_: ends.set())
    while not ends.is_set():
        try:
            pgsignals.start(
                orders.dsn,
                [
                    pgsignals.watch(TABLE, "inserted", extra=["n", "nonce"]),
                    pgsignals.watch(TABLE, "updated", columns=["n"], extra=["n", "nonce"]),
                ],
                delivery=orders.delivery,
                name=orders.consumer,
                partitions=orders.partitions,
                workers=orders.workers,
                lease=orders.lease,
                listen_dsn=orders.listen_dsn,
                heartbeat=orders.heartbeat,
                heartbeat_timeout=orders.patience,
                backends=[orders.backend] if orders.backend else (),
            )
            break
        except pgsignals.DatabaseError as error:
            logging.warning("cannot start yet: %s", error)
            ends.wait(0.2)
    signal.signal(signal.SIGTERM, former)
    if not ends.is_set():
        drained = pgsignals.run(timeout=5)
        pen.remark("ends", "drained" if drained else "not drained")


if __name__ == "__main__":
    main()
