"""Draws one token per row by the coupled rule: argmax(logits + Gumbel(seed, stream, position)).

Order of processing: repetition penalty over prompt and output, presence and frequency over
the output, temperature, top-k, top-p, min-p. Log-probabilities are of the unmodified logits.
Greedy rows are the zero-noise case. Shape legend: R rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from paceline.domain.errors import InternalError
from paceline.domain.request import SamplingParams, TokenLogprobs
from paceline.engine.kernels import gumbel_noise, truncate_logits


@dataclass(frozen=True, slots=True)
class RowSampling:
    """How one row is drawn from; token ids are set only where penalties need them."""

    params: SamplingParams
    stream: int
    position: int
    num_logprobs: int
    prompt_token_ids: tuple[int, ...] | None = None
    output_token_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class SampleResult:
    """One token per row, and its log-probabilities where asked for."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]


def sample(logits_RV: torch.Tensor, rows: list[RowSampling]) -> SampleResult:
    """Draw a token for each row of float32 logits.

    Raises:
        InternalError: the logits hold NaN.
    """
    if bool(torch.isnan(logits_RV).any()):
        raise InternalError("the model produced NaN", reason="nan-logits")
    processed_RV = logits_RV
    if any(row.params.has_penalties for row in rows):
        processed_RV = _penalise(logits_RV.clone(), rows)
    drawn = [r for r, row in enumerate(rows) if not row.params.is_greedy]
    if drawn:
        noisy = _noisy_logits(processed_RV[drawn], [rows[r] for r in drawn])
        choices_RV = processed_RV.clone()
        choices_RV[drawn] = noisy
    else:
        choices_RV = processed_RV
    token_ids = choices_RV.argmax(dim=-1).tolist()
    return SampleResult(token_ids, _logprobs(logits_RV, rows, token_ids))


def _penalise(logits_RV: torch.Tensor, rows: list[RowSampling]) -> torch.Tensor:
    """Apply penalties in place to the rows that have them."""
    for r, row in enumerate(rows):
        params = row.params
        if not params.has_penalties:
            continue
        output = torch.tensor(row.output_token_ids or (), dtype=torch.int64)
        if params.repetition_penalty != 1.0:
            prompt = torch.tensor(row.prompt_token_ids or (), dtype=torch.int64)
            seen = torch.cat((prompt, output)).unique()
            values = logits_RV[r, seen]
            penalty = params.repetition_penalty
            logits_RV[r, seen] = torch.where(values < 0, values * penalty, values / penalty)
        if len(output) and (params.presence_penalty or params.frequency_penalty):
            used, counts = output.unique(return_counts=True)
            logits_RV[r, used] -= params.presence_penalty + params.frequency_penalty * counts
    return logits_RV


def _noisy_logits(logits_RV: torch.Tensor, rows: list[RowSampling]) -> torch.Tensor:
    params = [row.params for row in rows]
    temperature_R1 = torch.tensor([p.temperature for p in params])[:, None]
    truncated_RV = truncate_logits(
        logits_RV / temperature_R1,
        torch.tensor([p.top_k for p in params]),
        torch.tensor([p.top_p for p in params]),
        torch.tensor([p.min_p for p in params]),
    )
    return truncated_RV + gumbel_noise(
        torch.tensor([_signed(p.seed) for p in params]),
        torch.tensor([row.stream for row in rows]),
        torch.tensor([row.position for row in rows]),
        logits_RV.shape[1],
    )


def _signed(seed: int) -> int:
    """Return the 64-bit pattern of an unsigned seed as a signed number."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def _logprobs(
    logits_RV: torch.Tensor, rows: list[RowSampling], token_ids: list[int]
) -> list[TokenLogprobs | None]:
    result: list[TokenLogprobs | None] = [None] * len(rows)
    for r, row in enumerate(rows):
        if row.num_logprobs > 0:
            logprobs_V = logits_RV[r].log_softmax(dim=-1)
            best = logprobs_V.topk(min(row.num_logprobs, len(logprobs_V)))
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            token = token_ids[r]
            result[r] = TokenLogprobs(token, float(logprobs_V[token]), tuple(pairs))
    return result
