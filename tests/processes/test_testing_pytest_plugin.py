"""The pytest plugin: its fixtures in a test run of somebody else's."""

from __future__ import annotations

from pathlib import Path

import pytest

from pgsignals.testing import Server

pytest_plugins = "pytester"

SHOP = """
    import secrets
    import psycopg2
    import pytest
    import pgsignals

    class Existing:
        # Saves starting a server for each project.
        def create_database(self):
            name = f"db_{{secrets.token_hex(6)}}"
            connection = psycopg2.connect("{url}/postgres")
            connection.autocommit = True
            connection.cursor().execute(f"CREATE DATABASE {{name}} TEMPLATE template0")
            connection.close()
            return f"{url}/{{name}}"

    @pytest.fixture(scope="session")
    def pgsignals_server():
        return Existing()

    @pytest.fixture
    def run(pgsignals_dsn):
        connection = psycopg2.connect(pgsignals_dsn)
        connection.autocommit = True

        def run(statement):
            with connection.cursor() as cursor:
                cursor.execute(statement)

        run("CREATE TABLE users (id int PRIMARY KEY, name text)")
        yield run
        connection.close()
"""


@pytest.fixture
def inner(pytester: pytest.Pytester, server: Server) -> pytest.Pytester:
    """A project whose tests have a table ``users``."""
    pytester.makeconftest(SHOP.format(url=server.dsn().rpartition("/")[0]))
    return pytester


def run(pytester: pytest.Pytester) -> pytest.RunResult:
    """Run the project's tests in a process of their own, as a user would, in their order."""
    return pytester.runpytest_subprocess(
        *("-p", "no:cacheprovider", "-p", "no:randomly", "--timeout=60")
    )


def test_waiting_for_events(inner: pytest.Pytester) -> None:
    """Events are found whether they came before the call or come after it, each once."""
    inner.makepyfile(
        """
        import threading
        import pgsignals

        def test_it(events, run, pgsignals_hub, pgsignals_dsn):
            assert pgsignals_hub is pgsignals.default_hub
            pgsignals.start(pgsignals_dsn, ["users"])
            run("INSERT INTO users VALUES (1, 'ann'), (2, 'bob')")
            events.settle()
            assert events.wait_for("users", "inserted", id=2, timeout=0).id == 2
            assert events.wait_for("users", "inserted").id == 1
            events.none("users")
            threading.Thread(target=run, args=("UPDATE users SET name = 'x'",)).start()
            assert events.wait_for("users", "updated", id=1).op == "updated"
            assert [event.id for event in events.all("users", "inserted")] == [1, 2]

        def test_the_hub_was_stopped():
            assert not pgsignals.default_hub.running
        """
    )
    run(inner).assert_outcomes(passed=2)


def test_waiting_in_vain_says_what_came(inner: pytest.Pytester) -> None:
    """The message of a failure lists what came instead, or asks whether it was committed."""
    inner.makepyfile(
        """
        import pgsignals

        def test_other(events, run, pgsignals_hub, pgsignals_dsn):
            pgsignals_hub.start(pgsignals_dsn, ["users"])
            run("INSERT INTO users VALUES (1, 'ann')")
            events.settle()
            events.wait_for("users", "updated", id=1, timeout=0)

        def test_nothing(events, pgsignals_hub, run, pgsignals_dsn):
            pgsignals_hub.start(pgsignals_dsn, ["users"])
            events.wait_for("users", "updated", id=1, timeout=0)
        """
    )
    result = run(inner)
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(
        [
            "*No event (users, 'updated', id=1) within 0 s; what came*",
            "*<Event public.users inserted id=1>*",
            "*nothing else came. Was the transaction committed?*",
        ]
    )


def test_absence_is_proved(inner: pytest.Pytester) -> None:
    """``none`` fails for what was committed before it, however slow the receivers are."""
    inner.makepyfile(
        """
        import threading
        import pgsignals

        def test_absent(events, run, pgsignals_hub, pgsignals_dsn):
            go, seen = threading.Event(), []

            def slow(event):
                go.wait(30)
                seen.append(event.id)

            subscription = pgsignals.subscribe(slow, "users")
            pgsignals.start(pgsignals_dsn, ["users"], workers=3)
            run("INSERT INTO users SELECT n, '' FROM generate_series(1, 50) n")
            threading.Timer(0.1, go.set).start()
            events.none("users", "deleted")
            assert sorted(seen) == list(range(1, 51))
            subscription.cancel()

        def test_present(events, run, pgsignals_hub, pgsignals_dsn):
            pgsignals.start(pgsignals_dsn, ["users"])
            run("INSERT INTO users VALUES (1, 'ann')")
            events.none("users", "inserted")
        """
    )
    result = run(inner)
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*There is an event (users, 'inserted'): <Event *id=1>"])


