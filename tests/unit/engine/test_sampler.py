"""Both samplers against transformers' processors, plain oracles and their own limits.

That they draw the same tokens is proven in tests/kernels/test_cpu_sampling.py.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from paceline.domain.request import SamplingParams
from paceline.engine.kernels import gumbel_noise, has_cpp_kernels
from paceline.engine.sampling import reference, sampler
from paceline.engine.sampling.sampler import sample
from paceline.engine.step import SampleSpec

VOCAB = 1000


@pytest.fixture(autouse=True, params=["torch", "cpp"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(sampler, "has_cpp_kernels", lambda: False)
    elif not has_cpp_kernels():
        pytest.skip("the C++ kernels need a compiler at set-up")
    return str(request.param)


@pytest.fixture
def torch_only(implementation: str) -> None:
    if implementation != "torch":
        pytest.skip("looks into the torch implementation")


def spec_of(
    params: SamplingParams,
    *,
    stream: int = 0,
    position: int = 5,
    num_logprobs: int = 0,
    prompt: tuple[int, ...] = (),
    output: tuple[int, ...] = (),
) -> SampleSpec:
    return SampleSpec(params, stream, position, num_logprobs, prompt, output)


def tokens_of(logits_RV: torch.Tensor, specs: list[SampleSpec]) -> list[int | None]:
    return [None if t is None else t.token_id for t in sample(logits_RV, specs)]


def processed(
    logits_V: torch.Tensor, spec: SampleSpec, monkeypatch: pytest.MonkeyPatch
) -> torch.Tensor:
    """The logits that noise would be added to."""
    seen: list[torch.Tensor] = []

    def argmax(logits_RV: torch.Tensor, keys: object) -> list[int]:
        seen.append(logits_RV)
        return [0] * len(logits_RV)

    monkeypatch.setattr(reference, "_argmax_of_all", argmax)
    monkeypatch.setattr(reference, "_argmax_of_candidates", argmax)
    sample(logits_V[None].clone(), [spec])
    (logits_RV,) = seen
    return logits_RV[0]


def transformers_logits(logits_V: torch.Tensor, spec: SampleSpec) -> torch.Tensor:
    """The same processing in transformers' order and by its own classes."""
    params = spec.sampling
    ids = torch.tensor([[*(spec.prompt_token_ids or ()), *(spec.output_token_ids or ())]])
    scores = logits_V[None].clone()
    processors: list[object] = []
    if params.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.temperature != 1.0:
        processors.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0.0:
        processors.append(MinPLogitsWarper(params.min_p))
    for processor in processors:
        scores = processor(ids, scores)  # type: ignore[operator]
    return scores[0]


CASES = [
    SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m, repetition_penalty=r)
    for t, k, p, m, r in itertools.product(
        [1.0, 0.7, 1.9], [0, 1, 40, 5000], [1.0, 0.9, 0.3], [0.0, 0.05], [1.0, 1.3]
    )
]


@pytest.mark.usefixtures("torch_only")
@pytest.mark.parametrize("scale", [0.5, 3.0, 12.0])
def test_processing_equals_transformers(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(1)
    generator = torch.Generator().manual_seed(int(scale * 10))
    for params in CASES:
        logits_V = torch.randn(VOCAB, generator=generator) * scale
        spec = spec_of(
            params,
            prompt=tuple(rng.choices(range(VOCAB), k=30)),
            output=tuple(rng.choices(range(VOCAB), k=20)),
        )
        ours, theirs = processed(logits_V, spec, monkeypatch), transformers_logits(logits_V, spec)
        assert torch.equal(ours.isinf(), theirs.isinf()), params
        kept = ~ours.isinf()
        torch.testing.assert_close(
            ours[kept].log_softmax(-1), theirs[kept].log_softmax(-1), rtol=1e-5, atol=1e-5
        )


@pytest.mark.usefixtures("torch_only")
def test_presence_and_frequency_are_counted_over_the_output_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = random.Random(2)
    for _ in range(20):
        logits_V = torch.randn(VOCAB) * 3
        output = tuple(rng.choices(range(50), k=60))
        presence, frequency = rng.uniform(-2, 2), rng.uniform(-2, 2)
        spec = spec_of(
            SamplingParams(presence_penalty=presence, frequency_penalty=frequency),
            prompt=tuple(range(100)),
            output=output,
        )
        counts = Counter(output)
        expected = [
            float(x) - (presence if counts[i] else 0) - frequency * counts[i]
            for i, x in enumerate(logits_V)
        ]
        torch.testing.assert_close(
            processed(logits_V, spec, monkeypatch).log_softmax(-1),
            torch.tensor(expected).log_softmax(-1),
            rtol=1e-5,
            atol=1e-5,
        )


def test_penalties_of_one_row_touch_no_other() -> None:
    logits_RV = torch.randn(4, VOCAB)
    before = logits_RV.clone()
    plain = SamplingParams(seed=3)
    specs = [spec_of(plain, position=i) for i in range(4)]
    alone = tokens_of(logits_RV, specs)
    punished = SamplingParams(presence_penalty=2.0, repetition_penalty=5.0, temperature=0.0)
    specs[2] = spec_of(punished, prompt=tuple(range(500)), output=tuple(range(500)))
    mixed = tokens_of(logits_RV, specs)
    assert [mixed[i] for i in (0, 1, 3)] == [alone[i] for i in (0, 1, 3)]
    assert mixed[2] is not None and mixed[2] >= 500
    assert torch.equal(logits_RV, before), "logits were changed in place"


# -- limits -------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-30, 1e-38, 1e-42, 5e-324])
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4, 1e30])
def test_a_temperature_near_zero_is_greedy(temperature: float, offset: float) -> None:
    generator = torch.Generator().manual_seed(4)
    logits_RV = torch.randn(8, VOCAB, generator=generator) * 10
    # The best token is ahead by more than the offset's rounding.
    best = torch.randint(VOCAB, (8,), generator=generator)
    logits_RV[torch.arange(8), best] = 100.0
    logits_RV = logits_RV * max(1.0, offset / 50) + offset
    for extra in ({}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}):
        params = SamplingParams(temperature=temperature, seed=9, **extra)  # type: ignore[arg-type]
        assert tokens_of(logits_RV, [spec_of(params)] * 8) == best.tolist()


