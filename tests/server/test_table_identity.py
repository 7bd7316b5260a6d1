"""Which table a trigger is of: what is no longer the watched one is not heard, what is, is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from pgsignals import Hub, watch
from pgsignals.core.transport import Transport
from pgsignals.core.watchers import normalize
from pgsignals.hub.hub import Delivery, Install
from pgsignals.outbox.schema import install_schema
from pgsignals.sources.trigger_watch import TriggerWatch
from pgsignals.triggers.definitions import define
from pgsignals.triggers.installer import INSTALLED
from pgsignals.triggers.installer import install as install_triggers
from pgsignals.triggers.resolvers import BUILTIN
from pgsignals.wal.publication import ensure_publications
from tests.conftest import Database, Recorder
from tests.table_changes import CHANGES, SHAPE, Period, covering, name_of, timed
from tests.waiting import eventually, settle

# A table's triggers, and whether each fires for each row.
OURS = (
    "SELECT tgname, tgtype & 1 FROM pg_trigger"
    " WHERE tgrelid = %s::regclass AND tgname LIKE 'pgsignals%%'"
)

CUT = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
)


@pytest.fixture
def role(each_db: Database) -> Iterator[str]:
    """A role that may install, and another that may create tables."""
    database = each_db.connection.info.dbname
    made = f"role_{database}"
    each_db(
        f"CREATE ROLE {made} LOGIN; CREATE ROLE {made}_2 LOGIN; GRANT pg_monitor TO {made};"
        f"GRANT CREATE ON DATABASE {database} TO {made};"
        f"GRANT CREATE ON SCHEMA public TO {made}, {made}_2"
    )
    yield made
    # Where a test fails, sessions may be in the way that end after this.
    each_db(CUT)
    each_db(f"DROP OWNED BY {made}, {made}_2 CASCADE; DROP ROLE {made}, {made}_2")


@pytest.fixture
def start(hub: Hub, each_dsn: str, delivery: Delivery) -> Callable[..., None]:
    """Starts the Hub, which looks at its triggers all the time."""

    def begin(*watchers: Any, **options: Any) -> None:
        known = {"delivery": delivery, "name": name_of(delivery), "heartbeat": 0.05}
        hub.start(each_dsn, watchers or [("orders", "inserted")], **(known | options))

    return begin


@pytest.fixture
def install_orders(each_dsn: str, each_db: Database, delivery: Delivery) -> Callable[[], None]:
    """A table whose triggers somebody else has installed, who does it again when this is called."""

    def install() -> None:
        with each_db.connection.cursor() as cursor:
            if delivery != "notify":
                install_schema(cursor)
            if delivery == "wal":
                ensure_publications(cursor)
            watchers, transport = normalize([("orders", "inserted")]), Transport(delivery)
            definitions = define(cursor, watchers, BUILTIN, "default", transport)
            install_triggers(cursor, "default", [each.trigger for each in definitions])

    each_db(f"CREATE TABLE orders {SHAPE}")
    install()
    return install


class Heard:
    """What a Hub delivers of some tables."""

    def __init__(self, hub: Hub, *tables: str) -> None:
        self.events = {table: Recorder() for table in tables}
        self.gaps = Recorder()
        for table, recorder in self.events.items():
            hub.subscribe(recorder, table, "inserted")
        hub.on_gap(self.gaps)

    def until(self, table: str, number: int) -> list[int]:
        """The ids of a table's rows up to this one."""
        events = self.events[table].wait_until(lambda event: _id(event) == number)
        return [_id(event) for event in events]

    def until_announced(self, *lost_at: Period) -> None:
        """Wait until all that was lost then is in Gaps."""
        eventually(
            lambda: list(self.gaps.items),
            lambda gaps: all(covering(gaps, at) for at in lost_at),
        )


def _id(event: Any) -> int:
    found: int = event.id[0] if isinstance(event.id, tuple) else event.id
    return found


def lose(db: Database, change: str, write: str) -> Period:
    """Change something and write in one transaction, which nobody can mend in between; its end."""
    db("BEGIN")
    db(change)
    db(write)
    with timed(db) as commit:
        db("COMMIT")
    return commit


# ---- tables of somebody else ----

