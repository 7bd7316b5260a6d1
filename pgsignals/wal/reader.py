"""Reads the messages of triggers from the write-ahead log, transaction by transaction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import msgspec

from ..core.errors import PayloadError
from ..core.events import Message
from ..core.lsn import lsn_text, read_lsn
from ..core.rows import UNCHANGED, Value, Values
from ..postgres.snapshot import Snapshot
from ..triggers.names import MESSAGE_PREFIX
from . import pgoutput
from .messages import Context, Mute, Sent, parse_message

# The most changes and bytes of a page, unless one change alone is longer.
PAGE_CHANGES = 2000
PAGE_BYTES = 256 << 10
# The most messages of the stream that are read in one go, of whatever kind: behind a log that has
# nothing for us, the source has its leases to renew.
MOST_READ = 10_000


@dataclass(frozen=True)
class WalPosition:
    """A position in the log: every transaction that committed below ``lsn`` has been read.

    So have the first ``messages`` of the transaction that committed at ``commit_lsn``, and those
    that ``since`` sees, which came from another log.
    """

    lsn: int
    commit_lsn: int = 0
    messages: int = 0
    since: Watermark | None = None

    @property
    def columns(self) -> dict[str, object]:
        return {
            "lsn": self.lsn,
            "commit_lsn": self.commit_lsn,
            "messages": self.messages,
            "target": None if self.since is None else str(self.since),
        }

    @property
    def whole(self) -> WalPosition:
        return self if not self.messages else WalPosition(self.lsn, since=self.since)


@dataclass(frozen=True)
class Watermark:
    """A moment of the log: the transactions that a ``snapshot`` saw, all of them below ``lsn``.

    Without a snapshot it is every transaction below ``lsn``.
    """

    lsn: int
    snapshot: Snapshot | None = None

    # SQL for the text that ``parse`` reads. The LSN is taken after the snapshot.
    SQL = (
        "pg_catalog.pg_current_snapshot()::pg_catalog.text || ' '"
        " || pg_catalog.pg_current_wal_insert_lsn()"
    )

    def __str__(self) -> str:
        return f"{self.snapshot} {lsn_text(self.lsn)}"

    @classmethod
    def parse(cls, text: str) -> Watermark:
        """Return the watermark of a text. Raises PayloadError."""
        snapshot, _, lsn = text.partition(" ")
        return cls(read_lsn(lsn), Snapshot.parse(snapshot))

    def sees(self, xid: int) -> bool:
        """Whether a transaction is behind the watermark; ``xid`` are the last 32 bits of its id."""
        if self.snapshot is None:
            return True
        # The id may be a little below the snapshot's xmax, or above.
        distance = (xid - self.snapshot.xmax) & 0xFFFFFFFF
        if distance >= 1 << 31:
            distance -= 1 << 32
        return self.snapshot.sees(self.snapshot.xmax + distance)


class Transaction(msgspec.Struct, gc=False):
    """The transaction that is being read, ``count`` of whose changes have been read so far.

    It committed at ``id``. ``skipped``: it comes from another log. ``foreign``: it was replicated
    from another server. ``muted`` and ``context`` are as of the latest change.
    """

    id: int
    at_us: int
    txid: int
    skipped: bool = False
    count: int = 0
    foreign: bool = False
    muted: bool = False
    context: str = ""


_BEGIN, _COMMIT = b"BC"
# The bytes of a changed row's message that say what kind of change it is, and of which table.
_HEAD = 5
_OPS = {pgoutput.INSERT: "inserted", pgoutput.UPDATE: "updated", pgoutput.DELETE: "deleted"}


class Kind(NamedTuple):
    """The kind of changes of a run: an operation on a table, which has these columns."""

    op: str
    relation: int
    columns: tuple[str, ...]


class Run(msgspec.Struct, gc=False):
    """Changes of rows that came one after another in a transaction: see Changes.

    ``data`` has their messages.
    """

    kind: Kind
    id: int
    txid: int
    at_us: int
    foreign: bool
    first: int
    context: str
    data: list[bytes]

    @property
    def op(self) -> str:
        return self.kind.op

    @property
    def relation(self) -> int:
        return self.kind.relation

    @property
    def columns(self) -> tuple[str, ...]:
        return self.kind.columns

    def singly(self) -> Iterator[Run]:
        """Yield a run of each change."""
        for number, each in enumerate(self.data):
            yield msgspec.structs.replace(self, first=self.first + number, data=[each])

    def rows(self, wanted: Sequence[bool]) -> Iterator[tuple[Values, Values]]:
        data = self.data
        if self.op == "truncated":
            return iter([(None, None)])
        if self.op == "updated":
            return (_filled(*pgoutput.picked(each, wanted)) for each in data)
        return (pgoutput.picked(each, wanted) for each in data)

    def single_rows(
        self, data: Sequence[bytes], wanted: Sequence[bool]
    ) -> Sequence[Sequence[Value]] | None:
        return pgoutput.picked_rows(data, wanted)


def _filled(old: Values, new: Values) -> tuple[Values, Values]:
    """Return the rows, with the old values in place of those that did not change."""
    if old is not None and new is not None and UNCHANGED in new:
        new = [b if a is UNCHANGED else a for a, b in zip(new, old, strict=True)]
    return old, new


# What the log brings: a message of a trigger, or changes of a table's rows.
Entry = Sent | Run


class WalReader:
    """Reads what a replication stream brings.

    ``messages`` yields the position and the bytes of each message of the stream that is here now;
    behind the last, ``received`` returns the LSN up to which all has come. ``wait`` waits a moment
    for more. ``is_secret`` says whether a text is the secret of our triggers' messages, and
    ``forged`` is told of the LSN of a message with another. ``wanted`` says whether somebody reads
    the rows of a table, which is new if it has just been described. ``txid`` returns a
    transaction's id, of which the stream has the last 32 bits. ``encoding`` is the database's, in
    Python's terms.

    Transactions that committed below ``present``, at which this reader began, may have been
    delivered by another process, unless it left the partition ``clean``. ``lost`` and ``ahead`` are
    as in Reader.
    """

    def __init__(
        self,
        messages: Callable[[], Iterable[tuple[int, bytes]]],
        received: Callable[[], int],
        wait: Callable[[], None],
        is_secret: Callable[[bytes], bool],
        forged: Callable[[int], None],
        wanted: Callable[[int, bool], bool],
        txid: Callable[[int], int],
        encoding: str,
        position: WalPosition,
        present: int,
        *,
        clean: bool,
        lost: str = "",
        ahead: bool = False,
    ) -> None:
        self._messages = messages
        self._received = received
        self._wait = wait
        self._is_secret = is_secret
        self._forged = forged
        self._wanted = wanted
        self._txid = txid
        self._encoding = encoding
        self._former = position
        self._doubtful = 0 if clean else present
        self.lost = lost
        self.ahead = ahead
        self._lsn = position.lsn
        self._transaction: Transaction | None = None
        # What has been read from the stream, and nobody has taken yet; and its size.
        self._entries: list[Entry] = []
        self._count = self._size = 0
        # The position before them.
        self._behind = position
        # The run that is being read, to which changes like its own are added: those of its
        # transaction that begin with ``_head``.
        self._run: Run | None = None
        self._head = b""
        # By the heads of changes, their kinds on this page; None if nobody reads them.
        self._kinds: dict[bytes, Kind | None] = {}
        # The columns of each table, by its OID, as the latest description has them.
        self._columns: dict[int, tuple[str, ...]] = {}
        self._since = position.since
        # What this does not see comes from another log, to which the consumer goes.
        self._until: Watermark | None = None
        # The position before the first transaction that was left out for it. Acknowledged beyond,
        # that one would be lost if the consumer stayed here after all.
        self._frozen: WalPosition | None = None
        # A transaction that lies behind the watermark, and has to wait.
        self._held: pgoutput.Begin | None = None
        self._watermark: Watermark | None = None
        # Whether reading stopped though the stream had more.
        self._more = False
        #: How often somebody has taken what had been read.
        self.turns = 0

    @property
    def position(self) -> WalPosition:
        # Behind what nobody has taken yet: a Gap that is told now would acknowledge that, too.
        return self._behind if self._entries else self._reached

    @property
    def _reached(self) -> WalPosition:
        """The position behind all that has been read from the stream."""
        if self._frozen is not None:
            return self._frozen
        former, transaction = self._former, self._transaction
        since = self._since
        if since is not None and self._lsn >= since.lsn:
            since = None
        if transaction is None or not transaction.count:
            # What comes behind the former position, in its transaction, may not have come yet.
            return WalPosition(self._lsn, since=since) if self._lsn > former.lsn else former
        commit_lsn, read = transaction.id, transaction.count
        if commit_lsn == former.commit_lsn:
            read = max(read, former.messages)
        return WalPosition(self._lsn, commit_lsn, read, since)

    @property
    def at_end(self) -> bool:
        if self._entries or self._transaction is not None or self._more:
            return False
        return self._watermark is None or self._held is not None or self.covers(self._watermark)

    @property
    def waits(self) -> bool:
        """Whether a transaction lies behind the watermark, and has to wait for a later one."""
        return self._held is not None

    @property
    def unsure(self) -> bool:
        return self._lsn < self._doubtful

    @property
    def replayed_after(self) -> int | None:
        return None

    def start_over(self) -> None:
        """The stream begins where the slot does, whatever was acknowledged before.

        The ids of another history say nothing of what has been read.
        """
        self._since, self._former = None, replace(self._former, since=None)

    def read_to(self, watermark: Watermark) -> None:
        self._watermark = watermark if watermark.snapshot is not None else None

    def end(self, watermark: Watermark) -> None:
        """Leave out from now on what a watermark does not see, which comes from another log.

        Until now, only what an earlier snapshot saw may have been read.
        """
        self._until = watermark

    def covers(self, watermark: Watermark) -> bool:
        if self._entries or self._transaction is not None:
            return self._lsn >= watermark.lsn
        return max(self._lsn, 0 if self._held else self._received()) >= watermark.lsn

    def read(self) -> list[Entry] | None:
        if not self._entries:
            if not self._more:
                self._wait()
            self.fill()
        return self._entries

    def doubts(self, message: Message) -> bool:
        return message.sequence < self._doubtful

    def turn(self, rows: Sequence[Entry]) -> WalPosition:
        position = self._reached
        self.turns += 1
        self._entries, self._count, self._size, self._run = [], 0, 0, None
        return position

    @property
    def between(self) -> int | None:
        """The LSN below which all has been read, if that is all that has come; otherwise None."""
        if self._entries or self._transaction is not None or self._held is not None:
            return None
        return max(self._lsn, self._received())

    def rest(self, lsn: int) -> None:
        """Take note that nothing of ours has committed below an LSN, see ``between``."""
        self._lsn = max(self._lsn, lsn)

    def fill(self) -> None:
        """Read from the stream what has come, up to a page, unless there are entries to take."""
        if self._entries:
            return
        self._behind = self._reached
        self._more = False
        # What is read may have become another since.
        self._kinds.clear()
        if self._held is not None and not self._enter(self._held):
            return
        for number, (_, data) in enumerate(self._messages(), 1):
            run = self._run
            # Nearly all that comes are changes like the one before, and each of them costs.
            if run is not None and data[:_HEAD] == self._head:
                self._present().count += 1
                run.data.append(data)
                self._count += 1
                self._size += len(data)
            else:
                self._take(data)
                if self._held is not None:
                    return
            if self._count >= PAGE_CHANGES or self._size >= PAGE_BYTES or number >= MOST_READ:
                self._more = True
                return

    def _enter(self, begin: pgoutput.Begin) -> bool:
        """Begin to read a transaction, unless it has to wait for a later watermark."""
        skipped = self._since is not None and self._since.sees(begin.xid)
        if self._until is not None and not self._until.sees(begin.xid):
            self._frozen, skipped = self._reached, True
        elif self._watermark is not None and not self._watermark.sees(begin.xid):
            self._held = begin
            return False
        self._held = None
        self._transaction = Transaction(
            begin.final_lsn, begin.at_us, self._txid(begin.xid), skipped
        )
        return True

    def _take(self, data: bytes) -> None:
        kind = data[0]
        if kind in _OPS:
            self._take_row(data, self._present())
            return
        # Whatever else comes ends a run of changes.
        self._run = None
        if kind == _BEGIN:
            self._enter(pgoutput.decode_begin(data))
        elif kind == _COMMIT:
            self._commit(pgoutput.decode_commit(data))
        else:
            self._take_other(pgoutput.decode(data, self._encoding))

    def _take_other(self, change: pgoutput.Change) -> None:
        if isinstance(change, pgoutput.Relation):
            self._columns[change.oid] = tuple(column.name for column in change.columns)
            self._wanted(change.oid, True)
            self._kinds.clear()
        elif isinstance(change, pgoutput.Message):
            if change.transactional and change.prefix == MESSAGE_PREFIX:
                self._take_message(change, self._present())
        elif isinstance(change, pgoutput.Origin):
            self._present().foreign = True
        elif isinstance(change, pgoutput.Truncate):
            self._take_truncate(change, self._present())

    def _present(self) -> Transaction:
        if self._transaction is None:
            raise PayloadError("pgoutput: a change outside a transaction")
        return self._transaction

    def _commit(self, change: pgoutput.Commit) -> None:
        if self._transaction is None or change.lsn != self._transaction.id:
            raise PayloadError(f"a commit at {lsn_text(change.lsn)} that nothing began")
        self._transaction = None
        self._lsn = change.end_lsn

    def _is_new(self, transaction: Transaction) -> bool:
        """Count one more change; return whether it lies behind the position where we began."""
        transaction.count += 1
        if transaction.skipped:
            return False
        former = self._former
        return transaction.id != former.commit_lsn or transaction.count > former.messages

    def _take_message(self, change: pgoutput.Message, transaction: Transaction) -> None:
        number = transaction.count
        new = self._is_new(transaction)
        found = parse_message(change, self._is_secret, transaction.id, self._encoding, number)
        if isinstance(found, Mute):
            transaction.muted = found.on
        elif isinstance(found, Context):
            transaction.context = found.text
        elif found is None:
            self._forged(change.lsn)
        elif new:
            self._entries.append(found)
            self._count += 1
            self._size += len(change.content)

    def _take_row(self, data: bytes, transaction: Transaction) -> None:
        number = transaction.count
        self._run = None
        if not self._is_new(transaction) or transaction.muted:
            return
        head = self._head = data[:_HEAD]
        if head in self._kinds:
            kind = self._kinds[head]
        else:
            kind = self._kinds[head] = self._kind(_OPS[data[0]], pgoutput.relation_of(data))
        if kind is not None:
            self._run = self._begin_run(kind, transaction, number, [data])
            self._count += 1
            self._size += len(data)

    def _take_truncate(self, change: pgoutput.Truncate, transaction: Transaction) -> None:
        number = transaction.count
        if self._is_new(transaction) and not transaction.muted:
            for relation in change.relations:
                if (kind := self._kind("truncated", relation)) is not None:
                    self._begin_run(kind, transaction, number, [])
                    self._count += 1

    def _kind(self, op: str, relation: int) -> Kind | None:
        if not self._wanted(relation, False):
            return None
        return Kind(op, relation, self._columns.get(relation, ()))

    def _begin_run(
        self, kind: Kind, transaction: Transaction, number: int, data: list[bytes]
    ) -> Run:
        run = Run(
            kind,
            transaction.id,
            transaction.txid,
            transaction.at_us,
            transaction.foreign,
            number,
            transaction.context,
            data,
        )
        self._entries.append(run)
        return run
