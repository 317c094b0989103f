"""What operators ask of scaling, for every policy alike. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from paceline.autoscaler.values import POOLS
from paceline.domain.member import Role


@dataclass(frozen=True, slots=True)
class Bounds:
    """Replicas of one pool."""

    least: int = 1
    """Kept while there is traffic; 1, because a pool that has to start first is slow."""
    most: int = 8

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.most:
            raise ValueError(f"bounds {self.least} to {self.most}: expected 0 <= least <= most")

    def clamp(self, count: int) -> int:
        """Return the count, or the bound that it is beyond."""
        return max(self.least, min(self.most, count))


@dataclass(frozen=True, slots=True)
class ScalingRules:
    """Targets, bounds and times."""

    ttft_s: float = 1.0
    """Target for the time to the first token."""
    itl_s: float = 0.1
    """Target for the gap between tokens of a stream."""
    goal_ratio: float = 0.99
    """Share of requests that are to be within their targets; the last percent of bursty traffic
    costs about as much as all the rest."""
    bounds: Mapping[Role, Bounds] = field(default_factory=lambda: dict.fromkeys(POOLS, Bounds()))
    budget_replicas: int | None = None
    """Most replicas of all pools together; None sets no limit beyond theirs."""
    period_s: float = 5.0
    """Between two decisions."""
    start_up_s: float = 60.0
    """From the decision to a worker that takes requests: what is assumed until it was seen."""
    idle_s: float | None = None
    """Time without requests after which pools go to zero; None: never."""

    def __post_init__(self) -> None:
        positive = {"ttft_s": self.ttft_s, "itl_s": self.itl_s, "period_s": self.period_s}
        for name, value in positive.items():
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} {value}: expected seconds above 0")
        if not 0 < self.goal_ratio < 1:
            raise ValueError(f"goal_ratio {self.goal_ratio}: expected a share between 0 and 1")
        if not 0 <= self.start_up_s < float("inf"):
            raise ValueError(f"start_up_s {self.start_up_s}: expected seconds from 0 on")
        least = sum(self.bounds[role].least for role in POOLS)
        if self.budget_replicas is not None and self.budget_replicas < least:
            raise ValueError(f"budget {self.budget_replicas} is below the pools' least, {least}")
