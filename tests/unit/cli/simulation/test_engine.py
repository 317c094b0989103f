"""A worker's steps by hand: when tokens come, in which order, and many steps at once."""

from __future__ import annotations

import math
import random

import pytest

from paceline.cli.simulation.drafting import Drafting, acceptance_for, chain_tokens
from paceline.cli.simulation.results import figures
from paceline.cli.simulation.sequence import Sequence, Steps
from paceline.cli.simulation.simulation import Outcome
from paceline.cli.simulation.traces import Arrival
from paceline.domain.cost import Curve, StepCost, StepCurves
from tests.unit.cli.simulation.worlds import profile, run, sizes


def times(sequence: Sequence) -> tuple[float, float]:
    assert sequence.ttft_s is not None and sequence.e2e_s is not None
    return sequence.ttft_s, sequence.e2e_s


def test_one_request_on_one_worker_takes_what_its_steps_take() -> None:
    """250 tokens in chunks of 100: 110 + 110 + 60 ms; the last brings the first token."""
    [request] = run([Arrival(0.0, 250, 5)]).requests
    assert times(request) == pytest.approx((0.28, 0.28 + 4 * 0.011))
    assert request.itl_s == pytest.approx(0.011)


def test_a_prompt_that_is_handed_over_gets_its_first_token_from_the_decode_worker() -> None:
    """249 tokens on the prefill worker, 0.5 s for handing over, one step of 11 ms."""
    replica = profile(hop_s=0.5)
    outcome = run([Arrival(0.0, 250, 5)], pools=sizes(1, 1), replica=replica)
    assert not outcome.requests[0].prefill_worker  # Handing over is the slower way.
    replica = profile(hop_s=0.05)
    outcome = run([Arrival(0.0, 250, 5)], pools=sizes(1, 1), replica=replica)
    [request] = outcome.requests
    assert request.prefill_worker
    assert times(request) == pytest.approx((0.279 + 0.05 + 0.011, 0.34 + 4 * 0.011))


def test_moving_kv_takes_its_bytes() -> None:
    """250 tokens of 16 bytes at 40,000 bytes/s from memory to the worker: 0.1 s."""
    replica = profile(near_bytes_per_s=40_000.0)
    [request] = run([Arrival(0.0, 250, 1)], pools=sizes(1, 1), replica=replica).requests
    assert request.prefill_worker
    assert request.ttft_s == pytest.approx(0.279 + 0.1 + 0.011)


def test_moving_kv_between_nodes_goes_on_while_the_prompt_is_computed() -> None:
    """One worker per node. At 20,000 bytes/s between nodes the 4,000 bytes take 0.2 s, of which
    the prefill's 0.279 s hide all but the last chunk, 100 tokens: 0.08 s."""
    replica = profile(far_bytes_per_s=20_000.0, workers_per_node=1)
    [request] = run([Arrival(0.0, 250, 1)], pools=sizes(1, 1), replica=replica).requests
    assert request.prefill_worker
    assert request.ttft_s == pytest.approx(0.279 + 0.08 + 0.011)


def test_prompts_share_steps_in_the_order_they_came() -> None:
    """While the first takes its 20 ms two come: 60 + 40 in 110 ms, then 20 beside a row."""
    load = [Arrival(0.0, 10, 1), Arrival(0.001, 60, 2), Arrival(0.001, 60, 1)]
    _, second, third = run(load).requests
    assert second.ttft_s == pytest.approx(0.02 + 0.11 - 0.001)
    assert third.ttft_s == pytest.approx(0.13 + 0.01 + 0.001 + 0.020 - 0.001)
    assert second.e2e_s == pytest.approx(third.ttft_s)


def test_a_later_prompt_keeps_to_the_pace_of_streams_that_were_there() -> None:
    """A step of one row takes 11 ms, at most 1.6 times that with a chunk: no 8 tokens fit, but
    8 always run. So 80 tokens take ten steps of 19 ms beside the stream."""
    load = [Arrival(0.0, 10, 500), Arrival(1.0, 80, 1)]
    first, second = run(load).requests
    assert first.ttft_s == pytest.approx(0.02)
    wait_s = 0.011 - math.fmod(1.0 - 0.02, 0.011)
    assert second.ttft_s == pytest.approx(wait_s + 10 * 0.019, abs=1e-6)


