"""Connections to servers, an event loop in a thread, errors in plain words."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import ssl
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import nats.errors
import nats.js.errors
from nats.aio.client import Client

from pgsignals import BrokerError
from pgsignals.plugins.within import within

from .options import Options

log = logging.getLogger("pgsignals.nats")

T = TypeVar("T")

# Attributes of CloudEvents are headers whose names begin with this.
PREFIX = "ce-"
_NO_TLS = "the server does not offer TLS"
_CONNECT_SECONDS = 8
# The seconds to connect, with all that is asked of JetStream then.
_CONNECTED_SECONDS = 20.0


async def connect(options: Options, closed: Callable[[], Awaitable[None]]) -> Client:
    """Return a connection to the first server that takes one; ``closed`` is called at its loss.

    The connection ends then: messages that nats-py would send once more by itself are not known to
    be in order. Raises BrokerError.
    """
    failure: Exception | None = None
    for host in options.hosts:
        client = _Client(options.tls)
        try:
            # Within the try, since the files may be wrong.
            settings = _settings(options, client, closed)
            await within(_CONNECT_SECONDS, client.connect(f"nats://{host}", **settings))
            if options.tls and not client.looked:
                raise nats.errors.Error("this version of nats-py does not let TLS be insisted on")
            client.in_use = True
            return client
        except (OSError, nats.errors.Error, asyncio.TimeoutError, ValueError) as error:
            failure = error
        except Exception as error:
            # A malformed key or credentials file makes nats-py and nkeys raise errors of many
            # kinds, whose texts might show a part of it.
            if options.creds is None and options.nkey is None:
                raise
            raise BrokerError(
                f"{options}: the file of creds= or nkey= cannot be used ({type(error).__name__})."
            ) from None
        finally:
            if not client.in_use:
                client.drop()
    assert failure is not None
    raise BrokerError(f"{options}: not connected: {_cause(options, failure)}") from failure


def _settings(
    options: Options, client: _Client, closed: Callable[[], Awaitable[None]]
) -> dict[str, Any]:
    """Return the settings of nats-py; the user's own come last."""

    async def note(error: Exception) -> None:
        log.debug("%r", error)
        if not client.in_use:
            # One try for each host: nats-py would try the same one for ever.
            raise error

    async def lost() -> None:
        if client.in_use:
            await closed()

    found: dict[str, Any] = {
        "name": "pgsignals",
        "allow_reconnect": False,
        # Otherwise it would draw from the program's random numbers; hosts are tried in order.
        "dont_randomize": True,
        "connect_timeout": 5,
        "ping_interval": 10,
        "max_outstanding_pings": 2,
        "error_cb": note,
        "closed_cb": lost,
        "pending_size": 64 * 1024 * 1024,
    }
    if options.user is not None and options.password is not None:
        found |= {"user": options.user, "password": options.password}
    elif options.user is not None:
        found["token"] = options.user
    if options.creds is not None:
        found["user_credentials"] = options.creds
    if options.nkey is not None:
        found["nkeys_seed"] = options.nkey
    if options.tls:
        context = ssl.create_default_context(cafile=options.ca)
        if options.cert is not None:
            context.load_cert_chain(options.cert, options.key)
        found["tls"] = context
    return found | dict(options.config or {})


class _Client(Client):
    """nats-py's client, which can be dropped in the middle of connecting, and insists on TLS."""

    def __init__(self, tls: bool) -> None:
        super().__init__()
        self._insists = tls
        # Whether the server has said if it has TLS.
        self.looked = False
        # Whether the client is in use; before, connect() looks after its errors and its end.
        self.in_use = False

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        # The password comes next, in plain text if the server does not say that it has TLS, or
        # somebody in between has struck that out.
        if self._insists and not (
            info.get("tls_required") or self.options.get("tls_handshake_first")
        ):
            raise nats.errors.Error(_NO_TLS)
        self.looked = True
        await super()._process_info(info, initial_connection)

    def drop(self) -> None:
        """Close the connection, which nats-py leaves open when connecting fails."""
        if self._transport is not None:
            self._transport.close()  # type: ignore[no-untyped-call]


def _cause(options: Options, error: Exception) -> str:
    text = str(error) or type(error).__name__
    if "uthorization" in text or "uthentication" in text:
        return f"the user, the password or the key is wrong ({text})"
    if isinstance(error, FileNotFoundError):
        return f"the file {error.filename} is not there"
    if text == _NO_TLS:
        return "the server has no TLS, or not on this port: leave out tls=true, or correct it"
    if isinstance(error, ssl.SSLError) or "SSL" in text or "ecure connection" in text:
        hint = "see ca=, cert=, key=" if options.tls else "the server wants TLS: tls=true"
        return f"TLS failed, {hint} ({text})"
    if isinstance(error, ConnectionRefusedError):
        return "nothing listens there: start the server, or correct the address"
    if isinstance(error, (asyncio.TimeoutError, TimeoutError)):
        return "nothing answers there: start the server, or correct the address"
    return text


def stream_error(options: Options, error: Exception) -> BrokerError:
    """Return an error that says why JetStream cannot be used."""
    name = options.stream_name
    if isinstance(error, nats.js.errors.NotFoundError):
        return BrokerError(
            f"{options}: there is no stream {name}. Create it with the subjects "
            f"{options.prefix}.>, name another with stream=, or have it created with create=true."
        )
    if isinstance(error, nats.js.errors.ServiceUnavailableError):
        return BrokerError(f"{options}: JetStream is not enabled for this account.")
    text = getattr(error, "description", None) or str(error) or type(error).__name__
    return BrokerError(f"{options}: the stream {name} cannot be used: {text}")


class Loop:
    """An event loop in a thread of its own, for a library that works in event loops only."""

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
        """Whether this is the child of a fork, which has not got the thread."""
        return self._process != os.getpid()

    @property
    def is_alive(self) -> bool:
        """Whether the loop's thread goes on."""
        return self._thread.is_alive()

    def run(self, work: Coroutine[Any, Any, T], timeout: float) -> T:
        """Wait for the result of ``work`` in the loop. Raises TimeoutError after ``timeout`` s."""
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result(timeout)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise TimeoutError(f"no answer within {timeout:g} s") from None

    def connect(self, work: Coroutine[Any, Any, T], options: Options) -> T:
        """Return the result of ``work``, which connects. Raises BrokerError if nobody answers."""
        try:
            return self.run(work, _CONNECTED_SECONDS)
        except TimeoutError as error:
            raise BrokerError(f"{options}: not connected: {error}") from error

    def call(self, what: Callable[..., object], *arguments: object) -> None:
        """Call a function in the loop, if it has not ended, without waiting for it."""
        with contextlib.suppress(RuntimeError):  # The loop has ended.
            self.loop.call_soon_threadsafe(what, *arguments)

    def close(self) -> None:
        """End the loop and its thread."""
        if self.inherited or not self._thread.is_alive():
            return
        self.loop.call_soon_threadsafe(self.loop.stop)
        if threading.current_thread() is not self._thread:
            self._thread.join(5.0)
