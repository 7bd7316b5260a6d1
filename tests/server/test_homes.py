"""Models of several databases: each is watched in its own, and nowhere else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import django.conf
import django.db
import pytest
import sqlalchemy as sa
import sqlmodel
from django.db import models
from django.db.migrations.executor import MigrationExecutor
from django.db.migrations.migration import Migration
from django.test.utils import override_settings
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from psycopg2.extensions import parse_dsn
from sqlalchemy import orm

import pgsignals
from pgsignals import ConfigurationError, ConnectError, Hub, ModelError, StateError
from pgsignals.contrib.flask import PgSignals, health, position
from pgsignals.hub.hub import Delivery
from pgsignals.postgres.dsn import display
from pgsignals.testing import Server
from tests.conftest import DEADLINE, Database, Recorder
from tests.connections import django_databases
from tests.proxy import Proxy
from tests.waiting import settle

if not django.conf.settings.configured:
    django.conf.settings.configure()
django.setup()

import pgsignals.contrib.django  # noqa: E402
from pgsignals.contrib.django import InstallWatchers  # noqa: E402

TABLES = "CREATE TABLE orders (id int PRIMARY KEY); CREATE TABLE reports (id int PRIMARY KEY)"


class Modelled(sqlmodel.SQLModel, table=True):
    metadata = sa.MetaData(info={"bind_key": "reports"})
    __tablename__ = "reports"
    id: int = sqlmodel.Field(primary_key=True)


@pytest.fixture
def reports_dsn(each_server: Server) -> str:
    """A second database, on the same server."""
    return each_server.create_database()


@pytest.fixture
def reports_db(reports_dsn: str, connect: Callable[[str], Database]) -> Database:
    """The second database, with tables of the same names as the first one's."""
    database = connect(reports_dsn)
    database(TABLES)
    return database


@pytest.fixture
def main_db(each_db: Database) -> Database:
    """The first database."""
    each_db(TABLES)
    return each_db


def as_url(dsn: str) -> str:
    """A URL of SQLAlchemy's, with a password that the server does not ask for."""
    return dsn.replace("postgresql:", "postgresql+psycopg2:").replace(
        "postgres@", "postgres:geheim@"
    )


@pytest.fixture
def shop(each_dsn: str, reports_dsn: str) -> Iterator[SimpleNamespace]:
    """An application of Flask-SQLAlchemy on both, with a model in each."""
    app = Flask("shop")
    app.config["SQLALCHEMY_DATABASE_URI"] = as_url(each_dsn)
    app.config["SQLALCHEMY_BINDS"] = {"reports": as_url(reports_dsn)}
    db: Any = SQLAlchemy(app)

    class Order(db.Model):  # type: ignore[misc]
        __tablename__ = "orders"
        id = db.Column(db.Integer, primary_key=True)

    class Archived(db.Model):  # type: ignore[misc]
        __abstract__ = True
        __bind_key__ = "reports"

    class Report(Archived):
        __tablename__ = "reports"
        id = db.Column(db.Integer, primary_key=True)

    yield SimpleNamespace(app=app, db=db, Order=Order, Report=Report)
    for process in app.extensions.get("pgsignals.processes", {}).values():
        process.stop(DEADLINE)
    with app.app_context():
        for engine in db.engines.values():
            engine.dispose()


def triggers(db: Database) -> list[str]:
    """The tables of our triggers."""
    return [
        name
        for (name,) in db(
            "SELECT DISTINCT tgrelid::regclass::text FROM pg_trigger"
            " WHERE tgname LIKE 'pgsignals%' ORDER BY 1"
        )
    ]


