"""Scaling policies by the names of the command line, made for one simulated world."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from paceline.autoscaler.policies.base import ScalingPolicy
from paceline.autoscaler.values import POOLS, Decision, Observation
from paceline.cli.errors import CommandError
from paceline.domain.member import Role


@dataclass(frozen=True, slots=True)
class PolicyOptions:
    """Which policy, and what its operator asks of it."""

    name: str
    slo_ttft_s: float
    slo_itl_s: float
    goal_ratio: float
    start_up_s: float
    """As the operator knows it."""
    period_s: float
    least: Mapping[Role, int] = field(default_factory=lambda: dict.fromkeys(POOLS, 1))
    most: Mapping[Role, int] = field(default_factory=lambda: dict.fromkeys(POOLS, 32))
    idle_s: float | None = None
    """Time without requests after which pools go to zero; None: never."""
    targets: Mapping[Role, float] = field(default_factory=dict)
    """What hpa and keda-queue aim at for each pool; their defaults where nothing is said."""
    sizes: Mapping[Role, int] = field(default_factory=dict)
    """Of static."""


MakePolicy = Callable[[PolicyOptions], ScalingPolicy]
"""Of a module, so that other processes find it."""


class FixedSizes:
    """Keeps the pools as they are told to be."""

    def __init__(self, sizes: Mapping[Role, int]) -> None:
        self._sizes = dict(sizes)

    def decide(self, observation: Observation) -> Decision:
        """Return the same sizes as ever."""
        return Decision(observation.at_s, self._sizes, "fixed", "steady")


def make_policy(options: PolicyOptions) -> ScalingPolicy:
    """Return a new policy.

    Raises:
        CommandError: there is none of that name.
    """
    if options.name == "static":
        return FixedSizes(options.sizes)
    raise CommandError(f"--policy {options.name}: known are static")
