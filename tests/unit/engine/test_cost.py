"""The fitted step cost recovers what a machine does, and survives clocks that say nonsense."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest

from paceline.domain.cost import Curve, StepCost, StepCurves, StepShape
from paceline.engine.bench.cost import held_out_steps
from paceline.engine.cost import is_still_true, known_step_cost, measure_step_cost
from paceline.engine.cost_fit import nonnegative_fit
from paceline.engine.cost_store import CostKey, CostStore
from paceline.engine.probe import ProbeStep, StepTimer
from tests.unit.engine.machine import Machine, shape_of, timer_for

SIZES = {"max_context_tokens": 2048, "chunk": 512}

LINEAR = StepCost(1e-3, 2e-4, 5e-5, 1e-8)

STREAMING = StepCost(
    0.0,
    0.0,
    0.0,
    0.0,
    StepCurves(
        # The weights are read in 5 ms, behind which up to 16 tokens hide.
        tokens=Curve((1, 16, 32, 512), (5e-3, 5.2e-3, 9e-3, 0.12)),
        rows=Curve((0, 1, 8, 32), (0.0, 3e-4, 5e-4, 2e-3)),
        contexts=Curve((0, 8192, 32768), (0.0, 4e-4, 4e-3)),
        prefill_row_s=2e-4,
        prefill_read_s=1e-7,
        prefill_context_s=4e-8,
        nodes=Curve((0, 8, 32), (0.0, 3e-4, 4e-3)),
        node_context_s=3e-8,
    ),
)
"""A machine that streams weights, with KV that is in a cache at first."""

MACHINES = {
    "linear": LINEAR,
    "slow": StepCost(5e-2, 1e-3, 2e-3, 1e-7),
    "rows for nothing": StepCost(1e-3, 0.0, 1e-4, 0.0),
    "no base": StepCost(0.0, 1e-4, 1e-5, 1e-9),
    "streaming": STREAMING,
}


def errors_of(fitted: StepCost, real: StepCost) -> list[float]:
    """Relative errors on steps that were not fitted, sorted."""
    shapes = [step.shape for step in held_out_steps(3, 300, 2048)]
    return sorted(abs(fitted.step_s(s) / real.step_s(s) - 1) for s in shapes)


@pytest.mark.parametrize("name", MACHINES)
def test_a_machine_is_recovered(name: str) -> None:
    machine = Machine(MACHINES[name])
    fitted = measure_step_cost(timer_for(machine), **SIZES)
    errors = errors_of(fitted, machine.cost)
    assert errors[len(errors) // 2] < 0.02
    assert errors[int(0.95 * len(errors))] < 0.1


@pytest.mark.parametrize("seed", range(5))
def test_noise_does_not_make_a_prediction_useless(seed: int) -> None:
    machine = Machine(STREAMING, noise=0.2, seed=seed)
    fitted = measure_step_cost(timer_for(machine), **SIZES)
    errors = errors_of(fitted, STREAMING)
    assert errors[len(errors) // 2] < 0.1
    assert errors[int(0.95 * len(errors))] < 0.25


@pytest.mark.parametrize("seed", range(5))
def test_more_work_is_never_predicted_to_be_faster(seed: int) -> None:
    fitted = measure_step_cost(timer_for(Machine(STREAMING, 0.5, seed)), **SIZES)
    rng = random.Random(seed)
    for _ in range(500):
        shape = StepShape(rows=rng.randint(0, 40), attended=rng.randint(0, 90_000))
        shape = shape.with_chunk(rng.randint(0, 600), rng.randint(0, 3000))
        field = rng.choice(["rows", "tree_nodes", "attended", "tree_attended", "prefill_tokens"])
        more = replace(shape, **{field: getattr(shape, field) + rng.randint(1, 50)})
        assert fitted.step_s(more) >= fitted.step_s(shape) >= 0


def test_the_linear_form_is_kept_for_members_without_curves() -> None:
    fitted = measure_step_cost(timer_for(Machine(LINEAR)), **SIZES)
    linear = replace(fitted, curves=None)
    # Exact on a linear machine, so old readers lose nothing.
    assert errors_of(linear, LINEAR)[-1] < 1e-6
    # On any other it is wrong by far less than nothing at all would be.
    fitted = measure_step_cost(timer_for(Machine(STREAMING)), **SIZES)
    errors = errors_of(replace(fitted, curves=None), STREAMING)
    assert errors[len(errors) // 2] < 0.5


def test_waiting_for_a_core_is_not_counted() -> None:
    machine = Machine(StepCost(1.0, 0.0, 0.0, 0.0))
    quarters = itertools.count(0.0, 0.25).__next__
    timer = StepTimer(machine, num_pages=256, block_size=16, cpu_s=quarters)
    assert timer.best_s([ProbeStep(starts=(1,))]) == [0.25]


def test_a_clock_that_stands_still_gives_a_finite_cost() -> None:
    fitted = measure_step_cost(timer_for(Machine(StepCost(0.0, 0.0, 0.0, 0.0))), **SIZES)
    shape = StepShape(rows=8, attended=100_000).with_chunk(256, 1000)
    assert 0 <= fitted.step_s(shape) < 1


@pytest.mark.parametrize("seed", range(10))
def test_the_fit_is_the_best_without_negative_coefficients(seed: int) -> None:
    """Against projected gradient descent, a solver that has nothing in common with ours."""
    rng = np.random.default_rng(seed)
    features = rng.uniform(0, 1, (9, 4)) * [1, 1, 10, 100]
    times = features @ rng.normal(0, 1, 4) + rng.uniform(2, 4, 9) + 300
    ours = np.array(nonnegative_fit(features, times))
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
    machine = Machine(LINEAR)
    context = min(max_context, num_pages * block_size)
    timer = timer_for(machine, num_pages=num_pages, block_size=block_size)
    cost = measure_step_cost(timer, max_context_tokens=context, chunk=chunk)
    assert is_still_true(cost, timer, max_context_tokens=context, chunk=chunk)
    assert machine.plans
    for plan in machine.plans:
        for row in plan.rows:
            end = row.start + row.num_tokens
            assert len(row.token_ids) > 0 and end <= context
            assert len(row.pages) == -(-end // block_size)
            assert set(row.pages.tolist()) <= machine.touched <= set(range(num_pages))


def test_a_probe_step_is_what_it_says() -> None:
    machine = Machine(LINEAR)
    step = ProbeStep(starts=(0, 31, 500), chunks=((64, 100), (3, 0)))
    timer_for(machine).best_s([step])
    assert {shape_of(plan) for plan in machine.plans} == {step.shape}
    pages = [page for row in machine.plans[0].rows for page in row.pages.tolist()]
    assert len(pages) == len(set(pages)), "rows share pages although there are enough"


# -- between starts ----------------------------------------------------------------------


KEY = CostKey("digest", "f32", "cpu", 1, "backend", 16, 512, 2048, False)


def known(store: CostStore, machine: Machine, key: CostKey = KEY) -> StepCost:
    return known_step_cost(store, key, timer_for(machine))


@pytest.fixture
def store(tmp_path) -> CostStore:  # type: ignore[no-untyped-def]
    return CostStore(tmp_path)


def test_a_second_start_does_not_measure_again(store: CostStore) -> None:
    first, second = Machine(STREAMING), Machine(STREAMING)
    cost = known(store, first)
    assert known(store, second) == cost
    assert len(second.plans) < len(first.plans) / 5


def test_a_machine_that_became_slower_is_measured_again(store: CostStore) -> None:
    known(store, Machine(LINEAR))
    twice = Machine(StepCost(2e-3, 4e-4, 1e-4, 2e-8))
    cost = known(store, twice)
    assert errors_of(cost, twice.cost)[-1] < 0.05
    assert known(store, Machine(twice.cost)) == cost


def test_a_machine_that_drifted_a_little_is_not(store: CostStore) -> None:
    cost = known(store, Machine(LINEAR))
    assert known(store, Machine(StepCost(1.2e-3, 2.4e-4, 6e-5, 1.2e-8))) == cost


@pytest.mark.parametrize("field", CostKey.__dataclass_fields__)
def test_fits_of_something_else_are_not_used(store: CostStore, field: str) -> None:
    known(store, Machine(LINEAR))
    value = getattr(KEY, field)
    other = replace(KEY, **{field: f"{value}2" if isinstance(value, str) else int(value) + 1})
    assert store.load(KEY) is not None
    assert store.load(other) is None