def of_reports(shop: SimpleNamespace) -> dict[str, Any]:
    """All the ways to say that something is of the bind."""

    class Plain(orm.DeclarativeBase):
        metadata = sa.MetaData(info={"bind_key": "reports"})

    class Mapped(Plain):
        __tablename__ = "reports"
        id: orm.Mapped[int] = orm.mapped_column(primary_key=True)

    table = shop.db.Table(
        "orders", sa.Column("id", sa.Integer, primary_key=True), bind_key="reports"
    )
    return {
        "Report": shop.Report,
        "reflected": shop.Report.__table__,
        "orders": table,
        "Mapped": Mapped,
        "Modelled": Modelled,
    }


def test_a_bind_is_not_watched_in_the_default_database(
    shop: SimpleNamespace,
    each_dsn: str,
    reports_dsn: str,
    main_db: Database,
    reports_db: Database,
    delivery: Delivery,
) -> None:
    """The error names the model, its bind, both databases and the fix; nothing is installed."""
    for given in of_reports(shop).values():
        with shop.app.app_context(), pytest.raises(ModelError) as caught:
            Hub().start(shop.db.engine, [given], delivery=delivery)
        message = str(caught.value)
        assert "is of the bind 'reports' (" in message
        assert "this is another database (" in message
        for dsn in (each_dsn, reports_dsn):
            assert f"dbname={parse_dsn(dsn)['dbname']}" in message
        assert "PgSignals(bind_key='reports', watchers=[" in message
        assert "Hub().start(db.engines['reports'], [" in message
        assert "geheim" not in message
    assert triggers(main_db) == triggers(reports_db) == []


def test_the_default_database_is_not_watched_in_a_bind(
    shop: SimpleNamespace, main_db: Database, reports_db: Database
) -> None:
    """Nor is a model without a bind key where a Hub of the bind would find its name."""
    signals = PgSignals(shop.app, watchers=[shop.Order], bind_key="reports")
    with pytest.raises(ModelError, match=r"Order is of Flask-SQLAlchemy's default database .*"):
        signals.start(shop.app)
    assert triggers(reports_db) == []


def test_an_application_with_both(
    shop: SimpleNamespace, main_db: Database, reports_db: Database, delivery: Delivery
) -> None:
    """Each PgSignals hears of its own database, and records come from there."""
    app, db = shop.app, shop.db
    app.config["PGSIGNALS_DELIVERY"] = delivery
    signals = PgSignals(app, watchers=[shop.Order], hub=Hub())
    by_table = pgsignals.watch(shop.Report.__table__, "inserted", label="rows")
    reports = PgSignals(app, watchers=[shop.Report, by_table], bind_key="reports")
    app.register_blueprint(health)
    app.get("/")(lambda: "well")
    seen, rows = Recorder(), Recorder()

    @signals.on(shop.Order)
    @reports.on(shop.Report)
    def load(event: pgsignals.Event) -> None:
        seen((event.model, event.load(db.session).id))

    @reports.on("rows")
    def load_row(event: pgsignals.Event) -> None:
        rows(event.load(db.session))

    client = app.test_client()
    assert client.get("/").text == "well"
    assert client.get("/health/ready").json["ready"]
    main_db("INSERT INTO orders VALUES (1); INSERT INTO reports VALUES (1)")
    reports_db("INSERT INTO orders VALUES (2); INSERT INTO reports VALUES (3)")
    assert set(seen.wait(2)) == {(shop.Order, 1), (shop.Report, 3)}
    assert rows.wait(1) == [{"id": 3}]
    assert signals.hub is not reports.hub
    for each in (signals.hub, reports.hub):
        settle(each)
    assert len(seen.items) == 2
    with app.test_request_context():
        assert position(shop.Report, bind_key="reports")
        with pytest.raises(StateError, match=r"with bind_key='report': .* one without, 'reports'"):
            position(shop.Report, bind_key="report")
    reports.stop(app)
    assert not client.get("/health/ready").json["ready"]


