"""The declaration: everything that can be wrong with a watcher is said before anything is done."""

from __future__ import annotations

import re
from typing import Any

import psycopg2
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pgsignals
from pgsignals import Hub, ReceiverError, TableError, WatcherError, watch
from pgsignals.core.watchers import OPERATIONS, Watcher, normalize
from pgsignals.resolvers import BUILTIN
from pgsignals.triggers.definitions import define
from tests.conftest import Database, Recorder


@pytest.fixture
def orders(db: Database) -> str:
    """A table with a status and a total."""
    db("CREATE TABLE orders (id serial PRIMARY KEY, status text, total numeric, user_id int)")
    return "orders"


def objects(db: Database) -> list[str]:
    """All functions and triggers in the database that are not PostgreSQL's own."""
    return [
        name
        for (name,) in db(
            "SELECT tgname::text FROM pg_trigger WHERE NOT tgisinternal UNION ALL"
            " SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace"
        )
    ]


@pytest.mark.parametrize(
    ("ops", "options", "message"),
    [
        (["insert"], {}, r"unknown operation 'insert' \(did you mean 'inserted'\?\)"),
        (["frobbed"], {}, r"'frobbed'\. Operations are 'inserted', 'updated', 'deleted', 'trunc"),
        ([1], {}, r"unknown operation 1\. Operations are 'inserted'"),
        (["inserted", "inserted"], {}, r"an operation twice: 'inserted', 'inserted'"),
        ([], {"columns": ["status"]}, r"columns=\['status'\] with 'inserted', 'upd.*'updated' al"),
        (["inserted"], {"columns": ["status"]}, r"columns=\['status'\] with 'inserted'"),
        (["deleted"], {"columns": ["status"]}, r"columns=\['status'\] with 'deleted'"),
        (["updated"], {"columns": "status"}, r"columns='status'.*columns=\['status'\]"),
        (["updated"], {"columns": 1}, r"columns=1: give a list of column names"),
        (["updated"], {"columns": [1]}, r"columns=\[1\]: give a list of column names"),
        (["updated"], {"columns": ["a", "a"]}, r"a column twice in columns=\['a', 'a'\]"),
        ([], {"extra": "status"}, r"extra='status'.*extra=\['status'\]"),
        ([], {"extra": 1}, r"extra=1: give a list of column names"),
        ([], {"extra": [None]}, r"extra=\[None\]: give a list of column names"),
        ([], {"extra": ["a", "a"]}, r"a column twice in extra=\['a', 'a'\]"),
        ([], {"when": ""}, r"when='': give an SQL condition over NEW and OLD"),
        ([], {"when": 7}, r"when=7: give an SQL condition over NEW and OLD"),
        (["truncated"], {"when": "true"}, r"'truncated', which has no row: drop them"),
        (["truncated"], {"extra": ["a"]}, r"'truncated', which has no row: drop them"),
        ([], {"label": ""}, r"label='': a label is a text that is not empty"),
        ([], {"label": 7}, r"label=7: a label is a text"),
        ([], {"replicated": 1}, r"replicated=1: give True or False"),
    ],
)
def test_a_wrong_declaration_is_refused_where_it_stands(
    ops: list[Any], options: dict[str, Any], message: str
) -> None:
    """``watch`` names the model, the value that is wrong, what is allowed and the fix."""
    with pytest.raises(WatcherError, match=message) as caught:
        watch("orders", *ops, **options)
    assert str(caught.value).startswith("The watcher of orders ")
    assert isinstance(caught.value, ValueError)


@given(st.text())
def test_any_text_but_an_operation_is_refused(op: str) -> None:
    """No text passes for an operation that is none."""
    if op in OPERATIONS:
        assert watch("orders", op).ops == (op,)
    else:
        with pytest.raises(WatcherError, match="unknown operation"):
            watch("orders", op)


def test_the_three_ways_to_write_a_watcher() -> None:
    """A bare model is its three operations; a tuple chooses; ``watch`` does all the rest."""
    bare, pair, more, full = normalize(
        ["a", ("b", "inserted"), ("c", "inserted", "truncated"), watch("d", label="x")]
    )
    assert bare == Watcher("a", ("inserted", "updated", "deleted"))
    assert pair == Watcher("b", ("inserted",))
    assert more == Watcher("c", ("inserted", "truncated"))
    assert full.label == "x"


