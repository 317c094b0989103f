"""The Horizontal Pod Autoscaler's algorithm, pool by pool, on the metric that fits the pool.

Follows Kubernetes' pkg/controller/podautoscaler: `replica_calculator.go` (ratio, tolerance, pods
that are not ready) and `horizontal.go` (stabilisation, limits of scaling up and down), with the
defaults of autoscaling/v2 (pkg/apis/autoscaling/v2/defaults.go).
https://kubernetes.io/docs/concepts/workloads/autoscaling/horizontal-pod-autoscale/ describes them:

    desired = ceil(current * metric / target), nothing within a tolerance of 0.1
    every 15 s; up at once by at most 100 % or 4 pods per 15 s, whichever is more;
    down to the highest recommendation of 300 s, by at most 100 % per 15 s

Two Deployments have two such autoscalers that know nothing of each other. Prefill is sized by the
share of the time that its workers compute, as by utilisation; decode by sequences per worker, since
an engine with one sequence is as busy as one with many. It sees nothing but its metric; that is
what makes it the baseline.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping

from paceline.autoscaler.outcome import decide, hold, within_rules
from paceline.autoscaler.policies.rules import Bounds, ScalingRules
from paceline.autoscaler.values import POOLS, Decision, Observation, Pool
from paceline.domain.member import Role

SYNC_S = 15.0
TOLERANCE_RATIO = 0.1
DOWN_WINDOW_S = 300.0
LIMIT_PERIOD_S = 15.0
UP_RATIO = 2.0
"""100 % more per period."""
UP_PODS = 4
DEFAULT_TARGETS: Mapping[Role, float] = {Role.PREFILL: 0.6, Role.DECODE: 16.0}
"""Busy share, and sequences per worker: middles that deployments often start from; benches choose
them by search."""
_SLACK = 1e-9
"""Of ceil, so that 0.3 / 0.1 makes 3."""


class ReplicaControl:
    """Stabilisation and limits of one autoscaler, whatever its metric."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._recommended: deque[tuple[float, int]] = deque()
        self._changes: deque[tuple[float, int]] = deque()
        self._last: int | None = None

    def settle(self, at_s: float, current: int, desired: int) -> int:
        """Return what the pool gets, of what the metric asks for."""
        self._note_change(at_s, current)
        size = self._limit(current, self._stabilise(at_s, current, desired))
        if size != current:
            self._changes.append((at_s, size - current))
        self._last = size
        return size

    def _note_change(self, at_s: float, current: int) -> None:
        """Forget old changes, and take note of those that somebody else made."""
        while self._changes and self._changes[0][0] <= at_s - LIMIT_PERIOD_S:
            self._changes.popleft()
        if self._last is not None and current != self._last:
            self._changes.clear()

    def _stabilise(self, at_s: float, current: int, desired: int) -> int:
        recommended = self._recommended
        recommended.append((at_s, desired))
        while recommended[0][0] < at_s - DOWN_WINDOW_S:
            recommended.popleft()
        highest = max(count for _, count in recommended)
        # The window for growing is 0 s: what is asked for now.
        return desired if desired > current else min(current, highest)

    def _limit(self, current: int, size: int) -> int:
        least, most = self._bounds.least, self._bounds.most
        if size > current:
            started = current - sum(change for _, change in self._changes if change > 0)
            limit = max(math.ceil(started * UP_RATIO), started + UP_PODS)
            # What was limited before may not shrink by it.
            size = max(current, min(size, limit))
        return max(least, min(most, size))


def desired_by_ratio(pool: Pool, metric: float, target: float) -> int:
    """Return what a mean over ready pods asks for; pods that still start count as idle.

    They are set aside while the pool is too large, and counted with 0 while it is too small.
    """
    current, num_ready = pool.requested, pool.ready
    if num_ready == 0:
        return current
    ratio = metric / target
    if not (pool.starting and ratio > 1.0):
        return current if _is_within(ratio) else math.ceil(ratio * num_ready - _SLACK)
    num_pods = num_ready + pool.starting
    damped = ratio * num_ready / num_pods
    if _is_within(damped) or damped < 1.0:
        return current
    wanted = math.ceil(damped * num_pods - _SLACK)
    return max(current, wanted)


