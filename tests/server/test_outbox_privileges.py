"""Who may do what in outbox delivery, and what those try who may not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
from psycopg2 import errors as pg
from psycopg2 import sql

import pgsignals
from pgsignals import Hub, watch
from pgsignals.consumers import dead_letters
from pgsignals.core.transport import Transport
from pgsignals.core.watchers import normalize
from pgsignals.outbox import administration
from pgsignals.outbox.housekeeping import tidy
from pgsignals.resolvers import BUILTIN
from pgsignals.triggers import names
from pgsignals.triggers.definitions import define
from pgsignals.triggers.installer import install
from tests.conftest import Database, Recorder
from tests.forked import run
from tests.grants import documented_grants
from tests.waiting import eventually


@pytest.fixture
def role(db: Database) -> Iterator[str]:
    """The name of a role that has no right at all; its objects go at the end."""
    name = f"role_{db.connection.info.dbname}"
    db(f"CREATE ROLE {name} LOGIN")
    yield name
    db(f"RESET ROLE; DROP OWNED BY {name} CASCADE; DROP ROLE {name}")


@pytest.fixture
def as_role(dsn: str, role: str, connect: Callable[[str], Database]) -> Database:
    """A session of that role."""
    return connect(dsn.replace("postgres@", f"{role}@"))


@pytest.fixture(autouse=True)
def orders(db: Database) -> None:
    """A table of orders."""
    db("CREATE TABLE orders (id bigint PRIMARY KEY, note text)")


@pytest.fixture
def writer(hub: Hub, dsn: str, db: Database, role: str, as_role: Database) -> Database:
    """A session that may write to a watched table, and nothing else."""
    hub.start(dsn, ["orders"], delivery="outbox", name="mailer")
    db(f"GRANT SELECT, INSERT, UPDATE, DELETE ON orders TO {role}")
    return as_role


def test_a_writer_writes(hub: Hub, writer: Database, recorder: Recorder) -> None:
    """A role with DML on the table alone is heard."""
    hub.subscribe(recorder, "orders")
    writer("INSERT INTO orders VALUES (1); UPDATE orders SET id = 2; DELETE FROM orders")
    assert [event.op for event in recorder.wait(3)] == ["inserted", "updated", "deleted"]


def test_a_writer_has_no_right_on_the_schema(db: Database, writer: Database) -> None:
    """It cannot read, write, or count up anything there, nor see what is in it."""
    relations = db(
        "SELECT relkind, relname FROM pg_class"
        " WHERE relnamespace = 'pgsignals'::regnamespace AND relkind IN ('r', 'p', 'S')"
    )
    assert len(relations) > 20
    for kind, name in relations:
        attempts = ["SELECT * FROM {}", "DELETE FROM {}", "TRUNCATE {}"]
        if kind == "S":
            attempts = ["SELECT last_value FROM {}", "SELECT nextval({})", "SELECT setval({}, 1)"]
        for attempt in attempts:
            place = sql.Identifier("pgsignals", name)
            if "val(" in attempt:
                place = sql.Literal(f"pgsignals.{name}")
            with pytest.raises(pg.InsufficientPrivilege):
                writer(sql.SQL(attempt).format(place))
    with pytest.raises(pg.InsufficientPrivilege):
        writer("INSERT INTO pgsignals.outbox VALUES (1, 1, 1, 1, 0, 'forged')")


def test_even_with_the_schema_opened(db: Database, role: str, writer: Database) -> None:
    """USAGE on the schema, by which names there are found, opens nothing that is in it."""
    db(f"GRANT USAGE ON SCHEMA pgsignals TO {role}")
    for attempt in (
        "SELECT pgsignals.has_room()",
        "SELECT pgsignals.put(1, 1, 1, 1, 0, 'forged', true)",
        "SELECT * FROM pgsignals.outbox",
        "SELECT * FROM pgsignals.outbox_0",
        "INSERT INTO pgsignals.outbox VALUES (1, 1, 1, 1, 0, 'forged')",
        "UPDATE pgsignals.consumers SET snapshot = '1:1:'",
        "SELECT nextval('pgsignals.outbox_id')",
        "SELECT setval('pgsignals.outbox_full', 1)",
        "CREATE FUNCTION pgsignals.has_room(int) RETURNS int LANGUAGE sql AS 'SELECT 1'",
    ):
        with pytest.raises(pg.InsufficientPrivilege):
            writer(attempt)


_TRAP = """
CREATE TABLE seen (who text);
GRANT INSERT ON seen TO PUBLIC;
CREATE TYPE trap AS ENUM ('a', 'b');
CREATE FUNCTION spring(trap) RETURNS text LANGUAGE plpgsql
  AS $$BEGIN INSERT INTO public.seen VALUES (current_user); RETURN 'a'; END$$;
