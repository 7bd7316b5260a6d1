"""The ledger of what a broadcaster has sent."""

from __future__ import annotations

import threading

import pytest

from pgsignals.broadcasters.ledger import Chunk, ChunkLedger, SentLedger
from pgsignals.testing.conformance import DEADLINE


@pytest.fixture
def ledger() -> SentLedger[str]:
    """A ledger with "a" acknowledged, and "b" and "c" under way."""
    made: SentLedger[str] = SentLedger()
    for uid in ("a", "b", "c"):
        made.send(uid)
    made.acknowledge("a")
    return made


def known(ledger: SentLedger[str]) -> list[str]:
    """The uids that would not be sent again."""
    return [uid for uid in ("a", "b", "c", "d") if uid in ledger]


def test_what_is_refused_is_sent_again(ledger: SentLedger[str]) -> None:
    """A refused uid leaves the ledger, and those that are under way or acknowledged stay."""
    ledger.refuse(["b"], "too long")
    assert (known(ledger), ledger.unacknowledged) == (["a", "c"], 1)


def test_the_first_failure_is_told_once(ledger: SentLedger[str]) -> None:
    """The first of several failures is kept until it is taken."""
    ledger.refuse(["b"], "first")
    ledger.fail("second")
    assert [ledger.take_failure(), ledger.take_failure()] == ["first", None]


def test_a_refusal_without_a_reason_is_no_failure(ledger: SentLedger[str]) -> None:
    """A record that was given up on purpose is sent again, and is no error."""
    ledger.refuse(["b"])
    assert (known(ledger), ledger.take_failure()) == (["a", "c"], None)


def test_giving_up(ledger: SentLedger[str]) -> None:
    """What is given up is sent again, with no failure; what was acknowledged is not."""
    ledger.fail("lost")
    ledger.give_up()
    assert (known(ledger), ledger.take_failure()) == (["a"], None)
    ledger.acknowledge("b")
    assert known(ledger) == ["a"]


def test_an_acknowledged_one_that_the_broker_lost(ledger: SentLedger[str]) -> None:
    """It is sent again, after an error that has its events published again."""
    ledger.forget_acknowledged("made anew")
    assert (known(ledger), ledger.take_failure()) == (["b", "c"], "made anew")
    ledger.forget_acknowledged("made anew")
    assert ledger.take_failure() is None


def test_waiting_ends_with_the_last_acknowledgement(ledger: SentLedger[str]) -> None:
    """A flush returns when all is acknowledged, and begins anew."""

    def acknowledge() -> None:
        ledger.acknowledge("b")
        ledger.acknowledge("c")

    thread = threading.Thread(target=acknowledge)
    thread.start()
    assert ledger.wait(DEADLINE)
    thread.join()
    ledger.clear()
    assert known(ledger) == []


def test_waiting_ends_with_a_failure(ledger: SentLedger[str]) -> None:
    """A flush does not wait for others when one is refused."""
    thread = threading.Thread(target=lambda: ledger.refuse(["b"], "refused"))
    thread.start()
    assert not ledger.wait(DEADLINE)
    thread.join()
    assert ledger.unacknowledged == 1


@pytest.fixture
def chunks() -> tuple[ChunkLedger[str], list[Chunk]]:
    """Chunks of two events each, of which the second alone has arrived, and of something else."""
    made: ChunkLedger[str] = ChunkLedger()
    found = [Chunk() for _ in range(4)]
    for number, chunk in enumerate(found):
        made.open(chunk)
        chunk.uids += [f"{number}a", f"{number}b"]
        made.known.update(chunk.uids)
        chunk.left = 0 if number == 1 else 2
    found[2].counts = False
    return made, found


def test_chunks_arrive_in_their_order(chunks: tuple[ChunkLedger[str], list[Chunk]]) -> None:
    """What has arrived counts with all before it, once, and is known until then."""
    ledger, [first, _, other, last] = chunks
    assert ledger.arrived() == 0
    first.left = 0
    assert (ledger.arrived(), ledger.arrived()) == (4, 0)
    assert ledger.known == {"2a", "2b", "3a", "3b"}
    last.left = 0
    assert ledger.arrived() == 0
    other.left = 0
    assert (ledger.arrived(), ledger.known) == (2, set())


def test_what_arrived_behind_what_is_given_up(
    chunks: tuple[ChunkLedger[str], list[Chunk]],
) -> None:
    """It is sent again, too, so that the events before it do not come behind it."""
    ledger, [first, *_] = chunks
    ledger.fail("refused")
    ledger.give_up()
    assert (ledger.known, ledger.arrived(), ledger.take_failure()) == (set(), 0, None)
    first.left = 0
    assert ledger.arrived() == 0


def test_what_has_arrived_is_not_given_up(chunks: tuple[ChunkLedger[str], list[Chunk]]) -> None:
    """What is before the first unfinished chunk stays known until it is counted."""
    ledger, [first, *_] = chunks
    first.left = 0
    ledger.give_up()
    assert ledger.known == {"0a", "0b", "1a", "1b"}
    assert ledger.arrived() == 4
