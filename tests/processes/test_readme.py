"""The README's example, run as it stands."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

from psycopg2.extensions import parse_dsn

from tests.conftest import DEADLINE, Database
from tests.paths import ROOT

README = (ROOT / "README.md").read_text()

# Around the example, so that the test knows when it runs: before that, Ctrl-C is Python's affair.
WRAPPER = """
import signal, sys, pgsignals
install = signal.signal
def installed(number, handler):
    former = install(number, handler)
    if number == signal.SIGINT:
        signal.signal = install
        print("handles signals", flush=True)
    return former
signal.signal = installed
exec(compile(sys.argv[1], "README.md", "exec"))
"""


def test_the_ten_lines(dsn: str, db: Database) -> None:
    """The example has ten lines and, with libpq's variables set, prints what the README says."""
    [example] = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    assert len(example.splitlines()) == 10
    for statement in re.findall(r'^psql -c "((?:CREATE|INSERT)[^"]*)"', README, re.MULTILINE):
        db(statement)
    [(update, printed)] = re.findall(r'^psql -c "(UPDATE[^"]*)" +# prints: (.*)$', README, re.M)
    given = parse_dsn(dsn)
    where = {f"PG{given_name.upper()}": given[name] for given_name, name in (
        ("host", "host"), ("port", "port"), ("user", "user"), ("database", "dbname"),
    )}  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", WRAPPER, example],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **where},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "handles signals\n"
        db(update)
        assert process.stdout.readline() == f"{printed}\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=DEADLINE) == ("", "")
    finally:
        process.kill()
        process.communicate()


def test_its_commands_are_the_gate() -> None:
    """Continuous integration runs the commands as they are printed, each with nothing set up."""
    [block] = re.findall(r"^In a clone, with Python .*?^```sh\n(.*?)^```$", README, re.S | re.M)
    printed = [line.partition("#")[0].strip() for line in block.splitlines()]
    gate = (ROOT / ".ci" / "run").read_text().splitlines()
    apart = [step for command in printed for step in ("make clean", command)]
    made = [line for line in gate if line.startswith("make ")]
    assert made == [*apart, "make check", "make dist"]


def test_links() -> None:
    """What the README links to in this repository is there."""
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", README) if "://" not in target]
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
