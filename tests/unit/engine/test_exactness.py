"""Greedy ids and logits equal transformers', whatever the batch, chunk, cache or preemption."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from paceline.domain.request import GenerationSpec, SamplingParams
from paceline.engine.build import build_engine
from paceline.engine.engine import Engine
from paceline.engine.events import OutputEvent
from paceline.engine.models.config import load_model_config
from paceline.engine.options import EngineOptions
from tests.checkpoints import ARCHITECTURES, DEMO, VARIANTS, random_checkpoint
from tests.unit.engine.memory_arena import MemoryArena, collect, run_until_idle, tokens_of

GREEDY = SamplingParams(temperature=0.0)
TIE = 1e-4
"""Logits that differ by less may change places with the order of a sum."""

MODELS = [*ARCHITECTURES, *VARIANTS]


@lru_cache(maxsize=8)
def reference(directory: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: random_checkpoint(name, root / name) for name in MODELS}


def engine_for(directory: Path, **options: object) -> Engine:
    defaults = {"num_kv_blocks": 256, "chunk_tokens": 64, "max_num_seqs": 32}
    return build_engine(EngineOptions(model=str(directory), **{**defaults, **options}))[0]


def arena_for(directory: Path) -> MemoryArena:
    """A store for pages of 16 tokens in float32."""
    config = load_model_config(directory)
    per_token = config.num_layers * 2 * config.num_kv_heads * config.head_dim * 4
    return MemoryArena(256, 16 * per_token)


def random_prompts(count: int, seed: int, low: int = 1, high: int = 90) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return [
        tuple(rng.randrange(4, 4096) for _ in range(rng.randint(low, high))) for _ in range(count)
    ]


@torch.inference_mode()
def assert_greedy(
    directory: Path, prompt: tuple[int, ...], output: list[int], tie: float = TIE
) -> int:
    """Check each token against the reference's logits; return how many near ties were exempt."""
    ids = torch.tensor([[*prompt, *output]])
    logits = reference(directory)(ids).logits[0, len(prompt) - 1 : -1]
    ties = 0
    for position, token in enumerate(output):
        best = logits[position].max()
        if logits[position].argmax() != token:
            assert best - logits[position, token] < tie, f"position {position}"
            ties += 1
    return ties


def submit(engine: Engine, name: str, prompt: tuple[int, ...], **fields: object) -> None:
    spec = {"max_tokens": 12, "sampling": GREEDY, "ignore_eos": True, **fields}
    engine.submit(GenerationSpec(request_id=name, prompt_token_ids=prompt, **spec))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunk_tokens", [16, 512])
def test_batched_greedy_ids_equal_the_reference(
    checkpoints: dict[str, Path], name: str, chunk_tokens: int
) -> None:
    directory = checkpoints[name]
    engine = engine_for(directory, chunk_tokens=chunk_tokens)
    prompts = random_prompts(12, seed=chunk_tokens)
    for i, prompt in enumerate(prompts):
        submit(engine, str(i), prompt)
    outputs = run_until_idle(engine)
    ties = 0
    for i, prompt in enumerate(prompts):
        output = tokens_of(outputs[str(i)])
        assert len(output) == 12
        ties += assert_greedy(directory, prompt, output)
    assert ties <= 1, f"{ties} near ties in {12 * 12} tokens"
    assert engine.check_integrity() == []


def test_demo_model_answers_as_the_reference_does() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    subjects = ["the sea", "a clock", "two trains", "my sister's garden", "prime numbers"]
    starts = ["Tell me about", "Once upon a time,", "Why is it that", "List everything in", "Q:"]
    texts = [
        f"{start} {subject} and {number} more. " * (1 + number % 7)
        for number, (start, subject) in enumerate(itertools.product(starts * 2, subjects))
    ]
    prompts = [tuple(tokenizer(text)["input_ids"]) for text in texts]
    assert len(set(prompts)) == 50
    engine = engine_for(DEMO, max_num_seqs=16, num_kv_blocks=512)
    for i, prompt in enumerate(prompts):
        submit(engine, str(i), prompt, max_tokens=16)
    outputs = run_until_idle(engine)
    ties = sum(assert_greedy(DEMO, p, tokens_of(outputs[str(i)])) for i, p in enumerate(prompts))
    assert ties <= 4, f"{ties} near ties in {50 * 16} tokens"


