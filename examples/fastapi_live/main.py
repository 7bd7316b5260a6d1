"""A page of orders that changes by itself, by FastAPI, asyncpg and server-sent events."""

import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from html import escape

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import pgsignals
from pgsignals.contrib.starlette import aposition, sse

log = logging.getLogger("uvicorn.error")
dsn = os.environ.get("PGSIGNALS_DSN", "postgresql://")
engine = create_async_engine(dsn.replace("postgresql://", "postgresql+asyncpg://"))


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[str]
    total: Mapped[Decimal]
    status: Mapped[str]


@pgsignals.on(Order, "inserted")
async def ordered(event: pgsignals.Event) -> None:
    """A coroutine function: it runs on the server's event loop."""
    async with AsyncSession(engine) as session:
        order = await event.aload(session)
    if order is not None:
        log.info("%s has ordered for %s", order.customer, order.total)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Listen as long as the application serves."""
    async with pgsignals.start(engine, watchers=[Order]):
        yield
    await engine.dispose()


app = FastAPI(lifespan=lifespan)


@app.get("/events")
async def events(request: Request) -> Response:
    """What a page listens to: which orders have changed, not what is in them."""
    return sse(request, Order)


@app.get("/orders", response_class=HTMLResponse)
async def orders() -> str:
    """The rows of the table."""
    async with AsyncSession(engine) as session:
        found = await session.scalars(select(Order).order_by(Order.id.desc()).limit(20))
        cells = [(str(o.id), o.customer, f"{o.total:.2f}", o.status) for o in found]
    return "".join(f"<tr>{''.join(f'<td>{escape(c)}</td>' for c in row)}</tr>" for row in cells)


PAGE = """<!doctype html>
<title>Orders</title>
<h1>Orders</h1>
<table id="orders">{orders}</table>
<script>
  let last = Promise.resolve();
  const refresh = () => (last = last.then(async () => {{
    document.querySelector("#orders").innerHTML = await (await fetch("/orders")).text();
  }}));
  const events = new EventSource("/events?last-event-id={position}");
  events.onmessage = refresh;
  events.addEventListener("gap", refresh);
</script>
"""


@app.get("/", response_class=HTMLResponse)
async def page() -> str:
    """The page, which hears of everything that comes after it was read."""
    at = await aposition(Order)
    return PAGE.format(orders=await orders(), position=at)