def test_a_gap_leaves_absence_unproved(inner: pytest.Pytester) -> None:
    """``none`` fails where events may have been lost."""
    inner.makepyfile(
        """
        import pytest
        from pgsignals.testing import simulated

        def test_it(events):
            with simulated(["users"]) as sim:
                events.none("users")
                sim.gap()
                assert len(events.gaps) == 1
                with pytest.raises(AssertionError, match="cannot be told"):
                    events.none("users")
        """
    )
    run(inner).assert_outcomes(passed=1)


def test_questions_are_checked(inner: pytest.Pytester) -> None:
    """To wait for what no watcher delivers is an error, not a time-out; so is a stopped Hub."""
    inner.makepyfile(
        """
        import pgsignals
        import pytest

        def test_it(events, run, pgsignals_hub, pgsignals_dsn):
            with pytest.raises(pgsignals.StateError, match="not running"):
                events.none("users", "deleted")
            pgsignals.start(pgsignals_dsn, [("users", "inserted")])
            with pytest.raises(pgsignals.ReceiverError, match="no watcher delivers"):
                events.none("users", "deleted")
            with pytest.raises(pgsignals.ReceiverError, match="not an operation"):
                events.wait_for("users", "insert")
        """
    )
    run(inner).assert_outcomes(passed=1)


def test_another_hub(inner: pytest.Pytester) -> None:
    """A project that overrides ``pgsignals_hub`` gets the events of its own Hub."""
    inner.makepyfile(
        """
        import pgsignals
        import pytest

        @pytest.fixture
        def pgsignals_hub(pgsignals_dsn, run):
            with pgsignals.Hub().start(pgsignals_dsn, ["users"]) as hub:
                yield hub

        def test_it(events, run):
            run("INSERT INTO users VALUES (1, 'ann')")
            events.wait_for("users")
            assert not pgsignals.default_hub.running
        """
    )
    run(inner).assert_outcomes(passed=1)


def test_a_hub_that_was_running_goes_on(inner: pytest.Pytester) -> None:
    """A Hub that a fixture of wider scope has started is left alone."""
    inner.makepyfile(
        """
        import psycopg2
        import pytest
        import pgsignals

        @pytest.fixture(scope="module", autouse=True)
        def running(pgsignals_server):
            dsn = pgsignals_server.create_database()
            with psycopg2.connect(dsn) as connection, connection.cursor() as cursor:
                cursor.execute("CREATE TABLE users ()")
            connection.close()
            with pgsignals.start(dsn, ["users"]):
                yield

        @pytest.mark.parametrize("time", [1, 2])
        def test_it(time, events):
            assert pgsignals.default_hub.running
            events.none("users")
        """
    )
    run(inner).assert_outcomes(passed=2)


def test_it_starts_nothing_by_itself(pytester: pytest.Pytester) -> None:
    """A test run that uses no fixture of the plugin has no thread, server or framework of ours."""
    pytester.makepyfile(
        """
        import sys
        import threading

        def test_it():
            assert "pgsignals.testing.pytest_plugin" in sys.modules
            assert not {"sqlalchemy", "django", "flask"} & set(sys.modules)
            assert not [t for t in threading.enumerate() if t.name.startswith("pgsignals")]
        """
    )
    run(pytester).assert_outcomes(passed=1)


def test_a_server_and_a_database_of_its_own(pytester: pytest.Pytester) -> None:
    """Each test gets an empty database on a server that is gone after the session."""
    pytester.makepyfile(
        """
        import psycopg2
        import pytest

        @pytest.mark.parametrize("time", [1, 2])
        def test_it(time, pgsignals_dsn):
            connection = psycopg2.connect(pgsignals_dsn)
            with connection, connection.cursor() as cursor:
                cursor.execute("SHOW data_directory")
                with open("where", "w") as file:
                    file.write(cursor.fetchone()[0])
                cursor.execute("CREATE TABLE users ()")
            connection.close()
        """
    )
    run(pytester).assert_outcomes(passed=2)
    assert not Path((pytester.path / "where").read_text()).exists()


def test_the_write_ahead_log(inner: pytest.Pytester) -> None:
    """The plugin's fixtures serve WAL delivery, whose events are waited for as any other's."""
    inner.makepyfile(
        """
        def test_it(events, run, pgsignals_hub, pgsignals_dsn):
            pgsignals_hub.start(pgsignals_dsn, ["users"], delivery="wal", name="mailer")
            run("INSERT INTO users VALUES (1, 'Ann')")
            assert events.wait_for("users", "inserted", id=1).id == 1
            run("DELETE FROM users")
            events.wait_for("users", "deleted", id=1)
            pgsignals_hub.stop()
        """
    )
    run(inner).assert_outcomes(passed=1)
