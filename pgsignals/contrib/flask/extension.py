"""The extension: settings, and when a process of a Flask application starts its Hub."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from flask import Flask, current_app, has_app_context
from werkzeug.utils import import_string

import pgsignals

from ...connection import Backoff
from ...errors import ConfigurationError, PgSignalsError, StateError, near
from ...events import Batch, Event, Gap
from ...hub import Hub
from ...inspection import Health
from ...metrics import Tracer, span
from ...receivers import Subscription
from ...watchers import Watcher, normalize
from ..exact import ExactFeed, open_feed
from ..sse import Feed, feed_key
from .ending import Ending

log = logging.getLogger("pgsignals")

Watchers = Iterable[Any] | Callable[[], Iterable[Any]] | str

R = TypeVar("R", bound=Callable[[Event], object])
B = TypeVar("B", bound=Callable[[Batch], object])
G = TypeVar("G", bound=Callable[[Gap], object])

_PREFIX = "PGSIGNALS_"
_START_SECONDS = 10.0
_START_OPTIONS = frozenset(inspect.signature(Hub.start).parameters) - {"self", "dsn", "watchers"}
# Settings of the extension itself; the others are passed to Hub.start.
_OWN_SETTINGS = frozenset({"dsn", "watchers", "autostart", "sse_size", "sse_clients"})


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
        What to watch, in place of ``watchers``: a list, a function that gives one, or where either
        is, as ``"shop.signals:WATCHERS"``. It is read when the Hub starts.
    ``PGSIGNALS_AUTOSTART``
        Whether the first request starts the Hub; by default unless ``TESTING``.
    ``PGSIGNALS_INSTALL``, ``PGSIGNALS_WORKERS``, ``PGSIGNALS_QUEUE_SIZE``, …
        Every option of :meth:`pgsignals.Hub.start`, by its name in capitals. The others of this
        version are ``PGSIGNALS_DELIVERY``, ``PGSIGNALS_NAME``, ``PGSIGNALS_PARTITIONS``,
        ``PGSIGNALS_LEASE``, ``PGSIGNALS_BACKENDS``, ``PGSIGNALS_LOOP``,
        ``PGSIGNALS_NAMESPACE``, ``PGSIGNALS_PRUNE``,
        ``PGSIGNALS_LOCK_TIMEOUT``, ``PGSIGNALS_INSTALL_TIMEOUT``, ``PGSIGNALS_LISTEN_DSN``,
        ``PGSIGNALS_HEARTBEAT``, ``PGSIGNALS_HEARTBEAT_TIMEOUT``, ``PGSIGNALS_RESTART_AFTER_FORK``,
        ``PGSIGNALS_RESOLVERS``, ``PGSIGNALS_METRICS`` and ``PGSIGNALS_TRACER``.
    ``PGSIGNALS_SSE_SIZE``
        How many events each feed of :func:`sse` keeps: 1000.
    ``PGSIGNALS_SSE_CLIENTS``
        How many streams this process has at most; further ones are told to come back. By default
        there is no limit.

    ``hub`` is what runs, by default ``pgsignals.default_hub``, so that receivers registered with
    ``@pgsignals.on`` are called too. A Hub runs for one application at a time; where a process
    serves several, ``hub=pgsignals.Hub`` (the class) gives each its own.
    """

    def __init__(
        self,
        app: Flask | None = None,
        *,
        watchers: Watchers = (),
        hub: Hub | Callable[[], Hub] | None = None,
    ) -> None:
        self._watchers = watchers
        self._single = hub if isinstance(hub, Hub) else None
        self._make_hub = hub if callable(hub) else None
        if self._single is None and self._make_hub is None:
            if hub is not None:
                raise ConfigurationError(f"hub={hub!r}: give a Hub, or what makes one.")
            self._single = pgsignals.default_hub
        self._declared: list[Callable[[Hub], object]] = []
        self._hubs: weakref.WeakSet[Hub] = weakref.WeakSet()
        if self._single is not None:
            self._hubs.add(self._single)
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Serve ``app``. Raises ConfigurationError when it has such an extension already."""
        if "pgsignals" in app.extensions:
            raise ConfigurationError(
                f"The application {app.name!r} has a PgSignals already: call init_app once."
            )
        if self._single is not None:
            hub = self._single
        else:
            assert self._make_hub is not None
            hub = self._make_hub()
            for declare in self._declared:
                declare(hub)
            self._hubs.add(hub)
        process = Process(app, hub, self._watchers)
        app.extensions["pgsignals"] = self
        app.extensions["pgsignals.process"] = process
        app.before_request(process.serve)

    @property
    def hub(self) -> Hub:
        """The Hub: the current application's, where each has its own.

        Raises StateError when that needs an application context and there is none.
        """
        if self._single is not None:
            return self._single
        return process_of(None).hub

    def start(self, app: Flask | None = None) -> Hub:
        """Start the Hub of ``app``, or of the current application, before the first request.

        For a hook that runs in each process that serves, such as gunicorn's ``post_worker_init``.
        In the main thread it also has the streams of :func:`sse` end at SIGTERM, for which a
        server would wait otherwise. Raises what :meth:`pgsignals.Hub.start` raises.
        """
        return process_of(app).start()

    def stop(self, app: Flask | None = None, timeout: float = 10.0) -> bool:
        """Stop it; requests do not start it again. See :meth:`pgsignals.Hub.stop`."""
        return process_of(app).stop(timeout)

    def health(self, app: Flask | None = None) -> Health:
        """How the Hub is, as :meth:`pgsignals.Hub.health` tells.

        One that is yet to start, or could not and tries again, is alive and not ready.
        """
        return process_of(app).health()

    def on(self, target: Any, *ops: str, **filters: Any) -> Callable[[R], R]:
        """See :meth:`pgsignals.Hub.on`."""

        def register(fn: R) -> R:
            self._declare(lambda hub: hub.on(target, *ops, **filters)(fn))
            return fn

        return register

    def on_batch(
        self, target: Any, *ops: str, every: float = 0.5, max_size: int = 10_000, **filters: Any
    ) -> Callable[[B], B]:
        """See :meth:`pgsignals.Hub.on_batch`."""

        def register(fn: B) -> B:
            self._declare(
                lambda hub: hub.on_batch(target, *ops, every=every, max_size=max_size, **filters)(
                    fn
                )
            )
            return fn

        return register

    def on_gap(self, fn: G) -> G:
        """See :meth:`pgsignals.Hub.on_gap`."""
        self._declare(lambda hub: hub.on_gap(_in_context(hub, fn)))
        return fn

    def subscribe(
        self, fn: Callable[[Event], object], target: Any, *ops: str, **filters: Any
    ) -> Subscription:
        """See :meth:`pgsignals.Hub.subscribe`; with the Hub of the current application."""
        return self.hub.subscribe(fn, target, *ops, **filters)

    def _declare(self, declare: Callable[[Hub], object]) -> None:
        """Have a receiver on the Hubs that there are, and on those that are made later."""
        for hub in list(self._hubs):
            declare(hub)
        self._declared.append(declare)


class Process:
    """An application's Hub in this process: when it starts, and what streams it feeds."""

    def __init__(self, app: Flask, hub: Hub, watchers: Watchers) -> None:
        self._app = weakref.ref(app)
        self._watchers = watchers
        self.hub = hub
        self._tried = False
        self._error: PgSignalsError | None = None
        self._lock = threading.Lock()
        self._feeds: dict[Any, Feed | ExactFeed] = {}
        self._ended = False
        self._ending = Ending(self.end_streams)
        _processes.add(self)

    @property
    def app(self) -> Flask:
        """The application."""
        app = self._app()
        assert app is not None, "an application's requests have it"
        return app

    def serve(self) -> None:
        """Called before each request: start with the first."""
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
            self._tried = True  # The program has started it by itself.
            return
        try:
            self._begin()
        except PgSignalsError as error:
            if isinstance(error, StateError) and self.hub.running and _owner(self.hub) is self:
                return  # It has restarted by itself after a fork.
            self._error = error
            log.error("the Hub of %r could not start: %s", self.app.name, error)
            if not isinstance(error, StateError):
                threading.Thread(target=self._retry, name="pgsignals-start", daemon=True).start()
            if self.app.debug:
                raise
        finally:
            self._tried = True

    def _retry(self) -> None:
        backoff = Backoff()
        while self._error is not None:
            time.sleep(backoff.next())
            # Whoever stops or starts it in the meantime has the last word.
            with self._lock:
                if self._error is None:
                    return
                try:
                    self._begin()
                except PgSignalsError as error:
                    log.error("the Hub could not start, trying again: %s", error)
                    self._error = error
                else:
                    log.warning("the Hub has started after all")

    def start(self) -> Hub:
        """Start now. Raises what ``Hub.start`` raises."""
        with self._lock:
            self._begin()
            self._tried = True
            self._ending.watch()
        return self.hub

    def _begin(self) -> None:
        if (owner := _owner(self.hub)) not in (None, self):
            raise StateError(
                f"The Hub runs for the application {owner.app.name!r} already. Where a process "
                "serves several, give each its own: PgSignals(hub=pgsignals.Hub)."
            )
        app, settings = self.app, self.settings()
        tracer = settings.options.pop("tracer", None)
        self.hub.start(
            settings.dsn, settings.watchers, **settings.options, tracer=_InContext(app, tracer)
        )
        _owners[self.hub] = self
        self._error = None

    def settings(self) -> Settings:
        """What ``app.config`` says now. Raises ConfigurationError for what cannot be."""
        return read_settings(self.app, self._watchers)

    def stop(self, timeout: float) -> bool:
        """Stop, and stay stopped."""
        with self._lock:
            self._tried = True
            self._error = None
        return self.hub.stop(timeout)

    def health(self) -> Health:
        """See PgSignals."""
        error = self._error
        if error is not None:
            # The message names host and user, which is nothing for whoever may ask.
            reason = f"it could not start, and tries again: {type(error).__name__}"
        elif not self._tried and not self.hub.running:
            reason = "it starts with the first request"
        else:
            return self.hub.health()
        return Health(alive=True, ready=False, connected=False, reason=reason)

    def feed(self, targets: Sequence[Any]) -> Feed | ExactFeed:
        """The feed of these targets, which all their streams share.

        Raises StateError when the Hub is not running.
        """
        key = feed_key(targets)
        # Another request, which came first, may be starting it at this moment.
        if not self.hub.running and self._lock.acquire(timeout=_START_SECONDS):
            self._lock.release()
        with _feeds_lock:
            feed = self._feeds.get(key)
            if feed is None or feed.closed:
                if not self.hub.running or self._ended:
                    raise StateError("The Hub is not running: there is nothing to stream.")
                feed = open_feed(
                    self.hub,
                    *targets,
                    size=self.app.config.get("PGSIGNALS_SSE_SIZE", 1000),
                    ordered=self.app.config.get("PGSIGNALS_WORKERS", 1) == 1,
                )
                self._feeds[key] = feed
        return feed

    @property
    def streams(self) -> int:
        """How many streams there are."""
        return sum(feed.clients for feed in list(self._feeds.values()))

    def end_streams(self) -> None:
        """End all streams, for good: browsers connect again, to another process."""
        self._ended = True
        for feed in list(self._feeds.values()):
            feed.close()

    def forked(self) -> None:
        """In the child of a fork: its first request starts the Hub anew."""
        self._lock = threading.Lock()
        self._tried = False
        self._error = None
        self._feeds = {}
        self._ended = False
        self._ending = Ending(self.end_streams)


