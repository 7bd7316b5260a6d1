"""Connecting: each way to fail has its own clear error, and poolers and standbys are known."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg2
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import pgsignals
from pgsignals import ConnectError, Hub
from pgsignals.core.backoff import Backoff
from pgsignals.core.redaction import redact
from pgsignals.postgres.connection import connect
from pgsignals.postgres.dsn import display
from pgsignals.postgres.session import Session
from pgsignals.postgres.waiter import Waiter, _Selector
from pgsignals.sources import thread
from pgsignals.testing import Server
from tests.conftest import DEADLINE, Database, Recorder
from tests.missing import program, tls
from tests.proxy import Proxy

SECRET = "p@ss/w:rd%"
ESCAPED = quote(SECRET, safe="")
AT_ONCE = 5.0


def refused(dsn: str, **options: Any) -> str:
    """The error of a start with this DSN, which must not take long."""
    began = time.monotonic()
    hub = Hub()
    with pytest.raises(ConnectError) as caught:
        hub.start(dsn, ["items"], **options)
    assert time.monotonic() - began < AT_ONCE
    assert not [each for each in threading.enumerate() if each.name.startswith("pgsignals")]
    assert not hub.running
    shown = f"{caught.value}{caught.value.__cause__!r}{caught.value.__context__!r}"
    assert SECRET not in shown
    assert ESCAPED not in shown
    return str(caught.value)


def delivers(hub: Hub, dsn: str, writer: str, recorder: Recorder, **options: Any) -> None:
    """Assert that a Hub started with this DSN hears what is written."""
    hub.subscribe(recorder, "items")
    hub.start(dsn, ["items"], **options)
    db = Database(writer)
    try:
        [(written,)] = db("INSERT INTO items DEFAULT VALUES RETURNING id")
    finally:
        db.connection.close()
    assert recorder.wait(1)[0].id == written


@pytest.fixture
def items(db: Database) -> None:
    """A table."""
    db("CREATE TABLE items (id bigserial PRIMARY KEY)")


@pytest.fixture(scope="module")
def secured() -> Iterator[Server]:
    """A server that asks for a password and takes few connections."""
    settings = {"max_connections": "6", "superuser_reserved_connections": "1"}
    with Server(password=SECRET, settings=settings) as running:
        yield running


def test_an_unknown_host() -> None:
    """A name without an address is told."""
    message = refused("postgresql://postgres@no-such-host.invalid/shop")
    assert "at host=no-such-host.invalid dbname=shop user=postgres: the host name" in message


def test_nothing_listening() -> None:
    """A port where nobody listens is told."""
    message = refused(f"postgresql://u:{ESCAPED}@127.0.0.1:1/shop")
    assert "host=127.0.0.1 port=1 dbname=shop user=u: nothing listens there" in message


def test_no_socket(tmp_path: Path) -> None:
    """A folder without a server's socket is told."""
    assert "no server has its socket there" in refused(f"host={tmp_path} dbname=shop")


def test_a_wrong_password(secured: Server) -> None:
    """A password that the server refuses is told, and so is a role that it does not know."""
    assert "the user or the password is wrong" in refused(
        secured.dsn(user="postgres", password="x")
    )
    assert "the user or the password is wrong" in refused(secured.dsn(user="nobody", password="x"))


