"""Logits equal transformers': every architecture, the demo model, chunks, windows, bf16."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from paceline.domain.request import SamplingParams
from paceline.engine.kernels import has_cpp_kernels
from paceline.engine.models.config import load_model_config
from paceline.engine.models.decoder import DecoderModel
from paceline.engine.models.load import Model, ModelOptions, load_model
from paceline.engine.runner import Runner
from paceline.engine.step import Row, SampleSpec, StepPlan
from paceline.engine.weights import load_tensors
from tests.checkpoints import ARCHITECTURES, DEMO, VARIANTS, random_checkpoint

TOLERANCE = 1e-4
"""Of the C++ decoder, for logits of 12; at single positions of random weights float32 errors of
torch's products, transformers' own included, reach that on some processors."""
TORCH_TOLERANCE = 2e-4
NUM_PAGES, BLOCK_SIZE = 120, 16
SPEC = SampleSpec(SamplingParams(temperature=0.0), stream=0, position=1, num_logprobs=0)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def directory_of(root: Path, name: str) -> Path:
    if name == "demo":
        return DEMO
    return root / name if (root / name).exists() else random_checkpoint(name, root / name)


@cache
def theirs(directory: Path, prompt: tuple[int, ...]) -> torch.Tensor:
    """In float64, so that only our own rounding is measured."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()
    with torch.inference_mode():
        return model(torch.tensor([prompt])).logits[0]


def make_runner(
    directory: Path, dtype: torch.dtype = torch.float32, *, is_fused: bool = False
) -> Runner:
    config = load_model_config(directory)
    model: Model
    if is_fused:
        options = ModelOptions("f32", BLOCK_SIZE, config.max_context_tokens, threads=2)
        model = load_model(directory, config, options)
    else:
        model = DecoderModel(config, load_tensors(directory), dtype=dtype, device="cpu")
    return Runner(model, num_pages=NUM_PAGES, block_size=BLOCK_SIZE, dtype=dtype)


def chunked_logits(
    runner: Runner, prompts: list[tuple[int, ...]], sizes: list[list[int]]
) -> list[dict[int, torch.Tensor]]:
    """Compute prompts side by side in chunks; return logits at the end of each chunk."""
    pages = random.Random(0).sample(range(NUM_PAGES), NUM_PAGES)
    tables = [tuple(pages.pop() for _ in range(-(-len(p) // BLOCK_SIZE))) for p in prompts]
    done = [0] * len(prompts)
    results: list[dict[int, torch.Tensor]] = [{} for _ in prompts]
    while any(at < len(p) for at, p in zip(done, prompts, strict=True)):
        active = [r for r, p in enumerate(prompts) if done[r] < len(p)]
        counts = [sizes[r].pop(0) if sizes[r] else len(prompts[r]) for r in active]
        plan = StepPlan(
            tuple(
                Row(r, prompts[r][done[r] : done[r] + count], done[r], tables[r], SPEC)
                for r, count in zip(active, counts, strict=True)
            )
        )
        logits_MV = runner.logits(plan)
        for m, row in enumerate(plan.rows):
            done[row.sequence_id] += len(row.token_ids)
            results[row.sequence_id][done[row.sequence_id] - 1] = logits_MV[m]
    return results


def prompt_of(length: int, seed: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(4, 4096), k=length))


MODELS = [*ARCHITECTURES, *VARIANTS, "demo"]
FORMS = [
    pytest.param(False, TORCH_TOLERANCE, id="torch"),
    pytest.param(
        True,
        TOLERANCE,
        id="fused",
        marks=pytest.mark.skipif(
            not has_cpp_kernels(), reason="the C++ kernels need a compiler at set-up"
        ),
    ),
]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("is_fused", "tolerance"), FORMS)
def test_logits_of_chunks_equal_the_whole(
    checkpoints: Path, name: str, is_fused: bool, tolerance: float
) -> None:
    """Long beyond every window, in chunks of all sizes, with decode rows between."""
    directory = directory_of(checkpoints, name)
    rng = random.Random(1)
    prompts = [prompt_of(300, 1), prompt_of(97, 2), prompt_of(33, 3), prompt_of(1, 4)]
    sizes = [
        [1] * 5 + [64, 100] + [1] * 20 + [rng.randint(1, 20) for _ in range(10)],
        [16] * 3 + [1] * 10,
        [],
        [],
    ]
    ours = chunked_logits(make_runner(directory, is_fused=is_fused), prompts, sizes)
    for prompt, logits in zip(prompts, ours, strict=True):
        expected = theirs(directory, prompt)
        assert len(prompt) - 1 in logits
        for position, logits_V in logits.items():
            error = float((logits_V - expected[position]).abs().max())
            assert error < tolerance, f"{error} at {position} of {len(prompt)}"


@pytest.mark.parametrize("name", ["llama-biased-llama3-rope", "mistral", "qwen2-partly-windowed"])
@pytest.mark.parametrize(("is_fused", "tolerance"), FORMS)
def test_logits_at_the_end_of_the_context(
    checkpoints: Path, name: str, is_fused: bool, tolerance: float
) -> None:
    directory = directory_of(checkpoints, name)
    prompt = prompt_of(1024, 5)
    runner = make_runner(directory, is_fused=is_fused)
    (ours,) = chunked_logits(runner, [prompt], [[500, 1, 400, 100, 1, 1, 1]])
    expected = theirs(directory, prompt)
    for position, logits_V in ours.items():
        assert float((logits_V - expected[position]).abs().max()) < tolerance


def test_the_window_is_felt(checkpoints: Path) -> None:
    """The comparison means something: without its window a model gives other logits."""
    prompt = prompt_of(97, 2)
    directory = directory_of(checkpoints, "mistral")
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float64, sliding_window=None
    )
    with torch.inference_mode():
        unwindowed = model.eval()(torch.tensor([prompt])).logits[0]
    difference = (unwindowed - theirs(directory, prompt)).abs().amax(dim=-1)
    assert float(difference[:24].max()) < TOLERANCE
    assert float(difference[24:].min()) > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "demo"])
def test_bf16_is_as_near_to_f32_as_transformers_in_bf16(checkpoints: Path, name: str) -> None:
    directory = directory_of(checkpoints, name)
    prompt = prompt_of(97, 2)
    exact = theirs(directory, prompt)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        their_error = (model(torch.tensor([prompt])).logits[0].float() - exact).abs()
    (ours,) = chunked_logits(
        make_runner(directory, torch.bfloat16), [prompt], [[16] * 3 + [1] * 20]
    )
    positions = sorted(ours)
    our_error = torch.stack([(ours[p] - exact[p]).abs() for p in positions])
    assert float(our_error.mean()) < 1.3 * float(their_error[positions].mean())
    assert float(our_error.max()) < 2.0 * float(their_error[positions].max())


def test_a_batch_row_equals_the_row_alone(checkpoints: Path) -> None:
    directory = directory_of(checkpoints, "qwen3")
    prompts = [prompt_of(20 + i, i) for i in range(12)]
    together = chunked_logits(make_runner(directory), prompts, [[15] for _ in prompts])
    for prompt, logits in zip(prompts, together, strict=True):
        (alone,) = chunked_logits(make_runner(directory), [prompt], [[]])
        end = len(prompt) - 1
        assert float((alone[end] - logits[end]).abs().max()) < TOLERANCE / 2
