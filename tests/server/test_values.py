"""Values in events are those that a psycopg2 query gives, of every type, whoever the writer is."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable, Iterator
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import Any, get_args

import psycopg2
import psycopg2.extras
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg2 import sql

from pgsignals import Event, Hub, watch
from pgsignals.hub.hub import Delivery
from pgsignals.testing import Server
from tests.conftest import DEADLINE, Database, Recorder

DIGITS = "9" * 500 + "." + "7" * 500

# Literals of each type of pg_catalog; the arrays of all types are made from them.
SAMPLES = {
    "aclitem": ["postgres=arwdDxt/postgres"],
    "bit": ["1"],
    "bool": ["true", "false"],
    "box": ["(2,2),(0.1,0)"],
    "bpchar": ["a", "a  ", "ħ"],
    "bytea": ["\\x", "\\x00ff5c27", "\\x" + "ab" * 300],
    "char": ["x", "", '"'],
    "cid": ["7"],
    "cidr": ["10.0.0.0/8", "::/0"],
    "circle": ["<(0.1,2),3>"],
    "date": ["2024-02-29", "infinity", "-infinity", "0044-03-15 BC", "9999-12-31", "0001-01-01"],
    "datemultirange": ["{[2024-01-02,2024-02-03),[2024-05-06,)}", "{}"],
    "daterange": ["[2024-01-02,2024-02-03)", "empty", "(,)", "[2024-01-02,)", "(,infinity]"],
    "float4": ["0.1", "NaN", "Infinity", "-Infinity", "1e-40", "16777217", "-0"],
    "float8": ["0.1", "NaN", "Infinity", "-Infinity", "5e-324", "0.30000000000000004", "-0"],
    "gtsvector": [],
    "inet": ["10.1.2.3", "10.1.2.3/8", "::1/128"],
    "int2": ["-32768", "32767"],
    "int2vector": ["1 2 3", ""],
    "int4": ["-2147483648", "2147483647"],
    "int4multirange": ["{[1,3),[5,)}", "{}"],
    "int4range": ["[1,3)", "empty", "(,)", "[1,)"],
    "int8": ["-9223372036854775808", "9223372036854775807"],
    "int8multirange": ["{[1,3)}"],
    "int8range": ["[1,9223372036854775807)"],
    "interval": ["1 day 02:03:04.567", "-1 day -00:00:01", "1 year 2 mons", "00:00"],
    "json": ['{"a": [1, null, "é\\n"]}', "null", "[]", '"x"', " 1.50 ", '{"a":1,"a":2}'],
    "jsonb": ['{"a": [1, null, "é\\n"]}', "null", "[]", "1.50", '"x"'],
    "jsonpath": ['$."a"[*] ? (@ > 2)'],
    "line": ["{1,-1,0.1}"],
    "lseg": ["[(0,0.1),(1,1)]"],
    "macaddr": ["08:00:2b:01:02:03"],
    "macaddr8": ["08:00:2b:01:02:03:04:05"],
    "money": ["1234567.89", "-0.01"],
    "name": ["a'b\"c", "é" * 31],
    "numeric": ["0", "-1.50", "NaN", "Infinity", "-Infinity", "1e20", "0.0000001", DIGITS],
    "nummultirange": ["{[1.50,3),(5,)}"],
    "numrange": ["[1.50,3)", "empty", "(,)", "[1.0,NaN]"],
    "oid": ["4294967295"],
    "oidvector": ["1 2 3"],
    "path": ["[(0,0.1),(1,1)]", "((0,0),(1,1))"],
    "pg_brin_bloom_summary": [],
    "pg_brin_minmax_multi_summary": [],
    "pg_dependencies": [],
    "pg_lsn": ["16/B374D848"],
    "pg_mcv_list": [],
    "pg_ndistinct": [],
    "pg_node_tree": [],
    "pg_snapshot": ["10:20:10,14,15"],
    "point": ["(0.1,2)"],
    "polygon": ["((0,0.1),(1,1),(2,0))"],
    "refcursor": ["a cursor"],
    "regclass": ["pg_class", "7"],
    "regcollation": ['"C"'],
    "regconfig": ["english"],
    "regdictionary": ["simple"],
    "regnamespace": ["pg_catalog"],
    "regoper": ["||/"],
    "regoperator": ["=(integer,integer)"],
    "regproc": ["now"],
    "regprocedure": ["sum(integer)"],
    "regrole": ["postgres"],
    "regtype": ["timestamp with time zone", "integer[]"],
    "text": ["", "a\tb\nc\rd\\e'f\"g", "\x01\x1f\x7f\u2028", "😀", "NULL", "{}", "null", "\\N"],
    "tid": ["(1,2)"],
    "time": ["12:34:56.789", "00:00"],
    "timestamp": ["2024-02-29 12:34:56.789", "infinity", "-infinity", "0044-03-15 01:02 BC"],
    "timestamptz": ["2024-07-01 12:34:56.789+05:45", "infinity", "-infinity", "0044-03-15 BC"],
    "timetz": ["12:34:56.789+05:45", "00:00-11"],
    "tsmultirange": ["{[2024-01-01 10:00,2024-01-01 11:00)}"],
    "tsquery": ["'fat' & ( 'rat' | !'c at' )"],
    "tsrange": ["[2024-01-01 10:00,infinity)", "(,2024-01-01)", "empty"],
    "tstzmultirange": ["{[2024-01-01 10:00+05:45,2024-01-01 11:00Z)}"],
    "tstzrange": ["[2024-01-01 10:00+05:45,2024-07-01 10:00Z)", "(,)"],
    "tsvector": ["'a':1A 'it''s':2"],
    "txid_snapshot": ["10:20:10,14,15"],
    "uuid": ["0b7e9a1c-0000-4000-8000-000000000001"],
    "varbit": ["1010", ""],
    "varchar": ["", "NULL", "a,b"],
    "xid": ["7"],
    "xid8": ["18446744073709551615"],
    "xml": ['<a b="c">é</a>'],
}
ARRAYS = {
    "int4[]": ["{}", "{{1,2},{3,NULL}}", "{{{1}}}", "{NULL}"],
    "text[]": ["{}", '{{"a,b","c\\"d"},{NULL,"NULL"}}', '{"\\\\",""," ","{}"}'],
    "numeric[]": ["{{1.50,NaN}}"],
    "float8[]": ["{NaN,-Infinity}"],
    "bool[]": ["{{t,f}}"],
    "date[]": ["{2024-02-29}", "{0044-03-15 BC}"],
}
OWN = {
    "mood": ["sad", 'it\'s "ok"'],
    "mood[]": ['{sad,NULL,"it\'s \\"ok\\""}'],
    "even": ["2"],
    "tags": ["{a,NULL}"],
    "feeling": ["sad"],
    "pair": ['(1,"a ""quoted"" \\\\ ,(text)")', "(,)", '(,"")'],
    "pair[]": ['{"(1,\\"a b\\")"}'],
    "checked_pair": ["(1,x)"],
    "holder": ['("(1,x)","{1,2}",2024-02-29,0.1)'],
    "floats": ["[0.1,0.30000000000000004)"],
    "even[]": ["{2,4}"],
    "int2vector[]": ['{"1 2"}'],
}
EXTENSIONS = {"hstore": ['"a"=>"1", "b"=>NULL'], "citext": ["Ä b", ""], "citext[]": ["{A,b}"]}

UNUSUAL_SESSION = """
    SET DateStyle = 'SQL, DMY';
    SET TimeZone = 'Asia/Kathmandu';
    SET IntervalStyle = 'iso_8601';
    SET bytea_output = 'escape';
    SET extra_float_digits = -5;
    SET xmlbinary = 'hex';
    SET search_path = '';
