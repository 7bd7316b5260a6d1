"""The channels of a log, which say how to read its messages, even of tables changed or gone since.

Each trigger has a channel, which ``pgsignals.channels`` describes for as long as there may be
messages.
"""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import msgspec
from psycopg2.extensions import cursor as Cursor

from ..core.errors import ConfigurationError, PayloadError, TableError
from ..core.events import Topic, model_name
from ..core.logging import log
from ..core.payload import Cast, Decoder, Layout
from ..core.rows import decoder_of
from ..core.tables import Resolver, Table
from ..core.transport import Capture, Transport
from ..core.watchers import Watcher
from ..triggers import names
from ..triggers.catalogue import Installed
from ..triggers.definitions import Compiled, Definition, RecordLoader, define
from ..triggers.sql import Specification, Trigger, rows_witness
from ..triggers.table_lookup import describe, resolve
from .consumer_store import Channels, ConsumerStore

# Ranges of ids: each from its first number on, up to but without its second; None has no end.
Ids = tuple[tuple[int, "int | None"], ...]


@dataclass(frozen=True)
class Described:
    """A channel as the database describes it.

    It became its watcher's at the id ``since``, and its triggers were last made at the id ``made``.
    ``relations`` are the OIDs of the tables whose messages it has; of a table with a number, only
    those with lower ids.
    """

    channel: int
    since: int
    made: int
    definition: str
    relations: Mapping[int, int | None]


@dataclass(frozen=True)
class Channel:
    """A channel's number, the id at which it became its watcher's, and the layout of its rows."""

    key: int
    since: int
    layout: Layout


def wanted(own: int, known: Mapping[int, Channel]) -> dict[int, Ids]:
    """Return the ids to read of each channel of the log for a watcher whose own is ``own``.

    A watcher's former channels are read too, each up to the id from which the next one is: while
    the triggers of several are installed, each change comes through all of them. The rows below the
    first channel's id are read from all: a definition may have been the watcher's before, and then
    again.
    """
    present = known[own]
    channels = sorted(
        (each for each in known.values() if each.layout.place == present.layout.place),
        key=lambda each: each.since,
    )
    first = channels[0].since
    found: dict[int, Ids] = {each.key: ((0, first),) for each in channels}
    turns = channels[: channels.index(present) + 1]
    for channel, following in zip_longest(turns, turns[1:]):
        until = None if following is None else following.since
        found[channel.key] += ((channel.since, until),)
    return found


def elsewhere(own: int, known: Mapping[int, Channel]) -> list[int]:
    """Return the watcher's channels in other logs, from which its consumer may have read before."""
    present = known[own].layout
    return [
        each.key
        for each in known.values()
        if each.layout.identity == present.identity and each.layout.delivery != present.delivery
    ]


def by_watcher(known: Mapping[int, Channel]) -> dict[int, Mapping[int, Channel]]:
    """Return, for each channel, those of its watcher, in all logs.

    With all channels, ``wanted`` would take each of hundreds of watchers as long as all together.
    """
    groups: defaultdict[object, dict[int, Channel]] = defaultdict(dict)
    for key, each in known.items():
        groups[each.layout.identity][key] = each
    return {key: groups[each.layout.identity] for key, each in known.items()}


def _known(rows: Iterable[tuple[int, int, str]]) -> dict[int, Channel]:
    """Return, by number, the channels whose descriptions this version understands."""
    found = {}
    for key, since, text in rows:
        with contextlib.suppress(PayloadError):
            found[key] = Channel(key, since, Layout.decode(text))
    return found


def understood(described: Sequence[Described]) -> dict[int, Channel]:
    """Return the channels by number, without those that only a newer version understands."""
    return _known((each.channel, each.since, each.definition) for each in described)


def read_by(own: Sequence[int], described: Sequence[Described]) -> Channels:
    """Return the channels to read for definitions whose channels are ``own``."""
    known = understood(described)
    return Channels(
        own,
        max((each.made for each in described if each.channel in own), default=0),
        [each.channel for each in described if each.channel not in known],
    )


