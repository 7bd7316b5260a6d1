"""``pgsignals relay --check``: checks, once, for what would keep a relay from working."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from psycopg2.extensions import cursor as Cursor

from pgsignals.core.errors import DriftError, PgSignalsError, WatcherError
from pgsignals.core.redaction import described, error_text
from pgsignals.hub.options import all_resolvers
from pgsignals.outbox.schema import check_schema
from pgsignals.overview.checks import FAIL, OK, WARN, Finding, examine
from pgsignals.overview.checks.findings import Outcome, fail, ok, warn
from pgsignals.plugins.broadcaster import Broadcaster, Checkable
from pgsignals.postgres.connection import opened
from pgsignals.triggers.definitions import define
from pgsignals.triggers.inspection import read_states
from pgsignals.triggers.installer import MISSING, OUTDATED

from .relay_config import RelayConfig

_SECONDS = 10.0
# Checks of triggers that notify, and for those who look after consumers.
_LEFT_OUT = ("triggers", "consumers", "dead letters")
# What is a hint for others keeps a relay, which has a name, from its start.
_NEEDED = ("outbox privileges", "replication", "slot limit")


def check_relay(config: RelayConfig, broadcasters: Mapping[str, Broadcaster]) -> Iterator[Finding]:
    """Check the database, the triggers and each target; nothing is created anywhere."""
    resolvers = all_resolvers(())
    # Rights matter if triggers are missing.
    rights, outbox = [], None
    reached = True
    for finding in examine(
        config.dsn,
        config.watchers,
        resolvers,
        config.namespace,
        config.transport,
        config.capture,
    ):
        if finding.check == "privileges":
            rights.append(finding)
        elif finding.check == "outbox":
            outbox = finding
        elif finding.check == "slot limit" and config.allow_unbounded_wal:
            yield Finding(finding.check, OK, finding.message)
        elif finding.check in _NEEDED and finding.level != OK:
            yield replace(finding, level=FAIL)
        elif finding.check not in _LEFT_OUT:
            yield finding
            reached = reached and (finding.check, finding.level) != ("connection", FAIL)
    tables: set[tuple[str, str]] = set()
    if reached:
        with opened(config.dsn) as cursor:
            try:
                definitions = define(
                    cursor,
                    config.watchers,
                    resolvers,
                    config.namespace,
                    config.transport,
                    capture=config.capture,
                )
            except WatcherError as error:
                yield Finding("watchers", FAIL, str(error), "Mend the watcher or the table.")
            else:
                tables = {(each.topic.schema, each.topic.table) for each in definitions}
                triggers = Finding("triggers", *_triggers(cursor, config))
                yield _schema(cursor, config) or outbox or Finding("outbox", OK, "it is there")
                yield triggers
                if config.install == "auto" and triggers.level != OK:
                    yield from rights
    for name, broadcaster in broadcasters.items():
        yield Finding(f"target {name}", *_target(broadcaster, sorted(tables)))


def _schema(cursor: Cursor, config: RelayConfig) -> Finding | None:
    try:
        check_schema(cursor, config.delivery)
    except DriftError as error:
        if config.install == "auto":
            return Finding(
                "outbox", WARN, "its schema is not there as it should be", "The relay makes it."
            )
        return Finding("outbox", FAIL, str(error), "See above.")
    return None


def _triggers(cursor: Cursor, config: RelayConfig) -> Outcome:
    states = read_states(
        cursor,
        config.watchers,
        all_resolvers(()),
        config.namespace,
        config.transport,
        config.capture,
    )
    wrong = [
        f"{state.op} on {state.schema}.{state.table} is {state.status}"
        for state in states
        if state.status in (MISSING, OUTDATED)
    ]
    if not wrong:
        return ok(f"all are there, in namespace {config.namespace!r}")
    if config.install == "auto":
        return warn("; ".join(wrong), "The relay installs them at its start.")
    return fail(
        "; ".join(wrong),
        f"Run `pgsignals install --delivery {config.delivery}` with these watchers, as the tables' "
        "owner.",
    )


def _target(broadcaster: Broadcaster, tables: list[tuple[str, str]]) -> Outcome:
    try:
        if isinstance(broadcaster, Checkable):
            broadcaster.check(tables)
        elif not broadcaster.flush(_SECONDS):
            message = f"{broadcaster} does not answer within {_SECONDS:g} s"
            return fail(message, "Start the broker, or correct the address.")
    except PgSignalsError as error:
        return fail(error_text(error), "Mend the broker or the target.")
    # Whatever a plugin raises, the other targets are checked too.
    except Exception as error:
        return fail(f"{broadcaster}: {described(error)}", "See what the plugin says of this.")
    finally:
        broadcaster.close()
    return ok(f"{broadcaster} takes the events")