TRAP = """
CREATE TYPE trap AS ENUM ('a');
CREATE FUNCTION spring(trap) RETURNS text LANGUAGE plpgsql
  AS $$BEGIN INSERT INTO public.seen VALUES (current_user); RETURN '1'; END$$;
CREATE CAST (trap AS text) WITH FUNCTION spring(trap) AS IMPLICIT;
ALTER TABLE theirs ALTER id TYPE trap USING 'a';
INSERT INTO theirs VALUES ('a')
"""

# How a table of somebody else's comes to be, and how it ends to be one of the watched table's.
FORMER = {
    "child": (
        "CREATE TABLE orders (id int); CREATE TABLE theirs () INHERITS (orders)",
        "ALTER TABLE theirs NO INHERIT orders",
    ),
    "grandchild": (
        "CREATE TABLE orders (id int); CREATE TABLE between () INHERITS (orders);"
        "CREATE TABLE theirs () INHERITS (between)",
        "ALTER TABLE between NO INHERIT orders; ALTER TABLE theirs NO INHERIT between",
    ),
    "partition": (
        "CREATE TABLE orders (id int) PARTITION BY LIST (id);"
        "CREATE TABLE ours PARTITION OF orders FOR VALUES IN (1);"
        "CREATE TABLE theirs PARTITION OF orders DEFAULT",
        "ALTER TABLE orders DETACH PARTITION theirs",
    ),
    "partition of a partition": (
        "CREATE TABLE orders (id int) PARTITION BY LIST (id);"
        "CREATE TABLE between PARTITION OF orders DEFAULT PARTITION BY LIST (id);"
        "CREATE TABLE ours PARTITION OF between FOR VALUES IN (1);"
        "CREATE TABLE theirs PARTITION OF between DEFAULT",
        "ALTER TABLE between DETACH PARTITION theirs",
    ),
    "no relative": ("CREATE TABLE orders (id int); CREATE TABLE theirs (id int)", "SELECT"),
}


@pytest.mark.usefixtures("by_triggers")
@pytest.mark.parametrize("former", FORMER.values(), ids=list(FORMER))
def test_the_owner_of_another_table_gains_nothing(
    hub: Hub,
    each_dsn: str,
    each_db: Database,
    connect: Callable[[str], Database],
    role: str,
    delivery: Delivery,
    former: tuple[str, str],
) -> None:
    """On a table that is no relative any more, a function runs nothing, and sends nothing."""
    create, part = former
    owner = f"{role}_2"
    each_db(f"{create}; ALTER TABLE theirs OWNER TO {owner}")
    each_db("CREATE TABLE seen (who text); GRANT INSERT ON seen TO PUBLIC")
    heard, gaps = Recorder(), Recorder()
    hub.subscribe(heard, "orders")
    hub.on_gap(gaps)
    watcher = watch("orders", "inserted", extra=["id"])
    hub.start(each_dsn, [watcher], delivery=delivery, name=name_of(delivery))
    each_db(part)
    theirs = connect(each_dsn.replace("postgres@", f"{owner}@"))
    if not theirs(OURS, ["theirs"]):
        [(function, by_row)] = each_db(OURS, ["orders"])
        level = "FOR EACH ROW" if by_row else "REFERENCING NEW TABLE AS pgs_new FOR EACH STATEMENT"
        theirs(f"CREATE TRIGGER t AFTER INSERT ON theirs {level} EXECUTE FUNCTION {function}()")
    theirs("INSERT INTO theirs VALUES (7)")
    theirs(TRAP)
    each_db("INSERT INTO orders VALUES (1)")
    settle(hub)
    assert each_db("SELECT who FROM seen") == []
    assert [event.values for event in heard.items] == [{"id": 1}]
    # Nor is it announced that it failed there.
    assert "watcher_broken" not in {gap.reason for gap in gaps.items}
    assert hub.status().foreign == ()


# ---- several Hubs ----


