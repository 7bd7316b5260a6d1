"""Snapshots, the windows between two of them, and bounds of ids: how far a consumer has read. Pure.

A row belongs to the window between two snapshots when the later one sees its transaction and the
earlier one does not. Consecutive windows give each row exactly once, however long a transaction
takes. Within a window rows are in the order of their ids, which keeps the order of each record's
changes: a transaction that changes a record has waited for the former change to commit, so that
both changes are in one window, in the order of their ids, or the former one is in an earlier
window. (PgQ does it like this. `id > last` loses what commits late, and cutting at a transaction id
inverts two changes whose transactions took their ids in the other order.)
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from ..postgres.snapshot import Snapshot

# A snapshot that sees nothing: a reader that starts here gets everything that the outbox holds.
BEGINNING = Snapshot(1, 1)


@dataclass(frozen=True)
class Window:
    """The rows that ``target`` sees and ``since`` does not; all have ids above ``after``.

    ``ended`` are the transactions that ran at ``since`` and had ended at ``target``.
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
        """Whether no transaction can have a row in the window."""
        return not self.ended and self.since.xmax >= self.target.xmax

    def holds(self, txid: int) -> bool:
        """Whether the window has the rows of the transaction."""
        return self.target.sees(txid) and not self.since.sees(txid)


class IdBounds:
    """Lower bounds of the ids of a transaction's rows.

    A row takes its id after its transaction took its own. So the rows of a transaction that began
    after another have only ids above those that were given out before that other one began. The
    ids given out at a snapshot are no such bound for transactions from its ``xmax`` on: ``xmax`` is
    one more than the latest transaction that has ended, and later ones may have begun long ago.
    """

    _MOST = 10_000

    def __init__(self, first: int, given_out: int) -> None:
        self._firsts: list[int] = [first]
        self._ids: list[int] = [given_out]

    def note(self, first: int, given_out: int) -> None:
        """Note that transactions from ``first`` on began after the id ``given_out`` was taken."""
        if first > self._firsts[-1]:
            self._firsts.append(first)
            self._ids.append(max(given_out, self._ids[-1]))
        if len(self._ids) > self._MOST:
            # Keep every other note of the older half: a bound may become lower, and stays true.
            half = self._MOST // 2
            self._firsts[1:half] = self._firsts[1:half:2]
            self._ids[1:half] = self._ids[1:half:2]

    def below(self, txid: int) -> int:
        """An id below those of all rows of the transaction and of later transactions."""
        return self._ids[max(0, bisect_right(self._firsts, txid) - 1)]

    def forget(self, txid: int) -> None:
        """Drop the bounds of transactions below this one, which nobody asks for any more."""
        keep = max(0, bisect_right(self._firsts, txid) - 1)
        del self._firsts[:keep], self._ids[:keep]
