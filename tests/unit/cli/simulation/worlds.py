"""Small worlds to simulate: step costs of round numbers, and simple policies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from paceline.autoscaler.policies.base import ScalingPolicy
from paceline.autoscaler.values import POOLS, Decision, Observation, Replica
from paceline.cli.simulation.policies import PolicyOptions
from paceline.cli.simulation.profiles import Profile
from paceline.cli.simulation.simulation import Outcome, SimulationOptions, simulate
from paceline.cli.simulation.traces import Arrival
from paceline.domain.cost import StepCost
from paceline.domain.member import Role

FLAT = StepCost(base_s=0.01, row_s=0.0, token_s=0.001, context_s=0.0)
"""10 ms a step and 1 ms a token."""


def profile(cost: StepCost = FLAT, **changes: Any) -> Profile:
    """Return a replica on machines where moving KV takes no time."""
    kinds: dict[str, Any] = {"chunk_tokens": 100, "max_rows": 64, "kv_tokens": 1_000_000}
    replica = Replica(cost, **{k: changes.pop(k, v) for k, v in kinds.items()})
    free = {"near_bytes_per_s": 1e30, "far_bytes_per_s": 1e30, "hop_s": 0.0}
    return Profile("test", replica, kv_token_bytes=16, **{**free, **changes})


def sizes(prefill: int, decode: int) -> dict[Role, int]:
    """Return sizes of both pools."""
    return {Role.PREFILL: prefill, Role.DECODE: decode}


class Scripted:
    """Asks for sizes by time: those of the last entry that has begun."""

    def __init__(self, script: Mapping[float, Mapping[Role, int]]) -> None:
        self._script = dict(script)
        self.seen: list[Observation] = []

    def decide(self, observation: Observation) -> Decision:
        """Return the sizes of the moment."""
        self.seen.append(observation)
        begun = [at_s for at_s in self._script if at_s <= observation.at_s]
        wanted = self._script[max(begun)]
        return Decision(observation.at_s, wanted, "as scripted", "steady")


class Threshold:
    """A pool that is busier than its target grows by one, an idle one shrinks."""

    def __init__(self, options: PolicyOptions) -> None:
        self._options = options
        self._targets = options.targets

    def decide(self, observation: Observation) -> Decision:
        """Return one more, one less, or the same."""
        wanted = {}
        for role in POOLS:
            pool = observation.pools[role]
            size, busy = pool.requested, pool.busy_ratio
            if busy is not None and not observation.problems:
                target = self._targets.get(role, 0.6)
                if busy > target and not pool.starting:
                    size += 1
                elif busy < 0.5 * target:
                    size -= 1
            least, most = self._options.least[role], self._options.most[role]
            wanted[role] = min(most, max(least, size))
        return Decision(observation.at_s, wanted, "busy against target", "steady")


class Wake:
    """Nothing while nobody asks; one of each as soon as a request is parked."""

    def decide(self, observation: Observation) -> Decision:
        """Return one of each while there is anything to do."""
        busy = observation.parked or any(
            w.num_running for w in observation.pools[Role.DECODE].workers
        )
        return Decision(observation.at_s, sizes(0, 1 if busy else 0), "parked", "wake")


def make_test_policy(options: PolicyOptions) -> ScalingPolicy:
    """Return `Threshold` for whatever has a target, else fixed sizes."""
    if options.sizes:
        return Scripted({0.0: options.sizes})
    return Threshold(options)


def run(
    load: list[Arrival],
    policy: ScalingPolicy | None = None,
    *,
    pools: Mapping[Role, int] | None = None,
    cost: StepCost = FLAT,
    replica: Profile | None = None,
    on_progress: Callable[[float], None] | None = None,
    **options: Any,
) -> Outcome:
    """Play a load; by default against fixed pools, without a prefill worker."""
    pools = pools or sizes(0, 1)
    world = SimulationOptions(profile=replica or profile(cost), initial=pools, **options)
    return simulate(tuple(load), policy or Scripted({0.0: pools}), world, on_progress)
