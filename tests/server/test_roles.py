"""What each role may do: owners install, applications only need to write and to listen."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import psycopg2
import pytest

import pgsignals
from pgsignals import Hub, watch
from pgsignals.core.transport import Transport
from pgsignals.core.watchers import normalize
from pgsignals.hub.hub import Delivery
from pgsignals.outbox.schema import install_schema
from pgsignals.resolvers import BUILTIN
from pgsignals.testing import Server
from pgsignals.triggers.definitions import define
from pgsignals.triggers.installer import install, uninstall
from pgsignals.wal.publication import ensure_publications
from tests.conftest import Database, Recorder
from tests.grants import documented_grants

pytestmark = pytest.mark.usefixtures("by_triggers")

WATCHERS = [
    "shop.orders",
    watch(
        "shop.orders",
        "updated",
        columns=["status"],
        when="NEW.status = one_of(NEW.status)",
        extra=["placed", "state"],
        label="changed",
    ),
]


@pytest.fixture
def make_role(
    server: Server, dsn: str, db: Database, request: pytest.FixtureRequest
) -> Iterator[Callable[..., str]]:
    """Makes login roles; each call returns the database's address for a new one."""
    made: list[str] = []
    of_wal = "delivery" in request.fixturenames and request.getfixturevalue("delivery") == "wal"
    replication = "REPLICATION" if of_wal else ""

    def make(*grants: str, name: str = "app") -> str:
        role = f"{name}_{secrets.token_hex(4)}"
        db(f"CREATE ROLE {role} LOGIN {replication}")
        made.append(role)
        for grant in grants:
            db(f"GRANT {grant} TO {role}")
        return server.dsn(db.connection.info.dbname, role)

    yield make
    for role in made:
        db(f"DROP OWNED BY {role} CASCADE; DROP ROLE {role}")


@pytest.fixture
def shop(db: Database) -> str:
    """A schema with a table, a type of its own, and a function that conditions call."""
    db("CREATE SCHEMA shop; CREATE TYPE shop.state AS ENUM ('open', 'closed')")
    db("CREATE FUNCTION shop.one_of(text) RETURNS text LANGUAGE sql AS 'SELECT $1'")
    db(
        "CREATE TABLE shop.orders (id serial PRIMARY KEY, status text,"
        " placed timestamptz DEFAULT now(), state shop.state DEFAULT 'open')"
    )
    return "shop"


@pytest.fixture
def listening(delivery: Delivery, db: Database) -> tuple[str, ...]:
    """What a role needs to receive: nothing, or the outbox, which is made, and a grant on it."""
    if delivery == "notify":
        return ()
    with db.connection.cursor() as cursor:
        install_schema(cursor)
        if delivery == "wal":
            ensure_publications(cursor)
    grants = documented_grants("consumer")
    return (*grants, SECRET) if delivery == "wal" else grants


SECRET = "SELECT ON SEQUENCE pgsignals.wal_secret"
DML = (
    "USAGE ON SCHEMA shop",
    "SELECT, INSERT, UPDATE, DELETE ON shop.orders",
    "USAGE ON SEQUENCE shop.orders_id_seq",
)


def with_path(dsn: str, path: str) -> str:
    """The same address with a search path."""
    return f"{dsn}?options=-csearch_path%3D{path}"


def install_as(dsn: str, delivery: Delivery) -> int:
    """What ``pgsignals install`` does; how many triggers it created."""
    with closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        if delivery != "notify":
            install_schema(cursor)
        definitions = define(cursor, normalize(WATCHERS), BUILTIN, "default", Transport(delivery))
        return len(install(cursor, "default", [each.trigger for each in definitions]))


class Application:
    """A database whose triggers an owner installs, and an application in a role of its own."""

    def __init__(
        self, hub: Hub, dsn: str, delivery: Delivery, make_role: Callable[..., str]
    ) -> None:
        self._hub = hub
        self._dsn = dsn
        self._transport = delivery
        self._make_role = make_role

    def install(self, path: str = "shop") -> None:
        """Install as an owner does."""
        assert install_as(with_path(self._dsn, path), self._transport) == 4

    def start(self, *grants: str, path: str = "shop", **options: Any) -> str:
        """Start the Hub as a new role that has these grants, whose address is returned."""
        app = self._make_role(*grants)
        if path:
            app = with_path(app, path)
        given = {"watchers": WATCHERS, "delivery": self._transport, **options}
        self._hub.start(app, **given)
        return app


@pytest.fixture
def application(
    hub: Hub, dsn: str, shop: str, delivery: Delivery, make_role: Callable[..., str]
) -> Application:
    """An application of the shop."""
    return Application(hub, dsn, delivery, make_role)


@pytest.mark.parametrize("path", ["shop", "shop,public", "public,shop", "pg_catalog,shop"])
def test_an_application_that_may_only_write_starts_after_an_owner_installed(
    hub: Hub,
    application: Application,
    make_role: Callable[..., str],
    connect: Callable[[str], Database],
    recorder: Recorder,
    path: str,
    listening: tuple[str, ...],
) -> None:
    """``install="check"`` passes under any search path, and events arrive, values and all."""
    application.install("shop,public")
    hub.subscribe(recorder, "changed")
    application.start(*DML, *listening, path=path, install="check")
    writer = connect(make_role(*DML, name="writer"))
    writer("SET search_path TO public")
    writer("INSERT INTO shop.orders (status) VALUES ('new')")
    writer("UPDATE shop.orders SET status = 'sent'")
    [event] = recorder.wait(1)
    assert event.old["status"] == "new"
    assert event.values["state"] == "open"
    assert event.values["placed"].tzinfo is not None
    assert [state.status for state in hub.status().watchers] == ["INSTALLED"] * 4


