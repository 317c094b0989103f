"""What a drafting model's logits propose: guesses of the target's draw, or draws of their own.

Called by drafters with a model, once per level of their trees. All looks at a row's best
tokens only: what comes after 64 of them is next to never accepted.
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

_Floats = npt.NDArray[np.float64]


def candidates(
    logits_MV: torch.Tensor, specs: Sequence[SampleSpec], lanes: Sequence[int | None], count: int
) -> list[Candidates]:
    """Return possible children of each row's node, at most `count`, in order of trial.

    None at all for a row that is not finite.

    Args:
        logits_MV: float32, what the draft says behind the nodes.
        specs: how the target draws behind them: position and penalties are those of the path.
        lanes: `draft_lane` of the nodes whose children are to be drawn for recursive
            rejection, None for those that guess what the target draws with its own noise.
            Greedy rows are guesses always.
        count: the most children of a node.
    """
    params = [spec.sampling for spec in specs]
    lanes = [None if p.is_greedy else lane for p, lane in zip(params, lanes, strict=True)]
    logits_MV = penalise(logits_MV, specs)
    if all(p.is_greedy for p in params):
        return _likeliest(logits_MV, count)
    best = logits_MV.topk(min(_NUM_BEST, logits_MV.shape[1]))
    logprobs_MK = _log_probabilities(best.values.numpy().astype(np.float64), specs)
    greedy = [m for m, p in enumerate(params) if p.is_greedy]
    lanes_M = torch.tensor([lane or TARGET_LANE for lane in lanes])
    noise_MK = gumbel_noise_at(*noise_keys(specs), best.indices, lanes_M).numpy()
    perturbed_MK = logprobs_MK + noise_MK * [[not p.is_greedy] for p in params]
    confidences_MK = _softmax(perturbed_MK)
    if greedy:
        logprobs_GK = best.values[greedy] - logits_MV[greedy].logsumexp(-1, keepdim=True)
        confidences_MK[greedy] = logprobs_GK.exp().numpy()
    order_MC = np.argsort(-perturbed_MK, axis=1, kind="stable")[:, :count]
    num_M = np.minimum((perturbed_MK > -np.inf).sum(axis=1), count).tolist()
    tokens_MK = best.indices.numpy()
    rows_M1 = np.arange(len(params))[:, None]
    guessed = zip(
        tokens_MK[rows_M1, order_MC].tolist(),
        confidences_MK[rows_M1, order_MC].tolist(),
        num_M,
        strict=True,
    )
    rows = [Candidates(tuple(t[:num]), tuple(c[:num])) for t, c, num in guessed]
    for m, lane in enumerate(lanes):
        if lane is not None and rows[m].tokens:
            places = order_MC[m, : num_M[m]]
            rows[m] = _drawn(tokens_MK[m], logprobs_MK[m], perturbed_MK[m], places)
    return rows


def _likeliest(logits_MV: torch.Tensor, count: int) -> list[Candidates]:
    """Return the likeliest tokens: what greedy rows come to, in a fifth of the time."""
    best = logits_MV.topk(min(count, logits_MV.shape[1]))
    probs_MC = (best.values - logits_MV.logsumexp(-1, keepdim=True)).exp_()
    rows: list[Candidates] = []
    for tokens_C, probs_C in zip(best.indices.tolist(), probs_MC.tolist(), strict=True):
        # Falling; NaN throughout where a row is not finite.
        num = sum(prob > 0.0 for prob in probs_C)
        rows.append(Candidates(tuple(tokens_C[:num]), tuple(probs_C[:num])))
    return rows


def _drawn(
    tokens_K: npt.NDArray[np.int64],
    logprobs_K: _Floats,
    perturbed_K: _Floats,
    places: npt.NDArray[np.int64],
) -> Candidates:
    """Return the candidates at `places`, drawn by the Gumbel-top-k trick (Vieira 2014)."""
    probs_K = np.exp(logprobs_K)
    num_kept = int((logprobs_K > -np.inf).sum())
    return Candidates(
        tuple(tokens_K[places].tolist()),
        tuple(probs_K[places].tolist()),
        tuple(perturbed_K[places].tolist()),
        Proposal(tuple(tokens_K[:num_kept].tolist()), tuple(probs_K[:num_kept].tolist()), 0),
    )


def _log_probabilities(logits_MK: _Floats, specs: Sequence[SampleSpec]) -> _Floats:
    """Apply temperature and truncation to logits in falling order; greedy rows stay as they are.

    Whatever comes of it is the draft's distribution: it need not round as the target's rule does.
    """
    columns = [
        (1.0, np.inf, 1.0, 0.0)
        if p.is_greedy
        else (max(p.temperature, _LEAST_TEMPERATURE), p.top_k or np.inf, p.top_p, p.min_p)
        for p in (spec.sampling for spec in specs)
    ]
    temperature_M1, top_k_M1, top_p_M1, min_p_M1 = np.array(columns).T[:, :, None]
    # A row that is not finite turns into NaN, of which nothing is proposed.
    with np.errstate(invalid="ignore"):
        logits_MK = (logits_MK - logits_MK[:, :1]) / temperature_M1
    weights_MK = np.exp(logits_MK)
    weights_MK *= np.arange(logits_MK.shape[1]) < top_k_M1
    before_MK = weights_MK.cumsum(axis=1) - weights_MK
    is_kept_MK = before_MK < top_p_M1 * weights_MK.sum(axis=1, keepdims=True)
    is_kept_MK &= weights_MK >= min_p_M1
    is_kept_MK[:, 0] = True
    kept_MK = np.where(is_kept_MK, logits_MK, -np.inf)
    logprobs_MK: _Floats = kept_MK - np.log((weights_MK * is_kept_MK).sum(axis=1, keepdims=True))
    return logprobs_MK


def _softmax(logits_MK: _Floats) -> _Floats:
    weights_MK = np.exp(logits_MK - logits_MK.max(axis=1, keepdims=True))
    softmax_MK: _Floats = weights_MK / weights_MK.sum(axis=1, keepdims=True)
    return softmax_MK
