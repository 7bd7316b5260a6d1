"""32 clients that insert single rows, with fsync on: the share of their throughput that is kept."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path

from pgsignals.testing import Server, ServerNotFound

from .baselines import ROW_TRIGGER, select_loop
from .harness import (
    INSERT_ONE,
    Counter,
    Figure,
    Options,
    connect,
    execute,
    interleave,
    ratios,
    shop,
    throwaway_server,
    watching,
)

CLIENTS = 32


def _pgbench(server: Server) -> str:
    beside = server.installation.bindir / "pgbench"
    found = str(beside) if beside.exists() else shutil.which("pgbench")
    if found is None:
        raise ServerNotFound(
            f"pgbench is neither in {server.installation.bindir} nor on PATH; it comes with "
            "PostgreSQL (`apt install postgresql`)."
        )
    return found


def _throughput(
    pgbench: str,
    dsn: str,
    seconds: int,
    listen: Callable[[str, Counter], AbstractContextManager[None]] | None,
) -> float:
    """Transactions per second while the side's own listener is at work."""
    connection = connect(dsn)
    execute(connection, "TRUNCATE orders")
    connection.close()
    with tempfile.NamedTemporaryFile("w", suffix=".sql") as script, ExitStack() as stack:
        counter = Counter()
        if listen is not None:
            stack.enter_context(listen(dsn, counter))
        script.write(INSERT_ONE)
        script.flush()
        options = f"-n -c {CLIENTS} -j 2 -M prepared -T {seconds} -f"
        done = subprocess.run(
            [pgbench, *options.split(), script.name, dsn], capture_output=True, text=True
        )
        written = re.search(r"actually processed: (\d+)", done.stdout)
        if listen is not None and written is not None:
            counter.wait_for_all(int(written[1]))
    found = re.search(r"tps = ([\d.]+) \(without", done.stdout)
    if done.returncode != 0 or found is None:
        raise RuntimeError(f"{Path(pgbench).name} failed:\n{done.stdout}{done.stderr}")
    return float(found[1])


def measure(options: Options) -> list[Figure]:
    """The share of the unwatched throughput that ours keeps, and that a row trigger keeps."""
    seconds = 2 if options.quick else 6
    with throwaway_server(fsync=True) as server:
        pgbench = _pgbench(server)
        plain, ours = shop(server), shop(server)
        theirs = shop(server, ROW_TRIGGER)
        tps = interleave(
            options.rounds,
            {
                "unwatched": partial(_throughput, pgbench, plain, seconds, None),
                "notify": partial(_throughput, pgbench, ours, seconds, watching),
                "row trigger": partial(_throughput, pgbench, theirs, seconds, select_loop),
            },
            warm_up=False,
        )
    return [
        Figure(
            f"{CLIENTS} single-row writers, notify ÷ row trigger",
            ratios(tps["notify"], tps["row trigger"]),
            "",
            1.0,
            at_most=False,
        ),
        Figure("  share of unwatched kept by notify", ratios(tps["notify"], tps["unwatched"]), ""),
        Figure("  share kept by a row trigger", ratios(tps["row trigger"], tps["unwatched"]), ""),
        Figure("  unwatched", tps["unwatched"], "tps"),
    ]
