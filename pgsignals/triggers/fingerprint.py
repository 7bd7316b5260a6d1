"""The fingerprint of watched tables and their triggers, which shows that somebody changed them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from .definitions import Definition
from .publications import IDENTITY_COLUMNS, parts


@dataclass(frozen=True)
class Fingerprint:
    """The watched tables and their triggers as the catalogue has them at one moment.

    ``tables`` is a digest of their names, columns and relatives, ``target`` one of the rights on
    the relations that triggers write to. ``triggers`` has, by the trigger's name, its tables, its
    level, and the versions of the catalogue's rows for it and its function, so that a trigger shows
    that was disabled and enabled again, dropped and made again, or given to another owner.
    ``relations`` has, by OID, the version and a digest of the catalogue's row for a table.
    """

    tables: str
    triggers: Mapping[str, str]
    target: str
    relations: Mapping[str, str]

    def encode(self) -> str:
        """Return the text that a consumer keeps, which has all but ``tables``."""
        kept = _Kept(dict(self.triggers), self.target, dict(self.relations))
        return msgspec.json.encode(kept).decode()

    def has_target_of(self, kept: str) -> bool:
        """Whether the ``target`` is that of the text ``kept``."""
        try:
            return _kept.decode(kept).target == self.target
        except msgspec.MsgspecError:
            return False

    def undone(self, former: Mapping[str, str]) -> bool:
        """Whether a table has been altered and altered back since, so that rows may have gone by.

        That is so, for instance, if it was attached below another table and detached again; also if
        another change to it, made in between, has stayed.
        """
        return any(
            _Relation.read(self.relations[oid]).undone(_Relation.read(former[oid]))
            for oid in self.relations.keys() & former.keys()
        )

    def covers(
        self, kept: str, own: Mapping[str, Sequence[str]], unread: Mapping[str, Sequence[str]]
    ) -> bool:
        """Whether every change since ``kept`` was kept has fired a trigger that is read.

        ``own`` has the names of the present triggers, each with the former ones of its watcher. A
        new trigger is covered by a former one that is unchanged, has all its tables, and is a row
        trigger if the new one has to be. A trigger that was there all along does not cover the
        changes of those that are ``unread`` by now, if they had more tables.
        """
        try:
            former = _kept.decode(kept)
        except msgspec.MsgspecError:
            return False
        if former.target != self.target or self.undone(former.relations):
            return False
        for name, others in own.items():
            reach = _reach(self.triggers.get(name, ""))
            if any(not _reach(former.triggers.get(each, "")) <= reach for each in unread[name]):
                return False
            known = [each for each in (name, *others) if each in former.triggers]
            if known and not any(
                self.triggers.get(each) == former.triggers[each]
                and _reach(former.triggers[each]) >= reach
                for each in known
            ):
                return False
        return True


@dataclass(frozen=True)
class _Relation:
    """A table as the catalogue has it: the xmin of its row, and digests of that row and its name.

    ``named`` is the xmin of its type's row, which every renaming writes anew. ``columns`` are the
    xmins of its columns' rows, by number, which attaching and detaching the table write anew.
    """

    row: str
    content: str
    named: str = ""
    name: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, entry: str) -> _Relation:
        row, content, *evidence = entry.split(" ")
        if not evidence:
            return cls(row, content)
        named, name, columns = evidence
        numbered = (each.split("=") for each in columns.split(",") if each)
        return cls(row, content, named, name, dict(numbered))

    def undone(self, former: _Relation) -> bool:
        if self.row != former.row:
            if self.content == former.content:
                return True
            if self.name == former.name and self.named != former.named:
                return True
        # A table that inherits for a while keeps its own row; only its columns' rows show that.
        common = self.columns.keys() & former.columns.keys()
        return bool(common) and all(self.columns[each] != former.columns[each] for each in common)


class _Kept(msgspec.Struct):
    triggers: dict[str, str]
    target: str = msgspec.field(name="outbox")
    relations: dict[str, str]


_kept = msgspec.json.Decoder(_Kept)


def _reach(entry: str) -> set[tuple[str, str]]:
    """Return the tables and levels of a trigger's entry; a row trigger also covers statements."""
    found = set()
    for each in filter(None, entry.split(",")):
        table, row, *_ = each.split(" ")
        found |= {(table, "0"), (table, row)}
    return found