"""


class Values:
    """A table with one column of each type, a reader in a usual session, a writer in another."""

    def __init__(self, reader: Database, writer: Database) -> None:
        self.reader = reader
        self.writer = writer
        psycopg2.extras.register_uuid(conn_or_curs=reader.connection)
        self.samples: dict[str, list[str]] = {}
        reader(
            "CREATE TYPE mood AS ENUM ('sad', 'it''s \"ok\"');"
            "CREATE DOMAIN even AS int CHECK (VALUE % 2 = 0);"
            "CREATE DOMAIN tags AS text[] CHECK (cardinality(VALUE) > 0);"
            "CREATE DOMAIN feeling AS mood CHECK (VALUE IS DISTINCT FROM 'sad' OR true);"
            "CREATE TYPE pair AS (a int, b text);"
            "CREATE DOMAIN checked_pair AS pair CHECK ((VALUE).a > 0);"
            "CREATE TYPE holder AS (p pair, a int[], d date, f float8);"
            "CREATE TYPE floats AS RANGE (subtype = float8)"
        )
        for name, literals in {**self._builtin(), **ARRAYS, **OWN, **self._extensions()}.items():
            self.samples.setdefault(name, []).extend(literals)
        columns = [
            sql.SQL("{} {}").format(sql.Identifier(name), sql.SQL(_type_sql(name)))
            for name in self.samples
        ]
        reader(
            sql.SQL("CREATE TABLE every (row_id int PRIMARY KEY, {})").format(
                sql.SQL(", ").join(columns)
            )
        )

    def _builtin(self) -> dict[str, list[str]]:
        """Samples of all the types of pg_catalog that a column can have, arrays included."""
        found: dict[str, list[str]] = {}
        try:
            self.reader("SELECT '<a/>'::xml")
            samples = SAMPLES
        except psycopg2.errors.FeatureNotSupported:
            samples = {**SAMPLES, "xml": []}
        for name, element in self.reader(
            "SELECT t.typname, e.typname FROM pg_type t"
            " LEFT JOIN pg_type e ON e.oid = t.typelem AND e.typarray = t.oid"
            " LEFT JOIN pg_class c ON c.oid = e.typrelid"
            " WHERE t.typnamespace = 'pg_catalog'::regnamespace AND t.typtype IN ('b', 'r', 'm')"
            "   AND c.oid IS NULL AND e.typtype IS DISTINCT FROM 'p'"
            " ORDER BY t.typname"
        ):
            if element is None:
                found[name] = list(samples[name])
            else:
                items = samples[element]
                found[f"{element}[]"] = [
                    self.reader(
                        f"SELECT ARRAY[{'%s, ' * len(items)}NULL]::{_type_sql(element)}[]::text",
                        items,
                    )[0][0]
                ]
        return found

    def _extensions(self) -> dict[str, list[str]]:
        for name in ("hstore", "citext"):
            try:
                self.reader(f"CREATE EXTENSION {name}")
            except psycopg2.errors.FeatureNotSupported:
                return {}
        return EXTENSIONS

    @property
    def groups(self) -> list[list[str]]:
        """The columns, a few at a time, so that a row's values fit in a notification."""
        names = list(self.samples)
        return [names[at : at + 8] for at in range(0, len(names), 8)]

    def rows(self) -> Iterator[dict[str, str]]:
        """Columns and literals of each row to write, until each literal had its turn."""
        for number in range(max(map(len, self.samples.values()))):
            yield {
                name: literals[number % len(literals)]
                for name, literals in self.samples.items()
                if literals
            }

    def write(self, statement: str, row: dict[str, str]) -> dict[str, Any]:
        """Write the only row, NULL where ``row`` has nothing; what is stored then."""
        names = list(self.samples)
        self.writer(
            sql.SQL(statement).format(
                sql.SQL(", ").join(map(sql.Identifier, names)),
                sql.SQL(", ").join([sql.Literal(row.get(name)) for name in names]),
            )
        )
        return self.query(names, 0)

    def query(self, names: list[str], row_id: int) -> dict[str, Any]:
        """What psycopg2 gives, value by value: one that it cannot read is its text."""
        found = {}
        for name in names:
            column = sql.Identifier(name)
            where = sql.SQL(" FROM every WHERE row_id = {}").format(sql.Literal(row_id))
            try:
                [(found[name],)] = self.reader(sql.SQL("SELECT {}").format(column) + where)
            except (ValueError, OverflowError, psycopg2.DataError):
                [(found[name],)] = self.reader(sql.SQL("SELECT {}::text").format(column) + where)
        return found


