"""Rows as the write-ahead log has them, turned into messages: the bytes of each column's text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from operator import methodcaller
from typing import Any, Final, Protocol, TypeAlias

import msgspec

from .events import Message, Topic
from .logging import log
from .lsn import lsn_text
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

    ``columns`` are the names of the table's columns, and ``data`` has each change as the log has
    it. ``first`` counts the changes of the transaction before. The transaction committed at ``id``;
    ``foreign``: on another server, from which it was replicated. ``context`` is the text of the
    writer's.
    """

    id: int
    txid: int
    at_us: int
    foreign: bool
    first: int
    context: str

    @property
    def columns(self) -> tuple[str, ...]: ...

    @property
    def data(self) -> Sequence[Any]: ...

    def rows(self, wanted: Sequence[bool]) -> Iterator[tuple[Values, Values]]:
        """Yield the old and the new values of each change, of the ``wanted`` columns.

        ``wanted`` has a value for each of the first columns of the table.
        """

    def single_rows(
        self, data: Sequence[Any], wanted: Sequence[bool]
    ) -> Sequence[Sequence[Value]] | None:
        """Return the wanted values of each change of ``data``, these changes' or alike ones'.

        None unless each has one row alone, which is whole.
        """


_Convert = Callable[[bytes], Any]
# The new and the old values of a row that travel; without old ones, an empty sequence.
_Pair = tuple[Sequence[Value], Sequence[Value]]


class RowsMessage(Message, gc=False):
    """A message of rows of the log, which writes payloads of single rows when they are kept.

    ``decoder`` has made it, and ``context_text`` is its context as the writer gave it. ``now`` and
    ``before`` are the new and the old values of each row as the log has them; None if the rows
    themselves say as much, or there are no old ones.
    """

    decoder: RowsDecoder | None = None
    context_text: str = ""
    now: Sequence[Sequence[Value]] | None = None
    before: Sequence[Sequence[Value]] | None = None

    @property  # type: ignore[misc]
    def position(self) -> str:  # type: ignore[override]
        """The position of the commit: a text, which costs more than all else here."""
        return lsn_text(self.sequence)

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
        if self.now is not None:
            before = () if self.before is None else self.before[number]
            row = self.decoder.texts((self.now[number], before), self.moved)
        line = msgspec.json.encode(self.decoder.travelling(row)).decode()
        return f"{msgspec.json.encode(head).decode()}\n{line}"


class _Unusable(Exception):
    """A row lacks what its watcher needs."""


