"""``pgsignals backfill`` and ``backfills``: what an operator asks for, sees, and ends."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable

import pytest

import pgsignals
from pgsignals import Hub
from tests import commands
from tests.conftest import DEADLINE, Database, Recorder
from tests.inside import run
from tests.terminal import ESCAPE, Terminal
from tests.terminal import terminal as terminal


@pytest.fixture(autouse=True)
def users(db: Database) -> None:
    """A table of 300 users."""
    db("CREATE TABLE users (id int PRIMARY KEY)")
    db("INSERT INTO users SELECT generate_series(1, 300)")


def test_a_backfill(dsn: str, hub: Hub, recorder: Recorder) -> None:
    """The command waits for the end, tells of it on stderr, and gives JSON when asked to."""
    hub.on("users", "snapshot")(recorder)
    hub.start(dsn, ["users"], delivery="outbox", name="mailer")
    done = run("backfill", "users", "--name", "mailer", "--where", "id > 290", "--json", dsn=dsn)
    assert done.code == 0, done.err
    [line] = done.out
    found = json.loads(line)
    assert (found["state"], found["done"], found["delivered"]) == ("done", 300, 10)
    assert done.err[0] == "Backfill 1 of public.users for mailer: about 300 rows."
    assert done.err[-1].startswith("Backfill 1 done: 300 rows gone through, 10 events, ")
    assert len(recorder.items) == 10
    [listed] = json.loads(run("backfills", "list", "--json", dsn=dsn).out[0])["backfills"]
    assert listed == found
    header, row = run("backfills", "list", dsn=dsn).out
    assert header.split()[:4] == ["ID", "CONSUMER", "OF", "STATE"]
    assert row.split()[:4] == ["1", "mailer", "public.users", "done"]
    assert run("backfills", "cancel", "1", dsn=dsn).out == ["Backfill 1 had ended."]


def test_without_waiting(dsn: str, hub: Hub, recorder: Recorder) -> None:
    """It is asked for, seen in status, and can be cancelled, while no process reads."""
    hub.on("users", "snapshot")(recorder)
    hub.start(dsn, ["users"], delivery="outbox", name="mailer")
    hub.stop()
    asked = run("backfill", "users", "--name", "mailer", "--no-wait", dsn=dsn)
    assert (asked.code, asked.out) == (0, [])
    line = "Backfill 1 of public.users for mailer: 0 of about 300 rows (0%)."
    assert line in run("status", dsn=dsn).out
    outbox = json.loads(run("status", "--json", dsn=dsn).out[0])["outbox"]
    assert [each["state"] for each in outbox["backfills"]] == ["running"]
    waiting = commands.Command("backfill", "users", "--name", "mailer", dsn=dsn)
    assert waiting.err().startswith("Backfill 2")
    assert waiting.err() == "No process reads for mailer now: it begins once one does."
    interrupted = waiting.interrupt()
    assert interrupted.code == 130
    assert interrupted.err == ["Backfill 2 goes on: see `pgsignals backfills list`."]
    assert run("backfills", "cancel", "1", dsn=dsn).out == ["Cancelled backfill 1."]
    hub.start(dsn, ["users"], delivery="outbox", name="mailer")
    assert pgsignals.Backfill(dsn, 2).wait(DEADLINE)
    assert len(recorder.items) == 300
    assert hub.status().outbox is not None
    assert hub.status().outbox.backfills == ()


def test_one_that_fails(dsn: str, hub: Hub) -> None:
    """The exit code is 1, and the reason PostgreSQL's."""
    hub.on("users", "snapshot")(print)
    hub.start(dsn, ["users"], delivery="outbox", name="mailer")
    # Elsewhere, since the process that delivers logs the reason, too.
    done = commands.run(
        *("backfill", "users", "--name", "mailer", "--where", "1 / (id - 200) < 2"), dsn=dsn
    )
    assert done.code == 1
    assert done.err[-2].startswith("Backfill 1 failed: ")
    assert done.err[-1].startswith("Error: division by zero")


def test_what_cannot_be_asked_for(dsn: str, db: Database, hub: Hub) -> None:
    """Each mistake has an error that says what would be right."""
    none = run("backfill", "users", "--name", "mailer", dsn=dsn)
    assert (none.code, none.err[0][:31]) == (1, "Error: There is no outbox in th")
    hub.start(dsn, ["users"], delivery="outbox", name="mailer")
    db("CREATE TABLE orders (id int PRIMARY KEY)")
    for arguments, message in [
        (("users", "--name", "mialer"), "did you mean 'mailer'"),
        (("orders", "--name", "mailer"), "It watches: public.users."),
        (("users", "--name", "mailer", "--label", "x"), "public.users by the label 'x'"),
        (("usres", "--name", "mailer"), "There is no table 'usres'"),
        (("users", "--name", "mailer", "--where", "idd = 1"), 'column "idd" does not exist'),
    ]:
        refused = run("backfill", *arguments, dsn=dsn)
        assert refused.code == 1
        assert message in refused.err[-1]
    assert run("backfill", "users", dsn=dsn).code == 2
    assert run("backfills", "cancel", "7", dsn=dsn).code == 1
    assert run("backfills", "list", dsn=dsn).out == ["There are no backfills."]


def test_a_bar_on_a_terminal(dsn: str, hub: Hub, terminal: Callable[..., Terminal]) -> None:
    """It shows the share, the rate and the time left, and is full at the end."""
    quick = threading.Event()

    @hub.on("users", "snapshot")
    def receive(event: pgsignals.Event) -> None:
        quick.wait(0.02)

    hub.start(dsn, ["users"], delivery="outbox", name="mailer", queue_size=10)
    shown = terminal("backfill", "users", "--name", "mailer", "--chunk", "10")
    shown.wait_for(r"\b0%")
    # The bar, the share, the time left, the rate.
    shown.wait_for(r"\[#+-+\] +[1-9]\d?%  \d\d:\d\d:\d\d  \d+ rows/s")
    quick.set()
    shown.wait_for(r"100%")
    assert shown.end() == 0
    assert "Backfill 1 done" in shown.text
    assert ESCAPE in shown.text or "\r" in shown.text
