"""Prometheus, membership and target seen together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from paceline.autoscaler.sources.fleet import Fleet, FleetSource
from paceline.autoscaler.sources.live import LiveSource, unscraped
from paceline.autoscaler.sources.prometheus import PrometheusRules, PrometheusSource, Signals
from paceline.autoscaler.sources.prometheus_api import PrometheusApi
from paceline.autoscaler.values import Observation
from paceline.domain.member import Member, Role
from paceline.process.membership import Membership
from tests.redis_server import redis_server, redis_url
from tests.unit.autoscaler.made import gateway, worker
from tests.unit.autoscaler.scripted_http import Answer, always, scripted
from tests.unit.autoscaler.test_prometheus_faults import silence, vector

__all__ = ["redis_server", "redis_url"]

SELF = Member("autoscaler", Role.AUTOSCALER, "", 9, "0")
SIZES = {Role.PREFILL: 1, Role.DECODE: 2}


async def requested(now_s: float) -> tuple[Mapping[Role, int], tuple[str, ...]]:
    return SIZES, ("target-changed: somebody else",)


class Rig:
    def __init__(self, source: LiveSource, ages: list[float | None]) -> None:
        self.source = source
        self.ages = ages

    async def settled(self) -> Observation:
        """Read once members had time to announce themselves."""
        await self.source.read(100.0)
        return await self.source.read(110.0)


@asynccontextmanager
async def live(redis_url: str, answer: Answer, *members: Member) -> AsyncIterator[Rig]:
    membership = Membership(redis_url, "test", lease_s=30.0)
    own = await membership.register(SELF)
    for member in members:
        await membership.register(member)
    ages: list[float | None] = []
    async with scripted(answer) as url:
        api = PrometheusApi(url, timeout_s=20.0)
        rules = PrometheusRules(window_s=60, stale_s=30, ttft_s=1.0, itl_s=0.1)
        source = LiveSource(
            PrometheusSource(api, rules),
            FleetSource(membership, SELF.id, lambda: own.epoch),
            requested,
            ages.append,
            scrape_grace_s=5.0,
        )
        yield Rig(source, ages)
        await api.close()
        await membership.close()


async def test_an_observation_has_all_parts_and_all_problems(redis_url: str) -> None:
    members = (worker("decode-0"), worker("prefill-0", Role.PREFILL), gateway(parked=3))
    async with live(redis_url, always("200 OK", vector("0")), *members) as rig:
        seen = await rig.settled()
    assert seen.at_s == 110.0
    assert (seen.pools[Role.DECODE].requested, seen.pools[Role.DECODE].ready) == (2, 1)
    assert seen.pools[Role.DECODE].starting == 1
    assert seen.pools[Role.DECODE].busy_ratio == 0.0
    assert seen.pools[Role.PREFILL].replica is not None
    assert seen.traffic is not None and seen.traffic.requests_per_s == 0
    assert seen.parked == 3
    # The clock of an answer that is always the same stands still.
    assert rig.ages == [0.0, 10.0]
    reasons = {line.partition(":")[0] for line in seen.problems}
    assert {"target-changed", "prometheus-partial", "fleet-incomplete"} <= reasons


async def test_parked_requests_without_workers_do_not_wait_for_prometheus(redis_url: str) -> None:
    loop = asyncio.get_running_loop()
    async with live(redis_url, silence, gateway(parked=1)) as rig:
        begun_s = loop.time()
        seen = await rig.source.read(100.0)
        assert loop.time() - begun_s < 10.0
    assert seen.parked == 1
    assert any(line.startswith("prometheus-timeout: not waited for") for line in seen.problems)


def test_gateways_that_are_not_scraped_are_named_once_they_could_be() -> None:
    fleet = Fleet(ages_s={Role.GATEWAY: (50.0, 3.0), Role.DECODE: (50.0, 50.0)})
    scraped = Signals(num_scraped={Role.GATEWAY: 1, Role.DECODE: 1, Role.PREFILL: 0})
    assert unscraped(fleet, scraped, 10.0) == ()
    (line,) = unscraped(fleet, scraped, 1.0)
    assert line == "prometheus-partial: 1 of 2 gateway processes are scraped"
    none = Signals(num_scraped={Role.GATEWAY: 2, Role.DECODE: 0})
    (line,) = unscraped(fleet, none, 10.0)
    assert line == "prometheus-partial: 0 of 2 decode processes are scraped"
    # What could not be counted is a problem of the query, said there.
    assert unscraped(fleet, Signals(), 1.0) == ()
