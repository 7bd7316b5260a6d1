"""What the outbox's rows are, by their channels: of tables, too, that are no longer what they were.

Each trigger has a channel, which ``pgsignals.channels`` describes for as long as there may be rows.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from psycopg2.extensions import cursor as Cursor

from ..errors import ConfigurationError, PayloadError, TableError
from ..events import Topic, model_name
from ..payload import Cast, Decoder, Layout
from ..tables import Resolver, Table, describe, resolve
from ..triggers import names
from ..triggers.catalogue import read_installed
from ..triggers.definitions import Definition, RecordLoader, define
from ..triggers.sql import Specification, Trigger
from ..watchers import Watcher
from .schema import read_version

log = logging.getLogger("pgsignals")


@dataclass(frozen=True)
class Channel:
    """A channel's number, the id above which its trigger writes, and what its rows are."""

    key: int
    since: int
    layout: Layout


def wanted(own: int, known: Mapping[int, Channel]) -> dict[int, int | None]:
    """What to read for the definition of a watcher whose channel is ``own``.

    Its former definitions too, up to the id from which its own trigger has written: while both
    triggers are there, each change comes through both.
    """
    present = known[own]
    found: dict[int, int | None] = {own: None}
    for channel in known.values():
        if channel.key != own and channel.layout.identity == present.layout.identity:
            found[channel.key] = present.since
    return found


def read_channels(cursor: Cursor) -> dict[int, Channel]:
    """All channels that are known, but for those of a later version, whose processes know them."""
    cursor.execute("SELECT channel, since, definition FROM pgsignals.channels")
    found = {}
    for key, since, text in cursor.fetchall():
        with contextlib.suppress(PayloadError):
            found[key] = Channel(key, since, Layout.decode(text))
    return found


@dataclass(frozen=True)
class Remains(Definition):
    """What a watcher got before its table went, or lost a column, and what its trigger still sends.

    There is nothing to install for it.
    """

    layout: Layout

    def decoder(self, cast: Cast) -> Decoder:
        """A decoder for what the trigger has sent."""
        return Decoder(self.topic, self.layout.key_fields, self.layout.value_fields, cast)


def define_for(
    cursor: Cursor,
    consumers: Sequence[str],
    watchers: Sequence[Watcher],
    resolvers: Sequence[Resolver],
    namespace: str,
) -> list[Definition]:
    """Like ``define``, for consumers by name: what was committed for them is theirs to deliver.

    A watcher whose table has gone, or no longer has a column that it asks for, has Remains, if one
    of them has read for it before. Raises what ``define`` does otherwise.
    """
    try:
        return define(cursor, watchers, resolvers, namespace, durable=True)
    except TableError:
        known = _read_by(cursor, consumers)
        if not known:
            raise
    fitting: list[Watcher] = []
    found: list[Definition] = []
    for watcher in watchers:
        try:
            define(cursor, [watcher], resolvers, namespace, durable=True)
        except TableError as error:
            remains = _remains(cursor, watcher, resolvers, namespace, known)
            if remains is None:
                raise
            log.error(
                "the watcher %s no longer fits the database, and only what was committed before "
                "is delivered for sure: %s",
                watcher,
                error,
            )
            found += remains
        else:
            fitting.append(watcher)
    return [*define(cursor, fitting, resolvers, namespace, durable=True), *found]


def _read_by(cursor: Cursor, consumers: Sequence[str]) -> list[Channel]:
    if not read_version(cursor):
        return []
    cursor.execute(
        "SELECT DISTINCT d.channel, d.since, d.definition FROM pgsignals.consumers AS c"
        " JOIN pgsignals.channels AS d ON d.channel = ANY (c.channels) WHERE c.name = ANY (%s)"
        " ORDER BY d.since DESC",
        (list(consumers),),
    )
    return [Channel(key, since, Layout.decode(text)) for key, since, text in cursor.fetchall()]


