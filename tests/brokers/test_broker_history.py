"""Positions at a broker that outlive what they point into: nothing is skipped in silence."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import nats
import pytest
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient, NewPartitions, NewTopic

import pgsignals
from pgsignals import BrokerError, Event, Hub
from pgsignals.broadcasters import Broadcaster
from pgsignals.dispatch.forwarder import FLUSH_SECONDS
from pgsignals.sources import Wanted
from pgsignals.testing.conformance import DEADLINE, TABLE, _Sink, make_event
from pgsignals_kafka import KafkaBroadcaster
from pgsignals_nats import NatsBroadcaster, NatsSource
from tests.brokers import Kafka, Nats, Process
from tests.conftest import Recorder
from tests.waiting import eventually

WANTED = [Wanted(TABLE, "public", ("inserted", "updated", "deleted"))]
Work = Callable[[Any], Awaitable[Any]]


def events(*numbers: int, record: int | None = None) -> list[Event]:
    return [make_event(number, record=record or number) for number in numbers]


def send(broadcaster: Broadcaster, *numbers: int, record: int | None = None) -> None:
    """Have the broker acknowledge events of these numbers, however often it takes."""
    found = events(*numbers, record=record)

    def arrived() -> bool:
        try:
            broadcaster.publish(found)
            return broadcaster.flush(FLUSH_SECONDS)
        except BrokerError:
            return False

    eventually(arrived, bool)


class Reader:
    """A Hub that reads from a broker, what its receiver gets, and the Gaps that it announces."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.got = Recorder()
        self.gaps = Recorder()
        hub.on_gap(self.gaps)

    def start(self, url: str, name: str | None = "mailer", **options: Any) -> None:
        """Read, by default with a name, again too."""
        self.hub.start(url, [TABLE], name=name, **options)

    def stop(self) -> None:
        """Read no more."""
        self.hub.stop()

    def has_all(self, *numbers: int) -> None:
        """Wait until the receiver has got these."""
        wanted = {make_event(number).uid for number in numbers}
        eventually(lambda: wanted - {event.uid for event in self.got.items}, lambda left: not left)

    @property
    def reasons(self) -> list[str]:
        """Those of the Gaps so far."""
        return [gap.reason for gap in self.gaps.items]


@pytest.fixture
def reader(hub: Hub) -> Reader:
    """A Hub with a receiver, which is stopped at the end."""
    made = Reader(hub)
    hub.subscribe(made.got, TABLE)
    return made


def on_stream(server: Nats, work: Work) -> Any:
    """Have nats-py do something with JetStream."""

    async def do() -> Any:
        client = await nats.connect(server.url)
        try:
            return await work(client.jetstream())
        finally:
            await client.close()

    return asyncio.run(do())


def stored(server: Nats, prefix: str) -> list[str]:
    """The ids of the events that the stream has, in its order."""

    async def read(jetstream: Any) -> list[str]:
        info = await jetstream.stream_info(prefix)
        subscription = await jetstream.subscribe(f"{prefix}.>", ordered_consumer=True)
        found = [await subscription.next_msg(DEADLINE) for _ in range(info.state.messages)]
        return [message.headers["ce-id"] for message in found]

    found: list[str] = on_stream(server, read)
    return found


def uids(*numbers: int) -> list[str]:
    return [make_event(number).uid for number in numbers]


@pytest.fixture
def url(nats_server: Nats, prefix: str) -> str:
    """Where a stream of the test's own is, or will be."""
    return f"{nats_server.url}?prefix={prefix}"


@pytest.fixture
def own() -> Iterator[Nats]:
    """A nats-server that nobody else uses."""
    server = Nats()
    server.start()
    yield server
    server.close()


@pytest.fixture
def broadcaster_to() -> Iterator[Callable[[str], NatsBroadcaster]]:
    """Makes broadcasters, which make their streams, and are closed at the end."""
    made: list[NatsBroadcaster] = []

    def make(url: str) -> NatsBroadcaster:
        made.append(NatsBroadcaster.from_url(f"{url}&create=true"))
        return made[-1]

    yield make
    for each in made:
        each.close()


def back_up(server: Process) -> None:
    server.stop()
    shutil.copytree(server.folder / "data", server.folder / "backup")
    server.start()


