"""The configuration of librdkafka's clients, and their errors in plain words."""

from __future__ import annotations

import logging
import time
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException
from confluent_kafka.admin import AdminClient, ClusterMetadata  # type: ignore[attr-defined]

from pgsignals import BrokerError

from .options import Options

log = logging.getLogger("pgsignals.kafka")

# Attributes of CloudEvents are headers whose names begin with this.
PREFIX = "ce_"
# The errors that say why there is no connection; the others say only that there is none.
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
# After so many seconds each, reach() looks whether librdkafka, which tries on and on, knows by now
# why nobody answers. Then it waits to the end: a look ends the request, and a broker may be slow.
_LOOKS = (0.5, 1.0, 1.5)
# No broker is there if none has taken a connection for so many seconds. Not at once, since nobody
# may listen at the first of a host's addresses while a broker does at the second.
_REFUSED_SECONDS = 3.0
# A fork does not copy librdkafka's threads: a client of the parent's that is closed in the child,
# be it by the garbage collector, waits for them for ever.
_inherited: list[object] = []


class Errors:
    """The most telling error of a client's connections since they last worked."""

    def __init__(self) -> None:
        self.latest: KafkaError | None = None
        self.down = False

    @property
    def telling(self) -> bool:
        """Whether the latest error says why there is no connection."""
        return self.latest is not None and self.latest.code() in _TELLING

    def note(self, error: KafkaError) -> None:
        """Keep the error if it tells more than the one before; librdkafka calls this."""
        log.debug("%s", error.str())
        if error.code() == KafkaError._ALL_BROKERS_DOWN:
            self.down = True
        if not self.telling or error.code() in _TELLING:
            self.latest = error

    def clear(self) -> None:
        """Forget the errors, since the connection works."""
        self.latest = None
        self.down = False


class _Quiet:
    """Logs librdkafka's own lines, which repeat each failed try, at the level DEBUG."""

    def log(self, level: int, *arguments: object) -> None:
        log.debug(*arguments)


def client_config(options: Options, errors: Errors) -> dict[str, Any]:
    """Return the configuration of any client; the user's settings of librdkafka come last."""
    sasl = options.user is not None
    found: dict[str, Any] = {
        "bootstrap.servers": options.servers,
        "client.id": "pgsignals",
        "security.protocol": ("SASL_" if sasl else "") + ("SSL" if options.tls else "PLAINTEXT"),
        "reconnect.backoff.max.ms": 5_000,
        "error_cb": errors.note,
        "logger": _Quiet(),
    }
    if sasl:
        found["sasl.mechanism"] = options.sasl or "PLAIN"
        found["sasl.username"] = options.user
        found["sasl.password"] = options.password or ""
    files = {"ca": options.ca, "certificate": options.cert, "key": options.key}
    for name, path in files.items():
        if path is not None:
            found[f"ssl.{name}.location"] = path
    return found | dict(options.config or {})


def reach(
    client: AdminClient | Consumer, options: Options, errors: Errors, timeout: float
) -> ClusterMetadata:
    """Return the topics, by the first broker that answers within ``timeout`` seconds.

    Raises BrokerError, without waiting to the end if the cause is known before.
    """
    errors.clear()
    began, failure = time.monotonic(), None
    for seconds in (*_LOOKS, timeout):
        waited = time.monotonic() - began
        if errors.telling or waited >= timeout or (errors.down and waited >= _REFUSED_SECONDS):
            break
        try:
            return client.list_topics(timeout=min(seconds, timeout - waited))
        except KafkaException as error:
            failure = error
            client.poll(0)  # Lets librdkafka tell the cause.
    raise broker_error(options, "not connected", errors, failure) from failure


def broker_error(options: Options, what: str, errors: Errors, error: object = None) -> BrokerError:
    """Return an error that says what could not be done, and librdkafka's cause, if it has one."""
    found = errors.latest
    if found is None and isinstance(error, KafkaException):
        found = error.args[0]
    elif found is None and isinstance(error, KafkaError):
        found = error
    if found is None:
        return BrokerError(f"{options}: {what}.")
    return BrokerError(f"{options}: {what}: {_cause(options, found)}")


def _cause(options: Options, error: KafkaError) -> str:
    code, text = error.code(), error.str()
    # librdkafka takes an unknown mechanism for a failed authentication too.
    if code == KafkaError.UNSUPPORTED_SASL_MECHANISM or "Unsupported SASL mechanism" in text:
        return f"the brokers do not take this sasl= ({text})"
    if code in (KafkaError._AUTHENTICATION, KafkaError.SASL_AUTHENTICATION_FAILED):
        return f"the user or the password is wrong ({text})"
    if code == KafkaError._SSL:
        hint = "see ca=, cert=, key=" if options.tls else "is this a port without TLS?"
        return f"TLS failed, {hint} ({text})"
    if "in state SSL_HANDSHAKE" in text:
        return f"TLS failed: the port may have none, see tls= ({text})"
    if code == KafkaError._RESOLVE:
        return f"the host name is not known ({text})"
    if code in (KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN, KafkaError._TIMED_OUT):
        # A port without TLS that is spoken to by TLS answers nothing, nor does a port with TLS that
        # is spoken to without.
        tls = "it is a port without TLS" if options.tls else "the port wants TLS: tls=true"
        return f"nothing answers there: start the broker, or correct the address, or {tls} ({text})"
    return text


def inherit(client: object) -> None:
    """Keep a client of the parent's process from being closed in the child."""
    _inherited.append(client)