class Settings:
    """What ``app.config`` says, checked."""

    def __init__(self, dsn: str, watchers: tuple[Watcher, ...], options: dict[str, Any]) -> None:
        self.dsn = dsn
        self.watchers = watchers
        self.options = options

    @property
    def namespace(self) -> str:
        """Whose triggers."""
        return str(self.options.get("namespace", "default"))

    @property
    def delivery(self) -> str:
        """How events come."""
        return str(self.options.get("delivery", "notify"))


def read_settings(app: Flask, watchers: Watchers) -> Settings:
    """Read ``app.config``.

    Raises ConfigurationError for a setting that does not exist, and for watchers that are none.
    """
    options: dict[str, Any] = {}
    known = _START_OPTIONS | _OWN_SETTINGS
    for key, value in app.config.items():
        if not key.startswith(_PREFIX):
            continue
        name = key.removeprefix(_PREFIX).lower()
        if name not in known:
            settings = [_PREFIX + each.upper() for each in sorted(known)]
            raise ConfigurationError(
                f"{key} is no setting{near(key, settings)} Settings are {', '.join(settings)}."
            )
        if name in _START_OPTIONS:
            options[name] = value
    return Settings(
        _dsn(app), _given_watchers(app.config.get("PGSIGNALS_WATCHERS") or watchers), options
    )


