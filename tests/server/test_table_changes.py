"""Tables that are made anew, copied, renamed or rearranged: no foreign event, no silent loss."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partialmethod
from typing import Any

import psycopg2
import pytest
from psycopg2.extensions import make_dsn, parse_dsn

import pgsignals
from pgsignals import Hub, watch
from pgsignals.hub.hub import Delivery
from pgsignals.hub.setup import DurableSetup, Setup
from pgsignals.sources.clock import ServerClock
from pgsignals.sources.trigger_watch import TriggerWatch
from pgsignals.testing import Server
from pgsignals.triggers import names
from tests.conftest import DEADLINE, Database, Recorder
from tests.forked import run
from tests.table_changes import CHANGES, OURS, SHAPE, Change, covering, name_of, now, timed
from tests.waiting import eventually


@pytest.fixture(params=CHANGES.values(), ids=list(CHANGES))
def change(request: pytest.FixtureRequest) -> Change:
    """Each change in turn."""
    found: Change = request.param
    return found


def test_changed_while_a_hub_runs(
    hub: Hub,
    each_dsn: str,
    each_db: Database,
    delivery: Delivery,
    change: Change,
    request: pytest.FixtureRequest,
) -> None:
    """The Hub notices by itself, announces what is missing, and hears what comes next."""
    if change.of_trigger:
        request.getfixturevalue("by_triggers")
    heard, gaps = Recorder(), Recorder()
    each_db(f"CREATE TABLE orders {SHAPE}")
    hub.subscribe(heard, "orders", "inserted")
    hub.on_gap(gaps)
    hub.start(each_dsn, ["orders"], delivery=delivery, name=name_of(delivery), heartbeat=0.05)
    with timed(each_db) as lost:
        change.make(each_db)
        each_db(f"INSERT INTO {change.into} (id) VALUES (2)")
    eventually(lambda: list(gaps.items), lambda found: covering(found, lost))
    eventually(
        lambda: [state.status for state in hub.status().watchers if state.op == "inserted"],
        lambda found: "INSTALLED" in found and "OUTDATED" not in found,
    )
    each_db(f"INSERT INTO {change.into} (id) VALUES (3)")
    assert heard.wait_until(lambda event: event.id[0] == 3)
    assert hub.health().ready


@pytest.mark.usefixtures("by_triggers")
def test_a_loss_while_our_clock_is_late(
    hub: Hub,
    each_dsn: str,
    each_db: Database,
    delivery: Delivery,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A Gap ends after what was lost, though this process hears late what time it is."""
    now_us = ServerClock.now_us
    monkeypatch.setattr(ServerClock, "now_us", lambda clock: now_us(clock) - 10_000_000)
    gaps = Recorder()
    each_db(f"CREATE TABLE orders {SHAPE}")
    hub.on_gap(gaps)
    hub.start(each_dsn, ["orders"], delivery=delivery, name=name_of(delivery), heartbeat=0.05)
    with timed(each_db) as lost:
        each_db("ALTER TABLE orders DISABLE TRIGGER ALL; INSERT INTO orders (id) VALUES (1)")
    eventually(lambda: list(gaps.items), lambda found: covering(found, lost))


def test_changed_while_the_consumer_is_down(
    hub: Hub, each_dsn: str, each_db: Database, change: Change
) -> None:
    """A durable consumer gets a Gap at its next start, before what it hears next."""
    order: list[Any] = []
    each_db(f"CREATE TABLE orders {SHAPE}")
    heard = Recorder()
    hub.subscribe(lambda event: (order.append(event.id[0]), heard(event)), "orders", "inserted")
    hub.on_gap(order.append)
    hub.start(each_dsn, ["orders"], delivery="outbox", name="mailer")
    each_db("INSERT INTO orders (id) VALUES (1)")
    heard.wait(1)
    hub.stop()
    change.make(each_db)
    lost_at = now(each_db)
    each_db(f"INSERT INTO {change.into} (id) VALUES (2)")
    hub.start(each_dsn, ["orders"], delivery="outbox", name="mailer")
    each_db(f"INSERT INTO {change.into} (id) VALUES (3)")
    heard.wait_until(lambda event: event.id[0] == 3)
    before = order[: order.index(3)]
    assert covering([each for each in before if isinstance(each, pgsignals.Gap)], lost_at)


