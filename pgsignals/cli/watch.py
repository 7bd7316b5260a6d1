"""``pgsignals watch``: events of tables, as they happen."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import click
import psycopg2
from psycopg2.extensions import cursor as Cursor

from pgsignals.core.errors import PgSignalsError
from pgsignals.core.events import Event
from pgsignals.core.json import to_json
from pgsignals.core.logging import log
from pgsignals.core.redaction import error_text
from pgsignals.core.transport import Transport
from pgsignals.core.watchers import Watcher, normalize
from pgsignals.core.watchers import watch as make_watcher
from pgsignals.hub.hub import Hub
from pgsignals.hub.options import all_resolvers
from pgsignals.postgres.connection import opened
from pgsignals.triggers.catalogue import read_installed
from pgsignals.triggers.installer import prune
from pgsignals.triggers.table_lookup import describe, resolve

from .interrupt import End, interruptible
from .options import Scope, Watched, given_watchers, parse_names, scope_options
from .output import abandon_stdout, amount, event_line, examples, listed, notice, value_text

_TIMED_OUT = 124  # as timeout(1) has it
_RELEASE_SECONDS = 5.0
_DRAIN_SECONDS = 10.0
_BLOCKED_SECONDS = 0.5


@dataclass(frozen=True)
class _Columns:
    """The options about columns."""

    compared: tuple[str, ...]
    extra: tuple[str, ...]
    everything: bool
    ids_only: bool

    @property
    def by_default(self) -> bool:
        """Whether there are no such options: updates then show whatever changed."""
        return not (self.compared or self.extra or self.everything or self.ids_only)


@click.command(
    epilog=examples(
        "pgsignals watch orders users:updated",
        "pgsignals watch orders:updated --columns status --when 'NEW.total > 100'",
        "pgsignals watch orders:inserted --json --count 1 --timeout 60",
        "pgsignals watch documents --exec 'jq -r .id | xargs ./reindex'",
        "pgsignals watch orders --delivery outbox --name audit --json >> audit.jsonl",
    )
)
@scope_options
@click.option(
    "--name",
    metavar="NAME",
    help="With --delivery outbox or wal: the consumer that goes on where it was, from one run to "
    "the next. Without, events are those from now on.",
)
@click.option(
    "--allow-unbounded-wal",
    is_flag=True,
    help="With --delivery wal and --name: also where the server keeps its log without a bound.",
)
@click.option(
    "--columns", metavar="A,B", type=parse_names, help="Only updates that change one of these."
)
@click.option("--extra", metavar="A,B", type=parse_names, help="Columns whose values to show.")
@click.option("--all-columns", is_flag=True, help="Show the values of all columns.")
@click.option("--ids-only", is_flag=True, help="Show no values, not even what an update changed.")
@click.option("--when", help="An SQL condition over NEW and OLD.")
@click.option("--json", "as_json", is_flag=True, help="Print an event as one line of JSON.")
@click.option("--count", type=click.IntRange(min=1), help="End after this many events.")
@click.option("--timeout", type=click.FloatRange(min=0), help="End after this many seconds.")
@click.option(
    "--exec",
    "shell_command",
    metavar="COMMAND",
    help="Run a shell command for each event, one after the other, with the event's JSON on its "
    "stdin and PGSIGNALS_OP, PGSIGNALS_TABLE and PGSIGNALS_ID set. What it prints goes to stderr; "
    "when it fails, that is told there too.",
)
@click.option("--keep", is_flag=True, help="Leave the triggers that this installs.")
@click.pass_context
def watch(
    ctx: click.Context,
    scope: Scope,
    name: str | None,
    allow_unbounded_wal: bool,
    columns: tuple[str, ...] | None,
    extra: tuple[str, ...] | None,
    all_columns: bool,
    ids_only: bool,
    when: str | None,
    as_json: bool,
    count: int | None,
    timeout: float | None,
    shell_command: str | None,
    keep: bool,
) -> None:
    """Print a line for each change of the watched tables.

    WATCH is TABLE or TABLE:OPERATION,… with the operations inserted, updated, deleted (the
    default: these three) and truncated: orders, users:updated, sales.orders:inserted,deleted.

    Events go to stdout, everything else to stderr. It ends at Ctrl-C or SIGTERM, and then removes
    the triggers that it had installed, unless somebody else has come to listen to them, or the
    consumer of --name, which needs them while it is down.

    Exit codes: 0 well, 1 an error, 2 a wrong command line, 124 when --timeout was over before
    --count events had come.
    """
    asked = _Columns(columns or (), extra or (), all_columns, ids_only)
    _check(scope, asked, when, name, allow_unbounded_wal, count)
    from_app = given_watchers((), scope.app, required=not scope.watched)

    hub = Hub()
    with interruptible() as end:
        printer = _Printer(end, as_json, count, shell_command, lossless=name is not None)
        deadline = None if timeout is None else time.monotonic() + timeout
        with opened(scope.dsn) as cursor:
            ours = _watchers(cursor, scope.watched, asked, when)
            watchers = normalize([*ours, *from_app])
            wanted = scope.define(cursor, watchers)
            there = {item.name for item in read_installed(cursor, scope.namespace)}
        for number, watcher in enumerate(watchers):
            shown = () if asked.by_default and number < len(ours) else watcher.extra
            target = watcher.model if watcher.label is None else watcher.label
            hub.subscribe(printer.receiver(shown), target, *watcher.ops)
        try:
            hub.start(
                scope.dsn,
                watchers,
                delivery=scope.delivery.value,
                capture=scope.capture,
                name=name,
                allow_unbounded_wal=allow_unbounded_wal,
                namespace=scope.namespace,
                prune=False,
            )
            notice(f"Watching {listed(watchers)}. Press Ctrl-C to stop.")
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            reason = end.wait(left)
            if name is None:
                printer.close()
        finally:
            keep = keep or name is not None
            names = {definition.trigger.name for definition in wanted} - there
            listening = _Listeners(scope.dsn, scope.namespace, names)
            if not keep:
                listening.count()
            hub.stop(_BLOCKED_SECONDS if printer.stuck else _DRAIN_SECONDS)
            if not keep:
                listening.uninstall()
    if name is not None:
        notice(f"The consumer {name!r} stays: `pgsignals consumers drop` gives it up.")
    notice(amount(printer.printed, "event"))
    if printer.failure is not None:
        raise printer.failure
    if reason is None and count is not None:
        ctx.exit(_TIMED_OUT)


def _check(
    scope: Scope,
    asked: _Columns,
    when: str | None,
    name: str | None,
    allow_unbounded_wal: bool,
    count: int | None,
) -> None:
    """Raise UsageError for options that do not go together."""
    if asked.ids_only and (asked.compared or asked.extra or asked.everything):
        raise click.UsageError("--ids-only does not go with --columns, --extra or --all-columns.")
    if asked.compared and not any("updated" in each.ops for each in scope.watched):
        raise click.UsageError("--columns is about updates, and no WATCH argument has 'updated'.")
    if scope.app is not None and not scope.watched and (when or not asked.by_default):
        raise click.UsageError("The watchers of --app say themselves what they show and when.")
    if name is not None and not scope.delivery.durable:
        raise click.UsageError("--name is a consumer's: add --delivery outbox or --delivery wal.")
    if allow_unbounded_wal and scope.delivery is not Transport.WAL:
        raise click.UsageError("--allow-unbounded-wal is of WAL delivery: add --delivery wal.")
    if name is not None and count is not None:
        raise click.UsageError(
            "--count does not go with --name: what a consumer has read beyond it would not be "
            "acknowledged, and come again each time."
        )


@dataclass
class _Printer:
    """Prints events, one at a time, until it is closed."""

    end: End
    as_json: bool
    count: int | None
    shell_command: str | None
    lossless: bool
    printed: int = 0
    failure: Exception | None = None
    _closed: threading.Event = field(default_factory=threading.Event)
    _never: threading.Event = field(default_factory=threading.Event)

    @property
    def stuck(self) -> bool:
        """Whether its receivers do not return, since their events could not be printed.

        An event is acknowledged when its receiver returns.
        """
        return self.lossless and self._closed.is_set()

    def receiver(self, unchanged: Collection[str]) -> Callable[[Event], None]:
        """Return a receiver; ``unchanged`` are columns to show though an update left them alone."""

        def receive(event: Event) -> None:
            if not self._closed.is_set():
                self._print(event, unchanged)
            if self.stuck:
                self._never.wait()

        return receive

    def close(self) -> None:
        """Print nothing more: what is still queued must not hold up the end."""
        self._closed.set()

    def _print(self, event: Event, unchanged: Collection[str]) -> None:
        try:
            click.echo(to_json(event.to_dict()) if self.as_json else event_line(event, unchanged))
        except OSError as error:
            abandon_stdout()
            # A reader such as head(1) that has read enough is no failure.
            if not isinstance(error, BrokenPipeError):
                self.failure = click.ClickException(f"Cannot print to stdout: {error.strerror}.")
            self._finish()
            return
        self.printed += 1
        if self.shell_command is not None:
            _run(self.shell_command, event)
        if self.printed == self.count:
            self._finish()

    def _finish(self) -> None:
        self.close()
        self.end.give("finished")


def _run(command: str, event: Event) -> None:
    """Run the user's command for an event, and tell how it failed if it does."""
    text = to_json(event.to_dict())
    identity = event.id
    environment = {
        **os.environ,
        "PGSIGNALS_OP": event.op,
        "PGSIGNALS_TABLE": f"{event.schema}.{event.table}",
        "PGSIGNALS_ID": to_json(identity)
        if isinstance(identity, tuple)
        else ("" if identity is None else str(identity)),
    }
    try:
        done = subprocess.run(
            command, shell=True, input=f"{text}\n".encode(), stdout=2, env=environment
        )
    except (OSError, ValueError) as error:
        notice(f"--exec could not run for event {event.uid}: {error}")
        return
    if done.returncode:
        how = (
            f"ended with exit code {done.returncode}"
            if done.returncode > 0
            else f"was ended by signal {-done.returncode}"
        )
        notice(f"--exec {how} for {event.op} on {event.table} id={value_text(event.id)}")


