"""The virtual clock: what happens when, in order, ties in the order they were asked for."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class EventQueue:
    """Calls functions at moments of a time that only moves by doing so."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._num_asked = 0

    def at(self, at_s: float, call: Callable[..., None], *args: Any) -> None:
        """Have a function called; what is due already comes next, behind what was due before."""
        self._num_asked += 1
        heapq.heappush(self._heap, (max(at_s, self.now_s), self._num_asked, call, args))

    def run(self, is_over: Callable[[], bool]) -> None:
        """Go on until the end, or until nothing is left to happen."""
        heap = self._heap
        while heap and not is_over():
            self.now_s, _, call, args = heapq.heappop(heap)
            call(*args)
