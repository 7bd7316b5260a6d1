"""Carries out the backfills of a consumer: a chunk at a time, between the messages of the log.

The rows of a chunk are as they were at a watermark of the log. The log's messages up to that
watermark are delivered before the chunk, all others after it, so that the last event of a record
has its newest state. No row is locked for this.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg2
from psycopg2 import errors as pg

from ...core.errors import PayloadError
from ...core.events import Topic
from ...core.logging import log
from ...core.payload import Decoder
from ...core.redaction import error_text
from ...dispatch.in_flight import Lease
from ...triggers.names import wake_statement
from ..acks import Partition
from ..consumer_store import ConsumerStore, Progress
from .chunks import Chunk, Scope, SnapshotDecoder, SnapshotMessage, read_chunk
from .requests import NOTICE

# Chunks grow up to the size asked for, and shrink if reading one takes long: other events wait for
# it.
FIRST_ROWS = 100
SHORT_SECONDS, LONG_SECONDS = 0.1, 0.4
# The most bytes of rows that are in flight at once.
MOST_BYTES = 8 << 20
RETRY_SECONDS = 1.0
# The number of time-outs in reading a single row after which the backfill fails.
MOST_TIMEOUTS = 5

# Errors that may be gone at the next try: conflicts, want of resources, locks, cancellation.
_PASSING = ("40", "53", "55", "57")


@dataclass
class Task:
    """A backfill that a partition has yet to end; it goes on behind ``last_key``.

    It waits until ``retry_at`` (``time.monotonic()``) for what ``remark`` says.
    """

    scope: Scope
    schema: str
    table: str
    label: str | None
    model: str | None
    chunk: int
    last_key: Sequence[str] | None
    remark: str | None = None
    retry_at: float = 0.0


_TASKS = """
SELECT b.id, extract(epoch FROM b.started_at)::text, b.condition, b.search_path, b.schema_name,
       b.table_name, b.label, b.model, b.chunk, p.last_key, b.error