def emptied(server: Nats, prefix: str) -> None:
    server.stop()
    shutil.rmtree(server.folder / "data")
    server.start()


def put_back(server: Process, prefix: str) -> None:
    server.stop()
    shutil.rmtree(server.folder / "data")
    shutil.copytree(server.folder / "backup", server.folder / "data")
    server.start()


def made_anew(server: Nats, prefix: str) -> None:
    async def make_anew(jetstream: Any) -> None:
        await jetstream.delete_stream(prefix)
        await jetstream.add_stream(name=prefix, subjects=[f"{prefix}.>"])

    on_stream(server, make_anew)


@pytest.mark.parametrize("name", ["mailer", None])
@pytest.mark.parametrize("happens", [emptied, put_back, made_anew])
def test_another_stream_in_its_place(
    own: Nats,
    prefix: str,
    reader: Reader,
    broadcaster_to: Callable[[str], NatsBroadcaster],
    happens: Callable[[Nats, str], None],
    name: str | None,
) -> None:
    """Whoever reads on gets all that is sent afterwards, of the same numbers too, and a Gap."""
    url = f"{own.url}?prefix={prefix}"
    broadcaster = broadcaster_to(url)
    send(broadcaster, 1, 2)
    back_up(own)
    reader.start(url, name)
    send(broadcaster, *range(3, 23))
    reader.has_all(*range(3, 23))
    happens(own, prefix)
    send(broadcaster, *range(23, 53))
    reader.has_all(*range(23, 53))
    [gap, *_] = reader.gaps.wait_until(lambda gap: gap.reason == "restored")[::-1]
    assert prefix in gap.detail
    assert gap.since <= gap.until


def test_who_was_away_hears_of_another_stream(
    own: Nats,
    prefix: str,
    reader: Reader,
    broadcaster_to: Callable[[str], NatsBroadcaster],
) -> None:
    """A sender that finds an older state of its stream leaves a Gap there for all names."""
    url = f"{own.url}?prefix={prefix}"
    broadcaster = broadcaster_to(url)
    send(broadcaster, 1)
    reader.start(url)
    reader.stop()
    back_up(own)
    send(broadcaster, 2, 3)
    put_back(own, prefix)
    send(broadcaster, 4)
    reader.start(url)
    reader.has_all(4)
    assert "restored" in reader.reasons


@pytest.mark.parametrize("read", [0, 3])
def test_a_consumer_that_somebody_deletes(
    nats_server: Nats,
    prefix: str,
    url: str,
    reader: Reader,
    broadcaster_to: Callable[[str], NatsBroadcaster],
    read: int,
) -> None:
    """The reader makes it anew at the place that it had, also where nothing had been read yet."""
    made_anew_or_first(nats_server, prefix)
    reader.start(url)
    broadcaster = broadcaster_to(url)
    send(broadcaster, *range(1, 1 + read))
    reader.has_all(*range(1, 1 + read))
    on_stream(nats_server, lambda jetstream: jetstream.delete_consumer(prefix, "mailer"))
    send(broadcaster, *range(10, 15))
    reader.has_all(*range(10, 15))
    assert reader.reasons == ["unknown_name"]  # Of the first start.


def made_anew_or_first(server: Nats, prefix: str) -> None:
    on_stream(server, lambda js: js.add_stream(name=prefix, subjects=[f"{prefix}.>"]))


@pytest.mark.parametrize("happens", ["a stream made anew", "a consumer deleted"])
def test_a_place_that_is_gone_when_its_name_comes_back(
    nats_server: Nats,
    prefix: str,
    url: str,
    reader: Reader,
    broadcaster_to: Callable[[str], NatsBroadcaster],
    happens: str,
) -> None:
    """A name that the server does not know, as one that is new, begins now, with a Gap."""
    broadcaster = broadcaster_to(url)
    send(broadcaster, 1)
    reader.start(url)
    send(broadcaster, 2)
    reader.has_all(2)
    reader.stop()
    reader.gaps.items.clear()
    if happens == "a stream made anew":
        made_anew(nats_server, prefix)
    else:
        on_stream(nats_server, lambda js: js.delete_consumer(prefix, "mailer"))
    send(broadcaster, 3)
    reader.start(url)
    send(broadcaster, 4)
    reader.has_all(4)
    assert reader.gaps.wait(1)[0].reason == "unknown_name"


