"""The progress of a relay: lines drawn again on a terminal, one now and then elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

import click

from pgsignals.core.json import to_json
from pgsignals.dispatch.backend_status import BackendStatus
from pgsignals.hub.status import Health

from .output import abandon_stdout, coloured, notice, printable, standing

_COLOURS = {"active": "green", "standing by": "cyan", "trying again": "red"}


def state_of(backend: BackendStatus, connected: bool) -> str:
    """Return the state of a target, in two words."""
    if not connected:
        return "no database"
    if backend.error:
        return "trying again"
    if not backend.active:
        return "standing by"
    return "active" if backend.ready else "connecting"


def _reason(backend: BackendStatus) -> str:
    """Return a backend's error without its address, which stands in the log already."""
    return backend.error.removeprefix(f"{backend.name}: ")


@dataclass
class Progress:
    """Tells, each time it is asked to, the progress of each target.

    On a terminal this is a block of lines in one place, under whatever else is printed. Elsewhere
    it is a line for each target whose state has changed and, every ``every`` seconds, for each that
    has delivered something or is behind.
    """

    name: str
    targets: Sequence[str]
    health: Callable[[], Health]
    every: float
    as_json: bool

    def __post_init__(self) -> None:
        self._terminal = not self.as_json and sys.stderr.isatty()
        self.pause = min(1.0, self.every)
        self._told: dict[str, tuple[float, int, str]] = {}

    def close(self) -> None:
        """Take away the block of lines."""
        if self._terminal:
            standing.show(())

    def tell(self) -> None:
        """Print what is new."""
        health = self.health()
        now = time.monotonic()
        lines = []
        for target, backend in zip(self.targets, health.backends, strict=True):
            state = state_of(backend, health.connected)
            at, delivered, former = self._told.get(target, (now, 0, ""))
            rate = (backend.delivered - delivered) / (now - at) if now > at else 0.0
            if self._terminal:
                lines.append(self._line(target, backend, state, rate))
            elif state != former or (
                now - at >= self.every and (backend.delivered > delivered or backend.depth)
            ):
                self._print(target, backend, state, rate)
            elif now - at < self.every:
                continue
            self._told[target] = now, backend.delivered, state
        if self._terminal:
            standing.show(lines)

    def _line(self, target: str, backend: BackendStatus, state: str, rate: float) -> str:
        width = max(map(len, self.targets))
        text = f"{target:<{width}}  {state:<12}"
        if state == "trying again":
            text += f"  {backend.depth:,} waiting, lag {backend.lag:.1f} s  {_reason(backend)}"
        elif state == "active":
            text += f"  {backend.delivered:,} events  {rate:,.0f}/s  lag {backend.lag:.1f} s"
        # Some terminals say that they have no columns.
        room = os.get_terminal_size(sys.stderr.fileno()).columns or 80
        text = printable(text)[: max(1, room - 1)]
        return text.replace(state, coloured(state, _COLOURS.get(state, "yellow")), 1)

    def _print(self, target: str, backend: BackendStatus, state: str, rate: float) -> None:
        if not self.as_json:
            text = (
                f"{target}: {state}, {backend.delivered:,} events ({rate:,.1f}/s), "
                f"{backend.depth:,} waiting, lag {backend.lag:.1f} s"
            )
            notice(text if not backend.error else f"{text}: {_reason(backend)}")
            return
        found = {
            "at": datetime.now(timezone.utc).isoformat(),
            "relay": self.name,
            "target": target,
            "broker": backend.name,
            "state": state,
            "delivered": backend.delivered,
            "rate": round(rate, 1),
            "waiting": backend.depth,
            "lag": round(backend.lag, 3),
            "failures": backend.failures,
            "error": backend.error,
        }
        try:
            click.echo(to_json(found))
        except OSError as error:
            # The reader of stdout has gone; the events still have to get where they go.
            abandon_stdout()
            notice(f"Cannot print to stdout any more: {error.strerror}.")
