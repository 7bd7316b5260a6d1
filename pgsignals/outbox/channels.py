"""What the outbox's rows are, by their channels: of tables, too, that are no longer what they were.

Each trigger has a channel, which ``pgsignals.channels`` describes for as long as there may be rows.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import msgspec
from psycopg2.extensions import cursor as Cursor

from ..consumers.consumer_store import Channels
from ..core.errors import ConfigurationError, PayloadError, TableError
from ..core.events import Topic, model_name
from ..core.logging import log
from ..core.payload import Cast, Decoder, Layout
from ..core.tables import Resolver, Table
from ..core.transport import Transport
from ..core.watchers import Watcher
from ..triggers import names
from ..triggers.catalogue import read_installed
from ..triggers.definitions import Definition, RecordLoader, define
from ..triggers.sql import Specification, Trigger
from ..triggers.table_lookup import describe, resolve
from .log import Described, Ids
from .schema import read_version


@dataclass(frozen=True)
class Channel:
    """A channel's number, the id from which it is the watcher's, and what its rows are."""

    key: int
    since: int
    layout: Layout


def wanted(own: int, known: Mapping[int, Channel]) -> dict[int, Ids]:
    """The ids to read of each channel for a watcher whose own channel is ``own``.

    Its former definitions too, each up to the id from which the next was the watcher's: while the
    triggers of several are there, each change comes through all of them. One that was the watcher's
    before, and then again, also has what is older than all the others.
    """
    present = known[own]
    channels = sorted(
        (each for each in known.values() if each.layout.identity == present.layout.identity),
        key=lambda each: each.since,
    )
    first = channels[0].since
    found: dict[int, Ids] = {each.key: ((0, first),) for each in channels}
    turns = channels[: channels.index(present) + 1]
    for channel, following in zip_longest(turns, turns[1:]):
        until = None if following is None else following.since
        found[channel.key] += ((channel.since, until),)
    return found


def _known(rows: Iterable[tuple[int, int, str]]) -> dict[int, Channel]:
    """By its number, each channel that this version understands the description of."""
    found = {}
    for key, since, text in rows:
        with contextlib.suppress(PayloadError):
            found[key] = Channel(key, since, Layout.decode(text))
    return found


def understood(described: Sequence[Described]) -> dict[int, Channel]:
    """By its number, each channel, but for those that a newer version describes in its own way."""
    return _known((each.channel, each.since, each.definition) for each in described)


def read_by(own: Sequence[int], described: Sequence[Described]) -> Channels:
    """What there is to read for definitions whose channels are ``own``."""
    known = understood(described)
    return Channels(
        own,
        max((each.made for each in described if each.channel in own), default=0),
        [each.channel for each in described if each.channel not in known],
    )


def predecessors(
    definitions: Sequence[Definition], described: Sequence[Described]
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """By the name of each trigger, those that its watcher has had before.

    The second has those alone that are younger: they are not read any more. Definitions of a table
    that has gone have none to compare with, and are left out.
    """
    known = understood(described)
    found: dict[str, list[str]] = {}
    unread: dict[str, list[str]] = {}
    for definition in definitions:
        trigger = definition.trigger
        own = names.channel_key(trigger.hash)
        if own in known and trigger.spec.table.oid:
            others = {
                names.object_name(names.hash_of(key)): known[key].since
                for key in wanted(own, known)
                if key != own
            }
            found[trigger.name] = [*others]
            unread[trigger.name] = [n for n, since in others.items() if since > known[own].since]
    return found, unread


def read_channels(cursor: Cursor) -> dict[int, Channel]:
    """All channels that are known, but for those of a later version, whose processes know them."""
    cursor.execute("SELECT channel, since, definition FROM pgsignals.channels")
    return _known(cursor.fetchall())


@dataclass(frozen=True)
class OrphanedDefinition(Definition):
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

    A watcher whose table has gone, or no longer has a column that it asks for, has an orphaned
    definition, if one of them has read for it before. Raises what ``define`` does otherwise.
    """
    try:
        return define(cursor, watchers, resolvers, namespace, transport=Transport.OUTBOX)
    except TableError:
        known = _read_by(cursor, consumers)
        if not known:
            raise
    fitting: list[Watcher] = []
    found: list[Definition] = []
    for watcher in watchers:
        try:
            define(cursor, [watcher], resolvers, namespace, transport=Transport.OUTBOX)
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
    return [*define(cursor, fitting, resolvers, namespace, transport=Transport.OUTBOX), *found]


def _read_by(cursor: Cursor, consumers: Sequence[str]) -> list[Channel]:
    if not read_version(cursor):
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
    known: Sequence[Channel],
) -> list[OrphanedDefinition] | None:
    """One for each operation; None where one has never been read, or the watcher is another."""
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
            # Of a table that is there, a watcher that asks for something new may be misspelt.
            if (
                (layout.namespace, layout.op, layout.label) == (namespace, op, watcher.label)
                and (layout.table, layout.model) == (ref.name, model)
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
    spec = Specification(
        layout.namespace, former, layout.op, layout.label, transport=Transport.OUTBOX
    )
    hashed = names.hash_of(channel.key)
    return OrphanedDefinition(watcher, topic, Trigger(spec, hashed, "", (), (), ""), layout)


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
            try:
                layout = Layout.decode(text)
            except PayloadError:
                # Its own version's programs note it.
                continue
            if (layout.schema, layout.table) != place:
                # Fields that a newer version has added are its own, and stay.
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
