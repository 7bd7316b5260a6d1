"""Writers: transactions that overlap, take long, roll back, and touch records in any order."""

from __future__ import annotations

import random
import threading
from collections import Counter
from contextlib import suppress

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


class Writers:
    """Some threads that write until told to stop; ``done`` counts what their transactions were."""

    def __init__(self, dsn: str, count: int, seed: int) -> None:
        self._dsn = dsn
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self.done: Counter[str] = Counter()
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
                    cursor.execute("SET deadlock_timeout TO '50ms'")
                    connection.commit()
                    while not self._stopping.is_set():
                        self._transact(cursor, chance)
            except psycopg2.Error as error:
                # A restart, most likely: whether the last COMMIT came through, history knows.
                self._count(f"interrupted ({type(error).__name__})")
            finally:
                with suppress(psycopg2.Error):
                    connection.close()

    def _transact(self, cursor: Cursor, chance: random.Random) -> None:
        [body] = chance.choices([*_KINDS], [*_KINDS.values()])
        kind = body.__name__
        connection = cursor.connection
        try:
            if chance.random() < 0.5:
                # Its id is taken early, whenever its rows' are.
                cursor.execute("SELECT pg_catalog.pg_current_xact_id()")
                self._linger(chance, 0.02)
            body(self, cursor, chance)
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
        self._count(kind)
        self._linger(chance, 0.02)

    def _count(self, kind: str) -> None:
        with self._lock:
            self.done[kind] += 1

    def _linger(self, chance: random.Random, most: float) -> None:
        self._stopping.wait(most * chance.random())

    def single(self, cursor: Cursor, chance: random.Random) -> None:
        """One row of one record."""
        _append(cursor, [chance.randrange(RECORDS)])

    def several(self, cursor: Cursor, chance: random.Random) -> None:
        """Records one after another, in an order that another transaction may have reversed."""
        chosen = chance.sample(range(RECORDS), 3)
        for record in chosen:
            _append(cursor, [record])
            self._linger(chance, 0.02)

    def repeated(self, cursor: Cursor, chance: random.Random) -> None:
        """The same record several times."""
        record = chance.randrange(RECORDS)
        for _ in range(3):
            _append(cursor, [record])

    def many(self, cursor: Cursor, chance: random.Random) -> None:
        """A statement of several rows."""
        _append(cursor, chance.sample(range(RECORDS), 8))

    def bulk(self, cursor: Cursor, chance: random.Random) -> None:
        """A statement of so many rows that they take several messages."""
        first = RECORDS + chance.randrange(3) * _BULK
        _append(cursor, list(range(first, first + _BULK)))

    def savepoints(self, cursor: Cursor, chance: random.Random) -> None:
        """Some of what is done is undone."""
        for _ in range(4):
            cursor.execute("SAVEPOINT here")
            _append(cursor, chance.sample(range(RECORDS), 2))
            undone = chance.random() < 0.5
            cursor.execute(f"{'ROLLBACK TO' if undone else 'RELEASE'} SAVEPOINT here")

    def long(self, cursor: Cursor, chance: random.Random) -> None:
        """It writes, waits, and writes again."""
        _append(cursor, [chance.randrange(RECORDS)])
        self._linger(chance, 1.0)
        _append(cursor, [chance.randrange(RECORDS)])

    def silent(self, cursor: Cursor, chance: random.Random) -> None:
        """An update that no watcher asks for."""
        cursor.execute(
            "UPDATE records SET note = note || '.' WHERE id = %s", (chance.randrange(RECORDS),)
        )


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


def _append(cursor: Cursor, records: list[int]) -> None:
    """The next version of each record, in one statement, and what it was in ``history``."""
    cursor.execute(
        f"INSERT INTO records AS r (id, n, nonce) SELECT id, 1, {_NONCE}"
        " FROM pg_catalog.unnest(%s::int[]) AS id"
        " ON CONFLICT (id) DO UPDATE SET n = r.n + 1, nonce = excluded.nonce"
        " RETURNING id, n, nonce, pg_catalog.pg_current_xact_id()::text",
        (records,),
    )
    execute_values(cursor, "INSERT INTO history VALUES %s", cursor.fetchall(), page_size=2000)
