"""How long a crashed child waits for its next start. Pure; cli/child.py asks."""

from __future__ import annotations

from dataclasses import dataclass

_MAX_EXPONENT = 64
"""Far beyond any cap, and floats still hold the power after years of crashes."""


@dataclass(frozen=True, slots=True)
class BackoffPolicy:
    """Exponential back-off that forgets after a good run."""

    first_s: float = 0.2
    """Wait before the first restart: a lone crash should hardly be noticed."""
    factor: float = 2.0
    """Growth per crash in a row."""
    max_s: float = 10.0
    """Longest wait."""
    good_run_s: float = 30.0
    """A child that ran this long starts over at `first_s`."""


@dataclass(frozen=True, slots=True)
class Restart:
    """When a child starts again."""

    delay_s: float
    num_crashes: int
    """Crashes in a row, this one included."""


def next_restart(policy: BackoffPolicy, num_crashes: int, ran_s: float) -> Restart:
    """Decide about a child that ended after `ran_s`, with `num_crashes` in a row before."""
    crashes = 1 if ran_s >= policy.good_run_s else num_crashes + 1
    exponent = min(crashes - 1, _MAX_EXPONENT)
    delay_s = min(policy.first_s * policy.factor**exponent, policy.max_s)
    return Restart(delay_s, crashes)
