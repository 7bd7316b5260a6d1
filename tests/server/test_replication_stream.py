"""A replication stream reads what is committed, never hangs, and tells nothing by itself."""

from __future__ import annotations

import os
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg2
import psycopg2.extensions
import pytest
from psycopg2.extras import LogicalReplicationConnection, wait_select

from pgsignals.core.errors import ConnectError, DatabaseError
from pgsignals.core.lsn import read_lsn
from pgsignals.postgres.session import Session
from pgsignals.postgres.waiter import Waiter
from pgsignals.testing import Server
from pgsignals.wal import stream as module
from pgsignals.wal.pgoutput import Begin, Commit, Insert, Message, Relation, decode
from pgsignals.wal.slots import SlotMissing, SlotTaken, create, end_holder, look
from pgsignals.wal.stream import ReplicationStream
from tests.brokers import tls_files
from tests.conftest import DEADLINE, Database
from tests.missing import tls
from tests.proxy import Proxy
from tests.waiting import eventually
from tests.walsender import WalSender

SLOT = "a_slot"
# Longer than any test: the server asks for nothing meanwhile.
LEASE = 3 * DEADLINE
AT_ONCE = 5.0


class Reader:
    """Streams of one slot in a database, all of whose tables are published, and one waiter."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self.waiter = Waiter()
        self.streams: list[ReplicationStream] = []
        db("CREATE TABLE items (id int PRIMARY KEY, name text)")
        db("CREATE TABLE others (id int PRIMARY KEY)")
        db("CREATE PUBLICATION p FOR TABLE items")
        [(database,)] = db("SELECT current_database()")
        self.slot = f"{SLOT}_{database}"
        self.began = create(db, self.slot, db.connection.server_version, DEADLINE)

    def new(self, dsn: str | None = None) -> ReplicationStream:
        """A stream that is not open yet."""
        made = ReplicationStream(dsn or self.db.dsn, self.waiter, lambda: False)
        self.streams.append(made)
        return made

    def open(self, dsn: str | None = None, lease: float = LEASE) -> ReplicationStream:
        """An open stream of the slot."""
        made = self.new(dsn)
        made.open(self.slot, ["p"], 0, lease, DEADLINE)
        return made

    def confirmed(self) -> int:
        """What the server has as acknowledged."""
        found = look(self.db, self.slot)
        assert found is not None
        assert found.confirmed is not None
        return found.confirmed

    def until(
        self, stream: ReplicationStream, last: Callable[[Any], bool]
    ) -> list[tuple[int, Any]]:
        """The messages up to the first for which ``last`` is true, decoded."""
        found: list[tuple[int, Any]] = []
        deadline = time.monotonic() + DEADLINE
        while not found or not last(found[-1][1]):
            if (message := stream.read()) is not None:
                found.append((message[0], decode(message[1])))
                continue
            assert time.monotonic() < deadline, found
            stream.beat()
            self.waiter.wait(None, 0.1)
        return found

    def commit(self, stream: ReplicationStream) -> int:
        """Read a transaction to its end, and return the end's position."""
        return self.until(stream, lambda each: isinstance(each, Commit))[-1][0]

    def until_received(self, stream: ReplicationStream, lsn: int) -> None:
        """Read until the server has said that it has nothing more up to a position."""
        deadline = time.monotonic() + DEADLINE
        while stream.received < lsn:
            assert stream.read() is None
            assert time.monotonic() < deadline
            self.waiter.wait(None, 1.0)

    def until_ended(self, stream: ReplicationStream, confirm: bool = False) -> str:
        """Read until the stream ends; its error."""
        deadline = time.monotonic() + DEADLINE

        def read_on() -> None:
            while time.monotonic() < deadline:
                if stream.read() is None:
                    if confirm:
                        stream.confirm(stream.received)
                    stream.beat()
                    self.waiter.wait(None, 0.1)

        with pytest.raises(DatabaseError) as caught:
            read_on()
        return str(caught.value)

    def log_end(self) -> int:
        """Where the log ends."""
        [(lsn,)] = self.db("SELECT pg_current_wal_insert_lsn()::text")
        return read_lsn(lsn)

    def close(self) -> None:
        for each in self.streams:
            each.close()
        self.waiter.close()


