"""What a worker could spare, as it tells the trainer. See trainer/spare.py for what follows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Slack:
    """What a worker's engine is busy with."""

    num_running: int = 0
    num_waiting: int = 0
    threads: int = 1
    """Compute threads that the engine uses while it steps."""
    predicted_step_s: float = 0.0
    """That a step like the last one is predicted to take; 0 while idle."""
    last_step_s: float = 0.0
    itl_target_s: float = 0.0
    """Longest ITL that the operator wants; 0 for no target."""

    @property
    def is_busy(self) -> bool:
        """Whether there is anything to compute."""
        return self.num_running > 0 or self.num_waiting > 0
