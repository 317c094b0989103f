"""The contract of a way to get blocks from another node; puller.py calls it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from paceline.kvstore.values import FetchedBlock, KvLayoutInfo


class KVTransport(Protocol):
    """A way to one other node. What it yields is not verified: the receiver hashes it."""

    def fetch(
        self, keys: Sequence[bytes], layout: KvLayoutInfo, timeout_s: float
    ) -> AsyncGenerator[FetchedBlock]:
        """Yield the blocks the node has, in the order of `keys`; missing ones are left out.

        `data` of a block is valid until the next one is asked for.

        Raises:
            UnavailableError: the node cannot be reached, or took longer than `timeout_s`.
        """
        ...

    async def close(self) -> None:
        """Release connections."""
        ...
