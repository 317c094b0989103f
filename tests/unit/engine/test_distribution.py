"""What the engine draws follows the exact distribution: chi-square over a small vocabulary.

Exact probabilities come from transformers' logits and a plain float64 processing written
here; counts come from whole requests through the engine. Seeds are fixed, so a run is either
right or wrong for ever; a p-value below 0.001 is wrong.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from paceline.domain.request import GenerationSpec, SamplingParams
from paceline.engine.build import build_engine
from paceline.engine.engine import Engine
from paceline.engine.options import EngineOptions
from tests.checkpoints import random_checkpoint
from tests.unit.engine.memory_arena import run_until_idle, tokens_of

VOCAB = 10
PROMPT = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3)
RESUMED = (7, 7, 2)
STREAMS = 50


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny") / "llama"
    # Wide enough an initialisation for a distribution that is neither flat nor certain.
    return random_checkpoint(
        "llama", directory, seed=3, vocab_size=VOCAB, num_hidden_layers=2, initializer_range=0.15
    )


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Engine:
    options = EngineOptions(
        model=str(checkpoint), num_kv_blocks=1024, chunk_tokens=128, max_num_seqs=256
    )
    return build_engine(options)[0]


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def exact(model: torch.nn.Module, output: tuple[int, ...], params: SamplingParams) -> list[float]:
    """Probabilities of the next token, by the documented order of processing."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*PROMPT, *output]])).logits[0, -1].double().tolist()
    counts = Counter(output)
    for token in {*PROMPT, *output}:
        factor = params.repetition_penalty
        logits[token] *= factor if logits[token] < 0 else 1 / factor
    for token, count in counts.items():
        logits[token] -= params.presence_penalty + params.frequency_penalty * count
    weights = {i: torch.tensor(x / params.temperature).exp().item() for i, x in enumerate(logits)}
    ranked = sorted(weights, key=lambda i: -weights[i])
    if params.top_k:
        ranked = ranked[: params.top_k]
    total, before, kept = sum(weights[i] for i in ranked), 0.0, []
    for token in ranked:
        if before < params.top_p * total:
            kept.append(token)
        before += weights[token]
    kept = [i for i in kept if weights[i] >= params.min_p * weights[ranked[0]]]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(VOCAB)]


def draw(
    engine: Engine, params: SamplingParams, *, num: int, length: int, resumed: tuple[int, ...] = ()
) -> list[list[tuple[int, ...]]]:
    """Return new tokens of `num` requests with `STREAMS` outputs each."""
    for i in range(num):
        spec = GenerationSpec(
            str(i),
            PROMPT,
            sampling=replace(params, seed=1000 + i),
            max_tokens=len(resumed) + length,
            ignore_eos=True,
            n=STREAMS,
        )
        engine.submit(spec, resumed=dict.fromkeys(range(STREAMS), resumed))
    outputs = run_until_idle(engine)
    return [
        [tuple(tokens_of(outputs[str(i)], stream)) for stream in range(STREAMS)] for i in range(num)
    ]


def p_value(counts: list[int], probabilities: list[float]) -> float:
    """Chi-square test of counts; cells expected fewer than five times are joined."""
    assert sum(probabilities) == pytest.approx(1.0)
    total = sum(counts)
    cells: list[tuple[float, float]] = []
    rest_count, rest_expected = 0.0, 0.0
    for count, probability in zip(counts, probabilities, strict=True):
        if probability == 0.0:
            assert count == 0, "a token that cannot be drawn was drawn"
        elif probability * total < 5:
            rest_count, rest_expected = rest_count + count, rest_expected + probability * total
        else:
            cells.append((count, probability * total))
    if rest_expected > 0:
        cells.append((rest_count, rest_expected))
    if len(cells) == 1:
        return 1.0
    chi2 = sum((count - expected) ** 2 / expected for count, expected in cells)
    halves = torch.tensor([(len(cells) - 1) / 2, chi2 / 2], dtype=torch.float64)
    return 1.0 - float(torch.special.gammainc(halves[0], halves[1]))