def _type_sql(name: str) -> str:
    element = name.removesuffix("[]")
    array = name[len(element) :]
    if element in SAMPLES:
        return f'pg_catalog."{element}"{array}'
    return f'public."{element}"{array}'


def plain(value: Any) -> Any:
    """The value so that ``==`` means that nothing differs, NaN, the type and the scale included."""
    if isinstance(value, memoryview):
        # An event has bytes where a query gives this.
        return plain(bytes(value))
    if isinstance(value, (list, tuple)):
        return type(value), [plain(item) for item in value]
    if isinstance(value, float):
        return "float", value.hex() if math.isfinite(value) else str(value)
    if isinstance(value, Decimal):
        return "Decimal", str(value)
    return type(value), repr(value) if isinstance(value, psycopg2.extras.Range) else value


def same(left: dict[str, Any], right: dict[str, Any]) -> None:
    """Fails with the columns that differ."""
    assert {n: plain(v) for n, v in left.items()} == {n: plain(v) for n, v in right.items()}


@pytest.fixture
def values(each_dsn: str, each_db: Database, connect: Callable[[str], Database]) -> Values:
    """The table of all types, empty."""
    writer = connect(each_dsn)
    found = Values(each_db, writer)
    writer(UNUSUAL_SESSION)
    for (locale,) in each_db(
        "SELECT collcollate FROM pg_collation"
        " WHERE collprovider = 'c' AND collcollate LIKE '%\\_%' LIMIT 1"
    ):
        writer("SET lc_monetary = %s", [locale])
    return found


