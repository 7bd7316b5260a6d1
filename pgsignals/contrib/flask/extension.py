"""The extension: settings, and the start of a Hub in each process of a Flask application."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from flask import Flask, current_app, has_app_context
from werkzeug.utils import import_string

import pgsignals

from ...core.backoff import Backoff
from ...core.errors import ConfigurationError, PgSignalsError, StateError, near
from ...core.events import Batch, Event, Gap
from ...core.logging import log
from ...core.process import after_fork, notice_fork
from ...core.redaction import error_text
from ...core.threads import Thread
from ...core.watchers import Watcher, normalize
from ...dispatch.registry import Subscription
from ...hub.hub import Hub
from ...hub.options import Options
from ...hub.status import Health
from ..feeds import Feeds
from ..ring import RingFeed
from ..shutdown import Shutdown

Watchers = Iterable[Any] | Callable[[], Iterable[Any]] | str

F = TypeVar("F")
R = TypeVar("R", bound=Callable[[Event], object])
B = TypeVar("B", bound=Callable[[Batch], object])
G = TypeVar("G", bound=Callable[[Gap], object])

_PREFIX = "PGSIGNALS_"
# The seconds that a stream waits for the Hub that another request is starting.
_START_SECONDS = 5.0
_OPTIONS = frozenset(each.name for each in fields(Options))
# Settings of the extension itself; the others are passed to Hub.start.
_OWN_SETTINGS = frozenset({"autostart", "sse_size", "sse_clients", "binds"})
# Settings that lead to the first database, or belong to it.
_OF_ONE_DATABASE = frozenset({"dsn", "listen_dsn", "watchers"})
_PROCESSES = "pgsignals.processes"


class PgSignals:
    """pgsignals in a Flask application.

    ::

        signals = PgSignals(watchers=[Order])

        @signals.on(Order, "updated")
        def changed(event: pgsignals.Event) -> None:
            db.session.get(Order, event.id)

        def create_app() -> Flask:
            app = Flask(__name__)
            db.init_app(app)
            signals.init_app(app)
            return app

    Nothing runs when an application is made, nor for ``flask routes`` or ``flask shell``. In each
    process that serves requests the Hub starts with the first one, whatever forked the process and
    when; ``start`` does so earlier. A Hub that cannot start is logged, and tried again in the
    background, while requests are served; with ``app.debug`` the request gets the error too.

    Receivers run in an application context of their own, whose end releases Flask-SQLAlchemy's
    session and whatever else is released at an application context's teardown.

    Settings, from ``app.config``:

    ``PGSIGNALS_DSN``
        The database; by default that of Flask-SQLAlchemy, or else of libpq's variables.
    ``PGSIGNALS_WATCHERS``
        What to watch, in place of ``watchers``: a list, a function that returns one, or the path of
        either, such as ``"shop.signals:WATCHERS"``. It is read when the Hub starts.
    ``PGSIGNALS_AUTOSTART``
        Whether the first request starts the Hub; by default unless ``TESTING``.
    ``PGSIGNALS_INSTALL``, ``PGSIGNALS_WORKERS``, ``PGSIGNALS_QUEUE_SIZE``, …
        Every option of :meth:`pgsignals.Hub.start`, by its name in capitals. The others of this
        version are ``PGSIGNALS_DELIVERY``, ``PGSIGNALS_NAME``, ``PGSIGNALS_PARTITIONS``,
        ``PGSIGNALS_LEASE``, ``PGSIGNALS_CAPTURE``, ``PGSIGNALS_ALLOW_UNBOUNDED_WAL``,
        ``PGSIGNALS_BACKENDS``, ``PGSIGNALS_LOOP``,
        ``PGSIGNALS_NAMESPACE``, ``PGSIGNALS_PRUNE``,
        ``PGSIGNALS_LOCK_TIMEOUT``, ``PGSIGNALS_INSTALL_TIMEOUT``, ``PGSIGNALS_LISTEN_DSN``,
        ``PGSIGNALS_HEARTBEAT``, ``PGSIGNALS_HEARTBEAT_TIMEOUT``, ``PGSIGNALS_RESTART_AFTER_FORK``,
        ``PGSIGNALS_RESOLVERS``, ``PGSIGNALS_METRICS`` and ``PGSIGNALS_TRACER``.
    ``PGSIGNALS_SSE_SIZE``
        The number of events that each feed of :func:`sse` keeps: 1000.
    ``PGSIGNALS_SSE_CLIENTS``
        The most streams that this process has; further browsers are told to come back. By default
        there is no limit.

    ``PGSIGNALS_BINDS``
        The settings that differ for databases of ``SQLALCHEMY_BINDS``, by bind key, without the
        prefix, such as ``{"reports": {"DELIVERY": "outbox", "NAME": "reports"}}``.

    ``hub`` is the Hub to run, by default ``pgsignals.default_hub``, so that receivers registered
    with ``@pgsignals.on`` are called, too. A Hub runs for one application at a time; if a process
    serves several, ``hub=pgsignals.Hub`` (the class) gives each its own.

    ``bind_key`` is that of another of Flask-SQLAlchemy's databases, whose models have it as
    ``__bind_key__``: ``PgSignals(bind_key="reports", watchers=[Report])``, beside the first, has a
    Hub of its own, by default a new one, on that database. The settings hold for it too, but for
    DSN, LISTEN_DSN and WATCHERS.
    """

    def __init__(
        self,
        app: Flask | None = None,
        *,
        watchers: Watchers = (),
        hub: Hub | Callable[[], Hub] | None = None,
        bind_key: str | None = None,
    ) -> None:
        self.bind_key = bind_key
        self._watchers = watchers
        self._single = hub if isinstance(hub, Hub) else None
        self._make_hub = hub if callable(hub) else None
        if self._single is None and self._make_hub is None:
            if hub is not None:
                raise ConfigurationError(f"hub={hub!r}: give a Hub, or what makes one.")
            self._single = pgsignals.default_hub if bind_key is None else Hub()
        self._declared: list[Callable[[Hub], object]] = []
        self._hubs: weakref.WeakSet[Hub] = weakref.WeakSet()
        if self._single is not None:
            self._hubs.add(self._single)
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Serve ``app``.

        Raises ConfigurationError if ``app`` has an extension for this database already.
        """
        if self.bind_key in _processes_of(app):
            which = "" if self.bind_key is None else f" with bind_key={self.bind_key!r}"
            raise ConfigurationError(
                f"The application {app.name!r} has a PgSignals{which} already: call init_app once. "
                "For another database of SQLALCHEMY_BINDS, give the second one its bind_key=."
            )
        if self._single is not None:
            hub = self._single
        else:
            assert self._make_hub is not None
            hub = self._make_hub()
            for declare in self._declared:
                declare(hub)
            self._hubs.add(hub)
        process = Process(app, hub, self._watchers, self.bind_key)
        app.extensions.setdefault(_PROCESSES, {})[self.bind_key] = process
        if self.bind_key is None:
            app.extensions["pgsignals"] = self
            app.extensions["pgsignals.process"] = process
        app.before_request(process.serve)

    @property
    def hub(self) -> Hub:
        """The Hub; if each application has its own, that of the current one.

        Raises StateError if that needs an application context and there is none.
        """
        if self._single is not None:
            return self._single
        return self._process(None).hub

    def start(self, app: Flask | None = None) -> Hub:
        """Start the Hub of ``app``, or of the current application, before the first request.

        For a hook that runs in each process that serves, such as gunicorn's ``post_worker_init``.
        In the main thread, it also makes the streams of :func:`sse` end at SIGTERM; otherwise a
        server would wait for them. Raises what :meth:`pgsignals.Hub.start` raises.
        """
        return self._process(app).start()

    def stop(self, app: Flask | None = None, timeout: float = 10.0) -> bool:
        """Stop the Hub; requests do not start it again. See :meth:`pgsignals.Hub.stop`."""
        return self._process(app).stop(timeout)

    def health(self, app: Flask | None = None) -> Health:
        """Return the Hub's health, as :meth:`pgsignals.Hub.health` does.

        A Hub that is yet to start, or that could not and is tried again, is alive and not ready.
        """
        return self._process(app).health()

    def _process(self, app: Flask | None) -> Process:
        return process_of(app, self.bind_key)

    def on(self, target: Any, *ops: str, **filters: Any) -> Callable[[R], R]:
        """See :meth:`pgsignals.Hub.on`."""
        return self._declaring(lambda hub, fn: hub.on(target, *ops, **filters)(fn))

    def on_batch(
        self, target: Any, *ops: str, every: float = 0.5, max_size: int = 10_000, **filters: Any
    ) -> Callable[[B], B]:
        """See :meth:`pgsignals.Hub.on_batch`."""
        options = {"every": every, "max_size": max_size, **filters}
        return self._declaring(lambda hub, fn: hub.on_batch(target, *ops, **options)(fn))

    def on_gap(self, fn: G) -> G:
        """See :meth:`pgsignals.Hub.on_gap`."""
        self._declare(lambda hub: hub.on_gap(_in_context(hub, fn)))
        return fn

    def subscribe(
        self, fn: Callable[[Event], object], target: Any, *ops: str, **filters: Any
    ) -> Subscription:
        """See :meth:`pgsignals.Hub.subscribe`; with the Hub of the current application."""
        return self.hub.subscribe(fn, target, *ops, **filters)

    def _declaring(self, declare: Callable[[Hub, Any], object]) -> Callable[[F], F]:
        """Return a decorator that declares a receiver by ``declare``."""

        def register(fn: F) -> F:
            self._declare(lambda hub: declare(hub, fn))
            return fn

        return register

    def _declare(self, declare: Callable[[Hub], object]) -> None:
        """Declare a receiver on the Hubs that there are, and on those that are made later."""
        for hub in list(self._hubs):
            declare(hub)
        self._declared.append(declare)