PARAMS = {
    "plain": SamplingParams(),
    "cold": SamplingParams(temperature=0.5),
    "hot": SamplingParams(temperature=3.0),
    "top-k": SamplingParams(top_k=4),
    "top-p": SamplingParams(top_p=0.7),
    "min-p": SamplingParams(min_p=0.15),
    "all truncations": SamplingParams(temperature=1.5, top_k=7, top_p=0.9, min_p=0.05),
    "repetition": SamplingParams(repetition_penalty=1.7),
    "presence": SamplingParams(presence_penalty=1.2),
    "frequency": SamplingParams(frequency_penalty=-0.8),
    "everything": SamplingParams(
        temperature=1.3,
        top_p=0.95,
        repetition_penalty=0.8,
        presence_penalty=-0.5,
        frequency_penalty=0.6,
    ),
}


@pytest.mark.parametrize("name", PARAMS)
def test_next_tokens_follow_the_exact_distribution(
    engine: Engine, model: torch.nn.Module, name: str
) -> None:
    params = PARAMS[name]
    probabilities = exact(model, RESUMED, params)
    drawn = [o[0] for r in draw(engine, params, num=60, length=1, resumed=RESUMED) for o in r]
    counts = Counter(drawn)
    assert p_value([counts[i] for i in range(VOCAB)], probabilities) > 1e-3
    # And the test has power: the distribution differs from the one without the parameter.
    if name != "plain":
        plain = exact(model, RESUMED, SamplingParams())
        assert sum(abs(a - b) for a, b in zip(plain, probabilities, strict=True)) > 0.05


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_pairs_of_tokens_follow_the_joint_distribution(
    engine: Engine, model: torch.nn.Module, name: str
) -> None:
    """Positions are independent given the tokens before, penalties of new tokens included."""
    params = PARAMS[name]
    first = exact(model, (), params)
    joint = [a * b for token, a in enumerate(first) for b in exact(model, (token,), params)]
    counts = Counter(pair for r in draw(engine, params, num=60, length=2) for pair in r)
    observed = [counts[a, b] for a in range(VOCAB) for b in range(VOCAB)]
    assert p_value(observed, joint) > 1e-3


def test_outputs_of_one_request_are_independent(engine: Engine, model: torch.nn.Module) -> None:
    params = SamplingParams()
    first = exact(model, (), params)
    joint = [a * b for a in first for b in first]
    requests = draw(engine, params, num=60, length=1)
    counts = Counter((r[i][0], r[i + 1][0]) for r in requests for i in range(0, STREAMS, 2))
    observed = [counts[a, b] for a in range(VOCAB) for b in range(VOCAB)]
    assert p_value(observed, joint) > 1e-3


def test_requests_with_neighbouring_seeds_are_independent(
    engine: Engine, model: torch.nn.Module
) -> None:
    params = SamplingParams()
    first = exact(model, (), params)
    joint = [a * b for a in first for b in first]
    requests = draw(engine, params, num=60, length=1)
    counts = Counter(
        (a[i][0], b[i][0])
        for a, b in zip(requests[::2], requests[1::2], strict=True)
        for i in range(STREAMS)
    )
    observed = [counts[a, b] for a in range(VOCAB) for b in range(VOCAB)]
    assert p_value(observed, joint) > 1e-3


def test_the_judge_condemns_a_wrong_distribution(engine: Engine, model: torch.nn.Module) -> None:
    drawn = [
        o[0] for r in draw(engine, SamplingParams(temperature=1.15), num=60, length=1) for o in r
    ]
    counts = Counter(drawn)
    probabilities = exact(model, (), SamplingParams())
    assert p_value([counts[i] for i in range(VOCAB)], probabilities) < 1e-3


def test_a_greedy_request_has_no_chance(engine: Engine, model: torch.nn.Module) -> None:
    best = max(range(VOCAB), key=exact(model, (), SamplingParams()).__getitem__)
    drawn = draw(engine, SamplingParams(temperature=0.0), num=2, length=1)
    assert {o[0] for r in drawn for o in r} == {best}
