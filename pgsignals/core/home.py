"""The database in which a model's framework keeps its rows."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Home:
    """The database that a framework's settings give a model.

    ``name`` is what errors call it, ``dsn`` leads there, or is None for a database of another kind
    than PostgreSQL; ``fix`` says how a Hub is started for it.
    """

    model: str
    name: str
    dsn: str | None = field(repr=False)
    fix: str = ""
