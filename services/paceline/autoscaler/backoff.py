"""When to ask a target again that refused. Pure but for the randomness it is given."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

_MAX_EXPONENT = 16


@dataclass(frozen=True, slots=True)
class BackoffRules:
    """Exponential, with jitter."""

    first_s: float = 1.0
    max_s: float = 60.0
    """Also the wait after refusals that do not pass by themselves."""


class Backoff:
    """Waits of one kind of call."""

    def __init__(self, rules: BackoffRules, random: Random) -> None:
        self._rules = rules
        self._random = random
        self._num_failures = 0
        self._next_s = float("-inf")

    def wait_s(self, now_s: float) -> float:
        """Return how long the next try has to wait; 0 if it may be made now."""
        return max(0.0, self._next_s - now_s)

    def note_success(self) -> None:
        """Start over."""
        self._num_failures = 0
        self._next_s = float("-inf")

    def note_failure(self, now_s: float, *, is_retryable: bool, retry_after_s: float) -> None:
        """Set the next try: half to all of the exponential wait, and not before it is welcome."""
        rules = self._rules
        exponent = min(self._num_failures, _MAX_EXPONENT) if is_retryable else _MAX_EXPONENT
        delay_s = min(rules.first_s * 2.0**exponent, rules.max_s) * self._random.uniform(0.5, 1.0)
        self._num_failures += 1
        self._next_s = now_s + max(delay_s, retry_after_s)
