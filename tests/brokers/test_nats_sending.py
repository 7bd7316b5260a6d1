"""What NATS is sent as a chain: all of it, in order, and as fast, whatever gets in between."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import nats
import pytest

from pgsignals import BrokerError, Event
from pgsignals.broadcasters import Pipelined
from pgsignals.testing.conformance import DEADLINE, TABLE, make_event
from pgsignals_nats import NatsBroadcaster, sending
from tests.brokers import Nats
from tests.proxy import Proxy
from tests.waiting import eventually

# So many records, whose events come in turn.
RECORDS = 700


def events(count: int, first: int = 0, **options: Any) -> list[Event]:
    """Events whose records take turns."""
    return [
        make_event(number, record=number % RECORDS, **options)
        for number in range(first, first + count)
    ]


def on_stream(server: Nats, work: Callable[[Any], Awaitable[Any]]) -> Any:
    """Have nats-py do something with JetStream."""

    async def do() -> Any:
        client = await nats.connect(server.url)
        try:
            return await work(client.jetstream())
        finally:
            await client.close()

    return asyncio.run(do())


def stored(server: Nats, prefix: str) -> list[Any]:
    """The messages that the stream has, in its order."""

    async def read(jetstream: Any) -> list[Any]:
        info = await jetstream.stream_info(prefix)
        subscription = await jetstream.subscribe(
            f"{prefix}.>", ordered_consumer=True, pending_bytes_limit=-1
        )
        return [await subscription.next_msg(DEADLINE) for _ in range(info.state.messages)]

    found: list[Any] = on_stream(server, read)
    return found


def ids(messages: Sequence[Any]) -> list[str]:
    """The ids of those messages that are events."""
    return [message.headers["ce-id"] for message in messages if message.headers]


def in_order(found: Sequence[str], sent: Sequence[Event]) -> bool:
    """Whether each event is there once, behind the event of its record that was sent before it."""
    places = {uid: place for place, uid in enumerate(found)}
    assert Counter(found) == Counter(event.uid for event in sent)
    latest: dict[Any, int] = {}
    for event in sent:
        place = places[event.uid]
        if place < latest.get(event.id, -1):
            return False
        latest[event.id] = place
    return True


def flush(broadcaster: NatsBroadcaster, sent: Sequence[Event]) -> None:
    """Have the broker acknowledge events, however often it takes."""

    def arrived() -> bool:
        try:
            broadcaster.publish(sent)
            return broadcaster.flush(5.0)
        except BrokerError:
            return False

    eventually(arrived, bool)


@pytest.fixture
def broadcaster(nats_server: Nats, prefix: str) -> Iterator[NatsBroadcaster]:
    """One with a stream of the test's own."""
    made = NatsBroadcaster.from_url(f"{nats_server.url}?prefix={prefix}&create=true")
    yield made
    made.close()


def test_all_is_stored_in_the_order_of_publishing(
    broadcaster: NatsBroadcaster, nats_server: Nats, prefix: str
) -> None:
    """While nobody gets in between, even events of different records keep their order."""
    sent = events(5_000)
    broadcaster.publish(sent[:1_200])
    broadcaster.publish(sent[1_200:])
    assert broadcaster.flush(DEADLINE)
    assert ids(stored(nats_server, prefix)) == [event.uid for event in sent]


