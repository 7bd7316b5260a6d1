"""The chain in which NATS is sent messages: what an acknowledgement says, and what it does not."""

from __future__ import annotations

from collections import deque

import pytest

from pgsignals_nats.chain import Chain
from pgsignals_nats.messages import Head, Item, Origin, chained

LIMIT = 1_000_000
HEAD = Head(Origin("p.s.t.inserted", ("s", "t"), "p", {"type": "é%"}), {"time": "now"})


def items(count: int, payload: bytes = b"{}") -> deque[Item]:
    """Messages of names from 0 on."""
    return deque(
        Item(str(n), str(n), HEAD, payload, None, len(payload) + HEAD.size + 2 * len(str(n)))
        for n in range(count)
    )


def tokens(chain: Chain, waiting: deque[Item], count: int) -> list[str]:
    """The tokens of the next chunks."""
    found = []
    for _ in range(count):
        chunk = chain.take(waiting, LIMIT)
        assert chunk is not None
        found.append(chunk.token)
    return found


def test_the_first_is_a_chunk_by_itself() -> None:
    """It is behind nobody; each other chunk is behind the last message of the one before."""
    chain, waiting = Chain(), items(600)
    taken = [chain.take(waiting, LIMIT) for _ in range(3)]
    assert [(len(chunk.items), chunk.behind) for chunk in taken if chunk] == [
        (1, ""),
        (500, "0"),
        (99, "500"),
    ]


def test_a_chunk_is_stored_if_its_place_says_so() -> None:
    """Messages are stored if the last of them is as many places behind the former as there are."""
    chain, waiting = Chain(), items(600)
    first, second, third = tokens(chain, waiting, 3)
    assert [item.uid for item in chain.stored(first, 41)] == ["0"]
    assert len(chain.stored(second, 541)) == 500
    assert chain.stored(third, 641) == []
    assert len(chain.give_up()) == 99
    assert not chain


def test_an_acknowledgement_that_is_lost() -> None:
    """A later one tells of all before it, unless that of the first was lost."""
    chain, waiting = Chain(), items(600)
    first, _, third = tokens(chain, waiting, 3)
    assert len(chain.stored(first, 7)) == 1
    assert len(chain.stored(third, 606)) == 599
    chain, waiting = Chain(), items(600)
    _, second = tokens(chain, waiting, 2)
    assert chain.stored(second, 501) == []


def test_a_message_without_room_begins_a_chain() -> None:
    """One that would be too long with the name of the one before it waits until it is the first."""
    chain, waiting = Chain(), items(3, b"1" * 100)
    limit = waiting[0].size
    [first] = tokens(chain, waiting, 1)
    assert chain.take(waiting, limit) is None
    assert chain.stored(first, 1)
    chunk = chain.take(waiting, limit)
    assert chunk is not None
    assert ([item.uid for item in chunk.items], chunk.behind) == (["1"], "")


def test_a_record_is_under_way_once() -> None:
    """A message waits until the one before it of its record is stored, or all is given up."""
    chain, waiting = Chain(), items(6)
    for item, record in zip(waiting, (b"a", b"b", None, None, b"b", b"a"), strict=True):
        item.record = record
    _, second = tokens(chain, waiting, 2)
    assert [item.uid for item in waiting] == ["4", "5"]
    assert chain.take(waiting, LIMIT) is None
    assert chain.stored("c0", 1)
    assert chain.take(waiting, LIMIT) is None
    assert len(chain.stored(second, 4)) == 3
    tokens(chain, waiting, 2)
    waiting.extend(chain.give_up())
    assert [len(chunk.items) for _ in range(2) if (chunk := chain.take(waiting, LIMIT))] == [1, 1]


def test_no_more_than_the_server_holds_are_under_way() -> None:
    """Chunks are full before the server drops messages, and end early with long ones."""
    chain, waiting = Chain(), items(20_000)
    while not chain.full:
        chain.take(waiting, LIMIT)
    assert 3_000 < len(chain.give_up()) < 5_000
    waiting = items(100, b"1" * 200_000)
    tokens(chain, waiting, 1)
    chunk = chain.take(waiting, LIMIT)
    assert chunk is not None
    assert len(chunk.items) == 3


def test_fewer_are_under_way_after_chains_have_broken() -> None:
    """A chain that breaks again and again is short, and each that holds is longer."""
    chain = Chain()
    for _ in range(10):
        waiting = items(100)
        tokens(chain, waiting, 1)
        assert len(chain.broke()) == 1
    waiting, lengths, stored = items(5_000), [], 0
    while waiting:
        under_way = []
        while waiting and not chain.full:
            chunk = chain.take(waiting, LIMIT)
            assert chunk is not None
            under_way.append(chunk)
        lengths.append(sum(len(chunk.items) for chunk in under_way))
        for chunk in under_way:
            stored += len(chunk.items)
            assert len(chain.stored(chunk.token, stored)) == len(chunk.items)
    assert lengths[:3] == [8, 16, 32]


@pytest.mark.parametrize("payload", [b"{}", b"\r\nHPUB p 1 1\r\n", b""])
def test_a_message_on_the_wire(payload: bytes) -> None:
    """It has its lengths, the same headers as by nats-py, and the name of the one before it."""
    sent = items(2, payload)
    one = chained([sent[0]], "before")
    assert chained(sent, "before") == one + chained([sent[1]], "0")
    line, _, rest = one.partition(b"\r\n")
    command, subject, head_length, length = line.split()
    assert (command, subject) == (b"HPUB", b"p.s.t.inserted")
    assert rest[int(head_length) : int(length)] == payload
    assert rest[int(length) :] == b"\r\n"
    assert int(length) - len("Nats-Expected-Last-Msg-Id: before\r\n") <= sent[0].size
    version, *lines, _, _ = rest[: int(head_length)].decode().split("\r\n")
    assert version == "NATS/1.0"
    headers = dict(each.split(": ", 1) for each in lines)
    assert headers == sent[0].headers("before")
    assert headers["ce-type"] == "%C3%A9%25"
