"""The C++ kernels find the candidates that the reference does, of any row.

Every test runs with each instruction set that this machine has.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.domain.request import SamplingParams
from paceline.engine.kernels import DrawRow, find_candidates
from paceline.engine.sampling.distribution import probabilities
from paceline.engine.spec import candidates_reference
from paceline.engine.spec.candidates import candidates
from paceline.engine.spec.growth import Candidates
from paceline.engine.step import SampleSpec
from paceline_kernels.cpu import library
from tests.kernels.drawing_cases import PENALTIES, sampling_params

pytestmark = [
    pytest.mark.skipif(
        library.library() is None, reason="the C++ kernels need a compiler at set-up"
    ),
    pytest.mark.usefixtures("instruction_set"),
]
INF = float("inf")
NUM_BEST = 64

VOCABULARIES = st.one_of(st.integers(1, 300), st.integers(1, 20_000))
PARAMS = sampling_params(min_p=st.floats(0.0, 1.0))
LANES = st.one_of(st.none(), st.integers(0, 2**32 - 1))
COUNTS = st.integers(1, 70)

Change = Callable[[torch.Tensor], torch.Tensor]
CHANGES: list[Change] = [
    lambda logits_V: logits_V,
    lambda logits_V: logits_V.sort().values,
    # The best ones far apart by the same distance.
    lambda logits_V: logits_V + 100.0 * (torch.arange(len(logits_V)) % 128 == 7),
    lambda logits_V: (logits_V * 2).round() / 2,
    lambda logits_V: logits_V * -0.0,
    lambda logits_V: logits_V.masked_fill(torch.rand(logits_V.shape) < 0.4, -INF),
    lambda logits_V: logits_V.masked_fill(torch.rand(logits_V.shape) < 0.999, -INF),
]
NOT_FINITE: list[Change] = [
    lambda logits_V: logits_V.masked_fill(torch.rand(logits_V.shape) < 2 / len(logits_V), INF),
    lambda logits_V: logits_V.masked_fill(torch.rand(logits_V.shape) < 1 / len(logits_V), math.nan),
    lambda logits_V: torch.full_like(logits_V, -INF),
]


def assert_found_alike(
    logits_MV: torch.Tensor, specs: list[SampleSpec], lanes: list[int | None], count: int
) -> list[Candidates]:
    before = logits_MV.clone()
    ours = candidates(logits_MV, specs, lanes, count)
    assert torch.equal(logits_MV.nan_to_num(), before.nan_to_num()), "logits were changed"
    theirs = candidates_reference.candidates(logits_MV, specs, lanes, count)
    for spec, one, other in zip(specs, ours, theirs, strict=True):
        # Greedy rows' sums over the vocabulary are of float32.
        tolerance = 1e-6 if spec.sampling.is_greedy else 1e-9
        assert one.tokens == other.tokens
        assert one.confidences == pytest.approx(other.confidences, rel=1e-6, abs=tolerance)
        assert one.draws == pytest.approx(other.draws, abs=1e-9)
        assert (one.proposal is None) == (other.proposal is None)
        if one.proposal is not None and other.proposal is not None:
            assert one.proposal.tokens == other.proposal.tokens
            assert one.proposal.probs == pytest.approx(other.proposal.probs, abs=1e-9)
            assert one.proposal.num_drawn == 0
    return ours


@settings(max_examples=150, deadline=None)
@given(
    vocab=VOCABULARIES,
    scale=st.sampled_from([0.1, 1.0, 3.0, 30.0, 1e30]),
    rows=st.lists(
        st.tuples(PARAMS, LANES, st.sampled_from(CHANGES + NOT_FINITE)), min_size=1, max_size=4
    ),
    count=COUNTS,
    stream=st.integers(0, 2**31),
    position=st.integers(0, 2**31),
    random_state=st.integers(0, 2**32),
)
def test_the_same_candidates_are_found(
    vocab: int,
    scale: float,
    rows: list[tuple[SamplingParams, int | None, Change]],
    count: int,
    stream: int,
    position: int,
    random_state: int,
) -> None:
    torch.manual_seed(random_state)
    logits_MV = torch.stack([change(torch.randn(vocab) * scale) for *_, change in rows])
    specs = [SampleSpec(params, stream, position, 0) for params, *_ in rows]
    found = assert_found_alike(logits_MV, specs, [lane for _, lane, _ in rows], count)
    for logits_V, row in zip(logits_MV, found, strict=True):
        assert bool(row.tokens) == math.isfinite(float(logits_V.max()))


@settings(max_examples=60, deadline=None)
@given(
    vocab=VOCABULARIES,
    params=PARAMS,
    penalties=PENALTIES,
    lane=LANES,
    num_prompt=st.integers(0, 50),
    num_output=st.integers(0, 200),
    random_state=st.integers(0, 2**32),
)
def test_penalties_count_alike(
    vocab: int,
    params: SamplingParams,
    penalties: dict[str, float],
    lane: int | None,
    num_prompt: int,
    num_output: int,
    random_state: int,
) -> None:
    torch.manual_seed(random_state)
    logits_MV = torch.randn(3, vocab) * 3
    likely = logits_MV[0].topk(min(vocab, 40)).indices.tolist()
    rng = random.Random(random_state)
    prompt, output = (tuple(rng.choices(likely, k=n)) for n in (num_prompt, num_output))
    punishing = replace(params, **penalties)  # type: ignore[arg-type]
    punished = SampleSpec(punishing, 1, 2, 0, prompt, output)
    specs = [punished, SampleSpec(params, 0, 0, 0), replace(punished, prompt_token_ids=())]
    assert_found_alike(logits_MV, specs, [lane, None, lane], 8)


@settings(max_examples=60, deadline=None)
@given(
    vocab=VOCABULARIES,
    change=st.sampled_from(CHANGES[:-1]),
    count=COUNTS,
    random_state=st.integers(0, 2**32),
)
def test_greedy_rows_guess_the_likeliest_tokens_the_lowest_of_equals_first(
    vocab: int, change: Change, count: int, random_state: int
) -> None:
    torch.manual_seed(random_state)
    logits_V = change(torch.randn(vocab))
    logits_V[random_state % vocab] = 1.0
    spec = SampleSpec(SamplingParams(temperature=0.0, top_k=3, top_p=0.1), 0, 0, 0)
    # A lane has no meaning for them.
    (found,) = candidates(logits_V[None], [spec], [5], count)
    best = logits_V.double().softmax(-1).sort(descending=True, stable=True)
    num = min(count, NUM_BEST, int((best.values > 0).sum()))
    assert list(found.tokens) == best.indices[:num].tolist()
    assert found.confidences == pytest.approx(best.values[:num].tolist(), rel=1e-6)
    assert found.proposal is None


@settings(max_examples=60, deadline=None)
@given(
    vocab=st.integers(1, NUM_BEST),
    params=PARAMS.filter(lambda params: 1e-3 < params.temperature < 2.0 and params.min_p < 1.0),
    random_state=st.integers(0, 2**32),
)
def test_small_vocabularies_are_drawn_from_as_the_target_would(
    vocab: int, params: SamplingParams, random_state: int
) -> None:
    torch.manual_seed(random_state)
    logits_1V, spec = torch.randn(1, vocab) * 3, SampleSpec(params, 0, 0, 0)
    (found,) = candidates(logits_1V, [spec], [7], NUM_BEST)
    assert found.proposal is not None
    proposed_V = torch.zeros(vocab, dtype=torch.float64)
    proposed_V[list(found.proposal.tokens)] = torch.tensor(
        found.proposal.probs, dtype=torch.float64
    )
    # The target's logits are float32.
    torch.testing.assert_close(
        proposed_V[None], probabilities(logits_1V, [spec]), atol=1e-5, rtol=0
    )
    assert sum(found.proposal.probs) == pytest.approx(1.0, abs=1e-12)
    assert sorted(found.tokens) == sorted(found.proposal.tokens)
    assert list(found.draws) == sorted(found.draws, reverse=True)


@pytest.mark.parametrize("vocab", [10, 65, 129, 50_000])
def test_of_equal_tokens_the_lowest_are_the_best(vocab: int) -> None:
    logits_1V = torch.full((1, vocab), 2.0)
    logits_1V[0, vocab // 2] = 3.0
    others = [token for token in range(vocab) if token != vocab // 2]
    (found,) = candidates(logits_1V, [SampleSpec(SamplingParams(), 0, 0, 0)], [4], 3)
    assert found.proposal is not None
    assert list(found.proposal.tokens) == [vocab // 2, *others[: NUM_BEST - 1]]


def test_frequencies_of_first_draws_are_the_proposals_probabilities() -> None:
    num, params = 20_000, SamplingParams(temperature=0.8, top_k=9, seed=3)
    logits_V = torch.randn(100)
    specs = [SampleSpec(params, 0, i, 0) for i in range(num)]
    found = candidates(logits_V.repeat(num, 1), specs, [2] * num, 1)
    proposal = found[0].proposal
    assert proposal is not None and len(proposal.tokens) == 9
    counts = torch.tensor([row.tokens[0] for row in found]).bincount(minlength=100)
    expected = torch.tensor(proposal.probs, dtype=torch.float64) * num
    chi2 = float(((counts[list(proposal.tokens)] - expected) ** 2 / expected).sum())
    assert int(counts[list(proposal.tokens)].sum()) == num
    assert abs(chi2 - 8) < 4 * math.sqrt(2 * 8)


def test_rows_logits_and_lanes_must_match() -> None:
    row = DrawRow(1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0, 0, 0, 0, 0)
    for logits_RV in (torch.zeros(2, 5), torch.zeros(1, 5, dtype=torch.float64)):
        with pytest.raises(ValueError, match="float32 logits"):
            find_candidates(logits_RV, [row], [None], 1)
    with pytest.raises(ValueError, match="float32 logits"):
        find_candidates(torch.zeros(1, 5), [row], [], 1)
    with pytest.raises(ValueError, match="0 candidates"):
        find_candidates(torch.zeros(1, 5), [row], [None], 0)
    assert find_candidates(torch.zeros(0, 5), [], [], 1) == []


def test_threads_change_no_candidate() -> None:
    logits_MV = torch.randn(17, 20_001)
    specs = [
        SampleSpec(SamplingParams(temperature=0.5 * (i % 3), seed=i), 0, i, 0) for i in range(17)
    ]
    lanes = [None if i % 2 else i for i in range(17)]
    alone = candidates(logits_MV, specs, lanes, 8)
    library.set_threads(2)
    try:
        assert candidates(logits_MV, specs, lanes, 8) == alone
    finally:
        library.set_threads(1)
