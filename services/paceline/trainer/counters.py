"""What a learner counts: part of its state, reported as its progress."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Counters:
    """What a learner did; survives restarts."""

    num_micro_steps: int = 0
    num_steps: int = 0
    """Of the optimiser."""
    num_tokens: int = 0
    """Learned from, each time."""
    num_samples: int = 0
    """That were fed and sound."""
    num_corrupt: int = 0
    """That were fed and dropped."""
    num_left_out: int = 0
    """That were fed, sound, and lack what the draft learns from."""
    num_skipped: int = 0
    """Batches dropped for a loss or gradient that was not finite."""
    num_restored: int = 0
    """Times that good weights came back."""
    trained_s: float = 0.0
    last_loss: float = 0.0
    """Mean over the last optimiser step's positions."""
    last_micro_step_s: float = 0.0
    steps_since_reset: int = 0
    rate_ratio: float = 1.0
    """Of the learning rate; halved when weights had to be restored, 1 again after a reset."""
    samples_by_domain: dict[str, int] = field(default_factory=dict)
