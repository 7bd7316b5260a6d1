"""The order in which a stream has events, whatever a network holds back: a model of the server."""

from __future__ import annotations

import asyncio
import json
import random
from collections import deque
from types import SimpleNamespace
from typing import Any

from pgsignals_nats.ledger import Ledger
from pgsignals_nats.messages import Head, Item, Origin
from pgsignals_nats.sending import Sender

COUNT, RECORDS = 60, 12
HEAD = Head(Origin("p.s.t.inserted", ("s", "t"), "p", {}), {"time": "now"})


class Server:
    """What JetStream does with ids: duplicates are not stored, nor what is not behind the last."""

    def __init__(self) -> None:
        self.stored: list[str] = []

    def take(self, name: str, behind: str) -> dict[str, Any]:
        """Take a message, and answer."""
        if name in self.stored:
            return {"seq": self.stored.index(name) + 1, "duplicate": True}
        if behind and (not self.stored or self.stored[-1] != behind):
            return {"error": {"description": "wrong last msg ID"}}
        self.stored.append(name)
        return {"seq": len(self.stored)}


class Connection:
    """A client of nats-py with public methods alone; what it sends has yet to arrive."""

    is_connected = True

    def __init__(self, server: Server, sender: Sender) -> None:
        self._server, self._sender = server, sender
        self.sent: deque[tuple[str, dict[str, str]]] = deque()
        sender.use(self, "inbox")  # type: ignore[arg-type]

    async def publish(
        self, subject: str, payload: bytes, reply: str = "", headers: dict[str, str] | None = None
    ) -> None:
        """Hold a message back."""
        self.sent.append((reply, headers or {}))

    async def arrive(self, *, answers: bool) -> None:
        """Have the server take the next message."""
        reply, headers = self.sent.popleft()
        answer = self._server.take(
            headers["Nats-Msg-Id"], headers.get("Nats-Expected-Last-Msg-Id", "")
        )
        if answers and reply:
            message = SimpleNamespace(subject=reply, headers=None, data=json.dumps(answer).encode())
            await self._sender.acknowledged(message)  # type: ignore[arg-type]


class Stream:
    """A stream that has what it is asked for, after a while."""

    notice: Item | None = None
    limit = 10_000

    def saw(self, item: Item, sequence: int) -> None:
        """See pgsignals_nats.stream."""

    async def has(self, item: Item, sequence: int) -> bool:
        """See pgsignals_nats.stream."""
        await asyncio.sleep(0)
        return True


def connect(server: Server) -> tuple[Ledger, Sender, Connection]:
    ledger = Ledger()
    sender = Sender(ledger, Stream())  # type: ignore[arg-type]
    return ledger, sender, Connection(server, sender)


def items(chance: random.Random) -> list[Item]:
    """Messages in the order of their records, of which each takes its turn at any time.

    The outbox gives the same events in another such order when it is read again.
    """
    left = [deque(range(record, COUNT, RECORDS)) for record in range(RECORDS)]
    found = []
    while any(left):
        # Nearly in one order: the next, or one after it.
        first = sorted((numbers for numbers in left if numbers), key=lambda numbers: numbers[0])
        number = first[0 if chance.random() < 0.9 else -1].popleft()
        record = b"%d" % (number % RECORDS)
        found.append(Item(str(number), str(number), HEAD, b"{}", record, HEAD.size))
    return found


def stored_by_two(seed: int) -> list[int]:
    """What two leave there that send the same, one of them given up, with a stranger or without."""
    chance = random.Random(seed)

    async def run() -> list[str]:
        server = Server()
        former_ledger, former, held = connect(server)
        former_ledger.send(sent := items(chance), counted=True)
        former.take(sent, 0)
        ledger, sender, connection = connect(server)
        # The former has the answers to what arrives at first; then it is given up.
        for _ in range(chance.randrange(COUNT)):
            await asyncio.sleep(0)
            if held.sent:
                await held.arrive(answers=True)
        ledger.send(sent := items(chance), counted=True)
        sender.take(sent, 0)
        strangers = chance.choice([0.0, 0.1])
        while ledger.unacknowledged or held.sent:
            await asyncio.sleep(0)
            if chance.random() < strangers:
                server.stored.append(f"stranger {len(server.stored)}")
            slow = chance.choice([held, connection])
            if slow.sent:
                await slow.arrive(answers=slow is connection)
        assert ledger.take_failure() is None
        assert ledger.count() == COUNT
        return server.stored

    return [int(name) for name in asyncio.run(run()) if name.isdigit()]


def test_a_record_is_stored_in_its_order() -> None:
    """All is there once, each record in its order, whichever of two connections is slow when."""
    for seed in range(300):
        stored = stored_by_two(seed)
        assert sorted(stored) == list(range(COUNT)), seed
        for record in range(RECORDS):
            of_it = [number for number in stored if number % RECORDS == record]
            assert of_it == sorted(of_it), seed
