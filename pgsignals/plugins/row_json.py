"""Rows as the JSON of their events' data, by templates: what many events share is encoded once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import msgspec

from ..core.events import Topic
from .portable import PLAIN, TEXTS, convert, encode

# The most shapes of rows of a form, and templates of a shape: a hundred columns that are NULL or
# not, each by itself, would make more than memory has room for.
_MOST = 1_000

_encode_lines = msgspec.json.Encoder().encode_lines


class _Template(NamedTuple):
    """The data of an event, with a place for each of the encoded values that ``pick`` takes."""

    text: bytes
    pick: Callable[[Sequence[bytes]], Any]


class _Shape:
    """Rows whose values have the same Python types.

    ``conversions`` are for the values that JSON has no type for, and ``width`` counts the columns
    of the key. ``templates`` are by the names that have changed, and by the types that the values
    turn out to have on the wire.
    """

    def __init__(self, kinds: Sequence[type], most_width: int) -> None:
        self.width = min(len(kinds), most_width)
        self.conversions: list[tuple[int, Callable[[Any], tuple[Any, str | None]]]] = [
            (at, TEXTS.get(kind, convert)) for at, kind in enumerate(kinds) if kind not in PLAIN
        ]
        self.templates: dict[Any, _Template] = {}


class Form:
    """The rows of those messages of a topic that are alike: ``moved`` and ``cut`` or not.

    With ``key_only``, events are without values, though the rows have them. ``encode`` ends the
    data with ``tail``, which has the fields that all events of a message share.
    """

    def __init__(self, topic: Topic, moved: bool, cut: bool, key_only: bool) -> None:
        self._topic = topic
        self._moved = moved
        self._compared = topic.compared and not cut
        self._differs = self._compared or moved
        self._cut = cut
        self._truncated = cut or key_only
        self._shapes: dict[tuple[type, ...], _Shape] = {}

    def encode(self, row: tuple[Any, ...], tail: bytes) -> tuple[bytes | None, bytes]:
        """Return the record's key as JSON, None without one, and the data."""
        kinds = tuple(map(type, row))
        shape = self._shapes.get(kinds)
        if shape is None:
            shape = _keep(self._shapes, kinds, _Shape(kinds, len(self._topic.key)))
        variant: Any = self._differing(row) if self._differs else ()
        portable: Sequence[Any] = row
        if shape.conversions:
            portable, variant = [*row], [variant]
            for at, conversion in shape.conversions:
                portable[at], tag = conversion(row[at])
                variant.append(tag)
            variant = tuple(variant)
        template = shape.templates.get(variant)
        if template is None:
            template = _keep(shape.templates, variant, self._template(shape, len(row), variant))
        try:
            pieces = _encode_lines(portable).split(b"\n")
        # See encode().
        except (UnicodeEncodeError, OverflowError):
            pieces = [*map(encode, portable), b""]
        pieces[-1] = tail
        width = shape.width
        if width == 1:
            key: bytes | None = pieces[0]
        else:
            key = b"[%b]" % b",".join(pieces[:width]) if width else None
        return key, template.text % template.pick(pieces)

    def _differing(self, row: tuple[Any, ...]) -> Any:
        """Return what tells which names an update has changed."""
        if not self._moved:
            return row[-1]
        width = len(self._topic.key)
        pairs = zip(row[:width], row[width : 2 * width], strict=False)
        moved = tuple(new != old for new, old in pairs)
        return (*moved, row[-1]) if self._compared else moved

    def _template(self, shape: _Shape, length: int, variant: Any) -> _Template:
        """Return the template for the rows of a shape.

        Its fields are those that docs/wire-format.md names, in one order for all events.
        """
        differing = variant
        tags: dict[int, str | None] = {}
        if shape.conversions:
            differing, *found_tags = variant
            places_ = (at for at, _ in shape.conversions)
            tags = dict(zip(places_, found_tags, strict=True))
        topic = self._topic
        key, values, old = self._places(length)
        text = [
            b'{"op":%b,"schema":%b,"table":%b'
            % tuple(_literal(each) for each in (topic.op, topic.schema, topic.table))
        ]
        picked: list[int] = []

        def add(name: bytes, places: Mapping[str, int]) -> None:
            each = b",".join(_literal(column) + b":%b" for column in places)
            text.append(b',"%b":{%b}' % (name, each))
            picked.extend(places.values())

        def types(places: Mapping[str, int]) -> dict[str, str]:
            found = {name: tags.get(at) for name, at in places.items()}
            return {name: tag for name, tag in found.items() if tag is not None}

        add(b"key", key)
        if topic.label is not None:
            text.append(b',"label":' + _literal(topic.label))
        known = types(key)
        if self._truncated:
            text.append(b',"truncated":true')
        else:
            add(b"values", values)
            known |= types(values)
        if old:
            add(b"old", old)
            of_old = types(old)
            if of_old != {name: tag for name, tag in known.items() if name in old}:
                text.append(b',"old_types":' + _literal(of_old))
        if topic.op == "updated":
            text.append(b',"changed":' + _literal(sorted(self._changed(differing))))
        if known:
            text.append(b',"types":' + _literal(known))
        text.append(b",%b")
        return _Template(b"".join(text), itemgetter(*picked, -1))

    def _places(self, length: int) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
        """Return where the key, the values and the old values are in a row, by their names."""
        topic = self._topic
        width, count = len(topic.key), len(topic.values)

        def places(names: Sequence[str], start: int) -> dict[str, int]:
            return dict(zip(names, range(start, length), strict=False))

        start = 2 * width if self._moved else width
        key, values, old = places(topic.key, 0), {}, {}
        if not self._cut:
            values = places(topic.values, start)
        if topic.op == "updated":
            if self._moved:
                old.update(places(topic.key, width))
            if self._compared:
                old.update(places(topic.values, start + count))
            if self._truncated:
                # The former values of a changed key stay, since they belong to the key.
                old = {name: at for name, at in old.items() if name in key}
        return key, values, old

    def _changed(self, differing: Any) -> set[str]:
        topic = self._topic
        flags: Sequence[Any] = differing
        found: set[str] = set()
        if self._moved:
            found.update(name for name, each in zip(topic.key, differing, strict=False) if each)
            flags = differing[-1] if self._compared else ()
        if self._compared:
            found.update(
                name for name, each in zip(topic.values, flags, strict=True) if each == "1"
            )
        return {name for name in found if name in topic.key} if self._truncated else found


form = functools.lru_cache(_MOST)(Form)


def _keep(cache: dict[Any, Any], key: Any, made: Any) -> Any:
    if len(cache) >= _MOST:
        cache.clear()
    cache[key] = made
    return made


def _literal(value: Any) -> bytes:
    """Return the JSON of a value as a part of a template."""
    return encode(value).replace(b"%", b"%%")
