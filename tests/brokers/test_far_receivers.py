"""Receivers that raise where events come from a broker, under a name: tried again, given up."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nats
import pytest

import pgsignals
from pgsignals.broadcasters import Broadcaster
from pgsignals.plugins.loader import load_plugins
from pgsignals.testing.conformance import DEADLINE, make_event
from tests.brokers import Nats
from tests.conftest import Recorder
from tests.redelivery import shorten_ack_wait
from tests.waiting import eventually

# Brokers take their time to give up a member that has died.
pytestmark = pytest.mark.timeout(240)

Send = Callable[..., None]


@pytest.fixture(params=["kafka", "nats"])
def url(request: pytest.FixtureRequest, prefix: str) -> str:
    """Where the events come from: each broker in its turn."""
    broker = request.getfixturevalue("kafka" if request.param == "kafka" else "nats_server")
    return f"{broker.url}?prefix={prefix}"


@pytest.fixture
def hasty(url: str) -> str:
    """The same place, for members of a group whose coming and going is noticed early."""
    if not url.startswith("kafka:"):
        return url
    return f"{url}&librdkafka.session.timeout.ms=6000&librdkafka.heartbeat.interval.ms=300"


@pytest.fixture
def give_up(request: pytest.FixtureRequest, url: str, prefix: str) -> Callable[[], None]:
    """Has the broker wait no longer for acknowledgements of one that has gone."""

    def give_up() -> None:
        # Where a member of a group has left, Kafka waits for nothing.
        if url.startswith("nats:"):
            shorten_ack_wait(request.getfixturevalue("nats_server"), prefix, 1.0)

    return give_up


@pytest.fixture
def send(url: str) -> Iterator[Send]:
    """Sends events of these numbers, all of one record or each of its own."""
    broadcaster: Broadcaster = load_plugins().broadcaster(f"{url}&create=true")

    def send(*numbers: int, record: int | None = 1) -> None:
        broadcaster.publish(
            [make_event(n, record=n if record is None else record) for n in numbers]
        )
        assert broadcaster.flush(DEADLINE)

    send(0)
    yield send
    broadcaster.close()


def number(event: pgsignals.Event) -> Any:
    return event.values["number"]


def test_a_receiver_that_raises_is_called_again(
    url: str, send: Send, hub: pgsignals.Hub, recorder: Recorder
) -> None:
    """It gets the event until it takes it, later ones of the record wait, and each comes once."""
    tries: list[Any] = []

    @hub.on("conformance", retries=5, backoff=0.05)
    def takes_the_third_time(event: pgsignals.Event) -> None:
        tries.append(number(event))
        if number(event) == 1 and tries.count(1) < 3:
            raise RuntimeError("not yet")
        recorder(event)

    hub.start(url, ["conformance"], name="mailer")
    send(1, 2)
    send(3)
    assert [number(event) for event in recorder.wait(3)] == [1, 2, 3]
    assert tries == [1, 1, 1, 2, 3]
    assert hub.stop()
    hub.start(url, ["conformance"], name="mailer")
    send(4)
    assert [number(event) for event in recorder.wait(4)] == [1, 2, 3, 4]


def test_after_the_last_try_it_is_passed_over(
    url: str, send: Send, hub: pgsignals.Hub, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged, signalled and counted, holds up nobody, and does not come again."""
    failures = Recorder()
    counts: dict[str, int] = {}

    class Metrics:
        def count(self, name: str, amount: int = 1, /, **labels: str) -> None:
            counts[name] = counts.get(name, 0) + amount

        def gauge(self, name: str, read: Callable[[], float], /, **labels: str) -> None: ...

    @hub.on("conformance", retries=2, backoff=0.01)
    def never_takes_one(event: pgsignals.Event) -> None:
        if number(event) == 1:
            raise RuntimeError("never")
        recorder(event)

    def failed(sender: object, **values: Any) -> None:
        failures(values["event"])

    hub.receiver_failed.connect(failed)
    hub.start(url, ["conformance"], name="mailer", metrics=Metrics())
    send(1, 2)
    assert number(recorder.wait(1)[0]) == 2
    assert [number(event) for event in failures.wait(3)] == [1, 1, 1]
    # The third failure is signalled before the event is given up.
    assert eventually(hub.status, lambda status: not status.unacknowledged).name == "mailer"
    assert (counts["receiver_failures"], counts["given_up"]) == (3, 1)
    assert "has failed 3 times" in caplog.text
    assert "acknowledged all the same" in caplog.text
    hub.stop()
    hub.start(url, ["conformance"], name="mailer")
    send(3)
    assert [number(event) for event in recorder.wait(2)] == [2, 3]
    assert len(failures.items) == 3


