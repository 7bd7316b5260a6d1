"""What servers write by pgoutput, decoded, is what was done to their tables."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any, TypeVar

import psycopg2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg2.extensions import new_type, register_type
from psycopg2.extras import LogicalReplicationConnection

from pgsignals.core.lsn import read_lsn
from pgsignals.testing import Server
from pgsignals.wal.pgoutput import (
    UNCHANGED,
    Begin,
    Change,
    Commit,
    Delete,
    Insert,
    Message,
    Origin,
    Relation,
    RelationColumn,
    Row,
    Truncate,
    Type,
    Update,
    decode,
)
from tests.conftest import Database, Databases
from tests.pgoutput_encoder import encode

Kind = TypeVar("Kind", bound=Change)

PEEK = """
    SELECT data FROM pg_logical_slot_peek_binary_changes('slot', NULL, NULL,
        'proto_version', '1', 'publication_names', 'all_tables', 'messages', 'true')
"""

INT4, VARCHAR, TEXT = 23, 1043, 25


class Log:
    """A database all of whose tables are published, and what is written to it."""

    def __init__(self, db: Database) -> None:
        self.db = db
        db("CREATE PUBLICATION all_tables FOR ALL TABLES")

    def of(self, statement: str, parameters: Any = None, encoding: str = "utf-8") -> list[Change]:
        """Run a statement, and return what the log has of it."""
        # A temporary slot goes with the session, and with any error in it.
        self.db("SELECT pg_create_logical_replication_slot('slot', 'pgoutput', true)")
        self.db(statement, parameters)
        messages = [bytes(data) for (data,) in self.db(PEEK)]
        self.db("SELECT pg_drop_replication_slot('slot')")
        changes = [decode(message, encoding) for message in messages]
        # The encoder of the other tests writes what servers do.
        assert [encode(change, encoding) for change in changes] == messages
        return changes

    def only(self, kind: type[Kind], statement: str, parameters: Any = None) -> list[Kind]:
        """Run a statement, and return what of one kind the log has of it."""
        return [each for each in self.of(statement, parameters) if isinstance(each, kind)]

    def oid(self, name: str, of: str = "regclass") -> int:
        """The OID of a table, or of a type."""
        [(oid,)] = self.db(f"SELECT '{name}'::{of}::oid::bigint")
        return int(oid)

    def texts(self, query: str) -> list[Row]:
        """The rows of a query as the server sends them, without a typecaster of the client."""
        oids = tuple(oid for (oid,) in self.db("SELECT oid FROM pg_type"))
        sent = new_type(oids, "SENT", lambda value, _: None if value is None else value.encode())
        with self.db.connection.cursor() as cursor:
            register_type(sent, cursor)
            cursor.execute(query)
            return cursor.fetchall()


@pytest.fixture
def log(each_dsn: str, connect: Callable[[str], Database]) -> Log:
    """A fresh database on each tested version, all of whose tables are published."""
    return Log(connect(each_dsn))


# --- values ---------------------------------------------------------------------------------------

VALUES = {
    "int2": "-32768",
    "int4": "2147483647",
    "int8": "-9223372036854775808",
    "numeric": "'-12345678901234567890.0001200'",
    "numeric(6, 2)": "'NaN'",
    "float4": "1.1",
    "float8": "'-Infinity'",
    "money": "12.5",
    "bool": "true",
    "text": "E'a\\tb\\\\c\\n\"\U0001f600'",
    "varchar(9)": "''",
    "char(5)": "'ab'",
    '"char"': "'x'",
    "name": "'n'",
    "bytea": r"'\x00ff74'",
    "date": "'0044-03-15 BC'",
    "time": "'23:59:59.999999'",
    "timetz": "'12:00:00+05:30'",
    "timestamp": "'infinity'",
    "timestamptz": "'2026-10-25 02:30:00+01'",
    "interval": "'1 year -2 days 03:04:05.6'",
    "uuid": "'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'",
    "json": """'{"a": [1,  null]}'""",
    "jsonb": """'{"b": 1, "a": "ß"}'""",
    "inet": "'::1/64'",
    "macaddr": "'08:00:2b:01:02:03'",
    "bit(3)": "B'101'",
    "point": "'(1,2)'",
    "int4[]": "'{{1,NULL},{3,4}}'",
    "text[]": """ARRAY['a,b', NULL, '"']""",
    "int4range": "'[1,5)'",
    "int4multirange": "'{[1,2),[5,8)}'",
    "tsvector": "'a b'",
    "pg_lsn": "'16/B374D848'",
    "mood": "'so so'",
    "positive": "7",
    "pair": "ROW('it''s', NULL)",
}


def test_rows(log: Log) -> None:
    """Values of all kinds are what a query sends of them, and NULL is None."""
    log.db(
        "CREATE TYPE mood AS ENUM ('so so'); CREATE DOMAIN positive AS int CHECK (value > 0);"
        " CREATE TYPE pair AS (a text, b int)"
    )
    columns = ", ".join(f"c{number} {type_}" for number, type_ in enumerate(VALUES))
    log.db(f"CREATE TABLE items ({columns})")
    values = list(VALUES.values())
    even = [value if number % 2 else "NULL" for number, value in enumerate(values)]
    odd = ["NULL" if number % 2 else value for number, value in enumerate(values)]
    rows = ", ".join(f"({', '.join(row)})" for row in (values, ["NULL"] * len(values), even, odd))
    inserts = log.only(Insert, f"INSERT INTO items VALUES {rows}")
    assert [insert.new for insert in inserts] == log.texts("TABLE items")
    assert {insert.relation for insert in inserts} == {log.oid("items")}
    assert None not in inserts[0].new
    assert set(inserts[1].new) == {None}


def test_random_rows(log: Log) -> None:
    """Whatever is written comes out, and so does what an update and a delete have of it."""
    log.db("CREATE TABLE items (id int PRIMARY KEY, a text, b bytea, c numeric, d float8, e int8)")
    log.db("ALTER TABLE items REPLICA IDENTITY FULL")
    texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
    fields = (
        texts,
        st.binary(),
        st.decimals(allow_infinity=False),
        st.floats(),
        st.integers(-(1 << 63), (1 << 63) - 1),
    )
    rows = st.tuples(*(st.none() | field for field in fields))

    @given(st.lists(st.tuples(rows, rows), min_size=1, max_size=5))
    def check(pairs: list[tuple[Any, Any]]) -> None:
        before = [(number, *old) for number, (old, _) in enumerate(pairs)]
        after = [(number, *new) for number, (_, new) in enumerate(pairs)]
        log.db("TRUNCATE items")
        inserts = log.only(Insert, many(before), flat(before))
        assert [insert.new for insert in inserts] == log.texts("TABLE items ORDER BY id")
        for (_, a, b, *_), insert in zip(before, inserts, strict=True):
            assert insert.new[1] == (None if a is None else a.encode())
            assert insert.new[2] == (None if b is None else b"\\x" + b.hex().encode())
        updates = log.only(
            Update,
            f"{many(after)} ON CONFLICT (id) DO UPDATE SET (a, b, c, d, e) ="
            " (excluded.a, excluded.b, excluded.c, excluded.d, excluded.e)",
            flat(after),
        )
        assert [update.old for update in updates] == [insert.new for insert in inserts]
        assert [update.new for update in updates] == log.texts("TABLE items ORDER BY id")
        deletes = log.only(Delete, "DELETE FROM items")
        assert {delete.old for delete in deletes} == {update.new for update in updates}

    check()


def many(rows: list[Any]) -> str:
    """The INSERT of so many rows."""
    return f"INSERT INTO items VALUES {', '.join(['(%s, %s, %s, %s, %s, %s)'] * len(rows))}"


def flat(rows: list[Any]) -> list[Any]:
    """The parameters of that INSERT."""
    return [value for row in rows for value in row]


def test_a_row_without_columns(log: Log) -> None:
    """A table may have no column; its rows have no value."""
    log.db("CREATE TABLE nothing ()")
    [relation, insert] = log.of("INSERT INTO nothing DEFAULT VALUES")[1:-1]
    assert relation == Relation(log.oid("nothing"), "public", "nothing", "d", ())
    assert insert == Insert(log.oid("nothing"), ())


def test_client_encoding(log: Log) -> None:
    """Names and values come in the encoding of the session that reads, a message's content not."""
    log.db('CREATE TABLE "Größe" ("ä" text)')
    log.db.connection.set_client_encoding("latin1")
    statement = """
        INSERT INTO "Größe" VALUES ('ö'); SELECT pg_logical_emit_message(true, 'ü', 'ß')
    """
    _, relation, insert, message, _ = log.of(statement, encoding="latin-1")
    assert isinstance(relation, Relation)
    assert (relation.name, relation.columns[0].name) == ("Größe", "ä")
    assert isinstance(insert, Insert)
    assert insert.new == ("ö".encode("latin-1"),)
    assert isinstance(message, Message)
    assert (message.prefix, message.content) == ("ü", "ß".encode())