def test_every_type(values: Values, hub: Hub, each_dsn: str, delivery: Delivery) -> None:
    """Inserted, updated and deleted rows carry what a query gives for them, of every type."""
    recorder = Recorder()
    groups = {f"group {n}": names for n, names in enumerate(values.groups)}
    hub.start(
        each_dsn,
        [watch("every", extra=names, label=label) for label, names in groups.items()],
        delivery=delivery,
    )
    for label in groups:
        hub.subscribe(recorder, label)
    seen = 0

    def arrived() -> list[Event]:
        nonlocal seen
        seen += len(groups)
        return recorder.wait(seen)[-len(groups) :]

    rows = [{}, *values.rows(), {}]
    previous = values.write("INSERT INTO public.every (row_id, {}) VALUES (0, {})", rows[0])
    for event in arrived():
        assert event.op == "inserted"
        same(event.values, _some(previous, groups[event.label]))
    for row in rows[1:]:
        stored = values.write("UPDATE public.every SET (row_id, {}) = ROW (0, {})", row)
        for event in arrived():
            names = groups[event.label]
            assert (event.op, event.truncated) == ("updated", False), names
            same(event.values, _some(stored, names))
            same(event.old, _some(previous, names))
            assert event.changed <= set(names)
        values.writer("DELETE FROM public.every")
        for event in arrived():
            assert event.op == "deleted"
            same(event.values, _some(stored, groups[event.label]))
        previous = values.write("INSERT INTO public.every (row_id, {}) VALUES (0, {})", row)
        for event in arrived():
            assert event.op == "inserted"
            same(event.values, _some(previous, groups[event.label]))
            same(pickle.loads(pickle.dumps(event)).values, event.values)
            assert json.loads(json.dumps(event.to_dict())) == event.to_dict()


def test_a_database_that_reads_null_as_a_text(
    hub: Hub,
    each_dsn: str,
    each_db: Database,
    connect: Callable[[str], Database],
    delivery: Delivery,
) -> None:
    """With array_nulls off, as PostgreSQL 8.1 had it, events are what they are otherwise."""
    name = each_db.connection.info.dbname
    each_db(f"ALTER DATABASE {name} SET array_nulls = off")
    db = connect(each_dsn)
    db("CREATE TABLE items (id int PRIMARY KEY, a int[], b text[])")
    recorder = Recorder()
    hub.subscribe(recorder, "items")
    hub.start(each_dsn, [watch("items", extra=["a", "b"])], delivery=delivery)
    db("INSERT INTO items VALUES (1, ARRAY[1, NULL], ARRAY['x', NULL, 'NULL'])")
    db("UPDATE items SET a = ARRAY[NULL, 2]")
    db("DELETE FROM items")
    first, second, last = recorder.wait(3)
    assert first.values == {"a": [1, None], "b": ["x", None, "NULL"]}
    assert second.values == last.values == {"a": [None, 2], "b": ["x", None, "NULL"]}
    assert second.old["a"] == [1, None]


def test_one_event_of_many_is_pickled_alone(
    hub: Hub, each_dsn: str, each_db: Database, delivery: Delivery
) -> None:
    """A pickle has one row, whatever came with it, and comes back as the same event."""
    each_db("CREATE TABLE items (id int PRIMARY KEY, raw bytea)")
    recorder = Recorder()
    hub.subscribe(recorder, "items")
    hub.start(each_dsn, [watch("items", "inserted", extra=["raw"])], delivery=delivery)
    each_db("INSERT INTO items SELECT n, '\\x00ff' FROM generate_series(1, 1000) AS n")
    event = recorder.wait(1000)[500]
    kept = pickle.dumps(event)
    found = pickle.loads(kept)
    assert (found, found.uid, found.at, found.position) == (
        event,
        event.uid,
        event.at,
        event.position,
    )
    assert type(found.values["raw"]) is bytes
    assert len(kept) < 3000


