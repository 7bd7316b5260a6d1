"""The Flask extension: settings, when it starts, in what receivers run, health."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
from flask import Flask, current_app, g, has_app_context
from flask_sqlalchemy import SQLAlchemy
from psycopg2.extensions import parse_dsn
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import pgsignals
from pgsignals import Hub
from pgsignals.contrib.flask import PgSignals, health
from pgsignals.hub.hub import Delivery
from pgsignals.testing import Server, simulated
from tests.conftest import DEADLINE, Database, Recorder
from tests.proxy import Proxy

WATCHERS = ["items"]


@pytest.fixture(autouse=True)
def items(db: Database) -> None:
    """A table."""
    db("CREATE TABLE items (id bigserial PRIMARY KEY, name text)")


@pytest.fixture
def hub() -> Iterator[Hub]:
    """The Hub of the applications, not the default one, whose receivers would stay."""
    made = Hub()
    yield made
    made.stop()


def application(dsn: str | None, name: str = "shop", **config: Any) -> Flask:
    """An application with one page."""
    app = Flask(name)
    if dsn is not None:
        app.config["PGSIGNALS_DSN"] = dsn
    app.config.update(config)
    app.get("/")(lambda: "well")
    return app


def get(app: Flask, path: str = "/") -> Any:
    """The response to one request."""
    return app.test_client().get(path)


def test_the_first_request_starts_it(dsn: str, db: Database, hub: Hub, recorder: Recorder) -> None:
    """Making an application starts nothing; once it serves, it hears of changes."""
    signals = PgSignals(watchers=WATCHERS, hub=hub)
    signals.on("items")(recorder)
    app = application(dsn)
    signals.init_app(app)
    assert not hub.running
    assert get(app).text == "well"
    assert hub.running
    get(app)
    db("INSERT INTO items DEFAULT VALUES")
    [event] = recorder.wait(1)
    assert (event.op, event.id) == ("inserted", 1)


def test_receivers_run_in_an_application_context(
    dsn: str, db: Database, hub: Hub, recorder: Recorder
) -> None:
    """Each call, of whatever kind, has a context of its own, with its teardown at the end."""
    app = application(dsn, "the-app")
    signals = PgSignals(app, watchers=WATCHERS, hub=hub)
    torn = Recorder()
    app.teardown_appcontext(lambda error: torn((g.get("mark"), error)))

    @signals.on("items")
    def fail(event: pgsignals.Event) -> None:
        assert "mark" not in g
        g.mark = event.id
        recorder(("on", current_app.name))
        raise LookupError("what it raised")

    @signals.on_batch("items", every=0)
    def collect(batch: pgsignals.Batch) -> None:
        recorder(("batch", current_app.name, len(batch)))

    @signals.on_gap
    def missed(gap: pgsignals.Gap) -> None:
        recorder(("gap", current_app.name))

    def blinker_receiver(model: Any, event: pgsignals.Event) -> None:
        recorder(("signal", current_app.name))

    hub.signal("items", "inserted").connect(blinker_receiver)
    signals.start(app)
    db("INSERT INTO items DEFAULT VALUES")
    assert {tuple(each) for each in recorder.wait(3)} == {
        ("on", "the-app"),
        ("signal", "the-app"),
        ("batch", "the-app", 1),
    }
    assert (1, "what it raised") in [(mark, str(error)) for mark, error in torn.wait(3)]
    db(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name = 'pgsignals' AND datname = current_database()"
    )
    assert recorder.wait(4)[3] == ("gap", "the-app")


def test_a_tracer_of_the_application(dsn: str, db: Database, hub: Hub, recorder: Recorder) -> None:
    """PGSIGNALS_TRACER still sees each call, and within the application context."""
    seen: list[tuple[str, str]] = []

    class Tracer:
        def receiving(self, events: Any, receiver: str) -> Any:
            seen.append((current_app.name, events[0].op))
            return threading.Lock()  # A context manager, as good as any.

    app = application(dsn, PGSIGNALS_TRACER=Tracer())
    signals = PgSignals(app, watchers=WATCHERS, hub=hub)
    signals.on("items")(recorder)
    signals.start(app)
    db("INSERT INTO items DEFAULT VALUES")
    recorder.wait(1)
    assert seen == [("shop", "inserted")]


def test_a_tracer_that_fails(dsn: str, db: Database, hub: Hub, recorder: Recorder) -> None:
    """The receiver is called in its context all the same."""
    tracer = mock.Mock(**{"receiving.side_effect": RuntimeError("no span")})
    app = application(dsn, PGSIGNALS_TRACER=tracer)
    signals = PgSignals(app, watchers=WATCHERS, hub=hub)
    signals.on("items")(lambda event: recorder(current_app.name))
    signals.start(app)
    db("INSERT INTO items DEFAULT VALUES")
    assert recorder.wait(1) == ["shop"]
    assert tracer.receiving.called


def test_each_call_has_a_context_of_its_own(
    each_dsn: str, each_db: Database, hub: Hub, delivery: Delivery
) -> None:
    """Also where one statement brings many events: nothing of one call is there in the next."""
    each_db("CREATE TABLE items (id bigserial PRIMARY KEY)")
    app = application(each_dsn, PGSIGNALS_DELIVERY=delivery)
    signals = PgSignals(app, watchers=WATCHERS, hub=hub)
    steps = Recorder()
    app.teardown_appcontext(lambda error: steps(("end", g.get("mark"))))

    @signals.on("items")
    def mark(event: pgsignals.Event) -> None:
        steps(("begin", g.get("mark")))
        g.mark = event.id

    signals.start(app)
    before = len(steps.items)
    each_db("INSERT INTO items SELECT FROM generate_series(1, 3)")
    expected: list[Any] = []
    for number in (1, 2, 3):
        expected += [("begin", None), ("end", number)]
    assert steps.wait(before + 6)[before:] == expected


def test_what_a_teardown_raises(
    each_dsn: str, each_db: Database, hub: Hub, delivery: Delivery
) -> None:
    """It is the receiver's failure, since what the teardown was to commit is not there."""
    each_db("CREATE TABLE items (id bigserial PRIMARY KEY)")
    app = application(each_dsn, PGSIGNALS_DELIVERY=delivery)
    signals = PgSignals(app, watchers=WATCHERS, hub=hub)
    calls, failures = Recorder(), Recorder()
    hub.receiver_failed.connect(
        lambda hub, receiver, event, error: failures(str(error)), weak=False
    )
    signals.on("items")(lambda event: calls(g.setdefault("mark", event.id)))

    @app.teardown_appcontext
    def commit(error: BaseException | None) -> None:
        if "mark" in g and len(calls.items) == 1:
            raise LookupError("it could not commit")

    signals.start(app)
    each_db("INSERT INTO items DEFAULT VALUES")
    assert failures.wait(1) == ["it could not commit"]
    if delivery != "notify":
        assert calls.wait(2) == [1, 1]


