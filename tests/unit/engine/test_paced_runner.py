"""Steps of a given length at least: what they bring is unchanged, what they take is told."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from paceline.domain.cost import StepCost, StepShape
from paceline.domain.request import GenerationSpec, SamplingParams
from paceline.engine.build import build_engine
from paceline.engine.options import EngineOptions
from paceline.engine.paced_runner import PacedRunner
from paceline.engine.step import Row, StepPlan
from tests.checkpoints import random_checkpoint
from tests.unit.engine.fake_runner import FakeRunner
from tests.unit.engine.memory_arena import run_until_idle

PLAN = StepPlan((Row(0, (1, 2, 3), 0, np.array([0], dtype=np.int32), None),))


@pytest.mark.parametrize(("min_step_s", "sleeps"), [(1000.0, 1), (1e-12, 0)])
def test_only_what_a_step_is_too_short_by_is_waited_for(min_step_s: float, sleeps: int) -> None:
    slept: list[float] = []
    PacedRunner(FakeRunner(4, 4), min_step_s, slept.append).run(PLAN)
    assert len(slept) == sleeps
    assert all(min_step_s - 60 < seconds < min_step_s for seconds in slept)


def test_no_step_is_predicted_to_take_less_than_the_floor() -> None:
    cost = StepCost(base_s=0.01, row_s=0.001, token_s=0.001, context_s=0.0, floor_s=0.05)
    assert cost.step_s(StepShape(rows=1)) == 0.05
    assert cost.step_s(StepShape(rows=100)) == pytest.approx(0.21)
    assert cost.prefill_s(24, 0, 8) == pytest.approx(0.15)
    assert StepCost.from_json(json.loads(json.dumps(asdict(cost)))) == cost
    nothing = StepCost(float("nan"), 0.0, 0.0, 0.0, floor_s=0.05).step_s(StepShape(rows=1))
    assert nothing != nothing


def test_an_engine_that_waits_says_the_same_and_tells_how_long_its_steps_are(
    tmp_path: Path,
) -> None:
    directory = random_checkpoint("qwen3", tmp_path / "model")
    outputs = []
    for min_step_s in (0.0, 0.03):
        engine, card = build_engine(
            EngineOptions(
                model=str(directory), num_kv_blocks=16, drafters=(), min_step_s=min_step_s
            )
        )
        engine.submit(
            GenerationSpec(
                request_id="r",
                prompt_token_ids=tuple(range(5, 40)),
                sampling=SamplingParams(temperature=0.8, seed=3),
                max_tokens=6,
                ignore_eos=True,
            )
        )
        events = run_until_idle(engine)["r"]
        outputs.append([chunk for event in events for chunk in event.chunks])
        assert card.step_cost.floor_s == min_step_s
        assert engine.last_step_s >= min_step_s
    assert outputs[0] == outputs[1]
