"""Prompts are those every engine is measured with, and the report follows its definitions."""

from __future__ import annotations

from dataclasses import replace

import pytest

from paceline.engine.bench.generation import _report, measure_generation
from paceline.engine.bench.options import BenchOptions
from paceline.engine.bench.rig import (
    Generation,
    build_rig,
    generate,
    greedy_spec,
    random_prompts,
)
from paceline.engine.build import EngineCard
from tests.checkpoints import DEMO
from tests.unit.engine.fake_runner import expected_tokens, fake_engine

OPTIONS = BenchOptions(model=str(DEMO), prompt_len=40, gen_len=9, concurrency=3)


@pytest.fixture(scope="module")
def card() -> EngineCard:
    return build_rig(OPTIONS, num_sequences=1, num_tokens=16).card


def test_prompts_are_the_same_everywhere() -> None:
    # Figures of other engines were taken with these very ids.
    prompts = random_prompts(49152, seed=2, stream=77, count=2, length=3)
    assert prompts == [(35030, 44798, 10542), (10567, 30511, 13935)]


def test_every_request_gets_its_tokens_whatever_they_are() -> None:
    engine, _ = fake_engine(num_pages=64, context=64)
    prompts = random_prompts(50, seed=0, stream=0, count=4, length=17)
    generation = generate(engine, prompts, 12)
    assert [len(output) for output in generation.outputs] == [12] * 4
    for output, prompt in zip(generation.outputs, prompts, strict=True):
        spec = greedy_spec("any", prompt, 12)
        assert list(output) == expected_tokens(spec, 0, context=64)
    assert all(0 < first <= generation.total_s for first in generation.first_token_s)


def test_only_steps_in_which_all_decode_are_decode_steps() -> None:
    engine, runner = fake_engine(num_pages=64, context=64)
    prompts = random_prompts(50, seed=0, stream=0, count=4, length=17)
    generation = generate(engine, prompts, 12)
    last = runner.plans[-len(generation.decode_steps) :]
    assert 0 < len(generation.decode_steps) < len(runner.plans)
    assert all(len(row.token_ids) == 1 for plan in last for row in plan.rows)
    assert {inside for _, inside in generation.decode_steps} == {0.001}


def test_the_report_is_what_its_definitions_say(card: EngineCard) -> None:
    first = Generation(((5,),) * 3, (0.1, 0.2, 0.5), 0.5, ())
    outputs = (tuple(range(9)), tuple(range(9)), tuple(range(9)))
    second = Generation(outputs, (0.2, 0.3, 0.7), 2.5, ((0.3, 0.2), (0.2, 0.19), (0.4, 0.3)))
    report = _report(OPTIONS, card, first, second)
    assert report["prefill_tok_s"] == 3 * 40 / 0.5
    assert report["decode_tok_s"] == 3 * 8 / 2.0
    assert report["ttft_s"] == pytest.approx(0.4)
    assert report["total_s"] == 2.5 and report["t1_s"] == 0.5
    assert report["head"] == list(range(8))
    assert report["step_us"] == pytest.approx(300_000)
    assert report["step_overhead_us"] == pytest.approx(100_000)
    assert report["layer_us"] == pytest.approx(200_000 / card.config.num_layers, abs=0.1)


def test_one_token_has_no_decode_rate(card: EngineCard) -> None:
    one = Generation(((5,),) * 3, (0.1, 0.2, 0.5), 0.5, ())
    report = _report(replace(OPTIONS, gen_len=1), card, one, one)
    assert report["decode_tok_s"] is None and report["step_us"] is None


def test_the_pool_holds_every_request_to_its_end() -> None:
    rig = build_rig(OPTIONS, num_sequences=3, num_tokens=49)
    report = measure_generation(rig, OPTIONS)
    engine = rig.engine
    assert engine.load().num_preemptions == 0
    # Three calls of as many sequences as the pool is made for, none of them with a cache hit.
    assert engine.load().num_running == 0
    assert report["head"] != []