# A digest of the rights on the relations that triggers write to.
TARGET = """
  SELECT pg_catalog.md5(coalesce(pg_catalog.string_agg(line, E'\\n' ORDER BY line), '')) FROM (
    SELECT pg_catalog.concat_ws(' ', n.nspacl, n.nspowner, c.relname, c.relacl, c.relowner, n.xmin,
                                c.xmin) AS line
    FROM pg_catalog.pg_namespace n JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid
    WHERE n.nspname = 'pgsignals' AND (c.relkind = 'S' OR c.relname = 'outbox')
  ) AS lines
"""

# The replica identity of the table of a row ``c``. An index that somebody chose shows by its row's
# version that another was chosen meanwhile. A key shows neither that its index was built anew
# (REINDEX CONCURRENTLY), nor that the identity has become FULL, which has all that the key has.
_IDENTITY = f"""(
  SELECT pg_catalog.string_agg(CASE c.relreplident
    WHEN 'i' THEN pg_catalog.concat_ws('/', i.indexrelid, i.xmin)
    ELSE pg_catalog.array_to_string({IDENTITY_COLUMNS}, '/') END, '/')
  FROM pg_catalog.pg_index AS i
  WHERE i.indrelid = c.oid
    AND CASE c.relreplident WHEN 'i' THEN i.indisreplident ELSE i.indisprimary END)"""

