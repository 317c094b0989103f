"""How the arena is cut: slabs are given to layouts on demand, slots are cut from slabs.

    arena   [ tables | slab 0 ....... | slab 1 ....... | ... ]
    slab    [ slot | slot | slot | rest ]       all slots of a slab have one layout's size

A slab whose slots are all free goes back and may serve another layout. Book-keeping only;
who uses a slot is known to store.py, the bytes belong to arena_file.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from paceline.kvstore.arena import slot_bytes
from paceline.kvstore.values import BlockShape


@dataclass(frozen=True, slots=True)
class ArenaGeometry:
    """Where slabs lie in the arena; offsets and sizes in bytes."""

    data_offset: int
    slab_bytes: int
    num_slabs: int

    def slab_of(self, offset: int) -> int:
        """Return the slab that holds a byte offset of the data area."""
        return (offset - self.data_offset) // self.slab_bytes

    def slots_per_slab(self, block_bytes: int) -> int:
        """Return how many slots of a layout a slab holds."""
        return self.slab_bytes // slot_bytes(block_bytes)

    def slot_offsets(self, slab: int, block_bytes: int) -> Iterator[int]:
        """Yield the offsets of a slab's slots when cut for a layout."""
        start = self.data_offset + slab * self.slab_bytes
        size = slot_bytes(block_bytes)
        for index in range(self.slots_per_slab(block_bytes)):
            yield start + index * size


class SlabSpace(Protocol):
    """The memory behind the slabs."""

    @property
    def geometry(self) -> ArenaGeometry:
        """Where the slabs lie."""
        ...

    def assign(self, slab: int, shape: BlockShape) -> bool:
        """Back a slab with memory and note its layout; False if the machine has none left."""
        ...

    def withdraw(self, slab: int) -> None:
        """Note that a slab has no layout."""
        ...


@dataclass(slots=True)
class _Slab:
    shape: BlockShape
    free: set[int] = field(default_factory=set)


class SlotTable:
    """Free slots by layout, free slabs for all."""

    def __init__(self, space: SlabSpace) -> None:
        self._space = space
        self._geometry = space.geometry
        self._slabs: dict[int, _Slab] = {}
        self._free_slabs = list(range(self._geometry.num_slabs - 1, -1, -1))
        # Slabs with a free slot, per root; a dict as an ordered set.
        self._open: dict[bytes, dict[int, None]] = {}
        self._num_slabs: dict[bytes, int] = {}

    def restore(self, slab: int, shape: BlockShape, used: set[int]) -> None:
        """Take over a slab whose `used` slots hold blocks; the others are free."""
        self._free_slabs.remove(slab)
        self._add(slab, shape, used)

    def take(self, shape: BlockShape) -> int | None:
        """Take a free slot of the layout, from a fresh slab if need be; None if there is none."""
        open_slabs = self._open.setdefault(shape.kv_root, {})
        if not open_slabs and not self._grow(shape):
            return None
        slab = next(iter(open_slabs))
        free = self._slabs[slab].free
        offset = free.pop()
        if not free:
            del open_slabs[slab]
        return offset

    def give(self, offset: int) -> None:
        """Return a slot; a slab that is free as a whole goes back to all layouts."""
        slab = self._geometry.slab_of(offset)
        entry = self._slabs[slab]
        assert offset not in entry.free, "slot returned twice"
        entry.free.add(offset)
        root = entry.shape.kv_root
        self._open[root][slab] = None
        if len(entry.free) == self._geometry.slots_per_slab(entry.shape.block_bytes):
            del self._slabs[slab], self._open[root][slab]
            self._num_slabs[root] -= 1
            self._free_slabs.append(slab)
            self._space.withdraw(slab)

    def num_slabs(self, kv_root: bytes) -> int:
        """Return how many slabs a layout has."""
        return self._num_slabs.get(kv_root, 0)

    def slabs_of(self, kv_root: bytes) -> list[int]:
        """Return the slabs of a layout."""
        return [i for i, slab in self._slabs.items() if slab.shape.kv_root == kv_root]

    def used_offsets(self, slab: int) -> list[int]:
        """Return the slots of a slab that are not free."""
        entry = self._slabs[slab]
        offsets = self._geometry.slot_offsets(slab, entry.shape.block_bytes)
        return [offset for offset in offsets if offset not in entry.free]

    def free_offsets(self) -> list[int]:
        """Return all free slots of slabs that have a layout."""
        return [offset for slab in self._slabs.values() for offset in slab.free]

    def all_offsets(self) -> list[int]:
        """Return all slots of slabs that have a layout."""
        return [
            offset
            for index, slab in self._slabs.items()
            for offset in self._geometry.slot_offsets(index, slab.shape.block_bytes)
        ]

    def _grow(self, shape: BlockShape) -> bool:
        if not self._free_slabs or not self._space.assign(self._free_slabs[-1], shape):
            return False
        self._add(self._free_slabs.pop(), shape, set())
        return True

    def _add(self, slab: int, shape: BlockShape, used: set[int]) -> None:
        free = set(self._geometry.slot_offsets(slab, shape.block_bytes)) - used
        self._slabs[slab] = _Slab(shape, free)
        self._num_slabs[shape.kv_root] = self.num_slabs(shape.kv_root) + 1
        open_slabs = self._open.setdefault(shape.kv_root, {})
        if free:
            open_slabs[slab] = None
