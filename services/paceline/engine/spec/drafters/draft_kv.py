"""Memory for the KV of draft models of one shape; versions.py decides who shares it.

Shape legend: P pages, L layers, K key/value heads, T tokens per page, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from paceline.engine.models.config import ModelConfig
from paceline.engine.spec.drafters.draft_pages import DraftPages


@dataclass(frozen=True, slots=True)
class KvShape:
    """What two models must have in common for the KV of one to fit the other."""

    page: torch.Size
    """[L, 2, K, T, D]"""
    dtype: torch.dtype

    @classmethod
    def of(cls, config: ModelConfig, block_size: int, dtype: torch.dtype) -> KvShape:
        """Return the shape of a model's KV."""
        heads, size = config.num_kv_heads, config.head_dim
        return cls(torch.Size((config.num_layers, 2, heads, block_size, size)), dtype)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return self.page.numel() * self.dtype.itemsize

    @property
    def block_size(self) -> int:
        """Tokens per page."""
        return self.page[3]


class DraftKv:
    """Pages, and who holds them."""

    def __init__(self, shape: KvShape, num_bytes: int) -> None:
        """Take up to so many bytes.

        Raises:
            ValueError: they are less than one page.
        """
        num_pages = num_bytes // shape.page_bytes
        if num_pages < 1:
            raise ValueError(f"{num_bytes} bytes: not one page of a draft's KV")
        self.shape = shape
        self.pages = DraftPages(num_pages, shape.block_size)
        self.kv_PL2KTD = torch.zeros(num_pages, *shape.page, dtype=shape.dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes of all pages."""
        return self.pages.num_pages * self.shape.page_bytes

    @property
    def num_held_bytes(self) -> int:
        """Bytes of the pages that sequences hold."""
        return self.num_held_pages * self.shape.page_bytes

    @property
    def num_held_pages(self) -> int:
        """Pages that sequences hold."""
        return self.pages.num_pages - self.pages.num_free
