"""The checks of WAL delivery: the server's settings, slots, publications and replica identities."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from psycopg2.extensions import cursor as Cursor

from ...consumers.slot_states import SlotState, dropping, read_slots
from ...core.transport import Transport
from ...core.units import size_text, time_text
from ...triggers.catalogue import read_installed
from ...triggers.installer import State
from ...triggers.names import INSERTS_PUBLICATION, PUBLICATION, slot_name, streams_slot
from ...triggers.publications import has_identity
from ...wal.privileges import lacks_replication
from ...wal.server import BOUND, LOGICAL
from ...wal.slots import Execute, in_the_way
from .findings import FAIL, OK, WARN, Finding, Outcome, fail, ok, warn

# For how long nobody may read from a slot before it is worth a word.
INACTIVE_SECONDS = 600.0
# The shares of what a slot may keep from which on it is about to be lost.
SHARE_WARNING, SHARE_FAILURE = 0.5, 0.9
# What a slot without a bound may keep before it is worth a word.
RETAINED_WARNING = 10 << 30

# A transaction that has lasted so long may hold slots back.
OLD_TRANSACTION = "1 minute"

# The settings by which the server gives up slots, by the reasons that it has for that.
_KEEPING = {
    "wal_removed": "max_slot_wal_keep_size",
    "idle_timeout": "idle_replication_slot_timeout",
}

# Roles by which hosted servers are known, and what sets wal_level there.
_HOSTS = {
    "rds_superuser": "Set rds.logical_replication = 1 in the parameter group and reboot.",
    "cloudsqlsuperuser": "Set the flag cloudsql.logical_decoding = on; the instance restarts.",
    "azure_pg_admin": "Set the server parameter wal_level to LOGICAL and restart the server.",
    "neon_superuser": "Enable logical replication in the project's settings; it stays enabled.",
}


@dataclass(frozen=True)
class _Reader:
    """A named consumer of the log."""

    name: str
    lsn: int
    acknowledged_at: datetime
    quiet: float


@dataclass(frozen=True)
class _Bounds:
    """What the server keeps for a slot: at most so many ``bytes``, and so long if nobody reads.

    None is without a bound.
    """

    bytes: int | None
    idle_seconds: float | None


def examine_wal(
    cursor: Cursor,
    transport: Transport,
    states: Sequence[State] = (),
    inactive_seconds: float = INACTIVE_SECONDS,
) -> Iterator[Finding]:
    """Run every check of WAL delivery; none where nobody uses it or asks for it."""
    slots, readers = read_slots(cursor), _readers(cursor)
    installed = [each for each in read_installed(cursor, None) if each.transport is Transport.WAL]
    if transport is not Transport.WAL and not slots and not readers and not installed:
        return
    yield Finding("wal_level", *_level(cursor))
    yield Finding("replication", *_replication(cursor))
    yield Finding("slots left", *_left(cursor, slots))
    yield Finding("senders left", *_senders(cursor))
    bounds = _bounds(cursor)
    yield Finding("slot limit", *_limit(bounds))
    yield Finding("slots", *_slots(cursor, slots, readers, bounds, inactive_seconds))
    yield Finding("publications", *_publications(cursor, bool(readers or installed)))
    watched = {each.oid for item in installed for each in item.fired}
    named = {(each.schema, each.table) for each in states if each.table is not None}
    yield Finding("replica identities", *_identities(cursor, watched, named))
    yield Finding("synchronous commit", *_synchronous(cursor))


def _level(cursor: Cursor) -> Outcome:
    level = _setting(cursor, "wal_level")
    if level == "logical":
        return ok("the write-ahead log can be read")
    cursor.execute(
        "SELECT rolname FROM pg_catalog.pg_roles WHERE rolname = ANY (%s)", (list(_HOSTS),)
    )
    fixes = [_HOSTS[host] for (host,) in cursor.fetchall()]
    fix = fixes[0] if fixes else f"Run {LOGICAL}; and restart the server."
    return fail(f"wal_level is {level!r}, so that the write-ahead log cannot be read", fix)


def _replication(cursor: Cursor) -> Outcome:
    if (statement := lacks_replication(cursor)) is None:
        return ok("this role may read the write-ahead log")
    return warn("this role may not read the write-ahead log", f"Run {statement};")


def _left(cursor: Cursor, slots: Mapping[str, SlotState]) -> Outcome:
    cursor.execute("SELECT slot_name, active FROM pg_catalog.pg_replication_slots ORDER BY 1")
    found = cursor.fetchall()
    most = _number(cursor, "max_replication_slots")
    if len(found) < most:
        return ok(f"{most - len(found)} of {most} replication slots")
    idle = [name for name, active in found if not active]
    fix = f"Run ALTER SYSTEM SET max_replication_slots = {most + 10}; and restart the server"
    if idle:
        fix += f"; or drop one that nobody needs, with {dropping(idle[0])}, say"
    return fail(f"all {most} replication slots are in use: no consumer can be added", f"{fix}.")


def _senders(cursor: Cursor) -> Outcome:
    cursor.execute("SELECT pg_catalog.count(*) FROM pg_catalog.pg_stat_get_wal_senders()")
    [(used,)] = cursor.fetchall()
    most = _number(cursor, "max_wal_senders")
    if used < most:
        return ok(f"{most - used} of {most} connections that read the log")
    return fail(
        f"all {most} connections that may read the log are in use (max_wal_senders)",
        f"Run ALTER SYSTEM SET max_wal_senders = {most + 10}; and restart the server.",
    )


def _bounds(cursor: Cursor) -> _Bounds:
    limit = _number(cursor, "max_slot_wal_keep_size")
    # From PostgreSQL 18 on.
    idle = _number(cursor, "idle_replication_slot_timeout")
    return _Bounds(None if limit < 0 else limit << 20, idle or None)


def _limit(bounds: _Bounds) -> Outcome:
    idle = bounds.idle_seconds
    if bounds.bytes is not None:
        text = f"the server keeps at most {size_text(bounds.bytes)} for a slot"
        if idle is not None:
            text += f", and gives one up that nobody reads for {time_text(idle)}"
        return ok(text)
    if idle is not None:
        return warn(
            "the server keeps the log for a consumer that is away until its disk is full, for "
            f"{time_text(idle)}",
            f"Run {BOUND}; or start consumers with allow_unbounded_wal=True.",
        )
    return warn(
        "the server keeps the log for a consumer that is away until its disk is full",
        f"Run {BOUND}; or start consumers with allow_unbounded_wal=True.",
    )


def _slots(
    cursor: Cursor,
    slots: Mapping[str, SlotState],
    readers: Sequence[_Reader],
    bounds: _Bounds,
    inactive_seconds: float,
) -> Outcome:
    cursor.execute("SELECT pg_catalog.current_database()")
    [(database,)] = cursor.fetchall()
    left = dict(slots)
    bad: list[Outcome] = []
    for reader in readers:
        slot = left.pop(slot_name(database, reader.name), None)
        outcome = _slot(cursor, reader, slot, bounds, inactive_seconds)
        if outcome[0] != OK:
            bad.append(outcome)
    streams = left.pop(streams_slot(database), None)
    if streams is not None and (outcome := _streams(streams, bounds))[0] != OK:
        bad.append(outcome)
    bad += [
        warn(
            f"no consumer reads the slot {name}, which keeps {size_text(slot.retained_bytes)}",
            f"Run {dropping(name)};",
        )
        for name, slot in left.items()
        if not slot.active
    ]
    if not bad:
        return ok(f"{len(readers)} consumers, none of whose slots is late")
    level = FAIL if any(each[0] == FAIL for each in bad) else WARN
    return level, "; ".join(each[1] for each in bad), " ".join(dict.fromkeys(b[2] for b in bad))


def _streams(slot: SlotState, bounds: _Bounds) -> Outcome:
    """Look at the slot by which browsers that come back find what they have missed."""
    if slot.invalidation or slot.status == "lost":
        return warn(
            "the server has given up the slot of streams to browsers "
            f"({slot.invalidation or 'lost'}): those that were away get a gap",
            f"The next process that streams makes it anew; else run {dropping(slot.name)};",
        )
    if _share_used(slot, bounds) < SHARE_WARNING and slot.retained_bytes < RETAINED_WARNING:
        return ok("")
    return warn(
        f"the server keeps {size_text(slot.retained_bytes)} for streams to browsers",
        "Where a process streams, a transaction has lasted long, or no process has moved the slot "
        f"on; where none does, run {dropping(slot.name)};",
    )


def _slot(
    cursor: Cursor,
    reader: _Reader,
    slot: SlotState | None,
    bounds: _Bounds,
    inactive_seconds: float,
) -> Outcome:
    name = reader.name
    drop = f"`pgsignals consumers drop {name}` if nobody needs it"
    if slot is None:
        return fail(
            f"the slot of {name!r} is gone: it has lost what came since "
            f"{reader.acknowledged_at:%Y-%m-%d %H:%M:%S%z}, and will get a Gap",
            f"Start its process, which makes another one, or run {drop}.",
        )
    if slot.invalidation or slot.status == "lost":
        why = slot.invalidation or "lost"
        fix = f"Start its process, which makes another one, or run {drop}."
        if why in _KEEPING:
            fix += f" So that it does not come again, keep more: ALTER SYSTEM SET {_KEEPING[why]}."
        return fail(f"the server has given up the slot of {name!r} ({why}): it will get a Gap", fix)
    if slot.begins is None:
        return fail(
            f"the slot of {name!r} is being made, and until then nothing is delivered: that waits "
            "for transactions that are writing, in whatever database: "
            f"{in_the_way(_executing(cursor))}",
            "Commit them, or end them with pg_terminate_backend or ROLLBACK PREPARED.",
        )
    if slot.begins > reader.lsn:
        return fail(
            f"the slot of {name!r} begins behind what it has read, since somebody has moved it or "
            "it was made anew: it will get a Gap",
            "Start its process, if it does not run.",
        )
    share = _share_used(slot, bounds)
    late = share >= SHARE_WARNING or (
        bounds.bytes is None and slot.retained_bytes >= RETAINED_WARNING
    )
    idle = not slot.active and reader.quiet >= inactive_seconds
    if not late and not idle:
        return ok("")
    message = f"{name!r} is behind: the server keeps {size_text(slot.retained_bytes)} for it"
    if slot.safe_bytes is not None:
        message += f", and gives it up after {size_text(max(0, slot.safe_bytes))} more"
    if not slot.active:
        message += f"; nobody reads it since {time_text(round(reader.quiet))}"
    if slot.safe_seconds is not None:
        message += f", and the server gives it up in {time_text(max(0, round(slot.safe_seconds)))}"
    holder = _oldest_transaction(cursor) if slot.active else ""
    if not slot.active:
        fix = f"Start its process, or run {drop}."
    elif holder:
        fix = f"End the transaction that has lasted longest: {holder}."
    else:
        fix = "Make its receivers quicker, or keep more with max_slot_wal_keep_size."
    return FAIL if share >= SHARE_FAILURE else WARN, message, fix


def _executing(cursor: Cursor) -> Execute:
    def execute(statement: str, parameters: Sequence[object]) -> Sequence[tuple[Any, ...]]:
        cursor.execute(statement, parameters)
        return cursor.fetchall()

    return execute


def _share_used(slot: SlotState, bounds: _Bounds) -> float:
    """Return how much of what the server grants a slot is used up, of bytes or of time."""
    shares = [0.0]
    if bounds.bytes:
        shares.append(slot.retained_bytes / bounds.bytes)
        if slot.safe_bytes is not None:
            shares.append(1 - slot.safe_bytes / bounds.bytes)
    if bounds.idle_seconds is not None and slot.safe_seconds is not None:
        shares.append(1 - slot.safe_seconds / bounds.idle_seconds)
    return max(shares)


def _oldest_transaction(cursor: Cursor) -> str:
    """Return who holds back every slot: a transaction that has written something, anywhere."""
    cursor.execute(
        "SELECT pid, coalesce(nullif(application_name, ''), 'unnamed'), state"
        " FROM pg_catalog.pg_stat_activity WHERE backend_xid IS NOT NULL"
        " AND xact_start < pg_catalog.clock_timestamp() - %s::interval"
        " AND pid <> pg_catalog.pg_backend_pid() ORDER BY xact_start LIMIT 1",
        (OLD_TRANSACTION,),
    )
    for pid, name, state in cursor.fetchall():
        return f"SELECT pg_terminate_backend({pid}) ends it ({name}, {state})"
    cursor.execute("SELECT gid FROM pg_catalog.pg_prepared_xacts ORDER BY prepared LIMIT 1")
    for (gid,) in cursor.fetchall():
        return f"ROLLBACK PREPARED {gid!r}"
    return ""


_ALTERED = """
SELECT pubname, puballtables, pubinsert AND pubtruncate AND pubviaroot
    AND (pubupdate AND pubdelete) = (pubname = %(all)s)
    AND (pubupdate OR pubdelete) = (pubname = %(all)s)
