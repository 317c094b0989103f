"""Pools that grow, shrink, sleep and wake under load: no failed request, no wrong token."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from paceline.cli.client import is_serving
from paceline.domain.member import Member, Role
from paceline.process.membership import Heartbeat, Membership
from paceline.v1 import fleet_control_pb2 as pb
from paceline.v1 import fleet_control_pb2_grpc
from tests.checkpoints import DEMO
from tests.e2e.client import Answer, Client, assert_greedy
from tests.e2e.load import NUM_CLIENTS, load, prompt_ids, request_for
from tests.e2e.probe import get, members, metric, status, until_at_rest
from tests.platform import Platform
from tests.refusal import refusal_of
from tests.waiting import until, until_sync

MAX_PARKED = 6
BATCH = 2
"""Sequences that a worker runs at a time."""

FLAGS = ("--prefill", "1", "--decode", "1", "--draft", "none", "--max-num-seqs", str(BATCH))
FLAGS += ("--drain-grace-s", "2", "--min-step-s", "0.005")
"""A drain shorter than a long stream, so that streams are handed over, too."""


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    env = {"PACELINE_MAX_PARKED": str(MAX_PARKED)}
    with Platform(tmp_path_factory.mktemp("scaling"), *FLAGS, env=env) as up:
        yield up


@pytest.fixture
def control(platform: Platform) -> Iterator[Control]:
    with Control(platform) as control:
        yield control
        if platform.process.poll() is None:
            control.settle(prefill=1, decode=1)


class Control:
    """Sets the pools of a platform as an autoscaler does."""

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self._channel = grpc.insecure_channel(platform.ready()["control"])
        self._stub: Any = fleet_control_pb2_grpc.FleetControlServiceStub(self._channel)

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def scale(self, role: str, replicas: int, *victims: str) -> pb.PoolScale:
        """Set one pool; return what it is from then on."""
        request = pb.SetScaleRequest(role=role, replicas=replicas, victims=victims)
        pool: pb.PoolScale = self._stub.SetScale(request, timeout=10).pool
        return pool

    def pools(self) -> dict[str, pb.PoolScale]:
        """Return every pool."""
        response = self._stub.GetScale(pb.GetScaleRequest(), timeout=10)
        return {pool.role: pool for pool in response.pools}

    def is_settled(self) -> bool:
        """Whether the pools have the workers they are to have, no more and no less, and the
        gateway and the ready file know."""
        for role, pool in self.pools().items():
            known = {m["id"]: m["pid"] for m in members(self._platform, role)}
            is_known = sorted(known) == sorted(pool.member_ids) and not pool.ending_ids
            if not is_known or sorted(known.values()) != sorted(self._platform.processes()[role]):
                return False
        return True

    def settle(self, **sizes: int) -> None:
        """Set pools and wait until they are so."""
        for role, replicas in sizes.items():
            self.scale(role, replicas)
        until_sync(self.is_settled, 60)

    async def settled(self) -> None:
        """Wait until the pools are what they are to be, while other tasks go on."""
        await until(lambda: asyncio.to_thread(self.is_settled), 60)


@asynccontextmanager
async def autoscaler(platform: Platform) -> AsyncIterator[None]:
    """Be in the fleet as somebody who could start workers."""
    membership = Membership(platform.redis_url, platform.fleet)
    member = Member("autoscaler-0", Role.AUTOSCALER, "127.0.0.1:1", os.getpid(), "test")
    beating = asyncio.create_task(Heartbeat(membership, lambda: member).run())
    try:
        await until(lambda: len(members(platform, "autoscaler")) == 1)
        yield
    finally:
        beating.cancel()
        await asyncio.gather(beating, return_exceptions=True)
        await membership.deregister(member)
        await membership.close()


def waiting_at_gateway(platform: Platform) -> int:
    """Return what the gateway announces of parked requests."""
    (gateway,) = members(platform, "gateway")
    return int(gateway["load"]["num_waiting"])


async def worker_of_stream(platform: Platform) -> str:
    """Return the id of the decode worker that runs something, once one does."""

    def found() -> list[str]:
        return [m["id"] for m in members(platform, "decode") if m["load"]["num_running"]]

    return (await until(found, 30))[0]


async def test_pools_grow_and_shrink_under_load(platform: Platform, control: Control) -> None:
    long_prompt = [5 + (i * i * 7) % 4000 for i in range(1200)]
    known = request_for(0, max_tokens=4)
    known.token_ids.ids[:] = long_prompt
    async with Client(platform.grpc) as client:
        first = await client.generate(known, timeout=60)
        async with load(platform) as running:
            control.scale("decode", 3)
            control.scale("prefill", 2)
            await control.settled()
            await running.until_answered(2 * NUM_CLIENTS)
            # The ones that were there from the start, not the youngest.
            control.scale("decode", 1, "decode-0", "decode-1")
            control.scale("prefill", 1, "prefill-0")
            await running.until_answered(NUM_CLIENTS)
            await control.settled()
            await running.until_answered(NUM_CLIENTS)
        ids = [m["id"] for m in members(platform, "prefill", "decode")]
        assert sorted(ids) == ["decode-2", "prefill-1"]
        # Nobody who computed it is left, but their blocks are.
        again = await client.generate(known, timeout=60)
    assert again.ids == first.ids
    assert again.usage[0].cached_prompt_tokens >= 1100
    until_at_rest(platform)


async def test_a_stream_longer_than_the_drain_goes_on_elsewhere(
    platform: Platform, control: Control
) -> None:
    control.settle(prefill=1, decode=2)
    # More than two seconds of steps, at a token each.
    request = request_for(1, max_tokens=900)
    request.speculation.mode = "OFF"
    async with Client(platform.grpc) as client:
        task = asyncio.create_task(client.generate(request, timeout=90))
        victim = await worker_of_stream(platform)
        assert list(control.scale("decode", 1, victim).ending_ids) == [victim]
        answer = await task
    assert answer.usage[0].migrations == 1
    assert answer.usage[0].decode_worker != victim
    assert len(answer.ids[0]) == 900
    assert_greedy(DEMO, prompt_ids(1), answer.ids[0])
    await control.settled()
    until_at_rest(platform)


async def test_a_sleeping_fleet_parks_requests_and_serves_them_in_order(
    platform: Platform, control: Control
) -> None:
    done: list[int] = []
    async with autoscaler(platform), Client(platform.grpc) as client:

        async def ask(number: int) -> Answer:
            answer = await client.generate(request_for(number), timeout=90)
            done.append(number)
            return answer

        control.settle(prefill=0, decode=0)
        assert await is_serving(platform.grpc)
        assert get(f"http://{platform.http}/readyz") == "ready\n"
        tasks = []
        for number in range(MAX_PARKED):
            tasks.append(asyncio.create_task(ask(number)))
            await until(lambda n=number: status(platform)["requests"]["parked"] == n + 1)  # type: ignore[misc]
        assert metric(platform.http, "paceline_requests_parked") == MAX_PARKED
        await until(lambda: waiting_at_gateway(platform) == MAX_PARKED)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await ask(99)
        refusal = refusal_of(error.value)
        assert refusal.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refusal.reason == "parking-full"
        assert refusal.retry_s is not None and refusal.retry_s > 0
        # A client that goes away makes room.
        tasks.pop().cancel()
        await until(lambda: status(platform)["requests"]["parked"] == MAX_PARKED - 1)
        assert control.pools()["decode"].replicas == 0
        control.scale("decode", 1)
        answers = await asyncio.gather(*tasks)
    for number, answer in enumerate(answers):
        assert_greedy(DEMO, prompt_ids(number), answer.ids[0])
    assert len(done) == MAX_PARKED - 1
    for number in range(len(done) - BATCH):
        assert done.index(number) < done.index(number + BATCH)
    assert metric(platform.http, "paceline_requests_parked") == 0
    until_at_rest(platform)


async def test_a_crashed_worker_comes_back_unless_it_was_to_end(
    platform: Platform, control: Control
) -> None:
    control.settle(prefill=1, decode=2)
    (second,) = (m for m in members(platform, "decode") if m["id"] != "decode-0")
    async with load(platform) as running:
        os.kill(second["pid"], signal.SIGKILL)
        await until(lambda: second["pid"] not in platform.processes()["decode"], 30)
        await running.until_answered(NUM_CLIENTS)
        await control.settled()
    (back,) = (m for m in members(platform, "decode") if m["id"] == second["id"])
    assert back["pid"] != second["pid"]
    control.scale("decode", 1, second["id"])
    os.kill(back["pid"], signal.SIGKILL)
    await control.settled()
    starts = [
        line["pid"]
        for line in platform.log_lines("up")
        if line["event"] == "child-started" and line["child"] == second["id"]
    ]
    assert starts[-1] == back["pid"]
    until_at_rest(platform)


def test_a_platform_that_ends_while_it_is_scaled_leaves_nothing(tmp_path: Path) -> None:
    with Platform(tmp_path, *FLAGS) as platform, Control(platform) as control:
        control.scale("decode", 3)
        control.scale("prefill", 0)
        control.scale("decode", 2, "decode-0")
        until_sync(lambda: len(started(platform, "decode")) >= 2, 30)
        code = platform.stop()
        with pytest.raises(grpc.RpcError):
            control.scale("decode", 4)
    assert code == 0
    pids = [line["pid"] for line in platform.log_lines("up") if line["event"] == "child-started"]
    assert len(pids) >= 6
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert not platform.ready_file.exists()


def started(platform: Platform, role: str) -> list[int]:
    """Return the processes of a role that were started so far."""
    return [
        line["pid"]
        for line in platform.log_lines("up")
        if line["event"] == "child-started" and line["child"].startswith(role)
    ]
