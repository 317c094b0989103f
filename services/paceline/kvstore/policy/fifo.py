"""Oldest block first: the plain policy that others are measured against."""

from __future__ import annotations

from collections.abc import Callable


class Fifo:
    """Evicts in order of arrival, whatever was used."""

    def __init__(self) -> None:
        # A dict keeps insertion order and removes from the middle in O(1).
        self._queue: dict[bytes, None] = {}

    def admit(self, key: bytes) -> None:
        """Append a block."""
        self._queue[key] = None

    def touch(self, key: bytes) -> None:
        """Ignore the use."""

    def remove(self, key: bytes) -> None:
        """Forget a block."""
        self._queue.pop(key, None)

    def victims(self, count: int, is_evictable: Callable[[bytes], bool]) -> list[bytes]:
        """Choose the oldest evictable blocks."""
        chosen: list[bytes] = []
        for key in self._queue:
            if len(chosen) == count:
                break
            if is_evictable(key):
                chosen.append(key)
        for key in chosen:
            del self._queue[key]
        return chosen

    def __len__(self) -> int:
        """Return the number of known blocks."""
        return len(self._queue)
