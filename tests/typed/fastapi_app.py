"""A small typed application on FastAPI."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response

import pgsignals
from pgsignals.contrib.starlette import position, sse


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with pgsignals.start("postgresql://localhost/shop", ["orders"]):
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/events")
async def events(request: Request, customer: int) -> Response:
    return sse(
        request,
        "orders",
        visible=lambda event: event.values["customer_id"] == customer,
        data=lambda event: event.key,
        name=lambda event: event.op,
    )


@app.get("/position")
async def where() -> str:
    return position("orders")
