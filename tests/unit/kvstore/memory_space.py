"""A SlabSpace without memory, for tests of the books."""

from __future__ import annotations

from paceline.domain.blocks import LAYOUT_VERSION
from paceline.kvstore.slots import ArenaGeometry
from paceline.kvstore.values import BlockShape


class MemorySpace:
    """Notes which slab serves which layout; `num_backed` bounds the memory there is."""

    def __init__(self, num_slabs: int, slab_bytes: int, num_backed: int | None = None) -> None:
        self.geometry = ArenaGeometry(4096, slab_bytes, num_slabs)
        self.assigned: dict[int, BlockShape] = {}
        self._num_backed = num_slabs if num_backed is None else num_backed

    def assign(self, slab: int, shape: BlockShape) -> bool:
        """Assign a slab while memory lasts."""
        if len(self.assigned) >= self._num_backed:
            return False
        assert slab not in self.assigned
        self.assigned[slab] = shape
        return True

    def withdraw(self, slab: int) -> None:
        """Forget a slab's layout."""
        del self.assigned[slab]


def shape_of(number: int, block_bytes: int = 128) -> BlockShape:
    """Return a layout with its own root."""
    return BlockShape(bytes([number]) * 16, LAYOUT_VERSION, 16, block_bytes)


def key_of(number: int) -> bytes:
    """Return a block key."""
    return number.to_bytes(16, "big")
