"""Start-up times are learned from replicas asked for and workers that appear."""

from __future__ import annotations

from dataclasses import replace

import pytest

from paceline.autoscaler.start_up import StartUpTracker
from paceline.autoscaler.values import Pool, Worker


def seen(requested: int, *ages: float) -> Pool:
    return Pool(requested, tuple(Worker(id=f"w{i}", age_s=age) for i, age in enumerate(ages)))


def test_the_prior_holds_until_a_start_was_seen() -> None:
    tracker = StartUpTracker(60.0)
    tracker.note(0.0, seen(1, 500.0))
    tracker.note(5.0, seen(2, 505.0))
    assert tracker.start_up_s == 60.0


def test_starts_take_the_place_of_the_prior() -> None:
    tracker, ages = StartUpTracker(60.0), [100.0]
    tracker.note(0.0, seen(1, *ages))
    at_s = 0.0
    for _ in range(6):
        tracker.note(at_s, seen(len(ages) + 1, *ages))
        at_s += 120.0
        # Seen 5 s after it became ready.
        ages = [age + 120.0 for age in ages] + [5.0]
        tracker.note(at_s, seen(len(ages), *ages))
    assert tracker.start_up_s == pytest.approx(115.0)


def test_workers_that_nobody_asked_for_say_nothing() -> None:
    tracker = StartUpTracker(60.0)
    tracker.note(0.0, seen(1, 100.0))
    tracker.note(500.0, replace(seen(1), workers=(Worker(id="restarted"),)))
    assert tracker.start_up_s == 60.0


def test_orders_taken_back_are_not_waited_for() -> None:
    tracker = StartUpTracker(60.0)
    tracker.note(0.0, seen(1, 100.0))
    tracker.note(5.0, seen(2, 105.0))
    tracker.note(10.0, seen(1, 110.0))
    tracker.note(1000.0, seen(2, 1100.0))
    tracker.note(1010.0, seen(2, 1110.0, 0.0))
    assert tracker.start_up_s == 60.0
    for i in range(4):
        tracker.note(2000.0 + 20 * i, seen(3 + i, *[1000.0] * (2 + i)))
        tracker.note(2010.0 + 20 * i, seen(3 + i, *[1000.0] * (2 + i), 0.0))
    assert tracker.start_up_s <= 60.0


def test_a_start_that_waited_for_a_machine_is_left_out() -> None:
    tracker = StartUpTracker(60.0)
    tracker.note(0.0, seen(1, 100.0))
    tracker.note(5.0, seen(2, 105.0))
    tracker.note(5005.0, seen(2, 5105.0, 0.0))
    assert tracker.start_up_s == 60.0
