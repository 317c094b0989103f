"""The likeliest tokens by the C++ kernels are those of a sort in double precision, of any row.

Every test runs with each instruction set that this machine has.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.engine.kernels import Likeliest, likeliest
from paceline_kernels.cpu import library

pytestmark = [
    pytest.mark.skipif(
        library.library() is None, reason="the C++ kernels need a compiler at set-up"
    ),
    pytest.mark.usefixtures("instruction_set"),
]
INF = float("inf")
HALF = {"rtol": 6e-4, "atol": 5e-8}
"""Rounding to float16: half of 2^-10, and half of the least number above 0."""

Change = Callable[[torch.Tensor], torch.Tensor]
CHANGES: list[Change] = [
    lambda logits_V: logits_V,
    lambda logits_V: logits_V.sort().values,
    lambda logits_V: logits_V.sort(descending=True).values,
    # Ties, of a few logits and of all.
    lambda logits_V: (logits_V * 2).round() / 2,
    lambda logits_V: logits_V * -0.0,
    # Fewer possible tokens than are named.
    lambda logits_V: logits_V.masked_fill(torch.rand(logits_V.shape) < 0.4, -INF),
    lambda logits_V: logits_V.masked_fill(torch.arange(len(logits_V)) % 1000 > 0, -INF),
]
VOCABULARIES = st.one_of(st.integers(1, 300), st.integers(1, 5000))


def arrays(found: Likeliest, num: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return (
        np.frombuffer(found.ids_PK, "<i4").reshape(num, -1),
        np.frombuffer(found.probs_PK, "<f2").astype(np.float64).reshape(num, -1),
        np.frombuffer(found.tail_P, "<f2").astype(np.float64),
    )


def check(logits_MV: torch.Tensor, places: list[int], top: int) -> None:
    """Compare with softmax and a stable sort in double precision."""
    ids_PK, probs_PK, tail_P = arrays(likeliest(logits_MV, places, top), len(places))
    exact_PV = logits_MV[places].double()
    best = exact_PV.sort(dim=-1, descending=True, stable=True)
    expected_PV = best.values.softmax(dim=-1).numpy()
    assert ids_PK.tolist() == best.indices[:, :top].tolist()
    np.testing.assert_allclose(probs_PK, expected_PV[:, :top], **HALF)
    # Sums over the vocabulary are of float32.
    np.testing.assert_allclose(tail_P, expected_PV[:, top:].sum(axis=-1), rtol=6e-4, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    vocab=VOCABULARIES,
    scale=st.sampled_from([0.1, 1.0, 3.0, 30.0, 1e30]),
    changes=st.lists(st.sampled_from(CHANGES), min_size=1, max_size=4),
    top=st.one_of(st.integers(1, 64), st.integers(1, 1024)),
    data=st.data(),
    random_state=st.integers(0, 2**32),
)
def test_they_are_those_of_a_stable_sort(
    vocab: int,
    scale: float,
    changes: list[Change],
    top: int,
    data: st.DataObject,
    random_state: int,
) -> None:
    torch.manual_seed(random_state)
    logits_MV = torch.stack([change(torch.randn(vocab)) * scale for change in changes])
    logits_MV[:, random_state % vocab] = 1.0
    # Some rows, in any order, and one twice if it comes to that.
    places = data.draw(st.lists(st.integers(0, len(changes) - 1), min_size=1, max_size=5))
    before = logits_MV.clone()
    check(logits_MV, places, min(top, vocab))
    assert torch.equal(logits_MV, before), "logits were changed"


@pytest.mark.parametrize("vocab", [1, 7, 16, 17, 63, 64, 65, 127, 129, 255, 300])
def test_all_tokens_may_be_named(vocab: int) -> None:
    logits_MV = torch.randn(2, vocab)
    check(logits_MV, [1, 0], vocab)
    *_, tail_P = arrays(likeliest(logits_MV, [0, 1], vocab), 2)
    assert tail_P.max() < 1e-6


@pytest.mark.parametrize("vocab", [10, 1000, 50_001])
@pytest.mark.parametrize("num", [1, 2, 5])
def test_infinite_logits_share_the_mass(vocab: int, num: int) -> None:
    logits_1V = torch.randn(1, vocab)
    certain = sorted(torch.randperm(vocab)[:num].tolist())
    logits_1V[0, certain] = INF
    ids_PK, probs_PK, tail_P = arrays(likeliest(logits_1V, [0], 5), 1)
    others = [token for token in range(10) if token not in certain]
    assert ids_PK[0].tolist() == [*certain, *others][:5]
    np.testing.assert_allclose(probs_PK[0], [1 / num] * num + [0.0] * (5 - num), **HALF)
    assert tail_P[0] < 1e-6


@pytest.mark.parametrize("at", [0, 8, 4999])
@pytest.mark.parametrize("top", [1, 32, 100])
def test_rows_without_a_distribution_name_nothing(at: int, top: int) -> None:
    logits_MV = torch.randn(3, 5000)
    logits_MV[0, at] = math.nan
    logits_MV[1] = -INF
    ids_PK, probs_PK, tail_P = arrays(likeliest(logits_MV, [0, 1, 2], top), 3)
    for place in (0, 1):
        assert ids_PK[place].tolist() == list(range(top))
        assert probs_PK[place].tolist() == [0.0] * top
        assert tail_P[place] == 1.0
    # The row behind them is not touched.
    check(logits_MV, [2], top)


def test_rows_need_not_lie_one_behind_the_other() -> None:
    check(torch.randn(500, 6).T, [3, 0, 5], 8)
    check(torch.randn(4, 600)[:, 100:], [2, 1], 8)


def test_arguments_are_checked() -> None:
    logits_MV = torch.zeros(2, 5)
    for wrong in (logits_MV.double(), logits_MV[0]):
        with pytest.raises(ValueError, match="float32"):
            likeliest(wrong, [0], 1)
    for top in (0, 6):
        with pytest.raises(ValueError, match="of 5 tokens"):
            likeliest(logits_MV, [0], top)
    for place in (-1, 2):
        with pytest.raises(ValueError, match="of 2 rows"):
            likeliest(logits_MV, [0, place], 1)
    assert likeliest(logits_MV, [], 3) == Likeliest(b"", b"", b"")
