"""A model whose rows do not see each other: the batch-invariant mode of torch operations.

Torch chooses the order of a product's sums by its shape, so a row's numbers move in the last
bits with what else is in the step. The C++ decoder has one order and needs none of this.
Shape legend as in decoder.py; R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from paceline.engine.kernels import AttentionBatch
from paceline.engine.models.decoder import DecoderModel


class RowByRowModel:
    """Computes every row of a step as a step of its own."""

    def __init__(self, model: DecoderModel) -> None:
        self.config = model.config
        self._model = model

    def forward(
        self,
        tokens_N: torch.Tensor,
        positions_N: torch.Tensor,
        kv_PL2KTD: torch.Tensor,
        slots_N: torch.Tensor,
        attention: AttentionBatch,
        skip: Sequence[tuple[bool, bool]] | None = None,
    ) -> torch.Tensor:
        """Compute all tokens, store their KV, return the last layer's residuals, [N, E]."""
        bounds = attention.cu_q.tolist()
        outputs = []
        for r, (begin, end) in enumerate(pairwise(bounds)):
            q_len = end - begin
            parents = attention.tail(r)
            row = AttentionBatch(
                cu_q=torch.tensor([0, q_len], dtype=torch.int32),
                kv_lens=attention.kv_lens[r : r + 1],
                block_tables=attention.block_tables[r : r + 1],
                block_size=attention.block_size,
                max_q=q_len,
                cu_tree=torch.tensor([0, len(parents)], dtype=torch.int32),
                tree_parents=torch.tensor(parents, dtype=torch.int32),
            )
            own = slice(begin, end)
            outputs.append(
                self._model.forward(
                    tokens_N[own], positions_N[own], kv_PL2KTD, slots_N[own], row, skip
                )
            )
        return torch.cat(outputs)

    def logits(self, x_NE: torch.Tensor, rows_M: torch.Tensor) -> torch.Tensor:
        """Return float32 logits of some rows of residuals, [M, V]."""
        return torch.cat([self._model.logits(x_NE, row) for row in rows_M.split(1)])

    def hidden(self, x_NE: torch.Tensor, rows_M: torch.Tensor) -> torch.Tensor:
        """Return what the head sees of some rows of residuals, [M, E]."""
        return self._model.hidden(x_NE, rows_M)
