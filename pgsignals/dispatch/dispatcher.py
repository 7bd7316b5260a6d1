"""The dispatcher: workers that hand events to the broadcasters, in the order of each record."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count, groupby, repeat
from operator import attrgetter
from typing import Any

from ..core.events import Event, Gap, Message, Topic
from ..core.logging import log
from ..core.threads import Thread, Threads
from ..plugins.broadcaster import Broadcaster
from .isolation import Isolation
from .key_moves import KeyMoves
from .queues import Backlog, Caller, Hold, Job, Last, Queues, WorkerQueue, receiver_key
from .registry import receiver_name

# Groups of events of one topic, each for a worker; an update that changes a key is alone, for None.
_Plan = list[tuple[WorkerQueue | None, list[Event]]]
topic_of: Callable[[Event], Topic] = attrgetter("_message.topic")


class Dispatcher(Queues):
    """Hands events to the broadcasters from worker threads.

    Events of one record are handled by one worker, in order. With one worker all calls are made
    one after the other; with several, a receiver that proves slow is isolated.
    """

    def __init__(
        self,
        broadcasters: Sequence[Broadcaster],
        workers: int,
        queue_size: int,
        announce_loss: Callable[[Gap], object] = lambda gap: None,
        count_shed: Callable[[int], None] = lambda count: None,
        sheds: bool = True,
    ) -> None:
        super().__init__(workers, queue_size, announce_loss, count_shed, sheds)
        self._broadcasters = tuple(broadcasters)
        self._threads = Threads()
        self._isolation: Isolation | None = None
        self._moves: KeyMoves | None = None
        if workers > 1:
            self._isolation = Isolation(self, self._threads, self._jobs)
            self._moves = KeyMoves(self, self._isolation)

    @property
    def aside(self) -> tuple[str, ...]:
        """The names of the isolated receivers."""
        return tuple(sorted({each.name for each in self.isolated}))

    @property
    def aside_full(self) -> tuple[str, ...]:
        """The names of the isolated receivers whose events are being dropped."""
        return tuple(sorted({each.name for each in self.isolated if each.given_up}))

    @property
    def moving(self) -> bool:
        """Whether workers wait for one another because of a record that changes its key."""
        return self._moves is not None and self._moves.count > 0

    @property
    def failure(self) -> str:
        """The error that has ended a thread that should go on; empty if there was none."""
        return self._threads.failure or ("" if self._isolation is None else self._isolation.failure)

    def start(self) -> None:
        """Start the workers."""
        work = self._work if self._isolation is None else self._isolation.work
        with self.lock:
            for number, queue in enumerate(self.queues):
                self._threads.start(f"worker-{number}", work, queue)
        if self._isolation is not None:
            self._isolation.start()

    def submit(self, message: Message) -> None:
        """Queue a message's events. Never waits: look at ``full`` first."""
        events = list(map(Event, repeat(message), count(), message.rows))
        self._put_all([(self.queues[0], events)] if self._moves is None else self._plan(events))

    def submit_events(self, events: Sequence[Event]) -> None:
        """Queue events in their order, whatever messages they are of. Never waits."""
        self._put_all(self._plan(events))

    def _put_all(self, plan: _Plan) -> None:
        with self.lock:
            before = self.shed
            for queue, group in plan:
                if queue is not None:
                    self.put(queue, group)
                elif self._moves is not None:
                    self._moves.put(group[0])
            shed = self.shed - before
            if self._isolation is not None:
                self._isolation.wake()
        if shed:
            self.count_shed(shed)

    def _plan(self, events: Sequence[Event]) -> _Plan:
        if self._moves is None:
            return [(self.queues[0], [*group]) for _, group in groupby(events, topic_of)]
        plan: _Plan = []
        growing: dict[WorkerQueue, tuple[Topic, list[Event]]] = {}
        for event in events:
            message = event._message
            topic = message.topic
            if message.moved:
                plan.append((None, [event]))
                growing.clear()
                continue
            queue = self.queue_of(event._row[: len(topic.key)])
            found = growing.get(queue)
            if found is not None and found[0] is topic:
                found[1].append(event)
            else:
                group = [event]
                growing[queue] = topic, group
                plan.append((queue, group))
        return plan

    def settle(self, call: Job) -> None:
        """Make ``call`` once everything that was submitted before is handled."""
        last = Last(call, len(self.queues))
        for queue in self.queues:
            queue.items.put((0, functools.partial(self._settle, queue, last)))

    def _settle(self, queue: WorkerQueue, last: Last) -> None:
        with self.lock:
            last.expect(len(queue.isolated))
            for isolated in queue.isolated.values():
                isolated.items.put((0, last))
        last()

    def hand_over(self, call: Job) -> None:
        """Make ``call`` once the workers have come past all that was submitted before.

        It does not wait for isolated receivers: events that they have yet to take are held.
        """
        last = Last(call, len(self.queues))
        for queue in self.queues:
            queue.items.put((0, last))

    def feed(self, caller: Caller, receiver: Any, events: Sequence[tuple[Event, Hold]]) -> bool:
        """Call one receiver, isolated, with events that no worker brings.

        They come behind those in its isolated queue; where there is only one worker, that calls the
        receiver. Return False, with nothing done, if MOST_ISOLATED others are isolated, or no
        thread can be started.
        """
        key, name = receiver_key(receiver), receiver_name(receiver)
        targets: list[tuple[Backlog, Job]] = []
        with self.lock:
            if self.stopping:
                return False
            for event, held in events:
                target: Backlog | None = (queue := self.queue_of(_former_key(event)))
                if self._isolation is not None:
                    target = self._isolation.isolate(queue, key, name)
                if target is None:
                    return False
                targets.append((target, functools.partial(caller.call, receiver, event, held)))
            for backlog, call in targets:
                backlog.put(1, call)
        return True

    def stop(self, timeout: float) -> bool:
        """End the workers once their queues are empty; return whether they did within the timeout.

        After that, no further receiver is called. When a worker calls this, queued events are left,
        and other workers only end the call that they are in.
        """
        deadline = time.monotonic() + timeout
        with self.lock:
            self.stopping = True
            for backlog in self.backlogs:
                self._resume(backlog)
            for queue in self.queues:
                queue.items.put(None)
            self.room.notify_all()
            called_by_worker = threading.current_thread() in self._threads.alive
        if called_by_worker:
            self._close()
            # Otherwise this worker would wait below for workers that wait for it at a barrier.
            with self.lock:
                self._released = True
                for barrier in list(self._barriers):
                    barrier.set()
        while (others := self._at_work()) and (left := deadline - time.monotonic()) > 0:
            others[0].join(left)
        if self._isolation is not None:
            self._isolation.stop()
        self._close()
        return not others

    def _at_work(self) -> list[Thread]:
        """Return the other threads that may call receivers; more come while some are stuck."""
        own = threading.current_thread()
        with self.lock:
            return [each for each in self._threads.alive if each is not own]

    def _close(self) -> None:
        broadcasters, self._broadcasters = self._broadcasters, ()
        for broadcaster in broadcasters:
            broadcaster.close()

    def _work(self, queue: WorkerQueue) -> None:
        """Work as the only worker, behind whose calls no other thread goes on."""
        while (item := queue.items.get()) is not None:
            number, work = item
            if callable(work):
                work()
            else:
                for broadcaster in self._broadcasters:
                    self._attempt(broadcaster, work)
            self.done(queue, number)

    def _jobs(self, queue: WorkerQueue) -> Iterator[Job]:
        """Yield the jobs of one of several workers, to whichever thread asks for the next."""
        while (item := queue.items.get()) is not None:
            number, work = item
            if callable(work):
                yield work
            else:
                for broadcaster in self._broadcasters:
                    queue.attempt = functools.partial(self._attempt, broadcaster, work)
                    yield queue.attempt
            self.done(queue, number)

    def _attempt(
        self, broadcaster: Broadcaster, events: Sequence[Event], resume: Job | None = None
    ) -> None:
        try:
            if resume is None:
                broadcaster.publish(events)
            else:
                resume()
        except Exception:
            log.exception(
                "%s could not take %d events",
                broadcaster,
                len(events),
                extra=events[0]._message.topic.fields,
            )


def _former_key(event: Event) -> tuple[object, ...]:
    """Return the key whose worker handles the event: for an update that changes it, the former."""
    width = len(event._message.topic.key)
    return event._row[width : 2 * width] if event._message.moved else event._row[:width]
