"""A standby of a server, by streaming replication, that can be promoted."""

from __future__ import annotations

import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg2

from pgsignals.testing import Server
from tests.waiting import DEADLINE, eventually

# The physical slot by which the standby reads.
SLOT = "standby"


class Standby(Server):
    """A copy of a running server, which follows it; its settings come behind the server's own."""

    def __init__(self, primary: Server) -> None:
        conninfo = f"host=127.0.0.1 port={primary.port} user=postgres dbname=postgres"
        super().__init__(
            primary.version,
            {
                "primary_conninfo": conninfo,
                "primary_slot_name": SLOT,
                "hot_standby_feedback": "on",
                "wal_retrieve_retry_interval": "100ms",
            },
        )
        self._primary = primary

    def _initialise(self, home: Path) -> None:
        """Copy the primary's data, in place of new ones."""
        data = home / "data"
        subprocess.run(
            [
                self.installation.bindir / "pg_basebackup",
                f"--dbname={self._primary.dsn()}",
                f"--pgdata={data}",
                "--checkpoint=fast",
                "--no-sync",
                "--create-slot",
                f"--slot={SLOT}",
            ],
            check=True,
            capture_output=True,
        )
        settings = {"unix_socket_directories": "", **self._settings}
        with (data / "postgresql.conf").open("a", encoding="utf-8") as conf:
            conf.writelines(f"{name} = '{value}'\n" for name, value in settings.items())
        (data / "standby.signal").touch()
        self._account.own(data)

    def copy_slots(self) -> None:
        """Keep copies of the logical slots that want one; return when there is one of each.

        From then on, these slots give nothing that the standby has not got. From PostgreSQL 17 on.
        """
        ask(self._primary, f"ALTER SYSTEM SET synchronized_standby_slots = '{SLOT}'")
        ask(self, "ALTER SYSTEM SET sync_replication_slots = on")
        ask(self._primary, "SELECT pg_reload_conf()")
        wanted = ask(
            self._primary, "SELECT slot_name FROM pg_replication_slots WHERE failover ORDER BY 1"
        )

        def copied() -> list[Any]:
            # A copy cannot begin before what the standby has, and the slots go on with a snapshot.
            ask(self._primary, "SELECT pg_log_standby_snapshot()")
            # A look for new settings ends the pause between two tries, of up to half a minute.
            ask(self, "SELECT pg_reload_conf()")
            return ask(
                self,
                "SELECT slot_name FROM pg_replication_slots WHERE synced AND NOT temporary"
                " ORDER BY 1",
            )

        eventually(copied, lambda found: found == wanted)

    @property
    def follows(self) -> bool:
        """Whether it gets what the primary writes, which waits for that when it stops."""
        state = (
            "SELECT state FROM pg_stat_replication JOIN pg_replication_slots ON active_pid = pid"
        )
        return ask(self._primary, f"{state} WHERE slot_name = '{SLOT}'") == [("streaming",)]

    def take_over(self) -> None:
        """Come to the address of the primary, which has been stopped, and be promoted."""
        self.stop("fast")
        self._port = self._primary.port
        self.start()
        self.promote()

    def promote(self) -> None:
        """Have it take writes, and return when it does."""
        assert ask(self, "SELECT pg_promote(true, %s)", (int(DEADLINE),)) == [(True,)]


def ask(server: Server, statement: str, parameters: Any = None) -> list[Any]:
    """Run a statement, through a connection of its own; its rows, if it gives any."""
    with closing(psycopg2.connect(server.dsn())) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement, parameters)
            return cursor.fetchall() if cursor.description else []
