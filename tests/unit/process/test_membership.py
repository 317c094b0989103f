"""Membership over a real Redis."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import pytest

from paceline.domain.errors import UnavailableError
from paceline.domain.member import Load, Member, ModelCard, Role
from paceline.process.membership import FencedError, Heartbeat, Membership
from tests.redis_server import RedisServer, redis_server, redis_url
from tests.waiting import until

__all__ = ["redis_server", "redis_url"]

CARD = ModelCard("demo", "d" * 8, bytes(range(16)), 16, 4096, 2048, 1000)
WORKER = Member("decode-0", Role.DECODE, "127.0.0.1:1", 42, "0.1.0", model=CARD)
NODE = Member("kv-0", Role.KVSTORE, "127.0.0.1:2", 43, "0.1.0", kv_uri="grpc:127.0.0.1:2")


@pytest.fixture
async def membership(redis_url: str) -> AsyncIterator[Membership]:
    """Return the membership of an empty fleet."""
    membership = Membership(redis_url, "test", lease_s=0.6)
    yield membership
    await membership.close()


@asynccontextmanager
async def running(heartbeat: Heartbeat) -> AsyncIterator[asyncio.Task[None]]:
    """Run a heartbeat for a while."""
    task = asyncio.create_task(heartbeat.run())
    try:
        yield task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError, FencedError):
            await task


async def test_members_read_back_what_was_registered(membership: Membership) -> None:
    worker = await membership.register(WORKER)
    node = await membership.register(NODE)
    assert worker == replace(WORKER, epoch=worker.epoch)
    assert await membership.members() == [worker, node]


async def test_fleets_do_not_see_each_other(membership: Membership, redis_url: str) -> None:
    await membership.register(WORKER)
    other = Membership(redis_url, "other")
    assert await other.members() == []
    await other.close()


async def test_a_silent_member_is_gone_after_its_lease(membership: Membership) -> None:
    await membership.register(WORKER)

    async def is_gone() -> bool:
        return await membership.members() == []

    await until(is_gone, 3)


async def test_announce_publishes_load(membership: Membership) -> None:
    worker = (await membership.register(WORKER)).with_load(Load(num_running=3))
    await membership.announce(worker)
    assert await membership.members() == [worker]


async def test_epochs_grow_even_when_redis_forgot_them(
    membership: Membership, redis_server: RedisServer
) -> None:
    first = await membership.register(WORKER)
    second = await membership.register(WORKER)
    redis_server.command("FLUSHALL")
    third = await membership.register(WORKER)
    assert 0 < first.epoch < second.epoch < third.epoch


async def test_an_earlier_incarnation_is_fenced(membership: Membership) -> None:
    first = await membership.register(WORKER)
    second = await membership.register(WORKER)
    with pytest.raises(FencedError):
        await membership.announce(first)
    await membership.deregister(first)
    assert await membership.members() == [second], "the zombie cannot remove its successor"


async def test_deregister_without_epoch_means_the_own_incarnation(
    membership: Membership,
) -> None:
    await membership.register(WORKER)
    await membership.deregister(WORKER)
    assert await membership.members() == []


async def test_unreadable_records_are_skipped(
    membership: Membership, redis_server: RedisServer
) -> None:
    worker = await membership.register(WORKER)
    await membership.register(NODE)
    redis_server.command("HSET", "pl:{test}:members", "kv-0", '{"role": "queen"}')
    assert await membership.members() == [worker]


async def test_a_lost_redis_is_an_unavailable_error(
    membership: Membership, redis_server: RedisServer
) -> None:
    redis_server.kill()
    with pytest.raises(UnavailableError) as raised:
        await membership.register(WORKER)
    assert raised.value.reason == "redis-unavailable"


async def test_heartbeat_keeps_the_lease_and_follows_changes(membership: Membership) -> None:
    state = {"member": WORKER}
    heartbeat = Heartbeat(membership, lambda: state["member"], period_s=0.02)
    async with running(heartbeat):
        await until(lambda: heartbeat.epoch is not None, 3)
        state["member"] = WORKER.with_load(Load(num_waiting=7))

        async def is_published() -> bool:
            members = await membership.members()
            return bool(members) and members[0].load.num_waiting == 7

        await until(is_published, 2)
        end_s = time.monotonic() + 2 * membership.lease_s

        async def is_kept_for_two_leases() -> bool:
            assert len(await membership.members()) == 1, "the lease is renewed in time"
            return time.monotonic() > end_s

        await until(is_kept_for_two_leases, 5)


async def test_heartbeat_outlives_the_loss_of_redis(
    membership: Membership, redis_server: RedisServer
) -> None:
    states: list[bool] = []
    heartbeat = Heartbeat(membership, lambda: WORKER, period_s=0.02, on_state=states.append)

    async def is_member() -> bool:
        try:
            return len(await membership.members()) == 1
        except UnavailableError:
            return False

    async with running(heartbeat) as task:
        await until(is_member, 3)
        epoch = heartbeat.epoch
        redis_server.kill()
        await until(lambda: not heartbeat.is_connected, 3)
        redis_server.start()
        await until(is_member, 3)
        assert heartbeat.epoch == epoch and not task.done()
    assert states == [True, False, True]


async def test_heartbeat_writes_its_record_again_after_a_flush(
    membership: Membership, redis_server: RedisServer
) -> None:
    heartbeat = Heartbeat(membership, lambda: WORKER, period_s=0.02)

    async def is_member() -> bool:
        return len(await membership.members()) == 1

    async with running(heartbeat):
        await until(is_member, 3)
        redis_server.command("FLUSHALL")
        await until(is_member, 2)


async def test_heartbeat_ends_when_its_id_was_taken_over(membership: Membership) -> None:
    heartbeat = Heartbeat(membership, lambda: WORKER, period_s=0.02)
    async with running(heartbeat) as task:
        await until(lambda: heartbeat.epoch is not None, 3)
        successor = await membership.register(WORKER)
        with pytest.raises(FencedError):
            await asyncio.wait_for(task, 3)
        assert await membership.members() == [successor]


async def test_calls_are_timed_whatever_comes_of_them(redis_server: RedisServer) -> None:
    times: list[float] = []
    membership = Membership(redis_server.url, "test", timeout_s=0.2, on_call=times.append)
    await membership.members()
    assert len(times) >= 1 and max(times) < 0.2
    redis_server.pause()
    try:
        with pytest.raises(UnavailableError):
            await membership.members()
    finally:
        redis_server.resume()
    assert times[-1] >= 0.2
    await membership.close()