def test_a_purge_of_what_receivers_had_no_time_for(
    nats_server: Nats,
    prefix: str,
    url: str,
    hub: Hub,
    broadcaster_to: Callable[[str], NatsBroadcaster],
) -> None:
    """The server takes what is purged for read; the reader knows that it is not."""
    broadcaster = broadcaster_to(url)
    send(broadcaster, 0)
    busy, go_on, reader = threading.Event(), threading.Event(), Reader(hub)

    @hub.on(TABLE)
    def slow(event: pgsignals.Event) -> None:
        busy.set()
        go_on.wait(DEADLINE)
        reader.got(event)

    reader.start(url, queue_size=10)
    send(broadcaster, *range(1, 1501))
    assert busy.wait(DEADLINE)
    on_stream(nats_server, lambda jetstream: jetstream.purge_stream(prefix))
    go_on.set()
    reader.gaps.wait_until(lambda gap: gap.reason == "retention")
    send(broadcaster, 2000)
    reader.has_all(2000)


def test_what_was_read_of_a_former_stream_is_not_acknowledged(
    nats_server: Nats,
    prefix: str,
    url: str,
    broadcaster_to: Callable[[str], NatsBroadcaster],
) -> None:
    """Receivers that return late do not take what has the same number in the new stream."""
    broadcaster = broadcaster_to(url)
    send(broadcaster, 0)
    made_anew(nats_server, prefix)
    stuck = _Sink(settles=False)
    source = NatsSource.from_url(url)
    source.start(WANTED, "mailer", stuck)
    send(broadcaster, 1)
    [settled] = eventually(lambda: stuck._unsettled, bool)
    made_anew(nats_server, prefix)
    send(broadcaster, 2)
    stuck.wait(1, 2)
    settled()
    source.stop(DEADLINE)
    source.close(DEADLINE)
    consumer = on_stream(nats_server, lambda js: js.consumer_info(prefix, "mailer"))
    assert consumer.num_ack_pending == 1


def test_a_duplicate_of_what_is_purged_is_stored(
    nats_server: Nats, prefix: str, url: str, broadcaster_to: Callable[[str], NatsBroadcaster]
) -> None:
    """What the server acknowledges as there, and has no more, is sent once more, and only once."""
    send(broadcaster_to(url), 1, 2)
    on_stream(nats_server, lambda jetstream: jetstream.purge_stream(prefix))
    for _ in range(2):
        send(broadcaster_to(url), 1, 2)
        assert sorted(stored(nats_server, prefix)) == uids(1, 2)
    on_stream(nats_server, lambda jetstream: jetstream.purge_stream(prefix))
    send(broadcaster_to(url), 1, 2, 3)
    assert sorted(stored(nats_server, prefix)) == uids(1, 2, 3)


def test_a_uid_that_another_event_had(
    nats_server: Nats, prefix: str, url: str, broadcaster_to: Callable[[str], NatsBroadcaster]
) -> None:
    """An event of a database that was put back, which gives uids again, is no duplicate."""
    send(broadcaster_to(url), 1)
    other = make_event(1)
    other._message.at_us += 60_000_000
    again = broadcaster_to(url)
    again.publish([other])
    assert again.flush(DEADLINE)
    assert stored(nats_server, prefix) == uids(1, 1)


def test_a_record_keeps_its_order_when_a_part_is_purged(
    nats_server: Nats, prefix: str, url: str, broadcaster_to: Callable[[str], NatsBroadcaster]
) -> None:
    """The latest of a record stays the last, and what belongs to other records is not repeated."""
    first = broadcaster_to(url)
    send(first, 1, 2, 3, record=7)
    send(first, 4)
    on_stream(nats_server, lambda jetstream: jetstream.purge_stream(prefix, seq=3))
    again = broadcaster_to(url)
    again.publish([*events(1, 2, 3, record=7), *events(4)])
    assert again.flush(DEADLINE)
    assert stored(nats_server, prefix) == uids(3, 4, 1, 2, 3)


