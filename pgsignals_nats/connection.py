"""How to reach a server: options, an event loop in a thread, errors in plain words."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import re
import ssl
import threading
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import nats
import nats.errors
import nats.js.errors
from nats.aio.client import Client

from pgsignals import BrokerError, ConfigurationError
from pgsignals.urls import Address, parse_url

log = logging.getLogger("pgsignals.nats")

T = TypeVar("T")

SUBJECT = "{prefix}.{schema}.{table}.{op}"
GAP_TOKEN = "gap"

OPTIONS: dict[str, Callable[[str], Any]] = {
    "prefix": str,
    "subject": str,
    "stream": str,
    "create": bool,
    "replicas": int,
    "max_age": float,
    "window": float,
    "source": str,
    "tls": bool,
    "ca": str,
    "cert": str,
    "key": str,
    "creds": str,
    "nkey": str,
}
_PLAIN = re.compile(r"[A-Za-z0-9_-]")
_NO_TLS = "the server does not offer TLS"
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


@dataclass(frozen=True)
class Server:
    """Where the servers are, how to talk to them, and what subjects and the stream are called."""

    hosts: tuple[str, ...]
    prefix: str = "pgsignals"
    subject: str = SUBJECT
    stream: str | None = None
    tls: bool = False
    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    creds: str | None = None
    nkey: str | None = None
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.hosts:
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

    def __str__(self) -> str:
        return f"nats://{','.join(self.hosts)}/{self.prefix}"

    @property
    def stream_name(self) -> str:
        """The stream's name; by default the prefix, whose dots it must not have."""
        return self.stream or self.prefix.replace(".", "_")

    @property
    def gap_subject(self) -> str:
        """Where Gaps go: it has a token fewer than any event's subject."""
        return f"{self.prefix}.{GAP_TOKEN}"

    def subject_of(self, schema: str, table: str, op: str) -> str:
        """The subject of a table's operation; None for a part stands for any."""
        return self.subject.format(
            prefix=self.prefix, schema=escaped(schema), table=escaped(table), op=op
        )

    def filter_of(self, schema: str | None, table: str, op: str) -> str:
        """A subject with a wildcard for the schema where there is none."""
        return self.subject.format(
            prefix=self.prefix,
            schema="*" if schema is None else escaped(schema),
            table=escaped(table),
            op=op,
        )

    async def connect(self, closed: Callable[[], Awaitable[None]]) -> Client:
        """A new connection to the first server that takes one; it ends when it is lost.

        Connecting again is for who uses it: what nats-py would send once more by itself is not
        known to be in order. Raises BrokerError.
        """
        failure: Exception | None = None
        connected = False

        async def note(error: Exception) -> None:
            log.debug("%r", error)
            if not connected:
                # One try for each host: nats-py would try the same one for ever.
                raise error

        async def lost() -> None:
            if connected:
                await closed()

        options: dict[str, Any] = {
            "name": "pgsignals",
            "allow_reconnect": False,
            "connect_timeout": 5,
            "ping_interval": 10,
            "max_outstanding_pings": 2,
            "error_cb": note,
            "closed_cb": lost,
            "pending_size": 64 * 1024 * 1024,
        }
        if self.user is not None and self.password is not None:
            options |= {"user": self.user, "password": self.password}
        elif self.user is not None:
            options["token"] = self.user
        if self.creds is not None:
            options["user_credentials"] = self.creds
        if self.nkey is not None:
            options["nkeys_seed"] = self.nkey
        for host in self.hosts:
            client = _Client(self.tls)
            try:
                # In the loop, since the files may be wrong.
                if self.tls:
                    options["tls"] = self._tls()
                connecting = client.connect(f"nats://{host}", **options | dict(self.config))
                await asyncio.wait_for(connecting, 8)
                if self.tls and not client.looked:
                    raise nats.errors.Error(
                        "this version of nats-py does not let TLS be insisted on"
                    )
                connected = True
                return client
            except (OSError, nats.errors.Error, asyncio.TimeoutError, ValueError) as error:
                failure = error
            except Exception as error:
                # What a malformed key or credentials file makes nats-py and nkeys raise, of many
                # kinds; its text might show a part of it.
                if self.creds is None and self.nkey is None:
                    raise
                raise BrokerError(
                    f"{self}: the file of creds= or nkey= cannot be used ({type(error).__name__})."
                ) from None
            finally:
                if not connected:
                    client.drop()
        assert failure is not None
        raise BrokerError(f"{self}: not connected: {_cause(self, failure)}") from failure

    def _tls(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.ca)
        if self.cert is not None:
            context.load_cert_chain(self.cert, self.key)
        return context


