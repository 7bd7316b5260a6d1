"""Several processes of one name that read the write-ahead log: who takes over, and when."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Database
from tests.consumers import CONSUME, LEASE, consumers, insert
from tests.forked import Forked
from tests.proxy import Proxy
from tests.waiting import eventually
from tests.wal import slots, until_saved


@pytest.fixture
def items(each_dsn: str, connect: Callable[[str], Database]) -> Database:
    """A database with a table."""
    db = connect(each_dsn)
    db("CREATE TABLE items (id bigserial PRIMARY KEY)")
    return db


@pytest.mark.parametrize(
    ("number", "most"),
    # The standby asks every half second; the rest is this machine's.
    [(signal.SIGKILL, 2.0), (signal.SIGTERM, 2.0), (signal.SIGSTOP, LEASE + 2.0)],
)
def test_a_standby_takes_over(items: Database, number: signal.Signals, most: float) -> None:
    """At once when the active process has gone, and after the lease when it hangs."""
    with consumers(items.dsn, items.dsn, delivery="wal") as (active, standby):
        assert insert(items) == active.out()
        active.process.send_signal(number)
        began = time.monotonic()
        fresh, former = insert(items), ["1"]
        # Told to end, it may take that one too, and then acknowledges it.
        if number == signal.SIGTERM and fresh in active.end().out:
            former.append(fresh)
            fresh = insert(items)
        # What the former one may not have acknowledged comes again.
        while (line := standby.out()) != fresh:
            assert line in former
        took = time.monotonic() - began
        assert took < most
        assert slots(items, "active") == [True]


def states(pid: int) -> set[str]:
    """The states of a process's threads, as Linux has them."""
    found = Path(f"/proc/{pid}/task").glob("*/stat")
    return {each.read_text().rpartition(")")[2].split()[0] for each in found}


def test_a_stopped_process_delivers_nothing_behind_its_lease(items: Database) -> None:
    """Its slot's session is ended; when it goes on it is a standby."""
    with consumers(items.dsn, items.dsn, delivery="wal", marking=True) as (active, standby):
        assert insert(items) == active.out()
        until_saved(items)
        [reader] = slots(items, "active_pid")
        active.process.send_signal(signal.SIGSTOP)
        # Its threads run on for a few milliseconds, within the lease.
        eventually(lambda: states(active.process.pid), lambda found: found == {"T"})
        # More than fit into what it has read.
        waiting = [insert(items) for _ in range(200)]
        got = [standby.out() for _ in waiting]
        assert [line.split()[0] for line in got] == waiting
        assert items("SELECT pid FROM pg_stat_activity WHERE pid = %s", (reader,)) == []
        active.process.send_signal(signal.SIGCONT)
        keys = [insert(items) for _ in range(50)]
        assert [standby.out() for _ in keys] == keys
        standby.process.terminate()
        while (line := standby.out()) != "ended":
            pytest.fail(line)
        last = insert(items)
        assert active.out() == last


def test_a_process_in_a_black_hole(items: Database) -> None:
    """Longer than its lease without an answer, it begins no call; the other one has taken over."""
    address, _, name = items.dsn.rpartition("/")
    host, _, port = address.rpartition(":")
    with Proxy("127.0.0.1", int(port)) as proxy:
        through = f"{host}:{proxy.port}/{name}"
        with consumers(through, items.dsn, delivery="wal") as (active, standby):
            assert insert(items) == active.out()
            proxy.stall()
            fresh = insert(items)
            while standby.out() != fresh:
                pass
            proxy.resume()
            keys = [insert(items) for _ in range(50)]
            assert [standby.out() for _ in keys] == keys
            standby.process.terminate()
            assert standby.out() == "ended"
            last = insert(items)
            assert active.out() == last


def test_killed_within_a_transaction(items: Database) -> None:
    """Of a transaction of 20,000 messages, each comes, in order; what came twice says so."""
    rows = 20_000
    with consumers(items.dsn, items.dsn, delivery="wal", marking=True) as (active, standby):
        assert insert(items) == active.out()
        writer = threading.Thread(
            target=items,
            args=(
                f"DO $$ BEGIN FOR i IN 1..{rows} LOOP"
                " INSERT INTO items DEFAULT VALUES; END LOOP; END $$",
            ),
        )
        writer.start()
        first = [active.out() for _ in range(7000)]
        active.process.kill()
        # What it had said before it was killed lies in the pipe.
        first += [line for line in active.end().out if line != "started"]
        second: list[str] = []
        while not second or not second[-1].startswith(f"{rows + 1}"):
            second.append(standby.out())
        writer.join()
    keys = [int(line.split()[0]) for line in first]
    later = [int(line.split()[0]) for line in second]
    assert keys == [*range(2, keys[-1] + 1)]
    # The first one may come again, too.
    later = later[later.index(1) + 1 :] if 1 in later else later
    assert later == [*range(later[0], rows + 2)]
    assert later[0] <= keys[-1] + 1
    again = {line for line in second if int(line.split()[0]) <= keys[-1]}
    assert all(line.endswith(" again") for line in again)


def test_killed_again_and_again(items: Database) -> None:
    """Whoever is killed, and when: each item comes, in order."""
    found: list[int] = []
    count = 0

    def read_until(process: Forked, last: int) -> None:
        while not found or found[-1] < last:
            line = process.out()
            if line != "started":
                found.append(int(line))

    with consumers(items.dsn, delivery="wal"):
        pass
    for _ in range(5):
        items("INSERT INTO items SELECT FROM generate_series(1, 3000)")
        count += 3000
        process = Forked("-c", CONSUME, "1", str(LEASE), "wal", "", dsn=items.dsn)
        read_until(process, count - 1000)
        process.process.kill()
        # What it had said before it was killed lies in the pipe.
        found += [int(line) for line in process.end().out if line != "started"]
    process = Forked("-c", CONSUME, "1", str(LEASE), "wal", "", dsn=items.dsn)
    read_until(process, count)
    process.process.kill()
    process.process.wait()
    assert [*dict.fromkeys(found)] == [*range(1, count + 1)]
