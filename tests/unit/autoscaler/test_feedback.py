"""Model errors are learned from what was missed, within bounds, and forgotten."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.autoscaler.feedback import HALF_LIFE_S, MOST, Correction
from paceline.autoscaler.values import Pool
from paceline.domain.member import Role
from tests.unit.autoscaler.observations import pool, workers

SETTLED = pool(Role.PREFILL, 2)


def feed(
    correction: Correction,
    within: float | None,
    *,
    seconds: int = 300,
    start_s: float = 0.0,
    seen: Pool = SETTLED,
    is_queued: bool = True,
) -> float:
    for i in range(0, seconds, 5):
        correction.note(start_s + i, seen, within, 0.01, 5.0, 30.0, is_queued=is_queued)
    return correction.factor


def test_misses_raise_the_factor() -> None:
    assert feed(Correction(), 0.9) > 1.3


@pytest.mark.parametrize("within", [0.99, 1.0, None, float("nan"), -1.0, 2.0])
def test_what_is_allowed_or_unknown_does_not(within: float | None) -> None:
    assert feed(Correction(), within) == pytest.approx(1.0)


def test_the_factor_is_bounded() -> None:
    assert feed(Correction(), 0.0, seconds=3600) == pytest.approx(MOST)


def test_the_factor_decays() -> None:
    correction = Correction()
    high = feed(correction, 0.9)
    correction.note(300 + HALF_LIFE_S, SETTLED, 1.0, 0.01, 5.0, 30.0, is_queued=True)
    assert correction.factor < high**0.51


@pytest.mark.parametrize(
    "seen",
    [
        replace(SETTLED, workers=workers(Role.PREFILL, 2, age_s=29.0)),
        replace(SETTLED, requested=3),
        replace(SETTLED, workers=()),
    ],
    ids=["cold", "starting", "empty"],
)
def test_pools_in_change_teach_nothing(seen: Pool) -> None:
    assert feed(Correction(), 0.0, seen=seen) == 1.0


def test_late_without_a_queue_is_late_at_any_size() -> None:
    assert feed(Correction(), 0.5, is_queued=False) == 1.0


def test_single_requests_are_no_share_of_anything() -> None:
    correction = Correction()
    correction.note(0.0, SETTLED, 0.0, 0.01, 0.01, 30.0, is_queued=True)
    correction.note(5.0, SETTLED, 0.0, 0.01, 0.01, 30.0, is_queued=True)
    assert correction.factor < 1.02


@given(
    samples=st.lists(
        st.tuples(
            st.floats(0.0, 1000.0),
            st.one_of(st.none(), st.floats()),
            st.floats(0.0, 1e4),
            st.booleans(),
        ),
        max_size=50,
    )
)
def test_the_factor_is_always_within_its_bounds(
    samples: list[tuple[float, float | None, float, bool]],
) -> None:
    correction, at_s = Correction(), 0.0
    for passed_s, within, rate, is_queued in samples:
        at_s += passed_s
        correction.note(at_s, SETTLED, within, 0.01, rate, 30.0, is_queued=is_queued)
        assert 1.0 <= correction.factor <= MOST * (1 + 1e-9)
