"""The README's example, run as it stands."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from psycopg2.extensions import parse_dsn

from tests.conftest import DEADLINE, Database

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()

# Around the example, so that the test knows when to write.
WRAPPER = """
import sys, pgsignals
pgsignals.connected.connect(lambda hub: print("connected", flush=True), weak=False)
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
        assert process.stdout.readline() == "connected\n"
        db(update)
        assert process.stdout.readline() == f"{printed}\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=DEADLINE) == ("", "")
    finally:
        process.kill()
        process.communicate()


def test_links() -> None:
    """What the README links to in this repository is there."""
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", README) if "://" not in target]
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
