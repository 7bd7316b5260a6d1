"""The common parts of the bodies of all trigger functions, which ``sql`` qualifies and fills in.

Nothing here may break the write that fires it. A function does all its work in a block that catches
every error, and tries again with less: first the rows, then the error in their place, then only the
notice that something is missing. What follows the block has been proved inside it.
"""

from __future__ import annotations

from ...core.payload import SILENT
from .. import names

# The payload of a wake-up by a function that could do no more.
CANNOT_WRITE = "no outbox"

# The placeholder, in the functions' texts, of the OID of the table that they serve.
TABLES = "{pgsignals_tables}"

# The tries of a function: with the rows as the trigger's variables have them, with the rows as a
# statement planned anew reads them, with the error in place of the rows, then with fixed texts.
BY_VARIABLES, BY_STATEMENT, BY_ERROR, BY_COUNT, BY_NOTICE = range(5)

GUARDED = """
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

# The beginning of each try: whether the table is ours, and one look for all that is not ordinary.
PROLOGUE = """
      IF pgs_try < @by_count@ AND NOT {mine} THEN
        IF NOT {sure} THEN
          RETURN NULL;
        END IF;{remember}
      END IF;
      -- One look at all that is out of the ordinary.
      IF pgs_try > @by_statement@ OR pg_catalog.concat(
        pg_catalog.current_setting('pgsignals.muted', true),
        pg_catalog.current_setting('pgsignals.context', true)"""

MUTED = """
        IF pg_catalog.current_setting('pgsignals.muted', true) = 'on' THEN
          RETURN NULL;
        END IF;"""

CONTEXT = """
        pgs_text := pg_catalog.current_setting('pgsignals.context', true);
        IF pgs_text <> '' AND pg_catalog.octet_length(pgs_text) <= 2000 THEN
          pgs_text := pg_catalog.to_json(pgs_text)::pg_catalog.text;
          IF pg_catalog.octet_length(pgs_text) <= 4000 THEN
            pgs_context := ',"c":' || pgs_text;
          END IF;
        END IF;"""

# The beginning of the loop that cuts lines into messages: sets pgs_piece to the bytes that fit, and
# pgs_size to the length of its whole lines, or to a negative number if not even one line fits.
PIECES = r"""
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

# Sets pgs_piece to bytes that begin with a whole line longer than a message, and pgs_size to that
# line's length, or to -1 if the line is the last.
LONG_LINE = r"""
              pgs_size := 16384;
              LOOP
                pgs_piece := substring(pgs_data FROM pgs_at FOR pgs_size);
                EXIT WHEN pg_catalog.octet_length(pgs_piece) < pgs_size
                  OR position(E'\\x0a'::pg_catalog.bytea IN pgs_piece) > 0;
                pgs_size := pgs_size * 2;
              END LOOP;
              pgs_size := position(E'\\x0a'::pg_catalog.bytea IN pgs_piece) - 1;"""


def body(work: str, proof: str, proved: str, declarations: str, last: int) -> str:
    """Return a body whose tries do the ``work``; the try ``last`` does what can hardly fail.

    After the block, the body does what is ``proved``, if the variable ``proof`` is set by then.
    """
    text = GUARDED
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
