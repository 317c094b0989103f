"""An engine sized for a bench, and prompts nobody has in a cache.

The benches of this folder share it. Prompts depend on the seed and the vocabulary alone, so
that other engines can be given the same ones.
"""

from __future__ import annotations

import gc
import math
import random
import resource
import time
from dataclasses import dataclass

from paceline.domain.request import GenerationSpec, SamplingParams
from paceline.engine.bench.options import BenchOptions
from paceline.engine.build import EngineCard, build_engine
from paceline.engine.engine import Engine
from paceline.engine.events import FailedEvent, OutputEvent
from paceline.engine.options import EngineOptions

_NUM_SPECIALS = 3
"""Ids at the start of the vocabulary that prompts leave out."""

WARM_UP_STREAM = 77
"""Prompts of the warm-up; measured ones are of other streams."""


@dataclass(frozen=True, slots=True)
class Generation:
    """What one call brought; times are seconds since all requests were submitted."""

    outputs: tuple[tuple[int, ...], ...]
    first_token_s: tuple[float, ...]
    total_s: float
    decode_steps: tuple[tuple[float, float], ...]
    """(wall time, of which inside the runner) of each step after every first token."""


@dataclass(frozen=True, slots=True)
class Rig:
    """An engine to measure on."""

    engine: Engine
    card: EngineCard


def build_rig(
    options: BenchOptions,
    *,
    num_sequences: int,
    num_tokens: int,
    mixed_step_ratio: float | None = None,
) -> Rig:
    """Return an engine whose pool just holds so many sequences of so many tokens."""
    defaults = EngineOptions(options.model)
    block_size = defaults.block_size
    # Admission wants one page more for each running sequence than its prompt fills.
    num_blocks = num_sequences * (-(-num_tokens // block_size) + 2)
    engine, card = build_engine(
        EngineOptions(
            model=options.model,
            dtype=options.dtype,
            num_kv_blocks=max(2, num_blocks),
            max_num_seqs=num_sequences,
            threads=options.threads,
            batch_invariant=options.batch_invariant,
            mixed_step_ratio=mixed_step_ratio or defaults.mixed_step_ratio,
            # What is measured is the engine; bench spec measures drafts.
            drafters=(),
        )
    )
    warm_collector()
    return Rig(engine, card)


def warm_collector() -> None:
    """Spare the collector, as a worker does, what lives as long as the process."""
    gc.collect()
    gc.freeze()


def random_prompts(
    vocab_size: int, *, seed: int, stream: int, count: int, length: int
) -> list[tuple[int, ...]]:
    """Return distinct prompts, the same for every engine that is measured with this seed."""
    rng = random.Random(1_000_003 * seed + stream)
    return [
        tuple(rng.randrange(_NUM_SPECIALS, vocab_size) for _ in range(length)) for _ in range(count)
    ]


def greedy_spec(name: str, prompt: tuple[int, ...], num_tokens: int) -> GenerationSpec:
    """Return a request for exactly so many of the most likely tokens."""
    return GenerationSpec(
        request_id=name,
        prompt_token_ids=prompt,
        sampling=SamplingParams(temperature=0.0),
        max_tokens=num_tokens,
        ignore_eos=True,
    )


def generate(engine: Engine, prompts: list[tuple[int, ...]], num_tokens: int) -> Generation:
    """Submit all prompts at once and step until every one has its tokens."""
    outputs: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    first_token_s: dict[str, float] = {}
    decode_steps: list[tuple[float, float]] = []
    started_s = time.perf_counter()
    for name, prompt in zip(outputs, prompts, strict=True):
        engine.submit(greedy_spec(name, prompt, num_tokens))
    while engine.num_requests:
        is_decoding = len(first_token_s) == len(prompts)
        step_started_s = time.perf_counter()
        events = engine.step()
        now_s = time.perf_counter()
        if is_decoding:
            decode_steps.append((now_s - step_started_s, engine.last_step_s))
        for event in events:
            if isinstance(event, FailedEvent):
                raise RuntimeError(f"request {event.request_id}: {event.message}")
            if isinstance(event, OutputEvent):
                for chunk in event.chunks:
                    first_token_s.setdefault(event.request_id, now_s - started_s)
                    outputs[event.request_id] += chunk.token_ids
    return Generation(
        outputs=tuple(map(tuple, outputs.values())),
        first_token_s=tuple(first_token_s[name] for name in outputs),
        total_s=time.perf_counter() - started_s,
        decode_steps=tuple(decode_steps),
    )


def quantile(values: tuple[float, ...], share: float) -> float:
    """Return the smallest value that at least this share of them do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def peak_rss_mb() -> float:
    """Return the most memory this process ever had resident, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
