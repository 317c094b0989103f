"""The default policy: sizes by target, to zero and back, limits, holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.autoscaler.policies.rules import Bounds, ScalingRules
from paceline.autoscaler.policies.slo import SloPolicy
from paceline.autoscaler.stabilise import DOWN_S, UP_PAUSE_S
from paceline.autoscaler.values import POOLS, Decision, Observation, Pool, Traffic
from paceline.domain.member import Role
from tests.unit.autoscaler.observations import REPLICA, rules, seen, traffic

P, D = Role.PREFILL, Role.DECODE


def follow(
    policy: SloPolicy,
    loads: list[Traffic],
    sizes: tuple[int, int] = (1, 1),
    *,
    start_s: float = 0.0,
    parked: int = 0,
) -> list[Decision]:
    """Play loads 5 s apart against pools that do at once what is decided."""
    decisions = []
    for i, load in enumerate(loads):
        observation = seen(start_s + 5.0 * i, sizes, load=load, parked=parked)
        decision = policy.decide(observation)
        sizes = (decision.replicas[P], decision.replicas[D])
        decisions.append(decision)
    return decisions


def last_sizes(policy: SloPolicy, load: Traffic, num: int = 80) -> tuple[int, int]:
    decision = follow(policy, [load] * num)[-1]
    return decision.replicas[P], decision.replicas[D]


def test_long_prompts_grow_prefill_long_answers_grow_decode() -> None:
    base = last_sizes(SloPolicy(rules()), traffic(3.0))
    prompts = last_sizes(
        SloPolicy(rules()), traffic(3.0, prompt_tokens=8000, prompt_tokens_p95=9000)
    )
    answers = last_sizes(SloPolicy(rules()), traffic(3.0, output_tokens=2000))
    assert prompts[0] > base[0]
    assert answers[1] > base[1] and answers[0] <= base[0]


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"cached_ratio": 0.8}, {"cached_ratio": 0.0}),
        (
            {"emitted_per_step": 3.0, "nodes_per_step": 3.0, "output_tokens": 1500.0},
            {"output_tokens": 1500.0},
        ),
    ],
)
def test_hits_and_acceptance_save_replicas(less: dict[str, float], more: dict[str, float]) -> None:
    saving, spending = (
        sum(last_sizes(SloPolicy(rules(itl_s=0.03)), traffic(8.0, **values)))
        for values in (less, more)
    )
    assert saving < spending


def test_a_burst_is_answered_at_once_and_remembered() -> None:
    quiet, burst = traffic(0.2), traffic(40.0)
    policy = SloPolicy(rules())
    sizes = [d.replicas[P] for d in follow(policy, [quiet] * 20 + [burst] * 6 + [quiet] * 100)]
    assert sizes[20] > sizes[19]
    assert sizes[-1] >= sizes[19] + 2


def test_what_is_no_longer_needed_goes_in_the_end() -> None:
    policy = SloPolicy(rules())
    decisions = follow(policy, [traffic(40.0)] * 60 + [traffic(0.2)] * 600)
    assert decisions[59].replicas[P] > 4
    assert dict(decisions[-1].replicas) == {P: 1, D: 1}


def test_every_number_is_in_the_inputs_and_some_in_the_reason() -> None:
    decision = follow(SloPolicy(rules()), [traffic(20.0, output_tokens=500)])[-1]
    expected = {
        "requests_per_s",
        "decode_required",
        "prefill_required",
        "cached_ratio",
        "emitted_per_step",
        "prefill_correction",
        "decode_correction",
        "prompt_load_expected",
    }
    assert expected <= set(decision.inputs)
    assert decision.kind == "grow"
    assert "rows keep ITL at" in decision.reason and "s of prompts per s" in decision.reason


def test_targets_out_of_reach_are_sized_for_and_said() -> None:
    policy = SloPolicy(rules(ttft_s=0.05, itl_s=0.001))
    decision = follow(policy, [traffic(2.0)] * 5)[-1]
    assert decision.reason.count("out of reach") == 2
    assert all(1 <= size <= 20 for size in decision.replicas.values())


def test_a_bound_that_allows_less_is_named() -> None:
    decision = follow(SloPolicy(rules(1, 2)), [traffic(60.0)] * 3)[-1]
    assert decision.kind == "limited" and "limited" in decision.reason
    assert max(decision.replicas.values()) == 2


def test_the_budget_is_kept() -> None:
    load = traffic(60.0, output_tokens=1000)
    for decision in follow(SloPolicy(rules(budget_replicas=5)), [load] * 10):
        assert sum(decision.replicas.values()) <= 5


def test_without_prefill_workers_decode_gets_the_prompts() -> None:
    only = ScalingRules(bounds={P: Bounds(0, 0), D: Bounds(1, 20)})
    load = traffic(20.0, prompt_tokens=4000, prompt_tokens_p95=6000, output_tokens=1)
    decision = follow(SloPolicy(only), [load] * 3, (0, 1))[-1]
    assert decision.replicas[P] == 0 and decision.replicas[D] > 3


def test_idle_pools_go_to_zero_together_and_come_back_together() -> None:
    policy = SloPolicy(rules(idle_s=300.0))
    busy = follow(policy, [traffic(40.0)] * 20)
    before = dict(busy[-1].replicas)
    assert before[P] > 1
    sizes, asleep = (before[P], before[D]), None
    for i in range(200):
        observation = seen(100.0 + 5 * i, sizes, load=traffic(0.0))
        decision = policy.decide(observation)
        sizes = (decision.replicas[P], decision.replicas[D])
        if decision.kind == "sleep":
            asleep = observation.at_s
            break
        assert min(sizes) >= 1
    assert sizes == (0, 0) and asleep == 95.0 + 300.0
    wake = policy.decide(seen(asleep + 5, (0, 0), load=traffic(0.0), parked=2))
    assert wake.kind == "wake" and dict(wake.replicas) == before
    assert "2 requests are parked" in wake.reason


def test_a_sleeping_pair_stays_asleep_without_traffic() -> None:
    policy = SloPolicy(rules(idle_s=60.0))
    kinds = {d.kind for d in follow(policy, [traffic(0.0)] * 400, (0, 0))[13:]}
    assert kinds == {"steady"}


def test_parked_requests_keep_pools_awake() -> None:
    policy = SloPolicy(rules(idle_s=60.0))
    decisions = follow(policy, [traffic(0.0)] * 100, parked=1)
    assert all(min(decision.replicas.values()) >= 1 for decision in decisions)


def test_parked_requests_wake_even_while_data_is_missing() -> None:
    policy = SloPolicy(rules(idle_s=60.0))
    dark = replace(seen(0.0, (0, 0), parked=1, problems=("prometheus-missing: x",)), traffic=None)
    assert policy.decide(dark).kind == "wake"
    assert policy.decide(replace(dark, parked=0)).kind == "hold"


def test_it_holds_until_a_worker_says_what_it_can_do() -> None:
    observation = Observation(0.0, {role: Pool(1) for role in POOLS}, traffic())
    decision = SloPolicy(rules()).decide(observation)
    assert decision.kind == "hold" and "no worker has said" in decision.reason


def test_prompts_that_wait_are_caught_up_with() -> None:
    calm = seen(0.0, (2, 2), load=traffic(1.0))
    workers = tuple(replace(w, pending_prefill_tokens=400_000) for w in calm.pools[P].workers)
    behind = replace(calm, pools=dict(calm.pools) | {P: replace(calm.pools[P], workers=workers)})
    assert SloPolicy(rules()).decide(calm).replicas[P] <= 2
    decision = SloPolicy(rules()).decide(behind)
    assert decision.replicas[P] > 2 and "s of work waits" in decision.reason


def test_a_pool_that_was_never_seen_is_taken_to_be_like_the_other() -> None:
    observation = seen(0.0, (0, 1), load=traffic(30.0))
    unknown = Pool(0, (), None)
    observation = replace(observation, pools={P: unknown, D: observation.pools[D]})
    assert observation.pools[D].replica is REPLICA
    assert SloPolicy(rules()).decide(observation).replicas[P] >= 1


missing = st.just(("prometheus-missing: nothing",))
rates = st.one_of(
    st.floats(0.0, 80.0), st.sampled_from([0.0, 0.0, 40.0, float("nan"), float("inf"), None])
)


@settings(max_examples=8, deadline=None)
@given(
    signal=st.lists(rates, min_size=1, max_size=40),
    stretch=st.integers(1, 12),
)
def test_changes_of_an_hour_are_bounded_whatever_the_signal(
    signal: list[float | None], stretch: int
) -> None:
    policy, sizes = SloPolicy(rules(1, 40)), (1, 1)
    changes: dict[Role, list[int]] = {role: [] for role in POOLS}
    for i in range(360):
        rate = signal[(i // stretch) % len(signal)]
        problems = ("prometheus-missing: nothing",) if rate is None else ()
        observation = seen(10.0 * i, sizes, load=traffic(rate or 0.0), problems=problems)
        decision = policy.decide(observation)
        for role, size in zip(POOLS, sizes, strict=True):
            if decision.replicas[role] != size:
                changes[role].append(decision.replicas[role] - size)
        sizes = (decision.replicas[P], decision.replicas[D])
    for made in changes.values():
        shrinks = sum(change < 0 for change in made)
        assert shrinks <= 3600 / DOWN_S + 1
        assert len(made) - shrinks <= 3600 / UP_PAUSE_S + 1