UNDONE = {
    "disabled and enabled": (
        "ALTER TABLE orders DISABLE TRIGGER USER",
        "ALTER TABLE orders ENABLE TRIGGER USER",
    ),
    "rights revoked and granted": (
        "REVOKE ALL ON SCHEMA pgsignals FROM {role}; REVOKE ALL ON pgsignals.outbox FROM {role};"
        "REVOKE ALL ON ALL SEQUENCES IN SCHEMA pgsignals FROM {role}",
        "GRANT ALL ON SCHEMA pgsignals TO {role}; GRANT ALL ON pgsignals.outbox TO {role};"
        "GRANT ALL ON ALL SEQUENCES IN SCHEMA pgsignals TO {role}",
    ),
    "attached and detached": (
        f"CREATE TABLE every_order {SHAPE} PARTITION BY RANGE (day);"
        "ALTER TABLE every_order ATTACH PARTITION orders DEFAULT",
        "ALTER TABLE every_order DETACH PARTITION orders; DROP TABLE every_order",
    ),
    "inheriting, and no longer": (
        "CREATE TABLE every_order (LIKE orders); ALTER TABLE orders INHERIT every_order",
        "ALTER TABLE orders NO INHERIT every_order; DROP TABLE every_order",
    ),
    "attached, detached and altered": (
        f"CREATE TABLE every_order {SHAPE} PARTITION BY RANGE (day);"
        "ALTER TABLE every_order ATTACH PARTITION orders DEFAULT",
        "ALTER TABLE every_order DETACH PARTITION orders; DROP TABLE every_order;"
        "ALTER TABLE orders ADD remark text",
    ),
    "another in its place, and altered": (
        f"ALTER TABLE orders RENAME TO orders_then; CREATE TABLE orders {SHAPE};"
        "GRANT ALL ON orders TO {role}",
        "DROP TABLE orders; ALTER TABLE orders_then RENAME TO orders;"
        "ALTER TABLE orders ADD remark text",
    ),
    "given to another role and back": (
        "ALTER FUNCTION {function}() OWNER TO {role}_2",
        "ALTER FUNCTION {function}() OWNER TO {role}",
    ),
}


@pytest.fixture
def role(each_db: Database) -> Iterator[str]:
    """A role that owns the database, and another that has no right in it."""
    made = f"role_{each_db.connection.info.dbname}"
    database = each_db.connection.info.dbname
    each_db(f"CREATE ROLE {made} LOGIN; CREATE ROLE {made}_2 LOGIN")
    each_db(f"ALTER DATABASE {database} OWNER TO {made}")
    each_db(f"GRANT CREATE ON SCHEMA public TO {made}, {made}_2")
    yield made
    each_db(f"ALTER DATABASE {database} OWNER TO postgres")
    each_db(f"DROP OWNED BY {made}, {made}_2 CASCADE; DROP ROLE {made}, {made}_2")


@pytest.mark.parametrize("running", [False, True], ids=["down", "running"])
@pytest.mark.parametrize("undone", UNDONE.values(), ids=list(UNDONE))
def test_undone_again(
    hub: Hub,
    each_dsn: str,
    each_db: Database,
    role: str,
    connect: Callable[[str], Database],
    undone: tuple[str, str],
    running: bool,
) -> None:
    """What was not written meanwhile is a Gap, though all is as it was; the write succeeds."""
    as_role = each_dsn.replace("postgres@", f"{role}@")
    owner = connect(as_role)
    owner(f"CREATE TABLE orders {SHAPE}")
    heard, gaps = Recorder(), Recorder()
    hub.subscribe(heard, "orders", "inserted")
    hub.on_gap(gaps)
    # The consumer's own rights stay.
    options: dict[str, Any] = {"delivery": "outbox", "name": "mailer", "heartbeat": 0.05}
    run("install", "orders:inserted", "--delivery", "outbox", dsn=as_role)
    watcher = ("orders", "inserted")
    hub.start(each_dsn, [watcher], install="check", **options)
    owner("INSERT INTO orders (id) VALUES (1)")
    heard.wait(1)
    if not running:
        hub.stop()
    [(function,)] = each_db(OURS)
    damage, repair = (text.format(role=role, function=function) for text in undone)
    each_db(damage)
    lost_at = now(each_db)
    owner("INSERT INTO orders (id) VALUES (2)")
    each_db(repair)
    if not running:
        hub.start(each_dsn, [watcher], install="check", **options)
    eventually(lambda: list(gaps.items), lambda found: covering(found, lost_at))
    owner("INSERT INTO orders (id) VALUES (3)")
    heard.wait_until(lambda event: event.id[0] == 3)


