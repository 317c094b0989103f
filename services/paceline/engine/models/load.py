"""Chooses the form of a model that computes fastest here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from paceline.engine import kernels
from paceline.engine.kernels import AttentionBatch
from paceline.engine.models.config import ModelConfig
from paceline.engine.models.decoder import DecoderModel
from paceline.engine.models.deepen import deepen_tensors
from paceline.engine.models.fused import FusedModel
from paceline.engine.models.row_by_row import RowByRowModel
from paceline.engine.weights import load_tensors

KV_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16}
"""Element type of KV by the weights' format."""


class Model(Protocol):
    """What the runner needs of a model."""

    config: ModelConfig

    def forward(
        self,
        tokens_N: torch.Tensor,
        positions_N: torch.Tensor,
        kv_PL2KTD: torch.Tensor,
        slots_N: torch.Tensor,
        attention: AttentionBatch,
        skip: Sequence[tuple[bool, bool]] | None = None,
    ) -> torch.Tensor:
        """Compute all tokens, store their KV, return the last layer's residuals, [N, E].

        `skip` tells for each layer whether its attention and its MLP are left out: residuals
        pass them by, and an attention that is left out stores no KV.

        A residual that is finite vouches for the KV stored with it: whatever a token stores
        also enters its own attention.
        """
        ...

    def logits(self, x_NE: torch.Tensor, rows_M: torch.Tensor) -> torch.Tensor:
        """Return float32 logits of some rows of residuals, [M, V]."""
        ...

    def hidden(self, x_NE: torch.Tensor, rows_M: torch.Tensor) -> torch.Tensor:
        """Return what the head sees of some rows of residuals, [M, E]."""
        ...


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """How a model is loaded."""

    weight_format: str
    """"f32", "bf16" or "int8"."""
    block_size: int
    max_context_tokens: int
    threads: int
    batch_invariant: bool = False
    """The numbers of a row do not depend on its batch; the C++ decoder's never do."""
    extra_layers: int = 0
    """Layers of the configuration that the checkpoint does not have: identities (deepen.py)."""


def load_model(directory: Path, config: ModelConfig, options: ModelOptions) -> Model:
    """Load a checkpoint as one C++ decoder, or as torch operations where there is none.

    Raises:
        UnsupportedModelError: a tensor is missing, unknown, or of another shape or kind.
    """
    tensors = load_tensors(directory)
    if options.extra_layers:
        num_own = config.num_layers - options.extra_layers
        tensors = deepen_tensors(tensors, num_own, options.extra_layers)
    # What torch is left with is small; a second team of threads would spin beside the first.
    torch.set_num_threads(1 if kernels.has_cpp_kernels() else options.threads)
    if kernels.has_cpp_kernels():
        kernels.set_threads(options.threads)
        return FusedModel(
            config,
            tensors,
            weight_type=options.weight_format,
            kv_dtype=KV_DTYPES[options.weight_format],
            block_size=options.block_size,
            max_context_tokens=options.max_context_tokens,
        )
    model = DecoderModel(
        config,
        tensors,
        dtype=torch.bfloat16 if options.weight_format == "bf16" else torch.float32,
        device="cpu",
        max_context_tokens=options.max_context_tokens,
        is_int8=options.weight_format == "int8",
    )
    return RowByRowModel(model) if options.batch_invariant else model
