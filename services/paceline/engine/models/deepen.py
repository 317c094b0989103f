"""A deeper model that computes the same: identity layers behind a checkpoint's own.

Their output projections are zero, so they add nothing to the residuals, bit for bit, and cost
what any layer costs. A small model then takes the time of one that is read from memory rather
than from a cache, with the outputs of the small one: what speculation is measured on where no
larger checkpoint is at hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from paceline.engine.models.config import ModelConfig

_OUTPUTS = ("self_attn.o_proj.", "mlp.down_proj.")


def deepen_config(config: ModelConfig, num_layers: int) -> ModelConfig:
    """Return the configuration with so many more layers, each like the last one."""
    return replace(
        config,
        num_layers=config.num_layers + num_layers,
        windows=config.windows + (config.windows[-1],) * num_layers,
    )


def deepen_tensors(
    tensors: Iterable[tuple[str, torch.Tensor]], num_own: int, num_layers: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a checkpoint's tensors and those of `num_layers` layers behind its `num_own`."""
    last = f"model.layers.{num_own - 1}."
    for name, tensor in tensors:
        yield name, tensor
        if not name.startswith(last):
            continue
        part = name.removeprefix(last)
        for index in range(num_own, num_own + num_layers):
            # Memory of its own for each, zeros included: shared, it would stay in a cache.
            copy = tensor.clone()
            yield (
                f"model.layers.{index}.{part}",
                copy.zero_() if part.startswith(_OUTPUTS) else copy,
            )