class Process:
    """An application's Hub in this process: its start, and the feeds of its streams."""

    def __init__(self, app: Flask, hub: Hub, watchers: Watchers, bind_key: str | None) -> None:
        self._app = weakref.ref(app)
        self._bind_key = bind_key
        self._watchers = watchers
        self.hub = hub
        self._tried = False
        self._error: Exception | None = None
        self._lock = threading.Lock()
        self._feeds = Feeds(hub)
        self._ended = False
        self._shutdown = Shutdown(self.end_streams)
        _processes.add(self)

    @property
    def app(self) -> Flask:
        """The application."""
        app = self._app()
        assert app is not None, "an application's requests have it"
        return app

    def serve(self) -> None:
        """Start the Hub with the first request; called before each."""
        notice_fork()
        if self._tried:
            if self._error is not None and self.app.debug:
                raise self._error
            return
        app = self.app
        if not app.config.get("PGSIGNALS_AUTOSTART", not app.testing):
            return
        # Requests that come meanwhile are served and not kept waiting.
        if not self._lock.acquire(blocking=False):
            return
        try:
            if not self._tried:
                self._start_or_retry()
        finally:
            self._lock.release()

    def _start_or_retry(self) -> None:
        if self.hub.running and _owner(self.hub) in (None, self):
            self._tried = True  # The program has started the Hub by itself.
            return
        try:
            self._begin()
        except PgSignalsError as error:
            if isinstance(error, StateError) and self.hub.running and _owner(self.hub) is self:
                return  # The Hub has restarted by itself after a fork.
            self._error = error
            log.error("the Hub of %r could not start: %s", self.app.name, error)
            if not isinstance(error, StateError):
                Thread("start", self._retry).start()
            if self.app.debug:
                raise
        finally:
            self._tried = True

    def _retry(self) -> None:
        backoff = Backoff()
        while self._error is not None:
            time.sleep(backoff.next())
            # A call of start or stop in the meantime has the last word.
            with self._lock:
                if self._error is None:
                    return
                try:
                    self._begin()
                # A plugin's error, too, is no reason to stay without a Hub.
                except Exception as error:
                    log.error("the Hub could not start, trying again: %s", error_text(error))
                    self._error = error
                else:
                    log.warning("the Hub has started after all")

    def start(self) -> Hub:
        """Start the Hub now. Raises what ``Hub.start`` raises."""
        notice_fork()
        with self._lock:
            self._begin()
            self._tried = True
            self._shutdown.watch()
        return self.hub

    def _begin(self) -> None:
        if (owner := _owner(self.hub)) not in (None, self):
            raise StateError(
                f"The Hub runs for the application {owner.app.name!r} already. Where a process "
                "serves several, give each its own: PgSignals(hub=pgsignals.Hub)."
            )
        app, options = self.app, self.settings()
        self.hub._around = app.app_context
        # In the application's context, models tell of which bind they are.
        with app.app_context():
            self.hub.start(**options.given)
        _owners[self.hub] = self
        self._error = None

    def settings(self) -> Options:
        """Return the options of ``app.config``. Raises ConfigurationError for what cannot be."""
        return read_settings(self.app, self._watchers, self._bind_key)

    def stop(self, timeout: float) -> bool:
        """Stop the Hub, and keep requests from starting it again."""
        notice_fork()
        with self._lock:
            self._tried = True
            self._error = None
        return self.hub.stop(timeout)

    def health(self) -> Health:
        """Return the Hub's health, or the reason why it has not started."""
        notice_fork()
        error = self._error
        if error is not None:
            # Without the message, whose host and user are not for everybody who may ask.
            reason = f"it could not start, and tries again: {type(error).__name__}"
        elif not self._tried and not self.hub.running:
            reason = "it starts with the first request"
        else:
            return self.hub.health()
        return Health(alive=True, ready=False, connected=False, reason=reason)

    def feed(self, targets: Sequence[Any]) -> RingFeed[Any]:
        """Return the feed of these targets, which all their streams share.

        Raises StateError if the Hub is not running, or the log cannot be read now.
        """
        notice_fork()
        # An earlier request may be starting the Hub at this moment: that is waited for. A start
        # that failed is not waited for: it is tried again for as long as it takes.
        starting = not self.hub.running and self._error is None
        if starting and self._lock.acquire(timeout=_START_SECONDS):
            self._lock.release()
        if self._ended:
            raise StateError("The streams have ended, since the server was told to end.")
        opening = self._feeds.open(
            targets,
            size=self.app.config.get("PGSIGNALS_SSE_SIZE", 1000),
            ordered=self.app.config.get("PGSIGNALS_WORKERS", 1) == 1,
        )
        return opening.wait()

    @property
    def streams(self) -> int:
        """The number of streams."""
        return sum(feed.clients for feed in self._feeds.values())

    def end_streams(self) -> None:
        """End all streams, for good: browsers connect again, to another process."""
        self._ended = True
        for feed in self._feeds.values():
            feed.close()

    def forked(self) -> None:
        """Begin anew in the child of a fork, whose first request starts the Hub."""
        self._lock = threading.Lock()
        self._tried = False
        self._error = None
        self._ended = False
        self._shutdown = Shutdown(self.end_streams)


