"""The schema ``pgsignals``, in which durable delivery keeps all that it keeps, and its upgrades.

The outbox is a ring of segments, the partitions of a table. Writers insert into the current
segment. A segment that every consumer has read is emptied by TRUNCATE, which locks that segment
alone: detaching or dropping it would lock the whole outbox, and with it every writer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial

from psycopg2 import errors as pg
from psycopg2 import sql
from psycopg2.extensions import cursor as Cursor

from ..consumers.schema import NAME as NAME
from ..consumers.schema import TABLES
from ..core.errors import DatabaseError, DriftError, PrivilegeError
from ..core.logging import log
from ..triggers import fingerprint, names
from ..triggers.installer import DEFAULT_LIMITS, Limits, in_install_lock

VERSION = 2
SEGMENTS = 8

# By default unread events are kept for three days, and up to 4 GiB.
RETENTION_SECONDS = 3 * 24 * 3600
RETENTION_BYTES = 4 << 30

# Sixty random bits.
_SECRET = (
    "SELECT pg_catalog.setval('pgsignals.wal_secret',"
    " ('x' || pg_catalog.substr(pg_catalog.replace("
    "pg_catalog.gen_random_uuid()::text, '-', ''), 17))::bit(64)::bigint & ((1::bigint << 60) - 1))"
)

_CREATION = (
    "CREATE SCHEMA pgsignals",
    "CREATE SEQUENCE pgsignals.outbox_id",
    # Set to 1 by a writer that finds the outbox full while no consumer lives, and later back to 0.
    "CREATE SEQUENCE pgsignals.outbox_full MINVALUE 0",
    f"CREATE SEQUENCE pgsignals.outbox_segment MINVALUE 0 MAXVALUE {SEGMENTS - 1}",
    "CREATE SEQUENCE pgsignals.outbox_shed MINVALUE 0",
    "SELECT pg_catalog.setval('pgsignals.outbox_id', 1),"
    " pg_catalog.setval('pgsignals.outbox_segment', 0),"
    " pg_catalog.setval('pgsignals.outbox_full', 0),"
    " pg_catalog.setval('pgsignals.outbox_shed', 0)",
    # The secret by which readers of the write-ahead log know messages of our triggers: only their
    # owners may read its value.
    "CREATE SEQUENCE pgsignals.wal_secret MINVALUE 0",
    _SECRET,
    """CREATE TABLE pgsignals.outbox (
  id bigint NOT NULL,
  txid bigint NOT NULL,
  channel bigint NOT NULL,
  relation oid NOT NULL,
  segment smallint NOT NULL,
  payload text NOT NULL
) PARTITION BY LIST (segment)""",
    "ALTER TABLE pgsignals.outbox ALTER COLUMN payload SET STORAGE EXTERNAL",
    "CREATE INDEX outbox_id_idx ON pgsignals.outbox (id)",
    *(
        # The target keeps a message that fills a page out of TOAST. Autovacuum has nothing to do:
        # rows are only inserted, and go by TRUNCATE.
        f"""CREATE TABLE pgsignals.outbox_{segment}
  PARTITION OF pgsignals.outbox FOR VALUES IN ({segment})
  WITH (autovacuum_enabled = off, toast.autovacuum_enabled = off, toast_tuple_target = 8160)"""
        for segment in range(SEGMENTS)
    ),
    """CREATE TABLE pgsignals.settings (
  one boolean PRIMARY KEY DEFAULT true CHECK (one),
  retention_seconds double precision NOT NULL,
  retention_bytes bigint NOT NULL,
  keep_seconds double precision,
  token_key uuid NOT NULL DEFAULT pg_catalog.gen_random_uuid()
)""",
    f"INSERT INTO pgsignals.settings VALUES (true, {RETENTION_SECONDS}, {RETENTION_BYTES})",
    """CREATE TABLE pgsignals.segments (
  segment smallint PRIMARY KEY,
  opened_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
  emptied_id bigint,
  emptied_snapshot text
)""",
    "INSERT INTO pgsignals.segments VALUES (0)",
    # Unlogged, so that a crash empties it and ends all resume tokens: after a crash the number of a
    # transaction that a token saw ended may be given to another.
    """CREATE UNLOGGED TABLE pgsignals.era (
  one boolean PRIMARY KEY DEFAULT true CHECK (one),
  era uuid NOT NULL DEFAULT pg_catalog.gen_random_uuid()
)""",
    # ``since`` and ``made`` are ids of the outbox: a channel became its watcher's at the one, and
    # its triggers were last made at the other.
    """CREATE TABLE pgsignals.channels (
  channel bigint PRIMARY KEY,
  since bigint NOT NULL,
  made bigint NOT NULL,
  definition text NOT NULL
)""",
    # The tables whose rows a channel has; of a table with ``until``, only the rows with lower ids.
    """CREATE TABLE pgsignals.relations (
  channel bigint NOT NULL,
  relation oid NOT NULL,
  until bigint,
  PRIMARY KEY (channel, relation)
)""",
    *TABLES,
    # Writers ask this while no consumer lives, since then nobody keeps the outbox within bounds.
    # The size of a segment that somebody has locked cannot be read, and a writer must not wait for
    # it. A restored schema may have no settings.
    """CREATE FUNCTION pgsignals.has_room() RETURNS boolean LANGUAGE plpgsql STABLE
  SET search_path TO pg_catalog, pg_temp
  SET lock_timeout TO '50ms'
