"""`paceline bench roofline`: predicted, measured and possible speed, side by side.

Possible is what the machine's bandwidth and matrix rates allow for the model's shape
(bounds.py); predicted is what the step cost says; measured is what `bench engine` measures.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from paceline.domain.cost import StepShape
from paceline.engine.bench.bounds import (
    ModelSize,
    decode_bound_tok_s,
    model_size,
    prefill_bound_tok_s,
)
from paceline.engine.bench.generation import measure_generation
from paceline.engine.bench.machine import MachineRates, measure_machine
from paceline.engine.bench.options import BenchOptions
from paceline.engine.bench.rig import Rig, build_rig
from paceline.engine.options import EngineOptions

_CONCURRENCY = (1, 8, 32)


@dataclass(frozen=True, slots=True)
class _Line:
    """Tokens per second of one phase."""

    phase: str
    concurrency: int
    predicted_tok_s: float
    measured_tok_s: float
    limit_tok_s: float

    def to_json(self) -> dict[str, object]:
        rounded = {k: round(v, 1) if isinstance(v, float) else v for k, v in asdict(self).items()}
        return {**rounded, "limit_share": round(self.measured_tok_s / self.limit_tok_s, 3)}


def bench_roofline(options: BenchOptions) -> dict[str, object]:
    """Measure machine and engine and return the report."""
    rates = measure_machine(options.threads)
    num_tokens = options.prompt_len + options.gen_len
    rig = build_rig(options, num_sequences=max(_CONCURRENCY), num_tokens=num_tokens)
    size = model_size(rig.card.config)
    lines: list[_Line] = []
    for concurrency in _CONCURRENCY:
        report = measure_generation(rig, replace(options, concurrency=concurrency))
        if concurrency == 1:
            lines.append(_prefill_line(options, rig, size, rates, report))
        lines.append(_decode_line(options, rig, size, rates, concurrency, report))
    if not options.is_quiet:
        _print_table(rates, lines)
    return {
        "model": Path(options.model).resolve().name,
        "dtype": options.dtype,
        "threads": options.threads,
        "prompt_len": options.prompt_len,
        "gen_len": options.gen_len,
        "machine": asdict(rates),
        "lines": [line.to_json() for line in lines],
    }


def _prefill_line(
    options: BenchOptions,
    rig: Rig,
    size: ModelSize,
    rates: MachineRates,
    report: dict[str, object],
) -> _Line:
    length = options.prompt_len
    chunk = EngineOptions(options.model).chunk_tokens
    return _Line(
        phase="prefill",
        concurrency=1,
        predicted_tok_s=length / rig.card.step_cost.prefill_s(length, 0, chunk),
        measured_tok_s=_number(report, "prefill_tok_s"),
        limit_tok_s=prefill_bound_tok_s(size, rates, options.dtype, prompt_len=length),
    )


def _decode_line(
    options: BenchOptions,
    rig: Rig,
    size: ModelSize,
    rates: MachineRates,
    concurrency: int,
    report: dict[str, object],
) -> _Line:
    context = options.prompt_len + options.gen_len / 2
    shape = StepShape(rows=concurrency, attended=int(concurrency * context))
    return _Line(
        phase="decode",
        concurrency=concurrency,
        predicted_tok_s=concurrency / rig.card.step_cost.step_s(shape),
        measured_tok_s=_number(report, "decode_tok_s"),
        limit_tok_s=decode_bound_tok_s(
            size, rates, options.dtype, context=context, concurrency=concurrency
        ),
    )


def _number(report: dict[str, object], name: str) -> float:
    value = report[name]
    assert isinstance(value, float), f"{name} is {value!r}"
    return value


def _print_table(rates: MachineRates, lines: list[_Line]) -> None:
    gflops = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.gflops.items())
    print(
        f"read {rates.read_4k_gb_s:.1f} GB/s with 4 KiB pages, {rates.read_2m_gb_s:.1f} with 2 MiB"
    )
    print(f"GFLOP/s: {gflops}")
    print(f"{'':<10}{'requests':>9}{'predicted':>11}{'measured':>10}{'limit':>10}{'share':>8}")
    for line in lines:
        print(
            f"{line.phase:<10}{line.concurrency:>9}{line.predicted_tok_s:>11.1f}"
            f"{line.measured_tok_s:>10.1f}{line.limit_tok_s:>10.1f}"
            f"{line.measured_tok_s / line.limit_tok_s:>8.0%}"
        )
