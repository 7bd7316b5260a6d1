"""Our publications: makes them, puts tables in, and takes those out that nobody needs there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from psycopg2.extensions import cursor as Cursor

from . import names
from .quoting import dollar_quoted, literal

_NAMES = f"'{names.PUBLICATION}', '{names.INSERTS_PUBLICATION}'"


# SQL for the numbers of the columns of an index's row ``i`` that are in a replica identity.
IDENTITY_COLUMNS = "(i.indkey::int2[])[0:i.indnkeyatts - 1]"

# SQL for whether the index of a row ``i`` is the replica identity of the table of a row ``c``.
IS_IDENTITY = """(i.indrelid = c.oid AND i.indimmediate AND i.indisvalid
    AND CASE c.relreplident WHEN 'd' THEN i.indisprimary WHEN 'i' THEN i.indisreplident
        ELSE false END)"""


def has_identity(unpublished: str = "g.attgenerated <> ''") -> str:
    """Return SQL for whether rows of the table of a row ``c`` of pg_class can be published.

    PostgreSQL refuses to update and delete rows of a table without a replica identity while it is
    published with its updates; from version 18 on, also if a column of the identity is not
    published. ``unpublished`` asks whether the one of ``g`` is not; ours publish no computed one.
    """
    refused = f"""pg_catalog.current_setting('server_version_num')::int >= 180000 AND EXISTS (
    SELECT FROM pg_catalog.pg_attribute AS g
    WHERE g.attrelid = c.oid AND g.attnum > 0 AND NOT g.attisdropped AND ({unpublished})"""
    return f"""(c.relreplident = 'f' AND NOT ({refused})))
  OR EXISTS (SELECT FROM pg_catalog.pg_index AS i WHERE {IS_IDENTITY}
    AND NOT ({refused} AND g.attnum = ANY ({IDENTITY_COLUMNS}))))"""


HAS_IDENTITY = has_identity()


def parts(roots: str) -> str:
    """Return a query for tables and their partitions, near and far: the table's OID, and each's.

    ``roots`` is a query for the tables' OIDs. Unlike pg_partition_tree, this waits for nobody who
    has locked a partition.
    """
    return f"""WITH RECURSIVE part (root, oid) AS (
    SELECT roots.oid, roots.oid FROM ({roots}) AS roots (oid)
    UNION ALL SELECT part.root, h.inhrelid FROM part
    JOIN pg_catalog.pg_inherits AS h ON h.inhparent = part.oid
    JOIN pg_catalog.pg_class AS k ON k.oid = h.inhrelid AND k.relispartition
  ) SELECT part.root, part.oid FROM part"""


def creating_publications() -> list[str]:
    """Return the statements that make the publications, unless they are there."""
    return [
        _do(
            "BEGIN\n"
            "  IF NOT EXISTS (SELECT FROM pg_catalog.pg_publication\n"
            f"      WHERE pubname OPERATOR(pg_catalog.=) '{name}') THEN\n"
            f"    CREATE PUBLICATION {name} WITH (publish = '{published}',\n"
            "      publish_via_partition_root = true);\n"
            "  END IF;\n"
            "END"
        )
        for name, published in (
            (names.PUBLICATION, "insert, update, delete, truncate"),
            (names.INSERTS_PUBLICATION, "insert, truncate"),
        )
    ]


def _do(code: str) -> str:
    return f"DO {dollar_quoted(code)}"


def publishing(table: str, publication: str) -> str:
    """Return a statement that publishes a table, unless that would break its writes."""
    oid = f"{literal(table)}::pg_catalog.regclass"
    members, check = parts(f"SELECT {oid}::pg_catalog.oid"), ""
    if publication == names.PUBLICATION:
        check = (
            f"  IF EXISTS (SELECT FROM pg_catalog.pg_class AS c WHERE c.oid IN (\n"
            f"        SELECT part.oid FROM ({members}) AS part)\n"
            f"      AND (c.relkind = 'r' OR c.oid = {oid}) AND NOT ({HAS_IDENTITY})) THEN\n"
            f"    RAISE EXCEPTION '% does not fit a publication any more', {literal(table)}\n"
            "      USING ERRCODE = 'object_not_in_prerequisite_state';\n"
            "  END IF;\n"
        )
    return _do(
        "BEGIN\n"
        f"{check}"
        "  IF NOT EXISTS (SELECT FROM pg_catalog.pg_publication_rel AS r\n"
        "      JOIN pg_catalog.pg_publication AS p ON p.oid = r.prpubid\n"
        f"      WHERE p.pubname = '{publication}' AND r.prrelid = {oid}) THEN\n"
        f"    ALTER PUBLICATION {publication} ADD TABLE ONLY {table};\n"
        "  END IF;\n"
        "END"
    )


# The schema, name and columns of the tables in our publications, by its name and their OIDs.
Published = Mapping[tuple[str, int], tuple[str, str, Sequence[str]]]

_PUBLISHED = """
SELECT p.pubname::text, r.prrelid, n.nspname::text, c.relname::text,
       ARRAY(SELECT a.attname::text FROM pg_catalog.pg_attribute a
             WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
               AND a.attgenerated = '')
