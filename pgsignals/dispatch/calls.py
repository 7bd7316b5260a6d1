"""The scope of a receiver's call: a framework's context around it, and a tracer's span within."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from ..core.events import Event
from ..core.metrics import Tracer, span
from .registry import Around, receiver_name


class CallScope:
    """Makes the scope of each call of one started Hub; ``plain`` if the scope is empty.

    ``around`` is entered for each call anew and left with the receiver's error. What it raises is
    the receiver's failure, so that a commit at its end counts as a part of the call.
    """

    def __init__(self, around: Around | None = None, tracer: Tracer | None = None) -> None:
        self._around = around
        self._tracer = tracer
        self.plain = around is None and tracer is None

    def enter(self, events: Sequence[Event], receiver: object) -> AbstractContextManager[object]:
        """Return the scope of one call of a receiver, with an event or with a Batch of them."""
        if self._tracer is None:
            return nullcontext() if self._around is None else self._around()
        traced = span(self._tracer, events, receiver_name(receiver))
        return traced if self._around is None else _nested(self._around(), traced)


PLAIN = CallScope()


@contextmanager
def _nested(
    outer: AbstractContextManager[object], inner: AbstractContextManager[object]
) -> Iterator[None]:
    with outer, inner:
        yield
