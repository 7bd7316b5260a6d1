"""The body of a trigger that writes to the outbox; ``sql`` fills it in."""

from __future__ import annotations

from . import names

# A message of several rows fills a page of the outbox at most: 8,160 bytes, of which the row's
# header and its other columns take 60 and what is added to the message's header 70.
#
# The row's id is taken after the transaction's, and so is the look whether a consumer is awake: by
# both, readers know where to look for rows, and whom to wait for before they sleep.
#
# Each advisory lock is tried and given back in one expression, between whose calls no cancellation
# comes: a lock that stayed with the writer's session would make consumers wait for it.
BODY = (
    """
#variable_conflict use_column
DECLARE
  pgs_lines text;
  pgs_moved text;
  pgs_pieces text[];
  pgs_text text;
  pgs_flags text;
  pgs_context text;
  pgs_start text;
  pgs_head text;
  pgs_txid bigint;
  pgs_id bigint;
  pgs_slot bigint;
  pgs_alive boolean;
  pgs_encoding name;
  pgs_data bytea;
  pgs_piece bytea;
  pgs_at int;
  pgs_size int;
  pgs_room int;
BEGIN
  IF current_setting('pgsignals.muted', true) = 'on' THEN
    RETURN NULL;
  END IF;
  pgs_start := '{{"v":{version},"t":'
    || (date_part('epoch', clock_timestamp()) * 1e6::float8)::bigint::text;
  BEGIN
    {select}
    IF pgs_lines IS NULL AND pgs_moved IS NULL THEN
      RETURN NULL;
    END IF;

    -- Only now: a statement that changed no row must not take a transaction id for our sake.
    pgs_txid := pg_current_xact_id()::text::bigint;
    pgs_slot := pg_sequence_last_value('pgsignals.outbox_slot'::regclass);
    pgs_head := pgs_start || ',"x":' || pgs_txid::text;
    pgs_context := current_setting('pgsignals.context', true);
    IF octet_length(pgs_context) BETWEEN 1 AND 2000 THEN
      pgs_context := pg_catalog.to_json(pgs_context)::text;
      IF octet_length(pgs_context) <= 4000 THEN
        pgs_head := pgs_head || ',"c":' || pgs_context;
      END IF;
    END IF;
    pgs_room := 8030 - octet_length(pgs_head);
    IF pgs_moved IS NULL AND octet_length(pgs_lines) <= pgs_room THEN
      pgs_text := E'}}\\n' || pgs_lines;
    ELSE
      pgs_pieces := '{{}}';
      pgs_flags := E'}}\\n';
      pgs_encoding := getdatabaseencoding();
      FOREACH pgs_text IN ARRAY ARRAY[pgs_lines, pgs_moved] LOOP
        pgs_data := convert_to(pgs_text, pgs_encoding);
        pgs_at := 1;
        WHILE pgs_at <= octet_length(pgs_data) LOOP
          pgs_piece := substring(pgs_data FROM pgs_at FOR pgs_room + 1);
          pgs_size := octet_length(pgs_piece);
          IF pgs_size > pgs_room THEN
            -- Whole lines only: what follows the last newline is left for the next message.
            pgs_size := pgs_room - octet_length(
              decode(split_part(encode(pgs_piece, 'escape'), E'\\n', -1), 'escape'));
          END IF;
          IF pgs_size < 0 THEN
            -- One row is longer than a page: it goes by itself, and whole.
            pgs_size := 16384;
            LOOP
              pgs_piece := substring(pgs_data FROM pgs_at FOR pgs_size);
              EXIT WHEN octet_length(pgs_piece) < pgs_size
                OR position('\\x0a'::bytea IN pgs_piece) > 0;
              pgs_size := pgs_size * 2;
            END LOOP;
            pgs_size := position('\\x0a'::bytea IN pgs_piece) - 1;
            IF pgs_size < 0 THEN
              pgs_size := octet_length(pgs_piece);
            END IF;
          END IF;
          pgs_pieces := pg_catalog.array_append(pgs_pieces, pgs_flags
            || convert_from(substring(pgs_piece FROM 1 FOR pgs_size), pgs_encoding));
          pgs_at := pgs_at + pgs_size + 1;
        END LOOP;
        pgs_flags := E',"moved":true}}\\n';
      END LOOP;
    END IF;
  EXCEPTION WHEN OTHERS THEN
    -- The write must go on: what broke is reported in place of the rows.
    pgs_txid := pg_current_xact_id()::text::bigint;
    pgs_head := pgs_start || ',"x":' || pgs_txid::text;
    pgs_pieces := NULL;
    pgs_text := ',"error":' || pg_catalog.to_json(left(SQLERRM, 400))::text || '}}';
    BEGIN
      pgs_slot := pg_sequence_last_value('pgsignals.outbox_slot'::regclass);
    EXCEPTION WHEN OTHERS THEN
      pgs_text := pg_notify('pgsignals_wake', 'no outbox: ' || left(SQLERRM, 400));
      RETURN NULL;
    END;
  END;

  IF (CASE WHEN pg_try_advisory_lock_shared({class}, {awake})
        THEN pg_advisory_unlock_shared({class}, {awake}) ELSE false END) THEN
    pgs_alive := true;
    IF (CASE WHEN pg_try_advisory_lock({class}, {alive})
          THEN pg_advisory_unlock({class}, {alive}) ELSE false END) THEN
      pgs_alive := false;
      IF NOT pgsignals.has_room() THEN
        pgs_id := nextval('pgsignals.outbox_shed'::regclass);
        RETURN NULL;
      END IF;
    END IF;
  END IF;
  -- Not in the block: its subtransaction would take a transaction id of its own for each statement.
  IF pgs_pieces IS NULL THEN
    pgs_id := nextval('pgsignals.outbox_id'::regclass);
    INSERT INTO pgsignals.outbox (id, txid, channel, slot, payload)
      VALUES (pgs_id, pgs_txid, {key}, pgs_slot, pgs_head || ',"s":' || pgs_id::text || pgs_text);
  ELSE
    FOREACH pgs_text IN ARRAY pgs_pieces LOOP
      pgs_id := nextval('pgsignals.outbox_id'::regclass);
      INSERT INTO pgsignals.outbox (id, txid, channel, slot, payload)
        VALUES (pgs_id, pgs_txid, {key}, pgs_slot, pgs_head || ',"s":' || pgs_id::text || pgs_text);
    END LOOP;
  END IF;
  IF pgs_alive THEN
    pgs_text := pg_notify('pgsignals_wake', '');
  END IF;
  RETURN NULL;
END
"""
    # By names, since the braces are for psycopg2.
    .replace("{class}", str(names.LOCK_CLASS))
    .replace("{awake}", str(names.AWAKE_LOCK))
    .replace("{alive}", str(names.ALIVE_LOCK))
)