class _Client(Client):
    """nats-py's client, which can be dropped in the middle of connecting, and insists on TLS."""

    def __init__(self, tls: bool) -> None:
        super().__init__()
        self._insists = tls
        self.looked = False

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        # What comes next is the password, in plain text where the server does not say that it has
        # TLS, or somebody in between has struck that out.
        if self._insists and not (
            info.get("tls_required") or self.options.get("tls_handshake_first")
        ):
            raise nats.errors.Error(_NO_TLS)
        self.looked = True
        await super()._process_info(info, initial_connection)

    def drop(self) -> None:
        """Close the connection, which nats-py leaves open when connecting fails."""
        if self._transport is not None:
            self._transport.close()


def read_url(url: str) -> tuple[Server, dict[str, Any]]:
    """The server that a URL names, and its other options."""
    address: Address = parse_url(url, OPTIONS, default_port=4222, passing="client.")
    options = dict(address.options)
    of_server = {
        name: options.pop(name)
        for name in (*("prefix", "subject", "stream", "tls", "ca", "cert", "key", "creds", "nkey"),)
        if name in options
    }
    settings: dict[str, Any] = {}
    for name, text in address.passed.items():
        if name not in _SETTINGS:
            raise ConfigurationError(
                f"nats://…?client.{name}=…: it may be one of {', '.join(_SETTINGS)}; the keyword "
                "config= takes any setting of nats-py."
            )
        try:
            settings[name] = _SETTINGS[name](text)
        except ValueError:
            raise ConfigurationError(f"nats://…?client.{name}={text!r}: give a number.") from None
    server = Server(
        address.hosts,
        user=address.user,
        password=address.password,
        config=settings,
        **of_server,
    )
    return server, options


def escaped(name: str) -> str:
    """A schema's or table's name as a token of a subject: what is not allowed there as ``%HH``."""
    return "".join(
        c if _PLAIN.match(c) else "".join(f"%{byte:02X}" for byte in c.encode()) for c in name
    )


def _cause(server: Server, error: Exception) -> str:
    text = str(error) or type(error).__name__
    if "uthorization" in text or "uthentication" in text:
        return f"the user, the password or the key is wrong ({text})"
    if isinstance(error, FileNotFoundError):
        return f"the file {error.filename} is not there"
    if text == _NO_TLS:
        return "the server has no TLS, or not on this port: leave out tls=true, or correct it"
    if isinstance(error, ssl.SSLError) or "SSL" in text or "ecure connection" in text:
        hint = "see ca=, cert=, key=" if server.tls else "the server wants TLS: tls=true"
        return f"TLS failed, {hint} ({text})"
    if isinstance(error, ConnectionRefusedError):
        return "nothing listens there: start the server, or correct the address"
    if isinstance(error, (asyncio.TimeoutError, TimeoutError)):
        return "nothing answers there: start the server, or correct the address"
    return text


def stream_error(server: Server, error: Exception) -> BrokerError:
    """Why JetStream cannot be used."""
    name = server.stream_name
    if isinstance(error, nats.js.errors.NotFoundError):
        return BrokerError(
            f"{server}: there is no stream {name}. Create it with the subjects {server.prefix}.>, "
            "name another with stream=, or have it created with create=true."
        )
    if isinstance(error, nats.js.errors.ServiceUnavailableError):
        return BrokerError(f"{server}: JetStream is not enabled for this account.")
    text = getattr(error, "description", None) or str(error) or type(error).__name__
    return BrokerError(f"{server}: the stream {name} cannot be used: {text}")


class Loop:
    """An event loop in a thread of its own, for a library that has nothing else."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._run, name="pgsignals-nats", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
        finally:
            tasks = asyncio.all_tasks(self.loop)
            for task in tasks:
                task.cancel()
            self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self.loop.close()

    @property
    def inherited(self) -> bool:
        """Whether this is the child of a fork, where the thread is not."""
        return self._process != os.getpid()

    @property
    def is_alive(self) -> bool:
        """Whether its thread goes on."""
        return self._thread.is_alive()

    def run(self, work: Coroutine[Any, Any, T], timeout: float) -> T:
        """Have it done there, and wait for the result. Raises TimeoutError after ``timeout`` s."""
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result(timeout)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise TimeoutError(f"no answer within {timeout:g} s") from None

    def call(self, what: Callable[..., object], *arguments: object) -> None:
        """Have it called there."""
        with contextlib.suppress(RuntimeError):  # The loop has ended.
            self.loop.call_soon_threadsafe(what, *arguments)

    def close(self) -> None:
        """End it."""
        if self.inherited or not self._thread.is_alive():
            return
        self.loop.call_soon_threadsafe(self.loop.stop)
        if threading.current_thread() is not self._thread:
            self._thread.join(5.0)