def test_what_was_acknowledged_and_not_flushed_is_sent_again(
    own: Nats, prefix: str, broadcaster_to: Callable[[str], NatsBroadcaster]
) -> None:
    """A broadcaster that has yet to say that events have arrived sends them to the new stream."""
    broadcaster = broadcaster_to(f"{own.url}?prefix={prefix}")
    broadcaster.publish(events(1, 2))
    eventually(lambda: broadcaster._ledger.unacknowledged, lambda left: not left)
    emptied(own, prefix)
    send(broadcaster, 1, 2)
    found = stored(own, prefix)
    assert [uid for uid in found if uid in uids(1, 2)] == uids(1, 2)
    assert len(found) == 3  # With the Gap.


def test_a_stream_that_is_deleted_is_made_anew(
    nats_server: Nats, prefix: str, url: str, broadcaster_to: Callable[[str], NatsBroadcaster]
) -> None:
    """With create=true that needs no connection to be lost."""
    broadcaster = broadcaster_to(url)
    send(broadcaster, 1)
    on_stream(nats_server, lambda jetstream: jetstream.delete_stream(prefix))
    send(broadcaster, 2)
    assert make_event(2).uid in stored(nats_server, prefix)


def test_a_stream_that_forgets_what_was_read_gets_nothing_twice(
    nats_server: Nats, prefix: str, url: str, broadcaster_to: Callable[[str], NatsBroadcaster]
) -> None:
    """Where messages go when they are read, a duplicate is one."""
    on_stream(
        nats_server,
        lambda js: js.add_stream(name=prefix, subjects=[f"{prefix}.>"], retention="workqueue"),
    )
    send(broadcaster_to(url), 1)

    async def take(jetstream: Any) -> None:
        subscription = await jetstream.pull_subscribe("", "worker", stream=prefix)
        [message] = await subscription.fetch(1)
        await message.ack_sync()

    on_stream(nats_server, take)
    send(broadcaster_to(url), 1)
    assert stored_count(nats_server, prefix) == 0


def stored_count(server: Nats, prefix: str) -> int:
    async def count(jetstream: Any) -> int:
        found: int = (await jetstream.stream_info(prefix)).state.messages
        return found

    found: int = on_stream(server, count)
    return found


@pytest.fixture
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers from Kafka notice sooner what has become of topics and of brokers."""
    monkeypatch.setattr("pgsignals_kafka.source.LOOK_SECONDS", 0.5)


class Topics:
    """Does to a prefix's one topic what administrators do."""

    def __init__(self, kafka: Kafka, prefix: str) -> None:
        self.name = f"{prefix}.public.{TABLE}"
        self.admin = AdminClient({"bootstrap.servers": f"127.0.0.1:{kafka.port}"})

    @staticmethod
    def wait(answers: dict[Any, Any]) -> None:
        for answer in answers.values():
            answer.result(DEADLINE)

    def make(self) -> None:
        """Make it with one partition, once a former one is gone."""

        def made() -> bool:
            try:
                self.wait(self.admin.create_topics([NewTopic(self.name, 1, 1)]))
            except KafkaException:
                return False
            return True

        eventually(made, bool)

    def make_anew(self) -> None:
        self.wait(self.admin.delete_topics([self.name]))
        self.make()

    def forget(self, group: str) -> None:
        self.wait(self.admin.delete_consumer_groups([group]))

    def grow(self, count: int) -> None:
        self.wait(self.admin.create_partitions([NewPartitions(self.name, count)]))


@pytest.fixture
def topics(kafka: Kafka, prefix: str) -> Topics:
    """A topic of the test's own."""
    found = Topics(kafka, prefix)
    found.make()
    return found


@pytest.fixture
def to_kafka() -> Iterator[Callable[[str], KafkaBroadcaster]]:
    """Makes broadcasters that are closed at the end."""
    made: list[KafkaBroadcaster] = []

    def make(url: str) -> KafkaBroadcaster:
        made.append(KafkaBroadcaster.from_url(url))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.usefixtures("looks_often")