@pytest.mark.parametrize(
    ("watchers", "message"),
    [
        ("orders", r"watchers='orders': give a list of models"),
        (watch("orders"), r"a list of models, \(model, operation\) tuples or pgsignals\.watch"),
        (None, r"watchers=None: give a list"),
        (7, r"watchers=7: give a list"),
        ([()], r"\(\) is not a watcher: write \(model, 'inserted', …\)"),
        ([("orders", {"extra": []})], r"is not a watcher.*pgsignals\.watch\(model, …\) for more"),
        ([("orders", "insert")], r"unknown operation 'insert' \(did you mean 'inserted'"),
        (
            [watch("a", label="x"), watch("b", label="x")],
            r"Two watchers have the label 'x': labels are unique; rename one",
        ),
        (
            ["orders", ("orders", "deleted")],
            r"Two watchers without a label deliver \(orders, 'deleted'\): give one of them a label",
        ),
        (
            [("orders", "inserted"), watch("orders", "inserted", extra=["status"])],
            r"without a label deliver \(orders, 'inserted'\)",
        ),
    ],
)
def test_a_wrong_list_of_watchers_is_refused(watchers: Any, message: str) -> None:
    """What is no list, no watcher, or delivers the same twice is refused without a database."""
    with pytest.raises(WatcherError, match=message):
        Hub().start("host=nowhere.invalid", watchers)


def test_labels_let_one_table_be_watched_twice() -> None:
    """The same model and operation may be watched again under a label."""
    assert len(normalize(["orders", watch("orders", "updated", label="x")])) == 2


def test_nothing_to_watch_is_said() -> None:
    """An empty list is refused, since it would never deliver anything."""
    with pytest.raises(pgsignals.ConfigurationError, match="nothing to watch: give at least one"):
        Hub().start("host=nowhere.invalid", [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"install": "maybe"}, r"install='maybe': it is one of 'auto', 'check', 'off'"),
        ({"workers": 0}, r"workers=0: give a whole number from 1"),
        ({"queue_size": 1.5}, r"queue_size=1\.5: give a whole number from 1"),
        ({"namespace": ""}, r"namespace='': give a text that is not empty"),
        ({"lock_timeout": 0}, r"lock_timeout=0: give seconds, from 0\.001 to 2,000,000"),
        ({"lock_timeout": "1s"}, r"lock_timeout='1s': give seconds"),
        ({"lock_timeout": float("nan")}, r"lock_timeout=nan: give seconds"),
        ({"install_timeout": -1}, r"install_timeout=-1: give seconds, from 0\.001"),
        ({"install_timeout": float("inf")}, r"install_timeout=inf: give seconds"),
    ],
)
def test_a_wrong_option_of_start_is_refused(options: dict[str, Any], message: str) -> None:
    """``start`` names the option, its value and what is allowed, and does not connect."""
    with pytest.raises(pgsignals.ConfigurationError, match=message):
        Hub().start("host=nowhere.invalid", ["orders"], **options)


