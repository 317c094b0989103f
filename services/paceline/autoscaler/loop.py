"""Read, decide, journal, apply, again and again. Nothing that others do ends it.

A decision is taken once per period, and at once when requests begin to be parked. What a policy
decides is checked before it is carried out (guard.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Protocol

from paceline.autoscaler.guard import checked
from paceline.autoscaler.journal import Journal
from paceline.autoscaler.outcome import hold
from paceline.autoscaler.policies.base import ScalingPolicy
from paceline.autoscaler.problems import problem
from paceline.autoscaler.report import Report
from paceline.autoscaler.sources.base import MetricSource
from paceline.autoscaler.steering import Effect
from paceline.autoscaler.values import POOLS, Decision, Observation, Pool

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoopTimes:
    """Of one autoscaler."""

    period_s: float
    watch_s: float = 0.2
    """How often it is looked for parked requests between decisions."""
    read_timeout_s: float = 30.0
    """Beyond all deadlines of a source: a safeguard, no rule."""


class Steers(Protocol):
    """Carries decisions out."""

    async def apply(self, observation: Observation, decision: Decision) -> tuple[Effect, ...]:
        """Return what came of each change."""
        ...


class ScalingLoop:
    """Owns the policy."""

    def __init__(
        self,
        source: MetricSource,
        policy: ScalingPolicy,
        steering: Steers,
        journal: Journal,
        report: Report,
        clock: Callable[[], float],
        num_parked: Callable[[], Awaitable[int]],
        times: LoopTimes,
    ) -> None:
        """`clock` never goes back; observations carry its time."""
        self._source = source
        self._policy = policy
        self._steering = steering
        self._journal = journal
        self._report = report
        self._clock = clock
        self._num_parked = num_parked
        self._times = times
        self._last = Observation(clock(), {role: Pool(0) for role in POOLS})
        self._decided_s: float | None = None

    @property
    def is_stuck(self) -> bool:
        """Whether decisions fail to be made."""
        if self._decided_s is None:
            return True
        patience_s = 2 * self._times.period_s + self._times.read_timeout_s
        return self._clock() - self._decided_s > patience_s

    async def run(self) -> None:
        """Scale until cancelled."""
        while True:
            started_s = self._clock()
            await self.decide_once()
            await self._pause(started_s + self._times.period_s)

    async def decide_once(self) -> Decision:
        """Take one decision and carry it out; never raises."""
        observation = await self._observe()
        decision = checked(observation, self._decide(observation))
        self._journal.note_decision(observation, decision)
        self._report.show(observation, decision)
        self._journal.note_effects(await self._steering.apply(observation, decision))
        self._last, self._decided_s = observation, self._clock()
        return decision

    async def _observe(self) -> Observation:
        now_s = self._clock()
        try:
            async with asyncio.timeout(self._times.read_timeout_s):
                return await self._source.read(now_s)
        except Exception as error:
            # Sources name what they miss; this is a bug, and no reason to stop scaling for ever.
            logger.error("source-bug", exc_info=error)
            line = problem("source-failed", f"{type(error).__name__}: {error}")
            return replace(self._last, at_s=now_s, problems=(line,))

    def _decide(self, observation: Observation) -> Decision:
        try:
            return self._policy.decide(observation)
        except Exception as error:
            logger.error("policy-bug", exc_info=error)
            return hold(observation, f"the policy failed: {type(error).__name__}: {error}")

    async def _pause(self, until_s: float) -> None:
        """Wait for the next decision's time, or for requests that begin to be parked."""
        was_parked = self._last.parked > 0
        while (left_s := until_s - self._clock()) > 0:
            await asyncio.sleep(min(self._times.watch_s, left_s))
            if not was_parked and await self._num_parked() > 0:
                return
