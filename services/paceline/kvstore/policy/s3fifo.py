"""S3-FIFO (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023).

Three queues. New blocks enter `small`; those used again before its end move to `main`, the
others leave early, so that prompts seen once do not push out shared prefixes. Keys that left
`small` are remembered in `ghost` for a while and enter `main` when they come back.
"""

from __future__ import annotations

from collections.abc import Callable

SMALL_RATIO = 0.1
"""Share of `small`; the paper finds 10 % best over its traces."""

MAX_USES = 3
"""Uses beyond this count alike (two bits in the paper)."""


class S3Fifo:
    """The queues hold key -> uses since the key entered or was last passed over."""

    def __init__(self) -> None:
        self._small: dict[bytes, int] = {}
        self._main: dict[bytes, int] = {}
        self._ghost: dict[bytes, None] = {}

    def admit(self, key: bytes) -> None:
        """Enter a block, into `main` if it was evicted from `small` not long ago."""
        if key in self._ghost:
            del self._ghost[key]
            self._main[key] = 0
        else:
            self._small[key] = 0

    def touch(self, key: bytes) -> None:
        """Count a use."""
        queue = self._small if key in self._small else self._main
        if key in queue:
            queue[key] = min(queue[key] + 1, MAX_USES)

    def remove(self, key: bytes) -> None:
        """Forget a block, without remembering it as evicted."""
        self._small.pop(key, None)
        self._main.pop(key, None)

    def victims(self, count: int, is_evictable: Callable[[bytes], bool]) -> list[bytes]:
        """Choose blocks; each step evicts, passes over, or takes one use from a block."""
        chosen: list[bytes] = []
        # Passed-over blocks go to the end of their queue. A block gives up after MAX_USES
        # rounds in `main`, so more steps than this find only blocks that must stay.
        steps = (MAX_USES + 2) * (len(self) + 1)
        while len(chosen) < count and steps > 0 and len(self) > 0:
            steps -= 1
            if len(self._small) > SMALL_RATIO * len(self) or not self._main:
                key = self._pass_small(is_evictable)
            else:
                key = self._pass_main(is_evictable)
            if key is not None:
                chosen.append(key)
        if len(chosen) < count:
            chosen += self._take_any(count - len(chosen), is_evictable)
        return chosen

    def __len__(self) -> int:
        """Return the number of known blocks."""
        return len(self._small) + len(self._main)

    def _pass_small(self, is_evictable: Callable[[bytes], bool]) -> bytes | None:
        key = next(iter(self._small))
        uses = self._small.pop(key)
        if uses > 0:
            self._main[key] = 0
        elif is_evictable(key):
            self._remember(key)
            return key
        else:
            # In use right now: that is a use.
            self._main[key] = 1
        return None

    def _pass_main(self, is_evictable: Callable[[bytes], bool]) -> bytes | None:
        key = next(iter(self._main))
        uses = self._main.pop(key)
        if uses == 0 and is_evictable(key):
            return key
        self._main[key] = max(uses - 1, 0)
        return None

    def _take_any(self, count: int, is_evictable: Callable[[bytes], bool]) -> list[bytes]:
        keys = [key for key in [*self._small, *self._main] if is_evictable(key)][:count]
        for key in keys:
            self.remove(key)
        return keys

    def _remember(self, key: bytes) -> None:
        self._ghost[key] = None
        while len(self._ghost) > max(len(self._main), 1):
            del self._ghost[next(iter(self._ghost))]