def _given_watchers(given: Watchers) -> tuple[Watcher, ...]:
    if isinstance(given, str):
        try:
            given = import_string(given)
        except ImportError as error:
            raise ConfigurationError(f"PGSIGNALS_WATCHERS={given!r}: {error}") from error
    if callable(given):
        given = given()
    return normalize(given)


def _dsn(app: Flask) -> str:
    """The setting, or else the engine of Flask-SQLAlchemy, or else libpq's variables."""
    if (dsn := app.config.get("PGSIGNALS_DSN")) is not None:
        return str(dsn)
    sqlalchemy: Any = app.extensions.get("sqlalchemy")
    if sqlalchemy is None:
        return ""
    with app.app_context():
        url = sqlalchemy.engine.url
    if url.get_backend_name() != "postgresql":
        raise ConfigurationError(
            f"Flask-SQLAlchemy's database is {url.get_backend_name()}: set PGSIGNALS_DSN to a "
            "PostgreSQL database."
        )
    return str(url.set(drivername="postgresql").render_as_string(hide_password=False))


def process_of(app: Flask | None) -> Process:
    """The state of ``app`` or of the current application.

    Raises StateError when there is none, or it has no PgSignals.
    """
    if app is None:
        if not has_app_context():
            raise StateError(
                "There is no application context: give the application, or enter "
                "`with app.app_context():`."
            )
        app = current_app._get_current_object()  # type: ignore[attr-defined]
    found: Process | None = app.extensions.get("pgsignals.process")
    if found is None:
        raise StateError(f"The application {app.name!r} has no PgSignals: call init_app(app).")
    return found