def _some(row: dict[str, Any], names: list[str]) -> dict[str, Any]:
    return {name: row[name] for name in names}


def test_only_types_without_input_have_no_sample(values: Values) -> None:
    """A type that a new PostgreSQL brings needs a sample here; these cannot be written at all."""
    for name in SAMPLES:
        if not SAMPLES[name] and name in values.samples:
            with pytest.raises(psycopg2.errors.FeatureNotSupported):
                values.reader(f"SELECT 'x'::pg_catalog.{name}")


def test_values_that_python_cannot_hold(
    hub: Hub, each_dsn: str, each_db: Database, delivery: Delivery
) -> None:
    """A date before the year 1, where psycopg2 raises, is its text; infinity is Python's limit."""
    each_db("CREATE TABLE t (id int PRIMARY KEY, d date, ts timestamp)")
    recorder = Recorder()
    hub.start(each_dsn, [watch("t", extra=["d", "ts"])], delivery=delivery)
    hub.subscribe(recorder, "t")
    each_db(
        "INSERT INTO t VALUES (1, '0044-03-15 BC', 'infinity'), (2, '-infinity', '0044-03-15 BC')"
    )
    first, second = recorder.wait(2)
    assert first.values == {"d": "0044-03-15 BC", "ts": datetime.max}
    assert second.values == {"d": date.min, "ts": "0044-03-15 00:00:00 BC"}


def test_infinite_intervals(hub: Hub, each_dsn: str, each_db: Database, delivery: Delivery) -> None:
    """An interval without an end is Python's limit, as a date is, and no interval of length 0."""
    if each_db.connection.info.server_version < 170000:
        pytest.skip("PostgreSQL 17 brought them")
    each_db("CREATE TABLE t (id int PRIMARY KEY, i interval, a interval[])")
    recorder = Recorder()
    hub.start(each_dsn, [watch("t", extra=["i", "a"])], delivery=delivery)
    hub.subscribe(recorder, "t")
    each_db(
        "INSERT INTO t VALUES (1, 'infinity', '{infinity,1 day,NULL}'), (2, '-infinity', '{}'),"
        " (3, NULL, NULL), (4, '-2 days 01:00', '{00:00}')"
    )
    assert [event.values for event in recorder.wait(4)] == [
        {"i": timedelta.max, "a": [timedelta.max, timedelta(days=1), None]},
        {"i": timedelta.min, "a": []},
        {"i": None, "a": None},
        {"i": timedelta(days=-2, hours=1), "a": [timedelta(0)]},
    ]


def test_keys_that_python_cannot_hold(
    hub: Hub, each_dsn: str, each_db: Database, delivery: Delivery
) -> None:
    """Such a key is text too, and finds its record."""
    each_db("CREATE TABLE t (day date PRIMARY KEY, n int)")
    recorder = Recorder()
    hub.start(each_dsn, [watch("t")], delivery=delivery)
    hub.subscribe(recorder, "t")
    each_db("INSERT INTO t VALUES ('0044-03-15 BC', 7)")
    each_db("UPDATE t SET day = '2024-01-01'")
    inserted, updated = recorder.wait(2)
    assert inserted.id == updated.old["day"] == "0044-03-15 BC"
    each_db("UPDATE t SET day = '0044-03-15 BC'")
    assert each_db("SELECT day::text FROM t WHERE day = %s", [inserted.id]) == [(inserted.id,)]


def test_json_null_and_sql_null(
    hub: Hub, each_dsn: str, each_db: Database, delivery: Delivery
) -> None:
    """Both are None, as in a query; that one became the other is told by ``changed``."""
    each_db("CREATE TABLE t (id int PRIMARY KEY, j json, b jsonb)")
    each_db("INSERT INTO t VALUES (1, 'null', 'null')")
    recorder = Recorder()
    hub.start(each_dsn, [watch("t", "updated", extra=["j", "b"])], delivery=delivery)
    hub.subscribe(recorder, "t")
    each_db("UPDATE t SET b = NULL")
    [event] = recorder.wait(1)
    assert event.values == event.old == {"j": None, "b": None}
    assert event.changed == {"b"}


