"""What a drafter's confidence is worth: the share of nodes accepted, by confidence.

A drafter says how sure it is of a token; how often such tokens are accepted is counted, by
bins of confidence, and that share is what trees are built and cut by (DySpec's estimate of
acceptance by draft probability, with the probability measured instead of assumed).
"""

from __future__ import annotations

import math
from bisect import bisect_right

_BORDERS = tuple(1.0 / (1.0 + math.exp(-log_odds)) for log_odds in range(-5, 6))
"""Of the bins: even steps in log-odds, so that what is nearly sure is told apart too."""
_NUM_BINS = len(_BORDERS) + 1
_PRIOR_WEIGHT = 4.0
"""Nodes for which the prior stands in."""
_DECAY = 0.998
"""What is left of a count after each further node of its bin: a memory of some 500."""

_COPIED_SHARE = 0.25


class Calibration:
    """Acceptance by confidence, forgetting slowly."""

    def __init__(self) -> None:
        """Start from the confidences themselves."""
        self._accepted = [0.0] * _NUM_BINS
        self._tried = [0.0] * _NUM_BINS

    def copy(self) -> Calibration:
        """Return one that starts from what this one knows, less sure of it."""
        copy = Calibration()
        copy._accepted = [_COPIED_SHARE * count for count in self._accepted]
        copy._tried = [_COPIED_SHARE * count for count in self._tried]
        return copy

    def rate(self, confidence: float) -> float:
        """Return the probability that a child of this confidence is accepted, in [0, 1]."""
        i = _bin(confidence)
        prior = min(max(confidence, 0.0), 1.0)
        return (self._accepted[i] + _PRIOR_WEIGHT * prior) / (self._tried[i] + _PRIOR_WEIGHT)

    def add(self, confidence: float, is_accepted: bool) -> None:
        """Count a node whose parent was accepted."""
        i = _bin(confidence)
        self._tried[i] = self._tried[i] * _DECAY + 1.0
        self._accepted[i] = self._accepted[i] * _DECAY + is_accepted


def _bin(confidence: float) -> int:
    return bisect_right(_BORDERS, confidence)
