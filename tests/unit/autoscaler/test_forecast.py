"""Forecasters against the last value, on series made here."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Protocol

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.autoscaler.demand import QUANTILE, Demand
from paceline.autoscaler.forecast import (
    RecentQuantileForecaster,
    RegressionForecaster,
    weighted_quantile,
)


class Forecaster(Protocol):
    """Learns one series, sampled in order of time; gaps may be of any length."""

    def observe(self, at_s: float, value: float, weight: float = 1.0) -> None:
        """Take a value, finite and not negative; `weight` says how many requests met it."""
        ...

    def predict(self, horizon_s: float, quantile: float) -> float:
        """Return what the value at that horizon does not exceed with that probability.

        Never negative, never NaN; 0 as long as nothing was seen.
        """
        ...


class LastValueForecaster:
    """The last value, whatever is asked: what others are measured against."""

    def __init__(self) -> None:
        self._value = 0.0

    def observe(self, at_s: float, value: float, weight: float = 1.0) -> None:
        """Take a value."""
        self._value = value

    def predict(self, horizon_s: float, quantile: float) -> float:
        """Return the last value."""
        return self._value


PERIOD_S = 5.0
FORECASTERS: dict[str, Callable[[], Forecaster]] = {
    "last": LastValueForecaster,
    "recent": RecentQuantileForecaster,
    "regression": RegressionForecaster,
}


def bursty() -> list[float]:
    """On for 10 to 20 s, off for 20 to 90 s."""
    draw, out = random.Random(1), []
    while len(out) < 700:
        out += [draw.uniform(1.0, 5.0)] * draw.randint(2, 4)
        out += [0.0] * draw.randint(4, 18)
    return out


def noisy() -> list[float]:
    draw = random.Random(2)
    return [max(0.0, draw.gauss(5.0, 1.0)) for _ in range(700)]


def seasonal() -> list[float]:
    """A wave of an hour under noise of half its height."""
    draw = random.Random(3)
    return [
        max(0.0, 5.0 + 2.0 * math.sin(2 * math.pi * i * PERIOD_S / 3600) + draw.gauss(0.0, 1.0))
        for i in range(700)
    ]


def errors(forecaster: Forecaster, series: list[float], horizon_s: float) -> tuple[float, float]:
    """Mean absolute error of the median, and pinball loss at 0.9."""
    ahead = int(horizon_s / PERIOD_S)
    absolute, pinball = [], []
    for i in range(len(series) - ahead):
        forecaster.observe(i * PERIOD_S, series[i])
        if i < 60:
            continue
        value = series[i + ahead]
        absolute.append(abs(value - forecaster.predict(horizon_s, 0.5)))
        over = value - forecaster.predict(horizon_s, 0.9)
        pinball.append(max(0.9 * over, -0.1 * over))
    return sum(absolute) / len(absolute), sum(pinball) / len(pinball)


@pytest.mark.parametrize("horizon_s", [10.0, 60.0, 180.0])
@pytest.mark.parametrize("series", [bursty, noisy, seasonal])
def test_regression_beats_the_last_value(
    series: Callable[[], list[float]], horizon_s: float
) -> None:
    last = errors(LastValueForecaster(), series(), horizon_s)
    own = errors(RegressionForecaster(), series(), horizon_s)
    assert own[0] < last[0]
    assert own[1] < 0.8 * last[1]


@pytest.mark.parametrize("series", [bursty, noisy])
def test_the_nth_quantile_covers_its_share(series: Callable[[], list[float]]) -> None:
    forecaster, values = RegressionForecaster(), series()
    covered = []
    for i, value in enumerate(values[:-12]):
        forecaster.observe(i * PERIOD_S, value)
        if i > 60:
            covered.append(values[i + 12] <= forecaster.predict(60.0, 0.9) + 1e-9)
    assert 0.85 < sum(covered) / len(covered) < 0.95


def test_a_ramp_is_followed_upwards() -> None:
    forecaster = RegressionForecaster()
    for i in range(120):
        forecaster.observe(i * PERIOD_S, 0.1 * i)
    assert forecaster.predict(60.0, 0.5) == pytest.approx(0.1 * (119 + 12), rel=0.02)


@pytest.mark.parametrize("name", sorted(FORECASTERS))
def test_a_constant_stays_what_it_is(name: str) -> None:
    forecaster = FORECASTERS[name]()
    for i in range(100):
        forecaster.observe(i * PERIOD_S, 3.0)
    assert forecaster.predict(60.0, 0.9) == pytest.approx(3.0)


@pytest.mark.parametrize("name", sorted(FORECASTERS))
def test_nothing_seen_is_nothing_expected(name: str) -> None:
    assert FORECASTERS[name]().predict(60.0, 0.9) == 0.0


@pytest.mark.parametrize("name", sorted(FORECASTERS))
@given(
    values=st.lists(
        st.tuples(st.floats(0.0, 600.0), st.floats(0.0, 1e9), st.floats(0.0, 1e6)), max_size=60
    ),
    horizon_s=st.floats(0.0, 3600.0),
    quantile=st.floats(0.01, 0.99),
)
def test_forecasts_are_numbers(
    name: str, values: list[tuple[float, float, float]], horizon_s: float, quantile: float
) -> None:
    forecaster, at_s = FORECASTERS[name](), 0.0
    for passed_s, value, weight in values:
        at_s += passed_s
        forecaster.observe(at_s, value, weight)
    predicted = forecaster.predict(horizon_s, quantile)
    assert math.isfinite(predicted) and predicted >= 0.0


def test_recent_values_count_by_requests_and_are_forgotten() -> None:
    forecaster = RecentQuantileForecaster(keep_s=100.0)
    forecaster.observe(0.0, 10.0, weight=50.0)
    forecaster.observe(50.0, 1.0, weight=50.0)
    assert forecaster.predict(0.0, 0.4) == 1.0
    assert forecaster.predict(0.0, 0.9) == 10.0
    forecaster.observe(101.0, 0.0, weight=0.0)
    assert forecaster.predict(0.0, 0.9) == 1.0


@pytest.mark.parametrize(
    ("pairs", "quantile", "expected"),
    [
        ([], 0.9, 0.0),
        ([(5.0, 0.0)], 0.9, 0.0),
        ([(math.nan, 1.0), (2.0, 1.0)], 0.9, 2.0),
        ([(1.0, 9.0), (2.0, 1.0)], 0.9, 1.0),
        ([(1.0, 8.0), (2.0, 2.0)], 0.9, 2.0),
    ],
)
def test_weighted_quantile(
    pairs: list[tuple[float, float]], quantile: float, expected: float
) -> None:
    assert weighted_quantile(pairs, quantile) == expected


def test_demand_is_that_of_bursts_not_of_the_mean() -> None:
    demand = Demand()
    for i in range(180):
        load = 4.0 if i % 10 == 0 else 0.0
        demand.note(i * PERIOD_S, load, load)
    assert demand.expected(60.0) == pytest.approx(4.0)
    assert QUANTILE == 0.9 and demand.burst_ratio == 2.25


def test_a_steady_demand_has_no_bursts() -> None:
    demand = Demand()
    for i in range(100):
        demand.note(i * PERIOD_S, 2.0, 3.0)
    assert demand.burst_ratio == pytest.approx(1.0)