def _in_context(hub: Hub, fn: Callable[[Gap], object]) -> Callable[[Gap], object]:
    """``fn`` in a context of the application that the Hub runs for; the tracer sees no gaps."""

    @functools.wraps(fn)
    def call(gap: Gap) -> object:
        owner = _owner(hub)
        with owner.app.app_context() if owner is not None else contextlib.nullcontext():
            return fn(gap)

    return call


def _owner(hub: Hub) -> Process | None:
    """For whom a Hub runs, if it does for an application."""
    return _owners.get(hub) if hub.running else None


class _InContext:
    """A tracer that has each receiver called in an application context of its own."""

    def __init__(self, app: Flask, tracer: Tracer | None) -> None:
        self._app = app
        self._tracer = tracer

    @contextmanager
    def receiving(self, events: Sequence[Event], receiver: str, /) -> Iterator[None]:
        """See Tracer."""
        # A tracer that fails must not cost the receiver its context.
        with self._app.app_context(), span(self._tracer, events, receiver):
            yield


_processes: weakref.WeakSet[Process] = weakref.WeakSet()
_owners: weakref.WeakKeyDictionary[Hub, Process] = weakref.WeakKeyDictionary()
_feeds_lock = threading.Lock()


def _after_fork_in_child() -> None:
    global _feeds_lock
    _feeds_lock = threading.Lock()
    for process in list(_processes):
        process.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
