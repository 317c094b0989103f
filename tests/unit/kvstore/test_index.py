"""The block index over a real Redis."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from paceline.domain.errors import UnavailableError
from paceline.kvstore.index import MAX_KEYS_PER_CALL, BlockIndex
from paceline.process.membership import FencedError
from tests.redis_server import RedisServer
from tests.unit.kvstore.memory_space import key_of
from tests.waiting import until

ROOT = bytes(range(16))


@pytest.fixture
async def index(redis_url: str) -> AsyncIterator[BlockIndex]:
    """Return an index over an empty Redis."""
    index = BlockIndex(redis_url, "test")
    yield index
    await index.close()


def keys(count: int, start: int = 0) -> list[bytes]:
    """Return block keys."""
    return [key_of(i) for i in range(start, start + count)]


async def hold(index: BlockIndex, node: str, epoch: int, held: list[bytes]) -> None:
    """Make a live node publish blocks."""
    await index.renew(ROOT, node, epoch, 5.0)
    await index.publish(ROOT, node, epoch, held)


async def test_lookup_counts_the_leading_blocks_of_each_node(index: BlockIndex) -> None:
    chain = keys(6)
    await hold(index, "a", 1, chain[:4])
    await hold(index, "b", 1, [*chain[:2], chain[5]])
    await hold(index, "c", 1, chain[1:])
    assert await index.lookup(ROOT, chain) == {"a": 4, "b": 2}
    assert await index.lookup(ROOT, []) == {}
    assert await index.lookup(bytes(16), chain) == {}


async def test_lookup_of_chains_longer_than_one_call(index: BlockIndex) -> None:
    chain = keys(2 * MAX_KEYS_PER_CALL + 10)
    await hold(index, "a", 1, chain[: MAX_KEYS_PER_CALL + 3])
    await hold(index, "b", 1, chain)
    await hold(index, "c", 1, chain[MAX_KEYS_PER_CALL:])
    found = await index.lookup(ROOT, chain)
    assert found == {"a": MAX_KEYS_PER_CALL + 3, "b": len(chain)}


async def test_withdrawn_blocks_are_not_found(index: BlockIndex) -> None:
    chain = keys(3)
    await hold(index, "a", 1, chain)
    await index.withdraw(ROOT, "a", 1, [chain[1]])
    assert await index.lookup(ROOT, chain) == {"a": 1}


async def test_a_node_without_lease_holds_nothing(index: BlockIndex) -> None:
    await index.publish(ROOT, "a", 1, keys(2))
    assert await index.lookup(ROOT, keys(2)) == {}
    assert await index.renew(ROOT, "a", 1, 0.2) is False
    assert await index.lookup(ROOT, keys(2)) == {"a": 2}

    async def is_gone() -> bool:
        return await index.lookup(ROOT, keys(2)) == {}

    await until(is_gone, 3)
    assert await index.renew(ROOT, "a", 1, 5.0) is True, "the record outlives the lease"


async def test_entries_of_an_earlier_epoch_do_not_count(index: BlockIndex) -> None:
    await hold(index, "a", 1, keys(3))
    await hold(index, "a", 2, keys(1))
    assert await index.lookup(ROOT, keys(3)) == {"a": 1}


async def test_an_earlier_epoch_is_fenced(index: BlockIndex) -> None:
    await hold(index, "a", 2, keys(2))
    for write in (index.publish, index.withdraw):
        with pytest.raises(FencedError):
            await write(ROOT, "a", 1, keys(2))
    with pytest.raises(FencedError):
        await index.renew(ROOT, "a", 1, 5.0)
    with pytest.raises(FencedError):
        await index.clear(ROOT, "a", 1)
    assert await index.lookup(ROOT, keys(2)) == {"a": 2}


async def test_clear_removes_all_a_node_published(
    index: BlockIndex, redis_server: RedisServer
) -> None:
    await hold(index, "a", 1, keys(MAX_KEYS_PER_CALL + 5))
    await index.clear(ROOT, "a", 1)
    assert await index.lookup(ROOT, keys(2)) == {}
    assert redis_server.command("DBSIZE") == b":0\r\n"


async def test_everything_expires(index: BlockIndex, redis_server: RedisServer) -> None:
    await hold(index, "a", 1, keys(3))
    names = redis_server.command("KEYS", "*").split(b"\r\n")[2::2]
    assert len(names) == 5
    for name in names:
        assert int(redis_server.command("PTTL", name.decode())[1:]) > 0


async def test_scripts_survive_a_script_flush(index: BlockIndex, redis_server: RedisServer) -> None:
    await hold(index, "a", 1, keys(1))
    redis_server.command("SCRIPT", "FLUSH")
    assert await index.lookup(ROOT, keys(1)) == {"a": 1}


async def test_a_lost_redis_fails_fast_and_comes_back(
    index: BlockIndex, redis_server: RedisServer
) -> None:
    redis_server.kill()
    for _ in range(2):
        with pytest.raises(UnavailableError) as raised:
            await index.lookup(ROOT, keys(1))
        assert raised.value.reason == "redis-unavailable"
    redis_server.start()

    async def answers() -> bool:
        try:
            return await index.lookup(ROOT, keys(1)) == {}
        except UnavailableError:
            return False

    await until(answers, 3)


async def test_a_hung_redis_costs_one_timeout_not_one_per_call(
    index: BlockIndex, redis_server: RedisServer
) -> None:
    await index.lookup(ROOT, keys(1))
    redis_server.pause()
    try:
        start_s = time.monotonic()
        with pytest.raises(UnavailableError):
            await index.lookup(ROOT, keys(1))
        assert time.monotonic() - start_s < 1.0
        start_s = time.monotonic()
        for _ in range(100):
            with pytest.raises(UnavailableError):
                await index.lookup(ROOT, keys(1))
        assert time.monotonic() - start_s < 0.4
    finally:
        redis_server.resume()


async def test_cancelled_lookups_leave_no_replies_behind(redis_url: str) -> None:
    index = BlockIndex(redis_url, "test", timeout_s=5.0)
    chains = [keys(3, start=10 * i) for i in range(8)]
    for i, chain in enumerate(chains):
        await hold(index, f"node-{i}", 1, chain[: 1 + i % 3])
    for round_ in range(200):
        task = asyncio.create_task(index.lookup(ROOT, chains[round_ % 8]))
        # Cut at different points: before sending, while waiting, after the reply.
        for _ in range(round_ % 7):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    answers = await asyncio.gather(*(index.lookup(ROOT, chain) for chain in chains))
    assert answers == [{f"node-{i}": 1 + i % 3} for i in range(8)]
    await index.close()


async def test_a_cancellation_is_never_swallowed(redis_url: str) -> None:
    for num_turns in range(60):
        # A new index each time, so that opening a connection is cut too.
        index = BlockIndex(redis_url, "test", timeout_s=5.0)
        task = asyncio.create_task(index.lookup(ROOT, keys(3)))
        for _ in range(num_turns):
            await asyncio.sleep(0)
        if task.cancel():
            await asyncio.wait([task])
            assert task.cancelled(), num_turns
        await index.close()


async def test_many_lookups_at_once_wait_for_connections(redis_url: str) -> None:
    # The deadline is not what is tested, and a busy machine may take its usual half second.
    index = BlockIndex(redis_url, "test", timeout_s=20)
    await hold(index, "a", 1, keys(4))
    answers = await asyncio.gather(*(index.lookup(ROOT, keys(4)) for _ in range(100)))
    await index.close()
    assert all(answer == {"a": 4} for answer in answers)
