"""Steps with draft trees bring, token for token, what steps without bring."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from paceline.domain.request import GenerationSpec, SamplingParams, TokenLogprobs
from paceline.engine import request
from paceline.engine.build import build_engine
from paceline.engine.engine import Engine
from paceline.engine.options import EngineOptions
from paceline.engine.spec.drafter import DrafterNeeds
from tests.checkpoints import random_checkpoint
from tests.unit.engine.memory_arena import run_until_idle, tokens_of
from tests.unit.engine.spec.guesser import Guesser

GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=0.9, top_k=40, top_p=0.9, min_p=0.01)
PENALISED = SamplingParams(
    temperature=0.8, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint("mistral", tmp_path_factory.mktemp("checkpoint") / "mistral")


def specs(count: int, **fields: Any) -> list[GenerationSpec]:
    rng = random.Random(3)
    kinds = [GREEDY, SAMPLED, PENALISED]
    return [
        GenerationSpec(
            request_id=str(i),
            prompt_token_ids=tuple(rng.randrange(4, 4096) for _ in range(rng.randint(1, 60))),
            sampling=replace(kinds[i % 3], seed=i),
            max_tokens=rng.randint(1, 30),
            **fields,
        )
        for i in range(count)
    ]


def engine_for(directory: Path, guesser: Guesser | None, **options: Any) -> Engine:
    defaults = {"num_kv_blocks": 256, "chunk_tokens": 64, "max_num_seqs": 16}
    engine, _ = build_engine(EngineOptions(model=str(directory), **{**defaults, **options}))
    engine._speculator = guesser
    return engine


def generate(engine: Engine, wanted: list[GenerationSpec]) -> dict[tuple[str, int], list[Any]]:
    """All outputs, with their log-probabilities where asked for."""
    for spec in wanted:
        engine.submit(spec)
    chunks = run_until_idle(engine)
    assert engine.check_integrity() == []
    outputs: dict[tuple[str, int], list[Any]] = {}
    for spec in wanted:
        for index in range(spec.n):
            tokens = tokens_of(chunks[spec.request_id], index)
            logprobs: list[TokenLogprobs] = [
                entry
                for event in chunks[spec.request_id]
                for chunk in event.chunks
                if chunk.index == index
                for entry in chunk.logprobs
            ]
            outputs[spec.request_id, index] = [tokens, logprobs]
    return outputs


def oracle(outputs: dict[tuple[str, int], list[Any]]) -> Any:
    def future(sequence: request.Sequence) -> list[int]:
        key = (sequence.request.spec.request_id, sequence.index)
        return outputs[key][0][sequence.num_output :]

    return future


@pytest.mark.parametrize("dtype", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("max_num_seqs", [1, 8])
def test_drafts_change_no_token(checkpoint: Path, dtype: str, max_num_seqs: int) -> None:
    wanted = specs(12, logprobs=2)
    options = {"dtype": dtype, "max_num_seqs": max_num_seqs}
    plain = generate(engine_for(checkpoint, None, **options), wanted)
    guesser = Guesser(oracle(plain), 4096)
    drafted = generate(engine_for(checkpoint, guesser, **options), wanted)
    # Log-probabilities too, to the last bit.
    assert drafted == plain
    assert guesser.num_accepted > 20 and guesser.num_drafted > 1.5 * guesser.num_accepted


def test_drafts_change_no_token_with_preemption_and_siblings(checkpoint: Path) -> None:
    wanted = specs(8, n=2)
    plain = generate(engine_for(checkpoint, None), wanted)
    guesser = Guesser(oracle(plain), 4096)
    engine = engine_for(checkpoint, guesser, num_kv_blocks=14)
    assert generate(engine, wanted) == plain
    assert engine.load().num_preemptions > 0 and guesser.num_accepted > 20
    assert engine.load().free_blocks == 14
    assert len(guesser.forgotten) == 16


def test_a_draft_ends_where_the_sequence_does(checkpoint: Path) -> None:
    plain = generate(engine_for(checkpoint, None), specs(6))
    stops = [spec for spec in specs(6) if len(plain[spec.request_id, 0][0]) > 4]
    stops = [replace(s, stop_token_ids=frozenset([plain[s.request_id, 0][0][3]])) for s in stops]
    expected = generate(engine_for(checkpoint, None), stops)
    guesser = Guesser(oracle(plain), 4096, accuracy=1.0)
    assert generate(engine_for(checkpoint, guesser), stops) == expected
    assert guesser.num_accepted > 0


def test_the_cache_holds_what_drafts_left_in_place(checkpoint: Path) -> None:
    """A second request over prompt and output of the first hits blocks that drafts computed."""
    first = specs(3)[2]
    first = replace(first, max_tokens=60, ignore_eos=True)
    plain = generate(engine_for(checkpoint, None), [first])
    tokens = plain[first.request_id, 0][0]
    second = replace(
        first, request_id="second", prompt_token_ids=(*first.prompt_token_ids, *tokens)
    )
    expected = generate(engine_for(checkpoint, None), [second])["second", 0]
    engine = engine_for(checkpoint, Guesser(oracle(plain), 4096, accuracy=1.0))
    assert generate(engine, [first]) == plain
    engine._speculator = None
    assert generate(engine, [second])["second", 0] == expected


def test_drafters_are_told_successors_of_every_place(checkpoint: Path) -> None:
    wanted = [replace(spec, sampling=GREEDY) for spec in specs(4)]
    plain = generate(engine_for(checkpoint, None), wanted)
    guesser = Guesser(oracle(plain), 4096, needs=DrafterNeeds(successors=3))
    engine = engine_for(checkpoint, guesser)
    assert generate(engine, wanted) == plain
    seen = 0
    for result in guesser.results:
        for row in result.rows:
            if row.tokens:
                assert row.successors is not None
                places = [0, *[node + 1 for node in row.path]]
                drawn = [row.successors[place][0] for place in places]
                assert drawn == [token.token_id for token in row.tokens]
                assert all(len(set(best)) == 3 for best in row.successors)
                seen += 1
    assert seen > 10


def test_drafters_are_told_the_hidden_state_behind_the_last_token(checkpoint: Path) -> None:
    wanted = [replace(spec, sampling=GREEDY) for spec in specs(4)]
    plain = generate(engine_for(checkpoint, None), wanted)
    guesser = Guesser(oracle(plain), 4096, needs=DrafterNeeds(hidden=True))
    engine = engine_for(checkpoint, guesser)
    assert generate(engine, wanted) == plain
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    head_VE = model.get_output_embeddings().weight.detach()
    rows = [row for result in guesser.results for row in result.rows if row.tokens]
    assert any(row.path for row in rows)
    for row in rows:
        assert row.hidden_E is not None
        assert int((head_VE @ row.hidden_E).argmax()) == row.tokens[-1].token_id
