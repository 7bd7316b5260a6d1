"""What ``columns`` and ``when`` let through, on the oldest and the newest PostgreSQL.

In each delivery: what differs there is asserted as such.
"""

from __future__ import annotations

import psycopg2
import psycopg2.extras
import pytest

from pgsignals import watch
from pgsignals.errors import WatcherError
from tests.scene import Scene
from tests.scene import items as items
from tests.scene import orders as orders
from tests.scene import scene as scene
from tests.scene import writer as writer


def test_columns_must_really_differ(items: Scene) -> None:
    """SET to the same value is silent, NULL counts as a value, and other columns do not matter."""
    items.db("INSERT INTO items VALUES (1, 'a', 7, 1.0), (2, NULL, 7, 1.0)")
    items.watch(watch("items", "updated", columns=["name", "price"]))
    items.db("UPDATE items SET name = name")
    items.db("UPDATE items SET owner_id = 8, price = 1.00")
    assert items.brief() == []
    items.db("UPDATE items SET name = 'a'")
    items.db("UPDATE items SET name = NULL WHERE id = 1")
    items.db("UPDATE items SET price = 2 WHERE id = 2")
    first, second, third = items.events()
    assert (first.id, first.changed, first.old["name"]) == (2, {"name"}, None)
    assert (second.id, second.changed, second.values["name"]) == (1, {"name"}, None)
    assert (third.id, third.changed) == (2, {"price"})


def test_columns_that_a_before_trigger_changes(items: Scene) -> None:
    """What counts is the row as it was stored, not what the statement named."""
    items.db("INSERT INTO items VALUES (1, 'a')")
    items.db(
        "CREATE FUNCTION fill() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN NEW.name := 'by trigger'; RETURN NEW; END $$;"
        "CREATE TRIGGER fill BEFORE UPDATE ON items FOR EACH ROW EXECUTE FUNCTION fill()"
    )
    items.watch(watch("items", "updated", columns=["name"]))
    items.db("UPDATE items SET owner_id = 1")
    items.db("UPDATE items SET name = 'ignored'")
    assert items.values() == [("updated", "by trigger")]


@pytest.mark.parametrize(
    ("type_name", "before", "equal", "different"),
    [
        ("json", '{"a":1}', '{"a":1}', '{"a":2}'),
        ("jsonb", '{"a":1,"b":2}', '{"b":2, "a":1}', '{"a":2}'),
        ("xml", "<a/>", "<a/>", "<b/>"),
        ("point", "(1,2)", "(1,2)", "(1,3)"),
        ("float8", "NaN", "NaN", "1"),
        ("text[]", "{a,NULL}", "{a,NULL}", "{a,b}"),
        ("int4range", "[1,3]", "[1,4)", "[1,5)"),
    ],
)
def test_columns_of_any_type_are_compared(
    scene: Scene, type_name: str, before: str, equal: str, different: str
) -> None:
    """Types without an equality of their own are compared by their text."""
    scene.db(f"CREATE TABLE t (id int PRIMARY KEY, v {type_name})")
    try:
        scene.db("INSERT INTO t VALUES (1, %s)", [before])
    except psycopg2.errors.FeatureNotSupported:
        pytest.skip(f"a server without {type_name}")
    scene.watch(watch("t", "updated", columns=["v"]))
    scene.db("UPDATE t SET v = %s", [equal])
    assert scene.brief() == []
    scene.db("UPDATE t SET v = %s", [different])
    assert scene.brief() == [("updated", 1)]


def test_when_for_each_operation(items: Scene) -> None:
    """A condition sees OLD and NEW where the operation has them."""
    items.watch(
        watch("items", "inserted", when="NEW.price > 10"),
        watch("items", "updated", when="NEW.price > OLD.price"),
        watch("items", "deleted", when="OLD.name IS NULL"),
    )
    items.db(
        "INSERT INTO items (id, name, price) VALUES (1, 'a', 5), (2, NULL, 11), (3, 'c', NULL)"
    )
    items.db("UPDATE items SET price = CASE id WHEN 1 THEN 6 ELSE 1 END")
    items.db("DELETE FROM items")
    assert items.brief() == [("inserted", 2), ("updated", 1), ("deleted", 2)]


