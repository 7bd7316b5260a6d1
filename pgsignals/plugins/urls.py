"""The URLs of brokers, from which broadcasters and sources are made, and their options."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Any, ClassVar, Concatenate, Generic, ParamSpec, TypeVar, get_args, get_type_hints
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from ..core.errors import ConfigurationError, near

T = TypeVar("T")
Self = TypeVar("Self")
Made = TypeVar("Made")
P = ParamSpec("P")
Given = TypeVar("Given", bound="BrokerOptions")

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
    """Return the scheme of a URL in lower case, or None if the text is not a URL."""
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

    ``options`` maps the names that the query may have to functions that read their texts; ``bool``
    reads ``true`` and ``false``. Names that begin with ``passing`` go, without it, into ``passed``,
    for the broker's client. Raises ConfigurationError that names what is wrong and no password.
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


def option(default: T, doc: str) -> T:
    """Make a field of :class:`BrokerOptions` that a URL's query may give; ``doc`` explains it."""
    made: T = field(default=default, metadata={"doc": doc})
    return made


@dataclass(frozen=True, kw_only=True)
class BrokerOptions:
    """The address of a broker and the way to talk to it, by a URL or by keywords.

    A plugin derives its own, a frozen dataclass too: the fields that it makes by :func:`option` are
    the options of its URLs, and all fields are the keywords of a constructor that is
    :func:`taking` them. Neither its text nor its repr has credentials in it.
    """

    scheme: ClassVar[str]
    default_port: ClassVar[int]
    # Options whose names begin with this are settings of the broker's client.
    passing: ClassVar[str]

    servers: str = field(kw_only=False)
    prefix: str = option("pgsignals", "the first part of the names at the broker")
    tls: bool = option(False, "connect by TLS")
    ca: str | None = option(None, "file of the authorities that certificates are checked against")
    cert: str | None = option(None, "file of the client's certificate")
    key: str | None = option(None, "file of the key of `cert`")
    # A user without a password may be a token.
    user: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    config: Mapping[str, Any] | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.servers}/{self.prefix}"

    @classmethod
    def documented(cls) -> dict[str, tuple[object, str]]:
        """Return the default and the explanation of each option of the URL."""
        return {
            each.name: (each.default, each.metadata["doc"])
            for each in fields(cls)
            if "doc" in each.metadata
        }

    @classmethod
    def read(cls, url: str, sending: type[BrokerOptions] | None = None) -> dict[str, Any]:
        """Return the keywords that a URL gives; ``sending`` also has those of the side that sends.

        Raises ConfigurationError, also for an option that only the side that sends has.
        """
        known = sending or cls
        hints = get_type_hints(known)
        readers = {name: _reader(hints[name]) for name in known.documented()}
        address = parse_url(url, readers, default_port=cls.default_port, passing=cls.passing)
        for name in address.options:
            if name not in cls.documented():
                raise ConfigurationError(
                    f"{cls.scheme}://…?{name}=… is for backends=, where events are sent to: leave "
                    "it out where they are read."
                )
        return {
            "servers": ",".join(address.hosts),
            "user": address.user,
            "password": address.password,
            "config": address.passed,
            **address.options,
        }


class BrokerEnd(Generic[Given]):
    """A broadcaster or a source that has the options of a broker, and goes by their text."""

    _options: Given

    def __str__(self) -> str:
        return str(self._options)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self}>"


def _reader(hint: Any) -> Callable[[str], Any]:
    """Return the function that reads the text of an option of this type, which may be optional."""
    [found] = set(get_args(hint) or (hint,)) - {NoneType}
    reader: Callable[[str], Any] = found
    return reader


def taking(
    make: Callable[P, Made],
) -> Callable[[Callable[[Self, Made], None]], Callable[Concatenate[Self, P], None]]:
    """Let a constructor take the arguments of ``make``, and be called with what that makes."""
    parameters = inspect.signature(make).parameters.values()

    def decorate(construct: Callable[[Self, Made], None]) -> Callable[Concatenate[Self, P], None]:
        def constructor(self: Self, /, *arguments: P.args, **keywords: P.kwargs) -> None:
            construct(self, make(*arguments, **keywords))

        functools.update_wrapper(constructor, construct)
        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        constructor.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [own, *parameters]
        )
        return constructor

    return decorate