def read_settings(app: Flask, watchers: Watchers, bind_key: str | None) -> Options:
    """Return the options in ``app.config``.

    Raises ConfigurationError for a setting that does not exist, and for watchers that are none.
    """
    found: dict[str, Any] = {}
    for key, value in app.config.items():
        if key.startswith(_PREFIX):
            found[_setting(key, _PREFIX, _OPTIONS | _OWN_SETTINGS)] = value
    binds = found.get("binds", {})
    if bind_key is not None:
        found = {name: value for name, value in found.items() if name not in _OF_ONE_DATABASE}
        for key, value in binds.get(bind_key, {}).items():
            found[_setting(key, "", _OPTIONS)] = value
    dsn = found.get("dsn")
    found["dsn"] = _dsn(app, bind_key) if dsn is None else str(dsn)
    found["watchers"] = _given_watchers(found.get("watchers") or watchers)
    return Options(**{name: value for name, value in found.items() if name in _OPTIONS})


def _setting(key: str, prefix: str, known: Iterable[str]) -> str:
    name = key.removeprefix(prefix).lower()
    if name not in known:
        settings = [prefix + each.upper() for each in sorted(known)]
        raise ConfigurationError(
            f"{key} is no setting{near(key, settings)} Settings are {', '.join(settings)}."
        )
    return name


