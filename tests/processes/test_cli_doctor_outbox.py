"""``pgsignals doctor`` on a database with an outbox: each thing that it finds, and the fix."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

import pytest

from pgsignals import Hub
from pgsignals.outbox.inspection import ConsumerState, OutboxState
from pgsignals.outbox.retention_settings import Retention
from pgsignals.outbox.schema import RETENTION_BYTES, RETENTION_SECONDS
from pgsignals.overview.checks import Finding
from pgsignals.overview.checks.outbox import _consumers, examine_outbox
from tests.conftest import Database
from tests.forked import examined
from tests.grants import documented_grants


@pytest.fixture(autouse=True)
def mailer(dsn: str, db: Database) -> None:
    """A consumer that is down, and an event that it has not read."""
    db("CREATE TABLE orders (id bigint PRIMARY KEY)")
    Hub().start(dsn, ["orders"], delivery="outbox", name="mailer").stop()


def found(db: Database, held_seconds: float = 60.0) -> dict[str, Finding]:
    """What the checks find, by check."""
    with db.connection.cursor() as cursor:
        return {each.check: each for each in examine_outbox(cursor, held_seconds)}


def levels(db: Database) -> dict[str, str]:
    """Only how bad each is."""
    return {check: each.level for check, each in found(db).items()}


def age(db: Database, seconds: float) -> None:
    """Make what is in the outbox that old."""
    db(
        "UPDATE pgsignals.outbox SET payload = regexp_replace(payload, '\"t\":\\d+', '\"t\":' ||"
        " (extract(epoch FROM now() - %s * interval '1 s') * 1e6)::bigint)",
        [seconds],
    )


def test_nothing_to_mend(dsn: str, db: Database) -> None:
    """A consumer that is down and misses nothing is no finding; each check is there."""
    code, checks = examined(dsn=dsn)
    assert code == 0
    assert {name: each["level"] for name, each in checks.items() if each["level"] != "ok"} == {}
    assert {
        "outbox",
        "outbox privileges",
        "trigger rights",
        "consumers",
        "dead letters",
        "partitions",
    } <= set(checks)


def test_the_triggers_of_each_delivery(dsn: str) -> None:
    """Watchers are judged by the triggers of the delivery that is given."""
    levels = {
        delivery: examined("orders", "--delivery", delivery, dsn=dsn)[1]["triggers"]["level"]
        for delivery in ("notify", "outbox")
    }
    assert levels == {"notify": "fail", "outbox": "ok"}


def test_without_an_outbox_nothing_is_said(db: Database) -> None:
    """Where there is no outbox there is no check of it."""
    db("DROP SCHEMA pgsignals CASCADE")
    assert found(db) == {}


@pytest.mark.parametrize(
    ("comment", "message"),
    [
        ("pgsignals: durable delivery, version 99, for programs from 98 on", "newer pgsignals"),
        ("pgsignals: durable delivery, version 1", "pgsignals uninstall --schema"),
        ("somebody else's", "did not make"),
    ],
)
def test_a_schema_that_does_not_fit(dsn: str, db: Database, comment: str, message: str) -> None:
    """A schema that is too new, too old or not ours fails, and says what to do."""
    db(f"COMMENT ON SCHEMA pgsignals IS $${comment}$$")
    code, checks = examined(dsn=dsn)
    assert (code, checks["outbox"]["level"]) == (1, "fail")
    assert message in checks["outbox"]["message"] + checks["outbox"]["fix"]


def test_a_schema_that_is_older(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A schema that has not been upgraded fails, and nothing else is looked at."""
    monkeypatch.setattr("pgsignals.outbox.schema.VERSION", 99)
    [finding] = found(db).values()
    assert finding.level == "fail"
    assert "pgsignals install --delivery outbox" in finding.fix


@pytest.mark.parametrize(("seconds", "level"), [(1, "warn"), (40 * 3600, "fail")])
def test_a_consumer_that_is_down(dsn: str, db: Database, seconds: float, level: str) -> None:
    """Unread events of a consumer without a process are told, and fail when half is over."""
    db("INSERT INTO orders SELECT generate_series(1, 3)")
    age(db, seconds)
    _, checks = examined(dsn=dsn)
    assert checks["consumers"]["level"] == level
    assert (
        "'mailer' is behind, and no process reads for it: 3 events"
        in checks["consumers"]["message"]
    )
    assert "pgsignals consumers drop" in checks["consumers"]["fix"]


@pytest.mark.parametrize(
    ("seconds", "level"), [(59.0, "ok"), (61.0, "warn"), (50.0 * 3600, "fail")]
)
def test_a_consumer_that_does_not_keep_up(seconds: float, level: str) -> None:
    """A consumer at work that is a minute behind is told, with another fix than to start it."""
    at = datetime.now(timezone.utc)
    part = ConsumerState(
        name="mailer",
        part=0,
        parts=1,
        ephemeral=False,
        active=True,
        holder="me",
        lag=7,
        lag_seconds=seconds,
        oldest_at=at,
        oldest="1-1",
        lost_until=None,
        acknowledged=0,
        acknowledged_at=at,
        dead_letters=0,
    )
    outbox = OutboxState(bytes=1, partitions=1, shed=0, consumers=(part,))
    found, _, fix = _consumers(outbox, Retention(RETENTION_SECONDS, RETENTION_BYTES))
    assert found == level
    assert ("workers or partitions" in fix) == (level != "ok")