# --- old rows -------------------------------------------------------------------------------------


def test_update_with_the_key_as_identity(log: Log) -> None:
    """An update has an old row only if it changes the key, and then nothing but the key."""
    log.db("CREATE TABLE items (a text, id int PRIMARY KEY); INSERT INTO items VALUES ('x', 1)")
    items = log.oid("items")
    [update] = log.only(Update, "UPDATE items SET a = 'y'")
    assert update == Update(items, None, False, (b"y", b"1"))
    [update] = log.only(Update, "UPDATE items SET id = 2, a = 'z'")
    assert update == Update(items, (None, b"1"), True, (b"z", b"2"))


def test_update_with_an_index_as_identity(log: Log) -> None:
    """The old row has the columns of whatever index is the replica identity."""
    log.db("CREATE TABLE items (id int PRIMARY KEY, a int NOT NULL, b int NOT NULL)")
    log.db("CREATE UNIQUE INDEX by_b ON items (b)")
    log.db("ALTER TABLE items REPLICA IDENTITY USING INDEX by_b")
    log.db("INSERT INTO items VALUES (1, 2, 3)")
    relation, update = log.of("UPDATE items SET id = 4, b = 5")[1:-1]
    assert isinstance(relation, Relation)
    assert relation.identity == "i"
    assert [column.key for column in relation.columns] == [False, False, True]
    assert update == Update(log.oid("items"), (None, None, b"3"), True, (b"4", b"2", b"5"))


