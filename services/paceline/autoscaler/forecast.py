"""What a load will be at a horizon, as a quantile, from what it was. Pure.

Forecasters learn one series, sampled in order of time, with gaps of any length: `observe` takes a
value, finite and not negative, and how many requests met it; `predict` returns what the value at a
horizon does not exceed with a probability: never negative, never NaN, 0 before the first value.

policies/slo.py asks for it over the time that a new replica takes to be ready; what would be
needed later can still be asked for later.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

KEEP_S = 900.0
"""How far back a forecast looks: long enough for 20 bursts that come every minute or less, short
enough to follow the hours of a day."""


TREND_KEEP_S = 1800.0
"""How far back a regression looks: it takes more to fit a line than to know the highest values,
and where that changes it, over loads that come and go in waves of minutes, it errs less."""


class RecentQuantileForecaster:
    """The quantile of what was seen lately, each value as often as requests met it.

    Knows no trend. For loads that switch between levels faster than replicas start, the next
    burst is best guessed as one of the last ones.
    """

    def __init__(self, keep_s: float = KEEP_S) -> None:
        self._keep_s = keep_s
        self._seen: deque[tuple[float, float, float]] = deque()

    def observe(self, at_s: float, value: float, weight: float = 1.0) -> None:
        """Take a value."""
        self._seen.append((at_s, value, weight))
        while self._seen[0][0] < at_s - self._keep_s:
            self._seen.popleft()

    def predict(self, horizon_s: float, quantile: float) -> float:
        """Return the quantile, the same for every horizon."""
        return weighted_quantile(((v, w) for _, v, w in self._seen), quantile)

    def variation(self) -> float:
        """Return standard deviation over mean of the values, each counted once."""
        num = len(self._seen)
        mean = sum(value for _, value, _ in self._seen) / max(1, num)
        if mean <= 0:
            return 0.0
        square = sum((value - mean) ** 2 for _, value, _ in self._seen) / num
        return math.sqrt(square) / mean


class RegressionForecaster:
    """Value at the horizon, regressed on the value now, with the errors it made lately.

        value(t + h) = a + b * value(t) + error

    fitted by least squares to all pairs of the last `keep_s` that lie `h` apart, once per
    prediction: a direct forecast, without iterating one-step errors (Marcellino, Stock and Watson
    2006, "A comparison of direct and iterated multistep AR methods"). b near 1 is a load that
    stays where it is or, with a, ramps; b near 0 one that forgets within the horizon. b is kept
    within 0 and 1, so that no forecast runs away. The quantile of errors, not a multiple of their
    deviation, is added: loads are skewed.
    """

    def __init__(self, keep_s: float = TREND_KEEP_S) -> None:
        self._keep_s = keep_s
        self._seen: deque[tuple[float, float]] = deque()

    def observe(self, at_s: float, value: float, weight: float = 1.0) -> None:
        """Take a value."""
        self._seen.append((at_s, value))
        while self._seen[0][0] < at_s - self._keep_s:
            self._seen.popleft()

    def predict(self, horizon_s: float, quantile: float) -> float:
        """Return the forecast; the highest or last value while pairs are few."""
        if not self._seen:
            return 0.0
        last = self._seen[-1][1]
        pairs = _pairs(self._seen, horizon_s)
        if len(pairs) < _FEWEST_PAIRS:
            values = [value for _, value in self._seen]
            return max(last, weighted_quantile(((v, 1.0) for v in values), quantile))
        slope, base = _line(pairs)
        errors = ((after - base - slope * before, 1.0) for before, after in pairs)
        return max(0.0, base + slope * last + weighted_quantile(errors, quantile))


_FEWEST_PAIRS = 12
"""A line and a quantile of errors from fewer say little."""


def _pairs(seen: Iterable[tuple[float, float]], horizon_s: float) -> list[tuple[float, float]]:
    """Return (value, value at the horizon behind it) of all moments that have both."""
    samples = list(seen)
    pairs, j = [], 0
    for at_s, value in samples:
        while j < len(samples) and samples[j][0] < at_s + horizon_s:
            j += 1
        if j == len(samples):
            break
        pairs.append((value, samples[j][1]))
    return pairs


def _line(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    """Return slope, within 0 and 1, and base of the line through the pairs."""
    n = len(pairs)
    mean_x = sum(x for x, _ in pairs) / n
    mean_y = sum(y for _, y in pairs) / n
    var = sum((x - mean_x) ** 2 for x, _ in pairs)
    cov = sum((x - mean_x) * (y - mean_y) for x, y in pairs)
    slope = min(1.0, max(0.0, cov / var)) if var > 1e-12 * max(1.0, mean_x**2) else 0.0
    return slope, mean_y - slope * mean_x


def weighted_quantile(pairs: Iterable[tuple[float, float]], quantile: float) -> float:
    """Return the smallest value whose weight, with all below, is that share; 0 of nothing."""
    ordered = sorted(pair for pair in pairs if pair[1] > 0 and math.isfinite(pair[0]))
    total = sum(weight for _, weight in ordered)
    reached = 0.0
    for value, weight in ordered:
        reached += weight
        if reached >= quantile * total - 1e-9 * total:
            return value
    return ordered[-1][0] if ordered else 0.0