@pytest.mark.parametrize("change", ["made anew", "made partitioned", "with a child"])
def test_each_of_several_hubs(
    each_dsn: str, each_db: Database, delivery: Delivery, change: str
) -> None:
    """Whichever of them mends the triggers, each hears of the table as it is now."""
    each_db(f"CREATE TABLE orders {SHAPE}")
    with ExitStack() as stack:
        hubs = [stack.enter_context(Hub()) for _ in range(3)]
        heard = [Heard(hub, "orders") for hub in hubs]
        for number, hub in enumerate(hubs):
            hub.start(
                each_dsn,
                [("orders", "inserted")],
                delivery=delivery,
                name=None if name_of(delivery) is None else f"mailer_{number}",
                heartbeat=0.05,
            )
        into = CHANGES[change].into
        write = f"INSERT INTO {into} (id) VALUES (1)"
        lost_at = lose(each_db, CHANGES[change].statements, write)
        for hub, each in zip(hubs, heard, strict=True):
            eventually(lambda hub=hub: hub.status().reconnects, lambda count: count > 0)
            each.until_announced(lost_at)
        each_db(f"INSERT INTO {into} (id) VALUES (2)")
        for hub, each in zip(hubs, heard, strict=True):
            # The log may have had the first row all the same.
            found = each.until("orders", 2)
            assert found == [2] or (delivery == "wal" and found == [1, 2])
            assert hub.health().ready


def test_a_table_that_a_migration_makes_anew(
    hub: Hub,
    each_db: Database,
    start: Callable[..., None],
    install_orders: Callable[[], None],
) -> None:
    """A Hub that only checks hears of the new table once somebody else has installed."""
    heard = Heard(hub, "orders")
    start(install="check")
    lost_at = lose(each_db, CHANGES["made anew"].statements, "INSERT INTO orders (id) VALUES (1)")
    install_orders()
    eventually(lambda: hub.status().reconnects, lambda count: count > 0)
    heard.until_announced(lost_at)
    each_db("INSERT INTO orders (id) VALUES (2)")
    assert heard.until("orders", 2) == [2]
    eventually(hub.health, lambda health: health.ready)


def test_a_table_made_anew_before_a_connection_is_lost(
    hub: Hub,
    each_db: Database,
    until_looked: Callable[[], None],
    start: Callable[..., None],
    install_orders: Callable[[], None],
) -> None:
    """Who connects again before somebody else has installed hears of the new table as well."""
    heard = Heard(hub, "orders")
    start(install="check")
    first = lose(each_db, CHANGES["made anew"].statements, "INSERT INTO orders (id) VALUES (1)")
    eventually(hub.health, lambda health: "events are missing" in health.reason)
    each_db(CUT)
    eventually(lambda: hub.status().reconnects, lambda count: count > 0)
    second = lose(each_db, "SELECT", "INSERT INTO orders (id) VALUES (2)")
    until_looked()
    install_orders()
    eventually(hub.health, lambda health: health.ready)
    heard.until_announced(first, second)
    each_db("INSERT INTO orders (id) VALUES (3)")
    assert heard.until("orders", 3) == [3]


# ---- what cannot be mended ----

STUCK = {
    "no right": (
        "DROP TABLE b; CREATE TABLE b (id int PRIMARY KEY); ALTER TABLE b OWNER TO {role}_2",
        "GRANT TRIGGER ON b TO {role}",
    ),
    "no right on a child": (
        "CREATE TABLE b_child () INHERITS (b); ALTER TABLE b_child OWNER TO {role}_2",
        "GRANT TRIGGER ON b_child TO {role}",
    ),
    "a function of somebody else": (
        "ALTER FUNCTION {function}() OWNER TO {role}_2; ALTER TABLE b DISABLE TRIGGER USER",
        "ALTER FUNCTION {function}() OWNER TO {role}",
    ),
    # Readers are in the way of whoever replaces a trigger.
    "locked": ("ALTER TABLE b DISABLE TRIGGER USER", "ROLLBACK"),
}


