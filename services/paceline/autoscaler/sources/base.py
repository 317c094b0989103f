"""The contract of sources."""

from __future__ import annotations

from typing import Protocol

from paceline.autoscaler.values import Observation


class MetricSource(Protocol):
    """Tells what the platform looks like now."""

    async def read(self, now_s: float) -> Observation:
        """Return what can be found out within the source's own deadlines.

        Never raises for what the outside world does: what is missing is named in
        `Observation.problems`.
        """
        ...
