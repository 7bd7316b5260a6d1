"""A page of orders that changes by itself: flask --app examples/live_orders/app.py run"""

from __future__ import annotations

import os
from datetime import datetime
from decimal import Decimal

from flask import Flask, Response, abort, render_template, request
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import FetchedValue, func, make_url
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import pgsignals
from pgsignals.contrib.flask import PgSignals, health, sse

NEXT = {"new": "paid", "paid": "shipped", "shipped": "delivered"}


class Base(DeclarativeBase):
    """The models' base."""


db = SQLAlchemy(model_class=Base)


class Order(db.Model):  # type: ignore[name-defined, misc]
    """A row of the table that examples/schema.sql creates."""

    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[str]
    total: Mapped[Decimal]
    status: Mapped[str] = mapped_column(default="new")
    placed_at: Mapped[datetime] = mapped_column(server_default=FetchedValue())


ORDERS = pgsignals.watch(Order, "inserted", "updated", "deleted", "truncated")
signals = PgSignals(watchers=[ORDERS])


def create_app() -> Flask:
    """The application, for the database of PGSIGNALS_DSN."""
    app = Flask(__name__)
    url = make_url(os.environ["PGSIGNALS_DSN"]).set(drivername="postgresql+psycopg2")
    app.config["SQLALCHEMY_DATABASE_URI"] = url
    app.config.from_prefixed_env()  # FLASK_PGSIGNALS_DELIVERY=outbox, say.
    db.init_app(app)
    signals.init_app(app)
    app.register_blueprint(health)

    @app.get("/")
    def page() -> str:
        return render_template("page.html", **orders())

    @app.get("/orders")
    def fragment() -> str:
        """What the page shows: fetched again whenever something has changed."""
        return render_template("orders.html", **orders())

    @app.get("/events")
    def events() -> Response:
        return sse(ORDERS, retry=1000)

    @app.post("/orders")
    def place() -> tuple[str, int]:
        # The page is not told: it hears of the row like everybody else.
        customer = request.form["customer"].strip()[:80]
        total = request.form.get("total", type=Decimal)
        if not customer or total is None or not 0 <= total < 10**8:
            abort(400)
        db.session.add(Order(customer=customer, total=total))
        db.session.commit()
        return "", 204

    @app.post("/orders/<int:number>/advance")
    def advance(number: int) -> tuple[str, int]:
        order = db.get_or_404(Order, number, with_for_update=True)
        order.status = NEXT.get(order.status, order.status)
        db.session.commit()
        return "", 204

    @app.before_request
    def refuse_other_sites() -> None:
        if request.method == "POST" and request.headers.get("Sec-Fetch-Site") == "cross-site":
            abort(403)

    return app


def orders() -> dict[str, object]:
    """What both templates show."""
    by_status = dict(
        db.session.execute(db.select(Order.status, func.count()).group_by(Order.status)).all()
    )
    revenue = db.session.scalar(db.select(func.sum(Order.total)).where(Order.status != "cancelled"))
    newest = db.session.scalars(db.select(Order).order_by(Order.id.desc()).limit(50)).all()
    return {
        "orders": newest,
        "total": sum(by_status.values()),
        "waiting": by_status.get("new", 0) + by_status.get("paid", 0),
        "shipped": by_status.get("shipped", 0) + by_status.get("delivered", 0),
        "revenue": revenue or 0,
        "next": NEXT,
    }
