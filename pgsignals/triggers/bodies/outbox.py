"""The body of a function that writes to the outbox."""

from __future__ import annotations

from .common import BY_NOTICE, CONTEXT, LONG_LINE, MUTED, PIECES, PROLOGUE, body

# A message of several rows fills at most a page of the server's, 8,160 bytes: the row's header and
# its other columns take 60 of them, and what is added to the message's header 70.
#
# The row's id is taken after the transaction's, which gives readers lower bounds of the ids of a
# transaction's rows (IdBounds). So is the look whether a consumer is awake, by which a consumer
# knows the transactions that it has to wait for before it sleeps (AwakeLock).
#
# Each advisory lock is tried and given back in one expression, between whose calls no cancellation
# can come. Otherwise a lock could stay with the writer's session, and consumers would wait for it.
#
# The first row of a transaction is written inside the block, which costs a second transaction id.
# Later ones are written after the block, since beyond 64 such ids every snapshot of the server
# becomes slow. By then the transaction holds locks under which nobody can alter the outbox, but
# rights can still be revoked. PostgreSQL notices that while it plans a statement anew, and wherever
# its caches lack something: a mere look at the rights let one write in ten fail beside a REVOKE.
# Hence the function ``put``, whose statement has the same plan inside the block, where it writes no
# row, and after it: a call that would fail after the block has failed inside. A query that is
# opened inside, as in notify delivery, would leave less to chance where a session plans the second
# call, and costs a third more. A savepoint that is rolled back takes the locks and the setting
# along.

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

_WORK = (
    PROLOGUE
    + r""") <> ''
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
    + MUTED
    + """
        IF pgs_try < @by_error@ THEN"""
    + CONTEXT
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
    + PIECES
    + r"""
            IF pgs_size < 0 THEN
              -- One row is longer than a page: it goes by itself, and whole."""
    + LONG_LINE
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


BODY = body(
    _WORK,
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
