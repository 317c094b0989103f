"""Quantiles and shares of histograms."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.autoscaler.sources.histogram import Buckets

INF = math.inf


def test_a_bound_of_a_bucket_is_exact_and_others_are_interpolated() -> None:
    buckets = Buckets.of({0.1: 60, 0.2: 80, 1.0: 90, INF: 100})
    assert buckets.share_within(0.1) == 0.6
    assert buckets.share_within(0.15) == pytest.approx(0.7)
    assert buckets.share_within(0.05) == pytest.approx(0.3)
    assert buckets.share_within(5.0) == 0.9


def test_quantiles_are_those_of_promql() -> None:
    buckets = Buckets.of({0.1: 60, 0.2: 80, 1.0: 90, INF: 100})
    assert buckets.quantile(0.5) == pytest.approx(0.1 * 50 / 60)
    assert buckets.quantile(0.85) == pytest.approx(0.2 + 0.8 * 5 / 10)
    # Beyond the last finite bound PromQL says that bound.
    assert buckets.quantile(0.95) == 1.0


def test_without_observations_nothing_is_known() -> None:
    buckets = Buckets.of({0.1: 0, INF: 0})
    assert buckets.quantile(0.95) is None
    assert buckets.share_within(0.1) is None


@pytest.mark.parametrize(
    "counts",
    [{}, {INF: 1}, {0.1: 1, 0.2: 2}, {0.1: 2, INF: 1}, {0.1: -1, INF: 1}, {0.1: INF, INF: INF}],
)
def test_what_is_no_histogram_is_refused(counts: dict[float, float]) -> None:
    with pytest.raises(ValueError, match="histogram"):
        Buckets.of(counts)


@given(
    st.lists(st.floats(0, 100), min_size=1, max_size=12),
    st.lists(st.floats(0.001, 50), min_size=1, max_size=8, unique=True),
    st.floats(0.01, 0.99),
)
def test_shares_and_quantiles_agree(values: list[float], bounds: list[float], q: float) -> None:
    counts = {b: float(sum(value <= b for value in values)) for b in [*bounds, INF]}
    buckets = Buckets.of(counts)
    for bound in bounds:
        assert buckets.share_within(bound) == pytest.approx(counts[bound] / len(values))
    quantile = buckets.quantile(q)
    assert quantile is not None and 0 <= quantile <= max(bounds)
    if quantile < max(bounds):
        share = buckets.share_within(quantile)
        assert share is not None and share >= q - 1e-6
