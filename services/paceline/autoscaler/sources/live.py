"""One observation of the running platform: Prometheus, the membership and the target together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from paceline.autoscaler.problems import problem
from paceline.autoscaler.sources.fleet import Fleet, FleetSource
from paceline.autoscaler.sources.prometheus import PrometheusSource, Signals
from paceline.autoscaler.values import POOLS, Observation, Pool
from paceline.domain.member import Role

_WAKE_PATIENCE_S = 0.25
"""How long metrics are waited for while requests are parked and no worker is there."""

Requested = tuple[Mapping[Role, int], tuple[str, ...]]
"""Replicas that the target was last asked for, and what could not be found out about that."""


class LiveSource:
    """A `MetricSource` of the platform as it is."""

    def __init__(
        self,
        prometheus: PrometheusSource,
        fleet: FleetSource,
        read_requested: Callable[[float], Awaitable[Requested]],
        on_age: Callable[[float | None], None],
        scrape_grace_s: float,
    ) -> None:
        """`on_age` hears how old the newest sample is, if that is known. Processes younger than
        `scrape_grace_s` need not be known to Prometheus yet.
        """
        self._prometheus = prometheus
        self._fleet = fleet
        self._read_requested = read_requested
        self._on_age = on_age
        self._scrape_grace_s = scrape_grace_s

    async def read(self, now_s: float) -> Observation:
        """Return what can be found out."""
        asking = asyncio.create_task(self._prometheus.read(now_s), name="prometheus")
        try:
            fleet = await self._fleet.read(now_s)
            requested, problems = await self._read_requested(now_s)
            signals = await _patiently(asking, fleet)
        finally:
            asking.cancel()
        self._on_age(signals.age_s)
        return Observation(
            at_s=now_s,
            pools={
                role: Pool(
                    requested=requested[role],
                    workers=fleet.workers.get(role, ()),
                    replica=fleet.replicas.get(role),
                    busy_ratio=signals.busy_ratio.get(role),
                )
                for role in POOLS
            },
            traffic=signals.traffic,
            latency=signals.latency,
            parked=fleet.parked,
            problems=(
                *signals.problems,
                *unscraped(fleet, signals, self._scrape_grace_s),
                *fleet.problems,
                *problems,
            ),
        )


async def _patiently(asking: asyncio.Task[Signals], fleet: Fleet) -> Signals:
    """Wait for the metrics, but hardly while requests are parked for want of any worker."""
    is_asleep = fleet.parked > 0 and any(
        all(worker.is_draining for worker in fleet.workers.get(role, ())) for role in POOLS
    )
    done, _ = await asyncio.wait({asking}, timeout=_WAKE_PATIENCE_S if is_asleep else None)
    if done:
        return asking.result()
    text = "not waited for: requests are parked and no worker is there"
    return Signals(problems=(problem("prometheus-timeout", text),))


def unscraped(fleet: Fleet, signals: Signals, grace_s: float) -> tuple[str, ...]:
    """Name roles of which Prometheus sees fewer processes than there are.

    Arrivals are a sum over gateways: one that is not scraped is traffic that is not seen. Of
    workers, one that is scraped tells what drafts bring.
    """
    problems = []
    for role, num_scraped in signals.num_scraped.items():
        num_there = sum(age_s > grace_s for age_s in fleet.ages_s.get(role, ()))
        num_needed = num_there if role is Role.GATEWAY else min(1, num_there)
        if num_scraped < num_needed:
            text = f"{num_scraped} of {num_there} {role.value} processes are scraped"
            problems.append(problem("prometheus-partial", text))
    return tuple(problems)
