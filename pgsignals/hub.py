"""The Hub wires it all: watchers, triggers, source, dispatcher, receivers."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Literal, TypeVar, get_args, overload

from blinker import Signal

from .backoff import Backoff
from .batches import Batcher, BatchReceiver, BatchTimer
from .broadcasters import Broadcaster
from .connection import redact
from .errors import ConfigurationError, PgSignalsError, StateError, WaitTimeout
from .events import Event, Gap, model_name
from .far import FarRun, FarSettings
from .inspection import Health, Status
from .metrics import COUNTERS, Meter, Metrics, Tracer
from .plugins import load_plugins
from .receivers import Receiver, Registry, Subscription, receiver_name
from .runs import Audience, DatabaseRun, Install, Run, Settings, all_resolvers
from .sources.notify import Timing
from .streams import Stream
from .tables import Resolver
from .termination import termination
from .triggers.installer import Limits
from .urls import scheme_of
from .watchers import normalize

log = logging.getLogger("pgsignals")

R = TypeVar("R", bound=Callable[..., object])
GapReceiver = Callable[[Gap], object]

_EXIT_SECONDS = 5.0
_GAP_REASONS = ("reconnected", "overflow", "watcher_broken")


class Hub:
    """One database's events and their receivers. A context manager that stops at its end.

    ``connected``, ``disconnected`` (``error=``), ``gap`` (``gap=``) and ``receiver_failed``
    (``receiver=``, ``event=``, ``error=``) are blinker signals whose sender is the Hub.
    """

    def __init__(self) -> None:
        self.connected = Signal("connected")
        self.disconnected = Signal("disconnected")
        self.gap = Signal("gap")
        self.receiver_failed = Signal("receiver_failed")
        self._registry = Registry()
        self._gap_receivers: dict[GapReceiver, None] = {}
        self._streams: weakref.WeakSet[Stream[Any]] = weakref.WeakSet()
        self._timer = BatchTimer(self._failed)
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._stopped.set()
        self._ends: SimpleQueue[bool | None] | None = None
        self._run: Run | None = None
        self._make: Callable[[], Run] | None = None
        self._meter = Meter()
        self._restarts_after_fork = False
        self._audience = Audience(
            registry=self._registry,
            timer=self._timer,
            failed=self._failed,
            gap=self._send_gap,
            connected=lambda: self._send(self.connected),
            disconnected=lambda error: self._send(self.disconnected, error=error),
        )

    @property
    def running(self) -> bool:
        """Whether it has been started and not stopped."""
        return self._run is not None

    def start(
        self,
        dsn: str = "",
        watchers: Iterable[Any] = (),
        *,
        delivery: Literal["notify"] = "notify",
        name: str | None = None,
        backends: Iterable[str | Broadcaster] = (),
        install: Install = "auto",
        workers: int = 1,
        queue_size: int = 10_000,
        namespace: str = "default",
        prune: bool = True,
        lock_timeout: float = 0.5,
        install_timeout: float = 10.0,
        listen_dsn: str | None = None,
        heartbeat: float = 30.0,
        heartbeat_timeout: float = 10.0,
        restart_after_fork: bool = False,
        resolvers: Sequence[Resolver] = (),
        metrics: Metrics | None = None,
        tracer: Tracer | None = None,
    ) -> Hub:
        """Install triggers for the watchers and deliver their events from now on.

        ``dsn`` is anything libpq takes; what it leaves out comes from libpq's environment. The URL
        of a broker (``kafka://…``, ``nats://…``) reads the events that another process passes on:
        no database is used, and of the other arguments those about it mean nothing. Processes that
        read with one ``name`` share the events, which are acknowledged when receivers have
        returned; without, each gets all from now on. ``backends`` are brokers to pass events on
        to: URLs of installed plugins, or broadcasters.
        ``install``: ``"auto"`` creates missing triggers, ``"check"`` raises DriftError when one is
        missing, ``"off"`` does not look. ``workers`` threads call the receivers, in order for each
        record; ``queue_size`` events wait for them at most before reading pauses. Watchers of
        one ``namespace`` share triggers; applications that are not versions of each other take
        different ones, since starting removes triggers of the namespace that nobody listens to
        (``prune=False`` leaves them). ``lock_timeout`` bounds, in seconds, how long a table's
        writers may wait behind one try to install, ``install_timeout`` how long it goes on trying.
        ``listen_dsn`` is a direct connection for listening when ``dsn`` goes through a pooler.
        Every ``heartbeat`` seconds a notification is sent round; a connection that then stays
        silent for ``heartbeat_timeout`` seconds more is replaced, so that a loss is noticed within
        their sum. ``resolvers`` are asked for models before the built-in ones. ``metrics`` gets
        counters and gauges, and each call of a receiver is a span of ``tracer``:
        ``pgsignals.contrib`` has them for Prometheus and OpenTelemetry.

        The child of a fork has a Hub that is stopped, and may start it; with
        ``restart_after_fork`` it starts by itself, in the background.

        Returns once events are being received. Raises ConfigurationError, ConnectError and the
        other kinds of DatabaseError, StateError when it runs already.
        """
        if delivery != "notify":
            raise ConfigurationError(
                f"delivery={delivery!r} is not a delivery of this version; there is 'notify'."
            )
        if not isinstance(dsn, str):
            raise ConfigurationError(
                f"dsn={redact(repr(dsn))}: give a connection string, or '' for libpq's defaults."
            )
        if install not in get_args(Install):
            raise ConfigurationError(
                f"install={install!r}: it is one of {', '.join(map(repr, get_args(Install)))}."
            )
        if name is not None and (not isinstance(name, str) or not name):
            raise ConfigurationError(f"name={name!r}: give a text that is not empty, or None.")
        for option, number in (("workers", workers), ("queue_size", queue_size)):
            if not isinstance(number, int) or number < 1:
                raise ConfigurationError(f"{option}={number!r}: give a whole number from 1.")
        if not isinstance(namespace, str) or not namespace:
            raise ConfigurationError(f"namespace={namespace!r}: give a text that is not empty.")
        plan = normalize(watchers)
        if not plan:
            raise ConfigurationError("There is nothing to watch: give at least one watcher.")
        meter = Meter(metrics)
        scheme = scheme_of(dsn)
        if scheme is not None and not scheme.startswith("postgres"):
            return self._start_far(
                FarSettings(dsn, plan, resolvers, name, workers, queue_size, tracer),
                backends,
                meter,
                restart_after_fork,
            )
        if name is not None:
            raise ConfigurationError(
                f"name={name!r}: in 'notify' delivery from a database nothing is kept by name. It "
                "is for a broker's URL in place of the DSN; leave it out."
            )
        settings = Settings(
            dsn=dsn,
            listen_dsn=listen_dsn or dsn,
            watchers=plan,
            resolvers=all_resolvers(resolvers),
            namespace=namespace,
            install=install,
            prune=prune,
            limits=Limits(lock_timeout, install_timeout),
            timing=Timing(heartbeat, heartbeat_timeout, 60.0 + install_timeout),
            workers=workers,
            queue_size=queue_size,
            tracer=tracer,
            backends=_makers(backends),
        )

        def make() -> Run:
            self._observe(meter, tracer)
            return DatabaseRun(settings, self._audience, meter)

        self._begin(make)
        self._restarts_after_fork = restart_after_fork
        log.debug("started with %d watchers", len(plan))
        return self

    def _start_far(
        self,
        settings: FarSettings,
        backends: Iterable[str | Broadcaster],
        meter: Meter,
        restart_after_fork: bool,
    ) -> Hub:
        if tuple(backends):
            raise ConfigurationError(
                "backends= with the URL of a broker: only what comes from a database is passed on."
            )

        def make() -> Run:
            self._observe(meter, settings.tracer)
            return FarRun(settings, self._audience, meter)

        self._begin(make)
        self._restarts_after_fork = restart_after_fork
        return self

    def stop(self, timeout: float = 10.0) -> bool:
        """Stop receiving, and let receivers handle what has arrived for at most ``timeout`` s.

        Safe to call twice, before start, and from a receiver, which then is the last one called.
        Returns whether everything that had arrived was handled.
        """
        if not self._lock.acquire(timeout=timeout):
            log.warning("not stopped within %.1f s: it is being started", timeout)
            return False
        run, self._run = self._run, None
        self._make = None
        self._lock.release()
        if run is None:
            return True
        drained = run.stop(timeout)
        for stream in list(self._streams):
            stream.close()
        self._registry.unbind()
        self._stopped.set()
        if not drained:
            log.warning("stopped after %.1f s with receivers still at work", timeout)
        log.debug("stopped")
        if (ends := self._ends) is not None:
            ends.put(drained)
        return drained

    def wait(self, timeout: float | None = None) -> bool:
        """Block until the Hub is stopped (True), or for ``timeout`` seconds (False)."""
        return self._stopped.wait(timeout)

    def run(self, timeout: float = 10.0) -> bool:
        """Block until the Hub is stopped, or stop it at SIGTERM or SIGINT (Ctrl-C).

        Receivers then handle what has arrived, for at most ``timeout`` seconds; a second signal
        ends that at once. Afterwards the signals have their previous handlers again.
        Returns whether everything that had arrived was handled. Raises StateError outside the main
        thread, the only one that may handle signals.
        """
        if threading.current_thread() is not threading.main_thread():
            raise StateError(
                "run() handles signals, which Python allows in the main thread only. Elsewhere "
                "call wait(), and stop() when the program ends."
            )
        # What a signal handler puts may interrupt get(); setting an Event could block for ever.
        ends: SimpleQueue[bool | None] = SimpleQueue()
        self._ends = ends
        try:
            with termination(lambda: ends.put(None)):
                if self._stopped.is_set():
                    return True
                drained = ends.get()
                if drained is None:
                    threading.Thread(
                        target=self.stop, args=(timeout,), name="pgsignals-stop", daemon=True
                    ).start()
                    drained = ends.get()
                return bool(drained)
        finally:
            self._ends = None

    def on(self, target: Any, *ops: str, **filters: Any) -> Callable[[R], R]:
        """Decorate a function to be called with each event of a model or label.

        Without operations it gets all that are delivered. ``filters`` narrow it to records whose
        key or extra columns have these values (``id=`` is the key, whatever its name).
        Raises ReceiverError, here or at start, when no watcher delivers that.
        """

        def register(fn: R) -> R:
            self._registry.subscribe(fn, target, ops, filters)
            return fn

        return register

    def subscribe(self, fn: Receiver, target: Any, *ops: str, **filters: Any) -> Subscription:
        """Like :meth:`on`, for later: returns a handle whose ``cancel()`` ends it."""
        return self._registry.subscribe(fn, target, ops, filters)

    def on_batch(
        self, target: Any, *ops: str, every: float = 0.5, max_size: int = 10_000, **filters: Any
    ) -> Callable[[Callable[[Any], object]], Callable[[Any], object]]:
        """Decorate a function to be called with a Batch: the latest event of each record.

        The first change starts a period of ``every`` seconds, at whose end the function is called;
        it is called earlier when ``max_size`` records have changed.
        """
        if every < 0 or max_size < 1:
            raise ConfigurationError(
                f"every={every!r}, max_size={max_size!r}: a period is not negative, and a batch "
                "holds at least one event."
            )

        def register(fn: BatchReceiver) -> BatchReceiver:
            batcher = Batcher(fn, every, max_size, self._timer)
            self._registry.subscribe(batcher, target, ops, filters, collects=True)
            return fn

        return register

    def on_gap(self, fn: GapReceiver) -> GapReceiver:
        """Decorate a function to be called with each Gap, before any later event."""
        self._gap_receivers[fn] = None
        return fn

    def signal(self, target: Any, op: str) -> Signal:
        """The blinker signal of a model or label and an operation.

        Its receivers are called as ``receiver(model, event=event)``.
        """
        return self._registry.signal(target, op)

    @overload
    def stream(
        self, target: Any, *ops: str, maxsize: int = ..., gaps: Literal[False] = ..., **filters: Any
    ) -> Stream[Event]: ...

    @overload
    def stream(
        self, target: Any, *ops: str, maxsize: int = ..., gaps: Literal[True], **filters: Any
    ) -> Stream[Event | Gap]: ...

    def stream(
        self, target: Any, *ops: str, maxsize: int = 1000, gaps: bool = False, **filters: Any
    ) -> Stream[Any]:
        """Events to iterate over with ``for`` or ``async for``; a context manager.

        It hears what happens from this call on. ``gaps=True`` also yields Gap objects.
        """
        found: Stream[Any] = Stream(maxsize, gaps)
        reference = weakref.ref(found)

        # Weak, so that a stream which its user forgets to close goes, and its subscription too.
        def put(item: Event | Gap) -> None:
            if (stream := reference()) is not None:
                stream.put(item)

        def end() -> None:
            subscription.cancel()
            self._gap_receivers.pop(put, None)

        subscription = self._registry.subscribe(
            put, target, ops, filters, f"stream of {model_name(target)}", collects=True
        )
        if gaps:
            self._gap_receivers[put] = None
        weakref.finalize(found, end)
        found._on_close = end
        self._streams.add(found)
        return found

    def wait_for(
        self, target: Any, *ops: str, timeout: float | None = 5.0, **filters: Any
    ) -> Event:
        """The next such event. Raises WaitTimeout when none comes within ``timeout`` seconds."""
        with self.stream(target, *ops, maxsize=1, **filters) as events:
            event: Event | None = events.get(timeout)
        if event is None:
            wanted = ", ".join(
                [model_name(target), *map(repr, ops), *(f"{k}={v!r}" for k, v in filters.items())]
            )
            until = "before the Hub was stopped" if timeout is None else f"within {timeout:g} s"
            raise WaitTimeout(f"No event ({wanted}) {until}.")
        return event

    def status(self) -> Status:
        """How the Hub and its database stand now. Raises StateError when it is not running."""
        run = self._run
        if run is None:
            raise StateError("The Hub is not running: there is no database to ask. Call start().")
        return run.status()

    def health(self) -> Health:
        """Whether the Hub is alive and ready, told at once and without asking the database.

        One that is not running is neither.
        """
        run = self._run
        if run is None:
            return Health(alive=False, ready=False, connected=False, reason="it is not running")
        return run.health()

    def __enter__(self) -> Hub:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<Hub {'running' if self.running else 'stopped'}>"

    def _begin(self, make: Callable[[], Run]) -> None:
        # Before the lock is taken, which a fork during the start would leave locked in the child.
        _hubs.add(self)
        _guard_process()
        with self._lock:
            if self._run is not None:
                raise StateError(
                    "This Hub is running already. Call stop() first, or make another: "
                    "pgsignals.Hub()."
                )
            if not self._stopped.is_set():
                raise StateError(
                    "This Hub is being stopped: its receivers handle what has arrived. Call wait() "
                    "before start()."
                )
            run = make()
            try:
                run.start()
            except BaseException:
                run.stop(0)
                self._registry.unbind()
                raise
            self._run = run
            self._make = make
            self._stopped.clear()

    def _observe(self, meter: Meter, tracer: Tracer | None) -> None:
        """Report to these from now on; counters begin at 0, so that their first rise is seen."""
        self._meter = meter
        self._timer.tracer = tracer
        for name, measure in COUNTERS.items():
            if not measure.labels:
                meter.count(name, 0)
        for reason in _GAP_REASONS:
            meter.count("gaps", 0, reason=reason)
        for name in {
            receiver_name(each)
            for each in self._registry.subscriptions
            if isinstance(each.fn, Batcher) or not each.collects
        }:
            meter.count("receiver_failures", 0, receiver=name)
        meter.gauge("connected", lambda: float(self.health().connected))
        meter.gauge("queue_depth", lambda: float(self.health().depth))
        meter.gauge("oldest_seconds", lambda: self.health().oldest)
        meter.gauge("lag_seconds", lambda: self.health().lag)

    def _settle(self, timeout: float) -> bool:
        """Wait until receivers have handled all that is committed by now; whether they have."""
        run = self._run
        if run is None:
            raise StateError("The Hub is not running: nothing can arrive. Call start().")
        settled = threading.Event()
        run.settle(settled.set)
        return settled.wait(timeout)

    def _forked(self) -> None:
        """In the child of a fork: no thread of ours lives here, and locks may be held by ghosts."""
        run, self._run = self._run, None
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._stopped.set()
        self._ends = None
        self._registry.forked()
        self._timer.forked()
        for stream in list(self._streams):
            stream.forked()
        if run is None:
            return
        run.abandon()
        if self._restarts_after_fork and self._make is not None:
            threading.Thread(
                target=self._restart, args=(self._make,), name="pgsignals-restart", daemon=True
            ).start()

    def _restart(self, make: Callable[[], Run]) -> None:
        backoff = Backoff()
        while self._make is make:
            try:
                self._begin(make)
            except StateError:
                return  # The child has called start() itself.
            except PgSignalsError as error:
                log.error("cannot start after the fork, trying again: %s", error)
                time.sleep(backoff.next())
            else:
                return

    def _failed(self, receiver: Any, event: Event, error: BaseException) -> None:
        name = receiver_name(receiver)
        self._meter.count("receiver_failures", receiver=name)
        log.error(
            "the receiver %s raised %s for event %s",
            name,
            type(error).__name__,
            event.uid,
            exc_info=error,
            extra={"receiver": name, "event_uid": event.uid, **event._message.topic.fields},
        )
        self._send(self.receiver_failed, receiver=receiver, event=event, error=error)

    def _send(self, signal: Signal, **values: Any) -> None:
        for receiver in signal.receivers_for(self):
            try:
                receiver(self, **values)
            except BaseException:
                log.exception("a receiver of %r raised", signal)

    def _send_gap(self, gap: Gap) -> None:
        self._meter.count("gaps", reason=gap.reason)
        log.warning(
            "events from %s to %s may be missing: %s",
            gap.since,
            gap.until,
            gap.reason,
            extra={"gap_reason": gap.reason},
        )
        for fn in list(self._gap_receivers):
            try:
                fn(gap)
            except BaseException:
                name = receiver_name(fn)
                log.exception(
                    "the gap receiver %s raised",
                    name,
                    extra={"receiver": name, "gap_reason": gap.reason},
                )
        self._send(self.gap, gap=gap)


def _makers(backends: Iterable[str | Broadcaster]) -> list[Callable[[], Broadcaster]]:
    """What makes the broadcasters, in the child of a fork once more."""
    if isinstance(backends, str) or not isinstance(backends, Iterable):
        raise ConfigurationError(
            f"backends={redact(repr(backends))}: give a list of URLs or broadcasters."
        )
    given = list(backends)
    plugins = load_plugins() if any(isinstance(each, str) for each in given) else None
    found: list[Callable[[], Broadcaster]] = []
    for each in given:
        if isinstance(each, str):
            assert plugins is not None
            found.append(functools.partial(plugins.broadcaster, each))
        elif all(callable(getattr(each, name, None)) for name in ("publish", "flush", "close")):
            found.append(functools.partial(lambda broadcaster: broadcaster, each))
        else:
            raise ConfigurationError(
                f"backends has {each!r:.80}: give a URL such as 'kafka://localhost:9092/?prefix="
                "shop', or an object with publish, flush, announce and close."
            )
    return found


_hubs: weakref.WeakSet[Hub] = weakref.WeakSet()


@functools.cache
def _guard_process() -> None:
    """Look after the process's end and its forks, from the first start on."""
    atexit.register(_stop_at_exit)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_after_fork_in_child)


def _stop_at_exit() -> None:
    deadline = time.monotonic() + _EXIT_SECONDS
    for hub in list(_hubs):
        hub.stop(max(0.0, deadline - time.monotonic()))


def _after_fork_in_child() -> None:
    for hub in list(_hubs):
        hub._forked()
