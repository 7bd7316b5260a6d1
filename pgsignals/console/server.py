"""The console by itself: an application and a server of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flask import Flask

from ..core.errors import ConfigurationError, MissingExtraError
from ..core.threads import Thread
from ..overview.monitor import Monitor
from .guards import PASSWORD_VARIABLE, Hosts, Login, is_loopback
from .pages import make_blueprint

# Each tab takes a thread for as long as it is looked at.
_STREAMS = 56
_THREADS = 64


class ConsoleServer:
    """Serves the console at an address, from ``start`` to ``close``.

    Anywhere but at this machine's own address it takes a ``password``. Raises ConfigurationError
    without one, and OSError for an address that cannot be had.
    """

    def __init__(
        self,
        dsn: str,
        host: str,
        port: int,
        *,
        hostnames: Sequence[str] = (),
        password: str = "",
        allow_actions: bool = False,
        show_values: bool = False,
    ) -> None:
        if not password and not is_loopback(host):
            raise ConfigurationError(
                f"The console shows tables, errors and tracebacks, and {host} can be reached from "
                f"elsewhere: set {PASSWORD_VARIABLE}, or leave --host out and come by a tunnel "
                "(ssh -L)."
            )
        try:
            from waitress.server import create_server
        except ImportError as error:
            raise MissingExtraError(
                "The console needs the package waitress: pip install 'pgsignals[console]'"
            ) from error
        login = Login(password) if password else lambda: True
        self._monitor = Monitor(dsn, values=show_values)
        app = Flask("pgsignals.console", static_folder=None)
        app.register_blueprint(
            make_blueprint(
                self._monitor,
                login,
                allow_actions,
                show_values,
                Hosts.of([*hostnames, host]),
                most_streams=_STREAMS,
            )
        )
        self._server: Any = create_server(
            app, host=host, port=port, threads=_THREADS, ident=None, channel_timeout=120
        )
        self._thread = Thread("console-server", self._server.run)

    @property
    def url(self) -> str:
        """The page's address."""
        host = self._server.effective_host
        return f"http://{f'[{host}]' if ':' in host else host}:{self._server.effective_port}/"

    def start(self) -> None:
        """Serve, in threads."""
        self._thread.start()

    def close(self) -> None:
        """End the streams, and the server."""
        self._monitor.close()
        self._server.task_dispatcher.shutdown(timeout=1)
        self._server.close()
