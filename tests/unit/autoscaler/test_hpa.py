"""The baselines do what Kubernetes and KEDA do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from paceline.autoscaler.policies.hpa import (
    HpaPolicy,
    ReplicaControl,
    desired_by_average,
    desired_by_ratio,
)
from paceline.autoscaler.policies.keda_queue import KedaQueuePolicy
from paceline.autoscaler.policies.rules import Bounds
from paceline.autoscaler.values import POOLS, Observation
from paceline.domain.member import Role
from tests.unit.autoscaler.observations import pool, rules, seen, workers


@pytest.mark.parametrize(
    ("ready", "requested", "busy", "desired"),
    [
        (4, 4, 0.60, 4),
        (4, 4, 0.65, 4),  # within the tolerance
        (4, 4, 0.90, 6),
        (4, 4, 0.30, 2),
        (4, 4, 0.00, 0),
        (2, 4, 1.00, 4),  # as if the two that start were idle: 0.5, no reason to grow
        (3, 4, 1.00, 5),  # 0.75 of 0.6 over four
        (3, 4, 0.30, 2),  # starting ones do not count when it shrinks
        (0, 4, 0.90, 4),
    ],
)
def test_desired_by_ratio(ready: int, requested: int, busy: float, desired: int) -> None:
    assert desired_by_ratio(pool(Role.DECODE, ready, requested), busy, 0.6) == desired


@pytest.mark.parametrize(
    ("current", "total", "desired"), [(2, 6.0, 2), (2, 6.5, 2), (2, 7.0, 3), (4, 0.0, 0), (0, 1, 1)]
)
def test_desired_by_average(current: int, total: float, desired: int) -> None:
    assert desired_by_average(current, total, 3.0) == desired


def test_growth_is_limited_to_four_pods_or_all_again_per_period() -> None:
    control = ReplicaControl(Bounds(1, 100))
    assert control.settle(0.0, 1, 50) == 5
    assert control.settle(5.0, 5, 50) == 5  # the same 15 s
    assert control.settle(15.0, 5, 50) == 10
    assert control.settle(30.0, 10, 50) == 20


def test_shrinking_waits_for_five_minutes_without_a_higher_wish() -> None:
    control = ReplicaControl(Bounds(1, 100))
    control.settle(0.0, 10, 10)
    assert control.settle(15.0, 10, 2) == 10
    assert control.settle(150.0, 10, 6) == 10
    assert control.settle(301.0, 10, 2) == 6
    assert control.settle(452.0, 6, 2) == 2


def test_bounds_hold() -> None:
    control = ReplicaControl(Bounds(2, 6))
    assert control.settle(0.0, 5, 50) == 6
    assert ReplicaControl(Bounds(2, 6)).settle(0.0, 5, 0) == 2


def test_hpa_acts_every_fifteen_seconds_and_each_pool_by_itself() -> None:
    policy = HpaPolicy(rules(), {Role.PREFILL: 0.5, Role.DECODE: 3.0})
    decoding = pool(Role.DECODE, 2)
    observation = Observation(
        0.0,
        {
            Role.PREFILL: pool(Role.PREFILL, 2, busy_ratio=1.0),
            Role.DECODE: replace(decoding, workers=workers(Role.DECODE, 2, num_running=3)),
        },
    )
    decision = policy.decide(observation)
    assert dict(decision.replicas) == {Role.PREFILL: 4, Role.DECODE: 2}
    assert policy.decide(replace(observation, at_s=10.0)).kind == "steady"
    assert policy.decide(replace(observation, at_s=15.0)).kind == "grow"


def queued(at_s: float, sizes: tuple[int, int], requests: int, parked: int = 0) -> Observation:
    seen_ = seen(at_s, sizes, parked=parked)
    pools = {
        role: replace(
            seen_.pools[role],
            workers=workers(role, seen_.pools[role].ready, num_waiting=requests),
        )
        for role in POOLS
    }
    return replace(seen_, pools=pools)


def test_keda_keeps_so_many_requests_per_replica() -> None:
    decision = KedaQueuePolicy(rules(), dict.fromkeys(POOLS, 3.0)).decide(queued(0.0, (2, 2), 6))
    assert dict(decision.replicas) == dict.fromkeys(POOLS, 4)


def test_keda_goes_to_zero_after_its_cooldown_and_wakes_at_a_poll() -> None:
    policy, sizes, zero_s = KedaQueuePolicy(rules(least=0)), (2, 2), None
    for i in range(120):
        decision = policy.decide(queued(i * 5.0, sizes, 0))
        sizes = (decision.replicas[Role.PREFILL], decision.replicas[Role.DECODE])
        if sizes == (0, 0):
            zero_s = i * 5.0
            break
    assert zero_s == 300.0
    assert policy.decide(queued(305.0, (0, 0), 0, parked=2)).kind == "steady"
    assert policy.decide(queued(330.0, (0, 0), 0, parked=2)).kind == "wake"


@pytest.mark.parametrize("policy", [HpaPolicy, KedaQueuePolicy])
def test_targets_must_be_above_zero(policy) -> None:
    with pytest.raises(ValueError, match="target"):
        policy(rules(), {Role.DECODE: 0.0})
