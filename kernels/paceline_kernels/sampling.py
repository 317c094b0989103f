"""Sampling operations: counter-based noise and truncation of distributions.

Shape legend: R rows, V vocabulary.
"""

from __future__ import annotations

import torch

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


def philox_uniform(
    seeds_R: torch.Tensor, streams_R: torch.Tensor, positions_R: torch.Tensor, vocab: int
) -> torch.Tensor:
    """Return float64 uniforms in (0, 1), [R, V], from Philox4x32-10 (Salmon et al. 2011).

    key = (seed low, seed high), counter = (token // 4, position, stream, 0), lane = token % 4,
    value = (x + 0.5) / 2**32: a token's noise depends on nothing but these numbers.
    """
    groups = (vocab + 3) // 4
    c0 = torch.arange(groups).expand(seeds_R.shape[0], groups)
    words = philox4x32(
        (
            c0,
            (positions_R[:, None] & _MASK).expand_as(c0),
            (streams_R[:, None] & _MASK).expand_as(c0),
            torch.zeros_like(c0),
        ),
        (seeds_R[:, None] & _MASK, (seeds_R[:, None] >> 32) & _MASK),
    )
    x_RV = torch.stack(words, dim=-1).flatten(1)[:, :vocab]
    return (x_RV.double() + 0.5) * 2.0**-32


def philox4x32(
    counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """Apply ten Philox rounds to 32-bit words held in int64 tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for round_ in range(_ROUNDS):
        if round_:
            k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
        high0, low0 = _multiply(_M0, c0)
        high1, low1 = _multiply(_M1, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
    return c0, c1, c2, c3


def _multiply(constant: int, word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return high and low 32 bits of a product, without overflowing signed 64 bits."""
    low_part = constant * (word & 0xFFFF)
    high_part = constant * (word >> 16) + (low_part >> 16)
    return high_part >> 16, ((high_part & 0xFFFF) << 16) | (low_part & 0xFFFF)


def gumbel_noise(
    seeds_R: torch.Tensor, streams_R: torch.Tensor, positions_R: torch.Tensor, vocab: int
) -> torch.Tensor:
    """Return standard Gumbel noise, float32 [R, V]; argmax(log p + noise) draws from p."""
    uniform = philox_uniform(seeds_R, streams_R, positions_R, vocab)
    return (-torch.log(-torch.log(uniform))).float()


def truncate_logits(
    logits_RV: torch.Tensor, top_k_R: torch.Tensor, top_p_R: torch.Tensor, min_p_R: torch.Tensor
) -> torch.Tensor:
    """Mask unlikely tokens to -inf: top-k, then top-p, then min-p, each on what is left.

    top_k 0, top_p 1 and min_p 0 are off. At least one token is kept; ties at the k-th value
    are kept, as in transformers' TopKLogitsWarper.
    """
    vocab = logits_RV.shape[1]
    if bool((top_k_R > 0).any()):
        k_R = torch.where(top_k_R > 0, top_k_R, vocab).clamp(max=vocab)
        best_RK = logits_RV.topk(int(k_R.max()), dim=-1).values
        threshold_R1 = best_RK.gather(1, k_R[:, None] - 1)
        logits_RV = logits_RV.masked_fill(logits_RV < threshold_R1, float("-inf"))
    if bool((top_p_R < 1.0).any()):
        sorted_RV, order_RV = logits_RV.sort(dim=-1, descending=False)
        below_RV = sorted_RV.softmax(dim=-1).cumsum(dim=-1)
        drop_RV = below_RV <= (1.0 - top_p_R[:, None])
        drop_RV &= top_p_R[:, None] < 1.0
        drop_RV[:, -1] = False
        dropped_RV = drop_RV.scatter(1, order_RV, drop_RV)
        logits_RV = logits_RV.masked_fill(dropped_RV, float("-inf"))
    if bool((min_p_R > 0.0).any()):
        probs_RV = logits_RV.softmax(dim=-1)
        floor_R1 = probs_RV.max(dim=-1, keepdim=True).values * min_p_R[:, None]
        logits_RV = logits_RV.masked_fill(probs_RV < floor_R1, float("-inf"))
    return logits_RV
