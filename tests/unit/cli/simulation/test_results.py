"""Figures, the share that is reachable, tuning of baselines, and replicas by name."""

from __future__ import annotations

import json
import pickle
import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from paceline.cli.errors import CommandError
from paceline.cli.simulation.ceiling import reachable_ratio
from paceline.cli.simulation.fleet import FleetOptions
from paceline.cli.simulation.meters import Histogram, quantile_s
from paceline.cli.simulation.observing import ScrapeOptions
from paceline.cli.simulation.policies import PolicyOptions
from paceline.cli.simulation.profiles import PRESETS, find_profile
from paceline.cli.simulation.quick_cost import QuickStepCost
from paceline.cli.simulation.results import figures, quantile
from paceline.cli.simulation.roofline import A100, H100, LLAMA_8B, kv_tokens, roofline_cost
from paceline.cli.simulation.simulation import SimulationOptions
from paceline.cli.simulation.traces import Arrival
from paceline.cli.simulation.tuning import (
    GRIDS,
    Trial,
    Trials,
    World,
    best,
    tune_sizes,
    tune_targets,
)
from paceline.domain.cost import StepShape
from paceline.domain.member import Role
from tests.unit.cli.simulation.worlds import FLAT, make_test_policy, profile, run, sizes


def test_attainment_needs_both_targets_and_an_answer() -> None:
    """TTFT of 0.02 and 0.21 s; ITL 11 ms, for the third beside a prompt of 4 steps."""
    load = [
        Arrival(0.0, 10, 1),
        Arrival(10.0, 200, 2),
        Arrival(20.0, 10, 3),
        Arrival(30.0, 2_000_000, 1),
    ]
    outcome = run(load, slo_ttft_s=0.1, slo_itl_s=0.0111)
    result = figures(outcome)
    assert [r.failure for r in outcome.requests] == ["", "", "", "too-long"]
    assert result.ttft_attainment == 0.5
    assert result.itl_attainment == 0.75
    assert result.slo_attainment == 0.5
    assert (result.requests, result.failed, result.failures) == (4, 1, {"too-long": 1})
    strict = figures(run(load, slo_ttft_s=0.1, slo_itl_s=0.0109))
    assert strict.slo_attainment == 0.25  # One token has no gap to be late.


def test_quantiles_are_values_that_a_share_does_not_exceed() -> None:
    values = [float(i) for i in range(1, 101)]
    assert [quantile(values, q) for q in (0.0, 0.5, 0.99, 1.0)] == [1.0, 50.0, 99.0, 100.0]
    assert quantile([], 0.5) is None


def test_buckets_are_fine_enough_for_quantiles() -> None:
    draw, histogram = random.Random(1), Histogram()
    values = sorted(draw.lognormvariate(-3.0, 1.5) for _ in range(20_000))
    for value in values:
        histogram.add(value)
    for share in (0.05, 0.5, 0.95, 0.99):
        exact = values[int(share * len(values))]
        assert quantile_s(histogram.counts, share) == pytest.approx(exact, rel=0.02)
    assert quantile_s(Histogram().counts, 0.5) is None


def test_reachable_is_what_an_idle_replica_serves_in_time() -> None:
    load = (
        Arrival(0.0, 250, 5, (1, 2, 3), 100),
        Arrival(1.0, 250, 5, (1, 2, 4), 100),
        Arrival(2.0, 950, 5),
    )
    ratios = [reachable_ratio(load, profile(), ttft_s, 0.05) for ttft_s in (0.05, 0.2, 0.3, 2.0)]
    assert ratios == pytest.approx([0.0, 1 / 3, 2 / 3, 1.0])
    assert reachable_ratio(load, profile(), 2.0, 0.01) == 0.0
    assert reachable_ratio(load, profile(), 2.0, 0.01, emitted_per_step=2.0) == 1.0


# -- tuning -------------------------------------------------------------------------------