def test_the_automatic_install_finds_nothing_to_do_either(
    hub: Hub, application: Application, listening: tuple[str, ...]
) -> None:
    """The default ``install="auto"`` needs no privilege while nothing differs."""
    application.install()
    application.start(*DML, *listening)
    assert hub.running


def test_check_says_what_to_run_before_an_owner_has_installed(
    application: Application, listening: tuple[str, ...]
) -> None:
    """Without its triggers an application that checks does not start."""
    expected = r"MISSING inserted on shop\.orders(?s:.*)run `pgsignals install`"
    with pytest.raises(pgsignals.DriftError, match=expected):
        application.start(*DML, *listening, install="check")


@pytest.mark.parametrize(
    ("grants", "lacks", "fix"),
    [
        (
            DML,
            "TRIGGER on shop.orders and CREATE on the schema shop",
            'GRANT TRIGGER ON "shop"."orders" TO "{role}"; '
            'GRANT CREATE ON SCHEMA "shop" TO "{role}"',
        ),
        (
            (*DML, "TRIGGER ON shop.orders"),
            "CREATE on the schema shop",
            'GRANT CREATE ON SCHEMA "shop" TO "{role}"',
        ),
        (
            (*DML, "CREATE ON SCHEMA shop"),
            "TRIGGER on shop.orders",
            'GRANT TRIGGER ON "shop"."orders" TO "{role}"',
        ),
    ],
)
def test_a_role_that_may_not_install_is_told_what_it_lacks(
    hub: Hub,
    db: Database,
    shop: str,
    make_role: Callable[..., str],
    grants: tuple[str, ...],
    lacks: str,
    fix: str,
    delivery: Delivery,
    listening: tuple[str, ...],
) -> None:
    """The error names the role, the privileges, both fixes; nothing has been installed."""
    app = make_role(*grants, *listening)
    role = psycopg2.extensions.parse_dsn(app)["user"]
    db("CREATE TABLE public.a (id int PRIMARY KEY)")
    db(f"GRANT TRIGGER ON public.a TO {role}; GRANT CREATE ON SCHEMA public TO {role}")
    with pytest.raises(pgsignals.PrivilegeError) as caught:
        hub.start(with_path(app, "shop"), ["public.a", *WATCHERS], delivery=delivery)
    message = str(caught.value)
    assert f"The role '{role}' lacks {lacks}, which installing takes." in message
    assert "Run `pgsignals install` as the tables' owner" in message
    assert message.endswith(f"have the owner run: {fix.format(role=role)}.")
    assert db("SELECT tgname FROM pg_trigger WHERE NOT tgisinternal") == []


def test_trigger_and_create_are_all_that_installing_takes(
    hub: Hub, application: Application, db: Database, recorder: Recorder, delivery: Delivery
) -> None:
    """A role that owns no table, and may not even read it, installs, repairs, prunes, removes."""
    grants = ["USAGE, CREATE ON SCHEMA shop", "TRIGGER ON shop.orders"]
    if delivery != "notify":
        grants.append(f"CREATE ON DATABASE {db.connection.info.dbname}")
    hub.subscribe(recorder, "changed")
    app = application.start(*grants)
    db("INSERT INTO shop.orders (status) VALUES ('new'); UPDATE shop.orders SET status = 'sent'")
    assert recorder.wait(1)[0].values["status"] == "sent"
    hub.stop()

    db("ALTER TABLE shop.orders DISABLE TRIGGER USER")
    assert install_as(app, delivery) == 4
    with Hub().start(app, [("shop.orders", "deleted")], namespace="other", delivery=delivery):
        pass
    with closing(psycopg2.connect(app)) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        for namespace, count in (("default", 4), ("other", 1)):
            assert len(uninstall(cursor, namespace, force=True)) == count
    assert db("SELECT tgname FROM pg_trigger WHERE NOT tgisinternal") == []


def test_what_another_role_installed_is_not_ours_to_repair(
    application: Application, db: Database, delivery: Delivery, listening: tuple[str, ...]
) -> None:
    """An outdated trigger of another role's gives PrivilegeError that says who must act."""
    application.install()
    db("ALTER TABLE shop.orders DISABLE TRIGGER USER")
    installing = documented_grants("installer") if delivery != "notify" else ()
    grants = ("USAGE, CREATE ON SCHEMA shop", "TRIGGER ON shop.orders", *installing)
    with pytest.raises(pgsignals.PrivilegeError, match=r"must be owner of func.*that owner"):
        application.start(*grants, *listening)


def test_a_replicated_watcher_takes_owning_the_table(
    hub: Hub, shop: str, make_role: Callable[..., str]
) -> None:
    """ENABLE ALWAYS is for owners: the error says so, and nothing is left half installed."""
    app = make_role("USAGE, CREATE ON SCHEMA shop", "TRIGGER ON shop.orders")
    with pytest.raises(pgsignals.PrivilegeError, match=r"owner of table orders.*that owner"):
        hub.start(app, [watch("shop.orders", "inserted", replicated=True)])


def test_a_schema_that_the_role_may_not_use_is_like_a_missing_table(
    hub: Hub, application: Application, listening: tuple[str, ...]
) -> None:
    """A role without USAGE on the schema can still listen, since only writers touch the table."""
    application.install()
    application.start(*listening, path="", watchers=[("shop.orders", "inserted")], install="off")
    assert hub.running
