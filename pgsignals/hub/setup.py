"""The setup of a delivery from a database: resolves watchers, installs triggers, makes decoders."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from typing import Any

from psycopg2 import sql
from psycopg2.extensions import cursor as Cursor

from ..consumers.backfills.chunks import SnapshotTopic, snapshot_topics
from ..consumers.channels import (
    Described,
    OrphanedDefinition,
    by_watcher,
    define_for,
    elsewhere,
    former_topic,
    moved,
    note_moved,
    read_moved,
    understood,
    wanted,
)
from ..consumers.decoding import ChannelDecoder
from ..consumers.log import Log
from ..core.errors import ConfigurationError, DatabaseError, DriftError, TableError, near
from ..core.events import Gap, model_identity, model_name
from ..core.logging import log
from ..core.metrics import Meter
from ..core.payload import Cast
from ..core.rows import decoder_of
from ..core.watchers import Watcher
from ..dispatch.registry import Registry
from ..outbox import schema
from ..outbox.privileges import missing_grants as consumer_grants
from ..outbox.provider import OutboxProvider
from ..sources.handover import Handover
from ..triggers import names
from ..triggers.catalogue import Installed, read_installed
from ..triggers.definitions import Compiled, Definition, define
from ..triggers.installer import (
    Drift,
    Plan,
    check,
    create,
    create_what_can_be,
    find_drift,
    in_install_lock,
    plan,
    prune,
    remove,
)
from ..triggers.publications import breaking
from ..triggers.sql import Trigger
from ..wal.provider import WalProvider
from ..wal.publication import check_publications, ensure_publications
from ..wal.server import refuse_unfit
from .options import Options

NO_LONGER_FIT = "the watchers no longer fit the database"


class Setup:
    """Resolves the watchers and installs their triggers whenever a source connects.

    In between it says what has changed since. After the first time, the Hub goes on if a table has
    changed.
    """

    def __init__(
        self, options: Options, registry: Registry, meter: Meter, gap: Callable[[Gap], object]
    ) -> None:
        self._options = options
        self._registry = registry
        self._meter = meter
        self._gap = gap
        self._problem: ConfigurationError | None = None
        self._running = False
        self._pruned = not options.prune
        # The names of triggers that were the watchers' until their tables changed.
        self._replaced: frozenset[str] = frozenset()
        self.missing = ""
        self.definitions: list[Definition] = []
        self._compiled: Compiled = {}

    def define(self, cursor: Cursor) -> list[Definition]:
        """Resolve the watchers, and check the receivers against what they deliver."""
        self._problem = None
        try:
            definitions = self._resolve(cursor)
            self._bind(definitions)
        except ConfigurationError as error:
            if not self.definitions:
                raise
            log.error(
                "the watchers no longer fit the database, and events may be missing until they do: "
                "%s",
                error,
            )
            self._problem = error
        else:
            former = {each.name for each in _triggers(self.definitions)}
            self.definitions = definitions
            self._replaced |= former
            self._replaced -= {each.name for each in _triggers(definitions)}
            for definition in definitions:
                self._meter.count("events", 0, **definition.topic.fields)
        return self.definitions

    def _resolve(self, cursor: Cursor) -> list[Definition]:
        return self._define(cursor, self._options.watchers)

    def _define(self, cursor: Cursor, watchers: Sequence[Watcher]) -> list[Definition]:
        options = self._options
        # Each look at what has changed asks again, while nothing is read.
        return define(
            cursor,
            watchers,
            options.resolvers,
            options.namespace,
            options.transport,
            self._compiled,
            options.capture,
        )

    def _bind(self, definitions: Sequence[Definition]) -> None:
        self._registry.bind([each.topic for each in definitions], retried=False)

    def install(self, cursor: Cursor, definitions: Sequence[Definition]) -> None:
        """Install or check the triggers, as far as the options allow."""
        if self._problem is not None:
            now = datetime.now(timezone.utc)
            self._gap(Gap(now, now, "watcher_broken", str(self._problem)))
            self.missing = f"{NO_LONGER_FIT}: {self._problem}"
            return
        options, triggers = self._options, _triggers(definitions)
        # Read once: hundreds of triggers take longer to read than all else together.
        unread = options.install == "off" and not self._running
        installed = [] if unread else self._read_installed(cursor)
        change = plan(triggers, installed)
        self.missing = self._install(cursor, change, self._running)
        self._running = True
        if options.install == "auto" and change.created:
            installed = self._read_installed(cursor)
            change = plan(triggers, installed)
        self._note_tables(cursor, definitions, installed)
        if options.install == "auto" and not self._pruned:
            remove(cursor, change.unwanted, options.limits)
            self._pruned = True

    def _read_installed(self, cursor: Cursor) -> list[Installed]:
        return read_installed(cursor, self._options.namespace)

    def _install(self, cursor: Cursor, change: Plan, running: bool) -> str:
        """Install or check the triggers; return why some are missing still, or an empty text.

        A Hub that is ``running`` goes on without those; at its start, this raises instead.
        """
        options, namespace = self._options, self._options.namespace
        if options.install == "auto":
            if running:
                return create_what_can_be(cursor, namespace, change, options.limits)
            create(cursor, namespace, change, options.limits)
        elif options.install == "check" and not running:
            check(change)
        elif running:
            drift = find_drift(change.wanted, change, False)
            return "" if drift is None else drift.reason
        return ""

    def _note_tables(
        self, cursor: Cursor, definitions: Sequence[Definition], installed: Sequence[Installed]
    ) -> None:
        """Note the tables that have been renamed or have gone."""

    def repair(self, cursor: Cursor, listened: Sequence[Definition]) -> str:
        """Try to install what is missing; return why something is missing still."""
        drift = self.drift(cursor, listened)
        if drift is not None and drift.fits and self._options.install == "auto":
            change = plan(_triggers(listened), self._read_installed(cursor))
            return self._install(cursor, change, running=True)
        return "" if drift is None else drift.reason

    def drift(self, cursor: Cursor, listened: Sequence[Definition]) -> Drift | None:
        """Return why the triggers are not what the watchers, resolved again, need by now."""
        options = self._options
        try:
            needed = _triggers(self._resolve_again(cursor, listened))
        except ConfigurationError as error:
            # No trigger that could be installed would fit.
            return Drift(f"{NO_LONGER_FIT}: {error}", fits=False)
        automatic = options.install == "auto"
        change = plan(needed, self._read_installed(cursor))
        return find_drift(_triggers(listened), change, automatic)

    def _resolve_again(self, cursor: Cursor, listened: Sequence[Definition]) -> list[Definition]:
        return self._define(cursor, self._options.watchers)


class DurableSetup(Setup):
    """The setup of all consumers of a delivery, with the schema and their decoders.

    ``consumers`` are their names; a process without a name has none, since its consumers end with
    it.
    """

    def __init__(
        self, options: Options, registry: Registry, meter: Meter, consumers: Sequence[str]
    ) -> None:
        self.transport = options.transport
        self.coming: Sequence[Definition] = ()
        # No Gap here: the trigger of a broken watcher reports that in the outbox.
        super().__init__(options, registry, meter, lambda gap: None)
        self._consumers = consumers
        self._snapshots: list[SnapshotTopic] = []
        self._moved: Mapping[int, tuple[str, str]] = {}

    def _resolve(self, cursor: Cursor) -> list[Definition]:
        options = self._options
        if not self._consumers:
            return super()._resolve(cursor)
        resolvers, namespace = options.resolvers, options.namespace
        consumers, watchers = self._consumers, options.watchers
        return define_for(
            cursor,
            consumers,
            watchers,
            resolvers,
            namespace,
            options.transport,
            self._compiled,
            options.capture,
        )

    def _bind(self, definitions: Sequence[Definition]) -> None:
        # A process without a name gets no snapshots: its consumers end with it.
        snapshots = snapshot_topics(_present(definitions)) if self._consumers else []
        topics = [each.topic for each in definitions] + [each.topic for each in snapshots]
        self._registry.bind(topics, delivered=self._options.workers > 0)
        self._snapshots = snapshots

    def install(self, cursor: Cursor, definitions: Sequence[Definition]) -> None:
        if self._options.install == "auto":
            schema.install_schema(cursor, self._options.limits)
        elif self._options.install == "check":
            schema.check_schema(cursor, self._options.delivery)
        super().install(cursor, definitions)

    def _note_tables(
        self, cursor: Cursor, definitions: Sequence[Definition], installed: Sequence[Installed]
    ) -> None:
        # While its table is away, no trigger is known to be right: what is written to the table
        # under another name is the watcher's, once the table is back.
        self.missing = self.missing or self._away(cursor, definitions)
        if self._options.install != "off":
            self._moved = read_moved(installed, _present(definitions))
        if self._options.install == "auto":
            note_moved(cursor, self._moved)

    def drift(self, cursor: Cursor, listened: Sequence[Definition]) -> Drift | None:
        found = super().drift(cursor, listened)
        if found is None and (away := self._away(cursor, listened)):
            return Drift(away, fits=False)
        return found

    def _resolve_again(self, cursor: Cursor, listened: Sequence[Definition]) -> list[Definition]:
        watchers = {id(each.watcher): each.watcher for each in _present(listened)}
        for each in listened:
            if id(each.watcher) not in watchers:
                # The table of an orphaned definition may be back.
                with contextlib.suppress(TableError):
                    self._define(cursor, [each.watcher])
                    watchers[id(each.watcher)] = each.watcher
        return self._define(cursor, [*watchers.values()])

    def _away(self, cursor: Cursor, definitions: Sequence[Definition]) -> str:
        """Return why a watcher has only an orphaned definition; empty if none has."""
        for each in definitions:
            if isinstance(each, OrphanedDefinition):
                try:
                    self._define(cursor, [each.watcher])
                except ConfigurationError as error:
                    return f"{NO_LONGER_FIT}: {error}"
        return ""

    def handover(self, former: Log, holder: str, timeout: float) -> Handover | None:
        """See DurablePreparer: a consumer that ends with its process comes from no other log."""
        return None

    def decoders(self, channels: Sequence[Described], cast: Cast) -> Mapping[int, ChannelDecoder]:
        """Return a decoder for each channel of the watchers, and of their former definitions."""
        known = {
            key: replace(each, layout=moved(each.layout, self._moved.get(key)))
            for key, each in understood(channels).items()
        }
        alike = by_watcher(known)
        relations = {each.channel: each.relations for each in channels}
        found: dict[int, ChannelDecoder] = {}
        owners = {names.channel_key(each.trigger.hash): each for each in self.definitions}
        for own, definition in owners.items():
            if own not in known:
                if self.missing:
                    # A trigger that is missing has no channel to read.
                    continue
                raise DriftError(
                    f"The schema {schema.NAME!r} does not know the trigger for {definition}: it "
                    "was installed before the schema was made anew. Run `pgsignals uninstall` and "
                    "then `pgsignals install --delivery outbox` (or wal)."
                )
            for key, ids in wanted(own, alike[own]).items():
                if key != own and key in owners:
                    continue  # Another watcher's own: it watches the table by another model.
                if key == own:
                    decoder = definition.decoder(cast)
                else:
                    former = known[key].layout
                    topic = former_topic(definition.topic, former)
                    decoder = decoder_of(topic, former, cast)
                found[key] = ChannelDecoder(decoder, ids, relations[key])
            for key in elsewhere(own, alike[own]):
                # Nothing of it is read here, but events that were kept of it have to be.
                former = known[key].layout
                topic = former_topic(definition.topic, former)
                found[key] = ChannelDecoder(decoder_of(topic, former, cast), ())
        for each in self._snapshots:
            found[each.channel] = ChannelDecoder(each.decoder(cast))
        return found

    def snapshot(self, target: Any) -> tuple[SnapshotTopic, str | None]:
        """Return the topic of a backfill of a model or label, and its model if a table has several.

        Raises TableError for a table without a key, ConfigurationError for an unwatched target.
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

    def protect_writes(self, cursor: Cursor) -> bool:
        """Undo what would break somebody's writes; return whether there was anything.

        Triggers break none.
        """
        return False

    def remove_former_triggers(self, cursor: Cursor) -> None:
        """Remove triggers that only former definitions of our consumers needed.

        Called after a claim: at the start, another process may still read for the consumer through
        these triggers.
        """
        options, triggers = self._options, _triggers(self.definitions)
        if options.install == "auto" and options.prune:
            prune(cursor, options.namespace, triggers, limits=options.limits)

    def remove_replaced_triggers(self, cursor: Cursor) -> None:
        """Remove triggers that were our watchers' until their tables changed, as far as they go.

        A table that rows have served then leaves the publication. Those that another consumer
        still reads stay for the next call.
        """
        options, triggers = self._options, _triggers(self.definitions)
        if options.install == "auto" and options.prune and self._replaced:
            only = sorted(self._replaced)
            prune(cursor, options.namespace, triggers, only=only, limits=options.limits)
            left = read_installed(cursor, options.namespace, only)
            self._replaced -= {*only} - {each.name for each in left}