def test_settings_of_a_bind(shop: SimpleNamespace, reports_dsn: str) -> None:
    """PGSIGNALS_BINDS has what differs; where to connect to is never the first database's."""
    app = shop.app
    app.config |= {
        "PGSIGNALS_DSN": "service=main",
        "PGSIGNALS_LISTEN_DSN": "service=direct",
        "PGSIGNALS_WATCHERS": ["orders"],
        "PGSIGNALS_WORKERS": 3,
        "PGSIGNALS_NAME": "shop",
        "PGSIGNALS_BINDS": {"reports": {"NAME": "reports", "DELIVERY": "outbox"}},
    }
    signals = PgSignals(app, watchers=["reports"], bind_key="reports")
    found = signals._process(app).settings()
    assert parse_dsn(found.dsn)["dbname"] == parse_dsn(reports_dsn)["dbname"]
    assert [watcher.model for watcher in found.watchers] == ["reports"]
    assert (found.workers, found.name, found.delivery) == (3, "reports", "outbox")
    assert found.listen_dsn is None
    app.config["PGSIGNALS_BINDS"] = {"reports": {"NAMES": "reports"}}
    with pytest.raises(ConfigurationError, match=r"NAMES is no setting \(did you mean 'NAME'"):
        signals._process(app).settings()
    with pytest.raises(ConfigurationError, match="PgSignals with bind_key='reports' already"):
        PgSignals(app, bind_key="reports")
    other = PgSignals(app, bind_key="report")
    with pytest.raises(ConfigurationError, match=r"no 'report' \(did you mean 'reports'\?\)"):
        other.start(app)


def test_flask_pgsignals_of_a_bind(
    shop: SimpleNamespace, main_db: Database, reports_db: Database
) -> None:
    """The commands take the database by its key, and refuse what is not of theirs."""
    PgSignals(shop.app, watchers=[shop.Order, shop.Report], hub=Hub())
    PgSignals(shop.app, watchers=[shop.Report], bind_key="reports")
    from pgsignals.cli.flask import group

    runner = shop.app.test_cli_runner()
    assert runner.invoke(group, ["--bind", "reports", "install"]).exit_code == 0
    assert triggers(reports_db) == ["reports"]
    refused = runner.invoke(group, ["install"])
    assert refused.exit_code == 1
    assert "Report is of the bind 'reports'" in refused.output
    assert triggers(main_db) == []
    status = runner.invoke(group, ["status", "--json"])
    details = [each["detail"] for each in json.loads(status.stdout)["watchers"]]
    assert any("Report is of the bind 'reports'" in (detail or "") for detail in details)


def test_one_database_by_different_addresses(
    shop: SimpleNamespace, each_dsn: str, main_db: Database, hub: Hub, recorder: Recorder
) -> None:
    """A bind that leads to the watched database by another way is no other database."""
    given = parse_dsn(each_dsn)
    hub.on(shop.Report)(recorder)
    with Proxy(given["host"], int(given["port"])) as proxy:
        other = each_dsn.replace(f":{given['port']}/", f":{proxy.port}/")
        other = other.replace(given["host"], "127.0.0.1")
        app = Flask("other")
        app.config["SQLALCHEMY_DATABASE_URI"] = as_url(each_dsn)
        app.config["SQLALCHEMY_BINDS"] = {"reports": as_url(other)}
        shop.db.init_app(app)
        with app.app_context():
            hub.start(shop.db.engine, [shop.Order, shop.Report])
    main_db("INSERT INTO reports VALUES (1)")
    assert [event.id for event in recorder.wait(1)] == [1]


def test_a_bind_that_cannot_be_asked(
    shop: SimpleNamespace, each_dsn: str, main_db: Database, hub: Hub
) -> None:
    """Where nobody can tell whether it is the same database, nothing is watched in silence."""
    given = parse_dsn(each_dsn)
    with Proxy(given["host"], int(given["port"])) as proxy:
        unused = proxy.port
    app = Flask("other")
    app.config["SQLALCHEMY_DATABASE_URI"] = as_url(each_dsn)
    app.config["SQLALCHEMY_BINDS"] = {
        "reports": as_url(each_dsn.replace(f":{given['port']}/", f":{unused}/"))
    }
    shop.db.init_app(app)
    with app.app_context(), pytest.raises(ConnectError, match="could not be asked") as caught:
        hub.start(shop.db.engine, [shop.Report])
    assert "geheim" not in str(caught.value)
    assert triggers(main_db) == []


