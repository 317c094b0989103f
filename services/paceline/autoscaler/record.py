"""Observations and decisions as plain JSON values, and back.

A `Replica` is large and hardly ever changes; the journal's file leaves it out where it is the
one of the line before (`carry` on reading).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from paceline.autoscaler.values import (
    Decision,
    Latency,
    Observation,
    Pool,
    Replica,
    Traffic,
    Worker,
)
from paceline.domain.cost import StepCost
from paceline.domain.member import Role

Replicas = Mapping[Role, Replica | None]


def observation_to_json(observation: Observation, known: Replicas | None = None) -> dict[str, Any]:
    """Return plain values; the key `replica` is left out of pools where it is the known one."""
    data = asdict(observation)
    pools = {}
    for role, pool in observation.pools.items():
        values = data["pools"][role]
        if known is not None and role in known and known[role] == pool.replica:
            del values["replica"]
        pools[role.value] = values
    return {**data, "pools": pools}


def observation_from_json(data: Mapping[str, Any], carry: Replicas | None = None) -> Observation:
    """Read what `observation_to_json` wrote.

    Raises:
        KeyError, TypeError, ValueError: the data is not an observation.
    """
    carried = carry or {}
    traffic = data.get("traffic")
    return Observation(
        at_s=float(data["at_s"]),
        pools={Role(name): _pool(pool, carried.get(Role(name))) for name, pool in _pools(data)},
        traffic=None if traffic is None else Traffic(**traffic),
        latency=Latency(**data["latency"]),
        parked=int(data["parked"]),
        problems=tuple(map(str, data["problems"])),
    )


def decision_to_json(decision: Decision) -> dict[str, Any]:
    """Return plain values."""
    return {
        "at_s": decision.at_s,
        "replicas": {role.value: count for role, count in decision.replicas.items()},
        "reason": decision.reason,
        "kind": decision.kind,
        "victims": {role.value: list(ids) for role, ids in decision.victims.items()},
        "inputs": dict(decision.inputs),
    }


def decision_from_json(data: Mapping[str, Any]) -> Decision:
    """Read what `decision_to_json` wrote.

    Raises:
        KeyError, TypeError, ValueError: the data is not a decision.
    """
    return Decision(
        at_s=float(data["at_s"]),
        replicas={Role(name): int(count) for name, count in data["replicas"].items()},
        reason=str(data["reason"]),
        kind=str(data["kind"]),
        victims={Role(name): tuple(ids) for name, ids in data["victims"].items()},
        inputs={str(name): float(value) for name, value in data["inputs"].items()},
    )


def _pools(data: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return list(data["pools"].items())


def _pool(data: Mapping[str, Any], carried: Replica | None) -> Pool:
    busy_ratio = data.get("busy_ratio")
    return Pool(
        requested=int(data["requested"]),
        workers=tuple(Worker(**worker) for worker in data["workers"]),
        replica=_replica(data["replica"]) if "replica" in data else carried,
        busy_ratio=None if busy_ratio is None else float(busy_ratio),
    )


def _replica(data: Mapping[str, Any] | None) -> Replica | None:
    if data is None:
        return None
    replica = Replica(**data)
    return replace(replica, step_cost=StepCost.from_json(data["step_cost"]))
