"""The bodies of the trigger functions, which ``sql`` qualifies and fills in.

Nothing here may break the write that fires it. A function does all its work in a block that catches
every error, and tries again with less: first the rows, then the error in their place, then the mere
word that something is missing. What stands behind the block has been proved inside it.
"""

from __future__ import annotations

from ..core.payload import SILENT
from . import names

# The payload of a wake-up by a function that could do no more.
CANNOT_WRITE = "no outbox"

# In the functions' texts, the table that they serve, as CREATE FUNCTION finds it.
TABLES = "{pgsignals_tables}"

# How often a function tries: with the rows as the trigger's variables have them, with the rows as a
# statement planned anew reads them, with the error in place of the rows, then with fixed texts.
BY_VARIABLES, BY_STATEMENT, BY_ERROR, BY_COUNT, BY_NOTICE = range(5)

_GUARDED = """
#variable_conflict use_column
DECLARE
  pgs_lines pg_catalog.text;
  pgs_moved pg_catalog.text;
  pgs_messages pg_catalog.text[];
  pgs_text pg_catalog.text;
  pgs_flags pg_catalog.text;
  pgs_context pg_catalog.text;
  pgs_head pg_catalog.text;
  pgs_error pg_catalog.text;
  pgs_encoding pg_catalog.name;
  pgs_data pg_catalog.bytea;
  pgs_piece pg_catalog.bytea;
  pgs_at pg_catalog.int4;
  pgs_size pg_catalog.int4;
  pgs_room pg_catalog.int4;@declarations@
BEGIN
  FOR pgs_try IN {first}..@last@ LOOP
    BEGIN@work@
    EXCEPTION WHEN assert_failure OR others THEN
      -- OTHERS leaves assertions out. A cancellation is for the statement, and goes on.
      pgs_error := SQLERRM;
      @proof@ := NULL;
      pgs_lines := NULL;
      pgs_moved := NULL;
      pgs_messages := NULL;
      pgs_context := NULL;
    END;
  END LOOP;
  IF @proof@ IS NOT NULL THEN@proved@
  END IF;
  RETURN NULL;
END
"""

_MUTED = """
        IF pg_catalog.current_setting('pgsignals.muted', true) = 'on' THEN
          RETURN NULL;
        END IF;"""

_CONTEXT = """
        pgs_text := pg_catalog.current_setting('pgsignals.context', true);
        IF pgs_text <> '' AND pg_catalog.octet_length(pgs_text) <= 2000 THEN
          pgs_text := pg_catalog.to_json(pgs_text)::pg_catalog.text;
          IF pg_catalog.octet_length(pgs_text) <= 4000 THEN
            pgs_context := ',"c":' || pgs_text;
          END IF;
        END IF;"""

# Begins the walk over lines that are longer than one message: sets pgs_piece to what fits, and
# pgs_size to its whole lines, or to a negative number where not even one fits.
_PIECES = r"""
        pgs_encoding := pg_catalog.getdatabaseencoding();
        FOREACH pgs_text IN ARRAY ARRAY[pgs_lines, pgs_moved] LOOP
          pgs_data := pg_catalog.convert_to(pgs_text, pgs_encoding);
          pgs_at := 1;
          WHILE pgs_at <= pg_catalog.octet_length(pgs_data) LOOP
            pgs_piece := substring(pgs_data FROM pgs_at FOR pgs_room + 1);
            pgs_size := pg_catalog.octet_length(pgs_piece);
            IF pgs_size > pgs_room THEN
              -- Whole lines only: what follows the last newline is left for the next message.
              pgs_size := pgs_room - pg_catalog.octet_length(pg_catalog.decode(
                pg_catalog.split_part(pg_catalog.encode(pgs_piece, 'escape'), E'\n', -1),
                'escape'));
            END IF;"""

