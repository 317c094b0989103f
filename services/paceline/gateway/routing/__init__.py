"""Routing policies by name."""

from __future__ import annotations

from paceline.gateway.routing.base import RoutingPolicy


def create_policy(name: str) -> RoutingPolicy:
    """Return the policy of that name.

    Raises:
        ValueError: nobody has that name.
    """
    if name == "cost":
        from paceline.gateway.routing.cost import CostPolicy

        return CostPolicy()
    raise ValueError(f"routing policy {name!r}: known are cost")
