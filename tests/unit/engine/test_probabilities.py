"""Probabilities are those that tokens are drawn with: by the rule, and by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.domain.request import SamplingParams
from paceline.engine.sampling import reference
from paceline.engine.sampling.distribution import probabilities
from paceline.engine.step import SampleSpec
from tests.unit.engine.test_distribution import PARAMS

VOCAB = 12
INF = float("inf")


def by_hand(
    logits: list[float], params: SamplingParams, prompt: tuple[int, ...], output: tuple[int, ...]
) -> list[float]:
    """The documented order of processing, one number at a time."""
    logits = list(logits)
    for token in {*prompt, *output}:
        factor = params.repetition_penalty
        logits[token] *= factor if logits[token] < 0 else 1 / factor
    for token, count in Counter(output).items():
        logits[token] -= params.presence_penalty + params.frequency_penalty * count
    weights = [torch.tensor(x / params.temperature).exp().item() for x in logits]
    ranked = sorted(range(len(logits)), key=lambda i: -weights[i])
    ranked = ranked[: params.top_k or len(ranked)]
    total, before, kept = sum(weights[i] for i in ranked), 0.0, []
    for token in ranked:
        if before < params.top_p * total:
            kept.append(token)
        before += weights[token]
    kept = [i for i in kept if weights[i] >= params.min_p * weights[ranked[0]]]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize("name", PARAMS)
def test_they_are_those_of_the_documented_order(name: str) -> None:
    logits = torch.randn((4, VOCAB), generator=torch.Generator().manual_seed(1)) * 2
    prompt, output = (3, 1, 4), (1, 5, 5, 9)
    specs = [SampleSpec(PARAMS[name], 0, i, 0, prompt, output) for i in range(4)]
    probs = probabilities(logits, specs)
    assert probs.dtype == torch.float64
    for row, logits_V in zip(probs.tolist(), logits.tolist(), strict=True):
        assert row == pytest.approx(by_hand(logits_V, PARAMS[name], prompt, output), abs=1e-6)


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_drawn_tokens_follow_them(name: str) -> None:
    num = 12_000
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(2)).expand(num, -1)
    specs = [
        SampleSpec(replace(PARAMS[name], seed=i), 0, 7, 0, (1, 2), (2, 2, 3)) for i in range(num)
    ]
    probs = probabilities(logits[:1], specs[:1])[0]
    counts = Counter(t.token_id for t in reference.sample(logits, specs) if t is not None)
    assert sum(counts.values()) == num
    assert all(probs[token] > 0 for token in counts)
    distance = 0.5 * sum(abs(counts[i] / num - float(probs[i])) for i in range(VOCAB))
    assert distance < 0.015


@settings(max_examples=100, deadline=None)
@given(
    temperature=st.sampled_from([0.0, 1e-42, 1e-3, 0.5, 1.0, 1e30]),
    top_k=st.integers(0, 20),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 1.0, width=32),
    seed=st.integers(0, 10_000),
    special=st.sampled_from([0.0, INF, -INF]),
)
def test_whatever_is_drawn_has_a_probability(
    temperature: float, top_k: int, top_p: float, min_p: float, seed: int, special: float
) -> None:
    logits = torch.randn((1, VOCAB), generator=torch.Generator().manual_seed(seed)) * 3
    logits[0, seed % VOCAB] = special
    params = SamplingParams(temperature, top_k, top_p, min_p, seed=seed)
    spec = SampleSpec(params, 1, 2, 0)
    (token,) = reference.sample(logits, [spec])
    probs = probabilities(logits, [spec])[0]
    assert token is not None
    assert float(probs[token.token_id]) > 0
    assert float(probs.sum()) == pytest.approx(1.0, abs=1e-12)
    if params.is_greedy:
        assert float(probs[token.token_id]) == 1.0


def test_rows_without_a_distribution_are_told() -> None:
    logits = torch.zeros(4, VOCAB)
    logits[0, 2] = torch.nan
    logits[1] = -INF
    for params in (SamplingParams(), SamplingParams(temperature=0.0), SamplingParams(top_p=0.5)):
        specs = [SampleSpec(params, 0, i, 0) for i in range(4)]
        probs = probabilities(logits, specs)
        assert probs.isnan().all(dim=1).tolist() == [True, True, False, False]
        assert [t is None for t in reference.sample(logits, specs)] == [True, True, False, False]


def test_rows_do_not_depend_on_their_neighbours() -> None:
    logits = torch.randn((11, VOCAB), generator=torch.Generator().manual_seed(3))
    before = logits.clone()
    specs = [SampleSpec(params, 0, i, 0, (1,), (2, 2)) for i, params in enumerate(PARAMS.values())]
    together = probabilities(logits, specs)
    assert torch.equal(logits, before), "logits were changed"
    for i, spec in enumerate(specs):
        assert torch.equal(probabilities(logits[i : i + 1], [spec])[0], together[i])