@pytest.mark.usefixtures("by_triggers")
@pytest.mark.parametrize("stuck", STUCK.values(), ids=list(STUCK))
def test_a_table_that_cannot_be_mended(
    hub: Hub,
    each_dsn: str,
    each_db: Database,
    connect: Callable[[str], Database],
    role: str,
    delivery: Delivery,
    stuck: tuple[str, str],
    until_looked: Callable[[], None],
) -> None:
    """It keeps back none before or after it, and is mended as soon as that is possible."""
    as_role = each_dsn.replace("postgres@", f"{role}@")
    for table in "abc":
        each_db(f"CREATE TABLE {table} (id int PRIMARY KEY); ALTER TABLE {table} OWNER TO {role}")
    if delivery == "wal":
        each_db(f"ALTER ROLE {role} REPLICATION")
    heard = Heard(hub, *"abc")
    hub.start(
        as_role,
        [(table, "inserted") for table in "abc"],
        delivery=delivery,
        name=name_of(delivery),
        heartbeat=0.05,
        lock_timeout=0.02,
    )
    until_looked()
    [(function, _)] = each_db(OURS, ["b"])
    damage, repair = (text.format(role=role, function=function) for text in stuck)
    holder = connect(each_dsn)
    if repair == "ROLLBACK":
        holder("BEGIN")
        holder("SELECT FROM b")
    into = "b_child" if "b_child" in damage else "b"
    lost_at = lose(
        each_db,
        f"{damage}; ALTER TABLE a DISABLE TRIGGER USER; ALTER TABLE c DISABLE TRIGGER USER",
        f"INSERT INTO a VALUES (1); INSERT INTO {into} VALUES (1); INSERT INTO c VALUES (1)",
    )
    silent = (
        "SELECT FROM pg_trigger WHERE tgrelid IN ('a'::regclass, 'c'::regclass) AND tgenabled = 'D'"
    )
    eventually(lambda: each_db(silent), lambda found: not found)
    heard.until_announced(lost_at)
    for table in "ac":
        each_db(f"INSERT INTO {table} VALUES (2)")
        assert heard.until(table, 2) == [2]
    eventually(hub.health, lambda health: "events are missing" in health.reason)
    lost_later_at = lose(each_db, "SELECT", f"INSERT INTO {into} VALUES (2)")
    until_looked()
    (holder if repair == "ROLLBACK" else each_db)(repair)
    eventually(hub.health, lambda health: health.ready)
    heard.until_announced(lost_later_at)
    each_db(f"INSERT INTO {into} VALUES (3)")
    assert heard.until("b", 3) == [3]
    # To hear of other tables, and to read what has been installed: no look connects in vain.
    assert hub.status().reconnects <= 2


# ---- partitions ----

PARTED = """
CREATE TABLE orders (id int, day date DEFAULT '2026-01-01', note text DEFAULT '',
  PRIMARY KEY (id, day, note)) PARTITION BY RANGE (day);
CREATE TABLE between PARTITION OF orders DEFAULT PARTITION BY LIST (note);
CREATE TABLE part PARTITION OF between DEFAULT
"""
# What somebody does to the triggers of one partition, by which a writer's rows are not heard.
SILENT = {
    "disabled": ("ALTER TABLE part DISABLE TRIGGER {trigger}", "origin", False),
    "for replicas": ("ALTER TABLE part ENABLE REPLICA TRIGGER {trigger}", "origin", False),
    "not for replicas": ("ALTER TABLE part ENABLE TRIGGER {trigger}", "replica", True),
}


@pytest.mark.usefixtures("by_triggers")
@pytest.mark.parametrize("state", ["running", "down", "undone", "undone while down"])
@pytest.mark.parametrize("silent", SILENT.values(), ids=list(SILENT))
def test_a_partition_whose_trigger_is_silent(
    hub: Hub,
    each_db: Database,
    delivery: Delivery,
    silent: tuple[str, str, bool],
    state: str,
    start: Callable[..., None],
) -> None:
    """One partition's rows that were not heard are in a Gap, and later ones are heard."""
    if delivery == "notify" and "down" in state:
        pytest.skip("what it misses while it is down is nobody's to announce")
    statement, session, replicated = silent
    each_db(PARTED)
    each_db("CREATE TABLE later PARTITION OF between FOR VALUES IN ('later')")
    heard = Heard(hub, "orders")
    watchers = [watch("orders", "inserted", replicated=replicated)]
    start(*watchers)
    if "down" in state:
        hub.stop()
    [(trigger, _)] = each_db(OURS, ["part"])
    each_db(f"SET session_replication_role TO {session}")
    write = "INSERT INTO orders (id) VALUES (1)"
    if "undone" in state:
        enable = "ENABLE ALWAYS" if replicated else "ENABLE"
        write += f"; ALTER TABLE part {enable} TRIGGER {trigger}"
    lost_at = lose(each_db, statement.format(trigger=trigger), write)
    if "down" in state:
        start(*watchers)
    heard.until_announced(lost_at)
    eventually(
        lambda: {each.status for each in hub.status().watchers}, lambda found: found == {INSTALLED}
    )
    each_db("INSERT INTO orders (id) VALUES (2)")
    assert heard.until("orders", 2) == [2]