# Sets pgs_piece to all of a line that is longer than a message.
_LONG_LINE = r"""
              pgs_size := 16384;
              LOOP
                pgs_piece := substring(pgs_data FROM pgs_at FOR pgs_size);
                EXIT WHEN pg_catalog.octet_length(pgs_piece) < pgs_size
                  OR position(E'\\x0a'::pg_catalog.bytea IN pgs_piece) > 0;
                pgs_size := pgs_size * 2;
              END LOOP;
              pgs_size := position(E'\\x0a'::pg_catalog.bytea IN pgs_piece) - 1;"""

# ---- notify ----
#
# The notification limit is 7,999 bytes (NOTIFY_PAYLOAD_MAX_LENGTH), in the server's encoding; of
# several messages, the header's sequence and flags, added to each, take at most 70.
#
# Names are looked up in the writer's search_path, or the installer's where the watcher has a
# condition: hence each function, type and operator is qualified, and what looks for an operator by
# itself (IN, BETWEEN, IS DISTINCT FROM) is not used. A SET clause would cost a third of the whole:
# beside 32 writers, of which each statement sets it and back, a twelfth of their throughput.
#
# What most statements come to, one short message in a transaction's first statement, has few
# expressions, since plpgsql prepares each that it evaluates anew in every transaction.
#
# The first message of a transaction goes inside the block, where a failure is caught. Later ones go
# behind it, since each notification would keep its subtransaction's memory, 8 kB, to the end: a
# transaction of 100,000 statements would take 800 MB. They go by a query that is opened inside the
# block, since a call that is planned behind it would hear of a right that has just been revoked.
# In the query's FROM, unnest() would fill a temporary file first.
#
# A session looks once a second how full the queue is, in the first statement of a transaction; a
# session that found it filling looks each time.

_SECOND = (
    "(pg_catalog.date_part('epoch', pg_catalog.clock_timestamp())"
    "::pg_catalog.int8)::pg_catalog.text"
)

_RUN = """
    MOVE FORWARD ALL FROM pgs_sending;
    CLOSE pgs_sending;"""