def test_full_identity(log: Log) -> None:
    """With REPLICA IDENTITY FULL an update and a delete have the whole old row, NULLs included."""
    log.db("CREATE TABLE items (id int PRIMARY KEY, a text, b text)")
    log.db("ALTER TABLE items REPLICA IDENTITY FULL; INSERT INTO items VALUES (1, 'x', NULL)")
    items = log.oid("items")
    relation, update, delete = log.of("UPDATE items SET a = 'y'; DELETE FROM items")[1:-1]
    assert isinstance(relation, Relation)
    assert relation.identity == "f"
    assert all(column.key for column in relation.columns)
    assert update == Update(items, (b"1", b"x", None), False, (b"1", b"y", None))
    assert delete == Delete(items, (b"1", b"y", None), False)


def test_delete(log: Log) -> None:
    """A delete has the key of the row alone."""
    log.db("CREATE TABLE items (a text, id int PRIMARY KEY); INSERT INTO items VALUES ('x', 1)")
    [delete] = log.only(Delete, "DELETE FROM items")
    assert delete == Delete(log.oid("items"), (None, b"1"), True)


def test_an_unchanged_toasted_value(log: Log) -> None:
    """A TOASTed value that an update leaves alone is not sent; FULL has it in the old row."""
    log.db("CREATE TABLE items (id int PRIMARY KEY, a text, big text)")
    log.db("ALTER TABLE items ALTER big SET STORAGE EXTERNAL")
    log.db("INSERT INTO items VALUES (1, 'x', repeat('g', 10000))")
    items, big = log.oid("items"), b"g" * 10_000
    [update] = log.only(Update, "UPDATE items SET a = 'y'")
    assert update == Update(items, None, False, (b"1", b"y", UNCHANGED))
    [update] = log.only(Update, "UPDATE items SET id = 2")
    assert update == Update(items, (b"1", None, None), True, (b"2", b"y", UNCHANGED))
    log.db("ALTER TABLE items REPLICA IDENTITY FULL")
    [update] = log.only(Update, "UPDATE items SET a = 'z'")
    assert update == Update(items, (b"2", b"y", big), False, (b"2", b"z", UNCHANGED))
    [update] = log.only(Update, "UPDATE items SET big = repeat('h', 10000)")
    assert update == Update(items, (b"2", b"z", big), False, (b"2", b"z", b"h" * 10_000))