def test_a_context_ends_with_the_run(dsn: str, db: Database, hub: Hub) -> None:
    """A Hub that the program starts after the application has stopped it is the program's own."""
    app = application(dsn)
    signals = PgSignals(app, watchers=WATCHERS, hub=hub)
    found = Recorder()
    signals.on("items")(lambda event: found(has_app_context()))
    signals.start(app)
    db("INSERT INTO items DEFAULT VALUES")
    found.wait(1)
    signals.stop(app)
    hub.start(dsn, WATCHERS)
    db("INSERT INTO items DEFAULT VALUES")
    assert found.wait(2) == [True, False]


class Base(DeclarativeBase):
    """The models' base."""


models = SQLAlchemy(model_class=Base)


class Item(models.Model):  # type: ignore[name-defined, misc]
    """An item."""

    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]


@pytest.fixture
def alchemist(dsn: str) -> Iterator[Flask]:
    """An application with Flask-SQLAlchemy and a pool of one connection."""
    app = application(
        None,
        SQLALCHEMY_DATABASE_URI=dsn.replace("postgresql://", "postgresql+psycopg2://"),
        SQLALCHEMY_ENGINE_OPTIONS={"pool_size": 1, "max_overflow": 0, "pool_timeout": DEADLINE},
    )
    models.init_app(app)
    yield app
    with app.app_context():
        models.engine.dispose()


def test_sessions_are_released_after_each_receiver(
    alchemist: Flask, db: Database, hub: Hub, recorder: Recorder
) -> None:
    """Receivers share a pool of one, also with one that raises, and see each change anew."""
    signals = PgSignals(alchemist, watchers=[Item], hub=hub)

    @signals.on(Item)
    def load(event: pgsignals.Event) -> None:
        item = event.load(models.session)
        recorder(item.name)
        raise ValueError(item.name)

    signals.on(Item)(lambda event: recorder(models.session.get(Item, event.id).name))
    signals.start(alchemist)
    db("INSERT INTO items (name) VALUES ('a')")
    assert recorder.wait(2) == ["a", "a"]
    db("UPDATE items SET name = 'b'")
    assert recorder.wait(4)[2:] == ["b", "b"]
    with alchemist.app_context():
        assert models.session.scalars(models.select(Item.name)).all() == ["b"]
        models.session.remove()
        assert models.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


