"""Observations by few words, for tests of what decides."""

from __future__ import annotations

from paceline.autoscaler.policies.rules import Bounds, ScalingRules
from paceline.autoscaler.values import (
    POOLS,
    Latency,
    Observation,
    Pool,
    Replica,
    Traffic,
    Worker,
)
from paceline.domain.cost import StepCost
from paceline.domain.member import Role

COST = StepCost(base_s=0.01, row_s=0.0005, token_s=0.0001, context_s=1e-8)
"""A prompt of 1000 tokens takes about 0.11 s, a step of one row 0.011 s."""
REPLICA = Replica(step_cost=COST, chunk_tokens=1024, max_rows=64, kv_tokens=200_000)


def traffic(requests_per_s: float = 2.0, **values: float) -> Traffic:
    defaults = {
        "window_s": 30.0,
        "prompt_tokens": 1000.0,
        "prompt_tokens_p95": 3000.0,
        "cached_ratio": 0.0,
        "output_tokens": 100.0,
    }
    return Traffic(requests_per_s=requests_per_s, **(defaults | values))


def workers(role: Role, num: int, *, age_s: float = 1000.0, **load: int) -> tuple[Worker, ...]:
    return tuple(Worker(id=f"{role.value}-{i}", age_s=age_s, **load) for i in range(num))


def pool(role: Role, ready: int, requested: int | None = None, **values: object) -> Pool:
    settings: dict[str, object] = {"replica": REPLICA, "busy_ratio": 0.5} | values
    return Pool(
        requested=ready if requested is None else requested,
        workers=workers(role, ready),
        **settings,  # type: ignore[arg-type]
    )


def seen(
    at_s: float,
    sizes: tuple[int, int] = (1, 1),
    *,
    load: Traffic | None = None,
    latency: Latency | None = None,
    parked: int = 0,
    problems: tuple[str, ...] = (),
) -> Observation:
    """An observation of pools whose replicas are all ready: (prefill, decode)."""
    return Observation(
        at_s,
        {role: pool(role, size) for role, size in zip(POOLS, sizes, strict=True)},
        traffic() if load is None else load,
        Latency() if latency is None else latency,
        parked,
        problems,
    )


def rules(least: int = 1, most: int = 20, **values: object) -> ScalingRules:
    return ScalingRules(bounds=dict.fromkeys(POOLS, Bounds(least, most)), **values)  # type: ignore[arg-type]
