"""What speculative decoding brings in a simulation: tokens per step, and how learning changes it.

A chain of `nodes` draft tokens of which each is accepted with probability `a` while those before
it were brings, the target's own token included,

    emitted per step = 1 + a + a^2 + ... + a^nodes

(Leviathan et al. 2023, "Fast inference from transformers via speculative decoding", equation 1).
While drafts train, acceptance rises from what it is to what is reached, by a constant share of
what is left per time:

    a(t) = reached - (reached - a) * exp(-t / time constant)

The default gain is what training brought a draft that was made for another domain: 0.325 to 0.455
on held-out samples (docs/training.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

TRAINED_GAIN = 0.13
MOST_ACCEPTANCE = 0.98


@dataclass(frozen=True, slots=True)
class Drafting:
    """How a fleet drafts."""

    acceptance: float = 0.0
    """Share of draft tokens accepted at the start, given that those before were."""
    nodes: int = 0
    """Draft tokens of a sequence in a step."""
    trained_acceptance: float | None = None
    """What training reaches; None: drafts stay as they are."""
    time_constant_s: float = 900.0

    def acceptance_at(self, at_s: float) -> float:
        """Return the acceptance at a moment."""
        if self.trained_acceptance is None:
            return self.acceptance
        left = (self.trained_acceptance - self.acceptance) * math.exp(-at_s / self.time_constant_s)
        return self.trained_acceptance - left

    def emitted_per_step(self, at_s: float) -> float:
        """Return the mean tokens per step and sequence at a moment."""
        if not self.nodes:
            return 1.0
        return chain_tokens(self.acceptance_at(at_s), self.nodes)


def chain_tokens(acceptance: float, nodes: int) -> float:
    """Return the mean tokens that a step with a chain of drafts brings."""
    return sum(acceptance**i for i in range(nodes + 1))


def acceptance_for(emitted_per_step: float, nodes: int) -> float:
    """Return the acceptance with which so many tokens come per step.

    Raises:
        ValueError: no acceptance does that.
    """
    if not 1.0 <= emitted_per_step <= nodes + 1:
        raise ValueError(f"{emitted_per_step} tokens per step: expected 1 to {nodes + 1}")
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if chain_tokens(middle, nodes) < emitted_per_step:
            low = middle
        else:
            high = middle
    return high
