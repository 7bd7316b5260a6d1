"""An application with the extension, as its servers and commands run it.

Each process prints what it hears, with its id, in one write, so that lines do not mix.
"""

from __future__ import annotations

import os

from flask import Flask, Response, current_app, request
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import pgsignals
from pgsignals.contrib.flask import PgSignals, health, position, sse


class Base(DeclarativeBase):
    """The models' base."""


db = SQLAlchemy(model_class=Base)


class Item(db.Model):  # type: ignore[name-defined, misc]
    """What is watched."""

    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)
    tenant: Mapped[int] = mapped_column(default=1)


ITEMS = pgsignals.watch(Item, "inserted", "updated", extra=["tenant"])
signals = PgSignals(watchers=lambda: [ITEMS])


def _print(*words: object) -> None:
    os.write(1, " ".join(map(str, (os.getpid(), *words, "\n"))).encode())


@signals.on(Item, "inserted")
def _received(event: pgsignals.Event) -> None:
    if event.values["tenant"] == 0:
        return  # A million of them would take too long.
    item = db.session.get(Item, event.id)
    _print(current_app.name, "item", event.id, "gone" if item is None else item.tenant)


@pgsignals.connected.connect
def _connected(hub: pgsignals.Hub) -> None:
    _print("connected")


def create_app() -> Flask:
    """The application."""
    app = Flask("shop")
    app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["PGSIGNALS_DSN"].replace(
        "postgresql://", "postgresql+psycopg2://"
    )
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {"pool_size": 2, "max_overflow": 0}
    app.config["PGSIGNALS_WORKERS"] = 1
    app.config["PGSIGNALS_DELIVERY"] = os.environ.get("SHOP_DELIVERY", "notify")
    if limit := os.environ.get("SSE_CLIENTS"):
        app.config["PGSIGNALS_SSE_CLIENTS"] = int(limit)
    db.init_app(app)
    signals.init_app(app)
    app.register_blueprint(health)

    @app.get("/")
    def index() -> str:
        return str(os.getpid())

    @app.post("/")
    def insert() -> str:
        item = Item(tenant=int(request.args.get("tenant", 1)))
        db.session.add(item)
        db.session.commit()
        return str(item.id)

    @app.get("/position")
    def where() -> str:
        return position(ITEMS)

    @app.get("/events")
    def events() -> Response:
        # Holds a connection until the end of the request, which is not that of the stream.
        db.session.execute(db.select(1))
        tenant = request.args.get("tenant", type=int)
        return sse(
            ITEMS,
            visible=None if tenant is None else lambda event: event.values["tenant"] == tenant,
            keepalive=request.args.get("keepalive", 15.0, type=float),
            lifetime=request.args.get("lifetime", 3600.0, type=float),
            send_timeout=request.args.get("send_timeout", 60.0, type=float),
        )

    return app
