"""The body of a function that writes messages into the write-ahead log."""

from __future__ import annotations

from ..names import MESSAGE_PREFIX
from .common import BY_NOTICE, CONTEXT, LONG_LINE, MUTED, PIECES, PROLOGUE, body

# A message has the secret, the channel and the table's OID in front of its payload. Anybody may
# write messages with our prefix, but only the function's owner can read the secret: it is the value
# of a sequence, which an expression reads without a query.
#
# Messages go out behind the guarded block, by a query that is opened inside it: see notify.py. Sent
# inside, each would cost the transaction a second id. A reader holds several copies of a message in
# memory at once, and so none has much more than _ROOM bytes, unless one row is longer.

_ROOM = 64_000

_RUN = """
    MOVE FORWARD ALL FROM pgs_sending;
    CLOSE pgs_sending;"""

_WORK = (
    PROLOGUE
    + r""") <> ''
      THEN
        IF pgs_try = @by_count@ THEN
          pgs_secret := pg_catalog.nextval('pgsignals.outbox_shed'::pg_catalog.regclass);
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
      pgs_secret := pg_catalog.pg_sequence_last_value(
        'pgsignals.wal_secret'::pg_catalog.regclass);
      IF pgs_secret IS NULL THEN
        RAISE EXCEPTION 'the sequence pgsignals.wal_secret has no value, or may not be read';
      END IF;
      pgs_head := pg_catalog.concat(pgs_secret, ' ', {key}, ' ',
        {relation}::pg_catalog.oid, ' ', {head});
      IF pgs_try = @by_error@ THEN
        -- What broke is reported in place of the rows.
        pgs_text := pg_catalog.concat(pgs_head, ',"error":',
          pg_catalog.to_json(pg_catalog.left(pgs_error, 400)), '}}');
      ELSIF pgs_moved IS NULL AND pg_catalog.octet_length(pgs_lines) <= @room@ THEN
        pgs_text := pg_catalog.concat(pgs_head, E'}}\n', pgs_lines);
      ELSE
        pgs_room := @room@;
        pgs_messages := '{{}}';
        pgs_flags := E'}}\n';"""
    + PIECES
    + r"""
            IF pgs_size < 0 THEN
              -- One row is longer than a message should be: it goes by itself, and whole."""
    + LONG_LINE
    + r"""
              IF pgs_size < 0 THEN
                pgs_size := pg_catalog.octet_length(pgs_piece);
              END IF;
            END IF;
            pgs_messages := pg_catalog.array_append(pgs_messages, pg_catalog.concat(
              pgs_head, pgs_flags, pg_catalog.convert_from(
                substring(pgs_piece FROM 1 FOR pgs_size), pgs_encoding)));
            pgs_at := pgs_at + pgs_size + 1;
          END LOOP;
          pgs_flags := E',"moved":true}}\n';
        END LOOP;
      END IF;
      IF pgs_messages IS NULL THEN
        OPEN pgs_sending NO SCROLL FOR
          SELECT pg_catalog.pg_logical_emit_message(true, '@prefix@', pgs_text);
      ELSE
        OPEN pgs_sending NO SCROLL FOR
          SELECT pg_catalog.pg_logical_emit_message(
            true, '@prefix@', pg_catalog.unnest(pgs_messages));
      END IF;
      EXIT;"""
)

BODY = body(
    _WORK.replace("@room@", str(_ROOM)).replace("@prefix@", MESSAGE_PREFIX),
    "pgs_sending",
    _RUN,
    """
  pgs_sending pg_catalog.refcursor;
  pgs_secret pg_catalog.int8;""",
    BY_NOTICE,
)
