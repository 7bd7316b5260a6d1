"""Writers: transactions that overlap, take long, roll back, and touch records in any order."""

from __future__ import annotations

import random
import threading
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass

import psycopg2
from psycopg2.extensions import cursor as Cursor
from psycopg2.extras import execute_values

# The truth: committed with the change itself, so that a COMMIT whose answer was lost is no riddle.
SCHEMA = """
CREATE TABLE records (
  id int PRIMARY KEY, n int NOT NULL, nonce text NOT NULL, note text NOT NULL DEFAULT ''
);
CREATE TABLE history (
  record int NOT NULL, n int NOT NULL, nonce text NOT NULL, txid xid8 NOT NULL,
  PRIMARY KEY (record, n)
);
"""

RECORDS = 40
_BULK = 1200
_NONCE = "pg_catalog.md5(pg_catalog.random()::text || pg_catalog.clock_timestamp()::text)"


@dataclass(frozen=True)
class Target:
    """A name by which rows are written: of records from ``first`` on, whose table it is, if given.

    ``update``: only what is there is updated.
    """

    table: str
    first: int = 0
    update: bool = False


class Board:
    """By which names writers can write at this time, and whether the table has its own."""

    def __init__(self) -> None:
        self.targets: tuple[Target, ...] = (Target("records"),)
        self._left = self._returned = 0

    def leave(self) -> None:
        """The table's name is to be nobody's."""
        self._left += 1

    def come_back(self) -> None:
        """The table has its name again."""
        self._returned += 1

    @property
    def times_back(self) -> int:
        """How often the table has come back."""
        return self._returned

    def was_away(self, times_back: int) -> bool:
        """Whether the table had another name, at some time since it had come back so often."""
        return self._left > times_back


class Writers:
    """Some threads that write until told to stop; ``done`` counts what their transactions were.

    ``problems`` has the writes that failed, other than by what the campaign does itself: a server
    that restarts, a table that has another name for a while, writers that wait for one another.
    """

    def __init__(
        self, dsn: str, count: int, seed: int, board: Board, *, forging: bool = False
    ) -> None:
        self._dsn = dsn
        self._kinds = {**_KINDS, Writers.forged: 4} if forging else _KINDS
        self._board = board
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self.done: Counter[str] = Counter()
        self.problems: list[str] = []
        self._threads = [
            threading.Thread(target=self._run, args=(random.Random(f"{seed}/{number}"),))
            for number in range(count)
        ]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let each end its transaction, and wait for that."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _run(self, chance: random.Random) -> None:
        while not self._stopping.is_set():
            try:
                connection = psycopg2.connect(self._dsn, connect_timeout=2)
            except psycopg2.OperationalError:
                self._stopping.wait(0.05)
                continue
            try:
                with connection.cursor() as cursor:
                    while not self._stopping.is_set():
                        self._transact(cursor, chance)
            except psycopg2.Error as error:
                # Of a restart, history knows whether the last COMMIT came through.
                if not (connection.closed or isinstance(error, _RESTARTS)):
                    with self._lock:
                        self.problems.append(
                            f"a write failed: {type(error).__name__}: {str(error).strip()}"
                        )
                self._count(f"interrupted ({type(error).__name__})")
            finally:
                with suppress(psycopg2.Error):
                    connection.close()

    def _transact(self, cursor: Cursor, chance: random.Random) -> None:
        [body] = chance.choices([*self._kinds], [*self._kinds.values()])
        kind = body.__name__
        connection = cursor.connection
        times_back = self._board.times_back
        target = chance.choice(self._board.targets)
        try:
            if chance.random() < 0.5:
                # Its id is taken early, whenever its rows' are.
                cursor.execute("SELECT pg_catalog.pg_current_xact_id()")
                self._linger(chance, 0.02)
            body(self, cursor, chance, target)
            if chance.random() < 0.2:
                self._linger(chance, 0.3)
            if chance.random() < 0.15:
                connection.rollback()
                kind = f"{kind}, rolled back"
            else:
                connection.commit()
        except (psycopg2.errors.DeadlockDetected, psycopg2.errors.UniqueViolation) as error:
            connection.rollback()
            kind = f"{kind}, rolled back by {type(error).__name__}"
        except psycopg2.errors.UndefinedTable as error:
            connection.rollback()
            if target.table == "records" and not self._board.was_away(times_back):
                raise
            kind = f"{kind}, rolled back by {type(error).__name__}"
        self._count(kind)
        self._linger(chance, 0.02)

    def _count(self, kind: str) -> None:
        with self._lock:
            self.done[kind] += 1

    def _linger(self, chance: random.Random, most: float) -> None:
        self._stopping.wait(most * chance.random())

    def single(self, cursor: Cursor, chance: random.Random, target: Target) -> None:
        """One row of one record."""
        _append(cursor, target, [chance.choice(_few(target))])

    def several(self, cursor: Cursor, chance: random.Random, target: Target) -> None:
        """Records one after another, in an order that another transaction may have reversed."""
        chosen = chance.sample(_few(target), 3)
        for record in chosen:
            _append(cursor, target, [record])
            self._linger(chance, 0.02)

    def repeated(self, cursor: Cursor, chance: random.Random, target: Target) -> None:
        """The same record several times."""
        record = chance.choice(_few(target))
        for _ in range(3):
            _append(cursor, target, [record])

    def many(self, cursor: Cursor, chance: random.Random, target: Target) -> None:
        """A statement of several rows."""
        _append(cursor, target, chance.sample(_few(target), 8))

    def bulk(self, cursor: Cursor, chance: random.Random, target: Target) -> None:
        """A statement of so many rows that they take several messages."""
        first = RECORDS + chance.randrange(3) * _BULK
        _append(cursor, target, [target.first + each for each in range(first, first + _BULK)])

    def savepoints(self, cursor: Cursor, chance: random.Random, target: Target) -> None:
        """Some of what is done is undone."""
        for _ in range(4):
            cursor.execute("SAVEPOINT here")
            _append(cursor, target, chance.sample(_few(target), 2))
            undone = chance.random() < 0.5
            cursor.execute(f"{'ROLLBACK TO' if undone else 'RELEASE'} SAVEPOINT here")

    def long(self, cursor: Cursor, chance: random.Random, target: Target) -> None:
        """It writes, waits, and writes again."""
        _append(cursor, target, [chance.choice(_few(target))])
        self._linger(chance, 1.0)
        _append(cursor, target, [chance.choice(_few(target))])

    def silent(self, cursor: Cursor, chance: random.Random, target: Target) -> None:
        """An update that no watcher asks for."""
        cursor.execute(
            f"UPDATE {target.table} SET note = note || '.' WHERE id = %s",
            (chance.choice(_few(target)),),
        )

    def forged(self, cursor: Cursor, chance: random.Random, target: Target) -> None:
        """Messages in the write-ahead log that only look like those of triggers, and a change."""
        for transactional in (True, False):
            cursor.execute(
                "SELECT pg_catalog.pg_logical_emit_message(%s, 'pgsignals', %s)",
                (transactional, chance.choice(_FORGERIES)),
            )
        _append(cursor, target, [chance.choice(_few(target))])


