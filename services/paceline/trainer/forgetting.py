"""What drafts unlearn: acceptance by domain of the active one against earlier ones; pure.

Forgetting after Chaudhry et al. 2018 ("Riemannian walk", section 3.2): the best there ever was less
what there is now. Transfer after Lopez-Paz and Ranzato 2017 (section 3): now less the beginning.
The trainer reports both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Forgetting:
    """Acceptance on one domain over time, each in [0, 1]."""

    now: float
    best: float
    first: float

    @property
    def forgotten(self) -> float:
        """What is lost against the best; 0 or more."""
        return self.best - self.now

    @property
    def transferred(self) -> float:
        """What is gained since the beginning; negative for a loss."""
        return self.now - self.first


def forgetting(history: Sequence[Mapping[str, float]]) -> dict[str, Forgetting]:
    """Return the figures of every domain that was ever measured.

    `history` has acceptance by domain, one mapping for each version that was active, oldest
    first. A domain that a version was not measured on keeps its last value.
    """
    found: dict[str, Forgetting] = {}
    for acceptance in history:
        for domain, value in acceptance.items():
            old = found.get(domain)
            best, first = (value, value) if old is None else (max(old.best, value), old.first)
            found[domain] = Forgetting(value, best, first)
    return found
