"""KvNodeService: checks what comes in, calls the node, answers. No state of its own."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from typing import Any

from paceline.domain.blocks import KEY_BYTES
from paceline.domain.errors import InvalidRequestError
from paceline.kvstore import wire
from paceline.kvstore.node import KvNode
from paceline.kvstore.transport import parse_uri
from paceline.kvstore.values import KvLayoutInfo
from paceline.v1 import kvstore_pb2, kvstore_pb2_grpc

SERVICE_NAME = "paceline.v1.KvNodeService"

MAX_KEYS = 16_384
"""Keys per call: a context of 262,144 tokens in blocks of 16."""

MAX_SLOTS = 4096
MAX_SOURCES = 16
MAX_ID_CHARS = 256
MAX_BLOCK_SIZE = 4096

PIECE_BYTES = 512 * 1024
"""Bytes per message of Fetch: large against the cost of a message, small against its limit."""

HEARTBEAT_S = 1.0

_SESSION_ID = re.compile(r"[0-9a-f]{32}")

# The generated base class is untyped; naming its type once keeps the rest checked.
_Base: Any = kvstore_pb2_grpc.KvNodeServiceServicer


class KvNodeServicer(_Base):  # type: ignore[misc]
    """The calls of proto/paceline/v1/kvstore.proto."""

    def __init__(self, node: KvNode, heartbeat_s: float = HEARTBEAT_S) -> None:
        self._node = node
        self._heartbeat_s = heartbeat_s

    async def Attach(
        self, request: kvstore_pb2.AttachRequest, context: object
    ) -> AsyncIterator[kvstore_pb2.AttachResponse]:
        """Keep a session until the stream, the session's lease or the node ends."""
        _check_text("worker_id", request.worker_id)
        info = self._node.open_session(request.worker_id, _layout(request.layout))
        try:
            yield kvstore_pb2.AttachResponse(
                session_id=info.session_id,
                node_id=info.node_id,
                arena_path=info.arena_path,
                arena_bytes=info.arena_bytes,
                epoch=info.epoch,
            )
            beat = kvstore_pb2.AttachResponse(session_id=info.session_id, epoch=info.epoch)
            while not self._node.closing.is_set():
                try:
                    async with asyncio.timeout(self._heartbeat_s):
                        await self._node.closing.wait()
                except TimeoutError:
                    self._node.touch_session(info.session_id)
                    yield beat
        finally:
            self._node.close_session(info.session_id)

    async def Reserve(
        self, request: kvstore_pb2.ReserveRequest, context: object
    ) -> kvstore_pb2.ReserveResponse:
        """Reserve slots."""
        if not 0 < request.num_slots <= MAX_SLOTS:
            raise InvalidRequestError("num_slots", f"must be in [1, {MAX_SLOTS}]")
        slots = self._node.reserve(_session(request.session_id), request.num_slots)
        return kvstore_pb2.ReserveResponse(slots=[wire.slot_to_proto(slot) for slot in slots])

    async def Commit(
        self, request: kvstore_pb2.CommitRequest, context: object
    ) -> kvstore_pb2.CommitResponse:
        """Make blocks readable."""
        _check_keys("blocks.key", [block.key for block in request.blocks], MAX_SLOTS)
        for block in request.blocks:
            if not 0 < block.num_tokens <= MAX_BLOCK_SIZE:
                raise InvalidRequestError("blocks.num_tokens", "must be in [1, block size]")
        written = [wire.written_from_proto(block) for block in request.blocks]
        readable = self._node.commit(_session(request.session_id), written)
        return kvstore_pb2.CommitResponse(readable_keys=readable)

    async def Acquire(
        self, request: kvstore_pb2.AcquireRequest, context: object
    ) -> kvstore_pb2.AcquireResponse:
        """Pin blocks."""
        _check_keys("keys", request.keys)
        if request.tail_key:
            _check_keys("tail_key", [request.tail_key])
        if len(request.sources) > MAX_SOURCES:
            raise InvalidRequestError("sources", f"more than {MAX_SOURCES}")
        for source in request.sources:
            parse_uri(source)
        blocks = await self._node.acquire(
            _session(request.session_id), request.keys, request.sources, request.tail_key
        )
        return kvstore_pb2.AcquireResponse(blocks=[wire.pinned_to_proto(b) for b in blocks])

    async def Release(
        self, request: kvstore_pb2.ReleaseRequest, context: object
    ) -> kvstore_pb2.ReleaseResponse:
        """End pins."""
        _check_keys("keys", request.keys)
        _check_keys("corrupt_keys", request.corrupt_keys)
        if len(request.unused_slots) > MAX_SLOTS:
            raise InvalidRequestError("unused_slots", f"more than {MAX_SLOTS}")
        slots = [wire.slot_from_proto(slot) for slot in request.unused_slots]
        session_id = _session(request.session_id)
        self._node.release(session_id, request.keys, request.corrupt_keys, slots)
        return kvstore_pb2.ReleaseResponse()

    async def Pull(
        self, request: kvstore_pb2.PullRequest, context: object
    ) -> kvstore_pb2.PullResponse:
        """Copy blocks from a peer."""
        _check_keys("keys", request.keys)
        parse_uri(request.source)
        layout = _layout(request.layout)
        num_readable = await self._node.pull(layout, request.keys, request.source)
        return kvstore_pb2.PullResponse(num_readable=num_readable)

    async def Fetch(
        self, request: kvstore_pb2.FetchRequest, context: object
    ) -> AsyncIterator[kvstore_pb2.FetchResponse]:
        """Stream the bytes of blocks; one block is copied at a time."""
        _check_keys("keys", request.keys)
        for block in self._node.fetch(_layout(request.layout), request.keys):
            for start in range(0, len(block.data), PIECE_BYTES):
                piece = kvstore_pb2.FetchResponse(
                    data=bytes(block.data[start : start + PIECE_BYTES])
                )
                if start == 0:
                    piece.key = block.key
                    piece.checksum = block.checksum
                    piece.num_tokens = block.num_tokens
                    piece.is_request_scoped = block.is_request_scoped
                yield piece

    async def GetStats(
        self, request: kvstore_pb2.GetStatsRequest, context: object
    ) -> kvstore_pb2.GetStatsResponse:
        """Report what the node holds and did."""
        usage, counters = self._node.usage(), self._node.counters
        return kvstore_pb2.GetStatsResponse(
            node_id=self._node.node_id,
            num_blocks=usage.num_blocks,
            used_bytes=usage.used_bytes,
            capacity_bytes=usage.capacity_bytes,
            num_pinned_blocks=usage.num_pinned_blocks,
            num_reserved_slots=usage.num_reserved_slots,
            committed_blocks=counters.committed_blocks,
            acquired_blocks=counters.acquired_blocks,
            acquired_bytes=counters.acquired_bytes,
            pulled_blocks=counters.pulled_blocks,
            pulled_bytes=counters.pulled_bytes,
            evicted_blocks=usage.num_evicted,
            corrupt_blocks=counters.corrupt_blocks,
            num_sessions=usage.num_sessions,
        )