@pytest.mark.parametrize(
    "when",
    [
        "NEW.name = 'it''s 100%' -- a comment",
        "NEW.name LIKE 'it''s%%' /* another ) */",
        "NEW.name = $pgsignals$it's 100%$pgsignals$",
        "NEW.name ~ '^it.s \\d+%$' AND NOT '{}' = ANY (ARRAY[NEW.name])",
        "new.name = E'it\\'s 100%'\n",
        "EXISTS (SELECT FROM owners o WHERE o.id = NEW.owner_id AND o.name = 'me')",
        "length(NEW.name) = 9 OR NEW.name IS NULL",
    ],
)
def test_when_runs_as_written(items: Scene, when: str) -> None:
    """Quotes, percent signs, braces, comments and subqueries reach PostgreSQL as they are."""
    items.db("CREATE TABLE owners (id int, name text); INSERT INTO owners VALUES (7, 'me')")
    items.watch(watch("items", "inserted", "updated", when=when))
    items.db("INSERT INTO items VALUES (1, 'it''s 100%', 7), (2, 'other', 8)")
    items.db("UPDATE items SET price = 1")
    assert items.brief() == [("inserted", 1), ("updated", 1)]


@pytest.mark.parametrize("level", ["statement", "row"])
def test_settings_by_which_a_writer_reads_sql(items: Scene, level: str) -> None:
    """Triggers and conditions mean the same to a writer whose session reads literals otherwise."""
    items.watch(
        watch(
            "items",
            "inserted",
            "updated",
            extra=["name"],
            when=r"NEW.name ~ '^a\\d\n?$' OR NEW.name = 'a\'",
            replicated=level == "row",
        )
    )
    items.db("SET standard_conforming_strings TO off")
    items.db("SET escape_string_warning TO off; SET transform_null_equals TO on")
    items.db("SET backslash_quote TO on")
    items.db("INSERT INTO items VALUES (1, E'a\\\\d'), (2, 'b'), (3, E'a\\\\')")
    items.db("INSERT INTO items SELECT 4, E'a\\\\' FROM generate_series(1, 1)")
    items.db("UPDATE items SET id = id + 10 WHERE name <> 'b'")
    items.db("RESET ALL")
    assert not items.gaps.items
    assert items.brief() == [
        (op, n + m) for op, m in (("inserted", 0), ("updated", 10)) for n in (1, 3, 4)
    ]


def test_when_resolves_names_where_it_was_installed(items: Scene) -> None:
    """Functions are found in the installer's search_path, whatever the writer's is."""
    items.db(
        "CREATE SCHEMA shop;"
        "CREATE FUNCTION shop.is_big(numeric) RETURNS bool LANGUAGE sql AS 'SELECT $1 > 10';"
        "CREATE SCHEMA other;"
        "CREATE FUNCTION other.is_big(numeric) RETURNS bool LANGUAGE sql AS 'SELECT $1 <= 10'"
    )
    items.watch(
        watch("items", "inserted", when="is_big(NEW.price)"),
        dsn=f"{items.dsn}?options=-csearch_path%3Dshop,public",
    )
    items.db("SET search_path TO other, public")
    items.db("INSERT INTO items (id, price) VALUES (1, 5), (2, 11)")
    items.db("SET search_path TO public")
    assert items.brief() == [("inserted", 2)]


