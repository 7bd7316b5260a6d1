"""Two versions of an application side by side, an upgrade of the schema under them, and back."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import psycopg2
import pytest
from psycopg2.extensions import cursor as Cursor

import pgsignals
from pgsignals import DatabaseError
from pgsignals.hub.hub import Delivery
from pgsignals.outbox import schema
from pgsignals.outbox.privileges import missing_grants
from pgsignals.triggers.installer import Limits, prune
from tests import upgrade_program
from tests.conftest import DEADLINE, Database, Recorder
from tests.forked import run
from tests.upgrade_program import NEXT, Application
from tests.waiting import eventually

WITHOUT_RELEASE = "pgsignals: durable delivery, version 1"


class Version:
    """An application of one version: what it has heard, and how it is started and stopped."""

    def __init__(self) -> None:
        self.heard = Recorder()

    def start(self, dsn: str, **options: Any) -> None:
        """Return when it hears."""
        raise NotImplementedError

    def stop(self) -> None:
        """Return when it has ended."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop it in any case."""
        self.stop()

    @property
    def ids(self) -> set[int]:
        """The rows whose events it has heard."""
        return {word for kind, word in list(self.heard.items) if kind == "event"}

    @property
    def gaps(self) -> list[str]:
        """The reasons of the Gaps that it has heard."""
        return [word for kind, word in list(self.heard.items) if kind == "gap"]


class Old(Version):
    """One of the version that is tested, in this process."""

    def __init__(self) -> None:
        super().__init__()
        self._application = Application(self.heard)

    def start(self, dsn: str, **options: Any) -> None:
        self._application.start(dsn, **options)

    def stop(self) -> None:
        self._application.stop()


class New(Version):
    """One of the next version, in a process of its own, which outlives each start."""

    def __init__(self, *arguments: str) -> None:
        super().__init__()
        self._answers = Recorder()
        self._asked = 0
        self._process = subprocess.Popen(
            [sys.executable, upgrade_program.__file__, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._pump = threading.Thread(target=self._read)
        self._pump.start()

    def forget(self) -> None:
        """Begin another test."""
        self.heard = Recorder()

    def start(self, dsn: str, **options: Any) -> None:
        self._command("start", dsn=dsn, **options)

    def stop(self) -> None:
        self._command("stop")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(DEADLINE) == 0
        self._pump.join(DEADLINE)

    def _command(self, name: str, /, **options: Any) -> None:
        assert self._process.stdin is not None
        self._asked += 1
        self._process.stdin.write(json.dumps((name, options)) + "\n")
        self._process.stdin.flush()
        answer = self._answers.wait(self._asked)[-1]
        assert answer == ("done", name)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                words = tuple(json.loads(line))
                (self._answers if words[0] in ("done", "failed") else self.heard)(words)


@pytest.fixture(scope="module")
def next_program() -> Iterator[New]:
    """A process of the next version."""
    program = New()
    yield program
    program.close()


@pytest.fixture(scope="module")
def strange_program() -> Iterator[New]:
    """One whose triggers' descriptions the version that is tested cannot read."""
    program = New("strange")
    yield program
    program.close()


@pytest.fixture
def old() -> Iterator[Old]:
    """An application of the version that is tested."""
    version = Old()
    yield version
    version.stop()


@pytest.fixture
def new(next_program: New) -> Iterator[New]:
    """An application of the next version."""
    next_program.forget()
    yield next_program
    next_program.stop()


@pytest.fixture
def strange(strange_program: New) -> Iterator[New]:
    """The same of the one that cannot be read."""
    strange_program.forget()
    yield strange_program
    strange_program.stop()


@pytest.fixture(autouse=True)
def items(each_db: Database) -> None:
    """A table."""
    each_db("CREATE TABLE items (id bigserial PRIMARY KEY, note text)")


class Writers:
    """Threads that write until they are stopped; what fails, fails the test."""

    STATEMENTS = (
        "INSERT INTO items (note) VALUES ('one') RETURNING id",
        "INSERT INTO items (note) SELECT repeat('x', 300) FROM generate_series(1, 40) RETURNING id",
    )

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._lock = threading.Lock()
        self._written: list[int] = []
        self._failures: list[psycopg2.Error] = []
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=self._write, args=(s,)) for s in self.STATEMENTS]

    def __enter__(self) -> Writers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join()
        assert not self._failures

    @property
    def written(self) -> list[int]:
        """What has been committed by now."""
        with self._lock:
            return list(self._written)

    def write_on(self) -> None:
        """Return when each has written some more."""
        count = len(self.written)
        eventually(lambda: len(self.written), lambda now: now >= count + 100)

    def _write(self, statement: str) -> None:
        try:
            options = "-c lock_timeout=10s -c statement_timeout=20s"
            with closing(psycopg2.connect(self._dsn, options=options)) as connection:
                while not self._ending.is_set():
                    with connection.cursor() as cursor:
                        cursor.execute(statement)
                        keys = [key for (key,) in cursor.fetchall()]
                        connection.commit()
                    with self._lock:
                        self._written += keys
                    # So many that consumers keep up on a busy machine.
                    self._ending.wait(0.02)
        except psycopg2.Error as error:
            self._failures.append(error)


