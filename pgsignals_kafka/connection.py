"""How to reach a cluster: options, the configuration of librdkafka, errors in plain words."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from confluent_kafka import KafkaError, KafkaException

from pgsignals import BrokerError, ConfigurationError
from pgsignals.urls import Address, parse_url

log = logging.getLogger("pgsignals.kafka")

TOPIC = "{prefix}.{schema}.{table}"

OPTIONS: dict[str, Callable[[str], Any]] = {
    "prefix": str,
    "topic": str,
    "create": bool,
    "partitions": int,
    "replication": int,
    "tombstones": bool,
    "max_bytes": int,
    "source": str,
    "tls": bool,
    "ca": str,
    "cert": str,
    "key": str,
    "sasl": str,
}
_MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
_PLAIN = re.compile(r"[A-Za-z0-9_]")
# What tells why there is no connection; the others say only that there is none.
_TELLING = (
    KafkaError._AUTHENTICATION,
    KafkaError._SSL,
    KafkaError.SASL_AUTHENTICATION_FAILED,
    KafkaError.UNSUPPORTED_SASL_MECHANISM,
    KafkaError._RESOLVE,
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
)
# librdkafka keeps threads of its parent's, which a fork does not copy: closing it in the child
# would wait for them for ever.
_inherited: list[object] = []


@dataclass(frozen=True)
class Cluster:
    """Where the brokers are, how to talk to them, and what topics are called there."""

    servers: str
    prefix: str = "pgsignals"
    topic: str = TOPIC
    tls: bool = False
    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    sasl: str | None = None
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    config: Mapping[str, str] = field(default_factory=dict, repr=False)

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

    def __str__(self) -> str:
        return f"kafka://{self.servers}/{self.prefix}"

    def topic_of(self, schema: str, table: str) -> str:
        """The topic of a table. Raises ConfigurationError when its name would be too long."""
        name = self.topic.format(prefix=self.prefix, schema=escaped(schema), table=escaped(table))
        if len(name) > 249:
            raise ConfigurationError(
                f"The topic for {schema}.{table} would have {len(name)} characters, of 249 that "
                "Kafka allows: give a shorter topic=."
            )
        return name

    def topic_pattern(self, schema: str | None, table: str | None) -> str:
        """A regular expression for the topics of tables; None stands for any."""
        schema, table = (
            "\0" if part is None else re.escape(escaped(part)) for part in (schema, table)
        )
        literal = re.escape(self.topic).replace(r"\{", "{").replace(r"\}", "}")
        name = literal.format(prefix=re.escape(self.prefix), schema=schema, table=table)
        return "^" + name.replace("\0", "[A-Za-z0-9_-]+") + "$"

    def client_config(self, errors: Errors) -> dict[str, Any]:
        """The configuration of any client; the user's settings of librdkafka come last."""
        protocol = ("SASL_" if self.user is not None else "") + ("SSL" if self.tls else "PLAINTEXT")
        found: dict[str, Any] = {
            "bootstrap.servers": self.servers,
            "client.id": "pgsignals",
            "security.protocol": protocol,
            "reconnect.backoff.max.ms": 5_000,
            "error_cb": errors.note,
            "logger": _Quiet(),
        }
        if self.user is not None:
            found["sasl.mechanism"] = self.sasl or "PLAIN"
            found["sasl.username"] = self.user
            found["sasl.password"] = self.password or ""
        for name, path in (("ca", self.ca), ("certificate", self.cert), ("key", self.key)):
            if path is not None:
                found[f"ssl.{name}.location"] = path
        return found | dict(self.config)


def read_url(url: str) -> tuple[Cluster, dict[str, Any]]:
    """The cluster that a URL names, and its other options."""
    address: Address = parse_url(url, OPTIONS, default_port=9092, passing="librdkafka.")
    options = dict(address.options)
    of_cluster = {
        name: options.pop(name)
        for name in ("prefix", "topic", "tls", "ca", "cert", "key", "sasl")
        if name in options
    }
    cluster = Cluster(
        ",".join(address.hosts),
        user=address.user,
        password=address.password,
        config=address.passed,
        **of_cluster,
    )
    return cluster, options


def escaped(name: str) -> str:
    """A schema's or table's name as a part of a topic's: what is not allowed there as ``-HH``."""
    return "".join(
        c if _PLAIN.match(c) else "".join(f"-{byte:02X}" for byte in c.encode()) for c in name
    )


class Errors:
    """What a client says is wrong with its connections; the most telling of it."""

    def __init__(self) -> None:
        self.latest: KafkaError | None = None
        self.down = False

    def note(self, error: KafkaError) -> None:
        """Called by the client."""
        log.debug("%s", error.str())
        if error.code() == KafkaError._ALL_BROKERS_DOWN:
            self.down = True
        if self.latest is None or self.latest.code() not in _TELLING or error.code() in _TELLING:
            self.latest = error

    def clear(self) -> None:
        """The connection works."""
        self.latest = None
        self.down = False


class _Quiet:
    """librdkafka's own log lines, which repeat each failed try, at the level DEBUG."""

    def log(self, level: int, *arguments: object) -> None:
        log.debug(*arguments)


def broker_error(cluster: Cluster, what: str, errors: Errors, error: object = None) -> BrokerError:
    """An error that says what could not be done, and the cause where librdkafka has one."""
    found = errors.latest
    if found is None and isinstance(error, KafkaException):
        found = error.args[0]
    elif found is None and isinstance(error, KafkaError):
        found = error
    if found is None:
        return BrokerError(f"{cluster}: {what}.")
    return BrokerError(f"{cluster}: {what}: {_cause(cluster, found)}")


def _cause(cluster: Cluster, error: KafkaError) -> str:
    code, text = error.code(), error.str()
    # librdkafka takes that for a failed authentication too.
    if code == KafkaError.UNSUPPORTED_SASL_MECHANISM or "Unsupported SASL mechanism" in text:
        return f"the brokers do not take this sasl= ({text})"
    if code in (KafkaError._AUTHENTICATION, KafkaError.SASL_AUTHENTICATION_FAILED):
        return f"the user or the password is wrong ({text})"
    if code == KafkaError._SSL:
        hint = "see ca=, cert=, key=" if cluster.tls else "is this a port without TLS?"
        return f"TLS failed, {hint} ({text})"
    if "in state SSL_HANDSHAKE" in text:
        return f"TLS failed: the port may have none, see tls= ({text})"
    if code == KafkaError._RESOLVE:
        return f"the host name is not known ({text})"
    if code in (KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN, KafkaError._TIMED_OUT):
        # What a port without TLS does when it is spoken to by TLS, and the other way round.
        tls = "it is a port without TLS" if cluster.tls else "the port wants TLS: tls=true"
        return f"nothing answers there: start the broker, or correct the address, or {tls} ({text})"
    return text


def inherit(client: object) -> None:
    """Keep a client of the parent's process from being closed in the child."""
    _inherited.append(client)


def process() -> int:
    """Which process this is, for what must not outlive a fork."""
    return os.getpid()