@pytest.mark.parametrize("undone", UNDONE.values(), ids=list(UNDONE))
def test_undone_while_it_is_looked_at(
    hub: Hub,
    each_dsn: str,
    each_db: Database,
    role: str,
    connect: Callable[[str], Database],
    monkeypatch: pytest.MonkeyPatch,
    undone: tuple[str, str],
) -> None:
    """What a look finds changed, and then as it was, was changed all the same."""
    as_role = each_dsn.replace("postgres@", f"{role}@")
    owner = connect(as_role)
    owner(f"CREATE TABLE orders {SHAPE}")
    heard, gaps = Recorder(), Recorder()
    hub.subscribe(heard, "orders", "inserted")
    hub.on_gap(gaps)
    run("install", "orders:inserted", "--delivery", "outbox", dsn=as_role)
    watcher, options = ("orders", "inserted"), {"name": "mailer", "heartbeat": 0.05}
    hub.start(each_dsn, [watcher], install="check", delivery="outbox", **options)
    owner("INSERT INTO orders (id) VALUES (1)")
    heard.wait(1)
    [(function,)] = each_db(OURS)
    damage, repair = (text.format(role=role, function=function) for text in undone)
    repairs: list[str] = []
    lock, drift = threading.Lock(), DurableSetup.drift

    def repaired(self: DurableSetup, *asked: Any) -> Any:
        with lock:
            while repairs:
                each_db(repairs.pop())
        return drift(self, *asked)

    monkeypatch.setattr(DurableSetup, "drift", repaired)
    with lock:
        each_db(damage)
        lost_at = now(each_db)
        owner("INSERT INTO orders (id) VALUES (2)")
        repairs.append(repair)
    eventually(lambda: list(gaps.items), lambda found: covering(found, lost_at))


@pytest.mark.parametrize("question", ["drift", "repair"])
@pytest.mark.parametrize("name", ["made anew", "made partitioned"])
def test_changed_right_after_it_was_asked(
    hub: Hub,
    each_dsn: str,
    each_db: Database,
    delivery: Delivery,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    question: str,
) -> None:
    """What a table becomes behind a look's questions is asked about at the next one."""
    each_db(f"CREATE TABLE orders {SHAPE}")
    heard, change = Recorder(), CHANGES[name]
    hub.subscribe(heard, "orders", "inserted")
    altered, changed = threading.Event(), threading.Event()
    asked = getattr(Setup, question)

    def change_behind(self: Setup, *given: Any) -> Any:
        # The first look at the triggers asks, too, and may come before the table is altered.
        assert altered.wait(DEADLINE)
        if question == "drift":
            # Before the answer is used, and behind it.
            answer = asked(self, *given)
        if not changed.is_set():
            if question == "repair":
                each_db("ALTER TABLE gone RENAME TO orders")
            change.make(each_db)
            changed.set()
        return answer if question == "drift" else asked(self, *given)

    hub.start(each_dsn, ["orders"], delivery=delivery, name=name_of(delivery), heartbeat=0.05)
    monkeypatch.setattr(Setup, question, change_behind)
    if question == "repair":
        each_db("ALTER TABLE orders RENAME TO gone")
    else:
        # Something else than was there, about which there is nothing to do.
        each_db("ALTER TABLE orders SET (fillfactor = 90)")
    altered.set()
    assert changed.wait(DEADLINE)
    eventually(lambda: hub.status().reconnects, bool)
    each_db(f"INSERT INTO {change.into} (id) VALUES (3)")
    heard.wait_until(lambda event: event.id[0] == 3)


