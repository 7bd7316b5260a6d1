"""What a consumer of the outbox needs before it can read: watchers resolved, triggers, decoders."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from psycopg2.extensions import cursor as Cursor

from .errors import ConfigurationError, DriftError, TableError, near
from .events import model_identity, model_name
from .metrics import Meter
from .outbox import schema
from .outbox.channels import (
    Channel,
    Remains,
    define_for,
    former_topic,
    moved,
    note_moved,
    read_moved,
    wanted,
)
from .outbox.snapshots import SnapshotTopic, snapshot_topics
from .payload import Cast, Decoder, Layout
from .receivers import Registry
from .runs import Settings
from .sources.outbox import ChannelDecoder
from .triggers import names
from .triggers.definitions import Definition, define
from .triggers.installer import check, install, prune

log = logging.getLogger("pgsignals")


class DurablePreparer:
    """Prepares for all consumers of a run, each of which asks whenever it connects.

    ``consumers`` are their names: none of a process that has no name, whose consumers end with it.
    """

    def __init__(
        self, settings: Settings, registry: Registry, meter: Meter, consumers: Sequence[str]
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._meter = meter
        self._consumers = consumers
        self._snapshots: list[SnapshotTopic] = []
        self._moved: Mapping[int, tuple[str, str]] = {}
        self._problem: ConfigurationError | None = None
        self._pruned = not settings.prune
        self.definitions: list[Definition] = []

    def define(self, cursor: Cursor) -> list[Definition]:
        """See OutboxPreparer.

        After the first time, a table that changed is no reason to stop.
        """
        self._problem = None
        try:
            definitions = self._resolve(cursor)
            present = [each for each in definitions if not isinstance(each, Remains)]
            # What a process without a name has missed is not the outbox's to know.
            snapshots = snapshot_topics(present) if self._consumers else []
            topics = [each.topic for each in definitions] + [each.topic for each in snapshots]
            self._registry.bind(topics, delivered=self._settings.workers > 0)
        except ConfigurationError as error:
            if not self.definitions:
                raise
            log.error("the watchers no longer fit the database: %s", error)
            self._problem = error
        else:
            self.definitions, self._snapshots = definitions, snapshots
            for definition in definitions:
                self._meter.count("events", 0, **definition.topic.fields)
        return self.definitions

    def _resolve(self, cursor: Cursor) -> list[Definition]:
        settings = self._settings
        resolvers, namespace = settings.resolvers, settings.namespace
        if not self._consumers:
            return define(cursor, settings.watchers, resolvers, namespace, durable=True)
        return define_for(cursor, self._consumers, settings.watchers, resolvers, namespace)

    def install(self, cursor: Cursor, definitions: Sequence[Definition]) -> None:
        """See that the schema and the triggers are there, as far as the settings allow."""
        settings = self._settings
        fitting = [each for each in definitions if not isinstance(each, Remains)]
        triggers = [definition.trigger for definition in fitting]
        if settings.install == "auto":
            schema.install_schema(cursor, settings.limits)
        elif settings.install == "check":
            schema.check_schema(cursor)
        if self._problem is not None:
            return
        if settings.install == "auto":
            install(cursor, settings.namespace, triggers, settings.limits)
            self._moved = read_moved(cursor, settings.namespace, fitting)
            note_moved(cursor, self._moved)
            if not self._pruned:
                prune(cursor, settings.namespace, triggers, limits=settings.limits)
                self._pruned = True
        elif settings.install == "check":
            check(cursor, settings.namespace, triggers)
            self._moved = read_moved(cursor, settings.namespace, fitting)

    def decoders(
        self, channels: Sequence[tuple[int, int, str]], cast: Cast
    ) -> Mapping[int, ChannelDecoder]:
        """How to read each channel of a watcher, those of its former definitions too."""
        known = {
            key: Channel(key, since, moved(Layout.decode(text), self._moved.get(key)))
            for key, since, text in channels
        }
        found: dict[int, ChannelDecoder] = {}
        for definition in self.definitions:
            own = names.channel_key(definition.trigger.hash)
            if own not in known:
                raise DriftError(
                    f"The schema {schema.NAME!r} does not know the trigger for {definition}: it "
                    "was installed before the schema was made anew. Run `pgsignals uninstall` and "
                    "then `pgsignals install --delivery outbox`."
                )
            for key, until in wanted(own, known).items():
                if key == own:
                    decoder = definition.decoder(cast)
                else:
                    former = known[key].layout
                    topic = former_topic(definition.topic, former)
                    decoder = Decoder(topic, former.key_fields, former.value_fields, cast)
                found[key] = ChannelDecoder(decoder, until)
        for each in self._snapshots:
            found[each.channel] = ChannelDecoder(each.decoder(cast))
        return found

    def snapshot(self, target: Any) -> tuple[SnapshotTopic, str | None]:
        """What a backfill of a model or label delivers; and its model, where a table has several.

        Raises TableError for a table without a key, ConfigurationError for what is not watched.
        """
        identity = model_identity(target)
        for each in self._snapshots:
            topic = each.topic
            if identity in self._registry.names(topic):
                twins = [
                    other
                    for other in self._snapshots
                    if other.fits(topic.schema, topic.table, topic.label, None)
                ]
                return each, model_name(topic.model) if len(twins) > 1 else None
        for definition in self.definitions:
            if identity in self._registry.names(definition.topic):
                raise TableError(
                    f"{definition.trigger.spec.table.qualified} has no key, in whose order a "
                    "backfill goes: give it a primary key."
                )
        known = sorted(
            {each.topic.label or model_name(each.topic.model) for each in self._snapshots}
        )
        raise ConfigurationError(
            f"backfill({model_name(target)}): no watcher delivers that"
            f"{near(model_name(target), known)} Watched are {', '.join(known)}."
        )

    def remove_former_triggers(self, cursor: Cursor) -> None:
        """What only former definitions of our consumers needed goes, now that we read for one.

        The start comes too early for that: until the claim, the consumer may be another's.
        """
        settings = self._settings
        if settings.install == "auto" and settings.prune:
            fitting = [each.trigger for each in self.definitions if not isinstance(each, Remains)]
            prune(cursor, settings.namespace, fitting, limits=settings.limits)
