"""The options of :meth:`pgsignals.Hub.start`, kept and checked as one value."""

from __future__ import annotations

from asyncio import AbstractEventLoop
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from ..consumers.claims import Consumer
from ..core.errors import ConfigurationError
from ..core.metrics import Metrics, Tracer
from ..core.tables import Resolver
from ..core.transport import Capture, Delivery, Transport
from ..core.watchers import Watcher
from ..plugins.loader import Backends, load_plugins
from ..plugins.urls import scheme_of
from ..sources.thread import Timing
from ..triggers.installer import Limits
from ..triggers.resolvers import BUILTIN

Install = Literal["auto", "check", "off"]


def all_resolvers(first: Sequence[Resolver]) -> tuple[Resolver, ...]:
    """Return ``first``, then the resolvers of the installed plugins, then the built-in ones."""
    return (*first, *load_plugins().resolvers(), *BUILTIN)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The parameters of :meth:`pgsignals.Hub.start` by their names, and their defaults.

    They may come from a setting or a file: before ``check`` they can be anything.
    """

    dsn: str = field(default="", repr=False)
    watchers: tuple[Watcher, ...] = ()
    delivery: Delivery = "notify"
    name: str | None = None
    partitions: int = 1
    lease: float = 5.0
    capture: Capture | None = None
    allow_unbounded_wal: bool = False
    backends: Backends = field(default=(), repr=False)
    install: Install = "auto"
    workers: int = 1
    queue_size: int = 10_000
    namespace: str = "default"
    prune: bool = True
    lock_timeout: float = 0.5
    install_timeout: float = 10.0
    listen_dsn: str | None = field(default=None, repr=False)
    heartbeat: float = 30.0
    heartbeat_timeout: float = 10.0
    restart_after_fork: bool = False
    resolvers: Sequence[Resolver] = ()
    metrics: Metrics | None = None
    tracer: Tracer | None = None
    loop: AbstractEventLoop | None = None

    @property
    def given(self) -> dict[str, Any]:
        """The parameters of ``start``, by name, without those that have their defaults."""
        found = {each.name: getattr(self, each.name) for each in fields(Options)}
        return {name: value for name, value in found.items() if value != getattr(Options, name)}

    @property
    def transport(self) -> Transport:
        """The transport of the triggers. Raises ConfigurationError for an unknown delivery."""
        return Transport(self.delivery)

    @property
    def from_broker(self) -> bool:
        """Whether ``dsn`` is the URL of a broker, and no database is used."""
        scheme = scheme_of(self.dsn)
        return scheme is not None and not scheme.startswith("postgres")

    @property
    def session_dsn(self) -> str:
        """The connection string of the session that listens or reads the log."""
        return self.listen_dsn or self.dsn

    @property
    def consumer(self) -> Consumer:
        """The consumer of a durable delivery."""
        return Consumer(self.name, self.partitions, float(self.lease))

    @property
    def limits(self) -> Limits:
        """The limits of installing."""
        return Limits(self.lock_timeout, self.install_timeout)

    @property
    def timing(self) -> Timing:
        """The patience with the server."""
        return Timing(self.heartbeat, self.heartbeat_timeout, 60.0 + self.install_timeout)

    @property
    def isolating(self) -> bool:
        """Whether other receivers go on behind a slow one.

        Not with one worker, which promises that all calls are made one after the other.
        """
        return self.workers > 1

    def check(self, *, relaying: bool) -> None:
        """Raise ConfigurationError for an invalid value; ``relaying``: there are backends."""
        transport, workers, name = self.transport, self.workers, self.name
        relay_only = workers == 0 and transport.durable and relaying
        known = ", ".join(map(repr, get_args(Install)))
        self._demand("install", self.install in get_args(Install), f"it is one of {known}.")
        text = isinstance(name, str) and bool(name)
        self._demand("name", name is None or text, "give a text that is not empty, or None.")
        self._demand(
            "workers",
            relay_only or _whole(workers),
            "give a whole number from 1 (or 0, in durable delivery to backends alone).",
        )
        self._demand("queue_size", _whole(self.queue_size), "give a whole number from 1.")
        text = isinstance(self.namespace, str) and bool(self.namespace)
        self._demand("namespace", text, "give a text that is not empty.")
        for option, methods in _METHODS.items():
            given = getattr(self, option)
            whole = all(callable(getattr(given, each, None)) for each in methods)
            self._demand(
                option,
                given is None or (whole and not isinstance(given, type)),
                f"give an object with {' and '.join(f'{each}()' for each in methods)}.",
            )
        # Made here, since they refuse invalid values: before a connection is tried.
        _ = self.limits, self.timing
        if not self.watchers:
            raise ConfigurationError("There is nothing to watch: give at least one watcher.")
        if not self.from_broker:
            self._check_consumer()
        elif relaying:
            raise ConfigurationError(
                "backends= with the URL of a broker: only what comes from a database is passed on."
            )

    def _check_consumer(self) -> None:
        if self.transport is Transport.WAL:
            captures = ", ".join(map(repr, get_args(Capture)))
            known = self.capture is None or self.capture in get_args(Capture)
            self._demand("capture", known, f"it is one of {captures}, or None for either.")
        else:
            for option in ("capture", "allow_unbounded_wal"):
                if (given := getattr(self, option)) != getattr(Options, option):
                    raise ConfigurationError(
                        f'{option}={given!r} is of WAL delivery: add delivery="wal".'
                    )
        if not self.transport.durable:
            for option in ("name", "partitions"):
                if (given := getattr(self, option)) != getattr(Options, option):
                    raise ConfigurationError(
                        f'{option}={given!r} is of durable delivery: add delivery="outbox" or '
                        'delivery="wal".'
                    )
            return
        parts, lease = self.partitions, self.lease
        self._demand("name", "\0" not in (self.name or ""), "give a text that is not empty.")
        self._demand(
            "partitions", _whole(parts) and parts <= 256, "give a whole number from 1 to 256."
        )
        if parts > 1 and self.transport is Transport.WAL:
            raise ConfigurationError(
                f"partitions={parts!r} are of outbox delivery: the write-ahead log is read by one "
                "process of a name. To share events among several, have that one forward them to a "
                "broker with backends=."
            )
        if parts > 1 and self.name is None:
            raise ConfigurationError(
                f"partitions={parts!r} are shared by processes of one name: add name=."
            )
        seconds = isinstance(lease, int | float) and 1 <= lease <= 3600
        self._demand("lease", seconds, "give seconds, from 1 to 3,600.")

    def _demand(self, option: str, fits: bool, fix: str) -> None:
        if not fits:
            raise ConfigurationError(f"{option}={getattr(self, option)!r}: {fix}")


_METHODS = {"metrics": ("count", "gauge"), "tracer": ("receiving",)}


def _whole(number: object) -> bool:
    """Whether ``number`` is a whole number from 1."""
    return isinstance(number, int) and number >= 1