def test_rows_are_limited_and_the_next_starts_when_one_ends() -> None:
    replica = profile(max_rows=1)
    first, second = run([Arrival(0.0, 10, 5), Arrival(0.0, 10, 5)], replica=replica).requests
    assert first.e2e_s == pytest.approx(0.02 + 4 * 0.011)
    assert second.ttft_s == pytest.approx(first.e2e_s + 0.02)


def test_a_sequence_waits_until_its_kv_fits() -> None:
    replica = profile(kv_tokens=160)
    load = [Arrival(0.0, 100, 20), Arrival(0.0, 100, 20)]
    first, second = run(load, replica=replica).requests
    assert first.e2e_s is not None
    assert second.ttft_s == pytest.approx(first.e2e_s + 0.11)


def test_when_kv_is_full_the_last_one_loses_its_place_and_nothing_is_lost() -> None:
    replica = profile(kv_tokens=300)
    load = [Arrival(0.0, 100, 100), Arrival(0.0, 100, 100)]
    first, second = run(load, replica=replica).requests
    assert not first.failure and not second.failure
    assert first.e2e_s is not None and second.e2e_s is not None and second.ttft_s is not None
    assert second.ttft_s < first.e2e_s < second.e2e_s
    # Alone each takes 0.11 + 99 steps; side by side steps of two rows, then one goes on alone.
    assert second.e2e_s > first.e2e_s + 30 * 0.011


def test_a_request_that_can_never_fit_fails_at_once() -> None:
    replica = profile(kv_tokens=100)
    long, short = run([Arrival(0.0, 90, 20), Arrival(1.0, 50, 2)], replica=replica).requests
    assert long.failure == "too-long"
    assert not short.failure


def test_requests_beyond_their_deadline_have_failed() -> None:
    load = [Arrival(0.0, 10_000, 1), Arrival(0.0, 10_000, 1), Arrival(0.0, 10_000, 1)]
    outcome = run(load, deadline_s=15.0)
    assert [r.failure for r in outcome.requests] == ["", "deadline", "deadline"]
    assert figures(outcome).failures == {"deadline": 2}


def test_drafts_bring_their_tokens_per_step_on_average() -> None:
    """4 nodes at 0.5: 1.9375 tokens for a step of 10 ms + 5 tokens' 5 ms."""
    drafting = Drafting(0.5, 4)
    assert drafting.emitted_per_step(0.0) == 1.9375
    load = [Arrival(100.0 * i, 10, 400) for i in range(50)]
    outcome = run(load, drafting=drafting)
    mean_s = sum(r.itl_s or 0.0 for r in outcome.requests) / 50
    assert mean_s == pytest.approx(0.015 / 1.9375, rel=0.01)


def test_acceptance_follows_from_tokens_per_step() -> None:
    assert chain_tokens(acceptance_for(2.5, 4), 4) == pytest.approx(2.5)
    with pytest.raises(ValueError, match="expected 1 to 3"):
        acceptance_for(3.5, 2)


def test_learning_drafts_get_faster() -> None:
    drafting = Drafting(0.3, 4, trained_acceptance=0.8, time_constant_s=1000.0)
    load = [Arrival(1000.0 * i, 10, 400) for i in range(6)]
    itl = [r.itl_s or 0.0 for r in run(load, drafting=drafting).requests]
    assert itl == sorted(itl, reverse=True)
    assert drafting.acceptance_at(1000.0) == pytest.approx(0.8 - 0.5 / math.e)
    # From the second to the sixth: 1.95 to 3.3 tokens per step.
    assert itl[1] / itl[5] == pytest.approx(
        drafting.emitted_per_step(5000.0) / drafting.emitted_per_step(1000.0), rel=0.02
    )


# -- many steps at once -------------------------------------------------------------------