# One row. Each look at the triggers reads it, so that it takes only a few index look-ups a table.
QUERY = (
    """
SELECT (
  SELECT pg_catalog.md5(coalesce(pg_catalog.string_agg(line, E'\\n' ORDER BY line), '')) FROM (
    SELECT pg_catalog.concat_ws(' ', 'name', c.oid, n.nspname, c.relname, c.relkind,
                                c.relispartition) AS line
    FROM ROWS FROM (pg_catalog.unnest(%(schemas)s::text[]), pg_catalog.unnest(%(names)s::text[]))
      AS given (schema, name)
    JOIN pg_catalog.pg_namespace n ON n.nspname = given.schema
    JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = given.name
    UNION ALL
    SELECT pg_catalog.concat_ws(' ', 'column', attrelid, attnum, attname, atttypid, attgenerated)
    FROM pg_catalog.pg_attribute
    WHERE attrelid = ANY (%(tables)s::oid[]) AND attnum > 0 AND NOT attisdropped
    UNION ALL
    SELECT pg_catalog.concat_ws(' ', 'child', i.inhparent, i.inhrelid)
    FROM pg_catalog.pg_inherits i
    JOIN pg_catalog.pg_class c ON c.oid = i.inhparent AND c.relkind = 'r'
    WHERE i.inhparent = ANY (%(tables)s::oid[])
    UNION ALL
    SELECT pg_catalog.concat_ws(' ', 'parent', inhrelid, inhparent)
    FROM pg_catalog.pg_inherits WHERE inhrelid = ANY (%(tables)s::oid[])
    UNION ALL
    -- Whether rows can serve a table is also a matter of its partitions.
    SELECT pg_catalog.concat_ws(' ', 'identity', c.oid, c.relkind, c.relpersistence, c.relreplident,
                                """
    + _IDENTITY
    + """)
    FROM ("""
    + parts("""
      SELECT DISTINCT pg_catalog.unnest(pg_catalog.string_to_array(
        pg_catalog.split_part(each.name, ' ', 3), ',')::oid[])
      FROM pg_catalog.unnest(%(triggers)s::text[]) AS each (name)
      WHERE each.name LIKE 'rows %%'""")
    + """) AS member
    JOIN pg_catalog.pg_class AS c ON c.oid = member.oid
  ) AS lines
), (
  SELECT coalesce(pg_catalog.json_object_agg(name, entry), '{}')::text FROM (
    SELECT t.tgname AS name, pg_catalog.string_agg(
      pg_catalog.concat_ws(' ', t.tgrelid, t.tgtype & 1, t.oid, t.xmin, t.tgenabled, p.oid, p.xmin,
                           parts.touched),
      ',' ORDER BY t.tgrelid) AS entry
    FROM pg_catalog.pg_trigger t JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid
    -- Of the triggers of partitions, which come and go, those that somebody has disabled, say,
    -- since they were made: what depends on what is written then, and not again.
    LEFT JOIN (
      SELECT c.tgfoid, pg_catalog.string_agg(
        pg_catalog.concat_ws(' ', c.oid, c.xmin), ' ' ORDER BY c.oid) AS touched
      FROM pg_catalog.pg_trigger c
      JOIN pg_catalog.pg_depend d ON d.classid = 'pg_catalog.pg_trigger'::pg_catalog.regclass
        AND d.objid = c.oid AND d.objsubid = 0 AND d.deptype = 'P'
      WHERE c.tgparentid <> 0 AND c.tgname = ANY (%(triggers)s::name[]) AND c.xmin <> d.xmin
      GROUP BY 1
    ) AS parts ON parts.tgfoid = t.tgfoid
    WHERE t.tgrelid = ANY (%(tables)s::oid[]) AND t.tgname = ANY (%(triggers)s::name[])
      AND t.tgparentid = 0
    GROUP BY 1
    UNION ALL
    -- Tables whose rows are read from the log: a publication serves them as a row trigger would.
    SELECT asked.name, pg_catalog.string_agg(
      pg_catalog.concat_ws(' ', r.prrelid, 1, r.oid, r.xmin, p.oid, p.xmin,
                           CASE WHEN p.pubupdate THEN """
    + _IDENTITY
    + """ END), ','
      ORDER BY r.prrelid)
    FROM (SELECT DISTINCT name FROM pg_catalog.unnest(%(triggers)s::text[]) AS each (name))
      AS asked
    JOIN pg_catalog.pg_publication p ON p.pubname = pg_catalog.split_part(asked.name, ' ', 2)
    JOIN pg_catalog.pg_publication_rel r ON r.prpubid = p.oid AND r.prrelid = ANY (
      pg_catalog.string_to_array(pg_catalog.split_part(asked.name, ' ', 3), ',')::oid[])
    JOIN pg_catalog.pg_class AS c ON c.oid = r.prrelid
    WHERE asked.name LIKE 'rows %%'
    GROUP BY 1
  ) AS entries
), ("""
    + TARGET
    + """), (
  -- Without what VACUUM and ANALYZE write into a row in its place.
  SELECT coalesce(pg_catalog.json_object_agg(c.oid, pg_catalog.concat_ws(' ', c.xmin,
    pg_catalog.md5(pg_catalog.concat_ws(' ', relname, relnamespace, relowner, relacl, relam,
      relfilenode, reltablespace, reltoastrelid, relpersistence, relkind, relnatts, relchecks,
      relhasrules, relhastriggers, relhassubclass, relrowsecurity, relforcerowsecurity,
      relreplident, relispartition, reloftype, reloptions)),
    t.xmin, pg_catalog.md5(pg_catalog.concat_ws(' ', relname, relnamespace, relowner)),
    (SELECT coalesce(pg_catalog.string_agg(
       pg_catalog.concat(attnum, '=', a.xmin), ',' ORDER BY attnum), '')
     FROM pg_catalog.pg_attribute AS a WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped)
  )), '{}')::text
  FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_type AS t ON t.oid = c.reltype
  WHERE c.oid = ANY (%(tables)s::oid[])
), pg_catalog.clock_timestamp()
"""
)


@dataclass(frozen=True)
class Question:
    """The parameters of QUERY for resolved definitions; ``others`` are names of former triggers."""

    definitions: Sequence[Definition]
    others: Collection[str] = field(default=())

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters of QUERY."""
        tables = {
            (relation.schema, relation.name, relation.oid)
            for definition in self.definitions
            for relation in definition.trigger.spec.relations
        }
        own = [definition.trigger.witness for definition in self.definitions]
        return {
            "schemas": [schema for schema, _, _ in tables],
            "names": [name for _, name, _ in tables],
            "tables": [oid for _, _, oid in tables],
            "triggers": [*own, *self.others],
        }


def parse(row: Sequence[Any]) -> Fingerprint:
    """Return the fingerprint of a row of QUERY, but for the time that is last in it."""
    tables, triggers, target, relations = row
    return Fingerprint(
        tables, msgspec.json.decode(triggers), target, msgspec.json.decode(relations)
    )
