"""The throwaway server of pgsignals.testing, against every PostgreSQL that is installed."""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psycopg2
import pytest

from pgsignals.errors import PgSignalsError, StateError
from pgsignals.testing import Installation, Server, ServerFailed, ServerNotFound, find_installations
from pgsignals.testing import server as module
from tests.conftest import DEADLINE
from tests.missing import tls
from tests.waiting import eventually

INSTALLATIONS = find_installations()
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root has to give up privileges")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PGSIGNALS_POSTGRES_BIN", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(module, "_SYSTEM_BINDIRS", ("/nowhere/*/bin",))
    monkeypatch.setattr(module, "_EXTRA_PACKAGE", "no_such_package")


def ask(dsn: str, query: str) -> Any:
    """The first column of the first row, or None from a statement that returns no rows."""
    with closing(psycopg2.connect(dsn)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(query)
            return cursor.fetchone()[0] if cursor.description else None


def home_of(server: Server) -> Path:
    return Path(ask(server.dsn(), "SHOW data_directory")).parent


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for_exit(pid: int) -> None:
    try:
        watched = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([watched], [], [], 20)[0], f"process {pid} still runs"
    finally:
        os.close(watched)


@pytest.mark.parametrize("version", sorted({each.version for each in INSTALLATIONS}))
def test_runs_the_version_asked_for(version: int) -> None:
    """Each installed major version starts and says that it is that version."""
    with Server(version) as server:
        assert server.version == version
        assert int(ask(server.dsn(), "SHOW server_version_num")) // 10_000 == version


def test_prefers_the_first_installation(server: Server) -> None:
    """Without a version, the server is the first one of find_installations."""
    assert server.installation == INSTALLATIONS[0]


def test_installations_of_the_extra_come_last() -> None:
    """The binaries of the demo extra are preferred to nothing but their absence."""
    origins = [each.origin for each in INSTALLATIONS]
    assert origins == sorted(origins, key="extra".__eq__)


def test_the_variable_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder named by the environment variable is preferred to all others."""
    last = INSTALLATIONS[-1]
    monkeypatch.setenv("PGSIGNALS_POSTGRES_BIN", str(last.bindir))
    expected = Installation(last.bindir, last.version, "PGSIGNALS_POSTGRES_BIN")
    assert find_installations()[0] == expected
    assert Server().installation == expected


def test_the_variable_must_name_a_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A variable that names a folder without a server is an error that quotes it."""
    monkeypatch.setenv("PGSIGNALS_POSTGRES_BIN", str(tmp_path))
    with pytest.raises(ServerNotFound, match="PGSIGNALS_POSTGRES_BIN") as caught:
        find_installations()
    assert repr(str(tmp_path)) in str(caught.value)


def test_a_missing_version_names_those_there_are() -> None:
    """The error for a version that is not installed lists what is."""
    with pytest.raises(ServerNotFound, match="No PostgreSQL 9 server was found") as caught:
        Server(9)
    for installation in INSTALLATIONS:
        assert f"{installation.version} in {installation.bindir}" in str(caught.value)


@pytest.mark.usefixtures("nothing_installed")
def test_nothing_found_says_where_it_looked_and_the_fix() -> None:
    """The error on a machine without PostgreSQL says what was searched and how to install it."""
    assert find_installations() == []
    with pytest.raises(PgSignalsError) as caught:
        Server()
    assert isinstance(caught.value, ServerNotFound)
    for part in (
        "No PostgreSQL server was found (found: none)",
        "PGSIGNALS_POSTGRES_BIN",
        "PATH",
        "/nowhere/*/bin",
        "no_such_package",
        "pip install 'pgsignals[demo]'",
        "apt install postgresql",
    ):
        assert part in str(caught.value)


def test_a_program_that_is_not_postgres_is_no_installation(
    nothing_installed: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Programs that only have the right names are passed over."""
    for name in ("postgres", "initdb"):
        (tmp_path / name).write_text("#!/bin/sh\necho something else 17\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_installations() == []


def test_databases_are_fresh_and_distinct(server: Server) -> None:
    """Each call makes an empty database under a name of its own."""
    first, second = server.create_database(), server.create_database()
    ask(first, "CREATE TABLE t ()")
    assert first != second
    assert ask(second, "SELECT to_regclass('t')") is None


def test_a_database_may_have_any_name(server: Server) -> None:
    """A name with quotes, spaces, slashes and umlauts arrives as it is."""
    name = 'a "b"/c?d=é%20'
    assert ask(server.create_database(name), "SELECT current_database()") == name


def test_settings_reach_the_server() -> None:
    """Settings are in force, whatever characters they have, and override the defaults."""
    settings = {"wal_level": "logical", "fsync": "on", "application_name": "it's"}
    with Server(settings=settings) as server:
        assert ask(server.dsn(), "SHOW wal_level") == "logical"
        assert ask(server.dsn(), "SHOW fsync") == "on"
        assert ask(server.dsn(), "SELECT reset_val FROM pg_settings WHERE name = 'fsync'") == "on"


def test_durability_is_off_unless_asked_for(server: Server) -> None:
    """Commits do not wait for the disk by default."""
    assert ask(server.dsn(), "SHOW fsync") == "off"


def test_restart_keeps_data_and_port() -> None:
    """A restart ends the connections and keeps the rest."""
    with Server() as server:
        dsn, pid = server.dsn(), server.pid
        ask(dsn, "CREATE TABLE kept AS SELECT 42 AS answer")
        with closing(psycopg2.connect(dsn)) as connection:
            server.restart()
            with pytest.raises(psycopg2.OperationalError):
                connection.cursor().execute("SELECT 1")
        assert server.pid != pid
        assert server.dsn() == dsn
        assert ask(dsn, "SELECT answer FROM kept") == 42


def test_an_immediate_stop_is_a_crash() -> None:
    """After an immediate stop, the next start recovers, and the new log lines say so."""
    with Server() as server:
        mark = len(server.log_text())
        server.restart("immediate")
        lines = server.log_lines_since(mark)
        assert any("was not properly shut down" in line for line in lines)
        assert not any("FATAL" in line for line in lines)


def test_stop_keeps_data_for_another_start() -> None:
    """A stopped server is gone for its clients, and starts again with its data."""
    with Server() as server:
        dsn, pid = server.dsn(), server.pid
        ask(dsn, "CREATE TABLE kept ()")
        server.stop()
        server.stop()
        assert not is_running(pid)
        with pytest.raises(psycopg2.OperationalError):
            psycopg2.connect(dsn)
        with pytest.raises(StateError, match="start"):
            _ = server.pid
        server.start()
        assert ask(dsn, "SELECT to_regclass('kept')") == "kept"


def test_a_smart_stop_waits_for_clients_and_gives_up() -> None:
    """A smart stop that a client holds up is an error after the timeout, and a fast one ends it."""
    with Server() as server:
        with closing(psycopg2.connect(server.dsn())):
            with pytest.raises(ServerFailed, match="smart"):
                server.stop("smart", timeout=0.1)
            server.stop("fast")
        server.start()
        assert ask(server.dsn(), "SELECT 1") == 1


def test_a_killed_server_starts_again() -> None:
    """A server whose postmaster was killed can be stopped and started as usual."""
    with Server() as server:
        os.kill(server.pid, signal.SIGKILL)
        server.restart()
        assert ask(server.dsn(), "SELECT 1") == 1


def test_a_start_waits_for_what_a_killed_server_has_left(each_version: int) -> None:
    """A server starts once the processes of its postmaster that was killed have gone."""
    with Server(each_version) as server:
        # It says which processes it has a moment after it takes connections.
        checkpointer = (
            "SELECT pg_catalog.max(pid) FROM pg_stat_activity WHERE backend_type = 'checkpointer'"
        )
        left = eventually(lambda: ask(server.dsn(), checkpointer), bool)
        os.kill(left, signal.SIGSTOP)
        try:
            os.kill(server.pid, signal.SIGKILL)
            server.stop()
            mark = len(server.log_text())
            with ThreadPoolExecutor() as pool:
                start = pool.submit(server.start)
                eventually(lambda: "memory block" in server.log_text()[mark:], bool)
                os.kill(left, signal.SIGCONT)
                start.result(DEADLINE)
        finally:
            with suppress(ProcessLookupError):
                os.kill(left, signal.SIGCONT)
        assert ask(server.dsn(), "SELECT 1") == 1


def test_close_leaves_nothing() -> None:
    """Neither a process nor a folder is left after the context, and nothing can be asked of it."""
    with Server() as server:
        home, pid, dsn = home_of(server), server.pid, server.dsn()
        sentry = server._sentry
    assert sentry is not None
    assert not home.exists()
    assert not is_running(pid)
    assert not is_running(sentry.pid)
    with pytest.raises(psycopg2.OperationalError):
        psycopg2.connect(dsn)
    with pytest.raises(StateError, match="start"):
        server.dsn()
    assert server.log_text() == ""
    server.close()


def test_its_data_lies_in_the_folder_given() -> None:
    """The folder holds all that the server has, and nothing after it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        folder.chmod(0o755)
        with Server(folder=folder) as server:
            assert home_of(server).parent == folder
        assert list(folder.iterdir()) == []


def test_a_failed_start_shows_the_log_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting that PostgreSQL refuses is in the error's text, and no folder remains."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o777)
        monkeypatch.setattr(module.tempfile, "tempdir", folder)
        server = Server(settings={"wal_level": "nonsense"})
        with pytest.raises(ServerFailed, match='for parameter "wal_level": "nonsense"'):
            server.start()
        assert os.listdir(folder) == []


def test_a_port_that_was_just_taken_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server whose port somebody else took first starts on another one."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = module._free_port()
        ports = iter([taken.getsockname()[1], free, *[0] * 3])
        monkeypatch.setattr(module, "_free_port", lambda: next(ports))
        with Server() as server:
            assert server.port == free


def test_the_log_has_what_clients_caused(server: Server) -> None:
    """An error in a statement is in the log by the time that its client knows of it."""
    mark = len(server.log_text())
    with pytest.raises(psycopg2.Error):
        ask(server.dsn(), "SELECT 1 / 0")
    assert any("division by zero" in line for line in server.log_lines_since(mark))


def test_a_password_is_demanded() -> None:
    """With a password set, the URL carries it and nobody connects without it."""
    with Server(password="s3cret/@:") as server:
        assert ask(server.dsn(), "SELECT current_user") == "postgres"
        with pytest.raises(psycopg2.OperationalError, match="authentication failed"):
            psycopg2.connect(server.dsn(password="wrong"))
        ask(server.dsn(), "CREATE ROLE reader LOGIN PASSWORD 'other'")
        assert ask(server.dsn(user="reader", password="other"), "SELECT current_user") == "reader"
        assert not (home_of(server) / "password").exists()


def test_tls_is_offered() -> None:
    """With tls, a client may verify the server by its own certificate."""
    tls()
    with Server(tls=True) as server:
        certificate = home_of(server) / "data" / "server.crt"
        dsn = f"{server.dsn()}?sslmode=verify-full&sslrootcert={certificate}"
        assert ask(dsn, "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()") is True


def test_a_forked_child_leaves_the_server_alone(server: Server) -> None:
    """Closing the copy that a forked child has does nothing to the server."""
    child = os.fork()
    if child == 0:
        try:
            server.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert ask(server.dsn(), "SELECT 1") == 1


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux to wait for strangers")
@pytest.mark.parametrize("ending", ["sys.exit()", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_the_server_does_not_outlive_its_process(ending: str) -> None:
    """The server and its folder go away with their process, even if that is killed."""
    script = f"""if True:
        import os, signal, sys
        from pgsignals.testing import Server
        server = Server()
        server.start()
        print(server.pid, server._sentry.pid, server._home, flush=True)
        {ending}
    """
    output = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    postmaster, sentry, home = output.stdout.split()
    wait_for_exit(int(postmaster))
    wait_for_exit(int(sentry))
    assert not Path(home).exists()


@as_root
def test_root_hands_over_to_an_unprivileged_user(server: Server) -> None:
    """The server of a root process does not belong to root."""
    assert home_of(server).stat().st_uid != 0


@as_root
def test_binaries_that_the_unprivileged_user_cannot_reach(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Binaries in a folder that is closed to others, like root's home, run all the same."""
    extra = next((each for each in INSTALLATIONS if each.origin == "extra"), None)
    if extra is None:
        pytest.skip("needs the binaries of the demo extra, which can be moved")
    package = extra.bindir.parent.parent
    moved = tmp_path / package.name / extra.bindir.parent.name
    shutil.copytree(extra.bindir.parent, moved, symlinks=True)
    libraries = f"{package.name}.libs"
    shutil.copytree(package.with_name(libraries), tmp_path / libraries, symlinks=True)
    tmp_path.chmod(0o700)
    monkeypatch.setenv("PGSIGNALS_POSTGRES_BIN", str(moved / "bin"))
    with Server() as server:
        assert server.installation.bindir == moved / "bin"
        assert ask(server.create_database(), "SELECT 1") == 1
        home = home_of(server)
    assert not home.exists()


@as_root
def test_an_unreachable_temporary_folder_is_avoided(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A temporary folder that is closed to the unprivileged user is not used."""
    tmp_path.chmod(0o700)
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    with Server() as server:
        assert home_of(server).parent == Path("/tmp")


@as_root
def test_works_for_an_ordinary_user() -> None:
    """A process that is not root runs the server as itself."""
    # It gives up root after the imports: the interpreter may lie where only root can read.
    script = """if True:
        import os, sys
        import psycopg2
        from pgsignals.testing import Server
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        with Server() as server:
            psycopg2.connect(server.create_database()).close()
            print(os.stat(server._home).st_uid)
    """
    if INSTALLATIONS[0].origin == "extra":
        pytest.skip("needs binaries that everybody can run")
    output = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert output.stdout.split() == ["65534"]
