"""The fleet as its membership in a real Redis tells it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from paceline.autoscaler.leader import stand_by
from paceline.autoscaler.sources.fleet import FleetSource, replica_of
from paceline.autoscaler.values import Replica
from paceline.domain.cost import StepCost
from paceline.domain.member import Load, Member, Role
from paceline.process.membership import Membership
from tests.redis_server import RedisServer, redis_server, redis_url
from tests.unit.autoscaler.made import COST, gateway, worker
from tests.waiting import until

__all__ = ["redis_server", "redis_url"]

SELF = Member("autoscaler", Role.AUTOSCALER, "", 9, "0")
LEASE_S = 3.0
SETTLED_S = 100.0 + LEASE_S


class Rig:
    """A fleet source and the records that it reads."""

    def __init__(self, membership: Membership) -> None:
        self.membership = membership
        self.epoch: int | None = None
        self.source = FleetSource(membership, SELF.id, lambda: self.epoch, timeout_s=5.0)

    async def register(self, *members: Member) -> None:
        """Register the autoscaler itself and others."""
        self.epoch = (await self.membership.register(SELF)).epoch
        for member in members:
            await self.membership.register(member)


@pytest.fixture
async def rig(redis_url: str) -> AsyncIterator[Rig]:
    membership = Membership(redis_url, "test", lease_s=LEASE_S, timeout_s=2.0)
    yield Rig(membership)
    await membership.close()


async def settled(rig: Rig) -> None:
    """Let the members' time to announce themselves pass, by the source's clock."""
    await rig.source.read(100.0)


async def test_workers_are_what_they_announce(rig: Rig) -> None:
    draining = worker("decode-1", is_draining=True)
    await rig.register(worker("decode-0"), draining, worker("prefill-0", Role.PREFILL))
    await settled(rig)
    fleet = await rig.source.read(SETTLED_S)
    assert fleet.problems == ()
    first, second = fleet.workers[Role.DECODE]
    assert (first.id, first.is_draining, first.num_running, first.context_tokens) == (
        "decode-0",
        False,
        3,
        700,
    )
    assert (first.free_blocks, first.total_blocks) == (100, 256)
    assert second.is_draining
    assert [each.id for each in fleet.workers[Role.PREFILL]] == ["prefill-0"]
    assert fleet.replicas[Role.DECODE] == Replica(COST, 64, 8, 4096)
    assert rig.source.counts() == {Role.PREFILL: 1, Role.DECODE: 1}


async def test_ages_count_from_the_first_sight_of_an_incarnation(rig: Rig) -> None:
    await rig.register(worker("decode-0"))
    await settled(rig)
    fleet = await rig.source.read(SETTLED_S)
    assert fleet.workers[Role.DECODE][0].age_s == LEASE_S
    await rig.membership.register(worker("decode-0"))
    fleet = await rig.source.read(SETTLED_S + 5)
    assert fleet.workers[Role.DECODE][0].age_s == 0


async def test_parked_requests_are_those_of_all_gateways(rig: Rig) -> None:
    await rig.register(gateway("a", 2), gateway("b", 3), worker("d", load=Load(num_waiting=9)))
    await settled(rig)
    assert (await rig.source.read(SETTLED_S)).parked == 5
    assert await rig.source.num_parked() == 5


async def test_a_redis_that_is_away_is_named_and_the_last_view_kept(
    rig: Rig, redis_server: RedisServer
) -> None:
    await rig.register(worker("decode-0"))
    await settled(rig)
    before = await rig.source.read(SETTLED_S)
    redis_server.kill()
    fleet = await rig.source.read(SETTLED_S + 30)
    assert fleet.workers == before.workers
    (line,) = fleet.problems
    assert line.startswith("redis-unavailable: ") and line.endswith("as they were: 30 s ago")
    assert await rig.source.num_parked() == 0


async def test_a_redis_that_hangs_costs_one_deadline(rig: Rig, redis_server: RedisServer) -> None:
    await rig.register(worker("decode-0"))
    redis_server.pause()
    try:
        fleet = await rig.source.read(100.0)
    finally:
        redis_server.resume()
    assert fleet.problems[0].startswith("redis-unavailable: ")


async def test_a_redis_that_lost_its_data_shows_no_empty_fleet(
    rig: Rig, redis_server: RedisServer
) -> None:
    await rig.register(worker("decode-0"))
    await settled(rig)
    before = await rig.source.read(SETTLED_S)
    redis_server.command("FLUSHALL")
    fleet = await rig.source.read(SETTLED_S + 1)
    assert fleet.workers == before.workers
    assert fleet.problems == ("fleet-incomplete: its own record is not there",)
    # Others have time to announce themselves once this one is back.
    await rig.membership.announce(replace(SELF, epoch=rig.epoch or 0))
    fleet = await rig.source.read(SETTLED_S + 2)
    assert fleet.workers == before.workers
    assert fleet.problems == ("fleet-incomplete: members have 3.0 s left to announce",)
    await rig.membership.register(worker("decode-7"))
    await rig.membership.announce(replace(SELF, epoch=rig.epoch or 0))
    fleet = await rig.source.read(SETTLED_S + 2 + LEASE_S)
    assert fleet.problems == ()
    assert [each.id for each in fleet.workers[Role.DECODE]] == ["decode-7"]


async def test_before_it_is_registered_nothing_is_complete(rig: Rig) -> None:
    await rig.membership.register(worker("decode-0"))
    fleet = await rig.source.read(100.0)
    assert fleet.problems == ("fleet-incomplete: its own record is not there",)
    assert len(fleet.workers[Role.DECODE]) == 1


async def test_a_successor_is_noticed(rig: Rig) -> None:
    await rig.register()
    await rig.membership.register(SELF)
    fleet = await rig.source.read(100.0)
    assert fleet.problems == ("fleet-incomplete: another autoscaler has taken over",)


async def test_workers_that_do_not_tell_are_named_and_what_others_told_is_kept(rig: Rig) -> None:
    await rig.register(worker("decode-0"))
    await settled(rig)
    told = (await rig.source.read(SETTLED_S)).replicas[Role.DECODE]
    await rig.membership.deregister(worker("decode-0"))
    await rig.membership.register(worker("decode-1", max_rows=0))
    fleet = await rig.source.read(SETTLED_S + 1)
    assert fleet.problems[0].startswith("fleet-untold: no decode worker")
    assert fleet.replicas[Role.DECODE] == told


def test_the_worker_of_median_speed_stands_for_its_pool() -> None:
    costs = [StepCost(base_s, 0, 0, 0) for base_s in (0.01, 5.0, 0.02)]
    members = [worker(f"w{i}", step_cost=cost) for i, cost in enumerate(costs)]
    chosen = replica_of(members)
    assert chosen is not None and chosen.step_cost == costs[2]
    assert replica_of([]) is None
    assert replica_of([worker("w", step_cost=None), worker("v", model=None)]) is None


async def test_standing_by_ends_with_the_holders_lease(redis_url: str) -> None:
    membership = Membership(redis_url, "test", lease_s=0.5)
    await stand_by(membership, SELF.id)
    holder = await membership.register(SELF)
    await stand_by(membership, SELF.id)
    assert holder.epoch not in [member.epoch for member in await membership.members()]
    await membership.close()


async def test_standing_by_waits_for_redis(redis_server: RedisServer) -> None:
    import asyncio

    membership = Membership(redis_server.url, "test")
    redis_server.kill()
    waiting = asyncio.create_task(stand_by(membership, SELF.id))
    await asyncio.sleep(0)
    assert not waiting.done()
    redis_server.start()
    await until(waiting.done)
    await membership.close()
