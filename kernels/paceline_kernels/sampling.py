"""Sampling operations: counter-based noise and truncation of distributions.

Every row is computed by itself and in the same way whatever the batch, so that what is drawn
for it does not depend on its neighbours. Shape legend: R rows, V vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

_MASK = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
_WEYL = np.array([0x9E3779B9, 0xBB67AE85], np.uint64) * np.arange(_ROUNDS, dtype=np.uint64)[:, None]
"""[rounds, 2] what is added to the key by each round."""

_CACHED_WORDS = 40_000
"""Philox words per lane computed at a time: 320 KB, so that ten rounds stay in the L2 cache.
Noise for 150,000 tokens takes 4 ms a row then, 18 ms for 32 rows at a time."""

_NUCLEUS_TOKENS = 1024
"""Tokens sorted first for top-p: of 150,000, sorting 1,024 takes 0.8 ms, 16,384 2.3, all 11."""

_REACHED = 1e-13
"""A sum of probabilities that lacks less than this has reached top-p, so that the last bits of
sums, which depend on their order, do not decide about a share that is reached exactly."""


def philox_uniform(
    seeds_R: torch.Tensor, streams_R: torch.Tensor, positions_R: torch.Tensor, vocab: int
) -> torch.Tensor:
    """Return float64 uniforms in (0, 1), [R, V], from Philox4x32-10 (Salmon et al. 2011).

    key = (seed low, seed high), counter = (token // 4, position, stream, 0), word = token % 4,
    value = (x + 0.5) / 2**32: a token's noise depends on nothing but these numbers.
    """
    return torch.cat(list(_uniform_parts(seeds_R, streams_R, positions_R, vocab)))


def _uniform_parts(
    seeds_R: torch.Tensor, streams_R: torch.Tensor, positions_R: torch.Tensor, vocab: int
) -> Iterator[torch.Tensor]:
    """Yield [r, V] for as many rows at a time as keep their words in the cache."""
    groups_1G = torch.arange((vocab + 3) // 4)[None]
    num_rows = max(1, _CACHED_WORDS // groups_1G.shape[1])
    parts = zip(
        seeds_R.split(num_rows), streams_R.split(num_rows), positions_R.split(num_rows), strict=True
    )
    for part in parts:
        words = torch.stack(_words(*part, groups_1G, None), dim=-1)
        yield _to_uniform(words.flatten(1)[:, :vocab])


def philox_uniform_at(
    seeds_R: torch.Tensor,
    streams_R: torch.Tensor,
    positions_R: torch.Tensor,
    tokens_RK: torch.Tensor,
    lanes_R: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `philox_uniform`'s values of some tokens only, float64 [R, K].

    A lane is the counter's last word. Other lanes than 0 have noise of their own, independent
    of `philox_uniform`'s and of each other's.
    """
    words = torch.stack(_words(seeds_R, streams_R, positions_R, tokens_RK // 4, lanes_R), dim=-1)
    return _to_uniform(words.gather(-1, (tokens_RK % 4)[..., None])[..., 0])


def _words(
    seeds_R: torch.Tensor,
    streams_R: torch.Tensor,
    positions_R: torch.Tensor,
    groups_RG: torch.Tensor,
    lanes_R: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    seeds_R1, streams_R1, positions_R1 = seeds_R[:, None], streams_R[:, None], positions_R[:, None]
    lanes_R1 = torch.zeros_like(seeds_R1) if lanes_R is None else lanes_R[:, None]
    counter = (groups_RG, positions_R1 & _MASK, streams_R1 & _MASK, lanes_R1 & _MASK)
    return philox4x32(counter, (seeds_R1 & _MASK, (seeds_R1 >> 32) & _MASK))


def _to_uniform(words: torch.Tensor) -> torch.Tensor:
    return (words.double() + 0.5) * 2.0**-32


def philox4x32(
    counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """Apply ten Philox rounds to 32-bit words held in int64 tensors that broadcast.

    In numpy, in place and with both halves of a round in one array: five calls a round where
    torch needs fourteen, and for the noise of a few tokens calls are all the time there is.
    """
    c0, c1, c2, c3, k0, k1 = (x.numpy().view(np.uint64) for x in (*counter, *key))
    shape = np.broadcast(c0, c1, c2, c3, k0, k1).shape
    even, odd = np.empty((2, *shape), np.uint64), np.empty((2, *shape), np.uint64)
    even[0], odd[0], even[1], odd[1] = c0, c1, c2, c3
    ones = (1,) * len(shape)
    multipliers = _MULTIPLIERS.reshape(2, *ones)
    # As large as the key alone: mostly one number a row.
    key_shape = np.broadcast(k0, k1).shape
    half_keys = np.empty((2, *ones[len(key_shape) :], *key_shape), np.uint64)
    half_keys[0], half_keys[1] = k0, k1
    keys = (_WEYL.reshape(_ROUNDS, 2, *ones) + half_keys) & np.uint64(_MASK)
    products = np.empty_like(even)
    crossed = products[::-1]
    for key_of_round in keys:
        np.multiply(even, multipliers, out=products)
        np.right_shift(crossed, np.uint64(32), out=even)
        np.bitwise_xor(even, odd, out=even)
        np.bitwise_xor(even, key_of_round, out=even)
        np.bitwise_and(crossed, np.uint64(_MASK), out=odd)
    return tuple(torch.from_numpy(x.view(np.int64)) for x in (even[0], odd[0], even[1], odd[1]))


def gumbel_noise(
    seeds_R: torch.Tensor, streams_R: torch.Tensor, positions_R: torch.Tensor, vocab: int
) -> torch.Tensor:
    """Return standard Gumbel noise, float32 [R, V]; argmax(log p + noise) draws from p."""
    parts = _uniform_parts(seeds_R, streams_R, positions_R, vocab)
    return torch.cat([_to_gumbel(uniform_RV) for uniform_RV in parts])


def gumbel_noise_at(
    seeds_R: torch.Tensor,
    streams_R: torch.Tensor,
    positions_R: torch.Tensor,
    tokens_RK: torch.Tensor,
    lanes_R: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `gumbel_noise`'s values of some tokens only, float32 [R, K]; lanes as above."""
    return _to_gumbel(philox_uniform_at(seeds_R, streams_R, positions_R, tokens_RK, lanes_R))


def _to_gumbel(uniform: torch.Tensor) -> torch.Tensor:
    return uniform.log_().neg_().log_().neg_().float()


def truncate_logits(
    logits_RV: torch.Tensor, top_k_R: torch.Tensor, top_p_R: torch.Tensor, min_p_R: torch.Tensor
) -> torch.Tensor:
    """Mask unlikely tokens to -inf: top-k, then top-p, then min-p, each on what is left.

    top_k 0, top_p 1 and min_p 0 are off. At least one token is kept; ties at the k-th value
    are kept, as in transformers' TopKLogitsWarper. csrc/truncate.h has the same borders.
    """
    vocab = logits_RV.shape[1]
    if bool((top_k_R > 0).any()):
        k_R = torch.where(top_k_R > 0, top_k_R, vocab).clamp(max=vocab)
        limited_R = k_R < vocab
        threshold_R1 = torch.full((len(k_R), 1), float("-inf"), dtype=logits_RV.dtype)
        if bool(limited_R.any()):
            best_RK = logits_RV[limited_R].topk(int(k_R[limited_R].max()), dim=-1).values
            threshold_R1[limited_R] = best_RK.gather(1, k_R[limited_R][:, None] - 1)
        logits_RV = logits_RV.masked_fill(logits_RV < threshold_R1, float("-inf"))
    nuclei = [r for r, top_p in enumerate(top_p_R.tolist()) if top_p < 1.0]
    if nuclei:
        logits_RV = logits_RV.clone()
        for r in nuclei:
            logits_RV[r] = _nucleus(logits_RV[r], float(top_p_R[r]))
    if bool((min_p_R > 0.0).any()):
        # By logits: their ratios' logarithms. Probabilities round differently on every machine.
        best_R1 = logits_RV.max(dim=-1, keepdim=True).values
        floor_R1 = best_R1 + min_p_R.double().log().to(logits_RV.dtype)[:, None]
        logits_RV = logits_RV.masked_fill(logits_RV < floor_R1, float("-inf"))
    return logits_RV


def _nucleus(logits_V: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keep the smallest set of likeliest tokens whose probability reaches `top_p`.

    A token goes when those before it reach `top_p` without it (Holtzman et al. 2020, eq. 4). Of
    equal logits at the border the first ones are kept.
    """
    weights_V = (logits_V.double() - logits_V.max()).exp_()
    target = (top_p - _REACHED) * weights_V.sum()
    size = min(_NUCLEUS_TOKENS, len(weights_V))
    while True:
        # Ordered by logits: weights of unequal ones may round to the same number.
        likeliest_K = logits_V.topk(size)
        weights_K = weights_V[likeliest_K.indices]
        before = weights_K.cumsum(0) - weights_K
        num_kept = max(int((before < target).sum()), 1)
        if num_kept < size or size == len(weights_V):
            break
        size = min(16 * size, len(weights_V))
    border = likeliest_K.values[num_kept - 1]
    is_kept_V = logits_V > border
    tied = (logits_V == border).nonzero()[:, 0]
    is_kept_V[tied[: num_kept - int(is_kept_V.sum())]] = True
    return logits_V.masked_fill(~is_kept_V, float("-inf"))
