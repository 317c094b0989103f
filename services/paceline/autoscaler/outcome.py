"""From wanted sizes to a decision: bounds, budget, kind, victims; for every policy alike. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from paceline.autoscaler.policies.rules import ScalingRules
from paceline.autoscaler.values import POOLS, Decision, Observation
from paceline.autoscaler.victims import choose_victims
from paceline.domain.member import Role


def hold(
    observation: Observation, reason: str, inputs: Mapping[str, float] = MappingProxyType({})
) -> Decision:
    """Return the decision to leave everything as it is."""
    sizes = {role: observation.pools[role].requested for role in POOLS}
    return Decision(observation.at_s, sizes, one_line(reason), "hold", inputs=inputs)


def decide(
    observation: Observation,
    wanted: Mapping[Role, int],
    reason: str,
    inputs: Mapping[str, float],
    *,
    is_limited: bool = False,
) -> Decision:
    """Return the decision for these sizes, which must be within the rules."""
    now = {role: observation.pools[role].requested for role in POOLS}
    kind = kind_of(now, wanted)
    if is_limited and kind in ("steady", "grow", "shrink"):
        kind = "limited"
    victims = {
        role: choose_victims(observation.pools[role], now[role] - wanted[role])
        for role in POOLS
        if wanted[role] < now[role]
    }
    return Decision(observation.at_s, dict(wanted), one_line(reason), kind, victims, inputs)


def kind_of(now: Mapping[Role, int], wanted: Mapping[Role, int]) -> str:
    """Name what changes; a pool that grows counts more than one that shrinks."""
    had, has = sum(now.values()), sum(wanted.values())
    if had == 0 and has > 0:
        return "wake"
    if had > 0 and has == 0:
        return "sleep"
    if any(wanted[role] > now[role] for role in POOLS):
        return "grow"
    return "shrink" if any(wanted[role] < now[role] for role in POOLS) else "steady"


def within_rules(rules: ScalingRules, wanted: Mapping[Role, int]) -> dict[Role, int]:
    """Return sizes within bounds and budget.

    The budget is rationed: every pool has its least, and each further replica goes to the pool
    that has the smaller share of what it wants (largest quotient, as seats are given in D'Hondt's
    method).
    """
    clamped = {role: rules.bounds[role].clamp(wanted[role]) for role in POOLS}
    budget = rules.budget_replicas
    if budget is None or sum(clamped.values()) <= budget:
        return clamped
    given = {role: rules.bounds[role].least for role in POOLS}
    for _ in range(budget - sum(given.values())):
        open_pools = [role for role in POOLS if given[role] < clamped[role]]
        if not open_pools:
            break
        neediest = max(open_pools, key=lambda role: clamped[role] / (given[role] + 1))
        given[neediest] += 1
    return given


def one_line(text: str) -> str:
    """Return the text without line breaks."""
    return " ".join(text.split())