def desired_by_average(current: int, total: float, target: float) -> int:
    """Return what a sum asks for that is to be `target` per pod."""
    if current and _is_within(total / (target * current)):
        return current
    return math.ceil(total / target - _SLACK)


def _is_within(ratio: float) -> bool:
    return abs(ratio - 1.0) <= TOLERANCE_RATIO


class HpaPolicy:
    """One autoscaler per pool."""

    def __init__(self, rules: ScalingRules, targets: Mapping[Role, float] | None = None) -> None:
        """`targets`: busy share of prefill, sequences per decode worker; above 0."""
        self._rules = rules
        self._targets = checked_targets(DEFAULT_TARGETS, targets)
        self._control = {role: ReplicaControl(rules.bounds[role]) for role in POOLS}
        self._synced_s = -math.inf

    def decide(self, observation: Observation) -> Decision:
        """Return each autoscaler's size; between two syncs nothing changes."""
        inputs = self._inputs(observation)
        if observation.problems:
            return hold(observation, "; ".join(observation.problems), inputs)
        now = {role: observation.pools[role].requested for role in POOLS}
        if observation.at_s - self._synced_s < SYNC_S:
            wanted, reason = now, f"next sync in {self._left_s(observation):.0f} s"
        else:
            self._synced_s = observation.at_s
            parts = {role: self._size(observation, role) for role in POOLS}
            wanted = {role: size for role, (size, _) in parts.items()}
            reason = "; ".join(text for _, text in parts.values())
        sizes = within_rules(self._rules, wanted)
        return decide(observation, sizes, reason, inputs, is_limited=sizes != wanted)

    def _left_s(self, observation: Observation) -> float:
        return self._synced_s + SYNC_S - observation.at_s

    def _size(self, observation: Observation, role: Role) -> tuple[int, str]:
        pool, target = observation.pools[role], self._targets[role]
        current, name = pool.requested, role.value
        if current == 0:
            # An HPA whose target stands at zero does nothing.
            return 0, f"{name} 0"
        if role is Role.DECODE:
            total = float(sequences(pool))
            desired = desired_by_average(current, total, target)
            seen = f"{total:.0f} sequences of {target:g} each"
        elif pool.busy_ratio is None or not math.isfinite(pool.busy_ratio):
            return current, f"{name} {current}: no busy share, kept"
        else:
            desired = desired_by_ratio(pool, min(1.0, max(0.0, pool.busy_ratio)), target)
            seen = f"busy {pool.busy_ratio:.2f} of {target:g}"
        size = self._control[role].settle(observation.at_s, current, max(1, desired))
        return size, f"{name} {current} -> {size}: {seen}"

    def _inputs(self, observation: Observation) -> dict[str, float]:
        inputs = {f"{role.value}_target": self._targets[role] for role in POOLS}
        inputs["decode_sequences"] = float(sequences(observation.pools[Role.DECODE]))
        busy = observation.pools[Role.PREFILL].busy_ratio
        if busy is not None and math.isfinite(busy):
            inputs["prefill_busy_ratio"] = busy
        return inputs


def sequences(pool: Pool) -> int:
    """Return the requests that a pool's workers have, running and waiting."""
    return sum(worker.num_running + worker.num_waiting for worker in pool.workers)


def checked_targets(
    usual: Mapping[Role, float], given: Mapping[Role, float] | None
) -> dict[Role, float]:
    """Return the targets of all pools.

    Raises:
        ValueError: one is not above 0.
    """
    targets = {**usual, **(given or {})}
    for role, target in targets.items():
        if not target > 0:
            raise ValueError(f"{role.value} target {target}: expected a number above 0")
    return targets
