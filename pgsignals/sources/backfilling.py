"""Carries out the backfills of a consumer: a chunk at a time, between two windows of the outbox.

The rows of a chunk are as one snapshot saw them. What the outbox holds up to that snapshot goes
before them, and all else after, so that what comes last of a record is its newest state. No row is
locked for it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import psycopg2
from psycopg2 import errors as pg

from ..connection import redact
from ..errors import PayloadError
from ..events import Topic
from ..outbox.backfill import BackfillStore, Progress, Task
from ..outbox.pages import Reign
from ..outbox.parts import Part
from ..outbox.snapshots import Chunk, SnapshotDecoder, SnapshotMessage, read_chunk
from ..payload import Decoder

log = logging.getLogger("pgsignals")

# Chunks grow to what was asked for, and shrink where they take long: other events wait meanwhile.
FIRST_ROWS = 100
SHORT_SECONDS, LONG_SECONDS = 0.1, 0.4
# So many bytes of rows are with receivers at once.
MOST_BYTES = 8 << 20
RETRY_SECONDS = 1.0
# How often one row may take too long before that is a failure.
MOST_TIMEOUTS = 5

# Errors that may be gone at the next try: conflicts, want of resources, locks, cancellation.
_PASSING = ("40", "53", "55", "57")


@dataclass
class _Reading:
    """What one reign over a part does.

    ``ended`` are backfills that it has read to their ends, ``doubtful`` those that it went on with
    while it was ``unsure`` what its predecessor had delivered.
    """

    reign: Reign
    unsure: bool
    tasks: list[Task] = field(default_factory=list)
    known: bool = False
    doubtful: frozenset[int] = frozenset()
    ended: set[int] = field(default_factory=set)
    rows: int = FIRST_ROWS
    chunk: tuple[Task, Chunk] | None = None
    timeouts: int = 0

    def next(self) -> Task | None:
        """The first that does not wait for something."""
        now = time.monotonic()
        return next((task for task in self.tasks if task.retry_at <= now), None)


class Backfilling:
    """The backfills of one consumer, in its source's thread."""

    def __init__(self, heard: Callable[[Topic], bool]) -> None:
        self._heard = heard
        self._store: BackfillStore
        self._decoders: list[SnapshotDecoder] = []
        self._lease = 0.0
        self._readings: dict[int, _Reading] = {}

    def begin(self, store: BackfillStore, decoders: Sequence[Decoder], lease: float) -> None:
        """Go on in a new session."""
        self._store = store
        self._decoders = [each for each in decoders if isinstance(each, SnapshotDecoder)]
        self._lease = lease
        self._readings.clear()

    def look_again(self) -> None:
        """Some backfill was asked for, or ended by somebody else."""
        for reading in self._readings.values():
            reading.known = False

    def holds(self, part: Part) -> bool:
        """Whether a chunk waits for the end of the window before it."""
        return self._reading(part).chunk is not None

    def under_way(self, part: Part) -> bool:
        """Whether there is more to do than to wait for others."""
        reading = self._reading(part)
        return reading.chunk is not None or reading.next() is not None

    def take(self, part: Part) -> None:
        """Read the next chunk, if there is one to read, and have the window before it read."""
        reading = self._reading(part)
        if not self._decoders or reading.chunk is not None:
            return
        if not reading.known:
            self._look(part, reading)
        task = reading.next()
        if task is None or _under_way(part) >= MOST_BYTES:
            return
        fitting = [each for each in self._decoders if _fits(each, task)]
        if len(fitting) != 1:
            self._put_off(task, f"a process with {'one' if fitting else 'a'} watcher for it")
            return
        [decoder] = fitting
        if not self._heard(decoder.topic):
            self._put_off(task, "a receiver of its snapshots")
            return
        began = time.monotonic()
        asked = min(reading.rows, task.chunk)
        try:
            chunk = read_chunk(
                self._store.session,
                decoder,
                task.reach,
                task.last_key,
                asked,
                # Not so long that the claim would be in doubt.
                min(self._lease / 4, self._store.timeout / 2),
                self._store.timeout,
            )
        except PayloadError as error:
            self._fail(reading, task, error)
            return
        except psycopg2.Error as error:
            if error.pgcode is None:
                raise
            if error.pgcode[:2] not in _PASSING:
                self._fail(reading, task, error)
            elif isinstance(error, pg.QueryCanceled):
                self._shorten(reading, task, asked, error)
            else:
                self._put_off(task, f"the table: {redact(str(error)).strip()}")
            return
        if task.remark is not None:
            task.remark = None
            self._store.remark(task.reach.number, None)
        reading.timeouts = 0
        took = time.monotonic() - began
        if chunk.cut:
            reading.rows = max(1, chunk.scanned)
        elif took < SHORT_SECONDS:
            reading.rows = min(task.chunk, 2 * asked)
        elif took > LONG_SECONDS:
            reading.rows = max(1, asked // 2)
        reading.chunk = task, chunk
        part.advance(chunk.snapshot)

    def give(self, part: Part) -> tuple[SnapshotMessage | None, Progress]:
        """The chunk's rows, now that it is their turn, and what their acknowledgement means."""
        reading = self._reading(part)
        assert reading.chunk is not None
        (task, chunk), reading.chunk = reading.chunk, None
        number = task.reach.number
        message = chunk.message
        if message is not None:
            message.redelivered = number in reading.doubtful
        if chunk.last_key is not None:
            task.last_key = chunk.last_key
        if chunk.last:
            reading.tasks.remove(task)
            reading.ended.add(number)
            log.info("backfill %d: all rows have been read", number)
        return message, Progress(number, chunk.last_key, chunk.scanned, chunk.last, chunk.size)

    @contextmanager
    def saving(self, part: Part) -> Iterator[None]:
        """Keep in one transaction what is acknowledged and how far backfills have come with it."""
        found, part.progress = part.progress, []
        if not found:
            yield
            return
        self._store.execute("BEGIN")
        for each in _summed(found):
            self._store.note(part.claim, each)
        yield
        self._store.execute("COMMIT")

    def _reading(self, part: Part) -> _Reading:
        reading = self._readings.get(part.claim.part)
        if reading is None or reading.reign is not part.reign:
            reading = self._readings[part.claim.part] = _Reading(
                part.reign, part.doubtful is not None
            )
        return reading

    def _look(self, part: Part, reading: _Reading) -> None:
        """See what there is to do; what is under way goes on from where it was read to."""
        under_way = {task.reach.number: task for task in reading.tasks}
        found = self._store.tasks(part.claim.part)
        if reading.unsure:
            reading.unsure = False
            reading.doubtful = frozenset(task.reach.number for task in found)
        reading.tasks = [
            under_way.get(task.reach.number, task)
            for task in found
            if task.reach.number not in reading.ended
        ]
        reading.known = True

    def _put_off(self, task: Task, awaited: str) -> None:
        """Go on with it later, and say once why."""
        task.retry_at = time.monotonic() + RETRY_SECONDS
        if task.remark is None:
            task.remark = f"it waits for {awaited}"
            log.warning(
                "backfill %d of %s.%s: %s", task.reach.number, task.schema, task.table, task.remark
            )
            self._store.remark(task.reach.number, task.remark)

    def _shorten(self, reading: _Reading, task: Task, asked: int, error: Exception) -> None:
        """Ask for fewer rows, since so many took too long."""
        reading.rows = max(1, asked // 4)
        if asked == 1:
            reading.timeouts += 1
            if reading.timeouts >= MOST_TIMEOUTS:
                self._fail(reading, task, error)
            else:
                self._put_off(task, f"the server: {redact(str(error)).strip()}")

    def _fail(self, reading: _Reading, task: Task, error: Exception) -> None:
        text = redact(str(error)).strip()
        log.error(
            "backfill %d of %s.%s failed: %s", task.reach.number, task.schema, task.table, text
        )
        reading.tasks.remove(task)
        self._store.fail(task.reach.number, text)


def _fits(decoder: SnapshotDecoder, task: Task) -> bool:
    return decoder.source.fits(task.schema, task.table, task.label, task.model)


def _under_way(part: Part) -> int:
    """The bytes of chunks that receivers have yet to handle."""
    return sum(
        page.progress.size for page in part.pages if page.progress is not None and not page.done
    )


def _summed(found: Sequence[Progress]) -> list[Progress]:
    """One for each backfill, from several in their order."""
    by_number: dict[int, Progress] = {}
    for each in found:
        former = by_number.get(each.number)
        if former is not None:
            each = replace(
                each,
                last_key=each.last_key or former.last_key,
                scanned=former.scanned + each.scanned,
                delivered=former.delivered + each.delivered,
            )
        by_number[each.number] = each
    return list(by_number.values())