_NOTIFY_WORK = (
    r"""
      IF pgs_try < @by_count@ AND NOT {mine} THEN
        IF NOT {sure} THEN
          RETURN NULL;
        END IF;
      END IF;
      -- One look at all that is out of the ordinary.
      IF pgs_try > @by_statement@ OR pg_catalog.concat(
        pg_catalog.current_setting('pgsignals.muted', true),
        pg_catalog.current_setting('pgsignals.context', true),
        CASE WHEN pg_catalog.current_setting('pgsignals.sequence', true) <> '' THEN 'later'
          WHEN pg_catalog.current_setting('pgsignals.queue', true) = @second@ THEN ''
          ELSE 'look' END) <> ''
      THEN
        IF pgs_try = @by_count@ THEN
          -- By a command, for which no right on a function is needed.
          IF pg_catalog.pg_notification_queue_usage() < @limit@::pg_catalog.float8 THEN
            NOTIFY {notified}, '@silent@';
          END IF;
          RETURN NULL;
        END IF;"""
    + _MUTED
    + """
        IF pgs_try < @by_error@ THEN"""
    + _CONTEXT
    + r"""
        END IF;
        -- Counts messages of the transaction, since PostgreSQL collapses notifications that are
        -- equal. Anybody can set it to anything.
        pgs_sequence := 1;
        pgs_text := pg_catalog.current_setting('pgsignals.sequence', true);
        IF pgs_text ~ '^[0-9]{{1,15}}$' THEN
          pgs_sequence := pgs_text::pg_catalog.int8 + 1;
          pgs_later := true;
        ELSE
          pgs_text := @second@;
          IF (pg_catalog.current_setting('pgsignals.queue', true) = pgs_text) IS NOT TRUE THEN
            pgs_usage := pg_catalog.pg_notification_queue_usage();
            IF pgs_usage < @share@::pg_catalog.float8 THEN
              pgs_text := pg_catalog.set_config('pgsignals.queue', pgs_text, false);
            END IF;
          END IF;
        END IF;
      END IF;

      {select}
      -- Only with rows: a statement that changed none must not take a transaction id for our sake.
      pgs_text := CASE
        WHEN pgs_lines IS NOT NULL AND pgs_moved IS NULL
          AND (pgs_usage IS NULL OR pgs_usage < @share@::pg_catalog.float8)
        THEN pg_catalog.concat({head}, ',"s":', pgs_sequence, E'}}\n', pgs_lines) END;
      IF pgs_text IS NULL OR pg_catalog.octet_length(pgs_text) > 7999 THEN
        IF pgs_try = @by_error@ THEN
          IF pgs_usage >= @limit@::pg_catalog.float8 THEN
            RETURN NULL;
          END IF;
          pgs_text := pg_catalog.concat({head}, ',"s":', pgs_sequence, ',"error":',
            pg_catalog.to_json(pg_catalog.left(pgs_error, 400)), '}}');
        ELSIF pgs_lines IS NULL AND pgs_moved IS NULL THEN
          RETURN NULL;
        ELSIF pgs_usage >= @share@::pg_catalog.float8 THEN
          RAISE EXCEPTION 'the notification queue of the server is % %% full, so that nobody '
            'notifies: a listener stays in a transaction',
            pg_catalog.round((pgs_usage * 100::pg_catalog.float8)::pg_catalog.numeric);
        ELSE
          pgs_head := pg_catalog.concat({head});
          pgs_room := 7929 - pg_catalog.octet_length(pgs_head);
          pgs_messages := '{{}}';
          pgs_flags := '';
          pgs_sequence := pgs_sequence - 1;"""
    + _PIECES
    + r"""
            pgs_sequence := pgs_sequence + 1;
            IF pgs_size >= 0 THEN
              pgs_messages := pg_catalog.array_append(pgs_messages, pg_catalog.concat(
                pgs_head, ',"s":', pgs_sequence, pgs_flags, E'}}\n',
                pg_catalog.convert_from(substring(pgs_piece FROM 1 FOR pgs_size), pgs_encoding)));
              pgs_at := pgs_at + pgs_size + 1;
            ELSE
              -- One row is longer than a notification: only its key, before the tab, goes."""
    + _LONG_LINE
    + r"""
              IF pgs_size >= 0 THEN
                pgs_piece := substring(pgs_piece FROM 1 FOR pgs_size);
              END IF;
              pgs_at := pgs_at + pg_catalog.octet_length(pgs_piece) + 1;
              pgs_text := pg_catalog.convert_from(pgs_piece, pgs_encoding);
              IF pg_catalog.strpos(pgs_text, E'\t') > 0 THEN
                pgs_text := pg_catalog.split_part(pgs_text, E'\t', 1) || ']';
              END IF;
              IF pg_catalog.octet_length(pgs_text) <= pgs_room THEN
                pgs_messages := pg_catalog.array_append(pgs_messages, pg_catalog.concat(
                  pgs_head, ',"s":', pgs_sequence, pgs_flags, E',"cut":true}}\n', pgs_text));
              ELSE
                pgs_text := pg_catalog.translate(pg_catalog.encode(
                  pg_catalog.convert_to(pgs_text, 'UTF8'), 'base64'), E'\n', '');
                pgs_size := (pg_catalog.octet_length(pgs_text) + pgs_room - 1) / pgs_room;
                FOR pgs_part IN 1..pgs_size LOOP
                  pgs_messages := pg_catalog.array_append(pgs_messages, pg_catalog.concat(
                    pgs_head, ',"s":', pgs_sequence, pgs_flags,
                    ',"cut":true,"part":[', pgs_part, ',', pgs_size, E']}}\n',
                    pg_catalog.substr(pgs_text, (pgs_part - 1) * pgs_room + 1, pgs_room)));
                END LOOP;
              END IF;
            END IF;
          END LOOP;
          pgs_flags := ',"moved":true';
        END LOOP;
        END IF;
      END IF;
      pgs_head := pg_catalog.set_config(
        'pgsignals.sequence', pgs_sequence::pg_catalog.text, true);
      IF pgs_later THEN
        IF pgs_messages IS NULL THEN
          OPEN pgs_sending NO SCROLL FOR SELECT pg_catalog.pg_notify({channel}, pgs_text);
        ELSE
          OPEN pgs_sending NO SCROLL FOR
            SELECT pg_catalog.pg_notify({channel}, pg_catalog.unnest(pgs_messages));
        END IF;
        EXIT;
      END IF;
      -- Assignments, since PERFORM would run the call as a query of its own.
      IF pgs_messages IS NULL THEN
        pgs_text := pg_catalog.pg_notify({channel}, pgs_text);
      ELSE
        FOREACH pgs_text IN ARRAY pgs_messages LOOP
          pgs_text := pg_catalog.pg_notify({channel}, pgs_text);
        END LOOP;
      END IF;
      RETURN NULL;"""
)