AS $$
BEGIN
  RETURN """
    + " + ".join(
        f"pg_total_relation_size('pgsignals.outbox_{segment}'::regclass)"
        for segment in range(SEGMENTS)
    )
    + f"""
    < coalesce((SELECT retention_bytes FROM pgsignals.settings), {RETENTION_BYTES});
EXCEPTION WHEN lock_not_available THEN
  RETURN true;
END
$$""",
    "REVOKE ALL ON FUNCTION pgsignals.has_room() FROM PUBLIC",
    # One statement with one plan, so that a trigger's function can try it without a row before it
    # depends on it: see triggers/bodies/outbox.py.
    """CREATE FUNCTION pgsignals.put(bigint, bigint, bigint, oid, bigint, text, boolean)
  RETURNS boolean LANGUAGE plpgsql
AS $$
BEGIN
  INSERT INTO pgsignals.outbox (id, txid, channel, relation, segment, payload)
    SELECT $1, $2, $3, $4, $5, $6 WHERE $7;
  RETURN true;
END
$$""",
    "REVOKE ALL ON FUNCTION pgsignals.put(bigint, bigint, bigint, oid, bigint, text, boolean)"
    " FROM PUBLIC",
)

_SEQUENCES = ("outbox_id", "outbox_segment", "outbox_full", "outbox_shed", "wal_secret")

# The most milliseconds for which writers may queue behind an upgrade that waits for the outbox.
_WRITERS_WAIT = 20


@dataclass(frozen=True)
class Upgrade:
    """The step to a ``version`` of the schema from the one before it; the first step makes it.

    Programs from the version ``oldest`` on can start and work with the new schema: all that they
    know is unchanged, and what they leave out has a default. ``statements`` may lock what consumers
    use. Those of ``outbox`` lock what writers write to, and come last, since writers wait from the
    first of them to the end.
    """

    version: int
    oldest: int
    statements: tuple[str, ...]
    outbox: tuple[str, ...] = ()

    @property
    def comment(self) -> str:
        """The comment of the schema, which tells programs its version."""
        return f"{_OURS}, version {self.version}, for programs from {self.oldest} on"

    def run_from(self, version: int) -> list[str]:
        """Return the statements of the step, for one transaction; ``version`` 0: no schema yet."""
        comment = f"COMMENT ON SCHEMA {NAME} IS '{self.comment}'"
        if not version:
            return [*self.statements, *self.outbox, comment]
        return [*_BEFORE, *self.statements, *_patiently(self.outbox), comment, _AFTER]


_OURS = "pgsignals: durable delivery"
_COMMENT = f"^{_OURS}, version ([0-9]+)(?:, for programs from ([0-9]+) on)?$"

# An upgrade alters the outbox, and with it the fingerprint that consumers keep, which the upgrade
# therefore replaces. Otherwise consumers would announce that somebody had changed the outbox.
_RIGHTS = f"({fingerprint.TARGET})"
_BEFORE = (
    # Wait for consumers here, while no writer waits behind us yet.
    f"LOCK TABLE {NAME}.consumers IN SHARE ROW EXCLUSIVE MODE",
    f"SELECT pg_catalog.set_config('{NAME}.rights', {_RIGHTS}, true)",
)
_AFTER = (
    f"UPDATE {NAME}.consumers SET installation = pg_catalog.replace(installation,"
    f" pg_catalog.current_setting('{NAME}.rights'), {_RIGHTS})"
)


def _patiently(statements: tuple[str, ...]) -> list[str]:
    """Return the statements on the outbox, which give up soon while a writer's transaction goes on.

    Otherwise a writer that waits could be cancelled by its statement_timeout, or lose its events by
    its lock_timeout.
    """
    if not statements:
        return []
    kept = f"'{NAME}.step_lock_timeout'"
    return [
        f"SELECT pg_catalog.set_config({kept}, pg_catalog.current_setting('lock_timeout'), true)",
        f"SELECT pg_catalog.set_config('lock_timeout', '{_WRITERS_WAIT}ms', true)",
        f"LOCK TABLE {NAME}.outbox IN ACCESS EXCLUSIVE MODE",
        *statements,
        f"SELECT pg_catalog.set_config('lock_timeout', pg_catalog.current_setting({kept}), true)",
    ]


# Version 1 was never released, and has no step that leads on from it.
UPGRADES: tuple[Upgrade, ...] = (Upgrade(2, 2, _CREATION),)


@dataclass(frozen=True)
class Found:
    """A schema of ours: its version, and the ``oldest`` version of programs that can work with it.

    ``oldest`` is None for a schema from before the first release, which does not say.
    """

    version: int
    oldest: int | None

    @property
    def usable(self) -> bool:
        """Whether this program can work with the schema, or upgrade it."""
        return self.oldest is not None and self.oldest <= VERSION


def find_schema(cursor: Cursor) -> Found | None:
    """Return the schema in this database, of whatever version; None without one.

    Raises DatabaseError for a schema of that name which is not ours.
    """
    cursor.execute(
        "SELECT coalesce(pg_catalog.obj_description(oid, 'pg_namespace'), '')"
        " FROM pg_catalog.pg_namespace WHERE nspname = %s",
        (NAME,),
    )
    row = cursor.fetchone()
    if row is None:
        return None
    said = re.match(_COMMENT, row[0])
    if said is None:
        raise DatabaseError(
            f"There is a schema {NAME!r} that pgsignals did not make: it carries no comment of "
            "ours, so it is left alone. Rename it; durable delivery needs the name."
        )
    return Found(int(said[1]), None if said[2] is None else int(said[2]))


def read_version(cursor: Cursor) -> int:
    """Return the version of the schema in this database, which may be a newer one; 0 without one.

    Raises DatabaseError for a schema of that name which is not ours, or which this program can
    neither work with nor upgrade.
    """
    found = find_schema(cursor)
    if found is None:
        return 0
    if found.oldest is None:
        raise DatabaseError(
            f"The schema {NAME!r} has version {found.version}, from before the first release, and "
            "nothing leads on from there. Stop the programs that use it; run `pgsignals uninstall "
            "--schema`, which removes it with its consumers, its events and the triggers that "
            "write to it; then `pgsignals install --delivery outbox` (or wal) with your watchers, "
            "or start the application."
        )
    if not found.usable:
        raise DatabaseError(
            f"The schema {NAME!r} has version {found.version}, for programs from {found.oldest} "
            f"on, and this one is of version {VERSION}. Start the newer pgsignals again, which "
            "upgraded it. To go back for good, giving up what has not been read, run `pgsignals "
            "uninstall --schema` and then `pgsignals install --delivery outbox` (or wal)."
        )
    return found.version


def _pending(version: int) -> list[Upgrade]:
    return [step for step in UPGRADES if step.version > version]


def upgrade_statements(version: int) -> list[str]:
    """Return the SQL from ``version`` to the current one; none from that, or from a newer one."""
    return [statement for step in _pending(version) for statement in step.run_from(version)]


def ensuring_statement() -> str:
    """Return one statement that leads from any version of the schema to the current one.

    Migrations use it: they are written long before they run, on databases that may have the schema
    already, or a newer one, which is left alone.
    """
    lines = []
    first, *later = UPGRADES
    for step, version in [(first, 0), *((step, step.version - 1) for step in later)]:
        lines.append(f"  IF version < {step.version} THEN")
        lines += [f"    EXECUTE $step${statement}$step$;" for statement in step.run_from(version)]
        lines.append("  END IF;")
    return "\n".join(
        (
            "DO $pgsignals$ DECLARE",
            "  comment text := (",
            "    SELECT coalesce(pg_catalog.obj_description(oid, 'pg_namespace'), '')",
            f"    FROM pg_catalog.pg_namespace WHERE nspname = '{NAME}');",
            f"  said text[] := pg_catalog.regexp_match(comment, '{_COMMENT}');",
            "  version int := coalesce(said[1]::int, 0);",
            "BEGIN",
            "  IF comment IS NOT NULL AND said IS NULL THEN",
            f"    RAISE EXCEPTION 'there is a schema {NAME} that pgsignals did not make';",
            "  END IF;",
            f"  IF version > 0 AND coalesce(said[2]::int > {VERSION}, true) THEN",
            f"    RAISE EXCEPTION 'the schema {NAME} has version %, with which version {VERSION} of"
            " pgsignals cannot work', version",
            "      USING HINT = 'Run pgsignals doctor, which says what to do.';",
            "  END IF;",
            *lines,
            "END $pgsignals$",
        )
    )


_LEFT_OUT = """
SELECT pg_catalog.concat_ws(', ',
  (SELECT 'the settings' WHERE NOT EXISTS (SELECT FROM pgsignals.settings)),
  (SELECT 'the segments'' times' WHERE NOT EXISTS (SELECT FROM pgsignals.segments)),
  (SELECT pg_catalog.string_agg('the value of ' || c.relname, ', ' ORDER BY c.relname)
   FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
   WHERE n.nspname = 'pgsignals' AND c.relname = ANY (%s)
     -- PostgreSQL may ask this first, and it is an error for a table.
     AND CASE c.relkind WHEN 'S' THEN pg_catalog.pg_sequence_last_value(c.oid) IS NULL END))