def _watchers(
    cursor: Cursor, watched: Sequence[Watched], asked: _Columns, when: str | None
) -> list[Watcher]:
    """Return the watchers that the options want: updates apart, since columns are theirs alone."""
    resolvers = all_resolvers(())
    found = []
    for each in watched:
        extra = asked.extra
        changes = asked.extra
        if asked.everything or asked.by_default:
            ref, _ = resolve(each.table, resolvers)
            table = describe(cursor, ref)
            everything = tuple(c.attribute for c in table.columns if c.name not in table.key)
            changes = everything
            extra = everything if asked.everything else ()
        others = [op for op in each.ops if op in ("inserted", "deleted")]
        if others:
            found.append(make_watcher(each.table, *others, when=when, extra=extra))
        if "updated" in each.ops:
            found.append(
                make_watcher(
                    each.table, "updated", columns=asked.compared, when=when, extra=changes
                )
            )
        if "truncated" in each.ops:
            found.append(make_watcher(each.table, "truncated"))
    return found


class _Listeners:
    """The listeners of triggers that were not there before us: what others use is left."""

    def __init__(self, dsn: str, namespace: str, names: Collection[str]) -> None:
        self._dsn = dsn
        self._namespace = namespace
        self._names = sorted(names)
        self._before: dict[str, int] = {}

    def count(self) -> None:
        """Count the listeners while we are one of them."""
        if not self._names:
            return
        try:
            with opened(self._dsn) as cursor:
                self._before = self._now(cursor)
        except (PgSignalsError, psycopg2.Error) as error:
            # Without a database we are no listener either; that it is away is told at the end.
            log.debug("cannot count listeners: %s", error_text(error))

    def uninstall(self) -> None:
        """Remove the triggers to which nobody listens any more.

        Raises PgSignalsError if the database cannot be asked.
        """
        if not self._names:
            return
        deadline = time.monotonic() + _RELEASE_SECONDS
        with opened(self._dsn) as cursor:
            # A server process lives on for a moment without its client, and still has its lock.
            while self._release_pending(cursor) and time.monotonic() < deadline:
                time.sleep(0.02)
            removed = len(prune(cursor, self._namespace, only=self._names))
            left = self._now(cursor)
        if removed:
            notice(f"Removed {amount(removed, 'trigger')}.")
        if left:
            notice(
                f"Left {amount(len(left), 'trigger')} in place, used or locked by somebody else: "
                "`pgsignals uninstall` removes what nobody uses."
            )

    def _release_pending(self, cursor: Cursor) -> bool:
        """Whether we still count as a listener."""
        return any(
            count >= max(self._before.get(name, 0), 1) for name, count in self._now(cursor).items()
        )

    def _now(self, cursor: Cursor) -> dict[str, int]:
        return {
            item.name: item.listeners
            for item in read_installed(cursor, self._namespace)
            if item.name in self._names
        }
