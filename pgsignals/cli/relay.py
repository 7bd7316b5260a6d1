"""``pgsignals relay``: the events of tables to brokers, each once at least."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from pgsignals.core.errors import ConfigurationError, MissingExtraError, PluginError
from pgsignals.core.metrics import Metrics
from pgsignals.core.redaction import redact
from pgsignals.core.transport import Transport
from pgsignals.core.watchers import normalize
from pgsignals.hub.hub import Hub
from pgsignals.plugins.loader import load_plugins

from .doctor import print_findings
from .interrupt import interruptible
from .options import (
    App,
    Watched,
    app_option,
    capture_option,
    database_options,
    given_watchers,
    load_app,
    parse_watched,
)
from .output import examples, listed, notice
from .progress import Progress
from .relay_check import check_relay
from .relay_config import RelayConfig, make_target, read_config

_FILE = Path("pgsignals.toml")
_INSTALL = ("auto", "check", "off")
_DELIVERIES = [each.value for each in Transport if each.durable]


class _WrongConfiguration(click.ClickException):
    """The configuration is wrong, which a restart does not mend."""

    exit_code = 2


def _durable(ctx: click.Context, option: click.Parameter, value: str | None) -> Transport | None:
    return None if value is None else Transport(value)


@click.command(
    epilog=examples(
        "pgsignals relay --watch orders --to 'kafka://localhost:9092/?prefix=shop' --name shop",
        "pgsignals relay --delivery wal --watch orders --to nats://localhost/ --name s",
        "pgsignals relay --config pgsignals.toml --check",
        "pgsignals relay --config pgsignals.toml",
    )
)
@click.option(
    "--config",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A TOML file that says all of this; without --to, pgsignals.toml here, if it is there.",
)
@click.option(
    "--watch",
    "watched",
    metavar="WATCH",
    multiple=True,
    type=parse_watched,
    help="TABLE or TABLE:OPERATION,…; may be given several times.",
)
@app_option
@click.option(
    "--to",
    "targets",
    metavar="[NAME=]URL",
    multiple=True,
    help="A broker, or env:VARIABLE or file:PATH that has its URL; may be given several times.",
)
@click.option(
    "--name",
    help="Its cursors are NAME/kafka and so on; relays of one name stand by for each other.",
)
@click.option(
    "--delivery",
    type=click.Choice(_DELIVERIES),
    callback=_durable,
    help="From the outbox (unless the file says otherwise), or from the write-ahead log.",
)
@capture_option
@click.option(
    "--allow-unbounded-wal",
    is_flag=True,
    help="With --delivery wal: also where the server keeps its log without a bound.",
)
@click.option(
    "--install",
    type=click.Choice(_INSTALL),
    help="As start(install=…): create triggers that are missing (auto, unless the file says "
    "otherwise), check, or do not look.",
)
@database_options
@click.option(
    "--check", is_flag=True, help="Check the file, the database and the brokers, and end."
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    default=10.0,
    show_default=True,
    help="How many seconds brokers have, at the end, to acknowledge what was read.",
)
@click.option(
    "--every",
    type=click.FloatRange(min=0.1),
    default=60.0,
    show_default=True,
    help="How many seconds lie between lines that tell of progress, where there is no terminal.",
)
@click.option(
    "--metrics-port",
    metavar="[HOST:]PORT",
    help="Serve metrics for Prometheus there, by default at 127.0.0.1.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Tell of progress by lines of JSON, on stdout."
)
@click.pass_context
def relay(
    ctx: click.Context,
    /,
    path: Path | None,
    watched: tuple[Watched, ...],
    app: App,
    targets: tuple[str, ...],
    check: bool,
    timeout: float,
    every: float,
    as_json: bool,
    delivery: Transport | None,
    **given: Any,
) -> None:
    """Pass the events of tables on to brokers, from the outbox, until SIGTERM or Ctrl-C.

    With --delivery wal they come from PostgreSQL's write-ahead log.

    Each target has a cursor of its own, which moves when the broker has acknowledged. A broker that
    is away is tried again for as long as it takes, and holds up no other. A second relay of the
    same name stands by, and takes over when the first one ends, however it does.

    Options go before the file's keys; what they watch, and their targets, are added to its own.

    Exit codes: 0 ended by a signal; what a broker had not acknowledged waits for the next one. 1 an
    error: the database cannot be used, or a check failed. 2 a wrong command line or file.
    """
    # An application that only notifies has its relay read the outbox.
    given["delivery"] = delivery.value if delivery is not None and delivery.durable else None
    try:
        config = _configured(ctx, path, watched, app, targets, given)
        plugins = load_plugins()
        broadcasters = {
            each.name: plugins.broadcaster(each.url, f"The target {each.name!r}")
            for each in config.targets
        }
        place = None if config.metrics_port is None else _metrics_place(config.metrics_port)
    except (ConfigurationError, MissingExtraError, PluginError) as error:
        raise _WrongConfiguration(redact(str(error))) from error
    if check:
        ctx.exit(print_findings(check_relay(config, broadcasters), as_json))
    metrics = None if place is None else _serve_metrics(*place)
    _relay(config, metrics, timeout, every, as_json)


def _configured(
    ctx: click.Context,
    path: Path | None,
    watched: Sequence[Watched],
    app: App,
    targets: Sequence[str],
    given: Mapping[str, Any],
) -> RelayConfig:
    """Return the configuration; ``given`` are the options that are named as its fields."""
    if path is None and not targets and _FILE.exists():
        path = _FILE
    options: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    # Options from the environment, or from a framework's settings, hold if a file has none.
    found = replace(RelayConfig(), **options)
    if path is not None:
        said = {key: value for key, value in options.items() if _said(ctx, key)}
        found = replace(read_config(path, found), **said)
    watchers = [
        *found.watchers,
        *given_watchers(watched, app, required=False),
        *load_app(found.app),
    ]
    found = replace(
        found,
        watchers=normalize(watchers),
        targets=(*found.targets, *map(make_target, targets)),
    )
    if found.delivery != "wal" and (found.capture is not None or found.allow_unbounded_wal):
        raise click.UsageError(
            "capture and allow_unbounded_wal are of WAL delivery: add --delivery wal, or "
            'delivery = "wal" in the file.'
        )
    if not found.watchers:
        raise click.UsageError("Give what to watch: --watch orders, --app, or [[watch]] in a file.")
    if not found.targets:
        raise click.UsageError(
            "Give where events go: --to with the URL of a broker, or [[target]] in a file."
        )
    if not found.name:
        raise click.UsageError(
            "Give the relay a name, by which it finds its place again: --name shop, or name in a "
            "file."
        )
    names = [target.name for target in found.targets]
    for each in names:
        if names.count(each) > 1:
            raise ConfigurationError(
                f"Two targets are called {each!r}: give one another name, with NAME=URL or name in "
                "[[target]], and keep it, since its place in the log is kept by it."
            )
    return found


def _said(ctx: click.Context, option: str) -> bool:
    """Whether an option stands on the command line."""
    return ctx.get_parameter_source(option) == ParameterSource.COMMANDLINE


def _relay(
    config: RelayConfig, metrics: Metrics | None, timeout: float, every: float, as_json: bool
) -> None:
    hub = Hub()
    assert config.name is not None
    with interruptible() as end:
        try:
            backends = {target.name: target.url for target in config.targets}
            hub.start(**config.given | {"backends": backends, "metrics": metrics})
            names = [target.name for target in config.targets]
            notice(
                f"Relaying {listed(config.watchers)} to {', '.join(names)} as {config.name!r}. "
                "Press Ctrl-C to stop."
            )
            with closing(Progress(config.name, names, hub.health, every, as_json)) as progress:
                while end.wait(progress.pause) is None:
                    progress.tell()
                notice("Ending: brokers acknowledge what was read.")
        finally:
            drained = hub.stop(timeout)
    if not drained:
        notice("What was not acknowledged waits for the next relay.")


def _metrics_place(text: str) -> tuple[str, int]:
    """Return the host and the port to serve metrics at. Raises ConfigurationError."""
    host, _, port = text.rpartition(":")
    if not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
        raise ConfigurationError(
            f"metrics_port={text!r}: write PORT or HOST:PORT, with a port up to 65535."
        )
    return host or "127.0.0.1", int(port)


def _serve_metrics(host: str, port: int) -> Metrics:
    # Imported before prometheus_client itself, whose absence this tells.
    from pgsignals.contrib.prometheus import PrometheusMetrics  # isort: skip

    from prometheus_client import start_http_server

    try:
        start_http_server(port, host)
    except OSError as error:
        raise click.ClickException(f"--metrics-port {host}:{port}: {error}") from error
    return PrometheusMetrics()
