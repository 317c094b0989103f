"""Scaling policies by name."""

from __future__ import annotations

from collections.abc import Callable

from paceline.autoscaler.policies.base import ScalingPolicy
from paceline.autoscaler.policies.rules import ScalingRules
from paceline.autoscaler.policies.static import StaticPolicy

POLICIES: dict[str, Callable[[ScalingRules], ScalingPolicy]] = {"static": StaticPolicy}
