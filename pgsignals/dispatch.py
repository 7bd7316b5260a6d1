"""From messages to receivers: bounded queues, workers, order per record."""

from __future__ import annotations

import functools
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from queue import Empty
from typing import Any

from .broadcasters import Broadcaster
from .events import Event, Gap, Message, hashable
from .lanes import Aside, Backlog, Item, Job, Lane, Last, Once, Replaced, aside_of, current

log = logging.getLogger("pgsignals")

# A call that has lasted so long, or twice that, is slow: the other receivers do not wait for it.
SLOW_SECONDS = 0.05
# A receiver set aside goes back to the workers after a time without a slow call.
QUIET_SECONDS = 60.0
# How many receivers may be set aside: each takes a thread beside each worker that calls it.
MOST_ASIDE = 8


class Dispatcher:
    """Hands events to the broadcasters from worker threads.

    Events of one record are handled by one worker, in order. The workers share ``queue_size``
    among them. Whoever submits looks at ``full``, and waits for room; where that takes too long,
    ``give_up`` drops what is for the workers that have none, and ``announce_loss`` is called with a
    Gap, before anything later, when they have room again.

    With several workers, a receiver that proves slow is set aside, for each worker that finds it
    so: the thread that is in the call becomes the receiver's own, with a queue of its own, and
    another goes on with what the worker has to do. What finds that queue full is dropped, and
    announced like the rest. ``count_shed`` is told of all that is dropped.
    """

    def __init__(
        self,
        broadcasters: Sequence[Broadcaster],
        workers: int,
        queue_size: int,
        announce_loss: Callable[[Gap], object] = lambda gap: None,
        count_shed: Callable[[int], None] = lambda count: None,
    ) -> None:
        self._broadcasters = tuple(broadcasters)
        self._announce_loss = announce_loss
        self._count_shed = count_shed
        # Taken for each message: by itself it is cheaper than by way of the condition.
        self._lock = threading.RLock()
        self._room = threading.Condition(self._lock)
        self._barriers: weakref.WeakSet[threading.Event] = weakref.WeakSet()
        self._lanes = [Lane(-(-queue_size // workers)) for _ in range(workers)]
        for lane in self._lanes:
            lane.jobs = self._jobs(lane)
            lane.divert = self._divert
        self._asides: list[Aside] = []
        self._threads: list[threading.Thread] = []
        self._watchman: threading.Thread | None = None
        self._busy = threading.Event()
        self._ending = threading.Event()
        self._stopping = self._released = False
        self.shed = 0

    @property
    def depth(self) -> int:
        """Events that wait for a worker or are with one, and those for receivers set aside."""
        return sum(backlog.depth for backlog in self._backlogs())

    @property
    def oldest(self) -> float:
        """Seconds since the oldest of these arrived; 0 without any."""
        with self._room:
            arrivals = [backlog.arrivals[0] for backlog in self._backlogs() if backlog.arrivals]
        return time.monotonic() - min(arrivals) if arrivals else 0.0

    @property
    def full(self) -> bool:
        """Whether a worker that is not given up has no room."""
        for lane in self._lanes:  # noqa: SIM110 - a generator costs more than all the rest.
            if lane.full and not lane.given_up:
                return True
        return False

    @property
    def shedding(self) -> bool:
        """Whether events for a worker, or for a receiver set aside, are being dropped."""
        return any(backlog.given_up for backlog in self._backlogs())

    @property
    def idle(self) -> bool:
        """Whether a worker has nothing to do."""
        return any(not lane.depth for lane in self._lanes)

    @property
    def aside(self) -> tuple[str, ...]:
        """The names of the receivers that are set aside."""
        return _names(self._asides)

    @property
    def aside_full(self) -> tuple[str, ...]:
        """Those whose events are being dropped."""
        return _names(aside for aside in list(self._asides) if aside.given_up)

    def _backlogs(self) -> list[Backlog]:
        return [*self._lanes, *self._asides]

    def start(self) -> None:
        """Start the workers."""
        with self._room:
            for number, lane in enumerate(self._lanes):
                work = self._work if len(self._lanes) > 1 else self._work_alone
                self._spawn(f"worker-{number}", work, lane)
        if len(self._lanes) > 1:
            self._watchman = threading.Thread(
                target=self._watch, name="pgsignals-watchman", daemon=True
            )
            self._watchman.start()

    def _spawn(self, name: str, work: Callable[..., None], *arguments: object) -> None:
        """Start a thread that may call receivers; with the lock held."""
        thread = threading.Thread(
            target=work, args=arguments, name=f"pgsignals-{name}", daemon=True
        )
        thread.start()
        self._threads = [each for each in self._threads if each.is_alive()]
        self._threads.append(thread)

    def submit(self, message: Message) -> None:
        """Queue a message's events. Never waits: look at ``full`` first."""
        events = [Event(message, number, row) for number, row in enumerate(message.rows)]
        if len(self._lanes) == 1:
            with self._lock:
                before = self.shed
                self._put(self._lanes[0], events)
                shed = self.shed - before
        else:
            shed = self._share(message, events)
        if shed:
            self._count_shed(shed)

    def _share(self, message: Message, events: Sequence[Event]) -> int:
        """Queue events for several workers; how many were dropped."""
        width = len(message.topic.key)
        shares: dict[Lane, list[Event]] = {}
        if not message.moved:
            for event in events:
                shares.setdefault(self._lane_of(event._row[:width]), []).append(event)
        with self._lock:
            before = self.shed
            for lane, share in shares.items():
                self._put(lane, share)
            if not shares:
                for event in events:
                    self._put_moved(event)
            if not self._busy.is_set():
                self._busy.set()
            return self.shed - before

    def submit_events(self, events: Sequence[Event]) -> None:
        """Queue events in their order, whatever messages they are of. Never waits."""
        plan: list[tuple[Lane | None, list[Event]]] = []
        growing: dict[Lane, list[Event]] = {}
        single = self._lanes[0] if len(self._lanes) == 1 else None
        for event in events:
            message = event._message
            if single is None and message.moved:
                plan.append((None, [event]))
                growing.clear()
                continue
            lane = single or self._lane_of(event._row[: len(message.topic.key)])
            group = growing.get(lane)
            if group is not None and group[0]._message.topic is message.topic:
                group.append(event)
            else:
                growing[lane] = [event]
                plan.append((lane, growing[lane]))
        with self._room:
            for target, group in plan:
                if target is None:
                    self._put_moved(group[0])
                else:
                    self._put(target, group)
            if not self._busy.is_set():
                self._busy.set()

    def _put(self, lane: Lane, events: list[Event]) -> None:
        if lane.given_up:
            self._drop(lane, events)
        else:
            lane.put(len(events), events)

    def _put_moved(self, event: Event) -> None:
        """A record that changes its key has two, whose workers wait for one another.

        The old one's, which handles the event, comes to it when the new one's has handled what is
        of a record that had the new key before. Each waits for what was queued earlier alone.
        """
        width = len(event._message.topic.key)
        new = self._lane_of(event._row[:width])
        old = self._lane_of(event._row[width : 2 * width])
        if new is old or old.given_up:
            self._put(old, [event])
        elif new.given_up:
            self._drop(new, [event])
        else:
            reached, handled = self._barrier(), self._barrier()
            before: dict[Aside, threading.Event] = {}
            ahead: dict[Aside, threading.Event] = {}
            new.items.put((0, functools.partial(self._leave_lane, new, before, reached)))
            old.items.put((0, functools.partial(self._enter_lane, old, before, reached)))
            self._put(old, [event])
            old.items.put((0, functools.partial(self._leave_lane, old, ahead, handled)))
            # It counts as an event, since a record's moves may fill a queue too.
            new.put(1, functools.partial(self._enter_lane, new, ahead, handled))

    def _leave_lane(
        self, old: Lane, ahead: dict[Aside, threading.Event], handled: threading.Event
    ) -> None:
        """Note who has yet to be called, beside the worker, with the events of a record so far."""
        with self._room:
            for aside in old.asides.values():
                if aside.depth:
                    if aside.marker is None:
                        aside.marker = self._barrier()
                        aside.items.put((0, aside.marker.set))
                    ahead[aside] = aside.marker
        handled.set()

    def _enter_lane(
        self, new: Lane, ahead: dict[Aside, threading.Event], handled: threading.Event
    ) -> None:
        """Go on with the record here, and have those wait who have yet to be called there."""
        handled.wait()
        for former, reached in ahead.items():
            with self._room:
                if reached.is_set():
                    continue
                aside = new.asides.get(former.key)
                if aside is None:
                    aside = Aside(new, former.key, former.name)
                    try:
                        self._spawn("aside", self._serve, aside)
                    except RuntimeError:  # At interpreter exit there are no new threads.
                        aside = None
                    else:
                        self._add(aside)
                if aside is not None:
                    self._have_wait(aside, former, reached)
            if aside is None:
                reached.wait()

    def _have_wait(self, aside: Aside, former: Aside, reached: threading.Event) -> None:
        if aside.awaits.get(former) is reached:
            return
        aside.awaits[former] = reached
        # One without room waits for it when it has room again.
        aside.given_up = aside.given_up or (aside.full and not self._stopping)
        if not aside.given_up:
            aside.put(1, reached.wait)

    def _drop(self, backlog: Backlog, events: list[Event]) -> None:
        backlog.drop(events)
        self.shed += len(events)

    def _lane_of(self, key: tuple[object, ...]) -> Lane:
        return self._lanes[hash(hashable(key)) % len(self._lanes)]

    def _barrier(self) -> threading.Event:
        barrier = threading.Event()
        self._barriers.add(barrier)
        if self._released:
            barrier.set()
        return barrier

    def announce(self, call: Job) -> None:
        """Have ``call`` made once, before anything that is submitted later is handled."""
        self._announce(call)

    def _announce(self, call: Job) -> threading.Event:
        with self._room:
            made = self._barrier()
            once = Once(call, made)
            for lane in self._lanes:
                lane.items.put((0, once))
        return made

    def settle(self, call: Job) -> None:
        """Have ``call`` made once all that was submitted before is handled."""
        last = Last(call, len(self._lanes))
        for lane in self._lanes:
            lane.items.put((0, functools.partial(self._settle, lane, last)))

    def _settle(self, lane: Lane, last: Last) -> None:
        with self._room:
            last.expect(len(lane.asides))
            for aside in lane.asides.values():
                aside.items.put((0, last))
        last()

    def wait_for_room(self, timeout: float) -> bool:
        """Wait until full queues are half empty; whether they are, within ``timeout`` seconds."""
        with self._room:
            return self._room.wait_for(lambda: not self.full, timeout)

    def give_up(self) -> None:
        """Drop, from now on, what is for workers without room, until they have room again."""
        with self._room:
            for lane in self._lanes:
                lane.given_up = lane.full

    def _resume(self, backlog: Backlog) -> None:
        """Take events again, once the loss is announced; with the lock held."""
        was_given_up, backlog.given_up = backlog.given_up, False
        lost, backlog.lost = backlog.lost, None
        made = None
        if lost is not None:
            since, until = lost
            gap = Gap(since.at, until.at, "overflow", backlog.complaint)
            made = self._announce(functools.partial(self._announce_loss, gap))
        if was_given_up and isinstance(backlog, Aside):
            # The workers announce it, in the order of all that they do.
            if made is not None:
                backlog.items.put((0, made.wait))
            for reached in backlog.awaits.values():
                if not reached.is_set():
                    backlog.put(1, reached.wait)

    def stop(self, timeout: float) -> bool:
        """End the workers once the queue is empty; whether they ended within ``timeout`` seconds.

        After that, no further receiver is called. When a worker calls it, what is queued is left,
        and other workers only end the call that they are in.
        """
        deadline = time.monotonic() + timeout
        with self._room:
            self._stopping = True
            for backlog in self._backlogs():
                self._resume(backlog)
            for lane in self._lanes:
                lane.items.put(None)
            self._room.notify_all()
            called_by_worker = threading.current_thread() in self._threads
        if called_by_worker:
            self._close()
            # Who waits for the one that calls this would be waited for here.
            with self._room:
                self._released = True
                for barrier in list(self._barriers):
                    barrier.set()
        while (others := self._at_work()) and (left := deadline - time.monotonic()) > 0:
            others[0].join(left)
        with self._room:
            self._ending.set()
            self._busy.set()
        self._close()
        if self._watchman is not None:
            self._watchman.join()
        return not others

    def _at_work(self) -> list[threading.Thread]:
        """Other threads that may call receivers: more come while some are stuck."""
        own = threading.current_thread()
        with self._room:
            return [each for each in self._threads if each is not own and each.is_alive()]

    def _close(self) -> None:
        broadcasters, self._broadcasters = self._broadcasters, ()
        for broadcaster in broadcasters:
            broadcaster.close()

    def _jobs(self, lane: Lane) -> Iterator[Job]:
        """What the worker of a lane has to do, one thing after the other."""
        while (item := lane.items.get()) is not None:
            count, work = item
            if callable(work):
                yield work
            else:
                for broadcaster in self._broadcasters:
                    lane.attempt = functools.partial(self._attempt, broadcaster, work)
                    yield lane.attempt
            self._done(lane, count)

    def _work_alone(self, lane: Lane) -> None:
        """What the only worker does: no other thread ever goes on behind its calls."""
        while (item := lane.items.get()) is not None:
            count, work = item
            if callable(work):
                work()
            else:
                for broadcaster in self._broadcasters:
                    self._attempt(broadcaster, work)
            self._done(lane, count)

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

    def _done(self, backlog: Backlog, count: int) -> None:
        if not count:
            return
        with self._lock:
            was_full = backlog.full
            backlog.done(count)
            if was_full and not backlog.full:
                self._resume(backlog)
                self._room.notify_all()

    def _work(self, lane: Lane, resume: Job | None = None) -> None:
        current.lane = lane
        try:
            if resume is not None:
                resume()
            for job in lane.jobs:
                job()
        except Replaced as replaced:
            with self._room:
                aside = lane.asides[replaced.key]
        else:
            with self._room:
                for aside in lane.asides.values():
                    aside.items.put(None)
            return
        current.lane = None
        self._done(aside, 1)
        self._serve(aside)

    def _watch(self) -> None:
        """Have the other receivers go on behind each call that is seen twice."""
        seen: dict[Lane, int] = {}
        while not self._ending.wait(SLOW_SECONDS):
            with self._room:
                if not (self._ending.is_set() or any(lane.depth for lane in self._lanes)):
                    self._busy.clear()
            self._busy.wait()
            # One call at most; a list is made of it in one go, whatever the lane's thread does.
            calls = {lane: number for lane in self._lanes for number in list(lane.running)}
            for lane, number in calls.items():
                if seen.get(lane) == number:
                    self._replace(lane, number)
            seen = calls

    def _replace(self, lane: Lane, number: int) -> None:
        receiver = lane.running.get(number)
        if receiver is None or lane.caller.is_alone(receiver):
            return
        aside = aside_of(lane, receiver)
        with self._room:
            if len({each.key for each in self._asides} | {aside.key}) > MOST_ASIDE:
                return
            # The new thread takes the call from there: where there is no new thread, nothing is
            # changed.
            try:
                self._spawn("worker", self._take_over, lane, number, aside)
            except RuntimeError as error:
                log.warning("the receiver %s holds up others: %s", aside.name, error)

    def _take_over(self, lane: Lane, number: int, aside: Aside) -> None:
        with self._room:
            if lane.running.pop(number, None) is None:
                return  # It has come to its end meanwhile.
            lane.number = number
            self._add(aside)
            # The call that has brought it here.
            aside.depth = 1
            aside.arrivals.append(lane.arrivals[0])
        log.info(
            "the receiver %s is slow: it has a queue of its own for now",
            aside.name,
            extra={"receiver": aside.name},
        )
        self._work(lane, functools.partial(lane.attempt, lane.resume))

    def _add(self, aside: Aside) -> None:
        aside.lane.asides[aside.key] = aside
        self._asides = [*self._asides, aside]

    def _divert(self, aside: Aside, receiver: Any, event: Event) -> bool:
        """Queue a call for a receiver set aside; False when the worker calls it again."""
        shed = begun = False
        with self._room:
            if aside.full and not aside.given_up:
                # One that catches up quickly is worth the wait.
                self._room.wait_for(lambda: not aside.full or self._stopping, SLOW_SECONDS)
                begun = aside.given_up = aside.full and not self._stopping
            if aside.ended:
                return False
            if shed := aside.given_up:
                self._drop(aside, [event])
            else:
                aside.put(1, functools.partial(aside.lane.caller.call, receiver, event))
        if begun:
            log.error(
                "the receiver %s is too slow: its events are dropped until there is room",
                aside.name,
                extra={"receiver": aside.name},
            )
        if shed:
            self._count_shed(1)
        return True

    def _serve(self, aside: Aside) -> None:
        """Call a receiver set aside, until it may go back to the worker, or all is done."""
        while (item := self._next(aside)) is not None:
            count, call = item
            assert callable(call)
            began = time.monotonic()
            call()
            if time.monotonic() - began >= SLOW_SECONDS:
                aside.slow_at = time.monotonic()
            self._done(aside, count)

    def _next(self, aside: Aside) -> Item:
        while True:
            quiet = aside.slow_at + QUIET_SECONDS - time.monotonic()
            try:
                item = aside.items.get(timeout=max(0.0, quiet))
            except Empty:
                item = None
            if item is not None:
                return item
            with self._room:
                if aside.items.empty():
                    aside.ended = True
                    del aside.lane.asides[aside.key]
                    self._asides = [each for each in self._asides if each is not aside]
                    return None


def _names(asides: Iterable[Aside]) -> tuple[str, ...]:
    return tuple(sorted({aside.name for aside in asides}))
