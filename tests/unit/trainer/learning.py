"""Steps of tests that let a learner learn."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from paceline.domain.learnings import Sample
from paceline.trainer.learner import OnlineLearner


def feed(one: OnlineLearner, samples: Sequence[Sample]) -> None:
    """Hand samples over."""
    for sample in samples:
        one.feed(sample)


def train(one: OnlineLearner, num_steps: int) -> None:
    """Learn for so many optimiser steps more."""
    until = one.counters.num_steps + num_steps
    for _ in range(100 * num_steps):
        if one.counters.num_steps >= until:
            return
        assert one.micro_step(time.monotonic() + 60)
    raise AssertionError("no optimiser step")


def weights(one: OnlineLearner) -> list[torch.Tensor]:
    """Return a copy of what was learned."""
    one.settle()
    return [p.detach().clone() for p in one.model.parameters()]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    """Compare to the bit."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
