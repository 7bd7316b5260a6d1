"""What is wrong with a broker is told, in plain words and without secrets; others go on."""

from __future__ import annotations

import logging
import re
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest

import pgsignals
from pgsignals.hub.hub import Delivery
from pgsignals.plugins.loader import load_plugins
from pgsignals.testing.conformance import DEADLINE
from tests.brokers import PASSWORD, Kafka, Nats, free_port, tls_files
from tests.conftest import Database, Recorder
from tests.nats_credentials import Operator, user_key
from tests.waiting import eventually

WRONG = "wr0ng/s3cret"


@dataclass
class Secured:
    """Some nats-servers that want this and that, and the files to come in by."""

    users: Nats
    operated: Nats
    tls: Nats
    bare: Nats
    ca: Path
    nkey: Path
    creds: Path
    other_nkey: Path
    other_creds: Path
    no_creds: Path


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """Running nats-servers: users and an NKey, an operator's accounts, TLS, no JetStream."""
    folder = tmp_path_factory.mktemp("nats")

    def write(name: str, text: str) -> Path:
        path = folder / name
        path.write_text(text)
        return path

    tls_files(folder)
    known, operator = user_key(), Operator()
    found = Secured(
        users=Nats(
            f'authorization {{ users = [ {{ user: ann, password: "{PASSWORD}" }},'
            f" {{ nkey: {known.public} }} ] }}\n"
        ),
        operated=Nats(operator.configuration),
        tls=Nats(f'tls {{ cert_file: "{folder / "ca.pem"}", key_file: "{folder / "key.pem"}" }}\n'),
        bare=Nats(jetstream=False),
        ca=folder / "ca.pem",
        nkey=write("known.nk", known.seed),
        creds=write("good.creds", operator.credentials()),
        other_nkey=write("other.nk", user_key().seed),
        other_creds=write("other.creds", Operator().credentials()),
        no_creds=write("no.creds", f"nothing of the kind {WRONG}\n"),
    )
    servers = (found.users, found.operated, found.tls, found.bare)
    with ExitStack() as stack:
        for server in servers:
            stack.callback(server.close)
            server.start()
        yield found


def at(server: Nats, user: str = "", scheme: str = "nats") -> str:
    return f"{scheme}://{user}127.0.0.1:{server.port}/?prefix=shop"


# What is wrong, the URL, and what the error has to say.
NATS_CASES: dict[str, tuple[Callable[[Secured], str], str]] = {
    "nobody there": (
        lambda s: f"nats://ann:{quote(WRONG, '')}@127.0.0.1:{free_port()}/",
        "nothing listens there",
    ),
    "wrong password": (
        lambda s: at(s.users, f"ann:{quote(WRONG, '')}@"),
        "the user, the password or the key is wrong",
    ),
    "wrong token": (
        lambda s: at(s.users, f"{quote(WRONG, '')}@"),
        "the user, the password or the key is wrong",
    ),
    "no user": (lambda s: at(s.users), "the user, the password or the key is wrong"),
    "unknown NKey": (
        lambda s: f"{at(s.users)}&nkey={s.other_nkey}",
        "the user, the password or the key is wrong",
    ),
    "no file of an NKey": (lambda s: f"{at(s.users)}&nkey={s.nkey}.no", "known.nk.no is not there"),
    "no NKey in the file": (lambda s: f"{at(s.users)}&nkey={s.no_creds}", "cannot be used"),
    "credentials of another operator": (
        lambda s: f"{at(s.operated)}&creds={s.other_creds}",
        "the user, the password or the key is wrong",
    ),
    "no credentials file": (
        lambda s: f"{at(s.operated)}&creds={s.creds}.no",
        "good.creds.no is not there",
    ),
    "no credentials in the file": (
        lambda s: f"{at(s.operated)}&creds={s.no_creds}",
        "cannot be used",
    ),
    "TLS is wanted": (lambda s: at(s.tls), "tls=true"),
    "TLS is not wanted": (
        lambda s: f"{at(s.users, f'ann:{PASSWORD}@')}&tls=true",
        "the server has no TLS",
    ),
    "an authority that is not trusted": (lambda s: f"{at(s.tls)}&tls=true", "see ca="),
    "no stream": (lambda s: f"{at(s.users, f'ann:{PASSWORD}@')}", "no stream shop.*create=true"),
    "no JetStream": (lambda s: at(s.bare), "JetStream is not enabled"),
}

