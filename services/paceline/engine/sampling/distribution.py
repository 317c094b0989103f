"""The distribution of the next token: the rule's logits, and their probabilities.

Order of processing: repetition penalty over prompt and output, presence and frequency over
the output, temperature, top-k, top-p, min-p. reference.py draws from these logits by adding
noise; recursive rejection (spec/verify.py) needs the probabilities.
Shape legend: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from paceline.domain.request import SamplingParams
from paceline.engine.kernels import truncate_logits
from paceline.engine.step import SampleSpec

_LEAST_TEMPERATURE = torch.finfo(torch.float32).tiny
"""Below it a temperature is no normal float32; any logit but the best is -inf long before."""


def probabilities(logits_RV: torch.Tensor, specs: Sequence[SampleSpec]) -> torch.Tensor:
    """Return what each row's next token is drawn from, float64 [R, V].

    Greedy rows have all of it on their best token. A row that has no distribution (a NaN, or
    nothing but -inf) is NaN throughout.
    """
    processed_RV = penalise(logits_RV, specs)
    best_R, greedy_R = processed_RV.max(dim=-1)
    probs_RV = torch.zeros_like(processed_RV, dtype=torch.float64)
    probs_RV.scatter_(1, greedy_R[:, None], 1.0)
    has_one_R = is_drawable(best_R)
    drawn = [
        r
        for r, (spec, has_one) in enumerate(zip(specs, has_one_R.tolist(), strict=True))
        if has_one and not spec.sampling.is_greedy
    ]
    if drawn:
        centred_RV = centre(processed_RV[drawn], best_R[drawn])
        kept_RV = temper(centred_RV, [specs[r].sampling for r in drawn])
        probs_RV[drawn] = kept_RV.double().softmax(dim=-1)
    probs_RV[~has_one_R] = float("nan")
    return probs_RV


def is_drawable(best_R: torch.Tensor) -> torch.Tensor:
    """Tell from their maxima which rows have a distribution; that of a row with a NaN is NaN."""
    return ~(best_R.isnan() | (best_R == float("-inf")))


def penalise(logits_RV: torch.Tensor, specs: Sequence[SampleSpec]) -> torch.Tensor:
    """Return logits with the penalties of the rows that have them; the same tensor if none has."""
    if not any(spec.sampling.has_penalties for spec in specs):
        return logits_RV
    logits_RV = logits_RV.clone()
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


def centre(logits_RV: torch.Tensor, best_R: torch.Tensor) -> torch.Tensor:
    """Shift each row so that its best token has 0; where that was +inf, all others have -inf."""
    centred_RV = logits_RV - best_R[:, None]
    return centred_RV.masked_fill(logits_RV == float("inf"), 0.0)


def temper(centred_RV: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Apply temperature and truncation to centred rows, none of them greedy."""
    temperatures = [max(p.temperature, _LEAST_TEMPERATURE) for p in params]
    return truncate_logits(
        centred_RV / torch.tensor(temperatures)[:, None],
        torch.tensor([p.top_k for p in params]),
        torch.tensor([p.top_p for p in params], dtype=torch.float64),
        torch.tensor([p.min_p for p in params]),
    )