# --- tables, types and messages -------------------------------------------------------------------


def test_truncate(log: Log) -> None:
    """One TRUNCATE is one change of all its tables, with what was asked for."""
    log.db("CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE b (id int REFERENCES a)")
    log.db("CREATE TABLE c ()")
    a, b, c = map(log.oid, "abc")
    [cascaded] = log.only(Truncate, "TRUNCATE a CASCADE")
    assert (set(cascaded.relations), cascaded.cascade, cascaded.restart) == ({a, b}, True, False)
    [restarted] = log.only(Truncate, "TRUNCATE c, b RESTART IDENTITY")
    assert (set(restarted.relations), restarted.cascade, restarted.restart) == ({b, c}, False, True)


def test_relation(log: Log) -> None:
    """A table is described before its first row, and again once it has another column."""
    log.db('CREATE SCHEMA "My ""Schema"""; CREATE TABLE "My ""Schema"""."Größe" (id int, a text)')
    name = '"My ""Schema"""."Größe"'
    log.db(f"ALTER TABLE {name} ADD PRIMARY KEY (id)")
    oid = log.oid(name)
    changes = log.of(
        f"INSERT INTO {name} VALUES (1, 'x'), (2, 'y');"
        f"ALTER TABLE {name} ADD COLUMN new_one varchar(9);"
        f"INSERT INTO {name} VALUES (3, 'z', 'w')"
    )
    columns = RelationColumn("id", INT4, -1, True), RelationColumn("a", TEXT, -1, False)
    added = RelationColumn("new_one", VARCHAR, 13, False)
    assert changes[1:-1] == [
        Relation(oid, 'My "Schema"', "Größe", "d", columns),
        Insert(oid, (b"1", b"x")),
        Insert(oid, (b"2", b"y")),
        Relation(oid, 'My "Schema"', "Größe", "d", (*columns, added)),
        Insert(oid, (b"3", b"z", b"w")),
    ]


def test_a_relation_without_identity(log: Log) -> None:
    """No column is a key in a table with REPLICA IDENTITY NOTHING."""
    log.db("CREATE TABLE items (id int PRIMARY KEY); ALTER TABLE items REPLICA IDENTITY NOTHING")
    [relation] = log.only(Relation, "INSERT INTO items VALUES (1)")
    column = RelationColumn("id", INT4, -1, False)
    assert relation == Relation(log.oid("items"), "public", "items", "n", (column,))


def test_types(log: Log) -> None:
    """A type that is not built in is named before its table; a domain by the type beneath it."""
    log.db("CREATE SCHEMA s; CREATE TYPE s.mood AS ENUM ('so so'); CREATE DOMAIN short AS text")
    log.db("CREATE TABLE items (id int, a s.mood, b short)")
    mood, short = log.oid("s.mood", "regtype"), log.oid("short", "regtype")
    changes = log.of("INSERT INTO items VALUES (1, 'so so', 'x')")
    assert changes[1:3] == [Type(mood, "s", "mood"), Type(short, "pg_catalog", "text")]
    assert isinstance(changes[3], Relation)
    assert [column.type_oid for column in changes[3].columns] == [INT4, mood, short]


