"""Copies blocks of other nodes into this one, each block at most once at a time.

Every fetch is a task of its own with its own deadline: who waits for it may give up without
hurting others who wait for the same blocks. A block is hashed before it becomes readable.
node.py calls it for Acquire and Pull.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import aclosing

from xxhash import xxh3_64_intdigest

from paceline.domain.errors import PacelineError
from paceline.kvstore import arena
from paceline.kvstore.arena_file import ArenaFile
from paceline.kvstore.counters import NodeCounters
from paceline.kvstore.store import BlockStore
from paceline.kvstore.transport import Transports
from paceline.kvstore.values import FetchedBlock, KvLayoutInfo, WrittenBlock
from paceline.process.spans import Attributes, current_span, span

logger = logging.getLogger(__name__)

MAX_FETCHES = 16
"""Fetches that run at a time; more wait, within their deadlines."""

MAX_TASKS = 1024
"""Fetches that run or wait; beyond this a pull brings nothing."""


class Puller:
    """Runs and coalesces fetches into one store."""

    def __init__(
        self,
        store: BlockStore,
        file: ArenaFile,
        transports: Transports,
        counters: NodeCounters,
        *,
        timeout_s: float,
        on_fetch: Callable[[float], None] | None = None,
    ) -> None:
        """`on_fetch` hears how many seconds each fetch took, whatever came of it."""
        self._store = store
        self._file = file
        self._transports = transports
        self._counters = counters
        self._timeout_s = timeout_s
        self._on_fetch = on_fetch
        self._tasks: set[asyncio.Task[None]] = set()
        self._in_flight: dict[tuple[bytes, bytes], asyncio.Task[None]] = {}
        self._limit = asyncio.Semaphore(MAX_FETCHES)
        self._num_started = 0

    async def pull(
        self, layout: KvLayoutInfo, keys: Sequence[bytes], source: str, timeout_s: float
    ) -> None:
        """Make `keys` readable as far as the source has them; give up after `timeout_s`.

        Raises:
            InvalidRequestError: `source` is not a transport URI.
        """
        await self._transports.to(source)
        deadline_s = _now_s() + timeout_s
        tried: set[bytes] = set()
        # The second round asks this source for what others failed to get from theirs.
        for _ in range(2):
            waiting: set[asyncio.Task[None]] = set()
            mine: list[bytes] = []
            for key in dict.fromkeys(keys):
                if self._store.shelves.contains(layout.kv_root, key):
                    continue
                task = self._in_flight.get((layout.kv_root, key))
                if task is not None:
                    waiting.add(task)
                elif key not in tried:
                    mine.append(key)
            if mine and len(self._tasks) < MAX_TASKS:
                tried.update(mine)
                waiting.add(self._start(layout, mine, source))
            remaining_s = deadline_s - _now_s()
            if not waiting or remaining_s <= 0:
                return
            await asyncio.wait(waiting, timeout=remaining_s)

    async def close(self) -> None:
        """Cancel all fetches."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, layout: KvLayoutInfo, keys: list[bytes], source: str) -> asyncio.Task[None]:
        self._num_started += 1
        name = f"fetch-{self._num_started}"
        task = asyncio.create_task(self._fetch(name, layout, keys, source), name=name)
        entries = [(layout.kv_root, key) for key in keys]
        self._tasks.add(task)
        self._in_flight.update(dict.fromkeys(entries, task))

        def forget(done: asyncio.Task[None]) -> None:
            self._tasks.discard(done)
            for entry in entries:
                del self._in_flight[entry]
            if not done.cancelled() and done.exception() is not None:
                logger.error("fetch-crashed", exc_info=done.exception())

        task.add_done_callback(forget)
        return task

    async def _fetch(
        self, session_id: str, layout: KvLayoutInfo, keys: list[bytes], source: str
    ) -> None:
        about: Attributes = {
            "paceline.source": source,
            "paceline.transport": source.partition(":")[0],
            "paceline.blocks": len(keys),
        }
        with span("kv.transfer", about) as copying:
            await self._copy(session_id, layout, keys, source)
            if copying.is_recording:
                held = self._store.shelves.contains
                num_held = sum(held(layout.kv_root, key) for key in keys)
                num_bytes = num_held * layout.block_bytes
                copying.set({"paceline.found_blocks": num_held, "paceline.bytes": num_bytes})

    async def _copy(
        self, session_id: str, layout: KvLayoutInfo, keys: list[bytes], source: str
    ) -> None:
        begun_s = _now_s()
        try:
            self._store.open_session(session_id, layout.shape, _now_s())
            async with asyncio.timeout(self._timeout_s), self._limit:
                transport = await self._transports.to(source)
                blocks = transport.fetch(keys, layout, self._timeout_s)
                async with aclosing(blocks):
                    async for block in blocks:
                        self._take(session_id, layout, set(keys), block)
        except (PacelineError, TimeoutError) as error:
            self._counters.failed_pulls += 1
            fields = {"source": source, "error": str(error) or "timeout"}
            logger.info("pull-failed", extra={"fields": fields})
            current_span().fail(getattr(error, "reason", "timeout"))
        finally:
            if self._on_fetch is not None:
                self._on_fetch(_now_s() - begun_s)
            # Nobody but this task writes its slots, so they need no rest.
            self._store.close_session(session_id, _now_s(), quarantine_s=0.0)

    def _take(
        self, session_id: str, layout: KvLayoutInfo, wanted: set[bytes], block: FetchedBlock
    ) -> None:
        """Make one received block readable if it is what was asked for."""
        if block.key not in wanted or self._store.shelves.contains(layout.kv_root, block.key):
            return
        if (
            len(block.data) != layout.block_bytes
            or not 0 < block.num_tokens <= layout.block_size
            or xxh3_64_intdigest(block.data) != block.checksum
        ):
            self._counters.corrupt_blocks += 1
            logger.warning("pulled-block-corrupt", extra={"fields": {"key": block.key.hex()}})
            return
        slots = self._store.reserve(session_id, 1, _now_s())
        if not slots:
            return
        self._file.mark_writing(slots)
        checksum = arena.write_block(
            self._file.view,
            slots[0].offset,
            generation=slots[0].generation,
            key=block.key,
            kv_root=layout.kv_root,
            num_tokens=block.num_tokens,
            data=block.data,
            is_request_scoped=block.is_request_scoped,
        )
        written = WrittenBlock(
            block.key, slots[0], checksum, block.num_tokens, block.is_request_scoped
        )
        if checksum == block.checksum:
            self._store.commit(session_id, written)
            self._counters.pulled_blocks += 1
            self._counters.pulled_bytes += layout.block_bytes
        else:
            self._store.unreserve(session_id, slots)


def _now_s() -> float:
    return asyncio.get_running_loop().time()
