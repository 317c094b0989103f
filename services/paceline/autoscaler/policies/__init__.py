"""Scaling policies by name; each is imported when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from paceline.autoscaler.policies.base import ScalingPolicy
from paceline.autoscaler.policies.rules import Bounds, ScalingRules
from paceline.domain.member import Role

Targets = Mapping[Role, float] | None

__all__ = ["POLICIES", "Bounds", "ScalingPolicy", "ScalingRules", "create_policy"]


def _slo(rules: ScalingRules, targets: Targets) -> ScalingPolicy:
    from paceline.autoscaler.policies.slo import SloPolicy

    return SloPolicy(rules)


def _hpa(rules: ScalingRules, targets: Targets) -> ScalingPolicy:
    from paceline.autoscaler.policies.hpa import HpaPolicy

    return HpaPolicy(rules, targets)


def _keda_queue(rules: ScalingRules, targets: Targets) -> ScalingPolicy:
    from paceline.autoscaler.policies.keda_queue import KedaQueuePolicy

    return KedaQueuePolicy(rules, targets)


def _static(rules: ScalingRules, targets: Targets) -> ScalingPolicy:
    from paceline.autoscaler.policies.static import StaticPolicy

    return StaticPolicy(rules, {role: round(size) for role, size in (targets or {}).items()})


POLICIES: dict[str, Callable[[ScalingRules, Targets], ScalingPolicy]] = {
    "default": _slo,
    "hpa": _hpa,
    "keda-queue": _keda_queue,
    "static": _static,
}


def create_policy(name: str, rules: ScalingRules, targets: Targets = None) -> ScalingPolicy:
    """Return a new policy of that name.

    `targets` are a parameter per pool: what `hpa` and `keda-queue` aim at, the sizes of `static`.

    Raises:
        ValueError: there is none, or a target is no such; says which there are.
    """
    if name not in POLICIES:
        raise ValueError(f"no scaling policy {name!r}; there are: {', '.join(sorted(POLICIES))}")
    return POLICIES[name](rules, targets)