FROM pgsignals.backfills AS b JOIN pgsignals.backfill_parts AS p ON p.backfill = b.id
WHERE b.consumer = %s AND p.part = %s AND b.state = 'running' AND NOT p.finished
ORDER BY b.id
"""


@dataclass
class _Reading:
    """The backfills that are read in one lease of a partition.

    ``ended`` are those read to their ends in it. ``doubtful`` are those that the former holder had
    begun, if it is ``unsure`` what that holder delivered: their events are marked as redelivered.
    ``known``: ``tasks`` is up to date.
    """

    lease: Lease
    unsure: bool
    tasks: list[Task] = field(default_factory=list)
    known: bool = False
    doubtful: frozenset[int] = frozenset()
    ended: set[int] = field(default_factory=set)
    rows: int = FIRST_ROWS
    chunk: tuple[Task, Chunk] | None = None
    timeouts: int = 0

    def next(self) -> Task | None:
        """Return the first task that does not wait for something."""
        now = time.monotonic()
        return next((task for task in self.tasks if task.retry_at <= now), None)


class Backfilling:
    """The backfills of one consumer, in its source's thread."""

    def __init__(self, heard: Callable[[Topic], bool]) -> None:
        self._heard = heard
        self._consumer: ConsumerStore
        self._decoders: list[SnapshotDecoder] = []
        self._lease = 0.0
        self._readings: dict[int, _Reading] = {}

    def begin(self, consumer: ConsumerStore, decoders: Sequence[Decoder], lease: float) -> None:
        """Go on in a new session."""
        self._consumer = consumer
        self._decoders = [each for each in decoders if isinstance(each, SnapshotDecoder)]
        self._lease = lease
        self._readings.clear()

    def look_again(self) -> None:
        """Read the tasks again, since a backfill was asked for, or ended by somebody else."""
        for reading in self._readings.values():
            reading.known = False

    def holds(self, part: Partition) -> bool:
        """Whether a chunk waits for the messages that come before it."""
        return self._reading(part).chunk is not None

    def under_way(self, part: Partition) -> bool:
        """Whether there is a chunk to deliver, or a task that need not wait."""
        reading = self._reading(part)
        return reading.chunk is not None or reading.next() is not None

    def take(self, part: Partition) -> None:
        """Read the next chunk, if there is one, and have the log read up to its watermark."""
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
        consumer = self._consumer
        began = time.monotonic()
        asked = min(reading.rows, task.chunk)
        try:
            chunk = read_chunk(
                consumer,
                decoder,
                task.scope,
                task.last_key,
                asked,
                # Otherwise a slow statement would outlast the lease, and lose the claim.
                min(self._lease / 4, consumer.timeout / 2),
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
                self._put_off(task, f"the table: {error_text(error)}")
            return
        if task.remark is not None:
            task.remark = None
            self._remark(task.scope.number, None)
        reading.timeouts = 0
        took = time.monotonic() - began
        if chunk.cut:
            reading.rows = max(1, chunk.scanned)
        elif took < SHORT_SECONDS:
            reading.rows = min(task.chunk, 2 * asked)
        elif took > LONG_SECONDS:
            reading.rows = max(1, asked // 2)
        reading.chunk = task, chunk
        part.reader.read_to(consumer.log.watermark(chunk.watermark))

    def give(self, part: Partition) -> tuple[SnapshotMessage | None, Progress]:
        """Return the chunk's rows, whose turn it is, and the progress to acknowledge with them."""
        reading = self._reading(part)
        assert reading.chunk is not None
        (task, chunk), reading.chunk = reading.chunk, None
        number = task.scope.number
        message = chunk.message
        if message is not None:
            message.redelivered = number in reading.doubtful
        if chunk.last_key is not None:
            task.last_key = chunk.last_key
        if chunk.last:
            reading.tasks.remove(task)
            reading.ended.add(number)
            log.info("backfill %d: all rows have been read", number)
        last_key = None if chunk.last_key is None else list(chunk.last_key)
        return message, Progress(number, last_key, chunk.scanned, chunk.last, chunk.size)

    def _reading(self, part: Partition) -> _Reading:
        reading = self._readings.get(part.claim.part)
        if reading is None or reading.lease is not part.lease:
            reading = self._readings[part.claim.part] = _Reading(part.lease, part.reader.unsure)
        return reading

    def _look(self, part: Partition, reading: _Reading) -> None:
        """Read the tasks from the database; those under way go on behind what was read of them."""
        under_way = {task.scope.number: task for task in reading.tasks}
        found = self._tasks(part.claim.part)
        if reading.unsure:
            reading.unsure = False
            reading.doubtful = frozenset(task.scope.number for task in found)
        reading.tasks = [
            under_way.get(task.scope.number, task)
            for task in found
            if task.scope.number not in reading.ended
        ]
        reading.known = True

    def _put_off(self, task: Task, awaited: str) -> None:
        """Go on with the task later, and say once what it waits for."""
        task.retry_at = time.monotonic() + RETRY_SECONDS
        if task.remark is None:
            task.remark = f"it waits for {awaited}"
            log.warning(
                "backfill %d of %s.%s: %s", task.scope.number, task.schema, task.table, task.remark
            )
            self._remark(task.scope.number, task.remark)

    def _shorten(self, reading: _Reading, task: Task, asked: int, error: Exception) -> None:
        """Ask for fewer rows next time, since so many took too long."""
        reading.rows = max(1, asked // 4)
        if asked == 1:
            reading.timeouts += 1
            if reading.timeouts >= MOST_TIMEOUTS:
                self._fail(reading, task, error)
            else:
                self._put_off(task, f"the server: {error_text(error)}")

    def _fail(self, reading: _Reading, task: Task, error: Exception) -> None:
        text = error_text(error)
        log.error(
            "backfill %d of %s.%s failed: %s", task.scope.number, task.schema, task.table, text
        )
        reading.tasks.remove(task)
        # It fails for all partitions, which hear of it.
        self._consumer.execute(
            "UPDATE pgsignals.backfills SET state = 'failed', error = %s,"
            " changed_at = pg_catalog.clock_timestamp() WHERE id = %s AND state = 'running'",
            (text, task.scope.number),
        )
        self._consumer.execute(wake_statement(NOTICE))

    def _tasks(self, part: int) -> list[Task]:
        """Return the tasks that a partition has yet to end, the earliest first."""
        return [
            # Only names are converted, to be compared with ours; conditions and keys are sent back
            # as they came.
            Task(Scope(*row[:4]), *map(self._text, row[4:8]), *row[8:])
            for row in self._consumer.execute(_TASKS, (self._consumer.name, part))
        ]

    def _text(self, name: str | None) -> Any:
        return None if name is None else self._consumer.session.text(name)

    def _remark(self, number: int, text: str | None) -> None:
        """Save what a running backfill waits for; None: it waits no more."""
        self._consumer.execute(
            "UPDATE pgsignals.backfills SET error = %s WHERE id = %s AND state = 'running'",
            (text, number),
        )


def _fits(decoder: SnapshotDecoder, task: Task) -> bool:
    return decoder.source.fits(task.schema, task.table, task.label, task.model)


def _under_way(part: Partition) -> int:
    """Return the bytes of chunks that are in flight."""
    return sum(
        page.progress.size for page in part.pages if page.progress is not None and not page.done
    )
