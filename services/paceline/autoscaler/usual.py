"""What a request is usually like: its sizes, averaged over requests of the last minutes. Pure.

A window with three requests says little about the fourth. Rates are not smoothed here: how many
come is the forecast's matter.
"""

from __future__ import annotations

from dataclasses import replace

from paceline.autoscaler.capacity import known
from paceline.autoscaler.values import Traffic

HALF_LIFE_S = 300.0
"""Kinds of requests change slower than their number."""
_SIZES = (
    "prompt_tokens",
    "prompt_tokens_p95",
    "cached_ratio",
    "output_tokens",
    "emitted_per_step",
    "nodes_per_step",
)
_TINY = 1e-9


class UsualTraffic:
    """Averages, each sample as heavy as it has requests."""

    def __init__(self) -> None:
        self._sums = dict.fromkeys(_SIZES, 0.0)
        self._weight = 0.0
        self._at_s: float | None = None

    def note(self, at_s: float, traffic: Traffic) -> Traffic:
        """Take a sample, and return it with usual sizes."""
        passed_s = 0.0 if self._at_s is None else max(0.0, at_s - self._at_s)
        self._at_s = at_s
        kept = 0.5 ** (passed_s / HALF_LIFE_S)
        # A sample without requests repeats older sizes; it weighs next to nothing.
        weight = known(traffic.requests_per_s) + _TINY
        self._weight = self._weight * kept + weight
        for name in _SIZES:
            value = known(getattr(traffic, name))
            self._sums[name] = self._sums[name] * kept + weight * value
        return replace(traffic, **{name: self._sums[name] / self._weight for name in _SIZES})