def test_binds_that_are_no_database_of_ours(
    shop: SimpleNamespace, each_dsn: str, main_db: Database, hub: Hub
) -> None:
    """A bind of SQLite, and a key that there is not, say so."""
    app = Flask("other")
    app.config["SQLALCHEMY_DATABASE_URI"] = as_url(each_dsn)
    app.config["SQLALCHEMY_BINDS"] = {"reports": "sqlite://"}
    shop.db.init_app(app)
    with app.app_context(), pytest.raises(ModelError, match="which is not PostgreSQL"):
        hub.start(shop.db.engine, [shop.Report])
    app = Flask("third")
    app.config["SQLALCHEMY_DATABASE_URI"] = as_url(each_dsn)
    app.config["SQLALCHEMY_BINDS"] = {"report": as_url(each_dsn)}
    shop.db.init_app(app)
    with app.app_context(), pytest.raises(ModelError, match=r"lacks \(did you mean 'report'\?\)"):
        hub.start(shop.db.engine, [shop.Report])


def test_models_that_live_in_many_databases(
    shop: SimpleNamespace, each_dsn: str, main_db: Database, hub: Hub, recorder: Recorder
) -> None:
    """Who has them in each tenant's database says so, and none is refused."""
    from pgsignals.resolvers import SQLAlchemyResolver

    hub.on(shop.Report)(recorder)
    with shop.app.app_context():
        hub.start(each_dsn, [shop.Report], resolvers=[SQLAlchemyResolver(routed=False)])
    main_db("INSERT INTO reports VALUES (1)")
    assert [event.id for event in recorder.wait(1)] == [1]


class Sold(models.Model):
    class Meta:
        app_label = "homes"
        db_table = "orders"


class Counted(models.Model):
    """A table of the other database, by a router."""

    class Meta:
        app_label = "homes"
        db_table = "reports"
        managed = False


class CountedToo(Counted):
    class Meta:
        app_label = "homes"
        proxy = True


class ToReports:
    """Sends one model to the other database, and lets its table come there alone."""

    def db_for_write(self, model: Any, **hints: Any) -> str | None:
        return "reports" if model._meta.db_table == "reports" else None

    db_for_read = db_for_write

    def allow_migrate(self, db: str, app_label: str, **hints: Any) -> bool | None:
        if "model" not in hints:
            return None
        return (db == "reports") == (hints["model"]._meta.db_table == "reports")


class FromReplica:
    """Has all models read somewhere else than they are written."""

    def db_for_write(self, model: Any, **hints: Any) -> str:
        return "default"

    def db_for_read(self, model: Any, **hints: Any) -> str:
        return "reports"


@pytest.fixture
def both(
    each_dsn: str, reports_dsn: str, main_db: Database, reports_db: Database
) -> Iterator[None]:
    """Django on both databases."""
    with django_databases(default=each_dsn, reports=reports_dsn):
        yield


@pytest.mark.parametrize("model", [Counted, CountedToo])
def test_a_router_sends_a_model_elsewhere(
    both: None, each_dsn: str, reports_dsn: str, main_db: Database, model: Any
) -> None:
    """The error names the model, the alias, both databases and the fix."""
    with override_settings(DATABASE_ROUTERS=[ToReports()]), pytest.raises(ModelError) as caught:
        Hub().start(each_dsn, [Sold, model])
    message = str(caught.value)
    name = model.__name__
    assert f"{name} is of the database 'reports' of DATABASES, to which a router sends" in message
    assert f"({display(reports_dsn).rpartition(' user')[0]}" in message
    assert f"database='reports', watchers=[{name}])" in message
    assert "PGSIGNALS['DATABASES']" in message
    assert triggers(main_db) == []


