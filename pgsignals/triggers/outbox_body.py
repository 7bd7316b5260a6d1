"""The body of a trigger that writes to the outbox, which ``sql`` qualifies and fills in."""

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
#
# As in the other body, what most statements come to has few expressions.
BODY = (
    r"""
#variable_conflict use_column
DECLARE
  pgs_lines pg_catalog.text;
  pgs_moved pg_catalog.text;
  pgs_pieces pg_catalog.text[];
  pgs_text pg_catalog.text;
  pgs_flags pg_catalog.text;
  pgs_context pg_catalog.text;
  pgs_head pg_catalog.text;
  pgs_txid pg_catalog.int8;
  pgs_id pg_catalog.int8;
  pgs_slot pg_catalog.int8;
  pgs_wake pg_catalog.bool := false;
  pgs_encoding pg_catalog.name;
  pgs_data pg_catalog.bytea;
  pgs_piece pg_catalog.bytea;
  pgs_at pg_catalog.int4;
  pgs_size pg_catalog.int4;
  pgs_room pg_catalog.int4;
BEGIN
  BEGIN
    -- One look at both.
    IF pg_catalog.concat(
      pg_catalog.current_setting('pgsignals.muted', true),
      pg_catalog.current_setting('pgsignals.context', true)) <> ''
    THEN
      IF pg_catalog.current_setting('pgsignals.muted', true) = 'on' THEN
        RETURN NULL;
      END IF;
      pgs_text := pg_catalog.current_setting('pgsignals.context', true);
      IF pgs_text <> '' AND pg_catalog.octet_length(pgs_text) <= 2000 THEN
        pgs_text := pg_catalog.to_json(pgs_text)::pg_catalog.text;
        IF pg_catalog.octet_length(pgs_text) <= 4000 THEN
          pgs_context := ',"c":' || pgs_text;
        END IF;
      END IF;
    END IF;

    {select}
    -- Only with rows: a statement that changed none must not take a transaction id for our sake.
    IF pgs_lines IS NULL AND pgs_moved IS NULL THEN
      RETURN NULL;
    END IF;
    pgs_slot := pg_catalog.pg_sequence_last_value('pgsignals.outbox_slot'::pg_catalog.regclass);
    IF pgs_moved IS NOT NULL OR pg_catalog.octet_length(pgs_lines) > 3900 THEN
      pgs_head := pg_catalog.concat({head}, ',"s":');
      pgs_room := 8030 - pg_catalog.octet_length(pgs_head);
      pgs_pieces := '{{}}';
      pgs_flags := E'}}\n';
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
              pg_catalog.split_part(pg_catalog.encode(pgs_piece, 'escape'), E'\n', -1), 'escape'));
          END IF;
          IF pgs_size < 0 THEN
            -- One row is longer than a page: it goes by itself, and whole.
            pgs_size := 16384;
            LOOP
              pgs_piece := substring(pgs_data FROM pgs_at FOR pgs_size);
              EXIT WHEN pg_catalog.octet_length(pgs_piece) < pgs_size
                OR position(E'\\x0a'::pg_catalog.bytea IN pgs_piece) > 0;
              pgs_size := pgs_size * 2;
            END LOOP;
            pgs_size := position(E'\\x0a'::pg_catalog.bytea IN pgs_piece) - 1;
            IF pgs_size < 0 THEN
              pgs_size := pg_catalog.octet_length(pgs_piece);
            END IF;
          END IF;
          pgs_pieces := pg_catalog.array_append(pgs_pieces, pgs_flags || pg_catalog.convert_from(
            substring(pgs_piece FROM 1 FOR pgs_size), pgs_encoding));
          pgs_at := pgs_at + pgs_size + 1;
        END LOOP;
        pgs_flags := E',"moved":true}}\n';
      END LOOP;
    END IF;
  EXCEPTION WHEN OTHERS THEN
    -- The write must go on: what broke is reported in place of the rows.
    pgs_context := NULL;
    pgs_head := pg_catalog.concat({head}, ',"s":');
    pgs_pieces := ARRAY[pg_catalog.concat(
      ',"error":', pg_catalog.to_json(pg_catalog.left(SQLERRM, 400)), '}}')];
    BEGIN
      pgs_slot := pg_catalog.pg_sequence_last_value('pgsignals.outbox_slot'::pg_catalog.regclass);
    EXCEPTION WHEN OTHERS THEN
      pgs_text := pg_catalog.pg_notify(
        'pgsignals_wake', 'no outbox: ' || pg_catalog.left(SQLERRM, 400));
      RETURN NULL;
    END;
  END;

  pgs_txid := pg_catalog.pg_current_xact_id()::pg_catalog.text::pg_catalog.int8;
  pgs_id := pg_catalog.nextval('pgsignals.outbox_id'::pg_catalog.regclass);
  IF (CASE WHEN pg_catalog.pg_try_advisory_lock_shared({class}, {awake})
        THEN pg_catalog.pg_advisory_unlock_shared({class}, {awake}) ELSE false END) THEN
    -- Nobody is awake.
    IF (CASE WHEN pg_catalog.pg_try_advisory_lock({class}, {alive})
          THEN pg_catalog.pg_advisory_unlock({class}, {alive}) ELSE false END) THEN
      -- Nobody lives who would keep the outbox within its bounds; now and then one looks.
      IF pg_catalog.random() < 0.02 THEN
        pgs_at := pg_catalog.setval('pgsignals.outbox_full'::pg_catalog.regclass,
          CASE WHEN pgsignals.has_room() THEN 0 ELSE 1 END);
      END IF;
      IF pg_catalog.pg_sequence_last_value('pgsignals.outbox_full'::pg_catalog.regclass) = 1 THEN
        pgs_id := pg_catalog.nextval('pgsignals.outbox_shed'::pg_catalog.regclass);
        RETURN NULL;
      END IF;
    ELSE
      pgs_wake := true;
    END IF;
  END IF;
  -- Not in the block: its subtransaction would take a transaction id of its own for each statement.
  IF pgs_pieces IS NULL THEN
    INSERT INTO pgsignals.outbox (id, txid, channel, slot, payload)
      VALUES (pgs_id, pgs_txid, {key}, pgs_slot,
        pg_catalog.concat({head}, ',"s":', pgs_id, E'}}\n', pgs_lines));
  ELSE
    FOREACH pgs_text IN ARRAY pgs_pieces LOOP
      IF pgs_id IS NULL THEN
        pgs_id := pg_catalog.nextval('pgsignals.outbox_id'::pg_catalog.regclass);
      END IF;
      INSERT INTO pgsignals.outbox (id, txid, channel, slot, payload)
        VALUES (pgs_id, pgs_txid, {key}, pgs_slot, pg_catalog.concat(pgs_head, pgs_id, pgs_text));
      pgs_id := NULL;
    END LOOP;
  END IF;
  IF pgs_wake THEN
    pgs_text := pg_catalog.pg_notify('pgsignals_wake', '');
  END IF;
  RETURN NULL;
END
"""
    # By names, since the braces are for psycopg2.
    .replace("{class}", str(names.LOCK_CLASS))
    .replace("{awake}", str(names.AWAKE_LOCK))
    .replace("{alive}", str(names.ALIVE_LOCK))
)