FROM pg_catalog.pg_publication WHERE pubname IN (%(all)s, %(inserts)s)
"""
# By to_jsonb(), a column that this version lacks is NULL.
_LISTED = """
SELECT p.pubname, r.prrelid::pg_catalog.regclass::text
FROM pg_catalog.pg_publication AS p JOIN pg_catalog.pg_publication_rel AS r ON r.prpubid = p.oid
CROSS JOIN LATERAL (SELECT pg_catalog.to_jsonb(r.*) AS columns) AS j
WHERE p.pubname IN (%(all)s, %(inserts)s)
  AND (j.columns OPERATOR(pg_catalog.->>) 'prattrs' IS NOT NULL
       OR j.columns OPERATOR(pg_catalog.->>) 'prqual' IS NOT NULL)
"""
_PUBLISH = {
    PUBLICATION: "insert, update, delete, truncate",
    INSERTS_PUBLICATION: "insert, truncate",
}


def _publications(cursor: Cursor, needed: bool) -> Outcome:
    names = {"all": PUBLICATION, "inserts": INSERTS_PUBLICATION}
    cursor.execute(_ALTERED, names)
    found = {name: (whole, well) for name, whole, well in cursor.fetchall()}
    if missing := _PUBLISH.keys() - found.keys():
        listed = " and ".join(sorted(missing))
        if not needed:
            return warn(
                f"there is no publication {listed} yet",
                "Run `pgsignals install --delivery wal` with your watchers; start() does so itself "
                'unless install= is "check" or "off".',
            )
        return fail(
            f"the publication {listed} is gone, and the log cannot be read without",
            "Run `pgsignals install --delivery wal` with your watchers, or restart the application "
            "that has them.",
        )
    for name, (whole, well) in found.items():
        if whole:
            return fail(
                f"the publication {name} publishes all tables",
                f"Run DROP PUBLICATION {name}; and then `pgsignals install --delivery wal` with "
                "your watchers.",
            )
        if not well:
            return fail(
                f"somebody has changed the publication {name}",
                f"Run ALTER PUBLICATION {name} SET (publish = '{_PUBLISH[name]}', "
                "publish_via_partition_root = true);",
            )
    cursor.execute(_LISTED, names)
    for name, table in cursor.fetchall():
        return fail(
            f"the publication {name} has {table} with a column list or a filter, which are not "
            "ours and can make statements fail",
            f"Run ALTER PUBLICATION {name} DROP TABLE ONLY {table}; and then `pgsignals install "
            "--delivery wal` with your watchers.",
        )
    return ok("they are there")


# From PostgreSQL 18 on, a publication may have stored columns that the table computes.
_UNPUBLISHED = (
    "g.attgenerated = 'v' OR g.attgenerated = 's' AND"
    " pg_catalog.to_jsonb(p) ->> 'pubgencols' IS DISTINCT FROM 's'"
)

# A table is named that is published with its updates, and whose old rows the log could not name:
# PostgreSQL refuses these statements to everybody. ``ours`` comes first, to be told first.
_UNIDENTIFIED = f"""
SELECT DISTINCT p.pubname = %(ours)s AS ours, p.pubname::text,
    leaf.relid::pg_catalog.regclass::text, member.relid::pg_catalog.regclass::text