@pytest.mark.parametrize("right", ["SCHEMA pgsignals", "TABLE pgsignals.outbox"])
def test_a_commit_after_the_gap(
    hub: Hub,
    each_dsn: str,
    each_db: Database,
    role: str,
    connect: Callable[[str], Database],
    right: str,
) -> None:
    """What a transaction could not write is in a Gap that ends after it was committed."""
    as_role = each_dsn.replace("postgres@", f"{role}@")
    owner = connect(as_role)
    owner(f"CREATE TABLE orders {SHAPE}")
    gaps = Recorder()
    hub.on_gap(gaps)
    run("install", "orders:inserted", "--delivery", "outbox", dsn=as_role)
    hub.start(
        each_dsn,
        [("orders", "inserted")],
        delivery="outbox",
        name="mailer",
        heartbeat=0.05,
        install="check",
    )
    each_db(f"REVOKE ALL ON {right} FROM {role}")
    with closing(psycopg2.connect(as_role)) as late, late.cursor() as cursor:
        cursor.execute("INSERT INTO orders (id) VALUES (1)")
        # Before the look that notices it, whose Gap is the last one until the commit.
        granted_at = now(each_db)
        each_db(f"GRANT ALL ON {right} TO {role}")
        eventually(lambda: list(gaps.items), lambda found: covering(found, granted_at))
        with timed(each_db) as lost:
            late.commit()
    eventually(lambda: list(gaps.items), lambda found: covering(found, lost))


def test_the_installer_lacks_a_right(
    hub: Hub, each_dsn: str, each_db: Database, role: str, connect: Callable[[str], Database]
) -> None:
    """Where the role that installs has lost a right, the start fails and names it."""
    as_role = each_dsn.replace("postgres@", f"{role}@")
    connect(as_role)(f"CREATE TABLE orders {SHAPE}")
    run("install", "orders:inserted", "--delivery", "outbox", dsn=as_role)
    each_db(f"REVOKE ALL ON SEQUENCE pgsignals.outbox_shed FROM {role}")
    with pytest.raises(pgsignals.PrivilegeError, match="outbox_shed"):
        hub.start(as_role, ["orders"], delivery="outbox", name="mailer", listen_dsn=each_dsn)


def test_the_table_was_away(hub: Hub, each_dsn: str, each_db: Database) -> None:
    """A consumer that started while its table had another name hears of it once it is back."""
    heard = Recorder()
    each_db(f"CREATE TABLE orders {SHAPE}")
    hub.subscribe(heard, "orders", "inserted")
    options: dict[str, Any] = {"delivery": "outbox", "name": "mailer", "heartbeat": 0.05}
    hub.start(each_dsn, [("orders", "inserted")], **options)
    hub.stop()
    each_db("ALTER TABLE orders RENAME TO away")
    hub.start(each_dsn, [("orders", "inserted")], **options)
    each_db(f"DROP TABLE away; CREATE TABLE orders {SHAPE}")
    eventually(lambda: hub.status().reconnects, lambda count: count > 0)
    each_db("INSERT INTO orders (id) VALUES (1)")
    heard.wait_until(lambda event: event.id[0] == 1)


@pytest.mark.parametrize(
    "change",
    ["ALTER TABLE orders RENAME TO away", "DROP TABLE orders"],
    ids=["renamed", "dropped"],
)
def test_gone_before_its_triggers_are_made(
    hub: Hub,
    each_dsn: str,
    each_db: Database,
    delivery: Delivery,
    monkeypatch: pytest.MonkeyPatch,
    change: str,
) -> None:
    """A table that goes between resolving and installing is an error that says so."""
    each_db(f"CREATE TABLE orders {SHAPE}")

    def changed(preparer: Any, *args: Any, install: Any) -> None:
        each_db(change)
        install(preparer, *args)

    monkeypatch.setattr(Setup, "install", partialmethod(changed, install=Setup.install))
    with pytest.raises(pgsignals.DatabaseError, match=r"renamed or dropped while .* Try again"):
        hub.start(each_dsn, [("orders", "inserted")], delivery=delivery)


