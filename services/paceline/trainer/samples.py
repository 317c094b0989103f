"""Samples of live traffic as texts to learn from; what is corrupt is refused.

    token_ids    [c0 c1 c2 | t0 t1 t2 t3]      num_context 3, 4 captured
    position       0  1  2    3  4  5  6
    row                  0    1  2  3          distribution of t0 stands behind position 2

So the row that predicts a captured token is the one of the position before it. learner.py calls
this for every sample that arrives, and counts and drops those that raise.

Shape legend: N captured tokens, K named at each, T tokens, E hidden size.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from paceline.domain.learnings import Sample, TokenOrigin
from paceline.trainer.texts import Text

_SUM_TOLERANCE = 0.02
"""By which a distribution in float16 may miss 1: 64 roundings of up to 2^-12 stay below it."""


def text_of(sample: Sample, vocab_size: int, hidden_size: int | None = None) -> Text:
    """Return a sample as a text in which every captured token counts alike.

    Positions start at 0 with its context, wherever it stood: rotary embeddings see distances only.
    Hidden states are kept if their size is given and the sample has them.

    Raises:
        ValueError: the sample is corrupt; says how.
    """
    count = sample.num_captured
    if sample.num_context < 1 or count < 1 or sample.top < 1:
        raise ValueError("no context, captured tokens or distribution")
    if not 0.0 <= sample.temperature < math.inf:
        raise ValueError(f"temperature {sample.temperature}")
    tokens_T = np.array(sample.token_ids, np.int64)
    _check_ids("token_ids", tokens_T, vocab_size)
    ids_NK = _array("top_ids", sample.top_ids, "<i4", (count, sample.top))
    _check_ids("top_ids", ids_NK, vocab_size)
    ordered_NK = np.sort(ids_NK, axis=-1)
    if (ordered_NK[:, 1:] == ordered_NK[:, :-1]).any():
        raise ValueError("top_ids: a token is named twice")
    probs_NK = _array("top_probs", sample.top_probs, "<f2", (count, sample.top)).astype(np.float32)
    tail_N = _array("tail_mass", sample.tail_mass, "<f2", (count,)).astype(np.float32)
    _check_probs(probs_NK, tail_N)
    origins_N = _array("origins", sample.origins, "u1", (count,))
    if origins_N.max() > max(TokenOrigin):
        raise ValueError(f"origins: {origins_N.max()} is none")
    hidden_NE = _hidden(sample, hidden_size)
    first, length = sample.num_context - 1, len(tokens_T)
    weights_T, origins_T = np.zeros(length, np.float32), np.zeros(length, np.uint8)
    weights_T[first:-1] = 1.0
    origins_T[first:-1] = origins_N
    with np.errstate(divide="ignore"):
        logprobs_NK = np.log(probs_NK).astype(np.float16)
    return Text(
        tokens_T.astype(np.int32),
        ids_NK.astype(np.int32),
        logprobs_NK,
        weights_T,
        sample.temperature,
        first,
        origins_T,
        sample.domain,
        hidden_NE,
    )


def _hidden(sample: Sample, hidden_size: int | None) -> npt.NDArray[np.float16] | None:
    if hidden_size is None or not sample.hidden:
        return None
    hidden_NE = _array("hidden", sample.hidden, "<f2", (sample.num_captured, hidden_size))
    if not np.isfinite(hidden_NE).all():
        raise ValueError("hidden: not finite")
    return hidden_NE.astype(np.float16)


def _array(name: str, data: bytes, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[np.generic]:
    kind = np.dtype(dtype)
    if len(data) != kind.itemsize * math.prod(shape):
        raise ValueError(f"{name}: {len(data)} bytes for {shape}")
    return np.frombuffer(data, kind).reshape(shape)


def _check_ids(name: str, ids: npt.NDArray[np.generic], vocab_size: int) -> None:
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(f"{name}: {ids.min()} to {ids.max()}, the vocabulary has {vocab_size}")


def _check_probs(probs_NK: npt.NDArray[np.float32], tail_N: npt.NDArray[np.float32]) -> None:
    for name, values in (("top_probs", probs_NK), ("tail_mass", tail_N)):
        if not np.isfinite(values).all():
            raise ValueError(f"{name}: not finite")
        if values.min() < 0.0 or values.max() > 1.0:
            raise ValueError(f"{name}: {values.min()} to {values.max()} are no probabilities")
    if (probs_NK[:, 1:] > probs_NK[:, :-1]).any():
        raise ValueError("top_probs: not best first")
    sums_N = probs_NK.sum(-1) + tail_N
    if np.abs(sums_N - 1.0).max() > _SUM_TOLERANCE:
        raise ValueError(f"top_probs: with the tail {sums_N.min():.3f} to {sums_N.max():.3f}")
