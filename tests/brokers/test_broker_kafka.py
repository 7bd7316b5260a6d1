"""Apache Kafka: what goes there, what comes back, and what happens when it is not there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import (
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewPartitions,
    NewTopic,
)  # type: ignore[attr-defined]  # type: ignore[attr-defined]

from pgsignals import BrokerError, ConfigurationError, Gap, Hub
from pgsignals.cloudevents import from_cloudevent
from pgsignals.testing.conformance import (
    DEADLINE,
    BroadcasterConformance,
    SourceConformance,
    make_event,
)
from pgsignals_kafka import KafkaBroadcaster, KafkaSource
from tests.brokers import PASSWORD, Kafka, as_written, free_port, read_all
from tests.conftest import Database, Recorder
from tests.proxy import Proxy
from tests.waiting import eventually


class TestConformance(BroadcasterConformance):
    """The broadcaster is one."""

    @pytest.fixture
    def broadcaster(self, kafka: Kafka, prefix: str) -> KafkaBroadcaster:
        return KafkaBroadcaster.from_url(f"{kafka.url}?prefix={prefix}&create=true&partitions=1")

    @pytest.fixture
    def written(self, kafka: Kafka, prefix: str) -> Callable[[int], Sequence[Any]]:
        return lambda count: [as_written(each) for each in read_all(kafka, prefix, count)]

    @pytest.fixture
    def too_long(self) -> int:
        return 2_000_000


class TestSourceConformance(SourceConformance):
    """The source is one."""

    @pytest.fixture
    def broadcaster(self, kafka: Kafka, prefix: str) -> KafkaBroadcaster:
        return KafkaBroadcaster.from_url(f"{kafka.url}?prefix={prefix}&create=true")

    @pytest.fixture
    def make_source(self, kafka: Kafka, prefix: str) -> Callable[[], KafkaSource]:
        return lambda: KafkaSource.from_url(f"{kafka.url}?prefix={prefix}")


def test_a_record_is_where_java_puts_it(kafka: Kafka, prefix: str) -> None:
    """Each key is in the partition that the default partitioner of Kafka's own client chooses."""
    events = [make_event(number, record=number % 40) for number in range(120)]
    broadcaster = KafkaBroadcaster.from_url(f"{kafka.url}?prefix={prefix}&create=true&partitions=7")
    broadcaster.publish(events)
    assert broadcaster.flush(DEADLINE)
    broadcaster.close()
    topic = f"{prefix}.public.conformance"
    kafka.produce(topic, "".join(f"{record}\tjava\n" for record in range(40)))
    places: dict[bytes, set[int]] = {}
    java: dict[bytes, int] = {}
    for message in read_all(kafka, prefix, 160):
        if message.value() == b"java":
            java[message.key()] = message.partition()
        else:
            places.setdefault(message.key(), set()).add(message.partition())
    assert len(java) == 40
    assert places == {key: {partition} for key, partition in java.items()}
    assert len({partition for each in places.values() for partition in each}) > 3


def test_a_small_topic_gets_what_fits(kafka: Kafka, prefix: str) -> None:
    """A topic that takes short records only gets long events without values, in their place."""
    admin = AdminClient({"bootstrap.servers": f"127.0.0.1:{kafka.port}"})
    topic = NewTopic(f"{prefix}.public.conformance", 1, 1, config={"max.message.bytes": "3000"})
    for answer in admin.create_topics([topic]).values():
        answer.result(DEADLINE)
    broadcaster = KafkaBroadcaster.from_url(f"{kafka.url}?prefix={prefix}")
    # Not compressible, and together more than a batch may have.
    events = [
        make_event(n, values={"number": n, "text": os.urandom(2000 * (n == 5) + 100).hex()})
        for n in range(50)
    ]
    broadcaster.publish(events)
    assert broadcaster.flush(DEADLINE)
    broadcaster.close()
    found = [from_cloudevent(*as_written(each)) for each in read_all(kafka, prefix, 50)]
    assert [event.uid for event in found] == [event.uid for event in events]
    assert [event.truncated for event in found] == [n == 5 for n in range(50)]


