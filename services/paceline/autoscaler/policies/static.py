"""Fixed sizes: those that are given, else the least that each pool may have."""

from __future__ import annotations

from collections.abc import Mapping

from paceline.autoscaler.outcome import decide, hold, within_rules
from paceline.autoscaler.policies.rules import ScalingRules
from paceline.autoscaler.values import POOLS, Decision, Observation
from paceline.domain.member import Role


class StaticPolicy:
    """Keeps every pool at its size."""

    def __init__(self, rules: ScalingRules, sizes: Mapping[Role, int] | None = None) -> None:
        wanted = {role: rules.bounds[role].least for role in POOLS} | dict(sizes or {})
        self._sizes = within_rules(rules, wanted)

    def decide(self, observation: Observation) -> Decision:
        """Return the same sizes as ever."""
        inputs = {f"{role.value}_required": float(self._sizes[role]) for role in POOLS}
        if observation.problems:
            return hold(observation, "; ".join(observation.problems), inputs)
        text = ", ".join(f"{role.value} {self._sizes[role]}" for role in POOLS)
        return decide(observation, self._sizes, f"fixed: {text}", inputs)
