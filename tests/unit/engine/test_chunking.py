"""Chunks keep to the pace of the streams beside them, and prompts never stop."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.domain.cost import StepCost, StepShape
from paceline.engine.chunking import StepPace
from paceline.engine.engine import Engine
from paceline.engine.events import OutputEvent
from tests.unit.engine.fake_runner import FakeRunner, expected_tokens, fake_engine
from tests.unit.engine.test_requests import spec_of

COSTS = st.builds(
    StepCost,
    base_s=st.floats(0, 1e-2),
    row_s=st.floats(0, 1e-3),
    token_s=st.floats(0, 1e-3),
    context_s=st.floats(0, 1e-6),
)
STEPS = st.builds(StepShape, rows=st.integers(1, 40), attended=st.integers(1, 80_000))


@settings(max_examples=300, deadline=None)
@given(
    cost=COSTS,
    slowdown=st.floats(1, 4),
    step=STEPS,
    start=st.integers(0, 4000),
    unit=st.sampled_from([1, 4, 16]),
    most=st.integers(1, 600),
)
def test_the_chunk_is_the_largest_that_keeps_the_pace(
    cost: StepCost, slowdown: float, step: StepShape, start: int, unit: int, most: int
) -> None:
    least = min(unit, most)
    pace = StepPace(cost, slowdown)
    chunk = pace.chunk_tokens(step, start=start, least=least, most=most, unit=unit)
    limit_s = slowdown * cost.step_s(step)
    # Against trying every size: all of the rest, or whole units.
    sizes = [*range(unit, most, unit), most]
    fitting = [n for n in sizes if cost.step_s(step.with_chunk(n, start)) <= limit_s]
    assert chunk == max([least, *fitting])


def test_chunks_that_are_in_the_step_already_count() -> None:
    cost = StepCost(0.01, 0.0, 1e-4, 0.0)
    step = StepShape(rows=1, attended=10)
    pace = StepPace(cost, 2.0)
    sizes = {"start": 0, "least": 0, "most": 512, "unit": 16}
    first = pace.chunk_tokens(step, **sizes)
    assert first == 96
    assert pace.chunk_tokens(step.with_chunk(first, 0), **sizes) == 0
    assert pace.chunk_tokens(step.with_chunk(48, 0), **sizes) == 48


def test_without_decoding_rows_there_is_no_pace_to_keep() -> None:
    pace = StepPace(StepCost(0.0, 0.0, 1.0, 1.0), 1.0)
    assert pace.chunk_tokens(StepShape(), start=0, least=16, most=512, unit=16) == 512


def paced_engine(slowdown: float, token_s: float) -> tuple[Engine, FakeRunner]:
    pace = StepPace(StepCost(0.01, 0.0, token_s, 0.0), slowdown)
    return fake_engine(num_pages=400, chunk_tokens=64, max_num_seqs=8, pace=pace)


def chunks_beside_two_streams(slowdown: float, token_s: float) -> list[int]:
    engine, runner = paced_engine(slowdown, token_s)
    for name in ("a", "b"):
        engine.submit(spec_of(name, length=3, max_tokens=150))
    for _ in range(3):
        engine.step()
    runner.plans.clear()
    spec = spec_of("long", length=200, max_tokens=4)
    engine.submit(spec)
    tokens: list[int] = []
    while engine.num_requests > 2:
        for event in engine.step():
            if isinstance(event, OutputEvent) and event.request_id == "long":
                tokens += [t for chunk in event.chunks for t in chunk.token_ids]
    assert tokens == expected_tokens(spec, 0, context=1600)
    rows = [{r.sequence_id: len(r.token_ids) for r in plan.rows} for plan in runner.plans]
    assert all({1, 2} <= set(step) for step in rows), "a stream was left out of a step"
    return [step[3] for step in rows if step.get(3, 0) > 1]


@pytest.mark.parametrize(
    ("slowdown", "token_s", "expected"),
    [
        # (0.01 + 2 * 0.001) * 2 = 0.024: 12 tokens more than the two rows.
        (2.0, 0.001, 12),
        # No room at all: one block of 4 tokens.
        (1.0, 0.001, 4),
        # Tokens for nothing: all that the step may hold beside two rows.
        (1.0, 0.0, 62),
    ],
)
def test_a_prompt_goes_on_beside_streams_in_chunks_of_their_pace(
    slowdown: float, token_s: float, expected: int
) -> None:
    chunks = chunks_beside_two_streams(slowdown, token_s)
    assert chunks[0] == expected
    assert sum(chunks) >= 199 and set(chunks[:-1]) == {expected}


def test_prompts_that_came_together_do_not_wait_for_each_others_streams() -> None:
    engine, runner = paced_engine(slowdown=1.0, token_s=0.001)
    for name in ("a", "b", "c"):
        engine.submit(spec_of(name, length=100, max_tokens=30))
    while engine.num_requests > 0:
        engine.step()
    # 300 tokens at 64 a step, though the first stream begins after two; then they decode.
    assert len(runner.plans) <= 300 // 60 + 30


def test_a_prompt_keeps_the_pace_of_a_stream_that_was_there_before() -> None:
    engine, runner = paced_engine(slowdown=1.0, token_s=0.001)
    engine.submit(spec_of("first", length=3, max_tokens=150))
    engine.step()
    for name in ("a", "b"):
        engine.submit(spec_of(name, length=100, max_tokens=5))
    runner.plans.clear()
    while len(runner.plans) < 20:
        engine.step()
    assert all(sum(len(r.token_ids) for r in plan.rows) <= 1 + 4 for plan in runner.plans)
