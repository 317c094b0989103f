"""Kills, hangs, flushes and flipped bits under load: no failed request, no wrong token."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import pytest
import redis

from paceline.kvstore.arena import HEADER_BYTES, MAGIC
from tests.checkpoints import DEMO
from tests.e2e.client import Client, assert_greedy
from tests.e2e.load import NUM_CLIENTS, load, prompt_ids, request_for
from tests.e2e.probe import fleet_metric, members, metric, status, until_at_rest
from tests.platform import Platform
from tests.waiting import until, until_sync


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    flags = ("--prefill", "2", "--decode", "2")
    with Platform(tmp_path_factory.mktemp("faults"), *flags) as up:
        yield up


def has_all(platform: Platform) -> bool:
    """Whether every process that runs is the one its member's record names."""
    processes = platform.processes()
    running = {pid for role in ("prefill", "decode", "kvstore") for pid in processes[role]}
    return {m["pid"] for m in members(platform, "prefill", "decode", "kvstore")} == running


def busiest(platform: Platform) -> int | None:
    """Return the number of the decode worker with most streams; None while nobody has two."""
    running = {
        int(m["id"].rpartition("-")[2]): metric(m["metrics_address"], "paceline_engine_running")
        for m in members(platform, "decode")
    }
    best = max(running, key=lambda index: running[index])
    return best if running[best] >= 2 else None


async def busiest_soon(platform: Platform) -> int:
    """Wait until a decode worker has streams to lose."""
    await until(lambda: busiest(platform) is not None, 30)
    index = busiest(platform)
    assert index is not None
    return index


@pytest.mark.parametrize("role", ["prefill", "decode", "kvstore", "redis"])
async def test_a_killed_process_costs_no_request_and_no_token(
    platform: Platform, role: str
) -> None:
    async with load(platform) as running:
        old = platform.kill(role)
        await running.until_answered(2 * NUM_CLIENTS)
        await asyncio.to_thread(platform.wait_replaced, role, 0, old)
        await running.until_answered(2 * NUM_CLIENTS)
    until_sync(lambda: has_all(platform), 30)
    until_at_rest(platform)


async def test_a_killed_decode_worker_hands_its_streams_over(platform: Platform) -> None:
    async with Client(platform.grpc) as client:
        requests = [request_for(900 + i, max_tokens=200) for i in range(4)]
        tasks = [asyncio.create_task(client.generate(r, timeout=90)) for r in requests]
        busy = await busiest_soon(platform)
        migrations = fleet_metric(platform, "paceline_migrations_total", "gateway")
        old = platform.kill("decode", busy)
        answers = await asyncio.gather(*tasks)
    moved = [a for a in answers if a.usage[0].migrations]
    assert moved, "no stream was on the killed worker"
    now = fleet_metric(platform, "paceline_migrations_total", "gateway")
    assert now - migrations >= len(moved)
    for number, answer in enumerate(answers, start=900):
        assert len(answer.ids[0]) == 200
        assert_greedy(DEMO, prompt_ids(number), answer.ids[0])
    platform.wait_replaced("decode", busy, old)
    until_at_rest(platform)


async def test_a_hung_decode_worker_is_left_and_comes_back(platform: Platform) -> None:
    until_sync(lambda: has_all(platform), 30)
    async with Client(platform.grpc) as client:
        requests = [request_for(950 + i, max_tokens=200) for i in range(4)]
        tasks = [asyncio.create_task(client.generate(r, timeout=90)) for r in requests]
        pid = platform.pid("decode", await busiest_soon(platform))
        os.kill(pid, signal.SIGSTOP)
        try:
            answers = await asyncio.gather(*tasks)
        finally:
            os.kill(pid, signal.SIGCONT)
    for number, answer in enumerate(answers, start=950):
        assert len(answer.ids[0]) == 200
        assert_greedy(DEMO, prompt_ids(number), answer.ids[0])
    until_sync(lambda: has_all(platform), 30)
    until_at_rest(platform)