def test_the_database_is_that_of_flask_sqlalchemy(alchemist: Flask, dsn: str, hub: Hub) -> None:
    """Its engine's URL is used, password and all, unless PGSIGNALS_DSN says otherwise."""
    PgSignals(alchemist, watchers=WATCHERS, hub=hub)
    found = alchemist.extensions["pgsignals.process"].settings().dsn
    assert parse_dsn(found) == parse_dsn(dsn)
    alchemist.config["PGSIGNALS_DSN"] = "service=other"
    assert alchemist.extensions["pgsignals.process"].settings().dsn == "service=other"


def test_a_password_in_the_url_arrives_whole(hub: Hub) -> None:
    """Characters that are special in a URL come through, and through no message."""
    app = application(
        None, SQLALCHEMY_DATABASE_URI="postgresql+psycopg2://u:p%40s%2Fs%3F@127.0.0.1:1/d"
    )
    models.init_app(app)
    signals = PgSignals(app, watchers=WATCHERS, hub=hub)
    found = app.extensions["pgsignals.process"].settings().dsn
    assert parse_dsn(found)["password"] == "p@s/s?"
    with pytest.raises(pgsignals.ConnectError) as raised:
        signals.start(app)
    assert "p@s" not in str(raised.value)


def test_another_database_is_refused(hub: Hub) -> None:
    """Flask-SQLAlchemy on SQLite needs PGSIGNALS_DSN, and the message says so."""
    app = application(None, SQLALCHEMY_DATABASE_URI="sqlite://")
    models.init_app(app)
    with pytest.raises(pgsignals.ConfigurationError, match="sqlite: set PGSIGNALS_DSN"):
        PgSignals(app, watchers=WATCHERS, hub=hub).start(app)


def test_every_option_of_start_is_a_setting(dsn: str, hub: Hub) -> None:
    """Whatever Hub.start takes can be set, and the docstring lists all of it."""
    app = application(dsn, PGSIGNALS_WORKERS=3, PGSIGNALS_NAMESPACE="mine", PGSIGNALS_PRUNE=False)
    signals = PgSignals(app, watchers=WATCHERS, hub=hub)
    started: dict[str, Any] = {}

    def start(*arguments: Any, **options: Any) -> Hub:
        started.update(options)
        return hub

    hub.start = start  # type: ignore[method-assign]
    signals.start(app)
    assert started.pop("dsn") == dsn
    assert [watcher.model for watcher in started.pop("watchers")] == WATCHERS
    assert started == {"workers": 3, "namespace": "mine", "prune": False}
    for name in set(inspect.signature(Hub.start).parameters) - {"self"}:
        assert f"``PGSIGNALS_{name.upper()}``" in str(PgSignals.__doc__)


def test_a_setting_that_is_none(dsn: str, hub: Hub) -> None:
    """A name that is misspelt is an error that names the nearest."""
    app = application(dsn, PGSIGNALS_WORKRES=2)
    with pytest.raises(pgsignals.ConfigurationError, match="did you mean 'PGSIGNALS_WORKERS'"):
        PgSignals(app, watchers=WATCHERS, hub=hub).start(app)


NAMED = ["items"]


def named() -> list[str]:
    """Watchers, later."""
    return NAMED


@pytest.mark.parametrize(
    "given", [["items"], named, f"{__name__}:NAMED", f"{__name__}.NAMED", f"{__name__}:named"]
)
@pytest.mark.parametrize("by_setting", [True, False])
def test_watchers(dsn: str, hub: Hub, given: Any, by_setting: bool) -> None:
    """A list, what gives one, or the place of either; as an argument or a setting."""
    app = application(dsn, **({"PGSIGNALS_WATCHERS": given} if by_setting else {}))
    signals = PgSignals(app, watchers=() if by_setting else given, hub=hub)
    signals.start(app)
    assert {state.table for state in hub.status().watchers} == {"items"}