@pytest.mark.usefixtures("by_triggers")
def test_a_partition_that_is_made_later_is_no_gap(
    hub: Hub,
    each_db: Database,
    until_looked: Callable[[], None],
    start: Callable[..., None],
) -> None:
    """Nor is one that is dropped, also where the triggers of others were disabled at some time."""
    each_db(PARTED)
    heard = Heard(hub, "orders")
    start()
    lost_at = lose(
        each_db,
        "ALTER TABLE part DISABLE TRIGGER USER",
        "INSERT INTO orders (id) VALUES (1); ALTER TABLE part ENABLE TRIGGER USER",
    )
    heard.until_announced(lost_at)
    until_looked()
    known = len(heard.gaps.items)
    each_db("CREATE TABLE more PARTITION OF between FOR VALUES IN ('x')")
    until_looked()
    each_db("INSERT INTO orders (id, note) VALUES (2, 'x'); DROP TABLE more")
    until_looked()
    each_db("INSERT INTO orders (id) VALUES (3)")
    assert heard.until("orders", 3) == [2, 3]
    assert len(heard.gaps.items) == known


def test_an_ancestor_that_is_attached_below_another_table(
    hub: Hub, each_dsn: str, each_db: Database, delivery: Delivery
) -> None:
    """A partition that is watched is heard, and no other, whatever its parent becomes part of."""
    each_db(f"{PARTED}; CREATE TABLE others (LIKE orders) PARTITION BY RANGE (day)")
    heard = Heard(hub, "between")
    options: dict[str, Any] = {"delivery": delivery, "name": name_of(delivery)}
    hub.start(each_dsn, [("between", "inserted")], **options)
    each_db(
        "CREATE TABLE top (LIKE orders INCLUDING DEFAULTS) PARTITION BY RANGE (day);"
        "ALTER TABLE top ATTACH PARTITION orders FOR VALUES FROM ('2026-01-01') TO ('2027-01-01');"
        "ALTER TABLE top ATTACH PARTITION others DEFAULT;"
        "CREATE TABLE other PARTITION OF others DEFAULT;"
        "CREATE TABLE more PARTITION OF between FOR VALUES IN ('x')"
    )
    for number, table in enumerate(("top", "orders", "between", "part"), 1):
        each_db(f"INSERT INTO {table} (id) VALUES ({number})")
    each_db("INSERT INTO top (id, day) VALUES (5, '2030-01-01')")
    each_db("INSERT INTO top (id, note) VALUES (6, 'x')")
    assert heard.until("between", 6) == [1, 2, 3, 4, 6]
    assert heard.gaps.items == []


# ---- who may not install ----


@pytest.mark.parametrize("install", ["check", "off"])
def test_a_table_renamed_away_and_back(
    hub: Hub,
    each_db: Database,
    install: Install,
    until_looked: Callable[[], None],
    start: Callable[..., None],
    install_orders: Callable[[], None],
) -> None:
    """Rows of the table that had its name for a while are in a Gap; it itself is heard again."""
    heard = Heard(hub, "orders")
    start(install=install)
    each_db(f"ALTER TABLE orders RENAME TO away; CREATE TABLE orders {SHAPE}")
    eventually(hub.health, lambda health: "another" in health.reason or "away" in health.reason)
    lost_at = lose(each_db, "SELECT", "INSERT INTO orders (id) VALUES (1)")
    until_looked()
    each_db("DROP TABLE orders; ALTER TABLE away RENAME TO orders")
    heard.until_announced(lost_at)
    eventually(hub.health, lambda health: health.ready)
    each_db("INSERT INTO orders (id) VALUES (2)")
    assert heard.until("orders", 2) == [2]


