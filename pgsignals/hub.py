"""The Hub wires it all: watchers, triggers, source, dispatcher, receivers."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Literal, TypeVar, get_args, overload

from blinker import Signal

from .backfills import Backfill
from .backoff import Backoff
from .batches import Batcher, BatchTimer
from .broadcasters import Broadcaster
from .connection import Engine, dsn_of
from .coroutines import CoroutineReceiver, LeftBehind
from .durable import DurableRun, consumer_of
from .errors import ConfigurationError, PgSignalsError, ReceiverError, StateError, WaitTimeout
from .events import Batch, Event, Gap, model_name
from .far import FarRun, FarSettings
from .inspection import Health, Status
from .lifetime import guard
from .metrics import COUNTERS, Meter, Metrics, Tracer
from .plugins import Backends, broadcaster_makers
from .receivers import Later, Receiver, Registry, Retrying, Subscription, receiver_name
from .runs import Audience, DatabaseRun, Install, Run, Settings, all_resolvers
from .sources.notify import Timing
from .streams import Ending, Stream
from .tables import Resolver
from .tailing import Tail
from .termination import termination
from .triggers.installer import Limits
from .urls import scheme_of
from .watchers import normalize

log = logging.getLogger("pgsignals")

GapReceiver = Callable[[Gap], object]
BatchReceiver = Callable[[Batch], object]
# What a receiver takes is checked where it is decorated, and its own type stays.
R = TypeVar("R", bound=Receiver)
B = TypeVar("B", bound=BatchReceiver)
G = TypeVar("G", bound=GapReceiver)

Delivery = Literal["notify", "outbox"]

_GAP_REASONS = ("reconnected", "overflow", "watcher_broken", "retention", "restored")


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
        self._coroutines = self._registry.coroutines
        self._gap_receivers: dict[GapReceiver, GapReceiver] = {}
        self._streams: weakref.WeakSet[Ending] = weakref.WeakSet()
        self._timer = BatchTimer(self._failed)
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._stopped.set()
        self._ends: SimpleQueue[bool | None] | None = None
        self._run: Run | None = None
        self._make: Callable[[], Run] | None = None
        self._meter = Meter()
        self._restarts_after_fork = False
        self._workers = 1
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
        dsn: str | Engine = "",
        watchers: Iterable[Any] = (),
        *,
        delivery: Delivery = "notify",
        name: str | None = None,
        partitions: int = 1,
        lease: float = 5.0,
        backends: Backends = (),
        install: Install = "auto",
        workers: int = 1,
        queue_size: int = 10_000,
        namespace: str = "default",
        prune: bool = True,
        lock_timeout: float = 0.5,
        install_timeout: float = 10.0,
        listen_dsn: str | Engine | None = None,
        heartbeat: float = 30.0,
        heartbeat_timeout: float = 10.0,
        restart_after_fork: bool = False,
        resolvers: Sequence[Resolver] = (),
        metrics: Metrics | None = None,
        tracer: Tracer | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> Hub:
        """Install triggers for the watchers and deliver their events from now on.

        Where from, and what:

        - ``dsn`` is anything libpq takes, or an SQLAlchemy Engine or AsyncEngine; what it leaves
          out comes from libpq's environment. The URL of a broker (``kafka://…``, ``nats://…``)
          reads the events that another process passes on: no database is used, and of the other
          arguments those about it mean nothing. Processes that read with one ``name`` share the
          events, which are acknowledged when receivers have returned; without, each gets all from
          now on.
        - ``watchers`` are models, tables' names, ``(model, operation)`` tuples, and what ``watch``
          gives. ``resolvers`` are asked for models before the built-in ones.
        - ``backends`` are brokers to pass events on to: URLs of installed plugins, or broadcasters.
          A mapping gives each a name, by which it finds its cursor again in outbox delivery,
          whatever becomes of the others.

        How it is delivered:

        - ``delivery`` is ``"notify"``, at most once, or ``"outbox"``, at least once. There a
          consumer with a ``name`` goes on where it has acknowledged; of several processes with one
          name, one reads, and another takes over when it ends, or has not renewed its claim for
          ``lease`` seconds. ``partitions`` share the records of a name among as many processes.
        - ``workers`` threads call the receivers, in order for each record; ``queue_size`` events
          wait for them at most before reading pauses. In outbox delivery ``workers=0`` has no
          receivers, and keeps no cursor for them: events only go on to ``backends``.
        - Receivers that are coroutine functions run on ``loop``, by default the event loop that
          runs where this is called; a worker waits for the end of each.
        - Every ``heartbeat`` seconds a notification is sent round; a connection that then stays
          silent for ``heartbeat_timeout`` seconds more is replaced, so that a loss is noticed
          within their sum. ``listen_dsn`` is a direct connection for listening when ``dsn`` goes
          through a pooler.

        What is installed:

        - ``install``: ``"auto"`` creates missing triggers, ``"check"`` raises DriftError when one
          is missing, ``"off"`` does not look. ``lock_timeout`` bounds, in seconds, how long a
          table's writers may wait behind one try to install, ``install_timeout`` how long it goes
          on trying.
        - Watchers of one ``namespace`` share triggers; applications that are not versions of each
          other take different ones, since starting removes triggers of the namespace that nobody
          listens to (``prune=False`` leaves them).

        What is told: ``metrics`` gets counters and gauges, and each call of a receiver is a span of
        ``tracer``; ``pgsignals.contrib`` has them for Prometheus and OpenTelemetry.

        The child of a fork has a Hub that is stopped, and may start it; with
        ``restart_after_fork`` it starts by itself, in the background.

        Returns once events are being received. Raises ConfigurationError, ConnectError and the
        other kinds of DatabaseError, StateError when it runs already.
        """
        if delivery not in get_args(Delivery):
            raise ConfigurationError(
                f"delivery={delivery!r}: it is one of {', '.join(map(repr, get_args(Delivery)))}."
            )
        dsn = dsn_of(dsn)
        if install not in get_args(Install):
            raise ConfigurationError(
                f"install={install!r}: it is one of {', '.join(map(repr, get_args(Install)))}."
            )
        if name is not None and (not isinstance(name, str) or not name):
            raise ConfigurationError(f"name={name!r}: give a text that is not empty, or None.")
        makers, backend_names = broadcaster_makers(backends)
        if workers == 0 and delivery == "outbox" and makers:
            if self._registry.subscriptions:
                raise ReceiverError(
                    "workers=0 only passes events on to backends, and this Hub has receivers: "
                    "start those in another Hub, or give it workers."
                )
        elif not isinstance(workers, int) or workers < 1:
            raise ConfigurationError(
                f"workers={workers!r}: give a whole number from 1 (or 0, in outbox delivery to "
                "backends alone)."
            )
        if not isinstance(queue_size, int) or queue_size < 1:
            raise ConfigurationError(f"queue_size={queue_size!r}: give a whole number from 1.")
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
                makers,
                meter,
                restart_after_fork,
            )
        consumer = consumer_of(delivery, name, partitions, lease)
        settings = Settings(
            dsn=dsn,
            listen_dsn=dsn if listen_dsn is None else dsn_of(listen_dsn) or dsn,
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
            backends=makers,
            backend_names=backend_names,
        )

        loop_given = loop

        def make() -> Run:
            self._coroutines.begin(loop_given)
            for fn in self._gap_receivers.values():
                self._registry.check_loop(f"gap receiver {receiver_name(fn)}", fn)
            self._observe(meter, tracer)
            if consumer is not None:
                return DurableRun(settings, self._audience, meter, consumer)
            return DatabaseRun(settings, self._audience, meter)

        self._begin(make)
        self._restarts_after_fork = restart_after_fork
        self._workers = workers
        log.debug("started with %d watchers", len(plan))
        return self

    def _start_far(
        self,
        settings: FarSettings,
        backends: Sequence[Callable[[], Broadcaster]],
        meter: Meter,
        restart_after_fork: bool,
    ) -> Hub:
        if backends:
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
        In the thread of the event loop it does not wait for receivers that are coroutine
        functions, since they could not go on meanwhile: ``await astop()`` does.
        Returns whether everything that had arrived was handled.
        """
        if self._coroutines.in_the_way():
            self._coroutines.leave()
        if not self._lock.acquire(timeout=timeout):
            log.warning("not stopped within %.1f s: it is being started", timeout)
            return False
        run, self._run = self._run, None
        self._make = None
        self._lock.release()
        if run is None:
            return True
        drained = run.stop(timeout)
        if dropped := self._coroutines.dropped:
            drained = False
            log.warning(
                "%d calls of coroutine receivers were not waited for, since stop() was called in "
                "the thread of their event loop: use `await astop()` there",
                dropped,
            )
        for stream in list(self._streams):
            stream.close()
        self._registry.unbind()
        self._stopped.set()
        if not drained:
            busy = "receivers" if self._workers else "backends"
            log.warning("stopped after %.1f s with %s still at work", timeout, busy)
        log.debug("stopped")
        if (ends := self._ends) is not None:
            ends.put(drained)
        return drained

    async def astop(self, timeout: float = 10.0) -> bool:
        """Like :meth:`stop`, while the event loop goes on, so that coroutine receivers finish."""
        return await asyncio.to_thread(self.stop, timeout)

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

    def on(
        self,
        target: Any,
        *ops: str,
        retries: int = 4,
        backoff: float = 0.5,
        later: Later = "wait",
        **filters: Any,
    ) -> Callable[[R], R]:
        """Decorate a function to be called with each event of a model or label.

        Without operations it gets all that are delivered. ``filters`` narrow it to records whose
        key or extra columns have these values (``id=`` is the key, whatever its name).
        When it raises in outbox delivery, or with a ``name`` at a broker, it is called again up to
        ``retries`` times, first after ``backoff`` seconds, then after twice as long each time, and
        at last the event is kept as a dead letter, or logged; until then ``later`` events of the
        same record ``"wait"``, or ``"follow"``.
        Raises ReceiverError, here or at start, when no watcher delivers that.
        """

        retrying = Retrying(retries, backoff, later)

        def register(fn: R) -> R:
            self._registry.subscribe(fn, target, ops, filters, retrying=retrying)
            return fn

        return register

    def subscribe(
        self,
        fn: Receiver,
        target: Any,
        *ops: str,
        retries: int = 4,
        backoff: float = 0.5,
        later: Later = "wait",
        **filters: Any,
    ) -> Subscription:
        """Like :meth:`on`, for later: returns a handle whose ``cancel()`` ends it."""
        retrying = Retrying(retries, backoff, later)
        return self._registry.subscribe(fn, target, ops, filters, retrying=retrying)

    def on_batch(
        self,
        target: Any,
        *ops: str,
        every: float = 0.5,
        max_size: int = 10_000,
        retries: int = 4,
        backoff: float = 0.5,
        **filters: Any,
    ) -> Callable[[B], B]:
        """Decorate a function to be called with a Batch: the latest event of each record.

        The first change starts a period of ``every`` seconds, at whose end the function is called;
        it is called earlier when ``max_size`` records have changed. For ``retries`` and ``backoff``
        see :meth:`on`: a Batch is given again as a whole.
        """
        if every < 0 or max_size < 1:
            raise ConfigurationError(
                f"every={every!r}, max_size={max_size!r}: a period is not negative, and a batch "
                "holds at least one event."
            )

        retrying = Retrying(retries, backoff)

        def register(fn: B) -> B:
            receiver = self._registry.callable_by_threads(fn)
            batcher = Batcher(receiver, every, max_size, self._timer, retrying)
            self._registry.subscribe(batcher, target, ops, filters, collects=True)
            return fn

        return register

    def on_gap(self, fn: G) -> G:
        """Decorate a function to be called with each Gap, before any later event."""
        receiver = self._registry.callable_by_threads(fn)
        if self.running:
            self._registry.check_loop(f"gap receiver {receiver_name(fn)}", receiver)
        self._gap_receivers[fn] = receiver
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
            self._gap_receivers[put] = put
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

    def backfill(
        self, target: Any, *, where: str | None = None, chunk: int = 1000, name: str | None = None
    ) -> Backfill:
        """Have the rows that a watched table has now delivered too, as ``snapshot`` events.

        In outbox delivery, for a consumer with a name. ``target`` is a model or label. ``where`` is
        an SQL condition over a row's columns; it is run as it is written. Rows come in the order
        of the primary key, ``chunk`` at a time at most, between the other events, so that what
        comes last of a record is its newest state. The consumer's active process does it, and who
        takes over goes on with it. ``name`` is the consumer, by default the Hub's own; that of a
        broker, such as ``"mailer/kafka"``, passes the rows on to the broker alone.

        Returns a handle at once. Raises StateError when the Hub is not running,
        ConfigurationError when it cannot be, TableError without a primary key, PrivilegeError when
        the role may not read the table.
        """
        run = self._run
        if run is None:
            raise StateError("The Hub is not running: there is nobody to deliver. Call start().")
        if not isinstance(run, DurableRun):
            raise ConfigurationError(
                'backfill() is of outbox delivery: start(delivery="outbox", name=…).'
            )
        return run.backfill(target, where, chunk, name)

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

    async def __aenter__(self) -> Hub:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.astop()

    def __repr__(self) -> str:
        return f"<Hub {'running' if self.running else 'stopped'}>"

    def _begin(self, make: Callable[[], Run]) -> None:
        # Before the lock is taken, which a fork during the start would leave locked in the child.
        guard(self)
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

    def _tail(self) -> Tail | None:
        """What reads the outbox for browsers; None in another delivery. Raises DatabaseError."""
        run = self._run
        return run.tail() if isinstance(run, DurableRun) else None

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
        if isinstance(error, LeftBehind):
            return  # stop() tells how many.
        if isinstance(receiver, CoroutineReceiver):
            receiver = receiver.fn
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

    def _send_gap(self, gap: Gap) -> bool:
        """Tell all who want to know; whether none of them was left behind by a stop."""
        told = True
        self._meter.count("gaps", reason=gap.reason)
        log.warning(
            "events from %s to %s may be missing: %s",
            gap.since,
            gap.until,
            gap.reason,
            extra={"gap_reason": gap.reason},
        )
        for fn in list(self._gap_receivers.values()):
            try:
                fn(gap)
            except LeftBehind:
                told = False
            except BaseException:
                name = receiver_name(fn)
                log.exception(
                    "the gap receiver %s raised",
                    name,
                    extra={"receiver": name, "gap_reason": gap.reason},
                )
        self._send(self.gap, gap=gap)
        return told
