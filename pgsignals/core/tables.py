"""Tables as values: as a model describes its own, and as PostgreSQL does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from .errors import TableError, near
from .home import Home


@dataclass(frozen=True)
class TableRef:
    """A table as its model describes it, before the catalogue is asked.

    ``schema`` None means that the name is looked up through ``search_path``. ``attributes`` maps
    attribute names to column names (a column that is not in it goes by its own name; of two
    attributes for one column, receivers see the first). ``key`` lists the key's columns as the
    model declares them, for tables that have no primary key in the database. ``only`` restricts
    the model to the rows whose column holds one of the values (single-table inheritance).
    ``elsewhere`` names attributes that live in another table, for a clear error. ``home`` is the
    model's database, if its framework knows it.
    """

    name: str
    schema: str | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)
    key: tuple[str, ...] = ()
    only: tuple[str, tuple[object, ...]] | None = None
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    home: Home | None = None


@dataclass(frozen=True)
class Column:
    """A column, with what is needed to render and compare its values.

    ``base_oid`` is the type beneath any domain, which is the one that a query's result announces.
    ``output`` is the type's output function. ``virtual`` marks a generated column that is not
    stored, which triggers do not see.
    """

    name: str
    attribute: str
    base_oid: int
    base_type: tuple[str, str]
    output: tuple[str, str]
    domain: bool
    comparable: bool
    settled: bool
    virtual: bool = False


@dataclass(frozen=True)
class Relation:
    """A table by its name, and by its OID, which stays when the name changes."""

    schema: str
    name: str
    oid: int


@dataclass(frozen=True)
class Table:
    """A table as the catalogue describes it. ``key`` holds column names, in the key's order.

    ``inherits`` says that it is a partition, or another's child. ``children`` inherit from it, near
    and far; partitions are not among them.
    """

    schema: str
    name: str
    oid: int
    partitioned: bool
    inherits: bool
    columns: tuple[Column, ...]
    key: tuple[str, ...]
    only: tuple[str, tuple[object, ...]] | None = None
    aliases: Mapping[str, str] = field(default_factory=dict, hash=False)
    elsewhere: Mapping[str, str] = field(default_factory=dict, hash=False)
    children: tuple[Relation, ...] = ()

    @property
    def qualified(self) -> str:
        """The name for messages: ``schema.table``."""
        return f"{self.schema}.{self.name}"

    @cached_property
    def key_columns(self) -> tuple[Column, ...]:
        """The key's columns, in the key's order."""
        by_name = {column.name: column for column in self.columns}
        return tuple(by_name[name] for name in self.key)

    @cached_property
    def _by_attribute(self) -> Mapping[str, Column]:
        by_name = {column.name: column for column in self.columns}
        found = {attribute: by_name[name] for attribute, name in self.aliases.items()}
        found.update((column.attribute, column) for column in self.columns)
        return found

    def column(self, attribute: str) -> Column:
        """Return the column that the model calls ``attribute``.

        Raises TableError, with near names, if there is none, and for a virtual column.
        """
        column = self._by_attribute.get(attribute)
        if column is not None and column.virtual:
            raise TableError(
                f"{self.qualified} computes {attribute!r} when it is read (VIRTUAL), and "
                "triggers do not. Name the columns that it is made of, or make it STORED."
            )
        if column is not None:
            return column
        if attribute in self.elsewhere:
            raise TableError(
                f"{attribute!r} is not a column of {self.qualified}: it lives in the table "
                f"{self.elsewhere[attribute]}. Watch the model of that table for it."
            )
        meant = [c.attribute for c in self.columns if c.name == attribute]
        hint = (
            f" by the model's names: it is {meant[0]!r} there."
            if meant
            else near(attribute, self._by_attribute)
        )
        raise TableError(
            f"{self.qualified} has no column {attribute!r}{hint} "
            f"Its columns: {', '.join(c.attribute for c in self.columns)}."
        )


class Resolver(Protocol):
    """Knows the tables of one kind of model (a plugin of the hook ``pgsignals_resolver``)."""

    name: str

    def resolve(self, model: object) -> TableRef | None:
        """Return the table as the model describes it; None if the model is not of this kind.

        Raises ModelError for a model of this kind that has no table of its own.
        """

    def load(
        self, model: object, table: Table, session: object, ids: Sequence[tuple[object, ...]]
    ) -> list[Any] | None:
        """Return the records with these keys, by one query, in the order of ``ids``.

        Each id is a tuple of key values in the order of ``table.key``. Records that are gone are
        left out. Return None if this resolver cannot use a session of that kind. Parameters
        of the resolver's own, with defaults, are options of the user's ``load``.
        """
