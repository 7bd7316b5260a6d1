"""The stream of changes that the server sends from a replication slot.

What psycopg2 acknowledges (2.9.13, ``pq_read_replication_message`` in its pqpath.c). A replication
cursor has the position that it tells the server as flushed, and the highest one that the program
has given it. On each keepalive, within ``read_message``, it moves the former to the keepalive's
position when the latter is at or above the position of the message that it has read last; it takes
everything for done then. If the keepalive asks for an answer, it tells the position at once, and
otherwise with the next feedback. That comparison is wrong in three cases:

- The message read last lies below what was acknowledged, although nobody has acknowledged the
  transactions before: the rows of a transaction that began early and committed late, or its Begin.
- It has no position, but 0: a Relation, a Type, or a Begin that an Origin follows.
- Nothing has been read yet.

So we read with one cursor and tell with another. The server does not know of cursors: all feedback
is its session's. The cursor that tells never sees a keepalive, and tells exactly what was given to
``confirm``. The cursor that reads is given nothing, so that it has 0, and its comparison holds in
the second and third case alone; where it does not hold it answers with 0, which the server takes
for no position.

What is left: the reading cursor answers by itself, in the second or third case, to a keepalive that
asks. The server asks when it has heard nothing for half of the lease, and when it stops. While the
feedback is sent in time, that takes a network that held it up; in the third case, the server's stop
while nothing has been read yet. ``unasked`` tells what the answer may have acknowledged.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import psycopg2
import psycopg2.extensions
from psycopg2 import errors as pg
from psycopg2.extras import LogicalReplicationConnection

from ..core.errors import DatabaseError, PrivilegeError
from ..core.lsn import lsn_text
from ..core.redaction import error_text
from ..postgres.link import Link
from ..postgres.session_settings import session_settings
from ..postgres.waiter import Waiter
from ..triggers.sql import SETTINGS
from .slots import SlotMissing, SlotTaken, copy, create

# The server keeps a transaction's changes in memory up to this, and writes the rest to disk and
# reads them again: with the default of 64 MB, 1,000,000 rows of one statement came at less than two
# thirds of the speed. It is a bound for one session, which uses as much as the transactions need.
WORK_MEM = "256MB"
# The part of a timeout that the server may take for making a slot: what is left is for saying why
# it could not.
SLOT_SHARE = 0.7
# psycopg2 would tell the position by itself this often, from the cursor that reads. It takes no
# "never", but a number of seconds up to this.
_NEVER = 2**31 - 1
_BEGIN = ord("B")
# How many messages are read between two looks at the clock: less than a millisecond of work.
_LEASE_MESSAGES = 100
# Unlike the monotonic clock, this one goes on while the machine sleeps, as the server's does.
_now: Callable[[], float] = (
    partial(time.clock_gettime, time.CLOCK_BOOTTIME)
    if hasattr(time, "CLOCK_BOOTTIME")
    else time.monotonic
)

_CAUSES = (
    (
        "not created in this database",
        "it belongs to another database: drop it, or give the consumer another name=",
    ),
    (
        "cannot use physical",
        "it is a physical one: drop it, or give the consumer another name=",
    ),
    ("syntax error", "something between us and the server takes the session for an ordinary one"),
    ("wal_level", "set wal_level=logical on the server, and restart it"),
    (
        "invalidated|can no longer",
        "the server has removed WAL that it needs: drop it, and start again with a Gap",
    ),
)


class PublicationMissing(DatabaseError):
    """The publication was missing when what is to be read was written; the slot is stuck there."""


class ReplicationStream(Link):
    """Reads what is committed from a replication slot, in the order of the commits.

    Everything is for one thread. ``beat`` is to be called several times within a third of the
    lease, whatever else that thread does.
    """

    def __init__(self, dsn: str, waiter: Waiter, cancelled: Callable[[], bool]) -> None:
        super().__init__(dsn, waiter, cancelled)
        self._slot = ""
        self._descriptor = -1
        self._patience = 0.0
        self._told_at = 0.0
        # Replication cursors, whose methods the stubs leave untyped.
        self._reader: Any
        self._teller: Any
        # The reading cursor's time of its last feedback, before the first.
        self._unanswered: Any = None
        self._answered = False
        # Whether a keepalive would move the position that the reading cursor tells.
        self._adrift = True
        # At most this is that position; and the Begin of the transaction that is being read, which
        # has the position of its commit.
        self._bound, self._begun = 0, b""
        #: Up to here the server had sent all it has for us when ``read`` last returned None.
        self.received = 0
        #: Up to here everything is acknowledged, durably.
        self.confirmed = 0

    def open(
        self,
        slot: str,
        publications: Sequence[str],
        start_lsn: int,
        lease: float,
        timeout: float,
        *,
        temporary: bool = False,
        copied: str = "",
    ) -> None:
        """Connect and begin to read, behind ``start_lsn``, within ``timeout`` seconds.

        With ``temporary``, the slot is made first, as a copy of the slot ``copied`` if there is
        such a name, and is gone with the connection. The server ends
        the session, and frees the slot, when it has heard nothing for ``lease`` seconds. Raises
        ConnectError, SlotTaken, SlotMissing, PrivilegeError or DatabaseError.
        """
        if psycopg2.extensions.get_wait_callback() is not None:
            raise DatabaseError(
                "psycopg2 cannot read from a replication slot while it has a wait callback, which "
                "psycogreen's patch_psycopg() sets for gevent and eventlet: read in a process "
                'without it (a relay, say), or use delivery="outbox"'
            )
        deadline = time.monotonic() + timeout
        # Between SQL_ASCII and a database's encoding the server converts nothing, so that a
        # character that the other one lacks does not end the stream.
        self._connect(timeout, LogicalReplicationConnection, client_encoding="SQL_ASCII")
        try:
            if temporary:
                self._make(slot, copied, timeout, deadline)
            self._start(slot, publications, start_lsn, lease, deadline)
        except (psycopg2.Error, TimeoutError) as error:
            self.close()
            raise _start_error(slot, error) from error
        except BaseException:
            self.close()
            raise
        self.listen(True)

    def _make(self, slot: str, copied: str, timeout: float, deadline: float) -> None:
        """Make a temporary slot, of this session."""

        def execute(statement: str, parameters: Sequence[Any]) -> Sequence[tuple[Any, ...]]:
            cursor = self._live.cursor()
            cursor.execute(statement, parameters)
            self._finish(deadline)
            return cursor.fetchall()

        if copied:
            copy(execute, copied, slot)
        else:
            create(execute, slot, self.server_version, SLOT_SHARE * timeout, temporary=True)

    def _start(
        self,
        slot: str,
        publications: Sequence[str],
        start_lsn: int,
        lease: float,
        deadline: float,
    ) -> None:
        connection = self._live
        self._slot, self._patience = slot, lease / 3
        self._reader, self._teller = connection.cursor(), connection.cursor()
        settings = {
            **dict(SETTINGS),
            "logical_decoding_work_mem": WORK_MEM,
            "wal_sender_timeout": f"{max(1, round(1000 * lease))}ms",
        }
        # By a statement rather than the connection's options, which would replace PGOPTIONS and
        # those of a service, and cannot name a setting that an older server does not know.
        self._reader.execute(
            "; ".join(
                [
                    session_settings(connection.server_version),
                    *(f"SET SESSION {name} TO '{value}'" for name, value in settings.items()),
                ]
            )
        )
        self._finish(deadline)
        names = ",".join(_quoted(name, '"') for name in publications)
        options = {"proto_version": "1", "publication_names": names, "messages": "true"}
        given = ", ".join(f"{name} {_quoted(value, chr(39))}" for name, value in options.items())
        self._reader.start_replication_expert(
            f"START_REPLICATION SLOT {_quoted(slot, chr(34))} LOGICAL {lsn_text(start_lsn)}"
            f" ({given})",
            decode=False,
            status_interval=_NEVER,
        )
        self._finish(deadline)
        self._descriptor = connection.fileno()
        self._unanswered = self._reader.feedback_timestamp
        self._told_at = _now()
        self.beat()

    def fileno(self) -> int:
        """Return the descriptor of the connection's socket."""
        return self._descriptor

    def listen(self, wanted: bool) -> None:
        """Have the waiter's ``wait`` end when something arrives, or not."""
        if wanted and self._connection is not None:
            self.waiter.watch(self._descriptor)
        else:
            self.waiter.unwatch(self._descriptor)

    def read(self) -> tuple[int, bytes] | None:
        """Return the position and the bytes of the next message; None if none is here now.

        Raises like ``messages``.
        """
        return next(self.messages(), None)

    def messages(self) -> Iterator[tuple[int, bytes]]:
        """Yield the position and the bytes of each message that is here now.

        Go on to the end before each wait: the socket does not show what libpq has read already.
        Raises DatabaseError once the stream has ended, or the lease has been missed.
        """
        # One generator, not a call for each message: there are three of them for a single row.
        read_message = self._reader.read_message
        number = 0
        while True:
            if not number % _LEASE_MESSAGES:
                self._require_lease()
            number += 1
            try:
                # A call ends with a keepalive, and does not look whether more has arrived.
                message = read_message() or read_message()
                if message is None and self._encrypted:
                    # Of a record that OpenSSL has read, libpq may have taken a part (15.18 does,
                    # 17.11 does not), and the socket does not show the rest.
                    message = read_message()
            except psycopg2.Error as error:
                raise self._ended(error) from error
            if message is None:
                break
            start: int = message.data_start
            payload: bytes = message.payload
            if payload[0] == _BEGIN:
                self._begun = payload
            if self._adrift or not start:
                self._drift(start)
            yield start, payload
        end = self._reader.wal_end
        if end > self.received:
            self.received = end
        if self._adrift:
            self._bound = max(self._bound, end)

    def _drift(self, start: int) -> None:
        """Note where a message lies before or behind which a keepalive is answered."""
        if self._adrift:
            # A keepalive may have come before this message. It was not beyond the commit.
            commit = int.from_bytes(self._begun[1:9], "big")
            self._bound = max(self._bound, commit, start)
        self._adrift = not start

    def confirm(self, lsn: int) -> None:
        """Note that everything up to ``lsn`` is acknowledged, durably; ``beat`` tells the server.

        That must be the end of a commit, or what ``received`` was when all before was acknowledged:
        what is committed beyond it, and at or below ``lsn``, is lost.
        """
        self.confirmed = max(self.confirmed, lsn)

    def beat(self) -> None:
        """Tell the server that we live, and what is confirmed. Raises like ``read``."""
        self._require_lease()
        now = _now()
        try:
            self._teller.send_feedback(flush_lsn=self.confirmed, force=True)
        except psycopg2.Error as error:
            raise self._ended(error) from error
        self._told_at = now

    @property
    def unasked(self) -> int:
        """The highest LSN that psycopg2 may have told the server as flushed, unasked.

        It is ``confirmed`` unless psycopg2 has answered the server by itself. A position that is
        saved below it will be found below the slot's.
        """
        self._answered = self._answered or self._has_answered()
        return max(self.confirmed, self._bound) if self._answered else self.confirmed

    def close(self) -> None:
        """Close the connection, which frees the slot."""
        if self._connection is not None:
            self.listen(False)
            # A closed connection does not tell.
            self._answered = self._answered or self._has_answered()
        super().close()

    def _has_answered(self) -> bool:
        if self._unanswered is None:
            return False
        try:
            return bool(self._reader.feedback_timestamp != self._unanswered)
        except psycopg2.InterfaceError:
            # The connection is lost, and does not tell.
            return self._connection is not None

    def _require_lease(self) -> None:
        """Raise DatabaseError if the feedback is late.

        The server may have asked for an answer by now, or given the session up. This stays so:
        feedback sent now would not unsay what lies in the socket already.
        """
        late = _now() - self._told_at
        if late > self._patience:
            raise DatabaseError(
                f"the stream from the replication slot {self._slot!r} is given up, since this "
                f"process has told the server nothing for {late:.1f} s, more than a third of the "
                "lease: was it stopped, or is the machine overloaded?"
            )

    def _ended(self, error: psycopg2.Error) -> DatabaseError:
        # libpq may have closed the socket, whose number another one may get.
        self.listen(False)
        text = error_text(error)
        if isinstance(error, pg.UndefinedObject):
            return PublicationMissing(
                f"the stream from the replication slot {self._slot!r} ended: at its place in the "
                f"log there was no such publication. {text}"
            )
        if "no COPY in progress" in text or "PGRES_COPY_BOTH" in text:
            text = "the server has ended it, as it does when it stops"
        return DatabaseError(f"the stream from the replication slot {self._slot!r} ended: {text}")


def _quoted(text: str, mark: str) -> str:
    return mark + text.replace(mark, 2 * mark) + mark


def _start_error(slot: str, error: Exception) -> DatabaseError:
    text = error_text(error)
    begin = f"Cannot read from the replication slot {slot!r}"
    if isinstance(error, pg.ObjectInUse):
        return SlotTaken(
            f"{begin}: another session reads from it. It is free when that one ends, at the latest "
            f"when it has been silent for its lease. {text}"
        )
    if isinstance(error, pg.UndefinedObject):
        return SlotMissing(
            f"{begin}: it has been dropped, or this is another server. Make it anew, with a Gap. "
            f"{text}"
        )
    if isinstance(error, pg.InsufficientPrivilege):
        return PrivilegeError(f"{begin}: the role needs ALTER ROLE … REPLICATION. {text}")
    cause = next((f": {meaning}" for pattern, meaning in _CAUSES if re.search(pattern, text)), "")
    return DatabaseError(f"{begin}{cause}. {text}")