def test_a_hub_for_another_alias(
    both: None,
    hub: Hub,
    main_db: Database,
    reports_db: Database,
    recorder: Recorder,
    delivery: Delivery,
) -> None:
    """``start(database=…)`` watches the other database, and records come from there."""
    loaded = Recorder()
    hub.on(Counted)(lambda event: loaded((event.id, event.load().pk)))
    hub.on("named")(lambda event: loaded(("named", event.load().pk)))
    settings = {"LISTEN_DSN": "service=direct", "DELIVERY": delivery, "WATCHERS": [Sold]}
    with override_settings(DATABASE_ROUTERS=[ToReports()], PGSIGNALS=settings):
        with pytest.raises(ConfigurationError, match=r"PGSIGNALS\['DATABASES'\] or start\("):
            pgsignals.contrib.django.start(hub, database="reports")
        pgsignals.contrib.django.start(
            hub,
            database="reports",
            # No router sends this one anywhere: it is there by what start was told.
            watchers=[Counted, pgsignals.watch(Sold, "inserted", label="named")],
        )
        main_db("INSERT INTO reports VALUES (1); INSERT INTO orders VALUES (1)")
        reports_db("INSERT INTO reports VALUES (2); INSERT INTO orders VALUES (3)")
        assert set(loaded.wait(2)) == {(2, 2), ("named", 3)}
        settle(hub)
        assert len(loaded.items) == 2
        hub.stop()


def test_records_come_from_where_they_are_written(
    both: None, each_dsn: str, main_db: Database, hub: Hub, recorder: Recorder
) -> None:
    """With a router for replicas, a record is not looked for where it has yet to come."""
    hub.on(Sold)(recorder)
    with override_settings(DATABASE_ROUTERS=[FromReplica()]):
        hub.start(each_dsn, [Sold])
        main_db("INSERT INTO orders VALUES (1)")
        assert [event.load().pk for event in recorder.wait(1)] == [1]


def test_two_aliases_of_one_database(
    each_dsn: str, main_db: Database, hub: Hub, recorder: Recorder
) -> None:
    """A router that sends a model to another alias of the watched database is content."""
    given = parse_dsn(each_dsn)
    hub.on(Counted)(recorder)
    with Proxy(given["host"], int(given["port"])) as proxy:
        other = each_dsn.replace(given["host"], "127.0.0.1")
        other = other.replace(f":{given['port']}/", f":{proxy.port}/")
        with (
            django_databases(default=each_dsn, reports=other),
            override_settings(DATABASE_ROUTERS=[ToReports()]),
        ):
            hub.start(each_dsn, [Counted])
            main_db("INSERT INTO reports VALUES (1)")
            assert [event.load().pk for event in recorder.wait(1)] == [1]


def test_migrations_install_where_the_tables_are(
    both: None, main_db: Database, reports_db: Database
) -> None:
    """Of one operation each database gets the watchers whose models may migrate there."""
    main_db("CREATE TABLE logs (id int)")
    operation = InstallWatchers(["homes.Sold", "homes.Counted", pgsignals.watch("logs", "deleted")])
    reports_db("CREATE TABLE logs (id int)")

    class Installed(Migration):
        operations = [operation]  # noqa: RUF012

    with override_settings(DATABASE_ROUTERS=[ToReports()]):
        for alias in ("default", "reports"):
            connection = django.db.connections[alias]
            state = MigrationExecutor(connection).loader.project_state()
            for model in (Sold, Counted):
                state.add_model(django.db.migrations.state.ModelState.from_model(model))
            with connection.schema_editor() as editor:
                Installed("0001", "homes").apply(state, editor)
        assert triggers(main_db) == ["logs", "orders"]
        assert triggers(reports_db) == ["logs", "reports"]
