"""Joins an engine to its KV store node: sessions, slot credits, lookups, commits.

The engine asks, writes and reads by itself (engine/kv_exchange.py); this file makes the calls
that need a network: it keeps a session with the node, hands the engine slots to write, pins
blocks the engine asks for and makes written blocks readable. Without a node the engine
works from its own cache. A lost answer ends the session, so that both books agree again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from paceline.domain.errors import UnavailableError
from paceline.kvstore.client import KvNodeClient
from paceline.kvstore.values import ArenaInfo, KvLayoutInfo, PinnedBlock, Slot, WrittenBlock
from paceline.process.lifecycle import Tasks
from paceline.process.logs import request_id_var
from paceline.process.metrics import Metrics
from paceline.process.spans import Attributes, span, span_var
from paceline.v1 import engine_pb2, kvstore_pb2
from paceline.worker.bridge import EngineBridge
from paceline.worker.request_trace import RequestTrace
from paceline.worker.streams import RequestStream

logger = logging.getLogger(__name__)

SLOT_CREDITS = 256
"""Empty slots the engine holds at most: two 2,048-token prompts can be written without asking."""

MAX_ARENA_SHARE = 16
"""One worker's credits take at most this fraction (1/n) of the arena. A killed worker's rest for
some seconds beside those of its successor; a fleet that starts anew must not evict what is kept."""

_RETRY_S = 0.05
_MAX_COMMIT_BLOCKS = 512
_MAX_SOURCES = 8
"""Nodes asked for one request, best first; there is time for few, and the node refuses many."""

_Saved = engine_pb2.KvSaved | Callable[[], None]


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
        self._granted: set[tuple[int, int]] = set()
        """Slots that the engine holds, as (offset, generation)."""
        # Bounded by what causes entries: granted slots, and requests that finish.
        self._saved: asyncio.Queue[_Saved] = asyncio.Queue()
        self._needs_credits = asyncio.Event()
        self._pins: dict[int, list[bytes]] = {}
        self._looking: dict[int, RequestTrace] = {}
        """Traces of requests whose lookups hold pins."""
        self._last_error = ""

    @property
    def node_id(self) -> str:
        """Id of the attached node, or ""."""
        return "" if self._arena is None else self._arena.node_id

    async def run(self) -> None:
        """Keep a session with the node, wherever it runs, until cancelled."""
        self._bridge.on_kv_event = self._handle
        self._bridge.on_finished = self._finish
        self._tasks.spawn(self._commit_loop(), "kv-commits", is_vital=True)
        self._tasks.spawn(self._credit_loop(), "kv-credits", is_vital=True)
        while True:
            address = await self._find_node()
            if address is not None:
                await self._follow(address)
            await asyncio.sleep(_RETRY_S * 4)

    async def _follow(self, address: str) -> None:
        """Keep sessions with the node at one address until it is not there any more."""
        client = KvNodeClient(address, self._worker_id, self._layout)
        client.on_arena = self._on_arena
        self._client = client
        try:
            await client.run()
        except UnavailableError as error:
            # Said once, not at every attempt.
            if error.message != self._last_error:
                self._last_error = error.message
                logger.warning("kv-node-unavailable", extra={"fields": {"error": error.message}})
        finally:
            self._client = None
            await self._on_arena(None)
            await client.close()

    # -- session --------------------------------------------------------------------------

    async def _on_arena(self, arena: ArenaInfo | None) -> None:
        """Let the engine map another arena, or none."""
        if arena is None and self._arena is None:
            return
        self._arena = arena
        self._granted.clear()
        self._pins.clear()
        self._looking.clear()
        self._metrics.kv_link_up.set(arena is not None)
        change = engine_pb2.ArenaChange()
        task = asyncio.current_task()
        if arena is None:
            if task is not None and not task.cancelling():
                logger.warning("kv-node-lost")
        else:
            self._last_error = ""
            change.path, change.num_bytes = arena.arena_path, arena.arena_bytes
            fields = {"node": arena.node_id, "epoch": arena.epoch}
            logger.info("kv-node-attached", extra={"fields": fields})
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
            missing = max(1, min(SLOT_CREDITS, share)) - len(self._granted)
            if missing <= 0:
                continue
            try:
                slots = await client.reserve(missing)
            except UnavailableError:
                self._restart(arena)
                continue
            if arena is not self._arena:
                continue
            if slots:
                self._granted.update((slot.offset, slot.generation) for slot in slots)
                grant = engine_pb2.KvGrant(slots=[_slot_to_proto(s) for s in slots])
                self._send(engine_pb2.EngineCommand(kv_grant=grant))
            elif not self._granted:
                # The arena is full of pinned blocks: ask again soon, the engine waits 2 s.
                await asyncio.sleep(_RETRY_S)
                self._needs_credits.set()

    def _restart(self, arena: ArenaInfo) -> None:
        """End the session in which a call failed, unless it is over."""
        if self._client is not None and self._client.arena is arena:
            self._client.restart()

    # -- engine events --------------------------------------------------------------------

    def _handle(self, event: engine_pb2.EngineEvent) -> None:
        # The engine has few lookups open at a time, and each task ends by a deadline.
        match event.WhichOneof("event"):
            case "kv_lookup":
                self._tasks.spawn(self._look_up(event.kv_lookup), "kv-lookup")
            case "kv_loaded":
                self._tasks.spawn(self._release(event.kv_loaded), "kv-release")
            case "kv_saved":
                slots = [block.slot for block in event.kv_saved.blocks]
                self._granted.difference_update((s.offset, s.generation) for s in slots)
                self._needs_credits.set()
                self._saved.put_nowait(event.kv_saved)

    def _finish(self, stream: RequestStream) -> None:
        """End a stream; that of a prefill once the blocks written before are readable."""
        if stream.reports_published:
            self._saved.put_nowait(stream.finish)
        else:
            stream.finish()

    async def _look_up(self, lookup: engine_pb2.KvLookup) -> None:
        client, arena = self._client, self._arena
        stream = self._bridge.stream_of(lookup.request_id)
        pinned: list[PinnedBlock] = []
        if client is not None and stream is not None:
            request_id_var.set(stream.log_id)
            sources = stream.kv_sources[:_MAX_SOURCES]
            about: Attributes = {
                "paceline.blocks": len(lookup.keys) + bool(lookup.tail_key),
                "paceline.sources": list(sources),
            }
            span_var.set(stream.span)
            begun_s = time.monotonic()
            with span("kv.lookup", about, kind="client") as looking:
                pinned = await client.acquire(list(lookup.keys), sources, lookup.tail_key)
                num_bytes = len(pinned) * self._layout.block_bytes
                looking.set({"paceline.found_blocks": len(pinned), "paceline.bytes": num_bytes})
            if pinned:
                self._note_transfer("load", begun_s)
        if arena is not self._arena:
            pinned = []
        if pinned:
            self._pins[lookup.lookup_id] = [block.key for block in pinned]
            if stream is not None and stream.trace is not None:
                self._looking[lookup.lookup_id] = stream.trace
        load = engine_pb2.KvLoad(
            lookup_id=lookup.lookup_id, blocks=[_pinned_to_proto(b) for b in pinned]
        )
        self._send(engine_pb2.EngineCommand(kv_load=load))
        if stream is not None:
            for block in pinned:
                stream.add_published(block.key, block.num_tokens)

    async def _release(self, loaded: engine_pb2.KvLoaded) -> None:
        keys = self._pins.pop(loaded.lookup_id, [])
        trace = self._looking.pop(loaded.lookup_id, None)
        if trace is not None:
            trace.note_loaded(loaded)
        self._metrics.kv_loaded_blocks.inc(loaded.num_blocks)
        self._metrics.kv_loaded_bytes.inc(loaded.num_bytes)
        if loaded.corrupt_keys:
            self._metrics.kv_corrupt_blocks.inc(len(loaded.corrupt_keys))
            fields = {"blocks": len(loaded.corrupt_keys)}
            logger.warning("kv-block-corrupt", extra={"fields": fields})
        client, arena = self._client, self._arena
        if client is not None and arena is not None and keys:
            try:
                await client.release(keys, list(loaded.corrupt_keys), [])
            except UnavailableError:
                self._restart(arena)

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
        client, arena = self._client, self._arena
        if not written or client is None or arena is None:
            return
        begun_s = time.monotonic()
        try:
            readable = set(await client.commit(written))
        except UnavailableError:
            self._restart(arena)
            return
        self._note_transfer("save", begun_s)
        self._metrics.kv_saved_blocks.inc(len(readable))
        self._metrics.kv_saved_bytes.inc(len(readable) * self._layout.block_bytes)
        for item in saved:
            stream = self._bridge.stream_of(item.request_id)
            if stream is None:
                continue
            found = [block for block in item.blocks if block.key in readable]
            for block in found:
                stream.add_published(block.key, block.num_tokens)
            if stream.trace is not None:
                stream.trace.note_published(len(found), item.started_s, time.monotonic())

    def _note_transfer(self, direction: str, begun_s: float) -> None:
        self._metrics.kv_transfer_seconds.labels(direction).observe(time.monotonic() - begun_s)

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
