"""The options of ``nats://`` URLs and of the constructors, the subjects and the stream's name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from pgsignals import ConfigurationError
from pgsignals.urls import BrokerOptions, option

_GAP_TOKEN = "gap"
_PLAIN = re.compile(r"[A-Za-z0-9_-]")
# Settings of nats-py that a URL may pass on, since its text can be read as their type.
_SETTINGS: dict[str, Callable[[str], Any]] = {
    "name": str,
    "ping_interval": float,
    "max_outstanding_pings": int,
    "connect_timeout": float,
    "tls_hostname": str,
    "tls_handshake_first": lambda text: text.lower() in ("true", "yes", "1"),
    "inbox_prefix": str,
}


@dataclass(frozen=True, kw_only=True)
class Options(BrokerOptions):
    """Options of both sides. ``config`` has settings of nats-py's ``connect``."""

    scheme: ClassVar[str] = "nats"
    default_port: ClassVar[int] = 4222
    passing: ClassVar[str] = "client."

    subject: str = option("{prefix}.{schema}.{table}.{op}", "template of an event's subject")
    stream: str | None = option(None, "name of the stream; by default the prefix")
    creds: str | None = option(None, "file of a user's credentials")
    nkey: str | None = option(None, "file of an NKey's seed")

    def __post_init__(self) -> None:
        if not self.servers:
            raise ConfigurationError("nats:// has no host: write nats://localhost:4222/.")
        if not re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", self.prefix):
            raise ConfigurationError(
                f"prefix={self.prefix!r}: give letters, digits, '_' and '-', with dots between."
            )
        try:
            example = self.subject.format(prefix=self.prefix, schema="s", table="t", op="o")
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigurationError(
                f"subject={self.subject!r}: it may have {{prefix}}, {{schema}}, {{table}}, {{op}}."
            ) from error
        if not example.startswith(f"{self.prefix}.") or not re.fullmatch(r"[\w.-]+", example):
            raise ConfigurationError(
                f"subject={self.subject!r}: it begins with '{{prefix}}.', which the stream takes, "
                "and has no blanks or wildcards."
            )
        if self.stream is not None and not re.fullmatch(r"[A-Za-z0-9_-]+", self.stream):
            raise ConfigurationError(f"stream={self.stream!r}: give letters, digits, '_' and '-'.")

    @classmethod
    def read(cls, url: str, sending: type[BrokerOptions] | None = None) -> dict[str, Any]:
        found = super().read(url, sending)
        settings: dict[str, Any] = {}
        for name, text in found["config"].items():
            if name not in _SETTINGS:
                raise ConfigurationError(
                    f"nats://…?client.{name}=…: it may be one of {', '.join(_SETTINGS)}; the "
                    "keyword config= takes any setting of nats-py."
                )
            try:
                settings[name] = _SETTINGS[name](text)
            except ValueError:
                raise ConfigurationError(
                    f"nats://…?client.{name}={text!r}: give a number."
                ) from None
        return found | {"config": settings}

    @property
    def hosts(self) -> list[str]:
        """The servers, in the order in which they are tried."""
        return self.servers.split(",")

    @property
    def stream_name(self) -> str:
        """The stream's name; by default the prefix, whose dots it must not have."""
        return self.stream or self.prefix.replace(".", "_")

    @property
    def gap_subject(self) -> str:
        """The subject of Gaps: it has a token fewer than any event's."""
        return f"{self.prefix}.{_GAP_TOKEN}"

    def subject_of(self, schema: str | None, table: str, op: str) -> str:
        """Return the subject of a table's operation; without a schema, with a wildcard for it."""
        return self.subject.format(
            prefix=self.prefix,
            schema="*" if schema is None else escaped(schema),
            table=escaped(table),
            op=op,
        )


@dataclass(frozen=True, kw_only=True)
class SendingOptions(Options):
    """Options of the side that sends."""

    create: bool = option(False, "create a missing stream; without it that is an error")
    replicas: int = option(1, "replicas of a stream that is created")
    max_age: float | None = option(None, "seconds that a stream that is created keeps messages")
    window: float = option(
        120.0, "seconds in which a stream that is created takes the same id for a duplicate"
    )
    source: str | None = option(None, "the attribute `source`; by default `/pgsignals/<prefix>`")


def escaped(name: str) -> str:
    """Return a schema's or table's name as a token of a subject: what is not allowed as ``%HH``."""
    return "".join(
        c if _PLAIN.match(c) else "".join(f"%{byte:02X}" for byte in c.encode()) for c in name
    )