@pytest.mark.parametrize("when", [None, "NEW.name = 'a'"])
@pytest.mark.parametrize("installer", ["public", "evil,public"])
def test_a_hostile_search_path_changes_nothing(
    items: Scene, when: str | None, installer: str
) -> None:
    """Functions, operators and types that shadow PostgreSQL's own are not used by the triggers."""
    items.db(
        "CREATE SCHEMA evil;"
        "CREATE FUNCTION evil.no(text, text) RETURNS bool LANGUAGE sql AS 'SELECT false';"
        "CREATE OPERATOR evil.= (LEFTARG = text, RIGHTARG = text, FUNCTION = evil.no);"
        "CREATE FUNCTION evil.glue(text, text) RETURNS text LANGUAGE sql AS $$SELECT 'evil'$$;"
        "CREATE FUNCTION evil.glue(text, bigint) RETURNS text LANGUAGE sql AS $$SELECT 'evil'$$;"
        "CREATE OPERATOR evil.|| (LEFTARG = text, RIGHTARG = text, FUNCTION = evil.glue);"
        "CREATE OPERATOR evil.|| (LEFTARG = text, RIGHTARG = bigint, FUNCTION = evil.glue);"
        "CREATE FUNCTION evil.pg_notify(text, text) RETURNS void LANGUAGE sql AS '';"
        "CREATE FUNCTION evil.to_json(text) RETURNS text LANGUAGE sql AS $$SELECT 'evil'$$;"
        "CREATE DOMAIN evil.text AS varchar(1);"
        "CREATE FUNCTION evil.times(float8, int) RETURNS float8 LANGUAGE sql AS 'SELECT -1e0';"
        "CREATE OPERATOR evil.* (LEFTARG = float8, RIGHTARG = int, FUNCTION = evil.times);"
        "CREATE TABLE evil.pgs_new (id int)"
    )
    items.watch(
        watch("items", "inserted", "updated", when=when, extra=["name"]),
        dsn=f"{items.dsn}?options=-csearch_path%3D{installer}",
    )
    items.db("SET search_path TO evil, pg_catalog, public")
    items.db("INSERT INTO items VALUES (1, 'a'); UPDATE items SET owner_id = 1")
    items.db("SET search_path TO public")
    assert items.values() == [("inserted", "a"), ("updated", "a")]
    assert not items.gaps.items


# Shadows, in a schema that the writer puts first, of each function and operator that the triggers
# could look up: of the same arguments, and raising.
_SHADOWS = """
DO $do$
DECLARE
  f record;
BEGIN
  CREATE SCHEMA evil;
  FOR f IN
    SELECT DISTINCT p.proname, pg_get_function_identity_arguments(p.oid) AS arguments,
           pg_get_function_result(p.oid) AS result
    FROM pg_proc p JOIN pg_trigger t ON t.tgrelid = ANY (ARRAY['items'::regclass, 'slots'])
    JOIN pg_proc ours ON ours.oid = t.tgfoid AND NOT t.tgisinternal
    CROSS JOIN regexp_matches(ours.prosrc, '([a-z_0-9]+)\\(', 'g') AS called
    WHERE p.pronamespace = 'pg_catalog'::regnamespace AND p.prokind = 'f'
      AND p.proname = called[1] AND NOT p.proargtypes::oid[] && ARRAY[
        '"any"'::regtype::oid, 'cstring'::regtype::oid, 'internal'::regtype::oid]
  LOOP
    EXECUTE format(
      'CREATE FUNCTION evil.%I(%s) RETURNS %s LANGUAGE plpgsql AS $$BEGIN RAISE ''shadow''; END$$',
      f.proname, f.arguments, f.result);
  END LOOP;
  FOR f IN
    SELECT o.oid, o.oprname, o.oprleft::regtype AS l, o.oprright::regtype AS r,
           o.oprresult::regtype AS result
    FROM pg_operator o
    WHERE o.oprnamespace = 'pg_catalog'::regnamespace AND o.oprleft <> 0 AND o.oprname = ANY (
      ARRAY['||', '=', '<>', '<', '<=', '>', '>=', '+', '-', '*', '/', '~'])
      AND o.oprleft::regtype::text ~ '^(any|text|integer|bigint|numeric|double|bool|name|bytea)'
  LOOP
    EXECUTE format(
      'CREATE FUNCTION evil.op_%s(%s, %s) RETURNS %s LANGUAGE plpgsql'
      ' AS $$BEGIN RAISE ''shadow''; END$$', f.oid, f.l, f.r, f.result);
    EXECUTE format('CREATE OPERATOR evil.%s (LEFTARG = %s, RIGHTARG = %s, FUNCTION = evil.op_%s)',
      f.oprname, f.l, f.r, f.oid);
  END LOOP;
  CREATE FUNCTION evil.concat(VARIADIC text[]) RETURNS text LANGUAGE plpgsql
    AS $$BEGIN RAISE 'shadow'; END$$;
  CREATE DOMAIN evil.text AS varchar(1);
  CREATE DOMAIN evil.int8 AS bool;
  CREATE DOMAIN evil.int4 AS bool;
  CREATE DOMAIN evil.float8 AS bool;
  CREATE DOMAIN evil.bytea AS bool;
  CREATE DOMAIN evil.name AS bool;
END
$do$
"""