def busy_load(seed: int, count: int = 150) -> list[Arrival]:
    draw, at_s, load = random.Random(seed), 0.0, []
    for _ in range(count):
        at_s += draw.expovariate(2.0)
        load.append(Arrival(at_s, draw.randint(1, 400), draw.randint(1, 300)))
    return load


LINEAR = StepCost(base_s=0.01, row_s=0.0002, token_s=0.0001, context_s=2e-7)
BENT = StepCost(
    0.01,
    0.0,
    0.0,
    0.0,
    StepCurves(
        tokens=Curve((1, 64, 128), (0.008, 0.01, 0.02)),
        rows=Curve((0, 4, 64), (0.0, 0.001, 0.004)),
        contexts=Curve((0, 1000, 8000), (0.0, 0.001, 0.002)),
        prefill_row_s=0.0005,
        prefill_read_s=1e-7,
        prefill_context_s=1e-8,
    ),
)


def both_ways(cost: StepCost, *, kv_tokens: int, drafting: Drafting) -> tuple[Outcome, Outcome]:
    replica = profile(cost, kv_tokens=kv_tokens)
    one, many = (
        run(
            busy_load(5),
            pools=sizes(1, 2),
            replica=replica,
            drafting=drafting,
            max_steps=max_steps,
        )
        for max_steps in (1, 64)
    )
    return one, many


@pytest.mark.parametrize("kv_tokens", [1_000_000, 1500])
@pytest.mark.parametrize("drafting", [Drafting(), Drafting(0.6, 3)])
def test_many_steps_at_once_change_nothing_where_cost_is_linear(
    kv_tokens: int, drafting: Drafting
) -> None:
    one, many = both_ways(LINEAR, kv_tokens=kv_tokens, drafting=drafting)
    for a, b in zip(one.requests, many.requests, strict=True):
        assert (a.decode_worker, a.prefill_worker) == (b.decode_worker, b.prefill_worker)
        assert times(a) == pytest.approx(times(b), abs=1e-3)
    assert one.meters.num_pieces == many.meters.num_pieces


def test_many_steps_at_once_are_close_where_cost_is_bent() -> None:
    one, many = (figures(o) for o in both_ways(BENT, kv_tokens=10_000, drafting=Drafting()))
    assert many.ttft_p50_s == pytest.approx(one.ttft_p50_s, rel=0.02)
    assert many.itl_p50_s == pytest.approx(one.itl_p50_s, rel=0.01)
    assert many.itl_p99_s == pytest.approx(one.itl_p99_s, rel=0.02)
    assert many.e2e_p99_s == pytest.approx(one.e2e_p99_s, rel=0.01)


def test_steps_in_a_row_end_where_their_sum_says() -> None:
    steps = Steps(start_s=1.0, first_s=0.1, rise_s=0.01, num=4)
    assert steps.end_s == pytest.approx(1.0 + 0.1 + 0.11 + 0.12 + 0.13)
    assert [steps.num_ended(at_s) for at_s in (1.0, 1.0999, 1.1001, 1.2101, 9.0)] == [0, 0, 1, 2, 4]


# -- queueing theory ----------------------------------------------------------------------


def test_waiting_for_one_worker_is_what_pollaczek_and_khinchine_say() -> None:
    """M/D/1: constant service s, load rho: mean wait = rho * s / (2 * (1 - rho)).

    One row, one token: the prompt of 91 tokens takes one step of 101 ms.
    """
    service_s, rho = 0.101, 0.7
    draw, at_s, load = random.Random(1), 0.0, []
    for _ in range(15_000):
        at_s += draw.expovariate(rho / service_s)
        load.append(Arrival(at_s, 91, 1))
    outcome = run(load, replica=profile(max_rows=1))
    waits = [(r.ttft_s or 0.0) - service_s for r in outcome.requests]
    expected_s = rho * service_s / (2 * (1 - rho))
    assert sum(waits) / len(waits) == pytest.approx(expected_s, rel=0.05)
    busy = sum(w.engine.busy_s for w in outcome.workers) / outcome.end_s
    assert busy == pytest.approx(rho, rel=0.02)
