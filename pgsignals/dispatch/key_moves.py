"""Key moves: keeps the events of a record in order when its key changes, and with it its worker."""

from __future__ import annotations

import functools
import threading

from ..core.events import Event
from .isolation import Isolation
from .queues import IsolatedQueue, Queues, WorkerQueue

# The markers of isolated queues, each set once its queue has come past what is in it by now.
_Ahead = dict[IsolatedQueue, threading.Event]


class KeyMoves:
    """Has the two workers of a record that changes its key wait for one another.

    ``count`` is the number of changes that their two workers have not both come past.
    """

    def __init__(self, queues: Queues, isolation: Isolation) -> None:
        self._queues = queues
        self._isolation = isolation
        self.count = 0

    def put(self, event: Event) -> None:
        """Queue an update that changes a key; with the lock held.

        The old key's worker handles the event. It waits until the new key's worker has handled the
        events of a record that had the new key before; then the new key's worker waits until the
        event is handled. Each waits only for what was queued earlier, so that no two workers can
        wait for one another for ever.
        """
        queues, width = self._queues, len(event._message.topic.key)
        new = queues.queue_of(event._row[:width])
        old = queues.queue_of(event._row[width : 2 * width])
        if new is old or old.given_up:
            queues.put(old, [event])
        elif new.given_up:
            queues.drop(new, [event])
        else:
            reached, handled = queues.barrier(), queues.barrier()
            before: _Ahead = {}
            ahead: _Ahead = {}
            self.count += 1
            new.items.put((0, functools.partial(self._leave, new, before, reached)))
            old.items.put((0, functools.partial(self._enter, old, before, reached)))
            queues.put(old, [event])
            old.items.put((0, functools.partial(self._leave, old, ahead, handled)))
            # It counts as an event: otherwise a record that moves on and on would fill the queue
            # without bounds.
            new.put(1, functools.partial(self._arrive, new, ahead, handled))

    def _arrive(self, new: WorkerQueue, ahead: _Ahead, handled: threading.Event) -> None:
        self._enter(new, ahead, handled)
        with self._queues.lock:
            self.count -= 1

    def _leave(self, old: WorkerQueue, ahead: _Ahead, handled: threading.Event) -> None:
        """Note the isolated receivers that have yet to be called with what came so far."""
        with self._queues.lock:
            for isolated in old.isolated.values():
                if isolated.depth:
                    if isolated.marker is None:
                        isolated.marker = self._queues.barrier()
                        isolated.items.put((0, isolated.marker.set))
                    ahead[isolated] = isolated.marker
        handled.set()

    def _enter(self, new: WorkerQueue, ahead: _Ahead, handled: threading.Event) -> None:
        """Go on at this worker; its isolated queues wait for those that are behind at the other."""
        handled.wait()
        for former, reached in ahead.items():
            with self._queues.lock:
                if reached.is_set():
                    continue
                isolated = self._isolation.isolate(new, former.key, former.name)
                if isolated is not None:
                    self._have_wait(isolated, former, reached)
            if isolated is None:
                reached.wait()

    def _have_wait(
        self, isolated: IsolatedQueue, former: IsolatedQueue, reached: threading.Event
    ) -> None:
        if isolated.awaits.get(former) is reached:
            return
        isolated.awaits[former] = reached
        # A queue without room gets this wait when it has room again, by ``resumed``.
        isolated.given_up = isolated.given_up or self._queues.has_to_shed(isolated)
        if not isolated.given_up:
            isolated.put(1, reached.wait)
