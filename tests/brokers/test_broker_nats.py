"""NATS JetStream: what goes there, what comes back, and what happens when it is not there."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

import nats
import pytest

import pgsignals
from pgsignals import BrokerError, Hub
from pgsignals.testing.conformance import (
    DEADLINE,
    BroadcasterConformance,
    SourceConformance,
    make_event,
)
from pgsignals_nats import NatsBroadcaster, NatsSource
from tests.brokers import Nats, free_port
from tests.conftest import Database, Recorder
from tests.redelivery import shorten_ack_wait


def read_all(server: Nats, prefix: str, count: int) -> list[tuple[Mapping[str, str], bytes]]:
    """The first messages of the stream, by nats-py alone."""

    async def read() -> list[tuple[Mapping[str, str], bytes]]:
        client = await nats.connect(server.url)
        jetstream = client.jetstream()
        subscription = await jetstream.subscribe(f"{prefix}.>", ordered_consumer=True)
        found = []
        while len(found) < count:
            message = await subscription.next_msg(DEADLINE)
            headers = message.headers or {}
            attributes = {
                name.lower().removeprefix("ce-"): unquote(text)
                for name, text in headers.items()
                if name.lower().startswith("ce-")
            }
            assert headers["Nats-Msg-Id"] == attributes["id"]
            found.append((attributes, message.data))
        await client.close()
        return found

    return asyncio.run(read())


class TestConformance(BroadcasterConformance):
    """The broadcaster is one."""

    @pytest.fixture
    def broadcaster(self, nats_server: Nats, prefix: str) -> NatsBroadcaster:
        return NatsBroadcaster.from_url(f"{nats_server.url}?prefix={prefix}&create=true")

    @pytest.fixture
    def written(self, nats_server: Nats, prefix: str) -> Callable[[int], Sequence[Any]]:
        return lambda count: read_all(nats_server, prefix, count)

    @pytest.fixture
    def too_long(self) -> int:
        return 2_000_000


class TestSourceConformance(SourceConformance):
    """The source is one."""

    @pytest.fixture
    def broadcaster(self, nats_server: Nats, prefix: str) -> NatsBroadcaster:
        return NatsBroadcaster.from_url(f"{nats_server.url}?prefix={prefix}&create=true")

    @pytest.fixture
    def make_source(self, nats_server: Nats, prefix: str) -> Callable[[], NatsSource]:
        def make() -> NatsSource:
            # What a source that has gone did not acknowledge comes after this time, not 30 s.
            shorten_ack_wait(nats_server, prefix, 3.0)
            return NatsSource.from_url(f"{nats_server.url}?prefix={prefix}")

        return make


def test_a_server_that_is_away(prefix: str) -> None:
    """No server at the address is an error that says so."""
    broadcaster = NatsBroadcaster.from_url(f"nats://127.0.0.1:{free_port()}/?prefix={prefix}")
    with pytest.raises(BrokerError, match="nothing listens there"):
        broadcaster.flush(2.0)
    broadcaster.close()


def test_a_stream_that_is_missing(nats_server: Nats, prefix: str) -> None:
    """Without create=true a missing stream is an error that names it and the fix."""
    url = f"{nats_server.url}?prefix={prefix}"
    broadcaster = NatsBroadcaster.from_url(url)
    with pytest.raises(BrokerError, match=rf"no stream {prefix}\..*create=true"):
        broadcaster.publish([make_event(1)])
    broadcaster.close()
    with pytest.raises(BrokerError, match=rf"no stream {prefix}\."):
        Hub().start(url, ["orders"])


def test_a_backfill(nats_server: Nats, prefix: str, dsn: str, db: Database, hub: Hub) -> None:
    """Snapshots go through the broker to receivers elsewhere, with the values of all watchers."""
    db("CREATE TABLE users (id int PRIMARY KEY, name text, age int)")
    db("INSERT INTO users SELECT n, 'user ' || n, n FROM generate_series(1, 300) AS n")
    watchers = [
        pgsignals.watch("public.users", "updated", columns=["name"]),
        pgsignals.watch("public.users", "inserted", extra=["age"]),
    ]
    url = f"{nats_server.url}?prefix={prefix}"
    maker = NatsBroadcaster.from_url(f"{url}&create=true")
    maker.publish([make_event(1)])
    assert maker.flush(DEADLINE)
    maker.close()
    far = Hub()
    everything, snapshots, updates = Recorder(), Recorder(), Recorder()
    far.on("users")(everything)
    far.on("users", "snapshot", age=7)(snapshots)
    far.on("users", "updated")(updates)
    hub.start(dsn, watchers, delivery="outbox", name="mailer", backends=[url])
    try:
        far.start(url, watchers)
        assert hub.backfill("public.users", name="mailer/nats").wait(30)
        events = everything.wait(300)
        assert [event.id for event in events] == list(range(1, 301))
        assert {event.op for event in events} == {"snapshot"}
        [event] = snapshots.wait(1)
        assert (event.id, event.values) == (7, {"name": "user 7", "age": 7})
        db("UPDATE users SET name = 'last' WHERE id = 1")
        [event] = updates.wait(1)
        assert event.id == 1
    finally:
        far.stop()


def test_a_server_without_tls_is_told_nothing(prefix: str) -> None:
    """With tls=true the password does not go to a server that offers no TLS."""
    heard = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def listen() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b'INFO {"server_id":"a","max_payload":1048576}\r\n')
                while piece := connection.recv(1024):
                    heard.extend(piece)

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        url = f"nats://ann:s3cret@127.0.0.1:{port}/?prefix={prefix}&tls=true"
        broadcaster = NatsBroadcaster.from_url(url)
        with pytest.raises(BrokerError, match="the server has no TLS"):
            broadcaster.flush(5.0)
        broadcaster.close()
        thread.join(DEADLINE)
    assert not thread.is_alive()
    assert bytes(heard) == b""


def on_stream(server: Nats, work: Callable[[Any], Any]) -> None:
    """Have nats-py do something with JetStream."""

    async def do() -> None:
        client = await nats.connect(server.url)
        await work(client.jetstream())
        await client.close()

    asyncio.run(do())


def test_what_is_deleted_before_it_is_read_is_a_gap(
    nats_server: Nats, prefix: str, hub: Hub, recorder: Recorder
) -> None:
    """Messages that retention has removed are announced, and reading goes on with what is there."""
    url = f"{nats_server.url}?prefix={prefix}"
    broadcaster = NatsBroadcaster.from_url(f"{url}&create=true")
    broadcaster.publish([make_event(0)])
    assert broadcaster.flush(DEADLINE)
    hub.start(url, ["conformance"], name="late")
    hub.stop()
    broadcaster.publish([make_event(n) for n in range(1, 5)])
    assert broadcaster.flush(DEADLINE)
    broadcaster.close()

    async def keep_one(jetstream: Any) -> None:
        info = await jetstream.stream_info(prefix)
        await jetstream.update_stream(info.config, max_msgs=1)

    on_stream(nats_server, keep_one)
    gaps = Recorder()
    hub.on_gap(gaps)
    hub.subscribe(recorder, "conformance")
    hub.start(url, ["conformance"], name="late")
    [gap] = gaps.wait(1)
    assert (gap.reason, "begins at 5" in gap.detail) == ("retention", True)
    assert recorder.wait(1)[0].uid == make_event(4).uid


def test_what_is_deleted_while_receivers_are_slow_is_a_gap(
    nats_server: Nats, prefix: str, hub: Hub, recorder: Recorder
) -> None:
    """A stream that keeps little loses what receivers have no time for, and they are told."""

    async def make_stream(jetstream: Any) -> None:
        await jetstream.add_stream(name=prefix, subjects=[f"{prefix}.>"], max_msgs=100)

    on_stream(nats_server, make_stream)
    url = f"{nats_server.url}?prefix={prefix}"
    gaps, busy, go_on = Recorder(), threading.Event(), threading.Event()

    @hub.on("conformance")
    def slow(event: pgsignals.Event) -> None:
        busy.set()
        go_on.wait(DEADLINE)
        recorder(event)

    hub.on_gap(gaps)
    hub.start(url, ["conformance"], queue_size=10)
    broadcaster = NatsBroadcaster.from_url(url)
    for first in range(0, 3000, 100):
        broadcaster.publish([make_event(n) for n in range(first, first + 100)])
        assert broadcaster.flush(DEADLINE)
    broadcaster.close()
    assert busy.wait(DEADLINE)
    go_on.set()
    assert gaps.wait(1)[0].reason == "retention"
    recorder.wait_until(lambda event: event.uid == make_event(2999).uid)