def _remains(
    cursor: Cursor,
    watcher: Watcher,
    resolvers: Sequence[Resolver],
    namespace: str,
    known: Sequence[Channel],
) -> list[Remains] | None:
    """One for each operation; None where one has never been read, or the watcher is another."""
    ref, resolver = resolve(watcher.model, resolvers)
    table = None
    with contextlib.suppress(TableError):
        table = describe(cursor, ref)
    asked = tuple(dict.fromkeys((*watcher.columns, *watcher.extra)))
    found = []
    for op in watcher.ops:
        for channel in known:
            layout = channel.layout
            # Of a table that is there, a watcher that asks for something new may be misspelt.
            if (
                (layout.namespace, layout.op, layout.label) == (namespace, op, watcher.label)
                and layout.table == ref.name
                and ref.schema in (None, layout.schema)
                and (table is None or op == "truncated" or layout.values == asked)
            ):
                found.append(_remain(watcher, channel, table, resolver, resolvers))
                break
        else:
            return None
    return found


def _remain(
    watcher: Watcher,
    channel: Channel,
    table: Table | None,
    resolver: Resolver,
    resolvers: Sequence[Resolver],
) -> Remains:
    layout = channel.layout
    former = table or Table(layout.schema, layout.table, 0, False, False, (), ())
    topic = Topic(
        model=watcher.model,
        op=layout.op,
        label=layout.label,
        schema=layout.schema,
        table=layout.table,
        key=layout.key,
        values=layout.values,
        compared=layout.compared,
        loader=_nothing_left(watcher)
        if table is None
        else RecordLoader(watcher.model, table, resolver, resolvers),
        name=layout.name,
    )
    spec = Specification(layout.namespace, former, layout.op, layout.label, durable=True)
    hashed = names.hash_of(channel.key)
    return Remains(watcher, topic, Trigger(spec, hashed, "", (), (), ""), layout)


def _nothing_left(watcher: Watcher) -> Any:
    def load(session: Any, ids: Sequence[tuple[Any, ...]], /, **options: Any) -> list[Any]:
        raise ConfigurationError(
            f"load() of {model_name(watcher.model)} has no table to ask: it has been dropped or "
            "renamed since. The event's values are as they were."
        )

    return load


def read_moved(
    cursor: Cursor, namespace: str, definitions: Sequence[Definition]
) -> dict[int, tuple[str, str]]:
    """Channels of tables that were renamed since, and are watched by what they are called now."""
    places = {
        (d.topic.schema, d.topic.table, d.topic.op, d.topic.label, d.trigger.name)
        for d in definitions
    }
    own = {name for *_, name in places}
    watched = {place[:-1] for place in places}
    return {
        names.channel_key(item.hash): (item.schema, item.table)
        for item in read_installed(cursor, namespace)
        if item.table is not None
        and item.name not in own
        and (item.schema, item.table, item.tag.op, item.tag.label) in watched
    }


def moved(layout: Layout, place: tuple[str, str] | None) -> Layout:
    """What the rows of a channel are, by what their table is called now."""
    if place is None:
        return layout
    schema, table = place
    return msgspec.structs.replace(layout, schema=schema, table=table)


def note_moved(cursor: Cursor, channels: Mapping[int, tuple[str, str]]) -> None:
    """Keep what their tables are called now, for when their triggers have been removed."""
    for key, place in channels.items():
        cursor.execute("SELECT definition FROM pgsignals.channels WHERE channel = %s", (key,))
        for (text,) in cursor.fetchall():
            layout = Layout.decode(text)
            if (layout.schema, layout.table) != place:
                cursor.execute(
                    "UPDATE pgsignals.channels SET definition = %s WHERE channel = %s",
                    (moved(layout, place).encode(), key),
                )
                log.info("%s.%s is now called %s.%s", layout.schema, layout.table, *place)


def former_topic(topic: Topic, layout: Layout) -> Topic:
    """The topic of a watcher's former definition."""
    return replace(
        topic,
        key=layout.key,
        values=layout.values,
        compared=layout.compared,
        name=layout.name,
    )