def predecessors(
    definitions: Sequence[Definition], described: Sequence[Described]
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return, by the witness of each trigger, those of its watcher's other triggers.

    The second mapping has only those that became the watcher's later: they are not read. Orphaned
    definitions, whose tables are gone, have no trigger to compare with, and are left out.
    """
    known = understood(described)
    alike = by_watcher(known)
    relations = {each.channel: each.relations for each in described}
    found: dict[str, list[str]] = {}
    unread: dict[str, list[str]] = {}
    for definition in definitions:
        trigger = definition.trigger
        own = names.channel_key(trigger.hash)
        if own in known and trigger.spec.table.oid:
            others = {
                _witness(known[key].layout, key, relations.get(key, ())): known[key].since
                for key in wanted(own, alike[own])
                if key != own
            }
            found[trigger.witness] = [*others]
            unread[trigger.witness] = [n for n, since in others.items() if since > known[own].since]
    return found, unread


def _witness(layout: Layout, key: int, relations: Iterable[int]) -> str:
    if layout.rows:
        return rows_witness(layout.op, relations)
    return names.object_name(names.hash_of(key))


def read_described(consumer: ConsumerStore) -> list[Described]:
    """Return every channel: its definition, the ids that it counts from, and its tables."""
    found = consumer.execute(
        "SELECT c.channel, c.since, c.made, c.definition, coalesce(r.tables, '{}')"
        " FROM pgsignals.channels AS c LEFT JOIN ("
        "   SELECT channel, pg_catalog.array_agg(ARRAY[relation::bigint, until]) AS tables"
        "   FROM pgsignals.relations GROUP BY channel) AS r ON r.channel = c.channel"
    )
    return [
        Described(channel, since, made, definition, dict(tables))
        for channel, since, made, definition, tables in found
    ]


def read_channels(cursor: Cursor) -> dict[int, Channel]:
    """Return the channels by number, without those that only a newer version understands."""
    cursor.execute("SELECT channel, since, definition FROM pgsignals.channels")
    return _known(cursor.fetchall())


@dataclass(frozen=True)
class OrphanedDefinition(Definition):
    """The definition that a watcher had before its table, or a column of it, was gone.

    It decodes the rows that are left and those that the trigger still sends. There is nothing to
    install for it.
    """

    layout: Layout

    def decoder(self, cast: Cast) -> Decoder:
        """A decoder for what the trigger has sent."""
        return decoder_of(self.topic, self.layout, cast)


def define_for(
    cursor: Cursor,
    consumers: Sequence[str],
    watchers: Sequence[Watcher],
    resolvers: Sequence[Resolver],
    namespace: str,
    transport: Transport,
    compiled: Compiled,
    capture: Capture | None = None,
) -> list[Definition]:
    """Define as ``define`` does, for ``consumers`` that must get what was committed for them.

    A watcher whose table, or a column that it asks for, is gone gets orphaned definitions if one of
    the consumers has read for it before. Otherwise this raises what ``define`` raises.
    """

    def defined(some: Sequence[Watcher]) -> list[Definition]:
        return define(cursor, some, resolvers, namespace, transport, compiled, capture)

    try:
        return defined(watchers)
    except TableError:
        known = _read_by(cursor, consumers)
        if not known:
            raise
    fitting: list[Watcher] = []
    found: list[Definition] = []
    for watcher in watchers:
        try:
            defined([watcher])
        except TableError as error:
            remains = _remains(cursor, watcher, resolvers, namespace, transport, known)
            if remains is None:
                raise
            log.error(
                "the watcher %s no longer fits the database: its earlier events are delivered, "
                "later ones may be missing: %s",
                watcher,
                error,
            )
            found += remains
        else:
            fitting.append(watcher)
    return [*defined(fitting), *found]


def _read_by(cursor: Cursor, consumers: Sequence[str]) -> list[Channel]:
    cursor.execute("SELECT pg_catalog.to_regclass('pgsignals.consumers') IS NOT NULL")
    if cursor.fetchall() == [(False,)]:
        return []
    cursor.execute(
        "SELECT DISTINCT d.channel, d.since, d.definition FROM pgsignals.consumers AS c"
        " JOIN pgsignals.channels AS d ON d.channel = ANY (c.channels) WHERE c.name = ANY (%s)"
        " ORDER BY d.since DESC",
        (list(consumers),),
    )
    return list(_known(cursor.fetchall()).values())


def _remains(
    cursor: Cursor,
    watcher: Watcher,
    resolvers: Sequence[Resolver],
    namespace: str,
    transport: Transport,
    known: Sequence[Channel],
) -> list[OrphanedDefinition] | None:
    """Return one for each operation; None if an operation has no channel that fits the watcher."""
    ref, resolver = resolve(watcher.model, resolvers)
    model = "" if ref.only is None else model_name(watcher.model)
    table = None
    with contextlib.suppress(TableError):
        table = describe(cursor, ref)
    asked = tuple(dict.fromkeys((*watcher.columns, *watcher.extra)))
    found = []
    for op in watcher.ops:
        for channel in known:
            layout = channel.layout
            # While the table is there, a watcher that asks for other columns than before may be
            # misspelt, and has to fail.
            if (
                (layout.namespace, layout.op, layout.label) == (namespace, op, watcher.label)
                and (layout.table, layout.model) == (ref.name, model)
                and ref.schema in (None, layout.schema)
                and (table is None or op == "truncated" or layout.values == asked)
            ):
                found.append(_remain(watcher, channel, table, resolver, resolvers, transport))
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
    transport: Transport,
) -> OrphanedDefinition:
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
    spec = Specification(layout.namespace, former, layout.op, layout.label, transport=transport)
    hashed = names.hash_of(channel.key)
    return OrphanedDefinition(watcher, topic, Trigger(spec, hashed, "", tuple), layout)


def _nothing_left(watcher: Watcher) -> Any:
    def load(session: Any, ids: Sequence[tuple[Any, ...]], /, **options: Any) -> list[Any]:
        raise ConfigurationError(
            f"load() of {model_name(watcher.model)} has no table to ask: it has been dropped or "
            "renamed since. The event's values are as they were."
        )

    return load


def read_moved(
    installed: Sequence[Installed], definitions: Sequence[Definition]
) -> dict[int, tuple[str, str]]:
    """Return the channels of tables renamed since that are watched under their new names."""
    places = {
        (d.topic.schema, d.topic.table, d.topic.op, d.topic.label, d.trigger.name)
        for d in definitions
    }
    own = {name for *_, name in places}
    watched = {place[:-1] for place in places}
    return {
        names.channel_key(item.hash): (item.schema, item.table)
        for item in installed
        if item.table is not None
        and item.name not in own
        and (item.schema, item.table, item.tag.op, item.tag.label) in watched
    }


def moved(layout: Layout, place: tuple[str, str] | None) -> Layout:
    """Return the layout with its table's present name, ``place``, if the table was renamed."""
    if place is None:
        return layout
    schema, table = place
    return msgspec.structs.replace(layout, schema=schema, table=table)


def note_moved(cursor: Cursor, channels: Mapping[int, tuple[str, str]]) -> None:
    """Save the names that the tables of ``channels`` have now, which outlive their triggers."""
    for key, place in channels.items():
        cursor.execute("SELECT definition FROM pgsignals.channels WHERE channel = %s", (key,))
        for (text,) in cursor.fetchall():
            try:
                layout = Layout.decode(text)
            except PayloadError:
                # Only a newer version understands it, whose programs note the new name.
                continue
            if (layout.schema, layout.table) != place:
                # Edited as JSON: a Layout would drop the fields that a newer version has added.
                renamed = json.loads(text) | {"schema": place[0], "table": place[1]}
                cursor.execute(
                    "UPDATE pgsignals.channels SET definition = %s WHERE channel = %s",
                    (json.dumps(renamed), key),
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
