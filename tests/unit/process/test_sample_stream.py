"""The stream of samples over a real Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from paceline.domain.errors import UnavailableError
from paceline.process.sample_stream import START, SampleStream
from tests.redis_server import RedisServer, redis_server, redis_url
from tests.waiting import until

__all__ = ["redis_server", "redis_url"]

KEY = "pl:{fleet}:samples:digest"


@pytest.fixture
async def stream(redis_url: str) -> AsyncIterator[SampleStream]:
    stream = SampleStream(redis_url, "fleet", "digest", max_samples=10)
    yield stream
    await stream.close()


def payloads(count: int, start: int = 0) -> list[bytes]:
    return [b"\x00\xff%d" % i for i in range(start, start + count)]


async def test_samples_read_back_in_order_page_by_page(stream: SampleStream) -> None:
    assert await stream.read(START, 5) == []
    await stream.add(payloads(3))
    await stream.add(payloads(4, 3))
    await stream.add([])
    read: list[bytes] = []
    position = START
    while page := await stream.read(position, 3):
        assert len(page) <= 3
        position = page[-1][0]
        read += [payload for _, payload in page]
    assert read == payloads(7)
    assert position == await stream.last_id()
    assert await stream.length() == 7


async def test_a_new_reader_may_begin_at_the_end(stream: SampleStream) -> None:
    assert await stream.last_id() == START
    await stream.add(payloads(2))
    position = await stream.last_id()
    assert await stream.read(position, 9) == []
    await stream.add([b"new"])
    assert [payload for _, payload in await stream.read(position, 9)] == [b"new"]


async def test_the_oldest_give_way_and_a_slow_reader_goes_on_with_what_is_left(
    stream: SampleStream,
) -> None:
    await stream.add(payloads(4))
    ((position, _),) = await stream.read(START, 1)
    await stream.add(payloads(25, 4))
    assert await stream.length() == 10
    assert [payload for _, payload in await stream.read(position, 99)] == payloads(10, 19)


async def test_what_is_old_is_gone(redis_url: str, redis_server: RedisServer) -> None:
    stream = SampleStream(redis_url, "fleet", "digest", retention_s=0.4)
    await stream.add(payloads(2))
    await asyncio.sleep(0.25)
    await stream.add([b"young"])
    await asyncio.sleep(0.25)
    assert [payload for _, payload in await stream.read(START, 9)] == [b"young"]
    # Nobody adds any more: then the key goes, too.
    await until(lambda: redis_server.command("EXISTS", KEY) == b":0\r\n", 3)
    assert await stream.length() == 0
    assert await stream.last_id() == START
    await stream.close()


async def test_fleets_and_models_have_streams_of_their_own(
    stream: SampleStream, redis_url: str
) -> None:
    await stream.add(payloads(1))
    for fleet, model in (("other", "digest"), ("fleet", "other")):
        other = SampleStream(redis_url, fleet, model)
        assert await other.length() == 0
        await other.close()


async def test_a_lost_redis_is_unavailable_and_heals(
    stream: SampleStream, redis_server: RedisServer
) -> None:
    await stream.add(payloads(1))
    redis_server.kill()
    for call in (stream.add(payloads(1)), stream.read(START, 1), stream.last_id(), stream.length()):
        with pytest.raises(UnavailableError):
            await call
    redis_server.start()
    await stream.add(payloads(1))
    assert await stream.length() == 1


async def test_a_hung_redis_is_unavailable_in_time(
    redis_url: str, redis_server: RedisServer
) -> None:
    stream = SampleStream(redis_url, "fleet", "digest", timeout_s=0.2)
    redis_server.pause()
    try:
        async with asyncio.timeout(2):
            with pytest.raises(UnavailableError):
                await stream.add(payloads(1))
    finally:
        redis_server.resume()
        await stream.close()


async def test_a_position_that_is_none_is_refused(stream: SampleStream) -> None:
    await stream.add(payloads(1))
    with pytest.raises(UnavailableError):
        await stream.read("no-position", 1)
