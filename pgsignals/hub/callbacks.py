"""The callbacks of a Hub: its receivers and signals, and the calls that tell them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from blinker import Signal

from ..core.events import Event, Gap, model_name
from ..core.logging import error_info, log
from ..core.metrics import COUNTERS, Meter
from ..core.redaction import type_name
from ..dispatch.batches import Batcher, BatchTimer
from ..dispatch.calls import CallScope
from ..dispatch.coroutines import CoroutineReceiver, LeftBehind
from ..dispatch.registry import Around, Registry, event_text, receiver_name
from ..dispatch.streams import Ending, Stream
from .options import Options
from .status import Health

GapReceiver = Callable[[Gap], object]

_GAP_REASONS = (
    "reconnected",
    "overflow",
    "watcher_broken",
    "retention",
    "restored",
    "unknown_name",
)


class Callbacks:
    """The receivers of events, batches and Gaps, and the signals, whose ``sender`` is the Hub.

    An error that a callback raises is logged, and keeps no other from being called.
    """

    def __init__(self, sender: object) -> None:
        self._sender = sender
        self._meter = Meter()
        self.connected = Signal("connected")
        self.disconnected = Signal("disconnected")
        self.gap = Signal("gap")
        self.receiver_failed = Signal("receiver_failed")
        self.registry = Registry()
        self.gap_receivers: dict[GapReceiver, GapReceiver] = {}
        self.timer = BatchTimer(self.tell_failure)
        self.streams: weakref.WeakSet[Ending] = weakref.WeakSet()

    def begin(
        self, options: Options, meter: Meter, around: Around | None, health: Callable[[], Health]
    ) -> None:
        """Use these from now on; counters begin at 0, so that their first rise is seen."""
        self.registry.coroutines.begin(options.loop)
        for fn in self.gap_receivers.values():
            self.registry.check_loop(f"gap receiver {receiver_name(fn)}", fn)
        self._meter = meter
        self.registry.around = around
        self.timer.scope = CallScope(around, options.tracer)
        for name, measure in COUNTERS.items():
            if not measure.labels:
                meter.count(name, 0)
        for reason in _GAP_REASONS:
            meter.count("gaps", 0, reason=reason)
        for name in {
            receiver_name(each)
            for each in self.registry.subscriptions
            if isinstance(each.fn, Batcher) or not each.collects
        }:
            meter.count("receiver_failures", 0, receiver=name)
        meter.gauge("connected", lambda: float(health().connected))
        meter.gauge("queue_depth", lambda: float(health().depth))
        meter.gauge("oldest_seconds", lambda: health().oldest)
        meter.gauge("lag_seconds", lambda: health().lag)

    def end(self) -> bool:
        """End the streams, and deliver nothing more; return whether no call was left behind."""
        if dropped := self.registry.coroutines.dropped:
            log.warning(
                "%d calls of coroutine receivers were not waited for, since stop() was called in "
                "the thread of their event loop: use `await astop()` there",
                dropped,
            )
        for stream in list(self.streams):
            stream.close()
        self.registry.unbind()
        self.registry.around = None
        return not dropped

    def forked(self) -> None:
        """In the child of a fork, renew locks, which threads that are not here may hold."""
        self.registry.forked()
        self.timer.forked()
        for stream in list(self.streams):
            stream.forked()

    def stream(
        self, target: Any, ops: tuple[str, ...], filters: dict[str, Any], maxsize: int, gaps: bool
    ) -> Stream[Any]:
        """See :meth:`pgsignals.Hub.stream`."""
        found: Stream[Any] = Stream(maxsize, gaps)
        reference = weakref.ref(found)

        # Weak: otherwise a stream that its user forgets to close would stay, with its subscription.
        def put(item: Event | Gap) -> None:
            if (stream := reference()) is not None:
                stream.put(item)

        def end() -> None:
            subscription.cancel()
            self.gap_receivers.pop(put, None)

        subscription = self.registry.subscribe(
            put, target, ops, filters, f"stream of {model_name(target)}", collects=True
        )
        if gaps:
            self.gap_receivers[put] = put
        weakref.finalize(found, end)
        found._on_close = end
        self.streams.add(found)
        return found

    def tell_connected(self) -> None:
        """Tell that events can arrive from now on."""
        self._send(self.connected)

    def tell_disconnected(self, error: BaseException) -> None:
        """Tell that the connection is lost."""
        self._send(self.disconnected, error=error)

    def tell_gap(self, gap: Gap) -> bool:
        """Tell all Gap receivers; return whether a stop has left none of them behind."""
        told = True
        self._meter.count("gaps", reason=gap.reason)
        log.warning(
            "events from %s to %s may be missing: %s",
            gap.since,
            gap.until,
            gap.reason,
            extra={"gap_reason": gap.reason},
        )
        for fn in list(self.gap_receivers.values()):
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

    def tell_failure(self, receiver: Any, event: Event, error: BaseException) -> None:
        """Tell that a receiver has raised an error."""
        if isinstance(error, LeftBehind):
            return  # ``end`` logs how many there were.
        if isinstance(receiver, CoroutineReceiver):
            receiver = receiver.fn
        name = receiver_name(receiver)
        self._meter.count("receiver_failures", receiver=name)
        log.error(
            "the receiver %s raised %s for %s",
            name,
            type_name(error),
            event_text(event),
            exc_info=error_info(error),
            extra={"receiver": name, "event_uid": event.uid, **event._message.topic.fields},
        )
        self._send(self.receiver_failed, receiver=receiver, event=event, error=error)

    def _send(self, signal: Signal, **values: Any) -> None:
        for receiver in signal.receivers_for(self._sender):
            try:
                receiver(self._sender, **values)
            except BaseException:
                log.exception("a receiver of %r raised", signal)
