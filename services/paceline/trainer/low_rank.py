"""Low-rank differences to a draft's matrices (LoRA, Hu et al. 2021): little that learns, over
weights that stay as they are.

A matrix W is seen as W + B A. A starts random and B as zeros, so that learning starts from the
draft itself. Every matrix has a difference, the embedding too: it holds most of what a draft of a
layer or two knows. The sums are a draft like any other; nothing that drafts knows of differences.

Shape legend: O rows of a matrix, I its columns, R rank.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.utils import parametrize

from paceline.trainer.decoder import DraftModel


class Difference(nn.Module):
    """What is added to one matrix."""

    def __init__(self, num_rows: int, num_columns: int, rank: int, noise: torch.Generator) -> None:
        super().__init__()
        scale = 1.0 / math.sqrt(num_columns)
        self.down_RI = nn.Parameter(scale * torch.randn(rank, num_columns, generator=noise))
        self.up_OR = nn.Parameter(torch.zeros(num_rows, rank))

    def forward(self, weight_OI: torch.Tensor) -> torch.Tensor:
        """Return the sum."""
        return weight_OI + self.up_OR @ self.down_RI


def with_differences(model: DraftModel, rank: int, seed: int) -> nn.ModuleList:
    """Let a model compute with sums from now on; return the differences, which alone learn.

    A matrix that is too small for the rank gets a smaller one.
    """
    model.requires_grad_(False)
    noise = torch.Generator().manual_seed(seed)
    found = nn.ModuleList()
    for module in list(model.modules()):
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear | nn.Embedding) and isinstance(weight, torch.Tensor):
            num_rows, num_columns = weight.shape
            difference = Difference(num_rows, num_columns, min(rank, *weight.shape), noise)
            # Training needs no check that the weight has the right shape: it was made for it.
            parametrize.register_parametrization(module, "weight", difference, unsafe=True)
            found.append(difference)
    return found


@torch.no_grad()
def merged(model: DraftModel) -> DraftModel:
    """Return a plain model with the sums of one that has differences."""
    plain = DraftModel(model.shape)
    plain.raw_config, plain.weight_dtype = model.raw_config, model.weight_dtype
    for name, parameter in plain.named_parameters():
        place, _, kind = name.rpartition(".")
        parameter.copy_(getattr(model.get_submodule(place), kind))
    return plain