CREATE CAST (trap AS text) WITH FUNCTION spring(trap) AS IMPLICIT
"""


def test_functions_are_nobody_elses(db: Database, writer: Database) -> None:
    """The trigger functions run as their owner, and for nothing but the table they were made for.

    Whoever adds a partition must have the right to execute them.
    """
    functions = db(
        "SELECT proname, prosecdef, proconfig FROM pg_proc WHERE proname LIKE 'pgsignals\\_%'"
    )
    assert len(functions) == 3
    db(_TRAP)
    for name, definer, config in functions:
        assert definer
        # They qualify what they use, which costs a writer less than setting its search_path.
        assert config is None
        with pytest.raises(pg.FeatureNotSupported, match="only be called as triggers"):
            writer(f"SELECT {name}()")
        with pytest.raises(pg.InsufficientPrivilege):
            writer(f"ALTER FUNCTION {name}() SECURITY INVOKER")
        for kind in ("", " PARTITION BY LIST (id)"):
            writer(f"CREATE TEMP TABLE own (id bigint, note trap){kind}")
            if kind:
                writer("CREATE TEMP TABLE part PARTITION OF own DEFAULT")
            for event in ("INSERT", "UPDATE", "DELETE"):
                writer(
                    f"CREATE TRIGGER {event} AFTER {event} ON own FOR EACH ROW"
                    f" EXECUTE FUNCTION {name}()"
                )
            writer("INSERT INTO own VALUES (1, 'a')")
            writer("UPDATE own SET note = 'b'")
            writer("DELETE FROM own")
            writer("DROP TABLE own")
    assert db("SELECT count(*) FROM pgsignals.outbox") == [(0,)]
    assert db("SELECT last_value FROM pgsignals.outbox_shed") == [(0,)]
    assert db("SELECT who FROM seen") == []


# What is called without being looked up.
_SYNTAX = {
    "and",
    "any",
    "as",
    "case",
    "elsif",
    "else",
    "coalesce",
    "exists",
    "filter",
    "from",
    "if",
    "in",
    "join",
    "not",
}
_SYNTAX |= {"operator", "or", "over", "position", "substring", "then", "values", "when", "where"}


@pytest.mark.parametrize("replicated", [False, True], ids=["statement", "row"])
def test_functions_qualify_all_that_they_use(
    hub: Hub, dsn: str, db: Database, replicated: bool
) -> None:
    """No function, type or operator is looked up by its bare name, in whichever branch."""
    db("CREATE TABLE wide (id bigint, at timestamptz, note text, PRIMARY KEY (id, at))")
    options = {"extra": ["note"], "replicated": replicated}
    watchers = [
        watch("wide", "inserted", "deleted", **options),
        watch("wide", "updated", columns=["note"], **options),
    ]
    hub.start(dsn, watchers, delivery="outbox", name="mailer")
    sources = db(
        "SELECT p.prosrc FROM pg_proc p JOIN pg_trigger t ON t.tgfoid = p.oid"
        " WHERE t.tgrelid = 'wide'::regclass"
    )
    assert len(sources) == 3
    for (source,) in sources:
        code = re.sub(r"--.*|E?'(?:[^']|'')*'", "''", source).lower()
        assert (
            not set(re.findall(r"(?<![\w.])([a-z_]\w*) *\(", code))
            - _SYNTAX
            - {"pgs_new", "pgs_each"}
        )
        assert not re.findall(r"::(?!pg_catalog\.)\w+", code)
        bare = re.sub(r"operator\(pg_catalog\.[^)]+\)|:=|[(,] *-\d+\)", "", code)
        assert not re.findall(r"[-+*/<>=~|!%^&]+", re.sub(r"\(\*\)|, \*", "", bare))


_DECOYS = """
CREATE TEMP TABLE outbox (id bigint, txid bigint, channel bigint, segment smallint, payload text);
CREATE TEMP TABLE pgs_new (id bigint, note text);
CREATE TEMP TABLE pgs_old (id bigint, note text);
CREATE TEMP TABLE orders (id bigint PRIMARY KEY, note text);
CREATE TEMP SEQUENCE outbox_id;
CREATE TEMP SEQUENCE outbox_segment;
INSERT INTO pgs_new VALUES (666);
CREATE DOMAIN pg_temp.text AS varchar(1);
CREATE DOMAIN pg_temp.int8 AS bool;
CREATE FUNCTION pg_temp.nextval(regclass) RETURNS bigint LANGUAGE plpgsql
  AS 'BEGIN RAISE ''shadow''; END';