@pytest.mark.usefixtures("by_triggers")
@pytest.mark.parametrize("install", ["check", "off"])
def test_a_disabled_trigger_and_a_lost_connection(
    hub: Hub,
    each_db: Database,
    connect: Callable[[str], Database],
    install: Install,
    until_looked: Callable[[], None],
    start: Callable[..., None],
    install_orders: Callable[[], None],
) -> None:
    """Whoever connects again knows still that events are missing, and announces them in the end."""
    heard = Heard(hub, "orders")
    start(install=install)
    first = lose(
        each_db,
        "ALTER TABLE orders DISABLE TRIGGER USER",
        "INSERT INTO orders (id) VALUES (1)",
    )
    eventually(hub.health, lambda health: "disabled" in health.reason)
    each_db(CUT)
    eventually(lambda: hub.status().reconnects, lambda count: count > 0)
    eventually(hub.health, lambda health: health.connected)
    assert "disabled" in hub.health().reason
    second = lose(each_db, "SELECT", "INSERT INTO orders (id) VALUES (2)")
    until_looked()
    each_db("ALTER TABLE orders ENABLE TRIGGER USER")
    heard.until_announced(first, second)
    eventually(hub.health, lambda health: health.ready)
    each_db("INSERT INTO orders (id) VALUES (3)")
    assert heard.until("orders", 3) == [3]


@pytest.mark.usefixtures("by_triggers")
@pytest.mark.parametrize("install", ["auto", "check"])
def test_a_trigger_that_is_disabled_while_a_hub_starts(
    hub: Hub,
    each_db: Database,
    monkeypatch: pytest.MonkeyPatch,
    install: Install,
    start: Callable[..., None],
    install_orders: Callable[[], None],
) -> None:
    """What is disabled after it was found installed is noticed by the first look."""
    begin = TriggerWatch.begin

    def begin_late(self: TriggerWatch, *args: Any, **options: Any) -> Any:
        monkeypatch.setattr(TriggerWatch, "begin", begin)
        each_db("ALTER TABLE orders DISABLE TRIGGER USER")
        return begin(self, *args, **options)

    heard = Heard(hub, "orders")
    monkeypatch.setattr(TriggerWatch, "begin", begin_late)
    start(install=install)
    if install == "check":
        eventually(hub.health, lambda health: "disabled" in health.reason)
        lost_at = lose(each_db, "SELECT", "INSERT INTO orders (id) VALUES (1)")
        each_db("ALTER TABLE orders ENABLE TRIGGER USER")
        heard.until_announced(lost_at)
    else:
        heard.gaps.wait(1)
    eventually(hub.health, lambda health: health.ready)
    each_db("INSERT INTO orders (id) VALUES (2)")
    assert heard.until("orders", 2) == [2]


# ---- what is no change ----


@pytest.mark.parametrize(
    "when",
    [
        "NEW.id = ANY ('{1,2}'::pg_catalog.oid[])",
        "NEW.id IN (1, 2) AND NEW.note <> '{pgsignals_tables}'",
        "NEW.id IN (1, 2) AND NEW.note <> $pgsignals$x$pgsignals$ AND NEW.note <> E'\\\\' -- $1",
    ],
    ids=["tables", "token", "quotes"],
)
def test_a_condition_that_looks_like_ours(
    hub: Hub, each_dsn: str, each_db: Database, delivery: Delivery, when: str
) -> None:
    """What a condition has in it is not mistaken for what installing fills in."""
    each_db("CREATE TABLE orders (id oid PRIMARY KEY, note text DEFAULT '')")
    heard = Heard(hub, "orders")
    watchers = [watch("orders", "inserted", when=when)]
    for turn, install in enumerate(("auto", "auto", "check")):
        hub.start(
            each_dsn,
            watchers,
            delivery=delivery,
            name=name_of(delivery),
            install=install,  # type: ignore[arg-type]
        )
        assert [(each.status, each.detail) for each in hub.status().watchers] == [(INSTALLED, "")]
        each_db("DELETE FROM orders; INSERT INTO orders VALUES (1), (2), (3)")
        heard.events["orders"].wait(2 * turn + 2)
        settle(hub)
        hub.stop()
    assert [event.id for event in heard.events["orders"].items] == 3 * [1, 2]
    assert heard.gaps.items == []


