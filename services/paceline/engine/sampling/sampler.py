"""Draws one token per row: by the C++ kernels where they were built, in torch otherwise.

Both draw the same token; `reference` spells the rule out. Called by the runner once per step.
"""

from __future__ import annotations

import torch

from paceline.domain.request import TokenLogprobs
from paceline.engine.kernels import DrawRow, draw, has_cpp_kernels
from paceline.engine.sampling import reference
from paceline.engine.step import SampledToken, SampleSpec


def sample(logits_RV: torch.Tensor, specs: list[SampleSpec]) -> list[SampledToken | None]:
    """Draw a token for each row of float32 logits; None for a row that has no distribution.

    That is one with a NaN, or without any token that is not -inf.
    """
    if not has_cpp_kernels():
        return reference.sample(logits_RV, specs)
    drawn = draw(logits_RV, [draw_row(spec) for spec in specs])
    sampled: list[SampledToken | None] = []
    for r, (token, spec) in enumerate(zip(drawn.tokens_R, specs, strict=True)):
        if token < 0:
            sampled.append(None)
        elif spec.num_logprobs <= 0:
            sampled.append(SampledToken(token))
        else:
            best = zip(drawn.best_tokens_RK[r], drawn.best_logprobs_RK[r], strict=True)
            logprobs = TokenLogprobs(token, drawn.logprobs_R[r], tuple(best))
            sampled.append(SampledToken(token, logprobs))
    return sampled


def draw_row(spec: SampleSpec) -> DrawRow:
    """Return what the C++ kernels need to know of a row."""
    params = spec.sampling
    has_penalties = params.has_penalties
    return DrawRow(
        params.temperature,
        params.top_p,
        params.min_p,
        params.repetition_penalty,
        params.presence_penalty,
        params.frequency_penalty,
        params.seed,
        spec.stream,
        spec.position,
        params.top_k,
        max(spec.num_logprobs, 0),
        (has_penalties and spec.prompt_token_ids) or (),
        (has_penalties and spec.output_token_ids) or (),
    )
