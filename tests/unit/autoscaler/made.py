"""Values for tests of scaling, and a policy that decides what it is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from paceline.autoscaler.values import (
    POOLS,
    Decision,
    Latency,
    Observation,
    Pool,
    Replica,
    Traffic,
    Worker,
)
from paceline.domain.cost import Curve, StepCost, StepCurves
from paceline.domain.member import Load, Member, ModelCard, Role

COST = StepCost(0.01, 0.001, 0.0001, 1e-7)
CURVED = replace(
    COST,
    curves=StepCurves(
        Curve((1, 64), (0.01, 0.02)), Curve((0, 8), (0.0, 0.002)), Curve((0,), (0.0,)), 1e-4, 0, 0
    ),
)
REPLICA = Replica(step_cost=COST, chunk_tokens=64, max_rows=8, kv_tokens=4096)
TRAFFIC = Traffic(60.0, 2.0, 100.0, 200.0, 0.25, 50.0, 1.5, 2.5)
CARD = ModelCard("demo", "d" * 8, bytes(range(16)), 16, 4096, 2048, 1000)


def pool(requested: int, ready: int | None = None, draining: int = 0, name: str = "w") -> Pool:
    """Return a pool whose workers are ready but for some."""
    num_ready = requested if ready is None else ready
    workers = [Worker(f"{name}-{i}", i >= num_ready) for i in range(num_ready + draining)]
    return Pool(requested, tuple(workers), REPLICA)


def observed(
    prefill: int | Pool = 1,
    decode: int | Pool = 1,
    *,
    at_s: float = 1000.0,
    parked: int = 0,
    problems: tuple[str, ...] = (),
    traffic: Traffic | None = TRAFFIC,
) -> Observation:
    """Return an observation."""
    pools = {
        role: pool(each, name=role.value) if isinstance(each, int) else each
        for role, each in zip(POOLS, (prefill, decode), strict=True)
    }
    return Observation(at_s, pools, traffic, Latency(0.5, 0.05, 0.9, 1.0), parked, problems)


def decided(
    prefill: int = 1, decode: int = 1, *, kind: str = "grow", at_s: float = 1000.0
) -> Decision:
    """Return a decision."""
    sizes = {Role.PREFILL: prefill, Role.DECODE: decode}
    return Decision(at_s, sizes, f"wants {prefill} and {decode}", kind, inputs={"requests": 2.0})


class Told:
    """A policy that calls a function."""

    def __init__(self, decide: Callable[[Observation], Decision]) -> None:
        self._decide = decide

    def decide(self, observation: Observation) -> Decision:
        """Return what the function returns."""
        return self._decide(observation)


def holding(observation: Observation) -> Decision:
    """Decide to hold."""
    sizes = {role: observation.pools[role].requested for role in POOLS}
    return Decision(observation.at_s, sizes, "told to hold", "hold")


def wanting(sizes: Mapping[Role, int]) -> Callable[[Observation], Decision]:
    """Return what wants the sizes that are in `sizes` then, and holds while anything is wrong."""

    def decide(observation: Observation) -> Decision:
        if observation.problems and not observation.parked:
            return holding(observation)
        now = {role: observation.pools[role].requested for role in POOLS}
        kind = "grow" if any(sizes[r] > now[r] for r in POOLS) else "shrink"
        reason = f"told: prefill {sizes[Role.PREFILL]}, decode {sizes[Role.DECODE]}"
        return Decision(
            observation.at_s,
            dict(sizes),
            reason,
            "steady" if sizes == now else kind,
            inputs={"told_prefill": float(sizes[Role.PREFILL])},
        )

    return decide


def worker(name: str, role: Role = Role.DECODE, **changes: object) -> Member:
    """Return a worker's record."""
    member = Member(
        id=name,
        role=role,
        address="127.0.0.1:1",
        pid=1,
        version="0",
        model=CARD,
        step_cost=COST,
        prefill_chunk_tokens=64,
        max_rows=8,
        load=Load(total_blocks=256, free_blocks=100, num_running=3, context_tokens=700),
    )
    return replace(member, **changes)  # type: ignore[arg-type]


def gateway(name: str = "gateway-0", parked: int = 0) -> Member:
    """Return a gateway's record."""
    load = Load(num_waiting=parked)
    return Member(name, Role.GATEWAY, "127.0.0.1:2", 2, "0", load=load)