@pytest.mark.parametrize("level", ["statement", "row"])
def test_no_name_is_looked_up_in_the_writers_search_path(items: Scene, level: str) -> None:
    """The triggers do not use a single function, operator or type of a schema put first."""
    items.db("CREATE TABLE slots (id int PRIMARY KEY)")
    items.watch(
        watch("items", extra=["name", "owner_id", "price"], replicated=level == "row"),
        watch("slots", "updated", "truncated"),
    )
    items.db(_SHADOWS)
    items.db("INSERT INTO slots SELECT n FROM generate_series(1, 3000) n")
    items.db("SET search_path TO evil, pg_catalog, public")
    with pytest.raises(psycopg2.errors.RaiseException, match="shadow"):
        items.db("SELECT 1 + 1")
    items.db("INSERT INTO items VALUES (1, 'a', 7, 1.5), (2, NULL, NULL, NULL)")
    items.db("UPDATE items SET name = 'b'")
    items.db("UPDATE items SET id = 3, name = NULL WHERE price IS NULL")
    items.db("INSERT INTO items SELECT 9, pg_catalog.repeat('long', 5000)")
    items.db("BEGIN")
    items.db("SELECT pg_catalog.set_config('pgsignals.context', '{\"by\":\"me\"}', true)")
    items.db("UPDATE items SET owner_id = NULL WHERE price IS NOT NULL")
    items.db("DELETE FROM items WHERE price IS NOT NULL")
    items.db("COMMIT")
    items.db("UPDATE slots SET id = id OPERATOR(pg_catalog.+) 10000")
    items.db("TRUNCATE slots")
    items.db("SET search_path TO public")
    events = items.events()
    assert not items.gaps.items
    brief = [(e.op, e.id) for e in events if e.table == "items"]
    assert sorted(brief[:4]) == [("inserted", 1), ("inserted", 2), ("updated", 1), ("updated", 2)]
    assert brief[4:] == [("updated", 3), ("inserted", 9), ("updated", 1), ("deleted", 1)]
    assert [e.context for e in events if e.op == "deleted"] == [{"by": "me"}]
    moved = [e for e in events if e.table == "slots"]
    assert [(e.old["id"], e.id) for e in moved[:-1]] == [(n, n + 10000) for n in range(1, 3001)]
    assert moved[-1].op == "truncated"


@pytest.mark.parametrize("table", ["items", "orders"])
def test_when_over_whole_rows(orders: Scene, table: str) -> None:
    """OLD.* and NEW.* are compared as rows, in statement triggers and in row triggers."""
    orders.db("CREATE TABLE items (id int, region text, note text)")
    orders.db(f"INSERT INTO {table} VALUES (1, 'eu', 'a'), (2, 'us', NULL)")
    orders.watch(watch(table, "updated", when="OLD.* IS DISTINCT FROM NEW.*", extra=["note"]))
    orders.db(f"UPDATE {table} SET note = 'a'")
    assert orders.values() == [("updated", "a")]


@pytest.mark.parametrize("when", ["is_ok(NEW)", "NEW.ctid IS NOT NULL", "NEW.tableoid > 0"])
def test_when_that_no_trigger_could_run(items: Scene, when: str) -> None:
    """What a query over the table may use and a trigger's rows do not have is refused at start."""
    items.db("CREATE FUNCTION is_ok(items) RETURNS bool LANGUAGE sql AS 'SELECT true'")
    with pytest.raises(WatcherError, match=r"does not exist|cannot cast"):
        items.start(watch("items", "updated", when=when))
