"""What drafters that compute with the target borrow of its engine: model, KV and pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from paceline.engine.blocks import BlockPool
from paceline.engine.models.load import Model
from paceline.engine.page_table import PageIds


class LentTarget:
    """One engine's target; pages are lent for the time of one call."""

    def __init__(
        self,
        model: Model,
        kv_PL2KTD: torch.Tensor,
        pool: BlockPool,
        *,
        block_size: int,
        max_context_tokens: int,
    ) -> None:
        self.model = model
        self.kv_PL2KTD = kv_PL2KTD
        self.block_size = block_size
        self.max_context_tokens = max_context_tokens
        self._pool = pool
        self._pages: Mapping[int, PageIds] = {}

    def lend(self, pages: Mapping[int, PageIds]) -> None:
        """Let the sequences of the running step be drafted for."""
        self._pages = pages

    def pages_of(self, sequence_id: int) -> PageIds:
        """Return a sequence's pages; the slots from its last token on are free to write."""
        return self._pages[sequence_id]

    def lend_pages(self, count: int) -> Sequence[int]:
        """Return pages that hold nothing, until the caller returns; none if they are too few."""
        return self._pool.unused(count)