@pytest.mark.parametrize(
    ("given", "message"),
    [("tests.server.test_flask:NOTHING", "NOTHING"), (7, "give a list"), ((), "nothing to watch")],
)
def test_watchers_that_are_none(dsn: str, hub: Hub, given: Any, message: str) -> None:
    """What is no list of watchers is refused, saying what it was."""
    app = application(dsn)
    with pytest.raises(pgsignals.ConfigurationError, match=message):
        PgSignals(app, watchers=given, hub=hub).start(app)


@pytest.mark.parametrize("config", [{"TESTING": True}, {"PGSIGNALS_AUTOSTART": False}])
def test_it_may_be_left_to_be_started(dsn: str, hub: Hub, config: dict[str, Any]) -> None:
    """In tests, and where the setting says so, requests start nothing."""
    app = application(dsn, **config)
    signals = PgSignals(app, watchers=WATCHERS, hub=hub)
    get(app)
    assert not hub.running
    signals.start(app)
    assert hub.running


def test_tests_need_no_database(hub: Hub, recorder: Recorder) -> None:
    """With events that are made up, receivers are called as ever."""
    app = application(None, TESTING=True)
    signals = PgSignals(app, watchers=WATCHERS, hub=hub)
    signals.on("items")(lambda event: recorder((current_app.name, event.id)))
    signals.on_gap(lambda gap: recorder(gap.reason))
    with app.app_context(), simulated(WATCHERS, hub=signals.hub) as simulation:
        simulation.emit("items", "inserted", id=1)
        simulation.gap()
    assert recorder.items == [("shop", 1), "reconnected"]


def test_one_hub_for_each_application(
    server: Server, dsn: str, db: Database, connect: Callable[[str], Database], recorder: Recorder
) -> None:
    """Two applications of one factory hear of their own databases, in their own contexts."""
    signals = PgSignals(watchers=WATCHERS, hub=Hub)
    signals.on("items")(lambda event: recorder((current_app.name, event.id)))
    other = connect(server.create_database())
    other("CREATE TABLE items (id bigserial PRIMARY KEY)")
    apps = application(dsn, "first"), application(other.dsn, "second")
    for app in apps:
        signals.init_app(app)
    signals.on("items")(lambda event: recorder(("late", current_app.name)))
    with pytest.raises(pgsignals.StateError, match="no application context"):
        signals.hub  # noqa: B018
    try:
        for app in apps:
            get(app)
        other("INSERT INTO items VALUES (2)")
        assert sorted(recorder.wait(2)) == [("late", "second"), ("second", 2)]
        db("INSERT INTO items VALUES (1)")
        assert sorted(recorder.wait(4)[2:]) == [("first", 1), ("late", "first")]
        hubs = []
        for app in apps:
            with app.app_context():
                hubs.append(signals.hub)
        assert hubs[0] is not hubs[1]
    finally:
        for app in apps:
            signals.stop(app)
    assert not any(hub.running for hub in hubs)