class OutboxSetup(DurableSetup, OutboxProvider):
    """The setup of consumers of the outbox."""


class WalSetup(DurableSetup, WalProvider):
    """The setup of consumers of the write-ahead log, with its publications."""

    @property
    def session_dsn(self) -> str:
        return self._options.session_dsn

    @property
    def ephemeral(self) -> bool:
        return self._options.name is None

    @property
    def lease(self) -> float:
        return float(self._options.lease)

    def define(self, cursor: Cursor) -> list[Definition]:
        if not self.definitions:
            # A slot that is temporary goes with its session.
            unbounded = self.ephemeral or self._options.allow_unbounded_wal
            refuse_unfit(cursor, unbounded=unbounded)
        return super().define(cursor)

    def install(self, cursor: Cursor, definitions: Sequence[Definition]) -> None:
        if self._options.install == "auto":
            ensure_publications(cursor)
        elif self._options.install == "check" and not self._running:
            check_publications(cursor)
        super().install(cursor, definitions)

    def protect_writes(self, cursor: Cursor) -> bool:
        """Take tables that cannot be updated out of our publication; return whether any was.

        Their watchers are served by messages from then on.
        """
        options, taken = self._options, False
        for schema_name, table in breaking(cursor):
            name = sql.Identifier(schema_name, table)
            statement = sql.SQL("ALTER PUBLICATION {} DROP TABLE ONLY {}").format(
                sql.Identifier(names.PUBLICATION), name
            )
            text = statement.as_string(cursor)
            log.error(
                "the table %s.%s, or a partition of it, has lost its replica identity, or has a "
                "computed column in it, and PostgreSQL refuses its UPDATEs and DELETEs while it is "
                "published: %s",
                schema_name,
                table,
                "taking it out" if options.install == "auto" else f"run {text}",
            )
            if options.install == "auto":
                try:
                    in_install_lock(
                        cursor, options.limits, schema_name, table, partial(cursor.execute, text)
                    )
                    taken = True
                except DatabaseError as error:
                    log.error("could not take it out; run %s: %s", text, error)
        return taken

    def missing_grants(self, cursor: Cursor) -> list[str]:
        return [*consumer_grants(cursor), *super().missing_grants(cursor)]


def _present(definitions: Sequence[Definition]) -> list[Definition]:
    """Return the definitions that are not orphaned."""
    return [each for each in definitions if not isinstance(each, OrphanedDefinition)]


def _triggers(definitions: Sequence[Definition]) -> list[Trigger]:
    return [each.trigger for each in _present(definitions)]
