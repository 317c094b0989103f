"""The contract of scaling policies."""

from __future__ import annotations

from typing import Protocol

from paceline.autoscaler.values import Decision, Observation


class ScalingPolicy(Protocol):
    """Turns what is seen into replica counts.

    A policy keeps what it needs of the past in itself. It reads no clock (`observation.at_s` is
    the time) and draws nothing at random, so that the same observations bring the same decisions:
    in a process, in a replay and in a simulation.
    """

    def decide(self, observation: Observation) -> Decision:
        """Return what every pool should have from now on; called once per period, in order."""
        ...
