"""Outbox delivery: what is kept for one receiver reaches it, whatever happens meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from psycopg2.extensions import parse_dsn

import pgsignals
from pgsignals.dispatch import held_events
from pgsignals.outbox.housekeeping import tidy
from tests.conftest import DEADLINE, Database, Recorder
from tests.grants import installer as installer
from tests.hanging import Next, hanging, in_order, start, until_none_parked, until_parked, write
from tests.hanging import again as again
from tests.hanging import gate as gate
from tests.hanging import others as others
from tests.hanging import park as park
from tests.hanging import shop as shop
from tests.table_changes import now
from tests.waiting import eventually

CUT = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
)


def test_a_call_that_outlives_its_connection(
    hub: pgsignals.Hub, shop: Database, gate: threading.Event, others: Recorder, recorder: Recorder
) -> None:
    """Once it returns, what is kept for its receiver since is still kept, and brought back."""
    first, calls = threading.Event(), Recorder()

    @hub.on("items")
    def hangs(event: pgsignals.Event) -> None:
        calls(event)
        (first if len(calls.items) == 1 else gate).wait(2 * DEADLINE)
        recorder((event.id, event.values["n"]))

    hub.on("items")(others)
    start(hub, shop)
    shop("INSERT INTO items VALUES (1)")
    calls.wait(1)
    eventually(lambda: hub.status().aside, bool)
    shop(CUT)
    others.wait(2)
    write(shop, 8)
    until_parked(hub, shop, 90)
    first.set()
    recorder.wait(1)
    write(shop, 8, first=8)
    until_parked(hub, shop, 170)
    gate.set()
    recorder.wait(171)
    until_none_parked(shop)


def test_nothing_comes_later(
    hub: pgsignals.Hub, park: Callable[..., None], again: Callable[..., Next]
) -> None:
    """A receiver that comes after the start gets what is kept for it, without a further event."""
    park()
    hub.stop(0.2)
    taken = again(late=True).taken
    taken.wait(90)
    assert in_order(taken)


def test_the_next_process_has_one_worker(
    hub: pgsignals.Hub, shop: Database, park: Callable[..., None], again: Callable[..., Next]
) -> None:
    """What is kept comes before anything later there, too."""
    park()
    hub.stop(0.2)
    write(shop, 2, first=8)
    taken = again(workers=1).taken
    taken.wait(110)
    assert in_order(taken)
    assert len(taken.items) == 110
    until_none_parked(shop)
    write(shop, 1, first=10)
    taken.wait(120)
    assert in_order(taken)


def test_what_cannot_be_read_for_a_while(
    hub: pgsignals.Hub,
    shop: Database,
    gate: threading.Event,
    others: Recorder,
    recorder: Recorder,
    installer: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is brought back once a trigger that could not be made is there."""
    monkeypatch.setattr(held_events, "PATIENCE_SECONDS", 0.1)
    role = parse_dsn(installer)["user"]
    shop(f"GRANT SELECT, TRIGGER ON items TO {role}")
    hanging(hub, gate, others, recorder)
    hub.start(
        installer,
        [pgsignals.watch("items", extra=["n"])],
        delivery="outbox",
        name="mailer",
        workers=4,
        listen_dsn=shop.dsn,
        heartbeat=0.2,
    )
    shop("INSERT INTO items VALUES (1), (2)")
    until_parked(hub, shop, 2)
    shop(f"REVOKE TRIGGER ON items FROM {role}")
    shop("ALTER TABLE items ALTER n DROP DEFAULT; ALTER TABLE items ALTER n TYPE text USING n")
    eventually(lambda: caplog.text.count("cannot be read any more"), lambda count: count >= 2)
    gate.set()
    shop(f"GRANT TRIGGER ON items TO {role}")
    taken = recorder.wait_until(lambda _: {key for key, _ in recorder.items} == {1, 2})
    assert {n for _, n in taken} == {0}
    until_none_parked(shop)


def test_the_gap_of_what_was_kept_for_too_long(
    hub: pgsignals.Hub, shop: Database, gate: threading.Event, others: Recorder
) -> None:
    """It begins when the first of it was written, not when that was parked."""
    gaps = Recorder()
    hub.on_gap(gaps)
    hanging(hub, gate, others, Recorder())
    start(hub, shop, lease=1.0)
    write(shop, 8)
    written_at = now(shop)
    until_parked(hub, shop, 90)
    shop("UPDATE pgsignals.parked SET at = at + interval '1 hour'")
    shop("UPDATE pgsignals.settings SET retention_bytes = 0")
    with shop.connection.cursor() as cursor:
        tidy(cursor)
    [gap] = gaps.wait(1)
    assert gap.since <= written_at <= gap.until