@pytest.mark.parametrize(
    ("watcher", "message"),
    [
        (
            watch("orders", "updated", columns=["state"]),
            r"public\.orders has no column 'state' \(did you mean 'status'\?\)\. Its columns: id, ",
        ),
        (
            watch("orders", extra=["status", "usr_id"]),
            r"no column 'usr_id' \(did you mean 'user_id'\?\)\. Its columns: id, status, total, u",
        ),
        (watch("orders", extra=["xmin"]), r"no column 'xmin'\. Its columns"),
        (watch("order"), r"There is no table 'order' on the search_path \(did you mean 'orders'"),
        (watch("public.orderz"), r"no table 'public\.orderz' \(did you mean .*'public\.orders'"),
        (watch("nowhere.orders"), r"There is no table 'nowhere\.orders'"),
        (watch("frobs"), r"There is no table 'frobs' on the search_path\. Create it first"),
        (watch("a_view"), r"'a_view' is a view: watch the tables that it reads"),
        (watch("a_matview"), r"'a_matview' is a materialized view: watch the tables that it"),
        (watch("orders_id_seq"), r"'orders_id_seq' is a sequence: watch the table"),
        (watch("orders_pkey"), r"'orders_pkey' is an index: watch its table"),
        (watch("a_type"), r"'a_type' is a composite type: watch a table"),
        (watch("elsewhere"), r"'elsewhere' is a foreign table: run pgsignals on the server that"),
        (watch(7), r"7 is not something that pgsignals can watch.*'public\.orders'"),
        (watch("a.b.c"), r"'a\.b\.c' is not a table's name\. Give 'table' or 'schema\.table'"),
    ],
)
def test_what_the_database_lacks_is_said(
    hub: Hub, dsn: str, db: Database, orders: str, watcher: Watcher, message: str
) -> None:
    """A table or column that is not there, or cannot have triggers, is named with what is near."""
    db("CREATE VIEW a_view AS SELECT * FROM orders")
    db("CREATE MATERIALIZED VIEW a_matview AS SELECT * FROM orders")
    db("CREATE TYPE a_type AS (a int)")
    db("CREATE FOREIGN DATA WRAPPER far; CREATE SERVER away FOREIGN DATA WRAPPER far")
    db("CREATE FOREIGN TABLE elsewhere (a int) SERVER away")
    with pytest.raises(WatcherError, match=message):
        hub.start(dsn, ["orders", watcher] if watcher.model != "orders" else [watcher])
    assert objects(db) == []
    assert not hub.running


def test_a_column_of_the_server_is_not_guessed(hub: Hub, dsn: str, orders: str) -> None:
    """A table error is a watcher error, which is a ValueError."""
    with pytest.raises(TableError):
        hub.start(dsn, [watch(orders, extra=["nope"])])


@pytest.mark.parametrize(
    ("op", "when", "problem", "place"),
    [
        ("updated", "NEW.state = 1", "column new.state does not exist", "NEW.state = 1"),
        ("updated", "NEW.status = 'x' AND", "syntax error at or near", None),
        ("updated", "NEW.status =\n  nope('é')", "function nope(unknown) does not exist", "nope("),
        ("updated", "'é' = NEW.nope", "column new.nope does not exist", "NEW.nope"),
        ("updated", "NEW.total", "argument of WHERE must be type boolean", "NEW.total"),
        ("updated", "status = 'x'", 'column reference "status" is ambiguous', "status = 'x'"),
        ("inserted", "OLD.status = 'x'", 'missing FROM-clause entry for table "old"', "OLD.status"),
        ("deleted", "NEW.status = 'x'", 'missing FROM-clause entry for table "new"', "NEW.status"),
        ("updated", "count(*) > 1", "aggregate functions are not allowed in WHERE", "count(*) > 1"),
        ("updated", "NEW.status = %s", "syntax error at or near", None),
        ("updated", "NEW.ctid = OLD.ctid", "column new.ctid does not exist", "NEW.ctid"),
    ],
)
def test_a_condition_that_postgresql_rejects(
    hub: Hub,
    dsn: str,
    db: Database,
    orders: str,
    op: str,
    when: str,
    problem: str,
    place: str | None,
) -> None:
    """The error has PostgreSQL's message, the position in the user's text, and the text."""
    with pytest.raises(WatcherError) as caught:
        hub.start(dsn, [watch(orders, op, when=when, label="odd")])
    message = str(caught.value)
    assert "'odd' on orders" in message
    assert problem in message
    assert f"when={when!r}" in message
    if place is not None:
        assert f"at character {when.index(place) + 1} (" in message
        assert repr(when[when.index(place) :][:20]) in message
    assert objects(db) == []


@pytest.mark.parametrize(
    "when",
    [
        "NEW.status = 'shipped'",
        "NEW.status = 'shipped' -- for good",
        "NEW.status LIKE 'a%' OR OLD.status IS DISTINCT FROM NEW.status",
        "/* a */ NEW IS DISTINCT FROM OLD",
        "NEW.total > (SELECT avg(total) FROM orders)",
        "NEW.status = $$don't; DROP TABLE orders$$",
    ],
)
def test_a_condition_that_postgresql_takes(hub: Hub, dsn: str, orders: str, when: str) -> None:
    """Comments, percent signs, whole rows, subqueries and quotes of any kind are fine."""
    hub.start(dsn, [watch(orders, "updated", when=when)])
    assert [state.status for state in hub.status().watchers] == ["INSTALLED"]