HARMLESS = (
    "VACUUM FULL orders",
    "ANALYZE orders",
    "CREATE INDEX CONCURRENTLY by_note ON orders (note)",
    "REINDEX TABLE orders",
    "CLUSTER orders USING orders_pkey",
    "COMMENT ON TABLE orders IS 'x'",
    "ALTER TABLE orders ADD COLUMN more int",
    "VACUUM FULL pg_trigger; VACUUM FULL pg_proc; VACUUM FULL pg_class; VACUUM FULL pg_depend",
    "VACUUM FREEZE pg_class, pg_trigger, pg_proc, pg_depend",
    "CREATE TABLE part_2 PARTITION OF parted FOR VALUES IN (2)",
    "ALTER TABLE parted DETACH PARTITION part_2",
    "ALTER TABLE parted ATTACH PARTITION part_2 FOR VALUES IN (2)",
    "CREATE TEMP TABLE mine () INHERITS (unwatched)",
)


@pytest.mark.parametrize("running", [False, True], ids=["down", "running"])
def test_what_is_no_reason_for_a_gap(
    hub: Hub,
    each_db: Database,
    running: bool,
    until_looked: Callable[[], None],
    start: Callable[..., None],
) -> None:
    """Maintenance, statistics, comments and new partitions lose nothing, and are no Gap."""
    each_db(
        f"CREATE TABLE orders {SHAPE}; CREATE TABLE unwatched (id int);"
        "CREATE TABLE parted (id int PRIMARY KEY) PARTITION BY LIST (id);"
        "CREATE TABLE part_1 PARTITION OF parted FOR VALUES IN (1)"
    )
    heard = Heard(hub, "orders", "parted")
    watchers = ["orders", "parted"]
    start(*watchers)
    if not running:
        hub.stop()
    for texts in HARMLESS:
        for statement in texts.split("; "):
            each_db(statement)
        if running:
            until_looked()
    if not running:
        start(*watchers)
        until_looked()
    each_db("INSERT INTO parted VALUES (2); INSERT INTO orders (id) VALUES (1)")
    heard.until("parted", 2)
    heard.until("orders", 1)
    assert heard.gaps.items == []
    assert hub.status().reconnects == 0


def test_a_temporary_child(
    hub: Hub,
    each_dsn: str,
    each_db: Database,
    connect: Callable[[str], Database],
    until_looked: Callable[[], None],
    start: Callable[..., None],
) -> None:
    """Where a session has a child of its own, the table itself is heard, and so is whoever asks."""
    each_db(f"CREATE TABLE orders {SHAPE}")
    heard = Heard(hub, "orders")
    start()
    other = connect(each_dsn)
    other("CREATE TEMP TABLE mine () INHERITS (orders)")
    until_looked()
    other("INSERT INTO mine (id) VALUES (1)")
    each_db("INSERT INTO orders (id) VALUES (2)")
    heard.until("orders", 2)
    assert hub.health().ready
    assert heard.gaps.items == []


def test_children_that_come_and_go_while_the_consumer_is_down(
    hub: Hub, each_dsn: str, each_db: Database
) -> None:
    """Rows that were a child's when they were written come; while it was none, they do not."""
    each_db(
        "CREATE TABLE orders (id int PRIMARY KEY); CREATE TABLE first () INHERITS (orders);"
        "CREATE TABLE second () INHERITS (orders)"
    )
    heard = Heard(hub, "orders")
    options: dict[str, Any] = {"delivery": "outbox", "name": "mailer"}
    hub.start(each_dsn, [("orders", "inserted")], **options)
    hub.stop()
    for statement in (
        "INSERT INTO first VALUES (1); DROP TABLE first",
        "INSERT INTO second VALUES (2)",
        "ALTER TABLE second NO INHERIT orders",
        "INSERT INTO second VALUES (3)",
        "ALTER TABLE second INHERIT orders",
        "INSERT INTO second VALUES (4)",
    ):
        each_db(statement)
    hub.start(each_dsn, [("orders", "inserted")], **options)
    each_db("INSERT INTO second VALUES (5)")
    assert heard.until("orders", 5) == [1, 2, 4, 5]
