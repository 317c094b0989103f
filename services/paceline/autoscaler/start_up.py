"""How long a replica takes from being asked for to taking requests: learned, with a prior. Pure."""

from __future__ import annotations

from collections import deque

from paceline.autoscaler.forecast import weighted_quantile
from paceline.autoscaler.values import Pool

_KEPT = 8
"""Starts that count: a changed image or node pool is known after some."""
_QUANTILE = 0.8
"""Late replicas are what hurts."""
_MOST_RATIO = 10.0
"""Starts that took more than so many times the prior waited for a machine, and say nothing of
how long the next one takes."""


class StartUpTracker:
    """Watches one pool: requests for replicas, and workers that appear."""

    def __init__(self, prior_s: float) -> None:
        self._prior_s = prior_s
        self._asked: deque[float] = deque()
        self._known: set[str] | None = None
        self._requested = 0
        self._took: deque[float] = deque(maxlen=_KEPT)

    @property
    def start_up_s(self) -> float:
        """The time to expect; the prior until a start was seen, and one sample of it then."""
        samples = (self._prior_s, *self._took)
        return weighted_quantile(((s, 1.0) for s in samples), _QUANTILE)

    def note(self, at_s: float, pool: Pool) -> None:
        """Take what a pool is at a moment."""
        ids = {worker.id for worker in pool.workers}
        if self._known is None:
            self._known, self._requested = ids, pool.requested
            return
        new = [worker for worker in pool.workers if worker.id not in self._known]
        for worker in sorted(new, key=lambda w: -w.age_s):
            if self._asked:
                took_s = at_s - worker.age_s - self._asked.popleft()
                if 0.0 <= took_s <= max(1.0, self._prior_s) * _MOST_RATIO:
                    self._took.append(took_s)
        for _ in range(max(0, pool.requested - self._requested)):
            self._asked.append(at_s)
        # Those that start last are ended first.
        while len(self._asked) > pool.starting:
            self._asked.pop()
        self._known, self._requested = ids, pool.requested
