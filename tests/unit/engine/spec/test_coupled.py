"""Coupled drafts: the output is the target's own, and how often a draft guesses it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.domain.request import SamplingParams
from paceline.engine.sampling import reference
from paceline.engine.spec.candidates import candidates
from paceline.engine.spec.tree import ROOT, DraftTree
from paceline.engine.spec.verify import Floats, verify_coupled
from paceline.engine.step import SampleSpec
from tests.unit.engine.spec.toys import Path, path_tokens, random_model

VOCAB = 5


@st.composite
def trees(draw: st.DrawFn) -> DraftTree:
    size = draw(st.integers(0, 12))
    parents = tuple(draw(st.integers(ROOT, node - 1)) for node in range(size))
    return DraftTree(tuple(draw(st.integers(0, VOCAB - 1)) for _ in range(size)), parents)


@settings(max_examples=150, deadline=None)
@given(tree=trees(), seed=st.integers(0, 2**64 - 1), sharpness=st.sampled_from([0.5, 2.0, 5.0]))
def test_any_tree_leaves_every_token_as_it_is(tree: DraftTree, seed: int, sharpness: float) -> None:
    model = random_model(seed % 1000, VOCAB, sharpness)
    params = SamplingParams(temperature=0.9, presence_penalty=0.5, seed=seed)

    def draws(paths: list[Path]) -> list[int]:
        logits = torch.tensor(np.log([model(path) for path in paths]), dtype=torch.float32)
        specs = [SampleSpec(params, 2, 30 + len(path), 0, (), path) for path in paths]
        sampled = reference.sample(logits, specs)
        return [token.token_id for token in sampled if token is not None]

    drawn = draws([(), *(path_tokens(tree, node) for node in range(len(tree)))])
    verdict = verify_coupled(tree, drawn)
    emitted = (*(tree.tokens[node] for node in verdict.path), verdict.token)
    alone: Path = ()
    while len(alone) < len(emitted):
        alone += tuple(draws([alone]))
    assert emitted == alone
    # And it is the longest part of the tree that the target goes along with.
    known = [path_tokens(tree, node) for node in range(len(tree))]
    assert emitted not in known or len(set(known)) < len(known)


def rows(probs: Floats, num: int) -> tuple[torch.Tensor, list[SampleSpec]]:
    specs = [SampleSpec(SamplingParams(seed=seed), 0, 40, 0) for seed in range(num)]
    return torch.tensor(probs).log().float().expand(num, -1), specs


@pytest.mark.parametrize("seed", range(3))
def test_guesses_with_the_targets_noise_agree_as_often_as_they_can(seed: int) -> None:
    """Gumbel coupling (Daliri et al. 2024, arXiv 2408.07978): sum_i 1 / sum_j max(p_j / p_i,
    q_j / q_i), between (1 - d) / (1 + d) and 1 - d."""
    num, vocab = 20_000, 6
    p, q = random_model(seed, vocab)(()), random_model(seed + 100, vocab)(())
    guesses = candidates(*rows(q, num), [None] * num, 1)
    target = reference.sample(*rows(p, num))
    agreed = np.mean(
        [t is not None and t.token_id == g.tokens[0] for t, g in zip(target, guesses, strict=True)]
    )
    ratios = np.maximum(p[None] / p[:, None], q[None] / q[:, None])
    assert float(agreed) == pytest.approx(float((1 / ratios.sum(axis=1)).sum()), abs=0.015)
    distance = 0.5 * float(np.abs(p - q).sum())
    assert (1 - distance) / (1 + distance) - 0.01 < float(agreed) < 1 - distance + 0.01


def test_a_draft_that_is_the_target_guesses_every_token() -> None:
    torch.manual_seed(0)
    logits = torch.randn(40, 50) * 2
    params = [
        SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m, repetition_penalty=r)
        for t, k, p, m, r in [
            (1.0, 0, 1.0, 0.0, 1.0),
            (0.7, 5, 1.0, 0.0, 1.0),
            (1.3, 0, 0.8, 0.0, 1.0),
            (1.0, 30, 0.95, 0.1, 1.4),
            (0.0, 3, 0.5, 0.0, 1.4),
        ]
    ]
    specs = [
        SampleSpec(replace(params[i % 5], seed=i), i % 3, i, 0, (1, 2, 3), (4, 5))
        for i in range(40)
    ]
    target = reference.sample(logits, specs)
    guesses = candidates(logits, specs, [None] * 40, 3)
    assert [g.tokens[0] for g in guesses] == [t.token_id for t in target if t is not None]
    for guess in guesses:
        assert guess.proposal is None and guess.draws == ()
        assert list(guess.confidences) == sorted(guess.confidences, reverse=True)
        assert 0.0 < sum(guess.confidences) <= 1.0 + 1e-6


def test_greedy_guesses_are_the_likeliest_tokens() -> None:
    logits = torch.randn((3, 200), generator=torch.Generator().manual_seed(1))
    spec = SampleSpec(SamplingParams(temperature=0.0, top_k=1), 0, 1, 0)
    # Not drawn, whatever is asked for: a greedy target's draft has nothing to draw.
    for lanes in ([None] * 3, [7] * 3):
        for row, guess in zip(logits, candidates(logits, [spec] * 3, lanes, 4), strict=True):
            best = row.softmax(-1).topk(4)
            assert list(guess.tokens) == best.indices.tolist()
            assert list(guess.confidences) == pytest.approx(best.values.tolist(), rel=1e-5)
            assert guess.proposal is None


def test_rows_do_not_depend_on_their_neighbours() -> None:
    logits = torch.randn((6, 300), generator=torch.Generator().manual_seed(2))
    kinds = [SamplingParams(temperature=0.0), SamplingParams(seed=3), SamplingParams(top_p=0.7)]
    specs = [SampleSpec(kinds[i % 3], 0, i, 0) for i in range(6)]
    lanes = [None, None, 9, None, 10, None]
    together = candidates(logits, specs, lanes, 4)
    for i in range(6):
        (alone,) = candidates(logits[i : i + 1], specs[i : i + 1], lanes[i : i + 1], 4)
        assert alone.tokens == together[i].tokens
        assert alone.confidences == pytest.approx(together[i].confidences, rel=1e-12)
        assert (alone.proposal is None) == (together[i].proposal is None)


def test_rows_that_are_not_finite_propose_nothing() -> None:
    logits = torch.zeros(4, 10)
    logits[0, 3] = torch.nan
    logits[1] = -torch.inf
    logits[2, 1] = torch.inf
    for params in (SamplingParams(), SamplingParams(temperature=0.0)):
        spec = SampleSpec(params, 0, 1, 0)
        for lanes in ([None] * 4, [5] * 4):
            sizes = [len(c.tokens) for c in candidates(logits, [spec] * 4, lanes, 2)]
            assert sizes == [0, 0, 0, 2]