def _layout(message: kvstore_pb2.KvLayout) -> KvLayoutInfo:
    _check_keys("layout.kv_root", [message.kv_root])
    _check_text("layout.dtype", message.dtype)
    if not 0 < message.block_size <= MAX_BLOCK_SIZE:
        raise InvalidRequestError("layout.block_size", f"must be in [1, {MAX_BLOCK_SIZE}]")
    if message.block_bytes == 0:
        raise InvalidRequestError("layout.block_bytes", "must be positive")
    return wire.layout_from_proto(message)


def _session(session_id: str) -> str:
    # Other names are those of the node's own sessions.
    if not _SESSION_ID.fullmatch(session_id):
        raise InvalidRequestError("session_id", "not a session id")
    return session_id


def _check_keys(field: str, keys: Sequence[bytes], limit: int = MAX_KEYS) -> None:
    if len(keys) > limit:
        raise InvalidRequestError(field, f"more than {limit}")
    if any(len(key) != KEY_BYTES for key in keys):
        raise InvalidRequestError(field, f"must be {KEY_BYTES} bytes")


def _check_text(field: str, text: str) -> None:
    if not text or len(text) > MAX_ID_CHARS or not text.isprintable():
        raise InvalidRequestError(field, f"must be 1 to {MAX_ID_CHARS} printable characters")
