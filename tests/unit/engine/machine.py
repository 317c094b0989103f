"""A runner that takes the time a step cost says, with noise; no tensors, no real clock."""

from __future__ import annotations

import itertools
import random

from paceline.domain.cost import StepCost, StepShape
from paceline.engine.probe import StepTimer
from paceline.engine.step import NOTHING, StepPlan, StepResult


class Machine:
    """Says what its steps took; keeps the plans it was given."""

    page_bytes = 64

    def __init__(self, cost: StepCost, noise: float = 0.0, seed: int = 0) -> None:
        self.cost, self._noise, self._rng = cost, noise, random.Random(seed)
        self.plans: list[StepPlan] = []
        self.touched: set[int] = set()

    def run(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        # Noise only ever makes a step longer.
        factor = 1 + self._rng.uniform(0, self._noise)
        elapsed_s = self.cost.step_s(shape_of(plan)) * factor
        return StepResult((NOTHING,) * len(plan.rows), elapsed_s)

    def write_page(self, page: int, data: memoryview) -> None:
        assert len(data) == self.page_bytes
        self.touched.add(page)

    def read_page(self, page: int, out: memoryview) -> None:
        raise NotImplementedError

    def view_page(self, page: int) -> memoryview:
        raise NotImplementedError


def shape_of(plan: StepPlan) -> StepShape:
    """What a plan computes, read off its rows."""
    decoding = [row for row in plan.rows if row.sample is not None]
    shape = StepShape(
        rows=len(decoding),
        tree_nodes=sum(len(row.tree) for row in decoding),
        attended=sum(row.start + 1 for row in decoding),
        tree_attended=sum(len(row.tree) * (row.start + 1) for row in decoding),
    )
    for row in plan.rows:
        if row.sample is None:
            shape = shape.with_chunk(len(row.token_ids), row.start)
    return shape


def timer_for(machine: Machine, *, num_pages: int = 4096, block_size: int = 16) -> StepTimer:
    """A timer whose processor clock leaps ahead, so that what the machine says decides."""
    leaping = itertools.count(0.0, 1e6).__next__
    return StepTimer(machine, num_pages=num_pages, block_size=block_size, cpu_s=leaping)
