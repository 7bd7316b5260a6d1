"""Where a broker is and how it is used, as one URL: what broadcasters and sources are made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from .errors import ConfigurationError, near

_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True)
class Address:
    """A broker's URL, taken apart. Its texts and its repr have no password in them."""

    scheme: str
    hosts: tuple[str, ...]
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    passed: Mapping[str, str] = field(default_factory=dict, repr=False)
    path: str = ""

    def __str__(self) -> str:
        return f"{self.scheme}://{','.join(self.hosts)}{self.path}"


def scheme_of(url: str) -> str | None:
    """The scheme of a URL in lower case, or None when the text is not a URL."""
    scheme, separator, _ = url.partition("://")
    return scheme.lower() if separator and scheme.replace("+", "").isalnum() else None


def parse_url(
    url: str,
    options: Mapping[str, Callable[[str], Any]],
    *,
    default_port: int | None = None,
    passing: str | None = None,
) -> Address:
    """Take a broker's URL apart.

    ``options`` maps the names that its query may have to what reads each text; ``bool`` reads
    ``true`` and ``false``. Names that begin with ``passing`` go, without it, into ``passed``, for
    the broker's client. Raises ConfigurationError that names what is wrong and carries no password.
    """
    try:
        parts = urlsplit(url)
        pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
        hosts = tuple(_hosts(parts, default_port))
    except ValueError as error:
        raise ConfigurationError(
            f"A URL {scheme_of(url)}://… is malformed ({type(error).__name__}): write "
            f"{scheme_of(url)}://user:password@host:port/?option=value&…, with percent-encoding "
            "where a part has one of : / ? # & % @ in it."
        ) from None
    read: dict[str, Any] = {}
    passed: dict[str, str] = {}
    for name, text in pairs:
        if passing is not None and name.startswith(passing):
            passed[name.removeprefix(passing)] = text
            continue
        if name not in options:
            listed = [*options, *([f"{passing}…"] if passing else [])]
            raise ConfigurationError(
                f"{parts.scheme}:// has no option {name!r}{near(name, options)} "
                f"Its options: {', '.join(listed)}."
            )
        try:
            read[name] = _WORDS[text.lower()] if options[name] is bool else options[name](text)
        except (ValueError, KeyError):
            kind = "true or false" if options[name] is bool else "a number"
            raise ConfigurationError(
                f"{parts.scheme}://…?{name}={text[:40]!r}: give {kind}."
            ) from None
    user, separator, password = parts.netloc.rpartition("@")[0].partition(":")
    return Address(
        scheme=parts.scheme,
        hosts=hosts,
        user=unquote(user) or None,
        password=unquote(password) if separator else None,
        options=read,
        passed=passed,
        path=parts.path,
    )


def _hosts(parts: SplitResult, default_port: int | None) -> list[str]:
    found = []
    for host in parts.netloc.rpartition("@")[2].split(","):
        _, _, port = host.rpartition("]")[2].partition(":")
        if port and not port.isdecimal():
            raise ValueError("port")
        found.append(host if port or not host or default_port is None else f"{host}:{default_port}")
    return [host for host in found if host]
