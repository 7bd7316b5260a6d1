"""Wrong ways to read the outbox, as patches: the checker must find each of them out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from pgsignals import relaying
from pgsignals.outbox import cursors, pages, parts, store
from pgsignals.outbox.cursors import Snapshot, Window
from pgsignals.outbox.store import Cursor, Look, Row

_WINDOW = "txid < $4 AND (txid >= $2 OR txid = ANY ($3)) AND txid <> ALL ($5)"
_NO_WINDOW = "$2 + $4 > 0 AND ($3 || $5) IS NOT NULL"


def _read_with(former: str, wrong: str) -> None:
    statement = store.read_statement

    def wrong_statement(name: str, rows: int, size: int) -> str:
        right = statement(name, rows, size)
        assert former in right, right
        return right.replace(former, wrong)

    store.read_statement = wrong_statement


class _IdAlone:
    """In place of Floors: the last id that was read, which is where reading goes on."""

    def __init__(self, first: int, given_out: int) -> None:
        self.last = given_out

    def note(self, first: int, given_out: int) -> None: ...

    def below(self, txid: int) -> int:
        return self.last

    def forget(self, txid: int) -> None: ...


def read_by_id() -> None:
    """``id > last``: what commits after a later id has been read is lost."""
    turn = parts.Part.turn

    def turn_by_id(self: parts.Part, rows: Sequence[Row]) -> Cursor:
        if rows:
            self.floors.last = rows[-1].id
        return turn(self, rows)

    _read_with(_WINDOW, _NO_WINDOW)
    parts.Floors = _IdAlone
    parts.Part.turn = turn_by_id


def read_by_transaction() -> None:
    """``txid < xmin``, by transactions: one that began earlier and wrote later comes first."""
    look = store.Store.look

    def look_at_xmin(self: store.Store, awake: bool, begin: bool = False) -> Look:
        seen = look(self, awake, begin)
        return replace(seen, snapshot=Snapshot(seen.snapshot.xmin, seen.snapshot.xmin))

    _read_with("ORDER BY id LIMIT", "ORDER BY txid, id LIMIT")
    store.Store.look = look_at_xmin
    parts.Floors.below = lambda self, txid: 0


def forget_who_ran() -> None:
    """Windows without the transactions that ran at their beginning: a slow one's rows are lost."""
    between = Window.between

    def without_those(since: Snapshot, target: Snapshot, after: int) -> Window:
        return replace(between(since, target, after), ended=())

    cursors.Window.between = without_those


def acknowledge_at_once() -> None:
    """What has been read counts as delivered: at a crash, what was under way is lost."""
    pages.Page.done = property(lambda self: True)


def trust_the_broker() -> None:
    """What a broadcaster has been given counts as acknowledged: at a crash, some never was."""

    def deliver(self: relaying.Relay, items: Sequence[Any]) -> bool:
        for item in items:
            if item.events:
                self._broadcaster.publish(item.events)
        return True

    relaying.Relay._deliver = deliver


MUTANTS: dict[str, Callable[[], None]] = {
    "id": read_by_id,
    "txid": read_by_transaction,
    "running": forget_who_ran,
    "early": acknowledge_at_once,
    "trusting": trust_the_broker,
}