@pytest.fixture
def reader(each_dsn: str, connect: Callable[[str], Database]) -> Iterator[Reader]:
    """A reader on each version, whose streams are closed at the end."""
    made = Reader(connect(each_dsn))
    yield made
    made.close()


@pytest.fixture
def proxy(each_server: Server) -> Iterator[Proxy]:
    """A proxy in front of the server."""
    with Proxy("127.0.0.1", each_server.port) as made:
        yield made


def through(proxy: Proxy, dsn: str) -> str:
    """The DSN by way of the proxy."""
    parts = urlsplit(dsn)
    return parts._replace(netloc=f"{parts.username}@127.0.0.1:{proxy.port}").geturl()


def test_what_is_committed_is_read(reader: Reader) -> None:
    """A transaction comes with its row and its messages, and its end can be acknowledged."""
    stream = reader.open()
    assert stream.read() is None
    reader.db(
        "INSERT INTO items VALUES (1, 'é');"
        " SELECT pg_logical_emit_message(true, 'pgsignals', 'hello')"
    )
    found = reader.until(stream, lambda each: isinstance(each, Commit))
    begin, relation, insert, message, commit = (each for _, each in found)
    assert isinstance(begin, Begin)
    assert isinstance(relation, Relation)
    assert relation.name == "items"
    assert isinstance(insert, Insert)
    assert insert.new == (b"1", "é".encode())
    assert isinstance(message, Message)
    assert message.content == b"hello"
    end = found[-1][0]
    assert end == commit.end_lsn
    reader.until_received(stream, end)
    assert reader.confirmed() < end
    stream.confirm(end)
    stream.confirm(end - 1)
    assert stream.confirmed == end
    stream.beat()
    eventually(reader.confirmed, lambda lsn: lsn == end)
    assert stream.unasked == end


def test_reading_begins_where_it_is_told(reader: Reader) -> None:
    """What is committed up to the position is not sent, though nobody has acknowledged it."""
    stream = reader.open()
    reader.db("INSERT INTO items VALUES (1)")
    end = reader.commit(stream)
    reader.db("INSERT INTO items VALUES (2)")
    stream.close()
    eventually(lambda: look(reader.db, reader.slot), lambda slot: slot.active_pid is None)
    later = reader.new()
    later.open(reader.slot, ["p"], end, LEASE, DEADLINE)
    found = reader.until(later, lambda each: isinstance(each, Commit))
    assert [each.new[0] for _, each in found if isinstance(each, Insert)] == [b"2"]


def test_publications_have_any_names(reader: Reader) -> None:
    """Names with quotes, commas, blanks and capitals are taken as they are."""
    names = ['Odd "one", so', "it's\\", "P"]
    for number, name in enumerate(names):
        quoted = name.replace('"', '""')
        reader.db(f"CREATE TABLE odd_{number} (id int PRIMARY KEY)")
        reader.db(f'CREATE PUBLICATION "{quoted}" FOR TABLE odd_{number}')
    stream = reader.new()
    stream.open(reader.slot, names, 0, LEASE, DEADLINE)
    reader.db("; ".join(f"INSERT INTO odd_{number} VALUES (1)" for number in range(len(names))))
    found = reader.until(stream, lambda each: isinstance(each, Commit))
    read = [each.name for _, each in found if isinstance(each, Relation)]
    assert read == ["odd_0", "odd_1", "odd_2"]


