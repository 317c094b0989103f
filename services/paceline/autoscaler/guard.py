"""What no policy may do: act on what is not known, or on pools that others look after. Pure.

While anything is missing, pools only grow, only from nothing, and only for requests that wait.
"""

from __future__ import annotations

from paceline.autoscaler.outcome import hold
from paceline.autoscaler.values import KINDS, POOLS, Decision, Observation
from paceline.domain.member import Role

_NOT_OURS = ("target-owned:", "target-changed:")


def checked(observation: Observation, decision: Decision) -> Decision:
    """Return the decision, or to hold where it must not be carried out."""
    sizes = [decision.replicas.get(role) for role in POOLS]
    if decision.kind not in KINDS or not all(_is_size(size) for size in sizes):
        return hold(observation, f"the policy decided nonsense: {decision.kind}, {sizes}")
    if not observation.problems:
        return decision
    changes = {role: decision.replicas[role] - observation.pools[role].requested for role in POOLS}
    is_touched = any(line.startswith(_NOT_OURS) for line in observation.problems)
    if _is_wake(observation, changes) and not is_touched:
        return decision
    if decision.kind == "hold" and not any(changes.values()):
        return decision
    return hold(observation, "; ".join(observation.problems))


def _is_wake(observation: Observation, changes: dict[Role, int]) -> bool:
    """Whether all that changes is that pools without any worker grow, for requests that wait."""
    changed = {role: change for role, change in changes.items() if change}
    return (
        observation.parked > 0
        and bool(changed)
        and all(change > 0 for change in changed.values())
        and all(observation.pools[role].ready == 0 for role in changed)
    )


def _is_size(size: object) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and size >= 0
