"""Bounds that hold at every moment: by enumeration, by simulation, and against plain formulas."""

from __future__ import annotations

import copy
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.trainer.confidence import RunningMean, boundary


def crossing_probability(
    outcomes: dict[float, float], alpha: float, length: int
) -> tuple[float, float]:
    """Return with which probability the lower and the upper bound ever exclude the mean."""
    truth = sum(value * p for value, p in outcomes.items())
    crossed = [0.0, 0.0]

    def walk(mean: RunningMean, p: float, left: int, is_low: bool, is_high: bool) -> None:
        bounds = mean.bounds(alpha)
        is_low = is_low or bounds.low > truth + 1e-9
        is_high = is_high or bounds.high < truth - 1e-9
        if left == 0 or (is_low and is_high):
            crossed[0] += p * is_low
            crossed[1] += p * is_high
            return
        for value, chance in outcomes.items():
            after = copy.deepcopy(mean)
            after.note(value, 1.0)
            walk(after, p * chance, left - 1, is_low, is_high)

    walk(RunningMean(), 1.0, length, False, False)
    return crossed[0], crossed[1]


@pytest.mark.parametrize(
    ("outcomes", "side"),
    [
        ({1.0: 0.3, -1.0: 0.7}, 0),
        ({1.0: 0.35, -1.0: 0.65}, 0),
        ({1.0: 0.7, -1.0: 0.3}, 1),
        ({1.0: 0.35, 0.0: 0.15, -1.0: 0.5}, 0),
    ],
)
def test_a_bound_ever_fails_with_probability_alpha_at_most(
    outcomes: dict[float, float], side: int
) -> None:
    alpha = 0.4
    crossed = crossing_probability(outcomes, alpha, 10 if len(outcomes) == 2 else 7)
    assert max(crossed) <= alpha
    # It can fail: the enumeration reaches moments at which the bound is wrong.
    assert crossed[side] > 0


def test_bounds_hold_over_long_runs_of_skewed_differences_and_weights() -> None:
    alpha, num_runs, num_failed = 0.1, 200, 0
    random_ = np.random.default_rng(3)
    for _ in range(num_runs):
        mean = RunningMean()
        truth = expected = weight = 0.0
        is_failed = False
        for step in range(1, 401):
            # Each expects something else: what is bounded is their weighted mean.
            level = 0.2 * math.sin(step / 40)
            w = float(random_.uniform(0.05, 1.0))
            spike = random_.random() < 0.05
            value = -1.0 if spike else (level + 0.05) / 0.95
            mean.note(value, w)
            truth += w * level
            weight += w
            expected = truth / weight
            if step % 10 == 0:
                bounds = mean.bounds(alpha)
                is_failed |= not bounds.low <= expected <= bounds.high
        num_failed += is_failed
    # Both bounds together fail with 2 alpha at most; four standard errors above are impossible.
    assert num_failed <= num_runs * 2 * alpha + 4 * math.sqrt(num_runs * 0.2 * 0.8)


@given(variance=st.floats(0, 1e5), alpha=st.floats(1e-4, 0.5))
def test_the_boundary_is_where_the_mixture_reaches_its_level(variance: float, alpha: float) -> None:
    rates = 0.95 * 0.6 ** np.arange(8)
    shares = 0.7 ** np.arange(8)
    shares /= shares.sum()
    psi = -np.log1p(-rates) - rates

    def log_mixture(s: float) -> float:
        exponents = rates * s - psi * variance
        return float(np.logaddexp.reduce(exponents + np.log(shares)))

    s = boundary(variance, alpha)
    assert log_mixture(s) == pytest.approx(-math.log(alpha), abs=1e-5)


def test_the_order_among_groups_does_not_matter() -> None:
    notes = [(random.Random(i).uniform(-1, 1), 0.5, i % 3) for i in range(60)]
    one, other = RunningMean(), RunningMean()
    for note in notes:
        one.note(*note)
    for note in sorted(notes, key=lambda note: note[2]):
        other.note(*note)
    assert one.bounds(0.05).low == pytest.approx(other.bounds(0.05).low)


def test_bounds_close_in_on_the_mean_as_quickly_as_they_should() -> None:
    random_ = random.Random(1)
    mean, values = RunningMean(), []
    for _ in range(4000):
        values.append(random_.gauss(0.05, 0.15))
        mean.note(max(-1.0, min(1.0, values[-1])), 1.0)
    bounds = mean.bounds(0.05)
    # A bound for one look only, at known variance, is 1.64 standard errors away.
    plain = 1.645 * 0.15 / math.sqrt(len(values))
    assert plain < bounds.mean - bounds.low < 2.5 * plain
    assert bounds.mean == pytest.approx(sum(values) / len(values), abs=1e-6)


@pytest.mark.parametrize("note", [(1.1, 1.0), (float("nan"), 1.0), (0.0, 0.0), (0.0, 1.5)])
def test_what_is_out_of_range_is_refused(note: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="difference"):
        RunningMean().note(*note)
