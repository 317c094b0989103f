"""Values of the KV store as the node, its clients and workers exchange them.

The fields are those of proto/paceline/v1/kvstore.proto; no wire types here. Keys and roots
are 16 bytes (domain/blocks.py). Everything in the package and the worker imports this file.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KvLayoutInfo:
    """What the bytes of a block mean; blocks of different layouts never mix."""

    kv_root: bytes
    """Root of the block-hash chains, 16 bytes; names model, dtype and block size."""
    layout_version: int
    dtype: str
    block_size: int
    """Tokens per block."""
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_bytes: int
    """Payload bytes of one block."""

    @property
    def shape(self) -> BlockShape:
        """Return the part that decides how slots are cut."""
        return BlockShape(self.kv_root, self.layout_version, self.block_size, self.block_bytes)


@dataclass(frozen=True, slots=True)
class BlockShape:
    """What the node must know of a layout: its root decides everything else."""

    kv_root: bytes
    layout_version: int
    block_size: int
    block_bytes: int


@dataclass(frozen=True, slots=True)
class Slot:
    """A place for one block: byte offset of its header, and a use count that dates references."""

    offset: int
    generation: int


@dataclass(frozen=True, slots=True)
class WrittenBlock:
    """A slot that a worker has filled and sealed."""

    key: bytes
    slot: Slot
    checksum: int
    """xxh3-64 of the payload."""
    num_tokens: int
    is_request_scoped: bool = False


@dataclass(frozen=True, slots=True)
class PinnedBlock:
    """A readable block, pinned for the session that asked."""

    key: bytes
    slot: Slot
    checksum: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class ArenaInfo:
    """What a session knows of its node."""

    session_id: str
    node_id: str
    arena_path: str
    arena_bytes: int
    epoch: int
    """Incarnation of the arena's content."""


@dataclass(frozen=True, slots=True)
class FetchedBlock:
    """A block as it came from another node; `data` is not verified yet."""

    key: bytes
    checksum: int
    num_tokens: int
    is_request_scoped: bool
    data: bytes | bytearray | memoryview
