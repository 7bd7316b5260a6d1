"""Quotes identifiers and texts for SQL without a connection."""

from __future__ import annotations

from psycopg2 import sql


def quoted_identifier(name: str) -> str:
    """Return an identifier for SQL."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """Return a text for SQL that is right whatever standard_conforming_strings says."""
    escaped = text.replace("'", "''")
    return f"'{escaped}'" if "\\" not in escaped else "E'" + escaped.replace("\\", "\\\\") + "'"


def dollar_quoted(body: str) -> str:
    """Return a function's body between tags that do not occur in it."""
    tag = "$pgsignals$"
    while tag in body:
        tag = f"{tag[:-1]}_$"
    return f"{tag}{body}{tag}"


def quoted(*names: str) -> str:
    """Return a qualified identifier for a query that has parameters."""
    return ".".join('"' + name.replace('"', '""') + '"' for name in names).replace("%", "%%")


def rendered(text: sql.Composable) -> str:
    """Return composed SQL as text; its literals are texts."""
    if isinstance(text, sql.Composed):
        return "".join(map(rendered, text.seq))
    if isinstance(text, sql.Identifier):
        return ".".join(map(quoted_identifier, text.strings))
    if isinstance(text, sql.Literal):
        return literal(text.wrapped)
    assert isinstance(text, sql.SQL), text
    return text.string