def test_values_have_one_form(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that a role, a database or an environment has set changes them, but what we leave."""
    [(database,)] = reader.db("SELECT current_database()")
    for name, value in (
        ("DateStyle", "'SQL, DMY'"),
        ("TimeZone", "'Asia/Tokyo'"),
        ("bytea_output", "'escape'"),
        ("extra_float_digits", "-5"),
        ("wal_sender_timeout", "'1ms'"),
        # The first statement, which takes it back, has to be done within it.
        ("statement_timeout", "'200ms'"),
    ):
        reader.db(f'ALTER DATABASE "{database}" SET {name} TO {value}')
    monkeypatch.setenv("PGOPTIONS", "-c quote_all_identifiers=on")
    reader.db("CREATE TABLE kinds (at timestamptz, data bytea, part float8, own regclass)")
    reader.db("ALTER PUBLICATION p ADD TABLE kinds")
    stream = reader.open()
    reader.db(
        "INSERT INTO kinds VALUES ('2024-12-31 23:00:00+00', '\\x00ff', 0.1::float8 + 0.2, 'kinds')"
    )
    [insert] = [
        each
        for _, each in reader.until(stream, lambda each: isinstance(each, Commit))
        if isinstance(each, Insert)
    ]
    assert insert.new == (
        b"2024-12-31 23:00:00+00",
        b"\\x00ff",
        b"0.30000000000000004",
        b'"kinds"',
    )


@pytest.mark.parametrize(
    ("encoding", "given"),
    [("LATIN1", b"\xe9"), ("SQL_ASCII", b"\xe9\xff"), ("EUC_JP", b"\xad\xb5")],
)
def test_nothing_is_converted(
    each_server: Server, connect: Callable[[str], Database], encoding: str, given: bytes
) -> None:
    """Bytes come as the database has them; those of EUC_JP here are none that UTF-8 has."""
    name = f"db_{encoding.lower()}"
    admin = connect(each_server.dsn())
    admin(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}' LOCALE 'C'")
    reader = Reader(connect(each_server.dsn(name)))
    try:
        stream = reader.open()
        reader.db(f"INSERT INTO items SELECT 1, convert_from('\\x{given.hex()}', '{encoding}')")
        [insert] = [
            each
            for _, each in reader.until(stream, lambda each: isinstance(each, Commit))
            if isinstance(each, Insert)
        ]
        assert insert.new == (b"1", given)
    finally:
        reader.close()
        reader.db.connection.close()
        eventually(lambda: look(admin, reader.slot), lambda slot: slot.active_pid is None)
        admin(f"DROP DATABASE {name} WITH (FORCE)")


def test_a_slot_that_is_taken(reader: Reader) -> None:
    """It says so, and is free again when the other stream is closed."""
    first = reader.open()
    second = reader.new()
    with pytest.raises(SlotTaken, match=f"'{reader.slot}': another session reads from it"):
        second.open(reader.slot, ["p"], 0, LEASE, DEADLINE)
    first.close()
    eventually(lambda: look(reader.db, reader.slot), lambda slot: slot.active_pid is None)
    second.open(reader.slot, ["p"], 0, LEASE, DEADLINE)
    assert second.read() is None


def test_a_slot_that_is_missing(reader: Reader) -> None:
    """It says so."""
    with pytest.raises(SlotMissing, match="it has been dropped, or this is another server"):
        reader.new().open("nowhere", ["p"], 0, LEASE, DEADLINE)


def test_a_slot_of_another_database(reader: Reader, each_server: Server) -> None:
    """It says so."""
    with pytest.raises(DatabaseError, match="it belongs to another database"):
        reader.open(each_server.dsn())


def test_a_physical_slot(reader: Reader) -> None:
    """It says so."""
    reader.db("SELECT pg_create_physical_replication_slot('physical', true)")
    try:
        with pytest.raises(DatabaseError, match="it is a physical one"):
            reader.new().open("physical", ["p"], 0, LEASE, DEADLINE)
    finally:
        reader.db("SELECT pg_drop_replication_slot('physical')")


def test_a_role_without_replication(reader: Reader, each_server: Server) -> None:
    """It says what the role needs."""
    reader.db("DROP ROLE IF EXISTS plain")
    reader.db("CREATE ROLE plain LOGIN")
    [(database,)] = reader.db("SELECT current_database()")
    with pytest.raises(ConnectError, match="needs ALTER ROLE … REPLICATION"):
        reader.open(each_server.dsn(database, "plain"))


def test_a_server_without_logical_wal(each_version: int) -> None:
    """It says what to set."""
    server = Server(each_version, {"wal_level": "replica"})
    with server, closing(Waiter()) as waiter:
        stream = ReplicationStream(server.dsn(), waiter, lambda: False)
        with pytest.raises(DatabaseError, match="set wal_level=logical on the server"):
            stream.open(SLOT, ["p"], 0, LEASE, DEADLINE)


def test_no_wal_sender_left(each_version: int, connect: Callable[[str], Database]) -> None:
    """It says what to set."""
    settings = {"wal_level": "logical", "max_wal_senders": "1"}
    with Server(each_version, settings) as server, closing(Reader(connect(server.dsn()))) as reader:
        reader.open()
        with pytest.raises(ConnectError, match="no WAL sender left: see max_wal_senders"):
            reader.open()


def test_a_wait_callback(reader: Reader) -> None:
    """Under gevent with psycogreen the stream refuses, rather than fail at each reading."""
    psycopg2.extensions.set_wait_callback(wait_select)
    try:
        with pytest.raises(DatabaseError, match="wait callback"):
            reader.open()
    finally:
        psycopg2.extensions.set_wait_callback(None)


def test_a_connection_that_is_cut(reader: Reader, proxy: Proxy) -> None:
    """The next reading tells, and closing is no error."""
    stream = reader.open(through(proxy, reader.db.dsn))
    assert stream.read() is None
    proxy.cut()
    assert reader.slot in reader.until_ended(stream)
    # The socket, whose number another one may have by now, is watched no more.
    reader.waiter.watch(stream.fileno())
    reader.waiter.unwatch(stream.fileno())
    with pytest.raises(DatabaseError):
        stream.beat()
    stream.close()


def test_a_server_that_falls_silent(reader: Reader, proxy: Proxy) -> None:
    """Neither opening, reading, telling nor closing hangs."""
    stream = reader.open(through(proxy, reader.db.dsn))
    proxy.stall()
    began = time.monotonic()
    reader.db("INSERT INTO items VALUES (1)")
    for _ in range(100):
        assert stream.read() is None
        stream.beat()
    stream.close()
    assert time.monotonic() - began < AT_ONCE
    with pytest.raises(ConnectError, match="the server does not answer"):
        reader.new(through(proxy, reader.db.dsn)).open(reader.slot, ["p"], 0, LEASE, 0.5)
    assert time.monotonic() - began < 2 * AT_ONCE


def test_a_server_that_falls_silent_at_the_start(
    reader: Reader, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time that opening may take is for connecting and beginning together."""
    start = ReplicationStream._start

    def stalled(self: ReplicationStream, *given: Any) -> None:
        proxy.stall()
        start(self, *given)

    monkeypatch.setattr(ReplicationStream, "_start", stalled)
    began = time.monotonic()
    with pytest.raises(DatabaseError, match="the server does not answer"):
        reader.new(through(proxy, reader.db.dsn)).open(reader.slot, ["p"], 0, LEASE, 1.0)
    assert time.monotonic() - began < AT_ONCE


def test_opening_is_cancelled(reader: Reader, proxy: Proxy) -> None:
    """A stop does not wait for a server that is silent."""
    proxy.stall()
    stream = ReplicationStream(through(proxy, reader.db.dsn), reader.waiter, lambda: True)
    with pytest.raises(ConnectError, match="stopped while waiting"):
        stream.open(reader.slot, ["p"], 0, LEASE, DEADLINE)


def test_a_session_that_is_ended(reader: Reader) -> None:
    """A WAL sender that somebody terminates is told, and the slot is free at once."""
    stream = reader.open()
    held = look(reader.db, reader.slot)
    assert held is not None
    assert end_holder(reader.db, held)
    assert "terminating connection" in reader.until_ended(stream)
    stream.close()
    eventually(lambda: look(reader.db, reader.slot), lambda slot: slot.active_pid is None)
    assert reader.open().read() is None


@pytest.fixture
def own_server(each_version: int) -> Iterator[Server]:
    """A server that a test may stop."""
    with Server(each_version, {"wal_level": "logical"}) as server:
        yield server


@pytest.fixture
def own_reader(own_server: Server, connect: Callable[[str], Database]) -> Iterator[Reader]:
    """A reader of that server."""
    with closing(Reader(connect(own_server.dsn()))) as made:
        yield made


def test_a_server_that_stops(own_server: Server, own_reader: Reader) -> None:
    """It ends a stream in order whose messages are all acknowledged, and that is told."""
    stream = own_reader.open()
    own_reader.db("INSERT INTO items VALUES (1)")
    own_reader.commit(stream)
    stopping = threading.Thread(target=own_server.stop)
    stopping.start()
    message = own_reader.until_ended(stream, confirm=True)
    stopping.join()
    assert message.endswith("ended: the server has ended it, as it does when it stops")


def test_a_server_stops_at_once(own_server: Server, own_reader: Reader) -> None:
    """It does not wait for what nobody acknowledges, once the stream is closed with the session."""
    stream = own_reader.open()
    own_reader.db("INSERT INTO items SELECT generate_series(1, 1000)")
    own_reader.commit(stream)
    stream.listen(False)
    with closing(Session(own_server.dsn(), own_reader.waiter, lambda: False)) as session:
        session.open(DEADLINE)

        def until_ended() -> None:
            while session.wait(DEADLINE):
                session.receive()

        began = time.monotonic()
        stopping = threading.Thread(target=own_server.stop)
        stopping.start()
        with pytest.raises(psycopg2.Error):
            until_ended()
        stream.close()
        stopping.join()
        assert time.monotonic() - began < AT_ONCE


def sent(reader: Reader, stream: ReplicationStream) -> int:
    """How far the server has sent, with nothing held back."""
    [(lsn,)] = reader.db(
        "SELECT sent_lsn::text FROM pg_stat_replication WHERE pid = %s",
        (stream._live.info.backend_pid,),
    )
    # Nothing yet, just after it began.
    return 0 if lsn is None else read_lsn(lsn)


def test_all_is_read_after_one_wait(reader: Reader) -> None:
    """A thousand messages that have arrived are read without another wait."""
    stream = reader.open()
    reader.db("INSERT INTO items SELECT generate_series(1, 1000)")
    end = reader.log_end()
    eventually(lambda: sent(reader, stream), lambda lsn: lsn >= end)
    assert not reader.waiter.wait(None, DEADLINE)
    found = []
    while (message := stream.read()) is not None:
        found.append(decode(message[1]))
    assert sum(isinstance(each, Insert) for each in found) == 1000


def test_nothing_stays_hidden_behind_tls(connect: Callable[[str], Database]) -> None:
    """Over TLS, what arrives is read although the socket shows nothing any more."""
    tls()
    server = Server(settings={"wal_level": "logical"}, tls=True)
    with server, closing(Reader(connect(server.dsn()))) as reader:
        stream = reader.open(f"{server.dsn()}?sslmode=require")
        for size in (10, 100, 1_000, 8_000, 8_192, 16_000, 16_384, 20_000, 70_000, 300_000):
            reader.db(
                "INSERT INTO items SELECT id, repeat('x', %s)"
                " FROM generate_series(%s + 1, %s + 10) AS id",
                (size, 100 * size, 100 * size),
            )
            ended = False
            while not ended:
                # Nothing that we send has the server answer, which would end the wait in any case.
                began = time.monotonic()
                reader.waiter.wait(None, DEADLINE)
                assert time.monotonic() - began < DEADLINE, f"hidden, of size {size}"
                while (message := stream.read()) is not None:
                    ended = isinstance(decode(message[1]), Commit)


def test_listening_is_switched(reader: Reader) -> None:
    """What arrives ends a wait, unless that is not wanted; a statement's wait it never ends."""
    stream = reader.open()
    with closing(Session(reader.db.dsn, reader.waiter, lambda: False)) as session:
        session.open(DEADLINE)
        reader.db("INSERT INTO items VALUES (1)")
        end = reader.log_end()
        eventually(lambda: sent(reader, stream), lambda lsn: lsn >= end)
        stream.listen(False)
        stream.listen(False)
        assert not session.wait(0.0)
        began = time.monotonic()
        assert not session.wait(0.1)
        assert time.monotonic() - began >= 0.1
        stream.listen(True)
        stream.listen(True)
        assert not session.wait(DEADLINE)
        waits: list[int] = []
        wait_alone = reader.waiter.wait_alone

        def counted(*args: Any, **options: Any) -> None:
            waits.append(1)
            wait_alone(*args, **options)

        reader.waiter.wait_alone = counted  # type: ignore[method-assign]
        session.execute("SELECT pg_sleep(0.2)", timeout=DEADLINE)
        assert len(waits) < 10
        assert reader.commit(stream)


def test_feedback_keeps_the_stream(reader: Reader) -> None:
    """A stream that is not read lives on beyond its lease, and gives everything then."""
    stream = reader.open(lease=2.0)
    # A busy machine is no failure.
    stream._patience = DEADLINE
    stream.listen(False)
    reader.db("INSERT INTO items VALUES (1)")
    began = time.monotonic()
    while time.monotonic() - began < 6.0:
        reader.waiter.wait(None, 0.2)
        stream.beat()
    assert reader.commit(stream)


def test_silence_frees_the_slot(reader: Reader) -> None:
    """The server ends a stream that has told it nothing for the lease, and frees the slot."""
    stream = reader.open(lease=1.0)
    eventually(lambda: look(reader.db, reader.slot), lambda slot: slot.active_pid is None)
    with pytest.raises(DatabaseError, match="more than a third of the lease"):
        stream.read()
    assert reader.open().read() is None


def test_a_lease_that_is_missed(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read any more, or told, when the process has been stopped for too long."""
    stream = reader.open()
    now = module._now()
    reader.db("INSERT INTO items VALUES (1)")
    monkeypatch.setattr(module, "_now", lambda: now + 0.3 * LEASE)
    stream.beat()
    assert isinstance(reader.until(stream, lambda each: isinstance(each, Begin))[0][1], Begin)
    monkeypatch.setattr(module, "_now", lambda: now + 0.7 * LEASE)
    for call in (stream.read, stream.beat, stream.read):
        with pytest.raises(DatabaseError, match="was it stopped, or is the machine overloaded"):
            call()


def test_a_forked_child_leaves_the_stream_alone(reader: Reader) -> None:
    """What the child of a fork abandons, the parent goes on with."""
    stream = reader.open()
    child = os.fork()
    if child == 0:
        try:
            stream.abandon()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    reader.db("INSERT INTO items VALUES (1)")
    assert reader.commit(stream)


class Alone:
    """What psycopg2 does by itself: one cursor that reads and tells."""

    def __init__(self, dsn: str, slot: str) -> None:
        self.connection = psycopg2.connect(dsn, connection_factory=LogicalReplicationConnection)
        self.cursor: Any = self.connection.cursor()
        self.cursor.start_replication(
            slot, options={"proto_version": "1", "publication_names": "p"}, status_interval=10_000
        )

    def until(self, right: Callable[[Any], bool]) -> Any:
        """Read until a message, or the cursor for want of one, is right; return it."""
        deadline = time.monotonic() + DEADLINE
        while not right(read := self.cursor.read_message() or self.cursor):
            assert time.monotonic() < deadline
        return read


def test_an_idle_keepalive_moves_nothing(reader: Reader) -> None:
    """After all is acknowledged, what is written for others moves psycopg2's position, not ours."""
    stream = reader.open()
    reader.db("INSERT INTO items VALUES (1)")
    end = reader.commit(stream)
    stream.confirm(end)
    stream.beat()
    eventually(reader.confirmed, lambda lsn: lsn == end)
    reader.db("INSERT INTO others VALUES (1)")
    later = reader.log_end()
    reader.until_received(stream, later)
    stream.beat()
    assert stream.unasked == end
    # By its answer to this the server has taken what was told before.
    replied = "SELECT reply_time FROM pg_stat_replication WHERE pid = %s"
    pid = (stream._live.info.backend_pid,)
    before = reader.db(replied, pid)
    stream.beat()
    eventually(lambda: reader.db(replied, pid), lambda found: found != before)
    assert reader.confirmed() == end
    stream.close()
    eventually(lambda: look(reader.db, reader.slot), lambda slot: slot.active_pid is None)

    alone = Alone(reader.db.dsn, reader.slot)
    with closing(alone.connection):
        reader.db("INSERT INTO items VALUES (2)")
        end = alone.until(lambda read: getattr(read, "payload", b"")[:1] == b"C").data_start
        alone.cursor.send_feedback(flush_lsn=end, force=True)
        reader.db("INSERT INTO others VALUES (2)")
        later = reader.log_end()
        alone.until(lambda read: read.wal_end >= later)
        alone.cursor.send_feedback(force=True)
        # So the position that somebody has saved, which is the end, would lie below the slot's.
        eventually(reader.confirmed, lambda lsn: lsn >= later)


def test_an_answer_before_anything_is_read(reader: Reader) -> None:
    """The server asks a silent stream, and psycopg2 acknowledges what it was not told to."""
    stream = reader.open(lease=4.0)
    stream._patience = DEADLINE
    reader.db("INSERT INTO others VALUES (1)")
    later = reader.log_end()
    reader.until_received(stream, later)
    assert stream.unasked == stream.confirmed == 0

    def answered() -> int:
        assert stream.read() is None
        return stream.unasked

    eventually(answered, lambda lsn: lsn >= later)
    assert eventually(reader.confirmed, lambda lsn: lsn >= later) <= stream.unasked
    told = stream.unasked
    stream.close()
    assert stream.unasked == told


Scripted = tuple[WalSender, ReplicationStream, Waiter]


def test_an_answer_between_the_rows_of_an_old_transaction(
    reader: Reader, connect: Callable[[str], Database]
) -> None:
    """The server asks there, and psycopg2 alone acknowledges a transaction that nobody has."""
    lease = 8.0
    stream = reader.open(lease=lease)
    stream._patience = DEADLINE
    other = f"{reader.slot}_alone"
    create(reader.db, other, reader.db.connection.server_version, DEADLINE)
    alone = Alone(f"{reader.db.dsn}?options=-cwal_sender_timeout%3D{lease:.0f}s", other)
    with closing(alone.connection):
        old = connect(reader.db.dsn)
        old("BEGIN")
        # More than sockets hold, so that the server waits between them.
        old("INSERT INTO items SELECT id, repeat('x', 1000) FROM generate_series(1, 30000) AS id")
        reader.db("INSERT INTO items VALUES (-1)")
        acknowledged = reader.commit(stream)
        stream.confirm(acknowledged)
        stream.beat()
        alone.until(lambda read: getattr(read, "data_start", 0) == acknowledged)
        alone.cursor.send_feedback(flush_lsn=acknowledged, force=True)
        reader.db("INSERT INTO items VALUES (-2)")
        unacknowledged = reader.commit(stream)
        alone.until(lambda read: getattr(read, "data_start", 0) == unacknowledged)
        stream.beat()
        alone.cursor.send_feedback(force=True)
        old("COMMIT")
        eventually(
            lambda: reader.db(
                "SELECT min(clock_timestamp() - reply_time) > make_interval(secs => %s)"
                " FROM pg_stat_replication",
                (0.6 * lease,),
            ),
            lambda found: found == [(True,)],
        )
        ended = False
        while not ended:
            if (message := stream.read()) is not None:
                ended = isinstance(decode(message[1]), Commit)
                # A Relation comes first, if at all; from then on all lies below what is confirmed.
                assert ended or message[0] < acknowledged
        alone.until(lambda read: getattr(read, "payload", b"")[:1] == b"C")
        assert stream._has_answered()
        stream.beat()
        eventually(
            lambda: look(reader.db, other),
            lambda slot: slot is not None and (slot.confirmed or 0) >= unacknowledged,
        )
        assert reader.confirmed() == acknowledged


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    """A WAL sender that sends what it is told to, and a stream from it."""
    with closing(Waiter()) as waiter, WalSender() as sender:
        stream = ReplicationStream(sender.dsn, waiter, lambda: False)
        stream.open(SLOT, ["p"], 0, LEASE, DEADLINE)
        assert sender.told.get(timeout=DEADLINE) == 0
        yield sender, stream, waiter
        stream.close()


def read(stream: ReplicationStream, count: int, waiter: Waiter) -> list[int]:
    """The positions of so many messages."""
    found: list[int] = []
    while len(found) < count:
        if (message := stream.read()) is None:
            began = time.monotonic()
            waiter.wait(None, DEADLINE)
            assert time.monotonic() - began < DEADLINE, f"no more has come than {found}"
            continue
        found.append(message[0])
    return found


def psycopg2_alone(*messages: bytes, confirm: int, sender: WalSender) -> int:
    """What psycopg2 answers with a single cursor that was told ``confirm`` before these."""
    with closing(
        psycopg2.connect(sender.dsn, connection_factory=LogicalReplicationConnection)
    ) as connection:
        cursor: Any = connection.cursor()
        cursor.start_replication(SLOT, options={"a": "b"}, status_interval=10_000)
        cursor.send_feedback(flush_lsn=confirm, force=True)
        assert sender.told.get(timeout=DEADLINE) == confirm
        sender.send(*messages)
        deadline = time.monotonic() + DEADLINE
        while sender.told.empty():
            cursor.read_message()
            assert time.monotonic() < deadline
        return sender.told.get()


# A transaction that ends at 100 is confirmed, and one that ends at 200 is not. One that began at 50
# is being sent when the server asks for an answer.
OLD_ROWS = (50, 60)


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_an_answer_behind_rows_of_an_old_transaction(scripted: Scripted, rows: int) -> None:
    """It acknowledges nothing, where psycopg2 alone acknowledges what nobody has."""
    sender, stream, waiter = scripted
    messages = [
        sender.begin(80, 90),
        sender.message(100, b"C"),
        sender.begin(150, 190),
        sender.message(160, b"I"),
        sender.message(200, b"C"),
        sender.begin(50, 290),
        *(sender.message(lsn, b"I") for lsn in OLD_ROWS[:rows]),
        sender.keepalive(250, asking=True),
    ]
    stream.confirm(100)
    stream.beat()
    assert sender.told.get(timeout=DEADLINE) == 100
    sender.send(*messages, sender.message(300, b"C"))
    assert read(stream, 7 + rows, waiter)[-1] == 300
    assert sender.told.get(timeout=DEADLINE) == 0
    assert stream.unasked == 100
    stream.beat()
    assert sender.told.get(timeout=DEADLINE) == 100
    with WalSender() as another:
        assert psycopg2_alone(*messages, confirm=100, sender=another) == 250


def test_an_answer_behind_a_relation(scripted: Scripted) -> None:
    """It has no position, so that psycopg2 acknowledges in any case; how much is known."""
    sender, stream, waiter = scripted
    messages = [
        sender.begin(150, 190),
        sender.message(200, b"C"),
        sender.begin(250, 290),
        sender.message(0, b"R"),
        sender.keepalive(280, asking=True),
        sender.message(260, b"I"),
    ]
    stream.confirm(100)
    sender.send(*messages)
    read(stream, 5, waiter)
    assert sender.told.get(timeout=DEADLINE) == 280
    assert 280 <= stream.unasked == 290
    # Our own feedback stays what it is.
    stream.beat()
    assert sender.told.get(timeout=DEADLINE) == 100
    with WalSender() as another:
        assert psycopg2_alone(*messages, confirm=100, sender=another) == 280


def test_a_relation_without_an_answer(scripted: Scripted) -> None:
    """A keepalive that asks for nothing makes nobody tell anything."""
    sender, stream, waiter = scripted
    stream.confirm(100)
    sender.send(
        sender.begin(150, 190),
        sender.message(0, b"R"),
        sender.keepalive(180),
        sender.message(160, b"I"),
        sender.message(200, b"C"),
        sender.keepalive(250),
    )
    read(stream, 4, waiter)
    assert stream.read() is None
    assert stream.received == 250
    assert stream.unasked == 100
    stream.beat()
    assert sender.told.get(timeout=DEADLINE) == 100
    assert sender.told.empty()


def test_a_connection_lost_behind_a_relation(scripted: Scripted) -> None:
    """What may have been told is what may have been told at most, once nobody can know any more."""
    sender, stream, waiter = scripted
    stream.confirm(100)
    sender.send(sender.begin(150, 190), sender.message(0, b"R"), sender.message(160, b"I"))
    read(stream, 3, waiter)
    assert stream.unasked == 100
    sender.end()
    with pytest.raises(DatabaseError):
        read(stream, 1, waiter)
    assert stream.unasked == 190
    stream.close()
    assert stream.unasked == 190


@pytest.mark.parametrize(
    "keepalives", [b"", WalSender.keepalive(50)], ids=["alone", "behind a keepalive"]
)
def test_a_part_of_a_record_does_not_stay_hidden(tmp_path: Path, keepalives: bytes) -> None:
    """Over TLS, the last bytes of a message are read that the socket does not show any more."""
    files = tls_files(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files["ssl.keystore.location"])
    # libpq has room for 16,384 bytes until it knows how long a message is, for which it needs five.
    # So an older one (15.18 did) leaves the last three bytes of the second record with OpenSSL.
    message = WalSender.message(100, b"x" * 16_357)
    assert len(message) == 3 + 16_384
    records = [keepalives + message[:3], message[3:]]
    with closing(Waiter()) as waiter, WalSender(context, records) as sender:
        stream = ReplicationStream(sender.dsn, waiter, lambda: False)
        stream.open(SLOT, ["p"], 0, LEASE, DEADLINE)
        assert sender.started.wait(DEADLINE)
        assert read(stream, 1, waiter) == [100]
        stream.close()