def test_a_transactional_message(log: Log) -> None:
    """A message lies between its transaction's changes, and has whatever bytes were given."""
    log.db("CREATE TABLE items (id int)")
    items = log.oid("items")
    content = bytes(range(256))
    begin, _, first, message, second, _ = log.of(
        "INSERT INTO items VALUES (1);"
        " SELECT pg_logical_emit_message(true, 'pgsignals', %s::bytea);"
        " INSERT INTO items VALUES (2)",
        [content],
    )
    assert (first, second) == (Insert(items, (b"1",)), Insert(items, (b"2",)))
    assert isinstance(begin, Begin)
    assert isinstance(message, Message)
    assert (message.transactional, message.prefix, message.content) == (True, "pgsignals", content)
    assert message.lsn < begin.final_lsn


def test_a_message_of_no_transaction(log: Log) -> None:
    """A message that is not transactional stands alone, whatever becomes of its transaction."""
    log.db("CREATE TABLE items (id int)")
    message, begin, *_ = log.of(
        "BEGIN; SELECT pg_logical_emit_message(false, '', 'x'); ROLLBACK;"
        " INSERT INTO items VALUES (1)"
    )
    assert isinstance(message, Message)
    assert (message.transactional, message.prefix, message.content) == (False, "", b"x")
    assert isinstance(begin, Begin)


# --- transactions ---------------------------------------------------------------------------------


def test_begin_and_commit(log: Log) -> None:
    """A transaction's ends tell its xid, the time of the commit, and where it and its end lie."""
    log.db("CREATE TABLE items (written_by bigint)")

    def now() -> tuple[int, int]:
        [(lsn, at_us)] = log.db(
            "SELECT pg_current_wal_lsn()::text,"
            " (extract(epoch FROM clock_timestamp()) * 1000000)::bigint"
        )
        return read_lsn(lsn), at_us

    start, earliest = now()
    begin, *_, commit = log.of("INSERT INTO items VALUES (pg_current_xact_id()::text::bigint)")
    end, latest = now()
    [(xid,)] = log.db("TABLE items")
    assert isinstance(begin, Begin)
    assert isinstance(commit, Commit)
    assert begin.xid == xid % (1 << 32)
    assert earliest <= begin.at_us == commit.at_us <= latest
    assert start < begin.final_lsn == commit.lsn < commit.end_lsn <= end


def test_origin(log: Log) -> None:
    """A transaction of a replication origin names it, with its position and time there."""
    log.db("CREATE TABLE items (id int); SELECT pg_replication_origin_create('Größe')")
    log.db("SELECT pg_replication_origin_session_setup('Größe')")
    begin, origin, *_, commit = log.of(
        "BEGIN; INSERT INTO items VALUES (1);"
        " SELECT pg_replication_origin_xact_setup('16/B374D848', '1999-12-31 23:59:59.999999+00');"
        " COMMIT"
    )
    assert origin == Origin(0x16_B374D848, "Größe")
    assert isinstance(begin, Begin)
    assert isinstance(commit, Commit)
    assert begin.at_us == commit.at_us == 946_684_799_999_999
    # An origin is the whole server's.
    log.db("SELECT pg_replication_origin_session_reset(), pg_replication_origin_drop('Größe')")


# --- the fixtures ---------------------------------------------------------------------------------


def test_a_database_with_slots_can_be_dropped(each_server: Server) -> None:
    """A test's database goes, with its slots, even while somebody reads from one of them."""
    databases = Databases(each_server)
    dsn = databases.create()
    with closing(
        psycopg2.connect(dsn, connection_factory=LogicalReplicationConnection)
    ) as connection:
        cursor = connection.cursor()
        for slot in ("idle_one", "read_one"):
            cursor.create_replication_slot(slot, output_plugin="pgoutput")
        cursor.start_replication("read_one", options={"proto_version": 1, "publication_names": "p"})
        other = databases.create()
    with closing(psycopg2.connect(other)) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT slot_name FROM pg_replication_slots WHERE slot_name LIKE '%_one'")
        assert cursor.fetchall() == []
        with pytest.raises(psycopg2.OperationalError, match="does not exist"):
            psycopg2.connect(dsn)