def policy(name: str) -> PolicyOptions:
    most = sizes(4, 6)
    return PolicyOptions(name, 0.5, 0.05, 0.95, 10.0, 5.0, least=sizes(1, 1), most=most)


def world() -> World:
    draw, at_s, load = random.Random(3), 0.0, []
    for _ in range(200):
        at_s += draw.expovariate(8.0)
        load.append(Arrival(at_s, draw.randint(50, 400), draw.randint(1, 60)))
    options = SimulationOptions(
        profile(FLAT),
        slo_ttft_s=0.8,
        slo_itl_s=0.05,
        initial=sizes(1, 1),
        fleet=FleetOptions(start_up_s=2.0),
        scrape=ScrapeOptions(scrape_s=1.0, window_s=5.0),
        period_s=1.0,
    )
    return World(tuple(load), options, make_test_policy)


def test_the_smallest_fixed_fleet_that_reaches_the_goal_is_found() -> None:
    seen: list[Trial] = []
    with Trials(world(), seen.append, num_processes=1) as trials:
        found = tune_sizes(trials, policy("static"), goal=0.9)
        assert found.figures.slo_attainment >= 0.9
        total = sum(found.policy.sizes.values())
        smaller = [
            replace(found.policy, sizes=sizes(p, total - 1 - p)) for p in range(1, total - 1)
        ]
        assert smaller
        assert all(t.figures.slo_attainment < 0.9 for t in trials.run(smaller))


def test_the_cheapest_targets_that_reach_the_goal_are_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grid = {Role.PREFILL: (0.3, 0.6), Role.DECODE: (0.3, 0.6, 0.9)}
    monkeypatch.setitem(GRIDS, "hpa", grid)
    found = []
    for num_processes in (1, 2):
        seen: list[Trial] = []
        with Trials(world(), seen.append, num_processes) as trials:
            found.append(tune_targets(trials, policy("hpa"), goal=0.3))
        reaching = [t for t in seen if t.figures.slo_attainment >= 0.3]
        cheapest = min(t.figures.replica_seconds for t in reaching)
        assert found[-1].figures.replica_seconds == cheapest
        aims = [found[-1].policy.targets[role] for role in grid]
        assert all(aim in grid[role] for role, aim in zip(grid, aims, strict=True))
    assert found[0] == found[1]


def test_without_a_target_that_reaches_the_goal_the_best_attainment_is_taken() -> None:
    with Trials(world(), lambda _: None, num_processes=1) as trials:
        tried = trials.run([_with_target(target) for target in (0.3, 0.9)])
    assert best(tried, 1.1) == max(tried, key=lambda t: t.figures.slo_attainment)


def _with_target(target: float) -> PolicyOptions:
    targets = {Role.PREFILL: target, Role.DECODE: target}
    return replace(policy("hpa"), targets=targets)


# -- replicas -----------------------------------------------------------------------------


def random_shape(draw: random.Random) -> StepShape:
    rows, nodes = draw.choice([0, 1, 30]), draw.choice([0, 4])
    shape = StepShape(rows, rows * nodes, rows * nodes * 700, rows * 700)
    return (
        shape.with_chunk(draw.randint(1, 600), draw.randint(0, 900))
        if draw.random() < 0.6
        else shape
    )


@pytest.mark.parametrize("name", PRESETS)
def test_quick_costs_predict_what_plain_ones_do(name: str) -> None:
    quick, draw = find_profile(name).replica.step_cost, random.Random(2)
    assert isinstance(quick, QuickStepCost)
    _, (plain,) = quick.__reduce__()
    for cost in (quick, pickle.loads(pickle.dumps(quick))):
        for _ in range(300):
            shape = random_shape(draw)
            assert cost.step_s(shape) == pytest.approx(plain.step_s(shape), rel=1e-12)
            prompt = draw.randint(1, 4000), draw.randint(0, 500), draw.choice([64, 512])
            assert cost.prefill_s(*prompt) == plain.prefill_s(*prompt)
    linear = QuickStepCost(FLAT)
    assert linear.step_s(StepShape(rows=3)) == FLAT.step_s(StepShape(rows=3))


