"""The contract of an eviction policy; store.py calls it, one instance per layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class KVPolicy(Protocol):
    """Orders the readable blocks of one layout. No I/O, no clock: calls are its time."""

    def admit(self, key: bytes) -> None:
        """Note a block that became readable; it is not known yet."""
        ...

    def touch(self, key: bytes) -> None:
        """Note a use of a known block."""
        ...

    def remove(self, key: bytes) -> None:
        """Forget a block that went for another reason than eviction; unknown keys are ignored."""
        ...

    def victims(self, count: int, is_evictable: Callable[[bytes], bool]) -> list[bytes]:
        """Choose and forget up to `count` blocks, fewer only if no more are evictable."""
        ...

    def __len__(self) -> int:
        """Return the number of known blocks."""
        ...
