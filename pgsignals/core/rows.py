"""Rows as the write-ahead log has them, turned into messages: the bytes of each column's text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, Protocol, TypeAlias

import msgspec

from .events import Message, Topic
from .payload import RAW_TYPES, VERSION, Broken, Cast, Decoder, Field, Layout


class Unchanged(Enum):
    """The type of ``UNCHANGED``."""

    UNCHANGED = "unchanged"


# The value of a TOASTed column that an UPDATE left alone: the server does not read it again.
UNCHANGED: Final = Unchanged.UNCHANGED

Value: TypeAlias = bytes | Unchanged | None
# The values of all columns of a table; None in place of a row that did not come.
Values: TypeAlias = Sequence[Value] | None


class Changes(Protocol):
    """Changes of one kind (``op``) of one table, that came one after another in a transaction.

    ``columns`` are the names of the table's columns. ``first`` counts the changes of the
    transaction before, and ``size`` these. The transaction committed at ``id``; ``foreign``: on
    another server, from which it was replicated. ``context`` is the text of the writer's.
    """

    op: str
    relation: int
    columns: tuple[str, ...]
    txid: int
    at_us: int
    id: int
    first: int
    context: str
    foreign: bool

    def rows(self, count: int) -> Iterator[tuple[Values, Values]]:
        """Yield the old and the new values of each change, of the first ``count`` columns."""


_Convert = Callable[[bytes], Any]
# The new and the old values of a row that travel; without old ones, an empty sequence.
_Pair = tuple[Sequence[Value], Sequence[Value]]


class RowsMessage(Message):
    """A message of rows of the log, which writes payloads of single rows when they are kept.

    ``decoder`` has made it, and ``context_text`` is its context as the writer gave it. ``values``
    are the new and the old values of each row as the log has them; None if the rows themselves say
    as much.
    """

    decoder: RowsDecoder | None = None
    context_text: str = ""
    values: Sequence[_Pair] | None = None

    def row_payload(self, number: int) -> str:
        assert self.decoder is not None
        head: dict[str, object] = {
            "v": VERSION,
            "x": self.txid,
            "s": self.sequence,
            "t": self.at_us,
            "n": self.first + number,
        }
        if self.context_text:
            head["c"] = self.context_text
        if self.moved:
            head["moved"] = True
        row: Sequence[Any] = self.rows[number]
        if self.values is not None:
            row = self.decoder.texts(self.values[number], self.moved)
        line = msgspec.json.encode(self.decoder.travelling(row)).decode()
        return f"{msgspec.json.encode(head).decode()}\n{line}"


class _Unusable(Exception):
    """A row lacks what its watcher needs."""


@dataclass(frozen=True)
class _Picker:
    """The way from a table's row to the watcher's values, for one order of the table's columns.

    ``places`` has the index of each column that travels, the key's first, and ``only`` that of the
    model's discriminator. ``count`` is how many columns have to be read.
    """

    places: tuple[int, ...]
    only: int | None
    count: int


class RowsDecoder(Decoder):
    """Makes messages of changes, and of payloads that were kept of them.

    ``layout`` says which columns travel.
    """

    def __init__(self, topic: Topic, layout: Layout, cast: Cast) -> None:
        super().__init__(topic, layout.key_fields, layout.value_fields, cast)
        self.layout = layout
        self._cast = cast
        self._width = len(layout.key_fields)
        self._fields = (*layout.key_fields, *layout.value_fields)
        self._accepted = None if layout.only is None else {e.encode() for e in layout.only[1]}
        self._pickers: dict[tuple[str, ...], _Picker | str] = {}
        self._encoding = ""
        self._converts: list[_Convert] = []
        # Whether a value's text cannot be told from the value.
        self._casts = not all(each.raw or each.plain for each in self._fields)
        # A bare key is what a trigger sends where that is all.
        self._bare = len(self._fields) == 1 and self._width == 1 and self._fields[0].raw

    def read_in(self, encoding: str) -> None:
        """Decode texts of a database in this encoding, in Python's terms."""
        self._encoding = encoding
        self._converts = [self._convert(each) for each in self._fields]
        if self.layout.only is not None:
            self._accepted = {each.encode(encoding, "replace") for each in self.layout.only[1]}

    def messages(self, changes: Changes, context: Mapping[str, Any]) -> list[Message | Broken]:
        """Return the messages of those changes that concern the watcher, and what went wrong."""
        if changes.foreign and not self.layout.replicated:
            return []
        picker = self._picker(changes.columns)
        if isinstance(picker, str):
            return [Broken(changes.at_us, picker)]
        found: list[Message | Broken] = []
        rows: list[_Pair] = []
        moved, start, problem = False, 0, ""
        for index, (old, new) in enumerate(changes.rows(picker.count)):
            try:
                values, key_moved = self._pick(picker, old, new)
            except _Unusable as error:
                values, key_moved, problem = None, moved, str(error)
            # Rows of one message follow one another, since its uids count them.
            if rows and (values is None or key_moved != moved):
                found.append(self._message(changes, context, moved, start, rows))
                rows = []
            if values is not None:
                if not rows:
                    start, moved = index, key_moved
                rows.append(values)
        if rows:
            found.append(self._message(changes, context, moved, start, rows))
        if problem:
            found.append(Broken(changes.at_us, problem))
        return found

    def _message(
        self,
        changes: Changes,
        context: Mapping[str, Any],
        moved: bool,
        start: int,
        values: Sequence[_Pair],
    ) -> RowsMessage:
        if moved or self.layout.compared:
            rows = [self._travel(*each, moved) for each in values]
        else:
            rows = [tuple(self._converted(now)) for now, _ in values]
        return RowsMessage(
            self.topic,
            changes.txid,
            changes.id,
            changes.at_us,
            context,
            rows,
            moved,
            first=changes.first + start,
            decoder=self,
            context_text=changes.context,
            values=values if self._casts else None,
        )

    def _picker(self, columns: tuple[str, ...]) -> _Picker | str:
        """Return the picker for a table of these columns, or why there is none."""
        found = self._pickers.get(columns)
        if found is None:
            found = self._pickers[columns] = self._make_picker(columns)
        return found

    def _make_picker(self, columns: tuple[str, ...]) -> _Picker | str:
        places = {name: index for index, name in enumerate(columns)}
        only = self.layout.only
        needed = [*self.layout.columns, *([] if only is None else [only[0]])]
        if self.topic.op == "truncated":
            needed, only = [], None
        for name in needed:
            if name not in places:
                return f"the log has no column {name!r} of the table any more"
        indexes = tuple(places[name] for name in needed)
        travelling = indexes if only is None else indexes[:-1]
        return _Picker(
            travelling, None if only is None else indexes[-1], 1 + max(indexes, default=-1)
        )

    def _pick(self, picker: _Picker, old: Values, new: Values) -> tuple[_Pair | None, bool]:
        """Return the new and old values that travel, and whether the key changed.

        None for a row that does not concern the watcher. Raises _Unusable.
        """
        op = self.topic.op
        if op == "inserted" or op == "deleted":
            row = new if op == "inserted" else old
            if picker.only is not None and not self._belongs(picker.only, row):
                return None, False
            return (_values(picker.places, row), ()), False
        if op == "truncated":
            return ((), ()), False
        if picker.only is not None and not (
            self._belongs(picker.only, new) or self._belongs(picker.only, old)
        ):
            return None, False
        width, layout = self._width, self.layout
        now = _values(picker.places, new)
        # Without a changed key, or the identity FULL, the log has no old row.
        before = now if old is None and not layout.compared else _values(picker.places, old)
        if layout.differing and all(
            now[width + each] == before[width + each] for each in layout.differing
        ):
            return None, False
        return (now, before), now[:width] != before[:width]

    def _belongs(self, place: int, row: Values) -> bool:
        assert self._accepted is not None
        if row is None:
            raise _Unusable(_NO_OLD_ROW)
        return row[place] in self._accepted

    def _travel(
        self, now: Sequence[Value], before: Sequence[Value], moved: bool
    ) -> tuple[Any, ...]:
        """Return the row of a message: see Message."""
        return self._arranged(self._converted(now), self._converted(before), now, before, moved)

    def _arranged(
        self,
        row: Sequence[Any],
        former: Sequence[Any],
        now: Sequence[Value],
        before: Sequence[Value],
        moved: bool,
    ) -> tuple[Any, ...]:
        width = self._width
        found = [*row[:width], *(former[:width] if moved else ()), *row[width:]]
        if self.layout.compared:
            found += [*former[width:], _flags(now[width:], before[width:])]
        return tuple(found)

    def _converted(self, values: Sequence[Value]) -> list[Any]:
        return [
            None if value is None else convert(value)  # type: ignore[arg-type]
            for convert, value in zip(self._converts, values, strict=True)
        ]

    def _convert(self, column: Field) -> _Convert:
        if column.raw:
            return _is_true if RAW_TYPES[column.builtin or ""] is bool else int
        encoding = self._encoding
        if column.plain:
            return lambda value: value.decode(encoding, "replace")
        cast, oid = self._cast, column.oid

        def convert(value: bytes) -> Any:
            text = value.decode(encoding, "replace")
            try:
                return cast(oid, text)
            except Exception:
                # As of a payload: a value that Python does not have stays text.
                return text

        return convert

    def texts(self, values: _Pair, moved: bool) -> Sequence[Any]:
        """Return a row of a payload: see Message."""
        now, before = values
        row, former = ([*map(self._json, self._fields, each)] for each in values)
        return self._arranged(row, former, now, before, moved)

    def travelling(self, row: Sequence[Any]) -> Any:
        """Return the value of a payload's line for a row."""
        return row[0] if self._bare and len(row) == 1 else row

    def _json(self, column: Field, value: Value) -> Any:
        if value is None or not isinstance(value, bytes):
            return None
        if column.raw:
            return self._convert(column)(value)
        return value.decode(self._encoding, "replace")


_NO_OLD_ROW = "the log lacks an old row: the table's REPLICA IDENTITY has changed"


def _values(places: tuple[int, ...], row: Values) -> Sequence[Value]:
    if row is None:
        raise _Unusable(_NO_OLD_ROW)
    found = [row[place] for place in places]
    if UNCHANGED in found:
        raise _Unusable(_NO_OLD_ROW)
    return found


def _flags(now: Sequence[Value], before: Sequence[Value]) -> str:
    return "".join("1" if a != b else "0" for a, b in zip(now, before, strict=True))


def _is_true(value: bytes) -> bool:
    return value == b"t"


def decoder_of(topic: Topic, layout: Layout, cast: Cast) -> Decoder:
    """Return a decoder of what a layout describes."""
    if layout.rows:
        return RowsDecoder(topic, layout, cast)
    return Decoder(topic, layout.key_fields, layout.value_fields, cast)