def test_a_consumer_that_has_lost_events(db: Database) -> None:
    """What was dropped before a consumer had read it fails until that has been told by a Gap."""
    db("UPDATE pgsignals.consumers SET lost_until = '2026-01-02 03:04:05Z'")
    finding = found(db)["consumers"]
    assert finding.level == "fail"
    assert "'mailer' was so late that events up to 2026-01-02 03:04Z" in finding.message


def test_dead_letters(dsn: str, db: Database) -> None:
    """Dead letters are a warning that counts them by consumer."""
    db(
        "INSERT INTO pgsignals.dead_letters (consumer, receiver, uid, channel, number, payload,"
        " error, traceback, attempts) SELECT 'mailer', 'f', n::text, 1, 0, '', '', '', 1"
        " FROM generate_series(1, 3) n"
    )
    code, checks = examined(dsn=dsn)
    assert (code, checks["dead letters"]["level"]) == (0, "warn")
    assert checks["dead letters"]["message"] == "3 of 'mailer'"
    assert "dead-letters retry" in checks["dead letters"]["fix"]


@pytest.mark.parametrize(("share", "level"), [(0.4, "ok"), (0.6, "warn"), (0.95, "fail")])
def test_an_outbox_near_its_cap(dsn: str, db: Database, share: float, level: str) -> None:
    """From half of what it may have on it is told, from nine tenths on it fails."""
    [(size,)] = db(
        "SELECT sum(pg_total_relation_size('pgsignals.outbox_' || n)) FROM generate_series(0, 7) n"
    )
    db("UPDATE pgsignals.settings SET retention_bytes = %s", [int(float(size) / share)])
    assert found(db)["outbox"].level == level


def test_a_full_outbox(dsn: str, db: Database) -> None:
    """That writers leave events out fails."""
    db("SELECT setval('pgsignals.outbox_full', 1)")
    code, checks = examined(dsn=dsn)
    assert (code, checks["outbox"]["level"]) == (1, "fail")
    assert "events are left out" in checks["outbox"]["message"]


def test_partitions_that_a_transaction_holds(db: Database, connect: Any, dsn: str) -> None:
    """A transaction in the way of emptying a partition is named; the current one is not emptied."""
    old = connect(dsn)
    old("BEGIN; INSERT INTO orders VALUES (1)")
    assert found(db, held_seconds=0.0)["partitions"].level == "ok"
    db("SELECT setval('pgsignals.outbox_segment', 1)")
    finding = found(db, held_seconds=0.0)["partitions"]
    assert finding.level == "warn"
    assert f"pid {old.connection.info.backend_pid} " in finding.message
    assert "holds outbox_0" in finding.message
    assert found(db)["partitions"].level == "ok"
    old("ROLLBACK")
    assert found(db, held_seconds=0.0)["partitions"].level == "ok"


@pytest.fixture
def role(db: Database) -> Iterator[str]:
    """A role without a right."""
    name = f"stranger_{db.connection.info.dbname}"
    db(f"CREATE ROLE {name} LOGIN")
    yield name
    db(f"REASSIGN OWNED BY {name} TO postgres; DROP OWNED BY {name}; DROP ROLE {name}")


def test_a_superuser_s_rights_that_are_lent(db: Database, role: str) -> None:
    """A table that has gone over to another role, under a superuser's triggers, is named."""
    assert found(db)["trigger rights"].level == "ok"
    db(f"ALTER TABLE orders OWNER TO {role}")
    finding = found(db)["trigger rights"]
    assert finding.level == "warn"
    assert f"public.orders, of '{role}', those of 'postgres'" in finding.message


def test_the_grants_that_a_role_lacks(dsn: str, db: Database, role: str) -> None:
    """The statements that it prints are what a consumer lacks, as the documentation has it."""
    as_role = dsn.replace("postgres@", f"{role}@")
    code, checks = examined(dsn=as_role)
    assert (code, checks["outbox privileges"]["level"]) == (0, "warn")
    assert "consumers" not in checks
    fix = checks["outbox privileges"]["fix"]
    assert f'GRANT USAGE ON SCHEMA "pgsignals" TO "{role}"' in fix
    db(fix.partition(": ")[2])
    assert examined(dsn=as_role)[1]["outbox privileges"]["level"] == "ok"
    db(f"DROP OWNED BY {role}")
    for grant in documented_grants("consumer"):
        db(f"GRANT {grant} TO {role}")
    assert examined(dsn=as_role)[1]["outbox privileges"]["level"] == "ok"
