"""What users and plugins import stays where it was first public, wherever the code is by now."""

import importlib

import pytest

PUBLIC = {
    "pgsignals": (
        "Backfill Batch BrokerError Column ConfigurationError ConnectError DatabaseError DriftError"
        " Event Gap Health Home Hub InstallLockError MissingExtraError ModelError PayloadError"
        " PgSignalsError PluginError PrivilegeError ReceiverError Resolver StateError Status Stream"
        " Subscription Table TableError TableRef WaitTimeout Watcher WatcherError astop backfill"
        " connected context default_hub disconnected gap health hookimpl muted on on_batch on_gap"
        " once receiver_failed run signal start status stop stream subscribe wait wait_for watch"
    ),
    "pgsignals.backoff": "Backoff",
    "pgsignals.broadcasters": "Broadcaster Checkable Pipelined",
    "pgsignals.broadcasters.ledger": "Chunk ChunkLedger SentLedger",
    "pgsignals.broadcasters.outlet": "BackendStatus",
    "pgsignals.cli": "main",
    "pgsignals.cloudevents": (
        "Heading Received Writer attributes_of former_record_key from_cloudevent header_name read"
        " record_key to_cloudevent"
    ),
    "pgsignals.console": "console",
    "pgsignals.contrib.alembic": "InstallWatchersOp UninstallWatchersOp",
    "pgsignals.contrib.django": "InstallWatchers start watchers",
    "pgsignals.contrib.flask": "PgSignals health position sse",
    "pgsignals.contrib.otel": "OpenTelemetryTracer",
    "pgsignals.contrib.prometheus": "PrometheusMetrics",
    "pgsignals.contrib.starlette": "aposition position sse",
    "pgsignals.errors": (
        "BrokerError ConfigurationError ConnectError DatabaseError DriftError InstallLockError"
        " MissingExtraError ModelError PayloadError PgSignalsError PluginError PrivilegeError"
        " ReceiverError StateError TableError WaitTimeout WatcherError"
    ),
    "pgsignals.hookspecs": (
        "hookimpl pgsignals_broadcaster pgsignals_commands pgsignals_resolver pgsignals_source"
    ),
    "pgsignals.inspection": "BackendStatus ForeignTable Health Status",
    "pgsignals.metrics": "COUNTERS GAUGES Metrics Tracer",
    "pgsignals.plugins.within": "within",
    "pgsignals.resolvers": "DjangoResolver PlainResolver SQLAlchemyResolver",
    "pgsignals.sources": "RemoteSink RemoteSource Wanted",
    "pgsignals.sources.missed": "announce_missed",
    "pgsignals.testing": (
        "EventLog Installation Server ServerFailed ServerNotFound Simulation find_installations"
        " simulated"
    ),
    "pgsignals.testing.conformance": "BroadcasterConformance Written make_event",
    "pgsignals.testing.pytest_plugin": "",
    "pgsignals.urls": "Address BrokerEnd BrokerOptions option parse_url scheme_of taking",
}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_can_be_imported(module: str) -> None:
    """Each public name is where the reference, the examples and the plugins take it from."""
    found = importlib.import_module(module)
    for name in PUBLIC[module].split():
        assert hasattr(found, name), name


@pytest.mark.parametrize("name", PUBLIC["pgsignals.errors"].split())
def test_public_errors_are_one(name: str) -> None:
    """An error that is raised is the one that users catch, by whichever path they name it."""
    root, errors = importlib.import_module("pgsignals"), importlib.import_module("pgsignals.errors")
    assert getattr(root, name) is getattr(errors, name)
