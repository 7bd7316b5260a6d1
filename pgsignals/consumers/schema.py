"""The tables of the schema ``pgsignals`` about consumers, whatever log they read."""

from __future__ import annotations

NAME = "pgsignals"
# How long a reader or housekeeper of a log waits for a part of it that somebody has locked. It is
# short, since a consumer that waits renews no claim and acknowledges nothing.
LOCK_WAIT = "100ms"

# Sent ahead of a statement, in one message, so that both are one transaction.
IMPATIENT = f"SET LOCAL lock_timeout TO '{LOCK_WAIT}'; "

TABLES = (
    # The columns from ``snapshot`` to ``floor`` hold a position in the outbox, ``lsn`` to
    # ``messages`` hold one in the write-ahead log: see Log. With that, ``target`` says what had
    # come from the outbox.
    """CREATE TABLE pgsignals.consumers (
  name text NOT NULL,
  part int NOT NULL,
  parts int NOT NULL,
  ephemeral boolean NOT NULL,
  snapshot text,
  target text,
  last_id bigint NOT NULL DEFAULT 0,
  floor bigint,
  lsn bigint,
  commit_lsn bigint,
  messages bigint,
  shed bigint NOT NULL,
  lost_until timestamptz,
  epoch text NOT NULL,
  channels bigint[] NOT NULL DEFAULT '{}',
  holder text,
  token bigint NOT NULL DEFAULT 0,
  beat bigint NOT NULL DEFAULT 0,
  lease double precision NOT NULL DEFAULT 0,
  server text,
  clean boolean NOT NULL DEFAULT true,
  acknowledged bigint NOT NULL DEFAULT 0,
  acknowledged_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
  installation text,
  verified_at timestamptz,
  PRIMARY KEY (name, part)
) WITH (fillfactor = 50)""",
    """CREATE TABLE pgsignals.members (
  name text NOT NULL,
  holder text NOT NULL,
  key int NOT NULL,
  beat bigint NOT NULL DEFAULT 0,
  lease double precision NOT NULL,
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
    # Events that one receiver has yet to take, so that the consumer can go on for the others.
    """CREATE TABLE pgsignals.parked (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  consumer text NOT NULL,
  part int NOT NULL,
  receiver text NOT NULL,
  uid text NOT NULL,
  channel bigint NOT NULL,
  message bigint,
  number int NOT NULL,
  payload text NOT NULL,
  redelivered boolean NOT NULL,
  at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
  UNIQUE (consumer, receiver, uid),
  FOREIGN KEY (consumer, part) REFERENCES pgsignals.consumers (name, part) ON DELETE CASCADE
)""",
    "CREATE INDEX parked_receiver_idx ON pgsignals.parked (consumer, receiver, id)",
    # Parked events that were dropped, of which the receivers have yet to be told.
    """CREATE TABLE pgsignals.parked_lost (
  consumer text NOT NULL,
  part int NOT NULL,
  receiver text NOT NULL,
  since timestamptz NOT NULL,
  until timestamptz NOT NULL,
  PRIMARY KEY (consumer, part, receiver),
  FOREIGN KEY (consumer, part) REFERENCES pgsignals.consumers (name, part) ON DELETE CASCADE
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
  table_oid oid NOT NULL,
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
    # Each partition goes through the whole table, and delivers the rows that are its own.
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
)
