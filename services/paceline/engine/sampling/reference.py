"""The rule by which a token is drawn, in torch: argmax(logits + Gumbel(seed, stream, position)).

How logits are processed is in distribution.py. Log-probabilities are of the unmodified logits.
Greedy rows are the zero-noise case, and what temperatures tend to as they fall.
What the C++ kernels are proven against, and what draws where they were not built.
Shape legend: R rows, V vocabulary, K candidates of a row.
"""

from __future__ import annotations

import torch

from paceline.domain.request import TokenLogprobs
from paceline.engine.kernels import gumbel_noise, gumbel_noise_at
from paceline.engine.sampling.distribution import centre, is_drawable, penalise, temper
from paceline.engine.sampling.noise import NoiseKeys, noise_keys
from paceline.engine.step import SampledToken, SampleSpec

_SPARSE_SHARE = 8
"""Noise is made for candidates alone where they are at most this fraction (1/n) of the
vocabulary: a single token's costs as much as that of four neighbours."""


def sample(logits_RV: torch.Tensor, specs: list[SampleSpec]) -> list[SampledToken | None]:
    """Draw a token for each row of float32 logits; None for a row that has no distribution.

    That is one with a NaN, or without any token that is not -inf.
    """
    processed_RV = penalise(logits_RV, specs)
    best_R, greedy_R = processed_RV.max(dim=-1)
    tokens: list[int | None] = [
        token if ok else None
        for token, ok in zip(greedy_R.tolist(), is_drawable(best_R).tolist(), strict=True)
    ]
    drawn = [
        r for r, spec in enumerate(specs) if tokens[r] is not None and not spec.sampling.is_greedy
    ]
    if drawn:
        centred = centre(processed_RV[drawn], best_R[drawn])
        for r, token in zip(drawn, _draw(centred, [specs[r] for r in drawn]), strict=True):
            tokens[r] = token
    return [
        None if token is None else SampledToken(token, logprobs(logits_RV[r], specs[r], token))
        for r, token in enumerate(tokens)
    ]


def _draw(centred_RV: torch.Tensor, specs: list[SampleSpec]) -> list[int]:
    logits_RV = temper(centred_RV, [spec.sampling for spec in specs])
    num_kept = (logits_RV > float("-inf")).sum(dim=-1).tolist()
    vocab = logits_RV.shape[1]
    is_sparse = [count * _SPARSE_SHARE <= vocab for count in num_kept]
    tokens = [0] * len(specs)
    for rows, draw in (
        ([r for r, x in enumerate(is_sparse) if x], _argmax_of_candidates),
        ([r for r, x in enumerate(is_sparse) if not x], _argmax_of_all),
    ):
        if rows:
            keys = noise_keys([specs[r] for r in rows])
            for r, token in zip(rows, draw(logits_RV[rows], keys), strict=True):
                tokens[r] = token
    return tokens


def _argmax_of_all(logits_RV: torch.Tensor, keys: NoiseKeys) -> list[int]:
    noisy_RV = logits_RV + gumbel_noise(*keys, logits_RV.shape[1])
    tokens: list[int] = noisy_RV.argmax(dim=-1).tolist()
    return tokens


def _argmax_of_candidates(logits_RV: torch.Tensor, keys: NoiseKeys) -> list[int]:
    """Draw what `_argmax_of_all` would, with noise for the tokens that were kept only."""
    num_kept = int((logits_RV > float("-inf")).sum(dim=-1).max())
    # In order of token ids, so that equal values are resolved alike.
    tokens_RK = logits_RV.topk(num_kept, dim=-1).indices.sort(dim=-1).values
    noisy_RK = logits_RV.gather(1, tokens_RK) + gumbel_noise_at(*keys, tokens_RK)
    best_R1 = noisy_RK.argmax(dim=-1, keepdim=True)
    tokens: list[int] = tokens_RK.gather(1, best_R1)[:, 0].tolist()
    return tokens


def logprobs(logits_V: torch.Tensor, spec: SampleSpec, token: int) -> TokenLogprobs | None:
    """Return what a row reports of its token; None if it asked for nothing."""
    if spec.num_logprobs <= 0:
        return None
    logprobs_V = logits_V.log_softmax(dim=-1)
    best = logprobs_V.topk(min(spec.num_logprobs, len(logprobs_V)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return TokenLogprobs(token, float(logprobs_V[token]), tuple(pairs))
