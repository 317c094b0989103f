"""Bounds, budget and the kind of a decision."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.autoscaler.outcome import decide, kind_of, within_rules
from paceline.autoscaler.policies.rules import Bounds, ScalingRules
from paceline.autoscaler.values import POOLS
from paceline.domain.member import Role
from tests.unit.autoscaler.observations import rules, seen

P, D = Role.PREFILL, Role.DECODE


@pytest.mark.parametrize(
    ("now", "wanted", "kind"),
    [
        ((1, 1), (1, 1), "steady"),
        ((1, 1), (2, 1), "grow"),
        ((2, 1), (1, 2), "grow"),
        ((2, 2), (1, 2), "shrink"),
        ((0, 0), (1, 1), "wake"),
        ((0, 0), (0, 1), "wake"),
        ((2, 1), (0, 0), "sleep"),
        ((0, 0), (0, 0), "steady"),
    ],
)
def test_kinds(now: tuple[int, int], wanted: tuple[int, int], kind: str) -> None:
    assert kind_of({P: now[0], D: now[1]}, {P: wanted[0], D: wanted[1]}) == kind


@pytest.mark.parametrize(
    ("wanted", "budget", "expected"),
    [
        ((3, 5), None, (3, 5)),
        ((3, 5), 8, (3, 5)),
        ((8, 4), 6, (4, 2)),
        ((1, 20), 6, (1, 5)),
        ((20, 20), 2, (1, 1)),
        ((0, 99), None, (1, 20)),
    ],
)
def test_the_budget_is_rationed_by_need(
    wanted: tuple[int, int], budget: int | None, expected: tuple[int, int]
) -> None:
    sizes = within_rules(rules(budget_replicas=budget), {P: wanted[0], D: wanted[1]})
    assert (sizes[P], sizes[D]) == expected


@given(
    prefill=st.integers(0, 100),
    decode=st.integers(0, 100),
    least=st.integers(0, 3),
    most=st.integers(3, 30),
    extra=st.integers(0, 40),
)
def test_sizes_are_always_allowed(
    prefill: int, decode: int, least: int, most: int, extra: int
) -> None:
    given_rules = rules(least, most, budget_replicas=2 * least + extra)
    sizes = within_rules(given_rules, {P: prefill, D: decode})
    assert all(least <= sizes[role] <= most for role in POOLS)
    assert sum(sizes.values()) <= 2 * least + extra


def test_a_shrinking_pool_names_victims_and_the_reason_is_one_line() -> None:
    decision = decide(seen(3.0, (3, 2)), {P: 1, D: 2}, "one\n two", {})
    assert decision.victims == {P: ("prefill-0", "prefill-1")}
    assert (decision.kind, decision.reason, decision.at_s) == ("shrink", "one two", 3.0)


@pytest.mark.parametrize(
    "values",
    [
        {"ttft_s": 0.0},
        {"itl_s": float("nan")},
        {"goal_ratio": 1.0},
        {"start_up_s": -1.0},
        {"budget_replicas": 1},
    ],
)
def test_rules_that_make_no_sense_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(values)).split("_")[0]):
        ScalingRules(**values)  # type: ignore[arg-type]


def test_bounds_that_cross_are_refused() -> None:
    with pytest.raises(ValueError, match="least"):
        Bounds(3, 2)