# ---- outbox ----
#
# A message of several rows fills a page of the outbox at most: 8,160 bytes, of which the row's
# header and its other columns take 60 and what is added to the message's header 70.
#
# The row's id is taken after the transaction's, and so is the look whether a consumer is awake: by
# both, readers know where to look for rows, and whom to wait for before they sleep.
#
# Each advisory lock is tried and given back in one expression, between whose calls no cancellation
# comes: a lock that stayed with the writer's session would make consumers wait for it.
#
# The first row of a transaction is written inside the block, which costs a second transaction id.
# Later ones are written behind it, since beyond 64 such ids every snapshot of the server becomes
# slow. By then the transaction holds locks under which nobody can alter the outbox, but rights can
# be revoked. PostgreSQL hears of that while it plans a statement anew, and wherever its caches lack
# something: a look at the rights, by itself, let one write in ten fail beside a REVOKE. Hence the
# function ``put``, whose statement has the same plan inside the block, where it writes no row, and
# behind it: what fails the second time has failed the first. A query that is opened before, as in
# notify delivery, would leave less to chance where a session plans the second call, and costs a
# third more. A savepoint that is rolled back takes the locks and the setting along.

_WRITE = """
        IF pgs_messages IS NULL THEN
          INSERT INTO pgsignals.outbox (id, txid, channel, relation, segment, payload)
            VALUES (pgs_id, pgs_txid, {key}, {relation}, pgs_segment, pgs_text);
        ELSE
          -- Without a single function, whose right somebody could have revoked.
          FOR pgs_number IN 1..pgs_count LOOP
            INSERT INTO pgsignals.outbox (id, txid, channel, relation, segment, payload)
              VALUES (pgs_ids[pgs_number], pgs_txid, {key}, {relation}, pgs_segment,
                pgs_messages[pgs_number]);
          END LOOP;
        END IF;"""

_PUT = """
    IF pgs_messages IS NULL THEN
      pgs_proved := pgsignals.put(pgs_id, pgs_txid, {key}, {relation}, pgs_segment, pgs_text, true);
    ELSE
      FOR pgs_number IN 1..pgs_count LOOP
        pgs_proved := pgsignals.put(pgs_ids[pgs_number], pgs_txid, {key}, {relation}, pgs_segment,
          pgs_messages[pgs_number], true);
      END LOOP;
    END IF;"""