@pytest.mark.parametrize("name", [None, "mailer"])
def test_a_topic_made_anew(
    kafka: Kafka,
    prefix: str,
    topics: Topics,
    reader: Reader,
    to_kafka: Callable[[str], KafkaBroadcaster],
    name: str | None,
) -> None:
    """Whoever reads on gets all of the new one, which librdkafka takes for the old, and a Gap."""
    url = f"{kafka.url}?prefix={prefix}"
    reader.start(url, name and f"{name}-{prefix}")
    broadcaster = to_kafka(url)
    send(broadcaster, *range(5))
    reader.has_all(*range(5))
    topics.make_anew()
    send(broadcaster, *range(10, 30))
    reader.has_all(*range(10, 30))
    gap = reader.gaps.wait_until(lambda gap: gap.reason == "restored")[-1]
    assert topics.name in gap.detail


def test_an_offset_of_a_former_topic(
    kafka: Kafka,
    prefix: str,
    topics: Topics,
    reader: Reader,
    to_kafka: Callable[[str], KafkaBroadcaster],
) -> None:
    """What a member committed too late, to the new topic, is not where the next one begins."""
    url, group = f"{kafka.url}?prefix={prefix}", f"mailer-{prefix}"
    broadcaster = to_kafka(url)
    reader.start(url, group)
    send(broadcaster, *range(5))
    reader.has_all(*range(5))
    topics.make_anew()
    reader.stop()
    send(broadcaster, *range(10, 30))
    reader.start(url, group)
    reader.has_all(*range(10, 30))
    assert "restored" in reader.reasons


def test_a_group_that_the_brokers_have_forgotten(
    kafka: Kafka,
    prefix: str,
    topics: Topics,
    reader: Reader,
    to_kafka: Callable[[str], KafkaBroadcaster],
) -> None:
    """It begins now, as one that is new, with a Gap."""
    url, group = f"{kafka.url}?prefix={prefix}", f"mailer-{prefix}"
    broadcaster = to_kafka(url)
    reader.start(url, group)
    send(broadcaster, 1)
    reader.has_all(1)
    reader.stop()
    reader.gaps.items.clear()
    topics.forget(group)
    send(broadcaster, 2)
    reader.start(url, group)
    send(broadcaster, 3)
    reader.has_all(3)
    [gap] = reader.gaps.wait(1)
    assert (gap.reason, topics.name in gap.detail) == ("unknown_name", True)


def test_partitions_that_came_while_nobody_read(
    kafka: Kafka,
    prefix: str,
    topics: Topics,
    reader: Reader,
    to_kafka: Callable[[str], KafkaBroadcaster],
) -> None:
    """A group that knows the topic reads them from their beginning."""
    url, group = f"{kafka.url}?prefix={prefix}", f"mailer-{prefix}"
    send(to_kafka(url), 1)
    reader.start(url, group)
    reader.stop()
    reader.gaps.items.clear()
    topics.grow(4)
    # Another one, since the first takes its time to see the partitions.
    send(to_kafka(url), *range(2, 20))
    reader.start(url, group)
    reader.has_all(*range(2, 20))
    assert not reader.gaps.items
    assert make_event(1).uid not in [event.uid for event in reader.got.items]


@pytest.mark.usefixtures("looks_often")
def test_brokers_put_back_to_an_older_state(
    prefix: str,
    reader: Reader,
    to_kafka: Callable[[str], KafkaBroadcaster],
) -> None:
    """Readers with and without a name, and a sender, go on, though librdkafka would wait for ever.

    All are told of a Gap.
    """
    own, other = Kafka(), Reader(Hub())
    other.hub.subscribe(other.got, TABLE)
    try:
        own.start()
        Topics(own, prefix).make()
        url = f"{own.url}?prefix={prefix}&librdkafka.reconnect.backoff.max.ms=200"
        broadcaster = to_kafka(url)
        send(broadcaster, *range(5))
        back_up(own)
        reader.start(url, None)
        other.start(url)
        send(broadcaster, *range(10, 20))
        for each in (reader, other):
            each.has_all(*range(10, 20))
        put_back(own, prefix)
        send(broadcaster, *range(20, 50))
        for each in (reader, other):
            each.has_all(*range(20, 50))
            each.gaps.wait_until(lambda gap: gap.reason == "restored")
    finally:
        reader.stop()
        other.stop()
        own.close()