FROM pg_catalog.pg_publication AS p
CROSS JOIN LATERAL pg_catalog.pg_get_publication_tables(p.pubname::text) AS member
CROSS JOIN LATERAL (
    SELECT relid FROM pg_catalog.pg_partition_tree(member.relid) WHERE isleaf
    UNION SELECT member.relid) AS leaf
JOIN pg_catalog.pg_class AS c ON c.oid = leaf.relid AND c.relkind = 'r'
JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
WHERE (p.pubupdate OR p.pubdelete) AND NOT ({has_identity(_UNPUBLISHED)})
  AND (p.pubname = %(ours)s OR leaf.relid = ANY (%(watched)s::pg_catalog.oid[])
       OR member.relid = ANY (%(watched)s::pg_catalog.oid[])
       OR pg_catalog.concat(n.nspname, '.', c.relname) = ANY (%(named)s::text[]))
ORDER BY 1 DESC, 2, 3
"""


def _identities(cursor: Cursor, watched: set[int], named: set[tuple[str, str]]) -> Outcome:
    cursor.execute(
        _UNIDENTIFIED,
        {
            "ours": PUBLICATION,
            "watched": list(watched),
            "named": [f"{schema}.{table}" for schema, table in named],
        },
    )
    bad, fixes = [], []
    for ours, publication, table, member in cursor.fetchall():
        if ours:
            bad.append(
                f"UPDATE and DELETE of {table} fail, since it is published and has lost its key, "
                "or has a computed column in its replica identity"
            )
            fixes.append(
                f"Give it a key again, or run ALTER PUBLICATION {publication} DROP TABLE ONLY "
                f"{member}; a running consumer does so by itself, and a restart serves it by "
                "messages of a trigger."
            )
        else:
            bad.append(
                f"UPDATE and DELETE of {table} fail, since {publication!r}, which is not ours, "
                "publishes it without a replica identity, or without a computed column of that"
            )
            fixes.append(
                f"Give it a primary key (and REPLICA IDENTITY DEFAULT), run ALTER TABLE {table} "
                "REPLICA IDENTITY FULL; if it computes no column, or take it out of that "
                "publication."
            )
    if not bad:
        return ok("every published table has one")
    return fail("; ".join(bad), " ".join(fixes))


def _synchronous(cursor: Cursor) -> Outcome:
    cursor.execute(
        "SELECT coalesce('role ' || pg_catalog.quote_ident(r.rolname), 'all roles') ||"
        " coalesce(' in database ' || pg_catalog.quote_ident(d.datname), '')"
        " FROM pg_catalog.pg_db_role_setting s"
        " LEFT JOIN pg_catalog.pg_roles r ON r.oid = s.setrole"
        " LEFT JOIN pg_catalog.pg_database d ON d.oid = s.setdatabase"
        " WHERE 'synchronous_commit=off' = ANY (s.setconfig)"
        " AND (s.setdatabase = 0 OR d.datname = pg_catalog.current_database())"
    )
    found = [who for (who,) in cursor.fetchall()]
    if not found and _setting(cursor, "synchronous_commit") == "off":
        found = ["this server"]
    if not found:
        return ok("events come at once")
    delay = _setting(cursor, "wal_writer_delay")
    return warn(
        f"synchronous_commit is off for {', '.join(found)}: events of their writes come when the "
        f"log is flushed, after about {delay}",
        "Nothing is lost by it. For less, run ALTER SYSTEM SET wal_writer_delay = '10ms'; SELECT "
        "pg_reload_conf();",
    )


def _readers(cursor: Cursor) -> list[_Reader]:
    """Return the named consumers of the log; none where this role may not read of them."""
    cursor.execute(
        "SELECT coalesce(pg_catalog.has_schema_privilege(n.oid, 'USAGE')"
        " AND pg_catalog.has_table_privilege(c.oid, 'SELECT'), false)"
        " FROM pg_catalog.pg_namespace n"
        " JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = 'consumers'"
        " JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attname = 'lsn'"
        " WHERE n.nspname = 'pgsignals'"
    )
    if cursor.fetchall() != [(True,)]:
        return []
    cursor.execute(
        "SELECT name, lsn, acknowledged_at, extract(epoch FROM pg_catalog.clock_timestamp()"
        " - acknowledged_at)::float8 FROM pgsignals.consumers"
        " WHERE NOT ephemeral AND epoch LIKE '%-wal/%' ORDER BY 1"
    )
    return [_Reader(*row) for row in cursor.fetchall()]


def _setting(cursor: Cursor, name: str) -> str:
    cursor.execute("SELECT pg_catalog.current_setting(%s)", (name,))
    [(found,)] = cursor.fetchall()
    return str(found)


def _number(cursor: Cursor, name: str) -> int:
    """Return a setting in its own unit; 0 where the server does not know it."""
    cursor.execute("SELECT setting::bigint FROM pg_catalog.pg_settings WHERE name = %s", (name,))
    return int(sum(found for (found,) in cursor.fetchall()))
