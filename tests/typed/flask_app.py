"""A small typed application on Flask."""

from __future__ import annotations

from typing import Any

from flask import Flask, Response
from typing_extensions import assert_type

import pgsignals
from pgsignals import Batch, Event, Gap, Hub
from pgsignals.contrib.flask import PgSignals, health, position, sse

signals = PgSignals(watchers=["orders", pgsignals.watch("users", extra=["team"])])


@signals.on("orders", "updated", customer_id=7)
def changed(event: Event) -> None:
    assert_type(event.id, Any)
    assert_type(event.values, dict[str, Any])


@signals.on_batch("orders", every=0.5)
def many(batch: Batch) -> int:
    return len(batch)


@signals.on_gap
def missed(gap: Gap) -> None:
    print(gap.reason)


# What a decorator gives is the function itself, with its own type.
number: int = many(Batch(()))
subscription = signals.subscribe(lambda event: print(event.op), "orders")
subscription.cancel()


@signals.on("orders")  # type: ignore[type-var]
def wrong(event: int) -> None:
    """No receiver: it does not take an event."""


@signals.on_gap  # type: ignore[type-var]
def wrong_as_well(gap: Event) -> None:
    """No gap receiver: it does not take a gap."""


def create_app() -> Flask:
    app = Flask(__name__)
    signals.init_app(app)
    app.register_blueprint(health)

    @app.get("/events/<int:team>")
    def events(team: int) -> Response:
        return sse(
            ("users", "inserted"),
            visible=lambda event: event.values["team"] == team,
            data=lambda event: event.key,
            name=lambda event: event.op,
        )

    @app.get("/position")
    def where() -> str:
        return position("users")

    with app.app_context():
        assert_type(signals.hub, Hub)
        assert_type(signals.health().ready, bool)
        sse("users", visible=lambda event: event.value)  # type: ignore[attr-defined]
    return app