def test_few_messages_are_acknowledged(
    broadcaster: NatsBroadcaster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server answers for many messages at once."""
    answers: list[str] = []
    heard = sending.Sender.acknowledged

    async def count(self: sending.Sender, message: Any) -> None:
        answers.append(message.subject)
        await heard(self, message)

    monkeypatch.setattr(sending.Sender, "acknowledged", count)
    broadcaster.publish(events(4_001))
    assert broadcaster.flush(DEADLINE)
    assert len(answers) < 20


def test_events_are_counted_as_they_arrive(broadcaster: NatsBroadcaster) -> None:
    """``arrived`` tells of each event once, without a flush."""
    assert isinstance(broadcaster, Pipelined)
    found = 0
    for first in range(0, 3_000, 500):
        broadcaster.publish(events(500, first))
        found += broadcaster.arrived(0.0)
    while found < 3_000:
        more = broadcaster.arrived(DEADLINE)
        assert more
        found += more
    assert found == 3_000
    assert broadcaster.arrived(0.0) == 0
    assert broadcaster.flush(DEADLINE)


def test_what_is_refused_is_not_overtaken(
    broadcaster: NatsBroadcaster, nats_server: Nats, prefix: str
) -> None:
    """What is behind a refused event is given up with it, and arrives behind it later."""
    subject = f"{prefix}.public.{TABLE}.updated"
    on_stream(nats_server, lambda js: js.add_stream(name=prefix, subjects=[subject]))
    sent = [*events(10), make_event(10, op="inserted", record=RECORDS), *events(20, 11)]
    broadcaster.publish(sent)

    counted = 0

    def count() -> None:
        nonlocal counted
        while True:
            counted += broadcaster.arrived(DEADLINE)

    with pytest.raises(BrokerError, match=r"no stream takes the subject .*\.inserted"):
        count()
    assert counted <= 10
    assert ids(stored(nats_server, prefix)) == [event.uid for event in sent[:10]]
    on_stream(nats_server, lambda js: js.update_stream(name=prefix, subjects=[f"{prefix}.>"]))
    flush(broadcaster, sent)
    assert in_order(ids(stored(nats_server, prefix)), sent)


def test_somebody_else_writes_to_the_stream(
    broadcaster: NatsBroadcaster, nats_server: Nats, prefix: str
) -> None:
    """Each event is there once and in its record's order, wherever other messages come."""
    flush(broadcaster, [])
    done, writing = threading.Event(), threading.Event()

    async def disturb(jetstream: Any) -> None:
        while not done.is_set():
            await jetstream.publish(f"{prefix}.other", b"")
            writing.set()

    stranger = threading.Thread(target=on_stream, args=(nats_server, disturb))
    stranger.start()
    assert writing.wait(DEADLINE)
    sent = events(5_000)
    try:
        for first in range(0, 5_000, 100):
            broadcaster.publish(sent[first : first + 100])
        assert broadcaster.flush(DEADLINE)
    finally:
        done.set()
        stranger.join(DEADLINE)
    assert in_order(ids(stored(nats_server, prefix)), sent)


def test_what_another_process_has_sent(
    broadcaster: NatsBroadcaster, nats_server: Nats, prefix: str
) -> None:
    """Events that are there, at the beginning or in the middle, are not stored again."""
    sent = events(3_000)
    former = NatsBroadcaster.from_url(f"{nats_server.url}?prefix={prefix}&create=true")
    flush(former, sent[:700])
    flush(former, sent[1_400:1_402])
    former.close()
    broadcaster.publish(sent)
    assert broadcaster.flush(DEADLINE)
    found = ids(stored(nats_server, prefix))
    assert Counter(found) == Counter(event.uid for event in sent)


def test_messages_of_all_lengths(
    broadcaster: NatsBroadcaster, nats_server: Nats, prefix: str
) -> None:
    """One that has no room for the name of the one before it goes as it is."""
    most = 2_000
    on_stream(
        nats_server,
        lambda js: js.add_stream(name=prefix, subjects=[f"{prefix}.>"], max_msg_size=most),
    )
    sent = [
        make_event(number, op="inserted", record=number % RECORDS, values={"text": number * "a"})
        for number in range(1_000, 1_600)
    ]
    broadcaster.publish(sent)
    assert broadcaster.flush(DEADLINE)
    found = stored(nats_server, prefix)
    assert ids(found) == [event.uid for event in sent]
    whole = [message for message in found if b"truncated" not in message.data]
    longest = max(len(message.data) for message in whole)
    headers = [f"{name}: {text}\r\n" for name, text in whole[-1].headers.items()]
    length = longest + len("NATS/1.0\r\n\r\n") + len("".join(headers))
    assert most - 64 < length <= most
    assert "Nats-Expected-Last-Msg-Id" not in whole[-1].headers


def test_a_server_that_is_silent_for_too_long(
    nats_server: Nats,
    broadcaster: NatsBroadcaster,
    prefix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was not acknowledged is an error, and is there once when it is published again."""
    monkeypatch.setattr(sending, "_ACK_SECONDS", 0.2)
    sent = events(3_000)
    flush(broadcaster, sent[:1])
    nats_server.freeze()
    try:
        broadcaster.publish(sent)
        with pytest.raises(BrokerError, match=r"no acknowledgement in 0\.2 s"):
            broadcaster.flush(0.5)
    finally:
        nats_server.thaw()
    monkeypatch.setattr(sending, "_ACK_SECONDS", DEADLINE)
    flush(broadcaster, sent)
    assert in_order(ids(stored(nats_server, prefix)), sent)


def test_a_nats_py_without_the_method_that_is_not_public(
    broadcaster: NatsBroadcaster,
    nats_server: Nats,
    prefix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All is sent by its public ones then, with the same headers."""
    sent = events(1_200)
    broadcaster.publish(sent[:600])
    assert broadcaster.flush(DEADLINE)
    monkeypatch.setattr(sending, "_WRITE", "_of_another_version")
    broadcaster.publish(sent[600:])
    assert broadcaster.flush(DEADLINE)
    found = stored(nats_server, prefix)
    assert ids(found) == [event.uid for event in sent]
    assert found[100].headers.keys() == found[700].headers.keys()
    assert found[100].headers["Nats-Expected-Last-Msg-Id"] == sent[99].uid


@pytest.mark.parametrize("before", [0, 1, 7, 60])
def test_what_comes_late_from_a_connection_that_was_given_up(
    nats_server: Nats, prefix: str, broadcaster: NatsBroadcaster, before: int
) -> None:
    """Messages that a network held back do not come behind later ones of their record."""
    sent = events(1_500)
    with Proxy("127.0.0.1", nats_server.port) as proxy:
        url = f"nats://127.0.0.1:{proxy.port}/?prefix={prefix}&create=true"
        former = NatsBroadcaster.from_url(url)
        former.publish(sent[:20])
        assert former.flush(DEADLINE)
        proxy.stall()
        former.publish(sent[20:])
        former.close()
        # What the former has sent is a chain; this one finds duplicates, and sends by itself first.
        for first in range(0, before, 10):
            flush(broadcaster, sent[first : min(first + 10, before)])
        broadcaster.publish(sent[before:])
        proxy.resume()
        assert broadcaster.flush(DEADLINE)
    assert in_order(ids(stored(nats_server, prefix)), sent)