def options(delivery: Delivery) -> dict[str, Any]:
    """How both versions are started."""
    name = {} if delivery == "notify" else {"name": "mailer"}
    return {"delivery": delivery, **name}


def triggers(db: Database) -> set[str]:
    """Those that ``items`` has, or the marks that its rows are read from the log."""
    named = db("SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace")
    return {name for (name,) in named if name.startswith("pgsignals_")}


def wait_until_noted(db: Database, names: set[str]) -> None:
    """Wait until a consumer has noted that it relies on these triggers, and on no others."""
    noted = "SELECT json_object_keys(installation::json -> 'triggers') FROM pgsignals.consumers"
    eventually(lambda: {name for (name,) in db(noted)}, lambda found: found == names)


def prune_all(db: Database) -> set[str]:
    """Remove what nobody needs, as any start does; the triggers that went."""
    with db.connection.cursor() as cursor:
        return {item.name for item in prune(cursor, "default")}


@pytest.mark.parametrize("order", ["old first", "new first"])
def test_side_by_side_and_back(
    each_dsn: str, each_db: Database, delivery: Delivery, old: Old, new: New, order: str
) -> None:
    """Every row comes, no write fails, no trigger goes that is needed, in each order."""
    first, second = (old, new) if order == "old first" else (new, old)
    how = options(delivery) | {"heartbeat": 3600.0}

    def hear_all(version: Version, since: int) -> None:
        """Wait until the version that runs, or both together, have all rows since that many."""
        wanted = set(writers.written[since:])
        heard = (lambda: version.ids) if delivery == "notify" else (lambda: old.ids | new.ids)
        eventually(lambda: wanted - heard(), lambda missing: not missing)

    first.start(each_dsn, **how)
    own = triggers(each_db)
    with Writers(each_dsn) as writers:
        writers.write_on()
        second.start(each_dsn, **how)
        joined = len(writers.written)
        others = triggers(each_db) - own
        assert len(others) == len(own) == 1
        writers.write_on()
        hear_all(first, 0)
        assert prune_all(each_db) == set()
        first.stop()
        writers.write_on()
        hear_all(second, joined)
        if delivery == "outbox":
            wait_until_noted(each_db, others)
        # The first one comes back to find that its triggers have gone.
        gone = eventually(lambda: own - triggers(each_db) or prune_all(each_db), bool)
        assert gone == own
        second.stop()
        writers.write_on()
        assert prune_all(each_db) == (others if delivery == "notify" else set())
        first.start(each_dsn, **how)
        back = len(writers.written)
        assert triggers(each_db) >= own
        writers.write_on()
        hear_all(first, back)
    if delivery == "outbox":
        hear_all(first, 0)
        assert each_db("SELECT count(next) FROM pgsignals.outbox") == [(0,)]
    assert (old.gaps, new.gaps) == ([], [])


def test_partitions_among_both(each_dsn: str, each_db: Database, old: Old, new: New) -> None:
    """A consumer's parts are read by both versions, and by the one that is left when one ends."""
    how = options("outbox") | {"partitions": 2, "lease": 2.0}
    old.start(each_dsn, **how)
    with Writers(each_dsn) as writers:
        new.start(each_dsn, **how)
        eventually(lambda: (old.ids, new.ids), all)
        # Either needs its triggers, of which the parts in the database say so.
        assert prune_all(each_db) == set()
        writers.write_on()
        old.stop()
        writers.write_on()
    wanted = set(writers.written)
    eventually(lambda: wanted - (old.ids | new.ids), lambda missing: not missing)
    assert (old.gaps, new.gaps) == ([], [])


