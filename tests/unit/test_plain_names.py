"""How a table's name is read from text."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pgsignals.errors import ModelError
from pgsignals.triggers.quoting import quoted
from pgsignals.triggers.resolvers.plain import parse_name

NAMES = st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), min_size=1)
BARE_NAMES = NAMES.filter(lambda name: not set(name) & {'"', "."})


@pytest.mark.parametrize(
    ("text", "schema", "name"),
    [
        ("orders", None, "orders"),
        ("public.orders", "public", "orders"),
        ("Order", None, "Order"),
        ('"My Schema"."My.Table"', "My Schema", "My.Table"),
        ('audit."Log"', "audit", "Log"),
        ('"say ""hi"""', None, 'say "hi"'),
        ("Größe", None, "Größe"),
    ],
)
def test_reads_a_name(text: str, schema: str | None, name: str) -> None:
    """A name is read as written: nothing is folded, and quotes allow any character."""
    assert parse_name(text) == (schema, name)


@pytest.mark.parametrize(
    "text",
    ["", ".", "a.", ".a", "a..b", "a.b.c", '"a', 'a"b', '""', '"a"b', '"a" . "b"', "a\0", '"\0"'],
)
def test_refuses_what_is_no_name(text: str) -> None:
    """Text that is no name is refused with the two forms that are."""
    with pytest.raises(ModelError, match=r"'table' or 'schema\.table'"):
        parse_name(text)


@given(NAMES, NAMES)
@example('"', ".")
@example("%s", "\n")
def test_reads_back_any_quoted_name(schema: str, name: str) -> None:
    """Every name that PostgreSQL can have can be said in quotes."""
    assert parse_name(quoted(name).replace("%%", "%")) == (None, name)
    assert parse_name(quoted(schema, name).replace("%%", "%")) == (schema, name)


@given(BARE_NAMES, BARE_NAMES)
def test_takes_a_bare_name_literally(schema: str, name: str) -> None:
    """Without quotes and dots, the text is the name."""
    assert parse_name(f"{schema}.{name}") == (schema, name)


@given(st.text(st.sampled_from('a".% \0')))
def test_reads_or_refuses_any_text(text: str) -> None:
    """Whatever is read has the parts of a name; everything else is a ModelError."""
    try:
        schema, name = parse_name(text)
    except ModelError:
        return
    assert name
    assert schema is None or schema
