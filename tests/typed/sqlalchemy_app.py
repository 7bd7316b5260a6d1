"""A small typed application on SQLAlchemy, with coroutines."""

from __future__ import annotations

import asyncio

from sqlalchemy import ForeignKey, create_engine
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    relationship,
    selectinload,
)
from typing_extensions import assert_type

import pgsignals
from pgsignals import Batch, Event, Gap, Hub

engine = create_engine("postgresql+psycopg2:///shop")
async_engine = create_async_engine("postgresql+asyncpg:///shop")


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    lines: Mapped[list[Line]] = relationship()


class Line(Base):
    __tablename__ = "lines"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int] = mapped_column(ForeignKey(Order.id))


@pgsignals.on_batch(Order, "updated", every=0.5)
def reindex(batch: Batch) -> None:
    with Session(engine) as session:
        orders: list[Order] = batch.load(session, options=[selectinload(Order.lines)])
        print([order.id for order in orders])


@pgsignals.on(Order, "inserted")
async def ordered(event: Event) -> None:
    async with AsyncSession(async_engine) as session:
        order: Order | None = await event.aload(session)
    if order is not None:
        print(order.id)


@pgsignals.on_gap
async def missed(gap: Gap) -> None:
    print(gap.reason)


async def main() -> None:
    async with pgsignals.start(async_engine, [Order]) as hub:
        assert_type(hub, Hub)
        async with hub.stream(Order) as events:
            async for event in events:
                assert_type(event, Event)
                await ordered(event)


def plain() -> None:
    pgsignals.start(engine, [(Order, "updated")], loop=asyncio.new_event_loop())
