"""``pgsignals install``, ``uninstall``, ``sql`` and ``status``: what a deployment runs."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from psycopg2.sql import SQL, Identifier

from pgsignals import Hub
from pgsignals.testing import Server, find_installations
from tests.commands import Result
from tests.conftest import Database, Recorder
from tests.forked import run

SCHEMA = '''
CREATE TABLE orders (id serial PRIMARY KEY, status text, total numeric, at timestamptz);
CREATE SCHEMA "Größe ""x""";
CREATE TABLE "Größe ""x"""."a:b '%s' \\ $pgsignals$" ("Käy" text PRIMARY KEY, n money);
CREATE TABLE parts (id int, day date) PARTITION BY RANGE (day);
'''

APP = r'''
import pgsignals

ODD = '"Größe ""x"""."a:b \'%s\' \\ $pgsignals$"'
WATCHERS = [
    "orders",
    pgsignals.watch("orders", "updated", columns=["status"], extra=["total", "at"],
                    when="NEW.status = 'it''s :paid' -- really", label="it's \\ \"paid\""),
    pgsignals.watch("orders", "truncated", label="emptied"),
    pgsignals.watch(ODD, "inserted", "updated", "deleted", extra=["n"]),
    pgsignals.watch("parts", "inserted", "updated"),
    pgsignals.watch("orders", "inserted", replicated=True, label="replicated"),
]
'''

INSTALLED = """
SELECT 'function', regexp_replace(pg_get_functiondef(p.oid), '{[0-9,]+}', '{oids}', 'g'),
       obj_description(p.oid, 'pg_proc'), p.proacl::text
FROM pg_proc p WHERE p.proname LIKE 'pgsignals%'
UNION ALL
SELECT 'trigger', pg_get_triggerdef(t.oid), obj_description(t.oid, 'pg_trigger'),
       t.tgenabled::text
FROM pg_trigger t WHERE t.tgname LIKE 'pgsignals%'
ORDER BY 1, 2
"""


@pytest.fixture(autouse=True)
def orders(db: Database) -> None:
    """A table of orders and one of users."""
    db("CREATE TABLE orders (id serial PRIMARY KEY, status text)")
    db("CREATE TABLE users (id serial PRIMARY KEY)")


def psql(dsn: str, script: str) -> None:
    """Have psql run a script as a file, from a terminal that has another encoding.

    It is one that came with a server, since PATH may have none.
    """
    beside = (found.bindir / "psql" for found in find_installations())
    program = next(path for path in beside if path.exists())
    subprocess.run(
        [program, "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", dsn, "-f", "-"],
        input=script.encode(),
        check=True,
        env={"PATH": "/usr/bin:/bin", "PGCLIENTENCODING": "LATIN1"},
    )


def test_sql_gives_exactly_what_install_gives(
    each_server: Server, connect: Callable[[str], Database], tmp_path: Path
) -> None:
    """The printed SQL, run by psql, makes the same functions, triggers, comments and rights."""
    (tmp_path / "shop.py").write_text(APP, encoding="utf-8")
    found = []
    for how in ("install", "sql"):
        dsn = each_server.create_database()
        database = connect(dsn)
        database(SCHEMA)
        result = run(how, "--app=shop", dsn=dsn, cwd=tmp_path)
        assert result.code == 0, result.err
        if how == "sql":
            assert database(INSTALLED) == []
            psql(dsn, "\n".join(result.out))
            assert run("status", "--app=shop", dsn=dsn, cwd=tmp_path).code == 0
        found.append(database(INSTALLED))
    assert len(found[0]) == 2 * 11
    assert found[0] == found[1]


def test_sql_uninstall_leaves_nothing(dsn: str, db: Database) -> None:
    """The printed SQL removes what is installed, of all or of some watchers."""
    assert run("install", "orders", "users", dsn=dsn).code == 0
    psql(dsn, "\n".join(run("sql", "--uninstall", "users", dsn=dsn).out))
    assert run("status", "orders", dsn=dsn).code == 0
    assert run("status", "users", dsn=dsn).code == 1
    psql(dsn, "\n".join(run("sql", "--uninstall", dsn=dsn).out))
    assert db(INSTALLED) == []


def test_sql_prints_only_what_is_lacking(dsn: str, db: Database) -> None:
    """A trigger that is as it should be is left out, a disabled one is replaced."""
    assert run("install", "orders", dsn=dsn).code == 0
    assert run("sql", "orders", dsn=dsn).out == [
        "-- Nothing to do: the database is as it should be."
    ]
    [(name,)] = db("SELECT tgname FROM pg_trigger WHERE tgname LIKE 'pgsignals%' LIMIT 1")
    db(SQL("ALTER TABLE orders DISABLE TRIGGER {}").format(Identifier(name)))
    script = "\n".join(run("sql", "orders", dsn=dsn).out)
    assert script.count("CREATE TRIGGER") == 1
    psql(dsn, script)
    assert run("status", "orders", dsn=dsn).code == 0
    assert "\n".join(run("sql", "--all", "orders", dsn=dsn).out).count("CREATE TRIGGER") == 3


def test_sql_changes_nothing(dsn: str, db: Database) -> None:
    """Printing is all that sql does."""
    assert "CREATE TRIGGER" in "\n".join(run("sql", "orders", dsn=dsn).out)
    assert db(INSTALLED) == []


def test_install_twice_installs_once(dsn: str) -> None:
    """The second install finds everything there."""
    first = run("install", "orders", "users:updated", dsn=dsn)
    assert (first.code, first.out[-1]) == (0, "4 triggers installed, 0 already there.")
    assert first.out[0] == "installed inserted on public.orders"
    assert run("install", "orders", "users:updated", dsn=dsn).out == [
        "0 triggers installed, 4 already there."
    ]


def test_install_then_check_needs_no_rights(
    dsn: str, db: Database, server: Server, hub: Hub, recorder: Recorder
) -> None:
    """After an owner's install, a role with DML rights alone starts with install='check'."""
    role = "dml_" + dsn.rpartition("/")[2]
    db(SQL("CREATE ROLE {} LOGIN").format(Identifier(role)))
    db(SQL("GRANT ALL ON orders, orders_id_seq TO {}").format(Identifier(role)))
    as_role = server.dsn(dsn.rpartition("/")[2], role)
    refused = run("install", "orders", dsn=as_role)
    assert (refused.code, refused.err[0][:6]) == (1, "Error:")
    assert run("install", "orders", dsn=dsn).code == 0
    hub.on("orders")(recorder)
    hub.start(as_role, ["orders"], install="check")
    db("INSERT INTO orders DEFAULT VALUES")
    assert recorder.wait(1)[0].id == 1


def test_uninstall_respects_listeners(dsn: str, db: Database, hub: Hub, recorder: Recorder) -> None:
    """While somebody listens uninstall refuses, unless it is forced."""
    hub.start(dsn, ["orders"])
    refused = run("uninstall", dsn=dsn)
    assert refused.code == 1
    assert "listener" in refused.err[0]
    assert len(db(INSTALLED)) == 6
    forced = run("uninstall", "--force", dsn=dsn)
    assert (forced.code, forced.out[-1]) == (0, "3 triggers removed from namespace 'default'.")
    assert db(INSTALLED) == []


def test_namespaces_do_not_touch_each_other(dsn: str, db: Database) -> None:
    """Uninstalling one namespace leaves another, and a foreign trigger that is named like ours."""
    assert run("install", "orders", "--namespace=a", dsn=dsn).code == 0
    assert run("install", "orders", "--namespace=b", dsn=dsn).code == 0
    db(
        "CREATE FUNCTION pgsignals_0123456789abcdef() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN RETURN NULL; END';"
        "CREATE TRIGGER pgsignals_0123456789abcdef AFTER INSERT ON orders"
        " EXECUTE FUNCTION pgsignals_0123456789abcdef()"
    )
    assert run("uninstall", "--namespace=a", "--force", dsn=dsn).code == 0
    assert run("status", "orders", "--namespace=a", dsn=dsn).code == 1
    assert run("status", "orders", "--namespace=b", dsn=dsn).code == 0
    assert len(db(INSTALLED)) == 8


def statuses(result: Result) -> dict[str, str]:
    """Status by operation, from --json."""
    return {each["op"]: each["status"] for each in json.loads(result.out[0])["watchers"]}


def test_status_tells_what_a_deployment_lacks(dsn: str, db: Database) -> None:
    """INSTALLED lets a deployment go on; MISSING and OUTDATED stop it, STALE does not."""
    assert run("install", "orders:inserted,updated", "users:deleted", dsn=dsn).code == 0
    [(name,)] = db(
        "SELECT tgname FROM pg_trigger WHERE tgname LIKE 'pgsignals%' AND tgtype & 4 > 0"
    )
    good = run("status", "orders:inserted,updated", "--json", dsn=dsn)
    assert good.code == 0
    assert statuses(good) == {"inserted": "INSTALLED", "updated": "INSTALLED", "deleted": "STALE"}
    db(SQL("ALTER TABLE orders DISABLE TRIGGER {}").format(Identifier(name)))
    bad = run("status", "orders", "--json", dsn=dsn)
    assert bad.code == 1
    assert json.loads(bad.out[0])["ok"] is False
    assert statuses(bad) | {"deleted": ""} == {
        "inserted": "OUTDATED",
        "updated": "INSTALLED",
        "deleted": "",
    }


def test_status_is_a_table(dsn: str, hub: Hub) -> None:
    """For people it is a table with the listeners, and the use of the notification queue."""
    hub.start(dsn, [("orders", "inserted")])
    result = run("status", dsn=dsn)
    assert result.code == 0
    assert [line.split() for line in result.out[:2]] == [
        ["STATUS", "TABLE", "OPERATION", "LABEL", "LISTENERS", "DETAIL"],
        ["INSTALLED", "public.orders", "inserted", "1"],
    ]
    assert result.out[-1] == "The notification queue is 0% full."


def test_status_names_a_column_that_has_gone(dsn: str, db: Database, hub: Hub) -> None:
    """A watched column that was renamed makes its trigger OUTDATED, with the column's name."""
    hub.start(dsn, [("orders", "inserted")])
    assert run("status", "orders:inserted", dsn=dsn).code == 0
    db("ALTER TABLE orders RENAME id TO number")
    result = run("status", dsn=dsn)
    assert result.code == 1
    assert "'id'" in result.out[1]


def test_status_of_an_empty_database(dsn: str) -> None:
    """Where nothing is installed it says so, which is no failure."""
    result = run("status", dsn=dsn)
    assert (result.code, result.out[0]) == (0, "Nothing is installed in namespace 'default'.")
