"""Samples on their way to Redis, which may be away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from paceline.domain.learnings import Sample
from paceline.process.metrics import Metrics
from paceline.process.sample_stream import START, SampleStream
from paceline.rpc.draft_codec import sample_from_proto
from paceline.v1 import samples_pb2
from paceline.worker.samples import SamplePublisher
from tests.redis_server import RedisServer, redis_server, redis_url
from tests.waiting import until

__all__ = ["redis_server", "redis_url"]


def sample(number: int) -> Sample:
    return Sample(
        *(b"t" * 8, "d", "v1", 0.5, number, (1, 2, 3), 1, 1),
        top_ids=bytes(8),
        top_probs=bytes(4),
        tail_mass=bytes(4),
        origins=bytes(2),
    )


class Published:
    """A publisher, its stream and its metrics."""

    def __init__(self, url: str, max_waiting: int = 512) -> None:
        self.metrics = Metrics("worker")
        self.stream = SampleStream(url, "fleet", "digest", timeout_s=0.3)
        self.publisher = SamplePublisher(
            self.stream, self.metrics, max_waiting=max_waiting, period_s=0.02
        )

    async def numbers(self) -> list[int]:
        read = [samples_pb2.Sample.FromString(p) for _, p in await self.stream.read(START, 9999)]
        return [sample_from_proto(message).first_position for message in read]

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"paceline_capture_{name}_total", labels) or 0


@asynccontextmanager
async def published(url: str, max_waiting: int = 512) -> AsyncIterator[Published]:
    made = Published(url, max_waiting)
    task = asyncio.create_task(made.publisher.run())
    try:
        yield made
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await made.stream.close()


async def test_samples_arrive_whole_and_in_order(redis_url: str) -> None:
    async with published(redis_url) as made:
        made.publisher.push([sample(i) for i in range(70)])
        made.publisher.push([sample(70)])
        await until(lambda: made.publisher.num_waiting == 0)
        await until(lambda: made.stream.length())
        assert await made.numbers() == list(range(71))
        ((_, payload),) = await made.stream.read(START, 1)
        assert sample_from_proto(samples_pb2.Sample.FromString(payload)) == sample(0)
        assert (made.metric("samples"), made.metric("tokens")) == (71, 142)
        assert made.metric("dropped", reason="backlog") == 0


async def test_samples_wait_while_redis_is_away_and_the_oldest_give_way(
    redis_url: str, redis_server: RedisServer
) -> None:
    async with published(redis_url, max_waiting=40) as made:
        redis_server.kill()
        for i in range(100):
            # Never waits, whatever Redis does.
            made.publisher.push([sample(i)])
        await asyncio.sleep(0.3)
        assert made.publisher.num_waiting <= 40
        redis_server.start()

        async def has_all() -> bool:
            return await made.numbers() == list(range(60, 100))

        await until(has_all, 8)
        assert made.metric("dropped", reason="backlog") == 60
        assert made.metric("samples") == 100


async def test_a_hung_redis_delays_nobody(redis_url: str, redis_server: RedisServer) -> None:
    async with published(redis_url) as made:
        redis_server.pause()
        loop = asyncio.get_running_loop()
        made.publisher.push([sample(0)])
        await asyncio.sleep(0.1)
        started_s = loop.time()
        made.publisher.push([sample(1)])
        assert loop.time() - started_s < 0.1
        redis_server.resume()
        await until(lambda: made.publisher.num_waiting == 0, 8)
        # What was being sent when the deadline passed may have arrived, too.
        assert sorted(set(await made.numbers())) == [0, 1]
