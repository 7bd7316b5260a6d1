"""How far a consumer has read: snapshots, windows between two of them, and where to look. Pure.

A row belongs to the window between two snapshots when the later one sees its transaction and the
earlier one does not. Windows one after another miss no row and give none twice, however long a
transaction takes. Within a window rows go by id. That keeps the order of each record's changes:
whoever changes a record has waited for the former change to commit, so that both are in one window,
in the order of their ids, or in two. (PgQ does it like this; `id > last` loses what commits late,
and cutting at a transaction id inverts two changes whose ids were taken in the other order.)
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from ..core.errors import PayloadError


@dataclass(frozen=True)
class Snapshot:
    """A ``pg_snapshot``: which transactions had ended when it was taken.

    All below ``xmin`` had, none from ``xmax`` on, and in between all but ``running``.
    """

    xmin: int
    xmax: int
    running: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Snapshot:
        """From PostgreSQL's text, ``xmin:xmax:running,…``. Raises PayloadError."""
        try:
            xmin, xmax, running = text.split(":")
            found = cls(
                int(xmin), int(xmax), tuple(int(each) for each in running.split(",") if each)
            )
        except ValueError as error:
            raise PayloadError(f"{text!r} is not a snapshot") from error
        if not 0 < found.xmin <= found.xmax:
            raise PayloadError(f"{text!r} is not a snapshot")
        return found

    def __str__(self) -> str:
        return f"{self.xmin}:{self.xmax}:{','.join(map(str, self.running))}"

    def sees(self, txid: int) -> bool:
        """Whether the transaction had ended, and is visible if it committed."""
        return txid < self.xmin or (txid < self.xmax and txid not in self.running)

    def covers(self, other: Snapshot) -> bool:
        """Whether it sees all that another one of the same database sees."""
        if self.xmax != other.xmax:
            return self.xmax > other.xmax
        return set(self.running) <= set(other.running)


# Sees nothing at all: whoever starts here gets everything that the outbox holds.
BEGINNING = Snapshot(1, 1)


@dataclass(frozen=True)
class Window:
    """The rows that ``target`` sees and ``since`` does not, from id ``after`` on.

    ``ended``: which of those that ran at ``since`` had ended at ``target``.
    """

    since: Snapshot
    target: Snapshot
    after: int
    ended: tuple[int, ...]

    @classmethod
    def between(cls, since: Snapshot, target: Snapshot, after: int) -> Window:
        """The window of two snapshots."""
        return cls(since, target, after, tuple(x for x in since.running if target.sees(x)))

    @property
    def empty(self) -> bool:
        """Whether no transaction can have a row in it."""
        return not self.ended and self.since.xmax >= self.target.xmax

    def holds(self, txid: int) -> bool:
        """Whether rows of the transaction are in it."""
        return self.target.sees(txid) and not self.since.sees(txid)


class IdBounds:
    """Below which ids a transaction's rows cannot be.

    A row's id is taken after its transaction's, so that a transaction which began after another has
    only ids above those that were given out before the other began. A snapshot's ``xmax`` is no
    such bound: it is one more than the latest transaction that has ended, and others beyond it may
    have begun long ago.
    """

    _MOST = 10_000

    def __init__(self, first: int, given_out: int) -> None:
        self._firsts: list[int] = [first]
        self._ids: list[int] = [given_out]

    def note(self, first: int, given_out: int) -> None:
        """Transactions from ``first`` on have begun after that id had been given out."""
        if first > self._firsts[-1]:
            self._firsts.append(first)
            self._ids.append(max(given_out, self._ids[-1]))
        if len(self._ids) > self._MOST:
            # Coarser, but true: every other one of the older half.
            half = self._MOST // 2
            self._firsts[1:half] = self._firsts[1:half:2]
            self._ids[1:half] = self._ids[1:half:2]

    def below(self, txid: int) -> int:
        """An id that all rows of the transaction, and of those after it, are above."""
        return self._ids[max(0, bisect_right(self._firsts, txid) - 1)]

    def forget(self, txid: int) -> None:
        """Nobody will ask for transactions below this one any more."""
        keep = max(0, bisect_right(self._firsts, txid) - 1)
        del self._firsts[:keep], self._ids[:keep]