def _given_watchers(given: Watchers) -> tuple[Watcher, ...]:
    if isinstance(given, str):
        try:
            given = import_string(given)
        except ImportError as error:
            raise ConfigurationError(f"PGSIGNALS_WATCHERS={given!r}: {error}") from error
    if callable(given):
        given = given()
    return normalize(given)


def _dsn(app: Flask, bind_key: str | None) -> str:
    """Return the URL of Flask-SQLAlchemy's engine, or the empty DSN, for libpq's variables."""
    sqlalchemy: Any = app.extensions.get("sqlalchemy")
    if sqlalchemy is None and bind_key is None:
        return ""
    engines: Any = {}
    if sqlalchemy is not None:
        with app.app_context():
            engines = sqlalchemy.engines
    if bind_key not in engines:
        raise ConfigurationError(
            f"SQLALCHEMY_BINDS of {app.name!r} has no {bind_key!r}"
            f"{near(str(bind_key), filter(None, engines))} PgSignals(bind_key=…) is for a database "
            "that is there."
        )
    url = engines[bind_key].url
    if url.get_backend_name() != "postgresql":
        raise ConfigurationError(
            f"Flask-SQLAlchemy's database is {url.get_backend_name()}: set PGSIGNALS_DSN to a "
            "PostgreSQL database."
        )
    return str(url.set(drivername="postgresql").render_as_string(hide_password=False))


