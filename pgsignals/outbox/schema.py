"""The schema ``pgsignals``: what durable delivery keeps in the database, and its upgrades.

The outbox is a ring of partitions. Writers insert into the current one, and one that every consumer
has read is emptied by TRUNCATE, which locks that partition alone: detaching or dropping one would
lock the whole outbox, and with it every writer.
"""

from __future__ import annotations

import logging

from psycopg2 import sql
from psycopg2.extensions import cursor as Cursor

from ..errors import DatabaseError, DriftError, PrivilegeError
from ..triggers.installer import DEFAULT_LIMITS, Limits, in_install_lock

log = logging.getLogger("pgsignals")

NAME = "pgsignals"
VERSION = 1
SLOTS = 8
WAKE_CHANNEL = "pgsignals_wake"

# By default what nobody has fetched is kept for three days, or up to 4 GiB.
RETENTION_SECONDS = 3 * 24 * 3600
RETENTION_BYTES = 4 << 30

_VERSION_1 = (
    "CREATE SCHEMA pgsignals",
    "CREATE SEQUENCE pgsignals.outbox_id",
    # Set to 1 by a writer that finds the outbox full while no consumer lives, and back to 0.
    "CREATE SEQUENCE pgsignals.outbox_full MINVALUE 0",
    f"CREATE SEQUENCE pgsignals.outbox_slot MINVALUE 0 MAXVALUE {SLOTS - 1}",
    "CREATE SEQUENCE pgsignals.outbox_shed MINVALUE 0",
    "SELECT pg_catalog.setval('pgsignals.outbox_id', 1),"
    " pg_catalog.setval('pgsignals.outbox_slot', 0), pg_catalog.setval('pgsignals.outbox_full', 0),"
    " pg_catalog.setval('pgsignals.outbox_shed', 0)",
    """CREATE TABLE pgsignals.outbox (
  id bigint NOT NULL,
  txid bigint NOT NULL,
  channel bigint NOT NULL,
  slot smallint NOT NULL,
  payload text NOT NULL
) PARTITION BY LIST (slot)""",
    "ALTER TABLE pgsignals.outbox ALTER COLUMN payload SET STORAGE EXTERNAL",
    "CREATE INDEX outbox_id_idx ON pgsignals.outbox (id)",
    *(
        # A message of many rows fills a page, and stays in it. There is nothing to vacuum.
        f"""CREATE TABLE pgsignals.outbox_{slot}
  PARTITION OF pgsignals.outbox FOR VALUES IN ({slot})
  WITH (autovacuum_enabled = off, toast.autovacuum_enabled = off, toast_tuple_target = 8160)"""
        for slot in range(SLOTS)
    ),
    """CREATE TABLE pgsignals.settings (
  one boolean PRIMARY KEY DEFAULT true CHECK (one),
  retention_seconds double precision NOT NULL,
  retention_bytes bigint NOT NULL,
  keep_seconds double precision,
  place_key uuid NOT NULL DEFAULT pg_catalog.gen_random_uuid()
)""",
    f"INSERT INTO pgsignals.settings VALUES (true, {RETENTION_SECONDS}, {RETENTION_BYTES})",
    """CREATE TABLE pgsignals.slots (
  slot smallint PRIMARY KEY,
  opened_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
  emptied_id bigint,
  emptied_snapshot text
)""",
    "INSERT INTO pgsignals.slots VALUES (0)",
    # Empty after a crash, which may take back the numbers of transactions that were seen to end.
    """CREATE UNLOGGED TABLE pgsignals.era (
  one boolean PRIMARY KEY DEFAULT true CHECK (one),
  era uuid NOT NULL DEFAULT pg_catalog.gen_random_uuid()
)""",
    """CREATE TABLE pgsignals.channels (
  channel bigint PRIMARY KEY,
  since bigint NOT NULL,
  definition text NOT NULL
)""",
    """CREATE TABLE pgsignals.consumers (
  name text NOT NULL,
  part int NOT NULL,
  parts int NOT NULL,
  ephemeral boolean NOT NULL,
  snapshot text NOT NULL,
  target text,
  last_id bigint NOT NULL DEFAULT 0,
  floor bigint NOT NULL,
  shed bigint NOT NULL,
  lost_until timestamptz,
  epoch text NOT NULL,
  channels bigint[] NOT NULL DEFAULT '{}',
  holder text,
  token bigint NOT NULL DEFAULT 0,
  lease_until timestamptz,
  clean boolean NOT NULL DEFAULT true,
  acknowledged bigint NOT NULL DEFAULT 0,
  acknowledged_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
  PRIMARY KEY (name, part)
) WITH (fillfactor = 50)""",
    """CREATE TABLE pgsignals.members (
  name text NOT NULL,
  holder text NOT NULL,
  until timestamptz NOT NULL,
  PRIMARY KEY (name, holder)
)""",
    """CREATE TABLE pgsignals.dead_letters (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  consumer text NOT NULL,
  receiver text NOT NULL,
  uid text NOT NULL,
  channel bigint NOT NULL,
  number int NOT NULL,
  payload text NOT NULL,
  error text NOT NULL,
  traceback text NOT NULL,
  attempts int NOT NULL,
  at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
  retry boolean NOT NULL DEFAULT false,
  UNIQUE (consumer, receiver, uid)
)""",
    """CREATE TABLE pgsignals.processed (
  scope text NOT NULL,
  uid text NOT NULL,
  at timestamptz NOT NULL DEFAULT pg_catalog.now(),
  PRIMARY KEY (scope, uid)
)""",
    """CREATE TABLE pgsignals.backfills (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  consumer text NOT NULL,
  schema_name text NOT NULL,
  table_name text NOT NULL,
  label text,
  model text,
  condition text,
  search_path text NOT NULL,
  chunk int NOT NULL,
  total bigint NOT NULL,
  state text NOT NULL DEFAULT 'running',
  error text,
  started_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
  changed_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp()
)""",
    # Each part of the consumer goes through the whole table, and delivers what is its own.
    """CREATE TABLE pgsignals.backfill_parts (
  backfill bigint NOT NULL REFERENCES pgsignals.backfills ON DELETE CASCADE,
  part int NOT NULL,
  last_key text[],
  done bigint NOT NULL DEFAULT 0,
  delivered bigint NOT NULL DEFAULT 0,
  finished boolean NOT NULL DEFAULT false,
  changed_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
  PRIMARY KEY (backfill, part)
) WITH (fillfactor = 50)""",
    # Asked by writers while no consumer lives, so that nobody else keeps the outbox within bounds.
    """CREATE FUNCTION pgsignals.has_room() RETURNS boolean LANGUAGE sql STABLE
  SET search_path TO pg_catalog, pg_temp
AS $$
SELECT """
    + " + ".join(
        f"pg_total_relation_size('pgsignals.outbox_{slot}'::regclass)" for slot in range(SLOTS)
    )
    + " < retention_bytes FROM pgsignals.settings\n$$",
    "REVOKE ALL ON FUNCTION pgsignals.has_room() FROM PUBLIC",
)