def test_one_hub_runs_for_one_application(
    dsn: str, hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    """A second application is told how to have one of its own; its requests are served."""
    signals = PgSignals(watchers=WATCHERS, hub=hub)
    first, second = application(dsn, "first"), application(dsn, "second")
    for app in (first, second):
        signals.init_app(app)
    get(first)
    with pytest.raises(pgsignals.StateError, match=r"'first' already.*hub=pgsignals\.Hub"):
        signals.start(second)
    assert get(second).text == "well"
    assert "could not start" in caplog.text
    signals.stop(first)
    signals.start(second)


@pytest.mark.parametrize("wrong", [7, "default"])
def test_what_is_no_hub(wrong: Any) -> None:
    """Neither a Hub nor what makes one is refused."""
    with pytest.raises(pgsignals.ConfigurationError, match="give a Hub"):
        PgSignals(hub=wrong)


def test_an_application_has_it_once(dsn: str, hub: Hub) -> None:
    """A second init_app of one application is refused."""
    app = application(dsn)
    signals = PgSignals(app, hub=hub)
    with pytest.raises(pgsignals.ConfigurationError, match="has a PgSignals already"):
        signals.init_app(app)


def test_an_application_without_it(dsn: str) -> None:
    """What needs the extension says that init_app was not called."""
    with pytest.raises(pgsignals.StateError, match=r"no PgSignals: call init_app\(app\)"):
        PgSignals().start(application(dsn))


def test_by_default_it_is_the_default_hub(dsn: str, db: Database, recorder: Recorder) -> None:
    """Receivers of ``pgsignals.on`` are called too, in a context as well."""
    app = application(dsn)
    signals = PgSignals(app, watchers=WATCHERS)
    subscription = pgsignals.subscribe(
        lambda event: recorder((current_app.name, event.id)), "items"
    )
    try:
        get(app)
        assert signals.hub is pgsignals.default_hub
        db("INSERT INTO items DEFAULT VALUES")
        assert recorder.wait(1) == [("shop", 1)]
    finally:
        subscription.cancel()
        signals.stop(app)


def test_a_hub_that_the_program_has_started(dsn: str, db: Database, hub: Hub) -> None:
    """One that runs already is left as it is."""
    app = application("postgresql://nowhere.invalid/", PGSIGNALS_WATCHERS=["nothing"])
    PgSignals(app, hub=hub)
    hub.start(dsn, WATCHERS)
    assert get(app).status_code == 200
    assert hub.running


def test_a_database_that_is_away(
    server: Server, dsn: str, db: Database, hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    """Requests are served, readiness says why not, and it starts once the database is there."""
    caplog.set_level(logging.WARNING)
    with Proxy("127.0.0.1", server.port) as proxy:
        proxy.refuse()
        where = parse_dsn(dsn)
        app = application(f"postgresql://{where['user']}@127.0.0.1:{proxy.port}/{where['dbname']}")
        app.register_blueprint(health)
        signals = PgSignals(app, watchers=WATCHERS, hub=hub)
        for _ in range(2):
            assert get(app).text == "well"
        assert get(app, "/health/live").status_code == 200
        answer = get(app, "/health/ready")
        assert answer.status_code == 503
        assert answer.json["reason"] == "it could not start, and tries again: ConnectError"
        assert caplog.records[0].levelno == logging.ERROR
        retry = retrying()
        proxy.accept()
        retry.join(DEADLINE)
        assert get(app, "/health/ready").status_code == 200
        signals.stop(app)


def retrying() -> threading.Thread:
    """The thread that tries again."""
    [found] = [each for each in threading.enumerate() if each.name == "pgsignals-start"]
    return found


def test_stop_ends_the_retries(hub: Hub) -> None:
    """An application that was told to stop is not started by a retry or a request."""
    app = application("host=127.0.0.1 port=1")
    signals = PgSignals(app, watchers=WATCHERS, hub=hub)
    get(app)
    assert signals.stop(app)
    retrying().join(DEADLINE)
    with pytest.raises(ValueError, match="not enough values"):
        retrying()
    get(app)
    assert not hub.running


def test_while_debugging_the_request_gets_the_error(dsn: str, hub: Hub) -> None:
    """With app.debug a mistake is in the browser and not only in the log."""
    app = application(dsn, DEBUG=True)
    signals = PgSignals(app, watchers=["itmes"], hub=hub)
    for _ in range(2):
        with pytest.raises(pgsignals.TableError, match="itmes"):
            get(app)
    signals.stop(app)


def test_health(dsn: str, hub: Hub) -> None:
    """Live from the beginning, ready from the start on, neither once it was stopped."""
    app = application(dsn, PGSIGNALS_AUTOSTART=False)
    app.register_blueprint(health)
    signals = PgSignals(app, watchers=WATCHERS, hub=hub)

    def codes() -> tuple[int, int]:
        return get(app, "/health/live").status_code, get(app, "/health/ready").status_code

    assert codes() == (200, 503)
    assert get(app, "/health/ready").json["reason"] == "it starts with the first request"
    signals.start(app)
    assert codes() == (200, 200)
    signals.stop(app)
    assert codes() == (503, 503)


def test_the_child_of_a_fork_starts_with_its_first_request(
    dsn: str, db: Database, hub: Hub, recorder: Recorder
) -> None:
    """As uWSGI forks: after the application was made, and even after the parent has served."""
    app = application(dsn)
    signals = PgSignals(app, watchers=WATCHERS, hub=hub)
    signals.on("items")(recorder)
    for serves_before in (False, True):
        if serves_before:
            get(app)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                assert not hub.running
                get(app)
                assert hub.running
                own = Database(dsn)
                own("INSERT INTO items DEFAULT VALUES")
                recorder.wait(1)
                hub.stop()
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
    assert [event.id for event in recorder.wait(1)] == [2]


def test_flask_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Flask the message says what to install."""
    for name in list(sys.modules):
        if name.startswith("pgsignals.contrib.flask"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flask", None)
    with pytest.raises(pgsignals.MissingExtraError, match=r"pgsignals\[flask\]"):
        importlib.import_module("pgsignals.contrib.flask")
