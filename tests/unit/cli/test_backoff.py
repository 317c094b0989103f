"""The back-off of crashed children, as a table."""

from __future__ import annotations

import pytest

from paceline.cli.backoff import BackoffPolicy, next_restart

POLICY = BackoffPolicy(first_s=0.2, factor=2.0, max_s=10.0, good_run_s=30.0)


@pytest.mark.parametrize(
    ("num_crashes", "ran_s", "delay_s", "crashes_after"),
    [
        (0, 0.0, 0.2, 1),
        (0, 29.9, 0.2, 1),
        (1, 0.1, 0.4, 2),
        (2, 5.0, 0.8, 3),
        (5, 0.0, 6.4, 6),
        (6, 0.0, 10.0, 7),
        (500, 0.0, 10.0, 501),
        (6, 30.0, 0.2, 1),
        (500, 3600.0, 0.2, 1),
    ],
)
def test_delay_doubles_up_to_its_cap_and_starts_over_after_a_good_run(
    num_crashes: int, ran_s: float, delay_s: float, crashes_after: int
) -> None:
    restart = next_restart(POLICY, num_crashes, ran_s)
    assert restart.delay_s == pytest.approx(delay_s)
    assert restart.num_crashes == crashes_after


def test_a_child_that_never_stays_up_never_waits_longer_than_the_cap() -> None:
    crashes, delays = 0, []
    for _ in range(2000):
        restart = next_restart(POLICY, crashes, 0.0)
        crashes = restart.num_crashes
        delays.append(restart.delay_s)
    assert delays == sorted(delays)
    assert max(delays) == POLICY.max_s
