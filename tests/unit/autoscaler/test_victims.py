"""Who ends first: whose loss costs least."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.autoscaler.values import Pool, Worker
from paceline.autoscaler.victims import choose_victims, loss_s
from tests.unit.autoscaler.observations import REPLICA


def seen(*workers: Worker, requested: int | None = None) -> Pool:
    return Pool(len(workers) if requested is None else requested, workers, REPLICA)


IDLE_OLD = Worker(id="idle-old", age_s=900.0)
IDLE_YOUNG = Worker(id="idle-young", age_s=10.0)
SHORT = Worker(id="short", num_running=1, context_tokens=500, age_s=5.0)
LONG = Worker(id="long", num_running=1, context_tokens=50_000, age_s=5.0)
PROMPTS = Worker(id="prompts", num_waiting=4, pending_prefill_tokens=20_000, age_s=5.0)
LEAVING = Worker(id="leaving", is_draining=True, num_running=9, context_tokens=90_000)


@pytest.mark.parametrize(
    ("workers", "num", "expected"),
    [
        ((LONG, SHORT), 1, ["short"]),
        ((IDLE_OLD, IDLE_YOUNG), 1, ["idle-young"]),
        ((PROMPTS, SHORT, LONG), 2, ["short", "prompts"]),
        ((IDLE_OLD, SHORT), 0, []),
        ((SHORT,), 5, ["short"]),
    ],
)
def test_the_cheapest_loss_is_first(
    workers: tuple[Worker, ...], num: int, expected: list[str]
) -> None:
    assert list(choose_victims(seen(*workers), num)) == expected


def test_those_that_drain_already_are_in_front() -> None:
    pool = seen(SHORT, LONG, LEAVING, requested=2)
    assert choose_victims(pool, 1) == ("leaving", "short")


def test_replicas_that_still_start_go_before_any_worker() -> None:
    assert choose_victims(seen(SHORT, LONG, requested=4), 2) == ()
    assert choose_victims(seen(SHORT, LONG, requested=4), 3) == ("short",)


def test_order_without_a_step_cost_follows_tokens() -> None:
    assert choose_victims(Pool(2, (LONG, SHORT)), 1) == ("short",)


counts = st.integers(0, 10**6)


@given(running=counts, waiting=counts, pending=counts, context=counts)
def test_losses_are_numbers(running: int, waiting: int, pending: int, context: int) -> None:
    worker = Worker(
        id="w",
        num_running=running,
        num_waiting=waiting,
        pending_prefill_tokens=pending,
        context_tokens=context,
    )
    assert 0.0 <= loss_s(worker, REPLICA) < math.inf
    assert 0.0 <= loss_s(worker, None) < math.inf
