"""Fixtures: real servers, fresh databases, a Hub that is stopped, events to wait for."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
import uuid
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, get_args

import psycopg2
import pytest
from hypothesis import HealthCheck, settings
from psycopg2.extensions import connection as Connection
from psycopg2.extensions import parse_dsn
from psycopg2.sql import SQL, Identifier

import pgsignals
from pgsignals.consumers.log import Poll
from pgsignals.hub.hub import Delivery
from pgsignals.outbox.log import OutboxLog
from pgsignals.sources.trigger_watch import TriggerWatch
from pgsignals.testing import Server, find_installations
from pgsignals.triggers import definitions
from tests.brokers import ODD_PASSWORD, PASSWORD, Kafka, Nats, tls_files
from tests.missing import Missing, missing
from tests.waiting import DEADLINE as DEADLINE

OLDEST, NEWEST = 15, 18
VERSIONS = [OLDEST, NEWEST]

# One version for all tests, the programs that they start included.
if (only := os.environ.get("PGSIGNALS_TEST_POSTGRES")) is not None:
    VERSIONS = [int(only)]
    os.environ["PGSIGNALS_POSTGRES_BIN"] = str(Server(int(only)).installation.bindir)

# How long an example takes is the machine's affair: a busy one failed tests at random.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")


# Started in the background by a shell, this process ignores Ctrl-C, and so would all that it
# starts; what has a handler here has the default there.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Compiled anew for each program that a test starts, the library takes half as long again to import.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# A database a test is gigabytes of files; the disk of a busy machine took half of the tests' time.
MEMORY = Path("/dev/shm")
MEMORY_NEEDED = 4 << 30


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let `make test` take its turn of what is tested with several versions of PostgreSQL."""
    parser.addoption(
        "--turn",
        type=int,
        metavar="N",
        help="run each test that there is for several versions of PostgreSQL with one: half with "
        "the oldest, half with the newest, and the other way round for the next N",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what has its turn another time."""
    turn: int | None = config.getoption("turn")
    if turn is None:
        return
    chosen, left = [], []
    for item in items:
        call: Any = getattr(item, "callspec", None)
        version = None if call is None else call.params.get("each_version")
        others = item.nodeid.replace(f"pg{version}", "")
        now = VERSIONS[(zlib.crc32(others.encode()) + turn) % len(VERSIONS)]
        (chosen if version in (None, now) else left).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = chosen


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    call: pytest.CallInfo[None],
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Give all that one missing program has skipped the same place, and so a line together."""
    report = yield
    if call.excinfo is not None and isinstance(call.excinfo.value, Missing):
        place = call.excinfo.traceback[-1]
        reason = f"Skipped: {call.excinfo.value.msg}"
        report.longrepr = str(place.path), place.lineno + 1, reason
    return report


def _threads() -> set[threading.Thread]:
    return {each for each in threading.enumerate() if each.name.startswith("pgsignals")}


@pytest.fixture(autouse=True)
def _threads_end() -> Iterator[None]:
    """Have nothing of ours run on behind a test, where another would see it.

    A stop() that is out of time leaves a thread to end with the call that it is in.
    """
    before = _threads()
    yield
    # One that ends may have started others.
    while left := _threads() - before:
        for thread in left:
            thread.join(DEADLINE)
            assert not thread.is_alive(), f"{thread.name} runs on behind the test"


def _in_memory() -> Path | None:
    try:
        return MEMORY if shutil.disk_usage(MEMORY).free > MEMORY_NEEDED else None
    except FileNotFoundError:
        return None


_SETTINGS = {
    "max_connections": "200",
    "wal_level": "logical",
    "max_replication_slots": "50",
    "max_wal_senders": "50",
    "max_slot_wal_keep_size": "1GB",
}


@contextmanager
def _started(version: int | None) -> Iterator[Server]:
    with Server(version=version, settings=_SETTINGS, folder=_in_memory()) as server:
        yield server


class Databases:
    """Makes a fresh database a test, and drops it when the next one is made.

    That is when all that was connected to it has gone, in whatever order a test's fixtures end.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._last: str | None = None

    def create(self) -> str:
        if self._last is not None:
            self._drop(self._last)
        self._last = self._server.create_database()
        return self._last

    def _drop(self, dsn: str) -> None:
        name = parse_dsn(dsn)["dbname"]
        with closing(psycopg2.connect(self._server.dsn())) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                # Even FORCE fails while somebody holds a replication slot of the database; one that
                # nobody holds is dropped with it.
                cursor.execute(
                    "SELECT pg_terminate_backend(active_pid, %s) FROM pg_replication_slots"
                    " WHERE database = %s AND active",
                    [int(DEADLINE * 1000), name],
                )
                statement = SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)")
                cursor.execute(statement.format(Identifier(name)))


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A running PostgreSQL, the version that the system has."""
    with _started(None) as running:
        yield running


@pytest.fixture(scope="session")
def databases(server: Server) -> Databases:
    """Makes the databases of ``dsn``."""
    return Databases(server)


@pytest.fixture(scope="session", params=VERSIONS, ids="pg{}".format)
def each_version(request: pytest.FixtureRequest) -> int:
    """The oldest and then the newest version of PostgreSQL that is tested, or the only one."""
    version: int = request.param
    if version not in {i.version for i in find_installations()}:
        missing(f"PostgreSQL {version} is not installed")
    return version


@pytest.fixture(scope="session")
def each_server(each_version: int) -> Iterator[Server]:
    """A running PostgreSQL, the oldest and then the newest version that is tested."""
    with _started(each_version) as running:
        yield running


@pytest.fixture(scope="session")
def each_databases(each_server: Server) -> Databases:
    """Makes the databases of ``each_dsn``."""
    return Databases(each_server)


@pytest.fixture
def dsn(databases: Databases) -> str:
    """A fresh database, as its superuser."""
    return databases.create()


@pytest.fixture
def each_dsn(each_databases: Databases) -> str:
    """A fresh database on each tested version, as its superuser."""
    return each_databases.create()


class Database:
    """A connection in autocommit mode, with the shortest way to run SQL."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.connection: Connection = psycopg2.connect(dsn)
        self.connection.autocommit = True

    def __call__(self, statement: Any, parameters: Any = None) -> list[tuple[Any, ...]]:
        """Run a statement; its rows, if it gives any."""
        with self.connection.cursor() as cursor:
            cursor.execute(statement, parameters)
            return [] if cursor.description is None else cursor.fetchall()


@pytest.fixture
def connect() -> Iterator[Callable[[str], Database]]:
    """Makes Database objects that are closed at the end."""
    made: list[Database] = []

    def make(dsn: str) -> Database:
        made.append(Database(dsn))
        return made[-1]

    yield make
    for database in made:
        database.connection.close()


@pytest.fixture
def db(dsn: str, connect: Callable[[str], Database]) -> Database:
    """The fresh database, ready to run SQL."""
    return connect(dsn)


@pytest.fixture
def each_db(each_dsn: str, connect: Callable[[str], Database]) -> Database:
    """The fresh database on each tested version, ready to run SQL."""
    return connect(each_dsn)


@pytest.fixture
def by_triggers(monkeypatch: pytest.MonkeyPatch) -> None:
    """In WAL delivery, has triggers serve all watchers, also those that rows could serve."""
    reason = "the test is about triggers"
    monkeypatch.setattr(definitions, "why_not_rows", lambda *asked: reason)


@pytest.fixture(params=get_args(Delivery))
def delivery(request: pytest.FixtureRequest) -> Delivery:
    """Each delivery in turn: what is proved for one is proved for all."""
    chosen: Delivery = request.param
    return chosen


@pytest.fixture
def hub() -> Iterator[pgsignals.Hub]:
    """A Hub that is stopped at the end."""
    made = pgsignals.Hub()
    yield made
    made.stop()


class _Deaths(logging.Handler):
    """Keeps what is said of threads that have ended by an error, and of records that are wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno == logging.CRITICAL or "cannot be filled in: TypeError" in text:
            self.told.append(f"{text}\n{record.exc_text}")


@pytest.fixture(autouse=True)
def no_thread_dies(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test in which a thread of the library's ends by an error, unless it wants that."""
    handler, logger = _Deaths(), logging.getLogger("pgsignals")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    if request.node.get_closest_marker("threads_die") is None:
        assert handler.told == []


class Recorder:
    """A receiver that keeps what it gets, and can be waited on."""

    def __init__(self) -> None:
        self.items: list[Any] = []
        self._condition = threading.Condition()

    def __call__(self, item: Any) -> None:
        with self._condition:
            self.items.append(item)
            self._condition.notify_all()

    def wait(self, count: int, timeout: float = DEADLINE) -> list[Any]:
        """The first ``count`` items, as soon as they are here; fails after ``timeout`` seconds."""
        with self._condition:
            arrived = self._condition.wait_for(lambda: len(self.items) >= count, timeout)
        assert arrived, f"{len(self.items)} of {count} came: {self.items}"
        return self.items[:count]

    def wait_until(self, last: Callable[[Any], bool], timeout: float = DEADLINE) -> list[Any]:
        """All items up to the first for which ``last`` is true."""
        with self._condition:
            arrived = self._condition.wait_for(lambda: any(map(last, self.items)), timeout)
        assert arrived, f"not among {self.items}"
        end = next(number for number, item in enumerate(self.items) if last(item))
        return self.items[: end + 1]


@pytest.fixture
def recorder() -> Recorder:
    """A receiver that keeps what it gets."""
    return Recorder()


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Gets each look at the triggers once it has ended, of whichever Hub."""
    made, look = Recorder(), TriggerWatch.look

    def counted(self: TriggerWatch, *args: Any) -> Any:
        try:
            return look(self, *args)
        finally:
            made(self)

    monkeypatch.setattr(TriggerWatch, "look", counted)
    return made


@pytest.fixture
def until_looked(looks: Recorder) -> Callable[[], None]:
    """Waits until the triggers have been looked at twice: the second time, since it was called.

    In notify delivery that is for two heartbeats that are answered, the second sent since then.
    """

    def wait() -> None:
        looks.wait(len(looks.items) + 2)

    return wait


@pytest.fixture
def until_polled(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Waits until the outbox has been polled twice: the second time, since it was called."""
    polls, poll = Recorder(), OutboxLog.poll

    def noted(self: OutboxLog) -> Poll:
        found = poll(self)
        polls(self)
        return found

    def wait() -> None:
        polls.wait(len(polls.items) + 2)

    monkeypatch.setattr(OutboxLog, "poll", noted)
    return wait


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kafka]:
    """A running Apache Kafka, with a port for TLS and one for passwords."""
    folder = tmp_path_factory.mktemp("tls")
    running = Kafka(
        **tls_files(folder),
        **{
            "sasl.enabled.mechanisms": "PLAIN",
            "listener.name.sasl_plaintext.plain.sasl.jaas.config": (
                "org.apache.kafka.common.security.plain.PlainLoginModule required "
                f'user_ann="{PASSWORD}" user_bob="{ODD_PASSWORD}";'
            ),
        },
    )
    running.ca = str(folder / "ca.pem")
    running.start()
    yield running
    running.close()


@pytest.fixture(scope="session")
def nats_server() -> Iterator[Nats]:
    """A running nats-server with JetStream."""
    running = Nats()
    running.start()
    yield running
    running.close()


@pytest.fixture
def prefix() -> str:
    """A prefix of topics and subjects that no other test uses."""
    return f"t{uuid.uuid4().hex[:8]}"
