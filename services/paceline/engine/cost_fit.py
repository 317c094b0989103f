"""Fits the step cost to timed steps: non-negative least squares on relative errors.

Every part of domain/cost.py's model is a sum of unknown times known numbers: a curve is a sum
of ramps, one per segment, so that a slope that may not be negative makes it rise.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from paceline.domain.cost import Curve, StepCost, StepCurves, StepShape

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

_LEAST_S = 1e-7
"""What a step takes at least; a clock may say 0."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Where the curves may bend."""

    tokens: tuple[int, ...]
    rows: tuple[int, ...]
    """From 0, where the curve is 0; so for contexts."""
    contexts: tuple[int, ...]
    nodes: tuple[int, ...] = (0,)


def fit_step_cost(shapes: list[StepShape], seconds: list[float], grid: Grid) -> StepCost:
    """Return the curves over a grid, with the best linear form beside them."""
    times = np.maximum(np.array(seconds), _LEAST_S)
    linear = nonnegative_fit(np.array([_linear_features(s) for s in shapes]), times)
    base_s, row_s, token_s, context_s = linear
    x = nonnegative_fit(np.array([_features(s, grid) for s in shapes]), times)
    curved = (grid.tokens, grid.rows, grid.contexts, grid.nodes)
    ends = np.cumsum([1, *(len(counts) - 1 for counts in curved)])
    first, tokens, rows, contexts, nodes, rest = np.split(np.array(x), ends)
    prefill_row_s, prefill_read_s, prefill_context_s, node_context_s = map(float, rest)
    curves = StepCurves(
        tokens=_curve(grid.tokens, float(first[0]), tokens),
        rows=_curve(grid.rows, 0.0, rows),
        contexts=_curve(grid.contexts, 0.0, contexts),
        prefill_row_s=prefill_row_s,
        prefill_read_s=prefill_read_s,
        prefill_context_s=prefill_context_s,
        nodes=_curve(grid.nodes, 0.0, nodes),
        node_context_s=node_context_s,
    )
    return StepCost(base_s, row_s, token_s, context_s, curves)


def nonnegative_fit(features: Floats, times: Floats) -> list[float]:
    """Return x >= 0 that minimises the squares of `features @ x / times - 1`.

    Active sets after Lawson and Hanson 1974, chapter 23: exact, and it ends.
    """
    weighted = features / times[:, None]
    # Columns differ by orders of magnitude: without scaling small ones are rank noise.
    scales = np.maximum(np.linalg.norm(weighted, axis=0), np.finfo(float).tiny)
    matrix, target = weighted / scales, np.ones(len(times))
    x, is_free = np.zeros(matrix.shape[1]), np.zeros(matrix.shape[1], dtype=bool)
    for _ in range(10 * len(x)):
        gradient = np.where(is_free, -np.inf, matrix.T @ (target - matrix @ x))
        if gradient.max() <= 1e-10 * len(times):
            break
        is_free[gradient.argmax()] = True
        x, is_free = _step_inside(matrix, target, x, is_free)
    return [float(value) for value in x / scales]


def _step_inside(matrix: Floats, target: Floats, x: Floats, is_free: Bools) -> tuple[Floats, Bools]:
    """Go to the best point of the free coordinates; those that would pass 0 are bound there."""
    while True:
        aim = np.zeros_like(x)
        aim[is_free] = np.linalg.lstsq(matrix[:, is_free], target, rcond=None)[0]
        blocking = is_free & (aim <= 0)
        if not blocking.any():
            return aim, is_free
        distances = np.maximum(x[blocking] - aim[blocking], np.finfo(float).tiny)
        x = x + (x[blocking] / distances).min() * (aim - x)
        is_free = is_free & (x > 1e-14)
        x = np.where(is_free, x, 0.0)


def _linear_features(shape: StepShape) -> list[float]:
    return [
        1.0,
        shape.rows + shape.prefill_rows,
        shape.num_tokens,
        shape.attended + shape.tree_attended + shape.prefill_attended,
    ]


def _features(shape: StepShape, grid: Grid) -> list[float]:
    return [
        1.0,
        *_ramps(grid.tokens, shape.num_tokens),
        *_ramps(grid.rows, shape.rows),
        *_ramps(grid.contexts, shape.attended),
        *_ramps(grid.nodes, shape.tree_nodes),
        shape.prefill_rows,
        shape.prefill_context,
        shape.prefill_attended,
        shape.tree_attended,
    ]


def _ramps(counts: tuple[int, ...], count: int) -> list[float]:
    """Return how far each segment is passed; the last one goes on for ever."""
    segments = list(pairwise(counts))
    lengths: list[float] = [min(max(count - a, 0), b - a) for a, b in segments]
    if segments:
        lengths[-1] = max(count - segments[-1][0], 0)
    return lengths


def _curve(counts: tuple[int, ...], first_s: float, slopes: Floats) -> Curve:
    seconds = [first_s]
    for (a, b), slope in zip(pairwise(counts), slopes, strict=True):
        seconds.append(seconds[-1] + float(slope) * (b - a))
    return Curve(counts, tuple(seconds))
