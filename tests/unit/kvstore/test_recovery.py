"""Nodes that die, come back, are replaced or stop; Redis that forgets."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from pathlib import Path

from paceline.domain.errors import UnavailableError
from paceline.kvstore.index import BlockIndex
from paceline.process.membership import Membership
from tests.redis_server import RedisServer
from tests.unit.kvstore.conftest import NodeMaker
from tests.unit.kvstore.node_process import (
    FLEET,
    LAYOUT,
    Worker,
    attached,
    blocks,
    flip,
    stats,
)
from tests.waiting import until


def overwrite_start(path: Path, data: bytes) -> None:
    """Overwrite the first bytes of a file."""
    with path.open("r+b") as file:
        file.write(data)


async def until_found(redis_url: str, keys: list[bytes], expected: dict[str, int]) -> None:
    """Wait until the index answers as expected."""
    index = BlockIndex(redis_url, FLEET)

    async def is_met() -> bool:
        try:
            return await index.lookup(LAYOUT.kv_root, keys) == expected
        except UnavailableError:
            return False

    try:
        await until(is_met, 10)
    finally:
        await index.close()


async def test_a_killed_node_comes_back_with_its_blocks(
    make_node: NodeMaker, redis_url: str
) -> None:
    node = make_node()
    written, tail = blocks(30), blocks(1, seed=9)
    keys, tail_key = list(written), next(iter(tail))
    async with attached(await node.start()) as worker:
        await worker.write(written)
        await worker.write(tail, is_tail=True)
        unused = await worker.client.reserve(3)
        info = worker.client.arena
    node.kill()
    assert node.arena.exists()
    async with attached(await node.start()) as worker:
        again = worker.client.arena
        assert info is not None and again is not None
        assert again.arena_path == info.arena_path and again.epoch > info.epoch
        assert await worker.read_all(keys, tail_key=tail_key) == written | tail
        slots = await worker.client.reserve(5)
        newest = max(slot.generation for slot in unused)
        assert all(slot.generation > newest for slot in slots), "old references stay stale"
        await until_found(redis_url, keys, {"kv-0": 30})


async def test_a_node_killed_while_blocks_are_written_serves_no_wrong_bytes(
    make_node: NodeMaker,
) -> None:
    node = make_node()
    expected: dict[bytes, bytes] = {}
    readable: set[bytes] = set()

    async def write_until_it_breaks(worker: Worker, first_seed: int) -> None:
        for seed in itertools.count(first_seed, 2):
            batch = blocks(8, seed=seed)
            expected.update(batch)
            readable.update(await worker.write(batch))

    member = await node.start()
    async with attached(member) as one, attached(member) as two:
        writing = [
            asyncio.create_task(write_until_it_breaks(worker, seed))
            for seed, worker in enumerate((one, two))
        ]
        # Twice what the arena holds, so that slots are in their second use.
        await until(lambda: len(readable) > 2 * (4 << 20) // LAYOUT.block_bytes, 15)
        node.kill()
        results = await asyncio.gather(*writing, return_exceptions=True)
        assert all(isinstance(result, UnavailableError) for result in results)
    async with attached(await node.start()) as reader:
        num_found = 0
        for key, data in expected.items():
            got = await reader.read_all([key])
            assert got in ({}, {key: data})
            num_found += len(got)
        assert num_found > 100


async def test_recovery_drops_what_is_not_whole(make_node: NodeMaker) -> None:
    node = make_node()
    written = blocks(6)
    keys = list(written)
    async with attached(await node.start()) as worker:
        await worker.write(written)
    node.kill()
    flip(node.arena, written[keys[4]])
    member = await node.start()
    async with attached(member) as worker:
        assert await worker.read_all(keys) == {key: written[key] for key in keys[:4]}
    assert (await stats(member)).num_blocks == 5


async def test_a_file_of_another_size_or_format_is_discarded(make_node: NodeMaker) -> None:
    node = make_node()
    async with attached(await node.start()) as worker:
        await worker.write(blocks(3))
    node.kill()
    node.arena_mb = 8
    member = await node.start()
    assert (await stats(member)).num_blocks == 0
    async with attached(member) as worker:
        await worker.write(blocks(3))
    node.kill()
    overwrite_start(node.arena, b"NONSENSE")
    member = await node.start()
    assert (await stats(member)).num_blocks == 0
    async with attached(member) as worker:
        assert await worker.write(blocks(3)) == list(blocks(3))


async def test_sigterm_leaves_neither_file_nor_member_nor_index(
    make_node: NodeMaker, redis_server: RedisServer
) -> None:
    node = make_node()
    written = blocks(5)
    async with attached(await node.start()) as worker:
        await worker.write(written)
        await until_found(redis_server.url, list(written), {"kv-0": 5})
        assert await node.stop() == 0, node.log
    assert not node.arena.exists()
    membership = Membership(redis_server.url, FLEET)
    assert await membership.members() == []
    await membership.close()
    await until_found(redis_server.url, list(written), {})
    assert b":b:" not in redis_server.command("KEYS", "*")


async def test_keep_arena_leaves_the_file_for_the_next_start(make_node: NodeMaker) -> None:
    node = make_node(environment={"PACELINE_KEEP_ARENA": "true"})
    written = blocks(5)
    async with attached(await node.start()) as worker:
        await worker.write(written)
    assert await node.stop() == 0
    async with attached(await node.start()) as worker:
        assert await worker.read_all(list(written)) == written


async def test_evicted_and_corrupt_blocks_leave_the_index(
    make_node: NodeMaker, redis_url: str
) -> None:
    node = make_node()
    written = blocks(2)
    keys = list(written)
    async with attached(await node.start()) as worker:
        await worker.write(written)
        await until_found(redis_url, keys, {"kv-0": 2})
        flip(node.arena, written[keys[1]])
        await worker.read_all(keys)
        await until_found(redis_url, keys, {"kv-0": 1})


async def test_the_index_is_rebuilt_after_a_flush(
    make_node: NodeMaker, redis_server: RedisServer
) -> None:
    written = blocks(12)
    async with attached(await make_node().start()) as worker:
        await worker.write(written)
        await until_found(redis_server.url, list(written), {"kv-0": 12})
        redis_server.command("FLUSHALL")
        await until_found(redis_server.url, list(written), {"kv-0": 12})
        redis_server.kill()
        more = blocks(3, seed=1)
        assert await worker.write(more) == list(more), "serving goes on without Redis"
        redis_server.start()
        await until_found(redis_server.url, list(written), {"kv-0": 12})
        await until_found(redis_server.url, list(more), {"kv-0": 3})


async def test_a_node_serves_before_redis_is_there(
    make_node: NodeMaker, redis_server: RedisServer
) -> None:
    redis_server.kill()
    node = make_node()
    node.launch()
    await until(lambda: '"ready"' in node.log, 10)
    redis_server.start()
    await node.member()


async def test_a_paused_node_that_was_replaced_ends(
    make_node: NodeMaker, redis_url: str, tmp_path: Path
) -> None:
    old = make_node()
    await old.start()
    os.kill(old.pid, signal.SIGSTOP)
    # The successor runs on another machine, with an arena of its own.
    new = make_node(directory=tmp_path)
    member = await new.start()
    written = blocks(3)
    async with attached(member) as worker:
        await worker.write(written)
        await until_found(redis_url, list(written), {"kv-0": 3})
        os.kill(old.pid, signal.SIGCONT)
        assert await old.exit_code() == 1
        await until_found(redis_url, list(written), {"kv-0": 3})
    membership = Membership(redis_url, FLEET)
    assert await membership.members() == [member]
    await membership.close()


async def test_two_nodes_never_share_an_arena(make_node: NodeMaker) -> None:
    member = await make_node().start()
    second = make_node()
    second.launch()
    assert await second.exit_code() == 1
    async with attached(member) as worker:
        assert len(await worker.write(blocks(2))) == 2
