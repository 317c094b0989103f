"""Bounds of a mean that hold at every moment at once, so that one may look after every batch.

Differences X_i lie in [-w_i, w_i], with a weight w_i in (0, 1] that is known before X_i is. With
Xhat_i a prediction from the past, |Xhat_i| <= h w_i, and c = 1 + h, every l in (0, 1) makes

    exp(l S_t / c - psi(l) V_t / c^2),  S_t = sum(X_i - E_i-1 X_i),  V_t = sum (X_i - Xhat_i)^2,
    psi(l) = -log(1 - l) - l

a supermartingale that starts at 1 (Howard, Ramdas, McAuliffe and Sekhon 2021, "Time-uniform,
nonparametric, nonasymptotic confidence sequences", theorem 4, from Fan, Grama and Liu 2015). So is
a mixture over l, and by Ville's inequality it ever reaches 1/alpha with probability alpha at most.
The mixture here is a sum over a grid (their discrete mixtures); solving it for S_t gives the bound.
What is bounded is sum(E_i-1 X_i) / sum(w_i): the weighted mean of the differences to be expected
of the sequences seen, which may differ and depend on each other. gate.py and canary.py call this.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

_PREDICTED = 0.1
"""h: predictions beyond this are cut. Drafts differ by less on the whole, and every bit of it is
paid for by c."""
_SCALE = 1.0 + _PREDICTED
_PRIOR_WEIGHT = 1.0
"""Of a difference of 0 in a prediction."""
_RATES = tuple(0.95 * 0.6**k for k in range(8))
"""The grid of l. Each is best for some V; drafts that are compared in pairs vary little, so the
greatest counts most."""
_SHARES = tuple(0.7**k / sum(0.7**j for j in range(8)) for k in range(8))
_PSI = tuple(-math.log1p(-rate) - rate for rate in _RATES)
_MAX_STEPS = 50


@dataclass(frozen=True, slots=True)
class Bounds:
    """A mean and where the truth is; each bound alone fails with probability alpha at most."""

    mean: float
    low: float
    high: float


class RunningMean:
    """Differences as they come, with bounds of their weighted mean."""

    def __init__(self) -> None:
        self.weight = 0.0
        """Sum of weights."""
        self._sum = 0.0
        self._variance = 0.0
        self._past: dict[Hashable, tuple[float, float]] = {}
        self._known: dict[float, Bounds] = {}

    def note(self, difference: float, weight: float, group: Hashable = None) -> None:
        """Take a difference in [-1, 1] and its weight in (0, 1].

        It is predicted from those of its group, so the order among groups does not matter.
        """
        if not (abs(difference) <= 1.0 and 0.0 < weight <= 1.0):
            raise ValueError(f"difference {difference}, weight {weight}")
        past_sum, past_weight = self._past.get(group, (0.0, _PRIOR_WEIGHT))
        predicted = min(max(past_sum / past_weight, -_PREDICTED), _PREDICTED)
        self._past[group] = (past_sum + weight * difference, past_weight + weight)
        self._known.clear()
        self.weight += weight
        self._sum += weight * difference
        self._variance += (weight * (difference - predicted)) ** 2

    def bounds(self, alpha: float) -> Bounds:
        """Return the mean and its bounds; without data they say nothing."""
        if not self.weight:
            return Bounds(0.0, -1.0, 1.0)
        if alpha not in self._known:
            mean = self._sum / self.weight
            radius = _SCALE * boundary(self._variance / _SCALE**2, alpha) / self.weight
            self._known[alpha] = Bounds(mean, max(-1.0, mean - radius), min(1.0, mean + radius))
        return self._known[alpha]


def boundary(variance: float, alpha: float) -> float:
    """Return the least s at which the mean over l of exp(l s - psi(l) variance) reaches 1/alpha.

    Newton's method from above: the logarithm of the mean is convex in s, so no step passes it.
    """
    target = -math.log(alpha)
    offsets = [math.log(share) - psi * variance for share, psi in zip(_SHARES, _PSI, strict=True)]
    # Where one term alone reaches it.
    s = min((target - offset) / rate for rate, offset in zip(_RATES, offsets, strict=True))
    for _ in range(_MAX_STEPS):
        exponents = [rate * s + offset for rate, offset in zip(_RATES, offsets, strict=True)]
        largest = max(exponents)
        terms = [math.exp(exponent - largest) for exponent in exponents]
        total = sum(terms)
        slope = sum(rate * term for rate, term in zip(_RATES, terms, strict=True)) / total
        step = (largest + math.log(total) - target) / slope
        s -= step
        if step <= 1e-9 * (1.0 + s):
            break
    return s
