"""The rule by which candidates are found, in numpy and torch. candidates.py says what they are.

What the C++ kernels are proven against, and what finds them where these were not built. All
looks at a row's best tokens only: what comes after 64 of them is next to never accepted.
Shape legend: M rows (nodes of all trees), V vocabulary, K best tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from paceline.engine.kernels import gumbel_noise_at
from paceline.engine.sampling.distribution import penalise
from paceline.engine.sampling.noise import TARGET_LANE, noise_keys
from paceline.engine.spec.growth import Candidates
from paceline.engine.spec.tree import Proposal
from paceline.engine.step import SampleSpec

_NUM_BEST = 64
_LEAST_TEMPERATURE = 1e-6
"""Logits of float32 differ by more, or are equal."""
_REACHED = 1e-13
"""A sum of probabilities that lacks less than this has reached top-p, so that the last bits of
sums do not decide; tokens that are worth less altogether are left out with top-p 1 too."""

_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]
_NOTHING = Candidates((), ())


def candidates(
    logits_MV: torch.Tensor, specs: Sequence[SampleSpec], lanes: Sequence[int | None], count: int
) -> list[Candidates]:
    """Return possible children of each row's node; arguments as those of candidates.py's."""
    logits_MV = penalise(logits_MV, specs)
    is_finite_M = logits_MV.max(dim=-1).values.isfinite().tolist()
    rows = [_NOTHING] * len(specs)
    drawn: list[int] = []
    for m, (spec, is_finite) in enumerate(zip(specs, is_finite_M, strict=True)):
        if is_finite and spec.sampling.is_greedy:
            rows[m] = _likeliest(logits_MV[m], count)
        elif is_finite:
            drawn.append(m)
    if drawn:
        raced = _race(logits_MV[drawn], [specs[m] for m in drawn], [lanes[m] for m in drawn], count)
        for m, row in zip(drawn, raced, strict=True):
            rows[m] = row
    return rows


def _best(logits_V: torch.Tensor, count: int) -> tuple[_Ints, _Floats]:
    """Return the best tokens and their logits, falling; of equal ones the lower tokens first."""
    values_K, tokens_K = logits_V.topk(min(count, len(logits_V)))
    # Which of those that equal the least one topk returns is undefined.
    above_K = tokens_K[values_K > values_K[-1]]
    tied = (logits_V == values_K[-1]).nonzero()[: len(values_K) - len(above_K), 0]
    tokens_K = torch.cat([above_K.sort().values, tied])
    falling = logits_V[tokens_K].sort(descending=True, stable=True)
    return tokens_K[falling.indices].numpy(), falling.values.double().numpy()


def _likeliest(logits_V: torch.Tensor, count: int) -> Candidates:
    """Return the likeliest tokens, with their probability in the whole row."""
    tokens_K, logits_K = _best(logits_V, min(count, _NUM_BEST))
    probs_K = np.exp(logits_K - float(logits_V.double().logsumexp(-1)))
    num = int((probs_K > 0.0).sum())
    return Candidates(tuple(tokens_K[:num].tolist()), tuple(probs_K[:num].tolist()))


def _race(
    logits_MV: torch.Tensor, specs: Sequence[SampleSpec], lanes: Sequence[int | None], count: int
) -> list[Candidates]:
    """Return the leaders of the best tokens by log-probability and noise."""
    best = [_best(logits_V, _NUM_BEST) for logits_V in logits_MV]
    tokens_MK = np.stack([tokens_K for tokens_K, _ in best])
    logprobs_MK = _log_probabilities(np.stack([logits_K for _, logits_K in best]), specs)
    lanes_M = torch.tensor([TARGET_LANE if lane is None else lane for lane in lanes])
    noise_MK = gumbel_noise_at(*noise_keys(specs), torch.from_numpy(tokens_MK), lanes_M).numpy()
    perturbed_MK = logprobs_MK + noise_MK
    rows: list[Candidates] = []
    for m, lane in enumerate(lanes):
        num_kept = int((logprobs_MK[m] > -np.inf).sum())
        places = np.argsort(-perturbed_MK[m], kind="stable")[: min(count, num_kept)]
        if lane is None:
            confidences = _softmax(perturbed_MK[m])[places]
            tokens = tokens_MK[m, places]
            rows.append(Candidates(tuple(tokens.tolist()), tuple(confidences.tolist())))
        else:
            rows.append(_drawn(tokens_MK[m], logprobs_MK[m, :num_kept], perturbed_MK[m], places))
    return rows


def _drawn(
    tokens_K: _Ints, logprobs_K: _Floats, perturbed_K: _Floats, places: npt.NDArray[np.intp]
) -> Candidates:
    """Return the candidates at `places`, drawn by the Gumbel-top-k trick (Vieira 2014)."""
    probs_K = np.exp(logprobs_K)
    return Candidates(
        tuple(tokens_K[places].tolist()),
        tuple(probs_K[places].tolist()),
        tuple(perturbed_K[places].tolist()),
        Proposal(tuple(tokens_K[: len(probs_K)].tolist()), tuple(probs_K.tolist()), 0),
    )


def _log_probabilities(logits_MK: _Floats, specs: Sequence[SampleSpec]) -> _Floats:
    """Apply temperature and truncation to logits in falling order.

    Whatever comes of it is the draft's distribution: it need not round as the target's rule does.
    """
    columns = [
        (max(p.temperature, _LEAST_TEMPERATURE), p.top_k or np.inf, p.top_p, p.min_p)
        for p in (spec.sampling for spec in specs)
    ]
    temperature_M1, top_k_M1, top_p_M1, min_p_M1 = np.array(columns).T[:, :, None]
    logits_MK = (logits_MK - logits_MK[:, :1]) / temperature_M1
    weights_MK = np.exp(logits_MK)
    weights_MK *= np.arange(logits_MK.shape[1]) < top_k_M1
    sums_MK = weights_MK.cumsum(axis=1)
    is_kept_MK = sums_MK - weights_MK < (top_p_M1 - _REACHED) * sums_MK[:, -1:]
    is_kept_MK &= weights_MK >= min_p_M1
    is_kept_MK[:, 0] = True
    kept_MK = np.where(is_kept_MK, logits_MK, -np.inf)
    logprobs_MK: _Floats = kept_MK - np.log((weights_MK * is_kept_MK).sum(axis=1, keepdims=True))
    return logprobs_MK


def _softmax(logits_K: _Floats) -> _Floats:
    weights_K = np.exp(logits_K - logits_K.max())
    softmax_K: _Floats = weights_K / weights_K.sum()
    return softmax_K