@pytest.mark.parametrize("order", ["old first", "new first"])
def test_a_window_that_was_read_in_part(
    each_dsn: str, each_db: Database, old: Old, new: New, order: str
) -> None:
    """Whoever reads on through other triggers skips nothing that its own have written."""
    first, second = (old, new) if order == "old first" else (new, old)
    how = options("outbox")
    for version in (first, second):
        version.start(each_dsn, **how)
        version.stop()
    # A statement fills several pages, first with what one trigger writes, then with the other's.
    first.start(each_dsn, hold=300, **how)
    each_db("INSERT INTO items (note) SELECT repeat('x', 3000) FROM generate_series(1, 400)")
    within = "SELECT last_id FROM pgsignals.consumers WHERE target IS NOT NULL AND last_id > 0"
    eventually(lambda: each_db(within), bool)
    first.stop()
    assert each_db(within)
    second.start(each_dsn, **how)
    eventually(lambda: set(range(1, 401)) - (old.ids | new.ids), lambda missing: not missing)
    assert (old.gaps, new.gaps) == ([], [])


def test_going_back_from_what_it_cannot_read(
    each_dsn: str, each_db: Database, old: Old, strange: New
) -> None:
    """What only a newer trigger wrote, in a form of its own, is a Gap; then events come again."""
    how = options("outbox")
    old.start(each_dsn, **how)
    own = triggers(each_db)
    old.stop()
    strange.start(each_dsn, **how)
    each_db("INSERT INTO items DEFAULT VALUES")
    strange.heard.wait_until(lambda item: item == ("event", 1))
    wait_until_noted(each_db, triggers(each_db) - own)
    assert prune_all(each_db) == own
    strange.stop()
    each_db("INSERT INTO items DEFAULT VALUES")
    old.start(each_dsn, **how)
    each_db("INSERT INTO items DEFAULT VALUES")
    heard = old.heard.wait_until(lambda item: item == ("event", 3))
    assert heard == [("gap", "retention"), ("event", 3)]
    # Until its position, as it is saved, lies behind its trigger's beginning for sure.
    behind = "SELECT 1 FROM pgsignals.consumers, pgsignals.channels HAVING min(floor) >= max(made)"
    eventually(lambda: each_db("INSERT INTO items DEFAULT VALUES") or each_db(behind), bool)
    old.stop()
    # Nor is it a Gap where its own trigger was there all the time.
    strange.start(each_dsn, **how)
    strange.stop()
    [(last,)] = each_db("INSERT INTO items DEFAULT VALUES RETURNING id")
    old.start(each_dsn, **how)
    heard = old.heard.wait_until(lambda item: item == ("event", last))
    assert [item for item in heard if item[0] == "gap"] == [("gap", "retention")]


def add_next(monkeypatch: pytest.MonkeyPatch, upgrade: schema.Upgrade = NEXT) -> None:
    """Let this process know the next version of the schema."""
    monkeypatch.setattr(schema, "UPGRADES", (*schema.UPGRADES, upgrade))
    monkeypatch.setattr(schema, "VERSION", upgrade.version)


