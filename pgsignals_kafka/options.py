"""The options of ``kafka://`` URLs and of the constructors, and the names of topics."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from pgsignals import ConfigurationError
from pgsignals.urls import BrokerOptions, option

_MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
_PLAIN = re.compile(r"[A-Za-z0-9_]")


@dataclass(frozen=True, kw_only=True)
class Options(BrokerOptions):
    """Options of both sides. ``config`` has settings of librdkafka, ``timeout`` is in seconds."""

    scheme: ClassVar[str] = "kafka"
    default_port: ClassVar[int] = 9092
    passing: ClassVar[str] = "librdkafka."

    topic: str = option("{prefix}.{schema}.{table}", "template of a table's topic")
    sasl: str | None = option(None, f"{', '.join(_MECHANISMS)}; PLAIN where there is a user")
    timeout: float = 10.0

    def __post_init__(self) -> None:
        if not self.servers:
            raise ConfigurationError("kafka:// has no host: write kafka://localhost:9092/.")
        if not re.fullmatch(r"[A-Za-z0-9._-]+", self.prefix):
            raise ConfigurationError(
                f"prefix={self.prefix!r}: a topic's name has letters, digits, '.', '_' and '-'."
            )
        try:
            example = self.topic.format(prefix=self.prefix, schema="s", table="t")
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigurationError(
                f"topic={self.topic!r}: it may have {{prefix}}, {{schema}} and {{table}}."
            ) from error
        if not re.fullmatch(r"[A-Za-z0-9._-]+", example):
            raise ConfigurationError(
                f"topic={self.topic!r}: a topic's name has letters, digits, '.', '_' and '-'."
            )
        if self.sasl is not None and self.sasl not in _MECHANISMS:
            raise ConfigurationError(
                f"sasl={self.sasl!r}: give one of {', '.join(_MECHANISMS)}, or the settings of "
                "librdkafka for another one (librdkafka.sasl.mechanism=…)."
            )

    def topic_of(self, schema: str, table: str) -> str:
        """Return the topic of a table. Raises ConfigurationError if its name would be too long."""
        name = self.topic.format(prefix=self.prefix, schema=escaped(schema), table=escaped(table))
        if len(name) > 249:
            raise ConfigurationError(
                f"The topic for {schema}.{table} would have {len(name)} characters, of 249 that "
                "Kafka allows: give a shorter topic=."
            )
        return name

    def topic_pattern(self, schema: str | None, table: str | None) -> str:
        """Return a regular expression for the topics of tables; None stands for any."""
        schema, table = (
            "\0" if part is None else re.escape(escaped(part)) for part in (schema, table)
        )
        literal = re.escape(self.topic).replace(r"\{", "{").replace(r"\}", "}")
        name = literal.format(prefix=re.escape(self.prefix), schema=schema, table=table)
        return "^" + name.replace("\0", "[A-Za-z0-9_-]+") + "$"


@dataclass(frozen=True, kw_only=True)
class SendingOptions(Options):
    """Options of the side that sends."""

    create: bool = option(False, "create missing topics; without it they are an error")
    partitions: int = option(-1, "partitions of a topic that is created; -1: the brokers' default")
    replication: int = option(-1, "replicas of a topic that is created; -1: the brokers' default")
    tombstones: bool = option(
        False,
        "send a record without a value after a deletion, so that a compacted topic forgets the key",
    )
    max_bytes: int | None = option(
        None,
        "length of a record beyond which it goes without values, flagged as truncated; by default "
        "what the topic takes",
    )
    source: str | None = option(None, "the attribute `source`; by default `/pgsignals/<prefix>`")


def escaped(name: str) -> str:
    """Return a schema's or table's name for a topic's, with what is not allowed as ``-HH``."""
    return "".join(
        c if _PLAIN.match(c) else "".join(f"-{byte:02X}" for byte in c.encode()) for c in name
    )