"""

# The sequence goes on above all ids in use: from 1 it would give out those of restored rows again.
_PUT_BACK = (
    f"INSERT INTO pgsignals.settings VALUES (true, {RETENTION_SECONDS}, {RETENTION_BYTES})"
    " ON CONFLICT DO NOTHING",
    "SELECT pg_catalog.setval('pgsignals.outbox_id', greatest(1,"
    " (SELECT pg_catalog.max(id) FROM pgsignals.outbox),"
    " (SELECT pg_catalog.max(made) FROM pgsignals.channels),"
    " (SELECT pg_catalog.max(greatest(floor, last_id)) FROM pgsignals.consumers)))"
    " WHERE pg_catalog.pg_sequence_last_value('pgsignals.outbox_id') IS NULL",
    *(
        f"SELECT pg_catalog.setval('pgsignals.{name}', 0)"
        f" WHERE pg_catalog.pg_sequence_last_value('pgsignals.{name}') IS NULL"
        for name in ("outbox_segment", "outbox_full", "outbox_shed")
    ),
    f"{_SECRET} WHERE pg_catalog.pg_sequence_last_value('pgsignals.wal_secret') IS NULL",
    "INSERT INTO pgsignals.segments SELECT last_value FROM pgsignals.outbox_segment"
    " ON CONFLICT DO NOTHING",
)


_MAKES = r"CREATE (?:UNLOGGED )?(?:TABLE|SEQUENCE) pgsignals\.(\w+)"


def relations() -> set[str]:
    """Return the names of the tables and sequences that this version knows."""
    return {
        name
        for step in UPGRADES
        for statement in (*step.statements, *step.outbox)
        for name in re.findall(_MAKES, statement)
    }


def left_out(cursor: Cursor) -> str:
    """Name the contents that a dump has left out of the schema; empty if it is complete.

    Raises DatabaseError if it lacks a table.
    """
    cursor.execute(
        "SELECT c.relname FROM pg_catalog.pg_class c"
        " JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = %s",
        (NAME,),
    )
    if lacking := relations() - {name for (name,) in cursor.fetchall()}:
        raise DatabaseError(
            f"The schema {NAME!r} lacks {', '.join(sorted(lacking))}: it comes from a dump that "
            f"left tables out. Run DROP SCHEMA {NAME} CASCADE, then `pgsignals install --delivery "
            "outbox`."
        )
    try:
        cursor.execute(_LEFT_OUT, (list(_SEQUENCES),))
    except pg.InsufficientPrivilege:
        # A role that only installs triggers may not look, and could put nothing back.
        return ""
    [(found,)] = cursor.fetchall()
    return str(found)


def install_schema(cursor: Cursor, limits: Limits = DEFAULT_LIMITS) -> bool:
    """Make, upgrade or complete the schema; return whether there was anything to do.

    Each step is a transaction; the cursor's connection must be in autocommit mode. Raises
    PrivilegeError, DatabaseError.
    """
    version = read_version(cursor)
    if version >= VERSION:
        if not (lacking := left_out(cursor)):
            return False
        in_install_lock(cursor, limits, NAME, None, lambda: cursor.execute(";\n".join(_PUT_BACK)))
        log.warning(
            "the schema %s came from a dump that left something out, which has been put back: %s",
            NAME,
            lacking,
        )
        return True
    if not version:
        _check_privilege(cursor)
    for step in _pending(version):
        # A transaction for each step: one for all would hold each step's locks until the last.
        if in_install_lock(cursor, limits, NAME, None, partial(_apply, cursor, step)):
            log.info("the schema %s now has version %d", NAME, step.version)
    return True


def _apply(cursor: Cursor, step: Upgrade) -> bool:
    """Take one step, unless another process has by now; return whether it was taken."""
    version = read_version(cursor)
    if version >= step.version:
        return False
    if 0 < version < step.oldest and (readers := live_readers(cursor)):
        raise DatabaseError(
            f"The schema {NAME!r} has version {version}, and in version {step.version} it is "
            f"for programs from {step.oldest} on; older ones read the outbox in {readers} of the "
            "sessions. Stop those programs, then try again: the events of named consumers wait."
        )
    # All in one message, so that writers wait for no round trips while we hold the outbox.
    cursor.execute(";\n".join(step.run_from(version)))
    return True


def check_schema(cursor: Cursor, delivery: str = "outbox") -> None:
    """Raise DriftError unless the schema is there, in the current version or a newer one."""
    if (version := read_version(cursor)) < VERSION:
        state = f"in version {version}, and needs {VERSION}" if version else "missing"
        raise DriftError(
            f'install="check" found the schema {NAME!r}, which durable delivery needs, {state}. '
            f"Run `pgsignals install --delivery {delivery}` as the tables' owner, or apply what "
            f"`pgsignals sql --delivery {delivery}` prints."
        )
    if lacking := left_out(cursor):
        raise DriftError(
            f'install="check" found that the schema {NAME!r} comes from a dump that left something '
            f"out: {lacking}. Run `pgsignals install --delivery {delivery}` as the tables' owner."
        )


def live_readers(cursor: Cursor) -> int:
    """Count the sessions that read the outbox or stand by to, of programs of whatever version."""
    cursor.execute(
        "SELECT pg_catalog.count(*) FROM pg_catalog.pg_locks WHERE locktype = 'advisory'"
        " AND classid = %s AND objid = %s AND objsubid = 2 AND mode = 'ShareLock' AND granted"
        " AND database = (SELECT oid FROM pg_catalog.pg_database"
        " WHERE datname = pg_catalog.current_database())",
        (names.LOCK_CLASS, names.ALIVE_LOCK),
    )
    [(count,)] = cursor.fetchall()
    return int(count)


def _check_privilege(cursor: Cursor) -> None:
    cursor.execute(
        "SELECT pg_catalog.has_database_privilege(pg_catalog.current_database(), 'CREATE'),"
        " current_user, pg_catalog.current_database()"
    )
    row = cursor.fetchone()
    assert row is not None
    allowed, role, database = row
    if not allowed:
        grant = sql.SQL("GRANT CREATE ON DATABASE {} TO {}").format(
            sql.Identifier(database), sql.Identifier(role)
        )
        raise PrivilegeError(
            f"The role {role!r} may not create the schema {NAME!r}, which durable delivery needs. "
            "Run `pgsignals install --delivery outbox` (or wal) as a role that may and start with "
            f'install="check", or have the owner run: {grant.as_string(cursor)}.'
        )
