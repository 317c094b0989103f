"""What operators ask of scaling, for every policy alike. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from paceline.domain.member import Role


@dataclass(frozen=True, slots=True)
class Bounds:
    """Replicas of one pool."""

    least: int
    most: int


@dataclass(frozen=True, slots=True)
class ScalingRules:
    """Targets, bounds and times."""

    ttft_s: float
    itl_s: float
    goal_ratio: float
    """Share of requests, and of gaps, that are to be within their target."""
    bounds: Mapping[Role, Bounds]
    budget_replicas: int | None
    """Most replicas of all pools together."""
    period_s: float
    start_up_s: float
    """From the decision to a worker that takes requests."""
    idle_s: float | None
    """Time without requests after which pools go to zero; None never."""