FROM pg_catalog.pg_publication p
JOIN pg_catalog.pg_publication_rel r ON r.prpubid = p.oid
JOIN pg_catalog.pg_class c ON c.oid = r.prrelid
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE p.pubname = ANY (%s)
"""


def read_published(cursor: Cursor) -> Published:
    """Return the tables in our publications."""
    cursor.execute(_PUBLISHED, ([names.PUBLICATION, names.INSERTS_PUBLICATION],))
    return {(each, oid): (*named, columns) for each, oid, *named, columns in cursor.fetchall()}


# A mark's comment is JSON: within a text of the user's, quotes have backslashes before them.
_LEFT_OVER = f"""
SELECT p.pubname, r.prrelid
FROM pg_catalog.pg_publication AS p
JOIN pg_catalog.pg_publication_rel AS r ON r.prpubid OPERATOR(pg_catalog.=) p.oid
WHERE p.pubname IN ({_NAMES}) AND NOT EXISTS (
  SELECT FROM pg_catalog.pg_proc AS f
  JOIN pg_catalog.pg_description AS d ON d.objoid = f.oid
    AND d.classoid = 'pg_catalog.pg_proc'::pg_catalog.regclass
  WHERE f.proname LIKE 'pgsignals\\_%' AND f.pronargs = 0
    AND d.description LIKE '%"rows": true%'
    AND (d.description LIKE '%"op": "inserted"%' OR d.description LIKE '%"op": "truncated"%')
      = (p.pubname = '{names.INSERTS_PUBLICATION}')
    AND r.prrelid = ANY (pg_catalog.string_to_array(pg_catalog.substring(
      f.prosrc, '''\\{{([0-9,]+)\\}}''::pg_catalog\\.oid\\[\\]'), ',')::pg_catalog.oid[]))
"""

# They have to be there while somebody may read the log, whatever is in them, and be older than what
# is read.
_UNUSED = f"""
SELECT p.pubname
FROM pg_catalog.pg_publication AS p
WHERE p.pubname IN ({_NAMES}) AND pg_catalog.pg_has_role(p.pubowner, 'USAGE')
  AND NOT EXISTS (
    SELECT FROM pg_catalog.pg_replication_slots AS s
    WHERE s.database = pg_catalog.current_database() AND s.slot_name LIKE 'pgsignals\\_%')
  AND NOT EXISTS (
    SELECT FROM pg_catalog.pg_proc AS f
    JOIN pg_catalog.pg_description AS d ON d.objoid = f.oid
      AND d.classoid = 'pg_catalog.pg_proc'::pg_catalog.regclass
    WHERE f.proname LIKE 'pgsignals\\_%' AND f.pronargs = 0
      AND d.description LIKE '{{"pgsignals": %' AND d.description LIKE '%"delivery": "wal"%')
"""


# Each UPDATE and DELETE of such a table, or of such a partition, fails for everybody.
_BREAKING = f"""
SELECT DISTINCT n.nspname, published.relname
FROM pg_catalog.pg_publication AS p
JOIN pg_catalog.pg_publication_rel AS r ON r.prpubid = p.oid
JOIN pg_catalog.pg_class AS published ON published.oid = r.prrelid
JOIN pg_catalog.pg_namespace AS n ON n.oid = published.relnamespace
JOIN ({parts("SELECT prrelid FROM pg_catalog.pg_publication_rel")}) AS leaf ON leaf.root = r.prrelid
JOIN pg_catalog.pg_class AS c ON c.oid = leaf.oid AND c.relkind = 'r'
WHERE p.pubname = '{names.PUBLICATION}' AND NOT ({HAS_IDENTITY})
"""


def breaking(cursor: Cursor) -> list[tuple[str, str]]:
    """Return the schema and name of each table whose writes fail, since it is published by us.

    It has no replica identity any more, or one that cannot be published: somebody has dropped its
    key, say. Or a partition of it is such a table.
    """
    cursor.execute(_BREAKING)
    return list(cursor.fetchall())


def left_over(cursor: Cursor) -> bool:
    """Whether a publication of ours has a table that no watcher of any namespace needs there."""
    cursor.execute(f"SELECT EXISTS ({_LEFT_OVER})")
    [(found,)] = cursor.fetchall()
    return bool(found)


def unused(cursor: Cursor) -> list[str]:
    """Return the names of our publications if nobody needs them and this role may drop them."""
    cursor.execute(_UNUSED)
    return [name for (name,) in cursor.fetchall()]


def tidying(*, whole: bool) -> str:
    """Return a statement that takes out the tables that nobody needs in our publications.

    With ``whole``, it drops the publications, too, where nobody reads through them any more. Run it
    under the install lock, since an installer puts a table there before its mark is to be seen.
    """
    drop = (
        "\n  FOR found IN"
        f"{_UNUSED}"
        "  LOOP\n"
        "    EXECUTE pg_catalog.format('DROP PUBLICATION %I', found.pubname);\n"
        "  END LOOP;"
    )
    return (
        "DO $pgsignals$ DECLARE\n"
        "  found record;\n"
        "BEGIN\n"
        "  FOR found IN"
        f"{_LEFT_OVER}"
        "  LOOP\n"
        "    EXECUTE pg_catalog.format('ALTER PUBLICATION %I DROP TABLE ONLY %s',\n"
        "      found.pubname, found.prrelid::pg_catalog.regclass);\n"
        f"  END LOOP;{drop if whole else ''}\n"
        "END $pgsignals$"
    )
