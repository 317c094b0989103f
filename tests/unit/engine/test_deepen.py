"""A deepened model says, bit for bit, what the model says, and has so many layers more."""

from __future__ import annotations

from pathlib import Path

import pytest

from paceline.domain.request import GenerationSpec, SamplingParams
from paceline.engine.build import build_engine
from paceline.engine.options import EngineOptions
from tests.checkpoints import random_checkpoint
from tests.unit.engine.memory_arena import run_until_idle


@pytest.mark.parametrize("name", ["llama-biased-llama3-rope", "qwen3", "mistral"])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "int8"])
def test_identity_layers_change_nothing(tmp_path: Path, name: str, dtype: str) -> None:
    directory = random_checkpoint(name, tmp_path / name)
    outputs, digests, sizes = [], set(), []
    for deepen in (0, 5):
        engine, card = build_engine(
            EngineOptions(
                model=str(directory), dtype=dtype, deepen=deepen, num_kv_blocks=16, drafters=()
            )
        )
        for seed in range(3):
            engine.submit(
                GenerationSpec(
                    request_id=str(seed),
                    prompt_token_ids=tuple(range(5, 40 + seed)),
                    sampling=SamplingParams(temperature=0.5 * seed, seed=seed),
                    max_tokens=12,
                    ignore_eos=True,
                    logprobs=3,
                )
            )
        events = run_until_idle(engine)
        outputs.append(
            {name: [c for e in found for c in e.chunks] for name, found in events.items()}
        )
        digests |= {card.model_digest, card.kv_root}
        sizes.append((card.config.num_layers, card.block_bytes))
    assert outputs[0] == outputs[1]
    assert len(digests) == 4, "blocks of the two could be mistaken for each other"
    layers, block_bytes = sizes[0]
    assert sizes[1] == (layers + 5, block_bytes // layers * (layers + 5))
