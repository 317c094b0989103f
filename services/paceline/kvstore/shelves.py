"""Readable blocks by layout, and what goes when space is needed. Part of the books: pure.

Knows slots, blocks and pins as numbers; who pinned or reserved is known to store.py, the
only caller.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field

from paceline.domain.blocks import KEY_BYTES, LAYOUT_VERSION
from paceline.domain.errors import ExhaustedError, InvalidRequestError
from paceline.kvstore.policy.base import KVPolicy
from paceline.kvstore.sessions import Block
from paceline.kvstore.slots import SlabSpace, SlotTable
from paceline.kvstore.values import BlockShape, WrittenBlock

MAX_LAYOUTS = 64


@dataclass(slots=True)
class Layout:
    """The blocks of one layout."""

    shape: BlockShape
    policy: KVPolicy
    blocks: dict[bytes, Block] = field(default_factory=dict)
    tails: dict[bytes, None] = field(default_factory=dict)
    """Keys of request-scoped blocks, oldest first; they are not in the policy."""


class Shelves:
    """The blocks of all layouts in one arena."""

    def __init__(
        self,
        space: SlabSpace,
        create_policy: Callable[[], KVPolicy],
        on_change: Callable[[bytes, bytes, bool], None] | None,
    ) -> None:
        """Start empty; `on_change(kv_root, key, is_readable)` hears of blocks of all requests."""
        self.slots = SlotTable(space)
        self.layouts: dict[bytes, Layout] = {}
        self.dropped: dict[int, Block] = {}
        """Slot offset -> block that was dropped while pinned."""
        self.num_evicted = 0
        self._geometry = space.geometry
        self._create_policy = create_policy
        self._on_change = on_change

    # -- layouts --------------------------------------------------------------------------

    def add_layout(self, shape: BlockShape, in_use: Container[bytes]) -> None:
        """Make blocks of a layout welcome; known ones are left as they are.

        Empty layouts whose roots are not `in_use` make room for another.

        Raises:
            InvalidRequestError: not a layout of this version, another one has its root, or
                its blocks do not fit into a slab.
            ExhaustedError: there are too many layouts.
        """
        if self.knows(shape):
            return
        if len(shape.kv_root) != KEY_BYTES or shape.block_size < 1 or shape.block_bytes < 1:
            raise _bad_layout("root, block size or block bytes out of range")
        if shape.layout_version != LAYOUT_VERSION:
            raise _bad_layout(f"layout version is not {LAYOUT_VERSION}", "layout-version")
        if self._geometry.slots_per_slab(shape.block_bytes) < 1:
            raise _bad_layout(
                f"blocks of {shape.block_bytes} bytes do not fit into slabs of"
                f" {self._geometry.slab_bytes}; enlarge the arena",
                "block-too-large",
            )
        if len(self.layouts) >= MAX_LAYOUTS:
            self._forget_empty_layouts(in_use)
        if len(self.layouts) >= MAX_LAYOUTS:
            raise ExhaustedError("too many layouts", reason="too-many-layouts")
        self.layouts[shape.kv_root] = Layout(shape, self._create_policy())

    def knows(self, shape: BlockShape) -> bool:
        """Tell whether a layout was added.

        Raises:
            InvalidRequestError: another layout has its root.
        """
        known = self.layouts.get(shape.kv_root)
        if known is not None and known.shape != shape:
            raise _bad_layout("another layout has this root", "layout-mismatch")
        return known is not None

    # -- blocks ---------------------------------------------------------------------------

    def contains(self, kv_root: bytes, key: bytes) -> bool:
        """Tell whether a block is readable."""
        layout = self.layouts.get(kv_root)
        return layout is not None and key in layout.blocks

    def find(self, kv_root: bytes, key: bytes) -> WrittenBlock | None:
        """Return a readable block for use before anything else happens, and count the use."""
        layout = self.layouts.get(kv_root)
        block = None if layout is None else layout.blocks.get(key)
        if layout is None or block is None:
            return None
        if not block.is_request_scoped:
            layout.policy.touch(key)
        return WrittenBlock(
            key, block.slot, block.checksum, block.num_tokens, block.is_request_scoped
        )

    def invalidate(self, kv_root: bytes, key: bytes) -> bool:
        """Drop a block whose bytes are wrong; tell whether it was there."""
        layout = self.layouts.get(kv_root)
        if layout is None or key not in layout.blocks:
            return False
        layout.policy.remove(key)
        self._drop(layout, key)
        return True

    def shared_keys(self, kv_root: bytes) -> list[bytes]:
        """Return the readable keys that belong into the index."""
        layout = self.layouts.get(kv_root)
        return [] if layout is None else [k for k in layout.blocks if k not in layout.tails]

    def restore(
        self,
        slab: int,
        shape: BlockShape,
        blocks: Sequence[WrittenBlock],
        unfinished: Sequence[int],
    ) -> None:
        """Take over a slab with the blocks found in it; `unfinished` slots are not free.

        A key that is held already is left out and its slot is free.
        """
        self.add_layout(shape, ())
        layout = self.layouts[shape.kv_root]
        fresh = {block.key: block for block in blocks if block.key not in layout.blocks}
        used = {block.slot.offset for block in fresh.values()}
        self.slots.restore(slab, shape, used.union(unfinished))
        for block in fresh.values():
            self.insert(layout, block)

    # -- slots ----------------------------------------------------------------------------

    def insert(self, layout: Layout, found: WrittenBlock) -> None:
        """Make a block readable whose key is not there yet."""
        block = Block(
            found.key,
            layout.shape,
            found.slot,
            found.checksum,
            found.num_tokens,
            found.is_request_scoped,
        )
        layout.blocks[block.key] = block
        if block.is_request_scoped:
            layout.tails[block.key] = None
            return
        layout.policy.admit(block.key)
        if self._on_change is not None:
            self._on_change(layout.shape.kv_root, block.key, True)

    def _drop(self, layout: Layout, key: bytes) -> None:
        """Make a block unreadable; the policy has forgotten it already."""
        block = layout.blocks.pop(key)
        layout.tails.pop(key, None)
        if block.num_pins:
            block.is_dropped = True
            self.dropped[block.slot.offset] = block
        else:
            self.slots.give(block.slot.offset)
        if not block.is_request_scoped and self._on_change is not None:
            self._on_change(layout.shape.kv_root, key, False)

    def unpin(self, block: Block) -> None:
        """Count a pin less; a dropped block's slot is freed with the last one."""
        block.num_pins -= 1
        if block.is_dropped and block.num_pins == 0:
            del self.dropped[block.slot.offset]
            self.slots.give(block.slot.offset)

    def take_slot(self, layout: Layout) -> int | None:
        """Take a free slot, making one if need be; None if everything is in use."""
        offset = self.slots.take(layout.shape)
        if offset is None and self._reclaim_slab(layout):
            offset = self.slots.take(layout.shape)
        if offset is None and self._evict(layout):
            offset = self.slots.take(layout.shape)
        return offset

    def _evict(self, layout: Layout) -> bool:
        """Evict one block that nobody reads: a tail if there is one, else as the policy says."""
        blocks = layout.blocks
        victim = next((key for key in layout.tails if not blocks[key].num_pins), None)
        if victim is None:
            chosen = layout.policy.victims(1, lambda key: not blocks[key].num_pins)
            victim = chosen[0] if chosen else None
        if victim is None:
            return False
        self.num_evicted += 1
        self._drop(layout, victim)
        return True

    def _reclaim_slab(self, layout: Layout) -> bool:
        """Take a slab from a layout with more than its share, for one with less."""
        roots = [r for r in self.layouts if self.slots.num_slabs(r) or r == layout.shape.kv_root]
        share = self._geometry.num_slabs // len(roots)
        if self.slots.num_slabs(layout.shape.kv_root) >= max(share, 1):
            return False
        richest = max(self.layouts.values(), key=lambda x: self.slots.num_slabs(x.shape.kv_root))
        by_offset = {block.slot.offset: block for block in richest.blocks.values()}
        for slab in self._by_use(richest):
            blocks = [by_offset.get(offset) for offset in self.slots.used_offsets(slab)]
            if all(block is not None and not block.num_pins for block in blocks):
                for block in blocks:
                    assert block is not None
                    richest.policy.remove(block.key)
                    self.num_evicted += 1
                    self._drop(richest, block.key)
                return True
        return False

    def _by_use(self, layout: Layout) -> list[int]:
        slabs = self.slots.slabs_of(layout.shape.kv_root)
        return sorted(slabs, key=lambda slab: len(self.slots.used_offsets(slab)))

    def _forget_empty_layouts(self, in_use: Container[bytes]) -> None:
        for root in list(self.layouts):
            if root not in in_use and self.slots.num_slabs(root) == 0:
                del self.layouts[root]


def _bad_layout(message: str, reason: str | None = None) -> InvalidRequestError:
    return InvalidRequestError("layout", message, reason=reason)
