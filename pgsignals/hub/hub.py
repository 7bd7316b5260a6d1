"""The Hub, which starts and stops a delivery, and keeps the receivers."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, TypeVar, overload

from blinker import Signal

from ..consumers.backfills.requests import Backfill
from ..core.backoff import Backoff
from ..core.errors import ConfigurationError, StateError, WaitTimeout
from ..core.events import Batch, Event, Gap, model_name
from ..core.logging import log
from ..core.metrics import Meter, Metrics, Tracer
from ..core.process import forks_workers, guard, notice_fork
from ..core.redaction import error_text
from ..core.tables import Resolver
from ..core.termination import SignalledStop
from ..core.threads import Thread
from ..core.transport import Capture
from ..core.transport import Delivery as Delivery
from ..core.watchers import normalize
from ..dispatch.batches import Batcher
from ..dispatch.registry import (
    Around,
    Later,
    Receiver,
    Registry,
    Retrying,
    Subscription,
    check_receiver,
    check_target,
    receiver_name,
)
from ..dispatch.streams import Stream
from ..plugins.broadcaster import Broadcaster
from ..plugins.loader import Backends, broadcaster_makers
from ..postgres.dsn import Database, dsn_of
from ..sources.tail import Tail
from ..sources.wal_tail import WalTail
from .broker import BrokerDelivery
from .callbacks import Callbacks, GapReceiver
from .delivery import Lifecycle
from .durable import DurableDelivery
from .notify import NotifyDelivery
from .options import Install, Options, all_resolvers
from .status import Health, Status

# A program that ends so soon was meant to go on.
_SHORT_LIFE = 1.0

BatchReceiver = Callable[[Batch], object]
# A decorator checks the parameters of its function, and returns the function's own type.
R = TypeVar("R", bound=Receiver)
B = TypeVar("B", bound=BatchReceiver)
G = TypeVar("G", bound=GapReceiver)


class Hub:
    """One database's events and their receivers. A context manager that stops at its end.

    ``connected``, ``disconnected`` (``error=``), ``gap`` (``gap=``) and ``receiver_failed``
    (``receiver=``, ``event=``, ``error=``) are blinker signals whose sender is the Hub.
    """

    def __init__(self) -> None:
        self._callbacks = Callbacks(self)
        self.connected = self._callbacks.connected
        self.disconnected = self._callbacks.disconnected
        self.gap = self._callbacks.gap
        self.receiver_failed = self._callbacks.receiver_failed
        self._coroutines = self._callbacks.registry.coroutines
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._stopped.set()
        self._signalled_stop = SignalledStop()
        self._current: Lifecycle | None = None
        self._make: Callable[[], Lifecycle] | None = None
        # The context of each call, which a framework's integration sets before one start().
        self._around: Around | None = None
        self._options = Options()
        # When it last started, by the monotonic clock, and whether anybody has waited for the end.
        self._started_at: float | None = None
        self._kept = False

    @property
    def _delivery(self) -> Lifecycle | None:
        """The delivery of this process; None in the child of a fork, even if its parent has one."""
        notice_fork()
        return self._current

    @property
    def _registry(self) -> Registry:
        """The receivers; after a fork, with locks that no thread of the parent holds."""
        notice_fork()
        return self._callbacks.registry

    @property
    def running(self) -> bool:
        """Whether the Hub has been started and not stopped."""
        return self._delivery is not None

    def start(
        self,
        dsn: Database = "",
        watchers: Iterable[Any] = (),
        *,
        delivery: Delivery = "notify",
        name: str | None = None,
        partitions: int = 1,
        lease: float = 5.0,
        capture: Capture | None = None,
        allow_unbounded_wal: bool = False,
        backends: Backends = (),
        install: Install = "auto",
        workers: int = 1,
        queue_size: int = 10_000,
        namespace: str = "default",
        prune: bool = True,
        lock_timeout: float = 0.5,
        install_timeout: float = 10.0,
        listen_dsn: Database | None = None,
        heartbeat: float = 30.0,
        heartbeat_timeout: float = 10.0,
        restart_after_fork: bool = False,
        resolvers: Sequence[Resolver] = (),
        metrics: Metrics | None = None,
        tracer: Tracer | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> Hub:
        """Install triggers for the watchers and deliver their events from now on.

        Where events come from, and where they go:

        - ``dsn`` is anything libpq takes, the URL of another driver, or an object: an SQLAlchemy
          Engine, AsyncEngine or URL, or pydantic's PostgresDsn; parts that it leaves out come from
          libpq's environment. With the URL of a broker (``kafka://…``,
          ``nats://…``) the Hub reads the events that another process forwards: no database is used,
          and arguments about one mean nothing. Processes that read with one ``name`` share the
          events, which are acknowledged when receivers have returned; without a name, each process
          gets all events from now on.
        - ``watchers`` are models, tables' names, ``(model, operation)`` tuples, and results of
          ``watch``. ``resolvers`` are asked for models before the built-in ones.
        - ``backends`` are brokers to forward events to: URLs of installed plugins, or broadcasters.
          A mapping gives each a name, by which it finds its cursor again in durable delivery,
          whatever becomes of the others.

        How events are delivered:

        - ``delivery`` is ``"notify"``, at most once, or durable, which is at least once:
          ``"outbox"``, where triggers write to a table, or ``"wal"``, where the rows are read from
          PostgreSQL's own log. In durable delivery a consumer with a ``name`` goes on behind the
          events that it has acknowledged. Of several processes with one name one reads, and another
          takes over when that one ends, or has not renewed its claim for ``lease`` seconds.
          ``partitions`` share the records of a name among as many processes, from the outbox.
        - In WAL delivery ``capture="rows"`` refuses a watcher that takes a trigger, and
          ``"messages"`` gives a trigger to each, so that no table is published; by default there is
          one where rows lack something. A named consumer keeps the server from removing what it has
          not read: ``allow_unbounded_wal`` lets it start where the server sets no bound to that.
        - ``workers`` threads call the receivers, in order for each record; ``queue_size`` events
          wait for them at most before reading pauses. In durable delivery ``workers=0`` has no
          receivers, and keeps no cursor for them: events only go on to ``backends``.
        - Receivers that are coroutine functions run on ``loop``, by default the event loop that
          runs where this is called; a worker waits for the end of each.
        - Every ``heartbeat`` seconds the Hub notifies itself; a connection that then stays silent
          for ``heartbeat_timeout`` seconds is replaced, so that a loss is noticed within the sum of
          both. ``listen_dsn`` is a direct connection for listening if ``dsn`` goes through a
          pooler.

        What is installed:

        - ``install``: ``"auto"`` creates missing triggers, ``"check"`` raises DriftError if one is
          missing, ``"off"`` does not look. ``lock_timeout`` bounds, in seconds, how long a table's
          writers may wait behind one try to install, ``install_timeout`` how long the tries may
          take in all.
        - Watchers of one ``namespace`` share triggers. Applications that are not versions of each
          other need different namespaces, since starting removes triggers of the namespace that
          nobody listens to (``prune=False`` leaves them).

        What is measured: ``metrics`` gets counters and gauges, and each call of a receiver is a
        span of ``tracer``; ``pgsignals.contrib`` has them for Prometheus and OpenTelemetry.

        In the child of a fork the Hub is stopped, and may be started again; with
        ``restart_after_fork`` it starts by itself, in the background.

        Returns once events are being received. Raises ConfigurationError, ConnectError and the
        other kinds of DatabaseError, StateError when the Hub runs already.
        """
        around, self._around = self._around, None
        options = Options(
            dsn=dsn_of(dsn),
            watchers=normalize(watchers),
            delivery=delivery,
            name=name,
            partitions=partitions,
            lease=lease,
            capture=capture,
            allow_unbounded_wal=allow_unbounded_wal,
            backends=backends,
            install=install,
            workers=workers,
            queue_size=queue_size,
            namespace=namespace,
            prune=prune,
            lock_timeout=lock_timeout,
            install_timeout=install_timeout,
            listen_dsn=None if listen_dsn is None else dsn_of(listen_dsn),
            heartbeat=heartbeat,
            heartbeat_timeout=heartbeat_timeout,
            restart_after_fork=restart_after_fork,
            resolvers=all_resolvers(resolvers),
            metrics=metrics,
            tracer=tracer,
            loop=loop,
        )
        makers, names = broadcaster_makers(backends)
        options.check(relaying=bool(makers))
        meter = Meter(metrics)

        def make() -> Lifecycle:
            self._callbacks.begin(options, meter, around, self.health)
            return _make_delivery(options, self._callbacks, meter, makers, names)

        self._begin(make)
        self._options = options
        log.debug("started with %d watchers", len(options.watchers))
        return self

    def stop(self, timeout: float = 10.0) -> bool:
        """Stop receiving, and let receivers handle what has arrived for at most ``timeout`` s.

        Safe to call twice, before start, and from a receiver, which then is the last one called.
        In the thread of the event loop it does not wait for receivers that are coroutine
        functions, since they could not go on meanwhile: use ``await astop()`` there.
        Returns whether everything that had arrived was handled.
        """
        notice_fork()
        if self._coroutines.in_the_way():
            self._coroutines.leave()
        if not self._lock.acquire(timeout=timeout):
            log.warning("not stopped within %.1f s: it is being started", timeout)
            return False
        delivery, self._current = self._current, None
        self._make = None
        self._lock.release()
        if delivery is None:
            return True
        drained = all([delivery.stop(timeout), self._callbacks.end()])
        self._stopped.set()
        if not drained:
            busy = "receivers" if self._options.workers else "backends"
            log.warning("stopped after %.1f s with %s still at work", timeout, busy)
        log.debug("stopped")
        self._signalled_stop.tell(drained)
        return drained

    async def astop(self, timeout: float = 10.0) -> bool:
        """Like :meth:`stop`, while the event loop goes on, so that coroutine receivers finish."""
        return await asyncio.to_thread(self.stop, timeout)

    def wait(self, timeout: float | None = None) -> bool:
        """Block until the Hub is stopped (True), or for ``timeout`` seconds (False)."""
        notice_fork()
        self._kept = True
        return self._stopped.wait(timeout)

    def run(self, timeout: float = 10.0) -> bool:
        """Block until the Hub is stopped, or stop it at SIGTERM or SIGINT (Ctrl-C).

        Receivers then handle what has arrived, for at most ``timeout`` seconds; a second signal
        ends that at once. Afterwards the signals have their previous handlers again.
        Returns whether everything that had arrived was handled. Raises StateError outside the main
        thread, the only one that may handle signals, and before the first start.
        """
        notice_fork()
        if self._started_at is None and threading.current_thread() is threading.main_thread():
            raise StateError("run() waits for the end of a Hub that runs: call start() before it.")
        self._kept = True
        return self._signalled_stop.wait(self._stopped, partial(self.stop, timeout))

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

        Without operations it gets all that are delivered. ``filters`` restrict it to records whose
        key or extra columns have these values (``id=`` is the key, whatever its name).
        If the function raises in durable delivery, or with a ``name`` at a broker, it is called
        again up to ``retries`` times, first after ``backoff`` seconds, then after twice as long
        each time; at last the event is kept as a dead letter, or logged. Until then ``later``
        events of the same record ``"wait"``, or ``"follow"``.
        Raises ReceiverError, here or at start, when no watcher delivers such events.
        """
        check_target(target, "on")
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
        """Like :meth:`on`, without a decorator: return a handle whose ``cancel()`` ends it."""
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
        check_target(target, "on_batch")
        if every < 0 or max_size < 1:
            raise ConfigurationError(
                f"every={every!r}, max_size={max_size!r}: a period is not negative, and a batch "
                "holds at least one event."
            )
        retrying = Retrying(retries, backoff)

        def register(fn: B) -> B:
            check_receiver(fn, "the Batch")
            receiver = self._registry.callable_by_threads(fn)
            batcher = Batcher(receiver, every, max_size, self._callbacks.timer, retrying)
            self._registry.subscribe(batcher, target, ops, filters, collects=True)
            return fn

        return register

    def on_gap(self, fn: G) -> G:
        """Decorate a function to be called with each Gap, before any later event."""
        check_receiver(fn, "the Gap")
        receiver = self._registry.callable_by_threads(fn)
        if self.running:
            self._registry.check_loop(f"gap receiver {receiver_name(fn)}", receiver)
        self._callbacks.gap_receivers[fn] = receiver
        return fn

    def signal(self, target: Any, op: str) -> Signal:
        """Return the blinker signal of a model or label and an operation.

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
        """Return events to iterate over with ``for`` or ``async for``; also a context manager.

        It has the events from this call on. ``gaps=True`` also yields Gap objects.
        """
        notice_fork()
        return self._callbacks.stream(target, ops, filters, maxsize, gaps)

    def wait_for(
        self, target: Any, *ops: str, timeout: float | None = 5.0, **filters: Any
    ) -> Event:
        """Return the next such event. Raises WaitTimeout if none comes in ``timeout`` seconds.

        Raises StateError when the Hub is not running.
        """
        self._running("no event can come")
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
        """Deliver the rows that a watched table has now, too, as ``snapshot`` events.

        It takes durable delivery and a consumer with a name. ``target`` is a model or label.
        ``where`` is an SQL condition over a row's columns; it is run as it is written. Rows come in
        the order of the primary key, at most ``chunk`` at a time, between the other events, so that
        the last event of a record has its newest state. The consumer's active process does this,
        and a process that takes over goes on with it. ``name`` is the consumer's, by default the
        Hub's own; a broker's consumer, such as ``"mailer/kafka"``, gets the rows for the broker
        alone.

        Returns a handle at once. Raises StateError when the Hub is not running,
        ConfigurationError for a delivery, target or name that has no backfills, TableError without
        a primary key, PrivilegeError when the role may not read the table.
        """
        delivery = self._running("there is nobody to deliver")
        if not isinstance(delivery, DurableDelivery):
            raise ConfigurationError(
                'backfill() is of durable delivery: start(delivery="outbox", name=…).'
            )
        return delivery.backfill(target, where, chunk, name)

    def status(self) -> Status:
        """Return the state of the Hub and its database. Raises StateError if it is not running."""
        return self._running("there is no database to ask").status()

    def health(self) -> Health:
        """Return whether the Hub is alive and ready, at once and without asking the database.

        A Hub that is not running is neither.
        """
        if (delivery := self._delivery) is not None:
            return delivery.health()
        return Health(alive=False, ready=False, connected=False, reason="it is not running")

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def __aenter__(self) -> Hub:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.astop()

    def __repr__(self) -> str:
        return f"<Hub {'running' if self.running else 'stopped'}>"

    def _begin(self, make: Callable[[], Lifecycle]) -> None:
        # Before the lock is taken: otherwise a fork during the start would leave it locked in the
        # child.
        guard(self)
        with self._lock:
            if self._current is not None:
                raise StateError(
                    "This Hub is running already. Call stop() first, or make another: "
                    "pgsignals.Hub()."
                )
            if not self._stopped.is_set():
                raise StateError(
                    "This Hub is being stopped: its receivers handle what has arrived. Call wait() "
                    "before start()."
                )
            delivery = make()
            try:
                delivery.start()
            except BaseException:
                delivery.stop(0)
                self._registry.unbind()
                raise
            self._current = delivery
            self._make = make
            self._started_at = time.monotonic()
            self._stopped.clear()

    def _running(self, otherwise: str) -> Lifecycle:
        """Return the delivery. Raises StateError, with ``otherwise``, if there is none."""
        if (delivery := self._delivery) is None:
            raise StateError(f"The Hub is not running: {otherwise}. Call start().")
        return delivery

    @property
    def _reads_log(self) -> bool:
        """Whether ``_tail`` may have to connect."""
        return isinstance(self._delivery, DurableDelivery)

    def _tail(self) -> Tail | WalTail | None:
        """Return the tail for browsers; None if there is no log. Raises DatabaseError."""
        delivery = self._delivery
        return delivery.tail() if isinstance(delivery, DurableDelivery) else None

    def _settle(self, timeout: float) -> bool:
        """Wait until receivers have handled all that is committed by now; return if they have."""
        settled = threading.Event()
        self._running("nothing can arrive").settle(settled.set)
        return settled.wait(timeout)

    def _forked(self, restarting: bool = True) -> None:
        """In the child of a fork, be stopped, and renew locks, which absent threads may hold."""
        delivery, self._current = self._current, None
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._stopped.set()
        self._signalled_stop = SignalledStop()
        self._callbacks.forked()
        if delivery is not None:
            delivery.abandon()
            if not restarting:
                return
            if self._options.restart_after_fork and self._make is not None:
                Thread("restart", self._restart, self._make).start()
            else:
                log.log(
                    logging.WARNING if forks_workers() else logging.INFO,
                    "this process has been forked from one whose Hub runs, and hears nothing "
                    "itself: call start() in it, in a worker's hook say, or give "
                    "start(restart_after_fork=True)",
                )

    def _exit(self, timeout: float) -> None:
        """At the end of the process, stop; warn if nothing has kept a program that has begun."""
        delivery, began = self._current, self._started_at
        if delivery is not None and began is not None and not self._kept:
            lived = time.monotonic() - began
            if lived < _SHORT_LIFE and not self._callbacks.registry.has_delivered:
                log.warning(
                    "the program ended %.1f s after start(), before any event came: nothing kept "
                    "it, as run() and wait() do",
                    lived,
                )
        self.stop(timeout)

    def _restart(self, make: Callable[[], Lifecycle]) -> None:
        backoff = Backoff()
        while self._make is make:
            try:
                self._begin(make)
                return
            except StateError:
                return  # The child has called start() itself.
            # Any error, a plugin's too: otherwise the child would stay deaf.
            except Exception as error:
                log.error("cannot start after the fork, trying again: %s", error_text(error))
                time.sleep(backoff.next())


def _make_delivery(
    options: Options,
    callbacks: Callbacks,
    meter: Meter,
    makers: Sequence[Callable[[], Broadcaster]],
    backend_names: Sequence[str],
) -> Lifecycle:
    if options.from_broker:
        return BrokerDelivery(options, callbacks, meter)
    broadcasters = [make() for make in makers]
    if options.transport.durable:
        return DurableDelivery(options, callbacks, meter, broadcasters, backend_names)
    return NotifyDelivery(options, callbacks, meter, broadcasters)
