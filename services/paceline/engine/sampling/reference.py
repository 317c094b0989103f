"""The rule by which a token is drawn, in torch: argmax(logits + Gumbel(seed, stream, position)).

Order of processing: repetition penalty over prompt and output, presence and frequency over
the output, temperature, top-k, top-p, min-p. Log-probabilities are of the unmodified logits.
Greedy rows are the zero-noise case, and what temperatures tend to as they fall.
What the C++ kernels are proven against, and what draws where they were not built.
Shape legend: R rows, V vocabulary, K candidates of a row.
"""

from __future__ import annotations

import torch

from paceline.domain.request import TokenLogprobs
from paceline.engine.kernels import gumbel_noise, gumbel_noise_at, truncate_logits
from paceline.engine.step import SampledToken, SampleSpec

_LEAST_TEMPERATURE = torch.finfo(torch.float32).tiny
"""Below it a temperature is no normal float32; any logit but the best is -inf long before."""

_SPARSE_SHARE = 8
"""Noise is made for candidates alone where they are at most this fraction (1/n) of the
vocabulary: a single token's costs as much as that of four neighbours."""


def sample(logits_RV: torch.Tensor, specs: list[SampleSpec]) -> list[SampledToken | None]:
    """Draw a token for each row of float32 logits; None for a row that has no distribution.

    That is one with a NaN, or without any token that is not -inf.
    """
    processed_RV = logits_RV
    if any(spec.sampling.has_penalties for spec in specs):
        processed_RV = _penalise(logits_RV.clone(), specs)
    # The maximum of a row with a NaN is NaN.
    best_R, greedy_R = processed_RV.max(dim=-1)
    is_drawable = ~(best_R.isnan() | (best_R == float("-inf")))
    tokens: list[int | None] = [
        token if ok else None
        for token, ok in zip(greedy_R.tolist(), is_drawable.tolist(), strict=True)
    ]
    drawn = [
        r for r, spec in enumerate(specs) if tokens[r] is not None and not spec.sampling.is_greedy
    ]
    if drawn:
        centred = _centre(processed_RV[drawn], best_R[drawn])
        for r, token in zip(drawn, _draw(centred, [specs[r] for r in drawn]), strict=True):
            tokens[r] = token
    return [
        None if token is None else SampledToken(token, _logprobs(logits_RV[r], specs[r], token))
        for r, token in enumerate(tokens)
    ]


def _penalise(logits_RV: torch.Tensor, specs: list[SampleSpec]) -> torch.Tensor:
    """Apply penalties in place to the rows that have them."""
    vocab = logits_RV.shape[1]
    for logits_V, spec in zip(logits_RV, specs, strict=True):
        params = spec.sampling
        if not params.has_penalties:
            continue
        output = torch.tensor(spec.output_token_ids or (), dtype=torch.int64)
        counts_V = output.bincount(minlength=vocab)
        if params.repetition_penalty != 1.0:
            seen_V = counts_V > 0
            seen_V[list(spec.prompt_token_ids or ())] = True
            penalty = params.repetition_penalty
            punished_V = torch.where(logits_V < 0, logits_V * penalty, logits_V / penalty)
            logits_V.copy_(torch.where(seen_V, punished_V, logits_V))
        logits_V -= params.presence_penalty * (counts_V > 0)
        logits_V -= params.frequency_penalty * counts_V
    return logits_RV


def _centre(logits_RV: torch.Tensor, best_R: torch.Tensor) -> torch.Tensor:
    """Shift each row so that its best token has 0; where that was +inf, all others have -inf."""
    centred_RV = logits_RV - best_R[:, None]
    return centred_RV.masked_fill(logits_RV == float("inf"), 0.0)


def _draw(centred_RV: torch.Tensor, specs: list[SampleSpec]) -> list[int]:
    params = [spec.sampling for spec in specs]
    temperatures = [max(p.temperature, _LEAST_TEMPERATURE) for p in params]
    logits_RV = truncate_logits(
        centred_RV / torch.tensor(temperatures)[:, None],
        torch.tensor([p.top_k for p in params]),
        torch.tensor([p.top_p for p in params], dtype=torch.float64),
        torch.tensor([p.min_p for p in params]),
    )
    num_kept = (logits_RV > float("-inf")).sum(dim=-1).tolist()
    vocab = logits_RV.shape[1]
    is_sparse = [count * _SPARSE_SHARE <= vocab for count in num_kept]
    tokens = [0] * len(specs)
    for rows, draw in (
        ([r for r, x in enumerate(is_sparse) if x], _argmax_of_candidates),
        ([r for r, x in enumerate(is_sparse) if not x], _argmax_of_all),
    ):
        if rows:
            keys = _noise_keys([specs[r] for r in rows])
            for r, token in zip(rows, draw(logits_RV[rows], keys), strict=True):
                tokens[r] = token
    return tokens


_Keys = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _argmax_of_all(logits_RV: torch.Tensor, keys: _Keys) -> list[int]:
    noisy_RV = logits_RV + gumbel_noise(*keys, logits_RV.shape[1])
    tokens: list[int] = noisy_RV.argmax(dim=-1).tolist()
    return tokens


def _argmax_of_candidates(logits_RV: torch.Tensor, keys: _Keys) -> list[int]:
    """Draw what `_argmax_of_all` would, with noise for the tokens that were kept only."""
    num_kept = int((logits_RV > float("-inf")).sum(dim=-1).max())
    # In order of token ids, so that equal values are resolved alike.
    tokens_RK = logits_RV.topk(num_kept, dim=-1).indices.sort(dim=-1).values
    noisy_RK = logits_RV.gather(1, tokens_RK) + gumbel_noise_at(*keys, tokens_RK)
    best_R1 = noisy_RK.argmax(dim=-1, keepdim=True)
    tokens: list[int] = tokens_RK.gather(1, best_R1)[:, 0].tolist()
    return tokens


def _noise_keys(specs: list[SampleSpec]) -> _Keys:
    return (
        torch.tensor([_signed(spec.sampling.seed) for spec in specs]),
        torch.tensor([spec.stream for spec in specs]),
        torch.tensor([spec.position for spec in specs]),
    )


def _signed(seed: int) -> int:
    """Return the 64-bit pattern of an unsigned seed as a signed number."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def _logprobs(logits_V: torch.Tensor, spec: SampleSpec, token: int) -> TokenLogprobs | None:
    if spec.num_logprobs <= 0:
        return None
    logprobs_V = logits_V.log_softmax(dim=-1)
    best = logprobs_V.topk(min(spec.num_logprobs, len(logprobs_V)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return TokenLogprobs(token, float(logprobs_V[token]), tuple(pairs))
