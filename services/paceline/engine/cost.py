"""Measures what a step costs on this machine, for every decision made in seconds.

A handful of steps of different shapes is timed on the real runner and a non-negative linear
model is fitted (domain/cost.py states it). worker/engine_process.py runs it once at start,
before requests arrive; pages it scribbles on belong to nobody yet. Workers that start together
share cores for the moment: the time on the CPU tells what a step takes when they do not.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np

from paceline.domain.cost import StepCost
from paceline.domain.request import SamplingParams
from paceline.engine.step import Row, SampleSpec, StepPlan, StepResult

_REPEATS = 3

_LEAST_S = 1e-7
"""What a step takes at least; a clock may say 0."""


class _StepRunner(Protocol):
    def run(self, plan: StepPlan) -> StepResult: ...


def measure_step_cost(
    runner: _StepRunner,
    *,
    num_pages: int,
    block_size: int,
    max_context_tokens: int,
    chunk: int,
    cpu_s: Callable[[], float] = time.process_time,
) -> StepCost:
    """Time decode and prefill shapes and fit them; takes well under a second on a small model.

    `cpu_s` is the processor time of this process, summed over its threads.
    """
    longest = min(max_context_tokens, num_pages * block_size) - 1
    context = max(1, min(longest // 2, 512))
    shapes = [(1, 1, 0), (1, 1, context), (4, 1, context // 4), (8, 1, context // 8)]
    chunks = {min(c, longest - 1) for c in (16, chunk // 2, chunk)}
    shapes += [(1, c, 0) for c in sorted(chunks) if c > 1]
    shapes += [(1, min(chunk, longest - context), context)] if longest > context + 1 else []
    features, times = [], []
    for rows, tokens, start in shapes:
        plan = _plan(rows, tokens, start, num_pages, block_size)
        runner.run(plan)
        times.append(min(_undisturbed_s(runner, plan, cpu_s) for _ in range(_REPEATS)))
        attended = rows * (tokens * start + tokens * (tokens + 1) // 2)
        features.append([1.0, rows, rows * tokens, attended])
    base, row, token, attended_s = _fit(np.array(features), np.array(times))
    return StepCost(base_s=base, row_s=row, token_s=token, context_s=attended_s)


def _undisturbed_s(runner: _StepRunner, plan: StepPlan, cpu_s: Callable[[], float]) -> float:
    """Time one step; the smaller of wall and processor time leaves out waiting for a core."""
    started_s = cpu_s()
    elapsed_s = runner.run(plan).elapsed_s
    return min(elapsed_s, cpu_s() - started_s)


def _fit(features: np.ndarray, times: np.ndarray) -> list[float]:
    """Non-negative least squares on relative errors: the best of all sets of active features.

    With four features that is 15 small systems, exact and without an iteration to go astray.
    """
    times = np.maximum(times, _LEAST_S)
    weighted = features / times[:, None]
    num_features = features.shape[1]
    best, best_error = np.zeros(num_features), np.inf
    for size in range(1, num_features + 1):
        for active in map(list, itertools.combinations(range(num_features), size)):
            # Columns differ by orders of magnitude: without scaling small ones are rank noise.
            scales = np.maximum(np.abs(weighted[:, active]).max(axis=0), np.finfo(float).tiny)
            solution, *_ = np.linalg.lstsq(
                weighted[:, active] / scales, np.ones(len(times)), rcond=None
            )
            error = float(np.square(weighted[:, active] / scales @ solution - 1.0).sum())
            if (solution >= 0).all() and error < best_error:
                best, best_error = np.zeros(num_features), error
                best[active] = solution / scales
    return [float(value) for value in best]


def _plan(rows: int, tokens: int, start: int, num_pages: int, block_size: int) -> StepPlan:
    per_row = -(-(start + tokens) // block_size)
    spec = SampleSpec(SamplingParams(temperature=0.0), stream=0, position=1, num_logprobs=0)
    return StepPlan(
        tuple(
            Row(
                sequence_id=r,
                token_ids=(0,) * tokens,
                start=start,
                pages=tuple((r * per_row + b) % num_pages for b in range(per_row)),
                sample=spec,
            )
            for r in range(rows)
        )
    )
