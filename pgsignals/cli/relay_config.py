"""The configuration of ``pgsignals relay``, from a TOML file: validated, with its secrets."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin
from urllib.parse import quote, urlsplit, urlunsplit

import msgspec
import msgspec.toml

from pgsignals.core.errors import ConfigurationError, MissingExtraError, PgSignalsError, near
from pgsignals.core.transport import Capture, Delivery
from pgsignals.core.watchers import DEFAULT_OPERATIONS, Watcher, watch
from pgsignals.hub.options import Install, Options
from pgsignals.plugins.urls import scheme_of

T = TypeVar("T")

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_SOURCES = "'env:VARIABLE', 'file:PATH' or 'credential:NAME'"


@dataclass(frozen=True)
class Target:
    """The URL of a broker, and the name that the relay's cursor has for it."""

    name: str
    url: str = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class RelayConfig(Options):
    """The options of the Hub that relays; ``watchers`` come beside those of ``app``."""

    delivery: Delivery = "outbox"
    workers: int = 0
    prune: bool = False
    metrics_port: str | None = None
    app: str | None = None
    targets: tuple[Target, ...] = ()


class _Watch(msgspec.Struct, forbid_unknown_fields=True):
    table: str
    operations: tuple[str, ...] = DEFAULT_OPERATIONS
    columns: tuple[str, ...] = ()
    when: str | None = None
    extra: tuple[str, ...] = ()
    label: str | None = None
    replicated: bool = False


class _Target(msgspec.Struct, forbid_unknown_fields=True):
    url: str
    name: str | None = None
    user: str | None = None
    password: str | None = None


class _File(msgspec.Struct, forbid_unknown_fields=True):
    name: str | None = None
    dsn: str | None = None
    listen_dsn: str | None = None
    namespace: str | None = None
    install: Install | None = None
    delivery: Literal["outbox", "wal"] = "outbox"
    capture: Capture | None = None
    allow_unbounded_wal: bool = False
    prune: bool = False
    lease: float = 5.0
    queue_size: int = 10_000
    metrics_port: int | str | None = None
    app: str | None = None
    watch: tuple[_Watch, ...] = ()
    target: tuple[_Target, ...] = ()