# --- any value ------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=300)
NUMBERS = st.decimals(allow_infinity=True, allow_nan=False) | st.just(Decimal("NaN"))
OBJECTS = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)


class Echo:
    """One Hub that runs for all examples, and a table whose events come back."""

    def __init__(self, dsn: str, delivery: Delivery) -> None:
        self.reader, self.writer = Database(dsn), Database(dsn)
        self.reader(
            "CREATE TABLE echo (id serial PRIMARY KEY, t text, j json, b jsonb, n numeric,"
            " y bytea, f float8, ts text[], ns numeric[], ys bytea[], js jsonb[])"
        )
        self.writer(UNUSUAL_SESSION)
        self.hub = Hub().start(dsn, [watch("echo", extra=list(self.columns))], delivery=delivery)
        self.stream = self.hub.stream("echo")

    columns = ("t", "j", "b", "n", "y", "f", "ts", "ns", "ys", "js")

    def check(self, **given: Any) -> None:
        """Write a row, change it and delete it, and compare each event with a query."""
        names = sql.SQL(", ").join(map(sql.Identifier, given))
        marks = sql.SQL(", ").join([sql.SQL("%s::{}").format(sql.SQL(_KINDS[n])) for n in given])
        self.writer(
            sql.SQL("INSERT INTO public.echo ({}) VALUES ({})").format(names, marks),
            list(given.values()),
        )
        [stored] = self.reader(
            sql.SQL("SELECT {} FROM echo").format(
                sql.SQL(", ").join(map(sql.Identifier, self.columns))
            )
        )
        row = dict(zip(self.columns, stored, strict=True))
        nothing = dict.fromkeys(self.columns)
        self.writer(
            sql.SQL("UPDATE public.echo SET ({}) = ROW ({})").format(
                names, sql.SQL(", ").join([sql.NULL] * len(given))
            )
        )
        self.writer(
            sql.SQL("UPDATE public.echo SET ({}) = ROW ({})").format(names, marks),
            list(given.values()),
        )
        self.writer("DELETE FROM public.echo")
        expected = [
            ("inserted", row, {}),
            ("updated", nothing, row),
            ("updated", row, nothing),
            ("deleted", row, {}),
        ]
        for op, new, old in expected:
            event = self.stream.get(DEADLINE)
            assert event is not None
            assert (event.op, event.truncated) == (op, False)
            same(event.values, new)
            same(event.old, old)

    def close(self) -> None:
        """Stop the Hub and the sessions."""
        self.hub.stop()
        self.reader.connection.close()
        self.writer.connection.close()


_KINDS = {
    "t": "text",
    "j": "json",
    "b": "jsonb",
    "n": "numeric",
    "y": "bytea",
    "f": "float8",
    "ts": "text[]",
    "ns": "numeric[]",
    "ys": "bytea[]",
    "js": "jsonb[]",
}


@pytest.fixture(scope="module", params=get_args(Delivery))
def echo(each_server: Server, request: pytest.FixtureRequest) -> Iterator[Echo]:
    """One table and one Hub for all examples, on each tested version, in each delivery."""
    made = Echo(each_server.create_database(), request.param)
    yield made
    made.close()


examples = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@examples
@given(text=TEXTS, texts=st.lists(TEXTS | st.none(), max_size=4))
def test_any_text(echo: Echo, text: str, texts: list[str | None]) -> None:
    """Text of any characters, alone and in arrays."""
    echo.check(t=text, ts=texts)


@examples
@given(value=OBJECTS, elements=st.lists(OBJECTS, max_size=3))
def test_any_json(echo: Echo, value: Any, elements: list[Any]) -> None:
    """JSON of any shape; PostgreSQL's jsonb knows no NUL character, and neither does text."""
    echo.check(j=json.dumps(value), b=json.dumps(value), js=list(map(json.dumps, elements)))


@examples
@given(number=NUMBERS, numbers=st.lists(NUMBERS, max_size=4), double=st.floats())
def test_any_number(echo: Echo, number: Decimal, numbers: list[Decimal], double: float) -> None:
    """Numbers of any size and scale, NaN and the infinities."""
    echo.check(n=str(number), ns=list(map(str, numbers)), f=double)


@examples
@given(data=st.binary(max_size=300), pieces=st.lists(st.binary(max_size=50), max_size=4))
def test_any_bytes(echo: Echo, data: bytes, pieces: list[bytes]) -> None:
    """Bytes of any value."""
    echo.check(y=data, ys=pieces)
