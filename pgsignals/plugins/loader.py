"""Loading of plugins: when a Hub starts or a command runs, never at import."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, TypeVar, cast

import pluggy

from ..core.errors import ConfigurationError, MissingExtraError, PgSignalsError, PluginError
from ..core.logging import log
from ..core.redaction import error_text, redact, type_name
from ..core.tables import Resolver
from . import hookspecs
from .broadcaster import Broadcaster
from .source import RemoteSource
from .urls import scheme_of

if TYPE_CHECKING:
    import click

T = TypeVar("T")

Backends = Iterable[str | Broadcaster] | Mapping[str, str | Broadcaster]

# The packages to name for a URL's scheme if no installed plugin knows the URL.
_PACKAGES = {"kafka": "pgsignals-kafka", "nats": "pgsignals-nats"}


@dataclass(frozen=True)
class PluginState:
    """One installed plugin: its entry point, its distribution, its hooks, and its error, if any."""

    name: str
    distribution: str
    version: str
    hooks: tuple[str, ...]
    error: str = ""


class Plugins:
    """The plugins that are installed. One that fails to load is named and left out."""

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._points: dict[str, EntryPoint] = {}
        self.failed: dict[str, str] = {}

    def load(self) -> None:
        """Import and register every installed plugin."""
        for point in entry_points(group=hookspecs.PROJECT):
            self._points[point.name] = point
            try:
                self._manager.register(point.load(), name=point.name)
            except Exception as error:
                self._note_failure(point.name, error)

    def register(self, plugin: object, name: str | None = None) -> None:
        """Add a plugin by hand."""
        self._manager.register(plugin, name=name)

    def states(self) -> list[PluginState]:
        """Return all installed plugins, in the order of their names."""
        found = []
        for name, point in sorted(self._points.items()):
            plugin = self._manager.get_plugin(name)
            hooks = () if plugin is None else (self._manager.get_hookcallers(plugin) or ())
            distribution = point.dist
            found.append(
                PluginState(
                    name,
                    distribution.name if distribution else point.value,
                    distribution.version if distribution else "",
                    tuple(sorted(caller.name for caller in hooks)),
                    self.failed.get(name, ""),
                )
            )
        return found

    def resolvers(self) -> list[Resolver]:
        """Return all plugins' resolvers; each hook is called apart, as pluggy stops at errors."""
        return list(self._call("pgsignals_resolver"))

    def broadcaster(self, url: str, option: str = "backends=") -> Broadcaster:
        """Return the broadcaster for a URL; errors say that ``option`` has the URL.

        Raises ConfigurationError if the URL is wrong or no plugin knows it, PluginError if the
        plugin that might is broken, and MissingExtraError that names the package to install.
        """
        return cast(Broadcaster, self._by_url("pgsignals_broadcaster", url, option))

    def source(self, url: str) -> RemoteSource:
        """Return the source for a URL. Raises what :meth:`broadcaster` does."""
        return cast(RemoteSource, self._by_url("pgsignals_source", url, "start()"))

    def add_commands(self, group: click.Group) -> None:
        """Let all plugins add their commands."""
        for _ in self._call("pgsignals_commands", group):
            pass

    def _by_url(self, hook: str, url: str, option: str) -> object:
        # An error of ours is about the URL, and so for the caller.
        for found in self._call(hook, url, passing=(PgSignalsError,)):
            if found is not None:
                return cast(object, found)
        scheme = scheme_of(url)
        if (failure := self.failed.get(scheme or "")) is not None:
            raise PluginError(
                f"{option} has a URL {scheme}://…, whose plugin cannot be used: {failure}"
            )
        broken = "".join(f" The plugin {n} cannot be used: {e}." for n, e in self.failed.items())
        if (package := _PACKAGES.get(scheme or "")) is not None:
            raise MissingExtraError(
                f"{option} has a URL {scheme}://…, which needs a package that is not installed: "
                f"pip install {package}.{broken}"
            )
        what = f"a URL {scheme}://…" if scheme is not None else "something that is not a URL"
        known = ", ".join(f"{name}://" for name in _PACKAGES)
        raise ConfigurationError(
            f"{option} has {what}, and no installed plugin knows it; `pgsignals plugins` lists "
            f"them. There are packages for {known}.{broken}"
        )

    def _call(
        self, hook: str, *arguments: object, passing: tuple[type[Exception], ...] = ()
    ) -> Iterator[Any]:
        """Yield what each plugin's hook returns; note its error, or raise a ``passing`` one."""
        # The implementation that was registered last comes first, as pluggy calls them.
        for implementation in reversed(getattr(self._manager.hook, hook).get_hookimpls()):
            try:
                found = implementation.function(*arguments)
            except passing:
                raise
            except Exception as error:
                self._note_failure(implementation.plugin_name, error, hook)
            else:
                yield found

    def _note_failure(self, name: str, error: Exception, hook: str = "") -> None:
        point = self._points.get(name)
        origin = name if point is None else _origin(point)
        where = f" in {hook}" if hook else ""
        # A plugin's error may quote the URL that it got, whose password error_text() leaves out.
        self.failed[name] = f"{origin}: {type_name(error)}{where}: {error_text(error)}"
        log.error("the plugin %s of %s cannot be used", name, self.failed[name])


def _origin(point: EntryPoint) -> str:
    distribution = point.dist
    return f"{distribution.name} {distribution.version}" if distribution else point.value


def load_plugins() -> Plugins:
    """Return the plugins that are installed now."""
    plugins = Plugins()
    plugins.load()
    return plugins


def broadcaster_makers(
    backends: Backends,
) -> tuple[list[Callable[[], Broadcaster]], tuple[str, ...]]:
    """Return what makes each broadcaster, anew in the child of a fork, and their names, if any.

    Raises ConfigurationError.
    """
    if isinstance(backends, str) or not isinstance(backends, Iterable):
        raise ConfigurationError(
            f"backends={redact(repr(backends))}: give a list of URLs or broadcasters."
        )
    given: list[str | Broadcaster]
    names: tuple[str, ...] = ()
    if isinstance(backends, Mapping):
        names, given = tuple(backends), list(backends.values())
    else:
        given = list(backends)
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            raise ConfigurationError(
                f"backends has the name {name!r}: give letters, digits, '_', '-' and '.'."
            )
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
    return found, names
