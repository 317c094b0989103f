"""Fixed sizes: what pools have, within their bounds."""

from __future__ import annotations

from paceline.autoscaler.policies.rules import ScalingRules
from paceline.autoscaler.values import POOLS, Decision, Observation


class StaticPolicy:
    """Keeps every pool at its least size."""

    def __init__(self, rules: ScalingRules) -> None:
        self._rules = rules

    def decide(self, observation: Observation) -> Decision:
        """Return the least sizes."""
        sizes = {role: self._rules.bounds[role].least for role in POOLS}
        now = {role: observation.pools[role].requested for role in POOLS}
        kind = (
            "steady"
            if sizes == now
            else "grow"
            if any(sizes[r] > now[r] for r in POOLS)
            else "shrink"
        )
        text = ", ".join(f"{role.value} {size}" for role, size in sizes.items())
        return Decision(observation.at_s, sizes, f"fixed: {text}", kind)
