"""From psql over a relay and a broker to other processes that know no database."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pgsignals
from pgsignals.plugins.loader import load_plugins
from pgsignals.testing.conformance import DEADLINE, make_event
from tests.conftest import Database, Recorder

MODELS = """
import datetime, decimal, uuid
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

class Base(DeclarativeBase):
    pass

class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    # An attribute that is not called as its column.
    sum: Mapped[decimal.Decimal] = mapped_column("total")
    token: Mapped[uuid.UUID]
    placed: Mapped[datetime.datetime]

def told(event):
    names = ("op", "id", "key", "values", "old", "changed", "label", "schema", "table",
             "txid", "at", "context", "uid", "truncated")
    found = {name: getattr(event, name) for name in names}
    found["changed"] = sorted(found["changed"])
    found["model"] = event.model.__name__
    return repr(found)
"""

FAR = """
import sys
import pgsignals
from shop import Order, told

ready, url, what = "ready", *sys.argv[1:]
watchers = [pgsignals.watch(Order, extra=["sum", "token", "placed"])]

if what == "each":
    @pgsignals.on(Order)
    def each(event):
        print(told(event), flush=True)
else:
    @pgsignals.on_batch(Order, "inserted", every=0.05)
    def together(batch):
        for event in batch:
            print(told(event), flush=True)

pgsignals.start(url, watchers)
print(ready, flush=True)
pgsignals.run()
"""


class Far:
    """A process without a database, whose lines are kept."""

    def __init__(self, folder: Path, url: str, what: str) -> None:
        self.lines = Recorder()
        self._process = subprocess.Popen(
            [sys.executable, str(folder / "far.py"), url, what], stdout=subprocess.PIPE, text=True
        )
        self._pump = threading.Thread(target=self._read)
        self._pump.start()
        assert self.lines.wait(1, DEADLINE) == ["ready"]

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines(line.rstrip("\n"))

    def close(self) -> None:
        """End it in an orderly way."""
        self._process.terminate()
        assert self._process.wait(DEADLINE) == 0
        self._pump.join(DEADLINE)
        assert self._process.stdout is not None
        self._process.stdout.close()


@pytest.fixture(params=["kafka", "nats"])
def url(request: pytest.FixtureRequest, prefix: str) -> Iterator[str]:
    """Each broker in its turn, with what is to be read there already."""
    broker = request.getfixturevalue("kafka" if request.param == "kafka" else "nats_server")
    url = f"{broker.url}?prefix={prefix}"
    first = load_plugins().broadcaster(f"{url}&create=true")
    first.publish([make_event(1, table="orders")])
    assert first.flush(DEADLINE)
    first.close()
    return url


def test_two_processes_with_different_receivers(
    url: str,
    db: Database,
    hub: pgsignals.Hub,
    recorder: Recorder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Events are equal on both; model and attributes are those of the process's own class."""
    (tmp_path / "shop.py").write_text(MODELS)
    (tmp_path / "far.py").write_text(FAR)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "shop", raising=False)
    import shop  # type: ignore[import-not-found]

    db("CREATE TABLE orders (id serial PRIMARY KEY, total numeric, token uuid, placed timestamptz)")
    hub.subscribe(recorder, shop.Order)
    watchers: list[Any] = [pgsignals.watch(shop.Order, extra=["sum", "token", "placed"])]
    hub.start(db.dsn, watchers, delivery="outbox", name="relay", backends=[f"{url}&source=/shop"])
    fars = [Far(tmp_path, url, what) for what in ("each", "together")]
    try:
        subprocess.run(
            [
                *(sys.executable, "-c"),
                "import psycopg2, sys; c = psycopg2.connect(sys.argv[1]); c.autocommit = True;"
                " [c.cursor().execute(each) for each in sys.argv[2:]]; c.close()",
                db.dsn,
                "INSERT INTO orders (total, token, placed) SELECT i + 0.50, md5(i::text)::uuid,"
                " '2026-01-01 12:00:00.000001+01' FROM generate_series(1, 100) AS i",
                "UPDATE orders SET total = total * 2 WHERE id <= 3",
                "UPDATE orders SET id = 1000 WHERE id = 1",
                "DELETE FROM orders WHERE id = 2",
            ],
            check=True,
        )
        here = [shop.told(event) for event in recorder.wait(105)]
        each = fars[0].lines.wait(106, DEADLINE)[1:]
        assert sorted(each) == sorted(here)
        together = fars[1].lines.wait(101, DEADLINE)[1:]
        assert sorted(together) == sorted(line for line in here if "'op': 'inserted'" in line)
        assert "'model': 'Order'" in here[0]
        assert "'sum': Decimal(" in here[0]
    finally:
        for far in fars:
            far.close()
