"""What a histogram's buckets say: how many, a quantile, the share within a bound. Pure.

The same arithmetic as PromQL's `histogram_quantile`: within a bucket, observations are taken to
be spread evenly.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Buckets:
    """Observations (or their rate) up to each bound, cumulative."""

    bounds: tuple[float, ...]
    """Rising; the last one is infinite."""
    counts: tuple[float, ...]

    @classmethod
    def of(cls, counts: Mapping[float, float]) -> Buckets:
        """Return buckets by bound.

        Raises:
            ValueError: they are not a cumulative histogram that ends at infinity.
        """
        bounds = tuple(sorted(counts))
        values = [counts[bound] for bound in bounds]
        if len(bounds) < 2 or bounds[-1] != math.inf:
            raise ValueError("a histogram without its last bucket")
        if not all(math.isfinite(value) and value >= 0 for value in values):
            raise ValueError("a histogram with counts that are no counts")
        slack = _ROUNDING * max(values)
        if any(b < a - slack for a, b in pairwise(values)):
            raise ValueError("a histogram whose buckets do not add up")
        return cls(bounds, tuple(values))

    @property
    def total(self) -> float:
        """All observations."""
        return self.counts[-1]

    def quantile(self, share: float) -> float | None:
        """Return the value below which `share` of observations lie; None without any.

        Beyond the last finite bound nothing is known: then it is that bound.
        """
        if self.total <= 0:
            return None
        rank = share * self.total
        i = min(bisect_left(self.counts, rank), len(self.counts) - 1)
        if i == len(self.bounds) - 1:
            return self.bounds[-2]
        low, below = self._start(i)
        inside = self.counts[i] - below
        return low + (self.bounds[i] - low) * ((rank - below) / inside if inside > 0 else 1.0)

    def share_within(self, bound: float) -> float | None:
        """Return the share of observations up to `bound`; None without any.

        Exact where `bound` is a bucket's, else interpolated; between the last finite bound and
        infinity nobody counts as within.
        """
        if self.total <= 0:
            return None
        i = bisect_left(self.bounds, bound)
        low, below = self._start(i)
        if math.isinf(self.bounds[i]):
            return min(1.0, below / self.total)
        part = (bound - low) / (self.bounds[i] - low) if self.bounds[i] > low else 1.0
        return min(1.0, (below + (self.counts[i] - below) * part) / self.total)

    def _start(self, i: int) -> tuple[float, float]:
        """Return where a bucket begins and how many lie in front of it."""
        return (self.bounds[i - 1], self.counts[i - 1]) if i else (0.0, 0.0)
