"""Replicas that start, drain and go; requests that end exactly once whatever happens to them."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest

from paceline.cli.simulation.drafting import Drafting
from paceline.cli.simulation.fleet import FleetOptions
from paceline.cli.simulation.observing import ScrapeOptions
from paceline.cli.simulation.results import figures
from paceline.cli.simulation.simulation import Outcome
from paceline.cli.simulation.traces import Arrival
from paceline.domain.cost import StepCost
from paceline.domain.member import Role
from tests.unit.cli.simulation.worlds import Scripted, Wake, profile, run, sizes

REAL = StepCost(base_s=0.01, row_s=0.0002, token_s=0.0001, context_s=2e-7)


def stream(rate: float, length_s: float, seed: int = 1, output: int = 200) -> list[Arrival]:
    draw, at_s, load = random.Random(seed), 0.0, []
    while (at_s := at_s + draw.expovariate(rate)) < length_s:
        ids = (draw.randrange(5), draw.randrange(20))
        load.append(Arrival(at_s, draw.randint(1, 1000), draw.randint(1, output), ids, 256))
    return load


def ready_at(outcome: Outcome, role: Role) -> dict[float, int]:
    return {change.at_s: change.ready for change in outcome.changes if change.role is role}


def test_a_replica_is_ready_after_its_start_up_and_costs_from_the_start() -> None:
    policy = Scripted({0.0: sizes(0, 1), 20.0: sizes(0, 2)})
    fleet = FleetOptions(start_up_s=30.0, start_up_spread=0.0)
    load = [Arrival(float(i), 10, 1) for i in range(101)]
    outcome = run(load, policy, fleet=fleet)
    assert ready_at(outcome, Role.DECODE) == {0.0: 1, 20.0: 1, 50.0: 2}
    assert outcome.replica_seconds[Role.DECODE] == pytest.approx(2 * outcome.end_s - 20.0)
    second = next(w for w in outcome.workers if w.ready_s == 50.0)
    before = [r for r in outcome.requests if r.decode_worker == second.id]
    assert all(r.arrival.at_s >= 50.0 for r in before)
    assert outcome.scale_events == 1


def test_start_up_times_spread_around_their_mean() -> None:
    policy = Scripted({0.0: sizes(0, 20)})
    load = [Arrival(float(i), 10, 1) for i in range(101)]
    outcome = run(load, policy, fleet=FleetOptions(start_up_s=50.0, start_up_spread=0.2))
    times = sorted((w.ready_s or 0.0) - w.requested_s for w in outcome.workers)[1:]
    assert len(times) == 19
    assert 40.0 <= times[0] < times[-1] <= 60.0
    assert len(set(times)) == 19


def test_what_still_starts_goes_first_when_a_pool_shrinks() -> None:
    policy = Scripted({0.0: sizes(0, 1), 10.0: sizes(0, 3), 15.0: sizes(0, 2), 20.0: sizes(0, 1)})
    fleet = FleetOptions(start_up_s=30.0, start_up_spread=0.0)
    outcome = run([Arrival(float(i), 10, 1) for i in range(100)], policy, fleet=fleet)
    assert max(ready_at(outcome, Role.DECODE).values()) == 1
    assert outcome.replica_seconds[Role.DECODE] == pytest.approx(outcome.end_s + 5.0 + 10.0)


def test_a_leaving_worker_takes_no_requests_and_finishes_its_streams() -> None:
    policy = Scripted({0.0: sizes(0, 2), 30.0: sizes(0, 1)})
    outcome = run(stream(3.0, 90.0), policy, pools=sizes(0, 2), cost=REAL, fleet=FleetOptions())
    [leaver] = [w for w in outcome.workers if w.is_draining]
    own = [r for r in outcome.requests if r.decode_worker == leaver.id]
    assert own
    assert all(r.arrival.at_s <= 30.0 for r in own)
    assert leaver.gone_s == pytest.approx(max(r.last_token_s or 0.0 for r in own))
    assert not any(r.migrations or r.failure for r in outcome.requests)


def test_streams_are_handed_over_when_the_grace_is_up_and_pause_for_a_step() -> None:
    policy = Scripted({0.0: sizes(0, 2), 30.0: sizes(0, 1)})
    load = [Arrival(0.0, 10, 5000), Arrival(0.1, 10, 5000)]
    fleet = FleetOptions(drain_grace_s=2.0)
    outcome = run(load, policy, pools=sizes(0, 2), fleet=fleet)
    assert {r.migrations for r in outcome.requests} == {0, 1}
    assert not any(r.failure for r in outcome.requests)
    moved = next(r for r in outcome.requests if r.migrations)
    [leaver] = [w for w in outcome.workers if w.is_draining]
    assert leaver.gone_s == pytest.approx(32.0, abs=0.011)
    assert moved.decode_worker != leaver.id
    # 5,000 steps of 11 or 12 ms: a pause of a few steps at most, nothing computed again.
    assert moved.e2e_s is not None
    assert moved.e2e_s < 5000 * 0.012 + 0.1


def test_named_workers_leave_first() -> None:
    from paceline.autoscaler.values import Decision, Observation

    class Naming:
        def decide(self, observation: Observation) -> Decision:
            workers = observation.pools[Role.DECODE].workers
            first = min(workers, key=lambda w: w.id).id
            size = 3 if observation.at_s < 20.0 else 2
            return Decision(
                observation.at_s, sizes(0, size), "", "shrink", victims={Role.DECODE: (first,)}
            )

    outcome = run([Arrival(float(i), 10, 1) for i in range(60)], Naming(), pools=sizes(0, 3))
    [leaver] = [w for w in outcome.workers if w.is_draining]
    assert leaver.id == min(w.id for w in outcome.workers)


STORMS: dict[str, Mapping[float, Mapping[Role, int]]] = {
    "up and down": {10.0 * i: sizes(i % 3, 1 + i * 7 % 4) for i in range(30)},
    "to nothing and back": {0.0: sizes(1, 1), 20.0: sizes(0, 0), 60.0: sizes(2, 3)},
    "prefill leaves": {0.0: sizes(3, 1), 15.0: sizes(0, 1), 40.0: sizes(2, 1), 50.0: sizes(0, 2)},
}


@pytest.mark.parametrize("name", STORMS)
@pytest.mark.parametrize("grace_s", [0.0, 0.5, 25.0])
@pytest.mark.parametrize("kv_tokens", [5000, 100_000])
def test_every_request_ends_exactly_once_and_is_served(
    name: str, grace_s: float, kv_tokens: int
) -> None:
    load = stream(4.0, 120.0, output=400)
    outcome = run(
        load,
        Scripted(STORMS[name]),
        pools=sizes(1, 1),
        replica=profile(REAL, kv_tokens=kv_tokens, workers_per_node=2, store_tokens=4096),
        fleet=FleetOptions(start_up_s=5.0, drain_grace_s=grace_s),
        drafting=Drafting(0.5, 3),
        deadline_s=10_000.0,
    )
    assert len(outcome.requests) == len(load)
    for request in outcome.requests:
        assert request.is_ended
        assert not request.failure
        assert request.left == 0
        tokens = request.arrival.prompt_tokens + request.arrival.output_tokens
        assert request.context == tokens
        assert request.first_token_s is not None and request.last_token_s is not None
        assert request.arrival.at_s < request.first_token_s <= request.last_token_s
    assert all(worker.engine.is_empty for worker in outcome.workers)
    assert not any(worker.num_incoming for worker in outcome.workers)
    assert not any(outcome.calls_left.values())


def test_runs_are_the_same_for_the_same_seed_only() -> None:
    def play(seed: int) -> list[float | None]:
        outcome = run(
            stream(4.0, 60.0),
            Scripted({0.0: sizes(1, 1), 10.0: sizes(2, 3)}),
            pools=sizes(1, 1),
            cost=REAL,
            fleet=FleetOptions(start_up_s=10.0, seed=seed),
            drafting=Drafting(0.5, 3),
            seed=seed,
        )
        return [r.e2e_s for r in outcome.requests]

    assert play(1) == play(1)
    assert play(1) != play(2)


def test_requests_are_parked_at_zero_and_wake_the_fleet() -> None:
    fleet = FleetOptions(start_up_s=20.0, start_up_spread=0.0)
    load = [Arrival(101.0, 10, 2), Arrival(106.0, 10, 2)]
    outcome = run(load, Wake(), pools=sizes(0, 0), fleet=fleet, period_s=50.0)
    first, second = outcome.requests
    # Not the next period's decision at 150 s, but one 0.1 s after the request.
    assert first.ttft_s == pytest.approx(0.1 + 20.0 + 0.02)
    assert second.ttft_s == pytest.approx(0.1 + 15.0 + 0.02 + 0.021)
    assert outcome.replica_seconds[Role.DECODE] == pytest.approx(outcome.end_s - 101.1)


def test_a_request_for_which_no_worker_ever_comes_fails_at_its_deadline() -> None:
    policy = Scripted({0.0: sizes(0, 0)})
    outcome = run([Arrival(5.0, 10, 2)], policy, pools=sizes(0, 0), deadline_s=30.0)
    [request] = outcome.requests
    assert request.failure == "no-worker"
    assert outcome.end_s == pytest.approx(35.0)
    assert figures(outcome).slo_attainment == 0.0


# -- prefixes -----------------------------------------------------------------------------


def test_a_stored_prefix_is_not_computed_again() -> None:
    """Two whole blocks of 100 are shared: the second request computes 50 of 250 tokens."""
    load = [Arrival(0.0, 250, 1, (1, 2, 3), 100), Arrival(10.0, 250, 1, (1, 2, 4), 100)]
    replica = profile(StepCost(0.01, 0.0, 0.001, 0.0))
    first, second = run(load, replica=replica).requests
    assert (first.cached_tokens, second.cached_tokens) == (0, 192)
    # Blocks of the store are of 16 tokens: 100 tokens are 6 of them.
    assert second.ttft_s == pytest.approx(0.01 + 0.058)


def test_a_full_store_lets_blocks_go() -> None:
    load = [Arrival(10.0 * i, 200, 1, (i % 30, 100 + i % 30), 100) for i in range(60)]
    small, large = (
        run(load, replica=profile(store_tokens=tokens)).requests for tokens in (1000, 10_000)
    )
    assert sum(r.cached_tokens or 0 for r in small) < sum(r.cached_tokens or 0 for r in large)
    assert sum(r.cached_tokens or 0 for r in large) == 30 * 192


# -- what the policy sees -----------------------------------------------------------------


def test_observations_are_rates_of_a_late_window() -> None:
    policy = Scripted({0.0: sizes(0, 1)})
    load = [Arrival(0.5 * i, 100, 5) for i in range(400)]
    scrape = ScrapeOptions(scrape_s=5.0, window_s=30.0, lag_scrapes=2)
    run(load, policy, scrape=scrape, drafting=Drafting(0.5, 2))
    # Nothing before the second scrape is 10 s old.
    assert [bool(seen.problems) for seen in policy.seen[:4]] == [True, True, False, False]
    traffic = policy.seen[30].traffic
    assert traffic is not None
    assert traffic.window_s == 30.0
    assert traffic.requests_per_s == pytest.approx(2.0)
    assert (traffic.prompt_tokens, traffic.prompt_tokens_p95, traffic.output_tokens) == (
        100,
        100,
        5,
    )
    assert traffic.emitted_per_step == pytest.approx(1.75)
    assert traffic.nodes_per_step == 2
    pool = policy.seen[30].pools[Role.DECODE]
    # 110 ms for the prompt and three to four steps of 13 ms, twice a second.
    assert pool.busy_ratio == pytest.approx(2 * (0.11 + 3 * 0.013), rel=0.1)
    latency = policy.seen[30].latency
    assert latency.ttft_p95_s == pytest.approx(0.11, rel=0.02)
    assert latency.ttft_within_ratio == 1.0


def test_a_blackout_takes_rates_away_and_names_the_problem() -> None:
    policy = Scripted({0.0: sizes(0, 1)})
    load = [Arrival(0.5 * i, 100, 5) for i in range(400)]
    run(load, policy, scrape=ScrapeOptions(blackouts=((50.0, 60.0),)))
    dark = [seen for seen in policy.seen if 50.0 <= seen.at_s < 110.0]
    light = [seen for seen in policy.seen if not 50.0 <= seen.at_s < 110.0][2:]
    assert len(dark) == 12
    assert all(seen.problems and seen.traffic is None for seen in dark)
    assert all(seen.pools[Role.DECODE].busy_ratio is None for seen in dark)
    assert all(seen.pools[Role.DECODE].ready == 1 for seen in dark)
    assert not any(seen.problems for seen in light)
