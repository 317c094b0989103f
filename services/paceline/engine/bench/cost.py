"""`paceline bench cost`: how far the step cost is off, on steps that were not fitted.

Decode, prefill and mixed steps are drawn at random, timed and compared with the prediction
that schedulers and routing would use. The error is |predicted / measured - 1|.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path

from paceline.engine.bench.options import BenchOptions
from paceline.engine.build import build_engine
from paceline.engine.options import EngineOptions
from paceline.engine.probe import ProbeStep, StepTimer

_NUM_STEPS = 48
_MAX_ROWS = 32
_MAX_NODES = 64
_MAX_CONTEXT = 2000
_CHUNKS = (16, 512)
_POOL_MB = 512
"""Far more than any cache, so that contexts are read from memory."""


@dataclass(frozen=True, slots=True)
class _Point:
    step: ProbeStep
    measured_s: float
    predicted_s: float

    @property
    def error(self) -> float:
        return abs(self.predicted_s / self.measured_s - 1)


def bench_cost(options: BenchOptions) -> dict[str, object]:
    """Measure and return the report."""
    engine_options = EngineOptions(
        model=options.model,
        dtype=options.dtype,
        threads=options.threads,
        kv_memory_mb=_POOL_MB,
        batch_invariant=options.batch_invariant,
        drafters=(),
    )
    started_s = time.perf_counter()
    engine, card = build_engine(engine_options)
    start_s = time.perf_counter() - started_s
    timer = StepTimer(engine.runner, num_pages=card.num_kv_blocks, block_size=card.block_size)
    steps = held_out_steps(options.seed, _NUM_STEPS, card.max_context_tokens)
    points = [
        _Point(step, measured_s, card.step_cost.step_s(step.shape))
        for step, measured_s in zip(steps, timer.best_s(steps), strict=True)
    ]
    if not options.is_quiet:
        _print_table(points)
    errors = sorted(point.error for point in points)
    return {
        "model": Path(options.model).resolve().name,
        "dtype": options.dtype,
        "threads": options.threads,
        "n": len(errors),
        "median_error": round(errors[len(errors) // 2], 4),
        "p95_error": round(errors[min(len(errors) - 1, int(0.95 * len(errors)))], 4),
        "max_error": round(errors[-1], 4),
        "start_s": round(start_s, 3),
    }


def held_out_steps(seed: int, count: int, max_context_tokens: int) -> list[ProbeStep]:
    """Return random steps: as many that only decode, only prefill, and do both."""
    rng = random.Random(seed)
    longest = min(_MAX_CONTEXT, max_context_tokens - 1)
    steps = []
    for i in range(count):
        has_rows, has_chunk = i % 3 != 1, i % 3 != 0
        mean = rng.uniform(0, longest)
        rows = rng.randint(1, _MAX_ROWS) if has_rows else 0
        starts = tuple(int(mean * rng.uniform(0.9, 1)) for _ in range(rows))
        # As many short chunks as long ones on a scale of ratios.
        low, high = _CHUNKS
        tokens = min(int(low * (high / low) ** rng.random()), longest)
        chunk = (tokens, rng.randint(0, longest - tokens))
        # Every other step that decodes has drafts, of a size that would be chosen.
        most = min(_MAX_NODES // max(1, rows), 16, longest - max(starts, default=0))
        nodes = rng.randint(0, max(0, most)) if i % 2 else 0
        steps.append(ProbeStep(starts, (chunk,) if has_chunk else (), nodes))
    return steps


def _print_table(points: list[_Point]) -> None:
    print(
        f"{'rows':>5}{'context':>9}{'chunk':>7}{'start':>7}{'ms':>10}{'predicted':>11}{'error':>8}"
    )
    for point in points:
        starts, chunks = point.step.starts, point.step.chunks or ((0, 0),)
        context = sum(starts) // max(1, len(starts))
        print(
            f"{len(starts):>5}{context:>9}{chunks[0][0]:>7}{chunks[0][1]:>7}"
            f"{1e3 * point.measured_s:>10.2f}{1e3 * point.predicted_s:>11.2f}"
            f"{point.predicted_s / point.measured_s - 1:>8.0%}"
        )