def test_derived_costs_follow_their_formula() -> None:
    """A100: 16.06 GB at 0.8 * 2,039 GB/s are 9.85 ms, and 2 ms around a step."""
    cost = roofline_cost(A100, LLAMA_8B)
    assert cost.step_s(StepShape(rows=1)) == pytest.approx(0.01185, rel=0.01)
    prompt_s = cost.prefill_s(2048, 0, 2048)
    assert prompt_s == pytest.approx(0.002 + 2048 * 2 * 8.03e9 / (0.55 * 312e12), rel=0.05)
    assert LLAMA_8B.kv_token_bytes == 131072
    assert 420_000 < kv_tokens(A100, LLAMA_8B) < 430_000
    assert roofline_cost(H100, LLAMA_8B).step_s(StepShape(rows=1)) < cost.step_s(StepShape(rows=1))


def written(tmp_path: Path, **changes: object) -> str:
    data = {
        "step_cost": asdict(FLAT),
        "chunk_tokens": 128,
        "max_rows": 8,
        "kv_tokens": 4000,
        "kv_token_bytes": 100,
        **changes,
    }
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))
    return str(path)


def test_a_replica_may_come_from_a_file(tmp_path: Path) -> None:
    found = find_profile(written(tmp_path, hop_s=0.5, workers_per_node=2))
    assert (found.name, found.hop_s, found.workers_per_node) == ("mine", 0.5, 2)
    assert (found.replica.chunk_tokens, found.replica.max_rows) == (128, 8)
    assert found.replica.step_cost.step_s(StepShape(rows=1)) == pytest.approx(0.011)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"chunk_tokens": None}, "chunk_tokens is missing"),
        ({"max_rows": 0}, "max_rows 0"),
        ({"speed": 9}, "unknown fields speed"),
        ({"step_cost": {"base_s": 1}}, "row_s is missing"),
    ],
)
def test_a_wrong_file_is_refused_with_the_field(
    tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(CommandError, match=said):
        find_profile(written(tmp_path, **changes))


def test_a_replica_that_is_nothing_is_refused_with_what_there_is() -> None:
    with pytest.raises(CommandError, match="8b-a100"):
        find_profile("8b-b200")


def test_a_checkpoint_needs_a_measured_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paceline.engine.checkpoint_files import model_digest

    checkpoint, cache = tmp_path / "model", tmp_path / "cache"
    checkpoint.mkdir()
    config = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
    }
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setenv("PACELINE_CACHE_DIR", str(cache))
    with pytest.raises(CommandError, match="no step cost of it is kept"):
        find_profile(str(checkpoint))
    kept = cache / "step-cost"
    kept.mkdir(parents=True)
    (kept / "broken.json").write_text("{")
    key = {"model_digest": model_digest(checkpoint), "dtype": "f32", "chunk_tokens": 512}
    (kept / "a.json").write_text(json.dumps({"key": key, "cost": asdict(FLAT)}))
    found = find_profile(str(checkpoint))
    # Keys and values of 3 layers, 2 heads of 16, 4 bytes each.
    assert found.kv_token_bytes == 2 * 3 * 2 * 16 * 4
    assert found.replica.kv_tokens == (256 << 20) // 768
    assert found.replica.step_cost.step_s(StepShape(rows=1)) == pytest.approx(0.011)


def test_the_largest_size_is_of_all_pools_together() -> None:
    outcome = run([Arrival(0.0, 10, 2)], pools=sizes(2, 3))
    assert figures(outcome).max_replicas == 5
    assert figures(outcome).mean_decode == pytest.approx(3.0)
    assert {w.role for w in outcome.workers} == {Role.PREFILL, Role.DECODE}
