"""Scaling policies by the names of the command line, made for one simulated world."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from paceline.autoscaler.policies import Bounds, ScalingPolicy, ScalingRules, create_policy
from paceline.autoscaler.values import POOLS
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


def make_policy(options: PolicyOptions) -> ScalingPolicy:
    """Return a new policy.

    Raises:
        CommandError: there is none of that name, or it cannot have these parameters.
    """
    try:
        rules = ScalingRules(
            ttft_s=options.slo_ttft_s,
            itl_s=options.slo_itl_s,
            goal_ratio=options.goal_ratio,
            bounds={role: Bounds(options.least[role], options.most[role]) for role in POOLS},
            period_s=options.period_s,
            start_up_s=options.start_up_s,
            idle_s=options.idle_s,
        )
        return create_policy(options.name, rules, options.sizes or options.targets)
    except ValueError as error:
        raise CommandError(f"--policy {options.name}: {error}") from error
