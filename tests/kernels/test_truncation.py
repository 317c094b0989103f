"""Truncation against transformers' warpers and against the definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from paceline_kernels import sampling as kernels_sampling
from paceline_kernels import truncate_logits

OFF = (0, 1.0, 0.0)


def truncate(logits_RV: torch.Tensor, *params: tuple[int, float, float]) -> torch.Tensor:
    top_k, top_p, min_p = zip(*params, strict=True)
    return truncate_logits(
        logits_RV,
        torch.tensor(top_k),
        torch.tensor(top_p, dtype=torch.float64),
        torch.tensor(min_p),
    )


def theirs(logits_V: torch.Tensor, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    scores = logits_V[None]
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1.0:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p > 0.0:
        scores = MinPLogitsWarper(min_p)(None, scores)
    return scores[0]


@pytest.mark.parametrize("vocab", [1, 2, 50, 3000, 40_000])
@pytest.mark.parametrize("scale", [0.1, 2.0, 8.0])
@pytest.mark.parametrize(
    "params",
    [
        OFF,
        (1, 1.0, 0.0),
        (40, 1.0, 0.0),
        (100_000, 1.0, 0.0),
        (0, 0.9, 0.0),
        (0, 0.999, 0.0),
        (0, 1e-6, 0.0),
        (0, 1.0, 0.05),
        (0, 1.0, 1.0),
        (40, 0.7, 0.1),
    ],
    ids=str,
)
def test_kept_tokens_are_those_of_transformers(
    vocab: int, scale: float, params: tuple[int, float, float]
) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits_RV = torch.randn(3, vocab, generator=generator) * scale
    ours = truncate(logits_RV, params, OFF, params)
    assert torch.equal(ours[1], logits_RV[1])
    for r in (0, 2):
        expected = theirs(logits_RV[r], *params)
        if torch.equal(ours[r], expected):
            continue
        # Their float32 sums over 40,000 tokens may put the border one rounding off.
        differing = (ours[r] != expected).nonzero()[:, 0]
        probabilities = logits_RV[r].double().softmax(-1).sort(descending=True).values
        border = (probabilities.cumsum(0) - params[1]).abs().min()
        assert params[1] < 1.0 and float(border) < 1e-5 and len(differing) <= 3


@settings(max_examples=100, deadline=None)
@given(
    logits=st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=30),
    top_k=st.integers(0, 35),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 1.0),
)
def test_what_is_kept_follows_from_the_definitions(
    logits: list[float], top_k: int, top_p: float, min_p: float
) -> None:
    logits_V = torch.tensor(logits)
    ours = truncate(logits_V[None], (top_k, top_p, min_p))[0]
    kept = ours > float("-inf")
    assert torch.equal(ours[kept], logits_V[kept])
    assert bool(kept[logits_V == logits_V.max()].any())
    if 0 < top_k < len(logits):
        threshold = logits_V.sort(descending=True).values[top_k - 1]
        assert bool((logits_V[kept] >= threshold).all())
    if min_p > 0.0:
        ratios = (logits_V[kept] - logits_V.max()).exp()
        assert bool((ratios >= min_p * (1 - 1e-4)).all())
    # Whoever is kept is not less likely than whoever is not.
    if not bool(kept.all()):
        assert float(logits_V[kept].min()) >= float(logits_V[~kept].max())


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999, 0.9999999])
def test_a_nucleus_is_the_smallest_set_that_reaches_its_mass(top_p: float) -> None:
    for scale in (0.01, 1.0, 5.0):
        logits_V = torch.randn(40_000, generator=torch.Generator().manual_seed(1)) * scale
        kept = truncate(logits_V[None], (0, top_p, 0.0))[0] > float("-inf")
        probabilities = logits_V.double().softmax(-1)
        mass = float(probabilities[kept].sum())
        assert mass >= top_p - 1e-12
        assert mass - float(probabilities[kept].min()) < top_p + 1e-12


@pytest.mark.parametrize(
    ("top_p", "num_kept"), [(0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (0.76, 4), (1.0, 4)]
)
def test_a_nucleus_that_is_reached_exactly_grows_no_further(top_p: float, num_kept: int) -> None:
    kept = truncate(torch.zeros(1, 4), (0, top_p, 0.0))[0] > float("-inf")
    assert int(kept.sum()) == num_kept


def test_sorting_few_tokens_first_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_RV = torch.randn(20, 5000) * 3
    params = [(0, 0.05 * (r + 1) - 0.01, 0.0) for r in range(20)]
    expected = truncate(logits_RV, *params)
    for head in (1, 7, 300, 10_000):
        monkeypatch.setattr(kernels_sampling, "_NUCLEUS_TOKENS", head)
        assert torch.equal(truncate(logits_RV, *params), expected)


def test_the_input_is_left_alone() -> None:
    logits_RV = torch.randn(4, 100)
    before = logits_RV.clone()
    truncate(logits_RV, (3, 0.5, 0.3), OFF, (0, 0.5, 0.0), (0, 1.0, 0.2))
    assert torch.equal(logits_RV, before)


def test_rows_do_not_depend_on_each_other() -> None:
    logits_RV = torch.randn(30, 500) * 4
    params = [(r % 7 * 10, 1.0 - r % 5 * 0.1, r % 3 * 0.05) for r in range(30)]
    together = truncate(logits_RV, *params)
    for r in range(30):
        assert torch.equal(truncate(logits_RV[r : r + 1], params[r])[0], together[r])