def test_preempted_sequences_lose_no_token(checkpoints: dict[str, Path]) -> None:
    directory = checkpoints["llama"]
    engine = engine_for(directory, num_kv_blocks=12)
    prompts = random_prompts(6, seed=3, low=30, high=60)
    for i, prompt in enumerate(prompts):
        submit(engine, str(i), prompt, max_tokens=60)
    outputs = run_until_idle(engine)
    assert engine.load().num_preemptions > 0
    for i, prompt in enumerate(prompts):
        output = tokens_of(outputs[str(i)])
        assert len(output) == 60
        assert_greedy(directory, prompt, output)
    assert engine.check_integrity() == []


def test_outputs_of_one_prompt_share_its_prefill(checkpoints: dict[str, Path]) -> None:
    directory = checkpoints["qwen3"]
    engine = engine_for(directory)
    prompt = random_prompts(1, seed=5, low=70, high=70)[0]
    submit(engine, "n", prompt, n=4)
    outputs = run_until_idle(engine)["n"]
    first = tokens_of(outputs, 0)
    assert_greedy(directory, prompt, first)
    assert all(tokens_of(outputs, i) == first for i in range(4))
    assert engine.load().num_steps <= 2 + 12
    assert engine.check_integrity() == []


def test_a_prefix_hit_changes_no_token(checkpoints: dict[str, Path]) -> None:
    directory = checkpoints["mistral"]
    engine = engine_for(directory)
    prompt = random_prompts(1, seed=6, low=80, high=80)[0]
    for name in ("cold", "warm"):
        submit(engine, name, prompt)
        events = run_until_idle(engine)[name]
        assert_greedy(directory, prompt, tokens_of(events))
        assert events[0].local_hit_tokens == (64 if name == "warm" else 0)


def test_kv_of_another_engine_continues_the_request(checkpoints: dict[str, Path]) -> None:
    directory = checkpoints["qwen2"]
    prefill, decode = engine_for(directory), engine_for(directory)
    arena = arena_for(directory)
    prefill.attach_arena(arena)
    decode.attach_arena(arena)
    for i, prompt in enumerate(random_prompts(8, seed=7, low=1, high=100)):
        spec = GenerationSpec(str(i), prompt, sampling=GREEDY, max_tokens=12, ignore_eos=True)
        prefill.submit(spec, is_prefill_only=True)
        run_until_idle(prefill, arena)
        decode.submit(spec)
        events = run_until_idle(decode, arena)[str(i)]
        assert events[0].store_hit_tokens == len(prompt) - 1
        assert_greedy(directory, prompt, tokens_of(events))
    assert prefill.check_integrity() == decode.check_integrity() == []


def test_a_corrupt_block_is_computed_again(checkpoints: dict[str, Path]) -> None:
    directory = checkpoints["llama"]
    prefill, decode = engine_for(directory), engine_for(directory)
    arena = arena_for(directory)
    prefill.attach_arena(arena)
    decode.attach_arena(arena)
    prompt = random_prompts(1, seed=8, low=90, high=90)[0]
    spec = GenerationSpec("a", prompt, sampling=GREEDY, max_tokens=12, ignore_eos=True)
    prefill.submit(spec, is_prefill_only=True)
    run_until_idle(prefill, arena)
    third = list(arena.blocks.values())[2]
    arena.payload(third.slot.offset, 8)[3] ^= 0x40
    decode.submit(spec)
    events = run_until_idle(decode, arena)["a"]
    assert events[0].store_hit_tokens == 32
    assert_greedy(directory, prompt, tokens_of(events))


