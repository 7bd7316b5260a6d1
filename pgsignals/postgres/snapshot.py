"""The snapshots of PostgreSQL, which say which transactions had ended at a moment."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.errors import PayloadError


@dataclass(frozen=True)
class Snapshot:
    """A ``pg_snapshot``: the transactions that had ended when it was taken.

    Every transaction below ``xmin`` had ended, none from ``xmax`` on, and in between all except
    ``running``.
    """

    xmin: int
    xmax: int
    running: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Snapshot:
        """Parse PostgreSQL's text, ``xmin:xmax:running,…``. Raises PayloadError."""
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
        """Whether this snapshot sees all that another one of the same database sees."""
        if self.xmax != other.xmax:
            return self.xmax > other.xmax
        return set(self.running) <= set(other.running)
