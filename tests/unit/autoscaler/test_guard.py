"""What is not carried out, whatever a policy decides."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.autoscaler.guard import checked
from paceline.autoscaler.values import KINDS, POOLS, Decision
from paceline.domain.member import Role
from tests.unit.autoscaler.made import decided, observed, pool

PROBLEM = ("prometheus-timeout: no answer",)


def test_a_decision_on_full_knowledge_is_carried_out() -> None:
    decision = decided(0, 7)
    assert checked(observed(), decision) is decision


def test_nothing_shrinks_or_grows_while_data_is_missing() -> None:
    for decision in (decided(1, 0, kind="shrink"), decided(1, 2)):
        out = checked(observed(problems=PROBLEM), decision)
        assert (out.kind, out.replicas) == ("hold", {Role.PREFILL: 1, Role.DECODE: 1})
        assert out.reason == PROBLEM[0]


def test_a_policy_that_does_not_look_at_problems_holds_all_the_same() -> None:
    out = checked(observed(problems=PROBLEM), decided(1, 1, kind="steady"))
    assert (out.kind, out.reason) == ("hold", PROBLEM[0])
    own = decided(1, 1, kind="hold")
    assert checked(observed(problems=PROBLEM), own) is own


def test_parked_requests_wake_pools_also_while_data_is_missing() -> None:
    wake = decided(1, 1, kind="wake")
    asleep = observed(0, 0, parked=3, problems=PROBLEM)
    assert checked(asleep, wake) is wake
    # Nobody waits, or somebody is there: then it can wait for the data, too.
    assert checked(observed(0, 0, problems=PROBLEM), wake).kind == "hold"
    assert checked(observed(0, 1, parked=3, problems=PROBLEM), decided(1, 2)).kind == "hold"


@pytest.mark.parametrize("reason", ["target-owned", "target-changed"])
def test_pools_of_others_are_left_alone_even_then(reason: str) -> None:
    asleep = observed(0, 0, parked=3, problems=(f"{reason}: by somebody",))
    out = checked(asleep, decided(1, 1, kind="wake"))
    assert out.replicas == {Role.PREFILL: 0, Role.DECODE: 0}


@pytest.mark.parametrize(
    "broken",
    [
        decided(-1, 1),
        decided(1, 1, kind="guess"),
        Decision(0.0, {Role.DECODE: 1}, "half", "grow"),
        Decision(0.0, {Role.PREFILL: 1.5, Role.DECODE: True}, "odd", "grow"),  # type: ignore[dict-item]
    ],
)
def test_nonsense_is_not_carried_out(broken: Decision) -> None:
    out = checked(observed(2, 3), broken)
    assert out.replicas == {Role.PREFILL: 2, Role.DECODE: 3}
    assert out.kind == "hold" and "nonsense" in out.reason


@given(
    sizes=st.tuples(*[st.integers(0, 5)] * 2),
    wanted=st.tuples(*[st.integers(0, 5)] * 2),
    ready=st.tuples(*[st.integers(0, 5)] * 2),
    parked=st.integers(0, 2),
    kind=st.sampled_from(KINDS),
)
def test_while_anything_is_missing_no_pool_ever_shrinks(
    sizes: tuple[int, int],
    wanted: tuple[int, int],
    ready: tuple[int, int],
    parked: int,
    kind: str,
) -> None:
    pools = [pool(size, there) for size, there in zip(sizes, ready, strict=True)]
    seen = dataclasses.replace(
        observed(parked=parked, problems=PROBLEM), pools=dict(zip(POOLS, pools, strict=True))
    )
    out = checked(seen, decided(*wanted, kind=kind))
    for role in POOLS:
        grown = out.replicas[role] - seen.pools[role].requested
        assert grown >= 0
        assert grown == 0 or (parked > 0 and seen.pools[role].ready == 0)
