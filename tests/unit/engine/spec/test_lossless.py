"""With every drafter 200 prompts give the tokens that they give without, whatever the batch."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline.domain.request import GenerationSpec, SamplingParams
from paceline.engine.build import build_engine
from paceline.engine.engine import Engine
from paceline.engine.options import EngineOptions
from paceline.engine.spec.drafters.medusa_file import MedusaConfig, save_medusa
from tests.checkpoints import random_checkpoint
from tests.unit.engine.memory_arena import run_until_idle, tokens_of

VOCAB, HIDDEN, NUM_PROMPTS = 4096, 64, 200

MODES = [
    "AUTO",
    "trie",
    "recycling",
    "model",
    "layer-skip",
    "medusa",
    "trie+recycling",
    "trie+model",
    "trie+recycling+model",
]
BUILDERS = ["chain", "static", "rsd-c", "rsd-s"]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint("llama", tmp_path_factory.mktemp("target") / "llama")


@pytest.fixture(scope="module")
def draft(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model with the target's tokenizer, right now and then."""
    directory = random_checkpoint("qwen3", tmp_path_factory.mktemp("draft") / "qwen3")
    return directory


@pytest.fixture(scope="module")
def medusa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("medusa")
    torch.manual_seed(1)
    tensors = {f"{k}.0.linear.weight": torch.randn(HIDDEN, HIDDEN) * 0.05 for k in range(3)}
    tensors |= {f"{k}.0.linear.bias": torch.zeros(HIDDEN) for k in range(3)}
    save_medusa(directory, tensors, MedusaConfig(3, 1, HIDDEN, VOCAB))
    return directory


@cache
def prompts() -> list[GenerationSpec]:
    """Greedy and sampled requests of several tenants; many share a prefix of whole blocks."""
    rng = random.Random(5)
    heads = [tuple(rng.randrange(4, 300) for _ in range(48)) for _ in range(4)]
    kinds = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.7, top_k=5),
        SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.2, frequency_penalty=0.1),
    ]
    specs = []
    for i in range(NUM_PROMPTS):
        # Few different tokens, so that there is something to look up.
        tail = tuple(rng.randrange(4, 40) for _ in range(rng.randint(1, 24)))
        specs.append(
            GenerationSpec(
                request_id=str(i),
                prompt_token_ids=(heads[i % 4] if i % 3 else ()) + tail,
                sampling=replace(kinds[i % 3], seed=i),
                max_tokens=36 if i % 4 == 1 else rng.randint(1, 8),
                cache_salt=b"ab"[i % 2 : i % 2 + 1],
                n=2 if i % 20 == 0 else 1,
            )
        )
    return specs


def engine_for(target: Path, concurrency: int, **options: Any) -> Engine:
    # Some ten blocks fewer than the running sequences want: they are preempted.
    num_blocks = {1: 12, 8: 16, 32: 120}[concurrency]
    return build_engine(
        EngineOptions(
            model=str(target),
            num_kv_blocks=num_blocks,
            max_num_seqs=concurrency,
            chunk_tokens=64,
            **options,
        )
    )[0]


def generate(engine: Engine, mode: str) -> list[list[int]]:
    for spec in prompts():
        engine.submit(replace(spec, speculation=mode))
    outputs = run_until_idle(engine)
    assert engine.check_integrity() == []
    return [tokens_of(outputs[s.request_id], i) for s in prompts() for i in range(s.n)]


@pytest.fixture(scope="module")
def plain(target: Path) -> list[list[int]]:
    return generate(engine_for(target, 8, drafters=()), "OFF")


@pytest.mark.parametrize("concurrency", [1, 8, 32])
def test_every_drafter_is_lossless(
    target: Path, draft: Path, medusa: Path, plain: list[list[int]], concurrency: int
) -> None:
    engine = engine_for(
        target,
        concurrency,
        drafters=("trie", "recycling", "model", "layer-skip", "medusa"),
        draft=str(draft),
        medusa=str(medusa),
        draft_nodes=6,
        draft_depth=4,
    )
    for mode in MODES:
        assert generate(engine, mode) == plain, mode
    load = engine.load()
    assert load.speculation is not None
    if concurrency == 8:
        assert load.num_preemptions > 0
    used = {report.name for report in load.speculation.drafters if report.rounds}
    assert used >= set(MODES) - {"AUTO"}


@pytest.mark.parametrize("builder", BUILDERS)
def test_every_shape_of_tree_is_lossless(
    target: Path, plain: list[list[int]], builder: str
) -> None:
    # The target drafts for itself, so that much is accepted.
    engine = engine_for(
        target,
        8,
        drafters=("model",),
        draft=str(target),
        draft_builder=builder,
        draft_nodes=6,
        draft_depth=3,
    )
    assert generate(engine, "model") == plain
    load = engine.load()
    assert load.speculation is not None
    report = load.speculation.drafters[0]
    assert report.accepted > report.rounds