def test_a_limit_that_shrinks_breaks_no_order(kafka: Kafka, prefix: str) -> None:
    """A record that the broker refuses is sent again, shorter, before what came after it."""
    broadcaster = KafkaBroadcaster.from_url(f"{kafka.url}?prefix={prefix}&create=true&partitions=1")
    broadcaster.publish([make_event(0)])
    assert broadcaster.flush(DEADLINE)
    admin = AdminClient({"bootstrap.servers": f"127.0.0.1:{kafka.port}"})
    resource = ConfigResource(
        ConfigResource.Type.TOPIC,
        f"{prefix}.public.conformance",
        incremental_configs=[
            ConfigEntry(
                "max.message.bytes",
                "3000",
                incremental_operation=AlterConfigOpType.SET,
            )
        ],
    )
    for answer in admin.incremental_alter_configs([resource]).values():
        answer.result(DEADLINE)
    events = [
        make_event(n, values={"number": n, "text": os.urandom(4000 if n == 1 else 10).hex()})
        for n in range(1, 20)
    ]
    refused: list[str] = []
    while True:
        try:
            broadcaster.publish(events)
            if broadcaster.flush(DEADLINE):
                break
        except BrokerError as error:
            refused.append(str(error))
            assert len(refused) < 10, refused
    broadcaster.close()
    assert "refused a record" in refused[0]
    found = [from_cloudevent(*as_written(each)) for each in read_all(kafka, prefix, 20)]
    uids = [event.uid for event in found]
    latest = [uid for at, uid in enumerate(uids) if uid not in uids[at + 1 :]]
    assert latest == [event.uid for event in [make_event(0), *events]]
    assert [event.truncated for event in found if event.uid == events[0].uid] == [True]


def test_tombstones(kafka: Kafka, prefix: str) -> None:
    """With tombstones=true, a record without a value follows the event of a deletion."""
    broadcaster = KafkaBroadcaster.from_url(
        f"{kafka.url}?prefix={prefix}&create=true&partitions=1&tombstones=true"
    )
    broadcaster.publish([make_event(1, "deleted", record=7), make_event(2, record=8)])
    assert broadcaster.flush(DEADLINE)
    broadcaster.close()
    found = read_all(kafka, prefix, 3)
    assert [(each.key(), each.value() is None) for each in found] == [
        (b"7", False),
        (b"7", True),
        (b"8", False),
    ]


def test_a_key_that_changes_leaves_a_tombstone(
    kafka: Kafka, prefix: str, hub: Hub, db: Database
) -> None:
    """With tombstones=true, a compacted topic forgets the key that no record has any more."""
    db("CREATE TABLE orders (id int PRIMARY KEY)")
    url = f"{kafka.url}?prefix={prefix}&create=true&partitions=1&tombstones=true"
    hub.start(db.dsn, ["orders"], delivery="outbox", name="mailer", backends=[url])
    db("INSERT INTO orders VALUES (1)")
    db("UPDATE orders SET id = 2")
    eventually(lambda: hub.status().backends[0].delivered, lambda count: count == 2, DEADLINE)
    found = read_all(kafka, prefix, 3)
    assert [(each.key(), each.value() is None) for each in found] == [
        (b"1", False),
        (b"2", False),
        (b"1", True),
    ]


def test_a_foreign_client_reads_it(kafka: Kafka, prefix: str) -> None:
    """Kafka's own consumer, in Java, has headers, key and data as they are documented."""
    broadcaster = KafkaBroadcaster.from_url(f"{kafka.url}?prefix={prefix}&create=true&partitions=1")
    event = make_event(1, "inserted", record=7, values={"text": "ħ😀"})
    broadcaster.publish([event])
    assert broadcaster.flush(DEADLINE)
    broadcaster.close()
    [found] = kafka.consume(f"{prefix}.public.conformance", 1)
    headers = dict(
        part.split(":", 1) for part in found["headers"].removeprefix("Headers:").split(",")
    )
    assert headers["ce_id"] == event.uid
    assert headers["ce_type"] == "pgsignals.inserted"
    assert headers["content-type"] == "application/json"
    assert found["key"] == "7"
    assert json.loads(found["value"])["values"] == {"text": "ħ😀"}


