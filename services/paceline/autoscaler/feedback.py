"""What the model does not know, learned from what clients got. Pure.

Where fewer requests are in time than the goal though a pool had all that the model asked for, the
model is wrong: bursts within a window, slow machines, other tenants. A factor on its demand then
grows by what was missed, and decays while nothing is:

    log factor += GAIN * share of recent requests that this sample is * (missed - allowed)
    log factor halves every HALF_LIFE_S

within 1 and MOST. Moving a threshold by its misses reaches the goal whatever the load's
distribution (Gibbs and Candes 2021, "Adaptive conformal inference under distribution shift", eq.
2); here the steps are bounded, so that no bad minute is worth more than the factor MOST.

A sample counts only where it says something about the model: while requests were seen to wait
within its window (what is late without a queue is late at any size), and while nobody starts and
all workers are older than the window (what a cold worker missed is no matter of size).
"""

from __future__ import annotations

import math
from collections import deque

from paceline.autoscaler.values import Pool

GAIN = 10.0
"""A tenth of recent requests missed makes e times as much: 8 % are one burst of twelve."""
HALF_LIFE_S = 1800.0
"""Twice what forecasts remember."""
MOST = 1.5
"""What is still missed beyond is not mended by more replicas of the same."""
_RECENT_S = 900.0
_FEWEST = 50.0
"""Requests that recent ones are counted as at least: single ones are no share of anything."""


class Correction:
    """The factor of one pool."""

    def __init__(self) -> None:
        self._log = 0.0
        self._at_s: float | None = None
        self._recent: deque[tuple[float, float]] = deque()
        self._queued_s = -math.inf

    @property
    def factor(self) -> float:
        """What the model's demand is to be multiplied with."""
        return math.exp(self._log)

    def note(
        self,
        at_s: float,
        pool: Pool,
        within_ratio: float | None,
        allowed_ratio: float,
        requests_per_s: float,
        window_s: float,
        *,
        is_queued: bool,
    ) -> None:
        """Take a sample; `allowed_ratio` is the share that may miss."""
        if is_queued:
            self._queued_s = at_s
        passed_s = 0.0 if self._at_s is None else max(0.0, at_s - self._at_s)
        self._at_s = at_s
        self._log *= 0.5 ** (passed_s / HALF_LIFE_S)
        num = requests_per_s * min(passed_s, window_s)
        self._recent.append((at_s, num))
        while self._recent[0][0] < at_s - _RECENT_S:
            self._recent.popleft()
        if within_ratio is None or not 0.0 <= within_ratio <= 1.0:
            return
        # A window reaches back a little further, by the age of what Prometheus has.
        if at_s - self._queued_s > 2 * window_s or not _is_settled(pool, window_s):
            return
        share = num / max(_FEWEST, sum(n for _, n in self._recent))
        missed = max(0.0, (1.0 - within_ratio) - allowed_ratio)
        self._log = min(math.log(MOST), self._log + GAIN * share * missed)


def _is_settled(pool: Pool, window_s: float) -> bool:
    ages = [worker.age_s for worker in pool.workers if not worker.is_draining]
    return pool.starting == 0 and bool(ages) and min(ages) >= window_s