def install_schema(db: Database, limits: Limits) -> None:
    """As ``pgsignals install`` does, in a connection of its own."""
    with closing(psycopg2.connect(db.dsn)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            schema.install_schema(cursor, limits)


def test_an_upgrade_behind_a_long_transaction(
    each_dsn: str,
    each_db: Database,
    connect: Callable[[str], Database],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """While it waits for a writer that takes long, others write on; no event is lost."""
    caplog.set_level(logging.INFO)
    recorder = Recorder()
    with pgsignals.Hub() as hub:
        hub.subscribe(recorder, "items")
        hub.on_gap(recorder)
        hub.start(each_dsn, ["items"], delivery="outbox")
        writer = connect(each_dsn)
        writer("BEGIN; INSERT INTO items DEFAULT VALUES")
        add_next(monkeypatch)
        # Much longer than any other writer has to wait, and so than it would have the patience for.
        upgrade = threading.Thread(target=install_schema, args=(each_db, Limits(2.0, DEADLINE)))
        each_db("SET statement_timeout TO '1s'; SET lock_timeout TO '1s'")
        upgrade.start()

        def tries() -> int:
            return sum("trying again" in record.message for record in caplog.records)

        written = 1
        while not tries():
            each_db("INSERT INTO items DEFAULT VALUES")
            written += 1
        assert upgrade.is_alive()
        writer("COMMIT")
        upgrade.join(DEADLINE)
        assert not upgrade.is_alive()
        each_db("INSERT INTO items DEFAULT VALUES")
        keys = {event.id for event in recorder.wait(written + 1)}
        assert keys == set(range(1, written + 2))
        assert hub.status().reconnects == 0
    assert each_db("SELECT next FROM pgsignals.consumers") == []


def test_a_writer_of_little_patience(
    each_dsn: str, each_db: Database, old: Old, connect: Callable[[str], Database]
) -> None:
    """Its write succeeds beside an upgrade that takes longer; what it wrote is a Gap."""
    old.start(each_dsn, **options("outbox"))
    upgrader = connect(each_dsn)
    upgrader("BEGIN; LOCK TABLE pgsignals.outbox IN ACCESS EXCLUSIVE MODE")
    each_db("SET lock_timeout TO '20ms'")
    each_db("INSERT INTO items DEFAULT VALUES")
    upgrader("COMMIT")
    each_db("INSERT INTO items DEFAULT VALUES")
    # The loss may be announced once more, before the event or after it.
    old.heard.wait_until(("event", 2).__eq__)
    old.heard.wait_until(("gap", "retention").__eq__)
    assert set(old.heard.items) == {("gap", "retention"), ("event", 2)}


def test_an_upgrade_while_a_consumer_is_down(
    each_dsn: str, each_db: Database, old: Old, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not taken for somebody's change of the rights: the events come, and no Gap."""
    how = options("outbox")
    old.start(each_dsn, **how)
    old.stop()
    with monkeypatch.context() as patch:
        add_next(patch)
        install_schema(each_db, Limits())
    each_db("INSERT INTO items DEFAULT VALUES")
    old.start(each_dsn, **how)
    assert old.heard.wait(1) == [("event", 1)]


def test_a_step_that_older_programs_cannot_take(
    each_dsn: str, each_db: Database, old: Old, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits until they have ended, and then keeps them from starting, with what to do."""
    how = options("outbox")
    old.start(each_dsn, **how)
    with monkeypatch.context() as patch:
        add_next(patch, schema.Upgrade(NEXT.version, NEXT.version, NEXT.statements, NEXT.outbox))
        with pytest.raises(DatabaseError, match="Stop those programs"):
            install_schema(each_db, Limits())
        old.stop()
        install_schema(each_db, Limits())
    with pytest.raises(DatabaseError, match="Start the newer pgsignals again"):
        old.start(each_dsn, **how)
    with pytest.raises(psycopg2.Error, match="cannot work"):
        each_db(schema.ensuring_statement())


def test_grants_of_an_older_program(each_db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs no right on a table that it does not know, and the newer one says which."""
    install_schema(each_db, Limits())
    each_db("CREATE ROLE reader")

    @contextmanager
    def as_reader() -> Iterator[Cursor]:
        with each_db.connection.cursor() as cursor:
            cursor.execute("SET ROLE reader")
            try:
                yield cursor
            finally:
                cursor.execute("RESET ROLE")

    try:
        with as_reader() as cursor:
            grants = missing_grants(cursor)
        each_db("; ".join(grants))
        with monkeypatch.context() as patch:
            add_next(patch)
            install_schema(each_db, Limits())
            with as_reader() as cursor:
                [missing] = missing_grants(cursor)
        assert missing == 'GRANT SELECT ON TABLE "pgsignals"."next" TO "reader"'
        with as_reader() as cursor:
            assert missing_grants(cursor) == []
    finally:
        each_db("DROP OWNED BY reader; DROP ROLE reader")


def test_what_was_before_the_first_release(each_dsn: str, each_db: Database) -> None:
    """Everything that would use it says what to run, and that leads to the present version."""
    with pgsignals.Hub() as hub:
        hub.start(each_dsn, ["items"], **options("outbox"))
    former = triggers(each_db)
    each_db(f"COMMENT ON SCHEMA pgsignals IS '{WITHOUT_RELEASE}'")
    for install in ("auto", "check"):
        with pytest.raises(DatabaseError, match="pgsignals uninstall --schema"):
            pgsignals.Hub().start(each_dsn, ["items"], delivery="outbox", install=install)
    said = run("sql", "items", "--delivery", "outbox", dsn=each_dsn)
    assert said.code == 1
    assert "pgsignals uninstall --schema" in said.err[0]
    with pytest.raises(psycopg2.Error, match="cannot work"):
        each_db(schema.ensuring_statement())
    assert run("uninstall", "--schema", "--yes", dsn=each_dsn).code == 0
    assert triggers(each_db) == set()
    with pgsignals.Hub() as hub:
        hub.start(each_dsn, ["items"], **options("outbox"))
    assert triggers(each_db) == former


def test_pruning_by_hand(each_dsn: str, each_db: Database, old: Old, new: New) -> None:
    """``pgsignals install --prune`` removes what a former version has left, and nothing else."""
    how = options("notify")
    new.start(each_dsn, prune=False, **how)
    former = triggers(each_db)
    old.start(each_dsn, prune=False, **how)
    own = triggers(each_db) - former
    watched = ("install", "items:inserted", "--prune")
    assert not any("removed" in line for line in run(*watched, dsn=each_dsn).out)
    new.stop()
    told = run(*watched, dsn=each_dsn).out
    assert told[-2] == "removed inserted on public.items"
    assert own <= triggers(each_db)
    assert not former & triggers(each_db)
