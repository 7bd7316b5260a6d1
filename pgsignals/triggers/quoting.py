"""Quotes identifiers and texts for SQL without a connection."""

from __future__ import annotations


def quoted_identifier(name: str) -> str:
    """An identifier for SQL."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """A text for SQL, whatever standard_conforming_strings says."""
    escaped = text.replace("'", "''")
    return f"'{escaped}'" if "\\" not in escaped else "E'" + escaped.replace("\\", "\\\\") + "'"


def dollar_quoted(body: str) -> str:
    """A function's body between tags that it does not have."""
    tag = "$pgsignals$"
    while tag in body:
        tag = f"{tag[:-1]}_$"
    return f"{tag}{body}{tag}"


def quoted(*names: str) -> str:
    """A qualified identifier for a query that has parameters."""
    return ".".join('"' + name.replace('"', '""') + '"' for name in names).replace("%", "%%")