_OUTBOX_WORK = (
    r"""
      IF pgs_try < @by_count@ AND NOT {mine} THEN
        IF NOT {sure} THEN
          RETURN NULL;
        END IF;
      END IF;
      -- One look at all that is out of the ordinary.
      IF pgs_try > @by_statement@ OR pg_catalog.concat(
        pg_catalog.current_setting('pgsignals.muted', true),
        pg_catalog.current_setting('pgsignals.context', true)) <> ''
      THEN
        IF pgs_try = @by_count@ THEN
          pgs_id := pg_catalog.nextval('pgsignals.outbox_shed'::pg_catalog.regclass);
          RETURN NULL;
        ELSIF pgs_try = @by_notice@ THEN
          IF pg_catalog.pg_notification_queue_usage() < @limit@::pg_catalog.float8 THEN
            NOTIFY @wake@, '@no_outbox@';
          END IF;
          RETURN NULL;
        END IF;"""
    + _MUTED
    + """
        IF pgs_try < @by_error@ THEN"""
    + _CONTEXT
    + r"""
        END IF;
      END IF;

      {select}
      -- Only with rows: a statement that changed none must not take a transaction id for our sake.
      IF pgs_lines IS NULL AND pgs_moved IS NULL AND pgs_try < @by_error@ THEN
        RETURN NULL;
      END IF;
      pgs_txid := pg_catalog.pg_current_xact_id()::pg_catalog.text::pg_catalog.int8;
      pgs_id := pg_catalog.nextval('pgsignals.outbox_id'::pg_catalog.regclass);
      -- A sequence that a restored dump left without a value has none.
      pgs_segment := coalesce(pg_catalog.pg_sequence_last_value(
        'pgsignals.outbox_segment'::pg_catalog.regclass), 0);
      IF (CASE WHEN pg_catalog.pg_try_advisory_lock_shared(@class@, @awake@)
            THEN pg_catalog.pg_advisory_unlock_shared(@class@, @awake@) ELSE false END) THEN
        -- Nobody is awake.
        IF (CASE WHEN pg_catalog.pg_try_advisory_lock(@class@, @alive@)
              THEN pg_catalog.pg_advisory_unlock(@class@, @alive@) ELSE false END) THEN
          -- Nobody lives who would keep the outbox within its bounds; now and then one looks.
          IF pg_catalog.mod(pgs_id, 50::pg_catalog.int8) = 0 THEN
            pgs_at := pg_catalog.setval('pgsignals.outbox_full'::pg_catalog.regclass,
              CASE WHEN pgsignals.has_room() THEN 0 ELSE 1 END);
          END IF;
          IF pg_catalog.pg_sequence_last_value('pgsignals.outbox_full'::pg_catalog.regclass) = 1
          THEN
            pgs_id := pg_catalog.nextval('pgsignals.outbox_shed'::pg_catalog.regclass);
            RETURN NULL;
          END IF;
        ELSIF (pg_catalog.split_part(pg_catalog.current_setting('pgsignals.written', true), ':', 1)
            = pgs_txid::pg_catalog.text) IS NOT TRUE
          AND pg_catalog.pg_notification_queue_usage() < @share@::pg_catalog.float8
        THEN
          -- Once a transaction: a consumer that this one saw awake waits for its end. By a fuller
          -- queue nobody is woken: consumers look by themselves every few seconds.
          pgs_text := pg_catalog.pg_notify('@wake@', '');
        END IF;
      END IF;
      pgs_text := CASE WHEN pgs_moved IS NULL AND pg_catalog.octet_length(pgs_lines) <= 3900 THEN
        pg_catalog.concat({head}, ',"s":', pgs_id, E'}}\n', pgs_lines) END;
      IF pgs_text IS NULL THEN
        IF pgs_try = @by_error@ THEN
          -- What broke is reported in place of the rows.
          pgs_text := pg_catalog.concat({head}, ',"s":', pgs_id, ',"error":',
            pg_catalog.to_json(pg_catalog.left(pgs_error, 400)), '}}');
        ELSE
          pgs_head := pg_catalog.concat({head}, ',"s":');
          pgs_room := 8030 - pg_catalog.octet_length(pgs_head);
          pgs_messages := '{{}}';
          pgs_ids := '{{}}';
          pgs_flags := E'}}\n';"""
    + _PIECES
    + r"""
            IF pgs_size < 0 THEN
              -- One row is longer than a page: it goes by itself, and whole."""
    + _LONG_LINE
    + r"""
              IF pgs_size < 0 THEN
                pgs_size := pg_catalog.octet_length(pgs_piece);
              END IF;
            END IF;
            IF pgs_id IS NULL THEN
              pgs_id := pg_catalog.nextval('pgsignals.outbox_id'::pg_catalog.regclass);
            END IF;
            pgs_ids := pg_catalog.array_append(pgs_ids, pgs_id);
            pgs_messages := pg_catalog.array_append(pgs_messages, pg_catalog.concat(
              pgs_head, pgs_id, pgs_flags, pg_catalog.convert_from(
                substring(pgs_piece FROM 1 FOR pgs_size), pgs_encoding)));
            pgs_id := NULL;
            pgs_at := pgs_at + pgs_size + 1;
          END LOOP;
          pgs_flags := E',"moved":true}}\n';
        END LOOP;
        pgs_count := pg_catalog.cardinality(pgs_ids);
        END IF;
      END IF;
      IF pg_catalog.current_setting('pgsignals.written', true)
          = pg_catalog.concat(pgs_txid, ':', pgs_segment)
      THEN
        IF pgs_messages IS NULL THEN
          pgs_proved := pgsignals.put(
            pgs_id, pgs_txid, {key}, {relation}, pgs_segment, pgs_text, false);
        ELSE
          pgs_proved := pgsignals.put(pgs_ids[pgs_count], pgs_txid, {key}, {relation}, pgs_segment,
            pgs_messages[pgs_count], false);
        END IF;
        -- Last, since a statement before it may hear of a right that has been revoked.
        IF pg_catalog.has_schema_privilege('pgsignals', 'USAGE')
          AND pg_catalog.has_table_privilege(
            'pgsignals.outbox'::pg_catalog.regclass::pg_catalog.oid, 'INSERT')
        THEN
          EXIT;
        END IF;
        pgs_proved := NULL;
      END IF;"""
    + _WRITE
    + """
      pgs_head := pg_catalog.set_config(
        'pgsignals.written', pg_catalog.concat(pgs_txid, ':', pgs_segment), true);
      RETURN NULL;"""
)


