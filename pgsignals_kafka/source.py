"""Events from Kafka: acknowledged, by committing offsets, after receivers have returned."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from confluent_kafka import TIMESTAMP_NOT_AVAILABLE, KafkaError, KafkaException, Message

from pgsignals.cloudevents import attributes_of
from pgsignals.sources import RemoteSink, Wanted
from pgsignals.urls import BrokerEnd, taking

from .changes import Changes
from .connection import PREFIX, Errors, broker_error
from .group import GroupReader
from .options import Options, SendingOptions
from .progress import Partition
from .reader import LOOK_SECONDS, Reader

log = logging.getLogger("pgsignals.kafka")

_AT_ONCE = 1_000
_COMMIT_SECONDS = 1.0


class KafkaSource(BrokerEnd[Options]):
    """Reads the topics of the watched tables.

    With a name it is a member of the consumer group of that name, which begins with what comes
    after its first start; without, it reads all partitions from now on and commits nothing. Topics
    that appear later are read from their beginning. Its keywords are the options of ``kafka://``
    URLs for both sides, ``user``, ``password``, ``config`` and ``timeout``.
    """

    _sink: RemoteSink
    _reader: Reader
    _changes: Changes

    @taking(Options)
    def __init__(self, options: Options) -> None:
        self._options = options
        self._errors = Errors()
        self._thread = threading.Thread(target=self._run, name="pgsignals-kafka", daemon=True)
        self._stopping = threading.Event()
        self._looked_at = self._committed_at = time.monotonic()
        self._lost = False

    @classmethod
    def from_url(cls, url: str) -> KafkaSource:
        """``kafka://user:password@host:port,host:port/?prefix=…&librdkafka.NAME=…``."""
        return cls(**Options.read(url, sending=SendingOptions))

    @property
    def is_connected(self) -> bool:
        return self.is_alive and not self._lost

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def start(self, wanted: Sequence[Wanted], name: str | None, sink: RemoteSink) -> None:
        self._sink = sink
        options, errors = self._options, self._errors
        patterns = sorted({options.topic_pattern(each.schema, each.table) for each in wanted})
        if name is None:
            reader = Reader(options, patterns, errors, sink)
        else:
            reader = GroupReader(options, patterns, errors, sink, name)
        self._reader, self._changes = reader, Changes(reader)
        try:
            reader.start()
            self._join(reader)
        except KafkaException as error:
            failure = broker_error(options, "not connected", errors, error)
            reader.consumer.close()
            raise failure from error
        except BaseException:
            reader.consumer.close()
            raise
        errors.clear()
        self._thread.start()

    def _join(self, reader: Reader) -> None:
        """Wait until the group has said which partitions are ours, if there are any yet."""
        deadline = time.monotonic() + self._options.timeout
        while reader.joining and time.monotonic() < deadline:
            # The poll that brings the assignment may bring a message as well.
            self._poll(0.1, 1)
            reader.take_over()

    def refuse(self, position: str, reason: str) -> None:
        """Pass the record over: Kafka knows offsets only, and the one behind it is committed."""
        log.debug("%s: %s is passed over: %s", self, position, reason)

    def stop(self, timeout: float) -> None:
        started = self._thread.ident is not None
        if started:
            self._reader.leave()
        self._stopping.set()
        if started:
            self._thread.join(timeout)

    def close(self, timeout: float) -> None:
        if self._thread.ident is not None and not self._thread.is_alive():
            self._reader.close()

    def abandon(self) -> None:
        if hasattr(self, "_reader"):
            self._reader.abandon()

    def _run(self) -> None:
        self._sink.connected()
        while not self._stopping.is_set():
            try:
                self._turn()
            # Whatever is raised, the thread must go on reading.
            except Exception as error:
                known = isinstance(error, KafkaException)
                log.warning("%s: %s", self, error, exc_info=not known)
                self._stopping.wait(1.0)

    def _turn(self) -> None:
        self._make_room()
        self._poll(0.2, _AT_ONCE)
        now = time.monotonic()
        if now - self._committed_at >= _COMMIT_SECONDS:
            self._committed_at = now
            self._reader.commit(asynchronous=True)
        if now - self._looked_at >= LOOK_SECONDS:
            self._looked_at = now
            self._look()
        self._note_loss()
        # Last, since these raise until the brokers answer.
        self._changes.resume_stopped()
        self._reader.take_over()

    def _make_room(self) -> None:
        """Read nothing while receivers have no room."""
        if self._sink.full and not self._reader.paused:
            self._reader.pause()
        elif self._reader.paused and self._sink.wait_for_room(0.1):
            self._reader.resume()

    def _poll(self, timeout: float, most: int) -> None:
        consumer = self._reader.consumer
        first = consumer.poll(timeout)
        if first is None:
            return
        read: dict[Partition, int] = {}
        # Handled before more is asked for, since that may take a partition away.
        self._handle(first, read)
        if most > 1:
            for message in consumer.consume(most - 1, timeout=0):
                self._handle(message, read)
        if read:
            progress = self._reader.progress
            self._sink.settle(functools.partial(progress.settle, read, progress.generation))

    def _handle(self, message: Message, read: dict[Partition, int]) -> None:
        if (error := message.error()) is not None:
            self._handle_error(message, error)
            return
        progress = self._reader.progress
        topic, number, offset = message.topic(), message.partition(), message.offset()
        assert topic is not None and number is not None and offset is not None  # noqa: PT018
        partition = topic, number
        read[partition] = progress.read[partition] = offset + 1
        if (epoch := message.leader_epoch()) is not None:
            progress.epochs[partition] = epoch
        kind, at = message.timestamp()
        if kind != TIMESTAMP_NOT_AVAILABLE:
            progress.heard[partition] = datetime.fromtimestamp(at / 1000, timezone.utc)
        value = message.value()
        if value is None:
            return  # A tombstone: the event of the deletion came before it.
        self._sink.receive(
            _attributes(message),
            value,
            position=f"{topic}/{number}/{offset}",
            redelivered=offset < progress.redelivered_below.get(partition, 0),
        )

    def _handle_error(self, message: Message, error: KafkaError) -> None:
        if error.code() in (KafkaError._AUTO_OFFSET_RESET, KafkaError._LOG_TRUNCATION):
            topic, number = message.topic(), message.partition()
            assert topic is not None and number is not None  # noqa: PT018
            self._reader.progress.stopped[topic, number] = error.str()
        elif error.code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
            log.debug("%s: not there yet: %s", self, error.str())
        elif error.code() != KafkaError._PARTITION_EOF:
            log.warning("%s: %s", self, error.str())

    def _look(self) -> None:
        """Find new partitions, other topics in place of those read, and a broker come back."""
        reader, progress = self._reader, self._reader.progress
        try:
            # This raises if no broker answers; only with an answer is anything known as it is.
            known = reader.topics(2.0) if reader.finds_partitions or self._lost else []
            now = reader.look_at({topic for topic, _ in reader.partitions}, 2.0)
            self._changes.compare(now)
            self._changes.find_stalled(now)
            progress.sure.update(progress.heard)
            reader.take_new(known)
        except KafkaException as error:
            log.debug("%s: %s", self, error)
            return
        if self._lost:
            self._lost = False
            self._errors.clear()
            self._sink.connected()

    def _note_loss(self) -> None:
        if self._errors.down and not self._lost:
            self._lost = True
            failure = broker_error(self._options, "the connection is lost", self._errors)
            log.warning("%s", failure)
            self._sink.disconnected(failure)


def _attributes(message: Message[Any, Any]) -> dict[str, str]:
    headers: Any = message.headers() or ()  # A list of pairs, whatever the annotation says.
    texts = (
        (name, value.decode("utf-8", "replace"))
        for name, value in headers
        if isinstance(value, bytes)
    )
    return attributes_of(texts, PREFIX)