def test_nothing_is_installed_when_one_of_many_is_wrong(
    hub: Hub, dsn: str, db: Database, orders: str
) -> None:
    """One wrong watcher at the end of the list keeps all the others from being installed."""
    with pytest.raises(WatcherError):
        hub.start(dsn, [orders, watch("orders", "updated", columns=["nope"], label="last")])
    assert objects(db) == []


def test_two_models_of_one_table_are_refused(hub: Hub, dsn: str, db: Database, orders: str) -> None:
    """Two names for one table would have one trigger: the second is refused, not left silent."""
    with pytest.raises(WatcherError, match=r"orders and public\.orders both deliver 'inserted' of"):
        hub.start(dsn, [orders, "public.orders"])
    assert objects(db) == []


def test_a_receiver_of_a_misspelt_table_is_shown_the_nearest_watcher(
    hub: Hub, dsn: str, orders: str
) -> None:
    """All that the nearest watcher delivers is named, not one operation of it."""
    hub.subscribe(print, "oders", "updated")
    with pytest.raises(ReceiverError, match=r"nearest: \('orders', 'inserted', 'updated'\); add"):
        hub.start(dsn, [(orders, "inserted", "updated")])


def test_watchers_in_the_place_of_the_connection_string(hub: Hub) -> None:
    """Watchers given first are told from a connection string."""
    with pytest.raises(pgsignals.ConfigurationError, match=r"start\(watchers=\[…\]\)"):
        hub.start(["orders"])  # type: ignore[arg-type]


def test_a_receiver_of_nothing_is_refused_at_start(
    hub: Hub, dsn: str, db: Database, orders: str
) -> None:
    """``start`` names the receiver, what it listens to, the nearest watcher, and the fix."""

    @hub.on(orders, "deleted")
    def cleaner(event: pgsignals.Event) -> None: ...

    with pytest.raises(ReceiverError, match=r"cleaner listens to \('orders', 'deleted'\).*") as e:
        hub.start(dsn, [(orders, "inserted")])
    assert "The nearest: ('orders', 'inserted'); add 'deleted' to that watcher" in str(e.value)
    assert objects(db) == []
    assert not hub.running
    hub.start(dsn, [orders])


@pytest.mark.parametrize(
    ("target", "ops", "filters", "message"),
    [
        ("orders", ["deleted"], {}, r"\('orders', 'deleted'\), which no watcher delivers"),
        ("orderz", ["inserted"], {}, r"nearest: \('orders', 'inserted'\); add orderz to the wat"),
        ("orders", ["insert"], {}, r"'insert' is not an operation \(did you mean 'inserted'"),
        ("orders", [], {"total": 1}, r"asks for total=.*carry id, status; add extra=\['total'\]"),
    ],
)
def test_a_receiver_of_nothing_is_refused_at_the_decorator(
    hub: Hub, dsn: str, orders: str, target: str, ops: list[str], filters: Any, message: str
) -> None:
    """After start the decorator raises at once, and the receiver is not kept."""
    hub.start(dsn, [watch(orders, "inserted", extra=["status"])])
    with pytest.raises(ReceiverError, match=message):
        hub.on(target, *ops, **filters)(Recorder())
    hub.stop()
    hub.start(dsn, [watch(orders, "inserted", extra=["status"])])


def test_a_condition_needs_no_right_to_read_the_table(dsn: str, db: Database, orders: str) -> None:
    """Checking a condition reads nothing, so that a role which may not SELECT can install it."""
    db("CREATE ROLE reads_nothing")
    watcher = watch(orders, "updated", when="NEW.status = 'x'")
    with psycopg2.connect(dsn) as connection, connection.cursor() as cursor:
        cursor.execute("SET ROLE reads_nothing")
        [definition] = define(cursor, [watcher], BUILTIN, "default")
    connection.close()
    db("DROP ROLE reads_nothing")
    assert re.fullmatch("pgsignals_[0-9a-f]{16}", definition.channel)
