"""Blocks of a node on this machine: the books by gRPC, the bytes from the peer's arena file.

One session per layout stays open, as a worker's does; its end releases all pins, also if
this process dies. A peer whose arena is not on this machine is asked over the network.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from paceline.domain.errors import InvalidRequestError, UnavailableError
from paceline.kvstore.arena import ArenaView
from paceline.kvstore.client import NOT_HERE_REASON, KvNodeClient
from paceline.kvstore.transport.grpc_peer import REASON, GrpcTransport
from paceline.kvstore.values import FetchedBlock, KvLayoutInfo, PinnedBlock

_WORKER_ID = "peer-node"

_YIELD_BYTES = 1024 * 1024
"""Copied between two turns of the event loop: about half a millisecond."""


@dataclass(frozen=True, slots=True)
class _Session:
    client: KvNodeClient
    view: ArenaView
    task: asyncio.Task[None]
    """Reads the session's heartbeats until it ends."""

    async def close(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.view.close()
        await self.client.close()


class ShmTransport:
    """Reads the arena of one peer, or falls back to the network."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._sessions: dict[bytes, _Session] = {}
        self._lock = asyncio.Lock()
        self._fallback: GrpcTransport | None = None

    async def fetch(
        self, keys: Sequence[bytes], layout: KvLayoutInfo, timeout_s: float
    ) -> AsyncGenerator[FetchedBlock]:
        """Yield the leading blocks of `keys` that the peer has, and the last one."""
        session = await self._session(layout, timeout_s)
        if session is None:
            assert self._fallback is not None
            async for fetched in self._fallback.fetch(keys, layout, timeout_s):
                yield fetched
            return
        # The last key may be a tail, which counts without the blocks before it.
        pinned = await session.client.acquire(keys[:-1], [], keys[-1])
        try:
            num_bytes = 0
            for block in pinned:
                yield _copy(session.view, block, layout)
                num_bytes += layout.block_bytes
                if num_bytes >= _YIELD_BYTES:
                    num_bytes = 0
                    await asyncio.sleep(0)
        finally:
            # A lost session has no pins any more.
            with suppress(UnavailableError):
                await session.client.release([block.key for block in pinned])

    async def close(self) -> None:
        """End the sessions, close the channel of the fallback."""
        while self._sessions:
            _, session = self._sessions.popitem()
            await session.close()
        if self._fallback is not None:
            await self._fallback.close()

    async def _session(self, layout: KvLayoutInfo, timeout_s: float) -> _Session | None:
        """Return the session of a layout, opened if need be; None leads to the fallback."""
        try:
            async with asyncio.timeout(timeout_s), self._lock:
                session = self._sessions.get(layout.kv_root)
                if session is not None and session.client.arena is not None:
                    return session
                if session is not None:
                    del self._sessions[layout.kv_root]
                    await session.close()
                if self._fallback is None:
                    opened = await _open(self._address, layout)
                    if opened is not None:
                        self._sessions[layout.kv_root] = opened
                        return opened
                    self._fallback = GrpcTransport(self._address)
                return None
        except TimeoutError as error:
            raise UnavailableError("the peer node is slow", reason=REASON) from error
        except InvalidRequestError as error:
            raise UnavailableError(error.message, reason=REASON) from error


async def _open(address: str, layout: KvLayoutInfo) -> _Session | None:
    """Attach and map; None if the peer's arena is on another machine."""
    client = KvNodeClient(address, _WORKER_ID, layout)
    try:
        info = await client.attach()
        view = ArenaView(info.arena_path, info.arena_bytes)
    except BaseException as error:
        await client.close()
        is_elsewhere = isinstance(error, OSError) and not isinstance(error, TimeoutError)
        if is_elsewhere or getattr(error, "reason", "") == NOT_HERE_REASON:
            return None
        raise
    return _Session(client, view, asyncio.create_task(_follow(client), name="peer-session"))


async def _follow(client: KvNodeClient) -> None:
    with suppress(UnavailableError):
        await client.follow()


def _copy(view: ArenaView, block: PinnedBlock, layout: KvLayoutInfo) -> FetchedBlock:
    data = bytes(view.payload(block.slot.offset, layout.block_bytes))
    header = view.header(block.slot.offset)
    is_request_scoped = header is not None and header.is_request_scoped
    return FetchedBlock(block.key, block.checksum, block.num_tokens, is_request_scoped, data)
