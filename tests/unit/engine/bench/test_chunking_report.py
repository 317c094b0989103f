"""What the chunking bench counts as undisturbed, mixed, and the prompt's first token."""

from __future__ import annotations

from paceline.engine.bench.chunking import _QUIET_STEPS, _gaps
from paceline.engine.bench.rig import greedy_spec, quantile
from tests.unit.engine.fake_runner import fake_engine, prompt_of


def test_gaps_are_those_of_the_steps_up_to_the_prompts_first_token() -> None:
    engine, runner = fake_engine(num_pages=300, chunk_tokens=12, context=400)
    for name in ("stream-0", "stream-1"):
        engine.submit(greedy_spec(name, prompt_of(name, 3), 120))
    engine.step()
    runner.plans.clear()
    gaps = _gaps(engine, prompt_of("long", 40))
    quiet, mixed = runner.plans[:_QUIET_STEPS], runner.plans[_QUIET_STEPS:]
    assert all(len(plan.rows) == 2 for plan in quiet)
    assert all(len(plan.rows) == 3 for plan in mixed)
    # Ten tokens of the prompt beside two rows of streams: four chunks.
    assert len(gaps.mixed_s) == len(mixed) == 4
    assert len(gaps.quiet_s) == _QUIET_STEPS
    assert gaps.ttft_s == sum(gaps.mixed_s)


def test_quantiles_are_values_that_occurred() -> None:
    values = tuple(float(n) for n in range(100, 0, -1))
    assert [quantile(values, q) for q in (0.0, 0.5, 0.99, 1.0)] == [1, 50, 99, 100]
    assert quantile((3.0,), 0.99) == 3.0