def test_equal_best_tokens_share_a_vanishing_temperature() -> None:
    logits_V = torch.full((VOCAB,), -5.0)
    logits_V[[10, 20]] = 3.0
    specs = [
        spec_of(SamplingParams(temperature=1e-30, seed=seed), position=seed) for seed in range(400)
    ]
    counts = Counter(tokens_of(logits_V.expand(400, -1).clone(), specs))
    assert counts.keys() == {10, 20}
    assert 150 < counts[10] < 250


def test_a_huge_temperature_is_uniform() -> None:
    logits_V = torch.randn(8) * 5
    specs = [spec_of(SamplingParams(temperature=1e30, seed=7), position=i) for i in range(4000)]
    counts = Counter(tokens_of(logits_V.expand(4000, -1).clone(), specs))
    assert all(400 < counts[token] < 600 for token in range(8))


@pytest.mark.parametrize("extra", [{}, {"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.2}], ids=str)
def test_infinite_logits_mean_their_limits(extra: dict[str, float]) -> None:
    inf = float("inf")
    impossible = torch.full((VOCAB,), -inf)
    impossible[[3, 4]] = torch.tensor([1.0, 2.0])
    certain = torch.randn(VOCAB)
    certain[17] = inf
    two = torch.randn(VOCAB)
    two[[21, 22]] = inf
    only = torch.full((VOCAB,), -inf)
    only[5] = -1e30
    for seed in range(30):
        spec = spec_of(SamplingParams(seed=seed, **extra))  # type: ignore[arg-type]
        a, b, c, d = tokens_of(torch.stack([impossible, certain, two, only]), [spec] * 4)
        assert a in (3, 4)
        assert (b, d) == (17, 5)
        assert c in (21, 22)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_a_distribution_fails_alone(temperature: float) -> None:
    logits_RV = torch.randn(5, VOCAB)
    logits_RV[1, 77] = float("nan")
    logits_RV[3] = float("-inf")
    specs = [spec_of(SamplingParams(temperature=temperature, seed=i)) for i in range(5)]
    tokens = tokens_of(logits_RV, specs)
    assert tokens[1] is None and tokens[3] is None
    good = [0, 2, 4]
    assert [tokens[i] for i in good] == tokens_of(logits_RV[good], [specs[i] for i in good])


def test_extreme_penalties_keep_a_row_drawable() -> None:
    logits_RV = torch.randn(3, VOCAB) * 30
    params = [
        SamplingParams(repetition_penalty=1e-45),
        SamplingParams(repetition_penalty=100.0, presence_penalty=-100.0),
        SamplingParams(frequency_penalty=100.0),
    ]
    output = tuple(range(VOCAB)) * 2
    specs = [spec_of(p, prompt=output, output=output) for p in params]
    assert None not in tokens_of(logits_RV, specs)


def test_equal_logits_of_a_greedy_row_give_the_lowest_token() -> None:
    logits_RV = torch.zeros(2, VOCAB)
    logits_RV[1, [8, 300]] = 1.0
    assert tokens_of(logits_RV, [spec_of(SamplingParams(temperature=0.0))] * 2) == [0, 8]


# -- noise --------------------------------------------------------------------------------


def test_a_row_is_drawn_alike_in_every_batch() -> None:
    rng, generator = random.Random(5), torch.Generator().manual_seed(5)
    specs = [
        spec_of(
            SamplingParams(
                temperature=rng.choice([0.0, 0.4, 1.0, 3.0]),
                top_k=rng.choice([0, 0, 1, 5, 500, 900]),
                top_p=rng.choice([1.0, 1.0, 0.5, 0.99]),
                min_p=rng.choice([0.0, 0.0, 0.1]),
                seed=rng.getrandbits(64),
            ),
            stream=rng.randrange(4),
            position=rng.randrange(10_000),
        )
        for _ in range(64)
    ]
    logits_RV = torch.randn(64, VOCAB, generator=generator) * 4
    together = tokens_of(logits_RV, specs)
    alone = [tokens_of(logits_RV[i : i + 1], specs[i : i + 1])[0] for i in range(64)]
    order = rng.sample(range(64), 64)
    shuffled = tokens_of(logits_RV[order], [specs[i] for i in order])
    assert together == alone
    assert [together[i] for i in order] == shuffled


@pytest.mark.usefixtures("torch_only")
def test_noise_for_candidates_only_changes_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    rng, generator = random.Random(6), torch.Generator().manual_seed(6)
    logits_RV = torch.randn(200, VOCAB, generator=generator) * 3
    # Many equal logits, so that ties between candidates occur.
    logits_RV = (logits_RV * 2).round() / 2
    specs = [
        spec_of(SamplingParams(top_k=rng.choice([1, 3, 40]), seed=i), position=i)
        for i in range(200)
    ]
    sparse = tokens_of(logits_RV, specs)
    monkeypatch.setattr(reference, "_SPARSE_SHARE", VOCAB * 2)
    assert tokens_of(logits_RV, specs) == sparse


@pytest.mark.usefixtures("torch_only")
def test_equal_noisy_logits_give_the_lowest_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever way noise was made, so that a tie does not tell them apart."""
    monkeypatch.setattr(reference, "gumbel_noise", lambda *keys: torch.zeros(1, VOCAB))
    monkeypatch.setattr(reference, "gumbel_noise_at", lambda *keys: torch.zeros(keys[-1].shape))
    generator = torch.Generator().manual_seed(8)
    for _ in range(50):
        tied = torch.randperm(VOCAB, generator=generator)[:5]
        logits_V = torch.randn(VOCAB, generator=generator)
        logits_V[tied] = 9.0
        for top_k in (0, 5, 50):
            spec = spec_of(SamplingParams(top_k=top_k))
            assert tokens_of(logits_V[None], [spec]) == [int(tied.min())]


def test_a_drawn_token_is_the_best_after_noise() -> None:
    """The coupled rule, spelt out: a drafter with the same key can foresee the token."""
    generator = torch.Generator().manual_seed(7)
    logits_RV = torch.randn(16, VOCAB, generator=generator)
    specs = [
        spec_of(SamplingParams(temperature=0.8, seed=i), stream=i % 3, position=7 * i)
        for i in range(16)
    ]
    noise = gumbel_noise(torch.arange(16), torch.arange(16) % 3, 7 * torch.arange(16), VOCAB)
    expected = (logits_RV / 0.8 + noise).argmax(-1).tolist()
    assert tokens_of(logits_RV, specs) == expected


# -- log-probabilities --------------------------------------------------------------------


@pytest.mark.parametrize("num_logprobs", [1, 5, VOCAB, VOCAB + 10])
def test_logprobs_are_those_of_the_unmodified_logits(num_logprobs: int) -> None:
    logits_RV = torch.randn(3, VOCAB) * 5
    params = SamplingParams(temperature=0.3, top_k=2, repetition_penalty=3.0, seed=1)
    specs = [spec_of(params, num_logprobs=num_logprobs, output=(1, 2, 3))] * 3
    expected_RV = torch.log_softmax(logits_RV.double(), dim=-1)
    for row, token in enumerate(sample(logits_RV, specs)):
        assert token is not None and token.logprobs is not None
        logprobs = token.logprobs
        assert logprobs.token_id == token.token_id
        assert logprobs.logprob == pytest.approx(float(expected_RV[row, token.token_id]), abs=1e-5)
        assert len(logprobs.top) == min(num_logprobs, VOCAB)
        values = [value for _, value in logprobs.top]
        assert values == sorted(values, reverse=True)
        ids = [i for i, _ in logprobs.top]
        assert len(set(ids)) == len(ids)
        assert values == pytest.approx(expected_RV[row, ids].tolist(), abs=1e-5)
        best = expected_RV[row].topk(len(ids)).values.tolist()
        assert values == pytest.approx(best, abs=1e-5)


def test_rows_that_did_not_ask_get_no_logprobs() -> None:
    specs = [spec_of(SamplingParams(), num_logprobs=k) for k in (0, 2, 0)]
    drawn = sample(torch.randn(3, VOCAB), specs)
    assert [token is not None and token.logprobs is not None for token in drawn] == [
        False,
        True,
        False,
    ]
