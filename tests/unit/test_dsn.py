"""Connection strings of other libraries, and what is said of those that libpq does not know."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg2.extensions import parse_dsn
from pydantic import PostgresDsn, TypeAdapter

from pgsignals.core.errors import ConnectError
from pgsignals.postgres.connection import connect
from pgsignals.postgres.dsn import dsn_of, libpq_dsn


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        # Prisma.
        ("postgresql://u:p@h:5/db?schema=public", "host=h port=5 dbname=db user=u password=p"),
        (
            "postgres://h/db?schema=shop&sslmode=require",
            "host=h dbname=db sslmode=require options='-c search_path=\"shop\"'",
        ),
        (
            "postgresql://h/db?connection_limit=5&pool_timeout=2&pgbouncer=true&socket_timeout=9",
            "host=h dbname=db",
        ),
        (
            "postgresql://h/db?sslmode=require&sslaccept=strict",
            "host=h dbname=db sslmode=verify-full",
        ),
        (
            "postgresql://h/db?sslaccept=accept_invalid_certs&sslmode=require",
            "host=h dbname=db sslmode=require",
        ),
        # asyncpg.
        ("postgresql://h/db?ssl=verify-full", "host=h dbname=db sslmode=verify-full"),
        (
            "postgresql+asyncpg://h/db?timeout=3&command_timeout=5&statement_cache_size=0",
            "host=h dbname=db connect_timeout=3",
        ),
        # Heroku, Django, and a shell's line.
        ("postgres://u@h/db\n", "host=h dbname=db user=u"),
        (" host=h dbname=db ", "host=h dbname=db"),
        ("postgresql://h/db?ssl=true&options=-c%20jit%3Doff", "host=h dbname=db sslmode=require"
         " options='-c jit=off'"),
        ("postgresql+psycopg://h:1,i:2/db?target_session_attrs=any", "host=h,i port=1,2 dbname=db"
         " target_session_attrs=any"),
        # Whose password has a "?", as libpq takes it.
        ("postgresql://u:a?ssl=true@h/db", "host=h dbname=db user=u password='a?ssl=true'"),
    ],
)  # fmt: skip
def test_the_urls_of_others(url: str, expected: str) -> None:
    """What asyncpg, SQLAlchemy and Prisma take leads to the same place here."""
    assert parse_dsn(libpq_dsn(url)) == parse_dsn(expected)
    assert parse_dsn(libpq_dsn(dsn_of(url))) == parse_dsn(expected)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:p%40ss@h:5/db?sslmode=require",
        "postgresql+asyncpg://u:p%40ss@h1:1,h2:2/db?ssl=require",
    ],
)
def test_a_url_of_pydantic(url: str) -> None:
    """A PostgresDsn is the connection string that it was made from, with its password."""
    made: Any = TypeAdapter(PostgresDsn).validate_python(url)
    assert parse_dsn(libpq_dsn(dsn_of(made))) == parse_dsn(libpq_dsn(url))


@given(st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1))
def test_any_schema(name: str) -> None:
    """The schema of Prisma reaches the server as one identifier, whatever its name is."""
    found = parse_dsn(libpq_dsn(f"postgresql://h/db?schema={quote(name, safe='')}"))
    if name == "public":
        assert "options" not in found
        return
    # As the server takes options apart: at blanks, but for those behind a backslash.
    words, word, escaped = [], "", False
    for each in found["options"]:
        if escaped:
            word, escaped = word + each, False
        elif each == "\\":
            escaped = True
        elif each in " \t\n\v\f\r":
            words.append(word)
            word = ""
        else:
            word += each
    assert [*words, word] == ["-c", 'search_path="' + name.replace('"', '""') + '"']


@pytest.mark.parametrize(
    ("dsn", "words"),
    [
        ("shop", "a database alone is written dbname=NAME"),
        ("postgresql://u:p@localhost/db?search_path=x", "libpq has no option 'search_path'"),
        ("postgresql://localhost/db?jit=off", "options=-c%20jit%3D"),
        ("host=localhost jit=off", "options='-c jit=…'"),
        ("host=localhost database=x", "libpq has no option 'database'; it is dbname there"),
        ("host=localhost username=x", "libpq has no option 'username'; it is user there"),
    ],
)
def test_what_libpq_does_not_know(dsn: str, words: str) -> None:
    """The error names the option, and does not speak of passwords, of which none is in doubt."""
    with pytest.raises(ConnectError) as caught:
        connect(dsn)
    assert words in str(caught.value)
    assert "password" not in str(caught.value)
