"""Which transactions a reader of the write-ahead log leaves out, and what its position says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pgsignals.postgres.snapshot import Snapshot
from pgsignals.wal.pgoutput import Begin, Commit, Insert
from pgsignals.wal.reader import Run, WalPosition, WalReader, Watermark
from tests.pgoutput_encoder import EPOCH, encode


class Stream:
    """A stream of transactions, one after another, that insert a row each."""

    def __init__(self, xids: Sequence[int]) -> None:
        self.received = 0
        self._messages = [
            (lsn, encode(change))
            for lsn, xid in zip(range(100, 1 << 20, 100), xids, strict=False)
            for change in (
                Begin(lsn + 40, EPOCH, xid),
                Insert(1, (str(xid).encode(),)),
                Commit(lsn + 40, lsn + 50, EPOCH),
            )
        ]

    def messages(self) -> Iterator[tuple[int, bytes]]:
        while self._messages:
            found = self._messages.pop(0)
            self.received = found[0] + 50
            yield found

    def reader(self, position: WalPosition) -> WalReader:
        return WalReader(
            self.messages,
            lambda: self.received,
            lambda: None,
            lambda text: False,
            lambda lsn: None,
            lambda relation, new: True,
            lambda xid: xid,
            "utf-8",
            position,
            0,
            clean=True,
        )


def read(reader: WalReader) -> list[int]:
    """Read what there is; return the transactions."""
    found: list[int] = []
    reader.fill()
    while entries := reader._entries:
        found += [each.txid for each in entries if isinstance(each, Run)]
        reader.turn(entries)
        reader.fill()
    return found


def test_what_came_from_the_former_log() -> None:
    """Behind a position with a snapshot, what the snapshot sees is left out, and nothing else."""
    since = Watermark(250, Snapshot(3, 8, (3, 6)))
    reader = Stream([2, 3, 5, 6, 9]).reader(WalPosition(100, since=since))
    assert read(reader) == [3, 6, 9]


def test_how_long_the_snapshot_is_kept() -> None:
    """Positions keep the snapshot until all that it sees lies before them."""
    since = Watermark(250, Snapshot(3, 8, (3, 6)))
    reader = Stream([2]).reader(WalPosition(100, since=since))
    read(reader)
    assert reader.position == WalPosition(150, since=since)
    assert WalPosition(150, 240, 7, since).whole == WalPosition(150, since=since)
    reader.rest(250)
    assert reader.position == WalPosition(250)


def test_a_snapshot_of_another_history() -> None:
    """In another history nothing is left out, and positions forget the snapshot."""
    reader = Stream([2, 3]).reader(WalPosition(100, since=Watermark(900, Snapshot(8, 8))))
    reader.start_over()
    assert reader.position == WalPosition(100)
    assert read(reader) == [2, 3]
    assert reader.position == WalPosition(250)


def test_what_comes_from_the_later_log() -> None:
    """At the end, what its snapshot does not see is left out, though it lies between the rest.

    No position goes beyond the first that is left out: the consumer may stay in this log.
    """
    end = Watermark(450, Snapshot(3, 8, (3, 6)))
    reader = Stream([2, 3, 5, 6, 9]).reader(WalPosition(100))
    reader.read_to(Watermark(100, Snapshot(1, 1)))
    assert read(reader) == []
    assert reader.waits
    reader.end(end)
    reader.read_to(end)
    assert read(reader) == [2, 5]
    assert reader.at_end
    assert reader.covers(end)
    assert reader.position == WalPosition(150)


def test_the_text_of_a_watermark() -> None:
    """A watermark is the same again when it has been saved."""
    watermark = Watermark(0x16_B374D848, Snapshot(3, 8, (3, 6)))
    assert Watermark.parse(str(watermark)) == watermark


def test_the_position_lies_before_what_nobody_has_taken() -> None:
    """A Gap that is told between reading a page and taking it acknowledges none of that page."""
    reader = Stream([5, 6]).reader(WalPosition(90))
    reader.fill()
    assert reader._entries
    assert reader.position == WalPosition(90)
    position = reader.turn(reader._entries)
    assert position == reader.position == WalPosition(250)
