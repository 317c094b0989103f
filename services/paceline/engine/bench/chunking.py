"""`paceline bench chunking`: what a long prompt does to the streams beside it.

Some streams decode; then a long prompt arrives. The gaps between a stream's tokens (ITL) and
the prompt's time to first token are taken with the chunk limited by predicted time, and with
every chunk as large as a step may be.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from paceline.engine.bench.options import BenchOptions
from paceline.engine.bench.rig import (
    WARM_UP_STREAM,
    Rig,
    build_rig,
    generate,
    greedy_spec,
    quantile,
    random_prompts,
)
from paceline.engine.engine import Engine
from paceline.engine.events import FailedEvent, OutputEvent
from paceline.engine.options import EngineOptions
from paceline.engine.scheduler import CHUNK_UNIT

_STREAM_PROMPT = 128
"""Tokens of each stream's own prompt."""
_QUIET_STEPS = 64
"""Steps of the streams alone."""
_NO_LIMIT = 1e9
_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class _Gaps:
    quiet_s: tuple[float, ...]
    """Between tokens of the streams alone."""
    mixed_s: tuple[float, ...]
    """While the prompt is computed."""
    ttft_s: float
    """Of the prompt."""


def bench_chunking(options: BenchOptions) -> dict[str, object]:
    """Measure both ways in turn, several times, and return the report of medians."""
    ratio = EngineOptions(options.model).mixed_step_ratio
    rounds = [(_measure(options, ratio), _measure(options, _NO_LIMIT)) for _ in range(_ROUNDS)]
    limited = [on for (on, _), _ in rounds]
    whole = [off for _, (off, _) in rounds]
    report: dict[str, object] = {
        "model": Path(options.model).resolve().name,
        "dtype": options.dtype,
        "threads": options.threads,
        "streams": options.concurrency,
        "prompt_len": options.prompt_len,
        "mixed_step_ratio": ratio,
        "rounds": _ROUNDS,
        "undisturbed": _summary(
            [gaps.quiet_s for gaps in limited], [alone_s for (_, alone_s), _ in rounds]
        ),
        "on": _summary([gaps.mixed_s for gaps in limited], [gaps.ttft_s for gaps in limited]),
        "off": _summary([gaps.mixed_s for gaps in whole], [gaps.ttft_s for gaps in whole]),
    }
    ratios = [quantile(gaps.mixed_s, 0.99) / quantile(gaps.quiet_s, 0.99) for gaps in limited]
    report["p99_ratio"] = round(median(ratios), 2)
    if not options.is_quiet:
        _print_table(report)
    return report


def _measure(options: BenchOptions, ratio: float) -> tuple[_Gaps, float]:
    """Return the gaps, and the prompt's time to first token while nothing decodes."""
    # Long enough for a prompt that goes on by the least chunks.
    num_steps = 2 * _QUIET_STEPS + options.prompt_len // CHUNK_UNIT
    longest = max(options.prompt_len + 1, _STREAM_PROMPT + num_steps)
    rig = build_rig(
        options,
        num_sequences=options.concurrency + 1,
        num_tokens=longest,
        mixed_step_ratio=ratio,
    )
    warm, alone, measured = (_prompt(rig, options, stream) for stream in (WARM_UP_STREAM, 0, 1))
    generate(rig.engine, [warm], 1)
    alone_s = generate(rig.engine, [alone], 1).total_s
    for i, prompt in enumerate(_stream_prompts(rig, options)):
        rig.engine.submit(greedy_spec(f"stream-{i}", prompt, num_steps))
    while rig.engine.load().pending_prefill_tokens:
        rig.engine.step()
    gaps = _gaps(rig.engine, measured)
    return gaps, alone_s


def _gaps(engine: Engine, prompt: tuple[int, ...]) -> _Gaps:
    """Step the streams alone, then with the prompt until its first token.

    Every stream gets a token from every step, so the gaps of all of them are the steps.
    """
    quiet_s = [_step(engine)[0] for _ in range(_QUIET_STEPS)]
    engine.submit(greedy_spec("prompt", prompt, 2))
    mixed_s: list[float] = []
    is_computing = True
    while is_computing:
        seconds, names = _step(engine)
        mixed_s.append(seconds)
        is_computing = "prompt" not in names
    return _Gaps(tuple(quiet_s), tuple(mixed_s), sum(mixed_s))


def _step(engine: Engine) -> tuple[float, set[str]]:
    """Do a step; return its time and who got a token."""
    started_s = time.perf_counter()
    events = engine.step()
    seconds = time.perf_counter() - started_s
    for event in events:
        if isinstance(event, FailedEvent):
            raise RuntimeError(f"request {event.request_id}: {event.message}")
    return seconds, {e.request_id for e in events if isinstance(e, OutputEvent) and e.chunks}


def _prompt(rig: Rig, options: BenchOptions, stream: int) -> tuple[int, ...]:
    vocab_size, length = rig.card.config.vocab_size, options.prompt_len
    return random_prompts(vocab_size, seed=options.seed, stream=stream, count=1, length=length)[0]


def _stream_prompts(rig: Rig, options: BenchOptions) -> list[tuple[int, ...]]:
    return random_prompts(
        rig.card.config.vocab_size,
        seed=options.seed,
        stream=2,
        count=options.concurrency,
        length=_STREAM_PROMPT,
    )


def _summary(rounds_s: list[tuple[float, ...]], ttft_s: list[float]) -> dict[str, float]:
    """Return medians over the rounds of a way's quantiles of gaps, and of its first tokens."""
    return {
        "itl_p50_ms": round(1e3 * median(quantile(gaps_s, 0.5) for gaps_s in rounds_s), 2),
        "itl_p99_ms": round(1e3 * median(quantile(gaps_s, 0.99) for gaps_s in rounds_s), 2),
        "ttft_s": round(median(ttft_s), 4),
    }


def _print_table(report: dict[str, object]) -> None:
    print(f"{'prompt work':<14}{'ITL p50 ms':>12}{'ITL p99 ms':>12}{'TTFT s':>10}")
    for name in ("undisturbed", "on", "off"):
        part = report[name]
        assert isinstance(part, dict)
        print(f"{name:<14}{part['itl_p50_ms']:>12}{part['itl_p99_ms']:>12}{part['ttft_s']:>10}")