def test_what_is_being_tried_again_is_not_acknowledged(
    url: str, give_up: Callable[[], None], send: Send, hub: pgsignals.Hub, recorder: Recorder
) -> None:
    """When the process ends meanwhile, the event comes again, and says so."""
    raised = threading.Event()

    @hub.on("conformance", backoff=3600)
    def raises(event: pgsignals.Event) -> None:
        raised.set()
        raise RuntimeError("for now")

    hub.start(url, ["conformance"], name="mailer")
    send(1)
    assert raised.wait(DEADLINE)
    assert eventually(hub.status, lambda status: status.retrying == 1).unacknowledged == 1
    hub.stop()
    give_up()
    second = pgsignals.Hub()
    second.on("conformance")(recorder)
    second.start(url, ["conformance"], name="mailer")
    try:
        [event] = recorder.wait(1)
    finally:
        second.stop()
    assert (number(event), event.redelivered) == (1, True)


def test_a_batch_receiver_that_raises_is_called_again(
    url: str, send: Send, hub: pgsignals.Hub, recorder: Recorder
) -> None:
    """It gets the same batch."""
    tries: list[list[Any]] = []

    # It is full with both, however long they take to come.
    @hub.on_batch("conformance", every=3600, max_size=2, backoff=0.01)
    def takes_the_second_time(batch: pgsignals.Batch) -> None:
        tries.append(sorted(map(number, batch)))
        if len(tries) == 1:
            raise RuntimeError("not yet")
        recorder(batch)

    hub.start(url, ["conformance"], name="mailer")
    send(1, 2, record=None)
    recorder.wait(1)
    assert tries[1] == tries[0]
    eventually(hub.status, lambda status: not status.unacknowledged)


def test_without_a_name_there_is_one_try(
    url: str, send: Send, hub: pgsignals.Hub, recorder: Recorder
) -> None:
    """Nothing is acknowledged there: a receiver that raises has missed the event."""
    calls: list[Any] = []

    @hub.on("conformance")
    def raises_once(event: pgsignals.Event) -> None:
        calls.append(number(event))
        if number(event) == 1:
            raise RuntimeError("missed")
        recorder(event)

    hub.start(url, ["conformance"])
    with pytest.raises(pgsignals.ReceiverError, match="nobody calls it again"):
        hub.subscribe(recorder, "conformance", retries=1)
    send(1, 2)
    recorder.wait(1)
    assert calls == [1, 2]


def test_coroutine_functions(url: str, send: Send, hub: pgsignals.Hub, recorder: Recorder) -> None:
    """They run on the loop in which start() was called, or that it was given."""

    async def received(event: pgsignals.Event) -> None:
        recorder(event)

    async def serve() -> None:
        hub.start(url, ["conformance"])
        await asyncio.to_thread(send, 1)
        await asyncio.to_thread(recorder.wait, 1)
        await hub.astop()

    hub.subscribe(received, "conformance")
    asyncio.run(serve())


def test_receivers_that_wait_to_be_tried_again_bound_what_is_read(
    url: str, send: Send, hub: pgsignals.Hub, recorder: Recorder
) -> None:
    """With ten times queue_size unacknowledged, reading pauses; once that is over, it goes on."""
    ready = threading.Event()

    @hub.on("conformance", retries=1000, backoff=0.05, later="wait")
    def not_before_it_is_ready(event: pgsignals.Event) -> None:
        if not ready.is_set():
            raise RuntimeError("not ready")
        recorder(event)

    hub.start(url, ["conformance"], name="mailer", queue_size=10)
    for first in range(1, 3001, 300):
        send(*range(first, first + 300))
    most = eventually(hub.status, lambda status: status.unacknowledged >= 100).unacknowledged
    # What a source takes at once, beyond the bound.
    assert most <= 100 + 1000
    ready.set()
    numbers = [number(event) for event in recorder.wait(3000, 60)]
    assert numbers == sorted(numbers)