def test_resumed_output_goes_on_where_it_was(checkpoints: dict[str, Path]) -> None:
    directory = checkpoints["llama"]
    engine = engine_for(directory)
    prompt = random_prompts(1, seed=9, low=40, high=40)[0]
    sampling = SamplingParams(temperature=1.0, seed=11)
    spec = GenerationSpec("whole", prompt, sampling=sampling, max_tokens=20, n=2, ignore_eos=True)
    engine.submit(spec)
    whole = run_until_idle(engine)["whole"]
    resumed = {0: tuple(tokens_of(whole, 0)[:7]), 1: tuple(tokens_of(whole, 1)[:13])}
    other = engine_for(directory)
    other.submit(spec, resumed=resumed)
    rest = run_until_idle(other)["whole"]
    for index in (0, 1):
        assert [*resumed[index], *tokens_of(rest, index)] == tokens_of(whole, index)


# -- one seed, the same tokens ------------------------------------------------------------

SEEDED = SamplingParams(
    temperature=0.9, top_p=0.97, min_p=0.001, presence_penalty=0.3, seed=2**64 - 59
)
SEEDED_PROMPT = random_prompts(1, seed=10, low=75, high=75)[0]
NUM_SEEDED = 24


def submit_seeded(engine: Engine, **arguments: Any) -> None:
    spec = GenerationSpec(
        "seeded",
        SEEDED_PROMPT,
        sampling=SEEDED,
        max_tokens=NUM_SEEDED,
        ignore_eos=True,
        n=2,
        logprobs=2,
    )
    engine.submit(spec, **arguments)


def submit_crowd(engine: Engine, count: int, seed: int = 12, **fields: object) -> None:
    """Requests of all kinds."""
    rng = random.Random(seed)
    for i, prompt in enumerate(random_prompts(count, seed=seed)):
        sampling = rng.choice(
            [
                GREEDY,
                SamplingParams(seed=i),
                SamplingParams(temperature=0.5, top_k=20, seed=i),
                SamplingParams(repetition_penalty=1.2, frequency_penalty=0.2, seed=i),
            ]
        )
        n, logprobs = rng.choice([1, 1, 2]), rng.choice([0, 3])
        submit(engine, f"other{i}", prompt, sampling=sampling, n=n, logprobs=logprobs, **fields)


def outcome(engine: Engine, arena: MemoryArena | None = None) -> list[list[int]]:
    outputs = run_until_idle(engine, arena)["seeded"]
    assert engine.check_integrity() == []
    return [tokens_of(outputs, index) for index in range(2)]


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen3"])
def seeded(
    checkpoints: dict[str, Path], request: pytest.FixtureRequest
) -> tuple[Path, list[list[int]]]:
    """A checkpoint and what the seeded request gives when it is alone."""
    directory = checkpoints[request.param]
    engine = engine_for(directory)
    submit_seeded(engine)
    tokens = outcome(engine)
    assert [len(t) for t in tokens] == [NUM_SEEDED] * 2 and tokens[0] != tokens[1]
    return directory, tokens


Seeded = tuple[Path, list[list[int]]]


@pytest.mark.parametrize("chunk_tokens", [16, 37, 512])
@pytest.mark.parametrize("num_others", [0, 31])
def test_a_seed_does_not_feel_chunks_and_neighbours(
    seeded: Seeded, chunk_tokens: int, num_others: int
) -> None:
    directory, expected = seeded
    engine = engine_for(directory, chunk_tokens=chunk_tokens)
    submit_crowd(engine, num_others)
    submit_seeded(engine)
    assert outcome(engine) == expected


@pytest.mark.parametrize("block_size", [8, 32])
def test_a_seed_does_not_feel_the_block_size(seeded: Seeded, block_size: int) -> None:
    directory, expected = seeded
    engine = engine_for(directory, block_size=block_size)
    submit_seeded(engine)
    assert outcome(engine) == expected


