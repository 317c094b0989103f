"""Steps a draft model: optimiser, rate over time, one batch at a time.

What is learned from and when to stop is the caller's: create.py trains against the clock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from paceline.trainer.decoder import DraftModel
from paceline.trainer.losses import LOSSES
from paceline.trainer.texts import Batch


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """How a draft learns."""

    learning_rate: float = 2e-3
    """Peak, for models of about a million parameters (AdamW)."""
    warm_up_ratio: float = 0.05
    """Share of the time in which the rate rises."""
    last_rate_ratio: float = 0.02
    """Of the peak, where the cosine ends."""
    weight_decay: float = 0.1
    """Of matrices; norms and the embedding have none."""
    max_grad_norm: float = 1.0
    losses: Mapping[str, float] = field(default_factory=lambda: {"forward-kl": 1.0})
    """Weight of each loss by its name in losses.py."""
    is_bf16: bool = False
    """Whether products are computed in bf16; weights and losses stay float32."""


class Trainer:
    """A model and its optimiser. Deterministic for the same batches and progress."""

    def __init__(self, model: DraftModel, plan: TrainPlan) -> None:
        self._plan = plan
        self._model = model
        matrices: list[torch.nn.Parameter] = []
        others: list[torch.nn.Parameter] = []
        for name, parameter in model.named_parameters():
            has_decay = parameter.dim() > 1 and "embed_tokens" not in name
            (matrices if has_decay else others).append(parameter)
        self._optimiser = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": plan.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=plan.learning_rate,
            betas=(0.9, 0.95),
        )

    def step(self, batch: Batch, progress: float) -> float:
        """Learn from one batch and return its mean loss; `progress` in [0, 1] sets the rate."""
        for group in self._optimiser.param_groups:
            group["lr"] = rate_at(self._plan, progress)
        with torch.autocast("cpu", torch.bfloat16, enabled=self._plan.is_bf16):
            logits_NV = learned_logits(self._model, batch)
        loss = batch_loss(logits_NV.float(), batch, self._plan.losses)
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._plan.max_grad_norm)
        self._optimiser.step()
        return float(loss.detach())


def rate_at(plan: TrainPlan, progress: float) -> float:
    """Return the learning rate: a linear rise, then half a cosine (Loshchilov and Hutter 2017)."""
    rise = min(1.0, progress / plan.warm_up_ratio)
    fall = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    least = plan.last_rate_ratio
    # A first step without a rate would be none.
    return plan.learning_rate * max(rise, 0.01) * (least + (1.0 - least) * fall)


def learned_logits(model: DraftModel, batch: Batch) -> torch.Tensor:
    """Return the draft's logits at the positions to learn from, [N, V]."""
    return model.learned_logits(batch)


def batch_loss(logits_NV: torch.Tensor, batch: Batch, losses: Mapping[str, float]) -> torch.Tensor:
    """Return the weighted mean over the learned positions."""
    loss_N = torch.zeros(len(logits_NV))
    for name, weight in losses.items():
        loss_N = loss_N + weight * LOSSES[name](logits_NV, batch.target)
    return (loss_N * batch.weights_N).sum() / batch.weights_N.sum()


def has_fast_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Tell whether this processor multiplies bf16 itself; False where Linux does not say."""
    try:
        words = set(cpuinfo.read_text(encoding="utf-8").split())
    except OSError:
        return False
    return not words.isdisjoint({"avx512_bf16", "amx_bf16"})