def test_made_anew_before_its_triggers_are_made(
    hub: Hub, each_dsn: str, each_db: Database, delivery: Delivery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another table in its place by then is an error, or its events are heard, or are a Gap."""
    each_db(f"CREATE TABLE orders {SHAPE}")
    heard = Recorder()
    hub.subscribe(heard, "orders", "inserted")
    hub.on_gap(heard)

    def changed(preparer: Any, *args: Any, install: Any) -> None:
        each_db(f"DROP TABLE orders; CREATE TABLE orders {SHAPE}")
        monkeypatch.undo()
        install(preparer, *args)

    monkeypatch.setattr(Setup, "install", partialmethod(changed, install=Setup.install))
    try:
        hub.start(each_dsn, [("orders", "inserted")], delivery=delivery, heartbeat=0.05)
    except pgsignals.DatabaseError as error:
        assert "Try again" in str(error)  # noqa: PT017
        hub.start(each_dsn, [("orders", "inserted")], delivery=delivery, heartbeat=0.05)
    each_db("INSERT INTO orders (id) VALUES (1)")
    heard.wait(1)


def test_written_without_a_trigger_while_away(hub: Hub, each_dsn: str, each_db: Database) -> None:
    """What its table got under another name, without a trigger, is in the Gap once it is back."""
    each_db(f"CREATE TABLE orders {SHAPE}")
    options: dict[str, Any] = {"delivery": "outbox", "name": "mailer", "heartbeat": 0.05}
    hub.start(each_dsn, [("orders", "inserted")], **options)
    hub.stop()
    [(trigger,)] = each_db(OURS)
    each_db(f"ALTER TABLE orders RENAME TO away; DROP TRIGGER {trigger} ON away")
    gaps = Recorder()
    hub.on_gap(gaps)
    hub.start(each_dsn, [("orders", "inserted")], **options)
    assert "no longer fit" in hub.health().reason
    each_db("INSERT INTO away (id) VALUES (1)")
    written = now(each_db)
    acknowledged = "SELECT acknowledged_at FROM pgsignals.consumers WHERE name = 'mailer'"
    eventually(lambda: each_db(acknowledged)[0][0], lambda at: at > written)
    each_db("ALTER TABLE away RENAME TO orders")
    eventually(lambda: list(gaps.items), lambda found: covering(found, written))


@pytest.mark.parametrize(
    ("change", "into"),
    [
        (f"DROP TABLE orders; CREATE TABLE orders {SHAPE}", "orders"),
        ("CREATE TABLE more_orders (PRIMARY KEY (id, day)) INHERITS (orders)", "more_orders"),
    ],
    ids=["made anew", "with a child"],
)
@pytest.mark.parametrize("installed", [False, True], ids=["not installed", "installed"])
def test_changed_while_a_hub_starts(
    hub: Hub,
    each_dsn: str,
    each_db: Database,
    delivery: Delivery,
    monkeypatch: pytest.MonkeyPatch,
    change: str,
    into: str,
    installed: bool,
) -> None:
    """A change after the watchers have been resolved is noticed, whoever installs the triggers."""
    begin = TriggerWatch.begin

    def begin_late(self: TriggerWatch, *args: Any, **options: Any) -> Any:
        monkeypatch.setattr(TriggerWatch, "begin", begin)
        each_db(change)
        if installed:
            run("install", "orders:inserted", "--delivery", delivery, dsn=each_dsn)
        return begin(self, *args, **options)

    heard, gaps = Recorder(), Recorder()
    each_db(f"CREATE TABLE orders {SHAPE}")
    hub.subscribe(heard, "orders", "inserted")
    hub.on_gap(gaps)
    monkeypatch.setattr(TriggerWatch, "begin", begin_late)
    options: dict[str, Any] = {"delivery": delivery, "name": name_of(delivery)}
    with timed(each_db) as lost:
        hub.start(each_dsn, [("orders", "inserted")], heartbeat=0.05, **options)
        each_db(f"INSERT INTO {into} (id) VALUES (2)")
    eventually(lambda: list(gaps.items), lambda found: covering(found, lost))
    eventually(lambda: hub.status().reconnects, lambda count: count > 0)
    each_db(f"INSERT INTO {into} (id) VALUES (3)")
    assert heard.wait_until(lambda event: event.id[0] == 3)


def test_the_installer_is_replaced(
    each_dsn: str, each_db: Database, role: str, connect: Callable[[str], Database]
) -> None:
    """Where a function's new owner lacks rights on the outbox, status says so, and writes go on."""
    as_role = each_dsn.replace("postgres@", f"{role}@")
    owner = connect(as_role)
    owner(f"CREATE TABLE orders {SHAPE}")
    run("install", "orders:inserted", "--delivery", "outbox", dsn=as_role)
    [(function,)] = each_db(OURS)
    each_db(f"ALTER FUNCTION {function}() OWNER TO {role}_2")
    status = run("status", "orders:inserted", "--delivery", "outbox", dsn=as_role)
    assert status.code == 1
    assert "OUTDATED" in status.out[1]
    assert f"its owner '{role}_2' lacks rights in the schema pgsignals" in status.out[1]
    owner("INSERT INTO orders (id) VALUES (1)")


def test_a_column_that_is_computed_when_read(
    hub: Hub, each_dsn: str, each_db: Database, delivery: Delivery
) -> None:
    """A watched column that becomes VIRTUAL, which triggers do not see, is a Gap."""
    if each_db.connection.info.server_version < 180000:
        pytest.skip("PostgreSQL 18 brought them")
    each_db("CREATE TABLE orders (id int PRIMARY KEY, net int, gross int)")
    gaps = Recorder()
    hub.on_gap(gaps)
    watcher = watch("orders", "inserted", extra=["gross"])
    hub.start(each_dsn, [watcher], delivery=delivery, name=name_of(delivery), heartbeat=0.05)
    with timed(each_db) as lost:
        each_db(
            "ALTER TABLE orders DROP COLUMN gross;"
            "ALTER TABLE orders ADD COLUMN gross int GENERATED ALWAYS AS (net * 2) VIRTUAL"
        )
        each_db("INSERT INTO orders (id, net) VALUES (1, 2)")
    eventually(lambda: list(gaps.items), lambda found: covering(found, lost))
    assert "OUTDATED" in {state.status for state in hub.status().watchers}


def test_harmless_changes(
    hub: Hub, each_dsn: str, each_db: Database, delivery: Delivery, looks: Recorder
) -> None:
    """A new column, partition, index or grant is no reason for a Gap."""
    each_db(
        f"CREATE TABLE orders {SHAPE} PARTITION BY RANGE (day);"
        "CREATE TABLE part PARTITION OF orders FOR VALUES FROM ('2026-01-01') TO ('2026-02-01')"
    )
    heard, gaps = Recorder(), Recorder()
    hub.subscribe(heard, "orders")
    hub.on_gap(gaps)
    hub.start(each_dsn, ["orders"], delivery=delivery, name=name_of(delivery), heartbeat=0.05)
    triggers = looks.wait(1)[0]
    changes = (
        "ALTER TABLE orders ADD COLUMN total numeric",
        "CREATE TABLE later PARTITION OF orders FOR VALUES FROM ('2026-02-01') TO ('2026-03-01')",
        "CREATE INDEX ON orders (note)",
        "GRANT SELECT ON orders TO PUBLIC",
    )
    for number, statement in enumerate(changes):
        each_db(statement)
        verified = triggers.verified_at
        eventually(lambda: triggers.verified_at, lambda at, was=verified: at != was)
        each_db("INSERT INTO orders (id) VALUES (%s)", [number])
        heard.wait(number + 1)
    assert gaps.items == []
    assert hub.status().reconnects == 0


def dump(server: Server, dsn: str, *options: str) -> str:
    """What pg_dump writes, without its own commands to psql."""
    command = [str(server.installation.bindir / "pg_dump"), *options, dsn]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return "\n".join(line for line in text.splitlines() if not line.startswith("\\"))


def test_a_cloned_schema(
    hub: Hub, each_server: Server, each_dsn: str, each_db: Database, delivery: Delivery
) -> None:
    """Rows of a schema that was cloned with its triggers are nobody's, and status says so."""
    each_db(
        "CREATE SCHEMA acme; CREATE TABLE acme.orders (id int PRIMARY KEY, v text);"
        "CREATE TABLE acme.parted (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);"
        "CREATE TABLE acme.part PARTITION OF acme.parted DEFAULT"
    )
    heard, gaps = Recorder(), Recorder()
    given = [watch("acme.orders", extra=["v"]), watch("acme.parted", extra=["v"])]
    for each in given:
        hub.subscribe(heard, each.model)
    hub.on_gap(gaps)
    hub.start(each_dsn, given, delivery=delivery, name=name_of(delivery))
    copy = psycopg2.connect(each_dsn)
    with copy, copy.cursor() as cursor:
        cursor.execute(dump(each_server, each_dsn, "-s", "-n", "acme").replace("acme", "beta"))
    copy.close()
    for table in ("beta.orders", "beta.parted", "beta.part"):
        each_db(f"INSERT INTO {table} VALUES (77, 'secret'); UPDATE {table} SET id = 78")
        each_db(f"DELETE FROM {table}")
    each_db("INSERT INTO acme.orders VALUES (1, 'own')")
    assert [(e.schema, e.id) for e in heard.wait(1)] == [("acme", 1)]
    assert gaps.items == []
    states = {(state.status, state.schema) for state in hub.status().watchers}
    assert states == {("INSTALLED", "acme"), ("STALE", "beta")}
    hub.stop()
    hub.start(each_dsn, given, delivery=delivery, name=name_of(delivery))
    assert {state.schema for state in hub.status().watchers} == {"acme"}


def test_a_schema_that_was_renamed_away(
    hub: Hub, each_dsn: str, each_db: Database, delivery: Delivery
) -> None:
    """Its tables are heard by the Hub that ran then, and by none that starts afterwards."""
    create = "CREATE SCHEMA acme; CREATE TABLE acme.orders (id int PRIMARY KEY)"
    each_db(create)
    heard = Recorder()
    hub.subscribe(heard, "acme.orders")
    hub.start(each_dsn, ["acme.orders"], delivery=delivery, name=name_of(delivery))
    each_db("ALTER SCHEMA acme RENAME TO acme_old")
    each_db("INSERT INTO acme_old.orders VALUES (1)")
    assert heard.wait(1)[0].id == 1
    each_db(create)
    hub.stop()
    with Hub() as other:
        other.subscribe(heard, "acme.orders")
        # What is left of the former triggers is not removed, so that they fire.
        other.start(
            each_dsn, ["acme.orders"], delivery=delivery, name=name_of(delivery), prune=False
        )
        each_db("INSERT INTO acme_old.orders VALUES (2)")
        each_db("INSERT INTO acme.orders VALUES (3)")
        assert [event.id for event in heard.wait(2)] == [1, 3]
        [foreign] = other.status().foreign
        assert (foreign.name, foreign.messages) == ("acme_old.orders", 1)


@pytest.mark.parametrize("superuser", [False, True], ids=["role", "superuser"])
def test_the_owner_adds_partitions(
    each_dsn: str,
    each_db: Database,
    role: str,
    connect: Callable[[str], Database],
    superuser: bool,
    delivery: Delivery,
    hub: Hub,
) -> None:
    """Whoever installed, owners add and attach partitions, also after ALTER TABLE OWNER."""
    owner = connect(each_dsn.replace("postgres@", f"{role}@"))
    owner(f"CREATE TABLE orders {SHAPE} PARTITION BY RANGE (day)")
    owner("CREATE TABLE part PARTITION OF orders FOR VALUES FROM ('2026-01-01') TO ('2026-02-01')")
    owner(f"GRANT TRIGGER ON orders, part TO {role}_2")
    installer = each_dsn if superuser else each_dsn.replace("postgres@", f"{role}_2@")
    heard = Recorder()
    hub.subscribe(heard, "orders", "inserted")
    if delivery != "notify":
        # As the docs tell a superuser to: as the table's owner.
        installer = f"{each_dsn}?options=-crole%3D{role}" if superuser else installer
        run("install", "orders", "--delivery", delivery, dsn=f"{each_dsn}?options=-crole%3D{role}")
        options: dict[str, Any] = {"name": "mailer", "install": "check"}
        hub.start(each_dsn, ["orders"], delivery=delivery, **options)
    else:
        hub.start(installer, ["orders"], delivery=delivery)
    for turn, session in enumerate((owner, connect(each_dsn.replace("postgres@", f"{role}_2@")))):
        month = 2 + 2 * turn
        session(
            f"CREATE TABLE part_{month} PARTITION OF orders"
            f" FOR VALUES FROM ('2026-0{month}-01') TO ('2026-0{month + 1}-01')"
        )
        session(f"CREATE TABLE part_{month + 1} {SHAPE}")
        session(
            f"ALTER TABLE orders ATTACH PARTITION part_{month + 1}"
            f" FOR VALUES FROM ('2026-0{month + 1}-01') TO ('2026-0{month + 2}-01')"
        )
        for each in (month, month + 1):
            session(f"INSERT INTO orders VALUES ({each}, '2026-0{each}-01')")
        assert [e.id[0] for e in heard.wait(2 * turn + 2)[-2:]] == [month, month + 1]
        each_db(f"ALTER TABLE orders OWNER TO {role}_2; ALTER TABLE part OWNER TO {role}_2")


def test_locks_are_few_however_many_tables(
    hub: Hub, each_dsn: str, each_db: Database, delivery: Delivery
) -> None:
    """A process takes a fixed number of advisory locks, whatever it watches."""
    tables = [f"t{number}" for number in range(20)]
    # Triggers, of which each table has three, are more than the locks.
    assert 3 * len(tables) > names.LISTENER_LOCKS + 4
    for table in tables:
        each_db(f"CREATE TABLE {table} (id int PRIMARY KEY)")
    hub.start(each_dsn, tables, delivery=delivery, name=name_of(delivery))
    [(count,)] = each_db(
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database ="
        " (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    assert count <= names.LISTENER_LOCKS + 4
    assert all(state.listeners == 1 for state in hub.status().watchers)


DUMPS = {
    "whole": (),
    "as advised": ("--exclude-table-data=pgsignals.outbox*",),
    "schema only": ("--schema-only",),
}


@pytest.mark.parametrize("options", DUMPS.values(), ids=list(DUMPS))
def test_a_restored_dump(
    hub: Hub,
    each_server: Server,
    each_dsn: str,
    each_db: Database,
    connect: Callable[[str], Database],
    delivery: Delivery,
    options: Sequence[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In a restored database writes succeed, and the next start mends what the dump left out."""
    each_db("CREATE TABLE t (id serial PRIMARY KEY)")
    heard, gaps = Recorder(), Recorder()
    hub.subscribe(heard, "t")
    hub.on_gap(gaps)
    hub.start(each_dsn, ["t"], delivery=delivery, name=name_of(delivery))
    for _ in range(3):
        each_db("INSERT INTO t DEFAULT VALUES")
    heard.wait(3)
    hub.stop()
    restored = f"{each_db.connection.info.dbname}_restored"
    each_db(f"CREATE DATABASE {restored}")
    dsn = make_dsn(**{**parse_dsn(each_dsn), "dbname": restored})
    text = dump(each_server, each_dsn, "--inserts", *options)
    try:
        copy = connect(dsn)
        copy(text)
        copy("SET search_path TO public; INSERT INTO t VALUES (77)")
        if delivery == "outbox":
            doctor = run("doctor", dsn=dsn)
            assert ("left something out" in "\n".join(doctor.out)) == bool(options)
        lost_at = now(copy)
        hub.start(dsn, ["t"], delivery=delivery, name=name_of(delivery))
        assert ("left something out" in caplog.text) == (bool(options) and delivery != "notify")
        copy("INSERT INTO t VALUES (78)")
        assert heard.wait_until(lambda event: event.id == 78)
        if delivery != "notify" and "--schema-only" not in options:
            # A consumer that nobody knows begins here.
            assert covering(gaps.items, lost_at)
        hub.stop()
        assert run("doctor", dsn=dsn).code == 0
    finally:
        hub.stop()
        copy.connection.close()
        each_db(f"DROP DATABASE {restored} WITH (FORCE)")