def _body(work: str, proof: str, proved: str, declarations: str, last: int) -> str:
    text = _GUARDED
    for name, value in {
        # By names, since the braces are for psycopg2.
        "work": work,
        "proof": proof,
        "proved": proved,
        "declarations": declarations,
        "last": last,
        "by_statement": BY_STATEMENT,
        "by_error": BY_ERROR,
        "by_count": BY_COUNT,
        "by_notice": BY_NOTICE,
        "second": _SECOND,
        "share": names.QUEUE_SHARE,
        "limit": names.QUEUE_LIMIT,
        "silent": SILENT,
        "no_outbox": CANNOT_WRITE,
        "wake": names.WAKE_CHANNEL,
        "class": names.LOCK_CLASS,
        "awake": names.AWAKE_LOCK,
        "alive": names.ALIVE_LOCK,
    }.items():
        text = text.replace(f"@{name}@", str(value))
    return text


NOTIFY = _body(
    _NOTIFY_WORK,
    "pgs_sending",
    _RUN,
    """
  pgs_sending pg_catalog.refcursor;
  pgs_sequence pg_catalog.int8 := 1;
  pgs_later pg_catalog.bool;
  pgs_usage pg_catalog.float8;""",
    BY_COUNT,
)

OUTBOX = _body(
    _OUTBOX_WORK,
    "pgs_proved",
    _PUT,
    """
  pgs_proved pg_catalog.bool;
  pgs_txid pg_catalog.int8;
  pgs_id pg_catalog.int8;
  pgs_ids pg_catalog.int8[];
  pgs_count pg_catalog.int4;
  pgs_segment pg_catalog.int8;""",
    BY_NOTICE,
)
