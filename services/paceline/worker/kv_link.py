"""Joins an engine to its KV store node: sessions, slot credits, lookups, commits.

The engine asks, writes and reads by itself (engine/kv_exchange.py); this file makes the calls
that need a network: it keeps a session with the node, hands the engine slots to write, pins
blocks the engine asks for and makes written blocks readable. Without a node the engine
works from its own cache.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from paceline.domain.errors import UnavailableError
from paceline.kvstore.client import KvNodeClient
from paceline.kvstore.values import ArenaInfo, KvLayoutInfo, PinnedBlock, Slot, WrittenBlock
from paceline.process.lifecycle import Tasks
from paceline.process.metrics import Metrics
from paceline.v1 import engine_pb2, kvstore_pb2
from paceline.worker.bridge import EngineBridge
from paceline.worker.streams import RequestStream

logger = logging.getLogger(__name__)

SLOT_CREDITS = 256
"""Empty slots the engine holds at most: two 2,048-token prompts can be written without asking."""

MAX_ARENA_SHARE = 8
"""One worker's credits take at most this fraction (1/n) of the arena."""

_RETRY_S = 0.05
_MAX_COMMIT_BLOCKS = 512
_MAX_QUEUED_EVENTS = 4096


class KvLink:
    """Carries KV traffic between one engine and one node at a time."""

    def __init__(
        self,
        bridge: EngineBridge,
        layout: KvLayoutInfo,
        worker_id: str,
        find_node: Callable[[], Awaitable[str | None]],
        metrics: Metrics,
        tasks: Tasks,
    ) -> None:
        self._bridge = bridge
        self._layout = layout
        self._worker_id = worker_id
        self._find_node = find_node
        self._metrics = metrics
        self._tasks = tasks
        self._client: KvNodeClient | None = None
        self._arena: ArenaInfo | None = None
        self._num_credits = 0
        self._saved: asyncio.Queue[engine_pb2.KvSaved | Callable[[], None]] = asyncio.Queue(
            _MAX_QUEUED_EVENTS
        )
        self._needs_credits = asyncio.Event()
        self._pins: dict[int, list[bytes]] = {}
        bridge.on_kv_event = self._handle
        bridge.on_request_finished = self._finish_after_commits

    @property
    def node_id(self) -> str:
        """Id of the attached node, or ""."""
        return "" if self._arena is None else self._arena.node_id

    async def run(self) -> None:
        """Keep a session with the node, wherever it runs, until cancelled."""
        self._tasks.spawn(self._commit_loop(), "kv-commits", is_vital=True)
        self._tasks.spawn(self._credit_loop(), "kv-credits", is_vital=True)
        while True:
            address = await self._find_node()
            if address is None:
                await asyncio.sleep(_RETRY_S * 4)
                continue
            client = KvNodeClient(address, self._worker_id, self._layout)
            client.on_arena = self._on_arena
            self._client = client
            try:
                await client.run()
            except UnavailableError as error:
                logger.warning("kv-node-lost", extra={"fields": {"error": error.message}})
            finally:
                self._client = None
                await self._on_arena(None)
                await client.close()
            await asyncio.sleep(_RETRY_S * 4)

    # -- session --------------------------------------------------------------------------

    async def _on_arena(self, arena: ArenaInfo | None) -> None:
        """Let the engine map another arena, or none."""
        if arena is None and self._arena is None:
            return
        self._arena = arena
        self._num_credits = 0
        self._pins.clear()
        change = engine_pb2.ArenaChange()
        if arena is not None:
            change.path, change.num_bytes = arena.arena_path, arena.arena_bytes
        self._send(engine_pb2.EngineCommand(arena=change))
        self._needs_credits.set()

    async def _credit_loop(self) -> None:
        """Keep the engine supplied with slots."""
        while True:
            await self._needs_credits.wait()
            self._needs_credits.clear()
            client, arena = self._client, self._arena
            if client is None or arena is None:
                continue
            share = arena.arena_bytes // self._layout.block_bytes // MAX_ARENA_SHARE
            missing = max(1, min(SLOT_CREDITS, share)) - self._num_credits
            if missing <= 0:
                continue
            try:
                slots = await client.reserve(missing)
            except UnavailableError:
                continue
            if arena is not self._arena:
                continue
            if slots:
                self._num_credits += len(slots)
                grant = engine_pb2.KvGrant(slots=[_slot_to_proto(s) for s in slots])
                self._send(engine_pb2.EngineCommand(kv_grant=grant))
            elif self._num_credits == 0:
                # The arena is full of pinned blocks: ask again soon, the engine waits 2 s.
                await asyncio.sleep(_RETRY_S)
                self._needs_credits.set()

    # -- engine events --------------------------------------------------------------------

    def _handle(self, event: engine_pb2.EngineEvent) -> None:
        match event.WhichOneof("event"):
            case "kv_lookup":
                self._tasks.spawn(self._look_up(event.kv_lookup), "kv-lookup")
            case "kv_loaded":
                self._tasks.spawn(self._release(event.kv_loaded), "kv-release")
            case "kv_saved":
                self._num_credits -= len(event.kv_saved.blocks)
                self._needs_credits.set()
                self._enqueue(event.kv_saved)

    def _finish_after_commits(self, request_id: str, stream: RequestStream) -> None:
        """End a stream once the blocks written before are readable."""
        self._enqueue(stream.finish)

    def _enqueue(self, item: engine_pb2.KvSaved | Callable[[], None]) -> None:
        try:
            self._saved.put_nowait(item)
        except asyncio.QueueFull:
            # The node does not keep up: blocks are lost to sharing, streams still end.
            if callable(item):
                item()

    async def _look_up(self, lookup: engine_pb2.KvLookup) -> None:
        client, arena = self._client, self._arena
        pinned: list[PinnedBlock] = []
        if client is not None:
            sources = self._bridge.sources_of(lookup.request_id)
            pinned = await client.acquire(list(lookup.keys), list(sources), lookup.tail_key)
        if arena is not self._arena:
            pinned = []
        if pinned:
            self._pins[lookup.lookup_id] = [block.key for block in pinned]
        load = engine_pb2.KvLoad(
            lookup_id=lookup.lookup_id, blocks=[_pinned_to_proto(b) for b in pinned]
        )
        self._send(engine_pb2.EngineCommand(kv_load=load))
        stream = self._bridge.stream_of(lookup.request_id)
        if stream is not None:
            for block in pinned:
                stream.add_published(block.key, block.num_tokens)

    async def _release(self, loaded: engine_pb2.KvLoaded) -> None:
        keys = self._pins.pop(loaded.lookup_id, [])
        self._metrics.kv_loaded_blocks.inc(loaded.num_blocks)
        self._metrics.kv_loaded_bytes.inc(loaded.num_bytes)
        if loaded.corrupt_keys:
            self._metrics.kv_corrupt_blocks.inc(len(loaded.corrupt_keys))
            logger.warning("kv-block-corrupt", extra={"fields": {"blocks": len(loaded.corrupt_keys)}})
        if self._client is not None and keys:
            try:
                await self._client.release(keys, list(loaded.corrupt_keys), [])
            except UnavailableError:
                return  # The session's end releases everything.

    async def _commit_loop(self) -> None:
        """Make written blocks readable, in order, many per call; run what waits behind them."""
        while True:
            batch = [await self._saved.get()]
            while not self._saved.empty() and len(batch) < _MAX_COMMIT_BLOCKS:
                batch.append(self._saved.get_nowait())
            await self._commit([item for item in batch if not callable(item)])
            for item in batch:
                if callable(item):
                    item()

    async def _commit(self, saved: list[engine_pb2.KvSaved]) -> None:
        written = [_written_from_proto(b) for item in saved for b in item.blocks]
        if not written or self._client is None:
            return
        try:
            readable = set(await self._client.commit(written))
        except UnavailableError:
            return
        size = self._layout.block_bytes
        self._metrics.kv_saved_blocks.inc(len(written))
        self._metrics.kv_saved_bytes.inc(len(written) * size)
        for item in saved:
            stream = self._bridge.stream_of(item.request_id)
            if stream is None:
                continue
            for block in item.blocks:
                if block.key in readable:
                    stream.add_published(block.key, block.num_tokens)

    def _send(self, command: engine_pb2.EngineCommand) -> None:
        try:
            self._bridge.send(command)
        except UnavailableError:
            return  # The engine ended; the bridge's run() ends the worker.


def _slot_to_proto(slot: Slot) -> kvstore_pb2.KvSlot:
    return kvstore_pb2.KvSlot(offset=slot.offset, generation=slot.generation)


def _pinned_to_proto(block: PinnedBlock) -> kvstore_pb2.AcquiredBlock:
    return kvstore_pb2.AcquiredBlock(
        key=block.key,
        slot=_slot_to_proto(block.slot),
        checksum=block.checksum,
        num_tokens=block.num_tokens,
    )


def _written_from_proto(block: kvstore_pb2.CommittedBlock) -> WrittenBlock:
    return WrittenBlock(
        key=block.key,
        slot=Slot(offset=block.slot.offset, generation=block.slot.generation),
        checksum=block.checksum,
        num_tokens=block.num_tokens,
        is_request_scoped=block.is_request_scoped,
    )
