"""One KV node: joins the books, the arena's bytes, pulls from peers and the index.

server.py translates calls to these methods and has checked their arguments. Everything runs
on one event loop; methods without `async` do not wait.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

from xxhash import xxh3_64_intdigest

from paceline.domain.errors import ExhaustedError, NotFoundError
from paceline.kvstore import arena
from paceline.kvstore.arena_file import ArenaFile
from paceline.kvstore.counters import NodeCounters
from paceline.kvstore.publisher import Publisher
from paceline.kvstore.puller import Puller
from paceline.kvstore.store import BlockStore, StoreUsage
from paceline.kvstore.values import (
    ArenaInfo,
    FetchedBlock,
    KvLayoutInfo,
    PinnedBlock,
    Slot,
    WrittenBlock,
)
from paceline.process.logs import note_fields

logger = logging.getLogger(__name__)

MAX_SESSIONS = 1024
_EXPIRE_PERIOD_S = 1.0


class KvNode:
    """What the service does, without gRPC."""

    def __init__(
        self,
        node_id: str,
        file: ArenaFile,
        store: BlockStore,
        puller: Puller,
        publisher: Publisher,
        counters: NodeCounters,
        *,
        pull_timeout_s: float,
    ) -> None:
        self.node_id = node_id
        self.counters = counters
        self.closing = asyncio.Event()
        """Set when sessions must end."""
        self._own_uris: frozenset[str] = frozenset()
        self._file = file
        self._store = store
        self._puller = puller
        self._publisher = publisher
        self._pull_timeout_s = pull_timeout_s
        self._layouts: dict[str, KvLayoutInfo] = {}

    def set_address(self, address: str) -> None:
        """Learn the own address, so that the node never pulls from itself."""
        self._own_uris = frozenset({f"grpc:{address}", f"shm:{address}"})

    # -- sessions -------------------------------------------------------------------------

    def open_session(self, worker_id: str, layout: KvLayoutInfo) -> ArenaInfo:
        """Open a session.

        Raises:
            InvalidRequestError: the layout cannot be stored here.
            ExhaustedError: there are too many sessions or layouts.
        """
        if len(self._layouts) >= MAX_SESSIONS:
            raise ExhaustedError("too many sessions", reason="too-many-sessions")
        session_id = secrets.token_hex(16)
        self._store.open_session(session_id, layout.shape, _now_s())
        self._layouts[session_id] = layout
        fields = {"worker": worker_id, "session": session_id}
        logger.info("session-opened", extra={"fields": fields})
        return ArenaInfo(
            session_id, self.node_id, self._file.path, self._file.num_bytes, self._file.epoch
        )

    def touch_session(self, session_id: str) -> None:
        """Note that a session's stream lives.

        Raises:
            NotFoundError: the session ended.
        """
        self._store.touch_session(session_id, _now_s())

    def close_session(self, session_id: str) -> None:
        """End a session; a second time is no error."""
        if self._layouts.pop(session_id, None) is not None:
            self._store.close_session(session_id, _now_s())
            logger.info("session-closed", extra={"fields": {"session": session_id}})

    async def run_expiry(self) -> None:
        """End overdue leases until cancelled."""
        while True:
            await asyncio.sleep(_EXPIRE_PERIOD_S)
            for session_id in self._store.expire(_now_s()):
                self._layouts.pop(session_id, None)
                logger.warning("session-expired", extra={"fields": {"session": session_id}})

    # -- writing --------------------------------------------------------------------------

    def reserve(self, session_id: str, num_slots: int) -> list[Slot]:
        """Reserve up to `num_slots` slots.

        Raises:
            NotFoundError: the session ended.
        """
        slots = self._store.reserve(session_id, num_slots, _now_s())
        self._file.mark_writing(slots)
        return slots

    def commit(self, session_id: str, blocks: Iterable[WrittenBlock]) -> list[bytes]:
        """Make blocks readable whose slot says the same as the call; return readable keys.

        Raises:
            NotFoundError: the session ended.
        """
        layout = self._layout(session_id)
        readable: list[bytes] = []
        for block in blocks:
            if self._store.owns(session_id, block.slot) and not self._is_sealed(block, layout):
                self._store.unreserve(session_id, [block.slot])
                self.counters.corrupt_blocks += 1
            elif self._store.commit(session_id, block):
                readable.append(block.key)
                self.counters.committed_blocks += 1
        return readable

    def release(
        self,
        session_id: str,
        keys: Iterable[bytes],
        corrupt_keys: Iterable[bytes],
        unused_slots: Iterable[Slot],
    ) -> None:
        """End pins, drop blocks whose bytes were wrong, take back slots.

        Raises:
            NotFoundError: the session ended.
        """
        for key in corrupt_keys:
            if self._store.report_corrupt(session_id, key):
                self.counters.corrupt_blocks += 1
                logger.warning("block-corrupt", extra={"fields": {"key": key.hex()}})
        self._store.release(session_id, keys)
        self._store.unreserve(session_id, unused_slots)

    # -- reading --------------------------------------------------------------------------

    async def acquire(
        self, session_id: str, keys: Sequence[bytes], sources: Sequence[str], tail_key: bytes
    ) -> list[PinnedBlock]:
        """Pin the leading blocks of `keys` that can be had in time, then the tail.

        Raises:
            NotFoundError: the session ended.
            InvalidRequestError: a source is not a transport URI.
        """
        layout = self._layout(session_id)
        wanted = list(dict.fromkeys([*keys, tail_key] if tail_key else keys))
        pinned: dict[bytes, PinnedBlock] = {}
        deadline_s = _now_s() + self._pull_timeout_s
        try:
            self._pin(session_id, wanted, pinned)
            num_local = len(pinned)
            for source in sources:
                missing = [key for key in wanted if key not in pinned]
                remaining_s = deadline_s - _now_s()
                if not missing or remaining_s <= 0:
                    break
                if source not in self._own_uris:
                    await self._puller.pull(layout, missing, source, remaining_s)
                    self._pin(session_id, missing, pinned)
        except BaseException:
            with suppress(NotFoundError):
                self._store.release(session_id, pinned)
            raise
        self.counters.missed_blocks += len(wanted) - len(pinned)
        num_pulled = len(pinned) - num_local
        fields = {"asked": len(wanted), "found": len(pinned), "pulled": num_pulled}
        logger.info("blocks-acquired", extra={"fields": fields})
        note_fields(fields)
        return self._keep_leading(session_id, keys, tail_key, pinned)

    def _pin(
        self, session_id: str, keys: Iterable[bytes], pinned: dict[bytes, PinnedBlock]
    ) -> None:
        now_s = _now_s()
        for key in keys:
            block = self._store.acquire(session_id, key, now_s)
            if block is not None:
                pinned[key] = block

    def _keep_leading(
        self,
        session_id: str,
        keys: Sequence[bytes],
        tail_key: bytes,
        pinned: dict[bytes, PinnedBlock],
    ) -> list[PinnedBlock]:
        """Return leading blocks and tail, and end the pins of blocks behind a gap."""
        kept: dict[bytes, PinnedBlock] = {}
        for key in keys:
            if key not in pinned:
                break
            kept[key] = pinned[key]
        if tail_key in pinned:
            kept[tail_key] = pinned[tail_key]
        self._store.release(session_id, pinned.keys() - kept.keys())
        self.counters.acquired_blocks += len(kept)
        self.counters.acquired_bytes += len(kept) * self._layout(session_id).block_bytes
        return list(kept.values())

    async def pull(self, layout: KvLayoutInfo, keys: Sequence[bytes], source: str) -> int:
        """Copy blocks from a peer; return how many of `keys` are readable here now.

        Raises:
            InvalidRequestError: the layout cannot be stored here, or `source` is no URI.
        """
        self._store.add_layout(layout.shape)
        if source not in self._own_uris:
            await self._puller.pull(layout, keys, source, self._pull_timeout_s)
        return sum(1 for key in keys if self._store.shelves.contains(layout.kv_root, key))

    def fetch(self, layout: KvLayoutInfo, keys: Iterable[bytes]) -> Iterator[FetchedBlock]:
        """Yield copies of blocks for a peer, hashed here; missing ones are left out.

        A key that the index led the peer to in vain is withdrawn from the index.

        Raises:
            InvalidRequestError: another layout has this root.
        """
        if not self._store.shelves.knows(layout.shape):
            return
        for key in keys:
            block = self._read(layout, key)
            if block is None:
                self._publisher.note(layout.kv_root, key, False)
                self.counters.promised_blocks += 1
                continue
            self.counters.served_blocks += 1
            yield block

    def usage(self) -> StoreUsage:
        """Return how full the node is."""
        return self._store.usage()

    # -- internals ------------------------------------------------------------------------

    def _layout(self, session_id: str) -> KvLayoutInfo:
        layout = self._layouts.get(session_id)
        if layout is None:
            raise NotFoundError("no such session; attach again", reason="session-unknown")
        return layout

    def _is_sealed(self, block: WrittenBlock, layout: KvLayoutInfo) -> bool:
        """Tell whether the slot's header agrees; the bytes are hashed by their readers."""
        header = arena.read_header(self._file.view, block.slot.offset)
        return block.num_tokens <= layout.block_size and header == arena.SlotHeader(
            layout_version=layout.layout_version,
            state=arena.STATE_READY,
            key=block.key,
            kv_root=layout.kv_root,
            generation=block.slot.generation,
            length=layout.block_bytes,
            checksum=block.checksum,
            num_tokens=block.num_tokens,
            flags=arena.FLAG_REQUEST_SCOPED if block.is_request_scoped else 0,
        )

    def _read(self, layout: KvLayoutInfo, key: bytes) -> FetchedBlock | None:
        """Copy a block, dropping it if its bytes are wrong. Nothing can evict it meanwhile."""
        block = self._store.shelves.find(layout.kv_root, key)
        if block is None:
            return None
        data = bytes(arena.payload(self._file.view, block.slot.offset, layout.block_bytes))
        if xxh3_64_intdigest(data) != block.checksum:
            self._store.shelves.invalidate(layout.kv_root, key)
            self.counters.corrupt_blocks += 1
            logger.warning("block-corrupt", extra={"fields": {"key": key.hex()}})
            return None
        return FetchedBlock(key, block.checksum, block.num_tokens, block.is_request_scoped, data)


def _now_s() -> float:
    return asyncio.get_running_loop().time()
