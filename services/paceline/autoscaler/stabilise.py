"""What a pool gets of what it needs: up at once, down late and in steps. Pure.

    up     to what is needed, at once, unless it grew less than UP_PAUSE_S ago
    down   to the most that was needed within `down_s`, at the earliest `down_s` after the last
           change, by at most half of the pool

So in any hour a pool shrinks at most 3600 / down_s + 1 times and changes direction at most twice
as often, whatever the signal does; and it grows at most 3600 / UP_PAUSE_S + 1 times.
"""

from __future__ import annotations

import math
from collections import deque

UP_PAUSE_S = 15.0
"""A burst shows itself over some samples; one order then does instead of three."""
DOWN_S = 120.0
"""Short, because growing again costs the start-up time alone: streams are handed over and their
KV stays in the store. The memory of bursts is the forecast's."""


class Stabiliser:
    """One pool's."""

    def __init__(self, down_s: float = DOWN_S) -> None:
        self._down_s = down_s
        self._needed: deque[tuple[float, int]] = deque()
        self._grew_s = self._changed_s = -math.inf
        self._since_s: float | None = None

    def settle(self, at_s: float, current: int, needed: int) -> int:
        """Return the size to have now."""
        if self._since_s is None:
            self._since_s = at_s
        self._needed.append((at_s, needed))
        while self._needed[0][0] < at_s - self._down_s:
            self._needed.popleft()
        size = current
        if needed > current:
            if at_s - self._grew_s >= UP_PAUSE_S:
                size, self._grew_s = needed, at_s
        elif needed < current:
            size = self._shrunk(at_s, current)
        if size != current:
            self._changed_s = at_s
        return size

    def _shrunk(self, at_s: float, current: int) -> int:
        # Before the first window is over nobody knows what was needed within it.
        quiet_s = at_s - max(self._changed_s, self._since_s or 0.0)
        if quiet_s < self._down_s:
            return current
        highest = max(count for _, count in self._needed)
        return min(current, max(highest, current // 2))

    def note_forced(self, at_s: float) -> None:
        """Take that the size was changed for another reason, such as going to zero."""
        self._changed_s = at_s
        self._needed.clear()
