"""The protocols of broadcasters, which take events somewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from ..core.events import Event, Gap


class Broadcaster(Protocol):
    """Takes events somewhere. For any one record, one thread calls it at a time.

    If events leave the process, one thread drives the broadcaster: it publishes, then flushes, and
    counts the events as delivered when ``flush`` has returned True. After False or an error it
    publishes the same events again, each with the ``uid`` that it had; a record's events must then
    still arrive in their order, so that readers see the latest last.
    """

    def publish(self, events: Sequence[Event]) -> None:
        """Take events, in order, without waiting until they have arrived.

        Events for the receivers of this process are of one topic each time; others may be many, of
        several topics. Connects if there is no connection yet. Raises what went wrong.
        """

    def flush(self, timeout: float) -> bool:
        """Wait at most ``timeout`` s until all that was published arrives; return whether it did.

        Connects too, so that a broker which cannot be reached shows before there are events.
        Raises BrokerError with what was refused, and why.
        """

    def announce(self, gap: Gap) -> None:
        """Tell those who read elsewhere that events may be missing. Raises what went wrong."""

    def close(self) -> None:
        """Give up all resources, and what has not been flushed."""


@runtime_checkable
class Pipelined(Protocol):
    """A broadcaster that tells how far it is, so that publishing need not wait for a flush."""

    def arrived(self, timeout: float) -> int:
        """Return how many more events have arrived, with all that were published before them.

        Wait at most ``timeout`` s for one. An event that was counted is not published again; those
        behind it are, after an error or False, all of them in the order that they had, and count as
        they arrive. ``flush`` that returns True ends the count. Raises BrokerError as flush does.
        """


@runtime_checkable
class Checkable(Protocol):
    """A broadcaster that can tell, before there are events, whether it would take them."""

    def check(self, tables: Sequence[tuple[str, str]]) -> None:
        """Check that events of these tables, each ``(schema, name)``, can be sent; create nothing.

        What ``publish`` would create may be missing. Raises BrokerError.
        """
