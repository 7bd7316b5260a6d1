"""What NATS brings again after half a minute, since nobody acknowledged it, comes again soon."""

from __future__ import annotations

import asyncio

import nats

from tests.brokers import Nats


def shorten_ack_wait(server: Nats, stream: str, seconds: float) -> None:
    """Have the consumers that a stream has now take a message for lost after so long."""

    async def shorten() -> None:
        client = await nats.connect(server.url)
        jetstream = client.jetstream()
        for info in await jetstream.consumers_info(stream):
            await jetstream.add_consumer(stream, info.config, ack_wait=seconds)
        await client.close()

    asyncio.run(shorten())
