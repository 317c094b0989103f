"""Searches for the sublayers that a model misses least; layer_skip.py scores them.

Xia et al. 2025, SWIFT, section 4.1: attentions and MLPs count apart, the first and the last
layer always stay, the search begins with every second layer. Sets have the size of the first
one, about 0.45 of all sublayers, so that each drafts in the same time. In place of Bayesian
optimisation: now and then any set, else the best one with a sublayer or two exchanged.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from paceline.engine.models.config import UnsupportedModelError

SkipSet = Sequence[tuple[bool, bool]]
"""For each layer, whether its attention and its MLP are left out."""

_GOOD_MATCHNESS = 0.93
"""Where the search ends (SWIFT stops between 0.93 and 0.95)."""
_MAX_VAIN_TRIALS = 300
_RANDOM_RATIO = 0.2
_DECISIVE_LEAD = 0.15
"""Summed over the texts that a set is tried on: 5 of 32 tokens. One text alone says little, and
a set that won by chance would be kept until another one does."""
_MAX_EXCHANGED = 2


class SkipSearch:
    """The best set so far, and trials of others."""

    def __init__(
        self, num_layers: int, rng: random.Random, *, first: SkipSet | None = None
    ) -> None:
        """Begin with every second layer, or with a given set.

        Raises:
            UnsupportedModelError: nothing can be left out between first and last layer.
        """
        if first is None and num_layers < 3:
            raise UnsupportedModelError(
                f"{num_layers} layers: layer-skip leaves out layers between the first and the last"
            )
        if first is None:
            inner = range(1, num_layers - 1)
            first = [(i in inner and i % 2 == 1,) * 2 for i in range(num_layers)]
        self._rng = rng
        self.best: SkipSet = tuple(first)
        self.matchness: float | None = None
        """Of the best set at its latest trial: share of tokens that it would have got right."""
        self.num_trials = 0
        self._num_vain = 0
        self._challenger: SkipSet | None = None
        self._lead = 0.0

    @property
    def is_done(self) -> bool:
        """Whether the set is good enough, or nothing better has been found for long."""
        is_good = self.matchness is not None and self.matchness >= _GOOD_MATCHNESS
        return is_good or self._num_vain >= _MAX_VAIN_TRIALS or not self._can_vary()

    def try_one(self, score: Callable[[SkipSet], float]) -> None:
        """Compare another set with the best one on the same text.

        It is tried on further texts while it leads, and takes over when it leads by enough.

        Args:
            score: matchness of a set, in [0, 1]; called once for each of the two.
        """
        other = self._challenger or self._propose()
        self.matchness, theirs = score(self.best), score(other)
        self.num_trials += 1
        self._num_vain += 1
        self._lead += theirs - self.matchness
        self._challenger = other if 0.0 < self._lead < _DECISIVE_LEAD else None
        if self._lead >= _DECISIVE_LEAD:
            self.best, self.matchness, self._num_vain = other, theirs, 0
        if self._challenger is None:
            self._lead = 0.0

    def _propose(self) -> SkipSet:
        return self._random() if self._rng.random() < _RANDOM_RATIO else self._mutated()

    def _can_vary(self) -> bool:
        return 0 < len(self._skipped()) < self._num_choices()

    def _num_choices(self) -> int:
        return 2 * (len(self.best) - 2)

    def _skipped(self) -> list[int]:
        """Return the sublayers left out, numbered from the second layer's attention on."""
        flat = [flag for layer in self.best[1:-1] for flag in layer]
        return [i for i, is_left_out in enumerate(flat) if is_left_out]

    def _random(self) -> SkipSet:
        return self._set_of(self._rng.sample(range(self._num_choices()), len(self._skipped())))

    def _mutated(self) -> SkipSet:
        skipped = self._skipped()
        kept = [i for i in range(self._num_choices()) if i not in skipped]
        count = min(self._rng.randint(1, _MAX_EXCHANGED), len(skipped), len(kept))
        gone = self._rng.sample(skipped, count)
        return self._set_of([i for i in skipped if i not in gone] + self._rng.sample(kept, count))

    def _set_of(self, skipped: Sequence[int]) -> SkipSet:
        inner = [(2 * i in skipped, 2 * i + 1 in skipped) for i in range(len(self.best) - 2)]
        return (self.best[0], *inner, self.best[-1])
