"""The body of a function that notifies."""

from __future__ import annotations

from .common import BY_COUNT, CONTEXT, LONG_LINE, MUTED, PIECES, PROLOGUE, body

# The notification limit is 7,999 bytes (NOTIFY_PAYLOAD_MAX_LENGTH), in the server's encoding. Where
# lines are cut into several messages, sequence and flags take at most 70 bytes of each header.
#
# Names are looked up in the writer's search_path, or the installer's where the watcher has a
# condition: hence each function, type and operator is qualified, and what looks for an operator by
# itself (IN, BETWEEN, IS DISTINCT FROM) is not used. A SET clause would cost a third of the whole:
# beside 32 writers, of which each statement sets it and back, a twelfth of their throughput.
#
# The path that most statements take, one short message in a transaction's first statement, has few
# expressions, since in every transaction plpgsql prepares anew each one that it evaluates.
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

_WORK = (
    PROLOGUE
    + r""",
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
    + MUTED
    + """
        IF pgs_try < @by_error@ THEN"""
    + CONTEXT
    + r"""
        END IF;
        -- Counts messages of the transaction, since PostgreSQL collapses notifications that are
        -- equal. Anybody can set it to anything: what is no number fails where a row is tried for
        -- the first time, and only the second try looks, which takes as long as a row's text.
        pgs_sequence := 1;
        pgs_text := pg_catalog.current_setting('pgsignals.sequence', true);
        IF (CASE WHEN pgs_try < @by_statement@ THEN pgs_text <> ''
          ELSE pgs_text ~ '^[0-9]{{1,15}}$' END)
        THEN
          pgs_sequence := pg_catalog.abs(pgs_text::pg_catalog.int8) + 1;
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
    + PIECES
    + r"""
            pgs_sequence := pgs_sequence + 1;
            IF pgs_size >= 0 THEN
              pgs_messages := pg_catalog.array_append(pgs_messages, pg_catalog.concat(
                pgs_head, ',"s":', pgs_sequence, pgs_flags, E'}}\n',
                pg_catalog.convert_from(substring(pgs_piece FROM 1 FOR pgs_size), pgs_encoding)));
              pgs_at := pgs_at + pgs_size + 1;
            ELSE
              -- One row is longer than a notification: only its key, before the tab, goes."""
    + LONG_LINE
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

BODY = body(
    _WORK.replace("@second@", _SECOND),
    "pgs_sending",
    _RUN,
    """
  pgs_sending pg_catalog.refcursor;
  pgs_sequence pg_catalog.int8 := 1;
  pgs_later pg_catalog.bool;
  pgs_usage pg_catalog.float8;""",
    BY_COUNT,
)