CREATE FUNCTION pg_temp.steal(text, text) RETURNS bool LANGUAGE plpgsql
  AS 'BEGIN RAISE ''shadow''; END';
CREATE OPERATOR pg_temp.= (LEFTARG = text, RIGHTARG = text, FUNCTION = pg_temp.steal);
CREATE OPERATOR pg_temp.|| (LEFTARG = text, RIGHTARG = text, FUNCTION = pg_temp.steal);
SET search_path TO pg_temp, pg_catalog, public
"""


@pytest.mark.parametrize("when", [None, "NEW.note = 'a' AND EXISTS (SELECT FROM wanted)"])
def test_temporary_objects_of_a_writer(
    hub: Hub,
    dsn: str,
    db: Database,
    role: str,
    as_role: Database,
    recorder: Recorder,
    when: str | None,
) -> None:
    """Nothing that a writer makes in pg_temp, put first, stands for what the triggers use."""
    db("CREATE TABLE wanted (id int); INSERT INTO wanted VALUES (1)")
    watcher = watch("orders", "inserted", "updated", extra=["note"], when=when)
    hub.subscribe(recorder, "orders")
    hub.start(dsn, [watcher], delivery="outbox", name="mailer")
    db(f"GRANT SELECT, INSERT, UPDATE ON orders TO {role}")
    as_role(_DECOYS)
    as_role("CREATE TEMP TABLE wanted (id int)")
    as_role("INSERT INTO public.orders VALUES (1, 'a')")
    as_role("UPDATE public.orders SET id = 2")
    assert [(event.op, event.id, event.values) for event in recorder.wait(2)] == [
        ("inserted", 1, {"note": "a"}),
        ("updated", 2, {"note": "a"}),
    ]
    assert as_role("SELECT pg_catalog.count(*) FROM pg_temp.outbox") == [(0,)]


def test_locks_of_anybody(
    db: Database, writer: Database, connect: Callable[[str], Database]
) -> None:
    """Whoever holds every advisory lock that there is holds up no writer, and loses no event."""
    taken = connect(writer.dsn)
    locks = (names.AWAKE_LOCK, names.ALIVE_LOCK, names.HOUSEKEEPING_LOCK, names.INSTALL_LOCK)
    for lock in locks:
        taken(
            "SELECT pg_try_advisory_lock(%s, %s), pg_try_advisory_lock_shared(%s, %s)",
            [names.LOCK_CLASS, lock, names.LOCK_CLASS, lock],
        )
    writer("SET statement_timeout TO '10s'; INSERT INTO orders VALUES (1)")
    assert db("SELECT count(*) FROM pgsignals.outbox") == [(1,)]


def test_what_a_condition_may_do(
    hub: Hub, dsn: str, db: Database, role: str, as_role: Database, recorder: Recorder
) -> None:
    """A condition runs with the rights of who installed it, and knows the writer as session_user.

    It reads what the writer may not, and current_user is not the writer.
    """
    db("CREATE TABLE secrets (id int); INSERT INTO secrets VALUES (1)")
    hub.start(
        dsn,
        [
            watch("orders", "inserted", when="EXISTS (SELECT FROM secrets)", label="reads"),
            watch("orders", "inserted", when=f"session_user = '{role}'", label="session"),
            watch("orders", "inserted", when=f"current_user = '{role}'", label="current"),
        ],
        delivery="outbox",
        name="mailer",
    )
    hub.subscribe(recorder, "reads")
    hub.subscribe(recorder, "session")
    hub.subscribe(recorder, "current")
    db(f"GRANT INSERT ON orders TO {role}")
    as_role("INSERT INTO orders VALUES (1)")
    assert {event.label for event in recorder.wait(2)} == {"reads", "session"}


def test_a_superuser_does_not_lend_its_rights(dsn: str, db: Database, role: str) -> None:
    """On a table of another role it installs as that role, and is told how, or not at all."""
    Hub().start(dsn, ["orders"], delivery="outbox").stop()
    db(f"GRANT CREATE ON SCHEMA public TO {role}")
    for grant in documented_grants("installer"):
        db(f"GRANT {grant} TO {role}")
    db(f"CREATE TABLE theirs (id int PRIMARY KEY, note text); ALTER TABLE theirs OWNER TO {role}")
    before = db("SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'pgsignals%'")
    with pytest.raises(pgsignals.PrivilegeError, match=f"options=-crole%3D{role} to") as caught:
        Hub().start(dsn, ["theirs"], delivery="outbox")
    assert db("SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'pgsignals%'") == before
    Hub().start(dsn, ["theirs"], namespace="notify").stop()
    [option] = re.findall(r"options=\S+", str(caught.value))
    installed = run("install", "theirs", "--delivery", "outbox", dsn=f"{dsn}?{option}")
    assert installed.out[-1] == "3 triggers installed, 0 already there."


_CAST = f"{_TRAP}; ALTER TABLE theirs ALTER n TYPE trap USING 'a'"


def test_the_owner_of_a_table_gains_nothing(
    dsn: str, db: Database, role: str, as_role: Database, recorder: Recorder, hub: Hub
) -> None:
    """Casts of a type that the owner puts under a trigger run with the rights of that owner."""
    Hub().start(dsn, ["orders"], delivery="outbox").stop()
    db(f"GRANT CREATE ON SCHEMA public TO {role}")
    for grant in documented_grants("installer"):
        db(f"GRANT {grant} TO {role}")
    as_role("CREATE TABLE theirs (id int PRIMARY KEY, note text, n int)")
    watcher = watch("theirs", extra=["note", "n"])
    hub.subscribe(recorder, "theirs")
    as_owner = f"{dsn}?options=-crole%3D{role}"
    for grant in documented_grants("consumer"):
        db(f"GRANT {grant} TO {role}")
    hub.start(as_owner, [watcher], delivery="outbox", name="mailer")
    as_role("INSERT INTO theirs VALUES (1, 'a')")
    assert recorder.wait(1)[0].values == {"note": "a", "n": None}
    as_role(_CAST)
    db("INSERT INTO theirs VALUES (2, 'b', 'a')")
    assert set(db("SELECT who FROM seen")) == {(role,)}


def test_an_installer_that_may_not_even_read(dsn: str, db: Database, role: str) -> None:
    """TRIGGER on a table of somebody else is enough, and a warning says whose rights are lent."""
    Hub().start(dsn, ["orders"], delivery="outbox").stop()
    owner = f"owner_{db.connection.info.dbname}"
    db(f"CREATE ROLE {owner}; CREATE TABLE theirs (id int PRIMARY KEY)")
    try:
        db(f"ALTER TABLE theirs OWNER TO {owner}; GRANT TRIGGER ON theirs TO {role}")
        db(f"GRANT CREATE ON SCHEMA public TO {role}")
        for grant in documented_grants("installer"):
            db(f"GRANT {grant} TO {role}")
        as_role = dsn.replace("postgres@", f"{role}@")
        installed = run("install", "theirs", "--delivery", "outbox", dsn=as_role)
        assert installed.code == 0
        assert f"rights of the role '{role}'" in installed.err[0]
        db("INSERT INTO theirs VALUES (1)")
        assert db("SELECT count(*) FROM pgsignals.outbox") == [(1,)]
        db(f"SET ROLE {role}")
        assert db("SELECT pgsignals.has_room()") == [(True,)]
    finally:
        db(f"RESET ROLE; DROP OWNED BY {owner} CASCADE; DROP ROLE {owner}")


def test_an_installer_that_lacks_a_right(
    dsn: str, db: Database, role: str, as_role: Database
) -> None:
    """Whatever right on the outbox it lacks, nothing is installed that would make writes fail."""
    Hub().start(dsn, ["orders"], delivery="outbox").stop()
    db(f"GRANT CREATE ON SCHEMA public TO {role}")
    grants = documented_grants("installer")

    def install_on(table: str) -> None:
        with as_role.connection.cursor() as cursor:
            definitions = define(cursor, normalize([table]), BUILTIN, "default", Transport.OUTBOX)
            install(cursor, "default", [each.trigger for each in definitions])

    for left_out, lacking in enumerate(grants):
        as_role(f"CREATE TABLE theirs_{left_out} (id int PRIMARY KEY)")
        db(f"REVOKE ALL ON SCHEMA pgsignals FROM {role}")
        for kind in ("TABLES", "SEQUENCES", "FUNCTIONS"):
            db(f"REVOKE ALL ON ALL {kind} IN SCHEMA pgsignals FROM {role}")
        for grant in grants:
            if grant != lacking:
                db(f"GRANT {grant} TO {role}")
        with pytest.raises(pgsignals.PrivilegeError) as caught:
            install_on(f"theirs_{left_out}")
        [fix] = re.findall(r"pgsignals run: (.*)\.$", str(caught.value))
        db(fix)
        install_on(f"theirs_{left_out}")
        db(f"INSERT INTO theirs_{left_out} VALUES (1)")
    assert db("SELECT count(*) FROM pgsignals.outbox") == [(len(grants),)]


def test_an_installer_tells_consumers_what_they_missed(
    hub: Hub, dsn: str, db: Database, role: str, as_role: Database, recorder: Recorder
) -> None:
    """With exactly the documented rights, creating a trigger that was missing gives them a Gap."""
    hub.on_gap(recorder)
    db(f"GRANT CREATE ON SCHEMA public TO {role}")
    theirs = "CREATE TABLE theirs (id int PRIMARY KEY)"
    as_role(theirs)
    Hub().start(dsn, ["orders"], delivery="outbox").stop()
    for grant in documented_grants("installer"):
        db(f"GRANT {grant} TO {role}")
    as_installer = dsn.replace("postgres@", f"{role}@")
    install = ("install", "theirs", "--delivery", "outbox")
    assert run(*install, dsn=as_installer).code == 0
    consumer = {"delivery": "outbox", "name": "mailer", "install": "check"}
    with hub.start(dsn, ["theirs"], **consumer):
        pass
    as_role(f"DROP TABLE theirs; {theirs}; INSERT INTO theirs VALUES (1)")
    installed = run(*install, dsn=as_installer)
    assert installed.code == 0
    hub.start(dsn, ["theirs"], **consumer)
    assert [gap.reason for gap in recorder.wait(1)] == ["retention"]


@pytest.fixture
def consumer(dsn: str, db: Database, role: str, as_role: Database) -> Database:
    """A session of a role with exactly the rights that the documentation gives a consumer."""
    Hub().start(dsn, ["orders"], delivery="outbox").stop()
    for grant in documented_grants("consumer"):
        db(f"GRANT {grant} TO {role}")
    return as_role


def test_the_documented_grants_of_a_consumer(
    hub: Hub, db: Database, consumer: Database, recorder: Recorder
) -> None:
    """With them it reads, acknowledges, shares partitions, buries, delivers again and tidies up."""
    broken = True

    @hub.on("orders", "inserted", retries=0)
    def receive(event: pgsignals.Event) -> None:
        if broken and event.id == 1:
            raise ValueError("poison")
        recorder(event)

    db("INSERT INTO orders VALUES (0)")
    hub.start(
        consumer.dsn,
        ["orders"],
        delivery="outbox",
        name="mailer",
        partitions=2,
        install="check",
    )
    db("INSERT INTO orders VALUES (1), (2)")
    assert recorder.wait(1)[0].id == 2
    eventually(lambda: db("SELECT consumer FROM pgsignals.dead_letters"), lambda rows: bool(rows))
    broken = False
    with consumer.connection.cursor() as cursor:
        assert dead_letters.retry(cursor, None) == 1
        assert recorder.wait(2)[1].id == 1
        eventually(lambda: db("SELECT FROM pgsignals.dead_letters"), lambda rows: not rows)
        eventually(
            lambda: db("SELECT sum(acknowledged) FROM pgsignals.consumers"),
            lambda rows: rows == [(2,)],
        )
        # The partition is turned, and then emptied since all is acknowledged.
        assert tidy(cursor, segment_bytes=0) == []
        db("INSERT INTO orders VALUES (3)")
        recorder.wait(3)
        eventually(lambda: tidy(cursor, segment_bytes=0), lambda emptied: emptied == [0])
        hub.stop()
        administration.reset_consumer(cursor, "mailer", "now")
        administration.drop_consumer(cursor, "mailer")


def test_once_and_backfills_of_a_consumer(consumer: Database) -> None:
    """It may record that an event is taken care of, and how far a backfill has come."""
    consumer("INSERT INTO pgsignals.processed (scope, uid) VALUES ('a', 'b')")
    for table in ("backfills", "backfill_parts"):
        for privilege in ("SELECT", "INSERT", "UPDATE", "DELETE"):
            assert consumer(
                "SELECT has_table_privilege(%s, %s)", [f"pgsignals.{table}", privilege]
            ) == [(True,)]


def test_what_a_consumer_may_not(consumer: Database) -> None:
    """A consumer forges no event, changes no cap and no definition, and installs nothing."""
    for attempt in (
        "INSERT INTO pgsignals.outbox VALUES (1, 1, 1, 1, 0, 'forged')",
        "UPDATE pgsignals.outbox SET payload = 'forged'",
        "UPDATE pgsignals.settings SET retention_seconds = 1",
        "INSERT INTO pgsignals.channels VALUES (1, 1, 1, '{}')",
        "CREATE TABLE pgsignals.mine (id int)",
        "DROP SCHEMA pgsignals CASCADE",
    ):
        with pytest.raises(pg.InsufficientPrivilege):
            consumer(attempt)
    with pytest.raises(pgsignals.PrivilegeError):
        Hub().start(consumer.dsn, [("orders", "truncated")], delivery="outbox")


def test_a_consumer_without_grants_is_told_which(
    hub: Hub, dsn: str, db: Database, role: str, recorder: Recorder
) -> None:
    """A role that may not read the outbox gets the GRANTs, and with them it reads."""
    with Hub().start(dsn, ["orders"], delivery="outbox", name="owner"):
        pass
    hub.subscribe(recorder, "orders")
    start = {"delivery": "outbox", "name": "mailer", "install": "check"}
    theirs = dsn.replace("postgres@", f"{role}@")
    with pytest.raises(pgsignals.PrivilegeError, match="cannot be a consumer") as caught:
        hub.start(theirs, ["orders"], **start)  # type: ignore[arg-type]
    [grants] = re.findall(r"run: (.*)\.$", str(caught.value))
    db(grants)
    hub.start(theirs, ["orders"], **start)  # type: ignore[arg-type]
    db("INSERT INTO orders VALUES (1)")
    assert recorder.wait(1)[0].id == 1
