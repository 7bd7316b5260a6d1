"""The topics that a broadcaster writes to: made where they are missing, measured, compared."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Collection, Sequence

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, ResourceType  # type: ignore[attr-defined]

from pgsignals import BrokerError

from .connection import Errors, broker_error, client_config, reach
from .history import Topic, look
from .options import SendingOptions

log = logging.getLogger("pgsignals.kafka")

# Kafka's default for max.message.bytes, taken for that of a topic whose settings cannot be read.
DEFAULT_LIMIT = 1_048_588
# The seconds between comparisons of topics with what they were, while they take records.
_LOOK_SECONDS = 30.0


class Topics:
    """The names of tables' topics, the limits of those that are there, and their former states."""

    def __init__(self, options: SendingOptions, errors: Errors) -> None:
        self._options = options
        self._errors = errors
        # The topic of a table.
        self.name_of = functools.cache(options.topic_of)
        # The longest record that each topic takes, of those that are known to be there.
        self.limits: dict[str, int] = {}
        self._known: dict[str, Topic] = {}
        # The first look is due at once.
        self._looked_at = -_LOOK_SECONDS

    def reach(self, timeout: float) -> None:
        """Check that a broker answers. Raises BrokerError."""
        reach(self._admin(), self._options, self._errors, min(timeout, self._options.timeout))
        self._errors.clear()

    def check(self, topics: Collection[str]) -> None:
        """Check that the topics are there, unless they may be created. Raises BrokerError."""
        self._missing(self._admin(), topics)

    def prepare(self, topics: Collection[str]) -> None:
        """Create those topics that are missing, and learn their limits. Raises BrokerError."""
        new = set(topics) - self.limits.keys()
        if not new:
            return
        admin = self._admin()
        if missing := self._missing(admin, new):
            self._create(admin, missing)
        self.limits.update(dict.fromkeys(new, self._options.max_bytes or DEFAULT_LIMIT))
        resources = [ConfigResource(ResourceType.TOPIC, name) for name in new]
        answers = admin.describe_configs(resources, request_timeout=self._options.timeout)
        for resource, answer in answers.items():
            try:
                limit = int(answer.result()["max.message.bytes"].value)
            except (KafkaException, KeyError, ValueError) as error:
                log.debug("the limit of %s cannot be read: %s", resource.name, error)
                continue
            self.limits[resource.name] = min(limit, self._options.max_bytes or limit)

    @property
    def look_due(self) -> bool:
        """Whether the last look at the topics is some time ago."""
        return time.monotonic() - self._looked_at >= _LOOK_SECONDS

    def look_for_others(self) -> str:
        """Return the reason why topics are not those that were written to; empty if they are.

        librdkafka does not believe in leaders of an older epoch, which brokers that were put back
        to an older state have: it would wait for ever.
        """
        self._looked_at = time.monotonic()
        try:
            now = look(self._admin(), self.limits, min(2.0, self._options.timeout))
        except KafkaException as error:
            log.debug("%s: %s", self._options, error)
            return ""
        others = {
            name: why
            for name, topic in now.items()
            if name in self._known and (why := topic.other(self._known[name]))
        }
        self._known.update(now)
        return "; ".join(f"the topic {name} {why}" for name, why in sorted(others.items()))

    def _admin(self) -> AdminClient:
        return AdminClient(client_config(self._options, self._errors))

    def _missing(self, admin: AdminClient, topics: Collection[str]) -> list[str]:
        # reach() says sooner than the request below why nobody answers.
        reach(admin, self._options, self._errors, self._options.timeout)
        missing = []
        described = admin.describe_topics(
            TopicCollection(sorted(topics)), request_timeout=self._options.timeout
        )
        for name, answer in described.items():
            try:
                answer.result()
            except KafkaException as error:
                admin.poll(0)  # Lets librdkafka tell the cause.
                if error.args[0].code() != KafkaError.UNKNOWN_TOPIC_OR_PART:
                    what = f"the topic {name} cannot be looked at"
                    raise broker_error(self._options, what, self._errors, error) from error
                missing.append(name)
        if missing and not self._options.create:
            raise BrokerError(
                f"{self._options}: there is no topic {', '.join(missing)}. Create it, or have it "
                "created with create=true (and partitions=, replication=)."
            )
        return missing

    def _create(self, admin: AdminClient, names: Sequence[str]) -> None:
        options = self._options
        wanted = [
            NewTopic(
                name, num_partitions=options.partitions, replication_factor=options.replication
            )
            for name in names
        ]
        for name, answer in admin.create_topics(wanted, operation_timeout=options.timeout).items():
            try:
                answer.result()
            except KafkaException as error:
                # Another process may have created the topic meanwhile.
                if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                    what = f"the topic {name} cannot be created"
                    raise broker_error(options, what, self._errors, error) from error
            else:
                log.info("created the topic %s", name)