KAFKA_CASES: dict[str, tuple[Callable[[Kafka], str], str]] = {
    "nobody there": (
        lambda k: f"kafka://ann:{quote(WRONG, '')}@127.0.0.1:{free_port()}/",
        "nothing answers there",
    ),
    "wrong password": (
        lambda k: f"kafka://ann:{quote(WRONG, '')}@127.0.0.1:{k.sasl_port}/",
        "the user or the password is wrong",
    ),
    "another mechanism": (
        lambda k: f"kafka://ann:{quote(WRONG, '')}@127.0.0.1:{k.sasl_port}/?sasl=SCRAM-SHA-256",
        "do not take this sasl=",
    ),
    "TLS is wanted": (lambda k: f"kafka://127.0.0.1:{k.tls_port}/", "tls=true"),
    "TLS is not wanted": (
        lambda k: f"kafka://127.0.0.1:{k.port}/?tls=true",
        "TLS failed|a port without TLS",
    ),
    "an authority that is not trusted": (
        lambda k: f"kafka://127.0.0.1:{k.tls_port}/?tls=true",
        "see ca=",
    ),
}


def check_broker(
    url: str,
    says: str,
    shop: Database,
    hub: pgsignals.Hub,
    recorder: Recorder,
    caplog: pytest.LogCaptureFixture,
    deliveries: Sequence[Delivery],
) -> None:
    """A source is refused at start; as a backend it says so, and receivers get their events."""
    caplog.set_level(logging.DEBUG)
    with pytest.raises(pgsignals.BrokerError, match=says) as refused:
        hub.start(url, ["orders"], name="mailer")
    hub.subscribe(recorder, "orders")
    told = str(refused.value)
    for number, delivery in enumerate(deliveries, start=1):
        hub.start(shop.dsn, ["orders"], backends=[url], delivery=delivery)
        shop("INSERT INTO orders DEFAULT VALUES")
        recorder.wait(number)
        try:
            eventually(lambda: hub.status().backends[0].error, lambda error: re.search(says, error))
            [backend] = hub.status().backends
            assert not backend.ready
            assert hub.health().ready
        finally:
            hub.stop(0.1)
        told += str(backend)
    told += caplog.text
    for secret in (WRONG, quote(WRONG, ""), "s3cret"):
        assert secret not in told


@pytest.fixture
def shop(db: Database) -> Database:
    """A database with a table."""
    db("CREATE TABLE orders (id serial PRIMARY KEY)")
    return db


@pytest.mark.parametrize("case", NATS_CASES)
def test_nats(
    case: str,
    secured: Secured,
    shop: Database,
    hub: pgsignals.Hub,
    recorder: Recorder,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever is wrong with a nats-server or how it is asked."""
    url, says = NATS_CASES[case]
    check_broker(url(secured), says, shop, hub, recorder, caplog, ["notify", "outbox"])


@pytest.mark.parametrize("case", KAFKA_CASES)
def test_kafka(
    case: str,
    kafka: Kafka,
    shop: Database,
    hub: pgsignals.Hub,
    recorder: Recorder,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever is wrong with Apache Kafka or how it is asked."""
    url, says = KAFKA_CASES[case]
    # One is enough, since each try takes its time.
    check_broker(url(kafka), says, shop, hub, recorder, caplog, ["outbox"])


@pytest.mark.parametrize("how", ["password", "nkey", "creds", "tls"])
def test_the_right_ones_work(secured: Secured, how: str) -> None:
    """With what each nats-server wants, it is reached."""
    url = {
        "password": at(secured.users, f"ann:{PASSWORD}@"),
        "nkey": f"{at(secured.users)}&nkey={secured.nkey}",
        "creds": f"{at(secured.operated)}&creds={secured.creds}",
        "tls": f"{at(secured.tls)}&tls=true&ca={secured.ca}",
    }[how]
    broadcaster = load_plugins().broadcaster(
        f"{url}&create=true&stream=of_{how}".replace("shop", how)
    )
    assert broadcaster.flush(DEADLINE)
    broadcaster.close()


def test_no_password_goes_out_in_plain_text() -> None:
    """With tls=true, nothing is sent to a server that does not offer TLS, whoever that is."""
    heard: list[bytes] = []

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b'INFO {"server_id": "x", "auth_required": true}\r\n')
            while data := connection.recv(1000):
                heard.append(data)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        url = f"nats://ann:{PASSWORD}@127.0.0.1:{listener.getsockname()[1]}/?tls=true"
        broadcaster = load_plugins().broadcaster(url)
        with pytest.raises(pgsignals.BrokerError, match="the server has no TLS"):
            broadcaster.flush(DEADLINE)
        broadcaster.close()
        thread.join(DEADLINE)
    assert heard == []