async def test_a_flushed_redis_costs_speed_not_requests(platform: Platform) -> None:
    address = urlsplit(platform.redis_url)
    async with load(platform) as running:
        with redis.Redis(host=str(address.hostname), port=int(address.port or 0)) as link:
            for _ in range(3):
                link.flushall()
                await running.until_answered(NUM_CLIENTS)
    assert status(platform)["has_redis"]
    until_at_rest(platform)


async def test_a_killed_gateway_is_back_on_its_port_and_leaves_no_work(platform: Platform) -> None:
    async with Client(platform.grpc) as client:
        task = asyncio.create_task(client.generate(request_for(1, max_tokens=1500), timeout=60))
        await until(lambda: fleet_metric(platform, "paceline_engine_running", "decode") >= 1, 30)
        old = platform.kill("gateway")
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await task
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE
        await asyncio.to_thread(platform.wait_replaced, "gateway", 0, old)

        async def is_answered() -> bool:
            try:
                await client.generate(request_for(2, max_tokens=4), timeout=10)
            except grpc.aio.AioRpcError as failure:
                assert failure.code() == grpc.StatusCode.UNAVAILABLE
                return False
            return True

        await until(is_answered, 20)
    until_at_rest(platform)


def arena_of(pid: int) -> Path:
    """Return the arena file that a KV node maps."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    return Path(re.findall(r"/dev/shm/\S+", maps)[0])


def flip_every_block(arena: Path) -> int:
    """Flip one bit in the payload of every slot; return how many."""
    content = arena.read_bytes()
    slots = [m.start() for m in re.finditer(re.escape(MAGIC), content)]
    with open(arena, "r+b") as file:
        for slot in slots:
            at = slot + HEADER_BYTES + 1000
            file.seek(at)
            file.write(bytes([content[at] ^ 4]))
    return len(slots)


async def test_corrupted_blocks_are_computed_again_and_counted(platform: Platform) -> None:
    # So long that taking it from the arena is always quicker than computing it.
    prompt = [5 + (i * i * 7) % 4000 for i in range(1500)]
    request = request_for(0)
    request.token_ids.ids[:] = prompt
    async with Client(platform.grpc) as client:
        first = await client.generate(request, timeout=60)
        # Engines have caches of their own: without them the prompt comes from the arena.
        for role in ("prefill", "decode"):
            for index in range(2):
                old = platform.kill(role, index)
                platform.wait_replaced(role, index, old)
        until_sync(lambda: has_all(platform), 30)
        assert flip_every_block(arena_of(platform.pid("kvstore"))) > 0
        again = await client.generate(request, timeout=60)
    assert again.ids == first.ids
    assert again.usage[0].cached_prompt_tokens == 0
    assert_greedy(DEMO, prompt, again.ids[0])
    name = "paceline_kv_corrupt_blocks_total"
    until_sync(lambda: fleet_metric(platform, name, "prefill", "decode") > 0)
    name = "paceline_kv_node_corrupt_blocks_total"
    until_sync(lambda: fleet_metric(platform, name, "kvstore") > 0)
    until_at_rest(platform)


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def test_an_orderly_end_lets_streams_finish(tmp_path: Path) -> None:
    with Platform(tmp_path, "--prefill", "1", "--decode", "1") as platform:
        pids = [pid for pids in platform.processes().values() for pid in pids]
        arena = arena_of(platform.pid("kvstore"))
        async with Client(platform.grpc) as client:
            task = asyncio.create_task(client.generate(request_for(3, max_tokens=300), timeout=60))
            await until(lambda: fleet_metric(platform, "paceline_engine_running", "decode") > 0)
            code = await asyncio.to_thread(platform.stop)
            answer = await task
    assert code == 0
    assert len(answer.ids[0]) == 300
    assert_greedy(DEMO, prompt_ids(3), answer.ids[0])
    assert not any(map(is_alive, pids))
    assert not arena.exists()


async def test_a_killed_supervisor_leaves_nothing_behind(tmp_path: Path) -> None:
    platform = Platform(tmp_path, "--prefill", "1", "--decode", "1")
    pids = [pid for pids in platform.processes().values() for pid in pids]
    platform.process.kill()
    platform.process.wait()
    until_sync(lambda: not any(map(is_alive, pids)), 40)