def _processes_of(app: Flask) -> dict[str | None, Process]:
    found: dict[str | None, Process] = app.extensions.get(_PROCESSES, {})
    return found


def processes_of(app: Flask | None) -> dict[str | None, Process]:
    """Return the processes of ``app``, or of the current application, by bind key.

    Raises StateError if there are none.
    """
    if app is None:
        if not has_app_context():
            raise StateError(
                "There is no application context: give the application, or enter "
                "`with app.app_context():`."
            )
        app = current_app._get_current_object()  # type: ignore[attr-defined]
    found = _processes_of(app)
    if not found:
        raise StateError(f"The application {app.name!r} has no PgSignals: call init_app(app).")
    return found


def process_of(app: Flask | None, bind_key: str | None = None) -> Process:
    """Return the process of ``app``, or of the current application, for a bind key's database.

    Without a key, it is that of the only PgSignals, whatever its key.
    Raises StateError without an application, and for one that has no such PgSignals.
    """
    found = processes_of(app)
    if bind_key is None and len(found) == 1:
        [bind_key] = found
    if bind_key not in found:
        which = "without a bind_key" if bind_key is None else f"with bind_key={bind_key!r}"
        raise StateError(
            f"The application has no PgSignals {which}: call init_app(app). It has "
            f"{_listed(found)}."
        )
    return found[bind_key]


def _listed(keys: Iterable[str | None]) -> str:
    return ", ".join("one without" if key is None else repr(key) for key in keys)


def _in_context(hub: Hub, fn: Callable[[Gap], object]) -> Callable[[Gap], object]:
    """Return ``fn``, to call in a context of the Hub's application; the tracer sees no gaps."""

    @functools.wraps(fn)
    def call(gap: Gap) -> object:
        owner = _owner(hub)
        with owner.app.app_context() if owner is not None else contextlib.nullcontext():
            return fn(gap)

    return call


def _owner(hub: Hub) -> Process | None:
    """Return the process that a Hub runs for, if it runs for an application."""
    return _owners.get(hub) if hub.running else None


_processes: weakref.WeakSet[Process] = weakref.WeakSet()
_owners: weakref.WeakKeyDictionary[Hub, Process] = weakref.WeakKeyDictionary()


def _after_fork_in_child() -> None:
    for process in list(_processes):
        process.forked()


after_fork(_after_fork_in_child)