_FORGERIES = ("", "1", "1 2 3 {}", f"{'9' * 18} 1 1 {{}}\n[1]", "junk " * 1000)

_KINDS = {
    Writers.single: 24,
    Writers.several: 16,
    Writers.repeated: 4,
    Writers.many: 8,
    Writers.savepoints: 8,
    Writers.long: 4,
    Writers.silent: 4,
    Writers.bulk: 1,
}


# Errors by which a server that stops or crashes ends its sessions.
_RESTARTS = (
    psycopg2.errors.AdminShutdown,
    psycopg2.errors.CrashShutdown,
    psycopg2.errors.CannotConnectNow,
)


def _few(target: Target) -> range:
    """The records that are written often."""
    return range(target.first, target.first + RECORDS)


def write_one(cursor: Cursor) -> tuple[int, int, str]:
    """A version of one record: it, its n and its nonce."""
    [(record, n, nonce)] = _append(cursor, Target("records"), [0])
    return record, n, nonce


def _append(cursor: Cursor, target: Target, records: list[int]) -> list[tuple[int, int, str]]:
    """The next version of each record, in one statement, and what it was in ``history``."""
    cursor.execute(
        (
            f"UPDATE {target.table} AS r SET n = r.n + 1, nonce = {_NONCE} WHERE id = ANY (%s)"
            if target.update
            else f"INSERT INTO {target.table} AS r (id, n, nonce) SELECT id, 1, {_NONCE}"
            " FROM pg_catalog.unnest(%s::int[]) AS id"
            " ON CONFLICT (id) DO UPDATE SET n = r.n + 1, nonce = excluded.nonce"
        )
        + " RETURNING id, n, nonce, pg_catalog.pg_current_xact_id()::text",
        (records,),
    )
    made = cursor.fetchall()
    execute_values(cursor, "INSERT INTO history VALUES %s", made, page_size=2000)
    return [(record, n, nonce) for record, n, nonce, _ in made]