def test_a_message_that_is_given_up_is_terminated(
    nats_server: Nats, prefix: str, hub: pgsignals.Hub
) -> None:
    """On NATS the server tells whoever wants to know of it, with the receiver's name."""
    url = f"{nats_server.url}?prefix={prefix}"
    broadcaster: Broadcaster = load_plugins().broadcaster(f"{url}&create=true")
    assert broadcaster.flush(DEADLINE)

    @hub.on("conformance", retries=0)
    def raises(event: pgsignals.Event) -> None:
        raise RuntimeError("never")

    hub.start(url, ["conformance"], name="mailer")

    async def advisory() -> bytes:
        client = await nats.connect(nats_server.url)
        subject = f"$JS.EVENT.ADVISORY.CONSUMER.MSG_TERMINATED.{prefix}.mailer"
        subscription = await client.subscribe(subject)
        await client.flush()
        broadcaster.publish([make_event(1)])
        message = await subscription.next_msg(DEADLINE)
        await client.close()
        return message.data

    text = asyncio.run(advisory())
    broadcaster.close()
    assert b"raises raised RuntimeError" in text


_DIES = """
import os, signal, sys
import pgsignals

@pgsignals.on("conformance")
def dies(event):
    if event.values["number"] == 2:
        print("dying", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

pgsignals.start(sys.argv[1], ["conformance"], name="mailer")
print("started", flush=True)
pgsignals.run()
"""


def test_what_may_have_come_before_says_so(
    hasty: str,
    give_up: Callable[[], None],
    send: Send,
    hub: pgsignals.Hub,
    recorder: Recorder,
    tmp_path: Path,
) -> None:
    """After a kill -9 in a receiver the event is redelivered; what comes later is not."""
    script = tmp_path / "dies.py"
    script.write_text(_DIES)
    child = subprocess.Popen(
        [sys.executable, str(script), hasty], stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "started\n"
    send(1, 2)
    assert child.stdout.readline() == "dying\n"
    child.wait(DEADLINE)
    child.stdout.close()
    give_up()
    hub.on("conformance")(recorder)
    hub.start(hasty, ["conformance"], name="mailer")
    recorder.wait_until(lambda event: number(event) == 2)
    send(3)
    found = {number(event): event for event in recorder.wait_until(lambda e: number(e) == 3)}
    assert found[2].redelivered
    assert not found[3].redelivered


def test_what_is_new_to_everybody_does_not_say_otherwise(
    url: str, send: Send, hub: pgsignals.Hub, recorder: Recorder
) -> None:
    """What came while nobody of the name ran, after an orderly stop, is not redelivered."""
    hub.on("conformance")(recorder)
    hub.start(url, ["conformance"], name="mailer")
    send(1)
    recorder.wait(1)
    assert hub.stop()
    send(2)
    hub.start(url, ["conformance"], name="mailer")
    send(3)
    assert [number(event) for event in recorder.wait(3)] == [1, 2, 3]
    assert [event.redelivered for event in recorder.items] == [False, False, False]


def test_who_joins_and_who_leaves_share_the_events(
    hasty: str, send: Send, hub: pgsignals.Hub, recorder: Recorder
) -> None:
    """In an orderly handover each event comes to one of the name, once, and is not redelivered."""
    second = pgsignals.Hub()
    for each in (hub, second):
        each.on("conformance")(recorder)
    hub.start(hasty, ["conformance"], name="mailer")
    send(*range(1, 101), record=None)
    recorder.wait(100)
    second.start(hasty, ["conformance"], name="mailer")
    try:
        for first in range(101, 401, 20):
            send(*range(first, first + 20), record=None)
        recorder.wait(400, DEADLINE)
        assert hub.stop()
        send(*range(401, 501), record=None)
        recorder.wait(500, 60)
    finally:
        second.stop()
    assert sorted(map(number, recorder.items)) == list(range(1, 501))
    assert not any(event.redelivered for event in recorder.items)


@pytest.mark.parametrize("name", ["mailer", None])
def test_one_that_hangs_holds_up_nobody(
    name: str | None, url: str, send: Send, hub: pgsignals.Hub, recorder: Recorder
) -> None:
    """With several workers the others go on; under a name, what it has not taken is not over."""
    gate, stuck = threading.Event(), Recorder()

    @hub.on("conformance")
    def hangs(event: pgsignals.Event) -> None:
        gate.wait(2 * DEADLINE)
        stuck(number(event))

    hub.on("conformance")(recorder)
    try:
        hub.start(url, ["conformance"], name=name, workers=4)
        send(*range(1, 41), record=None)
        assert {number(event) for event in recorder.wait(40)} == set(range(1, 41))
        [aside] = hub.status().aside
        assert aside.endswith("hangs")
        assert hub.health().aside == (aside,)
        assert hub.status().unacknowledged == (40 if name is not None else 0)
    finally:
        gate.set()
    assert set(stuck.wait(40)) == set(range(1, 41))
    eventually(hub.status, lambda status: not status.unacknowledged)
