"""KEDA's scaling on a queue: requests waiting and running per replica, to and from zero as well.

From 1 up KEDA hands its metric to an HPA as an external metric of type AverageValue, so sizes
follow hpa.py: desired = ceil(sum / target), same sync, tolerance, windows and limits. Between 0
and 1 KEDA itself decides (https://keda.sh/docs/latest/reference/scaledobject-spec/): every
polling interval (30 s) it looks whether the metric is above the activation threshold (0); a pool
that was not for the cooldown period (300 s) goes to its least, if that is 0.

Each pool is a ScaledObject of its own, on the requests of its own workers; one that stands at
zero has no workers to ask, so parked requests count for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from paceline.autoscaler.outcome import decide, hold, within_rules
from paceline.autoscaler.policies.hpa import (
    SYNC_S,
    ReplicaControl,
    checked_targets,
    desired_by_average,
    sequences,
)
from paceline.autoscaler.policies.rules import ScalingRules
from paceline.autoscaler.values import POOLS, Decision, Observation, Pool
from paceline.domain.member import Role

POLLING_S = 30.0
COOLDOWN_S = 300.0
DEFAULT_TARGETS: Mapping[Role, float] = {Role.PREFILL: 5.0, Role.DECODE: 5.0}
"""Requests per replica, as charts that ship such a trigger set it; benches choose by search."""


class KedaQueuePolicy:
    """One scaled object per pool."""

    def __init__(self, rules: ScalingRules, targets: Mapping[Role, float] | None = None) -> None:
        """`targets` say how many requests a replica of each pool is to have, above 0."""
        self._rules = rules
        self._targets = checked_targets(DEFAULT_TARGETS, targets)
        self._control = {role: ReplicaControl(rules.bounds[role]) for role in POOLS}
        self._synced_s = self._polled_s = -math.inf
        self._active_s: dict[Role, float] = {}

    def decide(self, observation: Observation) -> Decision:
        """Return each scaled object's size; between two syncs nothing changes."""
        at_s = observation.at_s
        queues = {role: _queue(observation, role) for role in POOLS}
        inputs = {f"{role.value}_target": self._targets[role] for role in POOLS}
        inputs |= {f"{role.value}_requests": float(queues[role]) for role in POOLS}
        if observation.problems:
            return hold(observation, "; ".join(observation.problems), inputs)
        is_poll, is_sync = at_s - self._polled_s >= POLLING_S, at_s - self._synced_s >= SYNC_S
        self._polled_s = at_s if is_poll else self._polled_s
        self._synced_s = at_s if is_sync else self._synced_s
        wanted = {}
        for role in POOLS:
            pool = observation.pools[role]
            size = pool.requested
            if is_poll and self._rules.bounds[role].least == 0:
                size = self._activate(at_s, role, queues[role], size)
            # An HPA whose target stands at zero does nothing.
            if is_sync and size and pool.requested:
                size = self._settle(at_s, role, pool, queues[role])
            wanted[role] = size
        sizes = within_rules(self._rules, wanted)
        reason = "; ".join(
            f"{role.value} {observation.pools[role].requested} -> {sizes[role]}: "
            f"{queues[role]} requests, {self._targets[role]:g} per replica"
            for role in POOLS
        )
        return decide(observation, sizes, reason, inputs, is_limited=sizes != wanted)

    def _activate(self, at_s: float, role: Role, queue: int, size: int) -> int:
        if queue > 0:
            self._active_s[role] = at_s
            return max(1, size)
        idle_s = at_s - self._active_s.setdefault(role, at_s)
        return 0 if idle_s >= COOLDOWN_S else size

    def _settle(self, at_s: float, role: Role, pool: Pool, queue: int) -> int:
        desired = max(1, desired_by_average(pool.requested, float(queue), self._targets[role]))
        return max(1, self._control[role].settle(at_s, pool.requested, desired))


def _queue(observation: Observation, role: Role) -> int:
    return sequences(observation.pools[role]) + observation.parked
