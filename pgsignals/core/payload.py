"""The payloads of triggers, turned into messages; everything in them is untrusted until here.

A payload is a header, which is a line of JSON, then a line of JSON for each row: an array of the
key, a tab, then the values; or the bare key, if that is all and a number or a boolean. The tab,
which is white space to JSON and cannot occur inside its strings, is where the trigger cuts a row
that is too long for a notification. A key that is itself too long comes in fragments, in base64.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from .errors import PayloadError
from .events import Message, Topic

VERSION = 1
MAX_FRAGMENTS = 4096

RAW_TYPES = {"bool": bool, "int2": int, "int4": int, "int8": int}
_TEXT = frozenset(("text", "varchar", "bpchar", "name", "char"))

Cast = Callable[[int, str], Any]


class Field(msgspec.Struct, frozen=True):
    """The type of a column that travels: its oid, and its name if that is one of ``pg_catalog``."""

    oid: int
    builtin: str | None

    @property
    def raw(self) -> bool:
        """Whether the value is a JSON number or boolean, not a string."""
        return self.builtin in RAW_TYPES

    @property
    def plain(self) -> bool:
        """Whether the JSON string is the value itself, with no cast to come."""
        return self.builtin in _TEXT


class Layout(msgspec.Struct, frozen=True):
    """The description of one channel's messages, written down for those who read them later.

    ``name`` begins the uids of their events. ``model`` is the name of a model that shares the table
    with others. The other attributes are as in Topic.

    With ``rows``, the messages are the table's rows in the write-ahead log: ``columns`` are the
    names of the key's and the values' columns, ``differing`` the indexes of the values of which one
    must differ, and ``only`` is as in TableRef. ``replicated``: also what a subscription writes.
    ``delivery`` names the log, whose ids cannot be compared with those of another.
    """

    namespace: str
    schema: str
    table: str
    op: str
    label: str | None
    name: str
    key: tuple[str, ...]
    key_fields: tuple[Field, ...]
    values: tuple[str, ...]
    value_fields: tuple[Field, ...]
    compared: bool
    model: str = ""
    rows: bool = False
    columns: tuple[str, ...] = ()
    differing: tuple[int, ...] = ()
    only: tuple[str, tuple[str, ...]] | None = None
    replicated: bool = False
    delivery: str = "outbox"

    def encode(self) -> str:
        """Return the layout as a line of JSON."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def decode(cls, text: str) -> Layout:
        """Return the layout that ``encode`` wrote. Raises PayloadError for anything else."""
        try:
            return _layouts.decode(text)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise PayloadError(f"the description of a channel: {error}") from error

    @property
    def identity(self) -> tuple[str, str, str, str, str, str | None]:
        """The fields that stay the same over the definitions of a watcher in time."""
        return (self.namespace, self.schema, self.table, self.model, self.op, self.label)

    @property
    def place(self) -> tuple[str, tuple[str, str, str, str, str, str | None]]:
        """The fields that stay the same over the definitions of a watcher in one log."""
        return (self.delivery, self.identity)


_layouts = msgspec.json.Decoder(Layout)


# The ranges of the numbers and datetimes that receivers read; others are refused here.
_Number = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
_Time = Annotated[int, msgspec.Meta(ge=0, lt=253_402_300_800_000_000)]


class Header(msgspec.Struct):
    """The first line: v(ersion), x (txid), s(equence), t (µs since 1970), c(ontext), and kind.

    ``r`` is the relation, the OID of the watched table that the rows are of; ``n`` the number of
    the first row, in a payload that was kept of a longer one.
    """

    v: int
    x: _Number
    s: _Number
    t: _Time
    c: str | None = None
    moved: bool = False
    cut: bool = False
    part: tuple[int, int] | None = None
    error: str | None = None
    r: _Number | None = None
    n: _Number = 0


@dataclass(frozen=True)
class Broken:
    """A trigger's word that it can no longer describe a change; ``at_us`` is None for just now."""

    at_us: int | None
    error: str


@dataclass(frozen=True)
class Foreign:
    """Rows of a table that is not the watched one: renamed since, or a copy of it."""

    relation: int


# The payload of a trigger that could do no more than notify.
SILENT = "broken"
_SILENT = Broken(None, "the trigger's function failed, and so did telling why")


_header = msgspec.json.Decoder(Header)
_context = msgspec.json.Decoder(dict[str, Any])


