"""`paceline bench engine`: prefill and decode rate of one engine at one concurrency.

After a warm-up two calls on prompts without a common prefix are timed: t1 is the wall time of
one token per request, total that of all tokens. Then

    prefill tok/s = requests * prompt / t1
    decode tok/s  = requests * (tokens - 1) / (total - t1)
    ttft          = mean time to the first token in the second call

so that engines that mix prefill and decode are accounted like those that do them in turn.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median

import paceline
from paceline.engine.bench.options import BenchOptions
from paceline.engine.bench.rig import (
    WARM_UP_STREAM,
    Generation,
    Rig,
    build_rig,
    generate,
    peak_rss_mb,
    random_prompts,
)
from paceline.engine.build import EngineCard

_WARM_UP_TOKENS = 4


def bench_generation(options: BenchOptions) -> dict[str, object]:
    """Measure and return the report."""
    num_tokens = options.prompt_len + options.gen_len
    rig = build_rig(options, num_sequences=options.concurrency, num_tokens=num_tokens)
    return measure_generation(rig, options)


def measure_generation(rig: Rig, options: BenchOptions) -> dict[str, object]:
    """Measure on an engine that is built already."""

    def call(stream: int, num_tokens: int) -> Generation:
        prompts = random_prompts(
            rig.card.config.vocab_size,
            seed=options.seed,
            stream=stream,
            count=options.concurrency,
            length=options.prompt_len,
        )
        return generate(rig.engine, prompts, num_tokens)

    call(WARM_UP_STREAM, min(_WARM_UP_TOKENS, options.gen_len))
    first = call(0, 1)
    second = call(1, options.gen_len)
    lengths = {len(output) for output in second.outputs}
    if lengths != {options.gen_len}:
        raise RuntimeError(f"asked for {options.gen_len} tokens, got {sorted(lengths)}")
    return _report(options, rig.card, first, second)


def _report(
    options: BenchOptions, card: EngineCard, first: Generation, second: Generation
) -> dict[str, object]:
    count, num_tokens = options.concurrency, options.gen_len
    decode_s = second.total_s - first.total_s
    rate = round(count * (num_tokens - 1) / decode_s, 2) if num_tokens > 1 else None
    steps = second.decode_steps
    runner_us = 1e6 * median(inside for _, inside in steps) if steps else None
    return {
        "peer": "paceline",
        "version": paceline.__version__,
        "dtype": options.dtype,
        "prompt_len": options.prompt_len,
        "gen_len": num_tokens,
        "concurrency": count,
        "prefill_tok_s": round(count * options.prompt_len / first.total_s, 1),
        "decode_tok_s": rate,
        "total_s": round(second.total_s, 3),
        "ttft_s": round(sum(second.first_token_s) / count, 4),
        "peak_rss_mb": round(peak_rss_mb(), 1),
        "t1_s": round(first.total_s, 4),
        "ttft_streamed": True,
        "threads": options.threads,
        "model": Path(options.model).resolve().name,
        "head": list(second.outputs[0][:8]),
        "batch_invariant": options.batch_invariant,
        # Medians over the steps in which every request decodes.
        "step_us": round(1e6 * median(wall for wall, _ in steps), 1) if steps else None,
        "step_overhead_us": round(1e6 * median(w - i for w, i in steps), 1) if steps else None,
        # The runner's time by layer: head and drawing are in it.
        "layer_us": None if runner_us is None else round(runner_us / card.config.num_layers, 1),
    }