# What leads from each version to the next; the first makes everything.
UPGRADES: tuple[tuple[str, ...], ...] = (_VERSION_1,)


def _comment(version: int) -> str:
    return f"pgsignals: durable delivery, version {version}"


def read_version(cursor: Cursor) -> int:
    """The version of the schema in this database; 0 without one.

    Raises DatabaseError for a schema of that name which is not ours, or newer than this code.
    """
    cursor.execute(
        "SELECT coalesce(pg_catalog.obj_description(oid, 'pg_namespace'), '')"
        " FROM pg_catalog.pg_namespace WHERE nspname = %s",
        (NAME,),
    )
    row = cursor.fetchone()
    if row is None:
        return 0
    prefix, _, number = row[0].rpartition(" ")
    if f"{prefix} " != _comment(0)[:-1] or not number.isdecimal():
        raise DatabaseError(
            f"There is a schema {NAME!r} that pgsignals did not make: it carries no comment of "
            "ours, so it is left alone. Rename it; outbox delivery needs the name."
        )
    version = int(number)
    if version > VERSION:
        raise DatabaseError(
            f"The schema {NAME!r} has version {version}, which a newer pgsignals made; this one "
            f"knows version {VERSION}. Upgrade this program."
        )
    return version


def upgrade_statements(cursor: Cursor, version: int) -> list[str]:
    """The SQL that leads from ``version`` to the current one; none when it is current."""
    found = [statement for step in UPGRADES[version:] for statement in step]
    if found:
        comment = sql.SQL("COMMENT ON SCHEMA pgsignals IS {}").format(
            sql.Literal(_comment(VERSION))
        )
        found.append(comment.as_string(cursor))
    return found


def ensuring_statement() -> str:
    """One statement that leads from any version to the current one, wherever and whenever it runs.

    For migrations: they are written long before they run, on databases that may have the schema
    already, or a newer one, which is left alone.
    """
    lines = []
    for version, step in enumerate(UPGRADES, 1):
        lines.append(f"  IF version < {version} THEN")
        for statement in (*step, f"COMMENT ON SCHEMA pgsignals IS '{_comment(version)}'"):
            lines.append(f"    EXECUTE $step${statement}$step$;")
        lines.append("  END IF;")
    return "\n".join(
        (
            "DO $pgsignals$ DECLARE",
            "  comment text := (",
            "    SELECT coalesce(pg_catalog.obj_description(oid, 'pg_namespace'), '')",
            f"    FROM pg_catalog.pg_namespace WHERE nspname = '{NAME}');",
            "  version int := 0;",
            "BEGIN",
            "  IF comment IS NOT NULL THEN",
            f"    version := pg_catalog.substring(comment, '^{_comment(0)[:-1]}([0-9]+)$');",
            "    IF version IS NULL THEN",
            f"      RAISE EXCEPTION 'there is a schema {NAME} that pgsignals did not make';",
            "    END IF;",
            "  END IF;",
            *lines,
            "END $pgsignals$",
        )
    )


def install_schema(cursor: Cursor, limits: Limits = DEFAULT_LIMITS) -> bool:
    """Make or upgrade the schema, in one transaction; whether there was anything to do.

    The cursor's connection is in autocommit mode. Raises PrivilegeError, DatabaseError.
    """
    if read_version(cursor) == VERSION:
        return False

    def apply() -> bool:
        statements = upgrade_statements(cursor, read_version(cursor))
        if statements:
            _check_privilege(cursor)
            cursor.execute(";\n".join(statements))
        return bool(statements)

    done = in_install_lock(cursor, limits, NAME, None, apply)
    if done:
        log.info("the schema %s now has version %d", NAME, VERSION)
    return done


def check_schema(cursor: Cursor) -> None:
    """Raise DriftError unless the schema is there in the current version."""
    if (version := read_version(cursor)) != VERSION:
        state = f"version {version}" if version else "missing"
        raise DriftError(
            f'install="check" found the schema {NAME!r}, which outbox delivery needs, {state}. Run '
            "`pgsignals install --delivery outbox` as the tables' owner, or apply what "
            "`pgsignals sql --delivery outbox` prints."
        )


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
            f"The role {role!r} may not create the schema {NAME!r}, which outbox delivery needs. "
            "Run `pgsignals install --delivery outbox` as a role that may and start with "
            f'install="check", or have the owner run: {grant.as_string(cursor)}.'
        )