@dataclass(frozen=True)
class _Picker:
    """The way from a table's row to the watcher's values, for one order of the table's columns.

    ``wanted`` says of the table's first columns whether they have to be read. Among those that are,
    ``places`` has the index of each column that travels, the key's first, and ``only`` that of the
    model's discriminator. ``in_order``: all that is read travels, in the order of the table.
    """

    wanted: tuple[bool, ...]
    places: tuple[int, ...]
    only: int | None
    in_order: bool


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
        # Whether each row is a message's, and has no old values.
        self._alike = not (
            layout.only or layout.compared or layout.differing or topic.op == "truncated"
        )
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
        together = self.together([changes], context)
        if together is not None:
            return [*together]
        return self._messages_one_by_one(changes, context, picker)

    def together(
        self, runs: Sequence[Changes], context: Mapping[str, Any]
    ) -> list[RowsMessage] | None:
        """Return a message for each of several ``runs`` of changes, which are alike.

        All their rows are read column by column, which takes half the time. None if they have to be
        taken one by one.
        """
        like = runs[0]
        picker = self._picker(like.columns)
        if not self._alike or isinstance(picker, str):
            return None
        if like.foreign and not self.layout.replicated:
            return None
        data = [each for run in runs for each in run.data]
        now = like.single_rows(data, picker.wanted)
        if not now:
            return None
        try:
            rows = self._rows_of(now, picker)
        except _NOT_CONVERTED:
            log.debug("a value is of another type: taking the rows one by one")
            return None
        if self._casts and not picker.in_order:
            now = [_values(picker.places, row) for row in now]
        found, start = [], 0
        for run in runs:
            end = start + len(run.data)
            found.append(self._message(run, context, 0, rows[start:end], now[start:end]))
            start = end
        return found

    def _rows_of(self, now: Sequence[Sequence[Value]], picker: _Picker) -> list[tuple[Any, ...]]:
        """Return the rows of messages without old values."""
        columns = [*zip(*now, strict=True)]
        converted = [
            _column(convert, columns[place])
            for convert, place in zip(self._converts, picker.places, strict=True)
        ]
        return [*zip(*converted, strict=True)] if converted else [()] * len(now)

    def _messages_one_by_one(
        self, changes: Changes, context: Mapping[str, Any], picker: _Picker
    ) -> list[Message | Broken]:
        found: list[Message | Broken] = []
        rows: list[tuple[tuple[Any, ...], _Pair]] = []
        moved, start, problem = False, 0, ""

        def finish() -> None:
            arranged = [each for each, _ in rows]
            now, before = [pair[0] for _, pair in rows], [pair[1] for _, pair in rows]
            found.append(self._message(changes, context, start, arranged, now, before, moved=moved))

        for index, (old, new) in enumerate(changes.rows(picker.wanted)):
            row, key_moved = None, moved
            try:
                pair, key_moved = self._pick(picker, old, new)
                if pair is not None:
                    row = self._travel(*pair, key_moved)
            except _Unusable as error:
                row, key_moved, problem = None, moved, str(error)
            # Rows of one message follow one another, since its uids count them.
            if rows and (row is None or key_moved != moved):
                finish()
                rows = []
            if row is not None:
                assert pair is not None
                if not rows:
                    start, moved = index, key_moved
                rows.append((row, pair))
        if rows:
            finish()
        if problem:
            found.append(Broken(changes.at_us, problem))
        return found

    def _message(
        self,
        changes: Changes,
        context: Mapping[str, Any],
        start: int,
        rows: Sequence[tuple[Any, ...]],
        now: Sequence[Sequence[Value]],
        before: Sequence[Sequence[Value]] | None = None,
        *,
        moved: bool = False,
    ) -> RowsMessage:
        return RowsMessage(
            self.topic,
            changes.txid,
            changes.id,
            changes.at_us,
            dict(context),
            rows,
            moved,
            first=changes.first + start,
            decoder=self,
            context_text=changes.context,
            now=now if self._casts else None,
            before=before,
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
        indexes = [places[name] for name in needed]
        wanted = tuple(index in indexes for index in range(1 + max(indexes, default=-1)))
        # The places among what is read.
        read = [sum(wanted[:index]) for index in indexes]
        travelling = tuple(read if only is None else read[:-1])
        return _Picker(
            wanted,
            travelling,
            None if only is None else read[-1],
            in_order=travelling == tuple(range(sum(wanted))),
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
        before = now
        if old is not None or layout.compared:
            whole = layout.compared or layout.differing
            before = _values(picker.places if whole else picker.places[:width], old)
        if layout.differing and all(
            now[width + each] == before[width + each] for each in layout.differing
        ):
            return None, False
        return (now, before), now[:width] != before[:width]

    def _belongs(self, place: int, row: Values) -> bool:
        assert self._accepted is not None
        if row is None:
            raise _Unusable(_NO_OLD_ROW)
        if row[place] is UNCHANGED:
            raise _Unusable(_NO_OLD_ROW)
        return row[place] in self._accepted

    def _travel(
        self, now: Sequence[Value], before: Sequence[Value], moved: bool
    ) -> tuple[Any, ...]:
        """Return the row of a message: see Message."""
        former = self._converted(before) if moved or self.layout.compared else ()
        return self._arranged(self._converted(now), former, now, before, moved)

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
        """Return the values of the first columns. Raises _Unusable."""
        try:
            return [
                None if value is None else convert(value)  # type: ignore[arg-type]
                for convert, value in zip(self._converts, values, strict=False)
            ]
        except _NOT_CONVERTED as error:
            raise _Unusable(_OTHER_TYPE) from error

    def _convert(self, column: Field) -> _Convert:
        if column.raw:
            return _BOOLS.__getitem__ if RAW_TYPES[column.builtin or ""] is bool else int
        encoding = self._encoding
        if column.plain:
            return methodcaller("decode", encoding, "replace")
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


# What the conversion of a value may raise that is of another type than the layout says: the column
# had another one then. A consumer that went on at the same row for ever would cost the slot.
_NOT_CONVERTED = (ValueError, KeyError, TypeError, AttributeError)
_OTHER_TYPE = "the log has a value that is not of the column's type, which has been changed"
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


_BOOLS = {b"t": True, b"f": False}


def _column(convert: _Convert, values: Sequence[Value]) -> list[Any]:
    if None in values:
        return [None if value is None else convert(value) for value in values]  # type: ignore[arg-type]
    return [*map(convert, values)]  # type: ignore[arg-type]


def decoder_of(topic: Topic, layout: Layout, cast: Cast) -> Decoder:
    """Return a decoder of what a layout describes."""
    if layout.rows:
        return RowsDecoder(topic, layout, cast)
    return Decoder(topic, layout.key_fields, layout.value_fields, cast)
