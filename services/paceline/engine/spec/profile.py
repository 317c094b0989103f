"""What an arm's drafts are worth, whatever the load: the statistics that choices rest on.

`values[i]` is the mean value (probability of being accepted) of the i-th best node of a draft, 0
where drafts had fewer; `trust` is how many tokens were accepted for each that was promised. Both
forget, so that they follow the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_FIRST_ROUNDS = 4
"""Rounds in which a mean is plain, before it forgets."""
_TRUST_WEIGHT = 4.0
"""Tokens promised and kept to begin with."""
_TIME_RATE, _FALLING_TIME_RATE = 0.05, 0.3
"""Weights of the newest call in mean times."""


class Profile:
    """Means over drafts before they are cut."""

    __slots__ = ("_accepted", "_promised", "_rate", "num_drafts", "values")

    def __init__(self, rate: float) -> None:
        """`rate` is the weight of the newest draft."""
        self.num_drafts = 0
        self.values: list[float] = []
        self._rate = rate
        self._promised = self._accepted = _TRUST_WEIGHT

    def copy(self, rate: float) -> Profile:
        """Return a profile that starts from this one and forgets at another rate."""
        profile = Profile(rate)
        profile.num_drafts = self.num_drafts
        profile.values = list(self.values)
        # As sure of it as of a few tokens.
        profile._accepted = _TRUST_WEIGHT * self.trust
        return profile

    def renew(self) -> None:
        """Count as new: learn fast, expecting what was expected until then."""
        self.num_drafts = 0
        self._promised = self._accepted = _TRUST_WEIGHT

    def note(self, values: Sequence[float]) -> None:
        """Count a draft as it was proposed, cut or not."""
        self.num_drafts += 1
        weight = max(self._rate, 1.0 / min(self.num_drafts, _FIRST_ROUNDS))
        kept = 1.0 - weight
        mean = [kept * value for value in self.values]
        mean += [0.0] * (len(values) - len(mean))
        for i, value in enumerate(sorted(values, reverse=True)):
            mean[i] += weight * value
        self.values = mean

    def settle(self, promised: float, num_accepted: int) -> None:
        """Count what was verified of a draft: the sum of its values, and what came of it."""
        kept = 1.0 - self._rate
        self._promised = kept * self._promised + promised
        self._accepted = kept * self._accepted + num_accepted

    @property
    def trust(self) -> float:
        """Tokens accepted for each one promised."""
        weight = _TRUST_WEIGHT
        return (self._accepted + weight) / (self._promised + weight)


class DraftTimes:
    """Seconds that an arm takes to draft for so many sequences together."""

    __slots__ = ("_level_s", "_seconds")

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._level_s: dict[int, float] = {}

    def note(self, num_sequences: int, levels: int, seconds: float) -> None:
        """Count a call that brought trees of so many levels at most."""
        size = num_sequences.bit_length()
        before = self._seconds.get(size, seconds)
        self._seconds[size] = before + _TIME_RATE * (seconds - before)
        # Now and then a call has a whole prompt to catch up with, often the very first: that is
        # not what one more level costs.
        each_s = seconds / levels
        before = self._level_s.get(size, each_s)
        rate = _TIME_RATE if each_s > before else _FALLING_TIME_RATE
        self._level_s[size] = before + rate * (min(each_s, 2.0 * before) - before)

    def level_s(self, num_sequences: int) -> float:
        """Return the expected seconds of one level, were all of a call's time spent on levels."""
        return _nearest(self._level_s, num_sequences)

    def of(self, num_sequences: int) -> float:
        """Return the expected seconds; 0 where nothing was measured yet."""
        return _nearest(self._seconds, num_sequences)


def _nearest(known: Mapping[int, float], num_sequences: int) -> float:
    if not known:
        return 0.0
    size = num_sequences.bit_length()
    nearest = min(known, key=lambda other: abs(other - size))
    # Somewhere between once for all and once for each.
    scale: float = 2.0 ** (0.5 * (size - nearest))
    return known[nearest] * scale