def test_a_far_hub_skips_tombstones_and_foreign_records(
    kafka: Kafka, prefix: str, hub: Hub, recorder: Recorder
) -> None:
    """Receivers get events alone; what pgsignals did not write is counted."""
    broadcaster = KafkaBroadcaster.from_url(
        f"{kafka.url}?prefix={prefix}&create=true&partitions=1&tombstones=true"
    )
    broadcaster.publish([make_event(0, "deleted")])
    assert broadcaster.flush(DEADLINE)
    hub.subscribe(recorder, "conformance")
    hub.start(f"{kafka.url}?prefix={prefix}", ["conformance"])
    broadcaster.publish([make_event(1, "deleted")])
    assert broadcaster.flush(DEADLINE)
    kafka.produce(f"{prefix}.public.conformance", "7\tjava\n")
    broadcaster.publish([make_event(2, "deleted")])
    assert broadcaster.flush(DEADLINE)
    broadcaster.close()
    assert [event.uid for event in recorder.wait(2)] == [make_event(n).uid for n in (1, 2)]
    assert hub.status().invalid == 1


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is taken to listen after a shorter time of refused connections."""
    monkeypatch.setattr("pgsignals_kafka.connection._REFUSED_SECONDS", 0.5)


@pytest.mark.usefixtures("impatient")
def test_a_broker_that_is_away(prefix: str) -> None:
    """No broker at the address is an error that says so, in time."""
    port = free_port()
    broadcaster = KafkaBroadcaster(f"127.0.0.1:{port}", prefix=prefix, timeout=1.0)
    with pytest.raises(BrokerError, match=rf"127.0.0.1:{port}.*nothing answers there"):
        broadcaster.flush(2.0)
    with pytest.raises(BrokerError, match="nothing answers there"):
        Hub().start(f"kafka://127.0.0.1:{port}/?prefix={prefix}", ["orders"])
    broadcaster.close()


def test_a_broker_that_is_slow(kafka: Kafka, prefix: str) -> None:
    """One that takes longer to answer than a look at the cause lasts is reached all the same."""
    with Proxy("127.0.0.1", kafka.port) as line:
        line.slow(delay=0.8)
        slow = kafka.url.replace(f":{kafka.port}", f":{line.port}")
        broadcaster = KafkaBroadcaster.from_url(f"{slow}?prefix={prefix}")
        assert broadcaster.flush(DEADLINE)
        broadcaster.close()


def test_a_topic_that_is_missing(kafka: Kafka, prefix: str) -> None:
    """Without create=true a missing topic is an error that names it and the fix."""
    broadcaster = KafkaBroadcaster.from_url(f"{kafka.url}?prefix={prefix}")
    with pytest.raises(BrokerError, match=rf"no topic {prefix}\.public\.conformance.*create=true"):
        broadcaster.publish([make_event(1)])
    broadcaster.close()


def test_a_wrong_password(kafka: Kafka, prefix: str) -> None:
    """A wrong password is an error that says so and does not show it; the right one works."""
    host = f"127.0.0.1:{kafka.sasl_port}"
    wrong = KafkaBroadcaster.from_url(f"kafka://ann:wr0ng-one@{host}/?prefix={prefix}")
    with pytest.raises(BrokerError, match="the user or the password is wrong") as caught:
        wrong.flush(10.0)
    assert "wr0ng-one" not in f"{caught.value} {wrong!r} {wrong}"
    wrong.close()
    right = KafkaBroadcaster.from_url(f"kafka://ann:{PASSWORD}@{host}/?prefix={prefix}")
    assert right.flush(DEADLINE)
    right.close()


def test_tls(kafka: Kafka, prefix: str) -> None:
    """TLS works with the authority given, and each kind of mismatch is told apart."""
    host = f"127.0.0.1:{kafka.tls_port}"
    good = KafkaBroadcaster.from_url(f"kafka://{host}/?prefix={prefix}&tls=true&ca={kafka.ca}")
    assert good.flush(DEADLINE)
    good.close()
    untrusted = KafkaBroadcaster.from_url(f"kafka://{host}/?prefix={prefix}&tls=true")
    with pytest.raises(BrokerError, match=r"TLS failed, see ca="):
        untrusted.flush(10.0)
    untrusted.close()
    plain = KafkaBroadcaster(f"127.0.0.1:{kafka.port}", prefix=prefix, tls=True, timeout=1.0)
    with pytest.raises(BrokerError, match=r"TLS failed|nothing answers"):
        plain.flush(5.0)
    plain.close()
    unencrypted = KafkaBroadcaster(host, prefix=prefix, timeout=1.0)
    with pytest.raises(BrokerError, match="tls=true"):
        unencrypted.flush(5.0)
    unencrypted.close()


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("prefx=a", "no option 'prefx'.*did you mean 'prefix'"),
        ("create=maybe", "create='maybe'.*true or false"),
        ("partitions=x", "partitions='x'.*a number"),
        ("prefix=a b", "prefix='a b'"),
        ("topic={table", "topic="),
        ("sasl=GSSAPI", "sasl='GSSAPI'.*PLAIN"),
    ],
)
def test_a_wrong_url(query: str, says: str) -> None:
    """A URL that cannot be is refused at start, with what is wrong and what is allowed."""
    with pytest.raises(ConfigurationError, match=says):
        Hub().start("", ["orders"], backends=[f"kafka://127.0.0.1:1/?{query}"])


@pytest.mark.usefixtures("impatient")
def test_receivers_work_without_the_broker(
    dsn: str, db: Database, hub: Hub, recorder: Recorder
) -> None:
    """With no broker there, start succeeds, receivers get events, and health has the error."""
    db("CREATE TABLE orders (id serial PRIMARY KEY)")
    hub.subscribe(recorder, "orders")
    url = f"kafka://127.0.0.1:{free_port()}/?prefix=shop"
    hub.start(dsn, ["orders"], backends=[url])
    db("INSERT INTO orders DEFAULT VALUES")
    recorder.wait(1)
    backend = eventually(lambda: hub.health().backends[0], lambda backend: bool(backend.error))
    assert backend.error
    assert "nothing answers there" in backend.error
    assert not backend.ready
    assert hub.health().ready
    hub.stop(0.5)


def test_a_gap_before_there_is_a_topic(kafka: Kafka, prefix: str) -> None:
    """A topic that is made after a Gap gets it before its first event, once, and all of several."""

    def kinds(table: str) -> list[str]:
        wanted = f"{prefix}.public.{table}"
        found = [each for each in read_all(kafka, prefix, total) if each.topic() == wanted]
        return [dict(each.headers() or [])["ce_type"].decode() for each in found]

    broadcaster = KafkaBroadcaster.from_url(f"{kafka.url}?prefix={prefix}&create=true&partitions=1")
    first, last = (
        Gap(*(datetime(2026, 1, day + n, tzinfo=timezone.utc) for n in (0, 1)), "retention")
        for day in (1, 5)
    )
    broadcaster.announce(first)
    assert broadcaster.flush(DEADLINE)
    broadcaster.publish([make_event(0)])
    assert broadcaster.flush(DEADLINE)
    total = 2
    assert kinds("conformance") == ["pgsignals.gap", "pgsignals.updated"]
    broadcaster.announce(last)
    broadcaster.publish([make_event(1), make_event(2, table="others"), make_event(3)])
    assert broadcaster.flush(DEADLINE)
    total = 7
    gap, updated = "pgsignals.gap", "pgsignals.updated"
    assert kinds("conformance") == [gap, updated, gap, updated, updated]
    assert kinds("others") == [gap, updated]
    [told] = [
        json.loads(each.value() or b"")
        for each in read_all(kafka, prefix, total)
        if each.topic() == f"{prefix}.public.others" and each.key() is None
    ]
    assert (told["since"][:10], told["until"][:10]) == ("2026-01-01", "2026-01-06")
    broadcaster.close()


def test_what_is_deleted_before_it_is_read_is_a_gap(
    kafka: Kafka, prefix: str, hub: Hub, recorder: Recorder
) -> None:
    """Records that retention has removed are announced, and reading goes on with what is there."""
    broadcaster = KafkaBroadcaster.from_url(f"{kafka.url}?prefix={prefix}&create=true&partitions=1")
    broadcaster.publish([make_event(0)])
    assert broadcaster.flush(DEADLINE)
    url = f"{kafka.url}?prefix={prefix}"
    hub.start(url, ["conformance"], name="late")
    hub.stop()
    broadcaster.publish([make_event(n) for n in range(1, 5)])
    assert broadcaster.flush(DEADLINE)
    admin = AdminClient({"bootstrap.servers": f"127.0.0.1:{kafka.port}"})
    place = TopicPartition(f"{prefix}.public.conformance", 0, 4)
    for answer in admin.delete_records([place]).values():
        answer.result(DEADLINE)
    gaps = Recorder()
    hub.on_gap(gaps)
    hub.subscribe(recorder, "conformance")
    hub.start(url, ["conformance"], name="late")
    [gap] = gaps.wait(1)
    assert (gap.reason, "from 4" in gap.detail) == ("retention", True)
    assert recorder.wait(1)[0].uid == make_event(4).uid
    broadcaster.close()


def test_new_partitions_are_read_from_their_beginning(
    kafka: Kafka, prefix: str, hub: Hub, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Partitions and topics that appear while somebody reads lose nothing."""
    monkeypatch.setattr("pgsignals_kafka.source.LOOK_SECONDS", 0.5)
    broadcaster = KafkaBroadcaster.from_url(f"{kafka.url}?prefix={prefix}&create=true&partitions=1")
    broadcaster.publish([make_event(0)])
    assert broadcaster.flush(DEADLINE)
    hub.subscribe(recorder, "conformance_2")
    hub.start(f"{kafka.url}?prefix={prefix}", ["conformance", "conformance_2"])
    broadcaster.publish([make_event(1, table="conformance_2")])
    assert broadcaster.flush(DEADLINE)
    recorder.wait(1)
    admin = AdminClient({"bootstrap.servers": f"127.0.0.1:{kafka.port}"})
    topic = f"{prefix}.public.conformance_2"
    for answer in admin.create_partitions([NewPartitions(topic, 4)]).values():
        answer.result(DEADLINE)
    # Another client, since the first one takes its time to see the partitions.
    late = KafkaBroadcaster.from_url(f"{kafka.url}?prefix={prefix}")
    late.publish([make_event(n, table="conformance_2", record=n) for n in range(2, 20)])
    assert late.flush(DEADLINE)
    assert len(recorder.wait(19)) == 19
    for each in (broadcaster, late):
        each.close()


def test_a_broker_that_restarts(tmp_path: Path, prefix: str) -> None:
    """Events published while the broker is away arrive when it is back, once each, in order."""
    own = Kafka()
    own.start()
    try:
        broadcaster = KafkaBroadcaster.from_url(
            f"{own.url}?prefix={prefix}&create=true&partitions=1"
            "&librdkafka.reconnect.backoff.max.ms=200"
        )
        broadcaster.publish([make_event(0)])
        assert broadcaster.flush(DEADLINE)
        own.stop()
        events = [make_event(n, record=n % 3) for n in range(1, 100)]
        for _ in range(2):
            broadcaster.publish(events)
            with pytest.raises(BrokerError, match="not acknowledged"):
                broadcaster.flush(1.0)
        own.start()
        while True:
            try:
                broadcaster.publish(events)
                if broadcaster.flush(DEADLINE):
                    break
            except BrokerError:
                continue
        broadcaster.close()
        found = [from_cloudevent(*as_written(each)).uid for each in read_all(own, prefix, 100)]
        assert found == [event.uid for event in [make_event(0), *events]]
    finally:
        own.close()
