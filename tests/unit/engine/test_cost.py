"""The fitted step cost recovers what a machine does, and survives clocks that say nonsense."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from paceline.domain.cost import StepCost
from paceline.engine.cost import _fit, measure_step_cost
from paceline.engine.step import StepPlan, StepResult


class Machine:
    """A runner that takes the time a cost model says, with noise."""

    def __init__(self, cost: StepCost, noise: float = 0.0, seed: int = 0) -> None:
        self._cost, self._noise, self._rng = cost, noise, random.Random(seed)
        self.plans: list[StepPlan] = []

    def run(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        attended = sum(
            len(r.token_ids) * r.start + len(r.token_ids) * (len(r.token_ids) + 1) // 2
            for r in plan.rows
        )
        elapsed_s = self._cost.step_s(len(plan.rows), plan.num_tokens, attended)
        factor = 1 + self._rng.uniform(-self._noise, self._noise)
        return StepResult((None,) * len(plan.rows), elapsed_s * factor)


def measure(machine: Machine, **sizes: int) -> StepCost:
    defaults = {"num_pages": 256, "block_size": 16, "max_context_tokens": 2048, "chunk": 256}
    # A processor clock that leaps ahead leaves the wall clock to decide.
    leaping = itertools.count(0.0, 1e6).__next__
    return measure_step_cost(machine, cpu_s=leaping, **{**defaults, **sizes})


@pytest.mark.parametrize(
    "cost",
    [
        StepCost(1e-3, 2e-4, 5e-5, 1e-8),
        StepCost(5e-2, 1e-3, 2e-3, 1e-7),
        StepCost(1e-3, 0.0, 1e-4, 0.0),
        StepCost(0.0, 1e-4, 1e-5, 1e-9),
    ],
)
def test_a_linear_machine_is_recovered(cost: StepCost) -> None:
    fitted = measure(Machine(cost))
    for rows, tokens, attended in [(1, 1, 100), (8, 8, 4000), (1, 256, 40_000), (3, 300, 90_000)]:
        expected = cost.step_s(rows, tokens, attended)
        assert fitted.step_s(rows, tokens, attended) == pytest.approx(expected, rel=1e-6)


def test_noise_does_not_make_a_coefficient_negative_or_a_prediction_useless() -> None:
    cost = StepCost(1e-3, 2e-4, 5e-5, 1e-9)
    for seed in range(20):
        fitted = measure(Machine(cost, noise=0.3, seed=seed))
        assert min(fitted.base_s, fitted.row_s, fitted.token_s, fitted.context_s) >= 0
        for rows, tokens in [(1, 1), (8, 8), (1, 128), (1, 256)]:
            attended = tokens * (tokens + 1) // 2
            ratio = fitted.step_s(rows, tokens, attended) / cost.step_s(rows, tokens, attended)
            assert 0.5 < ratio < 2


def test_waiting_for_a_core_is_not_counted() -> None:
    fitted = measure_step_cost(
        Machine(StepCost(1.0, 0.0, 0.0, 0.0)),
        num_pages=256,
        block_size=16,
        max_context_tokens=2048,
        chunk=256,
        cpu_s=itertools.count(0.0, 0.25).__next__,
    )
    assert fitted.step_s(1, 1, 1) == pytest.approx(0.25)


def test_a_clock_that_stands_still_gives_a_finite_cost() -> None:
    fitted = measure(Machine(StepCost(0.0, 0.0, 0.0, 0.0)))
    assert 0 <= fitted.step_s(8, 256, 100_000) < 1


@pytest.mark.parametrize("seed", range(10))
def test_the_fit_is_the_best_without_negative_coefficients(seed: int) -> None:
    """Against projected gradient descent, a solver that has nothing in common with ours."""
    rng = np.random.default_rng(seed)
    features = rng.uniform(0, 1, (9, 4)) * [1, 1, 10, 100]
    times = features @ rng.normal(0, 1, 4) + rng.uniform(2, 4, 9) + 300
    ours = np.array(_fit(features, times))
    weighted = features / times[:, None]
    scales = np.linalg.norm(weighted, axis=0)
    matrix, x = weighted / scales, np.zeros(4)
    rate = 1 / np.linalg.norm(matrix.T @ matrix, 2)
    for _ in range(50_000):
        x = np.maximum(0, x - rate * (matrix.T @ (matrix @ x - 1)))
    best = np.square(matrix @ x - 1).sum()
    assert (ours >= 0).all()
    assert np.square(weighted @ ours - 1).sum() <= best * (1 + 1e-6)


@pytest.mark.parametrize("num_pages", [2, 3, 10])
@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("max_context", [2, 5, 64])
@pytest.mark.parametrize("chunk", [1, 8, 512])
def test_no_measured_step_leaves_the_pool_or_the_context(
    num_pages: int, block_size: int, max_context: int, chunk: int
) -> None:
    machine = Machine(StepCost(1e-3, 1e-4, 1e-5, 1e-9))
    context = min(max_context, num_pages * block_size)
    measure(
        machine,
        num_pages=num_pages,
        block_size=block_size,
        max_context_tokens=context,
        chunk=chunk,
    )
    for plan in machine.plans:
        for row in plan.rows:
            end = row.start + len(row.token_ids)
            assert len(row.token_ids) > 0 and end <= context
            assert len(row.pages) == -(-end // block_size)
            assert all(0 <= page < num_pages for page in row.pages)
