"""Replicas by step cost: known formulas, directions, and no number that is none."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.autoscaler.capacity import (
    PromptWork,
    decode_fit,
    decode_size,
    erlang_c,
    late_ratio,
    prefill_size,
    prompt_spare,
    prompt_work,
    row_itl_s,
    wait_s,
)
from paceline.autoscaler.values import Traffic
from tests.unit.autoscaler.observations import COST, REPLICA, traffic

EXPONENTIAL = PromptWork(mean_s=0.5, variation=1.0, seconds=(0.1, 0.3, 0.5, 1.1))


@pytest.mark.parametrize(
    ("num", "load", "expected"),
    [(1, 0.5, 0.5), (1, 0.9, 0.9), (2, 1.0, 1 / 3), (5, 4.0, 0.5541)],
)
def test_erlang_c_has_the_values_of_the_tables(num: int, load: float, expected: float) -> None:
    assert erlang_c(num, load) == pytest.approx(expected, abs=1e-4)


def test_the_wait_of_one_server_is_that_of_m_m_1() -> None:
    # P(wait > t) = rho * exp(-t * (1 - rho) / S)
    expected = 0.8 * math.exp(-2.0 * (1 - 0.8) / 0.5)
    assert late_ratio(1, 0.8, EXPONENTIAL, [2.0]) == pytest.approx(expected)
    assert wait_s(1, 0.8, EXPONENTIAL, expected) == pytest.approx(2.0)


def test_variation_makes_waits_longer_as_allen_and_cunneen_say() -> None:
    steady = replace(EXPONENTIAL, variation=0.0)
    assert wait_s(1, 0.8, EXPONENTIAL, 0.01) == pytest.approx(2 * wait_s(1, 0.8, steady, 0.01))


def test_a_pool_below_its_load_never_catches_up() -> None:
    assert late_ratio(2, 2.0, EXPONENTIAL, [9.0]) == 1.0
    assert wait_s(2, 2.0, EXPONENTIAL, 0.01) == math.inf


def test_the_smallest_pool_that_keeps_the_goal_is_chosen() -> None:
    size = prefill_size(3.2, EXPONENTIAL, 2.0, 0.99)
    slacks_s = EXPONENTIAL.slacks_s(2.0)
    assert late_ratio(size.replicas, 3.2, EXPONENTIAL, slacks_s) <= 0.01
    assert late_ratio(size.replicas - 1, 3.2, EXPONENTIAL, slacks_s) > 0.01


@pytest.mark.parametrize(("ttft_s", "expected"), [(10.0, 0.0), (0.4, 0.5), (0.05, 1.0)])
def test_prompts_that_are_late_alone_are_counted(ttft_s: float, expected: float) -> None:
    assert EXPONENTIAL.late_ratio(ttft_s) == expected


def test_a_target_that_nobody_can_keep_still_gets_a_stable_pool() -> None:
    size = prefill_size(3.2, EXPONENTIAL, 0.05, 0.99)
    assert 4 <= size.replicas < 100 and math.isfinite(size.wait_s)


def test_prompt_sizes_keep_mean_and_p95() -> None:
    work = prompt_work(traffic(prompt_tokens=2000, prompt_tokens_p95=4500), REPLICA)
    assert work is not None
    assert work.seconds[-3] < COST.prefill_s(4500, 0, 1024) < work.seconds[-1]
    assert work.mean_s == pytest.approx(COST.prefill_s(2000, 0, 1024), rel=0.1)
    assert 0.2 < work.variation < 1.0


def test_cached_tokens_are_not_computed() -> None:
    cold, warm = prompt_work(traffic(), REPLICA), prompt_work(traffic(cached_ratio=0.9), REPLICA)
    assert cold is not None and warm is not None
    assert warm.mean_s < 0.3 * cold.mean_s


def test_decode_holds_as_many_rows_as_keep_the_target() -> None:
    load = traffic(prompt_tokens=500, output_tokens=100)
    fit = decode_fit(load, REPLICA, 0.02)
    assert fit.is_reachable and 1 < fit.rows < REPLICA.max_rows
    assert row_itl_s(fit.rows, load, REPLICA, 550) <= 0.02
    assert row_itl_s(fit.rows + 1, load, REPLICA, 550) > 0.02


def test_a_replica_has_no_more_rows_than_it_has() -> None:
    assert decode_fit(traffic(), replace(REPLICA, max_rows=5), 1.0).rows == 5


def test_room_leaves_a_long_context_free_but_never_less_than_half() -> None:
    load = traffic(prompt_tokens=1000, prompt_tokens_p95=1000, output_tokens=200)
    assert decode_fit(load, replace(REPLICA, kv_tokens=10_000), 1.0).room_tokens == 8_900
    assert decode_fit(load, replace(REPLICA, kv_tokens=1_500), 1.0).room_tokens == 750


def test_long_contexts_need_room_where_rows_would_do() -> None:
    small, large = (
        decode_size(1000.0, decode_fit(traffic(prompt_tokens_p95=p95), replica, 0.02), 0.99)
        for p95, replica in ((1000.0, REPLICA), (4000.0, replace(REPLICA, kv_tokens=12_000)))
    )
    assert not small.is_by_room
    assert large.is_by_room and large.replicas > small.replicas


def test_acceptance_makes_room() -> None:
    plain = decode_fit(traffic(), REPLICA, 0.02)
    drafting = decode_fit(traffic(emitted_per_step=2.5, nodes_per_step=3.0), REPLICA, 0.02)
    assert drafting.rows > plain.rows


def test_one_row_that_is_too_slow_is_said_to_be() -> None:
    fit = decode_fit(traffic(), REPLICA, 0.001)
    assert (fit.rows, fit.is_reachable) == (1, False)


def test_sequences_follow_littles_law() -> None:
    fit = decode_fit(traffic(), REPLICA, 0.02)
    size = decode_size(1000.0, fit, 0.5)
    assert size.sequences == pytest.approx(1000.0 * fit.itl_s)
    assert size.replicas == math.ceil(size.sequences / fit.rows)


def test_only_idle_decode_workers_take_prompts() -> None:
    assert prompt_spare(4, 0.0) == 2.0
    assert prompt_spare(4, 8.0) < 0.01


@given(load=st.floats(0.0, 50.0), more=st.floats(0.0, 10.0), ttft_s=st.floats(0.2, 10.0))
def test_more_work_never_needs_fewer(load: float, more: float, ttft_s: float) -> None:
    less = prefill_size(load, EXPONENTIAL, ttft_s, 0.99).replicas
    assert less <= prefill_size(load + more, EXPONENTIAL, ttft_s, 0.99).replicas


any_number = st.floats(allow_nan=True, allow_infinity=True)


@given(numbers=st.lists(any_number, min_size=7, max_size=7), itl_s=st.floats(1e-3, 1.0))
def test_no_garbage_comes_out_of_garbage(numbers: list[float], itl_s: float) -> None:
    load = Traffic(30.0, *numbers)
    fit = decode_fit(load, REPLICA, itl_s)
    assert fit.rows >= 1 and math.isfinite(fit.itl_s) and fit.itl_s > 0
    streams = decode_size(numbers[0], fit, 0.99)
    assert streams.replicas >= 0 and math.isfinite(streams.sequences)
    work = prompt_work(load, REPLICA)
    if work is not None:
        assert math.isfinite(work.mean_s) and math.isfinite(work.variation)
        size = prefill_size(numbers[0], work, 1.0, 0.99, most=50)
        assert 0 <= size.replicas <= 50 and not math.isnan(size.wait_s)
