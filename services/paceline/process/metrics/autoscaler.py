"""Metrics of the autoscaler: what it saw, what it decided, and why."""

from __future__ import annotations

from paceline.process.metrics.declaration import Area


class AutoscalerArea(Area):
    """Decisions of scaling and what they are made of."""

    title = "Autoscaler"
    exported_by = frozenset({"autoscaler"})
