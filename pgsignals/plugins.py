"""Loading of plugins: when a Hub starts or a command runs, never at import."""

from __future__ import annotations

import logging
from importlib.metadata import EntryPoint, entry_points
from typing import cast

import pluggy

from . import hookspecs
from .tables import Resolver

log = logging.getLogger("pgsignals")


class Plugins:
    """The plugins that are installed. One that fails to load is named and left out."""

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self.failed: dict[str, str] = {}

    def load(self) -> None:
        """Import and register every installed plugin."""
        for point in entry_points(group=hookspecs.PROJECT):
            try:
                self._manager.register(point.load(), name=point.name)
            except Exception as error:
                self.failed[point.name] = f"{_origin(point)}: {type(error).__name__}: {error}"
                log.error("the plugin %s of %s cannot be used", point.name, self.failed[point.name])

    def register(self, plugin: object, name: str | None = None) -> None:
        """Add a plugin by hand."""
        self._manager.register(plugin, name=name)

    def resolvers(self) -> list[Resolver]:
        """The resolvers of all plugins; each hook is called apart, since pluggy stops at errors."""
        found: list[Resolver] = []
        for implementation in self._manager.hook.pgsignals_resolver.get_hookimpls():
            try:
                found.append(cast(Resolver, implementation.function()))
            except Exception as error:
                self.failed[implementation.plugin_name] = f"{type(error).__name__}: {error}"
                log.error(
                    "pgsignals_resolver of the plugin %s failed: %s",
                    implementation.plugin_name,
                    error,
                )
        return found


def _origin(point: EntryPoint) -> str:
    distribution = point.dist
    return f"{distribution.name} {distribution.version}" if distribution else point.value
