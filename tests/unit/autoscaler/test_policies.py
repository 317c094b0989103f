"""What every scaling policy promises."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.autoscaler.policies import POLICIES, ScalingPolicy, create_policy
from paceline.autoscaler.values import (
    KINDS,
    POOLS,
    Decision,
    Latency,
    Observation,
    Pool,
    Traffic,
    Worker,
)
from paceline.domain.member import Role
from tests.unit.autoscaler.observations import REPLICA, rules, seen, traffic

names = pytest.mark.parametrize("name", sorted(POLICIES))
RULES = rules(1, 12, budget_replicas=18, idle_s=600.0)


def check(decision: Decision, observation: Observation) -> None:
    assert set(decision.replicas) == set(POOLS)
    assert decision.kind in KINDS and decision.at_s == observation.at_s
    assert decision.reason and "\n" not in decision.reason
    assert all(math.isfinite(value) for value in decision.inputs.values())
    sizes = decision.replicas.values()
    assert all(isinstance(size, int) and size >= 0 for size in sizes)
    for role, victims in decision.victims.items():
        assert set(victims) <= {worker.id for worker in observation.pools[role].workers}
    if decision.kind == "hold":
        told = [" ".join(line.split()) for line in observation.problems]
        assert all(line in decision.reason for line in told)
        assert told or "no worker has said" in decision.reason or "not known" in decision.reason
        for role in POOLS:
            assert decision.replicas[role] == observation.pools[role].requested
    elif decision.kind != "sleep" and any(sizes):
        assert all(1 <= size <= 12 for size in sizes) and sum(sizes) <= 18


@names
def test_problems_are_held_through_and_named(name: str) -> None:
    observation = seen(0.0, (25, 0), problems=("prometheus-stale: 90 s old",))
    decision = create_policy(name, RULES).decide(observation)
    check(decision, observation)
    assert decision.kind == "hold" and "prometheus-stale" in decision.reason


@names
def test_a_bare_observation_is_no_error(name: str) -> None:
    observation = Observation(0.0, {role: Pool(1) for role in POOLS})
    check(create_policy(name, RULES).decide(observation), observation)


@names
def test_sizes_beyond_the_bounds_are_brought_back(name: str) -> None:
    policy, sizes = create_policy(name, RULES), (30, 0)
    for i in range(200):
        decision = policy.decide(seen(i * 5.0, sizes))
        sizes = (decision.replicas[Role.PREFILL], decision.replicas[Role.DECODE])
    assert all(1 <= size <= 12 for size in sizes)


@names
def test_reasons_hold_numbers(name: str) -> None:
    decision = create_policy(name, RULES).decide(seen(0.0, (2, 2)))
    assert any(character.isdigit() for character in decision.reason)


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="default, hpa, keda-queue, static"):
        create_policy("best", RULES)


number = st.one_of(st.floats(), st.sampled_from([0.0, math.nan, math.inf, -1.0]))
amount = st.floats(0.0, 1e5)
count = st.integers(0, 10**5)
worker = st.builds(
    Worker,
    id=st.uuids().map(str),
    is_draining=st.booleans(),
    num_running=count,
    num_waiting=count,
    pending_prefill_tokens=count,
    context_tokens=count,
    age_s=amount,
)
pools = st.builds(
    Pool,
    requested=st.integers(0, 20),
    workers=st.lists(worker, max_size=4).map(tuple),
    replica=st.sampled_from([None, REPLICA]),
    busy_ratio=st.none() | number,
)
share = st.none() | number
observations = st.builds(
    Observation,
    at_s=st.just(0.0),
    pools=st.fixed_dictionaries({role: pools for role in POOLS}),
    traffic=st.none()
    | st.builds(Traffic, st.floats(1.0, 60.0), *[number] * 7)
    | st.builds(traffic, st.floats(0.0, 100.0)),
    latency=st.builds(Latency, share, share, share, share),
    parked=st.sampled_from([0, 0, 3]),
    problems=st.sampled_from([(), (), ("redis-unavailable: gone",)]),
)
sequences = st.lists(st.tuples(st.floats(0.0, 400.0), observations), max_size=12)


def play(policy: ScalingPolicy, steps: list[tuple[float, Observation]]) -> list[Decision]:
    at_s, decisions = 0.0, []
    for passed_s, observation in steps:
        at_s += passed_s
        now = replace(observation, at_s=at_s)
        decision = policy.decide(now)
        check(decision, now)
        decisions.append(decision)
    return decisions


@names
@settings(max_examples=60, deadline=None)
@given(steps=sequences)
def test_whatever_is_seen_decisions_are_sound_and_repeatable(
    name: str, steps: list[tuple[float, Observation]]
) -> None:
    first = play(create_policy(name, RULES), steps)
    assert play(create_policy(name, RULES), steps) == first