def read_config(path: Path, base: RelayConfig) -> RelayConfig:
    """Read a file, and look up the secrets that it names; ``base`` has what the file leaves out.

    Raises ConfigurationError that names the file and the key, and shows no value that may be a
    secret; MissingExtraError if this Python needs a package to read TOML.
    """
    try:
        data = msgspec.toml.decode(path.read_text("utf-8"))
    except ImportError as error:
        raise MissingExtraError(
            "On Python 3.10 a TOML file needs the package tomli: pip install 'pgsignals[cli]'"
        ) from error
    except (OSError, UnicodeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from None
    # The message names line and column, and no value.
    except (ValueError, msgspec.DecodeError) as error:
        raise ConfigurationError(f"{path} is not TOML: {error}") from None
    for key, first in (("watch", "table"), ("target", "url")):
        _check_tables(path, key, data.get(key), first)
    _refuse_unknown(path, data, _File, "")
    try:
        found = msgspec.convert(data, _File)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$.")
        key = f" {where.rstrip('`')}:" if where else ""
        raise ConfigurationError(f"{path}:{key} {what}.") from None
    folder = path.parent

    said = {key: getattr(found, key) for key in data if key not in ("watch", "target")}
    for key in ("dsn", "listen_dsn"):
        if key in said:
            said[key] = _within(path, key, partial(look_up_secret, said[key], folder))
    if "metrics_port" in said:
        said["metrics_port"] = str(said["metrics_port"])
    return replace(
        base,
        **said,
        watchers=tuple(
            _within(path, f"watch[{number}]", partial(_watcher, each))
            for number, each in enumerate(found.watch)
        ),
        targets=tuple(
            _within(path, f"target[{number}]", partial(_target, each, folder))
            for number, each in enumerate(found.target)
        ),
    )


def look_up_secret(text: str, folder: Path | None = None) -> str:
    """Return a text, or what it names: ``env:NAME``, ``file:PATH`` or ``credential:NAME``.

    Paths begin at ``folder``; credentials are files that systemd puts into the folder
    ``$CREDENTIALS_DIRECTORY``. Raises ConfigurationError if there is no such thing.
    """
    kind, separator, name = text.partition(":")
    if not separator or kind not in ("env", "file", "credential"):
        return text
    if kind == "env":
        found = os.environ.get(name)
        if not found:
            raise ConfigurationError(f"{text!r}: the environment has no variable {name}.")
        return found
    if kind == "file":
        place = (folder or Path()) / name
    else:
        directory = os.environ.get("CREDENTIALS_DIRECTORY")
        if not directory:
            raise ConfigurationError(
                f"{text!r}: there is no CREDENTIALS_DIRECTORY, which systemd sets for a unit with "
                "LoadCredential=."
            )
        place = Path(directory) / name
    try:
        return place.read_text("utf-8").strip()
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigurationError(f"{text!r}: {place} cannot be read: {reason}.") from None


def make_target(text: str) -> Target:
    """Return the target of ``[NAME=]URL``; without a name, it is named by the URL's scheme.

    Raises ConfigurationError for anything else.
    """
    name, separator, url = text.partition("=")
    if not separator or not _NAME.fullmatch(name):
        name, url = "", text
    return _named(name or None, look_up_secret(url))


def _named(name: str | None, url: str) -> Target:
    scheme = scheme_of(url)
    if scheme is None:
        raise ConfigurationError(
            "A target is not a URL: write kafka://host:port/?prefix=…, nats://host:port/?prefix=…, "
            f"or {_SOURCES}, which has it."
        )
    if name is not None and not _NAME.fullmatch(name):
        raise ConfigurationError(f"name = {name!r}: give letters, digits, '_' and '-'.")
    return Target(name or scheme, url)


def _target(given: _Target, folder: Path) -> Target:
    url = look_up_secret(given.url, folder)
    if given.password is not None and look_up_secret(given.password, folder) == given.password:
        raise ConfigurationError(f"password stands in the file: write {_SOURCES} in its place.")
    if given.user is None and given.password is None:
        return _named(given.name, url)
    parts = urlsplit(url)
    if given.user is None or "@" in parts.netloc:
        raise ConfigurationError(
            "give user with password, or user alone for a token, and then none in the url."
        )
    credentials = quote(look_up_secret(given.user, folder), safe="")
    if given.password is not None:
        credentials += ":" + quote(look_up_secret(given.password, folder), safe="")
    return _named(given.name, urlunsplit(parts._replace(netloc=f"{credentials}@{parts.netloc}")))


def _watcher(given: _Watch) -> Watcher:
    options = msgspec.structs.asdict(given)
    return watch(options.pop("table"), *options.pop("operations"), **options)


def _within(path: Path, key: str, call: Callable[[], T]) -> T:
    """Return what ``call`` returns; name the place of the cause in an error that it raises."""
    try:
        return call()
    except PgSignalsError as error:
        raise ConfigurationError(f"{path}: {key}: {error}") from None


def _check_tables(path: Path, key: str, given: object, first: str) -> None:
    """Raise ConfigurationError for what is not written as an array of tables."""
    if given is None or (
        isinstance(given, list) and all(isinstance(each, Mapping) for each in given)
    ):
        return
    raise ConfigurationError(
        f"{path}: each {key} is a table of its own, since there may be several: write [[{key}]] on "
        f'a line, and {first} = "…" below it.'
    )


def _refuse_unknown(path: Path, data: object, kind: Any, where: str) -> None:
    """Raise ConfigurationError for an unknown key, with the nearest known one."""
    if get_origin(kind) is tuple and isinstance(data, Sequence):
        for number, each in enumerate(data):
            _refuse_unknown(path, each, get_args(kind)[0], f"{where}[{number}]")
    elif isinstance(data, Mapping) and isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        types = {each.name: each.type for each in msgspec.structs.fields(kind)}
        for key, value in data.items():
            place = f"{where}.{key}" if where else str(key)
            if key not in types:
                raise ConfigurationError(
                    f"{path}: there is no key {place}{near(str(key), types)} "
                    f"Keys there: {', '.join(types)}."
                )
            _refuse_unknown(path, value, types[key], place)
