"""The C++ sampler draws what the torch one draws; its log-probabilities; its frequencies.

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
from paceline.engine.kernels import DrawRow, draw
from paceline.engine.sampling import reference
from paceline.engine.sampling.sampler import sample
from paceline.engine.step import SampledToken, SampleSpec
from paceline_kernels import philox_uniform
from paceline_kernels.cpu import library
from tests.kernels.drawing_cases import PENALTIES, sampling_params

pytestmark = [
    pytest.mark.skipif(
        library.library() is None, reason="the C++ kernels need a compiler at set-up"
    ),
    pytest.mark.usefixtures("instruction_set"),
]
INF = float("inf")

VOCABULARIES = st.one_of(st.integers(1, 130), st.integers(1, 60_000))
PARAMS = sampling_params(min_p=st.floats(0.0, 1.0, width=32))
CHANGES: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda logits_V: logits_V,
    lambda logits_V: (logits_V * 2).round() / 2,
    lambda logits_V: logits_V * 0.0,
    lambda logits_V: logits_V.masked_fill(torch.rand(logits_V.shape) < 0.4, -INF),
    lambda logits_V: logits_V.masked_fill(torch.rand(logits_V.shape) < 2 / len(logits_V), INF),
    lambda logits_V: logits_V.masked_fill(torch.rand(logits_V.shape) < 1 / len(logits_V), math.nan),
    lambda logits_V: torch.full_like(logits_V, -INF),
]


def spec_of(params: SamplingParams, *, num_logprobs: int = 0, position: int = 0) -> SampleSpec:
    return SampleSpec(params, 0, position, num_logprobs)


def tokens_of(sampled: list[SampledToken | None]) -> list[int | None]:
    return [None if token is None else token.token_id for token in sampled]


def assert_draws_alike(logits_RV: torch.Tensor, specs: list[SampleSpec]) -> list[int | None]:
    before = logits_RV.clone()
    ours = tokens_of(sample(logits_RV, specs))
    assert torch.equal(logits_RV.nan_to_num(), before.nan_to_num()), "logits were changed"
    assert ours == tokens_of(reference.sample(logits_RV, specs))
    return ours


@settings(max_examples=150, deadline=None)
@given(
    vocab=VOCABULARIES,
    scale=st.sampled_from([0.1, 1.0, 3.0, 30.0, 1e30]),
    rows=st.lists(st.tuples(PARAMS, st.sampled_from(CHANGES)), min_size=1, max_size=4),
    stream=st.integers(0, 2**31),
    position=st.integers(0, 2**31),
    random_state=st.integers(0, 2**32),
)
def test_the_same_token_is_drawn(
    vocab: int,
    scale: float,
    rows: list[tuple[SamplingParams, Callable[[torch.Tensor], torch.Tensor]]],
    stream: int,
    position: int,
    random_state: int,
) -> None:
    torch.manual_seed(random_state)
    logits_RV = torch.stack([change(torch.randn(vocab) * scale) for _, change in rows])
    assert_draws_alike(logits_RV, [SampleSpec(p, stream, position, 0) for p, _ in rows])


@settings(max_examples=60, deadline=None)
@given(
    vocab=VOCABULARIES,
    params=PARAMS,
    penalties=PENALTIES,
    num_prompt=st.integers(0, 50),
    num_output=st.integers(0, 200),
    random_state=st.integers(0, 2**32),
)
def test_penalties_count_alike(
    vocab: int,
    params: SamplingParams,
    penalties: dict[str, float],
    num_prompt: int,
    num_output: int,
    random_state: int,
) -> None:
    torch.manual_seed(random_state)
    logits_RV = torch.randn(2, vocab) * 3
    # Punished are those that would be drawn, some of them often.
    likely = logits_RV[0].topk(min(vocab, 40)).indices.tolist()
    rng = random.Random(random_state)
    prompt, output = (tuple(rng.choices(likely, k=n)) for n in (num_prompt, num_output))
    punished = SampleSpec(replace(params, **penalties), 1, 2, 0, prompt, output)
    assert_draws_alike(logits_RV, [punished, spec_of(params)])


def test_penalised_logits_have_the_same_bits() -> None:
    """A greedy row with two tokens tells which is larger, and equal ones by their order."""
    for i in range(300):
        rng = random.Random(i)
        presence, frequency, count = rng.uniform(-2, 2), rng.uniform(-2, 2), rng.randrange(1, 9)
        repetition = rng.choice([1.0, rng.uniform(0.5, 2)])
        params = SamplingParams(0.0, 0, 1.0, 0.0, repetition, presence, frequency)
        x = torch.randn(1) * 5
        expected = x * repetition if float(x) < 0 else x / repetition
        expected = expected - presence - torch.tensor(frequency) * count
        for logits_V, punished in ((torch.cat([x, expected]), 0), (torch.cat([expected, x]), 1)):
            spec = SampleSpec(params, 0, 0, 0, (), (punished,) * count)
            assert assert_draws_alike(logits_V[None], [spec]) == [0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("extra", [{}, {"top_p": 0.95}, {"top_k": 200}, {"min_p": 0.01}], ids=str)
def test_long_sequences_of_draws_are_alike(temperature: float, extra: dict[str, float]) -> None:
    """Many keys over few logits: also the unlikely tokens are drawn."""
    logits_RV = torch.randn(1, 3001).expand(300, -1).contiguous()
    params = SamplingParams(temperature=temperature, **extra)  # type: ignore[arg-type]
    specs = [spec_of(replace(params, seed=i << 40 | i), position=i) for i in range(300)]
    assert len(set(assert_draws_alike(logits_RV, specs))) > 30


def test_a_row_without_a_distribution_fails_alone() -> None:
    logits_RV = torch.randn(5, 4099)
    logits_RV[1, 4098] = math.nan
    logits_RV[3] = -INF
    for params in (SamplingParams(temperature=0.0), SamplingParams(), SamplingParams(top_k=5)):
        tokens = assert_draws_alike(logits_RV, [spec_of(params, num_logprobs=2)] * 5)
        assert [token is None for token in tokens] == [False, True, False, True, False]


@pytest.mark.parametrize("top_p", [0.1, 0.25, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("num_equal", [4, 10, 1000, 20_000])
def test_of_equal_tokens_the_first_are_the_nucleus(num_equal: int, top_p: float) -> None:
    """Shares that are reached exactly, but for the last bits that all others are worth."""
    logits_V = torch.full((30_000,), -40.0)
    equal = torch.randperm(30_000)[:num_equal].sort().values
    logits_V[equal] = 2.0
    specs = [spec_of(SamplingParams(top_p=top_p, seed=i)) for i in range(20)]
    kept = set(equal[: math.ceil(round(num_equal * top_p, 9))].tolist())
    assert set(assert_draws_alike(logits_V.repeat(20, 1), specs)) <= kept


def test_equal_noisy_logits_give_the_lowest_token() -> None:
    """Some of 300,000 tokens have the same noise; only those are possible."""
    vocab = 300_000
    uniform_V = philox_uniform(*(torch.tensor([x]) for x in (7, 0, 5)), vocab)[0]
    value, count = uniform_V.unique(return_counts=True)
    pairs = [(uniform_V == x).nonzero()[:, 0].tolist() for x in value[count == 2][:5]]
    assert len(pairs) == 5
    logits_RV = torch.full((5, vocab), -INF)
    for logits_V, pair in zip(logits_RV, pairs, strict=True):
        logits_V[pair] = 1.0
    for extra in ({}, {"top_k": 2}):
        spec = spec_of(SamplingParams(seed=7, **extra), position=5)
        assert assert_draws_alike(logits_RV, [spec] * 5) == [min(pair) for pair in pairs]


def test_tokens_that_are_out_of_the_vocabulary_are_not_punished() -> None:
    params = SamplingParams(temperature=0.0, repetition_penalty=2.0, presence_penalty=1.0)
    logits_RV = torch.arange(10.0)[None]
    strange = SampleSpec(params, 0, 0, 0, (10, -1, 2**40), (-(2**40), 9))
    assert tokens_of(sample(logits_RV, [strange])) == [8]


def test_rows_and_logits_must_match() -> None:
    row = DrawRow(1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0, 0, 0, 0, 0)
    for logits_RV in (torch.zeros(2, 5), torch.zeros(1, 5, dtype=torch.float64)):
        with pytest.raises(ValueError, match="float32 logits"):
            draw(logits_RV, [row])
    assert draw(torch.zeros(0, 5), []).tokens_R == []


@settings(max_examples=60, deadline=None)
@given(
    vocab=VOCABULARIES,
    num_logprobs=st.integers(1, 60),
    scale=st.sampled_from([0.0, 0.1, 3.0, 30.0]),
    change=st.sampled_from([CHANGES[0], CHANGES[1], CHANGES[3]]),
    random_state=st.integers(0, 2**32),
)
def test_logprobs_are_those_of_the_unmodified_logits(
    vocab: int,
    num_logprobs: int,
    scale: float,
    change: Callable[[torch.Tensor], torch.Tensor],
    random_state: int,
) -> None:
    torch.manual_seed(random_state)
    logits_V = change(torch.randn(vocab) * scale)
    logits_V[random_state % vocab] = 1.0
    params = SamplingParams(temperature=0.5, top_k=3, repetition_penalty=3.0)
    spec = SampleSpec(params, 0, 0, num_logprobs, tuple(range(min(vocab, 9))), ())
    (token,) = sample(logits_V[None], [spec])
    assert token is not None and token.logprobs is not None
    # In float32, torch's own are off by 2e-5 where 40,000 tokens are equal.
    expected_V = logits_V.double().log_softmax(dim=-1).float()
    assert token.logprobs.token_id == token.token_id
    ids, values = (list(x) for x in zip(*token.logprobs.top, strict=True))
    # Best first, of equal ones the lower token.
    assert ids == logits_V.sort(descending=True, stable=True).indices[:num_logprobs].tolist()
    torch.testing.assert_close(
        torch.tensor([token.logprobs.logprob, *values]),
        expected_V[[token.token_id, *ids]],
        rtol=1e-6,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.3),
        SamplingParams(top_p=0.8),
        SamplingParams(top_k=20, temperature=2.0),
        SamplingParams(min_p=0.02),
    ],
    ids=["temperature", "top-p", "top-k", "min-p"],
)
def test_frequencies_are_the_probabilities(params: SamplingParams) -> None:
    num_draws, vocab = 20_000, 100
    logits_V = torch.randn(vocab)
    rows = [
        DrawRow(
            params.temperature, params.top_p, params.min_p, 1.0, 0.0, 0.0, 7, 0, i, params.top_k, 0
        )
        for i in range(num_draws)
    ]
    tokens = torch.tensor(draw(logits_V.repeat(num_draws, 1), rows).tokens_R)
    probs_V = (logits_V.double() / params.temperature).softmax(-1)
    # The kept tokens, enumerated: a prefix of the likeliest in each of these cases.
    likeliest = probs_V.sort(descending=True)
    before_V = likeliest.values.cumsum(0) - likeliest.values
    is_kept_V = (before_V < params.top_p) & (likeliest.values >= params.min_p * probs_V.max())
    kept = likeliest.indices[is_kept_V][: params.top_k or None]
    expected = probs_V[kept] / probs_V[kept].sum() * num_draws
    counts = tokens.bincount(minlength=vocab)[kept]
    assert int(counts.sum()) == num_draws
    assert float(expected.min()) > 5
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    # About 4 standard deviations of a chi-square with this many degrees of freedom.
    freedom = len(kept) - 1
    assert abs(chi2 - freedom) < 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_token(threads: int) -> None:
    logits_RV = torch.randn(17, 9001)
    specs = [
        spec_of(SamplingParams(top_p=0.5 + 0.5 * (i % 2), seed=i), num_logprobs=i % 3)
        for i in range(17)
    ]
    alone = sample(logits_RV, specs)
    library.set_threads(threads)
    try:
        assert sample(logits_RV, specs) == alone
    finally:
        library.set_threads(1)
