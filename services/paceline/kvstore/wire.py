"""Messages of kvstore.proto to values and back; no decisions, no I/O.

Ranges are checked by server.py, which is the only one to read messages from strangers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from paceline.kvstore.values import ArenaInfo, KvLayoutInfo, PinnedBlock, Slot, WrittenBlock
from paceline.v1 import kvstore_pb2, kvstore_pb2_grpc

_STUB: Callable[[Any], Any] = kvstore_pb2_grpc.KvNodeServiceStub


def node_stub(channel: Any) -> Any:
    """Return the generated stub of a KV node on a grpc.aio channel."""
    return _STUB(channel)


def layout_to_proto(layout: KvLayoutInfo) -> kvstore_pb2.KvLayout:
    """Return the message of a layout."""
    return kvstore_pb2.KvLayout(
        kv_root=layout.kv_root,
        layout_version=layout.layout_version,
        dtype=layout.dtype,
        block_size=layout.block_size,
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        block_bytes=layout.block_bytes,
    )


def layout_from_proto(message: kvstore_pb2.KvLayout) -> KvLayoutInfo:
    """Return the layout of a message."""
    return KvLayoutInfo(
        kv_root=message.kv_root,
        layout_version=message.layout_version,
        dtype=message.dtype,
        block_size=message.block_size,
        num_layers=message.num_layers,
        num_kv_heads=message.num_kv_heads,
        head_dim=message.head_dim,
        block_bytes=message.block_bytes,
    )


def slot_to_proto(slot: Slot) -> kvstore_pb2.KvSlot:
    """Return the message of a slot."""
    return kvstore_pb2.KvSlot(offset=slot.offset, generation=slot.generation)


def slot_from_proto(message: kvstore_pb2.KvSlot) -> Slot:
    """Return the slot of a message."""
    return Slot(offset=message.offset, generation=message.generation)


def written_to_proto(block: WrittenBlock) -> kvstore_pb2.CommittedBlock:
    """Return the message of a written block."""
    return kvstore_pb2.CommittedBlock(
        key=block.key,
        slot=slot_to_proto(block.slot),
        checksum=block.checksum,
        num_tokens=block.num_tokens,
        is_request_scoped=block.is_request_scoped,
    )


def written_from_proto(message: kvstore_pb2.CommittedBlock) -> WrittenBlock:
    """Return the written block of a message."""
    return WrittenBlock(
        key=message.key,
        slot=slot_from_proto(message.slot),
        checksum=message.checksum,
        num_tokens=message.num_tokens,
        is_request_scoped=message.is_request_scoped,
    )


def pinned_to_proto(block: PinnedBlock) -> kvstore_pb2.AcquiredBlock:
    """Return the message of a pinned block."""
    return kvstore_pb2.AcquiredBlock(
        key=block.key,
        slot=slot_to_proto(block.slot),
        checksum=block.checksum,
        num_tokens=block.num_tokens,
    )


def pinned_from_proto(message: kvstore_pb2.AcquiredBlock) -> PinnedBlock:
    """Return the pinned block of a message."""
    return PinnedBlock(
        key=message.key,
        slot=slot_from_proto(message.slot),
        checksum=message.checksum,
        num_tokens=message.num_tokens,
    )


def arena_from_proto(message: kvstore_pb2.AttachResponse) -> ArenaInfo:
    """Return what a session's first message tells."""
    return ArenaInfo(
        session_id=message.session_id,
        node_id=message.node_id,
        arena_path=message.arena_path,
        arena_bytes=message.arena_bytes,
        epoch=message.epoch,
    )