def test_no_password(secured: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that asks for one is told."""
    monkeypatch.setenv("PGPASSFILE", os.devnull)
    assert "the server asks for a password" in refused(secured.dsn(user="postgres"))


def test_a_password_that_sqlalchemy_has_hidden(secured: Server) -> None:
    """str(engine.url) has stars for the password: the error tells how to get the password."""
    assert "URL.render_as_string()" in refused(secured.dsn(user="postgres", password="***"))


def test_an_unknown_database(secured: Server) -> None:
    """A database that is not there is told."""
    assert "there is no such database" in refused(secured.dsn("nowhere"))


def test_an_unknown_role(server: Server) -> None:
    """Where no password is asked for, a role that is not there is told."""
    assert "there is no such role" in refused(server.dsn(user="nobody_at_all"))


def test_no_tls(server: Server) -> None:
    """A server without TLS is told when the DSN requires it."""
    assert "the server offers no TLS" in refused(f"{server.dsn()}?sslmode=require")


def test_a_certificate_that_is_not_trusted(tmp_path: Path) -> None:
    """A certificate signed by nobody whom we trust is told, and so is a missing list of them."""
    tls()
    with Server(tls=True) as server:
        for trusted in ("system", tmp_path / "missing.crt"):
            message = refused(f"{server.dsn()}?sslmode=verify-full&sslrootcert={trusted}")
            assert "the server's certificate is not trusted: see sslrootcert" in message


def test_too_many_connections(secured: Server) -> None:
    """A server that is full is told."""
    held: list[Any] = []
    try:
        with suppress(psycopg2.OperationalError):
            while len(held) < 6:
                held.append(psycopg2.connect(secured.dsn()))
        assert "the server has no connection left" in refused(secured.dsn())
    finally:
        for connection in held:
            connection.close()


@pytest.mark.parametrize("listening", [False, True], ids=["dsn", "listen_dsn"])
def test_a_silent_server(server: Server, dsn: str, items: None, listening: bool) -> None:
    """A server that takes the connection and says nothing is given up after the timeout."""
    with Proxy("127.0.0.1", server.port) as proxy:
        proxy.stall()
        silent = dsn.replace(str(server.port), str(proxy.port))
        message = refused(dsn if listening else silent, listen_dsn=silent, heartbeat_timeout=1.0)
    assert f"port={proxy.port}" in message
    assert "the server does not answer" in message


def test_an_interruption_while_starting(server: Server, dsn: str, items: None) -> None:
    """A connection that breaks before start returns is a ConnectError as well."""
    with Proxy("127.0.0.1", server.port) as proxy:

        class Cutting:
            name = "cutting"

            def resolve(self, model: object) -> None:
                proxy.cut()

            def load(self, *_: object) -> None:
                raise AssertionError

        message = refused(dsn.replace(str(server.port), str(proxy.port)), resolvers=[Cutting()])
    assert "but listening could not begin" in message


def test_a_server_that_falls_silent(server: Server, dsn: str) -> None:
    """A statement without an answer fails after its time, and so cannot hold up reconnecting."""
    with Proxy("127.0.0.1", server.port) as proxy:
        connection = connect(dsn.replace(str(server.port), str(proxy.port)), patience=0.2)
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
            proxy.stall()
            with pytest.raises(psycopg2.OperationalError, match=r"did not answer .* within 0\.2 s"):
                cursor.execute("SELECT 2")
        assert connection.closed


def test_a_url_of_something_else(hub: pgsignals.Hub) -> None:
    """A URL that no plugin knows is refused, without its password."""
    with pytest.raises(pgsignals.ConfigurationError) as caught:
        hub.start(f"mysql://u:{SECRET}@localhost/db", ["items"])
    assert "mysql" in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_url_with_a_schema(hub: Hub, dsn: str, db: Database, recorder: Recorder) -> None:
    """Names are looked up in the schema that Prisma's URL has, whatever characters it has."""
    db('CREATE SCHEMA "My \\Shop"; CREATE TABLE "My \\Shop".items (id int PRIMARY KEY)')
    hub.on("items")(recorder)
    hub.start(f"{dsn}?schema=My%20%5CShop&connection_limit=1", ["items"])
    db('INSERT INTO "My \\Shop".items VALUES (1)')
    [event] = recorder.wait(1)
    assert event.schema == "My \\Shop"


@pytest.mark.parametrize(
    ("wrong", "meaning"),
    [
        (f"host=localhost password {SECRET}", 'has no "="'),
        (f"host=localhost password=my {SECRET}", 'has no "="'),
        (SECRET, 'has no "="'),
        (f"postgresql:/u:{SECRET}@localhost/db", 'has no "="'),
        (f"host=localhost password='{SECRET}", "quotes"),
        (f"host=localhost password=a {SECRET}=b", "unknown option"),
        (f"postgresql://localhost/db?{ESCAPED}=x", "unknown option"),
        (f"postgresql://u:{SECRET}@localhost/db", "Cannot connect"),
        (f"postgresql://u:%zz{SECRET}@localhost/db", "%25"),
        ("postgresql://u:100%@localhost/db", "%25"),
        (f"postgresql://u:{ESCAPED}@[::1/db", "malformed"),
        (f"postgresql+psycopg2://u:{ESCAPED}@[::1/db", "malformed"),
        ("postgresql://u:s3cret/x@localhost/db", "port"),
        ("postgresql://u:s3cret/db", "port"),
        ("postgresql://u:s3@cret.invalid/x@localhost/db", "host name"),
        (f"postgresql://u:{ESCAPED}@localhost:99999/db", "65535"),
        (f"password={SECRET}\udcff host=localhost", "UTF-8"),
        (f"postgresql://h/db?password={SECRET}=x", "malformed"),
        (f"service=pgsignals_no_such password={SECRET}", "service"),
    ],
)
def test_a_malformed_dsn(dsn: str, items: None, wrong: str, meaning: str) -> None:
    """What is wrong is told without a word of what was given, which may be the password."""
    message = refused(wrong)
    assert message == refused(dsn, listen_dsn=wrong)
    assert meaning in message
    for part in ("s3cret", "cret.invalid", "ss/w", "w:rd", ESCAPED):
        assert part not in message


PASSWORDS = st.text(
    st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1
).map(lambda text: f"<{text}>")


@given(PASSWORDS)
@example("<a@b>")
@example("<'\\>")
def test_no_password_is_displayed(password: str) -> None:
    """Whatever the password is, and whether or not it is quoted as it should be."""
    escaped = password.replace("\\", "\\\\").replace("'", "\\'")
    for dsn in (
        f"postgresql://u:{quote(password, safe='')}@localhost/db",
        f"postgresql+psycopg2://u:{quote(password, safe='')}@localhost/db",
        f"postgresql://u@localhost/db?password={quote(password, safe='')}",
        f"host=localhost password='{escaped}' dbname=db user=u",
        f"postgresql://u:{password}@localhost/db",
    ):
        for text in (display(dsn), redact(dsn) if not password.split()[1:] else ""):
            assert password not in text
            assert quote(password, safe="") not in text


@pytest.mark.parametrize("given", [{"password": SECRET}, {"a": ("password=" + SECRET)}])
def test_a_dsn_that_is_no_text(hub: Hub, given: Any) -> None:
    """Arguments for psycopg2.connect are refused without showing their password."""
    with pytest.raises(pgsignals.ConfigurationError, match="dsn=") as caught:
        hub.start(given, ["items"])
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("seed", range(5))
def test_the_pauses_of_the_backoff(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pause is somewhere between nothing and a bound that doubles up to the most, for ever."""
    monkeypatch.setattr("pgsignals.core.backoff.chance", random.Random(seed))
    rounds = [Backoff(0.1, 30.0) for _ in range(200)]
    for tries in [*range(12), *[100] * 500]:
        bound = min(30.0, 0.1 * 2**tries)
        pauses = [each.next() for each in rounds]
        assert 0 <= min(pauses) < 0.2 * bound
        assert 0.8 * bound < max(pauses) <= bound
    for each in rounds:
        each.reset()
    assert max(each.next() for each in rounds) <= 0.1


class CountingBackoff(Backoff):
    """Counts how often it is asked for a pause and reset."""

    def __init__(self) -> None:
        super().__init__(0.01, 0.1)
        self.calls: list[str] = []

    def next(self) -> float:
        self.calls.append("next")
        return super().next()

    def reset(self) -> None:
        self.calls.append("reset")
        super().reset()


@pytest.mark.parametrize(("healthy_seconds", "expected"), [(3600.0, 0), (0.0, 3)])
def test_only_a_healthy_connection_resets_the_backoff(
    dsn: str,
    db: Database,
    hub: Hub,
    items: None,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
    healthy_seconds: float,
    expected: int,
) -> None:
    """A server that takes connections only to drop them is asked ever more rarely."""
    monkeypatch.setattr(thread, "HEALTHY_SECONDS", healthy_seconds)
    backoff = CountingBackoff()
    monkeypatch.setattr(thread, "Backoff", lambda: backoff)
    hub.start(dsn, ["items"])
    hub.on_gap(recorder)
    for number in range(1, 4):
        db(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'pgsignals' AND datname = current_database()"
        )
        recorder.wait(number)
    assert backoff.calls.count("next") == 3
    assert backoff.calls.count("reset") == expected


def test_it_tries_for_ever(hub: Hub, each_version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is away for hundreds of tries is found when it comes back."""
    tried = threading.Semaphore(0)

    class Impatient(Backoff):
        def next(self) -> float:
            tried.release()
            return 0.0

    monkeypatch.setattr(thread, "Backoff", Impatient)
    with Server(each_version) as server:
        Database(server.dsn())("CREATE TABLE items (id bigserial PRIMARY KEY)")
        gaps = Recorder()
        hub.on_gap(gaps)
        hub.start(server.dsn(), ["items"])
        server.stop("immediate")
        for _ in range(200):
            assert tried.acquire(timeout=DEADLINE)
        server.start()
        assert gaps.wait(1)[0].reason == "reconnected"
        hub.stop()


def parameters(dsn: str) -> list[dict[str, str]]:
    """What an ordinary connection and a listening one are made with."""
    waiter = Waiter()
    session = Session(dsn, waiter, lambda: False)
    connection = connect(dsn)
    try:
        session.open(DEADLINE)
        return [each.info.dsn_parameters for each in (connection, session._live)]
    finally:
        session.close()
        connection.close()
        waiter.close()


def test_keepalive_by_default(dsn: str) -> None:
    """Both connections have the kernel look after them."""
    for found in parameters(dsn):
        assert found["keepalives"] == "1"
        assert found["keepalives_idle"] == "30"
        assert found["keepalives_interval"] == "10"
        assert found["keepalives_count"] == "3"
        assert found["tcp_user_timeout"] == "60000"
        assert found["client_encoding"] == "UTF8"
        assert found["fallback_application_name"] == "pgsignals"


def test_the_dsn_has_the_last_word(dsn: str) -> None:
    """What the user's DSN says is not replaced."""
    given = {
        "keepalives": "1",
        "keepalives_idle": "7",
        "keepalives_interval": "8",
        "keepalives_count": "9",
        "tcp_user_timeout": "1234",
        "connect_timeout": "5",
        "application_name": "shop",
    }
    text = "&".join(f"{name}={value}" for name, value in given.items())
    for found in parameters(f"{dsn}?{text}"):
        assert {name: found[name] for name in given} == given


def test_an_sqlalchemy_url(hub: Hub, dsn: str, items: None, recorder: Recorder) -> None:
    """A URL that names SQLAlchemy's driver works as it is."""
    delivers(hub, dsn.replace("postgresql:", "postgresql+psycopg2:"), dsn, recorder)


def test_keys_and_values(
    hub: Hub, server: Server, dsn: str, items: None, recorder: Recorder
) -> None:
    """So does libpq's other form."""
    name = dsn.rpartition("/")[2]
    text = f"host = 127.0.0.1 port={server.port} dbname='{name}' user=postgres"
    delivers(hub, text, dsn, recorder)


def test_the_environment(
    hub: Hub,
    server: Server,
    dsn: str,
    items: None,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a DSN, libpq's variables tell where the database is."""
    for name, value in {
        "PGHOST": "127.0.0.1",
        "PGPORT": str(server.port),
        "PGDATABASE": dsn.rpartition("/")[2],
        "PGUSER": "postgres",
    }.items():
        monkeypatch.setenv(name, value)
    delivers(hub, "", dsn, recorder)


def test_a_service(
    hub: Hub,
    server: Server,
    dsn: str,
    items: None,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """A service file may hold it all."""
    file = tmp_path / "services"
    name = dsn.rpartition("/")[2]
    file.write_text(f"[shop]\nhost=127.0.0.1\nport={server.port}\ndbname={name}\nuser=postgres\n")
    monkeypatch.setenv("PGSERVICEFILE", str(file))
    delivers(hub, "service=shop", dsn, recorder)


@pytest.fixture(scope="module")
def standby(each_version: int) -> Iterator[Server]:
    """A server in recovery that answers queries, as a replica does."""
    with Server(each_version) as server:
        db = Database(server.dsn())
        db("CREATE TABLE items (id bigserial PRIMARY KEY)")
        db.connection.close()
        server.stop()
        assert server._home is not None
        (server._home / "data" / "standby.signal").touch()
        server.start()
        yield server


def test_a_standby(standby: Server, dsn: str, items: None) -> None:
    """A replica is named, with the way to the primary, in whichever of the DSNs it is."""
    for first, options in (
        (standby.dsn(), {}),
        (dsn, {"listen_dsn": standby.dsn()}),
        (standby.dsn(), {"listen_dsn": dsn}),
    ):
        message = refused(first, **options)
        assert f"port={standby.port}" in message
        assert "is a standby" in message
        assert "target_session_attrs=read-write" in message


def test_the_primary_among_several_hosts(
    hub: Hub, server: Server, standby: Server, recorder: Recorder
) -> None:
    """With target_session_attrs=read-write the standby is passed over."""
    db = Database(server.dsn())
    db("DROP TABLE IF EXISTS items")  # That of the standby of another version.
    db("CREATE TABLE items (id bigserial PRIMARY KEY)")
    db.connection.close()
    hosts = f"127.0.0.1:{standby.port},127.0.0.1:{server.port}"
    several = f"postgresql://postgres@{hosts}/postgres?target_session_attrs=read-write"
    delivers(hub, several, server.dsn(), recorder)


def test_a_host_that_refuses_late(server: Server) -> None:
    """The next host is tried at once when the first has let us wait before it refuses."""
    waiter = Waiter()
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        # Two that nobody accepts fill its queue, so that the third waits.
        for client in (first, second):
            client.setblocking(False)
            client.connect_ex(full.getsockname())

        def refuse() -> bool:
            with suppress(OSError):
                full.shutdown(socket.SHUT_RDWR)
            return False

        hosts = f"127.0.0.1:{full.getsockname()[1]},127.0.0.1:{server.port}"
        session = Session(f"postgresql://postgres@{hosts}/postgres", waiter, refuse)
        began = time.monotonic()
        session.open(DEADLINE)
        assert time.monotonic() - began < AT_ONCE
    session.close()
    waiter.close()


def test_only_standbys(standby: Server) -> None:
    """When none of the hosts is a primary, that is told."""
    message = refused(f"{standby.dsn()}?target_session_attrs=read-write")
    assert "no host of the DSN is what its target_session_attrs asks for" in message


def test_a_read_only_database(hub: Hub, dsn: str, db: Database, recorder: Recorder) -> None:
    """It is named when triggers are missing, and heard once they are there."""
    db("CREATE TABLE items (id bigserial PRIMARY KEY)")
    name = dsn.rpartition("/")[2]
    db(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    message = refused(dsn)
    assert f"Transactions are read-only at {display(dsn)}" in message
    assert "default_transaction_read_only" in message
    assert 'install="check"' in message
    writable = f"{dsn}?options=-cdefault_transaction_read_only%3Doff"
    Hub().start(writable, ["items"]).stop()
    delivers(hub, dsn, writable, recorder, install="check")


class PgBouncer:
    """A running PgBouncer in front of a server; ``dsn`` leads through it."""

    def __init__(self, program: str, server: Server, folder: Path, **settings: object) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        config = folder / "pgbouncer.ini"
        lines = [f"{name} = {value}" for name, value in settings.items()]
        config.write_text(
            "[databases]\n"
            f"* = host=127.0.0.1 port={server.port} user=postgres\n"
            "[pgbouncer]\n"
            f"listen_addr = 127.0.0.1\nlisten_port = {self.port}\nunix_socket_dir =\n"
            "auth_type = any\n" + "\n".join(lines)
        )
        for path in (config, folder, *folder.parents[:-2]):
            path.chmod(path.stat().st_mode | 0o755)
        self._process = subprocess.Popen(
            [program, config],
            stderr=subprocess.PIPE,
            text=True,
            # It refuses to run as root.
            user="nobody" if os.geteuid() == 0 else None,
        )
        assert self._process.stderr is not None
        log = iter(self._process.stderr.readline, "")
        assert any("process up" in line for line in log)
        self._drain = threading.Thread(target=lambda: list(log))
        self._drain.start()

    def dsn(self, direct: str) -> str:
        """The same database by way of the pooler."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/{direct.rpartition('/')[2]}"

    def close(self) -> None:
        """End it, and every connection through it."""
        self._process.terminate()
        self._process.wait(DEADLINE)
        self._drain.join(DEADLINE)
        assert self._process.stderr is not None
        self._process.stderr.close()


@pytest.fixture
def pgbouncer(server: Server, tmp_path: Path) -> Iterator[Callable[..., PgBouncer]]:
    """Starts PgBouncers."""
    path = program("pgbouncer", package="pgbouncer")
    made: list[PgBouncer] = []

    def make(**settings: object) -> PgBouncer:
        made.append(PgBouncer(path, server, tmp_path, **settings))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize("pool_mode", ["transaction", "statement"])
def test_listening_through_a_pool_of_transactions(
    dsn: str,
    db: Database,
    items: None,
    pgbouncer: Callable[..., PgBouncer],
    connect: Callable[[str], Database],
    pool_mode: str,
) -> None:
    """It is named at once, with the way out, and sets nothing for who comes next in the pool."""
    pooled = pgbouncer(pool_mode=pool_mode).dsn(dsn)
    message = refused(pooled)
    next_one = connect(pooled)
    for setting in ("idle_in_transaction_session_timeout", "default_transaction_isolation"):
        assert next_one(f"SHOW {setting}") == db(f"SHOW {setting}")
    assert "PgBouncer with pool_mode=transaction" in message
    assert "listen_dsn=" in message
    assert "pool_mode=transaction" in refused(dsn, listen_dsn=pooled, heartbeat_timeout=1.0)


def test_a_direct_connection_beside_the_pool(
    hub: Hub,
    dsn: str,
    db: Database,
    items: None,
    pgbouncer: Callable[..., PgBouncer],
    recorder: Recorder,
) -> None:
    """Everything but listening works through a pool of transactions and leaves no trace in it."""
    pooled = pgbouncer(pool_mode="transaction").dsn(dsn)
    db("CREATE TABLE things (id bigserial PRIMARY KEY, name text, size int)")
    hub.subscribe(recorder, "things")
    large: dict[str, Any] = {"when": "NEW.size > 1", "extra": ["size"]}
    inserted = pgsignals.watch("things", "inserted", **large)
    updated = pgsignals.watch("things", "updated", columns=["name"], **large)
    hub.start(pooled, [inserted, updated, "items"], listen_dsn=dsn)
    writer = Database(pooled)
    writer("INSERT INTO things (name, size) VALUES ('small', 1), ('large', 2)")
    writer("UPDATE things SET name = 'larger' WHERE size = 2")
    assert [(e.op, e.values["size"]) for e in recorder.wait(2)] == [
        ("inserted", 2),
        ("updated", 2),
    ]
    status = hub.status()
    assert {state.status for state in status.watchers} == {"INSTALLED"}
    assert status.connected
    gaps = Recorder()
    hub.on_gap(gaps)
    # Who holds such a lock outside a transaction is the listener.
    listener = (
        "FROM pg_stat_activity WHERE datname = current_database()"
        " AND pid IN (SELECT pid FROM pg_locks WHERE locktype = 'advisory')"
    )
    assert db(f"SELECT count(*) {listener}") == [(1,)]
    db(f"SELECT pg_terminate_backend(pid) {listener}")
    assert gaps.wait(1)[0].reason == "reconnected"
    # Whatever the pooled backends were left with, the next client would get.
    for setting in (
        "lock_timeout",
        "search_path",
        "statement_timeout",
        "idle_in_transaction_session_timeout",
        "DateStyle",
    ):
        assert writer(f"SHOW {setting}") == db(f"SHOW {setting}")
    assert writer("SELECT count(*) FROM pg_prepared_statements") == [(0,)]
    assert writer("SELECT count(*) FROM pg_listening_channels()") == [(0,)]
    assert db(f"SELECT count(*) {listener}") == [(1,)]
    writer.connection.close()


def test_a_pool_of_sessions(
    hub: Hub,
    dsn: str,
    items: None,
    pgbouncer: Callable[..., PgBouncer],
    recorder: Recorder,
) -> None:
    """Such a pool is as good as none."""
    delivers(hub, pgbouncer(pool_mode="session").dsn(dsn), dsn, recorder)


def test_two_dsns_that_lead_to_different_databases(server: Server, dsn: str, items: None) -> None:
    """Listening where nobody notifies is noticed, since no notification comes round."""
    message = refused(dsn, listen_dsn=server.create_database(), heartbeat_timeout=1.0)
    assert "Both must lead to the same database of the same server" in message


def test_a_platform_without_poll(
    dsn: str, items: None, hub: Hub, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no poll(), as on Windows or under eventlet, events arrive all the same."""
    monkeypatch.delattr("select.poll")
    waits, poll = Recorder(), _Selector.poll

    def noted(self: _Selector, timeout: float | None) -> list[tuple[int, int]]:
        found = poll(self, timeout)
        waits(found)
        return found

    monkeypatch.setattr(_Selector, "poll", noted)
    delivers(hub, dsn, dsn, recorder)
    assert any(waits.items)
