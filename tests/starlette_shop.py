"""An application on Starlette in durable delivery, as uvicorn runs it in a process of its own."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response

import pgsignals
from pgsignals.contrib.starlette import sse

ITEMS = pgsignals.watch("items", "inserted", extra=["owner"])


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Listen while the server runs."""
    delivery: Any = os.environ["SHOP_DELIVERY"]
    async with pgsignals.start(os.environ["PGSIGNALS_DSN"], [ITEMS], delivery=delivery):
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/events/{owner}")
async def events(request: Request, owner: int) -> Response:
    """What one owner may know of."""
    return sse(request, "items", visible=lambda event: event.values["owner"] == owner)