class Decoder:
    """Decodes the payloads of one topic.

    ``key`` and ``values`` say how the topic's columns travel; ``cast`` makes a Python value of a
    type's oid and a text, as a query's result would have it. ``relations`` are the OIDs of the
    tables whose rows it takes, None if the rows are checked elsewhere.
    """

    def __init__(
        self,
        topic: Topic,
        key: Sequence[Field],
        values: Sequence[Field],
        cast: Cast,
        relations: Collection[int] | None = None,
    ) -> None:
        self.topic = topic
        self._relations = relations
        self._rows: dict[tuple[bool, bool], Callable[[str], list[tuple[Any, ...]]]] = {}
        for moved in (False, True):
            keys = [*key, *key] if moved else [*key]
            travelling = [*values, *values] if topic.compared else [*values]
            self._rows[moved, False] = _Rows(keys, travelling, topic.compared, cast)
            self._rows[moved, True] = _Rows(keys, (), False, cast)
        if len(key) == 1 and key[0].raw and not values:
            self._rows[False, False] = _bare_keys(key[0])
        self._fragments: list[str] = []

    def decode(self, payload: str) -> Message | Broken | Foreign | None:
        """Return the content of a payload; None for a fragment that others must follow.

        Raises PayloadError for anything that the topic's own trigger does not write.
        """
        if payload == SILENT:
            return _SILENT
        head, _, body = payload.partition("\n")
        try:
            header = _header.decode(head)
            if header.v != VERSION:
                raise PayloadError(f"version {header.v} of the payload, not {VERSION}")
            if self._relations is not None and header.r not in self._relations:
                if header.r is None:
                    raise PayloadError("no table")
                return Foreign(header.r)
            if header.error is not None:
                return Broken(header.t, header.error)
            if header.part is not None:
                whole = self._assemble(header.part, body)
                if whole is None:
                    return None
                body = whole
            rows = self._rows[header.moved, header.cut](body)
            if not rows:
                raise PayloadError("a message without a row")
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise PayloadError(f"{type(error).__name__}: {error}") from error
        return Message(
            self.topic,
            header.x,
            header.s,
            header.t,
            decode_context(header.c),
            rows,
            header.moved,
            header.cut,
            header.n,
        )

    def _assemble(self, part: tuple[int, int], piece: str) -> str | None:
        number, count = part
        if number == 1:
            self._fragments.clear()
        if not 1 <= number <= count <= MAX_FRAGMENTS or number != len(self._fragments) + 1:
            self._fragments.clear()
            raise PayloadError(f"fragment {number} of {count} out of turn")
        self._fragments.append(piece)
        if number < count:
            return None
        whole = "".join(self._fragments)
        self._fragments.clear()
        return base64.b64decode(whole, validate=True).decode()


class _Rows:
    """Decodes lines that have the same columns."""

    def __init__(
        self, keys: Sequence[Field], values: Sequence[Field], compared: bool, cast: Cast
    ) -> None:
        fields = [*keys, *values]
        types: list[Any] = [RAW_TYPES.get(field.builtin or "", str) | None for field in fields]
        if compared:
            types.append(Annotated[str, msgspec.Meta(pattern=rf"^[01]{{{len(values) // 2}}}\Z")])
        self._decoder = msgspec.json.Decoder(tuple[tuple(types)])  # type: ignore[misc]
        self._casts = [
            (index, field.oid)
            for index, field in enumerate(fields)
            if not (field.raw or field.plain)
        ]
        self._cast = cast

    def __call__(self, body: str) -> list[tuple[Any, ...]]:
        rows: list[tuple[Any, ...]] = self._decoder.decode_lines(body)
        if not self._casts:
            return rows
        return [self._cast_row(row) for row in rows]

    def _cast_row(self, row: tuple[Any, ...]) -> tuple[Any, ...]:
        found = list(row)
        for index, oid in self._casts:
            text = found[index]
            if text is None:
                continue
            try:
                found[index] = self._cast(oid, text)
            except Exception:
                # Python has no date before the year 1, PostgreSQL has: such a value stays text, as
                # the event matters more.
                continue
        return tuple(found)


def _bare_keys(field: Field) -> Callable[[str], list[tuple[Any, ...]]]:
    decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(RAW_TYPES[field.builtin or ""])
    return lambda body: [(key,) for key in decoder.decode_lines(body)]


def decode_context(text: str | None) -> Mapping[str, Any]:
    """Return the context of a text of JSON; empty for what is none."""
    if not text:
        return {}
    try:
        return _context.decode(text)
    except (msgspec.MsgspecError, RecursionError):
        # Anybody can set the parameter to anything; the change itself is still true.
        return {}
