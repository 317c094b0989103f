"""Makes baselines as good as they can be: what they aim at is chosen with hindsight.

A policy with targets runs on the whole load once for each pair of a grid; of those that reach
the goal the one with the fewest replica-seconds is taken, else the one with the best attainment.
A fixed fleet has the smallest sizes that reach the goal. The goal is a share of what is reachable
(ceiling.py). Runs are spread over processes.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import repeat

from paceline.autoscaler.values import POOLS
from paceline.cli.simulation.policies import MakePolicy, PolicyOptions
from paceline.cli.simulation.results import Figures, figures
from paceline.cli.simulation.simulation import SimulationOptions, simulate
from paceline.cli.simulation.traces import Arrival
from paceline.domain.member import Role

GRIDS: dict[str, dict[Role, tuple[float, ...]]] = {
    "hpa": {
        Role.PREFILL: (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8),
        Role.DECODE: (4.0, 8.0, 16.0, 32.0, 64.0),
    },
    "keda-queue": {
        Role.PREFILL: (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0),
        Role.DECODE: (2.0, 4.0, 8.0, 16.0, 32.0, 64.0),
    },
}
"""Targets tried per pool. hpa: busy share of prefill, sequences per decode worker; keda-queue:
requests per worker, waiting and running."""


@dataclass(frozen=True, slots=True)
class World:
    """What all policies are compared in."""

    load: tuple[Arrival, ...]
    options: SimulationOptions
    make: MakePolicy


@dataclass(frozen=True, slots=True)
class Trial:
    """A policy and what it came to."""

    policy: PolicyOptions
    figures: Figures


Report = Callable[[Trial], None]


def run_policy(world: World, policy: PolicyOptions) -> Trial:
    """Return what a policy comes to; a fixed fleet is there from the start."""
    options = world.options
    if policy.name == "static":
        options = replace(options, initial=policy.sizes)
    outcome = simulate(world.load, world.make(policy), options)
    return Trial(policy, figures(outcome))


class Trials:
    """Runs policies, several at a time where there are cores; remembers all."""

    def __init__(self, world: World, report: Report, num_processes: int | None = None) -> None:
        """`report` hears every trial as it ends."""
        self._world = world
        self._report = report
        self._num = num_processes or len(os.sched_getaffinity(0))
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Trials:
        if self._num > 1:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._num, context)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(self, policies: Iterable[PolicyOptions]) -> list[Trial]:
        """Return the trials in order."""
        trials = []
        for trial in self._each(list(policies)):
            self._report(trial)
            trials.append(trial)
        return trials

    def _each(self, policies: list[PolicyOptions]) -> Iterator[Trial]:
        if self._pool is None or len(policies) == 1:
            return (run_policy(self._world, policy) for policy in policies)
        return self._pool.map(run_policy, repeat(self._world), policies)


def best(trials: Iterable[Trial], goal: float) -> Trial:
    """Return the cheapest trial that reaches the goal, else the one that comes closest."""

    def order(trial: Trial) -> tuple[bool, float, float]:
        attained = trial.figures.slo_attainment
        reaches = attained >= goal
        return (not reaches, 0.0 if reaches else -attained, trial.figures.replica_seconds)

    return min(trials, key=order)


def tune_targets(trials: Trials, policy: PolicyOptions, goal: float) -> Trial:
    """Return the best of the grid of a policy with targets.

    Pool by pool, prefill first, beside the most generous target of the other: the larger a target
    the fewer replicas, so what reaches the goal is found by halving.
    """
    grid = GRIDS[policy.name]
    tried: list[Trial] = []
    targets = {role: values[0] for role, values in grid.items()}
    for role in POOLS:
        values = grid[role]
        low, high = 0, len(values) - 1
        while low < high:
            middle = (low + high + 1) // 2
            asked = replace(policy, targets={**targets, role: values[middle]})
            tried += trials.run([asked])
            if tried[-1].figures.slo_attainment >= goal:
                low = middle
            else:
                high = middle - 1
        targets[role] = values[low]
    if all(trial.policy.targets != targets for trial in tried):
        tried += trials.run([replace(policy, targets=targets)])
    return best(tried, goal)


def tune_sizes(trials: Trials, policy: PolicyOptions, goal: float) -> Trial:
    """Return the smallest fixed fleet that reaches the goal, the best of those of its size.

    First each pool alone, the other one as large as it may be: less will not do. From there all
    fleets of one replica more, and so on. Without any that reaches the goal, the best of the first.
    """
    alone = {role: _alone(trials, policy, role, goal) for role in POOLS}
    if any(trial.figures.slo_attainment < goal for trial in alone.values()):
        return best(alone.values(), goal)
    least = {role: trial.policy.sizes[role] for role, trial in alone.items()}
    for total in range(sum(least.values()), sum(policy.most.values()) + 1):
        sizes = (
            {Role.PREFILL: prefill, Role.DECODE: total - prefill}
            for prefill in range(least[Role.PREFILL], total - least[Role.DECODE] + 1)
        )
        allowed = (s for s in sizes if all(s[role] <= policy.most[role] for role in POOLS))
        found = trials.run(replace(policy, sizes=s) for s in allowed)
        top = max(found, key=lambda trial: trial.figures.slo_attainment)
        if top.figures.slo_attainment >= goal:
            return top
    raise AssertionError("a pool that reaches the goal alone does not beside the same other one")


def _alone(trials: Trials, policy: PolicyOptions, role: Role, goal: float) -> Trial:
    """Return the smallest size of a pool that reaches the goal beside the largest other one."""
    low, high = max(1, policy.least[role]), policy.most[role]
    tried: dict[int, Trial] = {}

    def reaches(size: int) -> bool:
        sizes = {**policy.most, role: size}
        tried[size] = trials.run([replace(policy, sizes=sizes)])[0]
        return tried[size].figures.slo_attainment >= goal

    while low < high:
        middle = (low + high) // 2
        if reaches(middle):
            high = middle
        else:
            low = middle + 1
    if low not in tried:
        reaches(low)
    return tried[low]
