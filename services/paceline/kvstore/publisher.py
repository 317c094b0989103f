"""Keeps the index true to the books: new and evicted blocks, leases, recovery of lost data.

Changes wait in a bounded table, the last word per block; if too many wait, or Redis turns
out to have lost the node's lease, everything the node holds is published anew. Redis being
away stops nothing else.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from paceline.domain.errors import UnavailableError
from paceline.kvstore.index import ENTRY_TTL_S, MAX_KEYS_PER_CALL, BlockIndex
from paceline.process.membership import FencedError

logger = logging.getLogger(__name__)

MAX_PENDING = 65_536
"""Changes that wait for Redis; about 10 MB."""

LEASE_S = 3.0
RENEW_S = 0.5
"""Also the time after which data lost by Redis is noticed."""

_RETRY_S = 0.25


class Publisher:
    """Publishes the blocks of one node."""

    def __init__(
        self,
        index: BlockIndex,
        node_id: str,
        *,
        get_epoch: Callable[[], int | None],
        get_roots: Callable[[], Sequence[bytes]],
        get_keys: Callable[[bytes], Sequence[bytes]],
        lease_s: float = LEASE_S,
        renew_s: float = RENEW_S,
    ) -> None:
        """`get_epoch` is None until the node is registered; `get_keys(root)` is all it holds."""
        self._index = index
        self._node_id = node_id
        self._get_epoch = get_epoch
        self._get_roots = get_roots
        self._get_keys = get_keys
        self._lease_s = lease_s
        self._renew_s = renew_s
        self._pending: dict[tuple[bytes, bytes], bool] = {}
        self._wake = asyncio.Event()
        self._epoch: int | None = None
        self._renewed_s: dict[bytes, float] = {}
        self._published_s: dict[bytes, float] = {}
        self._stale_roots: set[bytes] = set()
        self._is_connected = True
        self.num_rebuilds = 0
        """Times that all blocks of a layout were published anew."""

    @property
    def num_pending(self) -> int:
        """Changes that wait for Redis."""
        return len(self._pending)

    @property
    def is_connected(self) -> bool:
        """Whether the last attempt reached Redis."""
        return self._is_connected

    def note(self, kv_root: bytes, key: bytes, is_readable: bool) -> None:
        """Note that a block became readable here, or is not any more."""
        if len(self._pending) >= MAX_PENDING:
            self._stale_roots.update(root for root, _ in self._pending)
            self._pending.clear()
        self._pending[kv_root, key] = is_readable
        self._wake.set()

    async def run(self) -> None:
        """Publish until cancelled.

        Raises:
            FencedError: another process took the node's id over.
        """
        while True:
            try:
                async with asyncio.timeout(self._renew_s):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            epoch = self._get_epoch()
            if epoch is None:
                continue
            try:
                await self._round(epoch)
                self._note_state(True)
            except FencedError:
                raise
            except UnavailableError as error:
                self._note_state(False, error.message)
                await asyncio.sleep(_RETRY_S)
                self._wake.set()

    async def clear(self, timeout_s: float) -> None:
        """Take everything back before the node stops; without Redis it expires by itself."""
        if self._epoch is None:
            return
        try:
            async with asyncio.timeout(timeout_s):
                for root in self._get_roots():
                    await self._index.clear(root, self._node_id, self._epoch)
        except (UnavailableError, TimeoutError):
            logger.info("index-not-cleared")

    async def _round(self, epoch: int) -> None:
        now_s = asyncio.get_running_loop().time()
        roots = list(self._get_roots())
        if epoch != self._epoch:
            self._epoch = epoch
            self._stale_roots.update(roots)
        for root in roots:
            if now_s - self._renewed_s.get(root, -self._renew_s) >= self._renew_s:
                if not await self._index.renew(root, self._node_id, epoch, self._lease_s):
                    self._stale_roots.add(root)
                self._renewed_s[root] = now_s
        while self._stale_roots:
            root = next(iter(self._stale_roots))
            await self._resync(root, epoch)
            self._stale_roots.discard(root)
        for root in roots:
            # Long before the entries expire.
            if now_s - self._published_s.get(root, now_s) > ENTRY_TTL_S / 3:
                await self._publish_all(root, epoch)
        await self._flush(epoch)

    async def _resync(self, root: bytes, epoch: int) -> None:
        await self._index.clear(root, self._node_id, epoch)
        await self._index.renew(root, self._node_id, epoch, self._lease_s)
        num_keys = await self._publish_all(root, epoch)
        self.num_rebuilds += 1
        logger.info("index-rebuilt", extra={"fields": {"root": root.hex(), "blocks": num_keys}})

    async def _publish_all(self, root: bytes, epoch: int) -> int:
        keys = list(self._get_keys(root))
        # A block evicted meanwhile is withdrawn by its pending change.
        for start in range(0, len(keys), MAX_KEYS_PER_CALL):
            chunk = keys[start : start + MAX_KEYS_PER_CALL]
            await self._index.publish(root, self._node_id, epoch, chunk)
            await self._index.renew(root, self._node_id, epoch, self._lease_s)
        self._published_s[root] = asyncio.get_running_loop().time()
        return len(keys)

    async def _flush(self, epoch: int) -> None:
        batch, self._pending = self._pending, {}
        groups: dict[tuple[bytes, bool], list[bytes]] = {}
        for (root, key), is_readable in batch.items():
            groups.setdefault((root, is_readable), []).append(key)
        try:
            for (root, is_readable), keys in groups.items():
                send = self._index.publish if is_readable else self._index.withdraw
                await send(root, self._node_id, epoch, keys)
        except UnavailableError:
            self._pending = batch | self._pending
            raise

    def _note_state(self, is_connected: bool, error: str = "") -> None:
        if is_connected == self._is_connected:
            return
        self._is_connected = is_connected
        if is_connected:
            logger.info("index-connected")
        else:
            logger.warning("index-lost", extra={"fields": {"error": error}})
