"""The database in which a model's framework keeps its rows."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Home:
    """The database that a framework's settings give a model.

    ``name`` is its name in errors. ``dsn`` leads there; it is None for a database of another kind
    than PostgreSQL. ``fix`` says how to start a Hub for it.
    """

    model: str
    name: str
    dsn: str | None = field(repr=False)
    fix: str = ""