def test_a_seed_does_not_feel_preemption(seeded: Seeded) -> None:
    directory, expected = seeded
    engine = engine_for(directory, num_kv_blocks=10)
    submit_seeded(engine)
    outputs: dict[str, list[OutputEvent]] = {}
    for i in range(4):
        for _ in range(8):
            for event in engine.step():
                collect(engine, None, event, outputs)
        submit(engine, f"high{i}", random_prompts(1, seed=i, low=90)[0], priority=1)
    for name, events in run_until_idle(engine).items():
        outputs.setdefault(name, []).extend(events)
    assert engine.load().num_preemptions > 0
    assert [tokens_of(outputs["seeded"], index) for index in range(2)] == expected


def test_a_seed_does_not_feel_prefix_hits(seeded: Seeded) -> None:
    directory, expected = seeded
    engine = engine_for(directory)
    for _ in range(2):
        submit_seeded(engine)
        assert outcome(engine) == expected
    submit(engine, "longer", (*SEEDED_PROMPT[:50], *SEEDED_PROMPT[:50]))
    submit_seeded(engine)
    assert outcome(engine) == expected


def test_a_seed_does_not_feel_where_the_prompt_was_computed(seeded: Seeded) -> None:
    directory, expected = seeded
    prefill, decode = engine_for(directory), engine_for(directory)
    arena = arena_for(directory)
    prefill.attach_arena(arena)
    decode.attach_arena(arena)
    submit_seeded(prefill, is_prefill_only=True)
    run_until_idle(prefill, arena)
    submit_seeded(decode)
    assert outcome(decode, arena) == expected


@pytest.mark.parametrize("at", [(0, 0), (1, 23), (7, 13), (24, 2)])
def test_a_seed_does_not_feel_migration(seeded: Seeded, at: tuple[int, int]) -> None:
    directory, expected = seeded
    resumed = {index: tuple(expected[index][: at[index]]) for index in range(2)}
    engine = engine_for(directory)
    submit_crowd(engine, 5)
    submit_seeded(engine, resumed=resumed)
    rest = outcome(engine)
    assert [[*resumed[index], *rest[index]] for index in range(2)] == expected


def test_cancelled_requests_leave_no_page_behind(checkpoints: dict[str, Path]) -> None:
    engine = engine_for(checkpoints["llama"], num_kv_blocks=64)
    rng = random.Random(0)
    for i, prompt in enumerate(random_prompts(300, seed=13)):
        submit(engine, str(i), prompt, n=1 + i % 3, max_tokens=5)
        for _ in range(rng.randrange(3)):
            engine.step()
        engine.cancel(str(i), None if i % 5 else 0)
        engine.cancel(str(rng.randrange(i + 1)))
    run_until_idle(engine)
    assert engine.check_integrity() == []
    assert engine.load().free_blocks == 64


def test_a_bf16_engine_works_like_the_f32_one_to_bf16s_precision() -> None:
    """KV included: half the bytes per block, and a block of the store is the same block."""
    options = EngineOptions(model=str(DEMO), dtype="bf16", num_kv_blocks=256, chunk_tokens=64)
    alone, card = build_engine(options)
    assert card.block_bytes * 2 == build_engine(replace(options, dtype="f32"))[1].block_bytes
    prefill, decode = build_engine(options)[0], build_engine(options)[0]
    arena = MemoryArena(256, card.block_bytes)
    prefill.attach_arena(arena)
    decode.attach_arena(arena)
    for i, prompt in enumerate(random_prompts(6, seed=14, low=20, high=90)):
        spec = GenerationSpec(str(i), prompt, sampling=GREEDY, max_tokens=12, ignore_eos=True)
        prefill.submit(spec, is_prefill_only=True)
        run_until_idle(prefill, arena)
        decode.submit(spec)
        alone.submit(spec)
        output = tokens_of(run_until_idle(decode, arena)[str(i)])
        assert output == tokens_of(run_until_idle(alone)[str(i)])
        assert_greedy(DEMO, prompt, output, tie=0.5)
