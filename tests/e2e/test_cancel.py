"""Two thousand cancelled requests leave no block, task, stream or descriptor behind."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from paceline.v1 import inference_pb2_grpc
from paceline.v1.inference_pb2 import GenerateRequest, TokenIds
from tests.e2e.probe import fleet_metric, members, metric, num_fds, rss_mb, until_at_rest
from tests.platform import Platform
from tests.waiting import until_sync

NUM_WARM, NUM_REQUESTS, NUM_CLIENTS = 200, 2000, 24
SLACK = 12
"""Pools of up to 8 connections to Redis fill as they are needed, and have tasks of their own."""

ROLES = ("gateway", "prefill", "decode", "kvstore")


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    flags = ("--prefill", "1", "--decode", "2", "--kv-nodes", "2", "--kv-transport", "grpc")
    with Platform(tmp_path_factory.mktemp("cancel"), *flags) as up:
        yield up


async def cancel_one(stub: Any, draw: random.Random) -> None:
    """Start a request and leave it in the queue, in prefill, in transfer or in decode."""
    length = draw.choice([3, 40, 120, 300])
    shared = draw.random() < 0.3
    ids = [7 + (i if shared else draw.randrange(4000)) for i in range(length)]
    request = GenerateRequest(
        token_ids=TokenIds(ids=ids), max_tokens=300, ignore_eos=True, n=draw.choice([1, 1, 1, 3])
    )
    call = stub.Generate(request, timeout=60)
    if draw.random() < 0.5:
        await asyncio.wait({asyncio.ensure_future(call.read())}, timeout=draw.random() * 0.2)
    else:
        for _ in range(draw.randrange(1, 4)):
            await call.read()
    call.cancel()


async def cancel_many(address: str, count: int, seed: int) -> None:
    draw = random.Random(seed)
    left = iter(range(count))
    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)

        async def client() -> None:
            for _ in left:
                await cancel_one(stub, draw)

        async with asyncio.TaskGroup() as group:
            for _ in range(NUM_CLIENTS):
                group.create_task(client())


def footprint(platform: Platform) -> dict[str, int]:
    """Return descriptors and tasks per process."""
    found = {}
    for role in ROLES:
        for index, pid in enumerate(platform.processes()[role]):
            found[f"{role}-{index} fds"] = num_fds(pid)
    for member in members(platform, *ROLES):
        found[f"{member['id']} tasks"] = int(metric(member["metrics_address"], "paceline_tasks"))
    return found


@pytest.mark.timeout(600)
async def test_cancelled_requests_leave_nothing_behind(platform: Platform) -> None:
    await cancel_many(platform.grpc, NUM_WARM, seed=1)
    until_at_rest(platform, 30)
    before = footprint(platform)
    memory = rss_mb(platform.pid("gateway"))
    await cancel_many(platform.grpc, NUM_REQUESTS, seed=2)
    until_at_rest(platform, 60)

    def grown() -> dict[str, tuple[int, int]]:
        now = footprint(platform)
        return {k: (before[k], now[k]) for k in before if now[k] > before[k] + SLACK}

    try:
        until_sync(lambda: not grown(), 30)
    except AssertionError as error:
        raise AssertionError(f"grown: {grown()}") from error
    assert rss_mb(platform.pid("gateway")) - memory < 40.0
    assert fleet_metric(platform, "paceline_requests_running", "gateway") == 0
