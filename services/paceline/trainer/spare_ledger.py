"""What a machine had to spare and what training made of it, in core seconds.

The trainer notes every moment with the answer that it got; metrics and docs/training.md name the
figures.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from paceline.trainer.spare import Grant, Moment


class SpareLedger:
    """Sums between moments; what held at one holds until the next."""

    def __init__(self) -> None:
        self.offered_s = 0.0
        """Core seconds that no busy worker claimed."""
        self.used_s = 0.0
        """Core seconds of training."""
        self.num_yields = 0
        """Times that a running grant was taken back."""
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._last: tuple[Moment, Grant] | None = None

    def note(self, moment: Moment, grant: Grant) -> None:
        """Take a moment and what was granted at it."""
        if self._last is not None:
            before, granted = self._last
            passed_s = max(0.0, moment.now_s - before.now_s)
            claimed = sum(max(1, s.threads) for s in before.workers.values() if s.is_busy)
            self.offered_s += passed_s * max(0, before.num_cores - claimed)
            running_s = min(passed_s, granted.seconds)
            self.used_s += running_s * granted.threads
            self._seconds[granted.reason] += passed_s
            if granted.threads and not grant.threads and passed_s <= granted.seconds:
                self.num_yields += 1
        self._last = (moment, grant)

    @property
    def spare_share(self) -> float:
        """Part of the spare core seconds that training used; above 1 beside workers with slack."""
        return self.used_s / self.offered_s if self.offered_s else 0.0

    @property
    def seconds_by_reason(self) -> Mapping[str, float]:
        """How long each answer held."""
        return dict(self._seconds)
